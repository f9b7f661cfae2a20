"""Pre-train with MoCo v3 (Chen et al. 2021), to which the paper compares VideoMAE (Tables 2 to 4).

    python contrast.py                          # preset toy: toy videos, on a CPU core
    python contrast.py ucf101 --data UCF-101 --splits ucfTrainTestlist --memory least
    torchrun --nproc_per_node 8 contrast.py ssv2 --data ssv2 --splits train.json
    python finetune.py --init runs/contrast-toy/checkpoint.pt      # linprobe.py alike

Two clips of a video, the views, must be more alike to the network than clips of other videos in the
batch. Nothing is masked. Leaves checkpoint.pt, log.jsonl, loss.png in runs/NAME. With --resume, the
same command goes on. Expect a loss that falls from 4 * temperature * log(batch), the dotted line in
loss.png. If it stays there, or if `features` in the log falls towards 0, the network has collapsed.
"""

import copy
import math
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import v2

import visualize
from data import TOY, Videos, make_loader, sample_clip
from lib import engine, prepare, speed
from lib.engine import opt
from lib.run import Run, RunConfig, fit_to_set
from model import SIZES, Encoder


@dataclass
class Config(RunConfig):
    # clips
    frames: int = opt(16, "frames of a clip", 1)
    stride: int = opt(4, "frames from one frame of a clip to the next; 0: one frame, held still", 0)
    resolution: int = opt(224, "height and width of a clip, pixels; the blur needs 7", 7)
    smallest: float = opt(0.08, "smallest area of the random crop, as a share of the frame", 0, 1)
    flip: bool = opt(True, "mirror half of the clips; not where left and right tell classes apart")
    # model
    size: Literal[tuple(SIZES)] = opt("base", "width and depth of the encoder")
    cube: tuple[int, ...] = opt((2, 16, 16), "frames, rows and columns of a cube")
    positions: Literal["1d", "3d"] = opt("1d", "embeddings: 1d as VideoMAE's code, 3d ours")
    hidden: int = opt(4096, "width inside of projector and predictor", 1)
    out: int = opt(256, "numbers per clip that are compared", 1)
    temperature: float = opt(0.2, "divides similarities before the softmax", 1e-3)
    momentum: float = opt(0.99, "share that the momentum encoder keeps in the first step", 0, 1)
    # optimisation
    epochs: int | None = opt(300, "passes over the videos; None: by --steps", 1)
    steps: int = opt(5000, "preset own: about so many steps, unless --epochs is given", 1)
    batch: int = opt(1024, "videos per step, over all GPUs: they are told from each other", 2)
    base_lr: float = opt(1.5e-4, "learning rate at batch 256; the peak is base_lr * batch / 256", 0)
    warmup: float | None = opt(40, "epochs of linear warm-up; None: a tenth of all", 0)
    weight_decay: float = opt(0.1, "AdamW's; none on biases and norms", 0)
    clip_grad: float | None = opt(None, "largest gradient norm; None: no clipping", 0)

    repeats, micro = 2, None  # no flags: a video gives two views, a batch is one pass


# The defaults are MoCo v3's for ViT (paper, section 5, and official script): epochs, warm-up, base
# lr, weight decay, temperature, momentum, widths, smallest crop. Its batch is 4096, or 1024 on one
# machine, which is VideoMAE's. Stride, mirroring of ssv2 and batch of ucf101 and hmdb51 are those
# of pretrain.py. VideoMAE's paper has no recipe of its MoCo v3 on videos. Toy and own are ours.
PRESETS = {
    "toy": dict(data=TOY, frames=8, stride=2, resolution=48, workers=0, smallest=0.5, flip=False,
                size="toy", cube=(2, 8, 8), positions="3d", hidden=512, out=64, epochs=20, batch=32,
                base_lr=4e-3, warmup=2, save_minutes=1),
    "own": dict(size="small", resolution=112, epochs=None, warmup=None, batch=32, base_lr=4e-3),
    "ucf101": dict(stride=4, batch=192),
    "hmdb51": dict(stride=2, batch=192),
    "ssv2": dict(stride=2, flip=False),
    "k400": dict(stride=4),
}  # fmt: skip

COLLAPSED = 0.05  # `features` of `spread` below this (ours): a new network has 0.4 to 0.6


# ------------------------------------------------------------------------------------------- views


def view_transforms(size: int, smallest: float, flip: bool) -> list[v2.Transform]:
    """Augmentation of the first and of the second view, each the same for all frames of a clip.

    MoCo v3's, which is BYOL's: crop of `smallest` to all of the area, resized to size x size,
    colour jitter, grey, blur, in the second view solarization, with `flip` mirroring.
    """
    # Colours alone would tell most videos apart. Jitter and grey clips make the network look at
    # more. The blur's kernel reaches three times the largest sigma, which is in pixels.
    blur = v2.GaussianBlur(13, sigma=(0.1, 2.0))
    grey = v2.ColorJitter(saturation=(0.0, 0.0))  # v2.RandomGrayscale leaves videos as they are
    flips = [v2.RandomHorizontalFlip()] if flip else []
    return [
        v2.Compose([
            v2.RandomResizedCrop(size, scale=(smallest, 1.0), antialias=True),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
            v2.RandomApply([grey], p=0.2),
            v2.RandomApply([blur], p=blurred),
            v2.RandomSolarize(128, p=solarized),
            *flips,
        ])
        for blurred, solarized in ((1.0, 0.0), (0.1, 0.2))
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------- model


class BatchNorm(nn.BatchNorm1d):
    """BatchNorm over all processes: nn.SyncBatchNorm needs GPUs. There are no running averages."""

    def __init__(self, dim: int, affine: bool):
        super().__init__(dim, affine=affine, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        """(b, D) of this process -> (b, D) float32."""
        x = x.float()
        x = x - MeanOver.apply(x.mean(dim=0))
        x = x * (MeanOver.apply(x.square().mean(dim=0)) + self.eps).rsqrt()
        return x if self.weight is None else x * self.weight + self.bias


class MeanOver(torch.autograd.Function):
    """The mean of a tensor over all processes. So is its gradient."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        mean = x / engine.processes()
        if engine.processes() > 1:
            dist.all_reduce(mean)
        return mean

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return MeanOver.apply(grad)


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers, each with BatchNorm. ReLU between them; the last BatchNorm has no weights."""
    layers = []
    for width, following in pairwise(widths):
        layers += [nn.Linear(width, following, bias=False), BatchNorm(following, True), nn.ReLU()]
    return nn.Sequential(*layers[:-2], BatchNorm(widths[-1], False))


class MoCo(nn.Module):
    """Encoder, projector and predictor make queries; a momentum encoder and projector make keys.

    Arguments as of VideoMAE; `hidden` and `out` are the widths of projector and predictor.
    """

    def __init__(self, size, video_size, cube, positions, hidden, out):
        super().__init__()
        encoder = dict(size=size, video_size=video_size, cube=cube, positions=positions)
        self.config = encoder | dict(hidden=hidden, out=out)  # goes into the checkpoint
        s = SIZES[size]
        self.encoder = Encoder(s["dim"], s["depth"], s["heads"], video_size, cube, positions)
        # The cube embedding stays random: MoCo v3 found that training it makes training unstable.
        self.encoder.patch_embed.requires_grad_(False)
        self.projector = mlp(s["dim"], hidden, hidden, out)
        self.predictor = mlp(out, hidden, out)
        self.momentum_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.momentum_projector = copy.deepcopy(self.projector).requires_grad_(False)

    def forward(self, clips: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Clips (2b, T, C, H, W), the views of a video side by side -> queries, keys, features.

        Queries and keys (2, b, out), features of the encoder (2, b, D), float32. Only queries have
        gradients.
        """
        features = self.encoder(clips).float().mean(dim=1).unflatten(0, (-1, 2)).unbind(dim=1)
        # BatchNorm sees one view at a time, as in the official code.
        queries = torch.stack([self.predictor(self.projector(x)) for x in features])
        with torch.no_grad():
            targets = self.momentum_encoder(clips).float().mean(dim=1).unflatten(0, (-1, 2))
            keys = torch.stack([self.momentum_projector(x) for x in targets.unbind(dim=1)])
        return queries, keys, torch.stack(features).detach()

    @torch.no_grad()
    def follow(self, momentum: float) -> None:
        """Move the momentum encoder and projector towards the trained ones."""
        for name, weight in self.named_parameters():
            if name.startswith("momentum_"):
                weight.lerp_(self.get_parameter(name.removeprefix("momentum_")), 1 - momentum)


# -------------------------------------------------------------------------------------------- loss


def gather(x: Tensor) -> Tensor:
    """Rows (2, b, D) of this process -> those of all, (2, B, D), without gradients."""
    if engine.processes() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(engine.processes())]
    dist.all_gather(parts, x)
    return torch.cat(parts, dim=1)


def contrastive_loss(queries: Tensor, keys: Tensor, temperature: float) -> Tensor:
    """InfoNCE in both directions (paper, Algorithm 1): which of all keys is of the same video?

    Queries (2, b, out) of this process's videos, keys (2, B, out) of all: each of both views.
    """
    # From the first view's queries to the second view's keys, and the other way round.
    similarity = F.normalize(queries, dim=2) @ F.normalize(keys, dim=2).flip(0).mT  # (2, b, B)
    b = queries.shape[1]
    right = torch.arange(b, device=queries.device) + engine.rank() * b
    # cross_entropy is the mean of both directions, so the first 2 makes it their sum. The factor
    # 2 * temperature keeps the size of gradients at any temperature (MoCo v3).
    logits = similarity.flatten(0, 1) / temperature
    return 2 * 2 * temperature * F.cross_entropy(logits, right.repeat(2))


@torch.no_grad()
def spread(keys: Tensor, features: Tensor) -> dict[str, Tensor]:
    """What shows whether the network collapses, of keys (2, B, out) and features (2, B, D) of all.

    alignment    mean squared distance of a video's two keys: 0 alike, 2 unrelated
    uniformity   log of the mean of exp(-2 * squared distance) of different videos' keys: 0 all the
                 same, near -4 spread evenly (both: Wang & Isola 2020, of vectors of length 1)
    deviation    of the keys, brought to length 1: 0 all the same, 1 spread evenly (SimSiam)
    features     that of the features
    """
    keys, features = F.normalize(keys, dim=2), F.normalize(features, dim=2)
    pairs = torch.pdist(keys[0]).square()
    return dict(
        alignment=(keys[0] - keys[1]).square().sum(dim=1).mean(),
        uniformity=pairs.mul(-2).exp().mean().log(),
        deviation=keys[0].std(dim=0).mean() * keys.shape[2] ** 0.5,
        features=features[0].std(dim=0).mean() * features.shape[2] ** 0.5,
    )


def main(argv: list[str]) -> None:
    preset, cfg = engine.parse_config(Config, argv, __doc__, PRESETS)
    name, device = cfg.name or f"contrast-{preset}", engine.setup(cfg.device)

    # Two clips of each video, each at its own time.
    found = prepare.training_videos(preset, cfg.data, cfg.splits, cfg.fold, cfg.missing)
    rule = partial(sample_clip, frames=cfg.frames, stride=cfg.stride)
    views = view_transforms(cfg.resolution, cfg.smallest, cfg.flip)
    pairs = Videos(found, rule, views, cfg.repeats)
    cfg = fit_to_set(preset, cfg, len(pairs))
    # A clip is told from the others of its batch. So there must be others, and a batch is one pass:
    # gradient accumulation would tell it from fewer.
    if cfg.batch < 2:
        raise ValueError("one video has no others to be told from: contrast.py needs two or more")

    # AdamW. No weight decay on vectors, as in the other stages. The official code decays all.
    torch.manual_seed(cfg.seed)
    clip = (cfg.frames, cfg.resolution, cfg.resolution)
    how = (cfg.size, clip, cfg.cube, cfg.positions, cfg.hidden, cfg.out)
    model = speed.place(MoCo(*how), device)
    learned = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in learned if p.ndim > 1]
    vectors = [p for p in learned if p.ndim == 1]
    groups = [dict(params=matrices, weight_decay=cfg.weight_decay), dict(params=vectors)]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)

    run = Run("contrast", name, cfg, model, optimizer, pairs, device)
    loader = make_loader(pairs, run.order, cfg.workers, device.type == "cuda")
    for step in run.steps():
        # The momentum encoder follows ever more slowly, and in the end not at all. It does so
        # before it makes keys (official code), so a checkpoint holds all that the next step needs.
        model.follow(engine.cosine_lr(step, run.total, 0, cfg.momentum, 1.0))
        for clips, _ in run.passes(loader):  # a single one
            with run.autocast():
                queries, keys, features = run.net(clips)
            # A query chooses among the keys of all processes. Its own is of the other view. The
            # keys come without gradients: only queries learn.
            keys = gather(keys)
            run.backward(contrastive_loss(queries, keys, cfg.temperature))
        model.more = spread(keys, gather(features))  # for the log
        if step == 0:  # the loss of outputs that are all the same
            run.log.write(constant_loss=4 * cfg.temperature * math.log(cfg.batch))
        # Linear warm-up to the peak, then half a cosine down to 0. The peak grows with the batch.
        peak = cfg.base_lr * cfg.batch / 256
        if run.update(engine.cosine_lr(step, run.total, run.warmup, peak, 0.0)):
            visualize.plot_log(run.folder)
            if model.more["features"] < COLLAPSED:
                what = "the network has collapsed, its features are nearly all the same"
                run.say(f"{what}: try a lower --base-lr, or a larger --batch")
    run.close()


if __name__ == "__main__":
    engine.cli(main)
