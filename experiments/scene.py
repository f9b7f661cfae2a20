"""How much does the scene alone tell? A floor for every result on real clips.

    python -m experiments.scene --data FOLDER --train LIST --test LIST

Shrinks the frame in the middle of each video to 16x12 pixels. A test video gets the class of the
training video whose thumbnail is nearest (Euclidean distance). Prints top-1.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as VF

from data import read_split
from lib import engine
from lib.engine import opt
from lib.video import read_frames


@dataclass
class Config:
    data: str | None = opt(None, "folder of the videos")
    train: str | None = opt(None, "list of the training videos, lines `path label`")
    test: str | None = opt(None, "list of the test videos")


def thumbnail(path) -> Tensor:
    """The frame in the middle of a video as 16x12 pixels, (576,) float."""
    frame = read_frames(path, lambda total: [total // 2])
    return VF.resize(frame, [12, 16], antialias=True).flatten().float()


def main(argv: list[str]) -> None:
    _, cfg = engine.parse_config(Config, argv, __doc__, {"": {}})
    train, test = (read_split(cfg.data, part) for part in (cfg.train, cfg.test))
    known, asked = (torch.stack([thumbnail(path) for path in part.paths]) for part in (train, test))
    nearest = torch.cdist(asked, known).argmin(dim=1)
    hits = torch.tensor(train.labels)[nearest] == torch.tensor(test.labels)
    print(f"top-1 {100 * hits.float().mean():.1f} % of {len(hits)} test videos")


if __name__ == "__main__":
    engine.cli(main)
