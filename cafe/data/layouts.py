"""Find a distributed data set in a folder, whatever it is wrapped in, however it is spelled and whatever lies beside it.

A folder is listed once; from then on readers look files up by name, in any case, in memory, so that an object store is read
like a disk.
"""

from __future__ import annotations

import csv
import io
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, groupby
from operator import itemgetter

import numpy as np
from upath import UPath

from cafe.data.expressions import OTHERS
from cafe.data.images import SUFFIXES, suffix_of
from cafe.data.indexing import Expected, Listing
from cafe.data.labels import decode_text
from cafe.data.packed.archives import is_archive, open_archive, read_content
from cafe.errors import UserError
from cafe.files import retry
from cafe.spool import Spool, sort

SPLIT_NAMES = {  # as folders and tables name them: our splits
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
PEOPLE = "people.csv"  # of a drawn domain: who its identities are
USAGES = {"publictest": "val", "privatetest": "test"}  # as the tables of FER2013 call them besides `Training`
MOST_WAYS = 100  # by links to one folder: of links to folders of links there are twice as many at every level
ARCHIVES = (".zip", ".rar", ".7z", ".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".001")


@dataclass(frozen=True)
class Tree:
    """All files below a folder, or in a zip or tar: `files` are sorted POSIX paths relative to `root`.

    No hidden ones, no __MACOSX. `refused` are members of an archive that are not to be read, and why.
    """

    root: UPath
    files: Sequence[str]
    refused: list[tuple[str, str]] = field(default_factory=list)

    @classmethod
    def open(cls, root: UPath) -> Tree:
        """List a folder or an archive; raise `UserError` when it is neither."""
        if is_archive(root):
            archive = open_archive(root)
            return cls(root, list_files(root), sorted(archive.refused.items()))
        if not retry(root, "read", root.is_dir):
            raise UserError(f"{root} is not a folder, a .zip or a .tar: give the one that holds the data set.")
        return cls(root, list_files(root))

    @cached_property
    def _names(self) -> dict[str, str]:
        return {path.casefold(): path for path in self.files}

    @cached_property
    def packed(self) -> list[str]:
        """The archives that lie there."""
        return [path for path in self.files if path.casefold().endswith(ARCHIVES)]

    @cached_property
    def images(self) -> Sequence[str]:
        """The files named like pictures."""
        return Spool(path for path in self.files if is_image(path))

    def get(self, path: str) -> str | None:
        """Return the file of that path in any case, or None."""
        return self._names.get(path.casefold())

    def find(self, *names: str) -> list[str]:
        """Return the files of one of these names, in any case, whatever folders they lie in."""
        wanted = {name.casefold() for name in names}
        return [path for path in self.files if path.rpartition("/")[2].casefold() in wanted]

    def find_one(self, *names: str) -> str | None:
        """Return the only file of one of these names, or None; raise `UserError` when there are several."""
        return self.choose(self.find(*names), names[0]) if self.find(*names) else None

    def choose(self, places: Iterable[str], what: str) -> str:
        """Return the only one of some places; raise `UserError` naming two when the data set is there more than once."""
        first, *others = sorted(set(places))
        if others:
            raise UserError(
                f"{self.root} holds {what} more than once ({first or '.'} and {others[0]}): give the folder of one copy."
            )
        return first

    def find_home(self, pattern: str, what: str) -> Tree | None:
        """Return the tree of the only folder in which pictures lie as a pattern says, or None; raise `UserError` for two."""
        matches = (re.fullmatch(f"(.*/)?{pattern}", path, re.IGNORECASE) for path in self.images)
        homes = {(match[1] or "").rstrip("/") for match in matches if match}
        return self.below(self.choose(homes, what)) if homes else None

    def below(self, folder: str) -> Tree:
        """Return the tree of a folder in it; of the whole of it when the name is empty."""
        if not folder:
            return self
        inside = Spool(relative(path, folder) for path in self.files if path.startswith(f"{folder}/"))
        return Tree(self.root / folder, inside, self.refused)

    def start(self, kind: str, layout: str, expected: tuple[Expected, ...]) -> Listing:
        """Return a listing of this tree that has no files yet."""
        refused = [(name, reason, "") for name, reason in self.refused]
        return Listing(self.root, kind, layout, expected, self.packed, rejected=refused)

    def lack(self, missing: str, remedy: str) -> UserError:
        """Return the error for something that must be there; an archive still packed is named as the likely reason."""
        if self.packed:
            more = f" (as are {len(self.packed) - 1} more archives)" if len(self.packed) > 1 else ""
            remedy = (
                f"{self.packed[0]} is still packed{more}, so unpack it where it lies, or give a .zip or .tar by itself"
            )
            if self.packed[0].casefold().endswith(".tar"):
                remedy += "; shards of tar are read with `cafe data index webdataset`"
        if self.refused:
            name, reason = self.refused[0]
            missing = f"{missing} that can be read (first: {name} {reason})"
        return UserError(f"{self.root} holds no {missing}: {remedy}.")


def list_files(root: UPath) -> Spool[str]:
    """Return every file below a folder or in an archive as a sorted POSIX path in it; no hidden ones, no __MACOSX.

    Links to folders are followed, but never back into a folder the path came through.
    """
    if is_archive(root):
        return _without_hidden(open_archive(root).members)
    if root.protocol in ("", "file"):
        return sort(_walk(root.path, "", frozenset(), Counter()), str)
    base = root.path.rstrip("/") + "/"
    found = (path.removeprefix(base) for path in retry(root, "listed", root.fs.find, root.path))
    return _without_hidden(found)


def _without_hidden(paths: Iterable[str]) -> Spool[str]:
    shown = (path for path in paths if not any(part.startswith((".", "__MACOSX")) for part in path.split("/")))
    return sort(shown, str)


def _walk(folder: str, prefix: str, above: frozenset[str], ways: Counter[str]) -> Iterator[str]:
    real = os.path.realpath(folder)
    if real in above:
        return
    ways[real] += 1
    if ways[real] > MOST_WAYS:
        raise UserError(f"{real} is reached by more than {MOST_WAYS} links: remove those that lead to the same folder.")
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith((".", "__MACOSX")):
                continue
            if entry.is_dir():
                yield from _walk(entry.path, f"{prefix}{entry.name}/", above | {real}, ways)
            else:
                yield f"{prefix}{entry.name}"


def is_image(path: str) -> bool:
    """Return whether a file is named like a picture."""
    return suffix_of(path) in SUFFIXES


def folder_of(path: str) -> str:
    """Return the folder a file lies in, empty at the top."""
    return path.rpartition("/")[0]


def relative(path: str, folder: str) -> str:
    """Return a path as seen from a folder it lies in."""
    return path.removeprefix(f"{folder}/") if folder else path


def mark_repeated(names: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return which of some names are there for the last time, (N,) bool, and which more than once, (N,) bool."""
    ordered = sort(((name, position) for position, name in enumerate(names)), itemgetter(0))
    last, repeated = np.zeros(len(ordered), bool), np.zeros(len(ordered), bool)
    for _, alike in groupby(ordered, itemgetter(0)):
        positions = [position for _, position in alike]
        last[positions[-1]], repeated[positions] = True, len(positions) > 1
    return last, repeated


def merge_repeated(rows: Iterable[tuple[str, object, str]], table: object) -> list[str]:
    """Return a line for each picture that some rows (picture, content, name of the row) of a label table list repeatedly.

    Raises `UserError` naming all pictures that are listed with different contents.
    """
    listed: dict[str, list[tuple[object, str]]] = {}
    for picture, content, name in rows:
        listed.setdefault(picture, []).append((content, name))
    repeated: list[str] = []
    disputed: list[str] = []
    for picture, own in listed.items():
        line = f"{picture} ({'; '.join(name for _, name in own)})"
        same = all(content == own[0][0] for content, _ in own)
        (repeated if same else disputed).append(line)
    if disputed:
        raise UserError(
            f"{table} lists {len(disputed)} faces more than once with different labels, {', '.join(disputed)}: "
            "keep one row of each."
        )
    return repeated


def read_csv(file: UPath) -> Iterator[tuple[int, list[str]]]:
    """Yield (line number, stripped cells) of every line that is not blank; its encoding and CRLF play no part.

    Raises `UserError` for a file that is no CSV.
    """
    text = decode_text(read_content(file))
    with io.StringIO(text, newline="") as stream:
        lines = csv.reader(stream)
        try:
            for cells in lines:
                if any(cells):
                    yield lines.line_num, [cell.strip() for cell in cells]
        except csv.Error as error:
            raise UserError(f"Line {lines.line_num} of {file} is no CSV ({error}): unpack the file again.") from None


def read_records(
    file: UPath, columns: Sequence[str], header: Sequence[str] = ()
) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield (line number, {column in lower case: cell}) of a CSV; a short line has empty cells.

    The first line names the columns, in any case; a file known to come without may give them as `header`. Raises
    `UserError` naming the first of `columns` that is not there.
    """
    lines = read_csv(file)
    number, first = next(lines, (0, []))
    names = [name.casefold() for name in first]
    wanted = [column.casefold() for column in columns]
    if header and not set(wanted) & set(names):
        names, lines = [name.casefold() for name in header], chain([(number, first)], lines)
    for column, name in zip(columns, wanted, strict=True):
        if name not in names:
            raise UserError(f"{file} has no column {column!r} (found {', '.join(first)}): unpack the file again.")
    for number, cells in lines:
        yield number, dict(zip(names, cells + [""] * len(names), strict=False))


def find_split(path: str) -> str:
    """Return the split whose name a folder of a path has, empty where none has; raise `UserError` where two disagree."""
    found = {SPLIT_NAMES[key]: None for folder in path.split("/")[:-1] if (key := folder.casefold()) in SPLIT_NAMES}
    if len(found) > 1:
        raise UserError(f"{path} lies in folders of several splits, {' and '.join(found)}: rename one of them.")
    return next(iter(found), "")


def list_by_folder(
    tree: Tree, splits: Mapping[str, str], kind: str, layout: str, expected: tuple[Expected, ...], wanted: str
) -> Listing:
    """List the images of …/SPLIT/…/EXPRESSION/image, where `splits` maps the names of folders to our splits.

    The faces of a split that is mapped to "" have no labels. The listing's root is the splits' common folder. Raises
    `UserError` when there are no images, naming the layout that is `wanted`, when there are two copies, and for a folder
    that is numbered: the same number means another expression in another copy.
    """
    found, bases = tree.start(kind, layout, expected), set()
    for path in tree.images:
        folders = path.split("/")[:-1]
        keys = [folder.casefold() for folder in folders]
        innermost = max((position for position, key in enumerate(keys) if key in splits), default=None)
        if innermost is None:
            continue
        split, expression = splits[keys[innermost]], folders[-1]
        if not split:
            found.dropped["label withheld"] += 1
        elif innermost == len(folders) - 1:
            continue  # a picture beside the expressions' folders shows none
        elif keys[-1] in OTHERS:
            found.dropped[keys[-1]] += 1
        elif expression.isdigit():
            raise UserError(
                f"The folder {'/'.join(folders)} of {tree.root} is numbered, which means another expression in every "
                "copy: once you know which, read it with `cafe data index folder` and --label-order."
            )
        else:
            found.add(path, expression, split)
        outermost = next(position for position, key in enumerate(keys) if key in {*splits, *SPLIT_NAMES})
        bases.add("/".join(folders[:outermost]))
    if not found.files:
        raise tree.lack(wanted, "give the folder that holds it")
    base = tree.choose(bases, "the data set")
    found.root = tree.below(base).root
    found.files = Spool(replace(file, path=relative(file.path, base)) for file in found.files)
    found.count_ignored(tree.below(base).images)
    return found
