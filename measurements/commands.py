"""`cafe` commands as processes that may be killed, on a few real faces, and what they made, byte by byte."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Thread

POLL = 0.1
TOWER = ("--backbone", "imagenet-lite0", "--input-size", "64")
EXTRACT = ("extract", "faces", *TOWER, "--views", "5", "--shard-rows", "20")
SMALL = ("--image-size", "32", "--set", "features=standardised", "--set", "batch_size=64")
TRAIN = ("train", "--source", "faces", "--method", "cafe", *SMALL)
ALONE = ("--num-cpus", "1")
RECEIPTS, EPOCHS = "features/*/*/receipts/*.json", "runs/*/epochs/*.json"
STORES = ("features/**/*", "features/**/.*")
RUNS = ("runs/*/model.safetensors", "runs/*/predictions/*")


def choose_faces(source: Path, folder: Path, per_class: int) -> None:
    """Copy a few faces of each expression."""
    for expression in sorted(path for path in source.iterdir() if path.is_dir()):
        (folder / expression.name).mkdir(parents=True)
        for path in sorted(expression.iterdir())[:per_class]:
            shutil.copy(path, folder / expression.name)


def start(
    workspace: Path, command: tuple[str, ...], environment: dict[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Start a command in a workspace; what it says of errors goes to `errors.txt` beside that."""
    program = [sys.executable, "-m", "cafe.jobs.cli", "--workspace", str(workspace), *command]
    workspace.mkdir(exist_ok=True)
    with (workspace.parent / "errors.txt").open("wb") as errors:
        return subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=errors, cwd=workspace, env=environment)


def succeed(workspace: Path, command: tuple[str, ...]) -> None:
    """Run a command that must succeed."""
    if code := start(workspace, command).wait():
        sys.exit(f"{command} ended with {code}: {(workspace.parent / 'errors.txt').read_text()}")


def read_results(workspace: Path, patterns: tuple[str, ...]) -> dict[str, bytes]:
    """Return the bytes of what a workspace holds, by patterns of paths."""
    paths = [path for path in find(workspace, patterns) if path.is_file()]
    return {str(path.relative_to(workspace)): path.read_bytes() for path in paths}


def compare(whole: Path, workspace: Path, patterns: tuple[str, ...]) -> list[str]:
    """Say and return which files of a workspace differ from the undisturbed."""
    expected, made = (read_results(folder, patterns) for folder in (whole, workspace))
    differing = [name for name in sorted({*expected, *made}) if expected.get(name) != made.get(name)]
    print(f"  in the end: {len(expected)} files; different: {', '.join(differing) or 'none'}", flush=True)
    return differing


def find(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    """Return what is in a folder, by patterns of paths."""
    return [path for pattern in patterns for path in folder.glob(pattern)]


@dataclass
class Watch:
    """Notes in a thread each time that a record of finished work is written."""

    workspace: Path
    patterns: tuple[str, ...]
    writes: list[tuple[float, str]] = field(default_factory=list)
    ended: Event = field(default_factory=Event)

    def __call__(self) -> None:
        """Watch until it is ended."""
        seen: dict[Path, int] = {}
        while not self.ended.wait(POLL):
            for path in find(self.workspace, self.patterns):
                try:
                    written = path.stat().st_mtime_ns
                except FileNotFoundError:
                    continue
                if seen.get(path) != written:
                    seen[path] = written
                    self.writes.append((time.time(), str(path)))


@contextmanager
def watching(workspace: Path, patterns: tuple[str, ...]) -> Iterator[Watch]:
    """Watch what is finished in a workspace."""
    watch = Watch(workspace, patterns)
    thread = Thread(target=watch)
    thread.start()
    try:
        yield watch
    finally:
        watch.ended.set()
        thread.join()
