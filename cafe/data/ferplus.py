"""FERPlus (Barsoum et al., ICMI 2016): the pictures of FER2013 with ten votes each, as its repository lays them out.

The votes are in fer2013new.csv, or in a label.csv beside the pictures; the 48×48 grey pictures are PNG files or the rows of
fer2013.csv, in the order of fer2013new.csv. Which expression a face shows is decided from its votes by a rule. The two kinds
of files disagree in the votes for some 1,600 faces, so each has its own counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from upath import UPath

from cafe.data.expressions import EXPRESSIONS, parse_expression
from cafe.data.indexing import Expected, Listing
from cafe.data.layouts import Tree, check_file_name, folder_of, parse_number, read_csv, read_records
from cafe.errors import UserError, unknown

CANDIDATES = (
    "neutral", "happiness", "surprise", "sadness", "anger", "disgust", "fear", "contempt", "unknown", "NF",
)  # fmt: skip
EMOTIONS = 8  # of the candidates; the last two say that there is none, or no face
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

# What the majority rule leaves of the distributed files, a picture that is listed twice counted once:
# surprise, fear, disgust, happiness, sadness, anger, neutral.
BY_TABLE = "the votes in fer2013new.csv by the majority rule"
BY_LABELS = "the votes in the three label.csv by the majority rule"
EXPECTED = {
    VOTE_TABLE: (
        Expected("train", (3149, 532, 119, 7287, 3013, 2099, 8739), BY_TABLE),
        Expected("val", (415, 62, 24, 865, 351, 287, 1182), BY_TABLE),
        Expected("test", (396, 83, 18, 893, 384, 273, 1090), BY_TABLE),
    ),
    LABEL_FILES: (
        Expected("train", (3136, 536, 116, 7284, 3022, 2098, 8733), BY_LABELS),
        Expected("val", (411, 60, 25, 862, 348, 289, 1180), BY_LABELS),
        Expected("test", (394, 86, 16, 892, 382, 269, 1083), BY_LABELS),
    ),
}


def choose_majority(votes: Sequence[int]) -> int | None:
    """Return the candidate with more than half of the votes once single ones are struck out, or None.

    The published rule: single votes are struck out for all ten candidates, unknown and NF among them, before the sum.
    """
    heard = [0 if count <= 1 else count for count in votes]
    most = max(heard)
    return heard.index(most) if 2 * most > sum(heard) else None


def choose_most_voted(votes: Sequence[int]) -> int | None:
    """Return the emotion of the eight with the most votes, the first of equal ones; None when none has any."""
    emotions = votes[:EMOTIONS]
    return emotions.index(max(emotions)) if any(emotions) else None


RULES: dict[str, Callable[[Sequence[int]], int | None]] = {"majority": choose_majority, "argmax": choose_most_voted}


@dataclass(frozen=True)
class _Row:
    """The votes for one picture; `file` is empty when it was found to show no face, `votes` when they cannot be read."""

    where: str
    usage: str
    file: str
    votes: list[int]

    @classmethod
    def parse(cls, where: str, usage: str, file: str, cells: list[str]) -> _Row:
        """Return a row of a label file; raise `UserError` for a picture in another folder."""
        votes = [number for number in map(parse_number, cells) if number is not None and number >= 0]
        votes = votes if len(votes) == len(CANDIDATES) else []
        return cls(where, usage.casefold(), check_file_name(file, where), votes)

    @property
    def path(self) -> str:
        return f"{FOLDERS[self.usage][0]}/{self.file}"

    @property
    def split(self) -> str:
        return FOLDERS[self.usage][1]

    @property
    def usable(self) -> bool:
        return self.usage in FOLDERS and bool(self.votes)

    @property
    def shows_no_face(self) -> bool:
        """Whether everybody voted so; the table names no picture in 173 of these rows, and in one that of another row."""
        return sum(self.votes) == self.votes[NO_FACE] > 0


def read_ferplus(root: UPath, rule: str = "majority") -> Listing:
    """List the faces of FERPlus labelled by a rule, `majority` as published or `argmax`.

    Faces whose votes are for contempt, unknown, NF or undecided are dropped and counted. Raises `UserError`.
    """
    if rule not in RULES:
        raise unknown("rule for FERPlus", rule, RULES)
    tree = Tree.open(root)
    rows, source = _read_votes(tree)
    kind, expected = ("ferplus", EXPECTED[source]) if rule == "majority" else (f"ferplus-{rule}", ())
    folders = {name.casefold() for name, _ in FOLDERS.values()}
    homes = {folder_of(home) for home in map(folder_of, tree.images) if home.rpartition("/")[2].casefold() in folders}
    if homes:
        tree, pictures = tree.below(tree.choose(homes, "the folders FER2013Train, … of FERPlus")), PICTURE_FOLDERS
    elif source == VOTE_TABLE and (tables := [name for name in PIXEL_TABLES if tree.find(name)]):
        pictures = tree.choose(tree.find(tables[0]), tables[0])
    else:
        remedy = "put fer2013.csv of the FER2013 challenge, or folders of PNG made from it, beside it"
        raise tree.lack(f"pictures for {source}", remedy)
    found = tree.start(kind, f"FERPlus: {rule} of the votes in {source}, pictures in {pictures}", expected)
    labels = _label_rows(rows, source, RULES[rule], found)
    if homes:
        _find_pictures(tree, rows, labels, found)
    else:
        _read_pixels(tree.root / pictures, rows, labels, found)
    return found


def _read_votes(tree: Tree) -> tuple[list[_Row], str]:
    """Return the rows of fer2013new.csv, or else of each label.csv, and the name of where they were."""
    if table := tree.find_one(VOTE_TABLE):
        columns = [name.casefold() for name in CANDIDATES]
        return [
            _Row.parse(f"{table}, line {number}", row["usage"], row["image name"], [row[name] for name in columns])
            for number, row in read_records(tree.root / table, ("Usage", "Image name", *CANDIDATES))
        ], VOTE_TABLE
    rows = []
    for usage, (folder, _) in FOLDERS.items():
        for table in tree.find("label.csv"):
            if folder_of(table).rpartition("/")[2].casefold() == folder.casefold():
                # name, "(0, 0, 48, 48)", ten votes; the box is missing where the repository's script wrote the file
                rows += [
                    _Row.parse(f"{table}, line {number}", usage, cells[0], cells[-len(CANDIDATES) :])
                    for number, cells in read_csv(tree.root / table)
                ]
    if not rows:
        raise tree.lack(
            f"votes of FERPlus ({VOTE_TABLE}, or label.csv in FER2013Train, FER2013Valid and FER2013Test)",
            "give the folder of its repository; copies sorted into folders by expression are augmented and are not read",
        )
    return rows, LABEL_FILES


def _find_repeated(rows: list[_Row], source: str) -> tuple[set[int], list[str]]:
    """Return the positions of rows whose picture another row stands for, and a line about each such picture.

    Of rows with equal votes the last stands, as the repository's script overwrites the picture of the first; a row in
    which nobody saw a face never does. Raises `UserError` naming all pictures listed with different votes.
    """
    places: dict[str, list[int]] = {}
    for position, row in enumerate(rows):
        if row.usable and row.file:
            places.setdefault(row.path.casefold(), []).append(position)
    spare: set[int] = set()
    lines: list[str] = []
    disputed: list[str] = []
    for positions in places.values():
        if len(positions) == 1:
            continue
        standing = [place for place in positions if not rows[place].shows_no_face] or positions
        line = f"{rows[positions[0]].path} ({'; '.join(rows[place].where for place in positions)})"
        (lines if len({tuple(rows[place].votes) for place in standing}) == 1 else disputed).append(line)
        spare |= {*positions} - {standing[-1]}
    if disputed:
        raise UserError(
            f"{source} lists {len(disputed)} pictures more than once with different votes, {', '.join(disputed)}: "
            "keep one row of each."
        )
    return spare, lines


def _label_rows(
    rows: list[_Row], source: str, rule: Callable[[Sequence[int]], int | None], found: Listing
) -> dict[int, int]:
    """Return {position: label} of the rows that have one; note all others in the listing."""
    spare, found.repeated = _find_repeated(rows, source)
    labels: dict[int, int] = {}
    for position, row in enumerate(rows):
        if position in spare:
            continue
        if not row.usable:
            found.reject(row.where, "has no known Usage or not ten votes")
        elif not row.file:
            found.dropped["NF"] += 1
        elif (chosen := rule(row.votes)) is None:
            found.dropped["undecided"] += 1
        elif CANDIDATES[chosen] in EXPRESSIONS:
            labels[position] = parse_expression(CANDIDATES[chosen])
        else:
            found.dropped[CANDIDATES[chosen]] += 1
    return labels


def _find_pictures(tree: Tree, rows: list[_Row], labels: dict[int, int], found: Listing) -> None:
    for position, label in labels.items():
        if path := tree.get(rows[position].path):
            found.add(path, label, rows[position].split)
        else:
            found.reject(rows[position].path, "file not found")


def _read_pixels(table: UPath, rows: list[_Row], labels: dict[int, int], found: Listing) -> None:
    """Add the labelled rows of fer2013.csv; raise `UserError` when its rows are not those the votes were given for."""
    count = 0
    for position, (number, record) in enumerate(read_records(table, ("pixels", "Usage"))):
        count += 1
        if position >= len(rows) or record["usage"].casefold() != rows[position].usage:
            break
        if position in labels:
            row, pixels = rows[position], _parse_pixels(record["pixels"])
            if pixels is None:
                found.reject(row.path, f"line {number} of {table.name} does not hold {SIDE}×{SIDE} grey values")
            else:
                found.add(row.path, labels[position], row.split, pixels=pixels)
    else:
        if count == len(rows):
            return
    raise UserError(
        f"Row {min(count, len(rows))} of {table} is not that of {VOTE_TABLE}: both must have all rows in the same order, "
        "so unpack the original files again."
    )


def _parse_pixels(text: str) -> np.ndarray | None:
    try:
        values = bytes(map(int, text.split()))
    except ValueError:
        return None
    return np.frombuffer(values, np.uint8).reshape(SIDE, SIDE) if len(values) == SIDE * SIDE else None
