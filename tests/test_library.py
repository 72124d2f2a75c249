"""`import cafe` is a small typed library: its examples are true, and it loads nothing before it is asked."""

from __future__ import annotations

import doctest
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import complaint, draw_faces
from trained import fill_store, train_run
from upath import UPath

import cafe
from cafe.data.indexing import index_files
from cafe.data.readers import DATASETS
from cafe.pipeline.release import library
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


@pytest.mark.parametrize("name", ["load_manifest", "load_store", "load_model", "scores"])
def test_the_examples_of_the_library_are_true(name: str, workspace: str) -> None:
    (example,) = doctest.DocTestFinder().find(
        getattr(cafe, name), name, globs={**vars(library), "workspace": workspace}
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


def test_a_store_that_is_not_there_is_named_with_those_that_are(workspace: str) -> None:
    assert "Unknown feature store of 'two' 'x': choose open-clip-" in complaint(
        library.load_store, "two", workspace, "x"
    )
    assert "Unknown manifest 'three'" in complaint(library.load_store, "three", workspace)
    assert "Unknown experiment 'other': choose cafe" in complaint(library.scores, workspace, "other")
    assert len(cafe.scores(workspace, "cafe")) == 1
