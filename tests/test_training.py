"""The plain-torch loops: batches, the shared view, and training that depends on nothing but its seed."""

from __future__ import annotations

import os
import signal
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from functools import partial
from multiprocessing import active_children
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pytest
import torch
from conftest import draw_faces
from upath import UPath

from cafe.data.indexing import index_files
from cafe.data.manifest import Manifest
from cafe.data.readers import DATASETS
from cafe.errors import IncompleteError, UserError
from cafe.learning.checkpoints import load_checkpoint, save_checkpoint
from cafe.learning.loading import FaceDataset, KeptPictures, epoch_order
from cafe.learning.training import Selection, Training, predict, prepare
from cafe.methods import METHODS
from cafe.methods.generalisation.erm import Erm
from cafe.methods.method import Inputs, Recipe, apply_overrides
from cafe.pipeline.plan import find_precision, find_recipe
from cafe.pipeline.process.advice import explain_choices
from cafe.pipeline.settings import TrainSettings
from cafe.towers.building import load_backbone
from cafe.towers.embedding import Embedder
from cafe.views.drawing import ViewPlan

PLAN = ViewPlan("paper", 0, 4, "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
CPU = torch.device("cpu")
# Those of domain generalisation learn from features alone, in test_generalisation.py.
TRAINED = [name for name, method in METHODS.items() if method.trained and not issubclass(method, Erm)]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder = draw_faces(tmp_path_factory.mktemp("faces"), per_class=20)
    return index_files("tiny", DATASETS["folder"](UPath(folder))).manifest


@pytest.fixture(scope="module")
def features(manifest: Manifest, tiny_tower: str) -> Embedder:
    """The tower run on the fly on every view."""
    return Embedder(load_backbone(tiny_tower), manifest, PLAN, "cpu", maps=True, dtype="float32", batch_size=16)


def test_no_face_is_decoded_twice_while_there_is_room(manifest: Manifest) -> None:
    rows, decoded = list(range(10)), list[int]()

    class Counting(Manifest):
        def decode_face(self, row: int, *arguments: Any) -> np.ndarray:
            decoded.append(row)
            return super().decode_face(row, *arguments)

    counting = Counting(**vars(replace(manifest)))
    kept = KeptPictures(counting, room=5 * manifest.read_face(0).nbytes)
    for row in [*rows, *rows[5:]]:
        np.testing.assert_array_equal(kept.read_face(row), manifest.read_face(row))
    assert decoded == rows  # the last five had room
    np.testing.assert_array_equal(kept.read_face(9, "bgr"), manifest.read_face(9)[..., ::-1])
    kept.read_face(5)
    assert decoded == [*rows, 9, 5]  # the one used longest ago went
    whole = FaceDataset(KeptPictures(counting, 10**9), PLAN, frozenset({"image"}), 16)
    plain = replace(whole, manifest=manifest)
    decoded.clear()
    for view in (1, 2):
        ours, theirs = (list(each.load([np.arange(60)], view, CPU)) for each in (whole, plain))
        assert torch.equal(ours[0]["image"], theirs[0]["image"])
    assert sorted(decoded) == list(range(60))


def test_a_face_that_two_threads_decode_at_once_takes_its_room_once(manifest: Manifest) -> None:
    both = Barrier(2, timeout=20)

    class Waiting(Manifest):
        def read_face(self, row: int, *arguments: Any) -> np.ndarray:
            both.wait()
            return super().read_face(row, *arguments)

    kept = KeptPictures(Waiting(**vars(replace(manifest))), room=10**9)
    with ThreadPoolExecutor(2) as pool:
        faces = list(pool.map(kept.read_face, [3, 3]))
    np.testing.assert_array_equal(*faces)
    assert kept.room == 10**9 - faces[0].nbytes


QUICK = {name: {"mae_epochs": 2, "detector_epochs": 2, "quantile": 0.5} for name in ("ofer", "ofer_own")}


def new_training(
    name: str, manifest: Manifest, features: Embedder, seed: int = 0, network: str = "resnet18", **recipe: object
) -> Training:
    method_type = METHODS[name]
    torch.manual_seed(seed)
    method = method_type(
        replace(
            method_type.recipe_type(), **{"batch_size": 16, "learning_rate": 1e-3, **QUICK.get(name, {}), **recipe}
        ),
        Inputs(
            features.tower.facts.width,
            network,
            image_size=32,
            backbone=features.tower.name,
            grid=features.tower.facts.map_shape[1:],
        ),
    )
    method.to(memory_format=torch.channels_last)
    dataset = FaceDataset(manifest, PLAN, method.needs, 32, features)
    return Training(method, method, method.optimizer(), dataset, manifest.rows("train"), seed, CPU)


def choose_network(method: str, small: str) -> str:
    """The image branch that costs a method least: OFER attends to all places of its map, of which the small one has more."""
    return "resnet18" if method in QUICK else small


def weights(training: Training) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in training.method.state_dict().items()}


@pytest.mark.parametrize("name", TRAINED)
def test_every_method_learns_and_names_its_losses(
    name: str, manifest: Manifest, features: Embedder, small_network: str
) -> None:
    training = new_training(name, manifest, features, network=choose_network(name, small_network))
    prepare(training.method, training.dataset, training.rows, 0, CPU)
    first = training.run_epoch(1)
    for epoch in (2, 3):
        last = training.run_epoch(epoch)
    assert last["train/total"] < first["train/total"]
    tenth_after_ten_epochs = name in ("ofer", "ofer_own")
    assert last["learning_rate"] == pytest.approx(1e-3 * (1 if tenth_after_ten_epochs else 0.9**2))
    named = {
        "cafe": {"classification", "separation", "diverse"},
        "scn": {"classification", "rank", "relabelled"},
        "eac": {"classification", "consistency"},
        "ofer": {"occluded"},
    }.get(name, set())
    assert {f"train/{loss}" for loss in named | {"total", "accuracy"}} <= set(last)
    probabilities = predict(training.method, training.dataset, manifest.rows("test"), CPU)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)


def test_a_diverged_training_is_one_sentence(manifest: Manifest, features: Embedder, small_network: str) -> None:
    training = new_training("cafe", manifest, features, network=small_network, learning_rate=1e30)
    with pytest.raises(UserError, match="The loss is NaN or infinite in epoch 1: take a smaller learning rate"):
        training.run_epoch(1)


@pytest.mark.parametrize("name", TRAINED)
def test_a_resumed_training_is_the_uninterrupted_one(
    name: str, manifest: Manifest, features: Embedder, small_network: str, tmp_path: Path
) -> None:
    recipe: dict[str, Any] = {"relabel_after": 0, "relabel_margin": 0.0} if name == "scn" else {}
    recipe["network"] = choose_network(name, small_network)
    whole, first = (new_training(name, manifest, features, **recipe) for _ in range(2))
    for training in (whole, first):
        prepare(training.method, training.dataset, training.rows, 0, CPU)
        training.run_epoch(1)
    expected = whole.run_epoch(2)

    def stop(done: int, total: int) -> None:
        if done == 2 < total:
            save_checkpoint(UPath(tmp_path), first.method, first.optimizer, first.record())
            raise InterruptedError

    with pytest.raises(InterruptedError):  # in the middle of an epoch
        first.run_epoch(2, stop)
    resumed = new_training(name, manifest, features, **recipe)
    record, _ = load_checkpoint(UPath(tmp_path), resumed.method, resumed.optimizer)
    resumed.restore(record)
    assert resumed.step == 2
    if name == "scn":
        assert len(resumed.method.state_dict()["labels._extra_state"]) > 0
    metrics = resumed.run_epoch(2)
    for key in expected.keys() - {"faces_per_second"}:
        assert metrics[key] == expected[key], key
    found = weights(resumed)
    for key, value in weights(whole).items():
        assert torch.equal(value, found[key]), key


def test_the_best_epoch_on_held_out_faces_is_selected_and_survives_a_checkpoint(
    manifest: Manifest, features: Embedder, tmp_path: Path
) -> None:
    training = new_training("linear_probe", manifest, features)
    held_out = manifest.rows("test")
    selection = Selection(held_out)
    accuracies, states = [], []
    for epoch in (1, 2, 3, 4):
        training.run_epoch(epoch)
        accuracies.append(selection.evaluate(training, epoch)["selection/accuracy"])
        states.append(weights(training))
        predicted = predict(training.method, training.dataset, held_out, CPU).argmax(axis=1)
        assert accuracies[-1] == pytest.approx((predicted == manifest.labels[held_out]).mean())
    best = int(np.argmax(accuracies))  # the first among equals
    assert selection.epoch == best + 1
    assert all(torch.equal(value, states[best][name]) for name, value in selection.result(training).items())

    save_checkpoint(UPath(tmp_path), training.method, training.optimizer, {}, selection.weights)
    _, selected = load_checkpoint(UPath(tmp_path), training.method, training.optimizer)
    assert selected.keys() == states[best].keys()
    assert all(torch.equal(value, states[best][name]) for name, value in selected.items())


def test_without_selection_the_last_epoch_is_the_result(manifest: Manifest, features: Embedder) -> None:
    training = new_training("linear_probe", manifest, features)
    selection = Selection(manifest.rows("none"))
    training.run_epoch(1)
    assert selection.evaluate(training, 1) == {}
    assert all(torch.equal(value, weights(training)[name]) for name, value in selection.result(training).items())


def test_affectnet_has_its_own_published_recipe() -> None:
    recipe = METHODS["cafe"].published_recipe("affectnet")
    assert (recipe.learning_rate, recipe.gamma, recipe.epochs, recipe.prior) == (1e-4, 0.8, 20, "balanced")
    assert METHODS["cafe"].published_recipe("rafdb") == METHODS["cafe"].recipe_type()
    assert METHODS["scn"].published_recipe("affectnet").learning_rate == 1e-3  # a rival keeps its own
    tuned = METHODS["finetune"].published_recipe("affectnet")
    assert (tuned.learning_rate, tuned.classifier_learning_rate, tuned.epochs) == (1e-5, 1e-4, 20)


@pytest.mark.parametrize(
    ("method", "overrides", "expected"),
    [
        ("scn", ["epochs=6"], {"relabel_after": 1}),
        ("scn", ["epochs=35"], {"relabel_after": 4}),
        ("scn", ["epochs=6", "relabel_after=3"], {"relabel_after": 3}),
        ("scn", ["margin=0.07"], {"relabel_after": 9}),
        ("ofer", ["epochs=6"], {"step": 1}),
        ("ofer_own", ["epochs=120"], {"step": 20}),
        ("rul", ["learning_rate=1e-3"], {"classifier_learning_rate": 1e-2}),
        ("rul", ["learning_rate=1e-3", "classifier_learning_rate=5e-3"], {"classifier_learning_rate": 5e-3}),
        ("rul", ["learning_rate=2e-4", "epochs=6"], {"classifier_learning_rate": 2e-3}),
        ("finetune", ["learning_rate=1e-4"], {"classifier_learning_rate": 2e-3}),
    ],
)
def test_schedules_and_rates_keep_their_published_ratio_unless_they_are_changed_themselves(
    method: str, overrides: list[str], expected: dict[str, float]
) -> None:
    recipe = apply_overrides(METHODS[method].published_recipe("rafdb"), overrides, method)
    assert {name: getattr(recipe, name) for name in expected} == expected


def test_another_seed_is_another_training(manifest: Manifest, features: Embedder) -> None:
    orders = [epoch_order(manifest.rows("train"), manifest.labels, Recipe(), seed, 1) for seed in (0, 0, 1)]
    assert all(np.array_equal(a, b) for a, b in zip(orders[0], orders[1], strict=True))
    assert not np.array_equal(orders[0][0], orders[2][0])


def test_both_branches_see_the_very_same_picture(manifest: Manifest, features: Embedder, tiny_tower: str) -> None:
    """The tower run on the image branch's input gives the cached features."""
    dataset = FaceDataset(manifest, PLAN, frozenset({"image", "features"}), 32, features)
    (batch,) = dataset.load([np.arange(12)], 2, CPU)
    with torch.inference_mode():
        direct = load_backbone(tiny_tower)(batch["image"])[0]
    torch.testing.assert_close(direct, batch["features"], rtol=1e-4, atol=1e-5)


def test_ofer_sees_a_new_picture_in_every_epoch_beside_the_latents_of_the_clean_one(
    manifest: Manifest, features: Embedder, small_network: str
) -> None:
    """However few views the store has."""
    training = new_training("ofer", manifest, features, network=small_network, mae_epochs=0)
    training.dataset = replace(training.dataset, plan=replace(PLAN, policy="ofer", views=1))
    training.rows = training.rows[:16]
    seen: list[dict[str, torch.Tensor]] = []
    training.module.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    for epoch in (1, 2):
        training.run_epoch(epoch)
    first, second = seen
    rows = first["row"].sort().values.numpy()
    clean = torch.from_numpy(features.read(rows, 0)["map"])
    for batch in (first, second):
        torch.testing.assert_close(batch["map"][batch["row"].argsort()], clean, rtol=0, atol=0)
    images = [batch["image"][batch["row"].argsort()] for batch in (first, second)]
    assert [torch.equal(a, b) for a, b in zip(*images, strict=True)].count(True) < 8


def test_a_flipped_image_is_the_exact_mirror_of_its_view_erased_rectangle_included(
    manifest: Manifest,
) -> None:
    dataset = FaceDataset(manifest, PLAN, frozenset({"image", "flipped_image"}), 24)
    (batch,) = dataset.load([np.arange(12)], 2, CPU)
    assert torch.equal(batch["flipped_image"], batch["image"][..., torch.arange(23, -1, -1)])
    erased = [(image == 0).all(0).sum().item() for image in batch["image"]]
    assert max(erased) > 5
    assert [(image == 0).all(0).sum().item() for image in batch["flipped_image"]] == erased


def test_loader_processes_change_nothing(manifest: Manifest, features: Embedder) -> None:
    dataset = FaceDataset(manifest, PLAN, frozenset({"image", "features"}), 24, features)
    batches = np.split(np.arange(30), 3)
    for alone, ahead in zip(dataset.load(batches, 1, CPU, 0), dataset.load(batches, 1, CPU, 2), strict=True):
        assert all(torch.equal(alone[name], ahead[name]) for name in alone)


@pytest.mark.parametrize("how", [signal.SIGSTOP, signal.SIGKILL])
def test_a_loader_process_that_is_stopped_or_killed_is_one_sentence(manifest: Manifest, how: signal.Signals) -> None:
    @dataclass(frozen=True)
    class Deadly(Manifest):
        def decode_face(self, row: int, *arguments: Any) -> np.ndarray:
            if row == 2:
                os.kill(os.getpid(), how)
            return super().decode_face(row, *arguments)

    deadly = Deadly(**{one.name: getattr(manifest, one.name) for one in fields(manifest)})
    dataset = FaceDataset(deadly, PLAN, frozenset({"image"}), 24, silent_seconds=1)
    with pytest.raises(IncompleteError, match="was killed, or stopped for 1 seconds: give the same command again"):
        list(dataset.load([np.arange(10)], 1, CPU, 1))
    assert not active_children()


def test_an_epoch_shows_every_face_once() -> None:
    rows = np.arange(100, 200)
    batches = epoch_order(rows, np.zeros(200, int), Recipe(batch_size=32), 0, 1)
    assert [len(batch) for batch in batches] == [32, 32, 32, 4]  # the short one too (CAFE's script)
    assert sorted(np.concatenate(batches)) == list(range(100, 200))


def test_a_last_batch_of_one_face_is_left_out_where_a_batch_norm_would_see_it(
    manifest: Manifest, features: Embedder, small_network: str
) -> None:
    steps = {}
    for name in ("linear_probe", "scn"):
        training = new_training(name, manifest, features, network=small_network)
        training.rows = training.rows[:33]  # two batches of 16, and one face
        training.run_epoch(1, lambda done, total, name=name: steps.update({name: total}))
    assert steps == {"linear_probe": 3, "scn": 2}


def test_the_balanced_sampler_shows_rare_classes_as_often() -> None:
    labels = np.array([0] * 900 + [1] * 60 + [2] * 40)
    batches = epoch_order(np.arange(1000), labels, Recipe(prior="balanced"), 0, 1)
    counts = Counter(labels[np.concatenate(batches)].tolist())
    assert sum(counts.values()) == 1000
    assert all(abs(count - 1000 / 3) < 4 * np.sqrt(1000 * 2 / 9) for count in counts.values())  # four standard errors


def test_too_few_faces_are_one_sentence() -> None:
    with pytest.raises(UserError, match="5 training faces are too few"):
        epoch_order(np.arange(5), np.zeros(5, int), Recipe(), 0, 1)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("epoch=3", "Unknown setting of cafe 'epoch': choose batch_size"),
        ("epochs", "Cannot read the setting 'epochs': write KEY=VALUE"),
        ("epochs=many", "The setting epochs of cafe is a whole number, not 'many'"),
        ("mask=soft", "Unknown mask of cafe 'soft': choose linear, none, sigmoid"),
        ("separation=-1", "is a number from 0"),
    ],
)
def test_a_wrong_setting_is_one_sentence(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        apply_overrides(METHODS["cafe"].recipe_type(), [override], "cafe")


def test_workers_with_a_batch_each_train_at_a_scaled_rate_and_are_told_what_else_they_share() -> None:
    settings = TrainSettings(source="any", method="rul", num_workers=4)
    published, scaled = find_recipe(settings, "rafdb"), find_recipe(replace(settings, scale_batch=True), "rafdb")
    rates = (published.learning_rate, published.classifier_learning_rate)
    assert scaled.batch_size == 4 * published.batch_size
    assert (scaled.learning_rate, scaled.classifier_learning_rate) == tuple(pytest.approx(4 * rate) for rate in rates)
    (sentence,) = explain_choices(settings, "fp32", 32)
    assert sentence.startswith("4 workers share each batch of 32 faces, 8 each: as published, and seldom faster")
    (sentence,) = explain_choices(replace(settings, scale_batch=True), "fp32", 128)
    assert sentence == "Batches of 128 faces at 4 times the learning rate, 32 for each worker: not published."


def test_the_arithmetic_that_suits_a_machine_is_chosen_only_where_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = TrainSettings(source="any")
    assert find_precision(settings) == "fp32"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for able, chosen in ({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16"), ({"avx512": True}, "fp32"):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda able=able: able)
        assert find_precision(replace(settings, precision="auto")) == chosen
        said = list(explain_choices(replace(settings, precision="bf16"), "bf16", 32))
        assert [sentence.partition(" in ")[0] for sentence in said] == ["This machine computes bfloat16"] * (
            chosen == "fp32"
        )
    assert not list(explain_choices(replace(settings, precision="bf16", address="head:6379"), "bf16", 32))
    assert list(explain_choices(replace(settings, precision="auto"), "bf16", 32)) == [
        "Precision bf16, as this machine computes."
    ]
    with pytest.raises(UserError, match="--precision auto looks at this machine, not at a cluster's"):
        find_precision(replace(settings, precision="auto", address="head:6379"))


def test_a_gpu_is_given_the_same_pictures_as_pillow_makes(manifest: Manifest) -> None:
    dataset = FaceDataset(manifest, PLAN, frozenset({"image"}), 32)
    batches = [manifest.rows("train")[:10], manifest.rows("train")[10:13]]
    decoded, made = (list(route(batches, 1, CPU)) for route in (partial(dataset._decode, workers=0), dataset._make))
    assert len(made) == 2
    for wanted, found in zip(decoded, made, strict=True):
        for part, other in zip(wanted, found, strict=True):
            assert torch.equal(part, other)
