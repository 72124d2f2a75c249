"""A table of paths and labels: which column says what, and the faces that its rows name."""

from __future__ import annotations

import posixpath
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import compress
from pathlib import PurePosixPath

from upath import UPath

from cafe.data.expressions import ALIASES, EIGHT, join_words, normalise_name, spell_name
from cafe.data.images import Box
from cafe.data.indexing import LabelledFile, Listing
from cafe.data.layouts import SPLIT_NAMES, USAGES, find_split, mark_repeated, merge_repeated
from cafe.data.readers.cells import Cells, as_text
from cafe.data.readers.levels import Levels
from cafe.data.rows import SCHEMA, SPLITS
from cafe.errors import UserError, unknown
from cafe.files import check_encoded, locate
from cafe.spool import Spool

ROLES = {  # what a column may be called, in any case; blanks, dots and hyphens count as `_`
    "path": (
        "path", "image", "file", "file_name", "filename", "filepath", "file_path", "image_path", "image_name", "img_path",
        "pth",
    ),
    "label": ("label", "expression", "emotion", "class", "cls"),
    "split": ("split", "usage", "fold"),
    "group": ("group", "subject", "person", "identity", "film", "user_id", "subject_id", "person_id"),
    "box": ("box",),
}  # fmt: skip
SIDES = (
    ("left", "top", "width", "height"),
    ("x", "y", "w", "h"),
    ("x", "y", "width", "height"),
    ("face_x", "face_y", "face_width", "face_height"),
)
CORNERS = (
    ("left", "top", "right", "bottom"),
    ("xmin", "ymin", "xmax", "ymax"),
    ("x1", "y1", "x2", "y2"),
    ("face_box_left", "face_box_top", "face_box_right", "face_box_bottom"),
)
KEEP = "keep"  # stands for the role of columns that the manifest keeps as they are: a face's sex, age, camera, …
DOUBTFUL_BOX = "bbox"  # of which some write sides and some corners
MOST_VOTES = 2**31  # as the manifest counts them
DRIVE = re.compile(r"[A-Za-z]:/")


@dataclass(frozen=True)
class Roles:
    """The places of the columns that say something: by role, of `boxes` one or four, of the votes by class, of the `kept`.

    `corners` tells boxes of two corners from those of a corner and two sides; `unread` are the columns that play no part.
    """

    places: Mapping[str, int]
    boxes: tuple[int, ...]
    corners: bool
    votes: Mapping[str, int]
    kept: Mapping[str, int]
    unread: tuple[str, ...]

    @classmethod
    def find(cls, table: Cells, file: UPath, chosen: Mapping[str, str]) -> Roles:
        """Say which column is what; raise `UserError` where one is missing, or where several may be the same."""
        if strange := set(chosen) - {*ROLES, KEEP}:
            raise unknown("role of a column", min(strange), [*ROLES, KEEP])
        places = {
            role: place for role in ROLES if (place := _find_role(table, file, role, chosen.get(role))) is not None
        }
        boxes, corners = _find_boxes(table, file, places.pop("box", None), chosen)
        for role in ("path", "label"):
            if role not in places:
                pixels = "pixels" in map(_key, table.columns)
                hint = "read it with `cafe data index fer2013`" if pixels and role == "path" else (
                    f"name one of them {', '.join(ROLES[role])}, or say which it is with --column {role}=NAME"
                )  # fmt: skip
                raise UserError(f"{file} has no column for the {role} (found {', '.join(table.columns)}): {hint}.")
        taken = {*places.values(), *boxes}
        classes = ({spell_name(as_text(row[places["label"]]) or "") for row in table.rows} | {*EIGHT}) - {""}
        others = [(name, place) for place, name in enumerate(table.columns) if place not in taken]
        votes = _name_votes([(name, place) for name, place in others if spell_name(name) in classes], file)
        kept = _find_kept(table, file, chosen.get(KEEP, ""))
        unread = tuple(name for name, _ in others if name and name not in votes and name not in kept)
        return cls(places, boxes, corners, votes, kept, unread)

    def name(self, table: Cells) -> str:
        """Say which columns are read as what."""
        named = [
            role if _key(table.columns[place]) == role else f"{table.columns[place]} as {role}"
            for role, place in self.places.items()
        ]
        return ", ".join([*named, *(["face boxes"] if self.boxes else []), *self.votes, *self.kept])


def _key(name: str) -> str:
    return re.sub(r"[\s_.-]+", "_", name.strip().casefold())


def _find_role(table: Cells, file: UPath, role: str, chosen: str | None) -> int | None:
    """Return the place of the column of a role, None without one; `chosen` names it, or is empty where there is none."""
    if chosen is not None:
        if not chosen:
            return None
        found = _find_named(table, file, chosen)
    else:
        found = [place for place, name in enumerate(table.columns) if _key(name) in ROLES[role]]
    if len(found) > 1:
        first, second = (table.columns[place] for place in found[:2])
        raise UserError(
            f"{file} has the column {second!r} besides {first!r}, and either may be the {role}: keep one of them, or choose "
            f"with --column {role}=NAME."
        )
    return found[0] if found else None


def _find_named(table: Cells, file: UPath, chosen: str) -> list[int]:
    """Return the places of the columns of a name, in any case where none is written so; raise `UserError` without any."""
    found = [place for place, name in enumerate(table.columns) if name == chosen]
    found = found or [place for place, name in enumerate(table.columns) if _key(name) == _key(chosen)]
    if not found:
        raise unknown(f"column of {file}", chosen, table.columns)
    return found


def _find_kept(table: Cells, file: UPath, chosen: str) -> dict[str, int]:
    """Return the places of the columns to keep, `NAME,NAME,…`; raise `UserError` for what no manifest can hold."""
    kept: dict[str, int] = {}
    for wanted in filter(None, (name.strip() for name in chosen.split(","))):
        place, *others = _find_named(table, file, wanted)
        if others:
            raise UserError(f"{file} has {1 + len(others)} columns that are called {wanted!r}: rename all but one.")
        name = check_encoded(table.columns[place])
        if name in SCHEMA.names:
            raise UserError(
                f"The column {name!r} of {file} cannot be kept, since every manifest has one of its own: rename it."
            )
        kept[name] = place
    return kept


def _find_boxes(
    table: Cells, file: UPath, place: int | None, chosen: Mapping[str, str]
) -> tuple[tuple[int, ...], bool]:
    """Return the places of the columns of the face boxes, and whether they are corners; none for whole pictures."""
    if "box" in chosen or place is not None:
        return (() if place is None else (place,)), False
    keys = [_key(name) for name in table.columns]
    forms = [(names, form is CORNERS) for form in (SIDES, CORNERS) for names in form if set(names) <= set(keys)]
    if len(forms) > 1 or any(keys.count(name) > 1 for names, _ in forms for name in names):
        raise UserError(
            f"{file} has face boxes in two ways ({' and '.join('/'.join(names) for names, _ in forms)}): keep one of them, "
            "or read whole pictures with --column box=."
        )
    if not forms and DOUBTFUL_BOX in keys:
        raise UserError(
            f"{file} has a column {DOUBTFUL_BOX!r}, which may be a corner and two sides or two corners: say --column "
            f"box={DOUBTFUL_BOX} where it is left, top, width, height, or read whole pictures with --column box=."
        )
    return (tuple(keys.index(name) for name in forms[0][0]), forms[0][1]) if forms else ((), False)


def _name_votes(columns: Sequence[tuple[str, int]], file: UPath) -> dict[str, int]:
    """Return the places of the columns of votes; raise `UserError` for two of one class: one would count, or both."""
    first: dict[str, str] = {}
    for column, _ in columns:
        name = ALIASES.get(normalise_name(column), normalise_name(column))
        if name in first:
            raise UserError(
                f"{file} has the column {column!r} besides {first[name]!r}, which means the same: keep one of them."
            )
        first[name] = column
    return dict(columns)


def read_table(file: UPath, root: UPath | None = None, columns: Mapping[str, str] | None = None) -> Listing:
    """List the faces of a CSV, JSON-lines or Parquet table of path and label, perhaps split, group, face boxes and votes.

    `columns` says which column has a role, where its name does not. Columns named after classes say how many people chose
    each; all others play no part.

    Paths are absolute, or relative to `root`, by default the folder of the table. Without a `root`, absolute paths make the
    deepest folder that holds all pictures the root. A face listed twice with equal cells counts once. Raises `UserError` for
    a missing column, an empty cell, an unknown split, a path that leads out of the root, and for faces that are
    listed with different cells, all of them named.
    """
    table = Cells.load(file)
    roles = Roles.find(table, file, columns or {})
    root, rows = _place(Spool(read_faces(table, roles, file)), file, root)
    found = Listing(root, "table", f"table of {roles.name(table)}", unread=roles.unread, tables=(str(file),))
    list_faces(found, rows, file)
    if wrong := Levels(root, Spool(row.path for row in found.files), EIGHT).contradict(found.files):
        found.notes.append(
            f"{len(wrong):,} faces lie in a folder of another expression than their label says, such as {wrong[0].path}, "
            f"labelled {wrong[0].expression!r}: the label counts"
        )
    return found


def list_faces(found: Listing, rows: Sequence[LabelledFile], file: object) -> None:
    """Add the faces of a table to a listing: each once, with a sample of its own where a picture shows several.

    Without splits of its own, a table whose pictures all lie in folders of splits takes those.
    """
    named = Spool((row.path, _name_sample(row), row.split) for row in rows)  # what is gone through often, by itself
    if not any(split for *_, split in named) and "" not in Counter(find_split(path) for path, *_ in named):
        rows = Spool(replace(row, split=find_split(row.path)) for row in rows)
    last, repeated = mark_repeated(sample for _, sample, _ in named)
    several = (
        (_name_sample(row), replace(row, expression=_spell_label(row.expression)), row.where)
        for row in (compress(rows, repeated) if repeated.any() else ())
    )
    found.repeated += merge_repeated(several, file)
    _, shared = mark_repeated(path for path, *_ in compress(named, last))
    for row, is_shared in zip(compress(rows, last), shared, strict=True):
        if row.box and min(row.box[2:]) <= 0:
            found.reject(row.where, "has no face box", row.expression)
        else:
            found.files.append(replace(row, sample=row.sample or (_name_sample(row) if is_shared else "")))


def _spell_label(label: str) -> str:
    """Return one spelling of all that mean the same expression; of other names numbers may be all that tells them apart."""
    known = spell_name(label)
    return known if known in EIGHT else join_words(label)


def _name_sample(row: LabelledFile) -> str:
    return f"{row.path}@{','.join(map(str, row.box))}" if row.box else row.path


def read_faces(table: Cells, roles: Roles, file: UPath) -> Iterator[LabelledFile]:
    """Yield the faces that the rows of a table name, their paths as they stand."""
    return (_read_row(row, roles, number, file) for number, row in enumerate(table.rows, start=1))


def _read_row(row: Sequence[object], roles: Roles, number: int, file: UPath) -> LabelledFile:
    where = f"Row {number} of {file}"
    cells = {role: as_text(row[place]) for role, place in roles.places.items()}
    path, label, split = cells["path"], cells["label"], cells.get("split")
    if path is None or label is None:
        raise UserError(f"{where} has no path or no label: fill it in or remove the row.")
    path = path.replace("\\", "/")
    if ".." in path.split("/") or DRIVE.match(path):
        raise UserError(f"{where} has the path {cells['path']!r}: write it without '..' and drives, absolute or relative to "
                        "--root.")  # fmt: skip
    known = {**SPLIT_NAMES, **USAGES}
    if split is not None and split.lower() not in known:
        raise UserError(
            f"{where} has the unknown split {split!r}: write {', '.join(SPLITS)}, or leave the column out with --column "
            "split=."
        )
    return LabelledFile(
        path,
        label,
        "" if split is None else known[split.lower()],
        cells.get("group"),
        _read_box([row[place] for place in roles.boxes], roles.corners, where) if roles.boxes else None,
        where=f"row {number}",
        votes={name: _read_count(row[place], f"{where} has for {name!r}") for name, place in roles.votes.items()},
        kept={
            name: check_encoded(text) for name, place in roles.kept.items() if (text := as_text(row[place])) is not None
        },
    )


def _read_box(cells: Sequence[object], corners: bool, where: str) -> Box:
    """Return left, top, width and height; of no size where all cells are empty."""
    if len(cells) == 1:
        cells = _split_box(cells[0])
    texts = [as_text(cell) for cell in cells]
    if not any(text is not None for text in texts):
        return 0, 0, 0, 0
    try:
        numbers = [float(text or "") for text in texts]
        if max(numbers) <= 1 and any(number % 1 for number in numbers):
            raise ValueError("shares of the picture")
        left, top, third, fourth = map(round, numbers)
    except (ValueError, OverflowError):
        raise UserError(
            f"{where} has the face box {', '.join(map(str, texts))}: write four numbers of pixels."
        ) from None
    return (left, top, third - left, fourth - top) if corners else (left, top, third, fourth)


def _split_box(cell: object) -> Sequence[object]:
    """Return the numbers of a box in one cell: a list, or the text of one."""
    if isinstance(cell, str):
        return [text for text in re.split(r"[\s,;]+", cell.strip("[]() ")) if text]
    return list(cell) if isinstance(cell, Iterable) else [cell]


def _read_count(cell: object, what: str) -> int:
    """Return how many people chose a class; an empty cell says nobody."""
    text = as_text(cell)
    if text is None:
        return 0
    try:
        count = float("nan" if isinstance(cell, bool) else text)
        if 0 <= count < MOST_VOTES and count.is_integer():
            return int(count)
    except ValueError:
        pass
    raise UserError(f"{what} {cell!r}: write how many people chose it, a whole number from 0.")


def _place(rows: Sequence[LabelledFile], file: UPath, root: UPath | None) -> tuple[UPath, Sequence[LabelledFile]]:
    """Return the root of the pictures and the rows with their paths below it."""
    paths = Spool(row.path for row in rows)
    if any("://" in path for path in paths):
        return _place_addresses(rows, file, root)
    home = base = root or file.parent
    places = (PurePosixPath(home.path, path) for path in paths)  # an absolute path stays as it is
    outside = next((place for place in places if not place.is_relative_to(home.path)), None)
    if outside and root is None:
        folder = _find_common(str(PurePosixPath(home.path, path).parent) for path in paths)
        base = UPath(folder, protocol=home.protocol, **home.storage_options)
    elif outside:
        raise UserError(f"{file} lists {outside}, which is not in {base}: give a --root that holds all its pictures.")
    inside = (str(PurePosixPath(home.path, path).relative_to(base.path)) for path in paths)
    return base, Spool(replace(row, path=path) for row, path in zip(rows, inside, strict=True))


def _find_common(folders: Iterable[str]) -> str:
    """Return the deepest folder that holds all of some; raise as `posixpath.commonpath` does."""
    return posixpath.commonpath([reduce(lambda common, folder: posixpath.commonpath([common, folder]), folders)])


def _place_addresses(
    rows: Sequence[LabelledFile], file: UPath, root: UPath | None
) -> tuple[UPath, Sequence[LabelledFile]]:
    """Return the deepest address that all pictures lie below, that of a protocol alone for several servers or buckets.

    Raises `UserError` where not all are addresses of one protocol, for one that nothing here reads, and as `locate` does
    for what a file may not ask.
    """
    first = rows[0].path
    protocol = first.partition("://")[0] if "://" in first else ""
    for row in rows:
        if protocol != (row.path.partition("://")[0] if "://" in row.path else ""):
            raise UserError(
                f"{file} has {first} and, in {row.where}, {row.path}: give every kind of place a table of its own."
            )
    locate(first)  # whether such addresses may be asked
    if root is None:
        folder = _find_common(posixpath.dirname(row.path.partition("://")[2]) for row in rows)
        root = locate(f"{protocol}://{folder}")
    start = str(root).partition("://")[2].strip("/")
    for row in rows:
        if start and not row.path.partition("://")[2].startswith(f"{start}/"):
            raise UserError(
                f"{file} lists {row.path}, which is not in {root}: give a --root that holds all its pictures."
            )
    paths = (row.path.partition("://")[2] for row in rows)
    inside = (path.removeprefix(f"{start}/") if start else path for path in paths)
    return root, Spool(replace(row, path=path) for row, path in zip(rows, inside, strict=True))
