"""Tables on screens of every width: no digit is cut off, no column is empty, and nothing is wider than the screen."""

from __future__ import annotations

import io
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import draw_faces
from rich.cells import cell_len
from rich.console import Console
from runs import write_predictions, write_run

from cafe.data.expressions import EXPRESSIONS
from cafe.errors import shorten
from cafe.inference.output import build_schema, write_table
from cafe.jobs import tables
from cafe.jobs.cli import main
from cafe.jobs.tables import FittedTable, make_table
from cafe.pipeline.workspace import Workspace

WIDTHS = (60, 80, 100, 120, 160)
LONG = "cafe (recipe.learning_rate=0.0003, recipe.features=standardised-by-the-source)"
NUMBER = re.compile(r"[−+]?\d[\d.,]*(?:e-\d+)?")


def show_at(table: FittedTable, width: int) -> list[str]:
    """The lines of a table on a screen of so many columns."""
    screen = Console(file=io.StringIO(), width=width, highlight=False, markup=False)
    screen.print(table, crop=False)
    return str(screen.file.getvalue()).splitlines()  # type: ignore[attr-defined]  # the file it was given


def read_cells(lines: list[str]) -> list[list[str]]:
    """The cells of the lines between the rules, part below part."""
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]


def comparison_like() -> FittedTable:
    header = ["source", "method", "seeds", *(f"target-with-a-long-name-{n}" for n in range(9)), "unseen accuracy"]
    table = make_table(header, (), words=2, names=2, title="Accuracy")
    table.order = (len(header) - 1,)
    for number, name in enumerate((LONG, LONG.replace("0.0003", "0.0005"), "scn", "")):
        cells = [f"({number}{place}.{place} ± 104.{place}) [2] †" for place in range(9)]
        table.add_row("studio", name or "cafe less the best rival", "any", *cells, f"7{number}.9 ± 28.7")
    return table


TABLES = {
    "comparison": comparison_like(),
    "prose": make_table(
        ["cell", "why it failed"], [(LONG, "The probabilities of 12,345 faces are NaN or infinite: " * 3)], words=2
    ),
    "lists": make_table(
        ["manifest", "kind", "features", "classes", "faces"],
        [("a-manifest-with-a-very-long-name-of-2024", "folder", ["face-resnet, 61 views of 128 channels"] * 2, 7, 1234567)],
        words=3,
    ),
    "names": make_table(
        ["source", "target", "source split", "target split", "target faces", "with a copy", "pairs"],
        [("a-source-of-some-length", f"target-{n}-of-some-length-{n}", "train", "test", 12345, 678, 9012) for n in (1, 2)],
        words=4,
        names=4,
    ),
}  # fmt: skip


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", TABLES)
def test_every_number_is_whole_and_every_column_filled(name: str, width: int) -> None:
    table, lines = TABLES[name], show_at(TABLES[name], width)
    assert max(map(len, lines)) <= width
    cells = read_cells(lines)
    numbers = Counter(line[place].text for line in table.lines for place in range(table.words, len(table.header)))
    there = Counter(cell for line in cells for cell in line)
    assert not {text for text, count in numbers.items() if text and there[text] < count}
    prose = " ".join(cell for line in cells for cell in line)
    for line in table.lines:
        for place in range(table.names, table.words):
            assert all(word in prose for word in line[place].text.split())
    for part in re.split(r"└.*┘", "\n".join(lines))[:-1]:
        columns = list(zip(*read_cells(part.splitlines()), strict=True))
        assert all(any(column) for column in columns)
        heads = zip(
            *([cell.strip() for cell in one.split("┃")[1:-1]] for one in part.splitlines() if one[:1] == "┃"),
            strict=True,
        )
        assert all(any(head) for head in heads)


def test_a_narrow_screen_shows_the_mean_of_unseen_targets_beside_the_method_and_names_what_shows_all() -> None:
    lines = show_at(TABLES["comparison"], 60)
    first = next(line for line in lines if line.startswith("┃"))
    assert first.split("┃")[2].strip() == "unseen"
    assert lines[0].strip() == "Accuracy – source: studio"
    names = "".join(line[0] for line in read_cells(lines))
    assert "0.0003" in names  # the two long ones differ in their middle, which stays
    assert "0.0005" in names
    assert "--wide shows them whole" in " ".join(lines[-2:])
    whole = show_at(TABLES["comparison"], 1000)
    assert sum(line.startswith("┃") for line in whole) == 1
    assert LONG in "".join(whole)
    assert not any("--wide" in line for line in whole)


def test_a_long_name_loses_its_middle() -> None:
    assert shorten("cafe-news-s0-08c0873b", 11) == "cafe-…0873b"
    assert shorten("cafe", 4) == "cafe"
    assert shorten("cafe", 1) == shorten("cafe", 0) == "…"
    assert shorten("file:/data/weights/msceleb.pth", 24) == "file:/data/…/msceleb.pth"
    assert shorten("写真/顔の写真.jpg", 12) == "写真/…真.jpg"  # whose letters each take two columns


FOUND = [  # what predict finds: file, box, doubts, second of a video, error
    ("/home/me/photos/2024/party/IMG_20240612_183211.jpg", (163, 225, 40, 12), ("unsure",), None, None),
    ("a.jpg", (1920, 1080, 3840, 2160), ("unsure", "small", "blurred", "turned"), None, None),
    ("写真/顔の写真顔の写真顔の写真.jpg", (24, 24, 0, 0), (), None, None),
    ("a/talk-with-a-long-name.mp4", (163, 225, 40, 12), ("small",), 3612.4, None),
    ("/home/me/photos/2024/party/IMG_20240612_183211.jpg", None, (), None, "no face was found"),
    ("a/talk-with-a-long-name.mp4", None, (), 2.8, "cut off after 2.8 of 4.0 s " * 4),
]


def predicted(width: int | None) -> list[str]:
    """The lines that predict prints of these on a terminal of so many columns, or into a file."""
    nothing, lines = dict.fromkeys(build_schema(EXPRESSIONS).names), io.BytesIO()
    with write_table(lines, EXPRESSIONS, width) as write:
        for file, box, doubts, time, error in FOUND:
            row = {**nothing, "file": file, "time": time, "error": error}
            if box:
                row |= dict.fromkeys(EXPRESSIONS, 0.02) | {
                    "happiness": 0.67,
                    "surprise": 0.21,
                    "expression": "happiness",
                }
                row |= dict(zip(("width", "height", "left", "top"), box, strict=True)) | dict.fromkeys(doubts, True)
            write([row])
    return lines.getvalue().decode().splitlines()


@pytest.mark.parametrize("width", WIDTHS)
def test_what_predict_prints_is_no_wider_than_the_terminal_and_only_names_lose_their_middle(width: int) -> None:
    lines, whole = predicted(width), predicted(None)
    assert max(map(cell_len, lines)) <= width
    assert len(whole) == 1 + len(FOUND)
    text = " ".join(" ".join(lines).split())
    for _, box, doubts, time, error in FOUND:
        said = [*doubts, *((error or "").split()), *([f"at {time:.2f} s"] if time else [])]
        assert all(part in text for part in [*said, *(["{}×{} at {}, {}".format(*box)] if box else [])])
    assert text.count("67% surprise 21%") == 4
    assert lines[-1].split()[-1] == "s"
    assert any(line.endswith(FOUND[0][0]) for line in lines) == (width >= 120)
    assert any(line.endswith("  …/party/IMG_20240612_183211.jpg") for line in lines) == (width == 100)
    assert any(line.endswith("  …/IMG_…211.jpg") for line in lines) == (width == 80)
    assert sum(file in line for line in whole for file in {file for file, *_ in FOUND}) == len(FOUND)


def test_a_name_in_a_text_stays_whole_where_it_has_room_beside_shortened_names() -> None:
    remedy = "fetched from its hub, or name a file: timm:vit_base_patch16_224.mae@FILE"
    table = make_table(["missing", "how to make it"], [(f"weights of the tower {LONG}", remedy)], words=2)
    for width in (80, 100, 120):
        lines = show_at(table, width)
        assert any("timm:vit_base_patch16_224.mae@FILE" in line for line in lines)
        assert max(map(len, lines)) <= width


def test_a_column_without_anything_in_it_is_left_out() -> None:
    lines = show_at(
        make_table(["point", "found", "problem"], [("disk", "2 GB", ""), ("GPUs", "none", "")], words=3), 80
    )
    assert "problem" not in "".join(lines)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Faces that are indexed, and runs that were evaluated on a dozen targets with long names."""
    root = tmp_path_factory.mktemp("tables")
    workspace = Workspace.at(str(root / "work"))
    faces = draw_faces(root / "faces", per_class=4)
    index = ["-w", str(workspace.root), "data", "index", "folder", str(faces), "--name", "mine"]
    assert CliRunner().invoke(main, index).exit_code == 0
    another = replace(workspace.load_manifest("mine"), name="another-set-of-faces-with-a-long-name")
    another.save(workspace.manifest_path(another.name))
    labels = np.arange(70) % 7
    for method in ("cafe", "scn"):
        for seed in range(3):
            run = write_run(workspace, method, source="elsewhere", source_kind="folder", seed=seed)
            wrong = (labels + (np.arange(70) % (3 + seed) == 0)) % 7
            manifests = {name: workspace.load_manifest(name).digest for name in workspace.manifest_names()}
            for target, manifest in manifests.items():
                write_predictions(run, target, labels, wrong, manifest=manifest)
    return root / "work"


COMMANDS = (
    "data list", "runs", "methods", "models", "compare", "compare --per-class mine",
    "store ls",
)  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_print_every_number_on_a_narrow_screen(workspace: Path, command: str) -> None:
    def numbers(*options: str, width: int) -> Counter[str]:
        arguments = ["-w", str(workspace), *command.split(), *options]
        done = CliRunner().invoke(main, arguments, env={"COLUMNS": str(width)})
        assert done.exit_code == 0, done.output
        if not options:
            assert max(map(len, done.stdout.splitlines())) <= width
        body = " ".join(cell for line in read_cells(done.stdout.splitlines()) for cell in line[1:])
        return Counter(NUMBER.findall(body))

    assert not numbers("--wide", width=60) - numbers(width=60)


def test_tables_are_made_in_one_place() -> None:
    jobs = Path(tables.__file__).parent
    makers = {path.name for path in jobs.glob("*.py") if re.search(r"rich\.table", path.read_text())}
    assert makers == {"tables.py"}
