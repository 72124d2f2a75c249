"""What a feature store is: the key, which names everything that changes a feature, the sizes, and what it is called."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from annotated_types import Gt, Len
from upath import UPath

from cafe.errors import UserError
from cafe.pipeline.settings import FeatureIdentity, Side, take
from cafe.records import FORMAT, check_record, digest_changes

if TYPE_CHECKING:
    from cafe.views.drawing import ViewPlan

Colours = Annotated[tuple[float, ...], Len(3, 3)]  # the mean of red, green and blue
Spreads = Annotated[tuple[Annotated[float, Gt(0)], ...], Len(3, 3)]  # and their deviation
SHARD_BYTES = 4 * 2**20  # a shard object worth a request
MIN_SHARDS = 16  # so that a small data set still spreads over workers and loses little when killed
MIN_SHARD_ROWS = 32


@dataclass(frozen=True, kw_only=True)
class FeatureKey(FeatureIdentity):
    """Names everything that changes a feature, and nothing else; its digest names the store.

    What the user chose stands in it as it is; the other fields are what the choices, the images and the tower come to.
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012  # read by pydantic, not a field

    images: str  # digest of the samples and their bytes
    backbone: str  # library:MODEL
    weights: str  # digest of the tower's tensors
    input_size: Side
    normalisation: tuple[Colours, Spreads]  # mean, std
    policy: dict[str, Any]

    @property
    def digest(self) -> str:
        """SHA-256 over all fields that differ from their defaults."""
        return digest_changes(self)

    @property
    def view_plan(self) -> ViewPlan:
        """How the views behind these features are drawn."""
        from cafe.views.drawing import ViewPlan

        return ViewPlan(
            str(self.policy.get("name")), self.view_seed, self.views, self.interpolation, *self.normalisation
        )


def describe_policy(name: str) -> dict[str, Any]:
    """Return what makes a view policy what it is, as plain JSON values: its name, and all that differs from no policy."""
    from cafe.views import drawing

    plain = asdict(drawing.ViewPolicy())
    changes = {key: value for key, value in asdict(drawing.POLICIES[name]).items() if plain.get(key) != value}
    return {"name": name, "version": drawing.VERSION, **json.loads(json.dumps(changes))}


@dataclass(frozen=True)
class StoreInfo:
    """What a store is, without opening it."""

    key: FeatureKey
    manifest: str
    backbone_name: str  # as the user wrote it
    rows: int
    width: int
    map_shape: tuple[int, int, int] | None
    shard_rows: int
    batch_size: int = 64  # as the key has it, but in stores of earlier versions, whose names do not say it
    version: int = FORMAT

    @classmethod
    def from_record(cls, record: dict[str, Any], where: str) -> StoreInfo:
        """Rebuild the description from its JSON, of whatever format; raise `UserError` for what is none."""
        return check_record({"version": 1, **record}, cls, where)

    def record(self) -> dict[str, Any]:
        """Return it as plain values; of the key what a user chose comes last, the order in which stores have kept them."""
        record = asdict(self)
        chosen = take(self.key, FeatureIdentity)
        record["key"] = {name: value for name, value in record["key"].items() if name not in chosen} | chosen
        return record

    @property
    def folder(self) -> str:
        """The store's folder name: readable first, unique last."""
        from cafe.towers.names import short_name

        backbone = re.sub(r"[^A-Za-z0-9]+", "-", short_name(self.backbone_name)).strip("-").lower()
        return f"{backbone}-v{self.key.views}-{self.key.digest[:12]}"

    @property
    def shards(self) -> int:
        """How many shards there are."""
        return -(-self.rows // self.shard_rows)

    def rows_of(self, shard: int) -> range:
        """The manifest rows of a shard."""
        return range(shard * self.shard_rows, min((shard + 1) * self.shard_rows, self.rows))

    def objects(self, shard: int) -> dict[str, str]:
        """Where each array keeps a shard, below the folder of the store; a part that was all left out has no file."""
        files = {"pooled": f"{shard}/0/0", "valid": str(shard)} | (
            {"map": f"{shard}/0/0/0/0"} if self.map_shape else {}
        )
        return {name: f"store.zarr/{name}/c/{key}" for name, key in files.items()}

    @property
    def bytes(self) -> int:
        """What all features take, before compression."""
        channels = self.width + (int(np.prod(self.map_shape)) if self.map_shape else 0)
        return self.rows * self.key.views * channels * np.dtype(self.key.dtype).itemsize

    def check_batches(self, store: UPath) -> None:
        """Raise `UserError` for a store of an earlier version with forward passes of another size than its name says."""
        if self.batch_size != self.key.batch_size:
            raise UserError(
                f"An earlier version filled {store} by passes of {self.batch_size} views, which its name does not say: "
                f"remove it with `cafe store rm {store_name(store)}`, then run `cafe extract` again."
            )

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


def store_name(store: UPath) -> str:
    """Return what a store is called on the command line."""
    return f"{store.parent.name}/{store.name}"
