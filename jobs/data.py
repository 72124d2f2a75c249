"""`cafe data …`: index data sets, draw faces, look at pictures, find copies, align photos, list what there is."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import click

from cafe.errors import IncompleteError, UserError, unknown
from cafe.jobs.names import complete
from cafe.jobs.options import Whole, options
from cafe.jobs.tables import FittedTable, make_table, show_records
from cafe.jobs.terminal import (
    Commands,
    json_option,
    open_workspace,
    progress_bar,
    say,
    show,
)
from cafe.pipeline.settings import LARGEST, AlignSettings, ExtractSettings

if TYPE_CHECKING:
    from cafe.data.auditing import Audit
    from cafe.data.checking import Check
    from cafe.data.indexing import CountDifference, Index, Listing
    from cafe.pipeline.datasets import Alignment
    from cafe.pipeline.workspace import Workspace

LISTED = 10  # files named before "and N more"


@click.group(cls=Commands)
def data() -> None:
    """Manifests: the faces of data sets, their labels and splits."""


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
    type=Whole(2, LARGEST),
    help="Keep this many training faces, in the expressions' proportions; other splits stay whole. Default: all.",
)
@click.option(
    "--expressions",
    metavar="7|8|own|NAME,…",
    help="The classes: the seven basic ones, with contempt eight, all names that stand there, or those you name, in your "
    "order. Default: the seven.",
)
@click.option(
    "--skip", multiple=True, metavar="NAME,…", help="Leave out the faces of these classes; may be given several times."
)
@click.option(
    "--split",
    type=click.Choice(["train", "val", "test"]),
    help="Put every face of a set that comes without splits, or of a folder or table, into this one. Default: its own "
    "splits, or a fifth for test.",
)
@click.option(
    "--label-order",
    metavar="ORDER",
    help="What labels mean that are numbers: the order affectnet, fer2013, ferplus or rafdb, or NAME,NAME,… from 0 on.",
)
@click.option(
    "--labels", metavar="FILE", help="What labels mean: a CSV of label,class or a JSON object; no class: left out."
)
@click.option(
    "--column",
    "columns",
    multiple=True,
    metavar="ROLE=NAME",
    help="Which column of a table is the path, label, split, group or box, such as label=emo; without NAME: none. "
    "keep=sex,age: keep these, by which `cafe compare --by` parts the faces.",
)
@click.option(
    "--group-by",
    type=click.Choice(["folder", "none"]),
    help="Whose face a picture is: its folder that is no split and no expression. Default: such a folder where it is sure.",
)
@click.option("--group-pattern", metavar="REGEX", help="Whose face a picture is: what this finds in its path.")
def index(
    kind: str,
    root: str,
    name: str,
    accept_counts: bool,
    train_faces: int | None,
    expressions: str | None,
    skip: tuple[str, ...],
    **said: Any,
) -> None:
    """Index a data set: its faces, labels and splits.

    \b
    cafe data index rafdb ~/sets/RAF-DB --name rafdb
    KIND folder: ROOT[/SPLIT][/PERSON]/EXPRESSION/*.jpg, or pictures with a table of path,label beside them
    KIND table:  ROOT is a CSV, JSON-lines or Parquet file with path,label[,split,group]; or Parquet with the pictures in it
    KIND webdataset: ROOT is a folder of tar shards, or 'train-{000..004}.tar'
    Other KINDs: ROOT holds the set as it is distributed, in any wrapper folders (docs/datasets.md)
    Any ROOT may be a .zip or a .tar, which is read where it lies.
    cafe data index ferplus ~/sets/FERPlus --name ferplus8 --expressions 8     # with contempt
    cafe data index folder ~/faces/ward --name ward --expressions own          # pain, drowsy, … as the folders are called
    cafe data index folder ~/faces/DATASET --name raf --label-order rafdb      # folders 1, 2, … 7
    """
    from cafe.addresses import own
    from cafe.data.expressions import ClassChoice
    from cafe.data.indexing import index_files, thin_training
    from cafe.data.readers.choices import SetChoices
    from cafe.pipeline.workspace import check_name

    check_name(name)
    choices, workspace = SetChoices(ClassChoice.parse(expressions, skip), **said), open_workspace()
    images, place = workspace.image_path(name), workspace.manifest_path(name)
    listing = choices.read(kind, root)
    if not accept_counts:
        _check_counts(listing, listing.counts())  # before 300,000 files are opened in vain
    with workspace.writing_manifest(name) as save:
        with progress_bar("Reading") as progress:
            result = index_files(name, listing, progress, images, place)
        counts, training = result.counts(), result.count_values("split")["train"]
        if train_faces:
            result = replace(result, manifest=thin_training(result.manifest, train_faces, place))
        for table in _index_tables(result):
            show(table)
        if train_faces:
            say(f"Kept {result.count_values('split')['train']:,} of {training:,} training faces, and all others.")
        _check_counts(listing, counts, accept_counts, warn=True)
        brought = root_is_brought(root, choices.pictures, result.manifest.root)
        own(root, choices.pictures or "", "" if brought else result.manifest.root, remember=True)
        replaced = _describe_replaced(workspace, name, result.manifest.root)
        say(f"Wrote {save(result.manifest)}{replaced}")
    check_whole(len(result.broken), "files or rows")


def root_is_brought(root: str, pictures: str | None, found: str) -> bool:
    """Whether a manifest's root was said by a file that was indexed: neither typed nor where what was typed lies."""
    homes = (pictures, root, root.rpartition("/")[0])
    return not any(home and f"{found}/".startswith(f"{home.rstrip('/')}/") for home in homes)


def _check_counts(listing: Listing, found: Counter[tuple[str, str]], accept: bool = False, warn: bool = False) -> None:
    """Print where counts are not the published ones, doubtful ones only with `warn`; raise `UserError` unless `accept`."""
    from cafe.data.indexing import count_differences

    differences = count_differences(listing.expected, found, listing.classes)
    certain = [difference for difference in differences if difference.certain]
    for table in _counts_tables(differences if warn else certain):
        show(table)
    if certain and not accept:
        packed = f"{listing.packed[0]} may still have to be unpacked; " if listing.packed else ""
        raise UserError(
            f"{listing.root} is not the complete {listing.kind} (differences in the table: {len(certain)}): {packed}"
            "complete it, or index it as it is with --accept-counts."
        )


def _index_tables(index: Index) -> list[FittedTable | str]:
    """Faces per expression and split, sizes, and what was broken, listed twice or identical in a fresh manifest."""
    from cafe.data.images import list_suffixes
    from cafe.data.rows import SPLITS
    from cafe.spool import Spool

    manifest, listing, counts, sizes = index.manifest, index.listing, index.counts(), index.count_values("split")
    splits = [split for split in SPLITS if sizes[split]]
    numbers = {name: [counts[split, name] for split in splits] for name in manifest.classes}
    lines = [(name, *own, sum(own)) for name, own in numbers.items()]
    table = make_table(["expression", *splits, "all"], lines)
    table.add_section()
    table.add_row("all", *(f"{sizes[split]:,}" for split in splits), f"{len(manifest):,}")

    widths, heights = (_find_middle(index.count_values(side)) for side in ("width", "height"))
    smallest, middle, largest = (f"{width}×{height}" for width, height in zip(widths, heights, strict=True))
    ignored = ""
    if others := listing.ignored.total():
        ignored = f"; {others:,} other files ignored ({list_suffixes(listing.ignored)})"
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in sorted(listing.dropped.items()))
    left_out = (
        f"{listing.dropped.total():,} left out, which show none of the {len(manifest.classes)} classes: {dropped}"
    )
    repeated, duplicates = listing.repeated, Spool(" = ".join(group) for group in index.duplicates)
    broken = [f"{path}: {reason}" for path, reason in index.broken]
    return [
        f"{manifest.name}: {len(manifest):,} faces, read as {listing.layout}",
        *_describe_labels(listing),
        table,
        *_describe_parts(index, sizes["test"]),
        f"sizes {smallest} to {largest} pixels, median {middle}{ignored}",
        *([left_out] if dropped else []),
        _list_some(f"{len(broken)} broken files, left out", broken),
        *([_list_some(f"{len(repeated)} listed more than once, counted once", repeated)] if repeated else []),
        _list_some(f"{len(duplicates)} groups of identical files", duplicates),
        *_describe_votes(index),
        *_warn_of_twins(index, sizes),
    ]


def _describe_labels(listing: Listing) -> list[str]:
    """What labels mean that are no names, and which columns play no part."""
    meanings = [f"{label} is {name or 'left out'} ({count:,})" for label, name, count in listing.meanings]
    columns = [f"columns that play no part, unless --column keep=NAME: {', '.join(listing.unread)}"] * bool(
        listing.unread
    )
    return [*([f"labels: {', '.join(meanings)}"] if meanings else []), *columns, *listing.notes]


def _find_middle(counts: Counter[int]) -> tuple[int, int, int]:
    """Return the smallest of some numbers, the median and the largest, from how often there is each."""
    numbers = sorted(counts)
    below = list(accumulate(counts[number] for number in numbers))
    return numbers[0], numbers[bisect_right(below, (below[-1] - 1) // 2)], numbers[-1]


def _describe_replaced(workspace: Workspace, name: str, root: str) -> str:
    """What a manifest of another folder takes the place of; nothing where there was none, or the same folder's."""
    with suppress(UserError):  # none, or a damaged one, which indexing again mends
        before = workspace.load_manifest(name)
        if before.root != root:
            return f", in place of {len(before):,} faces of {before.root}"
    return ""


def _describe_parts(index: Index, tested: int) -> list[str]:
    """How many groups there are, and how a set is evaluated that came without splits, of which so many are for test."""
    manifest, groups = index.manifest, len(index.count_values("group").keys() - {None})
    lines = [f"{groups:,} groups, none of which is in two splits"] if groups and manifest.parted else []
    if manifest.parted and not tested:
        lines.append(
            "no face could be held out for test, as faces or groups are too few: where it is trained on, nothing of it can "
            "be evaluated; see --split, --group-by and --group-pattern"
        )
    elif manifest.parted:
        lines.append(
            "no splits came with it: a run trained on it keeps a fifth for test, others are tested on all of it"
        )
    return lines


def _describe_votes(index: Index) -> list[str]:
    (voted, outvoted), strange = index.outvoted, index.strange_votes
    if not (voted or strange):
        return []
    against = f"; of {outvoted:,} most people chose another class than the label" if outvoted else ""
    lost = ", ".join(f"{count:,} {name}" for name, count in sorted(strange.items()))
    return [
        f"{voted:,} faces have people's votes{against}",
        *([f"{strange.total():,} votes left out, for what is no class of this set: {lost}"] if strange else []),
    ]


def _warn_of_twins(index: Index, sizes: Counter[str]) -> list[str]:
    manifest, twins = index.manifest, index.training_twins
    if not twins:
        return []
    shares = " and ".join(f"{twins[split]:,} of {sizes[split]:,} {split} faces" for split in sorted(twins))
    return [
        f"{shares} are also in the training split, byte for byte: find them and other copies with "
        f"`cafe data audit {manifest.name}`, then leave them out of the results with --exclude-leaks."
    ]


def _counts_tables(differences: list[CountDifference]) -> list[FittedTable | str]:
    """Where a copy differs from what is expected: a table of the numbers that are known, a line for each doubtful one."""
    certain = [(row.expression, row.split, row.expected, row.found) for row in differences if row.certain]
    known: list[FittedTable | str] = (
        [make_table(["expression", "split", "expected", "found"], certain, 2)] if certain else []
    )
    known += [f"Expected: {source}." for source in dict.fromkeys(row.source for row in differences if row.certain)]
    doubtful = [
        f"Warning: {row.split}, {row.expression}: {row.found:,} faces where {row.expected:,} are expected ({row.source})."
        for row in differences
        if not row.certain
    ]
    return [*known, *doubtful]


def check_whole(broken: int, what: str) -> None:
    """Raise `IncompleteError` where something could not be read: all else is written, but the command is not done."""
    if broken:
        raise IncompleteError(f"Not all {what} could be read: {broken:,} are left out, listed above.")


def _list_some(title: str, lines: Sequence[str]) -> str:
    more = [f"  … and {len(lines) - LISTED} more"] if len(lines) > LISTED else []
    return "\n".join([title + (":" if lines else ""), *(f"  {line}" for line in lines[:LISTED]), *more])


@data.command("synth")
@click.option("--domain", "domains", multiple=True, help="Domain to draw; default: all five.")
@click.option("--faces", default=1000, show_default=True, type=click.IntRange(28, 28_000), help="Faces of each domain.")
@click.option("--seed", default=0, show_default=True, type=Whole(-(2**63), 2**63 - 1), help="Seed of the faces.")
def synth(domains: tuple[str, ...], faces: int, seed: int) -> None:
    """Draw synthetic faces and index them.

    \b
    cafe data synth --faces 1000

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
@click.option(
    "--max-megapixels",
    type=Whole(1, LARGEST),
    default=ExtractSettings.max_megapixels,
    show_default=True,
    help="Largest picture to decode, as `cafe extract` has it.",
)
def check(name: str, max_megapixels: int) -> None:
    """Check the pictures of a data set.

    \b
    cafe data check news

    Decodes every picture: sizes, brightness, grey share, unreadable and identical ones, as tables and as one HTML page
    with a contact sheet for each expression.
    """
    from cafe.pipeline.datasets import report_check

    workspace = open_workspace()
    with progress_bar("Checking") as progress:
        result, page = report_check(workspace, workspace.load_manifest(name), progress, max_megapixels)
    for table in _check_tables(result):
        show(table)
    say(f"Wrote {page}")
    check_whole(len(result.broken), "pictures")


def _check_tables(check: Check) -> list[FittedTable | str]:
    """What the pictures of a data set are like: a line per expression, sizes and brightness, broken and repeated files."""
    from cafe.spool import Spool

    header, lines = check.summary
    table = make_table(header, lines[:-1])
    table.add_section()
    table.add_row(*lines[-1])
    duplicates = Spool(" = ".join(face.sample_id for face in group) for group in check.duplicates)
    return [
        f"{check.manifest.name}: {len(check.manifest):,} faces",
        table,
        *(_histogram(title, counts) for title, counts in check.histograms.items()),
        _unreadable(check.broken),
        _list_some(f"{len(duplicates)} groups of identical pictures", duplicates),
    ]


def _unreadable(broken: list[tuple[str, str]]) -> str:
    """Name the files that could not be read, with the reason."""
    return _list_some(f"{len(broken)} unreadable files", [f"{sample}: {reason}" for sample, reason in broken])


def _histogram(title: str, counts: list[tuple[str, int]]) -> FittedTable:
    most = max(1, *(count for _, count in counts))
    lines = [(name, "█" * max(1, round(30 * count / most)), count) for name, count in counts if count]
    return make_table([title, "", "faces"], lines, words=2)


@data.command("audit")
@click.argument("source", shell_complete=complete("manifest"))
@click.argument("targets", nargs=-1, metavar="[TARGET]...", shell_complete=complete("manifest"))
def audit(source: str, targets: tuple[str, ...]) -> None:
    """Find copies of a source's faces in targets.

    \b
    cafe data audit ferplus mma

    Finds resized, recompressed, greyed, brightened, lightly cropped, mirrored and turned copies, between the source's
    own splits too. Writes for each target the list of pairs, which `evaluate` and `compare` leave out with
    --exclude-leaks, and a page that shows them.
    """
    from cafe.pipeline.datasets import report_audits
    from cafe.results.leaks import audit_path

    workspace = open_workspace()
    manifests = [workspace.load_manifest(name) for name in (source, *targets)]
    with progress_bar("Reading") as reading, progress_bar("Comparing") as comparing:
        results = list(report_audits(workspace, manifests[0], manifests[1:], reading, comparing))
    show(_audit_table(results))
    for result in results:
        if result.broken:
            show(_unreadable(result.broken))
        say(f"Wrote {audit_path(workspace.root, source, result.target.name)} and .html")
    check_whole(len(dict(broken for result in results for broken in result.broken)), "pictures")


def _audit_table(audits: list[Audit]) -> FittedTable:
    """Copies of a source's faces: a line per pair of splits."""
    words = ["source", "target", "source split", "target split"]
    table = make_table([*words, "target faces", "with a copy", "share", "pairs", "under another label"], (), len(words))
    table.names = len(words)
    for audit in audits:
        for pair in audit.splits:
            names = (audit.source.name, audit.target.name, pair.source_split, pair.target_split)
            share = f"{100 * pair.copied / pair.faces:.1f} %"
            numbers = (f"{pair.faces:,}", f"{pair.copied:,}", share, f"{pair.pairs:,}", f"{pair.relabelled:,}")
            table.add_row(*names, *numbers)
        table.add_section()
    return table


@data.command("align")
@click.argument("source", shell_complete=complete("manifest"))
@options(AlignSettings)
def align(source: str, **values: Any) -> None:
    """Find, turn upright and crop the faces of raw photos.

    \b
    cafe data align photos --name photos-aligned

    SOURCE is a manifest, whose labels, splits and sample ids the new one keeps, or a folder of unlabelled photos.
    Photos without a usable face are left out, counted and named; alignment.parquet beside the crops lists every photo.
    """
    from cafe.pipeline.datasets import align_photos, find_photos
    from cafe.pipeline.workspace import check_name

    settings, workspace = AlignSettings(**values), open_workspace()
    check_name(settings.name)
    photos = find_photos(workspace, source)
    with progress_bar("Aligning", "photos") as progress:
        result = align_photos(workspace, photos, settings, progress)
    for table in _alignment_tables(result):
        show(table)
    say(f"Wrote {result.manifest or result.folder}")
    check_whole(result.outcomes()["unreadable"], "photos")


def _alignment_tables(alignment: Alignment) -> list[FittedTable | str]:
    """What became of the photos, by outcome, and the first ones that were left out."""
    outcomes = alignment.outcomes()
    table = make_table(["outcome", "photos"], outcomes.items())
    table.add_section()
    table.add_row("all", f"{outcomes.total():,}")
    left_out = [f"{sample}: {reason}" for sample, reason in alignment.left_out]
    return [
        table,
        f"{alignment.crops:,} crops in {alignment.folder}",
        _list_some(f"{len(left_out)} photos left out", left_out),
    ]


@data.command("list")
@json_option
def list_data(as_json: bool) -> None:
    """List the manifests of the workspace and their features."""
    workspace = open_workspace()
    records = list(_list_manifests(workspace))
    if not (records or as_json):
        show(f"No manifest in {workspace.root} yet: make one with `cafe data index folder ROOT --name NAME`.")
        return
    order = ("faces", "train", "val", "test", "classes", "kind", "features")
    show_records(records, as_json, words=3, title=str(workspace.root), order=order)


def _list_manifests(workspace: Workspace) -> Iterator[dict[str, object]]:
    """Yield the manifests of a workspace with their faces and what features there are of each."""
    from cafe.data.rows import SPLITS
    from cafe.pipeline.features.integrity import find_stores

    for name in workspace.manifest_names():
        manifest = workspace.load_manifest(name)
        sizes = {split: len(manifest.rows(split)) for split in SPLITS}
        stores = [about.describe() for _, about in find_stores(workspace.features, name)]
        numbers = {"classes": len(manifest.classes), "faces": len(manifest), **sizes}
        yield {"manifest": name, "kind": manifest.kind, "features": stores, **numbers}
