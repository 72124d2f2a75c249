"""What MLflow shows of the workspace: a page for each run and benchmark, and the row of a comparison a run belongs to.

Nothing here talks to a server; `mirror` brings one to these pages.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from upath import UPath

from cafe import __version__
from cafe.files import list_files, list_folder, read_file, read_json
from cafe.pipeline.workspace import Workspace
from cafe.records import digest
from cafe.results.columns import Column
from cafe.results.comparison import name_rows
from cafe.results.metrics import METRICS
from cafe.results.protocols import ALL_PROTOCOLS
from cafe.results.runs import Run, list_epochs, read_epoch
from cafe.results.scores import describe_left_out, flatten_scores, meet, read_scores
from cafe.results.sources import SOURCE

NOTE = "mlflow.note.content"  # a tag: what MLflow shows as description
ROW = "cafe.row"  # a tag: the row of a comparison that a run belongs to
RECORDS = ("run.json", "made.json", "status.json")  # what a run's page is made of: these,
FOLDERS = ("epochs", "predictions", "figures")  # and what is in these folders
CODE = __version__  # whose pages these are
RESTING = ("unseen/accuracy.low", "unseen/accuracy.high", "unseen/largest")  # what a mean over unseen targets rests on
LEAST_WIDTH, LETTER, ICONS = 100, 8, 48  # pixels of a column in MLflow's list, a letter, and what stands beside a name
BENCHMARK = "benchmark"  # the row of the runs that hold the table and the page of a benchmark


@dataclass(frozen=True)
class Input:
    """A data set as MLflow lists it: what it was used for, its name and digest, and as JSON where it is and its counts."""

    context: str  # training, validation or test
    name: str
    digest: str
    source: str
    profile: str


@dataclass(frozen=True)
class Page:
    """What MLflow shows of one run or benchmark."""

    name: str
    status: str
    params: Mapping[str, Any]
    points: Mapping[tuple[str, int], float]  # by metric and step
    tags: Mapping[str, str]
    files: Mapping[str, UPath]  # by artifact
    inputs: tuple[Input, ...] = ()
    parent: str | None = None  # the benchmark it belongs to
    started: int | None = None  # milliseconds since 1970
    ended: int | None = None
    about: str = ""  # of a benchmark: what it is, in words


def digest_run(manifests: Mapping[str, str], folder: UPath) -> str:
    """Name all that the page of a run is made of, without making it; `manifests` are the digests by name."""
    below = (path for name in FOLDERS for path in list_files(folder / name))
    return digest_of(dict(manifests), _digest_files(folder, [*(folder / name for name in RECORDS), *below]))


def digest_benchmark(folder: UPath) -> str:
    """Name all that the page of a benchmark is made of, without making it."""
    return digest_of(_digest_files(folder, list_folder(folder)))


def digest_of(*parts: object) -> str:
    """Name what a page is made of by this version of the program."""
    return digest(json.dumps([CODE, *parts], sort_keys=True).encode())[:32]


def _digest_files(folder: UPath, paths: Iterable[UPath]) -> dict[str, str]:
    """Return the digest of each file there is."""
    digests: dict[str, str] = {}
    for path in paths:
        with suppress(FileNotFoundError):
            digests[str(path.relative_to(folder))] = digest(read_file(path))
    return digests


def describe_run(
    workspace: Workspace, manifests: Mapping[str, str], run: Run, benchmark: str | None, status: str | None
) -> Page:
    """Return what MLflow is to show of a run: its settings, epochs, scores, figures and predictions.

    When it began and ended is in a record of its own; of runs of older versions nobody knows, since files that were copied
    have other times.
    """
    met = meet([run], manifests)
    scores = read_scores(met.runs, manifests)
    ended = read_json(run.folder / "status.json") or {}
    reason = ended.get("reason", "") if status in (None, ended.get("status")) else ""
    points = {
        (name, epoch): value
        for epoch, path in list_epochs(run.folder).items()
        for name, value in read_epoch(path).items()
    }
    points |= {(name, 0): value for name, value in flatten_scores(scores).items()}
    protocols = [name for name in ALL_PROTOCOLS if (scores["protocol"] == name).any()]
    files = {"run.json": run.folder / "run.json"}
    for folder in ("predictions", "figures"):
        paths = (path for path in list_files(run.folder / folder) if path.suffix in (".parquet", ".png"))
        # Figures lie at the top, by their kind.
        files |= {str(path.relative_to(run.folder)).removeprefix("figures/"): path for path in paths}
    tags = {
        "cafe.group": run.group,
        "cafe.protocols": ", ".join(protocols),
        "cafe.reason": reason,
        **describe_code(made := read_json(run.folder / "made.json") or {}, run.derived.get("code", "")),
    }
    tags[NOTE] = "\n\n".join([describe_scores(run, scores), *describe_left_out(met.left_out)])
    status = status or ended.get("status", "RUNNING")
    params = {"source": run.source, **run.settings, **run.derived}
    inputs = tuple(describe_inputs(workspace, run, scores))
    return Page(run.name, status, params, points, tags, files, inputs, benchmark, *_list_times(made))


def _list_times(made: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """Return when something began and ended, in milliseconds since 1970."""
    started, ended = (round(1000 * made[name]) if name in made else None for name in ("started", "ended"))
    return started, ended


def describe_scores(run: Run, scores: pd.DataFrame) -> str:
    """Return a run in a sentence, and for each protocol by which it was evaluated its accuracy on all targets."""
    sentences = [
        f"`{run.method}` trained on {run.source_title} with seed {run.seed}; evaluated epoch: {run.selection}."
    ]
    for protocol, own in scores.groupby("protocol", sort=False):
        shares = (f"{row.target} {100 * row.accuracy:.1f} % ({row.relation})" for row in own.itertuples())
        sentences.append(f"Accuracy by the protocol {protocol}: {', '.join(shares)}.")
    return "\n\n".join(sentences)


def describe_code(made: Mapping[str, Any], code: str) -> dict[str, str]:
    """Return what MLflow shows as source and version of a run: the command that began it, and its commit or release."""
    tags = {"mlflow.source.name": made.get("command") or "cafe", "mlflow.source.type": "LOCAL"}
    released = " " in code  # `cafe 0.1.0`: no commit is known
    return tags | ({"cafe.version": code} if released else {"mlflow.source.git.commit": code} if code else {})


def describe_inputs(workspace: Workspace, run: Run, scores: pd.DataFrame) -> Iterator[Input]:
    """Yield the data sets of a run: the sources it was trained on, what was held out of them, and the targets as tests."""
    for source in run.sources:
        yield _describe_input(workspace, "training", Column(source.name), source.digest, "train")
        if run.selection == "source_val":  # a data set that is shown twice needs two names
            yield _describe_input(workspace, "validation", Column(source.name, "val"), source.digest, "val")
    targets = {(row.column, row.manifest, row.split) for row in scores.itertuples() if row.relation != SOURCE}
    shown = {(column.name, manifest, split): column for column, manifest, split in targets}
    for (_, manifest, split), column in sorted(shown.items()):
        yield _describe_input(workspace, "test", column, manifest, split)


def _describe_input(workspace: Workspace, context: str, column: Column, digest: str, split: str) -> Input:
    counts: dict[str, Any] = {"split": split}
    if manifest := workspace.find_manifest(column.target, digest):
        labels = manifest.labels if split == "all" else manifest.labels[manifest.rows(split)]
        counts |= {"faces": len(labels)}
        counts |= dict(
            zip(manifest.classes, np.bincount(labels, minlength=len(manifest.classes)).tolist(), strict=True)
        )
    source = json.dumps({"uri": str(workspace.manifest_path(column.target))})
    return Input(context, column.name, digest[:32], source, json.dumps(counts))


def describe_benchmark(folder: UPath, status: str | None) -> Page:
    """Return what MLflow is to show of a benchmark: its file, the end of every cell, and the comparison of its runs."""
    files = {path.name: path for path in list_folder(folder) if path.suffix in (".json", ".md", ".html")}
    cells = json.loads(files["cells.json"].read_bytes()) if "cells.json" in files else []
    failed = sum(bool(cell["failure"]) for cell in cells)
    points = {("cells", 0): float(len(cells)), ("cells_failed", 0): float(failed)}
    record = read_json(folder / "benchmark.json") or {}
    params = {
        name: value if isinstance(value, str | int | float) else json.dumps(value) for name, value in record.items()
    }
    status = status or ("FAILED" if failed else "FINISHED" if cells else "RUNNING")
    note = f"{record.get('about') or record.get('name', folder.name)}. The table is `comparison.md`, the page `report.html`."
    made = read_json(folder / "made.json") or {}
    tags = {"cafe.benchmark": folder.name, NOTE: note, **describe_code(made, "")}
    started, ended = _list_times(made)
    about = str(record.get("about") or "")
    return Page(folder.name, status, params, points, tags, files, started=started, ended=ended, about=about)


def describe_experiment(name: str, about: str = "") -> str:
    """Return what MLflow shows as the description of an experiment."""
    title = f"**{about.rstrip('.')}.** " if about else ""
    return (
        f"{title}Each run is one method, trained on one source with one seed and evaluated on all targets. Accuracies are "
        "from 0 to 1; `unseen/` is the mean over targets that are not of the source. Runs of one tag `cafe.row` differ in "
        f"their seed alone. `cafe compare --experiment {name}` has the table with intervals and tests, `cafe report {name}`"
        " the page with mistakes and masks."
    )


def describe_view(metrics: Iterable[str]) -> str:
    """Return how MLflow's list of an experiment's runs is to look, as its page reads it: in rows of the same tag `ROW`.

    `metrics` are the names of those the runs have. The columns stand in the order of a comparison, the mean over unseen
    targets with its interval and chance before the targets, and are as wide as their names.
    """
    known = set(metrics)
    unseen = ["unseen/accuracy", *(name for name in RESTING if name in known)]
    targets = sorted(name for name in known if re.fullmatch(r"target/[^/]+/accuracy", name))
    names = {f"params.`{name}`": name for name in ("method", "source", "seed")}
    names |= {f"metrics.`{name}`": name for name in (*unseen, *targets)}
    grouped = {"aggregateFunction": "average", "groupByKeys": [{"mode": "tag", "groupByData": ROW}]}
    view = {
        "orderByKey": "metrics.`unseen/accuracy`",
        "orderByAsc": False,
        "groupBy": grouped,
        "selectedColumns": list(names),
        "columnOrder": list(names),
        "columnWidths": {column: max(LEAST_WIDTH, LETTER * len(name) + ICONS) for column, name in names.items()},
    }
    return json.dumps(view)


def list_model_scores(scores: pd.DataFrame) -> Iterator[tuple[str, float, str, str]]:
    """Yield each metric of each target with its name, its value, and the name and digest of the data set it is of."""
    for record in scores.to_dict("records"):
        for name in METRICS:
            if not math.isnan(record[name]):
                column = record["column"]
                yield column.metric(name), float(record[name]), column.name, record["manifest"][:32]


def name_rows_of(runs: Sequence[Run]) -> dict[str, str]:
    """Return for each run, by name, the label of its row in a comparison of these runs, with its source where they differ.

    The label stands first: MLflow shows the beginning of long names.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.group, []).append(run)
    labels = zip(groups.values(), name_rows(list(groups.values())), strict=True)
    several = len({run.source_title for run in runs}) > 1
    return {
        run.name: f"{label} from {run.source_title}" if several else label for group, label in labels for run in group
    }
