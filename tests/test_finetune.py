"""Fine-tuning: mixing, learning rates, evaluation, and the stage through its main."""

import csv
import glob
import json
import math
import os
import shutil
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path

import av
import films
import numpy as np
import pytest
import torch
from conftest import draw_nothing

import finetune
import pretrain
import visualize
from data import SAMPLING, Split, read_split
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
    groups = finetune.make_optimizer(model, Config(layer_decay=0.7)).param_groups
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
    groups = finetune.make_optimizer(model, Config(layer_decay=1.0)).param_groups
    assert all(group["scale"] == 1 for group in groups)


def test_accuracies_by_hand():
    mean = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.5, 0.4, 0.1], [0.1, 0.2, 0.7]])
    away = torch.zeros(4, 2, 3)  # from a view to the other
    away[1, :, 1], away[1, :, 2] = torch.tensor([0.2, -0.2]), torch.tensor([-0.2, 0.2])
    away[2, :, 0], away[2, :, 1] = torch.tensor([0.2, -0.2]), torch.tensor([-0.2, 0.2])
    result = evaluate.accuracies(mean[:, None] + away, [0, 1, 1, 0])  # views: 0 0, 1 2, 0 1, 2 2
    assert result == pytest.approx(dict(top1=50.0, top5=100.0, class_mean=50.0, view=50.0))
    uneven = evaluate.accuracies(mean[:, None], [0, 0, 0, 2])
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
    views = evaluate.WindowViews(paths, cfg)
    found, errors = evaluate.each_video(model, views, cfg, torch.device("cpu"))
    assert not errors and model.seen == 30
    scores = torch.stack([*found.values()])
    assert scores.shape == (5, 6, 3)
    each = [Counting()(views[i]).softmax(dim=1) for i in range(5)]
    assert torch.allclose(scores, torch.stack(each))


# ------------------------------------------------------------------------------ what the model gets


ABOUT = dict(size="small", cube=[2, 16, 16], video_size=[32, 96, 96], stride=3, sampling="uniform")


def clip_flags(cfg):
    return (cfg.frames, cfg.stride, cfg.sampling, cfg.resolution, cfg.size, cfg.cube, cfg.positions)


def test_clips_are_those_of_the_weights_unless_a_flag_says_otherwise(capsys):
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
    capsys.readouterr()
    assert settled(["hmdb51", "--resolution", "112"], ABOUT, trained=True)[0] == theirs
    lost = (
        "W gets clips as in its training, not --stride 2, --resolution 112 of the preset or yours"
    )
    assert lost in capsys.readouterr().out
    assert settled(own, ABOUT, trained=True)[0] == theirs and not capsys.readouterr().out
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
    draw_nothing(monkeypatch)
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
    assert all(row["top5"].split(";")[0] == row["prediction"] for row in rows)
    shares = [[float(share) for share in row["probabilities"].split(";")] for row in rows]
    assert all(len(row) == 5 and sum(row) <= 1 for row in shares)
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
    more = "--name other/clips --resolution 32 --stride 1 --augment official".split()
    finetune.main(["toy", "--data", here, *SMALL, *more])
    seen, WindowViews = [], evaluate.WindowViews

    def views(videos, cfg):
        seen.append((cfg.frames, cfg.stride, cfg.resolution, cfg.augment))
        return WindowViews(videos, cfg)

    monkeypatch.setattr(evaluate, "WindowViews", views)
    again = ["--name", "other/clips"]
    finetune.main([*again, "--data", here, "--eval-only", "--clips", "1", "--crops", "1"])
    video = f"{here}/Pulse/v_Pulse_g01_c01.avi"
    finetune.main([*again, "--predict", video, "--stride", "2", "--resolution", "48"])
    assert seen == [(8, 1, 32, "official")] * 2


def test_unreadable_test_videos_are_all_named_and_the_others_are_scored_once(
    here, tmp_path, monkeypatch
):
    flags = ["toy", "--data", here, "--name", "mended", "--test-splits", str(tmp_path / "list.txt")]
    test = read_split(here, train=False)
    videos = [shutil.copy(path, tmp_path) for path in test.paths[:5]]
    lines = [f"{path} {label}\n" for path, label in zip(videos, test.labels, strict=False)]
    (tmp_path / "list.txt").write_text("".join(lines))
    whole = [open(path, "rb").read() for path in videos]
    for path in videos[1:4:2]:
        open(path, "wb").write(b"no video")
    scored, score = [], evaluate.WindowViews.__getitem__
    monkeypatch.setattr(
        evaluate.WindowViews, "__getitem__", lambda *i: scored.append(i[1]) or score(*i)
    )
    words = r"^2 videos cannot be read: [^\n]*then --eval-only\)$"
    with pytest.raises(ValueError, match=words) as caught:
        finetune.main([*flags, *SMALL])  # the training of finetune-toy
    assert all(path in str(caught.value) for path in videos[1:4:2])
    assert sorted(scored) == [*range(5)]
    assert not os.path.exists("runs/mended/results.json")
    flags += "--eval-only --clips 1 --precision fp32".split()
    open(videos[1], "wb").write(whole[1])
    with pytest.raises(ValueError, match="^1 videos cannot be read: "):
        finetune.main(flags)
    assert scored[5:] == [1, 3]
    os.utime(videos[0])  # another video
    with pytest.raises(ValueError, match="^1 videos cannot be read: "):
        finetune.main(flags)
    assert scored[7:] == [0, 3]
    open(videos[3], "wb").write(whole[3])
    for more, expected in (([], [3]), (["--crops", "1"], [*range(5)]), ([], [*range(5)])):
        del scored[:]
        finetune.main([*flags, *more])
        assert scored == expected and not os.path.exists("runs/mended/scores.pt")
    rows = {Path(row["path"]).name: row["top5"] for row in predictions("finetune-toy")}
    assert [row["top5"] for row in predictions("mended")] == [rows[Path(p).name] for p in videos]


def test_results_are_kept_for_the_same_video_weights_and_flags_only(tmp_path, capsys):
    class Numbers(list):
        """Item i: a clip of value i, or a signal."""

        def __getitem__(self, i):
            asked.append(i)
            if i == self.stop:
                os.kill(os.getpid(), number)
            return torch.full((1, 1), float(i))

    class Twice(torch.nn.Module):
        def forward(self, clips):
            return self.weight * clips

    model, asked = Twice(), []
    model.weight = torch.nn.Parameter(torch.tensor(2.0), requires_grad=False)
    cfg = Config(**finetune.TOY_CLIPS, sampling="dense", precision="fp32", workers=0)

    def run(keys, stop=9, cfg=cfg):
        asked.clear()
        views = Numbers(keys)
        views.keys, views.stop = keys, stop
        how = (cfg, torch.device("cpu"), tmp_path / "kept.pt", lambda out: out)
        found, errors = evaluate.each_video(model, views, *how)
        assert errors == {} and {i: float(x) for i, x in found.items()} == {
            i: i * float(model.weight) for i in range(3)
        }
        return list(asked)

    usual = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    for number, handler in usual.items():
        signal.signal(number, handler)  # earlier tests that failed on purpose may have left others
        (tmp_path / "kept.pt").unlink(missing_ok=True)
        with pytest.raises(SystemExit) as caught:
            run(["a 1", "b 1", "c 1"], stop=1)
        assert caught.value.code == 128 + number
        out = capsys.readouterr().out
        assert run(["a 1", "b 1", "c 1"]) == [1, 2]
    assert out.count("\n") == 1 and "kept.pt keeps 1 videos" in out
    (tmp_path / "kept.pt").rename(tmp_path / "kept.1.pt")  # that of another process
    assert run(["a 1", "b 2", "c 1"]) == [1]
    model.weight += 1
    assert run(["a 1", "b 2", "c 1"]) == [0, 1, 2]
    assert run(["a 1", "b 2", "c 1"], cfg=replace(cfg, crops=1)) == [0, 1, 2]
    model.weight += math.nan
    views = Numbers(["a 1"])
    views.keys, views.stop = ["a 1"], 9
    found, errors = evaluate.each_video(model, views, cfg, torch.device("cpu"))
    assert not found and errors == {0: "a 1: output not finite, try --precision fp32"}
    model.weight.fill_(3)
    (tmp_path / "kept.pt").write_bytes(b"broken")
    assert run(["a 1", "b 2", "c 1"]) == [0, 1, 2]
    file = tmp_path / "a.avi"
    file.write_bytes(b"12")
    before = evaluate.identity(file)
    os.utime(file, (1, 1))
    assert before != evaluate.identity(file) and evaluate.identity(tmp_path / "none")


# ------------------------------------------------------------------------------------- prediction


def predicted(name="finetune-toy"):
    return list(csv.DictReader(open(f"runs/{name}/predicted.csv", newline="")))


def test_predict_takes_files_folders_globs_and_lists_and_goes_on_past_what_is_broken(
    here, tmp_path, capsys
):
    test = read_split(here, train=False)
    for name in (
        "f/deep/a.avi",
        "f/._a.avi",
        "f/x.jpg",
        "g1.avi",
        "g2.avi",
        "h/l[1].avi",
        "film",
        "h/l1.avi",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(test.paths[0], tmp_path / name)
    (tmp_path / "broken.avi").write_bytes(b"no video")
    (tmp_path / "no list.txt").write_text("a.avi 0 1 2\n")
    (tmp_path / "empty").mkdir()
    names = [os.path.relpath(path, here) for path in test.paths[:2]]
    (tmp_path / "testlist.txt").write_text("".join(f"{name}\n" for name in names))  # no labels
    (tmp_path / "h" / "labelled.csv").write_text("path,label\nl[1].avi,77\nmissing.avi,1\n")
    given = "f g*.avi h/l[1].avi film broken.avi nowhere.avi empty".split()
    given += ["no list.txt", "testlist.txt", "h/labelled.csv", "*.nothing"]
    given = [str(tmp_path / name) for name in given]
    with pytest.raises(SystemExit) as caught:
        finetune.main(["toy", "--clips", "1", "--data", here, "--predict", *given])
    assert caught.value.code == 1
    videos = "f/deep/a.avi g1.avi g2.avi h/l[1].avi film".split()
    videos = [*(str(tmp_path / name) for name in videos), *map(str, test.paths[:2])]
    rows = predicted()
    assert [row["path"] for row in rows] == [*videos, str(tmp_path / "h/l[1].avi")]
    out, err = capsys.readouterr()
    assert "passed over" in out and "wrote runs/finetune-toy/predicted.csv: 8" in out
    for name in ("broken", "nowhere", "empty", "no list", "missing", "*.nothing"):
        assert f"{tmp_path}/{name}" in err.replace("/h/", "/"), name
    assert "6 cannot be read" in err
    first = {row["path"]: row for row in predictions("finetune-toy")}[str(test.paths[0])]
    numbers = lambda row: [float(number) for number in row["probabilities"].split(";")]
    for row in rows:
        if row["path"] != videos[-1]:
            assert numbers(row) == pytest.approx(numbers(first), abs=2e-6)  # six digits are written
            assert row["top5"] == first["top5"]
        assert row["prediction"] == row["top5"].split(";")[0]
        assert row["probability"] == row["probabilities"].split(";")[0]
        assert {*row["top5"].split(";")} < {*test.classes}
    assert sum(line.split("  ")[-1] in test.classes for line in out.splitlines()) == 8 * 5
    assert not glob.glob("runs/finetune-toy/predicted-*")


def test_a_prediction_that_is_stopped_goes_on_where_it_was(here, monkeypatch, capsys):
    command = ["toy", "--clips", "1", "--data", here, "--predict", f"{here}/Pulse"]
    finetune.main(command)
    whole, classifier, scored, last = predicted(), finetune.Classifier.forward, [], [2]

    def forward(self, clips):
        scored.append(clips)
        if len(scored) == last[0]:
            raise KeyboardInterrupt
        return classifier(self, clips)

    monkeypatch.setattr(finetune.Classifier, "forward", forward)
    with pytest.raises(SystemExit) as stop:
        finetune.main(command)
    assert stop.value.code == 130 and ".pt keeps 1 videos" in capsys.readouterr().out
    last[0] = 0
    finetune.main([*command[:-1], f"{here}/Turn2"])  # another command does not change that
    scored.clear()
    finetune.main(command)
    assert predicted() == whole and len(scored) == len(whole) - 1


def test_a_film_is_predicted_window_by_window_from_its_own_frames(here, tmp_path, monkeypatch):
    """Each window is as a film of its own; frames are lossless, 25 per second."""
    frames = torch.randint(0, 256, (45, 32, 32, 3), dtype=torch.uint8).numpy()

    def write(name, images):
        with av.open(str(tmp_path / name), "w") as container:
            stream = container.add_stream("ffv1", rate=25)
            stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
            for image in images:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(stream.encode())
        return str(tmp_path / name)

    film = write("film.avi", frames)
    parts = [write(f"{k}.avi", frames[20 * k : 20 * k + 20]) for k in range(3)]
    flags = ["--predict", film, "--every"]
    finetune.main([*flags, "0.8"])
    rows = predicted()
    assert [row["start"] for row in rows] == ["0", "0.8", "1.6"]
    finetune.main(["--predict", *parts])
    expected = predicted()
    assert {row["start"] for row in expected} == {"0"}
    assert [row["probabilities"] for row in rows] == [row["probabilities"] for row in expected]
    assert len({row["probabilities"] for row in rows}) == 3
    windows = evaluate.cut(film, 0.1)
    assert [window.first for window in windows[:4]] == [0, 2, 5, 7] and len(windows) == 18
    assert sum(window.frames for window in windows) == 45
    for whole in (1e9, math.inf):
        assert evaluate.cut(film, whole) == [(film, 0, 0, 45)]
    assert evaluate.cut(film, 1e-9)[-1][1:] == (pytest.approx(44 / 25), 44, 1)
    with monkeypatch.context() as patch:  # 1.5 s are 5 windows, not 6 by rounding up
        patch.setattr(evaluate, "length", lambda path: (36, 24.0))
        assert [w.frames for w in evaluate.cut(film, 0.3)] == [7, 7, 7, 7, 8]
    assert evaluate.cut(tmp_path / "gone.avi", 1) == [(tmp_path / "gone.avi", 0, 0, 0)]


def test_a_film_that_must_be_decoded_to_count_is_cut_whole(tmp_path, monkeypatch, capsys):
    """The number of its frames is guessed before it is known."""
    for name, codec in (("a.mpg", "mpeg2video"), ("a.webm", "libvpx")):
        film = films.write(tmp_path / name, codec)  # 60 frames, 25 per second
        windows = evaluate.cut(film, 1.0)
        assert [(w.start, w.first, w.frames) for w in windows] == [
            (0, 0, 25),
            (1, 25, 25),
            (2, 50, 10),
        ]
    monkeypatch.setattr(evaluate, "length", lambda path: (60, 0.0))  # it says no rate
    assert evaluate.cut(film, 1.0) == [(film, 0, 0, 0)]
    assert "says no frame rate" in capsys.readouterr().out


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
    drawn = finetune.draw_shots(read_split(here), 1, 0)
    other = replace(drawn, labels=drawn.labels[::-1])
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="the list of videos was"):
        patch.setattr(finetune, "draw_shots", lambda *how: other)
        finetune.main([*flags, "resumed", "--resume"])


def test_1_and_2_processes_train_alike_and_count_every_test_video_once(here, train):
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
    train(2, "finetune", *flags, "on2")
    curves = [list(losses(name).values()) for name in ("on1", "on2")]
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)
    rows = predictions("on2")
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


def test_every_option_changes_what_is_learned(here, monkeypatch):
    monkeypatch.setattr(finetune, "score_test", lambda *args: None)

    def weights(flags):
        name = flags.replace(" ", "").strip("-") or "plain"
        few = [*SMALL, "--init", "none", "--resolution", "16", *flags.split(), "--name", name]
        finetune.main(["toy", "--data", here, *few])
        return torch.load(f"runs/{name}/checkpoint.pt", weights_only=True)["model"]["head.weight"]

    plain, strong = weights(""), weights("--operations 4")
    seen = [plain, strong, weights("--operations 4 --magnitude 1"), weights("--flip")]
    seen += [weights("--smoothing 0.5"), weights("--erase 1"), weights("--weight-decay 50")]
    assert all(not torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])
    assert torch.equal(plain, weights("--erase 0"))  # its default


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
        ("--stride 0 --sampling uniform", "--sampling dense"),
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


def test_classes_of_weights_and_videos_meet_by_name(here, tmp_path, capsys):
    state = torch.load("runs/finetune-toy/checkpoint.pt", weights_only=True)
    path, test, names = tmp_path / "other.pt", read_split(here, train=False), tmp_path / "names"
    flags = ["toy", "--eval-only", "--init", str(path), "--name", "other", "--clips", "1"]
    few = tmp_path / "few"  # of three of the classes, in a folder of their own
    for video in test.paths[3:6]:
        (few / video.parent.name).mkdir(parents=True)
        shutil.copy(video, few / video.parent.name)

    def results(*data):
        torch.save(state, path)
        finetune.main([*flags, *data])
        return {row["path"].split("/")[-1]: row for row in predictions("other")}

    whole = results("--data", here)
    part = results("--data", str(few), "--test-data", str(few))  # the test part may be all there is
    assert "these videos are of 3 of 12 classes" in capsys.readouterr().out and len(part) == 3
    assert all(row["label"] == whole[name]["label"] for name, row in part.items())
    assert all(row["top5"] == whole[name]["top5"] for name, row in part.items())
    state["config"]["classes"].reverse()  # now other outputs have these names
    again = results("--data", here)
    assert all(row["label"] == whole[name]["label"] for name, row in again.items())
    assert any(row["prediction"] != whole[name]["prediction"] for name, row in again.items())
    state["config"]["classes"].reverse()
    # Numbers are taken as the names of the others, in their order, and a line says so.
    (tmp_path / "list.txt").write_text(f"{test.paths[5]} {test.labels[5]}\n")
    (row,) = results("--data", here, "--test-splits", str(tmp_path / "list.txt")).values()
    assert row["label"] == test.classes[test.labels[5]]
    assert "numbers are taken as names" in capsys.readouterr().out
    state["config"]["classes"] = [f"class {i}" for i in range(12)]
    assert {name: row["top5"] for name, row in results("--data", here).items()} == {
        name: row["top5"] for name, row in whole.items()
    }
    names.write_text("".join(f"{name}\n" for name in test.classes))
    finetune.main(["--init", str(path), "--predict", str(test.paths[5]), "--classes", str(names)])
    assert {*predicted()[0]["top5"].split(";")} < {*test.classes}
    capsys.readouterr()

    def refused(words, *data):
        with pytest.raises(ValueError, match=words) as caught:
            results(*data)
        assert "\n" not in str(caught.value)

    refused("12 classes, these videos have 3", "--data", str(few), "--test-data", str(few))
    state["config"]["classes"] = ["one of another data set", *test.classes[1:]]
    refused("no class is called Slide0", "--data", here)
    (tmp_path / "list.txt").write_text(f"{test.paths[5]} 12\n")
    refused(
        "12 classes, these videos .* 13", "--data", here, "--test-splits", f"{tmp_path}/list.txt"
    )
    state["model"].pop("fc_norm.weight")
    refused("no trained head with its norm", "--data", here)


def test_of_five_classes_no_top_5_is_printed(tmp_path, monkeypatch):
    draw_nothing(monkeypatch)
    for count, said in ((5, False), (6, True)):
        test = Split(["a.avi", "b.avi"], [0, 1], [*"abcdef"[:count]])
        scores = torch.rand(2, 3, count).softmax(dim=2)
        line = evaluate.write_results(tmp_path, test, Config(), scores)
        assert ("top-5" in line) == said and "top-1" in line


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
    with pytest.raises(ValueError, match="there are 2 classes, the test videos have 4"):
        parts("a.avi 0\nb.avi 1\n", "c.avi 3\n")
    train, test = parts("a.avi x\nb.avi y\nd.avi z\n", "c.avi z\n")  # x and y have no test videos
    assert test.labels == [2] and test.classes == train.classes == ["x", "y", "z"]
    for name in ("in/0/a", "in/1/b", "in/2/c", "out/1/d", "wrong/3/e"):  # folders may be numbers
        file = tmp_path / f"{name}.avi"
        file.parent.mkdir(parents=True)
        file.write_bytes(b"")
    train, test = finetune.read_parts(
        Config(data=f"{tmp_path}/in", test_data=f"{tmp_path}/out"), "own"
    )
    assert test.labels == [1] and test.classes == train.classes == ["0", "1", "2"]
    with pytest.raises(ValueError, match="no class is called 3"):
        (tmp_path / "wrong/1").mkdir()
        shutil.copy(tmp_path / "out/1/d.avi", tmp_path / "wrong/1")
        finetune.read_parts(Config(data=f"{tmp_path}/in", test_data=f"{tmp_path}/wrong"), "own")
    with pytest.raises(ValueError, match="the training videos: no class is called w"):
        parts("a.avi x\nb.avi y\n", "c.avi w\n")
    with pytest.raises(ValueError, match="all training videos are of one class, x: two are needed"):
        parts("a.avi x\nb.avi x\n", "c.avi x\n")
    cfg = Config(data=str(tmp_path), eval_only=True, test_splits=f"{tmp_path}/test.txt")
    assert finetune.read_parts(cfg, "own")[1].classes == ["x"]  # of the classes of the weights
    with pytest.raises(ValueError, match="--data is missing"):
        finetune.read_parts(Config(), "k400")


def test_folders_that_are_numbers_meet_lists_of_numbers(tmp_path):
    """By value: sorted as text, folder 10 comes before folder 2."""
    for part, names in (("train", range(1, 13)), ("test", (2, 10, 12))):
        for name in names:
            (tmp_path / part / str(name)).mkdir(parents=True)
            (tmp_path / part / str(name) / f"{part}.avi").touch()
    (tmp_path / "test.txt").write_text("".join(f"{i}/test.avi {i}\n" for i in (2, 10, 12)))
    how = dict(data=f"{tmp_path}/train", test_data=f"{tmp_path}/test")
    parts = [finetune.read_parts(Config(**how, test_splits=splits), "own")
             for splits in (None, f"{tmp_path}/test.txt")]  # fmt: skip
    (tmp_path / "places.txt").write_text("10/test.avi 1\n12/test.avi 3\n")  # in the sorted row
    with pytest.raises(ValueError, match="10/test.avi is listed as 1, not as its folder says"):
        finetune.read_parts(Config(**how, test_splits=f"{tmp_path}/places.txt"), "own")
    # Two lists that count from 0 agree with each other, whatever folders are called.
    for part, names in (("train", range(1, 13)), ("test", (2, 10))):
        lines = [f"{name}/{part}.avi {name - 1}\n" for name in names]
        (tmp_path / f"{part}0.txt").write_text("".join(lines))
    lists = dict(splits=f"{tmp_path}/train0.txt", test_splits=f"{tmp_path}/test0.txt")
    assert finetune.read_parts(Config(**how, **lists), "own")[1].labels == [1, 9]
    for old, new in (("2", "run"), ("10", "in/run")):
        (tmp_path / "train" / new).parent.mkdir(exist_ok=True)
        (tmp_path / "test" / new).parent.mkdir(exist_ok=True)
        (tmp_path / "train" / old).rename(tmp_path / "train" / new)
        (tmp_path / "test" / old).rename(tmp_path / "test" / new)
    for numbers, fit in (((11, 10), True), ((10, 11), False)):  # 10 is in/run, 11 run
        lines = [
            f"{name}/test.avi {i}\n" for name, i in zip(("run", "in/run"), numbers, strict=True)
        ]
        (tmp_path / "names.txt").write_text("".join(lines))
        cfg = Config(**how, test_splits=f"{tmp_path}/names.txt")
        if fit:
            assert finetune.read_parts(cfg, "own")[1].labels == [11, 10]
            continue
        with pytest.raises(ValueError, match="run/test.avi is listed as in/run, not as its folder"):
            finetune.read_parts(cfg, "own")
    for _, test in parts:
        names = {path.parent.name for path in test.paths}
        assert {test.classes[label] for label in test.labels} == names == {"2", "10", "12"}
        assert all(test.classes[label] == path.parent.name
                   for path, label in zip(test.paths, test.labels, strict=True))  # fmt: skip


def test_a_list_is_of_one_part(tmp_path, capsys):
    """--splits names training videos. Test videos in a folder of their own are all taken."""
    for name in ("train/run/a", "train/walk/b", "test/run/a", "test/run/c", "test/walk/b"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{name}.avi").touch()
    (tmp_path / "train.txt").write_text("run/a.avi run\nwalk/b.avi walk\n")
    how = dict(splits=f"{tmp_path}/train.txt", test_data=f"{tmp_path}/test")
    train, test = finetune.read_parts(Config(data=f"{tmp_path}/train", **how), "own")
    assert (len(train.paths), len(test.paths), test.labels) == (2, 3, [0, 0, 1])
    assert "the test videos are all in" in capsys.readouterr().out
    (tmp_path / "numbers.txt").write_text("run/a.avi 1\nwalk/b.avi 0\n")
    numbers = dict(how, splits=f"{tmp_path}/numbers.txt")
    with pytest.raises(ValueError, match="has numbers for classes: list the test videos, too"):
        finetune.read_parts(Config(data=f"{tmp_path}/train", **numbers), "own")
    # Alone, it is of the test videos.
    cfg = Config(**how, eval_only=True)
    assert len(finetune.read_parts(cfg, "own")[1].paths) == 2


def test_classes_without_training_videos_are_named(tmp_path, capsys):
    for name in "abcd":
        (tmp_path / f"{name}.avi").touch()
    (tmp_path / "train.txt").write_text("a.avi 0\nb.avi 2\n")
    (tmp_path / "test.txt").write_text("c.avi 1\nd.avi 2\n")
    lists = dict(splits=f"{tmp_path}/train.txt", test_splits=f"{tmp_path}/test.txt")
    finetune.read_parts(Config(data=str(tmp_path), **lists), "own")
    assert "test videos, but no training videos, are of 1\n" in capsys.readouterr().out


def test_a_head_of_other_classes_is_not_taken(here, capsys):
    """Three outputs for zebra, apple and pear know nothing of run, swim and walk."""
    path = "runs/finetune-toy/checkpoint.pt"
    names = engine.load_checkpoint(path, "finetune")["config"]["classes"]
    for classes, new in ((names, False), (names[::-1], True)):
        cfg = Config(**PRESETS["toy"] | dict(init=path))
        finetune.make_classifier(cfg, "toy", finetune.Path("runs/new"), classes)
        assert ("new (head.weight, head.bias)" in capsys.readouterr().out) == new


def test_another_model_is_evaluated_elsewhere(here, tmp_path):
    shutil.copy("runs/finetune-toy/checkpoint.pt", tmp_path / "other.pt")
    flags = ["toy", "--data", here, "--eval-only", "--init", str(tmp_path / "other.pt")]
    with pytest.raises(ValueError, match="holds another model, whose results would go"):
        finetune.main(flags)
    finetune.main([*flags[:-1], "runs/finetune-toy", "--clips", "1"])  # its own folder


def test_shots_are_balanced_and_drawn_by_the_seed():
    split = Split([f"{i}.avi" for i in range(60)], [i % 3 for i in range(60)], ["a", "b", "c"])
    first = finetune.draw_shots(split, 4, 0)
    assert Counter(first.labels) == {0: 4, 1: 4, 2: 4} and len(set(first.paths)) == 12
    assert finetune.draw_shots(split, 4, 0) == first != finetune.draw_shots(split, 4, 1)
    labels = dict(zip(split.paths, split.labels, strict=True))
    assert [labels[path] for path in first.paths] == first.labels
    assert finetune.draw_shots(split, 0, 0) is split
    split.classes.insert(0, "none")  # labels that begin at 1
    split.labels[:] = [label + 1 for label in split.labels]
    assert Counter(finetune.draw_shots(split, 4, 0).labels) == {1: 4, 2: 4, 3: 4}


def test_held_out_videos_are_a_share_of_each_class_and_films_stay_together():
    names = [f"d/v_{c}_g{g:02}_c{k:02}.avi" for c in "AB" for g in range(10) for k in range(5)]
    split = Split([*map(Path, names), Path("only.avi")], [i // 50 for i in range(101)], [*"abc"])
    train, held = finetune.hold_out(split, 0.1, 0)
    assert Counter(held.labels) == {0: 5, 1: 5} and train.labels.count(2) == 1
    assert sorted(train.paths + held.paths) == sorted(split.paths)
    assert len({path.name[:-8] for path in held.paths}) == 2  # one whole film of each class
    assert finetune.hold_out(split, 0.1, 0) == (train, held) != finetune.hold_out(split, 0.1, 1)
    assert Counter(finetune.hold_out(split, 0.9, 0)[0].labels) == {0: 5, 1: 5, 2: 1}
    same = Split([Path(f"{i}/clip.avi") for i in range(20)], [0] * 20, ["a"])
    assert len(finetune.hold_out(same, 0.25, 0)[1].paths) == 5
    with pytest.raises(ValueError, match="two training videos"):
        finetune.hold_out(Split([Path("a"), Path("b")], [0, 1], ["a", "b"]), 0.5, 0)


def test_with_held_out_videos_test_videos_are_looked_at_once(here, monkeypatch):
    seen, score = [], evaluate.each_video

    def each_video(model, views, *args):
        seen.append({str(window.path) for window in views.windows})
        return score(model, views, *args)

    monkeypatch.setattr(evaluate, "each_video", each_video)
    flags = "--init none --name held --validate 1 --epochs 3 --warmup 1 --resolution 16".split()
    flags += "--shots 2 --hold-out 0.5".split()
    finetune.main(["toy", "--data", here, *SMALL, *flags])
    test, lines = (
        read_split(here, train=False),
        [json.loads(x) for x in open("runs/held/log.jsonl")],
    )
    train, held = finetune.hold_out(finetune.draw_shots(read_split(here), 2, 0), 0.5, 0)
    assert seen == [{*map(str, held.paths)}] * 2 + [{*map(str, test.paths)}]
    assert lines[0]["config"]["videos"] == len(train.paths) == len(held.paths) == 12
    curve = [line for line in lines if "top1" in line]
    assert [line["step"] for line in curve] == [2, 4] and curve[0]["unreadable"] == 0
    with pytest.raises(ValueError, match="hold_out"):
        finetune.main(["toy", "--data", here, *SMALL, *flags, "--resume", "--hold-out", "0.4"])


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
