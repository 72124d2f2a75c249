"""What is installed claims the name `cafe` alone: it works in a folder whose own modules are named `pipeline` and `jobs`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import draw_faces

import cafe
from cafe.pipeline.process.versions import code_version

ROOT = Path(__file__).parents[1]
NAME = f"cafe_fer-{cafe.__version__}"
BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, 'build_' + sys.argv[1])(sys.argv[2])"
SCORES = "import cafe, cafe.pipeline; print(cafe.scores('work').accuracy.between(0, 1).all(), cafe.pipeline.__file__)"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder into which pip installed the wheel that was built from the source distribution."""
    tree, made, site = (tmp_path_factory.mktemp(name) for name in ("tree", "made", "site"))
    for name in ("cafe", "pipeline", "jobs"):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    subprocess.run([sys.executable, "-c", BUILD, "sdist", str(made)], cwd=tree, check=True, capture_output=True)
    shutil.unpack_archive(made / f"{NAME}.tar.gz", made, filter="data")
    subprocess.run([sys.executable, "-c", BUILD, "wheel", ".."], cwd=made / NAME, check=True, capture_output=True)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--no-compile",
        "--target",
        str(site),
    ]
    subprocess.run([*pip, str(made / f"{NAME}-py3-none-any.whl")], check=True, capture_output=True)
    return site


def test_only_cafe_is_installed(installed: Path) -> None:
    assert sorted(path.name for path in installed.iterdir() if path.suffix != ".dist-info") == ["bin", "cafe"]
    for name in ("pipeline/train.py", "jobs/benchmarks/table1.toml", "results/published.toml"):
        assert (installed / "cafe" / name).is_file()


def test_its_name_is_not_that_of_a_strangers_package(installed: Path) -> None:
    (metadata,) = installed.glob("*.dist-info/METADATA")
    assert f"Name: cafe-fer\nVersion: {cafe.__version__}\n" in metadata.read_text()


def test_its_metadata_install_what_finds_faces_and_reads_telephones_pictures(installed: Path) -> None:
    (metadata,) = installed.glob("*.dist-info/METADATA")
    needed = [line.split(": ")[1] for line in metadata.read_text().splitlines() if line.startswith("Requires-Dist")]
    assert {"mtcnn==1.0.0", "face-recognition-models", "pi-heif"} <= set(needed)  # not of an extra
    pinned = (ROOT / "constraints.txt").read_text().splitlines()
    assert "mtcnn==1.0.0" in pinned


def test_it_works_beside_modules_named_like_its_folders(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "pipeline").mkdir()
    for name in ("pipeline/__init__.py", "jobs.py"):
        (tmp_path / name).write_text("raise ImportError('a module of somebody else')\n")
    drawn = list(draw_faces(tmp_path / "faces", per_class=6).rglob("*.*g"))

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(installed)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    command = str(installed / "bin" / "cafe")
    assert run(command, "--version").split() == ["cafe,", "version", cafe.__version__]
    run(command, "data", "index", "folder", "faces", "--name", "drawn")
    run(command, "train", "--source", "drawn", "--method", "image_only", "--epochs", "1", "--image-size", "32")
    run(command, "predict", "image_only-drawn", "faces", "--aligned", "--output", "faces.csv")
    assert len((tmp_path / "faces.csv").read_text().splitlines()) == 1 + len(drawn)
    between, place = run("-c", SCORES).split()
    assert between == "True"
    assert place.startswith(str(installed))


def test_code_that_was_installed_below_a_strangers_checkout_is_not_called_by_its_commits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        cafe, "__path__", [str(ROOT / "tests" / "cafe")]
    )  # as in an environment that lies in a checkout
    assert code_version() == f"cafe {cafe.__version__}"


def test_code_names_itself_where_git_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert code_version() == f"cafe {cafe.__version__}"
