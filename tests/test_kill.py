"""What `kill -9` of a driver loses: the shard or the epoch under way, and never the result.

These tests start Ray themselves, since the driver of a Ray of its own is what is killed.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import psutil
import pytest
import torch
from conftest import Cafe, draw_faces
from forked import start_command
from miniatures import read_tree, write_tar
from mlflow import MlflowClient
from PIL import Image
from safetensors.torch import load_file
from trained import fill_store
from upath import UPath

from cafe.data.manifest import Face, Manifest
from cafe.pipeline.features.integrity import find_stores
from cafe.pipeline.features.store import FeatureStore
from cafe.pipeline.features.worker import KILLER, Decoders
from cafe.pipeline.settings import ExtractSettings
from cafe.pipeline.workspace import Workspace
from cafe.views.drawing import ViewPlan
from cafe.views.rendering import Renderer

ALONE = ("--num-cpus", "1")


@pytest.fixture
def work(tmp_path: Path) -> Cafe:
    """A workspace with a manifest, and its copy in `whole`, where nothing is interrupted."""
    cafe = Cafe(tmp_path / "work", "")
    cafe.succeed("data", "index", "folder", str(draw_faces(tmp_path / "faces", per_class=40)), "--name", "tiny")
    shutil.copytree(cafe.workspace, tmp_path / "whole")
    return cafe


@pytest.fixture
def whole(work: Cafe) -> Cafe:
    return Cafe(work.workspace.with_name("whole"), "")


def start(cafe: Cafe, command: tuple[str, ...], sign: str) -> tuple[ForkServerProcess, Path]:
    """Start a command in a process of its own; return it, as soon as a file like `sign` is there, and its errors."""
    errors = cafe.workspace.parent / "errors.txt"
    driver = start_command(("--workspace", str(cafe.workspace), *command), errors)
    while not list(cafe.workspace.glob(sign)):
        assert driver.is_alive(), f"the command ended before it could be stopped: {errors.read_text()}"
        time.sleep(0.02)
    return driver, errors


def test_an_extraction_from_a_tar_loses_only_unfinished_shards_and_ends_in_what_files_give(
    work: Cafe, whole: Cafe, tiny_tower: str, tmp_path: Path
) -> None:
    tar = write_tar(tmp_path / "faces.tar", read_tree(tmp_path / "faces"))
    work.succeed("data", "index", "folder", str(tar), "--name", "tiny")
    command = ("extract", "tiny", "--backbone", tiny_tower, "--views", "8", "--shard-rows", "2", *ALONE)
    driver, _ = start(work, command, "features/tiny/**/receipts/*.json")
    driver.kill()
    driver.join()
    ((path, about),) = find_stores(UPath(work.workspace / "features"), "tiny")
    killed = FeatureStore(path, about)
    assert 0 < len(killed.pending()) < killed.info.shards

    rerun = work.succeed(*command)
    assert f"of {killed.info.shards} shards" in rerun
    assert f"computed {killed.info.shards} of" not in rerun
    settings = ExtractSettings(backbone=tiny_tower, views=8, shard_rows=2)
    fill_store(Workspace.at(str(whole.workspace)), "tiny", settings).finish()
    features = [cafe.workspace / "features" for cafe in (work, whole)]
    resumed, uninterrupted = (
        {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()} for root in features
    )
    assert resumed == uninterrupted


def test_a_training_goes_on_from_its_checkpoint_to_the_same_weights(work: Cafe, whole: Cafe, tmp_path: Path) -> None:
    command = ("train", "--source", "tiny", "--method", "image_only", "--epochs", "3", "--image-size", "32")
    command += ("--set", "batch_size=32", "--set", "learning_rate=0.001", "--targets", "none", "--threads", "1")
    driver = start_command(
        ("--workspace", str(work.workspace), *command), tmp_path / "errors.txt", "*/epochs/0002.json"
    )
    driver.join()
    assert driver.exitcode == -signal.SIGKILL, (tmp_path / "errors.txt").read_text()
    assert list(work.workspace.glob("runs/*/checkpoints/*/state.json"))
    assert not list(work.workspace.glob("runs/*/model.safetensors"))

    work.succeed(*command)
    whole.succeed(*command)
    resumed, uninterrupted = (
        load_file(next(cafe.workspace.glob("runs/*/model.safetensors"))) for cafe in (work, whole)
    )
    for name, value in uninterrupted.items():
        assert torch.equal(resumed[name], value), name
    client = MlflowClient(f"sqlite:///{work.workspace}/mlflow.db")
    (logged,) = client.search_runs([client.get_experiment_by_name("cafe").experiment_id])
    history = client.get_metric_history(logged.info.run_id, "train/total")
    assert sorted(point.step for point in history) == [1, 2, 3]


TRAIN = (
    "train",
    "--source",
    "tiny",
    "--method",
    "image_only",
    "--epochs",
    "60",
    "--image-size",
    "32",
    "--targets",
    "none",
)
GRID = """
sources = ["tiny"]
targets = ["tiny"]
seeds = 2
methods = ["image_only"]
[train]
epochs = 60
image_size = 32
"""


def interrupt(cafe: Cafe, command: tuple[str, ...], sign: str) -> None:
    """Interrupt a command as soon as a file like `sign` is there: it says how to go on, and nothing of it is left."""
    driver, errors = start(cafe, (*command, *ALONE), sign)
    family = psutil.Process(driver.pid).children(recursive=True)
    os.kill(driver.pid, signal.SIGINT)
    driver.join(60)  # five seconds on a quiet machine
    assert driver.exitcode == 130
    assert errors.read_text().endswith("Interrupted: the same command goes on where it was.\n")
    assert bool(family) == (command[0] != "train")  # which needs no other process on one machine
    assert psutil.wait_procs(family, 60)[1] == []


@pytest.mark.parametrize("command", ["train", "benchmark"])
def test_an_interrupted_training_is_killed_and_nothing_keeps_running(work: Cafe, command: str) -> None:
    (work.workspace / "grid.toml").write_text(GRID)
    interrupt(
        work, TRAIN if command == "train" else ("benchmark", f"{work.workspace}/grid.toml"), "runs/*/epochs/0001.json"
    )
    records = [json.loads(status.read_text()) for status in work.workspace.glob("runs/*/status.json")]
    assert {"status": "KILLED", "reason": "interrupted"} in records
    assert all(record["status"] == "KILLED" for record in records)


LONG_AND_SHORT = """
sources = ["tiny"]
targets = ["tiny"]
seeds = 1
methods = [{ method = "image_only", epochs = 60 }, { method = "image_only", epochs = 1 }]
train = { image_size = 32 }
"""


def test_a_cell_whose_worker_is_killed_fails_with_a_sentence_and_the_next_is_done(work: Cafe) -> None:
    (work.workspace / "grid.toml").write_text(LONG_AND_SHORT)
    driver, _ = start(work, ("benchmark", f"{work.workspace}/grid.toml", *ALONE), "runs/*/epochs/0001.json")
    (worker,) = (
        process
        for process in psutil.Process(driver.pid).children(recursive=True)
        if process.cmdline()[:1] == ["ray::Worker.train"]
    )
    worker.kill()
    driver.join(240)
    assert driver.exitcode == 1
    (cells,) = work.workspace.glob("benchmarks/grid-*/cells.json")
    reasons = [cell["failure"] for cell in json.loads(cells.read_text())]
    assert reasons[0].startswith("A process of Ray's ended in the middle of its work (The actor died unexpectedly")
    assert reasons[1:] == [None]


def test_an_interrupted_extraction_keeps_its_shards_and_nothing_keeps_running(work: Cafe, tiny_tower: str) -> None:
    command = ("extract", "tiny", "--backbone", tiny_tower, "--views", "30", "--shard-rows", "8")
    interrupt(work, command, "features/tiny/**/receipts/*.json")
    ((path, about),) = find_stores(UPath(work.workspace / "features"), "tiny")
    assert 0 < len(FeatureStore(path, about).pending()) < 15


HOOK = """
import os, signal, sys
from PIL import Image, ImageFile
load, open_image = ImageFile.ImageFile.load, Image.open
def load_or_die(image):
    if image.size == (13, 17):
        os.kill(os.getpid(), signal.SIGKILL)
    return load(image)
def note_and_open(file, **options):
    if "TRIED" in os.environ and "--multiprocessing-fork" in sys.orig_argv:
        with open(os.environ["TRIED"], "a") as tried:
            tried.write(".")
    return open_image(file, **options)
ImageFile.ImageFile.load, Image.open = load_or_die, note_and_open
"""


@pytest.fixture
def deadly_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow, in every process started from here on, dies of pictures of 13 × 17 pixels as if killed for its memory."""
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(HOOK)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "hook"), *sys.path]))


def renderer_of(folder: Path, sizes: list[tuple[int, int]]) -> Renderer:
    """What decodes pictures of some sizes, and of a last one that is none."""
    for number, size in enumerate(sizes):
        Image.new("RGB", size).save(folder / f"{number}.png")
    (folder / f"{len(sizes)}.png").write_text("no picture")
    faces = [Face(f"{number}.png", f"{number}.png", 0, "train", None, 8, 8, "") for number in range(len(sizes) + 1)]
    plan = ViewPlan("clean", 0, 1, "bilinear", (0.5,) * 3, (0.5,) * 3)
    return Renderer(Manifest.from_faces("odd", str(folder), faces), plan, 8)


def test_pictures_that_kill_their_decoder_are_left_out_and_all_others_decoded(
    tmp_path: Path, deadly_decoder: None
) -> None:
    renderer = renderer_of(tmp_path, [(8, 8), (13, 17), (17, 13), (13, 17), (9, 9)])
    batches = [[(0, 0), (1, 0)], [(2, 0), (3, 0)], [(4, 0), (5, 0)]]
    rendered = list(Decoders(1).work(renderer, batches))
    reasons = [batch.unreadable for batch in rendered]
    assert reasons == [{1: KILLER}, {3: KILLER}, {5: "not an image of a known format"}]
    assert [len(batch.pictures) for batch in rendered] == [2, 2, 2]


def test_a_process_that_was_stopped_is_ended_and_its_work_done_by_another(tmp_path: Path) -> None:
    decoders = Decoders(1, silent_seconds=2)
    decoders.renew(None)
    assert decoders.pool is not None
    (stopped,) = decoders.pool._processes.values()
    status = Path(f"/proc/{stopped.pid}/status").read_text()
    blocked = int(status.partition("SigBlk:")[2].split()[0], 16)
    assert blocked >> (signal.SIGINT - 1) & 1  # from before its first import: Ctrl-C meets it there, too
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & {signal.SIGINT}
    os.kill(stopped.pid, signal.SIGSTOP)
    rendered = list(decoders.work(renderer_of(tmp_path, [(8, 8), (9, 9)]), [[(0, 0)], [(1, 0)]]))
    assert [len(batch.pictures) for batch in rendered] == [1, 1]
    assert [batch.unreadable for batch in rendered] == [{}, {}]
    assert not psutil.pid_exists(stopped.pid) or stopped.exitcode == -signal.SIGKILL


def test_no_picture_is_blamed_where_no_process_can_be_started(tmp_path: Path, deadly_decoder: None) -> None:
    hook = 'import os, sys\nif "--multiprocessing-fork" in sys.orig_argv:\n    os._exit(1)\n'
    (tmp_path / "hook" / "sitecustomize.py").write_text(hook)
    with pytest.raises(OSError, match="no process can be started to decode pictures in"):
        Decoders(1).work(renderer_of(tmp_path, [(8, 8)]), [[(0, 0)]])


def test_processes_that_decode_start_without_torch() -> None:
    """Each would take half a gigabyte and five seconds more."""
    code = "import sys, cafe.pipeline.features.worker; print({'torch', 'zarr', 'ray', 'timm'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "set()\n"


def test_processes_that_decode_end_with_their_parent(tmp_path: Path) -> None:
    program = (
        "import time\nfrom cafe.pipeline.features.worker import Decoders\n"
        "if __name__ == '__main__':\n"
        "    decoders = Decoders(1)\n    decoders.renew(None)\n    print('ready', flush=True)\n    time.sleep(600)\n"
    )
    (tmp_path / "parent.py").write_text(program)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen(
        [sys.executable, str(tmp_path / "parent.py")], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert parent.stdout is not None
    assert parent.stdout.readline() == "ready\n"
    children = psutil.Process(parent.pid).children(recursive=True)
    assert children
    parent.kill()
    parent.wait()
    assert psutil.wait_procs(children, 20)[1] == []


def test_a_script_that_extracts_without_a_main_guard_ends_in_one_sentence(tmp_path: Path) -> None:
    names = "from cafe.pipeline.features.worker import Decoders, end_if_imported"
    (tmp_path / "script.py").write_text(f"{names}\nend_if_imported()\nDecoders(2).renew(None)\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(tmp_path / "script.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)
    assert done.stderr.count("Traceback") == 1
    assert done.stderr.splitlines()[-1].endswith('put what it runs below `if __name__ == "__main__":`.')


def test_an_extraction_leaves_out_a_picture_that_kills_its_worker_and_finishes_all_others(
    tmp_path: Path, tiny_tower: str, deadly_decoder: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIED", str(tmp_path / "tried.txt"))
    cafe, faces = Cafe(tmp_path / "work", ""), draw_faces(tmp_path / "faces", per_class=12)
    Image.new("RGB", (13, 17)).save(faces / "happiness" / "poison.png")
    cafe.succeed("data", "index", "folder", str(faces), "--name", "tiny")
    command = ("extract", "tiny", "--backbone", tiny_tower, "--shard-rows", "4", *ALONE)
    driver = start_command(("--workspace", str(cafe.workspace), *command), tmp_path / "errors.txt")
    driver.join()
    said = (tmp_path / "errors.txt").read_text()
    assert driver.exitcode == 1, said
    assert "1 of 37 images of 'tiny' are unreadable" in said
    assert "happiness/poison.png: kills its decoder" in said
    ((path, about),) = find_stores(UPath(cafe.workspace / "features"), "tiny")
    store = FeatureStore(path, about)
    samples = list(store.array("sample_id")[:])
    assert store.pending() == []
    assert store.receipts.valid().tolist() == [sample != "happiness/poison.png" for sample in samples]
    # Each of 37 pictures once, and those of the two shards that were under way two to four times.
    assert 37 < len((tmp_path / "tried.txt").read_text()) <= 37 + 3 * 8
