"""A zoo of video files, whole and broken, small and made here: what read_frames must give for each.

    python tests/zoo.py FOLDER      # write them all and print what each gives

Frames say their number (numbered), so that the right ones can be told from others. What is expected is what was
written, or, of files that were damaged on purpose, what PyAV shows when it decodes them from start to end.
"""

import os
import struct
import sys
import time
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import numpy as np
import torch

# frames and files


def numbered(index: int, height: int = 64, width: int = 96) -> np.ndarray:
    """A frame that says its number: 8 bits as dark and bright blocks, 2 rows of 4; the rest a soft ramp."""
    image = np.full((height, width, 3), 100, np.uint8)
    for bit in range(8):
        y, x = divmod(bit, 4)
        image[2 + 30 * y : 26 + 30 * y, 2 + 24 * x : 22 + 24 * x] = 200 if index >> bit & 1 else 40
    return image


def number_of(frame: torch.Tensor) -> int:
    """The number that a decoded frame (3, H, W) says."""
    blocks = [
        frame[:, 6 + 30 * (bit // 4) : 22 + 30 * (bit // 4), 6 + 24 * (bit % 4) : 18 + 24 * (bit % 4)]
        for bit in range(8)
    ]
    return sum((block.float().mean() > 120).long().item() << bit for bit, block in enumerate(blocks))


def write(
    path, codec="libx264", frames=60, pix_fmt="yuv420p", times=None, size=(64, 96), rotation=0, muxer=None, **options
):
    """A video of numbered frames; `times` are presentation times in 1/1000 s, `muxer` the container's options."""
    with av.open(str(path), "w", options=muxer or {}) as container:
        stream = container.add_stream(codec, rate=25, options={k: str(v) for k, v in options.items()})
        stream.height, stream.width, stream.pix_fmt = *size, pix_fmt
        if rotation:
            stream.set_display_rotation(rotation)
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(numbered(i, *size), format="rgb24").reformat(format=pix_fmt)
            if times:
                frame.pts, frame.time_base = times[i], Fraction(1, 1000)
                stream.codec_context.time_base = Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def remux(source, target, change, **options):
    """Copy the packets of a video, without decoding them, as `change` returns them."""
    with av.open(str(source)) as a, av.open(str(target), "w", options=options) as b:
        stream = b.add_stream_from_template(a.streams.video[0])
        for packet in change([packet for packet in a.demux(video=0) if packet.size]):
            packet.stream = stream
            b.mux(packet)
    return target


def copy_from(source, target, key: int):
    """Copy the packets from the given key frame on, as a cutting tool does that does not re-encode."""
    keys = lambda packets: [i for i, packet in enumerate(packets) if packet.is_keyframe]
    return remux(source, target, lambda packets: packets[keys(packets)[key] :])


def sound(container, frames: int = 10) -> None:
    """Silence of `frames` x 1024 samples as the next stream of a container."""
    stream = container.add_stream("aac", rate=44100)
    for _ in range(frames):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
    container.mux(stream.encode())


def unreadable(folder):
    """Files that hold no decodable video, by name."""
    names = ["truncated.mp4", "zero-bytes.mp4", "text.avi", "sound.mp4"]
    for name in names:
        ZOO[name].make(folder / name)
    return [*names, "missing.mp4"]


def played(path) -> list[int]:
    """The numbers of the frames that decoding a file from start to end gives, with nothing of ours."""
    with av.open(str(path)) as container:
        frames = container.decode(container.streams.best("video"))
        return [number_of(torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)) for frame in frames]


# makers: each writes one file


def whole(path: Path, **options) -> Path:
    """A whole video beside `path`, of its kind, in a hidden file that is gone when the maker is."""
    return write(path.with_name(f".whole{path.suffix}"), **dict(dict(frames=20, g=8, bf=2), **options))


def cut(path: Path, share: float = 0.5, **options) -> None:
    raw = whole(path, **options).read_bytes()
    path.write_bytes(raw[: int(len(raw) * share)])


def damaged(path: Path, **options) -> None:
    raw = bytearray(whole(path, **options).read_bytes())
    at = raw.index(b"movi") + (raw.index(b"idx1") - raw.index(b"movi")) // 2
    raw[at : at + 40] = bytes(40)
    path.write_bytes(raw)


def changed(path: Path, change, muxer=None, **options) -> None:
    remux(whole(path, **options), path, change, **muxer or {})


def shifted(seconds: float, packets: list) -> list:
    for packet in packets:
        by = round(seconds / packet.time_base)
        packet.pts, packet.dts = packet.pts + by, None if packet.dts is None else packet.dts + by
    return packets


def without_first(packets: list) -> list:
    return packets[1:]


def packed(packets: list) -> list:
    """As XviD packs: a B-frame behind the frame before it, and in its place a frame that is not coded."""
    vop, out = b"\0\0\1\xb6", []
    for packet in packets:
        raw = bytes(packet)
        at = raw.index(vop)
        if not out:  # says that it is packed
            raw = raw[:at] + b"\0\0\1\xb2DivX503b1393p" + raw[at:]
        if raw[at + 4] >> 6 == 2 and out[-1].count(vop) == 1:
            out[-1], raw = out[-1] + raw, vop + b"\x51\xc0\x7f"
        out.append(raw)
    for i, (packet, raw) in enumerate(zip(packets, out, strict=True)):
        new = av.Packet(len(raw))
        new.update(raw)
        new.pts, new.dts, new.time_base, new.is_keyframe = i, i, packet.time_base, packet.is_keyframe
        packets[i] = new
    return packets


def announcing(path: Path, frames: int) -> None:
    """An AVI whose two headers announce another number of frames."""
    raw = bytearray(whole(path, codec="mpeg4").read_bytes())
    struct.pack_into("<I", raw, raw.index(b"avih") + 8 + 16, frames)
    struct.pack_into("<I", raw, raw.index(b"strh") + 8 + 32, frames)
    path.write_bytes(raw)


def swapped(path: Path, **options) -> None:
    """A Matroska file of one frame a cluster, in which the clusters of frames 3 and 5 have changed places."""
    raw, mark = whole(path, muxer={"cluster_time_limit": "1"}, **options).read_bytes(), b"\x1f\x43\xb6\x75"
    parts = raw.split(mark)
    parts[4], parts[6] = parts[6], parts[4]
    path.write_bytes(mark.join(parts))


def edited(path: Path, edits: list[tuple[int, int]]) -> None:
    """An MP4 of 20 frames with this edit list: (duration in 1/1000 s, first frame shown; -1: a pause)."""
    raw = bytearray(whole(path).read_bytes())
    at = raw.index(b"elst") - 4
    (start,) = struct.unpack_from(">i", raw, at + 20)  # the media time of frame 0; a frame takes 512
    entries = b"".join(struct.pack(">IiI", ms, -1 if n < 0 else start + 512 * n, 0x10000) for ms, n in edits)
    new = struct.pack(">I4sII", 16 + len(entries), b"elst", 0, len(edits)) + entries
    (old,) = struct.unpack_from(">I", raw, at)
    for box in (b"moov", b"trak", b"edts"):
        (size,) = struct.unpack_from(">I", raw, raw.index(box) - 4)
        struct.pack_into(">I", raw, raw.index(box) - 4, size + len(new) - old)
    raw[at : at + old] = new
    path.write_bytes(raw)


def cover(path: Path, video: bool) -> None:
    """A cover picture, number 77, as the first stream; then a video, or sound alone."""
    with av.open(str(whole(path))) as a, av.open(str(path), "w") as b:
        picture = b.add_stream("mjpeg", rate=25)
        picture.height, picture.width, picture.pix_fmt = 64, 96, "yuvj420p"
        picture.disposition = av.stream.Disposition.attached_pic
        image = av.VideoFrame.from_ndarray(numbered(77), format="rgb24").reformat(format="yuvj420p")
        stream = b.add_stream_from_template(a.streams.video[0]) if video else None
        if not video:
            sound(b)
        b.mux([*picture.encode(image), *picture.encode()])
        for packet in a.demux(video=0) if video else ():
            if packet.size:
                packet.stream = stream
                b.mux(packet)


def silent(path: Path) -> None:
    with av.open(str(path), "w") as container:
        sound(container)


def playlist(path: Path, text: str) -> None:
    """A text that asks FFmpeg to open the readable video beside it."""
    write(path.with_name(".neighbour.avi"), "mpeg4", frames=3)
    path.write_text(text.format(neighbour=".neighbour.avi"))


# the zoo


@dataclass
class Animal:
    """A kind of file: what is odd about it, its maker (a function of its path), and what read_frames gives.

    `gives` is the numbers of its frames; or played: what decoding shows; or words of the error; or, of frames that are
    too small for numbers, (frames, height, width). `turned`: quarters that it must be turned back by to be read.
    `broken`: words of what `check` says of a file that can be read in part.
    """

    odd: str
    make: object
    gives: object
    needs: str = ""  # an encoder
    turned: int = 0
    broken: str = ""


def video(odd: str, codec: str, frames: int = 20, broken: str = "", **options) -> Animal:
    turned = options.get("rotation", 0) // 90
    make = partial(write, codec=codec, frames=frames, **options)
    size = options.get("size", (64, 96))
    gives = list(range(frames)) if size[0] > 60 else (frames, *size)
    return Animal(odd, make, gives, codec, turned, broken)


UNEVEN = np.cumsum([700] + [40, 120, 7, 300] * 5)[:20].tolist()  # uneven steps, start at 0.7 s
OPEN_GOP = {"x264-params": "open-gop=1:keyint=8:bframes=3:scenecut=0"}
NONE = "no frame could be decoded"
INVALID = "Invalid data found when processing input"
KINDS = "none of the kinds of video that are read"

ZOO = {
    # whole files
    "h264.mp4": video("nothing: one of the usual kinds", "libx264", g=8, bf=2),
    "one-key-frame.mkv": video("a key frame at the start only", "libx264", g=250, bf=2),
    "open-groups.mkv": video("frames that need the key frame after them", "libx264", **OPEN_GOP),
    "xvid.avi": video("frames that are not shown in the order of their packets", "mpeg4", g=8, bf=2),
    "hevc-10-bit.mkv": video("10 bits, HEVC", "libx265", pix_fmt="yuv420p10le",
                             **{"x265-params": "keyint=8:bframes=3:log-level=none"}),
    "packed.avi": Animal("packets that hold two frames or none, as XviD writes them",
                         partial(changed, change=packed, codec="mpeg4", bf=1), list(range(20))),
    "vp8.webm": video("packets that show nothing", "libvpx", **{"auto-alt-ref": 1, "lag-in-frames": 16}),
    "vp9.webm": video("VP9", "libvpx-vp9", g=8, speed=8),
    "av1.mkv": video("AV1", "libsvtav1", preset=12),
    "mpeg2.mpg": video("MPEG-2, a program stream", "mpeg2video", g=8, bf=2),
    "mpeg2.ts": video("MPEG-2, a transport stream", "mpeg2video", g=8, bf=2),
    "wmv2.wmv": video("Windows Media", "wmv2"),
    "flv1.flv": video("Flash", "flv"),
    "h263.3gp": video("H.263", "h263", size=(144, 176)),
    "prores.mov": video("ProRes, 10 bits", "prores", frames=5, pix_fmt="yuv422p10le"),
    "one-frame.mp4": video("one frame", "libx264", 1),
    "15-frames.mp4": video("15 frames", "libx264", 15),
    "2x2.mkv": video("2x2 pixels", "ffv1", 5, pix_fmt="bgr0", size=(2, 2)),
    "2x2.mp4": video("2x2 pixels", "libx264", 5, size=(2, 2)),
    "65x97.mkv": video("odd sizes", "ffv1", 5, pix_fmt="bgr0", size=(65, 97)),
    "67x98.mkv": video("odd sizes", "ffv1", 5, pix_fmt="bgr0", size=(67, 98)),
    "turned-90.mp4": video("turned by 90 degrees", "libx264", 5, rotation=90),
    "turned-180.mp4": video("turned by 180 degrees", "libx264", 5, rotation=180),
    "turned-270.mp4": video("turned by 270 degrees", "libx264", 5, rotation=270),
    "10-bit.mkv": video("10 bits", "libx264", pix_fmt="yuv420p10le"),
    "4-4-4.mkv": video("colours at full resolution", "libx264", pix_fmt="yuv444p"),
    "grey.mkv": video("no colour", "ffv1", 5, pix_fmt="gray"),
    # times
    "variable-rate.mp4": video("variable frame rate, starts at 0.7 s", "libx264", times=UNEVEN, g=8, bf=2),
    "variable-rate.mkv": video("variable frame rate, starts at 0.7 s", "libx264", times=UNEVEN, g=8, bf=2),
    "late.mkv": Animal("starts at 5 s", partial(changed, change=partial(shifted, 5)), list(range(20))),
    "late.ts": Animal("starts at 5 s", partial(changed, change=partial(shifted, 5), bf=0), list(range(20))),
    "early.ts": Animal("starts at -0.3 s", partial(changed, change=partial(shifted, -0.3), bf=0,
                                                   muxer={"avoid_negative_ts": "disabled"}), list(range(20))),
    "early.mp4": Animal("starts at -0.3 s: the edit list hides what comes before 0",
                        partial(changed, change=partial(shifted, -0.3), muxer={"avoid_negative_ts": "disabled"}),
                        list(range(8, 20))),
    "skips.mp4": Animal("the edit list skips 3 frames", partial(edited, edits=[(680, 3)]), list(range(3, 20))),
    "stops.mp4": Animal("the edit list ends after 10 frames", partial(edited, edits=[(400, 0)]), list(range(10))),
    "pauses.mp4": Animal("the edit list begins with a pause", partial(edited, edits=[(700, -1), (800, 0)]),
                         list(range(20))),
    "reordered.mp4": Animal("the edit list shows frames 10 to 14, then 0 to 4",
                            partial(edited, edits=[(200, 10), (200, 0)]), [*range(10, 15), *range(5)]),
    "shows-nothing.mp4": Animal("the edit list begins after the end", partial(edited, edits=[(800, 30)]), NONE),
    "unordered.mkv": Animal("packets 3 and 5 changed places", partial(swapped, g=1, bf=0), played),
    "unordered-groups.mkv": Animal("packets changed places, in groups", partial(swapped, g=4, bf=0), played),
    # headers and streams
    "announces-200.avi": Animal("its header says 200 frames, it has 20", partial(announcing, frames=200),
                                list(range(20)), broken="20 of 200 frames are there: the file is cut short"),
    "announces-7.avi": Animal("its header says 7 frames, it has 20", partial(announcing, frames=7), list(range(20))),
    "announces-0.avi": Animal("its header says 0 frames, it has 20", partial(announcing, frames=0), list(range(20))),
    "cover-first.mkv": Animal("a picture as its first stream", partial(cover, video=True), list(range(20))),
    "cover-and-sound.mp4": Animal("sound, and a cover picture", partial(cover, video=False), "no video in this file"),
    "sound.mp4": Animal("sound alone", silent, "no video in this file"),
    # damage
    "no-first-key.mkv": Animal("the first key frame is missing", partial(changed, change=without_first), played),
    "no-first-key.ts": Animal("the first key frame is missing", partial(changed, change=without_first, bf=0), played),
    "no-first-key.avi": Animal("the first key frame is missing",
                               partial(changed, change=without_first, codec="mpeg4", bf=0), played),
    "no-key.mkv": Animal("no key frame at all", partial(changed, change=without_first, g=250, bf=0), NONE),
    "open-cut.mkv": Animal("begins with frames that need an earlier one",
                           lambda path: copy_from(whole(path, **OPEN_GOP), path, key=1), played),
    "truncated.mp4": Animal("cut in half, index and all", cut, INVALID),
    "truncated.avi": Animal("cut before its end", partial(cut, share=0.7, codec="mpeg4", g=1, bf=0), played,
                            broken="the file is cut short"),
    "truncated.mkv": Animal("cut before its end", partial(cut, share=0.7), played),
    "damaged.avi": Animal("40 zeros in the middle", partial(damaged, codec="mpeg4", g=1, bf=0), played,
                          broken="are damaged"),
    "zero-bytes.mp4": Animal("nothing in it", Path.touch, INVALID),
    "text.avi": Animal("a text", lambda path: path.write_text("this is not a video\n" * 50), INVALID),
    # what would make FFmpeg look elsewhere
    "ffconcat.avi": Animal("a list of files to open", partial(
        playlist, text="ffconcat version 1.0\nfile {neighbour}\n"), KINDS),
    "hls.avi": Animal("a playlist, local", partial(
        playlist, text="#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{neighbour}\n#EXT-X-ENDLIST\n"), INVALID),
    "hls.m3u8": Animal("a playlist by name, too", partial(
        playlist, text="#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{neighbour}\n#EXT-X-ENDLIST\n"), KINDS),
    "hls-url.avi": Animal("a playlist, remote", partial(
        playlist, text="#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nhttp://127.0.0.1:9/a.avi\n#EXT-X-ENDLIST\n"),
        INVALID),
    "sdp.avi": Animal("a description of a network stream", partial(
        playlist, text="v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n"
        "a=rtpmap:96 H264/90000\n"), KINDS),
    "a:b.avi": video("a colon in its name", "mpeg4", 3),
    "concat:h264.mp4|h264.mp4": video("a name that is a protocol", "mpeg4", 3, muxer={}),
    "file:h264.mp4": video("a name that is a protocol", "mpeg4", 3),
    "%d.avi": video("a name that is a pattern", "mpeg4", 3),
    "-f.avi": video("a name like a flag", "mpeg4", 3),
    "new\nline, $x$ 'and' \"more\".avi": video("all kinds of signs in its name", "mpeg4", 3),
    os.fsdecode(b"caf\xe9.avi"): video("a name that is no UTF-8", "mpeg4", 3),
    # no files
    "folder.avi": Animal("a folder", Path.mkdir, "not a file"),
    "pipe.avi": Animal("a pipe into which nobody writes", os.mkfifo, "not a file"),
    "loop.avi": Animal("a link to itself", lambda path: path.symlink_to(path), "symbolic links"),
    "dangling.avi": Animal("a link to nothing", lambda path: path.symlink_to("nothing"), "No such file or directory"),
    "secret.avi": Animal("no permission to read", lambda path: path.touch(0), "Permission denied"),
}  # fmt: skip
if os.geteuid() == 0:
    del ZOO["secret.avi"]  # root may read everything


def make_zoo(folder: Path) -> dict[Path, Animal]:
    """Write every animal that can be written here into a folder: {path: animal}."""
    made = {}
    folder.mkdir(parents=True, exist_ok=True)
    for name, animal in ZOO.items():
        path = folder / name
        if animal.needs and animal.needs not in av.codecs_available:
            continue
        if set(":|") & set(name):  # PyAV would not write there
            animal.make(folder / f".plain{path.suffix}")
            (folder / f".plain{path.suffix}").rename(path)
        else:
            animal.make(path)
        made[path] = animal
    for path in folder.glob(".*"):
        if path.name != ".neighbour.avi":
            path.unlink()
    return made


def expected(path: Path, animal: Animal):
    """The numbers of an animal's frames, or the size of what it gives, or words of the error."""
    return animal.gives(path) if callable(animal.gives) else animal.gives


def main() -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from data import read_frames, shown

    sys.stdout.reconfigure(errors="backslashreplace")
    os.environ.setdefault("SVT_LOG", "1")  # errors alone
    if len(sys.argv) != 2:
        sys.exit("error: python tests/zoo.py FOLDER")
    made = make_zoo(Path(sys.argv[1]))
    for path, animal in made.items():
        begin = time.monotonic()
        try:
            result = f"{len(read_frames(path, lambda total: list(range(total))))} frames"
        except ValueError as error:
            result = str(error).removeprefix(f"{shown(path)}: ")
        seconds = time.monotonic() - begin
        print(f"{shown(path.name):40} {animal.odd:56} {result:64.64} {seconds:6.3f} s")
    print(f"{len(made)} of {len(ZOO)} kinds; left out for want of an encoder or a permission: {len(ZOO) - len(made)}")


if __name__ == "__main__":
    main()
