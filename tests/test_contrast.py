"""contrast.py: loss, heads, views, processes, resuming; its weights elsewhere; still frames."""

import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision import tv_tensors

import contrast
import finetune
import linprobe
import pretrain
import visualize
from lib import engine
from lib.weights import read_weights

SMALL = "--frames 4 --resolution 16 --precision fp32 --workers 0".split()
TINY = "--epochs 3 --warmup 0.5 --batch 4 --log-every 1 --hidden 24 --out 12 --splits few.txt"
TINY = [*SMALL, *TINY.split()]
MODEL = dict(size="toy", video_size=(4, 16, 16), cube=(2, 8, 8), positions="3d", hidden=24, out=12)


def lines(name):
    return [json.loads(line) for line in open(f"runs/{name}/log.jsonl")]


def steps(name, key="loss"):
    return [line[key] for line in lines(name) if "step" in line]


def weights(name):
    return engine.load_checkpoint(f"runs/{name}/checkpoint.pt", "contrast")["model"]


def write_list(toy):
    """A list of eight videos."""
    names = sorted(str(path.relative_to(toy)) for path in toy.glob("*/*_g01_*.avi"))
    Path("few.txt").write_text("\n".join(names[:8]))


@pytest.fixture(scope="module")
def whole(toy, tmp_path_factory):
    """A folder in which one uninterrupted training, runs/whole, was drawn."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_list(toy)
        contrast.main(["toy", "--data", str(toy), *TINY, "--name", "whole"])
        patch.setattr(visualize, "plot_log", lambda folder: None)
        short = ["--epochs", "2", "--name", "short"]
        contrast.main(["toy", "--data", str(toy), *TINY, *short])
    return folder


@pytest.fixture
def beside(here, whole, monkeypatch):
    monkeypatch.chdir(whole)
    return here


# --------------------------------------------------------------------------------- loss and model


def test_the_loss_is_that_of_finding_the_other_view_among_all_videos():
    torch.manual_seed(0)
    queries, keys, total = torch.randn(2, 5, 7, requires_grad=True), torch.randn(2, 5, 7), 0.0
    for view in (0, 1):
        for i in range(5):
            q = queries[view, i]
            cosines = torch.stack([F.cosine_similarity(q, k, dim=0) for k in keys[1 - view]])
            total = total - (cosines / 0.2).log_softmax(dim=0)[i] / 5
    loss = contrast.contrastive_loss(queries, keys, 0.2)
    torch.testing.assert_close(loss, 2 * 0.2 * total)
    loss.backward()
    assert queries.grad.abs().sum() > 0
    same = contrast.contrastive_loss(torch.ones(2, 5, 7), torch.ones(2, 5, 7), 0.2)
    assert same == pytest.approx(4 * 0.2 * math.log(5))  # what the log calls constant_loss


def test_spread_is_known_for_simple_outputs():
    one = torch.randn(1, 1, 8).expand(2, 4, 8)
    assert all(abs(float(x)) < 1e-5 for x in contrast.spread(one, one).values())
    torch.manual_seed(0)
    keys = torch.randn(2, 2000, 64)
    found = {name: float(x) for name, x in contrast.spread(keys, keys).items()}
    assert found["alignment"] == pytest.approx(2, abs=0.02)
    assert found["uniformity"] == pytest.approx(-4, abs=0.2)
    assert found["deviation"] == found["features"] == pytest.approx(1, abs=0.01)
    axes = torch.eye(4).expand(2, 4, 4)
    assert contrast.spread(axes, axes)["uniformity"] == pytest.approx(-4)
    assert contrast.spread(axes, axes)["alignment"] == 0


@pytest.mark.parametrize("affine", [True, False])
def test_batchnorm_is_torchs(affine):
    torch.manual_seed(0)
    ours, theirs = contrast.BatchNorm(6, affine), nn.BatchNorm1d(6, affine=affine)
    if affine:
        ours.load_state_dict(dict(weight=torch.randn(6), bias=torch.randn(6)))
        theirs.load_state_dict(ours.state_dict(), strict=False)
    x = [(3 * torch.randn(9, 6) + 1).requires_grad_() for _ in range(2)]
    x[1].data = x[0].data.clone()
    out, want = ours(x[0]), theirs(x[1])
    torch.testing.assert_close(out, want)
    for result in (out, want):
        result.square().mul(torch.arange(6.0)).sum().sin().backward()
    torch.testing.assert_close(x[0].grad, x[1].grad, atol=1e-5, rtol=1e-4)


def test_queries_learn_and_keys_follow():
    torch.manual_seed(0)
    model = contrast.MoCo(**MODEL)
    clips = torch.randint(256, (6, 4, 3, 16, 16), dtype=torch.uint8)
    queries, keys, features = model(clips)
    assert queries.shape == keys.shape == (2, 3, 12) and features.shape == (2, 3, 128)
    assert queries.requires_grad and not keys.requires_grad and not features.requires_grad
    # Clips 0, 2, 4 are the first views.
    torch.testing.assert_close(features[1, 0], model.encoder(clips)[1].mean(dim=0))
    # The last BatchNorm has no weights.
    assert model.projector[-1].weight is model.predictor[-1].weight is None
    # At first both branches are the same, but for the predictor.
    torch.testing.assert_close(model.predictor(keys[0]), queries[0])
    queries.square().mul(torch.arange(12.0)).sum().sin().backward()
    without = {name for name, p in model.named_parameters() if p.grad is None}
    assert without == {
        name
        for name, _ in model.named_parameters()
        if name.startswith(("momentum_", "encoder.patch_embed"))
    }
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(1)
    model.follow(0.75)
    after = model.state_dict()
    for name in ("momentum_encoder.blocks.0.mlp.fc1.weight", "momentum_projector.0.weight"):
        torch.testing.assert_close(after[name], before[name] + 0.25)
    model.follow(1.0)
    assert torch.equal(model.state_dict()[name], after[name])


def test_views_change_all_frames_alike():
    frame = torch.randint(256, (3, 40, 50), dtype=torch.uint8)
    clip = tv_tensors.Video(frame.expand(5, -1, -1, -1))
    torch.manual_seed(0)
    for change in contrast.view_transforms(16, 0.2, True):
        made = [change(clip) for _ in range(20)]
        assert all(x.shape == (5, 3, 16, 16) and x.dtype == torch.uint8 for x in made)
        assert all((x == x[:1]).all() for x in made)
        assert sum(torch.equal(made[0], x) for x in made) == 1
        grey = sum(bool((x[:, 0].int() - x[:, 1].int()).abs().max() <= 1) for x in made)
        assert 0 < grey < 12


def test_which_view_is_blurred_solarized_and_mirrored():
    torch.manual_seed(0)
    edge = torch.zeros(1, 3, 60, 60, dtype=torch.uint8)
    edge[..., 30:] = 255
    first, second = contrast.view_transforms(60, 1.0, False)
    whole = [
        [change(tv_tensors.Video(edge)).float() for _ in range(100)] for change in (first, second)
    ]
    # A blurred edge has many shades; jitter of whole areas makes none.
    blurred = [sum(len(x[0, 0, 30].unique()) > 4 for x in made) for made in whole]
    assert blurred[0] > 60 and blurred[1] < 30
    # Solarization turns white into black.
    dark = [sum(bool(x[..., -1].mean() < 60) for x in made) for made in whole]
    assert dark[0] == 0 and 5 < dark[1] < 40
    mirrored = contrast.view_transforms(60, 1.0, True)[0]
    for change, least, most in ((first, 0, 0), (mirrored, 10, 40)):
        made = [change(tv_tensors.Video(edge)).float() for _ in range(50)]
        assert least <= sum(bool(x[..., 0].mean() > x[..., -1].mean()) for x in made) <= most


# -------------------------------------------------------------------------------------- training


def test_a_training_leaves_checkpoint_log_and_curve(beside):
    assert os.path.getsize("runs/whole/loss.png") > 1000
    config, constant, *_ = lines("whole")
    assert config["config"]["model"] == {**MODEL, "video_size": [4, 16, 16], "cube": [2, 8, 8]}
    assert constant["constant_loss"] == pytest.approx(4 * 0.2 * math.log(4))
    assert len(steps("whole")) == 6 and all(map(math.isfinite, steps("whole")))
    assert all(0 <= x <= 4 for x in steps("whole", "alignment"))
    assert all(-8 <= x <= 0 for x in steps("whole", "uniformity"))
    assert all(0.5 < x < 1.5 for x in steps("whole", "deviation"))
    assert all(0.1 < x < 1.2 for x in steps("whole", "features"))
    peak = 4e-3 * 4 / 256
    assert steps("whole", "lr") == [engine.cosine_lr(step, 6, 1, peak, 0.0) for step in range(6)]
    state = weights("whole")
    embedding = "encoder.patch_embed.weight"
    assert torch.equal(state[embedding], state[f"momentum_{embedding}"])
    learned = "encoder.blocks.0.attn.qkv.weight"
    assert not torch.equal(state[learned], state[f"momentum_{learned}"])


def test_resuming_is_exact(beside, monkeypatch, capsys):
    update, count = contrast.Run.update, iter(range(1, 100))

    def update_after_a_signal(self, lr):
        if next(count) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(self, lr)

    flags = ["toy", "--data", beside, *TINY, "--name", "cut"]
    with monkeypatch.context() as patch:
        patch.setattr(contrast.Run, "update", update_after_a_signal)
        with pytest.raises(SystemExit):
            contrast.main(flags)
    assert "after step 3 of 6" in capsys.readouterr().out
    contrast.main([*flags, "--resume"])
    a, b = weights("cut"), weights("whole")
    assert all(torch.equal(a[key], b[key]) for key in b) and steps("cut") == steps("whole")
    for key in ("alignment", "uniformity", "deviation", "features"):
        assert steps("cut", key) == steps("whole", key)


def test_two_processes_are_as_one(beside, train):
    """Keys and BatchNorm are of all processes: the curve is the same up to rounding."""
    train(2, "contrast", "toy", "--data", beside, *TINY, "--name", "two")
    for key in ("loss", "alignment", "uniformity", "deviation", "features"):
        assert steps("two", key) == pytest.approx(steps("whole", key), rel=1e-4, abs=1e-4), key


def test_videos_are_told_apart_in_a_few_steps():
    """Six videos, each in a colour of its own."""
    torch.manual_seed(0)
    model, colours = contrast.MoCo(**MODEL), torch.rand(6, 1, 1, 3, 1, 1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(40):
        clips = (colours + 0.3 * torch.randn(6, 2, 4, 3, 16, 16)).flatten(0, 1)
        model.follow(0.9)
        queries, keys, features = model(clips)
        loss = contrast.contrastive_loss(queries, keys, 0.2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = contrast.spread(keys, features)
    assert loss < 0.4 * 4 * 0.2 * math.log(6)
    assert found["alignment"] < 0.5 and found["features"] > 0.3


@pytest.mark.parametrize(
    "flags", ["--memory less --precision bf16", "--memory least --precision fp16", "--stride 0"]
)
def test_options_train(beside, flags):
    contrast.main(
        ["toy", "--data", beside, *TINY, "--epochs", "1", *flags.split(), "--name", flags]
    )
    assert all(map(math.isfinite, steps(flags)))


@pytest.mark.parametrize(
    "flags",
    ["--temperature 0.5", "--momentum 0.5", "--weight-decay 100", "--flip", "--smallest 0.1",
     "--stride 1", "--base-lr 1e-3", "--warmup 0", "--clip-grad 1e-6", "--seed 1",
     "--positions 1d", "--hidden 32", "--out 16"],
)  # fmt: skip
def test_every_option_changes_what_is_learned(beside, flags):
    name = flags.replace(" ", "").strip("-")
    contrast.main(["toy", "--data", beside, *TINY, "--epochs", "2", *flags.split(), "--name", name])
    before, after = weights("short"), weights(name)
    assert any(not torch.equal(before[key], after[key]) for key in before if "pos" not in key)


def test_memory_changes_nothing(beside):
    contrast.main(["toy", "--data", beside, *TINY, "--memory", "least", "--name", "least"])
    assert steps("least") == pytest.approx(steps("whole"), rel=1e-5)


def test_a_collapse_is_told(beside, monkeypatch, capsys):
    class Collapsed(contrast.MoCo):
        def __init__(self, *args):
            super().__init__(*args)
            for encoder in (self.encoder, self.momentum_encoder):
                nn.init.constant_(encoder.norm.weight, 1e-3)
                nn.init.ones_(encoder.norm.bias)

    monkeypatch.setattr(contrast, "MoCo", Collapsed)
    contrast.main(["toy", "--data", beside, *TINY, "--epochs", "1", "--name", "collapsed"])
    assert capsys.readouterr().out.count("has collapsed") == 1
    assert steps("collapsed", "features")[-1] < 0.01


def test_presets_hold_the_published_recipes():
    for name in ("ucf101", "hmdb51", "ssv2", "k400"):
        _, cfg = engine.parse_config(contrast.Config, [name], "", contrast.PRESETS)
        published = (cfg.epochs, cfg.warmup, cfg.base_lr, cfg.weight_decay, cfg.temperature)
        assert published == (300, 40, 1.5e-4, 0.1, 0.2)
        assert (cfg.momentum, cfg.hidden, cfg.out, cfg.smallest) == (0.99, 4096, 256, 0.08)
        mae = pretrain.Config(**pretrain.PRESETS[name])
        keys = ("frames", "stride", "resolution", "size", "cube", "positions", "batch")
        assert all(getattr(cfg, key) == getattr(mae, key) for key in keys)
        assert cfg.flip == (name != "ssv2")
    toy, mae = contrast.PRESETS["toy"], pretrain.PRESETS["toy"]
    assert all(toy[key] == mae[key] for key in ("size", "cube", "positions", "frames", "stride"))


@pytest.mark.parametrize(
    "flags, words",
    [
        ("toy --micro 2", "unrecognized arguments: --micro 2"),
        ("toy --batch 1", "--batch 1 must be at least 2"),
        ("own --splits one.txt", "needs two or more"),
        ("toy --batch 500", "--batch 500 is larger than the 8 videos"),
        ("toy --resolution 20", "do not divide into cubes"),
        ("toy --temperature 0", "--temperature 0.0 must be at least"),
        ("toy --mask tube", "--mask"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(here, toy, capfd, monkeypatch, flags, words):
    write_list(toy)
    Path("one.txt").write_text("Pulse/v_Pulse_g01_c01.avi\n")
    preset, *flags = flags.split()
    monkeypatch.setattr("sys.argv", ["contrast.py", preset, "--data", here, *TINY, *flags])
    with pytest.raises(SystemExit) as stop:
        engine.cli(contrast.main)
    said = capfd.readouterr().err.splitlines()
    assert stop.value.code == 2 and said[-1].startswith("error: ") and words in said[-1]


def test_own_videos_get_a_batch_that_fits(here):
    os.makedirs("five")
    for i in range(5):
        os.symlink(f"{here}/Pulse/v_Pulse_g{i % 2 + 1:02}_c01.avi", f"five/{i}.avi")
    small = [*SMALL, "--size", "toy", "--hidden", "8", "--out", "4", "--cube", "2", "8", "8"]
    contrast.main(["--data", "five", *small, "--steps", "2", "--log-every", "1"])
    assert lines("contrast-own")[0]["config"]["flags"]["batch"] == 5
    assert len(steps("contrast-own")) == 2


# ---------------------------------------------------------------------------- its weights elsewhere


def test_other_stages_take_its_encoder(beside, capsys, monkeypatch):
    path = "runs/whole/checkpoint.pt"
    state, about = read_weights(path)
    assert all(name.startswith("encoder.") for name in state) and about["stride"] == 2
    init = ["--data", beside, "--init", path, "--batch", "12", "--epochs", "1", "--warmup", "0"]
    few = ["--shots", "1", "--clips", "1", "--precision", "fp32"]
    finetune.main(["toy", *init, *few, "--base-lr", "0", "--min-lr", "0"])
    out = capsys.readouterr().out
    assert "0 missing; 4 new" in out and "clips of 4 frames, stride 2, 16x16 pixels" in out
    tuned = engine.load_checkpoint("runs/finetune-toy/checkpoint.pt", "finetune")["model"]
    shared = [name for name in tuned if name.startswith("encoder.")]
    assert all(torch.equal(tuned[name], state[name]) for name in shared)
    linprobe.main(["toy", *init, *few, "--base-lrs", "1", "--repeats", "1"])
    assert "0 missing" in capsys.readouterr().out
    flags = ["toy", *SMALL, *init, "--base-lr", "0", "--min-lr", "0", "--name", "mae"]
    pretrain.main(flags)
    assert "0 missing" in (out := capsys.readouterr().out) and "decoder new" in out
    both = [f"runs/{name}-toy/predictions.csv" for name in ("finetune", "linprobe")]
    visualize.compare(both, "runs/both.png")
    assert os.path.getsize("runs/both.png") > 1000


def test_it_cannot_reconstruct_and_says_so(whole, monkeypatch):
    monkeypatch.chdir(whole)
    with pytest.raises(ValueError, match="^runs/whole/checkpoint.pt has no decoder: take weights"):
        visualize.main(["--checkpoint", "runs/whole/checkpoint.pt"])


# ------------------------------------------------------------------------------------ still frames


def test_weights_of_still_frames_go_on_with_clips(here, capsys, monkeypatch):
    """Image pre-training, with and without labels: --stride 0, then a stride of clips."""
    flags = ["toy", "--data", here, "--epochs", "1", "--warmup", "0", "--batch", "12"]
    pretrain.main([*flags, *SMALL, "--stride", "0", "--name", "image"])
    tune = [*flags, "--shots", "1", "--clips", "2", "--precision", "fp32"]
    size = ["--frames", "4", "--resolution", "16"]
    finetune.main([*tune, *size, "--init", "none", "--stride", "0", "--name", "labels"])
    assert "clips of 4 frames, one frame held still" in capsys.readouterr().out
    for name in ("image", "labels"):
        init = ["--init", f"runs/{name}/checkpoint.pt", "--stride", "2", "--name", f"{name}-clips"]
        finetune.main([*tune, *init])
        out = capsys.readouterr().out
        assert "clips of 4 frames, stride 2, 16x16" in out and "0 missing" in out
