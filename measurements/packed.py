"""How fast small pictures are indexed and extracted from tar shards and from Parquet, beside the same pictures as files.

    python measurements/packed.py --faces 50000 200000

Every step is a process of its own, whose peak of memory is printed with its rate: it must not grow with the number of faces
but for their rows of the manifest. The tower is a ViT of two layers at 32 px, so that reading is not hidden behind it.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from cafe.data.expressions import EXPRESSIONS
from cafe.data.indexing import index_files
from cafe.data.readers.choices import SetChoices
from cafe.pipeline.settings import ExtractSettings
from cafe.pipeline.workspace import Workspace

SHARDS, SIDE, SHARD_ROWS = 20, 48, 1000
WAYS = {"files": ("folder", "files"), "tar": ("webdataset", "tar"), "parquet": ("table", "parquet")}
TOWER = {
    "embed_dim": 24,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1},
}


def lay_out(root: Path, faces: int) -> None:
    """Write as many pictures of noise as files, as samples in tar shards and as rows of Parquet, with the same names."""
    random = np.random.default_rng(0)
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    for folder in ("tar", "parquet", *(f"files/{name}" for name in EXPRESSIONS)):
        (root / folder).mkdir(parents=True)
    for shard in range(SHARDS):
        rows, labels = [], []
        with tarfile.open(root / "tar" / f"{shard:03d}.tar", "w") as tar:
            for number in range(shard * faces // SHARDS, (shard + 1) * faces // SHARDS):
                sink = io.BytesIO()
                Image.fromarray(random.integers(0, 256, (SIDE, SIDE), np.uint8)).save(sink, "JPEG", quality=80)
                name, label = f"{number:07d}.jpg", EXPRESSIONS[number % len(EXPRESSIONS)]
                (root / "files" / label / name).write_bytes(sink.getvalue())
                for member, content in ((name, sink.getvalue()), (f"{number:07d}.cls", label.encode())):
                    info = tarfile.TarInfo(member)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
                rows.append({"bytes": sink.getvalue(), "path": name})
                labels.append(label)
        table = pa.table({"image": pa.array(rows, kind), "label": labels})
        pq.write_table(table, root / "parquet" / f"{shard:03d}.parquet", row_group_size=1000)


def make_tower(root: Path) -> str:
    """Write a tower with random weights and return its name."""
    import open_clip
    import torch

    (root / "tiny-packed-vit.json").write_text(json.dumps(TOWER))
    open_clip.add_model_config(root / "tiny-packed-vit.json")
    torch.save(open_clip.create_model("tiny-packed-vit").state_dict(), root / "tiny.pt")
    return f"open_clip:{root / 'tiny-packed-vit.json'}@{root / 'tiny.pt'}"


def work(step: str, root: Path, way: str, tower: str) -> None:
    """Index or extract in this process; print faces, seconds, and the most memory in MB that it or a child of it took.

    An extraction is measured from its first shard on, without the start of the tower and of the process that decodes.
    """
    # Each way has a workspace of its own, where no store holds these pictures already.
    workspace, (kind, place), marks = Workspace.at(str(root / f"work-{way}")), WAYS[way], [(0, time.time())]
    decoder = 0.0
    if step == "extract":
        from cafe.pipeline.features.extract import extract

        manifest = workspace.load_manifest(way)
        settings = ExtractSettings(backbone=tower, batch_size=256, shard_rows=SHARD_ROWS, num_cpus=2)

        def note(done: int, total: int, /, **facts: float) -> None:
            nonlocal decoder
            marks.append((done, time.time()))
            decoder = max([decoder, *(_read_peak(child.pid) for child in psutil.Process().children(recursive=True))])

        extract(workspace, [manifest], settings, note)
        del marks[0]
    else:
        manifest = index_files(way, SetChoices().read(kind, str(root / place))).manifest
        manifest.save(workspace.manifest_path(way))
        marks.append((len(manifest), time.time()))
    peaks = (_read_peak(os.getpid()), decoder)
    sys.stdout.write(json.dumps([marks[-1][0] - marks[0][0], marks[-1][1] - marks[0][1], *peaks]))


def _read_peak(process: int) -> float:
    """Return the most memory that a process ever had, in MB; what `getrusage` says counts the parent's at its start."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
    return int(found[1]) / 1024 if found else 0.0


def measure(step: str, root: Path, way: str, tower: str) -> tuple[float, float, float]:
    """Return faces a second and the peaks of memory in MB of a step in a process of its own, and of its decoder."""
    command = [sys.executable, __file__, "--work", step, str(root), way, tower]
    faces, seconds, *peaks = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return faces / seconds, *peaks


def main() -> None:
    """Print a line for each number of faces, step and way."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--faces", type=int, nargs="+", default=[50_000, 200_000])
    parser.add_argument("--work", nargs=4)
    settings = parser.parse_args()
    if settings.work:
        step, root, way, tower = settings.work
        work(step, Path(root), way, tower)
        return
    for faces in settings.faces:
        with TemporaryDirectory() as folder:
            root = Path(folder)
            lay_out(root, faces)
            tower = make_tower(root)
            for step in ("index", "extract"):
                rates: dict[str, float] = {}
                for way in WAYS:
                    rates[way], own, decoder = measure(step, root, way, tower)
                    share = rates[way] / rates["files"]
                    sys.stdout.write(
                        f"{faces:>8,} {step:<8} {way:<8} {rates[way]:8,.0f} faces/s {share:5.2f} of files "
                        f"{own:6,.0f} MB, its decoder {decoder:6,.0f} MB\n"
                    )
                    sys.stdout.flush()


if __name__ == "__main__":
    main()
