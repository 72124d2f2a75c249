"""`cafe doctor` against a workspace that can be written, one that cannot, and a benchmark that lacks something."""

import json
from pathlib import Path

import fsspec
import pytest
from click.testing import CliRunner
from miniatures import write_mma

from cafe import files
from cafe.jobs.cli import main


def test_a_machine_that_lacks_nothing_is_fit_and_nothing_is_left_in_the_workspace(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["-w", str(tmp_path / "work"), "doctor"])
    assert result.exit_code == 0, result.output
    assert "torch 2." in result.output
    assert " 1 cores " in result.output  # those this process may use, as a container says (`conftest.py`)
    assert list((tmp_path / "work").iterdir()) == []


def test_a_workspace_that_cannot_be_written_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    result = CliRunner().invoke(main, ["-w", str(tmp_path / "file" / "work"), "doctor"])
    assert result.exit_code == 1
    assert "cannot be written" in result.output
    result = CliRunner().invoke(main, ["-w", str(tmp_path / "file" / "work"), "doctor", "--json"])
    assert result.exit_code == 1
    (problem,) = [finding for finding in json.loads(result.stdout) if finding["problem"]]
    assert problem["point"] == "workspace"


def test_a_workspace_below_an_object_is_a_problem_with_its_reason() -> None:
    fsspec.filesystem("memory").pipe("/doctor/object", b"no folder")
    result = CliRunner().invoke(main, ["-w", "memory://doctor/object/work", "doctor", "--json"])
    (problem,) = [finding for finding in json.loads(result.stdout) if finding["problem"]]
    assert problem["problem"] == "cannot be written (/doctor/object): choose another with -w"


def test_a_storage_that_lets_nobody_in_is_a_problem_and_no_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setattr(files, "OBJECT_PAUSES", (0.01,))
    result = CliRunner().invoke(main, ["-w", "s3://bucket/of/doctor", "doctor", "--json"])
    assert result.exit_code == 1, result.exception
    (problem,) = [finding for finding in json.loads(result.stdout) if finding["problem"]]
    assert problem["problem"].startswith("s3://bucket/of/doctor/.doctor cannot be written (")


def test_what_keeps_a_benchmark_from_running_is_named(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    write_mma(tmp_path / "set")
    grid = tmp_path / "grid.toml"
    grid.write_text('sources = ["mma"]\nmethods = ["scn"]\nseeds = 2\n')
    workspace = ["-w", str(tmp_path / "work")]
    index = ["data", "index", "mma", str(tmp_path / "set"), "--name", "mma", "--accept-counts"]
    indexed = CliRunner().invoke(main, [*workspace, *index])
    assert indexed.exit_code == 1
    assert "1 are left out, listed above." in indexed.output
    result = CliRunner().invoke(main, [*workspace, "doctor", str(grid)])
    assert result.exit_code == 1
    assert "2 of 2 cannot run" in result.output
    assert "'mma' has 2 training faces" in result.output
