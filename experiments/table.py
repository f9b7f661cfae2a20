"""The experiments: one entry for each table or figure of the paper.

Those on real clips take one fold of the data per seed: seed 0 is fold 1. ucf101_5 is five classes
of UCF101. Whoever has UCF101 links it to datasets/UCF-101. tennis7 is seven strokes of tennis
players, in datasets/tennis7. experiments/lists holds the lists of both.

A row of an experiment names a cell, PRE:DOWN@KEY. PRE is a pre-training of PRETRAIN, or "none".
DOWN is what comes after it; without one it is "tuned". KEY picks a number; without one it is top-1
in %.
"""

from pathlib import Path

from experiments.report import MINUTES, OURS
from lib.prepare import MOTIONS

LAB = Path("runs/lab")
STILL = "datasets/toy-still"  # toy videos in which most places stand still

# Sets of real clips, with the stride of their clips.
REAL = {
    "ucf101_5": "own --data datasets/UCF-101 --stride 4 "
    "--splits experiments/lists/ucf101_5_trainFOLD.txt",
    "tennis7": "own --data datasets/tennis7 --stride 2 "
    "--splits experiments/lists/tennis7_trainFOLD.txt",
}
REAL_MODEL = "--size toy --resolution 64 --cube 2 8 8 --positions 3d --workers 0"

PRETRAIN = {  # stage, preset and flags; SEED stands for the seed, FOLD for the fold
    "base": "pretrain.py toy",
    "depth1": "pretrain.py toy --decoder-depth 1",
    "depth4": "pretrain.py toy --decoder-depth 4",
    "l1": "pretrain.py toy --loss l1",
    "dense": "pretrain.py toy --stride 1",
    "double": "pretrain.py toy --model double",
    "center": "pretrain.py toy --model center",
    "epochs10": "pretrain.py toy --epochs 10",
    "epochs20": "pretrain.py toy --epochs 20",
    "random75": "pretrain.py toy --mask random",
    "frame75": "pretrain.py toy --mask frame",
    "tube50": "pretrain.py toy --ratio 0.5",
    "tube90": "pretrain.py toy --ratio 0.9",
    "tube95": "pretrain.py toy --ratio 0.95",
    "half": f"pretrain.py toy --splits {LAB}/half-sSEED.txt",
    "half-long": f"pretrain.py toy --splits {LAB}/half-sSEED.txt --epochs 60 --warmup 2",
    "few": f"pretrain.py toy --splits {LAB}/few-sSEED.txt",
    "few-long": f"pretrain.py toy --splits {LAB}/few-sSEED.txt --epochs 120 --warmup 4",
    "still": f"pretrain.py toy --data {STILL}",
    "still-random": f"pretrain.py toy --data {STILL} --mask random",
    "still-frame": f"pretrain.py toy --data {STILL} --mask frame",
}
# The peak learning rate is 1e-3.
REAL_PRETRAIN = (
    f"{REAL_MODEL} --decoder-depth 1 --flip --repeats 2 --batch 8 --base-lr 0.032 --epochs 240 "
    "--warmup 10"
)
REAL_CONTRAST = (
    f"{REAL_MODEL} --hidden 512 --out 64 --smallest 0.2 --batch 32 --base-lr 0.008 --epochs 60 "
    "--warmup 4"
)
PRETRAIN |= {
    "ucf101_5": f"pretrain.py {REAL['ucf101_5']} {REAL_PRETRAIN}",
    "ucf101_5-moco": f"contrast.py {REAL['ucf101_5']} {REAL_CONTRAST}",
    "tennis7": f"pretrain.py {REAL['tennis7']} {REAL_PRETRAIN} --ratio 0.75",
    "tennis7-moco": f"contrast.py {REAL['tennis7']} {REAL_CONTRAST} --no-flip",
}
PRETRAIN |= {f"{name}-image": f"{PRETRAIN[name]} --stride 0" for name in REAL}  # still frames
LISTS = {"few": 25, "half": 50}  # lists of videos for pre-training: how many per class, of 100

DOWN = {
    "tuned": "finetune.py toy",
    "tuned40": "finetune.py toy --epochs 40",
    "still": f"finetune.py toy --data {STILL}",
    # All videos labelled; about the same number of steps: 576, 592, 600.
    "all25": "finetune.py toy --shots 25 --epochs 32 --warmup 3.2",
    "all50": "finetune.py toy --shots 50 --epochs 16 --warmup 1.6",
    "all100": "finetune.py toy --shots 100 --epochs 8 --warmup 0.8",
    "probe": "linprobe.py toy",
    "leak-tube": "-m experiments.leak --mask tube",
    "leak-random": "-m experiments.leak --mask random",
    "leak-frame": "-m experiments.leak --mask frame",
}
# Shared by scratch and fine-tuning. They differ only in what SCRATCH adds: --init-scale 1.
REAL_TUNED = (
    f"{REAL_MODEL} --epochs 20 --warmup 2 --base-lr 0.016 --layer-decay 1 --drop-path 0 "
    "--repeats 1 --operations 0 --smallest 0.5 --erase 0 --mixup 0 --cutmix 0 --crops 1"
)
for name, data in REAL.items():
    test = f"{data} --test-splits experiments/lists/{name}_testFOLD.txt"
    tuned = f"finetune.py {test} {REAL_TUNED}"
    if name == "tennis7":
        tuned += " --no-flip"  # a mirrored forehand is a backhand
    DOWN |= {
        f"{name}-tuned": tuned,
        f"{name}-long": f"{tuned} --epochs 40 --warmup 4",
        f"{name}-few": f"{tuned} --shots 10 --epochs 60 --warmup 6",
        f"{name}-probe": f"linprobe.py {test} {REAL_MODEL} --batch 32 --crops 1",
    }
PRETRAIN |= {  # with labels, on still frames
    f"{name}-labels": f"{DOWN[f'{name}-tuned']} --stride 0" for name in REAL
}
SCRATCH = {  # in place of weights; what a command says counts more
    "finetune.py": "--init none --init-scale 1 --base-lr 0.008",
    "linprobe.py": "--init random",
}

LEAK = {  # cells of the masks that a model was trained with
    "tube": "still:leak-tube",
    "random": "still-random:leak-random",
    "frame": "still-frame:leak-frame",
}


def real(name: str, note: str) -> dict:
    """The experiment on a set of real clips: is pre-training worth it?"""
    tuned, long, few, probe = (f"{name}-{how}" for how in ("tuned", "long", "few", "probe"))
    return dict(
        title=f"Real clips, {name}: is it worth it?",
        preset="own",
        note=f"{note} Pre-training sees the training clips of its fold alone. The paper's numbers "
        "are of all of UCF101. Fine-tuning takes 20 epochs, with 10 labels per class 60.",
        rows=[
            ("fine-tuned", 91.3, f"{name}:{tuned}"),
            ("scratch", 51.4, f"none:{tuned}"),
            ("scratch, 40 epochs", None, f"none:{long}"),
            ("10 labels per class, fine-tuned", None, f"{name}:{few}"),
            ("10 labels per class, scratch", None, f"none:{few}"),
            ("probe", None, f"{name}:{probe}"),
            ("probe of an untrained encoder", None, f"none:{probe}"),
            ("nearest neighbours", None, f"{name}:{probe}@knn"),
            ("nearest neighbours, untrained encoder", None, f"none:{probe}@knn"),
        ],
        claims=[
            ("fine-tuning beats scratch", 39.9, f"{name}:{tuned}", f"none:{tuned}"),
            ("and scratch of twice the epochs", OURS, f"{name}:{tuned}", f"none:{long}"),
            ("with few labels, too", OURS, f"{name}:{few}", f"none:{few}"),
            ("the probe beats an untrained encoder's", OURS, f"{name}:{probe}", f"none:{probe}"),
        ],
    )


def rivals(name: str, other: str) -> dict:
    """The experiment on a set of real clips: which pre-training is worth most?"""
    tuned, probe = f"{name}-tuned", f"{name}-probe"
    return dict(
        title=f"Real clips, {name}: rivals (Tables 1d, 1e, 2, 3, 4)",
        preset="own",
        axis=MINUTES,
        note="VideoMAE and MoCo v3 have about the same processor time. Still frames: each clip is "
        "one frame, repeated. The paper's numbers are of UCF101 (fine-tuned; the other set is "
        "Kinetics) and of SSv2 (probe).",
        rows=[
            ("VideoMAE, fine-tuned", 91.3, f"{name}:{tuned}"),
            ("MoCo v3, fine-tuned", 81.7, f"{name}-moco:{tuned}"),
            ("VideoMAE of still frames, fine-tuned", None, f"{name}-image:{tuned}"),
            ("labels of still frames, fine-tuned", None, f"{name}-labels:{tuned}"),
            (f"VideoMAE of {other}, fine-tuned", 96.1, f"{other}:{tuned}"),
            (f"MoCo v3 of {other}, fine-tuned", 93.2, f"{other}-moco:{tuned}"),
            ("none, fine-tuned", 51.4, f"none:{tuned}"),
            ("VideoMAE, probe", 38.9, f"{name}:{probe}"),
            ("MoCo v3, probe", 33.7, f"{name}-moco:{probe}"),
            ("none, probe", None, f"none:{probe}"),
        ],
        claims=[
            ("VideoMAE beats MoCo v3", 9.6, f"{name}:{tuned}", f"{name}-moco:{tuned}"),
            ("in the probe, too", 5.2, f"{name}:{probe}", f"{name}-moco:{probe}"),
            ("MoCo v3 beats scratch", 30.3, f"{name}-moco:{tuned}", f"none:{tuned}"),
            ("clips beat still frames", None, f"{name}:{tuned}", f"{name}-image:{tuned}"),
            ("labels are not needed", None, f"{name}:{tuned}", f"{name}-labels:{tuned}"),
            ("VideoMAE transfers better", 2.9, f"{other}:{tuned}", f"{other}-moco:{tuned}"),
        ],
    )


# Rows: (label, the paper's top-1 in % or None, cell). The paper's are on SSv2 unless it says K400.
# Claims: (text, the paper's gap, cell, cell), see experiments/report.py. A gap of None is a claim
# without a number; with OURS the claim is not the paper's.
EXPERIMENTS = {
    "ucf101_5": real(
        "ucf101_5",
        "Five classes of UCF101, about 280 training and 120 test clips per fold. The folds follow "
        "UCF101's groups.",
    ),
    "tennis7": real(
        "tennis7",
        "Seven strokes of tennis players, about 250 training and 120 test clips per fold.",
    ),
    "rivals-ucf101_5": rivals("ucf101_5", "tennis7"),
    "rivals-tennis7": rivals("tennis7", "ucf101_5"),
    "table1a": dict(
        title="Table 1a: decoder depth",
        note="The toy encoder has 4 blocks, the paper's 12.",
        rows=[
            ("1 block", 68.5, "depth1"),
            ("2 blocks (toy)", 69.2, "base"),
            ("4 blocks", 69.6, "depth4"),
        ],
    ),
    "table1b": dict(
        title="Table 1b: masking",
        note="Of 36 places, 90 % are 32. Frames at 75 %: 3 of 4 time steps.",
        rows=[
            ("tube 75 %", 68.0, "base"),
            ("tube 90 %", 69.6, "tube90"),
            ("random 75 % (paper: 90 %)", 68.3, "random75"),
            ("frame 75 % (paper: 87.5 %)", 61.5, "frame75"),
        ],
        claims=[
            # Theirs compares both at 90 %.
            ("tubes beat random masks (theirs: 90 %)", 1.3, "base", "random75"),
            ("tubes: 90 % beats 75 %", 1.6, "tube90", "base"),
            ("tubes beat frames (theirs: 75, 87.5 %)", 6.5, "base", "frame75"),
        ],
    ),
    "table1c": dict(
        title="Table 1c: target",
        note="Fine-tuning is the same in all rows, at the toy stride.",
        rows=[
            ("the central frame", 63.0, "center"),
            ("the clip, half the stride", 68.9, "dense"),
            ("the clip", 69.6, "base"),
            ("the clip, twice the frames", 69.2, "double"),
        ],
    ),
    "table1d": dict(
        title="Table 1d: pre-training",
        note="Ours has 10 labels per class, the paper's has all.",
        rows=[
            ("scratch", 32.6, "none"),
            ("scratch, twice as long", None, "none:tuned40"),
            ("VideoMAE", 69.6, "base"),
        ],
    ),
    "table1e": dict(
        title="Tables 1e, 4: another domain",
        note="Still: less noise, waves move in a disc only.",
        rows=[
            ("waves, pre-trained on waves", 69.6, "base"),
            ("waves, pre-trained on still", 68.5, "still"),
            ("still, pre-trained on still (K400)", 80.0, "still:still"),
            ("still, from scratch (K400)", 68.8, "none:still"),
            ("still, pre-trained on waves (K400)", 79.6, "base:still"),
        ],
        claims=[
            ("own domain best: SSv2, our waves", 1.1, "base", "still"),
            ("own domain best: K400, our still", 0.4, "still:still", "base:still"),
            ("the other domain beats none", 10.8, "base:still", "none:still"),
        ],
    ),
    "table1f": dict(
        title="Table 1f: loss",
        note="The toy recipe predicts pixels in 0 to 1, where smooth L1 (68.9) is half the MSE: "
        "no row of its own.",
        rows=[("L1", 69.1, "l1"), ("MSE", 69.6, "base")],
    ),
    "table2": dict(
        title="Table 2: data efficiency",
        note="Theirs: UCF101 (9.5k), K400 (240k). Equal steps.",
        axis="videos, all labelled",
        rows=[
            ("1200, VideoMAE", 80.0, "base:all100"),
            ("600, VideoMAE", None, "half-long:all50"),
            ("300, VideoMAE", 91.3, "few-long:all25"),
            ("1200, scratch", 68.8, "none:all100"),
            ("600, scratch", None, "none:all50"),
            ("300, scratch", 51.4, "none:all25"),
        ],
        claims=[
            ("it helps with 240k videos (ours 1200)", 11.2, "base:all100", "none:all100"),
            ("it helps with 9.5k (ours 300)", 39.9, "few-long:all25", "none:all25"),
            (
                "it helps more with fewer",
                28.7,
                "few-long:all25 + none:all100",
                "none:all25 + base:all100",
            ),
        ],
    ),
    "table3": dict(
        title="Table 3: fine-tuning or probe, and time",
        note="For MoCo v3 (54.2, probe 33.7, in 3.2 times the hours) see the rivals.",
        axis=MINUTES,
        rows=[
            ("30 epochs, fine-tuned", 69.6, "base"),
            ("20 epochs, fine-tuned", None, "epochs20"),
            ("10 epochs, fine-tuned", None, "epochs10"),
            ("30 epochs, probe", 38.9, "base:probe"),
            ("20 epochs, probe", None, "epochs20:probe"),
            ("10 epochs, probe", None, "epochs10:probe"),
            ("none, probe", None, "none:probe"),
            ("none, scratch", 32.6, "none"),
            ("twice, scratch", None, "none:tuned40"),
        ],
    ),
    "figure3": dict(
        title="Figure 3: mask ratio",
        note="Of 36 places: 18, 27, 32, 34. Theirs likes 95 %.",
        axis="tokens hidden by tubes, %",
        rows=[
            ("50", None, "tube50"),
            ("75", 68.0, "base"),
            ("90", 69.6, "tube90"),
            ("95", None, "tube95"),
        ],
        claims=[("90 % beats 75 %", 1.6, "tube90", "base")],
    ),
    "figure4": dict(
        title="Figure 4: a part of the videos",
        note="The paper's quarter: 42k.",
        axis="videos, %",
        rows=[
            ("100, same steps", 69.6, "base"),
            ("50, same steps", None, "half-long"),
            ("25, same steps", 68.7, "few-long"),
            ("100, same epochs", 69.6, "base"),
            ("50, same epochs", None, "half"),
            ("25, same epochs", None, "few"),
        ],
        claims=[
            ("all beat a quarter", 0.9, "base", "few-long"),
            ("a quarter: longer helps", None, "few-long", "few"),
        ],
    ),
    "figure5": dict(
        title="Figure 5: schedule",
        note="The paper prints no numbers: slight gains.",
        axis="epochs of pre-training",
        rows=[("10", None, "epochs10"), ("20", None, "epochs20"), ("30", None, "base")],
        claims=[("longer is better", None, "base", "epochs20")],
    ),
    "figure7": dict(
        title="Figures 7, 8: gains",
        note="Over scratch; the paper's are over image pre-training.",
        rows=[
            (name + how, None, f"{pre}@{name}")
            for name in MOTIONS
            for pre, how in (("base", ""), ("none", ", scratch"))
        ],
        claims=[
            (f"{name} gains over scratch", OURS, f"base@{name}", f"none@{name}") for name in MOTIONS
        ],
    ),
    "leak": dict(
        title="Section 3.2: what leaks",
        note="Nearest: the nearest cube is copied.",
        unit="PSNR, dB",
        rows=[
            (f"{mask}, {part}, {key}", None, f"{cell}@{key} {part}")
            for key in ("model", "nearest")
            for part in ("still", "moving")
            for mask, cell in LEAK.items()
        ],
        claims=[
            (
                f"{mask} masks leak {part} places, {key}",
                None if part == "still" else OURS,
                f"{LEAK[mask]}@{key} {part}",
                f"{LEAK['tube']}@{key} {part}",
            )
            for key in ("model", "nearest")
            for part in ("still", "moving")
            for mask in ("random", "frame")
        ],
    ),
}
