"""Faces that lie in shards with what they show: tars of WebDataset, and Parquet with pictures as Hugging Face writes it.

To whatever reads them, both are tables: a row for each face, whose picture lies in the shard.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import compress, groupby, pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from upath import UPath

from cafe.data.images import suffix_of
from cafe.data.indexing import Listing
from cafe.data.layouts import SPLIT_NAMES, Tree, is_image, list_files, mark_repeated
from cafe.data.packed.archives import ROWS, Span, find_pictures, is_archive, name_row, open_packed, walk_archive
from cafe.data.readers.cells import TABLES, Cells, as_text
from cafe.data.readers.table import Roles, list_faces, read_faces, read_table
from cafe.errors import UserError
from cafe.files import retry
from cafe.seals import MOST_BYTES, read_rows
from cafe.spool import Spool

TEXTS = (".cls", ".json", ".txt")  # members of a sample of WebDataset that say what it shows
SEVERAL = re.compile(r"[*{]")  # in the name of shards
MOST_SHARDS = 100_000  # that `{000..004}` may stand for
PICTURE = "picture"  # the column of a shard's pictures among those of its labels


@dataclass(frozen=True)
class _Packed:
    """A face of a shard: where its picture lies, what that is called there, and its cells by the names of the columns."""

    shard: str
    path: str
    name: str | None
    span: Span
    cells: Mapping[str, object]


def read_webdataset(root: UPath, columns: Mapping[str, str] | None = None) -> Listing:
    """List the samples of tar shards, each a picture and what it shows: `0001.jpg` and `0001.cls` or `0001.json`.

    `root` is a shard, a folder of shards, or their names with `{000..004}` or `*`; a shard's split is named in its path.
    `columns` says which key has a role, where its name does not. Raises `UserError`.
    """
    folder, shards = find_shards(root, ".tar")
    found = Listing(folder, "table", f"{len(shards)} tar shards", tables=(str(root),))
    rows = Spool(row for shard in shards for row in _read_tar(folder / shard, shard, found))
    if not any(row.cells for row in rows):
        raise UserError(
            f"{root} has no .cls or .json beside its pictures: read folders of expressions in a .tar with "
            "`cafe data index folder`."
        )
    return _list_rows(found, rows, _are_unique(rows), root, columns or {})


def read_parquet(root: UPath, columns: Mapping[str, str] | None = None) -> Listing:
    """List the rows of Parquet files with pictures: a column of struct{bytes, path}, as `datasets` writes it, or of bytes.

    `root` and `columns` as for `read_webdataset`. Labels may be numbers that the schema names. Raises `UserError`.
    """
    folder, shards = find_shards(root, ROWS)
    found = Listing(folder, "table", f"{len(shards)} Parquet files", tables=(str(root),))
    rows = Spool(row for shard in shards for row in _read_rows(folder / shard, shard))
    # A row is read with those around it, so that the faces must stay in the order in which they lie.
    in_order = all(
        all(str(before.name) < str(after.name) for before, after in pairwise(some))
        for _, some in groupby(rows, key=lambda row: row.shard)
    )
    return _list_rows(found, rows, in_order and _are_unique(rows), root, columns or {})


def holds_pictures(root: UPath) -> bool:
    """Whether a table is Parquet with pictures in it: a file, a folder of files, or their names with `{000..004}` or `*`."""
    if root.suffix.casefold() != ROWS and not (SEVERAL.search(root.path) or retry(root, "read", root.is_dir)):
        return False
    folder, shards = find_shards(root, ROWS)
    with open_packed(folder / shards[0]) as data:
        return find_pictures(pq.ParquetFile(data).schema_arrow) is not None


def find_shards(root: UPath, suffix: str) -> tuple[UPath, list[str]]:
    """Return the folder of some shards and their paths below it; raise `UserError` where there is none."""
    place = root.path.rstrip("/")
    if several := SEVERAL.search(place):
        above = place[: several.start()].rpartition("/")[0]
        folder = UPath(above, protocol=root.protocol, **root.storage_options)
        names = _expand_braces(place[len(above) + 1 :])
        shards = [shard for name in names for shard in (_match(folder, name) if "*" in name else [name])]
    elif retry(root, "read", root.is_dir):
        folder, shards = root, [path for path in list_files(root) if path.casefold().endswith(suffix)]
    else:
        folder, shards = root.parent, [root.name]
    if not shards or not all(shard.casefold().endswith(suffix) for shard in shards):
        other, kind = (ROWS, "table") if suffix == ".tar" else (".tar", "webdataset")
        raise UserError(
            f"There is no {suffix} file at {root}: give one, a folder of them, or their names with '*'; {other} files are "
            f"read with `cafe data index {kind}`."
        )
    return folder, shards


def _match(folder: UPath, pattern: str) -> list[str]:
    there = retry(folder, "listed", folder.fs.glob, f"{folder.path.rstrip('/')}/{pattern}")
    return sorted(path.removeprefix(folder.path.rstrip("/")).lstrip("/") for path in there)


def _expand_braces(text: str) -> list[str]:
    """Return the names that `{000..004}` or `{a,b}` stand for, as a shell does."""
    found = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", text)
    if not found:
        return [text]
    if found[3] is not None:
        parts = found[3].split(",")
    else:
        first, last = int(found[1]), int(found[2])
        if not 0 <= last - first < MOST_SHARDS:
            raise UserError(
                f"{found[0]} names no shards, or more than {MOST_SHARDS:,}: write the first and the last number."
            )
        parts = [f"{number:0{len(found[1])}d}" for number in range(first, last + 1)]
    names = (name for part in parts for name in _expand_braces(text[: found.start()] + part + text[found.end() :]))
    return list(dict.fromkeys(names))  # of braces within braces the inner ones come again for each outer part


def _find_split(shard: str) -> str:
    """Return the split that a shard's path names, as `train-00000-of-00002.parquet` and `test/0000.parquet` do."""
    words = [word for part in reversed(shard.split("/")) for word in re.split(r"[^a-z]+", part.casefold())]
    return next((SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES), "")


def _are_unique(rows: Iterable[_Packed]) -> bool:
    names = Spool(row.name for row in rows)
    return not any(name in (None, "") for name in names) and not mark_repeated(map(str, names))[1].any()


def _list_rows(found: Listing, rows: Sequence[_Packed], named: bool, root: UPath, chosen: Mapping[str, str]) -> Listing:
    """Add the faces of shards to a listing; they are called by the names of their pictures where these are `named` apart."""
    columns = list(dict.fromkeys(column for row in rows for column in row.cells))
    table = Cells([PICTURE, *columns], Spool((row.path, *map(row.cells.get, columns)) for row in rows))
    roles = Roles.find(table, root, {**chosen, "path": PICTURE})
    labelled = np.fromiter((as_text(row[roles.places["label"]]) is not None for row in table.rows), bool, len(rows))
    if unlabelled := int((~labelled).sum()):
        found.dropped["no label"] += unlabelled
    faces = read_faces(Cells(table.columns, Spool(compress(table.rows, labelled))), roles, root)
    list_faces(
        found,
        Spool(
            replace(
                face,
                where=row.path,
                split=face.split or _find_split(row.shard),
                sample=str(row.name) if named else "",
                span=row.span,
            )
            for face, row in zip(faces, compress(rows, labelled), strict=True)
        ),
        root,
    )
    found.layout, found.unread = f"{found.layout} of {roles.name(table)}", roles.unread
    return found


def _read_tar(file: UPath, shard: str, found: Listing) -> Iterator[_Packed]:
    """Yield the samples of a shard: members alike up to the first dot of their file's name."""
    pictures, cells = dict[str, list[tuple[str, Span]]](), dict[str, dict[str, object]]()
    for member in walk_archive(file, TEXTS):
        folder, slash, name = member.name.rpartition("/")
        key, _, ending = name.partition(".")
        sample = f"{folder}{slash}{key}"
        if member.reason:
            found.reject(f"{shard}/{member.name}", member.reason)
        elif is_image(name):
            pictures.setdefault(sample, []).append((member.name, member.span))
        elif member.content is None:
            found.ignored[suffix_of(name)] += 1
        else:
            try:
                cells.setdefault(sample, {}).update(_read_text(ending.casefold(), member.content))
            except (ValueError, RecursionError):
                found.reject(f"{shard}/{member.name}", "is no JSON object, or no text")
    for sample, there in pictures.items():
        if len(there) > 1:
            found.reject(
                f"{shard}/{there[0][0]}", f"has the name of {there[1][0]}, so that it is unclear whose label is whose"
            )
        else:
            ((name, span),) = there
            yield _Packed(shard, f"{shard}/{name}", name, span, cells.get(sample, {}))
    if unpictured := len(cells.keys() - pictures.keys()):
        found.ignored[""] += unpictured


def _read_text(ending: str, content: bytes) -> dict[str, object]:
    """Return what a member of a sample says, by name; raise `ValueError`."""
    if not ending.endswith("json"):
        return {ending: content.decode().strip()}
    record = json.loads(content)
    if not isinstance(record, dict):
        raise ValueError
    return {str(key): value for key, value in record.items() if not isinstance(value, dict)}


def _read_rows(file: UPath, shard: str) -> Iterator[_Packed]:
    """Yield the rows of a Parquet file, all of it but the pictures."""
    with open_packed(file) as data:
        parquet = pq.ParquetFile(data)
        schema, metadata = parquet.schema_arrow, parquet.metadata
        pictures = find_pictures(schema)
        if pictures is None or len(set(schema.names)) < len(schema.names):
            raise UserError(
                f"{file} has no column of pictures or two columns of one name ({', '.join(schema.names)}): give a Parquet "
                "file with the bytes of its pictures."
            )
        kind, columns = schema.field(pictures).type, [name for name in schema.names if name != pictures]
        inner = pa.types.is_struct(kind) and kind.get_field_index("path") >= 0
        table = read_rows(parquet, file, MOST_BYTES, [*columns, *([f"{pictures}.path"] if inner else [])])
    spans = [
        (group, row) for group in range(metadata.num_row_groups) for row in range(metadata.row_group(group).num_rows)
    ]
    names = table[pictures].combine_chunks().field("path").to_pylist() if inner else [None] * len(spans)
    meanings = _read_class_names(schema)
    cells = [list(_name_labels(table[column].to_pylist(), meanings.get(column))) for column in columns]
    for number, (span, name, *row) in enumerate(zip(spans, names, *cells, strict=True)):
        yield _Packed(shard, f"{shard}/{name_row(number)}", name, span, dict(zip(columns, row, strict=True)))


def _name_labels(cells: Iterable[Any], names: list[str] | None) -> Iterator[object]:
    """Yield cells with the names of numbered labels; a number without a name, as -1 for a withheld label, is none."""
    for cell in cells:
        if names is None or not isinstance(cell, int):
            yield cell
        else:
            yield names[cell] if 0 <= cell < len(names) else None


def _read_class_names(schema: pa.Schema) -> dict[str, list[str]]:
    """Return the names of the numbers in each column that is a `ClassLabel` of `datasets`."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {
            column: [str(name) for name in about["names"]]
            for column, about in features.items()
            if isinstance(about, dict) and about.get("_type") == "ClassLabel" and isinstance(about.get("names"), list)
        }
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError):  # none, or not as `datasets` writes it
        return {}


def read_any_table(file: UPath, root: UPath | None = None, columns: Mapping[str, str] | None = None) -> Listing:
    """List the faces of a table, of one with its pictures in a zip, or of Parquet files that hold the pictures themselves.

    `root` is the folder of the pictures where they do not lie by the table. Raises `UserError`.
    """
    if is_archive(file):
        tree = Tree.open(file)
        tables = [path for path in tree.files if path.casefold().endswith(TABLES)]
        if not tables:
            raise UserError(
                f"{file} holds no table: read folders of expressions in it with `cafe data index folder`, and shards of "
                "pictures with .cls or .json with `cafe data index webdataset`."
            )
        if len(tables) > 1:
            raise UserError(f"{file} holds {len(tables)} tables: name one of them, such as {file / tables[0]}.")
        return read_table(file / tables[0], root, columns)
    if not holds_pictures(file):
        return read_table(file, root, columns)
    if root:
        raise UserError(f"--root {root} has no meaning for {file}, which holds its pictures itself: leave it out.")
    return read_parquet(file, columns)
