"""MLflow shows what the run folders say: completely, once, and again after anything was lost."""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy
from conftest import Cafe, complaint, draw_faces
from mlflow import MlflowClient
from runs import write_predictions, write_run
from test_malformed import SPEC
from upath import UPath

from cafe.addresses import Permission, permission
from cafe.data.indexing import index_files
from cafe.data.readers import DATASETS
from cafe.files import list_files, list_folder, write_json
from cafe.pipeline.benchmark.cells import write_comparison
from cafe.pipeline.runs import add_experiment
from cafe.pipeline.tracking.database import draft_database
from cafe.pipeline.tracking.mirror import PARENT, Mirror, default_uri, empty_database, list_experiments
from cafe.pipeline.tracking.places import check_place
from cafe.pipeline.workspace import Workspace
from cafe.results.predictions import load_predictions
from cafe.results.runs import read_runs
from cafe.results.scores import read_scores
from cafe.seals import read_sealed, write_sealed


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "mlflow.db").write_bytes(empty_database())
    return Workspace.at(str(tmp_path / "work"))


def evaluated(workspace: Workspace, **settings: Any) -> UPath:
    """A run of two epochs, evaluated on two targets, with a figure."""
    run = write_run(workspace, **settings)
    for epoch in (1, 2):
        write_json(run / "epochs" / f"{epoch:04d}.json", {"train/total": 1 / epoch, "learning_rate": 0.1})
    labels = np.arange(70) % 7
    write_predictions(run, "raf", labels, labels)
    write_predictions(run, "fer", labels, np.where(np.arange(70) < 14, 0, labels))
    (run / "figures" / "confusion").mkdir(parents=True)
    (run / "figures" / "confusion" / "fer.png").write_bytes(b"picture")
    return run


def tracked(workspace: Workspace, experiment: str = "cafe") -> list[Any]:
    client = MlflowClient(default_uri(workspace))
    return list(client.search_runs([client.get_experiment_by_name(experiment).experiment_id]))


def picture(workspace: Workspace, experiment: str = "cafe") -> dict[str, Any]:
    """Everything MLflow shows of the only run, but times and ids."""
    client = MlflowClient(default_uri(workspace))
    (run,) = tracked(workspace, experiment)
    run_id = run.info.run_id
    history = {
        name: sorted((point.step, point.value) for point in client.get_metric_history(run_id, name))
        for name in run.data.metrics
    }
    files = {
        entry.path: [inner.path for inner in client.list_artifacts(run_id, entry.path)]
        for entry in client.list_artifacts(run_id)
    }
    inputs = {(found.dataset.name, found.tags[0].value) for found in run.inputs.dataset_inputs}
    tags = {name: value for name, value in run.data.tags.items() if name.startswith("cafe.")}
    return {"name": run.info.run_name, "status": run.info.status, "params": run.data.params, "history": history,
            "files": files, "inputs": inputs, "tags": tags}  # fmt: skip


def test_the_server_shows_all_the_folder_says(workspace: Workspace) -> None:
    run = evaluated(workspace)
    Mirror(workspace).update(run)
    shown = picture(workspace)
    assert (shown["name"], shown["status"]) == (run.name, "FINISHED")
    assert shown["params"].items() >= {"method": "cafe", "init": "file:msceleb.pth", "width": "512"}.items()
    assert shown["history"]["train/total"] == [(1, 1.0), (2, 0.5)]
    assert shown["history"]["target/fer/accuracy"] == [(0, pytest.approx(58 / 70))]
    assert shown["history"]["unseen/accuracy"] == [(0, pytest.approx(58 / 70))]
    assert shown["history"]["all/accuracy"] == [(0, pytest.approx(64 / 70))]
    assert shown["files"]["confusion"] == ["confusion/fer.png"]
    assert shown["files"]["predictions"] == ["predictions/fer.parquet", "predictions/raf.parquet"]
    assert shown["inputs"] == {("raf", "training"), ("fer", "test")}
    assert tracked(workspace)[0].data.tags["mlflow.note.content"] == (
        "`cafe` trained on raf with seed 0; evaluated epoch: final.\n\n"
        "Accuracy by the protocol clean: fer 82.9 % (unseen), raf 100.0 % (source)."
    )


def test_scores_on_faces_that_the_workspace_has_no_more_are_taken_back_and_named(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = evaluated(workspace)
    Mirror(workspace).update(run)
    monkeypatch.setattr(Workspace, "manifest_digests", lambda self: {"raf": "digest of raf", "fer": "another"})
    for _ in range(2):
        Mirror(workspace).update(run)
    shown = tracked(workspace)[0].data
    assert f"Left out: {run.name} on fer (clean), evaluated on the man" in shown.tags["mlflow.note.content"]
    assert shown.metrics["target/raf/accuracy"] == 1
    assert all(math.isnan(shown.metrics[f"{name}/accuracy"]) for name in ("target/fer", "unseen"))
    assert len(picture(workspace)["history"]["target/fer/accuracy"]) == 2  # the second update found nothing to do


def test_what_is_shown_is_not_logged_again_and_what_a_kill_left_out_is_filled_in(workspace: Workspace) -> None:
    run = evaluated(workspace)
    whole = {path: path.read_bytes() for path in [*run.glob("epochs/*"), *run.glob("predictions/*")]}
    for path in whole:
        path.unlink()
    write_json(run / "status.json", {"status": "RUNNING", "reason": ""})
    (run / "epochs" / "0001.json").write_bytes(whole[run / "epochs" / "0001.json"])
    Mirror(workspace).update(run)
    assert picture(workspace)["status"] == "RUNNING"
    assert picture(workspace)["history"].keys() == {"train/total", "learning_rate"}
    for path, content in whole.items():
        path.write_bytes(content)
    write_json(run / "status.json", {"status": "FINISHED", "reason": ""})
    for _ in range(2):
        Mirror(workspace).update(run)
        shown = picture(workspace)
        assert shown["history"]["train/total"] == [(1, 1.0), (2, 0.5)]
        assert "unseen/accuracy" in shown["history"]
        assert shown["status"] == "FINISHED"


def test_a_lost_database_is_rebuilt_from_the_workspace(workspace: Workspace) -> None:
    run = evaluated(workspace)
    Mirror(workspace).update(run)
    before = picture(workspace)
    (workspace.root / "mlflow.db").unlink()
    Mirror(workspace).update(run)
    assert picture(workspace) == before


def test_a_database_is_made_without_waiting_for_the_disk_and_then_written_with_care(tmp_path: Path) -> None:
    def look(path: Path) -> tuple[int, list[Path]]:
        with sqlalchemy.create_engine(f"sqlite:///{path}").connect() as connection:
            connection.execute(sqlalchemy.text("CREATE TABLE IF NOT EXISTS made (by TEXT)"))
            connection.commit()
            return connection.execute(sqlalchemy.text("PRAGMA synchronous")).scalar_one(), list(tmp_path.iterdir())

    path = tmp_path / "mlflow.db"
    with draft_database(path) as draft:
        synchronous, there = look(draft)
        assert (synchronous, path in there) == (0, False)
    assert look(path) == (2, [path])
    assert sqlite3.connect(path).execute("SELECT name FROM sqlite_master").fetchall() == [("made",)]


def test_a_database_that_another_command_made_meanwhile_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    with draft_database(path):
        path.write_bytes(b"theirs")
    assert path.read_bytes() == b"theirs"
    assert list(tmp_path.iterdir()) == [path]


def test_a_workspace_that_was_moved_keeps_its_files_where_it_is(workspace: Workspace, tmp_path: Path) -> None:
    name = evaluated(workspace).name
    Mirror(workspace).update_all()
    moved = Workspace.at(str(tmp_path / "moved"))
    Path(f"{workspace.root}").rename(f"{moved.root}")
    write_predictions(UPath(f"{moved.root}/runs/{name}"), "sfew", np.arange(7), np.arange(7))
    # MLflow remembers within a process where a run keeps its files.
    imports = "from cafe.pipeline.tracking.mirror import Mirror, Workspace"
    code = f"{imports}; Mirror(Workspace.at({str(moved.root)!r})).update_all()"
    subprocess.run([sys.executable, "-c", code], check=True)
    (run,) = tracked(moved)
    assert run.info.artifact_uri.startswith(f"file://{tmp_path}/moved/artifacts/")
    predictions = Path(run.info.artifact_uri.removeprefix("file://"), "predictions")
    assert {path.name for path in predictions.iterdir()} == {"fer.parquet", "raf.parquet", "sfew.parquet"}
    assert not Path(f"{workspace.root}").exists()


def test_what_the_database_shows_already_needs_no_mlflow(workspace: Workspace) -> None:
    run = evaluated(workspace)
    Mirror(workspace).update(run)
    code = (
        "import sys; from upath import UPath; from cafe.pipeline.tracking.mirror import Mirror, Workspace;"
        f"Mirror(Workspace.at({str(workspace.root)!r})).update(UPath({str(run)!r})); print('mlflow' in sys.modules)"
    )

    def asked() -> str:
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()

    assert asked() == "False"
    write_json(run / "status.json", {"status": "FAILED", "reason": "The disk is full."})
    assert asked() == "True"
    assert picture(workspace)["status"] == "FAILED"


def test_the_status_and_its_reason_are_those_of_the_folder(workspace: Workspace) -> None:
    run, mirror = evaluated(workspace), Mirror(workspace)
    write_json(run / "status.json", {"status": "FAILED", "reason": "The disk is full."})
    mirror.update(run)
    assert (picture(workspace)["status"], picture(workspace)["tags"]["cafe.reason"]) == ("FAILED", "The disk is full.")
    mirror.update(run, status="RUNNING")
    assert (picture(workspace)["status"], picture(workspace)["tags"]["cafe.reason"]) == ("RUNNING", "")


def test_a_run_lasted_and_was_made_as_its_record_says_however_late_it_is_mirrored(workspace: Workspace) -> None:
    folder = workspace.root / "benchmarks" / "grid-0123abcd"
    run = evaluated(workspace, experiments={"grid": folder.name})
    write_json(folder / "benchmark.json", {"name": "grid", "about": "What is it?"})
    (folder / "cells.json").write_text(json.dumps([{"cell": "raf/cafe/s0", "run": run.name, "failure": None}]))
    for place, command, times in ((run, "cafe train …", (1000, 1090)), (folder, "cafe benchmark …", (900, 2000.5))):
        write_json(place / "made.json", {"command": command, "started": times[0], "ended": times[1]})
    for _ in range(2):
        Mirror(workspace).update_all()
        shown = {one.info.run_name: one for one in tracked(workspace, "grid")}
        assert {name: (one.info.start_time, one.info.end_time) for name, one in shown.items()} == {
            run.name: (1_000_000, 1_090_000), folder.name: (900_000, 2_000_500),
        }  # fmt: skip
        sources = {name: one.data.tags["mlflow.source.name"] for name, one in shown.items()}
        assert sources == {run.name: "cafe train …", folder.name: "cafe benchmark …"}
    write_json(run / "made.json", {"command": "cafe train …", "started": 1000, "ended": 1100})
    Mirror(workspace).update(run)
    ends = {one.info.run_name: one.info.end_time for one in tracked(workspace, "grid")}
    assert ends[run.name] == 1_100_000

    client = MlflowClient(default_uri(workspace))
    tags = client.get_experiment_by_name("grid").tags
    assert tags["mlflow.note.content"].startswith("**What is it?.** Each run is one method")
    view = json.loads(tags["mlflow.sharedViewState.cafe"])
    assert view["groupBy"]["groupByKeys"] == [{"mode": "tag", "groupByData": "cafe.row"}]
    assert view["columnOrder"] == view["selectedColumns"]
    named = [column.partition("`")[2].rstrip("`") for column in view["columnOrder"]]
    ends = ["unseen/accuracy.low", "unseen/accuracy.high", "unseen/largest"]
    assert named == ["method", "source", "seed", "unseen/accuracy", *ends, "target/fer/accuracy", "target/raf/accuracy"]
    assert view["columnWidths"]["metrics.`target/fer/accuracy`"] > view["columnWidths"]["params.`seed`"] == 100
    assert {one.data.tags["cafe.row"] for one in shown.values()} == {"benchmark", "cafe"}


def test_a_run_of_an_older_version_lasted_no_longer_than_it_took_to_be_mirrored(workspace: Workspace) -> None:
    run = evaluated(workspace)
    os.utime(run / "run.json", (1000, 1000))  # as in a copy of a workspace, of which nobody knows when it was made
    Mirror(workspace).update(run)
    (shown,) = tracked(workspace)
    assert 0 <= shown.info.end_time - shown.info.start_time < 60_000
    assert shown.data.tags["mlflow.source.name"] == "cafe"


def test_a_description_of_somebody_else_stays(workspace: Workspace) -> None:
    Mirror(workspace).update(run := evaluated(workspace))
    client = MlflowClient(default_uri(workspace))
    place = client.get_experiment_by_name("cafe")
    assert "`cafe compare --experiment cafe`" in place.tags["mlflow.note.content"]
    client.set_experiment_tag(place.experiment_id, "mlflow.note.content", "mine")
    write_json(run / "status.json", {"status": "FAILED", "reason": ""})
    Mirror(workspace).update(run)
    assert client.get_experiment_by_name("cafe").tags["mlflow.note.content"] == "mine"


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        (
            "./mlruns",
            "is a folder, in which MLflow keeps no runs any more: give http://HOST:PORT of a server, or sqlite:",
        ),
        ("file:///home/me/mlruns", "is a folder"),
        (
            "postgresql+psycopg2://me:secret@host/runs",
            "No module named 'psycopg2'): run `pip install psycopg2-binary`.",
        ),
        ("postgresql+nothing://host/runs", "is no address of a database"),
        ("nonsense://host", "is nothing that MLflow reads"),
        ("postgresql://host:port/runs", "is no address of a database"),
        ("http:/host", "is no address of a server"),
        ("http://[::1", "is no address of a server"),
        ("http://host:port", "is no address of a server"),
    ],
)
def test_an_address_that_mlflow_cannot_use_is_refused_before_any_work(tmp_path: Path, uri: str, reason: str) -> None:
    work = Cafe(tmp_path / "work", "")
    commands = (
        ("train", "--source", "nobody"), ("benchmark", "quickstart.toml"), ("evaluate", "shipped", "--targets", "nobody"),
        ("export", "nobody", "--mlflow"), ("compare", "--experiment", "cafe"), ("mlflow", "sync"),
    )  # fmt: skip
    for command in commands:
        said = work.fail(*command, "--mlflow-uri", uri)
        assert said.startswith(f"Error: --mlflow-uri {uri.replace('me:secret', '…')} ")
        assert reason in said
    assert not (tmp_path / "work").exists()


def test_the_load_of_the_machine_is_shown_on_request(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.1")
    run = evaluated(workspace)
    with Mirror(workspace).monitoring(run):
        patience = time.monotonic() + 30
        while not (found := find_load(workspace)) and time.monotonic() < patience:
            time.sleep(0.2)
    assert {"system/cpu_utilization_percentage", "system/system_memory_usage_megabytes"} <= found
    Mirror(workspace).update(run)
    assert (picture(workspace)["status"], find_load(workspace) >= found) == ("FINISHED", True)


def find_load(workspace: Workspace) -> set[str]:
    return {name for name in tracked(workspace)[0].data.metrics if name.startswith("system/")}


def test_a_run_of_two_experiments_is_shown_in_both_and_below_its_benchmark(workspace: Workspace) -> None:
    run, mirror = evaluated(workspace, experiments={"cafe": None, "grid": "grid-0123abcd"}), Mirror(workspace)
    folder = workspace.root / "benchmarks" / "grid-0123abcd"
    write_json(folder / "benchmark.json", {"name": "grid", "sources": ["raf"], "seeds": [0, 1]})
    (folder / "cells.json").write_text(
        '[{"cell": "raf/cafe/s0", "run": "x", "failure": ""}, {"cell": "y", "run": null, "failure": "no"}]'
    )
    mirror.update(run)
    mirror.update_benchmark(folder, "grid", "FAILED")
    parent, child = sorted(tracked(workspace, "grid"), key=lambda run: PARENT in run.data.tags)
    assert (parent.info.run_name, parent.info.status) == ("grid-0123abcd", "FAILED")
    assert parent.data.params["sources"] == '["raf"]'
    assert parent.data.metrics == {"cells": 2, "cells_failed": 1}
    assert child.data.tags[PARENT] == parent.info.run_id
    assert len(tracked(workspace)) == 1
    assert PARENT not in tracked(workspace)[0].data.tags


def test_a_server_that_is_down_raises_nothing_and_is_completed_later(workspace: Workspace) -> None:
    run = evaluated(workspace)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mirror, address = Mirror(workspace, f"http://me:my@secret@127.0.0.1:{port}"), f"http://…@127.0.0.1:{port}"
    mirror.update(run)
    mirror.update(run)
    assert mirror.warning.startswith(f"MLflow at {address} does not show everything of 1 of the runs")
    assert f"`cafe mlflow sync --mlflow-uri {address}`" in mirror.warning
    assert "secret" not in complaint(mirror.pull, "cafe")


def test_pulled_runs_have_the_same_predictions_and_are_copied_once(workspace: Workspace, tmp_path: Path) -> None:
    run = evaluated(workspace)
    Mirror(workspace).update(run)
    elsewhere = Mirror(Workspace.at(str(tmp_path / "elsewhere")), default_uri(workspace))
    (folder,) = elsewhere.pull("cafe")
    assert folder.name == run.name
    assert (folder / "run.json").read_bytes() == (run / "run.json").read_bytes()
    ours, theirs = (load_predictions(path)["fer"] for path in (run, folder))
    np.testing.assert_array_equal(ours.probabilities, theirs.probabilities)
    marker = (folder / "pulled.json").stat().st_mtime_ns
    assert elsewhere.pull("cafe") == [folder]
    assert (folder / "pulled.json").stat().st_mtime_ns == marker


@pytest.mark.parametrize(
    ("server", "place", "flags", "said"),
    [
        ("http://track:5000", "mlflow-artifacts:/1/2/artifacts", "", ""),
        ("http://track:5000", "http://track:5000/files", "", ""),
        ("http://track:5000", "s3://bucket/1", "", ""),
        ("sqlite:////w/mlflow.db", "file:///w/artifacts/1", "", ""),
        ("http://127.0.0.1:5000", "file:///w/artifacts/1", "", ""),
        ("http://track:5000", "file:///etc", "", "a folder of this machine"),
        ("http://track:5000", "/etc", "", "a folder of this machine"),
        ("http://track:5000", "http://track:22/", "", "--allow-urls"),
        ("http://track:5000", "mlflow-artifacts://metadata/1", "", "--allow-urls"),
        ("sqlite:////w/mlflow.db", "https://other/1", "", "--allow-urls"),
        ("http://track:5000", "http://other/1", "urls", "give --allow-private-urls too"),
        ("http://track:5000", "http://other/1", "urls private", ""),
        ("http://track:5000", "http://other/1", "own", ""),
        ("http://track:5000", "ftp://other/1", "urls private", "give a folder, an object store or https:// there"),
    ],
)
def test_artifacts_are_fetched_from_the_server_and_from_what_the_user_allows(
    server: str, place: str, flags: str, said: str
) -> None:
    before = permission()
    Permission("urls" in flags, "private" in flags, ("http://other",) if "own" in flags else ()).install()
    try:
        assert (said in complaint(check_place, server, place)) if said else not complaint(check_place, server, place)
    finally:
        before.install()


def test_a_run_whose_artifacts_lie_on_another_server_is_not_pulled(workspace: Workspace, tmp_path: Path) -> None:
    evaluated(workspace)
    mirror = Mirror(workspace)
    for run in workspace.read_runs():
        mirror.update(run.folder)
    path = default_uri(workspace).removeprefix("sqlite:///")
    with sqlite3.connect(path) as database:
        database.execute("UPDATE runs SET artifact_uri = 'http://127.0.0.1:9/artifacts'")
    said = complaint(Mirror(Workspace.at(str(tmp_path / "other")), default_uri(workspace)).pull, "cafe")
    assert "'http://127.0.0.1:9/artifacts' came with a file: where you trust that file, give --allow-urls" in said


@pytest.mark.parametrize("lie", ["name", "seed"])
def test_a_pulled_run_that_lies_about_itself_is_left_out_and_named(
    lie: str, workspace: Workspace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One that calls itself like a run of this workspace adds nothing to its numbers; one that was changed is none."""
    theirs, labels = workspace.run_path(SPEC.name), np.arange(70) % 7
    SPEC.save(theirs)
    add_experiment(theirs, "cafe")
    write_predictions(theirs, "fer", labels, labels)
    Mirror(workspace).update(theirs)
    here = Workspace.at(str(tmp_path / "here"))
    own = write_run(here, seed=7)
    write_predictions(own, "fer", np.zeros(7, int), np.ones(7, int))
    before = {path: path.read_bytes() for path in list_files(own)}
    (sent,) = (workspace.root / "artifacts").glob("*/artifacts/run.json")
    claimed = {"name": own.name} if lie == "name" else {"seed": 7}
    write_sealed(sent, {**(read_sealed(sent) or {}), **claimed})

    said = Cafe(here.root, "").succeed("mlflow", "pull", "--mlflow-uri", default_uri(workspace), "--experiment", "cafe")
    assert "Fetched 0 runs" in said
    assert f"A run of the server is left out: {here.root}/pulled" in caplog.text
    assert f"says that it is the run '{own.name}'" in caplog.text or "says of its seed 7" in caplog.text
    assert {path: path.read_bytes() for path in list_files(own)} == before
    assert here.run_names() == [own.name]
    assert read_scores(here.read_runs())["accuracy"].tolist() == [0]


def test_a_record_that_a_kill_left_half_written_is_not_one(workspace: Workspace) -> None:
    run = evaluated(workspace)
    (run / "epochs" / ".0003.json.0a1b2c3d").write_bytes(b'{"train/total"')
    assert [path.name for path in list_folder(run / "epochs")] == ["0001.json", "0002.json"]
    Mirror(workspace).update(run)
    assert picture(workspace)["history"]["train/total"] == [(1, 1.0), (2, 0.5)]


def test_data_sets_are_shown_with_their_counts_and_runs_with_source_and_version(
    workspace: Workspace, tmp_path: Path
) -> None:
    root = UPath(draw_faces(tmp_path / "faces", per_class=10))
    manifest = index_files("faces", DATASETS["folder"](root)).manifest
    manifest.save(workspace.manifest_path("faces"))
    run = write_run(workspace, source="faces", selection="source_val")
    record = read_sealed(run / "run.json", "read") or {}
    write_sealed(run / "run.json", {**record, "source_digest": manifest.digest, "derived": {"code": "0123abcd"}})
    labels = manifest.labels[manifest.rows("test")]
    write_predictions(run, "other", labels, labels)
    Mirror(workspace).update(run)
    (shown,) = tracked(workspace)
    found = {entry.tags[0].value: entry.dataset for entry in shown.inputs.dataset_inputs}
    assert {context: dataset.name for context, dataset in found.items()} == {
        "training": "faces", "validation": "faces@val", "test": "other",
    }  # fmt: skip
    counts = json.loads(found["training"].profile)
    rows = manifest.rows("train")
    assert (counts["split"], counts["faces"]) == ("train", len(rows))
    assert counts["anger"] == int((manifest.labels[rows] == 5).sum()) > 0
    assert json.loads(found["test"].profile) == {"split": "test"}  # nothing is known of a manifest that is not here
    assert json.loads(found["training"].source)["uri"].endswith("manifests/faces.parquet")
    assert shown.data.tags["mlflow.source.git.commit"] == "0123abcd"


def test_runs_are_grouped_by_the_rows_of_the_comparison(workspace: Workspace) -> None:
    """Those that differ only in their seed, by a name that tells them apart from all others of the experiment."""
    settings = [{"seed": 0}, {"seed": 1}, {"seed": 0, "tag": "long"}, {"seed": 0, "source": "fer"}]
    runs = [evaluated(workspace, **own) for own in settings[:3]]
    mirror = Mirror(workspace)
    for run in runs:
        mirror.update(run)
    list_experiments(workspace)
    rows = {run.info.run_name: run.data.tags["cafe.row"] for run in tracked(workspace)}
    assert [rows[run.name] for run in runs] == ["cafe", "cafe", "cafe (tag=long)"]
    shutil.rmtree(str(runs[2]))  # then nothing has to tell the others apart
    mirror.update(other := evaluated(workspace, **settings[3]))
    list_experiments(workspace)
    rows = {run.info.run_name: run.data.tags.get("cafe.row", "") for run in tracked(workspace)}
    assert [rows[run.name] for run in (*runs[:2], other)] == ["cafe from raf", "cafe from raf", "cafe from fer"]


def test_the_run_of_a_benchmark_holds_the_table_and_the_page(workspace: Workspace) -> None:
    folder = workspace.root / "benchmarks" / "grid-0123abcd"
    write_json(folder / "benchmark.json", {"name": "grid"})
    write_comparison(workspace, folder, read_runs([evaluated(workspace)]), "grid", "clean")
    Mirror(workspace).update_benchmark(folder, "grid", "FINISHED")
    assert picture(workspace, "grid")["files"].keys() == {"benchmark.json", "comparison.md", "report.html"}
    list_experiments(workspace)
    assert tracked(workspace, "grid")[0].data.tags["cafe.row"] == "benchmark"  # else it is among the `Additional runs`
    assert "| raf | cafe |" in (folder / "comparison.md").read_text()
    assert (folder / "report.html").read_text().startswith("<!doctype html>")


def test_what_is_no_database_and_files_of_others_never_end_a_run(workspace: Workspace) -> None:
    run = evaluated(workspace)
    (run / "epochs" / "notes.txt").write_bytes(b"the third epoch looks odd")
    database = workspace.root / "mlflow.db"
    database.write_bytes(bytes(range(256)) * 20)
    mirror = Mirror(workspace)
    mirror.update(run)
    assert f"does not show everything of 1 of the runs ({database} cannot be opened" in mirror.warning
    assert f"`cafe mlflow sync`; if it fails again, move {database} away before." in mirror.warning
    database.unlink()
    Mirror(workspace).update(run)
    assert picture(workspace)["history"]["train/total"] == [(1, 1.0), (2, 0.5)]


@pytest.mark.parametrize("name", ["q?x=1", "pct%20x #é"])
def test_a_workspace_of_any_name_holds_its_own_database(tmp_path: Path, name: str) -> None:
    workspace = Workspace.at(str(tmp_path / name))
    run = evaluated(workspace)
    mirror = Mirror(workspace)
    mirror.update(run)
    assert mirror.warning == ""
    assert {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*") if path.is_file()} == {name}
    assert picture(workspace)["name"] == run.name
