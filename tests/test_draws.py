"""Sweeps: what is drawn, that a draw is a run like any other, what a trial chooses, and what is shown of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import complaint
from domains import make_workspace, planned, train

from cafe.jobs.runs import plan_tables
from cafe.methods import METHODS
from cafe.methods.draws import Choice, Power, draw_settings
from cafe.methods.method import apply_overrides
from cafe.pipeline.benchmark.file import Benchmark, parse_benchmark
from cafe.pipeline.benchmark.plan import plan_benchmark
from cafe.pipeline.evaluate import evaluate_target
from cafe.pipeline.runs import RunSpec
from cafe.pipeline.settings import BenchmarkSettings
from cafe.pipeline.workspace import Workspace
from cafe.report import ReportSettings
from cafe.report.report import Report, make_report
from cafe.results.columns import Column
from cafe.results.predictions import load_predictions
from cafe.results.runs import read_selection_accuracy
from cafe.results.variants import choose_draws


def test_a_setting_is_drawn_by_draw_trial_and_its_name_alone() -> None:
    known = {"rate": Power(10, -4, -2), "size": Power(2, 3, 5, whole=True), "share": Choice((0.0, 0.1, 0.5))}
    drawn = {(draw, seed): draw_settings(known, draw, seed) for draw in (0, 1, 2) for seed in (0, 1)}
    assert drawn[0, 0] == drawn[0, 1] == {}
    assert len({one["rate"] for (draw, _), one in drawn.items() if draw}) == 4
    assert draw_settings({"rate": known["rate"]}, 2, 1) == {"rate": drawn[2, 1]["rate"]}


def test_draws_fill_their_distribution() -> None:
    known = {"rate": Power(10, -4, -2), "size": Power(2, 3, 5, whole=True), "share": Choice((0.0, 0.1, 0.5))}
    several = [draw_settings(known, draw, 0) for draw in range(1, 2001)]
    exponents = np.sort(np.log10([one["rate"] for one in several]))
    uniform = np.linspace(-4, -2, len(exponents))
    assert np.abs(exponents - uniform).max() / 2 < 0.04  # Kolmogorov and Smirnov: p of .3 %
    assert {one["size"] for one in several} == set(range(8, 32))
    shares = [sum(one["share"] == value for one in several) / 2000 for value in (0.0, 0.1, 0.5)]
    np.testing.assert_allclose(shares, 1 / 3, atol=0.04)


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.trained])
def test_every_draw_of_every_method_is_a_recipe(name: str) -> None:
    method = METHODS[name]
    for draw in range(40):
        drawn = draw_settings(method.distributions(), draw, 0)
        recipe = apply_overrides(method.published_recipe(""), [f"{key}={value}" for key, value in drawn.items()], name)
        method.check_recipe(recipe, name)
        assert {key: getattr(recipe, key) for key in drawn} == pytest.approx(drawn)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return make_workspace(tmp_path_factory.mktemp("draws"))


def test_a_draw_is_a_run_of_its_own_and_what_is_given_is_not_drawn(workspace: Workspace) -> None:
    plain = planned(workspace, "one", method="mlp").spec
    given = {"method": "mlp", "overrides": ("hidden=4", "weight_decay=0.01")}
    zero, two, other = (
        planned(workspace, "one", draw=draw, seed=seed, **given).spec for draw, seed in ((0, 0), (2, 0), (2, 1))
    )
    assert plain.drawn == ()
    assert two.drawn == ("learning_rate", "batch_size", "dropout")
    assert {spec.recipe["weight_decay"] for spec in (zero, two, other)} == {0.01}
    assert zero.recipe == {**plain.recipe, "hidden": 4, "weight_decay": 0.01}
    assert len({spec.recipe["learning_rate"] for spec in (zero, two, other)}) == 3
    assert len({spec.name for spec in (plain, zero, two, other)}) == 4
    assert zero.group == two.group == other.group != planned(workspace, "one", method="mlp").spec.group
    assert two.group != planned(workspace, "one", draw=2, method="mlp").spec.group  # whose hidden layer is another
    assert "has no setting to draw" in complaint(
        lambda: planned(workspace, "one", method="nearest_class_mean", epochs=None, draw=1)
    )


# --- a grid of draws ---------------------------------------------------------------------------------------------------


def sweep_of(**content: Any) -> Benchmark:
    fixed: dict[str, Any] = {"targets": ["one", "two", "three"], "methods": ["mlp", "nearest_class_mean"], "draws": 3}
    fixed |= {"towers": ["timm:tiny"], "seeds": 2, "views": 3, "sources": "all but target"}
    train = {"epochs": 2, "image_size": 32, "selection": "source_val", "set": {"hidden": 4}}
    return parse_benchmark("sweep", {**fixed, "train": train, **content})


def test_draws_are_planned_as_trainings_and_said(workspace: Workspace) -> None:
    plan = plan_benchmark(workspace, sweep_of(), BenchmarkSettings(dry_run=True))
    assert len(plan.cells) == 3 * 2 * (3 + 1)  # what is not trained has no draws
    assert {cell.obstacle for cell in plan.cells} == {""}
    cell = next(cell for cell in plan.cells if cell.name == "all but two/mlp/s1/d2")
    assert cell.plan is not None
    same = planned(
        workspace, "one,three", method="mlp", epochs=2, seed=1, draw=2, fold="two", targets="two", views=3,
        selection="source_val", overrides=("hidden=4",),
    )  # fmt: skip
    assert cell.plan.spec == same.spec
    names = [cell.plan.spec.name for cell in plan.cells if cell.plan]
    more = plan_benchmark(workspace, sweep_of(draws=5), BenchmarkSettings(dry_run=True))
    assert set(names) < {cell.plan.spec.name for cell in more.cells if cell.plan}  # a sweep that is enlarged goes on
    texts = " ".join(str(table) for table in plan_tables(plan) if isinstance(table, str))
    assert "24 cells (3 sources × 2 methods × 2 seeds × 3 draws): 0 done" in texts


def test_draws_that_nothing_chooses_between_are_one_sentence() -> None:
    sentence = complaint(lambda: sweep_of(train={"epochs": 2}))
    assert (
        "The draws of mlp in sweep are chosen by held-out faces, and its selection is 'final': set selection"
        in sentence
    )
    assert "at least 1" in complaint(lambda: sweep_of(draws=0))
    assert sweep_of(draws=None).digest != sweep_of().digest


def test_a_benchmark_without_draws_keeps_its_name() -> None:
    plain = parse_benchmark("x", {"sources": ["one"], "methods": ["mlp"]})
    assert plain.title == "x-d44944f6"  # as it was before there were draws


# --- what is chosen and shown ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def swept(workspace: Workspace) -> Workspace:
    """A sweep of three draws in each of two trials, for one domain left out and, not finished, a fourth draw."""
    plan = plan_benchmark(workspace, sweep_of(), BenchmarkSettings(only="all but two/mlp/*"))
    for cell in plan.cells:
        assert cell.plan is not None
        train(cell.plan)
        evaluate_target(cell.plan.run, cell.plan.targets[0], torch.device("cpu"))
    begun = plan.cells[0].plan.with_seed(0, 3) if plan.cells[0].plan else None
    assert begun is not None
    begun.spec.save(begun.run)
    return workspace


def test_each_trial_chooses_its_best_draw_by_held_out_faces_alone(swept: Workspace) -> None:
    runs = [run for run in swept.read_runs() if run.draw is not None]
    assert len(runs) == 7
    chosen, trials = choose_draws(runs)
    assert [run.seed for run in chosen] == [0, 1]
    for run, trial in zip(chosen, trials, strict=True):
        own = {one.draw: read_selection_accuracy(one) for one in runs if one.seed == run.seed}
        done = {draw: accuracy for draw, accuracy in own.items() if accuracy is not None}
        best = max(done, key=lambda draw: (done[draw], -(draw or 0)))
        assert (run.draw, len(done)) == (best, 3)
        assert sorted(done.values(), reverse=True) == list(trial.accuracies)
        assert trial.middle == pytest.approx(np.median(list(done.values())))
        assert trial.near == sum(value >= max(done.values()) - 0.005 for value in done.values())
        assert trial.settings.keys() == {"learning_rate", "weight_decay", "batch_size", "dropout"}


def test_the_row_of_a_method_is_the_mean_of_what_its_trials_chose(swept: Workspace) -> None:
    runs = [run for run in swept.read_runs() if run.draw is not None]
    report = make_report(runs, settings=ReportSettings())
    (row,) = report.comparison.rows
    chosen, _ = choose_draws(runs)
    accuracies = []
    for run in chosen:
        predicted = load_predictions(run.folder)["two"]
        accuracies.append(float((predicted.probabilities.argmax(axis=1) == predicted.labels).mean()))
    assert row.cells[Column("two")].mean == pytest.approx(np.mean(accuracies))
    assert (row.label, row.seeds) == ("mlp", 2)
    assert _draws(report) == [["all but two", "mlp", str(run.seed), "3", f"draw {run.draw}"] for run in chosen]


def _draws(report: Report) -> list[list[str]]:
    (sheet,) = (sheet for sheet in report.sheets if sheet.title == "Draws")
    return [[line[place].text for place in (0, 1, 2, 3, 8)] for line in sheet.lines]


def test_the_record_of_a_draw_is_read_as_it_was_written(swept: Workspace, tmp_path: Path) -> None:
    run = next(run for run in swept.read_runs() if run.draw == 2)
    spec = RunSpec.load(run.folder)
    assert (spec.draw, spec.drawn, spec.name) == (2, run.drawn, run.name)
