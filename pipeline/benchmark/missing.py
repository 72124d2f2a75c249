"""What a benchmark needs that is not there, with the command that makes it, and what all of it costs; without any data.

Faces of a set that is not indexed yet are counted as those of a complete copy (`cafe/data/counts.toml`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from cafe.data.indexing import read_expected
from cafe.data.readers import DATASETS
from cafe.errors import UserError
from cafe.networks.branches import check_network
from cafe.pipeline.benchmark.file import Benchmark
from cafe.pipeline.plan import find_recipe
from cafe.pipeline.workspace import Workspace
from cafe.synthetic.domains import DOMAINS
from cafe.towers.weights import find_weights

# Sets with several kinds of label files.
COUNTED = {"ferplus": "ferplus fer2013new.csv", "fer2013": "fer2013 fer2013.csv"}


class Missing(NamedTuple):
    """Something that a benchmark needs and does not have: what it is, and the command or the step that makes it."""

    what: str
    remedy: str


class Cost(NamedTuple):
    """What a benchmark costs: trainings, faces × epochs, tower passes, and the sets whose faces nobody can count yet."""

    trainings: int
    faces: int
    passes: int
    uncounted: tuple[str, ...]


def list_missing(workspace: Workspace, benchmark: Benchmark) -> list[Missing]:
    """Return every manifest, tower and file of weights that a benchmark needs and that is not there."""
    return [*_list_manifests(workspace, benchmark), *_list_towers(benchmark), *_list_branches(benchmark)]


def _list_manifests(workspace: Workspace, benchmark: Benchmark) -> Iterator[Missing]:
    there = set(workspace.manifest_names())
    for name in list_sets(benchmark):
        if name not in there:
            yield Missing(f"manifest {name}", index_command(name))


def list_sets(benchmark: Benchmark) -> list[str]:
    """Return the manifests that are trained on or evaluated, each once."""
    sources = [name for source, _ in benchmark.trainings for name in source.split(",")]
    return list(dict.fromkeys((*sources, *benchmark.evaluated_on)))


def index_command(name: str) -> str:
    """Return the command that makes a manifest of a name: of the set that is called so, or of a folder."""
    if name in DOMAINS:
        return f"cafe data synth --domain {name}"
    return f"cafe data index {name if name in DATASETS else 'folder'} ROOT --name {name}"


def _list_towers(benchmark: Benchmark) -> Iterator[Missing]:
    towers = dict.fromkeys(tower for _, _, tower in benchmark.combinations() if tower)
    for tower in towers:
        try:
            if find_weights(tower):
                continue
            remedy = (
                f"fetched from its hub when it is first used; without one, name a file: {tower.partition('#')[0]}@FILE"
            )
        except UserError as error:
            remedy = str(error)
        yield Missing(f"weights of the tower {tower}", remedy)


def _list_branches(benchmark: Benchmark) -> Iterator[Missing]:
    found: dict[str, None] = {}
    for source, entry, tower in benchmark.combinations():
        settings = benchmark.train_settings(source, entry, tower)
        try:
            if "image" in entry.kind.needs:
                check_network(settings.network, settings.init)
        except UserError as error:
            found.setdefault(f"{settings.init}: {error}")
    for line in found:
        init, _, remedy = line.partition(": ")
        also = ' or say init = "imagenet", which is not as published' if init.startswith("file:") else ""
        yield Missing(f"weights of the image branch, {init}", remedy.rstrip(".") + also)


def estimate_cost(workspace: Workspace, benchmark: Benchmark) -> Cost:
    """Return what a benchmark costs, by the manifests that are there and by complete copies of the sets that are not."""
    counts = {name: _count_faces(workspace, name) for name in list_sets(benchmark)}
    trainings = faces = passes = 0
    stores: set[tuple[str, str, int, int]] = set()
    for source, entry, tower in benchmark.combinations():
        settings = benchmark.train_settings(source, entry, tower)
        names = source.split(",")
        epochs = find_recipe(settings, names[0] if len(names) == 1 and names[0] in DATASETS else "").epochs
        runs = len(benchmark.seeds) * len(benchmark.list_draws(entry))
        folds = len(names) if settings.selection == "leave_one_out" else 0  # trainings besides, on all sources but one
        trainings += runs * (1 + folds)
        faces += runs * max(1, epochs) * max(1, folds) * sum(counts[name].get("train", 0) for name in names)
        views = 1 if entry.kind.clean_features else entry.views or benchmark.views or epochs + 1
        own = benchmark.seeds if benchmark.views_per_seed and views > 1 else benchmark.seeds[:1]
        stores |= {(name, tower, views, seed) for name in names if tower for seed in own}
        stores |= {(name, tower, 1, 0) for name in benchmark.evaluated_on if tower}
    largest: dict[tuple[str, str, int], int] = {}
    for name, tower, views, seed in stores:
        key = (name, tower, seed)
        largest[key] = max(largest.get(key, 0), views)
    passes = sum(views * sum(counts[name].values()) for (name, _, _), views in largest.items())
    uncounted = tuple(name for name, own in counts.items() if not own)
    return Cost(trainings, faces, passes, uncounted)


def _count_faces(workspace: Workspace, name: str) -> Mapping[str, int]:
    """Return the faces of a manifest by split, or of a complete copy where there is none; empty where nobody knows."""
    if name in workspace.manifest_names():
        manifest = workspace.load_manifest(name)
        return {split: len(manifest.rows(split)) for split in ("train", "val", "test")}
    try:
        return {expected.split: sum(expected.counts) for expected in read_expected(COUNTED.get(name, name))}
    except KeyError:
        return {}
