"""Stage two through the command line: one result for any number of workers, any interruption, and every number logged."""

from __future__ import annotations

import json
import shutil
import socket
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Cafe, draw_faces
from mlflow import MlflowClient
from safetensors.torch import load_file
from trained import fill_store
from upath import UPath

from cafe.data.expressions import EXPRESSIONS
from cafe.data.manifest import Manifest
from cafe.pipeline.features.extract import describe_store, look_up_tower
from cafe.pipeline.features.store import FeatureStore
from cafe.pipeline.models import view_plan
from cafe.pipeline.plan import find_deviations, plan_training
from cafe.pipeline.runs import RunSpec, read_status
from cafe.pipeline.settings import ClusterSettings, ExtractSettings, TrainSettings
from cafe.pipeline.worker import find_worker
from cafe.pipeline.workspace import Workspace
from cafe.results.metrics import score
from cafe.results.predictions import load_predictions
from cafe.results.runs import read_result
from cafe.seals import read_sealed

TRAIN = ("train", "--source", "one", "--epochs", "2", "--set", "batch_size=20", "--set", "learning_rate=0.001")


@pytest.fixture(scope="module")
def extracted(tmp_path_factory: pytest.TempPathFactory, tiny_tower: str) -> Path:
    """A workspace of three domains with features; tests copy it."""
    folder = tmp_path_factory.mktemp("extracted")
    cafe = Cafe(folder / "work", "")
    for seed, (name, tint) in enumerate((("one", 0), ("two", 30), ("three", -40))):
        faces = draw_faces(folder / name, per_class=16, seed=seed, tint=tint)
        cafe.succeed("data", "index", "folder", str(faces), "--name", name)
    for name, views in (("one", 3), ("two", 1), ("three", 1)):
        settings = ExtractSettings(backbone=tiny_tower, views=views)
        fill_store(Workspace.at(str(cafe.workspace)), name, settings).finish()
    return folder / "work"


@pytest.fixture
def ready(extracted: Path, tmp_path: Path) -> Cafe:
    shutil.copytree(extracted, tmp_path / "work")
    return Cafe(tmp_path / "work", "")


@pytest.fixture
def joined(ready: Cafe, ray_address: str) -> Cafe:
    """The same workspace, whose commands can join the session's cluster."""
    return Cafe(ready.workspace, ray_address)


def only_run(cafe: Cafe) -> UPath:
    (run,) = (cafe.workspace / "runs").iterdir()
    return UPath(run)


def model(run: UPath) -> dict[str, torch.Tensor]:
    return load_file(str(run / "model.safetensors"))


def tracked(cafe: Cafe) -> list[Any]:
    client = MlflowClient(f"sqlite:///{cafe.workspace}/mlflow.db")
    return list(client.search_runs([client.get_experiment_by_name("cafe").experiment_id]))


def test_two_workers_give_the_weights_of_one_and_everything_is_logged(joined: Cafe) -> None:
    command = (*TRAIN, "--method", "cafe", "--image-size", "64")
    output = joined.succeed(*command)
    assert "mean of unseen" in output
    run = only_run(joined)
    (logged,) = tracked(joined)
    assert (logged.info.run_name, logged.info.status) == (run.name, "FINISHED")
    params, metrics = logged.data.params, logged.data.metrics
    assert params["method"] == "cafe"
    assert params["recipe.separation"] == "1.5"
    assert len(params["store"]) == len(params["manifest"]) == 64
    assert len(logged.data.tags["mlflow.source.git.commit"]) >= 7
    epoch = json.loads((run / "epochs" / "0002.json").read_text())
    assert {"train/total", "train/classification", "train/separation", "train/diverse"} <= set(epoch)
    assert metrics["train/total"] == pytest.approx(epoch["train/total"])
    assert metrics["learning_rate"] == pytest.approx(0.0009)

    predictions = load_predictions(run)
    assert set(predictions) == {"one", "two", "three"}
    for target, rows in predictions.items():
        for name, value in score(rows).items():
            assert metrics[f"target/{target}/{name}"] == pytest.approx(value)
    unseen = [score(predictions[target])["accuracy"] for target in ("two", "three")]
    assert metrics["unseen/accuracy"] == pytest.approx(np.mean(unseen))
    artifacts = {str(path.relative_to(joined.workspace)) for path in (joined.workspace / "artifacts").rglob("*.*")}
    for kind in ("confusion", "errors"):
        assert any(path.endswith(f"{kind}/two.png") for path in artifacts), kind
    masks = json.loads((run / "figures" / "masks" / "two.json").read_text())
    assert masks.keys() <= set(EXPRESSIONS)
    assert all(0 < value < 1 for mask in masks.values() for value in mask)
    assert any(path.endswith("predictions/three.parquet") for path in artifacts)

    one = model(run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    joined.succeed(*command)  # finished: nothing changes
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before

    shutil.rmtree(joined.workspace / "runs")
    joined.succeed(*command, "--num-workers", "2", "--targets", "none", ray=True)
    two = model(only_run(joined))
    assert one.keys() == two.keys()
    # Adam turns rounding in a vanishing gradient into whole steps, so single weights may differ; test_parallel compares
    # the gradients themselves, to 1e-9.
    difference = sum(float((two[name] - value).float().square().sum()) for name, value in one.items())
    assert difference**0.5 < 0.01 * sum(float(value.float().square().sum()) for value in one.values()) ** 0.5
    again = json.loads((only_run(joined) / "epochs" / "0002.json").read_text())
    for name in ("train/total", "train/classification", "train/separation", "train/diverse"):
        assert again[name] == pytest.approx(epoch[name], rel=2e-3), name


def test_evaluate_evaluates_other_splits_and_compare_averages_seeds(joined: Cafe) -> None:
    for seed in ("0", "1"):
        joined.succeed(*TRAIN, "--method", "linear_probe", "--seed", seed, "--experiment", "mine")
    names = sorted(run.name for run in (joined.workspace / "runs").iterdir())
    output = joined.succeed("evaluate", names[0][:19], "--targets", "two", "--split", "train", ray=True)
    assert "two@train" in output
    assert [path.name for path in (joined.workspace / "runs" / names[0] / "experiments").iterdir()] == ["mine.json"]
    assert len(load_predictions(UPath(joined.workspace / "runs" / names[0]))["two@train"].labels) == 39

    table = joined.succeed("compare")
    assert "linear_probe" in table
    assert "two@train" not in table


def test_a_worker_gives_its_core_back_though_something_still_refers_to_it(joined: Cafe) -> None:
    import ray

    joined.join()
    with find_worker(ClusterSettings(joined.address), False) as worker:
        there = time.monotonic() + 60
        while ray.available_resources().get("CPU", 0) == 2 and time.monotonic() < there:  # it takes its core
            time.sleep(0.1)
        assert ray.available_resources().get("CPU", 0) == 1
    end = time.monotonic() + 60
    while ray.available_resources().get("CPU", 0) < 2 and time.monotonic() < end:
        time.sleep(0.1)
    assert ray.available_resources().get("CPU", 0) == 2
    assert worker


def test_pictures_of_a_target_that_are_gone_cost_its_gallery_alone_and_are_named(
    ready: Cafe, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = Workspace.at(str(ready.workspace)).load_manifest("two")
    pictures = Path(manifest.root)
    away = pictures.rename(pictures.with_name("away"))
    try:
        ready.succeed(*TRAIN, "--method", "linear_probe", "--targets", "two")
    finally:
        away.rename(pictures)
    run = only_run(ready)
    assert len(load_predictions(run)["two"].labels) == len(manifest)
    assert read_status(run) == "FINISHED"
    assert f"pictures of two are not shown, the first is {pictures}" in caplog.text


def test_image_only_needs_no_features(ready: Cafe) -> None:
    shutil.rmtree(ready.workspace / "features")
    ready.succeed(*TRAIN, "--method", "image_only", "--image-size", "32", "--targets", "two")
    assert (only_run(ready) / "predictions" / "two.parquet").exists()


def test_a_union_ends_at_the_epoch_that_its_folds_choose_and_evaluates_the_domain_left_out(joined: Cafe) -> None:
    probe = ("train", "--source", "two,one", "--fold", "three", "--method", "linear_probe", "--views", "1")
    command = (*probe, "--epochs", "4", "--set", "learning_rate=0.1", "--selection", "leave_one_out")
    joined.succeed(*command, ray=True)
    runs = {json.loads((run / "run.json").read_text())["source"]: run for run in (joined.workspace / "runs").iterdir()}
    assert runs.keys() == {"one", "two", "one+two"}  # the two that choose are runs of their own
    curves = [
        [json.loads(path.read_text())["selection/accuracy"] for path in sorted((runs[name] / "epochs").iterdir())]
        for name in ("one", "two")
    ]
    best = int(np.mean(curves, axis=0).argmax()) + 1
    assert json.loads((runs["one+two"] / "result.json").read_text())["epochs"] == best
    assert len(list((runs["one+two"] / "epochs").iterdir())) == best
    assert [sorted(load_predictions(UPath(run))) for run in runs.values()].count([]) == 2
    assert set(load_predictions(UPath(runs["one+two"]))) == {"three"}
    assert {run.info.status for run in tracked(joined)} == {"FINISHED"}
    table = joined.succeed("compare")
    assert "all but target" in table
    shutil.rmtree(runs["one+two"])
    before = {path: path.stat().st_mtime_ns for path in runs["one"].rglob("*.safetensors")}
    joined.succeed(*command)  # the folds are done: only the training they choose for is made again
    assert {path: path.stat().st_mtime_ns for path in runs["one"].rglob("*.safetensors")} == before


@pytest.mark.parametrize(("method", "workers"), [("zero_shot", "1"), ("nearest_class_mean", "2")])
def test_a_method_without_training_is_fitted_and_evaluated(joined: Cafe, method: str, workers: str) -> None:
    command = ("train", "--source", "one", "--method", method, "--targets", "two", "--num-workers", workers)
    joined.succeed(*command, ray=workers != "1")
    run = only_run(joined)
    assert read_result(run) == {"epochs": 0}
    (logged,) = tracked(joined)
    expected = score(load_predictions(run)["two"])["accuracy"]
    assert logged.data.metrics["target/two/accuracy"] == pytest.approx(expected)
    assert max(float(value.abs().max()) for value in model(run).values()) > 0.1


def test_a_target_is_never_read_before_the_training_is_over(joined: Cafe) -> None:
    """With a target's images gone, training still ends; evaluating is what fails."""
    path = UPath(joined.workspace / "manifests" / "two.parquet")
    replace(Manifest.load(path), root=str(joined.workspace / "gone")).save(path)
    result = joined(*TRAIN, "--method", "image_only", "--image-size", "32", "--targets", "one,two", ray=True)
    assert result.exit_code == 1
    assert "is missing with its whole folder" in result.output
    assert "Traceback" not in result.output
    assert (only_run(joined) / "model.safetensors").exists()
    status = json.loads((only_run(joined) / "status.json").read_text())
    assert (status["status"], "is missing with its whole folder" in status["reason"]) == ("FAILED", True)
    assert tracked(joined)[0].info.status == "FAILED"


def test_a_training_in_the_commands_own_process_ends_in_the_bytes_of_rays_worker(joined: Cafe) -> None:
    import ray

    def contents() -> dict[str, bytes]:
        found = [path for path in only_run(joined).rglob("*") if path.suffix in (".safetensors", ".parquet", ".png")]
        return {str(path.relative_to(joined.workspace)): path.read_bytes() for path in found}

    joined.succeed(*TRAIN, "--method", "linear_probe", ray=True)
    there = contents()
    shutil.rmtree(joined.workspace / "runs")
    ray.shutdown()  # last of those that join it: each would need seconds to join anew
    joined.succeed(*TRAIN, "--method", "linear_probe")
    assert not ray.is_initialized()
    assert contents() == there
    assert len(there) == 1 + 3 * 3  # weights; predictions and two figures of three targets


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--source", "ones"), "Unknown manifest 'ones'"),
        (("--source", "one", "--seed", "99999999999999999999"), "99999999999999999999 is not a whole number"),
        (("--source", "one", "--method", "caffe"), "Unknown method 'caffe': choose cafe, "),
        (("--source", "one", "--views", "9"), "No features of 'one' fit --views 9 (there are: 3 views × 24 channels"),
        (("--source", "one", "--backbone", "clip-vit-b32"), "run `cafe extract one --backbone clip-vit-b32`"),
        (("--source", "one", "--set", "epoch=1"), "Unknown setting of cafe 'epoch'"),
        (
            ("--source", "one", "--network", "vgg"),
            "Unknown image branch 'vgg': choose efficientnet_lite0, mobilenet_v2, resnet",
        ),
        (("--source", "one", "--init", "msceleb"), "Unknown initialisation 'msceleb'"),
        (("--source", "one", "--backbone", "none"), "cafe needs a frozen tower: leave out --backbone none."),
        (("--source", "one", "--store", "other"), "No features of 'one' fit --store other (there are: 3 views × 24"),
        (("--source", "one", "--targets", "two,four"), "Unknown manifest 'four'"),
        (("--source", "one", "--num-workers", "64"), "64 workers are too many for batches of 32"),
        (
            ("--source", "one", "--num-workers", "64", "--set", "batch_size=64"),
            "64 workers are too many for 39 faces of 'one'",
        ),
    ],
)
def test_a_wrong_call_is_one_sentence_before_ray_starts(ready: Cafe, arguments: tuple[str, ...], message: str) -> None:
    assert message in ready.fail("train", *arguments)


def test_a_target_of_another_tower_says_which_field_differs(ready: Cafe, tiny_tower: str) -> None:
    shutil.rmtree(ready.workspace / "features" / "two")
    bicubic = ExtractSettings(backbone=tiny_tower, interpolation="bicubic")
    fill_store(Workspace.at(str(ready.workspace)), "two", bicubic)
    message = ready.fail("train", "--source", "one", "--targets", "one,two")
    assert "its closest store differs in interpolation: bilinear against bicubic" in message


def test_fewer_views_are_taken_from_a_larger_store(ready: Cafe) -> None:
    workspace = Workspace.at(str(ready.workspace))
    many = 32  # workers, one for each face of a batch
    specs = [
        plan_training(workspace, TrainSettings(source="one", views=views, num_workers=many)).spec
        for views in (2, 3, None)
    ]
    assert [spec.views for spec in specs] == [2, 3, 3]
    assert specs[0].features == specs[1].features == specs[2].features
    assert [view_plan(specs[0]).view_of(epoch) for epoch in (1, 2, 3)] == [1, 1, 1]


def test_an_unfinished_store_or_run_says_how_to_finish_it(ready: Cafe) -> None:
    receipt = next((ready.workspace / "features" / "one").rglob("receipts/00000.json"))
    receipt.unlink()
    assert "lack 1 shards: run `cafe extract`" in ready.fail("train", "--source", "one")
    assert "Unknown run 'x': there is none yet." in ready.fail("evaluate", "x")


def test_a_store_that_was_only_begun_does_not_compete_with_finished_ones(ready: Cafe, tiny_tower: str) -> None:
    workspace = Workspace.at(str(ready.workspace))
    before = plan_training(workspace, TrainSettings(source="one"))
    settings = ExtractSettings(backbone=tiny_tower, interpolation="bicubic", views=3)
    tower = look_up_tower(workspace, settings)
    for name in ("one", "two"):
        manifest = workspace.load_manifest(name)
        FeatureStore.create(workspace.features / name, describe_store(manifest, settings, tower), manifest)
    assert plan_training(workspace, TrainSettings(source="one")) == before


def test_changed_images_ask_for_a_new_extraction(ready: Cafe, tmp_path: Path) -> None:
    faces = draw_faces(tmp_path / "other", per_class=16, seed=9)
    ready.succeed("data", "index", "folder", str(faces), "--name", "one")
    assert "were made of other images than its manifest lists now" in ready.fail("train", "--source", "one")


def test_a_method_that_needs_no_features_learns_as_published_unless_told_otherwise(ready: Cafe) -> None:
    workspace = Workspace.at(str(ready.workspace))
    scn = TrainSettings(source="one", method="scn", epochs=4)
    spec = plan_training(workspace, scn).spec
    assert (spec.policy, spec.views, spec.mean, spec.features) == ("scn", 5, (0.485, 0.456, 0.406), None)
    told = plan_training(workspace, replace(scn, backbone="open_clip:tiny-cafe-vit", views=2, policy="paper"))
    assert (told.spec.policy, told.spec.views) == ("paper", 2)


def test_ofer_reads_the_clean_view_of_any_store_and_augments_by_itself(ready: Cafe, tiny_tower: str) -> None:
    workspace = Workspace.at(str(ready.workspace))
    fill_store(workspace, "one", ExtractSettings(backbone=tiny_tower, maps=True))
    settings = TrainSettings(source="one", method="ofer", epochs=4, targets="none")
    spec = plan_training(workspace, settings).spec
    assert spec.features is not None
    assert (spec.features.views, spec.features.maps, spec.views, spec.policy) == (1, True, 5, "ofer")


def test_what_is_not_as_published_is_written_into_the_run(ready: Cafe) -> None:
    workspace = Workspace.at(str(ready.workspace))
    settings = TrainSettings(source="one", method="scn", image_size=224)
    assert list(find_deviations(plan_training(workspace, settings).spec)) == []
    changed = replace(settings, views=2, network="resnet50", policy="paper", overrides=("relabel=none",))
    deviations = list(find_deviations(plan_training(workspace, changed).spec))
    assert deviations == ["relabel=none", "network=resnet50", "policy=paper", "views=2"]


def test_a_field_added_later_renames_no_run(ready: Cafe) -> None:
    @dataclass(frozen=True)
    class LaterSpec(RunSpec):
        warm_up: int = 0

    spec = plan_training(Workspace.at(str(ready.workspace)), TrainSettings(source="one")).spec
    assert LaterSpec(**vars(spec)).name == spec.name
    assert replace(spec, recipe={**spec.recipe, "later": 1}).name == spec.name
    assert replace(spec, seed=1).group == spec.group
    assert replace(spec, precision="bf16").group != spec.group


def test_a_recipe_setting_added_later_is_no_other_run_and_an_empty_one_is_not_reported(
    ready: Cafe, tmp_path: Path
) -> None:
    spec = plan_training(Workspace.at(str(ready.workspace)), TrainSettings(source="one")).spec
    run = UPath(tmp_path / spec.name)
    spec.save(run)
    before = (run / "run.json").read_bytes()
    replace(spec, recipe={**spec.recipe, "wordings": ""}).save(run)
    assert (run / "run.json").read_bytes() == before
    assert replace(spec, recipe={**spec.recipe, "wordings": ""}).settings == spec.settings
    assert "recipe.wordings" in replace(spec, recipe={**spec.recipe, "wordings": "fear:afraid"}).settings


def test_a_run_of_an_older_format_or_of_other_defaults_is_one_sentence(ready: Cafe) -> None:
    plan = plan_training(Workspace.at(str(ready.workspace)), TrainSettings(source="one", targets="none"))
    plan.spec.save(plan.run)
    assert RunSpec.load(plan.run) == plan.spec
    record = read_sealed(plan.run / "run.json") or {}
    record["spec"]["recipe"]["gamma"] = 0.5  # the default of the version that began the run
    (plan.run / "run.json").write_text(json.dumps(record))
    assert "was begun with another recipe by another version of cafe" in ready.fail(
        "train", "--source", "one", "--targets", "none"
    )
    (plan.run / "run.json").write_text(json.dumps({**record, "version": 1}))
    (plan.run / "result.json").write_text("{}")
    assert "is in the old format 1" in ready.fail("evaluate", plan.spec.name)


def test_a_tracking_server_that_is_down_stops_no_training(ready: Cafe) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{probe.getsockname()[1]}"
    command = (*TRAIN, "--method", "linear_probe", "--targets", "two", "--mlflow-uri", address)
    result = ready(*command)
    assert result.exit_code == 0, result.output
    assert "Warning: MLflow at" in result.output
    assert "cafe mlflow sync" in result.output
    assert json.loads((only_run(ready) / "status.json").read_text()) == {"status": "FINISHED", "reason": ""}


def test_a_training_says_as_records_what_its_epochs_came_to(ready: Cafe) -> None:
    result = ready(*TRAIN, "--method", "linear_probe", "--targets", "none", "--json")
    assert result.exit_code == 0, result.output
    last = json.loads(result.stderr.splitlines()[-1])
    epoch = json.loads((only_run(ready) / "epochs" / "0002.json").read_text())
    assert (last["work"], last["unit"]) == (f"Training {only_run(ready).name}", "steps")
    assert last["done"] == last["total"] > 0
    assert (last["epochs_done"], last["epochs"]) == (2, 2)
    assert (last["loss"], last["accuracy"]) == pytest.approx((epoch["train/total"], epoch["train/accuracy"]), abs=1e-6)


def test_compare_without_runs_is_one_sentence(ready: Cafe) -> None:
    assert "No run was evaluated yet" in ready.fail("compare")
