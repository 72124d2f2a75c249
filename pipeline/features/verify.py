"""Whether a store is what was written: all of it is read back and compared with its checksums."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from upath import UPath

from cafe.data.manifest import Manifest
from cafe.errors import UserError
from cafe.files import exists, list_sizes
from cafe.pipeline.features.description import ABOUT, CHECKSUMS, changed_files, read_checksums, recover_about
from cafe.pipeline.features.key import StoreInfo
from cafe.pipeline.features.receipts import Receipts, in_parallel
from cafe.pipeline.features.store import FeatureStore, write_description

CHANGED, MISSING = "is not what was written", "is missing"


@dataclass(frozen=True)
class Damage:
    """A file of a store, by its place in the folder, that is not as it was written, and the shard it belongs to."""

    file: str
    problem: str
    shard: int | None = None


def find_damage(store: UPath, progress: Callable[[int, int], None] = lambda done, total: None) -> list[Damage]:
    """Read a store back, every byte of it, and return what is not as it was written; `progress` counts shards."""
    damages = [Damage(file, CHANGED) for file in _changed_description(store)]
    try:
        about = recover_about(store)
    except UserError:
        return damages or [Damage(ABOUT, CHANGED)]
    receipts = Receipts(store, about)
    done = receipts.done()
    if list_sizes(store).get(receipts.summary.name):  # all shards were done
        damages += [Damage(f"receipts/{receipts.path(shard).name}", MISSING, shard) for shard in receipts.pending()]
        try:
            receipts.skipped()
        except UserError:
            damages.append(Damage(receipts.summary.name, CHANGED))
    for count, found in enumerate(in_parallel(store, partial(_check_shard, receipts), done), start=1):
        damages += found
        progress(count, len(done))
    return damages


def _changed_description(store: UPath) -> list[str]:
    try:
        return changed_files(store, read_checksums(store))
    except UserError:
        return [CHECKSUMS]


def _check_shard(receipts: Receipts, shard: int) -> list[Damage]:
    name = f"receipts/{receipts.path(shard).name}"
    try:
        receipt = receipts.read(shard)
    except UserError:
        return [Damage(name, CHANGED, shard)]
    if receipt is None:
        return [Damage(name, MISSING, shard)]
    files = receipts.about.objects(shard).values()
    if receipt.files is None:  # of an older version: what the files hold is compared
        whole = FeatureStore(receipts.store, receipts.about).matches(shard, receipt)
        return [] if whole else [Damage(file, CHANGED, shard) for file in files]
    if shard == 0 and not exists(receipts.store / CHECKSUMS):  # of an older version there is none
        return [Damage(CHECKSUMS, MISSING)]
    wanted = {file: receipt.files.get(file, "") for file in files}
    return [Damage(file, CHANGED, shard) for file in changed_files(receipts.store, wanted)]


def discard_damage(store: UPath, manifest: Manifest, damages: list[Damage]) -> StoreInfo:
    """Declare damaged shards undone and write again what describes a store, which is returned; raise `UserError`."""
    about = recover_about(store)
    if about.key.images != manifest.image_digest:
        raise UserError(
            f"The features in {store} were made of other images than the manifest {manifest.name!r} lists now: remove them "
            "with `cafe store rm`."
        )
    if any(damage.shard is None for damage in damages):
        write_description(store, about, manifest)
    Receipts(store, about).discard({damage.shard for damage in damages if damage.shard is not None})
    return about
