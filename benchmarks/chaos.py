"""What random kills cost: `kill -9` of the driver, a worker or Ray's node, and the same command again until it is done.

    python benchmarks/chaos.py ~/faces/news --kills 100 --stage extract
    python benchmarks/chaos.py ~/faces/news --kills 20 --stage train

A kill falls at a random moment of a span as long as the undisturbed command. A driver that survives the kill of a worker
goes on by itself, and may lose another. Whenever the command is done, what it made is compared with the undisturbed, byte
by byte, and it begins anew until all kills are spent. The table says how much work they repeated.
"""

from __future__ import annotations

import random
import shutil
import statistics
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Thread

import click
import psutil

from jobs.terminal import make_table, show

TOWER = ("--backbone", "imagenet-lite0", "--input-size", "64")
SMALL = ("--method", "cafe", "--image-size", "32", "--set", "features=standardised", "--set", "batch_size=64")
ALONE = ("--num-cpus", "1")
GRID = """
sources = ["faces"]
targets = ["faces"]
seeds = 2
towers = ["imagenet-lite0"]
views = 5
methods = ["cafe", "linear_probe"]
[features]
input_size = 64
shard_rows = 20
[train]
epochs = 4
image_size = 32
set = { features = "standardised", batch_size = 64 }
"""
VICTIMS = ("driver", "worker", "worker", "worker", "node", "driver")  # one of three is the driver
PATIENCE = 600.0  # seconds after which a command that neither ends nor finishes anything hangs
POLL = 0.1


@dataclass(frozen=True)
class Stage:
    """A command, what of it counts as finished work, and what has to come out the same."""

    command: tuple[str, ...]
    before: tuple[str, ...]  # the stages that have to be done first
    finished: tuple[str, ...]  # the records of finished work
    results: tuple[str, ...]


STAGES = {
    "extract": Stage(
        ("extract", "faces", *TOWER, "--views", "5", "--shard-rows", "20", *ALONE),
        (),
        ("features/*/*/receipts/*.json",),
        ("features/**/*", "features/**/.*"),
    ),
    "train": Stage(
        ("train", "--source", "faces", "--epochs", "12", *SMALL, *ALONE),
        ("extract",),
        ("runs/*/epochs/*.json",),
        ("runs/*/model.safetensors", "runs/*/predictions/*"),
    ),
    "benchmark": Stage(
        ("benchmark", "grid.toml", "--parallel", "2", "--num-cpus", "2"),
        (),
        ("features/*/*/receipts/*.json", "runs/*/epochs/*.json"),
        ("features/**/*", "runs/*/model.safetensors", "runs/*/predictions/*"),
    ),
}


@dataclass
class Kill:
    """One kill, and what was written again because of it."""

    victim: str
    when: float
    title: str  # of the process
    under_way: int  # workers, each with at most one shard or epoch begun
    again: int = 0
    until_next: float | None = None  # seconds until more work is finished


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
            for path in _glob(self.workspace, self.patterns):
                try:
                    written = path.stat().st_mtime_ns
                except FileNotFoundError:
                    continue
                if seen.get(path) != written:
                    seen[path] = written
                    self.writes.append((time.time(), str(path)))

    def assign(self, kills: list[Kill]) -> None:
        """Say of each kill how much was written again after it, and how soon anything was."""
        written = Counter[str]()
        for when, path in self.writes:
            before = [kill for kill in kills if kill.when < when]
            if before and before[-1].until_next is None:
                before[-1].until_next = when - before[-1].when
            if before and written[path]:
                before[-1].again += 1
            written[path] += 1


@click.command()
@click.argument("faces", type=click.Path(exists=True, path_type=Path))
@click.option("--stage", type=click.Choice(list(STAGES)), required=True)
@click.option("--kills", default=20, show_default=True)
@click.option("--seed", default=0, show_default=True, help="Of the moments and the victims.")
@click.option("--per-class", default=60, show_default=True, help="Faces to use of each expression.")
@click.option("--folder", type=click.Path(path_type=Path), required=True, help="Where to work; it must not exist.")
def main(faces: Path, stage: str, kills: int, seed: int, per_class: int, folder: Path) -> None:
    """Kill what works on FACES, a folder for each expression, and print what it cost."""
    chosen, base, chance = STAGES[stage], folder / "base", random.Random(seed)  # noqa: S311
    _choose_faces(faces, folder / "faces", per_class)
    _succeed(base, ("data", "index", "folder", str(folder / "faces"), "--name", "faces"))
    (base / "grid.toml").write_text(GRID)
    for name in chosen.before:
        _succeed(base, STAGES[name].command)
    whole = shutil.copytree(base, folder / "whole")
    started = time.time()
    _succeed(whole, chosen.command)
    span, expected = time.time() - started, _contents(whole, chosen)
    click.echo(f"undisturbed: {span:.0f} s, {len(_glob(whole, chosen.finished))} finished, {len(expected)} files")

    spent: list[Kill] = []
    for number in range(kills):  # each round takes at least one kill, or the command is too fast for them
        if len(spent) == kills:
            break
        workspace = shutil.copytree(base, folder / f"round{number}")
        done = _disturb(workspace, chosen, chance, span, kills - len(spent))
        spent += done
        same = _contents(workspace, chosen) == expected
        click.echo(f"round {number}: {len(done)} kills, {'identical' if same else 'DIFFERENT'}")
        if not same:
            sys.exit(1)
        shutil.rmtree(workspace)
    _print(stage, spent)


def _choose_faces(source: Path, folder: Path, per_class: int) -> None:
    for expression in sorted(path for path in source.iterdir() if path.is_dir()):
        (folder / expression.name).mkdir(parents=True)
        for path in sorted(expression.iterdir())[:per_class]:
            shutil.copy(path, folder / expression.name)


def _start(workspace: Path, command: tuple[str, ...]) -> subprocess.Popen[bytes]:
    program = [sys.executable, "-m", "jobs.cli", "--workspace", str(workspace)]
    with (workspace.parent / "errors.txt").open("wb") as errors:
        place = {"cwd": workspace} if workspace.exists() else {}
        return subprocess.Popen([*program, *command], stdout=subprocess.DEVNULL, stderr=errors, **place)


def _succeed(workspace: Path, command: tuple[str, ...]) -> None:
    if code := _start(workspace, command).wait():
        sys.exit(f"{command} ended with {code}: {(workspace.parent / 'errors.txt').read_text()}")


def _contents(workspace: Path, stage: Stage) -> dict[str, bytes]:
    paths = [path for path in _glob(workspace, stage.results) if path.is_file()]
    return {str(path.relative_to(workspace)): path.read_bytes() for path in paths}


def _glob(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    return [path for pattern in patterns for path in folder.glob(pattern)]


def _disturb(workspace: Path, stage: Stage, chance: random.Random, span: float, most: int) -> list[Kill]:
    """Give a command again and again until it is done, with at most so many kills, and return these."""
    kills: list[Kill] = []
    watch = Watch(workspace, stage.finished)
    thread = Thread(target=watch)
    thread.start()
    try:
        while True:
            driver, before = _start(workspace, stage.command), len(kills)
            _kill_some(driver, kills, chance, span, most)
            code = _wait(driver, watch)
            errors = (workspace.parent / "errors.txt").read_text()
            if code == 0:
                return kills
            if len(kills) == before:
                sys.exit(f"The command ended with {code} although nothing was killed: {errors}")
            if "Traceback" in errors:
                click.echo(f"A kill of {kills[-1].title} ends in a traceback:\n{errors}")
            elif errors.strip():
                click.echo(f"  {kills[-1].title} → {code}: {errors.strip().splitlines()[0]}")
    finally:
        watch.ended.set()
        thread.join()
        watch.assign(kills)


def _kill_some(
    driver: subprocess.Popen[bytes], kills: list[Kill], chance: random.Random, span: float, most: int
) -> None:
    """Kill at random moments until the driver has ended or enough is killed."""
    while len(kills) < most and not _ended_within(driver, chance.uniform(0, span)):
        victim = chance.choice(VICTIMS)
        family = _family(driver)
        found: list[psutil.Process] = []
        while not found and driver.poll() is None:
            found = [process for process in _family(driver) if _is(process, victim)]
            time.sleep(POLL)
        if not found:
            return
        process, family = chance.choice(found), _family(driver)
        under_way = sum(_is(other, "worker") for other in family)
        title = _title(process)
        process.kill()
        kills.append(Kill(victim, time.time(), title, under_way))
        click.echo(f"  {len(kills)}. {victim}: {title}")
        if victim != "worker":
            driver.wait(PATIENCE)
            _, left = psutil.wait_procs(family, 60)
            if left:
                sys.exit(f"60 seconds after the kill of the {victim} these still run: {left}")
            return


def _family(driver: subprocess.Popen[bytes]) -> list[psutil.Process]:
    try:
        return [psutil.Process(driver.pid), *psutil.Process(driver.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _title(process: psutil.Process) -> str:
    try:
        words = process.cmdline()
    except psutil.Error:
        return ""
    return Path(words[0]).name if words else ""


def _is(process: psutil.Process, victim: str) -> bool:
    title = _title(process)
    if victim == "driver":
        return process.ppid() == psutil.Process().pid
    return title == "raylet" if victim == "node" else title.startswith(("ray::MapWorker", "ray::Worker"))


def _ended_within(driver: subprocess.Popen[bytes], seconds: float) -> bool:
    try:
        driver.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def _wait(driver: subprocess.Popen[bytes], watch: Watch) -> int:
    """Return how a command ends; one that finishes no work for too long hangs, which ends the benchmark."""
    since = time.time()
    while driver.poll() is None:
        if time.time() - max([since, *(when for when, _ in watch.writes[-1:])]) > PATIENCE:
            driver.kill()
            sys.exit(f"The command hangs: nothing was finished for {PATIENCE:.0f} seconds.")
        time.sleep(POLL)
    return driver.returncode


def _print(stage: str, kills: list[Kill]) -> None:
    lines: list[list[object]] = []
    for victim in dict.fromkeys(VICTIMS):
        own = [kill for kill in kills if kill.victim == victim]
        nexts = [kill.until_next for kill in own if kill.until_next is not None]
        lines.append(
            [
                victim,
                len(own),
                sum(kill.again for kill in own),
                f"{statistics.mean(kill.under_way for kill in own):.2f}" if own else "",
                f"{statistics.median(nexts):.1f}" if nexts else "",
            ]
        )
    header = (
        "killed",
        "times",
        "finished work done again",
        "begun work lost, at most, per kill",
        "s until more is done",
    )
    show(make_table(header, lines, title=f"{len(kills)} kills during {stage}"))


if __name__ == "__main__":
    main()
