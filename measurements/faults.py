"""A disk that is full, a folder that is away for a while, a picture too large for the memory: what comes out of each.

    python measurements/faults.py ~/faces/news --folder /tmp/faults

Needs the rights to mount a small file system and to limit the memory of processes (Linux, control groups 1). After each
fault the same command must end in what it makes undisturbed, byte for byte.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import commands
from PIL import Image

TRAIN = (*commands.TRAIN, "--epochs", "3", *commands.ALONE)
EXTRACT = (*commands.EXTRACT, *commands.ALONE)
GROUPS = Path("/sys/fs/cgroup/memory")
MEMORY = 2 * 2**30  # that the extraction may use, which needs most of it without the picture
SIDE = 10_000  # of the picture, which takes another gigabyte


@click.command()
@click.argument("faces", type=click.Path(exists=True, path_type=Path))
@click.option("--folder", type=click.Path(path_type=Path), required=True, help="Where to work; it must not exist.")
def main(faces: Path, folder: Path) -> None:
    """Bring the faults about on FACES, a folder for each expression."""
    commands.choose_faces(faces, folder / "faces", 60)
    indexed = folder / "indexed"
    commands.succeed(indexed, ("data", "index", "folder", str(folder / "faces"), "--name", "faces"))
    whole = shutil.copytree(indexed, folder / "whole")
    for command in (EXTRACT, TRAIN):
        commands.succeed(whole, command)
    lack_space(indexed, whole, folder / "full")
    rename_folder(indexed, whole, folder / "renamed")
    poison(folder)


def lack_space(indexed: Path, whole: Path, folder: Path) -> None:
    """Extract and train on a file system that is too small for each, and again when it is larger."""
    folder.mkdir()
    with mounted(folder / "disk") as resize:
        work = shutil.copytree(indexed, folder / "disk" / "work")
        for command, small, large, patterns in (
            (EXTRACT, "3m", "60m", commands.STORES),
            (TRAIN, "60m", "1g", commands.RUNS),
        ):
            resize(small)
            report(commands.start(work, command), work, f"{command[0]} on a disk of {small}")
            resize(large)
            commands.succeed(work, command)
            commands.compare(whole, work, patterns)


def rename_folder(indexed: Path, whole: Path, work: Path) -> None:
    """Rename a folder of faces as soon as the first shard is done, and back when the extraction has given up."""
    shutil.copytree(indexed, work)
    happiness = work.parent / "faces" / "happiness"
    driver = commands.start(work, EXTRACT)
    while not list(work.glob(commands.RECEIPTS)):
        time.sleep(commands.POLL)
    happiness.rename(happiness.with_name("away"))
    report(driver, work, "extract while a folder is away")
    happiness.with_name("away").rename(happiness)
    commands.succeed(work, EXTRACT)
    commands.compare(whole, work, commands.STORES)


def poison(folder: Path) -> None:
    """Extract, in little memory, among others a picture whose decoding takes more."""
    large = folder / "faces" / "sadness" / "large.png"
    Image.new("RGB", (SIDE, SIDE)).save(large, compress_level=1)
    work = folder / "poisoned"
    commands.succeed(work, ("data", "index", "folder", str(folder / "faces"), "--name", "faces"))
    group = GROUPS / f"cafe-{os.getpid()}"
    group.mkdir()
    (group / "memory.limit_in_bytes").write_text(str(MEMORY))
    join = f"echo $$ > {group}/cgroup.procs && exec "
    command = [sys.executable, "-m", "cafe.jobs.cli", "--workspace", str(work), *EXTRACT, "--max-megapixels", "100"]
    with (folder / "errors.txt").open("wb") as errors:
        driver = subprocess.Popen(["sh", "-c", join + " ".join(command)], stderr=errors, stdout=subprocess.DEVNULL)
    report(driver, work, "extract with a picture that kills its decoder")
    lacking = commands.find(work, ("features/*/*/receipts/*.json",))
    click.echo(
        f"  {len(lacking)} receipts; killed for memory: {(group / 'memory.oom_control').read_text().split()[-1]}"
    )


@contextmanager
def mounted(place: Path) -> Iterator[Callable[[str], object]]:
    """Mount a file system in memory; yields what resizes it."""
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "cafe", str(place)], check=True)
    try:
        yield lambda size: subprocess.run(["mount", "-o", f"remount,size={size}", str(place)], check=True)
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def report(driver: subprocess.Popen[bytes], workspace: Path, what: str) -> None:
    """Show how a command ended, which must not be with success."""
    code = driver.wait()
    errors = (workspace.parent / "errors.txt").read_text().strip()
    click.echo(f"{what}: exit code {code}\n  " + errors.replace("\n", "\n  "))
    if not code:
        sys.exit("It should have failed.")


if __name__ == "__main__":
    main()
