"""Files and names from others: no code in them runs, nothing is written outside runs/, tables and figures survive."""

import json
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from zoo import write

import data
import engine
import finetune
import linprobe
import pretrain
import visualize
from data import Split, read_frames, read_split
from model import Classifier
from visualize import join_names, plot_classes, read_predictions, split_names

HOSTILE = [
    "../../x", "=HYPERLINK(1)", "+1", "-1", "@SUM(1)", "\ttab", "\rreturn", "a;b", "a;=1+1", "c\\;d\\", "'quoted'",
    "$x$", "new\nline", 'quo"te', "com,ma", "--init", "", "\\", ";", os.fsdecode(b"caf\xe9"), "\x1b[31m", "\u202e",
    "日本",
]  # fmt: skip


class Attack:
    """Unpickling it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture
def ran(tmp_path, monkeypatch):
    """The folder that code in a file would make; the working directory is an empty one."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    pickle.loads(pickle.dumps(Attack(tmp_path / "ran")))
    (tmp_path / "ran").rmdir()  # it would have
    return tmp_path / "ran"


def malicious(path, ran, top=None):
    """A checkpoint with code in it."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    torch.save((top or {}) | {"model": {"a": torch.ones(2)}, "optimizer": Attack(ran)}, path)


@pytest.mark.parametrize(
    "main, flags, file",
    [
        (pretrain.main, "--data DATA --batch 8 --resume", "runs/pretrain-toy/checkpoint.pt"),
        (finetune.main, "--data DATA --resume", "runs/finetune-toy/checkpoint.pt"),
        (finetune.main, "--data DATA --eval-only", "runs/finetune-toy/checkpoint.pt"),
        (finetune.main, "--predict a.avi", "runs/finetune-toy/checkpoint.pt"),
        (finetune.main, "--data DATA", "runs/pretrain-toy/checkpoint.pt"),
        (finetune.main, "--data DATA --init a.pth", "a.pth"),
        (linprobe.main, "--data DATA --init a.pth", "a.pth"),
        (linprobe.main, "--data DATA --init folder", "folder/pytorch_model.bin"),
        (linprobe.main, "--data DATA --init a.safetensors", "a.safetensors"),
        (visualize.main, "--checkpoint a.pt", "a.pt"),
    ],
)
def test_no_stage_runs_code_of_a_checkpoint(toy, ran, main, flags, file):
    malicious(file, ran, {"stage": "pretrain" if main is pretrain.main else "finetune", "step": 0})
    with pytest.raises(ValueError, match=rf"{file.split('/')[0]}.*(would run|not a readable|no weights)"):
        main(flags.replace("DATA", str(toy)).split())
    assert not ran.exists()


@pytest.mark.parametrize("kind", ["pickle", "object array", "npy", "empty", "other keys", "text"])
def test_a_cache_of_features_is_made_anew_whatever_it_is(toy, ran, kind, capsys, monkeypatch):
    run = "runs/linprobe-toy-random"
    os.makedirs(run)
    with open(f"{run}/features.npz", "wb") as file:
        if kind == "pickle":
            pickle.dump(Attack(ran), file)
        elif kind == "npy":
            np.save(file, np.ones(3))
        elif kind != "empty":
            arrays = {"x": np.ones(2)} if kind == "other keys" else dict(about=np.array([Attack(ran)], dtype=object))
            file.write(b"hello") if kind == "text" else np.savez(file, **arrays)
    monkeypatch.setattr(visualize, "plot_classes", lambda *paths: None)  # takes long, and is drawn elsewhere
    flags = "--init random --epochs 1 --warmup 0 --base-lrs 1 --repeats 1 --shots 1 --clips 1 --resolution 16"
    linprobe.main(["--data", str(toy), *flags.split()])
    assert not ran.exists() and "top-1" in capsys.readouterr().out
    assert set(np.load(f"{run}/features.npz", allow_pickle=False)) == {"about", "train", "train_labels", "test"}


def test_tables_lists_logs_and_videos_with_code_are_refused(ran):
    code = pickle.dumps(Attack(ran))
    for name in ("predictions.csv", "list.txt", "log.jsonl", "video.avi"):
        with open(name, "wb") as file:
            file.write(code)
    for read in (
        lambda: read_predictions("predictions.csv"),
        lambda: read_split(".", "list.txt"),
        lambda: visualize.plot_log(visualize.Path("log.jsonl"), "log.png"),
        lambda: read_frames("video.avi", [0]),
        lambda: data.probe("video.avi"),
    ):
        with pytest.raises(ValueError):
            read()
    assert not ran.exists()


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(hidden_size="32"), "hidden_size = '32'"),
        (dict(num_hidden_layers=10**9), "num_hidden_layers = '1000000000'"),
        (dict(image_size=[10**9, 4]), "image_size"),
        (dict(image_size=[]), "image_size"),
        (dict(patch_size=0), "patch_size = '0'"),
        (dict(id2label=["a"]), "id2label"),
        ([], "not a Hugging Face configuration"),
    ],
)
def test_configurations_that_cannot_be_are_one_line(tmp_path, change, words):
    state = {"videomae.encoder.layer.0.layernorm_before.weight": torch.ones(8), "classifier.weight": torch.ones(2, 8)}
    state |= {str(i): torch.ones(1) for i in range(4)}
    torch.save(state, tmp_path / "pytorch_model.bin")
    config = {"model_type": "videomae", "num_hidden_layers": 1} | change if change else change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=words) as caught:
        finetune.read_weights(tmp_path)
    assert "config.json: " in str(caught.value) and "\n" not in str(caught.value)


def test_an_index_of_weights_stays_in_its_folder(tmp_path):
    (tmp_path / "folder").mkdir()
    torch.save({"a": torch.ones(2)}, tmp_path / "secret.bin")
    for part in ("../secret.bin", str(tmp_path / "secret.bin")):
        (tmp_path / "folder" / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": part}}))
        with pytest.raises(ValueError, match="outside of the folder"):
            finetune.read_weights(tmp_path / "folder")


# tables and figures


def test_tables_give_back_every_name_and_hold_no_formula(tmp_path):
    paths = [f"{name}/{i}.avi" for i, name in enumerate(HOSTILE)]
    split = Split(paths, list(range(len(HOSTILE))), HOSTILE)
    scores = torch.rand(len(HOSTILE), len(HOSTILE), generator=torch.Generator().manual_seed(0))
    finetune.write_predictions(tmp_path / "p.csv", split, scores)
    rows = read_predictions(tmp_path / "p.csv")
    assert [row["path"] for row in rows] == paths and [row["label"] for row in rows] == HOSTILE
    best = scores.topk(5).indices.tolist()
    assert [row["top5"] for row in rows] == [[HOSTILE[i] for i in row] for row in best]
    assert [row["prediction"] for row in rows] == [HOSTILE[row[0]] for row in best]
    raw = open(tmp_path / "p.csv", newline="", encoding="utf-8", errors="surrogateescape")
    for row in list(visualize.csv.reader(raw))[1:]:
        for cell in (*row, *row[4].split(";")):
            assert not cell.startswith(tuple("=+-@\t\r\n"))
    plot_classes(tmp_path / "p.csv", tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 1000
    assert split_names(join_names(HOSTILE)) == HOSTILE and split_names("a;b") == ["a", "b"]


def tree(folder, but):
    """Every file below a folder, with its time and size, without those below `but`."""
    files = (os.path.join(root, name) for root, _, names in os.walk(folder) for name in names)
    return {file: os.stat(file)[6:9:2] for file in files if not file.startswith(str(but))}


def test_hostile_names_train_and_stay_inside_the_run(ran, tmp_path, capsys):
    names = [name for name in HOSTILE if name and "/" not in name][:12]
    video = write(tmp_path / "a.avi", "mpeg4", frames=8)
    for part in ("train", "test"):
        for number, name in enumerate(names):
            place = tmp_path / part / name / f"{name[:3]}{number}\n$.avi"
            place.parent.mkdir(parents=True)
            shutil.copy(video, place)
    before = tree(tmp_path, tmp_path / "here" / "runs")
    flags = ["--data", str(tmp_path / "train"), "--test-data", str(tmp_path / "test"), "--shots", "0", "--init", "none"]
    finetune.main([*flags, "--epochs", "1", "--warmup", "0", "--batch", "12", "--name", "r", "--resolution", "16"])
    assert tree(tmp_path, tmp_path / "here" / "runs") == before and os.listdir("runs") == ["r"]
    test, rows = read_split(tmp_path / "test"), read_predictions("runs/r/predictions.csv")
    assert [row["path"] for row in rows] == list(map(str, test.paths)) and len(rows) == 12
    assert [row["label"] for row in rows] == [test.classes[label] for label in test.labels]
    assert sorted(test.classes) == sorted(names) and os.path.getsize("runs/r/classes.png") > 1000
    capsys.readouterr()
    visualize.main(["--compare", "runs/r/predictions.csv", "runs/r/predictions.csv", "--out", "runs/r/c.png"])
    finetune.main(["--name", "r", "--predict", str(test.paths[0])])
    assert "\n$" not in capsys.readouterr().out  # the newline of the name is escaped
    about = engine.load_checkpoint("runs/r/checkpoint.pt", "finetune")["config"]
    assert about["classes"] == test.classes and isinstance(Classifier(**about["model"]), Classifier)


def test_lists_may_read_anywhere_and_write_nowhere_else(ran, tmp_path):
    (tmp_path / "data").mkdir()
    video = write(tmp_path / "a.avi", "mpeg4", frames=8)
    for i in range(12):
        os.link(video, tmp_path / f"{i}.avi") if i else None
    copies = [shutil.copy(video, tmp_path / f"copy{i}.avi") for i in range(2)]
    lines = [f"../{i}.avi {i % 2}" for i in range(1, 12)]
    (tmp_path / "train.txt").write_text("\n".join(lines) + "\n")
    (tmp_path / "test.txt").write_text(f"{copies[0]} 0\n{tmp_path}/data/../copy1.avi 1\n")
    before = tree(tmp_path, tmp_path / "here" / "runs")
    flags = ["--data", str(tmp_path / "data"), "--splits", str(tmp_path / "train.txt"), "--init", "random"]
    linprobe.main([*flags, "--test-splits", str(tmp_path / "test.txt"), "--shots", "0", "--epochs", "1", "--warmup",
                   "0", "--base-lrs", "1", "--repeats", "1", "--name", "r", "--batch", "4"])  # fmt: skip
    assert tree(tmp_path, tmp_path / "here" / "runs") == before and os.listdir("runs") == ["r"]
    assert len(read_predictions("runs/r/predictions.csv")) == 2
