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
from fractions import Fraction

import av
import numpy as np
import pytest
from films import number_of, write

import pretrain
from lib import prepare, processes, toy
from lib.lists import Split, read_split
from lib.prepare import rewrite
from lib.processes import in_processes
from lib.toy import MOTIONS, make_toy, toy_video
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
        except ValueError as error:  # engine.cli prints it
            print(f"error: {error}", file=sys.stderr)
            code = 2
        except SystemExit as stop:  # in a notebook, only what fails may raise it
            code = stop.code
            assert code != 0
        out, err = capfd.readouterr()
        errors = [line for line in err.splitlines() if line and "decoding:" not in line]
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
        video = toy_video(motion, np.random.default_rng((0, number)))
        digest.update(np.ascontiguousarray(video[::8, ::6, ::6]).tobytes())
    assert digest.hexdigest()[:16] == "3e09d1703a7425ac"


@pytest.mark.parametrize("motion", MOTIONS)
def test_toy_videos_move(motion):
    video = toy_video(motion, np.random.default_rng(5)).astype(float)
    calm = video.reshape(len(video), 9, 6, 9, 6, 3).mean(axis=(2, 4))  # most noise is gone
    assert abs(calm[12] - calm[0]).max() > 20 and calm.std(axis=(1, 2)).mean() > 10
    if motion in ("Slide0", "Slide90"):  # waves lie across their axis: columns, or rows
        change = [abs(np.diff(video[:6].mean(axis=0), axis=axis)).mean() for axis in (0, 1)]
        assert (change[1] > change[0]) == (motion == "Slide0")


# many files


def work(item, alive):
    if item == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    if item == 5:
        time.sleep(60)
    if item == 7:
        raise ValueError("no seventh")
    if item == 6:  # long, but alive
        for _ in range(16):
            time.sleep(0.2)
            alive()
    return item * item


def full_disk(item, alive):
    raise OSError(28, "No space left on device")


def test_a_full_disk_ends_all():
    with pytest.raises(OSError, match="No space left"):
        list(in_processes(full_disk, [1, 2, 3], 1))


def its_number(item, alive):
    return os.getpid()


def test_an_idle_process_takes_the_next_item():
    assert len({number for _, number in in_processes(its_number, [1, 2, 3], 1)}) == 1


def test_processes_that_die_or_hang_cost_one_item():
    begin = time.monotonic()
    found = dict(in_processes(work, list(range(9)), 2, silence=2))
    assert time.monotonic() - begin < 20
    assert [found[i] for i in (0, 1, 2, 4, 6, 8)] == [0, 1, 4, 16, 36, 64]
    assert found[3] == "decoding it crashed, or gave no frame for 2 s (exit code -9)"
    assert found[5] == "decoding it crashed, or gave no frame for 2 s (exit code 1)"
    assert found[7] == "no seventh"
    for _ in range(100):  # on a busy machine they end a little later
        if not multiprocessing.active_children():
            break
        time.sleep(0.1)
    assert not multiprocessing.active_children()


def test_a_process_that_cannot_start_is_told(monkeypatch):
    def start(self):
        raise OSError("no more processes")

    monkeypatch.setattr(multiprocessing.Process, "start", start)
    with pytest.raises(OSError, match="no more processes"):
        list(in_processes(work, [1], 1))


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
    for name, frames in (("long", 62), ("short", 12)):
        write(folder / f"{name}.avi", "mpeg4", frames=frames, g=250)
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
        "8 videos decoded, 0 broken",
        "frames: shortest 12, median 62, longest 62",
        "sizes, the most common (videos): 96x64 (8)",
        "1 are too short for 16 frames with stride 4, and get a smaller stride",
        f"next: python pretrain.py --data {data} --splits {splits}",  # too few for its recipe
    ):
        assert line in out.splitlines()


def test_a_whole_hmdb51_passes(hmdb, run):
    shutil.move(hmdb / "testTrainMulti_7030_splits", hmdb / "hmdb51")  # found there by its name
    code, out, _ = run("check", "hmdb51", "--data", hmdb / "hmdb51")
    assert code == 0 and "4 training videos, 2 test videos, 2 classes" in out
    assert "6 videos decoded" in out and "0 are too short for 16 frames with stride 2" in out


def test_long_files_without_an_index_are_counted(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(prepare, "LONG", 20)
    for name, frames in (("a.ts", 30), ("b.mp4", 30), ("c.ts", 12)):
        write(tmp_path / name, frames=frames)
    assert prepare.check("own", tmp_path, None, 1, 1) == 0
    assert "\n1 of over 20 frames are decoded from their start for" in capsys.readouterr().out


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


def swap(path, old, new):
    path.write_text(path.read_text().replace(old, new))


UCF_MISTAKES = {  # what to break, what the line says
    "no folder": (lambda f: (f / "UCF-101").rename(f / "x"), "no folder .*: --data must name"),
    "no numbers": (
        lambda f: (f / "ucfTrainTestlist" / "classInd.txt").write_text("Archery\nBowling\n"),
        "classInd.txt: lines must read `number class`, numbered from 1",
    ),
    "other numbers": (
        lambda f: (f / "ucfTrainTestlist" / "classInd.txt").write_text("1 Bowling\n2 Archery\n"),
        "trainlist01.txt: line .* must read `Class/video",
    ),
    "no lists": (
        lambda f: (f / "ucfTrainTestlist" / "classInd.txt").unlink(),
        r"holds neither classInd.txt \(UCF101\) nor",
    ),
    "missing file": (
        lambda f: (f / "UCF-101/Bowling/v_Bowling_g01_c01.avi").unlink(),
        "1 of 8 listed videos are missing, the first is .*v_Bowling_g01_c01.avi: docs/data.md says",
    ),
    "other case": (
        lambda f: (f / "UCF-101/Bowling").rename(f / "UCF-101/bOwling"),
        "there is DIR/UCF-101/bOwling, only upper and lower case differ: rename it",
    ),
}


def expect(result, folder, words):
    """Check exit code 2 and the only line; on standard output, there is what the others are."""
    code, out, err = result
    words = words.replace("DIR", re.escape(str(folder)))
    assert code == 2 and re.match(f"(error|warning): .*{words}", err[0]) and len(err) == 1, err
    assert err[0].startswith("warning") == ("videos decoded" in out) == bool(out)


@pytest.mark.parametrize("mistake", UCF_MISTAKES)
def test_ucf101_mistakes(ucf, run, monkeypatch, mistake):
    breaks, words = UCF_MISTAKES[mistake]
    monkeypatch.chdir(ucf)
    breaks(ucf)
    flags = ("--data", ucf / "UCF-101", "--splits", ucf / "ucfTrainTestlist")
    expect(run("check", "ucf101", *flags), ucf, words)


def test_other_lists_are_refused(hmdb, run):
    words = ("--data", hmdb / "hmdb51")
    expect(run("check", "hmdb51", *words), hmdb, "DIR/hmdb51 has other lists, or none: .* --splits")
    words += ("--splits", hmdb / "testTrainMulti_7030_splits")
    expect(run("check", "ucf101", *words), hmdb, "has other lists, or none: .*of ucf101")
    expect(run("check", "hmdb51", *words, "--fold", 3), hmdb, r"no files \*_test_split3.txt")


def test_the_others_are_decoded_where_some_videos_are_missing(ucf, run, monkeypatch):
    monkeypatch.chdir(ucf)
    data, lists = ucf / "UCF-101", ucf / "ucfTrainTestlist"
    lost = [data / "Bowling" / f"v_Bowling_g0{i}_c01.avi" for i in (1, 2)]
    for path in lost:
        path.unlink()
    code, out, err = run("check", "ucf101", "--data", data, "--splits", lists)
    names = "runs/check-ucf101/missing.txt"
    assert code == 2 and {*open(names).read().split()} == {*map(str, lost)}
    assert len(err) == 1 and f"2 of 8 listed videos are missing, the first is {lost[1]}" in err[0]
    assert f"(all are in {names})" in err[0] and "6 videos decoded, 0 broken" in out
    words = shlex.split(out.splitlines()[-1].removeprefix("next: "))
    assert words[-2:] == ["--missing", "skip"]
    assert len(read_split(data, lists, missing="skip").paths) == 5
    out_folder = ucf / "fast"
    code, out, err = run(
        "prepare", "ucf101", "--data", data, "--splits", lists, "--out", out_folder
    )
    assert code == 2 and "2 of 8" in err[0] and "--missing skip" in out.splitlines()[-1]
    assert len(read_split(out_folder, lists, missing="skip").paths) == 5


# prepare


def state(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def files(folder):
    return {path.name for path in folder.rglob("[!.]*") if path.is_file()}


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


def test_names_and_frames_stay(source, tmp_path, capsys):
    (tmp_path / "list.txt").write_text("run/a.mp4 1\nwalk/d.mkv 0\n")
    before, out = state(source), tmp_path / "out"
    assert prepared(source, out) == 1  # for the file that is none
    printed = capsys.readouterr().out
    assert f"broken: {source}/walk/e.avi: Invalid data found" in printed
    assert "4 videos decoded, 1 broken" in printed
    assert "next: download the broken" in printed and "pretrain.py" not in printed
    assert state(source) == before  # bytes and times
    assert files(out) == {"a.mp4", "b c.avi", "d.mkv"}
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


def test_all_folds_of_official_lists_are_rewritten(source, tmp_path, capsys):
    lists = source / "ucfTrainTestlist"
    lists.mkdir()
    (lists / "classInd.txt").write_text("1 run\n2 walk\n")
    parts = {1: ("run/a.mp4 1", "walk/d.mkv"), 2: ("walk/d.mkv 2", "run/b_c.avi")}
    for fold, (train, test) in parts.items():
        (lists / f"trainlist0{fold}.txt").write_text(train + "\n")
        (lists / f"testlist0{fold}.txt").write_text(test + "\n")
    (source / "run" / "b c.avi").rename(source / "run" / "b_c.avi")
    (source / "walk" / "e.avi").unlink()
    out = tmp_path / "out"
    assert prepared(source, out, "ucf101") == 0
    assert f"next: python pretrain.py --data {out} --splits {lists}" in capsys.readouterr().out
    for fold in (1, 2):
        for part in (True, False):
            old, new = read_split(source, None, fold, part), read_split(out, lists, fold, part)
            assert (old.labels, old.classes) == (new.labels, new.classes)


def test_a_second_run_does_what_is_missing(source, tmp_path, capsys):
    out = tmp_path / "out"
    for _ in range(2):  # a broken one is tried again
        assert prepared(source, out) == 1
    assert "4 videos, 3 of them are prepared already" in capsys.readouterr().out
    first = state(out)
    (out / "run" / "b c.avi").rename(out / "run" / "b c.avi.part")  # as if it had been stopped
    (source / "walk" / "e.avi").unlink()
    assert prepared(source, out) == 0
    assert "2 of them are prepared already" in capsys.readouterr().out
    assert {path: first[path] for path in state(out / "run")} == state(out / "run")
    os.utime(source / "walk" / "d.mkv")  # as if it had been replaced
    assert prepared(source, out) == 0
    assert "2 of them are prepared already" in capsys.readouterr().out
    (source / "walk" / "d.mkv").rename(source / "run" / "9.mkv")  # another class
    with pytest.raises(ValueError, match="1 videos in .* have no source, as .*walk/d.mkv"):
        prepared(source, out)
    (source / "run" / "9.mkv").rename(source / "walk" / "d.mkv")
    whole = (source / "run" / "b c.avi").read_bytes()
    (source / "run" / "b c.avi").write_bytes(whole[: len(whole) // 2])  # it broke: no old copy
    assert prepared(source, out) == 1 and not (out / "run" / "b c.avi").exists()
    (tmp_path / "list.txt").write_text("walk/d.mkv 0\n")
    small = tmp_path / "small"
    assert prepared(source, small, splits=tmp_path / "list.txt", short_side=32) == 0
    assert files(small) == {"d.mkv"} and every(small / "walk" / "d.mkv").shape == (30, 3, 32, 48)


def test_a_list_of_the_home_folder_is_found(source, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "list.txt").write_text("walk/d.mkv 0\n")
    assert prepared(source, tmp_path / "out", splits="~/list.txt") == 0


def test_an_unfinished_file_has_another_name(source, tmp_path, monkeypatch, capsys):
    def die(part, target):
        assert os.path.getsize(part) > 0
        os._exit(9)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", die)  # the moment before a file gets its name
        assert prepared(source, tmp_path / "out") == 1
    assert "(exit code 9)" in capsys.readouterr().out
    assert files(tmp_path / "out") == {"a.mp4.part", "b c.avi.part", "d.mkv.part"}
    assert prepared(source, tmp_path / "out") == 1
    assert files(tmp_path / "out") == {"a.mp4", "b c.avi", "d.mkv"}


def test_places_that_are_refused(source, tmp_path):
    for out in (source, source / "new", tmp_path):
        with pytest.raises(ValueError, match="neither must lie in the other"):
            prepared(source, out)
    for text in (f"label,path\n0,{source}/walk/d.mkv\n", f'"{source}/walk/d.mkv",0\n'):
        (tmp_path / "abs.csv").write_text(text)
        with pytest.raises(ValueError, match="d.mkv is listed: list paths relative to --data"):
            prepared(source, tmp_path / "out", splits=tmp_path / "abs.csv")
    with pytest.raises(ValueError, match="--short-side 0 must be at least 2"):
        prepared(source, tmp_path / "out", short_side=0)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a.txt").touch()
    with pytest.raises(ValueError, match="holds other files, or videos with another --short-side"):
        prepared(source, tmp_path / "full")
    for name in (f"{source}/run/a.mp4", "walk/../run/a.mp4"):
        (tmp_path / "list.txt").write_text(f"{name} 0\n")
        with pytest.raises(ValueError, match="list paths relative to --data, within it"):
            prepared(source, tmp_path / "out", splits=tmp_path / "list.txt")


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
    rewrite((path, tmp_path / "new.mp4", None))
    old, new = every(path), every(tmp_path / "new.mp4")
    even = [max(side // 2 * 2, 2) for side in old.shape[2:]]
    assert new.shape == (*old.shape[:2], *even)
    if list(old.shape[2:]) == even:
        error = (old.float() - new).square().mean((1, 2, 3))
        assert error.max() < 255**2 / 10**2  # of every frame


@pytest.mark.parametrize("rate", ["24000/1001", "25", "14.7", "30000/1001"])
def test_seconds_stay_where_they_are(tmp_path, rate):
    """After 15 minutes at 24 frames instead of 24000/1001, all would be a second too late."""
    source = tmp_path / "a.mp4"
    with av.open(str(source), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(rate))
        stream.height, stream.width, stream.pix_fmt = 32, 32, "yuv420p"
        for _ in range(30):
            frame = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    prepare.rewrite((source, tmp_path / "b.mp4", None))
    rates = []
    for path in (source, tmp_path / "b.mp4"):
        about = Probe()
        next(played(path, about))
        rates.append(about.rate)
    assert rates[0] == pytest.approx(float(Fraction(rate)), rel=1e-3)
    assert rates[1] == pytest.approx(rates[0], rel=1e-6)


def test_what_lacks_frames_is_not_delivered(tmp_path, monkeypatch):
    path = write(tmp_path / "a.mp4")

    def loses(file, found):
        for number, frame in enumerate(played(file, found)):
            if file == path or number != 30:
                yield frame
            else:
                found.frames -= 1

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "played", loses)
        with pytest.raises(ValueError, match="a.mp4: only 59 of 60 frames"):
            rewrite((path, tmp_path / "b.mp4", None))
    assert files(tmp_path) == {"a.mp4"}


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="macOS cannot choose cores")
def test_toy_videos_do_not_depend_on_the_number_of_cores(tmp_path):
    cores = os.sched_getaffinity(0)
    toy._write((tmp_path / "all.avi", "Turn2", 0))
    try:
        os.sched_setaffinity(0, {min(cores)})
        toy._write((tmp_path / "one.avi", "Turn2", 0))
    finally:
        os.sched_setaffinity(0, cores)
    assert (tmp_path / "all.avi").read_bytes() == (tmp_path / "one.avi").read_bytes()


@pytest.mark.parametrize("words", ["", "chek", "check own", "check own --data x --fold 4"])
def test_mistakes_in_words_and_flags_are_one_line(words, capsys):
    with pytest.raises(SystemExit) as stop:
        prepare.main(words.split())
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1
