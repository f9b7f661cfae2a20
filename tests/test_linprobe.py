"""The linear probe: features and their cache, the choice of the learning rate, the head."""

import json
import os
import pickle
import shutil

import numpy as np
import pytest
import torch

import finetune
import linprobe
import pretrain
import visualize
from data import read_split

FLAGS = "--batch 8 --epochs 2 --warmup 1 --repeats 2 --shots 1 --base-lrs 0.1 1".split()
FLAGS += "--precision fp32".split()


@pytest.fixture(scope="module")
def pretrained(toy, tmp_path_factory):
    """A folder with runs/pretrain-toy, of clips that are not the toy recipe's."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("pretrained")
        patch.chdir(folder)
        for name in ("main", "plot_log"):
            patch.setattr(visualize, name, lambda *args: None)
        flags = "--epochs 1 --batch 12 --warmup 0.5 --resolution 32 --stride 1".split()
        pretrain.main(["toy", "--data", str(toy), *flags])
    return folder


@pytest.fixture
def here(toy, pretrained, monkeypatch):
    """That folder as working directory; the toy set's path. Nothing is drawn."""
    monkeypatch.chdir(pretrained)
    for name in ("plot_log", "plot_classes"):
        monkeypatch.setattr(visualize, name, lambda *paths: None)
    return str(toy)


def result(name):
    return json.load(open(f"runs/{name}/results.json"))


def test_features_are_cached_and_made_anew_when_anything_changed(here, capsys, monkeypatch):
    flags = ["toy", "--data", here, *FLAGS]
    linprobe.main(flags)
    first, out = result("linprobe-toy"), capsys.readouterr().out
    assert "56 of 56 tensors matched" in out and "decoder left out" in out
    assert "clips of 8 frames, stride 1, 32x32 pixels, cubes 2x8x8, size toy" in out
    assert set(first["sweep"]) == {"0.1", "1.0"} and out.count("% of the held-out") == 2
    saved = dict(np.load("runs/linprobe-toy/features.npz", allow_pickle=False))
    assert saved["train"].shape == (12, 2, 128) and saved["test"].shape == (12, 2, 128)
    with monkeypatch.context() as patch:
        patch.setattr(linprobe, "encode", None)  # must not be needed again
        linprobe.main([*flags, "--epochs", "3"])
        for change in (["--stride", "2"], ["--seed", "1"], ["--init", "random"], ["--shots", "2"]):
            with pytest.raises(TypeError):
                linprobe.main([*flags, *change, "--name", "linprobe-toy"])  # other features
        os.utime("runs/pretrain-toy/checkpoint.pt")
        with pytest.raises(TypeError):
            linprobe.main(flags)  # other weights
    with open("runs/linprobe-toy/features.npz", "r+b") as file:
        file.truncate(1000)
    linprobe.main(flags)  # a broken cache is as none
    assert result("linprobe-toy") == first


def test_an_untrained_encoder_has_other_features_and_a_folder_of_its_own(here):
    flags = ["toy", "--data", here, *FLAGS, "--repeats", "1", "--clips", "1"]
    linprobe.main([*flags, "--name", "trained"])
    linprobe.main([*flags, "--init", "random", "--resolution", "32"])
    files = [f"runs/{name}/features.npz" for name in ("trained", "linprobe-toy-random")]
    tested = [np.load(file)["test"] for file in files]
    assert tested[0].shape == tested[1].shape and not np.allclose(*tested)
    assert len(visualize.read_predictions("runs/linprobe-toy-random/predictions.csv")) == 12


def test_a_fine_tuned_encoder_is_probed_without_a_last_norm(here, capsys):
    small = "--epochs 1 --warmup 0 --batch 12 --shots 1 --clips 1 --name tuned".split()
    finetune.main(["toy", "--data", here, *small])
    capsys.readouterr()
    flags = ["--init", "runs/tuned/checkpoint.pt", "--repeats", "1", "--clips", "1"]
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
        right = (part[:, 0, 0].long() % 3)[:, None] == torch.arange(3)
        return right.float(), torch.zeros(len(part), 2, dtype=torch.long)

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
    for name, shift in (("as-is", 0), ("shifted", 1)):
        lines = [f"{p} {(k + shift) % 12}\n" for p, k in zip(test.paths, test.labels, strict=True)]
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
    test, encode, clips = read_split(here, train=False), linprobe.encode, []
    videos = [shutil.copy(path, tmp_path) for path in test.paths]
    lines = [f"{path} {label}\n" for path, label in zip(videos, test.labels, strict=True)]
    (tmp_path / "test.txt").write_text("".join(lines))
    whole = open(videos[4], "rb").read()
    open(videos[4], "wb").write(b"no video")
    flags = ["toy", "--data", here, *FLAGS, "--test-splits", str(tmp_path / "test.txt")]

    def run(name, stop):
        def counted(encoder, views, **how):
            clips.append(float(views.float().mean()))
            if len(clips) == stop:
                raise KeyboardInterrupt
            return encode(encoder, views, **how)

        monkeypatch.setattr(linprobe, "encode", counted)
        del clips[:]
        linprobe.main([*flags, "--name", name])
        return len(clips)

    for stop in (4, 3):
        with pytest.raises(SystemExit) as caught:
            run("cut", stop)
        out = capsys.readouterr().out.splitlines()
        assert caught.value.code == 130 and "test.part.pt keeps" in out[-1]
    with pytest.raises(ValueError, match="^1 videos cannot be read: .*then the same command"):
        run("cut", None)
    assert len(clips) == 11 - 3 - 2
    open(videos[4], "wb").write(whole)
    with pytest.raises(SystemExit):
        run("cut", 6)  # the mended one, 4 of 12 training videos
    os.utime(finetune.draw_shots(read_split(here), 1, 0).paths[0])  # another training video
    assert run("cut", None) == 8 + 1 and run("cut", None) == 0
    assert not [file for file in os.listdir("runs/cut") if "part" in file]
    assert run("whole", None) == 24
    a, b = (np.load(f"runs/{name}/features.npz") for name in ("cut", "whole"))
    assert all(np.array_equal(a[key], b[key]) for key in ("train", "labels", "test"))


def test_features_of_any_videos(here, tmp_path, capsys):
    videos = [f"{here}/Pulse/v_Pulse_g01_c01.avi", f"{here}/Turn2/v_Turn2_g01_c01.avi"]
    linprobe.main(["--features", "out.npz", "--videos", *videos])
    out = np.load("out.npz", allow_pickle=False)
    assert out["paths"].tolist() == videos and out["features"].shape == (2, 128)
    linprobe.main(["toy", "--features", "all.npz", "--data", here, "--clips", "1"])
    assert len(set(np.load("all.npz")["paths"].tolist())) == 36
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
        ("--features nowhere/out.npz", "in a folder that exists"),
        ("--features out.npy", "must be an .npz file"),
        ("--videos a.avi", "goes with --features"),
        ("--init nowhere.pt --shots 0", "nowhere.pt"),
        ("--splits few.txt --test-splits test.txt --shots 0", "2 labelled videos are too few"),
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
    scores, views = linprobe.score(head, features)
    assert finetune.accuracies(scores, views, labels.tolist())["top1"] > 95
    assert torch.allclose(scores.sum(dim=1), torch.ones(240))


# ------------------------------------------------------------------------------- files with code


class Attack:
    """Unpickling it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("kind", ["pickle", "object array", "npy", "empty", "other keys", "text"])
def test_a_cache_is_made_anew_whatever_it_is_and_its_code_does_not_run(here, tmp_path, kind):
    ran = tmp_path / "ran"
    os.makedirs("runs/strange", exist_ok=True)
    with open("runs/strange/features.npz", "wb") as file:
        if kind == "pickle":
            pickle.dump(Attack(ran), file)
        elif kind == "npy":
            np.save(file, np.ones(3))
        elif kind == "text":
            file.write(b"hello")
        elif kind != "empty":
            objects = dict(about=np.array([Attack(ran)], dtype=object))
            np.savez(file, **dict(x=np.ones(2)) if kind == "other keys" else objects)
    flags = "--init random --epochs 1 --warmup 0 --base-lrs 1 --repeats 1 --clips 1 --resolution 16"
    linprobe.main(["toy", "--data", here, "--name", "strange", "--shots", "1", *flags.split()])
    assert not ran.exists() and result("strange")["top1"] >= 0
    names = set(np.load("runs/strange/features.npz", allow_pickle=False))
    assert names == {"about", "train", "labels", "test"}


def test_no_code_in_weights_runs(here, tmp_path):
    torch.save({"model": {"a": torch.ones(2)}, "optimizer": Attack(tmp_path / "ran")}, "bad.pth")
    with pytest.raises(ValueError, match="bad.pth.*would run"):
        linprobe.main(["toy", "--data", here, "--init", "bad.pth"])
    assert not (tmp_path / "ran").exists()
