"""The files of docs/extending.md, saved as printed, do what the page says with `cafe --plugin`, on tiny drawn faces."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import COLOURS, Cafe
from PIL import Image
from plugged import forgotten_plugins
from torch.nn import functional
from torchvision import models
from upath import UPath

from cafe.data.manifest import Manifest
from cafe.files import read_json
from cafe.networks.branches import build_network
from cafe.pipeline.workspace import Workspace
from cafe.plugins import load_plugins
from cafe.results.predictions import load_predictions
from cafe.results.runs import read_runs
from cafe.towers.building import load_backbone
from cafe.towers.weights import read_tensors

PAGE = Path(__file__).parents[1] / "docs" / "extending.md"
PEOPLE = [f"p{number:02}" for number in range(10)]
SMALL = ("--source", "actors", "--epochs", "1", "--image-size", "32", "--cpu")


def draw_actors(root: Path) -> None:
    """Two pictures of every person and expression; the colour tells the expression."""
    random = np.random.default_rng(0)
    root.mkdir()
    for person in PEOPLE:
        for expression, colour in COLOURS.items():
            for number in range(2):
                pixels = np.clip(random.normal(colour, 20, (32, 32, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / f"{person}-{expression}-{number}.png")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The page's Python blocks as files, by their names, byte for byte."""
    folder = tmp_path_factory.mktemp("page")
    for block in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE):
        (folder / block.partition("\n")[0].removeprefix("# ")).write_text(block)
    found = {path.name: str(path) for path in folder.iterdir()}
    assert found.keys() == {"actors.py", "tiny_resnet.py", "small_branch.py", "fusion.py", "sparse_cafe.py"}
    return found


@pytest.fixture
def forget() -> Iterator[None]:
    with forgotten_plugins():
        yield


@pytest.fixture(scope="module")
def tower_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("tower") / "tiny-resnet.pt"
    torch.save(timm.create_model("test_resnet").state_dict(), path)
    return path


def index_actors(folder: Path, files: dict[str, str], address: str = "") -> Cafe:
    """A workspace in which the new data set was indexed."""
    draw_actors(folder / "actors")
    cafe = Cafe(folder / "work", address)
    with forgotten_plugins():
        cafe.succeed(
            "--plugin", files["actors.py"], "data", "index", "actors", str(folder / "actors"), "--name", "actors"
        )
    return cafe


@pytest.fixture(scope="module")
def actors(files: dict[str, str], tower_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Cafe:
    """A workspace in which the new data set was indexed and extracted with the new tower."""
    cafe = index_actors(tmp_path_factory.mktemp("actors"), files)
    with forgotten_plugins():
        command = ("extract", "actors", "--backbone", f"tiny-resnet@{tower_file}", "--views", "2", "--decoders", "0")
        cafe.succeed("--plugin", files["tiny_resnet.py"], *command, "--num-cpus", "1")
    return cafe


def manifest_of(cafe: Cafe) -> Manifest:
    return Workspace.at(str(cafe.workspace)).load_manifest("actors")


def test_the_new_reader_keeps_people_together(actors: Cafe) -> None:
    manifest = manifest_of(actors)
    assert len(manifest) == 60
    assert manifest.kind == "actors"
    train, test = (
        {manifest.table["group"][int(row)].as_py() for row in manifest.rows(split)} for split in ("train", "test")
    )
    assert train | test == set(PEOPLE)
    assert train
    assert test
    assert not train & test
    assert manifest.sample_ids[0] == "p00-anger-0.png"
    assert manifest.labels[0] == 5


def test_the_new_tower_gives_what_timm_gives(
    files: dict[str, str], tower_file: Path, actors: Cafe, forget: None
) -> None:
    name = f"tiny-resnet@{tower_file}"
    output = actors.succeed("--plugin", files["tiny_resnet.py"], "tower", name)
    assert "stage3/2x2" in output.replace("\n", "")
    plain = timm.create_model("test_resnet").eval()
    plain.load_state_dict(torch.load(tower_file, weights_only=True))
    tower = load_backbone(name)
    images = torch.randn(2, 3, tower.facts.input_size, tower.facts.input_size)
    with torch.no_grad():
        (stage,) = plain.forward_intermediates(images, [2], intermediates_only=True)
        got, _ = tower(images)
    assert torch.allclose(got, functional.adaptive_avg_pool2d(stage, 2).flatten(1), atol=1e-5)


def test_the_new_branch_ends_in_the_map_of_torchvision(files: dict[str, str], forget: None) -> None:
    load_plugins([files["small_branch.py"]])
    branch, images = build_network("mobilenet_v3_small").eval(), torch.randn(2, 3, 64, 64)
    plain = models.mobilenet_v3_small().eval()
    plain.features.load_state_dict(branch.trunk.features.state_dict())
    with torch.no_grad():
        assert torch.equal(branch(images), plain.features(images))
        assert branch(images).shape == (2, branch.width, 2, 2)


def train(cafe: Cafe, files: list[str], method: str, *settings: str) -> UPath:
    """Train an epoch with plug-ins and return the run, once what it learned and evaluated is checked."""
    plug_ins = [argument for file in files for argument in ("--plugin", file)]
    output = cafe.succeed(*plug_ins, "train", "--method", method, *SMALL, *settings)
    run = UPath(cafe.workspace / "runs" / output.rpartition("\nRun ")[2].split()[0])
    assert np.isfinite((read_json(run / "epochs" / "0001.json") or {})["train/total"])
    probabilities = load_predictions(run)["actors"].probabilities
    assert probabilities.shape == (len(manifest_of(cafe).rows("test")), 7)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
    return run


def test_the_new_branch_learns_an_epoch(files: dict[str, str], actors: Cafe, forget: None) -> None:
    run = train(actors, [files["small_branch.py"]], "image_only", "--network", "mobilenet_v3_small")
    assert read_tensors(run / "model.safetensors")["classifier.weight"].shape == (7, 576)


def test_the_new_method_learns_an_epoch_and_is_evaluated_exported_and_used_with_its_plug_in(
    files: dict[str, str], actors: Cafe, tmp_path: Path
) -> None:
    plug_ins = [files["fusion.py"], files["tiny_resnet.py"]]
    options = [argument for file in plug_ins for argument in ("--plugin", file)]
    model, face = str(tmp_path / "model"), str(actors.workspace.parent / "actors" / "p00-anger-0.png")
    with forgotten_plugins():
        run = train(actors, plug_ins, "fusion", "--set", "features=standardised")
        before = load_predictions(run)["actors"].probabilities
        assert np.ptp(before, axis=0).min() > 0  # not one answer for all faces
        (run / "predictions" / "actors.parquet").unlink()
        actors.succeed(*options, "evaluate", run.name, "--cpu")
        np.testing.assert_array_equal(load_predictions(run)["actors"].probabilities, before)
        assert "differs from PyTorch by at most" in actors.succeed(*options, "export", run.name, "--output", model)
        assert "p00-anger-0.png" in actors.succeed(*options, "predict", model, face, "--aligned")
    assert "This needs the plug-in 'fusion' with the digest " in actors.fail("predict", model, face, "--aligned")


def test_the_new_loss_term_is_learned_by(files: dict[str, str], actors: Cafe, forget: None) -> None:
    def mean_mask(weight: str) -> float:
        plug_ins = [files["sparse_cafe.py"], files["tiny_resnet.py"]]
        run = train(actors, plug_ins, "sparse_cafe", "--set", f"sparse={weight}", "--targets", "actors")
        return float((read_json(run / "epochs" / "0001.json") or {})["train/sparse"])

    assert 0 < mean_mask("100") < mean_mask("0") < 1


BENCHMARK = """
sources = ["actors"]
seeds = 1
methods = ["fusion", {{ method = "image_only", network = "mobilenet_v3_small" }}]
towers = ["{tower}"]
views = 2

[features]
decoders = 0
num_actors = 1

[train]
epochs = 1
image_size = 32
"""


def test_all_of_them_run_through_a_benchmark_on_a_cluster(
    files: dict[str, str], tower_file: Path, ray_address: str, tmp_path: Path
) -> None:
    plug_ins = [
        part for name in ("fusion", "tiny_resnet", "small_branch") for part in ("--plugin", files[f"{name}.py"])
    ]
    (tmp_path / "own.toml").write_text(BENCHMARK.format(tower=f"tiny-resnet@{tower_file}"))
    cafe = index_actors(tmp_path, files, ray_address)
    with forgotten_plugins():
        said = cafe.succeed(*plug_ins, "benchmark", str(tmp_path / "own.toml"), "--parallel", "1", ray=True).split()
        assert "actors: computed" in " ".join(said)  # by the new tower, on the cluster
        runs = [run for run in read_runs(UPath(cafe.workspace / "runs").iterdir()) if "own" in run.experiments]
        assert sorted(run.method for run in runs) == ["fusion", "image_only"]


def test_without_the_plug_in_the_name_is_unknown(actors: Cafe, forget: None) -> None:
    assert "Unknown method 'fusion': choose cafe, " in actors.fail("train", "--method", "fusion", *SMALL)
