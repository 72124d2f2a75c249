"""What there is to predict with: the models that ship, those exported into the workspace, and its trained runs."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any, NamedTuple

import pandas as pd
from upath import UPath

from cafe.errors import DamagedError, UserError
from cafe.files import list_folder, read_json
from cafe.pipeline.release.shipped import is_export, shipped_models
from cafe.pipeline.runs import read_model, read_status
from cafe.pipeline.workspace import Workspace
from cafe.results.comparison import NOTHING
from cafe.results.metrics import Estimate, average_targets, estimate
from cafe.results.runs import Run, list_epochs
from cafe.results.scores import ENDS, interval_of_mean, meet, read_scores
from cafe.results.significance.statistics import combine_intervals
from cafe.results.sources import SOURCE, UNSEEN

ACCURACY = "accuracy"
SHIPS, EXPORTED, TRAINED = "ships", "exported", "run"


class Scored(NamedTuple):
    """The accuracy of a run on its source, the mean of several, and the mean over unseen targets, if known."""

    at_home: Estimate
    unseen: Estimate


UNSCORED = Scored(NOTHING, NOTHING)


def list_models(workspace: Workspace) -> list[dict[str, Any]]:
    """Return a record for each model: its name, where it is from, method, source and accuracies from 0 to 1.

    `at_home` is the accuracy on its source (the mean, of several), `unseen` the mean over targets of other sets, both by the
    protocol `clean`; None where it was not evaluated there. Beside each stand what `_flatten` names. What cannot be read is
    left out, with a warning.
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
    origin = about.get("origin", {})
    seeds = (about.get("averaged") or {}).get("seeds") or [origin.get("seed")]
    scored = _read_scored(str(origin.get("source", "")).split("+"), about.get("scores", {}))
    return _record(name, kind, origin.get("method"), origin.get("source"), seeds, scored)


def _read_scored(sources: Collection[str], scores: Mapping[str, float]) -> Scored:
    """Return what the flat scores of an export say.

    Older ones do not say what the mean over unseen targets rests on: it is known where all but the sources are unseen.
    """
    places = [name.split("/")[1] for name in scores if name.startswith("target/") and name.endswith(f"/{ACCURACY}")]
    at_home = _estimate_flat([name for name in sources if name in places], scores)
    others = _estimate_flat([name for name in places if name not in sources and ":" not in name], scores)
    mean = scores.get(f"unseen/{ACCURACY}", math.nan)
    low, high = (scores.get(f"unseen/{ACCURACY}{end}", math.nan) for end in ENDS)
    known = others if math.isclose(mean, others.mean, abs_tol=1e-9) else estimate([mean])
    chance, faces = scores.get("unseen/largest", known.chance), int(scores.get("unseen/faces", known.faces))
    unseen = replace(known, low=low, high=high, chance=chance, faces=faces)
    return Scored(at_home if set(sources) <= set(places) else NOTHING, unseen)


def _estimate_flat(targets: Sequence[str], scores: Mapping[str, float]) -> Estimate:
    if not targets:
        return NOTHING

    def read(what: str) -> list[float]:
        return [scores.get(f"target/{name}/{what}", math.nan) for name in targets]

    low, high = combine_intervals(read(ACCURACY), list(zip(*(read(f"{ACCURACY}{end}") for end in ENDS), strict=True)))
    faces, chance = sum(read("faces")), average_targets(read("largest"))
    mean = estimate([average_targets(read(ACCURACY))])
    return replace(mean, low=low, high=high, chance=chance, faces=0 if math.isnan(faces) else int(faces))


def _record(name: str, kind: str, method: Any, source: Any, seeds: Any, scored: Scored) -> dict[str, Any]:
    return {"model": name, "is": kind, "method": method, "source": source, "seeds": seeds, **_flatten(scored)}


def _flatten(scored: Scored) -> dict[str, Any]:
    """Return accuracies by name with what they rest on: the ends of the 95 % interval over faces, chance, and the faces.

    Chance is the share of the largest class. What is not known is None.
    """
    flat: dict[str, Any] = {}
    for name, found in scored._asdict().items():
        resting = {"": found.mean, "_low": found.low, "_high": found.high, "_chance": found.chance}
        flat |= {f"{name}{end}": None if math.isnan(value) else value for end, value in resting.items()}
        flat[f"{name}_faces"] = found.faces or None
    return flat


def _describe_runs(workspace: Workspace) -> Iterator[dict[str, Any]]:
    """Yield the record of every run that is trained to its end."""
    runs = list(filter(_is_finished, workspace.read_runs()))
    for run, scored in zip(runs, _score_readable(workspace, runs), strict=True):
        yield _record(run.name, TRAINED, run.method, run.source, [run.seed], scored)


def _is_finished(run: Run) -> bool:
    """Whether a run was trained to its end, not where that cannot be read, of which a warning says so."""
    try:
        return run.finished
    except DamagedError as error:
        logging.getLogger(__name__).warning("A model is left out: %s", error)
        return False


def list_runs(workspace: Workspace) -> list[dict[str, Any]]:
    """Return a record for each run of a workspace: what it is, how far, when it ended, and its accuracies as a model's.

    What is not known is None, as the time of runs that older versions made. A run is listed whatever became of its
    predictions; where some cannot be read, a warning says so, and no run has accuracies.
    """
    runs, records = workspace.read_runs(), []
    for run, scored in zip(runs, _score_readable(workspace, runs), strict=True):
        planned = run.settings.get("recipe.epochs")
        ended = (read_json(run.folder / "made.json") or {}).get("ended")
        records.append({
            "run": run.name, "source": run.source, "method": run.method, "selection": run.selection,
            "status": read_status(run.folder), "experiments": sorted(run.experiments), "seed": run.seed,
            "epochs": len(list_epochs(run.folder)), "of": planned, **_flatten(scored),
            "ended": datetime.fromtimestamp(ended).isoformat(" ", "minutes") if ended else None,
        })  # fmt: skip
    return records


def _score_readable(workspace: Workspace, runs: Sequence[Run]) -> list[Scored]:
    """Return what `score_runs` does, or no accuracies and a warning where a file of them cannot be read."""
    try:
        return score_runs(workspace, runs)
    except UserError as error:
        logging.getLogger(__name__).warning("Accuracies are not known: %s", error)
        return [UNSCORED] * len(runs)


def score_runs(workspace: Workspace, runs: Sequence[Run]) -> list[Scored]:
    """Return for each run its accuracies, each with its interval over faces, chance and the faces."""
    known = workspace.manifest_digests()
    table = read_scores(meet(runs, known).runs, known, ["clean"])
    records = dict(iter(table.groupby("run")))
    scored = []
    for run in runs:
        if run.name not in records:
            scored.append(UNSCORED)
            continue
        own = records[run.name]
        names = set(run.source.split("+"))  # not those of a model it started from
        home = own[(own["relation"] == SOURCE) & own["target"].isin(names)]
        at_home = _estimate(home) if len(home) == len(names) else NOTHING
        scored.append(Scored(at_home, _estimate(own[own["relation"] == UNSEEN])))
    return scored


def _estimate(records: pd.DataFrame) -> Estimate:
    """Return the mean accuracy over some targets of a run; NaN where one of them has none."""
    if records.empty:
        return NOTHING
    low, high = map(float, interval_of_mean(records, ACCURACY))
    mean = estimate([average_targets(records[ACCURACY].tolist())])
    return replace(mean, low=low, high=high, chance=float(records["largest"].mean()), faces=int(records["faces"].sum()))
