"""Bytes of an image file → RGB pixels, the same on every machine.

Faces arrive as colour, grey, palette, CMYK or 16-bit files; all become 8-bit RGB, and a file that cannot be read says why.
"""

from __future__ import annotations

import io
import struct
import warnings
from functools import cache

import numpy as np
from PIL import Image, ImageOps
from upath import UPath

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif"})
MAX_PIXELS = 100_000_000  # a face crop is never larger; guards against decompression bombs
DAMAGED = (  # whatever Pillow's decoders raise of a file that is not what it claims to be
    OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, ArithmeticError, AttributeError, struct.error,
)  # fmt: skip
ORIENTATION = 0x0112  # EXIF tag; 5–8 swap width and height

Box = tuple[int, int, int, int]  # left, top, width, height in pixels of the upright picture


class UnreadableImageError(Exception):
    """An image that cannot be used, with the reason as its message."""


def read_bytes(path: UPath) -> bytes:
    """Return a file's bytes; raise `UnreadableImageError` when it is missing, empty or not ours to read."""
    try:
        data: bytes = path.read_bytes()
    except FileNotFoundError:
        raise UnreadableImageError("file not found") from None
    except PermissionError:
        raise UnreadableImageError("no permission to read the file") from None
    except IsADirectoryError:
        raise UnreadableImageError("is a folder") from None
    except (OSError, ValueError) as error:  # a name that no file can have is a ValueError
        raise UnreadableImageError(f"cannot be read: {error}") from None
    if not data:
        raise UnreadableImageError("file is empty")
    return data


def read_size(data: bytes) -> tuple[int, int]:
    """Return (width, height) in pixels from the header alone; raise `UnreadableImageError`."""
    with _open(data) as image:
        width, height = image.size
        try:
            swapped = image.getexif().get(ORIENTATION, 1) >= 5
        except DAMAGED as error:  # of a PNG the whole file is searched
            raise UnreadableImageError(f"damaged image: {error}") from None
    return (height, width) if swapped else (width, height)


def decode_image(data: bytes) -> np.ndarray:
    """Return the upright pixels (H, W, 3) uint8 RGB; of an animation the first frame; raise `UnreadableImageError`."""
    with _open(data) as image:
        return image_pixels(image)


def image_pixels(image: Image.Image) -> np.ndarray:
    """Return the upright pixels (H, W, 3) uint8 RGB of an image that is open; raise `UnreadableImageError`."""
    _refuse_floats(image)
    try:
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):
            return _from_16_bit(image)
        return np.asarray(image.convert("RGB"))
    except DAMAGED as error:
        raise UnreadableImageError(f"damaged image: {error}") from None


def clip_box(box: Box, width: int, height: int) -> Box:
    """Return the part of a face's box that lies in a picture of that size; raise `UnreadableImageError` when none does."""
    left, top = max(0, box[0]), max(0, box[1])
    right, bottom = min(width, box[0] + box[2]), min(height, box[1] + box[3])
    if right <= left or bottom <= top:
        raise UnreadableImageError(f"its face box {box} lies outside the {width}×{height} pixels")
    return left, top, right - left, bottom - top


def _open(data: bytes) -> Image.Image:
    _silence_pillow()
    try:
        image = Image.open(io.BytesIO(data))
    except (*DAMAGED, Image.DecompressionBombError):
        raise UnreadableImageError("not an image of a known format") from None
    if image.width * image.height > MAX_PIXELS:
        raise UnreadableImageError(f"{image.width}×{image.height} pixels are more than {MAX_PIXELS:,}")
    _refuse_floats(image)
    return image


def _refuse_floats(image: Image.Image) -> None:
    if image.mode == "F":
        raise UnreadableImageError("floating-point pixels have no defined brightness")


@cache
def _silence_pillow() -> None:
    """Ignore Pillow's warnings of odd EXIF blocks and large pictures, which we judge ourselves.

    Once for the process: filters that come and go are not safe among threads.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")


def _from_16_bit(image: Image.Image) -> np.ndarray:
    """Scale 16-bit grey to 8 bits; Pillow's own conversion would clip everything above 255 to white."""
    grey = np.asarray(image, dtype=np.int64)
    if grey.size and (grey.min() < 0 or grey.max() > 65535):
        raise UnreadableImageError("32-bit pixels have no defined brightness")
    return np.repeat(((grey + 128) // 257).astype(np.uint8)[..., None], 3, axis=2)
