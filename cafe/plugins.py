"""Plug-ins: data sets, towers, image branches and methods of a user's own, found without editing this package.

One comes from an installed package's entry point, whose name is that of what it adds and whose object is it,

    [project.entry-points."cafe.methods"]
    fusion = "my_package.fusion:Fusion"

or from `cafe --plugin FILE.py`, a file that fills the dicts itself (`METHODS["fusion"] = Fusion`). What a plug-in adds is
part of what a run is, so each has a digest: of the file, or of the module that the object is from. A file is run when it is
given; an entry point is loaded only when a name is asked for that nothing else has.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from upath import UPath

from cafe.errors import UserError, quote, unknown
from cafe.files import MOST_TEXT, read_file
from cafe.records import digest

Entries = dict[str, Any]

_registries: dict[str, Entries] = {}  # of what is imported: the dict of each group
_ours: dict[str, Entries] = {}  # and what is in it without any plug-in
_kinds: dict[str, tuple[str, Callable[[Any], bool]]] = {}  # what an entry of each group must be
_suppliers: dict[tuple[str, str], Plugin] = {}  # by group and name


@dataclass(frozen=True)
class Plugin:
    """A plug-in that can be sent to another process: the text of a file, or the place of an installed object."""

    name: str  # of the file without its ending, or of the entry point
    digest: str
    source: str = ""  # of a file: its text
    group: str = ""  # of an entry point: what it adds,
    place: str = ""  # and where it is, MODULE:OBJECT

    @property
    def identity(self) -> str:
        """What a run that uses it is named by."""
        return f"{self.name}:{self.digest}"

    def install(self) -> None:
        """Add in this process what the plug-in adds, unless it is there; raise `UserError` where it would be another."""
        if self in _suppliers.values():
            return
        if not self.place:
            _run_file(self, f"{self.name}.py")
        elif (found := _load_entry(EntryPoint(self.name, self.place, f"cafe.{self.group}"), self.group)) != self:
            raise UserError(
                f"The plug-in {self.name!r} is another here, {found.digest[:12]} instead of {self.digest[:12]}: install one "
                "version of it everywhere."
            )


def offer(group: str, entries: Entries, kind: str, fits: Callable[[Any], bool]) -> None:
    """Let plug-ins of a group (`methods`, `towers`, `datasets`, `networks`) add to a dict, which is still complete.

    `fits` says whether an object may be an entry, and `kind` in words what it must be.
    """
    _registries[group], _ours[group], _kinds[group] = entries, dict(entries), (kind, fits)


def find_entry(group: str, name: str, kind: str, others: Iterable[str] = ()) -> Any:
    """Return what a dict that was offered, or an entry point, has by a name; raise `UserError` naming all, and `others`."""
    entries = _registries[group]
    if name not in entries:
        installed = {entry.name: entry for entry in entry_points(group=f"cafe.{group}")}
        if name not in installed:
            raise unknown(kind, name, {*entries, *installed, *others})
        _load_entry(installed[name], group)
    return entries[name]


def has_entry(group: str, name: str) -> bool:
    """Whether `find_entry` finds a name, without loading anything."""
    own = name in _registries[group]
    return own or (":" not in name and bool(entry_points(group=f"cafe.{group}", name=name)))  # which takes 20 ms


def load_plugins(files: Iterable[str]) -> tuple[Plugin, ...]:
    """Run files that add to the dicts, each once; raise `UserError` for one that cannot be run, or adds nothing."""
    return tuple(_load_file(Path(file)) for file in files)


def find_plugins(**names: str | None) -> tuple[Plugin, ...]:
    """Return the plug-ins that supplied some names, by group, which were looked up before: `find_plugins(methods="fusion")`.

    A tower may be named with its file and layer.
    """
    heads = ((group, (name or "").partition("#")[0].partition("@")[0]) for group, name in names.items())
    found = {_suppliers[key] for key in heads if key in _suppliers}
    return tuple(sorted(found, key=lambda plugin: plugin.identity))


def list_plugins() -> tuple[Plugin, ...]:
    """Return all plug-ins that are loaded, for other processes."""
    return tuple(dict.fromkeys(_suppliers.values()))


def check_plugins(identities: Iterable[str]) -> None:
    """Raise `UserError` where plug-ins that something was made with, `NAME:DIGEST`, are neither loaded nor installed."""
    for identity in identities:
        name, _, wanted = identity.partition(":")
        if identity not in _list_identities():
            for group in _registries:
                for entry in entry_points(group=f"cafe.{group}", name=name):
                    _load_entry(entry, group)
        if identity not in _list_identities():
            names = {own.partition(":")[0] for own in _list_identities()}
            other = ", of which another version is loaded" if name in names else ""
            raise UserError(
                f"This needs the plug-in {name!r} with the digest {wanted[:12]}{other}: give its file with `cafe --plugin "
                f"{name}.py`, or install it."
            )


def _list_identities() -> set[str]:
    return {plugin.identity for plugin in _suppliers.values()}


def _load_file(path: Path) -> Plugin:
    try:
        content = read_file(UPath(path), MOST_TEXT)
        plugin = Plugin(path.stem, digest(content), content.decode())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The plug-in {str(path)!r} cannot be read ({quote(error)}): give a Python file.") from None
    if plugin not in _suppliers.values():
        _run_file(plugin, str(path))
    return plugin


def _run_file(plugin: Plugin, path: str) -> None:
    """Run the text of a plug-in as a module, and note what it added; leave the dicts as they were where that fails."""
    before = {group: dict(entries) for group, entries in _registries.items()}
    module = ModuleType(f"cafe_plugin_{plugin.name}_{plugin.digest[:12]}", plugin.source)
    module.__file__ = path
    sys.modules[module.__name__] = module  # where pickle looks for its classes
    try:
        exec(compile(plugin.source, path, "exec"), vars(module))  # noqa: S102  # the user asked for it
        _note_entries(plugin, path, before)
    except (Exception, SystemExit) as error:
        del sys.modules[module.__name__]
        for group, entries in _registries.items():
            kept = before.get(group, _ours[group])
            entries.clear()
            entries.update(kept)
        if isinstance(error, UserError):
            raise
        place = f", line {line}" if (line := _find_line(error, path)) else ""
        raise UserError(
            f"The plug-in {path!r} cannot be run ({type(error).__name__}: {quote(error)}{place}): correct it."
        ) from error


def _find_line(error: BaseException, path: str) -> int | None:
    """Return the line of a file at which it failed, the last one that is its own."""
    line, trace = getattr(error, "lineno", None), error.__traceback__
    while trace:
        if trace.tb_frame.f_code.co_filename == path:
            line = trace.tb_lineno
        trace = trace.tb_next
    return line


def _note_entries(plugin: Plugin, path: str, before: dict[str, Entries]) -> None:
    """Note what a plug-in that was run has added; raise `UserError` where that is nothing, or a name was taken."""
    added = []
    for group, entries in _registries.items():
        known = before.get(group, _ours[group])
        for name, value in known.items():
            if entries.get(name) is not value:
                owner = _suppliers.get((group, name))
                whose = f"the plug-in {owner.name!r}" if owner else "this package"
                raise UserError(
                    f"The plug-in {path!r} takes the name {name!r}, which {whose} has among the {group}: choose another."
                )
        for name in entries.keys() - known.keys():
            _check_entry(f"The plug-in {path!r}", group, name, entries[name])
            added.append((group, name))
    if not added:
        raise UserError(
            f"The plug-in {path!r} adds nothing: have it fill METHODS, BACKBONES, NETWORKS or DATASETS (docs/extending.md)."
        )
    _suppliers.update(dict.fromkeys(added, plugin))


def _check_entry(plugin: str, group: str, name: str, value: Any) -> None:
    kind, fits = _kinds[group]
    if not fits(value):
        raise UserError(f"{plugin} adds {name!r} to the {group}, and that is {value!r}: it must be {kind}.")


def _load_entry(entry: EntryPoint, group: str) -> Plugin:
    """Load the object of an entry point into the dict of its group."""
    try:
        found = entry.load()
    except Exception as error:
        raise UserError(
            f"The plug-in {entry.name!r} ({entry.value}, among the entry points cafe.{group}) cannot be loaded "
            f"({type(error).__name__}: {quote(error)}): correct or uninstall it."
        ) from error
    _check_entry(f"The plug-in {entry.name!r} ({entry.value})", group, entry.name, found)
    # An object that is no class or function, such as a tower's description, is an instance of a class of ours.
    module = sys.modules[found.__module__ if isinstance(found, type | FunctionType) else entry.module]
    if not module.__file__:
        raise UserError(f"The plug-in {entry.name!r} ({entry.value}) has no file of its own: install it from source.")
    plugin = Plugin(entry.name, digest(Path(module.__file__).read_bytes()), group=group, place=entry.value)
    _registries[group][entry.name] = found
    _suppliers[group, entry.name] = plugin
    return plugin
