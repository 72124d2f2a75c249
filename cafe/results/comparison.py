"""The comparison of runs: methods × targets, one estimate over seeds in every cell, from the table of scores."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import pandas as pd

from cafe.data.expressions import EXPRESSIONS
from cafe.errors import UserError, unknown
from cafe.results.metrics import METRICS, Estimate, estimate
from cafe.results.protocols import ALL_PROTOCOLS
from cafe.results.scores import Run
from cafe.results.sources import SAME_SET, SOURCE, UNSEEN

ORACLE = "oracle"  # a selection that looks at faces of the target itself
PEEKING = ("source_test", ORACLE)  # selections that look at what the run is judged on: always said beside its numbers
IDENTITY = {"source", "method", "seed"}  # what a row shows anyway
NOTHING = estimate([])


@dataclass(frozen=True)
class Row:
    """Runs that differ in nothing but their seed: one method trained on one source, with an estimate in every cell.

    In leave-one-domain-out there is one run of every seed for each target, its fold.
    `label` is the method with the settings that tell it apart from the others of its source; `seen` names the targets that
    are of the set it was trained on. A row of which every seed predicts the same is not `seeded`.
    """

    runs: tuple[Run, ...]
    label: str
    cells: dict[str, Estimate]  # by target or expression
    means: dict[str, Estimate] = field(default_factory=dict)
    seen: frozenset[str] = frozenset()
    seeded: bool = True

    @property
    def source(self) -> str:
        """What it was trained on."""
        return self.runs[0].trained_on

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
        """Whether its epoch was chosen on faces it is judged on, or on others of its target."""
        return self.runs[0].selection in PEEKING

    @property
    def oracle(self) -> bool:
        """Whether its epoch was chosen on its target: it is shown, and never compared."""
        return self.runs[0].selection == ORACLE

    @property
    def test_time(self) -> str:
        """The option of test time with which it was judged: shown beside the others, and never ranked with them."""
        return self.runs[0].test_time

    @property
    def contends(self) -> bool:
        """Whether it may be the best of its source."""
        return not (self.peeked or self.test_time)

    @property
    def unseen(self) -> Estimate:
        """The mean over the targets of other sets than its source."""
        return self.means.get("unseen", NOTHING)


@dataclass(frozen=True)
class Comparison:
    """Rows by source, and the columns of their cells: targets, or expressions on one target."""

    metric: str
    protocol: str
    columns: list[str]
    rows: list[Row]
    scores: pd.DataFrame  # of these runs by this protocol
    leaking: list[str] | None = None  # the targets that share faces with a source; None when leaks were not looked at

    @property
    def kinds(self) -> dict[str, str]:
        """The kind of data set of each target."""
        return dict(zip(self.scores["target"], self.scores["kind"], strict=True))

    def targets_with(self, relation: str) -> list[str]:
        """The targets that have a relation to any of the runs."""
        return sorted(set(self.scores.loc[self.scores["relation"] == relation, "target"]))


def compare(
    runs: Sequence[Run], scores: pd.DataFrame, metric: str, protocol: str, leak_free: pd.DataFrame | None = None
) -> Comparison:
    """Estimate a metric of every group of runs on every target, and its means over targets; raise `UserError`.

    A mean takes the seeds that were judged on all of its targets. With `leak_free` scores, targets of which faces were left
    out have a second column, named `TARGET leak-free`.
    """
    if metric not in METRICS:
        raise unknown("metric", metric, METRICS)
    own = choose_judged(scores, protocol)
    table = _Table(own[own["relation"].isin([SOURCE, UNSEEN, SAME_SET])])
    targets = sorted(table.about)
    without, leaking = None, []
    if leak_free is not None:
        without = _Table(leak_free[(leak_free["protocol"] == protocol) & leak_free["target"].isin(targets)])
        lost = without.scores["left_out"] > 0
        leaking = [target for target in targets if target in set(without.scores.loc[lost, "target"])]
    rows = []
    for members, label in group_runs(runs, own):
        relations = {target: table.relation(members, target) for target in targets}
        unseen = [target for target, relation in relations.items() if relation == UNSEEN]
        cells: dict[str, Estimate] = {}
        for target in targets:
            cells[target] = table.estimate(members, metric, [target])
            if without and target in leaking:
                cells[f"{target} leak-free"] = without.estimate(members, metric, [target])
        familiar = {target for target, relation in relations.items() if relation in (SOURCE, SAME_SET)}
        seen = frozenset(name for name in cells if name.removesuffix(" leak-free") in familiar)
        means = {"unseen": table.estimate(members, metric, unseen)}
        means |= {f"unseen {other}": table.estimate(members, other, unseen) for other in ("macro_f1", "ece")}
        whole = [*unseen, *(source.name for source in members[0].sources)]
        means["all"] = NOTHING if members[0].fold else table.estimate(members, metric, whole)
        if without:
            means["unseen leak-free"] = without.estimate(members, metric, unseen)
        rows.append(Row(members, label, cells, means, seen, table.is_seeded(members)))
    return Comparison(metric, protocol, list(rows[0].cells), rows, own, leaking if without else None)


def compare_classes(runs: Sequence[Run], scores: pd.DataFrame, target: str, protocol: str) -> Comparison:
    """Estimate the recall of each expression on one target, like the supplement's Table 1; raise `UserError`."""
    own = choose_judged(scores, protocol)
    if target not in set(own["target"]):
        raise unknown("target", target, set(own["target"]))
    own = own[own["target"] == target]
    metrics = {**{name: f"recall/{name}" for name in EXPRESSIONS}, "overall": "accuracy", "mean": "mean_class_accuracy"}
    table, rows = _Table(own), []
    for members, label in group_runs(runs, own):
        cells = {name: table.estimate(members, metric, [target]) for name, metric in metrics.items()}
        seen = frozenset(metrics if table.relation(members, target) in (SOURCE, SAME_SET) else ())
        rows.append(Row(members, label, cells, {}, seen, table.is_seeded(members)))
    return Comparison("recall", protocol, list(metrics), rows, own)


class _Table:
    """Scores by one protocol, by run and target."""

    def __init__(self, scores: pd.DataFrame) -> None:
        self.scores = scores
        self.records = {(record["run"], record["target"]): record for record in scores.to_dict("records")}
        self.about = {target: (record["kind"], record["manifest"]) for (_, target), record in self.records.items()}
        distinct = scores.groupby(["group", "target"])[list(METRICS)].nunique().max(axis=1)
        self.varied = {group for (group, _), count in distinct.items() if count > 1}

    def relation(self, runs: Sequence[Run], target: str) -> str:
        """Return what a target is to the runs that are to be judged on it, whether or not they were; empty for no run."""
        return next((run.relation(target, *self.about[target]) for run in runs if run.judges(target)), "")

    def is_seeded(self, runs: Sequence[Run]) -> bool:
        """Whether the seed plays a part: not where every one of several predicts the same."""
        return len({run.seed for run in runs}) < 2 or runs[0].group in self.varied

    def estimate(self, runs: Sequence[Run], metric: str, targets: Sequence[str]) -> Estimate:
        """Estimate the mean of a metric over targets from the seeds that have it on all of them."""
        found = {
            (run.seed, target): self.records.get((run.name, target), {}).get(metric, math.nan)
            for run in runs
            for target in targets
            if run.judges(target)
        }
        seeds = dict.fromkeys(run.seed for run in runs)
        judged = [[found.get((seed, target), math.nan) for target in targets] for seed in seeds]
        means = [sum(values) / len(values) for values in judged if values]
        whole = [mean for mean in means if not math.isnan(mean)]
        return estimate(whole if self.is_seeded(runs) else whole[:1])


def choose_judged(scores: pd.DataFrame, protocol: str) -> pd.DataFrame:
    """Return the scores by one protocol; raise `UserError` when there are none."""
    own = scores[scores["protocol"] == protocol]
    if len(own):
        return own
    if there := [name for name in ALL_PROTOCOLS if (scores["protocol"] == name).any()]:
        raise UserError(
            f"No run was judged by the protocol {protocol!r} yet, only by {', '.join(there)}: "
            f"run `cafe evaluate RUN --protocol {protocol}` first."
        )
    raise UserError("No run was judged yet: train one with `cafe train --source NAME --method cafe`.")


def group_runs(runs: Sequence[Run], scores: pd.DataFrame) -> list[tuple[tuple[Run, ...], str]]:
    """Return the scored runs that differ only in their seed together, with the label of their row, by source and label."""
    scored, groups = set(scores["run"]), defaultdict(list)
    for run in runs:
        if run.name in scored:
            groups[run.group].append(run)
    members = [tuple(sorted(group, key=lambda run: run.seed)) for group in groups.values()]
    named = list(zip(members, name_rows(members), strict=True))
    return sorted(named, key=lambda row: (row[0][0].trained_on, row[0][0].method, row[1]))


def name_rows(groups: Sequence[Sequence[Run]]) -> list[str]:
    """Return the labels of rows: the method, with what a user chose otherwise than in most of its rows on that source.

    Long values are shortened in the middle as far as the rows stay apart; those that no choice tells apart are numbered.
    """
    labels = [""] * len(groups)
    families: dict[tuple[str, str], list[int]] = defaultdict(list)
    for place, group in enumerate(groups):
        families[group[0].trained_on, group[0].method].append(place)
    for (_, method), places in families.items():
        chosen = [_common_settings(groups[place]) for place in places]
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
    told = {key: value for key, value in own.items() if key not in IDENTITY and value not in ("", None)}
    differing = []
    for key, value in sorted(told.items()):
        others = [rival.get(key) for rival in rivals]
        usual = (
            2 * others.count(value) > len(others) and None not in others
        )  # most rows have it: the others name theirs
        if (not usual and any(other != value for other in others)) or (key == "selection" and value in PEEKING):
            differing.append(key)
    texts = (f"{key.removeprefix('recipe.')}={shorten(str(told[key]), longest)}" for key in differing)
    return f"{method} ({', '.join(texts)})" if differing else method


def shorten(text: str, longest: int) -> str:
    """Return a text with its middle left out where it is longer than so many characters."""
    kept = longest - 1
    return text if len(text) <= longest else f"{text[: kept // 2]}…{text[-(kept - kept // 2) :]}"
