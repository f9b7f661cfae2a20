"""Whole data sets: `check` (decode all once) and `prepare` (rewrite all for speed).

Both exit with 0 when all is well, 1 when files are broken, and 2 when something is missing. data.py
says how to call them.
"""

import argparse
import math
import os
import shlex
import sys
from collections import Counter
from fractions import Fraction
from itertools import chain
from pathlib import Path

import av

from data import TOY, TOY_FILMS, fitting_stride
from lib import engine, lists
from lib.annotations import brief, read_list
from lib.lists import LISTS, Split, listed, read_split, video_files
from lib.processes import in_processes
from lib.toy import make_toy, make_toy_films
from lib.video import LONG, Probe, played, shown, upright


def training_videos(
    preset: str, data: str | None, splits: str | None, fold: int, missing="error", classes=None
) -> Split:
    """The training videos, see read_split. The toy set is written where it is asked for.

    ValueError where the recipe of UCF101 or HMDB51 meets the other's lists, or none: without lists,
    pre-training would take the test videos as well.
    """
    if data == TOY:
        engine.in_first_process(make_toy, TOY)
    split = read_split(data, splits, fold, missing=missing, classes_file=classes)
    wanted = preset.removesuffix("-short")
    if wanted in LISTS and split.kind not in (wanted, "list", "named list"):
        found = f"the lists of {split.kind}" if split.kind else "no lists"
        advice = f"name those of {wanted} with --splits; `python data.py check {wanted}` helps"
        raise ValueError(f"{data} has {found}: {advice}")
    return split


# ------------------------------------------------------------------------------ check a data set


def _read(dataset: str, data: Path, splits: str | None, fold: int) -> tuple[Split, Split, int]:
    """(training part, test part, how many listed videos are missing). The parts are without those.

    Says which are missing. ValueError where folders or lists are wrong, or no video is there.
    """
    train, test = (listed(data, splits, fold, part) for part in (True, False))
    if dataset not in ("own", train.kind):
        name = f"name the folder of those of {dataset} with --splits"
        raise ValueError(f"{splits or data} has other lists, or none: {name}")
    videos = dict.fromkeys(train.paths + test.paths)
    missing, line = lists.missing_videos(videos)
    if missing:
        unpack = f": docs/data.md says how to unpack {dataset}" if dataset in LISTS else ""
        line += lists.why_missing(missing[0], data, unpack)
        names = Path("runs", f"check-{dataset}", "missing.txt")
        names.parent.mkdir(parents=True, exist_ok=True)
        engine.write_whole(names, "".join(f"{path}\n" for path in missing))
        if len(missing) == len(videos):
            raise ValueError(line)
        print(f"warning: {line} (all are in {names})", file=sys.stderr)
    train, test = (lists.leave_out(part, missing) for part in (train, test))
    return train, test, len(missing)


def _probe(job: tuple[Path], alive) -> Probe:
    found = Probe()
    for _ in played(*job, found):
        if found.frames % 16 == 0:  # a call costs as much as a small frame
            alive()
    return found


def _for_all(work, jobs: list[tuple], workers: int) -> tuple[list[Probe], dict[Path, str]]:
    """work(job, alive) for all jobs (path, ...): (probes of whole videos, path -> problem)."""
    good, broken = [], {}
    results = in_processes(work, jobs, workers)
    for (path, *_), result in engine.progress("decoding", len(jobs), results, unit="video"):
        problem = result if isinstance(result, str) else result.problem
        if problem:
            broken[path] = problem.removeprefix(f"{shown(path)}: ")
        else:
            good.append(result)
    for path in sorted(broken):
        print(f"broken: {shown(path)}: {broken[path]}")
    print(f"{len(jobs)} videos decoded, {len(broken)} broken")
    return good, broken


def _next(dataset: str, train: Split, broken: dict[Path, str], **flags) -> None:
    """Print what comes next: mend files, then a command that works on these videos.

    Training ends where over a tenth is broken. Few videos of a recipe's data get the recipe own.
    """
    if broken:
        print("next: download the broken files again; training leaves out up to a tenth of all")
    if not train.paths or len(broken.keys() & set(train.paths)) > len(train.paths) / 10:
        return
    whole = dataset in LISTS and len(train.paths) >= 192  # the batch of these recipes
    words = [dataset] if whole else []
    for name, value in flags.items():
        words += [f"--{name}", str(value)] if value else []
    print("next:", shlex.join(["python", "pretrain.py", *words]))


def check(dataset: str, data: str, splits: str | None, fold: int, workers: int) -> int:
    """Decode every video of both parts of a data set; print what is there and what is broken.

    Returns 0, 1 where files are broken, 2 where some are missing. Raises as _read.
    """
    data = Path(data).expanduser()
    train, test, missing = _read(dataset, data, splits, fold)
    for note in dict.fromkeys(train.notes + test.notes):
        print(f"note: {note}")
    test_part = "no test part" if test == train else f"{len(test.paths)} test videos"
    print(f"{len(train.paths)} training videos, {test_part}, {len(train.classes)} classes")
    jobs = [(path,) for path in dict.fromkeys(train.paths + test.paths)]
    good, broken = _for_all(_probe, jobs, workers)
    if good:
        counts = sorted(file.frames for file in good)
        median = counts[len(counts) // 2]
        print(f"frames: shortest {counts[0]}, median {median}, longest {counts[-1]}")
        sizes = Counter("{}x{}".format(*file.size) for file in good).most_common(5)
        print("sizes, the most common (videos):", ", ".join(f"{size} ({n})" for size, n in sizes))
        stride = 2 if dataset == "hmdb51" else 4  # of the recipes
        short = sum(fitting_stride(count, 16, stride) < stride for count in counts)
        print(f"{short} are too short for 16 frames with stride {stride}, and get a smaller stride")
        if slow := sum(not file.timed and file.frames > LONG for file in good):
            long = f"{slow} of over {LONG} frames are decoded from their start for each clip"
            print(f"{long}: `python data.py prepare` makes files that need not be")
    how = dict(splits=splits, fold=fold if fold > 1 else None, missing=missing and "skip")
    _next(dataset, train, broken, data=data, **how)
    return 2 if missing else int(bool(broken))


# ---------------------------------------------------------------------------- prepare a data set


def rewrite(job: tuple[Path, Path, int | None], alive=lambda: None) -> Probe:
    """Write all frames of a video, upright, for fast sampling; what decoding the source finds.

    The job is (source, target, short side): larger frames shrink to that many pixels (None: never),
    and sides to even numbers. The target appears when it is complete. ValueError where the source
    is broken, or the target has not as many frames.
    """
    source, target, short_side = job
    found = Probe()
    target.unlink(missing_ok=True)  # it is of another source
    frames = played(source, found)
    first = next(frames)
    share = min(1, (short_side or math.inf) / min(first.width, first.height))
    size = [max(int(side * share + 1e-6) // 2 * 2, 2) for side in (first.width, first.height)]
    reformatter = av.video.reformatter.VideoReformatter()
    how = dict(format="rgb24", interpolation="BICUBIC", threads=1)
    picture = lambda frame: upright(reformatter.reformat(frame, *size, **how).to_ndarray(), frame)
    # Of 30 settings of x264, MPEG-4 and MJPEG the fastest to sample at about 38 dB: a key frame
    # every 12 frames, fixed quantiser 4.
    options = {"g": "12", "qmin": "4", "qmax": "4"}
    # As it was, such as 24000/1001: seconds stay where they are. MPEG-4 knows denominators and
    # numerators up to 65535.
    rate = min(max(found.rate, 1), 240)
    rate = Fraction(rate).limit_denominator(int(65535 / rate))
    part = target.with_name(target.name + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    try:
        with av.open(f"file:{part}", "w", format="mp4") as container:
            stream = container.add_stream("mpeg4", rate=rate, options=options)
            stream.codec_context.thread_count = 1
            stream.height, stream.width = picture(first).shape[:2]
            stream.pix_fmt = "yuv420p"
            for frame in chain([first], frames):
                alive()
                image = av.VideoFrame.from_ndarray(picture(frame), format="rgb24")
                container.mux(stream.encode(image))
            container.mux(stream.encode())
        again, problem = _probe((part,), alive), found.problem
        if again.frames != found.frames:
            problem = f"only {again.frames} of {found.frames} frames could be rewritten"
        if problem:
            raise ValueError(f"{shown(source)}: {problem}")
        time = os.stat(source).st_mtime_ns
        os.utime(part, ns=(time, time))  # prepare looks at it
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
    return found


def prepare(
    dataset: str, data: str, splits: str | None, out: str, short_side: int | None, workers: int
) -> int:
    """Rewrite the videos of a list, or else all in folder `data`, to folder `out`; see rewrite.

    A second run goes on where the first stopped, and rewrites what has changed since. The exit code
    is that of check.
    """
    data, out = Path(data).expanduser(), Path(out).expanduser()
    places = data.resolve(), out.resolve()
    if places[0].is_relative_to(places[1]) or places[1].is_relative_to(places[0]):
        raise ValueError(f"--out {out} and --data {data}: neither must lie in the other")
    if short_side is not None and short_side < 2:
        raise ValueError(f"--short-side {short_side} must be at least 2")
    train, _, missing = _read(dataset, data, splits, fold=1)
    if train.kind in LISTS:
        splits = splits or data / LISTS[train.kind]
    whole = train.kind in ("", *LISTS)
    paths = video_files(data)[0] if whole else train.paths  # of a whole set those of all folds
    names = [os.path.relpath(path, data) for path in paths]
    others = {".json", *lists.READERS}
    lines = train.kind.endswith("list") and Path(splits).suffix.lower() not in others
    listed_names = read_list(data, Path(splits).expanduser())[0] if lines else []
    for name in [*names, *(name for name in listed_names if isinstance(name, str))]:
        if ".." in Path(name).parts or os.path.isabs(name):
            raise ValueError(f"{brief(name)} is listed: list paths relative to --data, within it")
    size = out / ".short-side"
    if out.is_dir() and any(out.iterdir()):
        if not size.is_file() or size.read_text() != str(short_side):
            other = "other files, or videos with another --short-side"
            raise ValueError(f"--out {out} holds {other}: name an empty or a new folder")
    out.mkdir(parents=True, exist_ok=True)
    size.write_text(str(short_side))
    lock = engine.lock(size, f"another process writes to {out}")
    # Of a folder, all is known. A video that was moved would be there twice, in two classes.
    gone = {*video_files(out)[0]} - {out / name for name in names} if whole else ()
    if gone:
        raise ValueError(f"{len(gone)} videos in {out} have no source, as {min(gone)}: remove them")
    jobs = [(path, out / name, short_side) for path, name in zip(paths, names, strict=True)]
    # A rewritten file has the time of its source. Who replaces the source changes that.
    time = lambda path: path.stat().st_mtime_ns if path.is_file() else None
    jobs = [job for job in jobs if time(job[1]) != time(job[0])]
    print(f"{len(paths)} videos, {len(paths) - len(jobs)} of them are prepared already", flush=True)
    _, broken = _for_all(rewrite, jobs, workers)
    lock.close()
    # Those that are broken or missing are not in `out`.
    _next(dataset, train, broken, data=out, splits=splits, missing=(broken or missing) and "skip")
    return 2 if missing else int(bool(broken))


def main(argv: list[str]) -> None:
    """`data.py toy|check|prepare`: see the docstring of data.py."""
    parser = argparse.ArgumentParser(prog="data.py", description=__doc__)
    commands = parser.add_subparsers(required=True)
    toy = commands.add_parser("toy", help=f"write the toy data set to {TOY}")
    toy.add_argument("--detect", action="store_true", help=f"instead, films in {TOY_FILMS}")
    toy.set_defaults(work=lambda detect: make_toy_films(TOY_FILMS) if detect else make_toy(TOY))
    test = commands.add_parser("check", help="decode all videos once, name what is broken")
    test.set_defaults(work=check)
    new = commands.add_parser("prepare", help="rewrite all videos, so that clips are read faster")
    new.set_defaults(work=prepare)
    for command in (test, new):
        command.add_argument("dataset", choices=("own", *LISTS), help="own: any folder or list")
        command.add_argument("--data", required=True, help="folder of the videos; stays as it is")
        command.add_argument("--splits", help="folder of official lists, or a list `path [label]`")
        command.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    test.add_argument("--fold", type=int, choices=(1, 2, 3), default=1, help="official split")
    new.add_argument("--out", required=True, help="folder to write, with the names of --data")
    new.add_argument("--short-side", type=int, help="pixels to shrink to (default: sizes stay)")
    for command in (parser, toy, test, new):
        command.error = lambda message: parser.exit(2, f"error: {message} (see --help)\n")
    args = vars(parser.parse_args(argv))
    if code := args.pop("work")(**args):  # in a notebook, only what fails may raise SystemExit
        sys.exit(code)
