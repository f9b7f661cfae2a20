"""The picture of docs/method.md: masks, what encoder and decoder get, and the target, of one video.

python -m experiments.method VIDEO FIGURE.png
"""

import torch
from torch import Tensor

from lib import engine
from masking import MASKS
from model import normalize_cubes, patchify, to_float
from visualize import draw_columns, load_clip, unpatchify

GRID, CUBE = (8, 14, 14), (2, 16, 16)


def pictures(clip: Tensor, ratio: float = 0.75, seed: int = 0) -> list[tuple[str, Tensor]]:
    """Columns (title, frames (T, C, H, W) float 0-1) of a clip (1, 16, C, 224, 224)."""
    cubes, masks = patchify(to_float(clip), CUBE), {}
    for name, strategy in MASKS.items():
        masks[name] = strategy(clip, GRID, ratio, torch.Generator().manual_seed(seed))[..., None]
    hidden = masks["tube"]
    # The visible cubes of each time step, moved to its beginning.
    steps, places = GRID[0], GRID[1] * GRID[2]
    order = hidden.view(steps, places).byte().argsort(dim=1, stable=True)
    order = (order + places * torch.arange(steps)[:, None]).flatten()
    token = torch.tensor([1.0, 0.6, 0.2]).repeat(cubes.shape[2] // 3)
    target = normalize_cubes(cubes)[0] / 5 + 0.5  # most of it is then in 0-1
    found = {
        "a clip": cubes,
        **{f"{name} mask\n{ratio:.0%}": torch.where(masks[name], 0.5, cubes) for name in masks},
        "the encoder gets\nvisible cubes": torch.where(hidden, 1.0, cubes)[:, order],
        "the decoder gets\nmask tokens, too": torch.where(hidden, token, cubes),
        "the target\nnormalised cubes": torch.where(hidden, target, 0.5),
    }
    return [(title, unpatchify(c, GRID, CUBE)[0].clamp(0, 1)) for title, c in found.items()]


def main(argv: list[str]) -> None:
    if len(argv) != 2:
        raise ValueError("name a video and the PNG to write")
    columns = pictures(load_clip(argv[0], frames=16, size=224, stride=4))
    draw_columns(columns, slice(0, 16, 2), argv[1], dpi=100)
    print(f"wrote {argv[1]}")


if __name__ == "__main__":
    engine.cli(main)
