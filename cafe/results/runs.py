"""Runs as their folders describe them: the one reader of run.json, and the one choice of runs among others."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from upath import UPath

from cafe.data.expressions import EXPRESSIONS, order_classes
from cafe.errors import StorageError, UserError, ambiguous, unknown
from cafe.files import exists, list_folder, read_json
from cafe.records import FORMAT, check_record
from cafe.results.columns import Column
from cafe.results.predictions import Predictions, average, load_predictions
from cafe.results.protocols import OPTIONS, name_protocol
from cafe.results.sources import ALL_BUT_TARGET, Source, find_relation
from cafe.seals import read_sealed

PULLED = "pulled.json"  # says of a run folder that it came from a tracking server


@dataclass(frozen=True)
class Description:
    """What run.json says of a run; old records do not say what has a default."""

    name: str
    group: str
    source: str  # `a+b` where there are several
    method: str
    seed: int
    selection: str
    settings: dict[str, Any]
    derived: dict[str, Any]
    sources: tuple[Source, ...] = ()  # where there are several
    fold: str = ""
    draw: int | None = None
    drawn: tuple[str, ...] = ()
    classes: tuple[str, ...] = EXPRESSIONS


@dataclass(frozen=True)
class Run:
    """A run as its folder describes it: what it was trained on and how.

    `settings` holds what a user can choose, `derived` what only follows from that, and `spec` the record of the
    specification that names it; `experiments` gives for each experiment the benchmark it belongs to there, or None.
    `test_time`, `ensemble` and `shared_classes` are set where it is evaluated otherwise than by itself
    (`cafe.results.variants`).
    """

    folder: UPath
    name: str
    group: str
    source: str  # `a+b` where there are several
    sources: tuple[Source, ...]
    fold: str  # in leave-one-domain-out, the domain left out, on which alone it is evaluated
    method: str
    seed: int
    selection: str
    settings: dict[str, Any]
    derived: dict[str, Any]
    spec: dict[str, Any]
    not_as_published: tuple[str, ...]
    experiments: dict[str, str | None]
    pulled: bool  # from a tracking server: it was evaluated on the manifests of another workspace
    draw: int | None = None  # which one of a sweep it is
    drawn: tuple[str, ...] = ()  # the settings of its recipe that were drawn
    classes: tuple[str, ...] = EXPRESSIONS  # in the order of its outputs; old records do not say
    test_time: str = ""  # the option with which it was evaluated
    ensemble: tuple[Run, ...] = ()  # the runs whose mean it is
    set_aside: frozenset[tuple[str, str]] = frozenset()  # protocol and column of what is of other faces than the rest
    shared_classes: bool = False  # whether its predictions are over the classes it shares with each target

    @property
    def source_title(self) -> str:
        """What tables call its source: `all but target` for all folds of leave-one-domain-out."""
        return ALL_BUT_TARGET if self.fold else self.source

    @property
    def class_set(self) -> tuple[str, ...]:
        """Its classes in the order of tables."""
        return order_classes(self.classes)

    @property
    def finished(self) -> bool:
        """Whether it was trained to its end; raises `DamagedError` where the record of that is not what was written."""
        return read_result(self.folder) is not None

    def evaluates(self, column: Column) -> bool:
        """Whether a table shows what this run predicts there: a fold counts for the domain it leaves out alone."""
        return self.fold in ("", column.name)

    def load_predictions(self, protocol: str, named: bool = True) -> dict[Column, Predictions]:
        """Return what it predicted by a protocol; of an ensemble, the mean where all of it have predictions.

        The columns are those of the protocol: a run with an option of test time stands in them as a row of its own. Classes
        are in the order of tables, so that runs whose class sets differ in their order alone can be compared.
        """
        if self.ensemble:
            several = [run.load_predictions(protocol) for run in self.ensemble]
            columns = [column for column in several[0] if all(column in one for one in several)]
            found = {column: average([one[column] for one in several]) for column in columns}
        else:
            option = self.test_time if self.test_time in OPTIONS else None
            by = name_protocol(protocol, option)
            files = load_predictions(self.folder, by, named)
            kept = {name: one for name, one in files.items() if (by, name) not in self.set_aside}
            found = {Column.parse(name, protocol): predictions for name, predictions in kept.items()}
        return {
            column: (predictions.share_classes() if self.shared_classes else predictions).order_classes()
            for column, predictions in found.items()
        }

    def relation(self, column: Column, kind: str, manifest: str) -> str:
        """Return what a target, with the kind and the digest of its manifest, is to this run."""
        return find_relation(self.sources, column.target, column.split, kind, manifest)


def read_record(folder: UPath, file: str = "run.json") -> dict[str, Any] | None:
    """Return what run.json says, or another `file` that describes a run; None when the folder holds none.

    Raises `DamagedError` when it is not what was written, and `UserError` when its format is another.
    """
    remedy = "remove this file and give the run's `cafe train` command again, or move the folder elsewhere"
    record = read_sealed(folder / file, "read", remedy)
    if record is not None and record.get("version") != FORMAT:
        raise UserError(
            f"The run {folder.name!r} is in the old format {record.get('version', 1)}, and this version of cafe reads "
            f"format {FORMAT}: move its folder elsewhere and train it again with `cafe train`, or use the version that "
            "made it."
        )
    return record


def read_run(folder: UPath) -> Run | None:
    """Read a run's description; None when the folder holds none.

    Raises `UserError` when it is damaged, of another format, or calls itself otherwise than its folder: it is by its folder
    that a run is known, whatever a file that came from elsewhere claims.
    """
    record = read_record(folder)
    if record is None:
        return None
    known = {one.name: record[one.name] for one in fields(Description) if record.get(one.name) is not None}
    described = check_record(known, Description, f"{folder}/run.json")
    if described.name != folder.name:
        raise UserError(
            f"{folder}/run.json says that it is the run {described.name!r}: give the folder that name back, or remove it."
        )
    deviations, spec = (record.get(name) for name in ("not_as_published", "spec"))
    experiments = {path.stem: read_json(path) or {} for path in list_folder(folder / "experiments")}
    alone = Source(described.source, str(record.get("source_kind") or ""), str(record.get("source_digest") or ""))
    return Run(
        folder,
        **{**vars(described), "sources": described.sources or (alone,)},
        spec=spec if isinstance(spec, dict) else {},
        not_as_published=tuple(deviations) if isinstance(deviations, list) else (),
        experiments={name: member.get("benchmark") for name, member in experiments.items()},
        pulled=exists(folder / PULLED),
    )


def read_runs(folders: Iterable[UPath]) -> list[Run]:
    """Read the runs of folders; those that cannot be read are left out, each named by a warning that says why."""
    runs = []
    for folder in folders:
        try:
            run = read_run(folder)
        except StorageError:
            raise
        except UserError as error:
            logging.getLogger(__name__).warning("A run is left out: %s", error)
        else:
            runs += [run] if run else []
    return runs


class Chosen(NamedTuple):
    """Some runs, and in a sentence without its full stop why these; empty where there are no others."""

    runs: list[Run]
    reason: str


def choose(
    runs: Sequence[Run],
    experiment: str | None = None,
    name: str | None = None,
    best: str | None = None,
    ensemble: bool = False,
) -> Chosen:
    """Choose all of these runs, those of an experiment, or one of either: by its name, or the best by `source_val`.

    `ensemble` adds the other finished seeds of the one. Raises `UserError` where nothing is found.
    """
    members = list(runs) if experiment is None else [run for run in runs if experiment in run.experiments]
    counts = Counter(name for run in runs for name in run.experiments)
    if experiment is not None and not members:
        raise unknown("experiment", experiment, counts)
    if best is not None:
        where = "this workspace" if experiment is None else f"the experiment {experiment!r}"
        chosen, reason = _choose_best(members, best, where)
    elif name is not None:
        chosen, reason = _find_named(members, name)
    else:
        return Chosen(members, _name_others(counts, experiment))
    if not chosen.finished:
        raise UserError(f"The run {chosen.name!r} is not trained to its end: give its `cafe train` command again.")
    if not ensemble:
        return Chosen([chosen], reason)
    seeds = [run for run in runs if (run.group, run.fold) == (chosen.group, chosen.fold) and run.finished]
    return Chosen(seeds, f"{reason}, averaged over {len(seeds)} seeds")


def _name_others(counts: Counter[str], experiment: str | None) -> str:
    if experiment is not None:
        others = ", ".join(sorted(counts.keys() - {experiment}))
        also = f"; there are also {others}: leave --experiment out to see all"
        return f"Runs of the experiment {experiment}{also}" if others else ""
    listed = ", ".join(f"{name} ({count})" for name, count in sorted(counts.items()))
    return f"Runs of all experiments, {listed}: choose one with --experiment" if len(counts) > 1 else ""


def _find_named(runs: Sequence[Run], name: str) -> tuple[Run, str]:
    """Return the run of a name, or the only one that begins so, and what it is."""
    found = [run for run in runs if run.name == name] or [run for run in runs if run.name.startswith(name)]
    if not found and any(name in run.experiments for run in runs):
        raise UserError(f"{name!r} is an experiment: give one of its runs, or --best source_val to choose it.")
    if not found:
        raise unknown("run", name, [run.name for run in runs])
    if len(found) > 1:
        raise ambiguous("runs", name, [run.name for run in found])
    return found[0], f"Model {found[0].name}"


def _choose_best(runs: Sequence[Run], best: str, where: str) -> tuple[Run, str]:
    """Return the run with the best accuracy on held-out faces of its source, the first among equals, and why.

    No target is looked at; `where` says in messages what runs these are. Raises `UserError` where no run was selected by
    `source_val`, and for runs of several sources, whose accuracies are of different faces.
    """
    if best != "source_val":
        raise unknown("way to choose a run", best, ("source_val",))
    accuracies = {run.name: accuracy for run in runs if (accuracy := read_validation_accuracy(run)) is not None}
    if not accuracies:
        raise UserError(
            f"No finished run of {where} has an accuracy on held-out faces of the source: train "
            "with --selection source_val, or give the name of a run."
        )
    rivals = [run for run in runs if run.name in accuracies]
    sources = sorted({run.source for run in rivals})
    if len(sources) == 1 and len({run.sources for run in rivals}) > 1:
        raise UserError(
            f"The runs of {where} learned from different data sets that were called {sources[0]!r}, whose validation "
            "accuracies cannot be compared: give the name of a run."
        )
    if len(sources) > 1:
        raise UserError(
            f"The runs of {where} learned from {', '.join(sources)}, whose validation accuracies cannot be compared: "
            "give the name of a run."
        )
    chosen = max(rivals, key=lambda run: accuracies[run.name])
    others = f"; {len(runs) - len(rivals)} runs without one were left out" if len(runs) > len(rivals) else ""
    return chosen, (
        f"Model {chosen.name}: {accuracies[chosen.name]:.1%} on held-out faces of {sources[0]}, the best of {len(rivals)} "
        f"runs{others}"
    )


def read_result(folder: UPath) -> dict[str, Any] | None:
    """Return what a run's folder says of its end, None before it; raise `DamagedError`."""
    remedy = "remove it and give the run's `cafe train` command again"
    return read_sealed(folder / "result.json", "read", remedy)


def read_epoch(path: UPath) -> dict[str, Any]:
    """Return the metrics in a file of one epoch, none where there is no file; raise `DamagedError`."""
    remedy = "move the run's folder elsewhere and give its `cafe train` command again"
    return read_sealed(path, "read", remedy) or {}


def list_epochs(folder: UPath) -> dict[int, UPath]:
    """Return the record of each epoch that a run's folder holds; other files there are nobody's."""
    there = list_folder(folder / "epochs")
    return {int(path.stem): path for path in there if path.suffix == ".json" and path.stem.isdecimal()}


def read_selection_accuracy(run: Run) -> float | None:
    """Return the accuracy of a finished run on the faces that its epoch was chosen by; None where none chose it."""
    result = read_result(run.folder)
    if not result or not result.get("epochs"):
        return None
    if run.selection == "leave_one_out":
        curve = (read_json(run.folder / "selection.json") or {}).get("accuracy") or [math.nan]
        return float(max(curve))
    if run.selection == "swad":
        return float(result["selection/accuracy"])  # of the averaged weights
    if not result.get("selected"):
        return None
    epoch = read_epoch(run.folder / "epochs" / f"{result['selected']:04d}.json")
    accuracy = epoch.get("selection/accuracy")
    return None if accuracy is None else float(accuracy)


def read_validation_accuracy(run: Run) -> float | None:
    """Return the accuracy of a run on the faces of its source that its epoch, or epochs, were selected on; None without."""
    return read_selection_accuracy(run) if run.selection in ("source_val", "swad") else None
