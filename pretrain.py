"""Pre-train VideoMAE: hide most of a clip with a tube mask, rebuild it (paper sections 3.3 and 4.1).

    python pretrain.py                                             # toy data, 2 CPU cores, minutes
    python pretrain.py ucf101 --data ~/UCF-101 --splits ~/ucfTrainTestlist --micro 32          # one GPU
    torchrun --nproc_per_node 8 pretrain.py hmdb51 --data ~/hmdb51 --splits ~/testTrainMulti_7030_splits
    python pretrain.py --data FOLDER --batch 4 --epochs 500        # any folder of videos, toy model and recipe

Leaves runs/NAME/ with checkpoint.pt (the one before: previous.pt), log.jsonl, loss.png and reconstruction.png. However
a run ended, the same command with --resume goes on exactly; SIGTERM, SIGUSR1 and Ctrl-C write a checkpoint first.
Expect a loss that starts above the printed "predict nothing" level (1 for normalised cubes), stays at it for a while,
then falls, ever more slowly, for as long as you train.
"""

import contextlib
import math
import signal
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

import engine
import visualize
from data import (
    TOY,
    Order,
    Videos,
    cosine_lr,
    derive_seed,
    make_loader,
    make_toy,
    merge,
    note_skipped,
    note_unreadable,
    pretrain_transform,
    read_split,
    sample_clip,
    split_batch,
)
from engine import opt
from masking import MASKS, running_cell_mask
from model import LOSSES, POSITIONS, SIZES, TARGETS, VideoMAE, precision_dtype


@dataclass
class Config:
    # data
    data: str | None = opt(None, "folder of the videos")
    splits: str | None = opt(None, "folder of official split files, or a list of lines `path [label]`")
    fold: int = opt(1, "official split, 1 to 3", 1)
    frames: int = opt(16, "frames of a clip", 1)
    stride: int = opt(4, "frames of the video from one frame of a clip to the next", 1)
    resolution: int = opt(224, "height and width of a clip, pixels", 1)
    flip: bool = opt(False, "mirror every other clip; not where left and right are classes")
    repeats: int = opt(1, "clips cut from each decoded video; multiplies a step's clips, not its learning rate", 1)
    workers: int = opt(2, "decoding processes per GPU; 0 decodes in the main process", 0)
    # model
    size: Literal[tuple(SIZES)] = opt("base", "width and depth of encoder and decoder")
    cube: tuple[int, ...] = opt((2, 16, 16), "frames, rows and columns of a token")
    positions: Literal[POSITIONS] = opt("1d", "fixed positions: 1d as the official code, 3d separate axes (ours)")
    decoder_depth: int | None = opt(None, "decoder blocks; None: 4, for large and huge 12, for toy 2", 1)
    target: Literal[TARGETS] = opt("clip", "what is predicted (paper Table 1c)")
    normalize: bool = opt(True, "predict cubes normalised to mean 0 and variance 1; off: pixels")
    loss: Literal[tuple(LOSSES)] = opt("mse", "between prediction and target (paper Table 1f)")
    mask: Literal[tuple(MASKS)] = opt("tube", "masking strategy (paper Table 1b)")
    ratio: float = opt(0.9, "share of the tokens that is hidden")
    decoder_mask: float = opt(
        0.0, "share of the masked tokens that is not decoded: 0.25, 0.5, 0.75 (VideoMAE V2); 0: none"
    )
    cross: bool = opt(False, "a decoder whose mask tokens attend to visible tokens alone (CrossMAE)")
    # optimisation
    epochs: int = opt(800, "passes over the videos", 1)
    batch: int = opt(1024, "effective batch: videos per optimiser step, over all GPUs and accumulation passes", 1)
    micro: int | None = opt(None, "videos per GPU and forward pass; None: the GPU's whole share", 1)
    base_lr: float = opt(1.5e-4, "learning rate at batch 256; the peak is base_lr * batch / 256")
    min_lr: float = opt(1e-5, "last learning rate, scaled like base_lr")
    warmup: float = opt(40, "epochs of linear warm-up", 0)
    weight_decay: float = opt(0.05, "AdamW's; none on biases, norms and the mask token")
    beta2: float = opt(0.95, "AdamW's second beta; the first is 0.9")
    clip_grad: float | None = opt(None, "largest gradient norm; None: no clipping")
    precision: Literal["auto", "bf16", "fp16", "fp32"] = opt("auto", "of matrix products; auto: bf16 if in hardware")
    seed: int = opt(0, "the only source of randomness: order, crops, masks, weights", 0)
    # run
    name: str | None = opt(None, "results go to runs/NAME; None: pretrain-PRESET")
    resume: bool = opt(False, "continue runs/NAME")
    device: Literal["auto", "cpu", "cuda"] = opt("auto", "where to compute")
    compile: bool = opt(False, "torch.compile the model: a minute of waiting, then faster steps")
    checkpointing: bool = opt(False, "compute activations twice: less memory, more time")
    log_every: int = opt(10, "steps from one line of log.jsonl to the next", 1)
    shard: bool = opt(False, "spread weights and optimiser over the GPUs (FSDP2), for models too large for one")
    save_minutes: float = opt(10, "minutes from one checkpoint and loss curve to the next")
    save_every: int | None = opt(None, "steps from one checkpoint to the next, besides; None: by the minutes alone", 1)


MAY_CHANGE = set(
    "data splits workers micro name resume device compile checkpointing shard save_minutes save_every".split()
)  # on resume

# Epochs, batch, learning rate, stride, ratio: paper Table 9, section 4.2, Appendix B (1600 epochs on k400 for Table 7,
# 2400 on ssv2 for Table 6). Warm-up, min_lr and betas of ucf101: official script; of hmdb51: as ucf101, since nothing
# is published. Flip on k400 is the paper's; the official code never flips.
PRESETS = {
    "toy": dict(data=TOY, frames=8, stride=2, resolution=48, workers=0, size="toy", cube=(2, 8, 8), positions="3d",
                normalize=False, ratio=0.75, epochs=30, batch=8, base_lr=2.4e-2, min_lr=4.8e-3, warmup=1,
                save_minutes=1),  # ours
    "ucf101": dict(stride=4, ratio=0.75, epochs=3200, batch=192, base_lr=3e-4),
    "hmdb51": dict(stride=2, ratio=0.75, epochs=4800, batch=192, base_lr=3e-4),
    "ssv2": dict(stride=2, ratio=0.9, epochs=800, batch=1024, base_lr=1.5e-4),
    "k400": dict(stride=4, ratio=0.9, epochs=800, batch=1024, base_lr=1.5e-4, flip=True),
    # Ours, for one GPU: a quarter of the parameters, two clips a decode, an eighth of the epochs. Not yet run.
    "ucf101-short": dict(size="small", stride=4, ratio=0.9, repeats=2, epochs=400, batch=192, base_lr=3e-4),
    "hmdb51-short": dict(size="small", stride=2, ratio=0.9, repeats=2, epochs=600, batch=192, base_lr=3e-4),
}  # fmt: skip


def main(argv: list[str]) -> None:
    preset, cfg = engine.parse_config(Config, argv, __doc__, PRESETS)
    device, rank, processes = engine.setup(cfg.device)
    run = Path("runs") / (cfg.name or f"pretrain-{preset}")

    # Data: uint8 clips, in an order that depends on the seed alone.
    if cfg.data is None:
        raise ValueError(f"--data is missing: the folder with the videos of {preset}")
    if cfg.warmup >= cfg.epochs:
        raise ValueError(f"--warmup {cfg.warmup:g} leaves nothing of --epochs {cfg.epochs}: lower it")
    if cfg.target == "center" and cfg.mask != "tube" or cfg.target == "double" and cfg.stride % 2:
        raise ValueError("--target center needs --mask tube, --target double an even --stride")
    if cfg.decoder_mask and (cfg.mask != "tube" or cfg.target == "center"):
        raise ValueError("--decoder-mask needs --mask tube, and does not go with --target center")
    if cfg.data == TOY and rank == 0:
        make_toy(TOY)
    if processes > 1:
        dist.barrier()
    split = read_split(cfg.data, cfg.splits, cfg.fold)
    if preset.startswith(("ucf101", "hmdb51")) and read_split(cfg.data, cfg.splits, cfg.fold, train=False) == split:
        raise ValueError(f"no split lists of {preset} in {cfg.data}: name their folder with --splits")
    dense = 2 if cfg.target == "double" else 1  # target "double": twice the frames at half the stride
    sample = partial(sample_clip, frames=cfg.frames * dense, stride=cfg.stride // dense)
    videos = Videos(split, sample, pretrain_transform(cfg.resolution, cfg.flip), cfg.repeats)
    micro, passes = split_batch(cfg.batch, processes, cfg.micro)
    per_epoch = max(len(videos) // cfg.batch, 1)
    steps, warmup = cfg.epochs * per_epoch, int(cfg.warmup * per_epoch)
    peak, floor = cfg.base_lr * cfg.batch / 256, cfg.min_lr * cfg.batch / 256

    # Model and optimiser.
    torch.manual_seed(cfg.seed)
    video_size = (cfg.frames, cfg.resolution, cfg.resolution)
    model = VideoMAE(
        cfg.size, video_size, cfg.cube, cfg.positions, cfg.decoder_depth, cfg.target, cfg.normalize, cfg.loss,
        cross=cfg.cross,
    ).to(device)  # fmt: skip
    model.encoder.checkpointing = cfg.checkpointing
    if cfg.decoder_mask:
        running_cell_mask(1, model.encoder.grid, cfg.decoder_mask)  # does it fit?
    net = engine.parallel(model, cfg.shard)
    if cfg.compile:
        model.compile()
    matrices = [p for p in model.parameters() if p.ndim > 1 and p is not model.mask_token]  # only these decay
    others = [p for p in model.parameters() if p.ndim == 1 or p is model.mask_token]
    groups = [dict(params=matrices, weight_decay=cfg.weight_decay), dict(params=others, weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, cfg.beta2), fused=True)
    dtype = precision_dtype(cfg.precision, device)
    if cfg.shard and dtype == torch.float16:
        raise ValueError("--shard does not go with fp16: use --precision bf16 or fp32")
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    config = {"model": model.config, "stage": asdict(cfg), "videos": len(videos), "format": 2}
    start, progress = 0, dict(loss=0.0, taken=0, skipped=[], unreadable={})  # loss: sum over the steps taken
    begun = any((run / name).exists() for name in ("checkpoint.pt", "previous.pt"))
    if begun and not cfg.resume:
        raise ValueError(f"{run} holds a run already: continue it with --resume, or choose another --name")
    if begun:
        saved = engine.load_checkpoint(run / "checkpoint.pt", "pretrain")
        start, progress = engine.resume(saved, config, MAY_CHANGE, model, optimizer, scaler)
    if cfg.resume and rank == 0:
        print(f"going on after step {start} of {steps}" if begun else f"no checkpoint in {run}: starting from step 0")

    order = Order(len(videos), cfg.batch, micro, start, steps, cfg.seed, rank, processes)
    batches = make_loader(videos, order, cfg.workers, pin=device.type == "cuda")
    log = visualize.Log(run / "log.jsonl", start, steps, on=rank == 0)
    if rank == 0:
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        print(
            f"{len(videos)} videos; batch {cfg.batch} = {processes} processes x {passes} passes x {micro} videos, "
            f"{cfg.repeats} clips of each; {cfg.epochs} epochs = {steps} steps, {warmup} of them warm-up; "
            f"peak lr {peak:.3g}; {cfg.size}, {millions:.1f} M parameters; {dtype} on {device}"
        )

    # The loop.
    generator = torch.Generator(device)
    clips_per_step = cfg.batch * cfg.repeats
    share = clips_per_step // processes
    signals, stop, done, saved_at = engine.stop_signals(catch=True), 0, start, time.time()
    for step in range(start, steps):
        lr = cosine_lr(step, steps, warmup, peak, floor)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # Masks of the whole effective batch, of which this process takes its rows: the same on any number of GPUs.
        generator.manual_seed(derive_seed(3, cfg.seed, step))
        about = dict(batch=clips_per_step, grid=model.encoder.grid, generator=generator, device=device)
        masks = [MASKS[cfg.mask](ratio=cfg.ratio, **about)]
        if cfg.decoder_mask:
            masks.append(running_cell_mask(ratio=cfg.decoder_mask, **about))
        total = 0.0
        mine = (part[rank * share :][:share].split(micro * cfg.repeats) for part in masks)
        for number, mask in enumerate(zip(*mine, strict=True), start=1):
            asked = time.time()
            clips, _, unreadable = next(batches)
            log.waited += time.time() - asked
            note_unreadable(progress["unreadable"], unreadable, clips, len(videos))
            clips = clips.to(device, non_blocking=True)
            early = processes > 1 and not cfg.shard and number < passes  # DDP: gradients meet in the last pass
            with net.no_sync() if early else contextlib.nullcontext():
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    loss, _ = net(clips, *mask)
                scaler.scale(loss / passes).backward()
            total = total + loss.detach() / passes
        done = step + 1
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip_grad or math.inf)
        if norm.isfinite():
            scaler.step(optimizer)
            progress["loss"], progress["taken"] = progress["loss"] + total.item(), progress["taken"] + 1
        else:  # the weights stay as they are
            note_skipped(progress["skipped"], done, lr, order, videos, run)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

        if step == 0:  # the loss of a model that predicts the targets' mean everywhere
            places = torch.arange(masks[0].shape[1], device=device).expand(len(clips[:8]), -1)
            target = model.target_cubes(clips[:8], places)
            nothing = model.loss(target.mean().expand_as(target), target).item()
            log.write(config=config, torch=torch.__version__, predict_nothing=nothing)
        save = time.time() - saved_at > 60 * cfg.save_minutes or cfg.save_every and done % cfg.save_every == 0
        stop, save = engine.agree(max(signals, default=0), bool(save or signals or done == steps), device=device)
        line = done % cfg.log_every == 0 or done == steps
        if line or save:
            merge(progress, processes)
        if line:
            log.report(progress, done, done / per_epoch, lr, clips_per_step)
        if save:
            engine.save_checkpoint(
                run, model, optimizer, stage="pretrain", config=config, step=done, steps=steps,
                scaler=scaler.state_dict(), progress=progress,
            )  # fmt: skip
            saved_at = time.time()
        if save and rank == 0:
            visualize.plot_log(run / "log.jsonl", run / "loss.png")
        if stop:
            break

    engine.stop_signals(catch=False)
    batches.close()
    log.close(progress, stop, done)
    if rank == 0 and not stop:
        visualize.main(["--checkpoint", str(run / "checkpoint.pt")])
    if processes > 1:
        dist.destroy_process_group()
    if stop:
        sys.exit(130 if stop == signal.SIGINT else 0)


if __name__ == "__main__":
    engine.cli(main)
