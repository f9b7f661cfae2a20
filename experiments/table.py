"""The experiments: one entry for each table or figure of the paper. All are on real clips.

ucf101_5 is five classes of UCF101. Whoever has UCF101 links it to datasets/UCF-101. tennis7 is
seven strokes of tennis players, in datasets/tennis7. Each has three folds, whose lists are in
experiments/lists. The random seed is 0 in all of them.

A row of an experiment names a cell, PRE:DOWN@KEY. PRE is a pre-training of PRETRAIN, or "none".
DOWN is what comes after it. KEY is the number that counts: "" for top-1 in %, "knn" for that of the
nearest neighbours, the number of a class for its accuracy, or a PSNR such as "model still".
`epochs120:ucf101_5-probe@knn` is the accuracy of the nearest neighbours of the features that a
pre-training of 120 epochs gives.
"""

from pathlib import Path

from experiments.report import MINUTES, NOT_THEIRS
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

# Stage, preset and flags of what is pre-trained. FOLD stands for 1, 2 or 3. Where a flag comes
# twice, the last one counts. The peak learning rate is 1e-3.
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
    # Mirrored strokes are other strokes. To VideoMAE, which knows no labels, they are just more
    # videos. MoCo v3 would learn to call both the same.
    "tennis7": f"pretrain.py own {DATA['tennis7']} {VIDEOMAE} --ratio 0.75",
    "tennis7-moco": f"contrast.py own {DATA['tennis7']} {CONTRAST} --no-flip",
}
PRETRAIN |= {f"{name}-image": f"{PRETRAIN[name]} --stride 0" for name in DATA}  # still frames
# The paper's ablations, on ucf101_5, with half of the epochs.
HALF = f"{PRETRAIN['ucf101_5']} --epochs 120 --warmup 5"
FEW_LIST = f"{LAB}/few-foldFOLD.txt"  # of SHOTS videos per class
POOL_LIST = f"{LAB}/pool-foldFOLD.txt"  # of both sets
PRETRAIN |= {
    "epochs120": HALF,
    "epochs60": f"{HALF} --epochs 60 --warmup 2.5",
    "depth4": f"{HALF} --decoder-depth 4",
    "tube75": f"{HALF} --ratio 0.75",
    "tube95": f"{HALF} --ratio 0.95",
    "random90": f"{HALF} --mask random",
    "frame87": f"{HALF} --mask frame --ratio 0.875",
    "center": f"{HALF} --model center",
    "l1": f"{HALF} --loss l1",
    "videos50": f"{HALF} --splits {FEW_LIST} --epochs 700 --warmup 30",  # as many steps
    "videos50-epochs120": f"{HALF} --splits {FEW_LIST}",
    # Twice the videos for half of the epochs: about as many steps as each set has alone.
    "pool": f"{HALF} --data datasets --splits {POOL_LIST} --ratio 0.75",
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
        f"{name}-probe": f"linprobe.py own {test} {MODEL} --batch 32 --crops 1",
    }
DOWN["ucf101_5-few"] = f"{DOWN['ucf101_5-tuned']} --shots {SHOTS} --epochs 60 --warmup 6"
# All of the recipe own: strong augmentation, layer decay, drop path, about 1,000 steps.
test = f"{DATA['ucf101_5']} --test-splits experiments/lists/ucf101_5_testFOLD.txt"
DOWN["ucf101_5-own"] = f"finetune.py own {test} {MODEL} --crops 1"
DOWN["ucf101_5-own-few"] = f"{DOWN['ucf101_5-own']} --shots {SHOTS}"
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


def ucf(pre: str, how: str = "tuned") -> str:
    """A cell that is tested on ucf101_5."""
    return f"{pre}:ucf101_5-{how}"


def worth(name: str, note: str, theirs: tuple = (None, None)) -> dict:
    """Is pre-training worth it on a set of clips? `theirs`: the paper's top-1 with and without."""
    tuned, long, probe = (f"{name}-{how}" for how in ("tuned", "long", "probe"))
    gap = theirs[0] - theirs[1] if theirs[0] else None
    return dict(
        title=f"Table 2, {name}: is pre-training worth it?",
        note=f"{note} Pre-training sees the training clips of its fold alone. Fine-tuning takes 20 "
        "epochs.",
        rows=[
            ("fine-tuned", theirs[0], f"{name}:{tuned}"),
            ("scratch", theirs[1], f"none:{tuned}"),
            ("fine-tuned, 40 epochs", None, f"{name}:{long}"),
            ("scratch, 40 epochs", None, f"none:{long}"),
            ("probe", None, f"{name}:{probe}"),
            ("probe of an untrained encoder", None, f"none:{probe}"),
            ("nearest neighbours", None, f"{name}:{probe}@knn"),
            ("nearest neighbours, untrained encoder", None, f"none:{probe}@knn"),
        ],
        claims=[
            ("fine-tuning beats scratch", gap, f"{name}:{tuned}", f"none:{tuned}"),
            ("and scratch of twice the epochs", NOT_THEIRS, f"{name}:{tuned}", f"none:{long}"),
            ("if both take twice the epochs", NOT_THEIRS, f"{name}:{long}", f"none:{long}"),
            (
                "the probe beats an untrained encoder's",
                NOT_THEIRS,
                f"{name}:{probe}",
                f"none:{probe}",
            ),
        ],
    )


def rivals(name: str) -> dict:
    """VideoMAE or MoCo v3 on a set of clips?"""
    tuned, probe = f"{name}-tuned", f"{name}-probe"
    return dict(
        title=f"Tables 2, 3, {name}: MoCo v3",
        note="The paper's numbers are of UCF101 (fine-tuned) and of SSv2 (probe).",
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
    """What are single frames worth on a set of clips?"""
    tuned = f"{name}-tuned"
    return dict(
        title=f"Tables 1d, 1e, {name}: images",
        note="Still frames: each clip is one frame, repeated. The paper's images are ImageNet's, "
        "its numbers of SSv2.",
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


# Rows: (label, the paper's top-1 in % or None, cell).
# Claims: (text, the paper's gap, cell, cell), see experiments/report.py. A gap of None is a claim
# without a number; with NOT_THEIRS the claim is not the paper's. An experiment without claims says
# that the paper's best row beats each of its other rows.
HOW = "Pre-training takes half of the epochs of the main recipe. Fine-tuning sees all labels."
SSV2 = "The paper's numbers are of SSv2."
OWN = (
    "Pre-training is that of Figure 3 at 75 %. Fine-tuning takes the 1,000 steps of the recipe own."
)
EXPERIMENTS = {
    "ucf101_5": worth(
        "ucf101_5",
        "Five classes of UCF101, about 280 training and 120 test clips per fold. The folds follow "
        "UCF101's groups. The paper's numbers are of all of UCF101.",
        theirs=(91.3, 51.4),
    ),
    "tennis7": worth(
        "tennis7",
        "Seven strokes of tennis players, about 250 training and 120 test clips per fold.",
    ),
    "labels10": dict(
        title="Ten labels per class, ucf101_5",
        note="Pre-training sees all training clips of its fold. Then come 60 epochs.",
        rows=[("fine-tuned", None, ucf("ucf101_5", "few")), ("scratch", None, ucf("none", "few"))],
        claims=[
            ("fine-tuning beats scratch", NOT_THEIRS, ucf("ucf101_5", "few"), ucf("none", "few"))
        ],
    ),
    "augmented": dict(
        title="Table 2, ucf101_5: the recipe own, with strong augmentation",
        note=f"{OWN} The paper's numbers are of all of UCF101.",
        rows=[("fine-tuned", 91.3, ucf("tube75", "own")), ("scratch", 51.4, ucf("none", "own"))],
        claims=[("fine-tuning beats scratch", 39.9, ucf("tube75", "own"), ucf("none", "own"))],
    ),
    "augmented10": dict(
        title="Ten labels per class, ucf101_5: the recipe own",
        note=OWN,
        rows=[
            ("fine-tuned", None, ucf("tube75", "own-few")),
            ("scratch", None, ucf("none", "own-few")),
        ],
        claims=[
            (
                "fine-tuning beats scratch",
                NOT_THEIRS,
                ucf("tube75", "own-few"),
                ucf("none", "own-few"),
            )
        ],
    ),
    "table1a": dict(
        title="Table 1a: decoder depth",
        note=f"{HOW} The encoder has 4 blocks, the paper's 12. {SSV2}",
        rows=[("1 block", 68.5, ucf("epochs120")), ("4 blocks", 69.6, ucf("depth4"))],
    ),
    "table1b": dict(
        title="Table 1b: masking",
        note=f"{HOW} {SSV2} Its row of tubes at 75 % is in Figure 3.",
        rows=[
            ("tube 90 %", 69.6, ucf("epochs120")),
            ("random 90 %", 68.3, ucf("random90")),
            ("frame 87.5 %", 61.5, ucf("frame87")),
        ],
    ),
    "table1c": dict(
        title="Table 1c: target",
        note=f"{HOW} {SSV2}",
        rows=[("the central frame", 63.0, ucf("center")), ("the clip", 69.6, ucf("epochs120"))],
    ),
    "table1f": dict(
        title="Table 1f: loss",
        note=f"{HOW} {SSV2}",
        rows=[("L1", 69.1, ucf("l1")), ("MSE", 69.6, ucf("epochs120"))],
    ),
    "table2": dict(
        title="Table 2: fewer videos",
        note="Pre-training takes equal steps, half of those of the main recipe. The 50 videos are "
        "fine-tuned for 60 epochs, the 280 for 20. The paper's numbers are of K400 (240k) and of "
        "UCF101 (9.5k).",
        axis="videos, all labelled",
        rows=[
            ("280, VideoMAE", 80.0, ucf("epochs120")),
            ("50, VideoMAE", 91.3, ucf("videos50", "few")),
            ("280, scratch", 68.8, ucf("none")),
            ("50, scratch", 51.4, ucf("none", "few")),
        ],
        claims=[
            ("it helps with 240k videos (ours 280)", 11.2, ucf("epochs120"), ucf("none")),
            ("it helps with 9.5k (ours 50)", 39.9, ucf("videos50", "few"), ucf("none", "few")),
            (
                "it helps more with fewer",
                28.7,
                f"{ucf('videos50', 'few')} + {ucf('none')}",
                f"{ucf('none', 'few')} + {ucf('epochs120')}",
            ),
        ],
    ),
    "table3": dict(
        title="Table 3, Figure 5: schedule, fine-tuning or probe",
        note="The paper's numbers are of 800 epochs of SSv2. Its figure has slight gains, without "
        "numbers.",
        axis=MINUTES,
        rows=[
            ("240 epochs, fine-tuned", 69.6, ucf("ucf101_5")),
            ("120 epochs, fine-tuned", None, ucf("epochs120")),
            ("60 epochs, fine-tuned", None, ucf("epochs60")),
            ("none, fine-tuned", 32.6, ucf("none")),
            ("240 epochs, probe", 38.9, ucf("ucf101_5", "probe")),
            ("120 epochs, probe", None, ucf("epochs120", "probe")),
            ("60 epochs, probe", None, ucf("epochs60", "probe")),
            ("none, probe", None, ucf("none", "probe")),
        ],
        claims=[
            ("fine-tuning beats the probe", 30.7, ucf("ucf101_5"), ucf("ucf101_5", "probe")),
            ("240 epochs beat 120", None, ucf("ucf101_5"), ucf("epochs120")),
            ("120 epochs beat 60", None, ucf("epochs120"), ucf("epochs60")),
        ],
    ),
    "table4": dict(
        title="Table 4: transfer",
        note="Fine-tuned on the second set. The paper's numbers are of UCF101. Its other set is "
        "Kinetics-400, of 240k videos.",
        rows=[
            ("ucf101_5 to ucf101_5", 91.3, ucf("ucf101_5")),
            ("tennis7 (theirs: K400) to ucf101_5", 96.1, ucf("tennis7")),
            ("none to ucf101_5", 51.4, ucf("none")),
            ("tennis7 to tennis7", None, "tennis7:tennis7-tuned"),
            ("ucf101_5 to tennis7", None, "ucf101_5:tennis7-tuned"),
            ("none to tennis7", None, "none:tennis7-tuned"),
        ],
        claims=[
            ("tennis7 helps ucf101_5", 44.7, ucf("tennis7"), ucf("none")),
            ("ucf101_5 helps tennis7", None, "ucf101_5:tennis7-tuned", "none:tennis7-tuned"),
            ("own clips help ucf101_5 more", NOT_THEIRS, ucf("ucf101_5"), ucf("tennis7")),
            (
                "own clips help tennis7 more",
                NOT_THEIRS,
                "tennis7:tennis7-tuned",
                "ucf101_5:tennis7-tuned",
            ),
        ],
    ),
    "pool": dict(
        title="Table 4: both sets pooled",
        note="Pre-training sees the training clips of ucf101_5 and tennis7, at 75 % and stride 4, "
        "in 7 % fewer to 12 % more steps than one set alone. Alone, ucf101_5 has 90 %, tennis7 has "
        "stride 2. The paper has no such row.",
        rows=[
            ("both to ucf101_5", None, ucf("pool")),
            ("ucf101_5 to ucf101_5", None, ucf("ucf101_5")),
            ("both to tennis7", None, "pool:tennis7-tuned"),
            ("tennis7 to tennis7", None, "tennis7:tennis7-tuned"),
        ],
        claims=[
            ("both help ucf101_5 more", NOT_THEIRS, ucf("pool"), ucf("ucf101_5")),
            ("both help tennis7 more", NOT_THEIRS, "pool:tennis7-tuned", "tennis7:tennis7-tuned"),
        ],
    ),
    "figure3": dict(
        title="Figure 3: mask ratio",
        note=f"{HOW} Of 64 places, 16, 7 and 4 stay visible. {SSV2} It prints none for 95 %.",
        axis="tokens hidden by tubes, %",
        rows=[
            ("75", 68.0, ucf("tube75")),
            ("90", 69.6, ucf("epochs120")),
            ("95", None, ucf("tube95")),
        ],
        claims=[("90 % beats 75 %", 1.6, ucf("epochs120"), ucf("tube75"))],
    ),
    "figure4": dict(
        title="Figure 4: a part of the videos",
        note=f"{HOW} 18 % are 10 videos per class. {SSV2} Its part is a quarter, 42k videos.",
        axis="videos, %",
        rows=[
            ("100, same steps", 69.6, ucf("epochs120")),
            ("18, same steps", 68.7, ucf("videos50")),
            ("100, same epochs", 69.6, ucf("epochs120")),
            ("18, same epochs", None, ucf("videos50-epochs120")),
        ],
        claims=[
            ("all beat a part", 0.9, ucf("epochs120"), ucf("videos50")),
            ("a part: longer helps", None, ucf("videos50"), ucf("videos50-epochs120")),
        ],
    ),
    "figure7": dict(
        title="Figures 7, 8: gains per class",
        note="Over scratch, of equal epochs; the paper's are over image pre-training.",
        rows=[
            (name + how, None, f"{ucf(pre)}@{number}")
            for number, name in enumerate(CLASSES)
            for pre, how in (("ucf101_5", ""), ("none", ", scratch"))
        ],
        claims=[
            (f"{name} gains", NOT_THEIRS, f"{ucf('ucf101_5')}@{number}", f"{ucf('none')}@{number}")
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
                f"{mask} masks: {part} places are easier than under tubes, {key}",
                None if part == "still" else NOT_THEIRS,
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
