"""Seals: every file that decides a number carries a checksum of itself, which whoever reads it checks.

The seal lies inside the file, so that a kill leaves no file without its own: in a JSON record as a field, in a Parquet or
safetensors file as a line of its metadata. That of the latter two is over all other bytes of the file. Files from before
there were seals have none; they are read, and `cafe runs --verify` calls them unchecked.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from upath import UPath

from cafe.errors import DamagedError, IrregularFileError
from cafe.files import MOST_TEXT, encode_json, read_file, write_file
from cafe.records import digest

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

KEY = "cafe.seal"  # of the line of metadata
OPEN, CLOSE = b"cafe-seal:", b":cafe-seal"  # two marks: where one is damaged, the other still says that there is a seal
DIGITS = 64
BLANK = OPEN.decode() + "0" * DIGITS + CLOSE.decode()  # written first, then replaced by the checksum
PARQUET = b"PAR1"
ROWS_AT_ONCE = 1024  # of a Parquet file
MOST_BYTES = 2**30  # that its rows may take in any case,
MOST_TIMES = 100  # and as many times its own; manifests take 3 times theirs, of repeated values alone 20

Unsealed = Literal["refused", "canonical", "read"]
State = Literal["whole", "unchecked", "damaged"]


def seal(content: bytes) -> bytes:
    """Return a file's content, whose metadata hold `BLANK`, with its checksum in that place."""
    start, end = _digits(content)
    return b"".join([memoryview(content)[:start], _checksum(content, start, end).encode(), memoryview(content)[end:]])


def check_seal(content: bytes, path: UPath, remedy: str) -> bool:
    """Whether a file's content has a seal; raise `DamagedError` with what to do when it is not what was sealed."""
    start, end = _digits(content)
    if start < 0:
        return False
    if content[end : end + len(CLOSE)] != CLOSE or content[start - len(OPEN) : start] != OPEN:
        raise damaged(path, remedy)
    if content[start:end] != _checksum(content, start, end).encode():
        raise damaged(path, remedy)
    return True


def _digits(content: bytes) -> tuple[int, int]:
    """Return where the digits of the seal begin and end; -1 where there is none.

    Parquet keeps its metadata at the end, safetensors at the beginning.
    """
    find = content.rfind if content.startswith(PARQUET) else content.find
    if (place := find(OPEN)) >= 0:
        start = place + len(OPEN)
    elif (place := find(CLOSE)) >= DIGITS:
        start = place - DIGITS
    else:
        return -1, -1
    return start, start + DIGITS


def _checksum(content: bytes, start: int, end: int) -> str:
    """Return the SHA-256 of all bytes but the digits, without a copy of them."""
    view, checksum = memoryview(content), hashlib.sha256()
    checksum.update(view[:start])
    checksum.update(view[end:])
    return checksum.hexdigest()


def damaged(path: UPath, remedy: str) -> DamagedError:
    """Return the error for a file that is not what was written, with what to do."""
    return DamagedError(f"{path} is damaged or was changed, it is not what was written: {remedy}.")


def encode_table(table: pa.Table) -> bytes:
    """Return a table as Parquet that carries a seal."""
    import pyarrow.parquet as pq

    sink = io.BytesIO()
    with pq.ParquetWriter(sink, table.schema) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({KEY: BLANK})
    return seal(sink.getvalue())


def read_table(path: UPath, remedy: str, columns: list[str] | None = None) -> pa.Table:
    """Read a Parquet file, or some of its columns, without the seal.

    Raises `DamagedError` when it is not what was sealed, and what pyarrow raises for a file that is no Parquet.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    content = read_file(path)
    check_seal(content, path, remedy)
    table = read_rows(pq.ParquetFile(pa.BufferReader(content)), path, most_values(content), columns)
    about = {key: value for key, value in (table.schema.metadata or {}).items() if key != KEY.encode()}
    return table.replace_schema_metadata(about or None)


def most_values(content: bytes) -> int:
    """Return how many bytes the rows of a Parquet file may take."""
    return max(MOST_BYTES, MOST_TIMES * len(content))


def read_rows(file: pq.ParquetFile, path: UPath, most: int, columns: list[str] | None = None) -> pa.Table:
    """Return the rows of a Parquet file; raise as `iterate_rows` does."""
    import pyarrow as pa

    batches = list(iterate_rows(file, path, most, columns))
    table = pa.Table.from_batches(batches).combine_chunks() if batches else file.read(columns)
    return table.replace_schema_metadata(file.schema_arrow.metadata)


def iterate_rows(
    file: pq.ParquetFile, path: UPath, most: int, columns: list[str] | None = None
) -> Iterator[pa.RecordBatch]:
    """Yield the rows of a Parquet file, a few at a time; raise `IrregularFileError` for more than `most` bytes of them.

    A few bytes can stand for gigabytes: a value that is written once and meant in every row, or a long one of zeros.
    """
    import pyarrow as pa

    too_large = IrregularFileError(
        f"{path} holds more than {most / 2**30:.0f} GB of values: write it again without what is not needed."
    )
    size = 0
    if _claim_size(file.metadata, columns) > most:
        raise too_large
    for batch in file.iter_batches(ROWS_AT_ONCE, columns=columns):
        values = [one.dictionary_decode() if pa.types.is_dictionary(one.type) else one for one in batch.columns]
        decoded = pa.RecordBatch.from_arrays(values, names=batch.schema.names)
        size += decoded.nbytes
        if size > most:
            raise too_large
        yield decoded


def _claim_size(metadata: pq.FileMetaData, columns: list[str] | None) -> int:
    """Return how many bytes a file says that its rows have, or some columns of them."""
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    if columns is None:
        return sum(group.total_byte_size for group in groups)
    chunks = (group.column(number) for group in groups for number in range(group.num_columns))
    return sum(
        chunk.total_uncompressed_size
        for chunk in chunks
        if any(f"{chunk.path_in_schema}.".startswith(f"{name}.") for name in columns)
    )


def write_sealed(path: UPath, record: dict[str, Any]) -> None:
    """Write a JSON object that carries a seal."""
    write_file(path, encode_json({**record, "seal": digest(encode_json(record))}))


def read_sealed(
    path: UPath, unsealed: Unsealed = "refused", remedy: str = "give the command that wrote it again"
) -> dict[str, Any] | None:
    """Return a sealed JSON object without its seal, or None when there is none; raise `DamagedError` for another content.

    One without a seal, from before there were seals, is refused, read where its bytes are those we write, or read as it is.
    """
    try:
        content = read_file(path, MOST_TEXT)
    except FileNotFoundError:
        return None
    except IsADirectoryError:
        raise damaged(path, remedy) from None
    record, sealed = _open_record(content)
    accepted = sealed or unsealed == "read" or (unsealed == "canonical" and content == encode_json(record or {}))
    if record is None or not accepted:
        raise damaged(path, remedy)
    return record


def _open_record(content: bytes) -> tuple[dict[str, Any] | None, bool]:
    """Return a JSON object without its seal, None where it is damaged, and whether it has one."""
    try:
        record = json.loads(content)
    except (ValueError, RecursionError):
        return None, False
    if not isinstance(record, dict):
        return None, False
    if "seal" not in record:
        # A seal that fits under another name: its name is what is damaged.
        texts = (name for name, text in record.items() if isinstance(text, str) and re.fullmatch("[0-9a-f]{64}", text))
        lost = any(record[name] == digest(encode_json(_without(record, name))) for name in texts)
        return (None, True) if lost else (record, False)
    rest = _without(record, "seal")
    whole = content == encode_json(record) and record["seal"] == digest(encode_json(rest))
    return rest if whole else None, True


def _without(record: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key != name}


def verify_file(path: UPath) -> State:
    """Read a JSON, Parquet or safetensors file back and say whether it is what was written, and there at all."""
    try:
        content = read_file(path, MOST_TEXT if path.suffix == ".json" else None)
    except (IrregularFileError, FileNotFoundError, IsADirectoryError):
        return "damaged"
    if path.suffix == ".json":
        record, sealed = _open_record(content)
        return "damaged" if record is None else "whole" if sealed else "unchecked"
    try:
        if check_seal(content, path, ""):
            return "whole"
    except DamagedError:
        return "damaged"
    return "unchecked" if _can_be_read(path, content) else "damaged"


def _can_be_read(path: UPath, content: bytes) -> bool:
    """Whether a file without a seal is at least one of its kind."""
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            read_rows(pq.ParquetFile(pa.BufferReader(content)), path, most_values(content))
        except (pa.ArrowException, OSError, IrregularFileError):
            return False
        return True
    from safetensors import SafetensorError, deserialize

    try:
        deserialize(content)  # type: ignore[no-untyped-call]
    except SafetensorError:
        return False
    return True
