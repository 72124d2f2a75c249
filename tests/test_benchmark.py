"""The grid: what a benchmark file means, what it costs, what is left to do, and that one bad cell costs no other."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import miniatures
import pytest
import torch
from click.testing import CliRunner
from conftest import Cafe, draw_faces
from mlflow import MlflowClient
from trained import embed, on_one_thread
from upath import UPath

from cafe.data.indexing import index_files
from cafe.data.manifest import Manifest
from cafe.data.readers import DATASETS
from cafe.errors import UserError
from cafe.files import write_json
from cafe.jobs.cli import main
from cafe.jobs.runs import find_file
from cafe.learning.training import Training
from cafe.methods import METHODS
from cafe.pipeline.benchmark.cells import run_benchmark
from cafe.pipeline.benchmark.file import Benchmark, parse_benchmark, read_benchmark
from cafe.pipeline.benchmark.missing import estimate_cost, list_missing
from cafe.pipeline.benchmark.plan import BenchmarkPlan, plan_benchmark
from cafe.pipeline.evaluate import evaluate_target
from cafe.pipeline.features.extract import describe_store, look_up_tower
from cafe.pipeline.features.integrity import find_stores
from cafe.pipeline.features.store import FeatureStore
from cafe.pipeline.features.worker import ShardEmbedder
from cafe.pipeline.models import build_method, make_dataset
from cafe.pipeline.plan import TrainPlan
from cafe.pipeline.process.progress import no_bar
from cafe.pipeline.runs import is_finished
from cafe.pipeline.settings import BenchmarkSettings, ExtractSettings, TrainSettings
from cafe.pipeline.tracking.mirror import PARENT, Mirror
from cafe.pipeline.worker import Worker
from cafe.pipeline.workspace import Workspace
from cafe.seals import read_sealed, write_sealed
from cafe.towers.weights import write_tensors

BENCHMARKS = Path(__file__).parents[1] / "jobs" / "benchmarks"


def grid_of(**content: Any) -> Benchmark:
    return parse_benchmark("small", {"sources": ["one"], "methods": ["linear_probe"], **content})


def test_a_file_is_sources_by_methods_by_towers_and_methods_without_a_tower_come_once() -> None:
    grid = grid_of(
        sources=["one", "two"],
        methods=["scn", {"method": "cafe", "set": {"mask": "none"}}, {"method": "linear_probe", "tower": "timm:c"}],
        towers=["timm:a", "timm:b"],
        seeds=[3, 5],
        train={"epochs": 4, "set": {"gamma": 1.0}},
    )
    found = [(source, entry.label, tower) for source, entry, tower in grid.combinations()]
    assert found == [
        (source, label, tower)
        for source in ("one", "two")
        for label, tower in (
            ("scn", None),
            ("cafe (mask=none)", "timm:a"),
            ("cafe (mask=none)", "timm:b"),
            ("linear_probe", "timm:c"),
        )
    ]
    assert (grid.seeds, grid.evaluated_on, grid.views, grid.protocol) == ([3, 5], ["one", "two"], None, "clean")
    settings = grid.train_settings(*next(line for line in grid.combinations() if line[2]))
    assert (settings.overrides, settings.epochs, settings.backbone) == (("gamma=1.0", "mask=none"), 4, "timm:a")


def test_shared_epochs_are_for_methods_that_have_epochs() -> None:
    grid = grid_of(methods=["zero_shot", "cafe"], train={"epochs": 4}, features={"input_size": 64})
    settings = [grid.train_settings(*line) for line in grid.combinations()]
    assert [one.epochs for one in settings] == [None, 4]
    assert [one.image_size for one in settings] == [64, 64]


def test_what_a_file_asks_for_names_it_and_its_explanation_does_not() -> None:
    assert grid_of(seeds=5).digest == grid_of(about="five of them", seeds=[0, 1, 2, 3, 4]).digest
    assert grid_of(seeds=5).digest != grid_of(seeds=4).digest


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"sorces": ["one"]}, "Unknown key of small 'sorces': choose about, draws, features, methods, protocol, seeds, "),
        ({"name": "large"}, "The key name of small has no meaning, as a benchmark is called like its file: leave it out."),
        ({"sources": []}, "sources of small must be different ones, at least one, not []."),
        ({"sources": ["one", "one"]}, "sources of small must be different ones, at least one, not ['one', 'one']."),
        ({"methods": ["caffe"]}, "Unknown method 'caffe': choose cafe, "),
        ({"methods": [["cafe"]]}, 'Cannot read the method ['),
        ({"methods": [{"method": "cafe", "sets": {}}]}, "Unknown key of the method cafe in small 'sets': choose "),
        ({"methods": ["cafe", "cafe"]}, "The method cafe is listed 2 times in small: keep one"),
        ({"methods": []}, "The benchmark small has no methods: give a list of them."),
        ({"seeds": [-1]}, "seeds of small is at least 0, not -1."),
        ({"seeds": 0}, "seeds of small must be different ones, at least one, not 0."),
        ({"seeds": 1_000_000_000}, "seeds of small must be at most 10,000 seeds, not 1000000000."),
        ({"seeds": [1, 1]}, "seeds of small must be different ones, at least one, not [1, 1]."),
        ({"views": "all"}, "views of small must be a whole number, not 'all'."),
        ({"views": 0}, "views of small is at least 1, not 0."),
        ({"methods": [{"method": "cafe", "views": 0}]}, "views of the method cafe in small is at least 1, not 0."),
        ({"protocol": "papr"}, "Unknown protocol of small 'papr': choose clean, paper."),
        ({"features": {"policy": "scn"}}, "Unknown key of [features] in small 'policy': choose "),
        ({"features": {"precision": "fp8"}}, "Unknown precision of [features] in small 'fp8': choose bf16, fp16, fp32, tf"),
        ({"train": {"seed": 1}}, "Unknown key of [train] in small 'seed': choose checkpoint_every, checkpoint_minutes, "),
        ({"train": {"epochs": 0}}, "epochs of [train] in small is at least 1, not 0."),
        ({"train": {"image_size": 5000}}, "image_size of [train] in small is at most 4096, not 5000."),
        ({"train": {"epochs": True}}, "epochs of [train] in small must be a whole number, not True."),
        ({"train": {"set": {"mask": ["none"]}}}, "mask of set of small must be a number or a name, not ['none']."),
    ],
)  # fmt: skip
def test_a_mistake_in_a_file_is_one_sentence(content: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match="^" + re.escape(message)):
        grid_of(**content)


def test_a_file_that_cannot_be_read_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("sources = one")
    with pytest.raises(UserError, match=r"^bad\.toml is not TOML \(.*line 1.*\): fix it\.$"):
        read_benchmark(tmp_path / "bad.toml")
    with pytest.raises(UserError, match="No such file or directory"):
        read_benchmark(tmp_path / "none.toml")


def test_a_file_sets_what_neither_the_grid_nor_the_command_decides() -> None:
    free = {
        "train": {
            "network", "init", "sampler", "selection", "tag", "epochs", "image_size", "precision", "scale_batch",
            "num_workers", "use_gpu", "loader_workers", "checkpoint_every", "checkpoint_minutes",
        },
        "features": {
            "view_seed", "interpolation", "precision", "dtype", "normalisation", "input_size", "use_gpu", "num_gpus",
            "num_actors", "decoders", "batch_size", "shard_rows", "max_megapixels", "max_skipped",
        },
    }  # fmt: skip
    for table, settings in (("train", TrainSettings), ("features", ExtractSettings)):
        assert {one.name for one in fields(settings) if one.metadata["in_file"]} == free[table]
    with pytest.raises(UserError, match=r"Unknown key of \[train\] in grid 'scale_minutes'"):
        parse_benchmark("grid", {"sources": ["one"], "methods": ["scn"], "train": {"scale_minutes": 3}})


@pytest.mark.parametrize("path", sorted(BENCHMARKS.glob("*.toml")), ids=lambda path: path.stem)
def test_a_shipped_file_is_read_or_names_the_method_that_is_not_there(path: Path) -> None:
    if "ofer" not in METHODS and '"ofer"' in path.read_text():
        with pytest.raises(UserError, match="Unknown method 'ofer': choose cafe, "):
            read_benchmark(path)
    else:
        assert list(read_benchmark(path).combinations())


# --- against a workspace ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two domains of 36 and 24 faces, four fifths of them for training."""
    root = tmp_path_factory.mktemp("faces")
    for seed, (name, per_class) in enumerate((("one", 12), ("two", 8))):
        draw_faces(root / name, per_class, seed=seed, tint=30 * seed)
    return root


@pytest.fixture
def workspace(faces: Path, tmp_path: Path) -> Workspace:
    workspace = Workspace.at(str(tmp_path / "work"))
    for name in ("one", "two"):
        index_files(name, DATASETS["folder"](UPath(faces / name))).manifest.save(workspace.manifest_path(name))
    return workspace


@pytest.fixture
def small(tiny_tower: str, small_network: str) -> Benchmark:
    """Two methods that share one store and one that has no use for it."""
    methods = ["linear_probe", {"method": "cafe", "epochs": 3}, "scn"]
    train = {"epochs": 2, "image_size": 32, "network": small_network, "set": {"batch_size": 16}}
    return grid_of(methods=methods, targets=["one", "two"], seeds=2, towers=[tiny_tower], train=train)


def plan(workspace: Workspace, grid: Benchmark, **settings: Any) -> BenchmarkPlan:
    return plan_benchmark(workspace, grid, BenchmarkSettings(**settings))


def fill(workspace: Workspace, manifest: Manifest, settings: ExtractSettings) -> None:
    """Fill a store as the actors of stage one do, in this process."""
    about = describe_store(manifest, settings, look_up_tower(workspace, settings))
    store = FeatureStore.create(workspace.features / manifest.name, about, manifest)
    embedder = ShardEmbedder({str(store.path): about}, manifest, settings, 1, "cpu")
    for shard in store.pending():
        embed(embedder, manifest, shard)


def fill_all(workspace: Workspace, grid: Benchmark) -> None:
    for missing in plan(workspace, grid).missing_stores:
        fill(workspace, missing.manifest, missing.settings)


def train_here(run: TrainPlan) -> None:
    """Train and evaluate a run as the workers do, in this process."""
    run.spec.save(run.run)
    method = build_method(run.spec).to(memory_format=torch.channels_last)
    rows, _ = run.source.split_rows("final")
    dataset, device = make_dataset(run.spec, run.source), torch.device("cpu")
    training = Training(method, method, method.optimizer(), dataset, rows, run.spec.seed, device)
    for epoch in range(1, run.spec.recipe["epochs"] + 1):
        write_json(run.run / "epochs" / f"{epoch:04d}.json", training.run_epoch(epoch))
    write_tensors(run.run / "model.safetensors", method.state_dict())
    write_json(run.run / "result.json", {})
    for target in run.targets:
        evaluate_target(run.run, target)


def test_stores_are_shared_and_the_passes_they_save_are_counted(workspace: Workspace, small: Benchmark) -> None:
    planned = plan(workspace, small)
    assert [cell.name for cell in planned.cells] == [
        f"one/{method}/s{seed}" for seed in (0, 1) for method in ("linear_probe", "cafe (epochs=3)", "scn")
    ]
    assert [(store.manifest.name, store.settings.views, store.pending) for store in planned.stores] == [
        ("one", 4, 36),  # one view for each of the three epochs of the longest method, and the clean one
        ("two", 1, 24),
    ]
    train = {"one": len(workspace.load_manifest("one").rows("train"))}
    evaluated = 36 - train["one"] + 24  # the part of the source for test, and all of what is unseen
    assert planned.published_passes == 2 * (2 * train["one"] + evaluated) + 2 * (3 * train["one"] + evaluated)
    assert planned.store_passes == 4 * 36 + 24
    assert planned.work == 2 * train["one"] * (2 + 3 + 2)
    assert [cell.plan is None for cell in planned.cells[:3]] == [True, True, False]
    assert not any(cell.done or cell.obstacle for cell in planned.cells)


def test_views_policy_and_maps_of_a_store_come_from_the_methods(workspace: Workspace, tiny_tower: str) -> None:
    methods = ["nearest_class_mean", "zero_shot", "cafe_map"]
    for count, expected in ((2, (1, "paper", False)), (3, (61, "paper", True))):
        planned = plan(workspace, grid_of(methods=methods[:count], towers=[tiny_tower]))
        (store,) = planned.stores
        assert (store.settings.views, store.settings.policy, store.settings.maps) == expected
    (few,) = plan(workspace, grid_of(towers=[tiny_tower], views=3)).stores
    assert few.settings.views == 3


def test_a_store_with_more_views_serves_as_well(workspace: Workspace, small: Benchmark) -> None:
    fill_all(workspace, small)
    fewer = replace(small, methods=[replace(small.methods[1], views=2)])
    cell = plan(workspace, fewer).cells[0]
    assert cell.plan is not None
    assert cell.plan.spec.features is not None
    assert (cell.plan.spec.features.views, cell.plan.spec.views) == (4, 2)
    swapped = replace(small, sources=["two"], targets=["one"], views=1)
    assert not plan(workspace, swapped).missing_stores
    more = replace(small, methods=[replace(small.methods[1], views=5)])
    assert [(store.manifest.name, store.settings.views) for store in plan(workspace, more).missing_stores] == [
        ("one", 5)
    ]


def test_targets_of_the_protocol_paper_get_a_store_of_their_colours(workspace: Workspace, small: Benchmark) -> None:
    stills = replace(workspace.load_manifest("two"), kind="mma")
    stills.save(workspace.manifest_path("two"))
    planned = plan(workspace, replace(small, sources=["one", "two"], protocol="paper"))
    assert {(store.manifest.name, store.settings.views, store.settings.channels) for store in planned.stores} == {
        ("one", 4, "rgb"),
        ("two", 4, "rgb"),
        ("two", 1, "bgr"),
    }


def test_every_cell_gets_its_own_views_and_the_shared_store(workspace: Workspace, small: Benchmark) -> None:
    fill_all(workspace, small)
    source = plan(workspace, small).stores[0]
    # A store of other numbers, which `cafe train` could not tell from the grid's by tower, views and policy.
    fill(workspace, source.manifest, replace(source.settings, dtype="float32"))
    assert len(find_stores(workspace.features, "one")) == 2
    planned = plan(workspace, small)
    assert not planned.missing_stores
    specs = {cell.name: cell.plan.spec for cell in planned.cells if cell.plan}
    assert len({spec.name for spec in specs.values()}) == len(specs) == 6
    for name, spec in specs.items():
        if "scn" in name:  # as published: its own augmentation, a view per epoch, and no tower
            assert (spec.features, spec.backbone, spec.policy, spec.views) == (None, None, "scn", 3)
        else:
            assert spec.features is not None
            assert (spec.features.dtype, spec.features.views, spec.policy) == ("float16", 4, "paper")
            assert spec.views == (4 if "cafe" in name else 3)
    assert {spec.seed for spec in specs.values()} == {0, 1}


def test_finished_cells_are_left_alone_and_begun_ones_counted(workspace: Workspace, small: Benchmark) -> None:
    fill_all(workspace, small)
    first, second = plan(workspace, small).cells[:2]
    assert first.plan is not None
    assert second.plan is not None
    train_here(first.plan)
    assert plan(workspace, small).seconds_left(parallel=1) is None  # features alone say nothing of pictures
    write_json(second.plan.run / "epochs" / "0001.json", {"faces_per_second": 10.0})

    planned = plan(workspace, small)
    assert [cell.done for cell in planned.cells] == [True, *[False] * 5]
    assert (planned.cells[1].worked, planned.cells[1].work) == (first.faces, 3 * first.faces)
    assert planned.worked == 3 * first.faces
    looking = sum(cell.work - cell.worked for cell in planned.cells if cell.entry.method != "linear_probe")
    seconds = planned.seconds_left(parallel=1)
    assert seconds is not None
    assert seconds == pytest.approx(looking / 10, rel=0.1)  # SCN goes by CAFE; the linear probe takes next to nothing
    assert plan(workspace, small).seconds_left(parallel=2) == pytest.approx(seconds / 2)

    third = plan(workspace, small).cells[3].plan
    assert third is not None
    train_here(third)
    finished = (first.plan, third)
    weights = {path: path.read_bytes() for run in finished for path in run.run.rglob("model.safetensors")}
    said: list[str] = []
    for _ in range(2):  # without Ray: there is nothing to do but to show them in MLflow
        planned = plan(workspace, small, only="*/linear_probe/*")
        assert run_benchmark(planned, Mirror(workspace), no_bar, said.append) == {}
    assert {path: path.read_bytes() for path in weights} == weights
    assert said == []
    records = [(cell.name, cell.plan.spec.name if cell.plan else "", None) for cell in planned.cells]
    cells = json.loads((planned.folder / "cells.json").read_text())
    assert [(record["cell"], record["run"], record["failure"]) for record in cells] == records
    assert json.loads((planned.folder / "benchmark.json").read_text()) == asdict(small)

    runs = {run.info.run_name: run for run in tracked(workspace, "small")}
    parent, children = runs[small.title], [runs[run.spec.name] for run in finished]
    assert [run.data.tags[PARENT] for run in children] == [parent.info.run_id] * 2
    assert (parent.data.metrics["cells"], parent.data.metrics["cells_failed"]) == (2, 0)

    written = {path.name: path.stat().st_mtime_ns for path in planned.folder.iterdir()}
    mine, others = (min((run.run / "predictions").iterdir()) for run in finished)
    another = replace(workspace.load_manifest("two"), name="another")
    for same, change in (
        (True, lambda: None),
        (False, lambda: another.save(workspace.manifest_path("another"))),
        (False, lambda: mine.write_bytes(others.read_bytes())),
    ):
        change()
        run_benchmark(plan(workspace, small, only="*/linear_probe/*"), Mirror(workspace), no_bar, said.append)
        now = {path.name: path.stat().st_mtime_ns for path in planned.folder.iterdir()}
        changed = {name for name, when in written.items() if now[name] != when}
        assert same or "comparison.sha256" in changed
        assert changed <= (set() if same else {"comparison.md", "report.html", "comparison.sha256"})

    other = first.plan.run / "predictions" / "paper" / mine.name  # evaluated by another protocol besides
    other.parent.mkdir()
    other.write_bytes(mine.read_bytes())
    assert run_benchmark(plan(workspace, small, only="*/linear_probe/*"), Mirror(workspace), no_bar, said.append) == {}

    record = read_sealed(first.plan.run / "run.json", "read") or {}
    write_sealed(first.plan.run / "run.json", {**record, "spec": {**record["spec"], "network": "resnet50"}})
    planned = plan(workspace, small, only="*/linear_probe/*")
    ((cell, reason),) = run_benchmark(planned, Mirror(workspace), no_bar, said.append).items()
    assert (cell.name, "was begun with another network" in reason) == (planned.cells[0].name, True)


def tracked(workspace: Workspace, experiment: str) -> list[Any]:
    client = MlflowClient(f"sqlite:///{workspace.root}/mlflow.db")
    return list(client.search_runs([client.get_experiment_by_name(experiment).experiment_id]))


def test_a_worker_that_trained_other_runs_gives_the_same_weights(workspace: Workspace, small: Benchmark) -> None:
    fill_all(workspace, small)
    plans = [cell.plan for cell in plan(workspace, small).cells[:3] if cell.plan]
    alone = {}
    for run in plans:
        train_here(run)
        alone[run.run] = (run.run / "model.safetensors").read_bytes()
        (run.run / "model.safetensors").unlink()
    worker = Worker()
    for run in reversed(plans):
        worker.train(on_one_thread(run))
    assert {run.run: (run.run / "model.safetensors").read_bytes() for run in plans} == alone
    assert not list((plans[0].run / "checkpoints").iterdir())


def test_what_keeps_a_cell_from_running_is_said_in_the_plan(
    workspace: Workspace, small: Benchmark, tmp_path: Path
) -> None:
    methods = [replace(small.methods[0], train={"init": f"file:{tmp_path / 'none.pth'}"}), *small.methods[1:]]
    planned = plan(workspace, replace(small, methods=methods))
    obstacles = {cell.obstacle for cell in planned.cells if cell.obstacle}
    assert len(obstacles) == 1
    assert "There is no file of initial weights" in obstacles.pop()
    assert {cell.source.name for cell in planned.cells if not cell.obstacle} == {"one"}
    with pytest.raises(UserError, match=r"No cell matches --only 'two/\*': they are called like 'one/linear_probe"):
        plan(workspace, small, only="two/*")
    with pytest.raises(UserError, match="Unknown manifest 'three'"):
        plan(workspace, replace(small, targets=["three"]))
    with pytest.raises(UserError, match="Unknown setting of the methods in small 'mask'"):
        plan(workspace, grid_of(train={"set": {"mask": "none"}}))


SETS: dict[str, Callable[[Path], None]] = {
    "rafdb": miniatures.write_rafdb_official,
    "ferplus": miniatures.write_ferplus_png,
    "affectnet": miniatures.write_affectnet_lists,
    "sfew": miniatures.write_sfew_official,
    "mma": miniatures.write_mma,
}


def index_miniatures(workspace: Workspace, root: Path) -> None:
    for name, write in SETS.items():
        write(root / name)
        index_files(name, DATASETS[name](UPath(root / name))).manifest.save(workspace.manifest_path(name))


def test_the_dry_run_of_table_1_shows_200_cells_and_the_tower_passes_saved(tmp_path: Path) -> None:
    cafe = Cafe(tmp_path / "work", "")
    workspace = Workspace.at(str(cafe.workspace))
    index_miniatures(workspace, tmp_path)
    text = (
        (BENCHMARKS / "table1.toml").read_text().replace('protocol = "paper"', 'protocol = "clean"')
    )  # sources serve as targets
    rivals = text if "ofer" in METHODS else re.sub(r"\{ method = \"ofer\".*\}", '"image_only"', text)
    (tmp_path / "table1.toml").write_text(rivals)
    output = " ".join(cafe.succeed("benchmark", str(tmp_path / "table1.toml"), "--dry-run").split())
    assert "200 cells (5 sources × 8 methods × 5 seeds): 0 done, 0 begun, 200 to begin." in output
    assert not (cafe.workspace / "features").exists()
    assert not (cafe.workspace / "mlflow.db").exists()

    grid = read_benchmark(tmp_path / "table1.toml")
    published = stores = 0
    manifests = {name: workspace.load_manifest(name) for name in SETS}
    evaluated = {"rafdb": "test", "ferplus": "test", "affectnet": "val", "sfew": "val", "mma": "test"}
    targets = sum(len(manifests[name].rows(split)) for name, split in evaluated.items())
    readers = [entry for entry in grid.methods if entry.kind.needs_features()]
    for entry in readers:
        for manifest in manifests.values():
            epochs = entry.kind.published_recipe(manifest.kind).epochs
            published += 5 * (max(1, epochs) * len(manifest.rows("train")) + targets)
            if entry.method in ("cafe", "ofer"):  # the others read the store of CAFE's tower
                stores += (1 if entry.kind.clean_features else epochs + 1) * len(manifest)
    towers = len({entry.tower for entry in readers})
    assert f"{stores:,} passes fill {5 * towers} feature stores" in output
    assert (
        f"would take {published:,} (epochs × training faces + evaluated faces, each cell for itself): the cache"
        in output
    )
    assert f"the cache saves {published - stores:,} passes ({(published - stores) / published:.1%})." in output


def test_a_name_that_is_no_file_is_one_of_the_package(tmp_path: Path) -> None:
    cafe = Cafe(tmp_path / "work", "")
    missing = cafe.fail("benchmark", "quickstart.toml")
    assert "Unknown manifest 'studio'" in missing
    assert "make it with `cafe data synth`" in missing
    published = cafe.fail("benchmark", "table1.toml")
    assert "make it with `cafe data index rafdb ROOT --name rafdb`" in published
    assert cafe.fail("benchmark", "table9.toml") == (
        "Error: There is no benchmark file 'table9.toml': give the path of one, or one of ablation.toml, "
        "demo.toml, ferplus.toml, generalisation.toml, generalisation_drawn.toml, heads.toml, leave_one_out.toml, "
        "leave_one_out_drawn.toml, mask.toml, pixels.toml, quickstart.toml, rivals.toml, shipped.toml, spatial.toml, "
        "supplement.toml, supplement2.toml, table1.toml, table2.toml."
    )


def test_a_failing_cell_is_reported_and_costs_no_other(
    cafe: Cafe, faces: Path, tiny_tower: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of two cells diverges; given again, the command leaves the good one alone and tries the other anew."""
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.1")
    for name in ("one", "two"):
        cafe.succeed("data", "index", "folder", str(faces / name), "--name", name)
    (tmp_path / "pair.toml").write_text(
        f"""
        sources = ["one"]
        targets = ["one", "two"]
        seeds = 1
        towers = ["{tiny_tower}"]
        methods = ["linear_probe", {{ method = "cafe", set = {{ learning_rate = 2e9 }} }}]
        [train]
        epochs = 2
        image_size = 32
        set = {{ batch_size = 16 }}
        """
    )
    workspace = Workspace.at(str(cafe.workspace))
    source, _ = plan(workspace, read_benchmark(tmp_path / "pair.toml")).missing_stores
    fill(workspace, source.manifest, source.settings)  # the target's is for the command to fill
    command = ("benchmark", str(tmp_path / "pair.toml"), "--parallel", "2", "--system-metrics")
    cafe.join()  # and no --address: on a cluster a failed training is tried again, three times
    result = cafe(*command)
    assert result.exit_code == 1, f"{result.output}\n{result.exception!r}"
    output = " ".join(result.output.split())
    assert "one/linear_probe/s0: done" in output
    assert "The loss is" in output
    assert "Error: 1 of 2 cells failed, all others are done" in output
    runs = {path.name.partition("-")[0]: UPath(path) for path in (cafe.workspace / "runs").iterdir()}
    assert (is_finished(runs["linear_probe"]), is_finished(runs["cafe"])) == (True, False)

    found = {run.info.run_name: run for run in tracked(workspace, "pair")}
    parent = next(run for run in found.values() if "cafe.benchmark" in run.data.tags)
    children = {name: run for name, run in found.items() if run is not parent}
    assert {run.data.tags[PARENT] for run in children.values()} == {parent.info.run_id}
    assert {name.partition("-")[0]: run.info.status for name, run in children.items()} == {
        "linear_probe": "FINISHED",
        "cafe": "FAILED",
    }
    assert (parent.data.metrics["cells"], parent.data.metrics["cells_failed"]) == (2, 1)
    assert any("system/cpu_utilization_percentage" in run.data.metrics for run in children.values())
    good = {path: path.read_bytes() for path in runs["linear_probe"].rglob("*") if path.is_file()}
    again = cafe(*command)
    assert again.exit_code == 1
    assert "1 done" in " ".join(again.output.split())
    assert {path: path.read_bytes() for path in runs["linear_probe"].rglob("*") if path.is_file()} == good


def test_without_any_data_a_benchmark_says_what_is_missing_how_to_make_it_and_what_it_costs(tmp_path: Path) -> None:
    workspace = Workspace.at(str(tmp_path / "work"))
    grid = read_benchmark(find_file("supplement.toml"))
    assert grid.protocol == "paper"
    found = dict(list_missing(workspace, grid))
    for name in ("rafdb", "ferplus", "affectnet", "sfew", "mma"):
        assert found[f"manifest {name}"] == f"cafe data index {name} ROOT --name {name}"
    assert "weights of the image branch, file:resnet18_msceleb.pth" in found
    cost = estimate_cost(workspace, grid)
    assert (cost.trainings, cost.uncounted) == (5 * 5, ())
    assert cost.faces == 5 * 12_271 * (70 + 60 + 60 + 60 + 60)  # seeds × RAF-DB's training faces × epochs
    sweep = estimate_cost(workspace, replace(grid, draws=3))
    assert (sweep.trainings, sweep.faces, sweep.passes) == (3 * 25, 3 * cost.faces, cost.passes)
    union = replace(grid, sources=["ferplus,rafdb,sfew"])
    left, final = (estimate_cost(workspace, replace(union, train={"selection": s})) for s in ("leave_one_out", "final"))
    assert (left.trainings, left.faces) == (4 * final.trainings, 3 * final.faces)  # each source is left out once
    drawn = replace(grid, sources=["studio"], targets=["studio", "mine"])
    assert dict(list_missing(workspace, drawn))["manifest studio"] == "cafe data synth --domain studio"
    assert dict(list_missing(workspace, drawn))["manifest mine"] == "cafe data index folder ROOT --name mine"
    assert estimate_cost(workspace, drawn).uncounted == ("studio", "mine")
    said = CliRunner().invoke(main, ["-w", str(tmp_path / "work"), "benchmark", "supplement.toml", "--dry-run"]).output
    assert "cafe data index rafdb ROOT --name rafdb" in said
    assert "25 trainings of 19,020,050 faces × epochs" in " ".join(said.split())
