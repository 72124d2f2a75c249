"""The audit: copies are found whatever was done to them, other pictures are not, and the numbers without them are right."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import Cafe
from PIL import Image, ImageEnhance, ImageOps
from upath import UPath

from cafe.data.auditing import audit, encode_audit
from cafe.data.copies import LEARNED, CopyIndex, _frame, _reduce, draw_thumbnail
from cafe.data.expressions import EIGHT
from cafe.data.images import decode_image
from cafe.data.indexing import index_files
from cafe.data.manifest import Manifest
from cafe.data.readers import DATASETS
from cafe.data.rows import RowFiles
from cafe.errors import UserError
from cafe.pipeline.runs import RunSpec
from cafe.pipeline.workspace import Workspace
from cafe.report.inspection import draw_audit
from cafe.report.sheets.comparison import main_sheet
from cafe.report.sheets.runs import run_sheet
from cafe.results.comparison import compare
from cafe.results.leaks import leave_out_leaks
from cafe.results.predictions import Predictions
from cafe.results.runs import read_runs
from cafe.results.scores import average_unseen, read_scores
from cafe.spool import ArraySpool
from cafe.synthetic.domains import render, write

Edit = Callable[[Image.Image], Image.Image]


def shrink(picture: Image.Image) -> Image.Image:
    return picture.resize((48, 48), Image.Resampling.BICUBIC)


def compress(picture: Image.Image) -> Image.Image:
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=50)
    return Image.fromarray(decode_image(data.getvalue()))


def grey(picture: Image.Image) -> Image.Image:
    return picture.convert("L").convert("RGB")


def crop(picture: Image.Image) -> Image.Image:
    """Cut 8 % off two sides and 2 % off the others."""
    width, height = picture.size
    return picture.crop((round(0.08 * width), round(0.02 * height), round(0.98 * width), round(0.92 * height)))


def darken(picture: Image.Image) -> Image.Image:
    return ImageEnhance.Brightness(picture).enhance(0.7)


def brighten(picture: Image.Image) -> Image.Image:
    return ImageEnhance.Brightness(picture).enhance(1.4)


def mirror(picture: Image.Image) -> Image.Image:
    return ImageOps.mirror(picture)


def turn(picture: Image.Image) -> Image.Image:
    return compress(picture.rotate(90))


def transpose(picture: Image.Image) -> Image.Image:
    return picture.transpose(Image.Transpose.TRANSVERSE)


def everything(picture: Image.Image) -> Image.Image:
    return compress(shrink(grey(crop(picture))))


@pytest.fixture(scope="module")
def faces() -> np.ndarray:
    """The pixels of 70 faces of ten people before busy backgrounds, all of one size."""
    pictures = (render(0, "web", person, expression, 0) for person in range(10) for expression in range(7))
    return np.stack([np.asarray(Image.fromarray(picture).resize((120, 120))) for picture in pictures])


@pytest.fixture
def command(tmp_path: Path) -> Cafe:
    """The command line in a fresh workspace, for commands that need no cluster."""
    return Cafe(tmp_path / "work", address="")


def thumbnails(pictures: np.ndarray, edit: Edit = lambda picture: picture) -> np.ndarray:
    return np.stack([draw_thumbnail(np.asarray(edit(Image.fromarray(picture)))) for picture in pictures])


@pytest.mark.parametrize("edit", [shrink, grey, crop, darken, brighten, mirror, turn, transpose, everything])
def test_every_copy_is_found_and_nothing_else(faces: np.ndarray, edit: Edit) -> None:
    found = CopyIndex(thumbnails(faces)).find(thumbnails(faces[20:40], edit))
    assert sorted(zip(found.first, found.second, strict=True)) == [(20 + n, n) for n in range(20)]


def test_it_does_not_matter_which_of_the_two_was_edited(faces: np.ndarray) -> None:
    found = CopyIndex(thumbnails(faces[20:40], everything)).find(thumbnails(faces))
    assert sorted(zip(found.first, found.second, strict=True)) == [(n, 20 + n) for n in range(20)]


def test_another_picture_of_the_same_person_is_no_copy() -> None:
    first, second = (
        np.stack([draw_thumbnail(render(0, "grey", person, 3, n)) for person in range(30)]) for n in (0, 1)
    )
    assert len(CopyIndex(first).find(second)) == 0


def test_blank_pictures_and_a_single_face_are_no_copies_of_anything(faces: np.ndarray) -> None:
    blank = np.full((3, 64, 64), 128, np.uint8)
    one = thumbnails(faces[:1])
    assert len(CopyIndex(blank).find(np.concatenate([blank, one]))) == 0
    assert CopyIndex(one).find(np.concatenate([blank, one])).second.tolist() == [3]


def test_a_large_index_finds_copies_among_thousands_from_disk_as_from_memory(
    faces: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cafe.data.copies.LISTED_AT_ONCE", 2**12)
    random, own = np.random.default_rng(0), thumbnails(faces)
    one, two = (own[random.integers(len(own), size=6000)] for _ in range(2))
    mixed = (one * 0.6 + two[:, :, ::-1] * 0.4).astype(np.uint8)
    copies = thumbnails(np.repeat(mixed[100:140, :, :, None], 3, axis=3), everything)
    spool = ArraySpool((64, 64), np.uint8)
    spool.extend(mixed)
    index = CopyIndex(spool)
    found = index.find(copies)
    assert set(range(40)) <= {n for row, n in zip(found.first, found.second, strict=True) if row == 100 + n}

    vectors = _reduce(_frame(mixed, np.zeros((1, 4))), index.projection)
    memory = faiss.IndexIVFFlat(faiss.IndexFlatIP(96), 96, 6000 // 64, faiss.METRIC_INNER_PRODUCT)
    memory.nprobe, memory.cp.max_points_per_centroid = 16, LEARNED  # which chooses whom to learn from
    memory.train(vectors)
    memory.add(vectors)
    assert isinstance(faiss.downcast_InvertedLists(index.index.invlists), faiss.OnDiskInvertedLists)
    for disk, expected in zip(index.index.search(vectors[::50], 3), memory.search(vectors[::50], 3), strict=True):
        np.testing.assert_array_equal(disk, expected)


def test_copies_of_real_photographs_are_found(real_faces: Path) -> None:
    manifest = index_files("news", DATASETS["folder"](UPath(real_faces / "news"))).manifest
    pictures = [decode_image(manifest.path(row).read_bytes()) for row in range(0, len(manifest), 12)]
    own = np.stack([draw_thumbnail(picture) for picture in pictures])
    copies = np.stack([draw_thumbnail(np.asarray(everything(Image.fromarray(picture)))) for picture in pictures[:40]])
    found = CopyIndex(own).find(copies)
    assert sorted(zip(found.first, found.second, strict=True)) == [(n, n) for n in range(40)]


@pytest.fixture
def sets(tmp_path: Path) -> tuple[Workspace, dict[str, Manifest]]:
    """`film` and `web`: three faces of web are edited copies of film's training faces, one of a test face of film's."""
    root = tmp_path / "faces"
    for domain in ("film", "web"):
        write(root, domain, 28)
    film = sorted(path.relative_to(root / "film") for path in (root / "film" / "train").rglob("*.jpg"))
    for number, path in enumerate(film[:3]):
        with Image.open(root / "film" / path) as picture:
            everything(picture).save(root / "web" / "test" / "fear" / f"leak{number}.jpg", quality=60)
    tested = min((root / "film" / "test").rglob("*.jpg"))
    shutil.copy(tested, root / "web" / "test" / "anger" / "seen.jpg")
    (root / "web" / "test" / "anger" / "torn.jpg").write_bytes(tested.read_bytes()[:2000])
    workspace = Workspace.at(str(tmp_path / "work"))
    manifests = {name: index_files(name, DATASETS["folder"](UPath(root / name))).manifest for name in ("film", "web")}
    for name, manifest in manifests.items():
        manifest.save(workspace.manifest_path(name))
    return workspace, manifests


def test_the_command_lists_every_pair_and_the_unreadable(
    sets: tuple[Workspace, dict[str, Manifest]], command: Cafe
) -> None:
    output = command.fail("data", "audit", "film", "web", code=1)
    counts = [[cell.strip() for cell in line.split("│")[1:-1]] for line in output.splitlines() if "│ web " in line]
    assert ["film", "web", "train", "test", "12", "3", "25.0 %", "3", "3"] in counts
    assert ["film", "web", "test", "test", "12", "1", "8.3 %", "1", "0"] in counts
    assert "1 unreadable files:\n  web: test/anger/torn.jpg: damaged image" in output
    rows = pq.read_table(command.workspace / "audits" / "film" / "web.parquet").to_pylist()
    pairs = {(row["source_split"], row["target_sample_id"], row["target_split"]) for row in rows}
    assert pairs == {
        *(("train", f"test/fear/leak{number}.jpg", "test") for number in range(3)),
        ("test", "test/anger/seen.jpg", "test"),
    }
    assert all(0.92 <= row["similarity"] <= 1.0001 for row in rows)
    page = (command.workspace / "audits" / "film" / "web.html").read_text()
    assert page.count('<img src="data:image/jpeg;base64,') == 8
    assert "http" not in page


def test_the_splits_of_the_source_are_compared_once_each_and_never_with_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "film", 28)
    copied = min((tmp_path / "film" / "train").rglob("*.jpg"))
    shutil.copy(copied, tmp_path / "film" / "train" / "again.jpg")
    (tmp_path / "film" / "train" / "again.jpg").rename(copied.with_name("again.jpg"))
    shutil.copy(copied, tmp_path / "film" / "test" / copied.parent.name / "leak.jpg")
    film = index_files("film", DATASETS["folder"](UPath(tmp_path / "film"))).manifest
    monkeypatch.setattr("cafe.data.manifest.LARGE", 10)
    film.save(UPath(tmp_path / "film.parquet"))
    filed = Manifest.load(UPath(tmp_path / "film.parquet"))  # a large one, whose rows lie in files
    pages = []
    for manifest in (film, filed):
        [result] = audit(manifest, [], lambda *_: None, lambda *_: None)
        assert [(pair.source_split, pair.target_split, pair.copied, pair.pairs) for pair in result.splits] == [
            ("train", "test", 1, 2)
        ]
        pages.append((draw_audit(result), encode_audit(result)))
    assert pages[0] == pages[1]
    assert isinstance(filed.table, RowFiles)
    assert not filed.table._columns  # no column was read as a whole


def test_labels_of_sets_with_different_classes_are_compared_by_name(
    sets: tuple[Workspace, dict[str, Manifest]],
) -> None:
    """The copies of film in web carry other labels; in a class set of another order the same names are still others."""
    _, manifests = sets
    film, web = manifests["film"], manifests["web"]
    turned = tuple(reversed(EIGHT))
    labels = pa.array([turned.index(name) for name in web.name_classes(web.rows("all"))], pa.int8())
    table = web.table.set_column(web.table.column_names.index("label"), "label", labels)
    other = replace(web, table=table, classes=turned)
    *_, first = audit(film, [web], lambda *_: None, lambda *_: None)
    *_, second = audit(film, [other], lambda *_: None, lambda *_: None)
    assert second.splits == first.splits
    assert sum(pair.relabelled for pair in first.splits) == 3
    assert b"contempt" not in draw_audit(second)
    assert draw_audit(second).count(b"fear") == draw_audit(first).count(b"fear")


def evaluate(workspace: Workspace, manifests: dict[str, Manifest], wrong: set[str]) -> UPath:
    """Write a run trained on `film` with its predictions for both sets: right but for the samples of `wrong`."""
    film = manifests["film"]
    spec = RunSpec(
        method="image_only", source="film", source_digest=film.digest, recipe={}, recipe_changes={}, image_size=64,
        policy="paper", views=2, mean=(0.0,) * 3, std=(1.0,) * 3,
    )  # fmt: skip
    run = workspace.run_path(spec.name)
    spec.save(run)
    (run / "result.json").write_text("{}")
    for name, manifest in manifests.items():
        rows = manifest.rows("test")
        samples = [manifest.sample_ids[row] for row in rows]
        labels = manifest.labels[rows]
        said = np.where([sample in wrong for sample in samples], (labels + 1) % 7, labels)
        about = {"target": name, "split": "test", "manifest": manifest.digest}
        Predictions(samples, labels, np.eye(7)[said], about).save(run / "predictions" / f"{name}.parquet")
    return run


def test_leak_free_numbers_come_from_predictions_alone(
    sets: tuple[Workspace, dict[str, Manifest]], command: Cafe, tmp_path: Path
) -> None:
    workspace, manifests = sets
    command.fail("data", "audit", "film", "web", code=1)
    shutil.rmtree(tmp_path / "faces")
    run = evaluate(workspace, manifests, wrong={"test/anger/seen.jpg", "test/fear/leak0.jpg"})
    tested = len(manifests["web"].rows("test"))
    runs = read_runs([run])
    scores, leak_free = read_scores(runs), read_scores(runs, leave_out=leave_out_leaks(workspace.root))
    without = leak_free.set_index("target")
    assert without["left_out"].to_dict() == {"film": 0, "web": 3}  # the copy of a test face is no leak
    assert without.loc["web", "accuracy"] == pytest.approx(1 - 1 / (tested - 3))
    assert average_unseen(leak_free).iloc[0]["accuracy"] == without.loc["web", "accuracy"]
    assert scores.set_index("target").loc["web", "accuracy"] == pytest.approx(1 - 2 / tested)
    last = [cell.text for cell in run_sheet(scores, leak_free).lines[1]]
    assert last[-2:] == [f"{100 * (1 - 1 / (tested - 3)):.1f}", "3"]

    comparison = compare(runs, scores, "accuracy", "clean", leak_free)
    sheet = main_sheet(comparison)
    header = sheet.header
    shown, faces, _ = ({name: cell.text for name, cell in zip(header, line, strict=True)} for line in sheet.lines)
    assert comparison.leaking == ["web"]
    assert shown["web"] == f"{100 * (1 - 2 / tested):.1f} ‡"  # of few faces
    assert shown["web leak-free"] == shown["unseen accuracy leak-free"] == f"{100 * (1 - 1 / (tested - 3)):.1f} ‡"
    assert (faces["web"], faces["web leak-free"]) == (str(tested), str(tested - 3))
    assert "film leak-free" not in header
    assert "leak-free" in command.succeed("compare", "--exclude-leaks")
    assert "leak-free" not in command.succeed("compare")


def test_a_target_that_leaks_entirely_has_a_count_and_no_number(
    sets: tuple[Workspace, dict[str, Manifest]], command: Cafe, tmp_path: Path
) -> None:
    workspace, manifests = sets
    shutil.copytree(tmp_path / "faces" / "film" / "train", tmp_path / "faces" / "copy" / "test")
    copy = index_files("copy", DATASETS["folder"](UPath(tmp_path / "faces" / "copy"))).manifest
    copy.save(workspace.manifest_path("copy"))
    command.succeed("data", "audit", "film", "copy")
    run = evaluate(workspace, {"film": manifests["film"], "copy": copy}, wrong=set())
    scores = read_scores(read_runs([run]), leave_out=leave_out_leaks(workspace.root))
    assert scores.set_index("target").loc["copy", "left_out"] == len(copy)
    assert np.isnan(scores.set_index("target").loc["copy", "accuracy"])
    assert np.isnan(average_unseen(scores).iloc[0]["accuracy"])


def test_a_missing_or_stale_audit_is_one_sentence_before_ray_starts(
    sets: tuple[Workspace, dict[str, Manifest]], command: Cafe, tmp_path: Path
) -> None:
    workspace, manifests = sets
    run = evaluate(workspace, manifests, wrong=set())
    wanted = ("evaluate", run.name, "--exclude-leaks", "--targets", "web")
    assert "'web' was not audited against 'film' yet: run `cafe data audit film web`." in command.fail(*wanted)
    command.fail("data", "audit", "film", "web", code=1)
    (tmp_path / "faces" / "web" / "test" / "fear" / "leak0.jpg").unlink()
    changed = index_files("web", DATASETS["folder"](UPath(tmp_path / "faces" / "web"))).manifest
    changed.save(workspace.manifest_path("web"))
    assert "read another version of 'web' than" in command.fail(*wanted)
    with pytest.raises(UserError, match=r"Unknown manifest 'mma'"):
        workspace.load_manifest("mma")
    assert "Unknown manifest 'mma'" in command.fail("data", "audit", "film", "mma")
