"""The command that this process works for, which the runs that it makes keep."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

# User and password, which may hold an @ too, or the query, of an address.
SECRET = re.compile(r"(?<=://)[^/\s]+(?=@)|(?<=\?)[^\s']+(?=$|[\s'])")

_command = ""


def note_command(words: Sequence[str]) -> None:
    """Note the words that were given to `cafe`."""
    global _command
    _command = hide_secrets(shlex.join(["cafe", *words]))


def note_call(function: str, arguments: Mapping[str, Any]) -> None:
    """Note a call of the library instead: `cafe.train('news', method='mlp')`, of the arguments those that were given."""
    global _command
    _command = hide_secrets(f"cafe.{function}({', '.join(f'{name}={value!r}' for name, value in arguments.items())})")


def hide_secrets(text: str) -> str:
    """Return a text whose addresses have neither user and password nor a query, which may hold a key."""
    return SECRET.sub("…", text)


def current_command() -> str:
    """Return what was noted last, empty where this process works for no command."""
    return _command
