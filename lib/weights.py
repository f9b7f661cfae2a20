"""Weights of this and other projects: read them, build their model, load them with a report.

    state, about = read_weights(path)          # tensors under our names; what is known of the model
    model = build(Classifier, config)          # the model of a config
    print(load_weights(model, state, about))   # what fits, in one line

docs/weights.md lists what can be read. lib/export.py writes weights for others:

    python -m lib.weights CHECKPOINT --official FILE.pth
    python -m lib.weights CHECKPOINT --hugging-face FOLDER
"""

import argparse
import json
import math
import re
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from lib.variants import MODELS
from model import SIZES, Classifier, VideoMAE, position_table

# What files may hold besides tensors and containers: data that runs nothing. In official files that
# is a Namespace, the flags, and a numpy.float64, the learning rate: by its name in numpy 1 and 2.
NUMBER = np.float64(0).__reduce__()[0]
SAFE = [argparse.Namespace, np.dtype, type(np.dtype(np.float64))]
SAFE += [(NUMBER, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
FILES = ("model*.safetensors", "pytorch_model*.bin", "mp_rank_00_model_states.pt", "checkpoint.pt")
PARTS = ("model", "module", "state_dict", "model_state_dict", "model_ema", "state_dict_ema")
USUAL_VIDEO = (16, 224, 224)  # of published models, where neither file nor config says more
# Position tables, and the weights that have as many rows as these have columns.
POSITIONS = {
    "encoder.pos_embed": "encoder.patch_embed.weight",
    "decoder_pos_embed": "encoder_to_decoder.weight",
}
DECODER = ("decoder", "encoder_to_decoder", "mask_token")  # its tensors' names begin so
# Hugging Face's values where config.json says nothing.
CONFIG = dict(
    model_type="videomae", num_frames=16, image_size=224, hidden_act="gelu", layer_norm_eps=1e-12,
    num_attention_heads=12, decoder_num_attention_heads=6, use_mean_pooling=True,
    norm_pix_loss=True, id2label={}, cos_attn=False,
)  # fmt: skip

# The kernel that embeds cubes or patches. What stands before it, group 1, are wrappers' names.
KERNEL = r"(.*?)((encoder|embeddings)\.)?patch_embed(dings)?\.proj(ection)?\.weight"
# Names of other projects without wrappers -> ours; the patterns are applied in this order.
RENAMES = (
    (r"^((encoder|embeddings)\.)?patch_embed(dings)?\.proj(ection)?\.", "encoder.patch_embed."),
    (r"^(blocks|norm|pos_embed)\b", r"encoder.\1"),
    (r"^encoder\.(fc_norm|head)\.", r"\1."),
    (r"^(classifier|cls_head\.fc_cls)\.", "head."),
    (r"^encoder\.layer\.", "encoder.blocks."),  # this and what follows: Hugging Face
    (r"^layernorm\.", "encoder.norm."),
    (r"^decoder\.decoder_layers\.", "decoder.blocks."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.attention\.", ".attn."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.attn\.(query|value)\.bias$", r".attn.\1_bias"),  # of modules since version 5
    (r"\.attn\.(q|v)\w*_bias$", r".attn.\1_bias"),
    (r"\.(intermediate\.dense|mlp\.layers\.0\.0)\.", ".mlp.fc1."),  # mmaction2: mlp.layers
    (r"\.(output\.dense|mlp\.layers\.1)\.", ".mlp.fc2."),
)


# ------------------------------------------------------------------------------------ reading


def read_weights(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """Weights of a file or folder under our names, and what is known of their model.

    What is known is a dict with some of: the arguments of the model and "eps" (see build); "name",
    a key of MODELS; "classes", a list of names; "stride" and "sampling" of the training clips;
    "note" and "unfinished", remarks for the report. Nothing pickled is run.
    ValueError, in one line, for what cannot be read.
    """
    path = Path(path)
    content = read_files(path)
    if "stage" in content:
        return content["model"], about_ours(path, content)
    parts = [part for part in PARTS if isinstance(content.get(part), dict)]
    found = content[parts[0]] if parts else content
    found = {f"{name}": x.float() for name, x in found.items() if isinstance(x, Tensor)}
    kernels = (re.fullmatch(KERNEL, name) for name, x in found.items() if x.ndim in (4, 5))
    kernel = next(filter(None, kernels), None)
    if kernel is None:
        some = ", ".join([*map(str, found or content)][:4])
        raise ValueError(f"{path} holds no VideoMAE or image ViT that can be read, but {some} ...")

    state, shape = to_ours(found, wrappers=kernel[1]), found[kernel[0]].shape
    about, notes = about_shapes(path, shape, state), []
    if any("ema" in part for part in parts):
        notes.append(" left out, ".join([*parts[1:], f"weights under {parts[0]}"]))
    if len(shape) == 5:
        about |= about_config(path, found, about) | about_official(content.get("args", {}))
        # Most files hold no positions: add the table of the grid that they were trained on.
        grid = grid_of(about.get("video_size", USUAL_VIDEO), about["cube"])
        for name, weight in POSITIONS.items():
            if weight in state:
                state.setdefault(name, position_table(grid, len(state[weight]), "1d"))
        about["positions"] = "1d"
    else:
        # Of a model for images, only the encoder is of use to videos, without its positions.
        kept = {k: x for k, x in state.items() if re.match(r"encoder\.(patch|blocks|norm)", k)}
        left = {re.sub(r"^(encoder|embeddings)\.", "", k).split(".")[0] for k in {*state} - {*kept}}
        notes.append(f"image model inflated to cubes, without {', '.join(sorted(left))}")
        state = kept
        about.pop("classes", None)
    return state, about | (dict(note="; ".join(notes)) if notes else {})


def read_files(path: Path) -> dict:
    """The content of a file, or of all files with weights in a folder."""
    if not path.exists():
        hub = re.fullmatch(r"[\w-]+/[\w.-]+", str(path)) and not path.parent.exists()
        how = "; train first, or name other weights with --init or --checkpoint"
        how = f"; to download it: hf download {path} --local-dir FOLDER" if hub else how
        raise ValueError(f"no weights at {path}{how}")
    files, content = [path], {}
    if path.is_dir():
        files = next(filter(None, (sorted(path.glob(pattern)) for pattern in FILES)), [])
    try:
        for file in files:
            if file.suffix == ".safetensors":
                from safetensors.torch import load_file  # only these files need it

                content |= load_file(file)
            else:
                with torch.serialization.safe_globals(SAFE):
                    content |= torch.load(file, map_location="cpu", weights_only=True)
    except ImportError as error:
        raise ValueError(f"{path} needs safetensors: pip install safetensors") from error
    except Exception as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it would run {code[1]}; save its state_dict alone" if code else str(error)
        reason = " ".join(reason.split())[:120]
        raise ValueError(f"{path} holds no weights that can be read ({reason})") from error
    return content


def rename(name: str, wrappers: str = "") -> str:
    """Our name of a tensor that stands behind `wrappers` "a.b.", or behind some of them."""
    for wrapper in wrappers.split(".")[:-1]:
        name = name.removeprefix(f"{wrapper}.")
    for pattern, new in RENAMES:
        name = re.sub(pattern, new, name)
    return name


def to_ours(found: dict[str, Tensor], wrappers: str = "") -> dict[str, Tensor]:
    """A state dict in any naming of RENAMES, behind `wrappers` "a.b.", in our names and shapes.

    The kernel of a Conv3d (D, C, p0, p1, p2) becomes the weight (D, P) of a Linear. A kernel for
    images (D, C, p1, p2) is inflated (section 4.2): half of it for each of two frames, so that a
    clip that stands still is embedded as its image. A bias of the keys is left out: it adds the
    same to all logits of a query, and softmax cancels it.
    """
    ours = {rename(name, wrappers): value for name, value in found.items()}
    for name in POSITIONS.keys() & ours.keys():
        ours[name] = ours[name].flatten(0, -2)  # theirs are (1, N, D)
    for name in list(ours):
        attn = name[: name.rfind("attn.") + len("attn.")]
        if name == f"{attn}query.weight":
            rows = [ours.pop(f"{attn}{part}.weight") for part in ("query", "key", "value")]
            ours[f"{attn}qkv.weight"] = torch.cat(rows)
        elif name == f"{attn}qkv.bias":
            ours[f"{attn}q_bias"], _, ours[f"{attn}v_bias"] = ours.pop(name).chunk(3)
        elif name == f"{attn}key.bias":
            del ours[name]
    kernel = ours["encoder.patch_embed.weight"]
    if kernel.ndim == 4:
        kernel = torch.stack([kernel, kernel], dim=2) / 2
    ours["encoder.patch_embed.weight"] = rearrange(kernel, "d c p0 p1 p2 -> d (p0 p1 p2 c)")
    return ours


def about_ours(path: Path, content: dict) -> dict:
    """What our own checkpoint says of its model and its clips."""
    config = content.get("config", {})
    if "flags" not in config:
        raise ValueError(f"{path} is a checkpoint of an older version, which cannot be read")
    flags, about = config["flags"], dict(config["model"])
    about |= {key: flags[key] for key in ("stride", "sampling") if key in flags}
    if content["stage"] == "pretrain":
        about["name"] = flags["model"]
    else:
        about["classes"] = config["classes"]
    if content["step"] < content["steps"]:
        about["unfinished"] = f"unfinished: step {content['step']} of {content['steps']}"
    return about


def about_shapes(path: Path, kernel: tuple[int, ...], state: dict[str, Tensor]) -> dict:
    """What shapes show: size, cube, decoder_depth, classes. `kernel` is the file's."""
    blocks = {tuple(name.split(".")[:3]) for name in state if ".blocks." in name}
    depth, decoder_depth = (sum(b[0] == part for b in blocks) for part in ("encoder", "decoder"))
    sizes = [name for name, s in SIZES.items() if (s["dim"], s["depth"]) == (kernel[0], depth)]
    if not sizes:
        deep = f"{kernel[0]} wide and {depth} blocks deep"
        raise ValueError(f"{path} is {deep}, as no entry of SIZES in model.py: add one")
    about = dict(size=sizes[0], cube=[2, *kernel[2:]][-3:])  # a patch of an image has no frames
    if decoder_depth:
        about["decoder_depth"] = decoder_depth
    if "head.weight" in state:
        about["classes"] = [f"class {i}" for i in range(len(state["head.weight"]))]
    return about


def about_official(args: argparse.Namespace | dict) -> dict:
    """What the flags in an official file say of its clips and its target."""
    args = args if isinstance(args, dict) else vars(args)
    frames, side = args.get("num_frames"), args.get("input_size")
    about = dict(stride=args.get("sampling_rate"), normalize=args.get("normlize_target"))  # sic
    about["sampling"] = "uniform" if args.get("data_set") == "SSV2" else None
    about["video_size"] = [frames, side, side] if frames and side else None
    return {key: value for key, value in about.items() if value is not None}


def about_config(path: Path, found: dict[str, Tensor], about: dict) -> dict:
    """What config.json says beside weights of Hugging Face's VideoMAE, or of VideoMAE V2's.

    ValueError where their model computes what ours does not.
    """
    file = (path if path.is_dir() else path.parent) / "config.json"
    hugging_face = any("layernorm_before" in name for name in found)
    if not file.exists():
        return dict(eps=[1e-12, 1e-5]) if hugging_face else {}
    try:
        values = CONFIG | json.loads(file.read_text())
        if not hugging_face:
            if "model_config" not in values:
                return {}  # it says nothing of this file
            values = CONFIG | values["model_config"]
            values |= dict(image_size=values["img_size"], num_attention_heads=values["num_heads"])
        side, eps = values["image_size"], values["layer_norm_eps"]
        height, width = (side, side) if isinstance(side, int) else side
        more = dict(video_size=[values["num_frames"], height, width])
        grid_of(more["video_size"], about["cube"])
        more["eps"] = [float(eps), 1e-5 if hugging_face else float(eps)]  # the last is fixed there
        more |= {key: values[key] for key in ("stride", "sampling") if key in values}  # export.py
        needed = dict(model_type="videomae", hidden_act="gelu", cos_attn=False)
        needed["num_attention_heads"] = SIZES[about["size"]]["heads"]
        if classes := about.get("classes"):
            needed["use_mean_pooling"] = True  # without it the head reads the first token alone
            more["classes"] = [values["id2label"].get(str(i), x) for i, x in enumerate(classes)]
        elif "decoder_depth" in about:
            needed["decoder_num_attention_heads"] = SIZES[about["size"]]["decoder_heads"]
            more["normalize"] = values["norm_pix_loss"]
        for name, value in needed.items():
            if values[name] != value:
                raise ValueError(f"{name} is {values[name]}, only {value} can be used")
    except Exception as error:
        raise ValueError(f"{file} does not fit: {' '.join(f'{error}'.split())[:200]}") from error
    return more


# ----------------------------------------------------------------------- building and loading


def build(Model: type[nn.Module], config: dict) -> nn.Module:
    """The model of a config: the arguments of Model, and perhaps "eps", which model.config keeps.

    eps is [of all LayerNorms, of the last one before the head]. Hugging Face's are not the usual
    ones: a property of weights, not of the method, so it is set from outside.
    """
    model = Model(**{key: value for key, value in config.items() if key != "eps"})
    if "eps" in config:
        for name, part in model.named_modules():
            if isinstance(part, nn.LayerNorm):
                part.eps = config["eps"][name in ("decoder.norm", "fc_norm")]
        model.config["eps"] = list(config["eps"])
    return model


def load_weights(model: nn.Module, state: dict, about: dict, least: float = 0.95) -> str:
    """Copy what fits by name and shape into a model; returns a report of one line.

    The rest may stay new, such as a classifier's fc_norm and head (official code). ValueError where
    less than the share `least` of the encoder's tensors fits (and of the decoder's, if both have
    one), where one of them has another shape, or where the weights have more; 0 allows all.
    """
    if not state:
        return "untrained"
    own = {name: value for name, value in model.state_dict().items() if name not in POSITIONS}
    fits = {k: state[k] for k, v in own.items() if k in state and state[k].shape == v.shape}
    both = "decoder.norm.weight" in state and "decoder.norm.weight" in own
    needed = [k for k in own if k.startswith(("encoder.", "decoder.") if both else "encoder.")]
    missing = [name for name in needed if name not in fits]
    new = [name for name in own if name not in fits and name not in needed]
    unused = [name for name in state if name not in own and name not in POSITIONS]
    stacks = ("encoder.blocks.", "decoder.blocks.") if both else "encoder.blocks."
    wrong = [k for k in missing if k in state] + [k for k in unused if k.startswith(stacks)]

    report = [f"{len(fits)} of {len(own)} tensors matched"]
    for word, names in dict(missing=missing, new=new, unused=unused).items():
        names = [name for name in names if both or not name.startswith(DECODER)]
        some = names[:6] + ["..."] * (len(names) > 6)
        for i, name in enumerate(some):
            if name in own and name in state:
                some[i] += f" {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
        report.append(f"{len(names)} {word}" + (f" ({', '.join(some)})" if some else ""))
    for remark, names in {"decoder new": new, "decoder left out": unused}.items():
        if not both and any(name.startswith(DECODER) for name in names):
            report.append(remark)
    positions, moved = place_positions(model, state, about)
    report = "; ".join(filter(None, [*report, moved, about.get("note"), about.get("unfinished")]))
    share = 1 - len(missing) / len(needed)
    if share < least or (least > 0 and wrong):
        raise ValueError(
            f"{share:.0%} of {len(needed)} tensors fit; {least:.0%} must, all in their shape, and "
            f"no more: take the size, cube and decoder depth of the weights. {report}"
        )
    model.load_state_dict(fits | positions, strict=False)
    return report


def place_positions(model: nn.Module, state: dict, about: dict) -> tuple[dict[str, Tensor], str]:
    """The weights' position tables, interpolated where the model's grid is another, and a remark.

    So the same place in the picture keeps its code. Computing "1d" anew, as the official code does,
    moves every code but the first row's: the index of a row's start depends on the row's length.
    """
    video, (t, h, w) = about.get("video_size", USUAL_VIDEO), model.encoder.grid
    trained = grid_of(video, about.get("cube", model.encoder.cube))
    clips = by(video) + ("" if "video_size" in about else " (assumed)")
    tables = {k: state[k] for k in POSITIONS if k in state and k in model.state_dict()}
    if any(len(table) != math.prod(trained) for table in tables.values()):
        raise ValueError(f"the positions in the weights are not those of {clips}")
    if trained == (t, h, w) or not tables:
        return tables, ""
    for name, table in tables.items():
        table = table.T.unflatten(1, trained)[None]
        table = F.interpolate(table, size=(t, h, w), mode="trilinear")
        tables[name] = table[0].flatten(1).T
    return tables, f"positions of {clips} interpolated to {t}x{h}x{w} cubes"


def load_model(path: str | Path, classifier: bool = False) -> tuple[VideoMAE | Classifier, dict]:
    """The model of weights with a decoder, in eval mode, and what read_weights knows of it.

    With `classifier`, also that of weights with a trained head. ValueError for all others.
    """
    state, about = read_weights(path)
    name = about.get("name", "videomae")
    if name not in MODELS:
        raise ValueError(f"{path} is of --model {name}, which lib/variants.py does not have")
    Model, known = MODELS[name], dict(about)
    if classifier and "classes" in about:
        Model, known["classes"] = Classifier, len(about["classes"])
    elif "encoder_to_decoder.weight" not in state:
        raise ValueError(f"{path} has no decoder: take pre-trained weights to reconstruct videos")
    more = ["classes"] if Model is Classifier else ["decoder_depth", "normalize", "loss"]
    keys = ["size", "video_size", "cube", "positions", "eps", *more]
    model = build(Model, {key: known[key] for key in keys if key in known})
    load_weights(model, state, about, least=1.0)
    return model.eval(), about


def init_model(model: VideoMAE, path: str | Path) -> str:
    """Load weights to go on pre-training from; returns a report of one line.

    The decoder stays new where the weights have none or another one. ValueError unless the encoder
    fits. LayerNorm eps stays as it is: training makes up for other ones, such as Hugging Face's.
    """
    state, about = read_weights(path)
    # Those of CrossMAE's decoder are named like the others', but mean something else.
    if (about.get("name") == "cross") == isinstance(model, MODELS["cross"]):
        with suppress(ValueError):
            return load_weights(model, state, about)
    state = {name: value for name, value in state.items() if not name.startswith(DECODER)}
    return load_weights(model, state, about)


def grid_of(video_size, cube) -> tuple[int, int, int]:
    """Cubes along (time, rows, columns); ValueError where a side does not divide, or is absurd."""
    sides = list(zip(video_size, cube, strict=True))
    if any(side < edge or side % edge or side > 10_000 for side, edge in sides):
        raise ValueError(f"clips of {by(video_size)} do not divide into cubes of {by(cube)}")
    return tuple(side // edge for side, edge in sides)


def by(numbers) -> str:
    """(2, 16, 16) -> "2x16x16"."""
    return "x".join(map(str, numbers))


if __name__ == "__main__":
    from lib import engine, export

    engine.cli(export.main)
