"""Pre-train VideoMAE: hide most of a clip with a tube mask, rebuild it (paper sections 3.3 and 4.1).

    python pretrain.py                                             # toy data, 2 CPU cores, minutes
    python pretrain.py ucf101 --data ~/UCF-101 --splits ~/ucfTrainTestlist --micro 32          # one GPU
    torchrun --nproc_per_node 8 pretrain.py hmdb51 --data ~/hmdb51 --splits ~/testTrainMulti_7030_splits
    python pretrain.py --data FOLDER --batch 4 --epochs 500        # any folder of videos, toy model and recipe

Leaves runs/NAME/ with checkpoint.pt, log.jsonl, loss.png and reconstruction.png; --resume goes on where it stopped.
Expect a loss that starts above the printed "predict nothing" level (1 for normalised cubes), stays at it for a while,
then falls, ever more slowly, for as long as you train.
"""

import contextlib
import math
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import engine
import visualize
from data import (
    TOY,
    Order,
    Videos,
    derive_seed,
    make_loader,
    make_toy,
    note_unreadable,
    pretrain_transform,
    read_split,
    sample_clip,
)
from engine import opt
from masking import MASKS
from model import LOSSES, POSITIONS, SIZES, TARGETS, VideoMAE


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
    save_minutes: float = opt(10, "minutes from one checkpoint and loss curve to the next")


MAY_CHANGE = set("data splits workers micro name resume device compile checkpointing save_minutes".split())  # on resume

# Epochs, batch, learning rate, stride, ratio: paper Table 9, section 4.2, Appendix B (1600 epochs on k400 for Table 7,
# 2400 on ssv2 for Table 6). Warm-up, min_lr and betas of ucf101: official script; of hmdb51: as ucf101, since nothing
# is published. Flip on k400 is the paper's; the official code never flips.
PRESETS = {
    "toy": dict(data=TOY, frames=8, stride=2, resolution=48, repeats=2, workers=0, size="toy", cube=(2, 8, 8),
                positions="3d", normalize=False, ratio=0.75, epochs=20, batch=4, base_lr=9.6e-2, min_lr=9.6e-4,
                warmup=2, save_minutes=1),  # ours
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
    micro, passes = engine.split_batch(cfg.batch, processes, cfg.micro)
    per_epoch = max(len(videos) // cfg.batch, 1)
    steps, warmup = cfg.epochs * per_epoch, int(cfg.warmup * per_epoch)
    peak, floor = cfg.base_lr * cfg.batch / 256, cfg.min_lr * cfg.batch / 256

    # Model and optimiser.
    torch.manual_seed(cfg.seed)
    video_size = (cfg.frames, cfg.resolution, cfg.resolution)
    model = VideoMAE(
        cfg.size, video_size, cfg.cube, cfg.positions, cfg.decoder_depth, cfg.target, cfg.normalize, cfg.loss
    ).to(device)
    model.encoder.checkpointing = cfg.checkpointing
    matrices = [p for p in model.parameters() if p.ndim > 1 and p is not model.mask_token]  # only these decay
    others = [p for p in model.parameters() if p.ndim == 1 or p is model.mask_token]
    groups = [dict(params=matrices, weight_decay=cfg.weight_decay), dict(params=others, weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, cfg.beta2), fused=True)
    dtype = engine.precision_dtype(cfg.precision, device)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    config, start = {"model": model.config, "stage": asdict(cfg), "videos": len(videos)}, 0
    if cfg.resume:
        parts = dict(model=model, optimizer=optimizer, scaler=scaler)
        start = engine.resume(engine.load_checkpoint(run / "checkpoint.pt", "pretrain"), config, MAY_CHANGE, **parts)
    elif (run / "checkpoint.pt").exists():
        raise ValueError(f"{run} holds a run already: continue it with --resume, or choose another --name")
    net = torch.compile(model) if cfg.compile else model
    net = DistributedDataParallel(net, broadcast_buffers=False) if processes > 1 else net

    order = Order(len(videos), cfg.batch, micro, start, steps, cfg.seed, rank, processes)
    batches = iter(make_loader(videos, order, cfg.workers, pin=device.type == "cuda"))
    log = engine.Log(run / "log.jsonl", start, steps, on=rank == 0)
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
    total, waited, bad = torch.zeros((), device=device), 0.0, {}
    logged = saved = time.time()
    for step in range(start, steps):
        lr = engine.cosine_lr(step, steps, warmup, peak, floor)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # Masks of the whole effective batch, of which this process takes its rows: the same on any number of GPUs.
        generator.manual_seed(derive_seed(3, cfg.seed, step))
        masks = MASKS[cfg.mask](clips_per_step, model.encoder.grid, cfg.ratio, generator, device)
        for number, mask in enumerate(masks[rank * share :][:share].split(micro * cfg.repeats), start=1):
            asked = time.time()
            clips, _, unreadable = next(batches)
            waited += time.time() - asked
            note_unreadable(bad, unreadable, clips, len(videos))
            clips = clips.to(device, non_blocking=True)
            with net.no_sync() if processes > 1 and number < passes else contextlib.nullcontext():
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    loss, _ = net(clips, mask)
                scaler.scale(loss / passes).backward()
            total += loss.detach() / passes
        if cfg.clip_grad:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip_grad)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

        done = step + 1
        if step == 0:  # the loss of a model that predicts the targets' mean everywhere
            places = torch.arange(mask.shape[1], device=device).expand(len(clips[:8]), -1)
            target = model.target_cubes(clips[:8], places)
            nothing = model.loss(target.mean().expand_as(target), target).item()
            log.write(config=config, torch=torch.__version__, predict_nothing=nothing)
        if done % cfg.log_every == 0 or done == steps:
            count, now = (done - 1) % cfg.log_every + 1, time.time()
            report = torch.stack([total / processes, torch.tensor(len(bad), device=device)])
            if processes > 1:
                dist.all_reduce(report)
            loss, unreadable = report[0].item() / count, int(report[1])
            if not math.isfinite(loss):
                raise ValueError(f"loss is {loss} near step {done}: try a lower --base-lr, --clip-grad 1, or fp32")
            log.write(
                step=done, epoch=done / per_epoch, loss=loss, lr=lr, unreadable=unreadable,
                clips_per_s=count * clips_per_step / (now - logged), waiting_for_data=waited / (now - logged),
            )  # fmt: skip
            total.zero_()
            waited, logged = 0.0, now
            if rank == 0 and (done == steps or now - saved > 60 * cfg.save_minutes):
                engine.save_checkpoint(
                    run / "checkpoint.pt", stage="pretrain", config=config, step=done, model=model.state_dict(),
                    optimizer=optimizer.state_dict(), scaler=scaler.state_dict(),
                )  # fmt: skip
                visualize.plot_log(run / "log.jsonl", run / "loss.png")
                saved = time.time()

    log.bar.close()
    if rank == 0:
        for error in bad.values():
            print(f"left out, unreadable: {error}")
        visualize.main(["--checkpoint", str(run / "checkpoint.pt")])
    if processes > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    engine.cli(main)
