"""Sets of your own as folders: one for each expression, pictures with a table beside them, or a domain drawn here."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from upath import UPath

from cafe.data.expressions import EIGHT
from cafe.data.images import suffix_of
from cafe.data.indexing import LabelledFile, Listing
from cafe.data.layouts import PEOPLE, SPLIT_NAMES, Tree, find_split, folder_of
from cafe.data.packed.archives import ROWS, is_archive
from cafe.data.readers.cells import TABLES, Cells, as_text
from cafe.data.readers.levels import Levels, list_levels
from cafe.data.readers.named import SCHEMES, find_person, find_scheme
from cafe.data.readers.table import Roles, list_faces, read_faces
from cafe.data.rows import SCHEMA
from cafe.errors import StorageError, UserError
from cafe.files import find_below
from cafe.spool import Spool

METADATA = "metadata"  # tables of this name say more of the pictures in and below their folder


def read_folder(
    root: UPath,
    classes: tuple[str, ...] = (),
    own: bool = False,
    columns: Mapping[str, str] | None = None,
) -> Listing:
    """List the pictures of a folder by what their folders, or a table beside them, say they show.

    Folders named after expressions, after `classes` or by numbers may lie in wrappers, in folders of splits and of persons,
    or hold these; with `own` their names may be any. Tables of path and label are `metadata.csv`, `.jsonl` or
    `.parquet`, or stand beside pictures that lie in no folders of expressions. Raises `UserError` when `root` is no folder,
    and where it is not certain what a picture shows.
    """
    tree = Tree.open(root)
    if not tree.images:
        raise _refuse(tree)
    levels = Levels(root, tree.images, tuple(dict.fromkeys((*EIGHT, *classes))))
    metadata = [path for path in _tables(tree) if _stem(path) == METADATA]
    tables = _find_tables(tree, columns or {}, metadata, needed=levels.named is None)
    if not tables and levels.named is None and (not levels.several or (levels.numbered is None and not own)):
        tables = _find_tables(tree, columns or {}, _tables(tree), needed=True)
    found = tree.start("folder", "EXPRESSION/image", ())
    if tables:
        _list_tables(found, tree, tables)
        _check_folders(found, levels)
    elif (level := levels.expression(own)) is None or (not own and _tells_by_name(levels)):
        raise _refuse(tree)
    else:
        _list_levels(found, levels, level)
    read = {table.path for table in tables}
    found.count_ignored(path for path in tree.files if path not in read)
    return found


def _list_levels(found: Listing, levels: Levels, expression: int) -> None:
    """Add the pictures in folders of expressions; others lie beside them and show none."""
    group, scheme = levels.group(expression), find_scheme(levels.pictures)
    for path in levels.pictures:
        folders = list_levels(path)
        if len(folders) > expression:
            person = folders[group] if group is not None and group < len(folders) else None
            if group is None and scheme:
                person = find_person(path, scheme)
            found.add(path, folders[expression], find_split(path), group=person)
    words = {expression: "EXPRESSION", **({} if group is None else {group: "GROUP"})}
    split = ["SPLIT"] if any(file.split for file in found.files) else []
    found.layout = "/".join([*split, *(words[level] for level in sorted(words)), "image"])
    if group is None and scheme:
        found.layout += f", persons by the names of {SCHEMES[scheme].about}"


def _tables(tree: Tree) -> list[str]:
    return [path for path in tree.files if path.casefold().endswith(TABLES)]


def _stem(path: str) -> str:
    return path.rpartition("/")[2].rpartition(".")[0].casefold()


@dataclass(frozen=True)
class _Beside:
    """A table below a folder: its path, what it holds, and the split that its name or folder says."""

    path: str
    cells: Cells
    roles: Roles

    @cached_property
    def split(self) -> str:
        return find_split(self.path) or SPLIT_NAMES.get(re.split("[^a-z]", _stem(self.path))[0], "")


def _find_tables(tree: Tree, columns: Mapping[str, str], paths: Sequence[str], needed: bool) -> list[_Beside]:
    """Return the tables among some files that name pictures and labels; raise `UserError` unless they belong together.

    Where one is `needed` and a single one is there, what is wrong with it is said.
    """
    found = []
    for path in paths:
        try:
            cells = Cells.load(find_below(tree.root, path))
            found.append(_Beside(path, cells, Roles.find(cells, find_below(tree.root, path), columns)))
        except UserError as error:
            if (needed and len(paths) == 1) or isinstance(error, StorageError):  # it may well name labels
                raise
    splits = [table.split for table in found]
    if len(found) > 1 and (not all(splits) or len(set(splits)) < len(splits)):
        raise UserError(
            f"{tree.root} holds several tables of pictures and labels, {found[0].path} and {found[1].path}: read the "
            "right one with `cafe data index table`."
        )
    return found


def _list_tables(found: Listing, tree: Tree, tables: Sequence[_Beside]) -> None:
    by_name: dict[str, list[str]] = defaultdict(list)
    for image in tree.images:
        by_name[image.rpartition("/")[2].casefold()].append(image)
    for table in tables:
        rows = read_faces(table.cells, table.roles, find_below(tree.root, table.path))
        rows = (replace(row, split=row.split or table.split) for row in rows)
        list_faces(found, Spool(_find_pictures(found, tree, table, rows, by_name)), table.path)
    found.layout = "; ".join(f"{table.path} of {table.roles.name(table.cells)}" for table in tables)
    found.tables = tuple(str(find_below(tree.root, table.path)) for table in tables)
    found.unread = tuple(dict.fromkeys(name for table in tables for name in table.roles.unread))


def _find_pictures(
    found: Listing, tree: Tree, table: _Beside, rows: Iterable[LabelledFile], by_name: Mapping[str, list[str]]
) -> Iterator[LabelledFile]:
    """Yield the rows with the places of their pictures; note those whose picture is not there, or there several times.

    A path counts from the folder of the table, from the root, or names the end of a picture's path.
    """
    home = folder_of(table.path)
    for row in rows:
        name = row.path.removeprefix(f"{tree.root.path.rstrip('/')}/").removeprefix("./")
        place = tree.get(f"{home}/{name}" if home else name) or tree.get(name)
        if place is None:
            end = f"/{name.casefold()}"
            ending = [path for path in by_name.get(end.rpartition("/")[2], ()) if f"/{path.casefold()}".endswith(end)]
            ending = [path for path in ending if find_split(path) == row.split] or ending if row.split else ending
            if len(ending) != 1:
                reason = f"could be {ending[0]} and {ending[1]}" if ending else "file not found"
                found.reject(row.path, reason, row.expression)
                continue
            (place,) = ending
        yield replace(row, path=place)


def _check_folders(found: Listing, levels: Levels) -> None:
    """Raise `UserError` where pictures lie in folders of another expression than their table says."""
    if wrong := levels.contradict(found.files):
        raise UserError(
            f"{len(wrong):,} pictures of {found.root} lie in a folder of another expression than their table says, such as "
            f"{wrong[0].path}, which is {wrong[0].expression!r} there: read the table with `cafe data index table`, or take "
            "it away."
        )


def _tells_by_name(levels: Levels) -> bool:
    """Whether the names of the files say what they show, and no folder does."""
    return levels.named is None and levels.numbered is None and find_scheme(levels.pictures) != ""


def _refuse(tree: Tree) -> UserError:
    """Return the error for a folder without labels, with the command for a set whose file names tell them."""
    if not tree.images:
        rows = any(path.casefold().endswith(ROWS) for path in tree.files)
        remedy = "give the folder that holds the faces"
        return tree.lack("picture", "read Parquet files with pictures by `cafe data index table`" if rows else remedy)
    if any(path.casefold().endswith((".cls", ".json")) for path in tree.files) and is_archive(tree.root):
        return UserError(
            f"{tree.root} says what its pictures show by files beside each: read it with `cafe data index webdataset`."
        )
    scheme = find_scheme(tree.images)
    remedy = f"its names are those of {scheme}, so read it with `cafe data index {scheme}`" if scheme else (
        "put pictures into folders named after what they show, or a table of path and label beside them"
    )  # fmt: skip
    return UserError(f"{tree.root} does not say what its pictures show, such as {tree.images[0]}: {remedy}.")


def read_synthetic(root: UPath) -> Listing:
    """List a drawn domain; every face belongs to the group of its identity, `id0007` of `id0007_01.jpg`.

    What people.csv says of an identity is kept with its faces. Raises `UserError` where that is no such table.
    """
    found = read_folder(root)
    found.kind = "synthetic"
    found.group_by_name()
    tree = Tree.open(root)
    if place := tree.get(PEOPLE):
        people = _read_people(find_below(root, place))
        found.files = Spool(replace(file, kept=people.get(str(file.group), {})) for file in found.files)
        found.ignored = found.ignored - Counter([suffix_of(place)])
    return found


def _read_people(file: UPath) -> dict[str, dict[str, str]]:
    """Return by the name of each identity what a table says of it."""
    table = Cells.load(file)
    first, *columns = table.columns or [""]
    if first != "person" or set(columns) & set(SCHEMA.names):
        raise UserError(f"{file} is not what `cafe data synth` wrote: draw the domain again.")
    rows = ((as_text(name), dict(zip(columns, map(as_text, cells), strict=True))) for name, *cells in table.rows)
    return {str(name): {column: text for column, text in own.items() if text is not None} for name, own in rows}
