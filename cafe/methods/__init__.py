"""The methods. A new one is a file and a line here; tests walk every entry."""

from __future__ import annotations

from cafe.errors import unknown
from cafe.methods.cafe import Cafe
from cafe.methods.eac import Eac
from cafe.methods.image_only import ImageOnly
from cafe.methods.linear_probe import LinearProbe
from cafe.methods.method import Method
from cafe.methods.rul import Rul
from cafe.methods.scn import Scn

METHODS: dict[str, type[Method]] = {
    "cafe": Cafe,
    "scn": Scn,
    "rul": Rul,
    "eac": Eac,
    "linear_probe": LinearProbe,
    "image_only": ImageOnly,
}


def find_method(name: str) -> type[Method]:
    """Return a method by name; raise `UserError` naming all."""
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    return METHODS[name]
