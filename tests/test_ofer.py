"""OFER: what is flagged, what is painted in its place, and how the face is read, by hand and by a second route."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from cafe.errors import UserError
from cafe.methods.method import Inputs
from cafe.methods.occlusion import SMALLEST, MaskedAutoencoder, OcclusionDetector
from cafe.methods.ofer import AttentionHead, Ofer, OferOwn, Recipe, find_region, keep_top_half, merge_heads
from cafe.randomness import random_generator
from cafe.synthetic.camera import plant
from cafe.synthetic.domains import render
from cafe.synthetic.face import CameraPose
from cafe.synthetic.person import draw_person
from cafe.towers.building import load_backbone
from cafe.views.pixels import normalise

GREY = (0.5, 0.5, 0.5)


def draw_latents(count: int, seed: int = 0) -> Tensor:
    """Latents (count, 4, 6) whose four positions differ in their mean."""
    generator = torch.Generator().manual_seed(seed)
    means = 5 * torch.eye(4, 6)
    return means + torch.randn(count, 4, 6, generator=generator)


def fitted_detector(latents: Tensor, passes: int = 5, quantile: float = 0.95) -> OcclusionDetector:
    torch.manual_seed(0)
    detector = OcclusionDetector(latents.shape[2], latents.shape[1])
    detector.fit(lambda number: latents.split(50), passes, quantile)
    return detector


# --- detection -------------------------------------------------------------------------------------------------------


def test_distances_and_flags_of_a_worked_example() -> None:
    detector = OcclusionDetector(2, 2)
    detector.embed = nn.Sequential(nn.Identity())
    detector.mean.copy_(torch.tensor([[1.0, 0.0], [3.0, 1.0]]))
    detector.scale.copy_(torch.tensor([1.0, 2.0]))
    detector.centre = torch.tensor([0.0, 1.0])
    latents = torch.tensor([[[1.0, 2.0], [4.0, 5.0]]])  # standardised: (0, 1) and (1, 2)
    assert detector(latents).tolist() == [[0.0, 2.0]]
    assert detector.flag(latents).tolist() == [[False, False]]  # before it is fitted
    detector.radius.fill_(1.9)
    assert detector.flag(latents).tolist() == [[False, True]]


def test_means_deviations_centre_and_radius_are_those_of_the_training_patches() -> None:
    latents = draw_latents(200)
    detector = fitted_detector(latents, passes=0, quantile=0.9)
    torch.testing.assert_close(detector.mean, latents.mean(dim=0))
    torch.testing.assert_close(detector.scale, latents.var(dim=0, correction=0).mean(dim=0).sqrt())
    centre = detector.embed(detector.standardise(latents)).mean(dim=(0, 1))
    large = centre.abs() >= SMALLEST
    assert 0 < large.sum() < len(large)
    torch.testing.assert_close(detector.centre[large], centre[large])
    torch.testing.assert_close(detector.centre[~large], SMALLEST * centre[~large].sign())
    distances = np.sort(detector(latents).flatten().numpy())
    assert detector.radius.item() == pytest.approx(np.interp(0.9 * 799, np.arange(800), distances))
    assert detector.flag(latents).sum() == 80


def test_training_draws_the_patches_to_the_centre_without_moving_it() -> None:
    latents = draw_latents(200)
    before, after = (fitted_detector(latents, passes) for passes in (0, 5))
    assert torch.equal(before.centre, after.centre)
    assert after(latents).mean() < 0.5 * before(latents).mean()
    assert not any(parameter.requires_grad for parameter in after.parameters())
    assert after.embed(torch.zeros(1, 6)).abs().max() == 0  # no biases, by which all could be mapped onto the centre


def test_planted_latents_are_flagged_and_so_is_what_is_usual_elsewhere() -> None:
    detector = fitted_detector(draw_latents(400))
    latents = draw_latents(100, seed=1)
    assert detector.flag(latents).float().mean() == pytest.approx(0.05, abs=0.03)
    planted = latents.clone()
    planted[:, 2] += 4 * torch.randn(6, generator=torch.Generator().manual_seed(2)).sign()
    assert detector.flag(planted)[:, 2].float().mean() > 0.95
    assert torch.equal(detector.flag(planted)[:, :2], detector.flag(latents)[:, :2])
    swapped = latents[:, [1, 0, 2, 3]]
    assert detector.flag(swapped)[:, :2].float().mean() > 0.95


# --- reconstruction --------------------------------------------------------------------------------------------------


def new_autoencoder(size: int) -> MaskedAutoencoder:
    torch.manual_seed(0)
    return MaskedAutoencoder(size).eval()


def test_hidden_patches_are_not_looked_at() -> None:
    mae, images = new_autoencoder(24), torch.rand(3, 3, 24, 24)
    hidden = torch.zeros(3, 9, dtype=torch.bool)
    hidden[:, 4] = True
    others = images.clone()
    others[:, :, 8:16, 8:16] = 7.0  # the fifth of nine patches
    torch.testing.assert_close(mae(images, hidden), mae(others, hidden))
    others[:, :, 0, 0] = 7.0
    assert (mae(images, hidden) - mae(others, hidden)).abs().max() > 1e-3


def test_faces_with_different_numbers_of_hidden_patches_do_not_disturb_each_other() -> None:
    mae, images = new_autoencoder(24), torch.rand(3, 3, 24, 24)
    hidden = torch.zeros(3, 9, dtype=torch.bool)
    hidden[0, [0, 3, 7]] = hidden[2, 2:] = True
    alone = torch.cat([mae(image[None], mask[None]) for image, mask in zip(images, hidden, strict=True)])
    torch.testing.assert_close(mae(images, hidden), alone, rtol=1e-4, atol=1e-5)


def test_the_autoencoder_learns_to_guess_hidden_patches() -> None:
    """Faces of one colour each: what is hidden follows from any patch that is not."""
    images = torch.randn(96, 3, 1, 1, generator=torch.Generator().manual_seed(0)).expand(-1, -1, 16, 16).contiguous()
    mae = new_autoencoder(16)
    mae.fit(lambda number: images.split(16), 12)
    with torch.no_grad():
        assert mae.loss(images) < 0.1 * images.var()
    assert not any(parameter.requires_grad for parameter in mae.parameters())


@pytest.mark.parametrize("size", [24, 50])  # whole patches, and none
def test_refilling_paints_flagged_cells_and_leaves_every_other_pixel_untouched(size: int) -> None:
    mae, images = new_autoencoder(size), torch.rand(3, 3, size, size)
    flagged = torch.zeros(3, 2, 2, dtype=torch.bool)
    flagged[1, 0, 1] = flagged[2] = True  # nothing, the upper right, everything
    refilled = mae.refill(images, flagged)
    half = size // 2
    painted = torch.zeros(size, size, dtype=torch.bool)
    painted[:half, half:] = True
    assert torch.equal(refilled[[0, 2]], images[[0, 2]])
    assert torch.equal(refilled[1][:, ~painted], images[1][:, ~painted])
    assert (refilled[1] != images[1])[:, painted].float().mean() > 0.99


def test_nothing_flagged_is_nothing_done() -> None:
    images = torch.rand(2, 3, 24, 24)
    assert new_autoencoder(24).refill(images, torch.zeros(2, 5, 5, dtype=torch.bool)) is images


# --- the classifier --------------------------------------------------------------------------------------------------


def convolve(values: np.ndarray, layer: nn.Conv2d) -> np.ndarray:
    """A convolution of (K, h, w) with zeros around, position by position."""
    weight, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    up, left = weight.shape[2] // 2, weight.shape[3] // 2
    padded = np.pad(values, ((0, 0), (up, up), (left, left)))
    result = np.empty((len(weight), *values.shape[1:]))
    for y, x in np.ndindex(*values.shape[1:]):
        patch = padded[:, y : y + weight.shape[2], x : x + weight.shape[3]]
        result[:, y, x] = (weight * patch).sum(axis=(1, 2, 3)) + bias
    return result


def standardise(values: np.ndarray, norm: nn.BatchNorm2d) -> np.ndarray:
    mean, variance, weight, bias = (
        part.detach().numpy()[:, None, None] for part in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    )
    return (values - mean) / np.sqrt(variance + norm.eps) * weight + bias


def test_the_attention_head_is_the_released_one_step_by_step() -> None:
    torch.manual_seed(0)
    head = AttentionHead(32).eval()
    for module in head.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            for values in (module.running_mean, module.weight.data, module.bias.data):
                values.normal_()
            module.running_var.uniform_(0.5, 2)
        elif isinstance(module, nn.Linear):
            module.weight.data.normal_()  # .001, as it starts, would hide mistakes
    features = torch.randn(2, 32, 3, 4)
    gated, attention = head(features)
    for face, values in enumerate(features.numpy().astype(float)):
        squeeze, norm, _, expand, _ = head.channels
        squeezed = squeeze.weight.detach().numpy() @ values.mean(axis=(1, 2)) + squeeze.bias.detach().numpy()
        squeezed = np.maximum(standardise(squeezed[:, None, None], norm)[:, 0, 0], 0)
        gate = 1 / (1 + np.exp(-(expand.weight.detach().numpy() @ squeezed + expand.bias.detach().numpy())))
        own = values * gate[:, None, None]
        reduced = standardise(convolve(own, head.reduce[0]), head.reduce[1])
        summed = sum(standardise(convolve(reduced, conv), bn) for conv, bn in (head.square, head.row, head.column))
        place = np.maximum(summed, 0).sum(axis=0)
        np.testing.assert_allclose(attention[face].detach().numpy(), place, rtol=1e-4)
        np.testing.assert_allclose(gated[face].detach().numpy(), (own * place).mean(axis=(1, 2)), rtol=1e-3, atol=1e-4)


def test_a_head_starts_as_released() -> None:
    torch.manual_seed(0)
    head = AttentionHead(512)
    assert head.channels[0].weight.std().item() == pytest.approx(0.001, rel=0.05)
    fan_out = 512 * 9
    assert head.square[0].weight.std().item() == pytest.approx(np.sqrt(2 / fan_out), rel=0.01)
    assert head.row[0].bias.abs().max() == head.channels[3].bias.abs().max() == 0


def test_heads_compete_for_every_channel() -> None:
    """Log-softmax across heads, then their sum: ln 1/4 + ln 3/4, and an equal pair is worth 2 ln 1/2."""
    heads = torch.tensor([[[0.0, 5.0], [np.log(3.0), 5.0]]], dtype=torch.float64)
    torch.testing.assert_close(merge_heads(heads), torch.tensor([[np.log(3 / 16), np.log(1 / 4)]]))


def test_the_region_is_the_released_one_and_the_same_part_of_any_grid() -> None:
    released = [14 * row + column for row in range(3, 12) for column in range(3, 11)] + list(range(171, 177))
    assert len(released) == 78
    assert find_region((14, 14)) == released
    assert find_region((7, 7)) == [7 * row + column for row in range(1, 6) for column in range(1, 5)]
    assert find_region((1, 1)) == [0]


def test_the_half_that_is_attended_to_most_is_kept_in_its_place() -> None:
    latents = torch.arange(1.0, 9.0).reshape(1, 4, 2)
    attention = torch.tensor([[[0.1, 0.9], [0.8, 0.2]]])
    assert keep_top_half(latents, attention, (2, 2)).tolist() == [[[0, 0], [3, 4], [5, 6], [0, 0]]]
    spread = keep_top_half(torch.ones(1, 16, 1), attention, (4, 4)).reshape(4, 4)
    assert spread.sum() == 8
    assert spread[0, 3] == spread[3, 0] == 1


# --- the method ------------------------------------------------------------------------------------------------------


def new_method(kind: type[Ofer] = Ofer, **recipe: object) -> Ofer:
    torch.manual_seed(0)
    return kind(Recipe(**recipe), Inputs(6, image_size=32, grid=(2, 2))).eval()


def batch_of(count: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    image = torch.randn(count, 3, 32, 32, generator=generator)
    latents = draw_latents(count)
    latents[0, 1] += 30
    placement = torch.eye(2, 3).expand(count, -1, -1)
    return {"image": image, "map": latents.transpose(1, 2).unflatten(2, (2, 2)), "placement": placement}


def test_a_flagged_patch_is_repainted_and_its_latent_forgotten_but_what_was_erased_stays_erased() -> None:
    method, batch = new_method(), batch_of(3)
    method.detector.load_state_dict(fitted_detector(draw_latents(400), quantile=1.0).state_dict())
    batch["image"][0, :, 4:10, 12:24] = 0  # erased, half of it in the flagged quarter
    image, latents, flagged = method.restore(batch)
    assert flagged.tolist() == [[False, True, False, False], [False] * 4, [False] * 4]
    assert image[0, :, 4:10, 12:24].abs().max() == 0
    assert (image[0] != batch["image"][0])[:, :4, 16:].all()
    assert torch.equal(image[0, :, :, :16], batch["image"][0, :, :, :16])
    assert torch.equal(image[1:], batch["image"][1:])
    assert latents[0, 1].abs().max() == 0
    torch.testing.assert_close(latents[1:], method.detector.standardise(method.read_latents(batch))[1:])
    assert method(batch)["occluded"].tolist() == [[0.25], [0.0], [0.0]]


def test_a_patch_flagged_on_the_clean_face_is_repainted_where_the_mirrored_image_shows_it() -> None:
    method, batch = new_method(), batch_of(2)
    method.detector.load_state_dict(fitted_detector(draw_latents(400), quantile=1.0).state_dict())
    batch["placement"] = torch.tensor([[-1.0, 0, 0], [0, 1, 0]]).expand(2, -1, -1)
    image, _, flagged = method.restore(batch)
    assert flagged[0].tolist() == [False, True, False, False]  # the upper right quarter
    assert (image[0] != batch["image"][0])[:, :16, :16].float().mean() > 0.99
    assert torch.equal(image[0, :, :, 16:], batch["image"][0, :, :, 16:])
    assert torch.equal(image[0, :, 16:], batch["image"][0, :, 16:])


def test_attention_to_a_mirrored_image_is_attention_to_the_other_side_of_the_clean_face() -> None:
    method, attention = new_method(tokens="top"), torch.rand(3, 2, 2)
    mirrored = torch.tensor([[-1.0, 0, 0], [0, 1, 0]]).expand(3, -1, -1)
    torch.testing.assert_close(method.locate(attention, {"placement": mirrored}), attention.flip(2))
    lower = torch.tensor([[1.0, 0, 0], [0, 1, 0.5]]).expand(
        3, -1, -1
    )  # the image shows what lies a quarter further down
    located = method.locate(torch.arange(16.0).reshape(1, 4, 4).expand(3, -1, -1), {"placement": lower})
    torch.testing.assert_close(located[:, 1:], torch.arange(12.0).reshape(1, 3, 4).expand(3, -1, -1))


def test_without_a_fitted_detector_or_a_painter_faces_pass_through() -> None:
    batch = batch_of(2)
    assert torch.equal(new_method().restore(batch)[0], batch["image"])
    method = new_method(mae_epochs=0)
    method.detector.radius.fill_(0.0)
    image, latents, flagged = method.restore(batch)
    assert torch.equal(image, batch["image"])
    assert flagged.all()
    assert latents.abs().max() == 0


@pytest.mark.parametrize("tokens", ["region", "top"])
def test_logits_are_the_released_classifier_of_both_branches(tokens: str) -> None:
    method, batch = new_method(tokens=tokens), batch_of(3)
    features = method.branch(batch["image"])
    heads = torch.stack([head(features)[0] for head in method.heads], dim=1)
    latents = method.detector.standardise(method.read_latents(batch))  # all four patches of 2 × 2 are in the region
    if tokens == "top":
        attention = sum(head(features)[1] for head in method.heads)
        latents = keep_top_half(latents, attention, (2, 2))
    joined = torch.cat([heads.log_softmax(dim=1).sum(dim=1), method.latent(latents.flatten(1))], dim=1)
    torch.testing.assert_close(method(batch)["logits"], method.classifier(joined))


def test_a_face_is_read_the_same_whatever_faces_stand_beside_it() -> None:
    """So the number of workers, who share a batch, does not matter."""
    method, batch = new_method(OferOwn), batch_of(5)
    method.detector.radius.fill_(float(method.detector(method.read_latents(batch)).median()))
    whole = method.restore(batch)
    parts = [method.restore({"image": batch["image"][part]}) for part in (slice(0, 2), slice(2, 5))]
    assert 0 < whole[2].sum() < whole[2].numel()
    for number, values in enumerate(whole):
        torch.testing.assert_close(torch.cat([part[number] for part in parts]), values, rtol=1e-4, atol=1e-4)


def test_the_method_of_its_own_latents_reads_the_refilled_face() -> None:
    method, batch = new_method(OferOwn), batch_of(2)
    method.detector.radius.fill_(float(method.detector(method.read_latents(batch)).median()))
    image, latents, _ = method.restore(batch)
    assert not torch.equal(image, batch["image"])
    torch.testing.assert_close(latents, method.detector.standardise(method.mae.encode(image)))


def test_the_published_recipe_is_sgd_in_tenths() -> None:
    method = new_method()
    optimizer = method.optimizer()
    assert isinstance(optimizer, torch.optim.SGD)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.1, 0.9, 1e-4)
    assert [method.learning_rate_factor(epoch) for epoch in (1, 10, 11, 21)] == pytest.approx([1, 1, 0.1, 0.01])
    assert (method.recipe.epochs, method.recipe.batch_size) == (60, 128)
    trained = {id(parameter) for parameter in group["params"]}
    assert trained.isdisjoint(map(id, [*method.mae.parameters(), *method.detector.parameters()]))


def test_a_quantile_above_one_is_one_sentence() -> None:
    with pytest.raises(UserError, match=r"quantile of OFER lies between 0 and 1, not at 1\.5"):
        new_method(quantile=1.5)


# --- faces -----------------------------------------------------------------------------------------------------------


def test_covered_patches_of_synthetic_faces_lie_further_out_than_free_ones(tiny_tower: str) -> None:
    """Sunglasses, hands and masks, seen by a tower of random weights: an AUC of .86, and 9 times as many flags."""
    tower = load_backbone(tiny_tower)

    def read(faces: list[np.ndarray]) -> Tensor:
        small = np.stack([np.asarray(Image.fromarray(face).resize((32, 32))) for face in faces])
        images = normalise(torch.from_numpy(small), torch.zeros(len(small), 4, dtype=torch.int64), GREY, GREY)
        with torch.no_grad():
            return tower(images, with_map=True)[1].flatten(2).transpose(1, 2)

    latents = read([render(0, "studio", identity, identity % 7, 0) for identity in range(100)])
    covered, shares = [], []
    for number in range(36):
        face = render(0, "studio", 500 + number, number % 7, 0)
        view = CameraPose(0, 0, 0, 0.29 * len(face), (0.5 * len(face), 0.485 * len(face)))
        person = draw_person(random_generator(9, number))
        planted, where = plant(face, ("sunglasses", "hand", "mask")[number % 3], person, view, number)
        covered.append(planted)
        shares.append(np.asarray(Image.fromarray(where).convert("L").resize((4, 4), Image.Resampling.BOX)) / 255)
    share = np.stack(shares).reshape(36, 16)
    detector = fitted_detector(latents, passes=20)
    distances = detector(read(covered)).numpy()
    inside, outside = distances[share > 0.5], distances[share == 0]
    assert len(inside) > 30
    auc = roc_auc_score(np.repeat([1, 0], [len(inside), len(outside)]), np.concatenate([inside, outside]))
    rates = [float((values > detector.radius.item()).mean()) for values in (inside, outside)]
    assert auc > 0.8
    assert rates[0] > 5 * rates[1]


def test_a_planted_thing_lies_where_it_is_said_to_and_nowhere_else() -> None:
    face = render(0, "studio", 3, 0, 0)
    view = CameraPose(0, 0, 0, 0.29 * len(face), (0.5 * len(face), 0.485 * len(face)))
    planted, where = plant(face, "sunglasses", draw_person(random_generator(9, 0)), view, 0)
    np.testing.assert_array_equal(planted[~where], face[~where])
    assert planted[where].max() < 60  # dark lenses
    assert 0.03 < where.mean() < 0.2
