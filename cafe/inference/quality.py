"""What makes a prediction doubtful before any network has looked: a face that is small, blurred or turned away.

Flags, never filters: every face that is found gets its prediction.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from cafe.data.alignment import Detection

# The side of FER2013's pictures ("Challenges in Representation Learning", Goodfellow et al. 2013), the coarsest of the sets
# that recognisers are trained on.
SMALL = 48
# Sharpness is measured at one size, so that it does not depend on the camera's.
SIDE = 112
# Of 119 press photographs and film stills three lie below it; blurred by 3 of 224 pixels (Gaussian), three in four do.
BLURRED = 0.008
TURNED = 0.3  # distances of the eyes: about where three-quarter views begin


@dataclass(frozen=True)
class Quality:
    """Of a face: the shorter side of its box in pixels, how sharp it is, and how far it is turned (None: not known)."""

    side: float
    sharpness: float
    turn: float | None

    @property
    def small(self) -> bool:
        """Whether its box is narrower than 48 pixels."""
        return self.side < SMALL

    @property
    def blurred(self) -> bool:
        """Whether it has hardly any detail."""
        return self.sharpness < BLURRED

    @property
    def turned(self) -> bool | None:
        """Whether it looks to the side; None where no landmarks are known."""
        return None if self.turn is None else self.turn > TURNED

    @property
    def flags(self) -> list[str]:
        """The names of the flags that are set."""
        return [name for name in ("small", "blurred", "turned") if getattr(self, name)]


def measure_quality(crop: np.ndarray, detection: Detection | None) -> Quality:
    """Return the quality of a face from its aligned crop (S, S, 3) uint8 and, where it was detected, its landmarks."""
    if detection is None:
        return Quality(min(crop.shape[:2]), measure_sharpness(crop), None)
    return Quality(detection.size, measure_sharpness(crop), measure_turn(detection))


def measure_sharpness(crop: np.ndarray) -> float:
    """Return the variance of the Laplacian of the grey face at 112 pixels, as a share of the variance of its grey levels.

    The measure of "Diatom autofocusing in brightfield microscopy" (Pech-Pacheco et al., ICPR 2000); the share keeps dark
    and pale pictures, which have small differences everywhere, from counting as blurred.
    """
    grey = np.asarray(Image.fromarray(crop).convert("L").resize((SIDE, SIDE), Image.Resampling.BILINEAR), np.float32)
    contrast = float(grey.var())
    around = np.pad(grey, 1, "symmetric")  # as SciPy's `laplace`, whose import takes .2 s of every start
    laplacian = around[:-2, 1:-1] + around[2:, 1:-1] + around[1:-1, :-2] + around[1:-1, 2:] - 4 * grey
    return float(laplacian.var()) / contrast if contrast > 0 else 0.0


def measure_turn(detection: Detection) -> float | None:
    """Return how far the nose lies from the middle of the eyes, along their line, in distances of the eyes.

    Seen from the front it is 0. The nose stands out of the plane of the eyes, which is how a turn of the head shows ("The
    determination of gaze in images of faces", Gee and Cipolla 1994).
    """
    if detection.nose is None:
        return None
    across = detection.eyes[1] - detection.eyes[0]
    distance = max(float(np.linalg.norm(across)), 1e-6)
    return abs(float((detection.nose - detection.eyes.mean(axis=0)) @ across)) / distance**2
