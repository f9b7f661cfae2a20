"""pretrain.py through its main, on a small toy set: options, processes, resuming, mistakes."""

import json
import os
import signal

import numpy as np
import pytest
import torch
import torch.distributed.run

import pretrain
import visualize
from lib import engine
from lib.weights import read_weights

TINY = "--epochs 3 --batch 8 --micro 4 --repeats 1 --warmup 0.5 --decoder-depth 1 --precision fp32"
TINY += " --frames 4 --resolution 32 --workers 0 --log-every 1 --normalize"
TINY = ["toy", *TINY.split()]  # 9 steps


def losses(name):
    lines = [json.loads(line) for line in open(f"runs/{name}/log.jsonl")]
    return {line["step"]: line["loss"] for line in lines if "step" in line}


def weights(name):
    return engine.load_checkpoint(f"runs/{name}/checkpoint.pt", "pretrain")["model"]


def same(a, b):
    a, b = weights(a), weights(b)
    return all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module")
def whole(toy, tmp_path_factory):
    """A folder in which one uninterrupted training, runs/whole, was drawn."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        pretrain.main([*TINY, "--data", str(toy), "--name", "whole"])
        patch.setattr(visualize, "main", lambda argv: None)
        pretrain.main([*TINY, "--data", str(toy), "--name", "short", "--epochs", "1"])
    return folder


@pytest.fixture
def beside(here, whole, monkeypatch):
    monkeypatch.chdir(whole)
    return here


def test_a_training_leaves_checkpoint_log_curve_and_figure(beside):
    for name in ("checkpoint.pt", "log.jsonl", "loss.png", "reconstruction.png"):
        assert os.path.getsize(f"runs/whole/{name}") > 1000
    assert read_weights("runs/whole/checkpoint.pt")[1]["mask"] == "tube"  # for figures
    lines = [json.loads(line) for line in open("runs/whole/log.jsonl")]
    assert lines[0]["config"]["model"]["decoder_depth"] == 1
    assert lines[1]["constant_loss"] == pytest.approx(1, abs=0.02)
    peak, last = 2.4e-2 * 8 / 256, 4.8e-3 * 8 / 256
    rates = [line["lr"] for line in lines if "lr" in line]
    assert rates == [engine.cosine_lr(step, 9, 1, peak, last) for step in range(9)]


def test_vectors_and_the_mask_token_do_not_decay(here, monkeypatch):
    seen = []

    def stop(groups, **kwargs):
        seen.append(torch.optim.Adam(groups, weight_decay=kwargs["weight_decay"]).param_groups)
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.optim, "AdamW", stop)
    with pytest.raises(KeyboardInterrupt):
        pretrain.main([*TINY, "--data", here])
    decay, plain = seen[0]
    assert decay["weight_decay"] == 0.05 and plain["weight_decay"] == 0
    assert all(p.ndim == 2 for p in decay["params"])
    assert [p.shape for p in plain["params"] if p.ndim > 1] == [(1, 1, 96)]  # the mask token


def test_processes_change_nothing(beside, train):
    """At equal --micro, one, two and four processes give the same curve, and count alike."""
    os.makedirs("one broken")
    for i, path in enumerate(pretrain.prepare.read_split(beside).paths):
        os.symlink(path, f"one broken/{i}.avi")
    os.unlink("one broken/3.avi")
    open("one broken/3.avi", "w").close()
    flags = [*TINY, "--data", "one broken", "--epochs", "1"]
    pretrain.main([*flags, "--micro", "2", "--name", "one"])
    train(2, "pretrain", *flags, "--micro", "2", "--name", "two")
    train(4, "pretrain", *flags, "--micro", "2", "--name", "four")
    expected = weights("one")
    for name in ("two", "four"):
        assert losses(name) == pytest.approx(losses("one"), rel=1e-5)
        assert json.loads(open(f"runs/{name}/log.jsonl").readlines()[-1])["unreadable"] == 1
        for key, value in weights(name).items():
            torch.testing.assert_close(value, expected[key], atol=1e-4, rtol=1e-3)


def test_a_signal_saves_and_resuming_is_exact(beside, monkeypatch, capsys):
    update, steps = pretrain.Run.update, iter(range(1, 100))

    def update_after_a_signal(self, lr):
        if next(steps) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(self, lr)

    with monkeypatch.context() as patch:
        patch.setattr(pretrain.Run, "update", update_after_a_signal)
        with pytest.raises(SystemExit) as stop:
            pretrain.main([*TINY, "--data", beside, "--name", "cut"])
    assert (
        stop.value.code == 143 and "stopped by SIGTERM after step 4 of 9" in capsys.readouterr().out
    )
    pretrain.main([*TINY, "--data", beside, "--name", "cut", "--resume"])
    assert same("cut", "whole") and losses("cut") == losses("whole")


class Killed(BaseException):
    """Nothing catches it: like SIGKILL, it leaves files as they are."""


def die(*args, **kwargs):
    raise Killed


def die_writing(state, file):
    file.write(b"PK\3\4 half a checkpoint")
    file.flush()
    raise Killed


@pytest.mark.parametrize(
    "module, function, replacement, done",
    [(torch, "save", die_writing, 0), (os, "replace", None, 0), (visualize, "plot_log", die, 1)],
    ids=["writing", "renaming", "drawing"],
)  # fmt: skip
def test_killed_while_saving_the_resumed_run_is_the_same(
    beside, module, function, replacement, done, request
):
    name, real = request.node.callspec.id, os.replace
    flags = [*TINY, "--data", beside, "--name", name, "--resume", "--save-minutes", "0"]

    def die_renaming(source, target):
        if str(target).endswith(".pt"):
            raise Killed
        real(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, function, replacement or die_renaming)
        with pytest.raises(Killed):
            pretrain.main(flags)
    path = f"runs/{name}/checkpoint.pt"
    assert (engine.load_checkpoint(path, "pretrain")["step"] if os.path.exists(path) else 0) == done
    pretrain.main(flags)  # the same command again
    assert same(name, "whole")


@pytest.mark.parametrize(
    "flags",
    ["--model center", "--model double", "--model cross --precision bf16",
     "--model cell --frames 8",
     "--mask frame --loss l1 --precision fp16", "--mask random --no-normalize --memory less",
     "--positions 3d --clip-grad 0.1 --precision bf16 --flip --beta2 0.9 --memory least"],
)  # fmt: skip
def test_options_train(here, flags):
    pretrain.main([*TINY, "--data", here, *flags.split(), "--epochs", "1", "--name", "x"])
    assert all(np.isfinite(list(losses("x").values())))


@pytest.mark.parametrize(
    "flags",
    ["--stride 1", "--flip", "--beta2 0.5", "--weight-decay 100", "--clip-grad 1e-6", "--seed 1",
     "--mask random", "--ratio 0.5", "--base-lr 1e-3", "--loss l1", "--positions 1d", "--repeats 2",
     "--decoder-depth 2", "--model cross", "--min-lr 1e-2", "--warmup 0"],
)  # fmt: skip
def test_every_option_changes_what_is_learned(beside, flags):
    name = flags.replace(" ", "").strip("-")
    pretrain.main([*TINY, "--data", beside, "--epochs", "1", *flags.split(), "--name", name])
    before, after = weights("short"), weights(name)
    assert any(
        not torch.equal(before[k], after[k]) for k in before if k in after and "pos" not in k
    )


def test_presets_hold_the_published_recipes():
    table = {  # epochs, batch, base lr, mask ratio, stride: paper, Table 9 and Appendix B
        "ssv2": (800, 1024, 1.5e-4, 0.9, 2),
        "k400": (800, 1024, 1.5e-4, 0.9, 4),
        "ucf101": (3200, 192, 3e-4, 0.75, 4),
        "hmdb51": (4800, 192, 3e-4, 0.75, 2),
    }
    for name, row in table.items():
        _, cfg = engine.parse_config(pretrain.Config, [name], "", pretrain.PRESETS)
        assert (cfg.epochs, cfg.batch, cfg.base_lr, cfg.ratio, cfg.stride) == row
        model = (cfg.size, cfg.frames, cfg.resolution, cfg.cube, cfg.mask, cfg.normalize)
        assert model == ("base", 16, 224, (2, 16, 16), "tube", True)
        assert (cfg.warmup, cfg.min_lr, cfg.beta2, cfg.weight_decay) == (40, 1e-5, 0.95, 0.05)
        assert cfg.flip == (name == "k400")


@pytest.mark.parametrize(
    "flags, words",
    [
        ("ucf101", "--data is missing"),
        ("ucf101 --data texts", "--splits"),
        ("toy --data TOY --epochs 1", "--warmup"),
        ("toy --data TOY --cube 2 8", "cubes of (2, 8)"),
        ("toy --data TOY --cube 0 8 8", "cubes of (0, 8, 8)"),
        ("toy --data TOY --ratio nan", "ratio nan"),
        ("toy --data TOY --ratio 1", "ratio 1.0"),
        ("toy --data TOY --stride -1", "at least 0"),
        ("toy --data TOY --workers -1", "at least 0"),
        ("toy --data TOY --base-lr -1", "--base-lr -1.0 must be at least 0"),
        ("toy --data TOY --min-lr -1", "--min-lr -1.0 must be at least 0"),
        ("toy --data TOY --weight-decay -1", "--weight-decay -1.0 must be at least 0"),
        ("toy --data TOY --beta2 1", "--beta2 1.0 must be from 0 to 0.9999"),
        (f"toy --data TOY --seed {2**64}", "must be from 0 to"),
        ("toy --data nowhere", "nowhere"),
        ("toy --data empty", "no videos"),
        ("toy --data TOY --splits nowhere", "nowhere"),
        ("toy --data texts --batch 4 --workers 0", "texts"),
        ("toy --data TOY --batch 500", "500"),
        ("toy --data TOY --resolution 60", "60"),
        ("toy --data TOY --model center --mask random", "--mask tube"),
        ("toy --data TOY --model cell --frames 4", "cells of 4x2x2"),
        ("toy --data TOY --model double --stride 3", "even --stride"),
        ("toy --data TOY --model double --stride 0", "even --stride"),
        ("toy --wiggle 3", "--wiggle"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(here, capfd, monkeypatch, flags, words):
    os.makedirs("empty")
    os.makedirs("texts")
    for i in range(12):
        open(f"texts/{i}.avi", "w").write("not a video")
    argv = ["pretrain.py", *flags.replace("TOY", here).split()]
    monkeypatch.setattr("sys.argv", argv)
    with pytest.raises(SystemExit) as stop:
        engine.cli(pretrain.main)
    assert stop.value.code == 2
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ") and words in last


def launch(argv, errors):
    """What the command torchrun does, with its errors in a file."""
    with open(errors, "w") as file:
        os.dup2(file.fileno(), 2)
    torch.distributed.run.main(argv)


def test_torchrun_and_a_mistake_in_a_worker(here, forks):
    """The command as the README has it. The mistake comes from a loader worker."""
    os.makedirs("texts")
    for i in range(12):
        open(f"texts/{i}.avi", "w").write("not a video")
    script = [pretrain.__file__, "toy", "--data", "texts", "--batch", "4", "--workers", "1"]
    job = forks.Process(target=launch, args=(["--nproc_per_node", "1", *script], "errors.txt"))
    job.start()
    job.join(300)
    said = [line for line in open("errors.txt").read().splitlines() if line.startswith("error: ")]
    assert job.exitcode == 1 and said and "10 videos in a row cannot be read: texts/" in said[0]


def test_own_videos_get_a_batch_and_steps_that_fit(here, monkeypatch, capsys):
    """Five videos in a folder, without a preset word."""
    os.makedirs("five")
    for i in range(5):
        os.symlink(f"{here}/Pulse/v_Pulse_g{i % 2 + 1:02}_c01.avi", f"five/{i}.avi")
    small = (
        "--size toy --frames 4 --resolution 32 --precision fp32 --workers 0 --log-every 1".split()
    )
    pretrain.main(["--data", "five", *small, "--steps", "3", "--name", "x"])
    flags = json.loads(open("runs/x/log.jsonl").readline())["config"]["flags"]
    assert (flags["batch"], flags["epochs"], flags["warmup"]) == (5, 3, 0.3)
    assert len(losses("x")) == 3
    pretrain.main(["--data", "five", *small, "--epochs", "2", "--batch", "2", "--name", "y"])
    assert len(losses("y")) == 4
    pretrain.main(["--data", "five", *small, "--steps", "2", "--micro", "2", "--name", "z"])
    flags = json.loads(open("runs/z/log.jsonl").readline())["config"]["flags"]
    assert (flags["batch"], flags["micro"], flags["epochs"]) == (4, 2, 2)
    with pytest.raises(ValueError, match="--steps is for the recipe own: give toy --epochs"):
        pretrain.main(["toy", "--data", "five", *small, "--steps", "3", "--name", "w"])
    monkeypatch.setattr(engine, "processes", lambda: 6)
    with pytest.raises(ValueError, match="6 processes, but 5 videos"):
        pretrain.fit_to_set("own", pretrain.Config(), 5)


def test_going_on_from_weights_begins_where_they_ended(beside, capsys):
    """Also with another clip size; the decoder comes along."""
    flags = [*TINY, "--data", beside, "--epochs", "1", "--base-lr", "0", "--min-lr", "0"]
    init = ["--init", "runs/whole/checkpoint.pt"]
    pretrain.main([*flags, *init, "--name", "more"])
    before, after = weights("whole"), weights("more")
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert "matched" in capsys.readouterr().out
    pretrain.main([*flags, *init, "--resolution", "64", "--name", "larger"])
    assert weights("larger")["encoder.pos_embed"].shape[0] == 2 * 8 * 8
    assert "interpolated" in capsys.readouterr().out
    for other in ("--positions 1d", "--cube 4 4 4"):
        want = {"--positions 1d": "--positions 3d", "--cube 4 4 4": "--cube 2 8 8"}[other]
        with pytest.raises(ValueError, match=f"whole/checkpoint.pt has other .*: add {want}"):
            pretrain.main([*flags, *init, *other.split(), "--name", "other"])
