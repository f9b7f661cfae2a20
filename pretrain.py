"""Pre-train VideoMAE: mask most of a clip, predict the masked pixels (paper, sections 3.3 and 4.1).

    python pretrain.py                                       # toy videos, minutes on one CPU core
    python pretrain.py ucf101 --data UCF-101 --splits ucfTrainTestlist --micro 32        # one GPU
    torchrun --nproc_per_node 8 pretrain.py hmdb51 --data hmdb51 --splits testTrainMulti_7030_splits
    python pretrain.py --data FOLDER                         # your own videos

Leaves runs/NAME/{checkpoint.pt, log.jsonl, loss.png, reconstruction.png}. With --resume, it goes on
exactly where it ended. Expect a loss that begins above "predict nothing" (1 for normalised cubes),
stays near it for a while, then falls, ever more slowly.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

import visualize
from data import TOY, Videos, make_loader, pretrain_transform, sample_clip
from lib import engine, prepare, speed
from lib.engine import opt
from lib.run import Run, fit_to_set, loss_of_nothing
from lib.variants import MODELS, choose_model
from lib.weights import init_model
from masking import MASKS
from model import LOSSES, SIZES


@dataclass
class Config:
    # data
    data: str | None = opt(None, "folder of the videos")
    splits: str | None = opt(
        None, "folder of official split files, or a list of lines `path [label]`"
    )
    fold: int = opt(1, "official split, 1 to 3", 1, 3)
    missing: Literal["error", "skip"] = opt("error", "where listed videos are not there")
    frames: int = opt(16, "frames of a clip", 1)
    stride: int = opt(4, "frames of the video from one frame of a clip to the next", 1)
    resolution: int = opt(224, "height and width of a clip, pixels", 1)
    flip: bool = opt(False, "mirror half of the clips; not where left and right are classes")
    repeats: int = opt(1, "clips cut from each decoded video; the learning rate stays", 1)
    workers: int = opt(2, "decoding processes per GPU; 0 decodes in the main process", 0)
    # model
    init: str | None = opt(None, "weights to go on from: ours, official, Hugging Face, of images")
    model: Literal[tuple(MODELS)] = opt("videomae", "the paper's, or a variant of lib/variants.py")
    size: Literal[tuple(SIZES)] = opt("base", "width and depth of encoder and decoder")
    cube: tuple[int, ...] = opt((2, 16, 16), "frames, rows and columns of a cube")
    positions: Literal["1d", "3d"] = opt(
        "1d", "position embeddings: 1d as the official code, 3d ours"
    )
    decoder_depth: int | None = opt(None, "blocks of the decoder; None: as in SIZES", 1)
    normalize: bool = opt(True, "predict cubes at mean 0 and variance 1; off: pixels")
    loss: Literal[tuple(LOSSES)] = opt("mse", "between prediction and target")
    mask: Literal[tuple(MASKS)] = opt("tube", "masking strategy")
    ratio: float = opt(0.9, "share of the tokens that is masked")
    # optimisation
    epochs: int | None = opt(800, "passes over the videos; None: by --steps", 1)
    steps: int = opt(5000, "steps of the recipe own, unless --epochs is given", 1)
    batch: int = opt(1024, "videos per step, over all GPUs and gradient accumulation passes", 1)
    micro: int | None = opt(None, "videos per GPU and forward pass; None: no accumulation", 1)
    base_lr: float = opt(1.5e-4, "learning rate at batch 256; the peak is base_lr * batch / 256")
    min_lr: float = opt(1e-5, "last learning rate, scaled like base_lr")
    warmup: float | None = opt(40, "epochs of linear warm-up", 0)
    weight_decay: float = opt(0.05, "AdamW's; none on biases, norms and the mask token")
    beta2: float = opt(0.95, "AdamW's second beta; the first is 0.9")
    clip_grad: float | None = opt(None, "largest gradient norm; None: no clipping")
    precision: Literal["auto", "bf16", "fp16", "fp32"] = opt("auto", "of matrix products")
    seed: int = opt(0, "of everything random: weights, order, crops, masks", 0)
    # run
    name: str | None = opt(None, "results go to runs/NAME; None: pretrain-PRESET")
    resume: bool = opt(False, "continue runs/NAME")
    device: Literal["auto", "cpu", "cuda"] = opt("auto", "where to compute")
    compile: bool = opt(False, "torch.compile the model: a minute of waiting, then faster steps")
    memory: Literal["fast", "less", "least"] = opt("fast", "activations kept, see lib/speed.py")
    log_every: int = opt(10, "steps per line of log.jsonl", 1)
    save_minutes: float = opt(10, "minutes from one checkpoint to the next")


# Epochs, batch, learning rate, stride, ratio: Table 9, section 4.2, Appendix B. Warm-up, min_lr and
# betas of ucf101: official script; of hmdb51: as ucf101, nothing is published. k400 flips as the
# paper says; the official code does not. "toy", "own" and the short ones are ours.
PRESETS = {
    "toy": dict(data=TOY, frames=8, stride=2, resolution=48, workers=0, size="toy", cube=(2, 8, 8),
                positions="3d", normalize=False, ratio=0.75, epochs=30, batch=8, base_lr=2.4e-2,
                min_lr=4.8e-3, warmup=1, save_minutes=1),
    "own": dict(size="small", resolution=112, epochs=None, warmup=None, batch=32, base_lr=4e-3),
    "ucf101": dict(stride=4, ratio=0.75, epochs=3200, batch=192, base_lr=3e-4),
    "hmdb51": dict(stride=2, ratio=0.75, epochs=4800, batch=192, base_lr=3e-4),
    "ssv2": dict(stride=2, ratio=0.9, epochs=800, batch=1024, base_lr=1.5e-4),
    "k400": dict(stride=4, ratio=0.9, epochs=800, batch=1024, base_lr=1.5e-4, flip=True),
    "ucf101-short": dict(size="small", stride=4, repeats=2, epochs=400, batch=192, base_lr=3e-4),
    "hmdb51-short": dict(size="small", stride=2, repeats=2, epochs=600, batch=192, base_lr=3e-4),
}  # fmt: skip


def main(argv: list[str]) -> None:
    preset, cfg = engine.parse_config(Config, argv, __doc__, PRESETS)
    device = engine.setup(cfg.device)
    Model = choose_model(cfg.model, cfg.mask, cfg.stride)

    # Data: clips stay uint8 until they are on the device.
    split = prepare.training_videos(preset, cfg.data, cfg.splits, cfg.fold, cfg.missing)
    more = Model.frames_per_clip  # 1, but for one variant
    sample = partial(sample_clip, frames=more * cfg.frames, stride=cfg.stride // more)
    videos = Videos(split, sample, pretrain_transform(cfg.resolution, cfg.flip), cfg.repeats)
    cfg = fit_to_set(preset, cfg, len(videos))

    # The model.
    torch.manual_seed(cfg.seed)
    video_size = (cfg.frames, cfg.resolution, cfg.resolution)
    target = (cfg.decoder_depth, cfg.normalize, cfg.loss)
    model = Model(cfg.size, video_size, cfg.cube, cfg.positions, *target)
    if cfg.init:
        print(init_model(model, cfg.init))
    model = speed.place(model, device)

    # AdamW. Weight decay is for matrices: not for biases, norms and the mask token.
    vectors = [p for p in model.parameters() if p.ndim == 1 or p is model.mask_token]
    matrices = [p for p in model.parameters() if p.ndim > 1 and p is not model.mask_token]
    groups = [dict(params=matrices, weight_decay=cfg.weight_decay), dict(params=vectors)]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, betas=(0.9, cfg.beta2), fused=True)
    # The learning rate grows with the batch (section 4.2).
    peak_lr, last_lr = cfg.base_lr * cfg.batch / 256, cfg.min_lr * cfg.batch / 256

    # The loop. Run resumes, logs and saves.
    run = Run("pretrain", cfg.name or f"pretrain-{preset}", cfg, model, optimizer, videos, device)
    batches = make_loader(videos, run.order, cfg.workers, pin=device.type == "cuda")
    for step in run.steps():
        for clips, _ in run.passes(batches):
            # One seed per pass: masks are the same for any number of GPUs, and after --resume.
            torch.manual_seed(run.seed("mask"))
            mask = MASKS[cfg.mask](clips, model.encoder.grid, cfg.ratio)
            with run.autocast():
                loss, _ = run.net(clips, mask)
            run.backward(loss)
        if step == 0:
            run.log.write(predict_nothing=loss_of_nothing(model, clips))
        if run.update(engine.cosine_lr(step, run.total, run.warmup, peak_lr, last_lr)):
            visualize.plot_log(run.folder)

    run.close()
    if engine.rank() == 0:
        visualize.main(["--checkpoint", str(run.folder / "checkpoint.pt")])


if __name__ == "__main__":
    engine.cli(main)
