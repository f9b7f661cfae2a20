"""The paper's tables and figures at toy scale: make any of them again on two CPU cores.

    python experiments.py table1b              # or several, or all: seeds 0, 1, 2; then results/NAME.md, .json and .png
    python experiments.py table1b --first 3 --seeds 1               # seed 3, besides those that the results hold
    python experiments.py --report                                  # results/* and the README's table from runs/lab/*

An experiment is a table of cells, each what stage commands on top of the toy recipes give; runs that several need are
made once. Whatever ended it, the same command goes on.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import engine
import finetune
import linprobe
import pretrain
import visualize
from data import MOTIONS, STILL, TOY, make_toy, read_split
from masking import MASKS

LAB, RUNNING = Path("runs/lab"), {}  # where the runs are; the processes at work
RECIPES = json.loads(json.dumps({f"{s.__name__}.py": s.PRESETS["toy"] for s in (pretrain, finetune, linprobe)}))

# A cell `PRE:DOWN@KEY` is what DOWN's command makes of pretrain.py with PRE's flags. The rest may be missing.
PRETRAIN = {
    "base": "", "depth1": "--decoder-depth 1", "depth4": "--decoder-depth 4", "cross": "--cross",
    "epochs10": "--epochs 10", "epochs20": "--epochs 20", "random75": "--mask random", "frame75": "--mask frame",
    "tube50": "--ratio 0.5", "tube90": "--ratio 0.9", "tube95": "--ratio 0.95", "masked": "--decoder-mask 0.5",
    "center": "--target center", "dense": "--stride 1", "double": "--target double", "l1": "--loss l1",
    "few": f"--splits {LAB}/few-sSEED.txt", "few-long": f"--splits {LAB}/few-sSEED.txt --epochs 120 --warmup 4",
    "half": f"--splits {LAB}/half-sSEED.txt", "half-long": f"--splits {LAB}/half-sSEED.txt --epochs 60 --warmup 2",
    **{f"still{m and '-'}{m}": f"--data {STILL}{m and ' --mask '}{m}" for m in ("", "random", "frame")},
}  # fmt: skip
UNTRAINED = {"finetune.py": "--init none --init-scale 1 --base-lr 0.008", "linprobe.py": "--init random"}
DOWN = {
    "tuned": "finetune.py", "tuned40": "finetune.py --epochs 40", "still": f"finetune.py --data {STILL}",
    **{f"all{n}": f"finetune.py --shots {n} --epochs {800 // n} --warmup {80 / n:g}" for n in (25, 50, 100)},
    **{f"leak-{m}": f"visualize.py --ratios 0.75 --scored 200 --mask {m}" for m in MASKS}, "probe": "linprobe.py",
}  # fmt: skip
LEAK = {mask: f"{pre}:leak-{mask}" for mask, pre in zip(MASKS, ("still", "still-random", "still-frame"), strict=True)}
SCORES = [(key, part) for key in ("model", "nearest") for part in ("still", "moving")]
# Rows: label (with an axis `x, series`), the paper's top-1 in % (SSv2 unless it says K400), cell. Claims: what the
# paper says, its gap, two (sums of) cells; without any, the paper's best row is better than each other one.
EXPERIMENTS = {
    "table1a": dict(title="Table 1a: decoder depth", note="The toy encoder has 4 blocks, the paper's 12.", rows=[
        ("1 block", 68.5, "depth1"), ("2 blocks (toy)", 69.2, "base"), ("4 blocks", 69.6, "depth4")]),
    "table1b": dict(title="Table 1b: masking", rows=[
        ("tube 75 %", 68.0, "base"), ("tube 90 %", 69.6, "tube90"), ("random 75 % (paper: 90 %)", 68.3, "random75"),
        ("frame 75 % (paper: 87.5 %)", 61.5, "frame75"),
    ], claims=[("tubes beat random masks at one ratio", 1.3, "base", "random75"),
               ("tubes beat frames", 6.5, "base", "frame75"), ("tubes: 90 % beats 75 %", 1.6, "tube90", "base"),
    ], note="At 75 %, frames hide as many tokens as tubes (3 of 4 slots). Of 36 places, 90 % are 32 (88.9 %)."),
    "table1c": dict(title="Table 1c: target", note="Fine-tuning is the same in all rows, at the toy stride.", rows=[
        ("the central frame", 63.0, "center"), ("the clip, half the stride", 68.9, "dense"), ("the clip", 69.6, "base"),
        ("the clip, twice the frames", 69.2, "double")]),
    "table1d": dict(title="Table 1d: pre-training", note="Ours has 10 labels a class, the paper's has all.", rows=[
        ("scratch", 32.6, "none"), ("scratch, twice as long", None, "none:tuned40"), ("VideoMAE", 69.6, "base")]),
    "table1e": dict(title="Tables 1e, 4: another domain", rows=[
        ("waves, pre-trained on waves", 69.6, "base"), ("waves, pre-trained on still", 68.5, "still"),
        ("still, pre-trained on still (K400)", 80.0, "still:still"), ("still, from scratch (K400)", 68.8, "none:still"),
        ("still, pre-trained on waves (K400)", 79.6, "base:still"),
    ], claims=[("own domain best: SSv2", 1.1, "base", "still"), ("K400", 0.4, "still:still", "base:still"),
               ("the other domain is better than none", 10.8, "base:still", "none:still"),
    ], note="In the place of SSv2 stand the toy waves, in that of K400 cleaner ones that move in a disc only."),
    "table1f": dict(title="Table 1f: loss", rows=[("L1", 69.1, "l1"), ("MSE", 69.6, "base")],
        note="The toy recipe predicts pixels in 0 to 1, where smooth L1 (68.9) is half the MSE: no row of its own."),
    "table2": dict(title="Table 2: data efficiency", axis="videos, all labelled", rows=[
        ("1200, VideoMAE", 80.0, "base:all100"), ("600, VideoMAE", None, "half-long:all50"),
        ("300, VideoMAE", 91.3, "few-long:all25"), ("1200, scratch", 68.8, "none:all100"),
        ("600, scratch", None, "none:all50"), ("300, scratch", 51.4, "none:all25"),
    ], claims=[("it helps with 240k videos (ours 1200)", 11.2, "base:all100", "none:all100"),
               ("with 9.5k (ours 300)", 39.9, "few-long:all25", "none:all25"),
               ("more with the fewer", 28.7, "few-long:all25 + none:all100", "none:all25 + base:all100"),
    ], note="As many steps for 300 as for 1200. The paper's numbers there: UCF101 (9.5k), K400 (240k)."),
    "table3": dict(title="Table 3: fine-tuning or probe, and time", axis=visualize.MINUTES, rows=[
        ("30 epochs, fine-tuned", 69.6, "base"), ("20 epochs, fine-tuned", None, "epochs20"),
        ("10 epochs, fine-tuned", None, "epochs10"), ("30 epochs, probe", 38.9, "base:probe"),
        ("20 epochs, probe", None, "epochs20:probe"), ("10 epochs, probe", None, "epochs10:probe"),
        ("none, probe", None, "none:probe"), ("none, scratch", 32.6, "none"), ("twice, scratch", None, "none:tuned40")],
        note="MoCo v3 (54.2, probe 33.7, in 3.2 times the hours) is not made here: this says nothing about its time."),
    "figure3": dict(title="Figure 3: mask ratio", axis="tokens hidden by tubes, %", rows=[
        ("50", None, "tube50"), ("75", 68.0, "base"), ("90", 69.6, "tube90"), ("95", None, "tube95")],
        note="The paper prints no others; 95 % still does well there. Of 36 places, ours hide 18, 27, 32 and 34."),
    "figure4": dict(title="Figure 4: a part of the videos", axis="videos, %", note="The paper's quarter: 42k.", rows=[
        ("100, same steps", 69.6, "base"), ("50, same steps", None, "half-long"), ("25, same steps", 68.7, "few-long"),
        ("100, same epochs", 69.6, "base"), ("50, same epochs", None, "half"), ("25, same epochs", None, "few"),
    ], claims=[("all beat a quarter", 0.9, "base", "few-long"), ("a quarter: longer helps", None, "few-long", "few")]),
    "figure5": dict(title="Figure 5: schedule", axis="epochs of pre-training", rows=[
        ("10", None, "epochs10"), ("20", None, "epochs20"), ("30", None, "base")],
        claims=[("longer is better", None, "base", "epochs20")], note="The paper prints no numbers: slight gains."),
    "figure7": dict(title="Figures 7, 8: gains", note="Over scratch; the paper's are over image pre-training.", rows=[
        (name + how, None, f"{pre}@{name}") for name in MOTIONS for pre, how in (("base", ""), ("none", ", scratch"))
    ], claims=[(f"{name} gains", None, f"base@{name}", f"none@{name}") for name in MOTIONS]),
    "leak": dict(title="Section 3.2: what leaks", unit="dB", rows=[
        (f"{mask}, {part}, {key}", None, f"{cell}@{key} {part}") for key, part in SCORES for mask, cell in LEAK.items()
    ], claims=[(f"{m} masks leak {part} places, {key}", None, f"{cell}@{key} {part}", f"{LEAK['tube']}@{key} {part}")
               for key, part in SCORES for m, cell in LEAK.items() if m != "tube"
    ], note="36 of 144 tokens are visible. Nearest: the nearest visible cube is copied. Moving places: our addition."),
    "options": dict(title="Options beyond the paper", note="Cheaper decoders; the README says how much.", rows=[
        ("the paper's decoder", None, "base"), ("--decoder-mask 0.5", None, "masked"), ("--cross", None, "cross")]),
}  # fmt: skip


def jobs_of(cell: str, seed: int) -> list[tuple[str, list[str], Path]]:
    """A cell's commands in order: (name below runs/lab, arguments of python, file that exists when it is done)."""
    pre, _, down = cell.partition("@")[0].partition(":")
    folder, named, down = f"{pre}-s{seed}", f"--seed {seed} --name lab/", down or "tuned"
    argv, name, weights = DOWN[down], f"{folder}-{down}", f"{LAB}/{folder}/checkpoint.pt"
    product, jobs = LAB / name / "results.json", []
    if pre != "none":
        first = f"pretrain.py {PRETRAIN[pre].replace('SEED', str(seed))} --resume {named}{folder}"
        jobs = [(folder, first.split(), LAB / folder / "reconstruction.png")]
    if argv.startswith("visualize.py"):
        argv, product = f"{argv} --seed {seed} --checkpoint {weights} --out {LAB}/{name}.png", LAB / f"{name}-psnr.json"
    else:
        init = f"--init {weights}" if jobs else UNTRAINED[argv.split()[0]]
        argv = f"{argv} {init} {named}{name}" + " --resume" * argv.startswith("finetune.py")
    return [*jobs, (name, argv.split(), product)]


def run(name: str, argv: list[str], product: Path, threads: int) -> None:
    """Do a job that is not done. ValueError if it fails, or if another command or recipe made what is there."""
    record, temporary = LAB / f"{name}.job", LAB / f"{name}.tmp"  # the command; seconds of processor of all attempts
    new = dict(command=argv, recipe=RECIPES.get(argv[0]), machine=visualize.machine(), seconds=0)
    about = json.loads(record.read_text()) if record.exists() else new
    if any(about[key] != new[key] for key in ("command", "recipe")):
        raise ValueError(f"{record} names another command or recipe: remove it and {LAB}/{name}")
    if not record.exists() or not product.exists():
        print(shlex.join(["python", *argv]), flush=True)
        with open(LAB / f"{name}.log", "a") as log:
            how = dict(stdout=log, stderr=log, env=os.environ | dict(OMP_NUM_THREADS=str(threads)))
            RUNNING[name] = subprocess.Popen([sys.executable, *argv], **how)
            used = os.wait4(RUNNING[name].pid, 0)[2]
        del RUNNING[name]
        temporary.write_text(json.dumps(about | dict(seconds=about["seconds"] + used.ru_utime + used.ru_stime)))
        os.replace(temporary, record)
    if not product.exists():
        raise ValueError(f"python {shlex.join(argv)} did not finish, see {LAB}/{name}.log; the same command goes on")


def measure(name: str, seeds: range) -> dict:
    """An experiment with the numbers of those seeds that are complete, from the files of their runs."""
    rows = EXPERIMENTS[name]["rows"]
    jobs, record = lambda s: {j[0]: j for *_, cell in rows for j in jobs_of(cell, s)}, lambda job: LAB / f"{job}.job"
    seeds = [s for s in seeds if all(job[2].exists() and record(at).exists() for at, job in jobs(s).items())]
    about = {seed: {job: json.loads(record(job).read_text()) for job in jobs(seed)} for seed in seeds}
    minutes = lambda jobs, seed: sum(about[seed][job[0]]["seconds"] for job in jobs) / 60
    return EXPERIMENTS[name] | dict(
        rows=[dict(label=label, paper=paper, cell=cell,
                   ours=[visualize.read_score(jobs_of(cell, s)[-1][2], cell.partition("@")[2]) for s in seeds],
                   minutes=[minutes(jobs_of(cell, s), s) for s in seeds]) for label, paper, cell in rows],
        seeds=seeds, minutes=[minutes(jobs(seed).values(), seed) for seed in seeds], recipes=RECIPES,
        machines=[" and ".join(sorted({job["machine"] for job in about[seed].values()})) for seed in seeds],
        commands=[shlex.join(argv) for _, argv, _ in jobs(0).values()],
    )  # fmt: skip


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"all, or some of {', '.join(EXPERIMENTS)}")
    for flag, default, text in (("--seeds", 3, "how many"), ("--first", 0, "the first"), ("--jobs", 2, "at a time")):
        parser.add_argument(flag, type=int, default=default, help=f"{text} (default: {default})")
    parser.add_argument("--report", action="store_true", help="run nothing")
    args = parser.parse_args(argv)
    names = list(EXPERIMENTS) if args.names == ["all"] else args.names
    seeds = range(args.first, args.first + args.seeds)
    if set(names) - set(EXPERIMENTS) or min(args.seeds, args.first + 1, args.jobs) < 1 or bool(names) == args.report:
        raise ValueError(f"name all or some of {', '.join(EXPERIMENTS)}, or --report; --seeds and --jobs from 1 on")
    threads, pool = max((os.cpu_count() or 1) // args.jobs, 1), ThreadPoolExecutor(args.jobs)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for seed in seeds if names else ():
            make_toy(TOY)
            make_toy(STILL, still=True)
            LAB.mkdir(parents=True, exist_ok=True)
            for part, shots in (("few", 25), ("half", 50)):  # of a class's 100
                paths = sorted(finetune.draw_shots(read_split(TOY), shots, seed).paths)
                (LAB / f"{part}-s{seed}.txt").write_text("".join(f"{path.relative_to(TOY)}\n" for path in paths))
            chains = {}  # of a pre-training and what needs it, one after another
            for first, *others in (jobs_of(cell, seed) for name in names for *_, cell in EXPERIMENTS[name]["rows"]):
                chains.setdefault(first[0], {first[0]: first}).update({job[0]: job for job in others})
            list(pool.map(lambda chain: [run(*job, threads) for job in chain.values()], chains.values()))
    except KeyboardInterrupt:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in list(RUNNING.values()):
            process.terminate()  # the stages save a checkpoint
        sys.exit("stopped: the same command goes on")
    visualize.report({name: measure(name, seeds) for name in EXPERIMENTS}, Path("results"), Path("README.md"))


if __name__ == "__main__":
    engine.cli(main)
