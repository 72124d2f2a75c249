"""The one table of scores: every run on every target by every protocol, computed from the predictions in the run folders.

Comparisons, tests, tracked metrics and pages all read this table; leaving out faces or targets is a filter on what goes in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

import pandas as pd
from upath import UPath

from cafe.data.expressions import EXPRESSIONS
from cafe.errors import UserError
from cafe.files import exists, list_folder, read_json
from cafe.records import FORMAT
from cafe.results.metrics import METRICS, score
from cafe.results.predictions import Predictions, average, load_predictions
from cafe.results.protocols import ALL_PROTOCOLS, OPTIONS, find_protocol, name_protocol
from cafe.results.sources import ALL_BUT_TARGET, SOURCE, UNKNOWN, UNSEEN, Source, find_relation

PULLED = "pulled.json"  # says of a run folder that it came from a tracking server
RECALLS = tuple(f"recall/{name}" for name in EXPRESSIONS)
COLUMNS = (
    "run", "group", "source", "method", "seed", "protocol", "target", "split", "kind", "manifest", "relation", "unseen",
    "faces", "left_out", *METRICS, *RECALLS,
)  # fmt: skip

# What run.json says of a run.
DESCRIBED = ("name", "group", "source", "method", "seed", "selection", "settings", "derived")

Filter = Callable[["Run", str, Predictions], Predictions]


@dataclass(frozen=True)
class Run:
    """A run as its folder describes it: what it was trained on and how.

    `settings` holds what a user can choose, `derived` what only follows from that; `experiments` gives for each experiment
    the benchmark it belongs to there, or None. `test_time` and `ensemble` are set where it is judged otherwise than by
    itself (`cafe.results.variants`).
    """

    folder: UPath
    name: str
    group: str
    source: str  # `a+b` where there are several
    sources: tuple[Source, ...]
    fold: str  # in leave-one-domain-out, the domain left out, on which alone it is judged
    method: str
    seed: int
    selection: str
    settings: dict[str, Any]
    derived: dict[str, Any]
    not_as_published: tuple[str, ...]
    experiments: dict[str, str | None]
    pulled: bool  # from a tracking server: it was judged on the manifests of another workspace
    test_time: str = ""  # the option with which it was judged
    ensemble: tuple[Run, ...] = ()  # the runs whose mean it is

    @property
    def trained_on(self) -> str:
        """What tables call its source: `all but target` for all folds of leave-one-domain-out."""
        return ALL_BUT_TARGET if self.fold else self.source

    def judges(self, target: str) -> bool:
        """Whether a table shows what this run says of a target: a fold counts for the domain it leaves out alone."""
        return self.fold in ("", target)

    def load_predictions(self, protocol: str, named: bool = True) -> dict[str, Predictions]:
        """Return what it predicted by a protocol, by target; of an ensemble, the mean where all of it judged a target."""
        if not self.ensemble:
            option = self.test_time if self.test_time in OPTIONS else None
            return load_predictions(self.folder, name_protocol(protocol, option), named)
        judged = [run.load_predictions(protocol) for run in self.ensemble]
        return {
            target: average([one[target] for one in judged])
            for target in judged[0]
            if all(target in one for one in judged)
        }

    def relation(self, target: str, kind: str, manifest: str) -> str:
        """Return what a target, with the kind and the digest of its manifest, is to this run."""
        return find_relation(self.sources, target, kind, manifest)


def read_runs(folders: Iterable[UPath]) -> list[Run]:
    """Read the runs of folders, leaving out those without a run; raise `UserError` for a run of another version."""
    runs = (read_run(folder) for folder in folders)
    return [run for run in runs if run is not None]


def read_run(folder: UPath) -> Run | None:
    """Read a run's description; None when the folder holds none. Raises `UserError` when its version is another."""
    record = read_json(folder / "run.json")
    if record is None:
        return None
    if record.get("version") != FORMAT:
        raise UserError(
            f"The run in {folder} has version {record.get('version', 1)} of run.json, and this program reads version "
            f"{FORMAT}: move the run out of the workspace, and train it again."
        )
    described = {name: record[name] for name in DESCRIBED if name in record}
    if missing := [name for name in DESCRIBED if name not in described]:
        raise UserError(f"{folder}/run.json has no {missing[0]!r}: it was changed by hand; train the run again.")
    deviations = record.get("not_as_published")
    experiments = {path.stem: read_json(path) or {} for path in list_folder(folder / "experiments")}
    alone = {"name": record["source"], "kind": record.get("source_kind"), "digest": record.get("source_digest")}
    sources = record.get("sources") or [alone]
    if not isinstance(sources, list) or not all(
        isinstance(one, dict) and one.keys() == alone.keys() for one in sources
    ):
        raise UserError(
            f"{folder}/run.json lists its sources in no known form: it was changed by hand; train the run again."
        )
    return Run(
        folder,
        **described,
        fold=record.get("fold", ""),
        sources=tuple(Source(**source) for source in sources),
        not_as_published=tuple(deviations) if isinstance(deviations, list) else (),
        experiments={name: member.get("benchmark") for name, member in experiments.items()},
        pulled=exists(folder / PULLED),
    )


def read_scores(
    runs: Iterable[Run],
    known: Collection[str] = (),
    protocols: Iterable[str] = ALL_PROTOCOLS,
    leave_out: Filter | None = None,
) -> pd.DataFrame:
    """Return one record per run, protocol and target, computed from the predictions.

    Columns: run, group, source, method, seed, protocol, target, split, kind, manifest, relation, unseen, faces, left_out,
    accuracy, mean_class_accuracy, macro_f1, ece and recall/EXPRESSION (0–1; NaN where there is nothing to average).
    `known` names the manifests of the workspace: predictions for any other target have the relation `unknown`, unless there
    are none at all or the run was pulled from elsewhere. `leave_out` may take faces out of predictions.
    """
    records = []
    for run in runs:
        there = {path.name for path in list_folder(run.folder / "predictions")}
        for protocol in protocols:
            if find_protocol(protocol).prefix.rstrip("/") not in {"", *there}:
                continue
            for target, predictions in run.load_predictions(protocol, named=leave_out is not None).items():
                kept = leave_out(run, target, predictions) if leave_out else predictions
                about = {name: predictions.about.get(name, "") for name in ("split", "kind", "manifest")}
                missing = known and not run.pulled and target.partition("@")[0] not in known
                relation = UNKNOWN if missing else run.relation(target, about["kind"], about["manifest"])
                records.append({
                    "run": run.name, "group": run.group, "source": run.source, "method": run.method, "seed": run.seed,
                    "protocol": protocol, "target": target, **about, "relation": relation, "unseen": relation == UNSEEN,
                    "faces": len(kept.labels), "left_out": len(predictions.labels) - len(kept.labels),
                    **(score(kept) if len(kept.labels) else {}),
                })  # fmt: skip
    return pd.DataFrame(records, columns=COLUMNS)


def average_unseen(scores: pd.DataFrame) -> pd.DataFrame:
    """Return for each run and protocol (the index) the mean of each metric over its unseen targets."""
    return _average(scores[scores["relation"] == UNSEEN])


def average_all(scores: pd.DataFrame) -> pd.DataFrame:
    """Return the same over the unseen targets and the sources, as published tables do, for runs judged on all of these."""
    keys = [scores["run"], scores["protocol"]]
    judged = (scores["relation"] == SOURCE).groupby(keys).transform("sum")
    complete = judged == scores["source"].astype(str).str.count(r"\+") + 1
    return _average(scores[complete & scores["relation"].isin([SOURCE, UNSEEN])])


def _average(scores: pd.DataFrame) -> pd.DataFrame:
    # A target of which no face is left leaves no mean, instead of one over the other targets.
    return scores.groupby(["run", "protocol"], sort=False)[list(METRICS)].agg(lambda values: values.mean(skipna=False))


def flatten_scores(scores: pd.DataFrame) -> dict[str, float]:
    """Return one run's scores by flat names: target/TARGET/METRIC, unseen/METRIC and all/METRIC.

    Those of another protocol than `clean` have its name in front, and `target@split` becomes `target:split`.
    """
    named: dict[str, float] = {}
    for record in scores.to_dict("records"):
        prefix = f"{find_protocol(record['protocol']).prefix}target/{record['target'].replace('@', ':')}"
        named |= {f"{prefix}/{name}": record[name] for name in (*METRICS, *RECALLS)}
    for group, means in (("unseen", average_unseen(scores)), ("all", average_all(scores))):
        for (_, protocol), values in means.iterrows():
            named |= {f"{find_protocol(protocol).prefix}{group}/{name}": values[name] for name in METRICS}
    return {name: float(value) for name, value in named.items() if not math.isnan(value)}
