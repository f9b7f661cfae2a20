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
    """The training or test videos under folder `data`. What `splits` is decides how they are found:

        folder with classInd.txt         UCF101's official lists; labels from classInd.txt, minus 1
        folder with *_test_split1.txt    HMDB51's official lists; classes in alphabetical order
        file that ends in .json          Something-Something V2's official list
        any other file                   lines `path label` or a table, see annotations.read_list;
                                         paths relative to `data` or absolute; the label may be
                                         missing or -1, names of classes are sorted
        None                             the official lists' folder if it lies in `data` under its
                                         own name, else all videos below `data` but hidden ones;
                                         the name of a video's folder is its class

    Only official lists know a test part: for others, give another file or folder. `classes_file`
    names the classes by number, see annotations.read_names. `missing` videos are an error, or are
    left out ("skip"), which is printed. Counts of the official lists are checked. Names need not be
    UTF-8: they are the file system's bytes. Raises ValueError for missing files and folders,
    malformed lines, a video listed twice (it would count twice), and videos in both parts.
    """
    found = listed(data, splits, fold, train, classes_file)
    absent, line = missing_videos(found.paths)
    if absent:
        if missing == "error" or len(absent) == len(found.paths):
            how = ": `data.py check` lists them all"
            how += ", --missing skip leaves them out" * (missing == "error")
            raise ValueError(line + why_missing(absent[0], Path(data).expanduser(), how))
        found = leave_out(found, absent)
        found.notes.append(f"{line}: they are left out")
    for note in found.notes if engine.rank() == 0 else ():
        print(f"note: {note}")
    return found


def choose(split: Split, videos: list[int]) -> Split:
    """The split with some of its videos only."""
    paths, labels = [split.paths[i] for i in videos], [split.labels[i] for i in videos]
    return replace(split, paths=paths, labels=labels)


def leave_out(split: Split, paths: list[Path]) -> Split:
    """The split without the videos at some paths."""
    out = set(paths)
    return choose(split, [i for i, path in enumerate(split.paths) if path not in out])


def missing_videos(paths) -> tuple[list[Path], str]:
    """(the paths at which there is no file, how many they are and the first in words)."""
    absent = [path for path in paths if not os.path.isfile(path)]
    first = brief(absent[0]) if absent else ""
    return absent, f"{len(absent)} of {len(paths)} listed videos are missing, the first is {first}"


def why_missing(path: Path, data: Path, otherwise: str) -> str:
    """What is there instead of a missing video, and what to do; begins with a colon.

    Case differs after renaming, macOS writes accents as signs of their own (decomposed), and tables
    leave out the endings of files.
    """
    if os.path.isdir(path) and any(ending(name) in annotations.IMAGES for name in os.listdir(path)):
        return f": {frames_line(data, path)}"
    form = lambda name: unicodedata.normalize("NFC", name)
    plain = lambda name: form(form(name).casefold())
    # The first folder or file on the way to it that is not there, and what lies beside.
    gone = next((x for x in [*reversed(path.parents), path] if not os.path.lexists(x)), None)
    for other in sorted(gone.parent.iterdir()) if gone and gone.parent.is_dir() else ():
        video = gone == path and ending(other.name) in annotations.ENDINGS
        if form(other.name) == form(gone.name):
            differs = "the forms of accents"
        elif plain(other.name) == plain(gone.name):
            differs = "upper and lower case"
        elif video and plain(other.stem) == plain(gone.name):
            differs = "the endings"
        else:
            continue
        return f": there is {brief(other)}, only {differs} differ: rename it, or mend the list"
    return otherwise


# Formats of your own: ending of a list's name -> its reader (data, list, fold, train) -> Split.
READERS = {}


def listed(data, splits, fold: int, train: bool, classes_file=None) -> Split:
    """As read_split, without looking whether the videos that a list names are there."""
    if data is None:
        raise ValueError("--data is missing: the folder that holds the videos")
    data, splits = Path(data).expanduser(), Path(splits).expanduser() if splits else None
    if not os.path.isdir(data):
        raise ValueError(f"no folder {data}: --data must name the folder that holds the videos")
    if splits and not os.path.exists(splits):
        want = "--splits must name the official split files' folder or a list"
        raise ValueError(f"no file or folder {splits}: {want}")
    official = (data / name for name in LISTS.values() if os.path.isdir(data / name))
    splits = splits or next(official, None)
    if splits is None:
        found = _read_folder(data)
    elif os.path.isdir(splits):
        found = _read_official(data, splits, fold, train)
    elif splits.suffix in READERS:
        found = READERS[splits.suffix](data, splits, fold, train)
    else:
        found = _read_file(data, splits)
    places = Counter(map(os.path.normpath, found.paths))
    if twice := next((place for place, times in places.items() if times > 1), None):
        both = [path for path in found.paths if os.path.normpath(path) == twice]
        names = " and as ".join(brief(path) for path in dict.fromkeys(both))
        raise ValueError(f"{splits} lists a video twice, as {names}: remove one")
    if not found.paths:
        raise ValueError(f"no videos in {splits or data}")
    if min({*found.labels} - {-1}, default=0) == 1:
        one = "no video has label 0: labels seem to begin at 1; the class 0 stays empty"
        found.notes.append(one)
    return name_classes(found, classes_file) if classes_file else found


def name_classes(split: Split, file: str | Path) -> Split:
    """The split with the classes that a file names, see annotations.read_names.

    Numbers get names, and names get the file's numbers. ValueError where some have none.
    """
    found, count = annotations.read_names(file), len(split.classes)
    names = [*found.values()]
    if split.kind != "list":
        return relabel(split, names, str(file))
    line = f"{file} names {len(names)} classes, the labels go up to {count - 1}"
    if min(found) == 1 <= min({*split.labels} - {-1}, default=0):
        raise ValueError(f"{file} counts from 1, and no video has label 0: let both begin at 0")
    if len(names) < count:
        raise ValueError(f"{line}: name them all")
    notes = split.notes + [line] * (len(names) > count)
    return replace(split, classes=names, kind="named list", notes=notes)


def relabel(split: Split, classes: list[str], whose: str) -> Split:
    """The split with the numbers that its classes have among `classes`; `whose` they are."""
    # A list of numbers has a class for each number up to the largest, used or not.
    used = [split.classes[label] for label in split.labels if label >= 0]
    if unknown := sorted({*(used if split.kind == "list" else split.classes)} - {*classes}):
        raise ValueError(f"{whose}: no class is called {brief(', '.join(unknown))}")
    number = {name: label for label, name in enumerate(classes)}
    labels = [number[split.classes[label]] if label >= 0 else -1 for label in split.labels]
    return replace(split, labels=labels, classes=classes)


# ---------------------------------------------------------------------------------------- folders


def video_files(data: Path) -> tuple[list[Path], list[str]]:
    """(all videos below a folder by their endings, notes on what was passed over).

    Links to folders are followed, but not to one that is read already, nor to one around it.
    """
    hidden = lambda name: name.startswith(".") or name.lower() in SYSTEM
    seen = {*map(str, Path(os.path.realpath(data)).parents)}  # those around it are not read
    places, videos, others = [data], [], []

    def refuse(error: OSError):  # leave nothing out silently
        raise ValueError(f"{shown(error.filename)}: {error.strerror}") from error

    for place in places:  # it gets longer: linked folders come last, as the others name the class
        for folder, folders, files in os.walk(place, onerror=refuse):
            real = os.path.realpath(folder)
            if real in seen:
                others.append(Path(folder))
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(name for name in folders if not hidden(name))
            places += filter(os.path.islink, [Path(folder, name) for name in folders])
            for path in [Path(folder, name) for name in files if not hidden(name)]:
                video = ending(path.name) in annotations.ENDINGS and os.path.isfile(path)
                (videos if video else others).append(path)
    beside = {path.parent for path in videos}
    images = Counter(path.parent for path in others if ending(path.name) in annotations.IMAGES)
    frames = [folder for folder, count in images.items() if count > 4 and folder not in beside]
    notes = [frames_line(data, min(frames))] if frames else []
    if others:
        names = [os.path.relpath(path, data) for path in sorted(others)]
        few = brief(", ".join(names[:3])) + " ..." * (len(names) > 3)
        why = "no videos by their endings, read already, or links to nothing"
        notes.append(f"passed over in {shown(data)}: {len(names)} ({why}): {few}")
    return sorted(videos), notes


def by_name(data: Path, wanted: set[str]) -> dict[str, Path]:
    """{name without ending: file} of the videos below `data`. Of several, the first; it is said."""
    files = video_files(data)[0]
    found = {path.stem: path for path in reversed(files)}
    others = [path for path in files if path.stem in wanted and path != found[path.stem]]
    if others and engine.rank() == 0:
        chosen = f"{shown(found[others[0].stem])} is taken, not {shown(others[0])}"
        print(f"note: {len(others)} videos have the names of others, such as: {chosen}")
    return found


def _read_folder(data: Path) -> Split:
    paths, notes = video_files(data)
    if not paths and notes:
        raise ValueError(f"no videos: {'; '.join(notes)}")
    names = [path.relative_to(data).parent.as_posix() for path in paths]
    classes = sorted(set(names) - {"."})
    labels = {name: label for label, name in enumerate(classes)}
    return Split(paths, [labels.get(name, -1) for name in names], classes, notes=notes)


# ------------------------------------------------------------------------------------------ lists


def _read_file(data: Path, file: Path) -> Split:
    json = file.suffix.lower() == ".json"
    found = annotations.read_json(file) if json else annotations.read_list(data, file)
    (names, labels, classes), there = found, {}
    if names and isinstance(names[0], tuple):  # ids: their files may lie in folders of classes
        there = by_name(data, {candidate for name in names for candidate in name})
        end = ".webm" if json else ".mp4"
        names = [next(filter(there.get, name), name[0] + end) for name in names]
    kind = "list" if classes == [str(n) for n in range(len(classes))] else "named list"
    return Split([there.get(name, data / name) for name in names], labels, classes, kind)


def _read_official(data: Path, splits: Path, fold: int, train: bool) -> Split:
    if os.path.isfile(splits / "classInd.txt"):
        name, (classes, parts) = "ucf101", _read_ucf101(splits, fold)
    elif any(splits.glob("[!.]*_test_split?.txt")):  # but ._x of macOS
        name, (classes, parts) = "hmdb51", _read_hmdb51(splits, fold)
    else:
        kinds = "classInd.txt (UCF101) nor *_test_split1.txt (HMDB51)"
        raise ValueError(f"{splits} holds neither {kinds}")
    # UCF101's v_Class_g08_c01.avi is clip 1 of group 8; the clips of a group are of one film.
    films = [{re.sub(r"_c\d+\.avi$", "", video) for video, _ in part} for part in parts]
    if films[0] & films[1]:
        both = brief(min(films[0] & films[1]))
        raise ValueError(f"{splits}: {both} is in both the training and the test list")
    counts = tuple(map(len, parts))
    official = COUNTS.get((name, len(classes), fold), counts)
    if counts != official:
        has = "{} split {} has {} training and {} test videos, these lists have {} and {}"
        raise ValueError(has.format(name.upper(), fold, *official, *counts))
    chosen = parts[0 if train else 1]
    paths, labels = [data / video for video, _ in chosen], [label for _, label in chosen]
    return Split(paths, labels, classes, name)


def _read_ucf101(splits: Path, fold: int) -> tuple[list[str], list[list[tuple[str, int]]]]:
    """(classes, [(video, label) of the training part, of the test part])."""
    entries = [line.split() for line in list_lines(splits / "classInd.txt").values()]
    if any(len(entry) != 2 or entry[0] != str(i + 1) for i, entry in enumerate(entries)):
        want = "lines must read `number class`, numbered from 1"
        raise ValueError(f"{splits / 'classInd.txt'}: {want}")
    labels, parts = {name: label for label, (_, name) in enumerate(entries)}, []
    for part in ("trainlist", "testlist"):
        file = splits / f"{part}{fold:02}.txt"
        parts.append([])
        for line in list_lines(file).values():
            video, *number = line.split()  # lines of the training list end with the number
            label = labels.get(video.split("/")[0])
            if label is None or number not in ([], [str(label + 1)]):
                want = "must read `Class/video [number]` as in classInd.txt"
                raise ValueError(f"{file}: line '{brief(line)}' {want}")
            parts[-1].append((video, label))
    return list(labels), parts


def _read_hmdb51(splits: Path, fold: int) -> tuple[list[str], list[list[tuple[str, int]]]]:
    suffix = f"_test_split{fold}.txt"
    files = sorted(splits.glob("[!.]*" + suffix))
    if not files:
        raise ValueError(f"no files *{suffix} in {splits}")
    classes, parts = [file.name.removesuffix(suffix) for file in files], [[], [], []]
    for label, file in enumerate(files):
        for line in list_lines(file).values():
            name, _, part = line.rpartition(" ")
            if part not in ("0", "1", "2"):
                want = "must end in 0 (unused), 1 (train) or 2 (test)"
                raise ValueError(f"{file}: line '{brief(line)}' {want}")
            parts[int(part)].append((f"{classes[label]}/{name.strip()}", label))
    return classes, parts[1:]
