"""What a comparison is argued with: paired tests against one method, ranks over targets, and the published numbers.

Means and intervals come from MLflow; tests need every face's prediction, so the runs must be in the workspace.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from cafe.errors import UserError, unknown
from cafe.files import read_json
from cafe.methods import METHODS
from cafe.results.predictions import Predictions, load_predictions
from cafe.results.protocols import find_protocol
from cafe.results.published import ACCURACY, SETS, find_published, find_published_classes
from cafe.results.statistics import Difference, Ranking, holm, paired_bootstrap, rank_methods
from pipeline.compare import ClassRow, Comparison, Group, Row
from pipeline.workspace import Workspace

AS_PUBLISHED = {"network": "resnet18", "image_size": "224", "selection": "final"}  # the settings of all five methods


@dataclass(frozen=True)
class Paired:
    """How much more accurate a row is than the reference of its source, on one target or in the mean of all unseen."""

    row: Row
    reference: Row
    target: str  # empty for the mean over the unseen targets
    difference: Difference
    left_out: int  # faces that not all of the runs have judged
    apart: (
        bool | None
    )  # whether every seed of the one is ahead of every seed of the other; None without several of both
    adjusted_p: float = math.nan  # Holm's, over the targets of this row; the mean is no member of that family

    @property
    def seen(self) -> bool:
        """Whether the target is the source itself."""
        return self.target == self.row.source

    @property
    def peeked(self) -> bool:
        """Whether the epoch of either was chosen on faces it is judged on."""
        return self.row.peeked or self.reference.peeked


def pair_rows(workspace: Workspace, comparison: Comparison, versus: str) -> list[Paired]:
    """Test the accuracy of every row against the one of that name trained on the same source; raise `UserError`."""
    tests = []
    for reference in find_references(comparison, versus):
        rivals = [row for row in comparison.rows if row.source == reference.source and row is not reference]
        against = _load(workspace, reference, comparison.protocol) if rivals else []
        for row in rivals:
            tests += list(_test(row, reference, _load(workspace, row, comparison.protocol), against, comparison))
    return tests


def find_references(comparison: Comparison, versus: str) -> list[Row]:
    """Return the row of that name for each source that has one; raise `UserError` when it is none or not the only one."""
    found = []
    for source in dict.fromkeys(row.source for row in comparison.rows):
        rows = [row for row in comparison.rows if row.source == source]
        named = [row for row in rows if row.label == versus] or [row for row in rows if row.method == versus]
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


def _test(
    row: Row,
    reference: Row,
    ours: list[dict[str, Predictions]],
    theirs: list[dict[str, Predictions]],
    comparison: Comparison,
) -> Iterator[Paired]:
    """The tests of a row on all targets both were judged on, then of the mean when that is all the unseen ones."""
    paired, tests = {}, []
    for target in comparison.targets:
        if all(target in run for run in (*ours, *theirs)):
            paired[target] = pair_faces([run[target] for run in ours], [run[target] for run in theirs])
            tests.append(_judge(row, reference, target, [paired[target]]))
    adjusted = holm([test.difference.p for test in tests])
    yield from (replace(test, adjusted_p=p) for test, p in zip(tests, adjusted, strict=True))
    unseen = [target for target in comparison.targets if target != row.source]
    if len(unseen) > 1 and all(target in paired for target in unseen):
        yield _judge(row, reference, "", [paired[target] for target in unseen])


def _judge(row: Row, reference: Row, target: str, paired: list[PairedFaces]) -> Paired:
    difference = paired_bootstrap([faces.ours.mean(axis=0) - faces.theirs.mean(axis=0) for faces in paired])
    one = np.mean([faces.ours.mean(axis=1) for faces in paired], axis=0)  # (seeds,)
    other = np.mean([faces.theirs.mean(axis=1) for faces in paired], axis=0)
    apart = bool(one.min() > other.max() or one.max() < other.min()) if min(len(one), len(other)) > 1 else None
    return Paired(row, reference, target, difference, sum(faces.left_out for faces in paired), apart)


@dataclass(frozen=True)
class PairedFaces:
    """Whether each seed (S, n) of two methods was right on each face all of them judged; how many faces that leaves out."""

    ours: np.ndarray
    theirs: np.ndarray
    left_out: int


def pair_faces(one: Sequence[Predictions], other: Sequence[Predictions]) -> PairedFaces:
    """Join the predictions of two methods on one target by sample.

    Raises `UserError` when the runs share no face or disagree on a label: then they were judged on different manifests.
    """
    runs = [*one, *other]
    positions = [{sample: row for row, sample in enumerate(run.sample_ids)} for run in runs]
    common = sorted(set(positions[0]).intersection(*positions[1:]))
    rows = [np.array([places[sample] for sample in common], dtype=int) for places in positions]
    labels = [run.labels[chosen] for run, chosen in zip(runs, rows, strict=True)]
    for run, theirs in zip(runs, labels, strict=True):
        if not common or (theirs != labels[0]).any():
            first, second = (what.about.get("run", "a run") for what in (runs[0], run))
            raise UserError(
                f"The runs {first} and {second} were judged on different faces or labels of {run.about.get('target')!r}: "
                "judge both again with `cafe evaluate RUN`."
            )
    correct = np.array([run.predicted[chosen] == labels[0] for run, chosen in zip(runs, rows, strict=True)])
    return PairedFaces(correct[: len(one)], correct[len(one) :], len(set().union(*positions)) - len(common))


def _load(workspace: Workspace, row: Row, protocol: str) -> list[dict[str, Predictions]]:
    loaded = [load_predictions(workspace.run_path(run.name), protocol) for run in row.runs]
    for run, predictions in zip(row.runs, loaded, strict=True):
        if not predictions:
            raise UserError(
                f"Paired tests need the predictions of every run, and {workspace.root} has none of {run.name}: give the "
                "workspace it was made in with -w, or leave --versus out."
            )
    return loaded


@dataclass(frozen=True)
class Ranks:
    """Methods with their mean ranks over all unseen targets of all sources, the best first."""

    labels: tuple[str, ...]
    ranking: Ranking
    left_out: tuple[str, ...]  # methods that were not trained on every source, or peeked


def rank(comparison: Comparison) -> Ranks | None:
    """Rank the methods that were trained on every source; None where there is nothing to rank."""
    rows = {(row.source, row.label): row for row in comparison.rows if not row.peeked}
    sources = {row.source for row in comparison.rows}
    everybody = {row.label for row in comparison.rows}
    labels = sorted(label for label in everybody if all((source, label) in rows for source in sources))
    columns = [
        [rows[source, label].targets[target].mean for label in labels]
        for source in sorted(sources)
        for target in comparison.targets
        if target != source
    ]
    scores = np.array([column for column in columns if not np.isnan(column).any()]).T  # (methods, targets)
    if len(labels) < 2 or scores.size == 0:
        return None
    ranking = rank_methods(scores)
    order = np.argsort(ranking.ranks, kind="stable")
    ordered = replace(ranking, ranks=tuple(ranking.ranks[place] for place in order))
    return Ranks(tuple(labels[place] for place in order), ordered, tuple(sorted(everybody - set(labels))))


@dataclass(frozen=True)
class Published:
    """The published numbers (0–1) of a row by target, its two means where all of it is there, and how the row differs."""

    targets: dict[str, float]
    unseen: float
    everything: float
    differences: tuple[str, ...]


def find_published_rows(workspace: Workspace, comparison: Comparison) -> list[Published | None]:
    """Return for each row the published numbers that were judged alike; None without any or without the run."""
    known = comparison.metric == "accuracy"
    return [
        _published(workspace, row, comparison) if known and row.method in ACCURACY else None for row in comparison.rows
    ]


def _published(workspace: Workspace, row: Row, comparison: Comparison) -> Published | None:
    kinds = find_kinds(workspace, row, comparison.protocol)
    source_kind = kinds.get("", "")
    protocol = find_protocol(comparison.protocol)
    numbers = find_published(row.method, source_kind, row.runs[0].params.get("init", ""), protocol)
    targets = {name: numbers[kinds[name]] for name in comparison.targets if kinds.get(name) in numbers}
    if not targets:
        return None
    unseen = [name for name in comparison.targets if name != row.source]
    same_sets = sorted(kinds.get(name, "") for name in unseen) == sorted({*SETS} - {source_kind})
    same_source = row.source in targets and kinds[row.source] == source_kind
    return Published(
        targets,
        float(np.mean([targets[name] for name in unseen])) if same_sets and {*unseen} <= {*targets} else math.nan,
        float(np.mean(list(targets.values()))) if same_sets and same_source and len(targets) == len(SETS) else math.nan,
        find_differences(row, source_kind),
    )


def find_published_class_rows(
    workspace: Workspace, rows: list[ClassRow], target: str, protocol: str
) -> list[dict[str, float]]:
    """Return for each row the published recalls (0–1) by expression, with `overall` and `mean`; empty without any."""
    published = []
    for row in rows:
        kinds = find_kinds(workspace, row, protocol) if row.method in ACCURACY else {}
        published.append(
            find_published_classes(
                row.method, kinds.get("", ""), kinds.get(target, ""), row.runs[0].params.get("init", ""),
                find_protocol(protocol),
            )
        )  # fmt: skip
    return published


def find_kinds(workspace: Workspace, row: Group, protocol: str) -> dict[str, str]:
    """Return the kind of data set of each target, as it was judged, and of the source under the empty name."""
    run = workspace.run_path(row.runs[0].name)
    record = read_json(run / "run.json") or {}
    judged = load_predictions(run, protocol)
    kinds = {target: predictions.about.get("kind", "") for target, predictions in judged.items()}
    return {"": record.get("source_kind", ""), **kinds}


def is_elsewhere(workspace: Workspace, row: Group) -> bool:
    """Whether a row's runs were made in another workspace: then it is not known of which data sets they are."""
    return not (workspace.run_path(row.runs[0].name) / "run.json").exists()


def find_differences(row: Group, source_kind: str) -> tuple[str, ...]:
    """Return the settings in which a row is not what was published, as `key=value`."""
    params, method = row.runs[0].params, METHODS.get(row.method)
    recipe = asdict(method.published_recipe(source_kind)) if method else {}
    wanted = AS_PUBLISHED | {f"recipe.{name}": str(value) for name, value in recipe.items()}
    if row.method == "cafe":
        wanted |= {"backbone": "clip-vit-b32"}
    changed = [
        f"{name.removeprefix('recipe.')}={params[name]}"
        for name, value in wanted.items()
        if name in params and params[name].partition("@")[0] != value
    ]
    return (*changed, "init=imagenet") if params.get("init") == "imagenet" else tuple(changed)
