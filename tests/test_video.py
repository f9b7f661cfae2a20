"""The frames asked for are the frames delivered, from every kind of file, at the cost of a clip."""

import os
import random
import struct
import time

import av
import numpy as np
import pytest
import torch
from films import copy_of, decoded, number_of, numbered, remux, sound, write

from lib import video
from lib.processes import in_processes
from lib.video import Probe, played, read_frames, shown

OPEN = {"x264-params": "open-gop=1:keyint=8:bframes=3:scenecut=0"}
UNEVEN = np.cumsum([700] + [40, 120, 7, 300] * 8)[:30].tolist()  # starts at 0.7 s


@pytest.fixture(autouse=True)
def forget():
    """Every test counts the frames of its files itself."""
    video._counts.clear()
    video._tables.clear()


def every(path):
    return read_frames(path, lambda total: list(range(total)))


def clips(total, seed=0):
    """Lists of frames of all kinds: the ends, a clip with a stride, single ones, repeats."""
    rng = random.Random(seed)
    yield from ([0], [total - 1], [total - 1, 0, 0], list(range(0, total, 4)))
    for count in (1, 2, 4, 4, 6):
        yield [rng.randrange(total) for _ in range(count)]


def check(path, want):
    """All frames, and those of any clip, are those of `want`; the number of frames is right."""
    totals = []
    for place in (-1, 0):
        frames = read_frames(path, lambda total, p=place: totals.append(total) or [p % total])
        assert totals[-1] == len(want) and torch.equal(frames[0], want[place])
    for _ in range(2):  # the first time, and the next
        assert torch.equal(every(path), want)
        for wanted in clips(len(want)):
            assert torch.equal(read_frames(path, wanted), want[wanted]), wanted
    for wanted in ([len(want)], [-1], []):
        for pick in (wanted, lambda total, wanted=wanted: wanted):
            with pytest.raises(ValueError, match="asked for frames"):
                read_frames(path, pick)


# kinds of files: name -> encoder, its options

KINDS = {
    "plain.mp4": ("libx264", dict(g=8, bf=0)),
    "b-frames.mp4": ("libx264", dict(g=8, bf=3)),
    "pyramid.mkv": ("libx264", {"x264-params": "keyint=30:bframes=5:b-pyramid=strict:slices=3"}),
    "open-groups.mp4": ("libx264", OPEN),
    "open-groups.mkv": ("libx264", OPEN),
    "one-group.mp4": ("libx264", dict(g=250, bf=2)),
    "refresh.mp4": ("libx264", {"x264-params": "intra-refresh=1:keyint=8"}),
    "h264.avi": ("libx264", dict(g=8, bf=3)),
    "h264.ts": ("libx264", dict(g=8, bf=3)),
    "h264.flv": ("libx264", dict(g=8, bf=3)),
    "10-bit.mkv": ("libx264", dict(pix_fmt="yuv420p10le")),
    "fragments.mp4": ("libx264", dict(g=8, bf=2, muxer={"movflags": "frag_keyframe"})),
    "late.mp4": ("libx264", dict(g=8, bf=2, times=UNEVEN)),
    "late.mkv": ("libx264", dict(g=8, bf=2, times=UNEVEN)),
    "hevc.mp4": ("libx265", {"x265-params": "keyint=8:bframes=3:log-level=none"}),
    "open-hevc.mkv": ("libx265", {"x265-params": "keyint=8:open-gop=1:scenecut=0:log-level=none"}),
    "xvid.avi": ("mpeg4", dict(g=8, bf=2)),
    "mpeg4.mp4": ("mpeg4", dict(g=8, bf=2)),
    "mpeg2.mpg": ("mpeg2video", dict(g=8, bf=2)),
    "vp8.webm": ("libvpx", {"auto-alt-ref": 1, "lag-in-frames": 16}),
    "vp9.webm": ("libvpx-vp9", dict(g=8, speed=8)),
    "av1.mp4": ("libsvtav1", dict(preset=12, g=8)),
    "jpeg.avi": ("mjpeg", dict(pix_fmt="yuvj420p")),
    "wmv2.wmv": ("wmv2", {}),
    "one-frame.mp4": ("libx264", dict(frames=1)),
    "2x2.mkv": ("ffv1", dict(frames=5, pix_fmt="bgr0", size=(2, 2))),
    "odd-sides.mkv": ("ffv1", dict(frames=5, pix_fmt="bgr0", size=(67, 99))),
    "grey.mkv": ("ffv1", dict(frames=5, pix_fmt="gray")),
    "turned.mp4": ("libx264", dict(turned=90)),
}


@pytest.mark.parametrize("name", KINDS)
def test_the_frames_asked_for_are_the_frames_delivered(tmp_path, name):
    codec, options = KINDS[name]
    if codec not in av.codecs_available:
        pytest.skip(f"no encoder {codec}")
    frames = options.get("frames", 30)
    path = write(tmp_path / name, codec, **{**options, "frames": frames})
    want = decoded(path)
    if want.shape[2] >= 64:  # the reference itself is right
        upward = torch.rot90(want, -options.get("turned", 0) // 90, (2, 3))
        assert [number_of(frame) for frame in upward] == list(range(frames))
    check(path, want)
    found = Probe()
    assert len(list(played(path, found))) == frames == found.frames and not found.problem


@pytest.mark.parametrize("name, codec", [("a.mkv", "libx264"), ("a.avi", "mpeg4")])
def test_a_file_that_was_cut_short_is_broken(tmp_path, name, codec):
    path = write(tmp_path / name, codec, g=12, bf=0)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 7 // 10])
    found = Probe()
    list(played(path, found))
    assert 20 < found.frames < 50 and "of 60 frames are there: the file is cut" in found.problem


def test_a_last_frame_that_stays_long_is_not_taken_for_lost_ones(tmp_path):
    def held(packets):
        packets[-1].duration = 3000  # of 1/1000 s
        return packets

    path = remux(write(tmp_path / "a.mkv"), tmp_path / "b.mkv", held)
    found = Probe()
    list(played(path, found))
    assert found.announced == found.frames == 60


@pytest.mark.parametrize("name", ["b-frames.mp4", "open-groups.mkv", "mpeg4.mp4", "vp9.webm"])
def test_what_no_wanted_frame_needs_is_not_decoded(tmp_path, monkeypatch, name):
    codec, options = KINDS[name]
    path, sent, real = write(tmp_path / name, codec, **options), [], video._decode

    def spy(context, packets, *rest):
        sent.append(len(packets))
        return real(context, packets, *rest)

    monkeypatch.setattr(video, "_decode", spy)
    monkeypatch.setattr(video, "_from_start", None)
    want = decoded(path)
    for index in range(16, 40, 3):
        assert torch.equal(read_frames(path, [index, 47]), want[[index, 47]])
        assert 0 < sum(sent) <= 30  # of 60 frames in groups of 8
        sent.clear()


def test_colours_survive(tmp_path):
    path = tmp_path / "red.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = 64, 64, "yuv420p"
        image = np.full((64, 64, 3), (200, 30, 60), np.uint8)
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    colour = read_frames(path, [1])[0].float().mean(dim=(1, 2))
    assert (colour - torch.tensor([200.0, 30, 60])).abs().max() < 6


@pytest.mark.parametrize("a, b", [(1, 0), (-1, 0), (0, 1), (0, -1)])
@pytest.mark.parametrize("mirrored", [False, True])
def test_every_display_matrix_is_followed(tmp_path, a, b, mirrored):
    """The eight ways to turn and mirror: pixel (x, y) is shown at (a x + c y, b x + d y)."""
    c, d = (b, -a) if mirrored else (-b, a)
    path = write(tmp_path / "a.mp4", frames=2)
    plain, raw = every(path), bytearray(path.read_bytes())
    at = raw.index(b"tkhd") + 44
    struct.pack_into(">2i4x2i", raw, at, a << 16, b << 16, c << 16, d << 16)
    path.write_bytes(raw)
    y, x = np.mgrid[:64, :96]
    across, down = a * x + c * y, b * x + d * y
    across, down = across - across.min(), down - down.min()
    want = torch.zeros(2, 3, down.max() + 1, across.max() + 1, dtype=torch.uint8)
    want[:, :, down, across] = plain
    assert torch.equal(every(path), want)


# odd times and packets


def packed(packets):
    """As XviD packs: a B-frame behind the frame before it, in its place one without a picture."""
    vop, out = b"\0\0\1\xb6", []
    for packet in packets:
        raw = bytes(packet)
        at = raw.index(vop)
        if not out:  # says that it is packed
            raw = raw[:at] + b"\0\0\1\xb2DivX503b1393p" + raw[at:]
        if raw[at + 4] >> 6 == 2 and out[-1].count(vop) == 1:
            out[-1], raw = out[-1] + raw, vop + b"\x51\xc0\x7f"
        out.append(raw)
    new = [copy_of(packet, raw) for packet, raw in zip(packets, out, strict=True)]
    for number, packet in enumerate(new):
        packet.pts = packet.dts = number
    return new


def nothing_at(place):
    """Put a frame without a picture between two packets, as XviD does for one like the last."""

    def change(packets):
        new = [copy_of(packet) for packet in packets]
        new.insert(place, copy_of(packets[place - 1], b"\0\0\1\xb6\x51\xc0\x7f"))
        for number, packet in enumerate(new):
            packet.pts = packet.dts = number
        return new

    return change


def from_second_key(packets):
    return packets[[i for i, packet in enumerate(packets) if packet.is_keyframe][1] :]


REMUXED = {
    "packed.avi": (packed, dict(codec="mpeg4", bf=1, g=8)),
    "shows-nothing.avi": (nothing_at(11), dict(codec="mpeg4", bf=0, g=8)),
    "shows-nothing-at-the-end.avi": (nothing_at(30), dict(codec="mpeg4", bf=0, g=8)),
    "no-first-key.mkv": (lambda packets: packets[1:], dict(g=8, bf=2)),
    "no-first-key.ts": (lambda packets: packets[1:], dict(g=8, bf=0)),
    "no-first-key.avi": (lambda packets: packets[1:], dict(codec="mpeg4", bf=0, g=8)),
    "open-cut.mkv": (from_second_key, OPEN),
    "one-lost.mp4": (lambda packets: packets[:12] + packets[13:], dict(g=8, bf=2)),
}


@pytest.mark.parametrize("name", REMUXED)
def test_odd_packets(tmp_path, name):
    change, options = REMUXED[name]
    path = tmp_path / f"whole.{name[-3:].strip('.')}"
    path = remux(write(path, frames=30, **options), tmp_path / name, change)
    check(path, decoded(path))


@pytest.mark.parametrize("g", [1, 4])
def test_packets_that_changed_places(tmp_path, g):
    """A Matroska file of one frame per cluster. Some of its packets show nothing."""
    options = dict(frames=20, g=g, bf=0, muxer={"cluster_time_limit": "1"})
    path, mark = write(tmp_path / "a.mkv", **options), b"\x1f\x43\xb6\x75"
    parts = path.read_bytes().split(mark)
    parts[4], parts[6] = parts[6], parts[4]
    path.write_bytes(mark.join(parts))
    check(path, decoded(path))


def test_a_wrong_number_of_frames_does_not_choose_the_clip(tmp_path):
    """A file that announces more frames than it has: the clips are those of its true number."""
    path = write(tmp_path / "a.avi", "mpeg4", frames=30, bf=0)
    raw = path.read_bytes()
    path.write_bytes(raw[: raw.index(b"movi") + (raw.index(b"idx1") - raw.index(b"movi")) * 3 // 4])
    total = len(decoded(path))
    assert 15 < total < 28
    middle = lambda total: [total // 2, int(torch.randint(total, ()))]
    for _ in range(2):  # the first time gives what the next one does
        torch.manual_seed(3)
        frames = read_frames(path, middle)
        torch.manual_seed(3)
        assert torch.equal(frames, decoded(path)[middle(total)])


EDITS = {  # (duration in 1/1000 s, first frame shown; -1: a pause) -> the frames shown
    "skips": ([(680, 3)], range(3, 20)),
    "stops": ([(400, 0)], range(10)),
    "pauses": ([(700, -1), (800, 0)], range(20)),
    "reordered": ([(200, 10), (200, 0)], [*range(10, 15), *range(5)]),
    "shows-nothing": ([(800, 30)], []),
}


@pytest.mark.parametrize("name", EDITS)
def test_edit_lists(tmp_path, name):
    edits, numbers = EDITS[name]
    path = write(tmp_path / "a.mp4", frames=20, g=8, bf=2)
    raw = bytearray(path.read_bytes())
    at = raw.index(b"elst") - 4
    (start,) = struct.unpack_from(">i", raw, at + 20)  # the time of frame 0; a frame takes 512
    entries = b""
    for duration, first in edits:
        begin = -1 if first < 0 else start + 512 * first
        entries += struct.pack(">IiI", duration, begin, 0x10000)
    new = struct.pack(">I4sII", 16 + len(entries), b"elst", 0, len(edits)) + entries
    (old,) = struct.unpack_from(">I", raw, at)
    for box in (b"moov", b"trak", b"edts"):
        (size,) = struct.unpack_from(">I", raw, raw.index(box) - 4)
        struct.pack_into(">I", raw, raw.index(box) - 4, size + len(new) - old)
    raw[at : at + old] = new
    path.write_bytes(raw)
    if numbers:
        assert [number_of(frame) for frame in every(path)] == list(numbers)
        check(path, decoded(path))
    else:
        with pytest.raises(ValueError, match="a.mp4: no frame could be decoded"):
            every(path)


# sizes and damage


def test_all_frames_get_the_size_of_the_first(tmp_path):
    raw = b""
    for size in ((64, 96), (128, 192)):
        raw += write(tmp_path / "part.ts", frames=20, size=size, bf=0, g=8).read_bytes()
    (tmp_path / "both.ts").write_bytes(raw)
    want = decoded(tmp_path / "both.ts")
    assert len(want) == 40 and read_frames(tmp_path / "both.ts", [39]).shape == (1, 3, 64, 96)
    check(tmp_path / "both.ts", want)
    # By times, too: the second half of this one is of a larger video.
    packets = []
    for size in ((64, 96), (128, 192)):
        part = write(tmp_path / "part.mkv", "mpeg4", frames=16, size=size, bf=0, g=8)
        with av.open(str(part)) as container:
            extra = container.streams[0].codec_context.extradata
            for packet in container.demux(video=0):
                if packet.size:
                    head = extra if packet.is_keyframe else b""
                    packets.append(copy_of(packet, head + bytes(packet)))
    for number, packet in enumerate(packets):
        packet.pts = packet.dts = 40 * number
    remux(tmp_path / "part.mkv", tmp_path / "both.mkv", lambda _: packets)
    want = decoded(tmp_path / "both.mkv")
    check(tmp_path / "both.mkv", want)


MIXED = ["plain.mp4", "open-groups.mkv", "xvid.avi", "h264.ts", "vp9.webm"]


@pytest.mark.parametrize("name", MIXED)
def test_damaged_and_cut_files_give_what_a_player_shows(tmp_path, name):
    """Or one line. Damaged frames, too, are those of a decode from the start."""
    codec, options = KINDS[name]
    raw = write(tmp_path / f"whole-{name}", codec, **{**options, "frames": 30}).read_bytes()
    rng, path, good = random.Random(1), tmp_path / name, 0
    for number in range(9):
        new = bytearray(raw)
        if number == 8:
            del new[len(new) * 2 // 3 :]
        else:
            at = rng.randrange(len(new) // 4, len(new) * 3 // 4)
            new[at : at + 8] = bytes(rng.randrange(256) for _ in range(8))
        path.write_bytes(new)
        video._counts.clear()
        try:
            decoded(path)
            good += 1
        except (av.FFmpegError, ValueError):  # not to be opened, or no frame
            with pytest.raises(ValueError, match=f"^{path}: [^\n]*$"):
                every(path)
            continue
        frames, want = every(path), decoded(path)
        assert frames.shape[1:] == want.shape[1:]
        # FFmpeg fills damaged places of H.264 with what was in memory before: two decodes of one
        # file may differ.
        assert "264" in codec or torch.equal(frames, want)
    assert good > 1


def test_a_header_that_lies_about_the_size_does_not_decide_it(tmp_path):
    path = write(tmp_path / "a.mkv", "mpeg4", frames=20, g=8)
    raw, size, lie = path.read_bytes(), b"\xb0\x81\x60\xba\x81\x40", b"\xb0\x81\x30\xba\x81\x20"
    assert raw.count(size) == 1
    path.write_bytes(raw.replace(size, lie))
    check(path, decoded(path))
    assert every(path).shape == (20, 3, 64, 96)


def mutated(job, alive):
    """What reading a file gives, in a process of its own: shape, or words."""
    path, wanted = job
    try:
        return tuple(read_frames(path, lambda total: [i % total for i in wanted]).shape)
    except ValueError as error:
        return str(error)


def test_mutated_files_never_crash_or_hang(tmp_path):
    rng, jobs = random.Random(0), []
    for name in (*MIXED, "mpeg2.mpg"):
        codec, options = KINDS[name]
        raw = write(tmp_path / name, codec, **{**options, "frames": 20}).read_bytes()
        for number in range(10):
            new = bytearray(raw)
            for _ in range(rng.choice((1, 4, 30))):
                new[rng.randrange(len(new))] = rng.randrange(256)
            if number % 5 == 0:
                del new[rng.randrange(len(new)) :]
            path = tmp_path / f"{number}-{name}"
            path.write_bytes(new)
            jobs.append((path, tuple(rng.randrange(99) for _ in range(3))))
    results = dict(in_processes(mutated, jobs, 1, silence=20))
    for (path, _), result in results.items():
        if isinstance(result, str):
            assert result.startswith(f"{path}: ") and "\n" not in result
        else:
            assert result[:2] == (3, 3)
    assert sum(isinstance(result, tuple) for result in results.values()) > 20


# files that are none, and names


def cover(path, video: bool):
    """A cover picture as the first stream; then a video of 20 frames, or sound alone."""
    whole = write(path.with_name("whole.mkv"), frames=20)
    with av.open(str(whole)) as a, av.open(str(path), "w") as b:
        picture = b.add_stream("mjpeg", rate=25)
        picture.height, picture.width, picture.pix_fmt = 64, 96, "yuvj420p"
        picture.disposition = av.stream.Disposition.attached_pic
        image = av.VideoFrame.from_ndarray(numbered(77), format="rgb24")
        stream = b.add_stream_from_template(a.streams.video[0]) if video else None
        if not video:
            sound(b)
        b.mux([*picture.encode(image.reformat(format="yuvj420p")), *picture.encode()])
        for packet in a.demux(video=0) if video else ():
            if packet.size:
                packet.stream = stream
                b.mux(packet)


def without_decoder(path):
    write(path, frames=5)
    path.write_bytes(path.read_bytes().replace(b"avc1", b"zzzz"))


def silent(path):
    with av.open(str(path), "w") as container:
        sound(container)


def playlist(text):
    def make(path):
        write(path.with_name("neighbour.avi"), "mpeg4", frames=3)
        path.write_text(text)

    return make


HLS = "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{}\n#EXT-X-ENDLIST\n"
SDP = "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n"
INVALID, KIND = "Invalid data found", "none of the kinds of video that are read: avi,"
NO_VIDEO = {
    "missing.mp4": (lambda path: None, "No such file"),
    "empty.mp4": (lambda path: path.touch(), INVALID),
    "text.avi": (lambda path: path.write_text("this is not a video\n" * 50), INVALID),
    "cut.mp4": (lambda path: path.write_bytes(write(path).read_bytes()[:600]), INVALID),
    "sound.mp4": (silent, "no video in this file"),
    "cover.mp4": (lambda path: cover(path, video=False), "no video in this file"),
    "unknown.mp4": (without_decoder, "no decoder"),
    "no-key.mkv": (
        lambda path: remux(write(path.with_name("w.mkv"), bf=0), path, lambda p: p[1:]),
        "no frame could be decoded",
    ),
    "folder.avi": (lambda path: path.mkdir(), "not a file"),
    "pipe.avi": (os.mkfifo, "not a file"),
    "loop.avi": (lambda path: path.symlink_to(path), "symbolic links"),
    "concat.avi": (playlist("ffconcat version 1.0\nfile neighbour.avi\n"), KIND),
    "hls.avi": (playlist(HLS.format("neighbour.avi")), INVALID),
    "hls.m3u8": (playlist(HLS.format("neighbour.avi")), KIND),
    "hls-far.avi": (playlist(HLS.format("http://127.0.0.1:9/a.avi")), INVALID),
    "stream.avi": (playlist(SDP + "a=rtpmap:96 H264/90000\n"), KIND),
    "new\nline.avi": (lambda path: path.write_text("x" * 999), INVALID),
}


@pytest.mark.parametrize("name", NO_VIDEO, ids=shown)
def test_what_is_no_video_is_one_line(tmp_path, name):
    make, words = NO_VIDEO[name]
    path = tmp_path / name
    make(path)
    for read in (lambda: read_frames(path, [0]), lambda: list(played(path, Probe()))):
        with pytest.raises(ValueError) as caught:
            read()
        assert str(caught.value).startswith(f"{shown(path)}: ") and words in str(caught.value)
        assert str(caught.value).isprintable()  # so it is one line


def test_a_stream_that_begins_later_is_one_line(tmp_path, monkeypatch):
    """PyAV does not find such a stream in its list."""

    def demux(*_):
        raise IndexError("list index out of range")
        yield

    path = write(tmp_path / "a.mp4", frames=3)
    real = av.open

    class Container:
        def __init__(self, *args, **how):
            self.real = real(*args, **how)

        def __getattr__(self, name):
            return demux if name == "demux" else getattr(self.real, name)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.real.close()

    monkeypatch.setattr(av, "open", Container)
    with pytest.raises(ValueError, match="a.mp4: another stream begins in the middle"):
        read_frames(path, [0])


def test_a_cover_picture_is_not_the_video(tmp_path):
    cover(tmp_path / "a.mkv", video=True)
    assert [number_of(frame) for frame in every(tmp_path / "a.mkv")] == list(range(20))


def test_names_are_files_wherever_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["a:b.avi", "file:a.avi", "concat:a.avi|b.avi", "%d.avi", "-f.avi", "e'\n$x.avi"]
    for name in (*names, os.fsdecode(b"caf\xe9.avi")):
        write(tmp_path / "plain.avi", "mpeg4", frames=3).rename(tmp_path / name)
        assert len(every(name)) == 3
    for name in ("concat:-f.avi|-f.avi", "subfile,,start,0,end,0,,:-f.avi", "http:x", "pipe:0"):
        with pytest.raises(ValueError, match="No such file"):
            read_frames(name, [0])


def test_metadata_in_another_encoding_does_not_matter(tmp_path):
    path = write(tmp_path / "title.avi", "mpeg4", frames=5)
    path.write_bytes(path.read_bytes().replace(b"Lavf", b"L\xe4vf"))
    assert number_of(read_frames(path, [3])[0]) == 3


# long films


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """40 minutes: 60,000 frames in groups of 250, each group the same; frame i says i % 250."""
    folder = tmp_path_factory.mktemp("film")
    whole = write(folder / "group.mp4", frames=250, g=250, bf=2, **{"x264-params": "scenecut=0"})

    def repeated(packets):
        length = packets[0].duration * 250
        for group in range(240):
            for packet in packets:
                new = copy_of(packet)
                new.pts, new.dts = packet.pts + group * length, packet.dts + group * length
                yield new

    films = {kind: remux(whole, folder / f"film.{kind}", repeated) for kind in ("mp4", "mkv")}
    cut = dict(movflags="dash+global_sidx")  # as for streaming: the table is of the first part
    films["fragments"] = remux(whole, folder / "fragments.mp4", repeated, **cut)
    return films


def cost(path, wanted, monkeypatch):
    """(packets read, CPU seconds) of a clip; its frames are checked."""
    real, read = video._packets, []

    def count(container, stream):
        for packet in real(container, stream):
            read.append(1)
            yield packet

    with monkeypatch.context() as patch:
        patch.setattr(video, "_packets", count)
        begin = time.process_time()
        frames = read_frames(path, lambda total: wanted if total == 60_000 else [])
        seconds = time.process_time() - begin
    assert [number_of(frame) for frame in frames] == [i % 250 for i in wanted]
    return len(read), seconds


def test_a_clip_of_a_long_film_costs_what_a_clip_costs(film, monkeypatch):
    places = (0, 130, 30_123, 59_937)
    costs = [cost(film["mp4"], list(range(i, i + 63, 4)), monkeypatch) for i in places]
    assert max(packets for packets, _ in costs) <= 250 * 7  # of 60,000
    seconds = [second for _, second in costs]
    assert seconds[-1] < 3 * seconds[1] + 0.1
    for spread in ([0, 20_000, 59_999], [59_999, 7]):
        assert cost(film["mp4"], spread, monkeypatch)[0] <= 250 * 12


@pytest.mark.parametrize("kind", ["mkv", "fragments"])
def test_a_long_film_without_a_table_is_read_once_and_not_kept(film, monkeypatch, kind):
    """Its packets are counted; those of the clip are read again."""
    packets, _ = cost(film[kind], list(range(59_937, 60_000, 4)), monkeypatch)
    assert 60_000 < packets <= 60_000 + 250 * 7


@pytest.mark.parametrize("suffix", ["mkv", "mp4"])
def test_the_table_of_a_long_film_is_read_for_its_first_clip_only(tmp_path, monkeypatch, suffix):
    """Matroska has none: all packets are read to make it."""
    monkeypatch.setattr(video, "LONG", 50)
    fills, fill = [], video._Groups._fill
    monkeypatch.setattr(video._Groups, "_fill", lambda *args: fills.append(1) or fill(*args))
    path = write(tmp_path / f"film.{suffix}", "mpeg4", frames=120, g=12)
    for wanted in ([50, 54, 58], [3], [119, 0]):
        assert [number_of(frame) for frame in read_frames(path, wanted)] == wanted
    assert len(fills) == 1
    write(path, "mpeg4", frames=80, g=12)  # another film, of the same name
    assert [number_of(frame) for frame in read_frames(path, [79])] == [79]
    with pytest.raises(ValueError, match="it has 80"):
        read_frames(path, [80])
