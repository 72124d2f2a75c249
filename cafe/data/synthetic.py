"""Reader of a domain of drawn faces, as `cafe data synth` writes it."""

from __future__ import annotations

from dataclasses import replace

from upath import UPath

from cafe.data.folder import read_folder
from cafe.data.indexing import Listing


def identity_of(file_name: str) -> str:
    """Return the identity a written file shows, `id0007` of `id0007_01.jpg`."""
    return file_name.rsplit("/", 1)[-1].split("_", 1)[0]


def read_synthetic(root: UPath) -> Listing:
    """List what `write` drew of one domain; every face belongs to the group of its identity."""
    listing = read_folder(root)
    files = [replace(file, group=identity_of(file.path.rpartition("/")[2])) for file in listing.files]
    return replace(listing, files=files, kind="synthetic")
