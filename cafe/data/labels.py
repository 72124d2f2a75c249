"""What labels mean that are numbers or codes of a set's own: the order of a published set, one of yours, or a map in a file.

The same number means another expression in every set, so that none is read without an order that somebody named.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import IO, Any

from upath import UPath

from cafe.data.expressions import OTHERS, normalise_name
from cafe.errors import UserError
from cafe.files import MOST_TEXT, read_file

AFFECTNET = (
    "neutral", "happiness", "sadness", "surprise", "fear", "disgust", "anger", "contempt", "none", "uncertain", "no face",
)  # fmt: skip
FER2013 = ("anger", "disgust", "fear", "happiness", "sadness", "surprise", "neutral")
FERPLUS = (
    "neutral", "happiness", "surprise", "sadness", "anger", "disgust", "fear", "contempt", "unknown", "NF",
)  # fmt: skip
RAFDB = ("surprise", "fear", "disgust", "happiness", "sadness", "anger", "neutral")
ORDERS = {  # from the authors' read-me's
    "affectnet": dict(enumerate(AFFECTNET)),
    "fer2013": dict(enumerate(FER2013)),
    "ferplus": dict(enumerate(FERPLUS)),
    "rafdb": dict(enumerate(RAFDB, start=1)),
}
NUMBER = re.compile(r"\s*[+-]?\d{1,9}(\.0*)?\s*")
READ_AT_ONCE = 2**20  # bytes
SHOWN = 20  # labels in an error before "and N more"
ENCODINGS = ("utf-8-sig", "cp1252", "latin-1")  # the first by which a text can be read; the last reads anything


def parse_number(text: str) -> int | None:
    """Return a whole number, also of `3.0`, or None for anything else."""
    return int(float(text)) if NUMBER.fullmatch(text) else None


def decode_text(data: bytes) -> str:
    """Return the text of a file as `find_encoding` has it."""
    return data.decode(*find_encoding(io.BytesIO(data)))


def find_encoding(data: IO[bytes]) -> tuple[str, str]:
    """Return the encoding of a text and what is to be done with faults, and go back to its beginning.

    UTF-16 and UTF-8 are known by their marks; then it is UTF-8, and Latin-1 as Windows has it for the rest.
    """
    marked = data.read(2) in (b"\xff\xfe", b"\xfe\xff")
    data.seek(0)
    if marked:
        return "utf-16", "replace"
    for encoding in ENCODINGS:
        decoder = codecs.getincrementaldecoder(encoding)()
        try:
            while content := data.read(READ_AT_ONCE):
                decoder.decode(content)
            decoder.decode(b"", final=True)
            return encoding, "strict"
        except UnicodeDecodeError:
            continue
        finally:
            data.seek(0)
    raise AssertionError("every byte is a character of Latin-1")


@dataclass(frozen=True)
class LabelMap:
    """What labels mean: `names` by label, an empty one where its faces are left out; `source` says who says so.

    A `numbered` one explains numbers and leaves names as they are; any other must explain every label there is. The names of
    a `counted` one were given in an order that begins with that of 0.
    """

    source: str
    names: Mapping[str, str] = field(default_factory=dict)
    numbered: bool = False
    counted: bool = False

    @classmethod
    def parse(cls, order: str) -> LabelMap:
        """Read the name of a published order, or names with commas between them, the first of them that of 0."""
        if order.strip().casefold() in ORDERS:
            known = ORDERS[order.strip().casefold()]
            return cls(f"the order {order.strip().casefold()}", {str(n): name for n, name in known.items()}, True)
        names = [name.strip() for name in order.split(",")]
        if len(names) < 2 or not all(names):
            raise UserError(
                f"--label-order {order} is no order: choose {', '.join(ORDERS)}, or give the names of all numbers from 0 "
                "on, with commas between them."
            )
        return cls("the order given", {str(number): name for number, name in enumerate(names)}, True, True)

    @classmethod
    def load(cls, file: UPath) -> LabelMap:
        """Read a JSON object {label: class}, or a CSV of label,class; an empty class leaves faces out."""
        try:
            text = decode_text(read_file(file, MOST_TEXT))
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise UserError(f"{file} is not a file: give a JSON object or a CSV of label,class.") from None
        names: dict[str, str] = {}
        for label, name in _read_pairs(text, file):
            if names.setdefault(_key(label), name.strip()) != name.strip():
                raise UserError(f"{file} says two things of the label {label!r}: keep one of them.")
        return cls(str(file), names)

    def find(self, label: str) -> str | None:
        """Return the name of what a label means, empty where its faces are left out, None where it is not explained."""
        if self.numbered and parse_number(label) is None:
            return label
        return self.names.get(_key(label))

    def check(self, place: str, labels: Iterable[str]) -> None:
        """Raise `UserError` where no label is a number, or where they may be counted from 1, though names are from 0 on."""
        numbers = {parse_number(label) for label in labels} - {None}
        if self.numbered and not numbers:
            raise UserError(f"No label of {place} is a number: leave --label-order out.")
        if self.counted and 0 not in numbers and normalise_name(self.names["0"]) not in OTHERS:
            raise UserError(
                f"No label of {place} is 0, of which {self.names['0']!r} would be the name: where it counts from 1 write "
                "--label-order none,NAME,NAME,…, else say what each number means with --labels FILE."
            )

    def refuse(self, place: str, strange: Counter[str]) -> UserError:
        """Return the error for labels that are not explained, with their faces; `place` is what says them."""
        remedy = (
            "give the order of this set, whose first name is that of 0 (`none` leaves faces out), or --labels FILE"
            if self.numbered
            else "add them, those to be left out with an empty class"
        )
        return UserError(f"{place} has labels that {self.source} does not explain, {_count(strange)}: {remedy}.")


def _key(label: str) -> str:
    number = parse_number(label)
    return normalise_name(label) if number is None else str(number)


def _read_pairs(text: str, file: UPath) -> Iterable[tuple[str, str]]:
    if text.lstrip().startswith("{"):
        try:
            pairs = json.loads(text, object_pairs_hook=lambda pairs: pairs)
        except (ValueError, RecursionError):
            raise UserError(f"{file} is no JSON object: write it as {{label: class}}.") from None
        return [(label, _read_name(name, label, file)) for label, name in pairs]
    try:
        lines = [cells for cells in csv.reader(io.StringIO(text, newline=""), strict=True) if any(cells)]
    except csv.Error as error:
        raise UserError(f"{file} is no CSV ({error}): write it as label,class.") from None
    if wrong := [cells for cells in lines if len(cells) != 2]:
        raise UserError(f"{file} has the line {','.join(wrong[0])!r}: write two cells a line, label,class.")
    headed = bool(lines) and tuple(map(normalise_name, lines[0])) == ("label", "class")
    return [(cells[0], cells[1]) for cells in lines[headed:]]


def _read_name(name: Any, label: str, file: UPath) -> str:
    if name is None:
        return ""
    if not isinstance(name, str):
        raise UserError(
            f"{file} says {name!r} of the label {label!r}: write the name of a class, or null to leave it out."
        )
    return name


def refuse_numbers(place: str, numbers: Counter[int]) -> UserError:
    """Return the error for labels that are numbers, with the faces of each and the orders that have all of them."""
    fitting = [
        f"{name} ({', '.join(f'{number} {what}' for number, what in order.items())})"
        for name, order in ORDERS.items()
        if numbers.keys() <= order.keys()
    ]
    counts = _count(Counter({str(number): numbers[number] for number in sorted(numbers)}), ranked=False)
    return UserError(
        f"{place} labels its faces by numbers, {counts}, which mean other expressions in other sets: say which with "
        f"--label-order {', '.join([*fitting, 'or NAME,NAME,… from 0 on'])}, or with --labels FILE."
    )


def _count(labels: Counter[str], ranked: bool = True) -> str:
    """Name labels with how many faces each has, the most frequent first."""
    order = sorted(labels.items(), key=lambda entry: (-entry[1], entry[0])) if ranked else list(labels.items())
    shown = [f"{label}: {count:,} face{'s' * (count != 1)}" for label, count in order[:SHOWN]]
    return ", ".join(shown) + (f" and {len(order) - SHOWN} more" if len(order) > SHOWN else "")
