"""What a grid consists of: the feature stores it needs, and its cells, each one run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from upath import UPath

from cafe.data.manifest import Manifest
from cafe.pipeline.benchmark.file import Entry
from cafe.pipeline.faces import Faces
from cafe.pipeline.need import Store
from cafe.pipeline.plan import TrainPlan
from cafe.pipeline.settings import ExtractSettings, TrainSettings
from cafe.results.runs import list_epochs
from cafe.towers.names import single_names

StoreName = tuple[str, ExtractSettings]  # names a store before the weights of its tower are known


class Sharing(NamedTuple):
    """What cells that read one store of a source have in common."""

    source: str
    tower: str
    policy: str
    view_seed: int
    own_views: int | None  # an entry's own number of views of maps


@dataclass(frozen=True)
class StorePlan:
    """A feature store the grid needs, what there is of it, and why it cannot be used if it cannot."""

    manifest: Manifest
    settings: ExtractSettings
    found: Store | None = None
    pending: int = 0  # faces without features yet
    obstacle: str = ""

    @property
    def name(self) -> StoreName:
        """Names the store."""
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
class Cell:
    """One run of the grid: a method on a source, or a union of several, with a tower and a seed."""

    source: Faces
    entry: Entry
    tower: str | None
    settings: TrainSettings
    title: str  # the method with what it changes and, where there are several, its tower
    epochs: int
    view_seed: int = 0  # of the features it reads
    faces: int = 0  # that an epoch trains on
    tower_passes: int = 0  # of training and evaluating as published, without a store
    stores: tuple[StorePlan, ...] = ()
    plan: TrainPlan | None = None  # None while features are missing
    deviations: tuple[str, ...] = ()  # from what was published of its method
    obstacle: str = ""  # why it cannot run

    @property
    def name(self) -> str:
        """What `--only` is matched with."""
        draw = "" if self.settings.draw is None else f"/d{self.settings.draw}"
        return f"{self.source_name}/{self.title}/s{self.settings.seed}{draw}"

    @property
    def source_name(self) -> str:
        """What the plan calls its source."""
        return f"all but {self.settings.fold}" if self.settings.fold else self.source.name

    @property
    def evaluated_on(self) -> list[str]:
        """The manifests it is evaluated on."""
        return (self.settings.targets or "").split(",")

    @property
    def maps(self) -> bool:
        """Whether it needs feature maps."""
        return "map" in self.entry.kind.needs

    @property
    def own_views(self) -> int | None:
        """How many views of the source it reads features of, where that is its own number."""
        return 1 if self.entry.kind.clean_features else self.entry.views

    @property
    def sharings(self) -> list[Sharing]:
        """What it has in common, for each of its sources and layers, with the cells that share this source's store.

        Maps are large, so cells with their own number of views of them stay apart.
        """
        if not self.tower:
            return []
        own_views = self.own_views if self.maps else None
        return [
            Sharing(part.name, tower, self.entry.kind.policy, self.view_seed, own_views)
            for part in self.source.parts
            for tower in self.towers
        ]

    @property
    def towers(self) -> list[str]:
        """The name of its tower with each of the layers that it reads side by side."""
        return single_names(self.tower) if self.tower else []

    @property
    def folds(self) -> int:
        """How many trainings on all sources but one choose its epoch; together they see each source one time less."""
        return len(self.source.parts) if self.settings.selection == "leave_one_out" else 0

    @property
    def work(self) -> int:
        """Faces × epochs of its trainings; what is not trained in epochs looks at every face once."""
        return self.faces * max(1, self.epochs) * max(1, self.folds)

    @cached_property
    def done(self) -> bool:
        """Whether it is trained and evaluated on all targets."""
        return self.plan is not None and self.plan.done

    @cached_property
    def records(self) -> list[UPath]:
        """The records of the epochs that are trained."""
        return list(list_epochs(self.plan.run).values()) if self.plan else []

    @property
    def worked(self) -> int:
        """How many faces × epochs are behind it."""
        if self.done or self.plan is None:
            return self.work if self.done else 0
        folds = sum(len(list_epochs(fold.run)) for fold in self.plan.folds)
        faces = self.faces * len(self.records) + self.faces * (self.folds - 1) * folds // max(1, self.folds)
        return min(self.work, faces)

    def with_seed(self, seed: int, draw: int | None = None) -> Cell:
        """Return the cell of another seed, of a sweep of another draw."""
        plan = self.plan.with_seed(seed, draw) if self.plan else None
        return replace(self, settings=replace(self.settings, seed=seed, draw=draw), plan=plan)
