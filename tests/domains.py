"""Three small domains with features drawn at random instead of read from a tower, and trainings in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import draw_faces
from trained import on_one_thread
from upath import UPath

from cafe.data.indexing import index_files
from cafe.data.manifest import Manifest
from cafe.data.readers import DATASETS
from cafe.pipeline.features.key import FeatureKey, StoreInfo, describe_policy
from cafe.pipeline.features.store import FeatureStore
from cafe.pipeline.plan import TrainPlan, plan_training
from cafe.pipeline.settings import TrainSettings
from cafe.pipeline.worker import Worker
from cafe.pipeline.workspace import Workspace
from cafe.towers.weights import read_tensors

DOMAINS = {"one": 12, "two": 8, "three": 10}  # faces per expression
STATISTICS = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def make_workspace(tmp_path: Path) -> Workspace:
    """Index three domains, each with a store of three views of features that lean towards the label."""
    workspace = Workspace.at(str(tmp_path / "work"))
    for seed, (name, per_class) in enumerate(DOMAINS.items()):
        folder = draw_faces(tmp_path / name, per_class, seed=seed)
        manifest = index_files(name, DATASETS["folder"](UPath(folder))).manifest
        manifest.save(workspace.manifest_path(name))
        fill(workspace, manifest, draw_features(manifest, seed))
    return workspace


def draw_features(manifest: Manifest, seed: int, views: int = 3) -> np.ndarray:
    """Return (N, V, 8) random features."""
    random = np.random.default_rng(seed)
    return random.normal(seed, 1, (len(manifest), views, 8)) + np.eye(8)[manifest.labels][:, None]


def fill(workspace: Workspace, manifest: Manifest, features: np.ndarray, **key: Any) -> FeatureStore:
    policy = describe_policy("paper" if features.shape[1] > 1 else "clean")
    fields = {"views": features.shape[1], "policy": policy, **key}
    tower = {"backbone": "timm:tiny", "weights": "weights", "input_size": 32, "normalisation": STATISTICS}
    described = FeatureKey(images=manifest.image_digest, **tower, **fields)
    about = StoreInfo(described, manifest.name, "timm:tiny", len(manifest), features.shape[2], None, 64)
    store = FeatureStore.create(workspace.features / manifest.name, about, manifest)
    for shard in store.pending():
        store.write_shard(shard, {"pooled": features[store.info.rows_of(shard)]}, {})
    return store


def planned(workspace: Workspace, source: str = "one,two", **settings: Any) -> TrainPlan:
    fixed = {"method": "linear_probe", "epochs": 3, "image_size": 32, "targets": "none"}
    return plan_training(workspace, TrainSettings(source=source, **{**fixed, **settings}))


def train(plan: TrainPlan, epochs: int | None = None) -> dict[str, torch.Tensor]:
    """Train a run as a worker does, in this process; return its weights."""
    plan.spec.save(plan.run)
    Worker().train(on_one_thread(plan), epochs)
    return read_tensors(plan.run / "model.safetensors")
