"""Files on a laptop or in an object store, read and written by the same lines, each of them whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import stat
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryFile, gettempdir
from typing import IO, Any, TypeVar
from urllib.parse import unquote

from fsspec import get_filesystem_class
from upath import UPath

from cafe.addresses import OBJECT_STORES, WEB, explain, permission
from cafe.errors import AnswerError, IrregularFileError, StorageError, UserError, quote
from cafe.web import ANSWERS, get

OUTSIDE = re.compile(r"(^|/)\.{0,2}(/|$)|\x00")  # in a name: a part that is empty, '.' or '..'
MOST_TEXT = 2**28  # bytes of a JSON or TOML file, which takes about ten times as much once it is read
LONGEST = 60  # characters of a name beside which a file is written
PART = ".part"  # how a file is called as long as it is written
PAUSES = (0.1, 0.5, 2.0)  # seconds before a file is tried again
OBJECT_PAUSES = (*PAUSES, 5.0, 10.0, 20.0, 30.0)  # those of an object store, whose outages pass
# No fault of the storage: another try changes nothing.
CERTAIN = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, StorageError)

Result = TypeVar("Result")


def locate(location: str, absolute: bool = True) -> UPath:
    """Return a URI as it is and a local path, which workers in folders of their own read too, made absolute.

    Of an object store nothing is remembered that was listed before: other machines write there. Raises `UserError` for a
    protocol that nothing here reads, for an address that may not be asked (`cafe.addresses`), and for the home of a user
    there is not.
    """
    try:
        path = UPath(location)
        if path.protocol in OBJECT_STORES:
            if not path.path.lstrip("/") or path.path.startswith("/"):
                raise ValueError("its bucket is missing")
            get_filesystem_class(path.protocol)  # else its library would be missed at the first reading
            return UPath(location, use_listings_cache=False)
        options = permission().options(location, path.protocol)
        if path.protocol:
            get_filesystem_class(path.protocol)
            return UPath(location, **options) if options else path
        return path.expanduser().absolute() if absolute else path.expanduser()
    except (ValueError, ImportError, RuntimeError) as error:  # an unknown protocol, its library, a user's unknown home
        remedy = "give a folder, a file or a URI"
        if isinstance(error, ImportError) and location.startswith(("s3:", "s3a:")):
            remedy = "run `pip install 'cafe-fer[s3]'`"
        raise UserError(f"The place {location!r} cannot be used ({quote(error)}): {remedy}.") from None


def is_encoded(name: str) -> bool:
    """Whether a name is text, as tables and records need it: file systems have names that are no UTF-8."""
    return not any("\ud800" <= character <= "\udfff" for character in name)


def check_encoded(name: str) -> str:
    """Return the name of a folder or file that is to be recorded; raise `UserError` for one that is no UTF-8."""
    if not is_encoded(name):
        raise UserError(f"The name {name!r} is no UTF-8, so that no table or record can hold it: rename it.")
    return name


def find_below(folder: UPath, name: str) -> UPath:
    """Return the path below a folder of a file to read, whose name a file brought; raise `UserError` where it is outside.

    With `place_below` the one place where such names become paths. Links are followed: how a data set lies on its disks is
    its owner's affair.
    """
    if OUTSIDE.search(name) or (folder.protocol in WEB and OUTSIDE.search(unquote(name))):
        raise UserError(
            f"The name {name!r} leads out of {folder}: take one without '..', empty parts and a leading '/'."
        )
    if folder.protocol in WEB and folder.path.strip("/").endswith(":"):  # of addresses of several servers
        other: UPath = UPath(f"{folder.protocol}://{name}", **folder.storage_options)
        return other
    return folder / name


def place_below(folder: UPath, name: str) -> UPath:
    """Return the path of a file to be written, or read where we wrote it, below a folder; a name may hold folders.

    The name came with a file or an option. Raises `UserError` for one that leads out of the folder, on other systems and
    through links as well.
    """
    if re.match(r"[A-Za-z]:", name) or "\\" in name:
        raise UserError(f"The name {name!r} leads out of {folder}: take one without '\\' and drives.")
    place = find_below(folder, name)
    if not folder.protocol and not _settled(place).is_relative_to(_settled(folder)):
        raise UserError(f"{place} is a link that leads out of {folder}: remove the link, or name a folder without it.")
    return place


def _settled(path: UPath) -> Path:
    """Return where the links of a path lead; that of a link to itself is left as it is, for whoever opens it to refuse."""
    return Path(os.path.realpath(str(path)))


def storage_errors() -> tuple[type[Exception], ...]:
    """Return what a failing storage raises: `OSError`, and what the libraries of S3 and of the web have, if loaded."""
    s3, web = sys.modules.get("botocore.exceptions"), sys.modules.get("aiohttp")
    return (OSError, *((s3.BotoCoreError, s3.ClientError) if s3 else ()), *((web.ClientError,) if web else ()))


def retry(path: UPath, verb: str, function: Callable[..., Result], *arguments: Any) -> Result:
    """Call a function that uses a file, again after each of the pauses as long as the storage fails.

    Raises `StorageError`, which says that the path cannot be `verb`, such as *read*; errors that are certain are left alone.
    """
    pauses = OBJECT_PAUSES if path.protocol in OBJECT_STORES else PAUSES
    for tried, wait in enumerate((*pauses, None), start=1):
        try:
            return function(*arguments)
        except CERTAIN:
            raise
        except storage_errors() as error:
            pause = None if tried > len(PAUSES) and _is_refused(error) else wait
            if refused := explain(error, str(path)):
                raise refused from None
            if getattr(error, "errno", None) == errno.ENAMETOOLONG:
                raise
            if pause is None:
                reason = getattr(error, "strerror", None) or quote(error)
                kind = AnswerError if str(error).startswith(ANSWERS) else StorageError
                raise kind(
                    f"{path} cannot be {verb} ({reason}), though it was tried {tried} times: fix the storage or the rights "
                    "to it and give the command again."
                ) from error
            time.sleep(pause)
    raise AssertionError("the last try returns or raises")


def _is_refused(error: Exception) -> bool:
    """Whether a storage refuses, or has no credentials, which seldom passes."""
    return isinstance(error, PermissionError) or "Credential" in type(error).__name__


def exists(path: UPath) -> bool:
    """Whether there is a file or folder."""
    return retry(path, "read", path.exists)


def list_folder(folder: UPath) -> list[UPath]:
    """Return what a folder holds, sorted by name, without files half written; nothing when it is not there."""
    there: list[UPath] = []
    with suppress(FileNotFoundError, NotADirectoryError):
        there = retry(folder, "listed", lambda: list(folder.iterdir()))
    return sorted((path for path in there if not path.name.startswith(".")), key=lambda path: path.name)


def list_folders(folder: UPath) -> list[UPath]:
    """Return the folders that a folder holds, sorted by name, from one listing; nothing when it is not there."""
    kinds = {entry["name"].rstrip("/").rpartition("/")[2]: entry["type"] for entry in _list_entries(folder)}
    kept = [folder / name for name, kind in sorted(kinds.items()) if kind != "file" and not name.startswith(".")]
    return [path for path in kept if kinds[path.name] == "directory" or path.is_dir()]  # others are links


def list_files(folder: UPath) -> list[UPath]:
    """Return every file below a folder, sorted, without those half written; nothing when it is not there."""
    return sorted(path for path in folder.glob("**/*") if path.is_file() and not path.name.startswith("."))


def list_sizes(folder: UPath) -> dict[str, int]:
    """Return the bytes of each file of a folder by its name, from one listing; nothing when it is not there."""
    entries = _list_entries(folder)
    return {entry["name"].rpartition("/")[2]: entry["size"] for entry in entries if entry["type"] == "file"}


def _list_entries(folder: UPath) -> list[dict[str, Any]]:
    try:
        return retry(folder, "listed", lambda: folder.fs.ls(folder.path, detail=True))
    except (FileNotFoundError, NotADirectoryError):
        return []


def list_tree(folder: UPath) -> dict[str, tuple[int, float]]:
    """Return size and time of change, in seconds since 1970, of each file below a folder by its place there."""
    found = retry(folder, "listed", lambda: folder.fs.find(folder.path, detail=True))
    return {
        name.removeprefix(folder.path).strip("/"): (
            entry["size"],
            _seconds(entry.get("mtime") or entry.get("LastModified")),
        )
        for name, entry in found.items()
    }


def _seconds(time: Any) -> float:
    return float(time.timestamp() if hasattr(time, "timestamp") else time or 0.0)


def remove_tree(folder: UPath) -> None:
    """Remove a folder with all it holds, which may be gone already."""
    with suppress(FileNotFoundError):
        retry(folder, "removed", lambda: folder.fs.rm(folder.path, recursive=True))


def check_regular(path: UPath, most: int | None = None) -> None:
    """Raise `IrregularFileError` for a pipe or a device, and for a file of more bytes than `most`, before it is opened.

    The one place that says what may be opened. An object store holds neither pipes nor devices, and is not asked for sizes,
    which would be a request more for each file.
    """
    if path.protocol not in ("", "file"):
        return
    about = retry(path, "read", path.stat)
    if not stat.S_ISREG(about.st_mode) and not stat.S_ISDIR(about.st_mode):
        raise IrregularFileError(f"{path} is a pipe or a device: give a file.")
    if most is not None and about.st_size > most:
        raise IrregularFileError(
            f"{path} has {about.st_size:,} bytes, more than the {most:,} that a file of its kind may have: remove it, or "
            "put the right one there."
        )


def read_file(path: UPath, most: int | None = None) -> bytes:
    """Return the content of a file, from an object store or the web by one request; raise as `check_regular` does."""
    check_regular(path, most)
    if path.protocol in WEB:
        return retry(path, "read", get, path, most)
    if path.protocol not in OBJECT_STORES:
        return retry(path, "read", path.read_bytes)
    whole = {"max_concurrency": 1} if path.protocol in ("s3", "s3a") else {}  # else it asks for the size before
    return bytes(retry(path, "read", lambda: path.fs.cat_file(path.path, **whole)))


def copy_here(location: str) -> str:
    """Return the path of a local file as it is; of another that of a copy, fetched when it is new or has changed."""
    if "://" not in location:
        return location
    path = locate(location)
    try:
        version = retry(path, "read", path.fs.ukey, path.path)
    except FileNotFoundError:
        return location  # whoever opens it says that it is missing
    copy = place_below(UPath.home() / ".cache" / "cafe" / version[:16], path.name)
    if not copy.exists():
        write_file(copy, read_file(path))
    return str(copy)


def remove_file(path: UPath) -> None:
    """Remove a file that may be gone already."""
    with suppress(FileNotFoundError):
        retry(path, "removed", path.unlink)


def write_file(path: UPath, content: bytes) -> None:
    """Write a file so that a reader, or a kill, finds the old content or the new one and nothing between.

    An object store does so by itself; on a disk the content is written beside the file and then renamed.
    """
    retry(path, "written", _put if path.protocol in OBJECT_STORES else _write_beside, path, content)


@contextmanager
def write_whole(path: UPath, keep: bool = False) -> Iterator[IO[bytes]]:
    """Yield a file to write to that takes its place at the end: before, and after an error or a kill, the old one is there.

    With `keep`, what is interrupted by its user is kept as far as it came. Links are followed, and what is no file, such as
    `/dev/stdout`, is written as it is. What a kill leaves beside it goes with the next `check_outputs`.
    """
    if not path.protocol and path.exists() and not path.is_file():
        with path.open("wb") as file:
            yield file
    elif path.protocol:
        with NamedTemporaryFile(suffix=PART) as file:
            with _kept(keep, lambda: _upload(file, path)):
                yield file
            _upload(file, path)
    else:
        with _beside(UPath(_settled(path))) as (file, settle):
            with _kept(keep, settle):
                yield file
            settle()


@contextmanager
def _kept(keep: bool, settle: Callable[[], None]) -> Iterator[None]:
    """Put what was written so far into its place when its user interrupts it, if it is to be kept."""
    try:
        yield
    except KeyboardInterrupt:
        if keep:
            settle()
        raise


def _upload(file: IO[bytes], place: UPath) -> None:
    file.flush()
    retry(place, "written", place.fs.put_file, file.name, place.path)


@contextmanager
def _beside(place: UPath) -> Iterator[tuple[IO[bytes], Callable[[], None]]]:
    """Yield a file beside a place on a disk and what puts it there, with the rights of the file that was there."""
    place.parent.mkdir(parents=True, exist_ok=True)
    file = _open_part(str(place.parent), f".{place.name[:LONGEST]}.")
    try:

        def settle() -> None:
            file.flush()
            Path(file.name).chmod(place.stat().st_mode & 0o777 if place.exists() else 0o666 & ~_read_mask())
            Path(file.name).replace(str(place))

        yield file, settle
    finally:  # on a full disk half a file is left
        with suppress(OSError):
            file.close()
        Path(file.name).unlink(missing_ok=True)


def _open_part(folder: str, prefix: str) -> IO[bytes]:
    """Open a new file that is locked as long as its writer lives: what is not locked was left by one that was killed."""
    while True:
        file = NamedTemporaryFile(dir=folder, prefix=prefix, suffix=PART, delete=False)  # noqa: SIM115  # closed by whoever asked
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:  # else it was taken for one that was left before it was locked
            return file
        file.close()


@cache
def _read_mask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def remove_leftovers(folder: UPath, below: bool = False) -> None:
    """Remove what writers that were killed left half written in a folder of a disk, or below; of living ones nothing."""
    for part in Path(str(folder)).glob(("**/" if below else "") + f".*{PART}"):
        with suppress(OSError), part.open("r+b") as file:  # gone, another user's, or a living writer's
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            part.unlink()


def check_output(location: str, option: str) -> UPath:
    """Return the path of a file that a command will write at its end; raise `UserError` at once where it cannot."""
    return check_outputs([location], option)[0]


def check_outputs(locations: Iterable[str], option: str) -> list[UPath]:
    """Return the paths of files that a command will write at its end; raise `UserError` at once where it cannot.

    Nothing is left there, no folder either, and what killed commands left half written is removed; of an object store only
    the address is looked at.
    """
    places, tried = [], set[str]()
    for location in locations:
        places.append(place := locate(location))
        try:
            if not place.protocol and (folder := _find_room(place)) not in tried:
                tried.add(folder)
                with TemporaryFile(dir=folder):
                    remove_leftovers(UPath(folder))
        except OSError as error:
            raise UserError(f"{option} {location} cannot be written ({error.strerror}): give another place.") from None
    return places


def _find_room(place: UPath) -> str:
    """Return the folder that is there of those a file is to be written in; raise `OSError` where it cannot be."""
    if place.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not place.exists():
        with suppress(FileNotFoundError):
            Path(str(place)).stat()  # a name that is too long, links in a circle
        return str(next(folder for folder in place.parents if folder.exists() or folder == folder.parent))
    if not os.access(str(place), os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    return str(_settled(place).parent) if place.is_file() else gettempdir()  # a device


def check_different(places: Mapping[str, str], what: str) -> None:
    """Raise `UserError` where two inputs have one place for their outputs; `places` maps input to place."""
    seen: dict[str, str] = {}
    for name, place in places.items():
        if (other := seen.setdefault(place, name)) != name:
            raise UserError(f"{what} of {other} and {name} would both be {place}: rename one of them.")


def write_changed(path: UPath, content: bytes) -> None:
    """Write a file, unless it says so already: what watches its time takes a new one for news."""
    if not exists(path) or read_file(path) != content:
        write_file(path, content)


def create_file(path: UPath, content: bytes) -> None:
    """Write a file that nobody else can have made at the same time; raise `FileExistsError` where there is one."""
    if path.protocol in OBJECT_STORES:
        retry(path, "written", _put, path, content, "create")
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:  # a file, or a link that leads nowhere: another try changes nothing
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), error.filename) from None
    with path.open("xb") as file:
        file.write(content)


def replace_file(path: UPath, before: bytes, content: bytes | None) -> bool:
    """Write a file in place of one that holds `before`, or remove it; return whether it was there and held that.

    Nobody else's content is lost between the look and the write: on a disk the file is locked, and S3 compares by itself
    (it removes what was looked at just before, as other stores write).
    """
    return retry(path, "written", _replace_here if not path.protocol else _replace_there, path, before, content)


def _replace_here(path: UPath, before: bytes, content: bytes | None) -> bool:
    try:
        with path.open("r+b") as file:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
            if os.fstat(file.fileno()).st_ino != path.stat().st_ino or file.read() != before:
                return False  # another has replaced it meanwhile
            path.unlink() if content is None else _write_beside(path, content)
            return True
    except FileNotFoundError:
        return False


def _replace_there(path: UPath, before: bytes, content: bytes | None) -> bool:
    s3 = path.protocol in ("s3", "s3a") and content is not None
    try:
        condition = {"IfMatch": path.fs.info(path.path, refresh=True)["ETag"]} if s3 else {}
        if read_file(path) != before:
            return False
        if content is None:
            remove_file(path)
        else:
            path.fs.pipe_file(path.path, content, **condition)
        return True
    except FileNotFoundError:
        return False
    except OSError as error:
        if s3 and error.errno == errno.EINVAL:  # what s3fs makes of a condition that does not hold
            return False
        raise


def _put(path: UPath, content: bytes, mode: str = "overwrite") -> None:
    try:
        path.fs.pipe_file(path.path, content, mode=mode)
    except FileNotFoundError as error:
        raise UserError(f"{path} cannot be written ({quote(error)}): make its bucket first.") from None


def _write_beside(path: UPath, content: bytes) -> None:
    if path.protocol:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return
    with _beside(path) as (file, settle):
        file.write(content)
        settle()


def read_json(path: UPath) -> dict[str, Any] | None:
    """Return a JSON object, or None when the file is missing or damaged."""
    try:
        return parse_json(read_file(path, MOST_TEXT))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None


def parse_json(content: bytes) -> dict[str, Any] | None:
    """Return a JSON object, or None where it is none."""
    try:
        record = json.loads(content)
    except (ValueError, RecursionError):  # of text, of numbers of a million digits, of a million brackets
        return None
    return record if isinstance(record, dict) else None


def write_json(path: UPath, record: dict[str, Any]) -> None:
    """Write a JSON object, with the same bytes for the same content."""
    write_file(path, encode_json(record))


def encode_json(record: dict[str, Any]) -> bytes:
    """Return the bytes of a JSON object, the same for the same content."""
    return json.dumps(record, indent=1, sort_keys=True, ensure_ascii=False).encode("utf-8", "surrogatepass")
