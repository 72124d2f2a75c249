"""A run: everything that decides its result, written down before it starts, and what it leaves behind.

runs/METHOD-SOURCE-sSEED-HASH/
    run.json                 the specification; its hash names the run, so the same command is the same run
    epochs/0001.json         metrics of each epoch
    train/                   Ray Train's checkpoints: safetensors + JSON
    model.safetensors        the trained method, written last
    predictions/TARGET.parquet, and predictions/paper/TARGET.parquet by the protocol `paper`
"""

from __future__ import annotations

import hashlib
import json
import subprocess
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from upath import UPath

from cafe.data.manifest import SPLITS, Manifest, hold_out_rows
from cafe.errors import UserError, unknown
from cafe.learning.checkpoints import read_tensors
from cafe.learning.loading import ARRAYS, FaceDataset
from cafe.learning.views import ViewPlan
from cafe.methods import find_method
from cafe.methods.method import Inputs, Method
from cafe.results.protocols import Protocol, find_protocol
from cafe.towers.building import load_backbone
from cafe.towers.embedding import Embedder
from cafe.towers.names import absolute_name, short_name
from pipeline.settings import StoreChoice
from pipeline.store import TARGET_MAY_DIFFER, About, FeatureKey, FeatureReader, FeatureStore, find_stores
from pipeline.workspace import Workspace, read_json, with_tuples, write_json

HELD_OUT = 0.1  # of the source's training faces, for `source_val`


@dataclass(frozen=True)
class RunSpec:
    """What decides a run's result. Workers, devices and paths are not part of it."""

    source: str
    source_digest: str
    method: str
    recipe: dict[str, Any]
    seed: int
    network: str
    init: str
    image_size: int
    precision: str
    views: ViewPlan
    features: FeatureKey | None  # of the source's store; None when the method needs none and there is none
    backbone: str | None  # as the user wrote it
    width: int | None
    live: bool = False  # whether the tower runs while training; `features` then says how
    selection: str = "final"
    tag: str = ""
    source_kind: str = ""  # the data set the source is, whose training split must never be judged
    grid: tuple[int, int] | None = None  # (H, W) of the maps it reads: told by the store, so no part of the name

    @property
    def name(self) -> str:
        """Readable first, unique last."""
        tag = f"-{self.tag}" if self.tag else ""
        return f"{self.method}-{self.source}-s{self.seed}{tag}-{_hash(self._decisive())}"

    @property
    def group(self) -> str:
        """Names what runs that differ in nothing but their seed have in common: they are averaged."""
        return _hash({**self._decisive(), "seed": None})

    def _decisive(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "grid"}

    def parameters(self) -> dict[str, Any]:
        """The run's MLflow parameters: flat, named as on the command line."""
        names = "source method seed network init image_size precision live selection backbone"
        return {
            **{name: getattr(self, name) for name in names.split()},
            **{f"recipe.{name}": value for name, value in self.recipe.items()},
            **{f"views.{name}": value for name, value in asdict(self.views).items()},
            "store": self.features.digest if self.features else "none",
            "manifest": self.source_digest,
        }

    def tags(self) -> dict[str, str]:
        """The run's MLflow tags: what it is averaged by, and the code that made it."""
        return {"cafe.group": self.group, "mlflow.source.git.commit": code_version()}

    @classmethod
    def load(cls, path: UPath) -> RunSpec:
        """Read a run's specification from its folder."""
        record = read_json(path / "run.json")
        assert record is not None
        features = FeatureKey.from_record(record["features"]) if record["features"] else None
        plan, grid = ViewPlan(**with_tuples(record["views"])), record.get("grid")
        return cls(**{**record, "views": plan, "features": features, "grid": tuple(grid) if grid else None})

    def save(self, path: UPath) -> None:
        """Write the specification into a run's folder."""
        write_json(path / "run.json", asdict(self))

    def build(self, init: str | None = None) -> Method:
        """Return the method with initial weights drawn from the seed."""
        method = find_method(self.method)
        torch.manual_seed(self.seed)
        return method(method.recipe_type(**self.recipe), replace(self.inputs, init=init or self.init))

    @property
    def inputs(self) -> Inputs:
        """What the method is built for."""
        return Inputs(self.width, self.network, self.init, self.image_size, self.backbone, self.grid)

    def load_model(self, path: UPath) -> Method:
        """Return the trained method of a run's folder."""
        method = self.build(init="scratch")
        method.load_state_dict(read_tensors(path / "model.safetensors"))
        return method

    @property
    def needs_features(self) -> bool:
        """Whether the method reads frozen features or maps."""
        return not find_method(self.method).needs.isdisjoint(ARRAYS)

    def dataset(self, target: Target) -> FaceDataset:
        """Return the faces of a target as the method needs them, with the features of its store."""
        needs = find_method(self.method).needs
        names = [ARRAYS[need] for need in needs if need in ARRAYS]
        features = FeatureReader(target.features, names) if target.features and names else None
        return FaceDataset(target.manifest, self.views, needs, self.image_size, features, target.channels)

    def live_dataset(self, source: Target, device: str) -> FaceDataset:
        """Return the faces of the source with features of the tower run on the fly."""
        assert self.features is not None
        assert self.backbone is not None
        assert source.about is not None
        needs, key = find_method(self.method).needs, self.features
        tower = load_backbone(self.backbone, key.precision, key.input_size)
        embedder = Embedder(
            tower, source.manifest, self.views, device, "map" in needs, key.dtype, source.about.batch_size
        )
        return FaceDataset(source.manifest, self.views, needs, self.image_size, embedder)


def code_version() -> str:
    """Return the git commit this code was checked out from, or its released version when it was installed."""
    here = Path(__file__).parent
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False)  # noqa: S607
    return git.stdout.strip() if git.returncode == 0 else f"cafe {version('cafe')}"


def is_finished(run: UPath) -> bool:
    """Whether a run was trained to its end."""
    return (run / "result.json").exists()


@dataclass(frozen=True)
class Target:
    """A data set to be judged on: its manifest and, when there is one, the store of the run's tower.

    `protocol` and `split` say how it is judged, `title` what it is then called in files and metrics: by its name, with the
    split when it is not the one of the protocol.
    """

    manifest: Manifest
    store: UPath | None
    about: About | None = field(default=None, compare=False)
    protocol: str = "clean"
    split: str = "test"
    title: str = ""

    @property
    def channels(self) -> str:
        """The order of its colours."""
        return find_protocol(self.protocol).channels(self.manifest.kind)

    def predictions_path(self, run: UPath) -> UPath:
        """Where a run's predictions for it are kept."""
        return run / "predictions" / f"{find_protocol(self.protocol).prefix}{self.title}.parquet"

    @cached_property
    def features(self) -> FeatureStore | None:
        """The target's feature store, opened."""
        return FeatureStore(self.store, self.about) if self.store and self.about else None

    def rows(self, split: str) -> np.ndarray:
        """The rows of a split that have features; all of them without a store."""
        rows = self.manifest.rows(split)
        return rows if self.features is None else rows[self.features.valid()[rows]]


def choose_store(
    workspace: Workspace, manifest: Manifest, choice: StoreChoice, method: type[Method]
) -> tuple[UPath, About] | None:
    """Return the only store of a manifest that fits the choice, or None when it has no stores at all.

    Of several, those go first that hold just what the method needs, the fewest views that are enough, its published policy.
    Raises `UserError` when none or several fit, when the chosen one was made of other images, or is unfinished.
    """
    stores = find_stores(workspace.features, manifest.name)
    if not stores and (choice.backbone or choice.views or choice.policy or choice.store):
        raise UserError(
            f"There are no features of {manifest.name!r} yet: run `{extract_command(manifest.name, choice)}`."
        )
    if not stores:
        return None
    fitting = [(path, about) for path, about in stores if _fits(about, choice)]
    there = "; ".join(f"{about.describe()}, {about.key.policy['name']}" for _, about in stores)
    if not fitting:
        raise UserError(
            f"No features of {manifest.name!r} fit {_options(choice)} (there are: {there}): "
            f"run `{extract_command(manifest.name, choice)}`."
        )
    current = [(path, about) for path, about in fitting if about.key.images == manifest.image_digest]
    if not current:
        raise UserError(
            f"The features of {manifest.name!r} were made of other images than its manifest lists now: "
            f"run `{extract_command(manifest.name, choice)}` again."
        )
    current = [store for store in current if store[1].key.maps == ("map" in method.needs)] or current
    if choice.views:
        fewest = min(about.key.views for _, about in current)
        current = [store for store in current if store[1].key.views == fewest]
    current = [store for store in current if store[1].key.policy["name"] == method.policy] or current
    if len(current) > 1:
        raise UserError(
            f"{len(current)} feature stores of {manifest.name!r} fit: choose one with --backbone, --views or --policy "
            f"({there})."
        )
    _check_finished(*current[0])
    return current[0]


def describe_target(manifest: Manifest, spec: RunSpec, protocol: Protocol, split: str | None = None) -> Target:
    """Return a target, without a store, to be judged as the protocol says or on another split; raise `UserError`."""
    judged = protocol.split(manifest, spec.source_kind)
    chosen = split or judged
    if chosen is None:
        raise UserError(
            f"The protocol {protocol.name!r} has no way to judge {manifest.name!r} ({protocol.about}): leave it out with "
            f"--targets, or judge it apart with `cafe evaluate RUN --targets {manifest.name} --split SPLIT`."
        )
    if not len(manifest.rows(chosen)):
        there = ", ".join(split for split in SPLITS if len(manifest.rows(split)))
        raise UserError(f"{manifest.name!r} has no faces in the split {chosen!r}: choose {there}, or leave it out.")
    title = manifest.name if chosen == judged else f"{manifest.name}@{chosen}"
    return Target(manifest, None, protocol=protocol.name, split=chosen, title=title)


def choose_target(workspace: Workspace, name: str, spec: RunSpec, protocol: Protocol, split: str | None) -> Target:
    """Return a target with the store that matches the run's tower; raise `UserError` when it needs one and has none."""
    manifest = workspace.load_manifest(name)
    target = describe_target(manifest, spec, protocol, split)
    if not spec.needs_features:
        return know_unreadable(workspace, target)
    stores = _current_stores(workspace, manifest)
    assert spec.features is not None
    wanted = replace(spec.features, channels=target.channels)
    needs = find_method(spec.method).needs
    ignored = [name for name in TARGET_MAY_DIFFER if name != "maps" or "map" not in needs]
    differing = [(wanted.differences(about.key, ignored), path, about) for path, about in stores]
    matching = [(path, about) for differences, path, about in differing if not differences]
    if matching:
        path, about = min(matching, key=lambda store: store[1].key.views)
        _check_finished(path, about)
        return replace(target, store=path, about=about)
    closest = min(differing, key=lambda entry: len(entry[0]), default=None)
    reason = f"its closest store differs in {', '.join(closest[0])}" if closest else "it has none"
    raise UserError(
        f"No features of {name!r} match this run's tower ({reason}): run `cafe extract {name} --backbone {spec.backbone}"
        f"{' --maps' if 'map' in needs else ''}{' --channels bgr' if target.channels == 'bgr' else ''}`, "
        "or leave it out with --targets."
    )


def know_unreadable(workspace: Workspace, target: Target) -> Target:
    """Return a target whose features nobody reads with any finished store: it tells which images are unreadable."""
    finished = (store for store in _current_stores(workspace, target.manifest) if not FeatureStore(*store).pending())
    path, about = next(finished, (None, None))
    return replace(target, store=path, about=about)


def _current_stores(workspace: Workspace, manifest: Manifest) -> list[tuple[UPath, About]]:
    stores = find_stores(workspace.features, manifest.name)
    return [(path, about) for path, about in stores if about.key.images == manifest.image_digest]


def choose_rows(source: Target, selection: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the source's rows to train on and those on which the epoch is selected; no target is involved.

    `source_val` takes the data set's own validation split or, without one, holds a tenth of the train split out.
    """
    train = source.rows("train")
    if selection == "final":
        return train, train[:0]
    if selection == "source_test":
        return train, source.rows("test")
    val = source.rows("val")
    return (train, val) if len(val) else hold_out_rows(source.manifest, train, HELD_OUT)


def choose_targets(
    workspace: Workspace, wanted: str | None, spec: RunSpec, protocol: str, split: str | None = None
) -> list[Target]:
    """Return the targets of a comma-separated list, of all manifests when there is none, of nothing for `none`."""
    if wanted == "none":
        return []
    names = (
        workspace.manifest_names() if wanted is None else [name.strip() for name in wanted.split(",") if name.strip()]
    )
    return [choose_target(workspace, name, spec, find_protocol(protocol), split) for name in names]


def extract_command(manifest: str, choice: StoreChoice) -> str:
    """Return the command that makes the features a choice asks for."""
    return f"cafe extract {manifest} {_options(replace(choice, store=None))}".rstrip()


def check_network(name: str, init: str) -> None:
    """Raise `UserError` for an unknown image branch or initialisation."""
    from cafe.learning.networks import NETWORKS

    if name not in NETWORKS:
        raise unknown("network", name, NETWORKS)
    if init not in ("scratch", "imagenet") and not init.startswith("file:"):
        raise unknown("initialisation", init, ("scratch", "imagenet", "file:PATH"))
    if init.startswith("file:") and not UPath(init.removeprefix("file:")).is_file():
        raise UserError(f"There is no file of initial weights at {init.removeprefix('file:')!r}: check the path.")


def _hash(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:8]


def _fits(about: About, choice: StoreChoice) -> bool:
    names = (about.backbone_name, short_name(about.backbone_name), about.key.backbone)
    backbone = choice.backbone is None or absolute_name(choice.backbone) in names
    views = choice.views is None or choice.views <= about.key.views  # a view is the same in a store of more
    policy = choice.policy in (None, about.key.policy["name"])
    folder = choice.store in (None, about.folder)
    return backbone and views and policy and folder and about.key.channels == "rgb"  # BGR is for targets alone


def _options(choice: StoreChoice) -> str:
    asked = ((name, getattr(choice, name)) for name in ("backbone", "views", "policy", "store"))
    return " ".join(f"--{name} {value}" for name, value in asked if value)


def _check_finished(path: UPath, about: About) -> None:
    if pending := len(FeatureStore(path, about).pending()):
        raise UserError(
            f"The features of {about.manifest!r} ({about.describe()}) lack {pending} shards: "
            f"run `cafe extract` with the same options again to finish them."
        )
