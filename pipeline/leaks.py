"""What a target shares with the training faces of a source, as `cafe data audit` found it, and the numbers without it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from upath import UPath

from cafe.errors import UserError
from cafe.results.metrics import score
from cafe.results.predictions import Predictions, load_predictions
from cafe.results.protocols import find_protocol
from pipeline.runs import RunSpec
from pipeline.tracking import TrackedRun
from pipeline.workspace import Workspace

MEANS = ("accuracy", "mean_class_accuracy", "macro_f1")


def audit_path(workspace: Workspace, source: str, target: str) -> UPath:
    """Where the audit of a target against a source is kept."""
    return workspace.root / "audits" / source / f"{target}.parquet"


@dataclass(frozen=True)
class Leaks:
    """The samples of a target that are copies of the source's training faces, and of which manifests that holds."""

    samples: frozenset[str]
    source_digest: str
    target_digest: str

    @classmethod
    def load(cls, workspace: Workspace, source: str, target: str) -> Leaks:
        """Read an audit; raise `UserError` when there is none."""
        path = audit_path(workspace, source, target)
        if not path.exists():
            raise UserError(
                f"{target!r} was not audited against {source!r} yet: run `{audit_command(source, target)}`."
            )
        table = pq.read_table(pa.BufferReader(path.read_bytes()))
        about = json.loads(table.schema.metadata[b"cafe.audit"])
        splits, samples = (table[name].to_pylist() for name in ("source_split", "target_sample_id"))
        leaking = (sample for sample, split in zip(samples, splits, strict=True) if split == "train")
        return cls(frozenset(leaking), about["source_digest"], about["target_digest"])


def audit_command(source: str, target: str) -> str:
    """Return the command that audits a target against a source."""
    return f"cafe data audit {source}" + (f" {target}" if target != source else "")


def load_leaks(workspace: Workspace, spec: RunSpec, digests: Mapping[str, str]) -> dict[str, Leaks]:
    """Return the leaks of targets {name: digest of its manifest} into a run's training.

    Raises `UserError` when an audit is missing or was made of other manifests.
    """
    found = {}
    for target, digest in digests.items():
        leaks = Leaks.load(workspace, spec.source, target)
        changed = [
            name
            for name, now, then in (
                (spec.source, spec.source_digest, leaks.source_digest),
                (target, digest, leaks.target_digest),
            )
            if now != then
        ]
        if changed:
            raise UserError(
                f"The audit of {target!r} against {spec.source!r} was made of another {changed[0]!r} than the run "
                f"{spec.name!r} knows: run `{audit_command(spec.source, target)}`, and train or evaluate again if its "
                "files changed."
            )
        found[target] = leaks
    return found


def leave_out(predictions: Predictions, leaks: Leaks) -> Predictions:
    """Return the predictions of the samples that do not leak."""
    kept = np.array([sample not in leaks.samples for sample in predictions.sample_ids], dtype=bool)
    samples = [sample for sample, keep in zip(predictions.sample_ids, kept, strict=True) if keep]
    return replace(
        predictions,
        sample_ids=samples,
        labels=predictions.labels[kept],
        probabilities=predictions.probabilities[kept],
    )


def leak_free_scores(workspace: Workspace, run: UPath, protocol: str = "clean") -> dict[str, float]:
    """Return a run's metrics without leaking samples, from its predictions alone.

    leakfree/TARGET/METRIC, leakfree/TARGET/left_out (samples), and leakfree_unseen/METRIC, the mean over the test splits
    of the targets that are not the source; the name of another protocol than `clean` in front. A target of which nothing
    is left has only its count.
    """
    spec, predictions = RunSpec.load(run), load_predictions(run, protocol)
    digests = {rows.about["target"]: rows.about["manifest"] for rows in predictions.values()}
    leaks = load_leaks(workspace, spec, digests)
    scores, metrics = {}, {}
    for name, rows in predictions.items():
        remaining = leave_out(rows, leaks[rows.about["target"]])
        metrics[f"leakfree/{name}/left_out"] = float(len(rows.labels) - len(remaining.labels))
        if len(remaining.labels):
            scores[name] = score(remaining)
            metrics |= {f"leakfree/{name}/{metric}": value for metric, value in scores[name].items()}
    unseen = [name for name in predictions if "@" not in name and name != spec.source]
    if unseen and all(name in scores for name in unseen):
        metrics |= {
            f"leakfree_unseen/{metric}": float(np.mean([scores[name][metric] for name in unseen])) for metric in MEANS
        }
    prefix = find_protocol(protocol).prefix
    return {f"{prefix}{name}": value for name, value in metrics.items()}


def add_leak_free(workspace: Workspace, runs: list[TrackedRun], protocol: str = "clean") -> list[TrackedRun]:
    """Return the runs with leak-free metrics, computed from the predictions of those this workspace holds."""
    names = set(workspace.run_names())

    def further(run: TrackedRun) -> dict[str, float]:
        metrics = leak_free_scores(workspace, workspace.run_path(run.name), protocol) if run.name in names else {}
        return {name.replace("@", ":"): value for name, value in metrics.items()}  # as MLflow takes them

    return [replace(run, metrics={**run.metrics, **further(run)}) for run in runs]
