"""Interruptions, faults and several processes: what is left is the uninterrupted run of one process."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys

import pytest
import torch

import engine
import finetune
import pretrain
import visualize

PRETRAIN = "--epochs 4 --batch 8 --repeats 1 --warmup 0.5 --decoder-depth 1 --precision fp32 --workers 0".split()
PRETRAIN += "--normalize --log-every 5".split()  # 12 steps
FINETUNE = "--init none --epochs 2 --batch 8 --shots 0 --repeats 2 --operations 2 --erase 0.25 --smallest 0.3".split()
FINETUNE += "--flip --mixup 0.8 --cutmix 1 --drop-path 0.2 --head-dropout 0.3 --warmup 1 --precision fp32".split()
FINETUNE += "--workers 0 --log-every 4".split()  # 6 steps
STAGES = [(pretrain, PRETRAIN), (finetune, FINETUNE)]


@pytest.fixture
def here(toy, tmp_path, monkeypatch):
    """An empty working directory; the toy set's path. Nothing is drawn."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(visualize, "main", lambda argv: None)
    monkeypatch.setattr(visualize, "plot_log", lambda log, out: None)
    return str(toy)


def log(name):
    """{step: loss, lr, counts} of a run, without what time decides."""
    lines = [json.loads(line) for line in open(f"runs/{name}/log.jsonl")]
    timed = ("clips_per_s", "waiting_for_data")
    return {line["step"]: {k: v for k, v in line.items() if k not in timed} for line in lines if "step" in line}


def weights(name, stage):
    return engine.load_checkpoint(f"runs/{name}/checkpoint.pt", stage)["model"]


def same(a, b, stage):
    """Whether two runs left the same losses and weights, bit for bit."""
    first, second = weights(a, stage), weights(b, stage)
    return log(a) == log(b) and all(torch.equal(first[key], second[key]) for key in first)


class Killed(BaseException):
    """Nothing catches it: like SIGKILL, it leaves files as they are."""


# interruptions


@pytest.mark.parametrize("stage, flags", STAGES, ids=["pretrain", "finetune"])
def test_a_signal_saves_and_the_resumed_run_is_the_uninterrupted_one(here, monkeypatch, capsys, stage, flags):
    """Also in the middle of the steps that one line of the log averages."""
    name, agree, step = stage.__name__, engine.agree, iter(range(1, 100))
    stage.main(["--data", here, *flags, "--name", "whole"])

    def agree_after_a_signal(*args, **kwargs):
        if next(step) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return agree(*args, **kwargs)

    monkeypatch.setattr(engine, "agree", agree_after_a_signal)
    with pytest.raises(SystemExit) as stop:
        stage.main(["--data", here, *flags, "--name", "cut"])
    said = capsys.readouterr().out
    assert stop.value.code == 0 and f"stopped by SIGTERM after step 4 of {12 if stage is pretrain else 6};" in said
    assert engine.load_checkpoint("runs/cut/checkpoint.pt", name)["step"] == 4
    argv = ["--data", here, *FINETUNE, "--init", "runs/cut/checkpoint.pt", "--eval-only", "--name", "other"]
    with contextlib.suppress(ValueError):  # of pre-training: no head to evaluate
        finetune.main(argv)
        assert "runs/cut/checkpoint.pt (unfinished: step 4 of 6): 58 matched" in capsys.readouterr().out
    stage.main(["--data", here, *flags, "--name", "cut", "--resume"])
    assert same("cut", "whole", name)


@pytest.fixture(scope="module")
def whole(toy, tmp_path_factory):
    """A folder with the uninterrupted pre-training runs/whole."""
    folder, before, figure = tmp_path_factory.mktemp("whole"), os.getcwd(), visualize.main
    os.chdir(folder)
    visualize.main = lambda argv: None
    pretrain.main(["--data", str(toy), *PRETRAIN, "--name", "whole"])
    visualize.main = figure
    os.chdir(before)
    return folder


@pytest.fixture
def beside(here, whole, monkeypatch):
    monkeypatch.chdir(whole)
    return here


def die(*args, **kwargs):
    raise Killed


def die_writing(state, file):
    file.write(b"PK\3\4 half a checkpoint")
    file.flush()
    raise Killed


def die_renaming(count):
    """An os.replace that dies instead of its count-th rename of a checkpoint."""
    real, left = os.replace, [count]

    def replace(source, target):
        if "checkpoint" in str(source):
            left[0] -= 1
            if left[0] == 0:
                raise Killed
        real(source, target)

    return replace


@pytest.mark.parametrize(
    "module, function, replacement, done",
    [
        (torch, "save", die_writing, 0),  # the first checkpoint is half written
        (os, "replace", die_renaming(1), 0),
        (os, "replace", die_renaming(2), 3),  # the second is whole but has not its name
        (os, "replace", die_renaming(3), 3),  # ... and the first is previous.pt already
        (pretrain, "merge", die, 0),  # between steps
        (visualize, "plot_log", die, 3),
    ],
    ids=["writing", "first-name", "second-name", "no-name", "step", "curve"],
)
def test_killed_anywhere_the_resumed_run_is_the_uninterrupted_one(beside, module, function, replacement, done, request):
    name = request.node.callspec.id
    command = ["--data", beside, *PRETRAIN, "--name", name, "--save-every", "3", "--resume"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, function, replacement)
        with pytest.raises(Killed):
            pretrain.main(command)
    begun = any(os.path.exists(f"runs/{name}/{file}.pt") for file in ("checkpoint", "previous"))
    assert (engine.load_checkpoint(f"runs/{name}/checkpoint.pt", "pretrain")["step"] if begun else 0) == done
    pretrain.main(command)  # the same command again
    assert same(name, "whole", "pretrain")


@pytest.mark.parametrize("change", ["older format", "epochs", "videos"])
def test_what_cannot_go_on_is_refused(beside, change):
    os.makedirs(f"runs/{change}")
    state = torch.load("runs/whole/checkpoint.pt", weights_only=True)
    if change == "older format":
        del state["config"]["format"], state["progress"]
    elif change == "epochs":
        state["config"]["stage"]["epochs"] = 3
    else:
        state["config"]["videos"] = 23
    torch.save(state, f"runs/{change}/checkpoint.pt")
    with pytest.raises(ValueError, match=f"another {change.split()[-1]} than before"):
        pretrain.main(["--data", beside, *PRETRAIN, "--name", change, "--resume"])


# numbers


def broken_at(stage, monkeypatch, steps):
    """Make the loss of these steps (from 1) not a number."""
    model, number = (stage.VideoMAE, [0]) if stage is pretrain else (stage.Classifier, [0])
    forward = model.forward

    def broken(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        number[0] += self.training
        factor = float("nan") if self.training and number[0] in steps else 1.0
        return (out[0] * factor, *out[1:]) if isinstance(out, tuple) else out * factor

    monkeypatch.setattr(model, "forward", broken)


@pytest.mark.parametrize(
    "stage, flags, precision",
    [(*STAGES[0], "fp32"), (*STAGES[0], "fp16"), (*STAGES[1], "fp32")],
    ids=["pretrain", "pretrain-fp16", "finetune"],
)
def test_a_step_without_finite_gradient_changes_nothing_and_is_counted(here, monkeypatch, stage, flags, precision):
    command = ["--data", here, *flags, "--epochs", "1", "--warmup", "0", "--batch", "4", "--precision", precision]
    command, last = [*command, "--log-every", "1", "--save-every", "1", "--name", "run"], 6
    broken_at(stage, monkeypatch, {3, last})
    stage.main(command)
    lines = log("run")
    assert [step for step, line in lines.items() if "loss" not in line] == [3, last]
    assert lines[2]["skipped"] == 0 and lines[3]["skipped"] == 1 and lines[last]["skipped"] == 2
    after, before = (
        torch.load(f"runs/run/{file}.pt", weights_only=True)["model"] for file in ("checkpoint", "previous")
    )
    assert all(torch.equal(after[key], before[key]) and after[key].isfinite().all() for key in after)


def test_ten_such_steps_in_a_row_end_the_run_with_what_they_were(here, monkeypatch):
    command = ["--data", here, *PRETRAIN, "--save-every", "1", "--name", "run", "--resume"]
    with monkeypatch.context() as patch:
        broken_at(pretrain, patch, set(range(2, 100)))
        with pytest.raises(ValueError, match=r"ten steps in a row, the last is 11 \(lr .*nonfinite.json"):
            pretrain.main(command)
    about = json.load(open("runs/run/nonfinite.json"))
    assert about["step"] == 11 and about["lr"] > 0 and len(set(about["videos"])) == 8
    assert all(os.path.exists(video) for video in about["videos"])
    pretrain.main(command)  # mended, it goes on
    assert log("run")[12]["skipped"] == 9


# several processes


def close(a, b):
    first, second = log(a), log(b)
    assert first.keys() == second.keys()
    assert all(first[step].get("loss") == pytest.approx(second[step].get("loss"), rel=1e-5) for step in first)


def test_finetuning_is_the_same_with_one_two_or_four_processes(here, train):
    flags = ["--data", here, *FINETUNE, "--epochs", "1", "--warmup", "0", "--log-every", "1"]
    finetune.main([*flags, "--name", "one"])
    train(2, "finetune", *flags, "--name", "two", "--micro", "2")
    train(4, "finetune", *flags, "--name", "four")
    train(2, "finetune", *flags, "--name", "shard", "--shard")
    for name in ("two", "four", "shard"):
        close("one", name)
        results = [json.load(open(f"runs/{run}/results.json")) for run in ("one", name)]
        assert results[0]["top1"] == results[1]["top1"]


def test_a_resumed_run_may_have_another_number_of_processes(here, train):
    flags = ["--data", here, *PRETRAIN, "--save-every", "5"]
    pretrain.main([*flags, "--name", "one"])
    train(2, "pretrain", *flags, "--name", "shard", "--shard")
    shutil.copytree("runs/one", "runs/other")
    for run in ("shard", "other"):
        assert engine.load_checkpoint(f"runs/{run}/previous.pt", "pretrain")["step"] == 10
        os.remove(f"runs/{run}/checkpoint.pt")  # as if killed after step 10
    pretrain.main([*flags, "--name", "shard", "--resume"])  # alone, from the sharded one's checkpoint
    train(4, "pretrain", *flags, "--name", "other", "--resume", "--shard")
    for run in ("shard", "other"):
        close("one", run)
        a, b = weights("one", "pretrain"), weights(run, "pretrain")
        assert all(torch.allclose(a[key], b[key], atol=1e-5) for key in a)


def test_shard_needs_processes(here):
    with pytest.raises(ValueError, match="torchrun"):
        pretrain.main(["--data", here, *PRETRAIN, "--shard"])
    with pytest.raises(ValueError, match="fp16"):
        finetune.main(["--data", here, *FINETUNE, "--shard", "--precision", "fp16"])


def torchrun(*arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def test_two_nodes_train_as_one_process(here):
    """Two agents of torchrun on this machine, one rendezvous."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pretrain.main(["--data", here, *PRETRAIN, "--name", "one"])
    meet = ["--nnodes", "2", "--nproc_per_node", "1", "--rdzv_backend", "c10d", "--rdzv_id", "job"]
    meet += ["--rdzv_endpoint", f"127.0.0.1:{port}", "--local_addr", "127.0.0.1"]
    script = [pretrain.__file__, "--data", here, *PRETRAIN, "--name", "two"]
    nodes = [torchrun(*meet, *script) for _ in range(2)]
    said = [node.communicate(timeout=120)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    close("one", "two")
    assert os.path.getsize("runs/two/reconstruction.png") > 1000


def test_one_failing_process_ends_the_job(here):
    """With its traceback and without waiting for ever for the others."""
    with open("failing.py", "w") as file:
        file.write(
            "import os, engine, pretrain\nagree, steps = engine.agree, [0]\n"
            "def failing(*args, **kwargs):\n    steps[0] += 1\n"
            "    if steps[0] == 3 and os.environ['RANK'] == '1':\n        raise RuntimeError('bad luck')\n"
            "    return agree(*args, **kwargs)\n"
            "engine.agree = failing\nimport sys\nengine.cli(pretrain.main)\n"
        )
    os.environ["PYTHONPATH"] = os.path.dirname(engine.__file__)
    job = torchrun("--standalone", "--nproc_per_node", "2", "failing.py", "--data", here, *PRETRAIN)
    said = job.communicate(timeout=100)[0]
    del os.environ["PYTHONPATH"]
    assert job.returncode != 0 and "RuntimeError: bad luck" in said
