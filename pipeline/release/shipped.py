"""What ships with this package: trained models, each an exported folder, for whoever has photographs and no run.

`cafe/shipped/NAME-VERSION/` holds what `cafe export` wrote; `shipped` stands for the newest of them wherever a model is
named.
"""

from __future__ import annotations

import re
from importlib.resources import files

from upath import UPath

from cafe.errors import UserError
from cafe.files import exists, list_folder

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
