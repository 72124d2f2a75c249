"""Bytes of an image file → RGB pixels, the same on every machine.

Faces arrive as colour, grey, palette, CMYK or 16-bit files; all become 8-bit RGB, and a file that cannot be read says why.
"""

from __future__ import annotations

import errno
import io
import struct
import subprocess
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator
from functools import cache, lru_cache
from itertools import count
from pathlib import PurePosixPath

import numpy as np
from pi_heif import register_heif_opener
from PIL import Image, ImageOps
from upath import UPath

from cafe.addresses import WEB
from cafe.data.packed.archives import MemberError, Span, read_content, read_span
from cafe.errors import IrregularFileError
from cafe.files import list_folder

# By which pictures are known among other files: all that Pillow has for `FORMATS`, and MPO, which is JPEG.
SUFFIXES = frozenset({
    ".apng", ".avif", ".avifs", ".bmp", ".bw", ".dib", ".gif", ".heic", ".heics", ".heif", ".heifs",
    ".hif", ".icb", ".ico", ".j2c", ".j2k", ".jfif", ".jp2", ".jpc", ".jpe", ".jpeg", ".jpf",
    ".jpg", ".jpx", ".mpo", ".pbm", ".pfm", ".pgm", ".png", ".pnm", ".ppm", ".rgb", ".rgba",
    ".sgi", ".tga", ".tif", ".tiff", ".vda", ".vst", ".webp",
})  # fmt: skip
# What a file may be, whatever its name (JPEG brings MPO along): decoders that start no program, as that of PostScript does.
FORMATS = ("AVIF", "BMP", "DIB", "GIF", "HEIF", "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "SGI", "TGA", "TIFF", "WEBP")
# Of these, further pictures are frames or pages; those of MPO and HEIF are previews, depths and other shots of a camera.
SERIES = frozenset({"AVIF", "GIF", "PNG", "TIFF", "WEBP"})
MAX_PIXELS = 100_000_000  # a face crop is never larger; guards against decompression bombs
DAMAGED = (  # whatever Pillow's decoders raise of a file that is not what it claims to be
    OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, ArithmeticError, AttributeError, struct.error,
    RuntimeError, AssertionError, zlib.error, subprocess.SubprocessError,
    Image.DecompressionBombError,
)  # fmt: skip
MISSING = "file not found"
MOST_FETCHED = 2**29  # bytes of a picture of a web address: an uncompressed one of 100 megapixels has 300 million
NAMED = 10  # endings before all others
LISTED_SECONDS = 60  # for which a listing of a folder says which of its pictures are gone
FOLDERS = 16  # whose listings are kept, 8 bytes a name
ORIENTATION = 0x0112  # EXIF tag; 5–8 swap width and height
KIND_OF_PAGE, PREVIEW = 254, 1  # TIFF tag; the bit of a page that is a smaller version of another

Box = tuple[int, int, int, int]  # left, top, width, height in pixels of the upright picture


class UnreadableImageError(Exception):
    """An image that cannot be used, with the reason as its message."""


class MissingImageError(UnreadableImageError):
    """An image that is not where it should be."""


def suffix_of(path: str) -> str:
    """Return the ending of a file's name in lower case, empty where it has none."""
    return PurePosixPath(path).suffix.casefold()


def list_suffixes(counts: Counter[str]) -> str:
    """Return how many files have which ending, the commonest first."""
    ranked = sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))
    more = [f"others {sum(count for _, count in ranked[NAMED:]):,}"] if len(ranked) > NAMED else []
    return ", ".join([*(f"{suffix or 'without ending'} {count:,}" for suffix, count in ranked[:NAMED]), *more])


def read_bytes(path: UPath, span: Span | None = None) -> bytes:
    """Return the bytes of a file, or of a member of an archive; where its `span` is known, that is not looked for.

    Raises `UnreadableImageError` when it is empty or no file, `MissingImageError` when not there. A storage that fails is
    tried again; then it raises `StorageError`, which says nothing of the picture.
    """
    try:
        data = read_span(path, span) if span else read_content(path, MOST_FETCHED if path.protocol in WEB else None)
    except MemberError as error:
        raise UnreadableImageError(str(error)) from None
    except (FileNotFoundError, NotADirectoryError):
        raise MissingImageError(MISSING) from None
    except IrregularFileError:
        raise UnreadableImageError("is a pipe or a device, not a file") from None
    except IsADirectoryError:
        raise UnreadableImageError("is a folder") from None
    except ValueError as error:
        raise UnreadableImageError(f"a name that no file can have: {error}") from None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise UnreadableImageError("a name that is too long for a file") from None
        raise
    if not data:
        raise UnreadableImageError("file is empty")
    return data


def is_gone(path: UPath) -> bool:
    """Whether a listing of its folder shows a file to be gone; a folder that is not there, or empty, shows nothing.

    A server's answer that there is no such file is as good. A folder is listed once a minute, however many of its files are
    gone; one that the listing does not show to be gone is looked for in a new one.
    """
    if path.protocol in WEB:
        return True
    for list_again in (False, True):
        if list_again:
            _list_names.cache_clear()
        names = _list_names(path.parent, int(time.monotonic() // LISTED_SECONDS))
        if len(names) and hash(path.name) not in names:
            return True
    return False


@lru_cache(FOLDERS)
def _list_names(folder: UPath, minute: int) -> np.ndarray:
    """Return the hashes (n,) of the names in a folder, as it was at some moment of a minute."""
    return np.array([hash(path.name) for path in list_folder(folder)], np.int64)


def read_size(data: bytes) -> tuple[int, int]:
    """Return (width, height) in pixels from the header alone; raise `UnreadableImageError`."""
    with _open(data) as image:
        width, height = image.size
        try:
            # Of a TIFF Pillow gives the size that it has once it is upright.
            lying = image.format != "TIFF" and image.getexif().get(ORIENTATION, 1) >= 5
        except DAMAGED as error:  # of a PNG the whole file is searched
            raise UnreadableImageError(f"damaged image: {error}") from None
    return (height, width) if lying else (width, height)


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Return the upright pixels (H, W, 3) uint8 RGB; of an animation the first frame; raise `UnreadableImageError`."""
    with _open(data, max_pixels) as image:
        return image_pixels(image)


def decode_series(data: bytes) -> Iterator[tuple[np.ndarray, float | None]]:
    """Yield every frame or page of a file, upright (H, W, 3) uint8 RGB, and its time in seconds, None of pages.

    Of most files there is one. Raises `UnreadableImageError`, which says how many pictures came before.
    """
    done, milliseconds = 0, 0.0
    try:
        with _open(data) as image:
            pages = image.format == "TIFF"
            for number in count() if image.format in SERIES else range(1):
                try:
                    image.seek(number)
                except EOFError:
                    break
                if number and pages and image.tag_v2.get(KIND_OF_PAGE, 0) & PREVIEW:  # type: ignore[attr-defined]
                    continue
                _check_size(image, MAX_PIXELS)
                yield image_pixels(image), None if pages else milliseconds / 1000
                done, milliseconds = done + 1, milliseconds + image.info.get("duration", 0)
    except DAMAGED as error:
        raise UnreadableImageError(f"damaged image after {done} pictures: {error}") from None
    except UnreadableImageError as error:
        raise UnreadableImageError(f"{error}, after {done} pictures" if done else str(error)) from None


def image_pixels(image: Image.Image) -> np.ndarray:
    """Return the upright pixels (H, W, 3) uint8 RGB of an image that is open; raise `UnreadableImageError`."""
    _refuse_floats(image)
    if 0 in image.size:
        raise UnreadableImageError("it has no pixels")
    try:
        image.load()
        # Of pictures that are upright and RGB already, Pillow would make two copies, which take longer than decoding.
        if image.getexif().get(ORIENTATION, 1) != 1:
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):
            return _from_16_bit(image)
        return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    except DAMAGED as error:
        raise UnreadableImageError(f"damaged image: {error}") from None


def clip_box(box: Box, width: int, height: int) -> Box:
    """Return the part of a face's box that lies in a picture of that size; raise `UnreadableImageError` when none does."""
    left, top = max(0, box[0]), max(0, box[1])
    right, bottom = min(width, box[0] + box[2]), min(height, box[1] + box[3])
    if right <= left or bottom <= top:
        raise UnreadableImageError(f"its face box {box} lies outside the {width}×{height} pixels")
    return left, top, right - left, bottom - top


def _open(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    _prepare_pillow()
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:  # twice what Pillow warns of, which it opens for nobody
        most = min(max_pixels, 2 * (Image.MAX_IMAGE_PIXELS or max_pixels))
        raise UnreadableImageError(f"its pixels are more than {most:,}") from None
    except DAMAGED:
        raise UnreadableImageError("not an image of a known format") from None
    _check_size(image, max_pixels)
    _refuse_floats(image)
    return image


def _check_size(image: Image.Image, most: int) -> None:
    if image.width * image.height > most:
        raise UnreadableImageError(f"{image.width}×{image.height} pixels are more than {most:,}")


def _refuse_floats(image: Image.Image) -> None:
    if image.mode == "F":
        raise UnreadableImageError("floating-point pixels have no defined brightness")


@cache
def _prepare_pillow() -> None:
    """Add telephones' pictures; ignore warnings of odd EXIF blocks and large pictures, which we evaluate ourselves.

    Once for the process: filters that come and go are not safe among threads.
    """
    register_heif_opener()
    warnings.filterwarnings("ignore", module=r"PIL\.")


def _from_16_bit(image: Image.Image) -> np.ndarray:
    """Scale 16-bit grey to 8 bits; Pillow's own conversion would clip everything above 255 to white."""
    grey = np.asarray(image, dtype=np.int64)
    if grey.size and (grey.min() < 0 or grey.max() > 65535):
        raise UnreadableImageError("32-bit pixels have no defined brightness")
    return np.repeat(((grey + 128) // 257).astype(np.uint8)[..., None], 3, axis=2)
