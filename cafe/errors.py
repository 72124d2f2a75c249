"""The one error a user can cause, the one sentence every unknown name gets, and how texts of others are printed.

The command line turns a `UserError` into its message and exit code 2; anything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

# Control characters, marks that turn the direction of writing, and halves of characters, as of names that are no UTF-8.
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class UserError(Exception):
    """A mistake of the user's: one sentence with the value, what is allowed and the remedy."""

    exit_code = 2


class IncompleteError(UserError):
    """The command ran and kept what it made, but the data fell short of what was asked."""

    exit_code = 1


class StorageError(IncompleteError, OSError):
    """A file that could not be read or written although it was tried again: nothing is known of its content."""


class AnswerError(StorageError):
    """A server that was reached and does not give a file, whatever the reason."""


class DamagedError(UserError):
    """A file that is not what was written."""


class IrregularFileError(DamagedError):
    """A pipe, a device or a socket where a file should be, or far more than a file of its kind holds: not to be read."""


def printable(text: str) -> str:
    """Return a text in which control characters, but line ends and tabs, and what is no character are written as `\\u001b`.

    Names of files, labels and what files say of themselves come from others: an escape sequence there could move the cursor,
    hide what was printed or change the terminal, and a character that turns the direction of writing show another name.
    """
    return UNPRINTABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def shorten(text: str, longest: int) -> str:
    """Return a text with its middle left out where it is wider than `longest` columns of a terminal."""
    from rich.cells import cell_len, set_cell_size

    if cell_len(text) <= longest:
        return text
    kept = max(longest - 1, 0)
    end = set_cell_size(text[::-1], kept - kept // 2)[::-1]  # of some letters each takes two columns
    return f"{set_cell_size(text, kept // 2)}…{end}"


def unknown(kind: str, value: object, allowed: Iterable[str]) -> UserError:
    """Return the error for a name that is not one of `allowed`."""
    names = ", ".join(sorted(allowed))
    return UserError(f"Unknown {kind} {str(value)!r}: {f'choose {names}' if names else 'there is none yet'}.")


def ambiguous(kind: str, beginning: str, names: Iterable[str]) -> UserError:
    """Return the error for the beginning of a name that several have."""
    found = sorted(names)
    return UserError(
        f"{beginning!r} is the beginning of {len(found)} {kind}, {', '.join(found)}: give more of the name."
    )


def first_line(text: str) -> str:
    """Return a reason without the list that may follow it."""
    return text.strip().partition("\n")[0]


def quote(error: BaseException) -> str:
    """Return the first line of what a library says of its error, without a full stop, to be quoted in a sentence."""
    return (first_line(str(error)) or type(error).__name__).rstrip(".:")
