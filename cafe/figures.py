"""Pictures of results, drawn with matplotlib: the confusion matrix of one run on one target."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from cafe.expressions import EXPRESSIONS


def draw_confusion(counts: np.ndarray, title: str) -> Figure:
    """Draw a confusion matrix (7, 7): rows are true classes in percent of their samples, columns predicted ones."""
    support = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, support, out=np.zeros(counts.shape), where=support > 0)
    figure = Figure(figsize=(6.4, 5.6), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    names = [name.capitalize() for name in EXPRESSIONS]
    axes.set_xticks(range(len(names)), names, rotation=40, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), [f"{name}  ({n})" for name, n in zip(names, support[:, 0], strict=True)])
    axes.set_xlabel("Predicted")
    axes.set_ylabel("True (samples)")
    axes.set_title(title, fontsize=11)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    for row, column in np.ndindex(*counts.shape):
        if support[row]:
            share = shares[row, column]
            axes.text(
                column, row, f"{100 * share:.0f}", ha="center", va="center", color="white" if share > 0.55 else "#333"
            )
    return figure
