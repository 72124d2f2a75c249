"""The example that holds all of CAFE in one file gives the weights and the accuracies of `cafe train`, bit for bit."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from conftest import draw_faces
from safetensors.torch import load_file
from trained import fill_store, train_run
from upath import UPath

from cafe.data.indexing import index_files
from cafe.data.readers import DATASETS
from cafe.pipeline.settings import ExtractSettings
from cafe.pipeline.workspace import Workspace
from cafe.results.metrics import score
from cafe.results.predictions import load_predictions
from cafe.towers.weights import read_tensors

EXAMPLE = Path(__file__).parents[1] / "examples" / "train_cafe.py"


def test_the_example_is_the_training_of_the_command_line(
    tmp_path: Path, tiny_tower: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace = Workspace.at(str(tmp_path / "work"))
    for number, name in enumerate(("one", "two")):
        faces = draw_faces(tmp_path / name, per_class=15, seed=number, tint=30 * number)
        index_files(name, DATASETS["folder"](UPath(faces))).manifest.save(workspace.manifest_path(name))
        fill_store(workspace, name, ExtractSettings(backbone=tiny_tower, views=3))
    run = train_run(workspace, source="one", method="cafe", epochs=2, image_size=32, seed=3)
    arguments = ["one", "--targets", "one,two", "--workspace", str(workspace.root), "--epochs", "2"]
    arguments += ["--image-size", "32", "--seed", "3", "--output", str(tmp_path / "weights.safetensors")]
    monkeypatch.setattr(sys, "argv", ["train_cafe.py", *arguments])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    ours = read_tensors(run / "model.safetensors")
    theirs = {
        name.replace("branch.", "branch.trunk."): value
        for name, value in load_file(tmp_path / "weights.safetensors").items()
    }
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name
    said = dict(re.findall(r"^(\w+): ([\d.]+) %", capsys.readouterr().out, re.MULTILINE))
    found = {target: score(predictions)["accuracy"] for target, predictions in load_predictions(run).items()}
    assert said == {name: f"{100 * accuracy:.1f}" for name, accuracy in found.items()}
    assert len(EXAMPLE.read_text().splitlines()) <= 300
