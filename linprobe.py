"""Linear probe: how much of an action can be read off the frozen encoder? (paper section 4.3, Tables 3 and 11)

    python linprobe.py                                             # toy data, from runs/pretrain-toy, 2 CPU cores
    python linprobe.py --init random                               # the same with an untrained encoder
    python linprobe.py ucf101 --data ~/UCF-101 --splits ~/ucfTrainTestlist --init CKPT
    python linprobe.py --init CKPT --features out.npz --videos a.avi b.mp4     # features alone, of any videos

CKPT is a checkpoint of pretrain.py or finetune.py, an official .pth, or a Hugging Face folder. Every video is decoded
once and its features (mean over the encoder's last tokens) are kept in runs/NAME/features.npz; the head is trained on
those, in seconds, with the learning rate that is best on held-out training videos, never on the test videos.
Leaves runs/NAME/ with features.npz, results.json, predictions.csv and classes.png.
"""

import json
import os
from dataclasses import asdict, dataclass
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import engine
from data import (
    SAMPLING,
    TOY,
    Videos,
    cosine_lr,
    derive_seed,
    make_loader,
    make_toy,
    note_unreadable,
    pretrain_transform,
    read_split,
)
from engine import opt
from finetune import (
    DataConfig,
    accuracies,
    draw_shots,
    encoder_arguments,
    make_views,
    read_parts,
    read_weights,
    write_results,
)
from model import POSITIONS, SIZES, Encoder, load_weights, precision_dtype, set_eps, to_ours, widths


@dataclass
class Config(DataConfig):
    flip: bool = opt(False, "mirror every other training view")
    repeats: int = opt(4, "views of each training video, each with a time and a crop (MultiScaleCrop) of its own", 1)
    workers: int = opt(2, "decoding processes; 0 decodes in the main process", 0)
    # encoder
    init: str | None = opt(None, "checkpoint, or random; None: runs/pretrain-PRESET/checkpoint.pt")
    size: Literal[tuple(SIZES)] = opt("base", "width and depth with --init random, else the checkpoint's")
    cube: tuple[int, ...] = opt((2, 16, 16), "frames, rows and columns of a token with --init random")
    positions: Literal[POSITIONS] = opt("1d", "fixed positions with --init random: 1d as the official code, 3d ours")
    # head
    epochs: int = opt(100, "passes over the training features", 1)
    batch: int = opt(1024, "videos per step", 2)
    base_lrs: tuple[float, ...] = opt(
        (0.01, 0.03, 0.1, 0.3, 1.0, 3.0), "learning rates at batch 256, one of which wins"
    )
    warmup: float = opt(10, "epochs of linear warm-up", 0)
    seed: int = opt(0, "the only source of randomness: views, held-out videos, order", 0)
    # run
    features: str | None = opt(None, "write the features of --videos (None: of all videos of the data) here and stop")
    videos: tuple[str, ...] | None = opt(None, "video files for --features")
    name: str | None = opt(None, "results go to runs/NAME; None: linprobe-PRESET, or linprobe-PRESET-random")
    device: Literal["auto", "cpu", "cuda"] = opt("auto", "where to compute")
    precision: Literal["auto", "bf16", "fp16", "fp32"] = opt("auto", "of the encoder's matrix products")


# Table 11 of the paper: SGD with momentum 0.9, no weight decay, batch 1024, 100 epochs, 10 of them warm-up, base lr
# 0.1, MultiScaleCrop. Several learning rates instead of one, pooling, the normalised head and the test views are ours
# (the paper does not say). Strides, sampling and test views: as in fine-tuning.
PRESETS = {
    "toy": dict(data=TOY, shots=10, frames=8, stride=2, resolution=48, clips=2, crops=1, workers=0, size="toy",
                cube=(2, 8, 8), positions="3d", batch=32),  # ours
    "ucf101": dict(stride=4, clips=5),
    "hmdb51": dict(stride=2, clips=10),
    "ssv2": dict(sampling="uniform", clips=2),
    "k400": dict(stride=4, clips=5, flip=True),
    "ucf101-short": dict(size="small", stride=4, clips=5),
    "hmdb51-short": dict(size="small", stride=2, clips=10),
}  # fmt: skip

NOT_IN_FEATURES = set("epochs batch base_lrs warmup name device workers features videos".split())


def build_encoder(init: str, cfg: Config) -> Encoder:
    """The encoder with its last LayerNorm (a fine-tuned one has none), frozen; "random": untrained."""
    if init == "random":
        found = dict(size=cfg.size, video_size=(cfg.frames, cfg.resolution, cfg.resolution), positions=cfg.positions)
        arguments = encoder_arguments(found, cfg)
    else:
        state, found = read_weights(init)
        arguments = encoder_arguments(found, cfg)
        state = to_ours(state, arguments["cube"][0])
    eps, size = arguments.pop("eps"), widths(arguments.pop("size"))
    last = init == "random" or "encoder.norm.weight" in state
    encoder = Encoder(**{k: size[k] for k in ("dim", "depth", "heads")}, **arguments, final_norm=last)
    set_eps(encoder, eps)
    if init != "random":
        print(f"{init}{found.get('unfinished', '')}: {load_weights(nn.ModuleDict(dict(encoder=encoder)), state, 1.0)}")
    return encoder.requires_grad_(False)


def all_videos(cfg: Config) -> list[Path]:
    """Every training and test video of the data, once."""
    parts = [(cfg.data, cfg.splits, True), (cfg.test_data or cfg.data, cfg.test_splits or cfg.splits, False)]
    return list(
        dict.fromkeys(path for data, splits, train in parts for path in read_split(data, splits, cfg.fold, train).paths)
    )


@torch.no_grad()
def extract(encoder, views, total: int, device, dtype) -> Tensor:
    """Mean over the last tokens of every view: iterable of (views of one video (K, T, C, H, W)) -> (total, K, D)."""
    features = []
    for clips in tqdm(views, "features", total, leave=False):
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            features.append(encoder(clips.to(device, non_blocking=True)).float().mean(dim=1).cpu())
    return torch.stack(features)


class Head(nn.Module):
    """Features at zero mean and unit variance over the training set (BatchNorm without parameters), then Linear."""

    def __init__(self, dim: int, classes: int):
        super().__init__()
        self.norm = nn.BatchNorm1d(dim, affine=False, eps=1e-6)
        self.linear = nn.Linear(dim, classes)
        nn.init.trunc_normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear(self.norm(features))


def train_head(features: Tensor, labels: Tensor, classes: int, base_lr: float, cfg: Config) -> Head:
    """Train on features (videos, K, D), one random view of each video an epoch, with the recipe of Table 11."""
    torch.manual_seed(derive_seed(9, cfg.seed))
    head, batch = Head(features.shape[2], classes).to(features.device), min(cfg.batch, len(features))
    optimizer = torch.optim.SGD(head.parameters(), lr=0, momentum=0.9)
    per_epoch = len(features) // batch
    steps, warmup = cfg.epochs * per_epoch, int(cfg.warmup * per_epoch)
    for step in range(steps):
        if step % per_epoch == 0:
            order = torch.randperm(len(features)).to(features.device)
        optimizer.param_groups[0]["lr"] = cosine_lr(step, steps, warmup, base_lr * batch / 256, 0.0)
        rows = order[step % per_epoch * batch :][:batch]
        view = torch.randint(features.shape[1], (batch,)).to(features.device)
        loss = F.cross_entropy(head(features[rows, view]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return head.eval()


@torch.no_grad()
def score(head: Head, features: Tensor) -> tuple[Tensor, Tensor]:
    """Features (videos, K, D) -> mean softmax over the views (videos, classes), and each view's best class."""
    probabilities = head(features.flatten(0, 1)).softmax(dim=1).unflatten(0, features.shape[:2])
    return probabilities.mean(dim=1).cpu(), probabilities.argmax(dim=2).cpu()


def main(argv: list[str]) -> None:
    preset, cfg = engine.parse_config(Config, argv, __doc__, PRESETS)
    device, rank, processes = engine.setup(cfg.device)
    if processes > 1:
        raise ValueError("linprobe.py runs in one process: start it with python, not torchrun")
    init = cfg.init or str(Path("runs") / f"pretrain-{preset}" / "checkpoint.pt")
    run = Path("runs") / (cfg.name or f"linprobe-{preset}" + "-random" * (init == "random"))
    dtype = precision_dtype(cfg.precision, device)
    if cfg.videos and not cfg.features:
        raise ValueError("--videos goes with --features: name the .npz file to write")
    if cfg.features and (Path(cfg.features).suffix != ".npz" or not Path(cfg.features).parent.is_dir()):
        raise ValueError(f"--features {cfg.features} must be an .npz file in a folder that exists")
    if cfg.data is None and not cfg.videos:
        raise ValueError(f"--data is missing: the folder with the videos of {preset}")
    if cfg.data == TOY and not cfg.videos:
        make_toy(TOY)
    torch.manual_seed(cfg.seed)
    encoder = build_encoder(init, cfg).to(device).eval()

    def test_features(paths: list) -> np.ndarray:
        one_by_one = [[i] for i in range(len(paths))]
        loader = make_loader(make_views(cfg, paths), one_by_one, cfg.workers, pin=False, collate=itemgetter(0))
        return extract(encoder, (clips for _, clips in loader), len(paths), device, dtype).numpy()

    # Features of any videos: export them and stop.
    if cfg.features:
        paths = list(cfg.videos or all_videos(cfg))
        found = test_features(paths)
        np.savez(cfg.features, paths=np.array([str(path) for path in paths]), features=found.mean(axis=1))
        print(
            f"wrote {cfg.features}: {len(paths)} videos, {found.shape[2]} features each, mean of {found.shape[1]} views"
        )
        return

    # Features of the training and test videos, from the cache where it is of the same videos, views and weights.
    train, test = read_parts(cfg)
    train = draw_shots(train, cfg.shots, cfg.seed) if cfg.shots else train
    if len(train.paths) < 10:
        raise ValueError(f"{len(train.paths)} labelled videos are too few to choose a learning rate: 10 or more")
    kept = {k: v for k, v in asdict(cfg).items() if k not in NOT_IN_FEATURES}
    stamp = lambda path: (os.stat(path).st_size, os.stat(path).st_mtime_ns)
    weights = [] if init == "random" else [init, *sorted(Path(init).glob("*"))]
    files = [stamp(path) for path in (*weights, *train.paths, *test.paths)]
    about = json.dumps(kept | dict(init=init, files=files,
                                   train=[str(p) for p in train.paths], labels=train.labels,
                                   test=[str(p) for p in test.paths]))  # fmt: skip
    run.mkdir(parents=True, exist_ok=True)
    cache = run / "features.npz"
    try:
        with np.load(cache, allow_pickle=False) as file:
            saved = {key: file[key] for key in ("about", "train", "train_labels", "test")}
    except Exception:  # none, or one that is broken, in any of many ways
        saved = {"about": ""}
    if str(saved["about"]) != about:
        sample = partial(SAMPLING[cfg.sampling][0], frames=cfg.frames, stride=cfg.stride)
        augmented = Videos(train, sample, pretrain_transform(cfg.resolution, cfg.flip), cfg.repeats)
        keys = [[(i, derive_seed(8, cfg.seed, i))] for i in range(len(train.paths))]
        labels, bad = [], {}

        def training_clips():
            for clips, label, unreadable in make_loader(augmented, keys, cfg.workers, pin=False):
                note_unreadable(bad, unreadable, clips, len(train.paths))
                labels.append(int(label[0]))
                yield clips

        train_features = extract(encoder, training_clips(), len(train.paths), device, dtype)
        saved = dict(about=about, train=train_features.numpy(), train_labels=np.array(labels))
        saved["test"] = test_features(test.paths)
        np.savez(cache.with_suffix(".part.npz"), **saved)
        os.replace(cache.with_suffix(".part.npz"), cache)
        for error in bad.values():
            print(f"left out, unreadable: {error}")
    features, labels = torch.from_numpy(saved["train"]).to(device), torch.from_numpy(saved["train_labels"]).to(device)

    # The learning rate that does best on training videos held out, a fifth at a time; then a head trained on all.
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(derive_seed(10, cfg.seed)))
    fifths, sweep = order.to(device).chunk(5), {}
    for base_lr in cfg.base_lrs:
        right = 0.0
        for held in fifths:
            rest = torch.cat([fifth for fifth in fifths if fifth is not held])
            head = train_head(features[rest], labels[rest], len(train.classes), base_lr, cfg)
            right += accuracies(*score(head, features[held]), labels[held].tolist())["top1"] * len(held)
        sweep[base_lr] = right / len(order)
        print(f"base lr {base_lr:g}: {sweep[base_lr]:.2f} % of {len(order)} training videos, each while held out")
    best = max(sweep, key=sweep.get)
    head = train_head(features, labels, len(train.classes), best, cfg)
    scores, view_classes = score(head, torch.from_numpy(saved["test"]).to(device))
    about = dict(init=init, base_lr=best, sweep=sweep, config=asdict(cfg))
    result = write_results(run, test, scores, view_classes, **about)
    print(
        f"linear probe of {init}: {len(test.paths)} test videos, {cfg.clips} x {cfg.crops} views: top-1 "
        f"{result['top1']:.2f} %, top-5 {result['top5']:.2f} %, mean of classes {result['class_mean']:.2f} %"
    )


if __name__ == "__main__":
    engine.cli(main)
