"""The numbers published in "Generalizable Facial Expression Recognition" (ECCV 2024), to stand beside our own.

The tables are in published.toml, which says where each is from, and of which classes. The published mean includes the
source.
"""

from __future__ import annotations

import math
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cafe.results.columns import MEAN, OVERALL, Column
from cafe.results.protocols import PROTOCOLS, Protocol, find_protocol
from cafe.results.sources import SETS

if TYPE_CHECKING:
    from cafe.results.comparison import Comparison, Row


@cache
def load_published() -> dict[str, Any]:
    """Return the tables of published.toml in percent: accuracy, from_scratch and per_class; and their classes."""
    return tomllib.loads(Path(__file__).with_name("published.toml").read_text())


def find_published(method: str, source_kind: str, init: str, protocol: Protocol) -> dict[str, float]:
    """Return published accuracies (0–1) by the kind of the target; those that the protocol evaluates in the same way."""
    table = load_published()["from_scratch" if init == "scratch" else "accuracy"]
    numbers = table.get(method, {}).get(source_kind, ())
    return {
        kind: number / 100
        for kind, number in zip(SETS, numbers, strict=False)
        if protocol.evaluates_like(PROTOCOLS["paper"], kind)
    }


def find_published_classes(
    method: str, source_kind: str, target_kind: str, init: str, protocol: Protocol
) -> dict[str, float]:
    """Return the published recalls (0–1) by class, with `overall` and `mean`; empty where there are none."""
    known = (source_kind, target_kind) == ("rafdb", "ferplus") and init != "scratch"
    if not known or not protocol.evaluates_like(PROTOCOLS["paper"], target_kind):
        return {}
    numbers = load_published()["per_class"].get(method, ())
    parts = (*load_published()["classes"], OVERALL, MEAN)
    return {name: number / 100 for name, number in zip(parts, numbers, strict=False)}


@dataclass(frozen=True)
class Published:
    """The published numbers (0–1) of a row by column, and its two means where all of it is there."""

    cells: dict[Column, float]
    unseen: float = math.nan
    everything: float = math.nan


def publish_rows(comparison: Comparison) -> list[Published | None]:
    """Return for each row the published accuracies of what was evaluated alike; None where there are none."""
    known = comparison.metric == "accuracy"
    return [_publish(row, comparison) if known else None for row in comparison.rows]


def _publish(row: Row, comparison: Comparison) -> Published | None:
    if not _is_comparable(row, comparison):
        return None
    kinds, source = comparison.kinds, row.runs[0].sources[0]
    numbers = find_published(row.method, source.kind, _init(row), find_protocol(comparison.protocol))
    columns = [column for column in row.cells if not column.leak_free]
    cells = {column: numbers[kinds[column.name]] for column in columns if kinds[column.name] in numbers}
    if not cells:
        return None
    unseen = [column for column in columns if column in row.counted]
    if (
        sorted(kinds[column.name] for column in unseen) != sorted({*SETS} - {source.kind})
        or not {*unseen} <= cells.keys()
    ):
        return Published(cells)
    mean = float(np.mean([cells[column] for column in unseen]))
    own = next((column for column in cells if column.name == row.source), None)
    return Published(cells, mean, float(np.mean([cells[column] for column in (*unseen, own)])) if own else math.nan)


def publish_classes(comparison: Comparison) -> list[Published | None]:
    """Return for each row the published recalls by class, with `overall` and `mean`; None where there are none."""
    (kind,) = comparison.kinds.values()
    protocol = find_protocol(comparison.protocol)
    found = (
        find_published_classes(row.method, row.runs[0].sources[0].kind, kind, _init(row), protocol)
        if _is_comparable(row, comparison)
        else {}
        for row in comparison.rows
    )
    columns = comparison.columns
    return [
        Published({column: numbers[column.part] for column in columns if column.part in numbers}) if numbers else None
        for numbers in found
    ]


def _is_comparable(row: Row, comparison: Comparison) -> bool:
    """Whether a row was trained on one set and evaluated over the published classes, on all faces and by nothing else."""
    first, scores = row.runs[0], comparison.scores
    own = scores[scores["run"].isin([run.name for run in row.runs])]
    published = tuple(load_published()["classes"])
    alike = own["classes"].map(lambda classes: classes == published) & (own["other_classes"] == 0)
    alone = len(first.sources) == 1 and not (first.fold or first.test_time)
    return alone and first.class_set == published and bool(alike.all())


def _init(row: Row) -> str:
    return str(row.runs[0].settings.get("init", ""))
