"""Where pictures were added or changed, those alone go through the tower, and the store is that of a fresh extraction."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import draw_faces
from upath import UPath

from cafe.data.indexing import index_files
from cafe.data.manifest import Manifest
from cafe.data.readers import DATASETS
from cafe.pipeline.features.extract import Extraction, extract
from cafe.pipeline.features.reuse import UNKNOWN, Donors, group_shards
from cafe.pipeline.features.store import FeatureStore
from cafe.pipeline.settings import ExtractSettings
from cafe.pipeline.workspace import Workspace
from cafe.seals import verify_file
from cafe.towers import building
from cafe.towers.embedding import Embedder


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The views of each pass of a tower."""
    counted, embed = list[int](), Embedder.embed_layers

    def count(self, views, layers):
        counted.append(len(views.boxes))
        return embed(self, views, layers)

    monkeypatch.setattr(Embedder, "embed_layers", count)
    return counted


class Faces:
    """A folder of 60 faces, extracted into workspaces three views at a time, four shards of 15."""

    def __init__(self, folder: Path, tower: str) -> None:
        self.folder, self.root = folder, draw_faces(folder / "faces", per_class=20)
        self.settings = ExtractSettings(backbone=tower, shard_rows=15, views=3, num_cpus=1, decoders=0)

    def index(self) -> Manifest:
        return index_files("tiny", DATASETS["folder"](UPath(self.root))).manifest

    def extract(self, manifest: Manifest, workspace: str = "work") -> Extraction:
        (result,) = extract(Workspace.at(str(self.folder / workspace)), [manifest], self.settings, lambda *_: None)
        return result


@pytest.fixture
def faces(tmp_path: Path, tiny_tower: str) -> Faces:
    return Faces(tmp_path, tiny_tower)


def content(result: Extraction) -> dict[str, bytes]:
    files = [path for path in Path(str(result.store)).rglob("*") if path.is_file()]
    return {str(path.relative_to(str(result.store))): path.read_bytes() for path in files}


def test_added_and_changed_pictures_alone_go_through_the_tower(faces: Faces, passes: list[int]) -> None:
    first = faces.extract(faces.index())
    assert (first.taken, sum(passes)) == (0, 60 * 3)
    pictures = sorted(path for path in faces.root.rglob("*") if path.is_file())
    for number in (3, 29):
        pictures[number].with_stem("new").write_bytes(pictures[number].read_bytes())
    pictures[45].write_bytes(pictures[47].read_bytes())
    pictures[50].unlink()
    passes.clear()
    manifest = faces.index()
    second = faces.extract(manifest)
    assert (len(manifest), second.computed, second.taken) == (61, 5, 58)
    assert sum(passes) == 3 * 3
    assert "58 faces of them taken over from other stores" in second.sentence()
    assert content(second) == content(faces.extract(manifest, "fresh"))


def test_a_set_that_was_split_in_two_needs_no_tower(faces: Faces, passes: list[int]) -> None:
    manifest = faces.index()
    faces.extract(manifest)
    passes.clear()
    half = replace(manifest, name="half", table=manifest.table.slice(7, 30))
    result = faces.extract(half)
    assert (result.taken, passes) == (30, [])
    assert content(result) == content(faces.extract(half, "fresh"))


def test_a_large_manifest_is_extracted_file_by_file_to_the_same_bytes(
    faces: Faces, passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = faces.index()
    whole = content(faces.extract(manifest))
    monkeypatch.setattr("cafe.data.manifest.LARGE", 30)
    monkeypatch.setattr("cafe.data.rows.ROWS_A_FILE", 13)
    workspace = Workspace.at(str(faces.folder / "large"))
    manifest.save(workspace.manifest_path("tiny"))
    filed = workspace.load_manifest("tiny")
    assert [verify_file(path) for path in workspace.sealed_files(["tiny"])] == ["whole"] * 6
    result = faces.extract(filed, "large")
    read = content(result)
    assert {name for name in whole if whole[name] != read[name]} == {
        "checksums.json"
    }  # which says of which manifest it is
    assert whole.keys() == read.keys()
    store, asked = FeatureStore(result.store, result.info), range(7, 50)
    store.receipts.discard([1])
    samples = Donors([store])
    samples.samples[0].size = 4  # as in a store of more samples than are read at once
    expected = [row if row // 15 != 1 else UNKNOWN for row in asked]
    assert samples.find(filed, asked)[:, 1].tolist() == expected
    passes.clear()
    again = faces.extract(replace(filed, table=filed.table.slice(5, 40), name="part"), "large")
    assert (again.taken, sum(passes)) == (25, 15 * 3)
    workspace.sealed_files(["tiny"])[-1].unlink()
    assert [verify_file(path) for path in workspace.sealed_files(["tiny"])] == ["whole"] * 5 + ["damaged"]


@pytest.mark.parametrize("file", ["store.zarr/pooled/c/0/0/0", "receipts/00000.json", "store.zarr/sample_id/c/0"])
def test_what_another_store_no_longer_holds_as_written_is_computed(faces: Faces, passes: list[int], file: str) -> None:
    manifest = faces.index()
    path = Path(str(faces.extract(manifest).store)) / file
    damaged = bytearray(path.read_bytes())
    damaged[100] ^= 1
    path.write_bytes(damaged)
    passes.clear()
    half = replace(manifest, name="half", table=manifest.table.slice(0, 30))
    result = faces.extract(half)
    assert sum(passes) >= 15 * 3
    assert result.taken == 30 - sum(passes) // 3
    assert content(result) == content(faces.extract(half, "fresh"))


def test_other_settings_take_nothing_over(faces: Faces, passes: list[int]) -> None:
    manifest = faces.index()
    faces.extract(manifest)
    faces.settings = replace(faces.settings, view_seed=1)
    assert faces.extract(replace(manifest, name="other")).taken == 0


def test_a_tower_is_loaded_once_for_all_sets_of_a_command(faces: Faces, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest, loaded, load = faces.index(), list[str](), building.load_backbone
    expected = content(faces.extract(manifest))  # and the facts of the tower are known from now on

    def count(name: str, *arguments: object) -> building.FrozenBackbone:
        loaded.append(name)
        return load(name, *arguments)

    monkeypatch.setattr(building, "load_backbone", count)
    shutil.rmtree(faces.folder / "work" / "features")
    two, three = (replace(manifest, name=name, table=manifest.table.slice(20)) for name in ("tiny2", "tiny3"))
    results = extract(
        Workspace.at(str(faces.folder / "work")), [two, manifest, three, two], faces.settings, lambda *_: None
    )
    assert [result.computed for result in results] == [3, 4, 3]  # in the order asked for, each once
    assert len(loaded) == 1
    assert content(results[1]) == expected
    assert content(results[0]) == content(faces.extract(two, "fresh"))


def test_the_stores_of_layers_come_in_the_order_of_the_layers_however_they_are_cut(faces: Faces) -> None:
    manifest, tower = faces.index(), faces.settings.backbone
    faces.settings = replace(faces.settings, views=1, backbone=f"{tower}#block1/1x1")
    faces.extract(manifest)  # cut into other shards than the others will be
    layers = replace(faces.settings, backbone=tower, layers="final,block1/1x1,block2/1x1", shard_rows=30)
    results = extract(Workspace.at(str(faces.folder / "work")), [manifest], layers, lambda *_: None)
    found = [(result.info.key.backbone.partition("#")[2], result.info.shards) for result in results]
    assert found == [("", 2), ("block1/1x1", 4), ("block2/1x1", 2)]


def test_shards_with_few_new_rows_share_passes() -> None:
    known = np.zeros((15, 1, 2), int)
    some, none = known.copy(), np.full_like(known, UNKNOWN)
    some[:4] = UNKNOWN
    shards, each = [0, 1, 2, 4, 5, 6], [some, some, some, some, none, known]
    assert list(group_shards(shards, each, 10)) == [[0, 1], [2], [4], [5], [6]]
