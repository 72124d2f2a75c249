"""A whole study in an object store that stutters: finished, nothing lost or doubled, the same numbers as on a disk."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
import numpy as np
import pytest
import torch
from conftest import Cafe, complaint, draw_faces
from faulty import FaultyS3
from miniatures import read_tree, write_faces, write_samples, write_tar, write_zip
from trained import fill_store, train_run
from upath import UPath

from cafe import files
from cafe.data.expressions import EXPRESSIONS
from cafe.data.indexing import index_files
from cafe.data.readers import DATASETS
from cafe.data.readers.choices import SetChoices
from cafe.files import create_file, list_folder, list_tree, locate, read_file, replace_file, write_file
from cafe.learning.loading import FaceDataset
from cafe.pipeline.faces import Faces, Part
from cafe.pipeline.process.lease import hold
from cafe.pipeline.settings import ExtractSettings
from cafe.pipeline.workspace import Workspace
from cafe.results.predictions import Predictions
from cafe.views.drawing import ViewPlan
from cafe.views.fetching import FetchedFaces

STATISTICS = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
BUCKET = "s3://bucket"
TRAIN = ("train", "--source", "tiny", "--method", "linear_probe", "--epochs", "3", "--image-size", "32")


@pytest.fixture(scope="module")
def s3() -> Iterator[FaultyS3]:
    server = FaultyS3()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (
            ("AWS_ENDPOINT_URL", server.address),
            ("AWS_ACCESS_KEY_ID", "nobody"),
            ("AWS_SECRET_ACCESS_KEY", "nothing"),
            ("AWS_DEFAULT_REGION", "us-east-1"),
        ):
            patch.setenv(name, value)
        boto3.client("s3").create_bucket(Bucket="bucket")
        yield server
    server.close()


@pytest.fixture(autouse=True)
def faultless(s3: FaultyS3) -> None:
    s3.share, s3.outage_at, s3.lost = 0.0, 0, 0


def study(workspace: str, faces: str, tower: str, database: Path) -> str:
    """Index, extract, train, evaluate and compare in a workspace; return the name of the run."""
    mirror = ("--mlflow-uri", f"sqlite:///{database}")
    cafe = Cafe(locate(workspace), "")
    cafe.succeed("data", "index", "folder", faces, "--name", "tiny")
    cafe.succeed("extract", "tiny", "--backbone", tower, "--shard-rows", "8", "--num-cpus", "1")
    cafe.succeed(*TRAIN, "--targets", "none", "--threads", "1", *mirror)
    (name,) = [path.name for path in list_folder(locate(f"{workspace}/runs"))]
    cafe.succeed("evaluate", name, "--targets", "tiny", *mirror)
    assert "linear_probe" in cafe.succeed("compare")
    assert "every byte is what was written" in cafe.succeed("store", "verify")
    return name


def test_a_study_in_an_object_store_that_stutters_is_that_on_a_disk(
    s3: FaultyS3, tmp_path: Path, tiny_tower: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where MLflow puts pictures
    for path in draw_faces(tmp_path / "faces", per_class=12).rglob("*.*"):
        write_file(locate(f"{BUCKET}/{path.relative_to(tmp_path)}"), path.read_bytes())
    head, _, weights = tiny_tower.partition("@")
    write_file(locate(f"{BUCKET}/tiny.pt"), Path(weights).read_bytes())
    disk, store = Workspace.at(str(tmp_path / "work")), Workspace.at(f"{BUCKET}/work")
    Cafe(disk.root, "").succeed("data", "index", "folder", str(tmp_path / "faces"), "--name", "tiny")
    fill_store(disk, "tiny", ExtractSettings(backbone=tiny_tower, shard_rows=8)).finish()
    there = train_run(disk, source="tiny", method="linear_probe", epochs=3, image_size=32, targets="tiny")

    s3.share, s3.outage_at, s3.outage_seconds = 0.05, 150, request.config.getoption("--outage")
    run = store.run_path(study(str(store.root), f"{BUCKET}/faces", f"{head}@{BUCKET}/tiny.pt", tmp_path / "mlflow.db"))
    assert s3.requests > s3.outage_at
    assert s3.refused > 0.02 * s3.requests
    s3.share = 0.0

    ours, theirs = (
        {name: root / name for name in list_tree(root) if "/receipts/" in name or re.search("/store.zarr/.*/", name)}
        for root in (store.features, disk.features)
    )
    assert ours.keys() == theirs.keys()
    assert {name for name in ours if read_file(ours[name]) != read_file(theirs[name])} == set()
    assert read_file(run / "model.safetensors") == read_file(there / "model.safetensors")
    evaluated, expected = (Predictions.load(folder / "predictions" / "tiny.parquet") for folder in (run, there))
    assert evaluated is not None
    assert expected is not None
    assert evaluated.sample_ids == expected.sample_ids
    assert np.array_equal(evaluated.probabilities, expected.probabilities)
    assert [path.name for path in list_folder(run / "epochs")] == ["0001.json", "0002.json", "0003.json"]
    assert not [name for name in list_tree(store.root) if ".lease" in name or ".partial" in name]


def test_an_object_store_that_stays_away_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "OBJECT_PAUSES", (0.01,))
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    away = UPath("s3://bucket/work/x.json", endpoint_url="http://127.0.0.1:9")  # botocore's error is no OSError
    sentence = complaint(read_file, away)
    assert sentence.startswith(f"{away} cannot be read (Could not connect to the endpoint URL")
    assert sentence.endswith(
        "though it was tried 2 times: fix the storage or the rights to it and give the command again."
    )
    assert "cannot be written (Could not connect" in complaint(write_file, away, b"{}")
    assert "make its bucket first" in complaint(write_file, locate("s3://no-such-bucket/x.json"), b"{}")


def test_of_several_that_make_a_file_at_once_in_an_object_store_one_does() -> None:
    path, made = locate(f"{BUCKET}/once.json"), list[int]()

    def make(number: int) -> None:
        try:
            create_file(path, b"%d" % number)
            made.append(number)
        except FileExistsError:
            pass

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(make, range(8)))
    assert [read_file(path)] == [b"%d" % number for number in made]


def test_of_several_that_replace_one_object_at_once_one_does(s3: FaultyS3) -> None:
    path = UPath(f"{BUCKET}/taken.json")
    write_file(path, b"dead")
    with ThreadPoolExecutor(8) as pool:
        done = list(pool.map(lambda number: replace_file(path, b"dead", b"%d" % number), range(8)))
    assert done.count(True) == 1
    assert read_file(path) == b"%d" % done.index(True)
    assert not replace_file(path, b"dead", None)
    assert replace_file(path, read_file(path), None)
    assert not replace_file(path, b"", b"x")


def test_a_lease_in_an_object_store_is_held_by_one_also_where_the_answer_was_lost(s3: FaultyS3) -> None:
    folder = locate(f"{BUCKET}/runs/one")
    s3.lost = 1  # of the next requests, carried out and then refused
    with hold(folder) as check:
        assert "works on s3://bucket/runs/one" in complaint(hold(folder).__enter__)
        check()
    assert list_folder(folder) == []
    assert list_tree(folder) == {}


def test_a_picture_is_one_request_and_several_are_under_way_at_once(s3: FaultyS3, tmp_path: Path) -> None:
    faces = draw_faces(tmp_path / "many", per_class=20)
    for path in faces.rglob("*.*"):
        write_file(locate(f"{BUCKET}/{path.relative_to(tmp_path)}"), path.read_bytes())
    there, here = (
        index_files("many", DATASETS["folder"](root)).manifest
        for root in (locate(f"{BUCKET}/many"), locate(str(faces)))
    )
    assert there.remote
    s3.requests = s3.most = 0
    with FetchedFaces(there, range(60)) as fetched:
        for row in range(60):
            np.testing.assert_array_equal(fetched.read_face(row), here.read_face(row))
        np.testing.assert_array_equal(fetched.read_face(0), here.read_face(0))  # where all views are begun again
    assert s3.requests == 60
    assert s3.most > 1

    places = [UPath(tmp_path / name / "many.parquet") for name in ("one", "two")]  # a union, which a training keeps
    for place in places:
        there.save(place)
    union = Faces.of(*(Part(place, there.digest) for place in places))
    plan = ViewPlan("flip", 0, 2, "bilinear", *STATISTICS)
    dataset = FaceDataset(union.kept_pictures, plan, frozenset({"image"}), 32)
    batches = [np.arange(50, 60), np.arange(60, 70)]
    s3.requests = s3.most = 0
    for _ in range(2):
        epoch = list(dataset.load(batches, 1, torch.device("cpu")))
        assert [len(batch["image"]) for batch in epoch] == [10, 10]
    assert s3.requests == 20
    assert s3.most > 1


def test_pictures_in_archives_of_a_store_are_those_of_a_disk_and_one_request_reads_a_face(
    s3: FaultyS3, tmp_path: Path
) -> None:
    drawn = sorted(draw_faces(tmp_path / "drawn", per_class=2).rglob("*.*"))
    faces = [(f"{number}{path.suffix}", path.read_bytes(), path.parent.name) for number, path in enumerate(drawn)]
    write_samples(tmp_path / "packed" / "train-0.tar", faces[:3])
    write_samples(tmp_path / "packed" / "test-1.tar", faces[3:])
    write_faces(tmp_path / "packed" / "train.parquet", faces, EXPRESSIONS)
    write_zip(tmp_path / "packed" / "faces.zip", {f"{label}/{name}": content for name, content, label in faces})
    for path in (tmp_path / "packed").iterdir():
        write_file(locate(f"{BUCKET}/packed/{path.name}"), path.read_bytes())
    for kind, place in (("webdataset", "{train-0,test-1}.tar"), ("table", "*.parquet"), ("folder", "faces.zip")):
        here, there = (
            index_files("faces", SetChoices().read(kind, f"{root}/packed/{place}")).manifest
            for root in (tmp_path, BUCKET)
        )
        assert (there.digest, there.remote) == (here.digest, True)
        before = s3.requests
        with FetchedFaces(there, range(6)) as fetched:
            assert [fetched.fetch(row) for row in range(6)] == [here.fetch(row) for row in range(6)]
        assert s3.requests - before <= (
            0 if kind == "table" else 6
        )  # rows of Parquet are kept from when they were indexed


def test_a_study_of_an_archive_in_an_object_store_ends_in_what_files_on_a_disk_give(
    s3: FaultyS3, tmp_path: Path, tiny_tower: str
) -> None:
    faces = draw_faces(tmp_path / "faces", per_class=6)
    archive = write_tar(tmp_path / "faces.tar", read_tree(faces))
    write_file(locate(f"{BUCKET}/archived/faces.tar"), archive.read_bytes())
    made = list[dict[str, bytes]]()
    for root, place in (
        (str(tmp_path / "work"), str(faces)),
        (f"{BUCKET}/archived/work", f"{BUCKET}/archived/faces.tar"),
    ):
        cafe, workspace = Cafe(locate(root), ""), Workspace.at(root)
        cafe.succeed("data", "index", "folder", place, "--name", "tiny")
        fill_store(workspace, "tiny", ExtractSettings(backbone=tiny_tower, shard_rows=8)).finish()
        run = train_run(workspace, source="tiny", method="linear_probe", epochs=1, image_size=32, targets="tiny")
        assert "linear_probe" in cafe.succeed("compare")
        there = {name: workspace.features / name for name in list_tree(workspace.features) if "/c/" in name}
        there |= {name: run / name for name in ("model.safetensors", "predictions/tiny.parquet")}
        made.append({name: read_file(path) for name, path in there.items()})
    files, archived = made
    assert len(files) > 5
    assert archived == files
