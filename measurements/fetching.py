"""How long an epoch of pictures from an object store takes where each request takes 20 ms: one at a time, and side by side.

    python measurements/fetching.py --faces 240 --wait 20

The store is moto's server on loopback, which waits before it answers. The source is a union of two sets, whose decoded
pictures a training keeps in memory: the first epoch fetches all, a later one nothing. Several times in turn, the median.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from threading import Thread
from typing import Any

import boto3
import numpy as np
import torch
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from PIL import Image
from werkzeug.serving import make_server

from cafe.data.indexing import index_files
from cafe.data.readers import DATASETS
from cafe.files import locate, write_file
from cafe.learning.loading import FaceDataset
from cafe.pipeline.faces import Faces, Part
from cafe.views import fetching
from cafe.views.drawing import ViewPlan

PLAN = ViewPlan("flip", 0, 2, "bilinear", (0.5,) * 3, (0.5,) * 3)
BATCH, SIDE = 32, 100  # of a face crop, as of RAF-DB


class SlowS3:
    """The server of moto on loopback; every answer takes `wait` seconds more."""

    def __init__(self, wait: float) -> None:
        self.wait = wait
        self.store: Any = DomainDispatcherApplication(create_backend_app)
        self.server = make_server("127.0.0.1", 0, self, threaded=True)
        Thread(target=self.server.serve_forever, daemon=True).start()
        os.environ |= {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.server.server_port}",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        os.environ |= {"AWS_ACCESS_KEY_ID": "nobody", "AWS_SECRET_ACCESS_KEY": "nothing"}

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., object]) -> Iterable[bytes]:
        """Answer one request."""
        time.sleep(self.wait)
        return list(self.store(environ, start_response))


def lay_out(name: str, faces: int) -> Part:
    """Write and index a set of random pictures in the store."""
    random = np.random.default_rng(0)
    for number in range(faces):
        sink = io.BytesIO()
        Image.fromarray(random.integers(0, 256, (SIDE, SIDE, 3), np.uint8)).save(sink, "JPEG", quality=80)
        write_file(locate(f"s3://faces/{name}/{('anger', 'happiness')[number % 2]}/{number}.jpg"), sink.getvalue())
    manifest = index_files(name, DATASETS["folder"](locate(f"s3://faces/{name}"))).manifest
    place = locate(f"s3://faces/manifests/{name}.parquet")
    manifest.save(place)
    return Part(place, manifest.digest)


def run(parts: list[Part], at_once: int) -> tuple[float, float]:
    """Return the seconds of the first and of the second epoch with so many requests under way."""
    fetching.AT_ONCE = at_once
    pictures = Faces.of(*parts).kept_pictures
    dataset = FaceDataset(pictures, PLAN, frozenset({"image"}), 64)
    batches = np.split(np.arange(len(pictures.labels)), range(BATCH, len(pictures.labels), BATCH))
    seconds = []
    for view in (0, 1):
        start = time.perf_counter()
        for _ in dataset.load(batches, view, torch.device("cpu")):
            pass
        seconds.append(time.perf_counter() - start)
    return seconds[0], seconds[1]


def main() -> None:
    """Print the medians."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--faces", type=int, default=240)
    parser.add_argument("--wait", type=float, default=20, help="milliseconds")
    parser.add_argument("--times", type=int, default=3)
    settings = parser.parse_args()
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = SlowS3(0)
    boto3.client("s3").create_bucket(Bucket="faces")
    parts = [lay_out(name, settings.faces // 2) for name in ("news", "cinema")]
    server.wait = settings.wait / 1000
    ways = (1, fetching.AT_ONCE)
    measured = [(at_once, run(parts, at_once)) for _ in range(settings.times) for at_once in ways]
    for at_once in ways:
        firsts, seconds = zip(*(times for way, times in measured if way == at_once), strict=True)
        sys.stdout.write(
            f"{at_once:>3} at a time: first epoch {statistics.median(firsts):6.2f} s ({min(firsts):.2f}-{max(firsts):.2f}), "
            f"second {statistics.median(seconds):5.2f} s\n"
        )


if __name__ == "__main__":
    main()
