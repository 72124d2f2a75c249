"""Protocols: on which split of each data set a method is evaluated, in which colours, and what is done at test time.

Numbers of two protocols are not comparable, so every prediction says by which one it was made and no table mixes them. What
is done at test time is part of the protocol: `clean-tent` is the protocol `clean` with TENT.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from cafe.errors import unknown

if TYPE_CHECKING:
    from cafe.data.manifest import Manifest

ProtocolName = Literal["clean", "paper"]  # of `PROTOCOLS`
TestTime = Literal["flip", "views", "tent", "t3a", "sar", "shot"]  # of `OPTIONS`
EVALUATED = ("test", "val")  # the first of them that a set has: the labels of some test sets were never published


@dataclass(frozen=True)
class Option:
    """What may be done at test time: the mean over some views, or an adaptation to the target's faces, which `adapts`."""

    about: str
    adapts: bool = False
    views: int = 1  # to average
    policy: str = ""  # how they are drawn; empty: as the run's own


OPTIONS = {
    "flip": Option("the mean over each face and its mirror image", views=2, policy="flip"),
    "views": Option("the mean over the clean view and four augmented ones of the run's own policy", views=5),
    "tent": Option(
        "TENT (Wang et al., ICLR 2021) adapts the batch norms to the target's faces, 200 after 200", adapts=True
    ),
    "t3a": Option(
        "T3A (Iwasawa and Matsuo, NeurIPS 2021) adjusts the classifier to the target's faces, 32 after 32", adapts=True
    ),
    "sar": Option(
        "SAR (Niu et al., ICLR 2023) adapts the batch norms to the target's faces of low entropy, 64 after 64",
        adapts=True,
    ),
    "shot": Option(
        "SHOT (Liang et al., ICML 2020) trains all but the classifier on all of the target's faces, 15 times each",
        adapts=True,
    ),
}


@dataclass(frozen=True)
class Protocol:
    """How targets are evaluated, by the kind of their data set. Training always reads RGB and the split `train`."""

    plain: str  # its name without the option of test time
    about: str
    splits: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # instead of `EVALUATED`
    bgr: frozenset[str] = frozenset()
    option: str = ""  # of `OPTIONS`

    @property
    def name(self) -> str:
        """Its name, with the option of test time."""
        return name_protocol(self.plain, self.option)

    @property
    def prefix(self) -> str:
        """What stands before the names of its metrics and files; nothing for `clean`."""
        return "" if self.name == "clean" else f"{self.name}/"

    def channels(self, kind: str) -> str:
        """Return the order of the colours of targets of a kind, `rgb` or `bgr`."""
        return "bgr" if kind in self.bgr else "rgb"

    def evaluates_like(self, other: Protocol, kind: str) -> bool:
        """Whether another protocol evaluates targets of a kind on the same split in the same colours by the same means."""
        ours, theirs = ((one.splits.get(kind, EVALUATED), one.channels(kind), one.option) for one in (self, other))
        return ours == theirs

    def split(self, target: Manifest, *source_kinds: str, seen: bool = False) -> str | None:
        """Return the split of a target that is evaluated, or None when it has none that may be.

        Never the training split of a set the method was trained on, and no labels but those the protocol means. All of a set
        that came without splits is evaluated, unless the method has `seen` it: then the part made for test.
        """
        if target.kind == "ferplus-argmax":
            return None
        if target.parted and not seen:
            return "all"
        wanted = self.splits.get(target.kind, EVALUATED)
        if target.kind in source_kinds and "train" in wanted:
            wanted = EVALUATED
        return next((split for split in wanted if len(target.rows(split))), None)


PROTOCOLS = {
    "clean": Protocol(
        "clean", "RGB; SFEW is evaluated on val, FERPlus on test by the majority rule.", splits={"sfew": ("val",)}
    ),
    # The released test readers convert these sets to RGB and then use the BGR array; their SFEW list has as many faces as
    # the aligned training set, 891.
    "paper": Protocol(
        "paper",
        "the released test readers: BGR for AffectNet, SFEW and MMA; SFEW is evaluated on train.",
        splits={"sfew": ("train",)},
        bgr=frozenset({"affectnet", "sfew", "mma"}),
    ),
}


def name_protocol(name: str, option: str | None) -> str:
    """Return the name of a protocol with an option of test time, if any."""
    return f"{name}-{option}" if option else name


ALL_PROTOCOLS = tuple(name_protocol(name, option) for option in ("", *OPTIONS) for name in PROTOCOLS)


def find_protocol(name: str) -> Protocol:
    """Return a protocol by name, with an option of test time or without; raise `UserError` naming those there are."""
    plain, _, option = name.partition("-")
    if plain not in PROTOCOLS:
        raise unknown("protocol", name, PROTOCOLS)
    if not option:
        return PROTOCOLS[plain]
    if option not in OPTIONS:
        raise unknown("option of test time", option, OPTIONS)
    about = f"{PROTOCOLS[plain].about} At test time: {OPTIONS[option].about}."
    return replace(PROTOCOLS[plain], about=about, option=option)
