"""MLflow as a window on the workspace: the one file that imports it.

A `Mirror` brings a tracking server to what run folders say, as often as one likes; no number is ever read back from it.
A server that is down stops nothing: the mirror says so at the end, and `cafe mlflow sync` completes it later.
"""

from __future__ import annotations

import logging
import math
import os
import re
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from threading import RLock
from typing import Any

from upath import UPath

from cafe.errors import UserError, quote, unknown
from cafe.files import list_files, place_below, write_file, write_json
from cafe.pipeline.process.command import hide_secrets
from cafe.pipeline.runs import check_identity
from cafe.pipeline.tracking import pages
from cafe.pipeline.tracking.database import (
    address_of,
    check_database,
    check_uri,
    draft_database,
    has_tag,
    move_artifacts,
)
from cafe.pipeline.tracking.pages import BENCHMARK, NOTE, ROW, Page, name_rows_of
from cafe.pipeline.tracking.places import check_place, check_repository
from cafe.pipeline.workspace import Workspace, check_name
from cafe.results.runs import PULLED, Run, read_run

PARENT = "mlflow.parentRunId"
MIRRORED = "cafe.mirrored"  # a tag: the digest of what the page was made of that a run shows
SHARED = "cafe"  # the name of the view of an experiment's runs, in the address of MLflow's page
VIEW = f"mlflow.sharedViewState.{SHARED}"  # a tag of an experiment: that view, as the page keeps it
UNNAMED = "Default"  # the experiment every server has
KIND = {"mlflow.experimentKind": "custom_model_development"}  # else its pages are those of language models
SCORE = re.compile("(^|/)(target|unseen|all)/")  # in the name of a metric that is computed from predictions
LONGEST = 6000  # characters of a parameter that MLflow takes
SLEEP = 60.0  # seconds until a server that was down is asked again


@dataclass
class Mirror:
    """Brings what run folders say to a tracking server; `uri` defaults to `mlflow.db` in the workspace."""

    workspace: Workspace
    uri: str | None = None
    behind: set[str] = field(default_factory=set)  # runs the server does not show as they are
    _reason: str = ""  # why it does not, the last one
    _asleep_until: float = 0.0
    _shown: dict[tuple[str, str], str] = field(default_factory=dict)  # the digest of each page, by experiment and name
    _settled: bool = False  # whether runs are known to keep their files in this workspace
    _brought: set[str] = field(default_factory=set)  # experiments with pages that were brought
    _lock: RLock = field(default_factory=RLock)

    def __post_init__(self) -> None:
        """Raise `UserError` for an address that MLflow cannot use; a server that is down may come back."""
        self.workspace = self.workspace.keeping_manifests()  # which every look at a training needs
        if self.uri:
            check_uri(self.uri)

    @property
    def address(self) -> str:
        """Where the server is; raises `UserError` for a workspace that cannot hold a database."""
        return self.uri or default_uri(self.workspace)

    @property
    def shown_address(self) -> str:
        """The same without a password, for what is printed or kept."""
        return hide_secrets(self.address)

    def check_address(self) -> None:
        """Raise `UserError` for a workspace that cannot hold a database, where no server is named."""
        if not self.uri:
            default_uri(self.workspace)

    @property
    def warning(self) -> str:
        """What a command must say at its end: nothing, or that the server is behind and how to bring it up to date."""
        if not self.behind:
            return ""
        option = f" --mlflow-uri {self.shown_address}" if self.uri else ""
        own = "" if self.uri else f"; if it fails again, move {database_path(self.workspace)} away before"
        return (
            f"MLflow at {self.shown_address} does not show everything of {len(self.behind)} of the runs "
            f"({self._reason}); nothing is lost: bring it up to date with `cafe mlflow sync{option}`{own}."
        )

    def update(self, folder: UPath, status: str | None = None) -> Run | None:
        """Show a run as its folder says, in each of its experiments, and return it; do nothing when nothing changed.

        `status` is RUNNING, FINISHED, FAILED or KILLED, and by default that of the folder.
        """
        run = None
        with self._surviving(folder.name):
            run = read_run(folder)
            if run is None or not run.experiments:
                return run
            manifests = self.workspace.manifest_digests()
            state = pages.digest_run(manifests, folder)
            for experiment, benchmark in run.experiments.items():
                describe = partial(pages.describe_run, self.workspace, manifests, run, benchmark, status)
                self._show(experiment, run.name, pages.digest_of(state, benchmark, status), describe)
        return run

    def update_benchmark(self, folder: UPath, experiment: str, status: str | None = None) -> None:
        """Show a benchmark as its folder says, as the run above those of its cells."""
        with self._surviving(folder.name):
            digest = pages.digest_of(pages.digest_benchmark(folder), status)
            self._show(experiment, folder.name, digest, lambda: pages.describe_benchmark(folder, status))
            self._arrange_brought()

    def update_all(self) -> int:
        """Show every run and benchmark of the workspace; return how many runs there are."""
        runs = self.workspace.read_runs()
        belongs = [entry for run in runs for entry in run.experiments.items()]
        for experiment, name in sorted({(experiment, name) for experiment, name in belongs if name}):
            self.update_benchmark(place_below(self.workspace.root / "benchmarks", name), experiment)
        for run in runs:
            self.update(run.folder)
        with self._surviving(""):
            self._arrange_brought()
        return len(runs)

    def _arrange_brought(self) -> None:
        """Put the runs of the experiments that were brought into the rows of a comparison."""
        with self._lock:
            if not self._brought:
                return
            known = self.workspace.read_runs()
            with quiet_mlflow() as mlflow:
                client = mlflow.MlflowClient(self.address)
                for experiment in sorted(self._brought):
                    arrange(client, client.get_experiment_by_name(experiment), known)
            self._brought.clear()

    @contextmanager
    def monitoring(self, folder: UPath) -> Iterator[None]:
        """Log the load of this machine's processors, memory, disk and GPUs beside a run, while it works on it.

        That is in MLflow alone: it depends on what else the machine does, so that no record of the run holds it.
        """
        monitor = None
        with self._surviving(folder.name):
            run = self.update(folder, "RUNNING")
            with quiet_mlflow() as mlflow:
                from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

                client = mlflow.MlflowClient(self.address)
                place = client.get_experiment_by_name(min(run.experiments)) if run else None
                if run and place:
                    run_id = find_run(client, place.experiment_id, run.name).info.run_id
                    monitor = SystemMetricsMonitor(run_id, resume_logging=True, tracking_uri=self.address)
                    monitor.start()
        try:
            yield
        finally:
            if monitor:
                with self._surviving(folder.name):
                    monitor.finish()

    def _show(self, experiment: str, name: str, digest: str, describe: Callable[[], Page]) -> None:
        """Bring the server to the page of a name, unless it shows that of the digest."""
        with self._lock:
            if not self.uri and not self._settled:
                move_artifacts(database_path(self.workspace), self._artifacts)
                self._settled = True
            if self._shown.get((experiment, name)) == digest or self._has(experiment, name, digest):
                return
            self.behind.add(name)
            if time.monotonic() < self._asleep_until:
                return
            with quiet_mlflow() as mlflow:
                page = describe()
                try:
                    self._make_database()
                    client = mlflow.MlflowClient(self.address)
                    bring(client, self._find_experiment(client, experiment, page.about), page, digest)
                    self._brought.add(experiment)
                except Exception:
                    self._asleep_until = time.monotonic() + SLEEP
                    raise
                self._shown[experiment, name] = digest
                self.behind.discard(name)

    @contextmanager
    def _surviving(self, name: str) -> Iterator[None]:
        """Note what goes wrong with the page of a name, to be said at the end: it never ends a training.

        Whatever MLflow, its database and the files of others in a run's folder raise: none of it is the run's result.
        """
        try:
            yield
        except Exception as error:
            logging.getLogger(__name__).info("MLflow does not show %s", name, exc_info=error)
            self.behind.add(name)
            self._reason = hide_secrets(quote(error))

    def _make_database(self) -> None:
        """Make the workspace's own database, unless it is there; raise `UserError` for what is no database."""
        if self.uri:
            return
        path = database_path(self.workspace)
        check_database(path)
        if not path.exists():
            content = empty_database()
            with draft_database(path) as draft:
                draft.write_bytes(content)

    @property
    def _artifacts(self) -> str:
        """Where runs of the workspace's own database keep their files."""
        return str((self.workspace.root / "artifacts").as_uri())

    def _has(self, experiment: str, name: str, digest: str) -> bool:
        """Whether the workspace's own database shows a page already; another server is always asked."""
        path = None if self.uri else database_path(self.workspace)
        return path is not None and has_tag(path, experiment, name, MIRRORED, digest)

    def _find_experiment(self, client: Any, name: str, about: str = "") -> str:
        """Return the id of an experiment, made where there is none; describe it, unless somebody else did."""
        found, note = client.get_experiment_by_name(name), pages.describe_experiment(name, about)
        if found is None:
            # A server chooses its own place for artifacts; the local database keeps them beside it.
            place = None if self.uri else self._artifacts
            return str(client.create_experiment(name, place, {**KIND, NOTE: note}))
        there = found.tags.get(NOTE, "")
        if there == "" or (about and there == pages.describe_experiment(name)):
            client.set_experiment_tag(found.experiment_id, NOTE, note)
        return str(found.experiment_id)

    @contextmanager
    def as_default(self, mlflow: Any) -> Iterator[None]:
        """Make this server the one that MLflow's functions without an address talk to."""
        before = mlflow.get_tracking_uri()
        mlflow.set_tracking_uri(self.address)
        try:
            yield
        finally:
            mlflow.set_tracking_uri(before)

    def fetch_model(self, uri: str) -> UPath:
        """Copy an exported run that MLflow holds, `models:/NAME/VERSION`, to the cache and return it; raise `UserError`."""
        if not self.uri and self.workspace.local and not database_path(self.workspace).exists():
            raise UserError(
                f"There is no model {uri}: {self.workspace.root} has no database of MLflow's; check --workspace."
            )
        folder = place_below(self.workspace.root / "pulled" / "models", re.sub(r"[^A-Za-z0-9.-]+", "-", uri))
        with quiet_mlflow() as mlflow, self.as_default(mlflow):
            from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

            try:
                check_repository(self.address, get_artifact_repository(uri))
                place = mlflow.artifacts.download_artifacts(uri, dst_path=str(folder))
            except (mlflow.exceptions.MlflowException, OSError) as error:
                raise UserError(
                    f"MLflow at {self.shown_address} has no model {uri} ({hide_secrets(quote(error))}): check its name."
                ) from None
        found = next(iter((UPath(place) / "data").glob("*/run.json")), None)  # MLflow keeps the name of what was logged
        if found is None:
            raise UserError(f"The model {uri} was not exported by cafe: give one that `cafe export --register` made.")
        return found.parent

    def pull(self, experiment: str) -> list[UPath]:
        """Copy the runs of an experiment into the workspace's cache and return their folders; raise `UserError`.

        What the cache holds already, by digest, is not copied again; a run that is not mirrored completely is left out.
        """
        with quiet_mlflow() as mlflow:
            client = mlflow.MlflowClient(self.address)
            try:
                found = {place.name: place.experiment_id for place in client.search_experiments()}
                if experiment not in found:
                    raise unknown("experiment", experiment, found.keys() - {UNNAMED})
                runs = client.search_runs([found[experiment]], max_results=50_000)
                whole = [run for run in runs if {"cafe.group", MIRRORED} <= run.data.tags.keys()]
                pulled = [self._pull_run(client, run, check_name(experiment)) for run in whole]
            except (mlflow.exceptions.MlflowException, OSError) as error:
                raise UserError(
                    f"MLflow at {self.shown_address} cannot be read ({hide_secrets(quote(error))}): check --mlflow-uri."
                ) from None
        return [folder for folder in pulled if _is_itself(folder)]

    def _pull_run(self, client: Any, run: Any, experiment: str) -> UPath:
        """Copy a run's description and predictions, unless the cache has them as they are."""
        run_id, names = run.info.run_id, (run.data.tags[MIRRORED], run.info.run_name)
        folder = place_below(self.workspace.root / "pulled", "/".join(names))  # a union's has `+`, which no name has
        if not (folder / PULLED).exists():
            check_place(self.address, run.info.artifact_uri)
            folder.mkdir(parents=True, exist_ok=True)
            there = {entry.path for entry in client.list_artifacts(run_id)}
            with tempfile.TemporaryDirectory() as temporary:
                for part in sorted(there & {"run.json", "predictions"}):
                    client.download_artifacts(run_id, part, temporary)
                copy_folder(UPath(temporary), folder)
            write_json(place_below(folder / "experiments", f"{check_name(experiment)}.json"), {"benchmark": None})
            write_json(folder / PULLED, {"uri": self.shown_address, "run_id": run_id})  # last: the copy is whole
        return folder


def _is_itself(folder: UPath) -> bool:
    """Whether a pulled run can be read and is what its name says; else a warning names it."""
    try:
        read_run(folder)
        check_identity(folder)
    except UserError as error:
        logging.getLogger(__name__).warning("A run of the server is left out: %s", error)
        return False
    return True


def copy_folder(folder: UPath, place: UPath) -> None:
    """Copy all files of a folder, a run's description last: from then on the run is there."""
    files = {str(path.relative_to(folder)): path for path in list_files(folder)}
    for name in sorted(files, key=lambda name: name == "run.json"):
        write_file(place_below(place, name), files[name].read_bytes())


def bring(client: Any, experiment: str, page: Page, digest: str) -> None:
    """Make the one run of a page's name in an experiment show the page: add what it lacks, and its digest last."""
    tracked = find_run(client, experiment, page.name, page.started)
    family = {PARENT: find_run(client, experiment, page.parent).info.run_id} if page.parent else {}
    run_id, there = tracked.info.run_id, tracked.data.tags
    if there.get(MIRRORED) == digest and family.items() <= there.items():
        return
    log(client, tracked, page, {**page.tags, **family})
    log_inputs(client, tracked, page)
    log_files(client, tracked, page)
    if page.status == "RUNNING":
        client.update_run(run_id, page.status)
    elif page.status != tracked.info.status or page.ended not in (None, tracked.info.end_time):
        client.set_terminated(run_id, page.status, page.ended)
    client.set_tag(run_id, MIRRORED, digest)


def find_run(client: Any, experiment: str, name: str, started: int | None = None) -> Any:
    """Return the run of a name in an experiment, created when there is none; from then on its start stays as it is."""
    found = client.search_runs([experiment], f"attributes.run_name = '{name}'", order_by=["attributes.start_time ASC"])
    return found[0] if found else client.create_run(experiment, started, run_name=name)


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
    # What was left out since cannot be taken back: from now on it is no number.
    shown = {name for name, _ in page.points}
    points += [
        Metric(name, math.nan, now, 0)
        for name, value in data.metrics.items()
        if SCORE.search(name) and name not in shown and not math.isnan(value)
    ]
    params = [Param(name, str(value)[:LONGEST]) for name, value in page.params.items() if name not in data.params]
    changed = [RunTag(name, value) for name, value in tags.items() if data.tags.get(name, "") != value]
    client.log_batch(run_id, points[:800], params, changed)
    for start in range(800, len(points), 800):
        client.log_batch(run_id, points[start : start + 800])


def log_inputs(client: Any, tracked: Any, page: Page) -> None:
    """Log the data sets of a run that are not there yet, by the name and the digest of their manifests."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    there = {(found.dataset.name, found.dataset.digest) for found in tracked.inputs.dataset_inputs}
    missing = [
        DatasetInput(
            Dataset(found.name, found.digest, "local", found.source, profile=found.profile),
            [InputTag("mlflow.data.context", found.context)],
        )
        for found in page.inputs
        if (found.name, found.digest) not in there
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
    return address_of(database_path(workspace))


def database_path(workspace: Workspace) -> Path:
    """Return where a local workspace keeps MLflow's database."""
    return Path(f"{workspace.root}/mlflow.db")


@cache
def empty_database() -> bytes:
    """Return a database as MLflow makes it of nothing: dozens of migrations, a second, which a process pays for once."""
    with (
        quiet_mlflow() as mlflow,
        tempfile.TemporaryDirectory() as folder,
        draft_database(Path(folder, "mlflow.db")) as draft,
    ):
        mlflow.MlflowClient(address_of(draft)).search_experiments()
        with closing(sqlite3.connect(draft)) as made:
            return made.serialize()


def list_experiments(workspace: Workspace) -> dict[str, str]:
    """Return the id of every experiment in a workspace's own database by its name.

    The tag `ROW`, by which its runs can be grouped, depends on what else is in an experiment and is brought up to date here.
    """
    known = workspace.read_runs()
    check_database(database_path(workspace))
    with quiet_mlflow() as mlflow:
        client = mlflow.MlflowClient(default_uri(workspace))
        found = [place for place in client.search_experiments() if place.name != UNNAMED]
        for place in found:
            arrange(client, place, known)
        return {place.name: place.experiment_id for place in found}


def arrange(client: Any, place: Any, known: Sequence[Run]) -> None:
    """Tag the runs of an experiment with their rows in a comparison, and keep the view of them that shows these rows."""
    runs = client.search_runs([place.experiment_id], max_results=50_000)
    rows = name_rows_of([run for run in known if place.name in run.experiments])
    rows |= {run.info.run_name: BENCHMARK for run in runs if "cafe.benchmark" in run.data.tags}
    for run in runs:
        row = rows.get(run.info.run_name, "")
        if run.data.tags.get(ROW, "") != row:
            client.set_tag(run.info.run_id, ROW, row)
    view = pages.describe_view({name for run in runs for name in run.data.metrics})
    if place.tags.get(VIEW) != view:
        client.set_experiment_tag(place.experiment_id, VIEW, view)


@contextmanager
def quiet_mlflow() -> Iterator[Any]:
    """Import MLflow without its telemetry and without the log lines of making a database."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # its own five take minutes
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    import mlflow

    loggers = [logging.getLogger(name) for name in ("mlflow", "alembic")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield mlflow
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
