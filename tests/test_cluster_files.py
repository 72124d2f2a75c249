"""The files in jobs/cluster: what their readers allow, and commands that can be given."""

from __future__ import annotations

import copy
import json
import re
import shlex
import subprocess
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from test_docs import parse

from cafe.jobs.cli import main

FOLDER = Path(__file__).parents[1] / "jobs" / "cluster"
SCHEMA = json.loads(Path(__file__).with_name("rayjob.schema.json").read_text())


@pytest.fixture
def rayjob() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((FOLDER / "rayjob.yaml").read_text())
    return loaded


def test_the_rayjob_is_one_that_kuberay_takes(rayjob: dict[str, Any]) -> None:
    jsonschema.validate(rayjob, SCHEMA)
    cluster = rayjob["spec"]["rayClusterSpec"]
    assert cluster["rayVersion"] == version("ray")
    assert (cluster["enableInTreeAutoscaling"], cluster["authOptions"]) == (True, {"mode": "token"})
    gpu, cpu = cluster["workerGroupSpecs"]
    assert gpu["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert gpu["minReplicas"] < gpu["maxReplicas"]
    assert "nvidia.com/gpu" not in cpu["template"]["spec"]["containers"][0]["resources"]["limits"]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda job: job["spec"].pop("entrypoint"),
        lambda job: job["spec"].update(backofLimit=3),
        lambda job: job["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}),
        lambda job: job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0].update(minReplicas="1"),
    ],
    ids=["no entrypoint", "a word misspelt", "a number for a text", "a text for a number"],
)
def test_what_kuberay_refuses_is_found(rayjob: dict[str, Any], spoil: Callable[[dict[str, Any]], object]) -> None:
    spoiled = copy.deepcopy(rayjob)
    spoil(spoiled)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(spoiled, SCHEMA)


def test_the_commands_of_the_rayjob_can_be_given_and_ask_for_no_more_than_it_brings(rayjob: dict[str, Any]) -> None:
    shell, option, script = shlex.split(rayjob["spec"]["entrypoint"])
    assert (shell, option) == ("sh", "-c")
    commands = [shlex.split(command)[1:] for command in script.split("&&")]
    assert [words[2] for words in commands] == ["extract", "train", "benchmark"]
    for words in commands:
        parse(main, words)
    most = rayjob["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["maxReplicas"]
    assert max(map(int, re.findall(r"--num-(?:gpus|workers) (\d+)", script))) <= most


def test_the_commands_of_the_script_can_be_given(tmp_path: Path) -> None:
    ray = tmp_path / "ray"  # stands for Ray's own, and writes down what it is asked to submit
    ray.write_text(f'#!/bin/sh\necho "$RAY_AUTH_MODE $@" >> {tmp_path}/asked\n')
    ray.chmod(0o755)
    command = ["sh", str(FOLDER / "submit.sh"), "http://head:8265", "s3://bucket/work", "http://mlflow:5000"]
    subprocess.run(command, env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, check=True)
    asked = (tmp_path / "asked").read_text().splitlines()
    assert [line.partition(" -- cafe ")[0] for line in asked] == ["token job submit --address http://head:8265"] * 3
    commands = [line.partition(" -- cafe ")[2].split() for line in asked]
    assert [words[:3] for words in commands] == [
        ["-w", "s3://bucket/work", name] for name in ("extract", "train", "benchmark")
    ]
    for words in commands:
        parse(main, words)
