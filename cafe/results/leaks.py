"""Copies of a source's training faces in a target, as `cafe data audit` found them: left out by filtering predictions."""

from __future__ import annotations

import json

import pyarrow as pa
from upath import UPath

from cafe.errors import UserError
from cafe.files import exists, place_below
from cafe.results.columns import Column
from cafe.results.predictions import Predictions
from cafe.results.runs import Run
from cafe.results.scores import Filter
from cafe.seals import damaged, read_table


def audit_path(root: UPath, source: str, target: str) -> UPath:
    """Where the audit of a target against a source is kept in the workspace at `root`."""
    return place_below(root / "audits", f"{source}/{target}.parquet")


def audit_command(source: str, target: str) -> str:
    """Return the command that audits a target against a source."""
    return f"cafe data audit {source}" + (f" {target}" if target != source else "")


def load_leaks(root: UPath, source: str, source_digest: str, target: str, target_digest: str) -> frozenset[str]:
    """Return the samples of a target that are copies of the source's training faces.

    Raises `UserError` when the target was not audited, or other manifests than those with the digests were.
    """
    path = audit_path(root, source, target)
    if not exists(path):
        raise UserError(f"{target!r} was not audited against {source!r} yet: run `{audit_command(source, target)}`.")
    remedy = f"run `{audit_command(source, target)}` again"
    try:
        table = read_table(path, remedy)
        about = json.loads(table.schema.metadata[b"cafe.audit"])
        digests = {name: about[f"{name}_digest"] for name in ("source", "target")}
        splits, samples = (table[name].to_pylist() for name in ("source_split", "target_sample_id"))
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError):
        raise damaged(path, remedy) from None
    for name, digest, audited in (
        (source, source_digest, digests["source"]),
        (target, target_digest, digests["target"]),
    ):
        if digest != audited:
            raise UserError(
                f"The audit of {target!r} against {source!r} read another version of {name!r} than the run did: run "
                f"`{audit_command(source, target)}`, and train or evaluate again if its files changed."
            )
    return frozenset(sample for sample, split in zip(samples, splits, strict=True) if split == "train")


def leave_out_leaks(root: UPath) -> Filter:
    """Return the filter that takes copies of the source's training faces out of predictions."""

    def leave_out(run: Run, column: Column, predictions: Predictions) -> Predictions:
        digest = predictions.about.get("manifest", "")
        found = [load_leaks(root, source.name, source.digest, column.target, digest) for source in run.sources]
        return predictions.without(frozenset().union(*found))

    return leave_out
