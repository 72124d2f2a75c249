"""The published numbers: copied right, and set only beside what was evaluated alike."""

from __future__ import annotations

import numpy as np
import pytest

from cafe.results.protocols import PROTOCOLS
from cafe.results.published import SETS, find_published, find_published_classes, load_published


def test_the_published_tables_have_the_published_means() -> None:
    tables = load_published()
    means = {source: (np.mean(row), np.mean([v for kind, v in zip(SETS, row, strict=True) if kind != source]))
             for source, row in tables["accuracy"]["cafe"].items()}  # fmt: skip
    assert means["rafdb"] == pytest.approx((63.48, 57.17), abs=0.006)
    assert means["ferplus"] == pytest.approx((62.28, 55.47), abs=0.006)
    assert means["affectnet"] == pytest.approx((61.67, 60.87), abs=0.006)  # printed as 60.27, which its cells are not
    assert means["sfew"] == pytest.approx((45.04, 42.85), abs=0.006)
    assert means["mma"] == pytest.approx((61.76, 60.71), abs=0.006)
    for method, row in tables["per_class"].items():
        assert np.mean(row[:7]) == pytest.approx(row[8], abs=0.02), method
        assert row[7] == tables["accuracy"][method]["rafdb"][1]
    rows = [row for name in ("accuracy", "from_scratch") for own in tables[name].values() for row in own.values()]
    assert {len(row) for row in rows} == {5}


def test_only_what_a_protocol_evaluates_as_the_paper_did_is_comparable() -> None:
    assert set(find_published("cafe", "rafdb", "file:x", PROTOCOLS["paper"])) == set(SETS)
    assert set(find_published("cafe", "rafdb", "file:x", PROTOCOLS["clean"])) == {"rafdb", "ferplus"}
    assert find_published("cafe", "rafdb", "scratch", PROTOCOLS["clean"])["rafdb"] == pytest.approx(0.8592)
    assert find_published("cafe", "mma", "scratch", PROTOCOLS["paper"]) == {}  # published for RAF-DB alone
    assert find_published("cafe", "folder", "file:x", PROTOCOLS["paper"]) == {}
    assert find_published("finetune", "rafdb", "file:x", PROTOCOLS["paper"]) == {}
    assert find_published_classes("cafe", "rafdb", "ferplus", "file:x", PROTOCOLS["clean"])["fear"] == pytest.approx(
        0.3735
    )
    assert find_published_classes("cafe", "ferplus", "rafdb", "file:x", PROTOCOLS["clean"]) == {}
