"""Linear probe: what can be read off the frozen encoder? (section 4.3, Tables 3 and 11)

    python linprobe.py                                      # toy videos, from runs/pretrain-toy
    python linprobe.py --init random                        # the same with an untrained encoder
    python linprobe.py ucf101 --data UCF-101 --splits ucfTrainTestlist --init WEIGHTS
    python linprobe.py own --init WEIGHTS --features out.npz --videos a.avi FOLDER  # features alone

WEIGHTS is what finetune.py takes, or its checkpoint. Each video is decoded once; its features, the
mean over the encoder's last tokens, stay in runs/NAME/features.pt. The head is trained on those in
seconds. Its learning rate is the best one on held-out training videos; test videos are looked at
once, at the end. Leaves runs/NAME/ with features.pt, results.json, predictions.csv and figures.
Expect less than from fine-tuning: 38.9 % where that gives 69.6 % (paper, Something-Something V2).
"""

import json
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import finetune
from data import SAMPLING, Split, Videos, pretrain_transform
from lib import engine, evaluate, speed
from lib.engine import opt
from lib.video import identity
from lib.weights import build, load_weights, read_weights
from model import VideoMAE


@dataclass
class Config(finetune.ClipConfig):
    init: str | None = opt(None, "weights, or random; None: runs/pretrain-PRESET/checkpoint.pt")
    flip: bool = opt(False, "mirror half of the training views")
    repeats: int = opt(4, "views of a training video, each with its own time and crop", 1)
    # head
    epochs: int = opt(100, "passes over the training features", 1)
    batch: int = opt(1024, "videos per step", 2)
    base_lrs: tuple[float, ...] = opt((0.01, 0.03, 0.1, 0.3, 1.0, 3.0), "to choose from, batch 256")
    warmup: float = opt(10, "epochs of linear warm-up", 0)
    # features
    features: str | None = opt(None, "write the features of --videos here, .npz")
    videos: tuple[str, ...] | None = opt(None, "files, folders, globs or lists, for --features")


# Table 11: SGD with momentum 0.9, no weight decay, batch 1024, 100 epochs, 10 of them warm-up, base
# lr 0.1, MultiScaleCrop. The paper does not say the rest: pooling, the normalised head, the choice
# of the learning rate and the test views are ours. Strides, sampling, views: as in fine-tuning.
SHARED = {field.name for field in fields(finetune.ClipConfig)}
PRESETS = {
    name: {key: value for key, value in preset.items() if key in SHARED}
    for name, preset in finetune.PRESETS.items()
}
PRESETS["toy"]["batch"], PRESETS["k400"]["flip"] = 32, True


def make_encoder(cfg: Config, preset: str) -> tuple[Config, nn.ModuleDict]:
    """(settled flags, {"encoder": frozen}) of weights, or untrained with "random"."""
    source = cfg.init or f"runs/pretrain-{preset}/checkpoint.pt"
    state, about = ({}, {}) if source == "random" else read_weights(source)
    cfg, config, line = finetune.settle_clips(cfg, preset, about, source)
    model = nn.ModuleDict(dict(encoder=build(VideoMAE, config).encoder))
    if state and "encoder.norm.weight" not in state:
        model["encoder"].norm = nn.Identity()  # a fine-tuned encoder has no last norm
    print(f"{source}: {load_weights(model, state, about, 1.0)}\n{line}")
    return cfg, model.requires_grad_(False).eval()


class RandomViews(Videos):
    """Item i: `repeats` random views of training video i, or why it cannot be read."""

    def __init__(self, split: Split, cfg: Config):
        rule = partial(SAMPLING[cfg.sampling][0], frames=cfg.frames, stride=cfg.stride)
        super().__init__(split, rule, pretrain_transform(cfg.resolution, cfg.flip), cfg.repeats)
        self.seeds = [engine.derive_seed("probe", cfg.seed, i) for i in range(len(self))]
        how = f"flip {cfg.flip}, repeats {cfg.repeats}"
        files = zip(split.paths, self.seeds, strict=True)
        self.keys = [f"{identity(path)}, seed {seed}, {how}" for path, seed in files]

    def __getitem__(self, index: int) -> Tensor | str:
        try:
            views, _, unreadable = super().__getitem__((index, self.seeds[index]))
        except ValueError as error:
            return str(error)
        return next(iter(unreadable.values()), views)


def write_features(encoder, cfg: Config, device, path: Path, mean) -> None:
    """Write what --features asks for: paths, starts in seconds, features (videos, D) float32.

    They are also kept in the file `path`. Exit code 1, at the end, where videos cannot be read.
    """
    windows, wrong = evaluate.find_videos(cfg.videos, cfg.data, cfg.every)
    found, errors = evaluate.each_video(
        encoder, evaluate.WindowViews(windows, cfg), cfg, device, path, mean
    )
    if found:
        paths, starts = [str(windows[i].path) for i in found], [windows[i].start for i in found]
        features = torch.stack([*found.values()]).mean(dim=1)
        Path(cfg.features).parent.mkdir(parents=True, exist_ok=True)
        np.savez(cfg.features, paths=paths, starts=starts, features=features)
        print(f"wrote {cfg.features}: {len(features)} videos, {features.shape[1]} features each")
    evaluate.name_wrong([*wrong, *errors.values()])


def train_head(features: Tensor, labels: Tensor, classes: int, base_lr: float, cfg: Config):
    """A head trained on features (videos, K, D), a random view of each video per epoch (Table 11).

    It brings features to mean 0 and variance 1 over the training set, before its Linear layer.
    """
    torch.manual_seed(engine.derive_seed("head", cfg.seed))
    videos, views, dim = features.shape
    head = nn.Sequential(nn.BatchNorm1d(dim, affine=False, eps=1e-6), nn.Linear(dim, classes))
    nn.init.trunc_normal_(head[1].weight, std=0.01)
    nn.init.zeros_(head[1].bias)
    head = head.to(features.device)
    optimizer = torch.optim.SGD(head.parameters(), lr=0, momentum=0.9)
    batch = min(cfg.batch, videos)
    per_epoch = videos // batch
    steps, warmup = cfg.epochs * per_epoch, int(cfg.warmup * per_epoch)
    for step in range(steps):
        if step % per_epoch == 0:
            order = torch.randperm(videos).to(features.device)
        lr = engine.cosine_lr(step, steps, warmup, base_lr * batch / 256, 0.0)
        optimizer.param_groups[0]["lr"] = lr
        rows = order[step % per_epoch * batch :][:batch]
        view = torch.randint(views, (batch,)).to(features.device)
        loss = F.cross_entropy(head(features[rows, view]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return head.eval()


@torch.no_grad()
def score(head: nn.Module, features: Tensor) -> Tensor:
    """Features (videos, K, D) -> softmax of each view (videos, K, classes), on the CPU."""
    return head(features.flatten(0, 1)).softmax(dim=1).unflatten(0, features.shape[:2]).cpu()


def choose_lr(features: Tensor, labels: Tensor, classes: int, cfg: Config) -> dict[float, float]:
    """{base lr: top-1 in % on fifths of the training videos, each while held out}."""
    generator = torch.Generator().manual_seed(engine.derive_seed("held out", cfg.seed))
    order, sweep = torch.randperm(len(features), generator=generator).to(features.device), {}
    for base_lr in cfg.base_lrs:
        right = 0
        for held in order.chunk(5):
            rest = order[~torch.isin(order, held)]
            head = train_head(features[rest], labels[rest], classes, base_lr, cfg)
            best = score(head, features[held]).mean(dim=1).argmax(dim=1)
            right += int((best == labels[held].cpu()).sum())
        sweep[base_lr] = 100 * right / len(order)
        print(f"base lr {base_lr:g}: {sweep[base_lr]:.2f} % of the held-out training videos")
    return sweep


def main(argv: list[str]) -> None:
    preset, cfg = engine.parse_config(Config, argv, __doc__, PRESETS)
    device = engine.setup(cfg.device)
    if engine.processes() > 1:
        raise ValueError("linprobe.py runs in one process: start it with python, not torchrun")
    if bool(cfg.features) != bool(cfg.videos):
        raise ValueError("--features FILE.npz and --videos go together")
    if cfg.features and not cfg.features.endswith(".npz"):
        raise ValueError(f"--features {cfg.features} must end in .npz")
    torch.manual_seed(cfg.seed)
    cfg, model = make_encoder(cfg, preset)
    encoder = speed.place(model, device)["encoder"]
    untrained = "-random" * (cfg.init == "random")
    folder = Path("runs") / (cfg.name or f"linprobe-{preset}{untrained}")
    how = (cfg, device, folder / "features.pt", lambda tokens: tokens.mean(dim=1))
    if cfg.features:
        return write_features(encoder, *how)
    place = lambda init: str(Path(init).resolve()).removesuffix("/checkpoint.pt")
    results = folder / "results.json"
    if results.exists():
        before = json.loads(results.read_text()).get("init")  # a fine-tuning's have none
        if before is None or place(before) != place(cfg.init):
            raise ValueError(f"{folder} holds results of other weights: choose a --name")

    # Features (videos, K, D) of K views.
    train, test = finetune.read_parts(cfg, preset)
    train = finetune.draw_shots(train, cfg.shots, cfg.seed)
    if len(train.paths) < 10:
        few = f"{len(train.paths)} labelled videos are too few"
        raise ValueError(f"{few} to choose a learning rate: 10 or more")
    if cfg.warmup >= cfg.epochs:
        raise ValueError(f"--warmup {cfg.warmup:g} must be less than --epochs {cfg.epochs}")
    if cfg.epochs * (len(train.paths) // min(cfg.batch, len(train.paths))) < 100:
        print("note: in under 100 steps, the head's BatchNorm does not settle: more --epochs")
    found, errors = evaluate.each_video(encoder, evaluate.WindowViews(test.paths, cfg), *how)
    evaluate.none_wrong(errors, "then the same command")
    unseen = torch.stack([*found.values()]).to(device)
    found, errors = evaluate.each_video(encoder, RandomViews(train, cfg), *how)
    for error in errors.values():
        print(f"left out, unreadable: {error}")
    if len(errors) > len(train.paths) / 10:
        raise ValueError(f"over a tenth of the videos cannot be read, such as {error}")
    features = torch.stack([*found.values()]).to(device)
    labels = torch.tensor([train.labels[i] for i in found]).to(device)

    # A linear head on them, with the learning rate that is best on training videos.
    sweep = choose_lr(features, labels, len(train.classes), cfg)
    best = max(sweep, key=sweep.get)
    head = train_head(features, labels, len(train.classes), best, cfg)
    near = evaluate.knn(features.mean(dim=1), labels, unseen.mean(dim=1)).argmax(dim=1).cpu()
    nearest = 100 * float((near == torch.tensor(test.labels)).float().mean())
    about = dict(init=cfg.init, base_lr=best, sweep=sweep, knn=nearest)
    line = evaluate.write_results(folder, test, cfg, score(head, unseen), **about)
    print(f"linear probe of {cfg.init}, {line}; 20 nearest neighbours {nearest:.2f} %")


if __name__ == "__main__":
    engine.cli(main)
