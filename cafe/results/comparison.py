"""The comparison of runs: methods × targets, one estimate over seeds in every cell, from the table of scores."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd

from cafe.errors import UserError, shorten, unknown
from cafe.results.columns import MEAN, OVERALL, Column, Mean, name_class_sets
from cafe.results.metrics import METRICS, RECALL, Estimate, estimate, find_metric
from cafe.results.predictions import Answers
from cafe.results.protocols import ALL_PROTOCOLS, OPTIONS
from cafe.results.runs import Run
from cafe.results.scores import ENDS, FACES, LOW, Kept
from cafe.results.significance.statistics import combine_intervals, wilson
from cafe.results.sources import SAME_FACES, SAME_SET, SOURCE, UNSEEN

ORACLE = "oracle"  # a selection that looks at faces of the target itself
PEEKING = ("source_test", ORACLE)  # that look at what the run is evaluated on: always said beside its numbers
NOT_IN_LABELS = {"source", "method", "seed"}  # settings that a row shows beside its label
ALL = "all"  # targets: the unseen ones and the sources
NOTHING = estimate([])


@dataclass(frozen=True)
class Row:
    """Runs that differ in nothing but their seed: one method trained on one source, with an estimate in every cell.

    In leave-one-domain-out there is one run of every seed for each target, its fold. `label` is the method with the settings
    that tell it apart from the others of its source; `seen` holds the columns of the set it was trained on, `counted` those
    that its mean over unseen targets is of; `unseen` and `everything` are its means of the table's own metric. `class_set`
    names the classes it is evaluated over where rows differ in them. A row of which every seed predicts the same is not
    `seeded`.
    """

    runs: tuple[Run, ...]
    label: str
    cells: dict[Column, Estimate]
    means: dict[Mean, Estimate] = field(default_factory=dict)
    seen: frozenset[Column] = frozenset()
    counted: frozenset[Column] = frozenset()
    seeded: bool = True
    unseen: Estimate = NOTHING  # over the targets of other sets than its source
    everything: Estimate = NOTHING  # over these and its sources
    class_set: str = ""

    @property
    def source(self) -> str:
        """What it was trained on."""
        return self.runs[0].source_title

    @property
    def sources(self) -> tuple[str, ...]:
        """The names of the manifests it was trained on; none in leave-one-domain-out, where every fold has others."""
        return () if self.runs[0].fold else tuple(source.name for source in self.runs[0].sources)

    @property
    def method(self) -> str:
        """Its method."""
        return self.runs[0].method

    @property
    def seeds(self) -> int:
        """How many seeds there are."""
        return len({run.seed for run in self.runs})

    @property
    def peeked(self) -> bool:
        """Whether its epoch was chosen on faces it is evaluated on, or on others of its target."""
        return self.runs[0].selection in PEEKING

    @property
    def oracle(self) -> bool:
        """Whether its epoch was chosen on its target: it is shown, and never compared."""
        return self.runs[0].selection == ORACLE

    @property
    def test_time(self) -> str:
        """The option of test time with which it was evaluated: shown beside the others, and never ranked with them."""
        return self.runs[0].test_time

    @property
    def saw_target(self) -> str:
        """What of the target it learned from or was chosen by: its pictures, with them their labels, or no picture."""
        if self.peeked:
            return "labels"
        return "pictures" if self.test_time in OPTIONS and OPTIONS[self.test_time].adapts else "no"

    @property
    def contends(self) -> bool:
        """Whether it may be the best of its source."""
        return not (self.peeked or self.test_time)

    def evaluates(self, column: Column) -> bool:
        """Whether one of its runs is to be evaluated there."""
        return any(run.evaluates(column) for run in self.runs)


@dataclass(frozen=True)
class Comparison:
    """Rows by source, and the columns of their cells: targets, or classes on one target.

    `class_sets` holds the classes that the predictions are over, each with the name that its columns have: an empty one
    where all are over the same.
    """

    metric: str
    protocol: str
    columns: list[Column]
    rows: list[Row]
    scores: pd.DataFrame  # of these runs by this protocol
    class_sets: dict[tuple[str, ...], str] = field(default_factory=dict)
    kept: Kept = field(default_factory=Kept)  # what its runs answered
    leaking: list[str] | None = None  # the targets that share faces with a source; None when leaks were not looked at

    @property
    def kinds(self) -> dict[str, str]:
        """The kind of data set of each target, by name."""
        return dict(zip(self.scores["target"], self.scores["kind"], strict=True))

    @property
    def targets(self) -> list[str]:
        """The names of the targets in its columns."""
        return list(dict.fromkeys(column.name for column in self.columns))

    @property
    def means(self) -> list[Mean]:
        """The means that any of its rows has, those over the same classes together."""
        return sorted(dict.fromkeys(mean for row in self.rows for mean in row.means), key=lambda mean: mean.class_set)

    @property
    def twins(self) -> dict[str, str]:
        """The targets that are another one's manifest under a second name, each with that one's name."""
        return find_twins(self.scores)

    def targets_with(self, relation: str) -> list[str]:
        """The targets that have a relation to any of the runs."""
        return sorted(set(self.scores.loc[self.scores["relation"] == relation, "target"]))

    def list_answers(self, row: Row) -> list[dict[Column, Answers]]:
        """Return what every seed of a row answered by column; of a fold for the domain it leaves out alone."""
        found: dict[int, dict[Column, Answers]] = {run.seed: {} for run in row.runs}
        for run in row.runs:
            for column, answers in self.kept.find(run, self.protocol).items():
                if run.evaluates(column):
                    placed = replace(column, class_set=self.class_sets.get(answers.classes, ""))
                    found[run.seed][placed] = answers
        return list(found.values())


def compare(
    runs: Sequence[Run],
    scores: pd.DataFrame,
    metric: str,
    protocol: str,
    leak_free: pd.DataFrame | None = None,
    beside: Sequence[str] | None = None,
    kept: Kept | None = None,
) -> Comparison:
    """Estimate a metric of every group of runs on every target, and its means over targets; raise `UserError`.

    A mean takes the seeds that were evaluated on all of its targets. With `leak_free` scores, targets of which faces were
    left out have a second column. Predictions over other classes have columns and means of their own. `beside` are the
    metrics of which the mean over unseen targets stands beside this one's, by default those that are registered so.
    `kept` holds what the runs answered, which is read when it is needed otherwise.
    """
    if beside is None:
        beside = [name for name, about in METRICS.items() if about.beside and name != metric]
    own = choose_evaluated(scores, protocol)
    shown = own[own["relation"].isin([SOURCE, UNSEEN, SAME_SET, SAME_FACES])]
    class_sets = name_class_sets(shown["classes"])
    table = _Table(shown, class_sets)
    without, leaking = None, []
    if leak_free is not None:
        there = leak_free[(leak_free["protocol"] == protocol) & leak_free["target"].isin(set(table.scores["target"]))]
        without = _Table(there, class_sets)
        leaking = sorted(set(there.loc[there["left_out"] > 0, "target"]))
    columns = [
        replace(column, leak_free=hidden)
        for column in table.columns
        for hidden in ([False, True] if column.name in leaking else [False])
    ]
    rows = []
    for members, label in group_runs(runs, own):
        cells = {
            column: (without if without and column.leak_free else table).estimate(members, metric, [column])
            for column in columns
        }
        row = Row(members, label, cells, seeded=table.is_seeded(members))
        rows.append(_summarise(row, table, without, metric, beside))
    return Comparison(metric, protocol, columns, rows, own, class_sets, kept or Kept(), leaking if without else None)


def _summarise(row: Row, table: _Table, without: _Table | None, metric: str, beside: Sequence[str]) -> Row:
    """Return a row with its means over the targets, over whatever classes it was evaluated there."""
    members = row.runs
    unseen = [column for column in table.places(members) if table.relation(members, column) == UNSEEN]
    class_set = ", ".join(sorted({column.class_set for column in unseen if column.class_set}))
    means = {Mean(UNSEEN, metric, class_set): table.estimate(members, metric, unseen)}
    for other in beside:
        means[Mean(UNSEEN, other, class_set)] = table.estimate(members, other, unseen)
    sources = [table.place(members, source.name) for source in members[0].sources]
    everything = NOTHING if members[0].fold else table.estimate(members, metric, [*unseen, *sources])
    means[Mean(ALL, metric, class_set)] = everything
    if without:
        means[Mean(UNSEEN, metric, class_set, leak_free=True)] = without.estimate(members, metric, unseen)
    return replace(
        row,
        means=means,
        seen=frozenset(column for column in row.cells if table.relation(members, column) in (SOURCE, SAME_SET)),
        counted=frozenset(unseen),
        unseen=means[Mean(UNSEEN, metric, class_set)],
        everything=everything,
        class_set=class_set,
    )


def compare_classes(
    runs: Sequence[Run], scores: pd.DataFrame, target: str, protocol: str, kept: Kept | None = None
) -> Comparison:
    """Estimate the recall of each class on one target, like the supplement's Table 1; raise `UserError`."""
    own = choose_evaluated(scores, protocol)
    if target not in set(own["target"]):
        raise unknown("target", target, set(own["target"]))
    own = own[own["target"] == target]
    class_sets = name_class_sets(own["classes"])
    table, metrics = _Table(own, class_sets), dict[Column, str]()
    for classes, class_set in class_sets.items():
        whole = replace(Column.parse(target, protocol), class_set=class_set)
        metrics |= {replace(whole, part=name): f"{RECALL}{name}" for name in classes}
        metrics |= {replace(whole, part=OVERALL): "accuracy", replace(whole, part=MEAN): "mean_class_accuracy"}
    rows = []
    for members, label in group_runs(runs, own):
        cells = {
            column: table.estimate(members, metric, [replace(column, part="")]) for column, metric in metrics.items()
        }
        relation = table.relation(members, table.place(members, target))
        seen = frozenset(metrics if relation in (SOURCE, SAME_SET) else ())
        rows.append(Row(members, label, cells, seen=seen, seeded=table.is_seeded(members)))
    return Comparison("recall", protocol, list(metrics), rows, own, class_sets, kept or Kept())


class _Table:
    """Scores by one protocol, by run and column, over classes that have names."""

    def __init__(self, scores: pd.DataFrame, class_sets: dict[tuple[str, ...], str]) -> None:
        self.scores, self.class_sets = scores, class_sets
        self.records: dict[tuple[str, Column], dict[Hashable, Any]] = {}
        self.about: dict[str, tuple[str, str]] = {}  # the kind and the manifest of a target
        for record in scores.to_dict("records"):
            place = replace(record["column"], class_set=class_sets.get(record["classes"], ""))
            self.records[record["run"], place] = record
            self.about[record["target"]] = (record["kind"], record["manifest"])
        self.columns = sorted({column for _, column in self.records})
        self.twins = find_twins(scores)
        distinct = scores.groupby(["group", "target"])[list(METRICS)].nunique().max(axis=1)
        self.varied = {group for (group, _), count in distinct.items() if count > 1}

    def relation(self, runs: Sequence[Run], column: Column) -> str:
        """Return what a target is to the runs that are to be evaluated there, whether or not they were; empty for none."""
        found = next((run.relation(column, *self.about[column.name]) for run in runs if run.evaluates(column)), "")
        return SAME_FACES if found == UNSEEN and column.name in self.twins else found

    def place(self, runs: Sequence[Run], target: str) -> Column:
        """Return the column in which runs have predictions for a target or, without any, would have them."""
        columns = [column for column in self.columns if column.name == target]
        mine = (column for column in columns if any((run.name, column) in self.records for run in runs))
        other = columns[0] if columns else Column(target)
        return next(mine, replace(other, class_set=self.class_sets.get(runs[0].class_set, "")))

    def places(self, runs: Sequence[Run]) -> list[Column]:
        """Return the column of runs on every target."""
        return [self.place(runs, target) for target in dict.fromkeys(column.name for column in self.columns)]

    def is_seeded(self, runs: Sequence[Run]) -> bool:
        """Whether the seed plays a part: not where every one of several predicts the same."""
        return len({run.seed for run in runs}) < 2 or runs[0].group in self.varied

    def estimate(self, runs: Sequence[Run], metric: str, columns: Sequence[Column]) -> Estimate:
        """Estimate the mean of a metric over columns from the seeds that have it in all of them."""
        about, columns = find_metric(metric), [replace(column, leak_free=False) for column in columns]
        found = {
            (run.seed, column): self.records.get((run.name, column), {}).get(metric, math.nan)
            for run in runs
            for column in columns
            if run.evaluates(column)
        }
        seeds = dict.fromkeys(run.seed for run in runs if columns)
        evaluated = {seed: [found.get((seed, column), math.nan) for column in columns] for seed in seeds}
        means = {seed: about.over_targets(values) for seed, values in evaluated.items()}
        whole = {seed: mean for seed, mean in means.items() if not math.isnan(mean)}
        result = estimate(list(whole.values())[: None if self.is_seeded(runs) else 1], about.unit)
        rest = self._rest([run for run in runs if run.seed in whole], metric, columns) if whole else {}
        return replace(result, **rest)

    def _rest(self, runs: Sequence[Run], metric: str, columns: Sequence[Column]) -> dict[str, Any]:
        """Return what an estimate rests on: faces, chance, and the interval over faces where one is known."""
        about, recall = find_metric(metric), metric.startswith(RECALL)
        means, intervals, faces, chances = [], [], 0, []
        for column in columns:
            own = [
                record
                for run in runs
                if run.evaluates(column) and (record := self.records.get((run.name, column)))
                if not math.isnan(record[metric])
            ]
            if not own:
                continue
            count = int(own[0][f"{FACES}{metric.removeprefix(RECALL)}" if recall else "faces"])
            means.append(sum(record[metric] for record in own) / len(own))
            if metric == "accuracy" or recall:
                intervals.append(wilson(means[-1], count))
            elif f"{metric}{LOW}" in own[0]:
                ends = ([record[f"{metric}{end}"] for record in own] for end in ENDS)
                low, high = (sum(values) / len(values) for values in ends)
                intervals.append((low, high))
            faces += count
            chances.append(math.nan if recall or not about.chance else own[0][about.chance])
        low, high = combine_intervals(means, intervals) if intervals else (math.nan, math.nan)
        return {"faces": faces, "chance": sum(chances) / len(chances), "low": low, "high": high}


def find_twins(scores: pd.DataFrame) -> dict[str, str]:
    """Return the targets that are the manifest of an earlier one under another name, each with that one's name.

    Those of another split than the protocol's, which stay out of every mean, are of other faces.
    """
    listed = zip(scores["column"], scores["manifest"], strict=True)
    manifests, first = {column.name: manifest for column, manifest in listed if not column.split}, dict[str, str]()
    for target, manifest in sorted(manifests.items()):
        if manifest:
            first.setdefault(manifest, target)
    return {name: first[own] for name, own in manifests.items() if own and first[own] != name}


def choose_evaluated(scores: pd.DataFrame, protocol: str) -> pd.DataFrame:
    """Return the scores by one protocol; raise `UserError` when there are none."""
    check_evaluated(set(scores["protocol"]), protocol)
    return scores[scores["protocol"] == protocol]


def check_evaluated(evaluated: Collection[str], protocol: str) -> None:
    """Raise `UserError` unless runs were evaluated by a protocol, of those by which any was."""
    if protocol in evaluated:
        return
    if there := [name for name in ALL_PROTOCOLS if name in evaluated]:
        raise UserError(
            f"No run was evaluated by the protocol {protocol!r} yet, only by {', '.join(there)}: "
            f"run `cafe evaluate RUN --protocol {protocol}` first."
        )
    raise UserError("No run was evaluated yet: train one with `cafe train --source NAME --method cafe`.")


def group_runs(runs: Sequence[Run], scores: pd.DataFrame) -> list[tuple[tuple[Run, ...], str]]:
    """Return the scored runs that differ only in their seed together, with the label of their row, by source and label."""
    scored, groups = set(scores["run"]), defaultdict(list)
    for run in runs:
        if run.name in scored:
            groups[run.group].append(run)
    members = [tuple(sorted(group, key=lambda run: run.seed)) for group in groups.values()]
    named = list(zip(members, name_rows(members), strict=True))
    return sorted(named, key=lambda row: (row[0][0].source_title, row[0][0].method, row[1]))


def name_rows(groups: Sequence[Sequence[Run]]) -> list[str]:
    """Return the labels of rows: the method, with what a user chose otherwise than in most of its rows on that source.

    Long values are shortened in the middle as far as the rows stay apart; those that no choice tells apart are numbered.
    """
    labels = [""] * len(groups)
    families: dict[tuple[str, str], list[int]] = defaultdict(list)
    for place, group in enumerate(groups):
        families[group[0].source_title, group[0].method].append(place)
    for (_, method), places in families.items():
        class_sets = name_class_sets((groups[place][0].class_set for place in places), noun="")
        chosen = [
            {**_common_settings(groups[place]), "classes": class_sets[groups[place][0].class_set]} for place in places
        ]
        for longest in (24, 48, 10_000):
            names = [_name_row(method, own, chosen, longest) for own in chosen]
            if len(set(names)) == len(names):
                break
        for number, (place, name) in enumerate(zip(places, names, strict=True)):
            earlier = names[:number].count(name)
            labels[place] = f"{name} #{earlier + 1}" if names.count(name) > 1 else name
    return labels


def _common_settings(group: Sequence[Run]) -> dict[str, object]:
    first = group[0].settings
    return {key: first[key] for key in first if all(run.settings.get(key) == first[key] for run in group)}


def _name_row(method: str, own: dict[str, object], rivals: Sequence[dict[str, object]], longest: int) -> str:
    said = {key: value for key, value in own.items() if key not in NOT_IN_LABELS and value not in ("", None)}
    differing = []
    for key, value in sorted(said.items()):
        others = [rival.get(key) for rival in rivals]
        usual = 2 * others.count(value) > len(others) and None not in others  # of most rows: the others name theirs
        if (not usual and any(other != value for other in others)) or (key == "selection" and value in PEEKING):
            differing.append(key)
    texts = (f"{key.removeprefix('recipe.')}={shorten(str(said[key]), longest)}" for key in differing)
    return f"{method} ({', '.join(texts)})" if differing else method
