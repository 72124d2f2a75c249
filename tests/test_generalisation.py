"""Algorithms of domain generalisation: DomainBed's losses, what each needs, and trainings on a union of sources."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from conftest import complaint
from domains import make_workspace, planned, train
from torch import Tensor
from trained import on_one_thread

from cafe.learning.training import predict
from cafe.learning.valley import find_valley
from cafe.methods import METHODS
from cafe.methods.generalisation.annealing import Annealed
from cafe.methods.generalisation.erm import Erm
from cafe.methods.method import Batch, Inputs, apply_overrides
from cafe.pipeline.models import load_method, make_dataset
from cafe.pipeline.plan import TrainPlan
from cafe.pipeline.worker import Worker, find_checkpoint
from cafe.pipeline.workspace import Workspace
from cafe.results.runs import list_epochs, read_epoch, read_result, read_runs, read_validation_accuracy

ALGORITHMS = [name for name, method in METHODS.items() if issubclass(method, Erm)]
COMPARING = [name for name in ALGORITHMS if METHODS[name].needs_domains()]
WIDTH, CLASSES = 6, ("one", "two", "three", "four")


# --- losses, against DomainBed's formulas in NumPy -----------------------------------------------------------------------

RANDOM = np.random.default_rng(5)
DOMAINS = np.array([0, 1, 2] * 8)
LOGITS = RANDOM.normal(0, 2, (24, 4))
LEARNED = RANDOM.normal(0, 1, (24, 5)) + DOMAINS[:, None]
LABELS = RANDOM.integers(0, 4, 24)
SOURCE_LOGITS = RANDOM.normal(0, 1, (24, 3))
OWN = [np.equal(DOMAINS, number) for number in range(3)]  # DomainBed's minibatches


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> float:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return float((np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(labels)), labels]).mean())


def mean_risk() -> float:
    return float(np.mean([cross_entropy(LOGITS[own], LABELS[own]) for own in OWN]))


def mmd() -> float:
    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        squares = ((x[:, None] - y[None]) ** 2).sum(axis=2)
        return float(sum(np.exp(-gamma * squares) for gamma in (0.001, 0.01, 0.1, 1, 10, 100, 1000)).mean())

    pairs = [(LEARNED[OWN[i]], LEARNED[OWN[j]]) for i, j in combinations(range(3), 2)]
    return mean_risk() + 1.5 * float(np.mean([kernel(x, x) + kernel(y, y) - 2 * kernel(x, y) for x, y in pairs]))


def coral() -> float:
    pairs = [(LEARNED[OWN[i]], LEARNED[OWN[j]]) for i, j in combinations(range(3), 2)]
    distances = [
        ((x.mean(0) - y.mean(0)) ** 2).mean() + ((np.cov(x, rowvar=False) - np.cov(y, rowvar=False)) ** 2).mean()
        for x, y in pairs
    ]
    return mean_risk() + 1.5 * float(np.mean(distances))


def irm(weight: float) -> float:
    def gradient(logits: np.ndarray, labels: np.ndarray) -> float:  # by the scale of the logits, by central differences
        step = 1e-5
        return (cross_entropy((1 + step) * logits, labels) - cross_entropy((1 - step) * logits, labels)) / (2 * step)

    halves = [(LOGITS[own], LABELS[own]) for own in OWN]
    products = [gradient(z[::2], y[::2]) * gradient(z[1::2], y[1::2]) for z, y in halves]
    return mean_risk() + weight * float(np.mean(products))


def vrex(weight: float) -> float:
    risks = np.array([cross_entropy(LOGITS[own], LABELS[own]) for own in OWN])
    return float(risks.mean() + weight * ((risks - risks.mean()) ** 2).mean())


def group_dro() -> float:
    risks = np.array([cross_entropy(LOGITS[own], LABELS[own]) for own in OWN])
    weights = np.exp(0.3 * risks)
    return float(risks @ (weights / weights.sum()))


def dann() -> float:
    return cross_entropy(LOGITS, LABELS) + cross_entropy(SOURCE_LOGITS, DOMAINS)


EXPECTED = {
    ("erm",): cross_entropy(LOGITS, LABELS),
    ("mixup",): mean_risk(),
    ("coral", "penalty=1.5"): coral(),
    ("mmd", "penalty=1.5"): mmd(),
    ("irm", "penalty=7"): irm(1.0),
    ("irm", "penalty=7", "anneal_steps=0"): irm(7.0),
    ("vrex", "penalty=7"): vrex(1.0),
    ("vrex", "penalty=7", "anneal_steps=0"): vrex(7.0),
    ("group_dro", "step_size=0.3"): group_dro(),
    ("dann",): dann(),
    ("spectral_decoupling", "penalty=0.5"): cross_entropy(LOGITS, LABELS) + 0.5 * float((LOGITS**2).mean()),
}


def new(name: str, *overrides: str, sources: int = 3) -> Erm:
    torch.manual_seed(0)
    recipe = apply_overrides(METHODS[name].recipe_type(), overrides, name)
    METHODS[name].check_recipe(recipe, name)
    method = METHODS[name](recipe, Inputs(WIDTH, classes=CLASSES, sources=sources))
    assert isinstance(method, Erm)
    return method


@pytest.mark.parametrize("case", EXPECTED)
def test_the_loss_of_fixed_numbers_is_domainbeds(case: tuple[str, ...]) -> None:
    named = {"logits": LOGITS, "learned": LEARNED, "source_logits": SOURCE_LOGITS}
    output = {name: torch.from_numpy(values) for name, values in named.items()}
    batch = {"label": torch.from_numpy(LABELS), "domain": torch.from_numpy(DOMAINS)}
    losses = new(*case).double().losses(output, batch)
    assert losses["total"].item() == pytest.approx(EXPECTED[case], abs=1e-6)


def new_batch(faces: int = 24) -> Batch:
    torch.manual_seed(1)
    batch = {"features": torch.randn(faces, WIDTH), "label": torch.from_numpy(LABELS)}
    return {**batch, "domain": torch.from_numpy(DOMAINS)}


def test_mixup_mixes_two_sources_by_one_share_as_domainbed_weighs_their_two_losses() -> None:
    method, batch = new("mixup", "alpha=1"), new_batch()
    torch.manual_seed(3)
    circle = torch.randperm(3).tolist()
    kept = [torch.distributions.Beta(1.0, 1.0).sample() for _ in circle]
    torch.manual_seed(3)
    mixed = method.augment(batch)
    output = method(mixed)
    objective = torch.zeros(())
    for place, (number, share) in enumerate(zip(circle, kept, strict=True)):
        own, other = (torch.from_numpy(OWN[one]) for one in (number, circle[(place + 1) % 3]))
        logits = method({"features": share * batch["features"][own] + (1 - share) * batch["features"][other]})["logits"]
        for weight, rows in ((share, own), (1 - share, other)):
            objective = objective + weight * torch.nn.functional.cross_entropy(logits, batch["label"][rows]) / 3
    torch.testing.assert_close(method.losses(output, mixed)["total"], objective)


def test_a_step_of_dann_moves_both_players_by_domainbeds_losses() -> None:
    method, batch = new("dann", "penalty=0.7", "gradient_penalty=0.4", "hidden=5").double(), new_batch()
    batch["features"] = batch["features"].double()
    method.losses(method(batch), batch)["total"].backward()
    network = {name: value for name, value in method.named_parameters() if not name.startswith("discriminator.")}

    learned = method.hidden(batch["features"])
    source_logits = method.discriminator(learned)  # type: ignore[operator]
    penalised = torch.nn.functional.cross_entropy(source_logits, batch["domain"], reduction="sum")
    (gradient,) = torch.autograd.grad(penalised, [learned], create_graph=True)
    discriminator = torch.nn.functional.cross_entropy(source_logits, batch["domain"])
    discriminator = discriminator + 0.4 * gradient.square().sum(1).mean()
    risk = torch.nn.functional.cross_entropy(method.classifier(learned), batch["label"])
    players = {**dict.fromkeys(network, risk - 0.7 * discriminator)}
    players |= {name: discriminator for name, _ in method.named_parameters() if name not in network}
    for name, value in method.named_parameters():
        (expected,) = torch.autograd.grad(players[name], [value], retain_graph=True)
        torch.testing.assert_close(value.grad, expected, msg=name)


def test_dann_learns_without_its_discriminator_from_faces_of_no_source() -> None:
    """As SHOT lets it, of a target."""
    method, batch = new("dann", "gradient_penalty=0.4", "hidden=5"), new_batch()
    assert method.train()({"features": batch["features"]}).keys() == {"logits"}


def test_group_dro_keeps_the_weights_of_its_steps() -> None:
    method = new("group_dro", "step_size=0.3").double()
    output = {"logits": torch.from_numpy(LOGITS)}
    batch = {"label": torch.from_numpy(LABELS), "domain": torch.from_numpy(DOMAINS)}
    risks = np.array([cross_entropy(LOGITS[own], LABELS[own]) for own in OWN])
    weights = np.ones(3)
    for _ in range(2):
        weights = weights * np.exp(0.3 * risks)
        weights /= weights.sum()
        assert method.losses(output, batch)["total"].item() == pytest.approx(float(risks @ weights))
        method.after_step(output, batch)


@pytest.mark.parametrize("name", ["irm", "vrex"])
def test_a_penalty_is_annealed_and_adam_begins_anew(name: str) -> None:
    method, batch = new(name, "penalty=50", "anneal_steps=2"), new_batch()
    assert isinstance(method, Annealed)
    optimizer = method.optimizer()

    def step() -> float:
        losses = method.losses(method(batch), batch)
        optimizer.zero_grad()
        losses["total"].backward()
        optimizer.step()
        method.after_step({}, batch)
        return ((losses["total"] - losses["risk"]) / losses["penalty"]).item()

    assert step() == pytest.approx(1, rel=1e-3)
    assert len(optimizer.state) > 0
    step()
    assert len(optimizer.state) == 0
    assert step() == pytest.approx(50, rel=1e-3)


# --- the mask, and what an algorithm needs ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("mask", "hidden"), [("none", 3), ("vector", 0), ("features", 0), ("features", 3)])
def test_the_network_is_a_mask_a_hidden_layer_and_a_classifier(mask: str, hidden: int) -> None:
    method = new("coral", f"mask={mask}", f"hidden={hidden}").eval()
    features, weights = torch.randn(4, WIDTH), method.state_dict()
    expected = features
    if mask == "vector":
        with torch.no_grad():
            method.mask.copy_(torch.arange(WIDTH))  # type: ignore[operator, union-attr]
        expected = features * torch.arange(WIDTH).sigmoid()
    elif mask == "features":
        expected = features * torch.sigmoid(features @ weights["mask.weight"].T + weights["mask.bias"])
    if hidden:
        expected = torch.relu(expected @ weights["hidden.0.weight"].T + weights["hidden.0.bias"])
    output = method({"features": features})
    torch.testing.assert_close(output["learned"], expected)
    torch.testing.assert_close(output["logits"], expected @ weights["classifier.weight"].T + weights["classifier.bias"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("coral", "hidden=0"), "coral brings the learned features of the sources together, and frozen ones stay"),
        (("dann", "hidden=0"), "dann makes learned features alike for a discriminator, and frozen ones stay"),
        (("erm", "hidden=0", "dropout=0.1"), "hidden is 0"),
        (("erm", "dropout=1"), "a share below 1"),
        (("mixup", "alpha=0"), "train erm"),
        (("dann", "discriminator_layers=1"), "at least 2 layers"),
        (("dann", "beta1=1"), "a share below 1"),
    ],
)
def test_settings_that_mean_nothing_are_one_sentence(overrides: tuple[str, ...], message: str) -> None:
    assert message in complaint(new, *overrides)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return make_workspace(tmp_path_factory.mktemp("domains"))


@pytest.mark.parametrize("name", COMPARING)
def test_one_source_is_one_sentence_where_several_are_compared(name: str, workspace: Workspace) -> None:
    sentence = complaint(lambda: planned(workspace, "one", method=name))
    assert sentence.startswith(f"{name} compares several sources, not 'one' alone: name more")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "irm compares the sources within each batch: give --sampler balanced"),
        ({"sampler": "balanced", "selection": "leave_one_out"}, "name a third, or choose the epoch by source_val"),
        ({"sampler": "balanced", "overrides": ("batch_size=3",)}, "set batch_size=4 or more"),
    ],
)
def test_what_leaves_a_batch_without_a_source_is_one_sentence(
    settings: dict[str, Any], message: str, workspace: Workspace
) -> None:
    assert message in complaint(lambda: planned(workspace, method="irm", **settings))


# --- trainings on a union --------------------------------------------------------------------------------------------------

FAST = ("hidden=8", "batch_size=24", "learning_rate=0.02")
SETTINGS = {
    "irm": ("anneal_steps=3",),
    "vrex": ("anneal_steps=3",),
    "dann": ("gradient_penalty=0.1", "discriminator_hidden=8"),
    "coral": ("mask=features",),
}


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_learns_from_a_union_and_goes_on_where_it_was(
    name: str, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: dict[str, Any] = {"method": name, "sampler": "balanced", "selection": "source_val"}
    overrides = (*SETTINGS.get(name, ()), *FAST)
    plan = planned(workspace, overrides=overrides, **chosen)
    interrupted = planned(workspace, overrides=overrides, tag="resumed", **chosen)
    whole = train(plan)
    with monkeypatch.context() as patch:  # killed before the end is written
        patch.setattr("cafe.pipeline.worker._save_result", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(interrupted, epochs=2)
    assert find_checkpoint(interrupted.run) is not None
    resumed = train(interrupted)
    assert all(torch.equal(resumed[key], value) for key, value in whole.items())
    losses = [read_epoch(path) for path in list_epochs(plan.run).values()]
    assert losses[-1]["train/accuracy"] > losses[0]["train/accuracy"]


def test_a_training_that_ends_in_the_middle_of_an_epoch_goes_on_after_its_last_step(workspace: Workspace) -> None:
    steps = list[int]()

    def end() -> None:
        steps.extend(list_epochs(ended.run))  # of the second epoch
        if len(steps) == 2:
            raise InterruptedError

    fast = ("anneal_steps=3", *FAST, "batch_size=12")
    chosen = {"method": "irm", "sampler": "balanced", "overrides": fast, "epochs": 2}
    whole = planned(workspace, tag="whole", **chosen)
    ended = planned(workspace, tag="ended", checkpoint_minutes=0, **chosen)
    ended.spec.save(ended.run)
    with pytest.raises(InterruptedError):
        Worker().train(on_one_thread(ended), check=end)
    checkpoint = find_checkpoint(ended.run)
    assert checkpoint
    assert checkpoint.name == "0001-00000001"
    for plan in (whole, ended):
        train(plan)
    assert (ended.run / "model.safetensors").read_bytes() == (whole.run / "model.safetensors").read_bytes()
    for epoch, path in list_epochs(whole.run).items():
        one, other = ({**read_epoch(record), "faces_per_second": 0} for record in (path, list_epochs(ended.run)[epoch]))
        assert one == other
    assert find_checkpoint(ended.run) is None


# --- SWAD ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([9, 5, 4, 4.5, 5, 6, 7, 8, 9, 10, 11, 12], (3, 5)),  # threshold 1.3 · 4.5; epochs 6 to 11 exceed it
        ([9, 5, 4, 4.5, 5, 6, 7, 8, 9, 10], (3, 10)),  # five in a row only
        ([9, 5, 4, 6, 6, 5, 7, 7, 7, 7, 7], (3, 11)),
        ([5, 4, 3, 2], (4, 4)),  # falls to the end
        ([3, 2], (2, 2)),
    ],
)
def test_the_valley_is_that_of_the_papers_algorithm(losses: list[float], expected: tuple[int, int]) -> None:
    assert find_valley(losses) == expected


def test_swad_averages_the_weights_of_the_epochs_in_the_valley_also_when_resumed(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(valley: tuple[int, int], tag: str, stop: int | None = None) -> tuple[TrainPlan, dict[str, Tensor]]:
        monkeypatch.setattr(
            "cafe.learning.training.find_valley", lambda losses: tuple(min(one, len(losses)) for one in valley)
        )
        plan = planned(workspace, method="irm", sampler="balanced", selection="swad", tag=tag, overrides=FAST)
        if stop:
            with monkeypatch.context() as patch:
                patch.setattr("cafe.pipeline.worker._save_result", _interrupt)
                with pytest.raises(KeyboardInterrupt):
                    train(plan, stop)
        return plan, train(plan)

    after = {epoch: run((epoch, epoch), f"after{epoch}")[1] for epoch in (2, 3)}
    for tag, stop in (("whole", None), ("resumed", 2)):
        plan, averaged = run((2, 3), tag, stop)
        assert int(averaged.pop("steps")) == int(after[3]["steps"])
        for name, value in averaged.items():
            torch.testing.assert_close(value, (after[2][name] + after[3][name]) / 2, atol=1e-7, rtol=0)
    result, (described,) = read_result(plan.run) or {}, read_runs([plan.run])
    method = load_method(plan.spec, plan.run)
    rows, held_out = plan.source.split_rows("swad")
    assert set(rows).isdisjoint(held_out)
    probabilities = predict(method, make_dataset(plan.spec, plan.source), held_out, torch.device("cpu"))
    accuracy = (probabilities.argmax(axis=1) == plan.source.labels[held_out]).mean()
    assert (result["averaged_from"], result["selected"]) == (2, 3)
    assert read_validation_accuracy(described) == pytest.approx(accuracy)


@pytest.mark.parametrize(
    ("method", "message"), [("image_only", "the weights of every epoch"), ("nearest_class_mean", "no epochs")]
)
def test_what_has_no_few_weights_of_several_epochs_is_one_sentence(
    method: str, message: str, workspace: Workspace
) -> None:
    settings: dict[str, Any] = {"method": method, "epochs": None, "selection": "swad"}
    assert message in complaint(lambda: planned(workspace, **settings))
