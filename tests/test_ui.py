"""`cafe ui` serves the workspace's experiments on loopback and ends with the command."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from urllib.request import Request, urlopen

from conftest import Cafe
from mlflow import MlflowClient
from runs import write_run

from cafe.pipeline.tracking.mirror import Mirror, default_uri
from cafe.pipeline.workspace import Workspace


def test_the_server_names_every_experiment_and_ends_with_the_command(tmp_path: Path) -> None:
    workspace = Workspace.at(str(tmp_path))
    Mirror(workspace).update(run := write_run(workspace, experiments={"grid": None}))
    experiment = MlflowClient(default_uri(workspace)).get_experiment_by_name("grid").experiment_id
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        assert Cafe(tmp_path, "").fail("ui", "--port", str(port)) == (
            f"Error: Port {port} is taken: give another one with --port."
        )
    command = [sys.executable, "-m", "cafe.jobs.cli", "--workspace", str(tmp_path), "ui", "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        address = f"http://127.0.0.1:{port}"
        assert server.stdout.readline() == f"MLflow starts for {tmp_path}; that takes some seconds.\n"
        assert server.stdout.readline() == f"MLflow at {address} (stop with Ctrl-C)\n"
        place = f"{address}/#/experiments/{experiment}/runs?workflowType=machine_learning&viewStateShareKey=cafe"
        assert server.stdout.readline() == f"grid: {place}\n"
        request = Request(
            f"{address}/api/2.0/mlflow/runs/search",
            json.dumps({"experiment_ids": [experiment]}).encode(),
            {"Content-Type": "application/json"},
        )
        with urlopen(request) as answer:
            (shown,) = json.load(answer)["runs"]
        assert shown["info"]["run_name"] == run.name
        server.terminate()
        assert server.wait(timeout=60) == 0
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0
