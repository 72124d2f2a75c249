"""The evidence behind a comparison: paired tests against one method, face by face, and mean ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from cafe.errors import UserError, unknown
from cafe.results.columns import Column
from cafe.results.comparison import Comparison, Row
from cafe.results.metrics import METRICS
from cafe.results.predictions import Answers
from cafe.results.significance.statistics import Difference, Ranking, holm, paired_test, rank_methods

PAIRS = 10  # of source and target, fewer than which say nothing of mean ranks
RECALLS = "mean of recalls"  # what the tests by class end with
BySeed = Sequence[dict[Column, Answers]]  # of a row


@dataclass(frozen=True)
class Paired:
    """How much more accurate a row is than the reference of its source, in one column or in the mean of several.

    `overlap` says whether the ranges of the two rows' accuracies over their seeds, from the lowest to the highest, overlap;
    None without several seeds of both.
    """

    row: Row
    reference: Row
    column: Column | None  # a target, or a class on one target; None for the mean
    difference: Difference
    left_out: int  # faces that not all of the runs have predicted
    overlap: bool | None
    adjusted_p: float = math.nan  # Holm's, over the targets or classes of this row; the mean is not one of them
    mean: str = "mean of unseen"  # what the mean is taken over

    @property
    def title(self) -> str:
        """What was tested: the title of the column, or which mean."""
        return self.column.title if self.column else self.mean

    @property
    def peeked(self) -> bool:
        """Whether the epoch of either was chosen on faces it is evaluated on."""
        return self.row.peeked or self.reference.peeked

    @property
    def holds(self) -> bool:
        """Whether the difference is significant over faces, and the ranges over seeds do not overlap."""
        return (self.adjusted_p if self.column else self.difference.p) < 0.05 and not self.overlap


def pair_rows(comparison: Comparison, versus: str, target: str = "") -> list[Paired]:
    """Test the accuracy of every row against the one of that name trained on the same source; raise `UserError`.

    With a `target`, the recall of every class on it, and their mean. A row whose epoch was chosen on its target is neither
    tested nor tested against, and what was predicted over other classes is not compared.
    """
    tests: list[Paired] = []
    for reference in find_references(comparison, versus):
        theirs = comparison.list_answers(reference)
        for row in comparison.rows:
            if row.source == reference.source and row is not reference and not row.oracle:
                ours = comparison.list_answers(row)
                if target:
                    tests += _test_classes(row, reference, ours, theirs, target)
                else:
                    tests += _test(row, reference, ours, theirs, comparison)
    return tests


def find_references(comparison: Comparison, versus: str) -> list[Row]:
    """Return for each source the row of that label, tag or method; raise `UserError` for none or several."""
    found = []
    for source in dict.fromkeys(row.source for row in comparison.rows):
        rows = [row for row in comparison.rows if row.source == source and not row.oracle]
        named = [row for row in rows if row.label == versus]
        plain = [row for row in rows if not row.test_time]
        named = named or [row for row in plain if row.runs[0].settings.get("tag") == versus]
        named = named or [row for row in plain if row.method == versus]
        named = [row for row in named if not row.peeked] or named
        if len(named) > 1:
            labels = ", ".join(repr(row.label) for row in named)
            raise UserError(
                f"{len(named)} rows trained on {source!r} are {versus!r}: choose one with --versus {labels}."
            )
        found += named
    if not found:
        raise unknown("method", versus, {row.label for row in comparison.rows})
    return found


def _test(row: Row, reference: Row, ours: BySeed, theirs: BySeed, comparison: Comparison) -> Iterator[Paired]:
    """The tests of a row on all targets both were evaluated on, then of the mean when that is all the unseen ones."""
    columns = [column for column in comparison.columns if not column.leak_free]
    paired = {
        column: pair_faces([run[column] for run in ours], [run[column] for run in theirs])
        for column in columns
        if all(column in run for run in (*ours, *theirs))
    }
    yield from _test_all(row, reference, paired)
    unseen = {column.name for column in row.counted if row.evaluates(column)}
    tested = [column for column in paired if column.name in unseen]
    if len(unseen) > 1 and len(tested) == len(unseen):
        yield _compare(row, reference, None, [paired[column] for column in tested])


def test_unseen(row: Row, reference: Row, comparison: Comparison) -> Paired | None:
    """Test the mean accuracy of a row over its unseen targets against another row's; None unless both have all of them."""
    columns = sorted(row.counted)
    ours, theirs = (comparison.list_answers(one) for one in (row, reference))
    if not columns or not all(column in run for run in (*ours, *theirs) for column in columns):
        return None
    paired = [pair_faces([run[column] for run in ours], [run[column] for run in theirs]) for column in columns]
    return _compare(row, reference, None, paired)


def _test_classes(row: Row, reference: Row, ours: BySeed, theirs: BySeed, target: str) -> Iterator[Paired]:
    """The tests of a row on the faces of each class of a target, then of the mean over its recalls."""
    column = next((column for column in ours[0] if column.name == target), None)
    if column is None or not all(column in run for run in (*ours, *theirs)):
        return
    one, other = ([run[column] for run in runs] for runs in (ours, theirs))
    pair_faces(one, other)  # labels that differ would otherwise be faces that not all have predicted
    paired = {
        replace(column, part=name): pair_faces(
            [run.of_class(label) for run in one], [run.of_class(label) for run in other]
        )
        for label, name in enumerate(other[0].classes)
        if (other[0].labels == label).any()
    }
    tests = [*_test_all(row, reference, paired), _compare(row, reference, None, list(paired.values()))]
    yield from (replace(test, mean=RECALLS) for test in tests)


def _test_all(row: Row, reference: Row, paired: dict[Column, PairedFaces]) -> Iterator[Paired]:
    tests = [_compare(row, reference, column, [faces]) for column, faces in paired.items()]
    adjusted = holm([test.difference.p for test in tests])
    yield from (replace(test, adjusted_p=p) for test, p in zip(tests, adjusted, strict=True))


@dataclass(frozen=True)
class PairedFaces:
    """Whether each seed (S, n) of two methods was right on each face that all of them predicted.

    `groups` numbers the group of each face (n,), or is None; `left_out` counts the faces that not all did.
    """

    ours: np.ndarray
    theirs: np.ndarray
    groups: np.ndarray | None
    left_out: int


def _compare(row: Row, reference: Row, column: Column | None, paired: list[PairedFaces]) -> Paired:
    differences = [faces.ours.mean(axis=0) - faces.theirs.mean(axis=0) for faces in paired]
    one, other = (
        np.mean([getattr(faces, name).mean(axis=1) for faces in paired], axis=0) for name in ("ours", "theirs")
    )  # (seeds,)
    overlap = bool(one.min() <= other.max() and other.min() <= one.max()) if min(len(one), len(other)) > 1 else None
    difference = paired_test(differences, [faces.groups for faces in paired])
    return Paired(row, reference, column, difference, sum(faces.left_out for faces in paired), overlap)


def pair_faces(one: Sequence[Answers], other: Sequence[Answers]) -> PairedFaces:
    """Join the answers of two methods on one target by sample.

    Raises `UserError` when the runs share no face or disagree on a label: then they were evaluated on different manifests.
    """
    runs = [*one, *other]
    tables = [pd.DataFrame({"label": run.labels, "right": run.predicted == run.labels}, run.sample_ids) for run in runs]
    joined = pd.concat(tables, axis=1, join="inner", keys=range(len(runs))).sort_index()
    labels, right = (joined.xs(name, axis=1, level=1).to_numpy() for name in ("label", "right"))
    for run, theirs in zip(runs, labels.T, strict=True):
        if not len(joined) or (theirs != labels[:, 0]).any():
            first, second = (what.about.get("run", "a run") for what in (runs[0], run))
            raise UserError(
                f"The runs {first} and {second} were evaluated on different faces or labels of "
                f"{run.about.get('target')!r}: evaluate both again with `cafe evaluate RUN`."
            )
    groups = next((number_groups(run)[joined.index].to_numpy() for run in runs if run.groups), None)
    left_out = len(set().union(*(run.sample_ids for run in runs))) - len(joined)
    return PairedFaces(right[:, : len(one)].T, right[:, len(one) :].T, groups, left_out)


def number_groups(answers: Answers) -> pd.Series:
    """Return the number of the group of each sample, by its id; a face without a group is one of its own."""
    named = [
        f"group {group}" if group else f"face {sample}"
        for group, sample in zip(answers.groups or [], answers.sample_ids, strict=True)
    ]
    return pd.Series(pd.factorize(np.array(named))[0], answers.sample_ids)


@dataclass(frozen=True)
class Ranks:
    """Methods with their mean ranks over all unseen targets of all sources, the best first."""

    labels: tuple[str, ...]
    ranking: Ranking
    left_out: tuple[str, ...]  # methods that were not trained on every source, or peeked


def rank_rows(comparison: Comparison) -> Ranks | None:
    """Rank the methods that were trained on every source, by their mean over two or more targets; else None.

    Of fewer than `PAIRS` pairs of source and unseen target, ranks are not tested.
    """
    rows = {(row.source, row.label): row for row in comparison.rows if row.contends}
    ranked = [row for row in comparison.rows if not row.test_time]
    sources, everybody = ({getattr(row, name) for row in ranked} for name in ("source", "label"))
    labels = sorted(label for label in everybody if all((source, label) in rows for source in sources))
    if len(labels) < 2:
        return None
    columns = [
        [rows[source, label].cells[column].mean for label in labels]
        for source in sorted(sources)
        for column in comparison.columns
        if column in rows[source, labels[0]].counted
    ]
    scores = np.array([column for column in columns if not np.isnan(column).any()]).T  # (methods, targets)
    if scores.ndim < 2 or scores.shape[1] < 2:
        return None
    ranking = rank_methods(scores if METRICS[comparison.metric].higher_is_better else -scores)
    order = np.argsort(ranking.ranks, kind="stable")
    ordered = replace(ranking, ranks=tuple(ranking.ranks[place] for place in order))
    if ranking.targets < PAIRS:
        ordered = replace(ordered, p=math.nan, critical_difference=math.nan)
    return Ranks(tuple(labels[place] for place in order), ordered, tuple(sorted(everybody - set(labels))))
