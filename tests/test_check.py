"""`cafe data check`: what it says of pictures whose state is known, and the page it writes."""

from __future__ import annotations

import base64
import gc
import shutil
import tracemalloc
from collections.abc import Callable
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from conftest import Cafe, draw_faces
from PIL import Image
from upath import UPath

from cafe.data.checking import check_pictures, look_at
from cafe.data.images import decode_image
from cafe.data.manifest import Face, Manifest
from cafe.data.rows import SPLITS, RowFiles
from cafe.report.inspection import draw_check


class Page(HTMLParser):
    """The pictures of a page and every address it would load."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.pictures: list[str] = []
        self.loads: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attributes}
        if tag == "img":
            self.pictures.append(values["src"])
        self.loads += [values[name] for name in ("href", "src") if name in values and tag != "img"]


@pytest.fixture
def command(tmp_path: Path) -> Cafe:
    """The command line in a fresh workspace, for commands that need no cluster."""
    return Cafe(tmp_path / "work", address="")


def test_a_picture_is_measured() -> None:
    pixels = np.zeros((10, 20, 3), np.uint8)
    pixels[:5] = (200, 200, 200)
    look = look_at(pixels)
    assert (look.width, look.height, look.grey) == (20, 10, True)
    assert look.brightness == pytest.approx(100)
    pixels[0] = (255, 0, 0)  # a tenth of it in colour
    assert not look_at(pixels).grey
    assert look_at(pixels.reshape(20, 10, 3)).pixels != look_at(pixels).pixels


def test_the_state_of_a_data_set_is_counted_and_shown(tmp_path: Path, command: Cafe) -> None:
    root = draw_faces(tmp_path / "faces", per_class=30)
    for number in range(4):  # grey, dark and larger
        pixels = np.random.default_rng(number).integers(0, 41, (70, 60), dtype=np.uint8)
        (root / "neutral").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(root / "neutral" / f"{number}.png")
    with Image.open(root / "neutral" / "0.png") as picture:  # the same pixels in another format, under another label
        picture.save(root / "anger" / "again.bmp")
    whole = (root / "anger" / "000.jpg").read_bytes()
    (root / "anger" / "torn.jpg").write_bytes(whole[:-100])  # its header is intact, so it is indexed
    command.succeed("data", "index", "folder", str(root), "--name", "tiny")
    output = command.fail("data", "check", "tiny", code=1)
    lines = [[cell.strip() for cell in line.strip("│").split("│")] for line in output.splitlines() if "│" in line]
    table = {line[0]: line for line in lines}
    assert table["neutral"][3:] == ["4", "100 %", "20", "60×70", "0"]
    assert table["anger"][3:5] == ["32", "3 %"]
    assert table["anger"][-1] == "1"
    assert table["fear"][3:] == ["0", "–", "–", "–", "0"]
    assert table["48–63"][2] == "5"
    assert "1 unreadable files:\n  anger/torn.jpg: damaged image" in output
    assert "1 groups of identical pictures:\n  anger/again.bmp = neutral/0.png" in output

    text = (command.workspace / "reports" / "check-tiny.html").read_text()
    page = Page(text)
    assert page.loads == ["#main"]  # the link past the header
    assert len(page.pictures) == 3 * 24 + 4 + 1  # a sheet of each expression, and the repeated picture
    for source in page.pictures:
        kind, _, data = source.partition(",")
        assert kind == "data:image/jpeg;base64"
        assert decode_image(base64.b64decode(data)).shape in {(24, 24, 3), (70, 60, 3)}
    assert "1 groups carry several labels" in text
    assert "damaged image" in text


def test_a_set_with_classes_of_its_own_has_a_line_and_a_sheet_for_each(tmp_path: Path, command: Cafe) -> None:
    root = draw_faces(tmp_path / "faces", per_class=3)
    (root / "anger").rename(root / "Pain")
    command.succeed(
        "data", "index", "folder", str(root), "--name", "ward", "--expressions", "pain,happiness,sadness,awake"
    )
    output = command.succeed("data", "check", "ward")
    lines = [[cell.strip() for cell in line.strip("│").split("│")] for line in output.splitlines() if "│" in line]
    assert [(line[0], line[3]) for line in lines[:5]] == [
        ("pain", "3"), ("happiness", "3"), ("sadness", "3"), ("awake", "0"), ("all", "9"),
    ]  # fmt: skip
    page = Page((command.workspace / "reports" / "check-ward.html").read_text())
    assert len(page.pictures) == 9


def test_a_set_of_which_nothing_can_be_read_is_no_crash(tmp_path: Path, command: Cafe) -> None:
    root = draw_faces(tmp_path / "faces", per_class=2)
    command.succeed("data", "index", "folder", str(root), "--name", "gone")
    shutil.rmtree(root)
    output = command.fail("data", "check", "gone", code=1)
    assert "6 unreadable files:\n  anger/000.jpg: file not found" in output
    assert "Unknown manifest 'other'" in command.fail("data", "check", "other")


def test_names_of_files_cannot_break_the_page(tmp_path: Path, command: Cafe) -> None:
    root = draw_faces(tmp_path / "faces", per_class=2)
    shutil.copy(root / "anger" / "000.jpg", root / "anger" / "<b>&copy.jpg")
    command.succeed("data", "index", "folder", str(root), "--name", "odd")
    command.succeed("data", "check", "odd")
    page = (command.workspace / "reports" / "check-odd.html").read_text()
    assert "<b>&copy" not in page
    assert "&lt;b&gt;&amp;copy.jpg" in page


def test_real_photographs_are_told_apart_by_colour(real_faces: Path, tmp_path: Path, command: Cafe) -> None:
    for name in ("news", "cinema"):
        for path in sorted((real_faces / name / "anger").iterdir())[:12]:
            (tmp_path / name / "anger").mkdir(parents=True, exist_ok=True)
            shutil.copy(path, tmp_path / name / "anger")
        command.succeed("data", "index", "folder", str(tmp_path / name), "--name", name)
    assert " 100 % " in command.succeed("data", "check", "news")
    assert " 0 % " in command.succeed("data", "check", "cinema")


@pytest.fixture
def crops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Manifest]:
    """What makes a manifest of so many small parts of one picture, every tenth of them twice; a few rows are in memory."""
    for name, number in (("AT_ONCE", 16), ("SORTED_AT_ONCE", 32), ("MERGED_AT_ONCE", 4)):
        monkeypatch.setattr(f"cafe.spool.{name}", number)
    for module in ("rows", "manifest"):
        monkeypatch.setattr(f"cafe.data.{module}.ROWS_AT_ONCE", 16)
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)
    Image.fromarray(np.maximum(pixels, np.arange(64, dtype=np.uint8) * 3)).save(tmp_path / "noise.bmp")
    digest = sha256((tmp_path / "noise.bmp").read_bytes()).hexdigest()

    def place(number: int) -> tuple[int, int, int, int]:
        part = number - (number % 10 == 9)
        return part % 50, part // 50, 8 + part % 5, 8

    def make(count: int) -> Manifest:
        boxes = [place(number) for number in range(count)]
        faces = (
            Face(f"{n:05d}", "noise.bmp", n % 3, SPLITS[n % 2], None, *box[2:], digest, box)
            for n, box in enumerate(boxes)
        )
        return Manifest.from_faces("crops", str(tmp_path), faces)

    return make


def test_the_memory_of_a_check_does_not_grow_with_the_faces(crops: Callable[[int], Manifest]) -> None:
    held = []
    for count in (20, 100, 300):  # the first one imports
        manifest = crops(count)
        tracemalloc.start()
        try:
            check = check_pictures(manifest, lambda *_: None)
            lines, sides = check.summary[1], check.histograms["shorter side"]
            gc.collect()
            held.append(tracemalloc.get_traced_memory()[0])
        finally:
            tracemalloc.stop()
        looks = [face.look for face in check.seen]
        medians = [np.median([look[place] for look in looks]) for place in range(3)]
        assert lines[-1][3:] == [str(count), "100 %", f"{medians[2]:.0f}", "{:.0f}×{:.0f}".format(*medians), "0"]
        assert [[face.row for face in group] for group in check.duplicates] == [[n - 1, n] for n in range(9, count, 10)]
        assert sides[0] == ("0–31", count)
    assert held[2] - held[1] < 30_000, held  # of 200 faces; a row of findings in memory would take three times as much


def test_the_rows_of_a_large_manifest_stay_in_their_files(
    tmp_path: Path, crops: Callable[[int], Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cafe.data.manifest.LARGE", 50)
    monkeypatch.setattr("cafe.data.rows.ROWS_A_FILE", 64)
    whole = crops(150)
    whole.save(UPath(tmp_path / "crops.parquet"))
    filed = Manifest.load(UPath(tmp_path / "crops.parquet"))
    found, expected = (check_pictures(manifest, lambda *_: None) for manifest in (filed, whole))
    assert draw_check(found) == draw_check(expected)
    assert isinstance(filed.table, RowFiles)
    assert not filed.table._columns  # no column was read as a whole
