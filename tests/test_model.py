"""A trained run predicts faces that are in no manifest, by the numbers of its own predictions."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import complaint, draw_faces
from PIL import Image
from trained import extract_few, fill_store, list_networks, start_run, train_run
from upath import UPath

from cafe.data.indexing import index_files
from cafe.data.readers import DATASETS
from cafe.inference.model import read_pixels
from cafe.methods import METHODS
from cafe.pipeline.models import build_model
from cafe.pipeline.settings import ExtractSettings
from cafe.pipeline.workspace import Workspace
from cafe.results.predictions import load_predictions
from cafe.seals import read_sealed, write_sealed

SETTINGS = {"source": "one", "targets": "two", "image_size": 64}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, tiny_tower: str) -> Workspace:
    """Two domains with features of the tiny tower."""
    workspace = Workspace.at(str(tmp_path_factory.mktemp("work")))
    for name, tint in (("one", 0), ("two", 30)):
        root = UPath(draw_faces(Path(str(workspace.root)) / "faces" / name, per_class=6, tint=tint))
        index_files(name, DATASETS["folder"](root)).manifest.save(workspace.manifest_path(name))
        fill_store(workspace, name, ExtractSettings(backbone=tiny_tower, views=2, maps=True))
    return workspace


def faces_of(workspace: Workspace, split: str = "all") -> list[np.ndarray]:
    """The faces of the target that a run says something of: all, as the folders came without splits."""
    manifest = workspace.load_manifest("two")
    return [manifest.read_face(row) for row in manifest.rows(split)]


@pytest.mark.parametrize("method", list_networks())
def test_every_method_predicts_arrays_as_it_predicted_its_target(
    method: str, workspace: Workspace, small_network: str
) -> None:
    network = "resnet18" if method == "cafe" else small_network
    union = {"source": "one,two", "sampler": "balanced"} if METHODS[method].needs_domains() else {}
    run, predicted = start_run(workspace, method=method, network=network, **{**SETTINGS, **union})
    split = "test" if union else "all"  # of a set it is trained on, only the part made for test is evaluated
    probabilities = build_model([run]).predict(faces_of(workspace, split))
    assert (probabilities.dtype, probabilities.shape) == (np.float32, predicted.shape)
    np.testing.assert_allclose(probabilities, predicted, atol=1e-6)


def test_real_faces_get_the_probabilities_of_the_runs_own_predictions(real_faces: Path, tmp_path: Path) -> None:
    workspace = Workspace.at(str(tmp_path / "work"))
    extract_few(real_faces, tmp_path, workspace, views=2)
    changes = ("epochs=2", "learning_rate=0.003", "features=standardised")
    run = train_run(workspace, source="news", method="cafe", image_size=64, overrides=changes)
    predicted = load_predictions(run)["cinema"]
    manifest = workspace.load_manifest("cinema")
    pictures = [Image.open(Path(manifest.root) / sample) for sample in predicted.sample_ids]
    probabilities = build_model([run]).predict(pictures)
    np.testing.assert_allclose(probabilities, predicted.probabilities, atol=1e-5)
    assert np.ptp(probabilities, axis=0).max() > 0.1  # the faces are told apart


def test_seeds_are_averaged(workspace: Workspace) -> None:
    (one, first), (two, second) = (start_run(workspace, method="cafe", seed=seed, **SETTINGS) for seed in (0, 1))
    assert np.abs(first - second).max() > 1e-3
    np.testing.assert_allclose(build_model([one, two]).predict(faces_of(workspace)), (first + second) / 2, atol=1e-6)


def test_faces_are_predicted_one_by_one_as_together_and_none_gives_none(workspace: Workspace) -> None:
    run, _ = start_run(workspace, method="cafe", **SETTINGS)
    model, faces = build_model([run]), faces_of(workspace)[:3]
    alone = np.concatenate([model.predict([face]) for face in faces])
    np.testing.assert_allclose(alone, model.predict(faces), atol=1e-6)
    assert model.predict([]).shape == (0, 7)
    quick = build_model([run], batch_size=1)  # no filling up
    np.testing.assert_allclose(quick.predict(faces), alone, atol=1e-3)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "RGB"])
def test_pictures_of_any_mode_become_rgb(mode: str) -> None:
    grey = Image.new("RGB", (5, 4), (102, 102, 102)).convert(mode)
    assert (np.abs(read_pixels(grey).astype(int) - 102) <= 1).all()
    assert read_pixels(grey).shape == (4, 5, 3)


@pytest.mark.parametrize(
    ("image", "part"),
    [
        (np.zeros((4, 4, 3)), "not (4, 4, 3) float64"),
        (np.zeros((4, 4), np.uint8), "not (4, 4) uint8"),
        (np.zeros((0, 4, 3), np.uint8), "not (0, 4, 3) uint8"),
        ("face.jpg", "one of the type str is neither"),
        (Image.new("F", (4, 4)), "floating-point pixels"),
        (Image.new("RGB", (0, 4)), "it has no pixels"),
    ],
)
def test_what_is_no_image_is_answered_in_one_sentence(image: object, part: str) -> None:
    assert part in complaint(read_pixels, image)


def test_a_run_without_weights_or_with_another_tower_is_refused(workspace: Workspace, tmp_path: Path) -> None:
    run, _ = start_run(workspace, method="linear_probe", **SETTINGS)
    shutil.copytree(run, tmp_path / "other")
    record = read_sealed(UPath(tmp_path / "other" / "run.json"))
    assert record is not None
    record["spec"]["features"]["weights"] = "0" * 64
    write_sealed(UPath(tmp_path / "other" / "run.json"), record)
    assert "are not those that the run" in complaint(build_model, [UPath(tmp_path / "other")])
    (tmp_path / "other" / "model.safetensors").unlink()
    assert "has no trained weights here" in complaint(build_model, [UPath(tmp_path / "other")])
