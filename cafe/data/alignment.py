"""Photographs → upright face crops, framed as expression data sets are: eyes level, at a fixed place and distance.

Used to prepare raw photos and, with the same settings, to predict on them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from PIL import Image

from cafe.data.detector import Mtcnn, load_mtcnn

SIDE = 224  # pixels of a crop, unless others are asked for
FINEST = 8  # samples to a pixel of a crop along each axis, at most

# Where the eyes lie in a crop, in shares of its side, as in FERPlus' pictures, of which the model that ships has learned: it
# shows a frontal face from forehead to chin and hardly any hair.
EYE_HEIGHT = 0.389
EYE_DISTANCE = 0.376
# From eyes to mouth a frontal face measures 1.155 times the distance of its eyes (ArcFace's template, Deng et al. 2019). In
# a turned head the eyes are closer together but the mouth is as far from them: the larger of the two sets the scale.
EYES_TO_MOUTH = 1.155

# Photos are searched on square canvases, of which they fill four fifths, so that tight crops have room around them:
# {side of the canvas: longest side of a photo put on it}, in pixels.
CANVASES: dict[int, float] = {192: 160, 512: 640, 1280: float("inf")}
BATCH = 16
SMALLEST_SEARCHED = 20  # pixels on the canvas


@dataclass(frozen=True)
class Detection:
    """A face in a photo, in its pixels: box (left, top, right, bottom), eyes (2, 2), mouth and nose (2,) as x, y."""

    box: tuple[float, float, float, float]
    eyes: np.ndarray
    mouth: np.ndarray
    confidence: float
    nose: np.ndarray | None = None

    @property
    def size(self) -> float:
        """The shorter side of the box."""
        return min(self.box[2] - self.box[0], self.box[3] - self.box[1])


@dataclass(frozen=True)
class Aligned:
    """The outcome for a photo: the crops (S, S, 3), largest face first, and where each face was.

    `found` counts all faces, `tiny` those too small to use. Without a crop `reason` says why.
    """

    crops: list[np.ndarray]
    detections: list[Detection]
    found: int
    tiny: int
    reason: str = ""


def align_faces(
    photos: Sequence[np.ndarray],
    size: int = SIDE,
    smallest: int = 32,
    every_face: bool = False,
    confidence: float = 0.9,
) -> list[Aligned]:
    """Return for each photo (H, W, 3) uint8 its largest face, or every face, turned upright and cropped to (size, size, 3).

    A face whose box is narrower than `smallest` pixels is counted but not used; a detection below `confidence` is ignored.
    Where a crop reaches beyond the photo, the border is repeated. Raises `UserError` when the detector is not installed.
    """
    return [
        _align(photo, found, size, smallest, every_face)
        for photo, found in zip(photos, detect_faces(photos, confidence), strict=True)
    ]


def _align(photo: np.ndarray, found: list[Detection], size: int, smallest: int, every_face: bool) -> Aligned:
    usable = [detection for detection in found if detection.size >= smallest]
    tiny = len(found) - len(usable)
    if not found:
        return Aligned([], [], 0, 0, "no face found")
    if not usable:
        return Aligned([], [], len(found), tiny, f"face of {found[0].size:.0f} pixels, at least {smallest} are needed")
    chosen = usable if every_face else usable[:1]
    return Aligned([crop_face(photo, detection, size) for detection in chosen], chosen, len(found), tiny)


def detect_faces(photos: Sequence[np.ndarray], confidence: float = 0.9) -> list[list[Detection]]:
    """Return the faces of each photo, largest first; photos are searched in batches whatever their sizes."""
    results: list[list[Detection]] = [[] for _ in photos]
    for canvas, positions in _batches(photos):
        placed = [_place(photos[position], canvas) for position in positions]
        found = find_detector().detect(np.stack([picture for picture, _, _ in placed]))
        for position, (_, scale, corner), own in zip(positions, placed, found, strict=True):
            faces = [
                _detection(box, points, float(chance), scale, corner)
                for box, points, chance in zip(own.boxes, own.points, own.confidence, strict=True)
                if chance >= confidence
            ]
            results[position] = sorted(faces, key=lambda face: -face.size)
    return results


def _detection(box: np.ndarray, points: np.ndarray, chance: float, scale: float, corner: np.ndarray) -> Detection:
    """Return a face found on a canvas in the pixels of its photo; the points are eyes, nose and corners of the mouth."""
    left, top, right, bottom = ((box.reshape(2, 2).astype(float) - corner) / scale).ravel().tolist()
    points = (points.astype(float) - corner) / scale
    return Detection((left, top, right, bottom), points[:2], points[3:].mean(axis=0), chance, points[2])


def _batches(photos: Sequence[np.ndarray]) -> Iterator[tuple[int, list[int]]]:
    shortest = 0.0
    for canvas, longest in CANVASES.items():
        positions = [number for number, photo in enumerate(photos) if shortest < max(photo.shape[:2]) <= longest]
        shortest = longest
        for start in range(0, len(positions), BATCH):
            yield canvas, positions[start : start + BATCH]


def _place(photo: np.ndarray, canvas: int) -> tuple[np.ndarray, float, np.ndarray]:
    """Return a photo in the middle of a grey square canvas, the scale it was given and its corner (x, y) there."""
    height, width = photo.shape[:2]
    scale = 0.8 * canvas / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    corner = ((canvas - size[0]) // 2, (canvas - size[1]) // 2)
    square = Image.new("RGB", (canvas, canvas), (127, 127, 127))
    square.paste(Image.fromarray(photo).resize(size, Image.Resampling.BILINEAR), corner)
    return np.asarray(square), scale, np.array(corner, float)


@cache
def find_detector() -> Mtcnn:
    """Return the face detector, on a GPU when there is one; raise `UserError` when its weights are not installed."""
    return load_mtcnn(SMALLEST_SEARCHED).to("cuda" if torch.cuda.is_available() else "cpu")


def crop_face(photo: np.ndarray, face: Detection, size: int) -> np.ndarray:
    """Return the upright crop (size, size, 3) of a face: eyes level, their middle in the middle of the width."""
    centre, level = face.eyes.mean(axis=0), face.eyes[1] - face.eyes[0]
    distance = float(np.linalg.norm(level))
    scale = max(distance, float(np.linalg.norm(face.mouth - centre)) / EYES_TO_MOUTH) / (EYE_DISTANCE * size)
    right = level / max(distance, 1e-6) * scale  # one pixel of the crop to the right, in the photo
    down = np.array([-right[1], right[0]])
    origin = centre - right * size / 2 - down * size * EYE_HEIGHT
    finer = min(FINEST, max(1, int(np.ceil(scale))))  # samples to a pixel along each axis: large faces are averaged
    corners = np.array([origin + right * x * size + down * y * size for x in (0, 1) for y in (0, 1)])
    low = np.floor(corners.min(axis=0)).astype(int) - 2
    high = np.ceil(corners.max(axis=0)).astype(int) + 3
    columns, rows = (np.arange(*ends) for ends in zip(low, high, strict=True))
    part = photo.take(rows, axis=0, mode="clip").take(columns, axis=1, mode="clip")  # the border is repeated
    right, down, origin = right / finer, down / finer, origin - low
    picture = Image.fromarray(part).transform(
        (size * finer, size * finer),
        Image.Transform.AFFINE,
        (right[0], down[0], origin[0], right[1], down[1], origin[1]),
        Image.Resampling.BICUBIC,
    )
    return np.asarray(picture.resize((size, size), Image.Resampling.BOX))
