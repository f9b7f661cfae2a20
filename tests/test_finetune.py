"""Fine-tuning: mixing, learning rates, evaluation, and the stage through its main."""

import csv
import json
import math
import os
import shutil
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

import finetune
import pretrain
import visualize
from data import SAMPLING, Split, Views, dense_views, read_split
from finetune import PRESETS, Config, settle_clips
from lib import engine, evaluate
from model import Classifier

# ------------------------------------------------------------------------------------------ mixing


def distances(mixed, clips):
    """Mean distance of each mixed clip (B, ...) to each clip: (B, B)."""
    return (mixed[:, None] - clips[None]).abs().flatten(2).mean(dim=2)


def test_mixing_keeps_targets_a_distribution_and_both_kinds_take_turns():
    cfg = Config(mixup=0.8, cutmix=1.0, repeats=1)
    clips = torch.randint(0, 256, (6, 4, 3, 16, 16), dtype=torch.uint8)
    labels, kinds = torch.arange(6), Counter()
    for seed in range(30):
        torch.manual_seed(seed)
        mixed, targets = finetune.mix(clips, labels, 12, cfg)
        assert type(mixed) is torch.Tensor and targets.shape == (6, 12)
        assert torch.allclose(targets.sum(dim=1), torch.ones(6))
        own = targets[torch.arange(6), labels]
        assert torch.allclose(own, own[0].expand(6))
        pixels = clips.float() / 255
        same = (mixed == pixels).flatten(1).float().mean()
        if same > 0.01:  # cutmix leaves the pixels outside of a box as they were
            kinds["cutmix"] += 1
            box = (mixed != pixels)[:, 0, 0].any(dim=0).float().mean()
            assert own[0] == pytest.approx(1 - box.item(), abs=1e-5)  # the area of the box
        else:
            kinds["mixup"] += 1
            expected = own[0] * pixels + (1 - own[0]) * pixels.roll(1, 0)
            assert torch.allclose(mixed, expected, atol=1e-5)
    assert min(kinds.values()) > 5 and len(kinds) == 2
    torch.manual_seed(29)
    assert torch.equal(
        finetune.mix(clips, labels, 12, cfg)[0], mixed
    )  # from torch's generator alone
    off = finetune.mix(clips, labels, 12, replace(cfg, mixup=0.0, cutmix=0.0))
    assert off[0] is clips and off[1] is labels


def test_a_clip_is_mixed_with_another_video_not_with_its_own_repeat():
    cfg = Config(mixup=0.8, cutmix=0.0, repeats=2)
    labels = torch.arange(4).repeat_interleave(2)
    clips = torch.randint(0, 256, (8, 2, 3, 8, 8), dtype=torch.uint8)
    _, targets = finetune.mix(clips, labels, 4, cfg)
    assert (targets > 0).sum(dim=1).tolist() == [2] * 8


# ------------------------------------------------------------------------- learning rates, accuracy


def test_layer_decay_gives_each_parameter_its_factor_once():
    model = Classifier("toy", 12, (8, 64, 64), (2, 8, 8))
    groups = finetune.param_groups(model, 0.05, 0.7)
    found = {id(p): (g["scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    everything = sum(len(group["params"]) for group in groups)
    assert everything == len(found) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        if name.startswith("encoder.blocks."):
            factor = 0.7 ** (
                4 - int(name.split(".")[2])
            )  # of 4 blocks the last 0.7, the first 0.7^4
        else:
            factor = 0.7**5 if "patch_embed" in name else 1.0
        decay = 0.05 if parameter.ndim > 1 else 0.0
        assert found[id(parameter)] == (pytest.approx(factor), decay), name
    assert all(group["scale"] == 1 for group in finetune.param_groups(model, 0.05, 1.0))


def test_accuracies_by_hand():
    scores = [[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.5, 0.4, 0.1], [0.1, 0.2, 0.7]]
    views = torch.tensor([[0, 0], [1, 2], [0, 1], [2, 2]])
    result = finetune.accuracies(torch.tensor(scores), views, [0, 1, 1, 0])
    assert result == pytest.approx(dict(top1=50.0, top5=100.0, class_mean=50.0, view=50.0))
    uneven = finetune.accuracies(torch.tensor(scores), views, [0, 0, 0, 2])
    assert uneven["top1"] == 75 and uneven["class_mean"] == pytest.approx(100 * (2 / 3 + 1) / 2)


class Counting(torch.nn.Module):
    """Logits from the mean brightness of a view; counts the views it saw."""

    seen = 0

    def forward(self, clips):
        self.seen += len(clips)
        brightness = clips.float().mean(dim=(1, 2, 3, 4))
        return brightness[:, None] * torch.tensor([0.0, 0.01, 0.02])


def test_video_score_is_the_mean_of_the_views_softmax(toy):
    paths = read_split(toy, train=False).paths[:5]
    cfg = Config(**finetune.TOY_CLIPS, sampling="dense", clips=3, crops=2, precision="fp32")
    model = Counting()
    scores, classes = finetune.score_videos(model, paths, cfg, torch.device("cpu"))
    assert scores.shape == (5, 3) and classes.shape == (5, 6) and model.seen == 30
    views = Views(paths, dense_views, 8, 2, 3, 48, 2)
    each = [Counting()(views[i][1]).softmax(dim=1).mean(dim=0) for i in range(5)]
    assert torch.allclose(scores, torch.stack(each))


# ------------------------------------------------------------------------------ what the model gets


ABOUT = dict(size="small", cube=[2, 16, 16], video_size=[32, 96, 96], stride=3, sampling="uniform")


def clip_flags(cfg):
    return (cfg.frames, cfg.stride, cfg.sampling, cfg.resolution, cfg.size, cfg.cube, cfg.positions)


def test_clips_are_those_of_the_weights_unless_a_flag_says_otherwise():
    def settled(argv, about, **more):
        preset, cfg = engine.parse_config(Config, argv, "", PRESETS)
        cfg, config, line = settle_clips(cfg, preset, about, "W", **more)
        assert config["video_size"] == (cfg.frames, cfg.resolution, cfg.resolution)
        return clip_flags(cfg), line

    paper, own = (16, 4, "dense", 224, "base", (2, 16, 16), "1d"), ["own"]
    theirs = (32, 3, "uniform", 96, "small", (2, 16, 16), "1d")
    assert settled(own, {})[0] == paper
    assert settled(own, ABOUT)[0] == theirs == settled(["toy"], ABOUT)[0]
    found, line = settled(
        ["hmdb51", "--resolution", "112"], ABOUT
    )  # hmdb51 has a stride of its own
    assert found == (32, 2, "uniform", 112, *theirs[4:])
    assert "clips of 32 frames" in line and "112x112 pixels, cubes 2x16x16, size small" in line
    assert "stride, resolution from flag or preset" in line and "cube, frames from W" in line
    assert settled(["hmdb51", "--resolution", "112"], ABOUT, trained=True)[0] == theirs
    assert settled(["toy"], {})[0] == (8, 2, "dense", 48, "toy", (2, 8, 8), "3d")
    assert settled(own, dict(size="small", cube=(2, 16, 16)))[0] == (*paper[:4], *theirs[4:])
    for flags in ("--size base", "--cube 2 8 8"):
        with pytest.raises(ValueError, match="but W has .*: leave it out"):
            settled([*own, *flags.split()], ABOUT)


# -------------------------------------------------------------------------------------- the stage

SMALL = "--epochs 1 --batch 6 --repeats 1 --warmup 0.5 --precision fp32 --log-every 1".split()
SMALL += "--shots 1 --clips 1".split()  # two steps, on a video of each class


@pytest.fixture(scope="module")
def chain(toy, tmp_path_factory):
    """A folder with runs/pretrain-toy and runs/finetune-toy, with all figures."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("chain")
        patch.chdir(folder)
        patch.setattr(visualize, "main", lambda argv: None)
        few = "--epochs 1 --batch 12 --warmup 0.5".split()
        pretrain.main(["toy", "--data", str(toy), *few])
        finetune.main(["toy", "--data", str(toy), *SMALL])
    return folder


@pytest.fixture
def here(toy, chain, monkeypatch):
    """The chain as working directory; the toy set's path. Nothing more is drawn."""
    monkeypatch.chdir(chain)
    for name in ("plot_log", "plot_classes"):
        monkeypatch.setattr(visualize, name, lambda *paths: None)
    return str(toy)


def losses(name):
    lines = [json.loads(line) for line in open(f"runs/{name}/log.jsonl")]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def predictions(name):
    return list(csv.DictReader(open(f"runs/{name}/predictions.csv", newline="")))


def test_finetuning_leaves_its_files(chain):
    run = chain / "runs/finetune-toy"
    for name in ("checkpoint.pt", "log.jsonl", "loss.png", "predictions.csv", "classes.png"):
        assert os.path.getsize(run / name) > 100
    rows = visualize.read_predictions(run / "predictions.csv")
    result = json.load(open(run / "results.json"))
    assert len(rows) == 12 and len({row["path"] for row in rows}) == 12
    correct = [row["label"] == row["prediction"] for row in rows]
    assert result["top1"] == pytest.approx(100 * sum(correct) / 12)
    assert all(row["top5"][0] == row["prediction"] for row in rows)
    assert all(len(row["probabilities"]) == 5 and sum(row["probabilities"]) <= 1 for row in rows)
    assert result["config"]["frames"] == 8 and result["config"]["size"] == "toy"


def test_finetuning_starts_from_the_pretrained_encoder(here, capsys):
    before = engine.load_checkpoint("runs/pretrain-toy/checkpoint.pt", "pretrain")["model"]
    cfg = Config(**PRESETS["toy"])
    cfg, model, _ = finetune.make_classifier(cfg, "toy", finetune.Path("runs/new"), ["a", "b"])
    said = capsys.readouterr().out
    assert "0 missing" in said and "decoder left out" in said
    assert "clips of 8 frames, stride 2, 48x48 pixels, cubes 2x8x8, size toy" in said
    for name, value in model.state_dict().items():
        if name.startswith("encoder."):
            assert torch.equal(value, before[name])


def test_eval_only_repeats_the_evaluation_and_leaves_the_log_alone(here, capsys):
    first, log = predictions("finetune-toy"), open("runs/finetune-toy/log.jsonl").read()
    flags = "--eval-only --epochs 3 --precision fp32 --clips 1".split()
    finetune.main(["toy", "--data", here, *flags])
    assert predictions("finetune-toy") == first
    assert open("runs/finetune-toy/log.jsonl").read() == log
    assert "12 test videos: top-1" in capsys.readouterr().out


def test_evaluation_takes_the_clips_of_the_training(here, monkeypatch):
    more = ["--name", "other/clips", "--resolution", "32", "--stride", "1"]
    finetune.main(["toy", "--data", here, *SMALL, *more])
    seen = []

    def views(*sizes):
        seen.append(sizes[2:])
        return Views(*sizes)

    monkeypatch.setattr(evaluate, "Views", views)
    again = ["--name", "other/clips"]
    finetune.main([*again, "--data", here, "--eval-only", "--clips", "1", "--crops", "1"])
    video = f"{here}/Pulse/v_Pulse_g01_c01.avi"
    finetune.main([*again, "--predict", video, "--stride", "2", "--resolution", "48"])
    assert [(frames, stride, size) for frames, stride, _, size, _ in seen] == [(8, 1, 32)] * 2


def test_an_unreadable_test_video_stops_the_evaluation_and_says_how_to_go_on(here, tmp_path):
    (tmp_path / "broken.avi").write_bytes(b"no video")
    (tmp_path / "list.txt").write_text(f"{tmp_path}/broken.avi 0\n")
    flags = ["--eval-only", "--test-splits", str(tmp_path / "list.txt")]
    with pytest.raises(ValueError, match=r"^[^\n]*broken.avi[^\n]*--eval-only\)$"):
        finetune.main(["toy", "--data", here, *flags])


def test_predict_names_five_classes(here, capsys):
    video = f"{here}/Pulse/v_Pulse_g01_c01.avi"
    finetune.main(["--predict", video, video])
    out = capsys.readouterr().out
    names = read_split(here).classes
    assert out.count(video) == 2
    assert sum(line.split("  ")[-1] in names for line in out.splitlines() if "%" in line) == 10


def test_resumed_finetuning_is_the_uninterrupted_one(here, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    flags = ["toy", "--data", here, *SMALL, "--drop-path", "0.2", "--head-dropout", "0.2"]
    flags += ["--mixup", "0.8", "--cutmix", "1", "--flip", "--save-minutes", "0", "--name"]
    finetune.main([*flags, "whole"])
    with monkeypatch.context() as patch:
        patch.setattr(visualize, "plot_log", stop)  # comes after the first checkpoint
        with pytest.raises(KeyboardInterrupt):
            finetune.main([*flags, "resumed"])
    assert engine.load_checkpoint("runs/resumed/checkpoint.pt", "finetune")["step"] == 1
    finetune.main([*flags, "resumed", "--resume", "--init", "gone.pt"])  # no longer needed
    assert losses("whole") == losses("resumed") and len(losses("whole")) == 2
    paths = [f"runs/{name}/checkpoint.pt" for name in ("whole", "resumed")]
    states = [engine.load_checkpoint(path, "finetune") for path in paths]
    for name, value in states[0]["model"].items():
        assert torch.equal(value, states[1]["model"][name]), name
    with pytest.raises(ValueError, match="base_lr"):
        finetune.main([*flags, "resumed", "--resume", "--base-lr", "1"])
    with pytest.raises(ValueError, match="holds a run"):
        finetune.main([*flags, "resumed"])


def test_1_2_and_4_processes_train_alike_and_count_every_test_video_once(here, train):
    split = read_split(here, train=False)
    videos = list(zip(split.paths, split.labels, strict=True))[:11]  # do not divide by 2 or 4
    with open("odd.txt", "w") as file:
        file.writelines(f"{os.path.relpath(path, here)} {label}\n" for path, label in videos)
    flags = ["toy", "--data", here, *SMALL, "--test-splits", "odd.txt", "--batch", "8"]
    flags += "--micro 2 --epochs 2 --warmup 1 --drop-path 0.3 --head-dropout 0.3".split()
    flags += "--mixup 0.8 --cutmix 1 --repeats 2 --resolution 32 --name".split()
    finetune.main([*flags, "on1"])
    first = {row["path"]: row for row in predictions("on1")}
    assert len(first) == 11 and len(set(losses("on1").values())) == len(losses("on1")) == 2
    for size in (2, 4):
        train(size, "finetune", *flags, f"on{size}")
        curves = [list(losses(name).values()) for name in ("on1", f"on{size}")]
        assert curves[0] == pytest.approx(curves[1], rel=1e-4)
        rows = predictions(f"on{size}")
        assert len({row["path"] for row in rows}) == len(rows) == 11
        for row in rows:
            old = first[row["path"]]
            assert row["label"] == old["label"]
            a, b = ([float(p) for p in r["probabilities"].split(";")] for r in (row, old))
            assert np.allclose(a, b, atol=1e-4)


def test_accumulation_changes_nothing_without_what_is_drawn_per_pass(here):
    finetune.main(["toy", "--data", here, *SMALL, "--name", "three-passes", "--micro", "2"])
    a, b = (list(losses(name).values()) for name in ("finetune-toy", "three-passes"))
    assert a == pytest.approx(b, rel=1e-4)


def test_one_video_at_a_time_cannot_be_mixed(here):
    flags = "--micro 1 --mixup 0.8 --repeats 2 --init none --resolution 16 --name one".split()
    with pytest.raises(ValueError, match="^one video at a time cannot be mixed: .*$"):
        finetune.main(["toy", "--data", here, *SMALL, *flags])


def test_from_scratch_with_validation(here):
    flags = "--init none --name scratch --validate 1 --memory less --clip-grad 1".split()
    flags += "--epochs 2 --warmup 1 --resolution 16".split()
    finetune.main(["toy", "--data", here, *SMALL, *flags])
    lines = [json.loads(line) for line in open("runs/scratch/log.jsonl")]
    assert [line["step"] for line in lines if "top1" in line] == [2]  # not after the last epoch
    small = losses("scratch")[1]  # logits at the start
    assert small == pytest.approx(math.log(12), abs=0.05)


# ------------------------------------------------------------------------------------ user errors


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--init nowhere.pt", "nowhere.pt"),
        ("--init none --eval-only", "none has no trained head"),
        ("--init runs/pretrain-toy/checkpoint.pt --eval-only", "no trained head"),
        ("--shots 9", "--shots 9, but class"),
        ("--epochs 2 --warmup 2", "--warmup 2"),
        ("--resolution 60", "60"),
        ("--size tiny", "leave it out"),
        ("--test-splits same.txt --splits same.txt", "1 videos are both .*--test-splits"),
    ],
)
def test_mistakes_are_told_in_one_line(here, flags, message):
    with open("same.txt", "w") as file:
        file.write("Pulse/v_Pulse_g01_c01.avi 1\n")
    common = ["toy", "--data", here, "--name", "mistake", "--batch", "6", "--shots", "0"]
    with pytest.raises(ValueError, match=message) as caught:
        finetune.main([*common, *flags.split()])
    assert "\n" not in str(caught.value)


def test_evaluation_refuses_other_classes_and_half_a_classifier(here, tmp_path):
    state = torch.load("runs/finetune-toy/checkpoint.pt", weights_only=True)
    path = tmp_path / "other.pt"
    flags = ["toy", "--data", here, "--eval-only", "--init", str(path), "--name", "other"]

    def refused(words):
        torch.save(state, path)
        with pytest.raises(ValueError, match=words):
            finetune.main(flags)

    state["config"]["classes"].reverse()
    refused("another order")
    state["config"]["classes"].reverse()
    norm = state["model"].pop("fc_norm.weight")
    refused("no trained head with its norm")
    state["model"]["fc_norm.weight"] = norm
    for part in ("head.weight", "head.bias"):
        state["model"][part] = state["model"][part][:7]
    state["config"]["model"]["classes"] = 7
    del state["config"]["classes"][7:]
    refused("7 classes, the videos have 12")


def test_overlap_and_labels_are_checked(tmp_path):
    def parts(train, test):
        for name, text in (("train.txt", train), ("test.txt", test)):
            (tmp_path / name).write_text(text)
        lists = dict(splits=str(tmp_path / "train.txt"), test_splits=str(tmp_path / "test.txt"))
        return finetune.read_parts(Config(data=str(tmp_path), **lists), "own")

    for name in "abcd":
        (tmp_path / f"{name}.avi").write_bytes(b"")
    os.symlink(tmp_path / "b.avi", tmp_path / "link.avi")
    train, test = parts("a.avi 0\nb.avi 2\n", "c.avi 1\n")
    assert train.classes == test.classes == ["0", "1", "2"]
    for same in ("b.avi", "link.avi"):
        with pytest.raises(ValueError, match="1 videos are both training and test videos"):
            parts("a.avi 0\nb.avi 1\n", f"{same} 1\nc.avi 0\n")
    with pytest.raises(ValueError, match="no label for the test video .*c.avi"):
        parts("a.avi 0\nb.avi 1\n", "c.avi\n")
    with pytest.raises(ValueError, match="label 3, training videos have none over 1"):
        parts("a.avi 0\nb.avi 1\n", "c.avi 3\n")
    with pytest.raises(ValueError, match="--data is missing"):
        finetune.read_parts(Config(), "k400")


def test_shots_are_balanced_and_drawn_by_the_seed():
    split = Split([f"{i}.avi" for i in range(60)], [i % 3 for i in range(60)], ["a", "b", "c"])
    first = finetune.draw_shots(split, 4, 0)
    assert Counter(first.labels) == {0: 4, 1: 4, 2: 4} and len(set(first.paths)) == 12
    assert finetune.draw_shots(split, 4, 0) == first != finetune.draw_shots(split, 4, 1)
    labels = dict(zip(split.paths, split.labels, strict=True))
    assert [labels[path] for path in first.paths] == first.labels
    assert finetune.draw_shots(split, 0, 0) is split


def test_strange_names_are_kept_and_nothing_is_written_outside_of_the_run(
    toy, tmp_path, monkeypatch, capsys
):
    names = ["=SUM(1)", "-1", "new\nline", 'quo"te', "com,ma", "$x$", "--init", "Ünï", "\\", ";"]
    videos = read_split(toy).paths
    for number, name in enumerate(names):
        for part, video in (("train", videos[number]), ("test", videos[number + 10])):
            (tmp_path / part / name).mkdir(parents=True)
            shutil.copy(video, tmp_path / part / name / f"{part}\n$.avi")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    flags = f"--data {tmp_path}/train --test-data {tmp_path}/test --init none --name r --batch 10"
    finetune.main(
        ["toy", *flags.split(), *"--shots 0 --epochs 1 --warmup 0 --resolution 16".split()]
    )
    new = {path for path in tmp_path.rglob("*") if before.get(path) != path.stat().st_mtime_ns}
    assert all(path.is_relative_to(tmp_path / "here") for path in new)
    rows, test = visualize.read_predictions("runs/r/predictions.csv"), read_split(tmp_path / "test")
    assert [row["path"] for row in rows] == [str(path) for path in test.paths] and len(rows) == 10
    assert [row["label"] for row in rows] == [test.classes[label] for label in test.labels]
    assert os.path.getsize("runs/r/classes.png") > 1000
    monkeypatch.setattr("sys.argv", ["finetune.py", "--name", "r", "--predict", str(test.paths[0])])
    capsys.readouterr()
    engine.cli(finetune.main)
    assert "\n$" not in capsys.readouterr().out  # the newline of the name is escaped


@pytest.mark.parametrize("flags", ["", "--resume", "--eval-only", "--predict a.avi"])
def test_no_code_in_a_checkpoint_runs(toy, tmp_path, monkeypatch, flags):
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    monkeypatch.chdir(tmp_path)
    name = "finetune-toy" if flags else "pretrain-toy"
    os.makedirs(f"runs/{name}")
    top = dict(stage=name.split("-")[0], step=0, model={"a": torch.ones(2)}, optimizer=Attack())
    torch.save(top, f"runs/{name}/checkpoint.pt")
    with pytest.raises(ValueError, match=rf"runs/{name}/checkpoint.pt.*would run"):
        finetune.main(["toy", "--data", str(toy), *flags.split()])
    assert not (tmp_path / "ran").exists()


def test_presets_are_the_papers():
    # Table 10, Appendix B, base model: epochs, batch, base lr, layer decay, drop path, views.
    expected = {
        "ucf101": (100, 128, 5e-4, 0.7, 0.2, 5, 3),
        "hmdb51": (50, 128, 1e-3, 0.7, 0.2, 10, 3),
        "ssv2": (40, 512, 5e-4, 0.75, 0.1, 2, 3),
        "k400": (75, 512, 1e-3, 0.75, 0.1, 5, 3),
    }
    for preset, numbers in expected.items():
        _, cfg = engine.parse_config(Config, [preset], "", PRESETS)
        optimisation = (cfg.epochs, cfg.batch, cfg.base_lr, cfg.layer_decay, cfg.drop_path)
        assert (*optimisation, cfg.clips, cfg.crops) == numbers, preset
        assert cfg.flip == (preset != "ssv2") and (cfg.operations, cfg.magnitude) == (4, 7)
        assert (cfg.warmup, cfg.repeats, cfg.smoothing, cfg.mixup, cfg.cutmix) == (
            5,
            2,
            0.1,
            0.8,
            1,
        )
        cfg, _, _ = settle_clips(cfg, preset, {}, "")
        stride = dict(ucf101=4, hmdb51=2, ssv2=4, k400=4)[preset]
        sampling = "uniform" if preset == "ssv2" else "dense"
        assert clip_flags(cfg) == (16, stride, sampling, 224, "base", (2, 16, 16), "1d")
        assert cfg.sampling in SAMPLING
