"""The stores of a workspace: what is damaged is found, named and refused; what is used is named before it goes."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from conftest import Cafe, complaint, draw_faces
from test_store import ABOUT, MANIFEST, contents, features
from trained import fill_store, train_run
from upath import UPath

from cafe.data.manifest import Manifest
from cafe.errors import UserError
from cafe.files import read_json, write_json
from cafe.pipeline.features.integrity import Damage, find_stores, recover_info
from cafe.pipeline.features.store import FeatureStore, discard_damage, verify
from cafe.pipeline.plan import plan_training
from cafe.pipeline.process.lease import hold
from cafe.pipeline.settings import ExtractSettings, TrainSettings
from cafe.pipeline.stores import find_paths, remove
from cafe.pipeline.worker import Worker
from cafe.pipeline.workspace import Workspace

OURS = replace(ABOUT, key=replace(ABOUT.key, images=MANIFEST.image_digest))


def finished(folder: Path) -> FeatureStore:
    store = FeatureStore.create(UPath(folder), OURS, MANIFEST)
    for shard in store.pending():
        store.write_shard(shard, features(shard, store), {5: "file is empty"} if shard == 1 else {})
    store.finish()
    return store


def test_a_changed_byte_anywhere_is_found_and_named(tmp_path: Path) -> None:
    store, random = finished(tmp_path), np.random.default_rng(0)
    assert verify(store.path) == []
    files = sorted(path for path in store.path.rglob("*") if path.is_file())
    assert len(files) == 25  # 12 of the description, 9 of the arrays, 3 receipts, what was skipped
    for file in files:
        whole = file.read_bytes()
        for place in {0, len(whole) - 1, *random.integers(0, len(whole), 4)}:
            changed = bytearray(whole)
            changed[place] ^= random.integers(1, 256)
            file.write_bytes(changed)
            assert [damage.file for damage in verify(store.path)] == [str(file.relative_to(store.path))], place
        file.unlink()
        if file.name != "skipped.json":  # which is written again from the receipts
            assert [damage.file for damage in verify(store.path)] == [str(file.relative_to(store.path))]
        file.write_bytes(whole)
    assert verify(store.path) == []


def test_what_is_damaged_is_written_again_and_only_its_shards_are_undone(tmp_path: Path) -> None:
    store = finished(tmp_path)
    before = contents(store)
    for file in (
        "about.json",
        "checksums.json",
        "skipped.json",
        "store.zarr/map/c/1/0/0/0/0",
        "store.zarr/sample_id/c/0",
    ):
        (store.path / file).write_bytes(b"{}")
    store.receipts.path(2).write_bytes(b"[]")
    damages = verify(store.path)
    assert {damage.shard for damage in damages} == {None, 1, 2}
    assert discard_damage(store.path, MANIFEST, damages) == OURS
    assert store.pending() == [1, 2]
    for shard in (1, 2):
        store.write_shard(shard, features(shard, store), {5: "file is empty"} if shard == 1 else {})
    store.finish()
    assert contents(store) == before


def test_a_store_that_nothing_describes_can_only_be_removed(tmp_path: Path) -> None:
    store = finished(tmp_path / "news")
    for file in ("about.json", "store.zarr/zarr.json"):
        (store.path / file).write_bytes(b"{}")
    assert [damage.file for damage in verify(store.path)] == ["about.json", "store.zarr/zarr.json"]
    assert f"remove it with `cafe store rm news/{store.path.name}`" in complaint(recover_info, store.path)


def test_a_number_changed_in_a_description_is_not_believed(tmp_path: Path) -> None:
    store = finished(tmp_path / "news")
    record = read_json(store.path / "about.json") or {}
    write_json(store.path / "about.json", {**record, "rows": 9})
    assert recover_info(store.path) == OURS
    assert verify(store.path) == [Damage("about.json", "is not what was written")]
    write_json(store.path / "about.json", {**record, "backbone_name": "timm:y"})
    assert f"run `cafe store repair news/{store.path.name}`" in complaint(find_stores, UPath(tmp_path), "news")


@pytest.mark.parametrize("file", ["zarr.json", "label/zarr.json"])
@pytest.mark.parametrize("content", [b"", b"[]", b'{"zarr_format": 3, "node_type": "array"}', None])
def test_arrays_that_cannot_be_opened_are_one_sentence(tmp_path: Path, file: str, content: bytes | None) -> None:
    store = finished(tmp_path)
    path = store.path / "store.zarr" / file
    path.unlink() if content is None else path.write_bytes(content)
    assert "run `cafe store repair " in complaint(FeatureStore.create, UPath(tmp_path), OURS, MANIFEST)


def test_stores_of_before_files_had_checksums_are_verified_by_what_they_hold(tmp_path: Path) -> None:
    store = finished(tmp_path)
    (store.path / "checksums.json").unlink()
    for shard in range(3):
        record = asdict(store.receipts.read(shard))
        write_json(store.receipts.path(shard), {name: value for name, value in record.items() if name != "files"})
    assert verify(store.path) == []
    np.testing.assert_array_equal(store.read_view("pooled", 1), store.array("pooled")[:, 1])
    store.array("map")[9, 2, 1, 1, 1] = 0
    assert {damage.shard for damage in verify(store.path)} == {2}


def test_what_is_no_folder_is_no_store_and_a_link_is_not_removed(tmp_path: Path) -> None:
    workspace = Workspace.at(str(tmp_path / "work"))
    store = finished(tmp_path / "work" / "features" / OURS.manifest)
    beside = store.path.parent
    (beside / "notes.txt").write_text("mine")
    (beside / "gone").symlink_to(tmp_path / "nowhere")
    (beside.parent / "readme.txt").write_text("mine")
    assert find_paths(workspace) == [store.path]
    assert [path for path, _ in find_stores(workspace.features, OURS.manifest)] == [store.path]
    (link := beside / "link").symlink_to(store.path)
    assert find_paths(workspace, [f"{OURS.manifest}/link"]) == [link]
    with pytest.raises(UserError, match="link is a link: remove it, and the folder that it leads to, yourself"):
        remove(link)
    assert verify(store.path) == []


def test_features_of_other_images_are_not_repaired(tmp_path: Path) -> None:
    store = finished(tmp_path)
    (store.path / "about.json").unlink()
    other = Manifest("news", "/data", MANIFEST.table.slice(1))
    assert "were made of other images" in complaint(discard_damage, store.path, other, verify(store.path))


def test_training_refuses_a_damaged_store_and_names_the_repair(tmp_path: Path, tiny_tower: str) -> None:
    cafe, workspace = Cafe(tmp_path / "work", ""), Workspace.at(str(tmp_path / "work"))
    cafe.succeed("data", "index", "folder", str(draw_faces(tmp_path / "faces", per_class=20)), "--name", "tiny")
    store = fill_store(workspace, "tiny", ExtractSettings(backbone=tiny_tower))
    command = ("train", "--source", "tiny", "--method", "linear_probe", "--targets", "none", "--epochs", "1")
    remedy = f"run `cafe store repair tiny/{store.path.name}`"
    about, group = store.path / "about.json", store.path / "store.zarr" / "pooled" / "zarr.json"
    for file, old, new in ((about, "60", "61"), (about, "tiny-cafe", "tiny-cave"), (group, "NaN", "0.0")):
        whole = file.read_text()
        file.write_text(whole.replace(old, new))
        assert remedy in cafe.fail(*command)
        file.write_text(whole)
    store.array("pooled")[59] = 0  # found when it is read
    train = TrainSettings(source="tiny", method="linear_probe", targets="none", epochs=1)
    plan = plan_training(workspace, train)
    plan.spec.save(plan.run)
    with pytest.raises(UserError, match=remedy):
        Worker().train(plan)
    damage = f"tiny/{store.path.name}/store.zarr/pooled/c/1/0/0 is not what was written"
    assert damage in cafe.fail("store", "verify", code=1)
    (record,) = json.loads(cafe("store", "verify", "tiny", "--json").stdout)
    assert record["damaged"] == [
        {"file": "store.zarr/pooled/c/1/0/0", "problem": "is not what was written", "shard": 1}
    ]


def test_a_list_tells_what_a_store_is_and_who_uses_it_and_a_removal_what_it_means(
    tmp_path: Path, tiny_tower: str
) -> None:
    cafe, workspace = Cafe(tmp_path / "work", ""), Workspace.at(str(tmp_path / "work"))
    for name in ("one", "two"):
        cafe.succeed("data", "index", "folder", str(draw_faces(tmp_path / name, per_class=20)), "--name", name)
        store = fill_store(workspace, name, ExtractSettings(backbone=tiny_tower))
    fill_store(workspace, "two", ExtractSettings(backbone=tiny_tower, view_seed=1, views=2))
    shared = {"source": "one", "method": "linear_probe", "epochs": 1, "image_size": 32}
    run = train_run(workspace, targets="two", **shared).name
    records = json.loads(cafe.succeed("store", "ls", "--json"))
    assert [(one["name"].partition("/")[0], one["trained"], one["evaluated"]) for one in records] == [
        ("one", [run], []),
        ("two", [], [run]),
        ("two", [], [run]),  # it has the same clean views
    ]
    first = records[0]
    files = [path for path in workspace.features.glob("one/*/**/*") if path.is_file()]
    assert first["bytes"] == sum(path.stat().st_size for path in files)
    assert (first["done"], first["shards"], first["about"]["rows"]) == (2, 2, 60)
    assert time.time() - 60 < first["made"] < time.time()
    assert "2 of 2" in cafe.succeed("store", "ls", "one")
    assert "choose one/" in cafe.fail("store", "rm", "three")

    name = f"two/{store.path.name}"
    with hold(store.path):
        assert f"works on {store.path}" in cafe.fail("store", "rm", name, "--yes")
    refused = cafe("store", "rm", name)
    assert refused.exit_code == 1
    assert f"to have it again takes 60 passes of the tower; used by 1 runs ({run}), which keep" in refused.output
    assert verify(store.path) == []
    cafe.succeed("store", "rm", name, "--yes")
    assert not store.path.exists()
    assert len(find_stores(workspace.features, "two")) == 1
