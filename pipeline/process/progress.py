"""How far long work is: what goes to a callback, and what gives one, such as a bar on a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

Progress = Callable[[int, int], None]  # (done, total)
Bar = Callable[[str, str], AbstractContextManager[Progress]]  # (title, unit)


@contextmanager
def no_bar(title: str, unit: str) -> Iterator[Progress]:
    """Show nothing."""
    yield lambda done, total: None
