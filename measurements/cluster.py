"""A cluster of a head and two nodes, of which one is killed, and then a worker: the results are those of one machine.

    python measurements/cluster.py ~/faces/news --folder /tmp/cluster

The commands are jobs of Ray's (`ray job submit`, which needs the extra `cluster`), which bring their code along, and are let
in by the cluster's token.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import click
import commands
from nodes import Nodes

ROOT = Path(__file__).parents[1]
TRAIN = (*commands.TRAIN, "--epochs", "6", "--num-workers", "2")
TRAINING = "ray::RayTrainWorker"  # the title of a process that trains


@click.command()
@click.argument("faces", type=click.Path(exists=True, path_type=Path))
@click.option("--per-class", default=60, show_default=True, help="Faces to use of each expression.")
@click.option("--folder", type=click.Path(path_type=Path), required=True, help="Where to work.")
def main(faces: Path, per_class: int, folder: Path) -> None:
    """Extract and train on FACES, a folder for each expression, here and on a cluster, and compare."""
    alone, cluster = folder / "alone", folder / "cluster"
    if not cluster.exists():
        commands.choose_faces(faces, folder / "faces", per_class)
        commands.succeed(alone, ("data", "index", "folder", str(folder / "faces"), "--name", "faces"))
        shutil.copytree(alone, cluster)
    for command in (commands.EXTRACT, TRAIN):
        commands.succeed(alone, (*command, "--num-cpus", "2"))

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with Nodes(folder / "nodes", 2, port) as nodes:
        job = submit(nodes, cluster, commands.EXTRACT)
        wait_for(job, cluster, commands.RECEIPTS)
        nodes.kill("node1")
        click.echo(f"A node was killed after {len(list(cluster.glob(commands.RECEIPTS)))} shards.")
        finish(job, alone, cluster, commands.STORES)
        nodes.start("node1")
        nodes.wait_for("node1", "(Ray runtime started)")

        job = submit(nodes, cluster, (*TRAIN, "--scale-minutes", "10"))
        wait_for(job, cluster, commands.EPOCHS)
        workers = [process for process in nodes.processes() if TRAINING in " ".join(process.cmdline())]
        workers[-1].kill()
        click.echo(f"One of {len(workers)} workers was killed after {len(list(cluster.glob(commands.EPOCHS)))} epochs.")
        finish(job, alone, cluster, commands.RUNS)


def submit(nodes: Nodes, workspace: Path, command: tuple[str, ...]) -> subprocess.Popen[bytes]:
    """Submit a command as a job that brings its code along."""
    code = json.dumps({"py_modules": [str(ROOT / name) for name in ("cafe", "pipeline", "jobs")]})
    ray = str(Path(sys.executable).with_name("ray"))
    words = [ray, "job", "submit", "--address", f"http://127.0.0.1:{nodes.dashboard}", "--runtime-env-json", code, "--"]
    words += [sys.executable, "-m", "cafe.jobs.cli", "--workspace", str(workspace), *command, "--address", "auto"]
    with (workspace.parent / "job.log").open("wb") as log:
        return subprocess.Popen(words, env=nodes.environment, stdout=log, stderr=log, cwd="/")


def wait_for(job: subprocess.Popen[bytes], workspace: Path, pattern: str) -> None:
    """Wait for the first file of a pattern."""
    while not list(workspace.glob(pattern)):
        if job.poll() is not None:
            sys.exit(f"The job has ended: {(workspace.parent / 'job.log').read_text()}")
        time.sleep(commands.POLL)


def finish(job: subprocess.Popen[bytes], alone: Path, workspace: Path, patterns: tuple[str, ...]) -> None:
    """Wait until a job has succeeded, and compare what it made with what one machine made alone."""
    if code := job.wait():
        sys.exit(f"The job ended with {code}: {(workspace.parent / 'job.log').read_text()}")
    if commands.compare(alone, workspace, patterns):
        sys.exit(1)


if __name__ == "__main__":
    main()
