"""Readers: each turns one distributed layout into the faces of a manifest. A new data set is a file and a line here."""

from __future__ import annotations

from collections.abc import Callable

from upath import UPath

from cafe.datasets.files import Listing
from cafe.datasets.folder import read_folder
from cafe.datasets.synthetic import read_synthetic
from cafe.datasets.table import read_table

Reader = Callable[[UPath], Listing]

DATASETS: dict[str, Reader] = {
    "folder": read_folder,  # ROOT[/SPLIT]/EXPRESSION/**/*.jpg
    "synthetic": read_synthetic,  # a domain drawn by `cafe data synth`
    "table": read_table,  # CSV or Parquet of path,label[,split,group]
}
