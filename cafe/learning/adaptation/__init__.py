"""Adaptation at test time: methods that learn from the unlabelled faces they evaluate.

Whoever adapts has seen the target (transductive): such numbers are no generalisation to a set that nobody has seen. Faces
come once, in an order drawn from a fixed seed, since manifests list them class by class; evaluated again, they get the same.
SHOT alone sees them all before it predicts any.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cafe.learning.adaptation.sar import check_sar, predict_sar
from cafe.learning.adaptation.shot import check_shot, predict_shot
from cafe.learning.adaptation.t3a import check_t3a, predict_t3a
from cafe.learning.adaptation.tent import check_tent, predict_tent
from cafe.methods.method import Method

ADAPTATIONS: dict[str, tuple[Callable[[Method], object], Callable[..., np.ndarray]]] = {
    "tent": (check_tent, predict_tent),  # what it needs of a method, and how it evaluates
    "t3a": (check_t3a, predict_t3a),
    "sar": (check_sar, predict_sar),
    "shot": (check_shot, predict_shot),
}
