"""Linear probe: what can be read off the frozen encoder? (section 4.3, Tables 3 and 11)

    python linprobe.py                                      # toy videos, from runs/pretrain-toy
    python linprobe.py --init random                        # the same with an untrained encoder
    python linprobe.py ucf101 --data UCF-101 --splits ucfTrainTestlist --init WEIGHTS
    python linprobe.py --init WEIGHTS --features out.npz --videos a.avi FOLDER    # features alone

WEIGHTS is what finetune.py takes, or its checkpoint. Each video is decoded once; its features, the
mean over the encoder's last tokens, stay in runs/NAME/features.npz. The head is trained on those in
seconds. Its learning rate is the best one on held-out training videos; test videos are looked at
once, at the end. Leaves runs/NAME/ with features.npz, results.json, predictions.csv, classes.png.
Expect less than from fine-tuning: 38.9 % where that gives 69.6 % (paper, Something-Something V2).
"""

import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import finetune
from data import SAMPLING, TOY, Split, Videos, make_loader, pretrain_transform
from lib import engine, speed
from lib.engine import opt
from lib.evaluate import cut, each_video, find_videos, keep, knn, name_wrong, stack, stamp
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
    features: str | None = opt(None, "write the features of all videos, or of --videos, here: .npz")
    videos: tuple[str, ...] | None = opt(None, "files, folders, globs or lists, for --features")


# Table 11: SGD with momentum 0.9, no weight decay, batch 1024, 100 epochs, 10 of them warm-up, base
# lr 0.1, MultiScaleCrop. The paper does not say the rest: pooling, the normalised head, the choice
# of the learning rate and the test views are ours. Strides, sampling, views: as in fine-tuning.
PRESETS = {
    "toy": dict(data=TOY, shots=10, clips=2, crops=1, workers=0, batch=32),
    "own": {},
    "ucf101": dict(augment="official", stride=4, clips=5),
    "hmdb51": dict(augment="official", stride=2, clips=10),
    "ssv2": dict(augment="official", sampling="uniform", clips=2),
    "k400": dict(augment="official", stride=4, clips=5, flip=True),
    "ucf101-short": dict(stride=4, clips=5),
    "hmdb51-short": dict(stride=2, clips=10),
}
# Flags that features do not depend on.
HEAD = set("epochs batch base_lrs warmup name device workers features videos every".split())


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


@torch.no_grad()
def encode(encoder, clips: Tensor, cfg: Config, device) -> tuple[Tensor]:
    """Views (K, T, C, H, W) -> (features (K, D),), the mean over the encoder's last tokens."""
    with engine.autocast(device, engine.precision_dtype(cfg.precision, device)):
        tokens = encoder(clips.to(device))
    return (tokens.float().mean(dim=1).cpu(),)


def settings(cfg: Config) -> str:
    """What features depend on, besides their videos."""
    flags = {key: value for key, value in asdict(cfg).items() if key not in HEAD}
    return json.dumps(flags) + stamp(cfg.init)


def training_features(encoder, split: Split, cfg: Config, device, path: Path) -> list[Tensor]:
    """Features (videos, K, D) of random views of each training video, and labels (videos,)."""
    rule = partial(SAMPLING[cfg.sampling][0], frames=cfg.frames, stride=cfg.stride)
    videos = Videos(split, rule, pretrain_transform(cfg.resolution, cfg.flip), cfg.repeats)

    def results(todo: list[int]):
        keys, unreadable = [[(i, engine.derive_seed("probe", cfg.seed, i))] for i in todo], {}
        loader = make_loader(videos, keys, cfg.workers, collate=itemgetter(0))
        batches = engine.progress("training videos", len(todo), loader, leave=False)
        for index, (clips, label, errors) in zip(todo, batches, strict=True):
            unreadable |= errors
            if clips is None or len(unreadable) > len(videos) / 10:
                example = next(iter(unreadable.values()))
                raise ValueError(f"over a tenth of the videos cannot be read, such as {example}")
            features = encode(encoder, clips, cfg=cfg, device=device)
            yield index, (*features, torch.tensor(label))
        for error in unreadable.values():
            print(f"left out, unreadable: {error}")

    keys = [f"{i} {stamp(file)}" for i, file in enumerate(split.paths)]
    return stack(*keep(results, keys, path, settings(cfg)))


def cached_features(encoder, train: Split, test: Split, cfg: Config, folder: Path, device):
    """Training features, their labels, test features; from the cache where all is as it was."""
    stamps = [stamp(file) for file in (*train.paths, *test.paths)]
    about = json.dumps([settings(cfg), stamps, train.labels])
    cache, part = folder / "features.npz", folder / "features.part.npz"
    # There may be no cache, or a broken one, in any of many ways.
    with suppress(Exception), np.load(cache, allow_pickle=False) as file:
        if str(file["about"]) == about:
            return [torch.from_numpy(file[name]) for name in ("train", "labels", "test")]
    parts = [folder / "test.part.pt", folder / "train.part.pt"]
    work = partial(encode, encoder, cfg=cfg, device=device)
    found = each_video(test.paths, work, cfg, device, parts[0], settings(cfg))
    (unseen,) = stack(*found, "then the same command")
    features, labels = training_features(encoder, train, cfg, device, parts[1])
    np.savez(part, about=about, train=features, labels=labels, test=unseen)
    os.replace(part, cache)
    for part in parts:
        part.unlink()
    return features, labels, unseen


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
def score(head: nn.Module, features: Tensor) -> tuple[Tensor, Tensor]:
    """(videos, K, D) -> mean softmax (videos, classes), and the class of each view (videos, K)."""
    probabilities = head(features.flatten(0, 1)).softmax(dim=1).unflatten(0, features.shape[:2])
    return probabilities.mean(dim=1).cpu(), probabilities.argmax(dim=2).cpu()


def choose_lr(features: Tensor, labels: Tensor, classes: int, cfg: Config) -> dict[float, float]:
    """{base lr: top-1 in % on fifths of the training videos, each while held out}."""
    generator = torch.Generator().manual_seed(engine.derive_seed("held out", cfg.seed))
    order, sweep = torch.randperm(len(features), generator=generator).to(features.device), {}
    for base_lr in cfg.base_lrs:
        right = 0
        for held in order.chunk(5):
            rest = order[~torch.isin(order, held)]
            head = train_head(features[rest], labels[rest], classes, base_lr, cfg)
            scores, _ = score(head, features[held])
            right += int((scores.argmax(dim=1) == labels[held].cpu()).sum())
        sweep[base_lr] = 100 * right / len(order)
        print(f"base lr {base_lr:g}: {sweep[base_lr]:.2f} % of the held-out training videos")
    return sweep


def main(argv: list[str]) -> None:
    preset, cfg, name, device = finetune.start("linprobe", Config, argv, __doc__, PRESETS)
    if engine.processes() > 1:
        raise ValueError("linprobe.py runs in one process: start it with python, not torchrun")
    if cfg.videos and not cfg.features:
        raise ValueError("--videos goes with --features: name the .npz file to write")
    out = Path(cfg.features or "out.npz")
    if out.suffix != ".npz" or not out.parent.is_dir():
        raise ValueError(f"--features {out} must be an .npz file in a folder that exists")
    torch.manual_seed(cfg.seed)
    train, test = (None, None) if cfg.features else finetune.read_parts(cfg, preset)
    cfg, model = make_encoder(cfg, preset)
    encoder = speed.place(model, device)["encoder"]

    if cfg.features:
        # All videos of the data, each once, whatever their labels.
        parts = () if cfg.videos else finetune.read_both(cfg, preset)
        paths, wrong = find_videos(cfg.videos or (), cfg.data)
        paths += dict.fromkeys(path for part in parts for path in part.paths)
        videos = [window for path in paths for window in cut(path, cfg.every)]
        work, part = partial(encode, encoder, cfg=cfg, device=device), out.with_suffix(".part.pt")
        found, errors = each_video(videos, work, cfg, device, part, settings(cfg))
        wrong += errors.values()
        if not found:
            name_wrong(wrong)
        features, chosen = stack(found, {})[0].mean(dim=1), [videos[i] for i in found]
        paths, starts = [str(video.path) for video in chosen], [video.start for video in chosen]
        np.savez(out, paths=paths, starts=starts, features=features)
        print(f"wrote {out}: {len(features)} videos, {features.shape[1]} features each")
        name_wrong(wrong)
        return part.unlink()

    train = finetune.draw_shots(train, cfg.shots, cfg.seed)
    if len(train.paths) < 10:
        few = f"{len(train.paths)} labelled videos are too few"
        raise ValueError(f"{few} to choose a learning rate: 10 or more")
    if cfg.init == "random" and not cfg.name:
        name += "-random"
    folder = Path("runs") / name
    found = cached_features(encoder, train, test, cfg, folder, device)
    features, labels, unseen = (tensor.to(device) for tensor in found)
    sweep = choose_lr(features, labels, len(train.classes), cfg)
    best = max(sweep, key=sweep.get)
    head = train_head(features, labels, len(train.classes), best, cfg)
    near = knn(features.mean(dim=1), labels, unseen.mean(dim=1)).argmax(dim=1).cpu()
    nearest = 100 * float((near == torch.tensor(test.labels)).float().mean())
    about = dict(init=cfg.init, base_lr=best, sweep=sweep, knn=nearest)
    line = finetune.write_results(folder, test, cfg, *score(head, unseen), **about)
    print(f"linear probe of {cfg.init}, {line}; 20 nearest neighbours {nearest:.2f} %")


if __name__ == "__main__":
    engine.cli(main)
