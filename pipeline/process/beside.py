"""Work beside the body of a `with`: signs of life, a lease that is renewed, a look at a cluster now and then."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Thread


@contextmanager
def repeat(work: Callable[[], None], seconds: float) -> Iterator[None]:
    """Do something again and again in a thread while the body runs, each time after so many seconds."""
    ended = Event()

    def run() -> None:
        while not ended.wait(seconds):
            work()

    thread = Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
