"""One parametric face: a person with facial action units becomes named curves, which a view turns and projects.

Curves are in face units (x to the image's right, y down, the eye line at 0, half a face wide = 1), so that the action
units of FACS (Ekman & Friesen 1978) can move them without knowing how large or in which style they will be drawn.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from cafe.synthetic.person import Person

Curve = NDArray[np.float64]  # (points, 2)
Points = Sequence[tuple[float, float]]

SIDES = {"left": -1.0, "right": 1.0}  # of the image


@dataclass(frozen=True)
class CameraPose:
    """Where the camera stands: angles in radians, `scale` in pixels per face unit, `centre` in pixels."""

    yaw: float
    pitch: float
    roll: float
    scale: float
    centre: tuple[float, float]


def trace(person: Person, units: Mapping[int, float], gaze: tuple[float, float] = (0.0, 0.0)) -> dict[str, Curve]:
    """Return every curve of the face in face units, moved by action units given as {number: intensity 0–1}.

    Curves of one side are called `left_…` and `right_…` and run from the inner to the outer end.
    """
    au: Mapping[int, float] = defaultdict(float, units)
    curves = _trace_head(person, au) | _trace_hair(person) | _trace_mouth(person, au)
    width, corner = curves["mouth_inner_top"][-1]
    for side, s in SIDES.items():
        brow, nose = _trace_brow(person, au, s), _trace_nose(person, au, s)
        eye = _trace_eye(person, au, s, gaze, brow["brow_shape"])
        wing = nose["wing"][1]
        fold = [
            (wing[0] + s * 0.035, wing[1] - 0.04),
            (s * (width * 0.72 + 0.13 + 0.05 * au[12]), wing[1] + 0.13 - 0.03 * au[12]),
            (s * (width + 0.10), corner - 0.06),
            (s * (width + 0.09), corner + 0.05),
        ]
        own = brow | eye | _trace_skin(person, au, s, brow["brow"]) | nose | {"fold": smooth(fold)}
        curves |= {f"{side}_{name}": curve for name, curve in own.items()}
    return curves


def _trace_brow(p: Person, au: Mapping[int, float], s: float) -> dict[str, Curve]:
    t = np.linspace(0, 1, 10)  # inner to outer end
    rise = 0.17 * au[1] * (1 - t) ** 1.4 + 0.15 * au[2] * np.sin(np.pi * t**0.8 * 0.72)
    sink = au[4] * (0.03 + 0.13 * (1 - t) ** 1.3) + au[9] * 0.07 * (1 - t)
    y = -p.brow_height - p.brow_arch * np.sin(np.pi * np.clip(t * 0.78, 0, 1)) + 0.05 * t**3 - rise + sink
    x = s * (0.16 + 0.53 * t - 0.055 * au[4] * (1 - t))
    half = 0.5 * p.brow_thickness * np.minimum(1.0, 1.25 - t**1.6) * np.minimum(1, 0.7 + 3 * t)
    return {"brow": np.stack([x, y], 1), "brow_shape": _band(x, y - half, y + half)}


def _trace_eye(
    p: Person, au: Mapping[int, float], s: float, gaze: tuple[float, float], brow_shape: Curve
) -> dict[str, Curve]:
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
    crease = upper + np.array([0, -0.042 - 0.02 * au[5]])
    below_brow = brow_shape[: len(brow_shape) // 2 - 1 : -1, 1]  # its lower edge, inner to outer end
    crease[:, 1] = np.maximum(crease[:, 1], np.interp(u, np.linspace(-1, 1, len(below_brow)), below_brow))
    bag = lower + np.stack([0 * u, 0.055 + 0.035 * (1 - u**2)], 1)
    outer = p.eye_apart + p.eye_width + 0.05
    feet = [(s * (outer + 0.09 * k), d * (0.2 + k)) for d in (-0.05, 0, 0.05) for k in (0, 1)]
    return {
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
    }


def _trace_skin(p: Person, au: Mapping[int, float], s: float, brow: Curve) -> dict[str, Curve]:
    """What lies around an eye: sockets, wrinkles, cheek, temple, and the lens of a pair of glasses."""
    x, y = brow[::-1].T
    wrinkle = y * 0.6 - p.brow_height * 0.4
    return {
        "socket": _ellipse(s * (p.eye_apart - 0.02), -0.07 + 0.05 * au[4], 0.27, 0.13),
        "inner_socket": _ellipse(s * 0.165, -0.06, 0.07, 0.13),
        "frown": smooth([(s * 0.05, -0.30 + 0.02 * au[4]), (s * 0.062, -0.22), (s * 0.05, -0.12 + 0.03 * au[4])]),
        "wrinkle_low": np.stack([x, wrinkle - 0.20 - 0.05 * au[1]], 1),
        "wrinkle_high": np.stack([x, wrinkle - 0.31 - 0.06 * au[1]], 1),
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


def _shape_lips(p: Person, au: Mapping[int, float]) -> tuple[NDArray[np.float64], ...]:
    """Return x of the mouth's points (21,), and y of the upper lip's two edges and the lower lip's two, from above."""
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
    return width * u, over, top, low, under


def _trace_mouth(p: Person, au: Mapping[int, float]) -> dict[str, Curve]:
    x, over, top, low, under = _shape_lips(p, au)
    u = np.linspace(-1, 1, 21)
    bite = np.minimum(top + 0.085, low)
    lower_teeth = np.maximum(low - 0.05 * max(au[16], au[20]) * (1 - u**2 > 0.2), top)
    chin_y = _chin(p, au)
    dent = (np.max(under) + chin_y) / 2
    tongue = _ellipse(0, float(low[10]) + 0.02, x[-1] * 0.55, 0.4 * float(low[10] - top[10]))
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
        "tongue": _clip(tongue, np.stack([x, top + 0.02], 1), np.stack([x, low], 1)),
        "under_lip": _ellipse(0.0, float(under[10]) + 0.035, x[-1] * 0.55, 0.03),
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
    outline = [(0, -1.36), *right, (0, chin), *mirror(right)]
    beard = [(w * 0.985, 0.12), (w * 0.97, 0.42), (p.jaw * 1.08 + 0.05, 0.8 + drop * 0.5), (p.jaw * 0.76, chin - 0.2)]
    beard += [(p.jaw * 0.42, chin + 0.03)]
    inner = [(0.42, 0.62), (0.62, 0.62), (w * 0.9, 0.3)]
    full = [*beard, (0, chin + 0.07), *mirror(beard), *mirror(inner), (0, 0.66), *inner]
    neck = p.jaw * 0.62
    shadow = [(-neck, 0.9), (neck, 0.9), (neck, chin + 0.1), (0, chin + 0.34), (-neck, chin + 0.1)]
    shirt = [(-2.6, 3.4), (-1.9, 1.98), (-0.78, 1.62), (0, 1.92), (0.78, 1.62), (1.9, 1.98), (2.6, 3.4)]
    nose = [(-p.nose_width * 0.5, p.nose_length), (0, p.nose_length + 0.05), (p.nose_width * 0.5, p.nose_length)]
    return {
        "head": smooth(outline, 5, closed=True),
        "beard": smooth(full, 4, closed=True),
        "neck": np.array([(-neck, 0.6), (neck, 0.6), (neck * 1.06, 1.7), (1.2, 2.1), (-1.2, 2.1), (-neck * 1.06, 1.7)]),
        "neck_shadow": smooth(shadow, 4, closed=True),
        "shirt": smooth(shirt, 4),
        "left_ear": _ellipse(-w * 1.02, 0.1, 0.11, 0.24),
        "right_ear": _ellipse(w * 1.02, 0.1, 0.11, 0.24),
        "nose_tip": _ellipse(0, p.nose_length - 0.08 - 0.04 * au[9], 0.065, 0.06),
        "nose_ridge": np.array([(0, -0.08), (0, p.nose_length - 0.14)]),
        "nose_base": _ellipse(0, p.nose_length + 0.05 - 0.05 * au[9], p.nose_width * 0.85, 0.035),
        "nose_bottom": smooth(nose) - np.array([0, 0.05 * au[9]]),
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
    cap = np.concatenate([burn, cap, mirror(burn)])
    w = p.width
    temple = 0.84 if style == "crop" else 0.8
    half = {  # the hairline's right half, from the middle of the forehead to the ear
        "fringe": [(0.22, -0.47), (0.6, -0.43), (w * 0.84, -0.3), (w * 0.9, 0.0)],
        "curly": [(0.3, -0.84), (0.74, -0.62), (w * 0.9, -0.3), (w * 0.92, 0.02)],
        "scarf": [(0.4, -0.9), (0.82, -0.6), (w * 0.93, 0.0)],
    }.get(style, [(0.45, -0.9), (temple, -0.6), (w * 0.88, -0.32), (w * 0.91, 0.02)])
    line = [*mirror(half), *half]
    if style in {"parted", "long", "bob"}:  # swept over from a parting
        line = [(-w * 0.93, 0.05), (-w * 0.88, -0.38), (-0.52, -0.7), (0.05, -0.9), (0.38, -1.14), (0.6, -0.84)]
        line += [(0.8, -0.45), (w * 0.93, 0.05)]
        line = line if p.hair_side > 0 else mirror(line)
    length = {"long": 2.1, "bob": 1.05, "scarf": 2.3}.get(style, 0.0)
    out = w + 0.13 + volume * 0.6
    back = [(-out + 0.1, -0.6), (-out - 0.02, 0.1), (-out - 0.06, length * 0.6), (-out + 0.06, length)]
    back += [(-0.6, length + 0.04)]
    back += mirror(back)
    strands = [np.stack([cap[9:-9, 0] * k, -0.3 + (cap[9:-9, 1] + 0.3) * k], 1) for k in (0.93, 0.86)]
    return {
        "hair": np.concatenate([cap, smooth(line[::-1], 5)]),
        "hair_shadow": smooth(line, 5) + np.array([0.0, 0.05]),
        "hair_back": smooth(back, 5) if length else np.zeros((0, 2)),
        "bun": _ellipse(0, -1.45, 0.34, 0.26) if style == "bun" else np.zeros((0, 2)),
        "strand_high": strands[0],
        "strand_low": strands[1],
    }


def mirror(points: Points) -> list[tuple[float, float]]:
    """Return the other half of a symmetric outline: `points` with x negated, in reverse order."""
    return [(-x, y) for x, y in points[::-1]]


def smooth(points: Points, steps: int = 6, closed: bool = False) -> Curve:
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
    """Clip a shape to the region between two curves over x, as the lids hide parts of the iris."""
    top, low = above[np.argsort(above[:, 0])], below[np.argsort(below[:, 0])]
    x = np.clip(shape[:, 0], top[0, 0], top[-1, 0])
    y = np.clip(shape[:, 1], np.interp(x, top[:, 0], top[:, 1]), np.interp(x, low[:, 0], low[:, 1]))
    return np.stack([x, y], 1)


def project(curve: Curve, view: CameraPose) -> Curve:
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
