"""Numbers from predictions alone: accuracy, recall per expression, mean-class accuracy, macro-F1, and means with intervals.

Predictions are data: one row per sample with its label and class probabilities, kept as Parquet, so that every number can be
computed again and argued with.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy import stats
from sklearn.metrics import confusion_matrix, f1_score
from upath import UPath

from cafe.data.expressions import EXPRESSIONS

CLASSES = range(len(EXPRESSIONS))


@dataclass(frozen=True)
class Predictions:
    """What a run said of a target's samples: labels (N,) and class probabilities (N, 7); `about` tells which."""

    sample_ids: list[str]
    labels: np.ndarray
    probabilities: np.ndarray
    about: dict[str, str]

    @property
    def predicted(self) -> np.ndarray:
        """The most probable class of every sample, (N,)."""
        return np.asarray(self.probabilities.argmax(axis=1))

    def save(self, path: UPath) -> None:
        """Write as Parquet: sample_id, label, probabilities."""
        probabilities = pa.FixedSizeListArray.from_arrays(
            pa.array(self.probabilities.astype(np.float32).ravel()), len(EXPRESSIONS)
        )
        table = pa.table({
            "sample_id": pa.array(self.sample_ids, pa.string()),
            "label": pa.array(self.labels, pa.int8()),
            "probabilities": probabilities,
        })  # fmt: skip
        sink = pa.BufferOutputStream()
        about = {**self.about, "expressions": json.dumps(EXPRESSIONS)}
        pq.write_table(table.replace_schema_metadata(about), sink)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(sink.getvalue().to_pybytes())

    @classmethod
    def load(cls, path: UPath) -> Predictions:
        """Read what `save` wrote."""
        table = pq.read_table(pa.BufferReader(path.read_bytes()))
        probabilities = table["probabilities"].combine_chunks().flatten().to_numpy().reshape(-1, len(EXPRESSIONS))
        about = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
        labels = table["label"].to_numpy().astype(np.int64)
        return cls(table["sample_id"].to_pylist(), labels, probabilities, about)


def confusion(predictions: Predictions) -> np.ndarray:
    """Return counts (7, 7): rows are true classes, columns predicted ones."""
    return np.asarray(confusion_matrix(predictions.labels, predictions.predicted, labels=list(CLASSES)))


def score(predictions: Predictions) -> dict[str, float]:
    """Return accuracy, mean_class_accuracy, macro_f1 and recall/EXPRESSION, all in 0–1.

    Classes without a sample have no recall; the means are over the classes the target has.
    """
    counts = confusion(predictions)
    support = counts.sum(axis=1)
    present = [label for label in CLASSES if support[label]]
    recalls = {f"recall/{EXPRESSIONS[label]}": float(counts[label, label] / support[label]) for label in present}
    return {
        "accuracy": float(np.trace(counts) / support.sum()),
        "mean_class_accuracy": float(np.mean(list(recalls.values()))),
        "macro_f1": float(
            f1_score(predictions.labels, predictions.predicted, labels=present, average="macro", zero_division=0)
        ),
        **recalls,
    }


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and the half-width of its 95 % t-interval; no interval from a single seed."""

    mean: float
    half_width: float
    count: int

    def __str__(self) -> str:
        """Return percent, as the field prints it."""
        if math.isnan(self.mean):
            return "–"
        interval = "" if math.isnan(self.half_width) else f" ± {100 * self.half_width:.1f}"
        return f"{100 * self.mean:.1f}{interval}"


def estimate(values: Sequence[float], confidence: float = 0.95) -> Estimate:
    """Return the mean and Student's t-interval of independent runs."""
    count = len(values)
    if count < 2:
        return Estimate(float(values[0]) if count else math.nan, math.nan, count)
    quantile = float(stats.t.ppf((1 + confidence) / 2, count - 1))
    return Estimate(float(np.mean(values)), quantile * float(np.std(values, ddof=1)) / math.sqrt(count), count)
