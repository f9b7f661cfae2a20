"""Evaluation and prediction: which videos, their views, a model's scores, what is kept of them."""

import csv
import glob
import hashlib
import json
import math
import os
import re
import signal
import sys
import time
from collections import namedtuple
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from itertools import pairwise
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

import visualize
from data import SAMPLING, Split, make_loader, spatial_views
from lib import engine
from lib.annotations import ENDINGS, ending, read_names
from lib.lists import listed, missing_videos, relabel, video_files
from lib.run import Run
from lib.video import identity, length, read_frames, shown

# A video; or `frames` frames of it from number `first` on, at second `start`.
Window = namedtuple("Window", "path start first frames", defaults=(0, 0, 0))


def find_videos(names, data: str | None, every: float | None) -> tuple[list[Window], list[str]]:
    """(windows of the videos that files, folders, globs and lists name, what is wrong with others).

    Paths of a list begin at `data` or at its own folder: where more are. Its labels do not count.
    Films are cut by `every`, see cut.
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
                    folders = filter(os.path.isdir, [os.path.expanduser(data or ""), path.parent])
                    splits = [listed(folder, path, 1, train=False) for folder in folders]
                    split = min(splits, key=lambda split: len(missing_videos(split.paths)[0]))
                    videos, notes = split.paths, split.notes
            except ValueError as error:
                videos, errors = [], [*errors, str(error)]
            paths += videos
            for note in notes:
                Run.say(f"note: {note}")
    return [window for path in paths for window in cut(path, every)], errors


def cut(path: Path, every: float | None) -> list[Window]:
    """A film in windows of `every` seconds, at least a frame; the last one is what is left.

    Second s is frame floor(s * rate), where `rate` is the file's average of frames per second. One
    window, if `every` is None, the file cannot be read, or, with a note, if it says no rate.
    """
    total = rate = 0
    if every:
        with suppress(ValueError):  # scoring it says why
            total, rate = length(path)
    if total and not rate:
        Run.say(f"note: {shown(path)} says no frame rate: it is taken as a whole")
    if not rate:
        return [Window(path)]
    step = min(max(every * rate, 1), total)
    count = math.ceil(total / step - 1e-9)  # a rounding error must not add an empty window
    firsts = [int(k * step) for k in range(count)]
    parts = enumerate(pairwise([*firsts, total]))
    return [Window(path, k * step / rate, first, end - first) for k, (first, end) in parts]


def fit_classes(split: Split, classes: list[str], whose: str, these="these videos") -> Split:
    """The split with the labels that its classes have among the `classes` of `whose`, by name.

    Names may be numbers. Where one side has numbers for other names, they are taken as those of the
    other in their order, which is said. ValueError for a class that the others do not have, or a
    number that is not that of the video's folder.
    """
    unnamed = all(re.fullmatch(rf"(class |LABEL_)?{i}", name) for i, name in enumerate(classes))
    known, count, numbers = len(classes), len(split.classes), split.kind == "list"
    # Folders may be called 1, 2, 3: then these are names. Sorted as text, 10 comes before 2.
    values = [str(int(name)) for name in classes if name.isdecimal()]
    if numbers and not unnamed and len({*values}) == known:
        split = relabel(split, values, whose)
    elif not numbers and (not unnamed or {*split.classes} & {*classes}):
        split = relabel(split, classes, whose)
    elif count > known or (count < known and not numbers):
        raise ValueError(f"{whose}: there are {known} classes, {these} have {count}")
    elif unnamed != numbers:
        Run.say(f"note: numbers are taken as names: the classes have the order of {whose}")
    pairs = zip(split.paths, split.labels, strict=True) if numbers and not unnamed else ()
    for path, label in pairs:
        # The longest name of a class among its folders, such as indoor/run before run.
        above = ("/".join(path.parts[i:-1]) for i in range(len(path.parts)))
        if classes[label] != next((name for name in above if name in classes), classes[label]):
            raise ValueError(f"{shown(path)} is listed as {classes[label]}, not as its folder says")
    if 0 < len({*split.labels}) < known:
        Run.say(f"note: {these} are of {len({*split.labels})} of {known} classes of {whose}")
    return replace(split, classes=classes) if numbers else split


# -------------------------------------------------------------------------------- views and scores


class WindowViews(Dataset):
    """Test views of paths or Windows, each from one decode. `cfg`: the settled flags.

    Item i is the views (clips * crops, T, C, size, size) uint8, or why the file cannot be read.
    `keys` stand for the items where results are kept.
    """

    def __init__(self, videos: list, cfg):
        self.windows = [video if isinstance(video, Window) else Window(video) for video in videos]
        self.keys = [f"{identity(w.path)} {w.first} {w.frames}" for w in self.windows]
        self.cfg = cfg

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> Tensor | str:
        window, cfg = self.windows[index], self.cfg

        def pick(total: int) -> list[int]:
            """Frames of all clips, one after the other; they lie in the window."""
            rule = SAMPLING[cfg.sampling][1]
            clips = rule(window.frames or total, cfg.frames, cfg.stride, cfg.clips)
            return [window.first + i for clip in clips for i in clip]

        try:
            clips = read_frames(window.path, pick).split(cfg.frames)
        except ValueError as error:
            return str(error)
        how = (cfg.resolution, cfg.crops, cfg.augment == "torchvision")
        return torch.cat([spatial_views(clip, *how) for clip in clips])


def kept_files(path: Path) -> list[Path]:
    """Where each_video keeps outputs, if any: `path`, and a file for each other process."""
    return [path, *path.parent.glob(f"{path.stem}.[0-9]*.pt")]


SOFTMAX = partial(torch.softmax, dim=1)  # of logits (K, classes)


@torch.no_grad()
def each_video(
    model: nn.Module, views: Dataset, cfg, device, path: Path | None = None, score=SOFTMAX
):  # fmt: skip
    """({index: output on the CPU}, {index: error}) for views (K, T, C, H, W) uint8, or an error.

    An item may also be a tuple: the arguments of the model. `score` is applied to its result.
    Outputs are kept in the file `path`, and taken from there where weights, flags and the item's
    key are the same. It is written at the end, also after Ctrl-C, SIGTERM and SIGUSR1, and every
    ten minutes. Processes share the work, each with a file of its own, and all get all outputs. The
    model stays in evaluation mode.
    """
    dtype, kept, errors, saved = engine.precision_dtype(cfg.precision, device), {}, {}, time.time()
    views_of = "frames stride sampling resolution cube clips crops augment".split()
    about = f"{[getattr(cfg, key, None) for key in views_of]} {dtype} {device}"
    if path:
        digest = hashlib.sha256()
        for tensor in model.state_dict().values():
            digest.update(tensor.cpu().numpy().tobytes())
        about += digest.hexdigest()

    def save() -> None:
        if path and kept:  # each process keeps what is its own
            path.parent.mkdir(parents=True, exist_ok=True)
            own = path.with_suffix(f".{engine.rank()}.pt") if engine.rank() else path
            engine.save_checkpoint(own, **{about: kept})

    for file in kept_files(path) if path else ():
        with suppress(Exception):  # it may be broken, in any of many ways
            kept |= torch.load(file, weights_only=True)[about]
    mine = range(engine.rank(), len(views), engine.processes())
    todo = [i for i in mine if views.keys[i] not in kept]
    batches, pin = [[i] for i in todo], device.type == "cuda"
    loader = make_loader(views, batches, cfg.workers, pin, collate=itemgetter(0))
    model.eval()
    # As Ctrl-C, unless a training that is under way handles them.
    numbers = [n for n in (signal.SIGTERM, signal.SIGUSR1) if signal.getsignal(n) == signal.SIG_DFL]
    before = {n: signal.signal(n, lambda n, _: sys.exit(128 + n)) for n in numbers}
    try:
        items = engine.progress("videos", len(todo), loader, leave=False)
        for index, item in zip(todo, items, strict=True):
            if isinstance(item, str):
                errors[index] = item
                continue
            inputs = item if isinstance(item, tuple) else (item,)
            with engine.autocast(device, dtype):
                out = model(*(x.to(device, non_blocking=True) for x in inputs)).float()
            if not out.isfinite().all():
                errors[index] = f"{views.keys[index]}: output not finite, try --precision fp32"
                continue
            kept[views.keys[index]] = score(out).cpu()
            if time.time() > saved + 600:
                save()
                saved = time.time()
        for results, more in engine.of_all((kept, errors)):
            kept |= results
            errors |= more
        path = path if engine.rank() == 0 else None  # one file of all
    except KeyboardInterrupt:
        Run.say(f"stopped: {path} keeps {len(kept)} videos" if path else "stopped")
        sys.exit(130)
    finally:
        save()
        for number, handler in before.items():
            signal.signal(number, handler)
    return {i: kept[key] for i, key in enumerate(views.keys) if key in kept}, errors


def none_wrong(errors: dict[int, str], then: str) -> None:
    """ValueError where results are missing; `then` they will be made."""
    if errors:
        texts = [*dict.fromkeys(errors.values())]
        names = "; ".join(texts[:20]) + (f"; and {len(texts) - 20} more" if texts[20:] else "")
        advice = f"the others' results are kept: mend the list or the files, {then}"
        raise ValueError(f"{len(errors)} videos cannot be read: {names} ({advice})")


def accuracies(scores: Tensor, labels: list[int]) -> dict[str, float]:
    """Scores of views (videos, K, classes) -> top1, top5, class_mean and view, in %.

    A video's scores are the mean of its views'. class_mean is the mean of the classes' top1, view
    the top1 of single views.
    """
    labels, mean = torch.tensor(labels), scores.mean(dim=1)
    best = mean.topk(min(5, mean.shape[1])).indices == labels[:, None]
    right, view = best[:, 0], scores.argmax(dim=2) == labels[:, None]
    classes = torch.stack([right[labels == label].float().mean() for label in labels.unique()])
    shares = dict(top1=right, top5=best.any(1), class_mean=classes, view=view)
    return {name: 100 * float(share.float().mean()) for name, share in shares.items()}


def knn(train: Tensor, labels: Tensor, test: Tensor, k: int = 20) -> Tensor:
    """Scores (videos, classes) of features (videos, D): votes of the k nearest training videos.

    Nearest by cosine; a vote weighs exp(cosine / 0.07), as in Wu et al. 2018 and DINO (k = 20).
    The scores of a video sum to 1.
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


def write_results(folder: Path, test: Split, cfg, scores: Tensor, **about) -> str:
    """Leave predictions.csv, classes.png, confusion.png and results.json, with `about`.

    scores: softmax (videos, K, classes) of K views. Returns a summary.
    """
    result, rows = accuracies(scores, test.labels), [visualize.PREDICTIONS]
    for path, label, values in zip(test.paths, test.labels, scores.mean(dim=1), strict=True):
        names, values = top_five(values, test.classes)
        name, top5 = test.classes[label], ";".join(names)
        rows.append([path, name, names[0], int(name == names[0]), top5, ";".join(values)])
    write_csv(folder / "predictions.csv", rows)
    visualize.plot_classes(folder / "predictions.csv", folder / "classes.png")
    visualize.plot_confusion(folder / "predictions.csv", folder / "confusion.png")
    # Last and whole: where it is, the other files are there, too.
    about |= result | dict(config=asdict(cfg))
    engine.write_whole(folder / "results.json", json.dumps(about, indent=1) + "\n")
    names = dict(top1="top-1", top5="top-5", class_mean="mean of classes", view="single views")
    if len(test.classes) <= 5:
        del names["top5"]  # it is 100 %
    line = ", ".join(f"{words} {result[key]:.2f} %" for key, words in names.items())
    return f"{cfg.clips} x {cfg.crops} views of {len(test.paths)} test videos: {line}"


def predict(model: nn.Module, classes: list[str], cfg, table: Path, device) -> None:
    """Print and write the best classes of --predict; exit code 1 where something has none."""
    if cfg.classes:
        named = Split([], [], [*read_names(cfg.classes).values()])
        classes = fit_classes(named, classes, cfg.init).classes
    windows, wrong = find_videos(cfg.predict, cfg.data, cfg.every)
    views = WindowViews(windows, cfg)
    # Kept after Ctrl-C, so that the same command goes on. Another one has a file of its own.
    kept = table.with_name(f"predicted-{engine.derive_seed(repr(cfg), *views.keys)}.pt")
    found, errors = each_video(model, views, cfg, device, kept)
    if engine.rank() > 0:
        return
    rows = [["path", "start", "prediction", "probability", "top5", "probabilities"]]
    for i, scores in found.items():
        (path, start, *_), (names, values) = windows[i], top_five(scores.mean(dim=0), classes)
        rows.append([path, f"{start:g}", names[0], values[0], ";".join(names), ";".join(values)])
        lines = [f"{float(v):7.1%}  {name}" for v, name in zip(values, names, strict=True)]
        print(shown(path) + f" from second {start:g}" * bool(cfg.every), *lines, sep="\n  ")
    write_csv(table, rows)
    for file in kept_files(kept):
        file.unlink(missing_ok=True)
    print(f"wrote {table}: {len(found)} predictions")
    name_wrong([*wrong, *errors.values()])


def name_wrong(errors: list[str]) -> None:
    """Name what could not be read and end with exit code 1, if there is any."""
    if errors := [*dict.fromkeys(errors)]:
        print(f"{len(errors)} cannot be read:", *errors, sep="\n  ", file=sys.stderr)
        sys.exit(1)
