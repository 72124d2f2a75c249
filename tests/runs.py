"""Run folders as training and evaluating leave them, without either: for all that reads them."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from typing import Any

import numpy as np
from upath import UPath

from cafe.data.expressions import EXPRESSIONS
from cafe.files import write_json
from cafe.pipeline.workspace import Workspace
from cafe.records import FORMAT
from cafe.results.columns import Column
from cafe.results.predictions import Predictions
from cafe.seals import write_sealed


def write_run(
    workspace: Workspace,
    method: str = "cafe",
    source: str = "raf",
    seed: int = 0,
    source_kind: str = "rafdb",
    experiments: dict[str, str | None] | None = None,
    not_as_published: tuple[str, ...] = (),
    sources: Sequence[tuple[str, str]] = (),
    fold: str = "",
    classes: tuple[str, ...] = (),
    **settings: Any,
) -> UPath:
    """Write a run's description; `settings` are those it does not share with all others. Returns its folder.

    `sources` are names and kinds where there are several; the runs of a `fold` each belong to one row. Runs
    from before there were other `classes` do not say theirs.
    """
    chosen = {
        "method": method, "network": "resnet18", "init": "file:msceleb.pth", "selection": "final",
        "backbone": "clip-vit-b32", "view_seed": 0, "tag": "",
    } | settings  # fmt: skip
    group = sha256(repr(["" if fold else source, sorted(chosen.items()), *classes]).encode()).hexdigest()[:8]
    folder = workspace.run_path(f"{method}-{source}-s{seed}-{group}")
    named = [{"name": name, "kind": kind, "digest": f"digest of {name}"} for name, kind in sources]
    record = {
        "version": FORMAT, "name": folder.name, "group": group, "source": source, "source_kind": source_kind,
        "source_digest": f"digest of {source}", "method": method, "seed": seed, "selection": chosen["selection"],
        "sources": named, "fold": fold,
        "settings": {**chosen, "seed": seed}, "derived": {"width": 512, "store": "0a1b2c3d"},
        "not_as_published": list(not_as_published), "spec": {},
    }  # fmt: skip
    write_sealed(folder / "run.json", record | ({"classes": list(classes)} if classes else {}))
    write_json(folder / "status.json", {"status": "FINISHED", "reason": ""})
    for name, benchmark in (experiments or {"cafe": None}).items():
        write_json(folder / "experiments" / f"{name}.json", {"benchmark": benchmark})
    return folder


def write_predictions(
    run: UPath,
    target: str,
    labels: np.ndarray,
    predicted: np.ndarray,
    protocol: str = "clean",
    kind: str = "folder",
    manifest: str = "",
    groups: list[str | None] | None = None,
    confidence: float = 1.0,
    classes: tuple[str, ...] = EXPRESSIONS,
    **about: str,
) -> Predictions:
    """Write what a run predicted for a target, its confidence in each class it chose being `confidence`."""
    probabilities = np.full((len(labels), len(classes)), (1 - confidence) / (len(classes) - 1), np.float32)
    probabilities[np.arange(len(labels)), predicted] = confidence
    about = {"split": "test", **about, "run": run.name, "target": target, "protocol": protocol, "kind": kind}
    about["manifest"] = manifest or f"digest of {target}"
    ids = [f"{row:05d}.jpg" for row in range(len(labels))]
    predictions = Predictions(ids, np.asarray(labels), probabilities, about, groups, classes)
    predictions.save(Column.parse(target, protocol).predictions(run))
    return predictions
