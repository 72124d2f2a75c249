"""What random kills cost: `kill -9` of the driver, a worker or a node of Ray's, and the same command until it is done.

    python measurements/chaos.py ~/faces/news --folder /tmp/chaos --stage extract --kills 100 --nodes 2
    python measurements/chaos.py ~/faces/news --folder /tmp/chaos --stage train --kills 20
    python measurements/chaos.py ~/faces/news --folder /tmp/chaos --stage extract --kills 20 --tar    # faces in a tar

A kill falls at a random moment of a span as long as the undisturbed work, which begins, but for one of five, when there is
a worker. With `--nodes` there is a cluster of so many, and a command survives all but the kill of its driver. Without, an
extraction's workers are the processes that decode for it, and a benchmark starts a Ray of its own, whose end is its own.
Whenever it is done, what it made is compared with the undisturbed, byte by byte, and it begins anew until all kills are
spent. The table says how much work they repeated.
"""

from __future__ import annotations

import random
import shutil
import statistics
import subprocess
import sys
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import click
import commands
import psutil
from nodes import Nodes

from cafe.jobs.tables import make_table
from cafe.jobs.terminal import show

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
WORKERS = ("ray::MapWorker", "ray::Worker", "ray::RayTrainWorker")
PATIENCE = 600.0  # seconds after which a command that neither ends nor finishes anything hangs
TOO_SLOW = "Ray did not start in its time"  # on a machine that is too busy
EARLY = 0.2  # of the kills may come before there is a worker


@dataclass(frozen=True)
class Stage:
    """A command, what of it counts as finished work, and what has to come out the same."""

    command: tuple[str, ...]
    before: tuple[str, ...]  # the stages that have to be done first
    finished: tuple[str, ...]  # the records of finished work
    results: tuple[str, ...]
    alone: bool = False  # on one machine it needs no process but its own
    in_process: bool = False  # on one machine it needs no Ray
    cores: int = 1  # that it needs on one machine

    @property
    def here(self) -> tuple[str, ...]:
        """Say that it works on this machine."""
        return "--num-cpus", str(self.cores)


STAGES = {
    "extract": Stage(commands.EXTRACT, (), (commands.RECEIPTS,), commands.STORES, in_process=True),
    "train": Stage((*commands.TRAIN, "--epochs", "6"), ("extract",), (commands.EPOCHS,), commands.RUNS, alone=True),
    "team": Stage(
        (*commands.TRAIN, "--epochs", "6", "--num-workers", "2"),
        ("extract",),
        (commands.EPOCHS,),
        commands.RUNS,
        cores=2,
    ),
    "benchmark": Stage(
        ("benchmark", "grid.toml"),  # a cell for each core, so that each has one thread, wherever it runs
        (),
        (commands.RECEIPTS, commands.EPOCHS),
        (*commands.STORES, *commands.RUNS),
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


def assign(watch: commands.Watch, kills: list[Kill]) -> None:
    """Say of each kill how much was written again after it, and how soon anything was."""
    written = Counter[str]()
    for when, path in watch.writes:
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
@click.option("--nodes", default=0, show_default=True, help="Nodes of a cluster; 0: the command starts its own Ray.")
@click.option("--seed", default=0, show_default=True, help="Of the moments and the victims.")
@click.option("--per-class", default=60, show_default=True, help="Faces to use of each expression.")
@click.option("--tar", is_flag=True, help="Read the faces from a tar of them.")
@click.option("--folder", type=click.Path(path_type=Path), required=True, help="Where to work, for one stage.")
def main(faces: Path, stage: str, kills: int, nodes: int, seed: int, per_class: int, tar: bool, folder: Path) -> None:
    """Kill what works on FACES, a folder for each expression, and print what it cost."""
    chosen = STAGES[stage]
    base, whole, span = work_undisturbed(chosen, faces, folder, per_class, tar)
    click.echo(f"undisturbed: {len(commands.find(whole, chosen.finished))} finished in {span:.0f} s")

    spent: list[Kill] = []
    with Nodes(folder / f"nodes{seed}", nodes) if nodes else nullcontext() as cluster:
        chaos = Chaos(chosen, random.Random(seed), span, cluster)  # noqa: S311
        for number in range(kills):  # each round takes at least one kill, or the command is too fast for them
            if len(spent) == kills:
                break
            workspace = shutil.copytree(base, folder / f"round{seed}-{number}")
            done = chaos.work_off(workspace, kills - len(spent))
            spent += done
            click.echo(f"round {number}: {len(done)} kills")
            if commands.compare(whole, workspace, chosen.results):
                sys.exit(1)
            shutil.rmtree(workspace)
    _print(stage, spent)


def work_undisturbed(stage: Stage, faces: Path, folder: Path, per_class: int, tar: bool) -> tuple[Path, Path, float]:
    """Return the workspace before and after a command, and the seconds of its work; what is there is used."""
    base, whole, note = folder / "base", folder / "whole", folder / "span.txt"
    if not note.exists():
        commands.choose_faces(faces, folder / "faces", per_class)
        place = str(folder / "faces")
        if tar:
            place = shutil.make_archive(place, "tar", place)
            shutil.rmtree(folder / "faces")
        commands.succeed(base, ("data", "index", "folder", place, "--name", "faces"))
        (base / "grid.toml").write_text(GRID)
        for name in stage.before:
            commands.succeed(base, (*STAGES[name].command, *STAGES[name].here))
        shutil.copytree(base, whole)
        with commands.watching(whole, stage.finished) as watch:
            commands.succeed(whole, (*stage.command, *stage.here))
        note.write_text(str(watch.writes[-1][0] - watch.writes[0][0]))
    return base, whole, float(note.read_text())


@dataclass
class Chaos:
    """Works a command off, again and again until it is done, and kills at random moments of a span."""

    stage: Stage
    chance: random.Random
    span: float
    cluster: Nodes | None

    def work_off(self, workspace: Path, most: int) -> list[Kill]:
        """Get a command done with at most so many kills, and return these."""
        kills: list[Kill] = []
        where = ("--address", self.cluster.address, "--scale-minutes", "10") if self.cluster else self.stage.here
        environment = self.cluster.environment if self.cluster else None
        with commands.watching(workspace, self.stage.finished) as watch:
            while True:
                driver, before = commands.start(workspace, (*self.stage.command, *where), environment), len(kills)
                self.kill_some(driver, kills, most)
                code, errors = _wait(driver, watch), (workspace.parent / "errors.txt").read_text().strip()
                if code == 0:
                    break
                if len(kills) == before and TOO_SLOW not in errors:
                    sys.exit(f"The command ended with {code} although nothing was killed: {errors}")
                told = errors if "Traceback" in errors else errors.partition("\n")[0]
                click.echo(f"  exit code {code} after {len(kills)} kills: {told}")
        assign(watch, kills)
        return kills

    def kill_some(self, driver: subprocess.Popen[bytes], kills: list[Kill], most: int) -> None:
        """Kill at random moments until the driver has ended or enough is killed."""
        while len(kills) < most:
            alone = self.stage.alone and not self.cluster  # the driver is all there is
            if self.chance.random() > EARLY and not alone:
                self.find(driver, "worker")
            if _ended_within(driver, self.chance.uniform(0, self.span)):
                return
            victim = "driver" if alone else self.chance.choice(VICTIMS)
            if victim == "node" and not self.cluster and self.stage.in_process:
                victim = "worker"
            if not (found := self.find(driver, victim)):
                return
            process, own = self.chance.choice(found), _descendants(driver.pid)
            workers = sum(_is(other, "worker") for other in self.family(driver))
            kills.append(Kill(victim, time.time(), _title(process), workers))
            click.echo(f"  {len(kills)}. {victim}: {kills[-1].title}")
            if victim == "node" and self.cluster:
                self.replace_node(process)
                continue
            process.kill()
            if victim != "worker":
                _expect_end(driver, own)
                return

    def find(self, driver: subprocess.Popen[bytes], victim: str) -> list[psutil.Process]:
        """Return the processes that could be killed as soon as there are any; nothing when the driver has ended before."""
        found: list[psutil.Process] = []
        while not found and driver.poll() is None:
            time.sleep(commands.POLL)
            if self.cluster:
                self.cluster.revive()
            found = [process for process in self.family(driver) if _is(process, victim)]
        return found

    def family(self, driver: subprocess.Popen[bytes]) -> list[psutil.Process]:
        """Return the driver and all that works for it."""
        own = [psutil.Process(driver.pid)] if driver.poll() is None else []
        return [*own, *_descendants(driver.pid), *(self.cluster.processes() if self.cluster else [])]

    def replace_node(self, raylet: psutil.Process) -> None:
        """Kill a node with all that runs on it, and start another in its place."""
        assert self.cluster
        (name,) = (
            name
            for name, node in self.cluster.running.items()
            if raylet in psutil.Process(node.pid).children(recursive=True)
        )
        self.cluster.kill(name)
        self.cluster.start(name)


def _descendants(process: int) -> list[psutil.Process]:
    try:
        return list(psutil.Process(process).children(recursive=True))
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
        return title.startswith("python") and process.is_running() and process.ppid() == psutil.Process().pid
    return title == "raylet" if victim == "node" else title.startswith(WORKERS) or _decodes(process)


def _decodes(process: psutil.Process) -> bool:
    """Whether a process decodes for a tower that works in the driver."""
    try:
        return "--multiprocessing-fork" in process.cmdline()
    except psutil.Error:
        return False


def _expect_end(driver: subprocess.Popen[bytes], family: list[psutil.Process]) -> None:
    """Wait until a driver and all it started have ended, as they must."""
    if not _ended_within(driver, PATIENCE):
        sys.exit(f"{PATIENCE:.0f} seconds after a kill the driver still runs.")
    if left := psutil.wait_procs(family, PATIENCE)[1]:
        sys.exit(f"{PATIENCE:.0f} seconds after the end of the driver these still run: {left}")


def _ended_within(driver: subprocess.Popen[bytes], seconds: float) -> bool:
    try:
        driver.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def _wait(driver: subprocess.Popen[bytes], watch: commands.Watch) -> int:
    """Return how a command ends; one that finishes no work for too long hangs, which ends the benchmark."""
    since = time.time()
    while driver.poll() is None:
        if time.time() - max([since, *(when for when, _ in watch.writes[-1:])]) > PATIENCE:
            driver.kill()
            sys.exit(f"The command hangs: nothing was finished for {PATIENCE:.0f} seconds.")
        time.sleep(commands.POLL)
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
