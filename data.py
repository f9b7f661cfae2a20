"""Videos on disk -> batches of uint8 clips.

    python data.py toy                              # write the toy data set to datasets/toy
    python data.py check ucf101 --data ~/UCF-101 --splits ~/ucfTrainTestlist     # decode all, say what is wrong
    python data.py check hmdb51 --data ~/hmdb51 --splits ~/testTrainMulti_7030_splits --fold 2
    python data.py check own --data FOLDER --splits LIST                         # or the folder alone
    python data.py prepare ucf101 --data ~/UCF-101 --splits ~/ucfTrainTestlist --out ~/UCF-101-fast   # faster to sample

From top to bottom: exact frames from a file (read_frames), which frames to take (sample_clip), which files belong to
a split (read_split), augmentation, the data set and its loader, the check and the rewriting of a data set, and the
generator of the toy data set. `check` and `prepare` exit with 0 when all is well, 1 when files are broken, 2 when
something is missing.

A clip is (T, C, H, W) uint8, torchvision's tv_tensors.Video order; a frame index counts frames in display order from 0.
"""

import argparse
import atexit
import contextlib
import copy
import ctypes
import json
import math
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import stat
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain, pairwise, zip_longest
from multiprocessing.connection import wait
from pathlib import Path

import av
import numpy as np
import torch
import torch.distributed as dist
from av.bitstream import BitStreamFilterContext
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as VF
from tqdm import tqdm

EXTENSIONS = {".avi", ".mp4", ".mkv", ".webm", ".mov", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".3gp", ".ts"}


# ------------------------------------------------------------------------------------------- frames of a file


def read_frames(path: str | Path, pick) -> Tensor:
    """Exactly the frames asked for, in the order asked for: (K, 3, H, W) uint8 RGB, upright.

    `pick` is a list of K frame indices, in any order and with repeats, or a function from the number of frames in the
    file to such a list (called again where the file turns out to hold fewer). Indices count the frames a player would
    show, whatever their times (variable frame rate, non-zero start, B-frames). The packets are held in memory, so
    memory grows by the size of the file.
    Raises ValueError, with the path, for a file that cannot be decoded, or not in time (see seconds_for), or a frame it
    does not have.
    """
    name = shown(path)
    try:
        with time_limit(path), _open(path) as container:
            stream = _video_stream(container)
            packets = [packet for packet in container.demux(stream) if packet.size]
            total = sum(not packet.is_discard for packet in packets)
            groups, times = _groups(container, stream, packets)
            while total:
                wanted = [int(i) for i in (pick(total) if callable(pick) else pick)]
                if not wanted or min(wanted) < 0 or max(wanted) >= total:
                    raise ValueError(f"{name}: asked for frames {wanted}, it has {total}")
                clip = Clip(wanted)
                for part, shows in _parts(stream, groups, times, clip.missing) if groups else [(packets, None)]:
                    seen = _decode(stream, part, shows, clip)
                    stream.codec_context.flush_buffers()
                if not clip.missing:
                    return torch.from_numpy(clip.pixels).permute(0, 3, 1, 2)
                if groups:
                    groups = []  # a frame was not the one that the packets announced: decode from the start and count
                elif callable(pick):
                    total = seen  # some packets held no frame (usual for XviD): choose again among those there are
                else:
                    raise ValueError(f"{name}: asked for frames {wanted}, only {seen} can be decoded")
            raise ValueError(f"{name}: no frame could be decoded")
    except (av.FFmpegError, OSError) as error:
        raise ValueError(f"{name}: {error.strerror or error}") from error
    except TooLate as error:
        raise ValueError(f"{name}: not read after {seconds_for(path):.0f} s") from error


# Only files of this disk are opened, and only of kinds that hold their video themselves: a playlist (ffconcat, #EXTM3U,
# SDP), whatever it is called, would make FFmpeg open other files or addresses.
FORMATS = "avi,mov,mp4,matroska,webm,mpeg,mpegvideo,mpegts,asf,flv,ogg,m4v,gif"
OPEN = dict(options={"protocol_whitelist": "file", "format_whitelist": FORMATS})
if int(av.__version__.split(".")[0]) < 19:
    OPEN["metadata_errors"] = "ignore"  # titles in another encoding are no reason to refuse a video; PyAV 19 agrees

SECONDS, SECONDS_PER_MIB = 60, 10  # the longest that reading a file may take; decoders and network disks can hang

# Where not everything need be decoded: containers whose packets carry true display times, and codecs with one shown
# frame a packet (VP8, for one, has packets that show nothing). MPEG-4 may be anywhere, its frames say their order. All
# others are decoded from the start and counted.
TIMED = {"mp4", "matroska"}
ONE_FRAME_A_PACKET = {av.Codec(name, "r").id for name in ("h264", "hevc", "vp9", "av1")}


def shown(path: str | Path) -> str:
    """A path for a line of text: what would break the line, or is no text at all, escaped as in Python."""
    plain = lambda c: c.isprintable() or c in "\xa0\u3000"  # spaces, too
    return "".join(c if plain(c) else c.encode("unicode_escape").decode() for c in str(path))


def seconds_for(path: str | Path) -> float:
    """The time limit of reading a file."""
    return SECONDS + SECONDS_PER_MIB * os.stat(path).st_size / 2**20


class TooLate(Exception):
    """A file could not be read in time."""


@contextlib.contextmanager
def time_limit(path: str | Path):
    """Raise TooLate in a block that takes longer than seconds_for(path); by SIGALRM, so only in a main thread."""
    if not hasattr(signal, "SIGALRM") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_):
        raise TooLate

    seconds, begin = seconds_for(path), time.monotonic()
    handler = signal.signal(signal.SIGALRM, stop)
    left, every = signal.setitimer(signal.ITIMER_REAL, seconds, 1)  # and each second: one can get lost in a destructor
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler or signal.SIG_DFL)
        if left:  # somebody else's timer
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - begin), 1e-3), every)


def _open(path: str | Path):
    """The opened container; OSError or an FFmpegError where there is none."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError("not a file")  # to open a pipe is to wait
    try:
        return av.open(f"file:{path}", **OPEN)  # without file:, names such as a:b.avi or concat:a|b are addresses
    except av.ArgumentError as error:
        raise OSError(f"none of the kinds of video that are read: {FORMATS}") from error


def _video_stream(container):
    """The stream that a player would choose; cover pictures are none."""
    stream = container.streams.best("video")
    if stream is None or stream.disposition & av.stream.Disposition.attached_pic:
        raise OSError("no video in this file")
    stream.codec_context.thread_count = 1  # loader workers are the parallelism; FFmpeg's threads can deadlock
    return stream


VOP = b"\0\0\1\xb6"  # begins a frame of MPEG-4; the next two bits are its kind, 0 that of key frames, 2 of B-frames
SURE = 32  # bytes from there on, of which one that is not coded, and shows nothing, has fewer


def _kind(raw: bytes) -> int:
    return raw[raw.index(VOP) + 4] >> 6


def _numbered(stream, packets) -> list:
    """MPEG-4's packets, one frame in each, with the frame's number as their time; [] if not possible.

    A B-frame is shown as soon as it is decoded, another one when the next of those is. XviD packs two frames in a
    packet and none in the next, and for a frame like the one before writes a few bytes that show nothing.
    """
    raw = [bytes(packet) for packet in packets]
    if any(r.count(VOP) > 1 for r in raw):
        unpack, copies = BitStreamFilterContext("mpeg4_unpack_bframes", stream), []
        for r in raw:
            copies.append(av.Packet(len(r)))  # FFmpeg wants zeros behind the bytes, which av.Packet(r) does not have
            copies[-1].update(r)
        packets = [packet for copy in copies for packet in unpack.filter(copy)]
        raw = [bytes(packet) for packet in packets]
    while raw and len(raw[-1]) <= 8:
        raw.pop()  # shows nothing
    if any(r.count(VOP) != 1 or len(r) - r.index(VOP) <= SURE for r in raw):
        return []
    kinds, order, held = [_kind(r) for r in raw], [], []
    for number, kind in enumerate(kinds):
        order += [number] if kind == 2 else held
        held = held if kind == 2 else [number]
    for place, number in enumerate(order + held):
        packet = packets[number]
        packet.pts, packet.dts, packet.is_keyframe = place, number, kinds[number] == 0
    return [] if 2 in kinds[:2] else packets[: len(raw)]


def _unreferred(packet, codec: str, width: int) -> bool:
    """Whether no other frame builds on that of a packet; `width`: bytes of the lengths in H.264, 0: not known."""
    raw, at, slices = bytes(packet) if codec in ("mpeg4", "h264") else b"", 0, 0
    if codec == "mpeg4":
        return _kind(raw) == 2
    while width and at + width < len(raw):
        head = raw[at + width]
        if 1 <= head & 31 <= 5:  # a slice
            slices += 1
            if head & 96:  # nal_ref_idc
                return False
        at += width + int.from_bytes(raw[at : at + width], "big")
    return slices > 0


def _groups(container, stream, packets) -> tuple[list[tuple[list, int]], list[int]]:
    """Groups of packets that can be decoded without the others, each with the number of its first frame.

    Each begins with a key frame, and splits the packets in decoding order as the frames in display order. Also returns
    the display times of all shown frames in order. No groups where a time is missing or there twice, where packets are
    out of order (some will show nothing), and where the file does not begin with such a key frame.
    """
    codec = stream.codec_context.codec
    if codec.name == "mpeg4" and not any(packet.is_discard for packet in packets):
        packets = _numbered(stream, packets)
    elif not set(container.format.name.split(",")) & TIMED or codec.id not in ONE_FRAME_A_PACKET:
        return [], []
    order = [packet.dts for packet in packets if packet.dts is not None]
    if any(packet.pts is None for packet in packets) or any(a > b for a, b in pairwise(order)):
        return [], []
    cuts, shown, latest = [], 0, -math.inf
    for number, packet in enumerate(packets):
        while cuts and packet.pts < cuts[-1][2]:
            cuts.pop()  # an open group of pictures: this later packet is shown before that key frame
        if packet.is_keyframe and packet.pts > latest:
            cuts.append((number, shown, packet.pts))
        latest, shown = max(latest, packet.pts), shown + (not packet.is_discard)
    times = sorted(packet.pts for packet in packets if not packet.is_discard)
    if not cuts or cuts[0][0] or len(set(times)) < len(times):
        return [], []
    ends = [*(cut[0] for cut in cuts[1:]), len(packets)]
    return [(packets[begin:end], first) for (begin, first, _), end in zip(cuts, ends, strict=True)], times


def _parts(stream, groups, times: list[int], wanted: set[int]):
    """What must be decoded for the wanted frames: packets that can be decoded by themselves, and the (time, number) of
    every frame that they show, in order."""
    codec, about = stream.codec_context.name, stream.codec_context.extradata or b"\0"
    width = (about[4] & 3) + 1 if about[0] == 1 and len(about) > 4 else 0
    for (packets, first), (_, end) in pairwise([*groups, ([], len(times))]):
        number = {times[i]: i for i in range(first, end)}
        needed = {time for time, i in number.items() if i in wanted}
        if needed:
            last = max(i for i, packet in enumerate(packets) if packet.pts in needed)
            packets = [p for p in packets[: last + 1] if p.pts in needed or not _unreferred(p, codec, width)]
            yield packets, sorted((p.pts, number[p.pts]) for p in packets if not p.is_discard)


class Clip:
    """The frames of `wanted`, (K, H, W, 3) uint8 RGB `pixels`, upright; `missing` are those not yet there."""

    def __init__(self, wanted: list[int]):
        self.wanted, self.missing, self.pixels, self.size = wanted, set(wanted), None, None
        self.reformatter = av.video.reformatter.VideoReformatter()

    def add(self, frame, index: int) -> None:
        self.size = self.size or (frame.width, frame.height)
        if index not in self.missing:
            return
        plane = self.reformatter.reformat(frame, *self.size, format="rgb24", threads=1).planes[0]
        image = np.ndarray((*self.size[::-1], 3), np.uint8, plane, strides=(plane.line_size, 3, 1))
        image = np.rot90(image, frame.rotation // 90)
        if self.pixels is None:
            self.pixels = np.empty((len(self.wanted), *image.shape), np.uint8)
        self.pixels[[i == index for i in self.wanted]] = image
        self.missing.remove(index)


def _decode(stream, packets, shows: list[tuple[int, int]] | None, clip: Clip) -> int:
    """Decode packets until no frame is missing; returns the number of frames seen.

    Stops early, at a frame that does not have the display time its place should have, where `shows` is given.
    """
    seen = 0
    for packet in [*packets, None]:  # None flushes the decoder
        for frame in stream.codec_context.decode(packet):
            if shows and (seen >= len(shows) or frame.pts != shows[seen][0]):
                return seen
            clip.add(frame, shows[seen][1] if shows else seen)
            seen += 1
            if not clip.missing:
                return seen
    return seen


# ----------------------------------------------------------------------------------------- frame index rules


def fitting_stride(total: int, frames: int, stride: int) -> int:
    """The largest stride up to `stride` at which `frames` frames fit into a video of `total`, at least 1."""
    return max(1, min(stride, (total - 1) // max(frames - 1, 1)))


def sample_clip(total: int, frames: int, stride: int) -> list[int]:
    """Random clip of `frames` frames, `stride` apart, from a video of `total` frames (method of pre-training).

    The start is uniform on 0 .. total - frames*stride. A video too short for that first gets the largest stride that
    fits, at least 1 (our choice: the official code repeats the last frame), and only one with fewer than `frames`
    frames repeats its last frame. Draws from torch's global generator.
    """
    stride = fitting_stride(total, frames, stride)
    start = int(torch.randint(max(total - frames * stride, 0) + 1, ()))
    return [min(start + i * stride, total - 1) for i in range(frames)]


def center_clip(total: int, frames: int, stride: int) -> list[int]:
    """The clip in the middle of the video, with sample_clip's rule for short ones. No randomness; for figures."""
    stride = fitting_stride(total, frames, stride)
    start = max(total - (frames - 1) * stride - 1, 0) // 2
    return [min(start + i * stride, total - 1) for i in range(frames)]


def uniform_clip(total: int, frames: int, stride: int = 0) -> list[int]:
    """A random frame from each of `frames` equal parts of the video (TSN sampling, ssv2); `stride` plays no part.

    Part i of a video of N frames is the N // frames frames from i * (N // frames) on, as in the official code; a video
    shorter than the clip is spread over it evenly (ours: the official code then repeats frame 0).
    """
    part = total // frames
    if part == 0:
        return [i * total // frames for i in range(frames)]
    return [i * part + int(torch.randint(part, ())) for i in range(frames)]


def dense_views(total: int, frames: int, stride: int, clips: int) -> list[list[int]]:
    """Test clips, evenly spread: of the frames 0, stride, 2*stride ... of the video, each takes `frames` in a row.

    As in the official code, except for short videos, which follow sample_clip's rule; no randomness.
    """
    stride = fitting_stride(total, frames, stride)
    places = list(range(0, total, stride))
    places += [places[-1]] * (frames - len(places))
    step = (len(places) - frames) / max(clips - 1, 1)
    return [places[int(k * step) :][:frames] for k in range(clips)]


def uniform_views(total: int, frames: int, stride: int, clips: int) -> list[list[int]]:
    """Test clips of TSN sampling: clip k has frames floor((i + k/clips) * total/frames), i = 0, 1 ... (paper: 2)."""
    return [[int((i + k / clips) * total / frames) for i in range(frames)] for k in range(clips)]


SAMPLING = {"dense": (sample_clip, dense_views), "uniform": (uniform_clip, uniform_views)}  # training clip, test clips


# ------------------------------------------------------------------------------------------ lists and splits


@dataclass
class Split:
    """Files of one part of a data set; `labels` are class numbers from 0, or -1 where there is no label."""

    paths: list[Path]
    labels: list[int]
    classes: list[str]


MOST_CLASSES = 100_000  # of a list: above, the number at the end of a line is no label
UCF101_COUNTS = {1: (9537, 3783), 2: (9586, 3734), 3: (9624, 3696)}  # the official lists, videos in train and test
HMDB51_COUNTS = {fold: (3570, 1530) for fold in (1, 2, 3)}
LISTS = {"ucf101": "ucfTrainTestlist", "hmdb51": "testTrainMulti_7030_splits"}  # the official folders of lists


def read_split(data: str | Path, splits: str | Path | None = None, fold: int = 1, train: bool = True) -> Split:
    """The training or test videos under folder `data`. What `splits` is decides how they are found:

        folder with classInd.txt             UCF101's official lists; labels from classInd.txt, minus 1
        folder with *_test_split1.txt        HMDB51's official lists; classes in alphabetical order
        file of lines `path label`           paths relative to `data` or absolute; the label, a number from 0, may be
                                             missing or -1
        None                                 the official lists' folder if it lies in `data` under its own name, else
                                             every video below `data`; the name of its folder is its class

    The last and the list know no test part: give another file or folder. Counts of the official lists are checked.
    Names need not be UTF-8, in lists neither: they are the file system's bytes. Raises ValueError for missing files and
    folders, malformed lines, a video listed twice (it would count twice), and videos or groups in both parts.
    """
    found = _listed(Path(data).expanduser(), Path(splits).expanduser() if splits else None, fold, train)
    missing = [path for path in found.paths if not os.path.isfile(path)]
    if missing:
        first = shown(missing[0])
        raise ValueError(f"{len(missing)} of {len(found.paths)} listed videos are missing, the first is {first}")
    return found


def _listed(data: Path, splits: Path | None, fold: int, train: bool) -> Split:
    """As read_split, without looking whether the videos that a list names are there."""
    if not os.path.isdir(data):
        raise ValueError(f"no folder {data}: --data must name the folder that holds the videos")
    if splits and not os.path.exists(splits):
        raise ValueError(f"no file or folder {splits}: --splits must name the official split files' folder or a list")
    if fold not in (1, 2, 3):
        raise ValueError(f"no fold {fold}: the official splits are 1, 2 and 3")
    splits = splits or next((data / name for name in LISTS.values() if (data / name).is_dir()), None)
    if splits is None:
        found = _read_folder(data)
    elif not splits.is_dir():
        found = _read_list(data, splits)
    elif os.path.isfile(splits / "classInd.txt"):
        found = _read_ucf101(data, splits, fold, train)
    elif any(splits.glob("*_test_split?.txt")):
        found = _read_hmdb51(data, splits, fold, train)
    else:
        raise ValueError(f"{splits} holds neither classInd.txt (UCF101) nor *_test_split1.txt (HMDB51)")
    twice = [path for path, times in Counter(found.paths).items() if times > 1]
    if twice:
        raise ValueError(f"{splits} lists {shown(twice[0])} twice")
    if not found.paths:
        raise ValueError(f"no videos: {splits or data} lists none ({', '.join(sorted(EXTENSIONS))})")
    return found


def _read_folder(data: Path) -> Split:
    def stop(error):
        raise ValueError(f"{shown(error.filename)}: {error.strerror}")  # rather than train on a part of the videos

    files = (Path(folder, name) for folder, _, names in os.walk(data, onerror=stop) for name in names)
    paths = sorted(path for path in files if path.suffix.lower() in EXTENSIONS and os.path.isfile(path))
    names = [path.relative_to(data).parent.as_posix() for path in paths]
    classes = sorted(set(names) - {"."})
    return Split(paths, [classes.index(name) if name in classes else -1 for name in names], classes)


def _lines(path: Path) -> dict[int, str]:
    """The lines of a list that hold something, by number; bytes that are no UTF-8 stay as Python has them in paths."""
    if not os.path.isfile(path):
        raise ValueError(f"no file {path}")
    try:
        text = path.read_bytes().decode("utf-8-sig", "surrogateescape")
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    if "\0" in text:
        raise ValueError(f"{path} is not a text file (a zero at character {text.index(chr(0))}): save it as UTF-8")
    lines = {number: line.strip(" \t\r") for number, line in enumerate(text.split("\n"), 1)}
    return {number: line for number, line in lines.items() if line}


def _read_list(data: Path, file: Path) -> Split:
    labels, first = {}, {}  # of every path; of every place, however it is spelled, the number of its line
    for number, line in _lines(file).items():
        found, label = re.fullmatch(r"(.*\S)[ \t]+(-?[0-9]{1,9})", line), -1
        if found:
            line, label = found[1], int(found[2])
        if not -1 <= label < MOST_CLASSES:
            reason = f"label {label} must be from 0 to {MOST_CLASSES - 1}, or -1 for none"
            raise ValueError(f"{file}: line {number}: {reason}")
        path = data / line
        before = first.setdefault(os.path.normpath(path), number)
        if before != number:
            raise ValueError(f"{file}: lines {before} and {number} are the same video, {shown(line)}: remove one")
        labels[path] = label
    classes = [str(label) for label in range(max(labels.values(), default=-1) + 1)]
    return Split(list(labels), list(labels.values()), classes)


def _read_ucf101(data: Path, splits: Path, fold: int, train: bool) -> Split:
    numbers = [line.split() for line in _lines(splits / "classInd.txt").values()]
    if any(len(entry) != 2 or entry[0] != str(i + 1) for i, entry in enumerate(numbers)):
        raise ValueError(f"{splits / 'classInd.txt'}: lines must read `number class`, numbered from 1")
    classes = [name for _, name in numbers]
    parts = [[], []]
    for part, name in zip(parts, (f"trainlist{fold:02}.txt", f"testlist{fold:02}.txt"), strict=True):
        for line in _lines(splits / name).values():
            video, *label = line.split()  # training lines end with the label
            group = video.split("/")[0]
            if group not in classes or label not in ([], [str(classes.index(group) + 1)]):
                raise ValueError(f"{splits / name}: line {line!r} must read `Class/video [number]` as in classInd.txt")
            part.append(video)
    groups = [{video.rsplit("_c", 1)[0] for video in part} for part in parts]  # v_Class_g08_c01.avi: group 8, clip 1
    if groups[0] & groups[1]:
        raise ValueError(f"{splits}: group {min(groups[0] & groups[1])} is in both the training and the test list")
    if len(classes) == 101:
        _check_counts("UCF101", fold, parts, UCF101_COUNTS)
    names = parts[0 if train else 1]
    return Split([data / name for name in names], [classes.index(name.split("/")[0]) for name in names], classes)


def _read_hmdb51(data: Path, splits: Path, fold: int, train: bool) -> Split:
    suffix = f"_test_split{fold}.txt"
    files = sorted(splits.glob("*" + suffix))
    if not files:
        raise ValueError(f"no files *{suffix} in {splits}")
    classes = [file.name.removesuffix(suffix) for file in files]
    parts = [[], []]
    for label, file in enumerate(files):
        for line in _lines(file).values():
            name, _, part = line.rpartition(" ")
            if part not in ("0", "1", "2"):
                raise ValueError(f"{file}: line {line!r} must end in 0 (unused), 1 (train) or 2 (test)")
            if part != "0":
                parts[int(part) - 1].append((data / classes[label] / name.strip(), label))
    if set(parts[0]) & set(parts[1]):
        raise ValueError(f"{splits}: {min(set(parts[0]) & set(parts[1]))[0]} is in both the training and the test part")
    if len(classes) == 51:
        _check_counts("HMDB51", fold, parts, HMDB51_COUNTS)
    chosen = parts[0 if train else 1]
    return Split([path for path, _ in chosen], [label for _, label in chosen], classes)


def _check_counts(name: str, fold: int, parts: list, table: dict) -> None:
    counts = tuple(len(part) for part in parts)
    if counts != table[fold]:
        has = "{} split {} has {} training and {} test videos, these lists have {} and {}"
        raise ValueError(has.format(name, fold, *table[fold], *counts))


# --------------------------------------------------------------------------------------------- augmentation


class MultiScaleCrop(v2.Transform):
    """TSN's crop, VideoMAE's only pre-training augmentation: one box a clip, resized to size x size pixels.

    Width and height are each 1, .875, .75 or .66 of the short side, at most one step apart; the box sits at one of
    13 places (corners, edges, centre, quarter points). Bilinear with antialiasing, as in the official code.
    """

    SCALES = (1, 0.875, 0.75, 0.66)
    PLACES = ((0, 0), (4, 0), (0, 4), (4, 4), (2, 2), (0, 2), (4, 2), (2, 4), (2, 0), (1, 1), (3, 1), (1, 3), (3, 3))

    def __init__(self, size: int):
        super().__init__()
        self.size = size

    def make_params(self, flat_inputs) -> dict:
        height, width = VF.get_size(flat_inputs[0])
        edges = [int(min(height, width) * scale) for scale in self.SCALES]
        edges = [self.size if abs(edge - self.size) < 3 else edge for edge in edges]
        pairs = [(w, h) for i, h in enumerate(edges) for j, w in enumerate(edges) if abs(i - j) <= 1]
        w, h = pairs[int(torch.randint(len(pairs), ()))]
        x, y = self.PLACES[int(torch.randint(len(self.PLACES), ()))]
        return dict(left=x * ((width - w) // 4), top=y * ((height - h) // 4), width=w, height=h)

    def transform(self, inpt, params):
        return VF.resized_crop(inpt, **params, size=[self.size, self.size], antialias=True)


class Erase(v2.RandomErasing):
    """Random erasing of a uint8 video: one rectangle for all frames, filled with noise of its own in every frame.

    Box: torchvision's, area 2 to 33 % and aspect 0.3 to 3.3 (official code); noise with ImageNet's mean and std.
    """

    def __init__(self, p: float):
        super().__init__(p, scale=(0.02, 1 / 3), ratio=(0.3, 1 / 0.3))

    def transform(self, inpt, params):
        if params["v"] is not None:
            i, j, h, w = (params[key] for key in "ijhw")
            inpt = inpt.clone()
            mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]
            noise = torch.randn(*inpt.shape[:-2], h, w) * std + mean
            inpt[..., i : i + h, j : j + w] = (255 * noise).clamp(0, 255).to(torch.uint8)
        return inpt


def pretrain_transform(size: int, flip: bool) -> v2.Transform:
    """Pre-training augmentation of a tv_tensors.Video: MultiScaleCrop, and with `flip` a mirror image half the time."""
    return v2.Compose([MultiScaleCrop(size), *([v2.RandomHorizontalFlip()] if flip else [])])


def finetune_transform(size: int, flip: bool, operations: int, magnitude: float, smallest: float, erase: float):
    """Fine-tuning augmentation of a tv_tensors.Video, the same for all of its frames (official code, in its order).

    RandAugment (`operations` draws, each applied half of the time, at `magnitude` of 10; torchvision's list of
    operations, bilinear), RandomResizedCrop to size x size pixels from `smallest` to all of the area, mirror image half
    the time with `flip`, random erasing with probability `erase`.
    """
    one = v2.RandAugment(1, round(3 * magnitude), 31, interpolation=v2.InterpolationMode.BILINEAR, fill=128)
    steps = [v2.RandomApply([one], p=0.5) for _ in range(operations)]
    steps.append(v2.RandomResizedCrop(size, scale=(smallest, 1.0), antialias=True))
    return v2.Compose([*steps, *([v2.RandomHorizontalFlip()] if flip else []), *([Erase(erase)] if erase else [])])


def eval_transform(size: int) -> v2.Transform:
    """Short side to `size` pixels, then the central square."""
    return v2.Compose([v2.Resize(size, antialias=True), v2.CenterCrop(size)])


def spatial_views(clip: Tensor, size: int, crops: int) -> Tensor:
    """(T, C, H, W) -> (crops, T, C, size, size): short side to `size` pixels, squares evenly along the longer side."""
    clip = VF.resize(clip, size, antialias=True)
    spare = [side - size for side in clip.shape[-2:]]  # one of them is 0
    shares = [k / (crops - 1) for k in range(crops)] if crops > 1 else [0.5]
    corners = [(int(share * spare[0]), int(share * spare[1])) for share in shares]
    return torch.stack([clip[..., y : y + size, x : x + size] for y, x in corners])


# ----------------------------------------------------------------------------------------- data set, loader


def derive_seed(*numbers: int) -> int:
    """One seed out of several numbers, the first of which names the use; a pure function, so nothing needs saving."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


class Videos(Dataset):
    """Training clips of a split. The key is (index, seed): everything random about an item comes from its seed.

    An item is (clips (R, T, C, H, W) uint8, label, unreadable): R clips from one decode, each augmented on its own and
    each cut at its own time, or with `same_time` all at one. A file that cannot be read is left out and reported,
    {path: error}, and a random other one takes its place. After 10 unreadable ones in a row the clips are None.
    """

    def __init__(self, split: Split, sample, transform, repeats: int = 1, same_time: bool = False):
        self.split, self.sample, self.transform = split, sample, transform
        self.repeats, self.same_time = repeats, same_time

    def __len__(self) -> int:
        return len(self.split.paths)

    def pick(self, total: int) -> list[int]:
        """Frames of the R clips, one after the other, from a video of `total` frames."""
        if self.same_time:
            return self.sample(total) * self.repeats
        return [i for _ in range(self.repeats) for i in self.sample(total)]

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor | None, int, dict[str, str]]:
        (index, seed), unreadable = key, {}
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # the CPU's alone
            for _ in range(10):
                try:
                    frames = read_frames(self.split.paths[index], self.pick)
                except ValueError as error:
                    unreadable[str(self.split.paths[index])] = str(error)
                    index = int(torch.randint(len(self), ()))
                    continue
                clips = [self.transform(tv_tensors.Video(clip)) for clip in frames.chunk(self.repeats)]
                clips = torch.stack([clip.as_subclass(Tensor) for clip in clips])
                return clips, self.split.labels[index], unreadable
        return None, -1, unreadable


class Views(Dataset):
    """Test views of videos: item i is (i, views (clips * crops, T, C, size, size) uint8), from one decode.

    `rule` is a test rule of SAMPLING, for `clips` clips of `frames` frames; see spatial_views for `size` and `crops`.
    Raises ValueError, with the path, for a file that cannot be read: evaluation never leaves anything out.
    """

    def __init__(self, paths: list, rule, frames: int, stride: int, clips: int, size: int, crops: int):
        self.paths, self.rule, self.frames, self.stride = paths, rule, frames, stride
        self.clips, self.size, self.crops = clips, size, crops

    def __len__(self) -> int:
        return len(self.paths)

    def pick(self, total: int) -> list[int]:
        """Frames of all clips, one after the other, from a video of `total` frames."""
        return [i for clip in self.rule(total, self.frames, self.stride, self.clips) for i in clip]

    def __getitem__(self, index: int) -> tuple[int, Tensor]:
        frames = read_frames(self.paths[index], self.pick)
        views = [spatial_views(clip, self.size, self.crops) for clip in frames.split(self.frames)]
        return index, torch.cat(views)


def collate(items) -> tuple[Tensor | None, Tensor, dict[str, str]]:
    """Items -> (clips (B*R, T, C, H, W) uint8, labels (B*R,), unreadable); the clips of a video stand together."""
    clips, labels, parts = zip(*items, strict=True)
    unreadable = {path: error for part in parts for path, error in part.items()}
    if any(clip is None for clip in clips):
        return None, torch.tensor(labels), unreadable
    # Channels last, as the decoder leaves them, and as a worker straight into shared memory: half of the copies.
    rows = default_collate([clip.movedim(2, -1) for clip in clips])
    clips = rows.flatten(0, 1).movedim(-1, 2)
    return clips, torch.tensor(labels).repeat_interleave(clips.shape[0] // len(items)), unreadable


def note_unreadable(bad: dict[str, str], unreadable: dict[str, str], clips: Tensor | None, total: int) -> None:
    """Add a batch's unreadable files to those of the run, `bad`, {path: error}.

    Raises ValueError when they are over a tenth of the `total` videos, or when a batch found none that it could read.
    """
    bad.update(unreadable)
    if clips is None or len(bad) > total / 10:
        raise ValueError(f"over a tenth of the videos cannot be read, for example {next(iter(bad.values()))}")


def merge(progress: dict, processes: int) -> None:
    """Make what each process counted the same in all: the mean of the summed loss, the unreadable files of all."""
    if processes > 1:
        parts = [None] * processes
        dist.all_gather_object(parts, progress)
        progress["loss"] = sum(part["loss"] for part in parts) / processes
        progress["unreadable"] = {path: error for part in parts for path, error in part["unreadable"].items()}


def split_batch(batch: int, processes: int, micro: int | None) -> tuple[int, int]:
    """Effective batch -> (videos per process and forward pass, passes per optimiser step)."""
    micro = micro or batch // processes
    if micro < 1 or batch % (micro * processes):
        raise ValueError(f"--batch {batch} must be a multiple of {processes} processes x micro batch {micro}")
    return micro, batch // (micro * processes)


def cosine_lr(step: int, total: int, warmup: int, peak: float, floor: float) -> float:
    """Learning rate of a step, as in the official code: linear from 0 to peak, both included, then half a cosine."""
    if step < warmup:
        return peak * step / max(warmup - 1, 1)
    return floor + (peak - floor) * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2


class Order(Sampler):
    """Keys of every micro-batch of this process, from step `start` to `steps`; a batch sampler for a DataLoader.

    Each epoch is a new permutation of the `total` videos, cut into effective batches of `batch` (the rest is
    dropped); of each batch, process `rank` of `size` takes its share. Depends on (seed, epoch, position) alone, so
    a run can stop at any step and continue, also with another number of processes.
    """

    def __init__(self, total: int, batch: int, micro: int, start: int, steps: int, seed: int, rank: int, size: int):
        if batch > total:
            raise ValueError(f"batch {batch} is larger than the {total} videos: use --batch {total} or fewer")
        self.total, self.batch, self.micro, self.start, self.steps = total, batch, micro, start, steps
        self.seed, self.rank, self.size, self.skip = seed, rank, size, 0  # skip: micro-batches of the first step

    def later(self, count: int) -> "Order":
        """The same order without its first `count` micro-batches."""
        order, passes = copy.copy(self), self.batch // self.size // self.micro
        order.start, order.skip = self.start + (self.skip + count) // passes, (self.skip + count) % passes
        return order

    def __iter__(self):
        share, per_epoch = self.batch // self.size, self.total // self.batch
        for step in range(self.start, self.steps):
            epoch, number = divmod(step, per_epoch)
            if number == 0 or step == self.start:
                order = torch.randperm(
                    self.total, generator=torch.Generator().manual_seed(derive_seed(1, self.seed, epoch))
                )
            begin = number * self.batch + self.rank * share
            skip = self.skip * self.micro if step == self.start else 0
            for i in range(begin + skip, begin + share, self.micro):
                yield [(int(order[j]), derive_seed(2, self.seed, epoch, j)) for j in range(i, i + self.micro)]


def note_skipped(skipped: list[int], done: int, lr: float, order: Order, videos: Videos, run: Path) -> None:
    """Note that step number `done` was left out, because its gradient was not finite.

    The tenth in a row ends the run: ValueError, and run/nonfinite.json names step, learning rate and videos.
    """
    skipped.append(done)
    if skipped[-10:] != list(range(done - 9, done + 1)):
        return
    whole = Order(order.total, order.batch, order.batch, done - 1, done, order.seed, rank=0, size=1)
    about = dict(step=done, lr=lr, videos=[str(videos.split.paths[i]) for i, _ in next(iter(whole))])
    if order.rank == 0:
        (run / "nonfinite.json").write_text(json.dumps(about, indent=1) + "\n")
    raise ValueError(
        f"no finite gradient in ten steps in a row, the last is {done} (lr {lr:.3g}): try a lower --base-lr, "
        f"--clip-grad 1 or --precision fp32; {run / 'nonfinite.json'} names its videos, --resume repeats it"
    )


def make_loader(dataset: Dataset, order: Order | list, workers: int, pin: bool, collate=collate):
    """Yield the batches of `order`, decoded by `workers` processes (0: in this one); `pin` memory for copies to a GPU.

    `order` holds the keys of each batch, `collate` makes a batch of its items (itemgetter(0): one item is a batch).
    A worker that dies costs time and nothing else: new ones begin at the first batch that was not delivered. Raises
    ValueError when workers die three times with no batch between. Workers ignore the signals that ask a run to stop:
    what to do about them is up to this process. They end with the generator, or with this process, however it ends.
    """
    delivered = deaths = 0
    while True:
        keys = order.later(delivered) if isinstance(order, Order) else order[delivered:]
        loader = DataLoader(
            dataset, batch_sampler=keys, num_workers=workers, collate_fn=collate, pin_memory=pin,
            worker_init_fn=_begin_worker, generator=torch.Generator(),  # else it draws from the global one
        )  # fmt: skip
        others, processes, batches = multiprocessing.active_children(), [], None
        at_exit = partial(_kill, processes)  # a worker would ignore multiprocessing's SIGTERM, and be waited for
        atexit.register(at_exit)
        try:
            try:
                batches = iter(loader)
            finally:
                processes += [p for p in multiprocessing.active_children() if p not in others]
                if workers and hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread():
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler raises wherever we happen to be
            while True:
                batch = next(batches, None)
                if batch is None:
                    return
                delivered, deaths = delivered + 1, 0
                yield batch
        except Exception as error:
            ended = wait([p.sentinel for p in processes], min(workers, 1))  # a lost connection is seen before it
            if not ended and isinstance(error, ValueError) and workers:  # a file's: without the worker's traceback
                raise ValueError(str(error).rstrip().rpartition("ValueError: ")[2]) from error
            if not ended:
                raise
            dead, deaths = [p for p in processes if p.sentinel in ended], deaths + 1
        finally:
            if any(p.is_alive() for p in processes):
                timer = threading.Timer(2, _kill, [processes])  # for those that do not end when asked
                timer.start()
                if batches is not None:
                    batches._shutdown_workers()
                timer.cancel()
                timer.join()  # if it is at work, two would wait for one process
            _kill(processes)
            atexit.unregister(at_exit)
        codes = ", ".join(str(p.exitcode) for p in dead)
        if deaths == 3:
            raise ValueError(
                f"loader workers died three times in a row (exit code {codes}): out of memory (fewer --workers), "
                f"/dev/shm full, or a file that crashes the decoder (`python data.py check` finds it)"
            )
        tqdm.write(f"a loader worker died (exit code {codes}): going on with new ones", file=sys.stderr)


def _begin_worker(worker: int) -> None:
    if hasattr(ctypes.pythonapi, "mallopt"):  # glibc: memory is kept; new pages cost a fifth of the time
        ctypes.pythonapi.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, the most that it allows
        ctypes.pythonapi.mallopt(-1, 2**28)  # M_TRIM_THRESHOLD
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):  # not everywhere
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    threading.Thread(target=_follow, args=(multiprocessing.parent_process(),), daemon=True).start()


def _follow(parent) -> None:
    """End when the main process does: PyTorch only looks between two batches, and not at all under `forkserver`."""
    parent.join()
    os._exit(1)


def _kill(processes: list) -> None:
    for process in processes:
        process.kill()
        process.join()


# ------------------------------------------------------------------------------------------ check a data set

CHECKED = {"ucf101": 4, "hmdb51": 2, "own": 4}  # the recipes' strides, in frames
SOURCES = {
    "ucf101": """UCF101 is on https://www.crcv.ucf.edu/data/UCF101.php: download UCF101.rar and
UCF101TrainTestSplits-RecognitionTask.zip (not DetectionTask) and unpack both, keeping folders (unrar x, not unrar e):
    unrar x UCF101.rar
    unzip UCF101TrainTestSplits-RecognitionTask.zip
This leaves UCF-101/ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi ... and ucfTrainTestlist/classInd.txt ...:
    python data.py check ucf101 --data UCF-101 --splits ucfTrainTestlist""",
    "hmdb51": """HMDB51 is on https://serre-lab.clps.brown.edu/resource/hmdb-a-large-human-motion-database/: download
hmdb51_org.rar, which holds one .rar a class, and test_train_splits.rar, and unpack all, keeping folders (unrar x, not
unrar e):
    mkdir hmdb51 && unrar x hmdb51_org.rar hmdb51/
    (cd hmdb51 && for f in *.rar; do unrar x "$f" && rm "$f"; done)
    unrar x test_train_splits.rar
This leaves hmdb51/brush_hair/*.avi ... and testTrainMulti_7030_splits/brush_hair_test_split1.txt ...:
    python data.py check hmdb51 --data hmdb51 --splits testTrainMulti_7030_splits""",
    "own": """--data names a folder of videos, --splits (if any) a text file of lines `path` or `path label`, paths
relative to --data.""",
}


@dataclass
class Probe:
    """What decoding a whole file found: frames, those of them that are damaged, those announced by the container (0: it
    does not say), size (width, height) in pixels as stored, rate in frames a second (0: unknown)."""

    frames: int = 0
    damaged: int = 0
    announced: int = 0
    size: tuple[int, int] = (0, 0)
    rate: float = 0.0

    @property
    def problem(self) -> str:
        """Why the file is broken, or "". XviD files lack a frame or two of those announced, whole ones not a tenth."""
        if self.frames < 0.9 * self.announced:
            return f"{self.frames} of {self.announced} frames are there: the file is cut short"
        return f"{self.damaged} of {self.frames} frames are damaged" if self.damaged else ""


def played(path: str | Path, found: Probe):
    """Yield all frames of a file, from its start, in constant memory, as read_frames counts them; fills in `found`.

    Raises ValueError, with the path, for a file of which nothing or not everything can be decoded.
    """
    name = shown(path)
    try:
        with _open(path) as container:
            stream = _video_stream(container)
            found.announced, found.rate = stream.frames, float(stream.average_rate or 0)
            if "mp4" in container.format.name.split(","):  # an edit list may show a part
                found.announced = sum(not entry.is_discard for entry in stream.index_entries)
            found.size = (stream.codec_context.width, stream.codec_context.height)
            for packet in chain((packet for packet in container.demux(stream) if packet.size), [None]):
                for frame in stream.codec_context.decode(packet):
                    found.frames += 1
                    found.damaged += frame.is_corrupt
                    yield frame
    except (av.FFmpegError, OSError) as error:
        after = f" after {found.frames} frames" if found.frames else ""
        raise ValueError(f"{name}: {error.strerror or error}{after}") from error
    if not found.frames:
        raise ValueError(f"{name}: no frame could be decoded")


def probe(path: str | Path) -> Probe:
    """Decode a whole file and count its frames; ValueError as of played."""
    found = Probe()
    for _ in played(path, found):
        pass
    return found


def _probe(path: Path) -> Probe | str:
    try:
        return probe(path)
    except ValueError as error:
        return str(error).removeprefix(f"{shown(path)}: ")


def _serve(work, pipe) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's affair
    threading.Thread(target=_follow, args=(multiprocessing.parent_process(),), daemon=True).start()
    while True:
        pipe.send(work(pipe.recv()))


def in_processes(work, items: list, processes: int, limit):
    """Yield (item, work(item)) as they are ready; instead of a result a text where the process came to no end.

    A process that dies (decoders can crash) or takes more than limit(item) seconds costs its one item.
    """
    waiting, idle, busy = items[::-1], [], {}  # busy: pipe -> process, item, when it must be ready
    try:
        while waiting or busy:
            while waiting and len(busy) < processes:
                if not idle:
                    pipe, there = multiprocessing.Pipe()
                    idle.append((pipe, multiprocessing.Process(target=_serve, args=(work, there), daemon=True)))
                    idle[-1][1].start()
                    there.close()  # so that the end of the process is the end of the pipe
                (pipe, process), item = idle.pop(), waiting.pop()
                pipe.send(item)
                busy[pipe] = process, item, time.monotonic() + limit(item)
            ready = wait(busy, max(0, min(due for *_, due in busy.values()) - time.monotonic()))
            for pipe, (process, item, due) in list(busy.items()):
                if pipe in ready:
                    try:
                        result = pipe.recv()
                        idle.append((pipe, process))
                    except (EOFError, OSError):
                        process.join()
                        result = f"decoding it crashed the process (exit code {process.exitcode})"
                elif time.monotonic() > due:
                    process.kill()
                    process.join()
                    result = f"not decoded after {limit(item):.0f} s"
                else:
                    continue
                del busy[pipe]
                yield item, result
    finally:
        for pipe, process in [*idle, *((pipe, process) for pipe, (process, *_) in busy.items())]:
            process.kill()
            process.join()
            pipe.close()


def _find_lists(kind: str, data: Path, splits: Path | None) -> Path:
    """The folder of a data set's official lists; ValueError where it is not at `splits` (None: in `data`)."""
    pattern = {"ucf101": "classInd.txt", "hmdb51": "*_test_split?.txt"}[kind]
    folder = splits or data / LISTS[kind]
    if any(folder.glob(pattern)):
        return folder
    error = f"no {pattern} in {folder}" if splits else f"--splits is missing, and {data} holds no {LISTS[kind]}"
    for place in (folder, folder.parent, data, data.parent):
        found = sorted(path.parent for part in (pattern, "*/" + pattern) for path in place.glob(part))
        if found:
            raise ValueError(f"{error}: the lists are in {found[0]}, use --splits {shlex.quote(str(found[0]))}")
    if kind == "ucf101" and any(folder.glob("**/trainlist01.txt")):
        error += ": are these the lists of the detection task?"
    raise ValueError(f"{error}\n{SOURCES[kind]}")


def _explain_missing(kind: str, data: Path, missing: list[Path], total: int) -> str:
    """Say that listed videos are missing; if it is one of the usual mistakes, which; else what to download."""
    error = f"{len(missing)} of {total} listed videos are missing, the first is {shown(missing[0])}"
    name = missing[0].relative_to(data) if missing[0].is_relative_to(data) else Path(missing[0].name)
    if name.name in ("", ".."):
        return error
    above = [folder for folder in data.absolute().parents if os.path.isfile(folder / name)]
    files = [Path(folder, file) for folder, _, names in os.walk(data) for file in names]
    below = sorted(path for path in files if path.name == name.name)
    depth = len(name.parts)
    level = above + [path.parents[depth - 1] for path in below if path.parts[-depth:] == name.parts]
    packed = sorted(path for path in files if path.name == f"{name.parts[0]}.rar")
    if level:
        return f"{error}: it is in {level[0]}, use --data {shlex.quote(str(level[0]))}"
    if below:
        return f"{error}: it lies at {below[0]}, without its folder; `unrar x` keeps folders, `unrar e` does not"
    if packed:
        loop = 'for f in *.rar; do unrar x "$f" && rm "$f"; done'
        return f"{error}: {packed[0]} is still packed; (cd {shlex.quote(str(packed[0].parent))} && {loop})"
    folders = sorted({path.parent.name for path in missing if not os.path.isdir(path.parent)})
    if folders and len(missing) < total:
        error += f", folders that are not there: {', '.join(folders)}"
    return f"{error}\n{SOURCES[kind]}"


def _find_data(dataset: str, data: Path, splits: Path | None) -> Path | None:
    """Where the lists of a data set are; ValueError, with what to do about it, if they or its folder are missing."""
    if dataset not in LISTS:
        return splits
    if not data.is_dir():
        raise ValueError(f"no folder {data}: --data must name the folder that holds the videos\n{SOURCES[dataset]}")
    return _find_lists(dataset, data, splits)


def _present(dataset: str, data: Path, *parts: Split) -> list[Path]:
    """All videos of some parts, each once; ValueError, with what to do about it, if one is missing."""
    paths = list(dict.fromkeys(path for part in parts for path in part.paths))
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        raise ValueError(_explain_missing(dataset, data, missing, len(paths)))
    return paths


def check(dataset: str, data: str | Path, splits: str | Path | None, fold: int, workers: int) -> int:
    """Decode every video of both parts of a data set with `workers` processes; print what is there and what is broken.

    `dataset` is "ucf101", "hmdb51" or "own", the other arguments are read_split's. Returns 0, or 1 where files are
    broken. Raises ValueError where folders, lists or videos are missing or wrong; it says what to do about it.
    """
    if workers < 1:
        raise ValueError(f"--workers {workers} must be at least 1")
    data, splits = Path(data).expanduser(), Path(splits).expanduser() if splits else None
    splits = _find_data(dataset, data, splits)
    train, test = (_listed(data, splits, fold, part) for part in (True, False))
    paths = _present(dataset, data, train, test)
    test_part = "no test part" if test == train else f"{len(test.paths)} test videos"
    print(f"{len(train.paths)} training videos, {test_part}, {len(train.classes)} classes", flush=True)
    official = {"ucf101": 101, "hmdb51": 51}.get(dataset, len(train.classes))
    if len(train.classes) != official:
        task = ": are these of the detection task?" if len(train.classes) == 24 else ""
        print(f"note: the official lists have {official} classes{task}")

    begin = time.monotonic()
    found = in_processes(_probe, paths, min(workers, len(paths)), seconds_for)
    found = dict(tqdm(found, "decoding", len(paths), unit="video"))
    seconds = time.monotonic() - begin
    problems = {path: found[path] if isinstance(found[path], str) else found[path].problem for path in paths}
    problems = {path: problem for path, problem in problems.items() if problem}
    for path, problem in problems.items():
        print(f"broken: {shown(path)}: {problem}")
    print(f"{len(paths)} videos decoded in {seconds:.0f} s with {workers} processes, {len(problems)} broken")
    good = [found[path] for path in paths if path not in problems]
    if good:
        _describe(good, CHECKED[dataset])
    where = ["--data", str(data), *(["--splits", str(splits)] if splits else []), *(["--fold", str(fold)] * (fold > 1))]
    if problems:
        print("next: unpack or download the broken files again; training leaves out what it cannot read")
    print("next:", shlex.join(["python", "pretrain.py", *([dataset] if dataset in LISTS else []), *where]))
    return int(bool(problems))


def _describe(probes: list[Probe], stride: int) -> None:
    counts = sorted(file.frames for file in probes)
    print(f"frames: shortest {counts[0]}, median {counts[len(counts) // 2]}, longest {counts[-1]}")
    table = lambda values: ", ".join(f"{value} ({n})" for value, n in Counter(values).most_common(5))
    print(f"sizes, the most common (videos): {table('{}x{}'.format(*file.size) for file in probes)}")
    print(f"frames a second, the most common (videos): {table(f'{file.rate:.4g}' for file in probes)}")
    fewer = sum(file.frames < file.announced for file in probes)
    if fewer:
        print(f"{fewer} hold a little less than their headers announce, as XviD does; only what is there is counted")
    short, tiny = sum(fitting_stride(n, 16, stride) < stride for n in counts), sum(n < 16 for n in counts)
    rule = f": they get a smaller stride; {tiny} of them, with fewer than 16, repeat the last frame" if short else ""
    print(f"{short} are too short for a clip of 16 frames, {stride} apart{rule}")


# ---------------------------------------------------------------------------------------- prepare a data set

# MPEG-4 with a key frame every 12 frames and fixed quantiser 4: of 30 settings of x264, MPEG-4 and MJPEG the fastest to
# sample at about 38 dB. LEAST is what a rewritten file must reach, over all its pixels.
CODEC, LEAST = ("mpeg4", {"g": "12", "qmin": "4", "qmax": "4"}), 30


def upright(frame, size: tuple[int, int], reformatter) -> np.ndarray:
    """A decoded frame, brought to size (width, height) as stored, then turned: (H, W, 3) uint8 RGB."""
    image = reformatter.reformat(frame, *size, format="rgb24", interpolation="BICUBIC", threads=1).to_ndarray()
    return np.rot90(image, frame.rotation // 90)


def rewrite(source: str | Path, target: str | Path, short_side: int | None) -> float:
    """Write all frames of a video to `target`, upright, for fast sampling; returns their PSNR in dB.

    Shrinks to `short_side` pixels where that is less, and sides to even numbers. There is no sound. Raises ValueError,
    with the path of `source`, where it is broken, or where the frames of `target` are not as many and alike.
    """
    found, again, size, codec = Probe(), Probe(), None, av.video.reformatter.VideoReformatter()
    with av.open(f"file:{target}", "w", format="mp4") as container:
        for number, frame in enumerate(played(source, found)):
            if not number:
                share = min(1, (short_side or math.inf) / min(frame.width, frame.height))
                size = [max(int(side * share) // 2 * 2, 2) for side in (frame.width, frame.height)]
                stream = container.add_stream(CODEC[0], rate=round(min(max(found.rate, 1), 240)), options=CODEC[1])
                stream.codec_context.thread_count = 1
            image = upright(frame, size, codec)
            if not number:
                stream.height, stream.width, stream.pix_fmt = *image.shape[:2], "yuv420p"
            image = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            container.mux(stream.encode(image))
        container.mux(stream.encode())
    if found.problem:
        raise ValueError(f"{shown(source)}: {found.problem}")
    error = 0.0
    for a, b in zip_longest(played(source, Probe()), played(target, again)):
        a = upright(a, size, codec) if a else np.zeros(0)
        b = b.to_ndarray(format="rgb24") if b else np.zeros(1)
        error += np.square(a.astype(np.float32) - b).mean() / found.frames if a.shape == b.shape else math.inf
    quality = -10 * math.log10(max(error, 1e-3) / 255**2)
    if again.frames != found.frames or not quality >= LEAST:
        same = f"{again.frames} of {found.frames} frames, PSNR {quality:.1f} dB"
        raise ValueError(f"{shown(source)}: not the same when rewritten: {same}")
    return quality


def _rewrite(job: tuple) -> float | str:
    source, part, target, short_side = job
    try:
        quality = rewrite(source, part, short_side)
        os.replace(part, target)
        return quality
    except (ValueError, OSError, av.FFmpegError) as error:
        return str(error).removeprefix(f"{shown(source)}: ")


def prepare(
    dataset: str, data: str | Path, splits: str | Path | None, out: str | Path, short_side: int | None, workers: int
) -> int:
    """Rewrite every video of a data set to folder `out`, for fast sampling, under the same names; see rewrite.

    Official lists count with all of their folds. A second run goes on where the first one stopped: out/prepared.jsonl
    holds a line a video, with size and time of its source. Files have their final name when they are complete and
    checked; broken ones are copied as they are. Returns 0, or 1 where there are such. Raises ValueError as check does.
    """
    if workers < 1 or (short_side or 2) < 2:
        raise ValueError(f"--workers {workers} must be at least 1, --short-side {short_side} at least 2")
    data, splits, out = Path(data).expanduser(), Path(splits).expanduser() if splits else None, Path(out).expanduser()
    if out.resolve().is_relative_to(data.resolve()) or data.resolve().is_relative_to(out.resolve()):
        raise ValueError(f"--out {out} must be another folder than --data {data}, and neither in the other")
    splits = _find_data(dataset, data, splits)
    folds = [fold for fold in (2, 3) if splits and any(splits.glob(f"*[0t]{fold}.txt"))]  # trainlist02, _test_split2
    paths = _present(dataset, data, *(_listed(data, splits, n, part) for n in (1, *folds) for part in (True, False)))
    names = [Path(os.path.normpath(os.path.relpath(path, data))) for path in paths]
    listed = _lines(splits).values() if splits and splits.is_file() else ()
    outside = [line for line in listed if os.path.isabs(line)] + [name for name in names if name.parts[0] == ".."]
    if outside:
        raise ValueError(f"{shown(outside[0])} is listed from outside of --data: list paths relative to it")

    record, temporary, done, jobs = out / "prepared.jsonl", out / "prepared.tmp", {}, {}
    if out.is_dir() and any(out.iterdir()) and not record.exists():
        raise ValueError(f"--out {out} holds other files: name an empty or a new folder")
    with contextlib.suppress(FileNotFoundError):
        for line in record.read_text().splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):  # a line cut short
                entry = json.loads(line)
                done[entry.pop("name")] = entry
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for number, (path, name) in enumerate(zip(paths, names, strict=True)):
        about, target = os.stat(path), out / name
        stamp = dict(bytes=about.st_size, time=about.st_mtime_ns, how=[*CODEC, short_side])
        stamp["out"] = target.stat().st_size if os.path.isfile(target) else None
        if done.get(str(name)) != stamp:
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.parent.resolve().is_relative_to(out.resolve()):
                raise ValueError(f"{shown(target.parent)} leads out of {out}: remove that link")
            jobs[path, temporary / str(number), target, short_side] = str(name), stamp
    print(f"{len(paths)} videos, {len(paths) - len(jobs)} of them are prepared already", flush=True)
    begin, problems, quality = time.monotonic(), {}, []
    results = in_processes(_rewrite, list(jobs), workers, lambda job: 5 * seconds_for(job[0]))
    try:
        with open(record, "a") as file:
            file.write("\n")  # ends a line that was cut short
            for job, result in tqdm(results, "rewriting", len(jobs), unit="video"):
                (path, part, target, _), (name, stamp) = job, jobs[job]
                if isinstance(result, str):
                    problems[path] = result
                    target.unlink(missing_ok=True)  # of an earlier source
                    with contextlib.suppress(OSError):  # lists stay valid, training leaves it out as before
                        shutil.copyfile(path, part)
                        os.rename(part, target)
                    continue
                quality.append(result)
                file.write(json.dumps(dict(stamp, name=name, out=target.stat().st_size)) + "\n")
                file.flush()
    finally:
        results.close()
        shutil.rmtree(temporary, ignore_errors=True)
    for path, problem in problems.items():
        print(f"not rewritten, copied as it is: {shown(path)}: {problem}")
    if splits and splits.is_dir() and splits.is_relative_to(data):
        lists, splits = list(splits.glob("*.txt")), out / splits.relative_to(data)
        splits.mkdir(parents=True, exist_ok=True)
        for file in lists:  # these alone: videos may lie beside them
            shutil.copy(file, splits)
    good = [(path, out / name) for path, name in zip(paths, names, strict=True) if path not in problems]
    before, after = (sum(pair[i].stat().st_size for pair in good) / 1e6 for i in (0, 1))
    count, seconds = len(jobs) - len(problems), time.monotonic() - begin
    print(f"{count} videos rewritten in {seconds:.0f} s with {workers} processes, {len(problems)} only copied")
    psnr = f", PSNR {min(quality):.1f} dB or more, median {sorted(quality)[count // 2]:.1f}" if quality else ""
    print(f"{before:.1f} MB became {after:.1f} MB{psnr}")
    where = ["--data", str(out), *(["--splits", str(splits)] if splits else [])]
    print("next:", shlex.join(["python", "pretrain.py", *([dataset] if dataset in LISTS else []), *where]))
    return int(bool(problems))


# ------------------------------------------------------------------------------------------- the toy data set

TOY = "datasets/toy"  # where it goes unless told otherwise
STILL = "datasets/toy-still"  # and the one of waves that mostly stand still
MOTIONS = (
    "Slide0", "Slide22", "Slide45", "Slide67", "Slide90", "Slide112", "Slide135", "Slide157",
    "Turn2", "Turn3", "Turn4", "Pulse",
)  # fmt: skip


def toy_video(motion: str, rng: np.random.Generator, size: int = 54, still: bool = False) -> np.ndarray:
    """One action video (T, size, size, 3) uint8, 36 to 48 frames: waves under heavy camera noise.

    The class is how the waves move: one way or the other along one of eight axes (SlideD, D degrees from rows), as a
    turning star of 2, 3 or 4 arms, or in and out as rings. Colours, wavelength, speed, sense, phase, centre and edge
    are random. The few numbers of a wave decide every cube of its clip, and each cube shows them only in part and
    through the noise: what pre-training can find out from videos alone, and what few labels hardly teach.
    `still`: they move inside a disc only, a third of the frame, and stand still around it; a third of the noise.
    """
    frames, speed, wavelength = int(rng.integers(36, 49)), 1.25 * rng.uniform(0.75, 1.33), 24 * 2 ** rng.uniform(0, 1)
    phase, tilt, (cx, cy) = rng.uniform(0, 2 * np.pi), rng.uniform(-0.1, 0.1), rng.uniform(-0.25, 0.25, 2) * size
    y, x = np.mgrid[:size, :size] - size / 2  # rows count downwards
    if motion.startswith("Slide"):
        angle = MOTIONS.index(motion) * np.pi / 8 + tilt
        along = (x * np.cos(angle) + y * np.sin(angle)) / wavelength
    elif motion.startswith("Turn"):
        along = int(motion[-1]) * np.arctan2(y - cy, x - cx) / (2 * np.pi)
    else:
        along = np.hypot(x - cx, y - cy) / wavelength
    travelled = rng.choice([-1, 1]) * speed * np.arange(frames)[:, None, None] / wavelength
    if still:
        left, top = rng.uniform(-0.2, 0.2, 2) * size
        travelled = travelled * (np.hypot(x - left, y - top) < 0.33 * size)
    wave = np.sin(2 * np.pi * (along - travelled) + phase)
    wave = np.tanh(3 * wave) if rng.random() < 0.5 else wave  # a hard edge, or a soft one
    colour, noise = rng.normal(size=3), rng.normal(size=(frames, size, size, 3))
    colour *= 0.42 * rng.uniform(0.7, 1.3) / np.linalg.norm(colour)
    video = rng.uniform(0.35, 0.65, 3) + wave[..., None] * colour + (0.05 if still else 0.15) * noise
    return (255 * video).clip(0, 255).round().astype(np.uint8)


def _write_video(path: Path, video: np.ndarray) -> None:
    """XviD-like MPEG-4 in AVI at 25 frames and half a megabit a second: much of the noise stays."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25, options={"bf": "1", "g": "250"})
        stream.bit_rate = 500_000
        stream.height, stream.width, stream.pix_fmt = *video.shape[1:3], "yuv420p"
        for image in video:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def _toy_file(job: tuple) -> None:
    path, motion, seed, still = job
    path.parent.mkdir(parents=True, exist_ok=True)
    _write_video(path, toy_video(motion, np.random.default_rng(seed), still=still))


def make_toy(out: str | Path | None, train: int = 1200, test: int = 600, seed: int = 0, still: bool = False) -> None:
    """Write the toy data set to folder `out` in UCF101's layout, split 1, unless it is there: half a minute, ours.

    out/Slide0/v_Slide0_g01_c01.avi ..., out/ucfTrainTestlist/{classInd,trainlist01,testlist01}.txt; `out` None is TOY,
    or STILL for waves that mostly stand still (see toy_video). Labels are balanced. The folder appears only when it is
    complete. ValueError if `out` exists and is something else.
    """
    out = Path(out or (STILL if still else TOY))
    if (out / "ucfTrainTestlist" / "testlist01.txt").is_file():
        return
    if out.exists():
        raise ValueError(f"{out} exists and is not a complete toy data set: remove it, or name another folder")
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    jobs, lists = [], {"trainlist01.txt": [], "testlist01.txt": []}
    for i in range(train + test):
        label, number = i % len(MOTIONS), i // len(MOTIONS)
        name = f"{MOTIONS[label]}/v_{MOTIONS[label]}_g{number + 1:02}_c01.avi"  # every scene its own group
        jobs.append((part / name, MOTIONS[label], (seed, i), still))
        lists["trainlist01.txt" if i < train else "testlist01.txt"].append(f"{name} {label + 1}" if i < train else name)
    with ProcessPoolExecutor() as pool:
        list(tqdm(pool.map(_toy_file, jobs, chunksize=16), f"writing {out}", len(jobs), unit="video"))
    lists["classInd.txt"] = [f"{i + 1} {name}" for i, name in enumerate(MOTIONS)]
    (part / "ucfTrainTestlist").mkdir()
    for name, lines in lists.items():
        (part / "ucfTrainTestlist" / name).write_text("\n".join(sorted(lines) if "list01" in name else lines) + "\n")
    part.rename(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    toy = commands.add_parser("toy", help="write the toy data set")
    toy.add_argument("--out", help=f"folder to write (default: {TOY}, with --still {STILL})")
    toy.add_argument("--train", type=int, default=1200, help="training videos (default: %(default)s)")
    toy.add_argument("--test", type=int, default=600, help="test videos (default: %(default)s)")
    toy.add_argument("--seed", type=int, default=0, help="of everything random (default: %(default)s)")
    toy.add_argument("--still", action="store_true", help="waves that move in a disc only and stand still around it")
    test = commands.add_parser("check", help="decode every video of a data set once; say what is missing or broken")
    test.add_argument("dataset", choices=CHECKED, help="own: any folder of videos, or a list")
    test.add_argument("--data", required=True, help="folder of the videos")
    test.add_argument("--splits", help="folder of official split files, or a list of lines `path [label]`")
    test.add_argument("--fold", type=int, default=1, help="official split, 1 to 3 (default: %(default)s)")
    test.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: the cores, %(default)s)")
    new = commands.add_parser("prepare", help="rewrite every video of a data set once, so that clips are read faster")
    new.add_argument("dataset", choices=CHECKED, help="own: any folder of videos, or a list")
    new.add_argument("--data", required=True, help="folder of the videos; stays as it is")
    new.add_argument("--splits", help="folder of official split files, or a list of lines `path [label]`")
    new.add_argument("--out", required=True, help="folder to write; names in it are those in --data, lists stay valid")
    new.add_argument("--short-side", type=int, help="pixels to shrink the shorter side to (default: sizes stay)")
    new.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: the cores, %(default)s)")
    args = vars(parser.parse_args())
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # names of files need not be text
    try:
        sys.exit({"toy": make_toy, "check": check, "prepare": prepare}[args.pop("command")](**args))
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
