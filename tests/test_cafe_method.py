"""CAFE's parts, by hand."""

from __future__ import annotations

import pytest
import torch

from cafe.methods.cafe import Recipe, apply_mask, cafe_losses, draw_kept_channels, pool_groups, resize_channels


def test_each_group_gives_its_largest_channel_and_the_remainder_is_left_out() -> None:
    masked = torch.arange(16.0)[None]  # 16 = 7 × 2 + 2
    assert pool_groups(masked).tolist() == [[1, 3, 5, 7, 9, 11, 13]]


def test_the_losses_of_a_worked_example() -> None:
    """Two channels per class; with all logits equal a cross-entropy is ln 7."""
    masked = torch.full((3, 14), 0.5)
    labels = torch.tensor([0, 3, 6])
    recipe = Recipe(separation=1.5, diverse=5.0)
    losses = cafe_losses(torch.zeros(3, 7), masked, labels, torch.ones(14), recipe)
    log7 = 1.9459101
    expected = {"classification": log7, "separation": log7, "diverse": 1 - 0.5 / 2, "total": log7 * 2.5 + 5 * 0.75}
    assert {name: value.item() for name, value in losses.items()} == pytest.approx(expected, abs=1e-6)
    summed = cafe_losses(torch.zeros(3, 7), masked, labels, torch.ones(14), Recipe(diverse_form="sum"))
    assert summed["diverse"].item() == pytest.approx(1 - 7 * 0.5 / 2)


def test_dropped_channels_play_no_part_in_separation() -> None:
    masked = torch.zeros(1, 14)
    masked[0, 0] = 9.0
    keep = torch.ones(14)
    keep[0] = 0
    losses = cafe_losses(torch.zeros(1, 7), masked, torch.tensor([0]), keep, Recipe())
    assert losses["separation"].item() == pytest.approx(1.9459101, abs=1e-6)
    assert losses["diverse"].item() == pytest.approx(1 - 9 / 7 / 2)


def test_ten_of_73_channels_are_dropped_in_every_group_as_in_the_released_script() -> None:
    keep = draw_kept_channels(512, Recipe().dropped, torch.Generator().manual_seed(0))
    groups = [*keep[: 6 * 73].reshape(6, 73), keep[6 * 73 :]]
    assert [int(group.sum()) for group in groups] == [63] * 6 + [64]
    again = draw_kept_channels(512, Recipe().dropped, torch.Generator().manual_seed(1))
    assert not torch.equal(keep, again)


def test_widths_that_differ_are_averaged_down_or_interpolated_up() -> None:
    values = torch.tensor([[1.0, 3.0, 5.0, 7.0]])
    assert resize_channels(values, 4).tolist() == values.tolist()
    assert resize_channels(values, 2).tolist() == [[2.0, 6.0]]
    assert resize_channels(values[:, :2], 4).tolist() == [[1.0, 1.5, 2.5, 3.0]]


@pytest.mark.parametrize(("mask", "expected"), [("sigmoid", 1.0), ("linear", 0.0), ("none", 2.0)])
def test_the_mask_and_its_ablations(mask: str, expected: float) -> None:
    assert apply_mask(torch.tensor([[2.0]]), torch.tensor([[0.0]]), mask).item() == expected
