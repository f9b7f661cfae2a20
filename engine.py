"""Plumbing the stages share: flags, device and processes, precision, learning rate, checkpoints, log. No loop."""

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


def parse_config(Config, argv: list[str], presets: dict[str, dict] | None = None, description: str | None = None):
    """(preset name, Config) from the command line: every field is a flag of its name, which wins over the preset's value.

    The first preset is the default. Unknown flags, values and presets end the program with one line and exit code 2.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)  # fmt: skip
    parser.error = lambda message: parser.exit(2, f"error: {message} (--help lists every flag)\n")
    if presets:
        parser.add_argument("preset", nargs="?", choices=presets, default=next(iter(presets)), help="recipe of a data set")
    hints = typing.get_type_hints(Config)
    for field in dataclasses.fields(Config):
        kind, extra = hints[field.name], {}
        if isinstance(kind, types.UnionType):  # X | None
            kind = typing.get_args(kind)[0]
        if typing.get_origin(kind) is tuple:
            kind, extra = typing.get_args(kind)[0], {"nargs": "+"}
        elif typing.get_origin(kind) is typing.Literal:
            kind, extra = str, {"choices": typing.get_args(kind)}
        elif kind is bool:
            kind, extra = None, {"action": argparse.BooleanOptionalAction}
        if kind:
            extra["type"] = kind
        text = f"{field.metadata['help']} (default: {field.default})".replace("%", "%%")
        parser.add_argument("--" + field.name.replace("_", "-"), default=argparse.SUPPRESS, help=text, **extra)
    dashed = [flag.replace("_", "-") if flag.startswith("--") else flag for flag in argv]
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in vars(parser.parse_args(dashed)).items()}
    preset = given.pop("preset", None)
    return preset, Config(**{**(presets or {}).get(preset, {}), **given})


def cli(main) -> None:
    """Run a script's main. A ValueError raised by this project's own files is a user's mistake: one line, exit code 2."""
    try:
        main(sys.argv[1:])
    except ValueError as error:
        if Path(traceback.extract_tb(error.__traceback__)[-1].filename).parent != Path(__file__).parent:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


@dataclasses.dataclass
class World:
    """Where this process runs: its rank among `size` processes, and its device."""

    rank: int
    size: int
    device: torch.device


def setup(device: str) -> World:
    """Device ("auto", "cpu", "cuda"), and under torchrun the process group: nccl on GPUs, gloo on CPU."""
    cuda = torch.cuda.is_available() if device == "auto" else device == "cuda"
    if cuda and not torch.cuda.is_available():
        raise ValueError("--device cuda, but torch sees no GPU: use --device cpu, or install a torch build for your GPU")
    place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(place)
        torch.set_float32_matmul_precision("high")
    if "RANK" not in os.environ:
        return World(0, 1, place)
    dist.init_process_group("nccl" if cuda else "gloo")
    return World(dist.get_rank(), dist.get_world_size(), place)


def barrier() -> None:
    """Wait for all processes."""
    if dist.is_initialized():
        dist.barrier()


def teardown() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def precision_dtype(precision: str, device: torch.device) -> torch.dtype:
    """"fp32", "bf16", "fp16", or "auto": bf16 where the hardware computes in it, else fp16 on GPU, float32 on CPU."""
    if precision == "auto" and device.type == "cuda":
        precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    elif precision == "auto":
        cpu = getattr(torch.cpu, "get_capabilities", dict)()  # torch >= 2.9
        precision = "bf16" if any(cpu.get(flag) for flag in ("avx512_bf16", "amx_bf16")) else "fp32"
    elif precision == "fp16" and device.type == "cpu":
        raise ValueError("--precision fp16 needs a GPU: use bf16 or fp32 on CPU")
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def split_batch(batch: int, world_size: int, micro: int | None) -> tuple[int, int]:
    """Effective batch -> (clips per process and forward pass, passes per optimiser step)."""
    micro = micro or batch // world_size
    if micro < 1 or batch % (micro * world_size):
        raise ValueError(f"batch {batch} is not processes ({world_size}) x micro batch ({micro}) x a whole number: change --batch or --micro")
    return micro, batch // (micro * world_size)


def cosine_lr(step: int, total: int, warmup: int, peak: float, floor: float) -> float:
    """Learning rate of a step: linear warm-up from 0 to peak, both included, then half a cosine down to floor.

    The official schedule: warm-up step i has peak * i/(warmup-1); then floor + (peak-floor)(1+cos(pi*i/rest))/2.
    """
    if step < warmup:
        return peak * step / max(warmup - 1, 1)
    return floor + (peak - floor) * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1))) / 2


def param_groups(model: torch.nn.Module, weight_decay: float) -> list[dict]:
    """Two AdamW groups; no decay for vectors (biases, LayerNorm) and the mask token, as in the official code."""
    decay, plain = [], []
    for name, parameter in model.named_parameters():
        (plain if parameter.ndim == 1 or name.endswith("mask_token") else decay).append(parameter)
    return [dict(params=decay, weight_decay=weight_decay), dict(params=plain, weight_decay=0.0)]


def save_checkpoint(path: Path, state: dict) -> None:
    """Write `state` (tensors and plain containers) so that `path` is always a whole file, old or new."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load_checkpoint(path, stage: str | None = None) -> dict:
    """Read a checkpoint of ours without executing pickled code; ValueError if it is none, or not of `stage`."""
    if not Path(path).is_file():
        raise ValueError(f"no checkpoint at {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} is not a readable checkpoint ({str(error).splitlines()[0][:100]})") from error
    if not isinstance(state, dict) or not {"model", "config", "stage"} <= state.keys():
        raise ValueError(f"{path} is a torch file, but not a checkpoint of this project (no model, config, stage)")
    if stage and state["stage"] != stage:
        raise ValueError(f"{path} comes from stage {state['stage']!r}; this needs one of {stage!r}")
    return state


def same_recipe(old: dict, new: dict) -> None:
    """ValueError where a resumed run's flags would change what is trained; those below only change how it is run."""
    free = {"name", "resume", "data", "splits", "workers", "micro", "device", "precision", "compile", "checkpointing", "log_every", "save_minutes"}
    changed = [f"{k} {old.get(k)} -> {new[k]}" for k in new if k not in free and old.get(k) != new[k]]
    if changed:
        raise ValueError(f"--resume with another recipe ({', '.join(changed)}): drop these flags, or choose another --name")


def all_reduce_mean(value: torch.Tensor) -> torch.Tensor:
    """Mean of a tensor over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return value


class Log:
    """`log.jsonl` plus a progress bar. A resumed run first drops the lines its checkpoint does not cover."""

    def __init__(self, path: Path, start: int, total: int, on: bool):
        self.path, self.on, self.bar = path, on, tqdm(initial=start, total=total, unit="step", disable=not on)
        if on:
            path.parent.mkdir(parents=True, exist_ok=True)
            old = [json.loads(line) for line in path.read_text().splitlines()] if start and path.exists() else []
            path.write_text("".join(json.dumps(line) + "\n" for line in old if line.get("step", 0) <= start))

    def write(self, **values) -> None:
        """Append one JSON line; steps also move the bar and show the numbers behind it."""
        if self.on:
            with open(self.path, "a") as file:
                file.write(json.dumps(values) + "\n")
            if "step" in values:
                self.bar.update(values["step"] - self.bar.n)
                self.bar.set_postfix({k: f"{v:.3g}" for k, v in values.items() if k not in ("step", "epoch")})
