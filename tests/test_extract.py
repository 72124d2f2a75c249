"""Stage one, through the command line, in its own process and on a real cluster: right, resumable, and nothing lost."""

from __future__ import annotations

import gc
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import psutil
import pytest
import ray
import torch
from conftest import Cafe, draw_faces
from miniatures import read_tree, write_faces, write_tar, write_zip
from PIL import Image
from torchvision import transforms
from trained import fill_store
from upath import UPath

from cafe.data.expressions import EXPRESSIONS
from cafe.data.indexing import index_files
from cafe.data.readers import DATASETS
from cafe.pipeline.features.integrity import find_stores
from cafe.pipeline.features.store import FeatureStore
from cafe.pipeline.process import beside, pulse
from cafe.pipeline.settings import ExtractSettings
from cafe.pipeline.workspace import Workspace


def open_store(cafe: Cafe, manifest: str) -> FeatureStore:
    ((path, about),) = find_stores(UPath(cafe.workspace / "features"), manifest)
    return FeatureStore(path, about)


def open_stores(cafe: Cafe, manifest: str) -> list[FeatureStore]:
    return [FeatureStore(*found) for found in find_stores(UPath(cafe.workspace / "features"), manifest)]


def contents(folder: UPath) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


FACES = ("--backbone", "face-resnet", "--input-size", "64")  # the tower that an actor starts in half the time of others
ALONE = ("--num-actors", "1")  # each further one takes seconds to start


def extract_here(cafe: Cafe, **settings: Any) -> FeatureStore:
    """The finished store of `tiny`, made in this process by what Ray's workers run; with that tower, if not another."""
    tower = {"backbone": "face-resnet", "input_size": 64}
    store = fill_store(Workspace.at(str(cafe.workspace)), "tiny", ExtractSettings(**{**tower, **settings}))
    store.finish()
    return store


@pytest.fixture
def alone(tmp_path: Path) -> Cafe:
    """A workspace with a manifest; its commands work in their own process."""
    cafe = Cafe(tmp_path / "work", "")
    cafe.succeed("data", "index", "folder", str(draw_faces(tmp_path / "faces", per_class=20)), "--name", "tiny")
    return cafe


@pytest.fixture
def indexed(alone: Cafe, ray_address: str) -> Cafe:
    """The same, whose commands can join the session's cluster."""
    return Cafe(alone.workspace, ray_address)


def test_features_are_what_the_library_gives_and_a_rerun_does_nothing(indexed: Cafe, tiny_tower: str) -> None:
    command = ("extract", "tiny", "--backbone", tiny_tower, "--views", "3", "--dtype", "float32", "--maps")
    output = indexed.succeed(*command, ray=True)
    assert "computed 2 of 2 shards; 3 views × 24 channels and 24×4×4 maps" in output
    store = open_store(indexed, "tiny")
    pooled = store.array("pooled")[:]

    config, _, weights = tiny_tower.removeprefix("open_clip:").partition("@")
    model = open_clip.create_model(Path(config).stem).eval()
    model.load_state_dict(torch.load(weights, weights_only=True))
    clean = transforms.Compose([
        transforms.Resize((32, 32)), transforms.ToTensor(), transforms.Normalize(*store.info.key.normalisation),
    ])  # fmt: skip
    folder = indexed.workspace.parent / "faces"
    images = torch.stack([clean(Image.open(folder / sample)) for sample in store.array("sample_id")[:]])
    with torch.no_grad():
        expected = model.encode_image(images).numpy()
    np.testing.assert_allclose(pooled[:, 0], expected, rtol=1e-3, atol=1e-5)
    assert not np.allclose(pooled[:, 0], pooled[:, 1], atol=1e-3)  # view 1 is another picture

    before = contents(store.path)
    assert "nothing to do" in indexed.succeed(*command)  # without --address: no Ray is needed
    assert contents(store.path) == before


def test_resuming_gives_the_same_bytes_and_computes_only_what_is_missing(indexed: Cafe) -> None:
    command = ("extract", "tiny", *FACES, "--views", "2", "--shard-rows", "15")
    store = extract_here(indexed, views=2, shard_rows=15)
    before = contents(store.path)
    store.receipts.path(1).unlink()
    store.array("pooled")[15:20] = 0  # as if killed in the middle of shard 1
    indexed.join()
    with ThreadPoolExecutor(1) as pool:
        killed = pool.submit(kill_tower)
        assert "computed 1 of 4 shards" in indexed.succeed(*command, ray=True)
        actor = killed.result()
    assert contents(store.path) == before
    assert ray._private.state.actors(actor)["NumRestarts"] == 1  # Ray made the tower again of what it was first made of


def test_processes_of_rays_that_were_stopped_are_ended_and_started_again(
    cafe: Cafe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Beating:
        def __init__(self) -> None:
            pulse.BEAT_SECONDS = 0.2
            pulse.begin()

        def process(self) -> int:
            return os.getpid()

    def stop_at_first(seen: Path) -> int:
        pulse.BEAT_SECONDS = 0.2
        pulse.begin()
        time.sleep(1)
        if not seen.exists():
            seen.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGSTOP)
        return os.getpid()

    cafe.join()
    monkeypatch.setattr(pulse, "BEAT_SECONDS", 0.2)
    actor = ray.remote(Beating).options(num_cpus=0, max_restarts=1, max_task_retries=1).remote()
    with beside.repeat(pulse.Listener(3).look, pulse.BEAT_SECONDS):
        first = ray.get(actor.process.remote())
        task = ray.remote(stop_at_first).options(num_cpus=0).remote(tmp_path / "seen")
        os.kill(first, signal.SIGSTOP)
        assert ray.get(actor.process.remote(), timeout=200) != first
        assert ray.get(task, timeout=200) != int((tmp_path / "seen").read_text())
    ray.kill(actor)
    assert not psutil.pid_exists(first)


def kill_tower() -> str:
    """Kill the first tower that the session's cluster starts, as soon as it is there; return the name of its actor."""
    known, deadline = set(ray._private.state.actors()), time.monotonic() + 60
    while time.monotonic() < deadline:
        for name, actor in ray._private.state.actors().items():
            if name not in known and "TowerWorker" in actor["ActorClassName"] and actor["State"] == "ALIVE":
                gc.collect()
                os.kill(actor["Pid"], signal.SIGKILL)
                return str(name)
        time.sleep(0.02)
    raise TimeoutError("no tower was started")


def test_layers_of_one_pass_have_a_store_each(indexed: Cafe, tiny_tower: str) -> None:
    command = ("extract", "tiny", "--backbone", tiny_tower, "--layers", "block1/2x2, final,block2", *ALONE)
    output = indexed.succeed(*command, ray=True)
    assert output.count("computed 2 of 2 shards") == 3
    stores = {store.info.key.backbone.partition("#")[2]: store for store in open_stores(indexed, "tiny")}
    assert {layer: store.info.width for layer, store in stores.items()} == {
        "": 24,
        "block1/2x2": 128,
        "block2/1x1": 32,
    }
    assert all(np.isfinite(store.array("pooled")[:]).all() for store in stores.values())
    assert indexed.succeed(*command).count("nothing to do") == 3
    assert "nothing to do" in indexed.succeed("extract", "tiny", "--backbone", f"{tiny_tower}#block1/2x2")


def test_repair_computes_a_damaged_shard_again_and_no_other(alone: Cafe) -> None:
    command = ("extract", "tiny", *FACES, "--shard-rows", "15", "--normalisation", "imagenet")
    store = extract_here(alone, shard_rows=15, normalisation="imagenet")
    before = contents(store.path)
    store.array("pooled")[59] = 0
    receipts = {shard: store.receipts.path(shard).stat().st_mtime_ns for shard in range(4)}
    assert "nothing to do" in alone.succeed(*command)
    (store.path / "store.zarr" / "label" / "zarr.json").unlink()
    name = f"tiny/{store.path.name}"
    output = alone.succeed("store", "repair", "tiny", "--num-cpus", "1")
    assert f"{name}: 2 damaged files written again, computed 1 shards" in output
    assert contents(store.path) == before
    written = [shard for shard in range(4) if store.receipts.path(shard).stat().st_mtime_ns != receipts[shard]]
    assert written == [3]
    store.receipts.discard({2})  # as a repair leaves it that is interrupted before it computes
    assert f"{name}: 0 damaged files written again, computed 1 shards" in alone.succeed("store", "repair", "tiny")
    assert contents(store.path) == before
    assert f"{name}: nothing to do" in alone.succeed("store", "repair", "tiny")


def test_every_bad_file_is_named_with_its_reason_and_the_rest_is_kept(tmp_path: Path) -> None:
    cafe, faces = Cafe(tmp_path / "work", ""), draw_faces(tmp_path / "faces", per_class=4)
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "JPEG")
    (faces / "anger" / "truncated.jpg").write_bytes(buffer.getvalue()[:1500])
    (faces / "anger" / "text.png").write_text("no picture")
    (faces / "anger" / "empty.jpg").touch()
    Image.fromarray(noise).convert("CMYK").save(faces / "anger" / "cmyk.jpg")
    Image.fromarray(np.full((9, 9), 40000, np.uint16)).save(faces / "anger" / "deep.png")
    Image.new("RGB", (1, 1)).save(faces / "anger" / "pixel.png")
    Image.new("RGB", (8, 8)).save(
        faces / "anger" / "moving.gif", save_all=True, append_images=[Image.new("RGB", (8, 8), 9)]
    )

    indexed = cafe("data", "index", "folder", str(faces), "--name", "odd")
    assert indexed.exit_code == 1
    broken = "2 broken files, left out:\n  anger/empty.jpg: file is empty\n  anger/text.png: not an image"
    assert broken in indexed.output

    command = ("extract", "odd", *FACES, "--num-cpus", "1")
    result = cafe(*command)
    assert result.exit_code == 1
    assert "1 of 17 images of 'odd' are unreadable, more than --max-skipped 0" in result.output
    assert "anger/truncated.jpg: damaged image" in result.output
    store = open_store(cafe, "odd")
    assert store.pending() == []  # everything computed was kept
    bad = list(store.array("sample_id")[:]).index("anger/truncated.jpg")
    assert store.receipts.valid().tolist() == [row != bad for row in range(17)]
    assert np.isfinite(store.array("pooled")[:][store.receipts.valid()]).all()
    assert np.isnan(store.array("pooled")[bad]).all()
    assert "1 unreadable images left out" in cafe.succeed(*command, "--max-skipped", "1")


def test_a_fault_of_the_storage_leaves_its_shard_undone_and_no_other(indexed: Cafe) -> None:
    command = ("extract", "tiny", *FACES, "--shard-rows", "15", *ALONE)
    picture = indexed.workspace.parent / "faces" / "happiness" / "003.png"
    content = picture.read_bytes()
    picture.unlink()
    picture.symlink_to(picture)  # opening it is an error of the file system
    result = indexed(*command, ray=True)
    assert result.exit_code == 1
    assert "1 of 4 shards could not be computed; all others are kept: give the same command again." in result.output
    assert f"{picture} cannot be read (Too many levels of symbolic links)" in result.output
    store = open_store(indexed, "tiny")
    assert store.pending() == [1]
    picture.unlink()
    picture.write_bytes(content)
    assert extract_here(indexed, shard_rows=15).path == store.path
    assert store.pending() == []
    assert store.receipts.valid().all()


def test_decoding_ahead_changes_nothing(indexed: Cafe) -> None:
    indexed.succeed("data", "index", "folder", str(indexed.workspace.parent / "faces"), "--name", "twin")
    command = ("extract", "tiny", "twin", *FACES, "--views", "2", "--batch-size", "16", *ALONE)
    indexed.join()
    before = ray._private.state.actors().keys()
    indexed.succeed(*command, "--decoders", "2", ray=True)
    begun = [actor for name, actor in ray._private.state.actors().items() if name not in before]
    assert sum("TowerWorker" in actor["ActorClassName"] for actor in begun) == 1  # for both sets
    ahead, twin = (contents(open_store(indexed, name).path) for name in ("tiny", "twin"))
    pooled = {name for name in ahead if "/pooled/" in name}
    assert {name: ahead[name] for name in pooled} == {name: twin[name] for name in pooled}
    shutil.rmtree(indexed.workspace / "features")
    assert contents(extract_here(indexed, views=2, batch_size=16).path) == ahead  # decodes as it goes


def test_archives_are_extracted_on_the_cluster_as_files_are_and_what_was_skipped_again_where_asked(
    cafe: Cafe, tmp_path: Path
) -> None:
    damaged = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(damaged, "JPEG")
    workspace, files = Workspace.at(str(cafe.workspace)), Workspace.at(str(tmp_path / "files"))
    settings = ExtractSettings(backbone="face-resnet", input_size=64, views=2, shard_rows=5)
    stores = dict[str, tuple[FeatureStore, FeatureStore]]()
    for seed, name in enumerate(("tarred", "zipped", "rows")):  # of other faces each: features are taken over
        faces = draw_faces(tmp_path / name, per_class=3, seed=seed)
        (faces / "anger" / "cut.jpg").write_bytes(damaged.getvalue()[:1500])
        members = read_tree(faces)
        if name == "tarred":
            kind, place = "folder", write_tar(tmp_path / "faces.tar", members)
        elif name == "zipped":
            kind, place = "folder", write_zip(tmp_path / "faces.zip", members)
        else:
            rows = [(path, content, path.partition("/")[0]) for path, content in members.items()]
            kind, place = "table", write_faces(tmp_path / "faces.parquet", rows, EXPRESSIONS)
        index_files(name, DATASETS["folder"](UPath(faces))).manifest.save(files.manifest_path(name))
        cafe.succeed("data", "index", kind, str(place), "--name", name)
        stores[name] = fill_store(workspace, name, settings), fill_store(files, name, settings)
        stores[name][0].receipts.path(
            1
        ).unlink()  # which the cluster computes for the first time, the other shard again
    command = ("extract", *stores, *FACES, "--views", "2", "--shard-rows", "5", "--max-skipped", "1", "--retry-skipped")
    output = cafe.succeed(*command, "--num-actors", "1", ray=True)
    assert output.count("computed 2 of 2 shards, 1 unreadable images left out") == len(stores)
    for name, (archived, whole) in stores.items():
        wanted = whole.array("pooled")[:]
        assert np.isnan(wanted).any(axis=(1, 2)).sum() == 1
        np.testing.assert_array_equal(archived.array("pooled")[:], wanted)
        ((_, reason),) = archived.receipts.skipped_paths(workspace.load_manifest(name))
        assert reason.startswith("damaged image")


def test_one_view_is_the_same_store_whatever_the_policy(alone: Cafe) -> None:
    extract_here(alone)
    command = ("extract", "tiny", *FACES)
    assert "nothing to do" in alone.succeed(*command, "--policy", "clean", "--view-seed", "9")


def test_changed_weights_are_another_store(alone: Cafe, tiny_tower: str, tmp_path: Path) -> None:
    head, _, weights = tiny_tower.partition("@")
    state = torch.load(weights, weights_only=True)
    state["visual.proj"][0, 0] += 1
    torch.save(state, tmp_path / "tuned.pt")
    for file in (weights, tmp_path / "tuned.pt"):
        extract_here(alone, backbone=f"{head}@{file}", input_size=None)
    assert len(find_stores(UPath(alone.workspace / "features"), "tiny")) == 2


def test_real_faces_through_the_real_vit_b32_agree_with_open_clip(real_faces: Path, cafe: Cafe, tmp_path: Path) -> None:
    """The published architecture from a checkpoint saved locally, on six photographs."""
    folder = tmp_path / "some"
    for expression in ("anger", "happiness", "neutral"):
        (folder / expression).mkdir(parents=True)
        for path in sorted((real_faces / "news" / expression).iterdir())[:2]:
            shutil.copy(path, folder / expression)
    torch.manual_seed(0)
    # The text tower, which nothing here reads, as small as it can be.
    text = {"context_length": 8, "vocab_size": 8, "width": 64, "heads": 1, "layers": 1}
    model = open_clip.create_model("ViT-B-32-quickgelu", text_cfg=text).eval()
    torch.save(model.state_dict(), tmp_path / "clip.pt")
    cafe.succeed("data", "index", "folder", str(folder), "--name", "some")
    command = ("extract", "some", "--backbone", f"clip-vit-b32@{tmp_path / 'clip.pt'}", "--dtype", "float32", *ALONE)
    cafe.succeed(*command, "--batch-size", "6", ray=True)  # each batch is filled up
    store = open_store(cafe, "some")
    assert store.info.key.normalisation[0] == (0.485, 0.456, 0.406)  # as published: ImageNet's, not CLIP's
    clean = transforms.Compose([
        transforms.Resize((224, 224)), transforms.ToTensor(), transforms.Normalize(*store.info.key.normalisation),
    ])  # fmt: skip
    images = torch.stack([clean(Image.open(folder / s).convert("RGB")) for s in store.array("sample_id")[:]])
    with torch.no_grad():
        expected = model.encode_image(images).numpy()
    error = np.abs(store.read_view("pooled", 0) - expected).max() / np.abs(expected).max()
    assert error < 1e-3
    assert store.info.width == 512


def test_a_cluster_computes_with_the_code_of_the_command_also_of_a_job(indexed: Cafe, tmp_path: Path) -> None:
    for package in ("cafe", "pipeline", "jobs"):
        shutil.copytree(Path(__file__).parents[1] / package, tmp_path / "code" / package)
    with (tmp_path / "code" / "cafe" / "errors.py").open("a") as file:
        file.write("# other code than the nodes have\n")
    program = [sys.executable, "-m", "cafe.jobs.cli", "--workspace", str(indexed.workspace), "extract", "tiny"]
    program += [*FACES, *ALONE, "--address", indexed.address]
    # As `ray job submit` starts a command; that the job says something else of its workers must not end it.
    job = json.dumps({"runtime_env": {"env_vars": {"OMP_WAIT_POLICY": "ACTIVE"}}, "metadata": {}})
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "code"), "RAY_JOB_CONFIG_JSON_ENV_VAR": job}
    done = subprocess.run(program, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "computed 2 of 2 shards" in done.stdout, done.stderr


# --- mistakes --------------------------------------------------------------------------------------------------------


def test_what_is_wrong_with_layers_is_one_sentence(alone: Cafe, tiny_tower: str) -> None:
    command = ("extract", "tiny", "--backbone")
    assert alone.fail(*command, tiny_tower, "--layers", "block1,head").endswith(
        "Cannot read the layer 'head': write #LAYER/GRID behind the tower, such as #stage3/3x3 or #block8/all."
    )
    assert "#block1 and --layers block2 name layers: use one." in alone.fail(
        *command, f"{tiny_tower}#block1", "--layers", "block2"
    )
    sentence = "Unknown layer of 'open_clip:tiny-cafe-vit' 'block9': choose block1, block2, final."
    assert sentence in alone.fail(*command, f"{tiny_tower}#block9/2x2")
    assert "The map of the layer 'block1' is 4x4" in alone.fail(*command, f"{tiny_tower}#block1/5x5")
    assert "no finer grid" in alone.fail(*command, tiny_tower, "--layers", "final,final/5x5")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("extract", "nothing"), "Unknown manifest 'nothing'"),
        (("extract", "tiny", "--backbone", "resnet"), "Unknown backbone 'resnet': choose clip-vit-b32, face-resnet, "),
        (("extract", "tiny", "--backbone", "open_clip:ViT-B-32@/no/file.pt"), "No weights file at '/no/file.pt'"),
        (("extract", "tiny", "--views", "0"), "0 is not in the range x>=1"),
        (("extract", "tiny", "--policy", "strong"), "'strong' is not one of 'paper', 'scn'"),
    ],
)
def test_a_wrong_call_is_one_sentence_before_ray_starts(alone: Cafe, arguments: tuple[str, ...], message: str) -> None:
    assert message in alone.fail(*arguments)


def test_an_address_without_a_cluster_is_one_sentence(alone: Cafe, tiny_tower: str) -> None:
    message = alone.fail("extract", "tiny", "--backbone", tiny_tower, "--address", "127.0.0.1:1")
    assert "No Ray cluster answers at '127.0.0.1:1'" in message


def test_who_has_no_token_of_a_cluster_or_another_is_told_at_once_and_without_noise(
    ray_address: str, tmp_path: Path
) -> None:
    program = (
        "from cafe.errors import UserError\nfrom cafe.pipeline.cluster import connect\n"
        "from cafe.pipeline.settings import ClusterSettings\n"
        f"try:\n    connect(ClusterSettings({ray_address!r})).__enter__()\n"
        "except UserError as error:\n    print(error)\n"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    environment |= {"HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    begun = [
        subprocess.Popen(
            [sys.executable, "-c", program], env=environment | token, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for token in ({}, {"RAY_AUTH_TOKEN": "0" * 64})
    ]
    said = [b"".join(process.communicate()).decode() for process in begun]  # both streams: there is no other line
    assert said[0] == (
        f"The Ray cluster at {ray_address!r} lets in only who has its token, and this machine has none: copy "
        "~/.ray/auth_token here from its head node.\n"
    )
    assert said[1].startswith(f"The Ray cluster at {ray_address!r} does not accept this machine's token: copy ")
    assert said[1].endswith(" from its head node, and unset RAY_AUTH_TOKEN.\n")


def test_what_cannot_join_a_cluster_is_one_sentence(
    alone: Cafe, tiny_tower: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("extract", "tiny", "--backbone", tiny_tower, "--address")
    assert "Ray Data does not run over Ray Client ('ray://head:10001')" in alone.fail(*command, "ray://head:10001")
    monkeypatch.setattr(psutil, "process_iter", lambda attributes: iter(()))  # as on a laptop beside the cluster
    with socket.create_server(("127.0.0.1", 0)) as head:
        address = f"127.0.0.1:{head.getsockname()[1]}"
        message = f"This machine is no node of the Ray cluster at '{address}': submit the command as a job"
        assert message in alone.fail(*command, address)
