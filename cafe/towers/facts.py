"""What is known of a tower without loading it: what is published of it, and what is remembered of when it was loaded."""

from __future__ import annotations

from dataclasses import dataclass

from cafe.errors import unknown

Statistics = tuple[tuple[float, float, float], tuple[float, float, float]]  # mean and standard deviation, RGB in 0–1

NORMALISATIONS: dict[str, Statistics] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}


# Sets whose pictures come from search engines and from Flickr, where the training pictures of large towers come from too.
WEB = ("affectnet", "expw", "fer2013", "ferplus", "mma", "rafdb")


@dataclass(frozen=True)
class TowerCard:
    """What is published of a tower: its size where it is usually read, its licence, and what it was trained on.

    `may_have_seen` are data sets, by their readers' names, whose pictures may be among those it was trained on, without
    what they show: nobody can check it, so that such a tower's row is no proof for pictures that nothing has seen.
    """

    parameters: int  # of the image tower to its end
    input_size: int  # pixels
    channels: int
    licence: str
    trained_on: str
    may_have_seen: tuple[str, ...] = WEB


@dataclass(frozen=True)
class TowerFacts:
    """All that is known of a tower read at a layer; `map_shape` is (C, H, W), or None for a tower whose map is not known."""

    architecture: str  # library:MODEL#LAYER, without file paths
    weights_digest: str
    width: int
    map_shape: tuple[int, int, int] | None
    input_size: int
    mean: tuple[float, float, float]  # its own statistics, RGB in 0–1
    std: tuple[float, float, float]
    normalisation: str  # the choice its name stands for


def resolve_normalisation(tower: TowerFacts, choice: str | None = None) -> Statistics:
    """Return mean and standard deviation for `tower`, `imagenet` or `clip` (default: what the name stands for)."""
    choice = choice or tower.normalisation
    if choice == "tower":
        return tower.mean, tower.std
    if choice not in NORMALISATIONS:
        raise unknown("normalisation", choice, ("tower", *NORMALISATIONS))
    return NORMALISATIONS[choice]
