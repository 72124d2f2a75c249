"""Numbers from predictions, against hand-computed ones, scikit-learn's and SciPy's."""

from __future__ import annotations

import csv
import io
import math
import resource
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from conftest import complaint
from runs import write_predictions, write_run
from scipy import stats
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    brier_score_loss,
    f1_score,
    log_loss,
    recall_score,
    roc_auc_score,
)
from upath import UPath

from cafe.data.expressions import EXPRESSIONS
from cafe.errors import UserError
from cafe.jobs.cli import main
from cafe.jobs.listings import marks_doubt
from cafe.jobs.names import list_names
from cafe.pipeline.release import library
from cafe.pipeline.workspace import Workspace
from cafe.report.card import count_right
from cafe.report.drawings import list_drawings
from cafe.report.experiment import draw_experiment
from cafe.report.figures import draw_confusion, find_cell, shade
from cafe.report.formats import to_csv
from cafe.report.report import list_records, make_report
from cafe.report.sheets.runs import run_sheet
from cafe.report.sheets.sheet import BEST
from cafe.results.columns import Column, Mean
from cafe.results.metrics import (
    METRICS,
    Estimate,
    Metric,
    confusion,
    estimate,
    is_doubtful,
    macro_f1,
    macro_f1_error,
    risk_at,
    score,
    selective_risks,
)
from cafe.results.predictions import Predictions
from cafe.results.protocols import ALL_PROTOCOLS
from cafe.results.scores import flatten_scores, read_scores
from cafe.results.units import PERCENT


def predictions(labels: list[int], predicted: list[int]) -> Predictions:
    ids = [f"{number}.jpg" for number in range(len(labels))]
    return Predictions(ids, np.array(labels), np.eye(7, dtype=np.float32)[predicted], {"target": "x"})


def test_a_worked_example() -> None:
    scores = score(predictions([0, 0, 0, 0, 3, 3], [0, 0, 0, 3, 3, 6]))
    assert scores["accuracy"] == pytest.approx(4 / 6)
    assert scores["recall/surprise"] == pytest.approx(3 / 4)
    assert scores["recall/happiness"] == pytest.approx(1 / 2)
    assert scores["mean_class_accuracy"] == pytest.approx(5 / 8)
    assert scores["macro_f1"] == pytest.approx((6 / 7 + 1 / 2) / 2)
    assert "recall/fear" not in scores  # the target has no fearful face


def test_scores_agree_with_scikit_learn_on_random_predictions() -> None:
    random = np.random.default_rng(0)
    labels, predicted = random.integers(0, 7, (2, 500)).tolist()
    scores = score(predictions(labels, predicted))
    assert scores["mean_class_accuracy"] == pytest.approx(balanced_accuracy_score(labels, predicted))
    assert scores["macro_f1"] == pytest.approx(f1_score(labels, predicted, average="macro"))


def spread(count: int, seed: int, classes: tuple[int, ...] = tuple(range(7))) -> Predictions:
    """Predictions with probabilities of any value, of faces of some classes."""
    random = np.random.default_rng(seed)
    labels = random.choice(classes, count)
    odds = np.exp(random.normal(size=(count, 7)) + 1.2 * np.eye(7)[labels])
    ids = [f"{number}.jpg" for number in range(count)]
    return Predictions(ids, labels, odds / odds.sum(axis=1, keepdims=True), {"target": "x"})


@pytest.mark.parametrize("seed", range(2))
def test_metrics_of_probabilities_are_those_of_scikit_learn(seed: int) -> None:
    found = spread(601, seed)
    labels, predicted, probabilities = found.labels, found.predicted, found.probabilities
    order = np.argsort(-probabilities.max(axis=1))
    wrong, surest = (predicted != labels)[order], order[:481]  # 80 % of 601, rounded up
    expected = {
        "accuracy": accuracy_score(labels, predicted),
        "macro_f1": f1_score(labels, predicted, average="macro"),
        "worst_class_recall": recall_score(labels, predicted, average=None).min(),
        "auroc": roc_auc_score(labels, probabilities, multi_class="ovr", average="macro"),
        "nll": log_loss(labels, probabilities),
        "brier": brier_score_loss(labels, probabilities),
        "aurc": np.mean([wrong[:count].mean() for count in range(1, 602)]),
        "risk_at_80": 1 - accuracy_score(labels[surest], predicted[surest]),
    }  # fmt: skip
    scores = score(found)
    assert {name: scores[name] for name in expected} == pytest.approx(expected, abs=1e-12)


def test_the_area_under_the_curve_of_a_target_without_some_classes_is_that_of_the_others() -> None:
    found = spread(200, 0, classes=(0, 3, 5))
    own = [roc_auc_score(found.labels == label, found.probabilities[:, label]) for label in (0, 3, 5)]
    assert score(found)["auroc"] == pytest.approx(np.mean(own), abs=1e-12)
    assert "auroc" not in score(spread(20, 0, classes=(3,)))  # there is no rest


def test_faces_of_equal_confidence_share_their_errors_whatever_their_order() -> None:
    """Right, wrong, right, right with confidences .9, .6, .6, .6 and .4 (wrong): the three share one error."""
    found = predictions([0, 1, 2, 3, 4], [0, 0, 2, 3, 0])
    found = replace(found, probabilities=found.probabilities * np.array([[0.9, 0.6, 0.6, 0.6, 0.4]]).T)
    risks = [0, 1 / 6, 2 / 9, 1 / 4, 2 / 5]
    for rows in ([0, 1, 2, 3, 4], [4, 3, 1, 2, 0]):
        turned = replace(found, labels=found.labels[rows], probabilities=found.probabilities[rows])
        assert selective_risks(turned) == pytest.approx(risks, abs=1e-15)
        assert score(turned)["aurc"] == pytest.approx(np.mean(risks), abs=1e-15)
    assert [risk_at(found, share) for share in (0.8, 0.4, 0.0)] == pytest.approx([1 / 4, 1 / 6, 0])


def test_the_calibration_error_of_a_worked_example() -> None:
    """Two bins: confidence 0.9, of which half are right, and 0.4, of which all are."""
    probabilities = np.array([[0.9, *[0.1 / 6] * 6]] * 4 + [[0.4, *[0.1] * 6]] * 2)
    ids = [str(number) for number in range(6)]
    scores = score(Predictions(ids, np.array([0, 0, 1, 1, 0, 0]), probabilities, {}))
    assert scores["ece"] == pytest.approx((4 * abs(0.5 - 0.9) + 2 * abs(1 - 0.4)) / 6)


def test_predictions_survive_their_file(tmp_path: Path) -> None:
    before = predictions([1, 2], [2, 2])
    before.save(UPath(tmp_path / "p" / "cinema.parquet"))
    after = Predictions.load(UPath(tmp_path / "p" / "cinema.parquet"))
    assert after is not None
    assert after.sample_ids == before.sample_ids
    assert after.labels.tolist() == [1, 2]
    np.testing.assert_array_equal(after.probabilities, before.probabilities)
    assert after.about["target"] == "x"
    assert after.groups is None
    Predictions(before.sample_ids, before.labels, before.probabilities, {}, ["anna", None]).save(UPath(tmp_path / "x"))
    grouped = Predictions.load(UPath(tmp_path / "x"))
    assert grouped is not None
    assert grouped.groups == ["anna", None]
    unsure = replace(before, further={"uncertainty": np.array([0.25, 1.5], np.float32)})
    unsure.save(UPath(tmp_path / "x"))
    again = Predictions.load(UPath(tmp_path / "x"))
    assert again is not None
    assert again.further["uncertainty"].tolist() == [0.25, 1.5]
    assert again.of_class(2).further["uncertainty"].tolist() == [1.5]
    assert after.further == {}
    said = complaint(replace(before, further={"label": np.zeros(2, np.float32)}).save, UPath(tmp_path / "x"))
    assert said == "The method says 'label' of each face, which is a column of all predictions: rename it."
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p", "x"]  # nothing half written is left


def test_a_damaged_file_of_predictions_is_named_with_the_remedy(tmp_path: Path) -> None:
    path = UPath(tmp_path / "cinema.parquet")
    assert Predictions.load(path) is None
    predictions([1, 2], [2, 2]).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    assert "evaluate the run again" in complaint(Predictions.load, path)
    path.write_bytes(whole[:40] + b"\xff" * 60 + whole[100:])
    assert "evaluate the run again" in complaint(Predictions.load, path)
    for column in ("label", "probabilities"):
        table = pq.read_table(pa.BufferReader(whole))
        words = table.set_column(table.column_names.index(column), column, [["surprise", "fear"]])
        pq.write_table(words, path)
        assert "evaluate the run again" in complaint(Predictions.load, path)
    for labels, odds in (([1, 2], math.nan), ([1, -1], 1 / 7), ([1, 7], 1 / 7)):
        pq.write_table(pa.table({"label": labels, "probabilities": [[odds] * 7] * 2, "sample_id": ["a", "b"]}), path)
        assert "evaluate the run again" in complaint(Predictions.load, path, False)


def test_probabilities_that_are_no_numbers_are_refused_with_the_name_of_the_face(tmp_path: Path) -> None:
    broken = predictions([1, 2, 3], [2, 2, 3])
    broken.probabilities[1, 4] = math.nan
    broken.probabilities[2, 0] = math.inf
    with pytest.raises(UserError, match=f"of '{broken.sample_ids[1]}' and 1 other faces are NaN or infinite"):
        broken.save(UPath(tmp_path / "cinema.parquet"))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_old_predictions_and_nothing_half_written(tmp_path: Path) -> None:
    path = UPath(tmp_path / "cinema.parquet")
    predictions([1, 2], [2, 2]).save(path)
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # no file may grow larger
    try:
        with pytest.raises(OSError, match="File too large"):
            predictions([3, 4], [3, 3]).save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert [found.name for found in tmp_path.iterdir()] == ["cinema.parquet"]


def test_the_interval_is_students_t() -> None:
    values = [0.5, 0.6, 0.65]
    result = estimate(values)
    low, high = stats.t.interval(0.95, 2, loc=np.mean(values), scale=stats.sem(values))
    assert (result.mean - result.half_width, result.mean + result.half_width) == pytest.approx((low, high))
    assert str(result) == "58.3 ± 19.0"


def test_the_interval_covers_the_truth_95_times_in_100() -> None:
    random = np.random.default_rng(1)
    covered = [abs(e.mean - 0.5) <= e.half_width for e in (estimate(random.normal(0.5, 0.1, 3)) for _ in range(4000))]
    assert 0.93 < np.mean(covered) < 0.97


def test_one_seed_has_no_interval_and_none_no_number() -> None:
    assert str(estimate([0.5])) == "50.0"
    assert str(estimate([])) == "–"
    assert math.isnan(Estimate(0.5, math.nan, 1).half_width)


def test_the_confusion_figure_shows_percent_of_the_true_class() -> None:
    counts = confusion(predictions([0, 0, 0, 0, 3, 3], [0, 0, 0, 3, 3, 6]))
    assert counts[0].tolist() == [3, 0, 0, 1, 0, 0, 0]
    page = draw_confusion(counts, EXPRESSIONS, "title")
    shown = {cell: page.getpixel(find_cell(*cell)) for cell in ((0, 0), (0, 3), (3, 6), (0, 1))}
    assert shown == {(0, 0): (68, 99, 144), (0, 3): shade(0.25), (3, 6): shade(0.5), (0, 1): shade(0)}
    assert page.getpixel(find_cell(1, 0)) == (255, 255, 255)  # no fearful face, no percent
    long = np.asarray(draw_confusion(np.diag([12_345, 1]), ("fearfully disgusted", "awake"), ""))
    assert (long[:, :5] == 255).all()  # names are not cut off at the edge


def test_a_metric_that_is_added_to_the_registry_is_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line, from the table of scores to MLflow: the share of faces whose class is not the least probable one."""
    monkeypatch.setitem(METRICS, "not_last", Metric("not the last", not_last, higher_is_better=False, beside=True))
    workspace = Workspace.at(str(tmp_path / "work"))
    labels = np.arange(70) % 7
    for method, right in (("cafe", 10), ("scn", 40)):
        for seed in range(2):
            run = write_run(workspace, method, seed=seed)
            for target in ("fer", "mine"):
                write_predictions(
                    run, target, labels, np.where(np.arange(70) < right + seed, labels, 6), confidence=0.4
                )
    runs = workspace.read_runs()
    scores = read_scores(runs)
    assert scores["not_last"].between(0, 1).all()
    assert {"target/fer/not_last", "unseen/not_last"} <= flatten_scores(scores[scores["run"] == runs[0].name]).keys()
    assert "not_last" in library.scores(str(workspace.root)).columns
    assert "unseen not the last" in make_report(runs).sheets[0].header
    assert "not the last" in run_sheet(scores[scores["run"] == runs[0].name]).header
    beside = list(csv.DictReader(io.StringIO(to_csv(make_report(runs)))))
    assert {row["target"] for row in beside if row["metric"] == "not_last"} == {"mean of unseen"}

    report = make_report(runs, metrics="not_last")
    (expected,) = set(scores.loc[(scores["method"] == "cafe") & (scores["seed"] == 0), "not_last"])
    records = [record for record in list_records(report) if record["metric"] == "not_last"]
    assert {record["target"] for record in records} == {"fer", "mine", "mean of unseen", "mean of all"}
    assert report.comparison.rows[0].cells[Column("fer")].values[0] == pytest.approx(expected)
    best = {line[1].text for line in report.sheets[0].lines if line[3].mark == BEST}
    lowest = min(report.comparison.rows, key=lambda row: row.unseen.mean)
    assert best == {lowest.label}
    assert report.ranks is not None
    assert report.ranks.labels[0] == lowest.label  # the lower, the better
    assert "not the last" in draw_experiment("cafe", report, workspace.root, workspace.find_manifest).decode()
    result = CliRunner().invoke(main, ["-w", str(workspace.root), "compare", "--metrics", "not_last"])
    assert result.exit_code == 0
    assert "Not the last" in result.output
    said = CliRunner().invoke(main, ["compare", "--help"]).output
    assert "not_last" in said
    assert "ece" in said


def test_several_metrics_have_a_table_each_and_a_wrong_name_is_one_sentence(tmp_path: Path) -> None:
    workspace, labels = Workspace.at(str(tmp_path / "work")), np.arange(70) % 7
    for method in ("cafe", "scn"):
        write_predictions(write_run(workspace, method), "mine", labels, (labels + (labels < len(method) - 2)) % 7)
    chosen = "accuracy,auroc,nll"
    report = make_report(workspace.read_runs(), metrics=chosen)
    assert [sheet.title for sheet in report.sheets[:3]] == ["Accuracy", "AUROC", "NLL"]
    assert report.sheets[0].header[3:6] == ["mine", "unseen accuracy", "unseen AUROC"]
    records = list(list_records(report))
    assert {record["metric"] for record in records} == set(chosen.split(","))
    keys = [(record["row"], record["target"], record["metric"]) for record in records]
    assert len(keys) == len(set(keys)) == 2 * 3 * 3  # rows, a target with both means, metrics
    best = {sheet.title: [line[1].text for line in sheet.lines if line[3].mark == BEST] for sheet in report.sheets[:3]}
    assert best == {"Accuracy": ["scn"], "AUROC": ["scn"], "NLL": ["scn"]}
    whole = make_report(workspace.read_runs(), metrics="all")
    every = [sheet.title for sheet in whole.sheets]
    assert {"Brier score", "AURC", "Risk at 80 %", "Worst-class recall"} <= set(every)
    assert "Agreement with votes" not in every  # nobody voted
    assert not [title for title in whole.sheets[0].header if "votes" in title]
    assert "No target has what it takes to compute agreement with votes, cross-entropy to votes." in whole.about

    shown = CliRunner().invoke(main, ["-w", str(workspace.root), "compare", "--metrics", chosen])
    assert "NLL: negative log-likelihood" in shown.output
    wrong = complaint(lambda: make_report(workspace.read_runs(), metrics="auc"))
    assert wrong == f"Unknown metric 'auc': choose {', '.join(sorted([*METRICS, 'all']))}."
    classes = complaint(lambda: make_report(workspace.read_runs(), metrics="nll", per_class="mine"))
    assert "leave --metrics nll out" in classes
    completed = list_names("metric", click.Context(main))
    assert completed == set(METRICS)


def test_a_metric_is_written_in_its_own_unit_wherever_it_is_printed(tmp_path: Path) -> None:
    """Minus log .5 is .69 nats and minus log .25 is 1.39: the probabilities of the true class."""
    workspace, labels = Workspace.at(str(tmp_path / "work")), np.arange(70) % 7
    for method, confidence in (("cafe", 0.5), ("scn", 0.25)):
        write_predictions(write_run(workspace, method), "mine", labels, labels, confidence=confidence)
    report = make_report(workspace.read_runs(), metrics="nll,brier,accuracy")
    nll, brier, accuracy, *_ = report.sheets
    written = [[line[3].text for line in sheet.lines[:3]] for sheet in (nll, brier, accuracy)]
    assert written == [["0.69", "1.39", "−0.69"], ["0.292", "0.656", "−0.365"], ["100.0", "100.0", "+0.0"]]
    assert nll.notes[0].startswith("Nats (accuracy: percent; Brier score: from 0 to 2): the mean ±")
    assert nll.header[4:7] == ["unseen NLL", "unseen Brier score", "unseen accuracy"]
    assert [cell.text for cell in nll.lines[1][4:7]] == ["1.39", "0.656", "100.0"]
    (mean,) = (drawing for drawing in list_drawings(report) if "mean NLL" in drawing.caption)
    assert mean.figure.axes[0].get_xlabel() == "nats"
    assert mean.figure.axes[0].lines[0].get_xdata() == pytest.approx(-np.log([0.5, 0.25]))
    means = [
        record["mean"] for record in list_records(report) if record["metric"] == "nll" and record["role"] != "mean"
    ]
    assert means == pytest.approx(-np.log([0.5, 0.25]))

    (first, *_) = (run for run in workspace.read_runs() if run.method == "cafe")
    scores = read_scores([first])
    of_run, measured = run_sheet(scores), count_right(first.load_predictions("clean")[Column("mine")])["measured"]
    assert of_run.lines[0][of_run.header.index("NLL (nats)")].text == measured["NLL (nats)"] == "0.69"
    assert measured["Brier score (from 0 to 2)"] == "0.292"
    assert flatten_scores(scores)["target/mine/nll"] == pytest.approx(-math.log(0.5))  # in MLflow


def test_votes_are_met_in_nats_without_a_limit() -> None:
    metric = METRICS["votes_cross_entropy"]
    assert str(estimate([0.9, 1.5, 2.2], metric.unit)) == "1.53 (0.00–3.15)"


def not_last(found: Predictions) -> float:
    return float((found.probabilities.argmin(axis=1) != found.labels).mean())


@pytest.mark.parametrize("protocol", ALL_PROTOCOLS)
@pytest.mark.parametrize("name", ["cinema", "cinema@val", "mma-aligned@all"])
def test_a_column_is_parsed_from_the_names_it_makes(name: str, protocol: str) -> None:
    column, run = Column.parse(name, protocol), UPath("/data/runs/x")
    assert (column.name, column.evaluated_by, column.title) == (name, protocol, name)
    folder = "" if protocol == "clean" else f"{protocol}/"
    assert str(column.predictions(run)) == f"/data/runs/x/predictions/{folder}{name}.parquet"
    assert str(column.figure(run, "masks", ".json")) == f"/data/runs/x/figures/masks/{folder}{name}.json"
    assert column.metric("ece") == f"{folder}target/{name.replace('@', ':')}/ece"


def test_what_a_column_is_of_is_written_above_it() -> None:
    assert Column("web", leak_free=True, class_set="8 classes").title == "web leak-free (8 classes)"
    assert Column("web", class_set="8 classes", part="fear").title == "fear (8 classes)"
    assert Mean("unseen", "ece", leak_free=True).title == "unseen ECE leak-free"
    assert Mean("all", "accuracy", "8 classes").name == "mean of all (8 classes)"


def test_what_is_printed_as_zero_has_no_minus() -> None:
    assert PERCENT.write(-1e-5) == "0.0"
    assert [PERCENT.write_difference(value) for value in (-0.0, -1e-5, -1e-3)] == ["+0.0", "+0.0", "−0.1"]


def test_an_interval_of_shares_stays_within_what_is_possible() -> None:
    wide = estimate([0.0, 0.4, 0.95])
    assert wide.mean - wide.half_width < 0
    assert str(wide) == "45.0 (0.0–100.0)"
    assert str(estimate([0.70, 0.71, 0.72])) == "71.0 ± 2.5"


@pytest.mark.parametrize(
    ("low", "chance", "faces", "doubtful"),
    [
        (0.41, 0.4, 50, False),
        (0.4, 0.4, 50, True),  # not above chance
        (0.41, 0.4, 49, True),  # of few faces
        (math.nan, 0.4, 0, False),  # nothing is known of it
        (0.1, math.nan, 10, False),  # not to be compared with chance
    ],
)
def test_what_is_not_above_chance_or_of_few_faces_is_doubtful_in_every_table(
    low: float, chance: float, faces: int, doubtful: bool
) -> None:
    assert is_doubtful(low, chance, faces) is doubtful
    assert Estimate(0.5, math.nan, faces=faces, low=low, high=0.6, chance=chance).doubtful is doubtful
    unknown = {"unseen_low": low, "unseen_chance": chance, "unseen_faces": faces}
    record = {name: value if value and value == value else None for name, value in unknown.items()}
    assert marks_doubt(record, "unseen") is doubtful


def test_macro_f1_varies_over_faces_as_its_error_says() -> None:
    random, count = np.random.default_rng(0), 150
    labels = random.choice(7, count, p=[0.4, 0.2, 0.1, 0.1, 0.1, 0.05, 0.05])
    predicted = np.where(random.random(count) < 0.6, labels, random.integers(0, 7, count))

    def of(rows: np.ndarray) -> Predictions:
        return Predictions([""] * count, labels[rows], np.eye(7, dtype=np.float32)[predicted[rows]], {})

    drawn = [macro_f1(of(random.integers(0, count, count))) for _ in range(300)]
    assert macro_f1_error(of(np.arange(count))) == pytest.approx(np.std(drawn), rel=0.2)
