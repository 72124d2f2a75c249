"""The plan of a grid: what a benchmark file asks of this workspace, what is there already, and what the rest costs.

Nothing is computed here and no tower is loaded, so it can be looked at before anything is started.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

from upath import UPath

from cafe.data.manifest import Manifest
from cafe.errors import UserError
from cafe.results.protocols import find_protocol
from cafe.towers.building import NORMALISATIONS
from cafe.towers.names import absolute_name
from pipeline.evaluate import is_judged
from pipeline.extract import Extraction
from pipeline.grid import Entry, Grid
from pipeline.runs import Target, check_network, choose_rows, is_finished
from pipeline.settings import BenchmarkSettings, ExtractSettings, TrainSettings
from pipeline.store import About, FeatureStore, describe_policy, find_stores
from pipeline.train import TrainPlan, find_recipe, plan_training
from pipeline.workspace import Workspace, list_folder, read_json

RATE_EPOCHS = 3  # of a run, the last ones, from which its speed is taken

StoreKey = tuple[str, ExtractSettings]
Store = tuple[UPath, About]
Shared = tuple[str, str, str, int | None]  # source, tower, policy, and views of maps that have their own number
Made = Mapping[StoreKey, Store | str]  # stores of this session, or why there is none


@dataclass(frozen=True)
class Library(Workspace):
    """A workspace that reads a manifest once: a grid asks for the same few again and again."""

    manifests: dict[str, Manifest] = field(default_factory=dict, compare=False)

    def load_manifest(self, name: str) -> Manifest:
        """Load a manifest by name; raise `UserError`."""
        if name not in self.manifests:
            self.manifests[name] = super().load_manifest(name)
        return self.manifests[name]


@dataclass(frozen=True)
class StorePlan:
    """A feature store the grid needs, what there is of it, and why it cannot be used if it cannot."""

    manifest: Manifest
    settings: ExtractSettings
    found: Store | None = None
    pending: int = 0  # faces without features yet
    obstacle: str = ""

    @property
    def key(self) -> StoreKey:
        """Names the store before the tower's weights are known."""
        return self.manifest.name, self.settings

    @property
    def passes(self) -> int:
        """How often the tower runs to fill it."""
        return len(self.manifest) * self.settings.views

    @property
    def passes_left(self) -> int:
        """How often it still has to run."""
        return self.pending * self.settings.views


@dataclass(frozen=True, eq=False)
class Line:
    """One method on one source with one tower: cells that differ in nothing but their seed."""

    source: str
    entry: Entry
    title: str  # the method with what it changes and, where there are several, its tower
    epochs: int
    faces: int  # that an epoch trains on
    tower_passes: int  # of one training and judging as published, without a store
    stores: tuple[StorePlan, ...]
    plan: TrainPlan | None  # with any seed; None while features are missing
    obstacle: str = ""  # why its cells cannot run


@dataclass(frozen=True, eq=False)
class Cell:
    """One run of the grid."""

    line: Line
    seed: int

    @property
    def name(self) -> str:
        """What `--only` is matched with."""
        return f"{self.line.source}/{self.line.title}/s{self.seed}"

    @property
    def plan(self) -> TrainPlan | None:
        """The run of this seed."""
        plan = self.line.plan
        if plan is None:
            return None
        settings, spec = replace(plan.settings, seed=self.seed), replace(plan.spec, seed=self.seed)
        return replace(plan, settings=settings, spec=spec)

    @property
    def work(self) -> int:
        """Faces × epochs of its training; what is not trained in epochs looks at every face once."""
        return self.line.faces * max(1, self.line.epochs)

    @cached_property
    def done(self) -> bool:
        """Whether it is trained and judged on all targets."""
        plan = self.plan
        return (
            plan is not None and is_finished(plan.run) and all(is_judged(plan.run, target) for target in plan.targets)
        )

    @cached_property
    def records(self) -> list[UPath]:
        """The records of the epochs that are trained."""
        return list_folder(self.plan.run / "epochs") if self.plan else []

    @property
    def worked(self) -> int:
        """How many faces × epochs are behind it."""
        return self.work if self.done else min(self.work, self.line.faces * len(self.records))


@dataclass(frozen=True)
class BenchmarkPlan:
    """A checked grid: its cells in the order they run, and the stores they share."""

    grid: Grid
    workspace: Workspace
    settings: BenchmarkSettings
    cells: tuple[Cell, ...]

    @cached_property
    def lines(self) -> tuple[Line, ...]:
        """The lines of all cells, in the order of the file."""
        return tuple({(cell.line.source, cell.line.title): cell.line for cell in self.cells}.values())

    @cached_property
    def stores(self) -> tuple[StorePlan, ...]:
        """The stores that cells need, each once."""
        return tuple({store.key: store for line in self.lines for store in line.stores}.values())

    @property
    def missing_stores(self) -> list[StorePlan]:
        """The stores to be filled before their cells can run."""
        wanted = {store.key for line in self.lines if not line.obstacle for store in line.stores}
        return [store for store in self.stores if store.pending and store.key in wanted]

    @property
    def published_passes(self) -> int:
        """Tower passes without stores: every cell runs the tower on every face of every epoch and on all its targets."""
        return sum(cell.line.tower_passes for cell in self.cells)

    @property
    def store_passes(self) -> int:
        """Tower passes with stores: every face once per view, whatever the number of methods and seeds."""
        return sum(store.passes for store in self.stores)

    @property
    def work(self) -> int:
        """Faces × epochs of all cells that can run."""
        return sum(cell.work for cell in self.cells if not cell.line.obstacle)

    @property
    def worked(self) -> int:
        """How many of them are behind."""
        return sum(cell.worked for cell in self.cells if not cell.line.obstacle)

    def seconds_left(self, parallel: int) -> float | None:
        """Estimate the time of the training left from the speed of epochs already trained; None when there are none.

        A line without any goes by the median of the others.
        """
        speeds: dict[str, list[float]] = {}
        for cell in self.cells:
            for record in map(read_json, cell.records[-RATE_EPOCHS:]):
                if record and "faces_per_second" in record:
                    speeds.setdefault(cell.line.title, []).append(record["faces_per_second"])
        if not speeds:
            return None
        medians = {title: statistics.median(values) for title, values in speeds.items()}
        usual = statistics.median(medians.values())
        left = [(cell.work - cell.worked, cell.line) for cell in self.cells if not cell.line.obstacle]
        return sum(faces / medians.get(line.title, usual) for faces, line in left) / parallel


def plan_benchmark(
    workspace: Workspace, grid: Grid, settings: BenchmarkSettings, made: Made | None = None
) -> BenchmarkPlan:
    """Look up what a grid asks for and how far it is; nothing is computed and no tower is loaded.

    Raises `UserError` for what is wrong with the file; what only keeps some cells from running is their `obstacle`.
    """
    workspace = workspace if isinstance(workspace, Library) else Library(workspace.root)
    combinations = [_Combination.of(workspace, grid, *found) for found in grid.combinations()]
    stores = _plan_stores(workspace, grid, combinations, made or {})
    lines = [_plan_line(workspace, grid, one, stores) for one in combinations]
    cells = [Cell(line, seed) for seed in grid.seeds for line in lines]  # a whole table of the first seed comes first
    if settings.only:
        chosen = [cell for cell in cells if fnmatchcase(cell.name, settings.only)]
        if not chosen:
            raise UserError(f"No cell matches --only {settings.only!r}: they are called like {cells[0].name!r}.")
        cells = chosen
    return BenchmarkPlan(grid, workspace, settings, tuple(cells))


@dataclass(frozen=True)
class _Combination:
    """A source, a method and a tower, before anything is known of their stores."""

    source: Manifest
    entry: Entry
    tower: str | None
    settings: TrainSettings
    epochs: int

    @classmethod
    def of(cls, workspace: Workspace, grid: Grid, source: str, entry: Entry, tower: str | None) -> _Combination:
        manifest, settings = workspace.load_manifest(source), grid.train_settings(source, entry, tower)
        return cls(manifest, entry, tower, settings, find_recipe(settings, manifest.kind).epochs)

    @property
    def maps(self) -> bool:
        """Whether it needs feature maps."""
        return "map" in self.entry.kind.needs

    @property
    def shared(self) -> Shared:
        """What methods have in common that share the source's store; maps are large, so their own views stay apart."""
        assert self.tower is not None
        return self.source.name, self.tower, self.entry.kind.policy, self.entry.views if self.maps else None

    def views(self, grid: Grid) -> int:
        """Return how many views it uses: by default one for every epoch and the clean one, as published."""
        return self.entry.views or grid.views or self.epochs + 1


class _Stores:
    """The stores of a grid: one per source, tower and policy, and one per target that no such store serves."""

    def __init__(self) -> None:
        self.sources: dict[Shared, StorePlan] = {}
        self.targets: dict[tuple[str, str], StorePlan] = {}

    def of(self, one: _Combination, targets: Iterable[str]) -> tuple[StorePlan, ...]:
        """Return the stores a combination needs, its source's first."""
        if one.tower is None:
            return ()
        judged = [self.targets[target, one.tower] for target in targets] if one.entry.reads_features else []
        return (self.sources[one.shared], *judged)


def _plan_stores(workspace: Workspace, grid: Grid, combinations: Sequence[_Combination], made: Made) -> _Stores:
    stores = _Stores()
    sharing: dict[Shared, list[_Combination]] = {}
    for one in combinations:
        if one.tower:
            sharing.setdefault(one.shared, []).append(one)

    def plan(manifest: Manifest, tower: str, **changes: Any) -> StorePlan:
        settings = ExtractSettings(**{**grid.features, "backbone": absolute_name(tower), **changes})
        return _look_up(workspace, manifest, settings, made)

    for shared, members in sharing.items():
        source, tower, policy, _ = shared
        views = max(one.views(grid) for one in members)
        changes = {"policy": policy} if views > 1 else {}
        maps = any(one.maps for one in members)
        stores.sources[shared] = plan(workspace.load_manifest(source), tower, views=views, maps=maps, **changes)

    for tower in dict.fromkeys(one.tower for one in combinations if one.tower and one.entry.reads_features):
        maps = any(one.maps for one in combinations if one.tower == tower)
        for target in grid.targets:
            manifest = workspace.load_manifest(target)
            channels = find_protocol(grid.protocol).channels(manifest.kind)
            fitting = [
                store
                for (source, its, *_), store in stores.sources.items()
                if (source, its, channels) == (target, tower, "rgb") and store.settings.maps >= maps
            ]
            own = fitting[0] if fitting else plan(manifest, tower, views=1, maps=maps, channels=channels)
            stores.targets[target, tower] = own
    return stores


def _look_up(workspace: Workspace, manifest: Manifest, settings: ExtractSettings, made: Made) -> StorePlan:
    """Return what there is of a store; without loading the tower, so it is told by what it says of itself.

    A store with more views, or with maps besides, serves as well.
    """
    result = made.get((manifest.name, settings))
    if isinstance(result, str):
        return StorePlan(manifest, settings, pending=len(manifest), obstacle=result)
    fitting = [store for store in find_stores(workspace.features, manifest.name) if _fits(store[1], manifest, settings)]
    smallest = min((_size(about) for _, about in fitting), default=None)
    found = [result] if result else [store for store in fitting if _size(store[1]) == smallest]
    if len(found) != 1:  # several differ in something only the tower can tell
        return StorePlan(manifest, settings, pending=len(manifest))
    path, about = found[0]
    store = FeatureStore(path, about)
    pending = store.pending()
    faces = sum(len(store.rows_of(shard)) for shard in pending)
    skipped = [] if pending else store.skipped_paths(manifest)
    extraction = Extraction(path, about, store.shards, 0, skipped)
    complaint = extraction.complaint(settings.max_skipped) if len(skipped) > settings.max_skipped else ""
    return StorePlan(manifest, settings, (path, about), faces, complaint)


def _fits(about: About, manifest: Manifest, settings: ExtractSettings) -> bool:
    key = about.key
    wanted = {
        "images": manifest.image_digest,
        "precision": settings.precision,
        "interpolation": settings.interpolation,
        "dtype": settings.dtype,
        "channels": settings.channels,
        "input_size": settings.input_size or key.input_size,
        "normalisation": NORMALISATIONS.get(settings.normalisation or "", key.normalisation),
    }
    if settings.views > 1:  # the clean view is the same by every policy
        wanted |= {"policy": describe_policy(settings.policy), "view_seed": settings.view_seed}
    same = about.backbone_name == settings.backbone and all(getattr(key, name) == wanted[name] for name in wanted)
    return same and key.views >= settings.views and key.maps >= settings.maps


def _size(about: About) -> tuple[int, bool]:
    return about.key.views, about.key.maps


def _plan_line(workspace: Workspace, grid: Grid, one: _Combination, stores: _Stores) -> Line:
    needed = stores.of(one, grid.targets)
    protocol = find_protocol(grid.protocol)
    targets = [workspace.load_manifest(name) for name in grid.targets]
    judged = sum(len(target.rows(split)) for target in targets if (split := protocol.split(target, one.source.kind)))
    train, held_out = choose_rows(Target(one.source, None), one.settings.selection)
    passes = max(1, one.epochs) * (len(train) + len(held_out)) + judged if one.entry.reads_features else 0
    plan, obstacle = None, next((store.obstacle for store in needed if store.obstacle), "")
    try:
        check_network(one.settings.network, one.settings.init)
        if not obstacle and not any(store.pending for store in needed):
            plan = plan_training(workspace, _choose(one, needed, grid))
    except UserError as error:
        obstacle = obstacle or str(error)
    several = len({other for _, _, other in grid.combinations() if other}) > 1
    title = f"{one.entry.label} on {one.tower}" if several and one.tower else one.entry.label
    return Line(one.source.name, one.entry, title, one.epochs, len(train), passes, needed, plan, obstacle)


def _choose(one: _Combination, stores: Sequence[StorePlan], grid: Grid) -> TrainSettings:
    """Return settings with the number of views and, where a tower is used, the very store of the source."""
    settings = replace(one.settings, views=one.views(grid))
    if not stores:
        return settings
    assert stores[0].found is not None
    return replace(settings, backbone=None, store=stores[0].found[1].folder)


def expect_parallel(settings: BenchmarkSettings) -> int:
    """Guess how many cells will run at a time, for an estimate before Ray is started."""
    cores = 1 if settings.address else settings.num_cpus or len(os.sched_getaffinity(0))
    return settings.parallel or cores
