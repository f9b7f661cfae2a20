"""Exactly the frames asked for, from any video file.

A frame's index counts the frames that a player shows, in order from 0, whatever their times.
Two ways lead to the same frames. Where every packet is one frame and says when it is shown (MP4 and
Matroska), the packets tell which of them must be decoded. All other files are decoded from their
start and counted, and so are files in which a decoded frame is not as its packet announced.
Pixels are taken as square.
"""

import contextlib
import os
import stat
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import dropwhile, groupby, islice
from pathlib import Path

import av
import numpy as np
import torch
from torch import Tensor

# Only files of this disk are opened, and only formats that hold their video themselves: a playlist,
# whatever its name, would make FFmpeg open other files or addresses. Not read, by intent: raw
# streams, IVF, RealMedia, MXF.
FORMATS = "avi,mov,mp4,matroska,webm,mpeg,mpegvideo,mpegts,asf,flv,ogg,m4v,gif"
OPTIONS = {"protocol_whitelist": "file", "format_whitelist": FORMATS}
# Titles in another encoding are no reason to refuse a video. PyAV 19 always ignores them.
IGNORE = {"metadata_errors": "ignore"} if int(av.__version__.split(".")[0]) < 19 else {}

TIMED = {"mp4", "matroska"}  # containers whose packets carry true display times
ONE_FRAME_PER_PACKET = {av.Codec(name, "r").id for name in ("h264", "hevc", "vp9", "av1", "mpeg4")}
LONG_BYTES, LONG_FRAMES = 2**24, 3000  # above either, not all packets of a file are read

# How many frames a file shows, of files that must be decoded to know: (path, bytes, time) -> count.
_counts: dict[tuple[str, int, int], int] = {}


def read_frames(path: str | Path, pick: list[int] | Callable[[int], list[int]]) -> Tensor:
    """The frames asked for, in the order asked for: (K, 3, H, W) uint8 RGB, upright.

    `pick` is a list of K frame indices, in any order and with repeats, or a function from the
    number of frames to such a list. All frames get the size of the file's first frame. A damaged
    frame is what a player shows. Memory grows with K and not with the file.
    Raises ValueError, with the path, for a file that cannot be decoded or a frame it does not have.
    """
    with _one_line(path), _open(path) as container:
        stream = _video_stream(container)
        clip = _by_times(path, container, stream, pick)
        if clip is None:
            # Only AVI has a table of all packets that is almost the number of frames.
            avi = container.format.name == "avi"
            clip = _from_start(path, pick, len(stream.index_entries) if avi else 0)
    return torch.from_numpy(clip.pixels).permute(0, 3, 1, 2)


@dataclass
class Probe:
    """What decoding a whole file finds. `announced` and `rate` are 0 where the file does not say.

    `damaged`: frames that are broken, and packets that cannot be decoded. `announced`: frames by
    the container. `size`: (width, height) in pixels, as stored. `rate`: frames per second.
    """

    frames: int = 0
    damaged: int = 0
    announced: int = 0
    size: tuple[int, int] = (0, 0)
    rate: float = 0.0

    @property
    def problem(self) -> str:
        """Why the file is broken, or "". Whole XviD files lack a few of the announced frames."""
        if self.frames < 0.9 * self.announced:
            return f"{self.frames} of {self.announced} frames are there: the file is cut short"
        return f"{self.damaged} of {self.frames} frames are damaged" if self.damaged else ""


def played(path: str | Path, found: Probe) -> Iterator[av.VideoFrame]:
    """Yield all frames of a file as a player shows them, in constant memory; fills in `found`.

    Raises ValueError, with the path, for a file that cannot be read to its end or shows nothing.
    """
    with _one_line(path, found), _open(path) as container:
        stream = _video_stream(container)
        context = stream.codec_context
        found.announced, found.rate = stream.frames, float(stream.average_rate or 0)
        if "mp4" in container.format.name.split(","):  # an edit list may show only a part
            found.announced = sum(not entry.is_discard for entry in stream.index_entries)
        found.size = context.width, context.height
        packets = _packets(container, stream)
        packet = next(packets, None)
        while True:
            try:
                frames = context.decode(packet)  # None at the end: what the decoder still holds
            except av.InvalidDataError:  # players go on, too
                frames = []
                found.damaged += 1
            for frame in frames:
                found.frames += 1
                found.damaged += frame.is_corrupt
                yield frame
            if packet is None:
                break
            packet = next(packets, None)
        if not found.frames:
            raise OSError("no frame could be decoded")


def upright(image: np.ndarray, frame: av.VideoFrame) -> np.ndarray:
    """An image (H, W, 3) of a frame, turned and mirrored as the frame's display matrix says."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return image
    # A pixel at (x, y) is shown at (a x + c y, b x + d y).
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()
    if abs(b) > abs(a):
        image, across, down = image.transpose(1, 0, 2), c, b
    else:
        across, down = a, d
    return image[:: -1 if down < 0 else 1, :: -1 if across < 0 else 1]


def shown(path: str | Path) -> str:
    """A path for a line of text: what would break the line or is no text is escaped."""
    parts = []
    for sign in str(path):
        plain = sign.isprintable() or sign in "\xa0\u3000"  # these two are spaces
        parts.append(sign if plain else sign.encode("unicode_escape").decode())
    return "".join(parts)


# ------------------------------------------------------------------------------ opening a file


@contextlib.contextmanager
def _one_line(path: str | Path, found: Probe | None = None):
    """Turn the errors of files and of FFmpeg into a ValueError of one line, with the path."""
    try:
        yield
    except (av.FFmpegError, OSError) as error:
        after = f" after {found.frames} frames" if found and found.frames else ""
        raise ValueError(f"{shown(path)}: {error.strerror or error}{after}") from error


def _open(path: str | Path):
    """The opened container; OSError or an FFmpegError where there is none."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError("not a file")  # to open a pipe is to wait
    try:  # without file:, names such as a:b.avi or concat:a|b are addresses
        return av.open(f"file:{path}", options=OPTIONS, **IGNORE)
    except av.ArgumentError as error:
        raise OSError(f"none of the kinds of video that are read: {FORMATS}") from error


def _video_stream(container):
    """The stream that a player would choose. Cover pictures are none."""
    stream = container.streams.best("video")
    if stream is None or stream.disposition & av.stream.Disposition.attached_pic:
        raise OSError("no video in this file")
    if stream.codec_context is None:
        raise OSError("there is no decoder for its video: convert it to H.264, for example")
    stream.codec_context.thread_count = 1  # loader workers are the parallelism
    return stream


def _packets(container, stream):
    """The stream's packets that hold something, from where the container stands."""
    try:
        yield from (packet for packet in container.demux(stream) if packet.size)
    except IndexError as error:  # PyAV does not know streams that begin later
        raise OSError("another stream begins in the middle of this file") from error


class _Clip:
    """The frames of `wanted`: (K, H, W, 3) uint8 RGB `pixels`. `missing` are not there yet."""

    def __init__(self, wanted: list[int], size: tuple[int, int] | None = None):
        self.wanted, self.missing, self.size = wanted, set(wanted), size
        self.pixels = None
        self.reformatter = av.video.reformatter.VideoReformatter()

    def add(self, frame: av.VideoFrame, index: int) -> None:
        """Keep frame number `index` if it is wanted."""
        self.size = self.size or (frame.width, frame.height)
        if index not in self.missing:
            return
        width, height = self.size
        rgb = self.reformatter.reformat(frame, width, height, format="rgb24", threads=1).planes[0]
        image = np.ndarray((height, width, 3), np.uint8, rgb, strides=(rgb.line_size, 3, 1))
        image = upright(image, frame)
        if self.pixels is None:
            self.pixels = np.empty((len(self.wanted), *image.shape), np.uint8)
        self.pixels[[number == index for number in self.wanted]] = image
        self.missing.remove(index)


def _asked(pick, total: int) -> list[int]:
    """The frames that `pick` wants of a file of `total`."""
    return [int(index) for index in (pick(total) if callable(pick) else pick)]


def _choose(path, pick, total: int) -> list[int]:
    """The frames that `pick` wants; ValueError where the file has not got them."""
    wanted = _asked(pick, total)
    if not wanted or min(wanted) < 0 or max(wanted) >= total:
        raise ValueError(f"{shown(path)}: asked for frames {wanted}, it has {total}")
    return wanted


# ---------------------------------------------------------------- the first way: by display times


def _by_times(path, container, stream, pick) -> _Clip | None:
    """The wanted frames, from no more packets than they need; None where times are not sure."""
    formats = set(container.format.name.split(","))
    if not formats & TIMED or stream.codec_context.codec.id not in ONE_FRAME_PER_PACKET:
        return None
    size = stream.codec_context.width, stream.codec_context.height
    if os.stat(path).st_size > LONG_BYTES or len(stream.index_entries) > LONG_FRAMES:
        film = _Film(path, container, stream, "dts" if "mp4" in formats else "pts")
        if not film.sure:
            return None
        clip = _Clip(_choose(path, pick, film.before[-1]), size)
        windows = film.windows(clip.wanted)
    else:
        packets = list(_packets(container, stream))
        times = _times(packets)
        if not times:
            return None
        clip = _Clip(_choose(path, pick, len(times)), size)
        windows = [(packets, 0)]
    for packets, first in windows:
        times = _times(packets, first)
        if not times:
            return None
        number = {time: first + i for i, time in enumerate(times)}
        for part in _parts(packets, number, clip.missing):
            if not _decode(stream.codec_context, part, number, clip):
                return None
    return None if clip.missing else clip


def _times(packets, first: int = 0) -> list[int]:
    """The display times of all shown frames in order; [] where packets do not tell them.

    `first`: the number of the earliest of these frames. Frame 0 must be a key frame: what comes
    before the first one cannot be decoded and is not shown.
    """
    times = [packet.pts for packet in packets]
    if not times or None in times:
        return []
    if first == 0 and (not packets[0].is_keyframe or min(times) < times[0]):
        return []
    times = [packet.pts for packet in packets if not packet.is_discard]
    order = [packet.dts for packet in packets if packet.dts is not None]
    # After a step back in decoding time, some packets show nothing.
    return sorted(times) if len(set(times)) == len(times) and order == sorted(order) else []


def _parts(packets, number: dict[int, int], wanted: set[int]):
    """Yield what must be decoded: from a key frame to the last wanted frame that builds on it."""
    never = -(1 << 63)
    latest, keys, places = never, [(never, 0)], {}
    for place, packet in enumerate(packets):
        if packet.is_keyframe and packet.pts > latest:  # nothing before it is shown after it
            keys.append((packet.pts, place))
        latest = max(latest, packet.pts)
        if number.get(packet.pts) in wanted and not packet.is_discard:
            places[packet.pts] = place
    ends = {}
    for time, place in places.items():
        # Frames that are shown before a key frame can need what is before it (open groups).
        begin = keys[bisect_right(keys, (time, len(packets))) - 1][1]
        ends[begin] = max(ends.get(begin, 0), place + 1)
    for begin, end in ends.items():
        yield packets[begin:end]


def _decode(context, packets, number: dict[int, int], clip: _Clip) -> bool:
    """Decode one part into `clip`; False where a frame is damaged or has another size."""
    context.flush_buffers()
    for packet in [*packets, None]:
        if context.name == "h264" and packet:
            # FFmpeg leaves out a frame that is not wanted if no other builds on it. In HEVC,
            # others can, and the decoder of AV1 takes the setting only once.
            needed = number.get(packet.pts) in clip.missing
            context.skip_frame = "DEFAULT" if needed else "NONREF"
        try:
            frames = context.decode(packet)
        except av.InvalidDataError:
            return False
        for frame in frames:
            if frame.is_corrupt or (frame.width, frame.height) != clip.size:
                return False
            clip.add(frame, number.get(frame.pts, -1))
    return True


class _Film:
    """The packets of a long file: only those near a wanted frame are read.

    Per packet, in decoding order: `stamps`, the times to seek by ("dts" in MP4, "pts" in Matroska),
    and `before`, how many frames the packets before it show. `keys`: places of the key frames.
    """

    def __init__(self, path, container, stream, stamp: str):
        self.container, self.stream, self.stamp, self.sure = container, stream, stamp, False
        if stamp == "dts":  # an MP4 file has a table of all packets
            self._fill((e.timestamp, e.timestamp, e) for e in stream.index_entries)
        # Fragmented ones have more packets than the table that is read first.
        if not self.sure or not self.read(self.keys[-1], None):
            with _open(path) as again:  # all is read once, nothing is kept
                packets = _packets(again, _video_stream(again))
                self._fill((getattr(packet, stamp), packet.dts, packet) for packet in packets)

    def _fill(self, rows) -> None:
        self.stamps, self.keys, self.before, order = [], [], [0], []
        for place, (stamp, dts, entry) in enumerate(rows):
            self.stamps.append(stamp)
            self.keys += [place] if entry.is_keyframe else []
            self.before.append(self.before[-1] + (not entry.is_discard))
            order += [] if dts is None else [dts]
        complete = self.keys[:1] == [0] and None not in self.stamps and self.before[-1] > 0
        self.sure = complete and order == sorted(order)

    def read(self, begin: int, end: int | None) -> list:
        """The packets from place `begin` to `end` (None: the last); [] where they are others."""
        stamps = self.stamps[begin:end]
        try:
            self.container.seek(stamps[0], stream=self.stream)
            packets = _packets(self.container, self.stream)
            packets = dropwhile(lambda packet: getattr(packet, self.stamp) != stamps[0], packets)
            found = list(islice(packets, len(stamps) + (end is None)))
        except av.FFmpegError:  # no way to seek
            return []
        return found if [getattr(packet, self.stamp) for packet in found] == stamps else []

    def windows(self, wanted: list[int]):
        """Yield (packets, number of their first frame), for all groups that hold a wanted frame.

        A group is a key frame and what follows it. Group g shows the frames from before[keys[g]]
        on if no group is shown among the frames of another: its neighbours are read to see that.
        """
        first = [self.before[key] for key in self.keys]
        groups = {bisect_right(first, index) - 1 for index in wanted}
        ends = [*self.keys, len(self.stamps)]
        near = {0} | {group + step for group in groups for step in (-1, 0, 1)}
        near = sorted(near & set(range(len(self.keys))))
        for _, run in groupby(enumerate(near), lambda pair: pair[1] - pair[0]):
            run = [group for _, group in run]
            packets = self.read(ends[run[0]], ends[run[-1] + 1])
            times = [packet.pts for packet in packets]
            cuts = [self.keys[group] - self.keys[run[0]] for group in run[1:]]
            sure = packets and None not in times
            apart = sure and all(max(times[:cut]) < min(times[cut:]) for cut in cuts)
            yield (packets if apart else []), first[run[0]]


# --------------------------------------------------------------- the second way: from the start


def _from_start(path, pick, guess: int) -> _Clip:
    """The wanted frames, decoded from the start and counted.

    `pick` needs the number of frames, and only decoding them all tells it: XviD has packets without
    a frame, and cut files begin with frames that nothing can decode. The number is kept for the
    next time. The first time, the clip of a `guess` (0: none) is kept where the guess was right.
    """
    about = os.stat(path)
    file = str(path), about.st_size, about.st_mtime_ns
    if file not in _counts:
        random = torch.get_rng_state()
        clip = _Clip(_asked(pick, guess) if guess else [])
        for index, frame in enumerate(played(path, Probe())):
            clip.add(frame, index)
        _counts[file] = index + 1
        if index + 1 == guess and clip.wanted and not clip.missing:
            return clip
        torch.set_rng_state(random)  # so that the first time gives the same clip as the next
    clip = _Clip(_choose(path, pick, _counts[file]))
    for index, frame in enumerate(played(path, Probe())):
        clip.add(frame, index)
        if not clip.missing:
            return clip
    raise ValueError(f"{shown(path)}: it changed while it was read")
