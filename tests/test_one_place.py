"""A field of the key is one line, a class set none: both are then in every option, file, table and identity they belong to.

A metric, the third of the kind, is in test_metrics. The choices that settings list are compared with what there is.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import pyarrow.parquet as pq
from conftest import draw_faces

from cafe.pipeline.settings import FeatureIdentity, Normalisation, Policy
from cafe.results.protocols import OPTIONS, PROTOCOLS, ProtocolName, TestTime
from cafe.towers.facts import NORMALISATIONS
from cafe.views.drawing import INTERPOLATIONS, POLICIES

ROOT = Path(__file__).parents[1]
FIELD = '    sharpening: float = setting(0.0, "How much faces are sharpened before they are resized.")\n'
NEXT = "\n--- the next command ---\n"
ASK = f"""
import json, sys
from cafe.jobs.cli import main
for number, words in enumerate(json.loads(sys.argv[1])):
    print(end={NEXT!r} * bool(number), flush=True)
    try:
        main(words)
    except SystemExit as ended:
        if ended.code:
            raise
"""


def test_the_choices_of_settings_are_those_there_are() -> None:
    assert set(get_args(Policy)) == set(POLICIES)
    assert set(get_args(Normalisation)) == {"tower", *NORMALISATIONS}
    assert set(get_args(get_type_hints(FeatureIdentity)["interpolation"])) == set(INTERPOLATIONS)
    assert set(get_args(ProtocolName)) == set(PROTOCOLS)
    assert set(get_args(TestTime)) == set(OPTIONS)


def test_no_check_is_an_assert_which_python_leaves_out_with_an_option() -> None:
    """One that only names a thing, or says that it is there or of a class, tells a type checker what is known already."""
    checks = [
        f"{file}:{node.lineno}: {ast.unparse(node)}"
        for folder in ("cafe", "pipeline", "jobs")
        for file in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Assert) and not _narrows(node.test)
    ]
    assert checks == []


def _narrows(test: ast.expr) -> bool:
    match test:
        case ast.Compare(left=ast.Name() | ast.Attribute(), ops=[ast.IsNot()], comparators=[ast.Constant(value=None)]):
            return True
    return False


def test_a_field_of_the_key_and_a_class_set_are_everywhere(tmp_path: Path, tiny_tower: str) -> None:
    package, work = tmp_path / "changed" / "cafe", tmp_path / "work"
    shutil.copytree(ROOT / "cafe", package, ignore=shutil.ignore_patterns("__pycache__"))  # what is linked as files
    settings = package / "pipeline" / "settings.py"
    head, place, rest = settings.read_text().partition('    """What a user chooses that decides a feature')
    first = rest.index("\n\n") + 2
    settings.write_text(head + place + rest[:first] + FIELD + rest[first:])

    draw_faces(tmp_path / "faces", per_class=12)
    classes = ["sadness", "happiness", "anger"]
    faces = (str(tmp_path / "faces"), "--name", "three", "--expressions", ",".join(classes))
    commands = (
        ("extract", "--help"),
        ("data", "index", "folder", *faces),
        ("extract", "three", "--backbone", tiny_tower, "--sharpening", "0.5"),
        ("train", "--source", "three", "--method", "linear_probe", "--epochs", "2", "--cpu"),
        ("compare", "--per-class", "three"),
    )
    asked = json.dumps([("-w", str(work), *command) for command in commands])
    environment = {**os.environ, "PYTHONPATH": str(package.parent), "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, "-c", ASK, asked], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    helped, indexed, _, _, recalls = done.stdout.split(NEXT)
    assert "--sharpening" in helped
    assert all(name in indexed for name in classes)
    assert "neutral" not in indexed
    (store,) = (work / "features" / "three").iterdir()
    assert json.loads((store / "about.json").read_text())["key"]["sharpening"] == 0.5
    (run,) = (work / "runs").iterdir()
    record = json.loads((run / "run.json").read_text())
    assert record["spec"]["features"]["sharpening"] == 0.5
    assert record["classes"] == record["spec"]["classes"] == classes
    assert record["settings"]["classes"] == "sadness, happiness, anger"
    table = pq.read_table(run / "predictions" / "three.parquet")
    assert json.loads(table.schema.metadata[b"expressions"]) == classes
    assert table["probabilities"].type.list_size == 3
    assert set(table["label"].to_pylist()) == {0, 1, 2}
    assert all(name in recalls for name in classes)
    assert "neutral" not in recalls
