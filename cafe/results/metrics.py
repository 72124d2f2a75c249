"""Metrics of predictions: accuracy, recalls, macro-F1 and calibration, and means over seeds with their intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy  # which loads a part of it only when it is used

from cafe.data.expressions import EXPRESSIONS
from cafe.results.predictions import Predictions

TITLES = {"accuracy": "accuracy", "mean_class_accuracy": "mean-class accuracy", "macro_f1": "macro-F1", "ece": "ECE"}
METRICS = tuple(TITLES)
BINS = 15  # of confidence, as in Guo et al.


def confusion(predictions: Predictions) -> np.ndarray:
    """Return counts (7, 7): rows are true classes, columns predicted ones."""
    classes = len(EXPRESSIONS)
    places = predictions.labels * classes + predictions.predicted
    return np.bincount(places, minlength=classes**2).reshape(classes, classes)


def score(predictions: Predictions) -> dict[str, float]:
    """Return accuracy, mean_class_accuracy, macro_f1, ece and recall/EXPRESSION, all in 0–1.

    An expression of which the target has no face has no recall and is left out of the means.
    """
    counts = confusion(predictions)
    right, support, claimed = np.diag(counts), counts.sum(axis=1), counts.sum(axis=0)
    present = np.flatnonzero(support)
    recalls = right[present] / support[present]
    return {
        "accuracy": float(right.sum() / support.sum()),
        "mean_class_accuracy": float(recalls.mean()),
        "macro_f1": float(np.mean(2 * right[present] / (support + claimed)[present])),
        "ece": calibration_error(predictions),
        **{f"recall/{EXPRESSIONS[label]}": float(recall) for label, recall in zip(present, recalls, strict=True)},
    }


def calibration_error(predictions: Predictions) -> float:
    """Return the expected calibration error: how far confidence is from accuracy, averaged over faces.

    With 15 equal bins of confidence (Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, Eq. 3).
    """
    confidence = predictions.probabilities.max(axis=1).astype(float)
    bins = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    surplus = (predictions.predicted == predictions.labels) - confidence
    return float(np.abs(np.bincount(bins, surplus, BINS)).sum() / len(surplus))


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, the half-width of its 95 % t-interval (NaN from a single seed), and the values themselves."""

    mean: float
    half_width: float
    values: tuple[float, ...] = ()

    @property
    def count(self) -> int:
        """How many seeds there are."""
        return len(self.values)

    def __str__(self) -> str:
        """Return percent, as the field prints it; two seeds as they are, for their interval would say nothing."""
        if math.isnan(self.mean):
            return "–"
        if self.count == 2:
            return " / ".join(f"{100 * value:.1f}" for value in self.values)
        interval = "" if math.isnan(self.half_width) else f" ± {100 * self.half_width:.1f}"
        return f"{100 * self.mean:.1f}{interval}"


def estimate(values: Sequence[float], confidence: float = 0.95) -> Estimate:
    """Return the mean of independent runs with Student's t-interval."""
    count = len(values)
    if count < 2:
        return Estimate(float(values[0]) if count else math.nan, math.nan, tuple(values))
    quantile = float(scipy.special.stdtrit(count - 1, (1 + confidence) / 2))
    half_width = quantile * float(np.std(values, ddof=1)) / math.sqrt(count)
    return Estimate(float(np.mean(values)), half_width, tuple(values))
