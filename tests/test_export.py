"""An exported run says what the run says: as a graph, as a model again, and in its card."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Cafe, complaint, draw_faces
from mlflow import MlflowClient
from PIL import Image
from runs import write_predictions, write_run
from trained import fill_store, start_run
from upath import UPath

from cafe.data.indexing import index_files
from cafe.data.readers import DATASETS
from cafe.files import list_folder, write_json
from cafe.inference.graph import Onnx, write_onnx
from cafe.methods import METHODS, find_method
from cafe.pipeline.models import build_model
from cafe.pipeline.release.export import cut_middle, export_run
from cafe.pipeline.release.pyfunc import log_model
from cafe.pipeline.settings import ExtractSettings
from cafe.pipeline.tracking.mirror import Mirror, default_uri
from cafe.pipeline.workspace import Workspace
from cafe.report.card import format_share, write_card
from cafe.views.resizing import Resize

SETTINGS = {"source": "one", "targets": "two", "image_size": 64}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, tiny_tower: str) -> Workspace:
    """Two domains with features of a tiny tower, whose files are the workspace's own."""
    folder = tmp_path_factory.mktemp("export")
    files = [Path(file) for file in tiny_tower.removeprefix("open_clip:").split("@")]
    config, weights = (shutil.copy(file, folder) for file in files)
    workspace = Workspace.at(str(folder / "work"))
    for name, tint in (("one", 0), ("two", 30)):
        root = UPath(draw_faces(folder / name, per_class=16, tint=tint))
        index_files(name, DATASETS["folder"](root)).manifest.save(workspace.manifest_path(name))
        fill_store(workspace, name, ExtractSettings(backbone=f"open_clip:{config}@{weights}", views=2, maps=True))
    return workspace


def faces_of(workspace: Workspace) -> np.ndarray:
    """The predicted faces of the target, (N, 24, 24, 3)."""
    manifest = workspace.load_manifest("two")
    return np.stack([manifest.read_face(row) for row in manifest.rows("test")])


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_square_pictures_are_resized_as_pillow_does_to_the_last_bit(interpolation: str) -> None:
    random = np.random.default_rng(0)
    for side, size in ((100, 64), (40, 64), (64, 64), (350, 32), (17, 224)):
        picture = random.integers(0, 256, (side, side, 3), np.uint8)
        expected = Image.fromarray(picture).resize((size, size), Image.Resampling[interpolation.upper()])
        resized = Resize(size, interpolation)(torch.from_numpy(picture[None]))[0].permute(1, 2, 0)
        np.testing.assert_array_equal(resized.numpy(), np.asarray(expected))


def test_pictures_that_are_not_square_differ_by_a_grey_level_at_most() -> None:
    picture = np.random.default_rng(1).integers(0, 256, (90, 61, 3), np.uint8)
    expected = np.asarray(Image.fromarray(picture).resize((64, 64), Image.Resampling.BILINEAR)).astype(int)
    resized = Resize(64, "bilinear")(torch.from_numpy(picture[None]))[0].permute(1, 2, 0).numpy()
    assert np.abs(resized - expected).max() <= 1


def check_graph(path: Path, workspace: Workspace, predicted: np.ndarray) -> None:
    """A graph says of the target's faces, together and alone, what was said of them."""
    graph, faces = Onnx(str(path), threads=1), faces_of(workspace)
    np.testing.assert_allclose(graph.predict(faces), predicted, atol=1e-4)
    np.testing.assert_allclose(graph.predict(faces[:1]), predicted[:1], atol=1e-4)


EXPORTED = ("cafe", "finetune", "mlp")  # whose graphs are looked at further down, as they are exported


@pytest.mark.parametrize("method", sorted(METHODS.keys() - EXPORTED))
def test_every_method_is_a_graph_that_says_the_same_or_tells_why_not(
    method: str, workspace: Workspace, small_network: str, tmp_path: Path
) -> None:
    run, predicted = start_run(workspace, method=method, network=small_network, **SETTINGS)
    if reason := find_method(method).not_exported:
        assert complaint(export_run, workspace, run.name, UPath(tmp_path)).endswith(f"cannot be exported. {reason}")
        return
    write_onnx(build_model([run]), str(tmp_path / "model.onnx"))
    check_graph(tmp_path / "model.onnx", workspace, predicted)


@pytest.mark.parametrize("method", ["cafe", "finetune"])
def test_an_exported_folder_is_the_same_model_where_the_towers_own_files_are_gone(
    method: str, workspace: Workspace, tmp_path: Path
) -> None:
    run, predicted = start_run(workspace, method=method, tag="exported", **SETTINGS)
    exported = export_run(workspace, run.name, UPath(tmp_path / "model"))
    assert exported.difference < 1e-4
    check_graph(tmp_path / "model" / "model.onnx", workspace, predicted)
    record = json.loads((tmp_path / "model" / "model.json").read_text())
    assert record["labels"] == ["surprise", "fear", "disgust", "happiness", "sadness", "anger", "neutral"]
    assert (record["origin"]["source"], record["origin"]["seed"]) == ("one", 0)
    assert record["check"]["largest_difference"] == exported.difference
    folder = Path(str(workspace.root)).parent
    files = [*folder.glob("*.pt"), *folder.glob("*.json")]
    assert len(files) == 2
    for file in files:
        file.rename(tmp_path / file.name)
    try:
        assert "No weights file" in complaint(build_model, [run]) or "Cannot read" in complaint(build_model, [run])
        model = build_model([UPath(tmp_path / "model")])
        assert model.name == run.name
        np.testing.assert_allclose(model.predict(list(faces_of(workspace))), predicted, atol=1e-6)
    finally:
        for file in files:
            (tmp_path / file.name).rename(file)


def test_what_cannot_be_exported_is_said_before_anything_is_written(workspace: Workspace, tmp_path: Path) -> None:
    run, _ = start_run(workspace, method="linear_probe", **SETTINGS)
    (tmp_path / "photo.jpg").write_bytes(b"")
    assert "holds other files" in complaint(export_run, workspace, run.name, UPath(tmp_path))
    (run / "result.json").rename(run / "kept.json")
    assert "is not trained to its end" in complaint(export_run, workspace, run.name, UPath(tmp_path / "model"))
    (run / "kept.json").rename(run / "result.json")
    assert not (tmp_path / "model").exists()


def test_an_export_goes_on_where_it_was_and_replaces_nothing_else(workspace: Workspace, tmp_path: Path) -> None:
    run, _ = start_run(workspace, method="linear_probe", tag="begun", **SETTINGS)
    other, _ = start_run(workspace, method="linear_probe", tag="other", **SETTINGS)
    before = {path: path.read_bytes() for path in Path(str(other)).rglob("*") if path.is_file()}
    assert "holds other files" in complaint(export_run, workspace, run.name, other)
    assert {path: path.read_bytes() for path in Path(str(other)).rglob("*") if path.is_file()} == before
    folder = UPath(tmp_path / "model")
    export_run(workspace, run.name, folder)
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert not {".export", ".export.json"} & whole.keys()
    assert "holds other files" in complaint(export_run, workspace, other.name, folder)
    words = ["--workspace", str(workspace.root), "export", run.name, "--output", str(folder)]
    driver = subprocess.Popen([sys.executable, "-m", "cafe.jobs.cli", *words], stderr=subprocess.PIPE)
    while not (folder / ".export" / "model.onnx").exists():
        assert driver.poll() is None, driver.stderr.read() if driver.stderr else ""
        time.sleep(0.001)
    driver.kill()
    driver.communicate()
    assert {path.name: path.read_bytes() for path in list_folder(folder)} == whole
    assert (folder / ".export.json").exists()
    assert "holds other files" in complaint(export_run, workspace, other.name, folder)
    export_run(workspace, run.name, folder)
    assert {path.name for path in folder.iterdir()} == whole.keys()


def test_the_card_holds_the_scores_of_every_domain_with_intervals(tmp_path: Path) -> None:
    assert format_share(5, 10) == "50.0 (23.7–76.3)"  # Wilson: Agresti and Coull's example of 1998 is the like
    assert format_share(0, 0) == "–"
    workspace = Workspace.at(str(tmp_path))
    labels = np.arange(70) % 7
    for seed, wrong in ((0, 35), (1, 0)):
        run = write_run(workspace, seed=seed, source_kind="folder")
        write_predictions(run, "fer", labels, np.where(np.arange(70) < wrong, (labels + 1) % 7, labels))
    one, two = workspace.read_runs()
    record = {"input": {"name": "faces"}, "output": {"name": "probabilities"}}
    record |= {"check": {"faces": 32, "largest_difference": 2e-7}}
    card = write_card(one, [one, two], {}, record).decode()
    assert "**Unseen data sets: 50.0 / 100.0 % (mean ± 95 % t-interval over 2 seeds) on fer.**" in card
    assert f"| fer | unseen | 70 | {format_share(35, 70)} | {format_share(5, 10)} |" in card
    assert "the graph's probabilities differ from PyTorch's by at most 2.0e-07" in card


def test_the_middle_square_of_a_picture_is_cut() -> None:
    picture = np.arange(4 * 7).reshape(4, 7, 1).repeat(3, axis=2)
    np.testing.assert_array_equal(cut_middle(picture), picture[:, 1:5])


def test_the_command_says_how_well_the_graph_agrees(workspace: Workspace, tmp_path: Path) -> None:
    run, predicted = start_run(workspace, method="mlp", **SETTINGS)
    said = Cafe(Path(str(workspace.root)), "").succeed("export", run.name, "--output", str(tmp_path / "model"))
    assert said.startswith(f"Wrote {tmp_path / 'model'}: on 32 faces the graph differs from PyTorch by at most ")
    assert {path.name for path in (tmp_path / "model").iterdir()} == {
        "README.md", "model.json", "model.onnx", "model.safetensors", "run.json", "tiny-cafe-vit.json", "tower.safetensors",
    }  # fmt: skip
    check_graph(tmp_path / "model" / "model.onnx", workspace, predicted)


def test_models_of_runs_that_were_trained_before_are_logged_once(workspace: Workspace) -> None:
    for name in workspace.run_names():
        shutil.rmtree(str(workspace.run_path(name)))
    kept, _ = start_run(workspace, method="linear_probe", **SETTINGS)
    broken, _ = start_run(workspace, method="mlp", **SETTINGS)
    (broken / "result.json").unlink()
    for _ in range(2):
        said = Cafe(Path(str(workspace.root)), "").succeed("mlflow", "sync", "--models")
        assert f"No model of {broken.name}: The run {broken.name!r} is not trained to its end" in said
        assert "It holds the models of 1 of them." in said
    client = MlflowClient(default_uri(workspace))
    experiment = client.get_experiment_by_name("cafe")
    (logged,) = client.search_logged_models([experiment.experiment_id])
    assert logged.tags["cafe.run"] == kept.name
    log_model(Mirror(workspace), kept, workspace.root / "exports" / kept.name, "faces")
    assert "model card" in client.get_registered_model("faces").description
    client.update_registered_model("faces", "Ours.")
    log_model(Mirror(workspace), kept, workspace.root / "exports" / kept.name, "faces")
    assert client.get_registered_model("faces").description == "Ours."


def test_the_run_to_ship_is_chosen_by_held_out_faces_of_the_source_and_not_by_a_target(tmp_path: Path) -> None:
    workspace, labels = Workspace.at(str(tmp_path)), np.arange(70) % 7
    for seed, (held_out, wrong) in enumerate([(0.7, 0), (0.8, 70)]):  # the better one is wrong on all of the target
        run = write_run(workspace, seed=seed, source_kind="folder", selection="source_val")
        write_predictions(run, "fer", labels, np.where(np.arange(70) < wrong, (labels + 1) % 7, labels))
        write_json(run / "result.json", {"epochs": 2, "selected": 2})
        write_json(run / "epochs" / "0002.json", {"selection/accuracy": held_out})
    said = Cafe(tmp_path, "").succeed("compare", "--best", "source_val")
    (line,) = [line for line in said.splitlines() if line.startswith("To ship: ")]
    assert run.name in line
    assert "80.0% on held-out faces of raf, the best of 2 runs" in line
    assert line.endswith(f"no target's score was looked at: cafe export {run.name}")
