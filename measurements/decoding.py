"""What other JPEG decoders would save, and whether their pixels are Pillow's, bit for bit.

    pip install simplejpeg
    python measurements/decoding.py --folder FOLDER

Decodes the photographs of a folder, as they are and enlarged to `--side` pixels, in turn with each decoder, on one core.
`cafe` is what an extraction calls: it checks the file and turns it upright, too. `half` decodes at half the size within the
transform of JPEG (`Image.draft`), against decoding whole and averaging squares of four pixels.
"""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import simplejpeg
import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg

from cafe.data.images import decode_image

Decoder = Callable[[bytes], np.ndarray]


def decode_pillow(content: bytes) -> np.ndarray:
    """Decode with Pillow and nothing else."""
    picture = Image.open(io.BytesIO(content))
    return np.asarray(picture if picture.mode == "RGB" else picture.convert("RGB"))


def decode_torchvision(content: bytes) -> np.ndarray:
    """Decode with torchvision, to (H, W, 3)."""
    encoded = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    pixels: np.ndarray = decode_jpeg(encoded, mode=ImageReadMode.RGB).permute(1, 2, 0).numpy()
    return pixels


def decode_simplejpeg(content: bytes) -> np.ndarray:
    """Decode with simplejpeg, as exactly as it does."""
    pixels: np.ndarray = simplejpeg.decode_jpeg(content, fastdct=False, fastupsample=False)
    return pixels


def decode_half(content: bytes) -> np.ndarray:
    """Decode at half the size within JPEG's transform."""
    picture = Image.open(io.BytesIO(content))
    picture.draft("RGB", (picture.width // 2, picture.height // 2))
    return np.asarray(picture if picture.mode == "RGB" else picture.convert("RGB"))


def halve(pixels: np.ndarray) -> np.ndarray:
    """Average squares of four pixels, which pictures of an odd side complete by their edge."""
    height, width = pixels.shape[:2]
    padded = np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), "edge").astype(np.uint16)
    squares = padded[::2, ::2] + padded[1::2, ::2] + padded[::2, 1::2] + padded[1::2, 1::2]
    return ((squares + 2) // 4).astype(np.uint8)


DECODERS: dict[str, Decoder] = {
    "Pillow": decode_pillow,
    "cafe": decode_image,
    "torchvision": decode_torchvision,
    "simplejpeg": decode_simplejpeg,
    "half": decode_half,
}


def enlarge(content: bytes, side: int) -> bytes:
    """Encode a picture again with its longer side in pixels."""
    picture = Image.open(io.BytesIO(content)).convert("RGB")
    scale, encoded = side / max(picture.size), io.BytesIO()
    picture.resize((round(picture.width * scale), round(picture.height * scale))).save(encoded, "JPEG", quality=90)
    return encoded.getvalue()


def time_decoder(decode: Decoder, contents: list[bytes]) -> float:
    """Return the seconds of this process's cores that all take."""
    start = time.process_time()
    for content in contents:
        decode(content)
    return time.process_time() - start


@click.command()
@click.option("--folder", required=True, type=click.Path(exists=True, path_type=Path), help="Photographs (*.jpg).")
@click.option("--count", default=400, show_default=True, help="Photographs.")
@click.option("--side", default=1024, show_default=True, help="Of the enlarged ones, pixels.")
@click.option("--repeats", default=5, show_default=True)
def main(folder: Path, count: int, side: int, repeats: int) -> None:
    """Print each decoder's time as a share of Pillow's, and how many of its pictures have Pillow's pixels."""
    torch.set_num_threads(1)
    small = [path.read_bytes() for path in sorted(folder.rglob("*.jpg"))[:count]]
    for title, contents in (
        ("as they are", small),
        (f"{side} px", [enlarge(content, side) for content in small[: count // 10]]),
    ):
        sides = [max(decode_pillow(content).shape) for content in contents]
        click.echo(f"{len(contents)} photographs {title} (longer side {statistics.median(sides):.0f} px in the median)")
        times: dict[str, list[float]] = {name: [] for name in DECODERS}
        for _ in range(repeats):
            for name, decode in DECODERS.items():
                times[name].append(time_decoder(decode, contents))
        plain = statistics.median(times["Pillow"])
        for name, decode in DECODERS.items():
            prepare = halve if name == "half" else np.asarray
            apart = [
                int(np.abs(decode(content).astype(int) - prepare(decode_pillow(content)).astype(int)).max())
                for content in contents
            ]
            shares = [seconds / plain for seconds in times[name]]
            click.echo(
                f"{name:12}  {statistics.median(shares):5.2f} ({min(shares):.2f}–{max(shares):.2f})  equal {apart.count(0)}"
                f" of {len(contents)}, at most {max(apart)} of 255 apart"
            )


if __name__ == "__main__":
    main()
