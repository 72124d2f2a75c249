"""The plainest layout: ROOT/EXPRESSION/*.jpg, or ROOT/SPLIT/EXPRESSION/*.jpg when the set comes split.

Deeper folders below an expression are read too; hidden files and the debris of archives are not.
"""

from __future__ import annotations

from collections import Counter
from pathlib import PurePosixPath

from upath import UPath

from cafe.data.expressions import parse_expression
from cafe.data.images import SUFFIXES
from cafe.data.indexing import SPLIT_ALIASES, LabelledFile, Listing, parse_split
from cafe.data.manifest import SPLITS
from cafe.errors import UserError


def read_folder(root: UPath) -> Listing:
    """List the images below `root`, each labelled by the folder it lies in.

    Raises `UserError` when `root` is no folder or a folder is named like no expression.
    """
    if not root.is_dir():
        raise UserError(f"{root} is not a folder: give the one that holds a folder for each expression.")
    files, ignored = [], 0
    for path in list_files(root):
        if PurePosixPath(path).suffix.lower() not in SUFFIXES or "/" not in path:
            ignored += 1
            continue
        first, second = path.split("/")[:2]
        split = parse_split(first) if first.lower() in {*SPLITS, *SPLIT_ALIASES} else ""
        files.append(LabelledFile(path, parse_expression(second if split else first), split))
    folders = Counter(bool(file.split) for file in files)
    layout = "SPLIT/EXPRESSION/image" if folders[True] else "EXPRESSION/image"
    return Listing(root, files, layout, "folder", ignored)


def list_files(root: UPath) -> list[str]:
    """Every file below a folder as a sorted POSIX path relative to it, in one listing; no hidden ones."""
    base = root.path.rstrip("/") + "/"
    found = (path.removeprefix(base) for path in root.fs.find(root.path))
    return sorted(path for path in found if not any(part.startswith((".", "__MACOSX")) for part in path.split("/")))
