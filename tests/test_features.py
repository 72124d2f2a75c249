"""Standardised features, the source's prior and the exchangeable mask: each by hand or by a second route."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import draw_faces
from torch import nn
from torch.nn import functional
from upath import UPath

from cafe.data.indexing import index_files
from cafe.data.manifest import Manifest
from cafe.data.readers import DATASETS
from cafe.errors import UserError
from cafe.learning.checkpoints import load_checkpoint, save_checkpoint
from cafe.learning.loading import FaceDataset
from cafe.learning.training import Training, fit, predict, prepare
from cafe.methods import METHODS
from cafe.methods.features import FeatureMethod, Standardisation
from cafe.methods.method import Inputs, Method, apply_overrides
from cafe.towers.weights import read_tensors, write_tensors
from cafe.views.drawing import ViewPlan

PLAN = ViewPlan("paper", 0, 3, "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
CPU = torch.device("cpu")
WIDTH = 14
READERS = [name for name, method in METHODS.items() if issubclass(method, FeatureMethod)]


@dataclass(frozen=True)
class DrawnFeatures:
    """Frozen features that differ in scale, a little from view to view, and by expression in one channel."""

    labels: np.ndarray

    def read(self, rows: np.ndarray, view: int) -> dict[str, np.ndarray]:
        scale, shift = np.linspace(0.1, 3, WIDTH), np.linspace(-2, 5, WIDTH)
        noise = np.stack([np.random.default_rng((int(row), view)).normal(size=WIDTH) for row in rows])
        pooled = noise * scale + shift
        pooled[:, 3] = self.labels[rows]
        pooled[:, 5] = 2.0
        grid = pooled[:, :, None, None] + np.arange(4).reshape(2, 2)
        return {"pooled": pooled.astype(np.float32), "map": grid.astype(np.float32)}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder = draw_faces(tmp_path_factory.mktemp("faces"), per_class=20)
    return index_files("tiny", DATASETS["folder"](UPath(folder))).manifest


def new_training(name: str, manifest: Manifest, *overrides: str) -> Training:
    recipe = replace(METHODS[name].published_recipe("rafdb"), batch_size=16)
    recipe = apply_overrides(recipe, overrides, name)
    torch.manual_seed(0)
    method = METHODS[name](recipe, Inputs(WIDTH, image_size=32, grid=(2, 2), sources=2))
    features, domains = DrawnFeatures(manifest.labels), np.arange(len(manifest)) % 2
    dataset = FaceDataset(manifest, PLAN, method.needs, 32, features, domains=domains)
    return Training(method, method, method.optimizer(), dataset, manifest.rows("train"), 0, CPU)


# --- standardised features -------------------------------------------------------------------------------------------


def test_raw_features_leave_the_state_dict_as_it_is(manifest: Manifest) -> None:
    method = new_training("linear_probe", manifest).method
    assert set(method.state_dict()) == {"classifier.weight", "classifier.bias"}
    assert isinstance(method.standardise, nn.Identity)


@pytest.mark.parametrize("name", [name for name in READERS if METHODS[name].trained])
def test_training_sees_standardised_features_and_keeps_the_statistics(
    name: str, manifest: Manifest, tmp_path: Path
) -> None:
    training = new_training(name, manifest, "features=standardised")
    prepare(training.method, training.dataset, training.rows, 0, CPU)
    key = {"map": "map", "features": "pooled"}[training.method.array()]
    clean = training.dataset.features.read(training.rows, 0)[key]
    axes = (0, 2, 3) if key == "map" else 0
    state = training.method.state_dict()
    np.testing.assert_allclose(state["standardise.mean"], clean.mean(axes, dtype=float), rtol=1e-6)
    expected = clean.std(axes, dtype=float)
    expected[5] = expected[5] if key == "map" else np.inf
    np.testing.assert_allclose(state["standardise.std"], expected, rtol=1e-6)
    seen = training.method.read({training.method.array(): torch.from_numpy(clean)}).double().numpy()
    varying = [channel for channel in range(WIDTH) if np.isfinite(expected[channel])]
    np.testing.assert_allclose(seen.mean(axes)[varying], 0, atol=1e-6)
    np.testing.assert_allclose(seen.std(axes)[varying], 0.5, rtol=1e-6)
    training.run_epoch(1)
    assert torch.equal(training.method.state_dict()["standardise.mean"], state["standardise.mean"])

    save_checkpoint(UPath(tmp_path), training.method, training.optimizer, {})
    write_tensors(UPath(tmp_path / "model.safetensors"), training.method.state_dict())
    resumed, loaded = (new_training(name, manifest, "features=standardised") for _ in range(2))
    load_checkpoint(UPath(tmp_path), resumed.method, resumed.optimizer)
    loaded.method.load_state_dict(read_tensors(UPath(tmp_path / "model.safetensors")))
    rows = manifest.rows("test")
    predictions = [predict(each.method, each.dataset, rows, CPU) for each in (training, resumed, loaded)]
    assert np.array_equal(predictions[0], predictions[1])
    assert np.array_equal(predictions[0], predictions[2])


def test_a_channel_that_never_varies_in_the_source_is_zero_everywhere() -> None:
    features = torch.full((100, 2), 0.1)
    features[:, 1] = torch.arange(100.0)
    statistics = Standardisation(2)
    statistics.fit([features[:30], features[30:]])
    target = torch.tensor([[7.0, 49.5], [-3.0, 49.5 + 99]])
    assert statistics(target)[:, 0].tolist() == [0, 0]
    assert statistics(target)[:, 1].tolist() == pytest.approx([0, 99 / np.sqrt((100**2 - 1) / 12) / 2])


def test_statistics_are_taken_without_decoding_a_picture(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    training = new_training("cafe", manifest, "features=standardised")
    gone = replace(training.dataset, manifest=replace(manifest, root="/nowhere"))
    prepare(training.method, gone, training.rows, 0, CPU)
    assert training.method.state_dict()["standardise.std"].isfinite().sum() == WIDTH - 1


def test_class_means_are_those_of_standardised_features(manifest: Manifest) -> None:
    training = new_training("nearest_class_mean", manifest, "features=standardised")
    method, train = training.method, training.rows
    fit(method, training.dataset, train, CPU)
    clean = training.dataset.features.read(train, 0)["pooled"].astype(float)
    deviation = np.where(np.arange(WIDTH) == 5, np.inf, clean.std(0))
    standard = (clean - clean.mean(0)) / deviation * 0.5
    standard /= np.linalg.norm(standard, axis=1, keepdims=True)
    for label in np.unique(manifest.labels[train]):
        mean = standard[manifest.labels[train] == label].mean(axis=0)
        np.testing.assert_allclose(method.means[label], mean / np.linalg.norm(mean), atol=1e-5)


@pytest.mark.parametrize("name", ["zero_shot", "ofer", "scn", "image_only"])
def test_others_have_no_such_setting(name: str) -> None:
    with pytest.raises(UserError, match=f"Unknown setting of {name} 'features'"):
        apply_overrides(METHODS[name].recipe_type(), ["features=standardised"], name)


# --- the source's prior ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [1.0, 0.75])
def test_the_adjusted_losses_are_those_of_logits_plus_the_logarithm_of_the_prior(
    strength: float, manifest: Manifest
) -> None:
    changes = ("prior=adjusted", f"prior_strength={strength}", "batch_size=1000")
    training = new_training("linear_probe", manifest, *changes)
    rows, labels = training.rows, manifest.labels
    shares = np.bincount(labels[rows], minlength=7).clip(1) / len(rows)
    features = torch.from_numpy(training.dataset.features.read(rows, 1)["pooled"])
    with torch.no_grad():
        logits = training.method.classifier(features).double() + torch.from_numpy(strength * np.log(shares))
    expected = functional.cross_entropy(logits, torch.from_numpy(labels[rows])).item()
    assert training.run_epoch(1)["train/total"] == pytest.approx(expected, rel=1e-6)
    test = manifest.rows("test")
    (batch,) = training.dataset.load([test], 0, CPU)
    with torch.no_grad():
        plain = training.method(batch)["logits"].softmax(dim=1).numpy()
    np.testing.assert_array_equal(predict(training.method, training.dataset, test, CPU), plain)


def test_an_expression_without_faces_has_a_finite_prior(manifest: Manifest) -> None:
    prior = new_training("linear_probe", manifest, "prior=adjusted").log_prior
    assert prior.isfinite().all()
    assert prior.min() == pytest.approx(-np.log(len(manifest.rows("train"))))


@pytest.mark.parametrize("prior", ["source", "balanced"])
def test_other_priors_add_nothing_to_the_logits(prior: str, manifest: Manifest) -> None:
    assert new_training("linear_probe", manifest, f"prior={prior}").log_prior.tolist() == [0] * 7


def test_the_separation_of_cafe_is_adjusted_with_its_classifier(manifest: Manifest) -> None:
    losses = [new_training("cafe_vector", manifest, f"prior={prior}").run_epoch(1) for prior in ("source", "adjusted")]
    for name in ("classification", "separation"):
        assert losses[1][f"train/{name}"] < losses[0][f"train/{name}"] - 0.05  # three of seven expressions have faces
    assert losses[1]["train/diverse"] == pytest.approx(losses[0]["train/diverse"], abs=1e-3)


def test_a_method_without_training_takes_no_prior() -> None:
    with pytest.raises(UserError, match="zero_shot is not trained, so it cannot take prior=adjusted: leave it out"):
        apply_overrides(METHODS["zero_shot"].recipe_type(), ["prior=adjusted"], "zero_shot")


# --- what the mask is worth ------------------------------------------------------------------------------------------


def build(name: str, **recipe: object) -> Method:
    torch.manual_seed(0)
    return METHODS[name](METHODS[name].recipe_type(**recipe), Inputs(WIDTH, image_size=32))


def test_a_vector_masks_every_face_alike_and_learns() -> None:
    method, features = build("cafe_vector"), torch.rand(5, WIDTH) + 0.5
    assert sum(value.numel() for value in method.parameters()) == WIDTH + 7 * WIDTH + 7
    assert torch.equal(method({"features": features})["masked"], features * 0.5)
    with torch.no_grad():
        method.vector[2] = 100.0
    assert torch.equal(method.make_mask({"features": features})[:, 2], torch.ones(5))
    method({"features": features})["logits"].square().sum().backward()
    assert method.vector.grad.abs().min() >= 0
    assert method.vector.grad.abs().sum() > 0


def test_a_mask_from_the_features_is_a_linear_layer_of_them() -> None:
    method, features = build("cafe_self"), torch.rand(5, WIDTH)
    mask = torch.sigmoid(features @ method.gate.weight.T + method.gate.bias)
    torch.testing.assert_close(method({"features": features})["masked"], mask * features)


def test_the_separation_head_classifies_by_the_largest_channel_of_each_group() -> None:
    method = build("cafe_vector", classifier="separation")
    features = torch.arange(14.0)[None]
    assert method({"features": features})["logits"].tolist() == [[0.5, 1.5, 2.5, 3.5, 4.5, 5.5, 6.5]]
    assert set(method.state_dict()) == {"vector"}


def test_the_hidden_layer_of_the_mlp() -> None:
    method, features = build("mlp"), torch.rand(5, WIDTH)
    first, last = (layer for layer in method.classifier if isinstance(layer, nn.Linear))
    hidden = (features @ first.weight.T + first.bias).clamp(min=0)
    torch.testing.assert_close(method({"features": features})["logits"], hidden @ last.weight.T + last.bias)
    assert hidden.shape == (5, 512)


@pytest.mark.parametrize("name", ["cafe_vector", "cafe_self", "mlp", "linear_probe"])
def test_these_look_at_no_picture(name: str) -> None:
    assert METHODS[name].needs == {"features"}
