"""How many faces a complete copy of each data set holds, and where a copy differs.

Results of six points' difference come from copies and splits that are not the same; a copy is therefore counted, per split
and class, before anything is computed from it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from cafe.data.expressions import EXPRESSIONS

TOTAL = "all"  # stands for the class where only the sum of a split is known


@dataclass(frozen=True)
class Expected:
    """What a split holds: faces per class in the order of `EXPRESSIONS`, or their total alone.

    `source` tells where the numbers come from; `doubt`, when there is one, why they may be wrong.
    """

    split: str
    counts: tuple[int, ...]
    source: str
    doubt: str = ""

    @property
    def certain(self) -> bool:
        """Whether another number means another data set: it is known per class and nobody doubts it."""
        return len(self.counts) == len(EXPRESSIONS) and not self.doubt


@dataclass(frozen=True)
class Difference:
    """A number of a split and class that is not the expected one."""

    split: str
    expression: str
    expected: int
    found: int
    certain: bool
    source: str


def count_differences(expected: tuple[Expected, ...], found: Counter[tuple[str, int]]) -> list[Difference]:
    """Return where the faces found per (split, label) differ from what is expected.

    A split that is not there at all is a certain difference, however vague its number.
    """
    differences = []
    for split in expected:
        classes = [found[split.split, label] for label in range(len(EXPRESSIONS))]
        known = len(split.counts) == len(EXPRESSIONS)
        names, numbers = (EXPRESSIONS, classes) if known else ((TOTAL,), [sum(classes)])
        certain = split.certain or not any(classes)
        source = f"{split.source}; {split.doubt}" if split.doubt else split.source
        differences += [
            Difference(split.split, name, wanted, number, certain, source)
            for name, wanted, number in zip(names, split.counts, numbers, strict=True)
            if number != wanted
        ]
    return differences


def by_name(**counts: int) -> tuple[int, ...]:
    """Return counts, given by expression, in the order of `EXPRESSIONS`."""
    return tuple(counts[name] for name in EXPRESSIONS)


RAFDB = (
    Expected(
        "train",
        by_name(surprise=1290, fear=281, disgust=717, happiness=4772, sadness=1982, anger=705, neutral=2524),
        "counted in the label file of the basic set",
    ),
    Expected(
        "test",
        by_name(surprise=329, fear=74, disgust=160, happiness=1185, sadness=478, anger=162, neutral=680),
        "counted in the label file of the basic set",
    ),
)

AFFECTNET = (
    Expected(
        "train",
        by_name(surprise=14090, fear=6378, disgust=3803, happiness=134415, sadness=25459, anger=24882, neutral=74874),
        "the manually annotated release",
    ),
    Expected("val", (500,) * len(EXPRESSIONS), "the manually annotated release"),
)

# Back-solved from printed percentages; the usual size of the validation set.
SFEW = (
    Expected("train", (891,), "the number of aligned training faces that fits published percentages", "unverified"),
    Expected("val", (431,), "the number of aligned validation faces most papers use", "unverified"),
)

MMA = (
    Expected(
        "train",
        by_name(surprise=8113, fear=4859, disgust=3231, happiness=28592, sadness=12223, anger=6566, neutral=29384),
        "the distributed folders, as others counted them",
    ),
    Expected(
        "val",
        by_name(surprise=1474, fear=659, disgust=656, happiness=5475, sadness=2236, anger=1017, neutral=5839),
        "the distributed folders, as others counted them",
    ),
    Expected(
        "test",
        by_name(surprise=1475, fear=691, disgust=655, happiness=5459, sadness=2177, anger=1041, neutral=5858),
        "the distributed folders, as others counted them",
    ),
)
