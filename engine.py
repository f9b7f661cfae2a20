"""Plumbing the stages share: flags, devices and processes, precision, learning rate, checkpoints, log. No loop."""

import argparse
import dataclasses
import json
import math
import os
import sys
import traceback
import typing
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm


def opt(default, help: str, least: float = -math.inf):
    """A dataclass field that parse_config turns into a flag; `help` states the unit, `least` the smallest value."""
    return dataclasses.field(default=default, metadata={"help": help, "least": least})


def parse_config(Config, argv: list[str], text: str, presets: dict[str, dict] | None = None):
    """(preset, Config) from `[PRESET] [--flag value]...`: flag over preset over default; mistakes exit with code 2."""
    usage, raw = f"%(prog)s {'|'.join(presets or [])} [--flag value]...", argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(usage=usage, description=text, formatter_class=raw, allow_abbrev=False)
    parser.argument_default = argparse.SUPPRESS  # flags that are not given stay out of the result
    parser.error = lambda message: parser.exit(2, f"error: {message} (--help lists every flag)\n")
    presets = presets or {"": {}}
    preset, *argv = argv if argv and not argv[0].startswith("-") else [next(iter(presets)), *argv]
    if preset not in presets:
        parser.error(f"unknown preset {preset!r}: use one of {', '.join(presets)}")
    for field in dataclasses.fields(Config):
        kind = typing.get_args(field.type)[0] if type(None) in typing.get_args(field.type) else field.type  # `X | None`
        inner = typing.get_args(kind)  # of Literal["a", "b"] and tuple[X, ...]
        how = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind}
        if inner:
            how = {"choices": inner} if typing.get_origin(kind) is typing.Literal else {"type": inner[0], "nargs": "+"}
        about = f"{field.metadata['help']} (default: {presets[preset].get(field.name, field.default)})"
        flags = dict.fromkeys(("--" + field.name.replace("_", "-"), "--" + field.name))  # either spelling
        parser.add_argument(*flags, help=about.replace("%", "%%"), **how)
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in vars(parser.parse_args(argv)).items()}
    config = Config(**{**presets[preset], **given})
    for field in dataclasses.fields(Config):
        value, least = getattr(config, field.name), field.metadata["least"]
        if isinstance(value, int | float) and not value >= least:
            parser.error(f"--{field.name} {value} must be at least {least}")
    return preset, config


def cli(main) -> None:
    """Run a script's main; a ValueError that our own files raise is a user's mistake: one line, exit code 2."""
    try:
        return main(sys.argv[1:])
    except ValueError as error:
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
        if raised_in.parent != Path(__file__).resolve().parent:
            raise
        message = str(error)
    print(f"error: {message}", file=sys.stderr)  # out here the progress bar is closed
    sys.exit(2)


def setup(device: str) -> tuple[torch.device, int, int]:
    """(device, rank, processes) for "auto", "cpu" or "cuda"; joins torchrun's group: nccl on GPU, gloo on CPU."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda, but torch sees no GPU: use --device cpu, or install torch for your GPU")
    cuda = device != "cpu" and torch.cuda.is_available()
    place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(place)
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if cuda else "gloo")
    return place, int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def precision_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Type of matrix products; "auto": bf16 where the hardware has it, else fp16 on GPU and float32 on CPU."""
    if precision == "auto":
        cuda, cpu = device.type == "cuda", getattr(torch.cpu, "get_capabilities", dict)()  # newer than torch 2.8
        on_cpu = cpu.get("avx512_bf16") or cpu.get("amx_bf16")
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False) if cuda else on_cpu
        precision = "bf16" if bf16 else "fp16" if cuda else "fp32"
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


def save_checkpoint(path: Path, **state) -> None:
    """Write tensors and plain containers so that `path` is a whole file at any moment, the old one or the new."""
    with open(temporary := path.with_name(path.name + ".tmp"), "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load_checkpoint(path: str | Path, stage: str) -> dict:
    """Read a checkpoint of `stage`, never running pickled code; ValueError where it is not one."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} is not a readable checkpoint ({f'{error}'.strip()[:100]!r})") from error
    if not isinstance(state, dict) or state.get("stage") != stage:
        raise ValueError(f"{path} is not a checkpoint of {stage}.py")
    return state


def resume(state: dict, config: dict, may_change: set, **parts) -> int:
    """Load model, optimizer and scaler from a checkpoint; the step it stopped at. ValueError if the recipe changed."""
    old, new = (dict(about["stage"], videos=about.get("videos")) for about in (state["config"], config))
    if changed := [key for key, value in old.items() if key not in may_change and value != new.get(key)]:
        raise ValueError(f"--resume with another {', '.join(changed)} than before: choose another --name instead")
    for name, part in parts.items():
        if state[name]:  # that of a scaler that is off is empty
            part.load_state_dict(state[name])
    return state["step"]


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
