"""Draws of hyper-parameters: every setting of a method from a declared distribution, by draw, trial and its name alone.

As DomainBed does ("In Search of Lost Domain Generalization", Gulrajani and Lopez-Paz, ICLR 2021, Sec. 4): draw 0 are the
settings as they are, every other one is random, and each trial, which is a seed, has draws of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cafe.randomness import random_generator


@dataclass(frozen=True)
class Power:
    """A power with an exponent between two numbers, drawn uniformly."""

    base: float
    low: float
    high: float
    whole: bool = False  # rounded down to a whole number

    def draw(self, generator: np.random.Generator) -> float | int:
        """Return a value."""
        value = self.base ** generator.uniform(self.low, self.high)
        return int(value) if self.whole else float(f"{value:.6g}")


@dataclass(frozen=True)
class Choice:
    """One of some numbers, each as likely as the others."""

    values: tuple[float, ...]

    def draw(self, generator: np.random.Generator) -> float | int:
        """Return a value."""
        return self.values[generator.integers(len(self.values))]


Distribution = Power | Choice


def draw_settings(distributions: dict[str, Distribution], draw: int, seed: int) -> dict[str, float | int]:
    """Return the settings of a draw of a trial, nothing for draw 0.

    A setting depends on no other one: with one more of them, or one fixed, the rest are drawn as they were.
    """
    if draw == 0:
        return {}
    return {name: known.draw(random_generator("draw", draw, seed, name)) for name, known in distributions.items()}
