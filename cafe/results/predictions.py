"""Predictions are data: one row per face with its label and class probabilities, kept as Parquet.

Every number, interval, test and figure is computed from these files, so that each can be recomputed and checked.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from upath import UPath

from cafe.data.expressions import EXPRESSIONS, order_classes
from cafe.errors import StorageError, UserError
from cafe.files import list_folder, write_file
from cafe.records import digest
from cafe.results.protocols import ALL_PROTOCOLS, find_protocol
from cafe.seals import damaged, encode_table, read_table

COLUMNS = ("sample_id", "label", "probabilities", "group", "votes")  # of every file; a method may add others
REMEDY = "evaluate the run again with `cafe evaluate RUN`"


@dataclass(frozen=True)
class Predictions:
    """What a run predicted for the faces of a target: labels (N,) int64 and class probabilities (N, K) float32.

    `classes` are those of the model, K, of which labels are the places. `votes` (N, K) int64 says how many people chose each
    of them, 0 throughout where that is not known of a face. `further` (N,) float32 by name is what a method says of a face
    beside its probabilities, such as RUL's uncertainty; no number here is computed from it. `groups` names the person or
    film of each face, None where it has none; `about` names the run, target, protocol, split, kind and manifest, and of a
    target with other classes than the model these and the number of faces that were left out for it.
    """

    sample_ids: list[str]
    labels: np.ndarray
    probabilities: np.ndarray
    about: dict[str, str]
    groups: list[str | None] | None = None
    classes: tuple[str, ...] = EXPRESSIONS
    votes: np.ndarray | None = None
    further: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def target_classes(self) -> tuple[str, ...]:
        """The classes of the target's manifest, which a file names only where they are not the model's."""
        named = self.about.get("target_classes")
        return tuple(json.loads(named)) if named else self.classes

    @property
    def other_classes(self) -> int:
        """How many faces of the target were left out, being of classes that the model lacks."""
        return int(self.about.get("other_classes", 0))

    @property
    def rows(self) -> str:
        """Names the faces; empty for an old file that was loaded without their ids."""
        return self.about.get("rows") or (name_rows(self.sample_ids) if self.sample_ids else "")

    @cached_property
    def predicted(self) -> np.ndarray:
        """The most probable class of every face, (N,)."""
        return np.asarray(self.probabilities.argmax(axis=1))

    @cached_property
    def confidence(self) -> np.ndarray:
        """The probability of the predicted class of every face, (N,)."""
        return np.asarray(self.probabilities.max(axis=1))

    @property
    def answers(self) -> Answers:
        """What is left of them when all probabilities but the highest are forgotten."""
        predicted = self.predicted.astype(np.int16)
        about = (self.about, self.groups, self.classes)
        return Answers(self.sample_ids, self.labels, predicted, self.confidence.astype(np.float32), *about)

    def without(self, samples: Collection[str]) -> Predictions:
        """Return the predictions of all faces but the given ones."""
        return self._take([row for row, sample in enumerate(self.sample_ids) if sample not in samples])

    def of_class(self, label: int) -> Predictions:
        """Return the predictions of the faces with a label."""
        return self._take(np.flatnonzero(self.labels == label).tolist())

    def share_classes(self) -> Predictions:
        """Return them over the classes that the model and the target share, the probabilities of others left out.

        What is left is divided by its sum; a face whose every probability is of other classes gets equal ones.
        """
        kept = [place for place, name in enumerate(self.classes) if name in self.target_classes]
        if len(kept) == len(self.classes):
            return self
        left = self.probabilities[:, kept]
        sums = left.sum(axis=1, keepdims=True)
        probabilities = np.divide(left, sums, out=np.full_like(left, 1 / max(1, len(kept))), where=sums > 0)
        classes = tuple(self.classes[place] for place in kept)
        labels, votes = np.searchsorted(kept, self.labels), None if self.votes is None else self.votes[:, kept]
        return replace(self, labels=labels, probabilities=probabilities, classes=classes, votes=votes)

    def order_classes(self) -> Predictions:
        """Return them with the classes in the order of tables, whatever the order of the model's."""
        classes = order_classes(self.classes)
        if classes == self.classes:
            return self
        places = [self.classes.index(name) for name in classes]
        labels, votes = np.argsort(places)[self.labels], None if self.votes is None else self.votes[:, places]
        return replace(self, labels=labels, probabilities=self.probabilities[:, places], classes=classes, votes=votes)

    def sort(self) -> Predictions:
        """Return them in the order of the samples' ids."""
        return self._take(sorted(range(len(self.labels)), key=self.sample_ids.__getitem__))

    def _take(self, rows: list[int]) -> Predictions:
        return replace(
            self,
            sample_ids=[self.sample_ids[row] for row in rows],
            labels=self.labels[rows],
            probabilities=self.probabilities[rows],
            groups=[self.groups[row] for row in rows] if self.groups else None,
            votes=None if self.votes is None else self.votes[rows],
            further={name: values[rows] for name, values in self.further.items()},
        )

    def save(self, path: UPath) -> None:
        """Write as Parquet: sample_id, label, probabilities, group and, where there are any, votes and further columns.

        Raises `UserError` naming a face whose probabilities are not finite, or a further column by the name of another.
        """
        broken = np.flatnonzero(~np.isfinite(self.probabilities).all(axis=1))
        if len(broken):
            raise UserError(
                f"The probabilities of {self.sample_ids[broken[0]]!r} and {len(broken) - 1} other faces are NaN or "
                "infinite: train with a smaller learning rate, or with --precision fp32."
            )
        probabilities = self.probabilities.astype(np.float32).ravel()
        table = pa.table({
            "sample_id": pa.array(self.sample_ids, pa.string()),
            "label": pa.array(self.labels, pa.int8()),
            "probabilities": pa.FixedSizeListArray.from_arrays(pa.array(probabilities), len(self.classes)),
            "group": pa.array(self.groups or [None] * len(self.labels), pa.string()),
        })  # fmt: skip
        if self.votes is not None:
            votes = pa.FixedSizeListArray.from_arrays(pa.array(self.votes.ravel(), pa.int32()), len(self.classes))
            table = table.append_column("votes", votes)
        for name, values in self.further.items():
            if name in COLUMNS:
                raise UserError(
                    f"The method says {name!r} of each face, which is a column of all predictions: rename it."
                )
            table = table.append_column(name, pa.array(values, pa.float32()))
        about = {**self.about, "expressions": json.dumps(self.classes)}
        write_file(path, encode_table(table.replace_schema_metadata(about)))

    @classmethod
    def load(cls, path: UPath, named: bool = True) -> Predictions | None:
        """Read what `save` wrote; None when it is missing: then the target is not evaluated.

        Without `named`, ids, groups and further columns are left out, which takes most of the time. Raises `DamagedError`
        for a file that is not what was written, or not finite.
        """
        try:
            with _naming_damage(path):
                found = cls._parse(path, named)
        except FileNotFoundError:
            return None
        known = (found.labels >= 0) & (found.labels < len(found.classes))
        if len(found.probabilities) != len(known) or not known.all() or not np.isfinite(found.probabilities).all():
            raise damaged(path, REMEDY)
        return found

    @classmethod
    def _parse(cls, path: UPath, named: bool) -> Predictions:
        table = read_table(path, REMEDY, None if named else ["label", "probabilities", "votes"])
        about, classes = _read_about(table)
        grouped = named and "group" in table.column_names and table["group"].null_count < len(table)
        return cls(
            table["sample_id"].to_numpy().tolist() if named else [],
            table["label"].to_numpy().astype(np.int64),
            _read_lists(table["probabilities"], len(classes)),
            about,
            table["group"].to_numpy().tolist() if grouped else None,
            classes,
            _read_lists(table["votes"], len(classes)).astype(np.int64) if "votes" in table.column_names else None,
            {name: table[name].to_numpy() for name in table.column_names if name not in COLUMNS},
        )


@dataclass(frozen=True)
class Answers:
    """What a run took the faces of a target for: of its `Predictions`, all that tests and galleries need.

    `predicted` (N,) int16 and `confidence` (N,) float32 take a fraction of the room of probabilities, so that those of many
    runs can be kept.
    """

    sample_ids: list[str]
    labels: np.ndarray
    predicted: np.ndarray
    confidence: np.ndarray
    about: dict[str, str]
    groups: list[str | None] | None = None
    classes: tuple[str, ...] = EXPRESSIONS

    def of_class(self, label: int) -> Answers:
        """Return those for the faces with a label."""
        rows = np.flatnonzero(self.labels == label)
        return replace(
            self,
            sample_ids=[self.sample_ids[row] for row in rows],
            labels=self.labels[rows],
            predicted=self.predicted[rows],
            confidence=self.confidence[rows],
            groups=[self.groups[row] for row in rows] if self.groups else None,
        )

    def share(self, other: Answers) -> Answers:
        """Return them with the ids, labels and groups of others, where these are equal, so that they are there once."""
        alike = self.sample_ids == other.sample_ids
        labels = other.labels if alike and np.array_equal(self.labels, other.labels) else self.labels
        groups = other.groups if alike and self.groups == other.groups else self.groups
        return replace(self, sample_ids=other.sample_ids if alike else self.sample_ids, labels=labels, groups=groups)


def _read_lists(column: pa.ChunkedArray, width: int) -> np.ndarray:
    """Return a column of lists of one length as (N, width)."""
    values: np.ndarray = column.combine_chunks().flatten().to_numpy().reshape(-1, width)
    return values


class Head(NamedTuple):
    """What a file of predictions says of itself, with the number of its faces; `rows` names them, empty in old files."""

    about: dict[str, str]
    classes: tuple[str, ...]
    faces: int
    rows: str

    @classmethod
    def load(cls, path: UPath) -> Head | None:
        """Read it without the predictions, a fifth of the work; None where there is no file. Raises `DamagedError`."""
        try:
            with _naming_damage(path):
                table = read_table(path, REMEDY, ["label"])
                about, classes = _read_about(table)
        except FileNotFoundError:
            return None
        if len(table) and "rows" not in about:  # an old file
            found = Predictions.load(path)
            return cls(about, classes, len(table), found.rows) if found else None
        return cls(about, classes, len(table), about.get("rows", ""))


def _read_about(table: pa.Table) -> tuple[dict[str, str], tuple[str, ...]]:
    """Return what a file says of its predictions, and their classes."""
    about = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
    classes = json.loads(about["expressions"]) if "expressions" in about else Predictions.classes
    if not all(isinstance(name, str) for name in classes):
        raise ValueError(classes)
    return about, tuple(classes)


@contextmanager
def _naming_damage(path: UPath) -> Iterator[None]:
    """Raise `DamagedError` for what reading other bytes than those of predictions raises."""
    try:
        yield
    except (FileNotFoundError, StorageError):  # nothing is known of its content
        raise
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError, AttributeError):  # of columns of another type
        raise damaged(path, REMEDY) from None


def name_rows(sample_ids: Sequence[str]) -> str:
    """Name the faces that were evaluated, whatever their order."""
    return digest(json.dumps(sorted(sample_ids)).encode())


def average(several: Sequence[Predictions]) -> Predictions:
    """Return the mean of the probabilities of several runs for one target, on the faces that all of them predicted.

    Raises `UserError` when they share no face or disagree on a label: then they were evaluated on different manifests.
    """
    shared = set(several[0].sample_ids).intersection(*(one.sample_ids for one in several[1:]))
    first, *others = (one.without(set(one.sample_ids) - shared).sort() for one in several)
    if not shared or any((one.labels != first.labels).any() for one in others):
        raise UserError(
            f"The seeds of {first.about.get('run', 'a run')} were evaluated on different faces or labels of "
            f"{first.about.get('target')!r}: evaluate them again with `cafe evaluate RUN`."
        )
    mean = np.mean([first.probabilities, *(one.probabilities for one in others)], axis=0)
    return replace(first, probabilities=mean, further={})


def list_protocols(run: UPath) -> list[str]:
    """Return the protocols by which a run may have predictions: `clean`, whose files have no folder, and those with one."""
    there = {path.name for path in list_folder(run / "predictions")}
    return [name for name in ALL_PROTOCOLS if find_protocol(name).prefix.rstrip("/") in {"", *there}]


def list_predictions(run: UPath, protocol: str = "clean") -> dict[str, UPath]:
    """Return the files of a run's predictions by one protocol by their names, `TARGET[@SPLIT]`."""
    folder = run / "predictions" / find_protocol(protocol).prefix
    return {path.stem: path for path in list_folder(folder) if path.suffix == ".parquet"}


def load_predictions(run: UPath, protocol: str = "clean", named: bool = True) -> dict[str, Predictions]:
    """Return all predictions of a run by one protocol, by the name of their file; raise `DamagedError`."""
    loaded = {name: Predictions.load(path, named) for name, path in list_predictions(run, protocol).items()}
    return {name: predictions for name, predictions in loaded.items() if predictions is not None}
