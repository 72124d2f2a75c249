"""Files on a laptop or in an object store, read and written by the same lines, each of them whole or not at all."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable
from typing import Any, TypeVar

from upath import UPath

OBJECT_STORES = ("s3", "s3a", "gs", "gcs", "az", "abfs")
PAUSES = (0.1, 0.5, 2.0)  # seconds before a file is tried again
CERTAIN = (
    FileNotFoundError,
    NotADirectoryError,
    IsADirectoryError,
)  # no fault of the storage: another try changes nothing

Result = TypeVar("Result")


def locate(location: str) -> UPath:
    """Return a URI as it is and a local path made absolute: workers run in folders of their own.

    Of an object store nothing is remembered that was listed before: other machines write there.
    """
    path = UPath(location)
    if path.protocol in OBJECT_STORES:
        return UPath(location, use_listings_cache=False)
    return path if path.protocol else path.expanduser().absolute()


def retry(function: Callable[..., Result], *arguments: Any) -> Result:
    """Call a function that reads or writes files, again after each of `PAUSES` as long as the storage fails."""
    for pause in PAUSES:
        try:
            return function(*arguments)
        except CERTAIN:
            raise
        except OSError:
            time.sleep(pause)
    return function(*arguments)


def list_folder(folder: UPath) -> list[UPath]:
    """Return what a folder holds, sorted by name, without files half written; nothing when it is not there."""
    try:
        whole = (path for path in folder.iterdir() if not path.name.startswith("."))
        return sorted(whole, key=lambda path: path.name)
    except (FileNotFoundError, NotADirectoryError):
        return []


def list_sizes(folder: UPath) -> dict[str, int]:
    """Return the bytes of each file of a folder by its name, from one listing; nothing when it is not there."""
    try:
        entries = folder.fs.ls(folder.path, detail=True)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    return {entry["name"].rpartition("/")[2]: entry["size"] for entry in entries if entry["type"] == "file"}


def write_file(path: UPath, content: bytes) -> None:
    """Write a file so that a reader, or a kill, finds the old content or the new one and nothing between.

    An object store does so by itself; on a disk the content is written beside the file and then renamed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.protocol:
        path.write_bytes(content)
        return
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        beside.write_bytes(content)
        beside.replace(path)
    finally:  # on a full disk half a file is left
        beside.unlink(missing_ok=True)


def read_json(path: UPath) -> dict[str, Any] | None:
    """Return a JSON object, or None when the file is missing or damaged."""
    try:
        record = json.loads(path.read_bytes())
    except (
        FileNotFoundError,
        ValueError,
        RecursionError,
    ):  # of text, of numbers of a million digits, of a million brackets
        return None
    return record if isinstance(record, dict) else None


def write_json(path: UPath, record: dict[str, Any]) -> None:
    """Write a JSON object, with the same bytes for the same content."""
    write_file(path, json.dumps(record, indent=1, sort_keys=True, ensure_ascii=False).encode())
