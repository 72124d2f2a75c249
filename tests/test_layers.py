"""Imports point one way, through the packages in the order that `cafe/__init__.py` lists; each engine has its one door."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import cafe

ROOT = Path(__file__).parents[1]
FOLDERS = {"cafe": ROOT / "cafe", "cafe.pipeline": ROOT / "pipeline", "cafe.jobs": ROOT / "jobs"}
FORBIDDEN = {
    "cafe": {"cafe.pipeline", "cafe.jobs", "ray", "zarr", "mlflow", "click"},
    "cafe.pipeline": {"cafe.jobs", "click"},
    "cafe.jobs": {"ray", "zarr", "mlflow"},
}
DOORS = {"zarr": "pipeline/features/store.py", "mlflow": "pipeline/tracking/mirror.py"}
# Packages, the upper first, each of which imports those below it alone: cafe/__init__.py, which also says what they are.
ORDER = re.findall(r"^(\w+)  +\w", cafe.__doc__ or "", re.MULTILINE)
MOST_MODULES, MOST_LINES, LONGEST_FUNCTION = 14, 500, 60


@cache
def list_modules() -> dict[str, Path]:
    """Every module of ours by its import name; a package by that of its folder."""
    modules = {}
    for package, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            below = path.relative_to(folder).with_suffix("")
            parts = [part for part in below.parts if part != "__init__"]
            modules[".".join([package, *parts])] = path
    return modules


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@cache
def imported(path: Path) -> set[str]:
    """Everything a file imports anywhere, for whatever purpose: modules, and names that may be modules."""
    names: set[str] = set()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def find_modules(path: Path) -> set[str]:
    """The modules of ours that a file imports: of `from package import module` the module alone."""
    found = imported(path) & list_modules().keys()
    named = {
        node.module
        for node in ast.walk(parse(path))
        if isinstance(node, ast.ImportFrom)
        and node.module
        and all(f"{node.module}.{alias.name}" in list_modules() for alias in node.names)
    }
    return found - named


def imports(path: Path, package: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for name in imported(path))


def layer_of(name: str) -> str:
    return next(layer for layer in ("cafe.jobs", "cafe.pipeline", "cafe") if f"{name}.".startswith(f"{layer}."))


def list_functions(path: Path) -> Iterator[tuple[str, int]]:
    """Yield the functions of a file with their lines."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno
            yield node.name, node.end_lineno - node.lineno + 1


@pytest.mark.parametrize("layer", FORBIDDEN)
def test_a_layer_imports_nothing_above_it(layer: str) -> None:
    own = [path for name, path in list_modules().items() if layer_of(name) == layer]
    assert own
    assert [(path, name) for path in own for name in FORBIDDEN[layer] if imports(path, name)] == []


def test_packages_of_cafe_import_in_the_one_order_that_is_listed() -> None:
    assert sorted(ORDER) == sorted(path.name for path in (ROOT / "cafe").iterdir() if (path / "__init__.py").exists())
    wrong = []
    for name, path in list_modules().items():
        package = name.split(".")[1] if "." in name else ""
        if layer_of(name) == "cafe" and package:
            above = ORDER[: ORDER.index(package)] if package in ORDER else ORDER
            wrong += [(name, other) for other in above if imports(path, f"cafe.{other}")]
    assert wrong == []


def test_no_module_imports_itself_through_others() -> None:
    modules = list_modules()
    graph = {
        name: find_modules(path)
        for name, path in modules.items()
        if name != "cafe"  # it offers what the engine has, when it is asked for
    }
    TopologicalSorter(graph).prepare()  # raises where there is a circle


@pytest.mark.parametrize(("engine", "door"), DOORS.items())
def test_an_engine_is_imported_by_its_door_alone(engine: str, door: str) -> None:
    importers = {
        str(path.relative_to(ROOT))
        for name, path in list_modules().items()
        if layer_of(name) == "cafe.pipeline" and imports(path, engine)
    }
    assert importers == {door}


def test_what_starts_slowly_is_imported_by_what_needs_it() -> None:
    """Each takes as long to import as torch does, and most commands need none of them."""
    slow = {"torchvision", "timm", "open_clip", "mlflow", "ray"}
    early = [
        (name, ast.unparse(node))
        for name, path in list_modules().items()
        for node in parse(path).body
        if isinstance(node, ast.Import | ast.ImportFrom) and re.split(r"[ .]", ast.unparse(node))[1] in slow
    ]
    assert early == []


def joins_a_name(node: ast.AST) -> bool:
    """Whether a path is joined with a text that holds more than numbers, or with a name that an object has of itself."""
    if not isinstance(node, ast.BinOp) or not isinstance(node.op, ast.Div):
        return False
    if isinstance(node.right, ast.JoinedStr):
        parts = [part for part in node.right.values if isinstance(part, ast.FormattedValue)]
        return not all(part.format_spec and ast.unparse(part.format_spec).rstrip("'\"").endswith("d") for part in parts)
    return isinstance(node.right, ast.Attribute) and node.right.attr in ("name", "title", "manifest", "source", "path")


def test_names_become_paths_in_one_place() -> None:
    """`place_below` and `find_below`: a name may hold `..`, and files from others bring names."""
    joined = [
        f"{name}: {ast.unparse(node)}"
        for name, path in list_modules().items()
        for node in ast.walk(parse(path))
        if joins_a_name(node)
    ]
    assert joined == []


def test_no_two_classes_share_a_name() -> None:
    classes = Counter(
        node.name
        for path in list_modules().values()
        for node in ast.walk(parse(path))
        if isinstance(node, ast.ClassDef)
    )
    assert {name for name, count in classes.items() if count > 1} <= {"Recipe"}  # each method has its own


def test_what_is_installed_claims_one_name() -> None:
    """Imports by the names of the folders would take whatever `pipeline` or `jobs` a user has beside the program."""
    folders = [*FOLDERS.values(), ROOT / "tests", ROOT / "measurements"]
    paths = [path for folder in folders for path in folder.rglob("*.py")]
    assert [path for path in paths if imports(path, "pipeline") or imports(path, "jobs")] == []


def test_folders_files_and_functions_stay_small_enough_to_be_read() -> None:
    paths = list(list_modules().values())
    assert [folder for folder, count in Counter(path.parent for path in paths).items() if count > MOST_MODULES] == []
    assert [path for path in paths if len(path.read_text().splitlines()) > MOST_LINES] == []
    long = [(path, name) for path in paths for name, lines in list_functions(path) if lines > LONGEST_FUNCTION]
    assert long == []
