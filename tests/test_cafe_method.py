"""CAFE's parts, by hand."""

from __future__ import annotations

import pytest
import torch

from cafe.data.expressions import EIGHT
from cafe.errors import UserError
from cafe.methods import METHODS
from cafe.methods.cafe import Recipe, apply_mask, cafe_losses, draw_kept_channels, pool_groups, resize_channels
from cafe.methods.cafe_map import resize_map
from cafe.methods.method import Inputs


def test_each_group_gives_its_largest_channel_and_the_remainder_is_left_out() -> None:
    masked = torch.arange(16.0)[None]  # 16 = 7 × 2 + 2
    assert pool_groups(masked, 7).tolist() == [[1, 3, 5, 7, 9, 11, 13]]
    assert pool_groups(masked, 3).tolist() == [[4, 9, 14]]  # 16 = 3 × 5 + 1
    assert pool_groups(masked, 8).tolist() == [[1, 3, 5, 7, 9, 11, 13, 15]]


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
    keep = draw_kept_channels(512, 7, Recipe().dropped, torch.Generator().manual_seed(0))
    groups = [*keep[: 6 * 73].reshape(6, 73), keep[6 * 73 :]]
    assert [int(group.sum()) for group in groups] == [63] * 6 + [64]
    again = draw_kept_channels(512, 7, Recipe().dropped, torch.Generator().manual_seed(1))
    assert not torch.equal(keep, again)


def test_other_numbers_of_classes_share_the_channels_in_the_same_way() -> None:
    """Of 512 channels 64 for each of eight classes, of which 9 (64 · 10 / 73 rounded) are dropped; 170 for each of three."""
    eight = draw_kept_channels(512, 8, Recipe().dropped, torch.Generator().manual_seed(0))
    assert [int(group.sum()) for group in eight.reshape(8, 64)] == [64 - 9] * 8
    three = draw_kept_channels(512, 3, Recipe().dropped, torch.Generator().manual_seed(0))
    assert [int(group.sum()) for group in three.split([170, 170, 172])] == [170 - 23, 170 - 23, 172 - 23]
    losses = cafe_losses(torch.zeros(3, 3), torch.full((3, 7), 0.5), torch.tensor([0, 1, 2]), torch.ones(7), Recipe())
    assert losses["separation"].item() == pytest.approx(1.0986123, abs=1e-6)  # ln 3
    assert losses["diverse"].item() == pytest.approx(1 - 0.5 / 2)  # two channels a class, one left over


def test_a_tower_with_fewer_channels_than_classes_is_one_sentence() -> None:
    with pytest.raises(UserError, match="for each of 8 classes, and has 7: take a wider tower or layer"):
        METHODS["cafe_vector"](Recipe(), Inputs(7, classes=EIGHT))


def test_widths_that_differ_are_averaged_down_or_interpolated_up() -> None:
    values = torch.tensor([[1.0, 3.0, 5.0, 7.0]])
    assert resize_channels(values, 4).tolist() == values.tolist()
    assert resize_channels(values, 2).tolist() == [[2.0, 6.0]]
    assert resize_channels(values[:, :2], 4).tolist() == [[1.0, 1.5, 2.5, 3.0]]


def test_maps_are_fitted_position_by_position() -> None:
    values = torch.arange(16.0).reshape(1, 4, 2, 2)  # channel c at position p is 4 c + p
    assert torch.equal(resize_map(values, (4, 2, 2)), values)
    assert resize_map(values, (2, 2, 2))[0, :, 1, 0].tolist() == [4.0, 12.0]  # channels 0 and 1, 2 and 3 at position 2
    assert resize_map(values, (4, 1, 1)).flatten().tolist() == [1.5, 5.5, 9.5, 13.5]
    assert resize_map(values, (4, 4, 4)).shape == (1, 4, 4, 4)
    torch.testing.assert_close(resize_map(values, (4, 4, 4)).mean((2, 3)), values.mean((2, 3)))


def test_the_map_method_masks_every_position_before_it_averages() -> None:
    torch.manual_seed(0)
    method = METHODS["cafe_map"](Recipe(), Inputs(14)).eval()
    batch = {"image": torch.rand(2, 3, 64, 64), "map": torch.rand(2, 14, 2, 2)}
    mask = torch.stack([
        torch.stack([resize_channels(position, 14) for position in spatial.flatten(1).T[:, None]], -1)[0].reshape(14, 2, 2)
        for spatial in method.branch(batch["image"])
    ]).sigmoid()  # fmt: skip
    output = method(batch)
    torch.testing.assert_close(method.make_mask(batch), mask)
    torch.testing.assert_close(output["masked"], (mask * batch["map"]).mean(dim=(2, 3)))
    torch.testing.assert_close(output["logits"], method.classifier(output["masked"]))


@pytest.mark.parametrize("width", [512, 768, 1280, 20])
@pytest.mark.parametrize("network", ["resnet18", "resnet50"])
def test_any_tower_fits_any_image_branch(network: str, width: int) -> None:
    """Widths that 7 does not divide, above and below the branch's 512 or 2048 channels."""
    method = METHODS["cafe"](Recipe(), Inputs(width, network))
    batch = {"image": torch.rand(2, 3, 32, 32), "features": torch.rand(2, width), "label": torch.tensor([0, 6])}
    output = method(batch)
    assert method.make_mask(batch).shape == output["masked"].shape == (2, width)
    losses = method.losses(output, {**batch, "generator": torch.Generator().manual_seed(0), "log_prior": 0})
    losses["total"].backward()
    assert float(method.branch.trunk.conv1.weight.grad.abs().sum()) > 0


@pytest.mark.parametrize(("mask", "expected"), [("sigmoid", 1.0), ("linear", 0.0), ("none", 2.0)])
def test_the_mask_and_its_ablations(mask: str, expected: float) -> None:
    assert apply_mask(torch.tensor([[2.0]]), torch.tensor([[0.0]]), mask).item() == expected
