"""Fine-tune the pre-trained encoder to recognise actions, and evaluate it (paper section 4.1 and Table 10).

    python finetune.py                                             # toy data, from runs/pretrain-toy, 2 CPU cores
    python finetune.py --init none --name scratch                  # the same without pre-training
    python finetune.py ucf101 --data ~/UCF-101 --splits ~/ucfTrainTestlist --init CKPT --micro 8       # one GPU
    torchrun --nproc_per_node 8 finetune.py ucf101 --data ~/UCF-101 --splits ~/ucfTrainTestlist
    python finetune.py ucf101 --data ~/UCF-101 --splits ~/ucfTrainTestlist --eval-only
    python finetune.py ucf101 --predict a.avi b.mp4                # top 5 classes of any videos

CKPT is a checkpoint of pretrain.py, an official .pth, or a Hugging Face folder. Leaves runs/NAME/ with checkpoint.pt,
log.jsonl, loss.png, results.json, predictions.csv (a line per test video) and classes.png (accuracy of every class).
"""

import argparse
import contextlib
import csv
import json
import math
import os
import re
import signal
import sys
import time
import zipfile
from dataclasses import asdict, dataclass, replace
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from tqdm import tqdm

import engine
import visualize
from data import (
    SAMPLING,
    TOY,
    Order,
    Split,
    Videos,
    Views,
    cosine_lr,
    derive_seed,
    finetune_transform,
    make_loader,
    make_toy,
    merge,
    note_skipped,
    note_unreadable,
    read_split,
    shown,
    split_batch,
)
from engine import opt
from model import (
    EPS,
    POSITIONS,
    SIZES,
    Classifier,
    grid_of,
    infer_config,
    load_weights,
    precision_dtype,
    to_ours,
    unit_range,
)


@dataclass
class DataConfig:
    """The flags of labelled videos and of their test views, of this stage and of linprobe.py."""

    data: str | None = opt(None, "folder of the videos")
    splits: str | None = opt(None, "folder of official split files, or a list of lines `path label`")
    test_data: str | None = opt(None, "folder of the test videos; None: as --data")
    test_splits: str | None = opt(None, "list of the test videos, lines `path label`; None: as --splits")
    fold: int = opt(1, "official split, 1 to 3", 1)
    shots: int = opt(0, "labelled training videos per class, drawn by the seed; 0: all", 0)
    frames: int = opt(16, "frames of a clip", 1)
    stride: int = opt(4, "frames of the video from one frame of a clip to the next (dense sampling)", 1)
    sampling: Literal[tuple(SAMPLING)] = opt("dense", "clips at a stride, or uniform: one frame from each equal part")
    resolution: int = opt(224, "height and width of a clip, pixels", 1)
    clips: int = opt(5, "test clips of a video", 1)
    crops: int = opt(3, "test crops of a clip", 1)


@dataclass
class Config(DataConfig):
    workers: int = opt(2, "decoding processes per GPU; 0 decodes in the main process", 0)
    # augmentation
    repeats: int = opt(2, "augmentations of each decoded clip; multiplies a step's clips, not its learning rate", 1)
    operations: int = opt(4, "RandAugment operations drawn for a clip, each applied half of the time", 0)
    magnitude: float = opt(7, "RandAugment magnitude, 0 to 10", 0)
    smallest: float = opt(0.08, "smallest area of the random crop, as a share of the frame", 0)
    flip: bool = opt(True, "mirror every other clip; not where left and right are classes")
    erase: float = opt(0.25, "probability that a rectangle is erased", 0)
    mixup: float = opt(0.8, "alpha of mixup, which takes turns with cutmix; 0: none", 0)
    cutmix: float = opt(1.0, "alpha of cutmix; 0: none", 0)
    smoothing: float = opt(0.1, "label smoothing", 0)
    # model
    init: str | None = opt(None, "checkpoint to start from, or none; None: runs/pretrain-PRESET/checkpoint.pt")
    least: float = opt(0.95, "smallest share of the encoder's weights that --init must hold", 0)
    size: Literal[tuple(SIZES)] = opt("base", "width and depth with --init none, else the checkpoint's")
    cube: tuple[int, ...] = opt((2, 16, 16), "frames, rows and columns of a token with --init none")
    positions: Literal[POSITIONS] = opt("1d", "fixed positions with --init none: 1d as the official code, 3d ours")
    drop_path: float = opt(0.1, "rate at which a clip skips the last block; grows linearly with depth", 0)
    head_dropout: float = opt(0.0, "dropout before the head", 0)
    init_scale: float = opt(1e-3, "factor on the head's first weights", 0)
    # optimisation
    epochs: int = opt(75, "passes over the training videos", 1)
    batch: int = opt(512, "effective batch: videos per optimiser step, over all GPUs and accumulation passes", 1)
    micro: int | None = opt(None, "videos per GPU and forward pass; None: the GPU's whole share", 1)
    base_lr: float = opt(1e-3, "learning rate at batch 256; the peak is base_lr * batch / 256")
    min_lr: float = opt(1e-6, "last learning rate, scaled like base_lr")
    warmup: float = opt(5, "epochs of linear warm-up", 0)
    weight_decay: float = opt(0.05, "AdamW's; none on biases and norms")
    layer_decay: float = opt(0.75, "learning rate of each block, as a share of the next one's", 0)
    clip_grad: float | None = opt(None, "largest gradient norm; None: no clipping")
    precision: Literal["auto", "bf16", "fp16", "fp32"] = opt("auto", "of matrix products; auto: bf16 if in hardware")
    seed: int = opt(0, "the only source of randomness: order, crops, dropout, weights", 0)
    # evaluation
    validate: int = opt(0, "epochs between looks at the test videos, one view each, for the curve alone; 0: never", 0)
    eval_only: bool = opt(False, "evaluate runs/NAME/checkpoint.pt, or --init, on clips like those it was trained on")
    predict: tuple[str, ...] | None = opt(None, "print the top 5 classes of these videos, with the same checkpoint")
    # run
    name: str | None = opt(None, "results go to runs/NAME; None: finetune-PRESET")
    resume: bool = opt(False, "continue runs/NAME")
    device: Literal["auto", "cpu", "cuda"] = opt("auto", "where to compute")
    compile: bool = opt(False, "torch.compile the model: a minute of waiting, then faster steps")
    checkpointing: bool = opt(False, "compute activations twice: less memory, more time")
    log_every: int = opt(10, "steps from one line of log.jsonl to the next", 1)
    shard: bool = opt(False, "spread weights and optimiser over the GPUs (FSDP2), for models too large for one")
    save_minutes: float = opt(10, "minutes from one checkpoint and loss curve to the next")
    save_every: int | None = opt(None, "steps from one checkpoint to the next, besides; None: by the minutes alone", 1)


CLIP = ("frames", "stride", "sampling", "resolution")
MAY_CHANGE = set(
    "data splits test_data test_splits workers micro init least clips crops validate eval_only predict name "
    "resume device compile checkpointing shard save_minutes save_every".split()
)  # on resume

# Table 10 and Appendix B of the paper, for the base model; warm-up, min_lr and head dropout of ucf101 from the official
# script, of hmdb51 as ucf101, since nothing is published. Other sizes, as in Table 10 or the scripts: small: layer
# decay .7, ssv2 base lr 1e-3, k400 150 epochs; large: drop path .2, head dropout .5, k400 50, ssv2 30 epochs.
PRESETS = {
    "toy": dict(data=TOY, shots=10, frames=8, stride=2, resolution=48, workers=0, repeats=1, operations=0, smallest=0.8,
                flip=False, erase=0.0, mixup=0.0, cutmix=0.0, size="toy", cube=(2, 8, 8), positions="3d", drop_path=0.0,
                epochs=20, batch=16, base_lr=1.6e-2, min_lr=1.6e-4, warmup=2, layer_decay=1.0, clips=2, crops=1,
                save_minutes=1),  # ours
    "ucf101": dict(stride=4, epochs=100, batch=128, base_lr=5e-4, min_lr=1e-5, drop_path=0.2, head_dropout=0.5,
                   layer_decay=0.7, clips=5),
    "hmdb51": dict(stride=2, epochs=50, batch=128, base_lr=1e-3, min_lr=1e-5, drop_path=0.2, head_dropout=0.5,
                   layer_decay=0.7, clips=10),
    "ssv2": dict(sampling="uniform", epochs=40, batch=512, base_lr=5e-4, flip=False, clips=2),
    "k400": dict(stride=4, epochs=75, batch=512, base_lr=1e-3, clips=5),
    # Ours, for one GPU, after the pre-training recipes of the same names. Not yet run.
    "ucf101-short": dict(size="small", stride=4, epochs=50, batch=128, base_lr=1e-3, min_lr=1e-5, layer_decay=0.7,
                         clips=5),
    "hmdb51-short": dict(size="small", stride=2, epochs=50, batch=128, base_lr=1e-3, min_lr=1e-5, layer_decay=0.7,
                         clips=10),
}  # fmt: skip


# Our arguments of a size -> Hugging Face's; and what a config.json means that leaves something out.
HF_SIZE = dict(dim="hidden_size", depth="num_hidden_layers", heads="num_attention_heads",
               decoder_dim="decoder_hidden_size", decoder_heads="decoder_num_attention_heads",
               decoder_depth="decoder_num_hidden_layers")  # fmt: skip
HF_DEFAULTS = dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12,
                   decoder_hidden_size=384, decoder_num_attention_heads=6, decoder_num_hidden_layers=4, image_size=224,
                   patch_size=16, num_frames=16, tubelet_size=2, num_channels=3, hidden_act="gelu",
                   layer_norm_eps=1e-12, use_mean_pooling=True, norm_pix_loss=True, id2label={})  # fmt: skip


def read_weights(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """Weights under the names they have in a file or Hugging Face folder, and the arguments of their model.

    Files: ours; official .pth with the weights under "model", under "module" or bare; .safetensors. Arguments are those
    of VideoMAE or Classifier, of files without any those that the shapes show; of classifiers also "labels", the names
    of the classes, and "clip", the settings CLIP, where they are known; of a training that was stopped "unfinished", a
    remark. Nothing is executed: weights_only, and argparse.Namespace, which official files contain.
    """
    path, content, config = Path(path), {}, None
    if not path.exists():
        raise ValueError(f"no weights at {path}")
    try:
        for file in [path] if path.is_file() else hf_files(path):
            if file.suffix == ".safetensors":
                from safetensors.torch import load_file  # needed for these files only

                content |= load_file(file)
            else:
                if zipfile.is_zipfile(file) and (wrong := zipfile.ZipFile(file).testzip()):
                    raise ValueError(f"damaged: checksum of {wrong}")  # torch.load does not compare them
                with torch.serialization.safe_globals([argparse.Namespace]):
                    content |= torch.load(file, map_location="cpu", weights_only=True)
        state = content.get("model", content.get("module", content))
        state = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        beside = (path if path.is_dir() else path.parent) / "config.json"
        if any("layernorm_before" in name for name in state) and beside.exists():
            config = json.loads(beside.read_text())
    except ImportError as error:
        raise ValueError(f"{path} cannot be read without safetensors: pip install safetensors") from error
    except Exception as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it would run {code[1]}" if code else " ".join(f"{type(error).__name__} {error}".split())[:100]
        raise ValueError(f"{path} holds no weights that can be read ({reason})") from error
    if not state:
        raise ValueError(f"{path} holds no weights")
    if "stage" in content:
        about, stage = content["config"], content["config"].get("stage", {})
        clip = {key: stage[key] for key in CLIP} if content["stage"] == "finetune" and stage else {}
        more = dict(labels=about["classes"]) if "classes" in about else {}
        more |= dict(clip=clip) if clip else {}
        if content.get("step", 0) < content.get("steps", 0):
            more["unfinished"] = f" (unfinished: step {content['step']} of {content['steps']})"
        return state, about["model"] | more
    if config is None:
        return state, infer_config(state)
    try:
        return state, hf_arguments(config, state)
    except ValueError as error:
        raise ValueError(f"{beside}: {error}") from error


def hf_files(folder: Path) -> list[Path]:
    """The files of weights in a Hugging Face folder, which an index names if there are several."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).exists():
            return [folder / name]
        if (index := folder / f"{name}.index.json").exists():
            parts = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            if strange := [part for part in parts if Path(part).name != part]:
                raise ValueError(f"{index.name} names a file outside of the folder: {strange[0]!r}")
            return [folder / part for part in parts]
    return []


def hf_arguments(config: dict, state: dict[str, Tensor]) -> dict:
    """Our arguments for the model that a Hugging Face config.json describes; ValueError where ours cannot be it."""
    if not isinstance(config, dict):
        raise ValueError("not a Hugging Face configuration")
    config, classifier = HF_DEFAULTS | config, "classifier.weight" in state
    for name, usual in HF_DEFAULTS.items():  # of the right kind, and nothing that no memory can hold
        value, most = config[name], len(state) if name.endswith("layers") else 10_000
        if type(usual) is int:
            sides = value if name in ("image_size", "patch_size") and isinstance(value, list) else [value]
            fits = all(isinstance(side, int) and 0 < side <= most for side in sides) and len(sides) in (1, 2)
        else:
            fits = isinstance(value, (int, float) if isinstance(usual, float) else type(usual))
        if not fits:
            raise ValueError(f"{name} = {str(value)[:50]!r} cannot be")
    needed = dict(model_type="videomae", num_channels=3, hidden_act="gelu")
    if classifier:
        needed["use_mean_pooling"] = True  # else the head reads token 0 alone, a corner of the first frames
    for name, value in needed.items():
        if config.get(name) != value:
            raise ValueError(f"a Hugging Face model with {name} = {config.get(name)} cannot be used, only with {value}")
    size = {ours: config[theirs] for ours, theirs in HF_SIZE.items()}
    used = ("dim", "depth", "heads") if classifier else ("dim", "depth", "heads", "decoder_dim", "decoder_heads")
    pair = lambda side: side if isinstance(side, list) else [side, side]
    arguments = dict(
        size=next((name for name, s in SIZES.items() if all(s[k] == size[k] for k in used)), size),
        video_size=[config["num_frames"], *pair(config["image_size"])],
        cube=[config["tubelet_size"], *pair(config["patch_size"])],
        eps=[config["layer_norm_eps"], 1e-5],  # the last is fixed there
    )
    if not classifier:
        return dict(arguments, decoder_depth=size["decoder_depth"], normalize=config["norm_pix_loss"])
    names, classes = config["id2label"], len(state["classifier.weight"])
    return dict(arguments, classes=classes, labels=[str(names.get(str(i), f"class {i}")) for i in range(classes)])


def file_key(path: Path) -> tuple:
    """What tells a file apart, however its path is spelled and whatever links lead to it."""
    about = os.stat(path)
    return (about.st_dev, about.st_ino) if about.st_ino else (os.path.realpath(path),)


def read_parts(cfg: DataConfig) -> tuple[Split, Split]:
    """The labelled training and test videos; ValueError where labels or a test part are missing or do not fit."""
    train = read_split(cfg.data, cfg.splits, cfg.fold)
    test = read_split(cfg.test_data or cfg.data, cfg.test_splits or cfg.splits, cfg.fold, train=False)
    if test == train:
        raise ValueError(f"{cfg.splits or cfg.data} has no test part: name one with --test-splits or --test-data")
    training = set(map(file_key, train.paths))
    if shared := [path for path in test.paths if file_key(path) in training]:
        raise ValueError(f"{len(shared)} videos are both training and test videos, for example {shown(min(shared))}")
    numbered = lambda split: split.classes == [str(i) for i in range(len(split.classes))]  # a list knows no names
    classes = max(train, test, key=lambda split: (not numbered(split), len(split.classes))).classes
    for part, split in (("training", train), ("test", test)):
        if min(split.labels) < 0:
            path = split.paths[split.labels.index(min(split.labels))]
            raise ValueError(f"no label for the {part} video {shown(path)}")
        if max(split.labels) >= len(classes) or not numbered(split) and split.classes != classes:
            raise ValueError(f"the {part} videos have other classes: {', '.join(set(split.classes) ^ set(classes))}")
    if max(test.labels) > max(train.labels):
        path, most = test.paths[test.labels.index(max(test.labels))], max(train.labels)
        raise ValueError(
            f"the test video {shown(path)} has label {max(test.labels)}, training videos have none over {most}"
        )
    return Split(train.paths, train.labels, classes), Split(test.paths, test.labels, classes)


def draw_shots(split: Split, shots: int, seed: int) -> Split:
    """`shots` videos of each class, drawn by the seed; ValueError where a class has fewer."""
    order = torch.randperm(len(split.paths), generator=torch.Generator().manual_seed(derive_seed(6, seed))).tolist()
    mine, chosen = [[] for _ in split.classes], []
    for i in order:
        mine[split.labels[i]].append(i)
    for name, videos in zip(split.classes, mine, strict=True):
        if len(videos) < shots:
            raise ValueError(
                f"--shots {shots}, but class {name} has {len(videos)} training videos: lower it, 0 takes all"
            )
        chosen += videos[:shots]
    return Split([split.paths[i] for i in chosen], [split.labels[i] for i in chosen], split.classes)


def make_mixer(classes: int, mixup: float, cutmix: float):
    """Mixup and cutmix in turns: (videos (B, T, C, H, W) float, labels (B,)) -> (videos, targets (B, classes)).

    Of two clips, each is mixed with the other by the same weight. Draws from torch's generator. None if both are off.
    """
    kinds = [v2.MixUp(alpha=mixup, num_classes=classes)] if mixup else []
    kinds += [v2.CutMix(alpha=cutmix, num_classes=classes)] if cutmix else []
    return v2.RandomChoice(kinds) if kinds else None


def mix_pairs(mixer, clips: Tensor, labels: Tensor, repeats: int, seeds: list[int]) -> tuple[Tensor, Tensor]:
    """Mix neighbouring videos: clips (2*K*R, T, C, H, W) float and their labels -> clips, targets (2*K*R, classes).

    R = `repeats` clips of each video stand together. Each is mixed with the same of the neighbour, 0 with 1, 2 with 3
    and so on, by its own of the K*R `seeds`: a batch is the same however it is spread over passes and GPUs (the
    official code mixes a GPU's first clip with its last, by one weight for all).
    """
    pairs = [rearrange(x, "(k two r) ... -> (k r) two ...", two=2, r=repeats) for x in (clips, labels)]
    mixed = []
    for clip, label, seed in zip(*pairs, seeds, strict=True):
        torch.manual_seed(seed)
        mixed.append(mixer(tv_tensors.Video(clip), label))
    clips, targets = (torch.stack([x.as_subclass(Tensor) for x in part]) for part in zip(*mixed, strict=True))
    return tuple(rearrange(x, "(k r) two ... -> (k two r) ...", r=repeats) for x in (clips, targets))


def param_groups(model: Classifier, weight_decay: float, layer_decay: float) -> list[dict]:
    """AdamW's groups, as in the official code: no weight decay for vectors (biases, LayerNorms).

    A group's learning rate is to be multiplied by its `scale`: 1 for head and fc_norm, layer_decay for the encoder's
    last block, its square for the one before, and so on down to the cube embedding.
    """
    groups, last = {}, len(model.encoder.blocks) + 1
    for name, parameter in model.named_parameters():
        block = re.match(r"encoder\.blocks\.(\d+)", name)
        layer = int(block[1]) + 1 if block else 0 if name.startswith("encoder.patch_embed") else last
        key = (0.0 if parameter.ndim == 1 else weight_decay, layer_decay ** (last - layer))
        groups.setdefault(key, []).append(parameter)
    return [dict(params=groups[key], weight_decay=key[0], scale=key[1]) for key in sorted(groups, reverse=True)]


def make_views(cfg: DataConfig, paths: list) -> Views:
    """The test views of videos that the flags ask for."""
    return Views(paths, SAMPLING[cfg.sampling][1], frames=cfg.frames, stride=cfg.stride, clips=cfg.clips,
                 size=cfg.resolution, crops=cfg.crops)  # fmt: skip


@torch.no_grad()
def score_videos(model, views: Views, device, dtype, rank: int = 0, processes: int = 1, workers: int = 0):
    """Softmax scores of every video: (mean over its views (videos, classes), best class of each view (videos, K)).

    Every process takes every n-th video, each video counts once whatever the number of processes, and each gets all
    scores. Those with one video less take the last one too, since processes that share a model must act alike.
    """
    model.eval()
    mine = [[min(i + rank, len(views) - 1)] for i in range(0, len(views), processes)]
    loader = make_loader(views, mine, workers, device.type == "cuda", collate=itemgetter(0))
    scores = {}
    for index, clips in tqdm(loader, "evaluating", len(mine), leave=False, disable=rank > 0 or len(views) == 1):
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits = model(clips.to(device, non_blocking=True))
        probabilities = logits.float().softmax(dim=1)
        scores[index] = (probabilities.mean(dim=0).cpu(), probabilities.argmax(dim=1).cpu())
    model.train()
    if processes > 1:
        parts = [None] * processes
        dist.all_gather_object(parts, scores)
        scores = {index: score for part in parts for index, score in part.items()}
    return tuple(torch.stack(column) for column in zip(*(scores[i] for i in range(len(views))), strict=True))


def accuracies(scores: Tensor, view_classes: Tensor, labels: list[int]) -> dict[str, float]:
    """top1 and top5 of the videos, mean over classes of top1, and top1 of single views, in percent."""
    labels = torch.tensor(labels)
    right = scores.argmax(dim=1) == labels
    top5 = (scores.topk(min(5, scores.shape[1])).indices == labels[:, None]).any(dim=1)
    classes = [right[labels == label].float().mean() for label in labels.unique()]
    view = (view_classes == labels[:, None]).float().mean()
    shares = dict(
        top1=right.float().mean(), top5=top5.float().mean(), class_mean=sum(classes) / len(classes), view=view
    )
    return {name: 100 * float(share) for name, share in shares.items()}


def write_predictions(path: Path, split: Split, scores: Tensor) -> None:
    """One line per test video: path, label, prediction, correct, five best classes and their probabilities.

    visualize.read_predictions reads it back: names that a spreadsheet would take for a formula stand behind ', and in
    the list of classes ; is \\: and \\ is \\\\.
    """
    best, cell = scores.topk(min(5, scores.shape[1])), visualize.to_cell
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(visualize.PREDICTIONS)
        for video, label, values, indices in zip(split.paths, split.labels, *best, strict=True):
            top = [split.classes[i] for i in indices]
            names = cell(str(video)), cell(split.classes[label]), cell(top[0])
            probabilities = ";".join(f"{value:.6f}" for value in values)
            writer.writerow([*names, int(indices[0] == label), visualize.join_names(top), probabilities])


def write_results(run: Path, test: Split, scores: Tensor, view_classes: Tensor, **about) -> dict[str, float]:
    """Leave results.json (with `about`), predictions.csv and classes.png in a run's folder; returns the accuracies."""
    result = accuracies(scores, view_classes, test.labels)
    run.mkdir(parents=True, exist_ok=True)
    write_predictions(run / "predictions.csv", test, scores)
    visualize.plot_classes(run / "predictions.csv", run / "classes.png")
    visualize.write_whole(run / "results.json", json.dumps(about | result, indent=1) + "\n")  # last: the rest is there
    return result


def evaluate(
    model, test: Split, weights: str, cfg: Config, run: Path, device, dtype, rank: int, processes: int
) -> None:
    """The paper's protocol: several clips and crops of every test video, mean of their softmax scores."""
    try:
        scores, best = score_videos(model, make_views(cfg, test.paths), device, dtype, rank, processes, cfg.workers)
    except ValueError as error:
        raise ValueError(f"{error} (training is saved: mend the list or the file, then --eval-only)") from error
    if rank == 0:
        about = dict(weights=weights, views=[cfg.clips, cfg.crops], config=asdict(cfg))
        result = write_results(run, test, scores, best, **about)
        print(
            f"{len(test.paths)} test videos, {cfg.clips} x {cfg.crops} views: top-1 {result['top1']:.2f} %, top-5 "
            f"{result['top5']:.2f} %, mean of classes {result['class_mean']:.2f} %; single views {result['view']:.2f} %"
        )


def source(preset: str, cfg: Config, run: Path) -> str:
    """Where the weights come from: --init, or the run itself for evaluation, or the pre-training of the same preset."""
    ready = cfg.eval_only or cfg.predict
    return cfg.init or str((run if ready else Path("runs") / f"pretrain-{preset}") / "checkpoint.pt")


def encoder_arguments(found: dict, cfg) -> dict:
    """What a model needs to take weights with the arguments `found` (see read_weights), for the clips of `cfg`.

    Unless they say otherwise, weights are taken to be for 16x224x224 and the official positions, and cubes to be those
    of the flags.
    """
    cube = tuple(found.get("cube", cfg.cube))
    trained = found.get("trained_grid") or grid_of(found.get("video_size", (16, 224, 224)), cube)
    return dict(size=found["size"], video_size=(cfg.frames, cfg.resolution, cfg.resolution), cube=cube,
                positions=found.get("positions", "1d"), trained_grid=trained, eps=found.get("eps", EPS))  # fmt: skip


def build(
    preset: str, cfg: Config, run: Path, classes: list[str] | None, resumed: dict | None = None
) -> tuple[Config, Classifier, list[str], str]:
    """The classifier that the flags ask for, its class names, and which weights were found.

    `classes` are those of the data, or None where no data is read; `resumed` a checkpoint of this stage to go on with.
    The flags come back too: for evaluation, with the clips that the weights were trained on.
    """
    if resumed:  # whatever --init names by now
        about = resumed["config"]
        if about["classes"] != classes:
            raise ValueError(
                f"--resume with other classes than before: {', '.join(set(about['classes']) ^ set(classes))}"
            )
        return cfg, Classifier(**about["model"]), classes, f"going on with {run}"
    ready, path = cfg.eval_only or cfg.predict, source(preset, cfg, run)  # ready: needs a trained head
    new = dict(drop_path=cfg.drop_path, head_dropout=cfg.head_dropout, init_scale=cfg.init_scale)
    if path == "none" and ready:
        raise ValueError("--init none has no trained head: there is nothing to evaluate")
    if path == "none":
        size = (cfg.frames, cfg.resolution, cfg.resolution)
        return cfg, Classifier(cfg.size, len(classes), size, cfg.cube, cfg.positions, **new), classes, "untrained"
    state, found = read_weights(path)
    cfg = replace(cfg, **found.get("clip", {})) if ready else cfg
    names = found.get("labels") or [f"class {i}" for i in range(found.get("classes", 0))]
    if ready and not names:
        raise ValueError(f"{path} has no trained head: fine-tune it first")
    if ready and classes and len(classes) != len(names):
        raise ValueError(f"{path} knows {len(names)} classes, the videos have {len(classes)}")
    if ready and classes and set(names) == set(classes) and names != classes:
        raise ValueError(f"{path} knows the classes in another order: {', '.join(names[:3])} ...")
    classes = classes or names
    model = Classifier(classes=len(classes), **encoder_arguments(found, cfg), **new)
    state = to_ours(state, model.encoder.cube[0])
    absent = [name for name in model.state_dict() if name not in state]
    if ready and absent:
        raise ValueError(f"{path} is no whole classifier, it has no {', '.join(absent[:4])}: fine-tune it first")
    return cfg, model, classes, f"{path}{found.get('unfinished', '')}: {load_weights(model, state, cfg.least)}"


def main(argv: list[str]) -> None:
    preset, cfg = engine.parse_config(Config, argv, __doc__, PRESETS)
    device, rank, processes = engine.setup(cfg.device)
    run = Path("runs") / (cfg.name or f"finetune-{preset}")
    dtype = precision_dtype(cfg.precision, device)
    if cfg.shard and dtype == torch.float16:
        raise ValueError("--shard does not go with fp16: use --precision bf16 or fp32")
    for name, most in dict(magnitude=10, smallest=1, erase=1, smoothing=1, drop_path=1, head_dropout=1).items():
        if getattr(cfg, name) > most:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(cfg, name)} must be at most {most}")

    torch.manual_seed(cfg.seed)
    if cfg.predict:
        cfg, model, classes, report = build(preset, cfg, run, None)
        model.to(device)
        print(report)
        for path in cfg.predict if rank == 0 else ():
            scores, _ = score_videos(model, make_views(cfg, [path]), device, dtype)
            best = scores[0].topk(min(5, len(classes)))
            print(shown(path), *(f"{p:7.1%}  {classes[i]}" for p, i in zip(*best, strict=True)), sep="\n  ")
        return

    # Data: the labelled videos of both parts.
    if cfg.data is None:
        raise ValueError(f"--data is missing: the folder with the videos of {preset}")
    if cfg.warmup >= cfg.epochs:
        raise ValueError(f"--warmup {cfg.warmup:g} leaves nothing of --epochs {cfg.epochs}: lower it")
    if cfg.data == TOY and rank == 0:
        make_toy(TOY)
    if processes > 1:
        dist.barrier()
    split, test = read_parts(cfg)

    # Model; for evaluation nothing else.
    begun = any((run / name).exists() for name in ("checkpoint.pt", "previous.pt")) and not cfg.eval_only
    if begun and not cfg.resume:
        raise ValueError(f"{run} holds a run already: continue it with --resume, or choose another --name")
    resumed = engine.load_checkpoint(run / "checkpoint.pt", "finetune") if begun else None
    cfg, model, classes, report = build(preset, cfg, run, split.classes, resumed)
    model.to(device).encoder.checkpointing = cfg.checkpointing
    one_view = make_views(replace(cfg, clips=1, crops=1), test.paths)
    score = partial(evaluate, model, test, source(preset, cfg, run), cfg, run, device, dtype, rank, processes)
    if rank == 0:
        print(report if begun or not cfg.resume else f"no checkpoint in {run}: starting from step 0\n{report}")
    if cfg.eval_only:
        score()
        if processes > 1:
            dist.destroy_process_group()
        return

    # Clips: uint8, in an order that depends on the seed alone.
    split = draw_shots(split, cfg.shots, cfg.seed) if cfg.shots else split
    sample = partial(SAMPLING[cfg.sampling][0], frames=cfg.frames, stride=cfg.stride)
    augment = finetune_transform(cfg.resolution, cfg.flip, cfg.operations, cfg.magnitude, cfg.smallest, cfg.erase)
    videos = Videos(split, sample, augment, cfg.repeats, same_time=True)
    mixer = make_mixer(len(classes), cfg.mixup, cfg.cutmix)
    micro, passes = split_batch(cfg.batch, processes, cfg.micro)
    if mixer and micro % 2:
        raise ValueError(f"{micro} videos at a time cannot be mixed in pairs: an even --micro, or --mixup 0 --cutmix 0")
    per_epoch = max(len(videos) // cfg.batch, 1)
    steps, warmup = cfg.epochs * per_epoch, int(cfg.warmup * per_epoch)
    peak, floor = cfg.base_lr * cfg.batch / 256, cfg.min_lr * cfg.batch / 256

    # Optimiser.
    net = engine.parallel(model, cfg.shard)
    if cfg.compile:
        model.compile()
    groups = param_groups(model, cfg.weight_decay, cfg.layer_decay)
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.999), fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    config = {"model": model.config, "stage": asdict(cfg), "classes": classes, "videos": len(videos), "format": 2}
    start, progress = 0, dict(loss=0.0, taken=0, skipped=[], unreadable={})  # loss: sum over the steps taken
    if resumed:
        start, progress = engine.resume(resumed, config, MAY_CHANGE, model, optimizer, scaler)

    order = Order(len(videos), cfg.batch, micro, start, steps, cfg.seed, rank, processes)
    batches = make_loader(videos, order, cfg.workers, pin=device.type == "cuda")
    log = visualize.Log(run / "log.jsonl", start, steps, on=rank == 0)
    if rank == 0:
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        print(
            f"{len(videos)} training, {len(test.paths)} test videos, {len(classes)} classes; batch {cfg.batch} = "
            f"{processes} processes x {passes} passes x {micro} videos, {cfg.repeats} clips of each; "
            f"{cfg.epochs} epochs = {steps} steps, {warmup} of them warm-up; peak lr {peak:.3g}; "
            f"{millions:.1f} M parameters; {dtype} on {device}"
        )
        if start == 0:
            log.write(config=config, torch=torch.__version__)

    # The loop.
    generator = torch.Generator(device)
    clips_per_step = cfg.batch * cfg.repeats
    share = clips_per_step // processes
    signals, stop, done, saved_at = engine.stop_signals(catch=True), 0, start, time.time()
    for step in range(start, steps):
        lr = cosine_lr(step, steps, warmup, peak, floor)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]

        # Drop path, dropout and mixing of the whole effective batch are drawn clip by clip, of which this process takes
        # its rows: the same on any number of GPUs.
        generator.manual_seed(derive_seed(7, cfg.seed, step))
        chances = torch.rand(clips_per_step, model.draws, generator=generator, device=device)
        total = 0.0
        for number, chance in enumerate(chances[rank * share :][:share].split(micro * cfg.repeats), start=1):
            asked = time.time()
            clips, labels, unreadable = next(batches)
            log.waited += time.time() - asked
            note_unreadable(progress["unreadable"], unreadable, clips, len(videos))
            clips, targets = clips.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            clips, first = unit_range(clips), (rank * share + (number - 1) * len(clips)) // 2  # first pair of clips
            if mixer:
                seeds = [derive_seed(11, cfg.seed, step, first + i) for i in range(len(clips) // 2)]
                clips, targets = mix_pairs(mixer, clips, targets, cfg.repeats, seeds)
            early = processes > 1 and not cfg.shard and number < passes  # DDP: gradients meet in the last pass
            with net.no_sync() if early else contextlib.nullcontext():
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    logits = net(clips, chance)
                loss = F.cross_entropy(logits.float(), targets, label_smoothing=cfg.smoothing)
                scaler.scale(loss / passes).backward()
            total = total + loss.detach() / passes
        done = step + 1
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip_grad or math.inf)
        if norm.isfinite():
            scaler.step(optimizer)
            progress["loss"], progress["taken"] = progress["loss"] + total.item(), progress["taken"] + 1
        else:  # the weights stay as they are
            note_skipped(progress["skipped"], done, lr, order, videos, run)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

        save = time.time() - saved_at > 60 * cfg.save_minutes or cfg.save_every and done % cfg.save_every == 0
        stop, save = engine.agree(max(signals, default=0), bool(save or signals or done == steps), device=device)
        line = done % cfg.log_every == 0 or done == steps
        if line or save:
            merge(progress, processes)
        if line:
            log.report(progress, done, done / per_epoch, lr, clips_per_step)
        if save:
            engine.save_checkpoint(
                run, model, optimizer, stage="finetune", config=config, step=done, steps=steps,
                scaler=scaler.state_dict(), progress=progress,
            )  # fmt: skip
            saved_at = time.time()
        if save and rank == 0:
            visualize.plot_log(run / "log.jsonl", run / "loss.png")
        if stop:
            break
        if cfg.validate and done % (cfg.validate * per_epoch) == 0 and done < steps:
            asked = time.time()
            scores, best = score_videos(model, one_view, device, dtype, rank, processes, cfg.workers)
            log.write(step=done, top1=accuracies(scores, best, test.labels)["top1"])
            log.time += time.time() - asked

    engine.stop_signals(catch=False)
    batches.close()
    log.close(progress, stop, done)
    if not stop:
        score()
    if processes > 1:
        dist.destroy_process_group()
    if stop:
        sys.exit(130 if stop == signal.SIGINT else 0)


if __name__ == "__main__":
    engine.cli(main)
