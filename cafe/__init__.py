"""The science of facial-expression recognition that generalises; nothing here knows Ray, Zarr, MLflow or click.

In the order in which a face passes through, which is also the order to read it in:

data       expressions, pictures and manifests; a reader for each data set; copies between sets; alignment of photographs
towers     frozen towers: their names, weights and layers, and a tower at work on the faces of a manifest
learning   views, batches, the training loops and the trainable image branches
methods    CAFE, its rivals and its baselines, a file each
results    predictions, and every number computed from them: scores, comparisons, tests, protocols, published numbers
report     tables, charts, figures and pages
inference  a trained method at work on photographs, videos and arrays
synthetic  drawn faces in five domains, for whoever has no data set

`import cafe` itself offers what a program of yours needs (docs/predict.md), each imported when it is first asked for:
`load_manifest`, `load_store`, `load_model`, `scores` and the class `Model`.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

OFFERED = {  # name: where it is; what needs a workspace belongs to the engine
    "Model": "cafe.inference.model",
    "load_manifest": "pipeline.release.library",
    "load_model": "pipeline.release.library",
    "load_store": "pipeline.release.library",
    "scores": "pipeline.release.library",
}
__all__ = sorted(OFFERED)


def __getattr__(name: str) -> Any:
    if name not in OFFERED:
        raise AttributeError(f"module 'cafe' has no attribute {name!r}")
    return getattr(import_module(OFFERED[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *OFFERED})
