"""Plumbing: flags, learning rate, parameter groups, checkpoints, log."""

import json
import os
import pickle
import resource
import signal
import time
from dataclasses import dataclass
from typing import Literal

import pytest
import torch
from torch import nn

import data
import engine
import model
import visualize


@dataclass
class Flags:
    count: int = engine.opt(3, "clips", 0)
    rate: float | None = engine.opt(None, "Hz")
    kind: Literal["a", "b"] = engine.opt("a", "100% kind")
    cube: tuple[int, ...] = engine.opt((2, 8, 8), "pixels")
    flip_it: bool = engine.opt(True, "mirror")
    na_me: str = engine.opt("x", "word")


PRESETS = {"small": dict(count=1), "big": dict(count=9, rate=2.0)}


def test_flags_win_over_presets_and_presets_over_defaults():
    assert engine.parse_config(Flags, [], "", PRESETS) == ("small", Flags(count=1))
    preset, flags = engine.parse_config(Flags, "big --rate 5 --cube 1 2 3 --no-flip-it --kind b".split(), "", PRESETS)
    assert preset == "big" and flags == Flags(9, 5.0, "b", (1, 2, 3), False)
    assert engine.parse_config(Flags, ["--flip_it"], "", PRESETS)[1].flip_it is True  # underscores work too
    assert engine.parse_config(Flags, ["--rate=-1e-3"], "", PRESETS)[1].rate == -1e-3
    assert engine.parse_config(Flags, ["--na_me=a_b"], "", PRESETS)[1].na_me == "a_b"


@pytest.mark.parametrize(
    "argv", ["--cuont 3", "--coun 3", "huge", "--count many", "--kind c", "--flip-it False", "--count -1"]
)
def test_mistakes_in_flags_are_one_line_and_exit_code_2(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        engine.parse_config(Flags, argv.split(), "", PRESETS)
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_help_shows_units_and_defaults(capsys):
    with pytest.raises(SystemExit):
        engine.parse_config(Flags, ["--help"], "", PRESETS)
    assert "100% kind (default: a)" in " ".join(capsys.readouterr().out.split())


def test_learning_rate_follows_the_official_schedule():
    lr = [data.cosine_lr(step, 100, 10, 1.0, 0.1) for step in range(100)]
    assert lr[0] == 0 and lr[9] == 1 and lr[3] == pytest.approx(3 / 9)  # linspace(0, 1, 10)
    assert lr[10] == 1 and lr[55] == pytest.approx(0.55)  # half-way: the mean of peak and floor
    assert 0.1 < lr[99] < 0.101
    assert data.cosine_lr(0, 10, 0, 1.0, 0.0) == 1


def test_effective_batch():
    assert data.split_batch(192, 1, None) == (192, 1)
    assert data.split_batch(192, 4, None) == (48, 1)
    assert data.split_batch(192, 4, 16) == (16, 3)
    for bad in ((10, 4, None), (192, 1, 100), (2, 4, None)):
        with pytest.raises(ValueError, match=str(bad[0])):
            data.split_batch(*bad)


def parts():
    net = nn.Linear(3, 4)
    return net, torch.optim.AdamW(net.parameters())


def test_checkpoints_survive_a_failed_write(tmp_path):
    engine.save_checkpoint(tmp_path, *parts(), stage="pretrain", step=1)
    with pytest.raises((TypeError, AttributeError, pickle.PicklingError)):
        engine.save_checkpoint(tmp_path, *parts(), stage="pretrain", step=lambda: 0)  # stops in the middle
    assert engine.load_checkpoint(tmp_path / "checkpoint.pt", "pretrain")["step"] == 1


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path):
    """A limit on the size of files fails a write in the middle, as a full disk does."""
    engine.save_checkpoint(tmp_path, *parts(), stage="pretrain", step=1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, limits[1]))
    try:
        with pytest.raises(ValueError, match="checkpoint.pt cannot be written"):
            engine.save_checkpoint(tmp_path, *parts(), stage="pretrain", step=2, more=torch.zeros(100000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint.pt"]
    assert engine.load_checkpoint(tmp_path / "checkpoint.pt", "pretrain")["step"] == 1


@pytest.mark.parametrize("how", ["cut", "empty", "gone", "one bit", "text"])
def test_a_damaged_checkpoint_is_recognised_and_the_one_before_taken(tmp_path, capsys, how):
    for step in (1, 2):
        engine.save_checkpoint(tmp_path, *parts(), stage="pretrain", step=step, more=torch.zeros(1000))
    path = tmp_path / "checkpoint.pt"
    whole = bytearray(path.read_bytes())
    assert engine.load_checkpoint(path, "pretrain")["step"] == 2 and capsys.readouterr().err == ""
    whole[len(whole) // 2] ^= how == "one bit"
    path.write_bytes({"cut": whole[: len(whole) // 2], "empty": b"", "one bit": whole}.get(how, b"hello"))
    if how == "gone":
        path.unlink()  # killed between the two renames
    assert engine.load_checkpoint(path, "pretrain")["step"] == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "checkpoint.pt" in said and "taking" in said and "previous.pt" in said
    (tmp_path / "previous.pt").write_bytes(b"hello")
    with pytest.raises(ValueError, match="previous.pt is not a readable checkpoint"):
        engine.load_checkpoint(path, "pretrain")


def test_signals_are_noted_until_told_otherwise():
    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    try:
        came = engine.stop_signals(catch=True)
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert came == [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT]
        with pytest.raises(KeyboardInterrupt):  # the second Ctrl-C does not wait
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        engine.stop_signals(catch=False)
        assert signal.getsignal(signal.SIGTERM) == signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Attack:
    def __reduce__(self):
        return (open, ("/tmp/videomae-was-here", "w"))


def test_what_is_no_checkpoint_is_refused(tmp_path):
    files = {
        name: tmp_path / name for name in ("text.pt", "attack.pt", "other.pt", "finetune.pt", "cut.pt", "missing.pt")
    }
    files["text.pt"].write_text("hello")
    torch.save({"stage": "pretrain", "model": Attack()}, files["attack.pt"])
    torch.save({"state_dict": {}}, files["other.pt"])
    torch.save({"stage": "finetune"}, files["finetune.pt"])
    whole = tmp_path / "whole.pt"
    torch.save({"stage": "pretrain", "model": torch.zeros(10000)}, whole)
    files["cut.pt"].write_bytes(whole.read_bytes()[:20000])
    for name, path in files.items():
        with pytest.raises(ValueError, match=name):
            engine.load_checkpoint(path, "pretrain")
    assert not os.path.exists("/tmp/videomae-was-here")


def test_cli_prints_user_errors_and_lets_bugs_through(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["stage.py"])
    with pytest.raises(SystemExit) as stop:
        engine.cli(lambda argv: engine.load_checkpoint(tmp_path / "none.pt", "pretrain"))
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith(f"error: {tmp_path}/none.pt") and said.count("\n") == 1
    assert "No such file" in said
    with pytest.raises(ValueError, match="invalid literal"):
        engine.cli(lambda argv: json.loads("[1]", parse_int=lambda s: int("x")))


def test_log_drops_what_the_checkpoint_does_not_cover(tmp_path):
    path = tmp_path / "run" / "log.jsonl"
    log = visualize.Log(path, 0, 30, on=True)
    log.write(config={})
    for step in (10, 20, 30):
        log.write(step=step, loss=1.0 / step)
    path.write_text(path.read_text() + '{"step": 15, "lo')  # killed while writing
    visualize.Log(path, 20, 30, on=True)
    assert [json.loads(line).get("step") for line in path.read_text().splitlines()] == [None, 10, 20]
    visualize.Log(path, 0, 30, on=True)
    assert path.read_text() == ""


def test_precision():
    cpu = torch.device("cpu")
    assert model.precision_dtype("bf16", cpu) == torch.bfloat16
    assert model.precision_dtype("auto", cpu) in (torch.bfloat16, torch.float32)


def test_cuda_without_a_gpu_is_one_clear_error():
    if torch.cuda.is_available():
        pytest.skip("has a GPU")
    with pytest.raises(ValueError, match="--device cpu"):
        engine.setup("cuda")


@pytest.mark.parametrize("shard", [False, True])
def test_spread_models_compile(tmp_path, shard):
    """Over processes, here one: FSDP2 gathers weights between the blocks, where there can be no one graph."""
    torch._dynamo.reset()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        size = dict(dim=24, depth=1, heads=2, decoder_dim=24, decoder_depth=1, decoder_heads=2)
        mae = model.VideoMAE(size, (4, 16, 16), (2, 8, 8))
        net = engine.parallel(mae, shard)
        mae.compile(backend="aot_eager")
        mask = torch.tensor([[True, False, False, True] * 2])
        loss, _ = net(torch.randint(256, (1, 4, 3, 16, 16), dtype=torch.uint8), mask)
        loss.backward()
        assert all(p.grad is not None for p in mae.parameters())
    finally:
        torch.distributed.destroy_process_group()
