"""Readers: each turns one distributed layout into the faces of a manifest. A new data set is a file and a line here."""

from __future__ import annotations

from collections.abc import Callable

from cafe.data.indexing import Listing
from cafe.data.packed.shards import read_any_table, read_webdataset
from cafe.data.readers.affectnet import read_affectnet
from cafe.data.readers.expw import read_expw
from cafe.data.readers.fer2013 import read_fer2013
from cafe.data.readers.ferplus import read_ferplus
from cafe.data.readers.folder import read_folder, read_synthetic
from cafe.data.readers.mma import read_mma
from cafe.data.readers.named import read_ckplus, read_jaffe, read_kdef
from cafe.data.readers.rafdb import read_rafdb
from cafe.data.readers.sfew import read_sfew
from cafe.plugins import find_entry, offer

Reader = Callable[..., Listing]  # of the root, and what else the set lets choose

DATASETS: dict[str, Reader] = {
    "affectnet": read_affectnet,
    "ckplus": read_ckplus,
    "expw": read_expw,
    "fer2013": read_fer2013,  # with its own labels
    "ferplus": read_ferplus,  # rule: majority or argmax
    "folder": read_folder,  # ROOT[/SPLIT][/PERSON]/EXPRESSION/**/*.jpg, or a table beside pictures
    "jaffe": read_jaffe,
    "kdef": read_kdef,
    "mma": read_mma,
    "rafdb": read_rafdb,
    "sfew": read_sfew,
    "synthetic": read_synthetic,  # a domain drawn by `cafe data synth`
    "table": read_any_table,  # CSV, JSON lines or Parquet of path,label[,split,group], or of the pictures themselves
    "webdataset": read_webdataset,  # tar shards
}
offer("datasets", DATASETS, "a function that returns a Listing", callable)


def find_reader(kind: str) -> Reader:
    """Return the reader of a kind of data set, ours or a plug-in's; raise `UserError` naming all."""
    found: Reader = find_entry("datasets", kind, "kind of data set")
    return found
