"""What there is to predict with: the models that ship, those exported into the workspace, and its trained runs."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from upath import UPath

from cafe.errors import UserError
from cafe.files import list_folder, read_json
from cafe.pipeline.release.shipped import is_export, shipped_models
from cafe.pipeline.runs import read_model, read_status
from cafe.pipeline.workspace import Workspace
from cafe.results.runs import Run, list_epochs
from cafe.results.scores import average_unseen, meet, read_scores
from cafe.results.sources import SOURCE

ACCURACY = "accuracy"
SHIPS, EXPORTED, TRAINED = "ships", "exported", "run"


def list_models(workspace: Workspace) -> list[dict[str, Any]]:
    """Return a record for each model: its name, where it is from, method, source and accuracies from 0 to 1.

    `at_home` is the accuracy on its source (the mean, of several), `unseen` the mean over targets of other sets, both by the
    protocol `clean`; None where it was not evaluated there. What cannot be read is left out, with a warning.
    """
    records = [_describe(name, SHIPS, folder) for name, folder in shipped_models().items()]
    exports = (folder for folder in list_folder(workspace.root / "exports") if is_export(folder))
    records += [_describe(str(folder), EXPORTED, folder) for folder in exports]
    return [record for record in records if record] + list(_describe_runs(workspace))


def _describe(name: str, kind: str, folder: UPath) -> dict[str, Any]:
    """Return the record of an exported folder, an empty one where it cannot be read."""
    try:
        about = read_model(folder)
    except UserError as error:
        logging.getLogger(__name__).warning("A model is left out: %s", error)
        return {}
    origin, scores = about.get("origin", {}), about.get("scores", {})
    seeds = (about.get("averaged") or {}).get("seeds") or [origin.get("seed")]
    return _record(name, kind, origin.get("method"), origin.get("source"), seeds, _home(origin, scores), scores)


def _home(origin: Mapping[str, Any], scores: Mapping[str, float]) -> float | None:
    names = str(origin.get("source", "")).split("+")
    found = [scores.get(f"target/{name}/{ACCURACY}") for name in names]
    return sum(found) / len(found) if found and None not in found else None  # type: ignore[arg-type]


def _record(
    name: str, kind: str, method: Any, source: Any, seeds: Any, home: float | None, scores: Mapping[str, float]
) -> dict[str, Any]:
    return {
        "model": name, "is": kind, "method": method, "source": source, "seeds": seeds,
        "at_home": home, "unseen": scores.get(f"unseen/{ACCURACY}"),
    }  # fmt: skip


def _describe_runs(workspace: Workspace) -> Iterator[dict[str, Any]]:
    """Yield the record of every run that is trained to its end."""
    runs = [run for run in workspace.read_runs() if run.finished]
    for run, (home, unseen) in zip(runs, score_runs(workspace, runs), strict=True):
        scores = {} if unseen is None else {f"unseen/{ACCURACY}": unseen}
        yield _record(run.name, TRAINED, run.method, run.source, [run.seed], home, scores)


def list_runs(workspace: Workspace) -> list[dict[str, Any]]:
    """Return a record for each run of a workspace: what it is, how far, when it ended, and its accuracies from 0 to 1.

    What is not known is None, as the time of runs that older versions made. A run is listed whatever became of its
    predictions; where some cannot be read, a warning says so, and no run has accuracies.
    """
    runs = workspace.read_runs()
    try:
        scores = score_runs(workspace, runs)
    except UserError as error:
        logging.getLogger(__name__).warning("Accuracies are not known: %s", error)
        scores = [(None, None)] * len(runs)
    records = []
    for run, (home, unseen) in zip(runs, scores, strict=True):
        planned = run.settings.get("recipe.epochs")
        ended = (read_json(run.folder / "made.json") or {}).get("ended")
        records.append({
            "run": run.name, "source": run.source, "method": run.method, "selection": run.selection,
            "status": read_status(run.folder), "experiments": sorted(run.experiments), "seed": run.seed,
            "epochs": len(list_epochs(run.folder)), "of": planned, "at_home": home, "unseen": unseen,
            "ended": datetime.fromtimestamp(ended).isoformat(" ", "minutes") if ended else None,
        })  # fmt: skip
    return records


def score_runs(workspace: Workspace, runs: Sequence[Run]) -> list[tuple[float | None, float | None]]:
    """Return for each run its accuracy on its source, the mean of several, and the mean over unseen targets, if known."""
    known = workspace.manifest_digests()
    table = read_scores(meet(runs, known).runs, known, ["clean"])
    if table.empty:
        return [(None, None)] * len(runs)
    unseen = average_unseen(table).reset_index().set_index("run")[ACCURACY]
    at_home = table[table["relation"] == SOURCE].set_index(["run", "target"])[ACCURACY]
    scored = []
    for run in runs:
        places = [(run.name, name) for name in run.source.split("+")]  # not those of a model it started from
        found = [float(at_home[place]) for place in places if place in at_home.index]
        home = sum(found) / len(found) if found and len(found) == len(places) else None
        scored.append((home, float(unseen[run.name]) if run.name in unseen else None))
    return scored
