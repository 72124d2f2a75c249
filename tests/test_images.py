"""Every kind of file is either read right or says why not."""

from __future__ import annotations

import base64
import io
import os
import stat
import struct
import tempfile
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, TiffImagePlugin
from upath import UPath

from cafe.data.images import (
    FORMATS,
    SUFFIXES,
    UnreadableImageError,
    decode_image,
    decode_series,
    is_gone,
    list_suffixes,
    read_bytes,
    read_size,
)
from cafe.errors import StorageError


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


RED = np.full((6, 4, 3), (200, 30, 20), np.uint8)
# 24 × 16 pixels, red on the left and blue on the right, to be turned by 90 degrees, as a telephone writes them
HEIC = base64.b64decode(
    "AAAAHGZ0eXBoZWljAAAAAG1pZjFoZWljbWlhZgAAAcdtZXRhAAAAAAAAACFoZGxyAAAAAAAAAABwaWN0AAAAAAAAAAAAAAAAAAAAADRpbG9jAAAAAER"
    "AAAIAAQAAAAAB6wABAAAAAAAAAE0AAgAAAAACOAABAAAAAAAAACQAAAA4aWluZgAAAAAAAgAAABVpbmZlAgAAAAABAABodmMxAAAAABVpbmZlAgAAAQAC"
    "AABFeGlmAAAAAA5waXRtAAAAAAABAAABBmlwcnAAAADlaXBjbwAAAHVodmNDAQNwAAAAkAAAAAAAHvAA/P34+AAADwNgAAEAGEABDAH//wNwAAADAJAAAAM"
    "AAAMAHroCQGEAAQApQgEBA3AAAAMAkAAAAwAAAwAeoCCBBZbqrprm4CGgwIAAAAyAAAADAIRiAAEABkQBwXPBiQAAABNjb2xybmNseAABAA0ABoAAAAAUaX"
    "NwZQAAAAAAAABAAAAAQAAAAChjbGFwAAAAGAAAAAEAAAAQAAAAAf///9gAAAAC////0AAAAAIAAAAQcGl4aQAAAAADCAgIAAAACWlyb3QDAAAAGWlwbWEAA"
    "AAAAAAAAQABBoECAwWEhgAAABppcmVmAAAAAAAAAA5jZHNjAAIAAQABAAAAeW1kYXQAAABJKAGvCchqiBojm1H/F/f6F6G6wtGAo9PXjirkJm6NKi0XULX7"
    "P0D7te2Dy/9t7ymh/yegkUysxFsM1k9A6egZi7tggOPQTOtrLAAAAAZFeGlmAABNTQAqAAAACAABARIAAwAAAAEABgAAAAAAAA=="
)


def test_all_that_is_read_is_known_by_its_name() -> None:
    read_size(encode(Image.fromarray(RED), "PNG"))  # registers HEIC
    Image.init()
    read = {suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS}
    assert read | {".mpo"} == SUFFIXES
    assert list_suffixes(Counter({".cr2": 2, "": 1, ".txt": 1200})) == ".txt 1,200, .cr2 2, without ending 1"


def test_colour_png_is_read_as_it_is() -> None:
    data = encode(Image.fromarray(RED), "PNG")
    assert read_size(data) == (4, 6)
    np.testing.assert_array_equal(decode_image(data), RED)


def test_postscript_is_no_picture_whatever_its_name_is_as_it_is_a_program() -> None:
    data = encode(Image.fromarray(RED), "EPS")
    assert Image.open(io.BytesIO(data)).format == "EPS"  # Pillow would give it to Ghostscript
    for read in (read_size, decode_image):
        with pytest.raises(UnreadableImageError, match="not an image of a known format"):
            read(data)


def test_grey_palette_and_alpha_become_rgb() -> None:
    grey = Image.fromarray(np.full((3, 3), 77, np.uint8))
    assert decode_image(encode(grey, "PNG")).tolist() == np.full((3, 3, 3), 77).tolist()
    palette = Image.fromarray(RED).convert("P", palette=Image.Palette.ADAPTIVE)
    np.testing.assert_allclose(decode_image(encode(palette, "PNG")), RED, atol=2)
    np.testing.assert_array_equal(decode_image(encode(Image.fromarray(RED).convert("RGBA"), "PNG")), RED)


def test_cmyk_jpeg_keeps_its_colour() -> None:
    data = encode(Image.fromarray(np.full((16, 16, 3), (200, 30, 20), np.uint8)).convert("CMYK"), "JPEG", quality=95)
    np.testing.assert_allclose(decode_image(data)[8, 8], (200, 30, 20), atol=6)


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    levels = np.array([[0, 257, 32896, 65535]], np.uint16)
    assert decode_image(encode(Image.fromarray(levels), "PNG"))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_one_pixel_is_an_image() -> None:
    assert decode_image(encode(Image.new("RGB", (1, 1), (9, 8, 7)), "PNG")).tolist() == [[[9, 8, 7]]]


def test_an_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (5, 5), colour) for colour in ((250, 0, 0), (0, 250, 0))]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    np.testing.assert_allclose(decode_image(data)[2, 2], (250, 0, 0), atol=4)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_a_rotated_photo_is_turned_upright(kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter clockwise
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:, :8] = 255  # white left half ends up on top
    data = encode(Image.fromarray(pixels), kind, exif=exif)
    upright = decode_image(data)
    assert read_size(data) == (8, 16)
    assert upright.shape == (16, 8, 3)
    assert upright[:8].min() >= 250
    assert upright[8:].max() <= 5


def test_a_truncated_png_has_no_size_but_a_reason() -> None:
    data = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)).save(data, "PNG")
    with pytest.raises(UnreadableImageError, match="damaged image"):
        read_size(data.getvalue()[:3000])


def test_a_truncated_jpeg_says_so() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    data = encode(Image.fromarray(noise), "JPEG")
    assert read_size(data[: len(data) // 2]) == (64, 64)  # the header is whole
    with pytest.raises(UnreadableImageError, match="damaged image"):
        decode_image(data[: len(data) // 2])


def test_the_pictures_of_telephones_are_read_upright() -> None:
    assert read_size(HEIC) == (16, 24)
    pixels = decode_image(HEIC)
    assert pixels.shape == (24, 16, 3)
    np.testing.assert_allclose(pixels[[2, -3], 8], [(220, 30, 40), (30, 60, 210)], atol=4)
    with pytest.raises(UnreadableImageError, match="not an image of a known format"):
        decode_image(HEIC[:-40])
    np.testing.assert_allclose(decode_image(encode(Image.fromarray(RED), "AVIF", quality=100)), RED, atol=4)


SHADES = [Image.new("RGB", (8, 6), (level, 0, 255 - level)) for level in (0, 120, 240)]


@pytest.mark.parametrize(
    ("kind", "times"), [("GIF", [0, 0.2, 0.5]), ("PNG", [0, 0.2, 0.5]), ("TIFF", [None] * 3), ("JPEG", [0])]
)
def test_of_a_file_with_several_pictures_each_is_read_with_its_time(kind: str, times: list[float | None]) -> None:
    several = {"save_all": True, "append_images": SHADES[1:], "duration": [200, 300, 100]} if kind != "JPEG" else {}
    pictures = list(decode_series(encode(SHADES[0], kind, **several)))
    assert [time for _, time in pictures] == times
    for (pixels, _), shade in zip(pictures, SHADES, strict=kind != "JPEG"):
        np.testing.assert_allclose(pixels, np.asarray(shade), atol=8)


def test_previews_are_no_pages_and_no_further_pictures() -> None:
    preview = TiffImagePlugin.ImageFileDirectory_v2()
    preview[254] = 1
    sink = io.BytesIO()
    with TiffImagePlugin.AppendingTiffWriter(sink) as file:
        for shade, tags in zip(SHADES, ({}, preview, {}), strict=True):
            shade.save(file, "TIFF", tiffinfo=tags)
            file.newFrame()
    assert [pixels[0, 0, 0] for pixels, _ in decode_series(sink.getvalue())] == [0, 240]
    stereo = encode(SHADES[0], "MPO", save_all=True, append_images=SHADES[1:])
    assert len(list(decode_series(stereo))) == 1


def test_a_cut_series_says_how_many_pictures_came_before() -> None:
    noise = [Image.fromarray(np.random.default_rng(k).integers(0, 255, (40, 40, 3), np.uint8)) for k in range(4)]
    series = decode_series(encode(noise[0], "GIF", save_all=True, append_images=noise[1:])[:4000])
    next(series)
    with pytest.raises(UnreadableImageError, match=r"truncated .*, after [12] pictures"):
        list(series)


def test_a_picture_larger_than_asked_for_is_refused() -> None:
    data = encode(Image.fromarray(RED), "PNG")
    assert decode_image(data, max_pixels=24).shape == (6, 4, 3)
    with pytest.raises(UnreadableImageError, match="4×6 pixels are more than 23"):
        decode_image(data, max_pixels=23)


def test_a_picture_that_pillow_takes_for_a_bomb_is_said_to_be_large() -> None:
    header = bytearray(encode(Image.fromarray(RED), "BMP"))
    header[18:26] = struct.pack("<ii", 20_000, 10_000)
    for read in (read_size, decode_image):
        with pytest.raises(UnreadableImageError, match="its pixels are more than 100,000,000"):
            read(bytes(header))


def test_text_and_float_pixels_are_refused() -> None:
    with pytest.raises(UnreadableImageError, match="not an image of a known format"):
        read_size(b"this is no picture")
    floats = encode(Image.fromarray(np.ones((2, 2), np.float32)), "TIFF")
    with pytest.raises(UnreadableImageError, match="floating-point"):
        decode_image(floats)


def test_missing_empty_and_forbidden_files_give_their_reason(tmp_path: Path) -> None:
    with pytest.raises(UnreadableImageError, match="file not found"):
        read_bytes(UPath(tmp_path / "gone.jpg"))
    (tmp_path / "empty.jpg").touch()
    with pytest.raises(UnreadableImageError, match="file is empty"):
        read_bytes(UPath(tmp_path / "empty.jpg"))
    with pytest.raises(UnreadableImageError, match="is a folder"):
        read_bytes(UPath(tmp_path))


def test_a_file_that_must_not_be_read_is_a_fault_and_no_bad_picture() -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        path = Path(folder) / "secret.jpg"
        path.write_bytes(b"x")
        path.chmod(stat.S_IWUSR)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)  # root reads everything: try as nobody
        try:
            with pytest.raises(
                StorageError, match=r"secret.jpg cannot be read \(Permission denied\), though it was tried 4"
            ):
                read_bytes(UPath(path))
        finally:
            os.seteuid(user)


class Stuttering(MemoryFileSystem):
    """A storage of which every file fails to open the first few times."""

    protocol = "stuttering"
    cachable = False

    def __init__(self, failures: int = 0) -> None:
        super().__init__()
        self.failures = failures

    def _open(self, path: str, mode: str = "rb", **options: object) -> object:
        if mode == "rb" and self.failures:
            self.failures -= 1
            raise TimeoutError("the connection timed out")
        return super()._open(path, mode, **options)


@pytest.mark.filterwarnings("ignore:UPath 'stuttering' filesystem")
@pytest.mark.parametrize(("failures", "whole"), [(0, True), (3, True), (4, False)])
def test_a_storage_that_fails_for_a_moment_is_tried_again(failures: int, whole: bool) -> None:
    fsspec.register_implementation("stuttering", Stuttering, clobber=True)
    path = UPath("stuttering:///face.jpg", failures=failures)
    path.write_bytes(b"a picture")
    if whole:
        assert read_bytes(path) == b"a picture"
    else:
        with pytest.raises(StorageError, match="the connection timed out"):
            read_bytes(path)


def test_only_a_folder_that_lists_other_files_shows_that_one_is_gone(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "there.jpg").touch()
    places = ("empty/a.jpg", "nowhere/a.jpg", "full/a.jpg", "full/there.jpg")
    assert [is_gone(UPath(tmp_path / place)) for place in places] == [False, False, True, False]


class Counting(MemoryFileSystem):
    """A storage that counts how often a folder is listed."""

    protocol, listed = "counting", 0
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("counting:").strip("/")

    def ls(self, path: str, detail: bool = True, **options: object) -> list[Any]:
        Counting.listed += 1
        return list(super().ls(path, detail, **options))


@pytest.mark.filterwarnings("ignore:UPath 'counting' filesystem")
def test_a_folder_is_listed_once_for_all_of_its_pictures_that_are_gone() -> None:
    fsspec.register_implementation("counting", Counting, clobber=True)
    folder = UPath("counting:///faces")
    (folder / "there.jpg").write_bytes(b"a picture")
    before = Counting.listed
    assert all(is_gone(folder / f"{number}.jpg") for number in range(50))
    assert Counting.listed - before <= 2  # a minute may begin in between
    (folder / "there.jpg").unlink()  # the whole folder is away now, which no earlier listing hides
    assert not is_gone(folder / "there.jpg")
    assert not is_gone(folder / "0.jpg")


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(("JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP")),
    place=st.integers(0, 2000),
    values=st.binary(min_size=1, max_size=12),
)
def test_a_picture_with_other_bytes_is_read_or_says_why(kind: str, place: int, values: bytes) -> None:
    sink = io.BytesIO()
    Image.fromarray(np.arange(20 * 20 * 3, dtype=np.uint8).reshape(20, 20, 3)).save(sink, kind)
    data = bytearray(sink.getvalue())
    place %= len(data)
    data[place : place + len(values)] = values
    for read in (read_size, decode_image, lambda whole: list(decode_series(whole))):
        with suppress(UnreadableImageError):
            read(bytes(data))
