"""What a run was trained on, and what a target is to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

SETS = ("rafdb", "ferplus", "affectnet", "sfew", "mma")  # kinds of manifests, in the order of published columns
SHARED = frozenset({*SETS, "ckplus", "expw", "jaffe", "kdef"})  # of which any two manifests have pictures in common

# Means are taken over `unseen` targets, or over these and the sources.
SOURCE, UNSEEN = "source", "unseen"
SAME_SET = "same set"  # another manifest of a set the run was trained on
SAME_FACES = "same faces"  # the manifest of another unseen target under a second name: it counts once in means
OTHER_SPLIT = "other split"  # evaluated on another split than the protocol's
UNKNOWN = "unknown"  # the workspace has no manifest of that name any more

# Leave-one-domain-out ("In Search of Lost Domain Generalization", Gulrajani and Lopez-Paz, ICLR 2021): what the source of
# its rows is called. Each run of such a row, a fold, is trained on all domains but the one it is evaluated on.
ALL_BUT_TARGET = "all but target"


@dataclass(frozen=True)
class Source:
    """A manifest that was trained on: its name, the kind of its data set and its digest."""

    name: str
    kind: str
    digest: str


def find_relation(sources: Sequence[Source], target: str, split: str, kind: str, digest: str) -> str:
    """Return what a target is to a run with these sources, from the kind and the digest of its manifest.

    `split` is set where it was evaluated on another one than the protocol's.
    """
    if split:
        return OTHER_SPLIT
    if any(source.name == target for source in sources):
        return SOURCE
    same = any(
        digest == source.digest or (_set_of(kind) == _set_of(source.kind) and _set_of(kind) in SHARED)
        for source in sources
    )
    return SAME_SET if same else UNSEEN


def _set_of(kind: str) -> str:
    """Return the set whose pictures a kind has: FERPlus by another rule, and FER2013, are FERPlus with other labels."""
    return "ferplus" if kind == "fer2013" else kind.partition("-")[0]
