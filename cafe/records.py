"""Records: frozen dataclasses kept as JSON, checked when they are read, and named by what differs from their defaults."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from dataclasses import MISSING, fields
from functools import cache
from typing import Any, TypeVar

from cafe.errors import UserError

FORMAT = 2  # of run folders and feature stores; a part of their names

Record = TypeVar("Record")


def check_record(record: Any, kind: type[Record], where: str) -> Record:
    """Return a dataclass from plain JSON values; raise `UserError` naming the first field that does not fit."""
    from pydantic import ValidationError

    try:
        checked: Record = _adapter(kind).validate_python(record)  # type: ignore[arg-type]  # classes can be hashed
        return checked
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise UserError(
            f"{where} cannot be read ({place}: {first['msg'].lower()}): it was changed by hand or written by another "
            "version of cafe."
        ) from None


def changed_fields(value: Any, without: Collection[str] = ()) -> dict[str, Any]:
    """Return the fields of a dataclass that differ from their defaults, by name."""
    found = {one.name: (getattr(value, one.name), one) for one in fields(value) if one.name not in without}
    return {
        name: content
        for name, (content, one) in found.items()
        if content != (one.default_factory() if one.default_factory is not MISSING else one.default)
    }


def digest_changes(value: Any, without: Collection[str] = ()) -> str:
    """Name a dataclass by what differs from the defaults, as a SHA-256: a field that is added later renames nothing."""
    record = [FORMAT, changed_fields(value, without)]
    return hashlib.sha256(json.dumps(record, sort_keys=True, default=changed_fields).encode()).hexdigest()


def digest(content: bytes | memoryview) -> str:
    """Return the SHA-256 of some bytes."""
    return hashlib.sha256(content).hexdigest()


@cache
def _adapter(kind: type[Any]) -> Any:
    from pydantic import TypeAdapter  # takes a fifth of a second to import

    return TypeAdapter(kind)
