"""Label names in any spelling."""

from __future__ import annotations

import pytest

from cafe.data.expressions import EXPRESSIONS, parse_expression
from cafe.errors import UserError


def test_the_order_is_the_published_one() -> None:
    assert EXPRESSIONS == ("surprise", "fear", "disgust", "happiness", "sadness", "anger", "neutral")


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("happiness", 3), ("Happy", 3), (" ANGRY ", 5), ("suprise", 0), ("Surprised", 0), ("fearful", 1), ("afraid", 1),
        ("Disgusted", 2), ("sad", 4), ("neutral", 6), ("3_sadness", 4),
    ],
)  # fmt: skip
def test_known_spellings(name: str, label: int) -> None:
    assert parse_expression(name) == label


@pytest.mark.parametrize("name", ["contempt", "3", "", "happyish"])
def test_an_unknown_name_lists_the_known_ones(name: str) -> None:
    with pytest.raises(UserError, match=r"Unknown expression .*choose afraid, anger.*surprise"):
        parse_expression(name)
