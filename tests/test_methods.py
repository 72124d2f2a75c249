"""Every method, on every synthetic domain: two steps, a file, and the same predictions from it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from upath import UPath

from cafe.data.indexing import index_files
from cafe.data.manifest import Manifest
from cafe.data.readers import DATASETS
from cafe.learning.loading import FaceDataset
from cafe.learning.masks import measure_heat_maps, measure_masks
from cafe.learning.training import Training, fit, predict, prepare
from cafe.methods import METHODS
from cafe.methods.cafe import Cafe
from cafe.methods.method import Inputs, Method
from cafe.synthetic.domains import DOMAINS, write
from cafe.towers.building import load_backbone
from cafe.towers.embedding import Embedder
from cafe.towers.weights import read_tensors, write_tensors
from cafe.views.drawing import POLICIES, ViewPlan

CPU = torch.device("cpu")
SIZE = 32  # pixels
QUICK = {name: {"mae_epochs": 2, "detector_epochs": 2} for name in ("ofer", "ofer_own")}


def plan_for(method: type[Method]) -> ViewPlan:
    return ViewPlan(method.policy, 0, 2, "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.fixture(scope="module", params=DOMAINS)
def domain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder = tmp_path_factory.mktemp("faces")
    write(folder, request.param, 28)
    return index_files(request.param, DATASETS["synthetic"](UPath(folder / request.param))).manifest


@pytest.fixture(scope="module")
def features(domain: Manifest, tiny_tower: str) -> Embedder:
    return Embedder(load_backbone(tiny_tower), domain, plan_for(METHODS["cafe"]), "cpu", maps=True, dtype="float32")


@pytest.mark.parametrize("name", METHODS)
def test_two_steps_and_the_same_predictions_from_its_file(
    name: str, domain: Manifest, features: Embedder, small_network: str, tmp_path: Path
) -> None:
    method_type = METHODS[name]
    recipe = replace(method_type.recipe_type(), batch_size=11, **QUICK.get(name, {}))
    grid = features.tower.facts.map_shape[1:] if features.tower.facts.map_shape else None
    network = "resnet18" if domain.name == "studio" else small_network
    inputs = Inputs(features.tower.facts.width, network, image_size=SIZE, backbone=features.tower.name, grid=grid)
    method_type.check(inputs)
    torch.manual_seed(0)
    method = method_type(recipe, inputs)
    dataset = FaceDataset(domain, plan_for(method_type), method.needs, SIZE, features)
    rows, test = domain.rows("train"), domain.rows("test")
    steps: list[tuple[int, int]] = []
    if method.trained:
        prepare(method, dataset, rows, 0, CPU)
        before = {key: value.detach().clone() for key, value in method.named_parameters() if value.requires_grad}
        training = Training(method, method, method.optimizer(), dataset, rows, 0, CPU)
        metrics = training.run_epoch(1, lambda done, total: steps.append((done, total)))
        assert steps == [(1, 2), (2, 2)]
        assert all(np.isfinite(value) for value in metrics.values())
        unmoved = [key for key, value in method.named_parameters() if key in before and torch.equal(value, before[key])]
        assert unmoved == []
    else:
        fit(method, dataset, rows, CPU)
    probabilities = predict(method, dataset, test, CPU)
    assert probabilities.shape == (7, 7)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
    assert np.ptp(probabilities, axis=1).min() > 0

    write_tensors(UPath(tmp_path / "model.safetensors"), method.state_dict())
    torch.manual_seed(1)
    again = method_type(recipe, inputs)
    again.load_state_dict(read_tensors(UPath(tmp_path / "model.safetensors")))
    np.testing.assert_allclose(predict(again, dataset, test, CPU), probabilities, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_names_a_policy_and_is_in_the_table_of_methods(name: str) -> None:
    assert METHODS[name].policy in POLICIES
    table = (Path(__file__).parents[1] / "docs" / "methods.md").read_text(encoding="utf-8")
    rows = [line for line in table.splitlines() if line.startswith(f"| `{name}` |")]
    assert len(rows) == 1


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder = tmp_path_factory.mktemp("classes")
    write(folder, "studio", 112)
    return index_files("studio", DATASETS["synthetic"](UPath(folder / "studio"))).manifest


CLASSES = {count: tuple(f"kind {number}" for number in range(count)) for count in (3, 5, 8)}


@pytest.mark.parametrize("count", CLASSES)
@pytest.mark.parametrize("name", METHODS)
def test_a_step_and_predictions_with_any_number_of_classes(
    name: str, count: int, drawn: Manifest, tiny_tower: str, small_network: str
) -> None:
    labels = pa.array(np.arange(len(drawn)) % count, pa.int8())
    table = drawn.table.set_column(drawn.table.column_names.index("label"), "label", labels)
    manifest = replace(drawn, table=table, classes=CLASSES[count])
    method_type = METHODS[name]
    features = Embedder(load_backbone(tiny_tower), manifest, plan_for(method_type), "cpu", maps=True, dtype="float32")
    recipe = replace(method_type.recipe_type(), batch_size=16, **QUICK.get(name, {}))
    if method_type.trained:
        recipe = replace(recipe, prior="adjusted")  # which has a share of each class
    shape = features.tower.facts.map_shape
    inputs = Inputs(
        features.tower.facts.width, small_network, image_size=SIZE, backbone=tiny_tower,
        grid=shape[1:] if shape else None, classes=manifest.classes,
    )  # fmt: skip
    torch.manual_seed(0)
    method = method_type(recipe, inputs)
    dataset = FaceDataset(manifest, plan_for(method_type), method.needs, SIZE, features)
    rows, test = manifest.rows("train")[:16], manifest.rows("test")
    if method.trained:
        prepare(method, dataset, rows, 0, CPU)
        training = Training(method, method, method.optimizer(), dataset, rows, 0, CPU)
        assert training.log_prior.exp().sum().item() == pytest.approx(1)
        assert all(np.isfinite(value) for value in training.run_epoch(1).values())
    else:
        fit(method, dataset, rows, CPU)
    probabilities = predict(method, dataset, test, CPU)
    assert probabilities.shape == (len(test), count)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
    if isinstance(method, Cafe):
        some = test[manifest.labels[test] != 1]  # a class without faces has no mask
        masks = measure_masks(method, dataset, some, CPU)
        assert list(masks) == [shown for number, shown in enumerate(manifest.classes) if number != 1]
        assert np.ptp(np.array(list(masks.values()))) < 1
    if name == "cafe_map":
        maps = measure_heat_maps(method, dataset, test, CPU)
        shown = [manifest.sample_ids.index(sample) for sample in maps["sample_ids"]]
        assert maps["classes"] == list(manifest.name_classes(np.array(shown))) == list(manifest.classes)
        assert np.shape(maps["heats"]) == (count, *(shape or ())[1:])
