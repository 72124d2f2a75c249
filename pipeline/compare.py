"""The comparison of runs: methods × targets, mean ± interval over seeds, from what MLflow knows."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace

from cafe.data.expressions import EXPRESSIONS
from cafe.errors import UserError, unknown
from cafe.results.metrics import Estimate, estimate
from cafe.results.protocols import PROTOCOLS, find_protocol
from pipeline.tracking import TrackedRun

METRICS = ("accuracy", "mean_class_accuracy", "macro_f1")
SEED = "seed"
PEEKING = "source_test"  # a selection that looks at faces the run is judged on: always said beside its numbers
IDENTITY = ("source", "method", SEED)  # what a row shows anyway


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but their seed: one method trained on one source."""

    runs: tuple[TrackedRun, ...]
    variant: str  # the settings in which it differs from the other rows of this method; empty when there are none

    @property
    def source(self) -> str:
        """What it was trained on."""
        return self.runs[0].params["source"]

    @property
    def method(self) -> str:
        """Its method."""
        return self.runs[0].params["method"]

    @property
    def label(self) -> str:
        """What tells it apart from the others of its source."""
        return f"{self.method} ({self.variant})" if self.variant else self.method

    @property
    def seeds(self) -> int:
        """How many seeds there are."""
        return len({run.params[SEED] for run in self.runs})

    @property
    def peeked(self) -> bool:
        """Whether its epoch was chosen on faces it is judged on."""
        return self.runs[0].params.get("selection") == PEEKING

    def over_seeds(self, metric: str) -> Estimate:
        """Estimate a metric over the runs that have it."""
        return estimate([run.metrics[metric] for run in self.runs if metric in run.metrics])


@dataclass(frozen=True)
class Row(Group):
    """An estimate per target and the means over targets."""

    targets: dict[str, Estimate]
    unseen: Estimate
    everything: Estimate  # including the source, as published
    unseen_macro_f1: Estimate
    leak_free: dict[str, Estimate] = field(default_factory=dict)  # without copies of the source's training faces
    unseen_leak_free: Estimate = field(default_factory=lambda: estimate([]))


@dataclass(frozen=True)
class ClassRow(Group):
    """An estimate per expression on one target, then `overall` and `mean`."""

    values: dict[str, Estimate]


@dataclass(frozen=True)
class Comparison:
    """Rows by source, and the targets in the order of the columns."""

    metric: str
    targets: list[str]
    rows: list[Row] = field(default_factory=list)
    protocol: str = "clean"
    others: tuple[str, ...] = ()  # further protocols by which some of the runs were judged; they need their own tables
    leaking: list[str] | None = None  # the targets that share faces with a source; None when leaks were not looked at


def compare(
    runs: list[TrackedRun], metric: str = "accuracy", protocol: str = "clean", leak_free: bool = False
) -> Comparison:
    """Group the runs judged by a protocol that differ in nothing but their seed and estimate every cell; raise `UserError`.

    A mean over targets is left empty when a row was not judged on all targets of its table. With `leak_free` the
    targets of which faces were left out (`leakfree/` metrics) have a second column.
    """
    if metric not in METRICS:
        raise unknown("metric", metric, METRICS)
    judged = select(runs, protocol)
    groups = group_runs(judged)
    prefix, suffix = "target/", f"/{metric}"
    names = {
        name.removeprefix(prefix).removesuffix(suffix)
        for run in judged
        for name in run.metrics
        if name.startswith(prefix) and name.endswith(suffix)
    }
    targets = sorted(name for name in names if "/" not in name and ":" not in name)
    rows = [_row(group, targets, metric) for group in groups]
    others = tuple(name for name in PROTOCOLS if name != protocol and _judged(runs, name))
    leaking = [name for name in targets if any(run.metrics.get(f"leakfree/{name}/left_out") for run in judged)]
    return Comparison(metric, targets, rows, protocol, others, leaking if leak_free else None)


def compare_classes(runs: list[TrackedRun], target: str, protocol: str = "clean") -> list[ClassRow]:
    """Estimate accuracy per expression on one target, like the supplement's Table 1; raise `UserError`."""
    all_judged = select(runs, protocol)
    judged = [run for run in all_judged if f"target/{target}/accuracy" in run.metrics]
    if not judged:
        names = {name.split("/")[1] for run in all_judged for name in run.metrics if name.startswith("target/")}
        raise unknown("target", target, names)
    columns = {**{name: f"recall/{name}" for name in EXPRESSIONS}, "overall": "accuracy", "mean": "mean_class_accuracy"}
    return [
        ClassRow(
            group.runs,
            group.variant,
            {name: group.over_seeds(f"target/{target}/{metric}") for name, metric in columns.items()},
        )
        for group in group_runs(judged)
    ]


def group_runs(runs: list[TrackedRun]) -> list[Group]:
    """Return runs that differ in nothing but their seed together, each group with its variant, in order."""
    groups: dict[str, list[TrackedRun]] = defaultdict(list)
    for run in runs:
        groups[run.tags["cafe.group"]].append(run)
    variants = name_variants([members[0].params for members in groups.values()])
    named = [Group(tuple(members), variant) for members, variant in zip(groups.values(), variants, strict=True)]
    return sorted(named, key=lambda group: (group.source, group.method, group.variant))


def select(runs: list[TrackedRun], protocol: str) -> list[TrackedRun]:
    """Return the runs judged by a protocol, with its metrics alone; raise `UserError` when there are none."""
    if judged := _judged(runs, protocol):
        return judged
    if there := [name for name in PROTOCOLS if _judged(runs, name)]:
        raise UserError(
            f"No run was judged by the protocol {protocol!r} yet, only by {', '.join(there)}: "
            f"run `cafe evaluate RUN --protocol {protocol}` first."
        )
    raise UserError("No evaluated run to compare yet: train one with `cafe train --source NAME --method cafe`.")


def _judged(runs: list[TrackedRun], protocol: str) -> list[TrackedRun]:
    prefix = find_protocol(protocol).prefix
    own = [
        replace(
            run,
            metrics={
                name.removeprefix(prefix): value for name, value in run.metrics.items() if name.startswith(prefix)
            },
        )
        for run in runs
    ]
    return [run for run in own if any(name.startswith("target/") for name in run.metrics)]


def _row(group: Group, targets: list[str], metric: str) -> Row:
    def over_targets(name: str, wanted: list[str], kind: str = "target") -> Estimate:
        complete = all(f"{kind}/{target}/{metric}" in run.metrics for run in group.runs for target in wanted)
        return group.over_seeds(name) if complete else estimate([])

    unseen = [target for target in targets if target != group.source]
    return Row(
        group.runs,
        group.variant,
        {target: group.over_seeds(f"target/{target}/{metric}") for target in targets},
        over_targets(f"unseen/{metric}", unseen),
        over_targets(f"all/{metric}", targets),
        over_targets("unseen/macro_f1", unseen),
        {target: group.over_seeds(f"leakfree/{target}/{metric}") for target in targets},
        over_targets(f"leakfree_unseen/{metric}", unseen, "leakfree"),
    )


def name_variants(params: list[dict[str, str]]) -> list[str]:
    """Return for each row the settings in which rows of its source and method differ, as `key=value, …`."""
    names = []
    for own in params:
        rivals = [other for other in params if all(other[key] == own[key] for key in ("source", "method"))]
        keys = {key for key in own if key not in IDENTITY and len({other.get(key) for other in rivals}) > 1}
        if own.get("selection") == PEEKING:
            keys.add("selection")
        names.append(", ".join(f"{key.removeprefix('recipe.')}={_brief(own[key])}" for key in sorted(keys)))
    return names


def _brief(value: str) -> str:
    return value if len(value) <= 24 else f"{value[:8]}…"
