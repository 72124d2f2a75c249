"""Facial-expression recognition that generalises.

Its packages, each of which imports those below it alone (read them from the bottom, the way a face goes):

jobs       the doors: command line, shipped benchmark files, cluster files
pipeline   the engine: workspace, runs, feature stores, training, evaluation, benchmarks, tracking, release
inference  a trained method at work on photographs, videos and arrays
report     tables, charts, figures and pages, drawn from numbers
results    predictions, and every number computed from them: scores, comparisons, tests, protocols, published numbers
learning   batches, the training loops, adaptation
methods    CAFE, its rivals and its baselines, a file each
networks   the trainable image branches; what several workers share
towers     frozen towers: their names, weights and layers, and a tower at work on the faces of a manifest
views      one augmented picture of one face: drawn, rendered, resized, on a CPU and on a card
synthetic  drawn faces in five domains, for whoever has no data set
data       expressions, pictures and manifests; a reader for each data set; copies between sets; alignment of photographs

All but the first two are the science and know neither Ray, Zarr, MLflow nor click. In a checkout `pipeline` and `jobs` are
links to the folders beside this one.

`import cafe` itself offers what a program of yours needs (docs/predict.md), each imported when it is first asked for:
`predict`, `extract`, `train`, `compare`, `scores`, `load_manifest`, `load_store`, `load_model`, the class `Model` and the
seven `EXPRESSIONS`.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"  # of the distribution, which is named cafe-fer

OFFERED = {  # name: where it is; what needs a workspace belongs to the engine
    "EXPRESSIONS": "cafe.data.expressions",
    "Model": "cafe.inference.model",
    "compare": "cafe.pipeline.release.library",
    "extract": "cafe.pipeline.release.library",
    "load_manifest": "cafe.pipeline.release.library",
    "load_model": "cafe.pipeline.release.library",
    "load_store": "cafe.pipeline.release.library",
    "predict": "cafe.pipeline.release.prediction",
    "scores": "cafe.pipeline.release.library",
    "train": "cafe.pipeline.release.library",
}
__all__ = sorted(OFFERED)


def __getattr__(name: str) -> Any:
    if name not in OFFERED:
        raise AttributeError(f"module 'cafe' has no attribute {name!r}")
    return getattr(import_module(OFFERED[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *OFFERED})
