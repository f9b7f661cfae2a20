"""Weights from elsewhere: outputs of the models they come from, exact round trips, no silent misfit, no code run."""

import argparse
import json
import os

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from finetune import read_weights
from masking import tube_mask
from model import (
    POSITIONS,
    Classifier,
    Encoder,
    VideoMAE,
    infer_config,
    load_weights,
    position_table,
    to_official,
    to_ours,
    unit_range,
)

TINY = dict(dim=32, depth=2, heads=4, decoder_dim=24, decoder_depth=1, decoder_heads=2)
CLIPS = dict(video_size=(8, 32, 32), cube=(2, 8, 8))
GRID = (4, 4, 4)


def clip(batch=2, frames=8):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (batch, frames, 3, 32, 32), dtype=torch.uint8, generator=generator)


def normalized(video, encoder):
    return (unit_range(video) - encoder.mean.view(3, 1, 1)) / encoder.std.view(3, 1, 1)


def scramble(model):
    """Random values everywhere, so that no bias is 0 and no two tensors are alike; in eval mode."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean=float("norm" in name and name.endswith("weight")), std=0.2)
    return model.eval()


def hugging_face(kind, **more):
    """A tiny model with sizes, heads and eps that none of our tables holds."""
    transformers = pytest.importorskip("transformers")
    config = transformers.VideoMAEConfig(
        image_size=32, patch_size=8, num_frames=8, tubelet_size=2, hidden_size=32, num_hidden_layers=2,
        num_attention_heads=4, intermediate_size=128, decoder_hidden_size=24, decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2, decoder_intermediate_size=96, layer_norm_eps=0.03, **more,
    )  # fmt: skip
    return scramble(getattr(transformers, kind)(config))


# Hugging Face


@pytest.mark.parametrize("stored", ["safetensors", "shards", "safetensors file", "q_bias", "query.bias"])
def test_hugging_face_classifier(tmp_path, stored):
    theirs = hugging_face("VideoMAEForVideoClassification", id2label={0: "jump", 1: "run", 2: "walk"})
    theirs.save_pretrained(tmp_path, max_shard_size="20KB" if stored == "shards" else "1GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == (stored == "shards")
    if stored.endswith("bias"):  # the names of files, and those of the modules since version 5
        (tmp_path / "model.safetensors").unlink()
        q, v = {"q_bias": ("q_bias", "v_bias"), "query.bias": ("query.bias", "value.bias")}[stored]
        rename = lambda name: name.replace("query.bias", q).replace("value.bias", v)
        named = {rename(name): value for name, value in theirs.state_dict().items()}
        torch.save(named, tmp_path / "pytorch_model.bin")
        assert sum(k.endswith(stored) for k in named) == 2
    state, config = read_weights(tmp_path / "model.safetensors" if stored == "safetensors file" else tmp_path)
    assert config.pop("labels") == ["jump", "run", "walk"]
    ours = Classifier(**config).eval()
    report = load_weights(ours, to_ours(state))
    assert "0 missing; 0 new; 0 unexpected" in report and f"{len(ours.state_dict())} matched" in report
    assert ours.fc_norm.eps == 1e-5 and ours.encoder.blocks[1].norm2.eps == 0.03
    with torch.no_grad():
        expected = theirs(normalized(clip(), ours.encoder)).logits
        torch.testing.assert_close(ours(clip()), expected, atol=1e-5, rtol=0)
    again = Classifier(**ours.config)
    assert again.config == ours.config and again.fc_norm.eps == 1e-5


@pytest.mark.parametrize("normalize", [True, False])
def test_hugging_face_pretraining(tmp_path, normalize):
    theirs = hugging_face("VideoMAEForPreTraining", use_mean_pooling=False, norm_pix_loss=normalize)
    theirs.save_pretrained(tmp_path)
    state, config = read_weights(tmp_path)
    ours = VideoMAE(**config).eval()
    assert "0 missing; 0 new; 0 unexpected" in load_weights(ours, to_ours(state))
    mask = tube_mask(2, GRID, 0.75)
    with torch.no_grad():
        loss, pred = ours(clip(), mask)
        expected = theirs(normalized(clip(), ours.encoder), bool_masked_pos=mask)
    torch.testing.assert_close(pred, expected.logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(loss, expected.loss, atol=1e-5, rtol=0)
    torch.save({"config": ours.config}, tmp_path / "config.pt")  # the dict of sizes survives a checkpoint
    again = VideoMAE(**torch.load(tmp_path / "config.pt", weights_only=True)["config"])
    assert again.config == ours.config and again.decoder.norm.eps == 1e-5 and again.encoder.norm.eps == 0.03


def test_hugging_face_sizes_are_named_if_heads_agree(tmp_path):
    hugging_face("VideoMAEForVideoClassification").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text()) | dict(hidden_size=384, num_hidden_layers=12, num_attention_heads=6)
    for heads, size in ((6, "small"), (16, dict(TINY, dim=384, depth=12, heads=16))):
        path.write_text(json.dumps(config | dict(num_attention_heads=heads)))
        assert read_weights(tmp_path)[1]["size"] == size


@pytest.mark.parametrize("change", [dict(use_mean_pooling=False), dict(hidden_act="relu"), dict(model_type="vit")])
def test_hugging_face_models_that_compute_something_else_are_refused(tmp_path, change):
    hugging_face("VideoMAEForVideoClassification").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=next(iter(change))):
        read_weights(tmp_path)


# official files


def official_file(path, top, model):
    state = to_official(model)
    args = argparse.Namespace(
        model="pretrain_videomae_base_patch16_224", lr=1.5e-4, window_size=(8, 14, 14), resume=None
    )
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(2))]).state_dict()
    torch.save({top: state, "optimizer": optimizer, "epoch": 799, "args": args} if top else state, path)
    return state


@pytest.mark.parametrize("top", ["model", "module", None])
def test_official_file(tmp_path, top):
    model = scramble(VideoMAE("toy", **CLIPS))
    written = official_file(tmp_path / "checkpoint-799.pth", top, model)
    state, config = read_weights(tmp_path / "checkpoint-799.pth")
    assert config == dict(size="toy", cube=[2, 8, 8], decoder_depth=2)
    assert state.keys() == written.keys() and "encoder.blocks.0.attn.q_bias" in state
    again = VideoMAE(**config, video_size=CLIPS["video_size"])
    load_weights(again, to_ours(state))
    mask = tube_mask(2, GRID, 0.75)
    assert torch.equal(again(clip(), mask)[1], model(clip(), mask)[1])
    conv = state["encoder.patch_embed.proj.weight"]
    assert conv.shape == (128, 3, 2, 8, 8)
    expected = F.conv3d(
        normalized(clip(), model.encoder).transpose(1, 2), conv, model.encoder.patch_embed.bias, (2, 8, 8)
    )
    encoder = Encoder(128, 0, 4, **CLIPS, final_norm=False)
    encoder.load_state_dict({k: v for k, v in again.encoder.state_dict().items() if "patch" in k})
    expected = expected.flatten(2).transpose(1, 2) + encoder.positions
    torch.testing.assert_close(encoder(clip()), expected, atol=1e-4, rtol=0)  # values up to 10


@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "module._orig_mod."])
@pytest.mark.parametrize("model", [VideoMAE("toy", **CLIPS), Classifier("toy", 5, **CLIPS)], ids=["mae", "classifier"])
def test_round_trip_is_exact(model, prefix):
    state = scramble(model).state_dict()
    again = to_ours({prefix + name: value for name, value in to_official(model).items()})
    assert again.keys() == state.keys() and all(torch.equal(again[name], state[name]) for name in state)
    same = to_ours(state)  # our own names stay
    assert same.keys() == state.keys() and all(torch.equal(same[name], state[name]) for name in state)


def test_official_names_are_those_of_the_method():
    with torch.device("meta"):
        pretrained, classifier = to_official(VideoMAE("base")), to_official(Classifier("base", 400))
    assert len(pretrained) == 218 and len(classifier) == 162
    assert pretrained["encoder.patch_embed.proj.weight"].shape == (768, 3, 2, 16, 16)
    assert classifier["patch_embed.proj.weight"].shape == (768, 3, 2, 16, 16)
    assert {"mask_token", "encoder.norm.bias", "decoder.head.weight", "encoder_to_decoder.weight"} < pretrained.keys()
    assert {"blocks.11.attn.q_bias", "blocks.0.mlp.fc1.weight", "fc_norm.weight", "head.bias"} < classifier.keys()


@pytest.mark.parametrize("arguments", [dict(positions="3d"), dict(trained_grid=(4, 2, 2))])
def test_positions_that_others_lack_are_not_exported(arguments):
    with pytest.raises(ValueError, match="positions"):
        to_official(Classifier("toy", 5, **CLIPS, **arguments))
    with pytest.raises(ValueError, match="no cross attention"):
        to_official(VideoMAE("toy", **CLIPS, cross=True))


@pytest.mark.parametrize("size", ["small", "base", "large", "huge"])
def test_sizes_are_inferred_from_shapes(size):
    with torch.device("meta"):
        pretrained, classifier = VideoMAE(size, decoder_depth=3), Classifier(size, 7, cube=(4, 16, 8))
        assert infer_config(to_official(pretrained)) == dict(size=size, cube=[2, 16, 16], decoder_depth=3)
        assert infer_config(to_official(classifier)) == dict(size=size, cube=[4, 16, 8], classes=7)
        with pytest.raises(ValueError, match="SIZES"):
            infer_config(to_official(VideoMAE(dict(TINY, dim=768))))
    with pytest.raises(ValueError, match="not a VideoMAE"):
        infer_config({"fc.weight": torch.ones(2, 2)})


def test_our_checkpoint(tmp_path):
    model = VideoMAE("toy", **CLIPS, positions="3d", normalize=False)
    checkpoint = {"stage": "pretrain", "config": {"model": model.config}, "model": model.state_dict()}
    torch.save(checkpoint, tmp_path / "checkpoint.pt")
    state, config = read_weights(tmp_path / "checkpoint.pt")
    assert config == model.config
    assert "0 missing; 0 new; 0 unexpected" in load_weights(VideoMAE(**config), to_ours(state))


# MAE for images


def image_mae(dim=128, depth=4, decoder=True):
    """What a file of facebookresearch/mae holds, 32x32 images in patches of 8."""
    torch.manual_seed(0)
    shapes = {"cls_token": (1, 1, dim), "pos_embed": (1, 17, dim), "norm.weight": (dim,), "norm.bias": (dim,)}
    shapes |= {"patch_embed.proj.weight": (dim, 3, 8, 8), "patch_embed.proj.bias": (dim,)}
    stacks = [("blocks", dim, depth)] + [("decoder_blocks", 96, 2)] * decoder
    for stack, width, number in stacks:
        layers = {"attn.qkv": (3, 1), "attn.proj": (1, 1), "mlp.fc1": (4, 1), "mlp.fc2": (1, 4)}
        for i in range(number):
            for layer, (rows, columns) in layers.items():
                shapes[f"{stack}.{i}.{layer}.weight"] = (rows * width, columns * width)
                shapes[f"{stack}.{i}.{layer}.bias"] = (rows * width,)
            shapes |= {f"{stack}.{i}.{n}.{p}": (width,) for n in ("norm1", "norm2") for p in ("weight", "bias")}
    if decoder:
        shapes |= {"mask_token": (1, 1, 96), "decoder_embed.weight": (96, dim), "decoder_pos_embed": (1, 17, 96)}
    return {name: torch.randn(shape) * 0.2 for name, shape in shapes.items()}


@pytest.mark.parametrize("frames", [2, 4])
def test_inflated_kernel_gives_a_static_clip_the_response_of_its_image(tmp_path, frames):
    state = image_mae()
    torch.save({"model": state, "args": argparse.Namespace()}, tmp_path / "mae.pth")
    ours = to_ours(read_weights(tmp_path / "mae.pth")[0], frames)
    encoder = Encoder(128, 0, 4, (8, 32, 32), (frames, 8, 8), final_norm=False)
    encoder.load_state_dict({k[8:]: v for k, v in ours.items() if "patch_embed" in k})
    image = clip(frames=1)
    conv = F.conv2d(
        normalized(image, encoder)[:, 0], state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], 8
    )
    expected = conv.flatten(2).transpose(1, 2).repeat(1, 8 // frames, 1) + encoder.positions
    torch.testing.assert_close(encoder(image.repeat(1, 8, 1, 1, 1)), expected, atol=1e-5, rtol=0)


def test_leaving_out_the_key_bias_changes_nothing():
    state = image_mae()
    model = VideoMAE("toy", **CLIPS)
    load_weights(model, to_ours(state))
    x = torch.randn(2, 5, 128)
    bias = state["blocks.3.attn.qkv.bias"]
    q, k, v = F.linear(x, state["blocks.3.attn.qkv.weight"], bias).view(2, 5, 3, 4, 32).permute(2, 0, 3, 1, 4)
    attention = (q @ k.mT / 32**0.5).softmax(dim=-1) @ v
    proj = [state[f"blocks.3.attn.proj.{part}"] for part in ("weight", "bias")]
    expected = F.linear(attention.transpose(1, 2).flatten(2), *proj)
    torch.testing.assert_close(model.encoder.blocks[3].attn(x, nn.Identity()), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("decoder", [True, False])
def test_image_weights_fill_the_encoder_only(decoder):
    state = image_mae(decoder=decoder)
    assert infer_config(state) == dict(size="toy", cube=[2, 8, 8])
    model = VideoMAE("toy", **CLIPS)
    token = model.mask_token.clone()
    report = load_weights(model, to_ours(state))
    assert "0 missing" in report and "cls_token" in report and "26 decoder.blocks.*" in report  # unexpected, new
    assert torch.equal(model.mask_token, token)  # MAE's has the same shape here, and is for another decoder
    assert torch.equal(model.encoder.norm.weight, state["norm.weight"])


# what does not fit


def test_pretrained_weights_fill_a_classifier_but_for_its_head():
    pretrained, classifier = scramble(VideoMAE("toy", **CLIPS)), Classifier("toy", 5, **CLIPS)
    before = {name: value.clone() for name, value in classifier.state_dict().items()}
    report = load_weights(classifier, to_ours(to_official(pretrained)))
    assert "54 matched" in report and "0 missing; 4 new: fc_norm.weight, fc_norm.bias, head.weight, head.bias" in report
    assert "encoder.norm.weight" in report and "26 decoder.blocks.*" in report and "mask_token" in report
    for name, value in classifier.state_dict().items():
        new = name.startswith(("fc_norm", "head"))
        assert torch.equal(value, before[name] if new else pretrained.state_dict()[name])


def test_head_is_loaded_if_the_classes_agree():
    trained = scramble(Classifier("toy", 5, **CLIPS))
    same, other = Classifier("toy", 5, **CLIPS), Classifier("toy", 4, **CLIPS)
    assert "0 new" in load_weights(same, to_ours(to_official(trained))) and torch.equal(same(clip()), trained(clip()))
    report = load_weights(other, to_ours(to_official(trained)))
    assert "2 new: head.weight (5, 128) instead of (4, 128), head.bias (5,) instead of (4,)" in report
    assert torch.equal(other.fc_norm.weight, trained.fc_norm.weight)


def test_too_few_matches_are_refused_and_change_nothing():
    state = VideoMAE("toy", **CLIPS).state_dict()
    model = Classifier("toy", 5, **CLIPS)
    before = model.encoder.blocks[0].mlp.fc1.weight.clone()
    two = {name: value for name, value in state.items() if name not in list(state)[10:12]}  # 52 of 54 is 96 %
    assert "2 missing" in load_weights(Classifier("toy", 5, **CLIPS), two)
    three = {name: value for name, value in state.items() if "blocks.2.mlp" not in name}  # 50 of 54 is 93 %
    with pytest.raises(ValueError, match="93%.*95%.*encoder.blocks.2.mlp.fc1.weight"):
        load_weights(model, three)
    assert torch.equal(model.encoder.blocks[0].mlp.fc1.weight, before)
    assert "4 missing" in load_weights(model, three, least=0.9)
    with pytest.raises(ValueError):
        load_weights(model, {})


def test_another_cube_or_decoder_is_refused_though_few_tensors_differ():
    state = VideoMAE("toy", **CLIPS).state_dict()
    other = Classifier("toy", 5, (8, 32, 32), (2, 16, 16))
    with pytest.raises(ValueError, match=r"patch_embed.weight \(128, 384\) instead of \(128, 1536\)"):
        load_weights(other, state)
    assert "1 missing" in load_weights(other, state, least=0)
    with pytest.raises(ValueError, match="decoder.blocks"):
        load_weights(VideoMAE("toy", **CLIPS, decoder_depth=4), state)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_is_not_run(tmp_path, zipped):
    content = {"model": {"a": torch.ones(2)}, "args": argparse.Namespace(x=Malicious(tmp_path / "ran"))}
    torch.save(content, tmp_path / "bad.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="bad.pth.*it would run .*mkdir") as caught:
        read_weights(tmp_path / "bad.pth")
    assert "\n" not in str(caught.value) and not (tmp_path / "ran").exists()
    torch.load(tmp_path / "bad.pth", weights_only=False)
    assert (tmp_path / "ran").exists()  # it would have


@pytest.mark.parametrize("content", ["missing", "empty", "text", "truncated", "number", "no tensors", "empty folder"])
@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_what_is_no_weights_is_refused_in_one_line_with_its_path(tmp_path, content, name):
    path = tmp_path / name
    if content == "truncated":
        torch.save({"model": {"a": torch.ones(2000)}}, path)
        path.write_bytes(path.read_bytes()[:3000])
    elif content in ("number", "no tensors"):
        torch.save(3 if content == "number" else {"model": {"epoch": 3}}, path)
    elif content == "empty folder":
        path.mkdir()
    elif content != "missing":
        path.write_text("These are no weights.\n" * (content == "text"))
    with pytest.raises(ValueError, match=name) as caught:
        read_weights(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 250 + len(str(path))


def test_missing_safetensors_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "safetensors.torch", None)
    (tmp_path / "a.safetensors").touch()
    with pytest.raises(ValueError, match="pip install safetensors"):
        read_weights(tmp_path / "a.safetensors")


# positions on another grid


def places(grid):
    """Centres of the cubes of a grid, as shares of the clip: (N, 3)."""
    return torch.cartesian_prod(*((torch.arange(side) + 0.5) / side for side in grid))


@pytest.mark.parametrize("kind", POSITIONS)
def test_positions_of_the_same_grid_are_the_table_itself(kind):
    table = position_table((4, 6, 6), 64, kind)
    assert torch.equal(position_table((4, 6, 6), 64, kind, [4, 6, 6]), table)
    assert torch.equal(position_table((4, 6, 6), 64, kind, None), table)


@pytest.mark.parametrize("kind", POSITIONS)
def test_positions_of_a_finer_grid_average_to_the_trained_ones(kind):
    trained, finer = (position_table(grid, 64, kind, (4, 6, 6)) for grid in ((4, 6, 6), (4, 12, 12)))
    average = F.avg_pool3d(finer.view(1, 4, 12, 12, 64).movedim(4, 1), (1, 2, 2)).movedim(1, 4).view(-1, 64)
    assert F.cosine_similarity(average, trained).min() > 0.98
    assert torch.cdist(finer, finer).fill_diagonal_(1).min() > 0.1  # no two cubes share a code


@pytest.mark.parametrize("kind", POSITIONS)
@pytest.mark.parametrize("grid", [(8, 20, 20), (8, 7, 7), (16, 14, 14), (8, 14, 20)])
def test_the_same_place_keeps_its_code_on_another_grid(kind, grid):
    """The trained code nearest to a cube's belongs to the cube around it, half a cube away at most."""
    trained = position_table((8, 14, 14), 192, kind)
    nearest = lambda table: places((8, 14, 14))[torch.cdist(table, trained).argmin(dim=1)]
    distance = lambda table: ((nearest(table) - places(grid)).abs() * torch.tensor([8, 14, 14])).mean(dim=0).max()
    assert distance(position_table(grid, 192, kind, (8, 14, 14))) < 0.51
    assert distance(position_table(grid, 192, kind)) > 1.5  # computed anew


def test_classifier_on_another_grid_uses_the_trained_positions():
    classifier = Classifier("toy", 5, (8, 64, 64), (2, 8, 8), trained_grid=GRID)
    assert torch.equal(classifier.encoder.positions, position_table((4, 8, 8), 128, "1d", GRID))
    again = Classifier(**classifier.config)
    assert torch.equal(again.encoder.positions, classifier.encoder.positions) and again.config == classifier.config
    assert Classifier("toy", 5, **CLIPS).config["trained_grid"] == [4, 4, 4]
