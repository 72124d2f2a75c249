"""The `cafe` command: parses, calls the pipeline, prints. Heavy imports wait until a command runs."""

from __future__ import annotations

import atexit
import os
import sys

import click

import cafe
from cafe.addresses import permit
from cafe.jobs.terminal import TYPED, WIDE, Commands, defer_gc, set_loudness
from cafe.pipeline.process.command import note_command

HELP = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
COMMANDS = {
    "data": "cafe.jobs.data:data",
    "tower": "cafe.jobs.towers:tower",
    "extract": "cafe.jobs.runs:extract",
    "store": "cafe.jobs.stores:store",
    "train": "cafe.jobs.runs:train",
    "evaluate": "cafe.jobs.runs:evaluate",
    "benchmark": "cafe.jobs.runs:benchmark",
    "demo": "cafe.jobs.runs:demo",
    "predict": "cafe.jobs.predict:predict",
    "export": "cafe.jobs.predict:export",
    "compare": "cafe.jobs.results:compare",
    "report": "cafe.jobs.results:report",
    "mlflow": "cafe.jobs.results:mlflow",
    "ui": "cafe.jobs.results:ui",
    "models": "cafe.jobs.listings:models",
    "runs": "cafe.jobs.listings:runs",
    "methods": "cafe.jobs.listings:methods",
    "doctor": "cafe.jobs.doctor:doctor",
    "completion": "cafe.jobs.listings:completion",
}
EXIT_CODES = (
    "Exit codes: 0 done; 1 something could not be done, what was finished is kept; 2 a mistake in the command, said in one "
    "sentence before any work; 130 interrupted. Colours follow NO_COLOR."
)


@click.group(cls=Commands, places=COMMANDS, context_settings=HELP, epilog=EXIT_CODES)
@click.option("--workspace", "-w", default="work", show_default=True, help="Folder or URI that holds everything.")
@click.option(
    "--plugin",
    "plugins",
    multiple=True,
    metavar="FILE.py",
    help="Python file with a data set, tower, image branch or method of yours; repeatable.",
)
@click.option("--quiet", "-q", is_flag=True, help="Print results and errors alone.")
@click.option(
    "--verbose", "-v", is_flag=True, help="Print what libraries and workers report, and where an error was found."
)
@click.option(
    "--wide", is_flag=True, help="Print tables whole, also where lines are longer than those of the terminal."
)
@click.option(
    "--allow-urls",
    is_flag=True,
    help="Fetch from web addresses that a manifest or a model's folder brought; those that you type need no option.",
)
@click.option(
    "--allow-private-urls",
    is_flag=True,
    help="With --allow-urls: also from this machine and its own network.",
)
@click.version_option(cafe.__version__, prog_name="cafe")
@click.pass_context
def main(
    ctx: click.Context,
    workspace: str,
    plugins: tuple[str, ...],
    quiet: bool,
    verbose: bool,
    wide: bool,
    allow_urls: bool,
    allow_private_urls: bool,
) -> None:
    """Facial-expression recognition that generalises.

    Train on one data set, evaluate on all the others.

    \b
    cafe demo                                            # everything below on synthetic faces
    cafe data index folder ~/faces/news --name news      # a manifest
    cafe extract news cinema --backbone face-resnet      # frozen features, once
    cafe train --source news --method cafe --seed 0      # train, then evaluate on every other manifest
    cafe benchmark quickstart.toml                       # a grid of sources, methods and seeds
    cafe compare                                         # methods × targets, with intervals
    cafe report quickstart                               # the same as a page, with every method's mistakes
    cafe predict ~/photos                                # faces in photos and videos, by the model that ships
    """
    ctx.obj = workspace
    set_loudness(quiet, verbose)
    ctx.meta[WIDE] = wide
    note_command(ctx.meta[TYPED])
    permit(ctx.meta[TYPED], allow_urls, allow_private_urls)
    if plugins:
        from cafe.plugins import load_plugins

        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as of every command, before a plug-in imports torch
        load_plugins(plugins)


def run() -> None:
    """Run the command of this process and end it at once, leaving its memory to the system.

    Python looks for garbage among all that torch and MLflow make, while they are imported and once more at the end, which
    took three of the eight seconds of a small training.
    """
    code = 1

    def end() -> None:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)

    defer_gc()
    atexit.register(end)  # the first to be registered is the last to be called
    try:
        main()
    except SystemExit as ended:
        code = int(ended.code or 0)
        raise


if __name__ == "__main__":
    run()
