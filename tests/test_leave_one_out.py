"""Leave-one-domain-out: which epoch is evaluated, which runs make a row, and views of its own for every seed."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from conftest import complaint
from domains import DOMAINS, draw_features, fill, make_workspace, planned, train
from runs import write_predictions, write_run
from trained import on_one_thread

from cafe.files import read_json
from cafe.jobs.runs import plan_tables
from cafe.learning.training import predict
from cafe.pipeline.benchmark.file import Benchmark, parse_benchmark
from cafe.pipeline.benchmark.plan import plan_benchmark
from cafe.pipeline.faces import choose_targets
from cafe.pipeline.models import load_method, make_dataset
from cafe.pipeline.process import lease
from cafe.pipeline.process.lease import find_holder, hold
from cafe.pipeline.process.progress import no_bar
from cafe.pipeline.runs import read_status
from cafe.pipeline.settings import BenchmarkSettings
from cafe.pipeline.tracking.mirror import Mirror
from cafe.pipeline.train import choose_epoch, train_and_evaluate
from cafe.pipeline.worker import LocalWorker
from cafe.pipeline.workspace import Workspace
from cafe.report import ReportSettings
from cafe.report.report import make_report
from cafe.report.sheets.comparison import ORACLES
from cafe.report.sheets.sheet import PEEKED
from cafe.results.columns import Column
from cafe.results.scores import share_sources
from cafe.results.sources import Source
from cafe.towers.weights import read_tensors


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return make_workspace(tmp_path)


# --- which epoch is evaluated --------------------------------------------------------------------------------------------


def follow(workspace: Workspace, evaluated: str, rows: np.ndarray, **settings: Any) -> tuple[list[float], list[Any]]:
    """Return the accuracy on some rows of a manifest, and the weights, after 1, 2 and 3 epochs: of three trainings."""
    manifest, accuracies, weights = workspace.load_manifest(evaluated), [], []
    for epochs in (1, 2, 3):
        plan = planned(workspace, epochs=epochs, **settings)
        weights.append(train(plan))
        (target,) = choose_targets(workspace, evaluated, plan.spec, "clean", "train")
        method, device = load_method(plan.spec, plan.run), torch.device("cpu")
        found = predict(method, make_dataset(plan.spec, target), rows, device).argmax(axis=1)
        accuracies.append(float((found == manifest.labels[rows]).mean()))
    return accuracies, weights


FAST = {"overrides": ("learning_rate=0.05", "batch_size=8")}


def test_the_oracle_takes_the_epoch_by_the_training_faces_of_the_domain_left_out(workspace: Workspace) -> None:
    plan = planned(workspace, fold="three", selection="oracle", **FAST)
    weights = train(plan)
    rows = workspace.load_manifest("three").rows("train")
    accuracies, after = follow(workspace, "three", rows, **FAST)
    best = int(np.argmax(accuracies))
    records = [read_json(path) or {} for path in sorted((plan.run / "epochs").iterdir())]
    assert [record["selection/accuracy"] for record in records] == pytest.approx(accuracies)
    assert (read_json(plan.run / "result.json") or {})["selected"] == best + 1
    assert all(torch.equal(weights[name], value) for name, value in after[best].items())


def test_leave_one_out_takes_the_epoch_that_is_best_on_the_sources_left_out_in_turn(workspace: Workspace) -> None:
    plan = planned(workspace, "one,two,three", selection="leave_one_out", sampler="balanced", **FAST)
    for fold in plan.folds:
        train(fold)
    assert [(fold.spec.source, fold.spec.fold) for fold in plan.folds] == [
        ("three+two", "one"), ("one+two", "three"), ("one+three", "two"),
    ]  # fmt: skip
    curves = []
    for fold in plan.folds:
        left_out = fold.spec.fold
        others = ",".join(sorted(set(DOMAINS) - {left_out}))
        rows = workspace.load_manifest(left_out).rows("train")
        curves.append(follow(workspace, left_out, rows, source=others, sampler="balanced", **FAST)[0])
    means = np.mean(curves, axis=0)
    assert choose_epoch(plan) == int(np.argmax(means)) + 1
    noted = read_json(plan.run / "selection.json") or {}
    assert noted["accuracy"] == pytest.approx(means.tolist())
    assert noted["folds"] == {fold.spec.fold: fold.spec.name for fold in plan.folds}


def test_two_commands_that_need_one_fold_train_it_once(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "WAIT_SECONDS", 0.02)
    plan = planned(workspace, "one,two,three", selection="leave_one_out", wait=True, **FAST)
    fold, *others = plan.folds
    for other in others:
        train(other)
    mirror, worker = Mirror(workspace, _asleep_until=math.inf), LocalWorker("cpu")  # MLflow plays no part
    impatient = on_one_thread(replace(plan, settings=replace(plan.settings, wait=False)))
    follower = Thread(target=train_and_evaluate, args=(on_one_thread(plan), mirror, no_bar, worker))
    with hold(fold.run):
        assert f"works on {fold.run}" in complaint(train_and_evaluate, impatient, mirror, no_bar, worker)
        assert (read_status(plan.run), find_holder(plan.run)) == ("FAILED", "")
        follower.start()
        weights = train(fold)
        written = (fold.run / "model.safetensors").stat().st_mtime
    follower.join()
    assert read_status(plan.run) == "FINISHED"
    assert (fold.run / "model.safetensors").stat().st_mtime == written
    assert all(torch.equal(read_tensors(fold.run / "model.safetensors")[name], own) for name, own in weights.items())


def test_a_training_that_ends_at_the_chosen_epoch_is_the_training_of_so_many_epochs(workspace: Workspace) -> None:
    plan = planned(workspace, selection="leave_one_out", **FAST)
    ended, short = train(plan, epochs=2), train(planned(workspace, epochs=2, **FAST))
    assert all(torch.equal(ended[name], value) for name, value in short.items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"source": "one", "selection": "leave_one_out"},
            "leave_one_out needs several sources, not 'one' alone: choose",
        ),
        ({"selection": "oracle"}, "--selection oracle looks at the domain left out: name it with --fold."),
        ({"fold": "two"}, "--fold two is one of the sources 'one,two': name a domain they leave out."),
        ({"fold": "four", "targets": None}, "Unknown manifest 'four'"),
        ({"method": "nearest_class_mean", "epochs": None, "selection": "oracle", "fold": "three"}, "has no epochs"),
    ],
)
def test_a_mistake_in_the_selection_is_one_sentence(workspace: Workspace, settings: Any, message: str) -> None:
    assert message in complaint(lambda: planned(workspace, **settings))


# --- leave-one-domain-out ---------------------------------------------------------------------------------------------


def grid_of(**content: Any) -> Benchmark:
    fixed = {"targets": list(DOMAINS), "methods": ["linear_probe", "nearest_class_mean"], "towers": ["timm:tiny"]}
    train = {"epochs": 2, "image_size": 32}
    return parse_benchmark(
        "lodo", {"sources": "all but target", "seeds": 2, "views": 3, "train": train, **fixed, **content}
    )


def test_all_but_target_trains_on_all_other_targets_and_evaluates_that_one(workspace: Workspace) -> None:
    replace(workspace.load_manifest("three"), kind="ferplus").save(workspace.manifest_path("three"))
    plan = plan_benchmark(workspace, grid_of(), BenchmarkSettings())
    assert [cell.name for cell in plan.cells[:6]] == [
        f"all but {name}/{method}/s0" for name in DOMAINS for method in ("linear_probe", "nearest_class_mean")
    ]
    assert not plan.missing_stores  # each is shared by all cells, as a source and as a target
    specs = [cell.plan.spec for cell in plan.cells if cell.plan]
    assert len(specs) == 12
    assert [(spec.source, spec.fold) for spec in specs[:6:2]] == [
        ("three+two", "one"), ("one+three", "two"), ("one+two", "three"),
    ]  # fmt: skip
    evaluated = {cell.plan.spec.fold: [target.name for target in cell.plan.targets] for cell in plan.cells if cell.plan}
    assert evaluated == {name: [name] for name in DOMAINS}
    assert len({spec.name for spec in specs}) == 12
    assert len({spec.group for spec in specs}) == 2  # a row for each method
    assert planned(workspace, fold="three").spec.group != planned(workspace).spec.group


def test_the_plan_says_what_leaving_one_out_costs(workspace: Workspace) -> None:
    final = plan_benchmark(workspace, grid_of(), BenchmarkSettings())
    train = {"epochs": 2, "image_size": 32, "selection": "leave_one_out"}
    plan = plan_benchmark(workspace, grid_of(train=train), BenchmarkSettings())
    assert [cell.obstacle for cell in plan.cells] == [""] * 12
    own, more = (sum(cell.work for cell in one.cells if cell.title == "linear_probe") for one in (final, plan))
    assert more == 2 * own  # each of two sources once alone, and both together
    assert [cell.folds for cell in plan.cells[:2]] == [2, 0]  # nothing to choose where there are no epochs
    (text,) = (str(table) for table in plan_tables(plan) if str(table).startswith("Training"))
    assert f"Of these, {own:,} are of the 12 trainings on all sources but one" in text


def test_all_but_target_needs_targets() -> None:
    assert complaint(lambda: grid_of(targets=["one"])).startswith(
        'sources = "all but target" in lodo needs at least two'
    )
    assert complaint(lambda: grid_of(sources="all")) == "sources of lodo must be a list, not 'all'."
    assert grid_of(sources=["two, one", "three"]).trainings == [("one,two", ""), ("three", "")]


def test_views_per_seed_take_a_store_for_each_seed_and_the_runs_stay_one_row(workspace: Workspace) -> None:
    content = {"sources": ["one"], "targets": ["one", "two"], "features": {"view_seed": "per seed"}}
    plan = plan_benchmark(workspace, grid_of(**content), BenchmarkSettings())
    wanted = [(store.manifest.name, store.settings.view_seed, store.settings.views) for store in plan.stores]
    assert wanted == [("one", 0, 3), ("two", 0, 1), ("one", 1, 3)]
    assert [(store.manifest.name, store.settings.view_seed) for store in plan.missing_stores] == [("one", 1)]
    (text,) = (str(table) for table in plan_tables(plan) if str(table).startswith("Towers"))
    assert (
        f"{2 * 3 * 36 + 24:,} passes fill 3 feature stores (faces × views), for each of 2 seeds views of its own"
        in text
    )
    one = workspace.load_manifest("one")
    fill(workspace, one, draw_features(one, 7), view_seed=1)
    plan = plan_benchmark(workspace, grid_of(**content), BenchmarkSettings())
    probes = [cell.plan.spec for cell in plan.cells if cell.plan and cell.entry.method == "linear_probe"]
    means = [cell.plan.spec for cell in plan.cells if cell.plan and cell.entry.method == "nearest_class_mean"]
    assert [(spec.seed, spec.view_seed, spec.features.view_seed if spec.features else -1) for spec in probes] == [
        (0, 0, 0), (1, 1, 1),
    ]  # fmt: skip
    assert probes[0].group == probes[1].group != planned(workspace, "one", view_seed=0).spec.group
    assert [(spec.seed, spec.view_seed) for spec in means] == [(0, 0), (1, 0)]
    seen = planned(workspace, "one", method="image_only", seed=5, views_per_seed=True, backbone="none").spec
    assert (seen.view_seed, seen.features) == (5, None)


RIGHT = {  # faces of 100 that each seed is right on, by method, selection and target
    ("cafe", "final"): {"one": (50, 52, 57), "two": (60, 61, 59), "three": (70, 66, 68)},
    ("scn", "final"): {"one": (40, 45, 41), "two": (55, 50, 52), "three": (60, 60, 63)},
    ("cafe", "oracle"): {"one": (90, 90, 91), "two": (90, 91, 90), "three": (92, 90, 90)},
}


def write_folds(workspace: Workspace) -> None:
    labels = np.arange(100) % 7
    for (method, selection), targets in RIGHT.items():
        for target, counts in targets.items():
            sources = sorted({*targets} - {target})
            for seed, count in enumerate(counts):
                named = [(name, "folder") for name in sources]
                run = write_run(
                    workspace, method, "+".join(sources), seed, sources=named, fold=target, selection=selection,
                    domains="one+three+two",
                )  # fmt: skip
                predicted = np.where(np.arange(100) < count, labels, (labels + 1) % 7)
                write_predictions(run, target, labels, predicted)
                write_predictions(run, sources[0], labels, labels)  # evaluated besides: no part of the table


def test_a_row_leaves_out_trainings_on_a_domain_as_it_was_before(workspace: Workspace) -> None:
    write_folds(workspace)
    runs = [run for run in workspace.read_runs() if run.method == "scn"]
    now = tuple(Source(name, "folder", f"digest of {name}") for name in ("one", "three"))
    before = replace(now[0], digest="another")  # by the digest's order the first
    stale = [replace(run, name=f"{run.name}-before", sources=(before, now[1])) for run in runs if run.fold == "two"]
    assert share_sources(runs) == (runs, [])
    for known in (None, {"one": "digest of one"}):
        kept, (line,) = share_sources([*stale, *runs], known)
        assert kept == runs
    names = ", ".join(run.name for run in stale)
    assert (
        line
        == f"Left out: {names}, trained on another manifest of one than the rest of the row. Give their command again."
    )
    unread = [run for run in runs if run.fold == "one"]
    assert share_sources([*stale, *runs], {"one": "another"})[0] == [*stale, *unread]
    report = make_report([*stale, *runs], {"one": "digest of one"})
    assert line in report.about
    assert [row.seeds for row in report.comparison.rows] == [3]


def test_the_row_of_a_method_takes_each_target_from_the_run_that_left_it_out(workspace: Workspace) -> None:
    write_folds(workspace)
    runs = workspace.read_runs()
    report = make_report(runs, settings=ReportSettings(versus="scn"))
    rows = {row.label: row for row in report.comparison.rows}
    assert {row.source for row in rows.values()} == {"all but target"}
    assert rows.keys() == {"cafe (selection=final)", "cafe (selection=oracle)", "scn"}
    for label, key in (("cafe (selection=final)", ("cafe", "final")), ("scn", ("scn", "final"))):
        values = np.array(list(RIGHT[key].values())) / 100  # (targets, seeds)
        for target, own in zip(RIGHT[key], values, strict=True):
            assert rows[label].cells[Column(target)].mean == pytest.approx(own.mean())
            assert rows[label].cells[Column(target)].half_width == pytest.approx(4.302653 * own.std(ddof=1) / 3**0.5)
        assert rows[label].unseen.mean == pytest.approx(values.mean())
        assert rows[label].unseen.half_width == pytest.approx(4.302653 * values.mean(axis=0).std(ddof=1) / 3**0.5)
        assert (rows[label].seeds, rows[label].seen) == (3, frozenset())
    tested = {test.title: test.difference.mean for test in report.tests}
    ours, theirs = (np.array(list(RIGHT[method, "final"].values())).mean(axis=1) / 100 for method in ("cafe", "scn"))
    assert tested == pytest.approx({
        **dict(zip(RIGHT["scn", "final"], ours - theirs, strict=True)), "mean of unseen": float((ours - theirs).mean()),
    })  # fmt: skip
    faces = {test.title: test.difference.faces for test in report.tests}
    assert faces == {"one": 100, "two": 100, "three": 100, "mean of unseen": 300}


def test_the_oracle_is_marked_and_neither_best_nor_tested_nor_ranked(workspace: Workspace) -> None:
    write_folds(workspace)
    runs = workspace.read_runs()
    report = make_report(runs, settings=ReportSettings(versus="scn"))
    sheet = report.sheets[0]
    (line,) = (line for line in sheet.lines if "oracle" in line[1].text)
    assert all(cell.text.endswith("†") for cell in line[3:6])
    assert not any(cell.mark for cell in line)
    assert ORACLES in sheet.notes
    assert PEEKED not in sheet.notes
    assert not any(test.row.oracle or test.reference.oracle for test in report.tests)
    assert report.ranks is None or not any("oracle" in label for label in report.ranks.labels)
    against = partial(make_report, runs, settings=ReportSettings(versus="cafe (selection=oracle)"))
    assert "oracle" in complaint(against)
    assert "All but target: each target is evaluated by a training on all other domains" in " ".join(sheet.notes)
