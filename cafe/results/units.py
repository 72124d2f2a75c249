"""Units: how the numbers of a metric are written wherever they are printed, shares in percent and others as they are."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Unit:
    """How a number is written: what it is multiplied by, its digits behind the point, and the `name` of what it is then in.

    No number can be above its `limit`.
    """

    name: str
    scale: int = 1
    digits: int = 2
    limit: float = math.inf

    def round(self, value: float) -> float:
        """Return a number as it is printed, so that two that look alike are equal."""
        return round(self.scale * value, self.digits)

    def write(self, value: float) -> str:
        """Return a number as text, NaN as a dash."""
        return "–" if math.isnan(value) else f"{self.scale * value:z.{self.digits}f}"

    def write_difference(self, value: float) -> str:
        """Return the difference of two numbers as text with its sign, NaN as a dash."""
        return "–" if math.isnan(value) else f"{self.scale * value:+z.{self.digits}f}".replace("-", "−")


PERCENT = Unit("percent", scale=100, digits=1, limit=1.0)
NATS = Unit("nats")
