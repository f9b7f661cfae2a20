"""How fast and how large: our steps beside other programs' steps, our loader beside decoding alone.

    python tests/benchmark.py step        # pre-training: ours, Hugging Face's, a plain one
    python tests/benchmark.py step --sizes base --precisions bf16 --modes eager --batch 16
    python tests/benchmark.py step --who ours ours-less ours-least
    python tests/benchmark.py finetune
    python tests/benchmark.py loader      # needs PyAV; decord only for its row
    python tests/benchmark.py scale       # our step as clip, ratio, decoder and model grow
    python tests/benchmark.py hours       # what the recipes need in GPU hours, in seconds

Each command prints a table and writes OUT/COMMAND.json (default: tests/reference). Rows of the same
machine and versions stay there. So a table can be made in pieces. On 2 CPU cores, one row group of
`step` takes 2 minutes (small) to 6 (base), a compiled one a few more. On a GPU use gpu.py.

How it is measured. tests/contenders.py says what is compared. Each contender is a process of its
own, so its memory is its own. All must give the same loss and predictions. After a warm-up they are
asked for a few steps each, in turn: A B C, C B A, ... The table tells the median of the rounds and
the median of the ratios of the rounds. Memory is the peak of the process in a step, less what it
held after imports. Utilisation is the FLOPs that a step needs over its time and over the best
matrix product measured here in the same type. Run it where nothing else computes.
"""

import argparse
import contextlib
import importlib.metadata
import itertools
import json
import math
import multiprocessing
import os
import platform
import re
import statistics
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from contenders import (
    CONTENDERS,
    HERE,
    MEMORY,
    Work,
    adamw,
    build,
    flops,
    matmul_peak,
    settle,
    timed,
    train_step,
    utilisation,
)

from lib import speed
from model import SIZES

# --------------------------------------------------------------------------------- one contender


def peak_memory(reset: bool = False) -> float:
    """MB of memory that this process held at most since the last reset; then reset."""
    status = Path("/proc/self/status").read_text()
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024


def contend(work: Work, who: str, pipe) -> None:
    """The process of a contender.

    It sends its loss and some predictions, and whether our attention kernel is in its way. Then,
    for each number of steps received, it sends dict(seconds of a step, memory, whole) in MB. The
    first steps are the warm-up. 0 steps end the process.
    """
    torch.set_num_threads(work.threads)
    if who == "hf":
        from transformers import VideoMAEForPreTraining  # noqa: F401  before memory is looked at
    if work.mode == "compiled":
        torch.compile(lambda x: x + 1)(torch.ones(1))  # loads the compiler
    peak_memory(reset=True)
    held = peak_memory()
    model, forward = build(work, who)
    settle(work, who, model)
    optimizer = adamw(model)
    with torch.no_grad():
        loss, pred = forward()
    said = [loss.item(), *pred.flatten()[:: max(pred.numel() // 7, 1)].tolist()]
    kernel = getattr(speed.LIBRARY, "installed", False)
    pipe.send(dict(said=said, kernel=kernel))
    if work.mode == "compiled":
        model.compile()

    def run(steps: int) -> None:
        for _ in range(steps):
            train_step(work, forward, optimizer)

    warm = False
    for steps in iter(pipe.recv, 0):
        seconds = timed(lambda n=steps: run(n), cuda=False)
        whole, warm = peak_memory(reset=not warm), True
        pipe.send(dict(seconds=seconds / steps, memory=whole - held, whole=whole))


class Contender:
    """The process of a contender, seen from outside."""

    def __init__(self, work: Work, who: str):
        os.environ["OMP_NUM_THREADS"] = str(work.threads)  # of the process to come
        context, self.name = multiprocessing.get_context("spawn"), f"{who} {work}"
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=contend, args=(work, who, other), daemon=True)
        self.process.start()
        other.close()  # so that an end of the process is noticed
        first = self.receive()
        self.said = first["said"]
        if first["kernel"] and who not in MEMORY:
            raise RuntimeError(f"{self.name} would use the attention kernel of lib/speed.py")

    def receive(self) -> dict:
        try:
            return self.pipe.recv()
        except EOFError as error:
            raise RuntimeError(f"{self.name} ended, see above") from error

    def turn(self, steps: int) -> dict[str, float]:
        """What some steps cost."""
        self.pipe.send(steps)
        return self.receive()

    def close(self) -> None:
        self.process.terminate()
        self.process.join()


# --------------------------------------------------------------------------------------- in turn


def in_turn(contenders: list, rounds: int, steps: int) -> list[dict]:
    """Warm all up, then ask them in turn, every other round backwards; `measured` of each."""
    for contender in contenders:
        contender.turn(2)
    costs = [[] for _ in contenders]
    for number in range(rounds):
        for i in list(range(len(contenders)))[:: 1 if number % 2 == 0 else -1]:
            costs[i].append(contenders[i].turn(steps))
    return [measured(cost) for cost in costs]


def measured(costs: list[dict]) -> dict:
    """ms (median), rounds_ms, mb and whole_mb (at most) of a step, from the costs of each round."""
    milliseconds = [round(1e3 * cost["seconds"], 3) for cost in costs]
    return dict(
        ms=statistics.median(milliseconds),
        rounds_ms=milliseconds,
        mb=max(cost["memory"] for cost in costs),
        whole_mb=max(cost["whole"] for cost in costs),
    )


def ratio(one: list[float], other: list[float]) -> float:
    """The other's cost as a multiple of the one's, round by round; the median."""
    return statistics.median(b / a for a, b in zip(one, other, strict=True))


def compare(entries: list[tuple[Work, str]], rounds: int, steps: int, same: bool) -> list[dict]:
    """What was measured of each (work, who).

    With `same`, RuntimeError unless all have the same loss and predictions.
    """
    contenders = []
    try:
        for work, who in entries:
            contenders.append(Contender(work, who))
        first = torch.tensor(contenders[0].said)
        for other in contenders[1:] if same else ():
            if not torch.allclose(torch.tensor(other.said), first, rtol=1e-3, atol=1e-3):
                names = f"{contenders[0].name} and {other.name}"
                raise RuntimeError(f"{names} differ: {contenders[0].said} and {other.said}")
        return in_turn(contenders, rounds, steps)
    finally:
        for contender in contenders:
            contender.close()


# ------------------------------------------------------------------------------- tables and files


def machine() -> dict:
    """What the figures depend on, for the JSON."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else []
    found = dict(cpu=names[0] if names else platform.processor(), cores=os.cpu_count())
    found["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    for name in ("torch", "torchvision", "transformers", "av", "decord"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found | {"python": platform.python_version()}


def keep(args, rows: list[dict], keys: tuple[str, ...], **more) -> list[dict]:
    """Write rows to OUT/COMMAND.json in place of those with the same keys; all that are there now.

    Rows of another machine or other versions go: they must not stand in one table with these.
    """
    path, about = args.out / f"{args.command}.json", machine()
    old = json.loads(path.read_text()) if path.exists() else {}
    identity = lambda row: [row.get(key) for key in keys]
    new = [identity(row) for row in rows]
    same_machine = old.get("machine") == about
    kept = [row for row in old.get("rows", []) if same_machine and identity(row) not in new]
    how = dict(date=time.strftime("%Y-%m-%d"))
    merged = kept + [how | row for row in rows]
    args.out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(machine=about, **more, rows=merged), indent=1) + "\n")
    return merged


def table(columns: dict, rows: list[dict]) -> str:
    """Rows as markdown; columns are {heading: (key, format)}, a missing value is a dash."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = (
            "–" if row.get(key) is None else format(row[key], how) for key, how in columns.values()
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


# ------------------------------------------------------------------------------ step and finetune

STEP_KEYS = ("size", "precision", "mode", "batch", "threads", "who")


def steps(args) -> None:
    """Rows of `step` or `finetune`, one per contender."""
    basic = Work(task=args.command, batch=args.batch, threads=args.threads)
    for size, precision, mode in itertools.product(args.sizes, args.precisions, args.modes):
        work = replace(basic, size=size, precision=precision, mode=mode)
        # A compiled model chooses by itself what to keep: --memory means nothing there.
        who = [name for name in args.who if mode == "eager" or MEMORY.get(name, "fast") == "fast"]
        torch.set_num_threads(work.threads)
        peak = matmul_peak(work)
        found = compare([(work, name) for name in who], args.rounds, args.steps, same=True)
        peak = max(peak, matmul_peak(work))  # measured twice, as others may compute, too
        count, _ = flops(work)
        rows = []
        for name, cost in zip(who, found, strict=True):
            row = asdict(work) | cost | dict(who=name, first=who[0])
            row["time_ratio"] = ratio(found[0]["rounds_ms"], cost["rounds_ms"])
            row["mb_ratio"] = cost["mb"] / found[0]["mb"]
            row |= dict(gflops_per_clip=count / 1e9, peak_gflops=peak / 1e9)
            row["utilisation"] = utilisation(count * work.batch, cost["ms"], peak)
            rows.append(row)
        merged = keep(args, rows, STEP_KEYS)  # after each, as it takes long
        print(table(STEP_COLUMNS, rows), flush=True)
    print("\nall rows:", table(STEP_COLUMNS, merged), sep="\n")


STEP_COLUMNS = {
    "model": ("size", ""),
    "precision": ("precision", ""),
    "mode": ("mode", ""),
    "clips": ("batch", ""),
    "threads": ("threads", ""),
    "program": ("who", ""),
    "ms": ("ms", ".0f"),
    "of the first's time": ("time_ratio", ".2f"),
    "MB": ("mb", ".0f"),
    "of the first's MB": ("mb_ratio", ".2f"),
    "% of peak": ("utilisation", ".0f"),
}

# ---------------------------------------------------------------------------- cost as work grows

FACTORS = {
    "frames": (4, 8, 16, 32),
    "resolution": (112, 160, 224, 320),
    "ratio": (0.5, 0.75, 0.9, 0.95),
    "decoder_depth": (1, 2, 4, 8),
    "size": ("tiny", "small", "base"),
}


def scale(args) -> None:
    """Rows of `scale`: our step, one factor changed at a time around small, 16x224x224, 90 %."""
    basic = Work(batch=args.batch, decoder_depth=4, threads=args.threads)
    for factor, values in FACTORS.items():
        works = [replace(basic, **{factor: value}) for value in values]
        found = compare([(work, "ours") for work in works], args.rounds, args.steps, same=False)
        rows = []
        for work, cost in zip(works, found, strict=True):
            row = dict(factor=factor, value=getattr(work, factor), batch=work.batch, **cost)
            rows.append(row | dict(gflops_per_clip=flops(work)[0] / 1e9))
        merged = keep(args, rows, ("factor", "value", "batch"))
    columns = {"factor": ("factor", ""), "value": ("value", ""), "ms": ("ms", ".0f")}
    columns |= {"MB": ("mb", ".0f"), "GFLOP per clip": ("gflops_per_clip", ".0f")}
    print(table(columns, merged))


# --------------------------------------------------------------------------- hours of the recipes

# Videos of the training parts. That of k400 shrinks, as videos leave YouTube.
VIDEOS = {"ucf101": 9537, "hmdb51": 3570, "ssv2": 168_913, "k400": 240_000}
VIDEOS |= {"ucf101-short": 9537, "hmdb51-short": 3570}
LIKE = {"ssv2": "VP9", "k400": "H.264"}  # files in `loader` that are as theirs; the others: XviD
GPUS = {"A100": 312e12, "H100": 989e12, "RTX 4090": 165e12}  # dense bf16 FLOP/s of the data sheets
ASSUMED = (0.2, 0.35)  # utilisation; an H100 reached 0.22 with base and 256 clips (docs/speed.md)
REPORTED = {"ucf101": (30, 8), "k400": (27, 64)}  # hours and GPUs that the authors report


def gpu_hours(total_flops: float, peak: float, share: float) -> float:
    """Hours that one GPU takes at a share of its peak."""
    return total_flops / (peak * share) / 3600


def hours(args) -> None:
    """Rows of `hours`: what the published recipes need, from counted FLOPs and data sheets."""
    from pretrain import PRESETS, Config

    path = args.out / "loader.json"
    decoded = json.loads(path.read_text())["rows"] if path.exists() else []
    rate = {row["files"].split()[0]: row["clips_per_s"] for row in decoded if row["who"] == "ours"}
    rows = []
    for preset, videos in VIDEOS.items():
        keys = ("size", "ratio", "epochs", "batch", "repeats")
        recipe = {key: PRESETS[preset].get(key, getattr(Config, key)) for key in keys}
        per_clip, _ = flops(Work(size=recipe["size"], ratio=recipe["ratio"]))
        seen = recipe["epochs"] * (videos // recipe["batch"]) * recipe["batch"]  # whole batches
        total = seen * recipe["repeats"] * per_clip
        row = recipe | dict(preset=preset, clips=seen * recipe["repeats"], exaflops=total / 1e18)
        row["gflops_per_clip"] = per_clip / 1e9
        for gpu, peak in GPUS.items():
            least, most = (gpu_hours(total, peak, share) for share in ASSUMED[::-1])
            row[gpu] = f"{least:.0f}-{most:.0f}" if most > 3 else f"{least:.1f}-{most:.1f}"
            per_core = rate.get(LIKE.get(preset, "XviD"))
            if per_core:  # clips of one video are read at once, for hardly more than one
                need = [peak * s / per_clip / recipe["repeats"] / per_core for s in ASSUMED]
                row[f"{gpu} cores"] = f"{need[0]:.0f}-{need[1]:.0f}"
        if preset in REPORTED:
            row["reported_gpu_hours"] = math.prod(REPORTED[preset])
            row["reported_tflops"] = total / row["reported_gpu_hours"] / 3600 / 1e12
        rows.append(row)
    keep(args, rows, ("preset",), gpus=GPUS, assumed_utilisation=ASSUMED, videos=VIDEOS)
    columns = {"recipe": ("preset", ""), "model": ("size", ""), "clips": ("clips", ",")}
    columns |= {"GFLOP per clip": ("gflops_per_clip", ".0f"), "EFLOP": ("exaflops", ".1f")}
    columns |= {f"{gpu}, hours": (gpu, "") for gpu in GPUS}
    columns |= {f"cores per {gpu}": (f"{gpu} cores", "") for gpu in GPUS}
    columns["GPU hours reported"] = ("reported_gpu_hours", "")
    print(table(columns, rows))
    print(
        f"\nHours of one GPU at {ASSUMED[0]:.0%} to {ASSUMED[1]:.0%} of the data sheet's dense "
        f"bf16 rate: an assumption.\nCores that decode as fast, by the clips/s of `loader`."
    )


# -------------------------------------------------------------------------------------------- cli


def loader(args) -> None:
    import bench_loader  # needs PyAV

    bench_loader.run(args)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = dict(step=steps, finetune=steps, loader=loader, scale=scale, hours=hours)
    parser.add_argument("command", choices=commands)
    add = parser.add_argument
    add("--sizes", nargs="+", choices=SIZES, default=["small", "base"], help="models")
    add("--precisions", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    add("--modes", nargs="+", choices=["eager", "compiled"], default=["eager", "compiled"])
    who = ["ours", "ours-less", "hf", "plain"]
    add("--who", nargs="+", choices=CONTENDERS, default=who, help="ratios are those to the first")
    add("--batch", type=int, default=4, help="clips per step")
    add("--threads", type=int, default=os.cpu_count(), help="of each contender, in its turn")
    add("--rounds", type=int, default=5, help="times that each contender is asked")
    add("--steps", type=int, default=2, help="steps per round")
    add("--files", type=int, default=4, help="of loader: files of each kind")
    add("--clips", type=int, default=5, help="of loader: clips of each file")
    add("--videos", nargs="+", help="of loader: real videos; the files get their pictures")
    add("--workers", nargs="+", type=int, default=[1, 2], help="of loader: numbers of workers")
    add("--out", type=Path, default=HERE / "tests" / "reference", help="folder of the results")
    args = parser.parse_args(argv)
    commands[args.command](args)


if __name__ == "__main__":
    main()
