"""FERPlus (Barsoum et al., ICMI 2016): the pictures of FER2013 with ten votes each, as its repository lays them out.

The votes are in fer2013new.csv, or in a label.csv beside the pictures; the 48×48 grey pictures are PNG files or the rows of
fer2013.csv, in the order of fer2013new.csv. Which expression a face shows is decided from its votes by a rule. The two kinds
of files disagree in the votes for some 1,600 faces, so each has its own counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import compress, zip_longest

import numpy as np
from upath import UPath

from cafe.data.expressions import EIGHT
from cafe.data.indexing import Listing, read_expected
from cafe.data.labels import FERPLUS as CANDIDATES
from cafe.data.labels import parse_number
from cafe.data.layouts import Tree, folder_of, mark_repeated, merge_repeated, read_csv, read_records
from cafe.errors import UserError, unknown

EMOTIONS = 8  # the first candidates; the last two say that there is none, or no face
NO_FACE = CANDIDATES.index("NF")
FOLDERS = {  # Usage in the tables: the folder of the pictures and our split
    "training": ("FER2013Train", "train"),
    "publictest": ("FER2013Valid", "val"),
    "privatetest": ("FER2013Test", "test"),
}
VOTE_TABLE = "fer2013new.csv"
LABEL_FILES = "FER2013{Train,Valid,Test}/label.csv"
PICTURE_FOLDERS = "FER2013{Train,Valid,Test}/*.png"
PIXEL_TABLES = ("fer2013.csv", "icml_face_data.csv")  # the same rows; the second has its columns in another order
SIDE = 48


def choose_majority(votes: Sequence[int]) -> int | None:
    """Return the candidate with more than half of the votes once single ones are struck out, or None.

    The published rule: single votes are struck out for all ten candidates, unknown and NF among them, before the sum.
    """
    counted = [0 if count <= 1 else count for count in votes]
    most = max(counted)
    return counted.index(most) if 2 * most > sum(counted) else None


def choose_most_voted(votes: Sequence[int]) -> int | None:
    """Return the emotion of the eight with the most votes, the first of equal ones; None when none has any."""
    emotions = votes[:EMOTIONS]
    return emotions.index(max(emotions)) if any(emotions) else None


RULES: dict[str, Callable[[Sequence[int]], int | None]] = {"majority": choose_majority, "argmax": choose_most_voted}


@dataclass(frozen=True)
class _Row:
    """The votes for a picture: `votes` is empty where they cannot be read, `path` where the picture shows no face."""

    where: str
    usage: str
    path: str
    split: str
    votes: tuple[int, ...]

    @property
    def by_name(self) -> dict[str, int]:
        """The votes for each candidate; unknown and NF are classes of no set, and counted as such."""
        return dict(zip(CANDIDATES, self.votes, strict=False))


def read_ferplus(root: UPath, rule: str = "majority") -> Listing:
    """List the faces of FERPlus labelled by a rule, `majority` as published or `argmax`.

    Faces whose votes are for unknown, NF or undecided are dropped and counted. Raises `UserError`.
    """
    if rule not in RULES:
        raise unknown("rule for FERPlus", rule, RULES)
    tree = Tree.open(root)
    rows, source = _read_votes(tree)
    kind = "ferplus" if rule == "majority" else f"ferplus-{rule}"
    expected = read_expected(f"ferplus {source.rpartition('/')[2]}") if rule == "majority" else ()
    home = tree.find_home("FER2013(Train|Valid|Test)/[^/]+", "the folders FER2013Train, … of FERPlus")
    tables = [name for name in PIXEL_TABLES if tree.find(name)]
    if home is None and (source == LABEL_FILES or not tables):
        remedy = "put fer2013.csv of the FER2013 challenge, or folders of PNG made from it, beside it"
        raise tree.lack(f"pictures for {source}", remedy)
    pictures = PICTURE_FOLDERS if home else tree.choose(tree.find(tables[0]), tables[0])
    found = (home or tree).start(kind, f"FERPlus: {rule} of the votes in {source}, pictures in {pictures}", expected)
    labels = _label_rows(rows, source, RULES[rule], found)
    if home:
        for position, expression in labels.items():
            row = rows[position]
            found.add_labelled(row.where, row.path, home.get(row.path), expression, row.split, votes=row.by_name)
    else:
        _read_pixels(tree.root / pictures, rows, labels, found)
    return found


def _read_votes(tree: Tree) -> tuple[list[_Row], str]:
    """Return the rows of fer2013new.csv, or else of each label.csv, and the name of where they were."""
    if table := tree.find_one(VOTE_TABLE):
        columns = [name.casefold() for name in CANDIDATES]
        return [
            _read_row(f"{table}, line {number}", row["usage"], row["image name"], [row[name] for name in columns])
            for number, row in read_records(tree.root / table, ("Usage", "Image name", *CANDIDATES))
        ], VOTE_TABLE
    rows = []
    for usage, (folder, _) in FOLDERS.items():
        for table in tree.find("label.csv"):
            if folder_of(table).rpartition("/")[2].casefold() == folder.casefold():
                # name, "(0, 0, 48, 48)", ten votes; the box is missing where the repository's script wrote the file
                rows += [
                    _read_row(f"{table}, line {number}", usage, cells[0], cells[-len(CANDIDATES) :])
                    for number, cells in read_csv(tree.root / table)
                ]
    if not rows:
        raise tree.lack(
            f"votes of FERPlus ({VOTE_TABLE}, or label.csv in FER2013Train, FER2013Valid and FER2013Test)",
            "give the folder of its repository; copies sorted into folders by expression are augmented and are not read",
        )
    return rows, LABEL_FILES


def _read_row(where: str, usage: str, file: str, cells: list[str]) -> _Row:
    """Return a row of a label file; raise `UserError` for a picture in another folder."""
    if "/" in file or "\\" in file or file in (".", ".."):
        raise UserError(f"{where} names the picture {file!r} in another folder: give the name of its file alone.")
    folder, split = FOLDERS.get(usage.casefold(), ("", ""))
    votes = tuple(number for number in map(parse_number, cells) if number is not None and number >= 0)
    if not folder or len(votes) != len(CANDIDATES):
        return _Row(where, usage.casefold(), "", "", ())
    # Of the rows in which everybody saw no face 173 name no picture, and one names that of another row.
    faceless = not file or sum(votes) == votes[NO_FACE] > 0
    return _Row(where, usage.casefold(), "" if faceless else f"{folder}/{file.lower()}", split, votes)


def _label_rows(
    rows: list[_Row], source: str, rule: Callable[[Sequence[int]], int | None], found: Listing
) -> dict[int, str]:
    """Return {position: expression} of the rows that have one; note all others in the listing.

    Of rows that name one picture with equal votes the last stands, as the repository's script overwrites the first.
    """
    named = [position for position, row in enumerate(rows) if row.path]
    last, repeated = mark_repeated(rows[position].path for position in named)
    several = (rows[position] for position in compress(named, repeated))
    found.repeated = merge_repeated(((row.path, row.votes, row.where) for row in several), source)
    standing = set(compress(named, last))
    labels: dict[int, str] = {}
    for position, row in enumerate(rows):
        if not row.votes:
            found.reject(row.where, "has no known Usage or not ten votes")
        elif not row.path:
            found.dropped["NF"] += 1
        elif position in standing:
            chosen = rule(row.votes)
            name = "undecided" if chosen is None else CANDIDATES[chosen]
            if name in EIGHT:
                labels[position] = name
            else:
                found.dropped[name] += 1
    return labels


def _read_pixels(table: UPath, rows: list[_Row], labels: dict[int, str], found: Listing) -> None:
    """Add the labelled rows of fer2013.csv; raise `UserError` when its rows are not those the votes were given for."""
    records = read_records(table, ("pixels", "Usage"))
    for position, (row, record) in enumerate(zip_longest(rows, records)):
        if row is None or record is None or record[1]["usage"].casefold() != row.usage:
            raise UserError(
                f"Row {position + 1} of {table} is not that of {VOTE_TABLE}: both must have all rows in the same order, "
                "so unpack the original files again."
            )
        if position in labels:
            number, cells = record
            pixels = parse_pixels(cells["pixels"])
            if pixels is None:
                reason = f"line {number} of {table.name} does not hold {SIDE}×{SIDE} grey values"
                found.reject(row.path, reason, labels[position])
            else:
                more = {"pixels": pixels, "votes": row.by_name}
                found.add_labelled(row.where, row.path, row.path, labels[position], row.split, **more)


def parse_pixels(text: str) -> np.ndarray | None:
    """Return a picture (48, 48) uint8 from its grey values with blanks between them, None for anything else."""
    try:
        values = bytes(map(int, text.split()))
    except ValueError:
        return None
    return np.frombuffer(values, np.uint8).reshape(SIDE, SIDE) if len(values) == SIDE * SIDE else None
