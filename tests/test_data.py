"""Sampling rules, lists, augmentation, data sets and their loader."""

import multiprocessing
import operator
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from films import decoded, write
from PIL import Image
from torch.utils.data import Dataset
from torchvision import tv_tensors

import data
from data import (
    MultiScaleCrop,
    Videos,
    center_clip,
    collate,
    dense_views,
    finetune_transform,
    make_loader,
    pretrain_transform,
    sample_clip,
    spatial_views,
    uniform_clip,
    uniform_views,
)
from lib import lists
from lib.engine import Order
from lib.evaluate import WindowViews
from lib.lists import Split, read_split

# sampling rules


@pytest.mark.parametrize(
    "total, starts, step",
    [
        (300, 237, 4),  # N >= 16*4: start uniform on 0..N-64, as the official code
        (64, 1, 4),
        (61, 1, 4),  # the clip still fits
        (60, 13, 3),  # the stride shrinks to the largest that fits
        (40, 9, 2),
        (16, 1, 1),
    ],
)
def test_training_clips_start_anywhere_and_fit(total, starts, step):
    torch.manual_seed(0)
    clips = [sample_clip(total, 16, 4) for _ in range(3000)]
    assert all(np.diff(clip).tolist() == [step] * 15 for clip in clips)
    assert {clip[0] for clip in clips} == set(range(starts))
    assert max(clip[-1] for clip in clips) < total


def test_training_clips_are_uniform():
    torch.manual_seed(0)
    counts = np.bincount([sample_clip(24, 8, 2)[0] for _ in range(9000)])
    assert len(counts) == 9 and abs(counts - 1000).max() < 130
    clips = np.array([uniform_clip(40, 16) for _ in range(3000)])
    assert (clips // 2 == np.arange(16)).all() and abs(clips.mean(0) % 2 - 0.5).max() < 0.05
    assert uniform_clip(8, 16) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7]


def test_only_videos_shorter_than_the_clip_repeat_their_last_frame():
    assert sample_clip(15, 16, 4) == [*range(15), 14] and sample_clip(1, 16, 4) == [0] * 16
    assert center_clip(10, 4, 2) == [1, 3, 5, 7] and center_clip(2, 4, 2) == [0, 1, 1, 1]


def test_clips_of_stride_0_are_one_frame():
    torch.manual_seed(0)
    clips = [sample_clip(9, 4, 0) for _ in range(900)]
    assert all(len(clip) == 4 and len({*clip}) == 1 for clip in clips)
    counts = np.bincount([clip[0] for clip in clips])
    assert len(counts) == 9 and abs(counts - 100).max() < 45
    assert center_clip(9, 4, 0) == [4] * 4 and dense_views(9, 2, 0, 3) == [[1, 1], [4, 4], [7, 7]]
    assert dense_views(1, 2, 0, 3) == [[0, 0]] * 3 and sample_clip(1, 2, 0) == [0, 0]


def test_test_views_are_the_official_ones():
    assert [view[0] for view in dense_views(300, 16, 4, 5)] == [0, 56, 116, 176, 236]
    assert all(np.diff(view).tolist() == [4] * 15 for view in dense_views(300, 16, 4, 5))
    assert dense_views(300, 16, 4, 1) == [list(range(0, 64, 4))]
    assert dense_views(10, 16, 4, 2) == [[*range(10), *[9] * 6]] * 2
    for total in range(1, 200):
        want = [[int(total / 16 * x + k * total / 32) for x in range(16)] for k in (0, 1)]
        assert uniform_views(total, 16, 0, 2) == want
        for views in (dense_views(total, 16, 4, 5), want):
            assert max(map(max, views)) < total and min(map(min, views)) >= 0


# lists and splits


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def names(split):
    return [path.name for path in split.paths]


@pytest.fixture
def ucf(tmp_path):
    """Two classes of four groups, the first of them for test; the lists' folder beside them."""
    videos = [f"{c}/v_{c}_g{g:02}_c01.avi" for c in ("Archery", "Bowling") for g in range(1, 5)]
    touch(tmp_path, *videos)
    folder = tmp_path / "ucfTrainTestlist"
    folder.mkdir()
    (folder / "classInd.txt").write_text("1 Archery\n2 Bowling\n")
    train = [f"{name} {1 + name.startswith('B')}\r\n" for name in videos if "_g01" not in name]
    (folder / "trainlist01.txt").write_text("".join(train))
    (folder / "testlist01.txt").write_text("\n".join(n for n in videos if "_g01" in n))
    touch(folder, "._trainlist01.txt", "._classInd.txt")
    return tmp_path, folder


def test_ucf101(ucf):
    data, folder = ucf
    train, test = read_split(data, folder), read_split(data, folder, train=False)
    assert train.classes == ["Archery", "Bowling"] and train.labels == [0, 0, 0, 1, 1, 1]
    assert names(test) == ["v_Archery_g01_c01.avi", "v_Bowling_g01_c01.avi"]
    assert test.labels == [0, 1] and read_split(data) == train  # found by its official name
    with pytest.raises(ValueError, match="trainlist02"):
        read_split(data, folder, fold=2)
    with pytest.raises(ValueError, match="no file .*trainlist04"):
        read_split(data, folder, fold=4)
    (data / "Bowling" / "v_Bowling_g01_c01.avi").unlink()
    with pytest.raises(ValueError, match="1 of 2 .*v_Bowling_g01_c01.avi"):
        read_split(data, folder, train=False)
    with open(folder / "testlist01.txt", "a") as file:
        file.write("\nArchery/v_Archery_g02_c07.avi\n")
    with pytest.raises(ValueError, match="Archery_g02 is in both"):
        read_split(data, folder)


def test_official_counts_are_checked(ucf):
    data, folder = ucf
    classes = ["Archery", "Bowling", *map(str, range(99))]
    lines = [f"{i + 1} {name}\n" for i, name in enumerate(classes)]
    (folder / "classInd.txt").write_text("".join(lines))
    with pytest.raises(ValueError, match="9537 training and 3783 test videos, .* have 6 and 2"):
        read_split(data, folder)
    totals = {name: sum(counts) for (name, *_), counts in lists.COUNTS.items()}
    assert len(lists.COUNTS) == 6 and totals == {"ucf101": 13320, "hmdb51": 5100}


def test_hmdb51(tmp_path):
    touch(tmp_path, *(f"{c}/{c}_{i}.avi" for c in ("wave", "clap") for i in range(3)))
    folder = tmp_path / "testTrainMulti_7030_splits"
    touch(folder, "._wave_test_split1.txt")
    for c in ("wave", "clap"):
        text = "".join(f"{c}_{i}.avi {i} \n" for i in range(3))
        (folder / f"{c}_test_split1.txt").write_text(text)
    train, test = read_split(tmp_path, folder), read_split(tmp_path, train=False)
    assert train.classes == ["clap", "wave"] and train.labels == [0, 1] == test.labels
    assert names(train) == ["clap_1.avi", "wave_1.avi"]
    assert names(test) == ["clap_2.avi", "wave_2.avi"]
    (folder / "clap_test_split1.txt").write_text("clap_1.avi 1\nclap_1.avi 2\n")
    with pytest.raises(ValueError, match="clap_1.avi is in both"):
        read_split(tmp_path, folder)
    (folder / "clap_test_split1.txt").write_text("clap_0.avi 3\n")
    with pytest.raises(ValueError, match="clap_0.avi 3"):
        read_split(tmp_path, folder)


def test_folders(tmp_path):
    touch(tmp_path, "run/b.mp4", "run/a.AVI", "walk/c.mkv", "walk/readme.txt")
    # What macOS and Windows leave beside videos is no video.
    touch(tmp_path, "run/._b.mp4", "__MACOSX/run/b.mp4", ".cache/d.mp4", "run/Thumbs.db")
    (tmp_path / "run" / "round").symlink_to(tmp_path)
    (tmp_path / "loop.avi").symlink_to("loop.avi")
    split = read_split(tmp_path)
    assert names(split) == ["a.AVI", "b.mp4", "c.mkv"]
    assert split.labels == [0, 0, 1] and split.classes == ["run", "walk"]
    (tmp_path / "list.txt").write_text("loop.avi\n")
    with pytest.raises(ValueError, match="1 of 1 listed videos are missing, the first is .*loop"):
        read_split(tmp_path, tmp_path / "list.txt")


def test_folders_that_cannot_be_listed_are_not_left_out(tmp_path, monkeypatch):
    touch(tmp_path, "open/a.avi", "shut/b.avi")
    scan = os.scandir  # as it is for all but root; root may read everything

    def refuse(folder):
        if os.path.basename(folder) == "shut":
            raise PermissionError(13, "Permission denied", folder)
        return scan(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ValueError, match="shut: Permission denied"):
        read_split(tmp_path)


def test_places_without_videos(tmp_path):
    (tmp_path / "empty").mkdir()
    for args, words in (
        ((tmp_path / "nowhere",), "no folder .*nowhere"),
        ((tmp_path / "empty",), "no videos"),
        ((tmp_path, tmp_path / "nosplits"), "no file or folder .*nosplits"),
        ((tmp_path, tmp_path / "empty"), "neither classInd.txt"),
    ):
        with pytest.raises(ValueError, match=words):
            read_split(*args)


CAFE, ODD = os.fsdecode(b"caf\xe9.avi"), "u\u2028v\x85.avi"


@pytest.fixture
def listed(tmp_path):
    """Write a list of bytes for a folder of videos, and read it: (names, labels)."""
    touch(tmp_path, "a.avi", "b c.avi", "d 7.avi", "é.avi", CAFE, ODD)

    def listed(raw: bytes):
        (tmp_path / "list.txt").write_bytes(raw)
        split = read_split(tmp_path, tmp_path / "list.txt")
        return [os.path.relpath(path, tmp_path) for path in split.paths], split.labels

    return listed


def test_lists_of_every_spelling(listed, tmp_path):
    raw = b"a.avi 1\r\n\r\nb c.avi\t0\r\nd 7.avi"
    assert listed(raw) == (["a.avi", "b c.avi", "d 7.avi"], [1, 0, -1])
    raw = b"\xef\xbb\xbfa.avi 1\n  b c.avi   0  \n"
    assert listed(raw) == (["a.avi", "b c.avi"], [1, 0])
    assert listed(f"é.avi 0\n{ODD} -1".encode()) == (["é.avi", ODD], [0, -1])
    assert listed(b"caf\xe9.avi 3") == ([CAFE], [3])  # not UTF-8
    assert listed(f"{tmp_path}/a.avi 0".encode())[0] == ["a.avi"]
    assert listed(b"./../%b/a.avi" % tmp_path.name.encode())[1] == [-1]


@pytest.mark.parametrize(
    "raw, words",
    [
        (b"a.avi 1\nb c.avi 2\na.avi 1\n", "list.txt lists a video twice, as .*/a.avi"),
        (b"a.avi 1\na.avi 0\n", "list.txt lists a video twice, as .*/a.avi"),
        (b"a.avi 1\nx/.././a.avi 1\n", "list.txt lists a video twice, as .*/a.avi"),
        (b"a.avi -2\n", "line 1: label -2 must be from 0"),
        (b"a.avi 123456789\n", "line 1: label 123456789 must be from 0"),
        (b"a.avi 12345678901234567890\n", "must be from 0"),
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
def test_lists_that_are_wrong(listed, raw, words):
    with pytest.raises(ValueError, match=words) as caught:
        listed(raw)
    assert "\n" not in str(caught.value)


# augmentation


def test_multi_scale_crop_draws_the_published_boxes():
    crop, image = MultiScaleCrop(224), torch.zeros(3, 240, 320)
    torch.manual_seed(0)
    boxes = [crop.make_params([image]) for _ in range(4000)]
    sides = {240, 210, 180, 158}
    assert {box["width"] for box in boxes} == {box["height"] for box in boxes} == sides
    # Width and height are at most one scale apart.
    assert len({(box["width"], box["height"]) for box in boxes}) == 10
    full = [(b["left"], b["top"]) for b in boxes if (b["width"], b["height"]) == (210, 210)]
    dx, dy = (320 - 210) // 4, (240 - 210) // 4
    expected = {(x * dx, y * dy) for x, y in MultiScaleCrop.PLACES}
    assert set(full) == expected and len(expected) == 13

    def widths(size):
        crop, image = MultiScaleCrop(size), torch.zeros(3, 238, 300)
        return {crop.make_params([image])["width"] for _ in range(200)}

    # Sides within 2 pixels of the target become the target.
    assert widths(210) == {238, 210, 178, 157} and widths(211) == {238, 208, 178, 157}
    assert max(widths(239)) == 238  # no black edge where the frame is smaller


@pytest.mark.parametrize("stage", ["pretrain", "torchvision", "official"])
def test_all_frames_of_a_clip_are_augmented_alike(stage):
    still = torch.randint(0, 256, (1, 3, 48, 64), dtype=torch.uint8).expand(8, 3, 48, 64)
    transform = pretrain_transform(32, flip=True)
    if stage != "pretrain":
        transform = finetune_transform(32, True, 2, 9, 0.08, 0, official=stage == "official")
    torch.manual_seed(0)
    clips = [transform(tv_tensors.Video(still)) for _ in range(10)]
    assert all(clip.shape == (8, 3, 32, 32) and clip.dtype == torch.uint8 for clip in clips)
    assert all((clip == clip[:1]).all() for clip in clips)
    assert not torch.equal(clips[0], clips[1])


OFFICIAL = """AutoContrast Equalize Invert Rotate Posterize Solarize SolarizeAdd Color Contrast
Brightness Sharpness ShearX ShearY TranslateX TranslateY""".split()


def test_official_operations_and_their_magnitudes():
    one, drawn = data.OfficialRandAugment(7), []
    video = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(2, 3, 1, 1)
    video = tv_tensors.Video(video)
    assert {*one._AUGMENTATION_SPACE} == {*OFFICIAL}

    def apply(name, magnitude):
        magnitudes = one._AUGMENTATION_SPACE[name][0](1001, 16, 16)[round(100 * magnitude)]
        how = dict(interpolation=one.interpolation, fill=one._fill)
        return one._apply_image_or_video_transform(video, name, float(magnitudes), **how)

    for magnitude, bits in ((2.4, 4), (7, 2), (7.4, 2), (7.6, 1)):
        assert len(apply("Posterize", magnitude).unique()) == 2**bits
    expected = [x + 77 if x < 128 else x for x in range(256)]
    assert apply("SolarizeAdd", 7)[1, 2].flatten().tolist() == expected
    picture = Image.fromarray(video[0].permute(1, 2, 0).numpy())
    turned = picture.rotate(21, Image.Resampling.BICUBIC, fillcolor=(128,) * 3)
    assert np.array_equal(apply("Rotate", 7)[1].permute(1, 2, 0), turned)

    torch.manual_seed(0)
    for _ in range(500):
        one(video)
        drawn.append(one.magnitude / 100)
    assert np.mean(drawn) == pytest.approx(7, abs=0.1) and np.std(drawn) == pytest.approx(0.5, 0.1)
    one.mean = 9.9
    assert all(one(video) is not None and one.magnitude <= 1000 for _ in range(50))


@pytest.mark.parametrize("official", [False, True])
def test_the_official_code_shrinks_without_antialiasing(official):
    """Crops of fine-tuning and test views: bilinear, from the four pixels around each place."""
    video = torch.randint(0, 256, (1, 3, 96, 96), dtype=torch.uint8)
    plain = F.interpolate(video.float(), 24, mode="bilinear")
    whole = finetune_transform(24, False, 0, 7, smallest=1, erase=0, official=official)
    for found in (
        whole(tv_tensors.Video(video)), spatial_views(video, 24, 1, antialias=not official)[0]
    ):  # fmt: skip
        most = (found.as_subclass(torch.Tensor) - plain).abs().max()
        assert most <= 1 if official else most > 30


def test_erasing_puts_noise_of_its_own_into_one_box_of_every_frame():
    torch.manual_seed(0)
    video = tv_tensors.Video(torch.zeros(8, 3, 64, 64, dtype=torch.uint8))
    erased = data.Erase(1)(video)
    box = (erased > 0).any(1)  # (T, H, W): noise is seldom 0 in all colours
    rows, columns = box.any(0).any(1), box.any(0).any(0)
    area = int(rows.sum() * columns.sum())
    assert 0.02 * 64**2 * 0.8 <= area <= 64**2 / 3 * 1.1 and box.float().mean() > 0.9 * area / 64**2
    assert not torch.equal(erased[0], erased[1]) and (video == 0).all()
    colours = erased[:, :, rows][..., columns].float().mean(dim=(0, 2, 3)) / 255
    assert torch.allclose(colours, torch.tensor([0.485, 0.456, 0.406]), atol=0.03)  # ImageNet's


def test_views_for_evaluation():
    video = torch.arange(40).expand(2, 3, 24, 40).to(torch.uint8)
    views = spatial_views(video, 24, 3)
    assert views.shape == (3, 2, 3, 24, 24)
    assert [int(view[0, 0, 0, 0]) for view in views] == [0, 8, 16]
    assert torch.equal(spatial_views(video, 24, 1)[0], views[1])


# data sets and loader


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    """Four videos of numbered frames."""
    folder = tmp_path_factory.mktemp("videos")
    paths = [write(folder / f"{i}.mp4", frames=40 + i) for i in range(4)]
    return Split(paths, [0, 1, 2, 3], list("abcd"))


def sample(total):
    return sample_clip(total, 8, 2)


def test_items_depend_on_their_seed_alone(split):
    videos = Videos(split, sample, pretrain_transform(32, flip=True), repeats=2)
    before = torch.random.get_rng_state()
    clips, label, bad = videos[2, 7]
    assert clips.shape == (2, 8, 3, 32, 32) and clips.dtype == torch.uint8
    assert label == 2 and bad == {} and not torch.equal(clips[0], clips[1])
    assert torch.equal(clips, videos[2, 7][0]) and not torch.equal(clips, videos[2, 8][0])
    assert torch.equal(torch.random.get_rng_state(), before)


def test_clips_of_one_decode_are_at_one_time_or_at_several(split):
    same = [Videos(split, sample, None, 2, same_time=same).pick(40) for same in (True, False)]
    assert same[0][:8] == same[0][8:] and len(same[1]) == 16
    starts = {tuple(Videos(split, sample, None, 2).pick(40)[::8]) for _ in range(20)}
    assert any(a != b for a, b in starts)


def test_unreadable_training_videos_are_reported_and_left_out(split, tmp_path):
    broken = tmp_path / "broken.mp4"
    broken.write_text("no video")
    paths = [split.paths[0], broken, *split.paths[2:]]
    broken_split = Split(paths, split.labels, split.classes)
    videos = Videos(broken_split, sample, pretrain_transform(32, False))
    clips, label, bad = videos[1, 0]
    assert label != 1 and bad == {1: f"{broken}: Invalid data found when processing input"}
    assert torch.equal(clips, videos[1, 0][0])
    videos.split.paths[:] = [broken] * 4
    with pytest.raises(ValueError, match="10 videos in a row cannot be read: .*broken.mp4"):
        videos[0, 0]


def test_evaluation_reads_all_views_and_leaves_nothing_out(split, tmp_path):
    how = dict(frames=4, stride=8, clips=2, resolution=32, crops=3)
    cfg = SimpleNamespace(**how, sampling="dense", augment="torchvision")
    views = WindowViews([*split.paths, tmp_path / "no.mp4"], cfg)
    found = views[1]
    frames = decoded(split.paths[1])
    want = [spatial_views(frames[clip], 32, 3) for clip in dense_views(41, 4, 8, 2)]
    assert found.shape == (6, 4, 3, 32, 32) and torch.equal(found, torch.cat(want))
    assert views[4] == f"{tmp_path}/no.mp4: No such file or directory"


class Broken(Dataset):
    """Items that raise what a broken file does."""

    def __getitem__(self, index):
        raise ValueError("no.mp4: no video")


def test_an_error_in_a_worker_keeps_its_own_message_in_one_line():
    for workers in (0, 1):
        with pytest.raises(ValueError, match="^no.mp4: no video$"):
            list(make_loader(Broken(), [[4]], workers, collate=operator.itemgetter(0)))
        assert not multiprocessing.active_children()


def test_collate_keeps_a_videos_clips_together():
    items = [(torch.full((2, 1, 3, 4, 4), i), i, {f"bad{i}": "why"}) for i in range(3)]
    clips, labels, bad = collate(items)
    assert clips.shape == (6, 1, 3, 4, 4)
    assert clips[:, 0, 0, 0, 0].tolist() == labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert list(bad) == ["bad0", "bad1", "bad2"]


def test_workers_deliver_what_the_main_process_would(split):
    videos = Videos(split, sample, pretrain_transform(32, flip=False))
    batches = [list(make_loader(videos, Order(4, 2, 2, 0, 4, 0), workers)) for workers in (0, 2)]
    assert len(batches[0]) == 4 and batches[0][0][0].shape == (2, 8, 3, 32, 32)
    for (a, labels_a, _), (b, labels_b, _) in zip(*batches, strict=True):
        assert torch.equal(a, b) and torch.equal(labels_a, labels_b)


class Numbers(torch.utils.data.Dataset):
    """Items that are their key; item `fatal` ends its worker, item `stuck` never comes."""

    def __init__(self, fatal=None, stuck=None):
        self.fatal, self.stuck = fatal, stuck

    def __getitem__(self, key):
        if key == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        if key == self.stuck:
            time.sleep(1000)
        assert torch.get_num_threads() == 1 or multiprocessing.parent_process() is None
        return key


def numbers(workers, count=40, **what):
    keys = [[i] for i in range(count)]
    return make_loader(Numbers(**what), keys, workers, collate=operator.itemgetter(0))


def test_batches_come_in_order_and_cost_no_random_numbers():
    before = torch.random.get_rng_state()
    assert list(numbers(2)) == list(range(40))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("how", ["dies", "hangs"])
def test_a_worker_that_dies_or_hangs_is_one_clear_line(monkeypatch, how):
    monkeypatch.setattr(data, "TIMEOUT", 1)
    # How long torch waits for a worker that is asked to end.
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.5)
    what = dict(fatal=13) if how == "dies" else dict(stuck=13)
    batches, got, begin = numbers(2, **what), [], time.monotonic()
    with pytest.raises(ValueError, match="worker died or hangs.*check.*with --resume$") as caught:
        got.extend(batches)
    assert "\n" not in str(caught.value) and len(got) <= 13
    while multiprocessing.active_children():  # torch may not wait for what it has killed
        assert time.monotonic() - begin < 15
        time.sleep(0.1)
    assert got == list(range(len(got))) and time.monotonic() - begin < 15


def test_signals_that_stop_a_run_leave_workers_alone():
    batches = numbers(2)
    got = [next(batches), next(batches)]
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for process in workers:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(process.pid, number)
    assert got + list(batches) == list(range(40))


@pytest.mark.parametrize("end", ["close", "error"])
def test_workers_end_with_the_loader_and_with_the_program(end):
    """Although they ignore SIGTERM, with which multiprocessing ends its children."""
    if end == "close":
        batches = numbers(2)
        next(batches)
        assert len(multiprocessing.active_children()) == 2
        batches.close()
        assert not multiprocessing.active_children()
        return
    code = "b = data.make_loader(range(9), [[i] for i in range(9)], 2, collate=list)"
    code = f"import data\n{code}\nnext(b)\nraise KeyError('keeps b alive')"
    env = {**os.environ, "PYTHONPATH": os.path.dirname(data.__file__)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == "KeyError: 'keeps b alive'"
