"""Records, benchmark files and predictions of any content are read, or are one sentence; never a traceback."""

from __future__ import annotations

import io
import json
import math
import os
import time
import tomllib
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from conftest import complaint, draw_faces
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from runs import write_predictions, write_run
from test_store import MANIFEST, features, filled
from upath import UPath

from cafe import seals
from cafe.data.expressions import EXPRESSIONS
from cafe.data.indexing import index_files
from cafe.data.manifest import Manifest
from cafe.data.readers import DATASETS, cells
from cafe.errors import StorageError
from cafe.files import check_output, place_below, read_file, read_json
from cafe.inference.frames import find_files, read_frames
from cafe.inference.output import FORMATS, build_schema
from cafe.pipeline.benchmark.file import parse_benchmark, read_benchmark
from cafe.pipeline.features.integrity import find_stores
from cafe.pipeline.features.store import FeatureStore, verify
from cafe.pipeline.runs import RunSpec, check_identity, read_status
from cafe.pipeline.workspace import Workspace, check_name
from cafe.plugins import load_plugins
from cafe.results.comparison import name_rows
from cafe.results.predictions import Predictions
from cafe.results.runs import read_run
from cafe.results.scores import read_scores
from cafe.seals import read_sealed, verify_file, write_sealed
from cafe.threads import map_threads
from cafe.towers.face import read_face_weights
from cafe.towers.names import parse_backbone

OFTEN = settings(
    max_examples=100, derandomize=True, database=None, deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
VALUE = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(("../..", "=1", "\0")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
TEXT = st.binary(max_size=30) | VALUE.map(lambda value: json.dumps(value).encode()) | st.just(b"[" * 100_000)
PICK = st.lists(st.integers(0, 1000), min_size=1, max_size=4)
GRID = (Path(__file__).parents[1] / "jobs" / "benchmarks" / "demo.toml").read_text()
SPEC = RunSpec(
    method="cafe", source="raf", source_digest="0", recipe={"epochs": 1}, recipe_changes={}, image_size=64, policy="paper",
    views=2, mean=(0.5,) * 3, std=(0.5,) * 3,
)  # fmt: skip


def put(record: Any, steps: list[int], value: Any) -> Any:
    """Return a record with the value somewhere in it, found by these steps."""
    if not steps or not isinstance(record, dict | list) or not record:
        return value
    keys = list(record) if isinstance(record, dict) else list(range(len(record)))
    key, changed = keys[steps[0] % len(keys)], deepcopy(record)
    changed[key] = put(record[key], steps[1:], value)
    return changed


@OFTEN
@given(steps=PICK, value=VALUE, text=st.none() | TEXT)
def test_a_receipt_of_any_content(tmp_path: Path, steps: list[int], value: Any, text: bytes | None) -> None:
    path = tmp_path / "whole"
    store = FeatureStore(*find_stores(UPath(tmp_path), "whole")[0]) if path.exists() else filled(path)
    store.write_shard(1, features(1, store), {5: "file is empty"})
    whole = read_json(store.receipts.path(1))
    store.receipts.path(1).write_bytes(json.dumps(put(whole, steps, value)).encode() if text is None else text)
    complaint(store.receipts.skipped_paths, MANIFEST)
    complaint(store.read_view, "pooled", 0)
    complaint(store.receipts.discard_skipped)
    assert isinstance(verify(store.path), list)


@OFTEN
@given(steps=PICK, value=VALUE, text=st.none() | TEXT)
def test_a_description_of_a_store_of_any_content(
    tmp_path: Path, steps: list[int], value: Any, text: bytes | None
) -> None:
    path = tmp_path / "whole"
    place = path / "about.json" if path.exists() else filled(tmp_path / "made").path / "about.json"
    if not path.exists():
        path.mkdir()
        (tmp_path / "about").write_bytes(place.read_bytes())
    whole = json.loads((tmp_path / "about").read_text())
    folder = tmp_path / "stores" / "news" / "one"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "about.json").write_bytes(json.dumps(put(whole, steps, value)).encode() if text is None else text)
    complaint(find_stores, UPath(tmp_path / "stores"), "news")


def test_a_folder_in_the_place_of_a_record_is_damage_that_is_named_and_stops_no_list(tmp_path: Path) -> None:
    workspace = Workspace.at(str(tmp_path / "work"))
    whole, other = write_run(workspace), write_run(workspace, seed=1)
    (other / "run.json").unlink()
    (other / "run.json").mkdir()
    assert [run.folder for run in workspace.read_runs()] == [whole]
    assert "run.json is damaged" in complaint(read_run, other)
    assert verify_file(other / "run.json") == "damaged"
    store = filled(tmp_path / "store")
    (store.path / "about.json").unlink()
    (store.path / "about.json").mkdir()
    assert any(damage.file == "about.json" for damage in verify(store.path))


@OFTEN
@given(steps=PICK, value=VALUE, text=st.none() | TEXT)
def test_records_of_a_run_of_any_content(tmp_path: Path, steps: list[int], value: Any, text: bytes | None) -> None:
    run = write_run(Workspace.at(str(tmp_path)))
    whole = {**(read_json(run / "run.json") or {}), "spec": asdict(SPEC)}
    content = json.dumps(put(whole, steps, value)).encode() if text is None else text
    (run / "run.json").write_bytes(content)
    complaint(RunSpec.load, run)
    if not complaint(read_run, run) and (found := read_run(run)):  # what is read can be compared
        if not (run / "predictions").exists():
            write_predictions(run, "fer", np.arange(7), np.arange(7))
        complaint(read_scores, [found])
        assert len(name_rows([[found], [found]])) == 2
    (run / "status.json").write_bytes(content)
    read_status(run)


def test_a_record_of_a_run_whose_parts_contradict_each_other_is_none(tmp_path: Path) -> None:
    """What is said of a run beside its specification decides where it stands in tables, and the latter its name."""
    run = Workspace.at(str(tmp_path)).run_path(SPEC.name)
    SPEC.save(run)
    whole = read_sealed(run / "run.json") or {}
    assert complaint(check_identity, run) == ""
    beside = {
        "name": "x", "group": "x", "fold": "sfew", "source": "sfew", "source_kind": "sfew", "source_digest": "1",
        "sources": [{"name": "sfew", "kind": "sfew", "digest": "1"}], "seed": 1, "classes": ["a", "b"], "method": "scn",
        "settings": {**whole["settings"], "tag": "best"},
    }  # fmt: skip
    wrong = [{**whole, name: value} for name, value in beside.items()]
    for name, value in whole["spec"].items():  # of those two nothing else is said
        if name not in ("recipe", "grid"):
            other = not value if isinstance(value, bool) else 1 + value if isinstance(value, int) else f"{value}x"
            wrong.append({**whole, "spec": {**whole["spec"], name: other}})
    wrong.append({**whole, "spec": {**whole["spec"], "sources": beside["sources"] * 2, "fold": "sfew"}})
    for record in wrong:
        write_sealed(run / "run.json", record)
        assert complaint(check_identity, run), record


@OFTEN
@given(steps=PICK, value=VALUE, place=st.integers(0, len(GRID)), text=st.text(max_size=5))
def test_a_benchmark_of_any_content(tmp_path: Path, steps: list[int], value: Any, place: int, text: str) -> None:
    complaint(parse_benchmark, "grid", put(tomllib.loads(GRID), steps, value))
    (tmp_path / "grid.toml").write_bytes((GRID[:place] + text + GRID[place:]).encode("utf-8", "surrogatepass"))
    complaint(read_benchmark, tmp_path / "grid.toml")


@OFTEN
@given(place=st.integers(0, 5000), values=st.binary(min_size=1, max_size=40), cut=st.booleans())
def test_predictions_of_other_bytes_are_one_sentence(tmp_path: Path, place: int, values: bytes, cut: bool) -> None:
    path = UPath(tmp_path / "cinema.parquet")
    Predictions([f"{n}.jpg" for n in range(9)], np.arange(9) % 7, np.full((9, 7), 1 / 7), {"manifest": "x"}).save(path)
    whole = path.read_bytes()
    data = bytearray(whole)
    place %= len(data)
    data[place : None if cut else place + len(values)] = values
    path.write_bytes(bytes(data))
    changed = bytes(data) != whole
    for named in (True, False):
        assert bool(complaint(Predictions.load, path, named)) == changed


@pytest.mark.parametrize("text", ["5", "[1]", "null", "[" * 100_000, "1" * 10_000, "{", '"\\ud800"', ""])
def test_what_is_no_record_counts_as_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    assert read_json(UPath(tmp_path / "x.json")) is None
    (tmp_path / "x.json").write_text(json.dumps({"a": math.pi}))
    assert read_json(UPath(tmp_path / "x.json")) == {"a": math.pi}


# --- what would never end, or fill the memory -------------------------------------------------------------------------


def test_a_pipe_and_a_device_are_no_pictures(tmp_path: Path) -> None:
    faces = draw_faces(tmp_path / "faces", per_class=2)
    os.mkfifo(faces / "anger" / "pipe.jpg")
    (faces / "anger" / "endless.jpg").symlink_to("/dev/zero")
    indexed = index_files("odd", DATASETS["folder"](UPath(faces)))
    assert dict(indexed.broken) == {
        f"anger/{name}.jpg": "is a pipe or a device, not a file" for name in ("endless", "pipe")
    }
    assert len(indexed.manifest) == 6
    os.mkfifo(tmp_path / "labels.csv")
    assert "is a pipe or a device" in complaint(read_file, UPath(tmp_path / "labels.csv"))


def test_nothing_opens_a_pipe(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.json"
    os.mkfifo(pipe)
    place = UPath(pipe)
    os.mkfifo(tmp_path / "pipe.mp4")
    (frame,) = read_frames([UPath(tmp_path / "pipe.mp4")], 5.0)
    assert frame.error == "is a pipe or a device, not a file"
    said = [
        complaint(read_benchmark, pipe),
        complaint(load_plugins, [str(pipe)]),
        complaint(read_face_weights, str(pipe)),
        complaint(parse_backbone, f"open_clip:{pipe}@{__file__}"),
        complaint(read_sealed, place),
        complaint(Manifest.load, place),
    ]
    assert said == [f"{pipe} is a pipe or a device: give a file."] * len(said)
    assert verify_file(place) == "damaged"


def test_a_record_or_an_annotation_of_any_size_is_not_read(tmp_path: Path) -> None:
    record = tmp_path / "run.json"
    with record.open("wb") as file:
        file.truncate(2**40)  # takes no room on the disk
    for read in (read_json, read_sealed, read_benchmark):
        assert "more than the 268,435,456 that a file of its kind may have" in complaint(read, UPath(record))
    for kind in ("images", "annotations"):
        (tmp_path / "train_set" / kind).mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "train_set" / "images" / "0.png")
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<i8", "fortran_order": False, "shape": (2**50,)})
    (tmp_path / "train_set" / "annotations" / "0_exp.npy").write_bytes(header.getvalue())
    listing = DATASETS["affectnet"](UPath(tmp_path))
    assert [where for where, *_ in listing.rejected] == ["train_set/images/0.png"]


def test_a_small_manifest_cannot_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seals, "MOST_BYTES", 2**23)
    path = UPath(tmp_path / "news.parquet")
    repeated = pa.DictionaryArray.from_arrays(np.zeros(4000, np.int32), ["x" * 4000])
    for values in (repeated, ["\0" * 2**24]):  # each twice what is allowed: by one value in all rows, by a long one
        pq.write_table(pa.table({"sample_id": values}), path, compression="zstd")
        assert path.stat().st_size < 2e4
        assert "holds more than 0 GB of values" in complaint(Manifest.load, path)


def test_names_that_are_no_utf8_are_left_out_or_one_sentence(tmp_path: Path) -> None:
    faces = draw_faces(tmp_path / "faces", per_class=2)
    (faces / "anger" / "000.jpg").rename(os.fsdecode(bytes(faces / "anger") + b"/caf\xe9.jpg"))
    indexed = index_files("odd", DATASETS["folder"](UPath(faces)))
    assert indexed.broken == [("anger/caf\udce9.jpg", "a name that is no UTF-8")]
    assert len(indexed.manifest) == 5
    odd = faces.rename(os.fsdecode(bytes(tmp_path) + b"/\xff"))
    assert "no table or record can hold it: rename it" in complaint(index_files, "x", DATASETS["folder"](UPath(odd)))
    assert "no table or record can hold it" in complaint(Workspace.at, str(odd))
    forms = {name: io.BytesIO() for name in FORMATS}
    for name, file in forms.items():
        with FORMATS[name](file, EXPRESSIONS) as write:
            write([dict.fromkeys(build_schema(EXPRESSIONS).names) | {"file": "caf\udce9"}])
    assert pq.read_table(forms["parquet"])["file"].to_pylist() == [r"caf\udce9"]
    for name in ("table", "csv", "jsonl"):
        assert r"caf\udce9" in forms[name].getvalue().decode()


def test_a_file_by_two_paths_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(draw_faces(tmp_path, per_class=1))
    whole = str(tmp_path / "anger" / "000.jpg")
    found = find_files(["anger/000.jpg", whole, "./anger"])
    assert ([str(file) for file in found.files], found.others) == (["anger/000.jpg"], {})
    Path("t.csv").write_text(f"path,label\nanger/000.jpg,anger\n{whole},Angry\n")
    assert len(DATASETS["table"](UPath(tmp_path / "t.csv")).files) == 1


def test_names_that_no_file_could_have_are_one_sentence(tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    assert "cannot be written (Too many levels of symbolic links)" in complaint(check_output, str(loop), "--output")
    assert place_below(UPath(tmp_path), "loop") == UPath(loop)  # whoever opens it says what it is
    assert "(File name too long)" in complaint(check_output, "x" * 300, "--output")
    assert "has 101 characters: take at most 100" in complaint(check_name, "x" * 101)
    assert complaint(check_name, "x" * 100) == ""


def test_links_that_fan_out_are_not_followed_without_end(tmp_path: Path) -> None:
    for level in range(40):
        (tmp_path / str(level)).mkdir()
        for name in "ab":
            (tmp_path / str(level) / name).symlink_to(tmp_path / str(level + 1))
    (tmp_path / "40" / "anger").mkdir(parents=True)
    assert "is reached by more than 100 links" in complaint(DATASETS["folder"], UPath(tmp_path / "0"))


@pytest.mark.parametrize("stored", [True, False])
def test_a_small_table_cannot_fill_the_memory(stored: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells, "MOST_BYTES", 2**26)
    column = pa.DictionaryArray.from_arrays(np.zeros(100_000, np.int32), ["x" * 40_000])  # 4 GB of text
    pq.write_table(pa.table({"path": column, "label": column}), tmp_path / "labels.parquet", store_schema=stored)
    assert (tmp_path / "labels.parquet").stat().st_size < 1e6
    said = complaint(DATASETS["table"], UPath(tmp_path / "labels.parquet"))
    assert "holds more than 0 GB of values: write it again without what is not needed." in said
    monkeypatch.setattr(seals, "MOST_BYTES", 2**26)
    monkeypatch.setattr(seals, "MOST_TIMES", 1)
    assert verify_file(UPath(tmp_path / "labels.parquet")) == "damaged"


def test_results_that_are_made_ahead_are_few(tmp_path: Path) -> None:
    made = list[int]()
    results = map_threads(lambda item: made.append(item), range(100), at_once=1, ahead=8)
    next(results)
    time.sleep(0.1)
    assert len(made) <= 8
    assert len(list(results)) == 99


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_a_table_that_cannot_be_put_aside_is_neither_left_out_nor_called_damaged(
    ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else its pictures would be labelled by their folders."""
    folder = draw_faces(tmp_path / "set", per_class=1)
    table = pa.table({"file_name": ["anger/000.jpg"] * 20, "label": ["happiness"] * 20})
    (pq.write_table if ending == "parquet" else pyarrow.csv.write_csv)(table, folder / f"metadata.{ending}")
    monkeypatch.setattr("cafe.spool.AT_ONCE", 10)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    with pytest.raises(StorageError, match=f"^{tmp_path / 'none'} cannot be written .*: make room there"):
        DATASETS["folder"](UPath(folder))
