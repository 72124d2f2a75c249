"""The comparison as people get it: numbers, tests and marks, recomputed by hand from the predictions they come from."""

from __future__ import annotations

import csv
import io
import json
import math
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import Cafe, draw_faces
from runs import write_predictions, write_run
from upath import UPath

from cafe.data.expressions import EXPRESSIONS
from cafe.errors import UserError
from cafe.jobs.cli import main
from cafe.pipeline.workspace import Workspace
from cafe.report import ReportSettings
from cafe.report.charts import draw_ranks, find_ties, to_svg
from cafe.report.drawings import list_drawings
from cafe.report.formats import to_csv, to_latex, to_markdown
from cafe.report.report import Report, make_report
from cafe.report.sheets.sheet import BEST, SECOND, Sheet, SheetCell
from cafe.results.metrics import estimate
from cafe.results.predictions import Predictions, load_predictions
from cafe.results.published import SETS
from cafe.results.scores import describe_left_out, meet
from cafe.results.significance.statistics import Ranking, grouped_test, holm, paired_bootstrap

KINDS = {"raf": "rafdb", "fer": "ferplus", "stills": "sfew", "mine": "folder"}
FACES = {"raf": 300, "fer": 250, "stills": 120, "mine": 200}


def evaluated_run(
    workspace: Workspace,
    method: str,
    source: str,
    seed: int,
    skill: float,
    protocol: str = "clean",
    kinds: dict[str, str] = KINDS,
    faces: dict[str, int] = FACES,
    **settings: Any,
) -> UPath:
    """Write a run as training and evaluating leave it, right on a share of faces that grows with its skill."""
    run = write_run(workspace, method, source, seed, kinds[source], **settings)
    for number, (target, count) in enumerate(faces.items()):
        labels = np.arange(count) % 7
        ease = np.random.default_rng(number).normal(size=count)  # hard faces are hard for every method and seed
        noise = np.random.default_rng([number, seed, *map(ord, method)]).normal(size=count)
        right = ease + noise + skill + (1.0 if target == source else 0.0) > 0
        predicted = np.where(right, labels, (labels + 1 + (np.arange(count) // 7) % 6) % 7)
        write_predictions(run, target, labels, predicted, protocol, kinds[target])
    return run


def report_all(
    workspace: Workspace, metrics: str = "accuracy", per_class: str | None = None, **settings: Any
) -> Report:
    runs = workspace.read_runs()
    known = workspace.manifest_digests()
    return make_report(runs, known, ReportSettings(**settings), metrics=metrics, per_class=per_class)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Two sources × three methods × three seeds, evaluated on four targets."""
    workspace = Workspace.at(str(tmp_path_factory.mktemp("report") / "work"))
    for source in ("raf", "fer"):
        for method, skill in (("cafe", 0.8), ("scn", 0.2), ("linear_probe", 0.75)):
            for seed in range(3):
                evaluated_run(workspace, method, source, seed, skill)
    return workspace


@pytest.fixture(scope="module")
def report(workspace: Workspace) -> Report:
    return report_all(workspace, versus="cafe")


def sheet(report: Report, title: str) -> Sheet:
    (found,) = [sheet for sheet in report.sheets if sheet.title == title]
    return found


def correct(workspace: Workspace, method: str, source: str, target: str) -> np.ndarray:
    """Whether each seed was right on each face, read anew from the files: (seeds, faces)."""
    runs = sorted(name for name in workspace.run_names() if name.startswith(f"{method}-{source}-s"))
    predictions = [load_predictions(workspace.run_path(name))[target] for name in runs]
    return np.array([run.predicted == run.labels for run in predictions])


def test_the_table_holds_means_with_intervals_and_marks_the_best_of_each_source(
    workspace: Workspace, report: Report
) -> None:
    table = sheet(report, "Accuracy")
    assert table.header == [
        "source", "method", "seeds", "fer", "mine", "raf", "stills",
        "unseen accuracy", "unseen macro-F1", "unseen ECE", "all accuracy", "saw target",
    ]  # fmt: skip
    assert [line[0].text for line in table.lines] == ["fer"] * 6 + ["raf"] * 6
    means: dict[tuple[str, str], float] = {}
    leads = {line[0].text: line for line in table.lines if line[1].text == "cafe less the best rival"}
    for line in (line for line in table.lines if line[1].text in {row.method for row in report.comparison.rows}):
        source, method = line[0].text, line[1].text
        seeds = {target: correct(workspace, method, source, target).mean(axis=1) for target in KINDS}
        for cell, target in zip(line[3:7], table.header[3:7], strict=True):
            expected = str(estimate(list(seeds[target])))
            assert cell.text == (f"({expected})" if target == source else expected)
        unseen = np.mean([seeds[target] for target in KINDS if target != source], axis=0)
        assert line[7].text == str(estimate(list(unseen)))
        assert line[10].text == str(estimate(list(np.mean(list(seeds.values()), axis=0))))
        means[source, method] = float(unseen.mean())
    for source in ("fer", "raf"):
        order = sorted((method for which, method in means if which == source), key=lambda name: -means[source, name])
        marks = {line[1].text: line[7].mark for line in table.lines if line[0].text == source}
        assert [marks.get(name) for name in order] == [BEST, SECOND, ""]
        lead = means[source, "cafe"] - max(means[source, "scn"], means[source, "linear_probe"])
        assert leads[source][7].text == f"{100 * lead:+.1f}".replace("-", "−")
    faces, chance = ([cell.text for cell in line] for line in table.lines[-2:])
    assert faces == ["raf", "faces", "", "250", "200", "300", "120", "570", "570", "570", "870", ""]
    assert chance[3:7] == ["14.4", "14.5", "14.3", "15.0"]  # the largest class of 36 of 250, 29 of 200, …
    assert chance[8:10] == ["14.3", "–"]  # one in seven, and a calibration error has none


def test_of_calibration_errors_the_lowest_is_the_best_and_of_macro_f1_the_highest(workspace: Workspace) -> None:
    table = report_all(workspace, metrics="ece").sheets[0]
    rows = [line for line in table.lines if line[0].text == "raf"][:3]
    for name, choose in (("unseen ECE", min), ("unseen macro-F1", max)):
        cells = [line[table.header.index(name)] for line in rows]
        (best,) = [cell.text for cell in cells if cell.mark == BEST]
        assert best == choose((cell.text for cell in cells), key=lambda text: float(text.split()[0]))


def test_each_method_has_its_matrix_of_sources_and_targets(report: Report) -> None:
    matrix = sheet(report, "scn: every source on every target")
    assert [line[0].text for line in matrix.lines] == ["fer", "raf"]
    rows = [line for line in sheet(report, "Accuracy").lines if line[1].text == "scn"]
    assert [[cell.text for cell in line[1:5]] for line in matrix.lines] == [[c.text for c in row[3:7]] for row in rows]


def test_paired_tests_are_those_of_the_predictions_corrected_over_targets(workspace: Workspace, report: Report) -> None:
    tests = sheet(report, "Against cafe, trained on raf")
    lines = [line for line in tests.lines if line[0].text == "scn"]
    assert [line[1].text for line in lines] == ["fer", "mine", "(raf)", "stills", "mean of unseen"]
    differences = {
        target: correct(workspace, "scn", "raf", target).mean(axis=0)
        - correct(workspace, "cafe", "raf", target).mean(axis=0)
        for target in ("fer", "mine", "raf", "stills")
    }
    single = [paired_bootstrap([values]) for values in differences.values()]
    for line, expected, adjusted in zip(lines, single, holm([test.p for test in single]), strict=False):
        assert line[3].text == f"{100 * expected.mean:+.1f}".replace("-", "−")
        assert line[4].text == f"{100 * expected.low:+.1f} to {100 * expected.high:+.1f}".replace("-", "−")
        assert line[5].text == (f"{expected.p:.3f}" if expected.p >= 0.001 else "<0.001")
        assert line[6].text == (f"{adjusted:.3f}" if adjusted >= 0.001 else "<0.001")
        assert line[7].text == "no"
    unseen = paired_bootstrap([differences[target] for target in ("fer", "mine", "stills")])
    assert lines[-1][3].text == f"{100 * unseen.mean:+.1f}".replace("-", "−")
    assert (lines[-1][2].text, lines[-1][6].text, lines[-1][3].mark) == ("570", "–", BEST)
    assert {line[0].text for line in tests.lines} == {"scn", "linear_probe"}


def test_published_numbers_stand_beside_what_was_evaluated_alike(workspace: Workspace, report: Report) -> None:
    published = sheet(report, "Beside the published numbers")
    assert {line[1].text for line in published.lines} == {"cafe", "scn"}  # of a linear probe nothing was published
    (line,) = [line for line in published.lines if (line[0].text, line[1].text) == ("raf", "cafe")]
    cells = dict(zip(published.header, line, strict=True))
    ours = correct(workspace, "cafe", "raf", "fer").mean()
    assert cells["fer"].text == f"{100 * ours - 73.16:+.1f} (73.2)".replace("-", "−")
    assert cells["raf"].text.endswith("(88.7)")
    assert (cells["mine"].text, cells["stills"].text) == (
        "–",
        "–",
    )  # own faces; SFEW is read otherwise by this protocol
    assert cells["unseen accuracy"].text == "–"  # not the five sets
    assert not any("Not as published" in note for note in published.notes)


def test_ranks_are_over_every_pair_of_source_and_unseen_target(workspace: Workspace, report: Report) -> None:
    ranks = sheet(report, "Mean ranks")
    assert "over 6 pairs" in ranks.notes[0]
    methods = ("cafe", "linear_probe", "scn")
    totals = dict.fromkeys(methods, 0.0)
    for source in ("raf", "fer"):
        for target in KINDS.keys() - {source}:
            scores = {method: correct(workspace, method, source, target).mean() for method in methods}
            for method, own in scores.items():
                above, equal = (sum(map(test, scores.values())) for test in (own.__lt__, own.__eq__))
                totals[method] += above + (equal + 1) / 2
    shown = {line[0].text: float(line[1].text) for line in ranks.lines}
    assert shown == pytest.approx({method: total / 6 for method, total in totals.items()}, abs=0.006)
    assert [line[0].text for line in ranks.lines][-1] == "scn"
    assert ranks.notes[1] == "Fewer than three methods or 10 pairs: no critical difference and no diagram."
    assert "Mean ranks" not in [drawing.sheet for drawing in list_drawings(report)]


def test_a_diagram_that_joins_what_differs_by_the_paired_test_says_why(report: Report) -> None:
    assert report.ranks is not None
    pairs = replace(report.ranks.ranking, ranks=(1.4, 1.6, 3.2), targets=20, p=0.01, critical_difference=1.5)
    joined = replace(report, ranks=replace(report.ranks, labels=("cafe", "scn", "linear_probe"), ranking=pairs))
    (drawing,) = [drawing for drawing in list_drawings(joined) if drawing.sheet == "Mean ranks"]
    assert (
        "cafe and scn are joined though they differ significantly by the paired test (trained on fer, raf)"
        in drawing.caption
    )
    assert "linear_probe" not in drawing.caption


def test_the_csv_holds_every_number_unrounded(workspace: Workspace, report: Report) -> None:
    records = list(csv.DictReader(io.StringIO(to_csv(report))))
    assert len(records) == 6 * (4 + 4)
    assert {record["evaluated"] for record in records} == {"250", "200", "300", "120", "570", "620", "870"}
    cell = {(r["source"], r["method"], r["target"], r["metric"]): r for r in records}
    record = cell["raf", "scn", "fer", "accuracy"]
    ours, theirs = (correct(workspace, method, "raf", "fer") for method in ("scn", "cafe"))
    assert float(record["mean"]) == pytest.approx(ours.mean())
    assert float(record["half_width"]) == pytest.approx(estimate(list(ours.mean(axis=1))).half_width)
    assert float(record["published"]) == pytest.approx(0.5837)
    test = paired_bootstrap([ours.mean(axis=0) - theirs.mean(axis=0)])
    assert (float(record["accuracy_difference"]), float(record["p"])) == pytest.approx((test.mean, test.p))
    assert (record["versus"], record["role"], record["protocol"], record["seeds"]) == ("cafe", "unseen", "clean", "3")
    assert cell["raf", "scn", "raf", "accuracy"]["role"] == "source"
    assert cell["raf", "cafe", "fer", "accuracy"]["p"] == ""  # not tested against itself
    assert cell["raf", "scn", "mean of unseen", "macro_f1"]["p"] == ""
    assert float(cell["raf", "scn", "mean of unseen", "accuracy"]["p"]) < 0.05


def test_markdown_shows_every_sheet_and_the_protocol(report: Report) -> None:
    text = to_markdown(report)
    for table in report.sheets:
        assert f"## {table.title}\n" in text
        for line in table.lines:
            marked = [{BEST: f"**{c.text}**", SECOND: f"*{c.text}*"}.get(c.mark, c.text) for c in line]
            assert f"| {' | '.join(marked)} |" in text
    assert "Protocol clean: RGB; SFEW is evaluated on val" in text
    assert "the best is bold and the second in italics" in text
    assert "<u>" not in text  # which MLflow shows as it stands


DOCUMENT = r"""\documentclass{article}
\usepackage{booktabs,graphicx}
\begin{document}
\input{table}
\end{document}
"""


def compile_latex(folder: Path, text: str) -> str:
    """Return the log of pdflatex, which must succeed."""
    if not shutil.which("pdflatex"):
        pytest.skip("needs pdflatex, which is not installed")
    (folder / "document.tex").write_text(DOCUMENT)
    (folder / "table.tex").write_text(text)
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "document.tex"]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 0, result.stdout[-2000:]
    return result.stdout


def test_latex_compiles_and_fits_a_page(report: Report, tmp_path: Path) -> None:
    text = to_latex(report)
    assert "Overfull" not in compile_latex(tmp_path, text)
    assert text.count("\\begin{tabular}") == text.count("\\bottomrule") == len(report.sheets)
    assert "linear\\_probe" in text
    (best,) = {
        line[7].text for line in sheet(report, "Accuracy").lines if line[0].text == "raf" and line[7].mark == BEST
    }
    mean, half_width = best.split(" ± ")
    assert f"\\textbf{{{mean}\\,{{\\scriptsize$\\pm${half_width}}}}}" in text


def test_latex_survives_names_full_of_its_own_signs(report: Report, tmp_path: Path) -> None:
    nasty = r"a_b & 50% #1 ${x}$ ~^ \end{table} <|> − – × † …"
    table = Sheet(nasty, 1, 1, ["x", "y"], [[SheetCell(nasty), SheetCell("1.0 ± 2.0 †", BEST)]], [nasty])
    compile_latex(tmp_path, to_latex(replace(report, title=nasty, about=[nasty], sheets=[table])))


def test_names_cannot_break_the_page() -> None:
    ranking = Ranking((1.0, 2.0, 3.0), 10, 0.01, 1.05)
    svg = to_svg(draw_ranks(["<b>", "&", '"'], ranking), "figure", '<script>"')
    assert "<b>" not in svg
    assert 'aria-label="&lt;script&gt;&quot;"' in svg
    assert "&lt;b&gt;" in svg


def test_bars_join_the_longest_stretches_within_the_critical_difference() -> None:
    assert find_ties((1.0, 1.5, 2.2, 4.0), 1.25) == [(0, 2)]
    assert find_ties((1.0, 2.0, 3.0), 1.5) == [(0, 1), (1, 2)]
    assert find_ties((1.0, 2.0, 3.0), 0.5) == []
    assert find_ties((1.0, 2.0), math.nan) == []


@pytest.fixture
def fresh(tmp_path: Path) -> Workspace:
    return Workspace.at(str(tmp_path / "work"))


def test_predictions_are_joined_by_sample(fresh: Workspace) -> None:
    """Another order of the faces changes nothing; labels that differ do."""
    runs = [evaluated_run(fresh, method, "raf", 0, skill) for method, skill in (("cafe", 0.5), ("scn", 0.0))]
    path = runs[1] / "predictions" / "fer.parquet"
    cafe, whole = (load_predictions(run)["fer"] for run in runs)
    kept = np.random.default_rng(0).permutation(len(whole.labels))
    ids = [whole.sample_ids[row] for row in kept]
    Predictions(ids, whole.labels[kept], whole.probabilities[kept], whole.about).save(path)
    tests = sheet(report_all(fresh, versus="cafe"), "Against cafe, trained on raf")
    (line,) = [line for line in tests.lines if line[1].text == "fer"]
    both = sorted(kept)
    difference = (whole.predicted == whole.labels)[both].mean() - (cafe.predicted == cafe.labels)[both].mean()
    assert (line[2].text, line[3].text) == (str(len(kept)), f"{100 * difference:+.1f}".replace("-", "−"))
    assert line[7].text == "–"  # a single seed cannot be mixed

    Predictions(ids, (whole.labels[kept] + 1) % 7, whole.probabilities[kept], whole.about).save(path)
    with pytest.raises(UserError, match="evaluated on different faces or labels of 'fer': evaluate both again"):
        report_all(fresh, versus="cafe")


@pytest.mark.parametrize("change", ["faces", "manifest"])
def test_predictions_of_other_faces_do_not_meet_and_are_named(fresh: Workspace, change: str) -> None:
    """Of three seeds, that on 40 faces fewer or on another data set of the same name is in no mean."""
    runs = [evaluated_run(fresh, "cafe", "raf", seed, 0.2 * seed) for seed in range(3)]
    path = runs[2] / "predictions" / "fer.parquet"
    whole = load_predictions(runs[2])["fer"]
    if change == "faces":
        kept = slice(len(whole.labels) - 40)
        other = Predictions(whole.sample_ids[kept], whole.labels[kept], whole.probabilities[kept], whole.about)
    else:
        about = {**whole.about, "manifest": "f" * 64}
        other = Predictions(whole.sample_ids, whole.labels, whole.probabilities, about)
    other.save(path)
    report = report_all(fresh)
    line = str(*report.left_out)
    assert line in report.about
    assert line.startswith(f"Left out: {runs[2].name} on fer (clean), ")
    assert line.endswith(f"cafe evaluate {runs[2].name} --targets fer")
    (row,) = report.comparison.rows
    counts = {column.name: estimate.count for column, estimate in row.cells.items()}
    assert counts.pop("fer") == 2
    assert set(counts.values()) == {3}


def test_what_is_left_out_is_named_in_every_output_also_where_it_is_all(fresh: Workspace) -> None:
    cafe, labels = Cafe(Path(str(fresh.root)), ""), np.arange(70) % 7
    runs = [write_run(fresh, "cafe", "raf", seed) for seed in range(3)]
    for run, manifest in zip(runs, "aab", strict=True):
        write_predictions(run, "fer", labels, labels, manifest=manifest)
    old = f"Left out: {runs[2].name} on fer (clean), evaluated on the manifest b, not on a"
    assert json.loads(cafe.succeed("compare", "--json"))["left_out"][0].startswith(old)
    result = CliRunner().invoke(main, ["-w", str(fresh.root), "compare", "--csv", str(fresh.root / "x.csv")])
    assert old in result.stderr
    draw = draw_faces(Path(str(fresh.root)) / "fer", per_class=2)
    cafe.succeed("data", "index", "folder", str(draw), "--name", "fer")
    said = cafe.fail("compare")
    assert "All 3 predictions are of other faces than those that count now: evaluate the runs again.\n  Left" in said
    names = ", ".join(sorted(run.name for run in runs))
    assert (
        f"Left out: 3 predictions of 3 runs, {names}, on fer (clean), evaluated on another manifest than the one that"
        in said
    )
    assert said.endswith("Evaluate each again: cafe evaluate RUN --targets fer")
    assert "All 3 predictions are of other faces" in cafe.fail("compare", "--protocol", "paper")


def test_what_is_left_out_for_one_kind_of_reason_is_one_line(fresh: Workspace) -> None:
    labels = np.arange(70) % 7
    for seed in range(5):
        run = write_run(fresh, "cafe", "raf", seed)
        for target in ("fer", "stills", "fer@train"):
            write_predictions(run, target, labels, labels, manifest="old")
        write_predictions(run, "mine", labels[seed // 4 :], labels[seed // 4 :])
    _, left_out = meet(fresh.read_runs(), {"fer": "new", "stills": "new"})
    assert len(left_out) == 16
    old, split, other = describe_left_out(left_out)
    assert other == str(next(one for one in left_out if one.column == "mine"))  # alone, it says exactly what it is
    assert "10 predictions of 5 runs, cafe-raf-s0" in old
    assert "and 2 more (`cafe compare --json` names all), on fer, stills (clean)" in old
    assert old.endswith("Evaluate each again: cafe evaluate RUN --targets fer,stills")
    assert split.endswith("Evaluate each again: cafe evaluate RUN --targets fer --split train")


def test_faces_of_one_group_are_one_draw(fresh: Workspace) -> None:
    labels, random = np.zeros(70, int), np.random.default_rng(0)
    said = {method: random.integers(0, 2, 70) for method in ("cafe", "scn")}
    people: list[str | None] = [f"person {number // 14}" for number in range(70)]
    for method, predicted in said.items():
        write_predictions(write_run(fresh, method), "fer", labels, predicted, groups=people)
    tests = sheet(report_all(fresh, versus="cafe"), "Against cafe, trained on raf")
    expected = grouped_test([(said["scn"] == 0) * 1.0 - (said["cafe"] == 0)], [np.arange(70) // 14])
    assert expected.groups == 5
    assert tests.lines[0][2].text == "70 in 5 groups"
    assert tests.lines[0][4].text == f"{100 * expected.low:+.1f} to {100 * expected.high:+.1f}".replace("-", "−")


def test_what_versus_names_must_be_one_row_per_source(fresh: Workspace) -> None:
    for mask in ("sigmoid", "none"):
        differing = () if mask == "sigmoid" else ("mask=none",)
        evaluated_run(fresh, "cafe", "raf", 0, 0.5, not_as_published=differing, **{"recipe.mask": mask})
    evaluated_run(fresh, "scn", "raf", 0, 0.5)
    with pytest.raises(
        UserError, match=r"2 rows .* are 'cafe': choose one with --versus 'cafe \(mask=none\)', 'cafe \(mask"
    ):
        report_all(fresh, versus="cafe")
    with pytest.raises(
        UserError, match=r"Unknown method 'caffe': choose cafe \(mask=none\), cafe \(mask=sigmoid\), scn\."
    ):
        report_all(fresh, versus="caffe")
    report = report_all(fresh, versus="cafe (mask=sigmoid)")
    tested = sheet(report, "Against cafe (mask=sigmoid), trained on raf")
    assert {line[0].text for line in tested.lines} == {"cafe (mask=none)", "scn"}
    published = sheet(report, "Beside the published numbers")
    assert "Not as published: mask=none (cafe (mask=none) from raf)." in published.notes
    assert all(line[1].text != "cafe less the best rival" for line in report.sheets[0].lines)  # which CAFE?


def test_a_tag_names_a_row_and_can_be_tested_against(fresh: Workspace) -> None:
    for tag in ("", "long"):
        evaluated_run(fresh, "cafe", "raf", 0, 0.5, tag=tag)
    report = report_all(fresh, versus="long")
    assert [line[1].text for line in report.sheets[0].lines] == ["cafe", "cafe (tag=long)", "faces", "chance"]
    assert {line[0].text for line in sheet(report, "Against cafe (tag=long), trained on raf").lines} == {"cafe"}


def test_a_run_that_peeked_is_marked_everywhere_and_wins_nothing(fresh: Workspace) -> None:
    evaluated_run(fresh, "cafe", "raf", 0, 2.5, selection="source_test")
    for method, skill in (("cafe", 0.5), ("scn", 0.0)):
        evaluated_run(fresh, method, "raf", 0, skill)
    report = report_all(fresh, versus="cafe")
    peeked = "cafe (selection=source_test)"
    lines = {line[1].text: line for line in sheet(report, "Accuracy").lines}
    assert all(cell.text.endswith(" †") and not cell.mark for cell in lines[peeked][3:-1])
    assert (lines[peeked][-1].text, lines["scn"][-1].text) == ("labels", "no")
    assert lines["cafe (selection=final)"][7].mark == BEST
    assert lines["scn"][7].mark == SECOND
    tests = sheet(report, "Against cafe (selection=final), trained on raf")
    assert {line[0].text for line in tests.lines} == {f"{peeked} †", "scn"}
    assert any("†: the epoch was chosen on the source's test split" in note for note in tests.notes)
    assert peeked not in [line[0].text for line in sheet(report, "Mean ranks").lines]
    assert any(peeked in note for note in sheet(report, "Mean ranks").notes)
    classes = report_all(fresh, per_class="fer").sheets[0]
    assert {line[1].text for line in classes.lines if line[3].text.endswith("†")} == {peeked, f"{peeked} − published"}


def test_runs_evaluated_on_other_splits_alone_have_an_empty_table(fresh: Workspace) -> None:
    evaluated_run(fresh, "cafe", "raf", 0, 0.5, faces={"raf@train": 30}, kinds={**KINDS, "raf@train": "rafdb"})
    report = report_all(fresh, versus="cafe")
    assert report.sheets[0].header[3:-1] == ["unseen accuracy", "unseen macro-F1", "unseen ECE", "all accuracy"]
    assert [cell.text for cell in report.sheets[0].lines[0][3:-1]] == ["–"] * 4
    assert list_drawings(report) == []


def test_all_five_sets_by_the_papers_protocol_have_its_means(fresh: Workspace) -> None:
    kinds = {f"my-{kind}": kind for kind in SETS}
    faces = dict.fromkeys(kinds, 70)
    evaluated_run(fresh, "cafe", "my-rafdb", 0, 0.5, "paper", kinds, faces)
    evaluated_run(
        fresh, "eac", "my-rafdb", 0, 0.5, "paper", kinds, faces, init="scratch", not_as_published=("epochs=2",)
    )
    published = sheet(report_all(fresh, protocol="paper"), "Beside the published numbers")
    by_method = {line[1].text: dict(zip(published.header, line, strict=True)) for line in published.lines}
    assert by_method["cafe"]["unseen accuracy"].text.endswith("(57.2)")
    assert by_method["cafe"]["all accuracy"].text.endswith("(63.5)")
    assert by_method["cafe"]["my-sfew"].text.endswith("(52.9)")
    assert by_method["eac"]["my-sfew"].text.endswith("(22.2)")  # the table without a pre-trained image branch
    assert "Not as published: epochs=2 (eac from my-rafdb)." in published.notes
    macro = report_all(fresh, metrics="macro_f1", protocol="paper")
    assert "Beside the published numbers" not in [table.title for table in macro.sheets]


def test_the_command_writes_every_format(workspace: Workspace, tmp_path: Path) -> None:
    cafe = Cafe(Path(str(workspace.root)), "")
    files = {name: tmp_path / "out" / f"table.{name}" for name in ("markdown", "latex", "csv")}
    options = [part for name, path in files.items() for part in (f"--{name}", str(path))]
    output = cafe.succeed("compare", "--versus", "linear_probe", *options)
    assert "Against linear_probe, trained on raf" in output
    report = report_all(workspace, versus="linear_probe")
    expected = {"markdown": to_markdown, "latex": to_latex, "csv": to_csv}
    for name, path in files.items():
        assert path.read_text() == expected[name](report)  # and so the same bytes for the same runs
        assert f"Wrote {path}" in output
    command = ("compare", "--versus", "linear_probe", *options)
    cafe.succeed(*command)  # in place of its own files
    for path in files.values():
        whole = path.read_bytes()
        path.write_text("# my notes\nprotocol,source")
        assert f"{path} is there already, and is nothing that this command writes" in cafe.fail(*command)
        assert path.read_text().startswith("# my notes")
        path.write_bytes(whole)


def test_expressions_are_tested_against_a_row_on_the_faces_of_each(workspace: Workspace) -> None:
    report = report_all(workspace, per_class="fer", versus="cafe")
    tests = sheet(report, "Against cafe, trained on raf")
    assert tests.header[1] == "expression"
    lines = [line for line in tests.lines if line[0].text == "scn"]
    assert [line[1].text for line in lines] == [*EXPRESSIONS, "mean of recalls"]
    difference = correct(workspace, "scn", "raf", "fer").mean(axis=0) - correct(workspace, "cafe", "raf", "fer").mean(
        axis=0
    )
    differences = [difference[np.arange(250) % 7 == label] for label in range(7)]
    single = [paired_bootstrap([values]) for values in differences]
    for line, values, expected, adjusted in zip(
        lines, differences, single, holm([test.p for test in single]), strict=False
    ):
        assert line[2].text == str(len(values))
        assert line[3].text == f"{100 * expected.mean:+.1f}".replace("-", "−")
        assert line[4].text == f"{100 * expected.low:+.1f} to {100 * expected.high:+.1f}".replace("-", "−")
        assert line[6].text == (f"{adjusted:.3f}" if adjusted >= 0.001 else "<0.001")
    mean = paired_bootstrap(differences)
    assert (lines[-1][3].text, lines[-1][6].text) == (f"{100 * mean.mean:+.1f}".replace("-", "−"), "–")
    records = list(csv.DictReader(io.StringIO(to_csv(report))))
    said = {r["expression"]: r for r in records if (r["source"], r["method"]) == ("raf", "scn")}
    assert float(said["fear"]["accuracy_difference"]) == pytest.approx(differences[1].mean())
    assert float(said["mean"]["accuracy_difference"]) == pytest.approx(mean.mean)
    assert said["overall"]["accuracy_difference"] == ""


def test_expressions_on_one_target_stand_beside_the_supplement(workspace: Workspace, tmp_path: Path) -> None:
    report = report_all(workspace, per_class="fer")
    (table,) = report.sheets
    assert table.header[3:-1] == [*EXPRESSIONS, "overall", "mean"]
    lines = {(line[0].text, line[1].text): line for line in table.lines}
    assert set(lines) == {
        *((source, method) for source in ("raf", "fer") for method in ("cafe", "scn", "linear_probe")),
        *(("raf", f"{method} − published") for method in ("cafe", "scn")),
        *((source, what) for source in ("raf", "fer") for what in ("faces", "chance")),
    }  # trained on RAF-DB and evaluated on FERPlus is what was published
    assert [cell.text for cell in lines["raf", "faces"][3:-1]] == [*["36"] * 5, *["35"] * 2, "250", "250"]
    assert [cell.text for cell in lines["raf", "chance"][3:-1]] == [*["–"] * 7, "14.4", "14.3"]
    predictions = [
        load_predictions(workspace.run_path(name))["fer"]
        for name in workspace.run_names()
        if name.startswith("scn-raf")
    ]
    recalls = [float((run.predicted == 1)[run.labels == 1].mean()) for run in predictions]
    assert lines["raf", "scn"][4].text == str(estimate(recalls))
    assert lines["raf", "scn − published"][4].text == f"{100 * np.mean(recalls) - 14.46:+.1f} (14.5)".replace("-", "−")
    records = list(csv.DictReader(io.StringIO(to_csv(report))))
    assert len(records) == 6 * 9
    (fear,) = [r for r in records if (r["source"], r["method"], r["expression"]) == ("raf", "scn", "fear")]
    assert float(fear["mean"]) == pytest.approx(np.mean(recalls))
    assert float(fear["published"]) == pytest.approx(0.1446)
    assert "Overfull" not in compile_latex(tmp_path, to_latex(report))


def test_names_can_be_no_formula_in_a_spreadsheet_and_no_page_in_markdown(report: Report) -> None:
    row = replace(report.comparison.rows[0], label="=HYPERLINK(1)|<b>&")
    comparison = replace(report.comparison, rows=[row, *report.comparison.rows[1:]])
    lines = list(csv.DictReader(io.StringIO(to_csv(replace(report, comparison=comparison)))))
    assert lines[0]["row"] == "'=HYPERLINK(1)|<b>&"
    assert lines[0]["role"] in ("source", "unseen", "same set")
    first = report.sheets[0]
    named = replace(first, title="<script>", lines=[[SheetCell("<b>|&copy;"), *first.lines[0][1:]]])
    text = to_markdown(replace(report, sheets=[named]))
    assert "## &lt;script>" in text
    assert "| &lt;b>\\|&amp;copy; |" in text


def test_the_supplements_second_table_stands_as_it_is_printed_beside_ours(tmp_path: Path) -> None:
    workspace = Workspace.at(str(tmp_path))
    kinds = {name: name for name in SETS}
    faces = dict.fromkeys(SETS, 140)
    for init, less in (("file:msceleb.pth", 0.0), ("scratch", 0.4)):
        for method, skill in (("cafe", 0.9), ("scn", 0.5), ("rul", 0.4), ("eac", 0.3), ("ofer", 0.2)):
            evaluated_run(workspace, method, "rafdb", 0, skill - less, "paper", kinds, faces, init=init)
    report = report_all(workspace, as_printed=True)
    assert report.comparison.protocol == "paper"  # by which alone these runs were evaluated
    ours, theirs = (
        sheet(report, f"Trained on RAF-DB, as {what}") for what in ("the supplement's Table 2", "published")
    )
    assert ours.header == theirs.header
    assert ours.header[2:] == ["RAF-DB", "FERPlus", "AffectNet", "SFEW2.0", "MMA", "mean"]
    names = [*("scn", "rul", "eac", "ofer", "cafe"), "less the best rival"]
    assert [line[1].text for line in ours.lines] == [*names, *names, *names[:-1]]
    assert [line[1].text for line in theirs.lines] == [line[1].text for line in ours.lines]
    texts = [[cell.text for cell in line[2:]] for line in theirs.lines]
    assert texts[4] == ["88.72", "73.16", "45.86", "52.86", "56.80", "63.48"]
    assert texts[5] == ["−0.82", "+14.79", "+1.95", "+5.95", "+19.53", "+8.60"]
    assert texts[11] == ["+5.28", "+27.41", "+17.23", "+23.57", "+24.54", "+19.73"]
    assert texts[16] == ["−2.80", "−4.02", "−4.90", "−7.07", "−2.15", "−4.19"]
    assert [line[1].text for line in theirs.lines[:5] if line[2].mark == SECOND] == ["eac"]
    errors = sheet(report, "Errors by true class and target")
    row = report.comparison.rows[0]
    line = next(line for line in errors.lines if (line[1].text, line[2].text) == (row.label, "fear"))
    predictions = load_predictions(row.runs[0].folder, "paper")["mma"].of_class(EXPRESSIONS.index("fear"))
    wrong = int((predictions.predicted != predictions.labels).sum())
    assert line[errors.header.index("mma")].text == f"{wrong} of 20 ({5 * wrong:.1f})"
