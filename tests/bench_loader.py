"""benchmark.py loader: what a clip costs to load, beside decoding it and nothing else.

Files of three kinds are written: as UCF101's and HMDB51's, as Kinetics', as Something-Something's.
Their pictures move as a camera does, or are those of real videos (--videos).

    decode only      PyAV decodes from the key frame before the clip to the clip's last frame
    ours             lib/video.py reads the frames, then the transform: what a worker does
    ours, N workers  make_loader with N processes; the milliseconds are those between two clips
    decord           another reader, then the same transform

All but the third run in one thread, in turn, round by round.
"""

import functools
import importlib.util
import math
import statistics
import tempfile
from pathlib import Path

import av
import numpy as np
import torch
from benchmark import keep, ratio, table
from contenders import timed
from PIL import Image
from torchvision import tv_tensors

from data import Split, Videos, make_loader, pretrain_transform, sample_clip
from lib.video import read_frames

FPS = 25
KINDS = {
    "XviD 320x240": dict(suffix="avi", size=(320, 240), frames=180, codec="mpeg4", rate=500_000),
    "H.264 340x256": dict(suffix="mp4", size=(340, 256), frames=300, codec="libx264", rate=400_000),
    "VP9 426x240": dict(
        suffix="webm", size=(426, 240), frames=48, codec="libvpx-vp9", rate=300_000
    ),
}
OPTIONS = {  # of the encoders: key frames far apart, B-frames as in those data sets
    "mpeg4": {"g": "250", "bf": "1"},
    "libx264": {"g": "250", "bf": "3"},
    "libvpx-vp9": {"g": "250", "deadline": "realtime", "cpu-used": "6"},
}
SOUGHT = ("mp4", "webm")  # containers in which decoding can begin at a key frame in the middle


def texture(side: int, rng: np.random.Generator) -> Image.Image:
    """Coloured noise with the spectrum of natural images (amplitude 1 / frequency)."""
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(side), np.fft.fftfreq(side)))
    frequency[0, 0] = np.inf
    noise = np.fft.fft2(rng.normal(size=(3, side, side))) / frequency
    image = np.fft.ifft2(noise).real
    image = image.mean(0) + 0.4 * image  # colours vary less than brightness
    pixels = (128 + 50 * image / image.std()).clip(0, 255).astype(np.uint8)
    return Image.fromarray(pixels.transpose(1, 2, 0))


def footage(size: tuple[int, int], frames: int, seed: int, video: str | None = None):
    """Frames (H, W, 3) uint8: a camera pans and zooms, before it something moves.

    With `video`: its frames, forwards and backwards.
    """
    if video:
        with av.open(video) as container:
            decoded = zip(range(frames), container.decode(video=0), strict=False)
            shown = [np.asarray(frame.to_image().resize(size)) for _, frame in decoded]
        there_and_back = shown + shown[::-1]
        yield from (there_and_back[i % len(there_and_back)] for i in range(frames))
        return
    rng = np.random.default_rng(seed)
    ground = texture(1024, rng)
    thing = texture(128, rng).resize((size[0] // 4, size[1] // 2))
    (x, y), zoom, (vx, vy) = rng.uniform(100, 300, 2), rng.uniform(1, 1.5), rng.uniform(-2, 2, 2)
    for i in range(frames):
        left, top = x + 80 * math.sin(vx * i / 40), y + 80 * math.sin(vy * i / 40)
        scale = zoom + 0.2 * math.sin(i / 40)
        box = (left, top, left + size[0] * scale, top + size[1] * scale)
        image = ground.resize(size, Image.Resampling.BILINEAR, box)
        place = size[0] * (0.4 + 0.3 * math.sin(i / 15)), size[1] * (0.3 + 0.1 * math.cos(i / 9))
        image.paste(thing, tuple(map(int, place)))
        noise = rng.normal(0, 3, (*size[::-1], 1))
        yield (np.asarray(image) + noise).clip(0, 255).astype(np.uint8)


def write_file(path: Path, kind: str, seed: int, video: str | None = None) -> None:
    """Write a file of a kind. Its pictures are made up, or those of `video`."""
    k = KINDS[kind]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(k["codec"], rate=FPS, options=OPTIONS[k["codec"]])
        stream.width, stream.height = k["size"]
        stream.pix_fmt, stream.bit_rate = "yuv420p", k["rate"]
        for image in footage(k["size"], k["frames"], seed, video):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def write_files(folder: str, kind: str, sources: list) -> list[Path]:
    """One file per source: a real video, or None for made-up pictures."""
    paths = [Path(folder) / f"{i}.{KINDS[kind]['suffix']}" for i in range(len(sources))]
    for i, (path, video) in enumerate(zip(paths, sources, strict=True)):
        write_file(path, kind, i, video)
    return paths


def decode_only(path: Path, wanted: list[int]) -> None:
    """The least that PyAV must do: decode from the key frame before the clip to its last frame."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_count, number = 1, -1
        sought = path.suffix[1:] in SOUGHT
        if sought:
            container.seek(round(min(wanted) / FPS / stream.time_base), stream=stream)
        for frame in container.decode(stream):
            number = round(frame.pts * stream.time_base * FPS) if sought else number + 1
            if number >= max(wanted):
                return


def decord_frames(path: Path, wanted: list[int]) -> torch.Tensor:
    """The frames by decord, (K, 3, H, W)."""
    import decord

    frames = decord.VideoReader(str(path), num_threads=1).get_batch(wanted)
    return torch.from_numpy(frames.asnumpy()).permute(0, 3, 1, 2)


def whole_file(path: Path) -> np.ndarray:
    """All frames (T, H, W, 3) that PyAV shows."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def dataset(paths: list[Path]) -> Videos:
    """Pre-training's data set of 16x224x224 clips, stride 4."""
    sample = functools.partial(sample_clip, frames=16, stride=4)
    split = Split([str(path) for path in paths], [-1] * len(paths), [])
    return Videos(split, sample, pretrain_transform(224, False))


def clips_asked(paths: list[Path], clips: int) -> dict[tuple[int, int], list[int]]:
    """{(file, seed): frames}: the clips that the data set draws for these keys."""
    wanted = {}
    for i, path in enumerate(paths):
        total = len(whole_file(path))
        for key in ((i, i * clips + number) for number in range(clips)):
            torch.manual_seed(key[1])
            wanted[key] = sample_clip(total, 16, 4)
    return wanted


def right(read, paths: list[Path], wanted: dict) -> bool:
    """Whether a reader's frames are those that PyAV shows.

    A mean difference of 2 of 255 is allowed: conversions from YUV differ.
    """
    for (i, _), numbers in wanted.items():
        expected = torch.from_numpy(whole_file(paths[i])[numbers]).permute(0, 3, 1, 2).int()
        if (read(paths[i], numbers).int() - expected).abs().float().mean() > 2:
            return False
    return True


def from_workers(videos: Videos, keys: list, workers: int) -> float:
    """Milliseconds from one clip to the next out of make_loader, once its workers have started."""
    batches = iter(make_loader(videos, [[key] for key in keys], workers))
    for _ in range(workers):
        next(batches)
    rest = len(keys) - workers
    return 1e3 * timed(lambda: [next(batches) for _ in range(rest)], cuda=False) / rest


def measure(paths: list[Path], clips: int, rounds: int, workers: list[int]) -> dict[str, dict]:
    """{reader: dict(rounds_ms, right)} for files of one kind."""
    videos, wanted = dataset(paths), clips_asked(paths, clips)
    transform = videos.transform
    ways = {
        "decode only": lambda key: decode_only(paths[key[0]], wanted[key]),
        "ours": videos.__getitem__,
    }
    found = {"decode only": {}, "ours": dict(right=right(read_frames, paths, wanted))}
    if importlib.util.find_spec("decord"):
        load = lambda key: tv_tensors.Video(decord_frames(paths[key[0]], wanted[key]))
        ways["decord"] = lambda key: transform(load(key))
        found["decord"] = dict(right=right(decord_frames, paths, wanted))
    for number in range(rounds):
        for name in list(ways)[:: 1 if number % 2 == 0 else -1]:
            seconds = timed(lambda load=ways[name]: [load(key) for key in wanted], cuda=False)
            found[name].setdefault("rounds_ms", []).append(1e3 * seconds / len(wanted))
        for count in workers:
            keys = list(wanted) * (1 + count)  # long enough for all workers
            spent = from_workers(videos, keys, count)
            found.setdefault(f"ours, {count} worker{'s' if count > 1 else ''}", {}).setdefault(
                "rounds_ms", []
            ).append(spent)
    return found


def run(args) -> None:
    """Rows of `loader`."""
    torch.set_num_threads(1)
    rows = []
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as folder:
            paths = write_files(folder, kind, args.videos or [None] * args.files)
            kilobytes = sum(path.stat().st_size for path in paths) / len(paths) / 1e3
            found = measure(paths, args.clips, args.rounds, args.workers)
        limit = found["decode only"]["rounds_ms"]
        for who, row in found.items():
            times = row["rounds_ms"]
            row |= dict(files=kind, footage="given" if args.videos else "made", who=who)
            row |= dict(kilobytes=kilobytes, ms=statistics.median(times), ratio=ratio(limit, times))
            row["clips_per_s"] = 1e3 / row["ms"]
            row["note"] = {True: "right", False: "OTHER FRAMES", None: ""}[row.get("right")]
            rows.append(row)
    merged = keep(args, rows, ("files", "footage", "who"))
    columns = {
        "files": ("files", ""),
        "reader": ("who", ""),
        "ms per clip": ("ms", ".1f"),
        "clips/s": ("clips_per_s", ".1f"),
        "of decode only": ("ratio", ".2f"),
        "frames": ("note", ""),
    }
    print(table(columns, merged))
