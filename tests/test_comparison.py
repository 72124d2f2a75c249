"""Which numbers enter which cell: rows, targets, means, seeds and experiments, from predictions with known scores."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Cafe, complaint
from runs import write_predictions, write_run
from upath import UPath

from cafe.errors import UserError
from cafe.files import list_files, write_json
from cafe.pipeline.stores import find_paths
from cafe.pipeline.workspace import Workspace
from cafe.report.sheets import tests as sheets_of_tests
from cafe.report.sheets.comparison import main_sheet, mark_lines
from cafe.report.sheets.printed import printed_sheets
from cafe.report.sheets.runs import run_sheet
from cafe.report.sheets.sheet import BEST, SECOND, SheetCell
from cafe.results.columns import Column, Mean
from cafe.results.comparison import NOTHING, Comparison, compare, compare_classes, name_rows
from cafe.results.metrics import estimate
from cafe.results.runs import choose, read_runs
from cafe.results.scores import average_all, average_unseen, flatten_scores, meet, read_scores
from cafe.results.significance.statistics import combine_intervals, wilson
from cafe.results.significance.verdicts import conclude, reach_verdicts
from cafe.results.sources import UNSEEN
from cafe.results.units import NATS
from cafe.seals import read_sealed, write_sealed


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace.at(str(tmp_path / "work"))


def evaluate(run: UPath, right: dict[str, int], kinds: dict[str, str] | None = None, **more: Any) -> None:
    """Write predictions that are right on so many of 100 faces of each target."""
    labels = np.arange(100) % 7
    for target, count in right.items():
        predicted = np.where(np.arange(100) < count, labels, (labels + 1) % 7)
        write_predictions(run, target, labels, predicted, kind=(kinds or {}).get(target, "folder"), **more)


def read(workspace: Workspace, known: Sequence[str] = ()) -> Comparison:
    runs = workspace.read_runs()
    return compare(runs, read_scores(runs, known), "accuracy", "clean")


def texts(comparison: Comparison) -> list[dict[str, str]]:
    sheet = main_sheet(comparison)
    lines = [line for line in sheet.lines if line[1].text not in ("faces", "chance")]
    return [dict(zip(sheet.header, (cell.text for cell in line), strict=True)) for line in lines]


def test_the_beginning_of_several_names_is_no_unknown_name(tmp_path: Path) -> None:
    workspace = Workspace.at(str(tmp_path))
    first, second = (write_run(workspace, seed=seed) for seed in (0, 1))
    said = complaint(choose, read_runs([first, second]), None, "cafe-raf")
    assert said == f"'cafe-raf' is the beginning of 2 runs, {first.name}, {second.name}: give more of the name."
    assert complaint(choose, read_runs([first, second]), None, "scn").startswith("Unknown run 'scn': choose")
    for name in ("one", "other"):
        (workspace.features / "news" / name).mkdir(parents=True)
    said = complaint(find_paths, workspace, ["news/o"])
    assert said == "'news/o' is the beginning of 2 feature stores, news/one, news/other: give more of the name."


def test_a_part_and_the_whole_of_a_target_never_meet_and_a_source_is_no_target(tmp_path: Path) -> None:
    workspace, labels = Workspace.at(str(tmp_path)), np.arange(40) % 7
    part, whole = (write_run(workspace, method, source="raf") for method in ("scn", "cafe"))
    source = write_run(workspace, "cafe", source="news", source_kind="folder")
    write_predictions(part, "news", labels[:8], labels[:8], split="test")
    write_predictions(source, "news", labels[:8], labels[:8], split="test")
    write_predictions(whole, "news", labels, labels, split="all")
    (left,) = meet(read_runs(path for path in (part, whole, source))).left_out
    assert (left.run, left.column) == (part.name, "news")
    assert left.reason == "evaluated on 8 faces, while others were on 40, not the same ones"


def test_means_leave_out_the_source_and_other_splits(workspace: Workspace) -> None:
    run = write_run(workspace, source="one", source_kind="folder")
    evaluate(run, {"one": 90, "two": 40, "three": 20, "two@all": 0})
    scores = read_scores(read_runs([run]))
    assert average_unseen(scores).loc[(run.name, "clean"), "accuracy"] == pytest.approx(0.3)
    assert average_all(scores).loc[(run.name, "clean"), "accuracy"] == pytest.approx(0.5)
    assert scores.set_index("target").loc["two@all", "accuracy"] == 0
    (row,) = texts(read(workspace))
    assert (row["one"], row["unseen accuracy"], row["all accuracy"]) == ("(90.0)", "30.0", "50.0")
    assert "two@all" not in row
    assert [line[2].text for line in run_sheet(scores).lines] == ["90.0", "20.0 ‡", "40.0", "0.0 ‡", "30.0"]


@pytest.mark.parametrize(
    ("kind", "manifest", "seen"),
    [
        ("rafdb", "another", True),  # aligned, say
        ("ferplus", "another", False),
        ("folder", "digest of one", True),  # the same faces by another name
        ("folder", "another", False),
        ("", "", False),
    ],
)
def test_another_manifest_of_the_sources_set_is_not_unseen(
    workspace: Workspace, kind: str, manifest: str, seen: bool
) -> None:
    run = write_run(workspace, source="one", source_kind="rafdb")
    evaluate(run, {"one": 90, "two": 40})
    evaluate(run, {"again": 80}, {"again": kind}, manifest=manifest)
    (row,) = texts(read(workspace))
    assert row["again"] == ("(80.0)" if seen else "80.0")
    assert row["unseen accuracy"] == ("40.0" if seen else "60.0")
    note = "Not unseen, as another manifest of the source's set: again."
    assert (note in main_sheet(read(workspace)).notes) == seen


def test_a_number_that_chance_might_give_or_of_few_faces_is_marked(workspace: Workspace) -> None:
    run = write_run(workspace, source="one", source_kind="folder")
    evaluate(run, {"two": 60})
    labels = np.array([3] * 60 + [0, 1, 2, 4, 5, 6] * 7)
    write_predictions(
        run, "happy", labels, np.where(np.arange(102) < 66, labels, (labels + 1) % 7)
    )  # 64.7 %, and 58.8 % are happy
    write_predictions(run, "little", labels[55:75], labels[55:75])
    (row,) = texts(read(workspace))
    assert (row["two"], row["happy"], row["little"]) == ("60.0", "64.7 ‡", "100.0 ‡")
    sheet = main_sheet(read(workspace))
    assert "Fewer than 50 faces: little (20)." in sheet.notes
    assert any(note.startswith("‡: other faces might as well have shown nothing above chance") for note in sheet.notes)
    faces, chance = ([cell.text for cell in line[3:6]] for line in sheet.lines[1:])
    assert (faces, chance) == (["102", "20", "100"], ["58.8", "25.0", "15.0"])
    (verdict,) = reach_verdicts(read(workspace))
    assert verdict.text.startswith(f"Trained on one, cafe is right on {100 * (0.6 + 66 / 102 + 1) / 3:.1f} (")
    names = flatten_scores(read_scores(read_runs([run])))
    assert names["target/happy/largest"] == pytest.approx(60 / 102)
    assert names["target/happy/accuracy.low"] < 60 / 102 < names["target/happy/accuracy.high"]
    assert names["unseen/accuracy.low"] < names["unseen/accuracy"] < names["unseen/accuracy.high"]
    assert (names["unseen/faces"], names["unseen/largest"]) == (222, pytest.approx((60 / 102 + 5 / 20 + 15 / 100) / 3))


def test_the_interval_of_a_mean_is_of_the_seeds_that_the_mean_is_of(workspace: Workspace) -> None:
    evaluate(write_run(workspace, source="one", source_kind="folder"), {"two": 80, "three": 80})
    evaluate(write_run(workspace, source="one", source_kind="folder", seed=1), {"two": 20})
    (row,) = read(workspace).rows
    assert (row.unseen.mean, row.unseen.count) == (pytest.approx(0.8), 1)
    assert (row.unseen.low, row.unseen.high) == pytest.approx(combine_intervals([0.8, 0.8], [wilson(0.8, 100)] * 2))


def test_a_target_under_two_names_counts_once(workspace: Workspace) -> None:
    run = write_run(workspace, source="one", source_kind="folder")
    evaluate(run, {"two": 40, "three": 80})
    evaluate(run, {"zwei": 40}, manifest="digest of two")
    evaluate(run, {"deux@train": 10}, manifest="digest of two")  # other faces, which stay out of every mean
    (row,) = texts(read(workspace))
    assert (row["two"], row["zwei"], row["unseen accuracy"]) == ("40.0", "40.0", "60.0")
    note = "The same faces under another name, which count once in every mean: zwei (as two)."
    assert note in main_sheet(read(workspace)).notes
    scores = read_scores(read_runs([run]))
    assert average_unseen(scores)["accuracy"].tolist() == pytest.approx([0.6])
    assert "not counted in the mean again: zwei" in run_sheet(scores).notes[-1]


@pytest.mark.parametrize(
    ("pixels", "said"),
    [
        (20, "Frozen features carry over better than pixels: "),
        (52, "Frozen features and pixels do not differ significantly: "),
        (90, "Pixels carry over better than frozen features: "),
    ],
)
def test_what_is_said_of_frozen_features_and_pixels_follows_from_the_paired_test(
    workspace: Workspace, pixels: int, said: str
) -> None:
    evaluate(write_run(workspace, "cafe", "one"), {"two": 50, "three": 60})
    evaluate(write_run(workspace, "image_only", "one"), {"two": pixels, "three": 60})
    runs = [replace(run, derived={} if run.method == "image_only" else run.derived) for run in workspace.read_runs()]
    comparison = compare(runs, read_scores(runs), "accuracy", "clean")
    assert conclude(comparison).startswith(said)
    assert "cafe, which reads frozen features, is right on 55.0 %" in conclude(comparison)
    (verdict,) = reach_verdicts(comparison)
    best, other = ("image_only", "cafe") if pixels > 50 else ("cafe", "image_only")
    start = f"Trained on one, {best} ({(max(pixels, 50) + 60) / 2:.1f} %) "
    assert verdict.text.startswith(
        start + ("does not differ significantly from" if pixels == 52 else "is ahead on the unseen targets: of")
    )
    assert f"{other} " in verdict.text
    (test,) = verdict.tests
    assert test.holds == (pixels != 52)


def test_frozen_features_and_pixels_are_compared_within_a_source(workspace: Workspace) -> None:
    evaluate(write_run(workspace, "cafe", "one"), {"two": 50, "three": 60})
    evaluate(write_run(workspace, "image_only", "two"), {"two": 99, "three": 20})  # on its own source too
    runs = [replace(run, derived={} if run.method == "image_only" else run.derived) for run in workspace.read_runs()]
    assert conclude(compare(runs, read_scores(runs), "accuracy", "clean")) == ""


def test_a_difference_over_faces_is_no_verdict_where_the_seed_ranges_overlap(workspace: Workspace) -> None:
    for method, right in (("cafe", (50, 70)), ("image_only", (30, 55))):
        for seed, count in enumerate(right):
            evaluate(write_run(workspace, method, "one", seed=seed), {"two": count, "three": count})
    runs = [replace(run, derived={} if run.method == "image_only" else run.derived) for run in workspace.read_runs()]
    comparison = compare(runs, read_scores(runs), "accuracy", "clean")
    (verdict,) = reach_verdicts(comparison)
    (test,) = verdict.tests
    assert (test.difference.mean, test.overlap, test.holds) == (pytest.approx(-0.175), True, False)
    assert test.difference.p < 0.05
    assert verdict.text.startswith("Trained on one, cafe (60.0 %) is ahead of image_only (17.5 points, ")
    assert verdict.text.endswith(") over faces, though the seed ranges overlap, on the unseen targets.")
    assert conclude(comparison).startswith(
        "Frozen features and pixels differ over faces, though the seed ranges overlap: "
    )
    (line,) = sheets_of_tests.tests_sheets(list(verdict.tests))[0].lines
    assert line[7].text == "yes"


def test_as_the_paper_prints_it_the_best_is_bold_beside_a_gap_and_leaks_play_no_part(workspace: Workspace) -> None:
    kinds = {name: name for name in ("rafdb", "ferplus", "mma")}
    evaluate(write_run(workspace, "scn", "rafdb"), {"rafdb": 80, "ferplus": 50}, kinds)
    evaluate(write_run(workspace, "cafe", "rafdb"), {"rafdb": 70, "ferplus": 60, "mma": 40}, kinds)
    runs = workspace.read_runs()
    without = read_scores(runs, leave_out=lambda run, column, found: found.without(found.sample_ids[:10]))
    table, *_, errors = printed_sheets(compare(runs, read_scores(runs), "accuracy", "clean", without))
    assert errors.header[3:] == ["ferplus", "mma", "rafdb"]
    printed = {line[1].text: dict(zip(table.header, line, strict=True)) for line in table.lines}
    assert [(printed[name]["FERPlus"].text, printed[name]["FERPlus"].mark) for name in ("scn", "cafe")] == [
        ("50.00", SECOND), ("60.00", BEST),
    ]  # fmt: skip
    assert (printed["scn"]["MMA"].text, printed["cafe"]["MMA"]) == ("–", SheetCell("40.00", BEST))


def test_labels_by_another_rule_are_the_same_set(workspace: Workspace) -> None:
    run = write_run(workspace, source="one", source_kind="ferplus")
    evaluate(run, {"two": 40, "argmax": 80}, {"argmax": "ferplus-argmax"})
    assert texts(read(workspace))[0]["unseen accuracy"] == "40.0"


def test_synthetic_domains_are_sets_of_their_own(workspace: Workspace) -> None:
    run = write_run(workspace, source="studio", source_kind="synthetic")
    evaluate(run, {"studio": 90, "film": 40}, {"studio": "synthetic", "film": "synthetic"})
    assert texts(read(workspace))[0]["unseen accuracy"] == "40.0"


def test_a_target_without_a_manifest_counts_no_more(workspace: Workspace) -> None:
    run = write_run(workspace, source="one")
    evaluate(run, {"one": 90, "two": 40, "old": 10})
    comparison = read(workspace, ["one", "two"])
    (row,) = texts(comparison)
    assert (row["unseen accuracy"], "old" in row) == ("40.0", False)
    assert "Left out, as the workspace has no manifest of that name any more: old." in main_sheet(comparison).notes
    write_json(run / "pulled.json", {})  # evaluated on the manifests of another workspace
    assert texts(read(workspace, ["one", "two"]))[0]["unseen accuracy"] == "25.0"


def test_a_row_that_was_not_evaluated_on_all_targets_has_no_mean(workspace: Workspace) -> None:
    evaluate(write_run(workspace, "cafe", "one"), {"one": 90, "two": 50, "three": 30})
    evaluate(write_run(workspace, "linear_probe", "one"), {"two": 60})
    rows = texts(read(workspace))
    assert [row["unseen accuracy"] for row in rows[:2]] == ["40.0", "–"]
    assert [row["two"] for row in rows] == ["50.0", "60.0", "−10.0"]


def test_two_seeds_are_shown_as_they_are_and_more_with_their_interval(workspace: Workspace) -> None:
    for seed, right in enumerate((40, 44)):
        evaluate(write_run(workspace, "cafe", seed=seed), {"fer": right})
        evaluate(write_run(workspace, "scn", seed=seed), {"fer": right})
    evaluate(write_run(workspace, "scn", seed=2), {"fer": 45})
    rows = {row["method"]: row for row in texts(read(workspace))}
    assert rows["cafe"]["fer"] == "40.0 / 44.0"
    assert rows["scn"]["fer"] == str(estimate([0.40, 0.44, 0.45])) == "43.0 ± 6.6"
    assert rows["cafe less the best rival"]["fer"] == "−1.0"


def test_numbers_that_look_alike_share_a_mark_also_below_a_row_without_one(workspace: Workspace) -> None:
    evaluate(write_run(workspace), {"fer": 40})
    (row,), place = read(workspace).rows, Mean(UNSEEN, "nll")
    cells = [{place: NOTHING}, *({place: estimate([value], NATS)} for value in (0.694, 0.691, 0.7))]
    lines = mark_lines([row] * 4, cells, {place: False})
    assert [(line[-1].text, line[-1].mark) for line in lines] == [
        ("–", ""), ("0.69", BEST), ("0.69", BEST), ("0.70", SECOND)
    ]  # fmt: skip


def test_cells_of_fewer_seeds_than_the_row_say_so(workspace: Workspace) -> None:
    for seed in range(4):
        run = write_run(workspace, seed=seed)
        evaluate(
            run, {"fer": 40 + seed, **({"mine": 50 + seed} if seed < 3 else {}), **({"late": 7} if not seed else {})}
        )
    comparison = read(workspace)
    (row,) = texts(comparison)
    assert row["mine"].endswith(" [3]")
    assert (row["late"], "[" in row["fer"]) == ("7.0 [1] ‡", False)
    assert row["unseen accuracy"] == f"{(40 + 50 + 7) / 3:.1f} [1]"
    assert "[n]: n seeds, fewer than the row has." in main_sheet(comparison).notes


def test_a_row_whose_seeds_predict_the_same_has_no_interval(workspace: Workspace) -> None:
    for seed in range(3):
        evaluate(write_run(workspace, "zero_shot", seed=seed), {"fer": 40, "mine": 50})
    comparison = read(workspace)
    (row,) = texts(comparison)
    assert (row["seeds"], row["fer"], row["unseen accuracy"]) == ("any", "40.0", "45.0")
    assert any(note.startswith("Seeds: any:") for note in main_sheet(comparison).notes)


def test_the_table_says_that_seeds_share_one_draw_of_views(workspace: Workspace) -> None:
    note = "The seeds of a row share one draw of views, and the intervals say nothing of other draws."
    for seed in range(3):
        evaluate(write_run(workspace, seed=seed), {"fer": 40 + seed})
    assert note in main_sheet(read(workspace)).notes
    for name in workspace.run_names():
        path = workspace.run_path(name) / "run.json"
        record = json.loads(path.read_text())
        record["settings"]["view_seed"] = record["seed"]
        write_json(path, record)
    assert note not in main_sheet(read(workspace)).notes
    assert texts(read(workspace))[0]["method"] == "cafe"


def test_rows_are_told_apart_by_what_was_chosen_and_never_by_what_follows(workspace: Workspace) -> None:
    tower = "open_clip:/models/{}/ViT-B-32-face-tower.json@/models/{}/weights.safetensors"
    for mask in ("sigmoid", "none"):
        write_run(workspace, **{"recipe.mask": mask})
    for name in ("first", "second"):
        write_run(workspace, "linear_probe", backbone=tower.format(name, name))
    write_run(workspace, "scn", selection="source_test")
    runs = workspace.read_runs()
    labels = sorted(name_rows([[run] for run in runs]))
    assert labels[:2] == ["cafe (mask=none)", "cafe (mask=sigmoid)"]
    assert labels[4] == "scn (selection=source_test)"
    assert "first" in labels[2]  # shortened in the middle, but no further than that the two stay apart
    assert labels[3].startswith("linear_probe (backbone=open_clip:/models/secon…")
    assert max(map(len, labels)) < 80
    assert name_rows([[runs[0]], [runs[0]]]) == ["cafe #1", "cafe #2"]


def test_what_most_rows_of_a_method_have_is_not_named(workspace: Workspace) -> None:
    for changes in (
        {},
        {"prior": "adjusted"},
        {"features": "raw"},
        {"features": "raw", "prior": "adjusted"},
        {"mask": "none"},
    ):
        recipe = {"prior": "source", "features": "standardised", "mask": "sigmoid"} | changes
        write_run(workspace, **{f"recipe.{name}": value for name, value in recipe.items()})
    runs = workspace.read_runs()
    assert sorted(name_rows([[run] for run in runs])) == [
        "cafe", "cafe (features=raw)", "cafe (features=raw, prior=adjusted)", "cafe (mask=none)", "cafe (prior=adjusted)",
    ]  # fmt: skip


def test_recalls_of_two_seeds_and_of_a_class_without_faces(workspace: Workspace) -> None:
    for seed, right in enumerate((2, 4)):
        labels = np.repeat([1, 3], 10)
        predicted = np.where(np.arange(20) % 10 < right, labels, 0)
        write_predictions(write_run(workspace, seed=seed), "two", labels, predicted)
    runs = workspace.read_runs()
    (row,) = compare_classes(runs, read_scores(runs), "two", "clean").rows
    shown = {column.title: str(value) for column, value in row.cells.items()}
    assert (row.seeds, shown["surprise"], shown["fear"], shown["mean"]) == (2, "–", "20.0 / 40.0", "20.0 / 40.0")
    fear = row.cells[Column("two", part="fear")]
    assert fear.half_width == pytest.approx(1.2706, abs=1e-4)  # t(.975, 1) = 12.706, times .1
    with pytest.raises(UserError, match="Unknown target 'three': choose two"):
        compare_classes(runs, read_scores(runs), "three", "clean")


def test_a_torn_file_of_predictions_is_named_and_no_seed_vanishes(workspace: Workspace) -> None:
    for seed in (0, 1):
        run = write_run(workspace, seed=seed)
        evaluate(run, {"fer": 40, "mine": 60})
    path = run / "predictions" / "mine.parquet"
    path.write_bytes(path.read_bytes()[:200])
    said = Cafe(Path(str(workspace.root)), "").fail("compare")
    assert f"{path} is damaged or was changed, it is not what was written: evaluate the run again with `cafe ev" in said


def test_compare_says_which_experiments_it_shows(workspace: Workspace) -> None:
    evaluate(write_run(workspace, "cafe"), {"fer": 40})
    cafe = Cafe(Path(str(workspace.root)), "")
    assert "experiment" not in cafe.succeed("compare")
    evaluate(write_run(workspace, "scn", experiments={"grid": "grid-01234567"}), {"fer": 50})
    output = cafe.succeed("compare")
    assert "scn" in output
    assert "Runs of all experiments, cafe (1), grid (1): choose one with --experiment." in output
    output = cafe.succeed("compare", "--experiment", "grid")
    assert "│ raf    │ cafe" not in output
    assert "Runs of the experiment grid; there are also cafe: leave --experiment out to see all." in output
    assert "Unknown experiment 'gird': choose cafe, grid." in cafe.fail("compare", "--experiment", "gird")


@pytest.mark.parametrize("name", ["../../../../escaped", "a/b", "/tmp/escaped"])
def test_an_experiment_whose_name_is_a_path_is_refused_before_anything_is_written(
    workspace: Workspace, name: str
) -> None:
    run = write_run(workspace)
    before = list_files(workspace.root)
    cafe = Cafe(Path(str(workspace.root)), "")
    assert "cannot be used" in cafe.fail("evaluate", run.name, "--experiment", name)
    assert list_files(workspace.root) == before


def test_a_run_of_another_version_is_one_sentence(workspace: Workspace) -> None:
    run = write_run(workspace)
    record = json.loads((run / "run.json").read_text())
    write_json(run / "run.json", {name: value for name, value in record.items() if name not in ("version", "seal")})
    cafe = Cafe(Path(str(workspace.root)), "")
    assert "is in the old format 1, and this version of cafe reads format 2" in cafe.fail("predict", run.name, "x.jpg")


@pytest.mark.parametrize("damage", ["version", "name", "torn"])
def test_a_run_that_cannot_be_read_is_left_out_and_named(
    workspace: Workspace, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    """What calls itself like another run, such as one that came from a server, adds nothing to the numbers of that run."""
    own = write_run(workspace)
    evaluate(own, {"fer": 40})
    other = write_run(workspace, seed=1)
    evaluate(other, {"fer": 80})
    record = read_sealed(other / "run.json") or {}
    if damage == "torn":
        (other / "run.json").write_bytes((other / "run.json").read_bytes()[:100])
    else:
        write_sealed(
            other / "run.json", {**record, "version": 1} if damage == "version" else {**record, "name": own.name}
        )
    assert [run.name for run in workspace.read_runs()] == [own.name]
    assert len(caplog.messages) == 1
    assert other.name in caplog.text
    output = Cafe(Path(str(workspace.root)), "").succeed("compare")
    assert "40.0" in output
    assert "80.0" not in output
    reason = {
        "version": "is in the old format 1",
        "name": f"says that it is the run '{own.name}'",
        "torn": "is damaged",
    }
    assert reason[damage] in complaint(workspace.read_runs, other.name)


def test_compare_without_runs_is_one_sentence(workspace: Workspace) -> None:
    cafe = Cafe(Path(str(workspace.root)), "")
    assert "No run was evaluated yet: train one with" in cafe.fail("compare")
    assert "give --experiment NAME too" in cafe.fail("compare", "--mlflow-uri", "http://127.0.0.1:9")


def test_compare_loads_no_engine(workspace: Workspace) -> None:
    evaluate(write_run(workspace), {"fer": 40})
    program = (
        "import sys; from cafe.jobs.cli import main\n"
        f"try: main(['-w', {str(workspace.root)!r}, 'compare'])\n"
        "except SystemExit: print(sorted({'torch', 'ray', 'mlflow', 'sklearn', 'matplotlib', 'zarr'} & sys.modules.keys()))"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.endswith("[]\n")


def test_a_name_reads_its_run_alone_else_those_that_begin_so_else_all(workspace: Workspace) -> None:
    first, second = (write_run(workspace, seed=seed).name for seed in (0, 1))
    write_json(workspace.run_path(f"{first}-later") / "run.json", {"version": 1})  # which this version does not read
    assert [run.name for run in workspace.read_runs(first)] == [first]
    assert [run.name for run in workspace.read_runs("cafe-raf-s1")] == [second]
    assert [run.name for run in workspace.read_runs("other")] == [first, second]  # the third is named by a warning
    said = complaint(choose, workspace.read_runs(second), None, "cafe-raf-s1")
    assert f"The run {second!r} is not trained to its end" in said
