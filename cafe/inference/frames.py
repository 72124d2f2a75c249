"""Photographs and videos as one stream of frames, of which a few at a time are in memory.

What cannot be read is a frame too, with the reason: one broken file must not end the work on all others.
"""

from __future__ import annotations

import glob
import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import av
import numpy as np
from upath import UPath

from cafe.data.images import SUFFIXES, UnreadableImageError, decode_image, read_bytes
from cafe.data.layouts import is_image, list_files
from cafe.errors import IrregularFileError, UserError
from cafe.files import check_regular, locate, retry

VIDEOS = frozenset({".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv", ".3gp"})
# FFmpeg's names of what a video may be, whatever its file is called: none is a list of other files or addresses.
CONTAINERS = "asf,avi,flv,matroska,mov,mp4,3gp,m4a,mpeg,mpegts,mpegvideo,webm"
DECODERS = 4  # threads
AHEAD = 8  # photos: a telephone's takes 36 MB
USUAL_RATE = 25.0  # frames a second of a video that does not say


@dataclass(frozen=True)
class Frame:
    """A photo, or one frame of a video: pixels (H, W, 3) uint8 RGB, or None and in `error` why there are none.

    Of a frame of a video, `number` counts from 0 and `time` is in seconds from its beginning; both are None for a photo.
    """

    file: UPath
    pixels: np.ndarray | None = None
    number: int | None = None
    time: float | None = None
    error: str = ""


def is_video(file: UPath) -> bool:
    """Return whether a file is named like a video."""
    return file.suffix.casefold() in VIDEOS


def find_files(places: Sequence[str]) -> list[UPath]:
    """Return the files that places name: files, all photos and videos below folders, patterns with `*`; each file once.

    Links are followed. Raises `UserError` for a place where there is nothing.
    """
    found = (file for place in places for file in _expand(place))
    return list({str(file): file for file in found}.values())


def _expand(place: str) -> Iterator[UPath]:
    path = locate(place, absolute=False)
    if retry(path, "read", path.is_file):  # at an address, a server may be away
        yield path
    elif retry(path, "read", path.is_dir):
        files = [path / name for name in list_files(path) if is_image(name) or is_video(UPath(name))]
        if not files:
            raise UserError(
                f"There is no photo or video below {place!r}: known are {', '.join(sorted(SUFFIXES | VIDEOS))}."
            )
        yield from files
    elif glob.has_magic(place) and (matches := sorted(glob.glob(str(path), recursive=True))):  # noqa: PTH207  # also absolute
        for match in matches:
            file = UPath(match, protocol="")  # whatever it is called
            if file.is_dir() or is_image(match) or is_video(file):
                yield from _expand(str(file.absolute()) if ":" in match else match)
    else:
        raise UserError(f"There is no file {place!r}: give photos, videos, folders or patterns such as 'faces/*.jpg'.")


def read_frames(files: Iterable[UPath], rate: float) -> Iterator[Frame]:
    """Yield every photo, and of every video `rate` frames a second (all of them where it has fewer), in order."""
    for video, group in groupby(files, is_video):
        if video:
            for file in group:
                yield from read_video(file, rate)
        else:
            yield from _read_photos(group)


def read_photo(file: UPath) -> Frame:
    """Return a photo, upright."""
    try:
        return Frame(file, decode_image(read_bytes(file)))
    except UnreadableImageError as error:
        return Frame(file, error=str(error))


def _read_photos(files: Iterable[UPath]) -> Iterator[Frame]:
    """Decode photos on threads, a few ahead."""
    waiting: deque[Future[Frame]] = deque()
    with ThreadPoolExecutor(DECODERS) as pool:
        for file in files:
            waiting.append(pool.submit(read_photo, file))
            if len(waiting) > AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def read_video(file: UPath, rate: float) -> Iterator[Frame]:
    """Yield `rate` frames a second of a video, upright: the first one at or after each point in time.

    A video that is damaged ends with a frame that says so.
    """
    due, time = 0, 0.0
    try:
        with _open_video(file) as container:
            if not container.streams.video:
                yield Frame(file, error="holds no pictures")
                return
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            start: float | None = None
            for number, frame in enumerate(container.decode(stream)):
                now = number / _frame_rate(stream) if frame.time is None else frame.time
                start = now if start is None else start
                time = now - start
                if time * rate >= due - 1e-6:
                    due = math.floor(time * rate + 1e-6) + 1
                    yield Frame(file, _upright(frame), number, time)
    except IrregularFileError:
        yield Frame(file, error="is a pipe or a device, not a file")
    except (av.FFmpegError, OSError) as error:
        reason = (getattr(error, "strerror", None) or str(error)).rstrip(".")
        yield Frame(
            file, error=f"damaged video after {time:.1f} s: {reason}" if due else f"no readable video: {reason}"
        )


@contextmanager
def _open_video(file: UPath) -> Iterator[Any]:
    check_regular(file)
    options = {"format_whitelist": CONTAINERS, "protocol_whitelist": ""}
    with file.open("rb") as data, av.open(data, options=options) as container:
        yield container


def _upright(frame: Any) -> np.ndarray:
    """Return the pixels of a frame as a player shows them: telephones film lying and note the turn."""
    pixels: np.ndarray = frame.to_ndarray(format="rgb24")
    return np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90)))


def _frame_rate(stream: Any) -> float:
    return float(stream.average_rate or USUAL_RATE)


def count_frames(file: UPath, rate: float) -> int:
    """Return how many frames `read_frames` gives of a file, of a video by what its header says; 1 where that is unknown."""
    if not is_video(file):
        return 1
    try:
        with _open_video(file) as container:
            seconds = (container.duration or 0) / 1e6
            fastest = _frame_rate(container.streams.video[0]) if container.streams.video else rate
            return max(1, math.ceil(seconds * min(rate, fastest)))
    except (av.FFmpegError, OSError, IrregularFileError):
        return 1
