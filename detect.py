"""Detect actions: fine-tune the pre-trained encoder on AVA v2.2 (section 4.3, Tables 5 and 12).

    python detect.py                                        # toy films, from runs/pretrain-toy
    python detect.py --init none --name scratch             # the same without pre-training
    python detect.py ava --data FILMS --splits ava_v2.2 --boxes BOXES.csv --init WEIGHTS --micro 4
    torchrun --nproc_per_node 8 detect.py ava-labels --data FILMS --splits ava_v2.2 --init WEIGHTS
    python detect.py ava --data FILMS --splits ava_v2.2 --boxes BOXES.csv --eval-only
    python detect.py ava --predict FILM.mp4 --boxes BOXES.csv       # boxes and actions, drawn

A person's box is given: the true one in training, a detector's in evaluation. What is learned is
who does what. WEIGHTS is what finetune.py takes, or its checkpoint. Leaves runs/NAME/ with
checkpoint.pt, log.jsonl, loss.png, results.json, predictions.csv (in AVA's format), classes.png, or
of --predict FILM.png and FILM.gif. The loss of a clip begins at 0.69 times its number of persons.
AVA: 26.7 mAP with ViT-B, 31.8 where K400's labels were used before (paper, Table 5).
"""

import json
from collections.abc import Iterable
from copy import copy
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.ops import roi_align
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as VF

import visualize
from data import TOY_FILMS, Videos, make_loader
from finetune import ModelConfig, TuneConfig, make_classifier, make_optimizer
from lib import ava, engine, evaluate, speed
from lib.engine import opt
from lib.run import Run, fit_to_set
from lib.toy import make_toy_films
from lib.video import identity, length, read_frames, shown
from lib.weights import grid_of, interpolate
from model import IMAGENET_MEAN, Classifier, Encoder


@dataclass
class Config(ModelConfig, TuneConfig):
    repeats = 1  # no flag: AVA's recipe has no repeated augmentation
    # data
    boxes: str | None = opt(None, f"detected boxes; None: {ava.BOXES} in --splits")
    threshold: float = opt(0.8, "smallest score of a detected box", 0, 1)
    begin: float = opt(0.0, "second of a movie at which its file begins", 0)
    actions: int = opt(80, "how many actions there are: their numbers begin at 1", 1)
    short_side: int | None = opt(None, "of a frame, in pixels; None: 8/7 of --resolution", 1)
    flip: bool = opt(True, "mirror half of the clips; not where left and right are actions")
    predict: str | None = opt(None, "a film: draw the two best actions of --boxes in it")


# Table 12 and Appendix B; the scripts agree. The columns are pre-training on K400 alone, and
# additional fine-tuning on K400's labels ("labels"). Warm-up and weight decay are those of
# finetune.py. Films of 15 minutes are cut as docs/data.md says. Toy and own are ours.
AVA = dict(begin=900, stride=4, short_side=256, drop_path=0.2, epochs=30, batch=128, base_lr=2.5e-4)
SMALL, LARGE = dict(AVA, size="small", layer_decay=0.6), dict(AVA, size="large")
HUGE = dict(AVA, size="huge", layer_decay=0.8, epochs=20)
PRESETS = {
    "toy": dict(data=TOY_FILMS, workers=0, actions=12, short_side=80, resolution=72, flip=False,
                drop_path=0.0, epochs=20, batch=8, base_lr=3.2e-2, min_lr=3.2e-4, warmup=2,
                layer_decay=1.0, save_minutes=1),
    "own": dict(drop_path=0.2, epochs=None, warmup=None, batch=16, base_lr=4e-3),
    "ava": dict(AVA, size="base"),
    "ava-small": dict(SMALL, base_lr=1e-3),
    "ava-large": dict(LARGE),
    "ava-huge": dict(HUGE, base_lr=5e-4),
    "ava-labels": dict(AVA, size="base", base_lr=5e-4),
    "ava-labels-small": dict(SMALL, base_lr=5e-4),
    "ava-labels-large": dict(LARGE, base_lr=5e-4, layer_decay=0.8, epochs=20),
    "ava-labels-huge": dict(HUGE, base_lr=5e-4),
}  # fmt: skip


class Detector(Classifier):
    """The encoder, and a head that looks at one box of its map of features (SlowFast's head).

    Arguments as of Classifier.
    """

    last_norm = "encoder.norm"

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        # Each token gets the last norm, as in pre-training (official code).
        self.encoder.norm = nn.LayerNorm(self.head.in_features, eps=1e-6)
        del self.fc_norm

    def forward(self, video: Tensor, boxes: Tensor) -> Tensor:
        """Video (B, T, C, H, W) and boxes (M, 5) -> logits (M, actions), float32.

        A box is (clip, x1, y1, x2, y2): its clip's place in the batch, then pixels. H and W may
        differ from those of training, if they divide into cubes.
        """
        encoder = self.encoder_for((video.shape[1], *video.shape[3:]))
        (_, h, w), (_, p1, p2) = encoder.grid, encoder.cube
        x = encoder(video).float()  # (B, N, D)
        x = rearrange(x, "b (t h w) d -> b d t h w", h=h, w=w).mean(dim=2)  # over time
        boxes = boxes / boxes.new_tensor([1, p2, p1, p2, p1])  # now in cubes
        # 7 x 7 values from inside of each box, interpolated between cubes. Aligned: the first
        # cube's centre is at 0.5, not at 0.
        x = roi_align(x, boxes, output_size=7, aligned=True)  # (M, D, 7, 7)
        return self.head(self.dropout(x.amax(dim=(2, 3)))).float()

    def encoder_for(self, video_size: tuple[int, int, int]) -> Encoder:
        """The encoder for clips (T, H, W): the same weights; positions are interpolated."""
        if video_size == self.encoder.video_size:
            return self.encoder
        other, grid = copy(self.encoder), grid_of(video_size, self.encoder.cube)
        table = interpolate(other.pos_embed, other.grid, grid)
        other._buffers = {**other._buffers, "pos_embed": table}  # not those of the encoder
        other.video_size, other.grid = video_size, grid
        return other


# ------------------------------------------------------------------------------------------- data


film_length = cache(length)  # once per film and process


def read_second(path: Path, second: int, cfg: Config) -> Tensor:
    """The clip (T, C, H, W) uint8 whose middle is a second of a movie, its ends repeated.

    ValueError where the file cannot be read, or has no such second.
    """
    total, rate = film_length(path)
    if not rate:
        raise ValueError(f"{shown(path)} does not say how many frames a second has")
    middle = int((second - cfg.begin) * rate + 1e-6)
    if second < cfg.begin or middle >= total:
        has = f"it has seconds {cfg.begin:g} (--begin) to {cfg.begin + total / rate:.1f}"
        raise ValueError(f"{shown(path)}: there is no second {second}, {has}")
    around = [middle + (i - cfg.frames // 2) * cfg.stride for i in range(cfg.frames)]
    return read_frames(path, lambda total: [min(max(i, 0), total - 1) for i in around])


def in_pixels(boxes: Iterable[ava.Box], frames: Tensor) -> tv_tensors.BoundingBoxes:
    """Boxes in shares of width and height -> boxes (M, 4) in pixels of the frames (T, C, H, W)."""
    height, width = frames.shape[-2:]
    boxes = torch.tensor([*boxes]) * torch.tensor([width, height, width, height])
    return tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width))


class Seconds(Videos):
    """Training clips, one for each annotated second, with its persons.

    An item is (clip (T, C, H, W) uint8, persons (M, 4 + actions) float, unreadable, as of Videos):
    box in pixels, then 1 for each action that the person does. Those outside of the crop are left
    out, perhaps all.
    """

    def __init__(self, data: ava.Annotations, cfg: Config):
        self.truth, self.cfg, self.frames = data.train, cfg, sorted(data.train)
        steps = [v2.Resize(cfg.short_side, antialias=True), v2.RandomCrop(cfg.resolution)]
        steps += [v2.RandomHorizontalFlip()] if cfg.flip else []
        paths = [data.films[video] for video, _ in self.frames]
        # By these, --resume knows the set. Sorted: lines of the tables may come in any order.
        labels = [
            (frame, sorted((box, sorted(does)) for box, does in data.train[frame].items()))
            for frame in self.frames
        ]
        super().__init__(SimpleNamespace(paths=paths, labels=labels), None, v2.Compose(steps))

    def read(self, index: int) -> Tensor:
        return read_second(self.split.paths[index], self.frames[index][1], self.cfg)

    def augment(self, index: int, frames: Tensor) -> tuple[Tensor, Tensor]:
        persons = self.truth[self.frames[index]]
        clip, boxes = self.transform(tv_tensors.Video(frames), in_pixels(persons, frames))
        boxes = boxes.as_subclass(Tensor)  # RandomCrop has cut them at its edges
        numbers = range(1, self.cfg.actions + 1)
        does = torch.tensor([[i in actions for i in numbers] for actions in persons.values()])
        inside = (boxes[:, 2:] - boxes[:, :2] >= 1).all(dim=1)  # a pixel, at least
        return clip.as_subclass(Tensor), torch.cat([boxes, does], dim=1)[inside]


def collate(items: list) -> tuple[Tensor, Tensor, dict[int, str]]:
    """Items of Seconds -> (clips (B, T, C, H, W), persons (M, 5 + actions), unreadable).

    A person's row begins with the place of its clip in the batch.
    """
    clips, persons, parts = zip(*items, strict=True)
    unreadable = {index: error for part in parts for index, error in part.items()}
    rows = [F.pad(rows, (1, 0), value=i) for i, rows in enumerate(persons)]
    return torch.stack(clips), torch.cat(rows), unreadable


class WholeFrames(Dataset):
    """Item i: (clip (1, T, C, H, W) uint8, detected boxes (M, 5)) of frame i, or what is wrong.

    The whole frame, with the mean colour to its right and below, up to a multiple of a cube.
    """

    def __init__(self, found: dict, films: dict[str, Path], cfg: Config):
        self.found, self.films, self.cfg, self.frames = found, films, cfg, sorted(found)
        stamps = {video: identity(films[video]) for video, _ in self.frames}
        how = (cfg.begin, cfg.short_side)
        self.keys = [f"{stamps[f[0]]} {f[1]} {[*found[f]]} {how}" for f in self.frames]

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor] | str:
        video, second = frame = self.frames[index]
        try:
            frames = read_second(self.films[video], second, self.cfg)
        except ValueError as error:
            return str(error)
        resize = v2.Resize(self.cfg.short_side, antialias=True)
        clip, boxes = resize(tv_tensors.Video(frames), in_pixels(self.found[frame], frames))
        room = [-side % edge for side, edge in zip(clip.shape[-2:], self.cfg.cube[1:], strict=True)]
        mean = [255 * colour for colour in IMAGENET_MEAN]  # 0 after normalisation
        clip = VF.pad(clip.as_subclass(Tensor), [0, 0, room[1], room[0]], fill=mean)
        return clip[None], F.pad(boxes.as_subclass(Tensor), (1, 0))


# ------------------------------------------------------------------------------------- evaluation


def score_frames(model: Detector, views: WholeFrames, cfg: Config, device, path=None):
    """({frame: (boxes (M, 4), scores (M, actions)) as arrays}, {index: error}), see each_video.

    A score is the action's probability times the score of the box (official code).
    """
    scores, errors = evaluate.each_video(model, views, cfg, device, path, torch.sigmoid)
    found = {}
    for index, score in scores.items():
        boxes = views.found[views.frames[index]]
        scale = np.array([*boxes.values()])[:, None]
        found[views.frames[index]] = np.array([*boxes]), score.numpy() * scale
    return found, errors


def score_test(model: Detector, data: ava.Annotations, cfg: Config, folder: Path, device) -> None:
    """AVA's metric on the test part. Leaves predictions.csv, classes.png and results.json."""
    path, views = folder / "scores.pt", WholeFrames(data.found, data.films, cfg)
    found, errors = score_frames(model, views, cfg, device, path)
    evaluate.none_wrong(errors, "then --eval-only")
    if engine.rank() > 0:
        return
    columns = [number - 1 for number in data.names]
    found = {frame: (boxes, scores[:, columns]) for frame, (boxes, scores) in found.items()}
    each = ava.average_precisions(found, data.test, [*data.names])
    each = {data.names[i]: 100 * ap for i, ap in each.items() if not np.isnan(ap)}
    if not each:
        raise ValueError("no person of the test part does an action that is evaluated")
    mean = sum(each.values()) / len(each)
    rows = (
        [video, f"{second:04}", *(f"{side:.3f}" for side in box), action, f"{score:.6f}"]
        for (video, second), (boxes, scores) in found.items()
        for box, values in zip(boxes, scores, strict=True)
        for action, score in zip(data.names, values, strict=True)
    )
    evaluate.write_csv(folder / "predictions.csv", rows)
    bars = [(name, ap, f"{ap:.1f}") for name, ap in each.items()]
    title = f"mAP {mean:.2f} % over {len(each)} actions"
    visualize.draw_bars(bars, title, "average precision, %", folder / "classes.png")
    frames, empty = found.keys() | data.test.keys(), data.test.keys() - found.keys()
    boxes = sum(map(len, data.found.values()))
    result = dict(mAP=mean, actions=each, frames=len(frames), empty=len(empty), boxes=boxes)
    result["config"] = asdict(cfg)
    engine.write_whole(folder / "results.json", json.dumps(result, indent=1) + "\n")
    for file in evaluate.kept_files(path):
        file.unlink(missing_ok=True)
    print(f"{boxes} boxes in {len(frames)} frames, {len(empty)} of them without a box: {title}")


def predict(model: Detector, classes: list[str], cfg: Config, folder: Path, device) -> None:
    """Draw --boxes of the film --predict with their two best actions: FILM.png and FILM.gif."""
    film = Path(cfg.predict).expanduser()
    if not cfg.boxes:
        raise ValueError("--predict needs --boxes, as of a person detector: see docs/data.md")
    found = ava.read_boxes(Path(cfg.boxes).expanduser(), cfg.threshold)
    found = {frame: boxes for frame, boxes in found.items() if frame[0] == film.stem}
    if not found:
        least = f"of score {cfg.threshold:g} or more (--threshold)"
        raise ValueError(f"{cfg.boxes} has no boxes of {film.stem} {least}")
    views, pictures = WholeFrames(found, {film.stem: film}, cfg), []
    found, errors = score_frames(model, views, cfg, device)
    if engine.rank() > 0:
        return
    for (_, second), (boxes, scores) in found.items():
        image = read_second(film, second, replace(cfg, frames=1))[0]
        texts = [
            "\n".join(f"{classes[i]} {row[i]:.0%}" for i in (-row).argsort()[:2]) for row in scores
        ]
        pictures.append((f"second {second}", image, boxes, texts))
    if pictures:
        folder.mkdir(parents=True, exist_ok=True)
        visualize.draw_boxes(pictures, folder / film.stem)
        print(f"wrote {folder / film.stem}.png and .gif: {len(pictures)} seconds")
    evaluate.name_wrong([*errors.values()])


def main(argv: list[str]) -> None:
    preset, cfg = engine.parse_config(Config, argv, __doc__, PRESETS)
    run_name, device = cfg.name or f"detect-{preset}", engine.setup(cfg.device)
    folder = Path("runs", run_name)
    if cfg.data == TOY_FILMS and not cfg.predict:
        engine.in_first_process(make_toy_films, TOY_FILMS)
    data = None if cfg.predict else ava.read(cfg)

    # The encoder of the weights, and a new head; to evaluate or predict, a trained one.
    cfg, detector, classes = make_classifier(cfg, preset, folder, data and data.classes, Detector)
    cfg = replace(cfg, short_side=cfg.short_side or round(cfg.resolution * 8 / 7))
    speed.place(detector, device)
    if data and len(classes) != cfg.actions:
        raise ValueError(f"{cfg.init} knows {len(classes)} actions: --actions {len(classes)}")
    for number, name in data.names.items() if data and cfg.eval_only else ():
        if classes[number - 1] not in (name, f"action {number}"):
            other = f"{cfg.init} knows action {number} as {classes[number - 1]}"
            raise ValueError(f"{other}, the label map as {name}: take that of its training")
    if cfg.predict or cfg.eval_only:
        work, about = (predict, classes) if cfg.predict else (score_test, data)
        return work(detector, about, cfg, folder, device)

    if cfg.resolution > cfg.short_side:
        raise ValueError(f"--short-side {cfg.short_side} is below --resolution {cfg.resolution}")
    seconds = Seconds(data, cfg)
    cfg = fit_to_set(preset, cfg, len(seconds))
    count = sum(map(len, data.train.values()))
    Run.say(
        f"a video is an annotated second here: {len(seconds)} of them, with {count} persons; "
        f"files begin at second {cfg.begin:g} (--begin)"
    )
    optimizer = make_optimizer(detector, cfg)
    run = Run("detect", run_name, cfg, detector, optimizer, seconds, device, classes=classes)
    ends = cfg.base_lr * cfg.batch / 256, cfg.min_lr * cfg.batch / 256
    batches = make_loader(seconds, run.order, cfg.workers, device.type == "cuda", collate)
    for step in run.steps():
        for clips, persons in run.passes(batches):
            # Drop path and dropout depend on the pass alone, not on the number of GPUs.
            torch.manual_seed(run.seed("detect"))
            boxes, does = persons.split([5, cfg.actions], dim=1)
            with run.autocast():
                logits = run.net(clips, boxes)
            # A person may do several things: a yes or no for each action. The sum over persons
            # makes each count the same, whatever its clip and pass.
            entropy = F.binary_cross_entropy_with_logits(logits, does, reduction="sum")
            run.backward(entropy / (cfg.actions * len(clips)))
        if run.update(engine.cosine_lr(step, run.total, run.warmup, *ends)):
            visualize.plot_log(run.folder)
    run.close()
    score_test(detector, data, cfg, folder, device)


if __name__ == "__main__":
    engine.cli(main)
