"""`cafe data check`: what it says of pictures whose state is known, and the page it writes."""

from __future__ import annotations

import base64
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from conftest import Cafe, draw_faces
from PIL import Image

from cafe.data.checking import look_at
from cafe.data.images import decode_image


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
