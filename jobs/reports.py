"""`cafe report`: an experiment as one page to look at, to mail or to print."""

from __future__ import annotations

import click

from jobs.options import complete, test_time_option
from jobs.terminal import open_workspace, say
from pipeline.settings import PROTOCOLS


@click.command()
@click.argument("experiment", shell_complete=complete("experiment"))
@click.option(
    "--output", metavar="FILE", help="Where to write the page; default: reports/EXPERIMENT.html in the workspace."
)
@click.option("--versus", metavar="ROW", help="Test the accuracy of every other row against this method, tag or row.")
@click.option(
    "--protocol", default="clean", show_default=True, type=click.Choice(PROTOCOLS), help="How the runs were judged."
)
@test_time_option
@click.option("--exclude-leaks", is_flag=True, help="Add columns without copies of the source's training faces.")
@click.option(
    "--errors", multiple=True, metavar="EXPRESSION", help="Show mistakes on faces of this expression only; repeatable."
)
@click.option(
    "--count",
    default=24,
    show_default=True,
    type=click.IntRange(0, 500),
    help="Mistakes shown of each method; 0: none.",
)
def report(
    experiment: str,
    output: str | None,
    versus: str | None,
    protocol: str,
    test_time: tuple[str, ...],
    exclude_leaks: bool,
    errors: tuple[str, ...],
    count: int,
) -> None:
    """Write an experiment as one page that needs nothing else.

    \b
    cafe report table1 --versus cafe
    cafe report table1 --errors fear --errors disgust --count 48 --output fear.html

    It holds the tables of `cafe compare`, and of each method its recalls, confusions, mistakes, mask and training; then how
    the numbers were made. The mistakes are thumbnails: the licences of the data sets apply to the page.
    """
    from cafe.files import locate, write_file
    from cafe.report.details import Gallery
    from cafe.report.experiment import draw_experiment
    from jobs.results import choose_runs, compare_runs

    workspace, gallery = open_workspace().keeping_manifests(), Gallery(count, errors)
    runs, _ = choose_runs(workspace, experiment)
    found = compare_runs(workspace, (runs, []), protocol, exclude_leaks, test_time, versus=versus)
    page = draw_experiment(experiment, found, workspace.root, workspace.find_manifest, gallery)
    place = locate(output) if output else workspace.root / "reports" / f"{experiment}.html"
    write_file(place, page)
    say(f"Wrote {place} ({len(page) / 1e6:.1f} MB)")
