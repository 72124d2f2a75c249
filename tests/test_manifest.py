"""Manifests: readers, splits and what their digests name."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import resource
import shutil
import tracemalloc
from collections import Counter
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import Cafe, complaint, draw_faces
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_images import HEIC
from upath import UPath

from cafe.data.expressions import EXPRESSIONS, ClassChoice
from cafe.data.indexing import Index, index_files, thin_training
from cafe.data.manifest import Face, Manifest, assign_splits, hold_out_rows
from cafe.data.readers import DATASETS
from cafe.data.readers.choices import SetChoices
from cafe.data.rows import RowFiles, write_files
from cafe.errors import DamagedError, UserError
from cafe.files import find_below
from cafe.inference.frames import find_files, read_photo
from cafe.jobs.runs import name_folders
from cafe.pipeline.features.integrity import find_stores
from cafe.pipeline.workspace import Workspace
from cafe.results.columns import Column
from cafe.results.leaks import audit_path
from cafe.spool import ArraySpool, Spool, sort


@pytest.fixture
def cafe(tmp_path: Path) -> Cafe:
    """The command line without Ray, which indexing never needs."""
    return Cafe(tmp_path / "work", "")


def index(kind: str, path: Path) -> Index:
    return index_files("faces", DATASETS[kind](UPath(path)))


def face(number: int, label: int, group: str | None = None, digest: str = "") -> Face:
    return Face(f"{label}/{number}.jpg", f"{label}/{number}.jpg", label, "", group, 8, 8, digest or f"{label}-{number}")


def test_a_folder_becomes_one_row_per_face(tmp_path: Path) -> None:
    manifest = index("folder", draw_faces(tmp_path, per_class=10, size=16)).manifest
    assert len(manifest) == 30
    assert manifest.sample_ids[0] == "anger/000.jpg"
    row = manifest.table.slice(0, 1).to_pylist()[0]
    assert (row["label"], row["width"], row["height"]) == (5, 16, 16)
    assert len(manifest.rows("test")) == 6
    assert manifest.path(0) == UPath(tmp_path / "anger" / "000.jpg")


def test_moving_the_folder_changes_no_sample_and_no_digest(tmp_path: Path) -> None:
    first = index("folder", draw_faces(tmp_path / "a")).manifest
    shutil.move(tmp_path / "a", tmp_path / "deep" / "b")
    second = index("folder", tmp_path / "deep" / "b").manifest
    assert second.root != first.root
    assert second.sample_ids == first.sample_ids
    assert (second.digest, second.image_digest) == (first.digest, first.image_digest)


def test_a_given_split_is_kept(tmp_path: Path) -> None:
    draw_faces(tmp_path / "Train", per_class=2)
    draw_faces(tmp_path / "validation", per_class=3)
    result = index("folder", tmp_path)
    assert result.listing.layout == "SPLIT/EXPRESSION/image"
    assert (len(result.manifest.rows("train")), len(result.manifest.rows("val"))) == (6, 9)


def test_an_unknown_folder_names_the_expressions_and_contempt_is_left_out_and_counted(tmp_path: Path) -> None:
    shutil.move(draw_faces(tmp_path) / "anger", tmp_path / "bored")
    with pytest.raises(
        UserError, match=r"other classes than surprise, .*: 'bored' \(12 faces\): leave .* --skip bored, or"
    ):
        index("folder", tmp_path)
    shutil.move(tmp_path / "bored", tmp_path / "Contempt")
    result = index("folder", tmp_path)
    assert (len(result.manifest), result.listing.dropped) == (24, {"contempt": 12})


def test_a_folder_and_a_table_may_bring_classes_of_their_own(tmp_path: Path, cafe: Cafe) -> None:
    draw_faces(tmp_path / "ward", per_class=5)
    for old, new in (("anger", "Pain"), ("sadness", "drowsy"), ("happiness", "at ease")):
        shutil.move(tmp_path / "ward" / old, tmp_path / "ward" / new)
    command = ("data", "index", "folder", str(tmp_path / "ward"), "--name", "ward", "--expressions")
    output = cafe.succeed(*command, "own")
    folder = Manifest.load(UPath(cafe.workspace / "manifests" / "ward.parquet"))
    assert folder.classes == ("at ease", "drowsy", "pain")
    assert set(folder.name_classes(np.flatnonzero([s.startswith("Pain/") for s in folder.sample_ids]))) == {"pain"}
    assert [line.replace("│", " ").split() for line in output.splitlines() if " drowsy " in line] == [
        ["drowsy", "4", "1", "5"]
    ]
    lines = [
        f"{sample},{name.upper()}"
        for sample, name in zip(folder.sample_ids, folder.name_classes(folder.rows("all")), strict=True)
    ]
    (tmp_path / "ward" / "faces.csv").write_text("\n".join(["path,label", *lines]))
    listing = DATASETS["table"](UPath(tmp_path / "ward" / "faces.csv"))
    table = index_files("ward", listing.select(ClassChoice.parse("own"))).manifest
    assert (table.classes, table.labels.tolist()) == (folder.classes, folder.labels.tolist())
    assert table.digest == folder.digest
    output = cafe.succeed(*command, "pain,drowsy", "--skip", "at ease")
    assert "5 left out, which show none of the 2 classes: 5 at ease" in output
    again = Manifest.load(UPath(cafe.workspace / "manifests" / "ward.parquet"))
    assert (again.classes, len(again)) == (("pain", "drowsy"), 10)
    assert "'at ease' (5 faces): leave them out with --skip at ease" in cafe.fail(*command, "pain,drowsy")


def test_hidden_files_and_other_kinds_are_not_faces(tmp_path: Path) -> None:
    draw_faces(tmp_path, per_class=2)
    (tmp_path / "anger" / ".DS_Store").touch()
    (tmp_path / "__MACOSX" / "anger").mkdir(parents=True)
    (tmp_path / "__MACOSX" / "anger" / "x.jpg").touch()
    (tmp_path / "anger" / "notes.txt").touch()
    result = index("folder", tmp_path)
    assert (len(result.manifest), result.listing.ignored, result.broken) == (6, Counter({".txt": 1}), [])


def test_a_folder_holds_all_pictures_that_are_read_when_they_are_named(tmp_path: Path) -> None:
    face, kinds = Image.new("RGB", (20, 30)), {"a.jpe": "JPEG", "b.jfif": "JPEG", "c.AVIF": "AVIF", "d.ppm": "PPM"}
    (tmp_path / "anger").mkdir()
    for name, kind in kinds.items():
        face.save(tmp_path / "anger" / name, kind)
    (tmp_path / "anger" / "e.HEIC").write_bytes(HEIC)
    for name in ("f.cr2", "g.CR2", "h"):
        (tmp_path / "anger" / name).touch()
    result = index("folder", tmp_path)
    assert [sample[6:] for sample in result.manifest.sample_ids] == [*kinds, "e.HEIC"]
    assert result.listing.ignored == {".cr2": 2, "": 1}
    for place in (str(tmp_path), f"{tmp_path}/anger/*"):
        files, others = find_files([place])
        assert (sorted(file.name for file in files), others) == ([*kinds, "e.HEIC"], {".cr2": 2, "": 1})
    assert [next(read_photo(file)).error for file in files] == [""] * 5


def test_broken_files_are_named_and_duplicates_found(tmp_path: Path) -> None:
    draw_faces(tmp_path, per_class=2)
    (tmp_path / "anger" / "zero.jpg").touch()
    (tmp_path / "anger" / "text.png").write_text("not a picture")
    shutil.copy(tmp_path / "anger" / "000.jpg", tmp_path / "sadness" / "copy.jpg")
    result = index("folder", tmp_path)
    assert result.broken == [
        ("anger/text.png", "not an image of a known format"),
        ("anger/zero.jpg", "file is empty"),
    ]
    assert list(result.duplicates) == [["anger/000.jpg", "sadness/copy.jpg"]]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_table_is_read_with_splits_and_groups(tmp_path: Path, kind: str) -> None:
    draw_faces(tmp_path, per_class=2)
    rows = [
        {"path": "anger/000.jpg", "label": "Angry", "split": "training", "group": "ann"},
        {"path": "sadness/000.jpg", "label": "sad", "split": "test", "group": "bob"},
    ]
    path = tmp_path / f"faces.{kind}"
    if kind == "csv":
        path.write_bytes(b"\xef\xbb\xbfpath,label,split,group\r\n" + b"".join(
            f"{r['path']},{r['label']},{r['split']},{r['group']}\r\n".encode() for r in rows
        ))  # fmt: skip
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    table = index("table", path).manifest.table.to_pylist()
    assert [(r["sample_id"], r["label"], r["split"], r["group"]) for r in table] == [
        ("anger/000.jpg", 5, "train", "ann"),
        ("sadness/000.jpg", 4, "test", "bob"),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,age\na,b", "no column for the label .found path, age.: name one of them label, .* --column label="),
        ("path,label\n,anger", "Row 1 .* has no path"),
        ("path,label\n../x.jpg,anger", r"Row 1 .* has the path '../x.jpg': write it without '..' and drives, abs"),
        ("path,label\nC:\\\\x.jpg,anger", r"Row 1 .* has the path 'C:.*x.jpg': write it without '..' and drives, abs"),
        ("path,label\na,anger,fear", "is neither a CSV nor a Parquet table"),
        (
            "path,label\na,anger\nb,fear\na,fear\n./b,sad\n",
            r"lists 2 faces more than once .*, a \(row 1; row 3\), b \(row 2; row 4\)",
        ),
        ("path,label\na,level 1\na,level 2\nb,Level_1\nb,level 1\n", r"lists 1 faces more .*, a \(row 1; row 2\)"),
        ("path,label\nx.jpg,3", "by numbers, 3: 1 face, which mean .*--label-order affectnet .0 neutral, 1 hap.*FILE"),
        (
            "path,label\nx.jpg,Sleepy\ny.jpg,sleepy",
            "other classes than .*: 'sleepy' .2 faces in row 1, row 2.: leave them",
        ),
        ("path,label,split\nx.jpg,anger,dev", "the unknown split 'dev'"),
        ("path,label,label\nx.jpg,anger,fear", "column 'label' besides 'label', and either may be the label: keep"),
        (
            "path,label,emotion\nx.jpg,anger,fear",
            "'emotion' besides 'label', and either may be the label: .*label=NAME",
        ),
        ("path,label,split\nx.jpg,anger,0", "Row 1 of .* has the unknown split '0': write train, val, test, or leave"),
        ('path,label\nx.jpg,anger\n"y.jpg,fear\n', "neither a CSV nor a Parquet table .line 3: unexpected end of data"),
        (
            "path,label,bbox\nx.jpg,anger,1 2 3 4",
            "column 'bbox', which may be a corner and two sides or two corners: say",
        ),
        (
            "path,label,x,y,w,h\nx.jpg,anger,.5,.5,.6,.4",
            "Row 1 of .* has the face box .5, .5, .6, .4: write four numbers of",
        ),
        ("path,label,happiness,happy\nx.jpg,anger,7,1", "column 'happy' besides 'happiness'"),
        ("path,label,anger\nx.jpg,anger,inf", "Row 1 .* has for 'anger' 'inf': write how many people"),
    ],
)
def test_a_bad_table_is_one_sentence(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        index("table", tmp_path / "t.csv")


def test_a_row_listed_twice_counts_once_and_is_reported(tmp_path: Path, cafe: Cafe) -> None:
    draw_faces(tmp_path, per_class=1)
    (tmp_path / "t.csv").write_text("path,label\nanger/000.jpg,anger\nsadness/000.jpg,sad\n./anger/000.jpg,Angry\n")
    output = cafe.succeed("data", "index", "table", str(tmp_path / "t.csv"), "--name", "t")
    assert "t: 2 faces" in output
    assert "1 listed more than once, counted once:\n  anger/000.jpg (row 1; row 3)" in output


def test_a_table_may_lie_elsewhere_and_have_absolute_paths(tmp_path: Path, cafe: Cafe) -> None:
    faces, table = draw_faces(tmp_path / "sets" / "faces", per_class=2), tmp_path / "lists" / "t.csv"
    table.parent.mkdir()
    table.write_text(f"path,label\n{faces}/anger/000.jpg,anger\n{faces}/sadness/001.png,sad\n")
    by_table = index("table", table).manifest
    assert (by_table.root, by_table.sample_ids) == (str(faces), ["anger/000.jpg", "sadness/001.png"])
    command = ("data", "index", "table", str(table), "--name", "t", "--root")
    cafe.succeed(*command, str(tmp_path / "sets"))
    manifest = Manifest.load(UPath(cafe.workspace / "manifests" / "t.parquet"))
    assert (manifest.root, manifest.sample_ids[0]) == (str(tmp_path / "sets"), "faces/anger/000.jpg")
    assert manifest.read_face(0).shape == (24, 24, 3)
    assert "which is not in" in cafe.fail(*command, str(tmp_path / "lists"))
    table.write_text("path,label\nanger/000.jpg,anger\n")
    assert "t: 1 faces" in cafe.succeed(*command, str(faces))
    assert "--root . has no meaning for folder" in cafe.fail(
        "data", "index", "folder", ".", "--name", "x", "--root", "."
    )


def test_links_to_folders_are_followed_and_a_loop_ends(tmp_path: Path) -> None:
    draw_faces(tmp_path / "elsewhere", per_class=2)
    (tmp_path / "set").mkdir()
    for name in ("anger", "sadness"):
        (tmp_path / "set" / name).symlink_to(tmp_path / "elsewhere" / name)
    (tmp_path / "elsewhere" / "anger" / "loop").symlink_to(tmp_path / "set")
    samples = index("folder", tmp_path / "set").manifest.sample_ids
    assert [sample for sample in samples if "loop" not in sample] == [
        "anger/000.jpg", "anger/001.png", "sadness/000.jpg", "sadness/001.png",
    ]  # fmt: skip
    assert all(sample.count("loop") < 2 for sample in samples)


def test_splits_are_stratified_and_rare_classes_reach_both() -> None:
    counts = ((0, 100), (1, 5), (2, 2), (3, 1))
    faces = list(assign_splits([face(n, label) for label, count in counts for n in range(count)]))
    tests = {label: sum(f.split == "test" for f in faces if f.label == label) for label in range(4)}
    assert tests == {0: 20, 1: 1, 2: 1, 3: 0}


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 12)), min_size=2, max_size=120))
def test_groups_and_identical_files_never_straddle_the_split(rows: list[tuple[int, int]]) -> None:
    faces = [
        face(n, label, group=f"g{group}" if group < 6 else None, digest=f"d{group}")
        for n, (label, group) in enumerate(rows)
    ]
    split = list(assign_splits(faces))
    for unit in range(13):
        assert len({f.split for f, (_, group) in zip(split, rows, strict=True) if group == unit}) <= 1
    assert list(assign_splits(faces[::-1])) == split[::-1]  # the order plays no part


def test_adding_a_face_moves_hardly_any_other() -> None:
    before = assign_splits([face(n, 0) for n in range(500)])
    after = assign_splits([face(n, 0) for n in range(501)])
    moved = sum(a.split != b.split for a, b in zip(before, after, strict=False))
    assert moved <= 1


def test_a_manifest_survives_its_file_and_its_digest_names_labels(tmp_path: Path) -> None:
    manifest = Manifest.from_faces("x", "/data", [replace(face(n, n % 3), split="train") for n in range(9)])
    manifest.save(UPath(tmp_path / "m" / "x.parquet"))
    again = Manifest.load(UPath(tmp_path / "m" / "x.parquet"))
    assert (again.name, again.root, again.table.to_pylist()) == ("x", "/data", manifest.table.to_pylist())
    assert again.digest == manifest.digest
    relabelled = Manifest.from_faces("x", "/data", [replace(face(n, n % 3), split="train", label=0) for n in range(9)])
    assert relabelled.digest != manifest.digest
    assert relabelled.image_digest == manifest.image_digest


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Manifest, Manifest]:
    """A manifest in memory, and the same in files of 16 rows each."""
    monkeypatch.setattr("cafe.data.manifest.LARGE", 50)
    monkeypatch.setattr("cafe.data.rows.ROWS_A_FILE", 16)
    faces = [
        replace(
            face(n, n % 3),
            split=("train", "val")[n % 5 == 0],
            box=(0, 0, 8, n) if n > 80 else None,
            kept={"city": str(n)},
        )
        for n in range(100)
    ]
    manifest = Manifest.from_faces("x", "/data", faces, "", ("pain", "a b", "c-2"))
    manifest.save(UPath(tmp_path / "x.parquet"))
    return manifest, Manifest.load(UPath(tmp_path / "x.parquet"))


def test_a_large_manifest_lies_in_files_that_those_read_who_need_rows(
    tmp_path: Path, large: tuple[Manifest, Manifest]
) -> None:
    whole, filed = large
    assert (whole.large, filed.large, len(filed), filed.classes) == (False, True, 100, whole.classes)
    assert filed.digests() == [filed.digest, filed.image_digest] == [whole.digest, whole.image_digest]
    assert filed.sample_ids == whole.sample_ids
    assert filed.votes is None
    assert filed.kept == whole.kept == ["city"]
    assert filed.table["city"].to_pylist() == whole.table["city"].to_pylist()
    np.testing.assert_array_equal(filed.labels, whole.labels)
    np.testing.assert_array_equal(filed.rows("val"), whole.rows("val"))
    assert filed.read(range(14, 50)) == whole.table.slice(14, 36)
    part = replace(filed, table=filed.table.slice(14, 36))
    assert part.digest == replace(whole, table=whole.table.slice(14, 36)).digest
    assert part.table.take([30, 2, 3]) == whole.table.take([44, 16, 17])
    there = pickle.loads(pickle.dumps(filed.outline()))
    assert there.unpack(range(90, 100), filed.pack(range(90, 100))).table == whole.table.slice(90)
    assert pq.read_table(tmp_path / "x.rows").num_rows == 100  # by whatever reads Parquet
    shutil.rmtree(tmp_path / "x.rows")
    planned = Manifest.load(UPath(tmp_path / "x.parquet"))  # reads no row, and is named all the same
    assert (len(planned), planned.digest, planned.image_digest) == (100, whole.digest, whole.image_digest)
    with pytest.raises(
        DamagedError,
        match=r"x\.rows/00000-\w+\.parquet is missing, .* give the command again, else write it again with",
    ):
        planned.read(range(3))


def draw_set(root: Path, kind: str) -> Path:
    """Draw 40 faces without splits, two of them equal, with a broken one and, in a table, two that are listed twice."""
    folder = draw_faces(root / "set", per_class=13)
    (folder / "anger" / "empty.png").touch()
    shutil.copy(folder / "anger" / "001.png", folder / "sadness" / "copy.png")
    if kind == "folder":
        return folder
    paths = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*"))
    rows = [
        {"path": path, "label": path.split("/")[0], "subject": f"s{n // 4}" if n % 3 else "", "age": n, "fear": n % 2}
        | {"left": 0, "top": 0, "width": 5 + n % 2, "height": 5}
        for n, path in enumerate([*paths, "anger/none.png"])
    ]
    rows += [rows[3], rows[8], {**rows[4], "left": 2}]
    pd.DataFrame(rows).to_csv(folder / "list.csv", index=False)
    return folder / "list.csv"


@pytest.mark.parametrize("kind", ["folder", "table"])
def test_what_is_read_from_disk_and_merged_is_what_lies_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    place = draw_set(tmp_path, kind)

    def describe() -> list[Any]:
        listing = SetChoices(columns=("keep=age",) if kind == "table" else ()).read(kind, str(place))
        found = index_files("faces", listing)
        said = (
            listing.repeated,
            listing.rejected,
            listing.dropped,
            listing.notes,
            found.broken,
            found.listing.counts(),
        )
        seen = (list(found.duplicates), found.training_twins, found.outvoted, found.strange_votes, found.counts())
        return [found.manifest.table, *found.manifest.digests(), *said, *seen]

    whole = describe()
    for name, number in (("AT_ONCE", 3), ("SORTED_AT_ONCE", 4), ("MERGED_AT_ONCE", 2)):
        monkeypatch.setattr(f"cafe.spool.{name}", number)
    monkeypatch.setattr("cafe.data.rows.ROWS_AT_ONCE", 7)
    monkeypatch.setattr("cafe.data.manifest.ROWS_AT_ONCE", 7)
    assert describe() == whole
    assert len(whole[0]) == (40 if kind == "folder" else 41)
    assert [len(said) for said in whole[3:5]] == ([0, 0] if kind == "folder" else [2, 0])


def test_the_rows_of_a_large_manifest_are_written_once_when_they_are_indexed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, place = draw_set(tmp_path, "folder"), UPath(tmp_path / "faces.parquet")
    whole = index("folder", folder).manifest
    monkeypatch.setattr("cafe.data.manifest.LARGE", 30)
    monkeypatch.setattr("cafe.data.rows.ROWS_A_FILE", 16)
    found = index_files("faces", DATASETS["folder"](UPath(folder)), place=place)
    written = {path: path.stat().st_ino for path in (tmp_path / "faces.rows").iterdir()}
    assert (found.manifest.large, len(written), place.exists()) == (
        True,
        3,
        False,
    )  # a kill leaves the manifest of before
    assert (found.counts(), len(found.duplicates)) == (index("folder", folder).counts(), 1)
    found.manifest.save(place)
    assert {path: path.stat().st_ino for path in (tmp_path / "faces.rows").iterdir()} == written
    again = Manifest.load(place)
    assert (again.read(range(len(whole))), again.digests()) == (whole.table, whole.digests())


def test_one_command_at_a_time_makes_a_manifest(tmp_path: Path, cafe: Cafe) -> None:
    folder, workspace = draw_faces(tmp_path / "set"), Workspace.at(str(cafe.workspace))
    with workspace.writing_manifest("ward") as save:
        message = cafe.fail("data", "index", "folder", str(folder), "--name", "ward")
        assert re.search(
            r"Process \d+ on \S+ works on .*manifests/ward\.parquet: wait until it is done, or end it", message
        )
        assert save(replace(index("folder", folder).manifest, name="ward")).exists()
    cafe.succeed("data", "index", "folder", str(folder), "--name", "ward")
    assert [path.name for path in (tmp_path / "work" / "manifests").iterdir()] == ["ward.parquet"]


def test_a_spool_is_a_list_of_which_a_few_items_are_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cafe.spool.AT_ONCE", 64)
    monkeypatch.setattr("cafe.spool.SORTED_AT_ONCE", 512)
    monkeypatch.setattr("cafe.spool.MERGED_AT_ONCE", 4)
    numbers = np.random.default_rng(0).integers(0, 500, 9_000).tolist()
    tracemalloc.start()
    try:
        spool = Spool((number, f"{place:0200d}") for place, number in enumerate(numbers))
        ordered = sort(spool, itemgetter(0))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1_000_000  # of 2.7 million bytes, twice
    spool.append((-1, "last"))
    items = [(number, f"{place:0200d}") for place, number in enumerate(numbers)]
    assert list(spool) == [*items, (-1, "last")]
    assert (len(spool), spool[70], spool[-1], spool[62:66]) == (9001, items[70], (-1, "last"), items[62:66])
    assert list(ordered) == sorted(items, key=itemgetter(0))  # equal ones as they came
    assert list(sort([], str)) == list(Spool()) == []
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, usual[1]))
    try:
        with pytest.raises(
            UserError, match=r"cannot be written \(File too large\): make room there, or name another fo"
        ):
            Spool(items)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)


def test_arrays_in_a_spool_are_those_that_were_added() -> None:
    values, spool = np.arange(3000, dtype=np.float32).reshape(500, 2, 3), ArraySpool((2, 3), np.float32)
    for start in range(0, len(values), 7):
        spool.extend(values[start : start + 7])
    assert len(spool) == len(values)
    for places in (slice(None), slice(490, 600), slice(5, 5), np.array([499, 0, 17, 0])):
        np.testing.assert_array_equal(spool[places], values[places])
    numbers = ArraySpool((), np.int64)
    numbers.extend(np.array([3, 1]))
    assert numbers[np.array([1, 0, 1])].tolist() == [1, 3, 1]
    with pytest.raises(IndexError, match="Arrays 2 to 2 cannot be read as a whole: there are 2"):
        numbers[np.array([2])]
    spool.extend(values)
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, usual[1]))
    try:
        with pytest.raises(UserError, match=r"cannot be written \(File too large\): make room there, or name another"):
            np.asarray(spool[:2])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)


def test_a_large_manifest_is_replaced_as_a_whole_or_not_at_all(
    tmp_path: Path, large: tuple[Manifest, Manifest]
) -> None:
    whole, filed = large
    before = sorted(path.name for path in (tmp_path / "x.rows").iterdir())
    changed = whole.table.set_column(2, "label", pa.array((whole.labels + 1) % 3, pa.int8()))
    write_files(UPath(tmp_path / "x.parquet"), [changed], whole.classes)  # and killed here
    assert Manifest.load(UPath(tmp_path / "x.parquet")).read(range(100)) == whole.table
    replace(whole, table=changed).save(UPath(tmp_path / "x.parquet"))
    assert Manifest.load(UPath(tmp_path / "x.parquet")).labels.tolist() == ((whole.labels + 1) % 3).tolist()
    assert not set(before).intersection(path.name for path in (tmp_path / "x.rows").iterdir())
    whole.save(UPath(tmp_path / "x.parquet"))
    assert sorted(path.name for path in (tmp_path / "x.rows").iterdir()) == before
    replace(filed, table=filed.table.slice(0, 50)).save(UPath(tmp_path / "x.parquet"))
    again = Manifest.load(UPath(tmp_path / "x.parquet"))
    assert (again.large, again.table, list((tmp_path / "x.rows").iterdir())) == (False, whole.table.slice(0, 50), [])
    with pytest.raises(UserError, match=r"0/0\.jpg is listed more than once: keep one row of each sample"):
        write_files(UPath(tmp_path / "y.parquet"), [whole.table.slice(0, 1)] * 2, whole.classes)
    with pytest.raises(UserError, match=r"y\.parquet do not come in the order of their sample_id: sort them"):
        write_files(UPath(tmp_path / "y.parquet"), [whole.table.slice(20), whole.table.slice(0, 20)], whole.classes)


def test_rows_that_are_not_what_was_written_are_not_read(tmp_path: Path, large: tuple[Manifest, Manifest]) -> None:
    _, filed = large
    path = sorted((tmp_path / "x.rows").iterdir())[1]
    content = path.read_bytes()
    path.write_bytes(bytes([*content[:99], content[99] ^ 1, *content[100:]]))
    assert len(filed.read(range(16))) == 16
    with pytest.raises(DamagedError, match=f"{path.name} is damaged or was changed"):
        filed.read(range(17))
    path.write_bytes(content)
    damaged = replace(filed.table.files[1], rows=17)
    with pytest.raises(UserError, match=r"damaged rows of a manifest \(another number of rows\)"):
        replace(filed.table, files=(damaged,)).read()


def test_other_classes_survive_the_file_and_the_same_faces_are_the_same_in_any_class_set(tmp_path: Path) -> None:
    faces = [replace(face(n, n % 3), split="train") for n in range(9)]
    seven, three = (
        Manifest.from_faces("x", "/data", faces, "", classes) for classes in (EXPRESSIONS, ("pain", "a b", "c-2"))
    )
    three.save(UPath(tmp_path / "x.parquet"))
    again = Manifest.load(UPath(tmp_path / "x.parquet"))
    assert (again.classes, again.digest) == (("pain", "a b", "c-2"), three.digest)
    assert again.name_classes(np.array([0, 8])).tolist() == ["pain", "c-2"]
    assert three.digest != seven.digest
    assert three.image_digest == seven.image_digest
    assert replace(three, classes=("a b", "pain", "c-2")).digest != three.digest  # other labels
    turned = [replace(face, label=2 - face.label) for face in faces]
    assert Manifest.from_faces("x", "/data", turned, "", ("c-2", "a b", "pain")).digest == three.digest
    assert replace(seven, classes=(*EXPRESSIONS, "contempt")).digest == seven.digest
    assert thin_training(three, 3).classes == three.classes


def test_the_digest_of_seven_classes_is_what_it_always_was() -> None:
    rows = [
        Face(f"{n % 7}/{n}.jpg", f"{n % 7}/{n}.jpg", n % 7, ("train", "val", "test")[n % 3], f"p{n // 2}" if n % 2 else None,
             8, 9, f"d{n}", (1, 2, 3, 4) if n == 3 else None)
        for n in range(14)
    ]  # fmt: skip
    manifest = Manifest.from_faces("x", "/data", rows, "sfew")
    assert manifest.digest == "470e63713b8580804b15ac034ed77ffe1e62852592897a8f57b9793b52096ed2"
    assert manifest.image_digest == "9c77c678050d5655fc3094268336a3b480b879c2fa5b0e4f0b756548e0c048e0"


def test_a_column_that_is_empty_changes_no_digest_and_a_box_changes_both() -> None:
    plain = Manifest.from_faces("x", "/data", [replace(face(n, n), split="train") for n in range(3)])
    columns = {"sample_id": ["0/0.jpg", "1/1.jpg", "2/2.jpg"], "digest": ["0-0", "1-1", "2-2"]}
    before = hashlib.sha256("".join(json.dumps([name, values]) for name, values in columns.items()).encode())
    assert plain.image_digest == before.hexdigest()
    faces = [replace(face(n, n), split="train", box=(0, 0, 4, 4) if n == 1 else None) for n in range(3)]
    boxed = Manifest.from_faces("x", "/data", faces)
    assert boxed.image_digest != plain.image_digest
    assert boxed.digest != plain.digest
    moved = Manifest.from_faces("x", "/data", [replace(f, box=f.box and (1, 0, 4, 4)) for f in faces])
    assert moved.image_digest != boxed.image_digest


def test_the_kind_and_the_boxes_survive_the_file(tmp_path: Path) -> None:
    faces = [replace(face(n, n), split="val", box=(1, 2, 3, 4) if n else None) for n in range(2)]
    path = UPath(tmp_path / "x.parquet")
    Manifest.from_faces("x", "/data", faces, "sfew").save(path)
    again = Manifest.load(path)
    assert (again.kind, again.table["box"].to_pylist()) == ("sfew", [None, [1, 2, 3, 4]])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"header": {"version": None}}, "is not a manifest of version 2 or 3: write it again with `cafe data index`"),
        ({"header": {"name": "../x"}}, "is not a manifest of version 2"),
        ({"header": {"name": "y"}}, "holds the manifest 'y': name the file y.parquet"),
        ({"header": {"expressions": ["anger", "fear"]}}, "is a damaged manifest .an unknown label"),
        (
            {"header": {"expressions": ["Anger", "fear", "x"]}},
            "is a damaged manifest .The class name 'Anger' cannot be used",
        ),
        ({"path": "../../etc/passwd"}, "is a damaged manifest .a path that leads out of its root"),
        ({"path": "/etc/passwd"}, "a path that leads out of its root"),
        ({"label": 7}, "an unknown label"),
        ({"split": "dev"}, "an unknown split"),
        ({"digest": None}, "empty cells in 'digest'"),
        ({"digest": ""}, "a face without the SHA-256 of its file"),
        ({"sample_id": "1/1.jpg"}, "a sample listed twice"),
        ({"box": [1, 2, 3]}, "a box that is not left, top, width and height"),
        ({"box": [1, 2, None, 4]}, "a box that is not left, top, width and height"),
    ],
)
def test_a_manifest_that_cannot_be_trusted_is_one_sentence(
    tmp_path: Path, damage: dict[str, Any], message: str
) -> None:
    path = UPath(tmp_path / "x.parquet")
    Manifest.from_faces("x", "/data", [replace(face(n, n), split="train") for n in range(3)]).save(path)
    table = pq.read_table(path)
    header = json.loads(table.schema.metadata[b"cafe.manifest"]) | damage.get("header", {})
    rows = table.to_pylist()
    rows[0] |= damage
    table = pa.Table.from_pylist(rows, schema=table.schema)
    pq.write_table(table.replace_schema_metadata({"cafe.manifest": json.dumps(header)}), path)
    with pytest.raises(UserError, match=message):
        Manifest.load(path)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(place=st.integers(0, 3000), values=st.binary(min_size=1, max_size=40), cut=st.booleans())
def test_a_manifest_with_other_bytes_is_loaded_or_one_sentence(
    tmp_path: Path, place: int, values: bytes, cut: bool
) -> None:
    path = UPath(tmp_path / "x.parquet")
    Manifest.from_faces("x", "/data", [replace(face(n, n), split="train") for n in range(5)], "sfew").save(path)
    whole = path.read_bytes()
    data = bytearray(whole)
    place %= len(data)
    data[place : None if cut else place + len(values)] = values
    path.write_bytes(bytes(data))
    sentence = complaint(Manifest.load, path)
    assert str(path) in sentence if bytes(data) != whole else not sentence


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    header=st.sampled_from(("path,label", "path,label,split,group", "label,path\r", "\ufeffpath,label", "path", "")),
    rows=st.lists(
        st.lists(st.one_of(st.text(max_size=8), st.sampled_from(("a.png", "anger", "/x", "..", "\0"))), max_size=4)
    ),
    raw=st.binary(max_size=30),
)
def test_a_table_of_any_content_is_read_or_one_sentence(
    tmp_path: Path, header: str, rows: list[list[str]], raw: bytes
) -> None:
    text = "\n".join([header, *(",".join(row) for row in rows)])
    (tmp_path / "t.csv").write_bytes(text.encode("utf-8", "surrogatepass") + raw)
    assert complaint(index, "table", tmp_path / "t.csv")[-1:] in ("", ".")


def test_the_command_prints_counts_and_writes_the_manifest(tmp_path: Path, cafe: Cafe) -> None:
    draw_faces(tmp_path / "faces")
    (tmp_path / "faces" / "anger" / "zero.jpg").touch()
    output = cafe.fail("data", "index", "folder", str(tmp_path / "faces"), "--name", "tiny", code=1)
    assert "tiny: 36 faces, read as EXPRESSION/image" in output
    assert "1 broken files, left out:\n  anger/zero.jpg: file is empty" in output
    assert "tiny" in cafe.succeed("data", "list")


def test_a_name_that_another_folder_had_is_taken_with_a_word(tmp_path: Path, cafe: Cafe) -> None:
    for folder in ("first", "second"):
        draw_faces(tmp_path / folder)
    said = [
        cafe.succeed("data", "index", "folder", str(tmp_path / folder), "--name", "tiny")
        for folder in ("first", "first", "second")
    ]
    told = ["in place of 36 faces of" in text.replace("\n", " ") for text in said]
    assert told == [False, False, True]


def test_a_whole_folder_can_be_put_into_one_split_and_a_published_set_cannot(tmp_path: Path, cafe: Cafe) -> None:
    for split in ("train", "test"):
        draw_faces(tmp_path / "faces" / split, per_class=3)
    wanted = ("data", "index", "folder", str(tmp_path / "faces"), "--name", "target")
    cafe.succeed(*wanted, "--split", "test")
    target = Manifest.load(UPath(cafe.workspace / "manifests" / "target.parquet"))
    assert (len(target), len(target.rows("test"))) == (18, 18)
    cafe.succeed(*wanted)  # without the option the folder's own splits hold
    target = Manifest.load(UPath(cafe.workspace / "manifests" / "target.parquet"))
    assert [len(target.rows(split)) for split in ("train", "val", "test")] == [9, 0, 9]
    draw_faces(tmp_path / "MMAFEDB" / "train", per_class=1)
    message = cafe.fail("data", "index", "mma", str(tmp_path / "MMAFEDB"), "--name", "mma", "--split", "test")
    assert "--split test has no meaning for mma, which comes split: it is for folder, synthetic, table." in message


def test_folders_of_a_demo_have_names_that_can_be_used_and_never_one_twice(tmp_path: Path) -> None:
    plain, given, equals = (str(tmp_path / name) for name in ("CK+48", "My Faces", "a=b"))
    Path(equals).mkdir()
    named = name_folders([plain, given, f"old={plain}", equals])
    assert {name: str(root) for name, root in named.items()} == {
        "CK-48": plain, "My-Faces": given, "old": plain, "a-b": equals
    }  # fmt: skip
    assert list(name_folders([f"{tmp_path}/A/news", f"b.news={tmp_path}/B/news"])) == ["news", "b.news"]
    assert complaint(name_folders, [f"{tmp_path}/A/news", f"{tmp_path}/B/news"]) == (
        f"--faces {tmp_path}/B/news would be called 'news', as {tmp_path}/A/news is: name it with "
        f"--faces NAME={tmp_path}/B/news."
    )
    assert "take letters, digits" in complaint(name_folders, [f"my faces={plain}"])
    assert complaint(name_folders, [str(tmp_path / "日本")]).endswith(f"name it with --faces NAME={tmp_path / '日本'}.")


def test_held_out_rows_are_stratified_and_keep_groups_together() -> None:
    faces = [
        Face(f"{n:03d}", "x", n % 2, "train" if n < 80 else "test", f"g{n // 4}", 8, 8, str(n)) for n in range(100)
    ]
    manifest = Manifest.from_faces("m", "/x", faces)
    kept, held = hold_out_rows(manifest, manifest.rows("train"), 0.1)
    assert sorted([*kept, *held]) == list(range(80))
    assert len(held) == 8
    assert np.bincount(manifest.labels[held]).tolist() == [4, 4]
    assert {row // 4 for row in kept}.isdisjoint(row // 4 for row in held)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("folders", ".", "--name", "x"),
            "Unknown kind of data set 'folders': choose affectnet, ckplus, expw, fer2013, ferplus, folder, jaffe, kdef, "
            "mma, rafdb, sfew, synthetic, table, webdataset.",
        ),
        (("folder", "/no/such", "--name", "x"), "/no/such is not a folder"),
        (("folder", ".", "--name", "a/b"), "The name 'a/b' cannot be used"),
    ],
)
def test_a_wrong_call_is_one_sentence(cafe: Cafe, arguments: tuple[str, ...], message: str) -> None:
    assert message in cafe.fail("data", "index", *arguments)


def test_a_training_subset_keeps_the_proportions_and_the_other_splits() -> None:
    faces = [
        replace(face(n, label), split="train") for label, count in ((0, 60), (1, 30), (2, 9)) for n in range(count)
    ]
    faces += [replace(face(n, 1, digest="t"), sample_id=f"t{n}", split="test") for n in range(5)]
    manifest = Manifest.from_faces("m", "/x", faces)
    few, more = thin_training(manifest, 10), thin_training(manifest, 40)
    assert np.bincount(few.labels[few.rows("train")]).tolist() == [6, 3, 1]
    assert np.bincount(more.labels[more.rows("train")]).tolist() == [24, 12, 4]
    assert set(few.sample_ids) < set(more.sample_ids)
    assert len(few.rows("test")) == 5
    assert thin_training(manifest, 1000).digest == manifest.digest


def test_a_training_subset_of_a_large_manifest_is_that_of_a_small_one(
    tmp_path: Path, large: tuple[Manifest, Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, filed = large
    monkeypatch.setattr("cafe.data.indexing.LARGE", 50)
    monkeypatch.setattr("cafe.data.indexing.ROWS_AT_ONCE", 7)
    for faces, files in ((60, True), (20, False)):
        few = thin_training(filed, faces, UPath(tmp_path / "x.parquet"))
        assert (few.large, len(few)) == (files, faces + 20)
        assert few.read(range(len(few))) == thin_training(whole, faces).table
    assert isinstance(filed.table, RowFiles)
    assert not filed.table._columns  # no column was read as a whole


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/x", "a//x", "./x"])
def test_no_name_leads_out_of_the_folder_it_is_meant_for(tmp_path: Path, name: str) -> None:
    folder = UPath(tmp_path)
    manifest = Manifest.from_faces("x", str(tmp_path), [replace(face(0, 0), path=name)])
    for place in (
        lambda: manifest.path(0),
        lambda: Column(name).predictions(folder),
        lambda: Column(name).figure(folder, "masks", ".png"),
        lambda: audit_path(folder, name, "news"),
        lambda: find_stores(folder, name),
        lambda: find_below(UPath("http://host/faces"), name.replace(".", "%2e")),
    ):
        with pytest.raises(UserError, match="leads out of"):
            place()


def test_pictures_behind_links_are_read(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "set").mkdir()
    (tmp_path / "disk" / "x.jpg").write_bytes(b"content")
    (tmp_path / "set" / "linked").symlink_to(tmp_path / "disk")
    manifest = Manifest.from_faces("x", str(tmp_path / "set"), [replace(face(0, 0), path="linked/x.jpg")])
    assert manifest.fetch(0) == b"content"
