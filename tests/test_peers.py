"""The comparison with other packages: which face of a scene counts, the interval of a difference, the page it fills."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from cafe.results.metrics import macro_f1
from cafe.results.predictions import Predictions
from cafe.results.significance.statistics import paired_bootstrap

MEASUREMENTS = Path(__file__).parents[1] / "measurements"


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(MEASUREMENTS))
    import peers

    yield peers
    for name in ("peers", "peers_page", "peers_packages"):
        sys.modules.pop(name)


def test_of_a_scene_the_largest_face_within_the_pasted_picture_counts(peers: ModuleType) -> None:
    sides = np.array([[100, 100, 200, 200], [0, 0, 50, 50], [0, 0, 50, 50]])
    nothing = np.zeros(3, int)
    faces = peers.Faces("scenes", [], nothing, nothing, sides, nothing > 0)
    pictures = np.array([0, 0, 0, 1])
    boxes = np.array([[120, 120, 50, 50], [110, 110, 150, 150], [0, 0, 190, 190], [60, 60, 10, 10]])
    assert peers.choose_rows(pictures, boxes, faces).tolist() == [
        1
    ]  # the third's middle is outside, picture 2 has none


def test_the_interval_of_a_difference_is_that_of_resampled_faces(peers: ModuleType) -> None:
    random = np.random.default_rng(3)
    labels = random.integers(0, 7, 400)
    ours, theirs = (np.where(random.random(400) < share, labels, random.integers(0, 7, 400)) for share in (0.7, 0.6))
    found = peers.bootstrap(labels, ours, theirs, np.arange(400))
    expected = paired_bootstrap([(ours == labels).astype(float) - (theirs == labels)])
    assert found["accuracy"] == pytest.approx((expected.mean, expected.low, expected.high), abs=0.004)
    one, other = (
        macro_f1(Predictions([], labels, np.eye(7, dtype=np.float32)[predicted], {})) for predicted in (ours, theirs)
    )
    mean, low, high = found["macro_f1"]
    assert mean == pytest.approx(one - other, abs=1e-6)
    assert low < mean < high
    pairs = peers.bootstrap(labels, ours, theirs, np.arange(400) // 100)["accuracy"]
    each = np.reshape((ours == labels).astype(float) - (theirs == labels), (4, 100)).mean(axis=1)
    assert each.min() <= pairs[1] < pairs[2] <= each.max()  # four groups: no draw lies beyond them


def test_sets_not_measured_again_stay_unless_the_model_is_another(peers: ModuleType) -> None:
    def pair(name: str, value: float) -> dict[str, object]:
        return {"model": "ours", "peer": "fer", "set": name, "where": "crops", "accuracy": value}

    before = {"digest": "a", "news": {"crops": 1, "scenes": 1}, "cinema": {"crops": 1}}
    known = {"models": {"ours": before}, "differences": [pair("news", 1), pair("cinema", 1)]}
    found = {"models": {"ours": {"digest": "a", "news": {"crops": 2}}}, "differences": [pair("news", 2)]}
    peers.merge(known, found)
    assert known["models"] == {"ours": before | {"news": {"crops": 2, "scenes": 1}}}
    assert known["differences"] == [pair("cinema", 1), pair("news", 2)]
    other = {"models": {"ours": {"digest": "b", "news": {"crops": 3}}}, "differences": [pair("news", 3)]}
    peers.merge(known, other)
    assert known == other


def test_the_page_shows_what_was_measured(peers: ModuleType) -> None:
    import peers_page

    results = json.loads((MEASUREMENTS / "peers.json").read_text())
    page = (MEASUREMENTS.parent / "docs" / "peers.md").read_text()
    assert all(table in page for table in peers_page.write_tables(results))
