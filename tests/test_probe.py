"""Choosing a layer: what the layers of a tower cost and know, asked of no target."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import draw_faces
from upath import UPath

from cafe.data.indexing import index_files
from cafe.data.manifest import Manifest
from cafe.data.readers import DATASETS
from cafe.errors import UserError
from cafe.jobs.cli import main
from cafe.towers.building import load_backbone
from cafe.towers.names import Layer
from cafe.towers.probe import choose_faces, list_candidates, probe_layers


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder = tmp_path_factory.mktemp("work")
    manifest = index_files("tiny", DATASETS["folder"](UPath(draw_faces(folder / "faces", per_class=40)))).manifest
    manifest.save(UPath(folder / "manifests" / "tiny.parquet"))
    return manifest


def test_only_training_faces_are_used_and_the_held_out_ones_are_others(manifest: Manifest) -> None:
    fitted, asked = choose_faces(manifest, 3000)
    assert set(fitted) | set(asked) == set(manifest.rows("train"))
    assert not set(fitted) & set(asked)
    assert len(asked) == pytest.approx(len(manifest.rows("train")) / 4, abs=3)
    fewer = choose_faces(manifest, 40)
    assert sum(map(len, fewer)) == pytest.approx(40, abs=3)
    assert set(np.concatenate(fewer)) < set(manifest.rows("train"))
    with pytest.raises(UserError, match="'tiny' has too few training faces"):
        choose_faces(manifest, 2)


def test_candidates_are_the_layers_at_every_grid_their_maps_allow(tiny_tower: str) -> None:
    grids = ("1x1", "2x2", "3x3", "4x4")
    expected = {Layer(name, grid) for name in ("block1", "block2") for grid in grids}
    expected |= {Layer("final", grid) for grid in ("", "2x2", "3x3", "4x4")}
    assert set(list_candidates(load_backbone(tiny_tower))) == expected
    wide = list_candidates(load_backbone("face-resnet"))
    assert Layer("stage3", "4x4") in wide
    assert Layer("stage4", "3x3") in wide
    assert Layer("stage4", "4x4") not in wide  # its map has 3 × 3 places


def test_the_probe_tells_colours_apart_that_a_blind_label_does_not(manifest: Manifest, tiny_tower: str) -> None:
    fitted, asked = choose_faces(manifest, 3000)
    steps: list[tuple[int, int]] = []
    tower = load_backbone(tiny_tower)
    answers = probe_layers(tower, manifest, fitted, asked, "cpu", lambda done, total: steps.append((done, total)))
    assert len(answers) == len(list_candidates(tower)) == 12
    assert {answer.width for answer in answers if answer.layer.grid == "2x2"} == {128, 96}  # 32 and 24 channels
    best = max(answers, key=lambda answer: answer.accuracy)
    assert best.accuracy > 0.9  # the colour tells the expression
    assert best.error == pytest.approx((best.accuracy * (1 - best.accuracy) / len(asked)) ** 0.5)
    assert steps[-1] == (len(fitted) + len(asked) + 12, len(fitted) + len(asked) + 12)


def test_the_commands_print_layers_and_what_they_know(manifest: Manifest, tiny_tower: str) -> None:
    workspace = str(Path(manifest.root).parent)
    listed = CliRunner().invoke(main, ["-w", workspace, "tower", tiny_tower])
    assert listed.exit_code == 0, listed.output
    rows = [line.split() for line in listed.output.splitlines() if "×" in line]
    assert [row[1] for row in rows] == ["block1", "block2", "final"]
    assert [row[3] for row in rows] == ["32×4×4", "32×4×4", "24×4×4"]

    command = ["-w", workspace, "tower", "probe", "tiny", "--backbone", tiny_tower]
    probed = CliRunner().invoke(main, command)
    assert probed.exit_code == 0, probed.output
    cells = [line.split("│")[3].strip() for line in probed.output.splitlines() if line.count("│") > 3]
    values = [float(cell) for cell in cells if cell]
    assert len(values) == 12
    assert values == sorted(values, reverse=True)
    records = json.loads(CliRunner().invoke(main, [*command, "--json"]).stdout)
    assert [record["accuracy_percent"] for record in records] == values
    listed = CliRunner().invoke(main, ["-w", workspace, "tower", tiny_tower, "--json"])
    assert [record["channels"] for record in json.loads(listed.stdout)] == [32, 32, 24]
