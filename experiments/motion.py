"""Does a classifier see motion? Test it on clips whose frames are shuffled, reversed, or one frame.

    python -m experiments.motion --checkpoint runs/NAME/checkpoint.pt --data FOLDER --splits LIST

The accuracy that is lost is the part of the motion, or of its order. Prints top-1 for each order of
the frames: the mean of the softmax scores of `clips` clips per video, as in fine-tuning.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

import finetune
from data import read_split
from lib import engine
from lib.engine import opt
from lib.evaluate import WindowViews
from lib.weights import load_model


@dataclass
class Config:
    checkpoint: str | None = opt(None, "weights of finetune.py")
    data: str | None = opt(None, "folder of the videos")
    splits: str | None = opt(None, "list of the test videos, lines `path label`")
    clips: int = opt(5, "test clips per video", 1)
    seed: int = opt(0, "of the shuffled frames", 0)


def orders(frames: int, generator: torch.Generator) -> dict[str, Tensor]:
    """The orders of a clip's frames that are tested, each as indices (T,)."""
    forward = torch.arange(frames)
    return {
        "as it is": forward,
        "shuffled": torch.randperm(frames, generator=generator),
        "reversed": forward.flip(0),
        "one frame": torch.full((frames,), frames // 2),
    }


@torch.no_grad()
def main(argv: list[str]) -> None:
    _, cfg = engine.parse_config(Config, argv, __doc__, {"": {}})
    if not cfg.checkpoint:
        raise ValueError("name --checkpoint")
    model, about = load_model(cfg.checkpoint, classifier=True)
    split = read_split(cfg.data, cfg.splits)
    how = finetune.Config(clips=cfg.clips, crops=1)
    how, _, _ = finetune.settle_clips(how, "own", about, cfg.checkpoint, trained=True)
    generator = torch.Generator().manual_seed(engine.derive_seed("motion", cfg.seed))
    hits = {}
    for clips, label in zip(WindowViews(split.paths, how), split.labels, strict=True):
        if isinstance(clips, str):
            raise ValueError(clips)
        for name, order in orders(how.frames, generator).items():
            scores = model(clips[:, order]).softmax(dim=1).mean(dim=0)
            hits.setdefault(name, []).append(int(scores.argmax()) == label)
    for name, right in hits.items():
        print(f"{name}: top-1 {100 * sum(right) / len(right):.1f} % of {len(right)} test videos")


if __name__ == "__main__":
    engine.cli(main)
