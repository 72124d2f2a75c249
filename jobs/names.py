"""The names a command line may hold: completed by shells, and suggested for those that are not there.

A shell waits for an answer, so nothing is imported that takes a second: names of a workspace are those of its files, and
names of this package stand in its source, which is read as text.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

import cafe

NAMED = {"run": "runs/*/run.json", "manifest": "manifests/*.parquet", "experiment": "runs/*/experiments/*.json"}
LISTED = {  # the dicts of this package that list what there is, and the entry points of plug-ins beside them, if any
    "metric": ("cafe.results.metrics", "METRICS", ""),
    "method": ("cafe.methods", "METHODS", "cafe.methods"),
    "tower": ("cafe.towers.names", "BACKBONES", "cafe.towers"),
    "network": ("cafe.networks.branches", "NETWORKS", "cafe.networks"),
}
COLUMN = "column"  # of manifests, by which faces can be parted
# What other programs call a setting of the recipe, and other options.
SETTINGS = {
    "lr": "learning_rate",
    "wd": "weight_decay",
    "bs": "batch_size",
    "optim": "optimizer",
    "optimiser": "optimizer",
}
OPTIONS = {
    "--dataset": "--source", "--data": "--source", "--device": "--gpu or --cpu", "--workers": "--num-workers",
    "--amp": "--precision bf16", "--fp16": "--precision bf16", "--model": "--method or --backbone",
    "--pretrained": "--init", "--resume": "the same command again, which goes on where it was",
}  # fmt: skip


def complete(*kinds: str) -> Callable[[click.Context, click.Parameter, str], list[str]]:
    """Return what completes names of such kinds, of `NAMED`, `LISTED` or `COLUMN`; of several with commas, the last."""

    def find(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[str]:
        before, comma, begun = incomplete.rpartition(",")
        names = {name for kind in kinds for name in list_names(kind, ctx)}
        return sorted(before + comma + name for name in names if name.startswith(begun))

    return find


def complete_or_file(*kinds: str) -> Callable[[click.Context, click.Parameter, str], list[CompletionItem]]:
    """Return what completes such names and, where none begins so, the names of files."""
    find = complete(*kinds)

    def find_any(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
        names = [CompletionItem(name) for name in find(ctx, parameter, incomplete)] if incomplete else []
        return names or [CompletionItem(incomplete, type="file")]

    return find_any


def complete_setting(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[str]:
    """Return the settings of the recipe of the command's method, as `--set` takes them."""
    keys = list_settings(ctx.params.get("method") or "cafe")
    return [f"{key}=" for key in keys if key.startswith(incomplete)]


def list_names(kind: str, ctx: click.Context) -> set[str]:
    """Return the names of a kind there are: in a workspace on this machine, or in this package and its plug-ins."""
    if kind in LISTED:
        module, name, group = LISTED[kind]
        return {*read_dict(module, name), *(entry.name for entry in (entry_points(group=group) if group else ()))}
    root = Path(ctx.find_root().params.get("workspace") or "work").expanduser()
    if kind == COLUMN:
        return {*list_columns(root)}
    return {path.parent.name if path.name == "run.json" else path.stem for path in root.glob(NAMED[kind])}


def list_columns(root: Path) -> Iterator[str]:
    """Yield the columns by which faces can be parted: those of all manifests, and what is kept in any of a workspace.

    The latter stand in the files' heads, for which alone a tenth of a second is spent on pyarrow.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    from cafe.data.rows import SCHEMA

    yield from (*read_constant("cafe.results.groups", "OWN"), read_constant("cafe.results.groups", "AGREEMENT"))
    for path in root.glob(NAMED["manifest"]):
        with suppress(pa.ArrowException, OSError):  # a damaged one has no names to offer
            yield from (
                one.name
                for one in pq.read_schema(path)
                if pa.types.is_string(one.type) and one.name not in SCHEMA.names
            )


def list_settings(method: str) -> list[str]:
    """Return the keys of the recipe of a method of this package, none for a name that is not there."""
    found = read_dict("cafe.methods", "METHODS").get(method)
    chain = list(_list_bases("cafe.methods", found)) if found else []
    for module, definition in chain:
        for line in definition.body:
            if isinstance(line, ast.Assign) and ast.unparse(line.targets[0]) == "recipe_type":
                return _list_fields(module, line.value)
            if isinstance(line, ast.AnnAssign) and ast.unparse(line.target) == "recipe_type" and line.value:
                return _list_fields(module, line.value)
    return []


def _list_fields(module: str, recipe: ast.expr) -> list[str]:
    lines = [line for _, definition in reversed(list(_list_bases(module, recipe))) for line in definition.body]
    fields = (
        line for line in lines if isinstance(line, ast.AnnAssign) and "ClassVar" not in ast.unparse(line.annotation)
    )
    return list(dict.fromkeys(ast.unparse(line.target) for line in fields))


def _list_bases(module: str, name: ast.expr) -> Iterator[tuple[str, ast.ClassDef]]:
    """Yield a class and those it is made of, as far as they are this package's, with the modules they stand in."""
    holder, _, name_there = ast.unparse(name).rpartition(".")
    if holder:
        module = _imports(module)[holder]
    elif imported := _imports(module).get(name_there):
        module = imported.rpartition(".")[0]
    for line in _read(module).body if module.startswith("cafe.") else ():
        if isinstance(line, ast.ClassDef) and line.name == name_there:
            yield module, line
            for base in line.bases:
                yield from _list_bases(module, base)


def read_dict(module: str, name: str) -> dict[str, ast.expr]:
    """Return the keys of a dict of a module as they stand in its source, with the expressions behind them."""
    for line in _read(module).body:
        if isinstance(line, ast.AnnAssign) and ast.unparse(line.target) == name and isinstance(line.value, ast.Dict):
            entries = zip(line.value.keys, line.value.values, strict=True)
            return {str(key.value): value for key, value in entries if isinstance(key, ast.Constant)}
    raise LookupError(f"{module} has no dict {name}")


def read_constant(module: str, name: str) -> Any:
    """Return a constant of a module as it stands in its source."""
    (found,) = (
        line for line in _read(module).body if isinstance(line, ast.Assign) and ast.unparse(line.targets[0]) == name
    )
    return ast.literal_eval(found.value)


@cache
def _read(module: str) -> ast.Module:
    """Return the source of a module of ours."""
    place = Path(cafe.__path__[0], *module.split(".")[1:])
    return ast.parse((place / "__init__.py" if place.is_dir() else place.with_suffix(".py")).read_text("utf-8"))


def _imports(module: str) -> dict[str, str]:
    """Return what a module imports from others by their names there: `Recipe` → `cafe.methods.method.Recipe`."""
    lines = (line for line in _read(module).body if isinstance(line, ast.ImportFrom))
    return {alias.asname or alias.name: f"{line.module}.{alias.name}" for line in lines for alias in line.names}


def suggest_option(name: str, command: click.Command) -> str:
    """Return a sentence about an option that a command does not have, empty where nothing like it is known."""
    known = {option for parameter in command.params for option in parameter.opts}
    if "--set" in known:
        word = name.lstrip("-").replace("-", "_")
        key = SETTINGS.get(word, word)
        methods = [method for method in read_dict("cafe.methods", "METHODS") if key in list_settings(method)]
        if methods:
            every = len(methods) == len(read_dict("cafe.methods", "METHODS"))
            whose = "every method's recipe" if every else f"the recipe of {', '.join(methods)}"
            return f"It is a setting of {whose}: --set {key}=VALUE."
    meant = OPTIONS.get(name, "")
    return f"Give {meant}." if meant and (not meant.startswith("-") or meant.split()[0] in known) else ""


def suggest_command(name: str, group: Any, ctx: click.Context) -> str:
    """Return a sentence that names the commands most like one that is not there, of a group and those in it, or nothing."""
    from difflib import get_close_matches

    paths: dict[str, str] = {}
    for own in group.list_commands(ctx):
        command = group.get_command(ctx, own)
        below = command.list_commands(ctx) if isinstance(command, click.Group) else []
        paths |= {one: f"{own} {one}" for one in below if one not in paths}
    paths |= {own: own for own in group.list_commands(ctx)}
    like = [f"'{paths[one]}'" for one in get_close_matches(name, paths)]
    return f"Did you mean {' or '.join(like)}?" if like else ""
