"""`python data.py check`: whole data sets pass, every usual mistake gets one clear line and the right exit code."""

import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from zoo import copy_from, unreadable, write

import data
from data import in_processes, probe


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Files of 62 and of 12 frames, 64x48 pixels, XviD-like."""
    folder, videos = tmp_path_factory.mktemp("clips"), np.random.default_rng(0).integers(0, 256, (62, 48, 64, 3))
    for name, frames in (("long", 62), ("short", 12)):
        data._write_video(folder / f"{name}.avi", videos[:frames].astype(np.uint8))
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
    train = [name for name in names if "_g01" not in name]
    (lists / "trainlist01.txt").write_text("".join(f"{n} {1 + n.startswith('B')}\r\n" for n in train))
    (lists / "testlist01.txt").write_text("".join(f"{n}\r\n" for n in names if "_g01" in n))
    return tmp_path


@pytest.fixture
def hmdb(clips, tmp_path):
    """A folder with hmdb51 (2 classes of 4, one of them unused) and testTrainMulti_7030_splits."""
    for name in ("clap", "shake_hands"):
        place(clips / "long.avi", *(tmp_path / "hmdb51" / name / f"A_{name}_f_cm_np1_ba_med_{i}.avi" for i in range(4)))
        lines = "".join(f"A_{name}_f_cm_np1_ba_med_{i}.avi {(1, 1, 2, 0)[i]} \n" for i in range(4))
        place(clips / "long.avi", tmp_path / "testTrainMulti_7030_splits" / f"{name}_test_split1.txt")
        (tmp_path / "testTrainMulti_7030_splits" / f"{name}_test_split1.txt").write_text(lines)
    return tmp_path


@pytest.fixture
def run(monkeypatch, capfd):
    """Run `data.py check` with words: (exit code, standard output, lines of standard error without the bar)."""

    def run(*words):
        monkeypatch.setattr("sys.argv", ["data.py", "check", *map(str, words), "--workers", "2"])
        with pytest.raises(SystemExit) as stop:
            data.main()
        out, err = capfd.readouterr()
        return stop.value.code, out, [line for line in err.splitlines() if "decoding:" not in line and line]

    return run


def test_a_whole_ucf101_passes(ucf, run):
    code, out, err = run("ucf101", "--data", ucf / "UCF-101", "--splits", ucf / "ucfTrainTestlist")
    assert code == 0 and err == []
    for line in (
        "6 training videos, 2 test videos, 2 classes",
        "note: the official lists have 101 classes",
        "frames: shortest 12, median 62, longest 62",
        "sizes, the most common (videos): 64x48 (8)",
        "frames a second, the most common (videos): 25 (8)",
        "1 are too short for a clip of 16 frames, 4 apart: they get a smaller stride; "
        "1 of them, with fewer than 16, repeat the last frame",
        f"next: python pretrain.py ucf101 --data {ucf / 'UCF-101'} --splits {ucf / 'ucfTrainTestlist'}",
    ):
        assert line in out.splitlines()
    assert "8 videos decoded" in out and "0 broken" in out and "detection" not in out


def test_a_whole_hmdb51_passes(hmdb, run):
    shutil.move(hmdb / "testTrainMulti_7030_splits", hmdb / "hmdb51")  # found there by its name
    code, out, _ = run("hmdb51", "--data", hmdb / "hmdb51")
    assert code == 0 and "4 training videos, 2 test videos, 2 classes" in out and "6 videos decoded" in out
    assert "0 are too short for a clip of 16 frames, 2 apart\n" in out


def test_own_videos_pass(ucf, run):
    code, out, _ = run("own", "--data", ucf / "UCF-101")
    assert code == 0 and "8 training videos, no test part, 2 classes" in out
    assert f"next: python pretrain.py --data {ucf / 'UCF-101'}\n" in out
    (ucf / "list.txt").write_text("Archery/v_Archery_g02_c01.avi 0\n")
    code, out, _ = run("own", "--data", ucf / "UCF-101", "--splits", ucf / "list.txt")
    assert code == 0 and "1 videos decoded" in out


def test_broken_files_are_listed(ucf, run):
    folder = ucf / "UCF-101" / "Archery"
    paths = [folder / f"v_Archery_g{g:02}_c01.avi" for g in range(1, 5)]
    whole = paths[1].read_bytes()
    paths[0].write_bytes(b"")
    paths[1].write_bytes(whole[: len(whole) // 2])
    paths[2].write_text("not a video\n" * 99)
    noisy = bytearray(whole)
    noisy[len(whole) // 2 : len(whole) // 2 + 40] = bytes(40)
    paths[3].write_bytes(noisy)
    code, out, err = run("ucf101", "--data", ucf / "UCF-101", "--splits", ucf / "ucfTrainTestlist")
    broken = dict(line.removeprefix("broken: ").split(": ", 1) for line in out.splitlines() if "broken: " in line)
    assert code == 1 and err == [] and set(broken) == set(map(str, paths)) and "4 broken" in out
    assert broken[str(paths[0])] == broken[str(paths[2])] == "Invalid data found when processing input"
    assert "of 62 frames are there: the file is cut short" in broken[str(paths[1])]
    assert "of 62 frames are damaged" in broken[str(paths[3])]
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
    "lists elsewhere": (lambda f: (f / "ucfTrainTestlist").rename(f / "l"), "use --splits DIR/l", False),
    "detection": (lambda f: (f / "ucfTrainTestlist" / "classInd.txt").unlink(), "lists of the detection task?", True),
    "no fold": (lambda f: (f / "ucfTrainTestlist" / "testlist01.txt").unlink(), "no file .*testlist01.txt", False),
    "missing file": (lambda f: (f / "UCF-101/Bowling/v_Bowling_g01_c01.avi").unlink(),
                     "1 of 8 listed videos are missing, the first is .*v_Bowling_g01_c01.avi", True),
    "missing class": (lambda f: shutil.rmtree(f / "UCF-101/Bowling"), "folders that are not there: Bowling", True),
    "flat": (lambda f: flatten(f / "UCF-101"), "without its folder; `unrar x` keeps folders", False),
    "malformed": (lambda f: swap(f / "ucfTrainTestlist/trainlist01.txt", "Archery/v_Archery_g02", "v_Archery_g02"),
                  "trainlist01.txt: line 'v_Archery_g02_c01.avi 1' must read", False),
    "other numbers": (lambda f: swap(f / "ucfTrainTestlist/trainlist01.txt", "avi 2", "avi 1"), "must read", False),
    "class list": (lambda f: swap(f / "ucfTrainTestlist/classInd.txt", "2 ", "two "), "classInd.txt: lines", False),
    "overlap": (lambda f: swap(f / "ucfTrainTestlist/testlist01.txt", "y_g01", "y_g02"), "g02 is in both", False),
}  # fmt: skip


@pytest.mark.parametrize("mistake", UCF_MISTAKES)
def test_ucf101_mistakes(ucf, run, mistake):
    breaks, words, explained = UCF_MISTAKES[mistake]
    breaks(ucf)
    expect_error(run("ucf101", "--data", ucf / "UCF-101", "--splits", ucf / "ucfTrainTestlist"), ucf, words)(
        "UCF101TrainTestSplits-RecognitionTask.zip" if explained else ""
    )


def expect_error(result, folder, words):
    """Check exit code 2, nothing on standard output and the first line; then what the rest must hold ("": no rest)."""
    code, out, err = result
    assert code == 2 and out == "" and re.search(words.replace("DIR", re.escape(str(folder))), err[0]), err
    assert err[0].startswith("error: ")

    def rest(text):
        assert (text in "\n".join(err[1:])) if text else len(err) == 1, err

    return rest


def test_ucf101_folders_one_level_off(ucf, run):
    lists, folder = ucf / "ucfTrainTestlist", ucf / "UCF-101"
    for words, say in (
        (("--data", folder / "Bowling", "--splits", lists), "use --data DIR/UCF-101"),
        (("--data", ucf, "--splits", lists), "use --data DIR/UCF-101"),
        (("--data", folder, "--splits", ucf), "use --splits DIR/ucfTrainTestlist"),
        (("--data", folder, "--splits", lists / "trainlist01.txt"), "use --splits DIR/ucfTrainTestlist"),
        (("--data", folder), "--splits is missing.* use --splits DIR/ucfTrainTestlist"),
        (("--data", folder, "--splits", lists, "--fold", 2), "no file .*trainlist02.txt"),
        (("--data", folder, "--splits", lists, "--fold", 4), "no fold 4"),
    ):
        expect_error(run("ucf101", *words), ucf, say)("")


def test_hmdb51_mistakes(hmdb, run, clips):
    words, folder = ("hmdb51", "--data", hmdb / "hmdb51", "--splits"), hmdb / "hmdb51"
    lists = hmdb / "testTrainMulti_7030_splits"
    expect_error(run(*words, lists, "--fold", 3), hmdb, r"no files \*_test_split3.txt")("")
    expect_error(run(*words, hmdb / "no"), hmdb, "use --splits DIR/testTrainMulti_7030_splits")("")
    shutil.copytree(lists, hmdb / "a" / "b")
    expect_error(run(*words, hmdb / "a"), hmdb, "use --splits DIR/a/b")("")
    expect_error(run("hmdb51", "--data", hmdb / "no"), hmdb, "no folder")('for f in *.rar; do unrar x "$f"')
    swap(lists / "clap_test_split1.txt", "avi 2", "avi")
    expect_error(run(*words, lists), hmdb, "line .*clap.* must end in 0")("")
    swap(lists / "clap_test_split1.txt", "2.avi", "2.avi 2")
    swap(lists / "clap_test_split1.txt", "3.avi 0", "1.avi 2")
    expect_error(run(*words, lists), hmdb, "clap.*_1.avi is in both")("")
    swap(lists / "clap_test_split1.txt", "1.avi 2", "3.avi 0")
    shutil.rmtree(folder / "clap")
    (folder / "clap.rar").touch()
    expect_error(run(*words, lists), hmdb, r"clap.rar is still packed; \(cd DIR/hmdb51 && for f in \*.rar")("")


# single files and processes


def test_probe_counts_what_read_frames_would_see(tmp_path):
    found = probe(write(tmp_path / "a.mp4", frames=30, g=12, bf=3))
    assert (found.frames, found.announced, found.size, found.rate, found.problem) == (30, 30, (96, 64), 25, "")
    options, totals = {"x264-params": "open-gop=1:keyint=12:bframes=3:scenecut=0"}, []
    path = copy_from(write(tmp_path / "whole.mkv", **options), tmp_path / "cut.mkv", key=2)
    data.read_frames(path, lambda total: totals.append(total) or [total - 1])
    assert probe(path).frames == totals[-1] < totals[0] and probe(path).problem == ""
    for name in unreadable(tmp_path):
        with pytest.raises(ValueError, match=name):
            probe(tmp_path / name)


def work(item):
    if item == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    if item == 5:
        time.sleep(60)
    return item * item


def test_processes_end_with_the_main_one():
    work = "lambda item: print(os.getpid(), flush=True) or time.sleep(60)"
    code = f"import data, os, time; list(data.in_processes({work}, [1], 1, lambda item: 100))"
    main = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=os.path.dirname(data.__file__))
    main.stdout.readline()
    main.kill()
    main.communicate(timeout=20)  # waits for all that could still write


def test_processes_that_die_or_hang_cost_one_item():
    begin = time.monotonic()
    found = dict(in_processes(work, list(range(8)), 2, lambda item: 1 if item == 5 else 50))
    assert time.monotonic() - begin < 40 and not multiprocessing.active_children()
    assert [found[i] for i in (0, 1, 2, 4, 6, 7)] == [0, 1, 4, 16, 36, 49]
    assert found[3] == "decoding it crashed the process (exit code -9)" and found[5] == "not decoded after 1 s"
