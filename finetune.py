"""Fine-tuning: for now, reading the weights it starts from."""

import argparse
import json
import re
from pathlib import Path

import torch
from torch import Tensor

from model import SIZES, infer_config

# Our arguments of a size -> Hugging Face's; and what a config.json means that leaves something out.
HF_SIZE = dict(dim="hidden_size", depth="num_hidden_layers", heads="num_attention_heads",
               decoder_dim="decoder_hidden_size", decoder_heads="decoder_num_attention_heads",
               decoder_depth="decoder_num_hidden_layers")  # fmt: skip
HF_DEFAULTS = dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12,
                   decoder_hidden_size=384, decoder_num_attention_heads=6, decoder_num_hidden_layers=4, image_size=224,
                   patch_size=16, num_frames=16, tubelet_size=2, num_channels=3, hidden_act="gelu",
                   layer_norm_eps=1e-12, use_mean_pooling=True, norm_pix_loss=True, id2label={})  # fmt: skip


def read_weights(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """Weights under the names they have in a file or Hugging Face folder, and the arguments of their model.

    Files: ours; official .pth with the weights under "model", under "module" or bare; .safetensors. Arguments are those
    of VideoMAE or Classifier, of files without any those that the shapes show; Hugging Face's classifiers add "labels",
    the names of the classes. Nothing is executed: weights_only, and argparse.Namespace, which official files contain.
    """
    path, content, config = Path(path), {}, None
    if not path.exists():
        raise ValueError(f"no weights at {path}")
    try:
        for file in [path] if path.is_file() else hf_files(path):
            if file.suffix == ".safetensors":
                from safetensors.torch import load_file  # needed for these files only

                content |= load_file(file)
            else:
                with torch.serialization.safe_globals([argparse.Namespace]):
                    content |= torch.load(file, map_location="cpu", weights_only=True)
        state = content.get("model", content.get("module", content))
        state = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        beside = (path if path.is_dir() else path.parent) / "config.json"
        if any("layernorm_before" in name for name in state) and beside.exists():
            config = json.loads(beside.read_text())
    except ImportError as error:
        raise ValueError(f"{path} cannot be read without safetensors: pip install safetensors") from error
    except Exception as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it would run {code[1]}" if code else " ".join(f"{type(error).__name__} {error}".split())[:100]
        raise ValueError(f"{path} holds no weights that can be read ({reason})") from error
    if not state:
        raise ValueError(f"{path} holds no weights")
    if "stage" in content:
        return state, content["config"]["model"]
    return state, hf_arguments(config, state) if config else infer_config(state)


def hf_files(folder: Path) -> list[Path]:
    """The files of weights in a Hugging Face folder, which an index names if there are several."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).exists():
            return [folder / name]
        if (index := folder / f"{name}.index.json").exists():
            return [folder / part for part in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    return []


def hf_arguments(config: dict, state: dict[str, Tensor]) -> dict:
    """Our arguments for the model that a Hugging Face config.json describes; ValueError where ours cannot be it."""
    config, classifier = HF_DEFAULTS | config, "classifier.weight" in state
    needed = dict(model_type="videomae", num_channels=3, hidden_act="gelu")
    if classifier:
        needed["use_mean_pooling"] = True  # else the head reads token 0 alone, a corner of the first frames
    for name, value in needed.items():
        if config.get(name) != value:
            raise ValueError(f"a Hugging Face model with {name} = {config.get(name)} cannot be used, only with {value}")
    size = {ours: config[theirs] for ours, theirs in HF_SIZE.items()}
    used = ("dim", "depth", "heads") if classifier else ("dim", "depth", "heads", "decoder_dim", "decoder_heads")
    pair = lambda side: side if isinstance(side, list) else [side, side]
    arguments = dict(
        size=next((name for name, s in SIZES.items() if all(s[k] == size[k] for k in used)), size),
        video_size=[config["num_frames"], *pair(config["image_size"])],
        cube=[config["tubelet_size"], *pair(config["patch_size"])],
        eps=[config["layer_norm_eps"], 1e-5],  # the last is fixed there
    )
    if not classifier:
        return dict(arguments, decoder_depth=size["decoder_depth"], normalize=config["norm_pix_loss"])
    names, classes = config["id2label"], len(state["classifier.weight"])
    return dict(arguments, classes=classes, labels=[names.get(str(i), f"class {i}") for i in range(classes)])
