"""The blocks of docs/extending.md do what the page says, in their order, on tiny drawn faces."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import COLOURS
from PIL import Image
from torch.nn import functional
from torchvision import models

from cafe.data.readers import DATASETS
from cafe.methods import METHODS
from cafe.networks.branches import NETWORKS
from cafe.towers.names import BACKBONES

PAGE = Path(__file__).parents[1] / "docs" / "extending.md"
DICTS: tuple[dict[str, Any], ...] = (DATASETS, BACKBONES, NETWORKS, METHODS)
PEOPLE = [f"p{number:02}" for number in range(10)]


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
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What the page's names stand for after all its blocks have run."""
    folder, before = tmp_path_factory.mktemp("page"), [dict(entries) for entries in DICTS]
    draw_actors(folder / "actors")
    torch.manual_seed(0)
    torch.save(timm.create_model("test_resnet").state_dict(), folder / "tiny-resnet.pt")
    names: dict[str, Any] = {"__name__": "extending"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for block in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE):
            exec(compile(block, str(PAGE), "exec"), names)  # our own page
    names["folder"] = folder
    yield names
    for entries, kept in zip(DICTS, before, strict=True):
        entries.clear()
        entries.update(kept)


def test_the_new_reader_keeps_people_together(page: dict[str, Any]) -> None:
    manifest = page["manifest"]
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


def test_the_new_tower_gives_what_timm_gives(page: dict[str, Any]) -> None:
    plain = timm.create_model("test_resnet").eval()
    plain.load_state_dict(torch.load(page["folder"] / "tiny-resnet.pt", weights_only=True))
    tower = page["tower"]
    images = torch.randn(2, 3, tower.facts.input_size, tower.facts.input_size)
    with torch.no_grad():
        (stage,) = plain.forward_intermediates(images, [2], intermediates_only=True)
        got, _ = tower(images)
    assert str(tower.layer) == "stage3/2x2"
    assert torch.allclose(got, functional.adaptive_avg_pool2d(stage, 2).flatten(1), atol=1e-5)


def test_the_new_branch_ends_in_the_map_of_torchvision(page: dict[str, Any]) -> None:
    branch, images = page["branch"].eval(), torch.randn(2, 3, 64, 64)
    plain = models.mobilenet_v3_small().eval()
    plain.features.load_state_dict(branch.trunk.features.state_dict())
    with torch.no_grad():
        assert torch.equal(branch(images), plain.features(images))
        assert branch(images).shape == (2, branch.width, 2, 2)


def test_the_new_method_has_learned_an_epoch(page: dict[str, Any]) -> None:
    method, metrics = page["method"], page["metrics"]
    assert method.standardise.mean.abs().sum() > 0
    assert np.isfinite(metrics["train/total"])
    assert metrics["learning_rate"] == 2e-4
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in method.classifier.parameters())
    probabilities = page["probabilities"]
    assert probabilities.shape == (len(page["manifest"].rows("test")), 7)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
    assert np.ptp(probabilities, axis=0).min() > 0  # not one answer for all faces
