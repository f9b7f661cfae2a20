"""Masking: which tokens of a clip the encoder does not see (paper, section 3.3 and Table 1b).

A clip is cut into cubes, by default of 2 frames x 16 x 16 pixels. So 16 frames of 224 x 224 pixels
become a grid of t = 8 time steps, h = 14 rows and w = 14 columns. Each of N = t*h*w = 1568 cubes is
one token. Its index is n = (time * h + row) * w + column. A masking strategy is a function:

    mask = strategy(video, grid, ratio, generator)

    video      B clips (B, T, C, H, W) uint8; a strategy of your own may look at the pixels
    grid       (t, h, w)
    ratio      share of the tokens to mask, between 0 and 1
    generator  torch.Generator on the device of the video; None: torch's global one
    mask       (B, N) bool, True = masked; each clip has its own

All clips of a batch mask the same number of tokens, so that their visible tokens are one tensor. To
add a strategy, write a function and enter it in MASKS: then `pretrain.py --mask` knows it.
"""

import torch
from torch import Tensor

Grid = tuple[int, int, int]
Generator = torch.Generator | None


def num_masked(total: int, ratio: float) -> int:
    """How many of `total` to mask: floor(ratio * total), the official code's rule.

    Raises ValueError where nothing would be masked or nothing would stay visible.
    """
    # 0.29 * 100 is 28.999999999999996 in floating point. The 1e-6 (ours) makes it 29.
    count = int(ratio * total + 1e-6)
    if not 0 < count < total:
        raise ValueError(f"mask ratio {ratio} must mask at least 1 of {total}, and not all")
    return count


def choose(video: Tensor, total: int, ratio: float, generator: Generator = None) -> Tensor:
    """(B, total) bool: in each row, num_masked(total, ratio) random entries are True."""
    noise = torch.rand(len(video), total, generator=generator, device=video.device)
    # argsort of noise is the numbers 0 ... total - 1 in random order. Entries whose number is below
    # `count` are masked.
    count = num_masked(total, ratio)
    return noise.argsort(dim=1) < count


def tube_mask(video: Tensor, grid: Grid, ratio: float, generator: Generator = None) -> Tensor:
    """Tube masking (section 3.3): mask the same places of the image at all time steps.

    The paper draws each place from Bernoulli(ratio). This masks an exact number (official code).
    """
    t, h, w = grid
    # Neighbouring frames are nearly alike. If a cube were masked at one time step only, the model
    # could copy it from the same place one step later. So all time steps get the same mask. The h*w
    # tokens of a time step are consecutive: `repeat` puts the mask there t times in a row.
    return choose(video, h * w, ratio, generator).repeat(1, t)


def random_mask(video: Tensor, grid: Grid, ratio: float, generator: Generator = None) -> Tensor:
    """Random masking (Table 1b): mask tokens anywhere in space and time."""
    t, h, w = grid
    return choose(video, t * h * w, ratio, generator)


def frame_mask(video: Tensor, grid: Grid, ratio: float, generator: Generator = None) -> Tensor:
    """Frame masking (Table 1b): mask all tokens of some time steps.

    The paper masks 14 of 16 frames: that is 7 of 8 time steps, ratio 0.875.
    """
    t, h, w = grid
    # A time step is h*w tokens in a row.
    return choose(video, t, ratio, generator).repeat_interleave(h * w, dim=1)


MASKS = {"tube": tube_mask, "random": random_mask, "frame": frame_mask}
