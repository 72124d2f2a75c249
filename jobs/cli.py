"""The `cafe` command: parses, calls the pipeline, prints. Heavy imports wait until a command runs."""

from __future__ import annotations

import click

from jobs.terminal import Commands

HELP = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
COMMANDS = {
    "data": "jobs.data:data",
    "tower": "jobs.towers:tower",
    "extract": "jobs.runs:extract",
    "store": "jobs.stores:store",
    "train": "jobs.runs:train",
    "evaluate": "jobs.runs:evaluate",
    "benchmark": "jobs.runs:benchmark",
    "demo": "jobs.runs:demo",
    "predict": "jobs.predict:predict",
    "export": "jobs.exports:export",
    "compare": "jobs.results:compare",
    "report": "jobs.reports:report",
    "mlflow": "jobs.results:mlflow",
    "ui": "jobs.results:ui",
    "doctor": "jobs.doctor:doctor",
}


@click.group(cls=Commands, places=COMMANDS, context_settings=HELP)
@click.option("--workspace", "-w", default="work", show_default=True, help="Folder or URI that holds everything.")
@click.version_option(package_name="cafe")
@click.pass_context
def main(ctx: click.Context, workspace: str) -> None:
    """Facial-expression recognition that generalises: train on one data set, be judged on all the others.

    \b
    cafe demo                                            # everything below on synthetic faces
    cafe data index folder ~/faces/news --name news      # a manifest
    cafe extract news cinema --backbone face-resnet      # frozen features, once
    cafe train --source news --method cafe --seed 0      # train, then judge on every other manifest
    cafe benchmark quickstart.toml                       # a grid of sources, methods and seeds
    cafe compare                                         # methods × targets, with intervals
    cafe report quickstart                               # the same as a page, with every method's mistakes
    cafe predict cafe-news-s0 ~/photos                   # a trained run on photos and videos
    """
    ctx.obj = workspace


if __name__ == "__main__":
    main()
