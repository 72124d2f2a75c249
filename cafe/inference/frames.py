"""Photographs and videos as one stream of frames, of which a few at a time are in memory.

What cannot be read is a frame too, with the reason: one broken file must not end the work on all others.
"""

from __future__ import annotations

import glob
import math
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import chain, groupby
from typing import Any, NamedTuple

import av
import numpy as np
from upath import UPath

from cafe.addresses import WEB
from cafe.data.images import (
    MAX_PIXELS,
    SUFFIXES,
    UnreadableImageError,
    decode_series,
    list_suffixes,
    read_bytes,
    suffix_of,
)
from cafe.data.layouts import is_image, list_files
from cafe.data.packed.archives import PACKED, ROWS, open_archive
from cafe.errors import IrregularFileError, StorageError, UserError
from cafe.files import check_regular, locate, retry, storage_errors

VIDEOS = frozenset({".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv", ".3gp"})
# FFmpeg's names of what a video may be, whatever its file is called: none is a list of other files or addresses.
CONTAINERS = "asf,avi,flv,matroska,mov,mp4,3gp,m4a,mpeg,mpegts,mpegvideo,webm"
DECODERS = 4  # threads
AHEAD = 8  # photos: a telephone's takes 36 MB
USUAL_RATE = 25  # frames a second of a video that does not say
HEADED = {"asf", "avi", "flv", "matroska", "mov"}  # containers whose beginning says how long they are
SLACK = 0.5  # seconds that a video may be shorter than its header says, besides two frames


@dataclass(frozen=True)
class Frame:
    """A photo, or one frame of several in a file: pixels (H, W, 3) uint8 RGB, or None and in `error` why there are none.

    Of a video or an animation, `number` counts from 0 and `time` is in seconds from its beginning; pages of a photo have a
    number alone, a photo of one page has neither.
    """

    file: UPath
    pixels: np.ndarray | None = None
    number: int | None = None
    time: float | None = None
    error: str = ""


def is_video(file: UPath) -> bool:
    """Return whether a file is named like a video."""
    return suffix_of(file.name) in VIDEOS


def is_shown(name: str) -> bool:
    """Return whether a file is named like a photo or a video."""
    return is_image(name) or suffix_of(name) in VIDEOS


class FoundFiles(NamedTuple):
    """Photos and videos, and what else lay in folders and fitted patterns, by ending."""

    files: list[UPath]
    others: Counter[str]


def find_files(places: Sequence[str]) -> FoundFiles:
    """Return the files that places name: files, all photos and videos below folders, patterns with `*`; each file once.

    Photos in a zip or tar, and those in the rows of a Parquet file, count as files below it. Links are followed. Raises
    `UserError` for a place where there is nothing.
    """
    others: dict[str, str] = {}
    found: dict[str, UPath] = {}
    for place in places:
        for file in _expand(place, others):
            found.setdefault(_name(file), file)
    return FoundFiles(list(found.values()), Counter(suffix for file, suffix in others.items() if file not in found))


def _name(file: UPath) -> str:
    """Name a file alike, whether it was given from the root or from here."""
    return str(file if file.protocol else file.absolute())


def _expand(place: str, others: dict[str, str]) -> Iterator[UPath]:
    """Yield the photos and videos of a place, and note the endings of the other files there."""
    unknown = UserError(f"There is no file {place!r}: give photos, videos, folders or patterns such as 'faces/*.jpg'.")
    if not place:  # which would stand for the folder that one is in
        raise unknown
    path = locate(place, absolute=False)
    if path.protocol in WEB or retry(path, "read", path.is_file):  # a server is asked once, when the picture is read
        yield from _list_packed(path) if path.suffix.casefold() in (*PACKED, ROWS) else [path]
    elif retry(path, "read", path.is_dir):
        names = list_files(path)
        files = [path / name for name in names if is_shown(name)]
        others.update({_name(path / name): suffix_of(name) for name in names if not is_shown(name)})
        if not files:
            there = f"its files are {list_suffixes(Counter(map(suffix_of, names)))}" if names else "it holds no file"
            raise UserError(f"There is no photo or video below {place!r}, by their names: {there}.")
        yield from files
    elif glob.has_magic(place) and (matches := sorted(glob.glob(str(path), recursive=True))):  # noqa: PTH207  # also absolute
        for match in matches:
            file = UPath(match, protocol="")  # whatever it is called
            if file.is_dir() or is_shown(match):
                yield from _expand(str(file.absolute()) if ":" in match else match, others)
            else:
                others[_name(file)] = suffix_of(match)
    else:
        raise unknown


def _list_packed(path: UPath) -> list[UPath]:
    """Return the photos in an archive or a Parquet file as files below it; raise `UserError` where there is none."""
    rows = path.suffix.casefold() == ROWS
    found = [
        path / name for name in (open_archive(path).members if rows else list_files(path)) if rows or is_image(name)
    ]
    if not found:
        raise UserError(f"There is no photo in {path}: known are {', '.join(sorted(SUFFIXES))}.")
    return found


def read_frames(files: Iterable[UPath], rate: float) -> Iterator[Frame]:
    """Yield all pages or frames of every photo, and of every video `rate` frames a second (at most all), in order."""
    for video, group in groupby(files, is_video):
        if video:
            for file in group:
                yield from read_video(file, rate)
        else:
            yield from _read_photos(group)


def read_photo(file: UPath) -> Iterator[Frame]:
    """Return the frames or pages of a photo, upright; of most photos there is one. Two are decoded before this returns."""
    frames = _number_pictures(file)
    first, second = next(frames), next(frames, None)
    return iter([replace(first, number=None, time=None)]) if second is None else chain([first, second], frames)


def _number_pictures(file: UPath) -> Iterator[Frame]:
    """Yield the pictures in a file; where it is damaged the last one says so."""
    try:
        for number, (pixels, time) in enumerate(decode_series(read_bytes(file))):
            yield Frame(file, pixels, number, time)
    except UnreadableImageError as error:
        yield Frame(file, error=str(error))
    except StorageError as error:
        if file.protocol not in WEB:
            raise
        yield Frame(file, error=str(error).rstrip("."))


def _read_photos(files: Iterable[UPath]) -> Iterator[Frame]:
    """Decode photos on threads, a few ahead."""
    waiting: deque[Future[Iterator[Frame]]] = deque()
    with ThreadPoolExecutor(DECODERS) as pool:
        for file in files:
            waiting.append(pool.submit(read_photo, file))
            if len(waiting) > AHEAD:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()


def _failures() -> tuple[type[Exception], ...]:
    """What a damaged video or a failing storage raises."""
    return (av.FFmpegError, *storage_errors())


def read_video(file: UPath, rate: float) -> Iterator[Frame]:
    """Yield `rate` frames a second of a video, upright: the first one at or after each point in time; all for infinity.

    A video that is damaged, or ends before its header says, has a last frame that says where. What cannot be decoded is
    passed over. Of some formats no decoder notices damage (VP8), and of some the header gives no length (MPEG streams).
    """
    decoder, due, reason = _Decoder(), 0, ""
    try:
        with _open_video(file) as container:
            reason = _find_obstacle(container)
            for number, (frame, time) in enumerate(() if reason else decoder.decode(container)):
                if math.isinf(rate) or time * rate >= due - 1e-6:
                    due = 0 if math.isinf(rate) else math.floor(time * rate + 1e-6) + 1
                    yield Frame(file, _upright(frame), number, time)
    except IrregularFileError:
        reason = "is a pipe or a device, not a file"
    except _failures() as error:
        reason = (getattr(error, "strerror", None) or str(error)).rstrip(".")
        reason = f"damaged video after {decoder.end:.1f} s: {reason}" if decoder.end else f"no readable video: {reason}"
    if reason := reason or decoder.find_damage():
        yield Frame(file, error=reason)


class _Decoder:
    """Decodes the pictures of a video, and notes how far its packets reach and which of them are broken."""

    def __init__(self) -> None:
        self.end, self.length, self.step = 0.0, 0.0, 0.0  # seconds: as far as it came, by the header, of a frame
        self.broken: list[float] = []  # seconds, of packets and frames

    def decode(self, container: Any) -> Iterator[tuple[Any, float]]:
        """Yield the frames of the first stream of pictures, and their seconds since the first one.

        Sound is read along, undecoded: where it reaches the length of the header, the pictures have ended sooner, uncut.
        """
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        self.step, beginning, done = 1 / _frame_rate(stream), (container.start_time or 0) / 1e6, 0
        self.length = _find_length(container, stream)
        start: float | None = None
        for packet in container.demux(stream, *container.streams.audio):
            if packet.pts is not None:
                end = float((packet.pts + (packet.duration or 0)) * packet.time_base) - beginning
                self.end = max(self.end, end)
            if packet.stream.index != stream.index:
                continue
            if packet.is_corrupt:
                self.broken.append(self.end)
            try:
                frames = packet.decode()
            except av.InvalidDataError:
                self.broken.append(self.end)
                continue
            for frame in frames:
                now = done * self.step if frame.time is None else frame.time
                start, done = (now if start is None else start), done + 1
                if frame.is_corrupt:
                    self.broken.append(now - start)
                yield frame, now - start

    def find_damage(self) -> str:
        """Return what was missing, once all is decoded; empty when nothing was."""
        if self.end + 2 * self.step + SLACK < self.length:
            return f"cut off after {self.end:.1f} of {self.length:.1f} s"
        return f"damaged video: cannot be decoded in places, first at {min(self.broken):.1f} s" if self.broken else ""


def _find_obstacle(container: Any) -> str:
    """Return why a video is not read: it has no pictures, or larger ones than photos may be; empty where it can be.

    Larger ones that come later are refused by its decoder.
    """
    if not container.streams.video:
        return "holds no pictures"
    for stream in container.streams.video:
        stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
        if stream.width * stream.height > MAX_PIXELS:
            return f"{stream.width}×{stream.height} pixels are more than {MAX_PIXELS:,}"
    return ""


def _find_length(container: Any, stream: Any) -> float:
    """Return the seconds that a video's header gives it; 0 where there is no header that does."""
    if not HEADED & set(container.format.name.split(",")):
        return 0.0
    seconds = (container.duration or 0) / 1e6
    # Of a cut AVI file FFmpeg reckons a duration anew, but tells the header's count of frames.
    return max(seconds, stream.frames / _frame_rate(stream)) if container.format.name == "avi" else seconds


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


def read_rate(file: UPath) -> Fraction:
    """Return the frames a second of a video."""
    with _open_video(file) as container:
        return Fraction(container.streams.video[0].average_rate or USUAL_RATE)


def count_frames(file: UPath, rate: float) -> int:
    """Return how many frames `read_frames` gives of a file, of a video by what its header says; 1 where that is unknown."""
    if not is_video(file):
        return 1
    try:
        with _open_video(file) as container:
            seconds = (container.duration or 0) / 1e6
            fastest = _frame_rate(container.streams.video[0]) if container.streams.video else rate
            return max(1, math.ceil(seconds * min(rate, fastest)))
    except IrregularFileError:
        return 1
    except _failures():
        return 1
