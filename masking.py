"""Which cubes are hidden. One function a strategy; a new one is one function and one entry in MASKS.

Every function maps (batch, grid, ratio) to a (B, N) bool mask, True = masked, over the N = t*h*w tokens
of the grid (t slots in time, h rows, w columns), token index n = (time*h + row)*w + column. Each clip
of the batch gets a mask of its own, and all clips mask the same number of tokens, so that they stack.

    tube_mask    one spatial mask for all slots (paper section 3.3): no cube can be copied from another time
    random_mask  any cubes (paper Table 1b, "random")
    frame_mask   whole slots (paper Table 1b, "frame")
"""

import torch
from torch import Tensor

Grid = tuple[int, int, int]


def num_masked(total: int, ratio: float) -> int:
    """How many of `total` places a ratio masks: floor(ratio * total), the official code's rounding.

    The product gets 1e-6 of slack first, so that 0.29 of 100 is 29 and not, in binary fractions, 28.
    Raises ValueError unless at least one place is masked and at least one stays visible.
    """
    count = int(ratio * total + 1e-6) if 0 <= ratio <= 1 else -1
    if not 0 < count < total:
        raise ValueError(
            f"mask ratio {ratio} does not fit {total} places: at least 1 must be masked and 1 visible, "
            f"so use a ratio of at least 1/{total} and below 1"
        )
    return count


def _shuffled(batch: int, total: int, ratio: float, generator, device) -> Tensor:
    """(B, total) bool with exactly num_masked(total, ratio) True in every row, in random places."""
    order = torch.rand(batch, total, generator=generator, device=device).argsort(dim=1)  # random permutations
    return order < num_masked(total, ratio)


def tube_mask(batch: int, grid: Grid, ratio: float, generator: torch.Generator | None = None, device="cpu") -> Tensor:
    """Hide the same h x w places in every slot: (B, N) bool, num_masked(h*w, ratio) masked a slot.

    The paper (section 3.3) writes Bernoulli(ratio) for each place; like the official code we fix the
    count, because a batch needs equally many visible tokens in every clip. `generator` must live on
    `device`. Raises ValueError for a ratio that masks nothing or everything.
    """
    t, h, w = grid
    return _shuffled(batch, h * w, ratio, generator, device).repeat(1, t)


def random_mask(batch: int, grid: Grid, ratio: float, generator: torch.Generator | None = None, device="cpu") -> Tensor:
    """Hide num_masked(t*h*w, ratio) cubes anywhere in space and time: (B, N) bool. Same arguments as tube_mask."""
    t, h, w = grid
    return _shuffled(batch, t * h * w, ratio, generator, device)


def frame_mask(batch: int, grid: Grid, ratio: float, generator: torch.Generator | None = None, device="cpu") -> Tensor:
    """Hide num_masked(t, ratio) whole slots: (B, N) bool. Same arguments as tube_mask.

    A slot is as many frames as a cube is deep (2), so the paper's "14 of 16 frames" is 7 of 8 slots,
    ratio 0.875. Choosing the visible slots uniformly is our choice: no source says.
    """
    t, h, w = grid
    return _shuffled(batch, t, ratio, generator, device).repeat_interleave(h * w, dim=1)


MASKS = {"tube": tube_mask, "random": random_mask, "frame": frame_mask}
