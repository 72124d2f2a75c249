"""Which addresses a command asks: the user's own always, those that a file brought only where he allows it.

An address is the user's own when he typed it, in this command or in one before on this machine, or configured it in a
benchmark file. Every other came with a file, such as a manifest or the folder of a model, whose author would else choose
which servers this machine asks, those of its own network among them. Folders and object stores are no such addresses:
where a store is, and with whose keys it is read, is configured and not what a file says.
"""

from __future__ import annotations

import errno
import ipaddress
import re
import socket
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cafe.errors import UserError
from cafe.web import limit_waiting

OBJECT_STORES = ("s3", "s3a", "gs", "gcs", "az", "abfs")
HARMLESS = ("", "file", "local", "memory", *OBJECT_STORES)  # protocols that ask no server a file could choose
WEB = ("http", "https")
RECORD = Path(".config", "cafe", "addresses.txt")  # below the user's home: a workspace may come from somebody else
# An address in an argument: `timm:MODEL@https://host/file#stage3` has one, `zip://a.csv::https://host/b.zip` is one.
_ADDRESS = re.compile(r"(?:[\w+.-]+::)?[a-zA-Z][\w+.-]*://(?:(?!@[\w+.:-]+://)[^\s#])+")
_TRANSLATED = ipaddress.ip_network("64:ff9b::/96")  # IPv4 addresses as IPv6 alone reaches them


class PrivateAddressError(UserError, OSError):
    """A connection to this machine or its own network, which nobody allowed."""


@dataclass(frozen=True)
class Permission:
    """What a command may ask: its user's `own` addresses, with `urls` those of files, with `private` also private ones."""

    urls: bool = False
    private: bool = False
    own: tuple[str, ...] = ()

    def install(self) -> None:
        """Let this hold in this process, which may be a worker's."""
        global _permission
        _permission = self

    def options(self, location: str, protocol: str) -> dict[str, Any]:
        """Return the options with which a place is opened; raise `UserError` for an address that may not be asked."""
        public = {} if self.allows_private(location, protocol) else {"get_client": PublicClient()}
        return {**limit_waiting(), **public} if protocol in WEB else public

    def allows_private(self, location: str, protocol: str) -> bool:
        """Whether a place may also be on this machine or its own network; raise `UserError` if it may not be asked."""
        if protocol in HARMLESS or self._is_own(location):
            return True
        if protocol not in WEB:
            raise UserError(
                f"The address {location!r} came with a file: give a folder, an object store or https:// there."
            )
        if not self.urls:
            raise UserError(
                f"The web address {location!r} came with a file: where you trust that file, give --allow-urls to fetch "
                "from it."
            )
        return self.private

    def _is_own(self, location: str) -> bool:
        """Whether a place is one of the user's addresses or lies below it."""
        if re.search(r"/(\.|%2e){2}(/|$)", location, re.IGNORECASE):
            return location in self.own
        return any(f"{location}/".startswith(f"{own.rstrip('/')}/") for own in self.own)


_permission: Permission | None = None


def permission() -> Permission:
    """Return what holds in this process; without a command that said more, the addresses typed before on this machine."""
    return _permission or Permission(own=_read_record())


def permit(arguments: Iterable[str], urls: bool = False, private: bool = False) -> None:
    """Begin a command: what its user typed is his own, beside what he typed before; raise `UserError`."""
    if private and not urls:
        raise UserError("--allow-private-urls says how far --allow-urls goes: give both.")
    Permission(urls, private, (*find_addresses(arguments), *_read_record())).install()


def own(*texts: str, remember: bool = False) -> None:
    """Note addresses as the user's own for this process; with `remember` for his other commands on this machine too."""
    found, known = find_addresses(texts), permission()
    Permission(known.urls, known.private, tuple(dict.fromkeys((*found, *known.own)))).install()
    if remember and (new := [address for address in found if address not in _read_record()]):
        record = Path.home() / RECORD
        with suppress(OSError):  # a home that cannot be written to: then he types them again
            record.parent.mkdir(parents=True, exist_ok=True)
            with record.open("a", encoding="utf-8") as file:
                file.writelines(f"{address}\n" for address in new)
            record.chmod(0o600)  # some hold a password


def find_addresses(texts: Iterable[str]) -> tuple[str, ...]:
    """Return the addresses in some texts but those of folders and object stores."""
    found = (address for text in texts for address in _ADDRESS.findall(text))
    return tuple(dict.fromkeys(address for address in found if address.partition("://")[0] not in HARMLESS))


def _read_record() -> tuple[str, ...]:
    try:
        return tuple((Path.home() / RECORD).read_text(encoding="utf-8").splitlines())
    except (OSError, RuntimeError, ValueError):  # none yet, no home, or no text
        return ()


def is_private(address: str) -> bool:
    """Whether an IP address belongs to this machine or its own network, or to nobody, also one written within another."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        inner = found.ipv4_mapped or found.sixtofour or (found.teredo or (None, None))[1]
        inner = ipaddress.IPv4Address(int(found) & 0xFFFFFFFF) if found in _TRANSLATED else inner
        if inner and is_private(str(inner)):
            return True
    return not found.is_global or found.is_multicast


@dataclass(frozen=True)
class PublicClient:
    """What fsspec makes the client of a web address with: it connects to public addresses alone.

    Each connection is looked at when its name is resolved and its socket is made, those of a redirect as well.
    """

    async def __call__(self, **options: Any) -> Any:
        """Return a session of aiohttp."""
        import aiohttp

        return aiohttp.ClientSession(connector=aiohttp.TCPConnector(socket_factory=_open_public), **options)


def _open_public(address: tuple[Any, ...]) -> socket.socket:
    family, kind, protocol, _, place = address
    if is_private(place[0]):
        raise PrivateAddressError(errno.EACCES, "a private address")  # one text, by which those of a name are one error
    return socket.socket(family, kind, protocol)


def explain(error: BaseException, location: str) -> UserError | None:
    """Return the sentence for an error of fetching that means a private address; None for any other."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, PrivateAddressError):
        cause = getattr(cause, "os_error", None) or cause.__cause__
    return cause and UserError(
        f"The web address {location!r}, which came with a file, leads to this machine or its own network: where you trust "
        "that file, give --allow-private-urls too."
    )
