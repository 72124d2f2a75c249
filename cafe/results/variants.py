"""Runs as rows of their own: evaluated with an option of test time, the seeds of a row as an ensemble, what a sweep chose.

The first two stand in a table only where they are named, beside the rows they are of, and take no part in its contest. Of a
sweep, whose runs differ in drawn settings, nothing else stands there: as DomainBed reports it, every trial, which is a seed,
has draws of its own and chooses among them by held-out faces, and the row of a method is the mean over the trials' choices.
No target is looked at but by an oracle, which says so.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from cafe.errors import UserError
from cafe.results.predictions import list_predictions
from cafe.results.protocols import name_protocol
from cafe.results.runs import Run, read_selection_accuracy

NEAR = 0.005  # of accuracy: draws that are this close to the best count as good
SEEDS = "seeds"  # the mean over the probabilities of all seeds of a row


def vary_runs(runs: Sequence[Run], protocol: str, options: Iterable[str]) -> list[Run]:
    """Return the runs as evaluated with each option; raise `UserError` for an option without any."""
    varied: list[Run] = []
    for option in options:
        if option == SEEDS:
            found = average_seeds(run for run in runs if _is_evaluated(run, protocol))
            missing = "no method was evaluated with several seeds: train it with another --seed first"
        else:
            found = [_name(run, option) for run in runs if _is_evaluated(run, name_protocol(protocol, option))]
            missing = f"no run was evaluated with it: run `cafe evaluate RUN --test-time {option}` first"
        if not found:
            raise UserError(f"--test-time {option} has nothing to show by the protocol {protocol!r}, as {missing}.")
        varied += found
    return varied


def average_seeds(runs: Iterable[Run]) -> list[Run]:
    """Return an ensemble for every group of several seeds; in leave-one-domain-out, for the folds of each domain."""
    groups: dict[tuple[str, str], list[Run]] = defaultdict(list)
    for run in runs:
        groups[run.group, run.fold].append(run)
    return [
        replace(_name(members[0], SEEDS, f"mean of {len(members)} seeds"), ensemble=tuple(members))
        for members in groups.values()
        if len(members) > 1
    ]


def average_exported(runs: Sequence[Run], flip: bool) -> tuple[Run, bool]:
    """Return several seeds, averaged, as one run, and whether what it predicted is averaged with mirror images, too.

    That is as `flip` says, unless one of the runs was not evaluated so.
    """
    mirrored = flip and all(_is_evaluated(run, name_protocol("clean", "flip")) for run in runs)
    members = [replace(run, test_time="flip") if mirrored else run for run in runs]
    return (replace(members[0], ensemble=tuple(members)) if len(members) > 1 else members[0]), mirrored


def _is_evaluated(run: Run, protocol: str) -> bool:
    return bool(list_predictions(run.folder, protocol))


def _name(run: Run, option: str, label: str = "") -> Run:
    name, group = (f"{text} {option}" for text in (run.name, run.group))
    settings = {**run.settings, "test_time": label or option}
    return replace(run, name=name, group=group, settings=settings, test_time=option)


@dataclass(frozen=True)
class Trial:
    """The draws of one seed of a method on one source that are finished, the chosen one first."""

    runs: tuple[Run, ...]
    accuracies: tuple[float, ...]  # on the faces they are chosen by, from the highest

    @property
    def chosen(self) -> Run:
        """The run with the best accuracy, the first draw of equals, as one of a row of such choices."""
        run = self.runs[0]
        drawn = {f"recipe.{name}" for name in run.drawn}
        settings = {key: value for key, value in run.settings.items() if key not in drawn and key != "draw"}
        return replace(run, settings={**settings, "draws": len(self.runs)})

    @property
    def settings(self) -> dict[str, Any]:
        """What was drawn for the chosen run."""
        run = self.runs[0]
        return {name: run.settings[f"recipe.{name}"] for name in run.drawn}

    @property
    def middle(self) -> float:
        """The accuracy of the middle draw."""
        return median(self.accuracies)

    @property
    def near(self) -> int:
        """How many draws are about as good as the best, itself among them."""
        return sum(accuracy >= self.accuracies[0] - NEAR for accuracy in self.accuracies)


def choose_draws(runs: Sequence[Run]) -> tuple[list[Run], list[Trial]]:
    """Return the runs with the one that each trial chooses instead of all of its draws, and these trials.

    Draws that are not finished play no part. Raises `UserError` for runs whose epochs are not here.
    """
    kept, groups = [run for run in runs if run.draw is None], dict[tuple[str, str, int], list[Run]]()
    for run in runs:
        if run.draw is not None:
            groups.setdefault((run.group, run.fold, run.seed), []).append(run)
    if any(run.pulled for members in groups.values() for run in members):
        raise UserError(
            "Draws are chosen by the epochs of their runs, which a tracking server's copies lack: leave --mlflow-uri out."
        )
    trials = []
    for members in groups.values():
        pairs = [(run, accuracy) for run in members if (accuracy := read_selection_accuracy(run)) is not None]
        pairs.sort(key=lambda pair: (-pair[1], pair[0].draw))
        if pairs:
            trials.append(Trial(tuple(run for run, _ in pairs), tuple(accuracy for _, accuracy in pairs)))
    return [*kept, *_level(trials)], trials


def _level(trials: Sequence[Trial]) -> list[Run]:
    """Return what the trials choose, with the fewest draws that any trial of a row has as the row's."""
    fewest: dict[str, int] = defaultdict(lambda: 2**31)
    for trial in trials:
        fewest[trial.chosen.group] = min(fewest[trial.chosen.group], len(trial.runs))
    return [
        replace(run, settings={**run.settings, "draws": fewest[run.group]})
        for run in (trial.chosen for trial in trials)
    ]
