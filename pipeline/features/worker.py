"""A worker of an extraction: one shard of faces through the tower into the stores, and processes that decode ahead of it.

A shard is computed whole or left without a receipt, so that a fault of the storage never becomes a fact about a picture. A
picture that kills whatever decodes it, by a crash of the decoder or for want of memory, costs one process and not the tower,
and is distinguished from all others.

The processes that decode import this file as well, so torch, Zarr and the towers are imported where a tower is made: without
them a process starts in half a second and takes 90 MB, with them in five and 590 MB.
"""

from __future__ import annotations

import os
import signal
import socket
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from itertools import product
from multiprocessing import current_process, get_context, parent_process
from pathlib import Path
from threading import Event, Lock, Thread
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from cafe.addresses import Permission, permission
from cafe.data.images import MISSING
from cafe.data.manifest import Manifest
from cafe.errors import StorageError, UserError
from cafe.files import locate
from cafe.pipeline.features.key import StoreInfo
from cafe.pipeline.process.versions import check_versions
from cafe.pipeline.settings import ExtractSettings
from cafe.plugins import Plugin
from cafe.towers.names import parse_backbone
from cafe.views.rendering import Sample, rows_of

if TYPE_CHECKING:
    from torch import Tensor

    from cafe.towers.building import FrozenBackbone
    from cafe.towers.embedding import Embedder

MANY_VIEWS = 4  # of a face, from which on a GPU makes them: before, decoding it costs more
KILLER = "kills its decoder"
TRIES = 2  # of a picture; a process can also be killed by chance
DEATHS = 3  # of processes that no picture is to blame for, after which a shard is left for another time
UNGUARDED = 70  # exit code of a process that would have begun its parent's extraction again
FIRST_TO_GO = "500"  # where memory runs out: of the processes of an extraction these are the easiest to replace

Result = TypeVar("Result")
Work = Callable[[Sequence[Sample], Mapping[int, str]], Result]
Batches = Sequence[Sequence[Sample]]


class ShardEmbedder:
    """A tower at work: a shard with its faces in, receipts out. Loaded once per worker, usable without Ray.

    `stores` are those of one manifest that take different layers of one pass: {folder: what it is}; `manifest` is an
    outline, whose rows come or are read with each shard, so that memory does not grow with the data set. `donors` are the
    stores from which each of them takes rows over. Two threads may call it: while one has the tower, the other has its
    pictures decoded, or writes. With `shared`, the embedder of another manifest, it has the same tower and the same
    processes that decode.
    """

    def __init__(
        self,
        stores: dict[str, StoreInfo],
        manifest: Manifest,
        settings: ExtractSettings,
        threads: int,
        device: str,
        versions: Mapping[str, str] = MappingProxyType({}),
        plugins: Sequence[Plugin] = (),
        allowed: Permission | None = None,
        donors: Sequence[Mapping[str, StoreInfo]] = (),
        shared: ShardEmbedder | None = None,
    ) -> None:
        import torch

        from cafe.pipeline.features.store import FeatureStore
        from cafe.views.device import shorten_switch_interval

        if allowed:
            allowed.install()
        for plugin in plugins:
            plugin.install()
        torch.set_num_threads(threads)
        if device != "cpu":
            shorten_switch_interval()
        self.stores = [FeatureStore(locate(path), info) for path, info in stores.items()]
        self.pending = [set(store.pending()) for store in self.stores]
        self.donors = [[FeatureStore(locate(path), info) for path, info in some.items()] for some in donors]
        self.layers = [parse_backbone(info.backbone_name).layer for info in stores.values()]
        self.manifest, self.settings, self.device = manifest, settings, device
        self.versions, self.shared = versions, shared  # those of the driver
        self.decoders: Decoders = (
            shared.decoders if shared else Decoders(settings.decoders or 0, settings.silent_seconds)
        )
        self.turn: Lock = shared.turn if shared else Lock()
        self.ended: Event = shared.ended if shared else Event()
        if not shared:
            self.decoders.start()  # while the tower is loaded

    @cached_property
    def tower(self) -> FrozenBackbone:
        """The tower; raises `UserError` where this node has other libraries or weights than the stores were planned with.

        Not made with the actor: Ray would take a mistake there for an accident and try again.
        """
        if self.shared:
            return self.shared.tower
        from cafe.towers.building import load_backbone

        check_versions(self.versions)
        info, settings = self.stores[0].info, self.settings
        tower = load_backbone(info.backbone_name, settings.precision, settings.input_size)
        if tower.facts.weights_digest != info.key.weights:
            raise UserError(
                f"The weights of {settings.backbone!r} on this node are not those the store was planned with."
            )
        return tower

    @cached_property
    def embedder(self) -> Embedder:
        """The tower with the faces of the manifest."""
        from cafe.towers.embedding import Embedder

        info = self.stores[0].info
        return Embedder(
            self.tower,
            self.manifest,
            info.key.view_plan,
            self.device,
            maps=info.key.maps,
            dtype=info.key.dtype,
            batch_size=info.batch_size,
            channels=info.key.channels,
            max_pixels=info.key.max_megapixels * 1_000_000,
        )

    def __call__(self, batch: dict[str, Sequence[Any]]) -> dict[str, Any]:
        """Embed shards, as `pack_shards` gives them, write them where they are lacking; return {shard, rows, taken, fault}.

        A storage that goes on failing is reported as the fault; the shards then have no receipt.
        """
        first, count = int(batch["shard"][0]), int(batch["count"][0])
        shards, info = range(first, first + count), self.stores[0].info
        parts = [info.rows_of(shard) for shard in shards]
        try:
            faces = self.manifest.unpack(range(parts[0].start, parts[-1].stop), batch["faces"][0])
            known = np.frombuffer(batch["known"][0], np.int64).reshape(-1, len(self.stores), 2)
            unknown = self._embed(shards, faces, known)
        except (OSError, MemoryError) as error:
            nothing = [0] * count
            fault = [str(error) or repr(error)] * count
            return {"shard": list(shards), "rows": nothing, "taken": nothing, "fault": fault}
        rows = [len(part) for part in parts]
        embedded = np.bincount(unknown // info.shard_rows, minlength=count)
        taken = [own - int(new) for own, new in zip(rows, embedded, strict=True)]
        return {"shard": list(shards), "rows": rows, "taken": taken, "fault": [""] * count}

    def end(self) -> None:
        """Give up what is under way, after the next forward pass."""
        self.ended.set()
        self.decoders.close()

    def _embed(self, shards: range, faces: Manifest, known: np.ndarray) -> np.ndarray:
        """Take over what other stores have of the faces; embed the others, and return which.

        `known` (rows, stores, 2) says where; without rows it says that no other store has any.
        """
        from cafe.pipeline.features.reuse import take_rows

        lacking = [number for number, pending in enumerate(self.pending) if not pending.isdisjoint(shards)]
        taken = {number: self.stores[number].allocate_rows(len(faces)) for number in lacking}
        there = [
            take_rows(self.donors[number], known[:, number], taken[number])
            for number in lacking
            if self.donors and len(known)
        ]
        unknown = np.flatnonzero(~np.all(there, axis=0)) if there else np.arange(len(faces))
        embedded, skipped = self._run_tower(faces, unknown, lacking)
        first = self.stores[0].info.rows_of(shards.start).start
        for number, arrays in zip(lacking, embedded, strict=True):
            if len(unknown) == len(faces):
                taken[number] = arrays
            else:
                for name, values in arrays.items():
                    taken[number][name][unknown] = values
            for shard in self.pending[number].intersection(shards):
                rows = self.stores[number].info.rows_of(shard)
                part = slice(rows.start - first, rows.stop - first)
                reasons = {first + row: reason for row, reason in skipped.items() if first + row in rows}
                own = {name: values[part] for name, values in taken[number].items()}
                self.stores[number].write_shard(shard, own, reasons)
        return unknown

    def _run_tower(
        self, faces: Manifest, rows: np.ndarray, numbers: Sequence[int]
    ) -> tuple[list[dict[str, np.ndarray]], dict[int, str]]:
        """Return {array: (n, V, …)} of some rows for each of some stores, and why rows have no features."""
        if not len(rows):
            return [{} for _ in numbers], {}
        from cafe.towers.embedding import join_batches

        layers, views = [self.layers[number] for number in numbers], self.stores[0].info.key.views
        with self.turn:  # loading the tower
            embedder = self.embedder
        for_device = self.device != "cpu" and views >= MANY_VIEWS
        renderer = replace(embedder.renderer, pictures=faces, for_device=for_device)
        decoded = self.decoders.work(renderer, embedder.batches(list(product(rows.tolist(), range(views)))))

        skipped: dict[int, str] = {}
        read: list[list[dict[str, Tensor]]] = []
        with self.turn:
            for batch in decoded:
                if self.ended.is_set():
                    raise InterruptedError("the command that this shard belongs to has ended")
                skipped |= batch.unreadable
                read.append(embedder.embed_layers(batch, layers))
        self._check_node(skipped, len(rows))
        joined = [join_batches(batches) for batches in zip(*read, strict=True)]
        return [
            {name: values.reshape(len(rows), views, *values.shape[1:]) for name, values in arrays.items()}
            for arrays in joined
        ], skipped

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


class TowerWorker:
    """The passes of an extraction in one process, each with stores, manifest and donors, one after another: one tower.

    Usable without Ray, by two threads.
    """

    def __init__(
        self,
        passes: Sequence[tuple[dict[str, StoreInfo], Manifest, Sequence[Mapping[str, StoreInfo]]]],
        settings: ExtractSettings,
        threads: int,
        device: str,
        versions: Mapping[str, str] = MappingProxyType({}),
        plugins: Sequence[Plugin] = (),
        allowed: Permission | None = None,
    ) -> None:
        self.passes, self.lock = passes, Lock()
        self.arguments = (settings, threads, device, versions, plugins, allowed)
        self.first = self._make(0, None)
        # Of the pass under way: what others have of a device's memory may go.
        self.number, self.embedder = 0, self.first

    def __call__(self, batch: dict[str, Sequence[Any]]) -> dict[str, Any]:
        """Embed shards of a pass as a `ShardEmbedder` does."""
        number = int(batch["pass"][0])
        with self.lock:
            if number != self.number:
                self.number, self.embedder = number, self._make(number, self.first)
            embedder = self.embedder
        done = embedder(batch)
        return {"pass": [number] * len(done["shard"]), **done}

    def end(self) -> None:
        """Give up what is under way, after the next forward pass."""
        self.first.end()

    def _make(self, number: int, shared: ShardEmbedder | None) -> ShardEmbedder:
        stores, manifest, donors = self.passes[number]
        return ShardEmbedder(stores, manifest, *self.arguments, donors, shared)


class Decoders:
    """So many processes at work on batches of samples; without any, whoever asks does the work.

    Those that need more than `silent_seconds` for a batch are ended, and count as killed.
    """

    def __init__(self, processes: int, silent_seconds: float | None = None) -> None:
        self.processes, self.silent_seconds, self.lock = processes, silent_seconds, Lock()
        self.pool: ProcessPoolExecutor | None = None

    def work(self, function: Work[Result], batches: Batches) -> Iterator[Result]:
        """Begin with the first batches at once; yield `function(batch, refused)` of all, in order.

        `refused` are the rows not to decode, with the reason: those that killed a process twice. Raises `OSError` where
        processes die and no picture is to blame.
        """
        if not self.processes:
            return (function(batch, {}) for batch in batches)
        self.renew(None)
        queue = _Queue(self, function, batches)
        queue.fill()
        return iter(queue)

    def start(self) -> None:
        """Begin to start the processes, for which `work` then waits and says what goes wrong."""

        def start() -> None:
            with suppress(OSError, UserError):
                self.renew(None)

        if self.processes:
            Thread(target=start, daemon=True).start()

    def renew(self, broken: ProcessPoolExecutor | None) -> None:
        """Start processes, at first or again, unless another shard that met the same death has."""
        with self.lock:
            if self.pool is broken:
                if broken:
                    broken.shutdown(wait=False)
                self.pool = _start(self.processes)

    def close(self) -> None:
        """Let all processes end after the batch they work on."""
        if self.pool:
            self.pool.shutdown(wait=False, cancel_futures=True)


class _Queue:
    """The batches of one shard, some of which are under way."""

    def __init__(self, decoders: Decoders, function: Work[Any], batches: Batches) -> None:
        self.decoders, self.function, self.waiting = decoders, function, deque(batches)
        self.under_way: deque[tuple[Sequence[Sample], ProcessPoolExecutor, Future[Any]]] = deque()
        self.refused: dict[int, str] = {}
        self.deaths = 0

    def fill(self) -> None:
        """Hand out batches, two for each process."""
        while self.waiting and len(self.under_way) < 2 * self.decoders.processes:
            self._submit(self.waiting.popleft())

    def __iter__(self) -> Iterator[Any]:
        while self.under_way:
            _, pool, future = self.under_way[0]
            try:
                result = future.result(self.decoders.silent_seconds)
            except BrokenProcessPool:
                self._recover(pool)
                continue
            except TimeoutError:
                if future.done():  # the error is of the storage
                    raise
                _kill(pool)  # stopped, or at a picture without end; to recover finds out which
                continue
            self.under_way.popleft()
            self.fill()
            yield result

    def _submit(self, batch: Sequence[Sample]) -> None:
        pool = self.decoders.pool
        assert pool is not None
        try:
            future = pool.submit(self.function, batch, dict(self.refused))
        except BrokenProcessPool as error:
            future = Future()
            future.set_exception(error)
        self.under_way.append((batch, pool, future))

    def _recover(self, broken: ProcessPoolExecutor) -> None:
        """Find out which of the pictures under way kill, and begin again with all others."""
        lost = [batch for batch, _, _ in self.under_way]
        killers = find_killers(self.function, lost, self.decoders.silent_seconds)
        self.refused |= dict.fromkeys(killers, KILLER)
        self.deaths += not killers
        if self.deaths == DEATHS:
            raise OSError(f"{DEATHS} processes that decode died, and no picture is to blame: memory may be short")
        self.decoders.renew(broken)
        self.under_way.clear()
        for batch in lost:
            self._submit(batch)


def find_killers(function: Work[Any], batches: Batches, seconds: float | None = None) -> set[int]:
    """Return the rows whose samples kill their process each time, or keep it too long; raise `OSError` without processes."""
    killers, pool = set[int](), _start(1)
    samples = [sample for batch in batches for sample in batch]
    for row in rows_of(samples):
        for _ in range(TRIES):
            try:
                pool.submit(_attempt, function, [sample for sample in samples if sample[0] == row]).result(seconds)
                break
            except (BrokenProcessPool, TimeoutError):
                _kill(pool)
                pool.shutdown()
                pool = _start(1)
        else:
            killers.add(row)
    pool.shutdown()
    return killers


def _attempt(function: Work[Any], samples: Sequence[Sample]) -> None:
    with suppress(StorageError, UserError):  # whoever embeds it meets the same and says why
        function(samples, {})


def end_if_imported() -> None:
    """End a process that decodes where the script of its parent, which it imports as it starts, extracts as well."""
    if getattr(current_process(), "_inheriting", False):
        raise SystemExit(UNGUARDED)


def _start(processes: int) -> ProcessPoolExecutor:
    """Return processes that work; raise `OSError` where none can be started, which is no picture's fault.

    Raises `UserError` where a script extracts without a main guard.
    """
    # A fork of a process with threads can hang.
    pool = ProcessPoolExecutor(processes, get_context("spawn"), initializer=_prepare, initargs=(permission(),))
    # Inherited: an interrupt while they import, before `_prepare`, would be a traceback of each.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        first = pool.submit(int)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    started = list((pool._processes or {}).values())
    try:
        first.result()
    except BrokenProcessPool:
        pool.shutdown()  # how they ended is known afterwards
        if any(process.exitcode == UNGUARDED for process in started):
            raise UserError(
                "The processes that decode import this script and would extract again: put what it runs below "
                '`if __name__ == "__main__":`.'
            ) from None
        raise OSError("no process can be started to decode pictures in") from None
    return pool


def _kill(pool: ProcessPoolExecutor) -> None:
    """End the processes of a pool, stopped ones too, which then counts as broken."""
    for process in list((pool._processes or {}).values()):  # Python has a method for it from 3.14 on
        process.kill()


def _prepare(allowed: Permission) -> None:
    """Leave interrupts to the command, end with it whatever happens to it, and go first where memory runs out."""
    allowed.install()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Thread(target=_end_with_parent, daemon=True).start()
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(FIRST_TO_GO)


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
