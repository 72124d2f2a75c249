"""Pictures in tar, zip and Parquet are read where they lie, and are the faces that they are as files."""

from __future__ import annotations

import io
import os
import struct
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import Cafe, complaint, draw_faces
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from miniatures import (
    read_tree,
    write_affectnet_arrays,
    write_faces,
    write_ferplus_csv,
    write_rafdb_shared,
    write_samples,
    write_tar,
    write_zip,
)
from trained import fill_store, train_run
from upath import UPath

from cafe.data.auditing import audit
from cafe.data.checking import check_pictures
from cafe.data.expressions import EXPRESSIONS
from cafe.data.indexing import Index, index_files
from cafe.data.manifest import Manifest
from cafe.data.packed import archives
from cafe.data.packed.archives import walk_archive
from cafe.data.readers.choices import SetChoices
from cafe.errors import StorageError, UserError
from cafe.inference.frames import find_files, read_frames
from cafe.pipeline.datasets import find_photos
from cafe.pipeline.settings import ExtractSettings
from cafe.pipeline.workspace import Workspace
from cafe.report.figures import read_faces
from cafe.views.drawing import ViewPlan
from cafe.views.rendering import Renderer

CLASSES = EXPRESSIONS
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "30"))  # 500 by hand


def index(kind: str, root: object, **said: Any) -> Index:
    """Index what lies there as the command does."""
    return index_files("faces", SetChoices(**said).read(kind, str(root)), images=UPath(f"{root}.pictures"))


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, bytes, str]]:
    """Name, content and label of 15 pictures, every fifth of which is for test."""
    drawn = sorted(draw_faces(tmp_path_factory.mktemp("drawn"), per_class=5).rglob("*.*"))
    return [(f"{n:03d}{path.suffix}", path.read_bytes(), path.parent.name) for n, path in enumerate(drawn)]


def pack(root: Path, faces: list[tuple[str, bytes, str]]) -> dict[str, tuple[str, str]]:
    """Write the faces in every way there is; return kind and place of each, by its name."""
    train, test = ([face for n, face in enumerate(faces) if (n % 5 == 0) is held] for held in (False, True))
    files = {name: content for name, content, _ in faces}
    rows = "".join(f"{name},{label},{'train' if n % 5 else 'test'}\n" for n, (name, _, label) in enumerate(faces))
    table = {**files, "faces.csv": b"file_name,label,split\n" + rows.encode()}
    for name, content in table.items():
        (root / "csv").mkdir(parents=True, exist_ok=True)
        (root / "csv" / name).write_bytes(content)
    write_zip(root / "table.zip", {f"wrapper/{name}": content for name, content in table.items()})
    write_zip(root / "stored.zip", table, zipfile.ZIP_STORED)
    write_tar(root / "table.tar", {f"./{name}": content for name, content in table.items()})
    for part, some in (("train-00000-of-00002", train[:7]), ("train-00001-of-00002", train[7:]), ("test-00000", test)):
        write_faces(root / "hub" / "data" / f"{part}.parquet", some, CLASSES)
        write_samples(root / "shards" / f"{part}.tar", some)
    return {
        "folder and csv": ("folder", f"{root}/csv"),
        "csv": ("table", f"{root}/csv/faces.csv"),
        "zip, deflated": ("table", f"{root}/table.zip"),
        "zip, stored": ("folder", f"{root}/stored.zip"),
        "tar": ("folder", f"{root}/table.tar"),
        "table in a tar": ("table", f"{root}/table.tar/faces.csv"),
        "parquet": ("table", f"{root}/hub"),
        "parquet by a pattern": ("table", f"{root}/hub/data/*.parquet"),
        "shards": ("webdataset", f"{root}/shards"),
        "shards by a pattern": ("webdataset", f"{root}/shards/{{train-0000{{0..1}}-of-00002,test-00000}}.tar"),
    }


def test_a_set_is_the_same_however_it_is_packed(tmp_path: Path, faces: list[tuple[str, bytes, str]]) -> None:
    ways = pack(tmp_path, faces)
    found = {name: index(*way) for name, way in ways.items()}
    wanted = {name: (content, label, "train" if n % 5 else "test") for n, (name, content, label) in enumerate(faces)}
    for name, result in found.items():
        assert result.broken == []
        result.manifest.save(UPath(tmp_path / "faces.parquet"))
        manifest = Manifest.load(UPath(tmp_path / "faces.parquet"))
        rows = zip(
            manifest.sample_ids, manifest.name_classes(manifest.rows("all")), manifest.table["split"], strict=True
        )
        read = {
            sample: (manifest.fetch(row), str(label), split.as_py()) for row, (sample, label, split) in enumerate(rows)
        }
        assert read == wanted, name
        assert manifest.digest == found["csv"].manifest.digest, name
    places = [str(found[name].manifest.path(0)) for name in ("zip, deflated", "shards", "parquet")]
    below = ("table.zip/wrapper/000.jpg", "shards/test-00000.tar/000.jpg", "hub/data/test-00000.parquet/0000000")
    assert places == [f"{tmp_path}/{place}" for place in below]


def test_features_runs_and_scores_are_the_same_however_a_set_is_packed(
    tmp_path: Path, faces: list[tuple[str, bytes, str]], tiny_tower: str
) -> None:
    ways, kept = pack(tmp_path, faces), dict[str, dict[str, bytes]]()
    for name in ("csv", "zip, deflated", "table in a tar", "parquet", "shards"):
        kind, root = ways[name]
        cafe = Cafe(tmp_path / name, "")
        cafe.succeed("data", "index", kind, root, "--name", "faces")
        workspace = Workspace.at(str(cafe.workspace))
        fill_store(workspace, "faces", ExtractSettings(backbone=tiny_tower, views=2, shard_rows=4)).finish()
        files = list(workspace.features.glob("**/c/**/*"))
        if name in ("csv", "shards"):
            run = train_run(workspace, source="faces", method="linear_probe", epochs=1, image_size=32, targets="faces")
            files += [run / "model.safetensors", run / "predictions" / "faces.parquet"]
            assert "linear_probe" in cafe.succeed("compare")
        kept[name] = {str(path.relative_to(workspace.root)): path.read_bytes() for path in files if path.is_file()}
    assert len(kept["parquet"]) > 3
    assert kept["csv"] == kept["shards"]
    assert all(kept["csv"] | files == kept["csv"] for files in kept.values())


def test_faces_in_archives_are_checked_audited_shown_and_predicted_as_files_are(
    tmp_path: Path, faces: list[tuple[str, bytes, str]]
) -> None:
    ways = pack(tmp_path, faces)
    manifests = {name: index(*ways[name]).manifest for name in ("csv", "zip, deflated", "tar", "parquet", "shards")}
    files = manifests.pop("csv")
    checked, shown = check_pictures(files, lambda *_: None), read_faces(files, files.sample_ids)
    (_, found) = audit(files, [replace(manifests["shards"], name="packed")], lambda *_: None, lambda *_: None)
    pairs = {*zip(found.pairs.first.tolist(), found.pairs.second.tolist(), strict=True)}
    assert {(row, row) for row in range(len(files))} <= pairs
    for name, manifest in manifests.items():
        assert list(check_pictures(manifest, lambda *_: None).seen) == list(checked.seen), name
        pictures = read_faces(manifest, manifest.sample_ids)
        assert all(np.array_equal(pictures[sample], shown[sample]) for sample in files.sample_ids), name
    for place in ("table.zip", "table.tar", "hub/data/test-00000.parquet"):
        frames = list(read_frames(find_files([str(tmp_path / place)]).files, 5.0))
        held = [sample for sample in files.sample_ids if place.endswith("parquet") <= (int(sample[:3]) % 5 == 0)]
        assert len(frames) == len(held)
        together = zip(frames, held, strict=True)
        assert all(np.array_equal(frame.pixels, shown[sample]) for frame, sample in together), place
    photos = find_photos(Workspace.at(str(tmp_path)), str(tmp_path / "table.zip"))  # to be aligned
    assert [photos.fetch(row) for row in range(len(photos))] == [content for _, content, _ in faces]


@pytest.mark.parametrize(
    ("kind", "make"),
    [("rafdb", write_rafdb_shared), ("affectnet", write_affectnet_arrays), ("ferplus", write_ferplus_csv)],
)
def test_a_distributed_set_is_read_from_its_archive(tmp_path: Path, kind: str, make: Callable[[Path], None]) -> None:
    make(tmp_path / "files")
    files, there = index(kind, tmp_path / "files"), read_tree(tmp_path / "files")
    for path in (write_zip(tmp_path / "set.ZIP", there), write_tar(tmp_path / "set.tar", there)):
        found = index(kind, path)
        assert found.manifest.digest == files.manifest.digest
        assert found.broken == files.broken
        assert all(found.manifest.fetch(row) == files.manifest.fetch(row) for row in range(len(files.manifest)))


def test_rows_without_names_in_order_are_called_by_their_place(
    tmp_path: Path, faces: list[tuple[str, bytes, str]]
) -> None:
    write_faces(tmp_path / "turned.parquet", reversed(faces[:3]), CLASSES, group=2)
    unnamed = write_faces(tmp_path / "validation" / "0000.parquet", [(None, *face[1:]) for face in faces[:3]], CLASSES)
    for path, expected in ((tmp_path / "turned.parquet", [2, 1, 0]), (unnamed, [0, 1, 2])):
        manifest = index("table", path, split="train").manifest
        assert manifest.sample_ids == [f"{path.name}/{row:07d}" for row in range(3)]
        assert [manifest.fetch(row) for row in (2, 0, 1)] == [faces[expected[row]][1] for row in (2, 0, 1)]
    assert set(index("table", tmp_path / "validation").manifest.table["split"].to_pylist()) == {"train", "test"}
    assert set(index("table", f"{tmp_path}/val*/*.parquet").manifest.table["split"].to_pylist()) == {"val"}


def test_names_of_several_shards_are_apart_and_numbers_are_asked_for(
    tmp_path: Path, faces: list[tuple[str, bytes, str]]
) -> None:
    numbered = [(name, content, str(3 * (n % 2))) for n, (name, content, _) in enumerate(faces[:4])]
    for number in range(2):
        write_samples(tmp_path / f"{number}.tar", numbered[2 * number : 2 * number + 2])
    write_samples(tmp_path / "again" / "1.tar", numbered[:2])
    assert index("webdataset", tmp_path / "again", label_order="fer2013").manifest.sample_ids == ["000.jpg", "001.png"]
    manifest = index("webdataset", tmp_path, label_order="fer2013").manifest
    assert manifest.sample_ids[:2] == ["0.tar/000.jpg", "0.tar/001.png"]
    assert manifest.name_classes(manifest.rows("all")).tolist() == ["anger", "happiness"] * 3
    sentence = complaint(index, "webdataset", tmp_path / "0.tar")
    assert sentence.startswith(f"{tmp_path}/0.tar labels its faces by numbers, 0: 1 face, 3: 1 face")
    assert "--label-order" in sentence


def test_withheld_labels_and_members_that_cannot_be_read_are_counted(
    tmp_path: Path, faces: list[tuple[str, bytes, str]]
) -> None:
    (_, picture, _), *_ = faces
    write_faces(
        tmp_path / "a.parquet", [("0.jpg", picture, "anger"), ("1.jpg", picture, None), ("2.jpg", b"", "fear")], CLASSES
    )
    found = index("table", tmp_path / "a.parquet")
    assert (found.listing.dropped, found.broken) == ({"no label": 1}, [("a.parquet/0000002", "file is empty")])
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("0.jpg", "../1.jpg", "2.jpg", "a.b.jpg"):
            info = tarfile.TarInfo(name)
            info.size = len(picture)
            tar.addfile(info, io.BytesIO(picture))
        for name, content in (
            ("0.cls", b"anger"),
            ("2.json", b"[1]"),
            ("a.txt", b"fear"),
            ("a.c.jpg", picture),
            ("x.npy", b""),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        link = tarfile.TarInfo("3.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    found = index("webdataset", tmp_path / "a.tar")
    assert found.manifest.sample_ids == ["0.jpg"]
    assert found.broken == [
        ("a.tar/../1.jpg", "leads out of its archive"),
        ("a.tar/2.json", "is no JSON object, or no text"),
        ("a.tar/3.jpg", "is a link"),
        ("a.tar/a.b.jpg", "has the name of a.c.jpg, so that it is unclear whose label is whose"),
    ]
    assert (found.listing.dropped, found.listing.ignored) == ({"no label": 1}, {".npy": 1})


def test_an_archive_that_changed_is_refused_and_one_that_is_gone_is_a_fault_of_the_storage(
    tmp_path: Path, faces: list[tuple[str, bytes, str]]
) -> None:
    ways = pack(tmp_path, faces)
    for name, file in (
        ("zip, deflated", "table.zip"),
        ("shards", "shards/test-00000.tar"),
        ("parquet", "hub/data/test-00000.parquet"),
    ):
        manifest, path = index(*ways[name]).manifest, tmp_path / file
        content = path.read_bytes()
        for changed in (content[:-3000][::-1] + content[-3000:], content[:700], b""):
            path.write_bytes(changed)
            complaints = {complaint(manifest.read_face, row) for row in range(3)}
            assert any("has changed since it was indexed: index 'faces' again" in text for text in complaints), name
        path.unlink()
        with pytest.raises(StorageError, match="is missing with its whole folder"):
            Renderer(manifest, ViewPlan("paper", 0, 1, "bilinear", (0.5,) * 3, (0.5,) * 3), 32).render([(0, 0)], {})


def test_a_manifest_of_before_is_read_and_a_place_that_none_can_be_is_not(
    tmp_path: Path, faces: list[tuple[str, bytes, str]]
) -> None:
    path = UPath(tmp_path / "faces.parquet")
    manifest = index(*pack(tmp_path, faces)["csv"]).manifest
    manifest.save(path)
    table = pq.read_table(path)
    kept = {b"cafe.manifest": table.schema.metadata[b"cafe.manifest"]}
    pq.write_table(table.drop_columns(["span"]).replace_schema_metadata(kept), path)
    assert Manifest.load(path).digest == manifest.digest
    assert Manifest.load(path).fetch(0) == manifest.fetch(0)
    for span in ([1], [0, -1], [0, None], [1, 2, 3, 4]):
        column = pa.array([span, *[None] * (len(table) - 1)], pa.list_(pa.int64()))
        place = table.column_names.index("span")
        pq.write_table(table.set_column(place, "span", column).replace_schema_metadata(kept), path)
        assert "damaged manifest (a place in an archive" in complaint(Manifest.load, path)


def zip_bomb(size: int) -> bytes:
    """A zip of a few kilobytes with a picture and what inflates to so many bytes."""
    sink = io.BytesIO()
    with (
        zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive,
        archive.open("anger/0.png", "w") as file,
    ):
        for _ in range(size // 2**20):
            file.write(bytes(2**20))
    return sink.getvalue()


def huge_tar(name: bytes = b"anger/0.png", kind: bytes = b"0", size: int = 2**33, more: bytes = b"") -> bytes:
    """A tar whose one header claims so many bytes."""
    info = tarfile.TarInfo(name.decode())
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT) + more + bytes(1024)


MALFORMED = {
    "zip bomb": ("a.zip", zip_bomb(2**26), r"inflates from [\d,]+ to 67,108,864 bytes, as no picture does"),
    "no zip": ("a.zip", b"PK\3\4" + bytes(99), "is no zip file, or damaged"),
    "empty zip": ("a.zip", b"", "is no zip file, or damaged"),
    "no tar": ("a.tar", b"x" * 1024, "is no tar file, or damaged"),
    "tar cut off": ("a.tar", huge_tar(), "cut off or damaged at 'anger/0.png'"),
    "header of 8 GB": ("a.tar", huge_tar(kind=b"x"), "a header of 8,589,934,592 bytes"),
    "name of 8 GB": ("a.tar", huge_tar(kind=b"L"), "a header of 8,589,934,592 bytes"),
    "damage within": ("a.tar", huge_tar(size=0) [:512] + b"no header" + bytes(1015), "no header at byte 512"),
    "a device": ("a.tar", huge_tar(kind=tarfile.CHRTYPE, size=0), "No readable|holds no picture"),
    "no parquet": ("a.parquet", b"PAR1" + bytes(99), "neither a CSV nor a Parquet table|is no parquet file, or damaged"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "content", "message"), MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_archive_is_one_sentence(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    kind = "table" if name.endswith("parquet") else "folder"
    with pytest.raises(UserError, match=message) as raised:
        index(kind, tmp_path / name)
    assert "\n" not in str(raised.value)


def test_a_negative_size_in_a_tar_ends_the_reading_of_it(tmp_path: Path) -> None:
    info = tarfile.TarInfo("a.png")
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    block[124:136] = b"\xff" * 8 + struct.pack(">i", -512)  # a size in base 256
    block[148:156] = b"        "
    block[148:156] = b"%06o\0 " % sum(block)
    (tmp_path / "a.tar").write_bytes(bytes(block) + bytes(1024))
    assert "is no tar file, or damaged" in complaint(list, walk_archive(UPath(tmp_path / "a.tar")))


NAMES = st.sampled_from(
    ["anger/0.png", "0.png", "0.cls", "0.json", "../0.png", "/0.png", "./a/../0.png", "a\\..\\0.png", "labels.csv",
     "a//b.png", "\udcff.png", "x" * 300 + ".png", "fear/", "metadata.jsonl"]
)  # fmt: skip
PARTS = st.binary(max_size=40) | st.just(b"anger") | st.just(b"file_name,label\n0.png,anger\n") | st.just(None)
EDITS = st.lists(st.tuples(st.integers(0, 10**6), st.binary(max_size=12)), max_size=3)


def build(form: str, members: list[tuple[str, bytes | None, int]], picture: bytes) -> bytes:
    """Return an archive of members, some of them pictures, links, encrypted, sparse or of a claimed size."""
    sink = io.BytesIO()
    if form == "parquet":
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        rows = [
            {"bytes": picture if content is None else content, "path": name.encode(errors="replace").decode()}
            for name, content, _ in members
        ]
        table = pa.table(
            {"image": pa.array(rows, kind), "label": pa.array([twist for *_, twist in members], pa.int64())}
        )
        about = {
            "huggingface": '{"info": {"features": {"label": {"_type": "ClassLabel", "names": ["anger", "fear"]}}}}'
        }
        pq.write_table(table.replace_schema_metadata(about), sink, row_group_size=2)
    elif form == "zip":
        with zipfile.ZipFile(sink, "w") as archive:
            for name, content, twist in members:
                info = zipfile.ZipInfo(name.encode(errors="replace").decode())
                info.compress_type = zipfile.ZIP_DEFLATED if twist % 2 else zipfile.ZIP_STORED
                info.external_attr = 0o120777 << 16 if twist == 3 else 0
                archive.writestr(info, picture if content is None else content)
                info.file_size = 2**40 if twist == 4 else info.file_size
    else:
        with tarfile.open(fileobj=sink, mode="w", format=tarfile.GNU_FORMAT) as tar:
            for name, content, twist in members:
                info, data = tarfile.TarInfo(name), picture if content is None else content
                info.type = {3: tarfile.SYMTYPE, 4: tarfile.LNKTYPE, 5: b"x", 6: b"S"}.get(twist, tarfile.REGTYPE)
                info.size, info.linkname = len(data), "/etc/passwd"
                tar.addfile(info, io.BytesIO(data))
    return sink.getvalue()


@settings(
    max_examples=EXAMPLES, derandomize=True, database=None, deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(
    form=st.sampled_from(["tar", "zip", "parquet"]),
    members=st.lists(st.tuples(NAMES, PARTS, st.integers(0, 6)), max_size=4),
    edits=EDITS,
    cut=st.none() | st.integers(0, 4096),
    kind=st.sampled_from(["folder", "table", "webdataset"]),
)
def test_an_archive_of_any_content_is_read_or_one_sentence_and_nothing_is_written(
    tmp_path: Path,
    faces: list[tuple[str, bytes, str]],
    form: str,
    members: list[Any],
    edits: list[Any],
    cut: int | None,
    kind: str,
) -> None:
    content = bytearray(build(form, members, faces[1][1]))
    for place, other in edits:
        place %= max(1, len(content))
        content[place : place + len(other)] = other
    (tmp_path / "in").mkdir(exist_ok=True)
    path = tmp_path / "in" / f"a.{form}"
    path.write_bytes(content[:cut])
    tracemalloc.start()
    sentence = complaint(read_all, kind, path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert "\n" not in sentence
    assert peak < 2**25
    assert [str(found) for found in tmp_path.rglob("*") if found.is_file()] == [str(path)]
    path.unlink()


def read_all(kind: str, path: Path) -> None:
    """Index an archive and read all of its faces; what cannot be read is named."""
    found = index(kind, path)
    for row in range(len(found.manifest)):
        found.manifest.fetch(row)
    assert all(reason for _, reason in found.broken)


def test_rows_of_a_large_group_are_read_in_any_order_though_few_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archives, "KEPT", 4000)
    pictures = [np.random.default_rng(n).bytes(100) for n in range(200)]
    kind = pa.struct([("bytes", pa.large_binary())])
    table = pa.table({"id": range(200), "image": pa.array([{"bytes": picture} for picture in pictures], kind)})
    pq.write_table(table, tmp_path / "a.parquet")
    for row in (0, 199, 5, 100, 99, 60, 199, 0):
        assert archives.read_span(UPath(tmp_path / "a.parquet" / f"{row:07d}"), (0, row)) == pictures[row]
