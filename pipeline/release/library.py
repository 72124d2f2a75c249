"""What `import cafe` offers: manifests, features, trained models and scores of a workspace, by name, and the work itself.

The latter is that of the commands, by the same engine. Torch is imported when a model is loaded or trained, and not before.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, TypeVar

from cafe.data.manifest import Manifest
from cafe.errors import UserError, unknown
from cafe.pipeline.features.integrity import find_stores
from cafe.pipeline.features.store import FeatureStore
from cafe.pipeline.process.command import note_call
from cafe.pipeline.process.machine import own_device
from cafe.pipeline.process.progress import no_bar
from cafe.pipeline.release.choice import find_runs
from cafe.pipeline.release.confidence import read_confidence
from cafe.pipeline.release.shipped import SHIPPED
from cafe.pipeline.settings import ExtractSettings, TrainSettings
from cafe.pipeline.workspace import Workspace
from cafe.report import ReportSettings
from cafe.results.runs import choose
from cafe.results.scores import describe_left_out, meet, read_scores, share_sources

if TYPE_CHECKING:
    import pandas as pd

    from cafe.inference.model import Model

Settings = TypeVar("Settings")


def load_manifest(name: str, workspace: str = "work") -> Manifest:
    """Return a manifest of a workspace (a folder or URI); raise `UserError` naming those there are.

    >>> manifest = load_manifest("two", workspace)
    >>> len(manifest), len(manifest.rows("test")), manifest.read_face(0).shape
    (48, 9, (24, 24, 3))
    """
    return Workspace.at(workspace).load_manifest(name)


def load_store(manifest: str, workspace: str = "work", folder: str | None = None) -> FeatureStore:
    """Return the features of a manifest: its only store, or the one in that folder; raise `UserError` naming all.

    `read_view("pooled", 0)` gives those of the clean view, (N, C); `group` is the Zarr group itself.

    >>> store = load_store("two", workspace)
    >>> store.info.describe().partition(" of ")[0]
    '2 views × 24 channels and 24×4×4 maps'
    >>> store.read_view("pooled", 0).shape
    (48, 24)
    """
    known = Workspace.at(workspace)
    known.load_manifest(manifest)
    stores = {path.name: (path, about) for path, about in find_stores(known.features, manifest)}
    if folder is None and len(stores) != 1:
        raise UserError(
            f"{manifest!r} has {len(stores)} feature stores: give the folder of one, {', '.join(stores)}."
            if stores
            else f"There are no features of {manifest!r} yet: run `cafe extract {manifest}`."
        )
    chosen = folder or next(iter(stores))
    if chosen not in stores:
        raise unknown(f"feature store of {manifest!r}", chosen, stores)
    return FeatureStore(*stores[chosen])


def load_model(
    name: str = SHIPPED,
    workspace: str = "work",
    *,
    best: str | None = None,
    ensemble: bool = False,
    device: str | None = None,
    batch_size: int | None = None,
) -> Model:
    """Return a trained model: the one that ships, a run by its name or the beginning of it, or an exported folder.

    Raises `UserError` for a name that is none of these. With `best="source_val"` the name is an experiment's, of whose runs
    the one with the best validation accuracy on the source is taken; `ensemble` averages all seeds of the run. `device` is
    `cpu` or `cuda`; default: a GPU where there is one. Passes of the tower are filled up to `batch_size` faces; the default
    makes the numbers those of the run's predictions, with 1 a single face is answered sooner.

    >>> model = load_model("cafe-one-s0", workspace)
    >>> faces = [load_manifest("two", workspace).read_face(row) for row in range(3)]
    >>> probabilities = model.predict(faces)
    >>> probabilities.shape, probabilities.dtype
    ((3, 7), dtype('float32'))
    >>> bool(abs(probabilities.sum(axis=1) - 1).max() < 1e-6)
    True
    """
    from cafe.inference.model import BATCH_SIZE
    from cafe.pipeline.models import build_model

    runs, _ = find_runs(Workspace.at(workspace), name, best, ensemble)
    model = build_model(runs, device or own_device(None), batch_size or BATCH_SIZE)
    return replace(model, threshold=read_confidence(runs).threshold)


def scores(workspace: str = "work", experiment: str | None = None) -> pd.DataFrame:
    """Return a row for every run, protocol and target, computed from the runs' predictions; of one experiment or of all.

    The columns are every metric of `cafe.results.metrics.METRICS` and a recall for every class, as fractions, beside what
    tells runs and targets apart (`cafe.results.scores.SCORE_FIELDS`). Predictions on other faces than those of the rest are
    left out with a warning that says which (`cafe.results.scores.meet`), and so are trainings on other faces than those of
    the rest of a row of leave-one-domain-out.

    >>> table = scores(workspace)
    >>> table[["method", "source", "target", "relation", "faces"]].values.tolist()
    [['cafe', 'one', 'two', 'unseen', 48]]
    """
    known = Workspace.at(workspace)
    chosen = choose(known.read_runs(), experiment)
    manifests = known.manifest_digests()
    shared, lines = share_sources(chosen.runs, manifests)
    runs, left_out = meet(shared, manifests)
    for line in [*lines, *describe_left_out(left_out)]:
        warnings.warn(line, stacklevel=2)
    return read_scores(runs, manifests).drop(columns=["column", "sources"])


def extract(*manifests: str, workspace: str = "work", **settings: Any) -> list[FeatureStore]:
    """Compute frozen features of manifests, once, and return their stores; what is there already costs nothing.

    `settings` are the options of `cafe extract`, with `_` for `-`: `backbone="face-resnet"`, `views=9`, `maps=True`, …
    Raises `UserError` for others, and where pictures cannot be read.

    >>> (store,) = extract("two", workspace=workspace, backbone=tower, views=2, maps=True)
    >>> store.read_view("pooled", 1).shape
    (48, 24)
    """
    from cafe.pipeline.features.extract import extract as extract_features

    known, chosen = Workspace.at(workspace), _choose(ExtractSettings, "extract", settings)
    note_call("extract", {"manifests": manifests, **settings})
    faces = [known.load_manifest(name) for name in manifests]
    with no_bar("", "") as progress:
        results = extract_features(known, faces, chosen, progress)
    return [FeatureStore(result.store, result.info) for result in results]


def train(
    source: str,
    method: str = "cafe",
    workspace: str = "work",
    recipe: Mapping[str, object] | None = None,
    **settings: Any,
) -> str:
    """Train a method on a source, evaluate it on every other manifest, and return the name of the run.

    `recipe` changes settings of the method's recipe, as `--set` does; `settings` are the other options of `cafe train`, with
    `_` for `-`: `seed=1`, `epochs=8`, `image_size=64`, `targets="cinema"`, … The same call is the same run: repeated it does
    nothing, interrupted it goes on. Raises `UserError` for other settings, and where something is missing.

    >>> name = train("one", workspace=workspace, recipe={"batch_size": 20}, targets="two", epochs=1)
    >>> name.rpartition("-")[0], scores(workspace).run.tolist() == [name]
    ('cafe-one-s0', True)
    """
    from cafe.pipeline.cluster import set_environment

    changes = tuple(f"{key}={value}" for key, value in (recipe or {}).items())
    given = {"source": source, "method": method, "overrides": changes, **settings}
    chosen, known = _choose(TrainSettings, "train", given), Workspace.at(workspace)
    set_environment(chosen)

    from cafe.pipeline.plan import plan_training
    from cafe.pipeline.release.start import take_over
    from cafe.pipeline.tracking.mirror import Mirror
    from cafe.pipeline.train import train_and_evaluate

    mirror = Mirror(known, chosen.mlflow_uri)
    mirror.check_address()
    note_call("train", {"source": source, "method": method, "recipe": dict(recipe or {}), **settings})
    plan = plan_training(known, take_over(known, chosen, set(given)))
    train_and_evaluate(plan, mirror)
    if mirror.warning:
        warnings.warn(mirror.warning, stacklevel=2)
    return plan.spec.name


def compare(
    experiment: str | None = None, workspace: str = "work", metrics: str = "accuracy", **settings: Any
) -> pd.DataFrame:
    """Return what `cafe compare` prints, a record for each row and target and one for each row's means, as fractions.

    `metrics` are one or several, `"accuracy,auroc"`, each with records of its own. `settings` are the other options, with
    `_` for `-`: `versus="cafe"`, `protocol="paper"`, … A `half_width` is that of the interval over seeds. Raises `UserError`
    where there is nothing to compare.

    >>> table = compare(workspace=workspace)
    >>> table[["method", "target", "role", "seeds"]].values.tolist()[0]
    ['cafe', 'two', 'unseen', 1]
    """
    import pandas as pd

    from cafe.report.report import list_records, make_report

    known, chosen = Workspace.at(workspace), _choose(ReportSettings, "compare", settings)
    runs = choose(known.read_runs(), experiment).runs
    report = make_report(
        runs, known.manifest_digests(), chosen, metrics=metrics, root=known.root, find_manifest=known.find_manifest
    )
    for line in describe_left_out(report.left_out):
        warnings.warn(line, stacklevel=2)
    return pd.DataFrame(list_records(report))


def _choose(kind: type[Settings], function: str, values: Mapping[str, Any]) -> Settings:
    """Return settings from what a function was given; raise `UserError` for a name or a value that they do not have."""
    from pydantic import TypeAdapter, ValidationError

    names = [one.name for one in fields(kind)]  # type: ignore[arg-type]  # settings are dataclasses
    for name in values:
        if name not in names:
            raise unknown(f"setting of cafe.{function}", name, names)
    try:
        return TypeAdapter(kind).validate_python(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"cafe.{function}: {first['loc'][0]}={first['input']!r}: {first['msg'].lower()}.") from None
