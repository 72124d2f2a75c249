"""One model, one answer: the run, its graph, MLflow's pyfunc, and MLflow's server over HTTP agree on real faces."""

from __future__ import annotations

import base64
import json
import math
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

import mlflow
import numpy as np
import pandas as pd
import pytest
from conftest import Cafe, complaint
from mlflow import MlflowClient
from PIL import Image
from trained import extract_few, start_run

from cafe.data.expressions import EXPRESSIONS
from cafe.inference.graph import Onnx
from cafe.pipeline.evaluate import evaluate_target
from cafe.pipeline.faces import choose_targets
from cafe.pipeline.release.library import load_model
from cafe.pipeline.release.pyfunc import read_content
from cafe.pipeline.runs import RunSpec
from cafe.pipeline.tracking.mirror import default_uri
from cafe.pipeline.workspace import Workspace

PATIENCE = 300  # seconds a crowded machine may need to start the server


@contextmanager
def served(model: str, uri: str) -> Iterator[str]:
    """MLflow's own server of a model on loopback; yields its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--model-uri", model, "--env-manager", "local"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    environment = {**os.environ, "MLFLOW_TRACKING_URI": uri, "PYTHONPATH": os.pathsep.join(sys.path)}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # where uvicorn is
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, env=environment, start_new_session=True, **quiet) as server:  # type: ignore[call-overload]
        try:
            deadline = time.monotonic() + PATIENCE
            while not answers(f"http://127.0.0.1:{port}/ping"):
                assert server.poll() is None, "the server ended before it answered"
                assert time.monotonic() < deadline, "the server does not answer"
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}/invocations"
        finally:
            os.killpg(server.pid, signal.SIGTERM)


def answers(address: str) -> bool:
    try:
        with urlopen(address) as answer:
            return bool(answer.status == 200)
    except URLError:
        return False


def test_run_graph_pyfunc_and_server_agree_on_real_faces(real_faces: Path, tmp_path: Path) -> None:
    workspace = Workspace.at(str(tmp_path / "work"))
    extract_few(real_faces, tmp_path, workspace, views=1)
    run, _ = start_run(
        workspace, source="news", targets="cinema", method="cafe", image_size=64, overrides=("features=standardised",)
    )
    evaluate_target(run, *choose_targets(workspace, "cinema", RunSpec.load(run), "clean"))
    folder = tmp_path / "model"
    command = ("export", run.name, "--output", str(folder), "--register", "faces")
    said = Cafe(tmp_path / "work", "").succeed(*command)
    assert f"of the run {run.name}, registered as models:/faces/1.\n" in said

    files = sorted((tmp_path / "news").glob("*/*"))[:8]
    pictures = [np.asarray(Image.open(file).convert("RGB")) for file in files]
    expected = load_model(run.name, str(workspace.root)).predict(pictures)
    assert np.ptp(expected, axis=0).max() > 1e-3  # the faces are told apart
    graph = Onnx(str(folder / "model.onnx"), threads=1)
    np.testing.assert_allclose(np.concatenate([graph.predict(face[None]) for face in pictures]), expected, atol=1e-4)
    for name in (str(folder), "models:/faces/1"):
        np.testing.assert_allclose(load_model(name, str(workspace.root)).predict(pictures), expected, atol=1e-6)

    uri = default_uri(workspace)
    mlflow.set_tracking_uri(uri)
    model = mlflow.pyfunc.load_model("models:/faces/1")
    assert model.metadata.signature.inputs.input_names() == ["image"]
    assert model.metadata.saved_input_example_info is not None
    records = pd.DataFrame({"image": [file.read_bytes() for file in files]})
    answer = model.predict(records)
    np.testing.assert_allclose(answer[list(EXPRESSIONS)], expected, atol=1e-6)
    assert list(answer["expression"]) == [EXPRESSIONS[label] for label in expected.argmax(axis=1)]

    version = MlflowClient(uri).get_model_version("faces", "1")
    assert version.tags.items() >= {"cafe.source": "news", "cafe.method": "cafe", "cafe.seed": "0"}.items()
    card = (folder / "README.md").read_text()[:5000]
    (logged,) = MlflowClient(uri).search_logged_models([version_experiment(uri)])
    assert (version.description, logged.tags["mlflow.note.content"], logged.name) == (card, card, run.name)
    assert logged.params.items() >= {"source": "news", "method": "cafe", "recipe.features": "standardised"}.items()
    assert version.run_id == MlflowClient(uri).search_runs([version_experiment(uri)])[0].info.run_id
    assert {(metric.key, metric.dataset_name) for metric in logged.metrics} >= {("target/cinema/accuracy", "cinema")}
    with sqlite3.connect(uri.removeprefix("sqlite:///")) as database:  # as models were logged that named no data sets
        database.execute("UPDATE logged_model_metrics SET dataset_name = NULL, dataset_digest = NULL")
    Cafe(tmp_path / "work", "").succeed(*command)  # nothing new: nothing is logged again
    assert len(MlflowClient(uri).search_model_versions("name = 'faces'")) == 1
    assert len(MlflowClient(uri).search_logged_models([version_experiment(uri)])) == 1

    texts = [base64.b64encode(content).decode() for content in records["image"]]
    with served("models:/faces/1", uri) as address:
        for media, body in write_requests(texts):
            rows = ask(address, media, body)
            got = np.array([[row[name] for name in EXPRESSIONS] for row in rows])
            np.testing.assert_allclose(got, expected, atol=1e-6)
        for media, body in write_requests([texts[0], "face.jpg", base64.b64encode(b"no picture").decode()]):
            good, *bad = ask(address, media, body)  # one bad record fails itself alone
            assert (good["error"], good["anger"]) == (None, pytest.approx(expected[0, 5], abs=1e-6))
            assert [(row["expression"], row["anger"]) for row in bad] == [(None, None)] * 2
            assert "(a text that is no base64, 'face.jpg'…): send the bytes" in bad[0]["error"]
            assert "(not an image of a known format): send the bytes of an image file, over" in bad[1]["error"]


def write_requests(texts: list[str]) -> Iterator[tuple[str, str]]:
    """The forms in which MLflow takes records: their media types and bodies."""
    records = [{"image": text} for text in texts]
    forms = {
        "dataframe_split": {"columns": ["image"], "data": [[text] for text in texts]},
        "dataframe_records": records, "inputs": {"image": texts}, "instances": records,
    }  # fmt: skip
    for name, content in forms.items():
        yield "application/json", json.dumps({name: content})
    yield "application/json", json.dumps({"inputs": texts})
    yield "text/csv", "\n".join(["image", *texts])


def ask(address: str, media: str, body: str) -> list[dict[str, Any]]:
    with urlopen(Request(address, body.encode(), {"Content-Type": media})) as reply:
        rows: list[dict[str, Any]] = json.load(reply)["predictions"]
        return rows


def version_experiment(uri: str) -> str:
    return str(MlflowClient(uri).get_experiment_by_name("cafe").experiment_id)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "nothing"),
        (math.nan, "nothing"),
        (3, "a value of the type int"),
        ("data:image/png;base64,?", "no base64"),
    ],
)
def test_a_record_that_is_no_picture_is_named(content: object, said: str) -> None:
    assert said in complaint(read_content, content)
    picture = b"the bytes of a picture"
    assert (
        read_content("data:image/png;base64," + base64.b64encode(picture).decode()) == read_content(picture) == picture
    )
