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
# a line holds is a path, up to a number at its end.
BETWEEN = r"(?:[ \t]*[,;\t][ \t]*|[ \t]+)"
VIDEO_LINE = re.compile(rf'"?(.*\.(?:{"|".join(ENDINGS)}))"?(?:({BETWEEN})(.*))?', re.IGNORECASE)
OTHER_LINE = re.compile(rf"(.*\S){BETWEEN}(-?[0-9]{{1,9}}(?:\.0*)?)")
NUMBER = r"-?[0-9]+(?:\.[0-9]*)?"
# Names of columns in a header.
COLUMNS = {
    "path": r"(video|file|clip)?_?(path|name)|(video|file|clip)(_?id)?|youtube_id",
    "label": r"(label|class|action|category)(_?(id|name))?s?|target",
    "time": r"((time|frame|t)_)?(start|begin|onset|end|stop|offset)(_(time|frame|sec|s|ms))?|t[01]",
    "part": r"split|subset|part|set|fold|is_(train|test|val)",
}

WANT = "write one `path label` per line"
SEVERAL = f"looks like several labels of one video: keep one, {WANT}"
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
        zero = f"a zero at character {text.index(chr(0))}"
        raise ValueError(f"{path} is not a text file ({zero}): save it as UTF-8")
    lines = re.split("\r\n|\r|\n", text)  # of Unix, Windows and old Macs
    return {number: text for number, line in enumerate(lines, 1) if (text := line.strip(" \t"))}


def frames_line(data: Path, folder: Path) -> str:
    """That a folder of images is not read, and the command that makes videos of all such folders.

    They are those as deep below `data` as `folder` is; every video gets its folder's name.
    """
    names = os.listdir(folder) if os.path.isdir(folder) else []
    # Only plain names get into a command, and 7.jpg comes before 10.jpg.
    plain = [re.fullmatch(r"([\w. -]*?)([0-9]+)([a-zA-Z_. -]*)", name) for name in names]
    images = [name.groups() for name in plain if name and ending(name[0]) in IMAGES]
    images = images or [("img_", "00001", ".jpg")]
    start, digits, end = min(images, key=lambda parts: (len(parts[1]), parts))
    count = f"%0{len(digits)}d" if digits.startswith("0") and len(digits) > 1 else "%d"
    first = f"-start_number {int(digits)} " if int(digits) > 4 else ""
    around = data if folder.is_relative_to(data) else folder.parent
    every = shlex.quote(shown(around)) + "/" + "*/" * len(folder.relative_to(around).parts)
    make = f'ffmpeg -framerate 25 {first}-i "${{d}}{start}{count}{end}" -q:v 2 "${{d%/}}.mp4"'
    return f"folders of frames are not read, make videos of them: for d in {every}; do {make}; done"


# ------------------------------------------------------------------------------- text and tables


def read_list(data: Path, file: Path) -> tuple[list, list[int], list[str]]:
    """(names, labels, classes) of lines `path [label]`, or of a table with a header.

    A name is a path. In Kinetics' official CSV (label,youtube_id,time_start,time_end,split) it is a
    tuple of names that the file may have, without an ending.
    """
    lines = list_lines(file)
    top = next(iter(lines.values()), "")
    mark, columns = ("", []) if os.path.isfile(data / top) else _header(top)
    names, labels, parts = {}, {}, set()
    for number, line in list(lines.items())[bool(columns) :]:
        try:
            if columns and mark != " ":
                cells = next(csv.reader([line], delimiter=mark, skipinitialspace=True))
                if len(cells) != len(columns):
                    raise ValueError(f"has {len(cells)} columns, the header has {len(columns)}")
                row = dict(zip(columns, map(str.strip, cells), strict=True))
                name, label = _cells(row)
                parts |= {row[column] for column in _named(columns, "part")}
            else:
                name, label = _line(data, line)
        except (ValueError, csv.Error) as error:
            raise ValueError(f"{file}: line {number}, '{brief(line)}', {error}") from error
        if "\\" in name and not os.path.isfile(data / name):  # of Windows
            name = name.replace("\\", "/")
        # macOS leaves ._ files, which get into lists that `find` makes.
        if isinstance(name, tuple) or not name.rpartition("/")[2].startswith("._"):
            names[number], labels[number] = name, label
    if len(parts) > 1:
        several = f"lists videos of several parts ({brief(', '.join(sorted(parts)))})"
        raise ValueError(f"{file} {several}: make a list of each, for --splits and --test-splits")
    return list(names.values()), *_number(labels, file)


def _named(columns, kind: str) -> list[str]:
    return [name for name in columns if re.fullmatch(COLUMNS[kind], name)]


def _header(line: str) -> tuple[str, list[str]]:
    """(what is between columns, their names) of a header; ("", []) for any other line."""
    mark = next((mark for mark in ",\t; " if mark in line), ",")
    words = [re.sub(r"[ -]", "_", word.strip(' "#').lower()) for word in line.split(mark)]
    others = any(_named(words, kind) for kind in ("label", "time", "part"))
    return (mark, words) if _named(words, "path") and (others or len(words) == 1) else ("", [])


def _cells(row: dict[str, str]) -> tuple[str | tuple[str, str], str]:
    """(path or the names of an id, label) of a row of a table."""
    label = next((row[name] for name in _named(row, "label")), "")
    if re.fullmatch(rf"\[.*\]|{NUMBER}(?:[ ,;|]+{NUMBER})+|.*[;|].*", label):
        raise ValueError(SEVERAL)
    times = [row[name] for name in _named(row, "time")]
    if "youtube_id" in row:  # ID_SSSSSS_EEEEEE, or the ID alone
        seconds = [time.partition(".")[0].zfill(6) for time in times]
        return ("_".join([row["youtube_id"], *seconds]), row["youtube_id"]), label
    if times:
        raise ValueError(SEGMENT)
    best = max(_named(row, "path"), key=lambda name: ("path" in name, name[-2:] != "id"))
    return row[best], label


def _line(data: Path, line: str) -> tuple[str, str]:
    """(path, label or "") of a line that is no row of a table."""
    if found := VIDEO_LINE.fullmatch(line):
        label = _label(found[3] or "", "," in (found[2] or ""))
        return (line, "") if label is None else (found[1], label)
    if not (found := OTHER_LINE.fullmatch(line)):
        return line, ""
    path = found[1].replace("\\", "/")
    folder = OTHER_LINE.fullmatch(path)
    if folder and not os.path.isfile(data / path):
        make = frames_line(data, data / folder[1])
        raise ValueError(f"looks like frames: {make}; then write `FOLDER.mp4 label`")
    return found[1], found[2]


def _label(rest: str, comma: bool) -> str | None:
    """The label in what follows a path and a `comma` or space, None where it can be no label."""
    if whole := re.fullmatch(r"0[ \t,]+-1(?:[ \t,]+(.*))?", rest):
        rest = whole[1] or "-1"  # VideoMAE V2 writes `path 0 -1`: from frame 0 to the last one
    words = re.split(r"[ \t,;|]+", rest)
    numbers = [bool(re.fullmatch(NUMBER, word)) for word in words]
    if len(words) == 1 and (numbers[0] or not rest):
        return words[0]
    if not any(numbers) and not any(sign.isalpha() for sign in rest):
        return None
    if rest[0] == rest[-1] == '"':
        return rest[1:-1].replace('""', '"')
    # Names may hold a comma before a space, as "Stacking something, something on something" does.
    listed = re.search(r",\S|[;|]", rest) or (comma and "," in rest)
    times = numbers[:2] == [True, True] and (len(words) == 3 or not all(numbers))
    if times and (comma or not listed):
        raise ValueError(SEGMENT)
    if numbers[0] or listed:
        raise ValueError(SEVERAL + ", a name with commas in quotes" * (not numbers[0]))
    return rest


def _number(labels: dict[int, str], file: Path) -> tuple[list[int], list[str]]:
    """Labels by line, as text -> (labels from 0, or -1 for none; names of the classes)."""
    given = {line: text for line, text in labels.items() if text not in ("", "-1")}
    names = {line: text for line, text in given.items() if not re.fullmatch(r"-?[0-9.]+", text)}
    if names and len(names) < len(given):
        name, number = min(names), min(given.keys() - names)
        both = f"line {name} has the class '{brief(names[name])}', line {number} a number"
        raise ValueError(f"{file}: {both}: write names only, or numbers only")
    if names:
        classes = sorted(set(names.values()))
        index = {name: label for label, name in enumerate(classes)}
        return [index.get(text, -1) for text in labels.values()], classes
    for line, text in given.items():
        if not re.fullmatch(r"-?[0-9]+(\.0*)?", text) or not -1 <= float(text) < MOST_CLASSES:
            must = f"must be from 0 to {MOST_CLASSES - 1}, or -1 for none"
            raise ValueError(f"{file}: line {line}: label {brief(text)} {must}")
    values = [int(float(text or -1)) for text in labels.values()]  # pandas writes 1.0
    return values, [str(label) for label in range(max(values, default=-1) + 1)]


# ------------------------------------------------------------------------------------------ JSON


def read_json(file: Path) -> tuple[list[tuple[str]], list[int], list[str]]:
    """(names without ending, labels, classes) of Something-Something V2's official list.

    A class is a template without its brackets. Numbers are those of labels.json or
    something-something-v2-labels.json beside the list; without one, templates are sorted. The test
    list has no templates: -1.
    """
    entries = _load(file)
    dicts = isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries)
    if not dicts or not all(isinstance(entry.get("id"), str | int) for entry in entries):
        only = "is not Something-Something V2's list of {id, template}, the only JSON that is read"
        raise ValueError(f"{file} {only}: {WANT} in a text file")
    names = [re.sub(r"[\[\]]", "", str(entry.get("template") or "")) for entry in entries]
    beside = (file.parent / name for name in ("something-something-v2-labels.json", "labels.json"))
    numbers = next((path for path in beside if path.is_file()), None)
    classes = [*read_names(numbers).values()] if numbers else sorted(set(names) - {""})
    index = {name: label for label, name in enumerate(classes)}
    if unknown := set(names) - set(classes) - {""}:
        raise ValueError(f"{file}: the template '{brief(min(unknown))}' is not in {numbers}")
    ids = [(str(entry["id"]),) for entry in entries]
    return ids, [index.get(name, -1) for name in names], classes


def read_names(file: str | Path) -> dict[int, str]:
    """{number: name} of all classes, in the order of their numbers, which begin at 0 or 1.

    Lines of a name, or of `number name`; or JSON, a list or Something-Something's {name: number}.
    """
    file = Path(file).expanduser()
    if file.suffix.lower() == ".json":
        found = _load(file)
        found = found if isinstance(found, dict | list) else []
        names = found.items() if isinstance(found, dict) else ((x, i) for i, x in enumerate(found))
        pairs = [(number, str(name)) for name, number in names]
    else:
        lines = list_lines(file).values()
        found = [re.fullmatch(rf'([0-9]+){BETWEEN}"?(.*?)"?', line) for line in lines]
        pairs = [pair.groups() for pair in found] if all(found) else list(enumerate(lines))
    names = {int(number): name for number, name in pairs if str(number).isdecimal()}
    in_a_row = sorted(names) in ([*range(len(pairs))], [*range(1, len(pairs) + 1)])
    if not names or not in_a_row or len(set(names.values())) < len(names):
        want = "one name per line, each once, or `number name` with numbers from 0 or 1"
        raise ValueError(f"{file} does not name the classes: write {want}")
    return {number: names[number] for number in sorted(names)}


def _load(file: Path):
    try:
        return json.loads("\n".join(list_lines(file).values()))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{file} is no whole JSON file: {error}") from error
