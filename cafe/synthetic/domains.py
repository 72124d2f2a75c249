"""Five synthetic domains of faces, so that the whole road can be walked without a single licensed picture.

Every sample is a pure function of (seed, domain, identity, expression, index): the same bytes in any order and process.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from upath import UPath

from cafe.data.expressions import EXPRESSIONS
from cafe.errors import UserError, unknown
from cafe.randomness import random_generator
from cafe.synthetic.camera import Domain, Pixels, Tint, encode, expose, occlude, paint_background
from cafe.synthetic.face import View, draw_person, round_colour
from cafe.synthetic.portrait import Ink, Light, paint

# Prototypes and their major variants as {action unit: relative intensity}, after EMFACS (Friesen & Ekman 1983) and the
# table of the FACS Investigator's Guide (Ekman, Friesen & Hager 2002, p. 174). 64 is "eyes down".
PROTOTYPES: dict[str, tuple[dict[int, float], ...]] = {
    "surprise": ({1: 1.0, 2: 1.0, 5: 0.8, 25: 1.0, 26: 1.0}, {1: 1.0, 2: 1.0, 5: 0.9, 25: 0.9, 26: 0.6}),
    "fear": (
        {1: 1.0, 2: 0.4, 4: 0.7, 5: 1.0, 20: 1.0, 25: 1.0, 26: 0.2},
        {1: 1.0, 2: 0.5, 4: 0.8, 5: 1.0, 16: 0.5, 20: 0.9, 25: 0.8},
    ),
    "disgust": (
        {4: 0.3, 7: 0.5, 9: 1.0, 10: 0.7, 15: 0.4, 17: 0.8},
        {4: 0.3, 7: 0.5, 9: 0.9, 10: 1.0, 16: 0.5, 25: 0.6},
    ),
    "happiness": ({6: 0.8, 12: 1.0}, {6: 1.0, 12: 1.0, 25: 1.0}, {6: 1.0, 12: 1.0, 25: 1.0, 26: 0.35}),
    "sadness": ({1: 1.0, 4: 0.6, 15: 1.0, 17: 0.7}, {1: 1.0, 4: 0.7, 15: 1.0, 17: 0.5, 64: 0.6}),
    "anger": (
        {4: 1.0, 5: 0.5, 7: 0.6, 17: 0.3, 23: 1.0, 24: 0.7},
        {4: 1.0, 5: 0.6, 7: 0.6, 10: 0.4, 16: 0.6, 23: 0.3, 25: 0.9},
    ),
    "neutral": ({},),
}
TUNGSTEN: tuple[Tint, Tint] = ((1.08, 0.92, 0.72), (0.55, 0.78, 0.9))  # warm lamp, teal shadows
MOONLIGHT: tuple[Tint, Tint] = ((0.82, 0.98, 1.08), (0.9, 0.6, 0.55))
RESTING = (1, 2, 4, 5, 7, 12, 15, 17, 25)  # what a face at rest does a little of


DOMAINS: dict[str, Domain] = {
    domain.name: domain
    for domain in (
        Domain(
            name="studio",
            about="posed colour portraits in even light",
            size=(100, 100),
            intensity=(0.75, 1.05),
            scale=(0.275, 0.30),
            turn=5,
            ambient=(0.6, 0.75),
            lamp=(0.1, 0.45),
            clutter=0.05,
            noise=2,
            quality=(90, 96),
        ),
        Domain(
            name="grey",
            about="small grey crops of all kinds of pictures",
            size=(48, 48),
            intensity=(0.65, 1.1),
            scale=(0.33, 0.37),
            turn=10,
            ambient=(0.3, 0.7),
            lamp=(0.0, 1.2),
            clutter=0.7,
            occlusion=0.08,
            blur=0.5,
            level=122,
            noise=4,
            grey=True,
        ),
        Domain(
            name="film",
            about="dark graded film stills with subtle expressions",
            size=(90, 160),
            intensity=(0.55, 0.9),
            scale=(0.29, 0.34),
            turn=12,
            ambient=(0.18, 0.36),
            lamp=(0.8, 1.8),
            grades=(TUNGSTEN, TUNGSTEN, MOONLIGHT),
            backdrop=(12, 70),
            clutter=0.4,
            blur=0.7,
            motion=0.5,
            level=72,
            noise=6,
            quality=(75, 92),
        ),
        Domain(
            name="web",
            about="occluded, compressed pictures from anywhere",
            size=(80, 200),
            intensity=(0.65, 1.1),
            scale=(0.30, 0.35),
            turn=10,
            ambient=(0.35, 0.85),
            lamp=(0.0, 1.2),
            clutter=0.8,
            occlusion=0.4,
            blur=0.5,
            level=122,
            noise=4,
            quality=(16, 50),
        ),
        Domain(
            name="drawing",
            about="line drawings and flat cartoons",
            size=(120, 120),
            intensity=(0.65, 1.15),
            scale=(0.28, 0.33),
            turn=6,
            ambient=(0.3, 0.5),
            lamp=(0.3, 1.2),
            drawn=True,
        ),
    )
}
IDENTITIES = 2000  # of each domain: the first has 0–1999, the second 2000–3999, …


def render(seed: int, domain: str, identity: int, expression: int, index: int) -> Pixels:
    """Render one face and return it as (H, W, 3) RGB with every effect of its domain but the file's compression.

    `expression` is a class index 0–6, `index` counts the pictures of one identity with one expression; an identity is
    the same person in every domain. Raises `UserError` for an unknown domain.
    """
    look = _find_domain(domain)
    person = draw_person(random_generator(seed, "person", identity))
    rng = random_generator(seed, domain, identity, expression, index)
    size = int(rng.integers(look.size[0], look.size[1] + 1))
    canvas = int(np.clip(2 * size, 160, 320)) // 8 * 8
    units = draw_units(look, expression, rng)
    view, light = _draw_view(look, canvas, rng), _draw_light(look, rng)
    gaze = (float(rng.normal(0, 0.02)), float(rng.normal(0, 0.008)))
    ink = _draw_ink(rng) if look.drawn else None
    face, mask = paint(person, units, view, light, canvas, gaze, ink, rng)
    picture = paint_background(look, canvas, ink.paper if ink else None, rng)
    picture.paste(face, mask=mask)
    if rng.random() < look.occlusion:
        occlude(picture, person, units, view, rng)
    return expose(picture, look, size, rng)


def write(root: UPath | Path, domain: str, faces: int, seed: int = 0) -> None:
    """Write about `faces` pictures to ROOT/DOMAIN/SPLIT/EXPRESSION/idNNNN_KK.png or .jpg, over what is there.

    Every identity shows every expression equally often; every fourth is a test identity, and no two domains share one.
    Raises `UserError` for an unknown domain or more faces than there are identities for.
    """
    look = _find_domain(domain)
    samples = list(list_samples(domain, faces))
    folders = {(split, label): root / domain / split / EXPRESSIONS[label] for split, _, label, _ in samples}
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
    for split, identity, expression, index in samples:
        picture = render(seed, domain, identity, expression, index)
        data = encode(picture, look, random_generator(seed, domain, "file", identity, expression, index))
        (folders[split, expression] / f"id{identity:04d}_{index:02d}{look.suffix}").write_bytes(data)


def list_samples(domain: str, faces: int) -> Iterator[tuple[str, int, int, int]]:
    """Yield (split, identity, expression, index) of about `faces` pictures, but of four identities at the least.

    Raises `UserError` for an unknown domain or more faces than there are identities for.
    """
    first = list(DOMAINS.values()).index(_find_domain(domain)) * IDENTITIES
    repeats = 1 if faces < 112 else 2
    people = max(4, round(faces / (repeats * len(EXPRESSIONS))))
    if people > IDENTITIES:
        most = IDENTITIES * 2 * len(EXPRESSIONS)
        raise UserError(f"Cannot make {faces} faces of one synthetic domain: choose at most {most}.")
    for person in range(people):
        split = "test" if person % 4 == 3 else "train"
        for expression in range(len(EXPRESSIONS)):
            for index in range(repeats):
                yield split, first + person, expression, index


def draw_units(domain: Domain, expression: int, rng: np.random.Generator) -> dict[int, float]:
    """Draw action units {number: intensity 0–1.2}: a variant of the prototype and what the face does anyway."""
    units = {unit: float(rng.uniform(0, 0.12)) for unit in RESTING if rng.random() < 0.35}
    variants = PROTOTYPES[EXPRESSIONS[expression]]
    strength = rng.uniform(*domain.intensity)
    for unit, share in variants[int(rng.integers(len(variants)))].items():
        units[unit] = float(np.clip(share * strength * rng.normal(1, 0.13), 0.05, 1.2))
    return units


def _find_domain(name: str) -> Domain:
    if name not in DOMAINS:
        raise unknown("synthetic domain", name, DOMAINS)
    return DOMAINS[name]


def _draw_view(look: Domain, canvas: int, rng: np.random.Generator) -> View:
    yaw, pitch, roll = np.radians(look.turn) * rng.normal(0, (1.0, 0.5, 0.4))
    shift = rng.normal(0, 0.006 + 0.0012 * look.turn, 2)
    return View(
        yaw=float(np.clip(yaw, -0.6, 0.6)),
        pitch=float(np.clip(pitch, -0.3, 0.3)),
        roll=float(roll),
        scale=float(rng.uniform(*look.scale)) * canvas,
        centre=(canvas * (0.5 + float(shift[0])), canvas * (0.485 + float(shift[1]))),
    )


def _draw_light(look: Domain, rng: np.random.Generator) -> Light:
    side = float(rng.choice([-1.0, 1.0]) * rng.uniform(*look.lamp))
    direction = (side, float(rng.uniform(-0.8, 0.0)), 1.0)
    ambient = float(rng.uniform(*look.ambient))
    if look.grades:
        lit, shadow = look.grades[int(rng.integers(len(look.grades)))]
        return Light(direction, ambient, lit, shadow)
    red, blue = rng.normal(1, 0.06 if look.level else 0.02, 2)
    return Light(direction, ambient, (float(red), 1.0, float(blue)))


def _draw_ink(rng: np.random.Generator) -> Ink:
    shade = int(rng.integers(10, 70))
    paper = round_colour(np.clip(rng.normal((247, 243, 234), 6), 200, 255))
    filled = rng.random() < 0.6
    return Ink(
        colour=(shade, shade - int(rng.integers(0, 10)), shade + int(rng.integers(0, 25))),
        width=float(rng.uniform(0.022, 0.05)),
        wobble=float(rng.uniform(0.002, 0.009)),
        fill=bool(filled),
        tone=float(rng.choice([0.25, 0.5, 0.9])),
        cel=float(rng.choice([0.0, 0.5, 0.8])) if filled else 0.0,
        paper=paper,
    )
