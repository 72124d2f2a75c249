"""The `cafe` command: parses, calls the pipeline, prints. Heavy imports wait until a command runs."""

from __future__ import annotations

import click

from jobs.terminal import Commands, open_workspace, show
from pipeline.settings import PROTOCOLS

HELP = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
COMMANDS = {
    "data": "jobs.data:data",
    "extract": "jobs.runs:extract",
    "train": "jobs.runs:train",
    "evaluate": "jobs.runs:evaluate",
    "benchmark": "jobs.runs:benchmark",
    "demo": "jobs.runs:demo",
    "compare": "jobs.cli:compare",
    "ui": "jobs.cli:ui",
}


@click.group(
    cls=Commands, places=COMMANDS, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.option("--workspace", "-w", default="work", show_default=True, help="Folder or URI that holds everything.")
@click.version_option(package_name="cafe")
@click.pass_context
def main(ctx: click.Context, workspace: str) -> None:
    """Facial-expression recognition that generalises: train on one data set, be judged on all the others.

    \b
    cafe demo                                            # everything below on synthetic faces
    cafe data index folder ~/faces/news --name news      # a manifest
    cafe extract news cinema --backbone imagenet-lite0   # frozen features, once
    cafe train --source news --method cafe --seed 0      # train, then judge on every other manifest
    cafe benchmark quickstart.toml                       # a grid of sources, methods and seeds
    cafe compare                                         # methods × targets, with intervals
    """
    ctx.obj = workspace


@main.command()
@click.option("--metric", default="accuracy", show_default=True, help="accuracy, mean_class_accuracy, macro_f1.")
@click.option("--per-class", metavar="TARGET", help="Accuracy per expression on one target instead.")
@click.option("--versus", metavar="METHOD", help="Test the accuracy of every other method against this one.")
@click.option(
    "--protocol", default="clean", show_default=True, type=click.Choice(PROTOCOLS), help="How the runs were judged."
)
@click.option("--exclude-leaks", is_flag=True, help="Add columns without copies of the source's training faces.")
@click.option("--markdown", metavar="FILE", help="Write it as Markdown too.")
@click.option("--latex", metavar="FILE", help="Write its tables for LaTeX (booktabs).")
@click.option("--csv", metavar="FILE", help="Write the numbers: a line per method, source and target.")
@click.option("--html", metavar="FILE", help="Write one page with figures, to be read, mailed or printed.")
@click.option("--mlflow-uri", help="MLflow tracking server; default: the workspace's own database.")
@click.option("--experiment", default="cafe", show_default=True, help="MLflow experiment.")
def compare(
    metric: str,
    per_class: str | None,
    versus: str | None,
    protocol: str,
    exclude_leaks: bool,
    mlflow_uri: str | None,
    experiment: str,
    **files: str | None,
) -> None:
    """Compare all runs judged by one protocol: methods × targets, mean ± 95 % interval over seeds.

    \b
    cafe compare --versus cafe --html comparison.html

    Published numbers stand beside ours where a data set is judged as it was in the paper. --versus needs the predictions
    of the runs, which are in the workspace they were made in.
    """
    from jobs.tables import report_tables
    from pipeline.render import FORMATS
    from pipeline.report import make_report
    from pipeline.tracking import Tracker
    from pipeline.workspace import locate

    workspace = open_workspace()
    runs = Tracker(workspace, mlflow_uri, experiment).runs()
    if exclude_leaks:
        from pipeline.leaks import add_leak_free

        runs = add_leak_free(workspace, runs, protocol)
    report = make_report(workspace, runs, metric, protocol, per_class, versus, exclude_leaks)
    for table in report_tables(report):
        show(table)
    for name, file in files.items():
        if file:
            place = locate(file)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(FORMATS[name](report).encode())
            click.echo(f"Wrote {file}")


@main.command()
@click.option("--port", type=click.IntRange(min=1), default=5000, show_default=True, help="Port on loopback.")
def ui(port: int) -> None:
    """Start MLflow's server for this workspace on loopback and print the addresses to open in a browser."""
    from pipeline.tracking import serve

    def announce(address: str, runs: dict[str, str]) -> None:
        click.echo(f"MLflow at {address} (stop with Ctrl-C)")
        for experiment, link in runs.items():
            click.echo(f"{experiment}: {link}")

    serve(open_workspace(), port, announce)


if __name__ == "__main__":
    main()
