"""Sampling of views, augmentation, layer-wise learning rates, evaluation; pretrain -> finetune -> linprobe."""

import csv
import json
import os
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision import tv_tensors

import data
import engine
import finetune
import linprobe
import pretrain
from data import SAMPLING, Split, Views, dense_views, finetune_transform, spatial_views, uniform_clip, uniform_views
from model import Classifier

# ---------------------------------------------------------------------------------------------- sampling


def test_dense_views_follow_the_official_table():
    views = dense_views(300, 16, 4, 5)
    assert [view[0] for view in views] == [0, 56, 116, 176, 236]
    assert all(np.diff(view).tolist() == [4] * 15 for view in views)
    assert dense_views(300, 16, 4, 1) == [list(range(0, 64, 4))]
    assert len(dense_views(300, 16, 4, 10)) == 10


@pytest.mark.parametrize("total", [1, 5, 15, 16, 20, 40, 63, 64, 65])
def test_short_videos_have_full_views(total):
    for rule in (dense_views, uniform_views):
        for view in rule(total, 16, 4, 3):
            assert len(view) == 16 and min(view) >= 0 and max(view) < total and view == sorted(view)
    assert len(set(dense_views(total, 16, 4, 2)[0])) == min(total, 16)  # a smaller stride comes before repeated frames


@pytest.mark.parametrize("total", [16, 17, 100, 199])
def test_uniform_views_follow_the_official_formulas(total):
    x = np.arange(16)
    expected = [np.floor(total / 16 * x), np.floor(total / 16 * x + total / 32)]
    assert np.array_equal(uniform_views(total, 16, 0, 2), expected)


def test_uniform_clip_takes_one_frame_from_each_part():
    torch.manual_seed(0)
    seen = [Counter() for _ in range(8)]
    for _ in range(300):
        for i, frame in enumerate(uniform_clip(43, 8)):
            seen[i][frame] += 1
    assert [sorted(part) for part in seen] == [list(range(i * 5, i * 5 + 5)) for i in range(8)]
    assert uniform_clip(4, 8) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_crops_lie_evenly_along_the_longer_side():
    ramp = torch.arange(426).float().expand(1, 3, 320, 426)  # 426x320 becomes 298x224
    left = spatial_views(ramp, 224, 3)[:, 0, 0, 0, 0] * 298 / 426
    assert torch.allclose(left, torch.tensor([0.0, 37.0, 74.0]), atol=0.6)
    tall = spatial_views(ramp.transpose(2, 3), 224, 3)
    assert torch.allclose(tall[:, 0, 0, 0, 0] * 298 / 426, left, atol=0.6)
    assert torch.equal(spatial_views(ramp, 224, 1)[0], spatial_views(ramp, 224, 3)[1])  # one crop is the middle one
    assert spatial_views(ramp, 224, 10).shape == (10, 1, 3, 224, 224)


# ------------------------------------------------------------------------------------------- augmentation


def still(frames=6):
    """A clip of equal frames, as uint8 noise with structure."""
    torch.manual_seed(1)
    image = F.interpolate(torch.rand(1, 3, 9, 12), size=(72, 96), mode="bilinear")
    return tv_tensors.Video((255 * image).to(torch.uint8).expand(frames, -1, -1, -1).clone())


def test_every_frame_of_a_clip_is_augmented_alike():
    augment = finetune_transform(32, True, 4, 7, 0.08, 0.0)
    results = []
    for seed in range(20):
        torch.manual_seed(seed)
        clip = augment(still())
        assert clip.shape == (6, 3, 32, 32) and clip.dtype == torch.uint8
        assert (clip == clip[:1]).all()
        results.append(clip.float().mean())
    assert len(set(results)) > 15  # and every clip otherwise


def test_nothing_but_a_resize_when_all_is_off():
    clip = finetune_transform(32, False, 0, 7, 1.0, 0.0)(still())
    assert clip.shape == (6, 3, 32, 32)
    torch.manual_seed(5)
    assert torch.equal(clip, finetune_transform(32, False, 0, 7, 1.0, 0.0)(still()))


def test_erasing_takes_one_box_and_noise_of_its_own_in_every_frame():
    plain = tv_tensors.Video(torch.full((6, 3, 64, 64), 7, dtype=torch.uint8))
    shares = []
    for seed in range(40):
        torch.manual_seed(seed)
        erased = data.Erase(1.0)(plain)
        changed = (erased != 7).any(dim=1)
        rows, columns = (changed.any(dim=0).any(dim=k).nonzero() for k in (1, 0))
        box = changed[:, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        assert box.float().mean() > 0.95  # one rectangle, the same in all frames
        assert not torch.equal(erased[0], erased[1])
        shares.append(changed[0].float().mean())
    assert 0.015 < min(shares) and 0.2 < max(shares) < 0.36
    assert torch.equal(data.Erase(0.0)(plain), plain)


def test_repeats_share_frames_but_not_crops(toy):
    split = data.read_split(toy)
    sample = partial(data.sample_clip, frames=4, stride=2)
    for same_time in (True, False):
        videos = data.Videos(split, sample, data.eval_transform(32), 2, same_time)
        clips = torch.stack([videos[(i, i)][0] for i in range(8)])
        assert torch.equal(clips[:, 0], clips[:, 1]) == same_time
    videos = data.Videos(split, sample, finetune_transform(32, False, 0, 0, 0.3, 0.0), 2, True)
    clips = videos[(0, 0)][0]
    assert not torch.equal(clips[0], clips[1])


def test_mixing_keeps_targets_a_distribution():
    mix = finetune.make_mixer(12, 0.8, 1.0)
    clips, labels = torch.rand(6, 4, 3, 16, 16), torch.arange(6)
    kinds = Counter()
    for seed in range(30):
        torch.manual_seed(seed)
        mixed, targets = mix(tv_tensors.Video(clips), labels)
        assert targets.shape == (6, 12) and torch.allclose(targets.sum(dim=1), torch.ones(6))
        own = targets[torch.arange(6), labels]
        assert torch.allclose(own, own[0].expand(6))
        inside = (
            (mixed != clips).flatten(1).any(dim=0).float().mean()
        )  # cutmix leaves pixels outside a box as they were
        kinds["cutmix" if inside < 0.999 else "mixup"] += 1
        if inside >= 0.999:
            expected = own[0] * clips + (1 - own[0]) * clips.roll(1, 0)
            assert torch.allclose(mixed.as_subclass(torch.Tensor), expected, atol=1e-5)
        else:
            changed = (mixed != clips)[:, 0, 0].any(dim=0).float().mean()
            assert own[0] == pytest.approx(1 - changed.item(), abs=1e-5)  # the weight is the true area, in all frames
    assert min(kinds["mixup"], kinds["cutmix"]) > 5
    assert finetune.make_mixer(12, 0, 0) is None


@pytest.mark.parametrize("repeats", [1, 2])
def test_neighbouring_videos_are_mixed_however_the_batch_is_cut(repeats):
    mixer, seeds = finetune.make_mixer(8, 0.8, 1.0), list(range(4 * repeats))
    clips, labels = torch.rand(8 * repeats, 4, 3, 16, 16), torch.arange(8).repeat_interleave(repeats)
    mixed, targets = finetune.mix_pairs(mixer, clips, labels, repeats, seeds)
    half = 4 * repeats
    for part in (slice(0, half), slice(half, None)):
        again = finetune.mix_pairs(mixer, clips[part], labels[part], repeats, seeds[part.start // 2 :][: half // 2])
        assert torch.equal(again[0], mixed[part]) and torch.equal(again[1], targets[part])
    for i, target in enumerate(targets):
        video = i // repeats
        assert set(target.nonzero()[:, 0].tolist()) <= {video, video ^ 1}  # 0 with 1, 2 with 3, ...
        partner = i + repeats if video % 2 == 0 else i - repeats
        weight = target[video]
        blend = torch.allclose(mixed[i], weight * clips[i] + (1 - weight) * clips[partner], atol=1e-5)
        assert blend or ((mixed[i] == clips[i]) | (mixed[i] == clips[partner])).all()
    assert len({round(float(target.max()), 5) for target in targets}) > 2  # each pair has a weight of its own


# -------------------------------------------------------------------------------- learning rates, accuracy


def test_layer_decay_gives_each_parameter_its_factor_once():
    model = Classifier("toy", 12, (8, 64, 64), (2, 8, 8))
    groups = finetune.param_groups(model, 0.05, 0.7)
    found = {id(p): (group["scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(found) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        if name.startswith("encoder.blocks."):
            factor = 0.7 ** (4 - int(name.split(".")[2]))  # the last of 4 blocks 0.7, the first 0.7^4
        else:
            factor = 0.7**5 if "patch_embed" in name else 1.0
        decay = 0.05 if parameter.ndim > 1 else 0.0
        assert found[id(parameter)] == (pytest.approx(factor), decay), name
    assert all(group["scale"] == 1 for group in finetune.param_groups(model, 0.05, 1.0))


def test_accuracies_by_hand():
    scores = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.5, 0.4, 0.1], [0.1, 0.2, 0.7]])
    views = torch.tensor([[0, 0], [1, 2], [0, 1], [2, 2]])
    result = finetune.accuracies(scores, views, [0, 1, 1, 0])
    assert result == pytest.approx(dict(top1=50.0, top5=100.0, class_mean=50.0, view=50.0))
    uneven = finetune.accuracies(scores, views, [0, 0, 0, 2])
    assert uneven["top1"] == 75 and uneven["class_mean"] == pytest.approx(100 * (2 / 3 + 1) / 2)


class Counting(torch.nn.Module):
    """Logits from the mean brightness of a view; counts the views it saw."""

    def __init__(self):
        super().__init__()
        self.seen = 0

    def forward(self, clips):
        self.seen += len(clips)
        return clips.float().mean(dim=(1, 2, 3, 4))[:, None] * torch.tensor([0.0, 0.01, 0.02])


def test_video_score_is_the_mean_of_the_views_softmax(toy):
    paths = data.read_split(toy, train=False).paths[:5]
    views = Views(paths, dense_views, frames=8, stride=2, clips=3, size=32, crops=2)
    model = Counting()
    scores, best = finetune.score_videos(model, views, torch.device("cpu"), torch.float32)
    assert scores.shape == (5, 3) and best.shape == (5, 6) and model.seen == 30
    expected = torch.stack([Counting()(views[i][1]).softmax(dim=1).mean(dim=0) for i in range(5)])
    assert torch.allclose(scores, expected)


def test_evaluation_stops_at_an_unreadable_video(tmp_path, toy):
    (tmp_path / "broken.avi").write_bytes(b"no video")
    views = Views([tmp_path / "broken.avi"], dense_views, 8, 2, 1, 32, 1)
    for workers in (0, 1):
        with pytest.raises(ValueError, match=r"^[^\n]*broken.avi: Invalid data[^\n]*$"):
            finetune.score_videos(Counting(), views, torch.device("cpu"), torch.float32, workers=workers)


# ------------------------------------------------------------------------------------------ the whole chain

SMALL = "--epochs 2 --batch 6 --repeats 1 --warmup 1 --precision fp32 --log-every 1 --shots 1".split()


@pytest.fixture(scope="module")
def chain(toy, tmp_path_factory):
    """A folder with runs/pretrain-toy and runs/finetune-toy."""
    folder, before = tmp_path_factory.mktemp("chain"), os.getcwd()
    os.chdir(folder)
    pretrain.main(["--data", str(toy), "--epochs", "1", "--batch", "8", "--repeats", "1", "--warmup", "0.5"])
    finetune.main(["--data", str(toy), *SMALL])
    os.chdir(before)
    return folder


@pytest.fixture
def here(toy, chain, monkeypatch):
    monkeypatch.chdir(chain)
    return str(toy)


def lines(name):
    return [json.loads(line) for line in open(f"runs/{name}/log.jsonl")]


def predictions(name):
    return list(csv.DictReader(open(f"runs/{name}/predictions.csv", newline="")))


def test_finetuning_starts_from_the_pretrained_encoder(here):
    before = engine.load_checkpoint("runs/pretrain-toy/checkpoint.pt", "pretrain")["model"]
    _, cfg = engine.parse_config(finetune.Config, [], "", finetune.PRESETS)
    _, model, _, report = finetune.build("toy", cfg, None, ["a", "b"])
    assert "0 missing" in report
    for name, value in model.state_dict().items():
        if name.startswith("encoder."):
            assert torch.equal(value, before[name])


def test_finetuning_leaves_its_files(here):
    for name in ("checkpoint.pt", "log.jsonl", "loss.png", "predictions.csv", "classes.png"):
        assert os.path.getsize(f"runs/finetune-toy/{name}") > 100
    rows, result = predictions("finetune-toy"), json.load(open("runs/finetune-toy/results.json"))
    assert len(rows) == 12 and len({row["path"] for row in rows}) == 12
    assert sum(int(row["correct"]) for row in rows) == sum(row["label"] == row["prediction"] for row in rows)
    assert result["top1"] == pytest.approx(100 * sum(int(row["correct"]) for row in rows) / 12)
    assert rows[0]["top5"].split(";")[0] == rows[0]["prediction"] and rows[0]["label"] in data.MOTIONS


def test_eval_only_repeats_the_evaluation(here, capsys):
    first = predictions("finetune-toy")
    finetune.main(["--data", here, "--eval-only", "--precision", "fp32"])
    assert predictions("finetune-toy") == first
    assert "top-1" in capsys.readouterr().out


def test_evaluation_takes_the_clips_of_the_training(here, monkeypatch):
    finetune.main(["--data", here, *SMALL, "--name", "larger", "--resolution", "56", "--stride", "1"])
    seen, original = [], finetune.Views

    def views(paths, rule, **sizes):
        seen.append(sizes)
        return original(paths, rule, **sizes)

    monkeypatch.setattr(finetune, "Views", views)
    finetune.main(["--data", here, "--name", "larger", "--eval-only"])
    finetune.main(["--name", "larger", "--predict", f"{here}/Pulse/v_Pulse_g01_c01.avi"])
    assert all(sizes["size"] == 56 and sizes["stride"] == 1 for sizes in seen) and len(seen) == 3


def test_evaluation_is_the_same_with_two_processes(here, train):
    first = predictions("finetune-toy")
    train(2, "finetune", "--data", here, "--eval-only", "--precision", "fp32", "--test-splits", odd_list(here))
    rows = predictions("finetune-toy")
    assert len(rows) == 11  # an odd number of videos: none twice, none missing
    for row, old in zip(rows, sorted(first, key=lambda row: row["path"])[:11], strict=True):
        assert row["path"] == old["path"] and row["prediction"] == old["prediction"]
        assert np.allclose(*([float(p) for p in r["probabilities"].split(";")] for r in (row, old)), atol=1e-5)
    finetune.main(["--data", here, "--eval-only", "--precision", "fp32"])


def odd_list(here):
    split = data.read_split(here, train=False)
    pairs = sorted(zip(map(str, split.paths), split.labels, strict=True))[:11]
    with open("odd.txt", "w") as file:
        file.writelines(f"{os.path.relpath(path, here)} {label}\n" for path, label in pairs)
    return "odd.txt"


def test_evaluation_leaves_the_log_alone_and_refuses_what_does_not_fit(here, tmp_path):
    before = open("runs/finetune-toy/log.jsonl").read()
    finetune.main(["--data", here, "--eval-only", "--epochs", "3", "--precision", "fp32"])
    assert open("runs/finetune-toy/log.jsonl").read() == before
    state = torch.load("runs/finetune-toy/checkpoint.pt", weights_only=True)
    state["config"]["classes"].reverse()
    torch.save(state, tmp_path / "other-order.pt")
    with pytest.raises(ValueError, match="another order"):
        finetune.main(["--data", here, "--eval-only", "--init", str(tmp_path / "other-order.pt"), "--name", "other"])
    state["config"]["classes"].reverse()
    del state["model"]["fc_norm.weight"]
    torch.save(state, tmp_path / "no-norm.pt")
    with pytest.raises(ValueError, match="no fc_norm.weight"):
        finetune.main(["--data", here, "--eval-only", "--init", str(tmp_path / "no-norm.pt"), "--name", "other"])


def test_predict_names_five_classes(here, capsys):
    video = f"{here}/Pulse/v_Pulse_g01_c01.avi"
    finetune.main(["--predict", video, video])
    out = capsys.readouterr().out
    assert out.count(video) == 2 and sum(f"  {name}\n" in out for name in data.MOTIONS) == 5


def test_resumed_finetuning_is_the_uninterrupted_one(here, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    flags = ["--data", here, *SMALL, "--name", "resumed", "--save-minutes", "0", "--drop-path", "0.2"]
    finetune.main([*flags[:-4], "--name", "whole", "--drop-path", "0.2"])
    with monkeypatch.context() as patch:
        patch.setattr(finetune.visualize, "plot_log", stop)  # comes after the first checkpoint
        with pytest.raises(KeyboardInterrupt):
            finetune.main(flags)
    assert engine.load_checkpoint("runs/resumed/checkpoint.pt", "finetune")["step"] == 1
    finetune.main([*flags, "--resume", "--init", "gone.pt"])  # what it started from is no longer needed
    whole, resumed = ({line["step"]: line["loss"] for line in lines(n) if "loss" in line} for n in ("whole", "resumed"))
    assert whole == resumed and len(whole) == 4
    with pytest.raises(ValueError, match="base_lr"):
        finetune.main([*flags, "--resume", "--base-lr", "1"])
    with pytest.raises(ValueError, match="holds a run"):
        finetune.main(flags)


def test_accumulation_changes_nothing(here):
    common = ["--data", here, *SMALL, "--mixup", "0", "--cutmix", "0", "--drop-path", "0"]
    finetune.main([*common, "--name", "one-pass"])
    finetune.main([*common, "--name", "three-passes", "--micro", "2"])
    a, b = ([line["loss"] for line in lines(name) if "loss" in line] for name in ("one-pass", "three-passes"))
    assert a == pytest.approx(b, rel=1e-4)


def test_from_scratch_with_validation(here):
    finetune.main(["--data", here, *SMALL, "--init", "none", "--name", "scratch", "--validate", "1",
                   "--checkpointing", "--clip-grad", "1", "--head-dropout", "0.1"])  # fmt: skip
    assert [line["step"] for line in lines("scratch") if "top1" in line and "step" in line] == [2]


def test_linear_probe_chooses_on_training_videos_and_caches_features(here, capsys, monkeypatch):
    flags = ["--data", here, "--batch", "8", "--epochs", "4", "--warmup", "1", "--repeats", "2", "--shots", "0"]
    flags += ["--base-lrs", "0.1", "1"]
    linprobe.main(flags)
    first, out = json.load(open("runs/linprobe-toy/results.json")), capsys.readouterr().out
    assert set(first["sweep"]) == {"0.1", "1.0"} and "each while held out" in out
    saved = dict(np.load("runs/linprobe-toy/features.npz", allow_pickle=False))
    assert saved["train"].shape == (24, 2, 128) and saved["test"].shape == (12, 2, 128)
    with monkeypatch.context() as patch:
        patch.setattr(linprobe, "extract", None)  # must not be needed again
        linprobe.main(flags)
        with pytest.raises(TypeError):
            linprobe.main([*flags, "--stride", "1"])  # other features
    with open("runs/linprobe-toy/features.npz", "r+b") as file:
        file.truncate(1000)
    linprobe.main(flags)  # a broken cache is as none
    assert json.load(open("runs/linprobe-toy/results.json")) == first
    linprobe.main([*flags, "--init", "random"])
    other = np.load("runs/linprobe-toy-random/features.npz", allow_pickle=False)
    assert not np.allclose(other["test"], saved["test"])
    assert len(predictions("linprobe-toy-random")) == 12


def test_features_of_any_videos(here):
    videos = [f"{here}/Pulse/v_Pulse_g01_c01.avi", f"{here}/Turn2/v_Turn2_g01_c01.avi"]
    linprobe.main(["--features", "out.npz", "--videos", *videos])
    out = np.load("out.npz", allow_pickle=False)
    assert out["paths"].tolist() == videos and out["features"].shape == (2, 128)
    linprobe.main(["--features", "all.npz", "--data", here])
    assert len(np.load("all.npz")["paths"]) == 36


def test_linear_probe_mistakes_are_told_in_one_line(here):
    for flags, message in (
        (["--features", "nowhere/out.npz", "--data", here], "in a folder that exists"),
        (["--videos", "a.avi"], "goes with --features"),
        (["--data", here, "--shots", "0", "--init", "nowhere.pt"], "nowhere.pt"),
    ):
        with pytest.raises(ValueError, match=message):
            linprobe.main(flags)


def test_head_finds_what_is_linear():
    torch.manual_seed(0)
    labels = torch.arange(240) % 3
    features = torch.randn(240, 2, 8) * torch.logspace(-3, 2, 8) + 5
    features[..., 0] += 1e-2 * labels[:, None]  # small beside the others, until the head normalises it
    cfg = linprobe.Config(epochs=60, batch=40, warmup=5)
    head = linprobe.train_head(features, labels, 3, 1.0, cfg)
    scores, views = linprobe.score(head, features)
    assert finetune.accuracies(scores, views, labels.tolist())["top1"] > 95
    assert torch.allclose(scores.sum(dim=1), torch.ones(240))


# --------------------------------------------------------------------------------------------- user errors


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--init", "nowhere.pt"], "nowhere.pt"),
        (["--init", "none", "--eval-only"], "no trained head"),
        (["--init", "runs/pretrain-toy/checkpoint.pt", "--eval-only"], "no trained head"),
        (["--shots", "9"], "--shots 9"),
        (["--erase", "2"], "--erase 2.0 must be at most 1"),
        (["--batch", "1", "--mixup", "0.8"], "an even --micro"),
        (["--epochs", "2"], "--warmup 2"),
        (["--resolution", "60"], "multiple of"),
        (["--test-splits", "same.txt", "--splits", "same.txt"], "no test part"),
    ],
)
def test_mistakes_are_told_in_one_line(here, flags, message):
    with open("same.txt", "w") as file:
        file.write("Pulse/v_Pulse_g01_c01.avi 1\n")
    with pytest.raises(ValueError, match=message):
        finetune.main(["--data", here, "--name", "mistake", "--batch", "6", "--shots", "0", *flags])


def test_overlap_and_labels_are_checked(tmp_path):
    def parts(train, test):
        for name, text in (("train.txt", train), ("test.txt", test)):
            (tmp_path / name).write_text(text)
        cfg = finetune.Config(data=str(tmp_path), splits=str(tmp_path / "train.txt"))
        cfg.test_splits = str(tmp_path / "test.txt")
        return finetune.read_parts(cfg)

    for name in "abc":
        (tmp_path / f"{name}.avi").write_bytes(b"")
    train, test = parts("a.avi 0\nb.avi 2\n", "c.avi 1\n")
    assert train.classes == test.classes == ["0", "1", "2"]
    with pytest.raises(ValueError, match="1 videos are both training and test videos"):
        parts("a.avi 0\nb.avi 1\n", "b.avi 1\nc.avi 0\n")
    with pytest.raises(ValueError, match="no label for the test video"):
        parts("a.avi 0\nb.avi 1\n", "c.avi\n")


def test_shots_are_balanced_and_drawn_by_the_seed():
    split = Split([f"{i}.avi" for i in range(60)], [i % 3 for i in range(60)], ["a", "b", "c"])
    first = finetune.draw_shots(split, 4, 0)
    assert Counter(first.labels) == {0: 4, 1: 4, 2: 4} and len(set(first.paths)) == 12
    assert finetune.draw_shots(split, 4, 0) == first != finetune.draw_shots(split, 4, 1)
    assert all(split.labels[split.paths.index(p)] == label for p, label in zip(first.paths, first.labels, strict=True))


def test_presets_are_the_papers():
    expected = {  # Table 10 and Appendix B, base model: epochs, batch, base lr, layer decay, drop path, views
        "ucf101": (100, 128, 5e-4, 0.7, 0.2, 5, 3),
        "hmdb51": (50, 128, 1e-3, 0.7, 0.2, 10, 3),
        "ssv2": (40, 512, 5e-4, 0.75, 0.1, 2, 3),
        "k400": (75, 512, 1e-3, 0.75, 0.1, 5, 3),
    }
    for preset, numbers in expected.items():
        _, cfg = engine.parse_config(finetune.Config, [preset], "", finetune.PRESETS)
        found = (cfg.epochs, cfg.batch, cfg.base_lr, cfg.layer_decay, cfg.drop_path, cfg.clips, cfg.crops)
        assert found == numbers, preset
        assert cfg.flip == (preset != "ssv2") and cfg.sampling in SAMPLING
