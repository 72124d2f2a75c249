"""The one door to MLflow: runs with parameters, metrics and artifacts in the workspace's own database or on a server."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from upath import UPath

from cafe.errors import UserError
from pipeline.workspace import Workspace

PARENT = "mlflow.parentRunId"


@dataclass(frozen=True)
class TrackedRun:
    """A run as MLflow keeps it."""

    run_id: str
    name: str
    params: dict[str, str]
    metrics: dict[str, float]
    tags: dict[str, str]


class Tracker:
    """An experiment on a tracking server; `uri` defaults to `mlflow.db` in the workspace."""

    def __init__(self, workspace: Workspace, uri: str | None, experiment: str) -> None:
        self.uri = uri or default_uri(workspace)
        self.parent: str | None = None
        with _quiet_mlflow() as mlflow:
            self.client = mlflow.MlflowClient(tracking_uri=self.uri)
            found = self.client.get_experiment_by_name(experiment)
            if found is None:
                # A server chooses its own place for artifacts; the local database keeps them beside it.
                place = None if uri else (workspace.root / "artifacts").as_uri()
                self.experiment_id = self.client.create_experiment(experiment, artifact_location=place)
            else:
                self.experiment_id = found.experiment_id

    def below(self, parent: str) -> Tracker:
        """Return this tracker for the runs of a benchmark, which MLflow shows below the run `parent`."""
        child = copy(self)
        child.parent = parent
        return child

    def start(self, name: str, params: Mapping[str, Any], tags: Mapping[str, str]) -> str:
        """Return the MLflow id of the run of that name, created with its parameters when it is new."""
        family = {PARENT: self.parent} if self.parent else {}
        found = self._search(f"attributes.run_name = '{name}'")
        if found:
            self.client.update_run(found[0].info.run_id, "RUNNING")
            for key, value in family.items():
                self.tag(found[0].info.run_id, key, value)
            return str(found[0].info.run_id)
        run = self.client.create_run(self.experiment_id, run_name=name, tags={**tags, **family})
        for key, value in params.items():
            self.client.log_param(run.info.run_id, key, value)
        return str(run.info.run_id)

    def log(self, run_id: str, metrics: Mapping[str, float], step: int = 0) -> None:
        """Log metrics of a step, all in one transaction."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self.client.log_batch(run_id, [Metric(name, value, now, step) for name, value in metrics.items()])

    def tag(self, run_id: str, name: str, value: str) -> None:
        """Set a tag of a run."""
        self.client.set_tag(run_id, name, value)

    def logged_steps(self, run_id: str, metric: str) -> set[int]:
        """The steps a metric was already logged for."""
        return {point.step for point in self.client.get_metric_history(run_id, metric)}

    def log_file(self, run_id: str, path: UPath, folder: str) -> None:
        """Keep a copy of a file as an artifact."""
        with TemporaryDirectory() as temporary:
            copy = Path(temporary) / path.name
            copy.write_bytes(path.read_bytes())
            self.client.log_artifact(run_id, str(copy), folder)

    def log_text(self, run_id: str, text: str, name: str) -> None:
        """Keep a text as an artifact."""
        self.client.log_text(run_id, text, name)

    def finish(self, run_id: str, status: str = "FINISHED") -> None:
        """Close a run as FINISHED, FAILED or KILLED."""
        self.client.set_terminated(run_id, status)

    def runs(self) -> list[TrackedRun]:
        """Every run of the experiment, oldest first."""
        return [
            TrackedRun(run.info.run_id, run.info.run_name, run.data.params, run.data.metrics, run.data.tags)
            for run in self._search("")
        ]

    def _search(self, query: str) -> list[Any]:
        pages, token = [], None
        while True:
            page = self.client.search_runs(
                [self.experiment_id], query, order_by=["attributes.start_time ASC"], page_token=token
            )
            pages += list(page)
            token = page.token
            if not token:
                return pages


def default_uri(workspace: Workspace) -> str:
    """Return the database of a local workspace, absolute because workers run elsewhere; raise `UserError` for a URI."""
    if not workspace.local:
        raise UserError(f"A workspace at {workspace.root} cannot hold MLflow's database: give --mlflow-uri.")
    workspace.root.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{workspace.root}/mlflow.db"


def serve(workspace: Workspace, port: int, announce: Callable[[str, dict[str, str]], None]) -> None:
    """Run MLflow's server for a workspace on loopback until it is interrupted.

    As soon as it answers, its address and that of every experiment's runs by name are announced; MLflow's own front page
    leads to pages about language models. Raises `UserError` when the port is taken.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            raise UserError(f"Port {port} is taken: give another one with --port.") from None
    database, artifacts = default_uri(workspace), (workspace.root / "artifacts").as_uri()
    address = f"http://127.0.0.1:{port}"
    with _quiet_mlflow() as mlflow:
        runs = {
            found.name: f"{address}/#/experiments/{found.experiment_id}/runs?workflowType=machine_learning"
            for found in mlflow.MlflowClient(tracking_uri=database).search_experiments()
            if found.name != mlflow.entities.Experiment.DEFAULT_EXPERIMENT_NAME
        }
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", database]
    command += ["--default-artifact-root", artifacts, "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # however this command ends, the server ends with it
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            while not _answers(port):
                if server.poll() is not None:
                    raise UserError(f"MLflow's server ended with exit code {server.returncode} before it answered.")
                time.sleep(0.1)
            announce(address, runs)
            server.wait()
        except KeyboardInterrupt:
            server.terminate()


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def _quiet_mlflow() -> Iterator[Any]:
    """Import MLflow without its telemetry and without the log lines of making a database."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    import mlflow

    loggers = [logging.getLogger(name) for name in ("mlflow", "alembic")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    yield mlflow
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)
