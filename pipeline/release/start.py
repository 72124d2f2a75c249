"""Where a training starts: the weights of a model that is trained already, whose head goes on learning on other faces.

Method, features and recipe are the start's unless the user says otherwise. The run's specification names the start's weights
by their digest and what they learned from: no set that the start has seen is unseen to the run.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from upath import UPath

from cafe.data.manifest import Manifest
from cafe.errors import UserError, first_line, quote
from cafe.files import read_file, write_file
from cafe.methods import find_method
from cafe.methods.method import Method
from cafe.pipeline.features.integrity import find_stores
from cafe.pipeline.features.key import FeatureKey
from cafe.pipeline.models import build_method, name_files, read_averages
from cafe.pipeline.need import OF_THE_SOURCE, Need
from cafe.pipeline.release.choice import find_runs
from cafe.pipeline.runs import START, RunSpec, check_exported, model_folder
from cafe.pipeline.settings import TrainSettings
from cafe.pipeline.workspace import Workspace
from cafe.records import digest
from cafe.results.sources import Source
from cafe.towers.names import single_names
from cafe.towers.weights import read_tensors

TEMPERATURE = "temperature"  # is fitted anew where the run is calibrated


@dataclass(frozen=True)
class Start:
    """A trained model: what the user calls it, the specification of the run it is, and its file of weights."""

    name: str
    spec: RunSpec
    weights: UPath

    @property
    def trained_on(self) -> tuple[Source, ...]:
        """All that it learned from."""
        return self.spec.trained_on

    def check(self, spec: RunSpec) -> None:
        """Raise `UserError` where a run cannot go on from here: of other classes, another method, tower or size."""
        if spec.classes != self.spec.classes:
            raise UserError(
                f"{spec.source!r} has the classes {', '.join(spec.classes)} and the start {self.name!r} "
                f"{', '.join(self.spec.classes)}: index {spec.source!r} with --expressions as the start's, or train without "
                "--start."
            )
        ours, theirs = _identify(spec.features), _identify(self.spec.features)
        if differing := [name for name in ours | theirs if ours.get(name) != theirs.get(name)]:
            raise UserError(
                f"The features of {spec.source!r} differ from those of the start {self.name!r} in {', '.join(differing)}: "
                f"run `{extract_command(spec.source, self.spec)}` and choose them with --store."
            )
        continue_from(build_method(spec), self.weights, self.name)

    def check_features(self, manifests: Sequence[Manifest], workspace: Workspace) -> None:
        """Raise `UserError` with the one command to give where features of a source are missing that the start can read."""
        if not find_method(self.spec.method).needs_features() or self.spec.live:
            return
        for manifest in manifests:
            stores = find_stores(workspace.features, manifest.name)
            if not all(Need.evaluated_with(manifest.name, one).find(stores) for one in self.spec.single_layers):
                raise UserError(
                    f"There are no features of {manifest.name!r} as the start {self.name!r} reads them: run "
                    f"`{extract_command(manifest.name, self.spec)}`."
                )


def find_start(workspace: Workspace, name: str, seed: int = 0) -> Start:
    """Return the model that a training starts from: of several seeds that one averages, the one of this seed, or the first.

    `name` is a run's, `shipped`, an exported folder's or an address of MLflow's. Raises `UserError`.
    """
    (found, *_), _ = find_runs(workspace, name)
    folder = model_folder(found)
    check_exported(folder)
    files = [name_files(number) for number in range(1, read_averages(folder)[0] + 1)]
    members = [Start(name, RunSpec.load(folder, record), folder / weights) for record, weights in files]
    if not find_method(members[0].spec.method).trained:
        raise UserError(f"{members[0].spec.method} is not trained in epochs, so nothing can start from {name!r}.")
    return next((member for member in members if member.spec.seed == seed), members[0])


def take_over(workspace: Workspace, settings: TrainSettings, given: Collection[str]) -> TrainSettings:
    """Return settings with those of the start in place of all that the user has not `given`; raise `UserError`.

    Without --selection the epoch is chosen on faces held out of the source: a few hundred faces are soon learned by heart.
    Votes are learned only where the source has some.
    """
    if not settings.start:
        return settings
    spec = find_start(workspace, settings.start, settings.seed).spec
    if "method" in given and settings.method != spec.method:
        raise UserError(f"The start {settings.start!r} is of the method {spec.method}: leave --method out.")
    taken: dict[str, Any] = {"method": spec.method, "network": spec.network, "image_size": spec.image_size}
    taken |= {"precision": spec.precision, "live": spec.live, "backbone": spec.backbone, "selection": "source_val"}
    manifests = [workspace.load_manifest(name.strip()) for name in settings.source.split(",") if name.strip()]
    kinds = {manifest.kind for manifest in manifests}
    published = find_method(spec.method).published_recipe(kinds.pop() if len(kinds) == 1 else "")
    recipe = dict(spec.recipe)
    if all(manifest.votes is None for manifest in manifests):
        recipe.pop("labels", None)
    changes = [f"{name}={value}" for name, value in recipe.items() if getattr(published, name) != value]
    taken = {name: value for name, value in taken.items() if name not in given}
    return replace(settings, **taken, overrides=(*changes, *settings.overrides))


def keep_start(start: Start | None, run: UPath) -> None:
    """Copy the weights of a start to the folder of the run that goes on from them, where every worker finds them."""
    if start:
        write_file(run / START, read_file(start.weights))


def continue_from(method: Method, weights: UPath, name: str, expected: str = "") -> None:
    """Give a method the weights of a start, its standardisation with them; raise `UserError` where they do not fit."""
    if expected and digest(read_file(weights)) != expected:
        raise UserError(f"{weights} is not what this run was planned to start from: give the command again.")
    state = method.state_dict()
    learned = read_tensors(weights, f"give {name!r} anew")
    try:
        method.load_state_dict({**learned, TEMPERATURE: state[TEMPERATURE]} if TEMPERATURE in state else {
            key: value for key, value in learned.items() if key != TEMPERATURE
        })  # fmt: skip
    except RuntimeError as error:
        reason = quote(RuntimeError(first_line(str(error).partition("\n")[2] or str(error)).strip()))
        raise UserError(
            f"The weights of the start {name!r} do not fit ({reason}): leave out what changes the size of its head."
        ) from None


def extract_command(manifest: str, spec: RunSpec) -> str:
    """Return the command that computes features of a manifest as a run reads them."""
    key = spec.features
    assert key is not None
    assert spec.backbone is not None
    names, maps = single_names(spec.backbone), "map" in find_method(spec.method).needs
    layers = [name.partition("#")[2] for name in names]
    tower = f"--backbone {names[0].partition('#')[0]} --layers {','.join(layers)}" if all(layers) else ""
    words = [tower or f"--backbone '{spec.backbone}'", f"--views {spec.views}", f"--input-size {key.input_size}"]
    words += [f"--precision {key.precision}"] * (key.precision != "fp32") + ["--maps"] * maps
    words += [f"--interpolation {key.interpolation}"] * (key.interpolation != "bilinear")
    words += [f"--dtype {key.dtype}"] * (key.dtype != "float16")
    return " ".join([f"cafe extract {manifest}", *words])


def _identify(key: FeatureKey | None) -> dict[str, Any]:
    """Return what of features a head must find again, whatever the faces."""
    return {name: value for name, value in vars(key).items() if name not in OF_THE_SOURCE} if key else {}
