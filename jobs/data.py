"""`cafe data …`: index data sets, draw faces, look at pictures, find copies, align photos, list what there is."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from cafe.errors import UserError, unknown
from cafe.jobs.options import complete, options
from cafe.jobs.terminal import Commands, json_option, open_workspace, progress_bar, say, show, show_records
from cafe.pipeline.settings import AlignSettings

if TYPE_CHECKING:
    from cafe.data.indexing import Listing


@click.group(cls=Commands)
def data() -> None:
    """Manifests: which faces there are, their labels and their split."""


@data.command("index")
@click.argument("kind")
@click.argument("root")
@click.option("--name", required=True, help="Name of the manifest in this workspace.")
@click.option(
    "--ferplus-rule", type=click.Choice(["majority", "argmax"]), help="How votes become a label; default: majority."
)
@click.option("--root", "pictures", help="Folder the paths of a table are relative to; default: that of the table.")
@click.option("--accept-counts", is_flag=True, help="Index a copy whose counts are not the published ones.")
@click.option(
    "--train-faces",
    type=click.IntRange(min=7),
    help="Keep this many training faces, in the expressions' proportions; other splits stay whole. Default: all.",
)
@click.option(
    "--split",
    type=click.Choice(["train", "val", "test"]),
    help="Put every face of a folder or table into this split. Default: its own splits, or a fifth for test.",
)
def index(
    kind: str,
    root: str,
    name: str,
    accept_counts: bool,
    train_faces: int | None,
    split: str | None,
    **choices: str | None,
) -> None:
    """Index a data set, e.g. `cafe data index rafdb ~/sets/RAF-DB --name rafdb`.

    \b
    KIND folder: ROOT[/SPLIT]/EXPRESSION/*.jpg
    KIND table:  ROOT is a CSV or Parquet file with path,label[,split,group]
    KIND rafdb, ferplus, affectnet, sfew, mma: ROOT holds the set as it is distributed, in any wrapper folders
    """
    from cafe.data.indexing import index_files
    from cafe.data.manifest import thin_training
    from cafe.jobs.data_tables import index_tables
    from cafe.pipeline.workspace import check_name

    check_name(name)
    workspace, listing = open_workspace(), _read(kind, root, **choices)
    if split:
        listing.put_into(split)
    if not accept_counts:
        _check_counts(listing, listing.counts())  # before 300,000 files are opened in vain
    with progress_bar("Reading") as progress:
        result = index_files(name, listing, progress, workspace.image_path(name))
    counts, training = result.counts(), len(result.manifest.rows("train"))
    if train_faces:
        result = replace(result, manifest=thin_training(result.manifest, train_faces))
    for table in index_tables(result):
        show(table)
    if train_faces:
        say(f"Kept {len(result.manifest.rows('train')):,} of {training:,} training faces, and all others.")
    _check_counts(listing, counts, accept_counts, warn=True)
    result.manifest.save(path := workspace.manifest_path(name))
    say(f"Wrote {path}")


def _read(kind: str, root: str, ferplus_rule: str | None, pictures: str | None) -> Listing:
    """List a data set with the options that its kind knows; raise `UserError` for others."""
    from cafe.data.readers import find_reader
    from cafe.files import locate

    read = find_reader(kind)
    if ferplus_rule and kind != "ferplus":
        raise UserError(f"--ferplus-rule {ferplus_rule} has no meaning for {kind}: it is for ferplus alone.")
    if pictures and kind != "table":
        raise UserError(f"--root {pictures} has no meaning for {kind}: it is for table alone.")
    choices: dict[str, Any] = {"rule": ferplus_rule} if ferplus_rule else {}
    choices |= {"root": locate(pictures)} if pictures else {}
    return read(locate(root), **choices)


def _check_counts(listing: Listing, found: Counter[tuple[str, int]], accept: bool = False, warn: bool = False) -> None:
    """Print where counts are not the published ones, doubtful ones only with `warn`; raise `UserError` unless `accept`."""
    from cafe.data.indexing import count_differences
    from cafe.jobs.data_tables import counts_tables

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
    from cafe.pipeline.datasets import draw_domains
    from cafe.synthetic.domains import DOMAINS

    for domain in domains:
        if domain not in DOMAINS:
            raise unknown("synthetic domain", domain, DOMAINS)
    with progress_bar("Drawing faces", "domains") as progress:
        manifests = draw_domains(open_workspace(), list(domains or DOMAINS), faces, seed, progress)
    for manifest in manifests:
        say(f"{manifest.name}: {len(manifest):,} faces in {manifest.root}")


@data.command("check")
@click.argument("name", shell_complete=complete("manifest"))
def check(name: str) -> None:
    """Check the pictures of a data set: `cafe data check news`.

    Decodes every picture: sizes, brightness, grey share, unreadable and identical ones, as tables and as one HTML page
    with a contact sheet for each expression.
    """
    from cafe.jobs.data_tables import check_tables
    from cafe.pipeline.datasets import report_check

    workspace = open_workspace()
    with progress_bar("Checking") as progress:
        result, page = report_check(workspace, workspace.load_manifest(name), progress)
    for table in check_tables(result):
        show(table)
    say(f"Wrote {page}")


@data.command("audit")
@click.argument("source", shell_complete=complete("manifest"))
@click.argument("targets", nargs=-1, metavar="[TARGET]...", shell_complete=complete("manifest"))
def audit(source: str, targets: tuple[str, ...]) -> None:
    """Find copies of a source's faces in targets: `cafe data audit ferplus mma`.

    \b
    Finds resized, recompressed, greyed and lightly cropped copies, between the source's own splits too. Writes for each
    target the list of pairs, which `evaluate` and `compare` leave out with --exclude-leaks, and a page that shows them.
    """
    from cafe.jobs.data_tables import audit_table, unreadable
    from cafe.pipeline.datasets import report_audits
    from cafe.results.leaks import audit_path

    workspace = open_workspace()
    manifests = [workspace.load_manifest(name) for name in (source, *targets)]
    with progress_bar("Reading") as reading, progress_bar("Comparing") as comparing:
        results = list(report_audits(workspace, manifests[0], manifests[1:], reading, comparing))
    show(audit_table(results))
    for result in results:
        if result.broken:
            show(unreadable(result.broken))
        say(f"Wrote {audit_path(workspace.root, source, result.target.name)} and .html")


@data.command("align")
@click.argument("source", shell_complete=complete("manifest"))
@options(AlignSettings)
def align(source: str, **values: Any) -> None:
    """Find, turn upright and crop the faces of raw photos: `cafe data align photos --name photos-aligned`.

    \b
    SOURCE is a manifest, whose labels, splits and sample ids the new one keeps, or a folder of unlabelled photos.
    Photos without a usable face are left out, counted and named; alignment.parquet beside the crops lists every photo.
    """
    from cafe.jobs.data_tables import alignment_tables
    from cafe.pipeline.datasets import align_photos, find_photos
    from cafe.pipeline.workspace import check_name

    settings, workspace = AlignSettings(**values), open_workspace()
    check_name(settings.name)
    photos = find_photos(workspace, source)
    with progress_bar("Aligning", "photos") as progress:
        result = align_photos(workspace, photos, settings, progress)
    for table in alignment_tables(result):
        show(table)
    say(f"Wrote {result.manifest or result.folder}")


@data.command("list")
@json_option
def list_data(as_json: bool) -> None:
    """List the manifests of the workspace and the feature stores each of them has."""
    from cafe.jobs.data_tables import list_manifests

    workspace = open_workspace()
    records = list(list_manifests(workspace))
    if not (records or as_json):
        show(f"No manifest in {workspace.root} yet: make one with `cafe data index folder ROOT --name NAME`.")
        return
    show_records(records, as_json, words=3, title=str(workspace.root))
