"""The paper's tables and figures on a few hundred real clips: make them again on two CPU cores.

    python -m experiments.run ucf101_5               # or several, or all; three folds
    python -m experiments.run table1b --folds 1      # one fold; the others may be added later
    python -m experiments.run --report               # pages and list from runs/lab

What several experiments need is run once. If a series ends early, the same command continues it.
The pages are experiments/results/NAME.md, .json and .png; docs/results.md lists all claims. The
experiments themselves are in experiments/table.py.
"""

import argparse
import contextlib
import fcntl
import json
import os
import platform
import re
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from itertools import chain, pairwise
from pathlib import Path

import torch

import contrast
import finetune
import linprobe
import pretrain
from data import read_split
from experiments import leak, report, table
from experiments.table import DATA, DOWN, EXPERIMENTS, LAB, PRETRAIN, SCRATCH, SHOTS
from lib import engine

# ------------------------------------------------------------------------------------------- jobs


@dataclass(frozen=True)
class Job:
    """A command of python. It is done when it ended well and left its product, which is in LAB."""

    name: str
    argv: list[str]
    product: Path
    chain: list  # [argv, recipe] of all jobs up to this one: all that its numbers depend on

    @property
    def record(self) -> Path:
        """JSON: chain, whether it ended well, and machines, commits, seconds of all attempts."""
        return LAB / f"{self.name}.job"

    def about(self) -> dict:
        """The record, or an empty one."""
        if self.record.exists():
            return json.loads(self.record.read_text())
        return dict(chain=self.chain, ended=False, machines=[], commits=[], seconds=0.0)

    def done(self) -> bool:
        """Whether this very job is done."""
        about = self.about()
        return about["chain"] == self.chain and about["ended"] and self.product.exists()


STAGES = {f"{stage.__name__}.py": stage for stage in (pretrain, contrast, finetune, linprobe)}
THREADS = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}  # models are narrow: lib/speed.py
PRODUCTS = {"pretrain.py": "reconstruction.png", "contrast.py": "checkpoint.pt"}


def recipe(script: str, preset: str) -> dict:
    """A preset of a stage with all its defaults, as a file holds it."""
    stage = STAGES.get(script)
    config = stage.Config(**stage.PRESETS[preset]) if stage else leak.Config()
    return json.loads(json.dumps(asdict(config)))


def jobs_of(cell: str, fold: int) -> list[Job]:
    """The jobs that make a cell, in their order. KeyError for an unknown name."""
    pre, down = cell.partition("@")[0].split(":")
    jobs = [] if pre == "none" else [job_of(f"{pre}-fold{fold}", PRETRAIN[pre], fold)]
    return [*jobs, job_of(f"{pre}-fold{fold}-{down}", DOWN[down], fold, *jobs)]


def job_of(name: str, command: str, fold: int, before: Job | None = None) -> Job:
    """The job of a command of experiments/table.py, from the weights of the job before it."""
    script, preset, *words = command.replace("FOLD", str(fold)).split()
    weights = f"{LAB / before.name}/checkpoint.pt" if before else None
    if script == "-m":
        product = LAB / f"{name}.json"
        argv = [script, preset, *words, "--checkpoint", weights, "--out", str(product)]
    else:
        product = LAB / name / PRODUCTS.get(script, "results.json")
        init = f"--init {weights}" if before else SCRATCH.get(script, "")
        argv = [script, preset, *init.split(), *words, "--name", f"lab/{name}"]
        argv += [] if script == "linprobe.py" else ["--resume"]
    chain = before.chain if before else []
    return Job(name, argv, product, [*chain, [argv, recipe(script, preset)]])


def machine() -> str:
    """What computes here, and the type of matrix products: "AMD EPYC, float32, 1 thread"."""
    gpu = torch.cuda.is_available()
    dtype = engine.precision_dtype("auto", torch.device("cuda" if gpu else "cpu"))
    name = torch.cuda.get_device_name() if gpu else processor()
    return f"{name}, {str(dtype).removeprefix('torch.')}, 1 thread"


def processor() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*: (.+)", info.read_text()) if info.exists() else None
    return name[1] if name else platform.processor() or platform.machine()


def end(process: subprocess.Popen) -> None:
    """Send SIGTERM. Popen.terminate may take the exit status, for which wait4 in `run` waits."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGTERM)


class Series:
    """Runs groups of jobs, some of them at a time. `stop` ends the processes that are at work."""

    def __init__(self, at_once: int):
        self.at_once, self.stopped, self.running = at_once, threading.Event(), {}

    def run_all(self, groups: list[list[Job]]) -> None:
        """Run groups side by side, the jobs of each one after another. Any error stops all."""
        with ThreadPoolExecutor(self.at_once) as pool:
            try:
                for future in as_completed([pool.submit(self.run_group, jobs) for jobs in groups]):
                    future.result()
            except BaseException:
                self.stop()
                raise

    def stop(self) -> None:
        """Start nothing more. Stages save a checkpoint on this signal."""
        self.stopped.set()
        for process in list(self.running.values()):
            end(process)

    def run_group(self, jobs: list[Job]) -> None:
        for job in jobs:
            self.run(job)

    def run(self, job: Job) -> None:
        """Do a job if it is not done. ValueError if it fails, or if others made what is there."""
        about = job.about()
        if about["chain"] != job.chain:
            advice = f"remove it and {LAB}/{job.name}"
            raise ValueError(f"{job.record} is of other commands or recipes: {advice}")
        if job.done() or self.stopped.is_set():
            return
        line = " ".join(["python", *job.argv])
        print(line, flush=True)
        with open(LAB / f"{job.name}.log", "a") as log:
            # close_fds=False: the process holds the lock, too, if it outlives the series.
            how = dict(stdout=log, stderr=log, env=os.environ | THREADS, close_fds=False)
            process = subprocess.Popen([sys.executable, *job.argv], **how)
            self.running[job.name] = process
            if self.stopped.is_set():  # between the last look and now
                end(process)
            _, status, used = os.wait4(process.pid, 0)
            del self.running[job.name]
        about["machines"] = sorted({*about["machines"], machine()})
        about["commits"] = sorted({*about["commits"], report.commit()})
        about["seconds"] += used.ru_utime + used.ru_stime  # of processor time
        about["ended"] = status == 0
        engine.write_whole(job.record, json.dumps(about))
        if not job.done():
            advice = f"see {LAB}/{job.name}.log; the same command continues it"
            raise ValueError(f"{line} did not finish, {advice}")


def groups_of(names: list[str], fold: int) -> list[list[Job]]:
    """Each pre-training that experiments need, with all that comes after it; nothing twice."""
    groups = {}
    for name in names:
        for _, _, cell in EXPERIMENTS[name]["rows"]:
            jobs = jobs_of(cell, fold)
            group = groups.setdefault(jobs[0].name, {})
            group.update({job.name: job for job in jobs})
    return [list(group.values()) for group in groups.values()]


def training_part(name: str, fold: int) -> tuple[str, str]:
    """(folder of the videos, list of the training videos) of a set of DATA."""
    _, data, *_, splits = DATA[name].replace("FOLD", str(fold)).split()
    return data, splits


def write_few(out: str, fold: int) -> None:
    """Write the list of the few videos of ucf101_5 whose labels fine-tuning gets with --shots."""
    data, splits = training_part("ucf101_5", fold)
    few = finetune.draw_shots(read_split(data, splits), SHOTS, seed=0)
    lines = [f"{path.relative_to(data)}\n" for path in sorted(few.paths)]
    engine.write_whole(out, "".join(lines))


def write_pool(out: str, fold: int) -> None:
    """Write the list of the training videos of both sets, in the folder that holds both."""
    lines = []
    for name in DATA:
        data, splits = training_part(name, fold)
        paths = [line.split()[0] for line in Path(splits).read_text().splitlines()]
        lines += [f"{Path(data).name}/{path}\n" for path in paths]
    engine.write_whole(out, "".join(lines))


def measure(name: str, folds: list[int]) -> dict:
    """An experiment as report takes it, with those of the folds that are complete."""
    found = EXPERIMENTS[name]
    jobs = {fold: {cell: jobs_of(cell, fold) for *_, cell in found["rows"]} for fold in folds}
    distinct = {fold: [*chain(*groups_of([name], fold))] for fold in folds}
    complete = [fold for fold in folds if all(job.done() for job in distinct[fold])]
    minutes = lambda jobs: sum(job.about()["seconds"] for job in jobs) / 60
    of_all = lambda key, jobs: sorted({value for job in jobs for value in job.about()[key]})
    rows = []
    for label, paper, cell in found["rows"]:
        each = [jobs[fold][cell] for fold in complete]
        scores = [report.read_score(of[-1].product, cell.partition("@")[2]) for of in each]
        took = [*map(minutes, each)]
        rows.append(dict(label=label, paper=paper, cell=cell, ours=scores, minutes=took))
    shown = [job for *_, cell in found["rows"] for job in jobs_of(cell, 1)]
    return found | dict(
        rows=rows,
        recipes={job.argv[0]: job.chain[-1][1] for job in shown},
        commands=list(dict.fromkeys(" ".join(job.argv) for job in shown)),
        folds=complete,
        minutes=[minutes(distinct[fold]) for fold in complete],
        machines=[of_all("machines", distinct[fold]) for fold in complete],
        commits=[of_all("commits", distinct[fold]) for fold in complete],
    )


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    known = ", ".join(EXPERIMENTS)
    about = f"all, or some of {known}"
    parser.add_argument("names", nargs="*", metavar="NAME", help=about)
    about = "after the names: some of 1, 2 and 3 (default: all)"
    parser.add_argument("--folds", type=int, nargs="+", default=[1, 2, 3], help=about)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default: 2)")
    parser.add_argument("--report", action="store_true", help="run nothing, read these folds' runs")
    args = parser.parse_args(argv)
    names = list(EXPERIMENTS) if args.names == ["all"] else args.names
    if set(names) - set(EXPERIMENTS) or bool(names) == args.report:
        raise ValueError(f"name all or some of {known}, or --report")
    folds = sorted({*args.folds})
    if not {*folds} <= {1, 2, 3} or args.jobs < 1:
        raise ValueError("--folds are of 1, 2 and 3, and --jobs is at least 1")
    LAB.mkdir(parents=True, exist_ok=True)
    if names:
        run_series(names, folds, args.jobs)
    found = {name: measure(name, folds) for name in EXPERIMENTS}
    report.report(found, Path("experiments/results"), Path("docs/results.md"))


def run_series(names: list[str], folds: list[int], at_once: int) -> None:
    """Run what experiments need, one fold after another, under a lock. A signal ends all of it."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with open(LAB / "lock", "w") as lock:
        os.set_inheritable(lock.fileno(), True)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another series is at work in {LAB}") from None
        try:
            for fold in folds:
                groups = groups_of(names, fold)
                words = [word for group in groups for job in group for word in job.argv]
                for flag, folder in pairwise(words):
                    if flag == "--data" and not Path(folder).is_dir():
                        raise ValueError(f"{folder} is not there: link the data set to it")
                for file, write in ((table.FEW_LIST, write_few), (table.POOL_LIST, write_pool)):
                    if (out := file.replace("FOLD", str(fold))) in words:
                        write(out, fold)
                Series(at_once).run_all(groups)
        except KeyboardInterrupt:
            sys.exit("stopped: the same command continues")


if __name__ == "__main__":
    engine.cli(main)
