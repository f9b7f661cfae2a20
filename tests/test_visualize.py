"""Tables of predictions, accuracy per class, comparison of two models, curves."""

import csv
import json

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

import visualize
from visualize import class_accuracy, plot_classes, plot_log, read_predictions

ODD = ['a,b "c".avi', "new\r\nline.avi", "$x$_{.avi", "é;f.avi"]


def write(path, rows):
    """A predictions.csv of (path, label, prediction)."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(visualize.PREDICTIONS)
        for name, label, prediction in rows:
            five = ";".join([prediction, "w", "x", "y", "z"])
            table.writerow([name, label, prediction, int(label == prediction), five, "0.6;0.1;0.1;0.1;0.1"])
    return path


def classes(path, hits: dict[str, int], videos: int = 4):
    """Of each class, `videos` videos, the first hits[class] of them right."""
    rows = [(f"{c}/{i}.avi", c, c if i < n else "wrong") for c, n in hits.items() for i in range(videos)]
    return write(path, rows)


@pytest.fixture
def drawn(monkeypatch):
    """Every figure that is saved, to look at."""
    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kw: figures.append(self) or save(self, *args, **kw))
    return figures


def words(axis):
    return [text.get_text() for text in axis.get_yticklabels()], [text.get_text() for text in axis.texts]


def test_predictions_with_odd_names(tmp_path):
    rows = read_predictions(write(tmp_path / "p.csv", [(name, "A, $b$", "A, $b$") for name in ODD]))
    assert [row["path"] for row in rows] == ODD
    assert rows[0]["label"] == "A, $b$" and rows[0]["correct"] is True
    assert rows[0]["top5"] == ["A, $b$", "w", "x", "y", "z"] and rows[0]["probabilities"] == [0.6, 0.1, 0.1, 0.1, 0.1]


def test_predictions_that_are_none(tmp_path):
    path, head = tmp_path / "p.csv", ",".join(visualize.PREDICTIONS)
    with pytest.raises(ValueError, match="no file .*p.csv"):
        read_predictions(path)
    for text, say in (
        ("", "must hold the columns"),
        ("path,label\na,b\n", "must hold the columns"),
        (head + "\n", "at least one video"),
        (head + "\na,b,c,0,b;c,0.5;many\n", "row 1, 'a'"),
        (head + "\na,b,c,0,b;c,0.5\n", "row 1, 'a'"),
        (head + "\na,b,c\n", "row 1, 'a'"),
        (head + "\na,b,c,0,b;c,0.5;0.1\na,b,c,0,b;c,0.5;0.1\n", "'a' 2 times"),
        (head + '\n"a,b,c\n', "not a CSV file"),
        (head + "\n\xff\n", "row 1, "),
    ):
        path.write_bytes(text.encode("latin-1"))
        with pytest.raises(ValueError, match=say):
            read_predictions(path)


def test_accuracy_of_classes(tmp_path):
    rows = read_predictions(classes(tmp_path / "p.csv", {"run": 1, "walk": 4}))
    assert class_accuracy(rows) == {"run": (25, 4), "walk": (100, 4)}


@pytest.mark.parametrize("number", [1, 12, 51, 101, 174])
def test_class_chart_is_sorted_and_readable(tmp_path, drawn, number):
    names = [f"{i} Putting $x_{i}$ {{onto}} something" for i in range(number)]
    path = classes(tmp_path / "$p_{.csv", {name: i % 5 for i, name in enumerate(names)})
    plot_classes(path, tmp_path / "p.png")
    labels, notes = zip(*map(words, drawn[0].axes), strict=True)
    assert sorted(sum(labels, [])) == sorted(names)
    scores = [int(note.split(" %")[0]) for note in sum(notes, [])]
    assert scores == sorted((25 * (i % 5) for i in range(number)), reverse=True)
    assert all(axis.yaxis_inverted() for axis in drawn[0].axes)  # the best on top
    for axis in drawn[0].axes:  # names do not overlap
        tops = sorted(text.get_window_extent().y0 for text in axis.get_yticklabels())
        assert len(tops) < 2 or min(np.diff(tops)) > axis.get_yticklabels()[0].get_window_extent().height * 0.9
        assert not any(text.get_parse_math() for text in axis.get_yticklabels())
    with Image.open(tmp_path / "p.png") as image:
        assert 1 / 4 < image.width / image.height < 6 and max(image.size) < 2600
    total = 25 * sum(i % 5 for i in range(number)) / number
    assert f"top-1 {total:.2f} % of {4 * number} videos" in drawn[0].get_suptitle()


def test_comparison(tmp_path, drawn, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hits = {f"${i}_{{": i % 4 for i in range(50)}
    classes("a$_{$.csv", dict(hits, Run=4, Walk=1, Same=2))
    classes("b.csv", dict({name: n + 1 for name, n in hits.items()}, Run=1, Walk=4, Same=2))
    visualize.main(["--compare", "a$_{$.csv", "b.csv", "--out", "c.png"])
    out = capsys.readouterr().out.splitlines()
    assert out[2:4] == [
        "1 of 53 classes are better in a$_{$.csv, by most:",
        "   +75.0 points  Run  (100 %, not 25 %, of 4)",
    ]
    assert out[4:6] == [
        "51 of 53 classes are better in b.csv, by most:",
        "   +75.0 points  Walk  (100 %, not 25 %, of 4)",
    ]
    assert len(out) == 26 and all("+25.0" in line for line in out[6:25]) and out[-1] == "wrote c.png"
    assert out[1] == f"{100 * (sum(hits.values()) + 50 + 7) / 212:.2f} % of 212 videos: b.csv"
    (one, _), (two, _) = map(words, drawn[0].axes)
    assert one == ["Run"] and two[0] == "Walk" and len(two) == 20
    assert [axis.get_title() for axis in drawn[0].axes] == ["better in a$_{$.csv", "better in b.csv"]
    long = tmp_path / "folder" / ("x" * 80)
    long.mkdir(parents=True)
    visualize.compare("b.csv", classes(long / "p.csv", dict(hits, Run=1, Walk=4, Same=2)), "d.png")
    lines = drawn[1].axes[1].get_title().splitlines()
    assert "".join(lines).replace(" ", "").endswith("x/p.csv") and max(map(len, lines)) <= 36  # fits above a panel
    visualize.main(["--compare", "b.csv", "b.csv"])  # nothing differs: an empty figure, no error
    assert (tmp_path / "comparison.png").stat().st_size > 1000


def test_comparison_of_what_cannot_be_compared(tmp_path):
    a = write(tmp_path / "a.csv", [("1.avi", "run", "run"), ("2.avi", "walk", "run")])
    for rows, say in (
        ([("1.avi", "run", "run")], "1 are in one only, like '2.avi'"),
        ([("1.avi", "run", "run"), ("2.avi", "run", "run")], "label 1 videos differently: '2.avi' is 'walk' and 'run'"),
    ):
        with pytest.raises(ValueError, match=say):
            visualize.compare(a, write(tmp_path / "b.csv", rows), tmp_path / "c.png")
    for flags, say in (
        ([], "two files, not 1"),
        ([a, a], "two files, not 3"),
        ([a, "--out", "c.gif"], "must be a .png"),
    ):
        with pytest.raises(ValueError, match=say):
            visualize.main(["--compare", str(a), *map(str, flags)])
    assert not (tmp_path / "c.png").exists()


def test_the_log_says_what_takes_the_time(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(visualize.os, "cpu_count", lambda: 16)

    def run(workers: int, waited: float, lines: int) -> list[str]:
        monkeypatch.setattr(visualize.multiprocessing, "active_children", lambda: [None] * workers)
        log = visualize.Log(tmp_path / "log.jsonl", 0, 100, on=True)
        progress = dict(loss=0.0, taken=0, unreadable={}, skipped=[])
        for line in range(1, lines + 1):
            log.time, log.waited = visualize.time.time() - 1, waited  # a second a line
            log.report(progress, line, 1.0, 0.1, 1)
        early = capfd.readouterr().out.splitlines()
        log.close(progress, 0, lines)
        assert early == [] if lines < 20 else len(early) == 1
        return [*early, capfd.readouterr().out.splitlines()[0]]

    assert run(2, 0.43, 5) == [
        "data: 43% of the time was spent waiting for videos; raise --workers (now 2, of 16 cores), "
        "or rewrite the videos once with `python data.py prepare`"
    ]
    assert "reading counts as waiting with --workers 0: raise it if any of the 16 cores is free" in run(0, 0.43, 5)[0]
    assert run(2, 0.01, 25) == ["compute-bound: 1% of the time was spent waiting for videos"] * 2


def test_curves_of_both_stages(tmp_path, drawn):
    lines = [{"predict_nothing": 1.0}, *({"step": i, "loss": 1 / i, "lr": i} for i in range(1, 9))]
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    plot_log(log, tmp_path / "a.png")
    assert len(drawn[0].axes) == 2 and drawn[0].axes[0].get_xlabel() == "step"  # loss and learning rate
    assert len(drawn[0].axes[0].lines) == 2  # and the dotted one
    with open(log, "a") as file:
        file.write('{"step": 4, "top1": 20.5}\n{"step": 8, "top1": 70.25, "unreadable": 0}\n')
    plot_log(log, tmp_path / "b.png")
    loss, top1, rate = drawn[1].axes
    assert top1.lines[0].get_xydata().tolist() == [[4, 20.5], [8, 70.25]] and top1.get_xlabel() == "step"
    assert loss.lines[0].get_xydata()[-1].tolist() == [8, 1 / 8] and rate.lines[0].get_ydata().tolist() == [
        *range(1, 9)
    ]
    sizes = [Image.open(tmp_path / name).size for name in ("a.png", "b.png")]
    assert sizes[0] == (720, 420) and sizes[1] == (720, 840)


def test_bars_of_labels_that_end_alike_share_a_colour(tmp_path, drawn):
    def colours(*labels):
        rows = [dict(label=label, paper=None, cell=label, ours=[1.0], minutes=[None]) for label in labels]
        visualize.plot_results(dict(rows=rows), tmp_path / "p.png")
        return [bar.get_facecolor() for bar in drawn[-1].axes[0].patches]

    a, b, c, d = colours("Run", "Run, scratch", "Walk", "Walk, scratch")
    assert a == c != b == d
    assert len(set(colours("clip", "clip, half", "clip, double"))) == 1  # these are no series


def test_still_and_moving_places():
    video = torch.zeros(1, 8, 3, 24, 24)
    video[:, ::2, :, :8, :8] = 1  # one place of nine flickers much, one a little
    video[:, ::2, 1, 8:16, 16:] = 0.5
    parts = visualize.still_and_moving(video, (2, 8, 8))
    assert all(part.shape == video.shape and part.dtype == torch.bool for part in parts.values())
    assert not (parts["still"] & parts["moving"]).any()
    for part in parts.values():  # three whole places each, the same in every frame and colour
        assert part.float().mean() == pytest.approx(1 / 3) and (part == part[:, :1, :1]).all()
        assert set(part[0, 0, 0].reshape(3, 8, 3, 8).float().mean(dim=(1, 3)).flatten().tolist()) == {0, 1}
    assert parts["moving"][..., :8, :8].all() and parts["moving"][..., 8:16, 16:].all()
    assert visualize.still_and_moving(video[:, :1], (2, 8, 8)) == {}
