"""Every method, on every synthetic domain: two steps, a file, and the same predictions from it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import complaint
from upath import UPath

from cafe.data.indexing import index_files
from cafe.data.manifest import Manifest
from cafe.data.readers import DATASETS
from cafe.learning.loading import FaceDataset
from cafe.learning.masks import measure_heat_maps, measure_masks
from cafe.learning.training import Training, describe_faces, fit, predict, prepare
from cafe.methods import METHODS
from cafe.methods.cafe import Cafe
from cafe.methods.method import Inputs, Method, apply_overrides
from cafe.methods.rul import Rul
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


@pytest.fixture(scope="module")
def domains(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Manifest]:
    """Every synthetic domain by its name."""
    folder = tmp_path_factory.mktemp("faces")
    for name in DOMAINS:
        write(folder, name, 28)
    return {name: index_files(name, DATASETS["synthetic"](UPath(folder / name))).manifest for name in DOMAINS}


@pytest.fixture(scope="module")
def embedders(domains: dict[str, Manifest], tiny_tower: str) -> dict[str, Embedder]:
    """What embeds the faces of each domain."""
    tower, plan = load_backbone(tiny_tower), plan_for(METHODS["cafe"])
    return {name: Embedder(tower, domain, plan, "cpu", maps=True, dtype="float32") for name, domain in domains.items()}


# Every method on every domain; OFER, whose two networks of its own take seconds, on one in colour and on the grey one.
DRAWN = [(domain, name) for domain in DOMAINS for name in METHODS if domain in ("studio", "grey") or name not in QUICK]


@pytest.mark.parametrize(("drawn_as", "name"), DRAWN)
def test_two_steps_and_the_same_predictions_from_its_file(
    name: str,
    drawn_as: str,
    domains: dict[str, Manifest],
    embedders: dict[str, Embedder],
    small_network: str,
    tmp_path: Path,
) -> None:
    domain, features = domains[drawn_as], embedders[drawn_as]
    method_type = METHODS[name]
    recipe = replace(method_type.recipe_type(), batch_size=11, **QUICK.get(name, {}))
    grid = features.tower.facts.map_shape[1:] if features.tower.facts.map_shape else None
    network = "resnet18" if domain.name == "studio" else small_network
    width, backbone = features.tower.facts.width, features.tower.name
    inputs = Inputs(width, network, image_size=SIZE, backbone=backbone, grid=grid, sources=2)
    method_type.check(inputs)
    torch.manual_seed(0)
    method = method_type(recipe, inputs)
    sources = np.arange(len(domain)) % 2  # for those that compare sources
    dataset = FaceDataset(domain, plan_for(method_type), method.needs, SIZE, features, domains=sources)
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
    further = describe_faces(again, dataset, test, CPU)
    assert further.keys() == ({"uncertainty"} if name == "rul" else set())
    if isinstance(again, Rul):
        (batch,) = dataset.load([test], 0, CPU)
        log_variance = again.log_variance(again.branch(batch["image"])).detach().numpy()
        np.testing.assert_allclose(further["uncertainty"], np.exp(log_variance).mean(axis=1), rtol=1e-5)


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
        grid=shape[1:] if shape else None, classes=manifest.classes, sources=2,
    )  # fmt: skip
    torch.manual_seed(0)
    method = method_type(recipe, inputs)
    domains = np.arange(len(manifest)) % 2
    dataset = FaceDataset(manifest, plan_for(method_type), method.needs, SIZE, features, domains=domains)
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


# --- heads -----------------------------------------------------------------------------------------------------------


def new_head(name: str, *overrides: str, width: int = 24) -> Method:
    method = METHODS[name]
    torch.manual_seed(0)
    return method(apply_overrides(method.recipe_type(), overrides, name), Inputs(width))


def test_dropout_zeroes_channels_in_training_alone_and_its_weights_are_named_as_without() -> None:
    plain, dropping = new_head("mlp"), new_head("mlp", "input_dropout=0.5", "dropout=0.25")
    assert {name: value.tolist() for name, value in plain.state_dict().items()} == {
        name: value.tolist() for name, value in dropping.state_dict().items()
    }
    assert list(plain.state_dict()) == [f"classifier.{layer}.{part}" for layer in (0, 2) for part in ("weight", "bias")]
    kept = list[torch.Tensor]()
    hidden = dict(dropping.named_modules())["classifier.dropout"]
    hidden.register_forward_hook(
        lambda _, inputs, output: kept.append(output[inputs[0] > 0] / inputs[0][inputs[0] > 0])
    )
    batch = {"features": torch.randn(400, 24)}
    dropping.train()(batch)
    assert (kept[0] == 0).float().mean().item() == pytest.approx(0.25, abs=0.02)
    assert kept[0].max().item() == pytest.approx(1 / 0.75)  # what is left is scaled up
    torch.testing.assert_close(dropping.eval()(batch)["logits"], plain.eval()(batch)["logits"], rtol=0, atol=0)


def test_a_head_is_trained_by_the_optimiser_schedule_and_labels_of_its_recipe() -> None:
    method = new_head("linear_probe", "optimizer=adamw", "schedule=cosine", "epochs=4", "label_smoothing=0.1")
    assert type(method.optimizer()) is torch.optim.AdamW
    assert type(new_head("linear_probe").optimizer()) is torch.optim.Adam
    np.testing.assert_allclose([method.learning_rate_factor(epoch) for epoch in (1, 2, 3)], [1, 0.5 + 0.5**1.5, 0.5])
    logits = torch.tensor([[2.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    share = np.exp(2) / (np.exp(2) + 6)
    expected = -(0.9 + 0.1 / 7) * np.log(share) - 0.1 * 6 / 7 * np.log((1 - share) / 6)
    assert method.losses({"logits": logits}, {"label": torch.tensor([0])})["total"].item() == pytest.approx(expected)


def test_cafe_takes_a_hidden_layer_behind_its_mask_which_may_be_made_through_few_channels() -> None:
    method = new_head("cafe_self", "classifier=mlp", "hidden=5", "mask_channels=3").eval()
    assert sum(value.numel() for value in method.parameters()) == 24 * 3 + 3 + 3 * 24 + 24 + 24 * 5 + 5 + 5 * 7 + 7
    batch = {"features": torch.randn(2, 24)}
    weights = method.state_dict()
    gate = torch.relu(batch["features"] @ weights["gate.0.weight"].T + weights["gate.0.bias"])
    masked = batch["features"] * torch.sigmoid(gate @ weights["gate.2.weight"].T + weights["gate.2.bias"])
    hidden = torch.relu(masked @ weights["classifier.0.weight"].T + weights["classifier.0.bias"])
    logits = hidden @ weights["classifier.2.weight"].T + weights["classifier.2.bias"]
    torch.testing.assert_close(method(batch)["logits"], logits)


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("cafe", ("hidden=64",), "classifier=mlp too"),
        ("mlp", ("dropout=1",), "a share below 1"),
        ("mlp", ("hidden=0",), "at least one channel"),
        ("mlp", ("prior_strength=0.5",), "set prior=adjusted too"),
        ("linear_probe", ("dropout=0.5",), "Unknown setting of linear_probe"),
        ("cafe", ("dropped=10",), "leave it out, which drops 10 of 73"),
        ("cafe", ("classifier=separation", "input_dropout=0.1"), "a setting of a layer"),
        ("scn", ("high_share=70",), "below 1, not 70"),
        ("rul", ("dropout=1",), "a share below 1, not 1.0: give 0.4"),
        ("ofer", ("step=0",), "at least one epoch, not 0"),
    ],
)
def test_a_setting_that_means_nothing_to_a_method_is_one_sentence(
    name: str, overrides: tuple[str, ...], message: str
) -> None:
    method = METHODS[name]
    assert message in complaint(
        lambda: method.check_recipe(apply_overrides(method.recipe_type(), overrides, name), name)
    )
