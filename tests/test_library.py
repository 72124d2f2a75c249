"""`import cafe` is a small typed library: its examples are true, and it loads nothing before it is asked."""

from __future__ import annotations

import doctest
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pandas as pd
import pytest
from conftest import complaint, draw_faces
from PIL import Image
from trained import fill_store, train_run
from upath import UPath

import cafe
from cafe.data.indexing import index_files
from cafe.data.readers import DATASETS
from cafe.pipeline.release import library, prediction
from cafe.pipeline.settings import ExtractSettings
from cafe.pipeline.workspace import Workspace


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, tiny_tower: str) -> str:
    """Two domains with features of the tiny tower, and CAFE trained on one of them and evaluated on the other."""
    workspace = Workspace.at(str(tmp_path_factory.mktemp("work")))
    for name, tint in (("one", 0), ("two", 30)):
        root = UPath(draw_faces(Path(str(workspace.root)) / "faces" / name, per_class=16, tint=tint))
        index_files(name, DATASETS["folder"](root)).manifest.save(workspace.manifest_path(name))
        fill_store(workspace, name, ExtractSettings(backbone=tiny_tower, views=2, maps=True))
    train_run(workspace, source="one", targets="two", method="cafe", epochs=1, overrides=("batch_size=20",))
    return str(workspace.root)


@pytest.mark.parametrize(
    "name", ["load_manifest", "load_store", "load_model", "predict", "scores", "extract", "train", "compare"]
)
def test_the_examples_of_the_library_are_true(name: str, workspace: str, tiny_tower: str) -> None:
    (example,) = doctest.DocTestFinder().find(
        getattr(cafe, name),
        name,
        globs={**vars(prediction), **vars(library), "workspace": workspace, "tower": tiny_tower},
    )
    assert example.examples
    said: list[str] = []
    results = doctest.DocTestRunner().run(example, out=said.append)
    assert results.failed == 0, "".join(said)


def test_importing_it_loads_no_heavy_library_and_what_it_offers_is_in_its_types() -> None:
    code = "import sys, cafe; print(sorted({'torch', 'ray', 'zarr', 'mlflow', 'pandas', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
    typed = re.findall(
        r"^from (\S+) import (\w+) as \w+$", Path(cafe.__file__).with_suffix(".pyi").read_text(), re.MULTILINE
    )
    assert {name: module for module, name in typed} == cafe.OFFERED
    for name in cafe.__all__:
        assert getattr(cafe, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        getattr(cafe, "nothing")  # noqa: B009


@contextmanager
def serve(folder: Path) -> Iterator[str]:
    """Yield the address at which this machine serves the files of a folder."""
    handler = partial(SimpleHTTPRequestHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_photos_are_predicted_by_path_by_address_and_as_pixels_in_one_list(workspace: str, tmp_path: Path) -> None:
    manifest = cafe.load_manifest("two", workspace)
    faces = [manifest.read_face(row) for row in range(4)]
    for number, face in enumerate(faces[:2]):
        Image.fromarray(face).save(tmp_path / f"{number}.png")
    torn = Image.new("F", (9, 9))
    with serve(tmp_path) as address:
        what = [tmp_path / "0.png", f"{address}/1.png", faces[2], Image.fromarray(faces[3]), torn]
        rows = cafe.predict(what, "cafe-one-s0", workspace, aligned=True)
        (missing,) = cafe.predict(f"{address}/2.png", "cafe-one-s0", workspace, aligned=True)
        assert (missing["expression"], missing["error"]) == (None, "file not found")
    (away,) = cafe.predict(f"{address}/1.png", "cafe-one-s0", workspace, aligned=True)  # no server is there any more
    assert (away["expression"], away["error"].partition(" (")[0]) == (None, f"{address}/1.png cannot be read")
    assert [row["file"] for row in rows] == [str(tmp_path / "0.png"), f"{address}/1.png", "2", "3", "4"]
    model = cafe.load_model("cafe-one-s0", workspace)
    table = pd.DataFrame(rows)
    np.testing.assert_allclose(table.loc[:3, list(model.classes)].astype(float), model.predict(faces), atol=1e-6)
    assert table.loc[4, "error"] == "floating-point pixels have no defined brightness"
    assert [row["expression"] for row in cafe.predict(faces[2], model, aligned=True)] == [rows[2]["expression"]]
    assert cafe.predict([], model, aligned=True) == []


def test_what_is_no_picture_is_one_sentence(workspace: str) -> None:
    for what, said in (
        (3, "the type int is neither"),
        (b"ab", "the type bytes is neither"),
        (np.zeros((4, 4)), "(H, W, 3) uint8"),
        ("nothing.jpg", "There is no file"),
    ):
        assert said in complaint(cafe.predict, what, "cafe-one-s0", workspace)


def test_a_store_that_is_not_there_is_named_with_those_that_are(workspace: str) -> None:
    assert "Unknown feature store of 'two' 'x': choose open-clip-" in complaint(
        library.load_store, "two", workspace, "x"
    )
    assert "Unknown manifest 'three'" in complaint(library.load_store, "three", workspace)
    assert "Unknown experiment 'other': choose cafe" in complaint(library.scores, workspace, "other")
    assert len(cafe.scores(workspace, "cafe")) == 1


def test_settings_that_are_not_there_or_have_no_such_value_are_one_sentence(workspace: str) -> None:
    for function, settings, said in (
        (cafe.train, {"epoch": 3}, "Unknown setting of cafe.train 'epoch': choose "),
        (cafe.train, {"epochs": "many"}, "cafe.train: epochs='many': input should be a valid integer"),
        (cafe.extract, {"precision": "fp8"}, "cafe.extract: precision='fp8': input should be 'fp32', 'tf32', 'bf16'"),
        (
            cafe.compare,
            {"against": "cafe"},
            "Unknown setting of cafe.compare 'against': choose ",
        ),
    ):
        assert said in complaint(partial(function, "one", workspace=workspace, **settings))


def test_what_is_offered_shows_itself_in_a_line(workspace: str) -> None:
    assert repr(cafe.load_manifest("two", workspace)) == "<Manifest two: 48 faces of 7 classes, folder>"
    assert re.fullmatch(r"<FeatureStore of two: 48 faces, 2 views × 24 .*>", repr(cafe.load_store("two", workspace)))
    assert re.fullmatch(r"<Model cafe-one-s0-\w+: 7 classes, on cpu>", repr(cafe.load_model("cafe-one-s0", workspace)))
    assert cafe.EXPRESSIONS[0] == "surprise"
