"""AVA's files, as published, and its metric: who does what in which second of a film.

A box is (x1, y1, x2, y2) in shares of width and height, from 0 to 1. A frame is (video, second).
"""

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torchvision.ops import box_iou

from lib.annotations import brief, list_lines
from lib.lists import by_name
from lib.run import Run

Box = tuple[float, float, float, float]
Frame = tuple[str, int]
Truth = dict[Frame, dict[Box, set[int]]]  # who does what
ACTIONS = "ava_action_list_v2.2_for_activitynet_2019.pbtxt"  # the 60 that are evaluated
TRAIN, TEST = "ava_train_v2.2.csv", "ava_val_v2.2.csv"
EXCLUDED = "ava_val_excluded_timestamps_v2.2.csv"
BOXES = "ava_detection_val_boxes_and_labels.csv"  # of a person detector


# ------------------------------------------------------------------------------------------ files


@dataclass
class Annotations:
    """What AVA's files say. Frames that are not evaluated are in neither `test` nor `found`."""

    names: dict[int, str]  # of the actions that are evaluated, by their numbers from 1
    classes: list[str]  # names of all actions, in the order of their numbers
    films: dict[str, Path]
    train: Truth
    test: Truth
    found: dict[Frame, dict[Box, float]]  # detected in the test part, with scores


def read(cfg) -> Annotations:
    """What the files of --data, --splits and --boxes say. ValueError where they do not fit."""
    if not cfg.data or cfg.fold != 1:
        raise ValueError("name the folder of the films with --data; AVA has no --fold")
    data, folder = (Path(x).expanduser() for x in (cfg.data, cfg.splits or cfg.data))
    names = read_actions(folder / ACTIONS, cfg.actions)
    classes = [names.get(i, f"action {i}") for i in range(1, cfg.actions + 1)]
    excluded = read_excluded(folder / EXCLUDED)
    boxes = Path(cfg.boxes).expanduser() if cfg.boxes else folder / BOXES
    train = {} if cfg.eval_only else read_truth(folder / TRAIN, cfg.actions)
    test = read_truth(folder / TEST, cfg.actions)
    if not (found := read_boxes(boxes, cfg.threshold)):
        raise ValueError(f"{boxes} has no box of score {cfg.threshold:g} or more (--threshold)")
    if others := {video for video, _ in found} - {video for video, _ in test}:
        raise ValueError(f"{boxes} has boxes of {min(others)}, which {TEST} does not know")
    test, found = ({f: x for f, x in part.items() if f not in excluded} for part in (test, found))
    if both := train.keys() & test.keys():
        raise ValueError("{} and {} both have {}, second {}".format(TRAIN, TEST, *min(both)))

    wanted = {video for video, _ in train | test}
    films = by_name(data, wanted)
    if missing := wanted - films.keys():
        line = f"{len(missing)} of {len(wanted)} films are not in {data}, such as {min(missing)}"
        if cfg.missing == "error" or len(missing) == len(wanted):
            raise ValueError(f"{line}: see docs/data.md; --missing skip leaves them out")
        Run.say(f"{line}: they are left out")
    parts = ({f: x for f, x in part.items() if f[0] in films} for part in (train, test, found))
    return Annotations(names, classes, films, *parts)


def read_actions(path: Path, count: int) -> dict[int, str]:
    """A label map: {number from 1 to `count`: name}. ValueError where it is something else."""
    text = "\n".join(x for x in list_lines(path).values() if not x.startswith("#"))
    items = re.findall(r"(?:item|label)\s*\{(.*?)\}", text, re.DOTALL)
    names = [re.search(r"\bname:\s*\"([^\"]*)\"", item) for item in items]
    numbers = [re.search(r"\b(?:label_)?id:\s*(\d+)", item) for item in items]
    if not items or None in names or None in numbers:
        raise ValueError(f'{path} must hold items such as: item {{ name: "walk" id: 14 }}')
    found = {int(n[1]): name[1] for n, name in zip(numbers, names, strict=True)}
    unique = len(found) == len({*found.values()}) == len(items)
    if not unique or min(found) < 1 or max(found) > count:
        raise ValueError(f"{path}: numbers (1 to {count}, see --actions) and names must be unique")
    return found


def read_truth(path: Path, count: int) -> Truth:
    """What persons do: `video,second,x1,y1,x2,y2,action[,person]`, a line per action of a person.

    ValueError, with the line, for a malformed one, a box outside, or an action not in 1 to `count`.
    """
    truth = {}
    for line, frame, box, (action, *_) in _rows(path, 7, "action[,person]"):
        if not action.isdecimal() or not 1 <= int(action) <= count:
            what = f"unknown action {brief(action)}, not 1 to {count} (--actions)"
            raise ValueError(f"{line}: {what}")
        truth.setdefault(frame, {}).setdefault(box, set()).add(int(action))
    return truth


def read_boxes(path: Path, threshold: float) -> dict[Frame, dict[Box, float]]:
    """{frame: {box: score}} of a detector, from lines `video,second,x1,y1,x2,y2,action,score`.

    Only those that score at least `threshold`. The action may be empty and is not read; a box with
    several lines is one box. ValueError, with the line, for a malformed one.
    """
    boxes = {}
    for line, frame, box, (_, score, *_) in _rows(path, 8, "action,score"):
        try:
            score = float(score)
        except ValueError:
            score = -1.0
        if not 0 <= score <= 1:
            raise ValueError(f"{line}: the last number must be a score from 0 to 1")
        if score >= threshold:
            others = boxes.setdefault(frame, {})
            others[box] = max(score, others.get(box, 0.0))
    return boxes


def read_excluded(path: Path) -> set[Frame]:
    """Frames that are not evaluated: `video,second`. ValueError for a malformed line."""
    found = set()
    for number, line in list_lines(path).items():
        video, _, second = line.rpartition(",")
        if not video or not second.isdecimal():
            raise ValueError(f"{path}: line {number} '{brief(line)}' must read `video,second`")
        found.add((video, int(second)))
    return found


def _rows(path: Path, least: int, rest: str) -> Iterator[tuple[str, Frame, Box, list[str]]]:
    """Yield (where the line is, frame, box, further columns); `least` columns, named by `rest`."""
    for number, line in list_lines(path).items():
        where, cells = f"{path}: line {number} '{brief(line)}'", next(csv.reader([line]))
        try:
            video, second, *box = cells[0], int(cells[1]), *map(float, cells[2:6])
        except (ValueError, IndexError):
            cells = []
        if len(cells) < least:
            raise ValueError(f"{where} must read `video,second,x1,y1,x2,y2,{rest}`")
        x1, y1, x2, y2 = box
        if not (0 <= x1 <= x2 <= 1 and 0 <= y1 <= y2 <= 1):
            raise ValueError(f"{where}: the box must lie within 0 and 1, x1 <= x2, y1 <= y2")
        yield where, (video, second), tuple(box), cells[6:]


# ----------------------------------------------------------------------------------------- metric


def average_precisions(
    found: dict[Frame, tuple[np.ndarray, np.ndarray]], truth: Truth, actions: list[int]
) -> dict[int, float]:
    """{action: average precision, nan where no person does it}; their mean is AVA's metric.

    `found`: boxes (M, 4) and scores (M, actions) of frames, those of columns `actions`. Frames
    without truth count as well: all that is found there is wrong.
    """
    nothing = np.zeros((0, 4)), np.zeros((0, len(actions)))
    positives, scores, rights = np.zeros(len(actions)), [nothing[1]], [nothing[1]]
    for frame in sorted(found.keys() | truth.keys()):
        persons = truth.get(frame, {})
        labels = np.array([[a in does for a in actions] for does in persons.values()], dtype=bool)
        labels = labels.reshape(len(persons), len(actions))
        positives += labels.sum(axis=0)
        boxes, score = found.get(frame, nothing)
        scores.append(score)
        rights.append(match(boxes, score, np.array([*persons]).reshape(-1, 4), labels))
    scores, rights = np.concatenate(scores), np.concatenate(rights)
    columns = zip(actions, scores.T, rights.T, positives, strict=True)
    return {action: average_precision(*column) for action, *column in columns}


def match(boxes: np.ndarray, scores: np.ndarray, persons: np.ndarray, labels: np.ndarray):
    """Which detections of a frame are right: (M, A) bool, for M boxes and A actions.

    boxes (M, 4), scores (M, A), true boxes `persons` (P, 4), what they do `labels` (P, A) bool.
    From the best score down, a detection takes the person of that action whom it overlaps most. It
    is right if that is by half or more (intersection over union), and none took the person before.
    """
    right = np.zeros(scores.shape, bool)
    overlap = box_iou(torch.from_numpy(boxes).double(), torch.from_numpy(persons).double()).numpy()
    for action in labels.any(axis=0).nonzero()[0]:
        own, taken = overlap[:, labels[:, action]], set()
        for i in np.argsort(-scores[:, action], kind="stable"):
            best = int(own[i].argmax())
            if own[i, best] >= 0.5 and best not in taken:
                right[i, action] = True
                taken.add(best)
    return right


def average_precision(scores: np.ndarray, right: np.ndarray, positives: float) -> float:
    """Area under the precision-recall curve of detections (M,), nan for no positives.

    At each recall, precision is the best that is reached there or at a higher one. Detections of
    one score come in together, so that their order does not matter.
    """
    if not positives:
        return float("nan")
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.diff(scores[order]) != 0, True)[: len(order)]  # of each score
    hits = right[order].cumsum()
    precision, recall = (hits / np.arange(1, len(order) + 1))[last], (hits / positives)[last]
    best = np.maximum.accumulate(precision[::-1])[::-1]
    return float((np.diff(recall, prepend=0) * best).sum())
