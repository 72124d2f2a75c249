"""A manifest: one row per face of one data set, kept as a plain Parquet file.

It fixes once what every later step relies on: which faces there are, their labels and their split.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby
from operator import attrgetter, itemgetter
from typing import Literal, Protocol, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, Field, ValidationError
from upath import UPath

from cafe.addresses import OBJECT_STORES, WEB
from cafe.data.expressions import EXPRESSIONS
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
from cafe.data.rows import (
    LARGE,
    REMEDY,
    ROWS_AT_ONCE,
    SCHEMA,
    Columns,
    RowFile,
    RowFiles,
    complete_rows,
    digest_rows,
    find_fault,
    is_empty,
    keep_files,
    write_files,
)
from cafe.errors import UserError
from cafe.files import check_encoded, find_below, is_encoded, locate, write_file
from cafe.seals import encode_table, read_table
from cafe.spool import cut, sort
from cafe.threads import map_threads

TEST_SHARE = 0.2  # of a set that comes without splits
PICTURES_AHEAD = 8  # decoded ones, each of which may take half a gigabyte

Result = TypeVar("Result")

FACE: Columns = ("sample_id", "label", "split", "group", "digest", "box")  # what the digests are of
IMAGE: Columns = ("sample_id", "digest", "box")
NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]*"  # of a manifest: that of its file, of folders and of metrics


class Header(BaseModel):
    """What a manifest's file says besides its rows, as JSON in its Parquet metadata.

    In version 3 its rows are the list of the files that hold those of a large manifest, whose digests it says as well.
    """

    version: Literal[2, 3]
    name: str = Field(pattern=f"^{NAME}$")
    root: str
    kind: str = ""
    expressions: tuple[str, ...] = EXPRESSIONS
    parted: bool = False  # older files do not say: they are evaluated as they were
    digest: str | None = None
    image_digest: str | None = None
    kept: tuple[str, ...] | None = None  # of the columns of a large one those that were kept from a table


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

    def decode_face(self, row: int, data: bytes, channels: str, max_pixels: int) -> np.ndarray:
        """Return the pixels of a face as `read_face` does, from what `fetch` returned."""

    def read_face(self, row: int, channels: str = "rgb", max_pixels: int = MAX_PIXELS) -> np.ndarray:
        """Return the pixels of a face (H, W, 3) uint8 in the order of colours `rgb` or `bgr`."""


@dataclass(frozen=True)
class Manifest:
    """The faces of one data set: `table` follows `SCHEMA`, `root` is the folder or URI its paths are relative to.

    Behind the columns of `SCHEMA` there may be others of text, `kept` from a table: of a face's sex, age, camera, ….
    `kind` says which data set it is (`rafdb`, `sfew`, …), on which the protocols of evaluation depend; `classes` are the
    names of its classes, into which labels are indices. `parted` tells that the set came without splits: those it has were
    made, so that there is no reason to evaluate on a part of it what never saw any of it. The rows of a `large` one stay in
    their files: a column of `table` is read when it is asked for, and `read` returns some rows.
    """

    name: str
    root: str
    table: pa.Table | RowFiles
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
        place: UPath | None = None,
    ) -> Manifest:
        """Sort by sample_id; raise `UserError` naming all that several faces share, and a name that is no UTF-8.

        The rows of a large manifest are written beside its `place`, if that is given, to be saved there.
        """
        check_encoded(root)
        rows = sort(faces, attrgetter("sample_id"))
        kept = _check_faces(name, rows)
        tables = (_tabulate(some, kept) for some in cut(rows, ROWS_AT_ONCE))
        if place is not None and len(rows) > LARGE:
            return cls(name, root, write_files(place, tables, classes), kind, classes, parted)
        table = pa.concat_tables([_tabulate([], kept), *tables]).combine_chunks()
        return cls(name, root, table, kind, classes, parted)

    @classmethod
    def load(cls, path: UPath) -> Manifest:
        """Read a manifest file, of a large one the list of the files that hold its rows.

        Raises `UserError` when it is none, of another version or name, or not what was written.
        """
        try:
            table = read_table(path, REMEDY)
            header = Header.model_validate_json(table.schema.metadata[b"cafe.manifest"])
            rows = (
                RowFiles.listed(table, path, header.expressions, header.kept or ())
                if header.version == 3
                else complete_rows(table)
            )
        except (pa.ArrowException, OSError, KeyError, TypeError, ValidationError):
            raise UserError(f"{path} is not a manifest of version 2 or 3: {REMEDY}.") from None
        if f"{header.name}.parquet" != path.name:
            raise UserError(f"{path} holds the manifest {header.name!r}: name the file {header.name}.parquet.")
        if fault := find_fault(table if header.version == 3 else rows, header.expressions):
            raise UserError(f"{path} is a damaged manifest ({fault}): {REMEDY}.")
        manifest = cls(header.name, header.root, rows, header.kind, header.expressions, header.parted)
        known = {"digest": header.digest, "image_digest": header.image_digest}
        vars(manifest).update({name: value for name, value in known.items() if value})
        return manifest

    def save(self, path: UPath) -> None:
        """Write the manifest as Parquet: first the files of the rows of a large one, then the one file that is the manifest.

        So a kill leaves the manifest that was there before, whose own files go last.
        """
        header = Header(
            version=2, name=self.name, root=self.root, kind=self.kind, expressions=self.classes, parted=self.parted
        )
        files: Sequence[RowFile] = ()
        if len(self) > LARGE:
            rows = self._write_rows(path)
            whole, images = replace(self, table=rows).digests()
            known = {"digest": whole, "image_digest": images, "kept": rows.kept}
            header = header.model_copy(update={"version": 3, **known})
            table, files = rows.write_list(), rows.files
        else:
            table = self.read(range(len(self)))
        about = {"cafe.manifest": header.model_dump_json(exclude_none=True)}
        write_file(path, encode_table(table.replace_schema_metadata(about)))
        keep_files(path, files)

    def _write_rows(self, path: UPath) -> RowFiles:
        if not isinstance(self.table, RowFiles):
            return write_files(path, [self.table], self.classes)
        lies_there = self.table == RowFiles.of(path, self.table.files, self.classes, self.table.kept)
        return self.table if lies_there else write_files(path, self.table.pieces(), self.classes)

    @property
    def large(self) -> bool:
        """Whether its rows lie in several files, and not in memory."""
        return isinstance(self.table, RowFiles)

    def read(self, rows: range) -> pa.Table:
        """Return neighbouring rows in memory."""
        some = self.table.slice(rows.start, len(rows))
        return some.read() if isinstance(some, RowFiles) else some

    def outline(self) -> Manifest:
        """Return this manifest for another process, without its rows: `pack` brings them there."""
        return replace(self, table=self.table if self.large else self.table.slice(0, 0))

    def pack(self, rows: range) -> bytes:
        """Return what the outline needs to `unpack` neighbouring rows: them, or nothing where it reads them itself."""
        if self.large:
            return b""
        sink, table = pa.BufferOutputStream(), self.read(rows)
        with pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
        content: bytes = sink.getvalue().to_pybytes()
        return content

    def unpack(self, rows: range, packed: bytes) -> Manifest:
        """Return the manifest of neighbouring rows that another process packed, in memory."""
        return replace(self, table=self.read(rows) if self.large else pa.ipc.open_stream(packed).read_all())

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
        """How many people chose each class of every row, (N, K) int64, all 0 where unknown; None where known of no face."""
        if is_empty(self.table, "votes"):
            return None
        column = self.table["votes"]
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

        Pictures are decoded on threads, those of more than `max_pixels` not at all; `progress(done, total)` counts them. Of
        a large manifest a few rows at a time are in memory.
        """

        def look_at(face: tuple[int, Manifest, int]) -> tuple[int, Result | UnreadableImageError]:
            row, part, place = face
            try:
                return row, look(part.read_face(place, max_pixels=max_pixels))
            except UnreadableImageError as error:
                return row, error

        faces = (
            (int(row), part, place)
            for some in cut(rows, ROWS_AT_ONCE)
            for part in [self.choose(some)]
            for place, row in enumerate(some)
        )
        for done, result in enumerate(map_threads(look_at, faces, 1, PICTURES_AHEAD), start=1):
            yield result
            progress(done, len(rows))

    def choose(self, rows: Sequence[int] | np.ndarray) -> Manifest:
        """Return the manifest of some rows, in the order given, in memory."""
        return replace(self, table=self.table.take(rows))

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

    def decode_face(self, row: int, data: bytes, channels: str, max_pixels: int) -> np.ndarray:
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
        return self.digests()[0]

    @cached_property
    def image_digest(self) -> str:
        """A digest of the images alone: what a frozen feature depends on."""
        return digest_rows(self.table, IMAGE)[0]

    @property
    def labelling(self) -> list[str]:
        """What its samples and labels are, in short: its digest and the classes in whose order labels count."""
        return [self.digest, *self.classes]

    def digests(self) -> list[str]:
        """Return the digest and the image digest, computed anew, in one pass."""
        meanings: Sequence[str | int] = range(len(EXPRESSIONS))
        if self.classes != EXPRESSIONS:
            named = {self.classes[label] for label in pc.unique(self.table["label"]).to_pylist()}
            seven = {name: label for label, name in enumerate(EXPRESSIONS)}
            meanings = [seven.get(name, "") if seven.keys() >= named else name for name in self.classes]

        def give_meaning(column: str, values: pa.ChunkedArray) -> pa.ChunkedArray:
            return pa.array([meanings[label] for label in values.to_pylist()]) if column == "label" else values

        return digest_rows(self.table, FACE, IMAGE, change=give_meaning)


def _check_faces(name: str, rows: Iterable[Face]) -> Columns:
    """Return the columns that are kept of some faces, which come sorted; raise `UserError` as `from_faces` does."""
    group, kept, repeated, last = "", dict[str, None](), list[str](), None
    for face in rows:
        check_encoded(face.path)
        group = group if not face.group or is_encoded(face.group) else group or face.group
        kept.update(dict.fromkeys(face.kept))
        if face.sample_id == last and repeated[-1:] != [last]:
            repeated.append(last)
        last = face.sample_id
    check_encoded(group)
    if repeated:
        raise UserError(
            f"{name!r} lists {len(repeated)} samples more than once, {', '.join(repeated)}: keep one row of each."
        )
    return tuple(kept)


def _tabulate(faces: Sequence[Face], kept: Columns) -> pa.Table:
    """Return the rows of some faces, with columns that are kept."""
    table = pa.Table.from_pylist([vars(face) for face in faces], schema=SCHEMA)
    for column in kept:
        table = table.append_column(column, pa.array([face.kept.get(column) for face in faces], pa.string()))
    return table


def assign_splits(faces: Collection[Face]) -> Iterator[Face]:
    """Give every face without a split `train` or, a fifth of them, `test`, stratified by label and the same everywhere."""
    without = ((_unit(face.group, face.digest), face.label) for face in faces if not face.split)
    test = iter(hold_out(without, TEST_SHARE))
    for face in faces:
        yield face if face.split else replace(face, split="test" if next(test) else "train")


def hold_out_rows(manifest: Manifest, rows: np.ndarray, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Part some rows of a manifest into those to keep and those held out, whole groups, stratified by label.

    The manifest remembers what was held out: a sweep asks hundreds of times, and each takes a fifth of a second.
    """
    known: dict[tuple[bytes, float], np.ndarray] = vars(manifest).setdefault("_held_out", {})
    held = known.get((rows.tobytes(), fraction))
    if held is None:
        groups, digests = (manifest.table[column].to_pylist() for column in ("group", "digest"))
        units = (_unit(groups[row], digests[row]) for row in rows)
        held = hold_out(zip(units, manifest.labels[rows].tolist(), strict=True), fraction)
        known[rows.tobytes(), fraction] = held
    return rows[~held], rows[held]


def _unit(group: str | None, digest: str) -> str:
    return f"group {group}" if group else f"image {digest}"


def hold_out(samples: Iterable[tuple[str, int]], fraction: float) -> np.ndarray:
    """Choose which samples (unit, label) to hold out, (n,) bool, by nothing but the names of their units.

    Samples of one unit (a group or, without a group, identical content) stay together. Units are taken in the order of
    their hash until a class has its share, so that adding samples later moves hardly any other.
    """
    hashed = ((hashlib.sha256(unit.encode()).digest(), label, number) for number, (unit, label) in enumerate(samples))
    ordered = sort(hashed, itemgetter(0))
    sizes = Counter(label for _, label, _ in ordered)
    quota = Counter({label: max(round(fraction * n), min(1, n - 1)) for label, n in sizes.items()})
    held = np.zeros(len(ordered), bool)
    for _, members in groupby(ordered, itemgetter(0)):
        unit = list(members)
        counts = Counter(label for _, label, _ in unit)
        # A group is held out while at least half of it is still wanted there.
        wanted = sum(min(n, quota[label]) for label, n in counts.items())
        if 2 * wanted >= counts.total():
            held[[number for *_, number in unit]] = True
            quota = Counter({label: max(0, n - counts[label]) for label, n in quota.items()})
    return held
