"""What surrounds a training loop: resuming, accumulation, precision, processes, log, signals.

A stage, such as pretrain.py, hands its data, model and optimizer to Run. It writes the loop itself.
"""

import hashlib
import json
import math
import os
import signal
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from lib import engine, speed
from lib.engine import opt

# What may differ on --resume. Of these, only micro changes the training: what is drawn per pass,
# such as masks, is drawn anew.
MAY_CHANGE = """data splits test_data test_splits workers micro init least clips crops validate
boxes threshold name resume device compile memory log_every save_minutes""".split()
ADVICE = "try a lower --base-lr, --clip-grad 1 or --precision fp32"


@dataclass
class StageConfig:
    """Flags of every stage that are not about the method."""

    data: str | None = opt(None, "folder of the videos")
    splits: str | None = opt(None, "folder of official split files, or a list `path [label]`")
    fold: int = opt(1, "official split, 1 to 3", 1, 3)
    missing: Literal["error", "skip"] = opt("error", "where listed videos are not there")
    workers: int = opt(2, "decoding processes per GPU; 0 decodes in the main process", 0)
    name: str | None = opt(None, "results go to runs/NAME; None: STAGE-PRESET")
    seed: int = opt(0, "of all that is random: weights, order, crops, masks, dropout", 0, 2**63)
    device: Literal["auto", "cpu", "cuda", "mps"] = opt("auto", "where to compute; mps is untested")
    precision: Literal["auto", "bf16", "fp16", "fp32"] = opt("auto", "of matrix products")


@dataclass
class RunConfig(StageConfig):
    """StageConfig, and the flags of a training."""

    resume: bool = opt(False, "continue runs/NAME")
    compile: bool = opt(False, "torch.compile the model: a minute of waiting, then faster steps")
    memory: Literal["fast", "less", "least"] = opt("fast", "activations kept, see lib/speed.py")
    log_every: int = opt(10, "steps per line of log.jsonl", 1)
    save_minutes: float = opt(10, "minutes from one checkpoint to the next")


def fit_to_set(preset: str, cfg, videos: int):
    """Recipe "own": at most all videos in a batch; unless given, epochs by --steps, and warm-up."""
    if preset != "own":
        if cfg.steps != type(cfg).steps:
            raise ValueError(f"--steps is for the recipe own: give {preset} --epochs")
        return cfg
    if videos < engine.processes():
        raise ValueError(f"{engine.processes()} processes, but {videos} videos: start fewer")
    micro = cfg.micro and min(cfg.micro, videos // engine.processes())
    share = (micro or 1) * engine.processes()  # a step is a multiple of it
    batch = max(min(cfg.batch, videos) // share, 1) * share
    epochs = cfg.epochs or math.ceil(cfg.steps / (videos // batch))
    warmup = epochs / 10 if cfg.warmup is None else cfg.warmup
    cfg = replace(cfg, micro=micro) if micro else cfg  # contrast.py has no such flag
    return replace(cfg, batch=batch, epochs=epochs, warmup=warmup)


class Run:
    """One training in runs/NAME, from its start or, with --resume, from its checkpoint.

    `stage` is the name of the script, `cfg` its hyper-parameters, `about` more for the checkpoint,
    such as the names of classes. A stage uses order, total and warmup (in steps), folder, log, and
    net: the model as the loop calls it. If the model has an attribute `more`, {name: tensor}, the
    next line of the log holds it, too.
    """

    def __init__(self, stage, name, cfg, model, optimizer, videos, device, **about):
        self.stage, self.folder, self.cfg = stage, Path("runs") / name, cfg
        self.model, self.optimizer, self.videos, self.device = model, optimizer, videos, device
        self.unreadable, self.losses = {}, []  # losses of the steps since the last line
        self.waited = self.waited_in_all = 0.0  # seconds for data; the first since the last line
        self.asked = self.stop = 0  # a signal: what this process got, what all of them act on
        self.dtype = engine.precision_dtype(cfg.precision, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        if cfg.warmup >= cfg.epochs:
            raise ValueError(f"--warmup {cfg.warmup:g} must be less than --epochs {cfg.epochs}")
        self.micro, self.accumulation = engine.split_batch(cfg.batch, cfg.micro)
        self.per_epoch = max(len(videos) // cfg.batch, 1)
        self.total, self.warmup = cfg.epochs * self.per_epoch, int(cfg.warmup * self.per_epoch)
        # --resume compares the list of videos. Folders may move, and `data.py prepare` changes
        # endings, so the names alone count. Labels count where there are classes.
        labels = videos.split.labels if "classes" in about else ()
        listed = repr(([path.stem for path in videos.split.paths], labels))
        config = dict(model=model.config, flags=asdict(cfg), videos=len(videos), **about)
        config["list of videos"] = hashlib.sha256(listed.encode()).hexdigest()[:8]
        self.config = json.loads(json.dumps(config))  # lists instead of tuples, as after loading
        if engine.rank() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            busy = f"another process trains in {self.folder}"
            self.lock = engine.lock(self.folder / "lock", busy)
        self.start = self.step = self._resume()
        how = (cfg.batch, self.micro, self.start, self.total, cfg.seed)
        self.order = engine.Order(len(videos), *how)
        if cfg.compile and cfg.memory != "fast":
            raise ValueError("--compile chooses by itself what is kept: leave out --memory")
        speed.save_memory(model, cfg.memory)
        model = torch.compile(model) if cfg.compile else model
        self.net = DistributedDataParallel(model) if dist.is_initialized() else model
        self.log = Log(self.folder, self.start, self.total, self.config)
        self.begin = self.saved = self.written = time.time()
        if self.start == self.total:
            self.say(f"{self.folder} is finished: all {self.total} steps are done")
            return
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        begin = f"going on after step {self.start}" if self.start else "starting at step 0"
        self.say(
            f"{self.folder}: {begin} of {self.total} ({cfg.epochs} epochs, {self.warmup} steps of "
            f"warm-up), peak lr {cfg.base_lr * cfg.batch / 256:.3g}; {len(videos)} videos\n"
            f"batch {cfg.batch} = {engine.processes()} processes x {self.accumulation} passes x "
            f"{self.micro} videos, {cfg.repeats} clips of each; "
            f"{millions:.1f} M parameters; {self.dtype} on {device}"
        )

    @staticmethod
    def say(text: str) -> None:
        """Print in one process only."""
        if engine.rank() == 0:
            print(text, flush=True)

    def _resume(self) -> int:
        """Load the run's checkpoint where there is one; returns the step to start from."""
        path = self.folder / "checkpoint.pt"
        if not path.exists():
            return 0
        if not self.cfg.resume:
            raise ValueError(f"{self.folder} holds a run: --resume it, or choose another --name")
        state = engine.load_checkpoint(path, self.stage)
        # Both have a key "model": a name in the flags, sizes in the config. "the" tells them apart.
        flat = lambda c: c["flags"] | {f"the {key}": c[key] for key in c.keys() - {"flags"}}
        before, now = flat(state["config"]), flat(self.config)
        changed = [key for key in before if before[key] != now.get(key) and key not in MAY_CHANGE]
        if changed:
            was = "; ".join(f"{key} was {str(before[key])[:40]}" for key in changed)
            raise ValueError(
                f"--resume with other flags or videos ({was}): take these, or another --name"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:  # empty, unless the run was in fp16
            self.scaler.load_state_dict(state["scaler"])
        return state["step"]

    def steps(self):
        """The numbers of the steps to do. SIGTERM, SIGUSR1 and Ctrl-C end them after a whole step.

        Several processes end together at the next log line, where they talk to each other anyway.
        """
        numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
        before = {number: signal.signal(number, self._note_signal) for number in numbers}
        try:
            for step in range(self.start, self.total):
                self.step = step
                yield step
                if self.stop:
                    break
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note_signal(self, number: int, _) -> None:
        self.asked = number
        if number == signal.SIGINT:  # a second Ctrl-C ends at once
            signal.signal(number, signal.default_int_handler)
        if engine.rank() == 0:
            when = "this step" if engine.processes() == 1 else "the next line of the log"
            print(f"\nstopping after {when}", file=sys.stderr)

    def passes(self, batches):
        """Gradient accumulation: (clips, labels) on the device, for each forward pass of a step."""
        self.losses.append(0.0)  # that of this step
        for number in range(self.accumulation):
            self.pass_number = number
            begin = time.time()
            clips, labels, unreadable = next(batches)
            self.waited += time.time() - begin
            for error in {*unreadable.values()} - {*self.unreadable.values()}:
                tqdm.write(f"left out, unreadable: {error}", file=sys.stderr)
            self.unreadable |= unreadable
            if len(self.unreadable) > len(self.videos) / 10:
                advice = "over a tenth of the videos cannot be read, see `python data.py check`"
                raise ValueError(f"{advice}: {next(iter(self.unreadable.values()))}")
            # DDP averages the gradients of the processes in the last pass only.
            self.net.require_backward_grad_sync = number == self.accumulation - 1
            yield tuple(x.to(self.device, non_blocking=True) for x in (clips, labels))

    def seed(self, use: str) -> int:
        """A seed for this pass. It is the same however the passes are spread over processes."""
        number = engine.rank() * self.accumulation + self.pass_number
        return engine.derive_seed(use, self.cfg.seed, self.step, number)

    def autocast(self):
        """The context of the forward pass: matrix products in the type of --precision."""
        return engine.autocast(self.device, self.dtype)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of this pass to those of the step."""
        loss = loss / self.accumulation
        self.scaler.scale(loss).backward()
        # Losses stay on the device until the log needs them, so that the CPU need not wait.
        self.losses[-1] = self.losses[-1] + loss.detach()

    def update(self, lr: float) -> bool:
        """The optimizer's step; a log line and a checkpoint if it is time. True after a checkpoint.

        A group of the optimizer may have a "scale", a factor on its learning rate.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("scale", 1.0)
        self.scaler.unscale_(self.optimizer)
        if self.cfg.clip_grad:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.cfg.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.log.bar.update()

        done = self.step + 1
        due = done == self.total or time.time() - self.saved > 60 * self.cfg.save_minutes
        line = done == self.total or done % self.cfg.log_every == 0
        if engine.processes() == 1:
            line = line or due or self.asked
        if line:
            self._log_line(done, lr)  # it ends the run where a loss is not finite, before a save
        save = (line and due) or self.stop
        if not save or engine.rank() > 0:
            return False
        if not torch.stack([p.isfinite().all() for p in self.model.parameters()]).all():
            problem = f"the weights are not finite after step {done} (lr {lr:.3g})"
            raise ValueError(f"{problem}: {ADVICE}")
        about = dict(stage=self.stage, config=self.config, step=done, steps=self.total)
        parts = {x: getattr(self, x).state_dict() for x in ("model", "optimizer", "scaler")}
        engine.save_checkpoint(self.folder / "checkpoint.pt", **about, **parts)
        self.saved = time.time()
        return True

    def _log_line(self, done: int, lr: float) -> None:
        """Write about the steps since the last line. ValueError where a loss is not finite."""
        # Processes talk here only: of losses, broken videos, and whether one was asked to stop.
        mine = torch.stack(self.losses).tolist(), self.asked, self.unreadable
        losses, asked, unreadable = zip(*engine.of_all(mine), strict=True)
        losses = torch.tensor(losses).mean(dim=0).tolist()
        self.losses, self.stop = [], max(asked)
        self.unreadable = {index: error for part in unreadable for index, error in part.items()}
        for step, loss in enumerate(losses, done - len(losses)):
            if not math.isfinite(loss):
                names = [str(self.videos.split.paths[i]) for i, _ in self.order.step_keys(step)]
                where = f"step {step} (lr {lr:.3g})"
                videos = ", ".join(names[:8])
                raise ValueError(f"the loss is {loss} at {where}: {ADVICE}; videos: {videos}")
        loss, clips = sum(losses) / len(losses), len(losses) * self.cfg.batch * self.cfg.repeats
        more = {key: float(value) for key, value in getattr(self.model, "more", {}).items()}
        seconds = max(time.time() - self.written, 1e-9)
        speeds = dict(clips_per_s=clips / seconds, waiting_for_data=self.waited / seconds)
        values = dict(step=done, epoch=done / self.per_epoch, loss=loss, lr=lr, **more)
        self.log.write(**values, unreadable=len(self.unreadable), **speeds)
        self.log.bar.set_postfix(loss=f"{loss:.4f}", lr=f"{lr:.2e}", refresh=False)
        self.waited_in_all += self.waited
        self.written, self.waited = time.time(), 0.0

    def close(self) -> None:
        """Say what was left out and what took the time. After a signal, end the program."""
        self.log.bar.close()
        if self.start == self.total:  # it was finished before
            return
        share = self.waited_in_all / (time.time() - self.begin)
        if share > 0.2:
            cores = f"now {self.cfg.workers}; {os.cpu_count()} cores here"
            self.say(f"take more --workers ({cores}), or see `python data.py prepare`")
        waited = f"{share:.0%} of the time was spent waiting for videos"
        self.say(f"{len(self.unreadable)} unreadable videos; {waited}")
        if self.stop:
            done = f"after step {self.step + 1} of {self.total}"
            name = signal.Signals(self.stop).name
            self.say(f"stopped by {name} {done}: the same command with --resume goes on")
            sys.exit(128 + self.stop)  # as a shell has it


@torch.no_grad()
def loss_of_constant(model, video: Tensor) -> float:
    """The loss of predicting the mean of all targets everywhere: training has to beat it."""
    n = torch.arange(len(model.encoder.pos_embed), device=video.device)
    target = model.target(video, n.expand(len(video), -1))
    return model.loss(target.mean().expand_as(target), target).item()


class Log:
    """runs/NAME/log.jsonl and a progress bar, in process 0. A resumed run drops later lines."""

    def __init__(self, folder: Path, start: int, total: int, config: dict):
        self.path = folder / "log.jsonl"
        self.bar = engine.progress("training", total, initial=start, unit="step")
        if engine.rank() == 0:
            old = self.path.read_text().splitlines() if start and self.path.exists() else []
            kept = []
            for line in old:
                with suppress(ValueError):  # the last may have been cut short
                    if json.loads(line).get("step", 0) <= start:
                        kept.append(f"{line}\n")
            engine.write_whole(self.path, "".join(kept))
        if not start:
            self.write(config=config, torch=torch.__version__)

    def write(self, **values) -> None:
        """Append one JSON line."""
        if engine.rank() == 0:
            with open(self.path, "a") as file:
                file.write(json.dumps(values) + "\n")
