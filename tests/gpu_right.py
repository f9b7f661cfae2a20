"""gpu.py right: the GPU computes what the CPU computes, in every way in which a run can be started.

The trainings here are those of lib/run.py, on clips made up in memory: no videos, no PyAV.
"""

import contextlib
import functools
import io
import json
import os
import shutil
import signal
import socket
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from contenders import DTYPES, MEMORY, Work, build
from torch import Tensor

from lib import engine, speed
from lib.run import Run
from masking import MASKS
from model import VideoMAE

STEPS = 20


@dataclass
class Config:
    """What Run wants to know; see pretrain.py."""

    batch: int = 4
    micro: int | None = None
    epochs: int = 1  # each is a step
    warmup: float = 2
    base_lr: float = 1e-3 * 256 / 4
    min_lr: float = 0.0
    clip_grad: float | None = None
    precision: str = "fp32"
    seed: int = 0
    workers: int = 0
    repeats: int = 1
    resume: bool = False
    compile: bool = False
    memory: str = "fast"
    log_every: int = 1
    save_minutes: float = 1000


class Clips:
    """Clips of smooth moving noise, (T, C, H, W) uint8: something can be learned from them."""

    def __init__(self, number: int, frames: int, resolution: int):
        generator = torch.Generator().manual_seed(0)
        self.split = SimpleNamespace(paths=[Path("a.avi")] * number, labels=[0] * number)
        coarse = torch.rand(number, 3, frames // 4 + 1, 4, 4, generator=generator)
        size = (frames, resolution, resolution)
        smooth = F.interpolate(coarse, size=size, mode="trilinear")
        self.clips = (255 * smooth).byte().transpose(1, 2).contiguous()

    def __len__(self) -> int:
        return len(self.clips)

    def batches(self, order):
        """(clips, labels, unreadable) of each micro-batch, as make_loader yields them."""
        for keys in order:
            index = torch.tensor([i for i, _ in keys])
            yield self.clips[index], torch.full((len(keys),), -1), {}


def sizes(bench) -> tuple[str, int, int]:
    """Model, frames and resolution of the trainings."""
    return ("toy", 4, 32) if bench.tiny else ("small", 16, 112)


def train(bench, name: str, device: str, stop: int | None = None, each=None, fused=True, **flags):
    """A training of STEPS steps in runs/NAME; returns (losses of all steps, model, run).

    `stop` is a step after which it gets SIGTERM; `each` is called after each step; flags are those
    of Config.
    """
    cfg, place = Config(epochs=STEPS, **flags), torch.device(device)
    if not cfg.resume:
        shutil.rmtree(Path("runs") / name, ignore_errors=True)
    size, frames, resolution = sizes(bench)
    torch.manual_seed(cfg.seed)
    model = VideoMAE(size, (frames, resolution, resolution)).to(place)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05, fused=fused)
    clips = Clips(cfg.batch, frames, resolution)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        run = Run("pretrain", name, cfg, model, optimizer, clips, place)
        batches = clips.batches(run.order)
        for step in run.steps():
            for video, _ in run.passes(batches):
                # Drawn on the CPU: the generators of the devices differ.
                torch.manual_seed(run.seed("mask"))
                mask = MASKS["tube"](torch.empty(len(video), 1), model.encoder.grid, 0.9)
                with run.autocast():
                    loss, _ = run.net(video, mask.to(place))
                run.backward(loss)
            if step == stop:
                os.kill(os.getpid(), signal.SIGTERM)
            run.update(engine.cosine_lr(step, run.total, run.warmup, 1e-3, 0.0))
            if each:
                each(step)
        run.log.bar.close()
    lines = [json.loads(line) for line in run.log.path.read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line], model, run


def gap(losses: list[float], others: list[float]) -> float:
    """The largest relative difference of two curves."""
    return max(abs(a / b - 1) for a, b in zip(losses, others, strict=True))


def near(difference: float, most: float, text: str, **numbers):
    """A row: right where the difference is at most `most`."""
    words = f"{text}: {difference:.1e} (at most {most:.0e})"
    return difference <= most, words, dict(numbers, difference=difference)


def weights(model) -> Tensor:
    """All weights of a model as one vector on the CPU."""
    return torch.cat([p.detach().float().cpu().flatten() for p in model.parameters()])


def apart(a: Tensor, b: Tensor) -> float:
    """Relative distance of two vectors."""
    return ((a - b).norm() / b.norm()).item()


# ------------------------------------------------------------------------------------------- rows


class Right:
    """The rows; reference() is the training that most of them are compared with."""

    def __init__(self, bench):
        self.bench, self.device = bench, bench.device

    @functools.cache  # noqa: B019  lives as long as the program
    def reference(self) -> list[float]:
        return train(self.bench, "fp32", self.device)[0]

    def gradients(self):
        """Loss and gradients of a step, on the CPU and here."""
        size, frames, resolution = sizes(self.bench)
        work, found = Work(size=size, frames=frames, resolution=resolution, batch=2), []
        first = None
        for device in ("cpu", self.device):
            model, forward = build(replace(work, device=device), "ours")
            first = first or model
            model.load_state_dict(first.state_dict())  # devices draw other weights
            loss = forward()[0]
            loss.backward()
            grads = torch.cat([p.grad.float().cpu().flatten() for p in model.parameters()])
            found.append((loss.item(), grads))
        (loss, grads), (here, grads_here) = found
        text = f"loss {here:.5f}, on the CPU {loss:.5f}; gradients differ by"
        return near(apart(grads_here, grads), 1e-3, text, loss=here, loss_cpu=loss)

    def like_cpu(self):
        """The curve of a training, on the CPU and here."""
        cpu = train(self.bench, "cpu", "cpu")[0]
        here = self.reference()
        text = f"loss {here[0]:.3f} to {here[-1]:.3f} in {len(here)} steps; curves differ by"
        return near(gap(here, cpu), 1e-2, text, losses=here, losses_cpu=cpu)

    def precision(self, precision: str):
        """The curve in bf16 or fp16 beside float32's."""
        losses, _, run = train(self.bench, precision, self.device, precision=precision)
        scale = f", scale {run.scaler.get_scale():.0f}" if precision == "fp16" else ""
        text = f"loss {losses[-1]:.3f}{scale}; differs from fp32's curve by"
        return near(gap(losses, self.reference()), 5e-2, text, losses=losses)

    def fused(self):
        """AdamW in one kernel and in many."""
        one = weights(train(self.bench, "fused", self.device)[1])
        many = weights(train(self.bench, "loops", self.device, fused=False)[1])
        return near(apart(one, many), 1e-3, "weights differ by")

    def compiling(self):
        """--compile: the same curve, compiled once, cut at one known place."""
        import torch._dynamo as dynamo

        dynamo.reset()
        counters, graphs = dynamo.utils.counters, []
        counters.clear()
        each = lambda step: graphs.append(counters["stats"]["unique_graphs"])
        losses = train(self.bench, "compile", self.device, compile=True, each=each)[0]
        again = graphs[-1] - graphs[0]
        # The graph is cut where split_tokens waits for the number of visible tokens. Nowhere else.
        cuts = [" ".join(reason.split()) for reason in counters["graph_break"]]
        others = [reason[:100] for reason in cuts if "_local_scalar_dense" not in reason]
        counts = dict(cuts=cuts, other_cuts=others, recompiled=again, graphs=graphs[-1])
        cut = f"{graphs[-1]} graphs, {len(others)} cuts other than that in split_tokens"
        text = f"{cut}, {again} compiled again; curves differ by"
        ok, text, numbers = near(gap(losses, self.reference()), 1e-2, text, **counts)
        return ok and not others and not again, text, numbers

    def memory(self):
        """--memory fast, less and least: the same gradients, ever less memory."""
        size, frames, resolution = sizes(self.bench)
        batch = 2 if self.bench.tiny else 16
        work = Work(size=size, frames=frames, resolution=resolution, batch=batch)
        work, found = replace(work, device=self.device), {}
        for who, how in MEMORY.items():
            self.bench.tidy()
            before = torch.cuda.memory_allocated() if self.bench.cuda else 0
            model, forward = build(work, who)
            speed.save_memory(model, how)
            if self.bench.cuda:
                torch.cuda.reset_peak_memory_stats()
            with torch.autocast(self.device, torch.bfloat16, enabled=self.bench.cuda):
                loss = forward()[0]
            loss.backward()
            peak = torch.cuda.max_memory_allocated() - before if self.bench.cuda else 0
            grads = torch.cat([p.grad.float().cpu().flatten() for p in model.parameters()])
            found[how] = (grads, peak / 2**20)
            del model, forward, loss
        worst = max(apart(grads, found["fast"][0]) for grads, _ in found.values())
        peaks = {how: round(peak) for how, (_, peak) in found.items()}
        words = ", ".join(f"{how} {peak} MB" for how, peak in peaks.items() if peak)
        ok, text, numbers = near(worst, 1e-2, f"{words} gradients differ by".strip(), peaks=peaks)
        falls = peaks["fast"] >= peaks["less"] >= peaks["least"]
        return ok and falls, text, numbers

    def ddp(self):
        """One process in a group of its own: the same curve."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        group = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
        os.environ.update(group, MASTER_PORT=port)
        try:
            engine.setup(self.device)
            losses, backend = train(self.bench, "ddp", self.device)[0], dist.get_backend()
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
            for name in (*group, "MASTER_PORT"):
                os.environ.pop(name, None)
        return near(gap(losses, self.reference()), 1e-2, f"{backend}; curves differ by")

    def resume(self):
        """Stopped by SIGTERM half-way and resumed: the same weights as in one go."""
        for precision in ("fp32",) if self.bench.tiny else ("bf16",):
            how = dict(device=self.device, precision=precision)
            whole = weights(train(self.bench, "whole", **how)[1])
            losses, _, _ = train(self.bench, "parts", **how, stop=STEPS // 2)
            rest = weights(train(self.bench, "parts", **how, resume=True)[1])
        same = "bit for bit" if torch.equal(whole, rest) else "not bit for bit"
        ok, text, numbers = near(apart(rest, whole), 1e-3, f"{same}; weights differ by")
        return ok and len(losses) == STEPS // 2 + 1, text, numbers

    def kernel(self):
        """The kernel that scaled_dot_product_attention takes, per precision."""
        found = {}
        for precision in ("bf16", "fp32"):
            model, forward = build(self.bench.work(batch=2), "ours")
            activity = torch.profiler.ProfilerActivity.CPU
            dtype = DTYPES[precision]
            autocast = torch.autocast(self.device, dtype, enabled=precision == "bf16")
            with torch.no_grad(), torch.profiler.profile(activities=[activity]) as profile:
                with autocast:
                    forward()
            names = {event.key.removeprefix("aten::") for event in profile.key_averages()}
            kernels = sorted(name for name in names if name.startswith("_scaled_dot_product"))
            found[precision] = ", ".join(kernels) or "plain products"
        ok = "flash" in found["bf16"] or "cudnn" in found["bf16"]
        text = "; ".join(f"{precision}: {names}" for precision, names in found.items())
        return ok, text, found


def run(bench) -> None:
    """All rows of `right`."""
    right = Right(bench)
    rows = {
        "loss and gradients, fp32": right.gradients,
        f"{STEPS} steps, fp32": right.like_cpu,
        f"{STEPS} steps, bf16": lambda: right.precision("bf16"),
        f"{STEPS} steps, fp16 and scaler": lambda: right.precision("fp16"),
        "attention kernel": right.kernel,
        "fused AdamW": right.fused,
        "--memory": right.memory,
        "DDP, one process": right.ddp,
        "--resume": right.resume,
        "--compile": right.compiling,
    }
    for what, call in rows.items():
        bench.row("right", what, call)
