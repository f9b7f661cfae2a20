"""Weights for other projects: the official code's .pth, and folders for Hugging Face.

python -m lib.weights WEIGHTS --official FILE.pth
python -m lib.weights WEIGHTS --hugging-face FOLDER      # needs transformers

WEIGHTS is anything that docs/weights.md lists, if it has a decoder or a trained head.
"""

import argparse
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

from lib.engine import save_checkpoint
from lib.weights import CLIPS, load_model, rename
from model import IMAGENET_MEAN, IMAGENET_STD, SIZES, Classifier, VideoMAE, position_table


def to_official(model: VideoMAE | Classifier) -> dict[str, Tensor]:
    """The weights under the official names and with its Conv3d; to_ours is the inverse.

    ValueError for variants, and for other positions than the "1d" ones that others compute.
    """
    if type(model) not in (VideoMAE, Classifier):
        raise ValueError(f"other projects have no {type(model).__name__}")
    state, (p0, p1, p2) = model.state_dict(), model.encoder.cube
    state.pop("decoder_pos_embed", None)
    positions = state.pop("encoder.pos_embed")
    if not torch.equal(positions, position_table(model.encoder.grid, positions.shape[1], "1d")):
        raise ValueError("other projects cannot use these weights: they compute other positions")
    kernel = state.pop("encoder.patch_embed.weight")
    kernel = rearrange(kernel, "d (p0 p1 p2 c) -> d c p0 p1 p2", p0=p0, p1=p1, p2=p2)
    bias = state.pop("encoder.patch_embed.bias")
    state |= {"encoder.patch_embed.proj.weight": kernel, "encoder.patch_embed.proj.bias": bias}
    prefix = "encoder." if isinstance(model, Classifier) else ""
    return {name.removeprefix(prefix): value.contiguous() for name, value in state.items()}


def to_hugging_face(model: VideoMAE | Classifier, about: dict) -> tuple:
    """The model and its preprocessing as objects of transformers. ValueError as to_official.

    Their config takes class names, stride, sampling and augment from `about`.
    """
    try:
        import transformers
    except ImportError as error:
        raise ValueError("--hugging-face needs transformers: pip install transformers") from error
    state, s = to_official(model), SIZES[model.config["size"]]
    (frames, height, width), (p0, p1, p2) = model.encoder.video_size, model.encoder.cube
    if height != width or p1 != p2:
        raise ValueError("Hugging Face's VideoMAE takes square clips and cubes alone")
    config = dict(
        num_frames=frames, image_size=height, tubelet_size=p0, patch_size=p1,
        hidden_size=s["dim"], num_hidden_layers=s["depth"], num_attention_heads=s["heads"],
        intermediate_size=4 * s["dim"], layer_norm_eps=model.encoder.blocks[0].norm1.eps,
        decoder_hidden_size=s["decoder_dim"], decoder_num_attention_heads=s["decoder_heads"],
        decoder_intermediate_size=4 * s["decoder_dim"],
        # With mean pooling, their encoder has no last LayerNorm.
        use_mean_pooling=isinstance(model, Classifier),
    )  # fmt: skip
    config |= {key: about[key] for key in CLIPS if key in about}
    if isinstance(model, Classifier):
        kind, names = transformers.VideoMAEForVideoClassification, about["classes"]
        numbers = {name: i for i, name in enumerate(names)}
        config |= dict(id2label=dict(enumerate(names)), label2id=numbers)
    else:
        kind, depth = transformers.VideoMAEForPreTraining, len(model.decoder.blocks)
        config |= dict(decoder_num_hidden_layers=depth, norm_pix_loss=model.normalize)
    theirs = kind(transformers.VideoMAEConfig(**config)).eval()

    ours = {rename(name): value for name, value in state.items()}
    for name in [name for name in ours if name.endswith("qkv.weight")]:
        for part, rows in zip(("query", "key", "value"), ours[name].chunk(3), strict=True):
            ours[name.replace("qkv", part)] = rows
    wanted = {name: rename(name, "videomae.") for name in theirs.state_dict()}
    theirs.load_state_dict({name: ours[wanted[name]] for name in wanted})
    crop = dict(size=dict(shortest_edge=height), crop_size=dict(height=height, width=height))
    colours = dict(image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD)
    return theirs, transformers.VideoMAEImageProcessor(**crop, **colours)


@torch.no_grad()
def change_last_eps(model: VideoMAE | Classifier, eps: float = 1e-5) -> None:
    """Give the last LayerNorm the eps that Hugging Face fixes.

    Its weight makes up for it at the mean variance of its inputs, measured on a clip of noise.
    """
    norm = model.fc_norm if isinstance(model, Classifier) else model.decoder.norm
    (t, h, w), n, seen = model.encoder.video_size, len(model.encoder.pos_embed), []
    clip = torch.rand(1, t, 3, h, w, generator=torch.Generator().manual_seed(0))
    inputs = [clip] if isinstance(model, Classifier) else [clip, torch.arange(n)[None] % 2 == 0]
    with norm.register_forward_pre_hook(lambda _, given: seen.extend(given)):
        model(*inputs)
    variance = seen[0].var(dim=-1, unbiased=False).mean()
    norm.weight *= ((variance + eps) / (variance + norm.eps)).sqrt()
    norm.eps = eps


def main(argv: list[str]) -> None:
    """The command line. Files that exist are not written over."""
    parser = argparse.ArgumentParser("python -m lib.weights", description=__doc__.split("\n")[0])
    parser.add_argument("weights")
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--official", type=Path, metavar="FILE.pth")
    how.add_argument("--hugging-face", type=Path, metavar="FOLDER")
    given = parser.parse_args(argv)
    out = given.official or given.hugging_face
    if out.exists():
        raise ValueError(f"{out} exists: name a new one")
    out.parent.mkdir(parents=True, exist_ok=True)
    model, about = load_model(given.weights, classifier=True)
    state = to_official(model)  # refuses what others do not have
    if given.official:
        frames, side, _ = model.encoder.video_size
        args = dict(num_frames=frames, input_size=side, sampling_rate=about.get("stride"))
        args["data_set"] = "SSV2" if about.get("sampling") == "uniform" else None
        args["normlize_target"] = about.get("normalize")  # spelled so there
        save_checkpoint(out, model=state, args=args)
        if model.config.get("eps", 1e-6) != 1e-6:
            print(f"LayerNorm eps is 1e-06 there, not {model.config['eps']}")
    else:
        change_last_eps(model)
        for part in to_hugging_face(model, about):
            part.save_pretrained(out)
    print(f"wrote {out}")
