"""FERPlus (Barsoum et al., ICMI 2016): the pictures of FER2013 with ten votes each, as its repository lays them out.

The votes are in fer2013new.csv, or in a label.csv beside the pictures; the 48×48 grey pictures are PNG files or the rows of
fer2013.csv, in the order of fer2013new.csv. Which expression a face shows is decided from its votes by a rule. The two kinds
of files disagree in the votes for some 1,600 faces, so each has its own counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from upath import UPath

from cafe.data.counts import Expected, by_name
from cafe.data.expressions import EXPRESSIONS, parse_expression
from cafe.data.indexing import LabelledFile, Listing
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
PIXEL_TABLES = ("fer2013.csv", "icml_face_data.csv")  # the same rows; the second has its columns in another order
SIDE = 48

# What the majority rule leaves of the distributed files, a picture that is listed twice counted once.
BY_TABLE = "the votes in fer2013new.csv by the majority rule"
BY_LABELS = "the votes in the three label.csv by the majority rule"
EXPECTED = {
    VOTE_TABLE: (
        Expected(
            "train",
            by_name(surprise=3149, fear=532, disgust=119, happiness=7287, sadness=3013, anger=2099, neutral=8739),
            BY_TABLE,
        ),
        Expected(
            "val",
            by_name(surprise=415, fear=62, disgust=24, happiness=865, sadness=351, anger=287, neutral=1182),
            BY_TABLE,
        ),
        Expected(
            "test",
            by_name(surprise=396, fear=83, disgust=18, happiness=893, sadness=384, anger=273, neutral=1090),
            BY_TABLE,
        ),
    ),
    LABEL_FILES: (
        Expected(
            "train",
            by_name(surprise=3136, fear=536, disgust=116, happiness=7284, sadness=3022, anger=2098, neutral=8733),
            BY_LABELS,
        ),
        Expected(
            "val",
            by_name(surprise=411, fear=60, disgust=25, happiness=862, sadness=348, anger=289, neutral=1180),
            BY_LABELS,
        ),
        Expected(
            "test",
            by_name(surprise=394, fear=86, disgust=16, happiness=892, sadness=382, anger=269, neutral=1083),
            BY_LABELS,
        ),
    ),
}

Rejected = list[tuple[str, str]]


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

    @property
    def path(self) -> str:
        return f"{FOLDERS[self.usage][0]}/{self.file}"

    @property
    def usable(self) -> bool:
        return self.usage in FOLDERS and bool(self.votes)

    @property
    def shows_no_face(self) -> bool:
        """Whether everybody voted so; the table names no picture in 173 of these rows, and in one that of another row."""
        return self.votes.index(max(self.votes)) == NO_FACE and sum(self.votes) == self.votes[NO_FACE]


def read_ferplus(root: UPath, rule: str = "majority") -> Listing:
    """List the faces of FERPlus labelled by a rule, `majority` as published or `argmax`.

    Faces whose votes are for contempt, unknown, NF or undecided are dropped and counted. Raises `UserError`.
    """
    if rule not in RULES:
        raise unknown("rule for FERPlus", rule, RULES)
    tree = Tree.open(root)
    rows, source = _read_votes(tree)
    spare, repeated = _find_repeated(rows, source)
    labels, dropped, rejected = _label_rows(rows, spare, RULES[rule])
    names = {folder.casefold() for folder, _ in FOLDERS.values()}
    homes = {
        folder_of(folder) for folder in map(folder_of, tree.images) if folder.rpartition("/")[2].casefold() in names
    }
    if homes:
        tree = tree.below(tree.choose(homes, "the folders FER2013Train, … of FERPlus"))
        files, pictures = _find_pictures(tree, rows, labels, rejected), "FER2013{Train,Valid,Test}/*.png"
    elif source == VOTE_TABLE and (table := tree.find_one(*PIXEL_TABLES)):
        files, pictures = _read_pixels(tree.root / table, rows, labels, rejected), table
    else:
        raise tree.lack(
            f"pictures for {source}",
            "put fer2013.csv of the FER2013 challenge, or folders of PNG made from it, beside it",
        )
    layout = f"FERPlus: {rule} of the votes in {source}, pictures in {pictures}"
    kind, expected = ("ferplus", EXPECTED[source]) if rule == "majority" else (f"ferplus-{rule}", ())
    return Listing(tree.root, files, layout, kind, 0, dropped, rejected, tree.packed, expected, repeated)


def _read_votes(tree: Tree) -> tuple[list[_Row], str]:
    """Return the rows of fer2013new.csv, or else of each label.csv, and the name of where they were."""
    if table := tree.find_one(VOTE_TABLE):
        columns = [name.casefold() for name in CANDIDATES]
        return [
            _Row(
                f"{table}, line {number}",
                row["usage"].casefold(),
                check_file_name(row["image name"], f"line {number} of {table}"),
                _parse_votes([row[c] for c in columns]),
            )
            for number, row in read_records(tree.root / table, ("Usage", "Image name", *CANDIDATES))
        ], VOTE_TABLE
    rows = []
    for usage, (folder, _) in FOLDERS.items():
        for table in tree.find("label.csv"):
            if folder_of(table).rpartition("/")[2].casefold() == folder.casefold():
                # name, "(0, 0, 48, 48)", ten votes; the box is missing where the repository's script wrote the file
                rows += [
                    _Row(
                        f"{table}, line {number}",
                        usage,
                        check_file_name(cells[0], f"line {number} of {table}"),
                        _parse_votes(cells[-len(CANDIDATES) :]),
                    )
                    for number, cells in read_csv(tree.root / table)
                ]
    if not rows:
        raise tree.lack(
            f"votes of FERPlus ({VOTE_TABLE}, or label.csv in FER2013Train, FER2013Valid and FER2013Test)",
            "give the folder of its repository; copies sorted into folders by expression are augmented and are not read",
        )
    return rows, LABEL_FILES


def _parse_votes(cells: list[str]) -> list[int]:
    votes = [number for number in map(parse_number, cells) if number is not None and number >= 0]
    return votes if len(votes) == len(CANDIDATES) else []


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
    rows: list[_Row], spare: set[int], rule: Callable[[Sequence[int]], int | None]
) -> tuple[dict[int, int], Counter[str], Rejected]:
    """Return {position: label} of the rows that have one, how many have none by reason, and those that cannot be used.

    Spare rows, whose picture another row stands for, are passed over.
    """
    labels: dict[int, int] = {}
    dropped: Counter[str] = Counter()
    rejected: Rejected = []
    for position, row in enumerate(rows):
        if position in spare:
            continue
        if not row.usable:
            rejected.append((row.where, "has no known Usage or not ten votes"))
        elif not row.file:
            dropped["NF"] += 1
        elif (chosen := rule(row.votes)) is None:
            dropped["undecided"] += 1
        elif CANDIDATES[chosen] in EXPRESSIONS:
            labels[position] = parse_expression(CANDIDATES[chosen])
        else:
            dropped[CANDIDATES[chosen]] += 1
    return labels, dropped, rejected


def _find_pictures(tree: Tree, rows: list[_Row], labels: dict[int, int], rejected: Rejected) -> list[LabelledFile]:
    files = []
    for position, label in labels.items():
        row = rows[position]
        if path := tree.get(row.path):
            files.append(LabelledFile(path, label, FOLDERS[row.usage][1]))
        else:
            rejected.append((row.path, "file not found"))
    return files


def _read_pixels(table: UPath, rows: list[_Row], labels: dict[int, int], rejected: Rejected) -> list[LabelledFile]:
    """Return the labelled rows of fer2013.csv; raise `UserError` when its rows are not those the votes were given for."""
    files, count = [], 0
    for position, (number, record) in enumerate(read_records(table, ("pixels", "Usage"))):
        count += 1
        if position >= len(rows) or record["usage"].casefold() != rows[position].usage:
            break
        if position in labels:
            row = rows[position]
            pixels = _parse_pixels(record["pixels"])
            if pixels is None:
                rejected.append((row.path, f"line {number} of {table.name} has not {SIDE}×{SIDE} grey values"))
            else:
                files.append(LabelledFile(row.path, labels[position], FOLDERS[row.usage][1], pixels=pixels))
    else:
        if count == len(rows):
            return files
    raise UserError(
        f"Row {min(count, len(rows))} of {table} is not that of {VOTE_TABLE}: both must have all rows in their order, "
        "so unpack the original files again."
    )


def _parse_pixels(text: str) -> np.ndarray | None:
    try:
        values = bytes(map(int, text.split()))
    except ValueError:
        return None
    return np.frombuffer(values, np.uint8).reshape(SIDE, SIDE) if len(values) == SIDE * SIDE else None
