"""A union of manifests: the faces of several sources, which a method is trained on as if they were one data set."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
from upath import UPath

from cafe.data.manifest import Manifest


@dataclass(frozen=True)
class Union(Manifest):
    """The rows of several manifests, one manifest after another, called `a+b`.

    A face keeps its root, its box and its sample_id, so its views are those it has alone. `kind` is that of the manifests
    where all agree, and else empty.
    """

    parts: tuple[Manifest, ...] = ()

    @cached_property
    def starts(self) -> np.ndarray:
        """The first row of every manifest, (D,)."""
        return np.cumsum([0, *map(len, self.parts[:-1])])

    @cached_property
    def domains(self) -> np.ndarray:
        """Which of the manifests every row is of, (N,)."""
        return np.repeat(np.arange(len(self.parts)), [len(part) for part in self.parts])

    def path(self, row: int) -> UPath:
        """Where the image of a row lies."""
        part: Manifest = self.parts[self.domains[row]]
        return part.path(int(row - self.starts[self.domains[row]]))

    @cached_property
    def digest(self) -> str:
        """Names the manifests."""
        return _join([part.digest for part in self.parts])

    @cached_property
    def image_digest(self) -> str:
        """Names the images of the manifests."""
        return _join([part.image_digest for part in self.parts])


def unite(manifests: Sequence[Manifest]) -> Manifest:
    """Return the union of several manifests, or the only one as it is."""
    if len(manifests) == 1:
        return manifests[0]
    kinds = {manifest.kind for manifest in manifests}
    name, table = "+".join(part.name for part in manifests), pa.concat_tables([part.table for part in manifests])
    return Union(name, "", table, kinds.pop() if len(kinds) == 1 else "", parts=tuple(manifests))


def parts_of(manifest: Manifest) -> tuple[Manifest, ...]:
    """Return the manifests of a union, or the manifest itself."""
    return manifest.parts if isinstance(manifest, Union) else (manifest,)


def _join(digests: Sequence[str]) -> str:
    return hashlib.sha256("+".join(digests).encode()).hexdigest()
