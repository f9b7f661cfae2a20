"""Weights of this and other projects: read them, build their model, load them with a report.

    state, about = read_weights(path)          # tensors under our names; what is known of the model
    model = build(Classifier, config)          # the model of a config
    print(load_weights(model, state, about))   # what fits, in one line

docs/weights.md lists what can be read. lib/export.py writes weights for others.
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
FILES = """model.safetensors model-*-of-*.safetensors pytorch_model.bin pytorch_model-*-of-*.bin
mp_rank_00_model_states.pt checkpoint.pt""".split()  # in folders; the first of them that is there
PARTS = ("model", "module", "state_dict", "model_state_dict", "model_ema", "state_dict_ema")
USUAL_VIDEO = (16, 224, 224)  # of published models, where neither file nor config says more
# Position tables, and the weights that have as many rows as these have columns.
POSITIONS = {
    "encoder.pos_embed": "encoder.patch_embed.weight",
    "decoder_pos_embed": "encoder_to_decoder.weight",
}
DECODER = ("decoder", "encoder_to_decoder", "mask_token")  # its tensors' names begin so
CLIPS = ("stride", "sampling", "augment")  # how clips are made, as checkpoints say it
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
    (r"\.attn\.(q|v)(uery|alue)?[._]bias$", r".attn.\1_bias"),  # of either version
    (r"\.(intermediate\.dense|mlp\.layers\.0\.0)\.", ".mlp.fc1."),  # mmaction2: mlp.layers
    (r"\.(output\.dense|mlp\.layers\.1)\.", ".mlp.fc2."),
)


# ------------------------------------------------------------------------------------ reading


def read_weights(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """Weights of a file or folder under our names, and what is known of their model.

    What is known is a dict with some of: the arguments of the model and "eps" (see build); "name",
    a key of MODELS; "classes", a list of names; "stride", "sampling", "augment" of its clips;
    "data", "splits", "fold" and "missing", where those are from; "mask", a key of MASKS; "note", a
    remark for the report.
    Nothing pickled is run. ValueError, in one line, for what cannot be read.
    """
    path = Path(path)
    content = read_files(path)
    if "stage" in content:
        state, about = content["model"], about_ours(path, content)
        if content["stage"] == "contrast":  # its other parts are of use in its training alone
            state = {name: x for name, x in state.items() if name.startswith("encoder.")}
        return state, about
    parts = [part for part in PARTS if isinstance(content.get(part), dict)]
    found = content[parts[0]] if parts else content
    found = {str(name): x.float() for name, x in found.items() if isinstance(x, Tensor)}
    kernels = (re.fullmatch(KERNEL, name) for name, x in found.items() if x.ndim in (4, 5))
    kernel = next(filter(None, kernels), None)
    if kernel is None:
        some = ", ".join([*map(str, found or content)][:4])
        raise ValueError(f"{path} holds no VideoMAE or image ViT that can be read, but {some} ...")

    state, shape = to_ours(found, wrappers=kernel[1]), found[kernel[0]].shape
    if len(shape) == 4:
        # Of a model for images, only the encoder is of use to videos, without its positions.
        state = {k: x for k, x in state.items() if re.match(r"encoder\.(patch|blocks|norm)", k)}
        note = "image model inflated to cubes, its encoder alone"
        return state, about_shapes(path, shape, state) | dict(note=note)
    about = about_shapes(path, shape, state)
    about |= about_config(path, found, about) | about_official(content.get("args") or {})
    # Most files hold no positions: add the table of the grid that they were trained on.
    grid = grid_of(about.get("video_size", USUAL_VIDEO), about["cube"])
    for name, weight in POSITIONS.items():
        if weight in state:
            state.setdefault(name, position_table(grid, len(state[weight]), "1d"))
    if any("ema" in part for part in parts):
        about["note"] = f"weights under {' rather than '.join(parts)}"
    return state, about | dict(positions="1d")


def read_files(path: Path) -> dict:
    """The content of a file, or of all files with weights in a folder."""
    if not path.exists():
        how = "train first, or name other weights with --init or --checkpoint"
        if re.fullmatch(r"[\w-]+/[\w.-]+", str(path)) and not path.parent.exists():
            how = f"to download it: hf download {path} --local-dir FOLDER"
        raise ValueError(f"no weights at {path}; {how}")
    files, content = [path], {}
    if path.is_dir():
        files = next(filter(None, (sorted(path.glob(pattern)) for pattern in FILES)), [path])
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
        reason = f"it would run {code[1]}" if code else " ".join(str(error).split())[:120]
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
    """What our own checkpoint says of its model, its clips and its data."""
    config = content.get("config", {})
    if "flags" not in config:
        raise ValueError(f"{path} is a checkpoint of an older version, which cannot be read")
    flags, about = config["flags"], dict(config["model"])
    said = (*CLIPS, "data", "splits", "fold", "missing", "mask")
    about |= {key: flags[key] for key in said if key in flags}
    if content["stage"] == "pretrain":
        about["name"] = flags["model"]
    elif "classes" in config:
        about["classes"] = config["classes"]
    if content["step"] < content["steps"]:
        about["note"] = f"unfinished: step {content['step']} of {content['steps']}"
    return about


def about_shapes(path: Path, kernel: tuple[int, ...], state: dict[str, Tensor]) -> dict:
    """What shapes show: size, cube, decoder_depth, classes. `kernel` is the file's."""
    blocks = {tuple(name.split(".")[:3]) for name in state if ".blocks." in name}
    depth, decoder_depth = (sum(b[0] == part for b in blocks) for part in ("encoder", "decoder"))
    sizes = [name for name, s in SIZES.items() if (s["dim"], s["depth"]) == (kernel[0], depth)]
    if not sizes:
        raise ValueError(f"{path}: add {kernel[0]} wide, {depth} blocks deep to SIZES in model.py")
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
        return dict(eps=CONFIG["layer_norm_eps"]) if hugging_face else {}
    try:
        values, size = json.loads(file.read_text()), SIZES[about["size"]]
        if not hugging_face:
            if "model_config" not in values:
                return {}  # it says nothing of this file
            v2 = values["model_config"]
            values = dict(layer_norm_eps=1e-6) | v2
            values |= dict(image_size=v2["img_size"], num_attention_heads=v2["num_heads"])
        values = CONFIG | values
        side = values["image_size"]
        height, width = (side, side) if isinstance(side, int) else side
        more = dict(video_size=[values["num_frames"], height, width])
        grid_of(more["video_size"], about["cube"])
        more |= {key: values[key] for key in CLIPS if key in values}  # export.py wrote them
        needed = dict(model_type="videomae", hidden_act="gelu", cos_attn=False)
        needed["num_attention_heads"] = size["heads"]
        if hugging_face:
            more |= dict(eps=values["layer_norm_eps"], normalize=values["norm_pix_loss"])
        else:
            needed["layer_norm_eps"] = 1e-6  # ours
        if "decoder_depth" in about:
            needed["decoder_num_attention_heads"] = size["decoder_heads"]
        if "classes" in about:
            needed["use_mean_pooling"] = True  # without it the head reads the first token alone
            names = enumerate(about["classes"])
            more["classes"] = [values["id2label"].get(str(i), name) for i, name in names]
        for name, value in needed.items():
            if values[name] != value:
                raise ValueError(f"{name} is {values[name]}, only {value} can be used")
    except Exception as error:
        raise ValueError(f"{file} does not fit: {error}") from error
    return more


# ----------------------------------------------------------------------- building and loading


def build(Model: type[nn.Module], config: dict) -> nn.Module:
    """The model of a config: the arguments of Model, and perhaps "eps", which model.config keeps.

    eps is Hugging Face's for LayerNorm. Theirs is fixed at 1e-5 in the last one before the head.
    It is a property of weights, not of the method, so it is set from outside.
    """
    model = Model(**{key: value for key, value in config.items() if key != "eps"})
    if "eps" in config:
        for name, part in model.named_modules():
            if isinstance(part, nn.LayerNorm):
                part.eps = 1e-5 if name in ("decoder.norm", "fc_norm") else config["eps"]
        model.config["eps"] = config["eps"]
    return model


def load_weights(model: nn.Module, state: dict, about: dict, least: float = 0.95) -> str:
    """Copy what fits by name and shape into a model; returns a report of one line.

    The rest may stay new, such as a classifier's fc_norm and head (official code). ValueError where
    less than the share `least` of the encoder's tensors fits (and of the decoder's, if both have
    one), where one of them has another shape, or where the weights have more; 0 allows all.
    """
    if not state:
        return "untrained"
    positions, moved = place_positions(model, state, about)
    own = model.state_dict()
    decoders = ("decoder.norm.weight" in own, "decoder.norm.weight" in state)
    remark = {(True, False): "decoder new", (False, True): "decoder left out"}.get(decoders)
    apart = tuple(POSITIONS) if all(decoders) else (*POSITIONS, *DECODER)
    own = {name: value for name, value in own.items() if not name.startswith(apart)}
    state = {name: value for name, value in state.items() if not name.startswith(apart)}

    fits = {k: state[k] for k, v in own.items() if k in state and state[k].shape == v.shape}
    needed = [name for name in own if name.startswith(("encoder.", "decoder."))]
    missing = [name for name in needed if name not in fits]
    new = [name for name in own if name not in fits and name not in needed]
    unused = [name for name in state if name not in own]
    other_shape = any(name in state for name in missing)
    more = any(name.startswith(("encoder.blocks.", "decoder.blocks.")) for name in unused)

    report = [f"{len(fits)} of {len(own)} tensors matched"]
    for word, names in dict(missing=missing, new=new, unused=unused).items():
        report.append(f"{len(names)} {word}" + (f" ({', '.join(names[:6])})" if names else ""))
    report = "; ".join(filter(None, [*report, remark, moved, about.get("note")]))
    share = 1 - len(missing) / len(needed)
    if share < least or (least > 0 and (other_shape or more)):
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
    tables = {k: state[k] for k in POSITIONS if k in state and k in model.state_dict()}
    if not tables:
        return {}, ""
    video, grid = about.get("video_size", USUAL_VIDEO), model.encoder.grid
    trained = grid_of(video, about["cube"])
    clips = by(video) + ("" if "video_size" in about else " (assumed)")
    if any(len(table) != math.prod(trained) for table in tables.values()):
        raise ValueError(f"the positions in the weights are not those of {clips}")
    if trained == grid:
        return tables, ""
    tables = {name: interpolate(table, trained, grid) for name, table in tables.items()}
    return tables, f"positions of {clips} interpolated to {by(grid)} cubes"


def interpolate(table: Tensor, trained: tuple[int, ...], grid: tuple[int, ...]) -> Tensor:
    """A position table (N, D) of the grid `trained` for another grid: (N', D)."""
    table = table.T.unflatten(1, trained)[None]  # (1, D, t, h, w)
    return F.interpolate(table, size=grid, mode="trilinear")[0].flatten(1).T


def load_model(path: str | Path, classifier: bool = False) -> tuple[VideoMAE | Classifier, dict]:
    """The model of weights with a decoder, in eval mode, and what read_weights knows of it.

    With `classifier`, also that of weights with a trained head. ValueError for all others.
    """
    state, about = read_weights(path)
    name = about.get("name", "videomae")
    if name not in MODELS:
        raise ValueError(f"{path} is of --model {name}, which lib/variants.py does not have")
    Model, known = MODELS[name], dict(about)
    if classifier and "classes" in about and "fc_norm.weight" in state:  # not of detect.py
        Model, known["classes"] = Classifier, len(about["classes"])
    elif "encoder_to_decoder.weight" not in state:
        raise ValueError(f"{path} has no decoder: take weights of pretrain.py")
    more = ["classes"] if Model is Classifier else ["decoder_depth", "normalize", "loss"]
    keys = ["size", "video_size", "cube", "positions", "eps", *more]
    model = build(Model, {key: known[key] for key in keys if key in known})
    load_weights(model, state, about, least=1.0)
    return model.eval(), about


def init_model(model: VideoMAE, path: str | Path) -> str:
    """Load weights to go on pre-training from; returns a report of one line.

    The decoder stays new where the weights have none or another one. ValueError unless the encoder
    fits, with its cubes and kind of positions. LayerNorm eps stays: training makes up for another.
    """
    state, about = read_weights(path)
    for key in {"cube", "positions"} & about.keys():
        if about[key] != model.config[key]:
            theirs = str(about[key]).strip("[]").replace(",", "")
            raise ValueError(f"{path} has other {key}: add --{key} {theirs}")
    # Those of CrossMAE's decoder are named like the others', but mean something else.
    if (about.get("name") == "cross") == isinstance(model, MODELS["cross"]):
        with suppress(ValueError):
            return load_weights(model, state, about)
    state = {name: value for name, value in state.items() if not name.startswith(DECODER)}
    return load_weights(model, state, about)


def grid_of(video_size, cube) -> tuple[int, int, int]:
    """Cubes along (time, rows, columns); ValueError where a side does not divide."""
    sides = list(zip(video_size, cube, strict=True))
    if any(side < edge or side % edge for side, edge in sides):
        raise ValueError(f"clips of {by(video_size)} do not divide into cubes of {by(cube)}")
    return tuple(side // edge for side, edge in sides)


def by(numbers) -> str:
    """(2, 16, 16) -> "2x16x16"."""
    return "x".join(map(str, numbers))


if __name__ == "__main__":
    from lib import engine, export

    engine.cli(export.main)
