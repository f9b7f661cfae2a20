"""Weights from elsewhere and to elsewhere: same outputs as the models they come from."""

import argparse
import json
import os
import re
import shutil
import sys

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from lib import engine, export, variants, weights
from lib.export import to_official
from lib.weights import build, init_model, load_model, load_weights, read_weights
from masking import tube_mask
from model import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    SIZES,
    Classifier,
    Encoder,
    VideoMAE,
    position_table,
    to_float,
)

CLIPS = dict(video_size=(8, 32, 32), cube=(2, 8, 8))
GRID = (4, 4, 4)
NAMES = ["jump", "run", "walk"]
SAID = dict(num_frames=8, input_size=32)  # how official files say the clips of CLIPS


def clip(batch=2, frames=8):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (batch, frames, 3, 32, 32), dtype=torch.uint8, generator=generator)


def normalized(video):
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    return (to_float(video) - mean) / std


def scramble(model):
    """Random values everywhere, so that no bias is 0 and no two tensors are alike; in eval mode."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        mean = float("norm" in name and name.endswith("weight"))
        nn.init.normal_(parameter, mean=mean, std=0.2)
    return model.eval()


def mae(**how):
    return scramble(VideoMAE("toy", **(CLIPS | how)))


def classifier(classes=3, **how):
    return scramble(Classifier("toy", classes, **(CLIPS | how)))


def mask():
    return tube_mask(clip(), GRID, 0.75, torch.Generator().manual_seed(2))


def hugging_face(kind, **more):
    """A model of toy size, with an eps that is nobody's default."""
    sizes = dict(
        image_size=32, patch_size=8, num_frames=8, tubelet_size=2,
        hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=512,
        decoder_hidden_size=96, decoder_num_hidden_layers=2, decoder_num_attention_heads=3,
        decoder_intermediate_size=384, layer_norm_eps=0.03,
    )  # fmt: skip
    config = transformers.VideoMAEConfig(**sizes | more)
    return scramble(getattr(transformers, kind)(config))


def same_outputs(path, model, atol=0.0):
    """Assert that the weights at a path compute what a model does; what is known of them."""
    again, about = load_model(path, classifier=True)
    given = (clip(), mask()) if isinstance(model, VideoMAE) else (clip(),)
    with torch.no_grad():
        torch.testing.assert_close(again(*given), model(*given), atol=atol, rtol=0)
    return about


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Hugging Face folder with a classifier."""
    path = tmp_path_factory.mktemp("hf")
    names = dict(enumerate(NAMES))
    hugging_face("VideoMAEForVideoClassification", id2label=names).save_pretrained(path)
    return path


# Hugging Face


@pytest.mark.parametrize("stored", ["folder", "shards", "file", "lightning"])
def test_hugging_face_classifier(folder, tmp_path, stored):
    names = dict(enumerate(NAMES))
    theirs = hugging_face("VideoMAEForVideoClassification", id2label=names)
    path = folder
    if stored == "shards":
        theirs.save_pretrained(path := tmp_path, max_shard_size="200KB")
        assert len(list(path.glob("model-*.safetensors"))) > 1
    elif stored == "file":
        path = folder / "model.safetensors"
    elif stored == "folder":  # other weights that lie beside are left alone
        path = shutil.copytree(folder, tmp_path / "two")
        other = {name: torch.zeros_like(value) for name, value in theirs.state_dict().items()}
        safetensors.torch.save_file(other, path / "model_ema.safetensors")
    elif stored == "lightning":
        shutil.copy(folder / "config.json", tmp_path)
        named = {f"model.net.{name}": value for name, value in theirs.state_dict().items()}
        torch.save(dict(state_dict=named, epoch=3), path := tmp_path / "last.ckpt")
        assert sum(name.endswith("query.bias") for name in named) == 4  # in files q_bias
    ours, about = load_model(path, classifier=True)
    assert about["classes"] == NAMES
    assert about["video_size"] == [8, 32, 32] and about["cube"] == [2, 8, 8]
    report = load_weights(ours, *read_weights(path))
    assert report.startswith("58 of 58 tensors matched; 0 missing; 0 new")
    assert ours.fc_norm.eps == 1e-5 and ours.encoder.blocks[1].norm2.eps == 0.03
    with torch.no_grad():
        expected = theirs(normalized(clip())).logits
        torch.testing.assert_close(ours(clip()), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("normalize", [True, False])
def test_hugging_face_pretraining(tmp_path, normalize):
    more = dict(use_mean_pooling=False, norm_pix_loss=normalize)
    theirs = hugging_face("VideoMAEForPreTraining", **more)
    theirs.save_pretrained(tmp_path)
    ours, about = load_model(tmp_path)
    with torch.no_grad():
        loss, pred = ours(clip(), mask())
        expected = theirs(normalized(clip()), bool_masked_pos=mask())
    torch.testing.assert_close(pred, expected.logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(loss, expected.loss, atol=1e-5, rtol=0)
    report = load_weights(classifier(), *read_weights(tmp_path))
    assert report.endswith("decoder left out") and "mask_token" not in report


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(num_attention_heads=16), "num_attention_heads is 16, only 4 can be used"),
        (dict(use_mean_pooling=False), "use_mean_pooling is False"),
        (dict(hidden_act="relu"), "hidden_act is relu"),
        (dict(model_type="vivit"), "model_type is vivit"),
        (dict(image_size=[]), "config.json does not fit"),
        (dict(num_frames=3), "do not divide"),
    ],
)
def test_configurations_that_do_not_fit_are_one_line(folder, tmp_path, change, words):
    shutil.copy(folder / "model.safetensors", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=words) as caught:
        load_model(tmp_path, classifier=True)
    assert "\n" not in str(caught.value)


def test_what_is_to_be_installed_is_said(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ValueError, match="pip install safetensors"):
        read_weights(folder)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match="pip install transformers"):
        export.to_hugging_face(classifier(), {})


def test_a_name_on_the_hub_is_answered_by_how_to_download_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="hf download MCG-NJU/videomae-base --local-dir"):
        read_weights("MCG-NJU/videomae-base")
    (tmp_path / "runs").mkdir()
    for path in ("runs/pretrain-toy", "runs/a/checkpoint.pt", "/no/file.pth", "file.pth"):
        with pytest.raises(ValueError, match=f"no weights at {path}; train first, or"):
            read_weights(path)


# official files


def official_file(path, top, model, **args):
    """What the official loops write: the learning rate in the optimizer is a numpy.float64."""
    state = to_official(model)
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(2))], lr=np.float64(1e-4)).state_dict()
    assert type(optimizer["param_groups"][0]["lr"]) is np.float64
    more = dict(optimizer=optimizer, epoch=799, args=argparse.Namespace(lr=1.5e-4, **args))
    torch.save({top: state, **more} if top else state, path)
    return state


@pytest.mark.parametrize("top", ["model", "module", None])
def test_official_file(tmp_path, top):
    model, path = mae(normalize=False), tmp_path / "checkpoint-799.pth"
    written = official_file(path, top, model, **SAID, sampling_rate=2, normlize_target=False)
    state, about = read_weights(path)
    assert about["size"] == "toy" and about["cube"] == [2, 8, 8] and about["decoder_depth"] == 2
    if top:
        assert about["stride"] == 2 and about["normalize"] is False
        same_outputs(path, model)
    conv, bias = written["encoder.patch_embed.proj.weight"], model.encoder.patch_embed.bias
    embedded = F.conv3d(normalized(clip()).transpose(1, 2), conv, bias, stride=(2, 8, 8))
    expected = embedded.flatten(2).transpose(1, 2) + model.encoder.pos_embed
    model.encoder.blocks, model.encoder.norm = nn.ModuleList(), nn.Identity()
    torch.testing.assert_close(model.encoder(clip()), expected, atol=1e-4, rtol=0)  # up to 10


@pytest.mark.parametrize("core", [b"cnumpy.core.multiarray\n", b"cnumpy._core.multiarray\n"])
def test_a_float64_of_either_numpy_is_read(tmp_path, core):
    """The names of numpy 1 and numpy 2 are put into the pickle of a file in the old format."""
    path = tmp_path / "checkpoint.pth"
    content = dict(model=to_official(classifier()), lr=np.float64(3e-4))
    torch.save(content, path, _use_new_zipfile_serialization=False)
    raw = path.read_bytes()
    assert len(re.findall(rb"cnumpy\._?core\.multiarray\n", raw)) == 1
    path.write_bytes(re.sub(rb"cnumpy\._?core\.multiarray\n", core, raw))
    assert read_weights(path)[1]["size"] == "toy"
    assert weights.read_files(path)["lr"] == 3e-4


@pytest.mark.parametrize("value", [np.zeros(2), np.datetime64("2020"), len])
def test_no_other_class_is_allowed(tmp_path, value):
    torch.save(dict(model=to_official(classifier()), lr=value), tmp_path / "checkpoint.pth")
    with pytest.raises(ValueError, match="checkpoint.pth holds no weights that can be read"):
        read_weights(tmp_path / "checkpoint.pth")


@pytest.mark.parametrize("top", [("model", "model_ema"), ("model_ema",)])
def test_averaged_weights_are_read_where_there_are_no_others(tmp_path, top):
    states = [to_official(classifier()), to_official(Classifier("toy", 3, **CLIPS))]
    torch.save(dict(zip(top, states, strict=False)), tmp_path / "checkpoint.pth")
    state, about = read_weights(tmp_path / "checkpoint.pth")
    assert torch.equal(state["head.weight"], states[0]["head.weight"])
    assert about["note"] == f"weights under {' rather than '.join(top)}"


def test_a_folder_of_deepspeed(tmp_path):
    model = classifier()
    half = {name: value.half() for name, value in to_official(model).items()}
    content = dict(module=half, param_shapes=[{"a": torch.Size([2])}], sparse_tensors=set())
    torch.save(content, tmp_path / "mp_rank_00_model_states.pt")
    state, _ = read_weights(tmp_path)
    torch.testing.assert_close(state["head.weight"], model.head.weight.data, atol=1e-3, rtol=0)


@pytest.mark.parametrize("frames, side", [(8, 32), (16, 32), (8, 40)])
def test_positions_of_an_official_file_are_those_of_its_own_clips(tmp_path, frames, side):
    """Its args say frames and pixels; a file without is taken as one of 16x224x224."""
    model = classifier(video_size=(frames, side, side))
    said = dict(num_frames=frames, input_size=side, data_set="SSV2")
    official_file(tmp_path / "said.pth", "model", model, **said)
    again, about = load_model(tmp_path / "said.pth", classifier=True)
    video = torch.randint(0, 256, (1, frames, 3, side, side), dtype=torch.uint8)
    assert torch.equal(again(video), model(video)) and about["sampling"] == "uniform"
    official_file(tmp_path / "silent.pth", "model", model)
    state, about = read_weights(tmp_path / "silent.pth")
    assert "video_size" not in about and about["positions"] == "1d"
    report = load_weights(Classifier("toy", 3, **CLIPS), state, about)
    assert "positions of 16x224x224 (assumed) interpolated to 4x4x4 cubes" in report


def test_official_names_are_those_of_the_method():
    names = "mask_token encoder.norm.bias decoder.head.weight encoder_to_decoder.weight"
    assert {*names.split()} < to_official(mae()).keys()
    names = "patch_embed.proj.bias blocks.3.attn.q_bias blocks.0.mlp.fc1.weight fc_norm.bias"
    assert {*names.split()} < to_official(classifier()).keys()


@pytest.mark.parametrize("size", ["small", "base", "large", "huge"])
def test_sizes_are_inferred_from_shapes(size):
    with torch.device("meta"):
        state = VideoMAE(size, decoder_depth=3, cube=(4, 16, 8)).state_dict()
    shape = (SIZES[size]["dim"], 3, 4, 16, 8)
    about = weights.about_shapes("x.pth", shape, state)
    assert about == dict(size=size, cube=[4, 16, 8], decoder_depth=3)
    with pytest.raises(ValueError, match="blocks deep to SIZES"):
        more = state | {"encoder.blocks.100.norm1.weight": torch.ones(1)}
        weights.about_shapes("x.pth", shape, more)


# other projects


def test_mmaction(tmp_path):
    """Its names; positions are in the file, and may be learned ones."""
    model = classifier()
    official = to_official(model)
    state = {"backbone.pos_embed": nn.init.normal_(model.encoder.pos_embed)[None]}
    for name, value in official.items():
        name = name.replace("patch_embed.proj", "patch_embed.projection")
        name = name.replace("mlp.fc1", "mlp.layers.0.0").replace("mlp.fc2", "mlp.layers.1")
        state[f"backbone.{name}".replace("backbone.head", "cls_head.fc_cls")] = value
    torch.save(dict(state_dict=state, args=SAID), tmp_path / "vit.pth")  # args: for short clips
    about = same_outputs(tmp_path / "vit.pth", model)
    assert about["classes"] == ["class 0", "class 1", "class 2"]
    torch.save(dict(state_dict=state, args=None), tmp_path / "silent.pth")
    with pytest.raises(ValueError, match="not those of 16x224x224 .assumed"):
        load_model(tmp_path / "silent.pth", classifier=True)


@pytest.mark.parametrize("make", [mae, classifier])
@pytest.mark.parametrize("prefix", ["model.", "encoder.encoder.", "module._orig_mod."])
def test_lightning(tmp_path, make, prefix):
    state = {prefix + name: value for name, value in to_official(make()).items()}
    state |= {"criterion.weight": torch.ones(3)}
    content = dict(state_dict=state, hyper_parameters=dict(lr=1e-3), args=dict(SAID))
    torch.save(content, tmp_path / "last.ckpt")
    same_outputs(tmp_path / "last.ckpt", make())
    report = load_weights(make(), *read_weights(tmp_path / "last.ckpt"))
    assert "1 unused (criterion.weight)" in report


def test_folder_of_videomae_v2(tmp_path):
    """Encoder and fc_norm under `model.`, no head."""
    model = classifier()
    state = {f"model.{k}": v for k, v in to_official(model).items() if not k.startswith("head")}
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    said = dict(img_size=32, patch_size=8, embed_dim=128, depth=4, num_heads=4, tubelet_size=2,
                layer_norm_eps=1e-6, num_frames=8, cos_attn=False)  # fmt: skip
    config = dict(model_type="VideoMAEv2_Base", auto_map={}, model_config=said)
    (tmp_path / "config.json").write_text(json.dumps(config))
    state, about = read_weights(tmp_path)
    assert about["video_size"] == [8, 32, 32]
    new = Classifier("toy", 5, **CLIPS)
    assert "56 of 58 tensors matched; 0 missing; 2 new" in load_weights(new, state, about)
    assert torch.equal(new.encoder(clip()), model.encoder(clip()))
    for change, words in (
        (dict(cos_attn=True), "cos_attn is True"),
        (dict(layer_norm_eps=1e-5), "eps"),
    ):
        config["model_config"] = said | change
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=words):
            read_weights(tmp_path)


# models for images


def image_vit(kind, folder=None):
    """Files of image models of toy size, 32x32 pixels in patches of 8: mae, timm, google."""
    torch.manual_seed(0)
    if kind == "google":
        sizes = dict(hidden_size=128, num_hidden_layers=4, num_attention_heads=4)
        more = dict(intermediate_size=512, image_size=32, patch_size=8)
        model = scramble(transformers.ViTModel(transformers.ViTConfig(**sizes, **more)))
        model.save_pretrained(folder)
        return safetensors.torch.load_file(folder / "model.safetensors")
    state = {k[8:]: v for k, v in to_official(mae()).items() if k.startswith("encoder.")}
    shapes = {"cls_token": (1, 1, 128), "pos_embed": (1, 17, 128)}
    shapes["patch_embed.proj.weight"] = (128, 3, 8, 8)
    for i in range(4):
        shapes[f"blocks.{i}.attn.qkv.bias"] = (384,)
        del state[f"blocks.{i}.attn.q_bias"], state[f"blocks.{i}.attn.v_bias"]
    if kind == "mae":
        shapes |= {"mask_token": (1, 1, 96), "decoder_embed.weight": (96, 128)}
        shapes |= {"decoder_pos_embed": (1, 17, 96), "decoder_blocks.0.norm1.weight": (96,)}
    else:
        shapes |= {"head.weight": (3, 128), "head.bias": (3,)}
    return state | {name: torch.randn(shape) * 0.2 for name, shape in shapes.items()}


@pytest.mark.parametrize("kind", ["mae", "timm", "google"])
def test_image_weights_fill_the_encoder_alone(tmp_path, kind):
    state, model = image_vit(kind, tmp_path), VideoMAE("toy", **CLIPS)
    torch.save({"model": state} if kind == "mae" else state, tmp_path / "vit.pth")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found, about = read_weights(tmp_path / "vit.pth")
    note = "image model inflated to cubes, its encoder alone"
    assert about == dict(size="toy", cube=[2, 8, 8], note=note)
    report = load_weights(model, found, about)
    assert "0 missing; 0 new; 0 unused; decoder new" in report and note in report
    for name, value in model.state_dict().items():
        new = name.startswith("encoder.") and "pos_embed" not in name
        assert torch.equal(value, before[name]) != new, name
    report = load_weights(Classifier("toy", 3, **CLIPS), found, about)
    assert "0 missing; 4 new" in report  # a head of 3 classes of images is none of 3 actions
    # A clip that stands still is embedded as its image.
    names = ("patch_embed.proj", "embeddings.patch_embeddings.projection")
    name = names[kind == "google"]
    kernel, bias = state[f"{name}.weight"], state[f"{name}.bias"]
    image = clip(frames=1)
    embedded = F.conv2d(normalized(image)[:, 0], kernel, bias, 8)
    expected = embedded.flatten(2).transpose(1, 2).repeat(1, 4, 1) + model.encoder.pos_embed
    model.encoder.blocks, model.encoder.norm = nn.ModuleList(), nn.Identity()
    found = model.encoder(image.repeat(1, 8, 1, 1, 1))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)  # values up to 10


def test_leaving_out_the_key_bias_changes_nothing(tmp_path):
    state, model = image_vit("timm"), VideoMAE("toy", **CLIPS)
    torch.save(state, tmp_path / "vit.pth")
    load_weights(model, *read_weights(tmp_path / "vit.pth"))
    attn = {k[14:]: v for k, v in state.items() if k.startswith("blocks.3.attn.")}
    theirs = nn.MultiheadAttention(128, 4, batch_first=True)
    theirs.in_proj_weight.data, theirs.in_proj_bias.data = attn["qkv.weight"], attn["qkv.bias"]
    theirs.out_proj.weight.data, theirs.out_proj.bias.data = attn["proj.weight"], attn["proj.bias"]
    x = torch.randn(2, 5, 128)
    expected = theirs(x, x, x)[0]
    torch.testing.assert_close(model.encoder.blocks[3].attn(x), expected, atol=1e-5, rtol=1e-5)


# our own checkpoints, and going on from any


def our_checkpoint(path, model, step=9, **flags):
    name = {Model: name for name, Model in variants.MODELS.items()}.get(type(model))
    stage = "pretrain" if name else "finetune"
    flags |= dict(model=name) if name else {}
    config = dict(model=model.config, flags=flags, videos=3, classes=NAMES)
    content = dict(stage=stage, config=config, model=model.state_dict(), step=step, steps=9)
    torch.save(content, path)
    return path


@pytest.mark.parametrize("name", list(variants.MODELS))
def test_our_pretraining_checkpoint(tmp_path, name):
    model = scramble(variants.MODELS[name]("toy", **CLIPS, positions="3d", normalize=False))
    path = our_checkpoint(tmp_path / "checkpoint.pt", model, step=3, stride=2)
    for given in (path, tmp_path):
        again, about = load_model(given)
        assert type(again) is type(model) and again.config == model.config
        assert about["stride"] == 2 and about["note"] == "unfinished: step 3 of 9"
    state, about = read_weights(path)
    report = load_weights(Classifier("toy", 5, **CLIPS, positions="3d"), state, about)
    assert "0 missing; 4 new" in report and "step 3 of 9" in report
    assert "decoder left out" in report and "mask_token" not in report


def test_our_classifier_has_no_decoder_and_keeps_its_eps(tmp_path):
    model = build(Classifier, dict(size="toy", classes=3, eps=0.03, **CLIPS)).eval()
    path = our_checkpoint(tmp_path / "checkpoint.pt", model, stride=3, sampling="uniform")
    about = same_outputs(path, model)
    assert about["classes"] == NAMES and about["eps"] == 0.03
    assert about["stride"] == 3 and about["sampling"] == "uniform" and "note" not in about
    with pytest.raises(ValueError, match="checkpoint.pt has no decoder"):
        load_model(path)


@pytest.mark.parametrize("into", ["videomae", "cell", "cross", "double", "deeper", "larger"])
def test_pretraining_goes_on_from_weights_with_a_decoder(tmp_path, into):
    """It is taken where it is the same, and stays new, which is said, where it is another one."""
    official_file(tmp_path / "a.pth", "model", model := mae(), **SAID)
    changes = dict(deeper=dict(decoder_depth=3), larger=dict(video_size=(8, 64, 64)))
    how = CLIPS | changes.get(into, {})
    new = variants.MODELS.get(into, VideoMAE)("toy", **how)
    before = {name: value.clone() for name, value in new.state_dict().items()}
    report = init_model(new, tmp_path / "a.pth")
    whole = into in ("videomae", "cell", "larger")
    assert "0 missing" in report and ("decoder new" in report) != whole
    assert ("interpolated to 4x8x8" in report) == (into == "larger")
    state = model.state_dict()
    for name, value in new.state_dict().items():
        if "pos_embed" not in name:
            taken = whole or name.startswith("encoder.")
            assert torch.equal(value, (state if taken else before)[name]), name
    if into == "videomae":
        assert torch.equal(new(clip(), mask())[1], model(clip(), mask())[1])


def test_pretraining_goes_on_from_an_encoder_alone(tmp_path):
    torch.save(image_vit("timm"), tmp_path / "vit.pth")
    assert "decoder new; image model" in init_model(VideoMAE("toy", **CLIPS), tmp_path / "vit.pth")
    official_file(tmp_path / "a.pth", "model", classifier(), **SAID)
    report = init_model(VideoMAE("toy", **CLIPS), tmp_path / "a.pth")
    assert "2 missing (encoder.norm.weight, encoder.norm.bias)" in report


# out again


@pytest.mark.parametrize("make", [mae, classifier])
@pytest.mark.parametrize("untrained", [True, False])
def test_written_for_hugging_face(tmp_path, make, untrained):
    """Its own classes load all of it, and compute the same, though the last eps is another."""
    model = make(normalize=False) if make is mae else make(init_scale=1.0)
    if untrained:  # variances are small, so that eps matters more
        torch.manual_seed(3)
        model = type(model)(**model.config).eval()
    path = our_checkpoint(tmp_path / "a.pt", model, stride=4, augment="official")
    out = tmp_path / "folder"
    export.main([str(path), "--hugging-face", str(out)])
    assert read_weights(out)[1]["augment"] == read_weights(path)[1]["augment"] == "official"
    kind = "ForPreTraining" if make is mae else "ForVideoClassification"
    kind = getattr(transformers, f"VideoMAE{kind}")
    again, info = kind.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    given = dict(bool_masked_pos=mask()) if make is mae else {}
    with torch.no_grad():
        found = again.eval()(normalized(clip()), **given).logits
        expected = model(clip(), mask())[1] if make is mae else model(clip())
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    about = same_outputs(out, model, atol=1e-5)
    assert about["stride"] == 4 and about.get("classes", NAMES) == NAMES
    with pytest.raises(ValueError, match="folder exists: name a new one"):
        export.main([str(path), "--hugging-face", str(out)])


def test_pipeline_predicts_offline(tmp_path, toy, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = classifier()
    path = our_checkpoint(tmp_path / "a.pt", model)
    export.main([str(path), "--hugging-face", str(tmp_path / "folder")])
    pipe = transformers.pipeline("video-classification", model=str(tmp_path / "folder"))
    pipe.video_processor = None  # it needs torchcodec; without it, PyAV decodes
    video = next(toy.rglob("*.avi"))
    found = {row["label"]: row["score"] for row in pipe(str(video))}
    from data import spatial_views
    from lib.video import read_frames

    frames = spatial_views(read_frames(video, lambda n: list(range(8))), 32, crops=1)
    with torch.no_grad():
        expected = model(frames).softmax(dim=1)[0].tolist()
    for name, share in zip(NAMES, expected, strict=True):
        assert abs(found[name] - share) < 0.05  # rounding of pixels


@pytest.mark.parametrize("make", [mae, classifier])
def test_written_for_the_official_code(tmp_path, capsys, make, monkeypatch):
    model = make()
    path = our_checkpoint(tmp_path / "a.pt", model, stride=4, sampling="uniform")
    out = tmp_path / "b.pth"
    monkeypatch.setattr(sys, "argv", ["x", str(path), "--official", str(out)])
    engine.cli(export.main)
    assert f"wrote {out}" in capsys.readouterr().out
    content = torch.load(out, weights_only=True)  # by any torch, without a list of safe classes
    assert content["model"].keys() == to_official(model).keys()
    about = same_outputs(out, model)
    assert about["stride"] == 4 and about["sampling"] == "uniform"


def test_the_official_code_has_another_eps_and_it_is_said(folder, tmp_path, capsys):
    export.main([str(folder), "--official", str(tmp_path / "new" / "b.pth")])
    assert "eps is 1e-06 there, not 0.03" in capsys.readouterr().out


def test_what_others_lack_is_not_exported():
    with pytest.raises(ValueError, match="positions"):
        to_official(classifier(positions="3d"))
    moved = Classifier("toy", 3, (8, 64, 64), (2, 8, 8))
    load_weights(moved, classifier().state_dict(), dict(CLIPS))
    with pytest.raises(ValueError, match="positions"):
        to_official(moved)
    with pytest.raises(ValueError, match="CrossMAE"):
        to_official(variants.MODELS["cross"]("toy", **CLIPS))


# what does not fit


def test_pretrained_weights_fill_a_classifier_but_for_its_head():
    pretrained, new = mae(), Classifier("toy", 5, **CLIPS)
    before = {name: value.clone() for name, value in new.state_dict().items()}
    report = load_weights(new, pretrained.state_dict(), dict(CLIPS))
    assert "54 of 58 tensors matched; 0 missing" in report
    assert "4 new (fc_norm.weight, fc_norm.bias, head.weight, head.bias)" in report
    assert "2 unused (encoder.norm.weight, encoder.norm.bias); decoder left out" in report
    for name, value in new.state_dict().items():
        untouched = name.startswith(("fc_norm", "head"))
        source = before if untouched else pretrained.state_dict()
        assert torch.equal(value, source[name]), name


def test_a_head_of_another_number_of_classes_stays_new():
    trained, new = classifier(), Classifier("toy", 4, **CLIPS)
    report = load_weights(new, trained.state_dict(), dict(CLIPS))
    assert "2 new (head.weight, head.bias)" in report
    assert torch.equal(new.fc_norm.weight, trained.fc_norm.weight)


def test_too_few_matches_are_refused_and_change_nothing():
    state, model = mae().state_dict(), Classifier("toy", 5, **CLIPS)
    before = model.encoder.blocks[0].mlp.fc1.weight.clone()
    two = {name: value for name, value in state.items() if "encoder.blocks.1.norm1" not in name}
    assert "2 missing" in load_weights(Classifier("toy", 5, **CLIPS), two, dict(CLIPS))  # 96 %
    four = {name: value for name, value in state.items() if "encoder.blocks.2.mlp" not in name}
    with pytest.raises(ValueError, match="93%.*95%.*encoder.blocks.2.mlp.fc1.weight"):
        load_weights(model, four, dict(CLIPS))
    assert torch.equal(model.encoder.blocks[0].mlp.fc1.weight, before)
    assert "4 missing" in load_weights(model, four, dict(CLIPS), least=0.9)


def test_another_cube_decoder_or_block_is_refused_though_few_tensors_differ():
    state, about = mae().state_dict(), dict(CLIPS)
    other = Classifier("toy", 5, (8, 32, 32), (2, 16, 16))
    with pytest.raises(ValueError, match="1 missing .encoder.patch_embed.weight"):
        load_weights(other, state, about)
    assert "1 missing" in load_weights(other, state, about, least=0)
    for depth in (1, 4):
        with pytest.raises(ValueError, match="decoder.blocks"):
            load_weights(VideoMAE("toy", **CLIPS, decoder_depth=depth), state, about)
    scaled = state | {"encoder.blocks.0.ls1.gamma": torch.ones(128)}
    with pytest.raises(ValueError, match="and no more.*encoder.blocks.0.ls1.gamma"):
        load_weights(Classifier("toy", 5, **CLIPS), scaled, about)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["bad.pth", "old.pth", "pytorch_model.bin", "checkpoint.pt"])
def test_code_in_a_file_is_not_run(tmp_path, name):
    path = tmp_path / name
    args = argparse.Namespace(x=Malicious(tmp_path / "ran"))
    content = dict(model={"a": torch.ones(2)}, args=args)
    torch.save(content, path, _use_new_zipfile_serialization="old" not in name)
    given = path if path.suffix == ".pth" else tmp_path
    with pytest.raises(ValueError, match="would run .*mkdir|no weights that can be read") as caught:
        read_weights(given)
    assert str(given) in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "ran").exists()  # it would have


@pytest.mark.parametrize("content", "missing text truncated number list tensors other".split())
@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_what_is_no_weights_is_refused_in_one_line_with_its_path(tmp_path, content, name):
    path, saved = tmp_path / name, {"number": 3, "tensors": {"model": {"epoch": 3}}, "list": [3]}
    saved["other"] = {"fc.weight": torch.ones(2, 2), "layers.0.ln1.bias": torch.ones(2)}
    if content in saved:
        torch.save(saved[content], path)
    elif content == "truncated":
        torch.save({"model": {"a": torch.ones(2000)}}, path)
        path.write_bytes(path.read_bytes()[:3000])
    elif content == "text":
        path.write_text("These are no weights.\n")
    with pytest.raises(ValueError, match=name) as caught:
        read_weights(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 250 + len(str(path))
    if content == "other" and path.suffix == ".pth":
        assert "fc.weight, layers.0.ln1.bias" in str(caught.value)  # named by its keys


# positions on another grid


def moved(kind, trained, grid, dim=192):
    """The table of a grid, interpolated for another one."""
    encoder = Encoder(dim, 0, 1, grid, (1, 1, 1), kind, final_norm=False)
    model = nn.ModuleDict(dict(encoder=encoder))
    state = nn.ModuleDict(dict(encoder=Encoder(dim, 0, 1, trained, (1, 1, 1), kind))).state_dict()
    load_weights(model, state, dict(video_size=trained, cube=(1, 1, 1)))
    return encoder.pos_embed


def places(grid):
    """Centres of the cubes of a grid, as shares of the clip: (N, 3)."""
    return torch.cartesian_prod(*((torch.arange(side) + 0.5) / side for side in grid))


@pytest.mark.parametrize("kind", ["1d", "3d"])
@pytest.mark.parametrize("grid", [(8, 7, 7), (16, 14, 14), (8, 14, 20)])
def test_the_same_place_keeps_its_code_on_another_grid(kind, grid):
    """The trained code nearest to a cube's is that of a cube at most half a cube away."""
    trained = position_table((8, 14, 14), 192, kind)

    def distance(table):
        nearest = places((8, 14, 14))[torch.cdist(table, trained).argmin(dim=1)]
        cubes = (nearest - places(grid)).abs() * torch.tensor([8, 14, 14])
        return cubes.mean(dim=0).max()

    assert torch.equal(moved(kind, (8, 14, 14), (8, 14, 14)), trained)
    assert distance(moved(kind, (8, 14, 14), grid)) < 0.51
    assert distance(position_table(grid, 192, kind)) > 1.5  # computed anew


def test_interpolated_positions_survive_our_checkpoint(tmp_path):
    """They are stored: a classifier on another grid computes the same after saving and loading."""
    larger = Classifier("toy", 3, (8, 64, 64), (2, 8, 8))
    report = load_weights(larger, classifier().state_dict(), dict(CLIPS))
    assert "positions of 8x32x32 interpolated to 4x8x8 cubes" in report
    path = our_checkpoint(tmp_path / "a.pt", larger)
    again, _ = load_model(path, classifier=True)
    assert torch.equal(again.encoder.pos_embed, larger.encoder.pos_embed)
    assert not torch.equal(again.encoder.pos_embed, position_table((4, 8, 8), 128, "1d"))


def test_a_variant_that_is_gone_is_one_line(tmp_path):
    """One's own subclass, taken out of lib/variants.py after training."""
    model = VideoMAE("toy", (4, 32, 32), (2, 8, 8))
    config = dict(model=model.config, flags=dict(model="hog"))
    state = dict(stage="pretrain", config=config, step=1, steps=1, model=model.state_dict())
    torch.save(state, tmp_path / "hog.pt")
    with pytest.raises(ValueError, match="^.*hog.pt is of --model hog, which lib/variants.py"):
        load_model(tmp_path / "hog.pt")
