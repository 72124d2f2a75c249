"""`cafe compare`, `cafe report`, `cafe ui`, `cafe mlflow`: what came out, from the run folders, and the tracking server."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import click

from cafe.errors import IncompleteError, UserError
from cafe.jobs.names import complete
from cafe.jobs.options import options
from cafe.jobs.tables import sheet_tables
from cafe.jobs.terminal import (
    Commands,
    echo,
    json_option,
    open_workspace,
    progress_bar,
    say,
    show,
    show_json,
)
from cafe.report import MISTAKES, ReportSettings

if TYPE_CHECKING:
    from cafe.pipeline.workspace import Workspace
    from cafe.report.report import Report
    from cafe.results.runs import Chosen, Run

WHOLE = "--json or --csv FILE"  # what besides --wide holds every number of a comparison
URI_HELP = "MLflow tracking server; default: the workspace's own database."


class MetricsOption(click.Option):
    """An option whose help names the metrics there are, which take a while to import."""

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """Return the option and its help."""
        from cafe.results.metrics import METRICS

        self.help = f"A table of each: {', '.join(METRICS)}; or all."
        return super().get_help_record(ctx)


metrics_option = click.option(
    "--metrics",
    cls=MetricsOption,
    metavar="NAME,…",
    default="accuracy",
    show_default=True,
    shell_complete=complete("metric"),
)


@click.command()
@metrics_option
@click.option(
    "--per-class",
    metavar="TARGET",
    help="Accuracy per expression on one target instead.",
    shell_complete=complete("manifest"),
)
@options(ReportSettings)
@click.option("--markdown", metavar="FILE", help="Write it as Markdown too.")
@click.option("--latex", metavar="FILE", help="Write its tables for LaTeX (booktabs).")
@click.option("--csv", metavar="FILE", help="Write the numbers: a line per row and target.")
@json_option
@click.option("--experiment", help="Only the runs of this experiment.", shell_complete=complete("experiment"))
@click.option(
    "--best", type=click.Choice(["source_val"]), help="Say which run to ship, by held-out faces of its source."
)
@click.option("--mlflow-uri", help="Compare the runs of this MLflow server instead of the workspace's.")
def compare(
    metrics: str,
    per_class: str | None,
    markdown: str | None,
    latex: str | None,
    csv: str | None,
    as_json: bool,
    experiment: str | None,
    best: str | None,
    mlflow_uri: str | None,
    **values: Any,
) -> None:
    """Compare runs: methods × targets, with intervals.

    \b
    cafe compare --versus cafe --markdown comparison.md
    cafe compare --metrics accuracy,auroc,nll,aurc
    cafe compare --by sex                     # a column that was kept: cafe data index … --column keep=sex
    cafe compare --mlflow-uri http://tracking:5000 --experiment table1

    A number is the mean over seeds ± its 95 % interval. Everything is computed from the runs' predictions, evaluated by one
    protocol. Published numbers stand beside ours where a data set is evaluated as it was in the paper.
    """
    from cafe.files import check_output, locate, write_whole
    from cafe.outputs import check_replaced
    from cafe.report.formats import FORMATS, OWN
    from cafe.results.scores import describe_left_out

    files = {"markdown": markdown, "latex": latex, "csv": csv}
    for name, file in files.items():
        if file:
            check_replaced(check_output(file, f"--{name}"), f"--{name}", OWN[name])
    workspace = open_workspace()
    chosen = choose_runs(workspace, experiment, mlflow_uri)
    ship = [_say_best(chosen.runs, experiment, best)] if best else []
    report = report_runs(workspace, chosen, ReportSettings(**values), metrics, per_class)
    show_report(report, as_json)
    for sentence in ship:
        echo(sentence)
    for name, file in files.items():
        if file:
            with write_whole(locate(file)) as output:
                output.write(FORMATS[name](report).encode())
            say(f"Wrote {file}")
    if csv and not as_json:  # the file has no place for it
        for line in describe_left_out(report.left_out):
            echo(line, err=True)


def _say_best(runs: list[Run], experiment: str | None, best: str) -> str:
    from cafe.results.runs import choose

    if any(run.pulled for run in runs):
        raise UserError(
            "--best reads the epochs of runs, which a tracking server's copies lack: leave --mlflow-uri out."
        )
    (run,), reason = choose(runs, experiment, best=best)
    return f"To ship: {reason}; no target's score was looked at: cafe export {run.name}"


def show_report(report: Report, as_json: bool = False) -> None:
    """Print every table with its notes, or in JSON a record for every cell, as in the CSV file, and what was left out."""
    from cafe.report.report import list_records

    if as_json:
        verdicts = [verdict.text for verdict in report.verdicts]
        left_out = list(map(str, report.left_out))
        show_json({"cells": list(list_records(report)), "left_out": left_out, "verdicts": verdicts})
        return
    for verdict in report.verdicts:
        show(verdict.text)
    for table in (*sheet_tables(report.sheets, WHOLE), *report.about):
        show(table)


def report_runs(
    workspace: Workspace,
    chosen: Chosen,
    settings: ReportSettings | None = None,
    metrics: str = "accuracy",
    per_class: str | None = None,
) -> Report:
    """Return the report of chosen runs of a workspace, as `make_report` makes it; raise `UserError`."""
    from cafe.report.report import make_report

    about = [f"{chosen.reason}."] if chosen.reason else []
    known = workspace.manifest_digests()
    return make_report(
        chosen.runs,
        known,
        settings,
        metrics=metrics,
        per_class=per_class,
        root=workspace.root,
        find_manifest=workspace.find_manifest,
        about=about,
    )


def choose_runs(workspace: Workspace, experiment: str | None = None, mlflow_uri: str | None = None) -> Chosen:
    """Return the runs to compare, and which they are where there are others; raise `UserError`."""
    from cafe.results.runs import Chosen, choose, read_runs

    if mlflow_uri:
        from cafe.pipeline.tracking.mirror import Mirror

        if not experiment:
            raise UserError("--mlflow-uri needs to know which runs to compare: give --experiment NAME too.")
        mirror = Mirror(workspace, mlflow_uri)
        runs = read_runs(mirror.pull(experiment))
        return Chosen(runs, f"Runs of the experiment {experiment} at {mirror.shown_address}")
    return choose(workspace.read_runs(), experiment)


@click.command()
@click.argument("experiment", shell_complete=complete("experiment"))
@click.option(
    "--output", metavar="FILE", help="Where to write the page; default: reports/EXPERIMENT.html in the workspace."
)
@metrics_option
@options(ReportSettings)
@click.option(
    "--errors", multiple=True, metavar="EXPRESSION", help="Show mistakes on faces of this expression only; repeatable."
)
@click.option(
    "--count",
    default=MISTAKES,
    show_default=True,
    type=click.IntRange(0, 500),
    help="Mistakes shown of each method; 0: none.",
)
def report(
    experiment: str,
    output: str | None,
    metrics: str,
    errors: tuple[str, ...],
    count: int,
    **values: Any,
) -> None:
    """Write an experiment as one page that needs nothing else.

    \b
    cafe report table1 --versus cafe
    cafe report table1 --errors fear --errors disgust --count 48 --output fear.html

    It holds the tables of `cafe compare`, and of each method its recalls, confusions, mistakes, mask and training; then how
    the numbers were made. The mistakes are thumbnails: the licences of the data sets apply to the page.
    """
    from cafe.files import check_output, locate, place_below, write_whole
    from cafe.outputs import check_replaced, holds
    from cafe.report.details import Gallery
    from cafe.report.experiment import draw_experiment
    from cafe.report.pages import GENERATOR

    if output:
        check_replaced(check_output(output, "--output"), "--output", holds(GENERATOR))
        if (ending := PurePosixPath(output).suffix) not in ("", ".html", ".htm"):
            raise UserError(f"--output {output} ends in {ending!r}: the page is HTML, so give FILE.html.")
    workspace, gallery = open_workspace().keeping_manifests(), Gallery(count, errors)
    chosen = choose_runs(workspace, experiment)._replace(reason="")
    found = report_runs(workspace, chosen, ReportSettings(**values), metrics)
    page = draw_experiment(experiment, found, workspace.root, workspace.find_manifest, gallery)
    place = locate(output) if output else place_below(workspace.root / "reports", f"{experiment}.html")
    with write_whole(place) as file:
        file.write(page)
    say(f"Wrote {place} ({len(page) / 1e6:.1f} MB)")


@click.command()
@click.option("--port", type=click.IntRange(1, 65535), default=5000, show_default=True, help="Port on loopback.")
def ui(port: int) -> None:
    """Show this workspace in MLflow, in a browser.

    Starts MLflow's server on loopback and prints the addresses to open.
    """

    from cafe.pipeline.tracking.mirror import SHARED, default_uri, list_experiments

    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            raise UserError(f"Port {port} is taken: give another one with --port.") from None
    workspace, address = open_workspace(), f"http://127.0.0.1:{port}"
    experiments = list_experiments(workspace)
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", default_uri(workspace)]
    command += ["--default-artifact-root", (workspace.root / "artifacts").as_uri()]
    environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # however this command ends, the server ends with it
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            say(f"MLflow starts for {workspace.root}; that takes some seconds.")
            _await_answer(server, port)
            echo(f"MLflow at {address} (stop with Ctrl-C)")
            for name, number in experiments.items():  # MLflow's own front page leads to pages about language models
                echo(
                    f"{name}: {address}/#/experiments/{number}/runs?workflowType=machine_learning&viewStateShareKey={SHARED}"
                )
            server.wait()
        except KeyboardInterrupt:
            server.terminate()


def _await_answer(server: subprocess.Popen[bytes], port: int) -> None:
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        if server.poll() is not None:
            raise UserError(f"MLflow's server ended with exit code {server.returncode} before it answered.")
        time.sleep(0.1)


@click.group(cls=Commands)
def mlflow() -> None:
    """MLflow servers: bring one up to date, or fetch runs from it."""


@mlflow.command()
@click.option(
    "--models", is_flag=True, help="Export every run and log it as a model; each takes the room of its tower."
)
@click.option("--mlflow-uri", help=URI_HELP)
def sync(models: bool, mlflow_uri: str | None) -> None:
    """Show in MLflow what the run folders say.

    \b
    cafe mlflow sync
    cafe mlflow sync --mlflow-uri http://tracking:5000

    Every run and benchmark of the workspace. Rebuilds a lost or a new server, and fills in what an interrupted training left
    out; what is there already stays.
    """
    from cafe.pipeline.tracking.mirror import Mirror

    workspace = open_workspace()
    mirror = Mirror(workspace, mlflow_uri)
    count = mirror.update_all()
    if mirror.warning:
        raise IncompleteError(mirror.warning)
    say(f"MLflow at {mirror.shown_address} shows all {count} runs of {workspace.root}.")
    if models:
        from cafe.pipeline.release.pyfunc import log_models

        with progress_bar("Exporting", "runs") as progress:
            left_out = log_models(mirror, progress)
        for name, reason in left_out.items():
            echo(f"No model of {name}: {reason}", err=True)
        say(f"It holds the models of {count - len(left_out)} of them.")


@mlflow.command()
@click.option("--mlflow-uri", required=True, help="MLflow tracking server.")
@click.option("--experiment", required=True, help="The experiment whose runs to fetch.")
def pull(mlflow_uri: str, experiment: str) -> None:
    """Fetch an experiment's runs from an MLflow server.

    \b
    cafe mlflow pull --mlflow-uri http://tracking:5000 --experiment table1

    Their descriptions and predictions become runs of this workspace; weights stay where they are.
    """
    from cafe.pipeline.tracking.mirror import Mirror, adopt_run

    workspace = open_workspace()
    folders = Mirror(workspace, mlflow_uri).pull(experiment)
    adopted = [folder.name for folder in folders if adopt_run(workspace, folder)]
    there = f"; {len(folders) - len(adopted)} were there already" if len(folders) > len(adopted) else ""
    say(f"Fetched {len(adopted)} runs into {workspace.root / 'runs'}{there}.")
