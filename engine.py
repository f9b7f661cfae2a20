"""Plumbing the stages share: flags, devices and processes, precision, learning rate, checkpoints, log. No loop."""

import argparse
import dataclasses
import json
import math
import os
import sys
import traceback
import types
import typing
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm


def opt(default, help: str):
    """A dataclass field that parse_config turns into a flag; `help` states the unit."""
    return dataclasses.field(default=default, metadata={"help": help})


def parse_config(Config, argv: list[str], text: str, presets: dict[str, dict] | None = None):
    """(preset, Config) from `[PRESET] [--flag value]...`: a flag for every field, over the preset, over the defaults.

    The first preset is the default one. A mistake ends the program with one line and exit code 2.
    """
    usage = f"%(prog)s {'|'.join(presets or [])} [--flag value]..."
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(usage=usage, description=text, formatter_class=raw, allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"error: {message} (--help lists every flag)\n")
    preset = next(iter(presets)) if presets else None
    if presets and argv and not argv[0].startswith("-"):
        preset, *argv = argv
        if preset not in presets:
            parser.error(f"unknown preset {preset!r}: use one of {', '.join(presets)}")
    for field in dataclasses.fields(Config):
        kind = typing.get_args(field.type)[0] if isinstance(field.type, types.UnionType) else field.type  # `X | None`
        inner = typing.get_args(kind)  # of Literal["a", "b"] and tuple[X, ...]
        how = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind}
        if inner:
            how = {"choices": inner} if typing.get_origin(kind) is typing.Literal else {"type": inner[0], "nargs": "+"}
        about = f"{field.metadata['help']} (default: {field.default})".replace("%", "%%")
        parser.add_argument("--" + field.name.replace("_", "-"), default=argparse.SUPPRESS, help=about, **how)
    dashed = [flag.replace("_", "-") if flag.startswith("--") else flag for flag in argv]
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in vars(parser.parse_args(dashed)).items()}
    return preset, Config(**{**(presets[preset] if presets else {}), **given})


def cli(main) -> None:
    """Run a script's main; a ValueError that our own files raise is a user's mistake: one line, exit code 2."""
    try:
        return main(sys.argv[1:])
    except ValueError as error:
        if Path(traceback.extract_tb(error.__traceback__)[-1].filename).parent != Path(__file__).parent:
            raise
        message = str(error)
    print(f"error: {message}", file=sys.stderr)  # out here the progress bar is closed
    sys.exit(2)


def setup(device: str) -> tuple[torch.device, int, int]:
    """(device, rank, processes) for "auto", "cpu" or "cuda"; joins torchrun's group: nccl on GPU, gloo on CPU."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "--device cuda, but torch sees no GPU: use --device cpu, or install a torch build for your GPU"
        )
    place = torch.device("cpu")
    if device != "cpu" and torch.cuda.is_available():
        place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(place)
        torch.set_float32_matmul_precision("high")
    if "RANK" not in os.environ:
        return place, 0, 1
    dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
    return place, dist.get_rank(), dist.get_world_size()


def precision_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Type of matrix products; "auto": bf16 where the hardware has it, else fp16 on GPU and float32 on CPU."""
    if precision == "fp16" and device.type == "cpu":
        raise ValueError("--precision fp16 needs a GPU: use bf16 or fp32 on CPU")
    if precision == "auto" and device.type == "cuda":
        precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    elif precision == "auto":
        cpu = getattr(torch.cpu, "get_capabilities", dict)()  # newer than torch 2.8
        precision = "bf16" if cpu.get("avx512_bf16") or cpu.get("amx_bf16") else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def split_batch(batch: int, processes: int, micro: int | None) -> tuple[int, int]:
    """Effective batch -> (videos per process and forward pass, passes per optimiser step)."""
    micro = micro or batch // processes
    if micro < 1 or batch % (micro * processes):
        raise ValueError(f"--batch {batch} must be a multiple of {processes} processes x micro batch {micro}")
    return micro, batch // (micro * processes)


def cosine_lr(step: int, total: int, warmup: int, peak: float, floor: float) -> float:
    """Learning rate of a step, as in the official code: linear from 0 to peak, both included, then half a cosine."""
    if step < warmup:
        return peak * step / max(warmup - 1, 1)
    return floor + (peak - floor) * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2


def param_groups(model: torch.nn.Module, weight_decay: float) -> list[dict]:
    """AdamW's groups: no decay for vectors (biases, LayerNorms) and the mask token, as in the official code."""
    groups = [dict(params=[], weight_decay=weight_decay), dict(params=[], weight_decay=0.0)]
    for name, parameter in model.named_parameters():
        groups[parameter.ndim == 1 or name.endswith("mask_token")]["params"].append(parameter)
    return groups


def save_checkpoint(path: Path, **state) -> None:
    """Write tensors and plain containers so that `path` is a whole file at any moment, the old one or the new."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load_checkpoint(path: str | Path, stage: str) -> dict:
    """Read a checkpoint of `stage`, never running pickled code; ValueError where it is not one."""
    if not Path(path).is_file():
        raise ValueError(f"no checkpoint at {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} is not a readable checkpoint ({str(error).splitlines()[0][:100]})") from error
    found = state.get("stage", "another program") if isinstance(state, dict) else "another program"
    if found != stage:
        raise ValueError(f"{path} is a checkpoint of {found}, this needs one of {stage}.py")
    return state


class Log:
    """log.jsonl and a progress bar, on rank 0. A resumed run drops the lines that its checkpoint does not cover."""

    def __init__(self, path: Path, start: int, total: int, on: bool):
        self.path, self.on, self.bar = path, on, tqdm(initial=start, total=total, unit="step", disable=not on)
        if on:
            path.parent.mkdir(parents=True, exist_ok=True)
            old = path.read_text().splitlines() if start and path.exists() else []
            path.write_text("".join(line + "\n" for line in old if json.loads(line).get("step", 0) <= start))

    def write(self, **values) -> None:
        """Append one JSON line; one with a step also moves the bar."""
        if self.on:
            with open(self.path, "a") as file:
                file.write(json.dumps(values) + "\n")
            self.bar.update(values.get("step", self.bar.n) - self.bar.n)
            self.bar.set_postfix({k: f"{v:.3g}" for k, v in values.items() if k != "step" and isinstance(v, float)})
