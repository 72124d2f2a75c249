"""Numbers from predictions, against hand-computed ones, scikit-learn's and SciPy's."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import balanced_accuracy_score, f1_score
from upath import UPath

from cafe.report.figures import draw_confusion
from cafe.results.metrics import Estimate, confusion, estimate, score
from cafe.results.predictions import Predictions


def predictions(labels: list[int], predicted: list[int]) -> Predictions:
    ids = [f"{number}.jpg" for number in range(len(labels))]
    return Predictions(ids, np.array(labels), np.eye(7, dtype=np.float32)[predicted], {"target": "x"})


def test_a_worked_example() -> None:
    scores = score(predictions([0, 0, 0, 0, 3, 3], [0, 0, 0, 3, 3, 6]))
    assert scores["accuracy"] == pytest.approx(4 / 6)
    assert scores["recall/surprise"] == pytest.approx(3 / 4)
    assert scores["recall/happiness"] == pytest.approx(1 / 2)
    assert scores["mean_class_accuracy"] == pytest.approx(5 / 8)
    assert scores["macro_f1"] == pytest.approx((6 / 7 + 1 / 2) / 2)
    assert "recall/fear" not in scores  # the target has no fearful face


def test_scores_agree_with_scikit_learn_on_random_predictions() -> None:
    random = np.random.default_rng(0)
    labels, predicted = random.integers(0, 7, (2, 500)).tolist()
    scores = score(predictions(labels, predicted))
    assert scores["mean_class_accuracy"] == pytest.approx(balanced_accuracy_score(labels, predicted))
    assert scores["macro_f1"] == pytest.approx(f1_score(labels, predicted, average="macro"))


def test_predictions_survive_their_file(tmp_path: Path) -> None:
    before = predictions([1, 2], [2, 2])
    before.save(UPath(tmp_path / "p" / "cinema.parquet"))
    after = Predictions.load(UPath(tmp_path / "p" / "cinema.parquet"))
    assert after.sample_ids == before.sample_ids
    assert after.labels.tolist() == [1, 2]
    np.testing.assert_array_equal(after.probabilities, before.probabilities)
    assert after.about["target"] == "x"


def test_the_interval_is_students_t() -> None:
    values = [0.5, 0.6, 0.65]
    result = estimate(values)
    low, high = stats.t.interval(0.95, 2, loc=np.mean(values), scale=stats.sem(values))
    assert (result.mean - result.half_width, result.mean + result.half_width) == pytest.approx((low, high))
    assert str(result) == "58.3 ± 19.0"


def test_the_interval_covers_the_truth_95_times_in_100() -> None:
    random = np.random.default_rng(1)
    covered = [abs(e.mean - 0.5) <= e.half_width for e in (estimate(random.normal(0.5, 0.1, 3)) for _ in range(4000))]
    assert 0.93 < np.mean(covered) < 0.97


def test_one_seed_has_no_interval_and_none_no_number() -> None:
    assert str(estimate([0.5])) == "50.0"
    assert str(estimate([])) == "–"
    assert math.isnan(Estimate(0.5, math.nan, 1).half_width)


def test_the_confusion_figure_shows_percent_of_the_true_class() -> None:
    counts = confusion(predictions([0, 0, 0, 0, 3, 3], [0, 0, 0, 3, 3, 6]))
    assert counts[0].tolist() == [3, 0, 0, 1, 0, 0, 0]
    axes = draw_confusion(counts, "title").axes[0]
    shown = {(int(t.get_position()[1]), int(t.get_position()[0])): t.get_text() for t in axes.texts}
    assert (shown[0, 0], shown[0, 3], shown[3, 6], shown[0, 1]) == ("75", "25", "50", "0")
    assert (1, 0) not in shown  # no fearful face, no percent
