"""The comparison of runs: methods × targets, mean ± interval over seeds, from what MLflow knows."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace

from cafe.errors import UserError, unknown
from cafe.expressions import EXPRESSIONS
from cafe.metrics import Estimate, estimate
from cafe.protocols import PROTOCOLS, find_protocol
from pipeline.tracking import TrackedRun

METRICS = ("accuracy", "mean_class_accuracy", "macro_f1")
SEED = "seed"
PEEKING = "source_test"  # a selection that looks at faces the run is judged on: always said beside its numbers
IDENTITY = ("source", "method", SEED)  # what a row shows anyway


@dataclass(frozen=True)
class Row:
    """One method trained on one source, over its seeds: an estimate per target and the means over targets."""

    source: str
    method: str
    variant: str  # the settings in which it differs from the other rows of this method; empty when there are none
    seeds: int
    targets: dict[str, Estimate]
    unseen: Estimate
    everything: Estimate  # including the source, as published
    unseen_macro_f1: Estimate


@dataclass(frozen=True)
class Comparison:
    """Rows by source, and the targets in the order of the columns."""

    metric: str
    targets: list[str]
    rows: list[Row] = field(default_factory=list)
    protocol: str = "clean"
    others: tuple[str, ...] = ()  # further protocols by which some of the runs were judged; they need their own tables


def compare(runs: list[TrackedRun], metric: str = "accuracy", protocol: str = "clean") -> Comparison:
    """Group the runs judged by a protocol that differ in nothing but their seed and estimate every cell; raise `UserError`.

    A mean over targets is left empty when a row was not judged on all targets of its table.
    """
    if metric not in METRICS:
        raise unknown("metric", metric, METRICS)
    judged = select(runs, protocol)
    groups = group_runs(judged)
    prefix, suffix = "target/", f"/{metric}"
    names = {
        name.removeprefix(prefix).removesuffix(suffix)
        for members, _ in groups
        for run in members
        for name in run.metrics
        if name.startswith(prefix) and name.endswith(suffix)
    }
    targets = sorted(name for name in names if "/" not in name and ":" not in name)

    rows = [_row(members, variant, targets, metric) for members, variant in groups]
    others = tuple(name for name in PROTOCOLS if name != protocol and _judged(runs, name))
    return Comparison(metric, targets, rows, protocol, others)


def group_runs(runs: list[TrackedRun]) -> list[tuple[list[TrackedRun], str]]:
    """Return runs that differ in nothing but their seed together, each group with its variant, in order."""
    groups: dict[str, list[TrackedRun]] = defaultdict(list)
    for run in runs:
        groups[run.tags["cafe.group"]].append(run)
    variants = name_variants([members[0].params for members in groups.values()])
    named = zip(groups.values(), variants, strict=True)
    return sorted(named, key=lambda group: (group[0][0].params["source"], group[0][0].params["method"], group[1]))


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


def _row(members: list[TrackedRun], variant: str, targets: list[str], metric: str) -> Row:
    params = members[0].params

    def over_seeds(name: str) -> Estimate:
        return estimate([run.metrics[name] for run in members if name in run.metrics])

    def over_targets(group: str, name: str, wanted: list[str]) -> Estimate:
        complete = all(f"target/{target}/{metric}" in run.metrics for run in members for target in wanted)
        return over_seeds(f"{group}/{name}") if complete else estimate([])

    unseen = [target for target in targets if target != params["source"]]
    return Row(
        params["source"],
        params["method"],
        variant,
        len({run.params[SEED] for run in members}),
        {target: over_seeds(f"target/{target}/{metric}") for target in targets},
        over_targets("unseen", metric, unseen),
        over_targets("all", metric, targets),
        over_targets("unseen", "macro_f1", unseen),
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


def to_markdown(lines: list[list[str]]) -> str:
    """Return a header and lines as a Markdown table."""
    header, *body = lines
    lines = [header, ["---"] * 3 + ["---:"] * (len(header) - 3), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def describe_protocol(protocol: str) -> str:
    """Say how the targets of a table were judged: numbers of two protocols are not comparable."""
    return f"Protocol {protocol}: {find_protocol(protocol).about}"


def cells(comparison: Comparison) -> list[list[str]]:
    """Return the comparison as text: a header and a line per row, percent ± half-width of the 95 % t-interval."""
    metric = comparison.metric.replace("_", " ")
    header = ["source", "method", "seeds", *comparison.targets, f"unseen {metric}", "unseen macro-F1", f"all {metric}"]
    lines = [header]
    for row in comparison.rows:
        values = [
            f"({cell})" if target == row.source else str(cell)  # seen in training: not a measure of generalisation
            for target, cell in row.targets.items()
        ]
        method = f"{row.method} ({row.variant})" if row.variant else row.method
        values += map(str, (row.unseen, row.unseen_macro_f1, row.everything))
        peeked = f"selection={PEEKING}" in row.variant
        lines.append([row.source, method, str(row.seeds), *(f"{value} †" if peeked else value for value in values)])
    return lines


def class_cells(runs: list[TrackedRun], target: str, protocol: str = "clean") -> list[list[str]]:
    """Return accuracy per expression on one target as text, like the supplement's Table 1; raise `UserError`.

    A header and a line per method: seven recalls, overall accuracy and their mean.
    """
    all_judged = select(runs, protocol)
    judged = [run for run in all_judged if f"target/{target}/accuracy" in run.metrics]
    if not judged:
        names = {name.split("/")[1] for run in all_judged for name in run.metrics if name.startswith("target/")}
        raise unknown("target", target, names)
    columns = {**{name: f"recall/{name}" for name in EXPRESSIONS}, "overall": "accuracy", "mean": "mean_class_accuracy"}
    lines = [["source", "method", "seeds", *columns]]
    for members, variant in group_runs(judged):
        params = members[0].params
        method = f"{params['method']} ({variant})" if variant else params["method"]
        metrics = [f"target/{target}/{name}" for name in columns.values()]
        cells = [str(estimate([run.metrics[name] for run in members if name in run.metrics])) for name in metrics]
        lines.append([params["source"], method, str(len(members)), *cells])
    return lines
