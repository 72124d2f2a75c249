"""The one table of scores: every run on every target by every protocol, computed from the predictions in the run folders.

Comparisons, tests, tracked metrics and pages all read this table; leaving out faces or targets is a filter on what goes in.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from cafe.results.columns import Column
from cafe.results.metrics import METRICS, RECALL, macro_f1_error, score
from cafe.results.predictions import Answers, Head, Predictions, list_predictions, list_protocols
from cafe.results.protocols import ALL_PROTOCOLS, find_protocol
from cafe.results.runs import Run
from cafe.results.significance.statistics import combine_intervals, wilson
from cafe.results.sources import SAME_FACES, SAME_SET, SOURCE, UNKNOWN, UNSEEN
from cafe.threads import map_threads

FACES = "faces/"  # before the name of a class: how many faces it has
LOW, HIGH = ".low", ".high"
Z = 1.96  # deviations of a normal variable that hold 95 % of it
ENDS = (LOW, HIGH)  # behind the name of a metric: of its 95 % interval over faces, taken for independent

# What a record says beside the metrics and the recalls. `sources` is how many there are; `column` is the `Column` of which
# `protocol` and `target` are names. What the numbers rest on: the faces, the share of the `largest` class among them, and
# `uniform`, one in K classes.
SCORE_FIELDS = (
    "run", "group", "source", "sources", "method", "seed", "column", "protocol", "target", "split", "kind", "manifest",
    "relation", "unseen", "classes", "target_classes", "faces", "left_out", "other_classes",
    "largest", "uniform", *(f"{name}{end}" for name in ("accuracy", "macro_f1") for end in ENDS),
)  # fmt: skip

NAMED = 3  # runs in a line about many of them

Filter = Callable[[Run, Column, Predictions], Predictions]


class Kept:
    """The answers of runs by one protocol: kept when they are scored, so that no file is read again for tests and figures.

    Faces that several runs were evaluated on are kept once.
    """

    def __init__(self) -> None:
        self._by_run: dict[tuple[str, str], dict[Column, Answers]] = {}
        self._first: dict[str, Answers] = {}  # by the name of the column

    def find(self, run: Run, protocol: str) -> dict[Column, Answers]:
        """Return the answers of a run by column, read from its files where they were not kept."""
        key = (run.name, protocol)
        if key not in self._by_run:
            self.add(run, protocol, run.load_predictions(protocol))
        return self._by_run[key]

    def add(self, run: Run, protocol: str, predictions: Mapping[Column, Predictions]) -> None:
        """Keep what is needed of the predictions of a run."""
        own = self._by_run[run.name, protocol] = dict[Column, Answers]()
        for column, one in predictions.items():
            answers = one.answers
            own[column] = answers.share(self._first.setdefault(column.name, answers))


def read_scores(
    runs: Iterable[Run],
    known: Collection[str] = (),
    protocols: Iterable[str] = ALL_PROTOCOLS,
    leave_out: Filter | None = None,
) -> pd.DataFrame:
    """Return one record per run, protocol and target, computed from the predictions.

    Columns: those of `SCORE_FIELDS`, every metric, and recall/CLASS of all classes there are. `known` names the manifests of
    the workspace: the relation of other targets is `unknown`, unless the run was pulled from a tracking server; without
    `known` none is. `leave_out` takes faces out, counted in `left_out`; a target of which none is left has no scores.
    `other_classes` counts the faces that were not predicted, being of classes the model lacks. Of unseen targets that are
    one manifest under several names, the first is `unseen` and the others have the `same faces`.
    """
    (scores,) = read_filtered_scores(runs, known, protocols, [leave_out])
    return scores


def read_filtered_scores(
    runs: Iterable[Run],
    known: Collection[str],
    protocols: Iterable[str],
    filters: Sequence[Filter | None],
    kept: Kept | None = None,
) -> list[pd.DataFrame]:
    """Return the table of `read_scores` for each filter, of which None leaves no face out; every file is read once.

    `kept` is given the answers of every run, no face left out.
    """
    tables: list[list[dict[str, Any]]] = [[] for _ in filters]
    classes: dict[str, None] = {}
    named = kept is not None or any(filters)
    for run in runs:
        there = list_protocols(run.folder)
        classes |= dict.fromkeys(run.classes)
        for protocol in protocols:
            if protocol not in there:
                continue
            found = run.load_predictions(protocol, named)
            if kept is not None:
                kept.add(run, protocol, found)
            for column, predictions in found.items():
                for records, leave_out in zip(tables, filters, strict=True):
                    left = leave_out(run, column, predictions) if leave_out else predictions
                    records.append(_describe(run, protocol, column, predictions, left, known))
                    classes |= dict.fromkeys(left.classes)
    return [_tabulate(records, classes) for records in tables]


def _describe(
    run: Run, protocol: str, column: Column, predictions: Predictions, left: Predictions, known: Collection[str]
) -> dict[str, Any]:
    """Return the record of what is left of some predictions."""
    about = {name: predictions.about.get(name, "") for name in ("split", "kind", "manifest")}
    missing = known and not run.pulled and column.target not in known
    relation = UNKNOWN if missing else run.relation(column, about["kind"], about["manifest"])
    return {
        "run": run.name, "group": run.group, "source": run.source, "sources": len(run.sources),
        "method": run.method, "seed": run.seed, "column": column, "protocol": protocol, "target": column.name,
        **about, "relation": relation, "unseen": relation == UNSEEN, "classes": left.classes,
        "target_classes": left.target_classes,
        "faces": len(left.labels), "left_out": len(predictions.labels) - len(left.labels),
        "other_classes": predictions.other_classes,
        **(describe_scores(left) if len(left.labels) else {}),
    }  # fmt: skip


def _tabulate(records: Sequence[dict[str, Any]], classes: Iterable[str]) -> pd.DataFrame:
    by_class = [f"{of}{name}" for of in (RECALL, FACES) for name in classes]
    scores = pd.DataFrame(records, columns=[*SCORE_FIELDS, *METRICS, *by_class])
    unseen = scores[scores["unseen"].astype(bool) & (scores["manifest"] != "")]
    twins = unseen.index[unseen.duplicated(["run", "protocol", "manifest"])]
    scores.loc[twins, "relation"] = SAME_FACES
    scores.loc[twins, "unseen"] = False
    return scores


def list_evaluated(runs: Iterable[Run]) -> set[str]:
    """Return the protocols by which any run has predictions that are not set aside; no file is opened."""
    return {
        protocol
        for run in runs
        for protocol in list_protocols(run.folder)
        if any((protocol, name) not in run.set_aside for name in list_predictions(run.folder, protocol))
    }


def describe_scores(predictions: Predictions) -> dict[str, float]:
    """Return every metric and recall of some faces, and what these rest on: faces of each class, chance and intervals."""
    scores, classes = score(predictions), predictions.classes
    support = np.bincount(predictions.labels, minlength=len(classes))
    reach = Z * macro_f1_error(predictions)
    low, high = wilson(scores["accuracy"], len(predictions.labels))
    return {
        **scores,
        **{f"{FACES}{name}": int(count) for name, count in zip(classes, support, strict=True)},
        "largest": float(support.max() / support.sum()),
        "uniform": 1 / len(classes),
        f"accuracy{LOW}": low,
        f"accuracy{HIGH}": high,
        f"macro_f1{LOW}": max(0.0, scores["macro_f1"] - reach),
        f"macro_f1{HIGH}": min(1.0, scores["macro_f1"] + reach),
    }


class LeftOut(NamedTuple):
    """Predictions that do not belong in the column of their target: the kind of the reason, and the reason itself."""

    run: str
    protocol: str
    column: str
    kind: str
    reason: str

    @property
    def split(self) -> str:
        """The split, where it is another one than the protocol's."""
        return self.column.partition("@")[2]

    def __str__(self) -> str:
        return (
            f"Left out: {self.run} on {self.column} ({self.protocol}), {self.reason}. "
            f"Evaluate it again: {_evaluate_again(self.run, [self.column], self.protocol)}"
        )


def _evaluate_again(run: str, columns: Sequence[str], protocol: str) -> str:
    """Return the command that evaluates a run on some columns of one split."""
    targets, splits = zip(*(column.partition("@")[::2] for column in columns), strict=True)
    plain = find_protocol(protocol)
    options = f" --protocol {plain.plain}" * (plain.plain != "clean") + f" --split {splits[0]}" * bool(splits[0])
    options += f" --test-time {plain.option}" if plain.option else ""
    return f"cafe evaluate {run} --targets {','.join(targets)}{options}"


def describe_left_out(left_out: Sequence[LeftOut]) -> list[str]:
    """Return a line for all predictions that are left out for one kind of reason, with their number and the remedy."""
    alike: dict[tuple[str, str, str], list[LeftOut]] = defaultdict(list)
    for one in left_out:
        alike[one.kind, one.protocol, one.split].append(one)
    lines = []
    for (kind, protocol, _), several in alike.items():
        if len(several) == 1:
            lines.append(str(several[0]))
            continue
        runs, columns = (
            list(dict.fromkeys(names)) for names in zip(*((one.run, one.column) for one in several), strict=True)
        )
        more = f" and {len(runs) - NAMED} more (`cafe compare --json` names all)" if len(runs) > NAMED else ""
        of = f"{len(runs)} runs, {', '.join(runs[:NAMED])}{more}," if len(runs) > 1 else runs[0]
        each, again = ("each", "RUN") if len(runs) > 1 else ("it", runs[0])
        lines.append(
            f"Left out: {len(several)} predictions of {of} on {', '.join(columns)} ({protocol}), {kind}. "
            f"Evaluate {each} again: {_evaluate_again(again, columns, protocol)}"
        )
    return lines


def share_sources(runs: Sequence[Run], manifests: Mapping[str, str] | None = None) -> tuple[list[Run], list[str]]:
    """Return the runs without those of a row of folds that learned from other faces than the rest of it, and why.

    A row of leave-one-domain-out holds trainings on several sets; where one of these was indexed again in between, the
    manifest of the workspace counts, else that of most runs, among equals the first by its digest. `manifests` are the
    digests of the workspace's by name. In other rows all runs learned from one manifest.
    """
    learned: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for run in runs:
        if run.fold:
            for source in run.sources:
                learned[run.group, source.name][source.digest] += 1
    counts = {
        place: min(digests, key=lambda digest: (digest != (manifests or {}).get(place[1]), -digests[digest], digest))
        for place, digests in learned.items()
    }
    other = {
        run.name: source.name
        for run in runs
        if run.fold
        for source in run.sources
        if source.digest != counts[run.group, source.name]
    }
    lines = []
    for name in sorted(set(other.values())):
        found = [run for run, source in other.items() if source == name]
        more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
        lines.append(
            f"Left out: {', '.join(found[:NAMED])}{more}, trained on another manifest of {name} than the rest of the row. "
            "Give their command again."
        )
    return [run for run in runs if run.name not in other], lines


class Meeting(NamedTuple):
    """Runs without the predictions that cannot be compared, and these."""

    runs: list[Run]
    left_out: list[LeftOut]


class _Evaluated(NamedTuple):
    run: str
    protocol: str
    column: str
    manifest: str
    rows: str
    faces: int


def meet(runs: Sequence[Run], manifests: Mapping[str, str] | None = None) -> Meeting:
    """Choose which predictions meet in a column: those of one manifest and, over the same classes, of the same faces.

    `manifests` are the digests of the workspace's by name: where it has the target's, that one counts. Else it is the one
    that most runs were evaluated on, among equals the first by its digest, as no record says which is newer. Of one
    manifest, the most faces count: others were readable later. Every number about several runs is of what meets here.
    """
    by_name = {run.name: run for run in runs}
    columns: dict[tuple[str, str, bool], list[tuple[tuple[str, ...], _Evaluated]]] = defaultdict(list)
    files = [
        (run.name, protocol, name, path)
        for run in runs
        for protocol in list_protocols(run.folder)
        for name, path in list_predictions(run.folder, protocol).items()
    ]
    heads = map_threads(Head.load, [path for *_, path in files], at_once=1)  # an object store answers side by side
    for (run_name, protocol, name, _), head in zip(files, heads, strict=True):
        if head is None:
            continue
        about = (head.about.get("manifest", ""), head.rows, head.faces)
        # Runs that know other classes are evaluated on other faces, in columns of their own; so are those that saw the set.
        plain = find_protocol(protocol).plain
        relation = by_name[run_name].relation(Column.parse(name, plain), head.about.get("kind", ""), about[0])
        place = (plain, name, relation in (SOURCE, SAME_SET))
        columns[place].append((tuple(sorted(head.classes)), _Evaluated(run_name, protocol, name, *about)))
    left_out = [
        left for (_, name, _), several in columns.items() for left in _leave_out(name, several, manifests or {})
    ]
    aside: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for one in left_out:
        aside[one.run].add((one.protocol, one.column))
    return Meeting([replace(run, set_aside=frozenset(aside[run.name])) for run in runs], sorted(left_out))


def _leave_out(
    column: str, several: Sequence[tuple[tuple[str, ...], _Evaluated]], manifests: Mapping[str, str]
) -> Iterable[LeftOut]:
    """Yield which of the predictions for a column are of another manifest or of other faces than those that count."""
    voters: dict[str, set[str]] = defaultdict(set)
    for _, one in several:
        voters[one.manifest].add(one.run)
    current = manifests.get(column.partition("@")[0])
    chosen = current or min(voters, key=lambda manifest: (-len(voters[manifest]), manifest))
    known = "the workspace has now" if current else "most runs were evaluated on, or the first by its digest"
    usual = "the one that the workspace has now" if current else "that of most runs"
    largest: dict[tuple[str, ...], tuple[int, str]] = {}
    for classes, one in several:
        if one.manifest == chosen:
            largest[classes] = max(largest.get(classes, (-1, "")), (one.faces, one.rows))
    for classes, one in several:
        if one.manifest != chosen:
            own = one.manifest[:8] or "of no digest"
            reason = f"evaluated on the manifest {own}, not on {chosen[:8]}, which {known}"
            yield LeftOut(one.run, one.protocol, one.column, f"evaluated on another manifest than {usual}", reason)
        elif (one.faces, one.rows) != largest[classes]:
            reason = f"evaluated on {one.faces} faces, while others were on {largest[classes][0]}, not the same ones"
            yield LeftOut(one.run, one.protocol, one.column, "evaluated on other faces than others", reason)


def average_unseen(scores: pd.DataFrame) -> pd.DataFrame:
    """Return for each run and protocol (the index) the mean of each metric over its unseen targets."""
    return _average(scores[scores["relation"] == UNSEEN])


def average_all(scores: pd.DataFrame) -> pd.DataFrame:
    """Return the same over the unseen targets and the sources, as published tables do, for runs evaluated on all."""
    keys = [scores["run"], scores["protocol"]]
    evaluated = (scores["relation"] == SOURCE).groupby(keys).transform("sum")
    complete = evaluated == scores["sources"]
    return _average(scores[complete & scores["relation"].isin([SOURCE, UNSEEN])])


def _average(scores: pd.DataFrame) -> pd.DataFrame:
    # A target of which no face is left leaves no mean, instead of one over the other targets.
    averages = {name: _over_targets(metric.over_targets) for name, metric in METRICS.items()}
    return scores.groupby(["run", "protocol"], sort=False)[list(METRICS)].agg(averages)


def _over_targets(average: Callable[[Sequence[float]], float]) -> Callable[[pd.Series[float]], float]:
    return lambda values: average(values.tolist())


def interval_of_mean(scores: pd.DataFrame, metric: str) -> tuple[float, float]:
    """Return the ends of the interval over faces of a metric's mean over the targets of some records."""
    ends = [scores[f"{metric}{end}"] for end in ENDS]
    return combine_intervals(list(scores[metric]), list(zip(*ends, strict=True)))


def flatten_scores(scores: pd.DataFrame) -> dict[str, float]:
    """Return one run's scores by flat names: target/TARGET/METRIC, unseen/METRIC and all/METRIC.

    Those of another protocol than `clean` have its name in front. Beside the metrics of a target and of the unseen ones
    are the faces they are of, the share of the largest class, one in K, and the ends of the intervals over faces, METRIC.low
    and METRIC.high.
    """
    named: dict[str, float] = {}
    resting = ("faces", "largest", "uniform")
    measured = [
        name for name in scores if name in (*METRICS, *resting) or name.startswith(RECALL) or name.endswith(ENDS)
    ]
    for record in scores.to_dict("records"):
        named |= {record["column"].metric(name): record[name] for name in measured}
    for group, means in (("unseen", average_unseen(scores)), ("all", average_all(scores))):
        for (_, protocol), values in means.iterrows():
            named |= {f"{find_protocol(protocol).prefix}{group}/{name}": values[name] for name in METRICS}
    for (_, protocol), own in scores[scores["relation"] == UNSEEN].groupby(["run", "protocol"], sort=False):
        group = f"{find_protocol(protocol).prefix}unseen/"
        named |= {f"{group}{name}": own[name].sum() if name == "faces" else own[name].mean() for name in resting}
        named |= {
            f"{group}{name}{end}": value
            for name in ("accuracy", "macro_f1")
            for end, value in zip(ENDS, interval_of_mean(own, name), strict=True)
        }
    return {name: float(value) for name, value in named.items() if not math.isnan(value)}
