"""The feature store: one Zarr v3 group that any Zarr reader opens, filled shard by shard, complete when every receipt lies
beside it. This is the only file that knows Zarr.

    features/MANIFEST/BACKBONE-vV-KEY/
        about.json         the key and the sizes
        store.zarr/        pooled (N, V, C), optional map (N, V, C, H, W), valid (N,), sample_id (N,), label (N,)
        receipts/00000.json  rows, skipped samples and checksums (of every view) of one shard, written last

One task writes whole shard objects and nobody shares one, so a killed run loses unfinished shards and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import zarr
from upath import UPath

from cafe.data.manifest import Manifest
from cafe.errors import UserError
from cafe.files import list_folder, list_sizes, read_json, write_json
from cafe.records import FORMAT, check_record, digest_changes
from pipeline.cluster import free_memory

if TYPE_CHECKING:
    from cafe.learning.views import ViewPlan

SHARD_BYTES = 4 * 2**20  # a shard object worth a request
MIN_SHARDS = 16  # so that a small data set still spreads over workers and loses little when killed
MIN_SHARD_ROWS = 32
MEMORY_SHARE = 0.4  # of the free memory a store may take before it is mapped from a scratch file
ARRAYS = ("pooled", "map")


@dataclass(frozen=True)
class FeatureKey:
    """Names everything that changes a feature, and nothing else; its digest names the store."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012  # read by pydantic, not a field

    images: str  # digest of the samples and their bytes
    backbone: str  # library:MODEL
    weights: str  # digest of the tower's tensors
    input_size: int
    normalisation: tuple[tuple[float, ...], tuple[float, ...]]  # mean, std
    policy: dict[str, Any]
    precision: str = "fp32"
    interpolation: str = "bilinear"
    view_seed: int = 0
    views: int = 1
    maps: bool = False
    dtype: str = "float16"
    channels: str = "rgb"  # the order of the colours

    @property
    def digest(self) -> str:
        """SHA-256 over all fields that differ from their defaults."""
        return digest_changes(self)

    @property
    def view_plan(self) -> ViewPlan:
        """How the views behind these features are drawn."""
        from cafe.learning.views import ViewPlan

        return ViewPlan(self.policy["name"], self.view_seed, self.views, self.interpolation, *self.normalisation)


def describe_policy(name: str) -> dict[str, Any]:
    """Return what makes a view policy what it is, as plain JSON values: its name, and all that differs from no policy."""
    from cafe.learning import views

    plain = asdict(views.ViewPolicy())
    changes = {key: value for key, value in asdict(views.POLICIES[name]).items() if plain.get(key) != value}
    return {"name": name, "version": views.VERSION, **json.loads(json.dumps(changes))}


@dataclass(frozen=True)
class About:
    """What a store is, without opening it."""

    key: FeatureKey
    manifest: str
    backbone_name: str  # as the user wrote it
    rows: int
    width: int
    map_shape: tuple[int, int, int] | None
    shard_rows: int
    batch_size: int = 64  # of the tower's forward passes, to which all are filled up
    version: int = FORMAT

    @classmethod
    def from_record(cls, record: dict[str, Any], where: str) -> About:
        """Rebuild the description from its JSON, of whatever format; raise `UserError` for what is none."""
        return check_record({"version": 1, **record}, cls, where)

    @property
    def folder(self) -> str:
        """The store's folder name: readable first, unique last."""
        from cafe.towers.names import short_name

        backbone = re.sub(r"[^A-Za-z0-9]+", "-", short_name(self.backbone_name)).strip("-").lower()
        return f"{backbone}-v{self.key.views}-{self.key.digest[:12]}"

    @property
    def bytes(self) -> int:
        """What all features take, before compression."""
        channels = self.width + (int(np.prod(self.map_shape)) if self.map_shape else 0)
        return self.rows * self.key.views * channels * np.dtype(self.key.dtype).itemsize

    def describe(self) -> str:
        """Say what the features are, in a few words."""
        maps = f" and {'×'.join(map(str, self.map_shape))} maps" if self.map_shape else ""
        plural = "s" if self.key.views > 1 else ""
        colours = ", colours in BGR order" if self.key.channels == "bgr" else ""
        old = f", in the old format {self.version}" if self.version != FORMAT else ""
        return f"{self.key.views} view{plural} × {self.width} channels{maps} of {self.backbone_name}{colours}{old}"


def default_shard_rows(rows: int, views: int, width: int, map_shape: tuple[int, int, int] | None, itemsize: int) -> int:
    """Return how many faces share a shard: about `SHARD_BYTES` of features, but at least `MIN_SHARDS` shards."""
    row_bytes = views * itemsize * (width + int(np.prod(map_shape)) if map_shape else width)
    return max(MIN_SHARD_ROWS, min(SHARD_BYTES // row_bytes, -(-rows // MIN_SHARDS)))


@dataclass(frozen=True)
class Skipped:
    """A row of the manifest without features, and why."""

    row: int
    reason: str


@dataclass(frozen=True)
class Receipt:
    """What a finished shard holds; `checksums` of each array by view."""

    rows: int
    skipped: list[Skipped]
    checksums: dict[str, list[str]]


class FeatureStore:
    """A store on disk or in an object store; `path` is its folder."""

    def __init__(self, path: UPath, about: About) -> None:
        self.path = path
        self.about = about
        self.shards = -(-about.rows // about.shard_rows)
        self.group = zarr.open_group(str(path / "store.zarr"), mode="r+")

    @classmethod
    def create(cls, folder: UPath, about: About, manifest: Manifest) -> FeatureStore:
        """Open the store of that key below `folder`, making it first when it is not there or was left half made."""
        path = folder / about.folder
        record = read_json(path / "about.json")
        if record is None:
            if not list_folder(path / "receipts"):  # else only the description was lost: what was computed is kept
                cls._create_arrays(path, about, manifest)
            write_json(path / "about.json", asdict(about))  # last: from here on the store exists
            return cls(path, about)
        store = cls(path, About.from_record(record, str(path / "about.json")))
        if not np.array_equal(store.array("label")[:], manifest.labels):
            store.array("label")[:] = manifest.labels  # a corrected label changes no feature
        return store

    @staticmethod
    def _create_arrays(path: UPath, about: About, manifest: Manifest) -> None:
        group = zarr.create_group(str(path / "store.zarr"), overwrite=True, attributes=asdict(about))
        rows, step, views = about.rows, about.shard_rows, about.key.views

        def create(name: str, shape: tuple[int, ...], dtype: str, fill: float | bool, *names: str) -> None:
            # Float features do not compress: stored raw, one view of a shard is one contiguous read.
            group.create_array(
                name, shape=(rows, *shape), shards=(step, *shape), chunks=(step, *([1] if shape else []), *shape[1:]),
                dtype=dtype, compressors=None, fill_value=fill, dimension_names=("sample", *names),
            )  # fmt: skip

        create("pooled", (views, about.width), about.key.dtype, float("nan"), "view", "channel")
        if about.map_shape:
            create("map", (views, *about.map_shape), about.key.dtype, float("nan"), "view", "channel", "y", "x")
        create("valid", (), "bool", False)
        for name, dtype, values in (("sample_id", "string", manifest.sample_ids), ("label", "int8", manifest.labels)):
            array = group.create_array(name, shape=(rows,), dtype=dtype, dimension_names=("sample",))
            array[:] = np.asarray(values)

    def array(self, name: str) -> zarr.Array[Any]:
        """One array of the store."""
        return cast("zarr.Array[Any]", self.group[name])

    def rows_of(self, shard: int) -> range:
        """The manifest rows of a shard."""
        start = shard * self.about.shard_rows
        return range(start, min(start + self.about.shard_rows, self.about.rows))

    def receipt_path(self, shard: int) -> UPath:
        """Where the receipt of a shard lies once it is done."""
        return self.path / "receipts" / f"{shard:05d}.json"

    def pending(self) -> list[int]:
        """The shards still to compute: a listing, never a scan."""
        done = list_sizes(self.path / "receipts")  # a receipt torn by a kill is empty
        return [shard for shard in range(self.shards) if not done.get(f"{shard:05d}.json")]

    def write_shard(self, shard: int, arrays: dict[str, np.ndarray], skipped: dict[int, str]) -> None:
        """Write the features of a shard, {array: (rows, V, …)}, then its receipt; `skipped` gives reasons by row."""
        rows = self.rows_of(shard)
        valid = np.array([row not in skipped for row in rows])
        checksums = {}
        for name, values in {**arrays, "valid": valid}.items():
            array = self.array(name)
            values = values.astype(array.dtype)
            if name in ARRAYS:
                self._check_finite(shard, values, valid)
                values[~valid] = np.nan
            array[rows.start : rows.stop] = values
            checksums[name] = _checksums(values)
        reasons = [Skipped(row, reason) for row, reason in sorted(skipped.items())]
        write_json(self.receipt_path(shard), asdict(Receipt(len(rows), reasons, checksums)))

    def receipt(self, shard: int) -> Receipt | None:
        """Return the receipt of a shard that is done; raise `UserError` for one that says what cannot be."""
        path, rows = self.receipt_path(shard), self.rows_of(shard)
        record = read_json(path)
        receipt = check_record(record, Receipt, str(path)) if record else None
        if receipt and not all(skipped.row in rows for skipped in receipt.skipped):
            raise UserError(f"{path} names a row of another shard: remove it and run `cafe extract` again.")
        return receipt

    def _check_finite(self, shard: int, values: np.ndarray, valid: np.ndarray) -> None:
        """Raise `UserError` naming a face whose features are NaN or infinite, which no comparison would notice."""
        broken = valid & ~np.isfinite(values).reshape(len(values), -1).all(axis=1)
        if broken.any():
            row = self.rows_of(shard)[int(broken.argmax())]
            raise UserError(
                f"The features of {self.array('sample_id')[row]!s} in {self.path} are NaN or infinite: take "
                "--precision fp32 and --dtype float32."
            )

    def discard_skipped(self) -> None:
        """Declare those shards undone in which images were left out."""
        for shard in range(self.shards):
            receipt = self.receipt(shard)
            if receipt and receipt.skipped:
                self.receipt_path(shard).unlink()

    def skipped_paths(self, manifest: Manifest) -> list[tuple[str, str]]:
        """Path and reason of every image without features."""
        receipts = (self.receipt(shard) for shard in range(self.shards))
        skipped = [entry for receipt in receipts if receipt for entry in receipt.skipped]
        return [(manifest.table["path"][entry.row].as_py(), entry.reason) for entry in skipped]

    def discard_damaged(self) -> list[int]:
        """Read every finished shard back and declare those undone whose content is not what their receipt says."""
        pending = set(self.pending())
        damaged = [shard for shard in range(self.shards) if shard not in pending and not self._intact(shard)]
        for shard in damaged:
            self.receipt_path(shard).unlink()
        return damaged

    def sweep(self) -> None:
        """Remove what killed writers left half written in a local folder; only once no shard is pending."""
        if not self.path.protocol and not self.pending():
            for path in self.path.rglob("*.partial"):
                path.unlink(missing_ok=True)

    def _intact(self, shard: int) -> bool:
        rows = self.rows_of(shard)
        try:
            receipt = self.receipt(shard)
        except UserError:
            return False
        return receipt is not None and all(
            _checksums(np.asarray(self.array(name)[rows.start : rows.stop])) == receipt.checksums.get(name)
            for name in (*ARRAYS, "valid")
            if name in self.group
        )

    def valid(self) -> np.ndarray:
        """Which rows have features, (N,) bool."""
        return np.asarray(self.array("valid")[:])

    def read_view(self, name: str, view: int, memory_share: float = MEMORY_SHARE) -> np.ndarray:
        """Return one view of an array, (N, …), checked against the receipts: in memory, or a mapped scratch file if large.

        Raises `UserError` for an unfinished store or a shard that is not what was written.
        """
        if pending := len(self.pending()):
            raise UserError(
                f"The features in {self.path} lack {pending} of {self.shards} shards: run `cafe extract` again to finish."
            )
        array = self.array(name)
        result = _allocate((array.shape[0], *array.shape[2:]), array.dtype, memory_share)
        for shard in range(self.shards):
            rows = self.rows_of(shard)
            values = np.asarray(array[rows.start : rows.stop, view])
            receipt = self.receipt(shard)
            if receipt is None or receipt.checksums.get(name, [])[view : view + 1] != _checksums(values[:, None]):
                raise UserError(
                    f"Shard {shard} of {self.path} is not what was written: run `cafe extract` again with --verify."
                )
            result[rows.start : rows.stop] = values
        return result


class FeatureReader:
    """The features of any rows of one view: a view is read when it is first asked for and kept while there is room.

    An epoch uses one view, so maps far larger than the memory are read view by view, and mapped where even one is too large.
    """

    def __init__(self, store: FeatureStore, names: Iterable[str], memory_share: float = MEMORY_SHARE) -> None:
        self.store, self.names, self.memory_share = store, tuple(names), memory_share
        self.kept: dict[int, dict[str, np.ndarray]] = {}

    def read(self, rows: np.ndarray, view: int) -> dict[str, np.ndarray]:
        """Return {array: (n, …)} of some rows, in the number format of the store."""
        if view not in self.kept:
            kept = sum(values.nbytes for arrays in self.kept.values() for values in arrays.values())
            if kept > self.memory_share * free_memory():
                self.kept.clear()
            self.kept[view] = {name: self.store.read_view(name, view, self.memory_share) for name in self.names}
        return {name: np.asarray(values[rows]) for name, values in self.kept[view].items()}


def find_stores(features: UPath, manifest: str) -> list[tuple[UPath, About]]:
    """Return the stores of a manifest and what they hold, without opening them."""
    found = [(path, read_json(path / "about.json")) for path in list_folder(features / manifest)]
    return [(path, About.from_record(record, str(path / "about.json"))) for path, record in found if record]


def _allocate(shape: tuple[int, ...], dtype: np.dtype[Any], memory_share: float) -> np.ndarray:
    size = int(np.prod(shape)) * dtype.itemsize
    if size < memory_share * free_memory():
        return np.empty(shape, dtype)
    scratch = tempfile.TemporaryFile()  # noqa: SIM115  # lives as long as the array that maps it
    return np.memmap(scratch, dtype=dtype, mode="w+", shape=shape)


def _checksums(values: np.ndarray) -> list[str]:
    """Digest each view of (rows, V, …), so that one can be read, and trusted, without the others; (rows,) is one view."""
    views = np.moveaxis(values, 1, 0) if values.ndim > 1 else [values]
    return [hashlib.sha256(np.ascontiguousarray(view).tobytes()).hexdigest() for view in views]
