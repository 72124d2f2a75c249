"""Views are pure functions of (seed, sample_id, view), with the published distributions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy import stats
from torchvision import transforms
from torchvision.transforms import functional

from cafe.views.drawing import POLICIES, ViewPlan, draw_view, turn_picture
from cafe.views.pixels import normalise, scale

RECORDED = ((False, False, (7, 9, 165, 74)), [148, 117, 116])
PAPER = POLICIES["paper"]
IMAGE = np.random.default_rng(0).integers(0, 256, (30, 26, 3), np.uint8)
PLAN = ViewPlan("paper", 0, 5, "bilinear", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@given(st.text(max_size=30), st.integers(0, 2**40), st.integers(1, 2**20))
def test_a_view_is_the_same_whenever_it_is_drawn(sample_id: str, seed: int, view: int) -> None:
    first, box = ViewPlan("paper", seed, 5, "bilinear", PLAN.mean, PLAN.std).render(IMAGE, sample_id, view, 16)
    draw_view(PAPER, seed + 1, sample_id, view).render(IMAGE, 16)  # another view in between
    again, same_box = ViewPlan("paper", seed, 5, "bilinear", PLAN.mean, PLAN.std).render(IMAGE, sample_id, view, 16)
    np.testing.assert_array_equal(first, again)
    assert box == same_box


def test_the_stream_of_numbers_is_the_recorded_one() -> None:
    """Pins the generator: another library version that draws differently would silently change every cache."""
    view = draw_view(PAPER, 3407, "train/anger/1.jpg", 1)
    assert (view.noise is not None, view.flip, view.box(224)) == RECORDED[0]
    picture, _ = ViewPlan("paper", 3407, 5, "bilinear", PLAN.mean, PLAN.std).render(IMAGE, "train/anger/4.jpg", 2, 8)
    assert picture[0, :3, 0].tolist() == RECORDED[1]


def test_view_zero_is_the_clean_image() -> None:
    picture, box = PLAN.render(IMAGE, "x", 0, 26)
    np.testing.assert_array_equal(
        picture, np.asarray(Image.fromarray(IMAGE).resize((26, 26), Image.Resampling.BILINEAR))
    )
    assert box == (0, 0, 0, 0)


def test_a_view_is_the_same_face_at_every_size() -> None:
    for number in range(40):
        view = draw_view(PAPER, 0, f"s{number}", 1)
        small, large = np.array(view.box(64)) / 64, np.array(view.box(512)) / 512
        np.testing.assert_allclose(small, large, atol=1.5 / 64)


def test_tensors_are_what_torchvision_makes_of_the_clean_image() -> None:
    picture, _ = PLAN.render(IMAGE, "x", 0, 20)
    ours = normalise(torch.from_numpy(picture.copy())[None], torch.zeros(1, 4, dtype=torch.int64), PLAN.mean, PLAN.std)[
        0
    ]
    published = transforms.Compose(
        [transforms.Resize((20, 20)), transforms.ToTensor(), transforms.Normalize(PLAN.mean, PLAN.std)]
    )
    torch.testing.assert_close(ours, published(Image.fromarray(IMAGE)), rtol=0, atol=0)


def test_erased_pixels_are_the_mean_colour_and_nothing_else_is() -> None:
    pictures = torch.full((1, 10, 10, 3), 255, dtype=torch.uint8)
    image = normalise(pictures, torch.tensor([[2, 3, 4, 5]]), PLAN.mean, PLAN.std)[0]
    assert image[:, 2:6, 3:8].abs().max() == 0
    assert int((image == 0).sum()) == 3 * 4 * 5


def test_flip_mirrors_the_clean_image() -> None:
    ids = [f"s{number}" for number in range(30)]
    flipped = [sample for sample in ids if draw_view(POLICIES["clean+flip"], 0, sample, 1).flip]
    assert flipped
    plan = ViewPlan("clean+flip", 0, 2, "bilinear", PLAN.mean, PLAN.std)
    np.testing.assert_array_equal(plan.render(IMAGE, flipped[0], 1, 26)[0], plan.render(IMAGE, "x", 0, 26)[0][:, ::-1])


def test_probabilities_are_one_half_and_independent() -> None:
    views = [draw_view(PAPER, 7, f"s{number}", 1 + number % 9) for number in range(4000)]
    events = np.array([(v.noise is not None, v.flip, v.erase is not None) for v in views])
    assert np.abs(events.mean(axis=0) - 0.5).max() < 4 * 0.5 / np.sqrt(len(views))  # four standard errors
    correlations = np.corrcoef(events.T)[np.triu_indices(3, 1)]
    assert np.abs(correlations).max() < 4 / np.sqrt(len(views))


def test_scn_adds_noise_to_a_quarter_flips_another_and_never_does_both() -> None:
    views = [draw_view(POLICIES["scn"], 7, f"s{number}", 1 + number % 9) for number in range(4000)]
    noise, flip, erase = np.array([(v.noise is not None, v.flip, v.erase is not None) for v in views]).T
    assert not (noise & flip).any()
    for events, probability in (
        (noise, 0.25),
        (flip, 0.25),
        (erase, 0.5),
        (noise & erase, 0.125),
        (flip & erase, 0.125),
    ):
        assert abs(events.mean() - probability) < 4 * np.sqrt(probability * (1 - probability) / len(views))


def test_eac_never_flips_a_view_by_chance() -> None:
    views = [draw_view(POLICIES["eac"], 7, f"s{number}", 1 + number % 9) for number in range(1000)]
    noise, flip, erase = np.array([(v.noise is not None, v.flip, v.erase is not None) for v in views]).T
    assert not flip.any()
    assert max(abs(noise.mean() - 0.5), abs(erase.mean() - 0.5)) < 4 * 0.5 / np.sqrt(len(views))


def test_ofer_turns_and_moves_a_fifth_of_the_views_by_up_to_20_degrees_and_a_seventh() -> None:
    views = [draw_view(POLICIES["ofer"], 7, f"s{number}", 1 + number % 9) for number in range(4000)]
    events = np.array([(v.flip, v.erase is not None, v.turn is not None) for v in views])
    errors = 4 * np.sqrt(np.array([0.25, 0.25, 0.16]) / len(views))  # four standard errors
    assert (np.abs(events.mean(axis=0) - (0.5, 0.5, 0.2)) < errors).all()
    assert not any(view.noise for view in views)
    turns = np.array([view.turn for view in views if view.turn]) / (20, 1 / 7, 1 / 7)
    for values in turns.T:
        assert stats.kstest(values, stats.uniform(-1, 2).cdf).pvalue > 1e-3
    assert np.abs(np.corrcoef(turns.T)[np.triu_indices(3, 1)]).max() < 4 / np.sqrt(len(turns))


@pytest.mark.parametrize(("degrees", "down", "right"), [(20.0, 0, 0), (-7.3, 0, 0), (0.0, 3, -4), (12.0, -2, 5)])
def test_a_turned_view_is_what_torchvisions_rotation_and_padded_crop_make(
    degrees: float, down: int, right: int
) -> None:
    picture = np.random.default_rng(1).integers(1, 256, (28, 28, 3), np.uint8)
    padded = functional.pad(functional.rotate(Image.fromarray(picture), degrees), [8])
    expected = functional.crop(padded, 8 - down, 8 - right, 28, 28)
    np.testing.assert_array_equal(turn_picture(picture, degrees, down / 28, right / 28), np.asarray(expected))


def test_a_view_is_turned_after_it_is_mirrored() -> None:
    sample = next(f"s{n}" for n in range(99) if (v := draw_view(POLICIES["ofer"], 0, f"s{n}", 1)).turn and v.flip)
    view = draw_view(POLICIES["ofer"], 0, sample, 1)
    mirrored = np.asarray(Image.fromarray(IMAGE).resize((26, 26), Image.Resampling.BILINEAR))[:, ::-1]
    np.testing.assert_array_equal(view.render(IMAGE, 26), turn_picture(mirrored, *view.turn))


@pytest.mark.parametrize("policy", ["ofer", "paper", "clean"])
def test_the_placement_of_a_view_leads_back_to_the_clean_picture(policy: str) -> None:
    """A picture whose colours say where they stand, so that a view says which place of it every pixel shows."""
    size = 64
    down, across = np.meshgrid(np.arange(size), np.arange(size), indexing="ij")
    picture = np.stack([down * 4, across * 4, np.full_like(down, 255)], axis=2).astype(np.uint8)
    plan = ViewPlan(policy, 0, 2, "bilinear", PLAN.mean, PLAN.std)
    moved = 0
    for sample in (f"s{number}" for number in range(40)):
        view = plan.draw(sample, 1)
        shown = torch.from_numpy(replace(view, noise=None).render(picture, size).copy())
        places = torch.nn.functional.affine_grid(torch.tensor([view.placement()]), [1, 1, size, size], False)[0]
        visible = shown[..., 2] == 255
        found = torch.stack([shown[..., 1], shown[..., 0]], 2).double() / 4  # x, y in pixels of the clean picture
        expected = ((places.double() + 1) * size - 1) / 2
        assert (found - expected)[visible].abs().max() < 1.5
        moved += view.turn is not None
    assert (moved > 2) == (policy == "ofer")


def test_noise_is_gaussian_of_variance_30_before_it_is_truncated() -> None:
    grey = np.full((200, 200, 3), 128, np.uint8)
    sample = next(
        f"s{n}" for n in range(50) if draw_view(PAPER, 0, f"s{n}", 1).noise and not draw_view(PAPER, 0, f"s{n}", 1).flip
    )
    noise = draw_view(PAPER, 0, sample, 1).render(grey, 200).astype(int).ravel() - 128
    levels = np.arange(-15, 16)
    expected = stats.norm.cdf(levels + 1, scale=np.sqrt(30)) - stats.norm.cdf(levels, scale=np.sqrt(30))
    observed = np.array([(noise == level).mean() for level in levels])
    assert np.abs(observed - expected).max() < 5 * np.sqrt(0.073 / noise.size)


def test_erased_rectangles_are_distributed_as_torchvisions() -> None:
    size = 224
    ours = np.array([v.box(size) for v in (draw_view(PAPER, 1, f"s{n}", 1) for n in range(6000)) if v.erase])
    torch.manual_seed(0)
    image = torch.zeros(3, size, size)
    theirs = np.array(
        [transforms.RandomErasing.get_params(image, (0.02, 0.25), (0.3, 3.3), [0.0])[:4] for _ in range(3000)]
    )
    for column in range(4):  # top, left, height, width
        assert stats.ks_2samp(ours[:, column], theirs[:, column]).pvalue > 1e-3
    assert stats.ks_2samp(ours[:, 2] * ours[:, 3], theirs[:, 2] * theirs[:, 3]).pvalue > 1e-3


@pytest.mark.parametrize(
    ("views", "expected"), [(1, [0, 0, 0]), (2, [1, 1, 1]), (4, [1, 2, 3]), (3, [1, 2, 1]), (61, [1, 2, 3])]
)
def test_epochs_use_view_e_and_cycle_when_there_are_fewer(views: int, expected: list[int]) -> None:
    plan = ViewPlan("paper", 0, views, "bilinear", PLAN.mean, PLAN.std)
    assert [plan.view_of(epoch) for epoch in (1, 2, 3)] == expected


def test_tracing_a_graph_leaves_nothing_behind_that_is_computed_with_later() -> None:
    class Scaled(torch.nn.Module):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return scale(pixels, (0.11, 0.22, 0.33), (0.5, 0.6, 0.7))

    pixels = torch.from_numpy(IMAGE[None, :26].copy())  # square
    traced = torch.export.export(Scaled(), (pixels.permute(0, 3, 1, 2).double(),))
    wanted = (IMAGE[:26] / 255 - (0.11, 0.22, 0.33)) / (0.5, 0.6, 0.7)
    found = normalise(pixels, torch.zeros(1, 4, dtype=torch.int64), (0.11, 0.22, 0.33), (0.5, 0.6, 0.7))
    np.testing.assert_allclose(found[0].permute(1, 2, 0), wanted, atol=1e-6)
    (scaled,) = traced.module()(pixels.permute(0, 3, 1, 2).double())
    np.testing.assert_allclose(scaled.permute(1, 2, 0), wanted, atol=1e-6)
