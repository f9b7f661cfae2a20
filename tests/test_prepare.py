"""`python data.py prepare`: the same frames under the same names, from files that are faster to sample."""

import os

import av
import pytest
from zoo import make_zoo, number_of, numbered, sound, write

import data
from data import Probe, prepare, read_frames, read_split, rewrite


def every(path):
    return read_frames(path, lambda total: list(range(total)))


def state(folder):
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def files(folder):
    return {path.name for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def source(tmp_path):
    """Two classes of two long groups of pictures each, and one file that is none."""
    folder = tmp_path / "source"
    for name in ("run/a.mp4", "run/b c.avi", "walk/d.mkv"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write(folder / name, "mpeg4" if "avi" in name else "libx264", g=250, bf=2)
    (folder / "walk" / "e.avi").write_text("no video")
    return folder


def run(source, out, **options):
    return prepare("own", source, options.pop("splits", None), out, options.pop("short_side", None), 2)


def test_names_frames_and_lists_stay(source, tmp_path, capsys):
    (tmp_path / "list.txt").write_text("run/a.mp4 1\nwalk/d.mkv 0\n")
    before, out = state(source), tmp_path / "out"
    assert run(source, out) == 1  # for the file that is none
    printed = capsys.readouterr().out
    assert (
        f"not rewritten, copied as it is: {source}/walk/e.avi: Invalid data found" in printed
        and "3 videos rewritten" in printed
    )
    assert f"next: python pretrain.py --data {out}\n" in printed
    assert state(source) == before  # bytes and times
    assert files(out) == {"a.mp4", "b c.avi", "d.mkv", "e.avi", "prepared.jsonl"}
    assert (out / "walk" / "e.avi").read_text() == "no video"  # for training to leave out, as before
    for name in ("run/a.mp4", "run/b c.avi", "walk/d.mkv"):
        old, new = every(source / name), every(out / name)
        assert [number_of(frame) for frame in new] == list(range(60)) and new.shape == old.shape
        assert (old.float() - new).square().mean() < 255**2 / 10**3  # 30 dB
        with av.open(str(out / name)) as container:
            assert sum(packet.is_keyframe for packet in container.demux(video=0)) == 5
    listed, moved = (read_split(folder, tmp_path / "list.txt") for folder in (source, out))
    assert listed.labels == moved.labels and [p.name for p in listed.paths] == [p.name for p in moved.paths]
    assert read_split(out).classes == read_split(source).classes


def test_official_lists_go_along(source, tmp_path, capsys):
    lists = source / "ucfTrainTestlist"
    lists.mkdir()
    (lists / "classInd.txt").write_text("1 run\n2 walk\n")
    for fold, (train, test) in {1: ("run/a.mp4 1", "walk/d.mkv"), 2: ("walk/d.mkv 2", "run/b_c.avi")}.items():
        (lists / f"trainlist0{fold}.txt").write_text(train + "\n")
        (lists / f"testlist0{fold}.txt").write_text(test + "\n")
    (source / "run" / "b c.avi").rename(source / "run" / "b_c.avi")
    assert prepare("ucf101", source, None, tmp_path / "out", None, 2) == 0
    assert "3 videos rewritten" in capsys.readouterr().out  # those of both folds
    for fold in (1, 2):
        for part in (True, False):
            old, new = (read_split(folder, None, fold, part) for folder in (source, tmp_path / "out"))
            assert (old.labels, old.classes) == (new.labels, new.classes)


def test_lists_beside_the_videos_leave_the_rewritten_ones_alone(source, tmp_path):
    for name, text in {"classInd": "1 run\n2 walk", "trainlist01": "run/a.mp4 1", "testlist01": "walk/d.mkv"}.items():
        (source / f"{name}.txt").write_text(text + "\n")
    out = tmp_path / "out"
    assert prepare("ucf101", source, source, out, None, 2) == 0
    assert len(read_split(out, out).paths) == 1
    assert (out / "run" / "a.mp4").read_bytes() != (source / "run" / "a.mp4").read_bytes()


def test_a_second_run_does_what_is_missing(source, tmp_path, capsys):
    out = tmp_path / "out"
    (source / "walk" / "e.avi").unlink()
    assert run(source, out) == 0
    first = state(out)
    assert run(source, out) == 0 and "3 of them are prepared already" in capsys.readouterr().out
    same = lambda name: state(out)[out / name] == first[out / name]
    assert all(map(same, ("run/a.mp4", "run/b c.avi", "walk/d.mkv")))
    os.utime(source / "run" / "a.mp4", ns=(1, 1))  # another source
    os.truncate(out / "run" / "b c.avi", 1000)
    with open(out / "prepared.jsonl", "a") as file:
        file.write('{"name": "walk/d.m')  # a line cut short
    assert run(source, out) == 0 and "1 of them are prepared already" in capsys.readouterr().out
    assert same("walk/d.mkv") and not same("run/a.mp4")
    assert (out / "run" / "b c.avi").read_bytes() == first[out / "run" / "b c.avi"][0]
    (source / "run" / "a.mp4").write_text("broken now")
    assert run(source, out) == 1
    assert (out / "run" / "a.mp4").read_text() == "broken now"  # nothing of an older source is left
    assert run(source, out, short_side=32) == 1 and "0 of them are prepared" in capsys.readouterr().out
    assert every(out / "walk" / "d.mkv").shape == (60, 3, 32, 48)


def test_an_interrupted_run_leaves_no_half_files(source, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"

    def die(process, *args):
        assert os.path.getsize(process) > 0
        os._exit(9)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", die)  # the moment before a file gets its name
        assert run(source, out) == 1
    assert "crashed the process (exit code 9)" in capsys.readouterr().out
    copies = {path for path in source.rglob("*") if path.is_file()}
    assert all((out / path.relative_to(source)).read_bytes() == path.read_bytes() for path in copies)

    def stop(work, jobs, *args):
        for job in jobs[:2]:
            yield job, work(job)
        jobs[2][1].write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(data, "in_processes", stop)
        with pytest.raises(KeyboardInterrupt):
            run(source, out)
    assert files(out) == {"a.mp4", "b c.avi", "d.mkv", "e.avi", "prepared.jsonl"}
    assert all((out / path.relative_to(source)).read_bytes() != b"half" for path in copies)
    assert run(source, out) == 1 and "2 of them are prepared already" in capsys.readouterr().out


def test_places_that_are_refused(source, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a.txt").touch()
    (tmp_path / "link").symlink_to(source)
    write(tmp_path / "outside.mp4", frames=3)
    for line in ("../outside.mp4 0", f"{source}/run/a.mp4 0"):
        (tmp_path / "list.txt").write_text(line + "\n")
        with pytest.raises(ValueError, match="listed from outside"):
            run(source, tmp_path / "out", splits=tmp_path / "list.txt")
    for out in (source, source / "new", tmp_path, tmp_path / "link"):
        with pytest.raises(ValueError, match="must be another folder"):
            run(source, out)
    with pytest.raises(ValueError, match="holds other files"):
        run(source, tmp_path / "full")
    with pytest.raises(ValueError, match="--short-side 1"):
        run(source, tmp_path / "out", short_side=1)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "prepared.jsonl").touch()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out" / "run").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="leads out of"):
        run(source, tmp_path / "out")
    assert not any((tmp_path / "elsewhere").iterdir())


def test_odd_files(tmp_path):
    """Turned, of odd sizes, deep colours, odd times, with sound: all frames in order, upright, with even sides."""
    animals, done = make_zoo(tmp_path / "zoo"), 0
    for path, animal in animals.items():
        if os.path.isfile(path) and not animal.broken and not isinstance(animal.gives, str):
            rewrite(path, tmp_path / "new.mp4", None)
            old, new, done = every(path), every(tmp_path / "new.mp4"), done + 1
            assert new.shape == (*old.shape[:2], *(max(side // 2 * 2, 2) for side in old.shape[2:])), path.name
            error = (old[..., : new.shape[2], : new.shape[3]].float() - new).square().mean((1, 2, 3))
            assert error.max() < 255**2 / 10**2 or old.shape[2:] != new.shape[2:], path.name  # of every frame
    assert done > 40
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        sound(container)
        for i in range(5):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(numbered(i)[:48, :64].copy(), format="rgb24")))
        container.mux(stream.encode())
    rewrite(tmp_path / "sound.mp4", tmp_path / "new.mp4", 30)
    found = Probe()
    assert len(list(data.played(tmp_path / "new.mp4", found))) == 5 and found.size == (40, 30)


def test_what_is_not_the_same_is_not_delivered(tmp_path, monkeypatch):
    path, one = write(tmp_path / "a.mp4"), tmp_path / "b.mp4"
    with monkeypatch.context() as patch:
        patch.setattr(data, "LEAST", 90)
        with pytest.raises(ValueError, match="a.mp4: not the same when rewritten: 60 of 60 frames, PSNR"):
            rewrite(path, one, None)
    real = data.played

    def loses(file, found):
        for number, frame in enumerate(real(file, found)):
            if file != one or number != 30:
                yield frame
            else:
                found.frames -= 1

    with monkeypatch.context() as patch:
        patch.setattr(data, "played", loses)
        with pytest.raises(ValueError, match="59 of 60 frames"):
            rewrite(path, one, None)
