"""The people of the synthetic faces: proportions, colours, hair, beard and glasses, drawn once for each identity."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

Colour = tuple[int, int, int]

# The Monk skin tone scale, without its two paper-white ends, warmed for skin under light.
SKIN = [(250, 222, 200), (244, 210, 182), (234, 192, 158), (218, 172, 134), (190, 142, 104)]
SKIN += [(158, 112, 80), (130, 90, 66), (106, 73, 55), (88, 61, 48)]
HAIR = [(34, 27, 25), (48, 34, 28), (78, 52, 36), (112, 74, 46), (156, 112, 66), (206, 168, 108), (150, 70, 38)]
IRIS = [(74, 48, 30), (98, 66, 38), (112, 96, 52), (84, 112, 84), (88, 124, 150), (110, 130, 142)]
AGES = {"child": 0.16, "young": 0.4, "middle": 0.7, "old": 1.0}  # bands, by the oldest of each
SKINS = ("light", "medium", "dark")  # thirds of the scale
CLOTH = [(52, 66, 92), (124, 46, 52), (66, 92, 78), (196, 186, 170), (74, 72, 76), (178, 132, 74), (120, 104, 146)]


@dataclass(frozen=True)
class Person:
    """What stays the same in every picture of one identity; lengths in face units, `age` from 0 (child) to 1 (old).

    `tone` is the place of the skin on the scale `SKIN`, from 0 (the lightest) to 8.
    """

    sex: str
    age: float
    tone: float
    width: float
    jaw: float
    chin: float
    eye_apart: float
    eye_width: float
    eye_open: float
    eye_tilt: float
    brow_height: float
    brow_arch: float
    brow_thickness: float
    nose_width: float
    nose_length: float
    mouth_width: float
    mouth_height: float
    lip: float
    skin: Colour
    hair: Colour
    brow: Colour
    iris: Colour
    cloth: Colour
    hair_style: str
    hair_volume: float
    hair_side: float
    beard: str
    glasses: str

    def describe(self) -> dict[str, str]:
        """Return what a data set may say of the person, by which its faces can be parted."""
        age = next(name for name, oldest in AGES.items() if self.age <= oldest)
        skin = SKINS[min(int(self.tone * len(SKINS) / (len(SKIN) - 1)), len(SKINS) - 1)]
        return {"sex": self.sex, "age": age, "skin": skin, "glasses": "no" if self.glasses == "none" else "yes"}


def draw_person(rng: np.random.Generator) -> Person:
    """Draw an identity: proportions, age, skin, hair, beard and glasses, from its own generator."""
    man = rng.random() < 0.5
    age = float(np.clip(rng.beta(1.5, 2.0), 0.02, 1.0))
    child = max(0.0, 1.0 - age / 0.16)
    tone = rng.uniform(0, len(SKIN) - 1)
    skin = mix_colours(SKIN[int(tone)], SKIN[min(int(tone) + 1, len(SKIN) - 1)], tone % 1)
    fair = max(0.0, 1.0 - tone / 4.0)  # fair hair and light eyes go with fair skin
    hair = HAIR[int(rng.integers(0, 3 + round(4 * fair)))]
    grey = float(np.clip((age - 0.62) / 0.3, 0, 1)) * rng.uniform(0.3, 1.0)
    styles = ["short", "crop", "parted", "curly"] + (["bald"] if age > 0.35 else ["fringe"])
    styles = styles if man else ["long", "bob", "parted", "bun", "fringe", "curly", "scarf", "long"]
    beards = ["none", "none", "stubble", "moustache", "full"] if man and age > 0.2 else ["none"]
    return Person(
        sex="man" if man else "woman",
        age=age,
        tone=float(tone),
        **_draw_proportions(rng, man, age, child, tone),
        skin=skin,
        hair=mix_colours(hair, (205, 203, 200), grey),
        brow=mix_colours(mix_colours(hair, (205, 203, 200), grey * 0.7), (30, 20, 18), 0.4),
        iris=IRIS[int(rng.integers(0, 2 + round(4 * fair)))],
        cloth=CLOTH[int(rng.integers(len(CLOTH)))],
        hair_style=str(rng.choice(styles)),
        hair_volume=float(rng.uniform(0.06, 0.2)),
        hair_side=float(rng.choice([-1.0, 1.0])),
        beard=str(rng.choice(beards)),
        glasses=str(rng.choice(["round", "square"])) if rng.random() < 0.2 else "none",
    )


def _draw_proportions(rng: np.random.Generator, man: bool, age: float, child: float, tone: float) -> dict[str, float]:
    return {
        "width": float(rng.normal(0.93 + 0.05 * man, 0.035)),
        "jaw": float(np.clip(rng.normal(0.70 + 0.08 * man, 0.05) + 0.04 * child, 0.58, 0.92)),
        "chin": float(np.clip(rng.normal(1.33 + 0.05 * man, 0.05) - 0.12 * child, 1.15, 1.48)),
        "eye_apart": float(rng.normal(0.405, 0.018)),
        "eye_width": float(rng.normal(0.195, 0.012) + 0.015 * child),
        "eye_open": float(np.clip(rng.normal(0.098 - 0.008 * man - 0.012 * age, 0.011) + 0.02 * child, 0.07, 0.13)),
        "eye_tilt": float(rng.normal(0.008, 0.013)),
        "brow_height": float(np.clip(rng.normal(0.285 - 0.025 * man, 0.018), 0.23, 0.33)),
        "brow_arch": float(np.clip(rng.normal(0.065 - 0.02 * man, 0.018), 0.01, 0.11)),
        "brow_thickness": float(np.clip(rng.normal(0.055 + 0.022 * man, 0.012), 0.035, 0.1)),
        "nose_width": float(np.clip(rng.normal(0.165 + 0.012 * man + 0.004 * tone, 0.018), 0.12, 0.23)),
        "nose_length": float(np.clip(rng.normal(0.53, 0.03) - 0.07 * child + 0.03 * age, 0.42, 0.62)),
        "mouth_width": float(np.clip(rng.normal(0.30, 0.022), 0.25, 0.36)),
        "mouth_height": float(rng.normal(0.84, 0.02) - 0.03 * child),
        "lip": float(np.clip(rng.normal(0.083 - 0.012 * man + 0.003 * tone - 0.02 * age, 0.013), 0.045, 0.12)),
    }


def mix_colours(a: Iterable[float], b: Iterable[float], share: float) -> Colour:
    """Return the colour `share` 0–1 of the way from `a` to `b`."""
    red, green, blue = (round(x + (y - x) * share) for x, y in zip(a, b, strict=True))
    return red, green, blue


def round_colour(values: Iterable[float]) -> Colour:
    """Return three channel values as a colour, each rounded towards 0."""
    red, green, blue = (int(value) for value in values)
    return red, green, blue
