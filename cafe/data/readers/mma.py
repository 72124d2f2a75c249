"""MMA facial expression (MMAFEDB), as it is distributed: MMAFEDB/{train,valid,test}/{angry,…,surprise}/*.jpg.

It very likely contains FER2013, since 28,709, 3,589 and 3,589 of its pictures are grey, as many as that has. FERPlus and MMA
can be evaluated against each other only without the faces they share.
"""

from __future__ import annotations

from upath import UPath

from cafe.data.indexing import Listing, read_expected
from cafe.data.layouts import SPLIT_NAMES, Tree, list_by_folder


def read_mma(root: UPath) -> Listing:
    """List the faces of MMA by the names of their folders."""
    layout, wanted = "MMAFEDB: {train,valid,test}/EXPRESSION", "folders {train,valid,test}/{angry,disgust,…} of MMA"
    return list_by_folder(Tree.open(root), SPLIT_NAMES, "mma", layout, read_expected("mma"), wanted)
