"""The paper's tables and figures at toy scale: make any of them again on two CPU cores.

    python experiments.py table1b              # or several, or all: seeds 0, 1, 2; then results/NAME.md, .json and .png
    python experiments.py table1b --first 3 --seeds 1               # seed 3, besides those that the results hold
    python experiments.py --report                                  # results/* and the README's table from runs/lab/*

What several experiments need is made once. Whatever ends a series, the same command goes on.
"""

import argparse
import fcntl
import json
import os
import signal
import subprocess
import sys
from multiprocessing.pool import ThreadPool
from pathlib import Path

import engine
import finetune
import linprobe
import pretrain
import visualize
from data import MOTIONS, STILL, TOY, make_toy, read_split

MASKS = ("tube", "random", "frame")
LAB, RUNNING, STOPPED = Path("runs/lab"), {}, []  # where the runs are; processes at work; with something in it: no more
RECIPES = {f"{s.__name__}.py": vars(s.Config(**s.PRESETS["toy"])) for s in (pretrain, finetune, linprobe)}
RECIPES = json.loads(json.dumps(RECIPES))  # as files hold them
# A cell `PRE:DOWN@KEY` is what DOWN's command makes of pretrain.py with PRE's flags. The rest may be missing.
PRETRAIN = {
    "base": "", "depth1": "--decoder-depth 1", "depth4": "--decoder-depth 4", "l1": "--loss l1", "dense": "--stride 1",
    "epochs10": "--epochs 10", "epochs20": "--epochs 20", "random75": "--mask random", "frame75": "--mask frame",
    "tube50": "--ratio 0.5", "tube90": "--ratio 0.9", "tube95": "--ratio 0.95", "double": "--target double",
    "center": "--target center", "few": f"--splits {LAB}/few-sSEED.txt",
    "few-long": f"--splits {LAB}/few-sSEED.txt --epochs 120 --warmup 4",
    "half": f"--splits {LAB}/half-sSEED.txt", "half-long": f"--splits {LAB}/half-sSEED.txt --epochs 60 --warmup 2",
    "still": f"--data {STILL}", **{f"still-{mask}": f"--data {STILL} --mask {mask}" for mask in MASKS[1:]},
}  # fmt: skip
UNTRAINED = {"finetune.py": "--init none --init-scale 1 --base-lr 0.008", "linprobe.py": "--init random"}
DOWN = {
    "tuned": "finetune.py", "tuned40": "finetune.py --epochs 40", "still": f"finetune.py --data {STILL}",
    **{f"all{n}": f"finetune.py --shots {n} --epochs {800 // n} --warmup {80 / n:g}" for n in (25, 50, 100)},
    **{f"leak-{m}": f"visualize.py --ratios 0.75 --scored 200 --mask {m}" for m in MASKS}, "probe": "linprobe.py",
}  # fmt: skip
LEAK = {"tube": "still:leak-tube", **{mask: f"still-{mask}:leak-{mask}" for mask in MASKS[1:]}}
SCORES = [(key, part) for key in ("model", "nearest") for part in ("still", "moving")]
# Rows: label (with an axis `x, series`), the paper's top-1 in % (SSv2 unless it says K400), cell. Claims: what it says,
# its gap (None: no number; OURS: it does not say so), two (sums of) cells; without any, its best row beats each other.
EXPERIMENTS = {
    "table1a": dict(title="Table 1a: decoder depth", note="The toy encoder has 4 blocks, the paper's 12.", rows=[
        ("1 block", 68.5, "depth1"), ("2 blocks (toy)", 69.2, "base"), ("4 blocks", 69.6, "depth4")]),
    "table1b": dict(title="Table 1b: masking", note="Of 36 places, 90 % are 32. Frames at 75 %: 3 of 4 slots.", rows=[
        ("tube 75 %", 68.0, "base"), ("tube 90 %", 69.6, "tube90"), ("random 75 % (paper: 90 %)", 68.3, "random75"),
        ("frame 75 % (paper: 87.5 %)", 61.5, "frame75"),
    ], claims=[("tubes beat random masks (theirs: 90 %)", 1.3, "base", "random75"), ("tubes: 90 % beats 75 %", 1.6,
               "tube90", "base"), ("tubes beat frames (theirs: 75, 87.5 %)", 6.5, "base", "frame75")]),
    "table1c": dict(title="Table 1c: target", note="Fine-tuning is the same in all rows, at the toy stride.", rows=[
        ("the central frame", 63.0, "center"), ("the clip, half the stride", 68.9, "dense"), ("the clip", 69.6, "base"),
        ("the clip, twice the frames", 69.2, "double")]),
    "table1d": dict(title="Table 1d: pre-training", note="Ours has 10 labels a class, the paper's has all.", rows=[
        ("scratch", 32.6, "none"), ("scratch, twice as long", None, "none:tuned40"), ("VideoMAE", 69.6, "base")]),
    "table1e": dict(title="Tables 1e, 4: another domain", note="Still: less noise, waves move in a disc only.", rows=[
        ("waves, pre-trained on waves", 69.6, "base"), ("waves, pre-trained on still", 68.5, "still"),
        ("still, pre-trained on still (K400)", 80.0, "still:still"), ("still, from scratch (K400)", 68.8, "none:still"),
        ("still, pre-trained on waves (K400)", 79.6, "base:still"),
    ], claims=[("own domain best: SSv2, our waves", 1.1, "base", "still"), ("own domain best: K400, our still", 0.4,
               "still:still", "base:still"), ("the other domain beats none", 10.8, "base:still", "none:still")]),
    "table1f": dict(title="Table 1f: loss", rows=[("L1", 69.1, "l1"), ("MSE", 69.6, "base")],
        note="The toy recipe predicts pixels in 0 to 1, where smooth L1 (68.9) is half the MSE: no row of its own."),
    "table2": dict(title="Table 2: data efficiency", note="Theirs: UCF101 (9.5k), K400 (240k). Equal steps.", rows=[
        ("1200, VideoMAE", 80.0, "base:all100"), ("600, VideoMAE", None, "half-long:all50"),
        ("300, VideoMAE", 91.3, "few-long:all25"), ("1200, scratch", 68.8, "none:all100"),
        ("600, scratch", None, "none:all50"), ("300, scratch", 51.4, "none:all25"),
    ], claims=[("it helps with 240k videos (ours 1200)", 11.2, "base:all100", "none:all100"),
               ("it helps with 9.5k (ours 300)", 39.9, "few-long:all25", "none:all25"),
               ("it helps more with fewer", 28.7, "few-long:all25 + none:all100", "none:all25 + base:all100"),
    ], axis="videos, all labelled"),
    "table3": dict(title="Table 3: fine-tuning or probe, and time", axis=visualize.MINUTES, rows=[
        ("30 epochs, fine-tuned", 69.6, "base"), ("20 epochs, fine-tuned", None, "epochs20"),
        ("10 epochs, fine-tuned", None, "epochs10"), ("30 epochs, probe", 38.9, "base:probe"),
        ("20 epochs, probe", None, "epochs20:probe"), ("10 epochs, probe", None, "epochs10:probe"),
        ("none, probe", None, "none:probe"), ("none, scratch", 32.6, "none"), ("twice, scratch", None, "none:tuned40")],
        note="MoCo v3 (54.2, probe 33.7, in 3.2 times the hours) is not made here: this says nothing about its time."),
    "figure3": dict(title="Figure 3: mask ratio", axis="tokens hidden by tubes, %", rows=[
        ("50", None, "tube50"), ("75", 68.0, "base"), ("90", 69.6, "tube90"), ("95", None, "tube95")],
        claims=[("90 % beats 75 %", 1.6, "tube90", "base")], note="Of 36 places: 18, 27, 32, 34. Theirs likes 95 %."),
    "figure4": dict(title="Figure 4: a part of the videos", axis="videos, %", note="The paper's quarter: 42k.", rows=[
        ("100, same steps", 69.6, "base"), ("50, same steps", None, "half-long"), ("25, same steps", 68.7, "few-long"),
        ("100, same epochs", 69.6, "base"), ("50, same epochs", None, "half"), ("25, same epochs", None, "few"),
    ], claims=[("all beat a quarter", 0.9, "base", "few-long"), ("a quarter: longer helps", None, "few-long", "few")]),
    "figure5": dict(title="Figure 5: schedule", axis="epochs of pre-training", rows=[
        ("10", None, "epochs10"), ("20", None, "epochs20"), ("30", None, "base")],
        claims=[("longer is better", None, "base", "epochs20")], note="The paper prints no numbers: slight gains."),
    "figure7": dict(title="Figures 7, 8: gains", note="Over scratch; the paper's are over image pre-training.", rows=[
        (name + how, None, f"{pre}@{name}") for name in MOTIONS for pre, how in (("base", ""), ("none", ", scratch"))
    ], claims=[(f"{name} gains over scratch", visualize.OURS, f"base@{name}", f"none@{name}") for name in MOTIONS]),
    "leak": dict(title="Section 3.2: what leaks", unit="PSNR, dB", note="Nearest: the nearest cube is copied.", rows=[
        (f"{mask}, {part}, {key}", None, f"{cell}@{key} {part}") for key, part in SCORES for mask, cell in LEAK.items()
    ], claims=[(f"{mask} masks leak {part} places, {key}", {"moving": visualize.OURS}.get(part), f"{cell}@{key} {part}",
                f"{LEAK['tube']}@{key} {part}") for key, part in SCORES for mask, cell in list(LEAK.items())[1:]]),
}  # fmt: skip


def jobs_of(cell: str, seed: int) -> list[tuple[str, list[str], Path, list]]:
    """A cell's jobs: (name, arguments of python, file that exists when done, [arguments, recipe] of all up to this)."""
    pre, _, down = cell.partition("@")[0].partition(":")
    first, name, weights = f"{pre}-s{seed}", f"{pre}-s{seed}-{down or 'tuned'}", f"{LAB}/{pre}-s{seed}/checkpoint.pt"
    argv, product, jobs = DOWN[down or "tuned"], LAB / name / "results.json", []
    if pre != "none":
        made = f"pretrain.py {PRETRAIN[pre]} --resume --seed SEED --name lab/{first}".replace("SEED", str(seed))
        jobs = [(first, made.split(), LAB / first / "reconstruction.png")]
    if argv.startswith("visualize.py"):
        argv, product = f"{argv} --seed {seed} --checkpoint {weights} --out {LAB}/{name}.png", LAB / f"{name}-psnr.json"
    else:
        init = f"--init {weights}" if jobs else UNTRAINED[argv.split()[0]]
        argv = f"{argv} {init} --seed {seed} --name lab/{name}" + " --resume" * argv.startswith("finetune.py")
    jobs += [(name, argv.split(), product)]
    return [(*job, [[argv, RECIPES.get(argv[0])] for _, argv, _ in jobs[:n]]) for n, job in enumerate(jobs, 1)]


def record_of(name: str, argv: list[str], product: Path, by: list) -> tuple[dict, bool]:
    """What is known of a job (by, machines, seconds of processor: of all attempts), and whether it is done."""
    path = LAB / f"{name}.job"
    about = json.loads(path.read_text()) if path.exists() else dict(by=by, machines=[], seconds=0)
    return about, path.exists() and product.exists() and about.get("by") == by


def run(name: str, argv: list[str], product: Path, by: list, threads: int) -> None:
    """Do a job that is not done. ValueError if it fails, or if other commands or recipes made what is there."""
    about, done = record_of(name, argv, product, by)
    if about.get("by") != by:
        raise ValueError(f"{LAB}/{name}.job is of other commands or recipes: remove {LAB}/{name}*")
    if not done and not STOPPED:
        print(line := " ".join(["python", *argv]), flush=True)
        with open(LAB / f"{name}.log", "a") as log:
            how = dict(stdout=log, stderr=log, env=os.environ | dict(OMP_NUM_THREADS=str(threads)), close_fds=False)
            process = RUNNING[name] = subprocess.Popen([sys.executable, *argv], **how)
            if STOPPED:  # just now
                process.terminate()
            used = os.wait4(process.pid, 0)[2]
        del RUNNING[name]
        about["machines"] = sorted({*about["machines"], visualize.machine(threads)})
        about["seconds"] += used.ru_utime + used.ru_stime
        visualize.write_whole(LAB / f"{name}.job", json.dumps(about))
        if not product.exists():
            raise ValueError(f"{line} did not finish, see {LAB}/{name}.log; the same command goes on")


def measure(name: str, seeds: range) -> dict:
    """An experiment with the numbers of those seeds that are complete, from the files of their runs."""
    found, runs = EXPERIMENTS[name], {}
    for seed in seeds:
        jobs = {cell: jobs_of(cell, seed) for *_, cell in found["rows"]}
        if all(record_of(*job)[1] for of in jobs.values() for job in of):
            runs[seed] = {cell: (of[-1][2], {job[0]: record_of(*job)[0] for job in of}) for cell, of in jobs.items()}
    commands = list(dict.fromkeys(" ".join(job[1]) for *_, cell in found["rows"] for job in jobs_of(cell, 0)))
    return visualize.measured(found | dict(commands=commands, recipes=RECIPES), runs)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"all, or some of {', '.join(EXPERIMENTS)}")
    for flag, default, text in (("--seeds", 3, "how many"), ("--first", 0, "the first"), ("--jobs", 2, "at a time")):
        parser.add_argument(flag, type=int, default=default, help=f"{text} (default: {default})")
    parser.add_argument("--report", action="store_true", help="run nothing, read those seeds' runs")
    args = parser.parse_args(argv)
    names, seeds = EXPERIMENTS if args.names == ["all"] else args.names, range(args.first, args.first + args.seeds)
    if set(names) - set(EXPERIMENTS) or min(args.seeds, args.first + 1, args.jobs) < 1 or bool(names) == args.report:
        raise ValueError(f"name all or some of {', '.join(EXPERIMENTS)}, or --report; --seeds and --jobs from 1 on")
    threads, pool = max((os.cpu_count() or 1) // args.jobs, 1), ThreadPool(args.jobs)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    LAB.mkdir(parents=True, exist_ok=True)
    try:
        with open(LAB / "lock", "w") as lock:
            os.set_inheritable(lock.fileno(), True)  # stages that outlive the series hold it, too
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB if names else fcntl.LOCK_UN)
            for seed in seeds if names else ():
                make_toy(TOY)
                make_toy(STILL, still=True)
                for part, shots in (("few", 25), ("half", 50)):  # of a class's 100
                    paths = sorted(finetune.draw_shots(read_split(TOY), shots, seed).paths)
                    (LAB / f"{part}-s{seed}.txt").write_text("".join(f"{path.relative_to(TOY)}\n" for path in paths))
                chains = {}  # of a pre-training and what needs it, one after another
                for first, *others in (jobs_of(cell, seed) for name in names for *_, cell in EXPERIMENTS[name]["rows"]):
                    chains.setdefault(first[0], {first[0]: first}).update({job[0]: job for job in others})
                list(pool.imap_unordered(lambda chain: [run(*job, threads) for job in chain.values()], chains.values()))
    except BaseException as error:
        STOPPED.append(error)
        _ = [process.terminate() for process in list(RUNNING.values())]  # the stages save a checkpoint
        pool.close()
        pool.join()
        said = {KeyboardInterrupt: "stopped: the same command goes on", BlockingIOError: f"{LAB} is at work already"}
        raise (SystemExit(said[type(error)]) if type(error) in said else error) from None
    visualize.report({name: measure(name, seeds) for name in EXPERIMENTS}, Path("results"), Path("README.md"))


if __name__ == "__main__":
    engine.cli(main)
