"""Masks: exact counts, tube constancy, independence between clips, reproducibility, errors."""

import pytest
import torch

from masking import MASKS, frame_mask, num_masked, random_mask, running_cell_mask, tube_mask

GRID = (8, 14, 14)


@pytest.mark.parametrize("ratio, per_slot", [(0.5, 98), (0.75, 147), (0.8, 156), (0.9, 176), (0.95, 186)])
def test_tube_masks_the_same_places_in_every_slot(ratio, per_slot):
    mask = tube_mask(5, GRID, ratio).view(5, 8, 196)
    assert (mask.sum(dim=2) == per_slot).all()
    assert (mask == mask[:, :1]).all()


@pytest.mark.parametrize("ratio, masked", [(0.75, 1176), (0.9, 1411), (0.95, 1489)])
def test_random_masks_exactly(ratio, masked):
    mask = random_mask(5, GRID, ratio).view(5, 8, 196)
    assert (mask.sum(dim=(1, 2)) == masked).all()
    assert not (mask == mask[:, :1]).all()


def test_frame_masks_whole_slots():
    mask = frame_mask(5, GRID, 0.875).view(5, 8, 196)
    assert (mask.all(dim=2) == mask.any(dim=2)).all()
    assert (mask.all(dim=2).sum(dim=1) == 7).all()
    assert (~mask).sum() == 5 * 196


@pytest.mark.parametrize("name", MASKS)
def test_generator_decides_and_clips_differ(name):
    draw = lambda seed: MASKS[name](16, GRID, 0.75, torch.Generator().manual_seed(seed))
    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert len(draw(1).unique(dim=0)) > 8
    assert draw(1).dtype == torch.bool and draw(1).shape == (16, 1568)


def test_every_place_is_masked_equally_often():
    share = tube_mask(4000, (1, 4, 4), 0.75, torch.Generator().manual_seed(0)).float().mean(dim=0)
    assert (share - 0.75).abs().max() < 0.03  # four standard deviations


def test_rounding_is_not_hurt_by_binary_fractions():
    assert num_masked(100, 0.29) == 29 and num_masked(196, 0.9) == 176


@pytest.mark.parametrize("ratio", [0, 1, 0.001, 1.5, -0.1])
@pytest.mark.parametrize("name", MASKS)
def test_impossible_ratios_are_refused_with_numbers(name, ratio):
    with pytest.raises(ValueError, match=str(ratio)):
        MASKS[name](1, (8, 4, 4), ratio)


def test_masks_live_on_the_device_asked_for():
    assert tube_mask(2, GRID, 0.9, device="meta").device.type == "meta"


def test_running_cells_move_on_as_published():
    """The table of VideoMAE V2 at half: the cell of slots 0 to 3, of a clip that begins at 0; 1 is left out."""
    table = [[[1, 0], [0, 1]], [[0, 0], [1, 1]], [[0, 1], [1, 0]], [[1, 1], [0, 0]]]
    masks = running_cell_mask(64, GRID, 0.5).view(64, 8, 7, 2, 7, 2)
    cells = masks[:, :, 0, :, 0]
    assert (masks == cells[:, :, None, :, None]).all()  # the same in every place
    assert (cells[:, 4:] == cells[:, :4]).all()
    begins = {tuple(cell[0].flatten().tolist()) for cell in cells}
    assert len(begins) == 4  # each clip begins somewhere
    first = next(cell for cell in cells if cell[0].tolist() == table[0])
    assert first[:4].int().tolist() == table


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
def test_running_cells_leave_out_the_same_share_of_every_tube_mask(ratio):
    tube, skipped = tube_mask(9, GRID, 0.9), running_cell_mask(9, GRID, ratio)
    assert (skipped.sum(dim=1) == ratio * 1568).all()
    assert ((tube & ~skipped).sum(dim=1) == (1 - ratio) * 1408).all()  # 704 at half, as published


@pytest.mark.parametrize("ratio, grid", [(0.6, GRID), (0.5, (2, 4, 4)), (0.5, (4, 3, 4))])
def test_running_cells_that_do_not_fit_are_refused(ratio, grid):
    with pytest.raises(ValueError, match="not .* of .x"):
        running_cell_mask(1, grid, ratio)
