"""A Ray cluster on this machine: a head without cores, and nodes of one core each that can be killed and come back.

Its token keeps all others out, as it should on every cluster that more than this machine can reach.
"""

from __future__ import annotations

import os
import re
import secrets
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Self

import psutil

START_SECONDS = 600.0
TRIES = 5  # to start a node, whose first handshake may take too long on a busy machine


class Nodes:
    """The head, with a dashboard where a port is given, and the nodes: groups of processes with logs in `folder`."""

    def __init__(self, folder: Path, nodes: int, dashboard: int = 0) -> None:
        folder.mkdir(parents=True)
        self.folder, self.count, self.dashboard, self.address = folder, nodes, dashboard, ""
        self.token = secrets.token_hex(32)
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def environment(self) -> dict[str, str]:
        """What a command needs in order to be let in."""
        return {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}

    def processes(self) -> list[psutil.Process]:
        """Return what runs on the nodes."""
        nodes = [psutil.Process(node.pid) for name, node in self.running.items() if name != "head"]
        return [process for node in nodes for process in node.children(recursive=True)]

    def __enter__(self) -> Self:
        try:
            self.start("head")
            self.address = self.wait_for("head", r"--address='([^']+)'")
            for number in range(self.count):
                self.start(f"node{number}")
                self.wait_for(f"node{number}", "(Ray runtime started)")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for name in reversed(list(self.running)):
            self.kill(name)

    def start(self, name: str) -> None:
        """Start the head or a node, without waiting until it is there."""
        if name == "head":
            dashboard = (f"--include-dashboard={bool(self.dashboard)}", f"--dashboard-port={self.dashboard}")
            self._start(name, "--head", "--port=0", "--num-cpus=0", *dashboard)
        else:
            self._start(name, f"--address={self.address}", "--num-cpus=1")

    def kill(self, name: str) -> None:
        """Kill a node with -9, as if its machine were gone."""
        node = self.running.pop(name)
        with suppress(ProcessLookupError):
            os.killpg(node.pid, signal.SIGKILL)
        node.wait()

    def revive(self) -> None:
        """Start nodes again that have given up, as one does whose first handshake takes too long on a busy machine."""
        for name, node in list(self.running.items()):
            if node.poll() is not None and (name != "head" or not self.address):
                self.start(name)

    def wait_for(self, name: str, pattern: str) -> str:
        """Return the first group of a pattern as soon as a node's log has it."""
        deadline, tries = time.monotonic() + START_SECONDS, 1
        while not (found := re.search(pattern, (self.folder / f"{name}.log").read_text())):
            tries += self.running[name].poll() is not None
            if time.monotonic() > deadline or tries > TRIES:
                sys.exit(f"{name} does not start: {(self.folder / f'{name}.log').read_text()}")
            self.revive()
            time.sleep(0.1)
        return found[1]

    def _start(self, name: str, *arguments: str) -> None:
        ray = str(Path(sys.executable).with_name("ray"))
        command = [ray, "start", *arguments, "--object-store-memory=200000000", "--disable-usage-stats", "--block"]
        with (self.folder / f"{name}.log").open("wb") as log:
            self.running[name] = subprocess.Popen(
                command, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )
