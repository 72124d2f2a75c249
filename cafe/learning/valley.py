"""SWAD's rule: the weights of a training are averaged from where its loss on held-out faces is lowest to where it rises.

"SWAD: Domain Generalization by Seeking Flat Minima", Cha et al., NeurIPS 2021, Alg. 1, with the epoch as the interval; there
the weights of every step are averaged, here those at the end of each epoch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

CONVERGED = 3  # N_s: intervals in which the loss does not get lower than before them
OVERFITTED = 6  # N_e: intervals in which it stays above the threshold
TOLERANCE = 1.3  # r: the threshold, by the mean loss of the first N_s intervals


def find_valley(losses: Sequence[float]) -> tuple[int, int]:
    """Return the first and the last epoch, from 1, whose weights are averaged, by the loss after each.

    Where the loss falls until the end, that is the last epoch alone, as in the released code.
    """
    places = range(len(losses) - CONVERGED + 1)
    start = next((place for place in places if losses[place] == min(losses[place : place + CONVERGED])), None)
    if start is None:
        return len(losses), len(losses)
    threshold = TOLERANCE * float(np.mean(losses[start : start + CONVERGED]))
    for end in range(start + CONVERGED, len(losses)):
        if end + 1 - OVERFITTED >= start and min(losses[end + 1 - OVERFITTED : end + 1]) > threshold:
            return start + 1, end + 1 - OVERFITTED
    return start + 1, len(losses)
