"""One file of a web address, asked for once: no more than a number of bytes of it, and never waited for without end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cafe.errors import AnswerError

if TYPE_CHECKING:
    from upath import UPath

CONNECT_SECONDS, SILENT_SECONDS = 10, 30  # to a server, and between two pieces of its answer
MOST_SECONDS = 600  # for a whole answer
MISSING = (404, 410)
PASSING = (408, 425, 429)  # and all from 500: the same question may be answered later
ANSWERS = "the server answers "
PIECE = 2**16  # bytes
MOST_BYTES = 2**33  # of a file of weights


def limit_waiting() -> dict[str, Any]:
    """Return the options with which fsspec makes a client that does not wait for ever."""
    from aiohttp import ClientTimeout

    waiting = ClientTimeout(total=MOST_SECONDS, sock_connect=CONNECT_SECONDS, sock_read=SILENT_SECONDS)
    return {"client_kwargs": {"timeout": waiting}}


def get(path: UPath, most: int | None = None) -> bytes:
    """Return the content of a file at a web address.

    Raises `FileNotFoundError` where the server says that there is none, `AnswerError` where it refuses to give it or gives
    more than `most` bytes, and what aiohttp raises, or an `OSError`, where another try may help.
    """
    from fsspec.asyn import sync  # with asyncio, which `cafe --help` need not wait for

    content: bytes = sync(path.fs.loop, _get, path.fs, path.path, most or MOST_BYTES)
    return content


async def _get(system: Any, address: str, most: int) -> bytes:
    session, content = await system.set_session(), bytearray()
    async with session.get(system.encode_url(address), **system.kwargs) as answer:
        said = f"{ANSWERS}{answer.status} {answer.reason}"
        if answer.status in MISSING:
            raise FileNotFoundError(address)
        if answer.status >= 500 or answer.status in PASSING:
            raise OSError(said)
        if answer.status >= 400:
            raise AnswerError(f"{address} cannot be read ({said}): look at the address, and at who may read it.")
        async for piece in answer.content.iter_chunked(PIECE):
            content += piece
            if len(content) > most:
                raise AnswerError(f"{address} has more than the {most:,} bytes that are fetched: give another file.")
    return bytes(content)
