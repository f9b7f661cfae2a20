"""Data: exact frames from every kind of file, sampling tables, split files, order, augmentation, toy videos."""

import multiprocessing
import operator
import os
import random
import signal
import subprocess
import sys
import time

import av
import numpy as np
import pytest
import torch
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter
from torchvision import tv_tensors
from zoo import changed, number_of, write

import data
from data import (
    MOTIONS,
    MultiScaleCrop,
    Order,
    Split,
    Videos,
    center_clip,
    collate,
    derive_seed,
    make_loader,
    make_toy,
    pretrain_transform,
    read_frames,
    read_split,
    sample_clip,
    toy_video,
)  # fmt: skip

# frames


@pytest.mark.parametrize(
    "name, codec, options",
    [
        ("plain.mp4", "libx264", dict(g=12, bf=0)),
        ("b-frames.mp4", "libx264", dict(g=12, bf=3)),
        ("one-key-frame.mkv", "libx264", dict(g=250, bf=2)),
        ("open-gop.mp4", "libx264", {"x264-params": "open-gop=1:keyint=12:bframes=3"}),
        ("open-gop.mkv", "libx264", {"x264-params": "open-gop=1:keyint=12:bframes=3"}),
        ("hevc.mp4", "libx265", {"x265-params": "keyint=12:bframes=3:log-level=none"}),
        ("xvid-like.avi", "mpeg4", dict(g=12, bf=2)),
        ("mpeg4.mp4", "mpeg4", dict(g=12, bf=2)),
        ("h264.avi", "libx264", dict(g=12, bf=3)),
        ("stream.ts", "libx264", dict(g=12, bf=3)),
        ("intra-refresh.mp4", "libx264", {"x264-params": "intra-refresh=1:keyint=12"}),
        ("vp8.webm", "libvpx", {"auto-alt-ref": 1, "lag-in-frames": 16}),
        ("vp9.webm", "libvpx-vp9", dict(g=12, speed=8)),
        ("jpeg.avi", "mjpeg", dict()),
    ],
)
def test_the_frames_asked_for_are_the_frames_delivered(tmp_path, name, codec, options):
    pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    path = write(tmp_path / name, codec, pix_fmt=pix_fmt, **options)
    totals, rng = [], random.Random(0)
    read_frames(path, lambda total: totals.append(total) or [0])
    assert totals == [60]
    for wanted in (
        [0],
        [59],
        [59, 0, 30, 30],
        [11, 12, 13],
        *([rng.randrange(60) for _ in range(5)] for _ in range(8)),
    ):
        frames = read_frames(path, wanted)
        assert frames.shape == (len(wanted), 3, 64, 96) and frames.dtype == torch.uint8
        assert [number_of(frame) for frame in frames] == wanted


@pytest.mark.parametrize(
    "name, codec, options, most",
    [
        ("long.mp4", "libx264", dict(g=250, bf=3, sc_threshold=0), (32, 60)),
        ("short.mkv", "libx264", dict(g=12, bf=0, sc_threshold=0), (45, 13)),
        ("pyramid.mp4", "libx264", {"x264-params": "keyint=60:bframes=5:b-pyramid=strict:scenecut=0"}, (40, 60)),
        ("slices.mkv", "libx264", {"x264-params": "slices=4:keyint=30:bframes=3:scenecut=0"}, (35, 35)),
        ("xvid.avi", "mpeg4", dict(g=250, bf=2), (35, 60)),
        ("xvid-short.avi", "mpeg4", dict(g=12, bf=1), (38, 20)),
        ("xvid.mkv", "mpeg4", dict(g=30, bf=2), (35, 35)),
        ("hevc.mkv", "libx265", {"x265-params": "keyint=12:bframes=3:open-gop=0:scenecut=0:log-level=none"}, (60, 20)),
        ("vp9.webm", "libvpx-vp9", dict(g=12, speed=8), (60, 25)),
    ],
)  # fmt: skip
def test_frames_that_nobody_needs_are_not_decoded(tmp_path, monkeypatch, name, codec, options, most):
    """Of 60; a clip with a stride, and the first and the last frame. What is delivered is what a full decode gives."""
    path, sent, decode = write(tmp_path / name, codec, **options), [], data._decode

    def spy(stream, packets, shows, clip):
        assert shows is not None  # never counted from the start
        sent.append(len(packets))
        return decode(stream, packets, shows, clip)

    with av.open(str(path)) as container:
        whole = [torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    whole, rng = torch.stack(whole).permute(0, 3, 1, 2), random.Random(0)
    monkeypatch.setattr(data, "_decode", spy)
    for wanted, limit in (([*range(1, 44, 4)], most[0]), ([0, 59], most[1])):
        assert torch.equal(read_frames(path, wanted), whole[wanted]) and sum(sent) <= limit, sent
        sent.clear()
    for _ in range(15):
        wanted = [rng.randrange(60) for _ in range(rng.choice((1, 2, 6)))]
        assert torch.equal(read_frames(path, wanted), whole[wanted])


@pytest.mark.parametrize("front, tail", [(b"", b""), (b"", b"\x7f" * 9), (b"\0\0\1\xb2XviD0046", b"")])
def test_packets_that_show_nothing_do_not_count(tmp_path, front, tail):
    """One that is not coded, of whatever length, ends the first group: the frames of the second move up by one."""

    def change(packets):
        raw = front + data.VOP + b"\x51\xc0\x7f" + tail
        old, new = packets[11], av.Packet(len(raw))
        new.update(raw)
        new.pts, new.dts, new.time_base = old.pts, old.dts, old.time_base
        return [*packets[:11], new, *packets[12:]]

    changed(tmp_path / "a.avi", change=change, codec="mpeg4", g=12, bf=0)
    assert [number_of(frame) for frame in read_frames(tmp_path / "a.avi", [10, 11, 15])] == [10, 12, 16]


def test_a_frame_that_is_not_the_announced_one_is_noticed(tmp_path, monkeypatch):
    path, parts = write(tmp_path / "a.mp4", bf=0, g=250), data._parts
    twice = lambda *args: ((packets[:1] + packets, shows) for packets, shows in parts(*args))
    monkeypatch.setattr(data, "_parts", twice)  # as if a packet showed two frames
    assert [number_of(frame) for frame in read_frames(path, [0, 9, 30])] == [0, 9, 30]


def test_colours_survive(tmp_path):
    with av.open(str(tmp_path / "red.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = 64, 64, "yuv420p"
        for _ in range(3):
            image = np.broadcast_to(np.array([200, 30, 60], np.uint8), (64, 64, 3)).copy()
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    colour = read_frames(tmp_path / "red.mp4", [1])[0].float().mean(dim=(1, 2))
    assert (colour - torch.tensor([200.0, 30, 60])).abs().max() < 6


def test_metadata_in_another_encoding_does_not_matter(tmp_path):
    path = write(tmp_path / "title.avi", "mpeg4", frames=5)
    raw = path.read_bytes()
    at = raw.index(b"Lavf")  # the name of the writing program
    path.write_bytes(raw[:at] + b"L\xe4vf" + raw[at + 4 :])
    assert number_of(read_frames(path, [3])[0]) == 3


def test_frames_a_file_does_not_have_are_refused(tmp_path):
    path = write(tmp_path / "short.mp4", frames=15)
    for wanted in ([15], [-1], []):
        for pick in (wanted, lambda total, wanted=wanted: wanted):
            with pytest.raises(ValueError, match="short.mp4"):
                read_frames(path, pick)


# sampling rules


@pytest.mark.parametrize(
    "total, frames, stride, starts, step",
    [
        (300, 16, 4, 237, 4),  # N >= 16*4: start uniform on 0..N-64, as the official code
        (64, 16, 4, 1, 4),
        (61, 16, 4, 1, 4),  # the clip still fits
        (60, 16, 4, 13, 3),  # stride shrinks to the largest that fits
        (40, 16, 4, 9, 2),
        (16, 16, 4, 1, 1),
    ],
)
def test_sample_clip(total, frames, stride, starts, step):
    torch.manual_seed(0)
    clips = [sample_clip(total, frames, stride) for _ in range(4000)]
    assert all(np.diff(clip).tolist() == [step] * (frames - 1) for clip in clips)
    assert {clip[0] for clip in clips} == set(range(starts))
    assert max(clip[-1] for clip in clips) < total


def test_only_videos_shorter_than_the_clip_repeat_their_last_frame():
    assert sample_clip(15, 16, 4) == [*range(15), 14]
    assert sample_clip(1, 16, 4) == [0] * 16
    assert center_clip(10, 4, 2) == [1, 3, 5, 7] and center_clip(2, 4, 2) == [0, 1, 1, 1]


def test_sampling_is_uniform():
    torch.manual_seed(0)
    counts = np.bincount([sample_clip(24, 8, 2)[0] for _ in range(9000)])
    assert len(counts) == 9 and abs(counts - 1000).max() < 130


# lists and splits


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def ucf101(folder):
    names = [f"{c}/v_{c}_g{g:02}_c01.avi" for c in ("Archery", "Bowling") for g in range(1, 5)]
    touch(folder, *names)
    lists = folder / "ucfTrainTestlist"
    lists.mkdir()
    (lists / "classInd.txt").write_text("1 Archery\n2 Bowling\n")
    train = [name for name in names if "_g01" not in name]
    (lists / "trainlist01.txt").write_text("".join(f"{n} {1 + n.startswith('B')}\r\n" for n in train))
    (lists / "testlist01.txt").write_text("\n".join(n for n in names if "_g01" in n))
    return lists


def test_ucf101_layout(tmp_path):
    lists = ucf101(tmp_path)
    train, test = read_split(tmp_path, lists), read_split(tmp_path, lists, train=False)
    assert train.classes == ["Archery", "Bowling"] and train.labels == [0, 0, 0, 1, 1, 1]
    assert [path.name for path in test.paths] == ["v_Archery_g01_c01.avi", "v_Bowling_g01_c01.avi"]
    assert test.labels == [0, 1] and read_split(tmp_path) == train  # found by its official name


def test_ucf101_mistakes(tmp_path):
    lists = ucf101(tmp_path)
    with pytest.raises(ValueError, match="trainlist02"):
        read_split(tmp_path, lists, fold=2)
    (tmp_path / "Bowling" / "v_Bowling_g01_c01.avi").unlink()
    with pytest.raises(ValueError, match="1 of 2 .*v_Bowling_g01_c01.avi"):
        read_split(tmp_path, lists, train=False)
    with open(lists / "testlist01.txt", "a") as file:
        file.write("\nArchery/v_Archery_g02_c07.avi\n")
    with pytest.raises(ValueError, match="Archery_g02 is in both"):
        read_split(tmp_path, lists)


def test_official_counts_are_checked(tmp_path):
    lists = ucf101(tmp_path)
    (lists / "classInd.txt").write_text(
        "".join(f"{i + 1} {c}\n" for i, c in enumerate(["Archery", "Bowling", *map(str, range(99))]))
    )
    with pytest.raises(ValueError, match="9537 training and 3783 test videos, these lists have 6 and 2"):
        read_split(tmp_path, lists)
    assert all(sum(counts) == 13320 for counts in data.UCF101_COUNTS.values())


def test_hmdb51_layout(tmp_path):
    touch(tmp_path, *(f"{c}/{c}_{i}.avi" for c in ("wave", "clap") for i in range(3)))
    lists = tmp_path / "testTrainMulti_7030_splits"
    lists.mkdir()
    for c in ("wave", "clap"):
        (lists / f"{c}_test_split1.txt").write_text("".join(f"{c}_{i}.avi {i} \n" for i in range(3)))
    train, test = read_split(tmp_path, lists), read_split(tmp_path, train=False)
    assert train.classes == ["clap", "wave"] and train.labels == [0, 1] == test.labels
    assert [p.name for p in train.paths] == ["clap_1.avi", "wave_1.avi"]
    assert [p.name for p in test.paths] == ["clap_2.avi", "wave_2.avi"]
    (lists / "clap_test_split1.txt").write_text("clap_0.avi 3\n")
    with pytest.raises(ValueError, match="clap_0.avi 3"):
        read_split(tmp_path, lists)


def test_lists(tmp_path):
    touch(tmp_path, "a b.mp4", "c.mp4", "d 7.mp4", "e.mp4")
    lines = tmp_path / "list.txt"
    lines.write_text("a b.mp4 3\nc.mp4  1\n\nd 7.mp4\t0\ne.mp4\n")
    split = read_split(tmp_path, lines)
    assert [path.name for path in split.paths] == ["a b.mp4", "c.mp4", "d 7.mp4", "e.mp4"]
    assert split.labels == [3, 1, 0, -1] and len(split.classes) == 4


def test_folders(tmp_path):
    touch(tmp_path, "run/b.mp4", "run/a.AVI", "walk/c.mkv", "walk/readme.txt")
    split = read_split(tmp_path)
    assert [p.name for p in split.paths] == ["a.AVI", "b.mp4", "c.mkv"]
    assert split.labels == [0, 0, 1] and split.classes == ["run", "walk"]


def test_places_without_videos(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    for args, words in (
        ((tmp_path / "nowhere",), "no folder .*nowhere"),
        ((tmp_path / "empty",), "no videos"),
        ((tmp_path, tmp_path / "nosplits"), "no file or folder .*nosplits"),
        ((tmp_path, tmp_path / "empty"), "neither classInd.txt"),
        ((tmp_path, tmp_path / "binary.txt"), "not a text file"),
    ):
        with pytest.raises(ValueError, match=words):
            read_split(*args)


# order, data set, loader


@pytest.mark.parametrize("processes, micro", [(1, 8), (1, 2), (2, 2), (4, 2)])
def test_order_is_the_same_at_any_number_of_processes(processes, micro):
    whole = [key for batch in Order(21, 8, 8, 0, 5, seed=3, rank=0, size=1) for key in batch]
    parts = [list(Order(21, 8, micro, 0, 5, 3, rank, processes)) for rank in range(processes)]
    share = 8 // processes
    for step in range(5):
        got = [key for part in parts for batch in part[step * share // micro :][: share // micro] for key in batch]
        assert got == whole[step * 8 : step * 8 + 8]


def test_order_visits_each_video_once_an_epoch_and_resumes():
    whole = list(Order(20, 5, 5, 0, 12, 0, 0, 1))
    for epoch in range(3):
        assert sorted(index for batch in whole[4 * epoch : 4 * epoch + 4] for index, _ in batch) == list(range(20))
    assert list(Order(20, 5, 5, 6, 12, 0, 0, 1)) == whole[6:]
    assert len({seed for batch in whole for _, seed in batch}) == 60
    assert list(Order(20, 5, 5, 0, 12, 1, 0, 1)) != whole
    with pytest.raises(ValueError, match="--batch 3"):
        Order(3, 5, 5, 0, 1, 0, 0, 1)


def test_order_starts_at_any_micro_batch():
    order = Order(21, 8, 2, 1, 5, seed=3, rank=1, size=2)
    whole = list(order)
    assert len(whole) == 8 and all(list(order.later(n)) == whole[n:] for n in range(9))
    assert list(order.later(3).later(2)) == whole[5:]


def test_derived_seeds_differ():
    assert derive_seed(1, 2, 3) == derive_seed(1, 2, 3)
    assert len({derive_seed(k, s, i) for k in (1, 2, 3) for s in range(10) for i in range(10)}) == 300


def numbered_videos(folder, count=4, frames=40):
    paths = [write(folder / f"{i}.mp4", frames=frames, size=(64, 96)) for i in range(count)]
    return Split(paths, list(range(count)), [str(i) for i in range(count)])


def test_items_depend_on_their_seed_alone(tmp_path):
    videos = Videos(
        numbered_videos(tmp_path), lambda n: sample_clip(n, 8, 2), pretrain_transform(32, flip=True), repeats=2
    )
    before = torch.random.get_rng_state()
    clips, label, bad = videos[2, 7]
    assert clips.shape == (2, 8, 3, 32, 32) and clips.dtype == torch.uint8 and label == 2 and bad == {}
    assert not torch.equal(clips[0], clips[1])
    assert torch.equal(clips, videos[2, 7][0]) and not torch.equal(clips, videos[2, 8][0])
    assert torch.equal(torch.random.get_rng_state(), before)


def test_workers_deliver_what_the_main_process_would(tmp_path):
    videos = Videos(numbered_videos(tmp_path), lambda n: sample_clip(n, 8, 2), pretrain_transform(32, flip=False))
    batches = [list(make_loader(videos, Order(4, 2, 2, 0, 4, 0, 0, 1), workers, pin=False)) for workers in (0, 2)]
    assert len(batches[0]) == 4 and batches[0][0][0].shape == (2, 8, 3, 32, 32)
    for (a, labels_a, _), (b, labels_b, _) in zip(*batches, strict=True):
        assert torch.equal(a, b) and torch.equal(labels_a, labels_b)


class Numbers(torch.utils.data.Dataset):
    """Items that are their key; `fatal` ends the worker that makes it, once if `once` is a file to note that in."""

    def __init__(self, fatal=None, once=None, seconds=0):
        self.fatal, self.once, self.seconds = fatal, once, seconds

    def __getitem__(self, key):
        time.sleep(self.seconds)
        if key[0] == self.fatal and not (self.once and self.once.exists()):
            if self.once:
                self.once.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.full((1, 1, 3, 4, 4), key[0]), key[1] % 1000, {}


@pytest.fixture
def impatient(monkeypatch):
    """PyTorch looks every 5 seconds whether a worker has died; not that long here."""
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.2,))


def same(batches, others) -> bool:
    return len(batches) == len(others) and all(
        torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(batches, others, strict=True)
    )


@pytest.mark.parametrize("plain", [False, True])
def test_a_killed_worker_changes_nothing(impatient, tmp_path, capfd, plain):
    order = Order(20, 4, 2, 1, 8, 0, 0, 1)  # steps of two micro-batches
    order = list(order) if plain else order
    want = list(make_loader(Numbers(), order, 0, pin=False))
    before, got = torch.random.get_rng_state(), []
    for batch in make_loader(Numbers(13, tmp_path / "dead", seconds=0.005), order, 2, pin=False):
        got.append(batch)
        if len(got) == 3:
            multiprocessing.active_children()[1].kill()
    assert same(got, want) and torch.equal(torch.random.get_rng_state(), before)
    assert capfd.readouterr().err.count("a loader worker died (exit code -9)") == 2


def test_workers_that_always_die_end_the_run_in_one_line(impatient):
    batches, got = make_loader(Numbers(fatal=3, seconds=0.01), [[(i, 0)] for i in range(9)], 1, pin=False), []
    with pytest.raises(ValueError, match="three times.*exit code -9.*fewer --workers.*data.py check"):
        got.extend(batches)
    assert not multiprocessing.active_children()


def test_single_items_are_delivered_alike(impatient, tmp_path):
    items = make_loader(Numbers(3, tmp_path / "dead"), [[(i, i)] for i in range(6)], 1, False, operator.itemgetter(0))
    assert [label for _, label, _ in items] == list(range(6))


def test_errors_in_a_worker_are_not_mistaken_for_its_death():
    with pytest.raises(TypeError, match="not subscriptable"):
        list(make_loader(Numbers(), [[None]], 1, pin=False))


def test_signals_that_stop_a_run_leave_workers_alone(capfd):
    batches = make_loader(Numbers(seconds=0.01), [[(i, 0)] for i in range(20)], 2, pin=False)
    got = [next(batches), next(batches)]
    workers = multiprocessing.active_children()
    for process in workers:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(process.pid, number)
    got += [next(batches) for _ in range(10)]
    assert signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL and multiprocessing.active_children() == workers
    assert same(got + list(batches), list(make_loader(Numbers(), [[(i, 0)] for i in range(20)], 0, pin=False)))
    assert not multiprocessing.active_children() and not capfd.readouterr().err


@pytest.mark.parametrize("seconds", [0, 3])
def test_workers_end_with_the_generator_even_those_that_are_stuck(seconds, monkeypatch):
    batches = make_loader(Numbers(), [[(i, 0)] for i in range(50)], 2, pin=False)
    next(batches)
    if seconds:  # as a decoder that does not return would be
        for process in multiprocessing.active_children():
            os.kill(process.pid, signal.SIGSTOP)
    assert len(multiprocessing.active_children()) == 2
    begin = time.monotonic()
    batches.close()
    assert not multiprocessing.active_children() and time.monotonic() - begin < seconds + 20


def hold_workers(pipe):
    batches = make_loader(Numbers(), [[(i, 0)] for i in range(50)], 2, pin=False)
    next(batches)
    pipe.send(len(multiprocessing.active_children()))
    time.sleep(100)


def test_workers_end_with_a_main_process_that_is_killed():
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=hold_workers, args=(there,))
    process.start()
    there.close()
    assert here.recv() == 2
    process.kill()
    assert here.poll(4), "the workers still hold their end of the pipe"
    with pytest.raises(EOFError):
        here.recv()


def test_workers_end_with_the_main_process():
    """Although they ignore SIGTERM, which is what multiprocessing sends them at exit before it waits for them."""
    code = (
        "import data, test_data as t\nb = data.make_loader(t.Numbers(), [[(i, 0)] for i in range(9)], 2, pin=False)\n"
    )
    code += "next(b)\nraise KeyError('the traceback keeps b alive')"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([os.path.dirname(data.__file__), os.path.dirname(__file__)])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=60)
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == "KeyError: 'the traceback keeps b alive'"


def test_collate_keeps_a_videos_clips_together():
    items = [(torch.full((2, 1, 3, 4, 4), i), i, {f"bad{i}": "why"}) for i in range(3)]
    clips, labels, bad = collate(items)
    assert clips[:, 0, 0, 0, 0].tolist() == labels.tolist() == [0, 0, 1, 1, 2, 2] and list(bad) == [
        "bad0",
        "bad1",
        "bad2",
    ]


def test_unreadable_training_videos_are_reported_and_left_out(tmp_path):
    split = numbered_videos(tmp_path)
    split.paths[1] = tmp_path / "broken.mp4"
    split.paths[1].write_text("no video")
    videos = Videos(split, lambda n: sample_clip(n, 8, 2), pretrain_transform(32, False))
    clips, label, bad = videos[1, 0]
    assert label != 1 and list(bad) == [str(split.paths[1])] and "broken.mp4: Invalid data" in bad[str(split.paths[1])]
    assert torch.equal(clips, videos[1, 0][0])
    split.paths[:] = [split.paths[1]] * 4
    assert collate([videos[0, 0]])[0] is None  # the training loop stops at this


# augmentation


def test_multi_scale_crop_draws_the_published_boxes():
    crop, image = MultiScaleCrop(224), torch.zeros(3, 240, 320)
    torch.manual_seed(0)
    boxes = [crop.make_params([image]) for _ in range(4000)]
    sides = {240, 210, 180, 158}
    assert {box["width"] for box in boxes} == {box["height"] for box in boxes} == sides
    assert len({(box["width"], box["height"]) for box in boxes}) == 10  # at most one scale apart
    full = [(b["left"], b["top"]) for b in boxes if (b["width"], b["height"]) == (210, 210)]
    dx, dy = (320 - 210) // 4, (240 - 210) // 4
    expected = {(x * dx, y * dy) for x, y in MultiScaleCrop.PLACES}
    assert set(full) == expected and len(expected) == 13
    # sizes within 2 pixels of the target snap to it
    widths = lambda size, image: {MultiScaleCrop(size).make_params([image])["width"] for _ in range(200)}
    assert widths(210, torch.zeros(3, 238, 300)) == {238, 210, 178, 157}
    assert widths(211, torch.zeros(3, 238, 300)) == {238, 208, 178, 157}


def test_a_clip_gets_one_crop_and_one_flip():
    still = torch.randint(0, 256, (1, 3, 48, 64), dtype=torch.uint8).expand(8, 3, 48, 64)
    for _ in range(10):
        clip = pretrain_transform(32, flip=True)(tv_tensors.Video(still))
        assert clip.shape == (8, 3, 32, 32) and (clip == clip[:1]).all()


# toy videos


def test_toy_data_set_has_ucf101s_layout(tmp_path):
    make_toy(tmp_path / "toy", train=24, test=12)
    train, test = read_split(tmp_path / "toy"), read_split(tmp_path / "toy", train=False)
    assert train.classes == list(MOTIONS) and sorted(train.labels) == sorted(list(range(12)) * 2)
    assert sorted(test.labels) == list(range(12)) and not set(train.paths) & set(test.paths)
    frames = read_frames(train.paths[0], lambda total: list(range(total)))
    assert 36 <= len(frames) <= 48 and frames.shape[2:] == (54, 54)
    make_toy(tmp_path / "toy")  # is there: nothing happens
    make_toy(tmp_path / "still", train=24, test=12, still=True)
    other = tmp_path / "still" / train.paths[0].relative_to(tmp_path / "toy")
    assert other.read_bytes() != train.paths[0].read_bytes()
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match="other exists"):
        make_toy(tmp_path / "other")


def test_toy_videos_are_reproducible_and_moving():
    for motion in MOTIONS:
        video = toy_video(motion, np.random.default_rng(5))
        assert (video == toy_video(motion, np.random.default_rng(5))).all()
        calm = video.astype(float).reshape(len(video), 9, 6, 9, 6, 3).mean(axis=(2, 4))  # most of the noise is gone
        assert abs(calm[12] - calm[0]).max() > 20  # something moves
        assert calm.std(axis=(1, 2)).mean() > 10  # no flat pictures


def test_still_toy_videos_move_in_a_disc_alone():
    for motion in MOTIONS:
        video = toy_video(motion, np.random.default_rng(5), still=True)
        assert video.shape == toy_video(motion, np.random.default_rng(5)).shape
        change = abs(video[6:].astype(float) - video[:-6]).mean(axis=(0, 3)).reshape(9, 6, 9, 6).mean(axis=(1, 3))
        noise = 255 * 0.05 * 2 / np.pi**0.5  # of the difference of two noises
        assert 0.5 < (change < 1.2 * noise).mean() < 0.9 and change.max() > 2 * noise  # most places stand still


def test_waves_of_toy_videos_lie_across_their_axis():
    for seed in range(10):
        for motion, axis in (("Slide0", 2), ("Slide90", 1)):  # changes along columns, along rows
            still = toy_video(motion, np.random.default_rng(seed))[:6].astype(float).mean(axis=0, keepdims=True)
            change = {k: abs(np.diff(still, n=1, axis=k)).mean() for k in (1, 2)}
            assert change[axis] > change[3 - axis]
