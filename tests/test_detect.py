"""Action detection: AVA's files and metric, clips and boxes, the head, the whole stage."""

import csv
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from films import number_of, write
from PIL import Image
from torchvision import tv_tensors

import detect
import finetune
import pretrain
import visualize
from detect import PRESETS, Config, Detector
from lib import ava, engine
from lib.toy import MOTIONS, make_toy_films, toy_film
from lib.weights import load_model, read_weights

LEFT, RIGHT = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)
NUDGED = (0.0, 0.0, 0.4, 1.0)  # overlaps LEFT by 0.8


# ------------------------------------------------------------------------------------------ metric


def precisions(found, truth, actions=(1,)):
    """average_precisions of {frame: [(box, scores)]}."""
    arrays = {}
    for frame, rows in found.items():
        boxes, scores = zip(*rows, strict=True)
        arrays[frame] = np.array(boxes), np.array(scores, float).reshape(len(rows), len(actions))
    return ava.average_precisions(arrays, truth, list(actions))


ONE = {("a", 1): {LEFT: {1}}}
TWO = {("a", 1): {LEFT: {1}, RIGHT: {1}}}


@pytest.mark.parametrize(
    "found, truth, expected",
    [
        ([(LEFT, 0.9)], ONE, 1.0),
        ([(NUDGED, 0.1)], ONE, 1.0),  # the score is not a threshold
        ([(RIGHT, 0.9)], ONE, 0.0),
        ([((0.0, 0.0, 0.25, 1.0), 0.9)], ONE, 1.0),  # an overlap of exactly a half counts
        ([((0.0, 0.0, 0.24, 1.0), 0.9)], ONE, 0.0),
        ([(RIGHT, 0.9), (LEFT, 0.8)], ONE, 0.5),  # right at rank 2
        ([(LEFT, 0.9), (NUDGED, 0.8)], ONE, 1.0),  # a duplicate after it costs nothing ...
        ([(LEFT, 0.9), (NUDGED, 0.8), (RIGHT, 0.7)], TWO, 0.5 + 0.5 * 2 / 3),  # ... but here
        ([(NUDGED, 0.9), (LEFT, 0.8)], ONE, 1.0),  # the best score takes the person
        ([(LEFT, 0.9)], TWO, 0.5),  # one is missed
        ([(LEFT, 0.5), (RIGHT, 0.5)], ONE, 0.5),  # ties come in together, in any order
        ([(RIGHT, 0.5), (LEFT, 0.5)], ONE, 0.5),
        ([(LEFT, 0.9), (LEFT, 0.5), (RIGHT, 0.4)], TWO, 0.5 + 0.5 * 2 / 3),
    ],
)
def test_average_precision_by_hand(found, truth, expected):
    assert precisions({("a", 1): found}, truth)[1] == pytest.approx(expected)


def test_frames_without_truth_or_without_detections_count():
    elsewhere = {("a", 1): [(LEFT, 0.5)], ("a", 2): [(LEFT, 0.9)]}  # wrong, and before the right
    assert precisions(elsewhere, ONE)[1] == pytest.approx(0.5)
    missed = ONE | {("b", 1): {LEFT: {1}}}
    assert precisions({("a", 1): [(LEFT, 0.9)]}, missed)[1] == pytest.approx(0.5)
    assert precisions({}, ONE)[1] == 0


def test_actions_are_scored_apart_and_one_that_nobody_does_has_no_precision():
    truth = {("a", 1): {LEFT: {1, 2}, RIGHT: {2}}}
    found = {("a", 1): [(LEFT, (0.9, 0.1, 0.9)), (RIGHT, (0.8, 0.2, 0.9))]}
    each = precisions(found, truth, (1, 2, 7))
    assert (each[1], each[2]) == (1, 1) and np.isnan(each[7])
    found[("a", 1)].reverse()
    assert precisions(found, truth, (1, 2, 7))[1] == 1


def official(detections, truth, action):
    """The metric again, box by box, for scores that all differ."""
    positives = sum(action in does for persons in truth.values() for does in persons.values())
    taken, hits, points = set(), 0, []
    for rank, (_, frame, box) in enumerate(sorted(detections, reverse=True), 1):
        best, whom = 0.0, None
        for person, does in truth.get(frame, {}).items():
            wide = min(box[2], person[2]) - max(box[0], person[0])
            high = min(box[3], person[3]) - max(box[1], person[1])
            inside = max(wide, 0) * max(high, 0)
            areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (box, person)]
            overlap = inside / (sum(areas) - inside)
            if action in does and overlap > best:
                best, whom = overlap, (frame, person)
        hit = best >= 0.5 and whom not in taken
        hits += hit
        taken |= {whom} if hit else set()
        points.append((hits / positives, hits / rank))
    recalls = sorted({recall for recall, _ in points} | {0.0})
    steps = zip(recalls[1:], recalls, strict=False)
    return sum((b - a) * max(p for r, p in points if r >= b) for b, a in steps)


def test_the_metric_is_that_of_a_plain_implementation():
    rng = np.random.default_rng(0)

    def some(count):
        return [(x, y, x + w, y + h) for x, y, w, h in rng.uniform(0.1, 0.5, (count, 4))]

    frames = [("v", second) for second in range(20)]
    truth = {f: {b: {*rng.integers(1, 4, 2).tolist()} for b in some(3)} for f in frames[:15]}
    found, rows = {}, {1: [], 2: [], 3: []}
    for frame in frames[5:]:
        near = [tuple(np.add(box, rng.normal(0, 0.04, 4))) for box in truth.get(frame, {})]
        boxes = near + near[:1] + some(2)
        scores = rng.uniform(size=(len(boxes), 3))
        found[frame] = np.array(boxes), scores
        for action, column in zip(rows, scores.T, strict=True):
            rows[action] += zip(column, [frame] * len(boxes), boxes, strict=True)
    each = ava.average_precisions(found, truth, [1, 2, 3])
    for action, its_rows in rows.items():
        assert each[action] == pytest.approx(official(its_rows, truth, action)), action
        assert 0.05 < each[action] < 0.95


# ------------------------------------------------------------------------------------------- files


@pytest.fixture
def file(tmp_path):
    def file(text, name="file.csv"):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return file


def test_files_are_read_as_published(file):
    truth = ava.read_truth(
        file("-5K,0902,0.077,0.151,0.283,0.811,80,1\n-5K,0902,0.077,0.151,0.283,0.811,9,1\n"), 80
    )
    assert truth == {("-5K", 902): {(0.077, 0.151, 0.283, 0.811): {80, 9}}}
    text = "v,0902,0,0,1,1,,0.998\nv,0902,0,0,1,1,12,0.998\nv,0902,0,0,0.5,1,,0.79\n"
    assert ava.read_boxes(file(text), 0.8) == {("v", 902): {(0, 0, 1, 1): 0.998}}
    assert ava.read_boxes(file(text), 0.79)[("v", 902)][(0, 0, 0.5, 1)] == 0.79
    twice = "v,1,0,0,1,1,4,0.95\nv,1,0,0,1,1,5,0.85\n"
    assert ava.read_boxes(file(twice), 0.8) == {("v", 1): {(0, 0, 1, 1): 0.95}}  # the best
    assert ava.read_excluded(file("a,0903\na,b,0904\n")) == {("a", 903), ("a,b", 904)}
    sixty = (
        'item {\n  name: "bend/bow (at the waist)"\n  id: 1\n}\nitem {\n  name: "b"\n  id: 80\n}\n'
    )
    assert ava.read_actions(file(sixty), 80) == {1: "bend/bow (at the waist)", 80: "b"}
    eighty = 'label {\n  name: "walk"\n  label_id: 14\n  label_type: PERSON_MOVEMENT\n}\n'
    assert ava.read_actions(file(eighty), 80) == {14: "walk"}
    more = '# item { name: "x" id: 3 }\nitem { display_name: "Walks" name: "walk" id: 1 info: "y" }'
    assert ava.read_actions(file(more), 80) == {1: "walk"}


TRUTH, FOUND = (lambda p: ava.read_truth(p, 80)), (lambda p: ava.read_boxes(p, 0.8))


@pytest.mark.parametrize(
    "read, text, words",
    [
        (TRUTH, "v,1,0,0,1,1,5\nv,1,0,0,1.01,1,5", r"line 2 'v,1.*must lie within 0 and 1"),
        (TRUTH, "v,1,0.5,0,0.4,1,5", "x1 <= x2"),
        (TRUTH, "v,1,nan,0,0.4,1,5", "must lie within"),
        (TRUTH, "v,1,0,0,1,1,81", "unknown action 81, not 1 to 80"),
        (TRUTH, "v,1,0,0,1,1,0", "unknown action 0"),
        (TRUTH, "v,1,0,0,1,1,walk", "unknown action walk"),
        (TRUTH, "v,1,0,0,1,1", "must read `video,second,x1,y1,x2,y2,action"),
        (TRUTH, "video,second,x1,y1,x2,y2,action", "line 1 .* must read"),
        (FOUND, "v,1,0,0,1,1,0.9", "must read `video,second,x1,y1,x2,y2,action,score`"),
        (FOUND, "v,1,0,0,1,1,,9", "a score from 0 to 1"),
        (FOUND, "v,1,0,0,1,1,,nan", "a score from 0 to 1"),
        (FOUND, "v,1,0,0,1,1,,", "a score from 0 to 1"),
        (ava.read_excluded, "v;1", "must read `video,second`"),
        (lambda p: ava.read_actions(p, 80), "nothing", "must hold items"),
        (lambda p: ava.read_actions(p, 1), 'item { name: "a" id: 2 }', "1 to 1, see --actions"),
        (lambda p: ava.read_actions(p, 9), 'item { name: "a" id: 2 }' * 2, "unique"),
        (
            lambda p: ava.read_actions(p, 9),
            'item { name: "a" id: 2 } item { name: "a" id: 3 }',
            "unique",
        ),
        (lambda p: TRUTH(Path("gone.csv")), "", "no file gone.csv"),
    ],
)
def test_what_is_wrong_in_a_file_is_one_line(file, read, text, words):
    with pytest.raises(ValueError, match=words) as caught:
        read(file(text))
    assert "\n" not in str(caught.value)


# ----------------------------------------------------------------------------------- clips, boxes


def test_a_clip_is_centred_on_its_second(tmp_path):
    film = write(tmp_path / "film.mp4", frames=60, g=12)  # 25 frames per second
    cfg = Config(frames=8, stride=2, begin=900)
    clip = detect.read_second(film, 901, cfg)
    assert [number_of(frame) for frame in clip] == [17, 19, 21, 23, 25, 27, 29, 31]
    clip = detect.read_second(film, 902, cfg)  # it ends soon
    assert [number_of(frame) for frame in clip] == [42, 44, 46, 48, 50, 52, 54, 56]
    clip = detect.read_second(film, 900, cfg)
    assert [number_of(frame) for frame in clip] == [0, 0, 0, 0, 0, 2, 4, 6]
    for second in (899, 903):
        with pytest.raises(
            ValueError, match=rf"no second {second}, it has seconds 900 \(--begin\)"
        ):
            detect.read_second(film, second, cfg)


SPOT = (0.25, 0.5, 0.5, 0.75)
CORNER = (0.9, 0.0, 1.0, 0.1)


def bright(box, height=64, width=96):
    """Frames (8, 3, H, W) that are bright in a box."""
    frames = torch.full((8, 3, height, width), 20, dtype=torch.uint8)
    x1, y1, x2, y2 = (round(s * side) for s, side in zip(box, (width, height) * 2, strict=True))
    frames[:, :, y1:y2, x1:x2] = 220
    return frames


def test_boxes_go_with_their_pixels_and_those_outside_of_the_crop_are_dropped(monkeypatch):
    data = ava.Annotations(
        {}, [], {"v": Path("v.mp4")}, {("v", 1): {SPOT: {1, 3}, CORNER: {2}}}, {}, {}
    )
    cfg = Config(frames=8, stride=1, resolution=32, short_side=48, actions=4)
    places, kept = set(), set()
    for seed in range(40):
        monkeypatch.setattr(detect, "read_second", lambda *_: bright(SPOT))
        clip, persons, unreadable = detect.Seconds(data, cfg)[0, seed]
        assert clip.shape == (8, 3, 32, 32) and clip.dtype == torch.uint8 and not unreadable
        for person in persons:
            x1, y1, x2, y2 = person[:4].round().int().tolist()
            assert 0 <= x1 < x2 <= 32 and 0 <= y1 < y2 <= 32
            if person[4:].tolist() == [1, 0, 1, 0]:
                inside = torch.zeros(32, 32, dtype=torch.bool)
                inside[y1:y2, x1:x2] = True
                light = clip.float().mean(dim=(0, 1)) > 120
                assert (light != inside).sum() <= 2 * (x2 - x1 + y2 - y1)  # edges are soft
                places.add((x1, y1))
            else:
                assert person[4:].tolist() == [0, 1, 0, 0]
        light = (clip > 120).any()
        assert light == any(person[4] for person in persons)
        kept.add(len(persons))
    assert len(places) > 10 and kept >= {0, 1}


def test_evaluation_sees_whole_frames_and_their_boxes(monkeypatch):
    monkeypatch.setattr(detect, "read_second", lambda *_: bright(SPOT, 60, 99))
    cfg = Config(frames=8, short_side=30, cube=(2, 8, 8))
    views = detect.WholeFrames({("v", 1): {SPOT: 0.9, CORNER: 0.8}}, {"v": Path("v.mp4")}, cfg)
    clip, boxes = views[0]
    assert clip.shape == (1, 8, 3, 32, 56)  # of 30 x 49
    assert (
        clip[..., 30:, :].float().mean(dim=(0, 1, 3, 4)) - 255 * torch.tensor([0.485, 0.456, 0.406])
    ).abs().max() < 1
    assert boxes[0].tolist() == pytest.approx([0, 0.25 * 49, 15, 0.5 * 49, 22.5], abs=0.2)
    x1, y1, x2, y2 = boxes[0, 1:].round().int().tolist()
    assert clip[0, :, :, y1 + 1 : y2 - 1, x1 + 1 : x2 - 1].min() > 200
    other = detect.WholeFrames(views.found, views.films, replace(cfg, short_side=32))
    assert other.keys != views.keys


# ------------------------------------------------------------------------------------------- model


def detector(**more):
    torch.manual_seed(0)
    return Detector("toy", 5, (8, 48, 48), (2, 8, 8), "3d", init_scale=1.0, **more)


def test_the_head_takes_the_largest_value_within_a_box(monkeypatch):
    """Features stand at one cube of clip 1; a box on this cube sees all of it."""
    model = detector()
    tokens = torch.zeros(2, 4, 6, 6, 128)
    tokens[1, 0, 2, 4, 7] = 8.0  # one of 4 time steps: the mean is 2
    monkeypatch.setattr(model.encoder, "forward", lambda video: tokens.flatten(1, 3))
    model.head.weight.data.zero_()
    model.head.weight.data[3, 7] = 1.0
    boxes = torch.tensor(
        [[1, 32, 16, 40, 24], [0, 32, 16, 40, 24], [1, 0, 0, 16, 16], [1, 0, 0, 48, 48]]
    )
    out = model(torch.zeros(2, 8, 3, 48, 48), boxes.float())
    assert out.shape == (4, 5) and out[0].tolist() == pytest.approx([0, 0, 0, 2, 0], abs=1e-4)
    assert out[1:3].abs().max() < 1e-6 and out[3, 3] > 1


def test_other_sizes_keep_weights_and_the_places_of_positions():
    model = detector().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    other = model.encoder_for((8, 96, 48))
    assert other.grid == (4, 12, 6) and other.pos_embed.shape == (4 * 12 * 6, 128)
    assert other.blocks is model.encoder.blocks and other.patch_embed is model.encoder.patch_embed
    old, new = (e.pos_embed.unflatten(0, e.grid) for e in (model.encoder, other))
    assert torch.allclose(new.unflatten(1, (6, 2)).mean(dim=2)[:, 1:5], old[:, 1:5], atol=0.25)
    logits = model(torch.rand(1, 8, 3, 96, 48), torch.tensor([[0.0, 8, 40, 30, 90]]))
    assert logits.shape == (1, 5) and model.encoder.video_size == (8, 48, 48)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.encoder_for((8, 48, 48)) is model.encoder
    with pytest.raises(ValueError, match="do not divide"):
        model.encoder_for((8, 50, 48))


def test_clips_without_a_person_add_nothing():
    """A batch may lose all its boxes to the crop."""
    model = detector()
    logits = model(torch.rand(2, 8, 3, 48, 48), torch.zeros(0, 5))
    logits.sum().backward()
    assert logits.shape == (0, 5)
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_the_last_norm_learns_like_the_head():
    model = detector()
    groups = finetune.make_optimizer(model, Config(layer_decay=0.5)).param_groups
    scales = {id(p): (g["scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert len(scales) == len([*model.parameters()]) == sum(len(g["params"]) for g in groups)
    found = {name: scales[id(p)] for name, p in model.named_parameters()}
    assert found["head.weight"] == (1, 0.05) and found["encoder.norm.weight"] == (1, 0)
    assert found["encoder.patch_embed.weight"] == (0.5**5, 0.05)


# -------------------------------------------------------------------------------------- the stage


@pytest.fixture(scope="session")
def films(tmp_path_factory):
    """Six toy films to train on and three to test."""
    folder = tmp_path_factory.mktemp("data") / "toy-films"
    make_toy_films(folder, train=6, test=3)
    return str(folder)


SMALL = "--init none --epochs 1 --warmup 0 --batch 6 --resolution 48 --log-every 1".split()
SMALL += "--precision fp32".split()


@pytest.fixture(scope="module")
def trained(films, tmp_path_factory):
    """A folder with runs/detect-toy, with all figures."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("detect")
        patch.chdir(folder)
        detect.main(["toy", "--data", films, *SMALL])
    return folder


@pytest.fixture
def here(films, trained, monkeypatch):
    """That folder as working directory; the films' path. Nothing more is drawn."""
    monkeypatch.chdir(trained)
    for name in ("plot_log", "draw_bars"):
        monkeypatch.setattr(visualize, name, lambda *args: None)
    return films


def losses(name):
    lines = [json.loads(line) for line in open(f"runs/{name}/log.jsonl")]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def result(name):
    return json.load(open(f"runs/{name}/results.json"))


def test_toy_films_are_in_avas_format(films):
    cfg = Config(**PRESETS["toy"] | dict(data=films))
    data = ava.read(cfg)
    assert data.names == dict(enumerate(MOTIONS, 1)) and data.classes == [*MOTIONS]
    assert len(data.train) == 12 and len(data.test) == 5  # one of 6 is excluded
    assert {len(persons) for persons in (data.train | data.test).values()} == {2, 3}
    frame = min(data.train)
    clip = detect.read_second(data.films[frame[0]], frame[1], replace(cfg, frames=8, stride=2))
    assert clip.shape == (8, 3, 80, 96)


def test_in_a_toy_film_waves_move_within_boxes_and_all_else_is_noise():
    for seed in range(5):
        film, things = toy_film(seed)
        lasting, inside = film.mean(axis=(0, 3)), np.zeros((80, 96), bool)
        for box, action in things:
            x1, y1, x2, y2 = np.multiply(box, [96, 80, 96, 80]).round().astype(int)
            assert min(x2 - x1, y2 - y1) >= 30 and not inside[y1:y2, x1:x2].any()
            inside[y1:y2, x1:x2] = True
            waves = film[:, y1:y2, x1:x2].astype(float)
            # The mean over 3 x 3 pixels leaves a third of the noise.
            smooth = waves[:, :24, :24].reshape(36, 8, 3, 8, 3, 3).mean(axis=(2, 4))
            assert smooth.std(axis=0).mean(axis=(0, 1)).max() > 18, action  # they move
        assert len(things) in (2, 3) and lasting[~inside].std() < 6


def test_a_run_leaves_its_files_and_the_loss_begins_as_it_must(trained, films):
    run = trained / "runs/detect-toy"
    for name in ("checkpoint.pt", "log.jsonl", "loss.png", "predictions.csv", "classes.png"):
        assert os.path.getsize(run / name) > 100
    assert not (run / "scores.pt").exists()
    found, data = (
        json.load(open(run / "results.json")),
        ava.read(Config(**PRESETS["toy"] | dict(data=films))),
    )
    assert found["frames"] == 5 and found["empty"] == 0 and found["config"]["size"] == "toy"
    done = {
        action for persons in data.test.values() for does in persons.values() for action in does
    }
    assert {*found["actions"]} == {data.names[action] for action in done}
    assert found["mAP"] == pytest.approx(np.mean([*found["actions"].values()]))
    log = [json.loads(line) for line in open(run / "log.jsonl")]
    first = next(line["loss"] for line in log if "loss" in line)
    assert first == pytest.approx(0.693 * 2.4, rel=0.4)  # log 2 for each person of a clip


def test_predictions_give_the_same_result(trained, films):
    """predictions.csv is what the official tool reads."""
    data = ava.read(Config(**PRESETS["toy"] | dict(data=films)))
    found, rows = {}, list(csv.reader(open(trained / "runs/detect-toy/predictions.csv")))
    for video, second, *box, action, score in rows:
        assert len(second) == 4 and 0 <= float(score) <= 1
        boxes = found.setdefault((video, int(second)), {})
        boxes.setdefault(tuple(map(float, box)), {})[int(action)] = float(score)
    assert {f: {*b} for f, b in found.items()} == {f: {*b} for f, b in data.found.items()}
    arrays = {
        frame: (np.array([*boxes]), np.array([[*scores.values()] for scores in boxes.values()]))
        for frame, boxes in found.items()
    }
    each = ava.average_precisions(arrays, data.test, [*data.names])
    mean = 100 * np.nanmean([*each.values()])
    assert mean == pytest.approx(
        json.load(open(trained / "runs/detect-toy/results.json"))["mAP"], abs=1
    )


def test_eval_only_repeats_the_evaluation(here, capsys):
    first, log = result("detect-toy"), open("runs/detect-toy/log.jsonl").read()
    detect.main(["toy", "--data", here, "--eval-only", "--precision", "fp32"])
    again = result("detect-toy")
    assert again["mAP"] == first["mAP"] and again["actions"] == first["actions"]
    assert open("runs/detect-toy/log.jsonl").read() == log
    assert "clips of 8 frames, stride 2, 48x48 pixels" in capsys.readouterr().out


def test_resumed_training_is_the_uninterrupted_one(here, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    flags = ["toy", "--data", here, *SMALL, "--drop-path", "0.2", "--head-dropout", "0.2"]
    flags += ["--flip", "--save-minutes", "0", "--name"]
    detect.main([*flags, "whole"])
    with monkeypatch.context() as patch:
        patch.setattr(visualize, "plot_log", stop)  # comes after the first checkpoint
        with pytest.raises(KeyboardInterrupt):
            detect.main([*flags, "resumed"])
    assert engine.load_checkpoint("runs/resumed/checkpoint.pt", "detect")["step"] == 1
    more = ["--resume", "--threshold", "0.9", "--memory", "less"]  # what may change
    detect.main([*flags, "resumed", *more])
    assert losses("whole") == losses("resumed") and len(losses("whole")) == 2
    states = [
        engine.load_checkpoint(f"runs/{name}/checkpoint.pt", "detect")["model"]
        for name in ("whole", "resumed")
    ]
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name
    assert result("resumed")["boxes"] < result("whole")["boxes"]
    with pytest.raises(ValueError, match="short_side"):
        detect.main([*flags, "resumed", "--resume", "--short-side", "90"])
    data = ava.read(detect.Config(**PRESETS["toy"] | dict(data=here)))
    next(iter(data.train[min(data.train)].values())).add(12)
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="list of videos was"):
        patch.setattr(ava, "read", lambda cfg: data)
        detect.main([*flags, "resumed", "--resume"])


def test_1_and_2_processes_train_and_evaluate_alike(here, train):
    flags = ["toy", "--data", here, *SMALL, "--batch", "4", "--drop-path", "0.3"]
    flags += "--micro 1 --base-lr 0.1 --name".split()
    detect.main([*flags, "on1"])
    train(2, "detect", *flags, "on2")
    a, b = (list(losses(name).values()) for name in ("on1", "on2"))
    assert a == pytest.approx(b, rel=1e-4) and len(set(a)) == len(a) == 3
    a, b = result("on1"), result("on2")
    for key in ("frames", "empty", "boxes"):
        assert a[key] == b[key]
    rows = [list(csv.reader(open(f"runs/{name}/predictions.csv"))) for name in ("on1", "on2")]
    assert [row[:7] for row in rows[0]] == [row[:7] for row in rows[1]]
    scores = [[float(row[7]) for row in part] for part in rows]
    assert np.allclose(*scores, atol=1e-4)


def test_the_metric_is_exact_in_several_processes(here, train):
    """From one checkpoint, so that not even rounding differs."""
    flags = ["toy", "--data", here, "--init", "runs/detect-toy/checkpoint.pt", "--eval-only"]
    flags += "--precision fp32 --name".split()
    detect.main([*flags, "eval1"])
    train(2, "detect", *flags, "eval2")
    a, b = (open(f"runs/{name}/predictions.csv").read() for name in ("eval1", "eval2"))
    assert a == b and result("eval1")["actions"] == result("eval2")["actions"]


def test_accumulation_changes_nothing_without_what_is_drawn_per_pass(here):
    detect.main(["toy", "--data", here, *SMALL, "--name", "passes", "--micro", "2"])
    a, b = (list(losses(name).values()) for name in ("detect-toy", "passes"))
    assert a == pytest.approx(b, rel=1e-4)


def test_pretrained_and_finetuned_encoders_fit(here, toy, capsys):
    few = "--epochs 1 --batch 12 --warmup 0".split()
    pretrain.visualize.main, old = lambda argv: None, pretrain.visualize.main
    try:
        pretrain.main(["toy", "--data", str(toy), *few])
        shots = ["--shots", "1", "--clips", "1"]
        finetune.main(["toy", "--data", str(toy), *few, *shots])
    finally:
        pretrain.visualize.main = old
    flags = ["toy", "--data", here, *SMALL[2:], "--name"]
    detect.main([*flags, "from-pre"])  # runs/pretrain-toy
    assert "0 missing; 2 new (head.weight, head.bias)" in capsys.readouterr().out
    detect.main([*flags, "from-fine", "--init", "runs/finetune-toy/checkpoint.pt"])
    said = capsys.readouterr().out
    assert "2 missing (encoder.norm.weight, encoder.norm.bias)" in said  # as in the official code
    assert "head.weight, head.bias" in said  # a softmax head of as many classes is dropped
    # And the other way: its encoder is of use, its head is no classifier's.
    back = "--init runs/detect-toy/checkpoint.pt --name back".split()
    finetune.main(["toy", "--data", str(toy), *few, *shots, *back])
    assert "head.weight, head.bias" in capsys.readouterr().out.partition("matched")[2]
    with pytest.raises(ValueError, match="no trained head"):
        finetune.main(
            ["toy", "--data", str(toy), "--init", "runs/detect-toy/checkpoint.pt", "--eval-only"]
        )
    with pytest.raises(ValueError, match="no decoder"):
        load_model("runs/detect-toy/checkpoint.pt", classifier=True)
    assert read_weights("runs/detect-toy/checkpoint.pt")[1]["classes"] == [*MOTIONS]


def test_a_film_is_predicted_and_drawn(here, tmp_path, capsys):
    film = write(tmp_path / "my film.mkv", frames=60, g=12)
    lines = ["my film,1,0.1,0.1,0.5,0.9,,0.9", "my film,1,0.5,0.1,0.9,0.9,,0.95"]
    lines += ["my film,2,0.1,0.1,0.5,0.9,,0.9", "my film,9,0.1,0.1,0.5,0.9,,0.9"]
    lines += ["other,1,0.1,0.1,0.5,0.9,,0.9", "my film,0,0.1,0.1,0.5,0.9,,0.5"]
    (tmp_path / "boxes.csv").write_text("\n".join(lines))
    flags = ["toy", "--predict", str(film), "--boxes", str(tmp_path / "boxes.csv")]
    texts, draw, scores, score = [], visualize.draw_boxes, {}, detect.score_frames

    def keep(*how):
        found, errors = score(*how)
        scores.update(found)
        return found, errors

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(visualize, "draw_boxes", lambda p, out: (texts.extend(p), draw(p, out)))
        patch.setattr(detect, "score_frames", keep)
        detect.main(flags)
    said = capsys.readouterr()
    assert not os.path.exists("datasets")  # toy films are not needed
    assert end.value.code == 1 and "no second 9" in said.err  # what is left out is named
    assert "2 seconds" in said.out
    assert [(title, len(boxes)) for title, _, boxes, _ in texts] == [
        ("second 1", 2),
        ("second 2", 1),
    ]
    assert [number_of(image) for _, image, *_ in texts] == [25, 50]
    for (*_, its_texts), (_, rows) in zip(texts, scores.values(), strict=True):
        for text, row in zip(its_texts, rows, strict=True):
            best, second = sorted(row.tolist(), reverse=True)[:2]
            two = [line.split() for line in text.split("\n")]
            assert all(name in MOTIONS for name, _ in two)
            assert [score for _, score in two] == [f"{best:.0%}", f"{second:.0%}"]
            assert row[MOTIONS.index(two[0][0])] == best
    gif = Image.open("runs/detect-toy/my film.gif")
    assert gif.n_frames == 2 and np.array(Image.open("runs/detect-toy/my film.png")).std() > 10


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--init nowhere.pt", "nowhere.pt"),
        ("--init none --eval-only", "none has no trained head"),
        ("--resolution 96", "--short-side 80 is below --resolution 96"),
        ("--resolution 60", "60"),
        ("--actions 3", "1 to 3, see --actions.* must be unique"),
        ("--actions 13 --eval-only --init runs/detect-toy/checkpoint.pt", "--actions 12"),
        ("--fold 2", "no --fold"),
        ("--begin 900 --eval-only --init runs/detect-toy/checkpoint.pt", "no second 1, it has"),
        ("--boxes other.csv", "boxes of other, which ava_val"),
        ("--threshold 1", "no box of score 1 or more"),
        ("--splits .", "no file"),
        ("--predict a.mp4 --init runs/detect-toy/checkpoint.pt", "--predict needs --boxes"),
        (
            "--predict a.mp4 --boxes other.csv --init runs/detect-toy/checkpoint.pt",
            "no boxes of a ",
        ),
        ("--epochs 2 --warmup 2", "--warmup 2"),
    ],
)
def test_mistakes_are_told_in_one_line(here, flags, message):
    Path("other.csv").write_text("other,1,0,0,1,1,,0.9\n")
    common = ["toy", "--data", here, *SMALL, "--name", "mistake"]
    with pytest.raises(ValueError, match=message) as caught:
        detect.main([*common, *flags.split()])
    assert "\n" not in str(caught.value) and not os.path.exists("runs/mistake/checkpoint.pt")


def test_missing_films_are_an_error_or_left_out_and_said(here, tmp_path, capsys):
    for path in Path(here).iterdir():
        if path.name not in ("toy0000.mp4", "toy0007.mp4"):
            (tmp_path / path.name).symlink_to(path)
    flags = ["toy", "--data", str(tmp_path), *SMALL, "--name", "missing"]
    with pytest.raises(ValueError, match="2 of 9 films are not in .* such as toy0000"):
        detect.main(flags)
    detect.main([*flags, "--missing", "skip"])
    assert "2 of 9 films are not in" in capsys.readouterr().out
    assert result("missing")["frames"] == 3


def test_what_is_taken_from_a_second_file_or_part_is_said(films, tmp_path, capsys):
    folder = tmp_path / "films"
    shutil.copytree(films, folder)
    film = min(folder.glob("*.mp4"))
    (folder / "zoo").mkdir()
    shutil.copy(film, folder / "zoo")
    cfg = Config(**PRESETS["toy"] | dict(data=str(folder)))
    assert ava.read(cfg).films[film.stem] == film
    told = f"1 videos have the names of others, such as: {film} is taken, not {folder}/zoo/"
    assert told in capsys.readouterr().out
    row = (folder / ava.TEST).read_text().splitlines()[0]
    (folder / ava.TRAIN).open("a").write(f"{row}\n")
    both = f"{ava.TRAIN} and {ava.TEST} both have {row.split(',')[0]}, second "
    with pytest.raises(ValueError, match=both):
        ava.read(cfg)


def test_presets_are_the_papers():
    # Table 12, Appendix B: base lr, epochs, layer decay; then with K400's labels.
    expected = {
        "small": [(1e-3, 30, 0.6), (5e-4, 30, 0.6)],
        "base": [(2.5e-4, 30, 0.75), (5e-4, 30, 0.75)],
        "large": [(2.5e-4, 30, 0.75), (5e-4, 20, 0.8)],
        "huge": [(5e-4, 20, 0.8), (5e-4, 20, 0.8)],
    }
    for size, columns in expected.items():
        for labels, numbers in zip(("ava", "ava-labels"), columns, strict=True):
            preset = labels if size == "base" else f"{labels}-{size}"
            _, cfg = engine.parse_config(Config, [preset], "", PRESETS)
            assert (cfg.base_lr, cfg.epochs, cfg.layer_decay) == numbers, preset
            assert (cfg.size, cfg.batch, cfg.warmup, cfg.drop_path) == (size, 128, 5, 0.2)
            assert (cfg.weight_decay, cfg.short_side, cfg.threshold) == (0.05, 256, 0.8)
            assert (cfg.begin, cfg.actions, cfg.flip, cfg.stride) == (900, 80, True, 4)
            cfg, _, _ = finetune.settle_clips(cfg, preset, {}, "")
            assert (cfg.frames, cfg.resolution, cfg.cube) == (16, 224, (2, 16, 16))


def test_video_boxes_are_what_torchvision_knows():
    assert isinstance(detect.in_pixels([SPOT], bright(SPOT)), tv_tensors.BoundingBoxes)
