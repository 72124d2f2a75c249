"""A benchmark file: which sources, methods, seeds and towers make a grid, read from TOML into frozen dataclasses.

    sources = ["rafdb", "sfew"]                     # manifests to train on
    methods = ["scn", { method = "cafe", set = { mask = "none" } }]
    seeds = 5                                       # or a list of them
    towers = ["clip-vit-b32"]                       # of the methods that use one
    [features]                                      # settings of `cafe extract`, by their names with underscores
    [train]                                         # settings of `cafe train` that all methods share

Nothing but the file is looked at here: no workspace, no tower, no Ray.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
import types
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from cafe.errors import UserError, unknown
from cafe.learning.loading import ARRAYS
from cafe.methods import find_method
from cafe.methods.method import Method
from cafe.results.protocols import find_protocol
from pipeline.settings import ExtractSettings, TrainSettings

# What the grid itself decides for every store and every cell, so that a file cannot.
DECIDED_FEATURES = ("address", "num_cpus", "backbone", "layers", "views", "policy", "maps", "channels", "verify")
DECIDED_TRAINING = (
    "address", "num_cpus", "source", "method", "seed", "overrides", "backbone", "views", "policy", "store", "live",
    "targets", "protocol", "threads", "mlflow_uri", "experiment",
)  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """A method of the grid with what it changes: a line of the plan."""

    method: str
    set: tuple[tuple[str, Any], ...] = ()  # changed settings of its recipe
    tower: str | None = None  # instead of the grid's towers
    views: int | None = None  # instead of the grid's
    train: tuple[tuple[str, Any], ...] = ()  # changed settings of `cafe train`

    @property
    def label(self) -> str:
        """The method with what it changes, as a table shows it."""
        views = (("views", self.views),) if self.views else ()
        changes = ", ".join(f"{key}={value}" for key, value in (*self.set, *self.train, *views))
        return f"{self.method} ({changes})" if changes else self.method

    @property
    def kind(self) -> type[Method]:
        """The method itself."""
        return find_method(self.method)

    @property
    def reads_features(self) -> bool:
        """Whether a frozen tower's features are trained on and judged with."""
        return not self.kind.needs.isdisjoint(ARRAYS)

    @property
    def uses_tower(self) -> bool:
        """Whether it needs to know a tower at all; without one it is the same for every tower."""
        return self.reads_features or "tower" in self.kind.needs


@dataclass(frozen=True)
class Grid:
    """A benchmark file; the defaults are these."""

    name: str
    sources: tuple[str, ...]
    entries: tuple[Entry, ...]
    about: str = ""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    towers: tuple[str, ...] = ("clip-vit-b32",)
    targets: tuple[str, ...] = ()  # the sources, each judged on all of them
    protocol: str = "clean"
    views: int | None = None  # per face; one for every epoch and the clean one, as published
    features: Mapping[str, Any] = field(default_factory=dict)
    set: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Names what the file asks for; its comments and its explanation play no part."""
        record = {**asdict(self), "about": ""}
        return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()

    def combinations(self) -> Iterator[tuple[str, Entry, str | None]]:
        """Yield every (source, method, tower); the tower is None for a method that has no use for one."""
        for source in self.sources:
            for entry in self.entries:
                towers: Sequence[str | None] = (entry.tower,) if entry.tower else self.towers
                for tower in towers if entry.uses_tower else (None,):
                    yield source, entry, tower

    def train_settings(self, source: str, entry: Entry, tower: str | None) -> TrainSettings:
        """Return the settings of `cafe train` for a combination; its seed, store and views are still open."""
        shared = dict(self.train)
        if not entry.kind.trained:
            shared.pop("epochs", None)  # meant for methods that have epochs
        own = {**shared, **dict(entry.train)}
        own.setdefault("image_size", self.features.get("input_size"))  # the same pictures for all of them
        overrides = tuple(f"{key}={value}" for key, value in {**self.set, **dict(entry.set)}.items())
        return TrainSettings(
            source=source,
            method=entry.method,
            overrides=overrides,
            backbone=tower or "none",
            targets=",".join(self.targets),
            protocol=self.protocol,
            **own,
        )


def read_grid(path: Path) -> Grid:
    """Read a benchmark file; raise `UserError` for what is not TOML, an unknown key or name, and a value of another type."""
    try:
        text = path.read_bytes().decode()
        content = tomllib.loads(text)
    except OSError as error:
        raise UserError(f"Cannot read the benchmark file {str(path)!r} ({error.strerror}): check the path.") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{path.name} is not TOML ({error}): mend it.") from None
    return parse_grid(path.stem, content)


def parse_grid(name: str, content: Mapping[str, Any]) -> Grid:
    """Return the grid of a parsed file; raise `UserError`."""
    allowed = ("about", "sources", "methods", "seeds", "towers", "targets", "protocol", "views", "features", "train")
    _check_keys(content, allowed, name)
    for key in ("sources", "methods"):
        if not content.get(key):
            raise UserError(f"The benchmark {name} has no {key}: give a list of them.")
    sources = _names(content, "sources", name)
    training = _table(content, "train", name)
    changes = _recipe_changes(training.pop("set", {}), name)
    train = _checked(TrainSettings, DECIDED_TRAINING, training, f"[train] in {name}")
    grid = Grid(
        name,
        sources,
        tuple(_entry(item, name) for item in _list(content, "methods", name)),
        _typed(str, content.get("about", ""), "about", name),
        _seeds(content.get("seeds", list(Grid.seeds)), name),
        _names(content, "towers", name) if "towers" in content else Grid.towers,
        _names(content, "targets", name) if "targets" in content else sources,
        _typed(str, content.get("protocol", Grid.protocol), "protocol", name),
        _views(content.get("views"), name),
        _checked(ExtractSettings, DECIDED_FEATURES, _table(content, "features", name), f"[features] in {name}"),
        changes,
        train,
    )
    find_protocol(grid.protocol)
    listed = Counter((entry.label, entry.tower) for entry in grid.entries)
    for (label, _), count in listed.items():
        if count > 1:
            raise UserError(
                f"The method {label} is listed {count} times in {name}: keep one, or change a setting of it."
            )
    return grid


def _entry(item: Any, where: str) -> Entry:
    if isinstance(item, str):
        item = {"method": item}
    if not isinstance(item, dict) or "method" not in item:
        raise UserError(f'Cannot read the method {item!r} of {where}: write "NAME" or {{ method = "NAME", … }}.')
    own = dict(item)
    method = _typed(str, own.pop("method"), "method", where)
    changes = _recipe_changes(own.pop("set", {}), where)
    tower = _typed(str, own.pop("tower"), "tower", where) if "tower" in own else None
    here = f"the method {method} in {where}"
    views = _views(own.pop("views", None), here)
    find_method(method)
    train = _checked(TrainSettings, DECIDED_TRAINING, own, here, ("method", "set", "tower", "views"))
    return Entry(method, tuple(changes.items()), tower, views, tuple(train.items()))


def _checked(
    settings: type[Any], decided: Sequence[str], values: Mapping[str, Any], where: str, more: Sequence[str] = ("set",)
) -> dict[str, Any]:
    """Return values for a settings dataclass, each of the type, range and choices its field has; raise `UserError`."""
    known = {one.name: one for one in fields(settings) if one.name not in decided}
    _check_keys(values, (*known, *(more if settings is TrainSettings else ())), where)
    hints = get_type_hints(settings)
    for key, value in values.items():
        kinds = [part for part in get_args(hints[key]) or (hints[key],) if part is not types.NoneType]
        _typed(kinds[0], value, key, where)
        about = known[key].metadata
        if value not in about.get("choices", (value,)):
            raise unknown(f"{key} of {where}", value, about["choices"])
        if "minimum" in about and value < about["minimum"]:
            raise UserError(f"{key} of {where} is at least {about['minimum']}, not {value}.")
    return dict(values)


def _check_keys(values: Mapping[str, Any], allowed: Sequence[str], where: str) -> None:
    for key in values:
        if key not in allowed:
            raise unknown(f"key of {where}", key, allowed)


def _typed(kind: type, value: Any, key: str, where: str) -> Any:
    if type(value) is not kind:  # True is no number here
        raise UserError(f"{key} of {where} is a {kind.__name__}, not {value!r}.")
    return value


def _table(content: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    return dict(_typed(dict, content.get(key, {}), key, where))


def _list(content: Mapping[str, Any], key: str, where: str) -> list[Any]:
    return list(_typed(list, content[key], key, where))


def _names(content: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    names = [_typed(str, name, key, where) for name in _list(content, key, where)]
    if not names or len(set(names)) < len(names):
        raise UserError(f"{key} of {where} must be different names, at least one, not {names}.")
    return tuple(names)


def _seeds(value: Any, where: str) -> tuple[int, ...]:
    seeds = list(range(value)) if type(value) is int else _list({"seeds": value}, "seeds", where)
    if not seeds or len(set(seeds)) < len(seeds) or any(type(seed) is not int or seed < 0 for seed in seeds):
        raise UserError(f"seeds of {where} are how many, or a list of different ones, not {value!r}.")
    return tuple(seeds)


def _views(value: Any, where: str) -> int | None:
    if value is not None and _typed(int, value, "views", where) < 1:
        raise UserError(f"views of {where} is at least 1, not {value}.")
    return value if value is None else int(value)


def _recipe_changes(value: Any, where: str) -> dict[str, Any]:
    changes = _typed(dict, value, "set", where)
    for key, entry in changes.items():
        if type(entry) not in (int, float, str):
            raise UserError(f"The setting {key} of {where} is a number or a name, not {entry!r}.")
    return dict(changes)
