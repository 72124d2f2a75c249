"""The files of a feature store that say what it is, read without opening it; and what is said of damaged ones."""

from __future__ import annotations

from upath import UPath

from cafe.errors import UserError
from cafe.files import list_folder, list_sizes, read_file, read_json
from cafe.pipeline.features.key import StoreInfo
from cafe.records import FORMAT, digest, read_sealed

ABOUT, GROUP = "about.json", "store.zarr/zarr.json"  # both say what the store is
CHECKSUMS = "checksums.json"  # of these and of all other files that belong to no shard


def find_stores(features: UPath, manifest: str) -> list[tuple[UPath, StoreInfo]]:
    """Return the stores of a manifest and what they hold, without opening them; raise `UserError` for a damaged one."""
    found = [(path, read_about(path)) for path in list_folder(features / manifest)]
    return [(path, about) for path, about in found if about]


def read_about(store: UPath) -> StoreInfo | None:
    """Return what a store is, or None where none was made yet; raise `UserError` where that cannot be told."""
    path = store / ABOUT
    record = read_json(path)
    if record is None:
        if list_sizes(store).get(ABOUT):
            raise damaged(store, f"{ABOUT} is no record")
        return None
    try:
        about = StoreInfo.from_record(record, str(path))
    except UserError as error:
        raise damaged(store, str(error).rstrip(".")) from None
    if about.version == FORMAT and about.folder != store.name:
        raise damaged(store, f"{ABOUT} is that of {about.folder}")
    return about


def damaged(store: UPath, problem: str) -> UserError:
    """Return the error for a store that is not as it was written."""
    return UserError(f"The features in {store} are damaged ({problem}): run `cafe store repair {store_name(store)}`.")


def store_name(store: UPath) -> str:
    """Return what a store is called on the command line."""
    return f"{store.parent.name}/{store.name}"


def read_checksums(store: UPath) -> dict[str, str]:
    """Return the SHA-256 of each file that belongs to no shard, nothing for an older store; raise `UserError`."""
    try:
        record = read_sealed(store / CHECKSUMS) or {"files": {}}
    except UserError:
        raise damaged(store, f"{CHECKSUMS} is not what was written") from None
    return dict(record["files"])


def changed_files(store: UPath, checksums: dict[str, str]) -> list[str]:
    """Return those of some files that are missing or not what was written."""
    return [file for file, wanted in checksums.items() if _read_digest(store / file) != wanted]


def check_description(store: UPath) -> None:
    """Raise `UserError` where a file that describes the arrays is not what was written, which no shard's checksum shows."""
    described = {file: wanted for file, wanted in read_checksums(store).items() if file.endswith(".json")}
    if changed := changed_files(store, described):
        raise damaged(store, f"{changed[0]} is not what was written")


def recover_about(store: UPath) -> StoreInfo:
    """Return what a store is from either of the two files that say so; raise `UserError` where neither can be trusted."""
    try:
        checksums = read_checksums(store)
    except UserError:
        checksums = {}
    found = {file: about for file in (ABOUT, GROUP) if (about := _read_copy(store, file))}
    if checksums:
        found = {file: about for file, about in found.items() if _read_digest(store / file) == checksums.get(file)}
    agreed = list(found.values())
    if not agreed or agreed[0] != agreed[-1]:
        raise UserError(
            f"Nothing in {store} tells reliably what it holds: remove it with `cafe store rm {store_name(store)}`, then run "
            "`cafe extract` again."
        )
    return agreed[0]


def _read_copy(store: UPath, file: str) -> StoreInfo | None:
    record = read_json(store / file) or {}
    try:
        about = StoreInfo.from_record(record.get("attributes", {}) if file == GROUP else record, file)
    except UserError:
        return None
    return about if about.folder == store.name else None


def _read_digest(path: UPath) -> str:
    try:
        return digest(read_file(path))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return ""
