"""Reports as one self-contained HTML file each: pictures are embedded, so a page can be mailed, kept and printed."""

from __future__ import annotations

import base64
import io
from functools import cache
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from PIL import Image

from cafe.outputs import MARK

GENERATOR = f'<meta name="generator" content="{MARK}">'  # by which a page is known as ours
PICTURE = 112  # longest side of an embedded picture in pixels


def embed(pixels: np.ndarray) -> str:
    """Return a picture (H, W, 3) as a data URI, shrunk to a thumbnail and never enlarged."""
    picture = Image.fromarray(pixels)
    picture.thumbnail((PICTURE, PICTURE), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=82)
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"


def embed_figure(png: bytes) -> str:
    """Return a drawn figure as a data URI, compressed to a few tens of kilobytes."""
    data = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").save(data, "WEBP", quality=80)
    return f"data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}"


def render(template: str, **values: Any) -> bytes:
    """Fill a template of this package and return the page or text; a value the template lacks is an error."""
    return _environment().get_template(template).render(**values).encode()


@cache
def _environment() -> Environment:
    """Return what keeps the templates, each of which takes a tenth of a second to compile."""
    environment = Environment(
        loader=PackageLoader("cafe.report"),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["count"] = lambda number: f"{number:,}"
    environment.filters["percent"] = lambda share: f"{100 * share:.1f} %"
    return environment
