"""How fast checksums are on this processor, over shards of features as a training reads them, against a plain read.

    pip install blake3 xxhash google-crc32c
    python measurements/checksums.py

Files of 4 MB that the system holds are read into memory that is there already; each checksum goes over what was just read.
Gigabytes (10^9 bytes) a second of one core's time, medians of several passes. SHA-256 and BLAKE3 can be trusted against
whoever changes a file on purpose, the others against accidents alone.
"""

from __future__ import annotations

import hashlib
import statistics
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import google_crc32c
import numpy as np
from blake3 import blake3
from xxhash import xxh3_64, xxh3_128

CHECKSUMS: dict[str, Callable[[Any], object]] = {
    "none": lambda values: None,
    "SHA-256": lambda values: hashlib.sha256(values).digest(),
    "BLAKE2b": lambda values: hashlib.blake2b(values).digest(),
    "BLAKE3": lambda values: blake3(values).digest(),
    "XXH3, 64 bits": lambda values: xxh3_64(values).digest(),
    "XXH3, 128 bits": lambda values: xxh3_128(values).digest(),
    # Takes bytes alone, so a copy is counted.
    "CRC-32C": lambda values: google_crc32c.value(values.tobytes()),
    "CRC-32 of zlib": zlib.crc32,
}


@click.command()
@click.option("--files", default=64, show_default=True)
@click.option("--size", default=4 * 2**20, show_default=True, help="Bytes of each.")
@click.option("--repeats", default=9, show_default=True)
def main(files: int, size: int, repeats: int) -> None:
    """Print the speed of each, and the time of reading and checking as a multiple of reading alone."""
    with TemporaryDirectory() as folder:
        paths = [Path(folder) / str(number) for number in range(files)]
        random = np.random.default_rng(0)
        for path in paths:
            path.write_bytes(random.bytes(size))
        memory = np.zeros((files, size), np.uint8)
        seconds: dict[str, list[float]] = {name: [] for name in CHECKSUMS}
        for _ in range(repeats):
            for name, checksum in CHECKSUMS.items():
                since = time.process_time()
                for path, values in zip(paths, memory, strict=True):
                    with path.open("rb", buffering=0) as file:
                        file.readinto(values.data)
                    checksum(values)
                seconds[name].append(time.process_time() - since)
    medians, total = {name: statistics.median(own) for name, own in seconds.items()}, files * size / 1e9
    for name, median in medians.items():
        alone = f"{total / (median - medians['none']):6.1f} GB/s alone" if name != "none" else " " * 17
        print(
            f"{name:16} {alone}, {total / median:5.2f} GB/s read and checked, {median / medians['none']:.2f} of a read"
        )


if __name__ == "__main__":
    main()
