"""Lists of videos and labels, as people and data sets write them: lines of text, CSV, JSON.

A reader finds out which names and labels a list means, or says what a line looks like and what to
do instead. lib/lists.py then finds the files.
"""

import csv
import json
import os
import re
import shlex
from pathlib import Path

from lib.video import shown

# Endings of the containers that lib/video.py reads (FORMATS), but for those of sound alone.
ENDINGS = set(
    """avi divx xvid amv mp4 m4v mp4v mov qt mqv 3gp 3gpp 3g2 3gp2 3gpp2 f4v ismv mj2 mkv mk3d
webm mpg mpeg mpe m1v m2v m2p mpv mp2v vob evo vro mod ts mts m2ts m2t tod trp tp asf wmv wm flv
ogv ogg ogm ogx gif""".split()
)
IMAGES = ("jpg", "jpeg", "png", "bmp", "webp", "tif", "tiff", "ppm")
MOST_CLASSES = 100_000  # above, a number is no label

# A path with a known ending may hold spaces and commas, and its label may be a name. Whatever else
# a line holds is a path, up to the numbers at its end.
BETWEEN = r"[ \t,;]+"
NUMBER = r"-?[0-9]+(?:\.[0-9]*)?"
VIDEO_LINE = re.compile(rf'"?(.*\.(?:{"|".join(ENDINGS)}))"?(?:({BETWEEN})(.*))?', re.IGNORECASE)
OTHER_LINE = re.compile(rf"(.*?)(?:{BETWEEN}({NUMBER}))?(?:{BETWEEN}({NUMBER}))?")
# Columns of a table, see _header.
PATH = re.compile("(video|file|clip)?(path|name)|video|file|clip|youtubeid")
LABEL = re.compile("(label|class|action|category)(id|name)?s?|target")
PART = re.compile("split|subset|part|set")

WANT = "write one `path label` per line"
SEVERAL = f"looks like several labels of one video: keep one (a name with commas in quotes), {WANT}"
SEGMENT = f"looks like a segment with start and end: cut it out with ffmpeg first, {WANT}"


def ending(name: str) -> str:
    """What follows the last dot of a file's name, in lower case; "" where there is none."""
    return os.path.splitext(name)[1][1:].lower()


def brief(text: str | Path) -> str:
    """Text from a user's file for a message: one line of at most 200 characters."""
    text = shown(text)
    return text if len(text) <= 200 else f"{text[:97]} ... {text[-98:]}"


def list_lines(path: Path) -> dict[int, str]:
    """The lines of a list that hold something, by number; bytes that are no UTF-8 are kept."""
    if not os.path.isfile(path):
        raise ValueError(f"no file {path}")
    text = path.read_bytes().decode("utf-8-sig", "surrogateescape")
    if "\0" in text:
        raise ValueError(f"{path} is not a text file in UTF-8: save it as one")
    lines = {number: line.strip(" \t\r") for number, line in enumerate(text.split("\n"), 1)}
    return {number: line for number, line in lines.items() if line}


def frames_line(data: Path, folder: Path) -> str:
    """That a folder of images is not read, and the command that makes videos of all such folders.

    They are those as deep below `data` as `folder` is; every video gets its folder's name.
    """
    names = os.listdir(folder) if os.path.isdir(folder) else []
    # Only plain names get into a command.
    plain = [re.fullmatch(r"([\w. -]*?)([0-9]+)(\.\w+)", name) for name in names]
    images = [name.groups() for name in plain if name and ending(name[0]) in IMAGES]
    images = images or [("img_", "00001", ".jpg")]
    start, digits, end = min(images, key=lambda image: int(image[1]))
    frames = f'-start_number {int(digits)} -i "${{d}}{start}%0{len(digits)}d{end}"'
    make = f'do ffmpeg -framerate 25 {frames} -q:v 2 "${{d%/}}.mp4"; done'
    every = shlex.quote(shown(data)) + "/*" * len(Path(os.path.relpath(folder, data)).parts)
    return f"folders of frames are not read, make videos of them: for d in {every}/; {make}"


# ------------------------------------------------------------------------------- text and tables


def read_list(data: Path, file: Path) -> tuple[list[str], list[str], str]:
    """(names, labels, "") of lines `path [label]`, or of a table with a header.

    A label is the name of a class, a number from 0, or "-1" for none. A name is a path. Kinetics'
    official CSV (label,youtube_id,time_start,time_end,split) has ids for names, and "" is ".mp4".
    """
    lines, names, labels, parts = list_lines(file), [], [], set()
    mark, columns = _header(next(iter(lines.values()), ""))
    for number, line in list(lines.items())[bool(columns) :]:
        try:
            name, label, part = _row(line, mark, columns) if mark else (*_line(data, line), "")
            label = _checked(label)
            parts.add(part)
        except (ValueError, csv.Error) as error:
            raise ValueError(f"{file}: line {number}, '{brief(line)}', {error}") from error
        if "\\" in name and not os.path.isfile(data / name):
            name = name.replace("\\", "/")  # written on Windows
        # macOS leaves ._ files, which get into lists that `find` makes.
        if not os.path.basename(name).startswith("._"):
            names.append(name)
            labels.append(label)
    if len(parts) > 1:
        several = f"lists videos of several parts ({brief(', '.join(sorted(parts)))})"
        raise ValueError(f"{file} {several}: make a list of each, for --splits and --test-splits")
    return names, labels, ".mp4" if "youtubeid" in columns else ""


def _mark(text: str) -> str | None:
    """What separates cells, None for spaces."""
    return next((mark for mark in ",;\t" if mark in text), None)


def _header(line: str) -> tuple[str | None, list[str]]:
    """(mark between columns, their names: Video_Path is videopath), (None, []) for no header."""
    mark = _mark(line)
    columns = [re.sub("[^a-z0-9]", "", word.lower()) for word in line.split(mark)]
    number = any(column.isdecimal() for column in columns)  # a file called clip, and its label
    return (mark, columns) if any(map(PATH.fullmatch, columns)) and not number else (None, [])


def _row(line: str, mark: str, columns: list[str]) -> tuple[str, str, str]:
    """(path or id, label, part of the data set) of a row of a table; "" for what it lacks."""
    cells = next(csv.reader([line], delimiter=mark, skipinitialspace=True))
    if len(cells) != len(columns):
        raise ValueError(f"has {len(cells)} columns, the header has {len(columns)}")
    row = dict(zip(columns, map(str.strip, cells), strict=True))
    label = row.get(next(filter(LABEL.fullmatch, columns), None), "")
    part = row.get(next(filter(PART.fullmatch, columns), None), "")
    if "youtubeid" in row:  # files are ID_SSSSSS_EEEEEE
        times = [row[time] for time in ("timestart", "timeend") if time in row]
        seconds = [time.partition(".")[0].zfill(6) for time in times]
        return "_".join([row["youtubeid"], *seconds]), label, part
    if any("start" in column for column in columns):
        raise ValueError(SEGMENT)
    path = max(filter(PATH.fullmatch, columns), key=lambda column: "path" in column)
    return row[path], label, part


def _line(data: Path, line: str) -> tuple[str, str]:
    """(path, label or "") of a line that is no row of a table."""
    if found := VIDEO_LINE.fullmatch(line):
        path, between, rest = found.groups("")
        return path, _label(rest, _mark(between))
    path, number, another = OTHER_LINE.fullmatch(line).groups("")
    if another:  # FOLDER FRAMES LABEL
        make = frames_line(data, data / path)
        raise ValueError(f"looks like frames: {make}; then write `FOLDER.mp4 label`")
    return path, number


def _label(rest: str, mark: str | None) -> str:
    """The label in what follows a path; `mark` is what separates them, None for spaces."""
    if whole := re.fullmatch(rf"0{BETWEEN}-1(?:{BETWEEN}(.*))?", rest):
        rest = whole[1] or "-1"  # VideoMAE V2 writes `path 0 -1`: from frame 0 to the last one
    if re.fullmatch('".*"', rest):
        return rest[1:-1].replace('""', '"')
    words = [word.strip() for word in rest.split(mark)]
    numbers = [bool(re.fullmatch(NUMBER, word)) for word in words]
    if numbers[:2] == [True, True] and (len(words) == 3 or not all(numbers)):
        raise ValueError(SEGMENT)
    # Names may hold a comma before a space, as "Stacking something, something on something" does.
    if len(words) > 1 and (mark or numbers[0]) or re.search(r",\S|[;|]", rest):
        raise ValueError(SEVERAL)
    return rest


def _checked(label: str) -> str:
    """A label as it is, if it is a name; else its number, -1 for none. ValueError if it is none."""
    if any(sign.isalpha() for sign in label):
        return label
    if re.search(r"[0-9][^0-9.]+[0-9]", label):
        raise ValueError(SEVERAL)
    whole = re.fullmatch(r"(-?[0-9]+(\.0*)?)?", label)  # pandas writes 1.0
    if not whole or not -1 <= float(label or -1) < MOST_CLASSES:
        must = f"must be from 0 to {MOST_CLASSES - 1}, or -1 for none, or a name"
        raise ValueError(f"label {brief(label)} {must}")
    return str(int(float(label or -1)))


# ------------------------------------------------------------------------------------------ JSON


def read_json(data: Path, file: Path) -> tuple[list[str], list[str], str]:
    """(ids, labels, their ending) of Something-Something V2's official list, as read_list.

    A class is a template without its brackets. The test list has no templates.
    """
    try:
        pairs = [(item["id"], item.get("template", "-1")) for item in _load(file)]
        labels = [re.sub(r"[\[\]]", "", template) for _, template in pairs]
    except (TypeError, KeyError, AttributeError) as error:
        only = "is not Something-Something V2's list of {id, template}, the only JSON that is read"
        raise ValueError(f"{file} {only}: {WANT} in a text file") from error
    return [str(name) for name, _ in pairs], labels, ".webm"


def read_names(file: str | Path) -> list[str]:
    """Names of classes in the order of their numbers, from a file that holds them all.

    Lines of a name, or of `number name`; or Something-Something's JSON {name: number}.
    """
    file = Path(file).expanduser()
    if file.suffix.lower() == ".json":
        pairs = [(number, name) for name, number in dict(_load(file)).items()]
    else:
        lines = list_lines(file).values()
        found = [re.fullmatch(rf'([0-9]+){BETWEEN}"?(.*?)"?', line) for line in lines]
        pairs = [pair.groups() for pair in found] if all(found) else list(enumerate(lines))
    names, count = {int(number): name for number, name in pairs}, len(pairs)
    in_a_row = sorted(names) in ([*range(count)], [*range(1, count + 1)])
    if not count or not in_a_row or len({*names.values()}) < count:
        want = "one name per line, each once, or `number name` with numbers from 0"
        raise ValueError(f"{file} does not name the classes: write {want}")
    return [names[number] for number in sorted(names)]


def _load(file: Path):
    try:
        return json.loads("\n".join(list_lines(file).values()))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is no whole JSON file: {error}") from error
