"""What a method is trained on: the faces of one manifest, or of several as one, with stores that are alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from cafe.data.manifest import Manifest, hold_out_rows
from cafe.data.union import Union, parts_of, unite
from cafe.errors import UserError
from cafe.learning.loading import SMALLEST_BATCH, KeptPictures
from cafe.methods import find_method
from cafe.pipeline.cluster import free_memory
from cafe.pipeline.faces import PICTURES_SHARE, Faces, Store, any_store, choose_store
from cafe.pipeline.features.integrity import find_stores
from cafe.pipeline.features.key import StoreInfo, describe_policy
from cafe.pipeline.features.store import FeatureReader
from cafe.pipeline.settings import TrainSettings
from cafe.pipeline.workspace import Workspace
from cafe.results.protocols import find_protocol

HELD_OUT = 0.1  # of the training faces of a source, for `source_val`
NEEDED = ("source_val", "source_test")  # selections that need faces of the source besides those trained on


@dataclass(frozen=True)
class UnitedFaces:
    """The faces of several manifests as one: rows are those of their `Union`, each with the features of its own store."""

    parts: tuple[Faces, ...]

    channels = "rgb"  # as of every source

    def __getstate__(self) -> dict[str, Any]:
        return {"parts": self.parts}

    @cached_property
    def manifest(self) -> Union:
        """The union of the manifests."""
        union = unite([part.manifest for part in self.parts])
        assert isinstance(union, Union)
        return union

    @cached_property
    def pictures(self) -> KeptPictures:
        """The pictures of all of them, kept decoded while there is room."""
        return KeptPictures(self.manifest, int(PICTURES_SHARE * free_memory()))

    @property
    def about(self) -> StoreInfo | None:
        """What the first store is; in all that a training reads the others are like it."""
        return self.parts[0].about

    def reader(self, names: Sequence[str]) -> UnitedReader | None:
        """Return what reads these arrays of the stores."""
        readers = [reader for part in self.parts if (reader := part.reader(names))]
        return UnitedReader(self.manifest, readers) if readers else None

    def gather(self, choose: Callable[[Faces], np.ndarray]) -> np.ndarray:
        """Return the rows that are chosen of each manifest."""
        starts = self.manifest.starts
        return np.concatenate([choose(part) + start for part, start in zip(self.parts, starts, strict=True)])


@dataclass(frozen=True)
class UnitedReader:
    """The features of any rows of a union, each read from the store of its manifest."""

    union: Union
    readers: list[FeatureReader]

    def read(self, rows: np.ndarray, view: int) -> dict[str, np.ndarray]:
        """Return {array: (n, …)} of one view of some rows."""
        domains, arrays = self.union.domains[rows], dict[str, np.ndarray]()
        for domain in np.unique(domains):
            own = domains == domain
            for name, values in self.readers[domain].read(rows[own] - self.union.starts[domain], view).items():
                arrays.setdefault(name, np.empty((len(rows), *values.shape[1:]), values.dtype))[own] = values
        return arrays


def split_names(text: str) -> list[str]:
    """Return the names in a comma-separated list of sources, sorted, so that their order changes no run."""
    names = sorted(name for part in text.split(",") if (name := part.strip()))
    if not names or len(set(names)) < len(names):
        raise UserError(f"The source {text!r} must be one manifest or different ones, comma-separated.")
    return names


def find_faces(workspace: Workspace, manifest: Manifest, stores: Iterable[Store | None]) -> Faces | UnitedFaces:
    """Return the faces of a manifest or a union with their stores, or any that know which images are unreadable."""
    faces = [
        Faces.of(workspace, part, store or any_store(workspace, part))
        for part, store in zip(parts_of(manifest), stores, strict=True)
    ]
    return unite_faces(faces)


def unite_faces(parts: Sequence[Faces]) -> Faces | UnitedFaces:
    """Return the faces of several manifests as one, or the only ones as they are."""
    return parts[0] if len(parts) == 1 else UnitedFaces(tuple(parts))


def choose_stores(workspace: Workspace, manifest: Manifest, settings: TrainSettings) -> list[Store | None]:
    """Return the store of each source for a method that needs a tower; any other learns as published unless told otherwise.

    `settings.store` may name one for each source. Raises `UserError` where a store is missing.
    """
    folders = settings.store.split(",") if settings.store else []
    chosen = []
    for part in parts_of(manifest):
        there = {path.name for path, _ in find_stores(workspace.features, part.name)} if folders else set()
        folder = next((folder for folder in folders if folder in there), settings.store)
        chosen.append(_choose_store(workspace, part, replace(settings, source=part.name, store=folder)))
    return chosen


def _choose_store(workspace: Workspace, manifest: Manifest, settings: TrainSettings) -> Store | None:
    method = find_method(settings.method)
    store = None
    if settings.backbone != "none" and (method.needs_tower() or settings.backbone or settings.store):
        choice = settings
        if method.clean_features:  # it augments its images by itself, whatever the store holds
            choice = replace(settings, policy=None, views=None, view_seed=None)
        elif settings.live:
            choice = replace(settings, policy=None)
        elif settings.views == 1 or not method.trained:  # the clean view is the same by every seed
            choice = replace(settings, view_seed=None)
        store = choose_store(workspace, manifest, choice, method)
    _check_store(settings, store[1] if store else None)
    return store


def _check_store(settings: TrainSettings, store: StoreInfo | None) -> None:
    method = find_method(settings.method)
    if settings.backbone == "none" and method.needs_tower():
        raise UserError(f"{settings.method} needs a frozen tower: leave out --backbone none.")
    if settings.live and not (method.needs_features() and method.trained):
        raise UserError(f"{settings.method} is not trained on a frozen tower's features: leave out --live.")
    if store is None and method.needs_tower():
        raise UserError(
            f"{settings.method} needs frozen features of {settings.source!r}: run `cafe extract {settings.source}` first."
        )
    if store and store.map_shape is None and "map" in method.needs:
        raise UserError(
            f"{settings.method} needs feature maps of {settings.source!r}: run `cafe extract {settings.source} --maps`."
        )


def describe_stores(manifest: Manifest, stores: Sequence[Store | None], settings: TrainSettings) -> StoreInfo | None:
    """Return what the stores of the sources are together; raise `UserError` naming in what they differ.

    They must be of one tower and one draw of views; they may hold more views than are used, or maps besides.
    """
    found = [store[1] for store in stores if store]
    if len(found) < 2:
        return found[0] if found else None
    method = find_method(settings.method)
    used: dict[str, Any] = {"images": manifest.image_digest, "maps": "map" in method.needs}
    if method.clean_features or not method.trained:  # only the clean view is read
        used |= {name: getattr(found[0].key, name) for name in ("policy", "view_seed", "views")}
    elif settings.live:
        used |= {name: getattr(found[0].key, name) for name in ("policy", "views")}
    elif settings.views == 1:
        used |= {"policy": describe_policy("clean"), "view_seed": 0, "views": 1}
    elif settings.views:
        used["views"] = settings.views
    first, *others = [replace(about.key, **used) for about in found]
    for about, key in zip(found[1:], others, strict=True):
        differing = [name for name, value in vars(first).items() if vars(key)[name] != value]
        if differing:
            raise UserError(
                f"The features of {found[0].manifest!r} and {about.manifest!r} differ in {', '.join(differing)}: choose "
                "some that are alike with --backbone, --views, --policy, --view-seed or --store, or run `cafe extract "
                f"{about.manifest}` with the options of {found[0].manifest!r}."
            )
    return replace(found[0], key=first, manifest=manifest.name, rows=len(manifest))


def choose_rows(source: Faces | UnitedFaces, selection: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the source's rows to train on and those on which the epoch is selected; no target is involved.

    `source_val` takes the data set's own validation split, or holds a tenth of the train split out where there is none or
    where it is what is judged, as of AffectNet and SFEW. Of several sources it always holds a tenth of each one out, as
    DomainBed's training-domain validation does, so that none is heard more for having a large validation split.
    """
    if isinstance(source, UnitedFaces):
        chosen = [_choose_rows(part, selection, own_val=False) for part in source.parts]
        train, held_out = (iter(rows) for rows in zip(*chosen, strict=True))
        return source.gather(lambda _: next(train)), source.gather(lambda _: next(held_out))
    return _choose_rows(source, selection)


def _choose_rows(faces: Faces, selection: str, own_val: bool = True) -> tuple[np.ndarray, np.ndarray]:
    train = faces.rows("train")
    if selection == "source_test":
        return train, faces.rows("test")
    if selection != "source_val":
        return train, train[:0]
    val = faces.rows("val")
    judged = find_protocol("clean").split(faces.manifest, faces.manifest.kind)
    return (train, val) if own_val and len(val) and judged != "val" else hold_out_rows(faces.manifest, train, HELD_OUT)


def check_domains(settings: TrainSettings, names: Sequence[str]) -> None:
    """Raise `UserError` for a sampler, a selection or a fold that these sources have no use for."""
    selection, alone = settings.selection, f"several sources, not {settings.source!r} alone"
    if settings.sampler == "balanced" and len(names) == 1:
        raise UserError(f"--sampler balanced needs {alone}: leave it out.")
    if selection == "leave_one_out" and len(names) == 1:
        raise UserError(f"--selection leave_one_out needs {alone}: choose the epoch by source_val.")
    if selection == "oracle" and not settings.fold:
        raise UserError("--selection oracle looks at the domain left out: name it with --fold.")
    if selection in ("leave_one_out", "oracle") and not find_method(settings.method).trained:
        raise UserError(f"{settings.method} has no epochs to choose from: leave out --selection {selection}.")
    if settings.fold in names:
        raise UserError(
            f"--fold {settings.fold} is one of the sources {settings.source!r}: name a domain they leave out."
        )


def check_faces(source: Faces, settings: TrainSettings) -> None:
    """Raise `UserError` where a source has too few faces to train on, or none to choose the epoch by."""
    train, held_out = choose_rows(source, settings.selection)
    if len(train) < SMALLEST_BATCH:
        raise UserError(f"{source.name!r} has {len(train)} training faces: at least {SMALLEST_BATCH} are needed.")
    if settings.selection in NEEDED and not len(held_out):
        raise UserError(
            f"{source.name!r} has no faces for --selection {settings.selection}: choose the epoch by source_val, or take "
            "the last one with final."
        )
