"""The commands that compute: extract, train, evaluate, benchmark, demo."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cafe.errors import IncompleteError, UserError
from cafe.jobs.options import complete, options
from cafe.jobs.terminal import interruptible, open_workspace, progress_bar, say, show
from cafe.pipeline.settings import BenchmarkSettings, DemoSettings, EvaluateSettings, ExtractSettings, TrainSettings

if TYPE_CHECKING:
    from upath import UPath

    from cafe.pipeline.benchmark.file import Benchmark
    from cafe.pipeline.tracking.mirror import Mirror
    from cafe.pipeline.workspace import Workspace

SHIPPED = Path(__file__).parent / "benchmarks"
NEXT_STEPS = """Next steps
  cafe -w {workspace} ui                                      the runs in MLflow, in your browser
  cafe data index folder ~/faces/mine --name mine      your own faces: a folder per expression
  cafe extract mine --backbone face-resnet --views 5
  cafe train --source mine --method cafe --seed 0 --set features=standardised
  cafe extract mine --backbone clip-vit-b32 --views 61 the published tower (its weights come from the hub)"""


@click.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME...", shell_complete=complete("manifest"))
@options(ExtractSettings)
def extract(names: tuple[str, ...], **values: Any) -> None:
    """Compute frozen features once: `cafe extract news --backbone face-resnet --views 5`.

    Interrupt it as you like: the same command goes on where it was.
    """
    from cafe.pipeline.features.extract import extract as extract_features

    workspace = open_workspace()
    manifests = [workspace.load_manifest(name) for name in names]
    with interruptible(), progress_bar("Extracting") as progress:
        results = extract_features(workspace, manifests, ExtractSettings(**values), progress)
    for result in results:
        say(result.sentence())


@click.command()
@options(TrainSettings)
def train(**values: Any) -> None:
    """Train a method on one source and judge it on every other manifest.

    \b
    cafe train --source news --method cafe --seed 0 --epochs 20

    Interrupt it as you like: the same command goes on from its last checkpoint.
    """
    from cafe.pipeline.cluster import set_environment

    settings, workspace = TrainSettings(**values), open_workspace()
    set_environment(settings)

    from cafe.pipeline.tracking.mirror import Mirror
    from cafe.pipeline.train import plan_training, train_and_judge

    mirror = _check_mirror(Mirror(workspace, settings.mlflow_uri))
    plan = plan_training(workspace, settings)
    for sentence in explain_choices(settings, plan.spec.precision, plan.spec.recipe["batch_size"]):
        click.echo(sentence)
    with interruptible():
        train_and_judge(plan, mirror, progress_bar)
    if plan.targets:
        _show_scores(workspace, plan.run, settings.protocol)
    say(f"Run {plan.spec.name} in {plan.run}")
    _warn(mirror)


def explain_choices(settings: TrainSettings, precision: str, batch_size: int) -> Iterator[str]:
    """Yield what a user should know of a training before it begins: a choice made for them, or what workers are worth."""
    if settings.precision == "auto":
        yield f"Precision {precision}, as this machine computes."
    workers, share = settings.num_workers, batch_size // settings.num_workers
    if workers > 1 and settings.scale_batch:
        yield f"Batches of {batch_size} faces at {workers} times the learning rate, {share} for each worker: not published."
    elif workers > 1:
        yield (
            f"{workers} workers share each batch of {batch_size} faces, {share} each: as published, and seldom faster than "
            "one worker; --scale-batch gives each a whole batch, which is not as published."
        )


@click.command()
@click.argument("run", shell_complete=complete("run"))
@options(EvaluateSettings)
def evaluate(run: str, **values: Any) -> None:
    """Judge a trained run on targets: `cafe evaluate cafe-news-s0 --targets cinema`.

    RUN is the name of a run of this workspace or its unambiguous beginning.
    """
    from cafe.pipeline.cluster import set_environment

    settings, workspace = EvaluateSettings(**values), open_workspace()
    set_environment(settings)

    from cafe.pipeline.evaluate import check_option, judge_anywhere, predict_targets
    from cafe.pipeline.faces import choose_targets
    from cafe.pipeline.runs import RunSpec, add_experiment, is_finished
    from cafe.pipeline.tracking.mirror import Mirror
    from cafe.pipeline.train import keep_status
    from cafe.pipeline.worker import find_worker
    from cafe.results.leaks import load_leaks
    from cafe.results.protocols import find_protocol, name_protocol

    path = workspace.run_path(workspace.find_run(run))
    if not is_finished(path):
        raise UserError(f"The run {path.name!r} is not trained to its end: give its `cafe train` command again.")
    spec = RunSpec.load(path)
    protocol = name_protocol(settings.protocol, settings.test_time)
    check_option(spec, settings.test_time or "")
    targets = choose_targets(workspace, settings.targets, spec, protocol, settings.split)
    for target in targets if settings.exclude_leaks else ():  # a missing audit is a mistake of the user's
        for source in spec.trained_on:
            load_leaks(workspace.root, source.name, source.digest, target.name, target.digest)
    mirror = _check_mirror(Mirror(workspace, settings.mlflow_uri))
    if settings.experiment:
        add_experiment(path, settings.experiment)
    judging = progress_bar("Judging", "targets")
    with interruptible(), keep_status(path, mirror), find_worker(settings) as worker, judging as progress:
        predict_targets(path, targets, progress, worker.judge if worker else judge_anywhere(settings.use_gpu))
    _show_scores(workspace, path, protocol, settings.exclude_leaks)
    if settings.test_time:
        say(f"Protocol {protocol}: {find_protocol(protocol).about}")
    _warn(mirror)


@click.command()
@click.argument("file")
@options(BenchmarkSettings)
def benchmark(file: str, **values: Any) -> None:
    """Train and judge a whole grid, sources × methods × seeds: `cafe benchmark quickstart.toml`.

    FILE says what is in it; with this package come demo, quickstart, ferplus, rivals, mask, leave_one_out,
    leave_one_out_drawn, table1, table2, ablation and supplement (.toml). Frozen features are extracted once and shared,
    cells run side by side, one that fails stops no other. Interrupt it as you like: the same command goes on where it was.
    """
    from cafe.pipeline.benchmark.file import read_benchmark

    _work_off(open_workspace(), read_benchmark(find_file(file)), BenchmarkSettings(**values))


@click.command()
@options(DemoSettings)
def demo(faces: tuple[str, ...], drawn: int, seeds: int, epochs: int, **cluster: Any) -> None:
    """Everything once, in minutes, on drawn faces or your own: index, extract, train, judge, compare.

    \b
    cafe demo                                            # five domains of drawn faces
    cafe demo --faces ~/faces/news --faces ~/faces/cinema    # trained on the first, judged on both
    """
    from cafe.jobs.results import choose_runs, report_runs, show_report
    from cafe.pipeline.benchmark.file import read_benchmark
    from cafe.report.report import conclude

    workspace = open_workspace()
    names = [_index_folder(workspace, folder) for folder in faces] or _draw_domains(workspace, drawn)
    grid = read_benchmark(SHIPPED / "demo.toml")
    sources = names[:1] if faces else grid.sources
    train = {**grid.train, "epochs": epochs, "checkpoint_every": epochs}
    about = f"Demo: trained on {names[0]}, judged on {', '.join(names)}" if faces else grid.about
    grid = replace(grid, about=about, sources=sources, targets=names, seeds=list(range(seeds)), train=train)
    _work_off(workspace, grid, BenchmarkSettings(**cluster))
    report = report_runs(workspace, choose_runs(workspace, grid.name))
    show_report(report)
    click.echo(conclude(report.comparison))
    say(NEXT_STEPS.format(workspace=click.get_current_context().obj))


def _draw_domains(workspace: Workspace, faces: int) -> list[str]:
    from cafe.pipeline.datasets import draw_domains
    from cafe.synthetic.domains import DOMAINS

    with progress_bar("Drawing faces", "domains") as progress:
        draw_domains(workspace, list(DOMAINS), faces, 0, progress)
    return list(DOMAINS)


def _index_folder(workspace: Workspace, folder: str) -> str:
    """Index a folder of faces under its own name and return that."""
    from cafe.data.indexing import index_files
    from cafe.data.readers import DATASETS
    from cafe.files import locate
    from cafe.pipeline.workspace import check_name

    root = locate(folder)
    name = check_name(root.name)
    with progress_bar(f"Reading {name}") as progress:
        index_files(name, DATASETS["folder"](root), progress).manifest.save(workspace.manifest_path(name))
    return name


def _work_off(workspace: Workspace, grid: Benchmark, settings: BenchmarkSettings) -> None:
    """Show the plan of a benchmark and, unless it is a dry run, run all of its cells that are not done."""
    from cafe.jobs.run_tables import failures_table, plan_tables
    from cafe.pipeline.benchmark.cells import run_benchmark
    from cafe.pipeline.benchmark.plan import plan_benchmark
    from cafe.pipeline.tracking.mirror import Mirror

    plan = plan_benchmark(workspace, grid, settings)
    for table in plan_tables(plan):
        show(table)
    if settings.dry_run:
        return
    mirror = _check_mirror(Mirror(workspace.keeping_manifests(), settings.mlflow_uri))
    with interruptible():
        failures = run_benchmark(plan, mirror, progress_bar, say)
    _warn(mirror)
    if failures:
        show(failures_table(failures))
        raise IncompleteError(
            f"{len(failures)} of {len(plan.cells)} cells failed, all others are done: mend what the table says and give the "
            "same command again."
        )
    say(f"All {len(plan.cells)} cells are done: cafe compare --experiment {plan.experiment}")


def find_file(name: str) -> Path:
    """Return a user's file or, where there is none of that name, the one that comes with this package."""
    if Path(name).exists():
        return Path(name)
    if not (SHIPPED / name).is_file():
        names = ", ".join(sorted(path.name for path in SHIPPED.glob("*.toml")))
        raise UserError(f"There is no benchmark file {name!r}: give the path of one, or one of {names}.")
    return SHIPPED / name


def _check_mirror(mirror: Mirror) -> Mirror:
    """Return the mirror; raise `UserError` at once where the workspace cannot hold a database and no server is named."""
    assert mirror.address
    return mirror


def _show_scores(workspace: Workspace, run: UPath, protocol: str, exclude_leaks: bool = False) -> None:
    from cafe.jobs.results import sheet_tables
    from cafe.report.sheets import run_sheet
    from cafe.results.leaks import leave_out_leaks
    from cafe.results.runs import read_runs
    from cafe.results.scores import read_scores

    runs, known = read_runs([run]), workspace.manifest_names()
    scores = read_scores(runs, known, [protocol])
    leak_free = read_scores(runs, known, [protocol], leave_out_leaks(workspace.root)) if exclude_leaks else None
    for table in sheet_tables([run_sheet(scores, leak_free)]):
        show(table)


def _warn(mirror: Mirror) -> None:
    if mirror.warning:
        click.echo(f"Warning: {mirror.warning}", err=True)
