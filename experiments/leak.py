"""Section 3.2 of the paper: what can be copied under each kind of mask?

    python -m experiments.leak --checkpoint CKPT --data FOLDER --splits LIST --mask tube --out JSON

Writes the PSNR on masked pixels of a model, and of copies of the nearest visible cube, mean over
the videos of a list: for the third of the places that changes least in time ("still"), and for the
third that changes most ("moving").
"""

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

import visualize
from data import read_split
from lib import engine
from lib.engine import opt
from lib.weights import load_model
from masking import MASKS
from model import patchify


@dataclass
class Config:
    checkpoint: str | None = opt(None, "weights of pretrain.py")
    data: str | None = opt(None, "folder of the videos")
    splits: str | None = opt(None, "list of the test videos")
    mask: Literal[tuple(MASKS)] = opt("tube", "masking strategy")
    ratio: float = opt(0.75, "mask ratio")
    seed: int = opt(0, "seed of the masks", 0)
    out: str | None = opt(None, "JSON to write")


def still_and_moving(video: Tensor, cube: tuple[int, int, int]) -> dict[str, Tensor]:
    """Masks of the pixels of a clip (1, T, C, H, W) float, of a third of the places each.

    A place is as wide and high as a cube and spans all frames.
    """
    flat, grid = (1, *cube[1:]), (1, video.shape[3] // cube[1], video.shape[4] // cube[2])
    variance = patchify(video.var(dim=1, correction=0, keepdim=True), flat)  # (1, places, P)
    rank = variance.mean(dim=2, keepdim=True).argsort(dim=1).argsort(dim=1)
    places = rank.shape[1]
    third = max(places // 3, 1)
    chosen = {"still": rank < third, "moving": rank >= places - third}
    return {
        name: visualize.unpatchify(mask.expand_as(variance), grid, flat).expand_as(video)
        for name, mask in chosen.items()
    }


def main(argv: list[str]) -> None:
    _, cfg = engine.parse_config(Config, argv, __doc__, {"": {}})
    if not cfg.checkpoint or not cfg.out:
        raise ValueError("name --checkpoint and --out")
    Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
    model, about = load_model(cfg.checkpoint)
    frames, size, _ = model.encoder.video_size
    scores = defaultdict(list)
    for number, path in enumerate(read_split(cfg.data, cfg.splits).paths):
        clip = visualize.load_clip(path, frames, size, about["stride"])
        generator = torch.Generator().manual_seed(engine.derive_seed("figure", cfg.seed, number))
        mask = MASKS[cfg.mask](clip, model.encoder.grid, cfg.ratio, generator)
        original, hidden, made = visualize.reconstruct(model, clip, mask)
        for part, where in still_and_moving(original, model.encoder.cube).items():
            where = where & hidden
            for key in ("model", "nearest") if where.any() else ():
                scores[f"{key} {part}"].append(visualize.psnr(made[key], original, where))
    psnr = {key: sum(values) / len(values) for key, values in scores.items()}
    engine.write_whole(cfg.out, json.dumps({"mask": cfg.mask, "psnr": psnr}, indent=1) + "\n")
    print(f"wrote {cfg.out}")


if __name__ == "__main__":
    engine.cli(main)
