"""Five synthetic domains of faces, so that everything can be tried without a licensed data set.

Every sample is a pure function of (seed, domain, identity, expression, index): the same bytes in any order and process.
"""

from __future__ import annotations

import csv
import tomllib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter
from upath import UPath

from cafe.data.layouts import PEOPLE
from cafe.errors import UserError, unknown
from cafe.files import place_below
from cafe.randomness import random_generator
from cafe.synthetic.camera import Domain, Pixels, encode, expose, occlude, paint_background
from cafe.synthetic.face import CameraPose
from cafe.synthetic.person import draw_person, round_colour
from cafe.synthetic.portrait import Ink, Light, paint

_FILE = tomllib.loads(Path(__file__).with_name("domains.toml").read_text())
DOMAINS = TypeAdapter(dict[str, Domain]).validate_python(_FILE["domains"])
PROTOTYPES = TypeAdapter(dict[str, tuple[dict[int, float], ...]]).validate_python(_FILE["prototypes"])
DRAWN = tuple(PROTOTYPES)  # the expressions, in an order on which every picture depends
RESTING = (1, 2, 4, 5, 7, 12, 15, 17, 25)  # the action units that a face at rest shows a little of
IDENTITIES = 2000  # of each domain: the first has 0–1999, the second 2000–3999, …


def render(seed: int, domain: str, identity: int, expression: int, index: int) -> Pixels:
    """Render one face and return it as (H, W, 3) RGB with every effect of its domain but the file's compression.

    `expression` is an index into `DRAWN`, `index` counts the pictures of one identity with one expression; an identity is
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
        occlude(picture, person, view, rng)
    return expose(picture, look, size, rng)


def write(root: UPath | Path, domain: str, faces: int, seed: int = 0) -> None:
    """Write about `faces` pictures to ROOT/DOMAIN/SPLIT/EXPRESSION/idNNNN_KK.png or .jpg, overwriting what is there.

    ROOT/DOMAIN/people.csv says of every identity its sex, age, skin and whether it wears glasses. Every identity shows every
    expression equally often; every fourth is a test identity, and no two domains share one. Raises `UserError` for an
    unknown domain or more faces than there are identities for.
    """
    look = _find_domain(domain)
    samples = list(list_samples(domain, faces))
    folders = {(split, label): UPath(root) / domain / split / DRAWN[label] for split, _, label, _ in samples}
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
    for split, identity, expression, index in samples:
        picture = render(seed, domain, identity, expression, index)
        data = encode(picture, look, random_generator(seed, domain, "file", identity, expression, index))
        place_below(folders[split, expression], f"{name_person(identity)}_{index:02d}{look.suffix}").write_bytes(data)
    identities = dict.fromkeys(identity for _, identity, _, _ in samples)
    people = [
        {"person": name_person(identity), **draw_person(random_generator(seed, "person", identity)).describe()}
        for identity in identities
    ]
    with (UPath(root) / domain / PEOPLE).open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, list(people[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(people)


def name_person(identity: int) -> str:
    """Return the name of an identity: that of its files up to the first `_`."""
    return f"id{identity:04d}"


def list_samples(domain: str, faces: int) -> Iterator[tuple[str, int, int, int]]:
    """Yield (split, identity, expression, index) of about `faces` pictures, of at least four identities.

    Raises `UserError` for an unknown domain or more faces than there are identities for.
    """
    first = list(DOMAINS.values()).index(_find_domain(domain)) * IDENTITIES
    repeats = 1 if faces < 112 else 2
    people = max(4, round(faces / (repeats * len(DRAWN))))
    if people > IDENTITIES:
        most = IDENTITIES * 2 * len(DRAWN)
        raise UserError(f"Cannot make {faces} faces of one synthetic domain: choose at most {most}.")
    for person in range(people):
        split = "test" if person % 4 == 3 else "train"
        for expression in range(len(DRAWN)):
            for index in range(repeats):
                yield split, first + person, expression, index


def draw_units(domain: Domain, expression: int, rng: np.random.Generator) -> dict[int, float]:
    """Draw action units {number: intensity 0–1.2}: a variant of the prototype on top of a face at rest."""
    units = {unit: float(rng.uniform(0, 0.12)) for unit in RESTING if rng.random() < 0.35}
    variants = PROTOTYPES[DRAWN[expression]]
    strength = rng.uniform(*domain.intensity)
    for unit, share in variants[int(rng.integers(len(variants)))].items():
        units[unit] = float(np.clip(share * strength * rng.normal(1, 0.13), 0.05, 1.2))
    return units


def _find_domain(name: str) -> Domain:
    if name not in DOMAINS:
        raise unknown("synthetic domain", name, DOMAINS)
    return DOMAINS[name]


def _draw_view(look: Domain, canvas: int, rng: np.random.Generator) -> CameraPose:
    yaw, pitch, roll = np.radians(look.turn) * rng.normal(0, (1.0, 0.5, 0.4))
    shift = rng.normal(0, 0.006 + 0.0012 * look.turn, 2)
    return CameraPose(
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
    filled = bool(rng.random() < 0.6)
    return Ink(
        colour=(shade, shade - int(rng.integers(0, 10)), shade + int(rng.integers(0, 25))),
        width=float(rng.uniform(0.022, 0.05)),
        wobble=float(rng.uniform(0.002, 0.009)),
        fill=filled,
        tone=float(rng.choice([0.25, 0.5, 0.9])),
        cel=float(rng.choice([0.0, 0.5, 0.8])) if filled else 0.0,
        paper=paper,
    )
