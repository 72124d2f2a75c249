"""Random numbers keyed by what they are for: no order, worker or machine takes part in any draw of the project."""

from __future__ import annotations

import hashlib

import numpy as np


def random_generator(*key: object) -> np.random.Generator:
    """Return a counter-based generator keyed by its arguments alone, e.g. (seed, "order", epoch)."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
