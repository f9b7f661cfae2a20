"""Figures: reconstructions (paper, Figures 10, 11), loss curves, accuracy per class (Figures 7, 8).

    python visualize.py --checkpoint runs/pretrain-toy/checkpoint.pt
    python visualize.py --checkpoint CKPT --videos a.avi b.mp4 --ratios 0.75 0.9 --gif figure.gif
    python visualize.py --checkpoint CKPT --videos a.avi --mask random --stats oracle
    python visualize.py --compare A.csv B.csv --out figure.png     # two predictions.csv

A model of normalised cubes predicts each cube up to its mean and contrast. They are taken from the
visible cubes around, so that nothing hidden is used. `--stats oracle` draws beside it what comes
out with mean and contrast of the hidden cube itself, as in the official code. The figure says so,
and shows how an empty prediction and an untrained model look with that help.
"""

import csv
import gc
import io
import itertools
import json
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor

from data import center_clip, read_split, spatial_views
from lib import engine, speed
from lib.engine import opt
from lib.lists import listed
from lib.variants import CenterFrame, TwiceTheFrames, choose_model
from lib.video import read_frames, shown
from lib.weights import build, load_model
from masking import MASKS
from model import VideoMAE, normalize_cubes, patchify, to_float


@dataclass
class Config:
    checkpoint: str = opt("runs/pretrain-toy/checkpoint.pt", "weights of pre-training")
    videos: tuple[str, ...] | None = opt(None, "files, all drawn; None: test videos of its data")
    scored: int = opt(24, "test videos over which PSNR is averaged; the first two are drawn", 1)
    ratios: tuple[float, ...] = opt((0.75, 0.9, 0.95), "mask ratios")
    mask: Literal[tuple(MASKS)] | None = opt(None, "strategy; None: as in pre-training, or tube")
    stats: Literal["visible", "oracle"] = opt("visible", "oracle: draw both kinds of statistics")
    stride: int | None = opt(None, "frames from one to the next; None: as in pre-training", 0)
    out: str | None = opt(None, "PNG to write; None: a new one beside the checkpoint or A.csv")
    gif: str | None = opt(None, "also write an animation to this GIF")
    seed: int = opt(0, "seed of the masks", 0)
    compare: tuple[str, ...] | None = opt(None, "A.csv B.csv: compare two models class by class")


# -------------------------------------------------------------------------------- reconstructions

# Targets that are pixels. Predictions of another one, such as HOG, are no picture.
PIXELS = (VideoMAE.target, CenterFrame.target, TwiceTheFrames.target)


def load_clip(path: str | Path, frames: int, size: int, stride: int) -> Tensor:
    """The clip in the middle of a video, its central square: (1, T, C, size, size) uint8."""
    clip = read_frames(path, lambda total: center_clip(total, frames, stride))
    return spatial_views(clip, size, crops=1)


def unpatchify(cubes: Tensor, grid: tuple[int, int, int], cube: tuple[int, int, int]) -> Tensor:
    """(B, N, P) -> (B, T, C, H, W): the inverse of patchify, for a grid (t, h, w)."""
    (t, h, w), (p0, p1, p2) = grid, cube
    pattern = "b (t h w) (p0 p1 p2 c) -> b (t p0) c (h p1) (w p2)"
    return rearrange(cubes, pattern, t=t, h=h, w=w, p0=p0, p1=p1, p2=p2)


@torch.no_grad()
def reconstruct(model: VideoMAE, video: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, dict]:
    """What a model makes of one clip (1, T, C, H, W) uint8 under a mask (1, N).

    Returns videos (1, T', C, H, W), float 0-1: the original; bool, True on hidden pixels; and by
    name what comes out where these are filled in. T' is 1 for the variant "center".
        nearest   baseline: each hidden cube is a copy of the nearest visible one
        mean      baseline: each hidden pixel is the mean colour of all visible ones
        model     the predictions, if they are pixels. For models of normalised cubes also:
        nothing   a prediction of zero, with the same mean and contrast as "model"
        oracle model, oracle nothing   with mean and contrast of the hidden cubes themselves
    """
    _, pred = model(video, mask)
    grid, cube, hidden, video = model.encoder.grid, model.encoder.cube, mask[0], to_float(video)
    if isinstance(model, CenterFrame):  # a single frame; a tube mask is the same at all time steps
        grid, cube, hidden = (1, *grid[1:]), (1, *cube[1:]), hidden[: grid[1] * grid[2]]
        video = video[:, video.shape[1] // 2].unsqueeze(1)
    cubes = targets = patchify(video, cube)
    if isinstance(model, TwiceTheFrames):  # leave out the frames that the encoder does not get
        targets = patchify(video, (2 * cube[0], *cube[1:]))
        cubes = patchify(video[:, ::2], cube)
        pred = rearrange(pred, "b m (p0 two q) -> two b m (p0 q)", p0=cube[0], two=2)[0]
    seen, unseen, pixels = cubes[:, ~hidden], cubes[:, hidden], cubes.shape[2] // 3  # per cube

    places = torch.cartesian_prod(*(torch.arange(float(side)) for side in grid))
    distance = torch.cdist(places[hidden], places[~hidden])  # (M, V), in cubes
    colour = seen.unflatten(2, (-1, 3)).mean(dim=(0, 1, 2))
    values = {"nearest": seen[:, distance.argmin(dim=1)]}
    values["mean"] = colour.repeat(pixels).expand_as(unseen)
    if type(model).target in PIXELS:
        values["model"] = pred
    if "model" in values and model.normalize:
        # From the visible cubes, weighted by 1 / distance^4: of powers 2, 4, 6, 8 the best (ours).
        weight = distance**-4 / (distance**-4).sum(dim=1, keepdim=True)
        around = [torch.einsum("mv,bvpc->bmpc", weight, s) for s in normalize_cubes(seen)[1:]]
        own = normalize_cubes(targets[:, hidden])[1:]
        for prefix, (mean, std) in {"": around, "oracle ": own}.items():
            values[f"{prefix}model"] = (pred.unflatten(2, (-1, 3)) * std + mean).flatten(2)
            values[f"{prefix}nothing"] = mean.expand(-1, -1, pixels, -1).flatten(2)

    hidden = hidden[None, :, None].expand_as(cubes)
    whole = {name: cubes.masked_scatter(hidden, value) for name, value in values.items()}
    made = {name: unpatchify(value, grid, cube).clamp(0, 1) for name, value in whole.items()}
    return unpatchify(cubes, grid, cube), unpatchify(hidden, grid, cube), made


def psnr(video: Tensor, original: Tensor, hidden: Tensor) -> float:
    """Peak signal-to-noise ratio over hidden pixels, in dB. Videos are floats in 0-1."""
    error = (video - original)[hidden].square().mean()
    return float(-10 * torch.log10(error.clamp(min=1e-10)))


def draw_reconstructions(model, clips: list[Tensor], drawn: int, cfg: Config, out: Path) -> None:
    """Draw the first clips (1, T, C, H, W). Print and write the mean PSNR over all clips."""
    torch.manual_seed(cfg.seed)
    oracle, names = cfg.stats == "oracle", ["model"]
    if oracle:
        names += ["oracle model", "oracle nothing", "oracle untrained"]
        untrained = build(type(model), model.config).eval()
    columns, means = [], defaultdict(Counter)
    for number, clip in enumerate(clips):
        seed, masks = engine.derive_seed("figure", cfg.seed, number), {}
        for ratio in cfg.ratios:
            generator = torch.Generator().manual_seed(seed)
            mask = MASKS[cfg.mask](clip, model.encoder.grid, ratio, generator)
            # Of few places, much less may be hidden: of 4 time steps 3, at 90 % as well as at 75 %.
            share = mask.float().mean().item()
            masks[f"{100 * (ratio if ratio - share < 0.02 else share):.4g}%"] = mask
        for place, (percent, mask) in enumerate(masks.items()):
            original, hidden, made = reconstruct(model, clip, mask)
            if "model" not in made:  # a target of one's own
                return print("no figure: the predictions of this model are no pixels")
            if oracle:
                other = reconstruct(untrained, clip, mask)[2]
                made |= {"untrained": other["model"], "oracle untrained": other["oracle model"]}
            named = [name for name in made if oracle or not name.startswith("oracle")]
            scores = {name: psnr(made[name], original, hidden) for name in named}
            means[percent].update({name: score / len(clips) for name, score in scores.items()})
            if number < drawn:
                first = [("original", original[0])] if place == 0 else []
                columns += [*first, (f"{percent} masked", original.where(~hidden, 0.5)[0])]
                for name in names:
                    title = name.replace("oracle ", "oracle statistics:\n")
                    columns.append((f"{title}\n{scores[name]:.1f} dB", made[name][0]))
    frames = len(columns[0][1])
    draw_columns(columns, slice(0, frames, max(frames // 8, 1)), out)
    if cfg.gif:
        images = []
        for time in range(frames):
            file = io.BytesIO()
            draw_columns(columns, slice(time, time + 1), file, dpi=100)
            images.append(Image.open(file).convert("RGB"))
        images[0].save(cfg.gif, save_all=True, append_images=images[1:], duration=150, loop=0)
    print(f"PSNR on masked pixels, mean over {len(clips)} clips, {cfg.mask} masks:")
    for percent, scores in means.items():
        line = ", ".join(f"{name} {value:.2f} dB" for name, value in scores.items())
        print(f"  {percent} masked: {line}")
    about = dict(clips=len(clips), mask=cfg.mask, checkpoint=cfg.checkpoint, psnr=means)
    engine.write_whole(out.with_name(f"{out.stem}-psnr.json"), json.dumps(about, indent=1) + "\n")
    print(f"wrote {out}" + (f" and {cfg.gif}" if cfg.gif else ""))


def draw_columns(columns: list[tuple[str, Tensor]], times: slice, out, dpi: int = 200) -> None:
    """Draw columns (title, frames (T, C, H, W) float 0-1), the frames at `times` from top down."""
    side, head = 1.2, 0.5  # inches: a frame with its margin; three lines of title
    height = side * len(columns[0][1][times]) + head
    figure = Figure(figsize=(side * len(columns), height))
    axes = figure.subplots(1, len(columns), squeeze=False)[0]
    for axis, (title, frames) in zip(axes, columns, strict=True):
        framed = F.pad(frames[times], (1, 1, 1, 1), value=1.0)
        axis.imshow(rearrange(framed, "t c h w -> (t h) w c").numpy())
        axis.set_title(title, fontsize=6)
        axis.axis("off")
    figure.subplots_adjust(0.003, 0.003, 0.997, 1 - head / height, wspace=0.06)
    figure.savefig(out, dpi=dpi, format="png", bbox_inches="tight", pad_inches=0.03)


# ----------------------------------------------------------------------------- curves and classes


def plot_log(folder: Path) -> None:
    """Draw folder/loss.png from folder/log.jsonl: loss, learning rate and others, if any."""
    gc.collect()  # the last figure: they refer to themselves, and each would keep megabytes
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    known = {key for line in lines if "step" in line for key in line}
    known -= {"loss", "lr", "step", "epoch", "unreadable", "clips_per_s", "waiting_for_data"}
    keys = ["loss", "lr", *sorted(known)]
    figure = Figure(figsize=(6, 2.3 * len(keys)), layout="constrained")
    axes = figure.subplots(len(keys), 1, sharex=True)
    for axis, key in zip(axes, keys, strict=True):
        points = {line["step"]: line[key] for line in lines if key in line}
        axis.plot(list(points), list(points.values()))
        axis.set_ylabel(key)
    for line in lines:
        if "constant_loss" in line:
            axes[0].axhline(line["constant_loss"], linestyle=":", label="constant prediction")
            axes[0].legend()
    axes[0].set_yscale("log")
    axes[-1].set_xlabel("step")
    figure.savefig(folder / "loss.png", dpi=120)


PREDICTIONS = ("path", "label", "prediction", "correct", "top5", "probabilities")


def read_predictions(path: str | Path) -> list[dict]:
    """The rows of a predictions.csv; `correct` is a bool. ValueError where it is something else."""
    with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        rows = list(csv.DictReader(file))
    if not rows or any(row.get(column) is None for row in rows for column in PREDICTIONS):
        raise ValueError(f"{path} must hold the columns {', '.join(PREDICTIONS)} and some videos")
    for row in rows:
        row["correct"] = row["label"] == row["prediction"]
    return rows


def class_accuracy(rows: list[dict]) -> dict[str, tuple[float, int]]:
    """Of the rows of read_predictions: {class: (top-1 in %, number of videos)}."""
    videos = Counter(row["label"] for row in rows)
    hits = Counter(row["label"] for row in rows if row["correct"])
    return {name: (100 * hits[name] / number, number) for name, number in videos.items()}


def draw_bars(bars: list[tuple[str, float, str]], title: str, xlabel: str, out) -> None:
    """Draw horizontal bars (class, length, note), the longest one on top."""
    bars = sorted(bars, key=lambda bar: (-bar[1], bar[0]))
    names, lengths, notes = zip(*bars, strict=True)
    names, places = [shown(name) for name in names], range(len(bars))  # any bytes name a folder
    width = 4 + 0.045 * max(map(len, names))  # inches: the bars, and names in 6-point letters
    figure = Figure(figsize=(width, 0.13 * len(bars) + 1), layout="constrained")
    axis = figure.subplots()
    drawn = axis.barh(places, lengths, color=["C3" if length < 0 else "C0" for length in lengths])
    axis.bar_label(drawn, notes, fontsize=5, padding=2)
    axis.set_yticks(places, names, fontsize=6, parse_math=False)
    axis.set(ylim=(len(bars) - 0.5, -0.5), xmargin=0.2)
    axis.set_xlabel(xlabel, fontsize=6)
    axis.set_title(title, fontsize=8, parse_math=False)
    figure.savefig(out, dpi=150)


def plot_classes(table: str | Path, out: str | Path) -> None:
    """Draw each class's top-1 accuracy in a predictions.csv, the best first."""
    rows = read_predictions(table)
    found = class_accuracy(rows).items()
    bars = [(name, top1, f"{top1:.0f} % of {videos}") for name, (top1, videos) in found]
    draw_bars(bars, summary(rows), "top-1, %", out)


def plot_confusion(table: str | Path, out: str | Path) -> None:
    """Draw how the videos of each class in a predictions.csv are spread over predicted classes.

    Each row is a true class and sums to 1. Up to 20 classes, cells hold their numbers in %.
    """
    rows = read_predictions(table)
    names = sorted({row[key] for row in rows for key in ("label", "prediction")})
    counts = torch.zeros(len(names), len(names))
    for row in rows:
        counts[names.index(row["label"]), names.index(row["prediction"])] += 1
    shares = counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
    texts = [shown(name) for name in names]
    side = 3 + 0.13 * len(names) + 0.045 * max(map(len, texts))  # inches, as in draw_bars
    figure = Figure(figsize=(side, side), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    axis.set_xticks(range(len(names)), texts, fontsize=6, rotation=90, parse_math=False)
    axis.set_yticks(range(len(names)), texts, fontsize=6, parse_math=False)
    for y, x in shares.nonzero().tolist() if len(names) <= 20 else []:
        colour = "white" if shares[y, x] > 0.5 else "black"
        axis.text(x, y, f"{100 * shares[y, x]:.0f}", size=5, ha="center", va="center", color=colour)
    axis.set(xlabel="predicted", ylabel="true")
    axis.set_title(summary(rows), fontsize=8)
    figure.colorbar(image, label="share of the true class", shrink=0.5, fraction=0.04)
    figure.savefig(out, dpi=150)


def draw_boxes(pictures: list[tuple], out: Path) -> None:
    """Draw pictures (title, image (C, H, W) uint8, boxes (M, 4) in shares of its sides, M texts).

    OUT.gif has all of them, a second each, OUT.png up to eight.
    """
    few, images = pictures[:: -(-len(pictures) // 8)], []
    for part, file in [(few, f"{out}.png"), *(([picture], io.BytesIO()) for picture in pictures)]:
        across, down = min(len(part), 4), -(-len(part) // 4)
        figure = Figure(figsize=(4 * across, 3.4 * down), layout="constrained")
        axes = figure.subplots(down, across, squeeze=False).flatten()
        for axis in axes:
            axis.axis("off")
        for axis, (title, image, boxes, texts) in zip(axes, part, strict=False):
            height, width = image.shape[1:]
            axis.imshow(image.permute(1, 2, 0).numpy())
            axis.set_title(title, fontsize=8)
            for number, (box, text) in enumerate(zip(boxes, texts, strict=True)):
                x, y, right, bottom = box * [width, height, width, height]
                how = dict(fill=False, edgecolor=f"C{number % 10}", linewidth=1.5)
                axis.add_patch(Rectangle((x, y), right - x, bottom - y, **how))
                back = dict(facecolor=f"C{number % 10}", alpha=0.8, pad=1, linewidth=0)
                how = dict(color="white", fontsize=7, va="top", bbox=back, parse_math=False)
                axis.text(x, y, text, **how)
        figure.savefig(file, dpi=100, format="png")
        if isinstance(file, io.BytesIO):
            images.append(Image.open(file).convert("RGB"))
    images[0].save(f"{out}.gif", save_all=True, append_images=images[1:], duration=1000, loop=0)


def summary(rows: list[dict]) -> str:
    """Of the rows of read_predictions: "top-1 50.00 % of 12 videos"."""
    top1 = 100 * sum(row["correct"] for row in rows) / len(rows)
    return f"top-1 {top1:.2f} % of {len(rows)} videos"


def compare(paths: tuple[str, ...], out: Path) -> None:
    """Draw what each class gains in top-1 from the second predictions.csv to the first.

    ValueError where their videos or labels are not the same.
    """
    if len(paths) != 2:
        raise ValueError(f"--compare needs two files, not {len(paths)}")
    tables = [read_predictions(path) for path in paths]
    a, b = ({(row["path"], row["label"]) for row in rows} for rows in tables)
    if a != b:
        raise ValueError(f"{' and '.join(paths)} differ in videos or labels: {min(a ^ b)}")
    for path, rows in zip(paths, tables, strict=True):
        print(f"{shown(path)}: {summary(rows)}")
    a, b = map(class_accuracy, tables)
    bars = []
    for name, (top1, videos) in a.items():
        other = b[name][0]
        bars.append((name, top1 - other, f"{top1:.0f} % and {other:.0f} % of {videos}"))
    draw_bars(bars, "\nminus ".join(map(shown, paths)), "difference in top-1, points", out)


def read_clips(cfg: Config, model: VideoMAE, about: dict) -> list[Tensor]:
    """The clips of --videos, or of test videos of the data that a checkpoint was trained on.

    A list or a folder has no test part. Then they are training videos, and a line says so.
    """
    frames, size, _ = model.encoder.video_size
    stride = about.get("stride", 4) if cfg.stride is None else cfg.stride
    choose_model(about.get("name", "videomae"), cfg.mask, stride)  # they must suit each other
    if not (paths := cfg.videos):
        if "data" not in about:  # weights of other projects
            raise ValueError(f"{cfg.checkpoint} knows no videos: name some with --videos")
        where = (about["data"], about["splits"], about["fold"])
        split = read_split(*where, train=False, missing=about.get("missing", "error"))
        if {*split.paths} <= {*listed(*where, train=True).paths}:
            print("the data has no test part: PSNR and figure are of videos that were trained on")
        paths = sorted(split.paths, key=lambda path: engine.derive_seed("figure", path.name))
    clips, more = [], model.frame_factor
    for path in paths:
        try:
            clips.append(load_clip(path, more * frames, size, stride // more))
        except ValueError as error:
            if cfg.videos:
                raise
            print(f"left out of the figure: {error}")
        if len(clips) == cfg.scored and not cfg.videos:
            break
    if not clips:
        raise ValueError("no test video can be read: name some with --videos")
    return clips


def draw_trained(folder: Path) -> None:
    """Draw reconstructions of a training that has ended, or say why there are none."""
    try:
        out = str(folder / "reconstruction.png")  # in place of an earlier one
        main(["--checkpoint", str(folder / "checkpoint.pt"), "--out", out])
    except ValueError as error:
        print(f"no figure: {error}")


def main(argv: list[str]) -> None:
    """Draw what the flags ask for. Without --out, the figure of an earlier call stays."""
    _, cfg = engine.parse_config(Config, argv, __doc__, {"": {}})
    name = "comparison.png" if cfg.compare else "reconstruction.png"
    out = Path(cfg.out or Path(cfg.compare[0] if cfg.compare else cfg.checkpoint).with_name(name))
    if out.exists() and not cfg.out:
        others = (out.with_stem(f"{out.stem}-{number}") for number in itertools.count(2))
        out = next(other for other in others if not other.exists())
    model, about = (None, {}) if cfg.compare else load_model(cfg.checkpoint)
    for path, suffix in ((out, ".png"), (Path(cfg.gif or "x.gif"), ".gif")):
        if path.suffix != suffix or not path.parent.is_dir():
            raise ValueError(f"{path} must be a {suffix} file in a folder that exists")
    if cfg.compare:
        compare(cfg.compare, out)
        return print(f"wrote {out}")
    cfg = replace(cfg, mask=cfg.mask or about.get("mask", "tube"))
    if cfg.mask not in MASKS:
        raise ValueError(f"masking.py has no {cfg.mask} masks: choose others with --mask")
    if cfg.stats == "oracle" and not model.normalize:
        raise ValueError(f"{cfg.checkpoint} predicts pixels: leave out --stats oracle")
    model = speed.place(model, torch.device("cpu"))
    clips = read_clips(cfg, model, about)
    draw_reconstructions(model, clips, len(clips) if cfg.videos else 2, cfg, out)


if __name__ == "__main__":
    engine.cli(main)
