"""A manifest: one row per face of one data set, kept as a plain Parquet file.

It fixes once what every later step relies on: which faces there are, their labels and their split.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, Protocol, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, Field, ValidationError
from upath import UPath

from cafe.addresses import OBJECT_STORES, WEB
from cafe.data.expressions import EXPRESSIONS, check_classes
from cafe.data.images import (
    MAX_PIXELS,
    Box,
    MissingImageError,
    UnreadableImageError,
    clip_box,
    decode_image,
    read_bytes,
)
from cafe.data.packed.archives import Span
from cafe.errors import UserError
from cafe.files import OUTSIDE, check_encoded, find_below, locate, write_file
from cafe.seals import encode_table, read_table

SPLITS = ("train", "val", "test")
READERS = 16  # threads that wait for the disk or the network
AT_ONCE = 16  # items a thread takes at a time: scheduling 300,000 single files would cost more than reading them
ROWS_AT_ONCE = 2**16  # that are hashed
AHEAD = 2048  # results computed ahead, so that memory does not grow with the data set
PICTURES_AHEAD = 8  # decoded ones, each of which may take half a gigabyte

Item = TypeVar("Item")
Result = TypeVar("Result")

SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),  # stable under moving the folder: the path below its root
        ("path", pa.string()),  # relative to the root; of a member of an archive as if that were a folder
        ("label", pa.int8()),  # index into the class set
        ("split", pa.string()),
        ("group", pa.string()),  # identity, film or session that must not be split; may be null
        ("width", pa.int32()),  # of the face: of its box when it has one
        ("height", pa.int32()),
        ("digest", pa.string()),  # SHA-256 of the file, or of the member
        ("box", pa.list_(pa.int32())),  # left, top, width, height of the face in its picture; null: all of it
        ("votes", pa.list_(pa.int32())),  # how many people chose each class, in their order; null: not known
        (
            "span",
            pa.list_(pa.int64()),
        ),  # where in its archive it lies (`cafe.data.packed.archives`); null: a file by itself
    ]
)
YOUNGER = ("votes", "span")  # columns that files of before lack
REQUIRED = ("sample_id", "path", "label", "split", "width", "height", "digest")
NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]*"  # of a manifest: that of its file, of folders and of metrics


class Header(BaseModel):
    """What a manifest's file says besides its rows, as JSON in its Parquet metadata."""

    version: Literal[2]
    name: str = Field(pattern=f"^{NAME}$")
    root: str
    kind: str = ""
    expressions: tuple[str, ...] = EXPRESSIONS
    parted: bool = False  # of files of before it is not known, so that they are evaluated as they were


@dataclass(frozen=True)
class Face:
    """One row; `split` is empty until the data set gives one or `assign_splits` makes one."""

    sample_id: str
    path: str
    label: int
    split: str
    group: str | None
    width: int
    height: int
    digest: str
    box: Box | None = None
    votes: tuple[int, ...] | None = None
    span: Span | None = None
    kept: Mapping[str, str] = field(default_factory=dict)  # further columns, such as sex or age, by their names


class Pictures(Protocol):
    """Faces by their rows, as whatever decodes them asks for them: those of a manifest, or pictures in memory."""

    @property
    def sample_ids(self) -> list[str]:
        """The sample_id of every row."""

    @property
    def labels(self) -> np.ndarray:
        """The label of every row, (N,) int64."""

    def path(self, row: int) -> UPath:
        """Where the image of a row lies."""

    @property
    def remote(self) -> bool:
        """Whether any of them lies in an object store."""

    def fetch(self, row: int) -> bytes:
        """Return the bytes of a face's picture, none where they are not needed."""

    def decode_face(self, row: int, data: bytes, channels: str = "rgb", max_pixels: int = MAX_PIXELS) -> np.ndarray:
        """Return the pixels of a face as `read_face` does, from what `fetch` returned."""

    def read_face(self, row: int, channels: str = "rgb", max_pixels: int = MAX_PIXELS) -> np.ndarray:
        """Return the pixels of a face (H, W, 3) uint8 in the order of colours `rgb` or `bgr`."""


@dataclass(frozen=True)
class Manifest:
    """The faces of one data set: `table` follows `SCHEMA`, `root` is the folder or URI its paths are relative to.

    Behind the columns of `SCHEMA` there may be others of text, `kept` from a table: of a face's sex, age, camera, ….
    `kind` says which data set it is (`rafdb`, `sfew`, …), on which the protocols of evaluation depend; `classes` are the
    names of its classes, into which labels are indices. `parted` tells that the set came without splits: those it has were
    made, so that there is no reason to evaluate on a part of it what never saw any of it.
    """

    name: str
    root: str
    table: pa.Table
    kind: str = ""
    classes: tuple[str, ...] = EXPRESSIONS
    parted: bool = False

    def __repr__(self) -> str:
        return (
            f"<Manifest {self.name}: {len(self):,} faces of {len(self.classes)} classes, {self.kind or 'no known set'}>"
        )

    @classmethod
    def from_faces(
        cls,
        name: str,
        root: str,
        faces: Iterable[Face],
        kind: str = "",
        classes: tuple[str, ...] = EXPRESSIONS,
        parted: bool = False,
    ) -> Manifest:
        """Sort by sample_id; raise `UserError` naming all that several faces share, and a name that is no UTF-8."""
        rows = sorted(faces, key=lambda face: face.sample_id)
        for text in (root, *(face.path for face in rows), *(face.group or "" for face in rows)):
            check_encoded(text)
        kept = list(dict.fromkeys(column for face in rows for column in face.kept))
        repeated = [sample for sample, count in Counter(face.sample_id for face in rows).items() if count > 1]
        if repeated:
            raise UserError(
                f"{name!r} lists {len(repeated)} samples more than once, {', '.join(repeated)}: keep one row of each."
            )
        table = pa.Table.from_pylist([vars(face) for face in rows], schema=SCHEMA)
        for column in kept:
            table = table.append_column(column, pa.array([face.kept.get(column) for face in rows], pa.string()))
        return cls(name, root, table, kind, classes, parted)

    @classmethod
    def load(cls, path: UPath) -> Manifest:
        """Read a manifest file; raise `UserError` when it is none, of another version or name, or not what was written."""
        try:
            table = read_table(path, "write it again with `cafe data index`")
            header = Header.model_validate_json(table.schema.metadata[b"cafe.manifest"])
            for name in YOUNGER:
                if name not in table.column_names:
                    table = table.append_column(name, pa.nulls(len(table), SCHEMA.field(name).type))
            own = table.schema
            kept = [one.name for one in own if pa.types.is_string(one.type) and one.name not in SCHEMA.names]
            schema = pa.schema([*SCHEMA, *(pa.field(column, pa.string()) for column in kept)])
            table = table.select(schema.names).cast(schema)
        except (pa.ArrowException, OSError, KeyError, TypeError, ValidationError):
            raise UserError(f"{path} is not a manifest of version 2: write it again with `cafe data index`.") from None
        if f"{header.name}.parquet" != path.name:
            raise UserError(f"{path} holds the manifest {header.name!r}: name the file {header.name}.parquet.")
        if fault := _find_fault(table, header.expressions):
            raise UserError(f"{path} is a damaged manifest ({fault}): write it again with `cafe data index`.")
        return cls(header.name, header.root, table, header.kind, header.expressions, header.parted)

    def save(self, path: UPath) -> None:
        """Write the manifest as Parquet."""
        header = Header(
            version=2, name=self.name, root=self.root, kind=self.kind, expressions=self.classes, parted=self.parted
        )
        table = self.table.replace_schema_metadata({"cafe.manifest": header.model_dump_json()})
        write_file(path, encode_table(table))

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @cached_property
    def sample_ids(self) -> list[str]:
        """The sample_id of every row."""
        return [str(value) for value in self.table["sample_id"].to_pylist()]

    @cached_property
    def labels(self) -> np.ndarray:
        """The label of every row, (N,) int64."""
        return np.asarray(self.table["label"].to_numpy(), dtype=np.int64)

    @property
    def kept(self) -> list[str]:
        """The names of the columns that were kept from a table."""
        return [name for name in self.table.column_names if name not in SCHEMA.names]

    @cached_property
    def votes(self) -> np.ndarray | None:
        """How many people chose each class of every row, (N, K) int64, all 0 where that is not known; None for no face."""
        column = self.table["votes"]
        if column.null_count == len(column):
            return None
        votes = np.zeros((len(self), len(self.classes)), np.int64)
        votes[column.is_valid().to_numpy()] = pc.list_flatten(column).to_numpy().reshape(-1, len(self.classes))
        return votes

    def name_classes(self, rows: np.ndarray) -> np.ndarray:
        """Return the names of the classes of some rows, (n,) of text."""
        names: np.ndarray = np.array(self.classes)[self.labels[rows]]
        return names

    def survey(
        self,
        rows: Sequence[int] | np.ndarray,
        look: Callable[[np.ndarray], Result],
        progress: Callable[[int, int], None] = lambda done, total: None,
        max_pixels: int = MAX_PIXELS,
    ) -> Iterator[tuple[int, Result | UnreadableImageError]]:
        """Yield (row, what `look` returns of its pixels) in order, with the error in place of an unreadable picture.

        Pictures are decoded on threads, those of more than `max_pixels` not at all; `progress(done, total)` counts them.
        """

        def look_at(row: int) -> tuple[int, Result | UnreadableImageError]:
            try:
                return row, look(self.read_face(row, max_pixels=max_pixels))
            except UnreadableImageError as error:
                return row, error

        for done, result in enumerate(map_threads(look_at, [int(row) for row in rows], 1, PICTURES_AHEAD), start=1):
            yield result
            progress(done, len(rows))

    def path(self, row: int) -> UPath:
        """Where the image of a row lies."""
        path: str = self.table["path"][row].as_py()
        return find_below(self._folder, path)

    @property
    def remote(self) -> bool:
        """Whether its pictures lie in an object store or on a server."""
        return self._folder.protocol in (*OBJECT_STORES, *WEB)

    @cached_property
    def _folder(self) -> UPath:
        return locate(self.root)

    def read_face(self, row: int, channels: str = "rgb", max_pixels: int = MAX_PIXELS) -> np.ndarray:
        """Return the pixels of a face (H, W, 3) uint8, cut out of its picture when the row has a box.

        `channels` is the order of the colours, `rgb` or `bgr`. Raises `UnreadableImageError`, and `UserError` for a file
        that is not the one that was indexed.
        """
        try:
            return self.decode_face(row, self.fetch(row), channels, max_pixels)
        except UnreadableImageError as error:
            error.add_note(f"The picture is {self.path(row)}.")  # its message is the reason alone, as records keep it
            raise

    def fetch(self, row: int) -> bytes:
        """Return the bytes of a face's picture; raise as `read_face` does."""
        span = self.table["span"][row].as_py()
        try:
            return read_bytes(self.path(row), span)
        except UnreadableImageError as error:
            if span is None or isinstance(error, MissingImageError):
                raise
            raise self._changed(row) from None  # it could be read when it was indexed

    def decode_face(self, row: int, data: bytes, channels: str = "rgb", max_pixels: int = MAX_PIXELS) -> np.ndarray:
        """Return the pixels of a face as `read_face` does, from the bytes of its picture."""
        digest = self.table["digest"][row].as_py()
        if digest and hashlib.sha256(data).hexdigest() != digest:  # photos that were only listed have none
            raise self._changed(row)
        image = decode_image(data, max_pixels)
        if box := self.table["box"][row].as_py():
            left, top, width, height = clip_box(box, image.shape[1], image.shape[0])
            image = image[top : top + height, left : left + width]
        return image if channels == "rgb" else image[..., ::-1]

    def _changed(self, row: int) -> UserError:
        return UserError(f"{self.path(row)} has changed since it was indexed: index {self.name!r} again.")

    def rows(self, split: str) -> np.ndarray:
        """The row numbers of a split, or of `all`, in manifest order."""
        if split == "all":
            return np.arange(len(self))
        return np.flatnonzero(pc.equal(self.table["split"], split).to_numpy())

    @cached_property
    def digest(self) -> str:
        """A digest of all but where the files lie: samples, labels, splits, groups, contents.

        Labels count by what they mean, so that the same faces are the same in whatever class set they were indexed. Votes
        do not count, for a run that learns from them names them besides, nor columns that were kept.
        """
        table, place = self.table, self.table.column_names.index("label")
        if self.classes != EXPRESSIONS:
            named = self.name_classes(np.arange(len(self))).tolist()
            seven = {name: label for label, name in enumerate(EXPRESSIONS)}
            labels = pa.array([seven[name] for name in named] if seven.keys() >= set(named) else named)
            table = table.set_column(place, "label", labels)
        return _digest(table, ("sample_id", "label", "split", "group", "digest", "box"))

    @cached_property
    def image_digest(self) -> str:
        """A digest of the images alone: what a frozen feature depends on."""
        return _digest(self.table, ("sample_id", "digest", "box"))


def map_threads(
    function: Callable[[Item], Result], items: Sequence[Item], at_once: int = AT_ONCE, ahead: int = AHEAD
) -> Iterator[Result]:
    """Yield `function(item)` in order, computed on threads, each of which takes some items at once, and no further ahead."""

    def map_some(start: int) -> list[Result]:
        return [function(item) for item in items[start : start + at_once]]

    waiting = deque[Future[list[Result]]]()
    with ThreadPoolExecutor(READERS) as pool:
        for start in range(0, len(items), at_once):
            waiting.append(pool.submit(map_some, start))
            if len(waiting) * at_once >= ahead:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()


def _digest(table: pa.Table, columns: Sequence[str]) -> str:
    """Hash the columns that say something: one that is empty in every row changes nothing, so that new ones can be added."""
    digest = hashlib.sha256()
    for column in columns:
        if table[column].null_count == len(table):
            continue
        digest.update(f"[{json.dumps(column)}, [".encode())
        for start in range(0, len(table), ROWS_AT_ONCE):  # a list of all rows would take gigabytes
            part = json.dumps(table[column].slice(start, ROWS_AT_ONCE).to_pylist())[1:-1]
            digest.update((", " * (start > 0) + part).encode())
        digest.update(b"]]")
    return digest.hexdigest()


def _find_fault(table: pa.Table, classes: tuple[str, ...]) -> str:
    """Return what is wrong with the classes and rows of a manifest's file, empty when nothing is."""
    try:
        check_classes(classes)
    except UserError as error:
        return str(error).rstrip(".")
    if empty := [name for name in REQUIRED if table[name].null_count]:
        return f"empty cells in {empty[0]!r}"
    if pc.any(pc.equal(pc.utf8_trim_whitespace(table["digest"]), "")).as_py():  # replaced pictures would not be noticed
        return "a face without the SHA-256 of its file in 'digest'"
    if pc.any(pc.match_substring_regex(table["path"], OUTSIDE.pattern)).as_py():
        return "a path that leads out of its root"
    lengths = pc.list_value_length(table["votes"])
    if not pc.all(pc.equal(lengths, len(classes)), min_count=0).as_py():
        return "votes for another number of classes"
    if pc.any(pc.less(pc.list_flatten(table["votes"]), 0)).as_py():
        return "fewer than no votes"
    sides = pc.list_value_length(table["box"])
    whole = pc.list_flatten(table["box"]).null_count == 0
    if not whole or pc.all(pc.equal(sides, 4)).as_py() is False:
        return "a box that is not left, top, width and height"
    spans = pc.list_flatten(table["span"])
    if spans.null_count or not pc.all(pc.is_in(pc.list_value_length(table["span"]), pa.array([2, 3, None]))).as_py():
        return "a place in an archive that is not two or three numbers"
    if pc.any(pc.less(spans, 0)).as_py():
        return "a place in an archive before its beginning"
    if pc.count_distinct(table["sample_id"]).as_py() < len(table):
        return "a sample listed twice"
    known = (("split", pa.array(SPLITS)), ("label", pa.array(range(len(classes)), pa.int8())))
    strange = [name for name, values in known if not pc.all(pc.is_in(table[name], values)).as_py()]
    return f"an unknown {strange[0]}" if strange else ""


def assign_splits(faces: Sequence[Face], test_fraction: float = 0.2) -> list[Face]:
    """Give every face without a split `train` or `test`, stratified by label and repeatable everywhere."""
    without = [position for position, face in enumerate(faces) if not face.split]
    units = [_unit(faces[position].group, faces[position].digest) for position in without]
    result = list(faces)
    test = hold_out(units, [faces[position].label for position in without], test_fraction)
    for position, is_test in zip(without, test, strict=True):
        result[position] = replace(faces[position], split="test" if is_test else "train")
    return result


def hold_out_rows(manifest: Manifest, rows: np.ndarray, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Part some rows of a manifest into those to keep and those held out, whole groups, stratified by label.

    The manifest remembers what was held out: a sweep asks hundreds of times, and each takes a fifth of a second.
    """
    known: dict[tuple[bytes, float], np.ndarray] = vars(manifest).setdefault("_held_out", {})
    held = known.get((rows.tobytes(), fraction))
    if held is None:
        groups, digests = (manifest.table[column].to_pylist() for column in ("group", "digest"))
        held = hold_out([_unit(groups[row], digests[row]) for row in rows], manifest.labels[rows].tolist(), fraction)
        known[rows.tobytes(), fraction] = held
    return rows[~held], rows[held]


def thin_training(manifest: Manifest, faces: int) -> Manifest:
    """Return a manifest with at most `faces` training faces, in the expressions' proportions; other splits stay whole.

    Faces are taken in the order of the hash of their sample_id, the same everywhere.
    """
    rows = manifest.rows("train")
    order = sorted(rows, key=lambda row: hashlib.sha256(manifest.sample_ids[row].encode()).digest())
    left_out = set(rows)
    for label, count in _share_out(Counter(manifest.labels[rows].tolist()), faces).items():
        left_out -= set([row for row in order if manifest.labels[row] == label][:count])
    return replace(manifest, table=manifest.table.take([row for row in range(len(manifest)) if row not in left_out]))


def _share_out(counts: Counter[int], total: int) -> dict[int, int]:
    """Return what each class gets of a total in proportion to its count, whole numbers by the largest remainder."""
    total = min(total, counts.total())
    exact = {label: total * count / counts.total() for label, count in counts.items()}
    shares = {label: int(share) for label, share in exact.items()}
    by_remainder = sorted(exact, key=lambda label: (shares[label] - exact[label], label))
    for label in by_remainder[: total - sum(shares.values())]:
        shares[label] += 1
    return shares


def _unit(group: str | None, digest: str) -> str:
    return f"group {group}" if group else f"image {digest}"


def hold_out(units: Sequence[str], labels: Sequence[int], fraction: float) -> np.ndarray:
    """Choose which samples to hold out, (n,) bool, by nothing but the names of their units.

    Samples of one unit (a group or, without a group, identical content) stay together. Units are taken in the order of
    their hash until a class has its share, so that adding samples later moves hardly any other.
    """
    members: dict[str, list[int]] = {}
    for position, unit in enumerate(units):
        members.setdefault(unit, []).append(position)
    quota = Counter({label: max(round(fraction * n), min(1, n - 1)) for label, n in Counter(labels).items()})
    held = np.zeros(len(units), bool)
    for unit in sorted(members, key=lambda unit: hashlib.sha256(unit.encode()).digest()):
        counts = Counter(labels[position] for position in members[unit])
        # A group is held out while at least half of it is still wanted there.
        wanted = sum(min(n, quota[label]) for label, n in counts.items())
        if 2 * wanted >= counts.total():
            held[members[unit]] = True
            quota = Counter({label: max(0, n - counts[label]) for label, n in quota.items()})
    return held
