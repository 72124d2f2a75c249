"""Columns: which faces a number is about and how they were evaluated, and the means over such columns.

Names on disk, in MLflow and in print are made here, and here alone a name is parsed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from upath import UPath

from cafe.files import place_below
from cafe.results.metrics import METRICS
from cafe.results.protocols import find_protocol, name_protocol

OVERALL, MEAN = "overall", "mean"  # what a table by class ends with: the accuracy, and the mean of the recalls


@dataclass(frozen=True, order=True)
class Column:
    """The faces of a target as a protocol evaluates them, with an option of test time or without.

    `split` is set where it is another one than the protocol's. `class_set` names the classes of the predictions where runs
    of several class sets are compared. `part` is the class whose recall it holds, `OVERALL` or `MEAN` in a table by class.
    """

    target: str
    split: str = ""
    protocol: str = "clean"
    test_time: str = ""
    class_set: str = ""
    leak_free: bool = False  # without the copies of the source's training faces
    part: str = ""

    @classmethod
    def parse(cls, name: str, protocol: str = "clean") -> Column:
        """Return the column of a name on disk, `TARGET[@SPLIT]`, by a protocol with an option of test time or without."""
        target, _, split = name.partition("@")
        found = find_protocol(protocol)
        return cls(target, split, found.plain, found.option)

    @property
    def name(self) -> str:
        """Its name on disk: `TARGET[@SPLIT]`."""
        return f"{self.target}@{self.split}" if self.split else self.target

    @property
    def title(self) -> str:
        """What is printed above it."""
        return _qualify(self.part or self.name, self.leak_free, self.class_set)

    @property
    def evaluated_by(self) -> str:
        """The name of its protocol with the option of test time."""
        return name_protocol(self.protocol, self.test_time)

    def predictions(self, run: UPath) -> UPath:
        """Where a run keeps its predictions for it: `predictions/[PROTOCOL/]TARGET[@SPLIT].parquet`."""
        return place_below(run / "predictions", f"{find_protocol(self.evaluated_by).prefix}{self.name}.parquet")

    def figure(self, run: UPath, kind: str, ending: str) -> UPath:
        """Where a run keeps what was drawn, or measured to be drawn: `figures/KIND/[PROTOCOL/]TARGET[@SPLIT]ENDING`."""
        return place_below(run / "figures" / kind, f"{find_protocol(self.evaluated_by).prefix}{self.name}{ending}")

    def metric(self, metric: str) -> str:
        """Return the name of a metric in MLflow, whose names have no `@`: `[PROTOCOL/]target/TARGET[:SPLIT]/METRIC`."""
        return f"{find_protocol(self.evaluated_by).prefix}target/{self.name.replace('@', ':')}/{metric}"


@dataclass(frozen=True)
class Mean:
    """The mean of a metric over a run's unseen targets, or over `all`: these and its sources, as published means are."""

    over: str
    metric: str
    class_set: str = ""  # as of a column
    leak_free: bool = False

    @property
    def title(self) -> str:
        """What is printed above it."""
        return _qualify(f"{self.over} {METRICS[self.metric].title}", self.leak_free, self.class_set)

    @property
    def name(self) -> str:
        """What stands for it in place of a target."""
        return _qualify(f"mean of {self.over}", self.leak_free, self.class_set)


def _qualify(name: str, leak_free: bool, class_set: str) -> str:
    return name + " leak-free" * leak_free + (f" ({class_set})" if class_set else "")


def name_class_sets(several: Iterable[tuple[str, ...]], noun: str = " classes") -> dict[tuple[str, ...], str]:
    """Return a short name for each of several class sets, how many of the noun; an empty one where all are the same."""
    distinct = list(dict.fromkeys(several))
    if len(distinct) < 2:
        return dict.fromkeys(distinct, "")
    counts = [len(classes) for classes in distinct]
    return {
        classes: f"{len(classes)}{noun}"
        + (f" #{counts[:place].count(len(classes)) + 1}" if counts.count(len(classes)) > 1 else "")
        for place, classes in enumerate(distinct)
    }
