"""MMA facial expression (MMAFEDB), as it is distributed: MMAFEDB/{train,valid,test}/{angry,…,surprise}/*.jpg.

It very likely embeds FER2013, since as many of its grey pictures are 28,709, 3,589 and 3,589 as that has: judge FERPlus
against it, or the reverse, only without the faces they share.
"""

from __future__ import annotations

from upath import UPath

from cafe.data.counts import MMA
from cafe.data.indexing import Listing
from cafe.data.layouts import Tree, list_by_folder

SPLITS = {"train": "train", "valid": "val", "val": "val", "validation": "val", "test": "test"}


def read_mma(root: UPath) -> Listing:
    """List the faces of MMA by the names of their folders."""
    tree = Tree.open(root)
    wanted = "folders {train,valid,test}/{angry,disgust,…} of MMA"
    tree, files, dropped = list_by_folder(tree, SPLITS, wanted)
    ignored = len(tree.images) - len(files) - dropped.total()
    layout = "MMAFEDB: {train,valid,test}/EXPRESSION"
    return Listing(tree.root, files, layout, "mma", ignored, dropped, packed=tree.packed, expected=MMA)
