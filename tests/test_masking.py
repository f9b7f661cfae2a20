"""Masks: exact counts, tubes, independence between clips, reproducibility, errors."""

import pytest
import torch

from masking import MASKS, num_masked, tube_mask

GRID = (8, 14, 14)


def draw(name, batch, ratio, grid=GRID, seed=0):
    video = torch.empty(batch, 1)  # strategies that do not look at it need its length and device
    return MASKS[name](video, grid, ratio, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "name, ratio, masked",
    [
        *(("tube", r, 8 * n) for r, n in ((0.5, 98), (0.75, 147), (0.8, 156))),
        *(("tube", r, 8 * n) for r, n in ((0.9, 176), (0.95, 186))),
        *(("random", r, n) for r, n in ((0.75, 1176), (0.9, 1411), (0.95, 1489))),
        ("frame", 0.875, 1372),
    ],
)  # fmt: skip
def test_counts_are_exact_and_structured(name, ratio, masked):
    mask = draw(name, 5, ratio)
    assert mask.shape == (5, 1568) and mask.dtype == torch.bool
    assert (mask.sum(dim=1) == masked).all()
    steps = mask.view(5, 8, 196)
    assert bool((steps == steps[:, :1]).all()) == (name == "tube")
    assert bool((steps.all(dim=2) == steps.any(dim=2)).all()) == (name == "frame")


@pytest.mark.parametrize("name", MASKS)
def test_the_generator_decides_and_clips_differ(name):
    assert torch.equal(draw(name, 16, 0.75, seed=1), draw(name, 16, 0.75, seed=1))
    assert not torch.equal(draw(name, 16, 0.75, seed=1), draw(name, 16, 0.75, seed=2))
    assert len(draw(name, 16, 0.75).unique(dim=0)) > 8
    torch.manual_seed(3)  # without a generator, torch's global one
    first = MASKS[name](torch.empty(4, 1), GRID, 0.75)
    torch.manual_seed(3)
    assert torch.equal(first, MASKS[name](torch.empty(4, 1), GRID, 0.75))


def test_every_place_is_masked_equally_often():
    share = draw("tube", 4000, 0.75, (1, 4, 4)).float().mean(dim=0)
    assert (share - 0.75).abs().max() < 0.03  # four standard deviations


def test_rounding_is_not_hurt_by_binary_fractions():
    assert num_masked(100, 0.29) == 29 and num_masked(196, 0.9) == 176


@pytest.mark.parametrize("ratio", [0, 1, 0.001, 1.5, -0.1])
@pytest.mark.parametrize("name", MASKS)
def test_impossible_ratios_are_refused_with_numbers(name, ratio):
    with pytest.raises(ValueError, match=str(ratio)):
        draw(name, 1, ratio, (8, 4, 4))


def test_masks_live_on_the_device_of_the_video():
    assert tube_mask(torch.empty(2, 1, device="meta"), GRID, 0.9).device.type == "meta"
