"""Readers: each turns one distributed layout into the faces of a manifest. A new data set is a file and a line here."""

from __future__ import annotations

from collections.abc import Callable

from cafe.data.affectnet import read_affectnet
from cafe.data.ferplus import read_ferplus
from cafe.data.folder import read_folder, read_synthetic, read_table
from cafe.data.indexing import Listing
from cafe.data.mma import read_mma
from cafe.data.rafdb import read_rafdb
from cafe.data.sfew import read_sfew

Reader = Callable[..., Listing]  # of the root, and what else the set lets choose

DATASETS: dict[str, Reader] = {
    "affectnet": read_affectnet,
    "ferplus": read_ferplus,  # rule: majority or argmax
    "folder": read_folder,  # ROOT[/SPLIT]/EXPRESSION/**/*.jpg
    "mma": read_mma,
    "rafdb": read_rafdb,
    "sfew": read_sfew,
    "synthetic": read_synthetic,  # a domain drawn by `cafe data synth`
    "table": read_table,  # CSV or Parquet of path,label[,split,group]
}
