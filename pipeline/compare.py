"""The comparison of runs: methods × targets, mean ± interval over seeds, from what MLflow knows."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from cafe.errors import UserError, unknown
from cafe.metrics import Estimate, estimate
from pipeline.tracking import TrackedRun

METRICS = ("accuracy", "mean_class_accuracy", "macro_f1")
SEED = "seed"
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
    leak_free: dict[str, Estimate] = field(default_factory=dict)  # without copies of the source's training faces
    unseen_leak_free: Estimate = field(default_factory=lambda: estimate([]))


@dataclass(frozen=True)
class Comparison:
    """Rows by source, and the targets in the order of the columns."""

    metric: str
    targets: list[str]
    rows: list[Row] = field(default_factory=list)
    leaking: list[str] | None = None  # the targets that share faces with a source; None when leaks were not looked at


def compare(runs: list[TrackedRun], metric: str = "accuracy", leak_free: bool = False) -> Comparison:
    """Group the evaluated runs that differ in nothing but their seed and estimate every cell; raise `UserError`.

    A mean over targets is left empty when a row was not judged on all targets of its table. With `leak_free` the
    targets of which faces were left out (`leakfree/` metrics) have a second column.
    """
    if metric not in METRICS:
        raise unknown("metric", metric, METRICS)
    prefix, suffix = "target/", f"/{metric}"
    judged = [run for run in runs if any(name.startswith(prefix) for name in run.metrics)]
    if not judged:
        raise UserError("No evaluated run to compare yet: train one with `cafe train --source NAME --method cafe`.")
    names = {
        name.removeprefix(prefix).removesuffix(suffix)
        for run in judged
        for name in run.metrics
        if name.startswith(prefix) and name.endswith(suffix)
    }
    targets = sorted(name for name in names if "/" not in name and ":" not in name)

    groups: dict[str, list[TrackedRun]] = defaultdict(list)
    for run in judged:
        groups[run.tags["cafe.group"]].append(run)
    variants = name_variants([members[0].params for members in groups.values()])
    rows = [_row(members, variant, targets, metric) for members, variant in zip(groups.values(), variants, strict=True)]
    leaking = [name for name in targets if any(run.metrics.get(f"leakfree/{name}/left_out") for run in judged)]
    ordered = sorted(rows, key=lambda row: (row.source, row.method, row.variant))
    return Comparison(metric, targets, ordered, leaking if leak_free else None)


def _row(members: list[TrackedRun], variant: str, targets: list[str], metric: str) -> Row:
    params = members[0].params

    def over_seeds(name: str) -> Estimate:
        return estimate([run.metrics[name] for run in members if name in run.metrics])

    def over_targets(group: str, name: str, wanted: list[str], kind: str = "target") -> Estimate:
        complete = all(f"{kind}/{target}/{metric}" in run.metrics for run in members for target in wanted)
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
        {target: over_seeds(f"leakfree/{target}/{metric}") for target in targets},
        over_targets("leakfree_unseen", metric, unseen, "leakfree"),
    )


def name_variants(params: list[dict[str, str]]) -> list[str]:
    """Return for each row the settings in which rows of its source and method differ, as `key=value, …`."""
    names = []
    for own in params:
        rivals = [other for other in params if all(other[key] == own[key] for key in ("source", "method"))]
        keys = sorted(key for key in own if key not in IDENTITY and len({other.get(key) for other in rivals}) > 1)
        names.append(", ".join(f"{key.removeprefix('recipe.')}={_brief(own[key])}" for key in keys))
    return names


def _brief(value: str) -> str:
    return value if len(value) <= 24 else f"{value[:8]}…"


def to_markdown(comparison: Comparison) -> str:
    """Return the comparison as a Markdown table."""
    header, *body = cells(comparison)
    lines = [header, ["---"] * 3 + ["---:"] * (len(header) - 3), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def cells(comparison: Comparison) -> list[list[str]]:
    """Return the comparison as text: a header and a line per row, percent ± half-width of the 95 % t-interval."""
    metric, leaking = comparison.metric.replace("_", " "), comparison.leaking
    header = ["source", "method", "seeds"]
    for target in comparison.targets:
        header += [target, f"{target} leak-free"] if leaking and target in leaking else [target]
    header += [f"unseen {metric}", "unseen macro-F1", f"all {metric}"]
    lines = [header if leaking is None else [*header, f"unseen {metric} leak-free"]]
    for row in comparison.rows:
        values = []
        for target in comparison.targets:
            shown = (
                [row.targets[target], row.leak_free[target]] if leaking and target in leaking else [row.targets[target]]
            )
            # In brackets what was seen in training: not a measure of generalisation.
            values += [f"({cell})" if target == row.source else str(cell) for cell in shown]
        method = f"{row.method} ({row.variant})" if row.variant else row.method
        means = [row.unseen, row.unseen_macro_f1, row.everything]
        means += [] if leaking is None else [row.unseen_leak_free]
        lines.append([row.source, method, str(row.seeds), *values, *map(str, means)])
    return lines
