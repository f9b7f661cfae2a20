"""The linear probe: features and their cache, the choice of the learning rate, the head."""

import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import draw_nothing

import finetune
import linprobe
import pretrain
import visualize
from data import read_split
from lib import engine, evaluate

FLAGS = "--batch 8 --epochs 2 --warmup 1 --repeats 2 --shots 1 --base-lrs 0.1 1".split()
FLAGS += "--precision fp32".split()


@pytest.fixture(scope="module")
def pretrained(toy, tmp_path_factory):
    """A folder with runs/pretrain-toy, of clips that are not the toy recipe's."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("pretrained")
        patch.chdir(folder)
        draw_nothing(patch)
        flags = "--epochs 1 --batch 12 --warmup 0.5 --resolution 32 --stride 1".split()
        pretrain.main(["toy", "--data", str(toy), *flags])
    return folder


@pytest.fixture
def here(toy, pretrained, monkeypatch):
    """That folder as working directory; the toy set's path. Nothing is drawn."""
    monkeypatch.chdir(pretrained)
    draw_nothing(monkeypatch)
    return str(toy)


def result(name):
    return json.load(open(f"runs/{name}/results.json"))


def test_features_are_cached_and_made_anew_when_anything_changed(here, capsys, monkeypatch):
    flags = ["toy", "--data", here, *FLAGS]
    linprobe.main(flags)
    first, out = result("linprobe-toy"), capsys.readouterr().out
    assert "56 of 56 tensors matched" in out and "decoder left out" in out
    assert "clips of 8 frames, stride 1, 32x32 pixels, cubes 2x8x8, size toy" in out
    assert "note: in under 100 steps" in out
    assert set(first["sweep"]) == {"0.1", "1.0"} and out.count("% of the held-out") == 2
    (saved,) = torch.load("runs/linprobe-toy/features.pt", weights_only=True).values()
    assert len(saved) == 24 and all(feature.shape == (2, 128) for feature in saved.values())
    with monkeypatch.context() as patch:
        for views in (evaluate.WindowViews, linprobe.RandomViews):
            patch.setattr(views, "__getitem__", None)  # must not be needed again
        linprobe.main([*flags, "--epochs", "3"])
        for change in (["--stride", "2"], ["--seed", "1"], ["--shots", "2"]):
            with pytest.raises(TypeError):
                linprobe.main([*flags, *change, "--name", "linprobe-toy"])  # other features
    with open("runs/linprobe-toy/features.pt", "r+b") as file:
        file.truncate(1000)
    linprobe.main([*flags, "--init", os.path.abspath("runs/pretrain-toy")])
    linprobe.main(flags)  # a broken cache is as none
    assert result("linprobe-toy") == first
    kept = open("runs/linprobe-toy/features.pt", "rb").read()
    other = ["--init", "random", "--resolution", "32", "--name", "linprobe-toy"]
    with pytest.raises(ValueError, match="linprobe-toy holds results of other weights: choose a"):
        linprobe.main([*flags, *other])
    assert result("linprobe-toy") == first
    assert open("runs/linprobe-toy/features.pt", "rb").read() == kept
    # Cubes of other sides, of equal weights in the same shapes.
    flags += "--init random --positions 1d --resolution 32 --name cubes --cube 2".split()
    linprobe.main([*flags, "4", "16"])
    monkeypatch.setattr(evaluate.WindowViews, "__getitem__", None)
    with pytest.raises(TypeError):
        linprobe.main([*flags, "16", "4"])


def test_an_untrained_encoder_has_other_features_and_a_folder_of_its_own(here):
    flags = ["toy", "--data", here, *FLAGS, "--repeats", "1", "--clips", "1"]
    linprobe.main([*flags, "--name", "trained"])
    linprobe.main([*flags, "--init", "random", "--resolution", "32"])
    files = [f"runs/{name}/features.pt" for name in ("trained", "linprobe-toy-random")]
    tested = [next(iter(torch.load(file, weights_only=True).values())) for file in files]
    assert tested[0].keys() == tested[1].keys()
    assert not any(torch.allclose(tested[0][key], tested[1][key]) for key in tested[0])
    assert len(visualize.read_predictions("runs/linprobe-toy-random/predictions.csv")) == 12


def test_a_fine_tuned_encoder_is_probed_without_a_last_norm(here, capsys):
    small = "--epochs 1 --warmup 0 --batch 12 --shots 1 --clips 1 --name tuned".split()
    finetune.main(["toy", "--data", here, *small])
    capsys.readouterr()
    flags = ["--init", "runs/tuned/checkpoint.pt", "--repeats", "1", "--clips", "1"]
    with pytest.raises(ValueError, match="runs/tuned holds results of other weights"):
        linprobe.main(["toy", "--data", here, *FLAGS, *flags, "--name", "tuned"])
    capsys.readouterr()
    flags += ["--name", "probe-of-tuned"]
    linprobe.main(["toy", "--data", here, *FLAGS, *flags])
    assert "54 of 54 tensors matched" in capsys.readouterr().out


def test_the_choice_of_the_learning_rate_never_sees_a_test_video(monkeypatch):
    """The choice is given training features alone; each is held out once, never trained on then."""
    features, labels = torch.arange(25.0)[:, None, None].expand(25, 2, 8), torch.arange(25) % 3
    trained, scored = [], []

    def train_head(part, its_labels, classes, base_lr, cfg):
        trained.append(set(part[:, 0, 0].tolist()))
        assert torch.equal(its_labels, part[:, 0, 0].long() % 3)

    def score(head, part):
        scored.append(set(part[:, 0, 0].tolist()))
        right = (part[..., 0].long() % 3)[..., None] == torch.arange(3)
        return right.float()

    monkeypatch.setattr(linprobe, "train_head", train_head)
    monkeypatch.setattr(linprobe, "score", score)
    cfg = linprobe.Config(base_lrs=(0.1, 1.0))
    assert linprobe.choose_lr(features, labels, 3, cfg) == {0.1: 100.0, 1.0: 100.0}
    for base_lr in range(2):
        held = scored[5 * base_lr :][:5]
        assert sum(map(len, held)) == 25 and set().union(*held) == set(range(25))
    for rest, held in zip(trained, scored, strict=True):
        assert rest | held == set(range(25)) and not rest & held


def test_test_labels_change_no_choice_and_no_score(here, tmp_path):
    """The same test videos under other labels: same learning rate, same scores."""
    test = read_split(here, train=False)
    links = [tmp_path / path.name for path in test.paths]  # where no folder tells the class
    for link, path in zip(links, test.paths, strict=True):
        link.symlink_to(path)
    for name, shift in (("as-is", 0), ("shifted", 1)):
        lines = [f"{p} {(k + shift) % 12}\n" for p, k in zip(links, test.labels, strict=True)]
        (tmp_path / f"{name}.txt").write_text("".join(lines))
        more = ["--test-splits", str(tmp_path / f"{name}.txt"), "--name", name, "--clips", "1"]
        linprobe.main(["toy", "--data", here, *FLAGS, *more])
    a, b = result("as-is"), result("shifted")
    assert a["sweep"] == b["sweep"] and a["base_lr"] == b["base_lr"]
    rows = [visualize.read_predictions(f"runs/{n}/predictions.csv") for n in ("as-is", "shifted")]
    assert [r["probabilities"] for r in rows[0]] == [r["probabilities"] for r in rows[1]]
    assert [r["label"] for r in rows[0]] != [r["label"] for r in rows[1]]


def test_an_interrupted_extraction_goes_on_where_it_was(here, tmp_path, monkeypatch, capsys):
    """Ctrl-C in test and training videos, a broken test video: no view is computed twice."""
    test, read = read_split(here, train=False), []
    videos = [shutil.copy(path, tmp_path) for path in test.paths]
    lines = [f"{path} {label}\n" for path, label in zip(videos, test.labels, strict=True)]
    (tmp_path / "test.txt").write_text("".join(lines))
    whole = open(videos[4], "rb").read()
    open(videos[4], "wb").write(b"no video")
    flags = ["toy", "--data", here, *FLAGS, "--test-splits", str(tmp_path / "test.txt")]

    def counted(get):
        def item(views, index):
            read.append(index)
            if len(read) == stop:
                raise KeyboardInterrupt
            return get(views, index)

        return item

    for views in (evaluate.WindowViews, linprobe.RandomViews):
        monkeypatch.setattr(views, "__getitem__", counted(views.__getitem__))

    def run(name, when):
        nonlocal stop
        stop = when
        read.clear()
        linprobe.main([*flags, "--name", name])
        return len(read)

    stop = None
    for when in (4, 3):
        with pytest.raises(SystemExit) as caught:
            run("cut", when)
        out = capsys.readouterr().out.splitlines()
        assert caught.value.code == 130 and "features.pt keeps" in out[-1]
    with pytest.raises(ValueError, match="^1 videos cannot be read: .*then the same command"):
        run("cut", None)
    assert len(read) == 12 - 3 - 1
    open(videos[4], "wb").write(whole)
    with pytest.raises(SystemExit):
        run("cut", 6)  # the mended one, 4 of 12 training videos
    os.utime(finetune.draw_shots(read_split(here), 1, 0).paths[0])  # another training video
    assert run("cut", None) == 8 + 1 and run("cut", None) == 0
    assert run("whole", None) == 24
    (a,), (b,) = (torch.load(f"runs/{n}/features.pt").values() for n in ("cut", "whole"))
    assert all(torch.equal(a[key], b[key]) for key in b)
    assert result("cut")["sweep"] == result("whole")["sweep"]


def test_unreadable_training_videos_are_left_out(here, tmp_path, capsys):
    """A tenth of them; more are refused."""
    train = read_split(here)
    lines = [f"{path} {label}\n" for path, label in zip(train.paths, train.labels, strict=True)]
    (tmp_path / "broken0.avi").write_bytes(b"no video")
    (tmp_path / "broken1.avi").write_bytes(b"no video")
    flags = ["toy", "--data", here, *FLAGS, "--shots", "0", "--splits", str(tmp_path / "list.txt")]
    flags += ["--test-splits", str(tmp_path / "test.txt"), "--repeats", "1", "--clips", "1"]
    test = read_split(here, train=False)
    (tmp_path / "test.txt").write_text(f"{test.paths[0]} {test.labels[0]}\n")
    lines[3] = f"{tmp_path}/broken0.avi 1\n"
    (tmp_path / "list.txt").write_text("".join(lines))
    linprobe.main([*flags, "--name", "left"])
    assert f"left out, unreadable: {tmp_path}/broken0.avi" in capsys.readouterr().out
    (tmp_path / "list.txt").write_text("".join([*lines[:14], f"{tmp_path}/broken1.avi 11\n"]))
    with pytest.raises(ValueError, match="over a tenth of the videos cannot be read"):
        linprobe.main([*flags, "--name", "left"])


def test_views_are_those_of_the_flags(toy):
    split, cfg = read_split(toy), linprobe.Config(**finetune.TOY_CLIPS, sampling="dense", repeats=1)

    def views(**flags):
        views = linprobe.RandomViews(split, replace(cfg, **flags))
        return [views[i] for i in range(8)]

    broken = replace(split, paths=[split.paths[0].parent], labels=[0])
    assert "cannot be read" in linprobe.RandomViews(broken, cfg)[0]  # the only one there is
    mirrored = [torch.equal(a, b.flip(-1)) for a, b in zip(views(flip=True), views(), strict=True)]
    same = [torch.equal(a, b) for a, b in zip(views(flip=True), views(), strict=True)]
    assert any(mirrored) and any(same) and all(a != b for a, b in zip(mirrored, same, strict=True))
    assert not torch.equal(views()[0], views(sampling="uniform")[0])
    test = [evaluate.WindowViews(split.paths, replace(cfg, **how))[0]
            for how in ({}, dict(augment="official"), dict(sampling="uniform"))]  # fmt: skip
    assert not torch.equal(test[0], test[1]) and not torch.equal(test[0], test[2])


def test_features_of_any_videos(here, tmp_path, capsys):
    videos = [f"{here}/Pulse/v_Pulse_g01_c01.avi", f"{here}/Turn2/v_Turn2_g01_c01.avi"]
    linprobe.main(["--features", "out.npz", "--videos", *videos])
    out = np.load("out.npz", allow_pickle=False)
    assert out["paths"].tolist() == videos and out["features"].shape == (2, 128)
    _, cfg = engine.parse_config(linprobe.Config, ["toy"], "", linprobe.PRESETS)
    cfg, model = linprobe.make_encoder(cfg, "toy")
    tokens = model["encoder"](evaluate.WindowViews(videos, cfg)[1])  # (views, N, D)
    assert np.allclose(out["features"][1], tokens.mean(dim=(0, 1)), atol=2e-2)  # perhaps in bf16
    linprobe.main(["toy", "--features", "new/all.npz", "--videos", here, "--clips", "1"])
    assert len(set(np.load("new/all.npz")["paths"].tolist())) == 36
    for name in "ab":
        shutil.copy(videos[0], tmp_path / f"{name}.avi")
    (tmp_path / "c.avi").write_bytes(b"no video")
    with pytest.raises(SystemExit) as caught:
        linprobe.main(["--features", "out.npz", "--videos", str(tmp_path), "--every", "1"])
    assert caught.value.code == 1 and f"{tmp_path}/c.avi" in capsys.readouterr().err
    more = np.load("out.npz", allow_pickle=False)
    assert more["starts"].tolist() == [0, 1, 0, 1] and len({*more["paths"].tolist()}) == 2
    assert not np.allclose(more["features"][0], more["features"][1])
    assert np.array_equal(more["features"][:2], more["features"][2:])
    with pytest.raises(SystemExit):
        linprobe.main(["--features", "out.npz", "--videos", str(tmp_path), "--every", "0.5"])
    assert not np.allclose(np.load("out.npz")["features"][0], more["features"][0])


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--videos a.avi", "go together"),
        ("--features out.npz", "go together"),
        ("--init nowhere.pt --shots 0", "nowhere.pt"),
        ("--splits few.txt --test-splits test.txt --shots 0", "2 labelled videos are too few"),
        ("--epochs 3 --warmup 3 --shots 1", "--warmup 3 must be less than --epochs 3"),
    ],
)
def test_mistakes_are_told_in_one_line(here, flags, message):
    with open("few.txt", "w") as few, open("test.txt", "w") as test:
        few.write("Pulse/v_Pulse_g01_c01.avi 0\nTurn2/v_Turn2_g01_c01.avi 1\n")
        test.write("Slide0/v_Slide0_g01_c01.avi 0\n")
    with pytest.raises(ValueError, match=message) as caught:
        linprobe.main(["toy", "--data", here, "--init", "random", *flags.split()])
    assert "\n" not in str(caught.value)


def test_head_finds_what_is_linear():
    torch.manual_seed(0)
    labels = torch.arange(240) % 3
    features = torch.randn(240, 2, 8) * torch.logspace(-3, 2, 8) + 5
    features[..., 0] += 1e-2 * labels[:, None]  # small beside the others until the head normalises
    cfg = linprobe.Config(epochs=60, batch=40, warmup=5)
    head = linprobe.train_head(features, labels, 3, 1.0, cfg)
    scores = linprobe.score(head, features)
    assert evaluate.accuracies(scores, labels.tolist())["top1"] > 95
    assert torch.allclose(scores.sum(dim=2), torch.ones(240, 2))


# ------------------------------------------------------------------------------- files with code


class Attack:
    """Unpickling it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("kind", ["pickle", "other keys"])
def test_a_cache_is_made_anew_whatever_it_is_and_its_code_does_not_run(here, tmp_path, kind):
    ran = tmp_path / "ran"
    os.makedirs("runs/strange", exist_ok=True)
    with open("runs/strange/features.pt", "wb") as file:
        torch.save(Attack(ran) if kind == "pickle" else dict(x=1), file)
    flags = "--init random --epochs 1 --warmup 0 --base-lrs 1 --repeats 1 --clips 1 --resolution 16"
    linprobe.main(["toy", "--data", here, "--name", "strange", "--shots", "1", *flags.split()])
    assert not ran.exists() and result("strange")["top1"] >= 0
    (kept,) = torch.load("runs/strange/features.pt", weights_only=True).values()
    assert len(kept) == 24


def test_no_code_in_weights_runs(here, tmp_path):
    torch.save({"model": {"a": torch.ones(2)}, "optimizer": Attack(tmp_path / "ran")}, "bad.pth")
    with pytest.raises(ValueError, match="bad.pth.*would run"):
        linprobe.main(["toy", "--data", here, "--init", "bad.pth"])
    assert not (tmp_path / "ran").exists()
