"""The camera and the scene around a portrait: background, things in the way, blur, exposure, noise and compression.

A `Domain` says how one data set takes its pictures: expression recognition fails where these differ.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from cafe.synthetic.face import SIDES, CameraPose, mirror, project, smooth, trace
from cafe.synthetic.person import Colour, Person, round_colour

Pixels = NDArray[np.uint8]
Tint = tuple[float, float, float]


@dataclass(frozen=True)
class Domain:
    """How one data set looks; pairs of numbers are ranges, `turn` is the standard deviation of yaw in degrees."""

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
    level: float = 0.0  # mean brightness the camera exposes for; 0 for studios and drawings, where it is fixed
    noise: float = 0.0  # standard deviation, of 255
    quality: tuple[int, int] | None = None  # of JPEG; None writes PNG
    grey: bool = False
    drawn: bool = False

    @property
    def suffix(self) -> str:
        """Of the files `write` makes."""
        return ".jpg" if self.quality else ".png"


def paint_background(look: Domain, canvas: int, paper: Colour | None, rng: np.random.Generator) -> Image.Image:
    """Paint a square of `canvas` pixels: a studio backdrop, plain or coloured paper, or a scene out of focus.

    A scene is random colours on a coarse grid with shapes in front.
    """
    if paper:
        colour = paper if rng.random() < 0.6 else round_colour(rng.integers(150, 245, 3))
        return Image.new("RGB", (canvas, canvas), colour)
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
        colour = round_colour(np.clip(base + rng.normal(0, 45) + rng.normal(0, 18, 3), 0, 255))
        if rng.random() < 0.5:
            draw.rectangle((x, y, x + w, y + h), fill=colour)
        else:
            draw.ellipse((x, y, x + w * 0.5, y + w * 0.5), fill=colour)
    return picture.filter(ImageFilter.BoxBlur(canvas * float(rng.uniform(0.004, 0.025))))


def _paint_hand(picture: Image.Image, person: Person, view: CameraPose, side: float, rng: np.random.Generator) -> None:
    """Fingers of the person's own skin come in from below, at the cheek, the chin or over the mouth."""
    draw = ImageDraw.Draw(picture)
    skin, dark = person.skin, round_colour(round(c * 0.72) for c in person.skin)
    reach, top = float(rng.uniform(0.15, 0.75)), float(rng.uniform(0.35, 0.95))
    width = round(view.scale * 0.2)
    for layer, colour in ((0.035, dark), (0.0, skin)):
        for finger in range(4):
            x, tip = side * (reach + 0.19 * finger), top + 0.07 * abs(finger - 1.3)
            bone = smooth(
                [(x, tip), (x + side * 0.05, tip + 0.4), (x + side * 0.12, tip + 0.9), (x + side * 0.14, 2.6)]
            )
            path = bone * view.scale + np.array(view.centre)
            radius = width / 2 + layer * view.scale
            draw.line(path.ravel().tolist(), fill=colour, width=round(2 * radius), joint="curve")
            draw.ellipse([*(path[0] - radius), *(path[0] + radius)], fill=colour)


def _paint_strand(
    picture: Image.Image, person: Person, view: CameraPose, side: float, rng: np.random.Generator
) -> None:
    """Nine locks fall from the crown over one half of the face."""
    draw = ImageDraw.Draw(picture)
    for k in range(9):
        x = side * (0.12 + 0.07 * k)
        tip = (x + side * 0.25, float(rng.uniform(0.4, 0.9)))
        lock = smooth([(x * 0.7, -1.2), (x * 1.2, -0.5), (x + side * 0.1, 0.1), tip])
        shade = float(rng.uniform(0.7, 1.05))
        colour = tuple(min(255, round(c * shade)) for c in person.hair)
        path = lock * view.scale + np.array(view.centre)
        draw.line(path.ravel().tolist(), fill=colour, width=max(2, round(view.scale * 0.11)), joint="curve")


def _paint_sunglasses(
    picture: Image.Image, person: Person, view: CameraPose, side: float, rng: np.random.Generator
) -> None:
    """Dark lenses where the person's glasses would sit, and a bar from ear to ear."""
    draw, curves = ImageDraw.Draw(picture), trace(person, {})
    dark = round_colour(rng.integers(10, 60, 3))
    for name in SIDES:
        draw.polygon(project(curves[f"{name}_lens"], view).ravel().tolist(), fill=dark)
    bar = project(np.array([(-person.width, -0.06), (person.width, -0.06)]), view)
    draw.line(bar.ravel().tolist(), fill=dark, width=max(2, round(view.scale * 0.05)))


def _paint_mask(picture: Image.Image, person: Person, view: CameraPose, side: float, rng: np.random.Generator) -> None:
    """A surgical mask from the nose to below the chin, with three pleats."""
    draw = ImageDraw.Draw(picture)
    cloth = round_colour(rng.normal((176, 206, 222), 12).clip(0, 255))
    half = [(0.35, 0.3), (0.88, 0.4), (0.72, 0.95), (0.3, 1.36)]
    outline = smooth([(0.0, 0.24), *half, *mirror(half)], 4, closed=True)
    draw.polygon(project(outline, view).ravel().tolist(), fill=cloth)
    for y in (0.55, 0.75, 0.95):
        pleat = project(np.array([(-0.75, y), (-0.3, y + 0.03), (0.3, y + 0.03), (0.75, y)]), view)
        draw.line(pleat.ravel().tolist(), fill=tuple(v - 28 for v in cloth), width=max(1, round(view.scale * 0.02)))


def _write_caption(
    picture: Image.Image, person: Person, view: CameraPose, side: float, rng: np.random.Generator
) -> None:
    """Lay a line of words over the picture, as pictures shared on the web often have."""
    draw, canvas = ImageDraw.Draw(picture), picture.width
    words = ["when", "you", "see", "it", "monday", "wow", "2019", "me", "again", "www.", "photo", "LOL", "STOCK"]
    text = " ".join(str(word) for word in rng.choice(words, 3))
    place = (canvas * float(rng.uniform(0.0, 0.3)), canvas * float(rng.uniform(0.05, 0.85)))
    font = _font(int(canvas * float(rng.uniform(0.09, 0.16))) // 4 * 4)
    draw.text(place, text, fill=(255, 255, 255), font=font, stroke_width=max(1, canvas // 120), stroke_fill=(0, 0, 0))


@lru_cache(maxsize=32)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


OCCLUDERS = {
    "hand": _paint_hand, "strand": _paint_strand, "sunglasses": _paint_sunglasses, "mask": _paint_mask,
    "caption": _write_caption,
}  # fmt: skip


def occlude(picture: Image.Image, person: Person, view: CameraPose, rng: np.random.Generator) -> None:
    """Put one thing in front of the face: a hand, a strand of hair, sunglasses, a surgical mask or a caption."""
    what = str(rng.choice(list(OCCLUDERS), p=[0.34, 0.2, 0.12, 0.08, 0.26]))
    side = float(rng.choice([-1.0, 1.0]))
    if what == "strand" and person.hair_style in {"bald", "scarf"}:
        what = "hand"
    OCCLUDERS[what](picture, person, view, side, rng)


def plant(pixels: Pixels, what: str, person: Person, view: CameraPose, seed: int) -> tuple[Pixels, NDArray[np.bool_]]:
    """Put one of `OCCLUDERS` on a finished picture (H, W, 3) of anybody, where a face seen like `view` would be.

    Returns the picture and where the thing lies (H, W).
    """
    painted = []
    for ground in (pixels, np.zeros_like(pixels), np.full_like(pixels, 255)):
        picture, rng = Image.fromarray(ground), np.random.default_rng(seed)
        OCCLUDERS[what](picture, person, view, float(rng.choice([-1.0, 1.0])), rng)
        painted.append(np.asarray(picture))
    return painted[0], (painted[1] == painted[2]).all(axis=2)  # covered is what looks the same on black and on white


def expose(picture: Image.Image, look: Domain, size: int, rng: np.random.Generator) -> Pixels:
    """Take the picture, (size, size, 3): defocus or motion, the sensor's size, exposure, noise and grey."""
    radius = picture.width / 100 * look.blur * min(2.0, float(rng.exponential()))
    if rng.random() < look.motion:
        picture = _smear(picture, 1.2 * radius, float(rng.uniform(0, np.pi)))
    elif radius > 0.6:
        picture = picture.filter(ImageFilter.BoxBlur(min(radius, picture.width * 0.012)))
    if look.grey:
        picture = picture.convert("L")
    filtering = Image.Resampling.BOX if picture.width % size == 0 else Image.Resampling.HAMMING
    picture = picture.resize((size, size), filtering)
    pixels = np.asarray(picture, dtype=np.float32)
    if look.level:
        # The camera meters the middle of the picture and goes two thirds of the way to its level.
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


def encode(pixels: Pixels, look: Domain, rng: np.random.Generator) -> bytes:
    """Return the file's bytes in the domain's format; grey pictures are stored as one channel."""
    image = Image.fromarray(pixels[:, :, 0] if look.grey else pixels)
    buffer = io.BytesIO()
    if look.quality is None:
        image.save(buffer, "PNG")
    else:
        image.save(buffer, "JPEG", quality=int(rng.integers(look.quality[0], look.quality[1] + 1)))
    return buffer.getvalue()
