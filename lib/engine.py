"""What all stages share: flags, processes, precision, schedule, order of videos, checkpoints."""

import argparse
import dataclasses
import fcntl
import inspect
import math
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

# ------------------------------------------------------------------------------------------ flags


def opt(default, help: str, least: float = -math.inf, most: float = math.inf):
    """A dataclass field that parse_config turns into a flag.

    `help` states the unit, `least` and `most` the smallest and largest value allowed.
    """
    return dataclasses.field(default=default, metadata=dict(help=help, least=least, most=most))


def parse_config(Config, argv: list[str], text: str, presets: dict[str, dict]):
    """(preset, Config) from `[PRESET] [--flag value]...`: flags beat the preset, it beats defaults.

    Without a preset word it is the first preset, or with --data or --test-data "own" where there is
    one. Mistakes end the program with one line and exit code 2.
    """
    usage = f"%(prog)s {'|'.join(presets)} [--flag value]..."
    parser = argparse.ArgumentParser(usage=usage, description=text, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.error = lambda message: parser.exit(2, f"error: {message} (--help lists every flag)\n")
    preset = next(iter(presets))
    if argv and not argv[0].startswith("-"):
        preset, *argv = argv
    elif "own" in presets and {word.split("=")[0] for word in argv} & {"--data", "--test-data"}:
        preset = "own"
    if preset not in presets:
        known = ", ".join(filter(None, presets)) or "none: a word needs a flag before it"
        parser.error(f"unknown preset {preset!r}: use one of {known}")
    flags = {f"--{field.name.replace('_', '-')}": field for field in dataclasses.fields(Config)}
    for flag, field in flags.items():
        default = presets[preset].get(field.name, field.default)
        about = f"{field.metadata['help']} (default: {default})".replace("%", "%%")
        parser.add_argument(flag, help=about, default=argparse.SUPPRESS, **_argument(field.type))
    given = vars(parser.parse_args(argv))
    given = {key: tuple(x) if isinstance(x, list) else x for key, x in given.items()}
    config = Config(**{**presets[preset], **given})
    for flag, field in flags.items():
        value, (_, least, most) = getattr(config, field.name), field.metadata.values()
        if isinstance(value, int | float) and not least <= value <= most:
            allowed = f"at least {least}" if most == math.inf else f"from {least} to {most}"
            parser.error(f"{flag} {value} must be {allowed}")
    if name := getattr(config, "name", None):
        parts = Path(name).parts
        if Path(name).is_absolute() or ".." in parts or not parts:
            parser.error(f"--name {name} is no folder within runs/")
    return preset, config


def _argument(kind) -> dict:
    """How argparse reads a field: bool, int, X | None, Literal["a", "b"] or tuple[X, ...]."""
    inner = getattr(kind, "__args__", ())
    if type(None) in inner:
        return _argument(inner[0])
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if inner and inner[-1] is ...:
        return {"type": inner[0], "nargs": "+"}
    return {"choices": inner} if inner else {"type": kind}


def cli(main) -> None:
    """Run a script's main. An OSError, or a ValueError of our own files, ends it with one line."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # names that are no text; a notebook escapes by itself
            stream.reconfigure(errors="backslashreplace")
    try:
        return main(sys.argv[1:])
    except (ValueError, OSError) as error:
        project = Path(__file__).resolve().parents[1]
        raised_in = Path(inspect.trace()[-1].filename).resolve()
        ours = raised_in.is_relative_to(project) and "site-packages" not in raised_in.parts
        if not ours and not isinstance(error, OSError):
            raise
        message = str(error)
    except KeyboardInterrupt:
        sys.exit(130)  # no traceback: nothing is wrong
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):  # torch says so wherever the program is then
            raise
        message = f"{' '.join(str(error).split())}: fewer --workers, then continue with --resume"
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    print(f"error: {message}", file=sys.stderr)  # out here the progress bar is closed
    sys.exit(2)


def progress(words: str, total: int, iterable=None, **more) -> tqdm:
    """The progress bar of process 0; `more` is for tqdm. In a file it is a line per minute."""
    if not sys.stderr.isatty() and "ipykernel" not in sys.modules:  # nohup, Slurm
        line = "{desc}{n_fmt} of {total_fmt}, {elapsed} gone, {remaining} left{postfix}\n"
        more |= dict(bar_format=line, mininterval=60, maxinterval=60, leave=True)
    return tqdm(iterable, f"{words}: ", total, disable=rank() > 0, **more)


# -------------------------------------------------------------------------- devices and processes


def setup(device: str) -> torch.device:
    """The device for "auto" (cuda or cpu), "cpu", "cuda", "mps". Joins torchrun's processes."""
    there = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available())
    if not there.get(device, True):
        raise ValueError(f"--device {device}, but torch sees no such GPU: use --device cpu")
    cuda = device in ("auto", "cuda") and there["cuda"]
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if cuda else "gloo")
    if not cuda:
        return torch.device("mps" if device == "mps" else "cpu")
    place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(place)
    return place


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def processes() -> int:
    """How many processes work together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def of_all(mine) -> list:
    """What each process has, in their order: plain objects. All processes must call it together."""
    if processes() == 1:
        return [mine]
    found = [None] * processes()
    dist.all_gather_object(found, mine)
    return found


def in_first_process(work, *args) -> None:
    """work(*args) in process 0, while the others wait: for files that all of them read."""
    if rank() == 0:
        work(*args)
    if dist.is_initialized():
        dist.barrier()


def precision_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Type of matrix products. "auto": bf16 if in hardware, else fp16 (CUDA) or fp32 (others)."""
    if precision == "auto" and device.type == "cuda":
        precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    elif precision == "auto":  # with mps, too: no processor of Apple's has these
        known = getattr(torch.cpu, "get_capabilities", dict)()  # newer than torch 2.8
        precision = "bf16" if known.get("avx512_bf16") or known.get("amx_bf16") else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def autocast(device: torch.device, dtype: torch.dtype):
    """The context in which matrix products have this type."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


# ----------------------------------------------------------------------------- schedule and order


def cosine_lr(step: int, steps: int, warmup: int, peak: float, last: float) -> float:
    """Linear from 0 to `peak`, both included, for `warmup` steps, then half a cosine (official)."""
    if step < warmup:
        return peak * step / max(warmup - 1, 1)
    progress = (step - warmup) / (steps - warmup)
    return last + (peak - last) * (1 + math.cos(math.pi * progress)) / 2


def split_batch(batch: int, micro: int | None) -> tuple[int, int]:
    """Effective batch -> (videos per process and forward pass, gradient accumulation passes)."""
    micro = micro or batch // processes()
    if micro < 1 or batch % (micro * processes()):
        parts = f"{processes()} processes x --micro {micro}"
        raise ValueError(f"--batch {batch} must be a multiple of {parts}")
    return micro, batch // (micro * processes())


def derive_seed(*key: int | str) -> int:
    """A seed that depends on all parts of a key, such as ("mask", seed, step).

    It is a pure function. So no state of random generators has to be saved or shared.
    """
    numbers = [x if isinstance(x, int) else int.from_bytes(os.fsencode(x), "big") for x in key]
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


class Order:
    """Batch sampler: the keys (index, seed) of each micro-batch of this process, from `start` on.

    Each epoch is a new permutation of the videos, cut into effective batches; the rest is dropped.
    Each process takes its share of each batch. All depends on (seed, epoch, position) alone. So a
    run can stop at any step and go on with another number of processes.
    """

    def __init__(self, videos: int, batch: int, micro: int, start: int, steps: int, seed: int):
        if batch > videos:
            raise ValueError(f"--batch {batch} is larger than the {videos} videos: lower it")
        self.videos, self.batch, self.micro = videos, batch, micro
        self.start, self.steps, self.seed = start, steps, seed

    def step_keys(self, step: int) -> list[tuple[int, int]]:
        """The keys of all videos of a step, those of all processes."""
        epoch, number = divmod(step, self.videos // self.batch)
        generator = torch.Generator().manual_seed(derive_seed("order", self.seed, epoch))
        order = torch.randperm(self.videos, generator=generator)
        places = range(number * self.batch, (number + 1) * self.batch)
        return [(int(order[i]), derive_seed("video", self.seed, epoch, i)) for i in places]

    def __iter__(self):
        share = self.batch // processes()
        for step in range(self.start, self.steps):
            mine = self.step_keys(step)[rank() * share :][:share]
            for i in range(0, share, self.micro):
                yield mine[i : i + self.micro]


# ------------------------------------------------------------------------------------------ files


def lock(path: str | Path, error: str):
    """Lock a file until what is returned is closed. ValueError(error) while another process has it.

    Processes that this one starts do not inherit it: loader workers may outlive a killed process.
    """
    file = open(path, "a")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as busy:
        raise ValueError(error) from busy
    return file


def write_whole(path: str | Path, text: str) -> None:
    """Write a text file that others see whole or not at all."""
    part = Path(f"{path}.part")
    part.write_text(text, encoding="utf-8", errors="surrogateescape")
    os.replace(part, path)


def save_checkpoint(path: str | Path, **content) -> None:
    """Write a checkpoint that is whole at any moment: beside it, onto the disk, then renamed."""
    part = Path(f"{path}.part")
    try:
        with open(part, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:
        part.unlink(missing_ok=True)
        raise ValueError(f"{path} cannot be written, the last one is kept: {error}") from error


def load_checkpoint(path: str | Path, stage: str) -> dict:
    """A checkpoint of `stage`. Nothing pickled in it is run. ValueError for any other file."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = " ".join(str(error).split())[:100]
        advice = "remove it to start anew"
        raise ValueError(f"{path} is not a readable checkpoint ({reason}): {advice}") from error
    if not isinstance(state, dict) or state.get("stage") != stage:
        raise ValueError(f"{path} is not a checkpoint of {stage}.py")
    return state
