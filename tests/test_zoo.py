"""Every kind of odd and broken file: the right frames or one clear line, alone, in training and in evaluation."""

import os
import random
import shutil
import signal
import threading
import time

import pytest
import torch
from zoo import ZOO, expected, make_zoo, number_of, write

import data
import finetune
from data import EXTENSIONS, Split, Videos, Views, dense_views, eval_transform, probe, read_frames, read_split, shown


@pytest.fixture(scope="module")
def animals(tmp_path_factory):
    return make_zoo(tmp_path_factory.mktemp("zoo"))


def find(animals, name):
    path = next((path for path in animals if path.name == name), None)
    return path or pytest.skip("no encoder for it here")


@pytest.mark.parametrize("name", ZOO, ids=shown)
def test_the_right_frames_or_one_clear_line(animals, name):
    path, animal = find(animals, name), ZOO[name]
    gives = expected(path, animal)
    if isinstance(gives, str):
        for read in (lambda path: read_frames(path, lambda total: [0]), probe):
            with pytest.raises(ValueError) as caught:
                read(path)
            assert str(caught.value).startswith(f"{shown(path)}: ") and gives in str(caught.value)
            assert str(caught.value).isprintable()  # so it is one line
        return
    frames = read_frames(path, lambda total: list(range(total)))
    if isinstance(gives, tuple):
        assert tuple(frames.shape) == (gives[0], 3, *gives[1:])
    else:
        assert [number_of(torch.rot90(frame, -animal.turned, (1, 2))) for frame in frames] == gives
        assert len(gives) > 2 or name == "one-frame.mp4"
    rng, total = random.Random(0), len(frames)
    for wanted in ([0], [total - 1], [total - 1, 0], *([rng.randrange(total) for _ in range(3)] for _ in range(6))):
        assert torch.equal(read_frames(path, wanted), frames[wanted])
    with pytest.raises(ValueError, match="asked for frames"):
        read_frames(path, [total])
    found = probe(path)
    assert found.frames == total and (animal.broken in found.problem if animal.broken else True)
    if not callable(animal.gives) and not animal.broken:
        assert found.problem == ""  # a whole file is not called broken


def test_colours_are_right_in_every_format(animals):
    """Bit 0 of frame 3 is bright, bit 2 dark, in all channels alike."""
    for name in ("h264.mp4", "hevc-10-bit.mkv", "10-bit.mkv", "4-4-4.mkv", "grey.mkv", "prores.mov", "67x98.mkv"):
        frame = read_frames(find(animals, name), [3])[0].float()
        assert (frame[:, 6:20, 6:18] - 200).abs().mean() < 8 and (frame[:, 6:20, 54:66] - 40).abs().mean() < 8, name


def test_training_leaves_out_what_is_broken_and_nothing_else(animals, tmp_path):
    broken = {path for path, animal in animals.items() if isinstance(expected(path, animal), str)}
    others = sorted(set(animals) - broken)
    good = [write(tmp_path / f"{i}.avi", "mpeg4", frames=4) for i in range(3)]
    for i in range(11 * len(broken) - len(animals)):
        os.link(good[i % 3], tmp_path / f"more{i}.avi")
    paths = [*sorted(broken), *others, *sorted(tmp_path.glob("more*"))]
    videos = Videos(Split(paths, [0] * len(paths), ["0"]), lambda n: [0, n - 1], eval_transform(16))
    order, bad = data.Order(len(paths), len(paths), 11, 0, 1, 0, 0, 1), {}
    for clips, _, unreadable in data.make_loader(videos, order, 0, pin=False):
        data.note_unreadable(bad, unreadable, clips, len(paths))
        assert clips.shape == (11, 2, 3, 16, 16)
    assert set(bad) == set(map(str, broken)) and len(broken) > 15
    assert all(error.startswith(shown(path)) and error.isprintable() for path, error in bad.items())


def test_evaluation_stops_at_each(animals):
    for path, animal in animals.items():
        if isinstance(expected(path, animal), str):
            with pytest.raises(ValueError) as caught:
                views = Views([path], dense_views, 2, 1, 1, 16, 1)
                finetune.score_videos(torch.nn.Identity(), views, torch.device("cpu"), torch.float32)
            assert str(caught.value).startswith(shown(path))


def test_a_folder_of_everything_lists_its_files(animals):
    folder = next(iter(animals)).parent
    listed = set(read_split(folder).paths) - {folder / ".neighbour.avi"}
    assert listed == {path for path in animals if os.path.isfile(path) and path.suffix in EXTENSIONS}
    assert {path.name for path in animals} - {path.name for path in listed} == {
        "folder.avi", "pipe.avi", "loop.avi", "dangling.avi", "hls.m3u8"
    }  # fmt: skip


def test_names_are_files_wherever_they_are(animals, monkeypatch):
    monkeypatch.chdir(next(iter(animals)).parent)
    for name in ("a:b.avi", "file:h264.mp4", "concat:h264.mp4|h264.mp4", "%d.avi", "-f.avi"):
        assert len(read_frames(name, lambda total: list(range(total)))) == 3
    for name in ("concat:-f.avi|-f.avi", "subfile,,start,0,end,0,,:-f.avi", "http:x.avi", "pipe:0", "data:video/avi,"):
        with pytest.raises(ValueError, match="No such file"):
            read_frames(name, [0])


# time


@pytest.fixture
def hurry(monkeypatch):
    monkeypatch.setattr(data, "SECONDS", 0.1)
    monkeypatch.setattr(data, "SECONDS_PER_MIB", 0)


def test_a_file_that_takes_too_long_is_an_error(animals, hurry, monkeypatch):
    path, decode = find(animals, "h264.mp4"), data._decode
    monkeypatch.setattr(data, "_decode", lambda *args: time.sleep(5))
    before, begin = signal.getsignal(signal.SIGALRM), time.monotonic()
    with pytest.raises(ValueError, match="h264.mp4: not read after 0 s"):
        read_frames(path, [0])
    assert time.monotonic() - begin < 3
    assert signal.getsignal(signal.SIGALRM) is before and signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    monkeypatch.setattr(data, "_decode", decode)
    assert number_of(read_frames(path, [7])[0]) == 7
    time.sleep(0.3)  # no alarm is left behind


def test_the_limit_holds_in_workers_and_is_off_in_other_threads(animals, hurry, monkeypatch):
    path = find(animals, "h264.mp4")
    seen, decode = [], data._decode
    monkeypatch.setattr(data, "_decode", lambda *args: time.sleep(0.3) or decode(*args))
    thread = threading.Thread(target=lambda: seen.append(number_of(read_frames(path, [7])[0])))
    thread.start()
    thread.join()
    assert seen == [7]
    videos = Videos(Split([path], [0], ["0"]), lambda n: [0], eval_transform(16))
    clips, _, bad = next(iter(data.make_loader(videos, [[(0, 0)]], 1, pin=False)))
    assert clips is None and "not read after" in bad[str(path)]


def test_another_alarm_goes_on(animals):
    rang = []
    before = signal.signal(signal.SIGALRM, lambda *_: rang.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        read_frames(find(animals, "h264.mp4"), [0])
        assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 0.3 and not rang
        time.sleep(0.4)
        assert rang == [1]
    finally:
        signal.signal(signal.SIGALRM, before)


def test_bigger_files_may_take_longer(tmp_path):
    (tmp_path / "a").write_bytes(bytes(2**20))
    assert data.seconds_for(tmp_path / "a") == data.SECONDS + data.SECONDS_PER_MIB


# lists and folders


@pytest.fixture
def listed(tmp_path):
    """Write a list of bytes for a folder of videos, and read it: (names, labels)."""
    for name in ("a.avi", "b c.avi", "d\te.avi", "é.avi", os.fsdecode(b"caf\xe9.avi"), "u\u2028v\x85.avi"):
        (tmp_path / name).touch()

    def listed(raw: bytes):
        (tmp_path / "list.txt").write_bytes(raw)
        split = read_split(tmp_path, tmp_path / "list.txt")
        return [os.path.relpath(path, tmp_path) for path in split.paths], split.labels

    return listed


def test_lists_of_every_spelling(listed, tmp_path):
    assert listed(b"a.avi 1\r\n\r\nb c.avi\t0\r\n") == (["a.avi", "b c.avi"], [1, 0])
    raw = b"\xef\xbb\xbfa.avi 1\n  b c.avi   0  \n\td\te.avi 2"
    assert listed(raw) == (["a.avi", "b c.avi", "d\te.avi"], [1, 0, 2])
    assert listed("é.avi 0\nu\u2028v\x85.avi -1".encode()) == (["é.avi", "u\u2028v\x85.avi"], [0, -1])
    assert listed(b"caf\xe9.avi 3") == ([os.fsdecode(b"caf\xe9.avi")], [3])  # bytes that are no UTF-8 are the file's
    assert listed(f"{tmp_path}/a.avi 0".encode())[0] == ["a.avi"]
    assert listed(b"./../%b/a.avi" % tmp_path.name.encode())[1] == [-1]


@pytest.mark.parametrize(
    "raw, words",
    [
        (b"a.avi 1\nb c.avi 2\na.avi 1\n", "lines 1 and 3 are the same video, a.avi"),
        (b"a.avi 1\na.avi 0\n", "lines 1 and 2 are the same video"),
        (b"a.avi 1\nx/.././a.avi 1\n", "lines 1 and 2 are the same video"),
        (b"a.avi -2\n", "line 1: label -2 must be from 0"),
        (b"a.avi 123456789\n", "line 1: label 123456789 must be from 0"),
        (b"a.avi 12345678901234567890\n", "missing"),
        (b"a.avi --3\n", "missing, the first is .*a.avi --3"),
        ("a.avi ²\n".encode(), "missing"),
        (b"a.avi 0\nno.avi 1\n", "1 of 2 listed videos are missing, the first is .*no.avi"),
        (b"%s.avi 0\n" % (b"x" * 300), "missing"),
        (b"a.avi\n.\n..\n", "2 of 3 listed videos are missing"),
        (b"\xff\xfea\0.\0a\0v\0i\0", "not a text file .*UTF-8"),
        (b"a\x1b[31m.avi", r"missing, the first is .*a\\x1b\[31m.avi"),
        (b"\n \r\n", "no videos"),
    ],
)
def test_lists_that_are_wrong(listed, tmp_path, raw, words):
    with pytest.raises(ValueError, match=words) as caught:
        listed(raw)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError):
        data.check("own", tmp_path, tmp_path / "list.txt", 1, 1)


def test_links_in_folders(tmp_path):
    (tmp_path / "data" / "run").mkdir(parents=True)
    (tmp_path / "data" / "run" / "a.avi").touch()
    (tmp_path / "data" / "run" / "round").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "loop.avi").symlink_to("loop.avi")
    assert [path.name for path in read_split(tmp_path / "data").paths] == ["a.avi"]
    (tmp_path / "list.txt").write_text("loop.avi\n")
    with pytest.raises(ValueError, match="1 of 1 listed videos are missing, the first is .*loop.avi"):
        read_split(tmp_path / "data", tmp_path / "list.txt")
    with pytest.raises(ValueError, match="no folder"):
        read_split(tmp_path / "data" / "loop.avi")


def test_folders_that_cannot_be_listed_are_not_left_out(tmp_path, monkeypatch):
    (tmp_path / "open").mkdir()
    (tmp_path / "open" / "a.avi").touch()
    (tmp_path / "shut").mkdir()
    scan = os.scandir  # as it is for all but root; root may read everything

    def refuse(folder):
        if os.path.basename(folder) == "shut":
            raise PermissionError(13, "Permission denied", folder)
        return scan(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ValueError, match="shut: Permission denied"):
        read_split(tmp_path)


def test_no_video_is_in_both_parts_by_another_name(tmp_path):
    def parts(train, test):
        for name, text in (("train.txt", train), ("test.txt", test)):
            (tmp_path / name).write_text(text)
        lists = dict(splits=str(tmp_path / "train.txt"), test_splits=str(tmp_path / "test.txt"))
        return finetune.read_parts(finetune.Config(data=str(tmp_path), **lists))

    for name in "ab":
        (tmp_path / f"{name}.avi").write_bytes(b"")
    shutil.copy(tmp_path / "a.avi", tmp_path / "copy.avi")  # a file of its own
    (tmp_path / "soft.avi").symlink_to("a.avi")
    os.link(tmp_path / "a.avi", tmp_path / "hard.avi")
    (tmp_path / "folder").symlink_to(tmp_path)
    train, test = parts("a.avi 0\nb.avi 1\n", "copy.avi 1\n")
    assert len(train.paths) == 2 and test.labels == [1]
    for name in ("folder/../a.avi", "./a.avi", "soft.avi", "hard.avi", "folder/a.avi", str(tmp_path / "a.avi")):
        if os.path.exists(tmp_path / name):
            with pytest.raises(ValueError, match="1 videos are both training and test videos"):
                parts("a.avi 0\nb.avi 1\n", f"{name} 0\n")
    with pytest.raises(ValueError, match="test video .*copy.avi has label 2, training videos have none over 1"):
        parts("a.avi 0\nb.avi 1\n", "copy.avi 2\n")
    with pytest.raises(ValueError, match="no label for the training video .*b.avi"):
        parts("a.avi 0\nb.avi\n", "copy.avi 0\n")
