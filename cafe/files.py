"""Files on a laptop or in an object store, read and written by the same lines, each of them whole or not at all."""

from __future__ import annotations

import json
import secrets
from typing import Any

from upath import UPath


def list_folder(folder: UPath) -> list[UPath]:
    """Return what a folder holds, sorted by name, without files half written; nothing when it is not there."""
    try:
        whole = (path for path in folder.iterdir() if not path.name.startswith("."))
        return sorted(whole, key=lambda path: path.name)
    except (FileNotFoundError, NotADirectoryError):
        return []


def write_file(path: UPath, content: bytes) -> None:
    """Write a file so that a reader, or a kill, finds the old content or the new one and nothing between.

    An object store does so by itself; on a disk the content is written beside the file and then renamed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.protocol:
        path.write_bytes(content)
        return
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    beside.write_bytes(content)
    beside.replace(path)


def read_json(path: UPath) -> dict[str, Any] | None:
    """Return a JSON object, or None when the file is missing or damaged."""
    try:
        return dict(json.loads(path.read_bytes()))
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
        return None


def write_json(path: UPath, record: dict[str, Any]) -> None:
    """Write a JSON object, with the same bytes for the same content."""
    write_file(path, json.dumps(record, indent=1, sort_keys=True, ensure_ascii=False).encode())
