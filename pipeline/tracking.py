"""MLflow as a window on the workspace: the one file that imports it.

A `Mirror` brings a tracking server to what run folders say, as often as one likes; no number is ever read back from it.
A server that is down stops nothing: the mirror says so at the end, and `cafe mlflow sync` completes it later.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from threading import RLock
from typing import Any

import pandas as pd
from upath import UPath

from cafe.errors import UserError, unknown
from cafe.files import list_folder, read_json, write_file, write_json
from cafe.results.metrics import METRICS
from cafe.results.protocols import PROTOCOLS, find_protocol
from cafe.results.scores import PULLED, SOURCE, Run, average_all, average_unseen, read_run, read_scores
from pipeline.workspace import Workspace

PARENT = "mlflow.parentRunId"
MIRRORED = "cafe.mirrored"  # a tag: the digest of what the server was last brought to
SLEEP = 60.0  # seconds until a server that was down is asked again


@dataclass(frozen=True)
class Page:
    """What MLflow shall show of one run or benchmark."""

    name: str
    status: str
    params: Mapping[str, Any]
    points: Mapping[tuple[str, int], float]  # by metric and step
    tags: Mapping[str, str]
    files: Mapping[str, UPath]  # by artifact
    inputs: tuple[tuple[str, str, str], ...] = ()  # context, name and digest of each data set
    parent: str | None = None  # the benchmark it belongs to

    @cached_property
    def digest(self) -> str:
        """Names all that is shown."""
        points = [[name, step, value] for (name, step), value in sorted(self.points.items())]
        files = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in self.files.items()}
        rest = [self.status, self.params, points, self.tags, files, self.inputs, self.parent]
        return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()[:32]


def describe_run(workspace: Workspace, run: Run, benchmark: str | None, status: str | None) -> Page:
    """Return what MLflow shall show of a run: its settings, epochs, scores, figures and predictions."""
    scores = read_scores([run], workspace.manifest_names())
    ended = read_json(run.folder / "status.json") or {}
    reason = ended.get("reason", "") if status in (None, ended.get("status")) else ""
    points = {
        (name, int(path.stem)): value
        for path in list_folder(run.folder / "epochs")
        for name, value in (read_json(path) or {}).items()
    }
    points |= {(name, 0): value for name, value in name_metrics(scores).items()}
    judged = [name for name in PROTOCOLS if (scores["protocol"] == name).any()]
    inputs = {("training", run.source, run.source_digest)}
    inputs |= {("evaluation", row.target, row.manifest) for row in scores.itertuples() if row.relation != SOURCE}
    files = {"run.json": run.folder / "run.json"}
    for folder in ("predictions", "figures"):
        paths = (path for path in (run.folder / folder).glob("**/*") if path.suffix in (".parquet", ".png"))
        files |= {_artifact(path.relative_to(run.folder)): path for path in sorted(paths)}
    tags = {"cafe.group": run.group, "cafe.protocols": ", ".join(judged), "cafe.reason": reason}
    if "code" in run.derived:
        tags["mlflow.source.git.commit"] = run.derived["code"]
    status = status or ended.get("status", "RUNNING")
    params = {**run.settings, **run.derived}
    return Page(run.name, status, params, points, tags, files, tuple(sorted(inputs)), benchmark)


def _artifact(path: Any) -> str:
    """Name a file of a run as an artifact: figures lie at the top, by their kind."""
    return str(path).removeprefix("figures/")


def describe_benchmark(folder: UPath, status: str | None) -> Page:
    """Return what MLflow shall show of a benchmark: its file, how many of its cells failed, and how each ended."""
    files = {path.name: path for path in list_folder(folder) if path.suffix == ".json"}
    cells = json.loads(files["cells.json"].read_bytes()) if "cells.json" in files else []
    failed = sum(bool(cell["failure"]) for cell in cells)
    points = {("cells", 0): float(len(cells)), ("cells_failed", 0): float(failed)}
    record = read_json(folder / "benchmark.json") or {}
    params = {
        name: value if isinstance(value, str | int | float) else json.dumps(value) for name, value in record.items()
    }
    status = status or ("FAILED" if failed else "FINISHED" if cells else "RUNNING")
    return Page(folder.name, status, params, points, {"cafe.benchmark": folder.name}, files)


def name_metrics(scores: pd.DataFrame) -> dict[str, float]:
    """Return one run's scores by the names of MLflow's metrics: target/TARGET/METRIC, unseen/METRIC and all/METRIC.

    Those of another protocol than `clean` have its name in front, and `target@split` becomes `target:split`.
    """
    named: dict[str, float] = {}
    for record in scores.to_dict("records"):
        prefix = f"{find_protocol(record['protocol']).prefix}target/{record['target'].replace('@', ':')}"
        values = {name: value for name, value in record.items() if name in METRICS or name.startswith("recall/")}
        named |= {f"{prefix}/{name}": value for name, value in values.items() if not pd.isna(value)}
    for group, means in (("unseen", average_unseen(scores)), ("all", average_all(scores))):
        for (_, protocol), values in means.iterrows():
            prefix = f"{find_protocol(protocol).prefix}{group}"
            named |= {f"{prefix}/{name}": float(value) for name, value in values.items() if not pd.isna(value)}
    return named


@dataclass
class Mirror:
    """Brings what run folders say to a tracking server; `uri` defaults to `mlflow.db` in the workspace."""

    workspace: Workspace
    uri: str | None = None
    behind: set[str] = field(default_factory=set)  # runs the server does not show as they are
    _asleep_until: float = 0.0
    _shown: dict[tuple[str, str], str] = field(default_factory=dict)  # the digest of each page by experiment and name
    _lock: RLock = field(default_factory=RLock)

    @property
    def address(self) -> str:
        """Where the server is; raises `UserError` for a workspace that cannot hold a database."""
        return self.uri or default_uri(self.workspace)

    @property
    def warning(self) -> str:
        """What a command must say at its end: nothing, or that the server is behind and how to bring it up to date."""
        if not self.behind:
            return ""
        option = f" --mlflow-uri {self.uri}" if self.uri else ""
        return (
            f"MLflow at {self.address} does not show everything of {len(self.behind)} of the runs, as it could not be "
            f"reached; nothing is lost: bring it up to date with `cafe mlflow sync{option}`."
        )

    def update(self, folder: UPath, status: str | None = None) -> None:
        """Show a run as its folder says, in each of its experiments; do nothing when nothing changed.

        `status` is RUNNING, FINISHED, FAILED or KILLED, and by default that of the folder.
        """
        run = read_run(folder)
        if run is None:
            return
        for experiment, benchmark in run.experiments.items():
            self._show(experiment, describe_run(self.workspace, run, benchmark, status))

    def update_benchmark(self, folder: UPath, experiment: str, status: str | None = None) -> None:
        """Show a benchmark as its folder says, as the run above those of its cells."""
        self._show(experiment, describe_benchmark(folder, status))

    def update_all(self) -> int:
        """Show every run and benchmark of the workspace; return how many runs there are."""
        folders = [self.workspace.run_path(name) for name in self.workspace.run_names()]
        benchmarks = set()
        for folder in folders:
            self.update(folder)
            run = read_run(folder)
            benchmarks |= {(name, place) for place, name in run.experiments.items() if name} if run else set()
        for name, experiment in sorted(benchmarks):
            self.update_benchmark(self.workspace.root / "benchmarks" / name, experiment)
        return len(folders)

    def _show(self, experiment: str, page: Page) -> None:
        """Bring the server to a page; what goes wrong there is remembered and never raised."""
        with self._lock:
            if self._shown.get((experiment, page.name)) == page.digest:
                return
            self.behind.add(page.name)
            if time.monotonic() < self._asleep_until:
                return
            with quiet_mlflow() as mlflow:
                try:
                    client = mlflow.MlflowClient(self.address)
                    bring(client, self._find_experiment(client, experiment), page)
                except (mlflow.exceptions.MlflowException, OSError) as error:
                    logging.getLogger(__name__).info("MLflow at %s: %s", self.address, error)
                    self._asleep_until = time.monotonic() + SLEEP
                else:
                    self._shown[experiment, page.name] = page.digest
                    self.behind.discard(page.name)

    def _find_experiment(self, client: Any, name: str) -> str:
        found = client.get_experiment_by_name(name)
        if found is None:
            # A server chooses its own place for artifacts; the local database keeps them beside it.
            place = None if self.uri else (self.workspace.root / "artifacts").as_uri()
            return str(client.create_experiment(name, place))
        return str(found.experiment_id)

    def pull(self, experiment: str) -> list[UPath]:
        """Copy the runs of an experiment into the workspace's cache and return their folders; raise `UserError`.

        What the cache holds already, by digest, is not copied again; a run that is not mirrored completely is left out.
        """
        with quiet_mlflow() as mlflow:
            client = mlflow.MlflowClient(self.address)
            try:
                found = {place.name: place.experiment_id for place in client.search_experiments()}
                if experiment not in found:
                    raise unknown("experiment", experiment, found.keys() - {"Default"})
                runs = [run for run in list_runs(client, found[experiment]) if "cafe.group" in run.data.tags]
                return [self._pull_run(client, run, experiment) for run in runs if MIRRORED in run.data.tags]
            except (mlflow.exceptions.MlflowException, OSError) as error:
                reason = str(error).partition("\n")[0]
                raise UserError(f"MLflow at {self.address} cannot be read ({reason}): check --mlflow-uri.") from None

    def _pull_run(self, client: Any, run: Any, experiment: str) -> UPath:
        """Copy a run's description and predictions, unless the cache has them as they are."""
        run_id, name = run.info.run_id, run.info.run_name
        folder: UPath = self.workspace.root / "pulled" / run.data.tags[MIRRORED] / name
        if not (folder / PULLED).exists():
            folder.mkdir(parents=True, exist_ok=True)
            there = {entry.path for entry in client.list_artifacts(run_id)}
            with tempfile.TemporaryDirectory() as temporary:
                for part in sorted(there & {"run.json", "predictions"}):
                    client.download_artifacts(run_id, part, temporary)
                copy_folder(UPath(temporary), folder)
            write_json(folder / "experiments" / f"{experiment}.json", {"benchmark": None})
            write_json(folder / PULLED, {"uri": self.address, "run_id": run_id})  # last: the copy is whole
        return folder


def copy_folder(folder: UPath, place: UPath) -> None:
    """Copy all files of a folder, a run's description last: from then on the run is there."""
    files = {str(path.relative_to(folder)): path for path in folder.glob("**/*") if path.is_file()}
    for name in sorted(files, key=lambda name: name == "run.json"):
        write_file(place / name, files[name].read_bytes())


def bring(client: Any, experiment: str, page: Page) -> None:
    """Make the one run of a page's name in an experiment show the page: add what it lacks, and its status last."""
    tracked = find_run(client, experiment, page.name)
    family = {PARENT: find_run(client, experiment, page.parent).info.run_id} if page.parent else {}
    run_id, there = tracked.info.run_id, tracked.data.tags
    if there.get(MIRRORED) == page.digest and family.items() <= there.items():
        return
    log(client, tracked, page, {**page.tags, **family})
    log_inputs(client, tracked, page)
    log_files(client, tracked, page)
    if page.status == "RUNNING":
        client.update_run(run_id, page.status)
    elif page.status != tracked.info.status:
        client.set_terminated(run_id, page.status)
    client.set_tag(run_id, MIRRORED, page.digest)


def find_run(client: Any, experiment: str, name: str) -> Any:
    """Return the run of a name in an experiment, created when there is none."""
    found = client.search_runs([experiment], f"attributes.run_name = '{name}'", order_by=["attributes.start_time ASC"])
    return found[0] if found else client.create_run(experiment, run_name=name)


def list_runs(client: Any, experiment: str) -> list[Any]:
    """Return every run of an experiment, oldest first."""
    runs, page = [], client.search_runs([experiment], order_by=["attributes.start_time ASC"])
    while True:
        runs += list(page)
        if not page.token:
            return runs
        page = client.search_runs([experiment], order_by=["attributes.start_time ASC"], page_token=page.token)


def log(client: Any, tracked: Any, page: Page, tags: Mapping[str, str]) -> None:
    """Log the parameters, points of metrics and tags that are not there yet, in as few requests as MLflow takes."""
    from mlflow.entities import Metric, Param, RunTag

    run_id, data, now = tracked.info.run_id, tracked.data, int(time.time() * 1000)
    logged = {
        (name, point.step): point.value
        for name in {name for name, _ in page.points} & data.metrics.keys()
        for point in client.get_metric_history(run_id, name)
    }
    points = [
        Metric(name, value, now, step)
        for (name, step), value in page.points.items()
        if logged.get((name, step)) != value
    ]
    params = [Param(name, str(value)) for name, value in page.params.items() if name not in data.params]
    changed = [RunTag(name, value) for name, value in tags.items() if data.tags.get(name, "") != value]
    client.log_batch(run_id, points[:800], params, changed)
    for start in range(800, len(points), 800):
        client.log_batch(run_id, points[start : start + 800])


def log_inputs(client: Any, tracked: Any, page: Page) -> None:
    """Log the data sets of a run that are not there yet, by the name and the digest of their manifests."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    there = {(found.dataset.name, found.dataset.digest) for found in tracked.inputs.dataset_inputs}
    missing = [
        DatasetInput(Dataset(name, digest[:32], "local", name), [InputTag("mlflow.data.context", context)])
        for context, name, digest in page.inputs
        if (name, digest[:32]) not in there
    ]
    if missing:
        client.log_inputs(tracked.info.run_id, missing)


def log_files(client: Any, tracked: Any, page: Page) -> None:
    """Keep copies of the files as artifacts."""
    with tempfile.TemporaryDirectory() as temporary:
        for name, path in page.files.items():
            write_file(UPath(temporary) / name, path.read_bytes())
        client.log_artifacts(tracked.info.run_id, temporary)


def adopt_run(workspace: Workspace, folder: UPath) -> bool:
    """Copy a pulled run into the runs of a workspace; return whether it was not there yet."""
    place = workspace.run_path(folder.name)
    if (place / "run.json").exists():
        return False
    copy_folder(folder, place)
    return True


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
    with quiet_mlflow() as mlflow:
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
def quiet_mlflow() -> Iterator[Any]:
    """Import MLflow without its telemetry and without the log lines of making a database."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # its own five take minutes
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    import mlflow

    loggers = [logging.getLogger(name) for name in ("mlflow", "alembic")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    yield mlflow
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)
