"""What `import cafe` offers: manifests, features, trained models and scores of a workspace, by name.

Torch is imported when a model is loaded, and not before.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import TYPE_CHECKING

from cafe.data.manifest import Manifest
from cafe.errors import UserError, unknown
from cafe.pipeline.features.integrity import find_stores
from cafe.pipeline.features.store import FeatureStore
from cafe.pipeline.release.choice import find_runs
from cafe.pipeline.release.confidence import read_confidence
from cafe.pipeline.release.shipped import SHIPPED
from cafe.pipeline.workspace import Workspace
from cafe.results.runs import choose
from cafe.results.scores import meet, read_scores

if TYPE_CHECKING:
    import pandas as pd

    from cafe.inference.model import Model


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
    import torch

    from cafe.inference.model import BATCH_SIZE
    from cafe.pipeline.models import build_model

    runs, _ = find_runs(Workspace.at(workspace), name, best, ensemble)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = build_model(runs, device, batch_size or BATCH_SIZE)
    return replace(model, threshold=read_confidence(runs).threshold)


def scores(workspace: str = "work", experiment: str | None = None) -> pd.DataFrame:
    """Return a row for every run, protocol and target, computed from the runs' predictions; of one experiment or of all.

    The columns are every metric of `cafe.results.metrics.METRICS` and a recall for every class, all from 0 to 1, beside what
    tells runs and targets apart (`cafe.results.scores.SCORE_FIELDS`). Predictions on other faces than those of the rest are
    left out with a warning that names them (`cafe.results.scores.meet`).

    >>> table = scores(workspace)
    >>> table[["method", "source", "target", "relation", "faces"]].values.tolist()
    [['cafe', 'one', 'two', 'unseen', 9]]
    """
    known = Workspace.at(workspace)
    chosen = choose(known.read_runs(), experiment)
    manifests = known.manifest_digests()
    runs, left_out = meet(chosen.runs, manifests)
    for one in left_out:
        warnings.warn(str(one), stacklevel=2)
    return read_scores(runs, manifests).drop(columns=["column", "sources"])
