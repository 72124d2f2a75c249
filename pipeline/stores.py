"""The feature stores of a workspace as things to keep: what there is, who uses it, what to repair, what can go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, get_args

from upath import UPath

from cafe.data.manifest import Manifest
from cafe.errors import UserError, ambiguous, unknown
from cafe.files import list_folders, list_tree, place_below, remove_tree
from cafe.pipeline.features.extract import describe_store, extract, look_up_tower
from cafe.pipeline.features.integrity import Damage, Receipts, in_parallel, recover_info
from cafe.pipeline.features.key import StoreInfo, store_name
from cafe.pipeline.features.store import discard_damage, verify
from cafe.pipeline.need import Need
from cafe.pipeline.process.lease import find_holder, hold
from cafe.pipeline.process.progress import Progress
from cafe.pipeline.runs import RunSpec
from cafe.pipeline.settings import ClusterSettings, ExtractSettings, FeatureIdentity, Normalisation, take
from cafe.pipeline.workspace import Workspace
from cafe.results.columns import Column
from cafe.results.predictions import list_predictions, list_protocols


@dataclass(frozen=True)
class StoreFacts:
    """A store as a list shows it: `info` is None where nothing says it; `made` is in seconds since 1970."""

    path: UPath
    info: StoreInfo | None
    done: int
    bytes: int
    made: float
    trained: list[str]  # runs that learned from it
    evaluated: list[str]  # runs that were evaluated on it
    holder: str  # who works on it now

    @property
    def name(self) -> str:
        """What it is called on the command line."""
        return store_name(self.path)

    def record(self) -> dict[str, Any]:
        """Return all of it as plain JSON values."""
        info = asdict(self.info) if self.info else None
        facts = {name: value for name, value in vars(self).items() if name not in ("path", "info")}
        shards = self.info.shards if self.info else None
        return {"name": self.name, "place": str(self.path), **facts, "about": info, "shards": shards}


def find_paths(workspace: Workspace, names: Sequence[str] = ()) -> list[UPath]:
    """Return the folders of stores by MANIFEST/FOLDER, an unambiguous beginning of it or a manifest; by default all."""
    manifests = list_folders(workspace.features)
    there = {store_name(path): path for manifest in manifests for path in list_folders(manifest)}
    chosen = dict[str, UPath]() if names else there
    for name in names:
        found = [one for one in there if one == name] or [one for one in there if one.startswith(name)]
        if not found:
            raise unknown("feature store", name, there)
        if len(found) > 1 and any(one.partition("/")[0] != name for one in found):
            raise ambiguous("feature stores", name, found)
        chosen |= {one: there[one] for one in found}
    return list(chosen.values())


def list_stores(workspace: Workspace, paths: Sequence[UPath]) -> list[StoreFacts]:
    """Return what there is to know of stores without reading their arrays."""
    runs = _read_runs(workspace)
    return [_look_at(path, runs) for path in paths]


def _look_at(path: UPath, runs: dict[str, tuple[RunSpec, list[str]]]) -> StoreFacts:
    try:
        info = recover_info(path)
    except UserError:
        info = None
    files = list_tree(path)
    readers = {run: used for run, used in runs.items() if info and used[0].features}
    trained = [
        run
        for run, (spec, _) in readers.items()
        if info
        and info.manifest in {source.name for source in spec.trained_on}
        and any(Need.trained_with(info.manifest, one).matches(info) for one in spec.single_layers)
    ]
    evaluated = [
        run
        for run, (spec, targets) in readers.items()
        if info
        and info.manifest in targets
        and any(Need.evaluated_with(info.manifest, one).matches(info) for one in spec.single_layers)
    ]
    return StoreFacts(
        path,
        info,
        len(Receipts(path, info).done()) if info else 0,
        sum(size for size, _ in files.values()),
        min((changed for _, changed in files.values()), default=0.0),
        trained,
        evaluated,
        find_holder(path),
    )


def _read_runs(workspace: Workspace) -> dict[str, tuple[RunSpec, list[str]]]:
    """Return the specification of each run, and the manifests it was evaluated on."""

    def read(name: str) -> tuple[RunSpec, list[str]] | None:
        run = workspace.run_path(name)
        try:
            spec = RunSpec.load(run)
        except UserError:  # of another format: none of these stores serves it
            return None
        files = [name for protocol in list_protocols(run) for name in list_predictions(run, protocol)]
        return spec, [Column.parse(name).target for name in files]

    names = workspace.run_names()
    return {name: found for name, found in zip(names, in_parallel(workspace.root, read, names), strict=True) if found}


def repair(
    workspace: Workspace, path: UPath, settings: ClusterSettings, progress: Progress
) -> tuple[list[Damage], int]:
    """Write again what is damaged in a store, and return what was and how many shards were computed.

    Those that an interrupted repair has declared undone are computed too, as are those of an interrupted extraction.
    Raises `UserError` where the manifest or the tower are no longer those it was made with.
    """
    with hold(path, settings.wait):
        damages = verify(path, progress)
        info = recover_info(path)
        done = set(Receipts(path, info).done()) - {damage.shard for damage in damages}
        undone = info.shards - len(done)
        if not damages and not undone:
            return [], 0
        manifest = workspace.load_manifest(path.parent.name)
        asked = _ask_again(workspace, manifest, info, settings) if undone else None
        discard_damage(path, manifest, damages)
    if asked:
        extract(workspace, [manifest], asked, progress)
    return damages, undone


def _ask_again(workspace: Workspace, manifest: Manifest, info: StoreInfo, settings: ClusterSettings) -> ExtractSettings:
    """Return the settings of the extraction that made a store; raise `UserError` where they would make another now."""
    info.check_batches(place_below(workspace.features, f"{info.manifest}/{info.folder}"))
    key = info.key
    fixed: dict[str, Any] = take(key, FeatureIdentity) | take(settings, ClusterSettings)
    fixed |= {"backbone": info.backbone_name, "input_size": key.input_size}
    fixed |= {"policy": key.policy["name"], "max_skipped": info.rows}
    choices = [ExtractSettings(**fixed, normalisation=name) for name in (None, *get_args(Normalisation))]
    tower = look_up_tower(workspace, choices[0])
    keys = [describe_store(manifest, choice, tower).key for choice in choices]
    if key in keys:
        return choices[keys.index(key)]
    differing = [name for name, value in vars(key).items() if vars(keys[0])[name] != value]
    raise UserError(
        f"The features of {manifest.name!r} cannot be computed again, since their {differing[0]} is another now: remove "
        "them with `cafe store rm` and run `cafe extract` again."
    )


def remove(path: UPath) -> None:
    """Remove a store; receipts go first, so that one half removed by a kill counts as unfinished.

    Raises `UserError` for a link, since what it leads to may be others' too.
    """
    if path.is_symlink():
        raise UserError(f"{path} is a link: remove it, and the folder that it leads to, yourself.")
    with hold(path):
        remove_tree(path / "receipts")
        remove_tree(path)
