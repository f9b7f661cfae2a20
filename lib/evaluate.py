"""Evaluation and prediction: which videos, their views, a model's scores, what is kept of them."""

import csv
import glob
import json
import math
import os
import re
import sys
import time
from collections import namedtuple
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from data import SAMPLING, Split, Views, make_loader
from lib import engine
from lib.annotations import ENDINGS, ending, read_names
from lib.lists import listed, missing_videos, relabel, video_files
from lib.run import Run
from lib.video import Probe, played, read_frames, shown

# A video; or `frames` frames of it from number `first` on, at second `start`.
Window = namedtuple("Window", "path start first frames", defaults=(0, 0, 0))


def find_videos(names, data: str | None) -> tuple[list[Path], list[str]]:
    """(videos that files, folders, globs and lists name, what is wrong with the others).

    Paths of a list begin at `data` or at its own folder: where more are. Its labels do not count.
    """
    paths, errors = [], []
    for name in map(os.path.expanduser, names):
        found = [] if os.path.lexists(name) else sorted(glob.glob(name, recursive=True))
        for path in map(Path, found or [name]):
            videos, notes = [path], []
            other = path.is_file() and ending(path.name) not in ENDINGS
            try:
                if path.is_dir():
                    videos, notes = video_files(path)
                    errors += [] if videos else [f"{shown(path)}: no videos"]
                elif other and np.fromfile(path, np.uint8, 4096).all():  # videos have zeros
                    folders = filter(os.path.isdir, [data or "", path.parent])
                    splits = [listed(folder, path, 1, train=False) for folder in folders]
                    split = min(splits, key=lambda split: len(missing_videos(split)))
                    videos, notes = split.paths, split.notes
            except ValueError as error:
                videos, errors = [], [*errors, str(error)]
            paths += videos
            for note in notes:
                Run.say(f"note: {note}")
    return paths, errors


def cut(path: Path, every: float | None) -> list[Window]:
    """A film in windows of `every` seconds, at least a frame; the last one is what is left.

    Second s is frame floor(s * rate), where `rate` is the file's average of frames per second: in a
    film of varying rate, windows are equal in frames. One window, if `every` is None or the file
    cannot be read.
    """
    about, totals = Probe(), []
    with suppress(ValueError):  # scoring it says why
        if every:
            next(played(path, about))
            read_frames(path, lambda total: totals.append(total) or [0])
    if not totals:
        return [Window(path)]
    step = max(every * about.rate, 1)
    firsts = [int(k * step) for k in range(math.ceil(totals[-1] / step))]
    parts = zip(firsts, [*firsts[1:], totals[-1]], strict=True)
    return [Window(path, k * every, first, end - first) for k, (first, end) in enumerate(parts)]


def fit_classes(split: Split, classes: list[str], whose: str) -> Split:
    """The split with the labels that its classes have among the `classes` of `whose`, by name.

    Where one side has numbers for names, they are taken as those of the other, which is said.
    ValueError for a class that the others do not have.
    """
    unnamed = all(re.fullmatch(rf"(class |LABEL_)?{i}", name) for i, name in enumerate(classes))
    known, count, numbers = len(classes), len(split.classes), split.kind == "list"
    if not unnamed and not numbers:
        split = relabel(split, classes, whose)
    elif count > known or (count < known and not numbers):
        raise ValueError(f"{whose}: there are {known} classes, these videos have {count}")
    if unnamed != numbers:
        Run.say(f"note: numbers are taken as names: the classes have the order of {whose}")
    if 0 < len({*split.labels}) < known:
        Run.say(f"note: {whose}: these videos are of {len({*split.labels})} of {known} classes")
    return replace(split, classes=classes if numbers else split.classes)


# -------------------------------------------------------------------------------- views and scores


class Readable(Views):
    """Views of Windows: item i is (i, views), see data.Views, or (i, why it cannot be read)."""

    windows: list[Window]

    def pick(self, total: int) -> list[int]:
        """Frames of all clips, one after the other; they lie in the window."""
        return [self.now.first + i for i in super().pick(self.now.frames or total)]

    def __getitem__(self, index: int) -> tuple[int, Tensor | str]:
        self.now = self.windows[index]
        try:
            return super().__getitem__(index)
        except ValueError as error:
            return index, str(error)


def stamp(path: str | Path) -> str:
    """What changes with a file: path, bytes, time; those of all files of a folder."""
    files = filter(os.path.isfile, [path, *sorted(Path(path).glob("*"))])
    return json.dumps([(str(f), os.stat(f).st_size, os.stat(f).st_mtime_ns) for f in files])


def keep(work: Callable, keys: list[str], path: Path | None = None, about: str = ""):
    """({index: tensors}, {index: error}) from work(todo), which yields (index, either of them).

    `keys` stand for the videos, `about` for all else. What the file `path` has of the same is taken
    from there. It is written at the end, also after Ctrl-C, and every ten minutes. Processes share
    the work, and all get all results.
    """
    kept, errors, due = {}, {}, time.monotonic() + 600

    def save() -> None:
        if path and kept and engine.rank() == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            engine.save_checkpoint(path, **{about: kept})

    with suppress(Exception):  # there may be no file, or a broken one, in any of many ways
        kept = torch.load(path, weights_only=True)[about]
    mine = range(engine.rank(), len(keys), engine.processes())
    try:
        for index, result in work([i for i in mine if keys[i] not in kept]):
            if isinstance(result, str):
                errors[index] = result
            else:
                kept[keys[index]] = result
            if time.monotonic() > due:
                save()
                due = time.monotonic() + 600
        if engine.processes() > 1:
            parts = [None] * engine.processes()
            dist.all_gather_object(parts, (kept, errors))
            for results, more in parts:
                kept.update(results)
                errors |= more
    except KeyboardInterrupt:
        print(f"stopped: {path} keeps {len(kept)} videos for the next time" if path else "stopped")
        sys.exit(130)
    finally:
        save()
    return {i: kept[key] for i, key in enumerate(keys) if key in kept}, errors


def each_video(videos: list, work: Callable, cfg, device, path=None, about: str = ""):
    """As keep, of work(test views (K, T, C, H, W) uint8) of paths or Windows; `about` the model.

    `cfg` has the fields of finetune.ClipConfig, settled.
    """
    antialias = cfg.augment == "torchvision"
    sizes = (cfg.frames, cfg.stride, cfg.clips, cfg.resolution, cfg.crops, antialias)
    windows = [video if isinstance(video, Window) else Window(video) for video in videos]
    views = Readable([window.path for window in windows], SAMPLING[cfg.sampling][1], *sizes)
    views.windows = windows

    def results(todo: list[int]):
        batches, pin = [[i] for i in todo], device.type == "cuda"
        loader = make_loader(views, batches, cfg.workers, pin, collate=itemgetter(0))
        for index, found in engine.progress("videos", len(todo), loader, leave=False):
            yield index, found if isinstance(found, str) else work(found)

    keys = [f"{stamp(window.path)} {window.first} {window.frames}" for window in windows]
    return keep(results, keys, path, f"{about} {sizes} {cfg.sampling} {cfg.precision} {device}")


@torch.no_grad()
def score_videos(model: nn.Module, videos: list, cfg, device, path=None, weights=None):
    """As each_video, of (mean softmax of the views (classes,), class of each view (K,)).

    `weights`: the model's file, where results are kept in `path`.
    """
    dtype = engine.precision_dtype(cfg.precision, device)

    def score(views: Tensor) -> tuple[Tensor, Tensor]:
        with engine.autocast(device, dtype):
            logits = model(views.to(device, non_blocking=True))
        probabilities = logits.float().softmax(dim=1).cpu()
        return probabilities.mean(dim=0), probabilities.argmax(dim=1)

    model.eval()
    found = each_video(videos, score, cfg, device, path, stamp(weights) if path else "")
    model.train()
    return found


def stack(results: dict, errors: dict, then: str = "") -> list[Tensor]:
    """The tensors of all videos. ValueError if none can be read, or with `then`, if not all can."""
    if errors and (then or not results):
        names = "; ".join([*errors.values()][:20]) + "; ..." * (len(errors) > 20)
        advice = f" (the others' results are kept: mend the list or the files, {then})" * bool(then)
        raise ValueError(f"{len(errors)} videos cannot be read: {names}{advice}")
    return [torch.stack(column) for column in zip(*results.values(), strict=True)]


def accuracies(scores: Tensor, views: Tensor, labels: list[int]) -> dict[str, float]:
    """What score_videos found -> top1, top5, mean of the classes' top1, top1 of views, in %."""
    labels = torch.tensor(labels)
    best = scores.topk(min(5, scores.shape[1])).indices == labels[:, None]
    right = best[:, 0]
    classes = torch.stack([right[labels == label].float().mean() for label in labels.unique()])
    shares = dict(top1=right, top5=best.any(1), class_mean=classes, view=views == labels[:, None])
    return {name: 100 * float(share.float().mean()) for name, share in shares.items()}


def knn(train: Tensor, labels: Tensor, test: Tensor, k: int = 20) -> Tensor:
    """Scores (videos, classes) of features (videos, D): votes of the k nearest training videos.

    Nearest by cosine; a vote weighs exp(cosine / 0.07), as in Wu et al. 2018 and DINO (k = 20).
    Nothing is trained or tuned. The scores of a video sum to 1.
    """
    train, test = F.normalize(train, dim=1), F.normalize(test, dim=1)
    near, places = (test @ train.T).topk(min(k, len(train)))
    votes = (near / 0.07).softmax(dim=1)
    classes = int(labels.max()) + 1
    return votes.new_zeros(len(test), classes).scatter_add_(1, labels[places], votes)


def top_five(scores: Tensor, classes: list[str]) -> tuple[list[str], list[str]]:
    """(names, probabilities) of the five best classes, or of all where there are fewer."""
    values, indices = scores.topk(min(5, len(classes)))
    return [classes[i] for i in indices], [f"{value:.6f}" for value in values]


def write_csv(path: Path, rows: list) -> None:
    """Write a CSV file; names of files may hold any bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        csv.writer(file).writerows(rows)


def predict(model: nn.Module, classes: list[str], cfg, table: Path, device) -> None:
    """Print and write the best classes of --predict; exit code 1 where something has none."""
    if cfg.classes:
        named = Split([], [], read_names(cfg.classes))
        classes = fit_classes(named, classes, cfg.init).classes
    paths, wrong = find_videos(cfg.predict, cfg.data)
    windows = [window for path in paths for window in cut(path, cfg.every)]
    results, errors = score_videos(model, windows, cfg, device)
    rows = [["path", "start", "prediction", "probability", "top5", "probabilities"]]
    for i, (scores, _) in results.items():
        (path, start, *_), (names, values) = windows[i], top_five(scores, classes)
        lines = [f"{float(v):7.1%}  {name}" for v, name in zip(values, names, strict=True)]
        rows.append([path, f"{start:g}", names[0], values[0], ";".join(names), ";".join(values)])
        if engine.rank() == 0:
            print(shown(path) + f" from second {start:g}" * bool(cfg.every), *lines, sep="\n  ")
    if engine.rank() == 0:
        write_csv(table, [row if cfg.every else row[:1] + row[2:] for row in rows])
        print(f"wrote {table}: {len(rows) - 1} predictions")
        name_wrong([*wrong, *errors.values()])


def name_wrong(errors: list[str]) -> None:
    """Name what could not be read and end with exit code 1, if there is any."""
    if errors:
        print(f"{len(errors)} cannot be read:", *dict.fromkeys(errors), sep="\n  ", file=sys.stderr)
        sys.exit(1)
