"""Which files belong to a data set: official lists, own lists, folders."""

import os
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

from lib import annotations, engine
from lib.annotations import brief, ending, frames_line, list_lines
from lib.video import shown


@dataclass
class Split:
    """Files of one part of a data set; `labels` are class numbers from 0, or -1 for no label.

    `kind`: "ucf101" or "hmdb51" for their official lists, "list" for another one that has numbers
    for classes, "named list" for one that has their names, "" for a folder.
    `notes`: what its reader should know, such as what was left out.
    """

    paths: list[Path]
    labels: list[int]
    classes: list[str]
    kind: str = ""
    notes: list[str] = field(default_factory=list, compare=False)


LISTS = {"ucf101": "ucfTrainTestlist", "hmdb51": "testTrainMulti_7030_splits"}  # official folders
# Official numbers: data set, classes, fold -> training and test videos.
COUNTS = {("hmdb51", 51, fold): (3570, 1530) for fold in (1, 2, 3)}
COUNTS["ucf101", 101, 1] = (9537, 3783)
COUNTS["ucf101", 101, 2] = (9586, 3734)
COUNTS["ucf101", 101, 3] = (9624, 3696)
# What systems leave beside files, but for what begins with a dot.
SYSTEM = "__macosx thumbs.db ehthumbs.db desktop.ini @eadir $recycle.bin".split()


def read_split(
    data, splits=None, fold: int = 1, train: bool = True, missing: str = "error", classes_file=None
) -> Split:
    """The training or test videos of the folder `data`; docs/data.md has the table of `splits`.

    Official lists that lie in `data` under their own names are found. Other lists and folders know
    no test part. `classes_file`: see name_classes. `missing` videos are an error, or are left out
    ("skip"). What was left out is printed. Names need not be UTF-8. Raises ValueError for missing
    files and folders, malformed lines, a video listed twice (it would count twice), videos or
    groups in both parts, and official lists with other counts than published.
    """
    found = listed(data, splits, fold, train, classes_file)
    absent = missing_videos(found)
    if absent:
        line = f"{len(absent)} of {len(found.paths)} listed videos are missing"
        line += f", the first is {brief(absent[0])}"
        if missing == "error" or len(absent) == len(found.paths):
            raise ValueError(line + why_missing(absent[0], Path(data).expanduser()))
        pairs = zip(found.paths, found.labels, strict=True)
        kept = {path: label for path, label in pairs if os.path.isfile(path)}
        notes = [*found.notes, f"{line}: they are left out"]
        found = replace(found, paths=[*kept], labels=[*kept.values()], notes=notes)
    for note in found.notes if engine.rank() == 0 else ():
        print(f"note: {note}")
    return found


def missing_videos(split: Split) -> list[Path]:
    """The paths of a split at which there is no file."""
    return [path for path in split.paths if not os.path.isfile(path)]


def why_missing(path: Path, data: Path) -> str:
    """What is there instead of a missing video, and what to do; begins with a colon."""
    if os.path.isdir(path) and any(ending(name) in annotations.IMAGES for name in os.listdir(path)):
        return f": {frames_line(data, path)}"
    there, differs = nearly(path)
    if there:
        return f": there is {brief(there)}, only {differs} differ: rename it"
    return ": `data.py check` lists them all, --missing skip leaves them out"


def nearly(path: Path) -> tuple[Path | None, str]:
    """(what there is under almost the name of a missing file, what differs), or (None, "").

    Case differs after renaming, and macOS writes accents as signs of their own (decomposed).
    """
    form = lambda name: unicodedata.normalize("NFC", str(name))
    plain = lambda name: form(name).casefold()
    there = Path(path.anchor)
    for name in path.parts[bool(path.anchor) :]:
        if not os.path.lexists(there / name) and os.path.isdir(there):
            alike = (other for other in sorted(os.listdir(there)) if plain(other) == plain(name))
            name = next(alike, name)
        there /= name
    if there == path or not os.path.lexists(there):
        return None, ""
    return there, "the forms of accents" if form(there) == form(path) else "upper and lower case"


def check_kind(split: Split, preset: str, data: str) -> None:
    """ValueError where the recipe of UCF101 or HMDB51 meets the other's lists, or none.

    Without lists, pre-training would take the test videos as well.
    """
    wanted = preset.removesuffix("-short")
    if wanted in LISTS and split.kind not in (wanted, "list", "named list"):
        found = f"the lists of {split.kind}" if split.kind else "no lists"
        advice = f"name those of {wanted} with --splits; `python data.py check {wanted}` helps"
        raise ValueError(f"{data} has {found}: {advice}")


# Formats of your own: ending of a list's name -> its reader (data, list, fold, train) -> Split.
READERS = {}


def listed(data, splits, fold: int, train: bool, classes_file=None) -> Split:
    """As read_split, without looking whether the videos that a list names are there."""
    if data is None:
        raise ValueError("--data is missing: the folder that holds the videos")
    data, splits = Path(data).expanduser(), Path(splits).expanduser() if splits else None
    if not os.path.isdir(data):
        raise ValueError(f"no folder {data}: --data must name the folder that holds the videos")
    official = (data / name for name in LISTS.values() if os.path.isdir(data / name))
    splits = splits or next(official, None)
    if splits is None:
        found = _read_folder(data)
    elif os.path.isdir(splits):
        found = _read_official(data, splits, fold, train)
    elif splits.suffix in READERS:
        found = READERS[splits.suffix](data, splits, fold, train)
    else:
        found = _read_list(data, splits)
    times = Counter(map(os.path.normpath, found.paths))
    if twice := [path for path, count in times.items() if count > 1]:
        raise ValueError(f"{splits} lists {brief(twice[0])} twice: remove one")
    if not found.paths:
        raise ValueError(f"no videos in {splits or data}")
    if classes_file:
        found = name_classes(found, classes_file)
    if min({*found.labels} - {-1}, default=0) == 1:
        one = "no video has label 0: labels seem to begin at 1; the class 0 stays empty"
        found.notes.append(one)
    return found


def name_classes(split: Split, file: str | Path) -> Split:
    """The split with the classes that a file names, see annotations.read_names.

    Numbers get names, and names get the file's numbers. ValueError where some have none.
    """
    names, count = annotations.read_names(file), len(split.classes)
    if split.kind != "list":
        return relabel(split, names, str(file))
    if len(names) < count:
        raise ValueError(f"{file} names {len(names)} of {count} classes: name them all")
    return replace(split, classes=names, kind="named list")


def relabel(split: Split, classes: list[str], whose: str) -> Split:
    """The split with the numbers that its classes have among `classes`; `whose` they are."""
    if unknown := sorted({*split.classes} - {*classes}):
        raise ValueError(f"{whose}: no class is called {brief(', '.join(unknown))}")
    names = [split.classes[label] if label >= 0 else "" for label in split.labels]
    return replace(split, labels=numbered(names, classes), classes=classes)


def numbered(names: list[str], classes: list[str]) -> list[int]:
    """The number of each name among the classes, -1 where it is none of them."""
    number = {name: label for label, name in enumerate(classes)}
    return [number.get(name, -1) for name in names]


# ---------------------------------------------------------------------------------------- folders


def hidden(name: str) -> bool:
    """Whether a file or folder is not the user's own: ._x of macOS, .x, __MACOSX, Thumbs.db ..."""
    return name.startswith(".") or name.lower() in SYSTEM


def video_files(data: Path) -> tuple[list[Path], list[str]]:
    """(all videos below a folder by their endings, notes on what was passed over).

    Links to folders are followed, but not to one that is read already, nor to one around it.
    """

    def fail(error: OSError):  # leave nothing out silently
        raise ValueError(f"{shown(error.filename)}: {error.strerror}") from error

    root, seen, videos, others = os.path.realpath(data), set(), [], []
    for folder, folders, files in os.walk(data, onerror=fail, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen or (real != root and root.startswith(os.path.join(real, ""))):
            others.append(Path(folder))
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not hidden(name)]
        # Links come last: the folder itself names the class.
        folders.sort(key=lambda name: (os.path.islink(os.path.join(folder, name)), name))
        for path in (Path(folder, name) for name in files if not hidden(name)):
            known = ending(path.name) in annotations.ENDINGS and os.path.isfile(path)
            (videos if known else others).append(path)
    notes, names = [], [os.path.relpath(path, data) for path in sorted(others)]
    if others:
        few = brief(", ".join(names[:3])) + " ..." * (len(names) > 3)
        why = "no videos by their endings, or read already"
        notes.append(f"passed over in {shown(data)}: {len(names)} ({why}): {few}")
    images = [path for path in others if ending(path.name) in annotations.IMAGES]
    if images and not videos:
        notes.insert(0, frames_line(data, min(images).parent))
    return sorted(videos), notes


def _read_folder(data: Path) -> Split:
    paths, notes = video_files(data)
    if not paths and notes:
        raise ValueError(f"no videos: {'; '.join(notes)}")
    names = [path.relative_to(data).parent.as_posix() for path in paths]
    classes = sorted(set(names) - {"."})
    return Split(paths, numbered(names, classes), classes, notes=notes)


# ------------------------------------------------------------------------------------------ lists


def _read_list(data: Path, file: Path) -> Split:
    """A text file or Something-Something's JSON; a file beside that has the numbers of classes."""
    json = file.suffix.lower() == ".json"
    read = annotations.read_json if json else annotations.read_list
    names, labels, end = read(data, file)
    given = {*labels} - {"-1"}
    numbers = [int(label) for label in given if label.isdecimal()]
    if 0 < len(numbers) < len(given):
        both = f"numbers and names as labels, such as {max(numbers)} and '{brief(max(given))}'"
        raise ValueError(f"{file} has {both}: write names only, or numbers only")
    classes = [str(i) for i in range(max(numbers) + 1)] if numbers else sorted(given)
    paths = [data / name for name in names]
    if end:  # ids: their videos lie anywhere below `data`, Kinetics' with or without _SSSSSS_EEEEEE
        there = {path.stem: path for path in reversed(video_files(data)[0])}
        paths = [there.get(i) or there.get(i[:-14]) or data / f"{i}{end}" for i in names]
    kind = "named list" if given and not numbers else "list"
    found = Split(paths, numbered(labels, classes), classes, kind)
    beside = (
        file.with_name(name) for name in ("something-something-v2-labels.json", "labels.json")
    )
    file = next(filter(os.path.isfile, beside), None) if json else None
    return name_classes(found, file) if file else found


def _read_official(data: Path, splits: Path, fold: int, train: bool) -> Split:
    """UCF101's lists have lines `Class/video [number]`, HMDB51's list of a class `video part`."""
    files = sorted(path for path in splits.glob(f"*_test_split{fold}.txt") if not hidden(path.name))
    if os.path.isfile(splits / "classInd.txt"):
        name, classes = "ucf101", annotations.read_names(splits / "classInd.txt")
        files = [splits / f"{part}list{fold:02}.txt" for part in ("train", "test")]
        parts = [[line.split()[0] for line in list_lines(file).values()] for file in files]
    elif files:
        name, parts = "hmdb51", [[], [], []]
        classes = [file.name.rpartition("_test_split")[0] for file in files]
        for folder, file in zip(classes, files, strict=True):
            for line in list_lines(file).values():
                video, _, part = line.rpartition(" ")
                if part not in ("0", "1", "2"):
                    want = "must end in 0 (unused), 1 (train) or 2 (test)"
                    raise ValueError(f"{file}: line '{brief(line)}' {want}")
                parts[int(part)].append(f"{folder}/{video.strip()}")
        parts = parts[1:]
    else:
        kinds = f"classInd.txt (UCF101) nor *_test_split{fold}.txt (HMDB51)"
        raise ValueError(f"{splits} holds neither {kinds}")
    # UCF101's v_Class_g08_c01.avi is clip 1 of group 8; the clips of a group are of one film.
    films = [{re.sub(r"_c\d+\.avi$", "", video) for video in part} for part in parts]
    if films[0] & films[1]:
        both = brief(min(films[0] & films[1]))
        raise ValueError(f"{splits}: {both} is in both the training and the test list")
    counts = tuple(len(part) for part in parts)
    official = COUNTS.get((name, len(classes), fold), counts)
    if counts != official:
        has = "{} split {} has {} training and {} test videos, these lists have {} and {}"
        raise ValueError(has.format(name.upper(), fold, *official, *counts))
    videos = parts[0 if train else 1]
    labels = numbered([video.split("/")[0] for video in videos], classes)
    return Split([data / video for video in videos], labels, classes, name)
