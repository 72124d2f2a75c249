"""Options of test time: the papers' algorithms, the same numbers whenever given again, and rows apart from all others."""

from __future__ import annotations

import copy
import csv
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import Cafe, complaint, draw_faces
from runs import write_predictions, write_run
from torch import Tensor, nn
from trained import fill_store, start_run
from upath import UPath

from cafe.data.indexing import index_files
from cafe.data.readers import DATASETS
from cafe.learning.adaptation import sar, shot, t3a, tent
from cafe.learning.adaptation.sar import predict_sar
from cafe.learning.adaptation.shot import find_pseudo_labels, predict_shot
from cafe.learning.adaptation.t3a import predict_t3a
from cafe.learning.adaptation.tent import predict_tent
from cafe.learning.loading import FaceDataset
from cafe.learning.training import predict
from cafe.methods.method import Method
from cafe.pipeline.evaluate import check_option, evaluate_target
from cafe.pipeline.faces import choose_target
from cafe.pipeline.models import build_model, load_method, make_dataset
from cafe.pipeline.process.lease import hold
from cafe.pipeline.runs import RunSpec, note_status, read_status
from cafe.pipeline.settings import ExtractSettings
from cafe.pipeline.workspace import Workspace
from cafe.randomness import random_generator
from cafe.results.predictions import load_predictions
from cafe.results.protocols import find_protocol
from cafe.results.runs import read_runs
from cafe.results.scores import flatten_scores, read_scores

CPU = torch.device("cpu")


class Evaluated(NamedTuple):
    """A run with drawn weights, its method, and the target `two` with the rows that are evaluated."""

    run: UPath
    method: Method
    dataset: FaceDataset
    rows: np.ndarray


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, tiny_tower: str) -> Workspace:
    """A source, a target with the stores that every option needs, and one without."""
    workspace = Workspace.at(str(tmp_path_factory.mktemp("work")))
    for name, tint in (("one", 0), ("two", 30), ("three", 60)):
        root = UPath(draw_faces(Path(str(workspace.root)) / "faces" / name, per_class=8, tint=tint))
        index_files(name, DATASETS["folder"](root)).manifest.save(workspace.manifest_path(name))
        fill_store(workspace, name, ExtractSettings(backbone=tiny_tower, views=1 if name == "three" else 5))
    fill_store(workspace, "two", ExtractSettings(backbone=tiny_tower, views=2, policy="flip"))
    return workspace


@pytest.fixture(scope="module")
def evaluated(workspace: Workspace) -> Evaluated:
    run, _ = start_run(workspace, method="cafe", source="one", targets="two", image_size=32)
    spec = RunSpec.load(run)
    target = choose_target(workspace, "two", spec, find_protocol("clean"))
    evaluate_target(run, target)
    return Evaluated(run, load_method(spec, run).eval(), make_dataset(spec, target), target.rows("all"))


def evaluate(workspace: Workspace, run: UPath, option: str) -> np.ndarray:
    """Evaluate the target as a worker does and return the probabilities that are kept."""
    evaluate_target(run, choose_target(workspace, "two", RunSpec.load(run), find_protocol(f"clean-{option}")))
    return load_predictions(run, f"clean-{option}")["two"].probabilities


def batches_of(evaluated: Evaluated, size: int) -> tuple[np.ndarray, list[dict[str, Tensor]]]:
    """The fixed order, written down once more: shuffled, `size` faces at a time, a rest of fewer than 8 with the last."""
    order = random_generator("test time").permutation(len(evaluated.rows))
    parts = [order[start : start + size] for start in range(0, len(order), size)]
    if len(parts[-1]) < 8:
        parts[-2:] = [np.concatenate(parts[-2:])]
    assert len(parts) > 1
    return order, list(evaluated.dataset.load([evaluated.rows[part] for part in parts], 0, CPU))


def unshuffle(order: np.ndarray, parts: list[Tensor]) -> np.ndarray:
    return torch.cat(parts).softmax(1).numpy()[np.argsort(order)]


def entropy(logits: Tensor) -> Tensor:
    return -(logits.softmax(1) * logits.log_softmax(1)).sum(1)


def test_tent_is_the_papers_algorithm_and_leaves_the_method_as_it_was(
    evaluated: Evaluated, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tent, "BATCH", 9)
    before = copy.deepcopy(evaluated.method.state_dict())
    got = predict_tent(*evaluated[1:], CPU)
    assert all(torch.equal(value, before[name]) for name, value in evaluated.method.state_dict().items())

    method, affine = copy.deepcopy(evaluated.method), []
    for module in method.modules():  # the released configuration: statistics of the batch, scale and shift are learned
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats, module.running_mean, module.running_var = False, None, None
            affine += [module.weight, module.bias]
    optimizer = torch.optim.Adam(affine, lr=1e-3, betas=(0.9, 0.999), weight_decay=0.0)
    order, batches = batches_of(evaluated, 9)
    said = []
    for batch in batches:
        logits = method(batch)["logits"]
        said.append(logits.detach())
        optimizer.zero_grad()
        entropy(logits).mean(0).backward()
        optimizer.step()
    np.testing.assert_allclose(got, unshuffle(order, said), atol=1e-6)
    assert np.abs(got - predict(*evaluated[1:], CPU)).max() > 1e-3


@pytest.mark.parametrize("kept", [1, 3, 100])
def test_t3a_is_the_papers_algorithm(evaluated: Evaluated, kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(t3a, "BATCH", 9)
    monkeypatch.setattr(t3a, "KEPT", kept)
    got = predict_t3a(*evaluated[1:], CPU)

    classifier: nn.Linear = evaluated.method.classifier  # type: ignore[assignment]
    order, batches = batches_of(evaluated, 9)
    said = []
    with torch.no_grad():
        first = entropy(classifier(classifier.weight)).tolist()
        supports = {number: [(first[number], classifier.weight[number])] for number in range(7)}
        for batch in batches:
            features = evaluated.method(batch)["masked"]
            logits = classifier(features)
            for face, (choice, doubt) in enumerate(
                zip(logits.argmax(1).tolist(), entropy(logits).tolist(), strict=True)
            ):
                supports[choice].append((doubt, features[face]))
            surest = [sorted(own, key=lambda pair: pair[0])[:kept] for own in supports.values()]
            means = [torch.stack([z / z.norm() for _, z in own]).mean(0) for own in surest]
            said.append(features @ torch.stack([mean / mean.norm() for mean in means]).T)
    np.testing.assert_allclose(got, unshuffle(order, said), atol=1e-6)
    assert np.abs(got - predict(*evaluated[1:], CPU)).max() > 1e-3


class Sam(torch.optim.Optimizer):
    """Sharpness-aware minimisation as the released script of SAR has it, around SGD."""

    def __init__(self, parameters: list[Tensor], rho: float) -> None:
        self.base = torch.optim.SGD(parameters, lr=2.5e-4, momentum=0.9)
        super().__init__(parameters, {"rho": rho})

    @torch.no_grad()
    def first_step(self) -> None:
        (group,) = self.param_groups
        norm = torch.stack([value.grad.norm() for value in group["params"]]).norm()
        for value in group["params"]:
            self.state[value]["old"] = value.clone()
            value.add_(value.grad * group["rho"] / (norm + 1e-12))
        self.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        for value in self.param_groups[0]["params"]:
            value.copy_(self.state[value]["old"])
        self.base.step()
        self.zero_grad()


@pytest.mark.parametrize("collapsed", [0.0, 9.0])  # 9: begun anew after every batch
def test_sar_is_the_papers_algorithm(evaluated: Evaluated, collapsed: float, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"BATCH": 9, "MARGIN": 0.97, "RADIUS": 0.5, "COLLAPSED": collapsed}.items():
        monkeypatch.setattr(sar, name, value)
    got = predict_sar(*evaluated[1:], CPU)

    method, affine = copy.deepcopy(evaluated.method), []
    for name, module in method.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats, module.running_mean, module.running_var = False, None, None
            affine += [module.weight, module.bias] if "layer4" not in name else []
    optimizer, first = Sam(affine, 0.5), [value.detach().clone() for value in affine]
    order, batches = batches_of(evaluated, 9)
    said, reliable_faces = [], 0
    for batch in batches:
        logits = method(batch)["logits"]
        said.append(logits.detach())
        reliable = entropy(logits) < 0.97 * np.log(7)
        reliable_faces += int(reliable.sum())
        optimizer.zero_grad()
        entropy(logits)[reliable].mean().backward()
        optimizer.first_step()
        again = entropy(method(batch)["logits"])[reliable]
        again[again < 0.97 * np.log(7)].mean().backward()
        optimizer.second_step()
        if collapsed:
            for value, own in zip(affine, first, strict=True):
                value.data.copy_(own)
            optimizer.base.state.clear()
    assert 0 < reliable_faces < len(evaluated.rows)  # some are left out
    np.testing.assert_allclose(got, unshuffle(order, said), atol=1e-6)
    assert np.abs(got - predict(*evaluated[1:], CPU)).max() > 1e-3


@pytest.mark.parametrize("adapt", [predict_tent, predict_sar, predict_shot])
def test_what_is_adapted_stays_calibrated(
    evaluated: Evaluated, adapt: Callable[..., np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shot, "EPOCHS", 0)  # what it ends in is enough
    calibrated = copy.deepcopy(evaluated.method)
    calibrated.recipe = replace(calibrated.recipe, calibration="temperature")
    calibrated.register_buffer("temperature", torch.tensor(2.0))
    got, plain = (adapt(method, *evaluated[2:], CPU) for method in (calibrated, evaluated.method))
    roots = np.sqrt(plain)
    np.testing.assert_allclose(got, roots / roots.sum(axis=1, keepdims=True), atol=1e-6)


def test_pseudo_labels_are_those_of_the_released_script() -> None:
    torch.manual_seed(0)
    logits, features = (
        torch.randn(40, 4) + torch.tensor([0.0, 0, 0, -9]),
        torch.randn(40, 3),
    )  # nobody is of the last class
    extended = torch.cat((features, torch.ones(40, 1)), 1)
    fea = (extended.T / extended.norm(dim=1)).T.numpy()
    affinity, labels = logits.softmax(1).numpy(), logits.argmax(1).numpy()
    for _ in range(2):
        centres = affinity.T @ fea / (1e-8 + affinity.sum(0)[:, None])
        there = np.flatnonzero(np.eye(4)[labels].sum(0) > 0)
        cosine = fea @ centres[there].T / np.linalg.norm(fea, axis=1)[:, None] / np.linalg.norm(centres[there], axis=1)
        labels = there[cosine.argmax(axis=1)]
        affinity = np.eye(4)[labels]
    assert find_pseudo_labels(logits, features).tolist() == labels.tolist()
    assert 3 not in labels


def test_shot_takes_the_steps_of_the_released_script_and_keeps_the_classifier(
    evaluated: Evaluated, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shot, "EPOCHS", 1)
    before = copy.deepcopy(evaluated.method.state_dict())
    got = predict_shot(*evaluated[1:], CPU)
    assert all(torch.equal(value, before[name]) for name, value in evaluated.method.state_dict().items())

    method, dataset, rows = copy.deepcopy(evaluated.method), evaluated.dataset, evaluated.rows
    assert len(rows) <= 64  # one step
    (batch,) = dataset.load([rows], 0, CPU)
    with torch.no_grad():
        output = method(batch)
        pseudo = find_pseudo_labels(output["logits"], output["masked"])
    shuffled = random_generator("test time", "shot", 0).permutation(np.arange(len(rows)))
    (batch,) = dataset.load([rows[shuffled]], 0, CPU)
    method.train()
    logits = method(batch)["logits"]
    mean = logits.softmax(1).mean(0)
    loss = entropy(logits).mean() + (mean * (mean + 1e-5).log()).sum()
    loss = loss + 0.3 * nn.functional.cross_entropy(logits, pseudo[shuffled])
    method.classifier.requires_grad_(False)  # type: ignore[union-attr]
    learning = [value for value in method.parameters() if value.requires_grad]
    rate = 1e-3 * 11**-0.75  # of the image branch, at the end of its schedule
    loss.backward()
    torch.optim.SGD(learning, lr=rate, momentum=0.9, weight_decay=1e-3, nesterov=True).step()
    np.testing.assert_allclose(got, predict(method, dataset, rows, CPU), atol=1e-6)
    assert np.abs(got - predict(*evaluated[1:], CPU)).max() > 1e-4


def test_flipped_faces_are_averaged_alike_from_stored_features_and_from_pictures(
    workspace: Workspace, evaluated: Evaluated
) -> None:
    model, manifest = build_model([evaluated.run]), workspace.load_manifest("two")
    faces = [manifest.read_face(row) for row in evaluated.rows]
    plain, mirrored = model.predict(faces), model.predict([np.ascontiguousarray(face[:, ::-1]) for face in faces])
    assert np.abs(plain - mirrored).max() > 1e-3
    got = evaluate(workspace, evaluated.run, "flip")
    np.testing.assert_allclose(got, (plain + mirrored) / 2, atol=1e-4)
    np.testing.assert_allclose(replace(model, flip=True).predict(faces), got, atol=1e-6)


def test_views_are_averaged_the_clean_one_among_them(workspace: Workspace, evaluated: Evaluated) -> None:
    got = evaluate(workspace, evaluated.run, "views")
    spec, said = RunSpec.load(evaluated.run), []
    dataset = make_dataset(spec, choose_target(workspace, "two", spec, find_protocol("clean-views")))
    with torch.no_grad():
        for view in range(5):
            (batch,) = dataset.load([evaluated.rows], view, CPU)
            said.append(evaluated.method(batch)["logits"].softmax(1).numpy())
    np.testing.assert_allclose(got, np.mean(said, axis=0), atol=1e-6)
    np.testing.assert_allclose(load_predictions(evaluated.run)["two"].probabilities, said[0], atol=1e-6)


@pytest.mark.parametrize("option", ["tent", "t3a", "sar", "shot"])
def test_evaluated_again_a_target_gets_the_same_numbers_apart_from_all_others(
    workspace: Workspace, evaluated: Evaluated, option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shot, "EPOCHS", 1)

    def read() -> dict[str, float]:
        return flatten_scores(read_scores(read_runs([evaluated.run])))

    plain = {name: value for name, value in read().items() if not name.startswith("clean-")}
    first = evaluate(workspace, evaluated.run, option)
    np.testing.assert_array_equal(evaluate(workspace, evaluated.run, option), first)
    scores = read()
    assert {name: value for name, value in scores.items() if not name.startswith("clean-")} == plain
    labels = workspace.load_manifest("two").labels[evaluated.rows]
    assert scores[f"clean-{option}/unseen/accuracy"] == pytest.approx((first.argmax(1) == labels).mean())


def test_views_that_no_store_has_are_one_sentence(workspace: Workspace, evaluated: Evaluated, tiny_tower: str) -> None:
    spec = RunSpec.load(evaluated.run)
    for option, options in (("flip", "--views 2 --policy flip"), ("views", "--views 5 --policy paper --view-seed 0")):
        sentence = complaint(choose_target, workspace, "three", spec, find_protocol(f"clean-{option}"))
        assert "No features of 'three' match" in sentence
        assert f"run `cafe extract three --backbone {tiny_tower} {options}`" in sentence


def test_what_a_method_lacks_for_an_option_is_one_sentence(workspace: Workspace) -> None:
    def say(method: str, option: str) -> str:
        run, _ = start_run(workspace, method=method, source="one", targets="two", image_size=32)
        return complaint(check_option, RunSpec.load(run), option)

    assert say("linear_probe", "tent").startswith("TENT adapts batch norms, and LinearProbe has none")
    assert say("linear_probe", "t3a") == ""
    assert say("scn", "t3a").startswith("T3A adjusts a last linear layer, and the logits of Scn come from none")
    assert say("scn", "tent") == ""
    assert say("linear_probe", "sar").startswith("SAR adapts batch norms, and LinearProbe has none")
    assert say("linear_probe", "shot").startswith(
        "SHOT leaves the last linear layer as it is, and LinearProbe has nothing"
    )
    assert say("scn", "shot").startswith("SHOT keeps a last linear layer, and the logits of Scn come from none")


def test_too_few_faces_to_adapt_to_are_one_sentence(evaluated: Evaluated) -> None:
    few = evaluated._replace(rows=evaluated.rows[:7])
    assert complaint(predict_tent, *few[1:], CPU).startswith("7 faces are too few to adapt to: at least 8")


def test_a_run_is_evaluated_with_an_option_on_the_command_line(workspace: Workspace, evaluated: Evaluated) -> None:
    here = Cafe(Path(str(workspace.root)), "")
    told = here.succeed("evaluate", evaluated.run.name, "--targets", "two", "--test-time", "t3a")
    assert "At test time: T3A (Iwasawa and Matsuo, NeurIPS 2021)" in told
    table = here.succeed("compare")
    assert "test_time" not in table
    assert "also evaluated with --test-time t3a" in table
    table = here.succeed("compare", "--test-time", "t3a", "--versus", "cafe")
    assert "cafe (test_time=t3a)" in table
    assert "generalisation to unseen ones" in table


def test_an_evaluation_waits_its_turn_and_one_that_fails_leaves_its_run_finished(
    workspace: Workspace, evaluated: Evaluated
) -> None:
    here, run = Cafe(Path(str(workspace.root)), ""), evaluated.run
    note_status(run, "FINISHED")
    command = ("evaluate", run.name, "--targets", "two", "--split", "all")
    with hold(run):
        assert f"works on {run}: wait until it is done" in here.fail(*command)
    faces = Path(str(workspace.root)) / "faces" / "two"
    faces.rename(faces.with_name("away"))
    try:
        assert "is missing with its whole folder" in here.fail(*command, code=1)
    finally:
        faces.with_name("away").rename(faces)
    assert read_status(run) == "FINISHED"


LABELS = np.arange(100) % 7


def write_seeds(workspace: Workspace, method: str, right: dict[int, list[int]], protocol: str = "clean") -> None:
    """Write runs that are right on a face of `unseen` and `other` where their seed's list has a 1, over and over."""
    for seed, pattern in right.items():
        hits = np.resize(pattern, 100).astype(bool)
        run = write_run(workspace, method, seed=seed)
        for target in ("unseen", "other"):
            write_predictions(run, target, LABELS, np.where(hits, LABELS, (LABELS + 1) % 7), protocol, confidence=0.9)


def test_rows_of_test_time_are_shown_where_they_are_named_tested_and_never_ranked(tmp_path: Path) -> None:
    workspace = Workspace.at(str(tmp_path / "work"))
    cafe, file = Cafe(tmp_path / "work", ""), tmp_path / "table.csv"
    write_seeds(workspace, "cafe", {0: [1, 1, 0, 0], 1: [1, 0, 1, 0], 2: [0, 1, 1, 0]})
    write_seeds(workspace, "cafe", {0: [1, 1, 1, 1], 1: [1, 1, 1, 1], 2: [1, 1, 1, 0]}, "clean-tent")
    write_seeds(workspace, "scn", {0: [1, 0, 0, 0], 1: [1, 0, 0, 0]})

    def read(*options: str) -> tuple[dict[str, dict[str, str]], str]:
        table = cafe.succeed("compare", "--csv", str(file), *options)
        rows = [row for row in csv.DictReader(file.open()) if row["target"] == "unseen"]
        return {row["row"]: row for row in rows}, table

    rows, table = read()
    assert set(rows) == {"cafe", "scn"}
    assert "also evaluated with --test-time tent" in table
    rows, table = read("--test-time", "tent", "--test-time", "seeds", "--versus", "cafe")
    tent, seeds = rows["cafe (test_time=tent)"], rows["cafe (test_time=mean of 3 seeds)"]
    assert float(rows["cafe"]["mean"]) == 0.5
    assert {row: record["saw_target"] for row, record in rows.items() if record["saw_target"] != "no"} == {
        "cafe (test_time=tent)": "pictures"
    }
    assert (float(tent["mean"]), tent["seeds"]) == (pytest.approx(2.75 / 3), "3")
    # Two of three seeds are right on three faces of four, and sure of it: so is their mean.
    assert (float(seeds["mean"]), seeds["seeds"], seeds["half_width"]) == (0.75, "1", "")
    assert float(tent["accuracy_difference"]) == pytest.approx(2.75 / 3 - 0.5)
    assert float(seeds["accuracy_difference"]) == pytest.approx(0.25)
    assert float(rows["scn"]["mean"]) == 0.25  # both seeds alike
    ranks = table[table.index("Mean ranks") :]
    assert "cafe" in ranks
    assert "(test_time" not in ranks
    assert (
        "nothing to show by the protocol 'clean', as no run was evaluated with it: run `cafe evaluate RUN"
        in cafe.fail("compare", "--test-time", "flip")
    )


def test_only_rows_without_options_are_marked_best(tmp_path: Path) -> None:
    workspace = Workspace.at(str(tmp_path / "work"))
    write_seeds(workspace, "cafe", {0: [1, 0]})
    write_seeds(workspace, "cafe", {0: [1, 1]}, "clean-tent")
    write_seeds(workspace, "scn", {0: [0, 0]})
    file = tmp_path / "table.md"
    Cafe(tmp_path / "work", "").succeed("compare", "--test-time", "tent", "--markdown", str(file))
    lines = [line for line in file.read_text().splitlines() if line.startswith("| raf ")]
    assert [line for line in lines if "**50.0**" in line and "| cafe |" in line]
    tent, intervals = [line for line in lines if "test_time=tent" in line]
    assert "100.0" in tent
    assert "(96.3–100.0)" in intervals  # over faces
    for line in (tent, intervals):
        assert "**" not in line
        assert "| *" not in line
