"""The plan of a benchmark: what its file asks of this workspace, what is there already, and what the rest costs.

Nothing is computed here and no tower is loaded, so it can be looked at before anything is started.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from statistics import median
from typing import Any

from upath import UPath

from cafe.data.manifest import NAME, Manifest
from cafe.errors import UserError
from cafe.files import place_below
from cafe.networks.branches import check_network
from cafe.pipeline.benchmark.file import Benchmark, Entry
from cafe.pipeline.benchmark.grid import Cell, Sharing, StoreName, StorePlan
from cafe.pipeline.faces import Faces, Part, choose_split
from cafe.pipeline.features.extract import Extraction
from cafe.pipeline.features.integrity import Receipts, find_stores
from cafe.pipeline.need import Need, Store, finished_first
from cafe.pipeline.plan import (
    PUBLISHED_SIZE,
    TrainPlan,
    find_deviations,
    find_recipe,
    list_deviations,
    plan_training,
)
from cafe.pipeline.settings import BenchmarkSettings, ExtractSettings
from cafe.pipeline.workspace import Workspace, check_name
from cafe.results.protocols import find_protocol
from cafe.results.runs import read_epoch
from cafe.results.sources import Source
from cafe.towers.facts import NORMALISATIONS

RATE_EPOCHS = 3  # of a run, the last ones, from which its speed is taken

Filled = Mapping[StoreName, Store | str]  # stores of this command, or why there is none


@dataclass(frozen=True)
class BenchmarkPlan:
    """A checked benchmark: its cells in the order they run, and the stores they share."""

    benchmark: Benchmark
    workspace: Workspace
    settings: BenchmarkSettings
    cells: tuple[Cell, ...]

    @property
    def experiment(self) -> str:
        """The MLflow experiment of its runs."""
        return self.settings.experiment or self.benchmark.name

    @property
    def folder(self) -> UPath:
        """Where the benchmark and what became of its cells are written down."""
        return place_below(self.workspace.root / "benchmarks", self.benchmark.title)

    @property
    def runnable(self) -> list[Cell]:
        """The cells that nothing keeps from running."""
        return [cell for cell in self.cells if not cell.obstacle]

    @cached_property
    def stores(self) -> tuple[StorePlan, ...]:
        """The stores that cells need, each once."""
        return tuple({store.name: store for cell in self.cells for store in cell.stores}.values())

    @property
    def missing_stores(self) -> list[StorePlan]:
        """The stores to be filled before their cells can run."""
        wanted = {store.name for cell in self.runnable for store in cell.stores}
        return [store for store in self.stores if store.pending and store.name in wanted]

    @property
    def published_passes(self) -> int:
        """Tower passes without stores: every cell runs the tower on every face of every epoch and on all its targets."""
        return sum(cell.tower_passes for cell in self.cells)

    @property
    def store_passes(self) -> int:
        """Tower passes with stores: every face once per view, whatever the number of methods and seeds."""
        return sum(store.passes for store in self.stores)

    @property
    def work(self) -> int:
        """Faces × epochs of all cells that can run."""
        return sum(cell.work for cell in self.runnable)

    @property
    def worked(self) -> int:
        """How many of them are behind."""
        return sum(cell.worked for cell in self.runnable)

    def seconds_left(self, parallel: int) -> float | None:
        """Estimate the time of the training left from the speed of epochs already trained; None where nothing tells it.

        A method without any goes by the median of those that look at pictures as it does, or do not: that is what decides.
        """
        speeds: dict[str, list[float]] = {}
        for cell in self.cells:
            for record in map(read_epoch, cell.records[-RATE_EPOCHS:]):
                if record and "faces_per_second" in record:
                    speeds.setdefault(cell.title, []).append(record["faces_per_second"])
        medians = {title: median(values) for title, values in speeds.items()}
        alike: dict[bool, dict[str, float]] = {False: {}, True: {}}
        for cell in self.cells:
            if cell.title in medians:
                alike["image" in cell.entry.kind.needs][cell.title] = medians[cell.title]
        usual = {looks: median(several.values()) for looks, several in alike.items() if several}
        seconds = 0.0
        for cell in self.runnable:
            speed = medians.get(cell.title, usual.get("image" in cell.entry.kind.needs))
            if cell.work > cell.worked and speed is None:
                return None
            seconds += (cell.work - cell.worked) / speed if speed else 0
        return seconds / parallel


def plan_benchmark(
    workspace: Workspace, benchmark: Benchmark, settings: BenchmarkSettings, filled: Filled | None = None
) -> BenchmarkPlan:
    """Look up what a benchmark asks for and how far it is; nothing is computed and no tower is loaded.

    Raises `UserError` for what is wrong with the file; what only keeps some cells from running is their `obstacle`.
    """
    check_experiment(benchmark, settings)
    planner = _Planner(workspace.keeping_manifests(), benchmark, settings, filled or {})
    planned = benchmark.seeds if benchmark.views_per_seed else benchmark.seeds[:1]
    drafts = [planner.draft(*combination, seed) for seed in planned for combination in benchmark.combinations()]
    sources = planner.plan_source_stores(drafts)
    targets = planner.plan_target_stores(drafts, sources)
    first = []
    for cell in drafts:
        stores = [sources[sharing] for sharing in cell.sharings]
        if cell.entry.kind.needs_features():
            stores += [targets[name, tower] for name in cell.evaluated_on for tower in cell.towers]
        first.append(planner.complete(cell, stores))
    seeds = [None] if benchmark.views_per_seed else benchmark.seeds  # all of the first seed come first
    cells = [
        cell.with_seed(cell.settings.seed if seed is None else seed, draw)
        for seed in seeds
        for cell in first
        for draw in benchmark.list_draws(cell.entry)
    ]
    chosen = [cell for cell in cells if fnmatchcase(cell.name, settings.only or "*")]
    if not chosen:
        raise UserError(f"No cell matches --only {settings.only!r}: they are called like {cells[0].name!r}.")
    return BenchmarkPlan(benchmark, planner.workspace, settings, tuple(chosen))


def check_experiment(benchmark: Benchmark, settings: BenchmarkSettings) -> None:
    """Raise `UserError` for the name of an experiment that no run could belong to."""
    if settings.experiment is not None:
        check_name(settings.experiment)
    elif not re.fullmatch(NAME, benchmark.name):
        raise UserError(
            f"The benchmark file's name {benchmark.name!r} cannot be that of an experiment, which takes letters, digits, "
            "dots, hyphens and underscores: rename the file, or give --experiment NAME."
        )


@dataclass(frozen=True)
class _Planner:
    workspace: Workspace
    benchmark: Benchmark
    settings: BenchmarkSettings
    filled: Filled

    def draft(self, source: str, entry: Entry, tower: str | None, seed: int) -> Cell:
        """Return a cell before anything is known of its stores."""
        parts = [Part.of(self.workspace, self.workspace.load_manifest(name)) for name in source.split(",")]
        settings = self.benchmark.train_settings(source, entry, tower)
        faces = Faces.of(*parts)
        epochs = find_recipe(settings, faces.kind).epochs
        views = entry.views or self.benchmark.views or epochs + 1  # one for every epoch and the clean one, as published
        settings = replace(settings, seed=seed, views=views, experiment=self.settings.experiment or self.benchmark.name)
        several = len({other for _, _, other in self.benchmark.combinations() if other}) > 1
        title = f"{entry.label} on {tower}" if several and tower else entry.label
        return Cell(faces, entry, tower, settings, title, epochs, self.benchmark.view_seed(entry, seed))

    def plan_source_stores(self, cells: Sequence[Cell]) -> dict[Sharing, StorePlan]:
        """Return one store per source, tower and policy, with the views and maps that any of its cells needs."""
        stores: dict[Sharing, StorePlan] = {}
        for sharing in dict.fromkeys(sharing for cell in cells for sharing in cell.sharings):
            members = [cell for cell in cells if sharing in cell.sharings]
            views = max(cell.own_views or cell.settings.views or 1 for cell in members)
            policy = {"policy": members[0].entry.kind.policy} if views > 1 else {}
            maps = any(cell.maps for cell in members)
            manifest, wanted = self.workspace.load_manifest(sharing.source), {"views": views, "maps": maps, **policy}
            stores[sharing] = self.look_up(manifest, sharing.tower, view_seed=members[0].view_seed, **wanted)
        return stores

    def plan_target_stores(
        self, cells: Sequence[Cell], sources: Mapping[Sharing, StorePlan]
    ) -> dict[tuple[str, str], StorePlan]:
        """Return for every target and tower the store of a source where one serves, else one of a single view."""
        stores: dict[tuple[str, str], StorePlan] = {}
        reading = [cell for cell in cells if cell.entry.kind.needs_features()]
        for tower in dict.fromkeys(tower for cell in reading for tower in cell.towers):
            maps = any(cell.maps for cell in cells if tower in cell.towers)
            for target in self.benchmark.evaluated_on:
                manifest = self.workspace.load_manifest(target)
                channels = find_protocol(self.benchmark.protocol).channels(manifest.kind)
                serving = (
                    store
                    for sharing, store in sources.items()
                    if (sharing.source, sharing.tower, channels) == (target, tower, "rgb")
                    and store.settings.maps >= maps
                )
                own = {"views": 1, "maps": maps, "channels": channels}
                stores[target, tower] = next(serving, None) or self.look_up(manifest, tower, **own)
        return stores

    def look_up(self, manifest: Manifest, tower: str, **changes: Any) -> StorePlan:
        """Return what there is of a store; without loading the tower, so that it is known by what it says of itself.

        A store with more views, or with maps besides, serves as well.
        """
        fixed = {"backbone": tower, "view_seed": self.benchmark.first_view_seed}
        settings = ExtractSettings(**{**self.benchmark.features, **fixed, **changes})
        result = self.filled.get((manifest.name, settings))
        if isinstance(result, str):
            return StorePlan(manifest, settings, pending=len(manifest), obstacle=result)
        need = Need.of_extraction(manifest, settings)
        fitting = finished_first(need.find(find_stores(self.workspace.features, manifest.name)))
        sizes = [(about.key.views, about.key.maps) for _, about in fitting]
        found = [result] if result else fitting[: sizes.count(sizes[0])] if fitting else []
        if len(found) != 1:  # several differ in something only the tower can tell
            return StorePlan(manifest, settings, pending=len(manifest))
        path, about = found[0]
        receipts = Receipts(path, about)
        pending = receipts.pending() or receipts.outdated()
        faces = sum(len(about.rows_of(shard)) for shard in pending)
        skipped = [] if pending else receipts.skipped_paths(manifest)
        extraction = Extraction(path, about, 0, skipped)
        complaint = extraction.complaint(settings.max_skipped) if len(skipped) > settings.max_skipped else ""
        return StorePlan(manifest, settings, (path, about), faces, complaint)

    def complete(self, cell: Cell, needed: Sequence[StorePlan]) -> Cell:
        """Return a cell with the stores it needs, what it costs and, once they are filled, its checked training."""
        manifests = [self.workspace.load_manifest(name) for name in cell.evaluated_on]
        protocol = find_protocol(self.benchmark.protocol)
        sources = [Source(part.name, part.manifest.kind, part.digest) for part in cell.source.parts]
        splits = [(target, choose_split(self.workspace, target, protocol, sources)) for target in manifests]
        train, held_out = cell.source.split_rows(cell.settings.selection)
        seen = max(1, cell.epochs) * (max(1, cell.folds) * len(train) + len(held_out))
        seen += sum(len(target.rows(split)) for target, split in splits if split)
        plan, obstacle = None, next((store.obstacle for store in needed if store.obstacle), "")
        try:
            check_network(cell.settings.network, cell.settings.init)
            if not obstacle and not any(store.pending for store in needed):
                plan = replace(self.plan_cell(cell, needed), benchmark=self.benchmark.title)
        except UserError as error:
            obstacle = obstacle or str(error)
        passes = seen if cell.entry.kind.needs_features() else 0
        cell = replace(cell, faces=len(train), tower_passes=passes, stores=tuple(needed))
        deviations = tuple(find_deviations(plan.spec) if plan else list_draft_deviations(cell))
        return replace(cell, plan=plan, deviations=deviations, obstacle=obstacle)

    def plan_cell(self, cell: Cell, stores: Sequence[StorePlan]) -> TrainPlan:
        """Plan the training, where a tower is used with the very store of the source."""
        settings = cell.settings
        if stores:
            own = [store.found for store in stores[: len(cell.sharings)]]
            settings = replace(settings, backbone=None, store=",".join(found[1].folder for found in own if found))
        return plan_training(self.workspace, settings)


def list_draft_deviations(cell: Cell) -> list[str]:
    """Return in what a run is not as published, as far as that is known before its features are there.

    The statistics of a tower that is not loaded are taken for ImageNet's, as published, unless the file names others.
    """
    settings, source, method = cell.settings, cell.source, cell.entry.kind
    recipe = find_recipe(settings, source.kind)
    wanted = cell.stores[0].settings if cell.stores and cell.tower else None
    found = {**vars(settings), "recipe": asdict(recipe), "backbone": wanted.backbone if wanted else "none"}
    found |= {"policy": settings.policy or method.policy, "views": settings.views or recipe.epochs + 1}
    found |= {"interpolation": wanted.interpolation if wanted else "bilinear"}
    found["mean"], found["std"] = NORMALISATIONS["imagenet"]
    if wanted:
        found["mean"], found["std"] = NORMALISATIONS.get(wanted.normalisation or "imagenet", NORMALISATIONS["imagenet"])
        if not method.clean_features:
            found["policy"] = wanted.policy if wanted.views > 1 else "clean"
    found["image_size"] = settings.image_size or (wanted and wanted.input_size) or PUBLISHED_SIZE
    several = [f"source={source.name}"] if len(source.parts) > 1 else []
    return [*several, *list_deviations(method, source.kind, found)]
