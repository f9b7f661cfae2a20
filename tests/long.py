"""Checks that take hours; run by hand, not by pytest. Linux only (they read /proc). Results go to runs/NAME.

    python tests/long.py load --hours 2        # pre-trains on the toy set and watches memory, files and threads

`load` prints a line every ten minutes and at the end what grew. Expect the memory of the main process and of the
workers to be as flat as the noise (a slope of a few MB an hour over two hours), file descriptors and threads the same
at the start and at the end, and no processes or /dev/shm entries left behind. Ctrl-C ends it early, with what there is.
"""

import argparse
import contextlib
import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import matplotlib
import numpy as np

HERE = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HERE))

import data  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

MARK = "LONG_CHECK"  # environment variable by which the processes of a run are found, whatever group they are in


# -------------------------------------------------------------------------------------------------- processes


def start(command: list, output, folder: Path = HERE) -> subprocess.Popen:
    """Start a command in a process group of its own, with both outputs appended to an open file."""
    env = os.environ | {MARK: f"{os.getpid()}-{time.time()}", "OMP_NUM_THREADS": "1"}
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
    """Watch a long run; 1 where it ended by itself, or left processes or shared memory behind."""
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
        except KeyboardInterrupt:
            print("stopping early")
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
    return int(early or bool(left) or bool(new))


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    watch = commands.add_parser("load", help="watch a long run")
    watch.add_argument("--hours", type=float, default=2, help="how long (default: %(default)s)")
    watch.add_argument("--name", help="of the run (default: load-DATE)")
    watch.add_argument("--every", type=float, default=20, help="seconds between two looks (default: %(default)s)")
    watch.add_argument("--workers", type=int, default=2, help="loader workers (default: %(default)s)")
    args = vars(parser.parse_args())
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where nohup or a shell's & made it ignored
    sys.exit({"load": load}[args.pop("command")](**args))


if __name__ == "__main__":
    main()
