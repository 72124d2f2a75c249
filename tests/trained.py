"""Runs extracted, trained and evaluated in this process, by the code that Ray's workers run."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from upath import UPath

from cafe.data.indexing import index_files
from cafe.data.manifest import Manifest
from cafe.data.readers import DATASETS
from cafe.files import write_file, write_json
from cafe.learning.training import fit, predict
from cafe.methods import METHODS
from cafe.methods.generalisation.erm import Erm
from cafe.pipeline.evaluate import evaluate_target
from cafe.pipeline.features.extract import describe_store, look_up_tower
from cafe.pipeline.features.store import FeatureStore
from cafe.pipeline.features.stream import pack_shards
from cafe.pipeline.features.worker import ShardEmbedder
from cafe.pipeline.models import build_method, load_method, make_dataset
from cafe.pipeline.plan import TrainPlan, plan_training
from cafe.pipeline.release.start import keep_start
from cafe.pipeline.runs import add_experiment, note_status
from cafe.pipeline.settings import ExtractSettings, TrainSettings
from cafe.pipeline.worker import Worker
from cafe.pipeline.workspace import Workspace
from cafe.results.runs import read_result
from cafe.seals import write_sealed
from cafe.towers.weights import write_tensors


def extract_few(real_faces: Path, folder: Path, workspace: Workspace, views: int) -> None:
    """Index twelve real faces of three expressions of news and of cinema, and extract their features."""
    for domain in ("news", "cinema"):
        for expression in ("happiness", "neutral", "surprise"):
            (folder / domain / expression).mkdir(parents=True)
            for path in sorted((real_faces / domain / expression).iterdir())[:12]:
                shutil.copy(path, folder / domain / expression)
        index_files(domain, DATASETS["folder"](UPath(folder / domain))).manifest.save(workspace.manifest_path(domain))
        fill_store(workspace, domain, ExtractSettings(backbone="face-resnet", views=views, input_size=96))


def fill_store(workspace: Workspace, name: str, settings: ExtractSettings) -> FeatureStore:
    """Extract the features of a manifest."""
    manifest = workspace.load_manifest(name)
    settings = replace(settings, decoders=0)
    about = describe_store(manifest, settings, look_up_tower(workspace, settings))
    store = FeatureStore.create(workspace.features / name, about, manifest)
    embedder = ShardEmbedder({str(store.path): about}, manifest, settings, 1, "cpu")
    for shard in store.pending():
        embed(embedder, manifest, shard)
    return store


def embed(embedder: ShardEmbedder, manifest: Manifest, shard: int) -> dict[str, Any]:
    """Compute a shard; return what became of it."""
    packed = pack_shards(manifest, embedder.stores[0].info, [shard])
    return embedder({name: [value] for name, value in packed.items()})


def on_one_thread(plan: TrainPlan, checkpoint_every: int = 1) -> TrainPlan:
    """Return a plan whose worker computes and decodes in one thread."""
    settings = replace(plan.settings, threads=1, loader_workers=0, checkpoint_every=checkpoint_every)
    return replace(plan, settings=settings)


def train_run(workspace: Workspace, experiment: str = "cafe", **settings: Any) -> UPath:
    """Train and evaluate a run; returns its folder."""
    plan = _begin(workspace, experiment, settings)
    Worker().train(on_one_thread(plan))
    for target in plan.targets:
        evaluate_target(plan.run, target)
    return plan.run


def start_run(workspace: Workspace, experiment: str = "cafe", **settings: Any) -> tuple[UPath, np.ndarray]:
    """Write a run with its initial weights as if they were trained; returns its folder and what it says of its target."""
    plan = _begin(workspace, experiment, settings)
    method, (target,), device = build_method(plan.spec), plan.targets, torch.device("cpu")
    if not method.trained:
        fit(method, make_dataset(plan.spec, plan.source), plan.source.rows("train"), device)
    write_tensors(plan.run / "model.safetensors", method.state_dict())
    write_json(plan.run / "result.json", {"epochs": 0})
    method = load_method(plan.spec, plan.run).to(memory_format=torch.channels_last)
    return plan.run, predict(method, make_dataset(plan.spec, target), target.rows(target.split), device)


def begin_run(workspace: Workspace, experiment: str = "cafe", **settings: Any) -> UPath:
    """Write what a run is before it is trained; returns its folder."""
    return _begin(workspace, experiment, settings).run


def ship_run(run: UPath, folder: Path, **record: Any) -> UPath:
    """Write what an export of a run holds, but for its graph and its tower; returns the folder."""
    for file in ("run.json", "model.safetensors"):
        write_file(UPath(folder) / file, (run / file).read_bytes())
    write_sealed(UPath(folder) / "model.json", {"name": run.name, "trained": read_result(run), **record})
    return UPath(folder)


def list_networks() -> list[str]:
    """Return the methods, ERM for all that compute what ERM computes: they differ in their losses, each tested elsewhere."""
    return [name for name, method in METHODS.items() if method is Erm or method.forward is not Erm.forward]


def _begin(workspace: Workspace, experiment: str, settings: dict[str, Any]) -> TrainPlan:
    plan = plan_training(workspace, TrainSettings(**settings))
    plan.spec.save(plan.run)
    keep_start(plan.start, plan.run)
    add_experiment(plan.run, experiment)
    note_status(plan.run, "FINISHED")
    return plan
