"""Fine-tune the pre-trained encoder to recognise actions, and evaluate it (section 4.1, Table 10).

    python finetune.py                                      # toy videos, from runs/pretrain-toy
    python finetune.py --init none --name scratch           # the same without pre-training
    python finetune.py ucf101 --data UCF-101 --splits ucfTrainTestlist --init WEIGHTS --micro 8
    torchrun --nproc_per_node 8 finetune.py hmdb51 --data hmdb51 --splits testTrainMulti_7030_splits
    python finetune.py ucf101 --data UCF-101 --splits ucfTrainTestlist --eval-only
    python finetune.py ucf101 --predict a.avi FOLDER '*.mp4' LIST     # top 5 classes of any videos

WEIGHTS is a checkpoint of pretrain.py, an official .pth or a Hugging Face folder. Leaves runs/NAME/
with checkpoint.pt, log.jsonl, loss.png, results.json, predictions.csv, classes.png, confusion.png,
with --predict predicted.csv. The loss begins at log(classes); with mixup, it stays well above 0.
UCF101: 91.3 % after 3,200 epochs of pre-training (paper).
"""

import re
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms import v2

import visualize
from data import SAMPLING, TOY, Split, Videos, finetune_transform, make_loader, read_split
from lib import engine, evaluate, prepare, speed
from lib.annotations import brief
from lib.engine import opt
from lib.lists import READERS, choose
from lib.run import Run, RunConfig, StageConfig, fit_to_set
from lib.video import shown
from lib.weights import build, by, load_weights, read_weights
from model import SIZES, Classifier, to_float


@dataclass
class ModelConfig(StageConfig):
    """Flags about weights and what their model is fed, of all stages that start from weights."""

    init: str | None = opt(None, "weights, or 'none'; None: those of pretrain.py, or of runs/NAME")
    frames: int | None = opt(None, "frames of a clip; None: as the weights", 1)
    stride: int | None = opt(None, "video frames per clip frame, 0: still; None: as the weights", 0)
    resolution: int | None = opt(None, "height and width of a clip; None: as the weights", 1)
    size: Literal[tuple(SIZES)] | None = opt(None, "width and depth; None: as the weights")
    cube: tuple[int, ...] | None = opt(None, "frames, rows, columns; None: as the weights")
    positions: Literal["1d", "3d"] | None = opt(None, "position embeddings; None: as the weights")


@dataclass
class ClipConfig(ModelConfig):
    """Flags about labelled videos and their clips, of this stage and of linprobe.py."""

    test_data: str | None = opt(None, "folder of the test videos; None: as --data")
    test_splits: str | None = opt(None, "list of the test videos; None: as --splits")
    classes: str | None = opt(None, "file with the names of classes of a list or of weights")
    shots: int = opt(0, "training videos per class, drawn by the seed; 0: all", 0)
    clips: int = opt(5, "test clips per video", 1)
    crops: int = opt(3, "test crops per clip", 1)
    augment: Literal["official", "torchvision"] = opt("torchvision", "RandAugment and resampling")
    every: float | None = opt(None, "seconds per prediction or feature; None: the whole video", 0)
    sampling: Literal[tuple(SAMPLING)] | None = opt(None, "of frames; None: as weights, else dense")


@dataclass
class TuneConfig(RunConfig):
    """Flags of training with labels, of this stage and of detect.py."""

    # model
    least: float = opt(0.95, "smallest share of the encoder's tensors that --init must hold", 0, 1)
    drop_path: float = opt(0.1, "rate at which a clip skips a branch of the last block", 0, 1)
    head_dropout: float = opt(0.0, "dropout before the head", 0, 1)
    init_scale: float = opt(1e-3, "factor on the head's first weights", 0)
    # optimisation
    epochs: int | None = opt(75, "passes over the training videos; None: by --steps", 1)
    steps: int = opt(1000, "steps of the recipe own, unless --epochs is given", 1)
    batch: int = opt(512, "videos per step, over all GPUs and gradient accumulation passes", 1)
    micro: int | None = opt(None, "videos per GPU and forward pass; None: one pass per step", 1)
    base_lr: float = opt(1e-3, "learning rate at batch 256; the peak is base_lr * batch / 256", 0)
    min_lr: float = opt(1e-6, "last learning rate, scaled like base_lr", 0)
    warmup: float | None = opt(5, "epochs of linear warm-up; None: a tenth of all", 0)
    weight_decay: float = opt(0.05, "AdamW's; none on biases and norms", 0)
    layer_decay: float = opt(0.75, "learning rate of a block, as a share of the next one's", 0)
    clip_grad: float | None = opt(None, "largest gradient norm; None: no clipping", 0)
    # evaluation
    eval_only: bool = opt(False, "evaluate runs/NAME/checkpoint.pt, or --init, on its own clips")


@dataclass
class Config(ClipConfig, TuneConfig):
    # Above: flags for weights, labelled videos and training. lib/run.py: those of all stages.
    # augmentation
    repeats: int = opt(2, "augmentations of each decoded clip; the learning rate stays", 1)
    operations: int = opt(4, "RandAugment operations per clip, each applied half of the time", 0)
    magnitude: float = opt(7, "RandAugment magnitude", 0, 10)
    smallest: float = opt(0.08, "smallest area of the random crop, as a share of the frame", 0, 1)
    flip: bool = opt(True, "mirror half of the clips; not where left and right are classes")
    erase: float = opt(0.25, "probability that a rectangle is erased", 0, 1)
    mixup: float = opt(0.8, "alpha of mixup, which takes turns with cutmix; 0: none", 0)
    cutmix: float = opt(1.0, "alpha of cutmix; 0: none", 0)
    smoothing: float = opt(0.1, "label smoothing", 0, 1)
    # evaluation
    validate: int = opt(0, "epochs between looks at test or held-out videos; 0: never", 0)
    hold_out: float = opt(0.0, "share of the training videos that --validate looks at", 0, 0.9)
    predict: tuple[str, ...] | None = opt(None, "files, folders, globs or lists of videos")


# Table 10 and Appendix B, base model. Warm-up, min_lr and head dropout of ucf101: official script;
# of hmdb51: as ucf101, the authors gave none. Other sizes in Table 10 or the scripts: small: layer
# decay .7, ssv2 base lr 1e-3, k400 150 epochs; large: drop path .2, head dropout .5, k400 50 and
# ssv2 30 epochs.
UCF = dict(augment="official", batch=128, min_lr=1e-5, drop_path=0.2, head_dropout=0.5,
           layer_decay=0.7)  # fmt: skip
SHORT = dict(epochs=50, batch=128, base_lr=1e-3, min_lr=1e-5, layer_decay=0.7)  # ours, not yet run
PRESETS = {
    "toy": dict(data=TOY, shots=10, workers=0, repeats=1, operations=0, smallest=0.8, flip=False,
                erase=0.0, mixup=0.0, cutmix=0.0, drop_path=0.0, epochs=20, batch=16, warmup=2,
                base_lr=1.6e-2, min_lr=1.6e-4, layer_decay=1.0, clips=2, crops=1, save_minutes=1),
    "own": dict(epochs=None, warmup=None, batch=16, base_lr=4e-3),  # toy and own are ours
    "ucf101": dict(UCF, stride=4, epochs=100, base_lr=5e-4, clips=5),
    "hmdb51": dict(UCF, stride=2, epochs=50, base_lr=1e-3, clips=10),
    "ssv2": dict(sampling="uniform", augment="official", epochs=40, batch=512, base_lr=5e-4,
                 flip=False, clips=2),
    "k400": dict(stride=4, augment="official", epochs=75, batch=512, base_lr=1e-3, clips=5),
    "ucf101-short": dict(SHORT, stride=4, clips=5),
    "hmdb51-short": dict(SHORT, stride=2, clips=10),
}  # fmt: skip

# Model and clips where weights, flags and preset say nothing: the paper's. UNTRAINED beats USUAL
# where there are no weights.
USUAL = dict(frames=16, stride=4, sampling="dense", resolution=224, augment="torchvision",
             size="base", cube=(2, 16, 16), positions="1d")  # fmt: skip
TOY_CLIPS = dict(frames=8, stride=2, resolution=48, size="toy", cube=(2, 8, 8), positions="3d")
UNTRAINED = {"toy": TOY_CLIPS} | dict.fromkeys(["ucf101-short", "hmdb51-short"], dict(size="small"))


# ------------------------------------------------------------------------------ weights and data


def settle_clips(cfg: ModelConfig, preset: str, about: dict, source: str, trained: bool = False):
    """(flags with model and clips filled in, arguments of build, a line on what the model gets).

    A flag or preset comes before the weights (`about` of read_weights, from `source`), these before
    USUAL. With `trained`, the weights come first: a classifier is tested on clips like those it was
    trained on. ValueError where a flag asks for another model than the weights are of.
    """
    keys = [key for key in USUAL if hasattr(cfg, key)]  # detect.py has no choice of sampling
    weights = {key: about[key] for key in keys if key in about}
    if "cube" in about:
        weights["cube"] = tuple(about["cube"])
    if "video_size" in about:
        weights["frames"], weights["resolution"], _ = about["video_size"]
    flags = {key: getattr(cfg, key) for key in keys if getattr(cfg, key) is not None}
    for key in {"size", "cube", "positions"} & weights.keys() & flags.keys():
        if weights[key] != flags[key]:
            raise ValueError(f"--{key} {flags[key]}, but {source} has {weights[key]}: leave it out")
    usual = USUAL if about else USUAL | UNTRAINED.get(preset, {})
    # Later ones win.
    chosen = usual | flags | weights if trained else usual | weights | flags
    chosen = {key: chosen[key] for key in keys}
    other = [key for key in flags if flags[key] not in (chosen[key], getattr(type(cfg), key))]
    if lost := ", ".join(f"--{key} {flags[key]}" for key in other):
        Run.say(f"note: {source} gets clips as in its training, not {lost} of the preset or yours")
    if chosen["stride"] == 0 and chosen.get("sampling") == "uniform":
        raise ValueError("--stride 0 is one frame held still: it needs --sampling dense")
    cfg, side = replace(cfg, init=source, **chosen), chosen["resolution"]
    config = {"eps": about["eps"]} if "eps" in about else {}
    config |= {key: chosen[key] for key in ("size", "cube", "positions")}
    config["video_size"] = (cfg.frames, side, side)
    rule = f"stride {cfg.stride}" if cfg.stride else "one frame held still"
    rule = "uniform sampling" if chosen.get("sampling") == "uniform" else rule
    if chosen.get("augment") == "official":
        rule += ", official resizing"
    clips = f"clips of {cfg.frames} frames, {rule}, {side}x{side} pixels"
    return cfg, config, f"{clips}, cubes {by(cfg.cube)}, size {cfg.size}"


def make_classifier(
    cfg: Config, preset: str, folder: Path, classes: list[str] | None, Model=Classifier
):  # fmt: skip
    """(settled flags, Classifier, names of its classes) for training, evaluation or prediction.

    `classes`: those to train. `Model` may be detect.py's. Prints what was loaded. ValueError where
    a trained head is needed, and the weights have none.
    """
    own, trained = folder / "checkpoint.pt", cfg.eval_only or bool(cfg.predict)
    path = cfg.init or str(own if trained else f"runs/pretrain-{preset}/checkpoint.pt")
    if cfg.resume and own.exists() and not trained:
        path = str(own)  # whatever --init is by now
    state, about = ({}, {}) if path == "none" else read_weights(path)
    cfg, config, line = settle_clips(cfg, preset, about, path, trained)
    norm = Model.last_norm
    other_classes = not trained and about.get("classes") != classes
    if other_classes or f"{norm}.weight" not in state:  # a head for something else is of no use
        state = {name: x for name, x in state.items() if not name.startswith("head.")}
    if trained:
        classes = about.get("classes", [])
        if not {f"{norm}.weight", f"{norm}.bias", "head.weight", "head.bias"} <= {*state}:
            raise ValueError(f"{path} has no trained head with its norm: fine-tune it first")
    if cfg.eval_only and own.exists() and not any(map(Path(path).samefile, (own, folder))):
        raise ValueError(f"{folder} holds another model, whose results would go: choose a --name")
    config |= {key: getattr(cfg, key) for key in ("drop_path", "head_dropout", "init_scale")}
    torch.manual_seed(cfg.seed)
    model = build(Model, config | dict(classes=len(classes)))
    report = load_weights(model, state, about, 1.0 if trained else cfg.least)
    Run.say(f"{path}: {report}\n{line}")
    return cfg, model, classes


def read_parts(cfg: ClipConfig, preset: str) -> tuple[Split, Split]:
    """Labelled training and test videos with the same classes. ValueError where they do not fit."""
    more = (cfg.missing, cfg.classes)
    # To evaluate, test videos that are named are enough.
    alone = getattr(cfg, "eval_only", False) and (cfg.test_data or cfg.test_splits)
    train = not alone and prepare.training_videos(preset, cfg.data, cfg.splits, cfg.fold, *more)
    data, splits = cfg.test_data or cfg.data, cfg.test_splits or cfg.splits
    file = Path(splits or "").expanduser()
    one_part = file.is_file() and file.suffix not in READERS
    if one_part and cfg.data and cfg.test_data and not cfg.test_splits:
        # The list is of the videos in cfg.data. That it fits other ones would be an accident.
        if train and train.kind == "list":
            raise ValueError(f"{splits} has numbers for classes: list the test videos, too")
        Run.say(f"note: {splits} is of the training videos, the test videos are all in {data}")
        splits = None
    test = read_split(data, splits, cfg.fold, False, *more)
    train = train or test
    files = {path.stat()[1:3] for path in train.paths}  # inode, device: links lead to the same
    shared = [path for path in test.paths if path.stat()[1:3] in files]
    if shared and not alone:
        both = f"{len(shared)} videos are both training and test videos, such as"
        advice = "name the test part with --test-splits or --test-data"
        raise ValueError(f"{both} {shown(min(shared))}: {advice}")

    for part, split in (("training", train), ("test", test)):
        if -1 in split.labels:
            line = f"no label for the {part} video {shown(split.paths[split.labels.index(-1)])}"
            how = "put the videos of each class into a folder, or labels into a list"
            raise ValueError(f"{line}: {how}; --predict needs none")
    # Classes are matched by name, as a test part may lack some. A list has numbers only: it takes
    # the names of the other part, if that has any.
    classes = next((part.classes for part in (train, test) if part.kind != "list"), train.classes)
    if train.classes != classes:
        train = evaluate.fit_classes(train, classes, "the test videos", "the training videos")
    test = evaluate.fit_classes(test, classes, "the training videos", "the test videos")
    if len({*train.labels}) < 2 and not alone:
        one = brief(classes[train.labels[0]])
        raise ValueError(f"all training videos are of one class, {one}: two are needed")
    if new := sorted({classes[label] for label in {*test.labels} - {*train.labels}}):
        Run.say(f"note: test videos, but no training videos, are of {brief(', '.join(new))}")
    return train, test


def draw_shots(split: Split, shots: int, seed: int) -> Split:
    """`shots` videos per class, drawn by the seed (0: all). ValueError where a class has fewer."""
    if shots == 0:
        return split
    generator = torch.Generator().manual_seed(engine.derive_seed("shots", seed))
    order = torch.randperm(len(split.paths), generator=generator).tolist()
    chosen = []
    for label, name in enumerate(split.classes):
        videos = [i for i in order if split.labels[i] == label][:shots]
        if 0 < len(videos) < shots:  # 0 where labels begin at 1: no class has the number 0
            raise ValueError(f"--shots {shots}, but class {name} has {len(videos)} training videos")
        chosen += videos
    return choose(split, chosen)


def hold_out(split: Split, share: float, seed: int) -> tuple[Split, Split]:
    """(videos to train on, `share` of each class's videos or a little more), drawn by the seed.

    Clips of one film stay together: UCF101's v_Class_g08_c01.avi is of film 8. One film of each
    class is trained on in any case.
    """
    films, due, seen, held = defaultdict(list), Counter(), set(), []
    for i, (path, label) in enumerate(zip(split.paths, split.labels, strict=True)):
        films[label, re.sub(r"(_g\d+)_[^/]*$", r"\1", str(path))].append(i)
        due[label] += share
    generator = torch.Generator().manual_seed(engine.derive_seed("hold out", seed))
    films = list(films.items())
    for k in torch.randperm(len(films), generator=generator).tolist():
        (label, _), videos = films[k]
        if label in seen and due[label] > 1e-6:
            due[label] -= len(videos)
            held += videos
        seen.add(label)
    if not held:
        raise ValueError("--hold-out needs a class with two training videos")
    return choose(split, sorted({*range(len(split.paths))} - {*held})), choose(split, held)


# --------------------------------------------------------------------------------------- training


def mix(clips: Tensor, labels: Tensor, classes: int, cfg: Config) -> tuple[Tensor, Tensor]:
    """Mixup or cutmix of a micro-batch, drawn from torch's generator (Table 10).

    clips (B, T, C, H, W) uint8 and labels (B,) -> float clips and targets (B, classes), which are
    the labels themselves where both are off. ValueError for the clips of a single video.
    """
    kinds = [v2.MixUp(alpha=cfg.mixup, num_classes=classes)] if cfg.mixup else []
    kinds += [v2.CutMix(alpha=cfg.cutmix, num_classes=classes)] if cfg.cutmix else []
    if not kinds:
        return clips, labels
    if len(clips) == cfg.repeats:
        raise ValueError("one video at a time cannot be mixed: --micro 2, or --mixup 0 --cutmix 0")
    # Clips of a video stand together. Spread them, so that a clip is mixed with another video.
    order = torch.arange(len(clips), device=clips.device).view(-1, cfg.repeats).T.flatten()
    clips, labels = to_float(clips[order]), labels[order]
    mixed, targets = v2.RandomChoice(kinds)(tv_tensors.Video(clips), labels)
    return mixed.as_subclass(Tensor), targets


def make_optimizer(model: nn.Module, cfg) -> torch.optim.Optimizer:
    """AdamW (Table 10). As in the official code, vectors (biases, LayerNorms) do not decay.

    The learning rate is multiplied by the group's `scale`: 1 for head and last norm, layer_decay
    for the last block, its square for the one before, and so on down to the cube embedding.
    Layers near the input have learned in pre-training what is general: they change least.
    """
    head = nn.ModuleList([model.get_submodule(model.last_norm), model.head])
    layers, groups = [model.encoder.patch_embed, *model.encoder.blocks, head], []
    for depth, layer in enumerate(reversed(layers)):
        for ndim, decay in ((1, 0.0), (2, cfg.weight_decay)):
            params = [p for p in layer.parameters() if p.ndim == ndim]
            groups.append(dict(params=params, weight_decay=decay, scale=cfg.layer_decay**depth))
    return torch.optim.AdamW(groups, betas=(0.9, 0.999), fused=True)


# ------------------------------------------------------------------------------------- evaluation


def score_test(model: Classifier, test: Split, cfg: Config, folder: Path, device) -> None:
    """The paper's protocol: the mean of the softmax scores of several clips and crops."""
    path, views = folder / "scores.pt", evaluate.WindowViews(test.paths, cfg)
    found, errors = evaluate.each_video(model, views, cfg, device, path)
    evaluate.none_wrong(errors, "then --eval-only")
    scores = torch.stack([*found.values()])
    if engine.rank() == 0:
        print(evaluate.write_results(folder, test, cfg, scores, views=[cfg.clips, cfg.crops]))
        for file in evaluate.kept_files(path):
            file.unlink(missing_ok=True)


def main(argv: list[str]) -> None:
    preset, cfg = engine.parse_config(Config, argv, __doc__, PRESETS)
    name, device = cfg.name or f"finetune-{preset}", engine.setup(cfg.device)
    folder = Path("runs") / name

    # Data and model.
    train, test = (None, None) if cfg.predict else read_parts(cfg, preset)
    cfg, model, classes = make_classifier(cfg, preset, folder, train and train.classes)
    speed.place(model, device)
    if cfg.predict:
        return evaluate.predict(model, classes, cfg, folder / "predicted.csv", device)
    if cfg.eval_only:
        return score_test(model, evaluate.fit_classes(test, classes, cfg.init), cfg, folder, device)

    # Several augmentations of one decoded clip (repeated augmentation).
    how = (cfg.flip, cfg.operations, cfg.magnitude, cfg.smallest, cfg.erase)
    augment = finetune_transform(cfg.resolution, *how, cfg.augment == "official")
    rule = partial(SAMPLING[cfg.sampling][0], frames=cfg.frames, stride=cfg.stride)
    train, watched = draw_shots(train, cfg.shots, cfg.seed), test
    if cfg.hold_out:
        if not cfg.validate:
            raise ValueError("--hold-out is for --validate: add --validate 5, for example")
        train, watched = hold_out(train, cfg.hold_out, cfg.seed)
        Run.say(f"{len(watched.paths)} training videos are held out, for --validate")
    labelled = Videos(train, rule, augment, cfg.repeats, same_time=True)
    cfg = fit_to_set(preset, cfg, len(labelled))

    optimizer = make_optimizer(model, cfg)
    run = Run("finetune", name, cfg, model, optimizer, labelled, device, classes=classes)
    peak_lr, final_lr = cfg.base_lr * cfg.batch / 256, cfg.min_lr * cfg.batch / 256
    loader = make_loader(labelled, run.order, cfg.workers, device.type == "cuda")
    for step in run.steps():
        for clips, labels in run.passes(loader):
            # Mixing, drop path and dropout depend on the pass alone, not on the number of GPUs.
            torch.manual_seed(run.seed("finetune"))
            clips, targets = mix(clips, labels, len(classes), cfg)
            with run.autocast():
                logits = run.net(clips)
            loss = F.cross_entropy(logits.float(), targets, label_smoothing=cfg.smoothing)
            run.backward(loss)
        lr = engine.cosine_lr(step, run.total, run.warmup, peak_lr, final_lr)
        if run.update(lr):
            visualize.plot_log(folder)
        epoch, rest = divmod(step + 1, run.per_epoch)
        if cfg.validate and rest == 0 and epoch % cfg.validate == 0 and epoch < cfg.epochs:
            views = evaluate.WindowViews(watched.paths, replace(cfg, clips=1, crops=1))
            found, unreadable = evaluate.each_video(model, views, cfg, device)
            if not found:
                raise ValueError(f"no video can be read for --validate: {unreadable[0]}")
            labels = [watched.labels[i] for i in found]
            top1 = evaluate.accuracies(torch.stack([*found.values()]), labels)["top1"]
            run.log.write(step=step + 1, top1=top1, unreadable=len(unreadable))
            model.train()

    run.close()
    score_test(model, test, cfg, folder, device)


if __name__ == "__main__":
    engine.cli(main)
