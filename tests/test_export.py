"""An exported run says what the run says: as a graph, as a model again, and in its card."""

from __future__ import annotations

import ast
import io
import json
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import Cafe, complaint, draw_faces
from forked import die_at
from mlflow import MlflowClient
from PIL import Image
from runs import write_predictions, write_run
from trained import begin_run, fill_store, list_networks, ship_run, start_run, train_run
from upath import UPath

import cafe
from cafe.data.alignment import Detection, crop_face
from cafe.data.expressions import EXPRESSIONS, ClassChoice
from cafe.data.indexing import index_files
from cafe.data.readers import DATASETS
from cafe.files import list_folder, write_json
from cafe.inference.graph import Onnx, write_onnx
from cafe.methods import find_method
from cafe.methods.method import Inputs
from cafe.pipeline.models import build_model
from cafe.pipeline.plan import find_deviations, plan_training
from cafe.pipeline.release.export import cut_middle, export_run, halve
from cafe.pipeline.release.library import load_model
from cafe.pipeline.release.pyfunc import Pyfunc, log_model
from cafe.pipeline.release.start import take_over
from cafe.pipeline.runs import RunSpec
from cafe.pipeline.settings import ExportSettings, ExtractSettings, TrainSettings
from cafe.pipeline.tracking.mirror import Mirror, default_uri
from cafe.pipeline.workspace import Workspace
from cafe.records import digest
from cafe.report.card import format_share, write_card
from cafe.results.runs import choose
from cafe.towers.weights import read_tensors, write_tensors
from cafe.views.resizing import Resize

SETTINGS = {"source": "one", "targets": "two", "image_size": 64}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, tiny_tower: str) -> Workspace:
    """Two domains with features of a tiny tower, whose files are the workspace's own."""
    folder = tmp_path_factory.mktemp("export")
    files = [Path(file) for file in tiny_tower.removeprefix("open_clip:").split("@")]
    config, weights = (shutil.copy(file, folder) for file in files)
    workspace = Workspace.at(str(folder / "work"))
    for name, tint in (("one", 0), ("two", 30)):
        root = UPath(draw_faces(folder / name, per_class=16, tint=tint))
        index_files(name, DATASETS["folder"](root)).manifest.save(workspace.manifest_path(name))
        fill_store(workspace, name, ExtractSettings(backbone=f"open_clip:{config}@{weights}", views=2, maps=True))
    return workspace


def faces_of(workspace: Workspace) -> np.ndarray:
    """The predicted faces of the target, (N, 24, 24, 3): all, as the folders came without splits."""
    manifest = workspace.load_manifest("two")
    return np.stack([manifest.read_face(row) for row in manifest.rows("all")])


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_square_pictures_are_resized_as_pillow_does_to_the_last_bit(interpolation: str) -> None:
    random = np.random.default_rng(0)
    for side, size in ((100, 64), (40, 64), (64, 64), (350, 32), (17, 224)):
        picture = random.integers(0, 256, (side, side, 3), np.uint8)
        expected = Image.fromarray(picture).resize((size, size), Image.Resampling[interpolation.upper()])
        resized = Resize(size, interpolation)(torch.from_numpy(picture[None]))[0].permute(1, 2, 0)
        np.testing.assert_array_equal(resized.numpy(), np.asarray(expected))


def test_pictures_that_are_not_square_differ_by_a_grey_level_at_most() -> None:
    picture = np.random.default_rng(1).integers(0, 256, (90, 61, 3), np.uint8)
    expected = np.asarray(Image.fromarray(picture).resize((64, 64), Image.Resampling.BILINEAR)).astype(int)
    resized = Resize(64, "bilinear")(torch.from_numpy(picture[None]))[0].permute(1, 2, 0).numpy()
    assert np.abs(resized - expected).max() <= 1


def check_graph(path: Path, workspace: Workspace, predicted: np.ndarray) -> None:
    """A graph says of the target's faces, together and alone, what was said of them."""
    graph, faces = Onnx(str(path), threads=1), faces_of(workspace)
    np.testing.assert_allclose(graph.predict(faces), predicted, atol=1e-4)
    np.testing.assert_allclose(graph.predict(faces[:1]), predicted[:1], atol=1e-4)


def encode_png(face: np.ndarray) -> bytes:
    """The bytes of a picture's file."""
    content = io.BytesIO()
    Image.fromarray(face).save(content, "PNG")
    return content.getvalue()


# Methods whose graphs are looked at further down, as they are exported.
EXPORTED = ("cafe", "finetune", "linear_probe", "mlp", "nearest_class_mean")
# Methods that are exported as another one: what DANN adds to ERM are the sources' logits, and of training alone.
ALIKE = ("dann",)


@pytest.mark.parametrize("method", sorted(set(list_networks()) - {*EXPORTED, *ALIKE}))
def test_every_method_is_a_graph_that_says_the_same_or_tells_why_not(
    method: str, workspace: Workspace, small_network: str, tmp_path: Path
) -> None:
    overrides = ("mask=features",) if method == "erm" else ()  # for the most layers
    settings = {**SETTINGS, "method": method, "network": small_network, "overrides": overrides}
    if reason := find_method(method).not_exported:
        run = begin_run(workspace, **settings)
        write_json(run / "result.json", {"epochs": 0})
        assert complaint(export_run, workspace, run.name, UPath(tmp_path)).endswith(f"cannot be exported. {reason}")
        return
    run, predicted = start_run(workspace, **settings)
    write_onnx(build_model([run]), str(tmp_path / "model.onnx"))
    check_graph(tmp_path / "model.onnx", workspace, predicted)


@pytest.mark.parametrize("method", ["cafe", "finetune"])
def test_an_exported_folder_is_the_same_model_where_the_towers_own_files_are_gone(
    method: str, workspace: Workspace, small_network: str, tmp_path: Path
) -> None:
    run, predicted = start_run(workspace, method=method, network=small_network, tag="exported", **SETTINGS)
    exported = export_run(workspace, run.name, UPath(tmp_path / "model"))
    assert exported.difference < 1e-4
    check_graph(tmp_path / "model" / "model.onnx", workspace, predicted)
    record = json.loads((tmp_path / "model" / "model.json").read_text())
    assert record["labels"] == ["surprise", "fear", "disgust", "happiness", "sadness", "anger", "neutral"]
    assert (record["origin"]["source"], record["origin"]["seed"]) == ("one", 0)
    assert record["check"]["largest_difference"] == exported.difference
    folder = Path(str(workspace.root)).parent
    files = [*folder.glob("*.pt"), *folder.glob("*.json")]
    assert len(files) == 2
    for file in files:
        file.rename(tmp_path / file.name)
    try:
        assert "No weights file" in complaint(build_model, [run]) or "Cannot read" in complaint(build_model, [run])
        model = build_model([UPath(tmp_path / "model")])
        assert model.name == run.name
        np.testing.assert_allclose(model.predict(list(faces_of(workspace))), predicted, atol=1e-6)
    finally:
        for file in files:
            (tmp_path / file.name).rename(file)


def test_seeds_and_mirror_images_are_averaged_wherever_the_folder_is_used_and_it_is_the_same_twice(
    workspace: Workspace, tmp_path: Path
) -> None:
    runs = [start_run(workspace, method="mlp", tag="several", seed=seed, **SETTINGS)[0] for seed in (0, 1)]
    faces, models = faces_of(workspace), [build_model([run]) for run in runs]
    looks = (faces, np.ascontiguousarray(faces[:, :, ::-1]))
    alone = [model.predict(list(look)) for model in models for look in looks]
    assert max(np.abs(one - alone[0]).max() for one in alone[1:]) > 1e-2
    command = Cafe(Path(str(workspace.root)), "")
    options = ("--ensemble", "--flip", "--weights", "float16")
    said = command.succeed("export", runs[0].name, *options, "--output", str(tmp_path / "model"))
    assert "and weights in half precision change probabilities by at most " in said
    expected = build_model([UPath(tmp_path / "model")]).predict(list(faces))
    np.testing.assert_allclose(expected, np.mean(alone, axis=0), atol=1e-3)  # of half precision
    assert np.abs(expected - np.mean(alone, axis=0)).max() > 0
    np.testing.assert_allclose(load_model(str(tmp_path / "model")).predict(list(faces)), expected, atol=1e-7)
    check_graph(tmp_path / "model" / "model.onnx", workspace, expected)
    assert Onnx(str(tmp_path / "model" / "model.onnx")).session.get_inputs()[0].shape == ["batch", "height", "width", 3]
    (tmp_path / "face.png").write_bytes(content := encode_png(faces[0]))
    records = pd.DataFrame({"image": [content]})
    answer = Pyfunc(UPath(tmp_path / "model")).predict(records)
    np.testing.assert_allclose(answer[list(EXPRESSIONS)].to_numpy(), expected[:1], atol=1e-7)
    rows = command.succeed(
        "predict", str(tmp_path / "model"), str(tmp_path / "face.png"), "--aligned", "--format", "jsonl"
    )
    row = next(json.loads(line) for line in rows.splitlines() if line.startswith("{"))
    np.testing.assert_allclose([row[name] for name in EXPRESSIONS], expected[0], atol=1e-4)

    elsewhere = Workspace.at(str(tmp_path / "elsewhere"))
    shutil.copytree(str(workspace.root), str(elsewhere.root))
    export_run(
        elsewhere, runs[1].name, UPath(tmp_path / "again"), ExportSettings(ensemble=True, flip=True, weights="float16")
    )
    first, second = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("model", "again")
    )
    assert first == second
    for name in first.keys() - {"run.json", "run-2.json", "model.json"}:  # which name the tower as the user did
        assert not re.search(
            str(Path(cafe.__file__).parents[1]).encode() + b"|site-packages|" + str(tmp_path).encode(), first[name]
        )
    for settings in (ExportSettings(ensemble=True, flip=True), ExportSettings()):
        assert "holds other files" in complaint(
            export_run, workspace, runs[0].name, UPath(tmp_path / "model"), settings
        )


def test_a_folder_without_a_graph_is_the_same_model_in_half_the_bytes(
    workspace: Workspace, small_network: str, tmp_path: Path
) -> None:
    run, predicted = start_run(
        workspace, method="ofer", network=small_network, tag="small", **SETTINGS
    )  # of which there is no graph
    said = Cafe(Path(str(workspace.root)), "").succeed("export", run.name, "--no-graph", "--weights", "float16")
    (folder,) = workspace.root.glob("exports/ofer-*-small-*-float16-no-graph")
    assert f"Wrote {folder}: on 32 faces weights in half precision change probabilities by at most " in said
    assert not (folder / "model.onnx").exists()
    sizes = [(place / "model.safetensors").stat().st_size for place in (folder, run)]
    assert sizes[0] < 0.51 * sizes[1]
    np.testing.assert_allclose(build_model([folder]).predict(list(faces_of(workspace))), predicted, atol=1e-2)


def test_half_precision_is_for_weights_that_it_can_hold_alone() -> None:
    method = find_method("linear_probe")(find_method("linear_probe").recipe_type(features="standardised"), Inputs(3))
    method.load_state_dict(
        {"standardise.std": torch.tensor([1.0, torch.inf, 2.0]), "classifier.bias": torch.full((7,), 7e4)}, strict=False
    )
    halved = halve(method)
    assert {name: str(value.dtype) for name, value in halved.items()} == {
        "standardise.mean": "torch.float32", "standardise.std": "torch.float32",
        "classifier.weight": "torch.float16", "classifier.bias": "torch.float32",
    }  # fmt: skip


def test_what_cannot_be_exported_is_said_before_anything_is_written(workspace: Workspace, tmp_path: Path) -> None:
    run, _ = start_run(workspace, method="linear_probe", **SETTINGS)
    (tmp_path / "photo.jpg").write_bytes(b"")
    assert "holds other files" in complaint(export_run, workspace, run.name, UPath(tmp_path))
    alone = complaint(export_run, workspace, run.name, UPath(tmp_path / "model"), ExportSettings(ensemble=True))
    assert "has no other finished seed to average" in alone
    (run / "result.json").rename(run / "kept.json")
    assert "is not trained to its end" in complaint(export_run, workspace, run.name, UPath(tmp_path / "model"))
    (run / "kept.json").rename(run / "result.json")
    assert not (tmp_path / "model").exists()


def test_an_export_goes_on_where_it_was_and_replaces_nothing_else(workspace: Workspace, tmp_path: Path) -> None:
    run, _ = start_run(workspace, method="linear_probe", tag="begun", **SETTINGS)
    other, _ = start_run(workspace, method="linear_probe", tag="other", **SETTINGS)
    before = {path: path.read_bytes() for path in Path(str(other)).rglob("*") if path.is_file()}
    assert "holds other files" in complaint(export_run, workspace, run.name, other)
    assert {path: path.read_bytes() for path in Path(str(other)).rglob("*") if path.is_file()} == before
    folder, settings = UPath(tmp_path / "model"), ExportSettings(graph=False)  # which is a file like others, and slow
    export_run(workspace, run.name, folder, settings)
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert not {".export", ".export.json"} & whole.keys()
    assert "holds other files" in complaint(export_run, workspace, other.name, folder, settings)

    def be_killed() -> None:
        die_at("*/.export/README.md")
        export_run(workspace, run.name, folder, settings)

    killed = get_context("fork").Process(target=be_killed)
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    assert {path.name: path.read_bytes() for path in list_folder(folder)} == whole
    assert (folder / ".export.json").exists()
    assert (folder / ".export" / "model.safetensors").exists()
    assert "holds other files" in complaint(export_run, workspace, other.name, folder, settings)
    export_run(workspace, run.name, folder, settings)
    assert {path.name for path in folder.iterdir()} == whole.keys()


def test_the_card_holds_the_scores_of_every_domain_with_intervals(tmp_path: Path) -> None:
    assert format_share(5, 10) == "50.0 (23.7–76.3)"  # Wilson: Agresti and Coull's example of 1998 is the like
    assert format_share(0, 0) == "–"
    workspace = Workspace.at(str(tmp_path))
    labels = np.arange(70) % 7
    for seed, wrong in ((0, 35), (1, 0)):
        run = write_run(workspace, seed=seed, source_kind="folder")
        write_predictions(run, "fer", labels, np.where(np.arange(70) < wrong, (labels + 1) % 7, labels))
    one, two = workspace.read_runs()
    record = {
        "input": {"name": "faces"},
        "output": {"name": "probabilities"},
        "averaged": {"seeds": [0], "mirror_images": False},
    }
    record |= {"check": {"faces": 32, "largest_difference": 2e-7}}
    card = write_card([one], [one, two], {}, record).decode()
    assert (
        "**Unseen data sets: 50.0 / 100.0 % (mean ± 95 % t-interval over 2 seeds; 63.7–83.7 over 70 faces) on fer"
        in card
    )
    assert "where the largest classes have 14.3 % of the faces.**" in card
    assert f"| fer | unseen | 70 | 14.3 | {format_share(35, 70)} | {format_share(5, 10)} |" in card
    assert (
        "| macro-F1 | worst-class recall | AUROC | NLL (nats) | Brier score (from 0 to 2) | ECE | AURC | 80% of" in card
    )
    (trusted,) = (line for line in card.splitlines() if line.startswith("| fer | ") and "unseen" not in line)
    # One in two wrong with certainty: a Brier score of 2 and minus ln 1e-12 each; which half is surest nothing says.
    assert trusted == "| fer | 50.0 | 50.0 | 70.8 | 13.82 | 1.000 | 50.0 | 50.0 | 50.0 | 50.0 | 50.0 |"
    assert "AUROC: the area under the ROC curve" in card
    assert "the graph's probabilities differ from PyTorch's by at most 2.0e-07" in card
    card = write_card([one], [one, two], {"fer": "another"}, record).decode()
    names = f"{one.name}, {two.name}"
    why = "evaluated on another manifest than the one that the workspace has now"
    assert f"Left out: 2 predictions of 2 runs, {names}, on fer (clean), {why}." in card
    assert "| fer |" not in card


def test_the_card_of_an_average_holds_its_own_scores(tmp_path: Path) -> None:
    workspace, labels = Workspace.at(str(tmp_path)), np.arange(70) % 7
    for seed, confidence in ((0, 0.6), (1, 0.9)):  # the first is wrong on half of the faces, and the second outvotes it
        run = write_run(workspace, seed=seed, source_kind="folder")
        for protocol, wrong in (("clean", (35, 0)), ("clean-flip", (35, 10))):
            predicted = np.where(np.arange(70) < wrong[seed], (labels + 1) % 7, labels)
            write_predictions(run, "fer", labels, predicted, protocol=protocol, confidence=confidence)
    runs = workspace.read_runs()
    record = {"input": {"name": "faces"}, "output": {"name": "probabilities"}}
    record |= {"check": {"faces": 32}, "averaged": {"seeds": [0, 1], "mirror_images": True}}
    average = "mean of 2 seeds, the mean over each face and its mirror image"
    card = write_card(runs, runs, {}, record).decode()
    assert f"with seeds 0, 1.\nIts probabilities are the {average}: whoever loads this folder gets that" in card
    assert f"The {average}; percent of faces recognised" in card
    assert f"| fer | unseen | 70 | 14.3 | {format_share(60, 70)} |" in card
    shutil.rmtree(str(runs[1].folder / "predictions" / "clean-flip"))
    card = write_card(runs, runs, {}, record).decode()
    assert "The mean of 2 seeds; percent of faces recognised" in card
    assert f"| fer | unseen | 70 | 14.3 | {format_share(70, 70)} |" in card
    assert "Mirror images were not averaged here" in card


def test_seeds_of_one_fold_are_averaged_and_not_those_of_others(tmp_path: Path) -> None:
    workspace = Workspace.at(str(tmp_path))
    for fold in ("news", "cinema"):
        for seed in (0, 1):
            run = write_run(workspace, source=f"raf+{fold}", seed=seed, fold=fold)
            write_json(run / "result.json", {"epochs": 2})
    runs = workspace.read_runs()
    assert len({run.group for run in runs}) == 1
    chosen, reason = choose(runs, name="cafe-raf+news-s0", ensemble=True)
    assert [(run.fold, run.seed) for run in chosen] == [("news", 0), ("news", 1)]
    assert reason.endswith("averaged over 2 seeds")


def test_the_middle_square_of_a_picture_is_cut() -> None:
    picture = np.arange(4 * 7).reshape(4, 7, 1).repeat(3, axis=2)
    np.testing.assert_array_equal(cut_middle(picture), picture[:, 1:5])


def test_the_command_says_how_well_the_graph_agrees(workspace: Workspace, tmp_path: Path) -> None:
    run, predicted = start_run(workspace, method="mlp", **SETTINGS)
    said = Cafe(Path(str(workspace.root)), "").succeed("export", run.name, "--output", str(tmp_path / "model"))
    assert said.startswith(f"Wrote {tmp_path / 'model'}: on 32 faces the graph differs from PyTorch by at most ")
    assert {path.name for path in (tmp_path / "model").iterdir()} == {
        "README.md", "model.json", "model.onnx", "model.safetensors", "run.json", "tiny-cafe-vit.json", "tower.safetensors",
    }  # fmt: skip
    check_graph(tmp_path / "model" / "model.onnx", workspace, predicted)

    card = (tmp_path / "model" / "README.md").read_text()
    (snippet,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    photo = np.asarray(Image.fromarray(faces_of(workspace)[0]).resize((400, 300)))
    Image.fromarray(photo).save(tmp_path / "model" / "photo.jpg", "PNG")
    (points,) = re.findall(r"points = np.array\((.*)\)", snippet)
    eyes, (nose, *mouth) = np.split(np.array(ast.literal_eval(points)), [2])
    face = crop_face(photo, Detection((0, 0, 1, 1), eyes, np.mean(mouth, axis=0), 1.0, nose), 224)
    assert (face[:, 0] == face[:, 1]).mean() < 0.9  # the crop is not all border
    expected = build_model([run]).predict([face])
    said = run_without_us(snippet, tmp_path / "model", tmp_path / "packages")
    assert list(said) == list(EXPRESSIONS)
    np.testing.assert_allclose([*said.values()], expected[0], atol=1e-5)


def run_without_us(snippet: str, folder: Path, packages: Path) -> dict[str, float]:
    """What a snippet prints in a folder, in a process that can import NumPy, Pillow and ONNX Runtime alone."""
    packages.mkdir()
    installed = Path(np.__file__).parents[1]
    for name in ("numpy", "numpy.libs", "PIL", "pillow.libs", "onnxruntime"):
        if (installed / name).exists():
            (packages / name).symlink_to(installed / name)
    command = [sys.executable, "-S", "-c"]
    about = {"cwd": folder, "env": {"PYTHONPATH": str(packages)}, "capture_output": True, "text": True, "check": False}
    for name in ("torch", "cafe"):
        assert "ModuleNotFoundError" in subprocess.run([*command, f"import {name}"], **about).stderr
    ran = subprocess.run([*command, snippet], **about)
    assert ran.returncode == 0, ran.stderr
    said: dict[str, float] = json.loads(ran.stdout)
    return said


def test_a_training_goes_on_from_the_weights_of_an_exported_model(workspace: Workspace, tmp_path: Path) -> None:
    run, _ = start_run(workspace, method="mlp", seed=3, overrides=("features=standardised",), **SETTINGS)
    state = read_tensors(run / "model.safetensors", "")
    state |= {"standardise.mean": torch.full((24,), 0.25), "standardise.std": torch.full((24,), 2.0)}
    write_tensors(run / "model.safetensors", state)
    folder = str(ship_run(run, tmp_path / "model"))
    plain = TrainSettings(source="two", start=folder, targets="one,two", overrides=("learning_rate=0",), epochs=1)
    settings = take_over(workspace, plain, {"overrides", "targets", "epochs"})
    assert (settings.method, settings.selection, settings.image_size) == ("mlp", "source_val", 64)
    assert settings.overrides == ("features=standardised", "learning_rate=0")
    trained = train_run(workspace, **{**vars(settings), "selection": "final"})
    for name, values in read_tensors(trained / "model.safetensors", "").items():  # all holds still
        torch.testing.assert_close(values, state[name], rtol=0, atol=0)
    spec = RunSpec.load(trained)
    assert spec.start == digest((tmp_path / "model" / "model.safetensors").read_bytes())
    assert [source.name for source in spec.trained_on] == ["two", "one"]
    (there,) = [one for one in workspace.read_runs() if one.name == trained.name]
    relations = {column.name: there.relation(column, "folder", "") for column in there.load_predictions("clean")}
    assert relations == {"one": "source", "two": "source"}
    assert (there.settings["start"], there.not_as_published) == (spec.start[:8], ())
    assert find_deviations(spec)[0] == f"start={spec.start[:8]}"
    alone = plan_training(workspace, replace(settings, start="", selection="final")).spec
    assert replace(spec, start="", start_sources=()) == alone  # which therefore has another name
    assert alone.name != spec.name


def test_a_start_that_does_not_fit_is_refused_in_one_sentence(workspace: Workspace, tmp_path: Path) -> None:
    run, _ = start_run(workspace, method="mlp", tag="fit", **SETTINGS)
    mean, _ = start_run(workspace, method="nearest_class_mean", **SETTINGS)
    settings = TrainSettings(start=run.name, source="two", targets="none", method="mlp", image_size=64)
    for changes, part in (
        ({"start": mean.name}, "is not trained in epochs"),
        ({"start": "nothing"}, "Unknown run 'nothing'"),
        ({"overrides": ("hidden=7",)}, "leave out what changes the size of its head"),
    ):
        assert part in complaint(plan_training, workspace, replace(settings, **changes))
    assert "is of the method mlp" in complaint(take_over, workspace, replace(settings, method="cafe"), {"method"})
    listing = DATASETS["folder"](UPath(draw_faces(tmp_path / "wards"))).select(ClassChoice(None))
    index_files("wards", listing).manifest.save(workspace.manifest_path("wards"))
    missing = complaint(plan_training, workspace, replace(settings, source="wards"))
    assert "There are no features of 'wards' as the start" in missing
    assert re.search(r"run `cafe extract wards --backbone '.+' --views 2 --input-size 32`", missing)
    name = RunSpec.load(run).backbone
    assert name
    fill_store(workspace, "wards", ExtractSettings(backbone=name, views=2, maps=True))
    refused = complaint(plan_training, workspace, replace(settings, source="wards"))
    assert "'wards' has the classes happiness, sadness, anger and the start" in refused


def test_models_of_runs_that_were_trained_before_are_logged_once(workspace: Workspace) -> None:
    for name in workspace.run_names():
        shutil.rmtree(str(workspace.run_path(name)))
    kept, predicted = start_run(workspace, method="nearest_class_mean", **SETTINGS)
    broken, _ = start_run(workspace, method="mlp", **SETTINGS)
    (broken / "result.json").unlink()
    for _ in range(2):
        said = Cafe(Path(str(workspace.root)), "").succeed("mlflow", "sync", "--models")
        assert f"No model of {broken.name}: The run {broken.name!r} is not trained to its end" in said
        assert "It holds the models of 1 of them." in said
    client = MlflowClient(default_uri(workspace))
    experiment = client.get_experiment_by_name("cafe")
    (logged,) = client.search_logged_models([experiment.experiment_id])
    assert logged.tags["cafe.run"] == kept.name
    check_graph(Path(str(workspace.root)) / "exports" / kept.name / "model.onnx", workspace, predicted)
    log_model(Mirror(workspace), kept, workspace.root / "exports" / kept.name, "faces")
    assert "model card" in client.get_registered_model("faces").description
    client.update_registered_model("faces", "Ours.")
    log_model(Mirror(workspace), kept, workspace.root / "exports" / kept.name, "faces")
    assert client.get_registered_model("faces").description == "Ours."


def test_the_run_to_ship_is_chosen_by_held_out_faces_of_the_source_and_not_by_a_target(tmp_path: Path) -> None:
    workspace, labels = Workspace.at(str(tmp_path)), np.arange(70) % 7
    for seed, (held_out, wrong) in enumerate([(0.7, 0), (0.8, 70)]):  # the better one is wrong on all of the target
        run = write_run(workspace, seed=seed, source_kind="folder", selection="source_val")
        write_predictions(run, "fer", labels, np.where(np.arange(70) < wrong, (labels + 1) % 7, labels))
        write_json(run / "result.json", {"epochs": 2, "selected": 2})
        write_json(run / "epochs" / "0002.json", {"selection/accuracy": held_out})
    said = Cafe(tmp_path, "").succeed("compare", "--best", "source_val")
    (line,) = [line for line in said.splitlines() if line.startswith("To ship: ")]
    assert run.name in line
    assert "80.0% on held-out faces of raf, the best of 2 runs" in line
    assert line.endswith(f"no target's score was looked at: cafe export {run.name}")
