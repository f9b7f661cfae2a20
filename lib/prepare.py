"""Whole data sets: `check` (decode all once) and `prepare` (rewrite all for speed).

`check` and `prepare` exit with 0 when all is well, 1 when files are broken, and 2 when something is
missing. data.py says how to call them.
"""

import argparse
import contextlib
import csv
import json
import math
import os
import shlex
import shutil
import sys
import time
from collections import Counter
from itertools import zip_longest
from pathlib import Path

import av
import numpy as np

from data import TOY, fitting_stride
from lib import engine
from lib.annotations import list_lines
from lib.lists import LISTS, Split, check_kind, hidden, listed, missing_videos, nearly, read_split
from lib.processes import in_processes
from lib.toy import MOTIONS as MOTIONS
from lib.toy import STILL, make_toy
from lib.video import Probe, played, shown, upright


def training_videos(
    preset: str, data: str | None, splits: str | None, fold: int, missing="error", classes=None
) -> Split:
    """The training videos, see read_split. The toy set is written where it is asked for."""
    if data == TOY:
        engine.in_first_process(make_toy, TOY)
    split = read_split(data, splits, fold, missing=missing, classes_file=classes)
    check_kind(split, preset, data)
    return split


# ------------------------------------------------------------------------------ check a data set

STRIDES = {"ucf101": 4, "hmdb51": 2, "own": 4}  # of the recipes, in frames
BATCH = 192  # of the recipes ucf101 and hmdb51, in videos
CLASSES = {"ucf101": 101, "hmdb51": 51}
PATTERNS = {"ucf101": "classInd.txt", "hmdb51": "*_test_split?.txt"}  # files of the official lists
SOURCES = {
    "ucf101": """UCF101 is on https://www.crcv.ucf.edu/data/UCF101.php: download UCF101.rar and
UCF101TrainTestSplits-RecognitionTask.zip (not DetectionTask) and unpack both, keeping folders:
    unrar x UCF101.rar
    unzip UCF101TrainTestSplits-RecognitionTask.zip
This leaves UCF-101/ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi and ucfTrainTestlist/classInd.txt:
    python data.py check ucf101 --data UCF-101 --splits ucfTrainTestlist""",
    "hmdb51": """HMDB51 is on https://serre-lab.clps.brown.edu/resource/hmdb-a-large-human-motion-database/:
download hmdb51_org.rar, which holds one .rar per class, and test_train_splits.rar, and unpack all:
    mkdir hmdb51 && unrar x hmdb51_org.rar hmdb51/
    (cd hmdb51 && for f in *.rar; do unrar x "$f" && rm "$f"; done)
    unrar x test_train_splits.rar
This leaves hmdb51/brush_hair/*.avi ... and testTrainMulti_7030_splits/brush_hair_test_split1.txt:
    python data.py check hmdb51 --data hmdb51 --splits testTrainMulti_7030_splits""",
}  # fmt: skip


def _find_lists(dataset: str, data: Path, splits: Path | None) -> Path | None:
    """Where a data set's lists are; ValueError, with what to do, if they or `data` are missing."""
    if dataset not in LISTS:
        return splits
    if not data.is_dir():
        want = "--data must name the folder that holds the videos"
        raise ValueError(f"no folder {data}: {want}\n{SOURCES[dataset]}")
    pattern = PATTERNS[dataset]
    folder = splits or data / LISTS[dataset]
    if any(folder.glob(pattern)):
        return folder
    missing = f"--splits is missing, and {data} holds no {LISTS[dataset]}"
    error = f"no {pattern} in {folder}" if splits else missing
    for place in (folder, folder.parent, data, data.parent):
        found = sorted(path.parent for way in ("", "*/") for path in place.glob(way + pattern))
        if found:
            use = f"the lists are in {found[0]}, use --splits {shlex.quote(str(found[0]))}"
            raise ValueError(f"{error}: {use}")
    if dataset == "ucf101" and any(folder.glob("**/trainlist01.txt")):
        error += ": are these the lists of the detection task?"
    raise ValueError(f"{error}\n{SOURCES[dataset]}")


def _present(dataset: str, data: Path, *parts: Split) -> list[Path]:
    """All videos of some parts, each once; ValueError, with what to do, if one is missing."""
    paths = list(dict.fromkeys(path for part in parts for path in part.paths))
    missing = list(dict.fromkeys(path for part in parts for path in missing_videos(part)))
    if missing:
        error = f"{len(missing)} of {len(paths)} listed videos are missing, the first is "
        error += shown(missing[0])
        if len(missing) < len(paths):
            folder = Path("runs") / f"check-{dataset}"
            error += f" ({_write_lists(folder, data, missing, parts[:2])})"
        raise ValueError(error + _explain(dataset, data, missing, len(paths)))
    return paths


def _write_lists(folder: Path, data: Path, missing: list[Path], parts: tuple) -> str:
    """Leave all missing paths, and lists of the videos that are there; says so in a line."""
    folder.mkdir(parents=True, exist_ok=True)
    out, files = set(missing), {"missing.txt": [[str(path)] for path in missing]}
    for name, part in zip(("train.csv", "test.csv"), parts, strict=False):
        videos = zip(part.paths, part.labels, strict=True)
        kept = [(os.path.relpath(path, data), label) for path, label in videos if path not in out]
        files[name] = [("path", "label"), *kept]
    if len(parts) > 1 and parts[0] == parts[1]:
        del files["test.csv"]  # a list or a folder, which has no test part
    if parts[0].kind != "list" and parts[0].classes:
        files["classes.txt"] = [[name] for name in parts[0].classes]
    for name, rows in files.items():
        with open(folder / name, "w", newline="", errors="surrogateescape") as file:
            if name.endswith(".csv"):
                csv.writer(file, lineterminator="\n").writerows(rows)
            else:
                file.writelines(f"{row[0]}\n" for row in rows)
    others = [f"--{flag} {folder / name}" for flag, name in FILES.items() if name in files]
    return f"all are in {folder / 'missing.txt'}; those that are there: {' '.join(others)}"


FILES = {"splits": "train.csv", "test-splits": "test.csv", "classes": "classes.txt"}  # by flag


def _explain(dataset: str, data: Path, missing: list[Path], total: int) -> str:
    """Which of the usual mistakes it is that videos are missing; else what to download."""
    name = missing[0].relative_to(data) if missing[0].is_relative_to(data) else missing[0]
    if name.name in ("", "..") or name.is_absolute():
        return ""
    files = [Path(folder, file) for folder, _, names in os.walk(data) for file in names]
    there, differs = nearly(missing[0])
    if there:
        return f": there is {shown(there)}, only {differs} differ: rename it"
    places = [folder for folder in data.absolute().parents if os.path.isfile(folder / name)]
    below = sorted(path for path in files if path.name == name.name)
    depth = len(name.parts)
    places += [path.parents[depth - 1] for path in below if path.parts[-depth:] == name.parts]
    if places:
        return f": it is in {places[0]}, use --data {shlex.quote(str(places[0]))}"
    if below:
        keep = "`unrar x` keeps folders, `unrar e` does not"
        return f": it lies at {below[0]}, without its folder; {keep}"
    packed = sorted(path for path in files if path.name == f"{name.parts[0]}.rar")
    if packed:
        loop = 'for f in *.rar; do unrar x "$f" && rm "$f"; done'
        return f": {packed[0]} is still packed; (cd {shlex.quote(str(packed[0].parent))} && {loop})"
    folders = sorted({path.parent.name for path in missing if not os.path.isdir(path.parent)})
    text = ""
    if folders and len(missing) < total:
        text = f", folders that are not there: {', '.join(folders)}"
    return f"{text}\n{SOURCES[dataset]}" if dataset in SOURCES else text


def _probe(path: Path, alive) -> Probe | str:
    found = Probe()
    try:
        for _ in played(path, found):
            alive()
    except ValueError as error:
        return str(error).removeprefix(f"{shown(path)}: ")
    return found


def _next(dataset: str, train: Split, broken: dict[Path, str], **flags) -> None:
    """Print what comes next: mend files, then a command that works on these videos.

    Training ends where over a tenth is broken. Few videos of a recipe's data get the recipe own.
    """
    if broken:
        advice = "unpack or download the broken files again"
        print(f"next: {advice}; training leaves them out, up to a tenth of its videos")
    if len(broken.keys() & set(train.paths)) > len(train.paths) / 10:
        return
    words = [dataset] if dataset in LISTS and len(train.paths) >= BATCH else []
    for name, value in flags.items():
        words += [f"--{name}", str(value)] if value else []
    print("next:", shlex.join(["python", "pretrain.py", *words]))


def check(dataset: str, data: str, splits: str | None, fold: int, workers: int) -> int:
    """Decode every video of both parts of a data set; print what is there and what is broken.

    `dataset` is "ucf101", "hmdb51" or "own", `workers` a number of processes, the others are as in
    read_split. Returns 0, or 1 where files are broken. Raises ValueError where folders, lists or
    videos are missing or wrong; it says what to do.
    """
    if workers < 1:
        raise ValueError(f"--workers {workers} must be at least 1")
    data, splits = Path(data).expanduser(), Path(splits).expanduser() if splits else None
    splits = _find_lists(dataset, data, splits)
    train, test = (listed(data, splits, fold, part) for part in (True, False))
    paths = _present(dataset, data, train, test)
    test_part = "no test part" if test == train else f"{len(test.paths)} test videos"
    classes = len(train.classes)
    for note in dict.fromkeys(train.notes + test.notes):
        print(f"note: {note}")
    print(f"{len(train.paths)} training videos, {test_part}, {classes} classes", flush=True)
    if classes != CLASSES.get(dataset, classes):
        task = ": are these of the detection task?" if classes == 24 else ""
        print(f"note: the official lists have {CLASSES[dataset]} classes{task}")

    begin = time.monotonic()
    found = in_processes(_probe, paths, workers)
    found = dict(engine.progress("decoding", len(paths), found, unit="video"))
    seconds, problems = time.monotonic() - begin, {}
    for path in paths:
        problem = found[path] if isinstance(found[path], str) else found[path].problem
        if problem:
            problems[path] = problem
            print(f"broken: {shown(path)}: {problem}")
    done = f"{len(paths)} videos decoded in {seconds:.0f} s with {workers} processes"
    print(f"{done}, {len(problems)} broken")
    good = [found[path] for path in paths if path not in problems]
    if good:
        _describe(good, STRIDES[dataset])
    _next(dataset, train, problems, data=data, splits=splits, fold=fold if fold > 1 else None)
    return int(bool(problems))


def _describe(probes: list[Probe], stride: int) -> None:
    counts = sorted(file.frames for file in probes)
    print(f"frames: shortest {counts[0]}, median {counts[len(counts) // 2]}, longest {counts[-1]}")
    sizes = Counter("{}x{}".format(*file.size) for file in probes)
    rates = Counter(f"{file.rate:.4g}" for file in probes)
    for what, values in ("sizes", sizes), ("frames per second", rates):
        table = ", ".join(f"{value} ({n})" for value, n in values.most_common(5))
        print(f"{what}, the most common (videos): {table}")
    fewer = sum(file.frames < file.announced for file in probes)
    if fewer:
        print(f"{fewer} hold fewer frames than their headers say, as XviD does; these are counted")
    short = sum(fitting_stride(n, 16, stride) < stride for n in counts)
    line = f"{short} are too short for a clip of 16 frames with stride {stride}"
    if short:
        tiny = sum(n < 16 for n in counts)
        line += f": they get a smaller stride; {tiny} have under 16 frames and repeat the last one"
    print(line)


# ---------------------------------------------------------------------------- prepare a data set

# Of 30 settings of x264, MPEG-4 and MJPEG the fastest to sample at about 38 dB: MPEG-4, a key frame
# every 12 frames, fixed quantiser 4.
CODEC, OPTIONS = "mpeg4", {"g": "12", "qmin": "4", "qmax": "4"}
LEAST = 30  # dB that a rewritten file must reach, over all its pixels


def rewrite(source: str | Path, target: str | Path, short_side: int | None, alive=lambda: None):
    """Write all frames of a video to `target`, upright, for fast sampling; gives the PSNR in dB.

    Shrinks to `short_side` pixels where that is less, and sides to even numbers. There is no sound.
    Raises ValueError, with the path of `source`, where it is broken, or where the frames of
    `target` are not as many and alike.
    """
    found, again, size = Probe(), Probe(), None
    reformatter = av.video.reformatter.VideoReformatter()

    def picture(frame) -> np.ndarray:
        alive()
        how = dict(format="rgb24", interpolation="BICUBIC", threads=1)
        return upright(reformatter.reformat(frame, *size, **how).to_ndarray(), frame)

    with av.open(f"file:{target}", "w", format="mp4") as container:
        for frame in played(source, found):
            if size is None:
                share = min(1, (short_side or math.inf) / min(frame.width, frame.height))
                sides = frame.width * share, frame.height * share
                size = [max(int(side) // 2 * 2, 2) for side in sides]
                rate = round(min(max(found.rate, 1), 240))
                stream = container.add_stream(CODEC, rate=rate, options=OPTIONS)
                stream.codec_context.thread_count = 1
                stream.height, stream.width = picture(frame).shape[:2]
                stream.pix_fmt = "yuv420p"
            image = np.ascontiguousarray(picture(frame))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    if found.problem:
        raise ValueError(f"{shown(source)}: {found.problem}")
    error = 0.0
    for old, new in zip_longest(played(source, Probe()), played(target, again)):
        if old is None or new is None:
            error = math.inf
            continue
        difference = picture(old).astype(np.float32) - new.to_ndarray(format="rgb24")
        error += np.square(difference).mean() / found.frames
    quality = -10 * math.log10(max(error, 1e-3) / 255**2)
    if again.frames != found.frames or quality < LEAST:
        same = f"{again.frames} of {found.frames} frames, PSNR {quality:.1f} dB"
        raise ValueError(f"{shown(source)}: not the same when rewritten: {same}")
    return quality


def _rewrite(job: tuple, alive) -> float | str:
    source, part, target, short_side = job
    try:
        quality = rewrite(source, part, short_side, alive)
        time = os.stat(source).st_mtime_ns
        os.utime(part, ns=(time, time))  # marks a finished file, see _jobs
        os.replace(part, target)
        return quality
    except (ValueError, OSError, av.FFmpegError) as error:
        return str(error).removeprefix(f"{shown(source)}: ")


def _jobs(paths: list[Path], data: Path, out: Path, short_side: int | None) -> list[tuple]:
    """What must be rewritten: (source, unfinished file, target, short side)."""
    jobs = []
    for number, path in enumerate(paths):
        name = os.path.normpath(os.path.relpath(path, data))
        target = out / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.parent.resolve().is_relative_to(out.resolve()):
            raise ValueError(f"{shown(target.parent)} leads out of {out}: remove that link")
        # A rewritten file has the time of its source. Who cuts or replaces either changes that.
        if not target.is_file() or target.stat().st_mtime_ns != path.stat().st_mtime_ns:
            jobs.append((path, out / "prepared.tmp" / str(number), target, short_side))
    return jobs


def prepare(
    dataset: str, data: str, splits: str | None, out: str, short_side: int | None, workers: int
) -> int:
    """Rewrite every video of a data set to folder `out`, under the same names; see rewrite.

    Official lists count with all of their folds. A second run goes on where the first one stopped:
    files get their names when they are complete and checked. Broken ones are copied as they are.
    Returns 0, or 1 where there are such. Raises ValueError as check does.
    """
    if workers < 1 or (short_side or 2) < 2:
        least = f"--workers {workers} must be at least 1, --short-side {short_side} at least 2"
        raise ValueError(least)
    data, splits = Path(data).expanduser(), Path(splits).expanduser() if splits else None
    out = Path(out).expanduser()
    places = data.resolve(), out.resolve()
    if places[0].is_relative_to(places[1]) or places[1].is_relative_to(places[0]):
        must = "must be another folder than --data, and neither in the other"
        raise ValueError(f"--out {out} {must} ({data})")
    splits = _find_lists(dataset, data, splits)
    # trainlist02.txt, _test_split2.txt
    names = [path.name for path in splits.glob("*.txt")] if splits else []
    ends = {name[-6:] for name in names if not hidden(name)}
    folds = [fold for fold in (2, 3) if {f"0{fold}.txt", f"t{fold}.txt"} & ends]
    parts = [(fold, train) for fold in (1, *folds) for train in (True, False)]
    parts = [listed(data, splits, *part) for part in parts]
    paths = _present(dataset, data, *parts)
    lines = list_lines(splits).values() if splits and splits.is_file() else ()
    names = [os.path.relpath(path, data) for path in paths]
    outside = [line for line in lines if os.path.isabs(line)]
    outside += [name for name in names if name.startswith("..")]
    if outside:
        error = "is listed from outside of --data: list paths relative to it"
        raise ValueError(f"{shown(outside[0])} {error}")

    settings, mark = json.dumps([CODEC, OPTIONS, short_side]), out / "prepared.json"
    if out.is_dir() and any(out.iterdir()):
        if not mark.is_file() or mark.read_text() != settings:
            other = "other files, or videos with another --short-side"
            raise ValueError(f"--out {out} holds {other}: name an empty or a new folder")
    shutil.rmtree(out / "prepared.tmp", ignore_errors=True)
    (out / "prepared.tmp").mkdir(parents=True)
    mark.write_text(settings)
    jobs = _jobs(paths, data, out, short_side)
    begin, before, after, quality, problems = time.monotonic(), 0, 0, [], {}
    print(f"{len(paths)} videos, {len(paths) - len(jobs)} of them are prepared already", flush=True)
    results = in_processes(_rewrite, jobs, workers)
    try:
        bar = engine.progress("rewriting", len(jobs), results, unit="video")
        for (path, part, target, _), result in bar:
            if isinstance(result, float):
                quality.append(result)
                before += path.stat().st_size / 1e6
                after += target.stat().st_size / 1e6
                continue
            problems[path] = f"not rewritten, copied as it is: {shown(path)}: {result}"
            target.unlink(missing_ok=True)  # of an earlier source
            with contextlib.suppress(OSError):  # lists stay valid; training leaves it out
                shutil.copyfile(path, part)
                os.replace(part, target)
    finally:
        results.close()
        shutil.rmtree(out / "prepared.tmp", ignore_errors=True)
    if splits and splits.is_dir() and splits.is_relative_to(data):
        lists, splits = list(splits.glob("*.txt")), out / splits.relative_to(data)
        splits.mkdir(parents=True, exist_ok=True)
        for file in lists:  # these alone: videos may lie beside them
            shutil.copy(file, splits)
    for problem in problems.values():
        print(problem)
    seconds = time.monotonic() - begin
    print(f"{len(quality)} videos rewritten in {seconds:.0f} s, {len(problems)} only copied")
    if quality:
        psnr = (
            f"PSNR {min(quality):.1f} dB or more, median {sorted(quality)[len(quality) // 2]:.1f}"
        )
        print(f"{before:.1f} MB became {after:.1f} MB, {psnr}")
    _next(dataset, parts[0], problems, data=out, splits=splits)
    return int(bool(problems))


def main(argv: list[str]) -> None:
    """`data.py toy|check|prepare`: see the docstring of data.py."""
    about = "python data.py COMMAND: toy videos, checking and rewriting data sets"
    parser = argparse.ArgumentParser(prog="data.py", description=about)
    commands = parser.add_subparsers(dest="command", required=True)
    toy = commands.add_parser("toy", help="write the toy data set")
    toy.add_argument("--out", help=f"folder to write (default: {TOY}, with --still {STILL})")
    toy.add_argument("--train", type=int, default=1200, help="training videos (default: 1200)")
    toy.add_argument("--test", type=int, default=600, help="test videos (default: 600)")
    toy.add_argument("--seed", type=int, default=0, help="of everything random (default: 0)")
    toy.add_argument("--still", action="store_true", help="waves that move in a disc only")
    test = commands.add_parser(
        "check", help="decode all videos once; say what is broken or missing"
    )
    new = commands.add_parser("prepare", help="rewrite all videos, so that clips are read faster")
    for command in (test, new):
        command.add_argument(
            "dataset", choices=STRIDES, help="own: any folder of videos, or a list"
        )
        command.add_argument("--data", required=True, help="folder of the videos; stays as it is")
        command.add_argument("--splits", help="folder of official lists, or a list `path [label]`")
        cores = os.cpu_count()
        command.add_argument(
            "--workers", type=int, default=cores, help=f"processes (here: {cores})"
        )
    test.add_argument("--fold", type=int, default=1, help="official split, 1 to 3 (default: 1)")
    new.add_argument("--out", required=True, help="folder to write, with the names of --data")
    new.add_argument("--short-side", type=int, help="pixels to shrink to (default: sizes stay)")
    args = vars(parser.parse_args(argv))
    engine.print_any_name()
    command = args.pop("command")
    try:
        if command == "toy":
            args["out"] = args["out"] or (STILL if args["still"] else TOY)
            make_toy(**args)
        elif code := {"check": check, "prepare": prepare}[command](**args):
            sys.exit(code)
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")
