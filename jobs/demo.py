"""The demo: from nothing to a cross-domain table with intervals, on synthetic faces, with no data set and no hub."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product

from cafe.synthetic.domains import DOMAINS
from pipeline import cluster
from pipeline.compare import Comparison, compare
from pipeline.extract import extract
from pipeline.progress import Bar, Progress
from pipeline.settings import DemoSettings, ExtractSettings, TrainSettings
from pipeline.synthesise import synthesise
from pipeline.tracking import Tracker
from pipeline.train import plan_training, train_and_judge
from pipeline.workspace import Workspace

METHODS = ("cafe", "linear_probe", "image_only")
EXPERIMENT = "demo"

NEXT_STEPS = """Next steps
  cafe -w {workspace} ui                                      the runs in MLflow, in your browser
  cafe data index folder ~/faces/mine --name mine      your own faces: a folder per expression
  cafe extract mine --backbone imagenet-lite0 --views 5
  cafe train --source mine --method cafe --seed 0
  cafe extract mine --backbone clip-vit-b32 --views 61 the published tower (its weights come from the hub)"""


def run_demo(workspace: Workspace, settings: DemoSettings, bar: Bar, say: Callable[[str], None]) -> Comparison:
    """Synthesise, extract, train every method with every seed, judge on all domains and compare; say how long it took."""
    times: dict[str, float] = {}

    @contextmanager
    def step(title: str, unit: str) -> Iterator[Progress]:
        started = time.perf_counter()
        with bar(title, unit) as progress:
            yield progress
        kind = title.partition(" ")[0].lower()
        times[kind] = times.get(kind, 0) + time.perf_counter() - started

    domains = list(DOMAINS)
    with step("Drawing faces", "domains") as progress:
        manifests = synthesise(workspace, domains, settings.faces, 0, progress)
    say(f"Drew {sum(map(len, manifests)):,} faces in the domains {', '.join(domains)}.")

    with cluster.connect(settings):
        features = ExtractSettings(backbone=settings.backbone, input_size=settings.input_size)
        source = [manifest for manifest in manifests if manifest.name == settings.source]
        targets = [manifest for manifest in manifests if manifest.name != settings.source]
        with step("Extracting frozen features", "faces") as progress:
            extract(workspace, targets, features, progress)
            extract(workspace, source, ExtractSettings(**{**vars(features), "views": settings.views}), progress)
        for method, seed in product(METHODS, range(settings.seeds)):
            plan = plan_training(workspace, train_settings(settings, method, seed))
            metrics = train_and_judge(plan, step)
            say(f"{method}, seed {seed}: {100 * metrics['unseen/accuracy']:.1f} % on the unseen domains.")
    spent = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in times.items())
    say(f"Done in {sum(times.values()):.0f} s ({spent}).")
    return compare(Tracker(workspace, None, EXPERIMENT).runs())


def train_settings(settings: DemoSettings, method: str, seed: int) -> TrainSettings:
    """The demo's one recipe: the same short schedule, views and input for every method."""
    return TrainSettings(
        source=settings.source,
        method=method,
        seed=seed,
        backbone=settings.backbone,
        views=settings.views,
        epochs=settings.epochs,
        overrides=("learning_rate=0.001",),  # a tenth of the published steps need larger ones
        image_size=settings.image_size,
        targets=",".join(DOMAINS),
        experiment=EXPERIMENT,
        checkpoint_every=settings.epochs,
    )
