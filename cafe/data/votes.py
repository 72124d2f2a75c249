"""Votes: several people labelled each face, and how often each class was chosen says more than the most frequent one."""

from __future__ import annotations

import numpy as np

MANY = 5  # voters among whom a single vote is taken for a slip


def strike_single(votes: np.ndarray) -> np.ndarray:
    """Return votes (N, K) without single ones where at least five people voted; where nothing is left, all stay.

    FERPlus' rule (Barsoum et al., ICMI 2016, released script) for its ten people.
    """
    struck = np.where((votes == 1) & (votes.sum(axis=1, keepdims=True) >= MANY), 0, votes)
    result: np.ndarray = np.where(struck.any(axis=1, keepdims=True), struck, votes)
    return result


def share(votes: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the shares of the classes (N, K) float32 to learn from votes (N, K), without single ones.

    A face without votes has all of its share at its label (N,), or nowhere where that is -1, of no class.
    """
    struck = strike_single(votes).astype(np.float64)
    silent = ~struck.any(axis=1) & (labels >= 0)
    struck[silent, labels[silent]] = 1
    sums = struck.sum(axis=1, keepdims=True)
    shares: np.ndarray = np.divide(struck, sums, out=np.zeros_like(struck), where=sums > 0).astype(np.float32)
    return shares
