"""Plumbing the stages share: flags, devices and processes, signals, checkpoints. No loop."""

import argparse
import dataclasses
import inspect
import os
import signal
import sys
import zipfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)  # checkpoints of any number of processes are alike


def opt(default, help: str, least: float = float("-inf")):
    """A dataclass field that parse_config turns into a flag; `help` states the unit, `least` the smallest value."""
    return dataclasses.field(default=default, metadata={"help": help, "least": least})


def parse_config(Config, argv: list[str], text: str, presets: dict[str, dict]):
    """(preset, Config) from `[PRESET] [--flag value]...`: flag over preset over default; mistakes exit with code 2."""
    usage, raw = f"%(prog)s {'|'.join(presets)} [--flag value]...", argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(usage=usage, description=text, formatter_class=raw, allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"error: {message} (--help lists every flag)\n")
    preset, *argv = argv if argv and not argv[0].startswith("-") else [next(iter(presets)), *argv]
    if preset not in presets:
        parser.error(f"unknown preset {preset!r}: use one of {', '.join(presets)}")
    for field in dataclasses.fields(Config):
        kind = field.type.__args__[0] if type(None) in getattr(field.type, "__args__", ()) else field.type  # `X | None`
        inner = getattr(kind, "__args__", ())  # of Literal["a", "b"] and tuple[X, ...]
        how = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind}
        if inner:
            how = {"type": inner[0], "nargs": "+"} if inner[-1] is ... else {"choices": inner}
        about = f"{field.metadata['help']} (default: {presets[preset].get(field.name, field.default)})"
        flags = dict.fromkeys(("--" + field.name.replace("_", "-"), "--" + field.name))  # either spelling
        parser.add_argument(*flags, help=about.replace("%", "%%"), default=argparse.SUPPRESS, **how)
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in vars(parser.parse_args(argv)).items()}
    config = Config(**{**presets[preset], **given})
    for field in dataclasses.fields(Config):
        if isinstance(value := getattr(config, field.name), int | float) and not value >= field.metadata["least"]:
            parser.error(f"--{field.name} {value} must be at least {field.metadata['least']}")
    return preset, config


def cli(main) -> None:
    """Run a script's main; ValueErrors and OSErrors of our own files are the user's: one line, exit code 2."""
    sys.stdout.reconfigure(errors="backslashreplace")  # file names may hold anything
    try:
        return main(sys.argv[1:])
    except (ValueError, OSError) as error:
        if Path(inspect.trace()[-1].filename).resolve().parent != Path(__file__).resolve().parent:
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


def parallel(model: nn.Module, shard: bool) -> nn.Module:
    """The model as the loop calls it: a copy in each process (DDP), or with `shard` spread over all of them (FSDP2)."""
    if shard and not dist.is_initialized():
        raise ValueError("--shard spreads the model over processes: start them with torchrun")
    if shard:
        mesh = dist.init_device_mesh(next(model.parameters()).device.type, (dist.get_world_size(),))
        for part in [*(block for m in model.modules() if isinstance(m, nn.ModuleList) for block in m), model]:
            fully_shard(part, mesh=mesh)
    return model if shard or not dist.is_initialized() else nn.parallel.DistributedDataParallel(model)


def stop_signals(catch: bool) -> list[int]:
    """With `catch`, a list that SIGTERM, SIGUSR1 and one Ctrl-C go to from now on; without, they end the process."""
    came, ctrl_c = [], signal.default_int_handler
    note = lambda number, _: came.append(number) or number == signal.SIGINT and signal.signal(number, ctrl_c)
    for name in {"SIGTERM", "SIGUSR1", "SIGINT"} & set(dir(signal)):
        end = ctrl_c if name == "SIGINT" else signal.SIG_DFL
        signal.signal(getattr(signal, name), note if catch else end)
    return came


def agree(*flags: int, device: torch.device) -> list[int]:
    """The largest that any process says of each flag."""
    said = torch.tensor(flags, device=device)
    if dist.is_initialized():
        dist.all_reduce(said, dist.ReduceOp.MAX)
    return said.tolist()


def save_checkpoint(run: Path, model: nn.Module, optimizer, **state) -> None:
    """Write run/checkpoint.pt, whole at any moment; the one before stays as previous.pt. All processes must call."""
    state["model"], state["optimizer"] = get_state_dict(model, optimizer, options=WHOLE)
    if dist.is_initialized() and dist.get_rank():
        return
    path, temporary = run / "checkpoint.pt", run / "checkpoint.tmp"
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        raise ValueError(f"{path} cannot be written, those before it are kept: {error}") from error
    if path.exists():
        os.replace(path, run / "previous.pt")
    os.replace(temporary, path)


def load_checkpoint(path: str | Path, stage: str) -> dict:
    """A checkpoint of `stage`, read without running pickled code; if it is damaged or gone, previous.pt beside it."""
    path, older = Path(path), Path(path).with_name("previous.pt")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if wrong := zipfile.ZipFile(path).testzip():  # torch.load does not compare checksums
            raise ValueError(f"checksum of {wrong}")
    except Exception as error:
        why = f"{path} is not a readable checkpoint ({f'{error}'.strip()[:100]!r})"
        if path == older or not older.exists():
            raise ValueError(why) from error
        print(f"{why}: taking {older}", file=sys.stderr)
        return load_checkpoint(older, stage)
    if not isinstance(state, dict) or state.get("stage") != stage:
        raise ValueError(f"{path} is not a checkpoint of {stage}.py")
    return state


def resume(kept: dict, config: dict, may_change: set, model: nn.Module, optimizer, scaler) -> tuple[int, dict]:
    """Go on from a checkpoint: (the step it stopped at, its progress). ValueError if the recipe changed."""
    old, new = (about["stage"] | {k: about.get(k) for k in ("videos", "format")} for about in (kept["config"], config))
    if changed := [key for key, value in old.items() if key not in may_change and value != new.get(key)]:
        raise ValueError(f"--resume with another {', '.join(changed)} than before: choose another --name instead")
    set_state_dict(model, optimizer, model_state_dict=kept["model"], optim_state_dict=kept["optimizer"], options=WHOLE)
    scaler.load_state_dict(kept["scaler"] or scaler.state_dict())  # that of a scaler that is off is empty
    return kept["step"], kept["progress"]
