"""Accuracy by a column of the targets' manifests, such as sex, age or camera: every group, the worst, and the gap.

What a face is called comes from its manifest, so that predictions need not be made again when a column is kept later.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from cafe.data.manifest import Manifest
from cafe.errors import UserError, unknown
from cafe.results.columns import Column
from cafe.results.comparison import Comparison, Row
from cafe.results.predictions import Answers
from cafe.results.significance.homogeneity import Gap, Share, compare_groups, share_groups
from cafe.results.significance.paired_tests import number_groups
from cafe.results.significance.statistics import holm

OWN = ("label", "split", "group", "width", "height")  # columns of every manifest by which faces can be parted
AGREEMENT = "agreement"  # how many of the people who voted chose the class that most of them chose
FEW_VALUES = 8  # of numbers that are groups as they stand; more are parted into four bands
MOST_VALUES = 40

FindManifest = Callable[[str, str], Manifest | None]  # by name and digest


@dataclass(frozen=True)
class Parted:
    """How accurate a row is on the groups of a target: a share for each of the `groups`, and the gap of two or more.

    `unknown` counts the faces of which the manifest does not say it. `adjusted_p` is Holm's over the targets of the row.
    """

    row: Row
    column: Column
    groups: tuple[str, ...]
    shares: tuple[Share, ...]
    gap: Gap | None
    unknown: int
    adjusted_p: float = math.nan


@dataclass(frozen=True)
class Parting:
    """The accuracy of every row by the column `by`; `lacking` are the targets whose manifests do not say it, and why."""

    by: str
    parts: list[Parted]
    lacking: dict[str, str]


def part_rows(comparison: Comparison, by: str, find_manifest: FindManifest) -> Parting:
    """Part the faces of every target by a column of its manifest and compare each row's accuracy on the groups.

    Raises `UserError` where no target has the column, naming those there are, and for one of too many values.
    """
    parts: list[Parted] = []
    manifests: dict[tuple[str, str], pd.Series[str] | str] = {}
    columns = [column for column in comparison.columns if not column.leak_free]
    lacking, known = dict[str, str](), dict[str, None]()
    for row in comparison.rows:
        own, seeds = [], comparison.list_answers(row)
        for column in columns:
            several = [seed[column] for seed in seeds if column in seed]
            if not several:
                continue
            key = (column.target, several[0].about.get("manifest", ""))
            if key not in manifests:
                manifest = find_manifest(*key)
                known |= dict.fromkeys(list_columns(manifest) if manifest else ())
                manifests[key] = (
                    name_groups(manifest, by) if manifest else "the workspace has no manifest of these faces"
                )
            names = manifests[key]
            if isinstance(names, str):
                lacking[column.target] = names
            elif part := _part(row, column, several, names):
                own.append(part)
            else:
                lacking[column.target] = f"none of the faces evaluated there has a {by!r}"
        adjusted = holm([part.gap.p for part in own if part.gap])
        places = iter(adjusted)
        parts += [replace(part, adjusted_p=next(places)) if part.gap else part for part in own]
    if not parts and known and find_column(known, by) is None:
        raise unknown("column of the targets' manifests", by, known)
    if not parts:
        why = (
            "none that was evaluated has one" if known else "the workspace has no manifest of those that were evaluated"
        )
        raise UserError(f"There is no {by!r} of any face: {why}.")
    return Parting(by, parts, lacking)


def list_columns(manifest: Manifest) -> list[str]:
    """Return the columns by which the faces of a manifest can be parted."""
    return [*OWN, *manifest.kept, *([] if manifest.votes is None else [AGREEMENT])]


def find_column(columns: Iterable[str], name: str) -> str | None:
    """Return the column of a name, written in another case where none is written so: tables say `Sex` and `sex`."""
    alike = [column for column in columns if column.casefold() == name.casefold()]
    return name if name in alike else next(iter(alike), None)


def name_groups(manifest: Manifest, column: str) -> pd.Series[str] | str:
    """Return the group of every face of a manifest by its sample_id, in the order of tables, or why there is none.

    Numbers of more than a few values are parted at their quartiles. Raises `UserError` for a column of too many values.
    """
    by = find_column(list_columns(manifest), column)
    if by is None:
        return f"its manifest has no {column!r}"
    if by == "label":
        texts = pd.Series(manifest.name_classes(np.arange(len(manifest))), manifest.sample_ids, dtype=object)
        return texts.astype(pd.CategoricalDtype(list(manifest.classes), ordered=True))
    if by == AGREEMENT and by not in manifest.kept:
        votes = manifest.votes
        assert votes is not None
        shares = votes.max(axis=1) / np.maximum(votes.sum(axis=1), 1)
        values = pd.Series(np.where(votes.any(axis=1), shares.round(2), math.nan), manifest.sample_ids)
    else:
        values = pd.Series(manifest.table[by].to_pylist(), manifest.sample_ids, dtype=object)
    numbers = pd.to_numeric(values, errors="coerce").astype(float)
    if by != "group" and values.notna().any() and (numbers.notna() == values.notna()).all():  # persons may have numbers
        return _band(numbers)
    distinct = sorted(set(values.dropna()))
    if len(distinct) > MOST_VALUES:
        raise UserError(
            f"The column {by!r} of {manifest.name!r} has {len(distinct):,} values, more than {MOST_VALUES}: keep one that "
            "sums them up."
        )
    return values.astype(pd.CategoricalDtype(distinct, ordered=True))


def _band(numbers: pd.Series[float]) -> pd.Series[str]:
    """Return numbers as groups: each value one or, of more than a few, four bands of as many faces as can be."""
    values = np.sort(numbers.dropna().to_numpy())
    distinct = np.unique(values)
    digits = next(count for count in range(6, 18) if len({f"{value:.{count}g}" for value in distinct}) == len(distinct))
    names = {value: f"{value:.{digits}g}" for value in distinct}
    if len(distinct) <= FEW_VALUES:
        return numbers.map(names).astype(pd.CategoricalDtype(list(names.values()), ordered=True))
    ends = np.unique(np.quantile(values, [0.25, 0.5, 0.75, 1], method="inverted_cdf"))
    bands = np.searchsorted(ends, distinct)
    inside = {band: distinct[bands == band] for band in range(len(ends))}
    titles = {band: "–".join(dict.fromkeys(names[value] for value in own[[0, -1]])) for band, own in inside.items()}
    named = {value: titles[band] for value, band in zip(distinct, bands, strict=True)}
    return numbers.map(named).astype(pd.CategoricalDtype(list(titles.values()), ordered=True))


def _part(row: Row, column: Column, several: Sequence[Answers], names: pd.Series[str]) -> Parted | None:
    """Return the accuracy of a row's seeds on the groups of a target; None where no face of it has a group."""
    right = [pd.Series(one.predicted == one.labels, one.sample_ids, dtype=float) for one in several]
    values = pd.concat(right, axis=1, join="inner").mean(axis=1)
    found = names.reindex(values.index)
    known = found.notna()
    values, found = values[known], found[known].cat.remove_unused_categories()
    if not len(values):
        return None
    persons = number_groups(several[0])[values.index].to_numpy() if several[0].groups else None
    places, numbers = found.cat.codes.to_numpy().astype(int), values.to_numpy()
    groups = tuple(map(str, found.cat.categories))
    shares, gap = share_groups(numbers, places, persons), None
    if len(groups) > 1:
        gap = compare_groups(numbers, places, persons)
    return Parted(row, column, groups, tuple(shares), gap, int((~known).sum()))
