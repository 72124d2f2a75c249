"""A fault of the storage or of a node is never taken for a fact about a picture; without Ray, whose part is elsewhere."""

from __future__ import annotations

import socket
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pyarrow as pa
import pytest
import torch
from conftest import Cafe, draw_faces
from fsspec import AbstractFileSystem
from PIL import Image
from trained import embed, on_one_thread
from upath import UPath

from cafe.data.manifest import Manifest
from cafe.errors import StorageError, UserError
from cafe.files import list_sizes, locate, read_json
from cafe.learning.loading import FaceDataset
from cafe.pipeline.features.extract import Extraction as Extracted
from cafe.pipeline.features.extract import describe_store, look_up_tower
from cafe.pipeline.features.store import FeatureStore
from cafe.pipeline.features.stream import pack_shards
from cafe.pipeline.features.worker import ShardEmbedder
from cafe.pipeline.plan import plan_training
from cafe.pipeline.process.versions import versions
from cafe.pipeline.settings import ExtractSettings, TrainSettings
from cafe.pipeline.worker import LocalWorker, Worker, find_checkpoint
from cafe.pipeline.workspace import Workspace
from cafe.views.drawing import ViewPlan


class Extraction:
    """The manifest `tiny` of 60 faces in four shards, run shard by shard in this process."""

    def __init__(self, folder: Path, tower: str) -> None:
        self.faces, self.cafe = folder / "faces", Cafe(folder / "work", "")
        self.cafe.succeed("data", "index", "folder", str(draw_faces(self.faces, per_class=20)), "--name", "tiny")
        self.workspace = Workspace.at(str(folder / "work"))
        self.settings = ExtractSettings(backbone=tower, shard_rows=15)

    @property
    def manifest(self) -> Manifest:
        return self.workspace.load_manifest("tiny")

    @property
    def store(self) -> FeatureStore:
        manifest = self.workspace.load_manifest("tiny")
        about = describe_store(manifest, self.settings, look_up_tower(self.workspace, self.settings))
        return FeatureStore.create(self.workspace.features / "tiny", about, manifest)

    def embedder(self) -> ShardEmbedder:
        return ShardEmbedder({str(self.store.path): self.store.info}, self.manifest, self.settings, 1, "cpu")

    def run(self) -> dict[int, str]:
        """Compute what is pending and return the fault of each shard."""
        embedder, done = self.embedder(), dict[int, str]()
        for shard in self.store.pending():
            done[shard] = embed(embedder, self.manifest, shard)["fault"][0]
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
    assert extraction.store.receipts.valid().all()


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
    assert store.receipts.skipped_paths(manifest) == [("anger/019.png", "file not found")]
    picture.write_bytes(content)
    store.receipts.discard_skipped()
    assert extraction.run() == {1: ""}
    assert extraction.store.receipts.valid().all()


def test_a_picture_that_was_replaced_since_it_was_indexed_is_named(extraction: Extraction) -> None:
    faces = extraction.faces / "sadness"
    (faces / "019.png").write_bytes((faces / "017.png").read_bytes())
    with pytest.raises(UserError, match=r"sadness/019.png has changed since it was indexed: index 'tiny' again"):
        extraction.run()
    assert extraction.store.pending() == [3]


def test_a_worker_is_given_the_rows_of_its_shard_alone(extraction: Extraction) -> None:
    store, manifest = extraction.store, extraction.manifest
    packed = pack_shards(manifest, store.info, [1])
    table = pa.ipc.open_stream(packed["faces"]).read_all()
    assert table == manifest.table.slice(15, 15)
    assert len(packed["faces"]) < 6_000
    alone = replace(manifest, table=manifest.table.slice(0, 0))
    embedder = ShardEmbedder({str(store.path): store.info}, alone, extraction.settings, 1, "cpu")
    (extraction.faces / manifest.table["path"][29].as_py()).unlink()
    assert embed(embedder, manifest, 1)["fault"] == [""]
    assert [skipped.row for skipped in store.receipts.skipped()] == [29]


def test_a_picture_of_more_megapixels_than_asked_for_is_skipped(extraction: Extraction) -> None:
    path = extraction.faces / "anger" / "019.png"
    Image.new("RGB", (1001, 1000)).save(path)
    extraction.cafe.succeed("data", "index", "folder", str(extraction.faces), "--name", "tiny")
    extraction.settings = replace(extraction.settings, max_megapixels=1)
    assert set(extraction.run().values()) == {""}
    skipped = extraction.store.receipts.skipped_paths(extraction.workspace.load_manifest("tiny"))
    assert skipped == [("anger/019.png", "1001×1000 pixels are more than 1,000,000")]
    extracted = Extracted(extraction.store.path, extraction.store.info, 0, [*skipped, ("x.png", "file is empty")])
    said = extracted.complaint(0)
    assert "are unreadable (1 only for having more pixels than --max-megapixels 1 allows: give more), more than" in said
    checked = extraction.cafe.fail("data", "check", "tiny", "--max-megapixels", "1", code=1)
    assert "1 unreadable files:\n  anger/019.png: 1001×1000 pixels are more than 1,000,000" in checked


def test_another_limit_or_batch_is_another_store_and_an_older_one_is_named(extraction: Extraction) -> None:
    usual = extraction.settings
    changed = [replace(usual, max_megapixels=60), replace(usual, batch_size=1)]
    tower = look_up_tower(extraction.workspace, usual)
    infos = [describe_store(extraction.manifest, settings, tower) for settings in (usual, *changed)]
    assert len({info.folder for info in infos}) == 3
    store = extraction.store
    for shard in range(4):  # as an earlier version left them, by a limit that the name does not say
        reasons = {3: "1001×1000 pixels are more than 1,000,000"} if shard == 0 else {}
        store.receipts.write(shard, reasons, {}, {})
    assert store.receipts.outdated() == [0]
    assert store.receipts.unreadable() == set()
    with pytest.raises(UserError, match="left out by another --max-megapixels: run `cafe extract`"):
        plan_training(extraction.workspace, TrainSettings(source="tiny", method="linear_probe", targets="none"))
    with pytest.raises(UserError, match=r"filled .* by passes of 1 views, which its name does not say"):
        replace(store.info, batch_size=1).check_batches(store.path)


def test_rows_and_initial_weights_are_in_the_name_of_a_run(extraction: Extraction, tmp_path: Path) -> None:
    file = tmp_path / "init.pth"
    chosen = TrainSettings(source="tiny", method="image_only", targets="none", init=f"file:{file}")
    file.write_bytes(b"one")
    one = plan_training(extraction.workspace, chosen).spec
    file.write_bytes(b"two")
    two = plan_training(extraction.workspace, chosen).spec
    assert one.name != two.name
    store = extraction.store
    for shard in range(4):
        store.receipts.write(shard, {3: "file is empty"} if shard == 0 else {}, {}, {})
    left_out = plan_training(extraction.workspace, chosen).spec
    assert left_out.rows
    assert left_out.derived["rows"] == left_out.rows
    assert left_out.name != two.name
    store.receipts.write(0, {3: "9000×9000 pixels are more than 25,000,000"}, {}, {})
    assert plan_training(extraction.workspace, chosen).spec == two  # a limit of the store is none of the pictures


@pytest.mark.parametrize("workers", [0, 1])
def test_a_training_that_cannot_read_a_picture_names_it(extraction: Extraction, workers: int) -> None:
    picture = extraction.faces / "happiness" / "000.jpg"
    picture.unlink()
    picture.symlink_to(picture)  # opening it is an error of the file system
    manifest, plan = (
        extraction.workspace.load_manifest("tiny"),
        ViewPlan("paper", 0, 2, "bilinear", (0.5,) * 3, (0.5,) * 3),
    )
    dataset = FaceDataset(manifest, plan, frozenset({"image"}), 16)
    with pytest.raises(
        StorageError, match=f"^{picture} cannot be read .Too many levels of symbolic links.*tried 4 times"
    ):
        list(dataset.load([manifest.rows("all")], 1, torch.device("cpu"), workers))


class Remembering(AbstractFileSystem):
    """An object store that remembers what it has listed unless it is told not to, as those of fsspec do."""

    cachable, protocol = False, "gs"
    written: ClassVar[dict[str, bytes]] = {}  # by all machines

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path.removeprefix("gs://").strip("/")

    def ls(self, path: str, detail: bool = True, **options: object) -> list[Any]:
        there = [name for name in self.written if name.rpartition("/")[0] == path]
        listed = [{"name": name, "size": len(self.written[name]), "type": "file"} for name in there]
        remembered: list[Any] = self.dircache.setdefault(path, listed)
        return remembered


def test_a_listing_shows_what_other_machines_have_written_since() -> None:
    fsspec.register_implementation("gs", Remembering, clobber=True)
    Remembering.written["bucket/receipts/00000.json"] = b"{}"
    remembering, folder = UPath("gs://bucket/receipts"), locate("gs://bucket/receipts")
    assert list_sizes(remembering) == list_sizes(folder) == {"00000.json": 2}
    Remembering.written["bucket/receipts/00001.json"] = b""
    assert list_sizes(remembering) == {"00000.json": 2}  # what happens without
    assert list_sizes(folder.parent / "receipts") == list_sizes(folder) == {"00000.json": 2, "00001.json": 0}


def test_a_node_with_other_code_or_libraries_is_one_sentence(extraction: Extraction) -> None:
    there = versions()
    assert there["torch"] == torch.__version__.partition("+")[0]
    stores = {str(extraction.store.path): extraction.store.info}
    for name in ("cafe", "pillow"):
        embedder = ShardEmbedder(
            stores, extraction.manifest, extraction.settings, 1, "cpu", versions={**there, name: "0.1"}
        )
        with pytest.raises(UserError, match=f"Node {socket.gethostname()} has {name} {there[name]}, and the command"):
            embed(embedder, extraction.manifest, 0)
    settings = TrainSettings(source="tiny", method="image_only", targets="none")
    plan = plan_training(extraction.workspace, settings)
    with pytest.raises(UserError, match=r"has torch .* and the command was given with torch 1.0"):
        Worker("cpu").train(plan, drivers={"torch": "1.0"})


@pytest.mark.parametrize(("precision", "short"), [("fp32", False), ("tf32", True), ("bf16", False)])
def test_only_tf32_shortens_the_factors_of_float32(extraction: Extraction, precision: str, short: bool) -> None:
    seen: list[tuple[bool, ...]] = []
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    usual = matmul.allow_tf32, cudnn.allow_tf32
    extraction.settings = replace(extraction.settings, precision=precision)
    assert extraction.store.info.key.precision == precision
    embedder = extraction.embedder()
    convolution = next(part for part in embedder.embedder.tower.modules() if isinstance(part, torch.nn.Conv2d))
    convolution.register_forward_hook(
        lambda *_: seen.append((matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark))
    )
    embed(embedder, extraction.manifest, 0)
    assert set(seen) == {(short, short, True, False)}
    assert (matmul.allow_tf32, cudnn.allow_tf32) == usual


def test_what_a_method_prepares_is_never_learned_twice(extraction: Extraction) -> None:
    extraction.settings = replace(extraction.settings, views=2)
    extraction.run()
    overrides = ("features=standardised", "batch_size=16")
    settings = TrainSettings(source="tiny", overrides=overrides, epochs=1, image_size=32, targets="none")
    plan = on_one_thread(plan_training(extraction.workspace, settings))
    plan.spec.save(plan.run)
    picture = extraction.faces / "happiness" / "000.jpg"
    content = picture.read_bytes()
    picture.unlink()
    picture.symlink_to(picture)  # the first epoch ends here
    with pytest.raises(StorageError, match=r"happiness/000\.jpg cannot be read"):
        Worker("cpu").train(plan)
    assert find_checkpoint(plan.run) == plan.run / "checkpoints" / "0000"
    picture.unlink()
    picture.write_bytes(content)
    extraction.store.array("pooled")[:, 0] = 0  # the clean views, which only preparing reads
    Worker("cpu").train(on_one_thread(plan_training(extraction.workspace, settings)))
    assert (read_json(plan.run / "result.json") or {})["epochs"] == 1


def test_a_training_ends_after_its_step_when_its_command_has_ended(extraction: Extraction) -> None:
    settings = TrainSettings(source="tiny", method="image_only", epochs=500, image_size=32, targets="none")
    plan, here = plan_training(extraction.workspace, settings), LocalWorker("cpu")
    plan.spec.save(plan.run)
    training = here.train(on_one_thread(plan, checkpoint_every=500))
    while not training.running():
        time.sleep(0.01)
    here.end()
    with pytest.raises(InterruptedError, match="The command that this training belongs to has ended"):
        training.result(300)
    assert not (plan.run / "result.json").exists()
