"""Masking: which tokens of a clip the encoder does not see (paper, section 3.3 and Table 1b).

A clip is cut into a grid of t time steps, h rows and w columns. Each of these N = t*h*w cubes is
one token. Its index is n = (time * h + row) * w + column. A masking strategy is a function:

    mask = strategy(video, grid, ratio, generator)

    video      (B, T, C, H, W), the clips; most strategies only use their number and device
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
    """How many of `total` positions to mask: floor(ratio * total), as in the official code.

    Raises ValueError where nothing would be masked or nothing would stay visible.
    """
    # Without the 1e-6, binary fractions would give 28 of 100 positions for the ratio 0.29.
    count = int(ratio * total + 1e-6)
    if not 0 < count < total:
        raise ValueError(
            f"mask ratio {ratio} of {total} positions must mask one and leave one visible"
        )
    return count


def choose(video: Tensor, total: int, ratio: float, generator: Generator = None) -> Tensor:
    """(B, total) bool: in each row, num_masked(total, ratio) random positions are True."""
    noise = torch.rand(len(video), total, generator=generator, device=video.device)
    # Sorting noise gives each row a random permutation of 0 ... total - 1.
    permutation = noise.argsort(dim=1)
    # In each permutation, exactly num_masked entries are below num_masked.
    return permutation < num_masked(total, ratio)


def tube_mask(video: Tensor, grid: Grid, ratio: float, generator: Generator = None) -> Tensor:
    """Tube masking (section 3.3): mask the same positions of the image at all time steps.

    The paper draws each position from Bernoulli(ratio). Like the official code, this masks an exact
    number of positions.
    """
    t, h, w = grid
    # Neighbouring frames are nearly alike. A cube that is hidden at one time step only could be
    # copied from the next one. Behind a tube there is nothing to copy.
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
    # One time step is h*w tokens in a row.
    return choose(video, t, ratio, generator).repeat_interleave(h * w, dim=1)


MASKS = {"tube": tube_mask, "random": random_mask, "frame": frame_mask}
