"""Training from the cache is the published training, which runs the tower on every view of every epoch: bit for bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import draw_faces
from trained import embed
from upath import UPath

from cafe.data.indexing import index_files
from cafe.data.manifest import Manifest
from cafe.data.readers import DATASETS
from cafe.learning.loading import FaceDataset, FeatureSource
from cafe.learning.training import Training
from cafe.methods import METHODS
from cafe.methods.method import Inputs
from cafe.pipeline.features.extract import describe_store
from cafe.pipeline.features.store import FeatureReader, FeatureStore
from cafe.pipeline.features.worker import ShardEmbedder
from cafe.pipeline.settings import ExtractSettings
from cafe.towers.building import load_backbone
from cafe.towers.embedding import Embedder

EPOCHS = 2
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder = tmp_path_factory.mktemp("faces")
    manifest = index_files("tiny", DATASETS["folder"](UPath(draw_faces(folder, per_class=20)))).manifest
    manifest.save(UPath(folder / "tiny.parquet"))
    return manifest


def fill_store(folder: Path, manifest: Manifest, settings: ExtractSettings) -> FeatureStore:
    tower = load_backbone(settings.backbone, input_size=settings.input_size)
    about = describe_store(manifest, settings, tower.facts)
    store = FeatureStore.create(UPath(folder), about, manifest)
    embedder = ShardEmbedder({str(store.path): about}, manifest, settings, threads=1, device="cpu")
    for shard in store.pending():
        embed(embedder, manifest, shard)
    return store


def train(name: str, network: str, manifest: Manifest, store: FeatureStore, features: FeatureSource) -> Training:
    method_type = METHODS[name]
    torch.manual_seed(0)
    recipe = replace(method_type.recipe_type(), epochs=EPOCHS, batch_size=16, learning_rate=1e-3)
    method = method_type(recipe, Inputs(store.info.width, network, image_size=32)).to(memory_format=torch.channels_last)
    dataset = FaceDataset(manifest, store.info.key.view_plan, method.needs, 32, features)
    training = Training(method, method, method.optimizer(), dataset, manifest.rows("train"), 0, CPU)
    for epoch in range(1, EPOCHS + 1):
        training.run_epoch(epoch)
    return training


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", ["cafe", "cafe_map", "linear_probe"])
def test_training_from_the_cache_is_training_with_the_tower_on_the_fly(
    name: str, dtype: str, manifest: Manifest, tiny_tower: str, small_network: str, tmp_path: Path
) -> None:
    settings = ExtractSettings(
        backbone=tiny_tower, views=EPOCHS + 1, maps=True, dtype=dtype, batch_size=16, shard_rows=11
    )
    store = fill_store(tmp_path, manifest, settings)
    live = Embedder(load_backbone(tiny_tower), manifest, store.info.key.view_plan, "cpu", True, dtype, batch_size=16)
    cache = FeatureReader([[store]], ("pooled", "map"))
    cached, fly = (train(name, small_network, manifest, store, one).method.state_dict() for one in (cache, live))
    for key, value in cached.items():
        assert torch.equal(value, fly[key]), key


@pytest.mark.parametrize("name", ["face-resnet", "face-resnet#stage2/all", "imagenet-lite0#stage4/3x3", "tiny#block1"])
def test_a_layer_from_the_cache_is_the_layer_on_the_fly(
    name: str, manifest: Manifest, tiny_tower: str, tmp_path: Path
) -> None:
    name = name.replace("tiny", tiny_tower)
    size = None if name.startswith("open_clip") else 96
    settings = ExtractSettings(backbone=name, input_size=size, views=2, batch_size=16, shard_rows=11, maps=True)
    store = fill_store(tmp_path, manifest, settings)
    tower = load_backbone(name, input_size=size)
    live = Embedder(tower, manifest, store.info.key.view_plan, "cpu", True, batch_size=16)
    rows = np.random.default_rng(0).permutation(len(manifest))[:30]
    for view in (0, 1):
        cached = FeatureReader([[store]], ("pooled", "map")).read(rows, view)
        for array, values in live.read(rows, view).items():
            assert np.array_equal(cached[array], values), (array, view)
    assert store.info.key.backbone == tower.facts.architecture


def test_layers_of_one_pass_are_byte_for_byte_those_taken_one_by_one(
    manifest: Manifest, tiny_tower: str, tmp_path: Path
) -> None:
    names = [f"{tiny_tower}#block1/2x2", tiny_tower, f"{tiny_tower}#block2/all"]
    settings = ExtractSettings(backbone=tiny_tower, views=2, batch_size=16, shard_rows=11, maps=True)
    alone = [fill_store(tmp_path / "alone", manifest, replace(settings, backbone=name)) for name in names]
    together = [FeatureStore.create(UPath(tmp_path / "together"), store.info, manifest) for store in alone]

    def embed_all(shards: list[int]) -> None:
        stores = {str(store.path): store.info for store in together}
        embedder = ShardEmbedder(stores, manifest, settings, threads=1, device="cpu")
        for shard in shards:
            embed(embedder, manifest, shard)

    def contents(store: FeatureStore) -> dict[str, bytes]:
        return {
            str(path.relative_to(store.path)): path.read_bytes() for path in store.path.rglob("*") if path.is_file()
        }

    embed_all([0, 1, 2])
    together[1].receipts.path(2).unlink()  # as if killed between two stores of one shard
    together[1].array("pooled")[22:33] = 0
    embed_all([2, 3, 4, 5])
    for store, expected in zip(together, alone, strict=True):
        assert contents(store) == contents(expected)


def test_shards_and_order_change_no_feature(manifest: Manifest, tiny_tower: str, tmp_path: Path) -> None:
    settings = ExtractSettings(backbone=tiny_tower, views=3, dtype="float32", batch_size=16, shard_rows=60)
    whole = fill_store(tmp_path / "whole", manifest, settings).array("pooled")[:]
    small = replace(settings, shard_rows=7)
    np.testing.assert_array_equal(fill_store(tmp_path / "small", manifest, small).array("pooled")[:], whole)
    plan = fill_store(tmp_path / "whole", manifest, settings).info.key.view_plan
    live = Embedder(load_backbone(tiny_tower), manifest, plan, "cpu", dtype="float32", batch_size=16)
    rows = np.random.default_rng(0).permutation(len(manifest))
    for view in (2, 0, 1):
        np.testing.assert_array_equal(live.read(rows, view)["pooled"], whole[rows, view])
