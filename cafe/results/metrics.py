"""Metrics of predictions, each registered once, and means over seeds with their intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import scipy  # which loads a part of it only when it is used

from cafe.errors import unknown
from cafe.results.predictions import Answers, Predictions
from cafe.results.units import NATS, PERCENT, Unit

BINS = 15  # of confidence, as in Guo et al.
FEW = 50  # faces; an accuracy on fewer is known to ±14 points at best
SMALLEST = 1e-12  # probability whose logarithm is taken
COVERAGE = 0.8  # the share of faces, those of the highest confidence, of which the risk is a metric
EVERY = "all"  # stands for all metrics where some may be chosen
RECALL = "recall/"  # before the name of a class: the share of its faces that were recognised


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, the half-width of its 95 % t-interval (NaN from a single seed), and the values themselves.

    It cannot be above the limit of its `unit`, nor below zero. `faces` counts the faces it is of, 0 where nobody said; `low`
    and `high` are the ends of its 95 % interval over faces and `chance` is what it has to exceed, each NaN where it is not
    known.
    """

    mean: float
    half_width: float
    values: tuple[float, ...] = ()
    unit: Unit = PERCENT
    faces: int = 0
    low: float = math.nan
    high: float = math.nan
    chance: float = math.nan

    @property
    def count(self) -> int:
        """How many seeds there are."""
        return len(self.values)

    @property
    def over_seeds(self) -> tuple[float, float]:
        """The ends of the interval over seeds, within what is possible; NaN from a single seed."""
        if math.isnan(self.half_width):
            return math.nan, math.nan
        return max(0.0, self.mean - self.half_width), min(self.unit.limit, self.mean + self.half_width)

    @property
    def over_faces(self) -> str:
        """The mean with its interval over faces as it is printed: `71.4 (45.4–88.3)`."""
        write = self.unit.write
        if math.isnan(self.mean) or math.isnan(self.low):
            return write(self.mean)
        return f"{write(self.mean)} ({write(self.low)}–{write(self.high)})"

    @property
    def at_chance(self) -> bool:
        """Whether other faces might as well have shown nothing above chance."""
        return self.low <= self.chance

    @property
    def few(self) -> bool:
        """Whether it is of too few faces to say much."""
        return 0 < self.faces < FEW

    @property
    def doubtful(self) -> bool:
        """Whether tables mark it."""
        return is_doubtful(self.low, self.chance, self.faces)

    def __str__(self) -> str:
        """Return it in its unit, percent as the field prints it; two seeds as they are, for an interval would say nothing.

        An interval that would reach beyond what is possible is written by its ends.
        """
        write = self.unit.write
        if math.isnan(self.mean):
            return "–"
        if self.count == 2:
            return " / ".join(map(write, self.values))
        if math.isnan(self.half_width):
            return write(self.mean)
        low, high = self.over_seeds
        if low > self.mean - self.half_width or high < self.mean + self.half_width:
            return f"{write(self.mean)} ({write(low)}–{write(high)})"
        return f"{write(self.mean)} ± {write(self.half_width)}"


def is_doubtful(low: float, chance: float, faces: float) -> bool:
    """Whether a number that can be compared with chance might be none above it, or is of too few faces to say much.

    `low` is the lower end of its 95 % interval over faces. NaN stands for what is not known, 0 for faces nobody counted.
    """
    return not math.isnan(chance) and bool(low <= chance or 0 < faces < FEW)


def estimate(values: Sequence[float], unit: Unit = PERCENT) -> Estimate:
    """Return the mean of independent runs with Student's 95 % t-interval, which is to be written in a unit."""
    count = len(values)
    if count < 2:
        return Estimate(float(values[0]) if count else math.nan, math.nan, tuple(values), unit)
    quantile = float(scipy.special.stdtrit(count - 1, 0.975))
    half_width = quantile * float(np.std(values, ddof=1)) / math.sqrt(count)
    return Estimate(float(np.mean(values)), half_width, tuple(values), unit)


def average_targets(values: Sequence[float]) -> float:
    """Return the plain mean over targets, each counting the same; NaN where one of them has no value."""
    return sum(values) / len(values)


def confusion(predictions: Predictions | Answers) -> np.ndarray:
    """Return counts (K, K): rows are true classes, columns predicted ones, in the order of the predictions' classes."""
    classes = len(predictions.classes)
    places = predictions.labels * classes + predictions.predicted
    return np.bincount(places, minlength=classes**2).reshape(classes, classes)


def accuracy(predictions: Predictions) -> float:
    """Return the share of faces whose class was recognised."""
    counts = confusion(predictions)
    return float(counts.trace() / counts.sum())


def recalls(predictions: Predictions) -> dict[str, float]:
    """Return by class the share of its faces that were recognised; a class without faces is left out."""
    counts = confusion(predictions)
    support = counts.sum(axis=1)
    return {
        predictions.classes[label]: float(counts[label, label] / support[label])
        for label in np.flatnonzero(support).tolist()
    }


def mean_class_accuracy(predictions: Predictions) -> float:
    """Return the mean of the recalls."""
    return float(np.mean(list(recalls(predictions).values())))


def worst_class_recall(predictions: Predictions) -> float:
    """Return the lowest of the recalls."""
    return min(recalls(predictions).values())


def macro_f1(predictions: Predictions) -> float:
    """Return the mean of F1 over the classes that the target has faces of."""
    counts = confusion(predictions)
    right, support, claimed = np.diag(counts), counts.sum(axis=1), counts.sum(axis=0)
    present = np.flatnonzero(support)
    return float(np.mean(2 * right[present] / (support + claimed)[present]))


def macro_f1_error(predictions: Predictions) -> float:
    """Return the standard error of macro-F1 over faces.

    By the delta method for multinomial counts (Takahashi, Yamamoto, Kuchiba, Koyama, "Confidence interval for
    micro-averaged F1 and macro-averaged F1 scores", Applied Intelligence 52, 2022).
    """
    counts = confusion(predictions)
    shares, sums = counts / counts.sum(), counts.sum(axis=1) + counts.sum(axis=0)
    present = counts.sum(axis=1) > 0
    both = np.maximum(sums / counts.sum(), SMALLEST)  # (K,): of a class, its share among labels and among predictions
    scores = np.where(present, 2 * np.diag(shares) / both, 0.0)
    slopes = scores / both
    gradient = (2 * np.diag(present / both) - slopes[:, None] - slopes[None, :]) / present.sum()  # (K, K)
    variance = (shares * gradient**2).sum() - (shares * gradient).sum() ** 2
    return math.sqrt(max(variance, 0.0) / counts.sum())


def calibration_error(predictions: Predictions) -> float:
    """Return the expected calibration error: how far confidence is from accuracy, averaged over faces.

    With 15 equal bins of confidence (Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, Eq. 3).
    """
    confidence = predictions.confidence.astype(float)
    bins = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    surplus = (predictions.predicted == predictions.labels) - confidence
    return float(np.abs(np.bincount(bins, surplus, BINS)).sum() / len(surplus))


def auroc(predictions: Predictions) -> float:
    """Return the area under the ROC curve of one class against the rest, in the mean over the classes.

    By the statistic of Mann and Whitney: the share of pairs of a face of the class and one of the rest in which the former
    has the higher probability of the class, ties counting half. NaN where all faces are of one class.
    """
    areas = []
    for label in np.unique(predictions.labels):
        own = predictions.labels == label
        probabilities = predictions.probabilities[:, label]
        rest, inside = np.sort(probabilities[~own]), np.sort(probabilities[own])
        if len(rest):
            below = np.searchsorted(rest, inside, "left").sum() + np.searchsorted(rest, inside, "right").sum()
            areas.append(float(below / (2 * len(rest) * len(inside))))
    return float(np.mean(areas)) if areas else math.nan


def negative_log_likelihood(predictions: Predictions) -> float:
    """Return the mean of minus the logarithm of the probability of the true class, in nats."""
    probabilities = predictions.probabilities[np.arange(len(predictions.labels)), predictions.labels].astype(float)
    return float(0 - np.log(np.clip(probabilities, SMALLEST, None)).mean())  # of certain ones 0, not -0


def brier_score(predictions: Predictions) -> float:
    """Return the squared distance of the probabilities from the true class, summed over classes, averaged over faces: 0–2.

    Brier, "Verification of forecasts expressed in terms of probability", Monthly Weather Review 78 (1950), Eq. 2.
    """
    truth = np.eye(len(predictions.classes))[predictions.labels]
    return float(((predictions.probabilities.astype(float) - truth) ** 2).sum(axis=1).mean())


def selective_risks(predictions: Predictions) -> np.ndarray:
    """Return the error rate among the 1, 2, … N faces of the highest confidence, (N,).

    Faces of equal confidence share their errors, as in the mean over all orders of them.
    """
    confidence = predictions.confidence
    order = np.argsort(-confidence, kind="stable")
    wrong = (predictions.predicted != predictions.labels)[order]
    ordered = confidence[order]
    tied = np.cumsum(np.diff(ordered, prepend=ordered[:1]) != 0)  # (N,): numbers of equal confidences
    shared = np.bincount(tied, wrong) / np.bincount(tied)
    risks: np.ndarray = np.cumsum(shared[tied]) / np.arange(1, len(order) + 1)
    return risks


def area_under_risk_coverage(predictions: Predictions) -> float:
    """Return the mean of the selective risks over all coverages (Geifman, Uziel, El-Yaniv, ICLR 2019, Section 3)."""
    return float(selective_risks(predictions).mean())


def risk_at(predictions: Predictions, coverage: float = COVERAGE) -> float:
    """Return the error rate among a share of the faces, rounded up, those of the highest confidence."""
    count = math.ceil(coverage * len(predictions.labels) - 1e-9)  # less what a product of decimals may exceed it by
    return float(selective_risks(predictions)[max(count, 1) - 1])


def votes_accuracy(predictions: Predictions) -> float:
    """Return how often one of the people who voted, drawn at random, chose the predicted class; NaN without votes."""
    shares, predicted = _share_votes(predictions)
    return float(np.mean(shares[np.arange(len(shares)), predicted])) if len(shares) else math.nan


def votes_cross_entropy(predictions: Predictions) -> float:
    """Return the cross-entropy in nats between the shares of people's votes and the probabilities; NaN without votes."""
    shares, _ = _share_votes(predictions)
    if not len(shares):
        return math.nan
    assert predictions.votes is not None
    probabilities = predictions.probabilities[predictions.votes.any(axis=1)].astype(float)
    return float(-(shares * np.log(np.clip(probabilities, SMALLEST, None))).sum(axis=1).mean())


def _share_votes(predictions: Predictions) -> tuple[np.ndarray, np.ndarray]:
    """Return the shares of all votes (n, K), single ones too, and the predicted classes (n,) of faces that have any."""
    if predictions.votes is None:
        return np.zeros((0, len(predictions.classes))), np.zeros(0, np.int64)
    voted = predictions.votes.any(axis=1)
    votes = predictions.votes[voted]
    return votes / votes.sum(axis=1, keepdims=True), predictions.predicted[voted]


@dataclass(frozen=True)
class Metric:
    """A number of a run on a target: its name, how it is computed, compared and averaged, and the unit it is written in.

    NaN stands for a target on which it cannot be computed.

    `chance` names what it has to exceed: `largest`, the share of the largest class among the faces, or `uniform`, one in K.
    `beside` says whether the main table shows its mean over unseen targets beside whatever metric the table is of; `about`
    is a sentence for whoever may not know it.
    """

    title: str
    compute: Callable[[Predictions], float]
    higher_is_better: bool = True
    over_targets: Callable[[Sequence[float]], float] = average_targets
    unit: Unit = PERCENT
    beside: bool = False
    about: str = ""
    chance: str = ""

    @property
    def heading(self) -> str:
        """Its title above a column among others, with its unit where that is not percent."""
        return self.title if self.unit == PERCENT else f"{self.title} ({self.unit.name})"


METRICS: dict[str, Metric] = {
    "accuracy": Metric("accuracy", accuracy, chance="largest"),
    "mean_class_accuracy": Metric("mean-class accuracy", mean_class_accuracy, chance="uniform"),
    "macro_f1": Metric("macro-F1", macro_f1, beside=True, chance="uniform"),
    "ece": Metric(
        "ECE",
        calibration_error,
        higher_is_better=False,
        beside=True,
        about="ECE: expected calibration error, the lower the better.",
    ),
    "worst_class_recall": Metric(
        "worst-class recall",
        worst_class_recall,
        about="Worst-class recall: the recall of the class that is recognised worst, which varies more than a mean does.",
    ),
    "auroc": Metric(
        "AUROC",
        auroc,
        about="AUROC: the area under the ROC curve of each class against the rest, in the mean over classes; 50 is chance.",
    ),
    "nll": Metric(
        "NLL",
        negative_log_likelihood,
        higher_is_better=False,
        unit=NATS,
        about="NLL: negative log-likelihood of the true class, in nats.",
    ),
    "brier": Metric(
        "Brier score",
        brier_score,
        higher_is_better=False,
        unit=Unit("from 0 to 2", digits=3, limit=2.0),
        about="Brier score: the squared distance of the probabilities from the true class, from 0 to 2.",
    ),
    "aurc": Metric(
        "AURC",
        area_under_risk_coverage,
        higher_is_better=False,
        about="AURC: the area under the risk–coverage curve: the error rate among the faces of highest confidence, in the "
        "mean over all shares of faces.",
    ),
    "risk_at_80": Metric(
        "risk at 80 %",
        risk_at,
        higher_is_better=False,
        about="Risk at 80 %: the error rate among the four fifths of the faces of highest confidence.",
    ),
    "votes_accuracy": Metric(
        "agreement with votes",
        votes_accuracy,
        about="Agreement with votes: how often one of the people who labelled a face, drawn at random, chose what was "
        "predicted.",
    ),
    "votes_cross_entropy": Metric(
        "cross-entropy to votes",
        votes_cross_entropy,
        higher_is_better=False,
        unit=NATS,
        about="Cross-entropy to votes: between the shares of people's votes and the probabilities, in nats.",
    ),
}


OF_VOTES = ("votes_accuracy", "votes_cross_entropy")  # only of sets whose faces several people labelled


def find_metric(name: str) -> Metric:
    """Return a metric by name; a recall is averaged as their mean is."""
    return METRICS["mean_class_accuracy" if name.startswith(RECALL) else name]


def choose_metrics(names: str) -> list[str]:
    """Return the metrics of `NAME,NAME,…` once each, or of `all`; raise `UserError` for a name that is none."""
    chosen = list(dict.fromkeys(name.strip() for name in names.split(",")))
    if strange := [name for name in chosen if name not in METRICS and name != EVERY]:
        raise unknown("metric", strange[0], [*METRICS, EVERY])
    return list(dict.fromkeys(metric for name in chosen for metric in (METRICS if name == EVERY else [name])))


def score(predictions: Predictions) -> dict[str, float]:
    """Return every metric and recall/CLASS.

    A class of which the target has no face has no recall and is left out of the means; what cannot be computed is left out.
    """
    measured = {name: metric.compute(predictions) for name, metric in METRICS.items()}
    return {
        **{name: value for name, value in measured.items() if not math.isnan(value)},
        **{f"{RECALL}{name}": recall for name, recall in recalls(predictions).items()},
    }
