"""MMA facial expression (MMAFEDB), as it is distributed: MMAFEDB/{train,valid,test}/{angry,…,surprise}/*.jpg.

It very likely contains FER2013, since 28,709, 3,589 and 3,589 of its pictures are grey, as many as that has. FERPlus and MMA
can be judged against each other only without the faces they share.
"""

from __future__ import annotations

from upath import UPath

from cafe.data.indexing import Expected, Listing
from cafe.data.layouts import Tree, list_by_folder

SPLITS = {"train": "train", "valid": "val", "val": "val", "validation": "val", "test": "test"}
COUNTED = "the distributed folders, as others counted them"
EXPECTED = (  # surprise, fear, disgust, happiness, sadness, anger, neutral
    Expected("train", (8113, 4859, 3231, 28592, 12223, 6566, 29384), COUNTED),
    Expected("val", (1474, 659, 656, 5475, 2236, 1017, 5839), COUNTED),
    Expected("test", (1475, 691, 655, 5459, 2177, 1041, 5858), COUNTED),
)


def read_mma(root: UPath) -> Listing:
    """List the faces of MMA by the names of their folders."""
    layout, wanted = "MMAFEDB: {train,valid,test}/EXPRESSION", "folders {train,valid,test}/{angry,disgust,…} of MMA"
    return list_by_folder(Tree.open(root), SPLITS, "mma", layout, EXPECTED, wanted)
