"""What it costs when all workers of a cluster vanish at once and come back later, as spot nodes do.

    python measurements/spot.py ~/faces/news --folder /tmp/spot --stage extract
    python measurements/spot.py ~/faces/news --folder /tmp/spot2 --stage benchmark --times 2 --away 60
    python measurements/spot.py ~/faces/news --folder /tmp/spot3 --stage team --away 60    # a training by two workers

A head without cores, beside which the command runs, and two nodes. The nodes are killed with -9 at the same moment, as often
as asked for, at even parts of the undisturbed work, and new ones join after some time. One command has to get over all that;
what it made is compared with the undisturbed, byte by byte. No shard that was finished may be computed again, and of each
training that was at work no more than the epoch that followed its last checkpoint.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

import click
import commands
from chaos import PATIENCE, STAGES, Kill, assign, work_undisturbed
from nodes import Nodes

from cafe.jobs.tables import make_table
from cafe.jobs.terminal import show

NODES = ("node0", "node1")


@click.command()
@click.argument("faces", type=click.Path(exists=True, path_type=Path))
@click.option("--stage", type=click.Choice(list(STAGES)), required=True)
@click.option("--times", default=1, show_default=True, help="How often all nodes vanish.")
@click.option("--away", default=300, show_default=True, help="Seconds until new ones join.")
@click.option("--per-class", default=60, show_default=True, help="Faces to use of each expression.")
@click.option("--options", default="", help="Of the command, besides those it needs.")
@click.option("--folder", type=click.Path(path_type=Path), required=True, help="Where to work, for one stage.")
def main(faces: Path, stage: str, times: int, away: int, per_class: int, options: str, folder: Path) -> None:
    """Take the nodes away from what works on FACES, a folder for each expression, and print what it cost."""
    chosen = STAGES[stage]
    base, whole, span = work_undisturbed(chosen, faces, folder, per_class, False)
    finished = len(commands.find(whole, chosen.finished))
    click.echo(f"undisturbed: {finished} finished in {span:.0f} s")
    workspace, started = folder / "spot", f"{time.time():.0f}"
    shutil.rmtree(workspace, ignore_errors=True)
    shutil.copytree(base, workspace)
    with Nodes(folder / f"nodes{started}", len(NODES)) as nodes, commands.watching(workspace, chosen.finished) as watch:
        command = (*chosen.command, "--address", nodes.address, *options.split())
        driver = commands.start(workspace, command, nodes.environment)
        try:
            kills, returns = _take_away(
                driver, watch, nodes, [finished * (n + 1) // (times + 1) for n in range(times)], away
            )
        finally:
            driver.kill()
    click.echo(f"exit code {driver.returncode}: {_errors(folder)}")
    assign(watch, kills)
    lines = [
        [
            number,
            kill.again,
            kill.under_way,
            f"{min((when for when, _ in watch.writes if when > back), default=back) - back:.0f}",
        ]
        for number, (kill, back) in enumerate(zip(kills, returns, strict=True), 1)
    ]
    header = (
        "kill",
        "finished work done again",
        "begun work lost, at most",
        "s until more is done, from the return on",
    )
    show(make_table(header, lines, title=f"All nodes away for {away} s during {stage}"))
    again = [
        path for number, (_, path) in enumerate(watch.writes) if path in {other for _, other in watch.writes[:number]}
    ]
    if shards := [path for path in again if "receipts" in path]:
        click.echo(f"finished shards computed again: {shards}")
    too_many = shards or len(again) > times
    if commands.compare(whole, workspace, chosen.results) or driver.returncode or too_many:
        sys.exit(1)


def _take_away(
    driver: subprocess.Popen[bytes], watch: commands.Watch, nodes: Nodes, moments: list[int], away: int
) -> tuple[list[Kill], list[float]]:
    """Take all nodes away each time that so much is finished, until the command ends; return when they went and came."""
    kills, returns = list[Kill](), list[float]()
    for finished in moments:
        _wait_for(driver, watch, finished)
        kills.append(Kill("nodes", time.time(), "", len(NODES)))
        for name in NODES:
            nodes.kill(name)
        click.echo(f"{len({path for _, path in watch.writes})} finished: all nodes killed")
        time.sleep(away)
        if driver.poll() is None:
            click.echo(f"away for {away} s; the command waits, and says: {_errors(watch.workspace.parent)}")
        returns.append(time.time())
        for name in NODES:
            nodes.start(name)
            nodes.wait_for(name, "(Ray runtime started)")
    while driver.poll() is None:
        nodes.revive()
        _check(watch, returns[-1], driver)
        time.sleep(commands.POLL)
    return kills, returns


def _wait_for(driver: subprocess.Popen[bytes], watch: commands.Watch, finished: int) -> None:
    """Wait until so much is finished."""
    since = time.time()
    while len({path for _, path in watch.writes}) < finished:
        if driver.poll() is not None:
            sys.exit(f"The command has ended with {driver.returncode} before: {_errors(watch.workspace.parent)}")
        _check(watch, since, driver)
        time.sleep(commands.POLL)


def _check(watch: commands.Watch, since: float, driver: subprocess.Popen[bytes]) -> None:
    """End what finishes nothing for too long."""
    if time.time() - max([since, *(when for when, _ in watch.writes[-1:])]) > PATIENCE:
        driver.kill()
        sys.exit(
            f"The command hangs: nothing was finished for {PATIENCE:.0f} seconds: {_errors(watch.workspace.parent)}"
        )


def _errors(folder: Path) -> str:
    return (folder / "errors.txt").read_text().strip()


if __name__ == "__main__":
    main()
