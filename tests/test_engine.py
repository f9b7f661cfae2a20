"""Plumbing: flags, schedule, order, checkpoints, the log, signals, losses that are not finite."""

import io
import json
import os
import pickle
import resource
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pytest
import torch
from torch import nn

from lib import engine
from lib.run import Log, Run


@dataclass
class Flags:
    count: int = engine.opt(3, "clips", 0, 9)
    rate: float | None = engine.opt(None, "Hz")
    kind: Literal["a", "b"] = engine.opt("a", "100% kind")
    cube: tuple[int, ...] = engine.opt((2, 8, 8), "pixels")
    flip_it: bool = engine.opt(True, "mirror")
    data: str | None = engine.opt(None, "folder")
    test_data: str | None = engine.opt(None, "another folder")
    name: str | None = engine.opt(None, "of the run")


PRESETS = {"small": dict(count=1), "big": dict(count=9, rate=2.0), "own": dict(count=2)}


def parse(line):
    return engine.parse_config(Flags, line.split(), "", PRESETS)


def test_flags_beat_presets_and_presets_beat_defaults():
    assert parse("") == ("small", Flags(count=1))
    line = "big --rate 5 --cube 1 2 3 --no-flip-it --kind b"
    assert parse(line) == ("big", Flags(9, 5.0, "b", (1, 2, 3), False))
    assert parse("--flip-it --rate=-1e-3")[1] == Flags(count=1, rate=-1e-3)
    assert parse("--data a_b") == ("own", Flags(count=2, data="a_b"))  # never the toy recipe
    assert parse("--test-data=x")[0] == "own" and parse("big --data=x")[0] == "big"


@pytest.mark.parametrize(
    "line",
    ["--cuont 3", "--coun 3", "huge", "--count many", "--kind c", "--flip-it False", "--count -1",
     "--count 10", "--count nan", "--name ../x", "--name a/../../x", "--name /x"],
)  # fmt: skip
def test_mistakes_in_flags_are_one_line_and_exit_code_2(line, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(line)
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_help_shows_units_and_defaults(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    assert "100% kind (default: a)" in " ".join(capsys.readouterr().out.split())


def test_the_learning_rate_follows_the_official_schedule():
    lr = [engine.cosine_lr(step, 100, 10, 1.0, 0.1) for step in range(100)]
    assert lr[0] == 0 and lr[9] == 1 and lr[3] == pytest.approx(3 / 9)  # linspace(0, 1, 10)
    assert lr[10] == 1 and lr[55] == pytest.approx(0.55)  # half-way: the mean of both
    assert 0.1 < lr[99] < 0.101
    assert engine.cosine_lr(0, 10, 0, 1.0, 0.0) == 1


def test_effective_batch(monkeypatch):
    for processes, batch, micro, expected in (
        (1, 192, None, (192, 1)), (4, 192, None, (48, 1)), (4, 192, 16, (16, 3)),
        (4, 10, None, None), (1, 192, 100, None), (4, 2, None, None),
    ):  # fmt: skip
        monkeypatch.setattr(engine, "processes", lambda n=processes: n)
        if expected:
            assert engine.split_batch(batch, micro) == expected
        else:
            with pytest.raises(ValueError, match=str(batch)):
                engine.split_batch(batch, micro)


def test_order_is_the_same_however_it_is_spread(monkeypatch):
    def spread(processes, micro, start):
        steps = {}
        for rank in range(processes):
            monkeypatch.setattr(engine, "processes", lambda: processes)
            monkeypatch.setattr(engine, "rank", lambda r=rank: r)
            keys = list(engine.Order(26, 8, micro, start, 7, seed=3))
            passes = 8 // processes // micro
            for i in range(start, 7):
                parts = keys[(i - start) * passes :][:passes]
                steps.setdefault(i, []).extend(key for part in parts for key in part)
        return steps

    alone = spread(1, 8, 0)
    assert spread(2, 2, 0) == alone and spread(4, 1, 0) == alone
    later = spread(2, 4, 4)
    assert later == {step: alone[step] for step in range(4, 7)}
    epoch = [index for step in range(3) for index, _ in alone[step]]
    assert len(set(epoch)) == 24  # each video at most once per epoch
    assert [i for i, _ in alone[0]] != [i for i, _ in alone[3]]
    assert len({seed for step in alone.values() for _, seed in step}) == 56
    with pytest.raises(ValueError, match="larger than the 4 videos"):
        engine.Order(4, 8, 8, 0, 1, 0)


# checkpoints


def test_checkpoints_survive_a_failed_write(tmp_path):
    path = tmp_path / "checkpoint.pt"
    engine.save_checkpoint(path, stage="pretrain", step=1)
    with pytest.raises((TypeError, AttributeError, pickle.PicklingError)):
        engine.save_checkpoint(path, stage="pretrain", step=lambda: 0)  # stops in the middle
    assert engine.load_checkpoint(path, "pretrain")["step"] == 1


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path):
    """A limit on the size of files fails a write in the middle, as a full disk does."""
    path = tmp_path / "checkpoint.pt"
    engine.save_checkpoint(path, stage="pretrain", step=1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, limits[1]))
    try:
        with pytest.raises(ValueError, match="checkpoint.pt cannot be written"):
            engine.save_checkpoint(path, stage="pretrain", step=2, more=torch.zeros(100000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert os.listdir(tmp_path) == ["checkpoint.pt"]
    assert engine.load_checkpoint(path, "pretrain")["step"] == 1


class Attack:
    def __reduce__(self):
        return (open, ("was-here", "w"))


def test_what_is_no_checkpoint_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    open("text.pt", "w").write("hello")
    torch.save({"stage": "pretrain", "model": Attack()}, "attack.pt")
    torch.save({"state_dict": {}}, "other.pt")
    torch.save({"stage": "finetune"}, "finetune.pt")
    torch.save({"stage": "pretrain", "model": torch.zeros(10000)}, "whole.pt")
    open("cut.pt", "wb").write(open("whole.pt", "rb").read()[:20000])
    for name in ("text", "attack", "other", "finetune", "cut", "missing"):
        with pytest.raises(ValueError, match=f"^{name}.pt is not a"):
            engine.load_checkpoint(f"{name}.pt", "pretrain")
    assert not os.path.exists("was-here")


def test_cli_prints_user_errors_and_lets_bugs_through(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["stage.py"])
    with pytest.raises(SystemExit) as stop:
        engine.cli(lambda argv: engine.load_checkpoint("none.pt", "pretrain"))
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1
    assert said.startswith("error: none.pt is not") and said.endswith("remove it to start anew\n")
    assert engine.derive_seed("figure", "v\udce4.avi") > 0  # names of files need not be UTF-8
    with pytest.raises(ValueError, match="Expecting value"):
        engine.cli(lambda argv: json.loads("no json"))
    with pytest.raises(SystemExit):  # a folder that cannot be made is no bug, wherever it shows
        engine.cli(lambda argv: Path("/dev/null/runs").mkdir())
    assert capsys.readouterr().err.startswith("error: [Errno 20] Not a directory")


# runs: a model of one weight, data of numbers


SPLIT = SimpleNamespace(paths=[Path(f"{i}.avi") for i in range(12)], labels=[0] * 12)


class Numbers:
    """A data set whose items are their index."""

    def __init__(self, split):
        self.split = split

    def __len__(self):
        return 12


class OneWeight(nn.Module):
    config = dict(size="one")

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return (self.weight * x).mean()


DEFAULTS = dict(
    epochs=2, batch=4, micro=2, base_lr=0.1, min_lr=0, warmup=0, clip_grad=None, precision="fp32",
    seed=0, workers=0, resume=False, compile=False, memory="fast", log_every=2, save_minutes=100,
    repeats=1, model="a",
)  # fmt: skip


def begin(split=SPLIT, **flags):
    Config = dataclass(
        type("Config", (), {"__annotations__": {k: object for k in DEFAULTS}, **DEFAULTS})
    )
    model = OneWeight()
    optimizer = torch.optim.SGD(model.parameters(), lr=0)
    videos = Numbers(split)
    return Run("pretrain", "x", Config(**flags), model, optimizer, videos, torch.device("cpu"))


def finish(run, before_step=lambda step: None, unreadable=None):
    def batches():
        for keys in run.order:
            clips = torch.tensor([float(index) for index, _ in keys])
            yield clips, clips.long(), unreadable or {}

    source = batches()
    try:
        for step in run.steps():
            before_step(step)
            for clips, _ in run.passes(source):
                run.backward(run.net(clips))
            run.update(0.1)
    finally:
        run.log.bar.close()  # else the garbage collector does it, while tqdm goes through its bars
    run.close()
    return run


def lines():
    return [json.loads(line) for line in open("runs/x/log.jsonl")]


def test_a_run_logs_means_and_saves(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    finish(begin())
    first, *rest = lines()
    assert first["config"]["model"] == {"size": "one"} and first["config"]["flags"]["batch"] == 4
    assert [line["step"] for line in rest] == [2, 4, 6]
    # By hand: gradient = mean of the step's numbers; loss = weight * that mean.
    weight, losses = 1.0, []
    for step in range(6):
        keys = engine.Order(12, 4, 4, 0, 6, 0).step_keys(step)
        mean = sum(index for index, _ in keys) / 4
        losses.append(weight * mean)
        weight -= 0.1 * mean
    expected = [(losses[i] + losses[i + 1]) / 2 for i in (0, 2, 4)]
    assert [line["loss"] for line in rest] == pytest.approx(expected, rel=1e-5)
    state = engine.load_checkpoint("runs/x/checkpoint.pt", "pretrain")
    assert state["step"] == state["steps"] == 6
    assert state["model"]["weight"].item() == pytest.approx(weight, rel=1e-5)
    said = capsys.readouterr().out
    assert "6 (2 epochs" in said and "1 processes x 2 passes x 2 videos" in said
    with pytest.raises(ValueError, match="--resume"):
        begin()
    with pytest.raises(ValueError, match=r"with other flags or videos \(epochs was 2\)"):
        begin(resume=True, epochs=3)
    with pytest.raises(ValueError, match=r"with other flags or videos \(model was a\)"):
        begin(resume=True, model="b")
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="the model was .*one"):
        patch.setattr(OneWeight, "config", dict(size="two"))
        begin(resume=True)
    split = lambda **change: SimpleNamespace(**vars(SPLIT) | change)
    with pytest.raises(ValueError, match="the list of videos was .*: take these"):
        begin(resume=True, split=split(paths=SPLIT.paths[::-1]))
    moved = [Path("elsewhere") / f"{path.stem}.mp4" for path in SPLIT.paths]
    assert begin(resume=True, split=split(paths=moved, labels=[1] * 12)).start == 6
    del state["config"]["list of videos"]  # as in older checkpoints
    engine.save_checkpoint("runs/x/checkpoint.pt", **state)
    assert begin(resume=True, split=split(paths=SPLIT.paths[::-1])).start == 6
    capsys.readouterr()
    with pytest.raises(ValueError, match="--warmup 2 must be less than --epochs 2"):
        begin(warmup=2)
    with pytest.raises(ValueError, match="--compile chooses .* leave out --memory"):
        begin(resume=True, compile=True, memory="less")
    finish(begin(resume=True))  # nothing is left to do, and nothing is done
    assert capsys.readouterr().out == "runs/x is finished: all 6 steps are done\n"
    assert [line["step"] for line in lines()[1:]] == [2, 4, 6]


def test_the_log_says_how_much_time_went_to_waiting_for_videos(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    now = [0.0]  # seconds

    def advance(seconds, what=None):
        now[0] += seconds
        return what

    monkeypatch.setattr("lib.run.time", SimpleNamespace(time=lambda: now[0]))
    run = begin()
    run.order = [advance(0, keys) for keys in run.order]
    run.order = (advance(3, keys) for keys in run.order)  # each of two passes waits for 3 seconds
    finish(run, before_step=lambda step: advance(1))
    for line in lines()[1:]:  # each of two steps
        assert line["waiting_for_data"] == pytest.approx(12 / 14)
        assert line["clips_per_s"] == pytest.approx(2 * 4 * run.cfg.repeats / 14)
    assert "86% of the time was spent waiting for videos" in capsys.readouterr().out


def test_processes_agree_at_a_line_of_the_log(tmp_path, monkeypatch):
    """Another one has larger losses, got a signal, and met a broken video."""
    monkeypatch.chdir(tmp_path)

    def of_all(mine):
        losses, _, _ = mine
        return [mine, ([loss + 1 for loss in losses], signal.SIGTERM, {5: "5.avi: broken"})]

    finish(begin())
    alone = lines()[1]
    os.rename("runs/x", "runs/alone")
    monkeypatch.setattr(engine, "of_all", of_all)
    with pytest.raises(SystemExit) as stop:
        finish(begin(), unreadable={4: "4.avi: broken"})
    assert stop.value.code == 143
    (line,) = lines()[1:]
    assert line["step"] == 2 and line["unreadable"] == 2
    assert line["loss"] == pytest.approx(alone["loss"] + 0.5, rel=1e-6)
    assert engine.load_checkpoint("runs/x/checkpoint.pt", "pretrain")["step"] == 2


@pytest.mark.parametrize("name, code", [("SIGTERM", 143), ("SIGUSR1", 138), ("SIGINT", 130)])
def test_a_signal_saves_after_the_step_and_resume_goes_on(
    tmp_path, monkeypatch, capsys, name, code
):
    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(getattr(signal, name))
    send = lambda step: step == 2 and os.kill(os.getpid(), getattr(signal, name))
    with pytest.raises(SystemExit) as stop:
        finish(begin(), send)
    assert stop.value.code == code and signal.getsignal(getattr(signal, name)) == before
    said = capsys.readouterr()
    assert f"stopped by {name} after step 3 of 6" in said.out
    assert "stopping after this step\n" in said.err  # at once
    assert engine.load_checkpoint("runs/x/checkpoint.pt", "pretrain")["step"] == 3
    open("runs/x/log.jsonl", "a").write('{"step": 5, "loss": 1}\n{"step": 4, "lo')  # killed later
    finish(begin(resume=True))
    assert [line["step"] for line in lines()[1:]] == [2, 3, 4, 6]
    assert "going on after step 3" in capsys.readouterr().out
    resumed = engine.load_checkpoint("runs/x/checkpoint.pt", "pretrain")["model"]["weight"]
    os.rename("runs/x", "runs/y")
    finish(begin())
    whole = engine.load_checkpoint("runs/x/checkpoint.pt", "pretrain")["model"]["weight"]
    assert torch.equal(resumed, whole)


def test_a_loss_that_is_not_finite_ends_the_run_before_it_is_saved(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = begin(save_minutes=0)
    keys = run.order.step_keys(3)

    def spoil(step):
        if step == 3:
            run.model.weight.data.fill_(float("nan"))

    with pytest.raises(ValueError, match=r"the loss is nan at step 3 \(lr 0.1\)") as error:
        finish(run, spoil)
    assert all(f"{index}.avi" in str(error.value) for index, _ in keys)
    assert engine.load_checkpoint("runs/x/checkpoint.pt", "pretrain")["step"] == 3  # the one before


def test_weights_that_are_not_finite_are_not_saved(tmp_path, monkeypatch):
    """Although the loss was finite before the step."""
    monkeypatch.chdir(tmp_path)
    run = begin(save_minutes=0)
    update = lambda lr, was=run.update: was(float("inf") if run.step == 3 else lr)
    monkeypatch.setattr(run, "update", update)
    with pytest.raises(ValueError, match="weights are not finite after step 4 .*lower --base-lr"):
        finish(run)
    assert engine.load_checkpoint("runs/x/checkpoint.pt", "pretrain")["step"] == 3


def test_a_log_that_was_cut_anywhere_is_no_reason_not_to_go_on(tmp_path):
    Log(tmp_path, 0, 9, config=dict(a={})).write(step=2)
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 3, "a": {"b": 1}\nx}\n')
    Log(tmp_path, 3, 9, config={})
    assert [json.loads(line).get("step") for line in open(tmp_path / "log.jsonl")] == [None, 2]


def test_unreadable_videos_are_named_once_and_too_many_end_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    finish(begin(), unreadable={0: "a.avi: broken"})
    said = capsys.readouterr()
    assert said.err.count("a.avi: broken") == 1 and "1 unreadable videos" in said.out
    assert lines()[-1]["unreadable"] == 1
    os.rename("runs/x", "runs/y")
    # Two seconds of one film are two items of detect.py.
    with pytest.raises(ValueError, match="over a tenth"):
        finish(begin(), unreadable={0: "a.avi: broken", 1: "a.avi: broken"})
    assert capsys.readouterr().err.count("a.avi: broken") == 1
    os.rename("runs/x", "runs/z")
    with pytest.raises(ValueError, match="over a tenth"):
        finish(begin(), unreadable={0: "a.avi: broken", 1: "b.avi: broken"})


def test_a_new_run_forgets_an_old_log(tmp_path):
    Log(tmp_path, 0, 9, config={})
    (tmp_path / "log.jsonl").write_text('{"step": 9}\n')
    Log(tmp_path, 0, 9, config={})
    assert "step" not in (tmp_path / "log.jsonl").read_text()


def test_the_bar_counts_steps(tmp_path, monkeypatch):
    """So that it can tell after the first one what a run takes."""
    monkeypatch.chdir(tmp_path)
    run, seen = begin(epochs=4), []
    finish(run, lambda step: seen.append(run.log.bar.n))
    assert seen == [*range(run.total)] and run.log.bar.n == run.total


@pytest.mark.parametrize("terminal", [False, True])
def test_in_a_file_the_bar_is_a_line_per_minute(monkeypatch, terminal):
    """Nohup's and Slurm's files get whole lines: the first, one per minute, the last."""
    file, now = io.StringIO(), [0.0]
    file.isatty = lambda: terminal
    monkeypatch.setattr("sys.stderr", file)
    bar = engine.progress("training", 600, unit="step", leave=False)
    bar._time = lambda: bar.start_t + now[0]
    for _ in range(600):
        now[0] += 0.5
        bar.set_postfix(loss="0.5", refresh=False)
        bar.update()
    bar.close()
    refreshed = file.getvalue().split("\r")
    if terminal:
        assert len(refreshed) > 300 and "training:  50%|" in file.getvalue()
        return
    lines = [line.strip() for line in file.getvalue().splitlines() if line.strip()]
    assert 5 <= len(lines) <= 8 and all(line.startswith("training: ") for line in lines)
    assert lines[-1] == "training: 600 of 600, 05:00 gone, 00:00 left, loss=0.5"


def test_a_notebook_runs_a_script(monkeypatch):
    """Its output has no reconfigure, and %run shows a SystemExit as an error."""
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(f"sys.{name}", io.StringIO())
    monkeypatch.setattr("sys.argv", ["pretrain.py", "toy"])
    assert engine.cli(lambda argv: argv) == ["toy"]


def test_devices_and_precision(monkeypatch):
    cpu = torch.device("cpu")
    assert engine.precision_dtype("bf16", cpu) == torch.bfloat16
    assert engine.precision_dtype("auto", cpu) in (torch.bfloat16, torch.float32)
    assert engine.setup("cpu") == cpu and engine.rank() == 0 and engine.processes() == 1
    with pytest.raises(ValueError, match="--device cpu"):
        engine.setup("cuda")
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    with pytest.raises(ValueError, match="--device mps, but .* use --device cpu"):
        engine.setup("mps")
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)  # untested beyond this
    mps = engine.setup("mps")
    assert mps.type == "mps"


def test_a_loader_worker_that_dies_in_a_step_is_one_line(monkeypatch, capsys):
    def main(argv):
        raise RuntimeError("DataLoader worker (pid 7) is killed\nby signal: Killed.")

    monkeypatch.setattr("sys.argv", ["stage.py"])
    with pytest.raises(SystemExit) as stop:
        engine.cli(main)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "killed by signal: Killed.: fewer --workers" in said


def test_two_runs_in_one_folder_are_noticed(tmp_path, monkeypatch):
    """The lock is another process's here: locks of one process do not exclude each other."""
    monkeypatch.chdir(tmp_path)
    os.makedirs("runs/x")
    code = "import fcntl, sys; f = open('runs/x/lock', 'w'); fcntl.lockf(f, fcntl.LOCK_EX)\n"
    code += "print('locked', flush=True); sys.stdin.read()"
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    other = subprocess.Popen([sys.executable, "-c", code], **pipes)
    other.stdout.readline()
    with pytest.raises(ValueError, match="another process trains in runs/x"):
        begin()
    other.communicate(b"")
    finish(begin())
