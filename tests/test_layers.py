"""Imports point one way: jobs → pipeline → cafe; each engine has its one door; and nothing grows too large to be read."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FORBIDDEN = {
    "cafe": {"pipeline", "jobs", "ray", "zarr", "mlflow", "click"},
    "pipeline": {"jobs", "click"},
    "jobs": {"ray", "zarr", "mlflow"},
}
DOORS = {"zarr": "pipeline/features/store.py", "mlflow": "pipeline/tracking/mirror.py"}
MOST_MODULES, MOST_LINES, LONGEST_FUNCTION = 14, 350, 39


def list_modules() -> list[Path]:
    return sorted(path for layer in FORBIDDEN for path in (ROOT / layer).rglob("*.py"))


def list_functions(path: Path) -> Iterator[tuple[str, int]]:
    """Yield the functions of a file with their lines."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno
            yield node.name, node.end_lineno - node.lineno + 1


def imported(path: Path) -> set[str]:
    """The top-level packages a file imports anywhere."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.partition(".")[0])
    return names


@pytest.mark.parametrize("layer", FORBIDDEN)
def test_a_layer_imports_nothing_above_it(layer: str) -> None:
    files = sorted((ROOT / layer).rglob("*.py"))
    assert files
    for path in files:
        assert not imported(path) & FORBIDDEN[layer], path


@pytest.mark.parametrize(("engine", "door"), DOORS.items())
def test_an_engine_is_imported_by_its_door_alone(engine: str, door: str) -> None:
    importers = {str(path.relative_to(ROOT)) for path in (ROOT / "pipeline").rglob("*.py") if engine in imported(path)}
    assert importers == {door}


def test_folders_files_and_functions_stay_small_enough_to_be_read() -> None:
    modules = list_modules()
    assert [folder for folder, count in Counter(path.parent for path in modules).items() if count > MOST_MODULES] == []
    assert [path for path in modules if len(path.read_text().splitlines()) > MOST_LINES] == []
    long = [(path, name) for path in modules for name, lines in list_functions(path) if lines > LONGEST_FUNCTION]
    assert long == []
