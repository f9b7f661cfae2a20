"""What evaluation of a model on test videos needs: their views, its scores, accuracies."""

from operator import itemgetter

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from data import SAMPLING, Views, make_loader
from lib import engine


def read_views(paths: list, cfg, device: torch.device):
    """Iterate over (index, test views (K, T, C, H, W) uint8) of this process's share of the videos.

    `cfg` has the fields of finetune.ClipConfig, settled. ValueError for an unreadable video.
    """
    sizes = (cfg.frames, cfg.stride, cfg.clips, cfg.resolution, cfg.crops)
    views = Views(paths, SAMPLING[cfg.sampling][1], *sizes)
    mine = [[i] for i in range(engine.rank(), len(paths), engine.processes())]
    loader = make_loader(views, mine, cfg.workers, device.type == "cuda", collate=itemgetter(0))
    return tqdm(loader, "test videos", len(mine), leave=False, disable=engine.rank() > 0)


@torch.no_grad()
def score_videos(model: nn.Module, paths: list, cfg, device) -> tuple[Tensor, Tensor]:
    """Mean softmax of a video's views (videos, classes), and the class of each view (videos, K).

    Every process gets the scores of all videos, in their order.
    """
    dtype = engine.precision_dtype(cfg.precision, device)
    model.eval()
    found = []
    for index, views in read_views(paths, cfg, device):
        with engine.autocast(device, dtype):
            logits = model(views.to(device, non_blocking=True))
        probabilities = logits.float().softmax(dim=1).cpu()
        found.append((index, probabilities.mean(dim=0), probabilities.argmax(dim=1)))
    model.train()
    if engine.processes() > 1:
        parts = [None] * engine.processes()
        dist.all_gather_object(parts, found)
        found = sorted(sum(parts, []), key=itemgetter(0))
    _, scores, classes = zip(*found, strict=True)
    return torch.stack(scores), torch.stack(classes)


def accuracies(scores: Tensor, views: Tensor, labels: list[int]) -> dict[str, float]:
    """What score_videos returns -> top1, top5, mean of the classes' top1, top1 of views, in %."""
    labels = torch.tensor(labels)
    best = scores.topk(min(5, scores.shape[1])).indices == labels[:, None]
    right = best[:, 0]
    classes = torch.stack([right[labels == label].float().mean() for label in labels.unique()])
    shares = dict(top1=right, top5=best.any(1), class_mean=classes, view=views == labels[:, None])
    return {name: 100 * float(share.float().mean()) for name, share in shares.items()}
