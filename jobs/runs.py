"""The commands that compute: extract, train, evaluate, benchmark, demo; and the tables of a plan and of what failed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from cafe.addresses import own
from cafe.errors import IncompleteError, UserError, first_line
from cafe.jobs.names import complete
from cafe.jobs.options import GroupedCommand, options
from cafe.jobs.tables import FittedTable, make_table, sheet_tables
from cafe.jobs.terminal import echo, interruptible, open_workspace, progress_bar, records_option, say, show
from cafe.pipeline.settings import BenchmarkSettings, DemoSettings, EvaluateSettings, ExtractSettings, TrainSettings

if TYPE_CHECKING:
    from upath import UPath

    from cafe.pipeline.benchmark.cells import Failures
    from cafe.pipeline.benchmark.file import Benchmark
    from cafe.pipeline.benchmark.grid import Cell
    from cafe.pipeline.benchmark.missing import Cost
    from cafe.pipeline.benchmark.plan import BenchmarkPlan
    from cafe.pipeline.faces import Faces
    from cafe.pipeline.tracking.mirror import Mirror
    from cafe.pipeline.workspace import Workspace
    from cafe.results.sources import Source

SHIPPED = Path(__file__).parent / "benchmarks"
NEXT_STEPS = """Next steps
  The runs in MLflow, in your browser:
    {cafe} ui
  Your own faces, a folder per expression:
    {cafe} data index folder ~/faces/mine --name mine
    {cafe} extract mine --backbone face-resnet --views 5
    {cafe} train --source mine --method linear_probe --seed 0 --set features=standardised --set learning_rate=0.001
    {cafe} train --source mine --seed 0 --set features=standardised --set learning_rate=0.001 --epochs 8 --image-size 64
  The published tower, whose weights come from its hub:
    {cafe} extract mine --backbone clip-vit-b32 --views 61"""


@click.command(cls=GroupedCommand)
@click.argument("names", nargs=-1, required=True, metavar="NAME...", shell_complete=complete("manifest"))
@options(ExtractSettings)
@records_option
def extract(names: tuple[str, ...], **values: Any) -> None:
    """Compute the frozen features of data sets, once.

    \b
    cafe extract news --backbone face-resnet --views 5

    Interrupt it as you like: the same command goes on where it was.
    """
    from cafe.pipeline.features.extract import extract as extract_features

    own(values["backbone"], remember=True)
    workspace = open_workspace()
    manifests = [workspace.load_manifest(name) for name in names]
    if values["precision"] == "bf16":  # a finished extraction is recognised without torch
        from cafe.pipeline.process.advice import explain_precision

        for sentence in explain_precision("bf16", values["address"]):
            say(sentence)
    with interruptible(), progress_bar("Extracting") as progress:
        results = extract_features(workspace, manifests, ExtractSettings(**values), progress)
    for result in results:
        say(result.sentence())


@click.command(cls=GroupedCommand)
@options(TrainSettings)
@records_option
@click.pass_context
def train(ctx: click.Context, /, **values: Any) -> None:
    """Train a method on one source and evaluate it on others.

    \b
    cafe train --source news --method cafe --seed 0 --epochs 20
    cafe train --source mine --start shipped             # the model that ships goes on learning, on a few hundred faces

    Interrupt it as you like: the same command goes on from its last checkpoint.
    """
    from cafe.pipeline.cluster import set_environment

    settings, workspace = TrainSettings(**values), open_workspace()
    own(settings.backbone or "", settings.init, remember=True)
    set_environment(settings)

    from cafe.pipeline.plan import plan_training
    from cafe.pipeline.process.advice import explain_choices, explain_few_steps, foretell_on
    from cafe.pipeline.release.start import take_over
    from cafe.pipeline.tracking.mirror import Mirror
    from cafe.pipeline.train import train_and_evaluate

    mirror = _check_mirror(Mirror(workspace, settings.mlflow_uri))
    given = {name for name in values if ctx.get_parameter_source(name) is not ParameterSource.DEFAULT}
    settings = take_over(workspace, settings, given)
    plan = plan_training(workspace, settings)
    if plan.start:
        say(f"Starts from {plan.start.spec.name}, a {settings.method} of {settings.backbone or 'pixels'}.")
    for sentence in explain_choices(settings, plan.spec.precision, plan.spec.recipe["batch_size"]):
        echo(sentence)
    for sentence in explain_few_steps(len(plan.source.rows("train")), plan.spec.recipe, settings):
        say(sentence)
    _say_copies(workspace, [(plan.spec.trained_on, plan.targets)])
    with interruptible():
        train_and_evaluate(plan, mirror, foretell_on(progress_bar, settings, plan, say))
    if plan.targets:
        _show_scores(workspace, plan.run, settings.protocol)
    say(f"Run {plan.spec.name} in {plan.run}")
    _warn(mirror)


@click.command(cls=GroupedCommand)
@click.argument("run", shell_complete=complete("run"))
@options(EvaluateSettings)
@records_option
def evaluate(run: str, **values: Any) -> None:
    """Evaluate a trained run on targets.

    \b
    cafe evaluate cafe-news-s0 --targets cinema
    cafe evaluate shipped --targets mine                 # how good is the model that ships on my own labelled faces?

    RUN is the name of a run of this workspace or its unambiguous beginning; or a model that ships, a folder of `cafe export`
    or an address of MLflow's: it is evaluated as it predicts, from the pictures, and becomes a run of this workspace.
    """
    from cafe.pipeline.cluster import set_environment

    settings, workspace = EvaluateSettings(**values), open_workspace()
    set_environment(settings)

    from cafe.pipeline.evaluate import check_option, evaluate_targets
    from cafe.pipeline.faces import choose_targets
    from cafe.pipeline.process.lease import hold
    from cafe.pipeline.release.adoption import adopt, specify_export
    from cafe.pipeline.release.choice import find_exported
    from cafe.pipeline.runs import RunSpec, add_experiment
    from cafe.pipeline.tracking.mirror import Mirror
    from cafe.pipeline.train import keep_status
    from cafe.pipeline.worker import find_worker
    from cafe.pipeline.workspace import check_name
    from cafe.plugins import check_plugins
    from cafe.results.leaks import load_leaks
    from cafe.results.protocols import find_protocol, name_protocol
    from cafe.results.runs import choose

    mirror = _check_mirror(Mirror(workspace, settings.mlflow_uri))
    if settings.experiment:
        check_name(settings.experiment)
    if exported := find_exported(workspace, run):
        spec = specify_export(exported)
        path = workspace.run_path(spec.name)
    else:
        (chosen,), _ = choose(workspace.read_runs(run), name=run)
        path, spec = chosen.folder, RunSpec.load(chosen.folder)
    check_plugins(spec.plugins)
    protocol = name_protocol(settings.protocol, settings.test_time)
    check_option(spec, settings.test_time or "")
    targets = choose_targets(workspace, settings.targets, spec, protocol, settings.split)
    for source, target in product(spec.trained_on, targets if settings.exclude_leaks else ()):
        load_leaks(workspace.root, source.name, source.digest, target.name, target.digest)  # a missing one is a mistake
    _say_copies(workspace, [(spec.trained_on, targets)])
    several = len(targets) if settings.address else 1  # side by side on a cluster
    bar, at_work = progress_bar("Evaluating", "targets"), find_worker(settings, settings.use_gpu, several)
    with interruptible(), hold(path, settings.wait):
        if exported:
            adopt(workspace, exported, settings.experiment or TrainSettings.experiment)
        elif settings.experiment:
            add_experiment(path, settings.experiment)
        with keep_status(path, mirror), at_work as worker, bar as progress:
            evaluate_targets(path, targets, progress, worker.evaluate)
    _show_scores(workspace, path, protocol, settings.exclude_leaks)
    if settings.test_time:
        say(f"Protocol {protocol}: {find_protocol(protocol).about}")
    _warn(mirror)


@click.command(cls=GroupedCommand)
@click.argument("file")
@options(BenchmarkSettings)
@records_option
def benchmark(file: str, **values: Any) -> None:
    """Train and evaluate a grid: sources × methods × seeds.

    \b
    cafe benchmark quickstart.toml --dry-run             # the plan and what it costs
    cafe benchmark quickstart.toml

    FILE says what is in it; with this package come ablation, demo, ferplus, generalisation, generalisation_drawn, heads,
    leave_one_out, leave_one_out_drawn, mask, pixels, quickstart, rivals, shipped, spatial, supplement, supplement2, table1
    and table2 (.toml). Frozen features are extracted once and shared, cells run side by side, and one that fails stops no
    other. Interrupt it as you like: the same command goes on where it was.
    """
    from cafe.pipeline.benchmark.file import read_benchmark

    run_grid(open_workspace(), read_benchmark(find_file(file)), BenchmarkSettings(**values))


@click.command(cls=GroupedCommand)
@options(DemoSettings)
@records_option
def demo(faces: tuple[str, ...], drawn: int, seeds: int | None, epochs: int | None, **cluster: Any) -> None:
    """Do everything once, on drawn faces or your own.

    Index, extract, train, evaluate and compare, in minutes.

    \b
    cafe demo                                            # five domains of drawn faces
    cafe demo --faces ~/faces/news --faces ~/faces/cinema    # trained on the first, evaluated on both
    cafe demo --faces old=A/news --faces new=B/news      # under names of your own
    """
    from cafe.jobs.results import choose_runs, report_runs, show_report
    from cafe.pipeline.benchmark.file import read_benchmark
    from cafe.results.significance.verdicts import conclude

    workspace = open_workspace()
    folders = name_folders(faces)
    names = [_index_folder(workspace, name, root) for name, root in folders.items()] or _draw_domains(workspace, drawn)
    grid = read_benchmark(SHIPPED / "demo.toml")
    sources = names[:1] if faces else grid.sources
    train = grid.train | ({"epochs": epochs, "checkpoint_every": epochs} if epochs else {})
    seeded = list(range(seeds)) if seeds else grid.seeds
    about = f"Demo: trained on {names[0]}, evaluated on {', '.join(names)}" if faces else grid.about
    grid = replace(grid, about=about, sources=sources, targets=names, seeds=seeded, train=train)
    run_grid(workspace, grid, BenchmarkSettings(**cluster))
    report = report_runs(workspace, choose_runs(workspace, grid.name))
    show_report(report)
    echo(conclude(report.comparison))
    say(NEXT_STEPS.format(cafe=f"cafe -w {click.get_current_context().obj}"))


def _draw_domains(workspace: Workspace, faces: int) -> list[str]:
    from cafe.pipeline.datasets import draw_domains
    from cafe.synthetic.domains import DOMAINS

    with progress_bar("Drawing faces", "domains") as progress:
        draw_domains(workspace, list(DOMAINS), faces, 0, progress)
    return list(DOMAINS)


def name_folders(given: Sequence[str]) -> dict[str, UPath]:
    """Return folders by the names of their manifests: those of `NAME=FOLDER`, else the folder's own, as far as it is one.

    Raises `UserError` for a name that is none, and for one that two folders would have.
    """
    from cafe.files import locate
    from cafe.pipeline.workspace import check_name

    found: dict[str, UPath] = {}
    for text in given:
        name, named, folder = text.partition("=")
        if not named or "/" in name or locate(text).exists():
            folder = text
            name = re.sub(r"[^A-Za-z0-9_.-]+", "-", locate(text).name).strip("-_.")
        if not name:
            raise UserError(f"--faces {text} has no letter a–z to be called by: name it with --faces NAME={folder}.")
        if check_name(name) in found:
            raise UserError(
                f"--faces {text} would be called {name!r}, as {found[name]} is: name it with --faces NAME={folder}."
            )
        found[name] = locate(folder)
    return found


def _index_folder(workspace: Workspace, name: str, root: UPath) -> str:
    """Index a folder of faces and return its name."""
    from cafe.data.indexing import index_files
    from cafe.data.readers import DATASETS

    listing, place = DATASETS["folder"](root), workspace.manifest_path(name)
    with progress_bar(f"Reading {name}") as progress, workspace.writing_manifest(name) as save:
        save(index_files(name, listing, progress, place=place).manifest)
    return name


def run_grid(workspace: Workspace, grid: Benchmark, settings: BenchmarkSettings) -> None:
    """Show the plan of a benchmark and, unless it is a dry run, run all of its cells that are not done."""
    from cafe.pipeline.benchmark.cells import run_benchmark
    from cafe.pipeline.benchmark.plan import check_experiment, plan_benchmark
    from cafe.pipeline.tracking.mirror import Mirror

    check_experiment(grid, settings)
    if settings.dry_run and show_missing(workspace, grid):
        return
    mirror = _check_mirror(Mirror(workspace, settings.mlflow_uri))
    plan = plan_benchmark(workspace, grid, settings)
    for table in plan_tables(plan):
        show(table)
    planned = [cell.plan for cell in plan.cells if cell.plan]
    _say_copies(workspace, [(one.spec.trained_on, one.targets) for one in planned])
    if settings.dry_run:
        return
    with interruptible():
        failures = run_benchmark(plan, mirror, progress_bar, say)
    _warn(mirror)
    if failures:
        show(failures_table(failures))
        raise IncompleteError(
            f"{len(failures)} of {len(plan.cells)} cells failed, all others are done: fix what the table says and give the "
            "same command again."
        )
    say(f"All {len(plan.cells)} cells are done: cafe compare --experiment {plan.experiment}")


def show_missing(workspace: Workspace, grid: Benchmark) -> bool:
    """Show what a benchmark lacks and, without its manifests, what all of it costs; whether any of these is missing."""
    from cafe.pipeline.benchmark.missing import estimate_cost, list_missing

    missing = list_missing(workspace, grid)
    if missing:
        show(make_table(["missing", "how to make it"], missing, words=2, title=grid.about or grid.name))
    if not any(one.what.startswith("manifest ") for one in missing):
        return False
    show(describe_cost(estimate_cost(workspace, grid)))
    return True


def describe_cost(cost: Cost) -> str:
    """Say what a benchmark costs before its data are there."""
    unknown = f" Not counted, as their sizes are not known yet: {', '.join(cost.uncounted)}." if cost.uncounted else ""
    size = cost.passes * 1024 / 2**30
    return (
        f"In all {cost.trainings:,} trainings of {cost.faces:,} faces × epochs, and {cost.passes:,} tower passes (faces × "
        f"views), each of which keeps 2 bytes a channel: {size:,.0f} GB at 512 channels, maps besides. Sets that are "
        f"not there are counted as complete copies.{unknown}"
    )


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
    mirror.check_address()
    return mirror


def _show_scores(workspace: Workspace, run: UPath, protocol: str, exclude_leaks: bool = False) -> None:
    from cafe.pipeline.release.confidence import read_confidence
    from cafe.report.sheets.runs import run_sheet
    from cafe.results.leaks import leave_out_leaks
    from cafe.results.runs import read_runs
    from cafe.results.scores import describe_left_out, meet, read_filtered_scores

    known = workspace.manifest_digests()
    runs, left_out = meet(read_runs([run]), known)
    for line in describe_left_out(left_out):
        say(line)
    filters = [None, *([leave_out_leaks(workspace.root)] if exclude_leaks else [])]
    scores, *others = read_filtered_scores(runs, known, [protocol], filters)
    leak_free = others[0] if others else None
    for table in sheet_tables([run_sheet(scores, leak_free)]):
        show(table)
    if warning := read_confidence([run]).warning:
        echo(f"Warning: {warning}", err=True)


def _say_copies(workspace: Workspace, evaluations: list[tuple[tuple[Source, ...], Sequence[Faces]]]) -> None:
    """Say how many faces are evaluated that were trained on."""
    from cafe.pipeline.process.advice import explain_copies

    for sentence in explain_copies(workspace, evaluations):
        say(sentence)


def _warn(mirror: Mirror) -> None:
    if mirror.warning:
        echo(f"Warning: {mirror.warning}", err=True)


def plan_tables(plan: BenchmarkPlan) -> list[FittedTable | str]:
    """What a benchmark will do and what that costs: methods × sources with the cells that are done, then the sums."""
    from cafe.pipeline.process.advice import explain_precision
    from cafe.results.sources import ALL_BUT_TARGET

    benchmark, cells, address = plan.benchmark, plan.cells, plan.settings.address
    titles = list(dict.fromkeys(cell.title for cell in cells))
    sources = list(dict.fromkeys(cell.source_name for cell in cells))
    lines = []
    for title in titles:
        row = [[cell for cell in cells if (cell.title, cell.source_name) == (title, source)] for source in sources]
        lines.append((title, *(f"{sum(cell.done for cell in own)} of {len(own)}" for own in row)))
    table = make_table(["method", *sources], lines, title=benchmark.about or benchmark.name)
    done, begun = sum(cell.done for cell in cells), sum(bool(cell.records) and not cell.done for cell in cells)
    seeds = len({cell.settings.seed for cell in cells})
    parts = [_count(len(sources), "source"), _count(len(titles), "method"), _count(seeds, "seed")]
    if benchmark.draws:
        parts.append(_count(benchmark.draws, "draw"))
    shape = " × ".join(parts) + (", restricted by --only" if plan.settings.only else "")
    obstacles = Counter(cell.obstacle for cell in cells if cell.obstacle)
    by = ", each by the trainings that leave it out," if benchmark.sources == [ALL_BUT_TARGET] else ""
    evaluated = f"Evaluated on {', '.join(benchmark.evaluated_on)}{by} by the protocol {benchmark.protocol}."
    return [
        table,
        f"{len(cells):,} cells ({shape}): {done:,} done, {begun:,} begun, {len(cells) - done - begun:,} to begin.",
        evaluated,
        _training_cost(plan),
        _tower_cost(plan),
        *_deviations(cells),
        *explain_precision("bf16" if any(cell.settings.precision == "bf16" for cell in plan.runnable) else "", address),
        *(f"{count} cells cannot run: {first_line(reason)}" for reason, count in obstacles.items()),
    ]


def _deviations(cells: Sequence[Cell]) -> Iterator[str]:
    """Yield in which settings methods with published numbers differ from what was published, and which they are."""
    from cafe.results.published import load_published

    differing: dict[str, dict[str, None]] = {}
    for cell in cells:
        if cell.deviations and cell.entry.method in load_published()["accuracy"]:
            differing.setdefault(", ".join(cell.deviations), {})[cell.title] = None
    for settings, titles in differing.items():
        yield f"Not as published: {settings} ({'; '.join(titles)})."


def _training_cost(plan: BenchmarkPlan) -> str:
    from cafe.pipeline.process import machine

    cores = 1 if plan.settings.address else plan.settings.num_cpus or machine.cores()
    left, parallel = plan.work - plan.worked, plan.settings.parallel or cores
    seconds = plan.seconds_left(parallel)
    speed = "at a speed not known yet"
    if seconds is not None:
        speed = f"about {_duration(seconds)} with {_count(parallel, 'cell')} at a time"
    rest = f"{left:,} of them left, {speed}" if left else "none of them left"
    return f"Training: {plan.work:,} faces × epochs, {rest}.{_fold_cost(plan)}"


def _fold_cost(plan: BenchmarkPlan) -> str:
    folds = sum(cell.folds for cell in plan.runnable)
    share = sum(cell.work - cell.work // cell.folds for cell in plan.runnable if cell.folds)
    if not folds:
        return ""
    return (
        f" Of these, {share:,} are of the {folds:,} trainings on all sources but one by which leave_one_out chooses epochs, "
        "each of which also evaluates on the source left out after every epoch."
    )


def _tower_cost(plan: BenchmarkPlan) -> str:
    needed, left = plan.store_passes, sum(store.passes_left for store in plan.stores)
    published = plan.published_passes
    if not published:
        return "Towers: no method of this benchmark reads frozen features."
    saved, several = published - needed, plan.benchmark.views_per_seed
    share = f"{abs(saved):,} passes ({abs(saved) / published:.1%})"
    each = f"for each of {len(plan.benchmark.seeds)} seeds views of its own, " if several else ""
    return (
        f"Towers: {needed:,} passes fill {len(plan.stores)} feature stores (faces × views), {each}{left:,} of them left. "
        f"Without stores the cells that read features would take {published:,} (epochs × training faces + evaluated faces, "
        f"each cell for itself): the cache {'saves' if saved >= 0 else 'costs'} {share}."
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' if number != 1 else ''}"


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{max(1, minutes)} min"


def failures_table(failures: Failures) -> FittedTable:
    """The cells that failed, each with its reason."""
    lines = [(cell.name, first_line(reason)) for cell, reason in failures.items()]
    return make_table(["cell", "why it failed"], lines, words=2, title="Failed cells")
