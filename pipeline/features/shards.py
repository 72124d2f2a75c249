"""The part of an extraction that runs on a worker: one shard of faces through the tower and into the stores.

A shard is computed whole or left without a receipt, so that a fault of the storage never becomes a fact about a picture.
"""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import product
from threading import Event, Lock
from types import MappingProxyType
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from cafe.data.images import MISSING
from cafe.data.manifest import Manifest
from cafe.errors import StorageError, UserError
from cafe.files import locate
from cafe.pipeline.features.decoding import KILLER, MANY_VIEWS, Decoders
from cafe.pipeline.features.key import StoreInfo
from cafe.pipeline.features.store import FeatureStore
from cafe.pipeline.process.versions import check_versions
from cafe.pipeline.settings import ExtractSettings
from cafe.towers.building import load_backbone
from cafe.towers.embedding import Embedder, join_batches
from cafe.towers.names import parse_backbone
from cafe.views.device import shorten_switch_interval


class ShardEmbedder:
    """A tower at work: a shard with its faces in, receipts out. Loaded once per worker, usable without Ray.

    `stores` are those of one manifest that take different layers of one pass: {folder: what it is}; `manifest` is without
    its rows, which come with each shard, so that memory does not grow with the data set. Two threads may call it: while one
    has the tower, the other has its pictures decoded, or writes.
    """

    def __init__(
        self,
        stores: dict[str, StoreInfo],
        manifest: Manifest,
        settings: ExtractSettings,
        threads: int,
        device: str,
        versions: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        torch.set_num_threads(threads)
        if device != "cpu":
            shorten_switch_interval()
        self.stores = [FeatureStore(locate(path), about) for path, about in stores.items()]
        self.pending = [set(store.pending()) for store in self.stores]
        self.layers = [parse_backbone(about.backbone_name).layer for about in stores.values()]
        self.manifest, self.settings, self.device = manifest, settings, device
        self.versions = versions  # of the driver
        self.decoders = Decoders(settings.decoders or 0)
        self.decoders.start()  # while the tower is loaded
        self.turn, self.ended = Lock(), Event()

    @cached_property
    def embedder(self) -> Embedder:
        """The tower and its faces; raises `UserError` where this node's are not those the stores were planned with.

        Not made with the actor: Ray would take a mistake there for an accident and try again.
        """
        check_versions(self.versions)
        about, settings = self.stores[0].about, self.settings
        tower = load_backbone(about.backbone_name, settings.precision, settings.input_size)
        if tower.facts.weights_digest != about.key.weights:
            raise UserError(
                f"The weights of {settings.backbone!r} on this node are not those the store was planned with."
            )
        return Embedder(
            tower,
            self.manifest,
            about.key.view_plan,
            self.device,
            about.key.maps,
            about.key.dtype,
            about.batch_size,
            about.key.channels,
            settings.max_megapixels * 1_000_000,
        )

    def __call__(self, batch: dict[str, Sequence[Any]]) -> dict[str, Any]:
        """Embed one shard, as `pack_shard` gives it, write it to the stores that lack it and return {shard, rows, fault}.

        A storage that goes on failing is told as the fault; the shard then has no receipt.
        """
        shard, faces = int(batch["shard"][0]), batch["faces"][0]
        faces = replace(self.manifest, table=pa.ipc.open_stream(faces).read_all())
        try:
            return {"shard": [shard], "rows": [self._embed(shard, faces)], "fault": [""]}
        except (OSError, MemoryError) as error:
            return {"shard": [shard], "rows": [0], "fault": [str(error) or repr(error)]}

    def end(self) -> None:
        """Give up what is under way, after the next forward pass."""
        self.ended.set()
        self.decoders.close()

    def _embed(self, shard: int, faces: Manifest) -> int:
        lacking = [number for number, pending in enumerate(self.pending) if shard in pending]
        layers = [self.layers[number] for number in lacking]
        first, views = self.stores[0].about.rows_of(shard).start, self.stores[0].about.key.views
        with self.turn:  # loading the tower
            embedder = self.embedder
        for_device = self.device != "cpu" and views >= MANY_VIEWS
        renderer = replace(embedder.renderer, pictures=faces, for_device=for_device)
        decoded = self.decoders.work(renderer, embedder.batches(list(product(range(len(faces)), range(views)))))

        skipped: dict[int, str] = {}
        read: list[list[dict[str, Tensor]]] = []
        with self.turn:
            for batch in decoded:
                if self.ended.is_set():
                    raise InterruptedError("the command that this shard belongs to has ended")
                skipped |= batch.unreadable
                read.append(embedder.embed_layers(batch, layers))
        self._check_node(skipped, len(faces))
        for number, batches in zip(lacking, zip(*read, strict=True), strict=True):
            arrays = {
                name: values.reshape(len(faces), views, *values.shape[1:])
                for name, values in join_batches(batches).items()
            }
            self.stores[number].write_shard(shard, arrays, {first + row: reason for row, reason in skipped.items()})
        return len(faces)

    def _check_node(self, skipped: dict[int, str], faces: int) -> None:
        """Raise `StorageError` where most pictures of a shard are missing, or kill: that is the node, not a picture."""
        counts = Counter(skipped.values())
        here = f"below {self.manifest.root} on node {socket.gethostname()}"
        if 2 * counts[MISSING] > faces:
            raise StorageError(
                f"{counts[MISSING]} of the {faces} pictures of a shard are missing {here}: mount the folder there, or index "
                "the set again if its faces are gone."
            )
        if 2 * counts[KILLER] > faces:
            raise StorageError(
                f"{counts[KILLER]} of the {faces} pictures of a shard {here} kill their decoder: it has too little memory."
            )
