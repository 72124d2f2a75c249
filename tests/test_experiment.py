"""`cafe report`: a page whose numbers are those of the table of scores, and whose mistakes are those of the predictions."""

from __future__ import annotations

import base64
import io
import json
import re
from collections import Counter
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import Cafe, draw_faces
from PIL import Image
from runs import write_predictions, write_run
from upath import UPath

from cafe.data.expressions import EXPRESSIONS
from cafe.data.indexing import index_files
from cafe.data.readers import DATASETS
from cafe.files import write_file, write_json
from cafe.outputs import check_replaced, holds
from cafe.pipeline.workspace import Workspace
from cafe.report import ReportSettings
from cafe.report.charts import INK
from cafe.report.details import Gallery, list_details
from cafe.report.drawings import list_drawings
from cafe.report.experiment import draw_experiment
from cafe.report.figures import draw_masks, tells_apart
from cafe.report.pages import GENERATOR
from cafe.report.report import make_report
from cafe.results.columns import Column
from cafe.results.leaks import audit_path
from cafe.results.metrics import estimate
from cafe.results.predictions import Predictions, average, load_predictions
from cafe.results.scores import read_scores

SEEDS = (0, 1)
METHODS = ("cafe", "linear_probe")


class Page(HTMLParser):
    """Reads a page as a browser would: tables by their name, pictures, headings, links, and whether all is closed."""

    VOID = ("meta", "link", "img", "br", "path", "use")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text
        self.open: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.asked: list[str] = []
        self.ids: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.items: list[tuple[str, str, str]] = []  # of lists: the picture's text, its address, and all text
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        known = {name: value or "" for name, value in attributes}
        self.tags.append((tag, known))
        self.asked += [known[name] for name in ("src", "href", "xlink:href") if name in known]
        self.ids += [known["id"]] if "id" in known else []
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag == "li":
            self.items.append(("", "", ""))
        if tag == "img" and "li" in self.open:
            self.items[-1] = (known["alt"], known["src"], "")

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data
        elif "li" in self.open:
            picture, address, text = self.items[-1]
            self.items[-1] = (picture, address, f"{text} {' '.join(data.split())}".strip())

    @property
    def mistakes(self) -> list[tuple[str, str, str]]:
        """The faces of the galleries: (sample, address of the picture, text)."""
        return [item for item in self.items if "taken for" in item[2]]

    def with_header(self, *header: str) -> list[list[list[str]]]:
        """The tables whose first line is this header, without it."""
        return [table[1:] for table in self.tables if table[0] == list(header)]


def evaluate(run: UPath, workspace: Workspace, target: str, seed: int) -> None:
    """Predict the real faces of a manifest: about a third of them wrongly, each as sure as its number says."""
    manifest = workspace.load_manifest(target)
    random = np.random.default_rng([seed, len(run.name)])
    count = len(manifest)
    predicted = np.where(
        random.random(count) < 1 / 3, (manifest.labels + random.integers(1, 7, count)) % 7, manifest.labels
    )
    confidence = random.permutation(np.linspace(0.4, 0.9, count))
    probabilities = np.repeat((1 - confidence[:, None]) / 6, 7, axis=1)
    probabilities[np.arange(count), predicted] = confidence
    about = {"run": run.name, "target": target, "protocol": "clean", "split": "test", "kind": "folder"}
    about["manifest"] = manifest.digest
    Predictions(manifest.sample_ids, manifest.labels, probabilities, about).save(Column(target).predictions(run))


def first_run(workspace: Workspace, method: str) -> str:
    return next(name for name in workspace.run_names() if name.startswith(f"{method}-raf-s0"))


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Two methods × two seeds, evaluated on faces whose pictures are there (web), and on their source, of which none are."""
    folder = tmp_path_factory.mktemp("experiment")
    workspace = Workspace.at(str(folder / "work"))
    draw_faces(folder / "faces", per_class=20)
    index_files("web", DATASETS["folder"](UPath(folder / "faces"))).manifest.save(workspace.manifest_path("web"))
    index_files("raf", DATASETS["folder"](UPath(folder / "faces"))).manifest.save(workspace.manifest_path("raf"))
    for method in METHODS:
        for seed in SEEDS:
            run = write_run(workspace, method, "raf", seed, experiments={"trial": None})
            labels = np.arange(140) % 7
            predicted = np.where(np.random.default_rng(seed).random(140) < 0.5, labels, 0)
            digest = workspace.load_manifest("raf").digest
            write_predictions(run, "raf", labels, predicted, kind="rafdb", manifest=digest)
            evaluate(run, workspace, "web", seed)
            for epoch in (1, 2):
                losses = {"train/total": (seed + 1) / epoch, "train/accuracy": 0.25 * epoch, "learning_rate": 0.1}
                write_json(run / "epochs" / f"{epoch:04d}.json", losses)
    picture = io.BytesIO()
    Image.new("RGB", (300, 100), "white").save(picture, "PNG")
    mask, older = (workspace.run_path(first_run(workspace, method)) for method in METHODS)
    for run, kind in ((mask, "masks"), (mask, "heat_maps"), (older, "masks")):
        write_file(run / "figures" / kind / "web.png", picture.getvalue())
    # Fourteen channels, two in the group of each expression, and nothing for the faces of five.
    masks = {"surprise": [0.1, 0.3, *[0.5] * 12], "neutral": [0.5] * 14}
    write_json(mask / "figures" / "masks" / "web.json", masks)
    return workspace


def report(workspace: Workspace, *options: str) -> Page:
    file = Path(str(workspace.root)) / "page.html"
    cafe = Cafe(Path(str(workspace.root)), "")
    assert "page.html (0." in cafe.succeed("report", "trial", "--output", str(file), *options)
    check_replaced(UPath(file), "--output", holds(GENERATOR))
    return Page(file.read_text())


@pytest.fixture(scope="module")
def page(workspace: Workspace) -> Page:
    return report(workspace, "--count", "500")


def predictions_of(workspace: Workspace, method: str, target: str) -> list[Predictions]:
    names = sorted(name for name in workspace.run_names() if name.startswith(f"{method}-raf"))
    return [load_predictions(workspace.run_path(name))[target] for name in names]


def scores_of(workspace: Workspace) -> pd.DataFrame:
    return read_scores(workspace.read_runs(), workspace.manifest_names())


def wrong(predictions: Predictions, *labels: str) -> set[tuple[str, str]]:
    """Each face a run was wrong about with what the page must say of it."""
    return {
        (sample, f"labelled {EXPRESSIONS[label]} taken for {EXPRESSIONS[said]} {100 * sure:.0f} %")
        for sample, label, said, sure in zip(
            predictions.sample_ids,
            predictions.labels,
            predictions.predicted,
            predictions.probabilities.max(axis=1),
            strict=True,
        )
        if label != said and (not labels or EXPRESSIONS[label] in labels)
    }


def name_mistakes(page: Page) -> list[tuple[str, ...]]:
    """The faces of the galleries and what is said of each; where a picture is gone, its name stands in its place."""
    return [(sample, text) if sample else tuple(text.split(" ", 1)) for sample, _, text in page.mistakes]


def test_the_page_is_whole_and_needs_nothing_from_elsewhere(workspace: Workspace) -> None:
    runs = workspace.read_runs()
    found = make_report(runs, workspace.manifest_digests(), ReportSettings(versus="cafe"))
    text = draw_experiment("trial", found, workspace.root, workspace.find_manifest).decode()
    assert found.ranks is None  # over a single unseen target they are its order again
    page = Page(text)
    assert page.open == []
    assert all(link.startswith(("#", "data:image/")) for link in page.asked)
    assert {link[1:] for link in page.asked if link.startswith("#")} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert not re.search(r"url\((?!#)|@import", text)
    for sheet in found.sheets:
        lines = [[line[column].text for column in sheet.shown] for line in sheet.lines]
        assert lines in page.with_header(*(sheet.header[column] for column in sheet.shown))
    assert text.count("<svg") == len(list_drawings(found)) + len(METHODS) + 1  # and the training curves and the mask
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text
    assert INK not in text


def test_the_page_can_be_read_by_keyboard_and_by_ear(page: Page) -> None:
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    names = [tag for tag, _ in page.tags]
    assert (names.count("main"), names.count("nav"), names.count("header")) == (1, 1, 1)
    first = next(known for tag, known in page.tags if tag == "a")
    assert (first["class"], first["href"]) == ("skip", "#main")
    assert all(known.get("alt") for tag, known in page.tags if tag == "img")
    assert all(known.get("role") == "img" and known.get("aria-label") for tag, known in page.tags if tag == "svg")
    assert all(known.get("scope") for tag, known in page.tags if tag == "th")
    assert all(known.get("aria-label") for _, known in page.tags if "tabindex" in known and known["tabindex"] == "0")


def test_recalls_are_those_of_the_table_of_scores(workspace: Workspace, page: Page) -> None:
    scores = scores_of(workspace)
    tables = page.with_header("expression", "(raf)", "web")
    assert len(tables) == len(METHODS)
    for method, table in zip(METHODS, tables, strict=True):
        own = scores[scores["method"] == method].sort_values("seed")
        metrics = [*(f"recall/{name}" for name in EXPRESSIONS), "accuracy", "mean_class_accuracy"]
        expected = [
            [str(estimate(list(own.loc[own["target"] == target, metric].dropna()))) for target in ("raf", "web")]
            for metric in metrics
        ]
        assert [line[1:] for line in table] == expected
        assert [line[0] for line in table] == [*EXPRESSIONS, "overall", "mean"]


def test_confusions_are_the_mean_shares_over_seeds(workspace: Workspace, page: Page) -> None:
    tables = page.with_header("true", *(name[:3] for name in EXPRESSIONS))
    assert len(tables) == len(METHODS) * 2
    for number, (method, target) in enumerate((method, target) for method in METHODS for target in ("raf", "web")):
        seeds = predictions_of(workspace, method, target)
        for line in tables[number]:
            name, faces = line[0].split()
            rows = [seed.predicted[seed.labels == EXPRESSIONS.index(name)] for seed in seeds]
            assert int(faces) == len(rows[0])
            said = np.concatenate(rows)
            assert line[1:] == [str(round(100 * float((said == label).mean()))) for label in range(7)]
        assert [line[0].split()[0] for line in tables[number]] == [
            name for label, name in enumerate(EXPRESSIONS) if (seeds[0].labels == label).any()
        ]


def test_the_mask_is_shown_in_the_colours_of_the_page_with_its_numbers(page: Page) -> None:
    """The mean over the two channels of each group: .2 of the first for surprise, .5 of all others."""
    (table,) = page.with_header("faces of", *(name[:3] for name in EXPRESSIONS))
    assert table == [["surprise", "0.200", *["0.500"] * 6], ["neutral", *["0.500"] * 7]]
    masks = {"surprise": np.array([0.1, 0.3, *[0.5] * 12]), "neutral": np.array([0.5] * 14)}
    axes, _ = draw_masks(masks, EXPRESSIONS).axes
    differences = np.asarray(axes.collections[0].get_array()).reshape(2, 14)
    np.testing.assert_allclose(differences[1], [*[0.0] * 12, 0.2, 0.1], atol=1e-9)  # less the mean over both
    np.testing.assert_allclose(differences[0], -differences[1], atol=1e-9)
    assert [label.get_text() for label in axes.get_xticklabels()][-2:] == ["0", "1"]
    assert tells_apart(masks)
    assert not tells_apart(
        {name: 0.5 + 0.01 * mask for name, mask in masks.items()}
    )  # noise, stretched to the full colours


def test_a_row_evaluated_with_an_option_of_test_time_is_shown_by_its_own_predictions(workspace: Workspace) -> None:
    page = report(workspace, "--test-time", "seeds", "--count", "500")
    tables = page.with_header("true", *(name[:3] for name in EXPRESSIONS))
    assert len(tables) == len(METHODS) * 2 * 2
    mean = average(predictions_of(workspace, "cafe", "web"))
    expected = []
    for label in np.unique(mean.labels):
        said = mean.predicted[mean.labels == label]
        shares = [str(round(100 * float((said == other).mean()))) for other in range(7)]
        expected.append([f"{EXPRESSIONS[label]} {len(said)}", *shares])
    assert tables.count(expected) == 1
    assert wrong(mean) <= {(sample, text) for sample, _, text in page.mistakes}
    assert len(page.with_header("epoch", "loss", "accuracy")) == len(METHODS)  # an ensemble was not trained as one
    assert len(page.with_header("faces of", *(name[:3] for name in EXPRESSIONS))) == 1


def test_the_gallery_lists_exactly_the_faces_the_first_seed_was_wrong_about(workspace: Workspace, page: Page) -> None:
    shown = name_mistakes(page)
    for method in METHODS:
        for target in ("web", "raf"):  # the unseen one first, then what it was trained on
            expected = wrong(predictions_of(workspace, method, target)[0])
            own, shown = shown[: len(expected)], shown[len(expected) :]
            assert set(own) == expected
            confidence = [int(text.split()[-2]) for _, text in own]
            assert confidence == sorted(confidence, reverse=True)
    assert shown == []
    assert page.text.count("<h4>(raf)</h4>") == page.text.count("<h4>web</h4>") == len(METHODS)


def test_the_gallery_shows_the_chosen_expressions_and_as_many_as_asked_for(workspace: Workspace) -> None:
    (first,) = report(workspace, "--errors", "sadness", "--count", "1").mistakes[:1]
    sad = wrong(predictions_of(workspace, "cafe", "web")[0], "sadness")
    assert (first[0], first[2]) == max(sad, key=lambda entry: int(entry[1].split()[-2]))
    both = name_mistakes(report(workspace, "--errors", "sadness", "--errors", "anger", "--count", "500"))
    expected = [
        one
        for method in METHODS
        for target in ("web", "raf")
        for one in wrong(predictions_of(workspace, method, target)[0], "sadness", "anger")
    ]
    assert sorted(both) == sorted(expected)
    assert report(workspace, "--count", "0").mistakes == []


def test_the_pictures_are_thumbnails_of_these_very_faces(workspace: Workspace, page: Page) -> None:
    manifest = workspace.load_manifest("web")
    of_web = [(sample, address) for sample, address, _ in page.mistakes if address]
    assert of_web
    for sample, address in of_web:
        shown = Image.open(io.BytesIO(base64.b64decode(address.removeprefix("data:image/jpeg;base64,"))))
        face = manifest.read_face(manifest.sample_ids.index(sample))
        assert shown.size == (24, 24)
        assert np.abs(np.asarray(shown, float).mean(axis=(0, 1)) - face.mean(axis=(0, 1))).max() < 4


def test_a_face_that_is_gone_is_named_in_place_of_its_picture(workspace: Workspace) -> None:
    manifest = workspace.load_manifest("web")
    sample = next(iter(wrong(predictions_of(workspace, "cafe", "web")[0])))[0]
    path = Path(str(manifest.path(manifest.sample_ids.index(sample))))
    content = path.read_bytes()
    path.unlink()
    try:
        mistakes = report(workspace, "--count", "500").mistakes
    finally:
        path.write_bytes(content)
    assert [text.split()[0] for picture, _, text in mistakes if not picture and sample in text] == [sample] * sum(
        sample in {name for name, _ in wrong(predictions_of(workspace, method, "web")[0])} for method in METHODS
    )


def test_training_curves_stand_beside_their_means_over_seeds(page: Page) -> None:
    tables = page.with_header("epoch", "loss", "accuracy")
    assert tables == [[["1", "1.500", "0.250"], ["2", "0.750", "0.500"]]] * len(METHODS)


def test_a_picture_of_a_mask_is_shown_where_there_is_one_and_no_numbers_of_it(page: Page) -> None:
    shown = [known["alt"] for tag, known in page.tags if tag == "img" and known["src"].startswith("data:image/webp")]
    assert shown == [
        "cafe, trained on raf: Where on a face its mask is open.",
        "linear_probe, trained on raf: Its mean mask over faces of each expression, and how that differs from the mean over "
        "all of them.",
    ]


def test_the_page_says_how_the_numbers_were_made(workspace: Workspace) -> None:
    copies = predictions_of(workspace, "cafe", "web")[0].sample_ids[:3]
    table = pa.table({"source_split": ["train", "train", "test"], "target_sample_id": copies})
    about = {"source_digest": "digest of raf", "target_digest": workspace.load_manifest("web").digest}
    path = audit_path(workspace.root, "raf", "web")
    path.parent.mkdir(parents=True)
    pq.write_table(table.replace_schema_metadata({"cafe.audit": json.dumps(about)}), str(path))
    page = report(workspace)
    (targets,) = page.with_header("target", "data set", "split", "manifest", "faces", "copies from raf")
    assert targets == [
        ["raf", "rafdb", "test", workspace.load_manifest("raf").digest[:12], "140", "not audited"],
        ["web", "folder", "test", workspace.load_manifest("web").digest[:12], "60", "2"],
    ]
    (trainings,) = [table for table in page.tables if table[0][:4] == ["source", "method", "seeds", "epoch"]]
    assert [line[:4] for line in trainings[1:]] == [["raf", method, "0, 1", "final"] for method in METHODS]


def test_a_target_is_described_by_the_fold_that_left_it_out(tmp_path: Path) -> None:
    workspace = Workspace.at(str(tmp_path))
    labels = np.arange(70) % 7
    for fold, right in (("web", 1), ("news", 4)):
        source = "news" if fold == "web" else "web"
        run = write_run(workspace, source=source, sources=[(source, "folder"), ("raf", "rafdb")], fold=fold)
        for target in ("web", "news"):  # a fold knows its own sources better, which counts for nothing
            knows = right if target == fold else 7
            write_predictions(run, target, labels, np.where(labels < knows, labels, 6))
    runs = workspace.read_runs()
    (detail,) = list_details(make_report(runs, workspace.manifest_digests()).comparison, Gallery(500))
    assert {column.name: own.counts.diagonal().tolist() for column, own in detail.confusions.items()} == {
        "news": [10.0, 10.0, 10.0, 10.0, 0.0, 0.0, 10.0],
        "web": [10.0, 0.0, 0.0, 0.0, 0.0, 0.0, 10.0],
    }
    assert [float(cell.mean) for cell in detail.recalls["fear"]] == [1.0, 0.0]
    assert Counter(shown.column.name for shown in detail.mistakes) == {"news": 20, "web": 50}


def test_runs_evaluated_on_other_splits_alone_have_an_empty_page(tmp_path: Path) -> None:
    workspace = Workspace.at(str(tmp_path))
    write_predictions(write_run(workspace), "raf@train", np.arange(14) % 7, np.zeros(14, int), kind="rafdb")
    found = make_report(workspace.read_runs(), workspace.manifest_digests())
    assert Page(draw_experiment("trial", found, workspace.root, workspace.find_manifest).decode()).open == []


def test_mistakes_in_the_command_are_one_sentence(workspace: Workspace) -> None:
    cafe = Cafe(Path(str(workspace.root)), "")
    assert cafe.fail("report", "trail") == "Error: Unknown experiment 'trail': choose trial."
    assert cafe.fail("report", "trial", "--errors", "joy").startswith("Error: Unknown expression 'joy': choose ")
    assert "so give FILE.html." in cafe.fail("report", "trial", "--output", "page.pdf")
    assert "wrote" not in cafe.fail("report", "trial", "--versus", "scn").lower()
    assert cafe.fail("report", "trial", "--test-time", "tent").startswith("Error: --test-time tent has nothing to show")
    unheld = "has an accuracy on held-out faces of the source"
    assert f"No finished run of this workspace {unheld}" in cafe.fail("compare", "--best", "source_val")
    best = cafe.fail("compare", "--best", "source_val", "--experiment", "trial")
    assert f"No finished run of the experiment 'trial' {unheld}" in best


def test_a_file_whose_name_is_no_experiments_fails_before_any_work(tmp_path: Path) -> None:
    file = tmp_path / "my grid.toml"
    file.write_text('sources = ["rafdb"]\nmethods = ["image_only"]\n')
    cafe = Cafe(tmp_path / "work", "")
    for arguments in ((str(file),), (str(file), "--dry-run")):
        said = " ".join(cafe.fail("benchmark", *arguments).split())
        assert "'my grid' cannot be that of an experiment" in said
        assert "give --experiment NAME" in said
    assert "The name 'my runs' cannot be used" in cafe.fail("benchmark", str(file), "--experiment", "my runs")
    assert "manifest rafdb" in cafe.succeed("benchmark", str(file), "--experiment", "grid", "--dry-run")
