"""Imports point one way: jobs → pipeline → cafe; and each engine has its one door."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FORBIDDEN = {
    "cafe": {"pipeline", "jobs", "ray", "zarr", "mlflow", "click"},
    "pipeline": {"jobs", "click"},
    "jobs": {"ray", "zarr", "mlflow"},
}
DOORS = {"zarr": "pipeline/features/store.py", "mlflow": "pipeline/tracking/mirror.py"}


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
