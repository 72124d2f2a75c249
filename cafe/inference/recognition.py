"""Frames → faces → expressions: what `cafe predict` does to photographs and videos, in batches and in bounded memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from cafe.data.alignment import SIDE, Detection, align_faces
from cafe.inference.frames import Frame, is_video
from cafe.inference.model import Model
from cafe.inference.quality import Quality, measure_quality

SEARCHED = 16  # frames, as the detector takes them
HELD_BYTES = 2**28  # of pixels, before they are searched or predicted whatever their number
HELD_FACES = 64  # as a tower takes them
HELD_FRAMES = 256

Box = tuple[int, int, int, int]  # left, top, width, height in pixels


@dataclass(frozen=True)
class Search:
    """How faces are looked for: `aligned` takes every picture for one face, aligned already."""

    aligned: bool = False
    every_face: bool = True
    smallest: int = 20  # pixels
    confidence: float = 0.9


@dataclass(frozen=True)
class PredictedFace:
    """A face in a frame and the probabilities (K,) of `classes`; `confidence` is the detector's, None of an aligned face.

    It is unsure when no probability reaches the model's `threshold`.
    """

    box: Box
    confidence: float | None
    quality: Quality
    classes: tuple[str, ...]
    probabilities: np.ndarray
    threshold: float | None = None

    @property
    def expression(self) -> str:
        """The most probable class."""
        return self.classes[int(self.probabilities.argmax())]

    @property
    def unsure(self) -> bool | None:
        """Whether its expression is doubtful by its probability; None where the model has no threshold."""
        return None if self.threshold is None else bool(self.probabilities.max() < self.threshold)

    @property
    def doubts(self) -> list[str]:
        """The names of all reasons to doubt it."""
        return [*(["unsure"] if self.unsure else []), *self.quality.flags]


@dataclass(frozen=True)
class PredictedFrame:
    """What became of a frame: its faces, the largest first; without any, `error` says why.

    `found` counts all its faces, those that were not asked for among them.
    """

    frame: Frame
    faces: list[PredictedFace]
    found: int = 0
    error: str = ""


@dataclass
class _Searched:
    """A frame with the crops of its faces, which wait to be predicted together with others."""

    frame: Frame
    crops: list[np.ndarray] = field(default_factory=list)
    detections: list[Detection | None] = field(default_factory=list)
    boxes: list[Box] = field(default_factory=list)
    found: int = 0
    error: str = ""


def predict_frames(
    frames: Iterable[Frame], model: Model, search: Search, keep_pixels: bool = False
) -> Iterator[PredictedFrame]:
    """Yield every frame with its faces and their probabilities, in order; pixels are dropped once searched.

    Those of photos are kept on request; a video can be read again.
    """
    held: list[_Searched] = []
    for searched in _search_frames(frames, search):
        kept = keep_pixels and not is_video(searched.frame.file)
        held.append(searched if kept else replace(searched, frame=replace(searched.frame, pixels=None)))
        faces = sum(len(one.crops) for one in held)
        if faces >= HELD_FACES or len(held) >= HELD_FRAMES or _count_bytes(one.frame for one in held) > HELD_BYTES:
            yield from _predict(held, model)
            held = []
    yield from _predict(held, model)


def _count_bytes(frames: Iterable[Frame]) -> int:
    return sum(frame.pixels.nbytes for frame in frames if frame.pixels is not None)


def _search_frames(frames: Iterable[Frame], search: Search) -> Iterator[_Searched]:
    waiting: list[Frame] = []
    for frame in frames:
        waiting.append(frame)
        if len(waiting) >= SEARCHED or _count_bytes(waiting) > HELD_BYTES:
            yield from _search(waiting, search)
            waiting = []
    yield from _search(waiting, search)


def _search(frames: list[Frame], search: Search) -> Iterator[_Searched]:
    """Yield some frames with the crops of their faces."""
    photos = [frame.pixels for frame in frames if frame.pixels is not None]
    aligned = (
        iter(align_faces(photos, SIDE, search.smallest, search.every_face, search.confidence))
        if photos and not search.aligned
        else iter(())
    )
    for frame in frames:
        if frame.pixels is None:
            yield _Searched(frame, error=frame.error)
        elif search.aligned:
            height, width = frame.pixels.shape[:2]
            yield _Searched(frame, [frame.pixels], [None], [(0, 0, width, height)], 1)
        else:
            faces = next(aligned)
            boxes = [find_box(found, frame.pixels) for found in faces.detections]
            yield _Searched(frame, faces.crops, list(faces.detections), boxes, faces.found, faces.reason)


def _predict(held: list[_Searched], model: Model) -> Iterator[PredictedFrame]:
    shares = iter(model.predict([crop for searched in held for crop in searched.crops]))
    for searched in held:
        faces = [
            PredictedFace(
                box,
                found.confidence if found else None,
                measure_quality(crop, found),
                model.classes,
                next(shares),
                model.threshold,
            )
            for crop, found, box in zip(searched.crops, searched.detections, searched.boxes, strict=True)
        ]
        yield PredictedFrame(searched.frame, faces, searched.found, searched.error)


def find_box(face: Detection, pixels: np.ndarray) -> Box:
    """Return the part of a face's box that lies in its picture (H, W, 3)."""
    left, top, right, bottom = (max(0, round(value)) for value in face.box)
    right, bottom = min(right, pixels.shape[1]), min(bottom, pixels.shape[0])
    return left, top, right - left, bottom - top
