"""The feature store: one Zarr v3 group that any Zarr reader opens, filled shard by shard, complete when every receipt lies
beside it.

    features/MANIFEST/BACKBONE-vV-KEY/
        about.json           the key and the sizes
        checksums.json       of all files that belong to no shard
        store.zarr/          pooled (N, V, C), optional map (N, V, C, H, W), valid (N,), sample_id (N,), label (N,),
                             image (N,): the picture each row is of
        receipts/00000.json  rows, skipped samples and checksums (of every view and file) of one shard, written last
        skipped.json         the skipped samples of all shards

One task writes whole shard objects and nobody shares one, so a killed run loses unfinished shards and nothing else. What
Zarr does is done here; the files around `store.zarr` are those of `integrity`.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from math import lcm
from typing import Any, TypeVar, cast

import numpy as np
import pyarrow as pa
import zarr
from numpy.dtypes import StringDType
from upath import UPath
from zarr.abc.buffer import Buffer
from zarr.buffer import default_buffer_prototype
from zarr.storage import MemoryStore

from cafe.data.manifest import Manifest
from cafe.errors import UserError, quote
from cafe.files import encode_json, list_folder, remove_file, remove_leftovers, retry, write_file
from cafe.pipeline.features.integrity import (
    ABOUT,
    CHECKSUMS,
    Damage,
    Receipt,
    Receipts,
    damaged,
    find_damage,
    in_parallel,
    read_described,
    read_info,
    recover_info,
)
from cafe.pipeline.features.key import StoreInfo
from cafe.pipeline.process.machine import free_memory
from cafe.records import digest
from cafe.seals import write_sealed

ARRAYS = ("pooled", "map")
FILES_AT_ONCE = 8  # that describe a store and are written side by side, of up to 60 MB
MEMORY_SHARE = 0.4  # of the free memory a view may take before it is mapped from a scratch file

Opened = TypeVar("Opened")


class FeatureStore:
    """A store on disk or in an object store; `path` is its folder."""

    def __repr__(self) -> str:
        return f"<FeatureStore of {self.info.manifest}: {self.info.rows:,} faces, {self.info.describe()}>"

    def __init__(self, path: UPath, info: StoreInfo) -> None:
        self.path, self.info, self.receipts = path, info, Receipts(path, info)
        self._arrays: dict[str, zarr.Array[Any]] = {}
        options = dict(path.storage_options) if path.protocol else None
        place = str(path / "store.zarr")  # format 2 can hold pickled objects, which run code when they are read
        self.group = self._open(lambda: zarr.open_group(place, mode="r+", storage_options=options, zarr_format=3))

    @classmethod
    def create(cls, folder: UPath, info: StoreInfo, manifest: Manifest) -> FeatureStore:
        """Open the store of that key below `folder`, making it first when it is not there or was left half made."""
        path = folder / info.folder
        there = read_info(path)
        if there is None:  # where only the description was lost, what was computed is kept
            there = recover_info(path) if list_folder(path / "receipts") else info
            write_description(path, there, manifest)
        there.check_batches(path)
        store = cls(path, there)
        if not store.describes(manifest):
            write_description(path, there, manifest)  # a corrected label changes no feature
        return store

    def describes(self, manifest: Manifest) -> bool:
        """Whether the labels are those of a manifest; of a large one a note says so, and none is read."""
        if manifest.large:
            return read_described(self.path) == manifest.labelling
        return np.array_equal(self.read_column("label", range(self.info.rows)), manifest.labels)

    def array(self, name: str) -> zarr.Array[Any]:
        """One array of the store."""
        if name not in self._arrays:
            self._arrays[name] = self._open(lambda: cast("zarr.Array[Any]", self.group[name]))
        return self._arrays[name]

    def read_column(self, name: str, rows: range) -> np.ndarray:
        """Return the sample_id, label or image of some rows, (n,); raise `UserError` where they cannot be decoded."""
        array = self.array(name)
        try:
            return np.asarray(retry(self.path, "read", lambda: array[rows.start : rows.stop]))
        except (ValueError, RuntimeError):  # of a codec
            raise damaged(self.path, f"{name} is not what was written") from None

    def _open(self, function: Callable[[], Opened]) -> Opened:
        try:
            return retry(self.path, "read", function)
        except (KeyError, ValueError, TypeError, FileNotFoundError) as error:
            raise damaged(self.path, f"Zarr cannot open it: {quote(error)}") from None

    def allocate_rows(self, rows: int) -> dict[str, np.ndarray]:
        """Return arrays {array: (rows, V, …)} to be filled and written."""
        arrays = {name: self.array(name) for name in ARRAYS if name in self.info.objects(0)}
        return {name: np.empty((rows, *array.shape[1:]), array.dtype) for name, array in arrays.items()}

    def pending(self) -> list[int]:
        """The shards still to compute: a listing, never a scan."""
        return self.receipts.pending()

    def write_shard(self, shard: int, arrays: dict[str, np.ndarray], skipped: dict[int, str]) -> None:
        """Write the features of a shard, {array: (rows, V, …)}, then its receipt; `skipped` gives reasons by row."""
        rows = self.info.rows_of(shard)
        valid = np.array([row not in skipped for row in rows])
        checksums, files = {}, {}
        for name, values in {**arrays, "valid": valid}.items():
            with np.errstate(over="ignore"):  # what the store's type cannot hold is refused, with the name of its face
                values = values.astype(self.array(name).dtype)
            if name in ARRAYS:
                self._check_finite(shard, values, valid)
                values[~valid] = np.nan
            checksums[name] = view_digests(values)
            file = self.info.objects(shard)[name]
            content = self._encode(name, rows.start, values).get(file)
            if content is None:  # Zarr keeps nothing where all is the fill value
                remove_file(self.path / file)
            else:
                write_file(self.path / file, content)
                files[file] = digest(content)
        self.receipts.write(shard, skipped, checksums, files)

    def _encode(self, name: str, start: int, values: np.ndarray) -> dict[str, bytes]:
        """Return the files that Zarr would write for some rows of an array, by their place in the store's folder."""
        buffers = self.array(name).metadata.to_buffer_dict(default_buffer_prototype())
        zarr.open_array(MemoryStore(buffers), mode="r+", zarr_format=3)[start : start + len(values)] = values
        return {f"store.zarr/{name}/{key}": buffer.to_bytes() for key, buffer in buffers.items()}

    def _check_finite(self, shard: int, values: np.ndarray, valid: np.ndarray) -> None:
        """Raise `UserError` naming a face whose features are NaN or infinite, which no comparison would notice."""
        broken = valid & ~np.isfinite(values).reshape(len(values), -1).all(axis=1)
        if broken.any():
            row = self.info.rows_of(shard)[int(broken.argmax())]
            raise UserError(
                f"The features of {self.array('sample_id')[row]!s} in {self.path} are NaN or infinite: take "
                "--precision fp32 and --dtype float32."
            )

    def read_shard(self, shard: int, name: str, view: int, values: np.ndarray) -> None:
        """Fill `values` (rows, …) with one view of a shard; raise `UserError` where it is not what was written."""
        rows, receipt = self.info.rows_of(shard), self.receipts.read(shard)
        if not self._read_file(shard, name, view, values):
            array = self.array(name)
            try:
                values[:] = retry(self.path, "read", lambda: array[rows.start : rows.stop, view])
            except ValueError:  # of an index of parts that is damaged
                receipt = None
        if receipt is None or receipt.checksums.get(name, [])[view : view + 1] != view_digests(values[:, None]):
            raise damaged(self.path, f"shard {shard} is not what was written")

    def _read_file(self, shard: int, name: str, view: int, values: np.ndarray) -> bool:
        """Fill `values` from the shard's file on this machine, without the copies that Zarr makes; False where it cannot.

        What Zarr's sharding codec puts at the end of the file says where each view begins, of which all bytes are kept as
        they are: offset and size of each as uint64, then a checksum.
        """
        if self.path.protocol:
            return False
        index = np.empty((self.info.key.views, 2), "<u8")
        try:
            with open(str(self.path / self.info.objects(shard)[name]), "rb", buffering=0) as file:  # noqa: PTH123
                file.seek(-index.nbytes - 4, os.SEEK_END)
                file.readinto(index.data.cast("B"))
                start, size = map(int, index[view])
                file.seek(start)
                return size >= values.nbytes and file.readinto(values.data.cast("B")) == values.nbytes
        except (OSError, OverflowError):  # a file that is missing, cut or damaged, or a view that was all left out
            return False

    def read_rows(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Return all views of some rows, (n, V, …), checked against the receipts; raises `UserError` as `read_view` does."""
        array, step = self.array(name), self.info.shard_rows
        result = np.empty((len(rows), *array.shape[1:]), array.dtype)
        for shard in np.unique(rows // step):
            own, there = rows // step == shard, self.info.rows_of(int(shard))
            values = np.empty((len(there), *array.shape[2:]), array.dtype)
            for view in range(self.info.key.views):
                self.read_shard(int(shard), name, view, values)
                result[own, view] = values[rows[own] - there.start]
        return result

    def matches(self, shard: int, receipt: Receipt) -> bool:
        """Whether what a shard holds is what its receipt says, whatever its files look like."""
        rows = self.info.rows_of(shard)
        read = {name: np.asarray(self.array(name)[rows.start : rows.stop]) for name in self.info.objects(shard)}
        return all(view_digests(values) == receipt.checksums.get(name) for name, values in read.items())

    def read_view(
        self, name: str, view: int, memory_share: float = MEMORY_SHARE, shards: range | None = None
    ) -> np.ndarray:
        """Return one view of an array, (N, …), checked against the receipts: in memory, or a mapped scratch file if large.

        Of some `shards`, which follow each other, their rows alone. Raises `UserError` for an unfinished store or a shard
        that is not what was written.
        """
        if pending := len(self.pending()):
            raise UserError(
                f"The features in {self.path} lack {pending} of {self.info.shards} shards: run `cafe extract` again to "
                "finish."
            )
        array, shards = self.array(name), range(self.info.shards) if shards is None else shards
        held = self.rows_of(shards)
        result = allocate((len(held), *array.shape[2:]), array.dtype, memory_share)

        def read(shard: int) -> None:
            rows = self.info.rows_of(shard)
            self.read_shard(shard, name, view, result[rows.start - held.start : rows.stop - held.start])

        for _ in in_parallel(self.path, read, shards):
            pass
        return result

    def rows_of(self, shards: range) -> range:
        """Return the rows of shards that follow each other."""
        if not shards:
            return range(0)
        return range(self.info.rows_of(shards[0]).start, self.info.rows_of(shards[-1]).stop)

    def finish(self) -> None:
        """Remove what killed writers left half written and sum up what was left out, once no shard is pending.

        The sum is written last, and says that all of it is done: a rerun then lists no shard for it.
        """
        if self.receipts.is_summed_up() or self.pending():
            return
        if not self.path.protocol:
            remove_leftovers(self.path, below=True)
        self.receipts.sum_up()


def write_description(path: UPath, info: StoreInfo, manifest: Manifest) -> None:
    """Write all files of a store that belong to no shard, `about.json` last: from then on the store exists."""
    facts, note = encode_json(info.record()), {"manifest": manifest.labelling} if manifest.large else {}
    checksums, files = {ABOUT: digest(facts)}, _make_arrays(info, manifest)
    if note:
        remove_file(path / CHECKSUMS)  # what it says of labels is wrong as soon as the first are written

    def write(entry: tuple[str, bytes]) -> tuple[str, str]:
        write_file(path / entry[0], entry[1])
        return entry[0], digest(entry[1])

    while some := list(islice(files, FILES_AT_ONCE)):
        checksums.update(in_parallel(path, write, some))
    write_sealed(path / CHECKSUMS, {"files": checksums, **note})
    write_file(path / ABOUT, facts)


def _make_arrays(info: StoreInfo, manifest: Manifest) -> Iterator[tuple[str, bytes]]:
    """Yield the files of the empty arrays, with the samples and their labels, as Zarr writes them, a few at a time."""
    buffers: dict[str, Buffer] = {}
    group = zarr.create_group(MemoryStore(buffers), attributes=info.record())
    rows, step, views = info.rows, info.shard_rows, info.key.views

    def create(name: str, shape: tuple[int, ...], dtype: str, fill: float | bool, *names: str) -> None:
        # Float features do not compress: stored raw, one view of a shard is one contiguous read.
        group.create_array(
            name, shape=(rows, *shape), shards=(step, *shape), chunks=(step, *([1] if shape else []), *shape[1:]),
            dtype=dtype, compressors=None, fill_value=fill, dimension_names=("sample", *names),
        )  # fmt: skip

    create("pooled", (views, info.width), info.key.dtype, float("nan"), "view", "channel")
    if info.map_shape:
        create("map", (views, *info.map_shape), info.key.dtype, float("nan"), "view", "channel", "y", "x")
    create("valid", (), "bool", False)
    kinds = {"sample_id": "string", "label": "int8", "image": "string"}
    arrays = {
        name: group.create_array(name, shape=(rows,), dtype=dtype, dimension_names=("sample",))
        for name, dtype in kinds.items()
    }
    size = lcm(*(array.chunks[0] for array in arrays.values()))  # whole chunks of each
    for start in range(0, rows, size):  # of strings of any length, a part at a time
        faces = manifest.read(range(start, min(start + size, rows)))
        for name, array in arrays.items():
            values = name_images(faces) if name == "image" else faces[name].to_pylist()
            array[start : start + len(values)] = np.array(
                values, StringDType() if kinds[name] == "string" else kinds[name]
            )
            yield from _take_files(buffers)
    yield from _take_files(buffers)


def _take_files(buffers: dict[str, Buffer]) -> Iterator[tuple[str, bytes]]:
    """Yield the files that Zarr has written to memory, by their place in a store, and forget them."""
    for key in list(buffers):
        yield f"store.zarr/{key}", buffers.pop(key).to_bytes()


def name_images(faces: pa.Table) -> list[str]:
    """Name the picture that each row of a manifest is of, by the digest of its bytes and its box."""
    pictures = zip(faces["digest"].to_pylist(), faces["box"].to_pylist(), strict=True)
    return [f"{digits} {box}" if box else digits for digits, box in pictures]


def view_digests(values: np.ndarray) -> list[str]:
    """Digest each view of (rows, V, …), so that one can be read, and trusted, without the others; (rows,) is one view."""
    views = np.moveaxis(values, 1, 0) if values.ndim > 1 else [values]
    return [digest(np.ascontiguousarray(view).data) for view in views]


def allocate(shape: tuple[int, ...], dtype: np.dtype[Any], memory_share: float) -> np.ndarray:
    """Return an array to be filled, in memory or, where it is too large for the share, in a scratch file.

    Raises `UserError` where there is no room for the file: writing to a map beyond it would end the process.
    """
    size = int(np.prod(shape)) * dtype.itemsize
    if not size or size < memory_share * free_memory():
        return np.empty(shape, dtype)
    with tempfile.TemporaryFile() as scratch:  # the map keeps it
        try:
            os.posix_fallocate(scratch.fileno(), 0, size)
        except OSError as error:
            raise UserError(
                f"A view of these features takes {size / 2**30:.2g} GB, more than is free of memory, and "
                f"{tempfile.gettempdir()} has no room for it either ({error.strerror}): name another folder by TMPDIR."
            ) from None
        mapped = mmap.mmap(scratch.fileno(), size)
    # Rows are read in random order: the system would read up to megabytes around each and drop others for them.
    mapped.madvise(mmap.MADV_RANDOM)
    return np.ndarray(shape, dtype, buffer=mapped)


def fetch_rows(values: np.ndarray, rows: np.ndarray) -> None:
    """Let the system read rows of an array in a scratch file that it does not hold, all at once; wait for none."""
    if isinstance(values.base, mmap.mmap):
        for start, size in find_pages(rows, values.strides[0], mmap.PAGESIZE):
            values.base.madvise(mmap.MADV_WILLNEED, start, size)


def find_pages(rows: np.ndarray, size: int, page: int) -> list[tuple[int, int]]:
    """Return where the pages lie that hold rows of so many bytes, (offset, bytes); those that follow each other together."""
    if not len(rows):
        return []
    ordered = np.unique(rows)
    first, end = ordered * size // page, -(-(ordered + 1) * size // page)
    last = np.append(np.flatnonzero(first[1:] > end[:-1]), len(ordered) - 1)
    starts = first[np.append(0, last[:-1] + 1)] * page
    return list(zip(starts.tolist(), (end[last] * page - starts).tolist(), strict=True))


def verify(store: UPath, progress: Callable[[int, int], None] = lambda done, total: None) -> list[Damage]:
    """Read a store back, every byte of it, and return what is not as it was written; `progress` counts shards."""

    def matches(info: StoreInfo, shard: int, receipt: Receipt) -> bool:
        return FeatureStore(store, info).matches(shard, receipt)

    return find_damage(store, matches, progress)


def discard_damage(store: UPath, manifest: Manifest, damages: list[Damage]) -> StoreInfo:
    """Declare damaged shards undone and write again what describes a store, which is returned; raise `UserError`."""
    info = recover_info(store)
    if info.key.images != manifest.image_digest:
        raise UserError(
            f"The features in {store} were made of other images than the manifest {manifest.name!r} lists now: remove them "
            "with `cafe store rm`."
        )
    if any(damage.shard is None for damage in damages):
        write_description(store, info, manifest)
    Receipts(store, info).discard({damage.shard for damage in damages if damage.shard is not None})
    return info


class FeatureReader:
    """The features of any rows of one view, of several manifests one after another: each view is kept while there is room.

    Each manifest has a store for each layer that is read; their channels come one after another.
    An epoch uses one view, so maps far larger than the memory are read view by view, and mapped where even one is too large.
    """

    def __init__(
        self, stores: Sequence[Sequence[FeatureStore]], names: Iterable[str], memory_share: float = MEMORY_SHARE
    ) -> None:
        self.stores, self.names, self.memory_share = tuple(stores), tuple(names), memory_share
        self.starts = np.cumsum([0, *(layers[0].info.rows for layers in stores[:-1])])
        self.kept: dict[tuple[int, int], list[dict[str, list[np.ndarray]]]] = {}  # by view and workers who part it

    def read(self, rows: np.ndarray, view: int) -> dict[str, np.ndarray]:
        """Return {array: (n, …)} of some rows, in the number format of the stores."""
        several = self._find(view, 0, 1)
        if len(several) == 1:
            return {name: _read_layers(layers, rows) for name, layers in several[0].items()}
        numbers, found = np.searchsorted(self.starts, rows, "right") - 1, dict[str, np.ndarray]()
        for number in np.unique(numbers):
            own = numbers == number
            for name, layers in several[number].items():
                read = _read_layers(layers, rows[own] - self.starts[number])
                found.setdefault(name, np.empty((len(rows), *read.shape[1:]), read.dtype))[own] = read
        return found

    def fetch(self, rows: np.ndarray, view: int) -> None:
        """Let the system read some rows of one view, where they lie in a scratch file, while others are worked on."""
        for start, arrays in zip(self.starts, self._find(view, 0, 1), strict=True):
            mapped = [values for layers in arrays.values() for values in layers if isinstance(values.base, mmap.mmap)]
            for values in mapped:
                own = rows - start
                fetch_rows(values, own[(own >= 0) & (own < len(values))])

    def share(self, batches: Sequence[np.ndarray]) -> SharedReader:
        """Return what gives each of several workers its part of one batch after another."""
        return SharedReader(self, batches)

    def read_held(self, rows: np.ndarray, view: int, worker: int, workers: int) -> dict[str, np.ndarray]:
        """Return {array: (n, …)} of some rows, zeros where another of the workers, who part the shards, holds a row."""
        found: dict[str, np.ndarray] = {}
        for number, arrays in enumerate(self._find(view, worker, workers)):
            own = rows - self.starts[number]
            for name, layers in arrays.items():
                width = sum(values.shape[1] for values in layers)
                whole = found.setdefault(name, np.zeros((len(rows), width, *layers[0].shape[2:]), layers[0].dtype))
                channel = 0
                for store, values in zip(self.stores[number], layers, strict=True):
                    held = store.rows_of(_part(store, worker, workers))
                    here = (own >= held.start) & (own < held.stop)
                    fetch_rows(values, own[here] - held.start)
                    whole[here, channel : channel + values.shape[1]] = values[own[here] - held.start]
                    channel += values.shape[1]
        return found

    def _find(self, view: int, worker: int, workers: int) -> list[dict[str, list[np.ndarray]]]:
        """Return what a worker holds of a view, by manifest, array and layer, read where it was not kept."""
        if (view, workers) not in self.kept:
            kept = sum(
                values.nbytes
                for several in self.kept.values()
                for arrays in several
                for layers in arrays.values()
                for values in layers
            )
            if kept > self.memory_share * free_memory():
                self.kept.clear()
            self.kept[view, workers] = [
                {
                    name: [
                        store.read_view(name, view, self.memory_share, _part(store, worker, workers))
                        for store in layers
                    ]
                    for name in self.names
                }
                for layers in self.stores
            ]
        return self.kept[view, workers]


class SharedReader:
    """The features of batches, of which each worker holds a part of the shards: they read a batch together, in order."""

    def __init__(self, reader: FeatureReader, batches: Sequence[np.ndarray]) -> None:
        self.reader, self.batches = reader, iter(batches)

    def read(self, rows: np.ndarray, view: int) -> dict[str, np.ndarray]:
        """Return {array: (n, …)} of this worker's rows of the next batch."""
        from cafe.learning.loading import own_part  # torch, which whoever lists stores does not need
        from cafe.networks.parallel import fill_in, rank, world_size

        batch = next(self.batches)
        if not np.array_equal(own_part(batch), rows):
            raise RuntimeError("The workers of a training do not read the same batch")
        held = self.reader.read_held(batch, view, rank(), world_size())
        return {name: own_part(fill_in(values)) for name, values in sorted(held.items())}


def _part(store: FeatureStore, worker: int, workers: int) -> range:
    """Return the shards of a store that one of several workers holds."""
    shards = store.info.shards
    return range(shards * worker // workers, shards * (worker + 1) // workers)


def _read_layers(layers: Sequence[np.ndarray], rows: np.ndarray) -> np.ndarray:
    """Return some rows of the arrays (N, C, …) of all layers, channels one after another."""
    return (
        np.concatenate([values[rows] for values in layers], axis=1) if len(layers) > 1 else np.asarray(layers[0][rows])
    )
