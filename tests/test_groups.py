"""Accuracy by a column of the manifests: the numbers against SciPy's and by simulation, and the tables on a workspace."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner
from conftest import complaint
from runs import write_predictions, write_run
from scipy import stats
from test_tables import WIDTHS, read_cells, show_at
from upath import UPath

from cafe.data.manifest import Face, Manifest
from cafe.jobs.cli import main
from cafe.jobs.tables import FittedTable, sheet_tables
from cafe.pipeline.release import library
from cafe.pipeline.workspace import Workspace
from cafe.report import ReportSettings
from cafe.report.experiment import draw_experiment
from cafe.report.formats import to_csv
from cafe.report.report import Report, make_report
from cafe.results.columns import Column
from cafe.results.groups import list_columns, name_groups
from cafe.results.predictions import Predictions
from cafe.results.significance import homogeneity
from cafe.results.significance.homogeneity import compare_groups, permute_groups, share_group
from cafe.results.significance.statistics import wilson

FACES = 210


def test_with_many_faces_the_permutation_test_is_pearsons() -> None:
    random = np.random.default_rng(0)
    groups = random.integers(0, 4, 3000)
    values = (random.random(3000) < 0.6 + 0.015 * groups).astype(float)
    table = np.stack([np.bincount(groups, values), np.bincount(groups, 1 - values)])
    expected = stats.chi2_contingency(table, correction=False).pvalue
    assert permute_groups(values, groups) == pytest.approx(expected, abs=0.015)


def test_of_few_faces_every_exchange_is_counted() -> None:
    """All orders of seven faces in three groups, by hand."""
    values, groups = np.array([1, 1, 0, 1, 0, 0, 0.5]), np.array([0, 0, 1, 0, 1, 2, 2])

    def spread(order: Sequence[int]) -> float:
        turned = values[list(order)]
        return float(sum(turned[groups == group].sum() ** 2 / (groups == group).sum() for group in range(3)))

    found = [spread(order) >= spread(range(7)) - 1e-9 for order in permutations(range(7))]
    assert permute_groups(values, groups) == pytest.approx(np.mean(found), abs=0.01)


@pytest.mark.parametrize("several", [False, True], ids=["persons of one group", "persons in all groups"])
def test_groups_that_are_alike_differ_five_times_in_a_hundred_though_faces_have_persons(several: bool) -> None:
    """30 persons with 6 faces, some of which are hard to recognise; taken one by one, their faces would not be."""
    random, persons, found, alone = np.random.default_rng(3), np.repeat(np.arange(30), 6), [], []
    for seed in range(80):
        right = (random.random(180) < np.repeat(random.beta(1, 1, 30), 6)).astype(float)
        groups = np.tile(np.arange(6), 30) % 3 if several else np.repeat(random.permutation(np.arange(30) % 3), 6)
        found.append(permute_groups(right, groups, persons, 99, seed) <= 0.05)
        alone.append(permute_groups(right, groups, None, 99, seed) <= 0.05)
    assert np.mean(found) < 0.12
    assert np.mean(alone) < 0.05 if several else np.mean(alone) > 0.2


def test_a_group_of_few_persons_with_many_faces_is_not_told_apart_from_many_persons_with_one() -> None:
    """Such as those of a laboratory beside those of the web: Pearson's statistic alone tells apart about 15 in 100."""
    random, sizes, found = np.random.default_rng(5), np.repeat([1, 50], [500, 10]), []
    for seed in range(80):
        right = random.random(1000) < np.repeat(random.beta(1.5, 1, 510), sizes)
        groups, persons = np.repeat([0, 1], 500), np.repeat(np.arange(510), sizes)
        found.append(permute_groups(right.astype(float), groups, persons, 99, seed) <= 0.05)
    assert np.mean(found) < 0.08


def test_faces_of_persons_in_several_groups_are_exchanged_within_the_persons(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against shuffles of every person's faces; where they are many, by the mean and the covariance of these."""
    random, persons, groups = np.random.default_rng(7), np.repeat(np.arange(60), 5), np.tile([0, 0, 1, 1, 2], 60)
    values = (random.random((300, 5)) < np.where(persons < 20, 1, 0.4 + 0.08 * groups)[:, None]).mean(axis=1)

    def spread(values: np.ndarray) -> float:
        return float((np.bincount(groups, values) ** 2 / np.bincount(groups)).sum())

    shuffled = [spread(random.permuted(values.reshape(60, 5), axis=1).ravel()) for _ in range(2000)]
    expected = np.mean(np.array(shuffled) >= spread(values))
    assert 0.01 < expected < 0.5
    assert permute_groups(values, groups, persons, 2000) == pytest.approx(expected, abs=0.04)
    assert permute_groups(np.repeat(random.random(60), 5), groups, persons, 99) == 1  # within persons all are alike
    monkeypatch.setattr(homogeneity, "FEW_FACES", 0)
    assert permute_groups(values, groups, persons) == pytest.approx(expected, abs=0.04)
    assert permute_groups(np.repeat(random.random(60), 5), groups, persons, 99) == 1


def test_a_share_of_persons_is_known_less_well_than_of_as_many_faces() -> None:
    random = np.random.default_rng(1)
    right, persons = (np.repeat(random.random(40), 5) < 0.7).astype(float), np.repeat(np.arange(40), 5)
    alone, together = share_group(right, None), share_group(right, persons)
    assert (alone.low, alone.high) == wilson(right.mean(), 200)
    assert together.effective == pytest.approx(40, rel=0.1)  # a person's faces are all alike
    assert share_group(right, np.arange(200)) == alone
    one = share_group(right[:5], persons[:5])
    assert (one.low, one.high) == (0.0, 1.0)  # one person says nothing of others
    assert share_group(np.ones(20), np.repeat(np.arange(4), 5)).effective == 4


def test_the_interval_of_the_largest_gap_covers_none_where_groups_are_alike() -> None:
    """It is of the pair that is furthest apart of six: Newcombe's interval for one pair would not cover it so often."""
    random, covered = np.random.default_rng(2), []
    for _ in range(120):
        gap = compare_groups((random.random(300) < 0.6).astype(float), np.arange(300) % 6, resamples=1)
        assert gap.low <= gap.mean <= gap.high
        covered.append(gap.low <= 0)
    assert np.mean(covered) > 0.91
    alike = compare_groups(np.tile([1.0, 0.0], 30), np.repeat([0, 1], 30), resamples=9)
    assert (alike.worst, alike.best, alike.mean, alike.p) == (0, 1, 0, 1)
    right = np.repeat([1.0, 0.0, 1.0, 0.0], [56, 14, 48, 32])
    two = compare_groups(right, np.repeat([0, 1], [70, 80]), resamples=9)
    assert (two.mean, two.low, two.high) == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)  # Newcombe (1998), method 10


def describe(row: int) -> dict[str, str]:
    """What is said of a face; the age of the first person is not known."""
    said = {"sex": ("woman", "man")[row // 7 % 2], "city": f"city {row}"}
    return {**said, "age": str(row // 7)} if row >= 7 else said


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Two targets, one of which says of its faces what they are like; men are recognised less by both methods."""
    workspace = Workspace.at(str(tmp_path_factory.mktemp("groups") / "work"))
    labels = np.arange(FACES) % 7
    faces = [
        Face(
            f"{row:05d}.jpg", f"{row:05d}.jpg", row % 7, "test", f"p{row // 7}", 20 + row, 20, f"{row:064d}",
            votes=tuple(8 if name == row % 7 else int(name == 0) * (row % 3) for name in range(7)),
            kept=describe(row),
        )
        for row in range(FACES)
    ]  # fmt: skip
    told = Manifest.from_faces("told", "/nowhere", faces)
    told.save(workspace.manifest_path("told"))
    plain = replace(told, name="untold", table=told.table.select(told.table.column_names[:11]))
    plain.save(workspace.manifest_path("untold"))
    random = np.random.default_rng(0)
    men = np.arange(FACES) // 7 % 2 == 1
    for method, skill in (("cafe", 0.8), ("scn", 0.7)):
        for seed in range(2):
            right = random.random(FACES) < skill - 0.45 * men
            run = write_run(workspace, method, source="elsewhere", source_kind="folder", seed=seed)
            for target in ("told", "untold"):
                groups: list[str | None] = [f"p{row // 7}" for row in range(FACES)]
                wrong = np.where(right, labels, (labels + 1) % 7)
                write_predictions(run, target, labels, wrong, manifest=told.digest, groups=groups, rows="all of them")
    return workspace


def test_every_file_of_predictions_is_read_once_and_equal_faces_are_kept_once(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By scores of three metrics, paired tests, verdicts, groups, and the page."""
    opened, load = list[str](), Predictions.load.__func__

    def count(kind: type[Predictions], path: UPath, named: bool = True) -> Predictions | None:
        opened.append(str(path))
        found: Predictions | None = load(kind, path, named)
        return found

    monkeypatch.setattr(Predictions, "load", classmethod(count))
    settings, find = ReportSettings(by="sex", versus="cafe"), workspace.find_manifest
    runs, known = workspace.read_runs(), workspace.manifest_digests()
    report = make_report(runs, known, settings, metrics="accuracy,nll,aurc", find_manifest=find)
    draw_experiment("cafe", report, workspace.root, find)
    assert len(report.tests) == 2  # targets
    assert len(opened) == len(set(opened)) == 8  # two methods, seeds and targets
    answers = [
        one for row in report.comparison.rows for seed in report.comparison.list_answers(row) for one in seed.values()
    ]
    assert len({id(one.sample_ids) for one in answers}) == len({id(one.labels) for one in answers}) == 2  # targets
    again = {run.name: run.load_predictions("clean")[Column("told")].predicted.tolist() for run in runs}
    found = {run.name: report.comparison.kept.find(run, "clean")[Column("told")].predicted.tolist() for run in runs}
    assert found == again


def test_a_shell_completes_the_columns_of_manifests(workspace: Workspace, tmp_path: Path) -> None:
    def find(begun: str, root: str) -> list[str]:
        found = ShellComplete(main, {}, "cafe", "").get_completions(["-w", root, "compare", "--by"], begun)
        return [item.value for item in found]

    assert find("", str(workspace.root)) == [
        "age",
        "agreement",
        "city",
        "group",
        "height",
        "label",
        "sex",
        "split",
        "width",
    ]
    assert find("s", str(workspace.root)) == ["sex", "split"]
    (tmp_path / "manifests").mkdir()
    (tmp_path / "manifests" / "damaged.parquet").write_bytes(b"PAR1")
    assert find("a", str(tmp_path)) == ["agreement"]


def report_by(workspace: Workspace, by: str) -> Report:
    known = workspace.manifest_digests()
    runs, find = workspace.read_runs(), workspace.find_manifest
    return make_report(runs, known, ReportSettings(by=by), metrics="accuracy,auroc,nll,aurc", find_manifest=find)


def test_faces_are_parted_by_what_their_manifest_says_of_them(workspace: Workspace) -> None:
    report = report_by(workspace, "sex")
    assert report.parting is not None
    assert {(part.row.method, part.column.name) for part in report.parting.parts} == {("cafe", "told"), ("scn", "told")}
    (sheet,) = (sheet for sheet in report.sheets if sheet.title == "told by sex")
    head = ["source", "method", "man", "woman", "worst", "gap", "95 % interval", "p", "p (Holm)", "saw target"]
    assert sheet.header == head
    assert [cell.text for cell in sheet.lines[-1]] == ["elsewhere", "faces", "105", "105", *[""] * 6]
    assert "Not parted by sex: untold (its manifest has no 'sex')." in sheet.notes
    for part, line in zip(report.parting.parts, sheet.lines, strict=False):
        predictions = [run.load_predictions("clean") for run in part.row.runs]
        right = np.mean([one[part.column].predicted == one[part.column].labels for one in predictions], axis=0)
        men = np.arange(FACES) // 7 % 2 == 1
        assert [share.mean for share in part.shares] == pytest.approx([right[men].mean(), right[~men].mean()])
        assert part.gap is not None
        assert part.gap.mean == pytest.approx(right[~men].mean() - right[men].mean())
        assert part.gap.p < 0.01
        assert part.gap.low > 0
        assert (line[4].text, line[5].mark) == ("man", "best")
    records = list(csv.DictReader(io.StringIO(to_csv(report))))
    groups = [record["group"] for record in records if record["by"] == "sex" and record["method"] == "cafe"]
    assert groups == ["man", "woman", "woman less man"]
    assert [record["averaged"] for record in records if record["group"] in ("man", "woman")] == ["2"] * 4
    table = library.compare(workspace=str(workspace.root), by="sex")
    assert table.loc[table["group"] == "woman", "evaluated"].tolist() == [105, 105]


def test_numbers_are_parted_into_bands_and_people_by_how_far_they_agreed(workspace: Workspace) -> None:
    told = workspace.load_manifest("told")
    assert list_columns(told) == ["label", "split", "group", "width", "height", "sex", "city", "age", "agreement"]
    for by, bands in {
        "width": {"20–72": 53, "73–124": 52, "125–177": 53, "178–229": 52},
        "age": {"1–8": 56, "9–15": 49, "16–22": 49, "23–29": 49},
        "agreement": {"0.8": 60, "0.89": 60, "1": 90},
        "label": dict.fromkeys(told.classes, 30),
    }.items():
        named = name_groups(told, by)
        assert not isinstance(named, str)
        assert named.value_counts(sort=False).to_dict() == bands
    age = report_by(workspace, "age")
    assert any("Left out, as their age is not known: 7 faces." in sheet.notes for sheet in age.sheets)


def test_numbers_that_are_nearly_alike_stay_apart_and_numbers_of_persons_are_names() -> None:
    faces = [
        Face(f"{row}.jpg", f"{row}.jpg", 0, "test", f"{row % 10}", 20, 20, f"{row:064d}", kept=kept)
        for row, kept in enumerate({"few": str(10**9 + row % 2), "many": str(10**9 + row)} for row in range(20))
    ]
    found = Manifest.from_faces("numbered", "/nowhere", faces)
    named = {by: name_groups(found, by) for by in ("few", "many", "group")}
    names = {by: list(groups.cat.categories) for by, groups in named.items() if not isinstance(groups, str)}
    assert names["few"] == ["1000000000", "1000000001"]
    assert names["many"] == [f"10000000{first:02d}–10000000{first + 4:02d}" for first in range(0, 20, 5)]
    assert names["group"] == list("0123456789")
    few = name_groups(found, "FEW")
    assert not isinstance(few, str)
    assert few.equals(named["few"])


def test_a_column_that_is_not_there_or_has_too_many_values_is_one_sentence(workspace: Workspace) -> None:
    assert complaint(report_by, workspace, "mood") == (
        "Unknown column of the targets' manifests 'mood': choose age, agreement, city, group, height, label, sex, split, "
        "width."
    )
    assert "'city' of 'told' has 210 values, more than 40" in complaint(report_by, workspace, "city")
    runs, known = workspace.read_runs(), workspace.manifest_digests()
    told = workspace.load_manifest("told")
    nobody = replace(told, table=told.table.drop_columns("group").append_column("group", pa.nulls(FACES, pa.string())))
    settings, find = ReportSettings(by="group"), {"told": nobody}.get
    said = complaint(lambda: make_report(runs, known, settings, find_manifest=lambda name, digest: find(name)))
    assert said == "There is no 'group' of any face: none that was evaluated has one."
    words = ["-w", str(workspace.root), "compare", "--per-class", "told", "--by", "sex"]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 2
    assert "leave --by sex out" in done.output


@pytest.fixture(scope="module")
def tables(workspace: Workspace) -> list[FittedTable]:
    return [table for table in sheet_tables(report_by(workspace, "age").sheets) if isinstance(table, FittedTable)]


@pytest.mark.parametrize("width", WIDTHS)
def test_the_tables_are_whole_on_every_screen(tables: list[FittedTable], width: int) -> None:
    assert {"told by age", "AURC"} <= {table.title for table in tables}
    for table in tables:
        lines = show_at(table, width)
        assert max(map(len, lines)) <= width
        there = {cell for line in read_cells(lines) for cell in line}
        assert not {cell.text for line in table.lines for cell in line[table.words :] if cell.text} - there
