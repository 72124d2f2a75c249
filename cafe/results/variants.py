"""Runs as rows of their own: evaluated with an option of test time, or the seeds of a row as an ensemble.

They stand in a table only where they are named, beside the rows they are of, and take no part in its contest.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace

from cafe.errors import UserError
from cafe.results.predictions import list_predictions
from cafe.results.protocols import name_protocol
from cafe.results.runs import Run

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
