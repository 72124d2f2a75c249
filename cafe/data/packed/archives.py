"""Pictures inside tar and zip archives and Parquet files: which there are, and their bytes, read where they lie.

A member has the path that it would have if its archive were a folder: `shards/train-000.tar/0001.jpg`,
`faces.zip/happy/1.jpg`, and a row of a Parquet file by its number `faces.parquet/0000017`. Its span says where in the file
it lies, so that one request reads it and nobody has to list the archive again:

[offset, bytes]                  of a tar, and of what a zip has stored
[offset, bytes, bytes inflated]  of what a zip has deflated
[row group, row in it]           of a Parquet file

Archives come from others: nothing is unpacked, links are not followed, and no header says how much memory is taken.
"""

from __future__ import annotations

import io
import os
import re
import struct
import tarfile
import zipfile
import zlib
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from stat import S_ISLNK
from threading import Lock
from typing import IO, Any, NamedTuple, cast

import pyarrow as pa
import pyarrow.parquet as pq
from upath import UPath

from cafe.errors import UserError, quote
from cafe.files import OUTSIDE, check_regular, read_file, retry

PACKED = (".tar", ".zip")  # that are read like folders
ROWS = ".parquet"
# Suffixes below which a path can lead into a file, as parts of a path.
_WITHIN = re.compile(r"[^/](?:\.tar|\.zip|\.parquet)(?=/)", re.IGNORECASE)
MOST_MEMBER = 2**29  # bytes of a member: an uncompressed picture of 100 megapixels has 300 million
FREELY, MOST_TIMES = 2**24, 100  # bytes that a member may inflate to in any case, and as many times its own
MOST_LABEL = 2**20  # bytes of a member that says what its neighbour shows
MOST_HEADER = 2**14  # bytes of a header of a tar, which is read before anything is known of it
KEPT = 2**25  # bytes of rows that are kept of each row group
ROWS_AT_ONCE = 16  # of a Parquet file, each with its picture
BUFFER = 2**20  # bytes of a Parquet file that are read at once
DIGITS = 7  # of the number of a row, so that names sort as the rows lie
DAMAGED = (  # whatever the libraries raise of a file that is not what it claims to be
    zipfile.BadZipFile, tarfile.TarError, zlib.error, struct.error, pa.ArrowException, ValueError, OverflowError, EOFError,
    LookupError, NotImplementedError, RuntimeError, TypeError, AttributeError,
)  # fmt: skip

Span = tuple[int, ...]


class MemberError(Exception):
    """A member of an archive that cannot be read, with the reason as its message."""


@dataclass(frozen=True)
class Archive:
    """What a file holds: the span of each member by its name and, of those that are not to be read, why; no folders.

    Those of a zip begin with their header, which `settle` passes over.
    """

    file: UPath
    members: Mapping[str, Span]
    refused: Mapping[str, str]

    def settle(self, name: str) -> Span | None:
        """Return where the bytes of a member lie, None where there is none of that name; raise `MemberError`."""
        if name in self.refused:
            raise MemberError(self.refused[name])
        span = self.members.get(name)
        if span is None or self.file.suffix.casefold() != ".zip":
            return span
        header = _read_range(self.file, str(self.file.path), span[0], _HEADER.size)
        if len(header) < _HEADER.size or not header.startswith(b"PK\3\4"):
            raise MemberError("damaged archive: its header is not where the list of members says")
        *_, name_bytes, extra_bytes = _HEADER.unpack(header)
        return (span[0] + _HEADER.size + name_bytes + extra_bytes, *span[1:])


_HEADER = struct.Struct("<4s22xHH")  # of a member of a zip (APPNOTE 4.3.7): the lengths of its name and of what follows


def is_archive(path: UPath) -> bool:
    """Whether a path is a file that can be read like a folder."""
    return path.suffix.casefold() in PACKED and retry(path, "read", path.is_file)


def open_archive(path: UPath) -> Archive:
    """List the members of an archive, which is read once; raise `UserError` for one that is damaged or cut off."""
    file = _File(path.path, path.protocol, path)
    archive = _open_file(file, file.version)
    if archive is None:
        raise UserError(f"{path} is not a file: give the archive that holds the data set.")
    return archive


def read_content(path: UPath, most: int | None = None) -> bytes:
    """Return the content of a file, or of a member of an archive by its path below it; raise `MemberError`."""
    place = find_span(path)
    return read_file(path, most) if place is None else read_span(path, place)


@contextmanager
def open_content(path: UPath) -> Iterator[IO[bytes]]:
    """Open a file where it lies on a disk, or the content of any other and of a member of an archive, which is in memory.

    Raises `MemberError`.
    """
    if path.protocol in ("", "file") and find_span(path) is None:
        check_regular(path)
        with retry(path, "read", path.open, "rb") as data:
            yield cast(IO[bytes], data)
    else:
        yield io.BytesIO(read_content(path))


def find_span(path: UPath) -> Span | None:
    """Return where a member of an archive lies, None for any other path; raise `MemberError`, `FileNotFoundError`."""
    for file in _split(path):
        if archive := _open_file(file, file.version):
            span = archive.settle(path.path[len(file.path) + 1 :])
            if span is None:
                raise FileNotFoundError(str(path))
            return span
    return None


def read_span(path: UPath, span: Span) -> bytes:
    """Return the bytes of a member of an archive by its path below it and its span; raise `MemberError`.

    What is cut off is returned as far as it goes: whoever reads it knows its digest.
    """
    files = _split(path)
    if not files:
        raise FileNotFoundError(str(path))
    file = files[0] if len(files) == 1 else next(file for file in files if _open_file(file, file.version))
    if file.path.casefold().endswith(ROWS):
        return retry(path, "read", _open_rows(file, span[0], file.version).read, span[1])
    if max(span[1:]) > MOST_MEMBER:
        raise MemberError(f"more than {MOST_MEMBER:,} bytes")
    data = _read_range(path, file.path, *span[:2])
    return data if len(span) == 2 else _inflate(data, span[2])


@dataclass(frozen=True)
class _File:
    """A place that may be an archive: the beginning of a path of its storage, by which alone it is known."""

    path: str
    protocol: str
    within: UPath = field(compare=False)

    def locate(self) -> UPath:
        """Return its path."""
        return UPath(self.path, protocol=self.protocol, **self.within.storage_options)

    @property
    def version(self) -> tuple[int, int] | None:
        """What changes when a file on a disk is written again; None of a store, which would have to be asked each time."""
        if self.protocol not in ("", "file"):
            return None
        with suppress(OSError):
            about = os.stat(self.path)  # noqa: PTH116  # for each picture
            return about.st_mtime_ns, about.st_size
        return None


def _split(path: UPath) -> list[_File]:
    """Return the beginnings of a path that may be archives: folders may be called like one, too."""
    place = path.path
    return [_File(place[: found.end()], path.protocol, path) for found in _WITHIN.finditer(place)]


@lru_cache(64)
def _open_file(file: _File, version: tuple[int, int] | None) -> Archive | None:
    """Return an archive as it was at that time, None for a folder."""
    place = file.locate()
    return _list(place) if retry(place, "read", place.is_file) else None


def _read_range(path: UPath, file: str, offset: int, size: int) -> bytes:
    """Return bytes of a file by one request; `path` is what an error calls it."""
    if path.protocol in ("", "file"):
        return retry(path, "read", _read_here, file, offset, size)
    if not size:
        return b""
    return bytes(retry(path, "read", lambda: path.fs.cat_file(file, start=offset, end=offset + size)))


def _read_here(file: str, offset: int, size: int) -> bytes:
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK)  # a pipe in its place must not be waited for
    try:
        return os.pread(descriptor, size, offset)
    finally:
        os.close(descriptor)


def _inflate(data: bytes, size: int) -> bytes:
    """Return what a member of a zip was before it was deflated, never more than its size."""
    decoder = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        inflated = decoder.decompress(data, size + 1)
    except zlib.error:
        inflated = b""
    if len(inflated) != size or not decoder.eof:
        raise MemberError("damaged archive: it cannot be inflated")
    return inflated


def _list(file: UPath) -> Archive:
    members, refused = dict[str, Span](), dict[str, str]()
    for member in walk_archive(file):
        members.pop(member.name, None)  # of several members of one name the last stands, as it would once unpacked
        refused.pop(member.name, None)
        if member.reason:
            refused[member.name] = member.reason
        else:
            members[member.name] = member.span
    return Archive(file, members, refused)


class Member(NamedTuple):
    """A file in an archive: its name and span, why it is not to be read, and its content where that was asked for."""

    name: str
    span: Span
    reason: str = ""
    content: bytes | None = None


def walk_archive(file: UPath, texts: tuple[str, ...] = ()) -> Iterator[Member]:
    """Yield the members of an archive as they lie, of a tar with the content of short ones whose names end in `texts`.

    Raises `UserError` for an archive that is damaged or cut off, and what a storage raises that fails.
    """
    kind = file.suffix.casefold()
    with open_packed(file) as data:
        members = _list_tar(data, texts) if kind == ".tar" else _list_zip(data) if kind == ".zip" else _list_rows(data)
        for member in members:
            name = member.name.removeprefix("./")
            reason = member.reason or ("leads out of its archive" if OUTSIDE.search(name) else "")
            yield member._replace(name=name, reason=reason)


@contextmanager
def open_packed(file: UPath) -> Iterator[IO[bytes]]:
    """Open a tar, zip or Parquet file; raise `UserError` where what reads it finds it damaged."""
    try:
        check_regular(file)
        with retry(file, "opened", file.open, "rb") as data:
            yield cast(IO[bytes], data)
    except FileNotFoundError:
        raise UserError(f"There is no file {file}: give the archive or the table that holds the data set.") from None
    except (*DAMAGED, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the storage; pyarrow raises others of its files
            raise
        kind = file.suffix[1:].casefold()
        raise UserError(f"{file} is no {kind} file, or damaged ({quote(error)}): copy or pack it again.") from None


def _refuse_size(size: int, packed: int) -> str:
    """Return why a member of a size in bytes is not read, empty when it may be."""
    if size > MOST_MEMBER:
        return f"{size:,} bytes are more than the {MOST_MEMBER:,} that a file in an archive may have"
    if size > max(FREELY, MOST_TIMES * packed):
        return f"inflates from {packed:,} to {size:,} bytes, as no picture does"
    return ""


def _list_zip(data: IO[bytes]) -> Iterator[Member]:
    """Yield the members of a zip from the list at its end, with spans that begin with their headers."""
    with zipfile.ZipFile(data) as archive:
        for info in archive.infolist():
            reason = _refuse_size(info.file_size, info.compress_size)
            if info.flag_bits & 1:
                reason = "is encrypted"
            elif S_ISLNK(info.external_attr >> 16):
                reason = "is a link"
            elif info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                reason = "is packed by another method than those of every zip, stored and deflated"
            span: Span = (info.header_offset, info.compress_size)
            if info.compress_type == zipfile.ZIP_DEFLATED:
                span = (*span, info.file_size)
            if not info.is_dir():
                yield Member(info.filename.replace("\\", "/"), span, reason)


class _Bounded:
    """A file that returns at most a header at once: tarfile reads as much as a header claims that another has."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.seek, self.tell = file, file.seek, file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MOST_HEADER:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        return self.file.read(size)


def _list_tar(data: IO[bytes], texts: tuple[str, ...]) -> Iterator[Member]:
    """Yield the members of a tar from the headers before each."""
    end, before = data.seek(0, os.SEEK_END), -1
    data.seek(0)
    with tarfile.open(fileobj=cast(Any, _Bounded(data)), mode="r:") as tar:
        while info := tar.next():
            cast(Any, tar).members.clear()  # else it keeps them all
            after = info.offset_data + info.size
            if info.offset <= before or info.size < 0 or (info.isreg() and not info.issparse() and after > end):
                raise tarfile.ReadError(f"cut off or damaged at {info.name!r}")
            before = info.offset
            reason = _refuse_size(info.size, info.size)
            if info.issym() or info.islnk():
                reason = "is a link"
            elif info.issparse() or not info.isreg():
                reason = "is a pipe, a device or a file with holes"
            content = None
            if not reason and info.size <= MOST_LABEL and info.name.casefold().endswith(texts):
                data.seek(info.offset_data)
                content = data.read(info.size)
            if not info.isdir():
                yield Member(info.name, (info.offset_data, info.size), reason, content)
        data.seek(tar.offset)
        if any(data.read(tarfile.BLOCKSIZE)):  # tarfile takes a damaged header for the end
            raise tarfile.ReadError(f"no header at byte {tar.offset:,}")


def _list_rows(data: IO[bytes]) -> Iterator[Member]:
    """Yield the rows of a Parquet file with pictures."""
    file, row = pq.ParquetFile(data), 0
    find_pictures(file.schema_arrow)
    for group in range(file.metadata.num_row_groups):
        for place in range(file.metadata.row_group(group).num_rows):
            yield Member(name_row(row), (group, place))
            row += 1


def name_row(row: int) -> str:
    """Return the name of a row of a Parquet file."""
    return f"{row:0{DIGITS}d}"


def find_pictures(schema: pa.Schema) -> str | None:
    """Return the column that holds pictures, as `datasets` writes them or plain bytes; raise `UserError` for several."""
    found = [field.name for field in schema if _holds_pictures(field.type)]
    found = found or [field.name for field in schema if _is_binary(field.type)]
    usual = [name for name in found if name.casefold() in ("image", "img", "picture", "face", "photo", "jpg", "png")]
    found = usual if len(usual) == 1 else found
    if len(found) > 1:
        raise UserError(
            f"The columns {', '.join(map(repr, found))} all hold bytes: call the one with the pictures 'image', or leave "
            "the others out."
        )
    return found[0] if found else None


def _holds_pictures(kind: pa.DataType) -> bool:
    """Whether a type is `struct{bytes, path}`, as `datasets` writes pictures."""
    return pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 and _is_binary(kind.field("bytes").type)


def _is_binary(kind: pa.DataType) -> bool:
    return any(check(kind) for check in (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view))


def _count_bytes(pictures: list[bytes | None]) -> int:
    return sum(len(picture or b"") for picture in pictures)


@lru_cache(8)
def _open_rows(file: _File, group: int, version: tuple[int, int] | None) -> _RowGroup:
    return _RowGroup(file.locate(), group)


class _RowGroup:
    """The pictures of a row group, read forward a few rows at a time; the last ones are kept, for threads are not in order.

    Files from `datasets` have groups of a hundred rows or so, others one of a million.
    """

    def __init__(self, file: UPath, group: int) -> None:
        self.file, self.group, self.lock = file, group, Lock()
        self._begin()

    def _begin(self) -> None:
        self.rows: Iterator[list[bytes | None]] | None = None
        self.kept: deque[tuple[int, list[bytes | None]]] = deque()
        self.next = self.size = 0

    def read(self, row: int) -> bytes:
        """Return the picture of a row; raise `MemberError` for a damaged one."""
        with self.lock:
            try:
                return self._read(row)
            except (*DAMAGED, OSError, StopIteration) as error:
                self._begin()
                if isinstance(error, OSError) and error.errno is not None:
                    raise
                raise MemberError(f"damaged archive: {quote(error)}") from None

    def _read(self, row: int) -> bytes:
        if self.rows is None or (self.kept and row < self.kept[0][0]):
            self._begin()
            self.rows = _read_rows(self.file, self.group)
        while row >= self.next:
            some = next(self.rows)
            self.kept.append((self.next, some))
            self.next, self.size = self.next + len(some), self.size + _count_bytes(some)
            while self.size > KEPT and len(self.kept) > 1:
                self.size -= _count_bytes(self.kept.popleft()[1])
        first, some = next((first, some) for first, some in self.kept if row < first + len(some))
        return some[row - first] or b""


def _read_rows(file: UPath, group: int) -> Iterator[list[bytes | None]]:
    """Yield the pictures of a row group, a few at a time; apart from what keeps them, so that both are freed at once."""
    check_regular(file)
    with file.open("rb") as data:
        parquet = pq.ParquetFile(data, buffer_size=BUFFER, pre_buffer=False)
        column = find_pictures(parquet.schema_arrow)
        kind = parquet.schema_arrow.field(column).type
        name = f"{column}.bytes" if pa.types.is_struct(kind) else column
        for batch in parquet.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=[name]):
            # Copies: the buffers behind a few rows can be a hundred times as large as these.
            pictures = batch.column(0).field("bytes") if pa.types.is_struct(kind) else batch.column(0)
            yield pictures.to_pylist()
