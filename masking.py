"""Which cubes are hidden. One function a strategy; a new one is one function and one entry in MASKS.

Every function maps (batch, grid, ratio) to a (B, N) bool mask, True = masked, over the N = t*h*w tokens
of the grid (t slots in time, h rows, w columns), token index n = (time*h + row)*w + column. Each clip
of the batch gets a mask of its own, and all clips mask the same number of tokens, so that they stack.

    tube_mask    one spatial mask for all slots (paper section 3.3): no cube can be copied from another time
    random_mask  any cubes (paper Table 1b, "random")
    frame_mask   whole slots (paper Table 1b, "frame")

running_cell_mask, no entry of MASKS, hides tokens from the decoder, beyond the paper.
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


def running_cell_mask(
    batch: int, grid: Grid, ratio: float, generator: torch.Generator | None = None, device="cpu"
) -> Tensor:
    """Which tokens the decoder leaves out: (B, N) bool, a share `ratio` (0.25, 0.5 or 0.75) of them, evenly spread.

    VideoMAE V2 (Wang et al., CVPR 2023), section 3.2: of each 2 x 2 cell of places, 4*ratio are left out; from one slot
    to the next the choice moves on by one, so that over four slots every place is decoded equally often, and with tube
    masks in every clip the same number of masked ones. Each clip begins elsewhere. Same arguments as tube_mask; raises
    ValueError for another ratio and for a grid that such cells do not fill.
    """
    t, h, w = grid
    if ratio not in (0.25, 0.5, 0.75) or t % 4 or h % 2 or w % 2:
        raise ValueError(
            f"decoder masking leaves out 0.25, 0.5 or 0.75 of a grid with slots in fours, rows and columns in pairs, "
            f"not {ratio} of {t}x{h}x{w}"
        )
    begin = torch.randint(4, (batch, 1, 1), generator=generator, device=device)
    slot, place = torch.arange(t, device=device)[:, None], torch.arange(4, device=device)
    # (B, t, 4): of a cell, row by row; + 1 as in the published table.
    cells = (place + begin + 1 + slot) % 4 < 4 * ratio
    return cells.unflatten(2, (2, 2)).repeat(1, 1, h // 2, w // 2).flatten(1)


MASKS = {"tube": tube_mask, "random": random_mask, "frame": frame_mask}
