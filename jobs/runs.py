"""The commands that compute: extract, train, evaluate, benchmark, demo."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click

from cafe.errors import IncompleteError, UserError
from jobs.options import options
from jobs.terminal import open_workspace, progress_bar, show
from pipeline.settings import BenchmarkSettings, DemoSettings, EvaluateSettings, ExtractSettings, TrainSettings


@click.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@options(ExtractSettings)
def extract(names: tuple[str, ...], **values: Any) -> None:
    """Compute frozen features once, e.g. `cafe extract news --backbone imagenet-lite0 --views 5`.

    Interrupt it as you like: the same command goes on where it was.
    """
    from pipeline.extract import extract as extract_features

    workspace = open_workspace()
    manifests = [workspace.load_manifest(name) for name in names]
    with progress_bar("Extracting") as progress:
        results = extract_features(workspace, manifests, ExtractSettings(**values), progress)
    for result in results:
        click.echo(result.sentence())


@click.command()
@options(TrainSettings)
def train(**values: Any) -> None:
    """Train a method on one source and judge it on every other manifest.

    \b
    cafe train --source news --method cafe --seed 0 --epochs 20

    Interrupt it as you like: the same command goes on from its last checkpoint.
    """
    from jobs.tables import scores_table
    from pipeline.train import plan_training, train_and_judge

    settings = TrainSettings(**values)
    plan = plan_training(open_workspace(), settings)
    scores = train_and_judge(plan, progress_bar)
    if plan.targets:
        show(scores_table(scores, settings.protocol))
    click.echo(f"Run {plan.spec.name} in {plan.run}")


@click.command()
@click.argument("run")
@options(EvaluateSettings)
def evaluate(run: str, **values: Any) -> None:
    """Judge a trained run on targets, e.g. `cafe evaluate cafe-news-s0 --targets cinema`.

    RUN is the name of a run of this workspace or its unambiguous beginning.
    """
    from jobs.tables import scores_table
    from pipeline import cluster
    from pipeline.evaluate import log_results, predict_targets
    from pipeline.leaks import leak_free_scores, load_leaks
    from pipeline.runs import RunSpec, choose_targets, is_finished
    from pipeline.tracking import Tracker

    settings, workspace = EvaluateSettings(**values), open_workspace()
    path = workspace.run_path(workspace.find_run(run))
    if not is_finished(path):
        raise UserError(f"The run {path.name!r} is not trained to its end: give its `cafe train` command again.")
    spec = RunSpec.load(path)
    targets = choose_targets(workspace, settings.targets, spec, settings.protocol, settings.split)
    if settings.exclude_leaks:  # before Ray starts: a missing audit is a mistake of the user's
        load_leaks(workspace, spec, {target.manifest.name: target.manifest.digest for target in targets})
    tracker = Tracker(workspace, settings.mlflow_uri, settings.experiment)
    with cluster.connect(settings), progress_bar("Judging", "targets") as progress:
        predict_targets(path, workspace, targets, settings.use_gpu, progress)
    leak_free = leak_free_scores(workspace, path, settings.protocol) if settings.exclude_leaks else {}
    show(scores_table(log_results(path, tracker, leak_free), settings.protocol))


@click.command()
@click.argument("file")
@options(BenchmarkSettings)
def benchmark(file: str, **values: Any) -> None:
    """Train and judge a whole grid, sources × methods × seeds, e.g. `cafe benchmark quickstart.toml`.

    FILE says what is in it; with this package come quickstart.toml, synthetic.toml, faces.toml, table1.toml, table2.toml,
    ablation.toml and ablation-faces.toml. Frozen features are extracted once and shared, cells run side by side, one that
    fails stops no other. Interrupt it as you like: the same command goes on where it was.
    """
    from jobs.tables import failures_table, plan_tables
    from pipeline.benchmark import run_benchmark
    from pipeline.grid import read_grid
    from pipeline.plan import plan_benchmark

    settings = BenchmarkSettings(**values)
    plan = plan_benchmark(open_workspace(), read_grid(_benchmark_file(file)), settings)
    for table in plan_tables(plan):
        show(table)
    if settings.dry_run:
        return
    try:
        outcomes = run_benchmark(plan, progress_bar, click.echo)
    except KeyboardInterrupt:
        click.echo("Interrupted: the same command goes on where it was.", err=True)
        sys.stdout.flush()
        os._exit(130)  # a thread that still waits for the Ray just left must not keep the command alive
    failed = sum(bool(outcome.failure) for outcome in outcomes)
    if failed:
        show(failures_table(outcomes))
        raise IncompleteError(
            f"{failed} of {len(outcomes)} cells failed, all others are done: mend what the table says and give the same "
            "command again."
        )
    click.echo(f"All {len(outcomes)} cells are done: cafe compare --experiment {settings.experiment or plan.grid.name}")


def _benchmark_file(name: str) -> Path:
    """Return a user's file or, where there is none of that name, the one that comes with this package."""
    own, shipped = Path(name), Path(__file__).parent / "benchmarks"
    if own.exists():
        return own
    if not (shipped / name).is_file():
        names = ", ".join(sorted(path.name for path in shipped.glob("*.toml")))
        raise UserError(f"There is no benchmark file {name!r}: give the path of one, or one of {names}.")
    return shipped / name


@click.command()
@options(DemoSettings)
def demo(**values: Any) -> None:
    """Everything once on synthetic faces: draw, extract, train, judge, compare; under ten minutes on two cores."""
    from jobs.demo import NEXT_STEPS, run_demo
    from jobs.tables import report_tables
    from pipeline.report import report_comparison

    workspace = open_workspace()
    comparison = run_demo(workspace, DemoSettings(**values), progress_bar, click.echo)
    for table in report_tables(report_comparison(comparison)):
        show(table)
    click.echo(NEXT_STEPS.format(workspace=click.get_current_context().obj))
