"""Sweeps: of the runs of a method that differ in drawn settings, the one that each trial chooses by held-out faces.

As DomainBed reports them: every trial, which is a seed, has draws of its own and chooses among them; the row of a method is
the mean over the trials' choices. No target is looked at but by an oracle, which says so.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from cafe.errors import UserError
from cafe.results.runs import Run, read_selection_accuracy

NEAR = 0.005  # of accuracy: draws that are this close to the best count as good


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
