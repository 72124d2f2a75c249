"""The `cafe` command: parses, calls the pipeline, prints. Heavy imports wait until a command runs."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import click

from cafe.errors import UserError, unknown
from jobs.options import options
from jobs.terminal import Commands, open_workspace, progress_bar, show
from pipeline.settings import PROTOCOLS, AlignSettings

if TYPE_CHECKING:
    from cafe.data.indexing import Listing

HELP = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
COMMANDS = {
    "data": "jobs.cli:data",
    "tower": "jobs.towers:tower",
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


@main.group(cls=Commands)
def data() -> None:
    """Manifests: which faces there are, their labels and their split."""


@data.command("index")
@click.argument("kind")
@click.argument("root")
@click.option("--name", required=True, help="Name of the manifest in this workspace.")
@click.option(
    "--ferplus-rule", type=click.Choice(["majority", "argmax"]), help="How votes become a label; default: majority."
)
@click.option("--accept-counts", is_flag=True, help="Index a copy whose counts are not the published ones.")
def index(kind: str, root: str, name: str, ferplus_rule: str | None, accept_counts: bool) -> None:
    """Index a data set, e.g. `cafe data index rafdb ~/sets/RAF-DB --name rafdb`.

    \b
    KIND folder: ROOT[/SPLIT]/EXPRESSION/*.jpg
    KIND table:  ROOT is a CSV or Parquet file with path,label[,split,group]
    KIND rafdb, ferplus, affectnet, sfew, mma: ROOT holds the set as it is given out, in any wrapper folders
    """
    from cafe.data import DATASETS
    from cafe.data.indexing import index_files
    from jobs.tables import index_tables
    from pipeline.workspace import check_name, locate

    if kind not in DATASETS:
        raise unknown("kind of data set", kind, DATASETS)
    if ferplus_rule and kind != "ferplus":
        raise UserError(f"--ferplus-rule {ferplus_rule} has no meaning for {kind}: it is for ferplus alone.")
    check_name(name)
    workspace = open_workspace()
    listing = DATASETS[kind](locate(root), **({"rule": ferplus_rule} if ferplus_rule else {}))
    if not accept_counts:
        _check_counts(listing, listing.counts())  # before 300,000 files are opened in vain
    with progress_bar("Reading") as progress:
        opened = iter(range(1, len(listing.files) + 1))
        result = index_files(
            name, listing, lambda _: progress(next(opened), len(listing.files)), workspace.image_path(name)
        )
    for table in index_tables(result):
        show(table)
    _check_counts(listing, result.counts(), accept_counts, warn=True)
    path = workspace.manifest_path(name)
    result.manifest.save(path)
    click.echo(f"Wrote {path}")


def _check_counts(listing: Listing, found: Counter[tuple[str, int]], accept: bool = False, warn: bool = False) -> None:
    """Print where a copy is not the published one, doubtful numbers only with `warn`; raise `UserError` for the others."""
    from cafe.data.counts import count_differences
    from jobs.tables import counts_tables

    differences = count_differences(listing.expected, found)
    certain = [difference for difference in differences if difference.certain]
    for table in counts_tables(differences if warn else certain):
        show(table)
    if certain and not accept:
        packed = f"{listing.packed[0]} may still have to be unpacked; " if listing.packed else ""
        raise UserError(
            f"{listing.root} is not the complete {listing.kind} (differences in the table: {len(certain)}): {packed}"
            "complete it, or index it as it is with --accept-counts."
        )


@data.command("synth")
@click.option("--domain", "domains", multiple=True, help="Domain to draw; default: all five.")
@click.option("--faces", default=1000, show_default=True, type=click.IntRange(28, 28_000), help="Faces of each domain.")
@click.option("--seed", default=0, show_default=True, help="Seed of the faces.")
def synth(domains: tuple[str, ...], faces: int, seed: int) -> None:
    """Draw synthetic faces and index them: `cafe data synth --faces 1000`.

    Five domains (studio, grey, film, web, drawing) show the seven expressions, built from facial action units; the people
    of a test split are never those of a train split.
    """
    from cafe.synthetic.domains import DOMAINS
    from pipeline.synthesise import synthesise

    for domain in domains:
        if domain not in DOMAINS:
            raise unknown("synthetic domain", domain, DOMAINS)
    workspace = open_workspace()
    with progress_bar("Drawing faces", "domains") as progress:
        manifests = synthesise(workspace, list(domains or DOMAINS), faces, seed, progress)
    for manifest in manifests:
        click.echo(f"{manifest.name}: {len(manifest):,} faces in {manifest.root}")


@data.command("check")
@click.argument("name")
def check(name: str) -> None:
    """Look at the pictures of a data set: `cafe data check news`.

    Decodes every picture: sizes, brightness, grey share, unreadable and identical ones, as tables and as one HTML page
    with a contact sheet for each expression.
    """
    from jobs.tables import check_tables
    from pipeline.check import check as check_manifest

    workspace = open_workspace()
    manifest = workspace.load_manifest(name)
    with progress_bar("Looking") as progress:
        result = check_manifest(workspace, manifest, progress)
    for table in check_tables(result):
        show(table)
    click.echo(f"Wrote {result.page}")


@data.command("audit")
@click.argument("source")
@click.argument("targets", nargs=-1, metavar="[TARGET]...")
def audit(source: str, targets: tuple[str, ...]) -> None:
    """Find copies of a source's faces in targets: `cafe data audit ferplus mma`.

    \b
    Finds resized, recompressed, greyed and lightly cropped copies, between the source's own splits too. Writes for each
    target the list of pairs, which `evaluate` and `compare` honour with --exclude-leaks, and a page to look at them.
    """
    from jobs.tables import audit_table, unreadable
    from pipeline.audit import audit as audit_manifests
    from pipeline.leaks import audit_path

    workspace = open_workspace()
    manifests = [workspace.load_manifest(name) for name in (source, *targets)]
    with progress_bar("Reading") as reading, progress_bar("Comparing") as comparing:
        results = list(audit_manifests(workspace, manifests[0], manifests[1:], reading, comparing))
    show(audit_table(results))
    for result in results:
        if result.broken:
            show(unreadable(result.broken))
        click.echo(f"Wrote {audit_path(workspace, source, result.target.name)} and .html")


@data.command("align")
@click.argument("source")
@options(AlignSettings)
def align(source: str, **values: Any) -> None:
    """Find, turn upright and crop the faces of raw photos: `cafe data align photos --name photos-aligned`.

    \b
    SOURCE is a manifest, whose labels, splits and sample ids the new one keeps, or a folder of unlabelled photos.
    Photos without a usable face are left out, counted and named; alignment.parquet beside the crops lists every photo.
    """
    from jobs.tables import alignment_tables
    from pipeline.align import align_photos, find_photos
    from pipeline.workspace import check_name

    settings, workspace = AlignSettings(**values), open_workspace()
    check_name(settings.name)
    photos = find_photos(workspace, source)
    with progress_bar("Aligning", "photos") as progress:
        result = align_photos(workspace, photos, settings, progress)
    for table in alignment_tables(result):
        show(table)
    click.echo(f"Wrote {result.manifest or result.folder}")


@data.command("list")
def list_data() -> None:
    """List the manifests of the workspace and the feature stores each of them has."""
    from jobs.tables import manifests_table

    show(manifests_table(open_workspace()))


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
