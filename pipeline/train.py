"""Stage two: one method on one source, with Ray Train; judged afterwards on every target.

The specification of a run names it, so the same command goes on where an interrupted one stopped and does nothing when it
is finished.
"""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace

from upath import UPath

from cafe.data.manifest import Manifest
from cafe.errors import UserError
from cafe.learning.loading import ARRAYS, SMALLEST_BATCH
from cafe.learning.views import ViewPlan
from cafe.methods import find_method
from cafe.methods.method import Recipe, apply_overrides
from cafe.towers.building import NORMALISATIONS
from pipeline import cluster
from pipeline.evaluate import is_judged, log_results, predict_targets
from pipeline.progress import Bar, Progress, no_bar
from pipeline.runs import (
    RunSpec,
    Target,
    check_network,
    choose_rows,
    choose_store,
    choose_targets,
    is_finished,
    know_unreadable,
)
from pipeline.settings import TrainSettings
from pipeline.store import About, describe_policy
from pipeline.tracking import Tracker
from pipeline.worker import train_worker
from pipeline.workspace import Workspace, check_name, list_folder, locate, read_json

UNSTORED_SIZE = 224  # pixels, where neither a store nor the user says otherwise: the published input


@dataclass(frozen=True)
class TrainPlan:
    """A checked training: nothing in it can be wrong any more when Ray starts."""

    workspace: Workspace
    settings: TrainSettings
    spec: RunSpec
    source: Target
    targets: list[Target]

    @property
    def run(self) -> UPath:
        """The folder of the run."""
        return self.workspace.run_path(self.spec.name)


def plan_training(workspace: Workspace, settings: TrainSettings) -> TrainPlan:
    """Check every name, file and store and return what will be trained; raise `UserError`."""
    method = find_method(settings.method)
    manifest = workspace.load_manifest(settings.source)
    recipe = find_recipe(settings, manifest.kind)
    check_network(settings.network, settings.init)
    if settings.tag:
        check_name(settings.tag)
    if settings.num_workers > min(SMALLEST_BATCH, recipe.batch_size):
        raise UserError(f"{settings.num_workers} workers are too many for batches of {recipe.batch_size}: use fewer.")

    towerless = settings.backbone == "none"
    choice = replace(settings, policy=None) if settings.live else settings
    chosen = None if towerless else choose_store(workspace, manifest, choice, method)
    _check_features(settings, chosen[1] if chosen else None)
    spec = _specify(settings, manifest, recipe, chosen[1] if chosen else None)
    method.check(spec.inputs)
    source = Target(manifest, *chosen) if chosen else Target(manifest, None)
    if towerless:
        source = know_unreadable(workspace, source)
    train, held_out = choose_rows(source, settings.selection)
    if len(train) < SMALLEST_BATCH:
        raise UserError(f"{settings.source!r} has {len(train)} training faces: at least {SMALLEST_BATCH} are needed.")
    if settings.selection != "final" and not len(held_out):
        raise UserError(f"{settings.source!r} has no faces for --selection {settings.selection}: use final.")
    targets = choose_targets(workspace, settings.targets, spec, settings.protocol)
    return TrainPlan(workspace, settings, spec, source, targets)


def _specify(settings: TrainSettings, manifest: Manifest, recipe: Recipe, store: About | None) -> RunSpec:
    """Return what names the run: the settings, with what they leave open taken from the store and the method."""
    method = find_method(settings.method)
    policy = settings.policy or method.policy
    key = store.key if store else None
    if key and settings.live:
        key = replace(key, views=recipe.epochs + 1, policy=describe_policy(policy))
    mean, std = NORMALISATIONS["imagenet"]
    views = key.view_plan if key else ViewPlan(policy, 0, recipe.epochs + 1, "bilinear", mean, std)
    shape = store.map_shape if store and "map" in method.needs else None
    return RunSpec(
        source=settings.source,
        source_digest=manifest.digest,
        method=settings.method,
        recipe=asdict(recipe),
        seed=settings.seed,
        network=settings.network,
        init=f"file:{locate(settings.init[5:])}" if settings.init.startswith("file:") else settings.init,
        image_size=settings.image_size or (key.input_size if key else UNSTORED_SIZE),
        precision=settings.precision,
        views=replace(views, views=settings.views) if settings.views and not settings.live else views,
        features=key,
        backbone=store.backbone_name if store else None,
        width=shape[0] if shape else store.width if store else None,
        grid=shape[1:] if shape else None,
        live=settings.live,
        selection=settings.selection,
        tag=settings.tag,
        source_kind=manifest.kind,
    )


def find_recipe(settings: TrainSettings, kind: str) -> Recipe:
    """Return the published recipe of the method for a kind of source with the changes asked for; raise `UserError`."""
    shortcuts = [f"epochs={settings.epochs}"] if settings.epochs else []
    published = find_method(settings.method).published_recipe(kind)
    return apply_overrides(published, [*settings.overrides, *shortcuts], settings.method)


def _check_features(settings: TrainSettings, store: About | None) -> None:
    needs = find_method(settings.method).needs
    if settings.backbone == "none" and not needs.isdisjoint({*ARRAYS, "tower"}):
        raise UserError(f"{settings.method} needs a frozen tower: leave out --backbone none.")
    if settings.live and (needs.isdisjoint(ARRAYS) or not find_method(settings.method).trained):
        raise UserError(f"{settings.method} is not trained on a frozen tower's features: leave out --live.")
    if store is None and not needs.isdisjoint({*ARRAYS, "tower"}):
        raise UserError(
            f"{settings.method} needs frozen features of {settings.source!r}: run `cafe extract {settings.source}` first."
        )
    if store and store.map_shape is None and "map" in needs:
        raise UserError(
            f"{settings.method} needs feature maps of {settings.source!r}: run `cafe extract {settings.source} --maps`."
        )


def train_and_judge(plan: TrainPlan, bar: Bar = no_bar, tracker: Tracker | None = None) -> dict[str, float]:
    """Train, then judge on every target not judged yet; return all metrics. A finished plan costs no Ray."""
    settings = plan.settings
    tracker = tracker or Tracker(plan.workspace, settings.mlflow_uri, settings.experiment)
    trained = is_finished(plan.run)
    remaining = [target for target in plan.targets if not (trained and is_judged(plan.run, target))]
    with nullcontext() if trained and not remaining else cluster.connect(settings):
        if not trained:
            with bar(f"Training {plan.spec.name}", "steps") as progress:
                train(plan, tracker, progress)
        if remaining:
            with bar("Judging", "targets") as progress:
                predict_targets(plan.run, plan.workspace, remaining, settings.use_gpu, progress)
    return log_results(plan.run, tracker)


def train(plan: TrainPlan, tracker: Tracker, progress: Progress) -> None:
    """Train to the end; `progress(done, total)` counts steps.

    Everything is logged to MLflow as it happens. Interrupt it at any time: the same plan goes on from its last checkpoint.
    """
    plan.spec.save(plan.run)
    run_id = tracker.start(plan.spec.name, plan.spec.parameters(), plan.spec.tags())
    with cluster.connect(plan.settings), ThreadPoolExecutor(1) as background:
        outcome = background.submit(_fit, plan)
        try:
            _follow(plan, outcome, tracker, run_id, progress)
        except BaseException:
            tracker.finish(run_id, "FAILED")
            raise
    tracker.finish(run_id)


def _follow(plan: TrainPlan, outcome: Future[None], tracker: Tracker, run_id: str, progress: Progress) -> None:
    """Report the run's own records to MLflow and the progress bar until the training ends."""
    logged = tracker.logged_steps(run_id, "learning_rate")
    epochs = plan.spec.recipe["epochs"]
    while True:
        finished = outcome.done()
        for path in list_folder(plan.run / "epochs"):
            epoch, record = int(path.stem), read_json(path)
            if epoch not in logged and record is not None:
                tracker.log(run_id, record, step=epoch)
                logged.add(epoch)
        note = read_json(plan.run / "progress.json")
        if note:
            progress(note["done"], note["per_epoch"] * epochs)
        if finished:
            break
        time.sleep(0.2)
    error = outcome.exception()
    if error:
        raise cluster.user_error(error) or error


def _fit(plan: TrainPlan) -> None:
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    settings = plan.settings
    gpu = cluster.count("GPU") >= settings.num_workers if settings.use_gpu is None else settings.use_gpu
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={
            "run": str(plan.run),
            "manifest": str(plan.workspace.manifest_path(plan.spec.source)),
            "store": (str(plan.source.store), plan.source.about) if plan.source.store else None,
            "threads": settings.threads,
            "loader_workers": settings.loader_workers,
            "checkpoint_every": settings.checkpoint_every,
        },
        scaling_config=ScalingConfig(num_workers=settings.num_workers, use_gpu=gpu),
        run_config=RunConfig(
            name="train",
            storage_path=str(plan.run),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            failure_config=FailureConfig(max_failures=3 if settings.address else 0),  # a cluster's nodes come and go
        ),
    )
    trainer.fit()
