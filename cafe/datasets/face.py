"""One parametric face: a person, facial action units and a view go in, a picture comes out.

A face is a set of named curves in face units (x to the image's right, y down, the eye line at 0, half a face wide = 1);
action units of FACS (Ekman & Friesen 1978) move the curves, the view turns them, and one painter fills them in order.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageDraw, ImageFilter

Curve = NDArray[np.float64]  # (points, 2)
Colour = tuple[int, int, int]

HAIRY = {"hair", "hair_back", "bun", "beard", "moustache"}
SIDES = {"left": -1.0, "right": 1.0}  # of the image
GAIN = 1.35  # the brightest a highlight may make the flat colour

# The Monk skin tone scale, without its two paper-white ends, warmed for skin under light.
SKIN = [(250, 222, 200), (244, 210, 182), (234, 192, 158), (218, 172, 134), (190, 142, 104)]
SKIN += [(158, 112, 80), (130, 90, 66), (106, 73, 55), (88, 61, 48)]
HAIR = [(34, 27, 25), (48, 34, 28), (78, 52, 36), (112, 74, 46), (156, 112, 66), (206, 168, 108), (150, 70, 38)]
IRIS = [(74, 48, 30), (98, 66, 38), (112, 96, 52), (84, 112, 84), (88, 124, 150), (110, 130, 142)]
CLOTH = [(52, 66, 92), (124, 46, 52), (66, 92, 78), (196, 186, 170), (74, 72, 76), (178, 132, 74), (120, 104, 146)]


@dataclass(frozen=True)
class Person:
    """What stays the same in every picture of one identity; lengths in face units, `age` from 0 (child) to 1 (old)."""

    age: float
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


@dataclass(frozen=True)
class View:
    """Where the camera stands: angles in radians, `scale` in pixels per face unit, `centre` in pixels."""

    yaw: float
    pitch: float
    roll: float
    scale: float
    centre: tuple[float, float]


@dataclass(frozen=True)
class Light:
    """One lamp and the room: `direction` points to the lamp, `ambient` is the room's share, colours multiply."""

    direction: tuple[float, float, float]
    ambient: float
    lit: tuple[float, float, float] = (1.0, 1.0, 1.0)
    shadow: tuple[float, float, float] = (1.0, 0.88, 0.82)


@dataclass(frozen=True)
class Ink:
    """How a draughtsman draws instead of a camera: line width and wobble in face units, and what is filled."""

    colour: Colour
    width: float
    wobble: float
    fill: bool  # flat colours, or paper between the lines
    tone: float  # how far hair is hatched towards the ink where nothing is filled
    cel: float  # depth of the one hard-edged shadow; 0 for none
    paper: Colour


def draw_person(rng: np.random.Generator) -> Person:
    """Draw an identity: proportions, age, skin, hair, beard and glasses, from its own generator."""
    man = rng.random() < 0.5
    age = float(np.clip(rng.beta(1.5, 2.0), 0.02, 1.0))
    child = max(0.0, 1.0 - age / 0.16)
    tone = rng.uniform(0, len(SKIN) - 1)
    skin = _mix(SKIN[int(tone)], SKIN[min(int(tone) + 1, len(SKIN) - 1)], tone % 1)
    fair = max(0.0, 1.0 - tone / 4.0)  # fair hair and light eyes go with fair skin
    hair = HAIR[int(rng.integers(0, 3 + round(4 * fair)))]
    grey = float(np.clip((age - 0.62) / 0.3, 0, 1)) * rng.uniform(0.3, 1.0)
    styles = ["short", "crop", "parted", "curly"] + (["bald"] if age > 0.35 else ["fringe"])
    styles = styles if man else ["long", "bob", "parted", "bun", "fringe", "curly", "scarf", "long"]
    beards = ["none", "none", "stubble", "moustache", "full"] if man and age > 0.2 else ["none"]
    return Person(
        age=age,
        width=float(rng.normal(0.93 + 0.05 * man, 0.035)),
        jaw=float(np.clip(rng.normal(0.70 + 0.08 * man, 0.05) + 0.04 * child, 0.58, 0.92)),
        chin=float(np.clip(rng.normal(1.33 + 0.05 * man, 0.05) - 0.12 * child, 1.15, 1.48)),
        eye_apart=float(rng.normal(0.405, 0.018)),
        eye_width=float(rng.normal(0.195, 0.012) + 0.015 * child),
        eye_open=float(np.clip(rng.normal(0.098 - 0.008 * man - 0.012 * age, 0.011) + 0.02 * child, 0.07, 0.13)),
        eye_tilt=float(rng.normal(0.008, 0.013)),
        brow_height=float(np.clip(rng.normal(0.285 - 0.025 * man, 0.018), 0.23, 0.33)),
        brow_arch=float(np.clip(rng.normal(0.065 - 0.02 * man, 0.018), 0.01, 0.11)),
        brow_thickness=float(np.clip(rng.normal(0.055 + 0.022 * man, 0.012), 0.035, 0.1)),
        nose_width=float(np.clip(rng.normal(0.165 + 0.012 * man + 0.004 * tone, 0.018), 0.12, 0.23)),
        nose_length=float(np.clip(rng.normal(0.53, 0.03) - 0.07 * child + 0.03 * age, 0.42, 0.62)),
        mouth_width=float(np.clip(rng.normal(0.30, 0.022), 0.25, 0.36)),
        mouth_height=float(rng.normal(0.84, 0.02) - 0.03 * child),
        lip=float(np.clip(rng.normal(0.083 - 0.012 * man + 0.003 * tone - 0.02 * age, 0.013), 0.045, 0.12)),
        skin=skin,
        hair=_mix(hair, (205, 203, 200), grey),
        brow=_mix(_mix(hair, (205, 203, 200), grey * 0.7), (30, 20, 18), 0.4),
        iris=IRIS[int(rng.integers(0, 2 + round(4 * fair)))],
        cloth=CLOTH[int(rng.integers(len(CLOTH)))],
        hair_style=str(rng.choice(styles)),
        hair_volume=float(rng.uniform(0.06, 0.2)),
        hair_side=float(rng.choice([-1.0, 1.0])),
        beard=str(rng.choice(beards)),
        glasses=str(rng.choice(["round", "square"])) if rng.random() < 0.2 else "none",
    )


def trace(person: Person, units: Mapping[int, float], gaze: tuple[float, float] = (0.0, 0.0)) -> dict[str, Curve]:
    """Return every curve of the face in face units, moved by action units given as {number: intensity 0–1}.

    Curves of one side are called `left_…` and `right_…` and run from the inner to the outer end.
    """
    au: Mapping[int, float] = defaultdict(float, units)
    curves = _trace_head(person, au) | _trace_hair(person) | _trace_mouth(person, au)
    for side, s in SIDES.items():
        one = _trace_eye(person, au, s, gaze) | _trace_nose(person, au, s)
        width = curves["mouth_inner_top"][-1, 0]
        corner = curves["mouth_inner_top"][-1, 1]
        wing = one["wing"][1]
        one["fold"] = smooth(
            [
                (wing[0] + s * 0.035, wing[1] - 0.04),
                (s * (width * 0.72 + 0.13 + 0.05 * au[12]), wing[1] + 0.13 - 0.03 * au[12]),
                (s * (width + 0.10), corner - 0.06),
                (s * (width + 0.09), corner + 0.05),
            ]
        )
        curves |= {f"{side}_{name}": curve for name, curve in one.items()}
    return curves


def _trace_eye(p: Person, au: Mapping[int, float], s: float, gaze: tuple[float, float]) -> dict[str, Curve]:
    u = np.linspace(-1, 1, 13)  # inner to outer corner
    x = s * (p.eye_apart + p.eye_width * u)
    base = -p.eye_tilt * (u + 1)
    raised = 1 + 0.72 * au[5] - 0.42 * au[7] - 0.22 * au[6] - 0.3 * au[9] - 0.5 * au[64]
    up = max(0.014, p.eye_open * raised)
    low = p.eye_open * 0.66 * max(0.12, 1 + 0.12 * au[5] - 0.62 * au[7] - 0.75 * au[6] - 0.5 * au[9])
    droop = 0.035 * min(1.0, au[1] * au[4] * 1.4) * np.clip(u, 0, 1)  # oblique brows pull the outer lid down
    upper = np.stack([x, base - up * (1 - u**2) ** 0.62 * (1 - 0.12 * u) + droop * (1 - u**2) * 2], 1)
    lower = np.stack([x, base + low * (1 - u**2) ** 0.75 * (1 + 0.15 * u)], 1)
    centre = (s * p.eye_apart + gaze[0], -0.016 + gaze[1] + 0.05 * au[64])

    t = np.linspace(0, 1, 10)  # inner to outer end of the brow
    rise = 0.17 * au[1] * (1 - t) ** 1.4 + 0.15 * au[2] * np.sin(np.pi * t**0.8 * 0.72)
    sink = au[4] * (0.03 + 0.13 * (1 - t) ** 1.3) + au[9] * 0.07 * (1 - t)
    y = -p.brow_height - p.brow_arch * np.sin(np.pi * np.clip(t * 0.78, 0, 1)) + 0.05 * t**3 - rise + sink
    bx = s * (0.16 + 0.53 * t - 0.055 * au[4] * (1 - t))
    half = 0.5 * p.brow_thickness * np.minimum(1.0, 1.25 - t**1.6) * np.minimum(1, 0.7 + 3 * t)
    crease = upper + np.array([0, -0.042 - 0.02 * au[5]])
    crease[:, 1] = np.maximum(crease[:, 1], np.interp(u, np.linspace(-1, 1, 10), y + half))
    bag = lower + np.stack([0 * u, 0.055 + 0.035 * (1 - u**2)], 1)
    outer = p.eye_apart + p.eye_width + 0.05
    feet = [(s * (outer + 0.09 * k), d * (0.2 + k)) for d in (-0.05, 0, 0.05) for k in (0, 1)]
    return {
        "brow": np.stack([bx, y], 1),
        "brow_shape": _band(bx, y - half, y + half),
        "lid_upper": upper,
        "lid_lower": lower,
        "eye": np.concatenate([upper, lower[::-1]]),
        "iris": _clip(_ellipse(*centre, 0.092, 0.092), upper, lower),
        "pupil": _clip(_ellipse(*centre, 0.042, 0.042), upper, lower),
        "glint": _clip(_ellipse(centre[0] - 0.032, centre[1] - 0.032, 0.02, 0.02), upper, lower),
        "crease": crease,
        "lid": np.concatenate([upper, crease[::-1]]),
        "bag": bag[2:-1],
        "feet": np.array(feet),
        "socket": _ellipse(s * (p.eye_apart - 0.02), -0.07 + 0.05 * au[4], 0.27, 0.13),
        "inner_socket": _ellipse(s * 0.165, -0.06, 0.07, 0.13),
        "frown": smooth([(s * 0.05, -0.30 + 0.02 * au[4]), (s * 0.062, -0.22), (s * 0.05, -0.12 + 0.03 * au[4])]),
        "wrinkle_low": np.stack([bx[::-1], y[::-1] * 0.6 - p.brow_height * 0.4 - 0.20 - 0.05 * au[1]], 1),
        "wrinkle_high": np.stack([bx[::-1], y[::-1] * 0.6 - p.brow_height * 0.4 - 0.31 - 0.06 * au[1]], 1),
        "cheek": _ellipse(s * (0.54 + 0.02 * au[12]), 0.40 - 0.07 * au[6] - 0.04 * au[12], 0.21, 0.15),
        "temple": _ellipse(s * 0.9, -0.2, 0.12, 0.4),
        "hollow": _ellipse(s * 0.72, 0.72, 0.13, 0.26),
        "lens": _superellipse(s * p.eye_apart, 0.03, 0.29, 0.235, 2.2 if p.glasses == "round" else 4.5),
    }


def _trace_nose(p: Person, au: Mapping[int, float], s: float) -> dict[str, Curve]:
    lift, flare = 0.055 * au[9] + 0.02 * au[10], 1 + 0.16 * au[9] + 0.08 * au[10] + 0.05 * au[12]
    w, y = p.nose_width * flare, p.nose_length - lift
    wing = [(w * 0.72, y - 0.13), (w * 1.02, y - 0.03), (w * 0.9, y + 0.035), (w * 0.62, y + 0.03)]
    side = [(0.15, -0.2), (0.075, -0.04), (0.08, 0.2), (w * 0.8, y - 0.1), (w * 0.95, y), (w * 0.4, y), (0.05, 0.1)]
    crinkle = [(s * k, -0.05 + 0.07 * i + d) for i in range(3) for k, d in ((0.02, 0.02), (0.10, -0.015))]
    return {
        "wing": smooth([(s * a, b) for a, b in wing], 6),
        "nostril": _ellipse(s * w * 0.47, y + 0.022, 0.042 * flare, 0.02),
        "nose_side": np.array([(s * a, b) for a, b in side]),
        "crinkle": np.array(crinkle),
    }


def _trace_mouth(p: Person, au: Mapping[int, float]) -> dict[str, Curve]:
    u = np.linspace(-1, 1, 21)
    s = 1 - u**2
    tight = max(au[23], au[24])
    width = p.mouth_width + 0.115 * au[12] + 0.11 * au[20] - 0.045 * tight - 0.05 * au[26] * (1 - au[20]) * (1 - au[12])
    middle = p.mouth_height + 0.02 * au[12] - 0.035 * au[17] - 0.035 * au[15]
    corner = p.mouth_height - 0.145 * au[12] + 0.105 * au[15] + 0.045 * au[20] + 0.03 * au[10] + 0.02 * au[17]
    corner += 0.09 * au[26]
    raised = 0.085 * au[10] + 0.04 * au[9]
    top_gap = 0.03 * au[25] + 0.55 * raised + 0.02 * au[12] * au[25]
    low_gap = 0.04 * au[25] + 0.3 * au[26] + 0.085 * au[16] * au[25]
    thin = (1 - 0.62 * tight) * (1 - 0.22 * au[12]) * (1 - 0.2 * au[20])
    upper_lip, lower_lip = p.lip * 0.78 * thin * (1 - 0.25 * au[9]), p.lip * 1.12 * thin * (1 + 0.25 * au[17])
    line = corner + (middle - corner) * s**0.85
    bow = 1 - 0.24 * np.exp(-((u / 0.14) ** 2))
    top = line - top_gap * s**0.75 - 0.45 * raised * s
    low = line + np.maximum(low_gap * s**0.62, 0) - 0.45 * raised * s
    over = top - upper_lip * s**0.55 * bow * (1 - 0.25 * u**2)
    under = low + lower_lip * s**0.7 * (1 - 0.1 * np.abs(u))
    if au[10] + au[9] > 0:  # a sneer squares the upper lip
        over = over - 0.035 * max(au[9], au[10]) * s * np.abs(u)
    x = width * u
    bite = np.minimum(top + 0.085, low)
    lower_teeth = np.maximum(low - 0.05 * max(au[16], au[20]) * (s > 0.2), top)
    chin_y = _chin(p, au)
    dent = (np.max(under) + chin_y) / 2
    return {
        "mouth_inner_top": np.stack([x, top], 1),
        "mouth_inner_low": np.stack([x, low], 1),
        "mouth_outer_top": np.stack([x, over], 1),
        "mouth_outer_low": np.stack([x, under], 1),
        "mouth_hole": _band(x, top, low),
        "lip_upper": _band(x, over, top),
        "lip_lower": _band(x, low, under),
        "teeth": _band(x, top, bite)[2:-2],
        "teeth_lower": _band(x, lower_teeth, low),
        "tongue": _clip(
            _ellipse(0, float(low[10]) + 0.02, width * 0.55, 0.4 * float(low[10] - top[10])),
            np.stack([x, top + 0.02], 1),
            np.stack([x, low], 1),
        ),
        "under_lip": _ellipse(0.0, float(under[10]) + 0.035, width * 0.55, 0.03),
        "chin_dent": smooth([(-0.13, dent + 0.04), (0.0, dent - 0.02), (0.13, dent + 0.04)]),
        "chin_ball": _ellipse(0.0, chin_y - 0.16, 0.2, 0.1),
        "philtrum": np.array([(0, p.nose_length + 0.06), (0, float(over[10]) - 0.01)]),
        "moustache": _band(1.12 * x, over - 0.09 + 0.1 * u**2, over + 0.01 + 0.06 * u**4),
    }


def _chin(p: Person, au: Mapping[int, float]) -> float:
    return p.chin + 0.17 * au[26] - 0.02 * au[17]


def _trace_head(p: Person, au: Mapping[int, float]) -> dict[str, Curve]:
    drop, w, chin = 0.17 * au[26], p.width, _chin(p, au)
    right = [(w * 0.5, -1.28), (w * 0.86, -0.98), (w, -0.45), (w * 0.985, 0.05), (w * 0.94, 0.42)]
    right += [(p.jaw * 1.05 + 0.05, 0.78 + drop * 0.5), (p.jaw * 0.74, chin - 0.24), (p.jaw * 0.4, chin - 0.04)]
    outline = [(0, -1.36), *right, (0, chin), *[(-x, y) for x, y in right[::-1]]]
    beard = [(w * 0.985, 0.12), (w * 0.97, 0.42), (p.jaw * 1.08 + 0.05, 0.8 + drop * 0.5), (p.jaw * 0.76, chin - 0.2)]
    beard += [(p.jaw * 0.42, chin + 0.03)]
    inner = [(0.42, 0.62), (0.62, 0.62), (w * 0.9, 0.3)]
    full = [*beard, (0, chin + 0.07), *[(-x, y) for x, y in beard[::-1]], *[(-x, y) for x, y in inner[::-1]], (0, 0.66)]
    neck = p.jaw * 0.62
    return {
        "head": smooth(outline, 5, closed=True),
        "beard": smooth([*full, *inner], 4, closed=True),
        "neck": np.array([(-neck, 0.6), (neck, 0.6), (neck * 1.06, 1.7), (1.2, 2.1), (-1.2, 2.1), (-neck * 1.06, 1.7)]),
        "neck_shadow": smooth(
            [(-neck, 0.9), (neck, 0.9), (neck, chin + 0.1), (0, chin + 0.34), (-neck, chin + 0.1)], 4, closed=True
        ),
        "shirt": smooth(
            [(-2.6, 3.4), (-1.9, 1.98), (-0.78, 1.62), (0, 1.92), (0.78, 1.62), (1.9, 1.98), (2.6, 3.4)], 4
        ),
        "left_ear": _ellipse(-w * 1.02, 0.1, 0.11, 0.24),
        "right_ear": _ellipse(w * 1.02, 0.1, 0.11, 0.24),
        "nose_tip": _ellipse(0, p.nose_length - 0.08 - 0.04 * au[9], 0.065, 0.06),
        "nose_ridge": np.array([(0, -0.08), (0, p.nose_length - 0.14)]),
        "nose_base": _ellipse(0, p.nose_length + 0.05 - 0.05 * au[9], p.nose_width * 0.85, 0.035),
        "nose_bottom": smooth(
            [(-p.nose_width * 0.5, p.nose_length), (0, p.nose_length + 0.05), (p.nose_width * 0.5, p.nose_length)]
        )
        - np.array([0, 0.05 * au[9]]),
        "forehead": _ellipse(0, -0.62, 0.42, 0.2),
    }


def _trace_hair(p: Person) -> dict[str, Curve]:
    style, volume = p.hair_style, p.hair_volume
    angle = np.linspace(np.pi, 2 * np.pi, 33)
    rise = {"crop": 0.03, "bald": 0.0, "bun": 0.05, "scarf": 0.12}.get(style, volume)
    bumps = 0.035 * np.sin(angle * 23) if style == "curly" else 0.0
    reach = rise * (1.35 if style == "curly" else 1.0) + bumps
    cap = np.stack([(p.width + 0.03 + reach * 0.7) * np.cos(angle), -0.3 + (1.08 + reach) * np.sin(angle)], 1)
    burn = [(-p.width * 0.965, 0.08), (-p.width - 0.02, -0.08)]  # sideburns end at the ear
    cap = np.concatenate([burn, cap, [(-x, y) for x, y in burn[::-1]]])
    w = p.width
    temple = 0.84 if style == "crop" else 0.8
    half = {  # the hairline's right half, from the middle of the forehead to the ear
        "fringe": [(0.22, -0.47), (0.6, -0.43), (w * 0.84, -0.3), (w * 0.9, 0.0)],
        "curly": [(0.3, -0.84), (0.74, -0.62), (w * 0.9, -0.3), (w * 0.92, 0.02)],
        "scarf": [(0.4, -0.9), (0.82, -0.6), (w * 0.93, 0.0)],
    }.get(style, [(0.45, -0.9), (temple, -0.6), (w * 0.88, -0.32), (w * 0.91, 0.02)])
    line = [*[(-x, y) for x, y in half[::-1]], *half]
    if style in {"parted", "long", "bob"}:  # swept over from a parting
        line = [(-w * 0.93, 0.05), (-w * 0.88, -0.38), (-0.52, -0.7), (0.05, -0.9), (0.38, -1.14), (0.6, -0.84)]
        line = [*line, (0.8, -0.45), (w * 0.93, 0.05)]
        line = line if p.hair_side > 0 else [(-x, y) for x, y in line[::-1]]
    length = {"long": 2.1, "bob": 1.05, "scarf": 2.3}.get(style, 0.0)
    out = w + 0.13 + volume * 0.6
    back = [(-out + 0.1, -0.6), (-out - 0.02, 0.1), (-out - 0.06, length * 0.6), (-out + 0.06, length)]
    back = [*back, (-0.6, length + 0.04)]
    back = [*back, *[(-x, y) for x, y in back[::-1]]]
    strands = [np.stack([cap[9:-9, 0] * k, -0.3 + (cap[9:-9, 1] + 0.3) * k], 1) for k in (0.93, 0.86)]
    return {
        "hair": np.concatenate([cap, smooth(line[::-1], 5)]),
        "hair_shadow": smooth(line, 5) + np.array([0.0, 0.05]),
        "hair_back": smooth(back, 5) if length else np.zeros((0, 2)),
        "bun": _ellipse(0, -1.45, 0.34, 0.26) if style == "bun" else np.zeros((0, 2)),
        "strand_high": strands[0],
        "strand_low": strands[1],
    }


def smooth(points: Sequence[tuple[float, float]], steps: int = 6, closed: bool = False) -> Curve:
    """Return the Catmull–Rom spline through `points`, `steps` pieces between two of them."""
    return np.asarray(_spline(len(points), steps, closed) @ np.array(points, dtype=np.float64))


@lru_cache(maxsize=64)
def _spline(count: int, steps: int, closed: bool) -> NDArray[np.float64]:
    t = np.arange(steps) / steps
    blend = 0.5 * np.stack([-t + 2 * t**2 - t**3, 2 - 5 * t**2 + 3 * t**3, t + 4 * t**2 - 3 * t**3, t**3 - t**2], 1)
    rows = []
    for start in range(count if closed else count - 1):
        around = [start - 1 + k for k in range(4)]
        around = [k % count if closed else min(max(k, 0), count - 1) for k in around]
        piece = np.zeros((steps, count))
        for k, column in enumerate(around):
            piece[:, column] += blend[:, k]
        rows.append(piece)
    if not closed:
        rows.append(np.eye(count)[-1:])
    return np.concatenate(rows)


@lru_cache(maxsize=1)
def _circle() -> NDArray[np.float64]:
    angle = np.linspace(0, 2 * np.pi, 21)[:-1]
    return np.asarray(np.column_stack([np.cos(angle), np.sin(angle)]))


def _ellipse(x: float, y: float, a: float, b: float) -> Curve:
    return np.asarray(np.array((x, y)) + _circle() * np.array((a, b)))


def _superellipse(x: float, y: float, a: float, b: float, power: float) -> Curve:
    bent = np.sign(_circle()) * np.abs(_circle()) ** (2 / power)
    return np.asarray(np.array((x, y)) + bent * np.array((a, b)))


def _band(x: NDArray[np.float64], above: NDArray[np.float64], below: NDArray[np.float64]) -> Curve:
    """Close the region between two heights over the same x."""
    return np.concatenate([np.stack([x, above], 1), np.stack([x, below], 1)[::-1]])


def _clip(shape: Curve, above: Curve, below: Curve) -> Curve:
    """Keep a shape between two curves that run over x, as lids keep the iris."""
    top, low = above[np.argsort(above[:, 0])], below[np.argsort(below[:, 0])]
    x = np.clip(shape[:, 0], top[0, 0], top[-1, 0])
    y = np.clip(shape[:, 1], np.interp(x, top[:, 0], top[:, 1]), np.interp(x, low[:, 0], low[:, 1]))
    return np.stack([x, y], 1)


def project(curve: Curve, view: View) -> Curve:
    """Turn a curve on the head's surface (ellipsoid with a nose) and return its pixels, (N, 2)."""
    x, y = curve[:, 0], curve[:, 1]
    z = 0.95 * np.sqrt(np.clip(1 - (x / 1.08) ** 2 - (y / 1.75) ** 2, 0.2, None))
    z = z + 0.3 * np.exp(-((x / 0.15) ** 2)) * np.clip((y + 0.1) / 0.5, 0, 1) * np.clip((0.66 - y) / 0.12, 0, 1)
    turned_x = x * np.cos(view.yaw) + (z - 0.2) * np.sin(view.yaw)
    z = z * np.cos(view.yaw) - x * np.sin(view.yaw)
    turned_y = y * np.cos(view.pitch) - (z - 0.3) * np.sin(view.pitch)
    cos, sin = np.cos(view.roll) * view.scale, np.sin(view.roll) * view.scale
    rolled = np.stack([turned_x * cos - turned_y * sin, turned_x * sin + turned_y * cos], 1)
    return np.asarray(rolled + np.array(view.centre))


def _mix(a: Iterable[float], b: Iterable[float], share: float) -> Colour:
    r, g, bl = (round(x + (y - x) * share) for x, y in zip(a, b, strict=True))
    return r, g, bl


class Painter:
    """Draws the curves of one face onto layers: flat colour, broad shade, fine shade, and the person's mask."""

    def __init__(self, size: int, view: View, curves: Mapping[str, Curve], ink: Ink | None, rng: np.random.Generator):
        names = list(curves)
        pixels = project(np.concatenate([curves[name] for name in names]), view)
        ends = np.cumsum([len(curves[name]) for name in names])[:-1]
        self.curves = dict(zip(names, np.split(pixels, ends), strict=True))
        if ink:  # a hand is never still: each curve drifts a little
            for name, curve in self.curves.items():
                drift = rng.normal(0, ink.wobble * view.scale, (2, 2))
                self.curves[name] = curve + np.linspace(drift[0], drift[1], len(curve))
        self.size, self.view, self.ink = size, view, ink
        self.flat = Image.new("RGB", (size, size), ink.paper if ink else (0, 0, 0))
        self.mask = Image.new("L", (size, size))
        self.broad = Image.new("L", (size // 4, size // 4), 128)
        self.fine = Image.new("L", (size // 2, size // 2), 255)
        self.on_flat, self.on_mask = ImageDraw.Draw(self.flat), ImageDraw.Draw(self.mask)
        self.on_broad, self.on_fine = ImageDraw.Draw(self.broad), ImageDraw.Draw(self.fine)

    def fill(self, name: str, colour: Colour, outline: bool = True, mask: bool = False) -> None:
        """Fill a closed curve; with ink, draw its outline too."""
        if not len(self.curves[name]):
            return
        points = self.curves[name].ravel().tolist()
        if self.ink and not self.ink.fill:
            dark = self.ink.tone * (1 - sum(colour) / 765) if name in HAIRY else 0.0
            colour = _mix(self.ink.paper, self.ink.colour, dark)
        self.on_flat.polygon(points, fill=colour)
        if self.ink and outline:
            width = self.pixels(self.ink.width)
            self.on_flat.line(points + points[:2], fill=self.ink.colour, width=width, joint="curve")
        if mask:
            self.on_mask.polygon(points, fill=255)

    def line(self, name: str, colour: Colour, width: float) -> None:
        """Draw an open curve, `width` in face units."""
        points = self.curves[name].ravel().tolist()
        self.on_flat.line(points, fill=colour, width=self.pixels(width), joint="curve")

    def shade(self, name: str, level: float) -> None:
        """Darken (level < 1) or lighten a region softly."""
        self.on_broad.polygon((self.curves[name] / 4).ravel().tolist(), fill=round(128 * level))

    def fold(self, name: str, depth: float, width: float = 0.035) -> None:
        """Press a soft line of `depth` 0–1 into the skin."""
        if depth > 0.03:
            points = (self.curves[name] / 2).ravel().tolist()
            self.on_fine.line(points, fill=round(255 * (1 - min(depth, 0.8))), width=max(1, self.pixels(width) // 2))

    def pixels(self, width: float) -> int:
        """Return a width in face units as whole pixels."""
        return max(1, round(width * self.view.scale))


def paint(
    person: Person,
    units: Mapping[int, float],
    view: View,
    light: Light,
    size: int,
    gaze: tuple[float, float],
    ink: Ink | None,
    rng: np.random.Generator,
) -> tuple[Image.Image, Image.Image]:
    """Paint a face with action units on a square canvas of `size` pixels; return the picture and the person's mask."""
    painter = Painter(size, view, trace(person, units, gaze), ink, rng)
    _paint_head(painter, person)
    _paint_mouth(painter, person)
    _paint_eyes(painter, person)
    _paint_hair(painter, person)
    if person.glasses != "none":
        _paint_glasses(painter, person)
    if ink:
        _draw_folds(painter, person, units, ink)
        if ink.cel:
            painter.flat = _shade_cel(painter, light, ink)
    else:
        _press_folds(painter, person, units, light)
        painter.flat = _expose(painter, light)
    _paint_glints(painter)
    return painter.flat, painter.mask


def _paint_head(on: Painter, p: Person) -> None:
    hair = p.cloth if p.hair_style == "scarf" else p.hair
    skin, dark = p.skin, _mix(p.skin, (70, 30, 25), 0.25)
    on.fill("hair_back", _mix(hair, (0, 0, 0), 0.18), mask=True)
    on.fill("bun", hair, mask=True)
    on.fill("neck", skin, mask=True)
    on.fill("shirt", p.cloth if p.hair_style != "scarf" else _mix(p.cloth, (20, 20, 30), 0.5), mask=True)
    if p.hair_style in {"short", "crop", "bald", "bun", "parted", "fringe"}:
        on.fill("left_ear", _mix(skin, (200, 70, 60), 0.1), mask=True)
        on.fill("right_ear", _mix(skin, (200, 70, 60), 0.1), mask=True)
    on.fill("head", skin, mask=True)
    if p.beard == "full":
        on.fill("beard", _mix(p.hair, skin, 0.12), mask=True)
    if p.beard in {"full", "moustache"}:
        on.fill("moustache", _mix(p.hair, skin, 0.08), outline=p.beard == "moustache")
    for side in SIDES:
        on.fill(f"{side}_nostril", dark if on.ink is None else on.ink.colour, outline=False)


def _paint_mouth(on: Painter, p: Person) -> None:
    lips = _mix(p.skin, (168, 52, 58), 0.42)
    on.fill("mouth_hole", (66, 20, 24), outline=False)
    on.fill("tongue", (168, 78, 82), outline=False)
    on.fill("teeth_lower", (212, 204, 192), outline=False)
    on.fill("teeth", (240, 234, 222), outline=False)
    on.fill("lip_lower", _mix(lips, (255, 170, 160), 0.12), outline=on.ink is not None and on.ink.fill)
    on.fill("lip_upper", _mix(lips, (90, 20, 30), 0.18), outline=on.ink is not None and on.ink.fill)
    edge = on.ink.colour if on.ink else _mix(lips, (40, 8, 12), 0.62)
    on.line("mouth_inner_top", edge, on.ink.width if on.ink else 0.022)
    on.line("mouth_inner_low", edge, on.ink.width if on.ink else 0.014)


def _paint_eyes(on: Painter, p: Person) -> None:
    ink = on.ink
    line = ink.colour if ink else (38, 24, 22)
    brow, pupil = (p.brow, (16, 13, 14)) if ink is None else (p.brow if ink.fill else line, line)
    under = _mix(p.skin, (90, 36, 34), 0.45)
    for side in SIDES:
        on.fill(f"{side}_lid", _mix(p.skin, (110, 60, 60), 0.10), outline=False)
        on.fill(f"{side}_eye", (240, 236, 230), outline=False)
        if ink is None or ink.fill:
            on.fill(f"{side}_iris", p.iris, outline=False)
        else:
            on.line(f"{side}_iris", line, ink.width * 0.7)
        on.on_flat.polygon(on.curves[f"{side}_pupil"].ravel().tolist(), fill=pupil)
        if ink is None:
            on.line(f"{side}_crease", _mix(p.skin, (70, 30, 28), 0.34), 0.013)
        on.line(f"{side}_lid_lower", line if ink else under, ink.width * 0.6 if ink else 0.012)
        on.line(f"{side}_lid_upper", line, max(0.03, ink.width * 1.2) if ink else 0.032)
        on.on_flat.polygon(on.curves[f"{side}_brow_shape"].ravel().tolist(), fill=brow)


def _paint_hair(on: Painter, p: Person) -> None:
    if p.hair_style == "bald":
        return
    hair = p.cloth if p.hair_style == "scarf" else p.hair
    on.fill("hair", hair, mask=True)
    if p.hair_style != "scarf" and on.ink is None:
        on.line("strand_high", _mix(hair, (255, 235, 210), 0.14), 0.07)
        on.line("strand_low", _mix(hair, (255, 235, 210), 0.07), 0.05)


def _paint_glasses(on: Painter, p: Person) -> None:
    frame = on.ink.colour if on.ink else (44, 36, 38)
    width = on.pixels(0.03 if p.glasses == "round" else 0.045)
    for side in SIDES:
        lens = on.curves[f"{side}_lens"].ravel().tolist()
        on.on_flat.line(lens + lens[:4], fill=frame, width=width, joint="curve")
    on.on_flat.line([*on.curves["left_lens"][0], *on.curves["right_lens"][10]], fill=frame, width=width)


def _press_folds(on: Painter, p: Person, units: Mapping[int, float], light: Light) -> None:
    """Shade sockets, nose, cheeks and the folds that age and action units press into the skin."""
    au: Mapping[int, float] = defaultdict(float, units)
    old = max(0.0, p.age - 0.3)
    towards = light.direction[0]
    on.shade("neck_shadow", 0.62)
    on.shade("head", 1.0)
    on.shade("forehead", 1.1)
    on.shade("nose_base", 0.74)
    for side, s in SIDES.items():
        on.shade(f"{side}_temple", 0.86)
        on.shade(f"{side}_hollow", 0.93 - 0.1 * old)
        on.shade(f"{side}_socket", 0.88 - 0.07 * au[4])
        on.shade(f"{side}_inner_socket", 0.76 - 0.1 * au[4])
        on.shade(f"{side}_nose_side", 0.86 - 0.16 * max(0.0, -s * towards))
        on.shade(f"{side}_cheek", 1.08 + 0.1 * au[6] + 0.05 * au[12])
        on.fold(f"{side}_fold", 0.10 + 0.45 * old + 0.34 * au[12] + 0.34 * max(au[9], au[10]) + 0.1 * au[20], 0.045)
        on.fold(f"{side}_wing", 0.34 + 0.3 * au[9], 0.035)
        on.fold(f"{side}_bag", 0.10 + 0.4 * old + 0.34 * au[6] + 0.24 * au[7] + 0.2 * au[9], 0.03)
        on.fold(f"{side}_wrinkle_low", 0.5 * old + 0.42 * min(1, au[1] + 0.3 * au[2]) * (0.35 + p.age), 0.026)
        on.fold(f"{side}_wrinkle_high", 0.45 * old + 0.36 * au[1] * (0.3 + p.age), 0.026)
        on.fold(f"{side}_frown", 0.25 * old + 0.5 * au[4] + 0.25 * au[9], 0.03)
        on.fold(f"{side}_crinkle", 0.6 * au[9], 0.028)
        feet = on.curves[f"{side}_feet"] / 2
        depth = 0.6 * old + 0.42 * au[6] * (0.25 + p.age)
        if depth > 0.05:
            for start in range(0, 6, 2):
                on.on_fine.line(feet[start : start + 2].ravel().tolist(), fill=round(255 * (1 - min(depth, 0.6))))
    on.shade("nose_tip", 1.16)
    on.on_broad.line((on.curves["nose_ridge"] / 4).ravel().tolist(), fill=146, width=max(1, on.pixels(0.06) // 4))
    on.shade("under_lip", 0.78)
    on.shade("chin_ball", 1.05)
    on.fold("chin_dent", 0.45 * au[17], 0.04)
    on.fold("philtrum", 0.12, 0.05)
    if p.hair_style != "bald":
        on.on_broad.line((on.curves["hair_shadow"] / 4).ravel().tolist(), fill=96, width=max(1, on.pixels(0.12) // 4))
    if p.beard == "stubble":
        on.on_broad.polygon((on.curves["beard"] / 4).ravel().tolist(), fill=100)


def _draw_folds(on: Painter, p: Person, units: Mapping[int, float], ink: Ink) -> None:
    """Draw with ink what shading would tell: nose, and the folds that are deep enough to deserve a line."""
    au: Mapping[int, float] = defaultdict(float, units)
    on.line("nose_bottom", ink.colour, ink.width)
    for side in SIDES:
        on.line(f"{side}_wing", ink.colour, ink.width * 0.9)
        depths = {"fold": 0.2 + max(au[12], au[9], au[10]), "frown": au[4], "crinkle": au[9]}
        depths |= {"wrinkle_low": au[1] * 0.9, "bag": max(au[6], au[7]) * 0.8 + 0.3 * p.age}
        for name, depth in depths.items():
            if depth > 0.5:
                on.line(f"{side}_{name}", ink.colour, ink.width * 0.6)
    if au[17] > 0.4:
        on.line("chin_dent", ink.colour, ink.width * 0.6)


def _shine(view: View, light: Light, size: int) -> NDArray[np.float32]:
    """Return how bright each pixel of a head-shaped ellipsoid is, 1 when it faces the lamp: (size, size)."""
    unit = 4.0 / view.scale
    x = ((np.arange(size, dtype=np.float32) - view.centre[0] / 4) * unit / 1.12)[None, :]
    y = ((np.arange(size, dtype=np.float32) - view.centre[1] / 4) * unit / 1.7)[:, None]
    z = np.sqrt(np.clip(1.05 - x * x - y * y, 0.02, None))
    lx, ly, lz = np.array(light.direction) / np.linalg.norm(light.direction)
    facing = np.clip(x * lx + y * ly + z * lz, 0, None)
    return np.asarray(1.08 * (light.ambient + (1 - light.ambient) * facing), dtype=np.float32)


def _shade_cel(on: Painter, light: Light, ink: Ink) -> Image.Image:
    """Lay one shadow with a hard edge over the third of the face that the lamp reaches least."""
    level = _shine(on.view, light, on.size // 4)
    dark = Image.fromarray((255 * ink.cel * (level < np.quantile(level, 0.35))).astype(np.uint8)).resize(on.flat.size)
    tinted = ImageChops.multiply(on.flat, Image.new("RGB", on.flat.size, (120, 110, 130)))
    return Image.composite(tinted, on.flat, ImageChops.multiply(dark, on.mask))


def _expose(on: Painter, light: Light) -> Image.Image:
    """Multiply the flat colours with lamp, broad shade and fine folds; shadows take the room's colour."""
    broad = np.asarray(on.broad.filter(ImageFilter.GaussianBlur(on.view.scale * 0.014)), dtype=np.float32) / 128
    level = np.clip(broad * _shine(on.view, light, on.size // 4) * (255 / GAIN), 0, 255).astype(np.uint8)
    fine = on.fine.filter(ImageFilter.GaussianBlur(on.view.scale * 0.008))
    shade = ImageChops.multiply(Image.fromarray(level).resize(on.fine.size, Image.Resampling.BICUBIC), fine)
    shade = shade.resize(on.flat.size, Image.Resampling.BILINEAR)
    ramp = np.arange(256) / 255 * GAIN
    bands = []
    for lit, shadow in zip(light.lit, light.shadow, strict=True):
        share = np.clip(ramp, 0, 1)
        tinted = ramp * (shadow + (lit - shadow) * share) / GAIN * 255
        bands.append(shade.point(np.clip(tinted, 0, 255).round().astype(int).tolist()))
    lighted = ImageChops.multiply(on.flat, Image.merge("RGB", bands))
    return lighted.point([min(255, round(v * GAIN)) for v in range(256)] * 3)


def _paint_glints(on: Painter) -> None:
    """Light the eyes last: a glint is as bright in the dark."""
    draw = ImageDraw.Draw(on.flat)
    for side in SIDES:
        draw.polygon(on.curves[f"{side}_glint"].ravel().tolist(), fill=(250, 250, 248))
