"""One command that checks a GPU: is it right, fast, fed with data, and does it learn?

    python tests/gpu.py                        # at most 8 minutes on a large GPU; needs no data
    python tests/gpu.py --parts right fast --out FOLDER
    python tests/gpu.py --device cpu --tiny    # the same code on small sizes: only to test it

right   CPU and GPU compute alike; precisions, compiling, memory policies, DDP, resuming
fast    milliseconds, memory and share of the card's peak, beside Hugging Face's model
fed     clips per second of the loader with all cores, beside what a step takes
learn   the toy demo from end to end

Writes OUT/gpu.json and OUT/gpu.md after every row. A row that fails, or for which no time is left,
says so and costs nothing else. PyAV and transformers are needed by their rows only.
"""

import argparse
import contextlib
import functools
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import asdict, replace
from pathlib import Path

import torch
from benchmark import machine, ratio, table
from contenders import (
    HERE,
    MEMORY,
    Work,
    adamw,
    build,
    flops,
    matmul_peak,
    timed,
    train_step,
    utilisation,
)

from lib import speed

# Dense bf16 FLOP/s of the data sheets (V100: fp16). For other cards, the best product measured.
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "RTX 4090": 165e12, "V100": 125e12}


class Bench:
    """The rows so far, the time that is left, and the sizes to use."""

    def __init__(self, args):
        self.device, self.tiny, self.out = args.device, args.tiny, args.out
        self.cuda, self.end, self.rows = args.device == "cuda", time.time() + 60 * args.minutes, []
        self.rates = {}  # clips per second of steps that were measured

    def work(self, **changes) -> Work:
        """A step to measure: base, 16x224x224, 90 %, bf16, batch 32; smaller with --tiny."""
        work = Work(size="base", precision="bf16", batch=32, device=self.device, threads=1)
        work = replace(work, **changes)
        if not self.tiny:
            return work
        depth = dict(decoder_depth=1) if work.task == "step" else {}
        return replace(work, size="toy", frames=4, resolution=64, batch=2, **depth)

    def row(self, part: str, what: str, call, seconds: int = 5) -> None:
        """A row of the report: call() -> (ok, text, numbers), if `seconds` of time are left."""
        row, begin = dict(part=part, what=what, ok=None, numbers={}), time.time()
        if self.end - begin < seconds and not self.tiny:
            row["result"] = "left out: no time"
        else:
            try:
                row["ok"], row["result"], row["numbers"] = call()
            except Exception as error:
                where = traceback.extract_tb(error.__traceback__)[-1]
                reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
                row["ok"], row["result"] = False, f"failed in {where.name}: {reason}"
        row |= dict(seconds=round(time.time() - begin, 1), mark=MARKS[row["ok"]])
        self.rows.append(row)
        print(f"{part:6} {row['mark']:3} {what}: {row['result']} ({row['seconds']} s)", flush=True)
        self.write()
        self.tidy()

    def tidy(self) -> None:
        """Free what a row left behind."""
        if self.cuda:
            gc.collect()
            torch.cuda.empty_cache()

    def write(self) -> None:
        """The report as JSON and as a markdown table."""
        columns = {name: (name, "") for name in ("part", "what", "mark", "result", "seconds")}
        about = machine()
        name = about["gpus"][0] if self.cuda else about["cpu"]
        title = f"{name}, torch {about['torch']}, {time.strftime('%Y-%m-%d')}"
        self.out.mkdir(parents=True, exist_ok=True)
        content = dict(machine=about, tiny=self.tiny, rows=self.rows)
        (self.out / "gpu.json").write_text(json.dumps(content, indent=1) + "\n")
        (self.out / "gpu.md").write_text(f"{title}\n\n{table(columns, self.rows)}\n")

    @functools.cached_property
    def peak(self) -> tuple[float, str]:
        """FLOP/s of bf16, and where the number is from."""
        name = torch.cuda.get_device_name() if self.cuda else ""
        for card, peak in PEAKS.items():
            if card in name:
                return peak, "of the data sheet's peak"
        return matmul_peak(self.work()), "of the best matrix product"


MARKS = {True: "yes", False: "NO", None: "–"}

# ------------------------------------------------------------------------------------------- fast


class Racer:
    """A contender in this process: ready to take steps, and how much memory a step needs."""

    def __init__(self, work: Work, who: str):
        self.work, self.cuda, self.memory = work, work.device == "cuda", None
        before = torch.cuda.memory_allocated() if self.cuda else 0
        self.model, self.forward = build(work, who)
        if work.mode == "compiled":
            self.model.compile()
        elif who in MEMORY:
            speed.save_memory(self.model, MEMORY[who])
        self.optimizer = adamw(self.model)
        with torch.no_grad(), torch.autocast(work.device, torch.bfloat16):
            self.loss = self.forward()[0].item()
        self.take(2)
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.take(2)
            self.memory = (torch.cuda.max_memory_allocated() - before) / 2**20

    def take(self, steps: int) -> None:
        for _ in range(steps):
            train_step(self.work, self.forward, self.optimizer)

    def seconds(self, steps: int) -> float:
        """Seconds per step."""
        return timed(lambda: self.take(steps), self.cuda) / steps


def race(work: Work, programs: tuple[str, ...], rounds: int = 5, steps: int = 4) -> list[dict]:
    """ms, rounds, mb and loss of each program; they take their steps in turn."""
    if work.device == "cpu":
        rounds, steps = 1, 1
    racers = [Racer(work, who) for who in programs]
    times = [[] for _ in racers]
    for number in range(rounds):
        for i in list(range(len(racers)))[:: 1 if number % 2 == 0 else -1]:
            times[i].append(1e3 * racers[i].seconds(steps))
    return [
        dict(who=who, ms=statistics.median(ms), rounds=ms, mb=racer.memory, loss=racer.loss)
        for who, racer, ms in zip(programs, racers, times, strict=True)
    ]


def compete(bench: Bench, work: Work, programs: tuple[str, ...]):
    """The row of a race: ours first; the others' time and memory as multiples of ours."""
    found = race(work, programs)
    ours, (count, _), (peak, name) = found[0], flops(work), bench.peak
    share = utilisation(count * work.batch, ours["ms"], peak)
    bench.rates[work] = 1e3 * work.batch / ours["ms"]
    megabytes = lambda mb: "" if mb is None else f", {mb:.0f} MB"
    words = [f"ours {ours['ms']:.1f} ms{megabytes(ours['mb'])}, {share:.0f} % {name}"]
    ok = True
    for other in found[1:]:
        other["time_ratio"] = ratio(ours["rounds"], other["rounds"])
        text = f"{other['who']} {other['ms']:.1f} ms = {other['time_ratio']:.2f}x"
        if ours["mb"]:
            text += f"{megabytes(other['mb'])} = {other['mb'] / ours['mb']:.2f}x"
        words.append(text)
        ok = ok and abs(other["loss"] / ours["loss"] - 1) < 0.02  # they compute the same
    numbers = dict(work=asdict(work), programs=found, utilisation=share)
    return ok, "; ".join(words) + ("" if ok else "; BUT the losses differ"), numbers


def largest_batch(bench: Bench, who: str, most: int):
    """The largest power of two of clips that fits, and what a clip costs there."""
    work, found = bench.work(), None
    while work.batch <= most:
        try:
            found = dict(batch=work.batch, **race(work, (who,), rounds=2, steps=2)[0])
        except torch.OutOfMemoryError:
            break
        finally:
            bench.tidy()
        work = replace(work, batch=2 * work.batch)
    if not found:
        return False, f"{work.batch} clips do not fit", {}
    text = f"{found['batch']} clips, {found['ms'] / found['batch']:.2f} ms per clip"
    return True, text + (f", {found['mb']:.0f} MB" if found["mb"] else ""), found


OPERATIONS = {  # parts of PyTorch's names -> words; the first that fits
    "attention": "attention",
    "mm": "matrix products of linear layers",
    "linear": "matrix products of linear layers",
    "layer_norm": "LayerNorm",
    "gelu": "GELU",
    "adamw": "AdamW",
    "copy_": "copies and changes of type",
    "cat": "joining tensors",
    "index": "choosing tokens",
    "mul": "additions, products and the like",
    "add": "additions, products and the like",
    "sum": "sums",
    "std": "mean and variance of the target",
    "mean": "mean and variance of the target",
    "fill": "zeros",
}


def in_words(name: str) -> str:
    """An operation of PyTorch in words."""
    return next((words for part, words in OPERATIONS.items() if part in name.lower()), name)


def profile(bench: Bench):
    """The five most expensive kinds of operation of our step."""
    racer = Racer(bench.work(), "ours")
    activity = torch.profiler.ProfilerActivity
    activities = [activity.CPU, activity.CUDA] if bench.cuda else [activity.CPU]
    with torch.profiler.profile(activities=activities) as found:
        racer.take(2)
        if bench.cuda:
            torch.cuda.synchronize()
    key, spent = "self_device_time_total" if bench.cuda else "self_cpu_time_total", {}
    for event in found.key_averages():
        if event.key.startswith("aten::"):  # an operation; its kernels are counted with it
            words = in_words(event.key)
            spent[words] = spent.get(words, 0) + getattr(event, key)
    total = sum(spent.values())
    shares = {words: 100 * time / total for words, time in spent.items()}
    first = sorted(shares, key=shares.get, reverse=True)[:5]
    text = ", ".join(f"{words} {shares[words]:.0f} %" for words in first)
    return True, text, dict(shares=shares)


def fast(bench: Bench) -> None:
    """Rows of `fast`, the important ones first. Compiling comes last: it takes minutes."""
    four = ("ours", "ours-less", "ours-least", "hf")
    sizes = ["base", "small", "large"][: 1 if bench.tiny else 3]
    for size in sizes:
        for share in (0.9, 0.75):
            work = bench.work(size=size, ratio=share)
            name = f"step, {size}, {share:.0%} masked, eager"
            bench.row("fast", name, lambda work=work: compete(bench, work, four), 20)
    tune = bench.work(task="finetune", batch=16)
    both = ("ours", "hf")
    bench.row("fast", "fine-tuning, base, eager", lambda: compete(bench, tune, both), 20)
    bench.row("fast", "profile, base", lambda: profile(bench))
    most = 2 if bench.tiny else 512
    for who in four:
        call = functools.partial(largest_batch, bench, who, most)
        bench.row("fast", f"largest batch, base, {who}", call, 20)


def compiled(bench: Bench) -> None:
    """Rows of `fast` that compile."""
    for size in ["base", "small", "large"][: 1 if bench.tiny else 3]:
        work = bench.work(size=size, mode="compiled")
        call = functools.partial(compete, bench, work, ("ours", "hf"))
        bench.row("fast", f"step, {size}, 90% masked, compiled", call, 200)


# -------------------------------------------------------------------------------------------- fed


class RawFrames(torch.utils.data.Dataset):
    """Stands in for videos where PyAV is missing: cropping and scaling, no decoding."""

    def __init__(self, items: int):
        from torchvision.transforms import v2

        self.items, self.crop = items, v2.RandomResizedCrop(224, antialias=False)
        self.frames = torch.randint(0, 256, (16, 3, 240, 320), dtype=torch.uint8)

    def __len__(self) -> int:
        return self.items

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.crop(self.frames)


def loader_rate(batches, clips: int, first: int) -> float:
    """Clips per second of a loader, once it runs."""
    batches = iter(batches)
    for _ in range(first):
        next(batches)
    count = [0]

    def rest() -> None:
        count[0] = sum(1 for _ in batches)

    return clips / timed(rest, cuda=False) * count[0]


def fed(bench: Bench, decode: bool):
    """Clips per second of the loader beside those of a step of the ucf101 recipe."""
    cores, batch = (2, 2) if bench.tiny else (os.cpu_count(), 8)
    paths = []
    if decode:
        from bench_loader import dataset, write_files

        from data import make_loader

        paths = write_files(".", "XviD 320x240", [None] * (1 if bench.tiny else 4))

    def rate(workers: int) -> float:
        """Clips per second of `workers` processes."""
        number = workers * (2 if bench.tiny else 8)  # of batches
        if decode:
            keys = [[(i % len(paths), i * batch + k) for k in range(batch)] for i in range(number)]
            loader = make_loader(dataset(paths), keys, workers, pin=bench.cuda)
        else:
            items, pin = RawFrames(batch * number), bench.cuda
            loader = torch.utils.data.DataLoader(items, batch, num_workers=workers, pin_memory=pin)
        return loader_rate(loader, batch, workers)

    one, all_cores = rate(1), rate(cores)
    work = bench.work(ratio=0.75)
    if work not in bench.rates:
        bench.rates[work] = 1e3 * work.batch / race(work, ("ours",))[0]["ms"]
    step = bench.rates[work]
    what = "decoded and cropped" if decode else "cropped, not decoded: PyAV is missing"
    text = f"{one:.0f} clips/s {what} by 1 worker, {all_cores:.0f} by {cores} on {cores} cores; "
    text += f"a step takes {step:.0f} clips/s. "
    need = step / (all_cores / cores)
    if all_cores > step:
        text += f"The GPU is the bottleneck; {need:.0f} cores suffice"
    else:
        text += (
            f"Data is the bottleneck: {need:.0f} cores are needed, or --repeats {need / cores:.0f}"
        )
    found = dict(one_worker=one, clips_per_s=all_cores, step_clips_per_s=step, cores=cores)
    return True, text, dict(found, need=need)


# ------------------------------------------------------------------------------------------ learn


def learn(bench: Bench):
    """Pre-training and fine-tuning on toy videos, as `make demo` does, from the command line."""
    from lib import prepare

    if bench.tiny:
        prepare.make_toy("datasets/toy", train=24, test=12)
    short = ["--epochs", "1", "--warmup", "0"] if bench.tiny else []
    device, seconds = ["--device", bench.device], {}
    few = ["--shots", "2"] if bench.tiny else []
    workers = ["--workers", "4"] if bench.cuda else []
    stages = {
        "pretrain": ["--name", "pre"],
        "finetune": ["--name", "fine", "--init", "runs/pre/checkpoint.pt", *few],
    }
    for stage, flags in stages.items():
        begin = time.time()
        command = [sys.executable, str(HERE / f"{stage}.py"), *flags, *device, *workers, *short]
        left = None if bench.tiny else max(bench.end - begin, 1)
        done = subprocess.run(command, capture_output=True, text=True, timeout=left)
        if done.returncode:
            last_line = done.stderr.strip().splitlines()[-1]
            raise RuntimeError(f"{stage}.py: {last_line}")
        seconds[stage] = time.time() - begin
    top1 = json.loads(Path("runs/fine/results.json").read_text())["top1"]
    words = ", ".join(f"{stage} {spent:.0f} s" for stage, spent in seconds.items())
    return bench.tiny or top1 > 60, f"{words}; top-1 {top1:.1f} %", dict(seconds, top1=top1)


# -------------------------------------------------------------------------------------------- cli


@contextlib.contextmanager
def working_in(folder: str):
    """Runs and videos are written there, and gone afterwards."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def main(argv: list[str] | None = None) -> None:
    parts = ("right", "fast", "fed", "learn")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--minutes", type=float, default=8, help="no row begins after them")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    parser.add_argument("--tiny", action="store_true", help="small sizes; always on a CPU")
    args = parser.parse_args(argv)
    args.out = args.out.resolve()
    args.tiny = args.tiny or args.device == "cpu"
    bench = Bench(args)
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32 (Hugging Face's Conv3d)
    with tempfile.TemporaryDirectory() as folder, working_in(folder):
        if "right" in args.parts:
            import gpu_right

            gpu_right.run(bench)
        if "fast" in args.parts:
            fast(bench)
        if "fed" in args.parts:
            bench.row("fed", "loader, videos as UCF101's", lambda: fed(bench, decode=True), 30)
            if not bench.rows[-1]["ok"]:
                bench.row("fed", "loader, raw frames", lambda: fed(bench, decode=False), 30)
        if "learn" in args.parts:
            bench.row("learn", "toy demo", lambda: learn(bench), 60)
        if "fast" in args.parts:
            compiled(bench)
    print(f"written: {args.out / 'gpu.md'}")


if __name__ == "__main__":
    main()
