"""The portrait of a traced face: its curves are filled in order, as a photograph or as a drawing in ink.

Flat colour, soft shade and folds of the skin are separate layers, so that one lamp can light all of them together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from cafe.synthetic.face import SIDES, CameraPose, Curve, project, trace
from cafe.synthetic.person import Colour, Person, mix_colours

HAIRY = {"hair", "hair_back", "bun", "beard", "moustache"}
GAIN = 1.35  # the brightest a highlight may make the flat colour


@dataclass(frozen=True)
class Light:
    """One lamp and the room: `direction` points to the lamp, `ambient` is the room's share, colours multiply."""

    direction: tuple[float, float, float]
    ambient: float
    lit: tuple[float, float, float] = (1.0, 1.0, 1.0)
    shadow: tuple[float, float, float] = (1.0, 0.88, 0.82)


@dataclass(frozen=True)
class Ink:
    """How a face is drawn instead of photographed: line width and wobble in face units, and what is filled."""

    colour: Colour
    width: float
    wobble: float
    fill: bool  # flat colours, or paper between the lines
    tone: float  # how far hair is hatched towards the ink where nothing is filled
    cel: float  # depth of the one hard-edged shadow; 0 for none
    paper: Colour


class Painter:
    """Draws the curves of one face onto layers: flat colour, broad shade, fine shade, and the person's mask."""

    def __init__(
        self, size: int, view: CameraPose, curves: Mapping[str, Curve], ink: Ink | None, rng: np.random.Generator
    ):
        names = list(curves)
        pixels = project(np.concatenate([curves[name] for name in names]), view)
        ends = np.cumsum([len(curves[name]) for name in names])[:-1]
        self.curves = dict(zip(names, np.split(pixels, ends), strict=True))
        if ink:  # drawn by hand: each curve drifts a little
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
        if self.ink and not self.ink.fill:
            dark = self.ink.tone * (1 - sum(colour) / 765) if name in HAIRY else 0.0
            colour = mix_colours(self.ink.paper, self.ink.colour, dark)
        points = self.points(name)
        self.on_flat.polygon(points, fill=colour)
        if self.ink and outline:
            width = self.pixels(self.ink.width)
            self.on_flat.line(points + points[:2], fill=self.ink.colour, width=width, joint="curve")
        if mask:
            self.on_mask.polygon(points, fill=255)

    def line(self, name: str, colour: Colour, width: float) -> None:
        """Draw an open curve, `width` in face units."""
        self.on_flat.line(self.points(name), fill=colour, width=self.pixels(width), joint="curve")

    def shade(self, name: str, level: float) -> None:
        """Darken (level < 1) or lighten a region softly."""
        self.on_broad.polygon(self.points(name, 4), fill=round(128 * level))

    def shade_along(self, name: str, level: float, width: float) -> None:
        """Darken or lighten a soft stripe along an open curve, `width` in face units."""
        self.on_broad.line(self.points(name, 4), fill=round(128 * level), width=max(1, self.pixels(width) // 4))

    def fold(self, name: str, depth: float, width: float = 0.035) -> None:
        """Press a soft line of `depth` 0–1 into the skin."""
        if depth > 0.03:
            level, thickness = round(255 * (1 - min(depth, 0.8))), max(1, self.pixels(width) // 2)
            self.on_fine.line(self.points(name, 2), fill=level, width=thickness)

    def points(self, name: str, shrink: int = 1) -> list[float]:
        """Return a curve as Pillow wants it, x, y, x, y, …, on a layer `shrink` times smaller than the picture."""
        flattened: list[float] = (self.curves[name] / shrink).ravel().tolist()
        return flattened

    def pixels(self, width: float) -> int:
        """Return a width in face units as whole pixels."""
        return max(1, round(width * self.view.scale))


def paint(
    person: Person,
    units: Mapping[int, float],
    view: CameraPose,
    light: Light,
    size: int,
    gaze: tuple[float, float],
    ink: Ink | None,
    rng: np.random.Generator,
) -> tuple[Image.Image, Image.Image]:
    """Paint a face with action units on a square canvas of `size` pixels; return the picture and the person's mask."""
    painter = Painter(size, view, trace(person, units, gaze), ink, rng)
    au: Mapping[int, float] = defaultdict(float, units)
    _paint_head(painter, person)
    _paint_mouth(painter, person)
    _paint_eyes(painter, person)
    _paint_hair(painter, person)
    if person.glasses != "none":
        _paint_glasses(painter, person)
    if ink:
        _draw_folds(painter, person, au, ink)
        if ink.cel:
            painter.flat = _shade_cel(painter, light, ink)
    else:
        _press_folds(painter, person, au, light)
        painter.flat = _shade_soft(painter, light)
    _paint_glints(painter)
    return painter.flat, painter.mask


def _paint_head(on: Painter, p: Person) -> None:
    hair = p.cloth if p.hair_style == "scarf" else p.hair
    skin, dark = p.skin, mix_colours(p.skin, (70, 30, 25), 0.25)
    on.fill("hair_back", mix_colours(hair, (0, 0, 0), 0.18), mask=True)
    on.fill("bun", hair, mask=True)
    on.fill("neck", skin, mask=True)
    on.fill("shirt", p.cloth if p.hair_style != "scarf" else mix_colours(p.cloth, (20, 20, 30), 0.5), mask=True)
    if p.hair_style in {"short", "crop", "bald", "bun", "parted", "fringe"}:
        for side in SIDES:
            on.fill(f"{side}_ear", mix_colours(skin, (200, 70, 60), 0.1), mask=True)
    on.fill("head", skin, mask=True)
    if p.beard == "full":
        on.fill("beard", mix_colours(p.hair, skin, 0.12), mask=True)
    if p.beard in {"full", "moustache"}:
        on.fill("moustache", mix_colours(p.hair, skin, 0.08), outline=p.beard == "moustache")
    for side in SIDES:
        on.fill(f"{side}_nostril", dark if on.ink is None else on.ink.colour, outline=False)


def _paint_mouth(on: Painter, p: Person) -> None:
    lips = mix_colours(p.skin, (168, 52, 58), 0.42)
    outline = on.ink is not None and on.ink.fill
    on.fill("mouth_hole", (66, 20, 24), outline=False)
    on.fill("tongue", (168, 78, 82), outline=False)
    on.fill("teeth_lower", (212, 204, 192), outline=False)
    on.fill("teeth", (240, 234, 222), outline=False)
    on.fill("lip_lower", mix_colours(lips, (255, 170, 160), 0.12), outline=outline)
    on.fill("lip_upper", mix_colours(lips, (90, 20, 30), 0.18), outline=outline)
    edge = on.ink.colour if on.ink else mix_colours(lips, (40, 8, 12), 0.62)
    on.line("mouth_inner_top", edge, on.ink.width if on.ink else 0.022)
    on.line("mouth_inner_low", edge, on.ink.width if on.ink else 0.014)


def _paint_eyes(on: Painter, p: Person) -> None:
    ink = on.ink
    line = ink.colour if ink else (38, 24, 22)
    brow, pupil = (p.brow, (16, 13, 14)) if ink is None else (p.brow if ink.fill else line, line)
    under = mix_colours(p.skin, (90, 36, 34), 0.45)
    for side in SIDES:
        on.fill(f"{side}_lid", mix_colours(p.skin, (110, 60, 60), 0.10), outline=False)
        on.fill(f"{side}_eye", (240, 236, 230), outline=False)
        if ink is None or ink.fill:
            on.fill(f"{side}_iris", p.iris, outline=False)
        else:
            on.line(f"{side}_iris", line, ink.width * 0.7)
        on.on_flat.polygon(on.points(f"{side}_pupil"), fill=pupil)
        if ink is None:
            on.line(f"{side}_crease", mix_colours(p.skin, (70, 30, 28), 0.34), 0.013)
        on.line(f"{side}_lid_lower", line if ink else under, ink.width * 0.6 if ink else 0.012)
        on.line(f"{side}_lid_upper", line, max(0.03, ink.width * 1.2) if ink else 0.032)
        on.on_flat.polygon(on.points(f"{side}_brow_shape"), fill=brow)


def _paint_hair(on: Painter, p: Person) -> None:
    if p.hair_style == "bald":
        return
    hair = p.cloth if p.hair_style == "scarf" else p.hair
    on.fill("hair", hair, mask=True)
    if p.hair_style != "scarf" and on.ink is None:
        on.line("strand_high", mix_colours(hair, (255, 235, 210), 0.14), 0.07)
        on.line("strand_low", mix_colours(hair, (255, 235, 210), 0.07), 0.05)


def _paint_glasses(on: Painter, p: Person) -> None:
    frame = on.ink.colour if on.ink else (44, 36, 38)
    width = on.pixels(0.03 if p.glasses == "round" else 0.045)
    for side in SIDES:
        lens = on.points(f"{side}_lens")
        on.on_flat.line(lens + lens[:4], fill=frame, width=width, joint="curve")
    on.on_flat.line([*on.curves["left_lens"][0], *on.curves["right_lens"][10]], fill=frame, width=width)


def _press_folds(on: Painter, p: Person, au: Mapping[int, float], light: Light) -> None:
    """Shade sockets, nose, cheeks and the folds that age and action units press into the skin."""
    old = max(0.0, p.age - 0.3)
    on.shade("neck_shadow", 0.62)
    on.shade("head", 1.0)
    on.shade("forehead", 1.1)
    on.shade("nose_base", 0.74)
    for side, s in SIDES.items():
        on.shade(f"{side}_temple", 0.86)
        on.shade(f"{side}_hollow", 0.93 - 0.1 * old)
        on.shade(f"{side}_socket", 0.88 - 0.07 * au[4])
        on.shade(f"{side}_inner_socket", 0.76 - 0.1 * au[4])
        on.shade(f"{side}_nose_side", 0.86 - 0.16 * max(0.0, -s * light.direction[0]))
        on.shade(f"{side}_cheek", 1.08 + 0.1 * au[6] + 0.05 * au[12])
        on.fold(f"{side}_fold", 0.10 + 0.45 * old + 0.34 * au[12] + 0.34 * max(au[9], au[10]) + 0.1 * au[20], 0.045)
        on.fold(f"{side}_wing", 0.34 + 0.3 * au[9], 0.035)
        on.fold(f"{side}_bag", 0.10 + 0.4 * old + 0.34 * au[6] + 0.24 * au[7] + 0.2 * au[9], 0.03)
        on.fold(f"{side}_wrinkle_low", 0.5 * old + 0.42 * min(1, au[1] + 0.3 * au[2]) * (0.35 + p.age), 0.026)
        on.fold(f"{side}_wrinkle_high", 0.45 * old + 0.36 * au[1] * (0.3 + p.age), 0.026)
        on.fold(f"{side}_frown", 0.25 * old + 0.5 * au[4] + 0.25 * au[9], 0.03)
        on.fold(f"{side}_crinkle", 0.6 * au[9], 0.028)
        depth = 0.6 * old + 0.42 * au[6] * (0.25 + p.age)
        if depth > 0.05:
            feet = on.points(f"{side}_feet", 2)
            for start in range(0, 12, 4):  # three lines of two points
                on.on_fine.line(feet[start : start + 4], fill=round(255 * (1 - min(depth, 0.6))))
    on.shade("nose_tip", 1.16)
    on.shade_along("nose_ridge", 1.14, 0.06)
    on.shade("under_lip", 0.78)
    on.shade("chin_ball", 1.05)
    on.fold("chin_dent", 0.45 * au[17], 0.04)
    on.fold("philtrum", 0.12, 0.05)
    if p.hair_style != "bald":
        on.shade_along("hair_shadow", 0.75, 0.12)
    if p.beard == "stubble":
        on.shade("beard", 0.78)


def _draw_folds(on: Painter, p: Person, au: Mapping[int, float], ink: Ink) -> None:
    """Draw in ink what shading would show: the nose, and the folds that are deep enough for a line."""
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


def _shine(view: CameraPose, light: Light, size: int) -> NDArray[np.float32]:
    """Return how bright each pixel of a head-shaped ellipsoid is, 1 when it faces the lamp: (size, size)."""
    unit = 4.0 / view.scale
    x = ((np.arange(size, dtype=np.float32) - view.centre[0] / 4) * unit / 1.12)[None, :]
    y = ((np.arange(size, dtype=np.float32) - view.centre[1] / 4) * unit / 1.7)[:, None]
    z = np.sqrt(np.clip(1.05 - x * x - y * y, 0.02, None))
    lx, ly, lz = np.array(light.direction) / np.linalg.norm(light.direction)
    facing = np.clip(x * lx + y * ly + z * lz, 0, None)
    return np.asarray(1.08 * (light.ambient + (1 - light.ambient) * facing), dtype=np.float32)


def _shade_cel(on: Painter, light: Light, ink: Ink) -> Image.Image:
    """Lay one hard-edged shadow over the third of the face that the lamp reaches least."""
    level = _shine(on.view, light, on.size // 4)
    dark = Image.fromarray((255 * ink.cel * (level < np.quantile(level, 0.35))).astype(np.uint8)).resize(on.flat.size)
    tinted = ImageChops.multiply(on.flat, Image.new("RGB", on.flat.size, (120, 110, 130)))
    return Image.composite(tinted, on.flat, ImageChops.multiply(dark, on.mask))


def _shade_soft(on: Painter, light: Light) -> Image.Image:
    """Multiply the flat colours by lamp, broad shade and fine folds; shadows take the room's colour."""
    broad = np.asarray(on.broad.filter(ImageFilter.GaussianBlur(on.view.scale * 0.014)), dtype=np.float32) / 128
    level = np.clip(broad * _shine(on.view, light, on.size // 4) * (255 / GAIN), 0, 255).astype(np.uint8)
    fine = on.fine.filter(ImageFilter.GaussianBlur(on.view.scale * 0.008))
    shade = ImageChops.multiply(Image.fromarray(level).resize(on.fine.size, Image.Resampling.BICUBIC), fine)
    shade = shade.resize(on.flat.size, Image.Resampling.BILINEAR)
    ramp = np.arange(256) / 255 * GAIN
    share = np.clip(ramp, 0, 1)
    bands = []
    for lit, shadow in zip(light.lit, light.shadow, strict=True):
        tinted = ramp * (shadow + (lit - shadow) * share) / GAIN * 255
        bands.append(shade.point(np.clip(tinted, 0, 255).round().astype(int).tolist()))
    lighted = ImageChops.multiply(on.flat, Image.merge("RGB", bands))
    return lighted.point([min(255, round(v * GAIN)) for v in range(256)] * 3)


def _paint_glints(on: Painter) -> None:
    """Paint the glints of the eyes last: they are as bright in the dark."""
    draw = ImageDraw.Draw(on.flat)
    for side in SIDES:
        draw.polygon(on.points(f"{side}_glint"), fill=(250, 250, 248))
