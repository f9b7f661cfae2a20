"""Reconstruction figures in the paper's layout (Figures 10 and 11), animations, loss curves, classes, experiments.

    python visualize.py --checkpoint runs/pretrain-toy/checkpoint.pt                     # toy videos
    python visualize.py --checkpoint CKPT --videos a.avi b.mp4 --ratios 0.75 0.9 0.95 --out figure.png --gif figure.gif
    python visualize.py --checkpoint CKPT --videos a.avi --mask random --stats oracle
    python visualize.py --compare A.csv B.csv --out figure.png        # two predictions.csv: which classes gain and lose

Time runs down; for each clip the original and, for every ratio, what the model saw and what it made of it (visible
cubes pasted in). Prints PSNR over the masked pixels beside two baselines that need no model. FIGURE-psnr.json beside
it holds that too, and apart for the third of the places that changes least in time and the third that changes most.

A model trained on normalised cubes predicts each cube only up to its mean and contrast. --stats visible, the default,
takes these from the visible cubes around, so that nothing hidden is used. --stats oracle takes the hidden cubes' own,
as the official code does; the figure then says so and shows what an empty prediction and an untrained model look like
with that help. --stats both draws the two beside each other.
"""

import csv
import gc
import json
import math
import multiprocessing
import os
import platform
import re
import signal
import textwrap
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from tqdm import tqdm

import engine
from data import center_clip, derive_seed, eval_transform, read_frames, read_split, shown
from engine import opt
from masking import MASKS
from model import VideoMAE, normalize_cubes, patchify, precision_dtype, unit_range, unpatchify


@dataclass
class Config:
    checkpoint: str = opt("runs/pretrain-toy/checkpoint.pt", "a checkpoint of pretrain.py")
    videos: tuple[str, ...] | None = opt(None, "video files, all drawn; None: test videos of the data trained on")
    scored: int = opt(24, "test videos over which PSNR is averaged; the first two are drawn", 1)
    ratios: tuple[float, ...] = opt((0.75, 0.9, 0.95), "mask ratios, one pair of columns each")
    mask: Literal[tuple(MASKS)] = opt("tube", "masking strategy")
    stats: Literal["visible", "oracle", "both"] = opt("visible", "where mean and contrast of a hidden cube come from")
    stride: int | None = opt(None, "frames from one frame of a clip to the next; None: as in pre-training", 1)
    out: str | None = opt(None, "PNG to write; None: reconstruction.png or comparison.png beside the input")
    gif: str | None = opt(None, "also write an animation to this GIF")
    seed: int = opt(0, "seed of the masks", 0)
    compare: tuple[str, ...] | None = opt(None, "A.csv B.csv: instead, compare the predictions of two models by class")


def load_model(path: str) -> tuple[VideoMAE, dict]:
    """The model of a pre-training checkpoint, in eval mode, and the stage's configuration."""
    state = engine.load_checkpoint(path, "pretrain")
    model = VideoMAE(**state["config"]["model"])
    model.load_state_dict(state["model"])
    return model.eval(), state["config"]["stage"]


def load_clip(path: str, model: VideoMAE, stride: int) -> Tensor:
    """The clip in the middle of a video, short side resized, central square: (1, T, C, H, W) uint8."""
    frames, size, _ = model.encoder.video_size
    if model.target == "double":
        frames, stride = 2 * frames, max(stride // 2, 1)
    clip = read_frames(path, lambda total: center_clip(total, frames, stride))
    return eval_transform(size)(tv_tensors.Video(clip)).as_subclass(Tensor)[None]


def visible_neighbours(mask: Tensor, grid) -> tuple[Tensor, Tensor]:
    """Squared distances, in cubes, from every token to every visible token: (N, V), and the visible indices (V,)."""
    t, h, w = grid
    place = torch.stack(torch.meshgrid(*(torch.arange(n) for n in (t, h, w)), indexing="ij"), -1).view(-1, 3).float()
    visible = (~mask).nonzero()[:, 0]
    return torch.cdist(place, place[visible]).square(), visible


@torch.no_grad()
def reconstruct(model: VideoMAE, video: Tensor, mask: Tensor, stats: str = "visible") -> dict[str, Tensor]:
    """What the model makes of one clip (1, T, C, H, W) uint8 under a mask (1, N): videos (1, T', C, H, W) float 0-1.

    original  what it should be; T' is the encoder's T, or 1 for target "center"
    masked    hidden cubes grey
    model     predictions in the hidden cubes, the visible ones as they are; likewise in the baselines:
    nearest   each hidden cube copied from the nearest visible one
    mean      the visible cubes' mean colour
    nothing   only of models of normalised cubes: a prediction of zero, with the same `stats` as the model's
    hidden    bool, True on masked pixels
    """
    _, pred = model(video, mask)
    original, grid, cube, hidden = unit_range(model.target_video(video)), model.encoder.grid, model.target_cube, mask[0]
    if model.target == "center":
        grid, hidden = (1, *grid[1:]), hidden[: grid[1] * grid[2]]  # tube masks: every slot alike
    if model.target == "double":  # keep the frames that the encoder sees, so that visible means visible
        original, cube = original[:, ::2], model.encoder.cube
        pred = pred.unflatten(2, (2 * cube[0], -1))[:, :, ::2].flatten(2)
    cubes = patchify(original, cube)
    distance, visible = visible_neighbours(hidden, grid)

    def paste(values: Tensor) -> Tensor:
        filled = cubes.clone()
        filled[:, hidden] = values
        return unpatchify(filled, grid, cube).clamp(0, 1)

    colour = cubes[:, visible].unflatten(2, (-1, 3)).mean(dim=(1, 2)).repeat(1, cubes.shape[2] // 3)
    out = dict(
        original=original,
        masked=paste(torch.full_like(cubes[:, hidden], 0.5)),
        nearest=paste(cubes[:, visible[distance[hidden].argmin(dim=1)]]),
        mean=paste(colour[:, None].expand_as(cubes[:, hidden])),
        hidden=unpatchify(hidden[None, :, None].expand_as(cubes), grid, cube),
    )
    if not model.normalize:
        return dict(out, model=paste(pred.float()))
    _, mean, std = normalize_cubes(cubes)
    if stats == "visible":  # those of the visible cubes, weighted by 1/distance^4 (of ^2, 4, 6, 8 the best; ours)
        weight = 1 / distance.clamp(min=1).square()
        weight = weight / weight.sum(dim=1, keepdim=True)
        mean, std = (torch.einsum("nv,bvpc->bnpc", weight, s[:, visible]) for s in (mean, std))
    denormalize = lambda y: (y.unflatten(2, (-1, 3)) * std[:, hidden] + mean[:, hidden]).flatten(2)
    return dict(out, model=paste(denormalize(pred.float())), nothing=paste(denormalize(torch.zeros_like(pred.float()))))


def psnr(result: dict[str, Tensor], key: str, where: Tensor | None = None) -> float:
    """Peak signal-to-noise ratio of one of reconstruct's videos over the masked pixels, in dB; of those in `where`, a
    bool mask of pixels like result["hidden"], if given."""
    hidden = result["hidden"] if where is None else result["hidden"] & where
    return float(-10 * torch.log10((result[key] - result["original"])[hidden].square().mean().clamp(min=1e-10)))


SCORED = ("model", "nearest", "mean", "nothing", "untrained")  # of reconstruct's videos, and that of an untrained model


def still_and_moving(video: Tensor, cube) -> dict[str, Tensor]:
    """Bool masks of the pixels of a clip (1, T, C, H, W) float: the third of the places, a cube wide and high, whose
    pixels vary least in time ("still"), and the third whose pixels vary most ("moving"). Nothing of a single frame."""
    _, frames, colours, height, width = video.shape
    if frames == 1:
        return {}
    grid = (1, height // cube[1], width // cube[2])
    variance = patchify(video.var(dim=1, correction=0, keepdim=True), (1, *cube[1:])).mean(dim=2)  # (1, places)
    order, third = variance[0].argsort(), max(variance.shape[1] // 3, 1)
    out = {}
    for name, places in (("still", order[:third]), ("moving", order[-third:])):
        chosen = torch.zeros(1, variance.shape[1], cube[1] * cube[2] * colours, dtype=torch.bool)
        chosen[:, places] = True
        out[name] = unpatchify(chosen, grid, (1, *cube[1:])).expand(1, frames, -1, -1, -1)
    return out


def make_figure(model, fresh, clips: list[Tensor], drawn: int, cfg: Config, out: Path) -> None:
    """Draw the first clips (1, T, C, H, W) to `out`; print and write (.json) each ratio's mean PSNR over all clips.

    `fresh` is the same model untrained, which stands beside every use of oracle statistics (None where there is none).
    """
    columns, scores = [], {}
    for number, clip in enumerate(clips):
        for ratio in cfg.ratios:
            generator = torch.Generator().manual_seed(derive_seed(4, cfg.seed, number))
            mask = MASKS[cfg.mask](1, model.encoder.grid, ratio, generator)
            quality = scores.setdefault(f"{100 * ratio:.4g}%", {})
            for stats in ("visible", "oracle") if cfg.stats == "both" else (cfg.stats,):
                result = reconstruct(model, clip, mask, stats)
                drawings = [("model", "reconstruction")]
                if cfg.stats != "visible":
                    result["untrained"] = reconstruct(fresh, clip, mask, stats)["model"]
                    drawings.append(("untrained", "untrained model"))
                if stats == "oracle":
                    drawings.insert(1, ("nothing", "predict nothing"))
                of = "oracle " if stats == "oracle" and cfg.stats == "both" else ""
                keys = [key for key in SCORED if key in result and not (of and key in ("nearest", "mean"))]
                found = {key: psnr(result, key) for key in keys}
                for part, where in still_and_moving(result["original"], model.target_cube).items():
                    if (where & result["hidden"]).any():
                        found |= {f"{key} {part}": psnr(result, key, where) for key in keys}
                for name, value in found.items():
                    quality.setdefault(of + name, []).append(value)
                if number >= drawn:
                    continue
                if ratio == cfg.ratios[0] and not of:
                    columns.append(("original", "", result["original"]))
                if not of:
                    count = f"{int((~mask).sum())} of {mask.numel()} cubes"
                    columns.append((f"{100 * ratio:.4g}% masked", count, result["masked"]))
                for key, title in drawings:
                    where = "oracle statistics" if stats == "oracle" else "visible statistics" * (cfg.stats == "both")
                    note = f"{where}, {found[key]:.1f} dB" if where else f"{found[key]:.1f} dB"
                    columns.append((title, note, result[key]))
    times = columns[0][2].shape[1]
    images = [(title, note, video[0].permute(0, 2, 3, 1).numpy()) for title, note, video in columns]
    save_columns(images, range(0, times, max(times // 8, 1)), out)
    if cfg.gif:
        stills = [save_columns(images, [t], None) for t in range(times)]
        stills[0].save(cfg.gif, save_all=True, append_images=stills[1:], duration=150, loop=0)
    scores = {ratio: {name: sum(v) / len(v) for name, v in row.items()} for ratio, row in scores.items()}
    print(f"PSNR on masked pixels, mean over {len(clips)} clips, {cfg.mask} masks:")
    for ratio, row in scores.items():
        parts = {name: value for name, value in row.items() if name.endswith((" still", " moving"))}
        print(f"  {ratio} masked: " + ", ".join(f"{name} {row[name]:.2f} dB" for name in row if name not in parts))
        parts = [f"{name} {parts[f'model {name}']:.2f} dB" for name in ("still", "moving") if f"model {name}" in parts]
        if parts:
            print("    the model, on the third of the places that changes least, and most: " + ", ".join(parts))
    about = dict(clips=len(clips), mask=cfg.mask, stats=cfg.stats, checkpoint=cfg.checkpoint, psnr=scores)
    out.with_name(f"{out.stem}-psnr.json").write_text(json.dumps(about, indent=1) + "\n")


def save_columns(images, rows, out: Path | None) -> Image.Image:
    """Draw (title, note, frames (T, H, W, C)) columns, the given frames below each other; save to `out` if given."""
    size = 1.1
    figure, axes = plt.subplots(1, len(images), figsize=(size * len(images), size * len(rows) + 0.5), squeeze=False)
    for axis, (title, note, frames) in zip(axes[0], images, strict=True):
        axis.imshow(np.concatenate([np.pad(frames[t], ((1, 1), (1, 1), (0, 0)), constant_values=1) for t in rows]))
        axis.set_title(f"{title}\n{note}", fontsize=6)
        axis.axis("off")
    figure.subplots_adjust(left=0.002, right=0.998, bottom=0.002, top=1 - 0.45 / (size * len(rows) + 0.5), wspace=0.03)
    figure.canvas.draw()
    image = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())[..., :3].copy())
    if out:
        figure.savefig(out, dpi=200)
    plt.close(figure)
    return image


def write_whole(path: Path, text: str) -> None:
    """Write a file that others see whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)


class Log:
    """log.jsonl and a progress bar, on rank 0. A resumed run drops the lines that its checkpoint does not cover."""

    def __init__(self, path: Path, start: int, total: int, on: bool):
        self.path, self.on, self.bar = path, on, tqdm(initial=start, total=total, unit="step", disable=not on)
        self.step, self.time, self.waited = start, time.time(), 0.0  # of the last line; seconds without data since
        self.lines, self.seconds, self.without, self.workers = 0, 0.0, 0.0, 0  # sums over all lines; loader processes
        if on:
            path.parent.mkdir(parents=True, exist_ok=True)
            old = path.read_text().splitlines() if start and path.exists() else []
            write_whole(path, "".join(line + "\n" for line in old if self.covers(line, start)))

    @staticmethod
    def covers(line: str, start: int) -> bool:
        """Whether a line is whole and of step `start` at the latest; that without a step is the first one."""
        try:
            return json.loads(line).get("step", 0) <= start
        except ValueError:
            return False

    def write(self, **values) -> None:
        """Append one JSON line of what is not None; one with a step also moves the bar."""
        if self.on:
            with open(self.path, "a") as file:
                file.write(json.dumps({key: value for key, value in values.items() if value is not None}) + "\n")
            self.bar.update(values.get("step", self.bar.n) - self.bar.n)
            self.bar.set_postfix({k: f"{v:.3g}" for k, v in values.items() if k != "step" and isinstance(v, float)})

    def report(self, progress: dict, done: int, epoch: float, lr: float, clips: int) -> None:
        """The line of the steps since the last one, of `clips` clips each; `progress` begins to sum anew."""
        seconds, taken = time.time() - self.time, progress["taken"]
        self.write(
            step=done, epoch=epoch, loss=progress["loss"] / taken if taken else None, lr=lr,
            unreadable=len(progress["unreadable"]), skipped=len(progress["skipped"]),
            clips_per_s=(done - self.step) * clips / seconds, waiting_for_data=self.waited / seconds,
        )  # fmt: skip
        early = self.seconds < 60 and self.lines < 20
        self.lines, self.seconds, self.without = self.lines + 1, self.seconds + seconds, self.without + self.waited
        self.workers = max(self.workers, len(multiprocessing.active_children()))  # they end before the last line
        if self.on and early and (self.seconds >= 60 or self.lines == 20):
            tqdm.write(self.bottleneck())
        self.step, self.time, self.waited = done, time.time(), 0.0
        progress["loss"], progress["taken"] = 0.0, 0

    def bottleneck(self) -> str:
        """One line: whether videos or computing take the time, by the lines so far, and what would change that."""
        share, cores = self.without / max(self.seconds, 1e-9), os.cpu_count()
        if share < 0.05:
            return f"compute-bound: {share:.0%} of the time was spent waiting for videos"
        more = f"raise --workers (now {self.workers}, of {cores} cores)"
        if not self.workers:
            more = f"reading counts as waiting with --workers 0: raise it if any of the {cores} cores is free"
        cheaper = "or rewrite the videos once with `python data.py prepare`"
        return f"data: {share:.0%} of the time was spent waiting for videos; {more}, {cheaper}"

    def close(self, progress: dict, stop: int, done: int) -> None:
        """Say what was left out, what took the time, and which signal stopped the run after step `done` (0: none)."""
        self.bar.close()
        if self.on and self.lines:
            print(self.bottleneck())
        if self.on:
            for error in progress["unreadable"].values():
                print(f"left out, unreadable: {error}")
            print(f"{len(progress['unreadable'])} unreadable videos, {len(progress['skipped'])} steps without gradient")
        if self.on and stop:
            name = signal.Signals(stop).name
            print(f"stopped by {name} after step {done} of {self.bar.total}; the same command with --resume goes on")


def plot_log(log: Path, out: Path) -> None:
    """Loss and learning rate against the step, from a log.jsonl; below, where lines hold it, top1 (%, validation)."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    scores = [line for line in lines if "top1" in line]
    panels = 2 if scores else 1
    figure = Figure(figsize=(6, 3.5 * panels))
    axes = figure.subplots(panels, 1, sharex=True, squeeze=False)
    axis, rate = axes[0, 0], axes[0, 0].twinx()
    for target, key, style in (
        (axis, "loss", dict(label="training loss")),
        (rate, "lr", dict(color="tab:orange", linewidth=0.7)),
    ):
        points = [line for line in lines if key in line]
        target.plot([p["step"] for p in points], [p[key] for p in points], **style)
    for line in lines:
        if "predict_nothing" in line:
            axis.axhline(line["predict_nothing"], color="grey", linestyle=":", label="predict nothing")
    axis.set(ylabel="loss", yscale="log")
    rate.set_ylabel("learning rate", color="tab:orange")
    axis.legend()
    if scores:
        axes[1, 0].plot([p["step"] for p in scores], [p["top1"] for p in scores], marker=".", color="tab:green")
        axes[1, 0].set_ylabel("validation top-1, %")
    axes[-1, 0].set_xlabel("step")
    figure.tight_layout()
    figure.savefig(out, dpi=120)
    del figure, axes, axis, rate, target
    gc.collect()  # figures refer to themselves; a long run draws thousands, and its memory grew by MBs with each


PREDICTIONS = ("path", "label", "prediction", "correct", "top5", "probabilities")  # the columns of predictions.csv


FORMULA = tuple("=+-@\t\r\n'")  # how a cell begins that a spreadsheet would compute, and our sign that it is none


def to_cell(text: str) -> str:
    """Text as it stands in a table: behind ' where a spreadsheet would take it for a formula."""
    return "'" + text if text.startswith(FORMULA) else text


def from_cell(cell: str) -> str:
    """The text of to_cell's cell."""
    return cell.removeprefix("'")


def join_names(names: list[str]) -> str:
    """Names as one cell, each as to_cell has it, with ; between them; in a name, ; is \\: and \\ is \\\\."""
    return ";".join(to_cell(name).replace("\\", r"\\").replace(";", r"\:") for name in names)


def split_names(cell: str) -> list[str]:
    """The names in join_names' cell."""
    names = re.findall(r"(?:^|;)((?:\\.|[^\\;])*)", cell, re.DOTALL)
    plain = lambda match: ";" if match[1] == ":" else match[1]
    return [from_cell(re.sub(r"\\(.)", plain, name, flags=re.DOTALL)) for name in names]


def read_predictions(path: str | Path) -> list[dict]:
    """The rows of a predictions.csv, one a test video: path, label and prediction (class names) as text, correct, which
    is label == prediction, and as lists top5 (class names, best first) and their probabilities (floats, 0 to 1).

    Names are what they were before they were written: see to_cell, join_names; bytes that are no UTF-8 stay as Python
    has them in paths. Raises ValueError, with the file, where it is missing or no such table, or names a video twice.
    """
    if not Path(path).is_file():
        raise ValueError(f"no file {path}")
    try:
        with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
            table = list(csv.DictReader(file, strict=True))
    except (csv.Error, OSError) as error:
        raise ValueError(f"{path} is not a CSV file ({error})") from error
    if not table or not set(PREDICTIONS) <= set(table[0]):
        raise ValueError(f"{path} must hold the columns {', '.join(PREDICTIONS)} and at least one video")
    rows = []
    for number, row in enumerate(table, 1):
        try:
            row |= {key: from_cell(row[key]) for key in ("path", "label", "prediction")}
            probabilities, top5 = [float(p) for p in row["probabilities"].split(";")], split_names(row["top5"])
        except (ValueError, AttributeError, TypeError):  # a word that is no number; a row that ends early
            probabilities, top5 = [], None
        if top5 is None or len(probabilities) != len(top5):
            raise ValueError(f"{path}: row {number}, {row['path']!r}: top5 and probabilities must be lists joined by ;")
        correct = row["label"] == row["prediction"]
        rows.append(dict(row, correct=correct, top5=top5, probabilities=probabilities))
    name, times = Counter(row["path"] for row in rows).most_common(1)[0]
    if times > 1:
        raise ValueError(f"{path} holds {name!r} {times} times")
    return rows


def class_accuracy(rows: list[dict]) -> dict[str, tuple[float, int]]:
    """Of read_predictions' rows: {class: (top-1 accuracy in %, number of videos)}."""
    videos, hits = Counter(row["label"] for row in rows), Counter(row["label"] for row in rows if row["correct"])
    return {name: (100 * hits[name] / number, number) for name, number in videos.items()}


def _bars(axis, bars: list[tuple[str, float, str]], color: str) -> None:
    """Horizontal bars (class, length, note behind it), the first one on top."""
    drawn = axis.barh(range(len(bars)), [length for _, length, _ in bars], color=color)
    axis.bar_label(drawn, [note for *_, note in bars], fontsize=5, padding=2, parse_math=False)
    labels = [shown(" ".join(name.split())) for name, *_ in bars]
    axis.set_yticks(range(len(bars)), labels, fontsize=6, parse_math=False)  # a $ in a name is a $
    axis.set_ylim(max(len(bars), 1) - 0.5, -0.5)
    axis.tick_params(axis="x", labelsize=6)


def plot_classes(predictions_csv: str | Path, out_png: str | Path) -> None:
    """Bar chart of each class's top-1 accuracy in %, best first; ValueError where read_predictions raises it."""
    rows = read_predictions(predictions_csv)
    scores = sorted(class_accuracy(rows).items(), key=lambda item: (-item[1][0], item[0]))
    columns = math.ceil(len(scores) / 60)
    length = math.ceil(len(scores) / columns)
    width = 2.5 + 0.045 * max(len(name) for name, _ in scores)  # inches: the bars, and a name in 6-point letters
    size = (columns * width, 0.13 * length + 1)
    figure, axes = plt.subplots(1, columns, figsize=size, squeeze=False, layout="constrained")
    for i, axis in enumerate(axes[0]):
        part = scores[i * length : (i + 1) * length]
        _bars(axis, [(name, score, f"{score:.0f} % of {number}") for name, (score, number) in part], "tab:blue")
        axis.set_xlim(0, 125)
        axis.set_xticks(range(0, 101, 25))
    total, mean = 100 * sum(row["correct"] for row in rows) / len(rows), np.mean([score for _, (score, _) in scores])
    title = f"top-1 {total:.2f} % of {len(rows)} videos\nmean of {len(scores)} classes {mean:.2f} %"
    figure.suptitle(title, fontsize=8)
    figure.savefig(out_png, dpi=150)
    plt.close(figure)


def compare(path_a: str | Path, path_b: str | Path, out: str | Path, most: int = 20) -> None:
    """Draw to `out`, and print, the classes where one model's top-1 accuracy beats the other's by most, each way.

    Both are predictions.csv files; ValueError where they do not cover the same videos with the same labels.
    """
    rows = [read_predictions(path) for path in (path_a, path_b)]
    labels_a, labels_b = ({row["path"]: row["label"] for row in part} for part in rows)
    alone = sorted(labels_a.keys() ^ labels_b.keys())
    if alone:
        one = f"{len(alone)} are in one only, like {alone[0]!r}"
        raise ValueError(f"{path_a} and {path_b} cover different videos: {one}")
    other = sorted(name for name in labels_a if labels_a[name] != labels_b[name])
    if other:
        both = f"{labels_a[other[0]]!r} and {labels_b[other[0]]!r}"
        raise ValueError(f"{path_a} and {path_b} label {len(other)} videos differently: {other[0]!r} is {both}")
    a, b = map(class_accuracy, rows)
    for path, part in zip((path_a, path_b), rows, strict=True):
        print(f"{100 * sum(row['correct'] for row in part) / len(part):.2f} % of {len(part)} videos: {shown(path)}")
    names = sorted(a, key=lambda name: (-abs(a[name][0] - b[name][0]), name))
    sides = []
    for better, worse, path in ((a, b, path_a), (b, a, path_b)):
        gains = [(name, better[name][0] - worse[name][0]) for name in names if better[name][0] > worse[name][0]]
        print(f"{len(gains)} of {len(a)} classes are better in {shown(path)}" + (", by most:" if gains else ""))
        notes = [f"{better[name][0]:.0f} %, not {worse[name][0]:.0f} %, of {a[name][1]}" for name, _ in gains[:most]]
        sides.append([(name, gain, note) for (name, gain), note in zip(gains, notes, strict=False)])
        for name, gain, note in sides[-1]:
            print(f"  {gain:+6.1f} points  {shown(name)}  ({note})")
    longest = max(map(len, names))
    size = (2 * (2.5 + 0.045 * longest), 0.13 * max(map(len, sides)) + 1)
    figure, axes = plt.subplots(1, 2, figsize=size, sharex=True, layout="constrained")
    for axis, side, path, color in zip(axes, sides, (path_a, path_b), ("tab:blue", "tab:red"), strict=True):
        _bars(axis, side, color)
        axis.set_title(textwrap.fill(f"better in {shown(path)}", 36), fontsize=7, parse_math=False)
        axis.set_xlabel("difference in top-1, points", fontsize=6)
    axes[0].set_xlim(0, 1.6 * max((gain for side in sides for _, gain, _ in side), default=1))
    figure.savefig(out, dpi=150)
    plt.close(figure)


def spread(values: list[float], sign: str = "") -> str:
    """Mean, sample standard deviation, and each value."""
    deviation = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{np.mean(values):{sign}.1f}{deviation} ({', '.join(f'{value:{sign}.1f}' for value in values)})"


STUDENT = (math.inf, 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)  # t, 97.5 %, by degrees of freedom


def verdict(gaps: list[float], theirs: bool = True) -> str:
    """Whether the mean gap is above zero: "agrees" (with the paper; "holds", if that says nothing) or "disagrees" where
    zero lies outside of its 95 % interval (Student's t), else what it leans to, and how many seeds of the same mean and
    spread would put zero outside."""
    count, mean = len(gaps), float(np.mean(gaps))
    deviation = float(np.std(gaps, ddof=1)) if count > 1 else math.inf
    t = lambda n: STUDENT[n - 1] if n <= len(STUDENT) else 1.96 + 2.8 / (n - 1)
    settles = lambda n: t(n) * deviation / math.sqrt(n) < abs(mean)
    words = ("agrees", "leans to agree", "**disagrees**", "leans to **disagree**")
    words = words if theirs else ("holds", "leans to hold", "does **not** hold", "leans **not** to hold")
    if mean == 0:
        return "open"
    settled, leans = words[:2] if mean > 0 else words[2:]
    if settles(count):
        return settled
    if count == 1:
        return leans
    return f"{leans} ({next((n for n in range(count + 1, 1000) if settles(n)), '1,000 or more')} seeds)"


OURS = "not theirs"  # instead of a gap: the paper does not make the claim
MINUTES = "minutes of one core"  # an axis of plot_results: what a row's runs took


def mean_minutes(row: dict) -> float | None:
    """What a row took, the mean of the seeds of which it is known."""
    known = [minutes for minutes in row["minutes"] if minutes is not None]
    return float(np.mean(known)) if known else None


def plot_results(found: dict, out: str | Path) -> None:
    """Draw an experiment's rows: bars, or with an axis curves; dots are seeds, diamonds the paper's numbers."""
    rows, unit, curves = found["rows"], found.get("unit", "top-1, %"), "axis" in found
    figure = Figure(figsize=(6, 3 if curves else 1 + 0.24 * len(rows)), layout="constrained")
    axis = figure.subplots()
    diamonds = dict(s=22, marker="D", color="tab:red", zorder=3, label="the paper's")
    if curves:
        timed, lines = found["axis"] == MINUTES, {}
        for row in rows:
            x, _, series = row["label"].partition(", ")
            lines.setdefault(series, []).append((mean_minutes(row) if timed else float(x), x, row))
        theirs = [(x, row["paper"]) for points in lines.values() for x, _, row in points if row["paper"]]
        if theirs and not timed:  # where the paper took other times
            axis.scatter(*zip(*theirs, strict=True), **diamonds)
        for color, (series, points) in enumerate(lines.items()):
            points.sort(key=lambda point: point[0])
            means = [np.mean(row["ours"]) for *_, row in points]
            axis.plot([x for x, *_ in points], means, color=f"C{color}", label=series or "ours")
            dots = [(x, value) for x, _, row in points for value in row["ours"]]
            axis.scatter(*zip(*dots, strict=True), s=9, color=f"C{color}", zorder=3)
            for (x, name, _), mean in zip(points, means, strict=True):
                axis.annotate(name * timed, (x, mean), (0, -9), textcoords="offset points", fontsize=6, ha="center")
        axis.scatter([], [], s=9, color="gray", label="a seed")
        axis.set(xlabel=found["axis"], ylabel=unit)
        if timed:
            axis.margins(0.1)
        else:
            axis.set_xticks(sorted({x for points in lines.values() for x, *_ in points}))
    else:
        dots = [(value, place) for place, row in enumerate(rows) for value in row["ours"]]
        axis.scatter(*zip(*dots, strict=True), s=9, color="black", zorder=3, label="a seed")
        theirs = [(row["paper"], place) for place, row in enumerate(rows) if row["paper"]]
        if theirs:
            axis.scatter(*zip(*theirs, strict=True), **diamonds)
        series = [row["label"].partition(", ")[2] for row in rows]
        of, apart = list(dict.fromkeys(series)), min(Counter(series).values()) > 1  # labels that end alike, one colour
        colors = [f"C{of.index(name) * apart}" for name in series]
        axis.barh(range(len(rows)), [np.mean(row["ours"]) for row in rows], color=colors, alpha=0.5)
        axis.set_yticks(range(len(rows)), [row["label"] for row in rows], fontsize=7)
        axis.set(xlabel=unit, ylim=(len(rows) - 0.5, -0.5))
    axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(out, dpi=120)


MARK = "<!-- experiments.py -->\n"  # before and after the README's table
CLAIMS = ["| the paper | gap there | gap here: mean ± deviation (seeds) | direction |", "|---|---|---|---|"]


def measured(experiment: dict, runs: dict[int, dict[str, tuple[Path, dict[str, dict]]]]) -> dict:
    """An experiment with the numbers of its seeds, as results_page takes it.

    `experiment`: what of that does not depend on seeds, rows of (label, paper, cell). `runs`: of each seed and cell the
    file that its last job left (see read_score) and the record of each of its jobs (machines, seconds).
    """
    merged = {seed: {name: job for _, jobs in of.values() for name, job in jobs.items()} for seed, of in runs.items()}
    minutes = lambda jobs: sum(job["seconds"] for job in jobs.values()) / 60
    machines = lambda jobs: " and ".join(sorted({name for job in jobs.values() for name in job["machines"]}))
    rows = [
        dict(label=label, paper=paper, cell=cell,
             ours=[read_score(of[cell][0], cell.partition("@")[2]) for of in runs.values()],
             minutes=[minutes(of[cell][1]) for of in runs.values()])
        for label, paper, cell in experiment["rows"]
    ]  # fmt: skip
    about = {key: [of(jobs) for jobs in merged.values()] for key, of in (("minutes", minutes), ("machines", machines))}
    return experiment | about | dict(rows=rows, seeds=list(runs))


def processor() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = re.search(r"model name\s*: (.+)", info)
    return name[1] if name else platform.processor() or platform.machine()


def machine(threads: int) -> str:
    """What the stages run on here, and the type of their matrix products: "AMD EPYC, float32, 1 thread"."""
    gpu = torch.cuda.is_available()
    dtype = precision_dtype("auto", torch.device("cuda" if gpu else "cpu"))
    name = torch.cuda.get_device_name() if gpu else processor()
    return f"{name}, {str(dtype).removeprefix('torch.')}, {threads} thread{'s' * (threads > 1)}"


def read_score(path: Path, key: str = "") -> float:
    """A number that a stage left: of results.json top-1 in %, or with a key that of one class; of a figure's
    -psnr.json the PSNR `key` in dB at the only ratio."""
    found = json.loads(path.read_text())
    if path.name == "results.json":
        return class_accuracy(read_predictions(path.with_name("predictions.csv")))[key][0] if key else found["top1"]
    (scores,) = found["psnr"].values()
    return scores[key]


def claims_of(found: dict) -> list[tuple[str, float | str | None, list[float]]]:
    """An experiment's claims: what the paper says, its gap (None: no number; OURS: it says nothing), and ours of each
    seed. Without any, the paper's best row is better than each other one."""
    rows = {row["cell"]: row for row in found["rows"]}
    numbers = lambda cells: np.sum([rows[cell]["ours"] for cell in cells.split(" + ")], axis=0)
    best, *others = sorted((row for row in found["rows"] if row["paper"]), key=lambda row: -row["paper"]) or [None]
    claims = found.get("claims") or [
        (f"{best['label']}: better than {row['label']}", best["paper"] - row["paper"], best["cell"], row["cell"])
        for row in others
    ]
    return [(text, gap, (numbers(more) - numbers(less)).tolist()) for text, gap, more, less in claims]


def claim_lines(found: dict) -> list[str]:
    """The lines of an experiment's claims in a table under CLAIMS."""
    lines = []
    for text, paper, ours in claims_of(found):
        gap = "" if paper is None else paper if paper == OURS else f"{paper:+.1f}"
        lines.append(f"| {text} | {gap} | {spread(ours, '+')} | {verdict(ours, paper != OURS)} |")
    return lines


def results_page(found: dict, page: Path) -> None:
    """Write an experiment's numbers as page.json, .md and .png.

    `found`: title, note, commands of seed 0, recipes (the presets that these start from); seeds, and for each one
    minutes of one core and machine; rows of label, paper (a number or None), cell (a name), and for each seed ours (a
    number) and minutes (None: unknown). Perhaps claims, see claims_of, of text, the paper's gap and two (sums of)
    cells; unit; axis, with which labels are `x, series`.
    """
    page.parent.mkdir(exist_ok=True)
    plot_results(found, page.with_suffix(".png"))
    number = lambda value: "" if value is None else f"{value:.1f}"
    unit, seeds = found.get("unit", "top-1, %"), ", ".join(map(str, found["seeds"]))
    rows = [f"| | paper | ours, {unit}: mean ± deviation (seeds {seeds}) |", "|---|---|---|"]
    rows += [f"| {row['label']} | {number(row['paper'])} | {spread(row['ours'])} |" for row in found["rows"]]
    if not any("@" in row["cell"] or mean_minutes(row) is None for row in found["rows"]):  # @: one run, many rows
        columns = zip(found["seeds"], *(row["minutes"] for row in found["rows"]), strict=True)
        known = [str(seed) for seed, *minutes in columns if None not in minutes]
        which = f" (seed {', '.join(known)})" * (len(known) < len(found["seeds"]))
        minutes = [MINUTES + which, "---", *(number(mean_minutes(row)) for row in found["rows"])]
        rows = [f"{row} {more} |" for row, more in zip(rows, minutes, strict=True)]
    machines = {}
    for seed, name in zip(found["seeds"], found["machines"], strict=True):
        machines.setdefault(name, []).append(str(seed))
    where = "; ".join(f"seed{'s' * (len(of) > 1)} {', '.join(of)} on {name}" for name, of in machines.items())
    text = [f"# {found['title']}", "", f"![]({page.name}.png)", "", *rows, "", *CLAIMS, *claim_lines(found), "",
            found["note"], "",
            f"{sum(found['minutes']):.0f} {MINUTES}, with the runs that other experiments share: {where}.", "",
            f"`python experiments.py {page.name}` makes the videos and lists, then runs, of seed 0:", "",
            *(f"    python {command}" for command in found["commands"])]  # fmt: skip
    page.with_suffix(".md").write_text("\n".join(text) + "\n")
    page.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")


def with_seeds(found: dict, old: dict) -> dict:
    """An experiment with its seeds and those that only an earlier page of the same cells has, in order."""
    order = sorted({*found["seeds"], *old["seeds"]})

    def pick(new: list, before: list) -> list:
        known = dict(zip(old["seeds"], before, strict=True)) | dict(zip(found["seeds"], new, strict=True))
        return [known[seed] for seed in order]

    at = {row["cell"]: row for row in old["rows"]}
    rows = [row | {key: pick(row[key], at[row["cell"]][key]) for key in ("ours", "minutes")} for row in found["rows"]]
    return found | {key: pick(found[key], old[key]) for key in ("seeds", "minutes", "machines")} | dict(rows=rows)


def report(experiments: dict[str, dict], folder: Path, readme: Path) -> None:
    """Write the pages of experiments (see results_page) that have seeds, and all pages' claims between the README's two
    marks. Seeds that a page has already stay in it; where it is of other cells, commands or recipes, the page of more
    seeds stays."""
    made_by = lambda of: [of["commands"], of["recipes"], {row["cell"] for row in of["rows"]}]
    lines = [*CLAIMS]
    for name, found in experiments.items():
        page = folder / name
        old = json.loads(page.with_suffix(".json").read_text()) if page.with_suffix(".json").exists() else None
        if old and made_by(old) == made_by(found):
            found = with_seeds(found, old)
        elif old and len(old["seeds"]) > len(found["seeds"]):
            print(f"{page}.md is of other commands or recipes and of {len(old['seeds'])} seeds: kept")
            found = old
        if found["seeds"]:
            if found is not old:
                results_page(found, page)
                print(f"wrote {page}.md, .png and .json: {len(found['seeds'])} seeds")
            claims = claim_lines(found)
            if len(claims) > 8:
                gaps = [(gap, ours) for _, gap, ours in claims_of(found)]
                count = Counter(verdict(ours, gap != OURS).split(" (")[0] for gap, ours in gaps)
                said = ", ".join(f"{number} {word}" for word, number in count.items())
                claims = [f"| {len(claims)} claims | {OURS * all(gap == OURS for gap, _ in gaps)} | | {said} |"]
            about = f"{sum(found['minutes']):.0f} {MINUTES}, {len(found['seeds'])} seeds"
            lines += [f"| **[{found['title']}]({page}.md)** | | {about} | |", *claims]
    parts = readme.read_text().split(MARK) if readme.exists() else []
    if len(parts) == 3 and len(lines) > len(CLAIMS):
        readme.write_text(MARK.join([parts[0], "\n".join(lines) + "\n", parts[2]]))
        print(f"wrote the table in {readme}")


def example_clips(model: VideoMAE, stage: dict, stride: int, count: int) -> list[Tensor]:
    """Clips of videos drawn from the test part of what a model was trained on (from all where no test part is)."""
    paths = read_split(stage["data"], stage["splits"], stage["fold"], train=False).paths
    clips = []
    for path in sorted(paths, key=lambda path: derive_seed(5, *path.name.encode())):
        try:
            clips.append(load_clip(path, model, stride))
        except ValueError as error:
            print(f"left out of the figure: {error}")
        if len(clips) == count:
            break
    return clips


def main(argv: list[str]) -> None:
    _, cfg = engine.parse_config(Config, argv, __doc__, {"": {}})
    if cfg.compare and len(cfg.compare) != 2:
        raise ValueError(f"--compare needs two files, not {len(cfg.compare)}: {' '.join(cfg.compare)}")
    beside = Path(cfg.compare[0]).with_name("comparison.png") if cfg.compare else None
    out = Path(cfg.out or beside or Path(cfg.checkpoint).with_name("reconstruction.png"))
    model, stage = (None, None) if cfg.compare else load_model(cfg.checkpoint)
    for path, suffix in ((out, ".png"), (Path(cfg.gif or "x.gif"), ".gif")):
        if path.suffix != suffix or not path.parent.is_dir():
            raise ValueError(f"{path} must be a {suffix} file in a folder that exists")
    if cfg.compare:
        compare(*cfg.compare, out)
        return print(f"wrote {out}")
    if cfg.stats != "visible" and not model.normalize:
        raise ValueError(f"{cfg.checkpoint} predicts pixels and needs no statistics: leave out --stats {cfg.stats}")
    if model.target == "center" and cfg.mask != "tube":
        raise ValueError(f"{cfg.checkpoint} predicts the central frame only: use --mask tube")
    stride = cfg.stride or stage["stride"]
    if cfg.videos:
        clips = [load_clip(path, model, stride) for path in cfg.videos]
    else:
        clips = example_clips(model, stage, stride, cfg.scored)
    if not clips:
        raise ValueError(f"no video of {stage['data']} can be read: name some with --videos")
    torch.manual_seed(cfg.seed)
    fresh = VideoMAE(**model.config).eval() if cfg.stats != "visible" else None
    make_figure(model, fresh, clips, len(clips) if cfg.videos else 2, cfg, out)
    print(f"wrote {out}" + (f" and {cfg.gif}" if cfg.gif else ""))


if __name__ == "__main__":
    engine.cli(main)
