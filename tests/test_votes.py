"""Votes of several people, from the files of a set to what is learned and evaluated; and what a temperature makes of it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import COLOURS, complaint, draw_faces
from miniatures import write_ferplus_png
from torch.nn import functional
from trained import fill_store, train_run
from upath import UPath

from cafe.data.expressions import EIGHT, EXPRESSIONS, ClassChoice
from cafe.data.indexing import index_files
from cafe.data.manifest import Face, Manifest
from cafe.data.readers import DATASETS
from cafe.data.readers.table import read_table
from cafe.data.votes import share
from cafe.errors import UserError
from cafe.files import read_json
from cafe.learning.calibration import fit_temperature
from cafe.methods import METHODS
from cafe.methods.method import Inputs, apply_overrides
from cafe.pipeline.models import load_method
from cafe.pipeline.plan import plan_training
from cafe.pipeline.runs import RunSpec
from cafe.pipeline.settings import ExtractSettings, TrainSettings
from cafe.pipeline.workspace import Workspace
from cafe.results.metrics import score, votes_accuracy, votes_cross_entropy
from cafe.results.predictions import Predictions
from cafe.towers.names import absolute_name

CLASSES = ("anger", "happiness", "neutral")


def face(sample: str, label: int, votes: tuple[int, ...] | None) -> Face:
    return Face(sample, sample, label, "train", None, 8, 8, "0" * 64, None, votes)


# --- from the files of a set -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [EXPRESSIONS, EIGHT])
def test_the_votes_of_ferplus_stand_in_the_manifest_by_class(tmp_path: Path, classes: tuple[str, ...]) -> None:
    write_ferplus_png(tmp_path)
    listing = DATASETS["ferplus"](UPath(tmp_path)).select(ClassChoice(classes))
    index = index_files("plus", listing)
    assert index.strange_votes == ({"NF": 1} if classes == EXPRESSIONS else {"NF": 1, "unknown": 4})
    manifest = index.manifest
    votes = manifest.votes
    assert votes is not None
    assert votes.shape == (len(manifest), len(classes))
    by_path = {file.path: file.votes for file in listing.files}
    for row, path in enumerate(manifest.table["path"].to_pylist()):
        assert dict(zip(classes, votes[row].tolist(), strict=True)) == {name: by_path[path][name] for name in classes}
    assert (votes.argmax(axis=1) == manifest.labels).all()
    without = Manifest(manifest.name, manifest.root, manifest.table.drop(["votes"]), manifest.kind, manifest.classes)
    assert manifest.digest == replace(without, table=manifest.table).digest


def test_a_manifest_without_votes_has_the_name_and_is_read_as_before(tmp_path: Path) -> None:
    manifest = Manifest.from_faces("old", str(tmp_path), [face("a.png", 0, None), face("b.png", 1, None)], "", CLASSES)
    voted = Manifest.from_faces(
        "old", str(tmp_path), [face("a.png", 0, (3, 0, 1)), face("b.png", 1, None)], "", CLASSES
    )
    assert voted.digest == manifest.digest
    assert manifest.votes is None
    np.testing.assert_array_equal(voted.votes, [[3, 0, 1], [0, 0, 0]])
    voted.save(UPath(tmp_path / "old.parquet"))
    np.testing.assert_array_equal(Manifest.load(UPath(tmp_path / "old.parquet")).votes, voted.votes)
    table = pq.read_table(tmp_path / "old.parquet")
    about = {key: value for key, value in table.schema.metadata.items() if key == b"cafe.manifest"}
    pq.write_table(table.drop(["votes"]).replace_schema_metadata(about), tmp_path / "old.parquet")
    assert Manifest.load(UPath(tmp_path / "old.parquet")).votes is None


@pytest.mark.parametrize(
    ("votes", "reason"), [([1, 2], "another number of classes"), ([1, -2, 3], "fewer than no votes")]
)
def test_damaged_votes_are_refused(tmp_path: Path, votes: list[int], reason: str) -> None:
    manifest = Manifest.from_faces("one", str(tmp_path), [face("a.png", 0, (3, 0, 1))], "", CLASSES)
    place = manifest.table.column_names.index("votes")
    wrong = manifest.table.set_column(place, "votes", pa.array([votes], pa.list_(pa.int32())))
    replace(manifest, table=wrong).save(UPath(tmp_path / "one.parquet"))
    assert reason in complaint(Manifest.load, UPath(tmp_path / "one.parquet"))


def test_columns_of_a_table_named_after_classes_are_votes(tmp_path: Path) -> None:
    draw_faces(tmp_path / "faces", per_class=1)
    votes = {name: [2 * place, 7 - place, int(place > 0)] for place, name in enumerate(COLOURS)}
    rows = [f"faces/{name}/000.jpg,{name},{','.join(map(str, counts))}" for name, counts in votes.items()]
    (tmp_path / "faces.csv").write_text("\n".join(["path,label,Happy,anger,neutral", *rows]))
    index = index_files("mine", read_table(UPath(tmp_path / "faces.csv")))
    manifest = index.manifest
    assert index_files("mine", read_table(UPath(tmp_path / "faces.csv")).select(ClassChoice(skip=("neutral",),
        classes=tuple(name for name in EXPRESSIONS if name != "neutral")))).strange_votes == {"neutral": 2}  # fmt: skip
    assert index.outvoted == (3, 2)  # most people chose anger, also where the label says happiness or sadness
    columns = [EXPRESSIONS.index(name) for name in ("happiness", "anger", "neutral")]
    for label, counts in zip(manifest.labels, manifest.votes.tolist(), strict=True):
        assert [counts[column] for column in columns] == votes[EXPRESSIONS[label]]
        assert sum(counts) == sum(votes[EXPRESSIONS[label]])


@pytest.mark.parametrize("cell", ["-1", "2.5", "many"])
def test_a_vote_that_is_no_count_is_named(tmp_path: Path, cell: str) -> None:
    (tmp_path / "faces.csv").write_text(f"path,label,anger\na.jpg,anger,{cell}\n")
    assert "Row 1 of" in complaint(read_table, UPath(tmp_path / "faces.csv"))


def test_single_votes_of_many_are_struck_out_and_the_rest_are_shares() -> None:
    votes = np.array([[8, 1, 1], [3, 1, 0], [0, 0, 0], [1, 1, 4], [1, 1, 1], [1, 1, 0]])
    expected = [[1, 0, 0], [0.75, 0.25, 0], [0, 0, 1], [0, 0, 1], [1 / 3, 1 / 3, 1 / 3], [0.5, 0.5, 0]]
    np.testing.assert_allclose(share(votes, np.array([0, 0, 2, 2, 0, 1])), expected, rtol=1e-6)
    all_single = share(np.array([[1, 1, 1, 1, 1]]), np.array([0]))
    np.testing.assert_allclose(all_single, np.full((1, 5), 0.2), rtol=1e-6)
    assert share(np.zeros((1, 3), int), np.array([-1])).tolist() == [[0, 0, 0]]


# --- what is learned -------------------------------------------------------------------------------------------------


def test_every_method_learns_votes_or_says_that_it_does_not() -> None:
    published = {"scn", "rul", "eac", "ofer", "ofer_own"}
    for name, method in METHODS.items():
        recipe = apply_overrides(method.published_recipe("ferplus"), ["labels=votes"], name)
        if method.takes_votes:
            method.check_recipe(recipe, name)
        else:
            assert "leave labels=votes out" in complaint(method.check_recipe, recipe, name)
    assert published.isdisjoint(name for name, method in METHODS.items() if method.takes_votes)
    assert {"cafe", "cafe_self", "cafe_vector", "linear_probe", "mlp", "image_only", "finetune"} <= {
        name for name, method in METHODS.items() if method.takes_votes
    }


@pytest.mark.parametrize("name", ["linear_probe", "cafe_self"])
def test_the_loss_is_the_cross_entropy_to_the_shares(name: str) -> None:
    recipe = apply_overrides(METHODS[name].published_recipe(""), ["labels=votes"], name)
    method = METHODS[name](recipe, Inputs(6, classes=CLASSES))
    features, shares = torch.randn(5, 6), torch.tensor([[0.2, 0.8, 0.0]]).repeat(5, 1)
    batch = {"features": features, "label": torch.ones(5, dtype=torch.long), "target": shares, "log_prior": 0.0}
    batch["generator"] = torch.Generator().manual_seed(0)
    output = method(batch)
    losses = method.losses(output, batch)
    by_hand = -(shares * output["logits"].log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(losses["classification" if name == "cafe_self" else "total"], by_hand)


def test_mixup_mixes_features_and_targets_by_one_share_within_the_drawn_pairs() -> None:
    recipe = apply_overrides(METHODS["mlp"].published_recipe(""), ["mixup=0.4"], "mlp")
    method = METHODS["mlp"](recipe, Inputs(3, classes=CLASSES))
    labels = torch.tensor([0, 1, 2])
    torch.manual_seed(3)
    mixed = method.augment({"features": torch.eye(3), "label": labels})
    torch.testing.assert_close(mixed["features"], mixed["target"])  # features that are their labels stay so
    torch.testing.assert_close(mixed["target"].sum(1), torch.ones(3))
    assert not torch.equal(mixed["target"], torch.eye(3))
    assert torch.equal(mixed["label"], labels)
    message = complaint(
        METHODS["cafe"].check_recipe, apply_overrides(METHODS["cafe"].published_recipe(""), ["mixup=1"], "cafe"), "cafe"
    )
    assert "leave mixup out" in message


# --- what is evaluated -----------------------------------------------------------------------------------------------


def predictions(votes: list[list[int]] | None) -> Predictions:
    probabilities = np.array([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.2, 0.3, 0.5]], np.float32)
    counts = None if votes is None else np.array(votes)
    return Predictions(["a", "b", "c"], np.array([0, 1, 2]), probabilities, {}, None, CLASSES, counts)


def test_agreement_and_cross_entropy_are_those_of_a_random_person() -> None:
    voted = predictions([[9, 1, 0], [0, 0, 0], [5, 0, 5]])
    assert votes_accuracy(voted) == pytest.approx((0.9 + 0.5) / 2)
    by_hand = -(0.9 * math.log(0.7) + 0.1 * math.log(0.2) + 0.5 * math.log(0.2) + 0.5 * math.log(0.5)) / 2
    assert votes_cross_entropy(voted) == pytest.approx(by_hand, rel=1e-6)
    assert "votes_accuracy" in score(voted)
    assert "votes_accuracy" not in score(predictions(None))
    assert math.isnan(votes_cross_entropy(predictions([[0, 0, 0]] * 3)))


def test_votes_are_kept_with_the_predictions(tmp_path: Path) -> None:
    path = UPath(tmp_path / "t.parquet")
    voted = predictions([[9, 1, 0], [0, 0, 0], [5, 0, 5]])
    voted.save(path)
    for named in (True, False):
        read = Predictions.load(path, named)
        assert read is not None
        np.testing.assert_array_equal(read.votes, voted.votes)
    mixed = replace(voted, classes=("neutral", "happiness", "anger")).order_classes()
    np.testing.assert_array_equal(mixed.votes, voted.votes[:, [1, 2, 0]])
    shared = replace(voted, about={"target_classes": '["happiness", "neutral"]'}).of_class(2).share_classes()
    np.testing.assert_array_equal(shared.votes, [[0, 5]])
    predictions(None).save(path)
    assert Predictions.load(path).votes is None


# --- a whole run -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def voted(tmp_path_factory: pytest.TempPathFactory, tiny_tower: str) -> Workspace:
    """Faces of which half have votes, in a workspace with three layers of their features."""
    folder = tmp_path_factory.mktemp("voted")
    workspace = Workspace.at(str(folder / "work"))
    draw_faces(folder / "faces", per_class=10)
    files = [
        (f"{name}/{number:03d}.{'png' if number % 2 else 'jpg'}", name) for name in COLOURS for number in range(10)
    ]
    rows = [
        f"{path},{name},{'train' if place % 10 < 7 else 'test'},{6 if place % 2 else ''},{4 if place % 2 else ''}"
        for place, (path, name) in enumerate(files)
    ]
    (folder / "faces.csv").write_text("\n".join(["path,label,split,anger,fear", *rows]))
    index = index_files("mine", read_table(UPath(folder / "faces.csv"), UPath(folder / "faces")))
    index.manifest.save(workspace.manifest_path("mine"))
    for layer in ("block1/2x2", "final"):
        fill_store(workspace, "mine", ExtractSettings(backbone=absolute_name(f"{tiny_tower}#{layer}"), views=2))
    return workspace


def test_a_run_on_votes_of_two_layers_side_by_side_is_calibrated_and_read_back(
    voted: Workspace, tiny_tower: str
) -> None:
    both = f"{tiny_tower}#block1/2x2+final"
    settings = {"source": "mine", "method": "linear_probe", "backbone": both, "epochs": 2}
    run = train_run(voted, overrides=("labels=votes", "calibration=temperature", "features=standardised"), **settings)
    spec = RunSpec.load(run)
    assert (spec.width, spec.backbone, len(spec.votes)) == (4 * 32 + 24, both, 64)
    method = load_method(spec, run)
    assert method.temperature.item() == pytest.approx(read_json(run / "result.json")["temperature"])
    assert method.temperature.item() != 1
    plain = train_run(voted, **settings)
    assert RunSpec.load(plain).votes == ""
    said = Predictions.load(run / "predictions" / "mine.parquet")
    assert said is not None
    manifest = voted.load_manifest("mine")
    rows = [manifest.sample_ids.index(sample) for sample in said.sample_ids]
    np.testing.assert_array_equal(said.votes, manifest.votes[rows])
    (part,) = plan_training(voted, TrainSettings(**settings)).source.parts
    apart = [store.read_view("pooled", 0) for store in part.features]
    assert [values.shape[1] for values in apart] == [128, 24]


def test_layers_are_read_live_and_from_stores_alike(voted: Workspace, tiny_tower: str) -> None:
    from cafe.pipeline.models import make_dataset, make_live_dataset

    settings = TrainSettings(source="mine", method="mlp", backbone=f"{tiny_tower}#block1/2x2+final", epochs=2)
    plan = plan_training(voted, settings)
    rows = plan.source.rows("train")[:5]
    stored = make_dataset(plan.spec, plan.source).features.read(rows, 0)["pooled"]
    live = make_live_dataset(plan.spec, plan.source, "cpu").features.read(rows, 0)["pooled"]
    np.testing.assert_allclose(stored, live, atol=2e-3)
    assert stored.shape == (5, 152)
    other = plan_training(voted, replace(settings, backbone=f"{tiny_tower}#final+block1/2x2"))
    assert other.spec.name != plan.spec.name
    np.testing.assert_array_equal(
        make_dataset(other.spec, other.source).features.read(rows, 0)["pooled"][:, :24], stored[:, 128:]
    )


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"overrides": ("labels=votes",), "method": "nearest_class_mean"}, "leave labels=votes out"),
        ({"overrides": ("calibration=temperature",), "selection": "source_test"}, "take another selection"),
        ({"backbone": "{}#block1/2x2+block2"}, "run `cafe extract mine"),
        ({"backbone": "{}#final+final"}, "name each once"),
    ],
)
def test_what_cannot_be_is_one_sentence(
    voted: Workspace, tiny_tower: str, changes: dict[str, object], reason: str
) -> None:
    fixed = {"source": "mine", "method": "linear_probe", "backbone": f"{tiny_tower}#final"}
    if "backbone" in changes:
        changes = {"backbone": str(changes["backbone"]).format(tiny_tower)}
    assert reason in complaint(plan_training, voted, TrainSettings(**{**fixed, **changes}))


def test_a_source_without_votes_cannot_teach_them(voted: Workspace, tmp_path: Path, tiny_tower: str) -> None:
    manifest = voted.load_manifest("mine")
    silent = manifest.table.set_column(
        manifest.table.column_names.index("votes"), "votes", pa.nulls(len(manifest), pa.list_(pa.int32()))
    )
    there = Workspace.at(str(tmp_path / "work"))
    replace(manifest, table=silent).save(there.manifest_path("mine"))
    fill_store(there, "mine", ExtractSettings(backbone=tiny_tower))
    settings = TrainSettings(source="mine", method="mlp", overrides=("labels=votes",), views=1)
    assert "has votes" in complaint(plan_training, there, settings)


def test_the_temperature_is_that_by_which_confident_logits_were_scaled() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4000, 5, generator=generator).double() * 2
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    assert fit_temperature(logits, labels) == pytest.approx(1, abs=0.06)
    assert fit_temperature(logits * 3, labels) == pytest.approx(3 * fit_temperature(logits, labels), rel=1e-3)
    scaled = logits * 3
    before, after = (functional.cross_entropy(scaled / by, labels) for by in (1, fit_temperature(scaled, labels)))
    assert after < before


def test_predictions_of_a_calibrated_method_are_its_logits_by_the_temperature() -> None:
    recipe = apply_overrides(METHODS["linear_probe"].published_recipe(""), ["calibration=temperature"], "linear_probe")
    method = METHODS["linear_probe"](recipe, Inputs(4, classes=CLASSES)).eval()
    method.temperature.fill_(2.5)
    batch = {"features": torch.randn(3, 4)}
    torch.testing.assert_close(method.predict(batch), (method(batch)["logits"] / 2.5).softmax(1))
    with pytest.raises(UserError, match="leave calibration out"):
        METHODS["zero_shot"].check_recipe(
            replace(METHODS["zero_shot"].published_recipe(""), calibration="temperature"), "zero_shot"
        )
