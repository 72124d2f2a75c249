"""A benchmark file: which sources, methods, seeds and towers make a grid, read from TOML and checked by pydantic.

    sources = ["rafdb", "sfew"]                     # to train on; "rafdb,sfew" is their union. Or: "all but target"
    methods = ["scn", { method = "cafe", set = { mask = "none" } }]
    seeds = 5                                       # or a list of them
    draws = 20                                      # of every method's settings, for each seed: a sweep
    towers = ["clip-vit-b32"]                       # of the methods that use one
    [features]                                      # settings of `cafe extract`, by their names with underscores
    [train]                                         # settings of `cafe train` that all methods share
    set = { features = "standardised" }             # of their recipes, for the methods that have such a setting

Nothing but the file is looked at here: no workspace, no tower, no Ray.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, field, fields
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, ValidationError, create_model
from pydantic.dataclasses import dataclass
from upath import UPath

from cafe.addresses import own
from cafe.errors import UserError, unknown
from cafe.files import MOST_TEXT, read_file
from cafe.methods import find_method
from cafe.methods.method import Method
from cafe.pipeline.plan import split_names
from cafe.pipeline.settings import Count, ExtractSettings, Number, TrainSettings
from cafe.records import digest
from cafe.results.protocols import ProtocolName
from cafe.results.sources import ALL_BUT_TARGET

PER_SEED = "per seed"  # for `view_seed`: every training seed sees a draw of views of its own

MOST_SEEDS = 10_000
CHOOSING = ("source_val", "swad", "leave_one_out", "oracle")  # selections that draws can be chosen by

STRICT = ConfigDict(extra="forbid", strict=True)
KINDS = {"int": "a whole number", "string": "a text", "bool": "true or false", "list": "a list", "dict": "a table"}

Checked = TypeVar("Checked")


def _check_different(values: list[Any]) -> list[Any]:
    if not values or len(set(values)) < len(values):
        raise ValueError("different ones, at least one")
    return values


def _check_plain(value: Any) -> Any:
    if type(value) not in (int, float, str):  # True is no number here
        raise ValueError("a number or a name")
    return value


def _list_seeds(value: Any) -> Any:
    if type(value) is not int:
        return value
    if value > MOST_SEEDS:
        raise ValueError(f"at most {MOST_SEEDS:,} seeds")
    return list(range(value))


Names = Annotated[list[str], AfterValidator(_check_different)]
Sources = Annotated[
    list[Annotated[str, AfterValidator(lambda text: ",".join(split_names(text)))]],
    BeforeValidator(lambda value: [value] if value == ALL_BUT_TARGET else value),
    AfterValidator(_check_different),
]
Seeds = Annotated[
    list[Number],
    BeforeValidator(_list_seeds),
    AfterValidator(_check_different),
]
Changes = dict[str, Annotated[Any, BeforeValidator(_check_plain)]]  # of a recipe


@dataclass(frozen=True, config=STRICT)
class Entry:
    """A method of the grid with what it changes."""

    method: str
    set: Changes = field(default_factory=dict)
    tower: str | None = None  # instead of the grid's towers
    views: Count | None = None  # instead of the grid's
    train: dict[str, Any] = field(default_factory=dict)  # changed settings of `cafe train`

    @property
    def label(self) -> str:
        """The method with what it changes, as a table shows it."""
        views = {"views": self.views} if self.views else {}
        changes = ", ".join(f"{key}={value}" for key, value in {**self.set, **self.train, **views}.items())
        return f"{self.method} ({changes})" if changes else self.method

    @property
    def kind(self) -> type[Method]:
        """The method itself."""
        return find_method(self.method)

    @property
    def recipe_settings(self) -> frozenset[str]:
        """The names of all settings of its recipe that mean something to it."""
        names = {setting.name for setting in fields(self.kind.recipe_type)}
        return frozenset(names if self.kind.trained else names - {"epochs", "prior"})


@dataclass(frozen=True, config=STRICT)
class Benchmark:
    """A benchmark file; the defaults are these."""

    name: str
    sources: Sources  # or `ALL_BUT_TARGET` alone
    methods: list[Entry]
    about: str = ""
    seeds: Seeds = field(default_factory=lambda: [0, 1, 2, 3, 4])
    towers: Names = field(default_factory=lambda: ["clip-vit-b32"])
    targets: Names | None = None  # the sources, each evaluated on all of them
    protocol: ProtocolName = "clean"
    draws: Count | None = None  # of the settings of every method that is trained, for each seed, which is a trial
    views: Count | None = None  # per face; one for every epoch and the clean one, as published
    features: dict[str, Any] = field(default_factory=dict)
    set: Changes = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Names what the file asks for; its comments and its explanation play no part."""
        record = {**asdict(self), "about": "", "targets": self.evaluated_on}
        if self.draws is None:
            del record["draws"]
        return digest(json.dumps(record, sort_keys=True).encode())

    @property
    def title(self) -> str:
        """What its folder and its run in MLflow are called."""
        return f"{self.name}-{self.digest[:8]}"

    @property
    def evaluated_on(self) -> list[str]:
        """The manifests to evaluate on."""
        return self.targets or list(dict.fromkeys(name for source in self.sources for name in source.split(",")))

    @property
    def trainings(self) -> list[tuple[str, str]]:
        """What is trained on, comma-separated, and in leave-one-domain-out the target that it leaves out."""
        if self.sources != [ALL_BUT_TARGET]:
            return [(source, "") for source in self.sources]
        return [(",".join(sorted({*self.evaluated_on} - {target})), target) for target in self.evaluated_on]

    @property
    def views_per_seed(self) -> bool:
        """Whether every seed of a trained method has views of its own."""
        return self.features.get("view_seed") == PER_SEED

    @property
    def first_view_seed(self) -> int:
        """The seed of the views, or the first one where there are several."""
        return self.seeds[0] if self.views_per_seed else int(self.features.get("view_seed", 0))

    def list_draws(self, entry: Entry) -> list[int | None]:
        """Return the draws of a method's settings for each seed; None alone where there is no sweep."""
        return list(range(self.draws)) if self.draws and entry.kind.trained else [None]

    def view_seed(self, entry: Entry, seed: int) -> int:
        """Return the seed of the views whose features a method reads."""
        clean = entry.kind.clean_features or not entry.kind.trained  # that view is the same by every seed
        return seed if self.views_per_seed and not clean else self.first_view_seed

    def combinations(self) -> Iterator[tuple[str, Entry, str | None]]:
        """Yield every (source, method, tower); the tower is None for a method that has no use for one."""
        for source, _ in self.trainings:
            for entry in self.methods:
                towers: Sequence[str | None] = (entry.tower,) if entry.tower else self.towers
                for tower in towers if entry.kind.needs_tower() else (None,):
                    yield source, entry, tower

    def train_settings(self, source: str, entry: Entry, tower: str | None) -> TrainSettings:
        """Return the settings of `cafe train` for a combination; its seed, store and views are still open."""
        shared = dict(self.train)
        if not entry.kind.trained:
            shared.pop("epochs", None)  # meant for methods that have epochs
            if shared.get("selection") in ("leave_one_out", "oracle"):
                shared.pop("selection")
        fold = dict(self.trainings)[source]
        own = {**shared, **entry.train}
        own.setdefault("image_size", self.features.get("input_size"))  # the same pictures for all of them
        changes = {key: value for key, value in self.set.items() if key in entry.recipe_settings} | entry.set
        return TrainSettings(
            source=source,
            method=entry.method,
            overrides=tuple(f"{key}={value}" for key, value in changes.items()),
            backbone=tower or "none",
            targets=fold or ",".join(self.evaluated_on),
            fold=fold,
            draw=0 if self.draws and entry.kind.trained else None,
            views_per_seed=self.views_per_seed and entry.kind.trained,
            protocol=self.protocol,
            experiment=self.name,
            **own,
        )


def read_benchmark(path: Path) -> Benchmark:
    """Read a benchmark file; raise `UserError` for what is not TOML, an unknown key or name, and a value of another type."""
    try:
        content = tomllib.loads(read_file(UPath(path), MOST_TEXT).decode())
    except OSError as error:
        raise UserError(f"Cannot read the benchmark file {str(path)!r} ({error.strerror}): check the path.") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{path.name} is not TOML ({error}): fix it.") from None
    benchmark = parse_benchmark(path.stem, content)
    weights = [benchmark.train.get("init"), *(entry.train.get("init") for entry in benchmark.methods)]
    towers = [*benchmark.towers, *(entry.tower for entry in benchmark.methods)]
    own(*filter(None, (*towers, *weights)), remember=True)
    return benchmark


def parse_benchmark(name: str, content: Mapping[str, Any]) -> Benchmark:
    """Return the benchmark of a parsed file; raise `UserError`."""
    own = {key: value for key, value in content.items() if key not in ("features", "train", "methods")}
    if "name" in own:
        raise UserError(f"The key name of {name} has no meaning, as a benchmark is called like its file: leave it out.")
    if not isinstance(content.get("methods"), list) or not content["methods"]:
        raise UserError(f"The benchmark {name} has no methods: give a list of them.")
    entries = [_parse_entry(item, name) for item in content["methods"]]
    shared = _check_table(content.get("train", {}), f"[train] in {name}")
    features = _check_table(content.get("features", {}), f"[features] in {name}")
    per_seed = {"view_seed": features.pop("view_seed")} if features.get("view_seed") == PER_SEED else {}
    benchmark = check(Benchmark, {
        **own,
        "name": name,
        "methods": entries,
        "set": shared.pop("set", {}),
        "train": check_settings(TrainSettings, shared, f"[train] in {name}", ("set",)),
        "features": check_settings(ExtractSettings, features, f"[features] in {name}") | per_seed,
    }, name)  # fmt: skip
    if benchmark.sources == [ALL_BUT_TARGET] and len(benchmark.targets or ()) < 2:
        raise UserError(f'sources = "{ALL_BUT_TARGET}" in {name} needs at least two targets: give a list of them.')
    if benchmark.draws:
        _check_draws(benchmark)
    settings = frozenset[str]().union(*(entry.recipe_settings for entry in entries))
    for key in benchmark.set.keys() - settings:
        raise unknown(f"setting of the methods in {name}", key, settings)
    for (label, _), count in Counter((entry.label, entry.tower) for entry in entries).items():
        if count > 1:
            raise UserError(
                f"The method {label} is listed {count} times in {name}: keep one, or change a setting of it."
            )
    return benchmark


def _check_draws(benchmark: Benchmark) -> None:
    """Raise `UserError` for a method whose draws nothing would choose between."""
    for entry in (entry for entry in benchmark.methods if entry.kind.trained):
        selection = {**benchmark.train, **entry.train}.get("selection", TrainSettings.selection)
        if selection not in CHOOSING:
            raise UserError(
                f"The draws of {entry.label} in {benchmark.name} are chosen by held-out faces, and its selection is "
                f"{selection!r}: set selection under [train] to one of {', '.join(CHOOSING)}."
            )


def _parse_entry(item: Any, name: str) -> Entry:
    if isinstance(item, str):
        item = {"method": item}
    if not isinstance(item, dict) or not isinstance(item.get("method"), str):
        raise UserError(f'Cannot read the method {item!r} of {name}: write "NAME" or {{ method = "NAME", … }}.')
    where = f"the method {item['method']} in {name}"
    find_method(item["method"])
    named = [one.name for one in fields(Entry) if one.name != "train"]
    own = {key: value for key, value in item.items() if key in named}
    rest = {key: value for key, value in item.items() if key not in named}
    return check(Entry, {**own, "train": check_settings(TrainSettings, rest, where, named)}, where)


def check(kind: type[Checked], values: Mapping[str, Any], where: str, more: Collection[str] = ()) -> Checked:
    """Return values as a dataclass or model of pydantic; raise `UserError` for the first that does not fit.

    `more` names keys that are allowed besides.
    """
    try:
        return kind(**values)
    except ValidationError as error:
        first = error.errors()[0]
    key, value = " of ".join(str(part) for part in reversed(first["loc"]) if isinstance(part, str)), first["input"]
    context, problem = first.get("ctx", {}), first["type"]
    if problem in ("extra_forbidden", "unexpected_keyword_argument"):
        known = get_type_hints(kind) if not issubclass(kind, BaseModel) else kind.model_fields
        raise unknown(f"key of {where}", key, {*known, *more} - {"name"})
    if problem == "missing":
        raise UserError(f"The benchmark {where} has no {key}: give a list of them.")
    if problem == "literal_error":
        raise unknown(f"{key} of {where}", value, re.findall(r"'([^']*)'", context["expected"]))
    if problem == "greater_than_equal":
        raise UserError(f"{key} of {where} is at least {context['ge']}, not {value!r}.")
    if problem == "less_than_equal":
        raise UserError(f"{key} of {where} is at most {context['le']}, not {value!r}.")
    wanted = str(context["error"]) if problem == "value_error" else KINDS.get(problem.removesuffix("_type"), problem)
    raise UserError(f"{key} of {where} must be {wanted}, not {value!r}.")


def check_settings(
    settings: type[Any], values: Mapping[str, Any], where: str, more: Collection[str] = ()
) -> dict[str, Any]:
    """Return values of those fields of a settings dataclass that a file may set, each as its type says."""
    hints = get_type_hints(settings, include_extras=True)
    free: dict[str, Any] = {
        one.name: (hints[one.name], one.default) for one in fields(settings) if one.metadata["in_file"]
    }
    model: type[BaseModel] = create_model(settings.__name__, __config__=STRICT, **free)
    return check(model, values, where, more).model_dump(exclude_unset=True)


def _check_table(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where} must be a table, not {value!r}.")
    return dict(value)
