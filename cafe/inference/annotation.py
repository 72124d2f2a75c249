"""Pictures with what was found in them: a box and the expression for every face, as pictures and as videos."""

from __future__ import annotations

import math
import posixpath
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from itertools import cycle, islice
from types import TracebackType
from typing import IO, Any

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from upath import UPath

from cafe.errors import UserError
from cafe.files import check_different, check_outputs, place_below, write_whole
from cafe.inference.frames import Frame, is_video, read_rate, read_video
from cafe.inference.recognition import PredictedFace, PredictedFrame
from cafe.outputs import MARK, check_replaced

# Palettes told apart by colour-blind readers too: Wong's ("Points of view: Color blindness", Nature Methods 2011) for the
# seven basic expressions, and for other classes, in their order, Tol's light one, made for black writing.
COLOURS = {
    "surprise": "#e69f00", "fear": "#cc79a7", "disgust": "#009e73", "happiness": "#f0e442", "sadness": "#56b4e9",
    "anger": "#d55e00", "neutral": "#cccccc",
}  # fmt: skip
OTHER_COLOURS = ("#77aadd", "#ee8866", "#eedd88", "#ffaabb", "#99ddff", "#44bb99", "#bbcc33", "#aaaa00", "#dddddd")
WRITTEN = (".jpg", ".jpeg", ".png")  # forms that pictures keep; others become JPEG
MP4, COPY = "mp4", f"annotated by {MARK}"  # the mark of a copy, which another may take the place of
Show = Callable[[Image.Image, float], None]

TICKS = 90_000  # a second, in which the times of a video are written: the usual rates all divide it


def draw_faces(pixels: np.ndarray, faces: Sequence[PredictedFace]) -> Image.Image:
    """Return a picture (H, W, 3) uint8 with a box for every face and a label, within the picture where it is wide enough."""
    picture = Image.fromarray(pixels)
    pen, width = ImageDraw.Draw(picture), max(2, round(max(picture.size) / 400))
    for face in faces:
        left, top, across, down = face.box
        colour = choose_colours(face.classes)[face.expression]
        pen.rectangle((left, top, left + across, top + down), outline=colour, width=width)
        font = ImageFont.load_default(max(12, min(10 * width, round(down / 6))))
        label = f"{face.expression} {face.probabilities.max():.0%}"
        box = pen.textbbox((0, 0), label, font)
        left = max(0, min(left, picture.width - round(box[2]) - 2 * width))
        low = max(0, top - box[3] - 2 * width)
        pen.rectangle((left, low, left + box[2] + 2 * width, low + box[3] + 2 * width), fill=colour)
        pen.text((left + width, low + width), label, "black", font)
    return picture


def choose_colours(classes: Sequence[str]) -> dict[str, str]:
    """Return a colour for every class; beyond sixteen classes they come again."""
    others = cycle(OTHER_COLOURS)
    return {name: COLOURS.get(name) or next(others) for name in classes}


def place_copies(files: Sequence[UPath], folder: UPath) -> dict[str, UPath]:
    """Return where in a folder the annotated copy of each file goes: as deep as below the folder that holds all files.

    Raises `UserError` when a copy would overwrite an original or another copy, or cannot be written.
    """
    if folder.is_file():
        raise UserError(f"{folder} is a file: give --annotate a folder.")
    full = {str(file): file if file.protocol else file.absolute() for file in files}
    paths = {name: posixpath.normpath(file.path) for name, file in full.items()}  # one with '..' leads out of no folder
    above = posixpath.commonpath([posixpath.dirname(path) for path in paths.values()])
    places = {}
    for name, file in full.items():
        forms = (".mp4",) if is_video(file) else WRITTEN
        suffix = "" if file.suffix.casefold() in forms else forms[0]
        places[name] = place_below(folder, posixpath.relpath(paths[name], above) + suffix)
    originals = {file.resolve() for file in full.values()}
    if taken := [place for place in places.values() if place.absolute().resolve() in originals]:
        raise UserError(f"The annotated copy would overwrite {taken[0]}: give --annotate another folder.")
    check_different({name: str(place) for name, place in places.items()}, "The annotated copies")
    known = set(places.values())
    for place in places.values():
        first = place.with_name(re.sub(r"~\d+(\.[^.]*)$", r"\1", place.name))
        if first != place and first in known:
            raise UserError(
                f"The annotated copies of pages of {first} and {place} could have one name: rename a photo."
            )
    for place in check_outputs(map(str, places.values()), "The annotated copy"):
        check_replaced(place, "The annotated copy", _is_copy)
    return places


def _is_copy(file: IO[bytes]) -> bool:
    """Whether a picture or a video is an annotated copy, by the mark that it carries."""
    try:
        with Image.open(file, formats=("JPEG", "PNG")) as picture:
            return picture.info.get("comment") in (COPY, COPY.encode())
    except (OSError, SyntaxError, ValueError):  # no picture
        file.seek(0)
    try:
        with av.open(file, format=MP4) as video:
            return video.metadata.get("comment") == COPY
    except (av.FFmpegError, OSError):
        return False


class Annotator:
    """Writes the annotated copy of every picture that is added, and of every video of which frames are; use it as a context.

    A video is read once more for its copy, which has all its frames at their times, but no sound: between two frames that
    were predicted the faces of the first one hold.
    """

    def __init__(self, places: dict[str, UPath]) -> None:
        self.places = places
        self.file, self.end = "", ExitStack()  # of the video that is being copied
        self.rest: Iterator[Frame] = iter(())  # its frames that are not copied yet
        self.copied, self.faces = 0, list[PredictedFace]()
        self.show: Show | None = None

    def __enter__(self) -> Annotator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._copy(None)
        self.end.__exit__(kind, error, trace)  # a video that an error ends is not written

    def add(self, predicted: PredictedFrame) -> None:
        """Draw the faces of a frame; of a photo its pixels must have been kept."""
        frame, file = predicted.frame, str(predicted.frame.file)
        if file != self.file:
            self._copy(None)
            self.end.close()
            self.file, self.rest, self.show = file, iter(()), None
            if is_video(frame.file):
                self.rest, self.copied, self.faces = read_video(frame.file, math.inf), 0, []
        if frame.number is not None and is_video(frame.file):
            self._copy(frame.number)
            self.faces = predicted.faces
        elif frame.pixels is not None:
            place = number_copy(self.places[file], frame.number or 0)
            with write_whole(place) as sink:
                picture = draw_faces(frame.pixels, predicted.faces)
                if place.suffix.casefold() == ".png":
                    about = PngInfo()
                    about.add_text("comment", COPY)
                    picture.save(sink, "PNG", pnginfo=about)
                else:
                    picture.save(sink, "JPEG", quality=92, comment=COPY)

    def _copy(self, end: int | None) -> None:
        """Copy the frames of the video up to a number, without it, or all."""
        for frame in islice(self.rest, None if end is None else end - self.copied):
            if frame.pixels is None or frame.time is None:
                continue
            picture = draw_faces(frame.pixels, self.faces)
            if self.show is None:
                rate = read_rate(frame.file)
                self.show = self.end.enter_context(write_video(self.places[self.file], picture.size, rate))
            self.show(picture, frame.time)
            self.copied += 1


def number_copy(place: UPath, number: int) -> UPath:
    """Return where the copy of a page or frame of a photo goes, whose first one goes to a place."""
    return place.with_name(f"{place.stem}~{number + 1}{place.suffix}") if number else place


@contextmanager
def write_video(place: UPath, size: tuple[int, int], rate: Fraction) -> Iterator[Show]:
    """Yield `show(picture, seconds)`, which adds a picture to an MP4 file (H.264) at its time, in the size of the first.

    `rate` is the frames a second that it is meant for.
    """
    width, height = (max(2, side - side % 2) for side in size)  # the usual colour format halves both sides
    with write_whole(place) as sink, av.open(sink, "w", format=MP4) as container:
        container.metadata["comment"] = COPY
        stream: Any = container.add_stream("libx264", rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, TICKS)

        def show(picture: Image.Image, seconds: float) -> None:
            fitted = picture if picture.size == (width, height) else picture.resize((width, height))
            frame = av.VideoFrame.from_ndarray(np.asarray(fitted), format="rgb24")
            frame.pts, frame.time_base = round(seconds * TICKS), Fraction(1, TICKS)
            frame.duration = round(TICKS / rate)
            container.mux(stream.encode(frame))

        yield show
        container.mux(stream.encode(None))
