"""Results over other classes than the seven: from the predictions to every table, test and page, and never in one column."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import Cafe, draw_faces
from PIL import Image
from runs import write_predictions, write_run
from upath import UPath

from cafe.data.expressions import EXPRESSIONS
from cafe.data.indexing import index_files
from cafe.data.readers import DATASETS
from cafe.errors import UserError
from cafe.files import write_json
from cafe.pipeline.workspace import Workspace
from cafe.report import ReportSettings
from cafe.report.card import write_card
from cafe.report.details import Gallery, list_details
from cafe.report.experiment import draw_experiment
from cafe.report.figures import draw_run_figures, find_cell, shade
from cafe.report.formats import to_csv, to_markdown
from cafe.report.report import Report, make_report
from cafe.report.sheets.runs import run_sheet
from cafe.results.columns import Column, name_class_sets
from cafe.results.metrics import confusion, score
from cafe.results.predictions import Predictions
from cafe.results.runs import Run, read_run
from cafe.results.scores import flatten_scores, read_scores
from cafe.results.significance.verdicts import conclude

EIGHT = (*EXPRESSIONS, "contempt")
OWN = ("awake", "drowsy", "asleep")
ALL_EIGHT = {"target_classes": json.dumps(EIGHT)}
COUNT = 112


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """Two methods of seven classes and one of eight, on a target that has seven and on one that has eight."""
    workspace = Workspace.at(str(tmp_path / "work"))
    for method, classes, right in (("cafe", (), 70), ("scn", (), 50), ("cafe", EIGHT, 90)):
        known, count = classes or EXPRESSIONS, len(classes or EXPRESSIONS)
        run = write_run(workspace, method, "raf", classes=classes, source_kind="rafdb")
        for target, there in (("news", EXPRESSIONS), ("fer", EIGHT)):
            shared = min(count, len(there))
            labels = np.arange(COUNT) % shared
            # The model of eight classes takes some faces for contemptuous, which none is on the target of seven.
            other = np.where(np.arange(COUNT) % 2, count - 1, (labels + 1) % shared)
            wrong = np.where(other == labels, 0, other)
            predicted = np.where(np.arange(COUNT) < right, labels, wrong)
            lacking = str(16 if count < len(there) else 0)
            about = {"target_classes": json.dumps(there), "other_classes": lacking}
            write_predictions(run, target, labels, predicted, classes=known, confidence=0.5, **about)
    return workspace


def runs_of(workspace: Workspace) -> list[Run]:
    return workspace.read_runs()


def cells(report: Report) -> dict[str, dict[str, str]]:
    sheet = report.sheets[0]
    return {line[1].text: dict(zip(sheet.header, (cell.text for cell in line), strict=True)) for line in sheet.lines}


def test_metrics_count_the_classes_of_the_predictions() -> None:
    probabilities = np.eye(3, dtype=np.float32)[[0, 1, 1, 0]]
    found = Predictions(list("abcd"), np.array([0, 1, 2, 2]), probabilities, {}, classes=OWN)
    assert confusion(found).tolist() == [[1, 0, 0], [0, 1, 0], [1, 1, 0]]
    scores = score(found)
    assert {name: value for name, value in scores.items() if name.startswith("recall/")} == {
        "recall/awake": 1.0, "recall/drowsy": 1.0, "recall/asleep": 0.0,
    }  # fmt: skip
    assert scores["macro_f1"] == pytest.approx((2 / 3 + 2 / 3 + 0) / 3)


def test_predictions_keep_their_classes_and_files_from_before_have_the_seven(tmp_path: Path) -> None:
    path = UPath(tmp_path / "x.parquet")
    Predictions(["a"], np.array([2]), np.full((1, 3), 1 / 3, np.float32), {}, classes=OWN).save(path)
    found = Predictions.load(path)
    assert found is not None
    assert (found.classes, found.probabilities.shape) == (OWN, (1, 3))
    assert (found.target_classes, found.other_classes) == (OWN, 0)  # the model's, unless the file says others
    run = write_run(Workspace.at(str(tmp_path)))
    old = read_run(run)
    assert old is not None
    assert old.classes == EXPRESSIONS


def test_what_is_shared_is_renormalised_and_the_labels_keep_their_names() -> None:
    probabilities = np.array([[0.2, 0.3, 0.5], [0.1, 0.0, 0.9], [0, 1.0, 0]], np.float32)
    about = {"target_classes": json.dumps(["asleep", "angry", "awake"])}
    found = Predictions(list("abc"), np.array([2, 0, 2]), probabilities, about, classes=OWN).share_classes()
    assert found.classes == ("awake", "asleep")
    assert found.labels.tolist() == [1, 0, 1]
    np.testing.assert_allclose(found.probabilities, [[2 / 7, 5 / 7], [0.1, 0.9], [0.5, 0.5]], rtol=1e-6)
    same = Predictions(
        list("abc"), np.array([2, 0, 2]), probabilities, {"target_classes": json.dumps(OWN)}, classes=OWN
    )
    assert same.share_classes() is same
    nothing = Predictions([], np.zeros(0, int), np.zeros((0, 3), np.float32), ALL_EIGHT, classes=OWN).share_classes()
    assert (nothing.classes, nothing.probabilities.shape) == ((), (0, 0))


def test_the_order_of_the_classes_of_a_model_makes_no_column_of_its_own(tmp_path: Path) -> None:
    workspace = Workspace.at(str(tmp_path / "work"))
    labels, wrong = np.arange(90) % 3, (np.arange(90) + 1) % 3
    for method, order in (("cafe", (0, 1, 2)), ("scn", (2, 0, 1))):
        names = tuple(("happiness", "sadness", "pain")[place] for place in order)
        run = write_run(workspace, method, "raf", classes=names, source_kind="rafdb")
        place = np.argsort(order)  # of each class in this model's order
        write_predictions(run, "news", place[labels], place[np.where(np.arange(90) < 60, labels, wrong)], classes=names)
    report = make_report(runs_of(workspace), settings=ReportSettings(versus="scn"))
    assert report.sheets[0].header[3] == "news"
    assert [row["news"] for row in cells(report).values()][:2] == ["66.7", "66.7"]
    assert {row.classes for row in report.comparison.scores.itertuples()} == {("happiness", "sadness", "pain")}
    (test,) = (test for test in report.tests if test.title == "news")
    assert test.difference.mean == 0


def test_published_numbers_stand_beside_the_seven_in_any_order(tmp_path: Path) -> None:
    workspace = Workspace.at(str(tmp_path / "work"))
    run = write_run(workspace, "cafe", "raf", classes=EXPRESSIONS[::-1], source_kind="rafdb")
    labels = np.arange(70) % 7
    write_predictions(run, "fer", labels, labels, kind="ferplus", classes=EXPRESSIONS[::-1])
    assert make_report(runs_of(workspace)).published[0] is not None
    (published,) = make_report(runs_of(workspace), per_class="fer").published
    assert published is not None
    assert {column.part for column in published.cells} >= set(EXPRESSIONS)


def test_class_sets_are_told_apart_by_their_number_or_else_by_their_turn() -> None:
    assert name_class_sets([EXPRESSIONS, EXPRESSIONS]) == {EXPRESSIONS: ""}
    other = (*EXPRESSIONS[:-1], "contempt")
    assert name_class_sets([EXPRESSIONS, EIGHT, other]) == {
        EXPRESSIONS: "7 classes #1", EIGHT: "8 classes", other: "7 classes #2",
    }  # fmt: skip


def test_runs_of_several_class_sets_have_columns_and_means_of_their_own(workspace: Workspace) -> None:
    report = make_report(runs_of(workspace), settings=ReportSettings(versus="scn"))
    sheet = report.sheets[0]
    assert sheet.header[3:8] == [
        "fer (7 classes)", "fer (8 classes)", "news (7 classes)", "news (8 classes)", "unseen accuracy (7 classes)",
    ]  # fmt: skip
    rows = cells(report)
    assert rows.keys() - {"faces", "chance"} == {"cafe (classes=7)", "cafe (classes=8)", "scn"}
    seven, eight = rows["cafe (classes=7)"], rows["cafe (classes=8)"]
    assert seven["news (8 classes)"] == eight["news (7 classes)"] == "–"
    assert seven["unseen accuracy (7 classes)"] == f"{100 * 70 / COUNT:.1f}"
    assert eight["unseen accuracy (8 classes)"] == f"{100 * 90 / COUNT:.1f}"
    notes = " ".join(sheet.notes)
    assert "stand in columns of their own. 7 classes: surprise, fear" in notes
    assert "Faces left out, of a class that the model does not have: 16 of fer (7 classes)." in notes
    assert "--shared-classes leaves those out" in notes
    assert {(test.row.runs[0].classes, test.title) for test in report.tests} == {
        (EXPRESSIONS, "fer (7 classes)"), (EXPRESSIONS, "news (7 classes)"), (EXPRESSIONS, "mean of unseen"),
    }  # fmt: skip
    assert report.published == [None] * 3
    assert conclude(report.comparison) == ""
    records = list(csv.DictReader(io.StringIO(to_csv(report))))
    assert {record["target"] for record in records if record["mean"] and record["metric"] == "accuracy"} == {
        "fer (7 classes)", "fer (8 classes)", "news (7 classes)", "news (8 classes)",
        "mean of unseen (7 classes)", "mean of unseen (8 classes)",
    }  # fmt: skip


def test_over_shared_classes_the_target_of_seven_is_one_column(workspace: Workspace, tmp_path: Path) -> None:
    report = make_report(runs_of(workspace), settings=ReportSettings(versus="scn", shared_classes=True))
    assert report.sheets[0].header[3:6] == ["fer (7 classes)", "fer (8 classes)", "news (7 classes)"]
    row = cells(report)["cafe (classes=8)"]
    means = [name for name in row if name.startswith("unseen accuracy") and row[name] != "–"]
    assert means == ["unseen accuracy (7 classes, 8 classes)"]
    # Of equal probabilities the first is taken: faces of surprise that were called contemptuous are right.
    wrong = np.arange(90, COUNT)
    right = 90 + int(((wrong % 2 == 1) & (wrong % 7 == 0)).sum())
    assert row["news (7 classes)"] == f"{100 * right / COUNT:.1f}"
    assert "news (7 classes)" in {test.title for test in report.tests if test.row.runs[0].classes == EIGHT}
    assert "Over the classes that model and target share" in " ".join(report.sheets[0].notes)
    cafe, file = Cafe(tmp_path / "work", ""), tmp_path / "table.md"
    cafe.succeed("compare", "--shared-classes", "--versus", "scn", "--markdown", str(file))
    assert file.read_text() == to_markdown(
        make_report(runs_of(workspace), settings=ReportSettings(versus="scn", shared_classes=True))
    )


def test_recalls_by_class_are_those_of_each_class_set(workspace: Workspace) -> None:
    report = make_report(runs_of(workspace), settings=ReportSettings(versus="scn"), per_class="news")
    header = report.sheets[0].header[3:]
    assert header[:9] == [f"{name} (7 classes)" for name in (*EXPRESSIONS, "overall", "mean")]
    assert header[9:-1] == [f"{name} (8 classes)" for name in (*EIGHT, "overall", "mean")]
    assert {test.row.runs[0].classes for test in report.tests} == {EXPRESSIONS}
    one = make_report([run for run in runs_of(workspace) if run.classes == EIGHT], per_class="fer")
    assert one.sheets[0].header[3:-1] == [*EIGHT, "overall", "mean"]


def test_the_page_and_the_card_have_the_classes_of_the_run(workspace: Workspace, tmp_path: Path) -> None:
    runs = runs_of(workspace)
    found = make_report(runs)
    page = draw_experiment("cafe", found, workspace.root, workspace.find_manifest).decode()
    assert page.count('<abbr title="contempt">') == 2  # in the confusions of one row on two targets
    details = list_details(found.comparison, Gallery(500, ("contempt",)))
    assert {shown.mistake.label for detail in details for shown in detail.mistakes} == {"contempt"}
    with pytest.raises(UserError, match="Unknown expression 'joy': choose anger, contempt"):
        list_details(found.comparison, Gallery(classes=("joy",)))
    (run,) = (run for run in runs if run.classes == EIGHT)
    record = {
        "input": {"name": "faces"}, "output": {"name": "probabilities"},
        "averaged": {"seeds": [0], "mirror_images": False},
        "check": {"faces": 3, "largest_difference": 1e-6},
    }  # fmt: skip
    card = write_card([run], [run], {}, record).decode()
    assert "the probabilities of 8 expressions" in card
    assert (
        "| faces | largest class | accuracy | surprise | fear | disgust | happiness | sadness | anger | neutral | contempt |"
        in card
    )


def test_tracked_names_have_the_recalls_of_the_run(workspace: Workspace) -> None:
    (run,) = (run for run in runs_of(workspace) if run.classes == EIGHT)
    names = flatten_scores(read_scores([run])).keys()
    assert "target/fer/recall/contempt" in names
    assert "target/news/recall/contempt" not in names  # which has no such face


def test_the_table_of_one_run_says_how_many_faces_its_model_has_no_class_for(workspace: Workspace) -> None:
    for run in runs_of(workspace):
        note = ["Faces left out, of a class that the model does not have: 16 of fer."]
        said = [line for line in run_sheet(read_scores([run])).notes if line.startswith("Faces left out")]
        assert said == (note if run.classes == EXPRESSIONS else [])


def test_figures_are_drawn_from_files_and_a_face_that_is_gone_is_left_out(tmp_path: Path) -> None:
    workspace = Workspace.at(str(tmp_path / "work"))
    manifest = index_files("web", DATASETS["folder"](UPath(draw_faces(tmp_path / "faces", per_class=2)))).manifest
    run, column = write_run(workspace), Column("web")
    labels = manifest.labels
    probabilities = np.eye(7, dtype=np.float32)[(labels + 1) % 7]
    Predictions(manifest.sample_ids, labels, probabilities, {"target": "web"}).save(column.predictions(run))
    assert [kind for kind, *_ in draw_run_figures(run, column, None)] == ["confusion"]
    shown = [row for row in range(len(labels)) if row < 2]
    heats = {
        "sample_ids": [manifest.sample_ids[row] for row in shown],
        "classes": [EXPRESSIONS[labels[row]] for row in shown],
        "heats": [[[0.1, 0.2], [0.3, 0.4]]] * 2,
    }
    write_json(column.figure(run, "masks", ".json"), {"fear": [0.5] * 14, "anger": [0.25] * 14})
    write_json(column.figure(run, "heat_maps", ".json"), heats)
    sizes = []
    for gone in range(3):
        drawn = {kind: Image.open(io.BytesIO(data)) for kind, _, data in draw_run_figures(run, column, manifest)}
        assert drawn.keys() >= {"confusion", "errors", "masks"}
        assert ("heat_maps" in drawn) == (gone < 2)
        assert drawn["confusion"].getpixel(find_cell(labels[0], (labels[0] + 1) % 7)) == shade(1)
        sizes.append(sum(drawn["errors"].convert("L").histogram()[:250]))
        Path(str(manifest.path(gone))).unlink()
    assert sizes[0] > sizes[1] > sizes[2]  # a tile less each time
    assert list(draw_run_figures(run, Column("nowhere"), manifest)) == []
