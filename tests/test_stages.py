"""The scripts through their mains, on a small toy set: files left behind, resume, accumulation, processes, mistakes."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import data
import engine
import pretrain
import visualize
from masking import tube_mask
from model import VideoMAE, patchify, unpatchify

TINY = "--epochs 3 --batch 8 --micro 4 --repeats 1 --warmup 0.5 --decoder-depth 1 --precision fp32".split()
TINY += "--workers 0 --log-every 1 --normalize".split()


@pytest.fixture
def here(toy, tmp_path, monkeypatch):
    """An empty working directory; the toy set's path."""
    monkeypatch.chdir(tmp_path)
    return str(toy)


def losses(name):
    lines = [json.loads(line) for line in open(f"runs/{name}/log.jsonl")]
    return {line["step"]: line["loss"] for line in lines if "step" in line}


def test_vectors_and_the_mask_token_do_not_decay(here, monkeypatch):
    seen = []

    def stop(groups, **kwargs):
        seen.extend(groups)
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.optim, "AdamW", stop)
    with pytest.raises(KeyboardInterrupt):
        pretrain.main(["--data", here, *TINY])
    decay, plain = seen
    assert decay["weight_decay"] == 0.05 and plain["weight_decay"] == 0
    assert all(p.ndim == 2 for p in decay["params"])
    assert [tuple(p.shape) for p in plain["params"] if p.ndim > 1] == [(1, 1, 96)]  # the mask token
    model = VideoMAE("toy", decoder_depth=1)
    assert len(decay["params"]) + len(plain["params"]) == len(list(model.parameters()))


def test_pretrain_then_visualize(here, capsys, monkeypatch):
    pretrain.main(["--data", here, *TINY])
    for name in ("checkpoint.pt", "log.jsonl", "loss.png", "reconstruction.png"):
        assert os.path.getsize(f"runs/pretrain-toy/{name}") > 1000
    first = json.loads(open("runs/pretrain-toy/log.jsonl").readline())
    assert first["config"]["model"]["decoder_depth"] == 1 and first["predict_nothing"] == pytest.approx(1, abs=0.02)
    lines = [json.loads(line) for line in open("runs/pretrain-toy/log.jsonl")][1:]
    assert [line["step"] for line in lines] == list(range(1, 10))
    peak, floor = 2.4e-2 * 8 / 256, 4.8e-3 * 8 / 256
    assert [line["lr"] for line in lines] == [data.cosine_lr(step, 9, 1, peak, floor) for step in range(9)]
    capsys.readouterr()

    video = f"{here}/Pulse/v_Pulse_g01_c01.avi"
    for mask in ("tube", "random", "frame"):
        visualize.main(["--videos", video, video, "--mask", mask, "--ratios", "0.75", "--out", f"{mask}.png"])
        assert "75% masked: model" in capsys.readouterr().out
    visualize.main(["--videos", video, "--stats", "oracle", "--out", "oracle.png", "--gif", "moving.gif"])
    assert "nothing" in capsys.readouterr().out
    assert Image.open("oracle.png").width > Image.open("tube.png").width / 2
    seen = []
    monkeypatch.setattr(visualize, "save_columns", lambda images, rows, out: seen.extend(images))
    visualize.main(["--videos", video, "--stats", "both", "--ratios", "0.75", "--out", "both.png"])
    assert [title for title, *_ in seen] == ["original", "75% masked", "reconstruction", "untrained model",
                                             "reconstruction", "predict nothing", "untrained model"]  # fmt: skip
    assert all((seen[i][2] != seen[i + 1][2]).any() for i in (2, 5))  # the untrained model is another one
    assert ["oracle" in note for _, note, _ in seen] == [False] * 4 + [True] * 3
    scores, oracle = (json.load(open(f"{name}-psnr.json"))["psnr"]["75%"] for name in ("both", "oracle"))
    for key, value in oracle.items():  # the same under other names, but for what needs no statistics
        assert value == scores[key if key.startswith(("nearest", "mean")) else f"oracle {key}"]
    assert scores["oracle untrained"] > scores["untrained"] + 1  # what the leak gives a model that knows nothing
    for key in ("model", "mean"):  # of the whole, what the still and the moving places have is a part
        assert min(scores[f"{key} still"], scores[f"{key} moving"]) - 1 < scores[key]
    with Image.open("moving.gif") as gif:
        assert gif.n_frames == 8
    pretrain.main(["--data", here, "--resume", *TINY])  # nothing left to do


def test_accumulation_and_repeats(here, monkeypatch):
    monkeypatch.setattr(visualize, "main", lambda argv: None)
    pretrain.main(["--data", here, "--name", "micro", *TINY])
    pretrain.main(["--data", here, "--name", "whole", *TINY, "--micro", "8"])
    pretrain.main(["--data", here, "--name", "two", *TINY, "--repeats", "2"])
    a, b = losses("micro"), losses("whole")
    assert all(a[step] == pytest.approx(b[step], rel=1e-4) for step in a)
    assert list(losses("two")) == list(a) and losses("two") != a


def test_workers_start_where_processes_cannot_fork(here, train):
    """macOS and newer Pythons do not fork: all that a worker needs must survive pickling."""
    train(1, "pretrain", "--data", here, *TINY, "--workers", "1", "--epochs", "1", start="spawn")


@pytest.mark.parametrize(
    "flags",
    ["--target center", "--target double", "--cross --decoder-mask 0.5 --precision bf16",
     "--mask frame --loss l1 --precision fp16",
     "--mask random --no-normalize --checkpointing",
     "--positions 3d --clip-grad 0.1 --precision bf16 --flip --beta2 0.9 --weight-decay 0.1"],
)  # fmt: skip
def test_options_train_and_draw(here, flags):
    pretrain.main(["--data", here, *TINY, *flags.split(), "--epochs", "1"])
    assert all(np.isfinite(list(losses("pretrain-toy").values())))


def short_run(toy, patch, *flags):
    """The weights after three steps in the working directory, without figures."""
    patch.setattr(visualize, "main", lambda argv: None)
    patch.setattr(visualize, "plot_log", lambda log, out: None)
    pretrain.main(["--data", str(toy), *TINY, "--epochs", "1", "--warmup", "0", *flags])
    return engine.load_checkpoint("runs/pretrain-toy/checkpoint.pt", "pretrain")["model"]


@pytest.fixture(scope="module")
def plain(toy, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("plain"))
        return short_run(toy, patch)


@pytest.mark.parametrize(
    "flags",
    ["--stride 1", "--flip", "--beta2 0.5", "--weight-decay 100", "--clip-grad 1e-6", "--seed 1", "--mask random",
     "--ratio 0.5", "--base-lr 1e-3", "--loss l1", "--positions 1d", "--decoder-depth 2",
     "--cross", "--decoder-mask 0.5"],
)  # fmt: skip
def test_every_option_changes_what_is_learned(here, plain, flags, monkeypatch):
    changed = short_run(here, monkeypatch, *flags.split())
    assert any(not torch.equal(plain[key], changed[key]) for key in plain if key in changed)


def test_presets_hold_the_published_recipes():
    table = {  # epochs, batch, base lr, mask ratio, stride: paper Table 9 and Appendix B
        "ssv2": (800, 1024, 1.5e-4, 0.9, 2),
        "k400": (800, 1024, 1.5e-4, 0.9, 4),
        "ucf101": (3200, 192, 3e-4, 0.75, 4),
        "hmdb51": (4800, 192, 3e-4, 0.75, 2),
    }
    for name, row in table.items():
        _, cfg = engine.parse_config(pretrain.Config, [name], "", pretrain.PRESETS)
        assert (cfg.epochs, cfg.batch, cfg.base_lr, cfg.ratio, cfg.stride) == row
        assert (cfg.size, cfg.frames, cfg.resolution, cfg.cube, cfg.mask) == ("base", 16, 224, (2, 16, 16), "tube")
        assert (cfg.warmup, cfg.min_lr, cfg.beta2, cfg.weight_decay, cfg.flip) == (40, 1e-5, 0.95, 0.05, name == "k400")


# figures


def tiny_model(**kwargs):
    torch.manual_seed(0)
    return VideoMAE("toy", (8, 64, 64), (2, 8, 8), **kwargs).eval()


@pytest.mark.parametrize("target", ["clip", "center", "double"])
def test_figures_do_not_leak_hidden_pixels(target):
    """With visible statistics, changing what is hidden changes nothing but the original; with oracle it does."""
    model = tiny_model(target=target)
    frames = 16 if target == "double" else 8
    video = torch.randint(0, 256, (1, frames, 3, 64, 64), dtype=torch.uint8)
    mask = tube_mask(1, (4, 8, 8), 0.75)
    cubes = patchify(video, (frames // 4, 8, 8))
    other = unpatchify(torch.where(mask[:, :, None], 255 - cubes // 2, cubes), (4, 8, 8), (frames // 4, 8, 8))
    if target == "double":
        other[:, 1::2] = 7  # the encoder sees every second frame only: the others are hidden
    for stats, same in (("visible", True), ("oracle", False)):
        a, b = (visualize.reconstruct(model, v, mask, stats) for v in (video, other))
        hidden = a["hidden"]
        assert torch.allclose(a["model"][hidden], b["model"][hidden], atol=1e-5) == same
        assert all(torch.equal(a[key], b[key]) for key in ("masked", "nearest", "mean", "hidden"))
        assert (a["masked"][hidden] == 0.5).all() and not torch.equal(a["original"], b["original"])
        assert torch.equal(a["nothing"], b["nothing"]) == same  # what an empty prediction gets from oracle statistics
        assert torch.equal(a["model"][~hidden], a["original"][~hidden])  # visible cubes are pasted in


def test_psnr_and_baselines():
    model = tiny_model(normalize=False)
    video = torch.full((1, 8, 3, 64, 64), 128, dtype=torch.uint8)
    video[:, :, 0] = 50
    result = visualize.reconstruct(model, video, tube_mask(1, (4, 8, 8), 0.75))
    for key in ("nearest", "mean"):  # one colour everywhere: the baselines are perfect
        torch.testing.assert_close(result[key], result["original"])
    result["model"] = result["original"] + 0.1
    assert visualize.psnr(result, "model") == pytest.approx(20, abs=1e-3)


# mistakes: one clear line, exit code 2


@pytest.mark.parametrize(
    "stage, flags, words",
    [
        (pretrain, "ucf101", "--data is missing"),
        (pretrain, "ucf101 --data texts", "--splits"),
        (pretrain, "ucf101 --data TOY --epochs 10", "--warmup"),
        (pretrain, "--data TOY --batch 8 --cube 2 8", "three sides"),
        (pretrain, "--data TOY --batch 8 --ratio nan", "ratio nan"),
        (pretrain, "--data TOY --stride 0", "at least 1"),
        (pretrain, "--data TOY --workers -1", "at least 0"),
        (visualize, "--checkpoint other.pt --out no/x.png", "other.pt"),
        (pretrain, "--data nowhere", "nowhere"),
        (pretrain, "--data empty", "no videos"),
        (pretrain, "--data TOY --splits nowhere", "nowhere"),
        (pretrain, "--data texts --batch 4 --workers 0", "texts/"),
        (pretrain, "--data TOY --batch 500", "500"),
        (pretrain, "--data TOY --batch 8 --ratio 1", "ratio 1.0"),
        (pretrain, "--data TOY --batch 8 --resolution 60", "60"),
        (pretrain, "--data TOY --target center --mask random", "--mask tube"),
        (pretrain, "--data TOY --target double --stride 3", "even --stride"),
        (pretrain, "--data TOY --decoder-mask 0.5 --mask random", "--mask tube"),
        (pretrain, "--data TOY --batch 8 --decoder-mask 0.3", "not 0.3 of 4x6x6"),
        (pretrain, "--wiggle 3", "--wiggle"),
        (visualize, "--checkpoint other.pt", "other.pt"),
        (visualize, "--checkpoint none.pt", "none.pt"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(here, capfd, monkeypatch, stage, flags, words):
    os.makedirs("empty")
    os.makedirs("texts")
    for i in range(12):
        open(f"texts/{i}.avi", "w").write("not a video")
    torch.save({"model": {}}, "other.pt")
    monkeypatch.setattr("sys.argv", ["stage", *flags.replace("TOY", here).split()])
    with pytest.raises(SystemExit) as stop:
        engine.cli(stage.main)
    assert stop.value.code == 2
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ") and words in last


def test_a_mistake_in_a_worker_is_one_line_too(here):
    os.makedirs("texts")
    for i in range(12):
        open(f"texts/{i}.avi", "w").write("not a video")
    command = [sys.executable, pretrain.__file__, "--data", "texts", "--batch", "4", "--workers", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "texts/" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


def test_a_run_is_not_overwritten(here, monkeypatch):
    monkeypatch.setattr(visualize, "main", lambda argv: None)
    pretrain.main(["--data", here, *TINY, "--epochs", "1"])
    with pytest.raises(ValueError, match="--resume"):
        pretrain.main(["--data", here, *TINY, "--epochs", "1"])
    with pytest.raises(ValueError, match="epochs"):
        pretrain.main(["--data", here, "--resume", *TINY])


def test_unreadable_videos_are_counted_and_named_after_a_resume_too(here, capsys, monkeypatch):
    monkeypatch.setattr(visualize, "main", lambda argv: None)
    os.makedirs("mixed")
    for i in range(30):
        if i == 7:
            open(f"mixed/{i:02}.avi", "w").write("not a video")
            continue
        video = np.stack([np.full((72, 72, 3), (5 * i + k) % 256, np.uint8) for k in range(20)])
        data._write_video(f"mixed/{i:02}.avi", video)
    command = ["--data", "mixed", *TINY, "--batch", "10", "--micro", "10", "--epochs", "1"]
    for again in ([], ["--resume"]):  # with nothing left to do
        pretrain.main([*command, *again])
        assert json.loads(open("runs/pretrain-toy/log.jsonl").read().splitlines()[-1])["unreadable"] == 1
        said = capsys.readouterr().out
        assert "left out, unreadable: mixed/07.avi: Invalid data" in said and "1 unreadable videos, 0 steps" in said
