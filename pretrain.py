"""Pre-train VideoMAE: mask most of a clip, predict the masked pixels (section 3, Appendix B).

    python pretrain.py                          # preset toy: toy videos, minutes on one CPU core
    python pretrain.py ucf101 --data UCF-101 --splits ucfTrainTestlist --micro 32  # 6 passes of 32
    torchrun --nproc_per_node 8 pretrain.py hmdb51 --data hmdb51 --splits testTrainMulti_7030_splits
    python pretrain.py --data FOLDER            # preset own: your own videos

Leaves checkpoint.pt, log.jsonl, loss.png, reconstruction.png in runs/NAME. With --resume, the same
command continues. The log's second line holds constant_loss: the loss if the mean of all targets
were predicted everywhere. For normalised cubes it is a little below 1. Expect a loss that begins
above it, stays near it for a while, then falls ever more slowly.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

import visualize
from data import TOY, Videos, make_loader, pretrain_transform, sample_clip
from lib import engine, prepare, speed
from lib.engine import opt
from lib.run import Run, RunConfig, fit_to_set, loss_of_constant
from lib.variants import MODELS, choose_model
from lib.weights import init_model
from masking import MASKS
from model import LOSSES, SIZES


@dataclass
class Config(RunConfig):
    # RunConfig adds what is not about the method: data, workers, name, seed, device, precision ...
    # A flag is opt(default, help, smallest value, largest value). Literal lists its values.
    # clips
    frames: int = opt(16, "frames of a clip", 1)
    stride: int = opt(4, "frames from one frame of a clip to the next; 0: one frame, held still", 0)
    resolution: int = opt(224, "height and width of a clip, pixels", 1)
    flip: bool = opt(False, "mirror half of the clips; not where left and right tell classes apart")
    repeats: int = opt(1, "clips per video; --batch and the learning rate do not count them", 1)
    # model
    init: str | None = opt(None, "start from weights: ours, official, Hugging Face's, image ViTs'")
    model: Literal[tuple(MODELS)] = opt("videomae", "the paper's, or a variant of lib/variants.py")
    size: Literal[tuple(SIZES)] = opt("base", "width and depth of encoder and decoder")
    cube: tuple[int, ...] = opt((2, 16, 16), "frames, rows and columns of a cube")
    positions: Literal["1d", "3d"] = opt("1d", "embeddings: 1d as the official code, 3d ours")
    decoder_depth: int | None = opt(None, "blocks of the decoder; None: as in SIZES", 1)
    normalize: bool = opt(True, "predict cubes at mean 0 and variance 1; off: pixels")
    loss: Literal[tuple(LOSSES)] = opt("mse", "between prediction and target")
    mask: Literal[tuple(MASKS)] = opt("tube", "masking strategy")
    ratio: float = opt(0.9, "share of the tokens that is masked", 0, 1)
    # optimisation
    epochs: int | None = opt(800, "passes over the videos; None: by --steps", 1)
    steps: int = opt(5000, "preset own: about so many steps, unless --epochs is given", 1)
    batch: int = opt(1024, "videos per step, over all GPUs and gradient accumulation passes", 1)
    micro: int | None = opt(None, "videos per GPU and forward pass; None: one pass per step", 1)
    base_lr: float = opt(1.5e-4, "learning rate at batch 256; the peak is base_lr * batch / 256", 0)
    min_lr: float = opt(1e-5, "final learning rate, scaled like base_lr", 0)
    warmup: float | None = opt(40, "epochs of linear warm-up; None: a tenth of all", 0)
    weight_decay: float = opt(0.05, "AdamW's; none on biases, norms and the mask token", 0)
    beta2: float = opt(0.95, "AdamW's second beta; the first is 0.9", 0, 0.9999)
    clip_grad: float | None = opt(None, "largest gradient norm; None: no clipping", 0)


# Paper: Table 9, section 3.3 (stride), Appendix B. Official scripts: min_lr, and warm-up and betas
# of ucf101. k400 flips as in the paper, not as in the official code. Toy, own and the short ones
# are ours. A number that a preset leaves out is the default above.
SHORT = dict(size="small", ratio=0.9, repeats=2, batch=192, base_lr=3e-4)  # 90 % costs less
PRESETS = {
    "toy": dict(data=TOY, frames=8, stride=2, resolution=48, workers=0, size="toy", cube=(2, 8, 8),
                positions="3d", normalize=False, ratio=0.75, epochs=30, batch=8, base_lr=2.4e-2,
                min_lr=4.8e-3, warmup=1, save_minutes=1),  # the peak learning rate is 7.5e-4
    "own": dict(size="small", resolution=112, epochs=None, warmup=None, batch=32, base_lr=4e-3),
    "ucf101": dict(stride=4, ratio=0.75, epochs=3200, batch=192, base_lr=3e-4),
    "hmdb51": dict(stride=2, ratio=0.75, epochs=4800, batch=192, base_lr=3e-4),
    "ssv2": dict(stride=2, ratio=0.9, epochs=800, batch=1024, base_lr=1.5e-4),
    "k400": dict(stride=4, ratio=0.9, epochs=800, batch=1024, base_lr=1.5e-4, flip=True),
    "ucf101-short": dict(SHORT, stride=4, epochs=400),
    "hmdb51-short": dict(SHORT, stride=2, epochs=600),
}  # fmt: skip


def main(argv: list[str]) -> None:
    preset, cfg = engine.parse_config(Config, argv, __doc__, PRESETS)
    device = engine.setup(cfg.device)
    Model = choose_model(cfg.model, cfg.mask, cfg.stride)  # some variants need a mask or a stride

    # Data: clips stay uint8 until they are on the device.
    split = prepare.training_videos(preset, cfg.data, cfg.splits, cfg.fold, cfg.missing)
    factor = Model.frame_factor  # 1; a variant may load more frames, at a smaller stride
    sample = partial(sample_clip, frames=factor * cfg.frames, stride=cfg.stride // factor)
    videos = Videos(split, sample, pretrain_transform(cfg.resolution, cfg.flip), cfg.repeats)
    cfg = fit_to_set(preset, cfg, len(videos))  # own: batch, epochs and warm-up

    # The model.
    torch.manual_seed(cfg.seed)
    video_size = (cfg.frames, cfg.resolution, cfg.resolution)
    options = dict(decoder_depth=cfg.decoder_depth, normalize=cfg.normalize, loss=cfg.loss)
    model = Model(cfg.size, video_size, cfg.cube, cfg.positions, **options)
    if cfg.init:
        print(init_model(model, cfg.init))
    model = speed.place(model, device)  # model.to(device); on a CPU, it also chooses threads

    # AdamW. No weight decay on vectors (biases, norms) and the mask token. The learning rate is set
    # in each step, see the end of the loop.
    undecayed = [p for p in model.parameters() if p.ndim == 1 or p is model.mask_token]
    decayed = [p for p in model.parameters() if p.ndim > 1 and p is not model.mask_token]
    groups = [dict(params=decayed, weight_decay=cfg.weight_decay), dict(params=undecayed)]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, betas=(0.9, cfg.beta2), fused=True)
    # The learning rate grows with the batch (Appendix B).
    peak_lr, final_lr = cfg.base_lr * cfg.batch / 256, cfg.min_lr * cfg.batch / 256

    # The loop. Run (lib/run.py) resumes, spreads batches over passes and processes, logs, saves.
    run = Run("pretrain", cfg.name or f"pretrain-{preset}", cfg, model, optimizer, videos, device)
    loader = make_loader(videos, run.order, cfg.workers, pin=device.type == "cuda")
    for step in run.steps():
        # Gradient accumulation. The clips of a pass are (micro * repeats, T, C, H, W) uint8.
        for clips, _ in run.passes(loader):
            # The seed of a pass is made from --seed, the step and the number of the pass. So masks
            # are the same after --resume, and on any number of GPUs with the same --micro.
            torch.manual_seed(run.seed("mask"))
            mask = MASKS[cfg.mask](clips, model.encoder.grid, cfg.ratio)
            with run.autocast():
                loss, _ = run.net(clips, mask)  # the model, under DDP with several GPUs
            run.backward(loss)  # the gradients become their mean over passes and GPUs
        if step == 0:
            run.log.write(constant_loss=loss_of_constant(model, clips))
        # Linear warm-up from 0 to the peak, then half a cosine down to the final rate.
        lr = engine.cosine_lr(step, run.total, run.warmup, peak_lr, final_lr)
        # Clip the gradients if asked to, step AdamW, zero the gradients. Now and then log and save.
        saved = run.update(lr)
        if saved:
            visualize.plot_log(run.folder)

    run.close()
    if engine.rank() == 0:
        visualize.draw_trained(run.folder)


if __name__ == "__main__":
    engine.cli(main)
