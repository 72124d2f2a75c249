"""What an output may take the place of: a file that the same command could have written, and nothing else.

Such a file is known by how it begins or ends. Everything else that lies where an output is to go is somebody's work, which a
mistyped name must not cost: it is refused, whatever its name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import IO

from upath import UPath

from cafe.errors import UserError
from cafe.files import retry

MARK = "cafe"  # in a page, a table or a picture: who wrote it
SEEN = 4096  # bytes that are looked at of a text

Own = Callable[[IO[bytes]], bool]  # whether a file is one that a command writes


def check_replaced(place: UPath, option: str, own: Own) -> None:
    """Raise `UserError` where a file lies at the place of an output and is neither empty nor the command's own."""
    try:
        with retry(place, "read", lambda: place.open("rb")) as file:
            if not file.read(1):
                return
            file.seek(0)
            known = own(file)
    except (FileNotFoundError, IsADirectoryError):
        return
    if not known:
        raise UserError(
            f"{option} {place} is there already, and is nothing that this command writes: give another name, or remove it."
        )


def begins(*starts: str) -> Own:
    """Return what knows files by one of their possible beginnings."""
    return lambda file: file.read(SEEN).startswith(tuple(start.encode() for start in starts))


def holds(text: str) -> Own:
    """Return what knows files by a text near their beginning or their end."""

    def own(file: IO[bytes]) -> bool:
        head = file.read(SEEN)
        file.seek(max(0, file.seek(0, 2) - SEEN))
        return text.encode() in head or text.encode() in file.read(SEEN)

    return own
