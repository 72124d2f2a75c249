"""The evidence behind a comparison: paired tests against one method, face by face, and mean ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from cafe.data.expressions import EXPRESSIONS
from cafe.errors import UserError, unknown
from cafe.results.comparison import Comparison, Row
from cafe.results.predictions import Predictions
from cafe.results.statistics import Difference, Ranking, holm, paired_test, rank_methods

RECALLS = "mean of recalls"  # what the tests by expression end with
Judged = Sequence[dict[str, Predictions]]  # by seed and target


@dataclass(frozen=True)
class Paired:
    """How much more accurate a row is than the reference of its source, on one target or in the mean of all unseen.

    `apart` says whether every seed of the one is ahead of every seed of the other; None without several seeds of both.
    """

    row: Row
    reference: Row
    target: str  # or the expression on one target; empty for the mean
    difference: Difference
    left_out: int  # faces that not all of the runs have judged
    apart: bool | None
    adjusted_p: float = math.nan  # Holm's, over the targets or expressions of this row; the mean is not one of them
    mean: str = "mean of unseen"  # what the mean is taken over

    @property
    def peeked(self) -> bool:
        """Whether the epoch of either was chosen on faces it is judged on."""
        return self.row.peeked or self.reference.peeked

    @property
    def holds(self) -> bool:
        """Whether the difference is significant and the seeds are not mixed."""
        return (self.adjusted_p if self.target else self.difference.p) < 0.05 and self.apart is not False


def pair_rows(comparison: Comparison, versus: str, target: str = "") -> list[Paired]:
    """Test the accuracy of every row against the one of that name trained on the same source; raise `UserError`.

    With a `target`, the recall of every expression on it, and their mean. A row whose epoch was chosen on its target is
    neither tested nor tested against.
    """
    tests: list[Paired] = []
    for reference in find_references(comparison, versus):
        theirs = load_judged(reference, comparison.protocol)
        for row in comparison.rows:
            if row.source == reference.source and row is not reference and not row.oracle:
                ours = load_judged(row, comparison.protocol)
                if target:
                    tests += _test_classes(row, reference, ours, theirs, target)
                else:
                    tests += _test(row, reference, ours, theirs, comparison)
    return tests


def load_judged(row: Row, protocol: str) -> Judged:
    """Return the predictions of every seed by target; those of a fold for the domain it leaves out alone."""
    judged: dict[int, dict[str, Predictions]] = {run.seed: {} for run in row.runs}
    for run in row.runs:
        found = run.load_predictions(protocol)
        judged[run.seed] |= {target: predictions for target, predictions in found.items() if run.judges(target)}
    return list(judged.values())


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


def _test(row: Row, reference: Row, ours: Judged, theirs: Judged, comparison: Comparison) -> Iterator[Paired]:
    """The tests of a row on all targets both were judged on, then of the mean when that is all the unseen ones."""
    targets = [target for target in comparison.columns if not target.endswith(" leak-free")]
    paired = {
        target: pair_faces([run[target] for run in ours], [run[target] for run in theirs])
        for target in targets
        if all(target in run for run in (*ours, *theirs))
    }
    yield from _test_all(row, reference, paired)
    unseen = [target for target in targets if target not in row.seen and any(run.judges(target) for run in row.runs)]
    if len(unseen) > 1 and paired.keys() >= set(unseen):
        yield _judge(row, reference, "", [paired[target] for target in unseen])


def _test_classes(row: Row, reference: Row, ours: Judged, theirs: Judged, target: str) -> Iterator[Paired]:
    """The tests of a row on the faces of each expression of a target, then of the mean over its recalls."""
    if not all(target in run for run in (*ours, *theirs)):
        return
    one, other = ([run[target] for run in runs] for runs in (ours, theirs))
    pair_faces(one, other)  # labels that differ would otherwise be faces that not all have judged
    paired = {
        name: pair_faces([run.of_class(label) for run in one], [run.of_class(label) for run in other])
        for label, name in enumerate(EXPRESSIONS)
        if (other[0].labels == label).any()
    }
    tests = [*_test_all(row, reference, paired), _judge(row, reference, "", list(paired.values()))]
    yield from (replace(test, mean=RECALLS) for test in tests)


def _test_all(row: Row, reference: Row, paired: dict[str, PairedFaces]) -> Iterator[Paired]:
    tests = [_judge(row, reference, name, [faces]) for name, faces in paired.items()]
    adjusted = holm([test.difference.p for test in tests])
    yield from (replace(test, adjusted_p=p) for test, p in zip(tests, adjusted, strict=True))


@dataclass(frozen=True)
class PairedFaces:
    """Whether each seed (S, n) of two methods was right on each face that all of them judged.

    `groups` numbers the group of each face (n,), or is None; `left_out` counts the faces that not all judged.
    """

    ours: np.ndarray
    theirs: np.ndarray
    groups: np.ndarray | None
    left_out: int


def _judge(row: Row, reference: Row, target: str, paired: list[PairedFaces]) -> Paired:
    differences = [faces.ours.mean(axis=0) - faces.theirs.mean(axis=0) for faces in paired]
    one, other = (
        np.mean([getattr(faces, name).mean(axis=1) for faces in paired], axis=0) for name in ("ours", "theirs")
    )  # (seeds,)
    apart = bool(one.min() > other.max() or one.max() < other.min()) if min(len(one), len(other)) > 1 else None
    difference = paired_test(differences, [faces.groups for faces in paired])
    return Paired(row, reference, target, difference, sum(faces.left_out for faces in paired), apart)


def pair_faces(one: Sequence[Predictions], other: Sequence[Predictions]) -> PairedFaces:
    """Join the predictions of two methods on one target by sample.

    Raises `UserError` when the runs share no face or disagree on a label: then they were judged on different manifests.
    """
    runs = [*one, *other]
    tables = [pd.DataFrame({"label": run.labels, "right": run.predicted == run.labels}, run.sample_ids) for run in runs]
    joined = pd.concat(tables, axis=1, join="inner", keys=range(len(runs))).sort_index()
    labels, right = (joined.xs(name, axis=1, level=1).to_numpy() for name in ("label", "right"))
    for run, theirs in zip(runs, labels.T, strict=True):
        if not len(joined) or (theirs != labels[:, 0]).any():
            first, second = (what.about.get("run", "a run") for what in (runs[0], run))
            raise UserError(
                f"The runs {first} and {second} were judged on different faces or labels of {run.about.get('target')!r}: "
                "judge both again with `cafe evaluate RUN`."
            )
    groups = next((number_groups(run)[joined.index].to_numpy() for run in runs if run.groups), None)
    left_out = len(set().union(*(run.sample_ids for run in runs))) - len(joined)
    return PairedFaces(right[:, : len(one)].T, right[:, len(one) :].T, groups, left_out)


def number_groups(predictions: Predictions) -> pd.Series:
    """Return the number of the group of each sample, by its id; a face without a group is one of its own."""
    named = [
        f"group {group}" if group else f"face {sample}"
        for group, sample in zip(predictions.groups or [], predictions.sample_ids, strict=True)
    ]
    return pd.Series(pd.factorize(np.array(named))[0], predictions.sample_ids)


@dataclass(frozen=True)
class Ranks:
    """Methods with their mean ranks over all unseen targets of all sources, the best first."""

    labels: tuple[str, ...]
    ranking: Ranking
    left_out: tuple[str, ...]  # methods that were not trained on every source, or peeked


def rank(comparison: Comparison) -> Ranks | None:
    """Rank the methods that were trained on every source, by their mean over two or more targets; else None."""
    rows = {(row.source, row.label): row for row in comparison.rows if row.contends}
    ranked = [row for row in comparison.rows if not row.test_time]
    sources, everybody = ({getattr(row, name) for row in ranked} for name in ("source", "label"))
    labels = sorted(label for label in everybody if all((source, label) in rows for source in sources))
    if len(labels) < 2:
        return None
    columns = [
        [rows[source, label].cells[target].mean for label in labels]
        for source in sorted(sources)
        for target in comparison.columns
        if target not in rows[source, labels[0]].seen and not target.endswith(" leak-free")
    ]
    scores = np.array([column for column in columns if not np.isnan(column).any()]).T  # (methods, targets)
    if scores.ndim < 2 or scores.shape[1] < 2:
        return None
    ranking = rank_methods(-scores if comparison.metric == "ece" else scores)
    order = np.argsort(ranking.ranks, kind="stable")
    ordered = replace(ranking, ranks=tuple(ranking.ranks[place] for place in order))
    return Ranks(tuple(labels[place] for place in order), ordered, tuple(sorted(everybody - set(labels))))
