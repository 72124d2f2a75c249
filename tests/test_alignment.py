"""Alignment: where a crop puts the eyes, and what becomes of photos with several faces, tiny ones, none, or no pixels."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import Cafe, draw_faces
from PIL import Image
from torchvision.ops import batched_nms
from upath import UPath

from cafe.data.alignment import (
    EYE_DISTANCE,
    EYE_HEIGHT,
    Aligned,
    Detection,
    align_faces,
    crop_face,
    detect_faces,
    find_detector,
)
from cafe.data.detector import INSTALL, load_mtcnn, suppress
from cafe.data.expressions import EIGHT
from cafe.data.images import decode_image
from cafe.data.manifest import Face, Manifest
from cafe.errors import UserError
from cafe.pipeline import datasets
from cafe.results.protocols import find_protocol

MEADOW = (96, 120, 96)


@pytest.fixture
def command(tmp_path: Path) -> Cafe:
    """The command line in a fresh workspace, for commands that need no cluster."""
    return Cafe(tmp_path / "work", address="")


def portrait(real_faces: Path, number: int, side: int, turn: float = 0) -> Image.Image:
    """A real face turned by degrees, on a plain ground."""
    path = sorted((real_faces / "news" / "happiness").iterdir())[number]
    picture = Image.fromarray(decode_image(path.read_bytes())).resize((side, side))
    return picture.rotate(turn, Image.Resampling.BICUBIC, fillcolor=MEADOW)


def photograph(*faces: tuple[Image.Image, int], size: tuple[int, int] = (900, 500)) -> np.ndarray:
    """A photo with faces at some distance from the left."""
    photo = Image.new("RGB", size, MEADOW)
    for face, left in faces:
        photo.paste(face, (left, 40))
    return np.asarray(photo)


@pytest.mark.parametrize("turn", [-50, 0, 20])
@pytest.mark.parametrize("size", [64, 200])
def test_a_crop_has_the_eyes_level_at_their_place(turn: float, size: int) -> None:
    angle = np.radians(turn)
    right, down = np.array([np.cos(angle), np.sin(angle)]), np.array([-np.sin(angle), np.cos(angle)])
    middle, distance = np.array([310.0, 190.0]), 84.0
    eyes = np.array([middle - right * distance / 2, middle + right * distance / 2])
    rows, columns = np.indices((400, 600)) + 0.5
    photo = np.zeros((400, 600, 3), np.uint8)
    for (x, y), channel in zip(eyes, (0, 2), strict=True):
        photo[(columns - x) ** 2 + (rows - y) ** 2 < 36, channel] = 255  # a red dot and a blue one
    crop = crop_face(photo, Detection((0, 0, 1, 1), eyes, middle + down * distance, 1.0), size)
    assert crop.shape == (size, size, 3)
    for channel, side in ((0, -1), (2, 1)):
        y, x = (np.average(axis + 0.5, weights=crop[..., channel]) for axis in np.indices((size, size)))
        assert x == pytest.approx(size * (0.5 + side * EYE_DISTANCE / 2), abs=0.1)
        assert y == pytest.approx(size * EYE_HEIGHT, abs=0.1)


def test_a_face_in_profile_is_not_enlarged_to_the_distance_of_its_eyes() -> None:
    photo = np.zeros((200, 200, 3), np.uint8)
    photo[90:110] = 255  # a band 20 pixels high
    eyes = np.array([[96.0, 60.0], [104.0, 60.0]])  # eight pixels apart, while the mouth is 46.2 below: 40 × 1.155
    crop = crop_face(photo, Detection((0, 0, 1, 1), eyes, np.array([100.0, 106.2]), 1.0), 100)
    assert (crop[:, 50, 0] > 127).sum() == pytest.approx(20 * EYE_DISTANCE * 100 / 40, abs=1)


def test_beyond_the_photo_its_border_is_repeated() -> None:
    photo = np.full((50, 50, 3), 200, np.uint8)
    eyes = np.array([[5.0, 5.0], [25.0, 5.0]])
    assert (crop_face(photo, Detection((0, 0, 1, 1), eyes, np.array([15.0, 28.0]), 1.0), 80) == 200).all()


@pytest.mark.parametrize("turn", [-25, 0, 25])
def test_a_turned_face_is_found_and_its_crop_is_upright(real_faces: Path, turn: float) -> None:
    [found] = align_faces([photograph((portrait(real_faces, 3, 300, turn), 200))], size=200)
    assert (found.found, found.reason) == (1, "")
    [[again]] = detect_faces([found.crops[0]])
    (left, up), (right, low) = again.eyes / 200
    assert (left + right) / 2 == pytest.approx(0.5, abs=0.03)
    assert up == pytest.approx(EYE_HEIGHT, abs=0.04)
    assert low == pytest.approx(EYE_HEIGHT, abs=0.04)
    assert right - left == pytest.approx(EYE_DISTANCE, abs=0.05)


def test_faces_are_found_where_the_detector_before_found_them(real_faces: Path) -> None:
    """Crops made with facenet-pytorch 2.6.0 stay comparable: these are its boxes and landmarks, rounded to .01 pixels."""
    faces = ((portrait(real_faces, 0, 150), 20), (portrait(real_faces, 1, 320, 20), 200))
    [found] = detect_faces([photograph(*faces, (portrait(real_faces, 2, 44), 700))])
    boxes = [[202.13, 47.13, 462.43, 354.59], [30.6, 41.26, 157.08, 203.99], [707.57, 40.38, 740.93, 82.94]]
    np.testing.assert_allclose([face.box for face in found], boxes, atol=0.02)
    eyes = [[[298.1, 190.55], [399.84, 140.53]], [[68.08, 91.81], [126.8, 97.47]], [[714.54, 57.28], [730.69, 55.84]]]
    np.testing.assert_allclose([face.eyes for face in found], eyes, atol=0.02)
    mouths = [[392.9, 274.13], [91.5, 156.87], [723.13, 73.22]]
    np.testing.assert_allclose([face.mouth for face in found], mouths, atol=0.02)
    np.testing.assert_allclose([face.confidence for face in found], [0.99957, 0.99991, 0.99944], atol=1e-5)


def test_of_faces_that_overlap_the_best_of_each_picture_stay_as_torchvision_says() -> None:
    random = torch.Generator().manual_seed(0)
    corners, sides = torch.rand(900, 2, generator=random) * 100, torch.rand(900, 2, generator=random) * 60 + 5
    boxes, scores = torch.cat([corners, corners + sides], 1), torch.rand(900, generator=random)
    owners = torch.randint(0, 7, (900,), generator=random)
    for few in (900, 1, 0):
        rows = boxes[:few], scores[:few], owners[:few], 0.5
        assert torch.equal(suppress(*rows), batched_nms(*rows))
    assert len(suppress(boxes, scores, owners, 0.5)) < 900


def test_of_several_faces_the_largest_is_taken_or_all_and_tiny_ones_are_counted(real_faces: Path) -> None:
    faces = (
        (portrait(real_faces, 0, 150), 20),
        (portrait(real_faces, 1, 320), 200),
        (portrait(real_faces, 2, 44), 700),
    )
    photo = photograph(*faces)
    [largest], [every] = align_faces([photo], smallest=40), align_faces([photo], smallest=40, every_face=True)
    assert (largest.found, largest.tiny, len(largest.crops)) == (3, 1, 1)
    assert 200 < largest.detections[0].eyes[0, 0] < 520
    assert (every.found, every.tiny) == (3, 1)
    assert [200 < face.eyes[0, 0] < 520 for face in every.detections] == [True, False]


def test_a_photo_without_a_usable_face_says_why(real_faces: Path) -> None:
    blank = np.full((300, 400, 3), 90, np.uint8)
    small = photograph((portrait(real_faces, 2, 60), 100), size=(300, 200))
    none, tiny, dot = align_faces([blank, small, blank[:1, :1]], smallest=64)
    assert none == dot == Aligned([], [], 0, 0, "no face found")
    assert (tiny.crops, tiny.found, tiny.tiny) == ([], 1, 1)
    assert "pixels, at least 64 are needed" in tiny.reason


def test_a_photo_gives_the_same_crop_alone_and_among_others(real_faces: Path) -> None:
    photos = [photograph((portrait(real_faces, n, 200 + 20 * n), 100), size=(500 + 30 * n, 400)) for n in range(3)]
    for photo, together in zip(photos, align_faces(photos), strict=True):
        [alone] = align_faces([photo])
        np.testing.assert_allclose(together.detections[0].eyes, alone.detections[0].eyes, atol=0.05)
        assert np.abs(together.crops[0].astype(int) - alone.crops[0]).mean() < 0.5


@pytest.mark.parametrize("name", ["../../mine.jpg", "a/../../mine.jpg", "/tmp/mine.jpg", "C:mine.jpg", "link/mine.jpg"])
def test_the_names_of_a_manifest_lead_to_no_file_outside_the_folder_of_crops(
    tmp_path: Path, command: Cafe, name: str
) -> None:
    Image.new("RGB", (80, 80)).save(tmp_path / "photo.png")
    (tmp_path / "crops").mkdir()
    (tmp_path / "crops" / "link").symlink_to(tmp_path)
    face = Face(name, "photo.png", 0, "test", None, 80, 80, "0" * 64)
    Manifest.from_faces("stranger", str(tmp_path), [face]).save(
        UPath(command.workspace / "manifests" / "stranger.parquet")
    )
    output = command.fail("data", "align", "stranger", "--name", "own", "--out", str(tmp_path / "crops"), code=2)
    assert "out of" in output
    assert not (tmp_path / "mine.jpg").exists()


def test_a_manifest_keeps_its_kind_labels_splits_and_sample_ids(
    real_faces: Path, tmp_path: Path, command: Cafe
) -> None:
    root = tmp_path / "photos"
    for expression, number in (("happiness", 0), ("happiness", 1), ("anger", 2)):
        for split in ("train", "test"):
            (root / split / expression).mkdir(parents=True, exist_ok=True)
            portrait(real_faces, number, 220).save(root / split / expression / f"{number}.png")
    Image.new("RGB", (80, 80), MEADOW).save(root / "train" / "anger" / "meadow.jpg")
    portrait(real_faces, 0, 220).save(root / "train" / "anger" / "torn.jpg")
    whole = (root / "train" / "anger" / "torn.jpg").read_bytes()
    (root / "train" / "anger" / "torn.jpg").write_bytes(whole[:3000])
    command.succeed("data", "index", "folder", str(root), "--name", "raw")
    manifest = UPath(command.workspace / "manifests" / "raw.parquet")
    replace(Manifest.load(manifest), kind="sfew", classes=EIGHT).save(manifest)
    output = command.fail("data", "align", "raw", "--name", "upright", "--size", "96", code=1)
    assert (
        "2 photos left out:\n  train/anger/meadow.jpg: no face found\n  train/anger/torn.jpg: damaged image" in output
    )
    aligned, raw = (
        Manifest.load(UPath(command.workspace / "manifests" / f"{name}.parquet")) for name in ("upright", "raw")
    )
    protocol = find_protocol("paper")
    assert (aligned.kind, protocol.channels(aligned.kind), protocol.split(aligned, "sfew")) == ("sfew", "bgr", "test")
    assert aligned.classes == EIGHT
    columns = ["sample_id", "label", "split", "group"]
    kept = [row for row in raw.table.select(columns).to_pylist() if row["sample_id"].rsplit("/")[-1][0] in "012"]
    assert aligned.table.select(columns).to_pylist() == kept
    for row in range(len(aligned)):
        assert decode_image(aligned.path(row).read_bytes()).shape == (96, 96, 3)
    listed = pq.read_table(command.workspace / "aligned" / "upright" / "alignment.parquet").to_pylist()
    assert {row["sample_id"] for row in listed} == set(raw.sample_ids)
    assert sum(row["reason"] is not None for row in listed) == 2


def test_a_folder_of_photos_becomes_crops_of_every_face(real_faces: Path, tmp_path: Path, command: Cafe) -> None:
    (tmp_path / "photos" / "party").mkdir(parents=True)
    photo = photograph((portrait(real_faces, 0, 200), 40), (portrait(real_faces, 1, 300), 400))
    Image.fromarray(photo).save(tmp_path / "photos" / "party" / "two.jpg")
    (tmp_path / "photos" / "notes.txt").write_text("no photo")
    out = tmp_path / "crops"
    command.succeed("data", "align", str(tmp_path / "photos"), "--name", "party", "--faces", "all", "--out", str(out))
    assert sorted(path.name for path in (out / "party").iterdir()) == ["two.jpg", "two@2.jpg"]
    assert not (command.workspace / "manifests").exists()  # nobody said what the faces show


def test_crops_go_to_no_folder_of_other_files_but_to_one_that_a_kill_left(tmp_path: Path, command: Cafe) -> None:
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (80, 80), MEADOW).save(tmp_path / "photos" / "a.jpg")
    out = tmp_path / "out"
    out.mkdir()
    (out / "a.jpg").write_text("mine")
    words = ("data", "align", str(tmp_path / "photos"), "--name", "x", "--out", str(out))
    assert f"{out} holds 'a.jpg' and no crops of an earlier `cafe data align`" in command.fail(*words)
    assert (out / "a.jpg").read_text() == "mine"
    (out / ".align").touch()  # as after a kill
    assert "has a usable face" in command.fail(*words)
    assert not (out / ".align").exists()


def test_the_photos_that_are_decoded_ahead_are_bounded_by_their_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "HELD_BYTES", 3000)
    decoded = iter([(row, np.zeros(1000, np.uint8)) for row in range(7)])
    assert [len(chunk) for chunk in iter(lambda: datasets._take(decoded), [])] == [3, 3, 1]


def test_no_usable_face_at_all_is_one_sentence(tmp_path: Path, command: Cafe) -> None:
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (80, 80), MEADOW).save(tmp_path / "photos" / "a.jpg")
    output = command.fail("data", "align", str(tmp_path / "photos"), "--name", "x")
    assert "None of the 1 photos has a usable face (first: a.jpg: no face found)" in output
    assert pq.read_table(command.workspace / "aligned" / "x" / "alignment.parquet").num_rows == 1


def test_originals_are_never_overwritten(tmp_path: Path, command: Cafe) -> None:
    root = draw_faces(tmp_path / "faces", per_class=2)
    command.succeed("data", "index", "folder", str(root), "--name", "raw")
    assert "'raw' would overwrite itself" in command.fail("data", "align", "raw", "--name", "raw")
    assert "would overwrite the photos" in command.fail("data", "align", "raw", "--name", "x", "--out", str(root))
    assert "Unknown manifest 'nowhere'" in command.fail("data", "align", "nowhere", "--name", "x")
    said = command.fail("data", "align", str(tmp_path / "nowhere"), "--name", "x")
    assert f"There is no folder or archive {tmp_path / 'nowhere'}: give one of photos" in said
    for none in ("90", "nan"):
        said = command.fail("data", "align", "raw", "--name", "x", "--confidence", none)
        assert f"--confidence is a probability from 0 to 1, not {float(none)}" in said
    (tmp_path / "empty").mkdir()
    assert "There is no photo below" in command.fail("data", "align", str(tmp_path / "empty"), "--name", "x")


def test_crops_of_two_photos_with_one_name_are_refused_first(tmp_path: Path, command: Cafe) -> None:
    for first, second, faces in (("p.png", "p.png.jpg", "largest"), ("q.png", "q.png@2.jpg", "all")):
        folder = tmp_path / first
        folder.mkdir()
        for name in (first, second):
            Image.new("RGB", (9, 9)).save(folder / name)
        said = command.fail("data", "align", str(folder), "--name", "cut", "--faces", faces)
        assert "would both be" in said or "could have one name" in said
    assert not (command.workspace / "aligned" / "cut").exists()


def test_without_the_detector_the_remedy_is_named(
    tmp_path: Path, command: Cafe, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = draw_faces(tmp_path / "faces", per_class=1)
    monkeypatch.setitem(sys.modules, "mtcnn", None)  # as if it were not installed
    find_detector.cache_clear()
    output = command.fail("data", "align", str(root), "--name", "x")
    assert output == f"Error: Finding faces needs a detector that is not installed: run '{INSTALL}'."
    assert not (command.workspace / "aligned").exists()


def test_weights_of_another_detector_are_never_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = tmp_path / "mtcnn" / "assets" / "weights"
    weights.mkdir(parents=True)
    (tmp_path / "mtcnn" / "__init__.py").touch()
    (weights / "pnet.lz4").write_bytes(
        b"cos\nmkdir\n(V" + str(tmp_path / "opened").encode() + b"\ntR."
    )  # makes a folder
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mtcnn", raising=False)
    with pytest.raises(UserError, match=r"pnet\.lz4' are not those of the face detector: run 'pip install"):
        load_mtcnn()
    assert not (tmp_path / "opened").exists()
