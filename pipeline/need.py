"""Which feature store serves: what a training, an evaluation, a benchmark or a repair needs of one, said once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from upath import UPath

from cafe.data.manifest import Manifest
from cafe.errors import UserError
from cafe.methods import find_method
from cafe.methods.method import Method
from cafe.pipeline.features.integrity import Receipts, check_description, find_stores
from cafe.pipeline.features.key import StoreInfo, describe_policy
from cafe.pipeline.runs import RunSpec
from cafe.pipeline.settings import ExtractSettings, FeatureIdentity, StoreChoice, take
from cafe.pipeline.workspace import Workspace
from cafe.records import FORMAT
from cafe.results.protocols import OPTIONS, Protocol
from cafe.towers.facts import NORMALISATIONS
from cafe.towers.names import FINAL, absolute_name, joint_name, short_name, single_names

# What may differ between the store a method was trained on and that of a target: the faces, and how they were augmented,
# since only the clean view 0 is evaluated.
OF_THE_SOURCE = ("images", "max_megapixels", "policy", "view_seed", "views", "maps")

Store = tuple[UPath, StoreInfo]
Stores = tuple[Store, ...]  # of one manifest, whose features are read side by side; usually one


@dataclass(frozen=True)
class Need:
    """What a store of a manifest must be to serve.

    `equal` names fields of its key and what they must be, or what it is called by: `tower`, `backbone_name`, `folder`,
    `policy_name`. It must hold at least so many `views`, and maps where they are needed. `options` are those of the
    `command` that would fill it, for what somebody still has to extract.
    """

    manifest: str
    equal: Mapping[str, Any] = field(default_factory=dict)
    views: int = 1
    maps: bool = False
    options: str = ""

    @classmethod
    def of_images(cls, manifest: Manifest) -> Need:
        """Return that it is of the images that a manifest lists now."""
        return cls(manifest.name, {"images": manifest.image_digest})

    @classmethod
    def of_source(cls, manifest: Manifest, choice: StoreChoice, method: type[Method]) -> Need:
        """Return what a training needs of the store of a source, by what a user says of it; targets alone may be BGR."""
        known = {"folder": choice.store, "policy_name": choice.policy, "view_seed": choice.view_seed}
        known |= {"tower": absolute_name(choice.backbone) if choice.backbone else None}
        equal = {"channels": "rgb", **{name: value for name, value in known.items() if value not in (None, "")}}
        maps = "map" in method.needs
        return cls(manifest.name, equal, choice.views or 1, maps, write_options(replace(choice, store=None), maps))

    @classmethod
    def of_target(cls, manifest: Manifest, spec: RunSpec, protocol: Protocol) -> Need:
        """Return what the evaluation of a run by a protocol needs of the store of a target."""
        method, option = find_method(spec.method), OPTIONS.get(protocol.option)
        equal = dict(cls.evaluated_with(manifest.name, spec).equal)
        equal["channels"], views, maps = protocol.channels(manifest.kind), 1, "map" in method.needs
        drawn = StoreChoice()
        if option and option.views > 1 and not method.clean_features:  # several views are averaged
            own: dict[str, Any] = {"policy": spec.policy, "view_seed": spec.view_seed}
            drawn = StoreChoice(views=option.views, **({"policy": option.policy} if option.policy else own))
            views = option.views
            equal |= {"policy_name": drawn.policy}
            equal |= {} if drawn.view_seed is None else {"view_seed": drawn.view_seed}
        options = [write_options(replace(drawn, backbone=spec.backbone), maps)]
        options += ["--channels bgr"] if equal["channels"] == "bgr" else []
        return cls(manifest.name, equal, views, maps, " ".join(options))

    @classmethod
    def trained_with(cls, manifest: str, spec: RunSpec) -> Need:
        """Return what a store must be to be one that a run learned from."""
        free = ("views", "maps", *(["images"] if spec.sources else []))
        return cls(manifest, {name: value for name, value in vars(spec.features).items() if name not in free})

    @classmethod
    def evaluated_with(cls, manifest: str, spec: RunSpec) -> Need:
        """Return what a store must be to be one that a run was evaluated on."""
        return cls(manifest, {name: value for name, value in vars(spec.features).items() if name not in OF_THE_SOURCE})

    @classmethod
    def of_extraction(cls, manifest: Manifest, settings: ExtractSettings) -> Need:
        """Return what a store must be to hold what `cafe extract` would make with these settings; no tower is loaded.

        So what only the tower knows is left open: its weights and, where they are not given, its input and statistics.
        """
        same = [one.name for one in fields(FeatureIdentity) if one.name not in ("views", "view_seed", "maps")]
        equal = {name: getattr(settings, name) for name in same}
        equal |= {"images": manifest.image_digest, "backbone_name": settings.backbone}
        if settings.input_size:
            equal["input_size"] = settings.input_size
        if settings.normalisation in NORMALISATIONS:
            equal["normalisation"] = NORMALISATIONS[settings.normalisation]
        if settings.views > 1:  # the clean view is the same by every policy
            equal |= {"policy": describe_policy(settings.policy), "view_seed": settings.view_seed}
        return cls(manifest.name, equal, settings.views, settings.maps)

    @property
    def command(self) -> str:
        """The command that would fill such a store."""
        return f"cafe extract {self.manifest} {self.options}".rstrip()

    def differences(self, info: StoreInfo) -> list[str]:
        """Return in what a store does not serve, as `field: needed against found`."""
        found = {"folder": info.folder, "policy_name": info.key.policy["name"], "backbone_name": info.backbone_name}
        found |= {"format": info.version, **vars(info.key)}
        pairs = [
            (name, value, info.backbone_name if name == "tower" else found[name])
            for name, value in {"format": FORMAT, **self.equal}.items()
            if (value not in _names(info) if name == "tower" else value != found[name])
        ]
        if info.batch_size != info.key.batch_size:
            pairs.append(("batch_size", info.key.batch_size, info.batch_size))
        pairs += [("views", self.views, info.key.views)] if info.key.views < self.views else []
        pairs += [("maps", self.maps, info.key.maps)] if info.key.maps < self.maps else []
        return [f"{name}: {_shorten(needed)} against {_shorten(there)}" for name, needed, there in pairs]

    def matches(self, info: StoreInfo) -> bool:
        """Whether a store serves."""
        return not self.differences(info)

    def find(self, stores: Sequence[Store]) -> list[Store]:
        """Return the stores that serve, those with the fewest views and without maps first."""
        serving = [store for store in stores if self.matches(store[1])]
        return sorted(serving, key=lambda store: (store[1].key.views, store[1].key.maps))


def choose_source_stores(
    workspace: Workspace, manifest: Manifest, choice: StoreChoice, method: type[Method], live: bool = False
) -> Stores:
    """Return the stores of a source that fit a choice, one for each layer that is read; none when it has none at all.

    Raises `UserError` where one is missing, and when a method reads maps of several layers.
    """
    names = single_names(choice.backbone) if choice.backbone else [None]
    folders = choice.store.split(",") if choice.store else [None]
    choices = [replace(choice, backbone=name, store=folder) for name in names for folder in folders]
    if len(choices) > 1 and "map" in method.needs:
        raise UserError(
            f"The map of one layer can be read, not of {len(choices)} side by side: name one with --backbone."
        )
    found = [choose_source_store(workspace, manifest, one, method, live) for one in choices]
    return tuple(store for store in found if store)


def choose_source_store(
    workspace: Workspace, manifest: Manifest, choice: StoreChoice, method: type[Method], live: bool = False
) -> Store | None:
    """Return the only store of a source that fits the choice, or None when it has no stores at all.

    Of several, those go first that hold just what the method needs, the fewest views that are enough, its published policy.
    Raises `UserError` when none or several fit, when the chosen one was made of other images, or is unfinished.
    """
    if method.clean_features:  # it augments its images by itself, whatever the store holds
        choice = replace(choice, policy=None, views=None, view_seed=None)
    elif live:
        choice = replace(choice, policy=None)
    elif choice.views == 1 or not method.trained:  # the clean view is the same by every seed
        choice = replace(choice, view_seed=None)
    stores, need = find_stores(workspace.features, manifest.name), Need.of_source(manifest, choice, method)
    asked = write_options(choice, need.maps)
    if not stores:
        if asked:
            raise UserError(f"There are no features of {manifest.name!r} yet: run `{need.command}`.")
        return None
    there = "; ".join(f"{info.describe()}, {info.key.policy['name']}{_view_seed(info)}" for _, info in stores)
    fitting = need.find(stores)
    if not fitting:
        raise UserError(
            f"No features of {manifest.name!r} fit {asked or 'a training'} (there are: {there}): run `{need.command}`."
        )
    current = Need.of_images(manifest).find(fitting)
    if not current:
        raise UserError(
            f"The features of {manifest.name!r} were made of other images than its manifest lists now: run "
            f"`{need.command}` again."
        )
    current = [store for store in current if store[1].key.maps == need.maps] or current
    if choice.views:
        current = [store for store in current if store[1].key.views == current[0][1].key.views]
    published = [store for store in current if store[1].key.policy["name"] == method.policy] or current
    current = finished_first(published)
    if len(current) > 1:
        raise UserError(
            f"{len(current)} feature stores of {manifest.name!r} fit: choose one with --backbone, --views, --policy or "
            f"--view-seed ({there})."
        )
    return _finished(current[0])


def choose_target_stores(workspace: Workspace, manifest: Manifest, spec: RunSpec, protocol: Protocol) -> Stores:
    """Return the stores of a target that serve the evaluation of a run by a protocol, one for each layer it reads.

    Raises `UserError` where there is none.
    """
    command = Need.of_target(manifest, spec, protocol).command
    return tuple(_choose_target_store(workspace, manifest, one, protocol, command) for one in spec.single_layers)


def _choose_target_store(
    workspace: Workspace, manifest: Manifest, spec: RunSpec, protocol: Protocol, command: str
) -> Store:
    need = Need.of_target(manifest, spec, protocol)
    stores = find_stores(workspace.features, manifest.name)
    current = [store for store in stores if store[1].key.images == manifest.image_digest]
    if serving := need.find(current):
        return _finished(finished_first(serving)[0])
    closest = min((need.differences(info) for _, info in current), key=len, default=None)
    reason = f"its closest store differs in {', '.join(closest)}" if closest else "it has none"
    raise UserError(
        f"No features of {manifest.name!r} match this run's tower ({reason}): run `{command}`, or leave it out with "
        "--targets."
    )


def find_readers(workspace: Workspace, manifest: Manifest) -> list[Store]:
    """Return all finished stores of a manifest: where nobody reads features, they say which pictures are readable."""
    current = Need.of_images(manifest).find(find_stores(workspace.features, manifest.name))
    return [store for store in current if not Receipts(*store).pending()]


def join_layers(stores: Stores) -> StoreInfo:
    """Return what the stores of one manifest are side by side; raise `UserError` naming in what they differ."""
    (_, first), *others = stores
    if not others:
        return first
    infos = [info for _, info in stores]
    layers = [info.key.backbone.partition("#") for info in infos]
    if len({tower for tower, _, _ in layers}) > 1:
        raise UserError("Layers are read side by side of one tower: name stores of the same one with --store.")
    _check_alike(stores, {"backbone": ""})
    key = replace(first.key, backbone=f"{layers[0][0]}#{'+'.join(layer or FINAL for _, _, layer in layers)}")
    name, width = joint_name([info.backbone_name for info in infos]), sum(info.width for info in infos)
    return replace(first, key=key, backbone_name=name, width=width, map_shape=None)


def join_stores(stores: Sequence[Store], choice: StoreChoice, method: type[Method], live: bool = False) -> StoreInfo:
    """Return what the stores of several sources are together; raise `UserError` naming in what they differ.

    They must be of one tower and one draw of views; they may hold more views than are used, or maps besides. The manifest,
    images and number of faces are those of the first.
    """
    together = stores[0][1].key
    used: dict[str, Any] = {"maps": "map" in method.needs}
    if method.clean_features or not method.trained:  # only the clean view is read
        used |= {name: getattr(together, name) for name in ("policy", "view_seed", "views")}
    elif live:
        used |= {name: getattr(together, name) for name in ("policy", "views")}
    elif choice.views == 1:
        used |= {"policy": describe_policy("clean"), "view_seed": 0, "views": 1}
    elif choice.views:
        used["views"] = choice.views
    _check_alike(stores, used)
    return replace(stores[0][1], key=replace(together, **used))


def _check_alike(stores: Sequence[Store], used: Mapping[str, Any]) -> None:
    first, *others = [(info, replace(info.key, **{**used, "images": ""})) for _, info in stores]
    for info, key in others:
        differing = [name for name, value in vars(first[1]).items() if vars(key)[name] != value]
        if differing:
            raise UserError(
                f"The features of {first[0].manifest!r} and {info.manifest!r} differ in {', '.join(differing)}: choose "
                "some that are alike with --backbone, --views, --policy, --view-seed or --store, or run `cafe extract "
                f"{info.manifest}` with the options of {first[0].manifest!r}."
            )


def write_options(choice: StoreChoice, maps: bool = False) -> str:
    """Return a choice as the options of a command."""
    asked = take(choice, StoreChoice).items()
    written = [f"--{name.replace('_', '-')} {value}" for name, value in asked if value not in (None, "")]
    return " ".join([*written, *(["--maps"] if maps else [])])


def finished_first(stores: Sequence[Store]) -> list[Store]:
    """Return those that are finished, where any is: one that was begun or given up does not compete with them."""
    if len(stores) < 2:
        return list(stores)
    return [store for store in stores if not Receipts(*store).pending()] or list(stores)


def _finished(store: Store) -> Store:
    path, info = store
    check_description(path)
    if pending := len(Receipts(path, info).pending()):
        raise UserError(
            f"The features of {info.manifest!r} ({info.describe()}) lack {pending} shards: "
            f"run `cafe extract` with the same options again to finish them."
        )
    if Receipts(path, info).outdated():
        raise UserError(
            f"The features of {info.manifest!r} ({info.describe()}) lack pictures that an earlier version left out by "
            "another --max-megapixels: run `cafe extract` with the same options again to add them."
        )
    return store


def _names(info: StoreInfo) -> tuple[str, ...]:
    """All that a user may call a store's tower: with and without the file of its weights."""
    return info.backbone_name, short_name(info.backbone_name), info.key.backbone


def _view_seed(info: StoreInfo) -> str:
    return f", view seed {info.key.view_seed}" if info.key.view_seed else ""


def _shorten(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:12] + "…"
