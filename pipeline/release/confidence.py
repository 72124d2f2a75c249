"""How far a model is to be trusted, by its own source: when to doubt an answer, and whether it knows anything at all.

An exported folder says so itself; of runs it is computed from what they predicted for faces held out of their source. No
target is looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import scipy  # which loads a part of it only when it is used
from upath import UPath

from cafe.errors import UserError
from cafe.pipeline.release.shipped import is_export
from cafe.pipeline.runs import model_folder, read_model
from cafe.records import check_record
from cafe.results.metrics import confusion
from cafe.results.predictions import Predictions
from cafe.results.runs import Run, read_runs

COVERAGE = 0.8  # the share of the held-out faces that a model is to answer without a doubt
SIGNIFICANCE = 0.05


@dataclass(frozen=True)
class Home:
    """How often a model is right on faces held out of its source, and what else would be as often.

    `chance` is the share that its own answers would get right if they were dealt to these faces at random, `largest` the
    class of most of them. `p_chance` and `p_largest` say how likely it is to be right as often if it were no better than
    chance (binomial test), or than always answering that class (McNemar's exact test, of the faces on which the two differ);
    both one-sided.
    """

    faces: int
    accuracy: float
    chance: float
    p_chance: float
    largest: str
    largest_share: float
    p_largest: float

    def warning(self, name: str) -> str:
        """Return what whoever uses the model must know of it, in a sentence; nothing where it knows something.

        `name` is that of its source.
        """
        where = f"of {self.faces:,} faces held out of its own source, {name}, it recognises {self.accuracy:.1%}"
        if self.p_chance > SIGNIFICANCE:
            return (
                f"Its answers mean nothing: {where}, which does not differ from chance ({self.chance:.1%}, "
                f"p = {self.p_chance:.2g})."
            )
        if self.p_largest > SIGNIFICANCE:
            return (
                f"It knows little: {where}, and whoever always answers {self.largest!r} {self.largest_share:.1%} "
                f"(p = {self.p_largest:.2g})."
            )
        return ""


def find_home(run: Run) -> list[Predictions]:
    """Return what a run predicted for faces held out of its sources: those of their validation splits, else those evaluated.

    Nothing where a source was not evaluated, or is another manifest now.
    """
    there, own = run.load_predictions("clean"), run.source.split("+")  # not those of a model it started from
    found = []
    for source in (source for source in run.sources if source.name in own):
        splits = {column.split: one for column, one in there.items() if column.target == source.name}
        predictions = splits.get("val") or splits.get("")
        if predictions is None or predictions.about.get("manifest") != source.digest:
            return []
        found.append(predictions)
    return found


def measure_home(several: Sequence[Predictions]) -> Home:
    """Return how a model does on the faces of some predictions of its, which are over the same classes."""
    counts = np.sum([confusion(one) for one in several], axis=0)
    faces, right = int(counts.sum()), int(counts.trace())
    given, there = counts.sum(axis=0) / faces, counts.sum(axis=1) / faces
    largest, chance = int(there.argmax()), float(given @ there)
    won = right - int(counts[largest, largest])  # right, where the largest class is wrong
    lost = int(counts[largest].sum() - counts[largest, largest])
    return Home(
        faces,
        right / faces,
        chance,
        binomial_tail(right, faces, chance),
        several[0].classes[largest],
        float(there[largest]),
        binomial_tail(won, won + lost, 0.5),
    )


def binomial_tail(least: int, trials: int, share: float) -> float:
    """Return the probability of at least so many successes among trials that succeed with a probability `share` each."""
    return float(scipy.special.betainc(least, trials - least + 1, share)) if least else 1.0


def choose_threshold(several: Sequence[Predictions]) -> float:
    """Return the probability that the most probable class reaches on four in five faces: less sure answers are doubtful.

    The threshold of a selective classifier at a given coverage ("Selective Classification for Deep Neural Networks", Geifman
    and El-Yaniv, NeurIPS 2017).
    """
    confidences = np.concatenate([one.probabilities.max(axis=1) for one in several])
    return float(np.quantile(confidences, 1 - COVERAGE, method="lower"))


def average_runs(runs: Sequence[Run]) -> Run:
    """Return one run, or several seeds as the one that is their mean."""
    return replace(runs[0], ensemble=tuple(runs)) if len(runs) > 1 else runs[0]


class Confidence(NamedTuple):
    """The probability below which a model's answer is doubtful, None where it is not known, and a warning or nothing."""

    threshold: float | None = None
    warning: str = ""


def describe_home(run: Run) -> dict[str, Any]:
    """Return what the record of an exported run says of its doubts: `threshold`, and `home` as a `Home`.

    Nothing where the run was not evaluated on faces held out of its source.
    """
    found = find_home(run)
    return {"threshold": choose_threshold(found), "home": asdict(measure_home(found))} if found else {}


def read_confidence(folders: Sequence[UPath]) -> Confidence:
    """Return how far the model of some folders is to be trusted, which are those of runs or an exported one."""
    if is_export(folder := model_folder(folders[0])):
        record = read_model(folder)
        source = record.get("origin", {}).get("source", "")
    else:
        run = average_runs(read_runs(folders))
        try:
            record, source = describe_home(run), run.source
        except UserError:  # damaged, or seeds evaluated on other faces: whoever reads scores hears of it
            return Confidence()
    threshold = record.get("threshold")
    home = check_record(record["home"], Home, f"{folder}/model.json") if record.get("home") else None
    return Confidence(None if threshold is None else float(threshold), home.warning(source) if home else "")
