"""Five synthetic domains of faces, so that the whole road can be walked without a single licensed picture.

Every sample is a pure function of (seed, domain, identity, expression, index): the same bytes in any order and process.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from upath import UPath

from cafe.datasets.face import Ink, Light, Person, View, draw_person, paint, project, smooth, trace
from cafe.errors import UserError, unknown
from cafe.expressions import EXPRESSIONS

Pixels = NDArray[np.uint8]
Tint = tuple[float, float, float]

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


@dataclass(frozen=True)
class Domain:
    """How one data set looks; pairs of numbers are ranges, `turn` is the standard deviation of yaw in degrees."""

    name: str
    about: str
    size: tuple[int, int]  # pixels, of a square picture
    intensity: tuple[float, float]  # of the prototypes' action units
    scale: tuple[float, float]  # picture widths per face unit: .30 shows shoulders, .36 is a tight crop
    turn: float
    ambient: tuple[float, float]  # the room's share of the light
    lamp: tuple[float, float]  # how far to the side the lamp stands; 1 is 45 degrees
    grades: tuple[tuple[Tint, Tint], ...] = ()  # colours of lamp and room; without, a mild random white balance
    backdrop: tuple[float, float] = (90, 215)  # mean level of the background
    clutter: float = 0.0  # contrast of the background
    occlusion: float = 0.0  # probability
    blur: float = 0.0  # mean radius, in hundredths of the picture's width
    motion: float = 0.0  # probability that the blur is a moving camera's
    level: float = 0.0  # mean the camera meters for; 0 for a studio or a pen, which need no meter
    noise: float = 0.0  # standard deviation, of 255
    quality: tuple[int, int] | None = None  # of JPEG; None writes PNG
    grey: bool = False
    drawn: bool = False

    @property
    def suffix(self) -> str:
        """Of the files `write` makes."""
        return ".jpg" if self.quality else ".png"


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
    if domain not in DOMAINS:
        raise unknown("synthetic domain", domain, DOMAINS)
    look = DOMAINS[domain]
    person = draw_person(_generator(seed, "person", identity))
    rng = _generator(seed, domain, identity, expression, index)
    size = int(rng.integers(look.size[0], look.size[1] + 1))
    canvas = int(np.clip(2 * size, 160, 320)) // 8 * 8
    units = draw_units(look, expression, rng)
    view, light = _draw_view(look, canvas, rng), _draw_light(look, rng)
    gaze = (float(rng.normal(0, 0.02)), float(rng.normal(0, 0.008)))
    ink = _draw_ink(rng) if look.drawn else None
    face, mask = paint(person, units, view, light, canvas, gaze, ink, rng)
    picture = _paint_background(look, canvas, ink, rng)
    picture.paste(face, mask=mask)
    if rng.random() < look.occlusion:
        _occlude(picture, person, units, view, rng)
    return _expose(picture, look, size, rng)


def write(root: UPath | Path, domain: str, faces: int, seed: int = 0) -> None:
    """Write about `faces` pictures to ROOT/DOMAIN/SPLIT/EXPRESSION/idNNNN_KK.png or .jpg, over what is there.

    Every identity shows every expression equally often; every fourth is a test identity, and no two domains share one.
    Raises `UserError` for an unknown domain or more faces than there are identities for.
    """
    look = DOMAINS.get(domain)
    if look is None:
        raise unknown("synthetic domain", domain, DOMAINS)
    samples = list(list_samples(domain, faces))
    folders = {(split, label): root / domain / split / EXPRESSIONS[label] for split, _, label, _ in samples}
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
    for split, identity, expression, index in samples:
        picture = render(seed, domain, identity, expression, index)
        data = _encode(picture, look, _generator(seed, domain, "file", identity, expression, index))
        (folders[split, expression] / f"id{identity:04d}_{index:02d}{look.suffix}").write_bytes(data)


def list_samples(domain: str, faces: int) -> Iterator[tuple[str, int, int, int]]:
    """Yield (split, identity, expression, index) of about `faces` pictures, but of four identities at the least.

    Raises `UserError` for an unknown domain or more faces than there are identities for.
    """
    if domain not in DOMAINS:
        raise unknown("synthetic domain", domain, DOMAINS)
    repeats = 1 if faces < 112 else 2
    people = max(4, round(faces / (repeats * len(EXPRESSIONS))))
    if people > IDENTITIES:
        most = IDENTITIES * 2 * len(EXPRESSIONS)
        raise UserError(f"Cannot make {faces} faces of one synthetic domain: choose at most {most}.")
    first = list(DOMAINS).index(domain) * IDENTITIES
    for person in range(people):
        split = "test" if person % 4 == 3 else "train"
        for expression in range(len(EXPRESSIONS)):
            for index in range(repeats):
                yield split, first + person, expression, index


def identity_of(file_name: str) -> str:
    """Return the identity a written file shows, `id0007` of `id0007_01.jpg`."""
    return file_name.rsplit("/", 1)[-1].split("_", 1)[0]


def draw_units(domain: Domain, expression: int, rng: np.random.Generator) -> dict[int, float]:
    """Draw action units {number: intensity 0–1.2}: a variant of the prototype and what the face does anyway."""
    units = {unit: float(rng.uniform(0, 0.12)) for unit in RESTING if rng.random() < 0.35}
    variants = PROTOTYPES[EXPRESSIONS[expression]]
    strength = rng.uniform(*domain.intensity)
    for unit, share in variants[int(rng.integers(len(variants)))].items():
        units[unit] = float(np.clip(share * strength * rng.normal(1, 0.13), 0.05, 1.2))
    return units


def _generator(*key: object) -> np.random.Generator:
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


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
    paper = tuple(int(v) for v in np.clip(rng.normal((247, 243, 234), 6), 200, 255))
    filled = rng.random() < 0.6
    return Ink(
        colour=(shade, shade - int(rng.integers(0, 10)), shade + int(rng.integers(0, 25))),
        width=float(rng.uniform(0.022, 0.05)),
        wobble=float(rng.uniform(0.002, 0.009)),
        fill=bool(filled),
        tone=float(rng.choice([0.25, 0.5, 0.9])),
        cel=float(rng.choice([0.0, 0.5, 0.8])) if filled else 0.0,
        paper=(paper[0], paper[1], paper[2]),
    )


def _paint_background(look: Domain, canvas: int, ink: Ink | None, rng: np.random.Generator) -> Image.Image:
    """Studio backdrop, paper, or a blurred somewhere: random colours on a coarse grid with things in front."""
    if ink:
        colour = ink.paper if rng.random() < 0.6 else tuple(int(v) for v in rng.integers(150, 245, 3))
        return Image.new("RGB", (canvas, canvas), (colour[0], colour[1], colour[2]))
    base = rng.uniform(*look.backdrop)
    tint = rng.normal(0, 7 + 11 * look.clutter, 3)
    cells = 2 if look.clutter < 0.1 else int(rng.integers(3, 7))
    grid = base + tint + rng.normal(0, 4 + 30 * look.clutter, (cells, cells, 1))
    grid = grid + rng.normal(0, 8 * look.clutter, (cells, cells, 3))
    small = Image.fromarray(np.clip(grid, 0, 255).astype(np.uint8))
    picture = small.resize((canvas, canvas), Image.Resampling.BICUBIC)
    if look.clutter < 0.3:
        return picture
    draw = ImageDraw.Draw(picture)
    for _ in range(int(rng.integers(0, 2 + round(8 * look.clutter)))):
        x, y, w, h = rng.uniform(0, canvas, 2).tolist() + rng.uniform(canvas * 0.04, canvas * 0.4, 2).tolist()
        colour = tuple(int(v) for v in np.clip(base + rng.normal(0, 45) + rng.normal(0, 18, 3), 0, 255))
        if rng.random() < 0.5:
            draw.rectangle((x, y, x + w, y + h), fill=colour)
        else:
            draw.ellipse((x, y, x + w * 0.5, y + w * 0.5), fill=colour)
    return picture.filter(ImageFilter.BoxBlur(canvas * float(rng.uniform(0.004, 0.025))))


def _occlude(
    picture: Image.Image, person: Person, units: dict[int, float], view: View, rng: np.random.Generator
) -> None:
    """Put one thing in front of the face: a hand, a strand of hair, sunglasses, a surgical mask or a caption."""
    draw = ImageDraw.Draw(picture)
    what = str(rng.choice(["hand", "strand", "sunglasses", "mask", "caption"], p=[0.34, 0.2, 0.12, 0.08, 0.26]))
    side = float(rng.choice([-1.0, 1.0]))
    if what == "strand" and person.hair_style in {"bald", "scarf"}:
        what = "hand"
    if what == "hand":
        _paint_hand(draw, person, view, side, rng)
    elif what == "strand":
        for k in range(9):
            x = side * (0.12 + 0.07 * k)
            tip = (x + side * 0.25, float(rng.uniform(0.4, 0.9)))
            lock = smooth([(x * 0.7, -1.2), (x * 1.2, -0.5), (x + side * 0.1, 0.1), tip])
            shade = float(rng.uniform(0.7, 1.05))
            colour = tuple(min(255, round(c * shade)) for c in person.hair)
            path = lock * view.scale + np.array(view.centre)
            draw.line(path.ravel().tolist(), fill=colour, width=max(2, round(view.scale * 0.11)), joint="curve")
    elif what == "sunglasses":
        curves = trace(person, units)
        dark = tuple(int(v) for v in rng.integers(10, 60, 3))
        for lens in (curves["left_lens"], curves["right_lens"]):
            draw.polygon(project(lens, view).ravel().tolist(), fill=dark)
        bar = project(np.array([(-person.width, -0.06), (person.width, -0.06)]), view)
        draw.line(bar.ravel().tolist(), fill=dark, width=max(2, round(view.scale * 0.05)))
    elif what == "mask":
        cloth = tuple(int(v) for v in rng.normal((176, 206, 222), 12).clip(0, 255))
        half = [(0.35, 0.3), (0.88, 0.4), (0.72, 0.95), (0.3, 1.36)]
        shape = [(0.0, 0.24), *half, *[(-x, y) for x, y in half[::-1]]]
        draw.polygon(project(smooth(shape, 4, closed=True), view).ravel().tolist(), fill=cloth)
        for y in (0.55, 0.75, 0.95):
            pleat = project(np.array([(-0.75, y), (-0.3, y + 0.03), (0.3, y + 0.03), (0.75, y)]), view)
            draw.line(pleat.ravel().tolist(), fill=tuple(v - 28 for v in cloth), width=max(1, round(view.scale * 0.02)))
    else:
        _write_caption(draw, picture.width, rng)


def _paint_hand(draw: ImageDraw.ImageDraw, person: Person, view: View, side: float, rng: np.random.Generator) -> None:
    """Fingers of the person's own skin come in from below, at the cheek, the chin or over the mouth."""
    skin, dark = person.skin, tuple(round(c * 0.72) for c in person.skin)
    reach, top = float(rng.uniform(0.15, 0.75)), float(rng.uniform(0.35, 0.95))
    width = round(view.scale * 0.2)
    for layer, colour in ((0.035, dark), (0.0, skin)):
        for finger in range(4):
            x = side * (reach + 0.19 * finger)
            tip = top + 0.07 * abs(finger - 1.3)
            bone = smooth(
                [(x, tip), (x + side * 0.05, tip + 0.4), (x + side * 0.12, tip + 0.9), (x + side * 0.14, 2.6)]
            )
            path = bone * view.scale + np.array(view.centre)
            radius = width / 2 + layer * view.scale
            draw.line(path.ravel().tolist(), fill=colour, width=round(2 * radius), joint="curve")
            draw.ellipse(
                (path[0, 0] - radius, path[0, 1] - radius, path[0, 0] + radius, path[0, 1] + radius), fill=colour
            )


def _write_caption(draw: ImageDraw.ImageDraw, canvas: int, rng: np.random.Generator) -> None:
    """Lay a line of words over the picture, as pictures that travelled the web have."""
    words = ["when", "you", "see", "it", "monday", "wow", "2019", "me", "again", "www.", "photo", "LOL", "STOCK"]
    text = " ".join(str(word) for word in rng.choice(words, 3))
    place = (canvas * float(rng.uniform(0.0, 0.3)), canvas * float(rng.uniform(0.05, 0.85)))
    font = _font(int(canvas * float(rng.uniform(0.09, 0.16))) // 4 * 4)
    draw.text(place, text, fill=(255, 255, 255), font=font, stroke_width=max(1, canvas // 120), stroke_fill=(0, 0, 0))


@lru_cache(maxsize=32)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _expose(picture: Image.Image, look: Domain, size: int, rng: np.random.Generator) -> Pixels:
    """Take the picture: defocus or motion, the sensor's size, exposure, noise and grey."""
    radius = picture.width / 100 * look.blur * min(2.0, float(rng.exponential()))
    if rng.random() < look.motion:
        picture = _smear(picture, 1.2 * radius, float(rng.uniform(0, np.pi)))
    elif radius > 0.6:
        picture = picture.filter(ImageFilter.BoxBlur(min(radius, picture.width * 0.012)))
    if look.grey:
        picture = picture.convert("L")
    picture = picture.resize(
        (size, size), Image.Resampling.BOX if picture.width % size == 0 else Image.Resampling.HAMMING
    )
    pixels = np.asarray(picture, dtype=np.float32)
    if look.level:
        # The camera meters the middle of the picture and goes two thirds of the way to the level it wants.
        metered = max(1.0, float(pixels[size // 4 : -size // 4].mean()))
        gain = float(np.clip(look.level / metered, 0.7, 2.2)) ** 0.66
        contrast, brightness = float(rng.normal(1, 0.12)), float(rng.normal(0, 11))
        pixels = (pixels * gain - 110) * contrast + 110 + brightness
    if look.noise:
        strength = look.noise * float(rng.uniform(0.4, 1.3))
        pixels = pixels + rng.standard_normal(pixels.shape, dtype=np.float32) * strength
    pixels = np.clip(pixels + 0.5, 0, 255).astype(np.uint8)
    return np.repeat(pixels[:, :, None], 3, axis=2) if look.grey else pixels


def _smear(picture: Image.Image, length: float, angle: float) -> Image.Image:
    """Average the picture along a short straight path, as a moving camera does."""
    steps = 7
    pixels = np.asarray(picture, dtype=np.uint16)
    total = np.zeros_like(pixels)
    for step in np.linspace(-length, length, steps):
        total += np.roll(pixels, (round(step * np.sin(angle)), round(step * np.cos(angle))), axis=(0, 1))
    return Image.fromarray((total // steps).astype(np.uint8))


def _encode(pixels: Pixels, look: Domain, rng: np.random.Generator) -> bytes:
    """Return the file's bytes in the domain's format; grey pictures are stored as one channel."""
    image = Image.fromarray(pixels[:, :, 0] if look.grey else pixels)
    buffer = io.BytesIO()
    if look.quality is None:
        image.save(buffer, "PNG")
    else:
        image.save(buffer, "JPEG", quality=int(rng.integers(look.quality[0], look.quality[1] + 1)))
    return buffer.getvalue()
