"""Protocols: which split of each data set a method is judged on, and in which order its colours are read.

Numbers of two protocols are not comparable, so every prediction says by which one it was made and no table mixes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cafe.errors import unknown

if TYPE_CHECKING:
    from cafe.data.manifest import Manifest

JUDGED = ("test", "val")  # the first of them that a set has: the labels of some test sets were never published


@dataclass(frozen=True)
class Protocol:
    """How targets are judged, by the kind of their data set. Training always reads RGB and the split `train`."""

    name: str
    about: str
    splits: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # instead of `JUDGED`
    bgr: frozenset[str] = frozenset()

    @property
    def prefix(self) -> str:
        """What stands before the names of its metrics and files; nothing for `clean`."""
        return "" if self.name == "clean" else f"{self.name}/"

    def channels(self, kind: str) -> str:
        """Return the order of the colours of targets of a kind, `rgb` or `bgr`."""
        return "bgr" if kind in self.bgr else "rgb"

    def judges_like(self, other: Protocol, kind: str) -> bool:
        """Whether another protocol judges targets of a kind on the same split in the same colours."""
        same_split = self.splits.get(kind, JUDGED) == other.splits.get(kind, JUDGED)
        return same_split and self.channels(kind) == other.channels(kind)

    def split(self, target: Manifest, *source_kinds: str) -> str | None:
        """Return the split of a target that is judged, or None when it has none that may be.

        Never the training split of a set the method was trained on, and no labels but those the protocol means.
        """
        if target.kind == "ferplus-argmax":
            return None
        wanted = self.splits.get(target.kind, JUDGED)
        if target.kind in source_kinds and "train" in wanted:
            wanted = JUDGED
        return next((split for split in wanted if len(target.rows(split))), None)


PROTOCOLS = {
    "clean": Protocol(
        "clean", "RGB; SFEW is judged on val, FERPlus on test by the majority rule.", splits={"sfew": ("val",)}
    ),
    # The released test readers convert these sets to RGB and then use the BGR array; their SFEW list has as many faces as
    # the aligned training set, 891.
    "paper": Protocol(
        "paper",
        "the released test readers: BGR for AffectNet, SFEW and MMA; SFEW is judged on train.",
        splits={"sfew": ("train",)},
        bgr=frozenset({"affectnet", "sfew", "mma"}),
    ),
}


def find_protocol(name: str) -> Protocol:
    """Return a protocol by name; raise `UserError` naming those there are."""
    if name not in PROTOCOLS:
        raise unknown("protocol", name, PROTOCOLS)
    return PROTOCOLS[name]
