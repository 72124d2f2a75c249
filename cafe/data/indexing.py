"""What all readers share: a listing of labelled files, what a complete copy holds, and the pass that opens each file once.

A reader only says which files there are and what they show; sizes, digests, broken files and splits are handled here.
"""

from __future__ import annotations

import hashlib
import io
import tomllib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby
from operator import itemgetter
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image
from upath import UPath

from cafe.data.expressions import (
    CONTEMPT,
    EIGHT,
    EXPRESSIONS,
    OTHERS,
    ClassChoice,
    check_classes,
    find_class,
    normalise_name,
    order_classes,
)
from cafe.data.images import Box, UnreadableImageError, clip_box, read_bytes, read_size, suffix_of
from cafe.data.labels import LabelMap, parse_number, refuse_numbers
from cafe.data.manifest import Face, Manifest, assign_splits
from cafe.data.packed.archives import MemberError, Span, find_span
from cafe.data.rows import LARGE, ROWS_AT_ONCE, read_pieces, read_values, write_files
from cafe.errors import AnswerError, UserError, unknown
from cafe.files import check_encoded, find_below, is_encoded, place_below, write_file
from cafe.spool import Spool, sort
from cafe.threads import map_threads

OWN_KINDS = ("folder", "synthetic", "table")  # sets of the user's own, which may be split at will
TOTAL = "all"  # stands for the expression where only the sum of a split is known
NAMED = 10  # unwanted classes in an error before "and N more"
ROWS_NAMED = 3  # rows of each


@dataclass(frozen=True)
class Expected:
    """What a split of a complete copy holds: faces per expression in the order of `EXPRESSIONS`, or their total alone.

    `source` tells where the numbers come from; `doubt`, when there is one, why they may be wrong.
    """

    split: str
    counts: tuple[int, ...]
    source: str
    doubt: str = ""


def read_expected(name: str) -> tuple[Expected, ...]:
    """Return what a complete copy of a data set holds, as counts.toml says."""
    entries = tomllib.loads(Path(__file__).with_name("counts.toml").read_text(encoding="utf-8"))[name]
    return tuple(Expected(**{**entry, "counts": tuple(entry["counts"])}) for entry in entries)


@dataclass(frozen=True)
class CountDifference:
    """A number of faces that is not the expected one; a certain difference means that the copy is not the data set."""

    split: str
    expression: str
    expected: int
    found: int
    certain: bool
    source: str


def count_differences(
    expected: Sequence[Expected], found: Counter[tuple[str, str]], classes: Sequence[str] = EXPRESSIONS
) -> list[CountDifference]:
    """Return where the faces found per (split, expression) differ from what is expected.

    Numbers are known of the seven expressions: those that a class set lacks are not compared, nor is a total without them.

    A difference is certain where the numbers are known per expression and beyond doubt, or where a split is missing.
    """
    differences = []
    for split in expected:
        known = len(split.counts) == len(EXPRESSIONS)
        numbers = [found[split.split, name] for name in EXPRESSIONS]
        certain = (known and not split.doubt) or not any(numbers)
        source = f"{split.source}; {split.doubt}" if split.doubt else split.source
        names, numbers = (EXPRESSIONS, numbers) if known else ((TOTAL,), [sum(numbers)])
        differences += [
            CountDifference(split.split, name, wanted, number, certain, source)
            for name, wanted, number in zip(names, split.counts, numbers, strict=True)
            if number != wanted and (name in classes if known else set(EXPRESSIONS) <= set(classes))
        ]
    return differences


@dataclass(frozen=True)
class LabelledFile:
    """A face before it was opened: a file, a `box` of it, or grey `pixels` (H, W) uint8 that are no file yet.

    `expression` is a name in any spelling, a number or a code until classes are selected; `where` is the row of the label
    file it stands in. `sample` names the face where its path does not, as where a picture shows several.
    `span` says where in its archive it lies, where that is known already.
    """

    path: str
    expression: str
    split: str = ""
    group: str | None = None
    box: Box | None = None
    pixels: np.ndarray | None = field(default=None, compare=False)
    where: str = field(default="", compare=False)
    votes: Mapping[str, int] = field(default_factory=dict, compare=False)  # how many people chose each name
    sample: str = ""
    span: Span | None = field(default=None, compare=False)
    kept: Mapping[str, str] = field(default_factory=dict)  # further columns of its row that the manifest keeps


Files = Spool[LabelledFile] | list[LabelledFile]  # a reader may fill a plain list, too


@dataclass
class Listing:
    """The labelled files a reader finds, filled in as it goes through them, whatever they show; `select` chooses of them.

    `files` are paths below `root`, `layout` says what was recognised there, `kind` which data set it is, `expected` what
    a complete copy holds, `packed` which archives have not been unpacked. `ignored` counts files that are no faces of the
    set, by ending, `dropped` faces that show no expression or are left out, by reason; `rejected` names rows of label
    files that cannot be used (where, reason, the expression they name), `repeated` pictures that are listed more than
    once and count once. `unread` are the columns of a table that play no part, `meanings` what labels mean that are no
    names: the label, the name, empty where its faces are left out, and how many there are; `notes` are sentences about
    what is odd. `classes` is the class set once one is selected; `tables` are those that say the labels, where some do.
    """

    root: UPath
    kind: str
    layout: str
    expected: tuple[Expected, ...] = ()
    packed: list[str] = field(default_factory=list)
    files: Files = field(default_factory=Spool)
    ignored: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    rejected: list[tuple[str, str, str]] = field(default_factory=list)
    repeated: list[str] = field(default_factory=list)
    unread: tuple[str, ...] = ()
    meanings: list[tuple[str, str, int]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    classes: tuple[str, ...] = ()
    tables: tuple[str, ...] = ()

    @property
    def labelled_by(self) -> str:
        """What says the labels, and so where a mistake in them is to be looked for: a table, or the root itself."""
        first, *others = self.tables or (str(self.root),)
        return f"{first} (and {len(others)} more)" if others else first

    def add(self, path: str, expression: str, split: str = "", **more: Any) -> None:
        """Add a face: its file below `root`, the name of what it shows, split, and further fields of `LabelledFile`."""
        self.files.append(LabelledFile(path, expression, split, **more))

    def add_labelled(self, where: str, file: str, path: str | None, expression: str, split: str, **more: Any) -> None:
        """Add the face that a row of a label file names, or note why it cannot be used.

        `where` is the row, `file` the picture it names, `path` where that lies below `root`, `expression` a name.
        """
        if expression.casefold() in OTHERS:
            self.dropped[expression.casefold()] += 1
        elif path is None:
            self.reject(file, "file not found", expression)
        else:
            self.add(path, expression, split, where=where, **more)

    def group_by_name(self) -> None:
        """Make the faces whose file names agree up to the first `_` a group."""
        self.files = Spool(replace(file, group=PurePosixPath(file.path).name.split("_")[0]) for file in self.files)

    def count_ignored(self, files: Iterable[str]) -> None:
        """Count by their endings which of some files below `root` no label names; those of dropped faces are not known."""
        used = Counter(suffix_of(path) for path, _ in groupby(sort((file.path for file in self.files), str)))
        self.ignored = Counter(map(suffix_of, files)) - used
        dropped = self.dropped.total()
        for suffix, count in self.ignored.most_common():
            self.ignored[suffix] -= min(count, dropped)
            dropped -= min(count, dropped)
        self.ignored = +self.ignored

    def reject(self, where: str, reason: str, expression: str = "") -> None:
        """Note a row of a label file that cannot be used, with the expression where it names one."""
        self.rejected.append((where, reason, expression))

    def translate(self, labels: LabelMap) -> Listing:
        """Return the listing with the names of what its labels mean; faces that mean nothing are left out and counted.

        Raises `UserError` for labels that are not explained, where no label is a number though an order is given, and for
        published sets, whose labels are known.
        """
        if self.kind not in OWN_KINDS:
            raise UserError(f"The labels of {self.kind} are known: leave --label-order and --labels out.")
        counts = Counter(file.expression for file in self.files)
        labels.check(self.labelled_by, counts)
        names = {label: labels.find(label) for label in (*counts, *(label for *_, label in self.rejected if label))}
        if strange := Counter({label: counts[label] for label, name in names.items() if name is None}):
            raise labels.refuse(self.labelled_by, strange)
        result = replace(self, files=Spool(), dropped=Counter(self.dropped))
        explained = sorted(names.items(), key=lambda pair: (parse_number(pair[0]) or 0, pair[0]))
        result.meanings = [(label, name or "", counts[label]) for label, name in explained if name != label]
        result.rejected = [(where, reason, names.get(label) or "") for where, reason, label in self.rejected]
        for file in self.files:
            name = names[file.expression] or ""
            if name and normalise_name(name) not in OTHERS:
                result.files.append(replace(file, expression=name))
            else:
                result.dropped[name or f"label {file.expression}"] += 1
        return result

    def select(self, choice: ClassChoice) -> Listing:
        """Return the listing with the class set of a choice and each face's class by its name in that set.

        Left out and counted are the classes to skip, contempt beside the seven and in a published set, and faces that are
        labelled to show no expression. Raises `UserError` naming all other classes that are not in the set, with their
        faces, for labels that are numbers, and for a class to skip that nobody knows.
        """
        names = Counter(file.expression for file in self.files)
        _check_skipped(choice, [*names, *(expression for *_, expression in self.rejected)])
        classes = choice.classes
        if classes is None:
            own = (normalise_name(name) for name in names if not find_class(name, choice.skip))
            classes = order_classes(own)
            if self.files:
                check_classes(classes)
        seven = self.kind not in OWN_KINDS or classes == EXPRESSIONS
        optional = (*choice.skip, *((CONTEMPT,) if seven else ()))
        result = replace(self, classes=classes, files=Spool(), dropped=Counter(self.dropped), rejected=[])
        result.ignored = Counter(self.ignored)
        strange, rows = Counter[str](), dict[str, list[str]]()
        for file in self.files:
            if name := _find_wanted(file.expression, classes, choice):
                result.files.append(file if name == file.expression else replace(file, expression=name))
            elif name := find_class(file.expression, optional):
                result.dropped[name] += 1
            elif normalise_name(file.expression) in OTHERS:
                result.dropped[normalise_name(file.expression)] += 1
            elif file.where and self.kind not in OWN_KINDS and not find_class(file.expression, EIGHT):
                result.reject(file.where, str(unknown("expression", file.expression, classes)))
                result.ignored[suffix_of(file.path)] += 1
            else:
                known = find_class(file.expression, EIGHT) or normalise_name(file.expression)
                strange[known] += 1
                if strange[known] <= ROWS_NAMED and file.where and self.kind in OWN_KINDS:
                    rows.setdefault(known, []).append(file.where)
        numbers = {n: count for name, count in strange.items() if (n := parse_number(name)) is not None}
        if numbers:
            raise refuse_numbers(self.labelled_by, Counter(numbers))
        if strange:
            raise _refuse(self.labelled_by, strange, rows, classes)
        for where, reason, expression in self.rejected:
            name = None if _find_wanted(expression, classes, choice) else find_class(expression, optional)
            if name:
                result.dropped[name] += 1
            else:
                result.reject(where, reason, expression)
        return result

    def put_into(self, split: str) -> None:
        """Put every face into one split; raise `UserError` for a published set, whose splits its protocols rely on."""
        if self.kind not in OWN_KINDS and (self.expected or any(file.split for file in self.files)):
            raise UserError(
                f"--split {split} has no meaning for {self.kind}, which comes split: it is for {', '.join(OWN_KINDS)}."
            )
        self.files = Spool(replace(file, split=split) for file in self.files)

    def counts(self) -> Counter[tuple[str, str]]:
        """Files per (split, expression)."""
        return Counter((file.split, file.expression) for file in self.files)


def _find_wanted(expression: str, classes: tuple[str, ...], choice: ClassChoice) -> str | None:
    """Return the class of a face, None where it is to be skipped or of no class of the set."""
    if find_class(expression, choice.skip):
        return None
    if choice.classes is None:  # names as they stand
        return normalise_name(expression) if normalise_name(expression) in classes else None
    return find_class(expression, classes)


def _check_skipped(choice: ClassChoice, names: Sequence[str]) -> None:
    for skipped in choice.skip:
        if not find_class(skipped, EIGHT) and not any(find_class(name, (skipped,)) for name in dict.fromkeys(names)):
            there = sorted({normalise_name(name) for name in names if name})
            raise unknown("class to skip", skipped, there)


def _refuse(place: str, strange: Counter[str], rows: Mapping[str, list[str]], classes: Sequence[str]) -> UserError:
    ranked = sorted(strange.items(), key=lambda entry: (-entry[1], entry[0]))
    shown = [f"{name!r} ({_name_faces(count, rows.get(name, []))})" for name, count in ranked[:NAMED]]
    more = f" and {len(strange) - NAMED} more" if len(strange) > NAMED else ""
    left_out = ",".join(sorted(strange)[:NAMED]) + (",…" if more else "")
    return UserError(
        f"{place} has faces of other classes than {', '.join(classes)}: {', '.join(shown)}{more}: leave them out with "
        f"--skip {left_out}, or choose the classes with --expressions: 8 adds contempt, own takes all names that stand "
        "there, NAME,NAME,… those you name."
    )


def _name_faces(count: int, rows: list[str]) -> str:
    """Say how many faces there are and where the first of them stand in a table, if they do."""
    said = f"{count:,} face{'s' * (count != 1)}"
    return said + (f" in {', '.join(rows)}{', …' * (count > ROWS_NAMED)}" if rows else "")


@dataclass(frozen=True)
class Index:
    """A manifest, the listing it was made from, and every file or row that could not be used: `broken` (where, reason)."""

    manifest: Manifest
    listing: Listing
    broken: list[tuple[str, str]]

    @property
    def outvoted(self) -> tuple[int, int]:
        """How many faces have votes, and of how many of them another class than the label has the most."""
        voted = against = 0
        for piece in read_pieces(self.manifest.table, ("label", "votes")):
            part = replace(self.manifest, table=piece)
            if (votes := part.votes) is not None:
                most = votes.max(axis=1)
                voted += int((most > 0).sum())
                against += int((votes[np.arange(len(part)), part.labels] < most).sum())
        return voted, against

    @property
    def strange_votes(self) -> Counter[str]:
        """How many votes the faces have for names that are no class of the set: they play no part."""
        lost: Counter[str] = Counter()
        for file in self.listing.files:
            lost.update(
                {name: count for name, count in file.votes.items() if not find_class(name, self.manifest.classes)}
            )
        return +lost

    @property
    def duplicates(self) -> Sequence[list[str]]:
        """Groups of samples whose files are byte for byte the same."""
        return Spool([sample for _, sample, _ in group] for group in self._alike)

    @property
    def training_twins(self) -> Counter[str]:
        """How many faces of each other split are also in the training split, byte for byte."""
        groups = ([split for *_, split in group] for group in self._alike)
        return Counter(split for splits in groups if "train" in splits for split in splits if split != "train")

    @cached_property
    def _alike(self) -> Spool[list[tuple[str, str, str]]]:
        """Groups of several faces (content, sample_id, split) of one content, by the first sample_id of each."""
        rows = read_values(self.manifest.table, "digest", "box", "sample_id", "split")
        faces = sort(((f"{digest} {box}", sample, split) for digest, box, sample, split in rows), itemgetter(0))
        groups = (list(group) for _, group in groupby(faces, itemgetter(0)))
        return sort((group for group in groups if len(group) > 1), lambda group: group[0][1])

    def counts(self) -> Counter[tuple[str, str]]:
        """Faces per (split, expression)."""
        rows = read_values(self.manifest.table, "split", "label")
        return Counter((split, self.manifest.classes[label]) for split, label in rows)

    def count_values(self, column: str) -> Counter[Any]:
        """How many faces have each value of a column."""
        return Counter(value for (value,) in read_values(self.manifest.table, column))


def index_files(
    name: str,
    listing: Listing,
    progress: Callable[[int, int], None] = lambda done, total: None,
    images: UPath | None = None,
    place: UPath | None = None,
) -> Index:
    """Open every listed file once and return its manifest; a file that cannot be read is named, never fatal.

    `progress(done, total)` counts files. Faces that are pixels of a table are first written as PNG below `images`, which
    is then the manifest's root. The rows of a large manifest are written beside `place`, where it is to be saved; without
    one they are held in memory. A listing without a class set is read with the seven expressions. Raises `UserError` when
    not one file can be read.
    """
    listing = listing if listing.classes else listing.select(ClassChoice())
    root = listing.root
    check_encoded(str(root))  # before all files are read
    if any(file.pixels is not None for file in listing.files):
        assert images is not None
        root = images
    faces, broken = Spool[Face](), [(where, reason) for where, reason, _ in listing.rejected]
    labels = {name: label for label, name in enumerate(listing.classes)}
    parted = True
    opened = map_threads(lambda file: _open(root, file, labels), listing.files)
    for done, result in enumerate(opened, start=1):
        if isinstance(result, Face):
            faces.append(result)
            parted = parted and not result.split
        else:
            broken.append(result)
        progress(done, len(listing.files))
    if not faces:
        reason = f" (first: {broken[0][0]}: {broken[0][1]})" if broken else ""
        raise UserError(f"No readable face image below {root}{reason}: give the folder that holds the faces.")
    split = assign_splits(faces)
    manifest = Manifest.from_faces(name, str(root), split, listing.kind, listing.classes, parted, place)
    return Index(manifest, listing, sorted(broken))


def thin_training(manifest: Manifest, faces: int, place: UPath | None = None) -> Manifest:
    """Return a manifest with at most `faces` training faces, in the expressions' proportions; other splits stay whole.

    Faces are taken in the order of the hash of their sample_id, the same everywhere. The rows of a large manifest are
    written beside its `place`, where it is to be saved; without one they are held in memory.
    """
    rows = enumerate(read_values(manifest.table, "split", "sample_id", "label"))
    names = ((name.encode(), label, row) for row, (split, name, label) in rows if split == "train")
    training = sort(((hashlib.sha256(name).digest(), label, row) for name, label, row in names), itemgetter(0))
    kept = np.ones(len(manifest), bool)
    wanted = Counter(_share_out(Counter(label for _, label, _ in training), faces))
    for _, label, row in training:
        kept[row] = wanted[label] > 0
        wanted[label] -= 1
    chosen = np.flatnonzero(kept)
    if place is None or len(chosen) <= LARGE:
        return manifest.choose(chosen)
    starts = range(0, len(chosen), ROWS_AT_ONCE)
    tables = (manifest.choose(chosen[start : start + ROWS_AT_ONCE]).table for start in starts)
    return replace(manifest, table=write_files(place, tables, manifest.classes))


def _share_out(counts: Counter[int], total: int) -> dict[int, int]:
    """Return what each class gets of a total in proportion to its count, whole numbers by the largest remainder."""
    total = min(total, counts.total())
    exact = {label: total * count / counts.total() for label, count in counts.items()}
    shares = {label: int(share) for label, share in exact.items()}
    by_remainder = sorted(exact, key=lambda label: (shares[label] - exact[label], label))
    for label in by_remainder[: total - sum(shares.values())]:
        shares[label] += 1
    return shares


def _open(root: UPath, file: LabelledFile, labels: Mapping[str, int]) -> Face | tuple[str, str]:
    """Return a face with its label, votes, size and digest, or (path, reason) when its file cannot be read."""
    if not is_encoded(file.path):
        return file.path, "a name that is no UTF-8"
    path, box = find_below(root, file.path) if file.pixels is None else place_below(root, file.path), file.box
    span = file.span
    try:
        if file.pixels is None:
            span = span or find_span(path)
            data = read_bytes(path, span)
        else:
            data = _write_pixels(path, file.pixels)
        width, height = read_size(data)
        if box:
            box = clip_box(box, width, height)
            width, height = box[2:]
    except (UnreadableImageError, MemberError, AnswerError) as error:
        return file.path, str(error)
    digest = hashlib.sha256(data).hexdigest()
    votes = _count_votes(file.votes, tuple(labels))
    sample, label = file.sample or file.path, labels[file.expression]
    return Face(sample, file.path, label, file.split, file.group, width, height, digest, box, votes, span, file.kept)


def _count_votes(votes: Mapping[str, int], classes: tuple[str, ...]) -> tuple[int, ...] | None:
    """Return how many people chose each class, by names in any spelling; None where nobody chose one of these."""
    counts = dict.fromkeys(classes, 0)
    for name, count in votes.items():
        if found := find_class(name, classes):
            counts[found] += count
    return tuple(counts.values()) if any(counts.values()) else None


def _write_pixels(path: UPath, pixels: np.ndarray) -> bytes:
    """Write grey pixels as a PNG and return its bytes: uncompressed, so that no version of a library changes them."""
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "PNG", compress_level=0)
    write_file(path, sink.getvalue())
    return sink.getvalue()
