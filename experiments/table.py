"""The experiments: one entry for each table or figure of the paper. All are on real clips.

ucf101_5 is five classes of UCF101. Whoever has UCF101 links it to datasets/UCF-101. tennis7 is
seven strokes of tennis players, in datasets/tennis7. experiments/lists holds the lists of both. A
seed stands for a fold of the data: seed 0 is fold 1.

A row of an experiment names a cell, PRE:DOWN@KEY. PRE is a pre-training of PRETRAIN, or "none".
DOWN is what comes after it. KEY picks a number; without one it is top-1 in %.
"""

from pathlib import Path

from experiments.report import MINUTES, OURS
from masking import MASKS

LAB = Path("runs/lab")
SHOTS = 10  # labels per class where they are few

# Sets of real clips, with the stride of their clips.
DATA = {
    "ucf101_5": "--data datasets/UCF-101 --stride 4 "
    "--splits experiments/lists/ucf101_5_trainFOLD.txt",
    "tennis7": "--data datasets/tennis7 --stride 2 "
    "--splits experiments/lists/tennis7_trainFOLD.txt",
}
CLASSES = ("Diving", "JumpRope", "SkyDiving", "Surfing", "Swing")  # 0 to 4 in its lists
MODEL = "--size toy --resolution 64 --cube 2 8 8 --positions 3d --workers 0"

# Stage, preset and flags of what is pre-trained. SEED stands for the seed, FOLD for the fold.
# A flag that comes twice counts as it comes last. The peak learning rate is 1e-3.
VIDEOMAE = (
    f"{MODEL} --decoder-depth 1 --flip --repeats 2 --batch 8 --base-lr 0.032 --epochs 240 "
    "--warmup 10"
)
CONTRAST = (
    f"{MODEL} --hidden 512 --out 64 --smallest 0.2 --batch 32 --base-lr 0.008 --epochs 60 "
    "--warmup 4"
)
PRETRAIN = {
    "ucf101_5": f"pretrain.py own {DATA['ucf101_5']} {VIDEOMAE}",
    "ucf101_5-moco": f"contrast.py own {DATA['ucf101_5']} {CONTRAST}",
    "tennis7": f"pretrain.py own {DATA['tennis7']} {VIDEOMAE} --ratio 0.75",
    "tennis7-moco": f"contrast.py own {DATA['tennis7']} {CONTRAST} --no-flip",
}
PRETRAIN |= {f"{name}-image": f"{PRETRAIN[name]} --stride 0" for name in DATA}  # still frames
# The paper's ablations, on ucf101_5, with half of the epochs.
SHORT = f"{PRETRAIN['ucf101_5']} --epochs 120 --warmup 5"
FEW = f"--splits {LAB}/few-sSEED.txt"  # SHOTS videos per class
PRETRAIN |= {
    "short": SHORT,
    "shorter": f"{SHORT} --epochs 60 --warmup 2.5",
    "depth4": f"{SHORT} --decoder-depth 4",
    "tube75": f"{SHORT} --ratio 0.75",
    "tube95": f"{SHORT} --ratio 0.95",
    "random90": f"{SHORT} --mask random",
    "frame87": f"{SHORT} --mask frame --ratio 0.875",
    "center": f"{SHORT} --model center",
    "l1": f"{SHORT} --loss l1",
    "few": f"{SHORT} {FEW} --epochs 700 --warmup 30",  # as many steps as short
    "few-short": f"{SHORT} {FEW}",  # as many epochs
}

# What comes after pre-training. Scratch differs from it only in what SCRATCH says.
TUNED = (
    f"{MODEL} --epochs 20 --warmup 2 --base-lr 0.016 --layer-decay 1 --drop-path 0 --repeats 1 "
    "--operations 0 --smallest 0.5 --erase 0 --mixup 0 --cutmix 0 --crops 1"
)
DOWN = {}
for name, data in DATA.items():
    test = f"{data} --test-splits experiments/lists/{name}_testFOLD.txt"
    tuned = f"finetune.py own {test} {TUNED}"
    if name == "tennis7":
        tuned += " --no-flip"  # a mirrored forehand is a backhand
    DOWN |= {
        f"{name}-tuned": tuned,
        f"{name}-long": f"{tuned} --epochs 40 --warmup 4",
        f"{name}-few": f"{tuned} --shots {SHOTS} --epochs 60 --warmup 6",
        f"{name}-probe": f"linprobe.py own {test} {MODEL} --batch 32 --crops 1",
    }
for mask in MASKS:
    test = "--data datasets/UCF-101 --splits experiments/lists/ucf101_5_testFOLD.txt"
    DOWN[f"leak-{mask}"] = f"-m experiments.leak {test} --mask {mask} --ratio 0.875"
PRETRAIN |= {  # with labels, on still frames
    f"{name}-labels": f"{DOWN[f'{name}-tuned']} --stride 0" for name in DATA
}
SCRATCH = {  # in place of weights
    "finetune.py": "--init none --init-scale 1",
    "linprobe.py": "--init random",
}


def ours(pre: str, how: str = "tuned") -> str:
    """A cell that is tested on ucf101_5."""
    return f"{pre}:ucf101_5-{how}"


def real(name: str, note: str) -> dict:
    """The experiment on a set of real clips: is pre-training worth it?"""
    tuned, long, few, probe = (f"{name}-{how}" for how in ("tuned", "long", "few", "probe"))
    return dict(
        title=f"Table 1d, {name}: is pre-training worth it?",
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


def rivals(name: str) -> dict:
    """The experiment on a set of real clips: VideoMAE or MoCo v3?"""
    tuned, probe = f"{name}-tuned", f"{name}-probe"
    return dict(
        title=f"Tables 2, 3, {name}: MoCo v3",
        note="Both have about the same processor time. The paper's numbers are of UCF101 "
        "(fine-tuned) and of SSv2 (probe).",
        rows=[
            ("VideoMAE, fine-tuned", 91.3, f"{name}:{tuned}"),
            ("MoCo v3, fine-tuned", 81.7, f"{name}-moco:{tuned}"),
            ("none, fine-tuned", 51.4, f"none:{tuned}"),
            ("VideoMAE, probe", 38.9, f"{name}:{probe}"),
            ("MoCo v3, probe", 33.7, f"{name}-moco:{probe}"),
            ("none, probe", None, f"none:{probe}"),
        ],
        claims=[
            ("VideoMAE beats MoCo v3", 9.6, f"{name}:{tuned}", f"{name}-moco:{tuned}"),
            ("in the probe, too", 5.2, f"{name}:{probe}", f"{name}-moco:{probe}"),
            ("MoCo v3 beats scratch", 30.3, f"{name}-moco:{tuned}", f"none:{tuned}"),
        ],
    )


def images(name: str) -> dict:
    """The experiment on a set of real clips: what are single frames worth?"""
    tuned = f"{name}-tuned"
    return dict(
        title=f"Tables 1d, 1e, {name}: images",
        note="Still frames: each clip is one frame, repeated. The paper's images are ImageNet's.",
        rows=[
            ("VideoMAE", 69.6, f"{name}:{tuned}"),
            ("VideoMAE of still frames", None, f"{name}-image:{tuned}"),
            ("labels of still frames", None, f"{name}-labels:{tuned}"),
            ("none", 32.6, f"none:{tuned}"),
        ],
        claims=[
            ("clips beat still frames", None, f"{name}:{tuned}", f"{name}-image:{tuned}"),
            ("labels are not needed", None, f"{name}:{tuned}", f"{name}-labels:{tuned}"),
        ],
    )


# Rows: (label, the paper's top-1 in % or None, cell). The paper's are on SSv2 unless it says K400.
# Claims: (text, the paper's gap, cell, cell), see experiments/report.py. A gap of None is a claim
# without a number; with OURS the claim is not the paper's.
HALF = "Pre-training takes half of the epochs of the main recipe: 120. Fine-tuning sees all labels."
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
    "table1a": dict(
        title="Table 1a: decoder depth",
        note=f"{HALF} The encoder has 4 blocks, the paper's 12.",
        rows=[("1 block", 68.5, ours("short")), ("4 blocks", 69.6, ours("depth4"))],
    ),
    "table1b": dict(
        title="Table 1b: masking",
        note=HALF,
        rows=[
            ("tube 90 %", 69.6, ours("short")),
            ("tube 75 %", 68.0, ours("tube75")),
            ("random 90 %", 68.3, ours("random90")),
            ("frame 87.5 %", 61.5, ours("frame87")),
        ],
    ),
    "table1c": dict(
        title="Table 1c: target",
        note=HALF,
        rows=[("the central frame", 63.0, ours("center")), ("the clip", 69.6, ours("short"))],
    ),
    "table1f": dict(
        title="Table 1f: loss",
        note=HALF,
        rows=[("L1", 69.1, ours("l1")), ("MSE", 69.6, ours("short"))],
    ),
    "table2": dict(
        title="Table 2: data efficiency",
        note=f"{HALF} Equal steps. Theirs: UCF101 (9.5k), K400 (240k).",
        axis="videos, all labelled",
        rows=[
            ("280, VideoMAE", 80.0, ours("short")),
            ("50, VideoMAE", 91.3, ours("few", "few")),
            ("280, scratch", 68.8, ours("none")),
            ("50, scratch", 51.4, ours("none", "few")),
        ],
        claims=[
            ("it helps with 240k videos (ours 280)", 11.2, ours("short"), ours("none")),
            ("it helps with 9.5k (ours 50)", 39.9, ours("few", "few"), ours("none", "few")),
            (
                "it helps more with fewer",
                28.7,
                f"{ours('few', 'few')} + {ours('none')}",
                f"{ours('none', 'few')} + {ours('short')}",
            ),
        ],
    ),
    "table3": dict(
        title="Table 3, Figure 5: schedule, fine-tuning or probe",
        note="The paper's numbers are of 800 epochs of SSv2. Its figure has slight gains, without "
        "numbers.",
        axis=MINUTES,
        rows=[
            ("240 epochs, fine-tuned", 69.6, ours("ucf101_5")),
            ("120 epochs, fine-tuned", None, ours("short")),
            ("60 epochs, fine-tuned", None, ours("shorter")),
            ("none, fine-tuned", 32.6, ours("none")),
            ("240 epochs, probe", 38.9, ours("ucf101_5", "probe")),
            ("120 epochs, probe", None, ours("short", "probe")),
            ("60 epochs, probe", None, ours("shorter", "probe")),
            ("none, probe", None, ours("none", "probe")),
        ],
        claims=[
            ("fine-tuning beats the probe", 30.7, ours("ucf101_5"), ours("ucf101_5", "probe")),
            ("240 epochs beat 120", None, ours("ucf101_5"), ours("short")),
            ("120 epochs beat 60", None, ours("short"), ours("shorter")),
        ],
    ),
    "table4": dict(
        title="Table 4: transfer",
        note="Fine-tuned on the second set. The paper's other set is Kinetics-400, of 240k videos.",
        rows=[
            ("ucf101_5 to ucf101_5", 91.3, ours("ucf101_5")),
            ("tennis7 to ucf101_5", 96.1, ours("tennis7")),
            ("none to ucf101_5", 51.4, ours("none")),
            ("tennis7 to tennis7", None, "tennis7:tennis7-tuned"),
            ("ucf101_5 to tennis7", None, "ucf101_5:tennis7-tuned"),
            ("none to tennis7", None, "none:tennis7-tuned"),
        ],
        claims=[
            ("tennis7 helps ucf101_5", 44.7, ours("tennis7"), ours("none")),
            ("ucf101_5 helps tennis7", None, "ucf101_5:tennis7-tuned", "none:tennis7-tuned"),
            ("own clips help ucf101_5 more", OURS, ours("ucf101_5"), ours("tennis7")),
            (
                "own clips help tennis7 more",
                OURS,
                "tennis7:tennis7-tuned",
                "ucf101_5:tennis7-tuned",
            ),
        ],
    ),
    "figure3": dict(
        title="Figure 3: mask ratio",
        note=f"{HALF} Of 64 places, 16, 6 and 3 are visible. Theirs likes 95 %.",
        axis="tokens hidden by tubes, %",
        rows=[
            ("75", 68.0, ours("tube75")),
            ("90", 69.6, ours("short")),
            ("95", None, ours("tube95")),
        ],
        claims=[("90 % beats 75 %", 1.6, ours("short"), ours("tube75"))],
    ),
    "figure4": dict(
        title="Figure 4: a part of the videos",
        note="18 % are 10 videos per class. All are fine-tuned with all labels. The paper's "
        "quarter: 42k.",
        axis="videos, %",
        rows=[
            ("100, same steps", 69.6, ours("short")),
            ("18, same steps", 68.7, ours("few")),
            ("100, same epochs", 69.6, ours("short")),
            ("18, same epochs", None, ours("few-short")),
        ],
        claims=[
            ("all beat a part", 0.9, ours("short"), ours("few")),
            ("a part: longer helps", None, ours("few"), ours("few-short")),
        ],
    ),
    "figure7": dict(
        title="Figures 7, 8: gains per class",
        note="Over scratch, of equal epochs; the paper's are over image pre-training.",
        rows=[
            (name + how, None, f"{ours(pre)}@{number}")
            for number, name in enumerate(CLASSES)
            for pre, how in (("ucf101_5", ""), ("none", ", scratch"))
        ],
        claims=[
            (f"{name} gains", OURS, f"{ours('ucf101_5')}@{number}", f"{ours('none')}@{number}")
            for number, name in enumerate(CLASSES)
        ],
    ),
    "leak": dict(
        title="Section 3.2: what leaks",
        note="87.5 % are hidden in test clips. Nearest: the nearest visible cube is copied. The "
        "model was trained with tubes.",
        unit="PSNR, dB",
        rows=[
            (f"{mask}, {part}, {key}", None, f"ucf101_5:leak-{mask}@{key} {part}")
            for key in ("model", "nearest")
            for part in ("still", "moving")
            for mask in MASKS
        ],
        claims=[
            (
                f"{mask} masks leak {part} places, {key}",
                None if part == "still" else OURS,
                f"ucf101_5:leak-{mask}@{key} {part}",
                f"ucf101_5:leak-tube@{key} {part}",
            )
            for key in ("model", "nearest")
            for part in ("still", "moving")
            for mask in ("random", "frame")
        ],
    ),
    "rivals-ucf101_5": rivals("ucf101_5"),
    "rivals-tennis7": rivals("tennis7"),
    "images-ucf101_5": images("ucf101_5"),
    "images-tennis7": images("tennis7"),
}
