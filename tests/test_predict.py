"""`cafe predict`: every face of photos and videos becomes a row, whatever else lies among them."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import weakref
from collections.abc import Iterator
from dataclasses import asdict, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from conftest import COLOURS, Cafe, complaint, draw_faces
from PIL import Image, ImageColor, ImageFilter
from runs import write_predictions
from scipy import ndimage
from test_addresses import CountingServer
from trained import fill_store, ship_run, start_run
from upath import UPath

from cafe.data.alignment import Detection, align_faces
from cafe.data.expressions import EXPRESSIONS
from cafe.data.indexing import index_files
from cafe.data.readers import DATASETS
from cafe.files import remove_leftovers, write_json
from cafe.inference import frames
from cafe.inference.annotation import choose_colours, place_copies, write_video
from cafe.inference.annotation import draw_faces as draw_boxes
from cafe.inference.frames import Frame, count_frames, read_video
from cafe.inference.graph import Onnx, write_onnx
from cafe.inference.model import Model
from cafe.inference.output import FORMATS, OWN, build_schema, list_rows, name_columns
from cafe.inference.quality import Quality, measure_quality, measure_sharpness, measure_turn
from cafe.inference.recognition import HELD_FACES, SEARCHED, PredictedFace, Search, predict_frames
from cafe.jobs.cli import main
from cafe.methods import METHODS
from cafe.methods.method import Inputs
from cafe.outputs import check_replaced
from cafe.pipeline.evaluate import check_option, evaluate_target
from cafe.pipeline.faces import choose_targets
from cafe.pipeline.models import build_model
from cafe.pipeline.release import shipped
from cafe.pipeline.release.adoption import adopt, specify_export
from cafe.pipeline.release.confidence import Home, choose_threshold, measure_home, read_confidence
from cafe.pipeline.release.prediction import _stamp
from cafe.pipeline.release.prediction import predict as predict_faces
from cafe.pipeline.runs import check_identity
from cafe.pipeline.settings import ExtractSettings
from cafe.pipeline.workspace import Workspace
from cafe.results.predictions import Predictions
from cafe.results.runs import choose
from cafe.results.significance.statistics import wilson
from cafe.seals import read_sealed, verify_file, write_sealed
from cafe.synthetic.domains import render
from cafe.views.drawing import ViewPlan

MEADOW = (96, 120, 96)
CHOSEN = {0: 0.5, 1: 0.75}  # seed: accuracy on held-out faces of the source


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory, tiny_tower: str) -> Cafe:
    """A workspace with runs of a linear probe: one as it is, and two seeds selected on held-out faces."""
    cafe = Cafe(tmp_path_factory.mktemp("work"), address="")
    workspace = Workspace.at(str(cafe.workspace))
    root = UPath(draw_faces(cafe.workspace / "faces", per_class=16))
    index_files("one", DATASETS["folder"](root)).manifest.save(workspace.manifest_path("one"))
    fill_store(workspace, "one", ExtractSettings(backbone=tiny_tower, views=2))
    settings = {"source": "one", "targets": "one", "method": "linear_probe", "epochs": 1}
    start_run(workspace, "plain", tag="plain", **settings)
    for seed, accuracy in CHOSEN.items():
        run, _ = start_run(workspace, "table", seed=seed, selection="source_val", **settings)
        write_json(run / "result.json", {"epochs": 2, "selected": 1})
        for epoch, found in ((1, accuracy), (2, 0.25)):
            write_json(run / "epochs" / f"{epoch:04d}.json", {"selection/accuracy": found})
    return cafe


def runs_of(command: Cafe, experiment: str) -> list[UPath]:
    folders = sorted(UPath(command.workspace / "runs").iterdir(), key=lambda path: path.name)
    return [folder for folder in folders if (folder / "experiments" / f"{experiment}.json").exists()]


def answer(command: Cafe, *arguments: str, code: int = 0, stdin: str | None = None) -> tuple[list[dict[str, Any]], str]:
    """Run `cafe predict … --format jsonl`; return the rows and what it says beside them."""
    words = ["--workspace", str(command.workspace), "predict", *arguments, "--format", "jsonl"]
    result = CliRunner().invoke(main, words, input=stdin)
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    return [json.loads(line) for line in result.stdout.splitlines()], result.stderr


def shares(rows: list[dict[str, Any]]) -> np.ndarray:
    return np.array([[row[name] for name in EXPRESSIONS] for row in rows])


def album(root: Path) -> list[np.ndarray]:
    """Four crops in folders, one behind a link; returns them in the order in which they are found."""
    pictures = []
    for number, (place, colour) in enumerate(zip(("a/1.png", "a/b/2.png", "c/3.png"), COLOURS.values(), strict=True)):
        pixels = np.random.default_rng(number).normal(colour, 30, (40, 30, 3)).clip(0, 255).astype(np.uint8)
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(root / place)
        pictures.append(pixels)
    (root / "a" / "notes.txt").write_text("no picture")
    (root / "linked").symlink_to(root / "a" / "b")
    return [*pictures, pictures[1]]


def drawn_face(number: int, side: int = 200) -> Image.Image:
    return Image.fromarray(render(0, "studio", number, 3 * number % 7, 0)).resize((side, side))


def photo(*places: tuple[int, int], size: tuple[int, int] = (640, 400)) -> Image.Image:
    """Drawn faces of 200 pixels at some places (left, top) on a plain ground."""
    picture = Image.new("RGB", size, MEADOW)
    for number, place in enumerate(places):
        picture.paste(drawn_face(number), place)
    return picture


def walk(place: Path, seconds: int = 2, rate: int = 10) -> None:
    """Write a video of a face that moves to the right by 100 pixels a second."""
    with write_video(UPath(place), (640, 400), Fraction(rate)) as show:
        for number in range(seconds * rate):
            show(photo((20 + 100 * number // rate, 100)), number / rate)


def test_folders_patterns_links_and_standard_input_give_the_models_probabilities(command: Cafe, tmp_path: Path) -> None:
    pictures = album(tmp_path)
    (run,) = runs_of(command, "plain")
    expected = build_model([run]).predict(pictures)
    rows, said = answer(command, "linear_probe-one-s0-plain", str(tmp_path), "--aligned")
    names = [str(Path(row["file"]).relative_to(tmp_path)) for row in rows]
    assert names == ["a/1.png", "a/b/2.png", "c/3.png", "linked/2.png"]
    np.testing.assert_allclose(shares(rows), expected, atol=2e-6)
    assert [row["expression"] for row in rows] == [EXPRESSIONS[best] for best in expected.argmax(axis=1)]
    assert (rows[0]["left"], rows[0]["top"], rows[0]["width"], rows[0]["height"]) == (0, 0, 30, 40)
    assert (rows[0]["small"], rows[0]["turned"], rows[0]["error"], rows[0]["time"]) == (True, None, None, None)
    assert f"Model {run.name}." in said
    assert "4 faces in 4 photos" in said
    listed, _ = answer(
        command, run.name, "-", "--aligned", stdin=f"{tmp_path}/c/3.png\n\n{tmp_path}/a/*.png\n{tmp_path}/c\n"
    )
    assert [Path(row["file"]).name for row in listed] == ["3.png", "1.png"]


def test_faces_are_averaged_with_their_mirror_images_on_request(command: Cafe, tmp_path: Path) -> None:
    pictures = album(tmp_path)
    (run,) = runs_of(command, "plain")
    model = build_model([run])
    plain, mirrored = (model.predict([face[:, ::step] for face in pictures]) for step in (1, -1))
    assert np.abs(plain - mirrored).max() > 1e-4
    rows, _ = answer(command, run.name, str(tmp_path), "--aligned", "--flip")
    np.testing.assert_allclose(shares(rows), (plain + mirrored) / 2, atol=2e-5)


@pytest.mark.parametrize("name", ["rows.csv", "rows.parquet", "rows.jsonl", "rows.json", "rows.txt"])
def test_a_file_of_every_format_holds_the_same_rows(name: str, command: Cafe, tmp_path: Path) -> None:
    album(tmp_path / "album")
    (tmp_path / "album" / "torn.jpg").write_bytes(b"\xff\xd8\xff no picture")
    plain = ("linear_probe-one-s0-plain", str(tmp_path / "album"), "--aligned")
    rows, _ = answer(command, *plain)
    assert command("predict", *plain, "--output", str(tmp_path / name)).exit_code == 0
    content = (tmp_path / name).read_bytes()
    if name.endswith("txt"):
        lines = content.decode().splitlines()[1:]
        assert [line.split()[0] for line in lines] == [row["expression"] or "–" for row in rows]
        assert lines[-1].endswith("torn.jpg: not an image of a known format")
        return
    found: list[dict[str, Any]]
    if name.endswith("csv"):
        found = list(csv.DictReader(io.StringIO(content.decode())))
    elif name.endswith("parquet"):
        found = pq.read_table(tmp_path / name).to_pylist()
    elif name.endswith("json"):
        found = json.loads(content)
    else:
        found = [json.loads(line) for line in content.splitlines()]
    assert [set(row) for row in found] == [set(row) for row in rows]
    assert [(row["file"], row["error"] or None) for row in found] == [(row["file"], row["error"]) for row in rows]
    np.testing.assert_allclose(shares(found[:-1]).astype(float), shares(rows[:-1]), atol=2e-6)


def test_every_face_of_a_photo_is_found_aligned_and_predicted_and_what_has_none_says_why(
    command: Cafe, tmp_path: Path
) -> None:
    photo((30, 60), (400, 150)).save(tmp_path / "two.png")
    Image.new("RGB", (80, 80), MEADOW).save(tmp_path / "meadow.png")
    (tmp_path / "torn.png").write_bytes((tmp_path / "two.png").read_bytes()[:2000])
    rows, said = answer(command, "linear_probe-one-s0-plain", str(tmp_path))
    assert [(Path(row["file"]).name, row["face"]) for row in rows] == [
        ("meadow.png", None), ("torn.png", None), ("two.png", 0), ("two.png", 1),
    ]  # fmt: skip
    assert rows[0]["error"] == "no face found"
    assert rows[1]["error"].startswith("damaged image")
    faces = sorted(rows[2:], key=lambda row: row["left"])
    for face, (left, top) in zip(faces, ((30, 60), (400, 150)), strict=True):
        middle = face["left"] + face["width"] / 2, face["top"] + face["height"] / 2
        assert middle == pytest.approx((left + 100, top + 100), abs=40)
        assert face["confidence"] > 0.9
    (run,) = runs_of(command, "plain")
    [aligned] = align_faces([np.asarray(photo((30, 60), (400, 150)))], every_face=True)
    np.testing.assert_allclose(shares(rows[2:]), build_model([run]).predict(aligned.crops), atol=1e-4)
    assert "2 faces in 2 photos" in said
    assert "Pictures without a face: 1.\nPictures with several faces: 1.\n" in said
    assert "torn.png: damaged image" in said


def test_a_video_is_looked_at_in_its_rate_and_its_annotated_copy_shows_the_boxes(command: Cafe, tmp_path: Path) -> None:
    walk(tmp_path / "walk.mp4")
    rows, said = answer(
        command,
        "linear_probe-one-s0-plain",
        str(tmp_path / "walk.mp4"),
        "--rate",
        "2",
        "--annotate",
        str(tmp_path / "shown"),
    )
    assert [(row["frame"], row["time"]) for row in rows] == [(0, 0.0), (5, 0.5), (10, 1.0), (15, 1.5)]
    places = np.array([row["left"] for row in rows])
    assert np.diff(places) == pytest.approx([50, 50, 50], abs=12)
    assert "4 faces in 4 frames" in said
    place_copies([UPath(tmp_path / "walk.mp4")], UPath(tmp_path / "shown"))  # it knows its own copy
    with av.open(str(tmp_path / "shown" / "walk.mp4")) as container:
        assert container.streams.video[0].average_rate == 10
        frames = [(frame.time, frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    assert [time for time, _ in frames] == pytest.approx([number / 10 for number in range(20)])
    for number, (_, pixels) in enumerate(frames):
        row = rows[number // 5]  # a box holds until the next one
        edge = pixels[row["top"] + 5 : row["top"] + row["height"] - 5, row["left"]]
        assert np.abs(edge.astype(int) - MEADOW).max(axis=1).min() > 40  # the box is drawn there


def test_annotated_pictures_keep_their_places_and_never_overwrite_originals(command: Cafe, tmp_path: Path) -> None:
    album(tmp_path / "album")
    Image.open(tmp_path / "album" / "c" / "3.png").save(tmp_path / "album" / "c" / "3.bmp")
    arguments = ("predict", "linear_probe-one-s0-plain", str(tmp_path / "album"), "--aligned", "--annotate")
    command.succeed(*arguments, str(tmp_path / "shown"))
    copies = sorted(str(path.relative_to(tmp_path / "shown")) for path in (tmp_path / "shown").rglob("*.*"))
    assert copies == ["a/1.png", "a/b/2.png", "c/3.bmp.jpg", "c/3.png", "linked/2.png"]
    assert (
        np.asarray(Image.open(tmp_path / "shown" / "c" / "3.png"))
        != np.asarray(Image.open(tmp_path / "album" / "c" / "3.png"))
    ).any()
    assert "would overwrite" in command.fail(*arguments, str(tmp_path / "album"))
    photo = tmp_path / "album" / "c" / "3.bmp"
    before = photo.read_bytes()
    assert "would overwrite a picture" in command.fail(*arguments[:-1], "--format", "csv", "--output", str(photo))
    assert photo.read_bytes() == before
    command.succeed(*arguments, str(tmp_path / "shown"))  # in place of its own copies
    (tmp_path / "shown" / "a" / "1.png").write_bytes(before)
    assert "a/1.png is there already" in command.fail(*arguments, str(tmp_path / "shown"))


def test_a_copy_stays_in_its_folder_however_its_file_was_named(tmp_path: Path) -> None:
    for name in ("a/b/1.jpg", "other/x.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9)).save(tmp_path / name)
    files, shown = (
        [UPath(tmp_path / "a/b/1.jpg"), UPath(f"{tmp_path}/a/b/../../other/x.jpg")],
        UPath(tmp_path / "shown"),
    )
    assert list(place_copies(files, shown).values()) == [shown / "a/b/1.jpg", shown / "other/x.jpg"]
    shown.mkdir()
    (shown / "other").symlink_to(tmp_path / "a")
    assert "is a link that leads out of" in complaint(place_copies, files, shown)


def test_a_video_of_larger_pictures_than_photos_may_have_is_not_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    walk(tmp_path / "walk.mp4")
    monkeypatch.setattr(frames, "MAX_PIXELS", 1000)
    (frame,) = read_video(UPath(tmp_path / "walk.mp4"), math.inf)
    assert frame.error.endswith("pixels are more than 1,000")


def test_no_name_of_a_file_is_a_formula_in_a_spreadsheet() -> None:
    sink = io.BytesIO()
    with FORMATS["csv"](sink, EXPRESSIONS) as write:
        write([dict.fromkeys(build_schema(EXPRESSIONS).names) | {"file": name} for name in ("=1+1.jpg", "a=1.jpg")])
    assert [line.split(",")[0] for line in sink.getvalue().decode().splitlines()[1:]] == ["./=1+1.jpg", "a=1.jpg"]


@pytest.mark.parametrize("form", FORMATS)
def test_rows_take_the_place_of_rows_alone(form: str, tmp_path: Path) -> None:
    place = UPath(tmp_path / "rows")
    place.write_bytes(b"")
    check_replaced(place, "--output", OWN[form])
    with place.open("wb") as file, FORMATS[form](file, EXPRESSIONS) as write:
        values = dict.fromkeys(build_schema(EXPRESSIONS).names)
        write([values | {"file": "a.jpg", "time": None, "error": "no face found"}])
    check_replaced(place, "--output", OWN[form])
    for other in (b"file;expression", b"{}", b"expression of faces", b"PAR1", b"\xff\xd8\xff"):
        place.write_bytes(other)
        assert "rows is there already, and is nothing that this" in complaint(
            check_replaced, place, "--output", OWN[form]
        )
    pq.write_table(pa.table({"file": ["a"]}), str(place))
    assert "rows is there already" in complaint(check_replaced, place, "--output", OWN[form])


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"threshold": float("nan")}, "--threshold is a probability from 0 to 1, not nan"),
        ({"threshold": 80}, "--threshold is a probability from 0 to 1, not 80"),
        ({"confidence": float("nan")}, "--confidence is a probability"),
        ({"rate": float("nan")}, "--rate is a number of frames a second above 0"),
        ({"faces": "biggest"}, "'biggest'"),
    ],
)
def test_a_program_gets_the_limits_of_the_command(wrong: dict[str, Any], said: str) -> None:
    assert said in complaint(partial(predict_faces, [], **wrong))


def test_two_annotated_copies_with_one_name_are_refused(command: Cafe, tmp_path: Path) -> None:
    (tmp_path / "album").mkdir()
    for name in ("p.bmp", "p.bmp.jpg"):
        Image.new("RGB", (9, 9)).save(tmp_path / "album" / name)
    where = (str(tmp_path / "album"), "--aligned", "--annotate", str(tmp_path / "shown"))
    assert "would both be" in command.fail("predict", "linear_probe-one-s0-plain", *where)
    assert not (tmp_path / "shown").exists()


def test_a_prediction_that_is_killed_leaves_the_earlier_file(command: Cafe, tmp_path: Path) -> None:
    output = tmp_path / "rows.parquet"
    pq.write_table(build_schema(EXPRESSIONS).empty_table(), output)
    earlier = output.read_bytes()
    album(tmp_path / "album")
    words = ("predict", "linear_probe-one-s0-plain", str(tmp_path / "album"), "--aligned", "--output", str(output))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(120)
        picture = f"http://127.0.0.1:{silent.getsockname()[1]}/face.jpg"  # is waited for: the prediction is under way
        program = [sys.executable, "-m", "cafe.jobs.cli", "--workspace", str(command.workspace), *words, picture]
        driver = subprocess.Popen(program)
        connection, _ = silent.accept()
        with connection:
            (left,) = tmp_path.glob(".rows.parquet.*.part")
            remove_leftovers(UPath(tmp_path))
            assert left.exists()  # its writer lives
            driver.kill()
            driver.wait()
    assert output.read_bytes() == earlier
    command.succeed(*words)
    assert pq.read_table(output).num_rows
    assert not left.exists()


@pytest.mark.parametrize("place", ["folder", "file/rows.csv", f"{'n' * 300}.csv", f"{'n' * 300}/rows.csv"])
def test_an_output_that_cannot_be_written_is_refused_first(place: str, command: Cafe, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    said = command.fail("predict", "no-such-run", "no-such-file.jpg", "--output", str(tmp_path / place))
    assert "--output" in said
    assert "cannot be written" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_the_best_run_is_chosen_by_held_out_faces_of_the_source_and_seeds_are_averaged(
    command: Cafe, tmp_path: Path
) -> None:
    pictures = album(tmp_path)[:3]
    first, second = runs_of(command, "table")
    where = (str(tmp_path / "a"), str(tmp_path / "c"), "--aligned")
    alone = [build_model([run]).predict(pictures) for run in (first, second)]
    best, said = answer(command, "table", *where, "--best", "source_val")
    assert f"Model {second.name}: 75.0% on held-out faces of one, the best of 2 runs." in said
    np.testing.assert_allclose(shares(best), alone[1], atol=2e-6)
    both, said = answer(command, "table", *where, "--best", "source_val", "--ensemble")
    assert "averaged over 2 seeds" in said
    np.testing.assert_allclose(shares(both), (alone[0] + alone[1]) / 2, atol=2e-6)
    assert np.abs(alone[0] - alone[1]).max() > 1e-3


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("recipe.nonsense", 1, "nonsense: unexpected keyword"), ("recipe.learning_rate", None, "a valid number"),
        ("recipe.prior", "x", "Unknown prior|prior: input should be"), ("recipe", {}, ""),
        ("interpolation", "cubic", "Unknown interpolation 'cubic'"), ("policy", "x", "Unknown view policy 'x'"),
        ("image_size", 10**9, "image_size: input should be less"), ("image_size", 0, "image_size: input should be greater"),
        ("views", 0, "views: input"), ("view_seed", 2**64, "view_seed: input"), ("mean", [0.5], "mean: tuple should have"),
        ("std", [0, 1, 1], "std.0: input should be greater than 0"), ("precision", "fp64", "precision: input should be"),
        ("width", None, "has no width, which linear_probe needs"), ("width", 10**12, "width: input should be less"),
        ("width", 2**20, "are not those of the run that run.json describes .width 1,048,576"),
        ("recipe.hidden", 10**9, "are not those of the run that run.json describes .hidden 1,000,000,000"),
        ("width", 12, "are not those of the run that run.json describes"), ("backbone", None, "has no backbone"),
        ("features", None, "has no features"), ("features.policy", {}, "Unknown view policy 'None'"),
        ("features.input_size", 0, "features.input_size: input"), ("classes", ["fear", "fear"], "named twice"),
        ("classes", ["fear", "anger"], "are not those of the run"), ("method", "../x", "Unknown method"),
        ("unheard", 1, "unheard: unexpected keyword"),
    ],
)  # fmt: skip
def test_a_model_folder_of_any_record_is_one_sentence(
    field: str, value: object, said: str, command: Cafe, tmp_path: Path
) -> None:
    (run,), folder = runs_of(command, "plain"), UPath(tmp_path / "model")
    record = read_sealed(run / "run.json") or {}
    *above, last = field.split(".")
    part = record["spec"]
    for name in above:
        part = part[name]
    part[last] = value
    write_sealed(folder / "run.json", record)
    shutil.copy(str(run / "model.safetensors"), str(folder))
    assert re.search(said, complaint(build_model, [folder]))


@pytest.mark.parametrize("name", ["run.json", "model.json", "model.safetensors"])
def test_a_model_of_which_any_file_was_written_anew_is_read_again(name: str, command: Cafe, tmp_path: Path) -> None:
    (run,) = runs_of(command, "plain")
    folder = ship_run(run, tmp_path / "model")
    before, path = _stamp([folder]), tmp_path / "model" / name
    assert _stamp([folder]) == before
    times = path.stat()
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # as a copy that keeps them has
    assert _stamp([folder]) != before


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_truncated_weights_are_one_sentence(size: int, command: Cafe, tmp_path: Path) -> None:
    (run,), folder = runs_of(command, "plain"), UPath(tmp_path)
    shutil.copy(str(run / "run.json"), tmp_path)
    (folder / "model.safetensors").write_bytes((run / "model.safetensors").read_bytes()[:size])
    assert "model.safetensors is damaged or was changed" in complaint(build_model, [folder])


def test_mistakes_are_one_sentence_before_work_begins(command: Cafe, tmp_path: Path) -> None:
    album(tmp_path)
    (tmp_path / "empty").mkdir()
    run, there = "linear_probe-one-s0-plain", str(tmp_path / "a" / "1.png")
    for arguments, part in (
        ((run, there, "nowhere.jpg"), "There is no file 'nowhere.jpg'"),
        (
            (run, there, ""),
            "A word of this command is empty",
        ),  # as of a variable that is not set; not all that lies here
        ((run, f"{tmp_path}/*.gif"), "There is no file"),
        ((run, str(tmp_path / "empty")), "There is no photo or video below"),
        ((run, there, "--format", "parquet"), "give --output FILE.parquet"),
        ((run, there, "--output", f"{tmp_path}/x.xlsx"), "ends in '.xlsx': choose .csv, .json, .jsonl, .parquet, .txt"),
        ((run, there, "--rate", "0"), "above 0, not 0.0"),
        (("other", there), "There is neither a file nor a model 'other': give photos"),
        (("--model", "other", there), "Unknown run 'other'"),
        ((run,), f"'{run}' is a model, and no photo is named"),
        (("table", there), "'table' is an experiment"),
        (("plain", there, "--best", "source_val"), "has an accuracy on held-out faces"),
        (("--model", "other", there, "--best", "source_val"), "Unknown experiment 'other'"),
        ((there, "--best", "source_val"), "is none: name it with --model"),
        (("models:/faces/1", there), "has no database of MLflow's"),
    ):
        assert part in command.fail("predict", *arguments), arguments
    new = Cafe(tmp_path / "new", command.address)
    assert "Unknown model 'other': this workspace has no run yet; choose shipped" in new.fail(
        "predict", "--model", "other", there
    )
    Image.new("RGB", (9, 9)).save(tmp_path / "torn.png")
    (tmp_path / "torn.png").write_bytes((tmp_path / "torn.png").read_bytes()[:40])
    rows, said = answer(command, run, str(tmp_path / "torn.png"), "--aligned", code=1)
    assert [row["expression"] for row in rows] == [None]
    assert "No face was predicted" in said


def test_a_model_fetches_no_weights_of_its_own_accord(
    command: Cafe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its folder names the server; nor does a list of pictures that comes from elsewhere."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (run,) = (command.workspace / "runs").glob("*-plain-*")
    record = read_sealed(UPath(run / "run.json")) or {}
    photo = next((command.workspace / "faces").rglob("*.png"))
    with CountingServer(photo.parent) as server:
        record["spec"]["backbone"] = f"imagenet-lite0@{server.address}/{photo.name}"
        write_sealed(UPath(tmp_path / "model" / "run.json"), record)
        for name in ("model.safetensors", "result.json"):
            (tmp_path / "model" / name).write_bytes((run / name).read_bytes())
        write_json(UPath(tmp_path / "model" / "model.json"), {})
        predict = ("predict", str(tmp_path / "model"), str(photo), "--aligned")
        assert "came with a file" in command.fail(*predict)
        assert "leads to this machine" in command.fail("--allow-urls", *predict)
        elsewhere = CliRunner().invoke(
            main, [f"-w{command.workspace}", "predict", run.name, "-"], input=f"{server.address}/{photo.name}"
        )
        assert "came with a file" in elsewhere.output
        assert server.asked == []
        assert "cannot be read as plain tensors" in command.fail("--allow-urls", "--allow-private-urls", *predict)
        assert server.asked == [f"/{photo.name}"]
        server.shutdown()


@pytest.fixture
def ships(command: Cafe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> UPath:
    """The folder of two models that come with the package, of which the newer one is the experiment's second seed."""
    first, second = runs_of(command, "table")
    ship_run(first, tmp_path / "shipped" / "drawn-9")
    ship_run(second, tmp_path / "shipped" / "drawn-10")
    monkeypatch.setattr(shipped, "FOLDER", UPath(tmp_path / "shipped"))
    return UPath(tmp_path / "shipped")


def test_photos_alone_are_predicted_by_the_newest_model_that_ships_and_no_workspace_is_made(
    command: Cafe, ships: UPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = album(tmp_path / "album")
    expected = [build_model([run]).predict(pictures) for run in runs_of(command, "table")]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    nowhere = Cafe(Path("work"), "")
    for number, name, said in (
        (1, (), "Model drawn-10, which comes with this package.\n"),
        (0, ("--model", "drawn-9"), "Model drawn-9, which comes with this package.\n"),
    ):
        rows, beside = answer(nowhere, str(tmp_path / "album"), "--aligned", *name)
        np.testing.assert_allclose(shares(rows), expected[number], atol=2e-6)
        assert beside.startswith(said)
    for name in ("shipped", str(ships / "drawn-9")):  # as the first word
        assert len(answer(nowhere, name, str(tmp_path / "album" / "c"), "--aligned")[0]) == 1
    assert list(Path.cwd().iterdir()) == []
    monkeypatch.setattr(shipped, "FOLDER", UPath(tmp_path / "none"))
    assert "No model comes with this installation" in nowhere.fail("predict", str(tmp_path / "album"))


def test_a_model_is_measured_on_the_faces_held_out_of_its_own_source() -> None:
    labels = np.array([0] * 6 + [1] * 4)
    shares = np.array([[0.9, 0.1]] * 5 + [[0.45, 0.55]] + [[0.4, 0.6]] * 3 + [[0.52, 0.48]])
    predictions = Predictions([str(row) for row in range(10)], labels, shares, {}, classes=("calm", "pain"))
    home = measure_home([predictions])
    assert (home.faces, home.accuracy, home.largest, home.largest_share) == (10, 0.8, "calm", 0.6)
    assert home.chance == pytest.approx(0.6 * 0.6 + 0.4 * 0.4)  # 6 of 10 are calm, and so are 6 answers
    more = sum(math.comb(10, right) * 0.52**right * 0.48 ** (10 - right) for right in (8, 9, 10))
    assert home.p_chance == pytest.approx(more)
    assert home.p_largest == pytest.approx(5 / 16)  # right on 3 where "calm" is wrong, wrong on 1 where it is right
    assert home.warning("ward").startswith("Its answers mean nothing: of 10 faces held out of its own source, ward, it")
    sure, constant = (
        measure_home([predictions] * 4),
        measure_home([replace(predictions, probabilities=shares[:1].repeat(10, 0))]),
    )
    assert sure.warning("ward") == ""
    assert (constant.accuracy, constant.chance, constant.p_largest) == (0.6, 0.6, 1.0)
    assert choose_threshold([predictions]) == pytest.approx(0.55)  # two of ten are below


def test_faces_below_the_threshold_are_unsure_and_a_model_that_knows_nothing_says_so(
    command: Cafe, ships: UPath, tmp_path: Path
) -> None:
    run, _ = runs_of(command, "table")
    place = str(tmp_path / "album")
    highest = build_model([run]).predict(album(tmp_path / "album")).max(axis=1)
    (tmp_path / "album" / "torn.jpg").write_bytes(b"\xff\xd8\xff no picture")
    plain, said = answer(command, place, "--aligned")
    assert {row["unsure"] for row in plain} == {None}  # this one keeps no threshold
    assert "Warning" not in said
    threshold = float(np.sort(highest)[1:3].mean())
    home = asdict(Home(45, 0.2, 0.18, 0.4, "happiness", 0.3, 0.9))
    ship_run(run, Path(str(ships)) / "drawn-11", threshold=threshold, home=home, origin={"source": "one"})
    rows, said = answer(command, place, "--aligned")
    assert {Path(row["file"]).name: row["unsure"] for row in rows[:3]} == dict(
        zip(("1.png", "2.png", "3.png"), (highest < threshold).tolist(), strict=False)
    )
    assert [row["unsure"] for row in rows if row["error"]] == [None]
    assert "Warning: Its answers mean nothing: of 45 faces held out of its own source, one, it recognises 20.0%" in said
    table = command.succeed("predict", place, "--aligned", "--threshold", "1")
    assert sum("unsure, small" in line for line in table.splitlines()) == 4
    assert "Doubtful faces: unsure 4" in table
    assert "from 0 to 1, not 7.0" in command.fail("predict", place, "--threshold", "7")


def test_the_threshold_of_a_run_is_that_of_its_own_sources_predictions(command: Cafe) -> None:
    (run,) = runs_of(command, "plain")
    digest, labels = Workspace.at(str(command.workspace)).load_manifest("one").digest, np.arange(100) % 7
    assert read_confidence([run]) == (None, "")
    write_predictions(run, "one", labels, labels, manifest="another digest")
    assert read_confidence([run]) == (None, "")
    write_predictions(run, "one", labels, labels, manifest=digest, confidence=0.6)
    assert read_confidence([run]) == (pytest.approx(0.6), "")
    write_predictions(run, "one@val", labels, np.zeros_like(labels), manifest=digest, confidence=0.4)
    threshold, warning = read_confidence([run])
    shutil.rmtree(str(run / "predictions"))
    assert threshold == pytest.approx(0.4)
    assert "mean nothing" in warning


def test_an_exported_model_is_evaluated_in_a_workspace_as_it_predicts(command: Cafe, ships: UPath) -> None:
    workspace, folder = Workspace.at(str(command.workspace)), ships / "drawn-10"
    (workspace.features / "one").rename(workspace.features / "gone")  # no features are needed
    spec = specify_export(folder)
    assert complaint(check_option, spec, "flip").startswith("An exported model averages what it was exported to")
    (target,) = choose_targets(workspace, "one", spec, "clean")
    run = adopt(workspace, folder, "shipped")
    try:
        evaluate_target(run, target)
        check_identity(run)
        assert adopt(workspace, folder, "shipped") == run == workspace.run_path(spec.name)
        (there,) = choose(workspace.read_runs(), "shipped").runs
        assert (there.name, there.settings["exported"]) == (run.name, "drawn-10")
        assert there.group not in {other.group for other in workspace.read_runs() if other.name != run.name}
        ((column, predictions),) = there.load_predictions("clean").items()
        pictures = [workspace.load_manifest("one").read_face(row) for row in target.rows("test")]
        np.testing.assert_allclose(predictions.probabilities, build_model([folder]).predict(pictures), atol=1e-6)
        assert there.relation(column, "folder", target.digest) == "source"
        np.testing.assert_array_equal(
            build_model([run]).predict(pictures[:2]), build_model([folder]).predict(pictures[:2])
        )
        assert {verify_file(path) for path in workspace.sealed_files([run.name])} == {"whole"}
    finally:
        shutil.rmtree(str(run))
        (workspace.features / "gone").rename(workspace.features / "one")
    (folder / "model.safetensors").write_bytes((ships / "drawn-9" / "model.safetensors").read_bytes())
    assert specify_export(folder).name != spec.name  # another model is another run
    ship_run(runs_of(command, "table")[1], Path(str(folder)), files={"model.safetensors": "another digest"})
    assert "is not what was exported" in complaint(specify_export, folder)
    assert "is not what was exported" in complaint(build_model, [folder])  # whole by itself, and not of this model
    for wrong, word in (
        ({"threshold": float("nan")}, "threshold"),
        ({"origin": [1]}, "origin"),
        ({"averaged": 2}, "averaged"),
    ):
        write_json(folder / "model.json", {**wrong, "format": 1})
        assert f"model.json cannot be read ({word}" in complaint(read_confidence, [folder])


def test_models_are_listed_with_their_accuracy_at_home_and_abroad(command: Cafe, ships: UPath) -> None:
    run, _ = runs_of(command, "table")
    labels = np.arange(10) % 7
    for target, right in (("one", 8), ("two", 4), ("three", 2)):
        manifest = Workspace.at(str(command.workspace)).load_manifest("one").digest if target == "one" else ""
        write_predictions(
            run, target, labels, np.where(np.arange(10) < right, labels, (labels + 1) % 7), manifest=manifest
        )
    about = {"method": "linear_probe", "source": "one", "seed": 0, "sources": [{"name": "one"}]}
    scores = {
        f"target/{name}/{what}": value
        for name, values in (("one", (0.75, 0.6, 0.9, 0.4, 80)), ("two", (0.5, 0.3, 0.7, 0.4, 40)))
        for what, value in zip(("accuracy", "accuracy.low", "accuracy.high", "largest", "faces"), values, strict=True)
    } | {"unseen/accuracy": 0.5, "unseen/accuracy.low": 0.3, "unseen/accuracy.high": 0.7}
    ship_run(run, Path(str(ships)) / "drawn-9", origin=about, scores=scores, averaged={"seeds": [0, 1]})
    try:
        listed = {record.pop("model"): record for record in json.loads(command.succeed("models", "--json"))}
        shown = command.succeed("models")
    finally:
        shutil.rmtree(str(run / "predictions"))
    common = {"method": "linear_probe", "source": "one"}
    resting = ("", "_low", "_high", "_chance", "_faces")
    home, unseen = (dict(zip((name + end for end in resting), values, strict=True)) for name, values in (
        ("at_home", (0.75, 0.6, 0.9, 0.4, 80)), ("unseen", (0.5, 0.3, 0.7, 0.4, 40))
    ))  # fmt: skip
    assert listed["drawn-9"] == {"is": "ships", **common, "seeds": [0, 1], **home, **unseen}
    low, high = wilson(0.8, 10)
    home |= dict(zip(home, (0.8, low, high, 0.2, 10), strict=True))
    assert listed[run.name] == {"is": "run", **common, "seeds": [0], **home, **dict.fromkeys(unseen)}
    lines = shown.splitlines()
    place = next(number for number, line in enumerate(lines) if "drawn-9" in line)
    cells = [[cell.strip() for cell in line.split("│")[6:8]] for line in lines[place : place + 2]]
    assert cells == [["75.0 (60.0–90.0)", "50.0 (30.0–70.0) ‡"], ["chance 40.0", "chance 40.0"]]
    assert f"80.0 ({100 * low:.1f}–{100 * high:.1f}) ‡" in shown  # of ten faces
    assert "‡: other faces might as well" in shown
    assert len(listed) == 5


def test_a_first_word_that_could_be_a_file_or_a_model_is_refused(
    command: Cafe, ships: UPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    album(tmp_path / "linear_probe-one-s0-plain")
    monkeypatch.chdir(tmp_path)
    folder = "linear_probe-one-s0-plain"
    said = command.fail("predict", folder, folder, "--aligned")
    assert f"write ./{folder} for the file, or --model {folder} for the model" in said
    (by_shipped, _), (by_run, _) = (
        answer(command, f"./{folder}", "--aligned"),
        answer(command, folder, "--model", folder, "--aligned"),
    )
    assert [Path(row["file"]).name for row in by_shipped] == [Path(row["file"]).name for row in by_run]
    assert np.abs(shares(by_shipped) - shares(by_run)).max() > 1e-3
    Image.new("RGB", (9, 9)).save(str(ships / "drawn-9" / "photo.png"))  # a model's folder with a photo in it
    assert "names a model too" in command.fail("predict", str(ships / "drawn-9"), "--aligned")


def test_a_list_of_other_files_is_no_video_whatever_its_name_is(tmp_path: Path) -> None:
    walk(tmp_path / "film.mp4")
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile film.mp4\n")
    (frame,) = read_video(UPath(tmp_path / "list.mp4"), 5)
    assert frame.pixels is None
    assert "no readable video: Invalid argument" in frame.error


def test_a_damaged_video_ends_with_the_reason(tmp_path: Path) -> None:
    walk(tmp_path / "walk.mp4", seconds=1)
    assert (count_frames(UPath(tmp_path / "walk.mp4"), 5), count_frames(UPath(tmp_path / "walk.mp4"), 100)) == (5, 10)
    data = (tmp_path / "walk.mp4").read_bytes()
    (tmp_path / "torn.mp4").write_bytes(data[: len(data) // 3])
    (tmp_path / "none.avi").write_bytes(b"no video")
    for name in ("torn.mp4", "none.avi"):
        *_, last = read_video(UPath(tmp_path / name), 5)
        assert last.pixels is None
        assert "no readable video" in last.error


def film(place: Path, codec: str, sound: float = 0, **options: str) -> bytes:
    """Return a video of two seconds of small noise, with some seconds of silence beside it."""
    noise = np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8)
    with av.open(str(place), "w", options=options) as container:
        stream: Any = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 64, 48, "yuv420p", 10
        silence: Any = container.add_stream("mp2", rate=32000) if sound else None
        for number in range(50):
            picture = av.VideoFrame.from_ndarray(np.roll(noise, number, axis=1), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
        if sound:
            quiet = av.AudioFrame.from_ndarray(np.zeros((1, round(32000 * sound)), np.int16), "s16", "mono")
            quiet.sample_rate = 32000
            container.mux([*silence.encode(quiet), *silence.encode(None)])
    return place.read_bytes()


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("cut.mp4", "libx264", {"movflags": "faststart"}),
        ("cut.mkv", "libx264", {}),
        ("cut.avi", "mpeg4", {}),
        ("cut.webm", "libvpx", {}),
        ("cut.wmv", "wmv2", {}),
    ],
)
def test_a_video_that_is_cut_says_where(name: str, codec: str, options: dict[str, str], tmp_path: Path) -> None:
    place = tmp_path / name
    data = film(place, codec, **options)
    assert [frame.error for frame in read_video(UPath(place), math.inf)] == [""] * 50
    place.write_bytes(data[: len(data) * 7 // 10])
    *frames, last = read_video(UPath(place), math.inf)
    assert 10 < len(frames) < 48
    assert last.pixels is None
    cut = re.fullmatch(
        r"cut off after (.*) of 2\.0 s|damaged video: .* first at (.*) s", last.error
    )  # wmv has no length
    assert cut
    assert float(cut[1] or cut[2]) == pytest.approx(len(frames) / 25, abs=0.2)


def test_a_video_with_broken_bytes_says_where_and_goes_on(tmp_path: Path) -> None:
    place = tmp_path / "hurt.mov"
    data = bytearray(film(place, "mpeg4"))
    middle = len(data) // 2
    data[middle : middle + 60] = np.random.default_rng(1).integers(0, 255, 60, np.uint8).tobytes()
    place.write_bytes(data)
    *frames, last = read_video(UPath(place), 5)
    assert "damaged video: cannot be decoded in places, first at" in last.error
    assert 0.2 < float(last.error.split()[-2]) < 1.6
    assert frames[-1].time == pytest.approx(1.8, abs=0.1)


def test_a_video_whose_sound_is_longer_is_not_cut(tmp_path: Path) -> None:
    film(tmp_path / "long.mkv", "mpeg4", sound=4.0)
    assert [frame.error for frame in read_video(UPath(tmp_path / "long.mkv"), 5)] == [""] * 10


def test_every_page_and_frame_of_a_photo_is_a_row_and_has_an_annotated_copy(command: Cafe, tmp_path: Path) -> None:
    faces = [drawn_face(number, 48) for number in range(3)]
    (tmp_path / "album").mkdir()
    faces[0].save(tmp_path / "album" / "a.gif", save_all=True, append_images=faces[1:], duration=100)
    faces[0].save(tmp_path / "album" / "b.TIFF", save_all=True, append_images=faces[1:2])
    faces[0].save(tmp_path / "album" / "c.jfif", "JPEG")
    where = (str(tmp_path / "album"), "--aligned", "--annotate", str(tmp_path / "shown"))
    rows, said = answer(command, "linear_probe-one-s0-plain", *where)
    assert [(Path(row["file"]).name, row["frame"], row["time"]) for row in rows] == [
        ("a.gif", 0, 0.0),
        ("a.gif", 1, 0.1),
        ("a.gif", 2, 0.2),
        ("b.TIFF", 0, None),
        ("b.TIFF", 1, None),
        ("c.jfif", None, None),
    ]
    assert "6 faces in 1 photo and 5 frames" in said
    copies = sorted(path.name for path in (tmp_path / "shown").iterdir())
    assert copies == ["a.gif.jpg", "a.gif~2.jpg", "a.gif~3.jpg", "b.TIFF.jpg", "b.TIFF~2.jpg", "c.jfif.jpg"]
    shown = Image.open(tmp_path / "shown" / "a.gif~3.jpg")
    assert np.abs(np.asarray(shown, int)[24:40, 10:38] - np.asarray(faces[2], int)[24:40, 10:38]).mean() < 20
    faces[0].save(tmp_path / "album" / "a.gif~3.jpg")
    assert "could have one name" in command.fail("predict", "linear_probe-one-s0-plain", *where)


def test_of_a_long_video_only_a_few_frames_are_in_memory(command: Cafe) -> None:
    (run,) = runs_of(command, "plain")
    counts = {"made": 0, "gone": 0, "most": 0}

    def note_end() -> None:
        counts["gone"] += 1

    def film() -> Iterator[Frame]:
        for number in range(400):
            pixels = np.full((24, 24, 3), number % 256, np.uint8)
            weakref.finalize(pixels, note_end)
            counts["made"] += 1
            counts["most"] = max(counts["most"], counts["made"] - counts["gone"])
            yield Frame(UPath("long.mp4"), pixels, number, number / 5)

    frames = list(predict_frames(film(), build_model([run]), Search(aligned=True)))
    assert [predicted.frame.number for predicted in frames] == list(range(400))
    assert all(predicted.frame.pixels is None for predicted in frames)
    assert counts["most"] <= HELD_FACES + 2 * SEARCHED


@pytest.mark.parametrize(("nose", "turn", "turned"), [(50, 0.0, False), (60, 0.25, False), (30, 0.5, True)])
def test_a_face_is_turned_when_its_nose_leaves_the_middle_of_the_eyes(nose: int, turn: float, turned: bool) -> None:
    eyes, mouth = np.array([[30.0, 40.0], [70.0, 40.0]]), np.array([50.0, 80.0])
    face = Detection((0, 0, 100, 47), eyes, mouth, 1.0, np.array([float(nose), 60.0]))
    assert measure_turn(face) == pytest.approx(turn)  # 10 of 40 pixels are a quarter
    quality = measure_quality(np.asarray(drawn_face(0)), face)
    assert (quality.turned, quality.small, quality.blurred) == (turned, True, False)


def test_sharpness_falls_with_blur_and_does_not_depend_on_brightness() -> None:
    face = drawn_face(1, 224)
    sharp = measure_sharpness(np.asarray(face))
    dark = measure_sharpness((np.asarray(face) * 0.4).astype(np.uint8))
    blurred = [measure_sharpness(np.asarray(face.filter(ImageFilter.GaussianBlur(radius)))) for radius in (1, 3, 6)]
    assert sharp > blurred[0] > blurred[1] > blurred[2]
    grey = np.asarray(face.convert("L").resize((112, 112), Image.Resampling.BILINEAR), np.float32)
    assert sharp == float(ndimage.laplace(grey).var()) / float(grey.var())
    assert dark == pytest.approx(sharp, rel=0.2)
    checks = np.indices((112, 112)).sum(axis=0) % 2 * 255  # every pixel differs from its four neighbours by 255
    assert measure_sharpness(np.repeat(checks[..., None], 3, axis=2).astype(np.uint8)) == pytest.approx(64, rel=0.1)
    assert measure_sharpness(np.full((50, 50, 3), 7, np.uint8)) == 0


def build_ward_model(network: str) -> Model:
    """A model of three classes, two of them called like nothing else and one like a column."""
    torch.manual_seed(0)
    plan = ViewPlan("clean", 0, 1, "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    inputs = Inputs(None, network, image_size=32, classes=("frame", "happily surprised", "pain"))
    return Model("ward", (METHODS["image_only"](METHODS["image_only"].recipe_type(), inputs).eval(),), plan, 32)


def test_a_model_of_other_classes_gives_a_column_for_each(small_network: str, tmp_path: Path) -> None:
    pictures, model = album(tmp_path), build_ward_model(small_network)
    expected = model.predict(pictures)
    assert (model.classes, expected.shape) == (("frame", "happily surprised", "pain"), (4, 3))
    assert model.predict([]).shape == (0, 3)
    frames = [Frame(UPath(f"{number}.png"), pixels) for number, pixels in enumerate(pictures)]
    found = list(predict_frames([*frames, Frame(UPath("x.png"), error="torn")], model, Search(aligned=True), True))
    columns, written = ["class_frame", "happily surprised", "pain"], {}
    for form, write_rows in FORMATS.items():
        written[form] = io.BytesIO()
        with write_rows(written[form], model.classes) as write:
            for predicted in found:
                write(list_rows(predicted, model.classes))
    rows = [json.loads(line) for line in written["jsonl"].getvalue().decode().splitlines()]
    np.testing.assert_allclose([[row[name] for name in columns] for row in rows[:4]], expected, atol=1e-6)
    assert [row["expression"] for row in rows] == [*(model.classes[best] for best in expected.argmax(axis=1)), None]
    assert [row["frame"] for row in rows] == [None] * 5
    header = written["csv"].getvalue().decode().splitlines()[0].split(",")
    assert header[header.index("expression") + 1 : header.index("unsure")] == columns
    table = pq.read_table(pa.BufferReader(written["parquet"].getvalue()))
    assert table.column_names == header
    np.testing.assert_allclose(np.stack([table[name][:4] for name in columns], axis=1), expected, atol=1e-6)
    second = model.classes[expected[0].argsort()[-2]]
    shown = written["table"].getvalue().decode().splitlines()[1]
    assert f"{rows[0]['expression']:<10} {expected[0].max():>4.0%}  {second} {np.sort(expected[0])[-2]:.0%}" in shown
    colours = choose_colours((*EXPRESSIONS, *model.classes))
    assert len(set(colours.values())) == 10
    pixel = draw_boxes(pictures[0], found[0].faces).getpixel((0, 39))  # of the box, far from its label
    assert pixel == ImageColor.getrgb(choose_colours(model.classes)[found[0].faces[0].expression])


def test_the_label_of_a_face_at_the_right_edge_is_whole() -> None:
    quality, shares = Quality(20, 1, None), np.array([0.9, 0.1])
    face = PredictedFace((80, 30, 20, 20), 0.9, quality, ("happiness", "sadness"), shares)
    shown = draw_boxes(np.zeros((100, 100, 3), np.uint8), [face])
    colour = ImageColor.getrgb(choose_colours(EXPRESSIONS)["happiness"])
    assert [shown.getpixel((x, 13)) == colour for x in (5, 30, 98)] == [False, True, True]  # its ground, 80 pixels wide


def test_the_graph_of_a_model_names_its_classes(small_network: str, tmp_path: Path) -> None:
    model, faces = build_ward_model(small_network), np.zeros((2, 40, 30, 3), np.uint8)
    write_onnx(model, str(tmp_path / "model.onnx"))
    graph = Onnx(str(tmp_path / "model.onnx"))
    assert json.loads(graph.session.get_modelmeta().custom_metadata_map["labels"]) == list(model.classes)
    np.testing.assert_allclose(graph.predict(faces), model.predict(list(faces)), atol=1e-5)


def test_two_columns_never_have_one_name() -> None:
    classes = ("time", "class_time", "pain")
    assert name_columns(classes) == {"time": "class_time", "class_time": "class_class_time", "pain": "pain"}
    assert len(set(build_schema(classes).names)) == len(build_schema(EXPRESSIONS).names) - 4
