"""Plug-ins of a test, which no other test sees."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from cafe import plugins
from cafe.data.readers import DATASETS
from cafe.methods import METHODS
from cafe.networks.branches import NETWORKS
from cafe.towers.names import BACKBONES


@contextmanager
def forgotten_plugins() -> Iterator[None]:
    """Forget at the end which plug-ins were loaded, and what they added."""
    kept = [(entries, dict(entries)) for entries in (DATASETS, BACKBONES, NETWORKS, METHODS, plugins._suppliers)]
    try:
        yield
    finally:
        for entries, before in kept:
            entries.clear()  # type: ignore[attr-defined]
            entries.update(before)  # type: ignore[attr-defined]
