"""Stage two through the command line: one result for any number of workers, any interruption, and every number logged."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Cafe, draw_faces
from pipeline.compare import Comparison, compare, compare_classes, name_variants
from pipeline.sheets import main_sheet
from safetensors.torch import load_file
from upath import UPath

from cafe.data.manifest import Manifest
from cafe.errors import UserError
from cafe.results.metrics import score
from cafe.results.predictions import Predictions
from pipeline.evaluate import summarise
from pipeline.settings import TrainSettings
from pipeline.tracking import TrackedRun, Tracker
from pipeline.train import plan_training
from pipeline.workspace import Workspace

TRAIN = ("train", "--source", "one", "--epochs", "2", "--set", "batch_size=16", "--set", "learning_rate=0.001")


@pytest.fixture(scope="module")
def extracted(tmp_path_factory: pytest.TempPathFactory, ray_address: str, tiny_tower: str) -> Path:
    """A workspace of three domains with features; tests copy it."""
    folder = tmp_path_factory.mktemp("extracted")
    cafe = Cafe(folder / "work", ray_address)
    for seed, (name, tint) in enumerate((("one", 0), ("two", 30), ("three", -40))):
        faces = draw_faces(folder / name, per_class=16, seed=seed, tint=tint)
        cafe.succeed("data", "index", "folder", str(faces), "--name", name)
    cafe.succeed("extract", "one", "--backbone", tiny_tower, "--views", "3", ray=True)
    cafe.succeed("extract", "two", "three", "--backbone", tiny_tower, ray=True)
    return folder / "work"


@pytest.fixture
def ready(extracted: Path, tmp_path: Path, ray_address: str) -> Cafe:
    shutil.copytree(extracted, tmp_path / "work")
    return Cafe(tmp_path / "work", ray_address)


def only_run(cafe: Cafe) -> UPath:
    (run,) = (cafe.workspace / "runs").iterdir()
    return UPath(run)


def model(run: UPath) -> dict[str, torch.Tensor]:
    return load_file(str(run / "model.safetensors"))


def tracked(cafe: Cafe) -> list[TrackedRun]:
    return Tracker(Workspace.at(str(cafe.workspace)), None, "cafe").runs()


def test_two_workers_give_the_weights_of_one_and_everything_is_logged(ready: Cafe) -> None:
    output = ready.succeed(*TRAIN, "--method", "cafe", ray=True)
    assert "mean of unseen" in output
    run = only_run(ready)
    (logged,) = tracked(ready)
    assert logged.name == run.name
    assert logged.params["method"] == "cafe"
    assert logged.params["recipe.separation"] == "1.5"
    assert len(logged.params["store"]) == len(logged.params["manifest"]) == 64
    assert len(logged.tags["mlflow.source.git.commit"]) >= 7
    epoch = json.loads((run / "epochs" / "0002.json").read_text())
    assert {"train/total", "train/classification", "train/separation", "train/diverse"} <= set(epoch)
    assert logged.metrics["train/total"] == pytest.approx(epoch["train/total"])
    assert logged.metrics["learning_rate"] == pytest.approx(0.0009)

    predictions = {path.stem: Predictions.load(path) for path in (run / "predictions").iterdir()}
    assert set(predictions) == {"one", "two", "three"}
    for target, rows in predictions.items():
        for name, value in score(rows).items():
            assert logged.metrics[f"target/{target}/{name}"] == pytest.approx(value)
    unseen = [score(predictions[target])["accuracy"] for target in ("two", "three")]
    assert logged.metrics["unseen/accuracy"] == pytest.approx(np.mean(unseen))
    artifacts = {str(path.relative_to(ready.workspace)) for path in (ready.workspace / "artifacts").rglob("*.*")}
    for kind in ("confusion", "errors", "masks"):
        assert any(path.endswith(f"{kind}/two.png") for path in artifacts), kind
    assert any(path.endswith("predictions/three.parquet") for path in artifacts)

    one = model(run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    ready.succeed(*TRAIN, "--method", "cafe")  # finished: no Ray, nothing changes
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before

    shutil.rmtree(ready.workspace / "runs")
    ready.succeed(*TRAIN, "--method", "cafe", "--num-workers", "2", "--targets", "none", ray=True)
    two = model(only_run(ready))
    assert one.keys() == two.keys()
    # Adam turns rounding in a vanishing gradient into whole steps, so single weights may differ; test_parallel compares
    # the gradients themselves, to 1e-9.
    difference = sum(float((two[name] - value).float().square().sum()) for name, value in one.items())
    assert difference**0.5 < 0.01 * sum(float(value.float().square().sum()) for value in one.values()) ** 0.5
    again = json.loads((only_run(ready) / "epochs" / "0002.json").read_text())
    for name in ("train/total", "train/classification", "train/separation", "train/diverse"):
        assert again[name] == pytest.approx(epoch[name], rel=2e-3), name


def test_evaluate_judges_other_splits_and_compare_averages_seeds(ready: Cafe) -> None:
    for seed in ("0", "1"):
        ready.succeed(*TRAIN, "--method", "linear_probe", "--seed", seed, ray=True)
    names = sorted(run.name for run in (ready.workspace / "runs").iterdir())
    output = ready.succeed("evaluate", names[0][:19], "--targets", "two", "--split", "all", ray=True)
    assert "two@all" in output
    assert (
        len(Predictions.load(UPath(ready.workspace / "runs" / names[0] / "predictions" / "two@all.parquet")).labels)
        == 48
    )

    table = ready.succeed("compare", "--markdown", str(ready.workspace / "table.md"))
    assert "±" in table
    row = compare(tracked(ready)).rows[0]
    assert (row.method, row.source, row.seeds) == ("linear_probe", "one", 2)
    values = [run.metrics["target/two/accuracy"] for run in tracked(ready)]
    assert row.targets["two"].mean == pytest.approx(np.mean(values))
    assert row.unseen.mean == pytest.approx(np.mean([run.metrics["unseen/accuracy"] for run in tracked(ready)]))
    assert f"| one | linear_probe | 2 | ({row.targets['one']}) |" in (ready.workspace / "table.md").read_text()


def test_image_only_needs_no_features(ready: Cafe) -> None:
    shutil.rmtree(ready.workspace / "features")
    ready.succeed(*TRAIN, "--method", "image_only", "--image-size", "32", "--targets", "two", ray=True)
    assert (only_run(ready) / "predictions" / "two.parquet").exists()


@pytest.mark.parametrize(("method", "workers"), [("zero_shot", "1"), ("nearest_class_mean", "2")])
def test_a_method_without_training_is_fitted_and_judged(ready: Cafe, method: str, workers: str) -> None:
    command = ("train", "--source", "one", "--method", method, "--targets", "two", "--num-workers", workers)
    ready.succeed(*command, ray=True)
    run = only_run(ready)
    assert json.loads((run / "result.json").read_text()) == {"epochs": 0}
    (logged,) = tracked(ready)
    expected = score(Predictions.load(run / "predictions" / "two.parquet"))["accuracy"]
    assert logged.metrics["target/two/accuracy"] == pytest.approx(expected)
    assert max(float(value.abs().max()) for value in model(run).values()) > 0.1


def test_a_target_is_never_read_before_the_training_is_over(ready: Cafe) -> None:
    """With a target's images gone, training still ends; judging is what fails."""
    path = UPath(ready.workspace / "manifests" / "two.parquet")
    replace(Manifest.load(path), root=str(ready.workspace / "gone")).save(path)
    result = ready(*TRAIN, "--method", "image_only", "--image-size", "32", "--targets", "one,two", ray=True)
    assert result.exit_code == 2
    assert "file not found" in result.output
    assert (only_run(ready) / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--source", "ones"), "Unknown manifest 'ones'"),
        (("--source", "one", "--method", "caffe"), "Unknown method 'caffe': choose cafe, "),
        (("--source", "one", "--views", "9"), "No features of 'one' fit --views 9 (there are: 3 views × 24 channels"),
        (("--source", "one", "--backbone", "clip-vit-b32"), "run `cafe extract one --backbone clip-vit-b32`"),
        (("--source", "one", "--set", "epoch=1"), "Unknown setting of cafe 'epoch'"),
        (("--source", "one", "--network", "vgg"), "Unknown network 'vgg': choose mobilenet_v2, resnet18, resnet50."),
        (("--source", "one", "--init", "msceleb"), "Unknown initialisation 'msceleb'"),
        (("--source", "one", "--backbone", "none"), "cafe needs a frozen tower: leave out --backbone none."),
        (("--source", "one", "--store", "other"), "No features of 'one' fit --store other (there are: 3 views × 24"),
        (("--source", "one", "--targets", "two,four"), "Unknown manifest 'four'"),
        (("--source", "one", "--num-workers", "64"), "64 workers are too many for batches of 32"),
    ],
)
def test_a_wrong_call_is_one_sentence_before_ray_starts(ready: Cafe, arguments: tuple[str, ...], message: str) -> None:
    assert message in ready.fail("train", *arguments)


def test_a_target_of_another_tower_says_which_field_differs(ready: Cafe, tiny_tower: str) -> None:
    shutil.rmtree(ready.workspace / "features" / "two")
    ready.succeed("extract", "two", "--backbone", tiny_tower, "--interpolation", "bicubic", ray=True)
    message = ready.fail("train", "--source", "one")
    assert "its closest store differs in interpolation: bilinear against bicubic" in message


def test_fewer_views_are_taken_from_a_larger_store(ready: Cafe) -> None:
    workspace = Workspace.at(str(ready.workspace))
    specs = [plan_training(workspace, TrainSettings(source="one", views=views)).spec for views in (2, 3, None)]
    assert [spec.views.views for spec in specs] == [2, 3, 3]
    assert specs[0].features == specs[1].features == specs[2].features
    assert [specs[0].views.view_of(epoch) for epoch in (1, 2, 3)] == [1, 1, 1]


def test_an_unfinished_store_or_run_says_how_to_finish_it(ready: Cafe) -> None:
    receipt = next((ready.workspace / "features" / "one").rglob("receipts/00000.json"))
    receipt.unlink()
    assert "lack 1 shards: run `cafe extract`" in ready.fail("train", "--source", "one")
    assert "Unknown run 'x': choose nothing yet." in ready.fail("evaluate", "x")


def test_changed_images_ask_for_a_new_extraction(ready: Cafe, tmp_path: Path) -> None:
    faces = draw_faces(tmp_path / "other", per_class=16, seed=9)
    ready.succeed("data", "index", "folder", str(faces), "--name", "one")
    assert "were made of other images than its manifest lists now" in ready.fail("train", "--source", "one")


def test_the_means_over_targets_leave_out_the_source_and_other_splits() -> None:
    scores = {
        name: {"accuracy": value, "mean_class_accuracy": value, "macro_f1": value}
        for name, value in (("one", 0.9), ("two", 0.4), ("three", 0.2), ("two@all", 0.0))
    }
    metrics = summarise("one", scores)
    assert metrics["unseen/accuracy"] == pytest.approx(0.3)
    assert metrics["all/accuracy"] == pytest.approx(0.5)
    assert metrics["target/two@all/accuracy"] == 0


def test_rows_are_told_apart_by_the_settings_in_which_they_differ() -> None:
    params = [
        {"source": "one", "method": "cafe", "seed": "0", "recipe.mask": mask, "recipe.epochs": "2"}
        for mask in ("sigmoid", "none")
    ]
    assert name_variants(params) == ["mask=sigmoid", "mask=none"]


def test_a_row_without_all_targets_has_no_mean_over_them() -> None:
    def run(name: str, metrics: dict[str, float]) -> TrackedRun:
        return TrackedRun(name, name, {"source": "one", "method": name, "seed": "0"}, metrics, {"cafe.group": name})

    full = {"target/one/accuracy": 0.9, "target/two/accuracy": 0.5, "target/three/accuracy": 0.3}
    means = {"unseen/accuracy": 0.4, "unseen/macro_f1": 0.4, "all/accuracy": 0.5667}
    partial = {"target/two/accuracy": 0.6, "unseen/accuracy": 0.6}
    rows = compare([run("cafe", {**full, **means}), run("linear_probe", partial)]).rows
    assert [str(row.unseen) for row in rows] == ["40.0", "–"]


def test_accuracy_per_expression_is_averaged_over_seeds() -> None:
    def run(seed: str, fear: float) -> TrackedRun:
        metrics = {"target/two/recall/fear": fear, "target/two/accuracy": 0.5, "target/two/mean_class_accuracy": fear}
        params = {"source": "one", "method": "cafe", "seed": seed}
        return TrackedRun(seed, seed, params, metrics, {"cafe.group": "cafe"})

    runs = [run("0", 0.2), run("1", 0.4)]
    (row,) = compare_classes(runs, "two")
    shown = {name: str(value) for name, value in row.values.items()}
    assert (row.seeds, shown["surprise"], shown["overall"]) == (2, "–", "50.0 ± 0.0")
    assert shown["fear"] == shown["mean"] == "30.0 ± 127.1"  # t(.975, 1 degree of freedom) = 12.706, times .1
    with pytest.raises(UserError, match="Unknown target 'three': choose two"):
        compare_classes(runs, "three")


def test_numbers_of_a_run_that_chose_its_epoch_on_the_source_test_are_marked() -> None:
    def run(selection: str) -> TrackedRun:
        params = {"source": "one", "method": "cafe", "seed": "0", "selection": selection}
        metrics = {"target/two/accuracy": 0.5, "unseen/accuracy": 0.5}
        return TrackedRun(selection, selection, params, metrics, {"cafe.group": selection})

    def texts(comparison: Comparison) -> list[list[str]]:
        return [[cell.text for cell in line] for line in main_sheet(comparison).lines]

    (line,) = texts(compare([run("source_test")]))
    assert line[1] == "cafe (selection=source_test)"
    assert all(cell.endswith("†") for cell in line[3:])
    final, peeked = texts(compare([run("final"), run("source_test")]))
    assert "†" not in "".join(final)
    assert "†" in "".join(peeked)


def test_compare_without_runs_is_one_sentence(ready: Cafe) -> None:
    assert "No evaluated run to compare yet" in ready.fail("compare")
