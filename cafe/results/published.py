"""The numbers published in "Generalizable Facial Expression Recognition" (ECCV 2024), to stand beside our own.

The tables are in published.toml, which says where each is from. The published mean includes the source.
"""

from __future__ import annotations

import math
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cafe.data.expressions import EXPRESSIONS
from cafe.results.protocols import PROTOCOLS, Protocol, find_protocol
from cafe.results.sources import SETS

if TYPE_CHECKING:
    from cafe.results.comparison import Comparison, Row

CLASS_COLUMNS = (*EXPRESSIONS, "overall", "mean")


@cache
def load_published() -> dict[str, dict[str, Any]]:
    """Return the tables of published.toml in percent: accuracy, from_scratch and per_class."""
    return tomllib.loads(Path(__file__).with_name("published.toml").read_text())


def find_published(method: str, source_kind: str, init: str, protocol: Protocol) -> dict[str, float]:
    """Return published accuracies (0–1) by the kind of the target; those alone that the protocol judges in the same way."""
    table = load_published()["from_scratch" if init == "scratch" else "accuracy"]
    numbers = table.get(method, {}).get(source_kind, ())
    return {
        kind: number / 100
        for kind, number in zip(SETS, numbers, strict=False)
        if protocol.judges_like(PROTOCOLS["paper"], kind)
    }


def find_published_classes(
    method: str, source_kind: str, target_kind: str, init: str, protocol: Protocol
) -> dict[str, float]:
    """Return the published recalls (0–1) by expression, with `overall` and `mean`; empty where there are none."""
    known = (source_kind, target_kind) == ("rafdb", "ferplus") and init != "scratch"
    if not known or not protocol.judges_like(PROTOCOLS["paper"], target_kind):
        return {}
    numbers = load_published()["per_class"].get(method, ())
    return {name: number / 100 for name, number in zip(CLASS_COLUMNS, numbers, strict=False)}


@dataclass(frozen=True)
class Published:
    """The published numbers (0–1) of a row by target or expression, and its two means where all of it is there."""

    cells: dict[str, float]
    unseen: float = math.nan
    everything: float = math.nan


def publish_rows(comparison: Comparison) -> list[Published | None]:
    """Return for each row the published accuracies that were judged alike; None where there are none."""
    protocol = find_protocol(comparison.protocol)
    known = comparison.metric == "accuracy"
    return [_publish(row, comparison.kinds, protocol) if known else None for row in comparison.rows]


def _publish(row: Row, kinds: dict[str, str], protocol: Protocol) -> Published | None:
    run = row.runs[0]
    if len(run.sources) > 1 or run.fold or run.test_time:
        return None
    numbers = find_published(row.method, run.sources[0].kind, _init(row), protocol)
    cells = {name: numbers[kinds[name]] for name in row.cells if kinds.get(name) in numbers}
    if not cells:
        return None
    unseen = [name for name in row.cells if name in kinds and name not in row.seen]
    if (
        sorted(kinds[name] for name in unseen) != sorted({*SETS} - {run.sources[0].kind})
        or not {*unseen} <= cells.keys()
    ):
        return Published(cells)
    mean = float(np.mean([cells[name] for name in unseen]))
    whole = [*unseen, row.source]
    return Published(cells, mean, float(np.mean([cells[name] for name in whole])) if row.source in cells else math.nan)


def publish_classes(comparison: Comparison) -> list[Published | None]:
    """Return for each row the published recalls by expression, with `overall` and `mean`; None where there are none."""
    (kind,) = comparison.kinds.values()
    protocol = find_protocol(comparison.protocol)
    found = (
        find_published_classes(row.method, row.runs[0].sources[0].kind, kind, _init(row), protocol)
        if len(row.runs[0].sources) == 1 and not (row.runs[0].fold or row.test_time)
        else {}
        for row in comparison.rows
    )
    return [Published(numbers) if numbers else None for numbers in found]


def _init(row: Row) -> str:
    return str(row.runs[0].settings.get("init", ""))
