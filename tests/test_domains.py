"""Several sources as one: which faces are trained on, in which order, and what is unseen."""

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
from conftest import complaint
from domains import STATISTICS, draw_features, fill, make_workspace, planned, train
from runs import write_predictions, write_run

from cafe.data.manifest import Manifest
from cafe.files import write_file
from cafe.learning.loading import FaceDataset, epoch_order
from cafe.methods.method import Recipe
from cafe.pipeline.faces import Faces, Part
from cafe.pipeline.features.key import FeatureKey
from cafe.pipeline.runs import RunSpec
from cafe.pipeline.workspace import Workspace
from cafe.results.columns import Column
from cafe.results.comparison import compare
from cafe.results.leaks import audit_path, leave_out_leaks
from cafe.results.runs import read_runs
from cafe.results.scores import read_scores
from cafe.views.drawing import ViewPlan


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return make_workspace(tmp_path)


def test_a_union_is_its_manifests_one_after_another(workspace: Workspace) -> None:
    source = planned(workspace).source
    one, two = (workspace.load_manifest(name) for name in ("one", "two"))
    union = source
    assert (union.name, union.kind, len(union.labels)) == ("one+two", "folder", 36 + 24)
    assert union.labels.tolist() == [*one.labels, *two.labels]
    assert union.sample_ids == [*one.sample_ids, *two.sample_ids]
    assert (union.path(35), union.path(36)) == (one.path(35), two.path(0))
    assert union.domains.tolist() == [0] * 36 + [1] * 24
    assert source.split_rows("final")[0].tolist() == [*one.rows("train"), *(two.rows("train") + 36)]
    reader = source.reader(["pooled"])
    assert reader is not None
    rows = np.random.default_rng(0).permutation(60)
    whole = np.concatenate([draw_features(manifest, seed) for seed, manifest in enumerate((one, two))])
    np.testing.assert_array_equal(reader.read(rows, 2)["pooled"], whole[rows, 2].astype(np.float16))
    assert Faces.of(Part.of(workspace, one)).pictures is one
    assert Faces.of(*(Part.of(workspace, part) for part in (one, replace(two, kind="rafdb")))).kind == ""


def test_a_union_has_the_classes_of_all_in_one_order_whatever_that_of_its_manifests(workspace: Workspace) -> None:
    one, two = (workspace.load_manifest(name) for name in workspace.manifest_names()[:2])
    odd = replace(two, classes=("pain", *reversed(two.classes[1:])))
    for several in ((one, odd), (odd, one)):
        faces = Faces.of(*(Part.of(workspace, manifest) for manifest in several))
        assert faces.classes == (*one.classes, "pain")
        named = [manifest.name_classes(manifest.rows("all")) for manifest in several]
        assert np.array(faces.classes)[faces.labels].tolist() == np.concatenate(named).tolist()
    assert Faces.of(Part.of(workspace, odd)).classes == odd.classes  # alone, its own


def test_a_face_has_the_same_views_alone_and_in_a_union(workspace: Workspace) -> None:
    plan = ViewPlan("paper", 0, 3, "bilinear", *STATISTICS)
    two = workspace.load_manifest("two")
    union = Faces.of(*(Part.of(workspace, part) for part in (workspace.load_manifest("one"), two)))
    alone, together = (
        next(FaceDataset(faces, plan, frozenset({"image"}), 32).load([rows], 1, torch.device("cpu")))
        for faces, rows in ((two, np.arange(5)), (union, np.arange(36, 41)))
    )
    assert torch.equal(alone["image"], together["image"])
    assert torch.equal(alone["label"], together["label"])


def test_training_on_a_union_is_training_on_the_one_manifest_that_holds_all_faces(workspace: Workspace) -> None:
    """Statistics, the source's prior and the order of faces included."""
    one, two = (workspace.load_manifest(name) for name in ("one", "two"))
    both = pa.concat_tables([one.table, two.table])
    ids = [f"{name}/{sample}" for name in ("1", "2") for sample in (one if name == "1" else two).sample_ids]
    table = both.set_column(0, "sample_id", [ids]).cast(both.schema)
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
    tower = {"backbone": "timm:tiny", "weights": "weights", "input_size": 32, "normalisation": STATISTICS}
    key = FeatureKey(images="images", **tower, policy={"name": "paper", "version": 1}, views=3)
    common: dict[str, Any] = {"source_digest": "digest", "recipe": {"epochs": 3}, "recipe_changes": {"epochs": 3}}
    common |= {"image_size": 32, "policy": "paper", "views": 3, "mean": STATISTICS[0], "std": STATISTICS[1]}
    common |= {"features": key, "backbone": "timm:tiny", "width": 8, "source_kind": "folder"}
    spec = RunSpec(source="one", method="linear_probe", seed=2, selection="source_val", **common)
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
    alone = planned(
        workspace, "one,three", views=1, store=f"{first},{folder}"
    ).spec  # the clean view is the same by all
    assert (alone.policy, alone.view_seed, alone.views) == ("clean", 0, 1)
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
    kept, held = source.split_rows("source_val")
    assert not set(kept) & set(held)
    alone = [Faces.of(part).split_rows("source_val") for part in source.parts]
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
    assert {column.name for column in row.seen} == {"raf", "mine", "raf-aligned", "copy"}
    assert row.unseen.mean == pytest.approx(0.4)
    assert row.everything.mean == pytest.approx((0.9 + 0.8 + 0.5 + 0.3) / 4)
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
    missing = complaint(leave_out_leaks(workspace.root), read, Column("fer"), predictions)
    assert missing.startswith("'fer' was not audited against 'raf' yet")
    audit("raf", {"00004.jpg": "train"})
    kept = leave_out_leaks(workspace.root)(read, Column("fer"), predictions)
    assert kept.sample_ids == ["00000.jpg", "00002.jpg", "00003.jpg"]
