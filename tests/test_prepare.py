"""`python data.py toy|check|prepare`: toy videos, checks of whole data sets, rewritten files."""

import hashlib
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import av
import numpy as np
import pytest
import torch
from films import number_of, write

import pretrain
from lib import prepare, processes
from lib.lists import Split, read_split
from lib.prepare import rewrite
from lib.processes import in_processes
from lib.toy import MOTIONS, make_toy, toy_video, write_video
from lib.video import Probe, played, read_frames


def every(path):
    return read_frames(path, lambda total: list(range(total)))


@pytest.fixture
def run(monkeypatch, capfd):
    """Run data.py with words: (exit code, standard output, lines of standard error, no bars)."""

    def run(*words):
        code = 0
        try:
            prepare.main([*map(str, words), "--workers", "2"])
        except SystemExit as stop:  # in a notebook, only what fails may raise it
            code = stop.code
            assert code != 0
        out, err = capfd.readouterr()
        bars = ("decoding:", "rewriting:")
        errors = [line for line in err.splitlines() if line and not line.strip().startswith(bars)]
        return code, out, errors

    return run


# toy videos


def test_toy_data_set_has_ucf101s_layout(tmp_path):
    make_toy(tmp_path / "toy", train=24, test=12)
    train, test = read_split(tmp_path / "toy"), read_split(tmp_path / "toy", train=False)
    assert train.classes == list(MOTIONS) and sorted(train.labels) == sorted(list(range(12)) * 2)
    assert sorted(test.labels) == list(range(12)) and not set(train.paths) & set(test.paths)
    frames = every(train.paths[0])
    assert 36 <= len(frames) <= 48 and frames.shape[2:] == (54, 54)
    make_toy(tmp_path / "toy")  # is there: nothing happens
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match="other exists"):
        make_toy(tmp_path / "other")


def test_toy_videos_are_those_of_their_seed():
    digest = hashlib.sha256()
    for number, motion in enumerate(MOTIONS):
        for still in (False, True):
            video = toy_video(motion, np.random.default_rng((0, number)), still=still)
            digest.update(np.ascontiguousarray(video[::8, ::6, ::6]).tobytes())
    assert digest.hexdigest()[:16] == "23ad1aa538011884"


@pytest.mark.parametrize("motion", MOTIONS)
def test_toy_videos_move_and_still_ones_in_a_disc_alone(motion):
    video = toy_video(motion, np.random.default_rng(5)).astype(float)
    calm = video.reshape(len(video), 9, 6, 9, 6, 3).mean(axis=(2, 4))  # most noise is gone
    assert abs(calm[12] - calm[0]).max() > 20 and calm.std(axis=(1, 2)).mean() > 10
    if motion in ("Slide0", "Slide90"):  # waves lie across their axis: columns, or rows
        change = [abs(np.diff(video[:6].mean(axis=0), axis=axis)).mean() for axis in (0, 1)]
        assert (change[1] > change[0]) == (motion == "Slide0")
    still = toy_video(motion, np.random.default_rng(5), still=True).astype(float)
    change = abs(still[6:] - still[:-6]).mean(axis=(0, 3)).reshape(9, 6, 9, 6).mean(axis=(1, 3))
    noise = 255 * 0.05 * 2 / np.pi**0.5  # of the difference of two noises
    assert still.shape == video.shape and change.max() > 2 * noise
    assert 0.5 < (change < 1.2 * noise).mean() < 0.9  # most places stand still


# many files


def work(item, alive):
    if item == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    if item == 5:
        time.sleep(60)
    if item == 6:  # long, but alive
        for _ in range(16):
            time.sleep(0.2)
            alive()
    return item * item


def test_processes_that_die_or_hang_cost_one_item():
    begin = time.monotonic()
    found = dict(in_processes(work, list(range(9)), 2, silence=2))
    assert time.monotonic() - begin < 20
    assert [found[i] for i in (0, 1, 2, 4, 6, 7, 8)] == [0, 1, 4, 16, 36, 49, 64]
    assert found[3] == "decoding it crashed the process (exit code -9)"
    assert found[5] == "not decoded: no frame for 2 s"
    time.sleep(0.1)
    assert not multiprocessing.active_children()


def test_processes_end_with_the_main_one():
    code = "from lib.processes import in_processes\nimport time\nimport os\n"
    code += "def work(item, alive):\n    print(os.getpid(), flush=True)\n    return 1\n"
    code += "for item in in_processes(work, [1, 2, 3], 1):\n    time.sleep(60)"
    root = os.path.dirname(os.path.dirname(processes.__file__))
    main = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=root)
    main.stdout.readline()
    main.kill()
    main.communicate(timeout=20)  # waits for all that could still write


# check


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Files of 62 and of 12 frames, 96x64 pixels."""
    folder = tmp_path_factory.mktemp("clips")
    noise = np.random.default_rng(0).integers(0, 256, (62, 64, 96, 3)).astype(np.uint8)
    for name, frames in (("long", 62), ("short", 12)):
        write_video(folder / f"{name}.avi", noise[:frames])
    return folder


def place(clip, *paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(clip, path)


@pytest.fixture
def ucf(clips, tmp_path):
    """A folder with UCF-101 (2 classes, 4 groups) and ucfTrainTestlist."""
    names = [f"{c}/v_{c}_g{g:02}_c01.avi" for c in ("Archery", "Bowling") for g in range(1, 5)]
    place(clips / "long.avi", *(tmp_path / "UCF-101" / name for name in names))
    place(clips / "short.avi", tmp_path / "UCF-101" / names[0])
    lists = tmp_path / "ucfTrainTestlist"
    lists.mkdir()
    (lists / "classInd.txt").write_text("1 Archery\r\n2 Bowling\r\n")
    train = [f"{name} {1 + name.startswith('B')}\r\n" for name in names if "_g01" not in name]
    (lists / "trainlist01.txt").write_text("".join(train))
    (lists / "testlist01.txt").write_text("".join(f"{n}\r\n" for n in names if "_g01" in n))
    return tmp_path


@pytest.fixture
def hmdb(clips, tmp_path):
    """A folder with hmdb51 (2 classes of 4, one of them unused) and testTrainMulti_7030_splits."""
    for name in ("clap", "wave"):
        files = [f"A_{name}_f_cm_np1_ba_med_{i}.avi" for i in range(4)]
        place(clips / "long.avi", *(tmp_path / "hmdb51" / name / file for file in files))
        lines = "".join(f"{file} {part} \n" for file, part in zip(files, "1120", strict=True))
        list_ = tmp_path / "testTrainMulti_7030_splits" / f"{name}_test_split1.txt"
        list_.parent.mkdir(exist_ok=True)
        list_.write_text(lines)
    return tmp_path


def test_a_whole_ucf101_passes(ucf, run):
    data, splits = ucf / "UCF-101", ucf / "ucfTrainTestlist"
    code, out, err = run("check", "ucf101", "--data", data, "--splits", splits)
    assert code == 0 and err == []
    for line in (
        "6 training videos, 2 test videos, 2 classes",
        "note: the official lists have 101 classes",
        "frames: shortest 12, median 62, longest 62",
        "sizes, the most common (videos): 96x64 (8)",
        "frames per second, the most common (videos): 25 (8)",
        "1 are too short for a clip of 16 frames with stride 4: they get a smaller stride; "
        "1 have under 16 frames and repeat the last one",
        f"next: python pretrain.py --data {data} --splits {splits}",  # too few for its recipe
    ):
        assert line in out.splitlines()
    assert "8 videos decoded" in out and "0 broken" in out and "detection" not in out


def test_a_whole_hmdb51_passes(hmdb, run):
    shutil.move(hmdb / "testTrainMulti_7030_splits", hmdb / "hmdb51")  # found there by its name
    code, out, _ = run("check", "hmdb51", "--data", hmdb / "hmdb51")
    assert code == 0 and "4 training videos, 2 test videos, 2 classes" in out
    assert "6 videos decoded" in out and "0 are too short for a clip of 16 frames" in out


def test_own_videos_pass(ucf, run):
    code, out, _ = run("check", "own", "--data", ucf / "UCF-101")
    assert code == 0 and "8 training videos, no test part, 2 classes" in out
    assert f"next: python pretrain.py --data {ucf / 'UCF-101'}" in out
    (ucf / "list.txt").write_text("Archery/v_Archery_g02_c01.avi 0\n")
    code, out, _ = run("check", "own", "--data", ucf / "UCF-101", "--splits", ucf / "list.txt")
    assert code == 0 and "1 videos decoded" in out


def test_the_next_command_works_on_five_videos(tmp_path, run, monkeypatch):
    for i in range(5):
        write(tmp_path / f"{i}.mp4", frames=8)
    code, out, _ = run("check", "own", "--data", tmp_path)
    words = shlex.split(out.splitlines()[-1].removeprefix("next: "))
    assert code == 0 and words == ["python", "pretrain.py", "--data", str(tmp_path)]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("visualize.main", lambda argv: None)
    tiny = "--size toy --frames 2 --resolution 32 --cube 2 8 8 --epochs 1 --workers 0"
    pretrain.main([*words[2:], *tiny.split()])
    assert "5 videos" in run("check", "own", "--data", tmp_path)[1]


def test_which_command_comes_next(tmp_path, capsys):
    """The recipe of a whole data set; own for a part of it; none where training would end."""

    def said(videos, broken=0, dataset="hmdb51"):
        paths = [tmp_path / f"{i}.avi" for i in range(videos)]
        train = Split(paths, [0] * videos, ["a"])
        lost = dict.fromkeys(paths[:broken], "broken")
        prepare._next(dataset, train, lost, data="a b", splits="lists", fold=2)
        return capsys.readouterr().out.splitlines()

    own = "next: python pretrain.py --data 'a b' --splits lists --fold 2"
    assert said(192) == [own.replace("--data", "hmdb51 --data")] and said(191) == [own]
    assert said(192, dataset="own") == [own] and said(10, 1)[1:] == [own]
    assert len(said(10, 2)) == len(said(1, 1)) == 1 and "up to a tenth" in said(10, 2)[0]


def test_broken_files_are_listed(ucf, run):
    folder = ucf / "UCF-101" / "Archery"
    paths = [folder / f"v_Archery_g{g:02}_c01.avi" for g in range(1, 5)]
    whole = paths[1].read_bytes()
    paths[0].write_bytes(b"")
    paths[1].write_bytes(whole[: len(whole) // 2])
    paths[2].write_text("not a video\n" * 99)
    noisy = bytearray(whole)
    noisy[len(whole) * 3 // 5 : len(whole) * 3 // 5 + 40] = bytes(40)
    paths[3].write_bytes(noisy)
    words = ("--data", ucf / "UCF-101", "--splits", ucf / "ucfTrainTestlist")
    code, out, err = run("check", "ucf101", *words)
    lines = [line for line in out.splitlines() if line.startswith("broken: ")]
    broken = dict(line.removeprefix("broken: ").split(": ", 1) for line in lines)
    assert code == 1 and err == [] and set(broken) == set(map(str, paths)) and "4 broken" in out
    for path in (paths[0], paths[2]):
        assert broken[str(path)] == "Invalid data found when processing input"
    assert "of 62 frames are there: the file is cut short" in broken[str(paths[1])]
    assert "frames are damaged" in broken[str(paths[3])]
    assert "frames: shortest 62, median 62, longest 62" in out


# mistakes: (what to break, what the first line says, whether the archives are explained)


def flatten(folder):
    for path in list(folder.glob("*/*.avi")):
        path.rename(folder / path.name)


def swap(path, old, new):
    path.write_text(path.read_text().replace(old, new))


UCF_MISTAKES = {
    "no folder": (lambda f: (f / "UCF-101").rename(f / "x"), "no folder", True),
    "no lists": (lambda f: shutil.rmtree(f / "ucfTrainTestlist"), "no classInd.txt in", True),
    "lists elsewhere": (
        lambda f: (f / "ucfTrainTestlist").rename(f / "l"),
        "use --splits DIR/l",
        False,
    ),
    "detection": (
        lambda f: (f / "ucfTrainTestlist" / "classInd.txt").unlink(),
        "lists of the detection task?",
        True,
    ),
    "no fold": (
        lambda f: (f / "ucfTrainTestlist" / "testlist01.txt").unlink(),
        "no file .*testlist01.txt",
        False,
    ),
    "missing file": (
        lambda f: (f / "UCF-101/Bowling/v_Bowling_g01_c01.avi").unlink(),
        "1 of 8 listed videos are missing, the first is .*v_Bowling_g01_c01.avi",
        True,
    ),
    "missing class": (
        lambda f: shutil.rmtree(f / "UCF-101/Bowling"),
        "folders that are not there: Bowling",
        True,
    ),
    "other case": (
        lambda f: (f / "UCF-101/Bowling").rename(f / "UCF-101/bOwling"),
        "there is DIR/UCF-101/bOwling.*only .*case differ",
        False,
    ),
    "flat": (
        lambda f: flatten(f / "UCF-101"),
        "without its folder; `unrar x` keeps folders",
        False,
    ),
    "overlap": (
        lambda f: swap(f / "ucfTrainTestlist/testlist01.txt", "y_g01", "y_g02"),
        "g02 is in both",
        False,
    ),
}


def expect(result, folder, words, rest=""):
    """Check exit code 2, nothing on standard output, the first line, and what the rest holds."""
    code, out, err = result
    words = words.replace("DIR", re.escape(str(folder)))
    assert code == 2 and out == "" and re.search(words, err[0]) and err[0].startswith("error: ")
    assert rest in "\n".join(err[1:]) if rest else len(err) == 1, err


@pytest.mark.parametrize("mistake", UCF_MISTAKES)
def test_ucf101_mistakes(ucf, run, mistake):
    breaks, words, explained = UCF_MISTAKES[mistake]
    breaks(ucf)
    flags = ("--data", ucf / "UCF-101", "--splits", ucf / "ucfTrainTestlist")
    archive = "UCF101TrainTestSplits-RecognitionTask.zip" if explained else ""
    expect(run("check", "ucf101", *flags), ucf, words, archive)


def test_ucf101_folders_one_level_off(ucf, run):
    lists, folder = ucf / "ucfTrainTestlist", ucf / "UCF-101"
    for words, say in (
        (("--data", folder / "Bowling", "--splits", lists), "use --data DIR/UCF-101"),
        (("--data", ucf, "--splits", lists), "use --data DIR/UCF-101"),
        (("--data", folder, "--splits", ucf), "use --splits DIR/ucfTrainTestlist"),
        (("--data", folder, "--splits", lists / "testlist01.txt"), "use --splits DIR/ucfTrain"),
        (("--data", folder), "--splits is missing.* use --splits DIR/ucfTrainTestlist"),
        (("--data", folder, "--splits", lists, "--fold", 2), "no file .*trainlist02.txt"),
    ):
        expect(run("check", "ucf101", *words), ucf, say)


def test_hmdb51_mistakes(hmdb, run):
    words, folder = ("check", "hmdb51", "--data", hmdb / "hmdb51", "--splits"), hmdb / "hmdb51"
    lists = hmdb / "testTrainMulti_7030_splits"
    expect(run(*words, lists, "--fold", 3), hmdb, r"neither classInd.txt .* nor \*_test_split3.txt")
    expect(run(*words, hmdb / "no"), hmdb, "use --splits DIR/testTrainMulti_7030_splits")
    loop = 'for f in *.rar; do unrar x "$f"'
    expect(run("check", "hmdb51", "--data", hmdb / "no"), hmdb, "no folder", loop)
    swap(lists / "clap_test_split1.txt", "avi 2", "avi")
    expect(run(*words, lists), hmdb, "line .*clap.* must end in 0")
    swap(lists / "clap_test_split1.txt", "2.avi", "2.avi 2")
    shutil.rmtree(folder / "clap")
    (folder / "clap.rar").touch()
    packed = r"clap.rar is still packed; \(cd DIR/hmdb51 && for f in \*.rar"
    expect(run(*words, lists), hmdb, packed)


# prepare


def state(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def files(folder):
    return {path.name for path in folder.rglob("*") if path.is_file()}


NAMES = ("run/a.mp4", "run/b c.avi", "walk/d.mkv")


@pytest.fixture
def source(tmp_path):
    """Three videos of long groups of pictures in two classes, and one file that is none."""
    folder = tmp_path / "source"
    for name in NAMES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write(folder / name, "mpeg4" if "avi" in name else "libx264", frames=30, g=250, bf=2)
    (folder / "walk" / "e.avi").write_text("no video")
    return folder


def prepared(source, out, dataset="own", splits=None, short_side=None):
    return prepare.prepare(dataset, source, splits, out, short_side, 2)


def test_names_frames_and_lists_stay(source, tmp_path, capsys):
    (tmp_path / "list.txt").write_text("run/a.mp4 1\nwalk/d.mkv 0\n")
    before, out = state(source), tmp_path / "out"
    assert prepared(source, out) == 1  # for the file that is none
    printed = capsys.readouterr().out
    copied = f"not rewritten, copied as it is: {source}/walk/e.avi: Invalid data found"
    assert copied in printed and "3 videos rewritten" in printed
    assert "next: unpack or download the broken" in printed and "pretrain.py" not in printed
    assert state(source) == before  # bytes and times
    assert files(out) == {"a.mp4", "b c.avi", "d.mkv", "e.avi", "prepared.json"}
    assert (out / "walk" / "e.avi").read_text() == "no video"  # for training to leave out
    for name in NAMES:
        old, new = every(source / name), every(out / name)
        assert [number_of(frame) for frame in new] == list(range(30)) and new.shape == old.shape
        assert (old.float() - new).square().mean() < 255**2 / 10**3  # 30 dB
        with av.open(str(out / name)) as container:
            assert sum(packet.is_keyframe for packet in container.demux(video=0)) == 3
    listed, moved = (read_split(folder, tmp_path / "list.txt") for folder in (source, out))
    assert listed.labels == moved.labels
    assert [path.name for path in listed.paths] == [path.name for path in moved.paths]
    assert read_split(out).classes == read_split(source).classes


def test_official_lists_go_along(source, tmp_path, capsys):
    lists = source / "ucfTrainTestlist"
    lists.mkdir()
    (lists / "classInd.txt").write_text("1 run\n2 walk\n")
    parts = {1: ("run/a.mp4 1", "walk/d.mkv"), 2: ("walk/d.mkv 2", "run/b_c.avi")}
    for fold, (train, test) in parts.items():
        (lists / f"trainlist0{fold}.txt").write_text(train + "\n")
        (lists / f"testlist0{fold}.txt").write_text(test + "\n")
    (source / "run" / "b c.avi").rename(source / "run" / "b_c.avi")
    assert prepared(source, tmp_path / "out", "ucf101") == 0
    assert "3 videos rewritten" in capsys.readouterr().out  # those of both folds
    for fold in (1, 2):
        for part in (True, False):
            old, new = (read_split(f, None, fold, part) for f in (source, tmp_path / "out"))
            assert (old.labels, old.classes) == (new.labels, new.classes)


def test_a_second_run_does_what_is_missing(source, tmp_path, capsys):
    out = tmp_path / "out"
    (source / "walk" / "e.avi").unlink()
    assert prepared(source, out) == 0
    first = state(out)
    assert prepared(source, out) == 0
    assert "3 of them are prepared already" in capsys.readouterr().out

    def same(name):
        return state(out)[out / name] == first[out / name]

    assert all(map(same, NAMES))
    os.utime(source / "run" / "a.mp4", ns=(1, 1))  # another source
    os.truncate(out / "run" / "b c.avi", 1000)
    assert prepared(source, out) == 0
    assert "1 of them are prepared already" in capsys.readouterr().out
    assert same("walk/d.mkv") and not same("run/a.mp4")
    assert (out / "run" / "b c.avi").read_bytes() == first[out / "run" / "b c.avi"][0]
    (source / "run" / "a.mp4").write_text("broken now")
    for _ in range(2):  # a broken one is tried again
        assert prepared(source, out) == 1
        assert (out / "run" / "a.mp4").read_text() == "broken now"  # nothing older is left
    with pytest.raises(ValueError, match="another --short-side"):
        prepared(source, out, short_side=32)
    assert prepared(source, tmp_path / "small", short_side=32) == 1
    assert every(tmp_path / "small" / "walk" / "d.mkv").shape == (30, 3, 32, 48)


def test_an_interrupted_run_leaves_no_half_files(source, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"

    def die(part, **times):
        assert os.path.getsize(part) > 0
        os._exit(9)

    with monkeypatch.context() as patch:
        patch.setattr(os, "utime", die)  # the moment before a file gets its name
        assert prepared(source, out) == 1
    assert "crashed the process (exit code 9)" in capsys.readouterr().out
    copies = {path for path in source.rglob("*") if path.is_file()}
    assert all((out / p.relative_to(source)).read_bytes() == p.read_bytes() for p in copies)

    def stop(work, jobs, *args):
        for job in jobs[:2]:
            yield job, work(job, lambda: None)
        jobs[2][1].write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "in_processes", stop)
        with pytest.raises(KeyboardInterrupt):
            prepared(source, out)
    assert files(out) == {"a.mp4", "b c.avi", "d.mkv", "e.avi", "prepared.json"}
    assert all((out / p.relative_to(source)).read_bytes() != b"half" for p in copies)
    assert prepared(source, out) == 1
    assert "2 of them are prepared already" in capsys.readouterr().out


def test_places_that_are_refused(source, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a.txt").touch()
    (tmp_path / "link").symlink_to(source)
    write(tmp_path / "outside.mp4", frames=3)
    for line in ("../outside.mp4 0", f"{source}/run/a.mp4 0"):
        (tmp_path / "list.txt").write_text(line + "\n")
        with pytest.raises(ValueError, match="listed from outside"):
            prepared(source, tmp_path / "out", splits=tmp_path / "list.txt")
    for out in (source, source / "new", tmp_path, tmp_path / "link"):
        with pytest.raises(ValueError, match="must be another folder"):
            prepared(source, out)
    with pytest.raises(ValueError, match="holds other files"):
        prepared(source, tmp_path / "full")
    with pytest.raises(ValueError, match="--short-side 1"):
        prepared(source, tmp_path / "out", short_side=1)
    out = tmp_path / "links"
    (source / "walk" / "e.avi").unlink()
    prepared(source, out)
    (tmp_path / "elsewhere").mkdir()
    shutil.rmtree(out / "run")
    (out / "run").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="leads out of"):
        prepared(source, out)
    assert not any((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize(
    "codec, suffix, options",
    [
        ("libx264", "mp4", dict(turned=90)),
        ("libx264", "mkv", dict(pix_fmt="yuv420p10le")),
        ("ffv1", "mkv", dict(pix_fmt="bgr0", size=(67, 99))),
        ("ffv1", "mkv", dict(pix_fmt="gray")),
        ("libx264", "mp4", dict(times=[0, 40, 700, 707, 1000])),
        ("ffv1", "mkv", dict(pix_fmt="bgr0", size=(2, 2))),
    ],
)
def test_odd_files_are_rewritten_upright_with_even_sides(tmp_path, codec, suffix, options):
    path = write(tmp_path / f"a.{suffix}", codec, frames=5, **options)
    rewrite(path, tmp_path / "new.mp4", None)
    old, new = every(path), every(tmp_path / "new.mp4")
    even = [max(side // 2 * 2, 2) for side in old.shape[2:]]
    assert new.shape == (*old.shape[:2], *even)
    if list(old.shape[2:]) == even:
        error = (old.float() - new).square().mean((1, 2, 3))
        assert error.max() < 255**2 / 10**2  # of every frame


def test_what_is_not_the_same_is_not_delivered(tmp_path, monkeypatch):
    path, one = write(tmp_path / "a.mp4"), tmp_path / "b.mp4"
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "LEAST", 90)
        with pytest.raises(ValueError, match="not the same when rewritten: 60 of 60 frames, PSNR"):
            rewrite(path, one, None)

    def loses(file, found):
        for number, frame in enumerate(played(file, found)):
            if file != one or number != 30:
                yield frame
            else:
                found.frames -= 1

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "played", loses)
        with pytest.raises(ValueError, match="59 of 60 frames"):
            rewrite(path, one, None)
    assert len(list(played(path, Probe()))) == 60 and torch.is_tensor(every(path))
