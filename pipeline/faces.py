"""Faces: a manifest with the feature store that serves, used as the source of a training and as a target to judge.

Which of a manifest's stores serves is decided here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from upath import UPath

from cafe.data.manifest import SPLITS, Manifest
from cafe.errors import UserError
from cafe.learning.loading import KeptPictures
from cafe.methods import find_method
from cafe.methods.method import Method
from cafe.pipeline.cluster import free_memory
from cafe.pipeline.features.integrity import Receipts, check_description, find_stores
from cafe.pipeline.features.key import StoreInfo
from cafe.pipeline.features.store import FeatureReader
from cafe.pipeline.runs import RunSpec
from cafe.pipeline.settings import StoreChoice
from cafe.pipeline.workspace import Workspace
from cafe.records import FORMAT
from cafe.results.predictions import predictions_path
from cafe.results.protocols import OPTIONS, Protocol, find_protocol
from cafe.towers.names import absolute_name, short_name

if TYPE_CHECKING:
    from cafe.pipeline.features.store import FeatureStore

# What may differ between the store a method was trained on and that of a target: the faces, and how they were augmented,
# since only the clean view 0 is judged.
TARGET_MAY_DIFFER = ("images", "policy", "view_seed", "views", "maps")

PICTURES_SHARE = 0.2  # of the free memory that decoded pictures of a source may take

Store = tuple[UPath, StoreInfo]


@dataclass(frozen=True)
class Faces:
    """The faces of a manifest and, where there is one, the store of their frozen features.

    `protocol` and `split` say how they are judged, `title` what they are then called in files and tables: by their name,
    with the split when it is not the one of the protocol. Other processes are given the places alone: what this one has
    opened stays here.
    """

    place: UPath  # of the manifest
    digest: str  # of the manifest
    store: UPath | None = None
    about: StoreInfo | None = None
    protocol: str = "clean"
    split: str = "test"
    title: str = ""

    @classmethod
    def of(cls, workspace: Workspace, manifest: Manifest, store: Store | None = None, **judged: Any) -> Faces:
        """Return the faces of a manifest that is read already."""
        faces = cls(workspace.manifest_path(manifest.name), manifest.digest, *(store or (None, None)), **judged)
        vars(faces)["manifest"] = manifest
        return faces

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def name(self) -> str:
        """The name of the manifest."""
        return self.place.stem

    @property
    def parts(self) -> tuple[Faces, ...]:
        """The faces of each manifest: these alone."""
        return (self,)

    @cached_property
    def manifest(self) -> Manifest:
        """The manifest; raises `UserError` when it is no longer the one that was planned with."""
        manifest = Manifest.load(self.place)
        if manifest.digest != self.digest:
            raise UserError(f"The manifest {self.name!r} has changed since this command began: give it again.")
        return manifest

    @cached_property
    def pictures(self) -> KeptPictures:
        """The pictures of the manifest, kept decoded while there is room."""
        return KeptPictures(self.manifest, int(PICTURES_SHARE * free_memory()))

    @cached_property
    def _features(self) -> FeatureStore | None:
        """The feature store, opened."""
        from cafe.pipeline.features.store import FeatureStore  # Zarr, which no plan needs

        return FeatureStore(self.store, self.about) if self.store and self.about else None

    @cached_property
    def _valid(self) -> np.ndarray | None:
        """Which rows have features, (N,) bool; None without a store."""
        return Receipts(self.store, self.about).valid() if self.store and self.about else None

    @cached_property
    def _readers(self) -> dict[tuple[str, ...], FeatureReader]:
        return {}

    def reader(self, names: Sequence[str]) -> FeatureReader | None:
        """Return what reads these arrays of the store; views it has read are kept with these faces."""
        if self._features is None or not names:
            return None
        return self._readers.setdefault(tuple(sorted(names)), FeatureReader(self._features, sorted(names)))

    @property
    def channels(self) -> str:
        """The order of the colours in which they are judged."""
        return find_protocol(self.protocol).channels(self.manifest.kind)

    def predictions_path(self, run: UPath) -> UPath:
        """Where a run's predictions for them are kept."""
        return predictions_path(run, self.title, self.protocol)

    def rows(self, split: str) -> np.ndarray:
        """The rows of a split that have features; all of them without a store."""
        rows = self.manifest.rows(split)
        return rows if self._valid is None else rows[self._valid[rows]]


@dataclass(frozen=True)
class Wanted:
    """What a store must be to serve: what must be equal, how many views it has at least, and whether maps besides."""

    equal: Mapping[str, Any]  # fields of the key; or backbone_name, folder, policy_name
    views: int = 1
    maps: bool = False

    def differences(self, about: StoreInfo) -> list[str]:
        """Return in what a store does not serve, as `field: wanted against found`."""
        key = about.key
        found = {"backbone_name": about.backbone_name, "folder": about.folder, "policy_name": key.policy["name"]}
        found |= {"format": about.version, **vars(key)}
        pairs = [(name, value, found[name]) for name, value in {"format": FORMAT, **self.equal}.items()]
        pairs += [("views", self.views, key.views)] if key.views < self.views else []
        pairs += [("maps", self.maps, key.maps)] if key.maps < self.maps else []
        return [f"{name}: {_short(wanted)} against {_short(there)}" for name, wanted, there in pairs if wanted != there]


def fitting_stores(stores: Iterable[Store], wanted: Wanted) -> list[Store]:
    """Return the stores that serve, those with the fewest views and without maps first."""
    fitting = [store for store in stores if not wanted.differences(store[1])]
    return sorted(fitting, key=lambda store: (store[1].key.views, store[1].key.maps))


def choose_store(workspace: Workspace, manifest: Manifest, choice: StoreChoice, method: type[Method]) -> Store | None:
    """Return the only store of a source that fits the choice, or None when it has no stores at all.

    Of several, those go first that hold just what the method needs, the fewest views that are enough, its published policy.
    Raises `UserError` when none or several fit, when the chosen one was made of other images, or is unfinished.
    """
    stores = find_stores(workspace.features, manifest.name)
    asked, command = _options(choice), f"cafe extract {manifest.name} {_options(replace(choice, store=None))}".rstrip()
    if not stores:
        if asked:
            raise UserError(f"There are no features of {manifest.name!r} yet: run `{command}`.")
        return None
    known = {"folder": choice.store, "policy_name": choice.policy, "view_seed": choice.view_seed}
    # Features in BGR order are for targets alone.
    wanted = {"channels": "rgb", **{name: value for name, value in known.items() if value not in (None, "")}}
    backbone = absolute_name(choice.backbone) if choice.backbone else None
    named = [store for store in stores if backbone in (None, *_names(store[1]))]
    there = "; ".join(f"{about.describe()}, {about.key.policy['name']}{_view_seed(about)}" for _, about in stores)
    fitting = fitting_stores(named, Wanted(wanted, choice.views or 1))
    if not fitting:
        raise UserError(
            f"No features of {manifest.name!r} fit {asked or 'a training'} (there are: {there}): run `{command}`."
        )
    current = fitting_stores(fitting, Wanted({"images": manifest.image_digest}))
    if not current:
        raise UserError(
            f"The features of {manifest.name!r} were made of other images than its manifest lists now: run `{command}` "
            "again."
        )
    current = [store for store in current if store[1].key.maps == ("map" in method.needs)] or current
    if choice.views:
        current = [store for store in current if store[1].key.views == current[0][1].key.views]
    current = [store for store in current if store[1].key.policy["name"] == method.policy] or current
    if len(current) > 1:
        raise UserError(
            f"{len(current)} feature stores of {manifest.name!r} fit: choose one with --backbone, --views, --policy or "
            f"--view-seed ({there})."
        )
    return _finished(current[0])


def any_store(workspace: Workspace, manifest: Manifest) -> Store | None:
    """Return any finished store of a manifest: where nobody reads features, it tells which images are unreadable."""
    stores = find_stores(workspace.features, manifest.name)
    current = fitting_stores(stores, Wanted({"images": manifest.image_digest}))
    return next((store for store in current if not Receipts(*store).pending()), None)


def choose_target(
    workspace: Workspace, name: str, spec: RunSpec, protocol: Protocol, split: str | None = None
) -> Faces:
    """Return a target as the protocol judges it, or on another split, with the store that matches the run's tower.

    Raises `UserError` when the protocol has no way to judge it or when the run needs features and there are none.
    """
    manifest = workspace.load_manifest(name)
    judged = protocol.split(manifest, *(source.kind for source in spec.trained_on))
    chosen = split or judged
    if chosen is None:
        raise UserError(
            f"The protocol {protocol.name!r} has no way to judge {name!r} ({protocol.about}): leave it out with "
            f"--targets, or judge it apart with `cafe evaluate RUN --targets {name} --split SPLIT`."
        )
    if not len(manifest.rows(chosen)):
        there = ", ".join(split for split in SPLITS if len(manifest.rows(split)))
        raise UserError(f"{name!r} has no faces in the split {chosen!r}: choose {there}, or leave it out.")
    if find_method(spec.method).needs_features():
        store: Store | None = _matching_store(workspace, manifest, spec, protocol)
    else:
        store = any_store(workspace, manifest)
    title = name if chosen == judged else f"{name}@{chosen}"
    faces = Faces.of(workspace, manifest, store, protocol=protocol.name, split=chosen, title=title)
    if not len(faces.rows(chosen)):
        raise UserError(
            f"No face of {name!r} in the split {chosen!r} is readable: see why with `cafe data check {name}`, or leave it "
            "out with --targets."
        )
    return faces


def choose_targets(
    workspace: Workspace, wanted: str | None, spec: RunSpec, protocol: str, split: str | None = None
) -> list[Faces]:
    """Return the targets of a comma-separated list, of all manifests when there is none, of nothing for `none`."""
    if wanted == "none":
        return []
    names = workspace.manifest_names() if wanted is None else [part.strip() for part in wanted.split(",")]
    return [choose_target(workspace, name, spec, find_protocol(protocol), split) for name in names if name]


def _matching_store(workspace: Workspace, manifest: Manifest, spec: RunSpec, protocol: Protocol) -> Store:
    assert spec.features is not None
    maps, channels = "map" in find_method(spec.method).needs, protocol.channels(manifest.kind)
    key = {name: value for name, value in vars(spec.features).items() if name not in TARGET_MAY_DIFFER}
    drawn = _find_views(spec, protocol)
    equal = {"policy_name": drawn.policy, "view_seed": drawn.view_seed}
    equal = {name: value for name, value in equal.items() if value is not None}
    wanted = Wanted({**key, "channels": channels, **equal}, drawn.views or 1, maps)
    stores = find_stores(workspace.features, manifest.name)
    current = [store for store in stores if store[1].key.images == manifest.image_digest]
    if fitting := fitting_stores(current, wanted):
        return _finished(fitting[0])
    closest = min((wanted.differences(about) for _, about in current), key=len, default=None)
    reason = f"its closest store differs in {', '.join(closest)}" if closest else "it has none"
    options = f"--backbone {spec.backbone}{' --maps' if maps else ''}{' --channels bgr' if channels == 'bgr' else ''}"
    raise UserError(
        f"No features of {manifest.name!r} match this run's tower ({reason}): run `cafe extract {manifest.name} "
        f"{f'{options} {_options(drawn)}'.strip()}`, or leave it out with --targets."
    )


def _find_views(spec: RunSpec, protocol: Protocol) -> StoreChoice:
    """Return which views of frozen features are judged: the clean one, unless an option of test time averages several."""
    option = OPTIONS.get(protocol.option)
    if option is None or option.views == 1 or find_method(spec.method).clean_features:
        return StoreChoice()
    own: dict[str, Any] = {"policy": spec.policy, "view_seed": spec.view_seed}
    return StoreChoice(views=option.views, **({"policy": option.policy} if option.policy else own))


def _names(about: StoreInfo) -> tuple[str, ...]:
    """All that a user may call a store's tower: with and without the file of its weights."""
    return about.backbone_name, short_name(about.backbone_name), about.key.backbone


def _view_seed(about: StoreInfo) -> str:
    return f", view seed {about.key.view_seed}" if about.key.view_seed else ""


def _options(choice: StoreChoice) -> str:
    asked = ((name, getattr(choice, name)) for name in ("backbone", "views", "policy", "view_seed", "store"))
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in asked if value not in (None, ""))


def _finished(store: Store) -> Store:
    path, about = store
    check_description(path)
    if pending := len(Receipts(path, about).pending()):
        raise UserError(
            f"The features of {about.manifest!r} ({about.describe()}) lack {pending} shards: "
            f"run `cafe extract` with the same options again to finish them."
        )
    return store


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:12] + "…"
