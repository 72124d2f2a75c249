"""What a user should know of a training: choices made for them, steps too few or too small, copies among targets, hours."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cafe.arithmetic import computes_bf16
from cafe.data.manifest import Manifest
from cafe.data.rows import LARGE
from cafe.methods import find_method
from cafe.pipeline.faces import Faces
from cafe.pipeline.plan import TrainPlan
from cafe.pipeline.process.machine import own_device
from cafe.pipeline.process.progress import Bar, Pace, Progress, format_seconds
from cafe.pipeline.settings import TrainSettings
from cafe.pipeline.workspace import Workspace
from cafe.results.sources import Source

MEASURED_SECONDS, LONG_SECONDS = 5.0, 120.0  # of first steps, and from when on it is said how long a training takes
# The published CAFE takes 23,000 steps on RAF-DB at this rate, which a tenth of them cannot do with.
FEW_STEPS, SMALL_RATE = 2300, 2e-4


def explain_few_steps(faces: int, recipe: dict[str, Any], settings: TrainSettings) -> Iterator[str]:
    """Yield what helps where the steps of a training are too few for the small steps of the published recipe."""
    steps, method = math.ceil(faces / recipe["batch_size"]) * recipe["epochs"], find_method(settings.method)
    published = method.published_recipe("").learning_rate
    if (
        method.trained
        and not settings.start
        and steps < FEW_STEPS
        and recipe["learning_rate"] == published == SMALL_RATE
    ):
        standardised = (
            " --set features=standardised" if recipe.get("features", "standardised") != "standardised" else ""
        )
        yield (
            f"{faces:,} training faces make {steps:,} steps, and the published learning rate {published:g} is meant for "
            f"twenty thousand: --set learning_rate=0.001{standardised} learns more of so few."
        )


def explain_copies(
    workspace: Workspace, evaluations: Iterable[tuple[tuple[Source, ...], Sequence[Faces]]]
) -> Iterator[str]:
    """Yield, of each pair of a source and a target once, how many of the faces that are evaluated were trained on.

    The same bytes and the same box are one face. Copies that were cropped or compressed again are found by an audit alone.
    """
    workspace = workspace.keeping_manifests()
    known = set(workspace.manifest_names())
    pairs = {
        (source, target.name, target.split): target
        for sources, targets in evaluations
        for source, target in product(sources, targets)
        if source.name in known
    }
    for (source, _, _), target in pairs.items():
        manifest = workspace.load_manifest(source.name)
        if manifest.digest == source.digest and (count := count_copies(manifest, target)):
            names = " ".join(dict.fromkeys([source.name, target.name]))
            yield (
                f"{count:,} of the {len(target.rows(target.split)):,} faces of {target.name} that are evaluated are "
                f"training faces of {source.name}: `cafe data audit {names}` finds copies, and --exclude-leaks leaves "
                "them out."
            )


def count_copies(source: Manifest, target: Faces) -> int:
    """Return how many of the faces that a target is evaluated on are, byte for byte, training faces of a source.

    Digests of more than a million faces are not held in memory for it: of such sets an audit alone says.
    """
    (part,) = target.parts
    if max(len(source), len(part.manifest)) > LARGE:
        return 0
    trained, evaluated = source.rows("train"), target.rows(target.split)
    digests = part.manifest.table["digest"].take(pa.array(evaluated))
    shared = pc.is_in(digests, value_set=source.table["digest"].take(pa.array(trained)), skip_nulls=True)
    if not pc.any(shared).as_py():
        return 0
    own = set(_name_faces(source, trained))
    return sum(name in own for name in _name_faces(part.manifest, evaluated))


def _name_faces(manifest: Manifest, rows: np.ndarray) -> list[tuple[str, str]]:
    """Return what names each face whose picture has a digest: this and its box."""
    columns = (manifest.table[name].take(pa.array(rows)).to_pylist() for name in ("digest", "box"))
    return [(digest, str(box)) for digest, box in zip(*columns, strict=True) if digest]


def foretell_on(bar: Bar, settings: TrainSettings, plan: TrainPlan, say: Callable[..., None]) -> Bar:
    """Return a bar that also says, by `say`, once its first steps are measured, how long a training without a GPU takes."""
    if settings.address or "image" not in find_method(settings.method).needs or own_device(settings.use_gpu) != "cpu":
        return bar

    @contextmanager
    def foretelling(title: str, unit: str) -> Iterator[Progress]:
        pace, said = Pace(), False
        with bar(title, unit) as progress:

            def update(done: int, total: int, /, **facts: float) -> None:
                nonlocal said
                pace.note(time.monotonic(), done)
                left = pace.seconds_left(total)
                if unit == "steps" and not said and left is not None and pace.measured >= MEASURED_SECONDS:
                    said = True
                    if left > LONG_SECONDS:
                        say(foretell(left, plan.spec.recipe["epochs"], plan.spec.image_size), err=True)
                progress(done, total, **facts)

            yield update

    return foretelling


def foretell(seconds: float, epochs: int, image_size: int) -> str:
    """Return how long a training on pictures takes on a CPU, and which options shorten it."""
    fewer, smaller = max(1, epochs // 4), max(32, image_size // 2)
    shorter = [
        *([f"--epochs {fewer} instead of {epochs}"] if fewer < epochs else []),
        *([f"--image-size {smaller} instead of {image_size}"] if smaller < image_size else []),
        "a method that learns from features alone, such as --method cafe_vector or mlp",
    ]
    return (
        f"Without a GPU this training takes about {format_seconds(seconds)} more, as its first steps went. Shorter: "
        f"{', '.join(shorter[:-1])}{', or ' if len(shorter) > 1 else ''}{shorter[-1]}."
    )


def explain_precision(precision: str, address: str | None) -> Iterator[str]:
    """Yield what a user should know who asks this machine for an arithmetic that it has not."""
    if precision == "bf16" and not address and not computes_bf16():
        yield (
            "This machine computes bfloat16 in software, ten times as slowly as fp32 or worse: leave --precision bf16 "
            "out, or train with --precision auto."
        )


def explain_choices(settings: TrainSettings, precision: str, batch_size: int) -> Iterator[str]:
    """Yield what a user should know of a training before it begins: a choice made for them, or what workers are worth."""
    if settings.precision == "auto":
        yield f"Precision {precision}, as this machine computes."
    yield from explain_precision(settings.precision, settings.address)
    workers, share = settings.num_workers, batch_size // settings.num_workers
    if workers > 1 and settings.scale_batch:
        yield f"Batches of {batch_size} faces at {workers} times the learning rate, {share} for each worker: not published."
    elif workers > 1:
        yield (
            f"{workers} workers share each batch of {batch_size} faces, {share} each: as published, and seldom faster than "
            "one worker; --scale-batch gives each a whole batch, which is not as published."
        )
