"""Several sources as one, and leave-one-domain-out: which faces are trained on, what is unseen, which epoch is judged."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import complaint, draw_faces
from runs import write_predictions, write_run
from upath import UPath

from cafe.data import DATASETS
from cafe.data.indexing import index_files
from cafe.data.manifest import Manifest
from cafe.data.union import Union, unite
from cafe.files import read_json, write_file
from cafe.learning.checkpoints import read_tensors
from cafe.learning.loading import FaceDataset, epoch_order
from cafe.learning.training import predict
from cafe.learning.views import ViewPlan
from cafe.methods.method import Recipe
from cafe.report.report import make_report
from cafe.report.sheets import ORACLES, PEEKED
from cafe.results.comparison import compare
from cafe.results.leaks import audit_path, leave_out_leaks
from cafe.results.scores import read_runs, read_scores
from jobs.run_tables import plan_tables
from pipeline.benchmark.file import Benchmark, parse_benchmark
from pipeline.benchmark.plan import plan_benchmark
from pipeline.faces import choose_targets
from pipeline.models import load_method, make_dataset
from pipeline.runs import RunSpec
from pipeline.settings import BenchmarkSettings, TrainSettings
from pipeline.sources import UnitedFaces, choose_rows
from pipeline.store import About, FeatureKey, FeatureStore, describe_policy
from pipeline.train import TrainPlan, choose_epoch, plan_training
from pipeline.worker import Task, Worker
from pipeline.workspace import Workspace

DOMAINS = {"one": 12, "two": 8, "three": 10}  # faces per expression
STATISTICS = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """Three domains, each with a store of three views of features that lean towards the label."""
    workspace = Workspace.at(str(tmp_path / "work"))
    for seed, (name, per_class) in enumerate(DOMAINS.items()):
        folder = draw_faces(tmp_path / name, per_class, seed=seed)
        manifest = index_files(name, DATASETS["folder"](UPath(folder))).manifest
        manifest.save(workspace.manifest_path(name))
        fill(workspace, manifest, draw_features(manifest, seed))
    return workspace


def draw_features(manifest: Manifest, seed: int, views: int = 3) -> np.ndarray:
    """Return (N, V, 8) random features."""
    random = np.random.default_rng(seed)
    return random.normal(seed, 1, (len(manifest), views, 8)) + np.eye(8)[manifest.labels][:, None]


def fill(workspace: Workspace, manifest: Manifest, features: np.ndarray, **key: Any) -> FeatureStore:
    policy = describe_policy("paper" if features.shape[1] > 1 else "clean")
    fields = {"views": features.shape[1], "policy": policy, **key}
    described = FeatureKey(manifest.image_digest, "timm:tiny", "weights", 32, STATISTICS, **fields)
    about = About(described, manifest.name, "timm:tiny", len(manifest), features.shape[2], None, 64)
    store = FeatureStore.create(workspace.features / manifest.name, about, manifest)
    for shard in store.pending():
        store.write_shard(shard, {"pooled": features[store.rows_of(shard)]}, {})
    return store


def planned(workspace: Workspace, source: str = "one,two", **settings: Any) -> TrainPlan:
    fixed = {"method": "linear_probe", "epochs": 3, "image_size": 32, "targets": "none"}
    return plan_training(workspace, TrainSettings(source=source, **{**fixed, **settings}))


def train(plan: TrainPlan, **more: Any) -> dict[str, torch.Tensor]:
    """Train a run as a worker does, in this process; return its weights."""
    plan.spec.save(plan.run)
    Worker().train(Task(str(plan.run), plan.source, 1, 0, 1, **more))
    return read_tensors(plan.run / "model.safetensors")


# --- a union ---------------------------------------------------------------------------------------------------------


def test_a_union_is_its_manifests_one_after_another(workspace: Workspace) -> None:
    source = planned(workspace).source
    assert isinstance(source, UnitedFaces)
    one, two = (workspace.load_manifest(name) for name in ("one", "two"))
    union = source.manifest
    assert (union.name, union.kind, len(union)) == ("one+two", "folder", 36 + 24)
    assert union.labels.tolist() == [*one.labels, *two.labels]
    assert union.sample_ids == [*one.sample_ids, *two.sample_ids]
    assert (union.path(35), union.path(36)) == (one.path(35), two.path(0))
    assert union.domains.tolist() == [0] * 36 + [1] * 24
    assert choose_rows(source, "final")[0].tolist() == [*one.rows("train"), *(two.rows("train") + 36)]
    reader = source.reader(["pooled"])
    assert reader is not None
    rows = np.random.default_rng(0).permutation(60)
    whole = np.concatenate([draw_features(manifest, seed) for seed, manifest in enumerate((one, two))])
    np.testing.assert_array_equal(reader.read(rows, 2)["pooled"], whole[rows, 2].astype(np.float16))
    assert unite([one]) is one
    assert Union("", "", union.table, "", (one, replace(two, kind="rafdb"))).parts[1].kind == "rafdb"
    assert unite([one, replace(two, kind="rafdb")]).kind == ""


def test_a_face_has_the_same_views_alone_and_in_a_union(workspace: Workspace) -> None:
    plan = ViewPlan("paper", 0, 3, "bilinear", *STATISTICS)
    two = workspace.load_manifest("two")
    union = unite([workspace.load_manifest("one"), two])
    alone, together = (
        next(FaceDataset(faces, plan, frozenset({"image"}), 32).load([rows], 1, torch.device("cpu")))
        for faces, rows in ((two, np.arange(5)), (union, np.arange(36, 41)))
    )
    assert torch.equal(alone["image"], together["image"])
    assert torch.equal(alone["label"], together["label"])


def test_training_on_a_union_is_training_on_the_one_manifest_that_holds_all_faces(workspace: Workspace) -> None:
    """Statistics, the source's prior and the order of faces included."""
    one, two = (workspace.load_manifest(name) for name in ("one", "two"))
    both = replace(unite([one, two]), name="both", root=str(workspace.root))
    ids = [f"{name}/{sample}" for name in ("1", "2") for sample in (one if name == "1" else two).sample_ids]
    table = both.table.set_column(0, "sample_id", [ids]).cast(both.table.schema)
    Manifest("both", str(workspace.root), table, "folder").save(workspace.manifest_path("both"))
    both = workspace.load_manifest("both")
    features = np.concatenate([draw_features(manifest, seed) for seed, manifest in enumerate((one, two))])
    fill(workspace, both, features)
    changed = {"overrides": ("features=standardised", "prior=adjusted", "batch_size=16")}
    united, single = (train(planned(workspace, source, **changed)) for source in ("two,one", "both"))
    assert united.keys() == single.keys()
    for name, values in united.items():
        assert torch.equal(values, single[name]), name
    train_rows = [*one.rows("train"), *(two.rows("train") + 36)]
    mean = features[train_rows, 0].astype(np.float16).astype(float).mean(axis=0)
    np.testing.assert_allclose(united["standardise.mean"], mean, atol=1e-6)


def test_a_union_is_named_by_all_its_sources_and_their_order_plays_no_part(workspace: Workspace) -> None:
    plan = planned(workspace, "two, one")
    assert plan.spec == planned(workspace, "one,two").spec
    assert plan.spec.name.startswith("linear_probe-one+two-s0-")
    assert planned(workspace, "one,two,three").spec.name != plan.spec.name
    plan.spec.save(plan.run)
    assert RunSpec.load(plan.run) == plan.spec
    (run,) = read_runs([plan.run])
    manifests = [workspace.load_manifest(name) for name in ("one", "two")]
    assert [(source.name, source.kind, source.digest) for source in run.sources] == [
        (manifest.name, "folder", manifest.digest) for manifest in manifests
    ]


def test_a_run_with_one_source_is_called_what_it_was_called_before() -> None:
    key = FeatureKey("images", "timm:tiny", "weights", 32, STATISTICS, {"name": "paper", "version": 1}, views=3)
    common: dict[str, Any] = {"source_digest": "digest", "recipe": {"epochs": 3}, "recipe_changes": {"epochs": 3}}
    common |= {"image_size": 32, "policy": "paper", "views": 3, "mean": STATISTICS[0], "std": STATISTICS[1]}
    common |= {"features": key, "backbone": "timm:tiny", "width": 8, "source_kind": "folder"}
    spec = RunSpec("one", method="linear_probe", seed=2, selection="source_val", **common)
    assert (spec.name, spec.group) == ("linear_probe-one-s2-26855138", "20c64dc9")


def test_stores_of_a_union_must_be_alike_in_all_that_is_read(workspace: Workspace) -> None:
    three = workspace.load_manifest("three")
    fill(workspace, three, draw_features(three, 2, views=5), view_seed=1)
    folder = next(path.name for path in (workspace.features / "three").iterdir() if "-v5-" in path.name)
    first = next(path.name for path in (workspace.features / "one").iterdir())
    found = complaint(lambda: planned(workspace, "one,three", store=f"{first},{folder}"))
    assert found.startswith(
        "The features of 'one' and 'three' differ in view_seed, views: choose some that are alike with"
    )
    assert planned(workspace, "one,three", views=3).spec.features is not None
    fewer = planned(workspace, "one,three", views=2).spec  # of stores that hold more
    assert (fewer.views, fewer.features.views if fewer.features else 0) == (2, 2)
    clean = planned(workspace, "one,three", store=f"{first},{folder}", method="nearest_class_mean", epochs=None)
    assert clean.spec.sources  # reads the clean view alone


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "one,one"}, "The source 'one,one' must be one manifest or different ones, comma-separated."),
        ({"source": "one", "sampler": "balanced"}, "--sampler balanced needs several sources, not 'one' alone"),
        ({"source": "one,four"}, "Unknown manifest 'four'"),
    ],
)
def test_a_mistake_in_the_sources_is_one_sentence(workspace: Workspace, settings: Any, message: str) -> None:
    assert message in complaint(lambda: planned(workspace, **settings))


def test_the_balanced_sampler_meets_every_domain_equally_often() -> None:
    domains = np.repeat([0, 1, 2], [60, 30, 9])
    rows = np.delete(np.arange(99), [3, 70])  # 59, 29 and 9 faces
    labels, recipe = np.zeros(99, int), Recipe(batch_size=12)
    batches = epoch_order(rows, labels, recipe, 0, 1, domains=domains)
    assert [len(batch) for batch in batches] == [12] * 8 + [1]
    assert [np.bincount(domains[batch], minlength=3).tolist() for batch in batches[:8]] == [[4, 4, 4]] * 8
    order = np.concatenate(batches)
    assert set(order) <= set(rows)
    counts = np.bincount(order, minlength=99)
    assert [counts[domains == number].sum() for number in range(3)] == [33, 32, 32]
    assert counts[:60].max() == 1  # a large source gives some of its faces, each once
    assert set(counts[90:]) == {3, 4}  # a small one gives all of them in turn
    again = np.concatenate(epoch_order(rows, labels, recipe, 0, 1, domains=domains))
    other = np.concatenate(epoch_order(rows, labels, recipe, 0, 2, domains=domains))
    assert order.tolist() == again.tolist() != other.tolist()
    uneven = epoch_order(rows, labels, replace(recipe, batch_size=10), 0, 1, domains=domains)
    assert {tuple(sorted(np.bincount(domains[batch], minlength=3))) for batch in uneven[:9]} == {(3, 3, 4)}


def test_training_with_balanced_domains_is_another_run_with_other_weights(workspace: Workspace) -> None:
    plans = [planned(workspace, sampler=sampler) for sampler in ("proportional", "balanced")]
    assert plans[0].spec.group != plans[1].spec.group
    assert [plan.spec.settings["sampler"] for plan in plans] == ["proportional", "balanced"]
    one, other = (train(plan) for plan in plans)
    assert not torch.equal(one["classifier.weight"], other["classifier.weight"])


def test_a_tenth_of_every_source_is_held_out(workspace: Workspace) -> None:
    source = planned(workspace, "one,three").source
    kept, held = choose_rows(source, "source_val")
    assert not set(kept) & set(held)
    alone = [choose_rows(part, "source_val") for part in source.parts]
    assert held.tolist() == [*alone[0][1], *(alone[1][1] + 36)]
    assert kept.tolist() == [*alone[0][0], *(alone[1][0] + 36)]


def test_unseen_is_what_shares_no_set_with_any_source(workspace: Workspace) -> None:
    run = write_run(workspace, source="raf+mine", sources=[("raf", "rafdb"), ("mine", "folder")])
    right = {"raf": 90, "mine": 80, "raf-aligned": 70, "copy": 60, "fer": 50, "yours": 30}
    kinds = {"raf": "rafdb", "raf-aligned": "rafdb", "fer": "ferplus"}
    labels = np.arange(100) % 7
    for target, count in right.items():
        predicted = np.where(np.arange(100) < count, labels, (labels + 1) % 7)
        manifest = "digest of mine" if target == "copy" else ""
        write_predictions(run, target, labels, predicted, kind=kinds.get(target, "folder"), manifest=manifest)
    runs = read_runs([run])
    comparison = compare(runs, read_scores(runs), "accuracy", "clean")
    (row,) = comparison.rows
    assert row.seen == {"raf", "mine", "raf-aligned", "copy"}
    assert row.unseen.mean == pytest.approx(0.4)
    assert row.means["all"].mean == pytest.approx((0.9 + 0.8 + 0.5 + 0.3) / 4)
    assert comparison.targets_with("same set") == ["copy", "raf-aligned"]


def test_copies_of_the_training_faces_of_every_source_are_left_out(workspace: Workspace) -> None:
    run = write_run(workspace, source="mine+raf", sources=[("mine", "folder"), ("raf", "rafdb")])
    predictions = write_predictions(run, "fer", np.arange(5), np.arange(5))
    (read,) = read_runs([run])

    def audit(source: str, splits: dict[str, str]) -> None:
        about = {"source_digest": f"digest of {source}", "target_digest": "digest of fer"}
        table = pa.table({"target_sample_id": list(splits), "source_split": list(splits.values())})
        sink = pa.BufferOutputStream()
        pq.write_table(table.replace_schema_metadata({"cafe.audit": json.dumps(about)}), sink)
        write_file(audit_path(workspace.root, source, "fer"), sink.getvalue().to_pybytes())

    audit("mine", {"00001.jpg": "train", "00002.jpg": "test"})
    missing = complaint(leave_out_leaks(workspace.root), read, "fer", predictions)
    assert missing.startswith("'fer' was not audited against 'raf' yet")
    audit("raf", {"00004.jpg": "train"})
    kept = leave_out_leaks(workspace.root)(read, "fer", predictions)
    assert kept.sample_ids == ["00000.jpg", "00002.jpg", "00003.jpg"]


# --- which epoch is judged --------------------------------------------------------------------------------------------


def follow(workspace: Workspace, judged: str, rows: np.ndarray, **settings: Any) -> tuple[list[float], list[Any]]:
    """Return the accuracy on some rows of a manifest, and the weights, after 1, 2 and 3 epochs: of three trainings."""
    manifest, accuracies, weights = workspace.load_manifest(judged), [], []
    for epochs in (1, 2, 3):
        plan = planned(workspace, epochs=epochs, **settings)
        weights.append(train(plan))
        (target,) = choose_targets(workspace, judged, plan.spec, "clean", "train")
        method, device = load_method(plan.spec, plan.run), torch.device("cpu")
        found = predict(method, make_dataset(plan.spec, target), rows, device).argmax(axis=1)
        accuracies.append(float((found == manifest.labels[rows]).mean()))
    return accuracies, weights


FAST = {"overrides": ("learning_rate=0.05", "batch_size=8")}


def test_the_oracle_takes_the_epoch_by_the_training_faces_of_the_domain_left_out(workspace: Workspace) -> None:
    plan = planned(workspace, fold="three", selection="oracle", **FAST)
    weights = train(plan, validation=plan.validation)
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
        train(fold, validation=fold.validation)
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


def test_all_but_target_trains_on_all_other_targets_and_judges_that_one(workspace: Workspace) -> None:
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
    judged = {cell.plan.spec.fold: [target.name for target in cell.plan.targets] for cell in plan.cells if cell.plan}
    assert judged == {name: [name] for name in DOMAINS}
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
                write_predictions(run, sources[0], labels, labels)  # judged besides: no part of the table


def test_the_row_of_a_method_takes_each_target_from_the_run_that_left_it_out(workspace: Workspace) -> None:
    write_folds(workspace)
    runs = read_runs(workspace.run_path(name) for name in workspace.run_names())
    report = make_report(runs, read_scores(runs), versus="scn")
    rows = {row.label: row for row in report.comparison.rows}
    assert {row.source for row in rows.values()} == {"all but target"}
    assert rows.keys() == {"cafe (selection=final)", "cafe (selection=oracle)", "scn"}
    for label, key in (("cafe (selection=final)", ("cafe", "final")), ("scn", ("scn", "final"))):
        values = np.array(list(RIGHT[key].values())) / 100  # (targets, seeds)
        for target, own in zip(RIGHT[key], values, strict=True):
            assert rows[label].cells[target].mean == pytest.approx(own.mean())
            assert rows[label].cells[target].half_width == pytest.approx(4.302653 * own.std(ddof=1) / 3**0.5)
        assert rows[label].unseen.mean == pytest.approx(values.mean())
        assert rows[label].unseen.half_width == pytest.approx(4.302653 * values.mean(axis=0).std(ddof=1) / 3**0.5)
        assert (rows[label].seeds, rows[label].seen) == (3, frozenset())
    tested = {test.target: test.difference.mean for test in report.tests}
    ours, theirs = (np.array(list(RIGHT[method, "final"].values())).mean(axis=1) / 100 for method in ("cafe", "scn"))
    assert tested == pytest.approx({
        **dict(zip(RIGHT["scn", "final"], ours - theirs, strict=True)), "": float((ours - theirs).mean()),
    })  # fmt: skip
    faces = {test.target: test.difference.faces for test in report.tests}
    assert faces == {"one": 100, "two": 100, "three": 100, "": 300}


def test_the_oracle_is_marked_and_neither_best_nor_tested_nor_ranked(workspace: Workspace) -> None:
    write_folds(workspace)
    runs = read_runs(workspace.run_path(name) for name in workspace.run_names())
    report = make_report(runs, read_scores(runs), versus="scn")
    sheet = report.sheets[0]
    (line,) = (line for line in sheet.lines if "oracle" in line[1].text)
    assert all(cell.text.endswith("†") for cell in line[3:6])
    assert not any(cell.mark for cell in line)
    assert ORACLES in sheet.notes
    assert PEEKED not in sheet.notes
    assert not any(test.row.oracle or test.reference.oracle for test in report.tests)
    assert report.ranks is None or not any("oracle" in label for label in report.ranks.labels)
    assert "oracle" in complaint(
        make_report, runs, read_scores(runs), "accuracy", "clean", None, "cafe (selection=oracle)"
    )
    assert "All but target: each target is judged by a training on all other domains" in " ".join(sheet.notes)
