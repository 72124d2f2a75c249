"""What `cafe data check` and `cafe data audit` need in memory and on disk, for several sizes of a data set.

    python measurements/pictures.py --folder /tmp/pictures --faces 20000 60000 120000

Faces are made up, grey and of 48 pixels, a mixture of two smooth patterns each; all but 32 are for training, so that an
audit looks 32 up among all others. Each command runs in a process of its own, which counts the memory that is its own alone
(anonymous: files that are read or mapped can be dropped), and what lies in files without a name.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import gettempdir
from threading import Event, Thread

import numpy as np
from PIL import Image

from cafe.data.manifest import Face, Manifest
from cafe.pipeline.datasets import report_audits, report_check
from cafe.pipeline.process.progress import no_bar
from cafe.pipeline.workspace import Workspace

TESTED = 32
SIDE, PATTERNS = 48, 500
A_FOLDER = 1000  # files


def write_set(workspace: Workspace, root: Path, faces: int) -> None:
    """Write that many pictures, where they are not there yet, and their manifest."""
    random = np.random.default_rng(0)
    coarse = random.integers(0, 256, (PATTERNS, 12, 12), np.uint8)
    patterns = [np.asarray(Image.fromarray(one).resize((SIDE, SIDE), Image.Resampling.BICUBIC)) for one in coarse]

    def write_faces() -> Iterator[Face]:
        for number, (one, two) in enumerate(random.integers(PATTERNS, size=(faces, 2))):
            path = f"{number // A_FOLDER}/{number}.png"
            sink = io.BytesIO()
            Image.fromarray(patterns[one] // 2 + patterns[two][:, ::-1] // 2).save(sink, "PNG", compress_level=1)
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            if not (root / path).exists():
                (root / path).write_bytes(sink.getvalue())
            split, digest = "test" if number < TESTED else "train", hashlib.sha256(sink.getvalue()).hexdigest()
            yield Face(path, path, number % 7, split, None, SIDE, SIDE, digest)

    Manifest.from_faces(f"faces-{faces}", str(root), write_faces()).save(workspace.manifest_path(f"faces-{faces}"))


class Watch(Thread):
    """Looks fifty times a second how much memory is this process's own, and what it has in files without a name."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.ended, self.memory, self.files = Event(), 0.0, 0.0

    def run(self) -> None:
        """Keep the most of both, in megabytes."""
        while not self.ended.wait(0.02):
            found = re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())
            assert found
            self.memory = max(self.memory, int(found[1]) / 1024)
            self.files = max(self.files, sum(size for _, size in self.find_files()) / 2**20)

    def find_files(self) -> Iterator[tuple[int, int]]:
        """Yield the files without a name that this process has open or mapped: (number, bytes)."""
        seen = set[int]()
        for folder in ("/proc/self/fd", "/proc/self/map_files"):
            for entry in Path(folder).iterdir():
                try:
                    place, about = str(entry.readlink()), entry.stat()
                except OSError:
                    continue
                if place.startswith(gettempdir()) and place.endswith("(deleted)") and about.st_ino not in seen:
                    seen.add(about.st_ino)
                    yield about.st_ino, 512 * about.st_blocks


def run(folder: Path, faces: int, command: str) -> None:
    """Carry out one command and print what it needed."""
    workspace = Workspace.at(str(folder / "work"))
    manifest, watch, start = workspace.load_manifest(f"faces-{faces}"), Watch(), time.perf_counter()
    watch.start()
    with no_bar("", "") as progress:
        if command == "check":
            result, _ = report_check(workspace, manifest, progress)
            found = f"{len(result.duplicates)} groups of identical pictures"
        else:
            (audit,) = report_audits(workspace, manifest, [], progress, progress)
            found = f"{len(audit.pairs)} pairs"
    watch.ended.set()
    seconds = time.perf_counter() - start
    print(
        f"{command} {faces:>9,}: {watch.memory:6.0f} MB of memory, {watch.files:6.0f} MB of files, {seconds:6.1f} s of the "
        f"clock, {time.process_time():6.1f} s of a core, {found}",
        flush=True,
    )


def main() -> None:
    """Run what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--faces", type=int, nargs="+", default=[20_000, 60_000, 120_000])
    parser.add_argument("--command", choices=["check", "audit"])
    arguments = parser.parse_args()
    if arguments.command:
        run(arguments.folder, arguments.faces[0], arguments.command)
        return
    for faces in arguments.faces:
        write_set(Workspace.at(str(arguments.folder / "work")), arguments.folder / "pictures", faces)
        for command in ("check", "audit"):
            place = ["--folder", str(arguments.folder), "--faces", str(faces), "--command", command]
            subprocess.run([sys.executable, __file__, *place], check=True)


if __name__ == "__main__":
    main()
