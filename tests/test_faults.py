"""A fault of the storage or of a node is never taken for a fact about a picture; without Ray, whose part is elsewhere."""

from __future__ import annotations

import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Cafe, draw_faces
from PIL import Image

from cafe.data.manifest import Manifest
from cafe.errors import UserError
from pipeline.extract import describe_store, know_tower
from pipeline.settings import ExtractSettings
from pipeline.shards import ShardEmbedder
from pipeline.store import FeatureStore
from pipeline.workspace import Workspace


class Extraction:
    """The manifest `tiny` of 60 faces in four shards, worked off shard by shard in this process."""

    def __init__(self, folder: Path, tower: str) -> None:
        self.faces, self.cafe = folder / "faces", Cafe(folder / "work", "")
        self.cafe.succeed("data", "index", "folder", str(draw_faces(self.faces, per_class=20)), "--name", "tiny")
        self.workspace = Workspace.at(str(folder / "work"))
        self.settings = ExtractSettings(backbone=tower, shard_rows=15)

    @property
    def store(self) -> FeatureStore:
        manifest = self.workspace.load_manifest("tiny")
        about = describe_store(manifest, self.settings, know_tower(self.workspace, self.settings))
        return FeatureStore.create(self.workspace.features / "tiny", about, manifest)

    def embedder(self) -> ShardEmbedder:
        path = str(self.workspace.manifest_path("tiny"))
        return ShardEmbedder({str(self.store.path): self.store.about}, path, self.settings, 1, "cpu")

    def run(self) -> dict[int, str]:
        """Compute what is pending and return the fault of each shard."""
        embedder, done = self.embedder(), dict[int, str]()
        for shard in self.store.pending():
            receipt: dict[str, Any] = embedder({"shard": np.array([shard])})
            done[shard] = receipt["fault"][0]
        return done


@pytest.fixture
def extraction(tmp_path: Path, tiny_tower: str) -> Extraction:
    return Extraction(tmp_path, tiny_tower)


def test_a_folder_that_is_away_enters_no_receipt(extraction: Extraction) -> None:
    (extraction.faces / "anger").rename(extraction.faces / "away")
    faults = extraction.run()
    assert [shard for shard in faults if faults[shard]] == extraction.store.pending() == [0, 1]
    assert "000.jpg is missing with its whole folder on node" in faults[0]
    (extraction.faces / "away").rename(extraction.faces / "anger")
    assert extraction.run() == {0: "", 1: ""}
    assert extraction.store.valid().all()


def test_a_node_without_most_of_the_pictures_is_named(extraction: Extraction) -> None:
    for picture in sorted((extraction.faces / "anger").iterdir())[:8]:
        picture.unlink()
    fault = f"8 of the 15 pictures of a shard are missing below {extraction.faces} on node {socket.gethostname()}: "
    assert extraction.run()[0].startswith(fault)
    assert extraction.store.pending() == [0]


def test_a_picture_that_is_gone_is_skipped_until_skipped_ones_are_asked_for(extraction: Extraction) -> None:
    picture = extraction.faces / "anger" / "019.png"
    content = picture.read_bytes()
    picture.unlink()
    assert set(extraction.run().values()) == {""}
    store, manifest = extraction.store, extraction.workspace.load_manifest("tiny")
    assert store.pending() == []
    assert store.skipped_paths(manifest) == [("anger/019.png", "file not found")]
    picture.write_bytes(content)
    store.discard_skipped()
    assert extraction.run() == {1: ""}
    assert extraction.store.valid().all()


def test_a_picture_that_was_replaced_since_it_was_indexed_is_named(extraction: Extraction) -> None:
    faces = extraction.faces / "sadness"
    (faces / "019.png").write_bytes((faces / "017.png").read_bytes())
    with pytest.raises(UserError, match=r"sadness/019.png has changed since it was indexed: index 'tiny' again"):
        extraction.run()
    assert extraction.store.pending() == [3]


def test_a_worker_refuses_a_manifest_that_is_not_the_one_planned_with(extraction: Extraction) -> None:
    path = extraction.workspace.manifest_path("tiny")
    stores = {str(extraction.store.path): extraction.store.about}
    manifest = Manifest.load(path)
    replace(manifest, table=manifest.table.slice(1)).save(path)
    with pytest.raises(UserError, match=r"'tiny' on node .* lists other images than the store was planned with"):
        ShardEmbedder(stores, str(path), extraction.settings, 1, "cpu")({"shard": np.array([0])})


def test_a_picture_of_more_megapixels_than_asked_for_is_skipped(extraction: Extraction) -> None:
    path = extraction.faces / "anger" / "019.png"
    Image.new("RGB", (1001, 1000)).save(path)
    extraction.cafe.succeed("data", "index", "folder", str(extraction.faces), "--name", "tiny")
    extraction.settings = replace(extraction.settings, max_megapixels=1)
    assert set(extraction.run().values()) == {""}
    skipped = extraction.store.skipped_paths(extraction.workspace.load_manifest("tiny"))
    assert skipped == [("anger/019.png", "1001×1000 pixels are more than 1,000,000")]
