"""What ships with this package: trained models, each an exported folder, for whoever has photographs and no run.

`cafe/shipped/NAME-VERSION/` holds what `cafe export` wrote; `shipped` stands for the newest of them wherever a model is
named.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.resources import files

from upath import UPath

from cafe.errors import UserError
from cafe.files import exists, list_folder, place_below, read_file
from cafe.records import digest
from cafe.seals import State, read_sealed, verify_file

SHIPPED = "shipped"  # the name of the newest
FOLDER = UPath(str(files("cafe") / "shipped"))


def shipped_models() -> dict[str, UPath]:
    """Return the folder of every model that ships, by its name, the newest last: names end in a version, as `ferplus-2`."""
    return {folder.name: folder for folder in sorted(list_folder(FOLDER), key=_version) if is_export(folder)}


def find_shipped(name: str) -> UPath | None:
    """Return the folder of a model that ships, by its name or as `shipped`; None for other names.

    Raises `UserError` for `shipped` where this installation has none.
    """
    models = shipped_models()
    if name != SHIPPED:
        return models.get(name)
    if not models:
        raise UserError("No model comes with this installation of cafe: name one of yours with --model.")
    return [*models.values()][-1]


def is_export(folder: UPath) -> bool:
    """Whether a folder holds an exported run."""
    return exists(folder / "model.json") and exists(folder / "run.json")


def _version(folder: UPath) -> tuple[int, str]:
    number = re.search(r"(\d+)$", folder.name)
    return int(number[1]) if number else 0, folder.name


def verify_export(folder: UPath) -> Iterator[tuple[UPath, State]]:
    """Yield the files of an exported run, first the record that lists the others, and whether they are what was written."""
    record = folder / "model.json"
    state = verify_file(record)
    yield record, state
    if state == "damaged":
        return
    listed = (read_sealed(record, "read") or {}).get("files")
    for name, expected in sorted(listed.items() if isinstance(listed, dict) else ()):
        path = place_below(folder, name)
        yield path, "whole" if path.is_file() and digest(read_file(path)) == expected else "damaged"
