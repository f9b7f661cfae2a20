"""Checks that take hours; run by hand, not by pytest. Linux only (they read /proc). Results go to runs/NAME.

    python tests/long.py load --hours 2                       # pre-trains on the toy set, watches memory and files
    python tests/long.py kills --stage pretrain --kills 30    # kill -9 at random moments, --resume, compare; 6 minutes
    python tests/long.py kills --stage finetune --kills 30
    python tests/long.py kills --stage pretrain --kills 5 --workers 1         # and no process survives
    python tests/long.py kills --stage pretrain --kills 5 --processes 2       # torchrun, one of its processes killed
    python tests/long.py kills --stage finetune --kills 10 --signal TERM      # or USR1: asked to stop instead

`load` prints a line every ten minutes and at the end what grew. Expect the memory of the main process and of the
workers to be as flat as the noise (a slope of a few MB an hour over two hours), file descriptors and threads the same
at the start and at the end, and no processes or /dev/shm entries left behind. Ctrl-C ends it early, with what there is.

`kills` runs a small recipe once in peace, then again with a checkpoint after every step while it is killed, half of the
times while it writes, and resumed. Expect equal losses and final checkpoints, bit for bit, no checkpoint lost, and at
most a step computed twice a kill; with --signal exit code 0 each time and no step computed twice.
"""

import argparse
import contextlib
import csv
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import matplotlib
import numpy as np
import torch

HERE = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HERE))

import data  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

MARK = "LONG_CHECK"  # environment variable by which the processes of a run are found, whatever group they are in


# -------------------------------------------------------------------------------------------------- processes


def start(command: list, output, folder: Path = HERE) -> subprocess.Popen:
    """Start a command in a process group of its own, with both outputs appended to an open file."""
    env = os.environ | {MARK: f"{os.getpid()}-{time.time()}", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, stdout=output, stderr=output, cwd=folder, env=env, start_new_session=True)
    process.mark = f"{MARK}={env[MARK]}".encode()
    return process


def family(process: subprocess.Popen) -> list[int]:
    """The living processes that a command is made of, itself included."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if process.mark in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return sorted(found)


def survivors(process: subprocess.Popen, seconds: float = 20) -> list[int]:
    """The processes of a command that ended that are still there after some seconds; they are killed."""
    until = time.monotonic() + seconds
    while (left := family(process)) and time.monotonic() < until:
        time.sleep(0.2)
    for pid in left:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    return left


def usage(pid: int) -> tuple[float, int, int]:
    """(memory in MB, file descriptors, threads) of a process. Memory: what it holds itself, without mapped files."""
    about = Path(f"/proc/{pid}")
    lines = (about / "smaps_rollup").read_text().splitlines()
    memory = next(int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))
    threads = sum(1 for _ in (about / "task").iterdir())
    return memory / 1024, sum(1 for _ in (about / "fd").iterdir()), threads


def log_lines(run: Path) -> list[dict]:
    """The lines of log.jsonl that hold a step."""
    with contextlib.suppress(OSError):
        lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines() if line.endswith("}")]
        return [line for line in lines if "loss" in line]
    return []


# ------------------------------------------------------------------------------------------------------- load


def load(hours: float, name: str | None, every: float, workers: int) -> int:
    """Watch a long run; 1 where it failed, ended by itself, or left processes or shared memory behind."""
    name = name or time.strftime("load-%m%d-%H%M")
    run = HERE / "runs" / name
    run.mkdir(parents=True)
    os.chdir(HERE)
    data.make_toy(data.TOY)
    command = [sys.executable, "pretrain.py", "--name", name, "--workers", workers, "--save-minutes", 1]
    command += ["--epochs", max(int(1000 * hours), 20)]
    fields = ["hours", "step", "main_mb", "main_fds", "main_threads"]
    fields += [f"worker{i}_{what}" for i in range(workers) for what in ("mb", "fds", "threads")] + ["shm"]
    shm, rows, early = set(os.listdir("/dev/shm")), [], False
    with open(run / "output.txt", "w") as output, open(run / "load.csv", "w", newline="") as file:
        process = start([str(part) for part in command], output)
        print(f"{run}: process {process.pid}, for {hours:g} hours", flush=True)
        table = csv.writer(file)
        table.writerow(fields)
        begin = shown = time.time()
        try:
            while (now := time.time()) - begin < 3600 * hours and process.poll() is None:
                with contextlib.suppress(OSError, StopIteration):  # a process ended while we looked at it
                    others = [pid for pid in family(process) if pid != process.pid][:workers]
                    row = [(now - begin) / 3600, len(log_lines(run)) * 10, *usage(process.pid)]
                    row += [number for pid in others for number in usage(pid)]
                    row += [float("nan")] * (len(fields) - 1 - len(row)) + [len(os.listdir("/dev/shm"))]
                    table.writerow([f"{number:.5g}" for number in row])
                    file.flush()
                    rows.append(row)
                if now - shown > 600 or len(rows) == 3:
                    print(", ".join(f"{k} {v:.5g}" for k, v in zip(fields, rows[-1], strict=True)), flush=True)
                    plot(run / "load.png", fields, rows)
                    shown = now
                time.sleep(every)
        except KeyboardInterrupt as stopped:
            print(f"{stopped}: stopping early")
        finally:
            early = process.poll() is not None
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
        try:
            code = process.wait(120)
        except subprocess.TimeoutExpired:
            code = "none, two minutes after SIGTERM"
            process.kill()
    left = survivors(process)
    new = sorted(set(os.listdir("/dev/shm")) - shm)
    if len(rows) > 10:
        plot(run / "load.png", fields, rows)
        summary(fields, np.array(rows))
    print(f"exit code {code}{', ended by itself' * early}; processes left: {left or 'none'}; "
          f"new in /dev/shm: {new or 'nothing'}")  # fmt: skip
    return int(early or code != 0 or bool(left) or bool(new))


def summary(fields: list[str], rows: np.ndarray) -> None:
    """Print medians of the first tenth (after a warm-up) and of the last, and the slope an hour."""
    hours = rows[:, 0]
    rows = rows[hours >= min(5 / 60, hours[-1] / 5)]
    tenth = max(len(rows) // 10, 1)
    print(f"{rows[-1, 0]:.2f} hours, {len(rows)} samples after the warm-up, {rows[-1, 1]:.0f} steps")
    print(f"{'':16}{'first tenth':>12}{'last tenth':>12}{'an hour':>12}")
    for column, field in enumerate(fields):
        if field not in ("hours", "step"):
            there = rows[~np.isnan(rows[:, column])]
            first, last = np.median(there[:tenth, column]), np.median(there[-tenth:, column])
            slope = np.polyfit(there[:, 0], there[:, column], 1)[0] if len(there) > 2 else float("nan")
            print(f"{field:16}{first:12.1f}{last:12.1f}{slope:+12.2f}")


def plot(path: Path, fields: list[str], rows: list) -> None:
    """Memory of every process, and their file descriptors, against hours."""
    columns = dict(zip(fields, np.array(rows).T, strict=True))
    figure, axes = plt.subplots(2, 1, figsize=(9, 7), sharex=True, layout="constrained")
    for axis, what, title in zip(axes, ("mb", "fds"), ("memory, MB", "open file descriptors"), strict=True):
        for name, values in columns.items():
            if name.endswith("_" + what):
                axis.plot(columns["hours"], values, lw=1, label=name.split("_")[0])
        axis.set(ylabel=title, ylim=(0, None))
        axis.legend()
    axes[1].plot(columns["hours"], columns["shm"], lw=1, color="grey", label="in /dev/shm")
    axes[1].legend()
    axes[1].set(xlabel="hours")
    figure.savefig(path, dpi=100)
    plt.close(figure)


# ------------------------------------------------------------------------------------------------------ kills

STAGES = {
    "pretrain": "--repeats 1 --decoder-depth 1 --warmup 0.5",
    "finetune": "--init none --shots 0 --warmup 0.5 --drop-path 0.2 --head-dropout 0.2 --mixup 0.8 --cutmix 1",
}


def kills(stage: str, kills: int, steps: int, workers: int, processes: int, kind: str, seed: int) -> int:
    """Kill and resume a run until it is through, and compare it with one that was left in peace; 1 if they differ."""
    folder = HERE / "runs" / time.strftime(f"kills-{stage}-%m%d-%H%M%S")
    folder.mkdir(parents=True)
    data.make_toy(folder / "toy", train=48, test=24)
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [*launcher, str(HERE / f"{stage}.py"), *STAGES[stage].split(), "--data", "toy", "--batch", "4"]
    command += ["--epochs", str(steps // 12), "--log-every", "1", "--workers", str(workers), "--device", "cpu"]
    steps = steps // 12 * 12

    # In peace, and while at it: seconds to start, to train, and to write a checkpoint.
    begin, startup, writing, run = time.monotonic(), None, 0.0, folder / "runs/whole"
    with open(folder / "whole.txt", "w") as output:
        process = start([*command, "--name", "whole", "--save-every", "1"], output, folder)
        while process.poll() is None:
            startup = startup or (time.monotonic() - begin if (run / "log.jsonl").exists() else None)
            writing += 0.002 * (run / "checkpoint.tmp").exists() / steps
            time.sleep(0.002)
    whole, training = log_lines(run), time.monotonic() - begin - (startup or 0)
    if process.returncode or len(whole) != steps:
        print(f"{folder}/whole.txt: the uninterrupted run failed")
        return 1
    print(f"{folder}: {startup:.0f} s to start, {training:.0f} s for {steps} steps, {writing:.3f} s a checkpoint")
    sys.stdout.flush()

    run, found = folder / "runs/cut", Cuts(random.Random(seed), startup, training / steps, writing)
    command += ["--name", "cut", "--save-every", "1", "--resume"]
    over = False
    while not over:
        spacing = 1.6 * (steps - last(run)) / max(kills - found.kills, 1)  # steps from one kill to the next, at most
        text = folder / f"cut-{found.runs:02}.txt"
        over = found.attempt(command, text, run, kind if found.kills < kills else None, int(spacing))

    cut, problems = log_lines(run), found.problems
    same = [{line["step"]: line["loss"] for line in lines} for lines in (whole, cut)]
    if len(cut) != steps or same[0] != same[1]:
        problems.append(f"losses differ: {sum(same[0][k] != same[1].get(k) for k in same[0])} of {steps}")
    if different := compare(folder / "runs/whole/checkpoint.pt", run / "checkpoint.pt"):
        problems.append(f"checkpoints differ in {different}")
    for name, value in vars(found).items():
        if isinstance(value, int):
            print(f"{name.replace('_', ' '):32}{value:5}")
    print("\n".join(problems) or f"{steps} losses and the final checkpoints are equal bit for bit")
    return int(bool(problems))


class Cuts:
    """What many interrupted runs of one training came to. It takes so many seconds to start, for a step, to write."""

    def __init__(self, rng: random.Random, startup: float, step: float, writing: float):
        self.rng, self.startup, self.step, self.writing = rng, startup, step, writing
        self.runs = self.kills = self.before_the_first_step = self.during_writes = self.fell_back_to_previous = 0
        self.steps_computed_twice = self.checkpoints_lost = self.processes_left = 0
        self.problems = []

    def attempt(self, command: list[str], output: Path, run: Path, kind: str | None, spacing: int) -> bool:
        """Run a command, with a signal after 1 to `spacing` steps unless `kind` is None; True if it came to its end."""
        logged, kept, part, begin = last(run), newest(run), run / "checkpoint.tmp", time.time()
        with open(output, "w") as file:
            process = start(command, file, run.parents[1])
        self.runs += 1
        over = lambda: process.poll() is not None
        if kind == "KILL" and self.rng.random() < 0.15:
            until(over, self.rng.uniform(0, self.startup))
        elif kind:
            count = 1 + self.rng.randrange(max(spacing, 1))
            until(lambda: over() or (step := going_on(output)) is not None and last(run) >= step + count, 600)
            until(over, self.rng.uniform(0, self.step))
            if kind == "KILL" and self.rng.random() < 0.5:
                until(lambda: over() or changed(part, begin), 5, every=0.0003)
                time.sleep(self.rng.uniform(0, self.writing))
        if kind and not over():
            ranks = [pid for pid in children(process.pid) if variable(pid, "RANK")] or [process.pid]
            victim = self.rng.choice(ranks)  # of torchrun's processes; the loader workers, too, are asked to stop
            for pid in [victim] if kind == "KILL" else [victim, *children(victim)]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, getattr(signal, f"SIG{kind}"))
        try:
            code = process.wait(60 if kind else None)
        except subprocess.TimeoutExpired:
            code = None
        if left := survivors(process, 10 if code is not None else 0):
            self.processes_left += len(left)
            self.problems.append(f"{output}: processes left: {left}")
        text, began = output.read_text(errors="replace"), going_on(output)
        self.fell_back_to_previous += "previous.pt" in text
        if began is not None:
            self.steps_computed_twice += max(logged - began, 0)
            if began < kept:
                self.checkpoints_lost += 1
                self.problems.append(f"{output}: went on after step {began}, there was a checkpoint of step {kept}")
            if kind not in (None, "KILL") and began != logged:
                self.problems.append(f"{output}: went on after step {began}, {logged} were computed")
        if code is None:
            self.problems.append(f"{output}: still there a minute after the signal")
        elif code == 0 and "stopped by" not in text:
            return True
        elif kind not in (None, "KILL") and "steps without gradient" in text and "stopped by" not in text:
            pass  # the signal came after the last step, when there is nothing to save and it ends the process
        elif kind is None or (code == 0) != (kind != "KILL"):
            self.problems.append(f"{output}: exit code {code}")
            if kind is None or self.runs > 5 and not last(run):
                return True  # it would never end
        self.kills += 1
        self.before_the_first_step += began is None or last(run) <= began
        self.during_writes += changed(part, begin) or kept > 0 and not (run / "checkpoint.pt").exists()
        if newest(run) < kept:
            self.checkpoints_lost += 1
            self.problems.append(f"{output}: only step {newest(run)} can be read, there was a checkpoint of {kept}")
        return False


def until(condition, seconds: float, every: float = 0.02) -> None:
    """Wait for a condition, for some seconds at most."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and not condition():
        time.sleep(every)


def changed(path: Path, since: float) -> bool:
    """Whether there is a file, written after a time."""
    try:
        return path.stat().st_mtime > since
    except OSError:
        return False


def children(pid: int) -> list[int]:
    """The living processes that a process started."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (folder / "stat").read_text().rpartition(")")[2].split()[1] == str(pid):
                found.append(int(folder.name))
    return found


def variable(pid: int, name: str) -> str | None:
    """An environment variable of a process."""
    with contextlib.suppress(OSError):
        for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            if entry.startswith(f"{name}=".encode()):
                return entry.decode().partition("=")[2]
    return None


def going_on(output: Path) -> int | None:
    """The step after which a run goes on, as its progress bar first shows it; None where it did not come so far."""
    found = re.search(r"(\d+)/\d+ \[\S+<\?, \?step/s", output.read_text(errors="replace"))
    return int(found[1]) if found else None


def last(run: Path) -> int:
    """The last step in log.jsonl."""
    return max((line["step"] for line in log_lines(run)), default=0)


def newest(run: Path) -> int:
    """The step of the newest checkpoint that can be read, 0 where there is none."""
    for name in ("checkpoint.pt", "previous.pt"):
        with contextlib.suppress(Exception):
            return torch.load(run / name, weights_only=True)["step"]
    return 0


def compare(one: Path, other: Path) -> list[str]:
    """Names of what differs between two checkpoints, other than the name of the run."""
    states = [torch.load(path, weights_only=True) for path in (one, other)]
    for state in states:
        for key in ("name", "resume"):
            state["config"]["stage"].pop(key)
    found = []

    def walk(a, b, name):
        if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
            for key in a:
                walk(a[key], b[key], f"{name}.{key}" if name else str(key))
        elif isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
            for i, (x, y) in enumerate(zip(a, b, strict=True)):
                walk(x, y, f"{name}.{i}")
        elif not (torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b):
            found.append(name)

    walk(*states, "")
    return found


def interrupt(number: int, frame) -> None:
    raise KeyboardInterrupt(signal.Signals(number).name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    watch = commands.add_parser("load", help="watch a long run")
    watch.add_argument("--hours", type=float, default=2, help="how long (default: %(default)s)")
    watch.add_argument("--name", help="of the run (default: load-DATE)")
    watch.add_argument("--every", type=float, default=20, help="seconds between two looks (default: %(default)s)")
    watch.add_argument("--workers", type=int, default=2, help="loader workers (default: %(default)s)")
    cut = commands.add_parser("kills", help="kill and resume a short run many times")
    cut.add_argument("--stage", choices=STAGES, default="pretrain", help="which script (default: %(default)s)")
    cut.add_argument("--kills", type=int, default=30, help="how many (default: %(default)s)")
    cut.add_argument("--steps", type=int, default=120, help="optimiser steps (default: %(default)s)")
    cut.add_argument("--workers", type=int, default=0, help="loader workers (default: %(default)s)")
    cut.add_argument("--processes", type=int, default=1, help="through torchrun, if over 1 (default: %(default)s)")
    cut.add_argument("--signal", dest="kind", choices=("KILL", "TERM", "USR1"), default="KILL", help="default: KILL")
    cut.add_argument("--seed", type=int, default=0, help="of the random moments (default: %(default)s)")
    args = vars(parser.parse_args())
    for number in (signal.SIGINT, signal.SIGTERM):  # also where nohup or a shell's & made it ignored
        signal.signal(number, interrupt)
    sys.exit({"load": load, "kills": kills}[args.pop("command")](**args))


if __name__ == "__main__":
    main()
