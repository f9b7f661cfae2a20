"""Figures: what is pasted, which statistics are used, how it is scored; curves; classes."""

import argparse
import csv
import json
import os
from types import SimpleNamespace

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

import visualize
from experiments import method
from lib import engine
from lib.variants import MODELS
from lib.weights import build
from masking import MASKS, tube_mask
from model import VideoMAE, patchify, split_tokens
from visualize import Config, class_accuracy, psnr, read_predictions, reconstruct, unpatchify

GRID, CUBE = (2, 4, 4), (2, 8, 8)


def tiny(name="videomae", **config):
    """A model of clips of 4 frames of 32 x 32 pixels; a clip for it; a tube mask."""
    torch.manual_seed(0)
    model = MODELS[name]("toy", (4, 32, 32), CUBE, decoder_depth=1, **config).eval()
    frames = 4 * model.frame_factor
    clip = torch.randint(0, 256, (1, frames, 3, 32, 32), dtype=torch.uint8)
    return model, clip, tube_mask(clip, GRID, 0.75, torch.Generator().manual_seed(1))


@pytest.fixture
def drawn(monkeypatch):
    """Every figure that is saved, to look at. Nothing is drawn to a file larger than needed."""
    figures, save = [], Figure.savefig

    def keep(self, out, **how):
        figures.append(self)
        save(self, out, **(how | {"dpi": 20}))

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


# -------------------------------------------------------------------------------- reconstructions


def test_unpatchify_is_the_inverse_of_patchify():
    video = torch.rand(2, 4, 3, 32, 32)
    assert torch.equal(unpatchify(patchify(video, CUBE), GRID, CUBE), video)


@pytest.mark.parametrize("name", ["videomae", "center", "double"])
def test_the_true_target_gives_back_the_original(name):
    """Predictions that are right make the original: pixels as they are, normalised ones with oracle
    statistics. So each prediction is pasted where it belongs."""
    for normalize, key in ((False, "model"), (True, "oracle model")):
        model, clip, mask = tiny(name, normalize=normalize)
        model.forward = lambda v, m, model=model: (None, model.target(v, split_tokens(m)[1]))
        original, hidden, made = reconstruct(model, clip, mask)
        torch.testing.assert_close(made[key], original, atol=1e-4, rtol=0)
        assert psnr(made["nearest"], original, hidden) < 15 < psnr(made[key], original, hidden)
    frames = {"videomae": clip, "center": clip[:, 2:3], "double": clip[:, ::2]}[name]
    assert torch.equal(original, frames / 255)


@pytest.mark.parametrize("name", ["videomae", "center", "double"])
def test_nothing_hidden_is_used(name):
    """Without the oracle, other pixels in hidden places change nothing but the original."""
    model, clip, mask = tiny(name)
    cube = (CUBE[0] * model.frame_factor, *CUBE[1:])
    cubes = patchify(clip, cube)
    other = unpatchify(torch.where(mask[:, :, None], 255 - cubes // 2, cubes), GRID, cube)
    if name == "double":
        other[:, 1::2] = 7  # the encoder sees every second frame, so that the others are hidden
    (original, hidden, a), (filled, _, b) = (reconstruct(model, v, mask) for v in (clip, other))
    assert list(a) == ["nearest", "mean", "model", "nothing", "oracle model", "oracle nothing"]
    for key in a:
        assert torch.equal(a[key][~hidden], original[~hidden])  # visible cubes are pasted in
        if key.startswith("oracle"):
            assert not torch.allclose(a[key][hidden], b[key][hidden], atol=0.01)
        else:
            assert torch.equal(a[key][hidden], b[key][hidden])
    assert not torch.allclose(original[hidden], filled[hidden], atol=0.01)
    assert 0.74 < hidden.float().mean() < 0.76


def row_of_cubes(*values):
    """A model of one row of flat cubes, the clip of these grey values; hidden where negative."""
    model = MODELS["videomae"]("toy", (2, 8, 8 * len(values)), CUBE, decoder_depth=1).eval()
    grey = torch.tensor([abs(value) for value in values], dtype=torch.uint8)
    clip = grey.repeat_interleave(8).expand(1, 2, 3, 8, -1)
    return reconstruct(model, clip, torch.tensor([[value < 0 for value in values]]))[2]


def test_baselines_and_visible_statistics_by_hand():
    made = row_of_cubes(100, -1, -1, 200)

    def at(key):
        return [made[key][0, 0, 0, 0, x].item() * 255 for x in (0, 8, 16, 24)]

    assert at("nearest") == pytest.approx([100, 100, 200, 200])
    assert at("mean") == pytest.approx([100, 150, 150, 200])
    # One cube away and two: weights 1 and 1/16.
    near, far = (16 * 100 + 200) / 17, (100 + 16 * 200) / 17
    assert at("nothing") == pytest.approx([100, near, far, 200], abs=0.01)
    assert at("oracle nothing") == pytest.approx([100, 1, 1, 200], abs=0.01)


def test_psnr_by_hand():
    original, hidden = torch.zeros(1, 1, 3, 4, 4), torch.zeros(1, 1, 3, 4, 4, dtype=torch.bool)
    hidden[..., :2] = True
    video = original + 0.1
    video[..., 2:] = 1  # visible: does not count
    assert psnr(video, original, hidden) == pytest.approx(20, abs=1e-4)
    video[..., 0] = 0.7  # mean square of 0.7 and 0.1: 0.25
    assert psnr(video, original, hidden) == pytest.approx(6.0206, abs=1e-3)


ORACLE = ["oracle statistics:\n" + name for name in ("model", "nothing", "untrained")]


@pytest.mark.parametrize(
    "stats, columns, mask_name, seed",
    [("visible", ["model"], "tube", 0), ("oracle", ["model", *ORACLE], "random", 3)],
)
def test_figure(tmp_path, drawn, capsys, stats, columns, mask_name, seed):
    """Columns stand apart, and what is printed and written is the mean over all clips."""
    model, clip, _ = tiny()
    model = build(type(model), model.config | {"eps": 1e-6}).eval()  # as of Hugging Face
    clips = [clip, clip.flip(3), clip]
    gif = str(tmp_path / "a.gif") if stats == "visible" else None
    cfg = Config(stats=stats, ratios=(0.5, 0.75), gif=gif, mask=mask_name, seed=seed)
    visualize.draw_reconstructions(model, clips, 1, cfg, tmp_path / "a.png")
    titles = [axis.title for axis in drawn[0].axes]
    boxes = [title.get_window_extent() for title in titles]
    assert all(a.x1 + 2 < b.x0 for a, b in zip(boxes, boxes[1:], strict=False))
    said = [title.get_text().removesuffix(" dB").rpartition("\n") for title in titles]
    expected = ["original", "50% masked", *columns, "75% masked", *columns]
    assert [name or last for name, _, last in said] == expected
    masked = drawn[0].axes[2 + len(columns)].images[0].get_array()  # at 75 %, with white margins
    assert (masked == 0.5).all(axis=2).mean() == pytest.approx(0.75 * (32 / 34) ** 2, abs=0.01)

    if stats == "visible":  # a ratio that is asked for twice is drawn once
        twice = Config(ratios=(0.5, 0.5), mask=mask_name, seed=seed)
        visualize.draw_reconstructions(model, clips[:1], 1, twice, tmp_path / "b.png")
        few = Config(ratios=(0.75, 0.9), mask="frame")  # of 2 time steps, both hide one
        visualize.draw_reconstructions(model, clips[:1], 1, few, tmp_path / "c.png")
        assert list(json.loads((tmp_path / "c-psnr.json").read_text())["psnr"]) == ["50%"]
    written = json.loads((tmp_path / "a-psnr.json").read_text())
    found = written["psnr"]["75%"]
    assert written["clips"] == 3 and list(written["psnr"]) == ["50%", "75%"]
    honest = {"model", "nothing", "nearest", "mean"}
    oracle = {"untrained", "oracle model", "oracle nothing", "oracle untrained"}
    assert found.keys() == (honest if stats == "visible" else honest | oracle)
    means = dict.fromkeys(honest, 0)
    for number, one in enumerate(clips):
        generator = torch.Generator().manual_seed(engine.derive_seed("figure", seed, number))
        mask = MASKS[mask_name](one, GRID, 0.75, generator)
        original, hidden, made = reconstruct(model, one, mask)
        means = {key: means[key] + psnr(made[key], original, hidden) / 3 for key in means}
    assert means == pytest.approx({key: found[key] for key in means})
    assert f"nearest {means['nearest']:.2f} dB" in capsys.readouterr().out
    if stats == "visible":
        assert Image.open(gif).n_frames == 4
    else:  # an untrained model is another one
        assert abs(found["untrained"] - found["model"]) > 1e-4
        assert found["oracle untrained"] > found["untrained"]


class Difference(VideoMAE):
    """Predict changes from frame to frame: as many numbers as a cube has, but no pixels."""

    def target(self, video, masked):
        return super().target(video.diff(dim=1, prepend=video[:, :1]), masked)


def test_predictions_that_are_no_pixels(tmp_path, drawn, capsys):
    """Of a target of one's own: the end of its training is no error."""
    model, clip, _ = tiny()
    model = build(Difference, model.config)
    cfg = Config(ratios=(0.75,), mask="tube")
    visualize.draw_reconstructions(model, [clip], 1, cfg, tmp_path / "a.png")
    assert capsys.readouterr().out.splitlines() == [
        "no figure: the predictions of this model are no pixels"
    ]
    assert not drawn


def test_method_in_one_picture():
    clip = torch.randint(0, 256, (1, 16, 3, 224, 224), dtype=torch.uint8)
    columns = {title.splitlines()[0]: frames for title, frames in method.pictures(clip)}
    assert list(columns)[:4] == ["a clip", *(f"{name} mask" for name in MASKS)]
    assert len(columns) == 7 and torch.equal(columns["a clip"], clip[0] / 255)
    share = (columns["tube mask"] == 0.5).all(dim=1).float().mean()
    assert share == pytest.approx(0.75, abs=0.001)
    kept = [columns[name].flatten() for name in ("the encoder gets", "tube mask")]
    kept = [values[(values != 1) & (values != 0.5)].sort().values for values in kept]
    assert torch.equal(*kept)  # the same cubes, moved
    hidden = columns["the target"][columns["tube mask"] == 0.5]
    assert hidden.mean() == pytest.approx(0.5, abs=0.01)  # normalised; visible ones have no target


def test_which_clips(tmp_path, monkeypatch, capsys):
    """Without --videos: test videos of the checkpoint's own data. Unreadable ones are named."""
    model, clip, _ = tiny("double")
    asked = []

    def load(path, frames, size, stride):
        asked.append((frames, size, stride))
        if path.name == "bad.avi":
            raise ValueError("bad.avi is no video")
        return clip

    paths = [tmp_path / name for name in ("bad.avi", "a.avi", "b.avi", "c.avi")]
    split = SimpleNamespace(paths=paths)
    monkeypatch.setattr(visualize, "load_clip", load)
    monkeypatch.setattr(
        visualize, "read_split", lambda *args, **how: None if how["train"] else split
    )
    others = SimpleNamespace(paths=[tmp_path / "d.avi"])
    monkeypatch.setattr(visualize, "listed", lambda *args, **how: how["train"] and others)
    about = dict(name="double", stride=4, data="folder", splits=None, fold=1)
    assert len(visualize.read_clips(Config(), model, about)) == 3
    said = capsys.readouterr().out
    assert set(asked) == {(8, 32, 2)} and "bad.avi is no video" in said and "part" not in said
    with monkeypatch.context() as patch:  # a list: both parts are the same
        patch.setattr(visualize, "listed", lambda *args, **how: split)
        visualize.read_clips(Config(), model, about)
    assert (
        "no test part: PSNR and figure are of videos that were trained on"
        in capsys.readouterr().out
    )
    assert len(visualize.read_clips(Config(scored=2), model, about)) == 2
    with pytest.raises(ValueError, match="no video"):  # those asked for must be readable
        visualize.read_clips(Config(videos=tuple(paths)), model, about)
    with pytest.raises(ValueError, match="double needs an even --stride"):
        visualize.read_clips(Config(stride=3), model, about)
    del paths[1:]
    with pytest.raises(ValueError, match="no test video can be read: name some with --videos"):
        visualize.read_clips(Config(), model, about)


def test_masks_are_those_of_the_training(tmp_path, monkeypatch):
    """Unless a flag says otherwise. Weights of others say nothing: tubes."""
    model, clip, _ = tiny()
    drawn = []
    monkeypatch.setattr(visualize, "read_clips", lambda cfg, model, about: [clip])
    draw = lambda model, clips, few, cfg, out: drawn.append(cfg.mask)  # noqa: E731
    monkeypatch.setattr(visualize, "draw_reconstructions", draw)
    out = ["--out", str(tmp_path / "a.png")]
    for about, flags in (
        ({}, []),
        ({"mask": "frame"}, []),
        ({"mask": "frame"}, ["--mask", "random"]),
    ):
        monkeypatch.setattr(visualize, "load_model", lambda path, about=about: (model, about))
        visualize.main([*out, *flags])
    assert drawn == ["tube", "frame", "random"]
    monkeypatch.setattr(visualize, "load_model", lambda path: (model, {"mask": "motion"}))
    with pytest.raises(ValueError, match="no motion masks: choose others with --mask"):
        visualize.main(out)


def test_a_training_ends_well_without_a_figure(tmp_path, capsys):
    visualize.draw_trained(tmp_path)
    assert capsys.readouterr().out.startswith("no figure: no weights at ")


def test_weights_of_other_projects_need_videos(tmp_path):
    """They do not say what they were trained on."""
    state = tiny()[0].state_dict()
    state = {key: value for key, value in state.items() if "pos_embed" not in key}
    kernel = state.pop("encoder.patch_embed.weight").unflatten(1, (*CUBE, 3)).movedim(4, 1)
    state["encoder.patch_embed.proj.weight"] = kernel
    state["encoder.patch_embed.proj.bias"] = state.pop("encoder.patch_embed.bias")
    args = argparse.Namespace(num_frames=4, input_size=32)
    torch.save({"model": state, "args": args}, tmp_path / "official.pth")
    with pytest.raises(ValueError, match="^.*official.pth knows no videos: .* with --videos$"):
        visualize.main(["--checkpoint", str(tmp_path / "official.pth")])


# ------------------------------------------------------------------------------------------ curves


def test_curves_of_both_stages(tmp_path, drawn):
    lines = [{"config": {}}, {"constant_loss": 1.0}]
    lines += [{"step": i, "loss": 1 / i, "lr": i} for i in range(1, 9)]
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    visualize.plot_log(tmp_path)
    loss, rate = drawn[0].axes
    assert loss.lines[0].get_xydata().tolist() == [[i, 1 / i] for i in range(1, 9)]
    assert rate.lines[0].get_ydata().tolist() == list(range(1, 9)) and len(loss.lines) == 2
    with open(log, "a") as file:
        file.write('{"step": 4, "top1": 20.5}\n{"step": 8, "top1": 70.25}\n')
    visualize.plot_log(tmp_path)
    top1 = drawn[1].axes[2]
    assert top1.lines[0].get_xydata().tolist() == [[4, 20.5], [8, 70.25]]
    assert (tmp_path / "loss.png").stat().st_size > 1000


# ----------------------------------------------------------------------------------------- classes


def table(path, hits: dict[str, int], videos: int = 4):
    """A predictions.csv: of each class some videos, the first hits[class] of them right."""
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(visualize.PREDICTIONS)
        for name, right in hits.items():
            for i in range(videos):
                guess = name if i < right else "wrong"
                correct = int(guess == name)
                writer.writerow([f"{name}/{i}.avi", name, guess, correct, f"{guess};b", "0.6;0.1"])
    return path


def names_of(figure):
    return [text.get_text() for text in figure.axes[0].get_yticklabels()]


def test_predictions(tmp_path):
    rows = read_predictions(table(tmp_path / "p.csv", {'a, "b"\r\n': 1, "walk": 4}))
    assert rows[0]["path"] == 'a, "b"\r\n/0.avi' and rows[0]["correct"] and not rows[1]["correct"]
    assert rows[7]["top5"] == "walk;b"
    assert class_accuracy(rows) == {'a, "b"\r\n': (25, 4), "walk": (100, 4)}
    text = (tmp_path / "p.csv").read_bytes()
    (tmp_path / "p.csv").write_bytes(b"\xef\xbb\xbf" + text)  # saved again by a spreadsheet
    assert read_predictions(tmp_path / "p.csv") == rows


@pytest.mark.parametrize("text", ["", "path,label\na,b\n", "HEAD\n", "HEAD\na,b,c\n"])
def test_other_files_than_predictions(tmp_path, text):
    path = tmp_path / "p.csv"
    path.write_text(text.replace("HEAD", ",".join(visualize.PREDICTIONS)))
    with pytest.raises(ValueError, match="must hold the columns path, label"):
        read_predictions(path)


@pytest.mark.parametrize("number", [1, 40])
def test_chart_of_classes(tmp_path, drawn, number):
    hits = {f"{i} Putting $x_{i}$ {{onto}} it": i % 5 for i in range(number)}
    visualize.plot_classes(table(tmp_path / "p.csv", hits), tmp_path / "p.png")
    axis = drawn[0].axes[0]
    lengths = [bar.get_width() for bar in axis.patches]
    assert lengths == sorted((25 * right for right in hits.values()), reverse=True)
    assert sorted(names_of(drawn[0])) == sorted(hits) and axis.yaxis_inverted()
    total = 25 * sum(hits.values()) / number
    assert axis.get_title() == f"top-1 {total:.2f} % of {4 * number} videos"


def test_names_that_are_no_text(tmp_path, drawn, capsys):
    """A folder may have any bytes in its name: they are drawn and printed as escapes."""
    names = [os.fsdecode(name) for name in (b"M\xfcnchen", b"two\nlines", "w\u00e4hlen".encode())]
    a = table(tmp_path / os.fsdecode(b"\xff.csv"), dict(zip(names, (4, 2, 1), strict=True)))
    expected = ["M\\udcfcnchen", "two\\nlines", "w\u00e4hlen"]
    visualize.plot_classes(a, tmp_path / "p.png")
    visualize.compare((str(a), str(a)), tmp_path / "c.png")
    assert names_of(drawn[0]) == names_of(drawn[1]) == expected
    said = capsys.readouterr().out
    assert "\\udcff.csv: top-1 58.33 %" in said


def test_names_in_a_confusion_matrix_stand_apart(tmp_path, drawn):
    """At 101 classes, too, and there without numbers."""
    for number in (3, 101):
        hits = {f"{i:03} Putting $x_{i}$ {{onto}} it": i % 5 for i in range(number)}
        visualize.plot_confusion(table(tmp_path / "p.csv", hits), tmp_path / "p.png")
        axis = drawn[-1].axes[0]
        shares = torch.from_numpy(axis.images[0].get_array().data)
        expected = torch.tensor([0.25 * right for right in hits.values()])
        assert torch.equal(shares.diag()[:-1], expected)  # last: "wrong", which no video is
        assert torch.equal(shares[:-1, -1], 1 - expected) and not shares[-1].any()
        columns, rows = (
            [text.get_window_extent() for text in labels]
            for labels in (axis.get_xticklabels(), axis.get_yticklabels())
        )
        assert names_of(drawn[-1]) == [*hits, "wrong"] and len(columns) == number + 1
        assert all(a.x1 < b.x0 for a, b in zip(columns, columns[1:], strict=False))
        assert all(a.y0 > b.y1 for a, b in zip(rows, rows[1:], strict=False))
        texts = [text.get_text() for text in axis.texts]
        assert texts == (["100", "25", "75", "50", "50"] if number == 3 else [])


def test_a_figure_is_overwritten_only_when_asked(tmp_path, drawn):
    """With --out, as at the end of a training. By itself, a script takes the next free name."""
    a = str(table(tmp_path / "a.csv", {"Run": 4}))
    written = [set(tmp_path.glob("*.png"))]
    for words in ((), ("--out", str(tmp_path / "comparison.png")), (), ()):
        visualize.main(["--compare", a, a, *words])
        written.append({path.name for path in tmp_path.glob("*.png")})
    assert written[1] == written[2] == {"comparison.png"}
    assert written[4] == {"comparison.png", "comparison-2.png", "comparison-3.png"}


def test_comparison(tmp_path, drawn, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table("a.csv", {"Run": 4, "Walk": 1, "Same": 2})
    table("b.csv", {"Run": 1, "Walk": 3, "Same": 2})
    visualize.main(["--compare", "a.csv", "b.csv", "--out", "c.png"])
    assert capsys.readouterr().out.splitlines() == [
        "a.csv: top-1 58.33 % of 12 videos",
        "b.csv: top-1 50.00 % of 12 videos",
        "wrote c.png",
    ]
    axis = drawn[0].axes[0]
    assert names_of(drawn[0]) == ["Run", "Same", "Walk"]
    assert [bar.get_width() for bar in axis.patches] == [75, 0, -50]
    notes = ["100 % and 25 % of 4", "50 % and 50 % of 4", "25 % and 75 % of 4"]
    assert [text.get_text() for text in axis.texts] == notes


def test_comparison_of_what_cannot_be_compared(tmp_path):
    a = table(tmp_path / "a.csv", {"Run": 1, "Walk": 2})
    b = table(tmp_path / "b.csv", {"Run": 1})
    with pytest.raises(ValueError, match="differ in videos or labels: .'Walk/0.avi', 'Walk'."):
        visualize.compare((str(a), str(b)), tmp_path / "c.png")
    b.write_text(a.read_text().replace("Walk/0.avi,Walk", "Walk/0.avi,Run"))
    with pytest.raises(ValueError, match="differ in videos or labels: .'Walk/0.avi'"):
        visualize.compare((str(a), str(b)), tmp_path / "c.png")


@pytest.mark.parametrize(
    "flags, say",
    [
        ("--compare a.csv --out c.png", "two files, not 1"),
        ("--compare a.csv b.csv --out no/a.png", "must be a .png file in a folder that exists"),
        ("--compare a.csv b.csv --out a.gif", "must be a .png"),
        ("--compare a.csv b.csv --gif a.png", "must be a .gif"),
        ("--checkpoint none.pt", "none.pt; train first"),
        ("--checkpoint nobody/weights", "hf download nobody/weights"),
    ],
)
def test_mistakes(tmp_path, monkeypatch, flags, say):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=say):
        visualize.main(flags.split())
