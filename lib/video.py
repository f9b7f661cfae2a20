"""Exactly the frames asked for, from any video file.

A frame's index counts the frames that a player shows, in order from 0, whatever their times.
Two ways lead to the same frames. Where every packet is one frame and says when it is shown (MP4 and
Matroska), only what the wanted frames need is decoded. All other files are decoded from their start
and counted, and so are files in which a frame is not as announced. Pixels are taken as square.
"""

import contextlib
import os
import stat
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, dropwhile, islice, pairwise
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

# How many frames a file shows, of files that must be decoded to know: identity -> count.
_counts: dict[str, int] = {}
# Tables of long films, which take longer to read than a clip: as above -> those of _Groups.
_tables: dict[str, tuple] = {}
LONG = 3000  # frames


def read_frames(path: str | Path, pick: list[int] | Callable[[int], list[int]]) -> Tensor:
    """The frames asked for, in the order asked for: (K, 3, H, W) uint8 RGB, upright.

    `pick` is a list of K frame indices, in any order and with repeats, or a function from the
    number of frames to such a list. All frames get the size of the file's first frame. A damaged
    frame is what a player shows. Memory grows with K and not with the file.
    Raises ValueError, with the path, for a file that cannot be decoded or a frame it does not have.
    """
    choose = pick if callable(pick) else lambda total: pick
    with _opened(path) as (container, stream):
        clip = _by_times(path, container, stream, choose)
        # AVI has a table of all packets. It is almost the number of frames.
        clip = clip or _from_start(path, choose, guess=len(stream.index_entries) or 1)
    return torch.from_numpy(clip.pixels).permute(0, 3, 1, 2)


def length(path: str | Path) -> tuple[int, float]:
    """(how many frames a file shows, frames per second on average; 0: the file does not say).

    Raises ValueError as read_frames does.
    """
    found, totals = Probe(), []
    next(played(path, found))
    read_frames(path, lambda total: totals.append(total) or [0])
    return totals[-1], found.rate  # where only decoding tells the number, a guess comes first


@dataclass
class Probe:
    """What decoding a whole file finds."""

    frames: int = 0
    damaged: int = 0  # frames that are broken, and packets that cannot be decoded
    announced: int = 0  # frames by the container, or as its length says; 0: it does not say
    size: tuple[int, int] = (0, 0)  # width, height in pixels, as stored
    rate: float = 0.0  # frames per second; 0: the file does not say
    timed: bool = True  # a clip need not be decoded from the start of the file

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
    with _opened(path) as (container, stream):
        context = stream.codec_context
        found.announced, found.rate = stream.frames, float(stream.average_rate or 0)
        if "mp4" in container.format.name.split(","):  # an edit list may show only a part
            found.announced = sum(not entry.is_discard for entry in stream.index_entries)
        found.size, found.timed = (context.width, context.height), _timed(container, stream)
        end = 0  # of the last frame, in the stream's unit of time
        # None at the end: what the decoder still holds.
        for packet in chain(_packets(container, stream), [None]):
            try:
                frames = context.decode(packet)
            except av.InvalidDataError:  # players go on, too
                frames = []
                found.damaged += 1
            for frame in frames:
                found.frames += 1
                found.damaged += frame.is_corrupt
                end = (frame.pts or 0) + (frame.duration or 0)
                yield frame
        if not found.frames:
            raise OSError("no frame could be decoded")
        others = [s for s in container.streams if s is not stream and s.type != "attachment"]
        if "matroska" in container.format.name and end > 0 and not others:
            # The file says how long it lasts. With sound, that may be how long the sound lasts.
            seconds = (container.duration or 0) / 1e6
            found.announced = round(found.frames * seconds / float(end * stream.time_base))


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
    plain = lambda sign: sign.isprintable() or sign in "\xa0\u3000"  # these two are spaces
    return "".join(sign if plain(sign) else ascii(sign)[1:-1] for sign in str(path))


def identity(path: str | Path) -> str:
    """What changes with a file: path, bytes, time."""
    about = os.stat(path) if os.path.exists(path) else None
    return f"{path} {about and (about.st_size, about.st_mtime_ns)}"


# ------------------------------------------------------------------------------ opening a file


@contextlib.contextmanager
def _opened(path: str | Path):
    """(container, the stream that a player would choose; cover pictures are none).

    Errors of files and of FFmpeg, later ones as well, become a ValueError of one line, with the
    path.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise OSError("not a file")  # to open a pipe is to wait
        try:  # without file:, names such as a:b.avi or concat:a|b are addresses
            container = av.open(f"file:{path}", options=OPTIONS, **IGNORE)
        except av.ArgumentError as error:
            raise OSError(f"none of the kinds of video that are read: {FORMATS}") from error
        with container:
            stream = container.streams.best("video")
            if stream is None or stream.disposition & av.stream.Disposition.attached_pic:
                raise OSError("no video in this file")
            if stream.codec_context is None:
                raise OSError("there is no decoder for its video: convert it to H.264, for example")
            stream.codec_context.thread_count = 1  # loader workers are the parallelism
            yield container, stream
    except (av.FFmpegError, OSError) as error:
        raise ValueError(f"{shown(path)}: {error.strerror or error}") from error


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
        rgb = self.reformatter.reformat(frame, width, height, format="rgb24", threads=1)
        image = upright(rgb.to_ndarray(), frame)
        if self.pixels is None:
            self.pixels = np.empty((len(self.wanted), *image.shape), np.uint8)
        self.pixels[[number == index for number in self.wanted]] = image
        self.missing.remove(index)


def _choose(path, choose, total: int) -> list[int]:
    """The frames that `choose` wants; ValueError where the file has not got them."""
    wanted = choose(total)
    if not wanted or min(wanted) < 0 or max(wanted) >= total:
        raise ValueError(f"{shown(path)}: asked for frames {wanted}, it has {total}")
    return wanted


# ---------------------------------------------------------------- the first way: by display times


def _timed(container, stream) -> bool:
    """Whether every packet is one frame and says when it is shown."""
    known = stream.codec_context.codec.id in ONE_FRAME_PER_PACKET
    return known and not TIMED.isdisjoint(container.format.name.split(","))


def _by_times(path, container, stream, choose) -> _Clip | None:
    """The wanted frames, from no more packets than they need; None where times are not sure."""
    if not _timed(container, stream):
        return None
    context, mp4 = stream.codec_context, "mp4" in container.format.name.split(",")
    groups = _Groups(container, stream, "dts" if mp4 else "pts")
    if not groups.sure:
        return None
    clip = _Clip(_choose(path, choose, groups.first[-1]), (context.width, context.height))
    for group in sorted({bisect_right(groups.first, index) - 1 for index in clip.wanted}):
        for packets, number in groups.parts(group, clip.missing):
            if not _decode(context, packets, number, clip):
                return None
    return None if clip.missing else clip


class _Groups:
    """The packets of a file. A group is a key frame and what is decoded before the next one.

    `stamps` of all packets are the times to seek by: `stamp` is "dts" in MP4, "pts" in Matroska.
    `keys` are the places of the groups' key frames among the packets, `first` the numbers of the
    frames that they begin with. Both end with the total. `sure`: times can be trusted.
    """

    def __init__(self, container, stream, stamp: str):
        self.container, self.stream, self.stamp, self.sure = container, stream, stamp, False
        file = identity(container.name.removeprefix("file:"))
        if file in _tables:
            self.stamps, self.keys, self.first = _tables[file]
            self.sure = True
        else:
            self._read_table()
        if self.sure and len(self.stamps) > LONG:
            self.stamps = array("q", self.stamps)  # 8 bytes each
            _tables[file] = self.stamps, self.keys, self.first
        self.near = {0: self.read(0) if self.sure else []}
        # Frames before the first key frame cannot be decoded and are not shown.
        times = [packet.pts for packet in self.near[0]]
        self.sure = bool(times) and None not in times and times[0] == min(times)

    def _read_table(self) -> None:
        stream, stamp = self.stream, self.stamp
        if stamp == "dts":  # an MP4 file has a table of all packets
            self._fill((entry.timestamp, entry.timestamp, entry) for entry in stream.index_entries)
        # Fragmented ones have more packets than the table that is read first.
        if not self.sure or not self.read(len(self.keys) - 2):
            if self.sure:  # go back
                self.container.seek(self.stamps[0], stream=stream)
            packets = _packets(self.container, stream)  # all are read once, none is kept
            self._fill((getattr(packet, stamp), packet.dts, packet) for packet in packets)

    def _fill(self, rows) -> None:
        self.stamps, self.keys, self.first, total, order = [], [], [], 0, []
        for place, (stamp, dts, entry) in enumerate(rows):
            if entry.is_keyframe:
                self.keys.append(place)
                self.first.append(total)
            self.stamps.append(stamp)
            order += [] if dts is None else [dts]
            total += not entry.is_discard
        complete = self.keys[:1] == [0] and None not in self.stamps and total > 0
        # After a step back in decoding time, some packets show nothing.
        self.sure = complete and order == sorted(order)
        self.keys.append(len(self.stamps))
        self.first.append(total)

    def read(self, group: int) -> list:
        """The packets of a group; [] where they are others. After the last one none may follow."""
        stamps = list(self.stamps[self.keys[group] : self.keys[group + 1]])
        try:
            # FFmpeg goes to the last key frame that is shown by then.
            self.container.seek(max(stamps), stream=self.stream)
            packets = _packets(self.container, self.stream)
            packets = dropwhile(lambda packet: getattr(packet, self.stamp) != stamps[0], packets)
            found = list(islice(packets, len(stamps) + (group == len(self.keys) - 2)))
        except av.FFmpegError:  # no way to seek
            return []
        return found if [getattr(packet, self.stamp) for packet in found] == stamps else []

    def parts(self, group: int, wanted: set[int]):
        """Yield (packets to decode, {time: number of frame}) for the wanted frames of a group.

        Nothing where the group is shown among the frames of its neighbours, which are read to see
        that, or where two frames have one time.
        """
        near = range(max(group - 1, 0), min(group + 2, len(self.keys) - 1))
        self.near = {g: self.near.get(g) or self.read(g) for g in near}
        times = [[packet.pts for packet in packets] for packets in self.near.values()]
        if any(not part or None in part for part in times):
            return
        if any(max(part) >= min(later) for part, later in pairwise(times)):
            return
        packets = list(chain(*self.near.values()))
        order = sorted(packet.pts for packet in packets if not packet.is_discard)
        number = {time: self.first[near[0]] + i for i, time in enumerate(order)}
        if len(number) < len(order):
            return
        # A frame needs all from the last key frame that is shown before it. That of a frame that is
        # decoded after a key frame but shown before it (open groups) is the key frame before.
        begins = [part[0] for part in times]
        places = [self.keys[g] - self.keys[near[0]] for g in near]
        last = {}
        for place in range(places[group - near[0]], len(packets)):
            packet = packets[place]
            if number.get(packet.pts) in wanted and not packet.is_discard:
                last[bisect_right(begins, packet.pts) - 1] = place
        for key, place in last.items():
            if near[key] <= group:
                yield packets[places[key] : place + 1], number


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


# --------------------------------------------------------------- the second way: from the start


def _from_start(path, choose, guess: int) -> _Clip:
    """The wanted frames, decoded from the start and counted.

    `choose` needs the number of frames, and only decoding them all tells it: XviD has packets
    without a frame, and cut files begin with frames that nothing can decode. The number is kept for
    the next time. The first time, the clip of a `guess` is kept where the guess was right.
    """
    file = identity(path)
    if file not in _counts:
        random = torch.get_rng_state()
        clip = _Clip(choose(guess))
        for index, frame in enumerate(played(path, Probe())):
            clip.add(frame, index)
        _counts[file] = index + 1
        if index + 1 == guess and clip.wanted and not clip.missing:
            return clip
        torch.set_rng_state(random)  # so that the first time gives the same clip as the next
    clip = _Clip(_choose(path, choose, _counts[file]))
    for index, frame in enumerate(played(path, Probe())):
        clip.add(frame, index)
        if not clip.missing:
            return clip
    raise ValueError(f"{shown(path)}: it changed while it was read")
