"""A run: everything that decides its result, written down before it starts, and what it leaves behind.

    runs/METHOD-SOURCE-sSEED-DIGEST/
        run.json                     what decides it; its digest names the run, so the same command is the same run
        experiments/EXPERIMENT.json  the experiments it belongs to, and their benchmark where there is one
        made.json                    the command that began it, and when it began and ended
        status.json                  RUNNING, FINISHED once it is evaluated, FAILED or KILLED, with the reason
        progress.json, epochs/0001.json                       how far it is, and the metrics of each epoch
        checkpoints/0001[-00000032]/ the training's state after an epoch, or 32 steps of the next: safetensors + JSON
        train/                       what Ray Train keeps of several workers
        model.safetensors, result.json                        the trained method, then the record that it is
        start.safetensors                                     the weights it went on from, where it did
        exported/                                             of an exported model, the folder it came in, instead
        predictions/[PROTOCOL/]TARGET[@SPLIT].parquet, figures/KIND/[PROTOCOL/]TARGET[@SPLIT].png

Everything here is read and written without torch: what builds a method from its specification is in `models`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from typing import Annotated, Any, Literal

from annotated_types import Interval
from upath import UPath

from cafe.data.expressions import EXPRESSIONS, check_classes
from cafe.errors import DamagedError, UserError, first_line
from cafe.files import encode_json, exists, place_below, read_file, read_json, write_changed, write_json
from cafe.pipeline.features.key import Colours, FeatureKey, Spreads
from cafe.pipeline.process.command import current_command
from cafe.pipeline.process.versions import code_version
from cafe.pipeline.settings import Count, RunChoices, RunIdentity, Seed, Side
from cafe.pipeline.workspace import check_name
from cafe.records import FORMAT, check_record, digest, digest_changes
from cafe.results.runs import read_record, read_result
from cafe.results.sources import Source
from cafe.seals import damaged, read_sealed, verify_file, write_sealed
from cafe.towers.names import FINAL, single_names

CLAIMED = ("source", "source_kind", "source_digest", "method", "seed", "selection", "fold")  # of run.json
START = "start.safetensors"  # file of the weights that a run went on from
DECIDING = (".json", ".safetensors")  # files of an exported folder by which it predicts
MODEL_FORMAT = 2  # of model.json; those of format 1 may be from before there were seals
EXPORTED = "exported"  # folder of a run that came as an exported model
Size = Annotated[int, Interval(ge=1, le=2**20)]  # of features
Status = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]


@dataclass(frozen=True, kw_only=True)
class RunSpec(RunIdentity):
    """What decides a run's result: what the user chose, and what the choices left open, the manifest and the store come to.

    Workers, devices and paths are not part of it. A field that is added here needs a default, which renames nothing.
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012  # read by pydantic, not a field

    method: str = field()  # without a default, so that every name depends on it
    source: str  # `a+b` where there are several
    source_digest: str
    source_kind: str = ""  # the data set the source is; of several sources the one they agree in
    sources: tuple[Source, ...] = ()  # where there are several
    classes: tuple[str, ...] = EXPRESSIONS  # in the order of labels and logits
    recipe: dict[str, Any]  # all settings of it
    recipe_changes: dict[str, Any]  # those that differ from the method's defaults
    image_size: Side
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    policy: str
    views: Count
    view_seed: Seed = 0  # the seed, with `views_per_seed`, by which the seeds of a row do not share their views
    interpolation: str = "bilinear"
    mean: Colours
    std: Spreads
    features: FeatureKey | None = None  # of the source's store, if the method reads one; how the tower runs if `live`
    backbone: str | None = None  # as the user wrote it
    width: Size | None = None
    grid: tuple[Size, Size] | None = None  # (H, W) of the maps it reads, which the store says
    rows: str = ""  # digest of the rows trained on or held out, where pictures of the source are left out
    votes: str = ""  # digest of the shares of the classes, where a training learns these
    drawn: tuple[str, ...] = ()  # settings of the recipe that `draw` decides, where it is one of a sweep
    init_digest: str = ""  # of the file of initial weights, where there is one
    plugins: tuple[str, ...] = ()  # NAME:DIGEST of what of the run is none of this package's
    revision: str = ""  # of the method, where its defaults changed under the same settings
    start: str = ""  # digest of the weights it went on from, where it did
    start_sources: tuple[Source, ...] = ()  # what these learned from
    exported: str = ""  # NAME:DIGEST of the exported folder that it is, which averages and rounds as it was exported to

    @property
    def name(self) -> str:
        """Readable first, unique last."""
        words = "".join(f"-{word}" for word in (self.tag, self.exported.partition(":")[0]) if word)
        return f"{self.method}-{self.source}-s{self.seed}{words}-{self._digest()}"

    @property
    def group(self) -> str:
        """Names what the runs of a row have in common, which differ in their seed, or also in the domain left out."""
        same, key = self, self.features
        if self.views_per_seed:
            key = replace(key, view_seed=0) if key else None
            same = replace(same, features=key, view_seed=0)
        if self.fold:
            key = replace(key, images="") if key else None
            of_sources: dict[str, Any] = dict.fromkeys(("source_digest", "source_kind", "rows", "votes"), "")
            same = replace(same, features=key, source=self.domains, sources=(), fold="any", **of_sources)
        if self.draw is not None:  # a row takes one draw of each seed
            fixed = {name: value for name, value in self.recipe_changes.items() if name not in self.drawn}
            same = replace(same, draw=0, recipe_changes=fixed)
        return same._digest("seed")

    @property
    def domains(self) -> str:
        """All that take part in leave-one-domain-out, as `a+b+c`."""
        return "+".join(sorted([*(source.name for source in self.own_sources), self.fold]))

    @property
    def own_sources(self) -> tuple[Source, ...]:
        """Its sources, also where there is only one."""
        return self.sources or (Source(self.source, self.source_kind, self.source_digest),)

    @property
    def trained_on(self) -> tuple[Source, ...]:
        """Its sources, and those of the model it started from."""
        return tuple(dict.fromkeys((*self.own_sources, *self.start_sources)))

    @property
    def single_layers(self) -> list[RunSpec]:
        """This specification with each of the layers of its tower that it reads side by side; itself where it reads one."""
        if self.backbone is None or self.features is None or "+" not in self.backbone:
            return [self]
        tower, _, layers = self.features.backbone.partition("#")
        whole = (f"{tower}#{layer}" if layer != FINAL else tower for layer in layers.split("+"))
        keys = [replace(self.features, backbone=name) for name in whole]
        named = zip(single_names(self.backbone), keys, strict=True)
        return [replace(self, backbone=name, features=key) for name, key in named]

    def _digest(self, *without: str) -> str:
        return digest_changes(self, ("recipe", "grid", *without))[:8]

    @property
    def settings(self) -> dict[str, Any]:
        """What a user can choose, flat and named as on the command line: by these, runs are distinguished."""
        names = [one.name for one in (*fields(RunIdentity), *fields(RunChoices)) if one.name != "source"]
        chosen = {name: getattr(self, name) for name in names if hasattr(self, name)}
        chosen["backbone"] = self.backbone or "none"
        if not self.sources:
            del chosen["sampler"]
        for name in ("fold", "views_per_seed", "start"):
            if not chosen[name]:
                del chosen[name]
        if self.draw is None:
            del chosen["draw"]
        chosen |= {"start": self.start[:8]} if self.start else {}
        chosen |= {"domains": self.domains} if self.fold else {}
        chosen |= {"revision": self.revision} if self.revision else {}
        chosen |= {"exported": self.exported.partition(":")[0]} if self.exported else {}
        chosen |= {"classes": ", ".join(self.classes)} if self.classes != EXPRESSIONS else {}
        return chosen | {f"recipe.{name}": value for name, value in self.recipe.items() if value != ""}

    @property
    def derived(self) -> dict[str, Any]:
        """What only follows from the settings, the source, its features and the code, flat."""
        return {
            "manifest": self.source_digest,
            **({"rows": self.rows} if self.rows else {}),
            **({"votes": self.votes} if self.votes else {}),
            **({"init_digest": self.init_digest} if self.init_digest else {}),
            "store": self.features.digest if self.features else "none",
            "width": self.width or 0,
            "interpolation": self.interpolation,
            "mean": ", ".join(map(str, self.mean)),
            "std": ", ".join(map(str, self.std)),
            "code": code_version(),
        }

    @classmethod
    def load(cls, run: UPath, file: str = "run.json") -> RunSpec:
        """Read the specification in a run's folder; raise `UserError` when it is missing or of another format."""
        record = read_record(run, file)
        if record is None:
            raise UserError(f"There is no run in {run}: give the name of a run of this workspace.")
        spec = check_record(record.get("spec"), cls, f"{run}/{file}")
        check_classes(spec.classes)
        return spec

    def save(self, run: UPath, not_as_published: Sequence[str] = ()) -> None:
        """Write down what the run is, unless it is there already.

        Raises `UserError` for a run of that name with another specification: a default has changed since.
        """
        if read_record(run) is not None:
            there = asdict(RunSpec.load(run))
            there["recipe"] = self.recipe | there["recipe"]  # a younger setting has its default there
            changed = [name for name, value in asdict(self).items() if there[name] != value]
            if changed:
                raise UserError(
                    f"The run {run.name!r} was begun with another {changed[0]} by another version of cafe: give the "
                    "command with --tag WORD for a run of its own."
                )
            return
        identity: dict[str, Any] = {"name": self.name, "group": self.group, "source": self.source}
        identity |= {"source_kind": self.source_kind}
        identity |= {"source_digest": self.source_digest, "method": self.method, "selection": self.selection}
        identity |= {"classes": list(self.classes)}
        identity |= {"sources": [asdict(source) for source in self.trained_on], "fold": self.fold}
        if self.draw is not None:
            identity |= {"draw": self.draw, "drawn": list(self.drawn)}
        described = {"settings": self.settings, "derived": self.derived, "not_as_published": list(not_as_published)}
        record = {"version": FORMAT, "seed": self.seed, "spec": asdict(self)}
        write_sealed(run / "run.json", {**identity, **described, **record})


def check_identity(run: UPath) -> None:
    """Raise `UserError` unless the record in a run's folder, where it holds a specification, describes that very run.

    What a file from elsewhere claims of itself is compared with what its specification comes to.
    """
    record = read_record(run) or {}
    if not record.get("spec"):
        return
    spec = RunSpec.load(run)
    expected = {"name": spec.name, "group": spec.group, **{name: getattr(spec, name) for name in CLAIMED}}
    expected |= {"classes": list(spec.classes), "sources": [asdict(source) for source in spec.trained_on]}
    settings = record.get("settings") or {}
    expected["settings"] = settings | {name: value for name, value in spec.settings.items() if name in settings}
    wrong = [name for name, value in expected.items() if record.get(name, value) != value]
    if wrong or spec.name != run.name:
        name = wrong[0] if wrong else "name"
        raise UserError(
            f"{run}/run.json says of its {name} {record.get(name)!r}, and its specification makes it "
            f"{expected[name]!r}: it is not the run it claims to be; fetch it from a server that you trust."
        )


def model_folder(run: UPath) -> UPath:
    """Return where a run's folder, or an exported one, keeps its weights."""
    return run / EXPORTED if exists(run / EXPORTED / "model.json") else run


@dataclass(frozen=True)
class Averaged:
    """What an exported model averages: the runs of these seeds, and mirror images."""

    seeds: Sequence[int] | None = None
    mirror_images: bool = False


@dataclass(frozen=True)
class ModelRecord:
    """What programs read of model.json: all that decides an answer, or what is said of one."""

    averaged: Averaged | None = None
    origin: Mapping[str, Any] = field(default_factory=dict)
    scores: Mapping[str, float | None] = field(default_factory=dict)
    threshold: Annotated[float, Interval(ge=0, le=1)] | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    format: int = 1


def read_model(folder: UPath) -> dict[str, Any]:
    """Return what model.json says of an exported folder, nothing where there is none.

    Raises `DamagedError` where it is not what was written, `UserError` where it says what no export writes. One without a
    seal, from before there were seals, is named by a warning.
    """
    path, remedy = folder / "model.json", "export the run again with `cafe export`"
    record = read_sealed(path, "read", remedy) or {}
    check_record(record, ModelRecord, str(path))
    if record and verify_file(path) == "unchecked":
        if record.get("format", 1) >= MODEL_FORMAT:
            raise damaged(path, remedy)
        _name_unchecked(str(path))
    return record


@cache
def _name_unchecked(path: str) -> None:
    logging.getLogger(__name__).warning(
        "%s is unchecked: it has no seal, so that nobody can say whether it was changed; %s.",
        path,
        "export the run again with `cafe export`",
    )


def check_exported(folder: UPath) -> None:
    """Raise `DamagedError` where a file by which an exported folder predicts is not the one that was exported with it.

    Each may be whole by itself, as when the weights of another export were copied over its own.
    """
    for name, expected in (read_model(folder).get("files") or {}).items():
        path = place_below(folder, name)
        if path.suffix in DECIDING and exists(path) and digest(read_file(path)) != expected:
            raise DamagedError(f"{path} is not what was exported: export the run again with `cafe export`.")


def is_finished(run: UPath) -> bool:
    """Whether a run was trained to its end; raise `DamagedError` where the record of that is not what was written."""
    return read_result(run) is not None


def add_experiment(run: UPath, experiment: str, benchmark: str | None = None) -> None:
    """Note that a run belongs to an experiment, and to a benchmark of it where it is one's cell."""
    path = place_below(run / "experiments", f"{check_name(experiment)}.json")
    known = read_json(path) or {}
    if not known or (benchmark and known.get("benchmark") != benchmark):
        write_json(path, {"benchmark": benchmark})


def note_start(run: UPath) -> None:
    """Note the command that begins a run and the time, unless it was begun before: who goes on with it did not make it."""
    if not exists(run / "made.json"):
        write_json(run / "made.json", {"command": current_command(), "started": time.time()})


def note_end(run: UPath) -> None:
    """Note the time at which a run ended."""
    write_json(run / "made.json", {**(read_json(run / "made.json") or {}), "ended": time.time()})


def read_status(run: UPath) -> str:
    """Return the status of a run, empty before it has one."""
    return str((read_json(run / "status.json") or {}).get("status", ""))


def note_status(run: UPath, status: Status, reason: str = "") -> None:
    """Write down how far a run is and, where it failed, the first line of the reason."""
    record = {"status": status, "reason": first_line(reason)}
    write_changed(run / "status.json", encode_json(record))
