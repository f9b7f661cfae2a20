"""Pages of results: our numbers beside the paper's, a plot, and a verdict on each claim.

A page is results/NAME.json, with everything that is known, and NAME.md and NAME.png, drawn from it.
The JSON holds

    title, note   about the experiment; perhaps unit, of its numbers, and axis, of its plot
    rows          label, the paper's number or None, cell, and for each fold ours and minutes
    claims        (text, the paper's gap, cell, cell): the first cell is better than the second
    commands      what makes it, fold 1
    recipes       the presets that the commands start from
    folds         and for each of them minutes of one core, names of machines, commits
"""

import json
import math
import os
import subprocess
from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from visualize import class_accuracy, read_predictions

TOP1 = "top-1, %"  # the unit of rows, unless an experiment names another
MINUTES = "minutes of one core"  # an axis: what the runs of a row took
NOT_THEIRS = "not theirs"  # in place of the paper's gap: the paper does not make this claim
MARK = "<!-- experiments -->\n"  # before and after the table in docs/results.md
CLAIMS = [
    "| claim | gap in the paper | gap here: mean ± deviation (folds) | verdict |",
    "|---|---|---|---|",
]


# ---------------------------------------------------------------------------------------- numbers


def commit() -> str:
    """The commit of the code, where git knows it."""
    try:
        command = ["git", "rev-parse", "--short", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def read_score(product: Path, key: str) -> float:
    """The number in the file that a job left.

    results.json: top-1 in %, of the class `key` if there is one; "knn" is that of the nearest
    neighbours. Other files: PSNR `key`, in dB.
    """
    found = json.loads(product.read_text())
    if product.name != "results.json":
        return found["psnr"][key]
    if key in ("", "knn"):
        return found[key or "top1"]
    return class_accuracy(read_predictions(product.with_name("predictions.csv")))[key][0]


def spread(values: list[float], sign: str = "") -> str:
    """Mean, sample standard deviation, and each value: "2.0 ± 1.4 (3.0, 1.0)"."""
    deviation = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    each = ", ".join(f"{value:{sign}.1f}" for value in values)
    return f"{np.mean(values):{sign}.1f}{deviation} ({each})"


STUDENT = {2: 12.71, 3: 4.30}  # t for a two-sided 95 % interval of the mean of so many values


def verdict(gaps: list[float]) -> str:
    """Whether the gaps of the folds bear out a claim: "agrees", "**disagrees**" or "open".

    Open where the 95 % interval of their mean holds zero.
    """
    if len(gaps) < 2:
        return "open"
    half = STUDENT[len(gaps)] * np.std(gaps, ddof=1) / math.sqrt(len(gaps))
    if abs(np.mean(gaps)) <= half:
        return "open"
    return "agrees" if np.mean(gaps) > 0 else "**disagrees**"


def claims_of(found: dict) -> list[tuple[str, float | str | None, list[float]]]:
    """An experiment's claims: text, the paper's gap (None: no number), our gap for each fold.

    Without any, the claims are that the paper's best row is better than each of its other rows.
    """
    claims = found.get("claims")
    if not claims:
        known = [row for row in found["rows"] if row["paper"] is not None]
        best, *others = sorted(known, key=lambda row: -row["paper"])
        claims = []
        for row in others:
            text = f"{best['label']}: better than {row['label']}"
            claims.append((text, best["paper"] - row["paper"], best["cell"], row["cell"]))
    ours = {row["cell"]: np.array(row["ours"]) for row in found["rows"]}
    total = lambda cells: sum(ours[cell] for cell in cells.split(" + "))
    return [(text, gap, (total(a) - total(b)).tolist()) for text, gap, a, b in claims]


# ------------------------------------------------------------------------------------------ plots

PAPER = dict(s=22, marker="D", color="tab:red", zorder=3, label="the paper's")
FOLD = dict(s=9, zorder=3)


def plot_bars(found: dict, axis) -> None:
    """A bar for each row, at its mean; dots are folds. Labels "x, series" take a series' colour."""
    rows = found["rows"]
    series = [row["label"].partition(", ")[2] for row in rows]
    names = list(dict.fromkeys(series))
    grouped = min(Counter(series).values()) > 1
    colors = [f"C{names.index(name) if grouped else 0}" for name in series]
    axis.barh(range(len(rows)), [np.mean(row["ours"]) for row in rows], color=colors, alpha=0.5)
    dots = [(value, place) for place, row in enumerate(rows) for value in row["ours"]]
    axis.scatter(*zip(*dots, strict=True), **FOLD, color="black", label="a fold")
    theirs = [(row["paper"], place) for place, row in enumerate(rows) if row["paper"] is not None]
    if theirs:
        axis.scatter(*zip(*theirs, strict=True), **PAPER)
    axis.set_yticks(range(len(rows)), [row["label"] for row in rows], fontsize=7)
    axis.set(xlabel=found.get("unit", TOP1), ylim=(len(rows) - 0.5, -0.5))


def plot_curves(found: dict, axis) -> None:
    """A curve through the means for each series of labels "x, series"; dots are folds.

    With the axis MINUTES, x is what the runs took, and the x of the label stands at the point.
    """
    timed, curves = found["axis"] == MINUTES, {}
    for row in found["rows"]:
        x, _, series = row["label"].partition(", ")
        place = np.mean(row["minutes"]) if timed else float(x)
        curves.setdefault(series, []).append((place, x, row))
    for color, (series, points) in enumerate(curves.items()):
        points.sort(key=lambda point: point[0])
        means = [np.mean(row["ours"]) for *_, row in points]
        axis.plot([x for x, *_ in points], means, color=f"C{color}", label=series or "ours")
        dots = [(x, value) for x, _, row in points for value in row["ours"]]
        axis.scatter(*zip(*dots, strict=True), **FOLD, color=f"C{color}")
        below = dict(xytext=(0, -9), textcoords="offset points", fontsize=6, ha="center")
        for (x, name, _), mean in zip(points, means, strict=True) if timed else ():
            axis.annotate(name, (x, mean), **below)
    axis.scatter([], [], **FOLD, color="gray", label="a fold")
    points = [point for points in curves.values() for point in points]
    theirs = [(x, row["paper"]) for x, _, row in points if row["paper"] is not None]
    if theirs and not timed:  # the paper took other times
        axis.scatter(*zip(*theirs, strict=True), **PAPER)
    if not timed:
        axis.set_xticks(sorted({x for x, *_ in points}))
    axis.set(xlabel=found["axis"], ylabel=found.get("unit", TOP1))
    axis.margins(0.1)


def plot(found: dict, out: Path) -> None:
    """Draw an experiment's rows: curves where it has an axis, else bars."""
    curves = "axis" in found
    height = 3 if curves else 1 + 0.24 * len(found["rows"])
    figure = Figure(figsize=(6, height), layout="constrained")
    axis = figure.subplots()
    (plot_curves if curves else plot_bars)(found, axis)
    axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(out, dpi=120)


# ------------------------------------------------------------------------------------------ pages


def claim_lines(found: dict) -> list[str]:
    """An experiment's claims as lines of a table under CLAIMS."""
    lines = []
    for text, paper, ours in claims_of(found):
        gap = f"{paper:+.1f}" if isinstance(paper, float) else paper or ""
        lines.append(f"| {text} | {gap} | {spread(ours, '+')} | {verdict(ours)} |")
    return lines


def row_lines(found: dict) -> list[str]:
    """An experiment's rows as a table, with the minutes of each row."""
    unit, folds = found.get("unit", TOP1), ", ".join(map(str, found["folds"]))
    lines = [f"| | paper | ours, {unit}: mean ± deviation (folds {folds}) |", "|---|---|---|"]
    for row in found["rows"]:
        paper = "" if row["paper"] is None else f"{row['paper']:.1f}"
        lines.append(f"| {row['label']} | {paper} | {spread(row['ours'])} |")
    if any("@" in row["cell"] for row in found["rows"]):  # many rows of one run
        return lines
    minutes = (f"{np.mean(row['minutes']):.1f}" for row in found["rows"])
    cells = [MINUTES, "---", *minutes]
    return [f"{line} {cell} |" for line, cell in zip(lines, cells, strict=True)]


def page_text(found: dict, name: str) -> str:
    """The page of an experiment, in Markdown."""
    every = lambda key: " and ".join(sorted({*chain(*found[key])}))
    total = f"{sum(found['minutes']):.0f} {MINUTES}, with the runs that other experiments share"
    paragraphs = [
        f"# {found['title']}",
        f"![]({name}.png)",
        "\n".join(row_lines(found)),
        "\n".join([*CLAIMS, *claim_lines(found)]),
        found["note"],
        f"Made at commit {every('commits')}.",
        f"{total}: {every('machines')}.",
        f"`python -m experiments.run {name}` makes it anew. These were the commands of fold 1:",
        "\n".join(f"    python {command}" for command in found["commands"]),
    ]
    return "\n\n".join(paragraphs) + "\n"


def made_by(found: dict) -> list:
    """What an experiment's numbers depend on, besides folds."""
    return [found["commands"], found["recipes"], sorted(row["cell"] for row in found["rows"])]


def with_folds(found: dict, old: dict) -> dict:
    """An experiment with its folds and those that only an earlier page of the same cells has."""
    order = sorted({*found["folds"], *old["folds"]})

    def merge(new: list, before: list) -> list:
        known = dict(zip(old["folds"], before, strict=True))
        known |= dict(zip(found["folds"], new, strict=True))
        return [known[fold] for fold in order]

    at = {row["cell"]: row for row in old["rows"]}
    rows = []
    for row in found["rows"]:
        before = at[row["cell"]]
        rows.append(row | {key: merge(row[key], before[key]) for key in ("ours", "minutes")})
    keys = ("folds", "minutes", "machines", "commits")
    return found | {key: merge(found[key], old[key]) for key in keys} | {"rows": rows}


def update_page(found: dict, page: Path) -> dict:
    """Write page.json, .md and .png if there is something new. Returns what the page now holds.

    Folds that the page has already stay in it. Where it was made by other cells, commands or
    recipes, the one with more folds stays.
    """
    file = page.with_suffix(".json")
    old = json.loads(file.read_text()) if file.exists() else None
    if old and made_by(old) == made_by(found):
        found = with_folds(found, old)
    elif old and len(old["folds"]) > len(found["folds"]):
        print(f"{page}.md is of other commands or recipes and of more folds: kept")
        return old
    if found["folds"] and found != old:
        page.parent.mkdir(parents=True, exist_ok=True)
        plot(found, page.with_suffix(".png"))
        page.with_suffix(".md").write_text(page_text(found, page.name))
        file.write_text(json.dumps(found, indent=1) + "\n")
        print(f"wrote {page}.md, .png and .json: {len(found['folds'])} folds")
    return found


def report(experiments: dict[str, dict], folder: Path, overview: Path) -> None:
    """Update the pages in a folder, and the table of all claims between the marks of `overview`."""
    lines = list(CLAIMS)
    for name, found in experiments.items():
        found = update_page(json.loads(json.dumps(found)), folder / name)
        if not found["folds"]:
            continue
        link = os.path.relpath(folder / f"{name}.md", overview.parent)
        took = f"{sum(found['minutes']):.0f} {MINUTES}, {len(found['folds'])} folds"
        lines += [f"| **[{found['title']}]({link})** | | {took} | |", *claim_lines(found)]
    parts = overview.read_text().split(MARK) if overview.exists() else []
    if len(parts) == 3 and len(lines) > len(CLAIMS):
        overview.write_text(MARK.join([parts[0], "\n".join(lines) + "\n", parts[2]]))
        print(f"wrote the table in {overview}")
