"""Pre-train VideoMAE: hide most of a clip with a tube mask, rebuild it (paper sections 3.3 and 4.1).

    python pretrain.py                                             # toy data, 2 CPU cores, minutes
    python pretrain.py ucf101 --data ~/UCF-101 --splits ~/ucfTrainTestlist --micro 32          # one GPU
    torchrun --nproc_per_node 8 pretrain.py hmdb51 --data ~/hmdb51 --splits ~/testTrainMulti_7030_splits
    python pretrain.py --data FOLDER --epochs 500 --batch 4        # any folder of videos, toy model and recipe

Leaves runs/NAME/ with checkpoint.pt, log.jsonl, loss.png and reconstruction.png; --resume goes on where it stopped.
Expect: a loss that starts near the printed "predict nothing" level (about 1 for normalised cubes), hardly moves for a
while, then falls and goes on falling slowly for as long as you train.
"""

import contextlib
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch.nn.parallel import DistributedDataParallel

import visualize
from data import Order, Videos, derive_seed, make_loader, make_toy, read_split, sample_clip, train_transform
from engine import (
    Log, all_reduce_mean, barrier, cli, cosine_lr, load_checkpoint, opt, param_groups, parse_config, precision_dtype,
    same_recipe, save_checkpoint, setup, split_batch, teardown,
)  # fmt: skip
from masking import MASKS
from model import VideoMAE


@dataclass
class Config:
    # data
    data: str | None = opt(None, "folder of the videos")
    splits: str | None = opt(None, "folder of official split files, or a list of lines `path [label]`")
    fold: int = opt(1, "official split, 1 to 3")
    frames: int = opt(16, "frames of a clip the encoder sees")
    stride: int = opt(4, "frames from one frame of a clip to the next")
    resolution: int = opt(224, "height and width of a clip, pixels")
    flip: bool = opt(False, "mirror every other clip; never where left and right are classes")
    repeats: int = opt(1, "clips cut from each decoded video; multiplies a step's clips, not its learning rate")
    workers: int = opt(2, "decoding processes per GPU; 0 decodes in the main process")
    # model
    size: Literal["toy", "tiny", "small", "base", "large", "huge"] = opt("base", "encoder and decoder width and depth")
    cube: tuple[int, ...] = opt((2, 16, 16), "frames, rows and columns of a token")
    decoder_depth: int | None = opt(None, "decoder blocks; None: the size's own, 4 up to base, else 12")
    target: Literal["clip", "center", "double"] = opt("clip", "what is predicted, paper Table 1c")
    normalize: bool = opt(True, "predict cubes normalised to mean 0, variance 1; off: pixels")
    loss: Literal["mse", "l1", "smooth_l1"] = opt("mse", "paper Table 1f")
    mask: Literal["tube", "random", "frame"] = opt("tube", "paper Table 1b")
    ratio: float = opt(0.9, "share of the tokens that is hidden")
    # optimisation
    epochs: int = opt(800, "passes over the videos")
    batch: int = opt(1024, "effective batch: videos per optimiser step over all GPUs and accumulation passes")
    micro: int | None = opt(None, "videos per GPU and forward pass; None: all of the GPU's share at once")
    base_lr: float = opt(1.5e-4, "learning rate at batch 256; the peak is base_lr * batch / 256")
    min_lr: float = opt(1e-5, "last learning rate, scaled like base_lr")
    warmup: float = opt(40, "epochs of linear warm-up")
    weight_decay: float = opt(0.05, "AdamW's; none on biases, norms and the mask token")
    beta2: float = opt(0.95, "AdamW's second beta; the first is 0.9")
    clip_grad: float | None = opt(None, "largest gradient norm; None: no clipping")
    # run
    name: str | None = opt(None, "results go to runs/NAME; None: pretrain-PRESET")
    seed: int = opt(0, "the only source of randomness: order, crops, masks, weights")
    resume: bool = opt(False, "continue runs/NAME")
    device: Literal["auto", "cpu", "cuda"] = opt("auto", "where to compute")
    precision: Literal["auto", "bf16", "fp16", "fp32"] = opt("auto", "of matrix products; auto: bf16 where there is hardware")
    compile: bool = opt(False, "torch.compile the model: a minute of waiting, then faster steps")
    checkpointing: bool = opt(False, "recompute activations: less memory, a third more time")
    log_every: int = opt(10, "steps from one line of log.jsonl to the next")
    save_minutes: float = opt(10, "minutes from one checkpoint and loss curve to the next")


TOY = "datasets/toy"  # made on first use
# Paper Table 9, section 4.2 and Appendix B; AdamW's betas, warm-up and min_lr of ucf101: official script; of hmdb51: taken over
# from ucf101, as nothing is published. Batch: videos per step. Flip on k400 is the paper's; the official code never flips.
PRESETS = {
    "toy": dict(data=TOY, frames=8, stride=2, resolution=64, size="toy", cube=(2, 8, 8), ratio=0.75, epochs=60, batch=32, base_lr=8e-3, warmup=3, repeats=2),  # ours
    "ucf101": dict(stride=4, ratio=0.75, epochs=3200, batch=192, base_lr=3e-4),
    "hmdb51": dict(stride=2, ratio=0.75, epochs=4800, batch=192, base_lr=3e-4),
    "ssv2": dict(stride=2, ratio=0.9, epochs=800, batch=1024, base_lr=1.5e-4),
    "k400": dict(stride=4, ratio=0.9, epochs=800, batch=1024, base_lr=1.5e-4, flip=True),
}  # fmt: skip


def main(argv: list[str]) -> None:
    preset, cfg = parse_config(Config, argv, PRESETS, __doc__)
    world = setup(cfg.device)
    device, main_rank = world.device, world.rank == 0
    run = Path("runs") / (cfg.name or f"pretrain-{preset}")

    # Data: uint8 clips, in an order that depends on the seed alone.
    if cfg.data is None:
        raise ValueError(f"--data is missing: the folder with the videos of {preset}")
    if cfg.data == TOY and main_rank:
        make_toy(TOY)
    barrier()
    split = read_split(cfg.data, cfg.splits, cfg.fold)
    span = 2 if cfg.target == "double" else 1  # target "double": twice the frames at half the stride
    if cfg.stride % span or cfg.target == "center" and cfg.mask != "tube":
        raise ValueError('--target center needs --mask tube, --target double an even --stride')
    videos = Videos(
        split,
        lambda total: sample_clip(total, cfg.frames * span, cfg.stride // span),
        train_transform(cfg.resolution, cfg.flip),
        cfg.repeats,
    )
    micro, passes = split_batch(cfg.batch, world.size, cfg.micro)
    per_epoch = len(videos) // cfg.batch
    steps, warmup = cfg.epochs * per_epoch, int(cfg.warmup * per_epoch)
    peak, floor = cfg.base_lr * cfg.batch / 256, cfg.min_lr * cfg.batch / 256

    # Model and optimiser.
    torch.manual_seed(cfg.seed)
    video_size = (cfg.frames, cfg.resolution, cfg.resolution)
    model = VideoMAE(cfg.size, video_size, cfg.cube, cfg.decoder_depth, cfg.target, cfg.normalize, cfg.loss).to(device)
    model.encoder.checkpointing = cfg.checkpointing
    optimizer = torch.optim.AdamW(param_groups(model, cfg.weight_decay), lr=peak, betas=(0.9, cfg.beta2), fused=True)
    dtype = precision_dtype(cfg.precision, device)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    config, start = {"model": model.config, "stage": asdict(cfg)}, 0
    if cfg.resume:
        state = load_checkpoint(run / "checkpoint.pt", "pretrain")
        same_recipe(state["config"]["stage"], config["stage"])
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        start = state["step"]
    elif (run / "checkpoint.pt").exists():
        raise ValueError(f"{run} holds a run already: continue it with --resume, or choose another --name")
    net = torch.compile(model) if cfg.compile else model
    net = DistributedDataParallel(net) if world.size > 1 else net

    order = Order(len(videos), cfg.batch, micro, start, steps, cfg.seed, world.rank, world.size)
    batches = iter(make_loader(videos, order, cfg.workers, pin=device.type == "cuda"))
    log = Log(run / "log.jsonl", start, steps, on=main_rank)
    if main_rank:
        print(f"{len(videos)} videos, effective batch {cfg.batch} = {world.size} processes x {passes} passes x {micro}, "
              f"{cfg.repeats} clips each; {cfg.epochs} epochs = {steps} steps, {warmup} of them warm-up, peak lr {peak:.3g}; "
              f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {dtype} on {device}")  # fmt: skip

    # The loop.
    generator = torch.Generator(device)
    share = cfg.batch * cfg.repeats // world.size  # clips of a step on this process
    total, waited, saved, tick, bad = torch.zeros((), device=device), 0.0, time.time(), time.time(), {}
    for step in range(start, steps):
        lr = cosine_lr(step, steps, warmup, peak, floor)
        for group in optimizer.param_groups:
            group["lr"] = lr
        # Draw the masks of the whole effective batch and take this process' rows: the same at any number of processes.
        generator.manual_seed(derive_seed(4, cfg.seed, step))
        masks = MASKS[cfg.mask](cfg.batch * cfg.repeats, model.encoder.grid, cfg.ratio, generator, device)
        for number, mask in enumerate(masks[world.rank * share :][:share].split(micro * cfg.repeats), start=1):
            asked = time.time()
            clips, _, unreadable = next(batches)
            waited += time.time() - asked
            with net.no_sync() if world.size > 1 and number < passes else contextlib.nullcontext():
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    loss, _ = net(clips.to(device, non_blocking=True), mask)
                scaler.scale(loss / passes).backward()
            total += loss.detach() / passes
            bad.update(line.split(": ", 1) for line in unreadable)
            if len(bad) > len(videos) / 10:
                raise ValueError(f"more than a tenth of the videos cannot be read, for example {list(bad.items())[0]}")
        if step == 0:  # what a model gets that knows nothing but the targets' mean; 1 for normalised cubes
            target = model.target_cubes(clips.to(device), torch.arange(mask.shape[1], device=device).expand(len(mask), -1))
            log.write(config=config, torch=torch.__version__, predict_nothing=model.loss(target.mean().expand_as(target), target).item())
        scaler.unscale_(optimizer)
        if cfg.clip_grad:
            torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip_grad)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

        done = step + 1
        if done % cfg.log_every == 0 or done == steps:
            count = (done - 1) % cfg.log_every + 1
            loss, now = all_reduce_mean(total).item() / count, time.time()
            if not math.isfinite(loss):
                raise ValueError(f"loss is {loss} around step {done}: lower --base-lr, or use --clip-grad 1 or --precision fp32")
            log.write(step=done, epoch=done / per_epoch, loss=loss, lr=lr, clips_per_s=count * cfg.batch * cfg.repeats / (now - tick),
                      waiting_for_data=waited / (now - tick), unreadable=len(bad))  # fmt: skip
            total.zero_()
            waited, tick = 0.0, now
            if main_rank and (done == steps or now - saved > 60 * cfg.save_minutes):
                save_checkpoint(run / "checkpoint.pt", dict(
                    stage="pretrain", config=config, step=done, epoch=done / per_epoch, model=model.state_dict(),
                    optimizer=optimizer.state_dict(), scaler=scaler.state_dict(),
                ))  # fmt: skip
                visualize.plot_log(run / "log.jsonl", run / "loss.png")
                saved = now

    if main_rank:
        for path, error in bad.items():
            print(f"unreadable: {path}: {error}")
        visualize.main(["--checkpoint", str(run / "checkpoint.pt")])
    teardown()


if __name__ == "__main__":
    cli(main)
