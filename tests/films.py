"""Small video files for tests. Their frames say their numbers, so that the right ones are known."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch

from lib.video import upright


def numbered(index: int, height: int = 64, width: int = 96) -> np.ndarray:
    """A frame (H, W, 3) that says its number: 8 bits as dark and bright blocks, 2 rows of 4."""
    image = np.full((height, width, 3), 100, np.uint8)
    for bit in range(8):
        y, x = divmod(bit, 4)
        level = 200 if index >> bit & 1 else 40
        image[2 + 30 * y : 26 + 30 * y, 2 + 24 * x : 22 + 24 * x] = level
    return image


def number_of(frame: torch.Tensor) -> int:
    """The number that a decoded frame (3, H, W) says."""
    number = 0
    for bit in range(8):
        y, x = divmod(bit, 4)
        block = frame[:, 6 + 30 * y : 22 + 30 * y, 6 + 24 * x : 18 + 24 * x]
        number += int(block.float().mean() > 120) << bit
    return number


def write(path, codec="libx264", frames=60, pix_fmt="yuv420p", size=(64, 96), **options):
    """A video of numbered frames.

    `times`: presentation times in 1/1000 s. `muxer`: options of the container. `turned`: degrees of
    rotation. All others are the encoder's.
    """
    path, times, muxer = Path(path), options.pop("times", None), options.pop("muxer", {})
    turned = options.pop("turned", 0)
    with av.open(f"file:{path}", "w", options=muxer, format=format_of(path)) as container:
        options = {key: str(value) for key, value in options.items()}
        stream = container.add_stream(codec, rate=25, options=options)
        stream.height, stream.width, stream.pix_fmt = *size, pix_fmt
        stream.codec_context.thread_count = 1  # the same file on every machine
        if turned:
            stream.set_display_rotation(turned)
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(numbered(i, *size), format="rgb24")
            frame = frame.reformat(format=pix_fmt)
            if times:
                frame.pts, frame.time_base = times[i], Fraction(1, 1000)
                stream.codec_context.time_base = Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def format_of(path: Path) -> str:
    """The container that a name's ending stands for."""
    kinds = {"mkv": "matroska", "ts": "mpegts", "mpg": "mpeg", "wmv": "asf"}
    return kinds.get(path.suffix[1:], path.suffix[1:])


def remux(source, target, change, **muxer):
    """Copy the packets of a video, without decoding them, as `change` returns them."""
    with av.open(f"file:{source}") as a, av.open(f"file:{target}", "w", options=muxer) as b:
        stream = b.add_stream_from_template(a.streams.video[0])
        for packet in change([packet for packet in a.demux(video=0) if packet.size]):
            packet.stream = stream
            b.mux(packet)
    return Path(target)


def copy_of(packet, raw: bytes | None = None):
    """A packet of its own with the times of another."""
    raw = bytes(packet) if raw is None else raw
    new = av.Packet(len(raw))
    new.update(raw)
    new.pts, new.dts, new.time_base = packet.pts, packet.dts, packet.time_base
    new.is_keyframe = packet.is_keyframe
    return new


def sound(container, frames: int = 10) -> None:
    """Silence of `frames` x 1024 samples as the next stream of a container."""
    stream = container.add_stream("aac", rate=44100)
    for _ in range(frames):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
    container.mux(stream.encode())


def decoded(path) -> torch.Tensor:
    """All frames (T, 3, H, W) of a file as a player shows them: decoded from its start."""
    images, size = [], None
    with av.open(f"file:{path}") as container:
        stream = container.streams.best("video")
        stream.codec_context.thread_count = 1  # damaged frames look different with more
        for packet in container.demux(stream):
            try:
                frames = stream.codec_context.decode(packet)
            except av.InvalidDataError:
                continue
            for frame in frames:
                size = size or (frame.width, frame.height)
                image = frame.reformat(*size, format="rgb24").to_ndarray()
                images.append(np.ascontiguousarray(upright(image, frame)))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
