"""Protocols: which faces are evaluated, in which colours, and that no table mixes two of them."""

from __future__ import annotations

from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Cafe, draw_faces
from mlflow import MlflowClient
from PIL import Image
from trained import embed
from upath import UPath

from cafe.data.indexing import index_files
from cafe.data.manifest import Face, Manifest
from cafe.data.readers import DATASETS
from cafe.errors import UserError
from cafe.learning.loading import FaceDataset
from cafe.methods import METHODS
from cafe.pipeline.evaluate import evaluate_target
from cafe.pipeline.faces import Faces, Part, choose_split, choose_target, choose_targets
from cafe.pipeline.features.extract import describe_store, look_up_tower
from cafe.pipeline.features.integrity import Skipped
from cafe.pipeline.features.store import FeatureStore
from cafe.pipeline.features.worker import ShardEmbedder
from cafe.pipeline.models import build_method, find_inputs
from cafe.pipeline.need import choose_source_store, find_readers
from cafe.pipeline.plan import plan_training
from cafe.pipeline.process.advice import explain_copies
from cafe.pipeline.runs import RunSpec, add_experiment
from cafe.pipeline.settings import ExtractSettings, StoreChoice, TrainSettings
from cafe.pipeline.tracking.mirror import Mirror, default_uri
from cafe.pipeline.workspace import Workspace
from cafe.results.columns import Column
from cafe.results.predictions import Predictions, load_predictions
from cafe.results.protocols import PROTOCOLS, find_protocol
from cafe.results.runs import read_runs
from cafe.results.scores import flatten_scores, read_scores
from cafe.results.sources import Source
from cafe.seals import write_sealed
from cafe.towers.weights import write_tensors
from cafe.views.drawing import ViewPlan


def manifest(kind: str, *splits: str) -> Manifest:
    faces = [Face(f"{n}.png", f"{n}.png", n % 7, split, None, 8, 8, str(n)) for n, split in enumerate(splits)]
    return Manifest.from_faces(f"a {kind}", "/data", faces, kind)


@pytest.mark.parametrize(
    ("kind", "splits", "source", "clean", "paper", "colours"),
    [
        ("rafdb", ("train", "test"), "sfew", "test", "test", "rgb"),
        ("ferplus", ("train", "val", "test"), "rafdb", "test", "test", "rgb"),
        ("affectnet", ("train", "val"), "rafdb", "val", "val", "bgr"),
        ("mma", ("train", "val", "test"), "rafdb", "test", "test", "bgr"),
        ("sfew", ("train", "val"), "rafdb", "val", "train", "bgr"),
        ("sfew", ("train", "val"), "sfew", "val", "val", "bgr"),  # never the faces it was trained on
        ("sfew", ("train",), "sfew", None, None, "bgr"),
        ("ferplus-argmax", ("train", "val", "test"), "rafdb", None, None, "rgb"),
        ("folder", ("train", "test"), "folder", "test", "test", "rgb"),
        ("", ("train", "val"), "", "val", "val", "rgb"),  # a manifest from before kinds were kept
        ("folder", ("train",), "rafdb", None, None, "rgb"),
    ],
)
def test_each_protocol_says_which_faces_are_evaluated_and_how(
    kind: str, splits: tuple[str, ...], source: str, clean: str | None, paper: str | None, colours: str
) -> None:
    target = manifest(kind, *splits)
    assert PROTOCOLS["clean"].split(target, source) == clean
    assert PROTOCOLS["paper"].split(target, source) == paper
    assert (PROTOCOLS["clean"].channels(kind), PROTOCOLS["paper"].channels(kind)) == ("rgb", colours)


def test_a_set_without_splits_is_evaluated_whole_where_none_of_it_was_trained_on(tmp_path: Path) -> None:
    workspace = Workspace.at(str(tmp_path / "work"))
    draw_faces(tmp_path / "news", per_class=5)
    news = index_files("news", DATASETS["folder"](UPath(tmp_path / "news"))).manifest
    relabelled = replace(news, name="again", classes=("x", *news.classes[1:]), table=news.table.slice(0, 12))
    for one in (news, relabelled):
        one.save(workspace.manifest_path(one.name))
    news, relabelled = (workspace.load_manifest(name) for name in ("news", "again"))
    before = replace(news, parted=False)  # as a file of before is read: nobody knows
    assert (news.parted, news.digest) == (True, before.digest)
    clean = PROTOCOLS["clean"]
    for target, sources, split in (
        (news, [Source("raf", "rafdb", "0")], "all"),
        (before, [Source("raf", "rafdb", "0")], "test"),
        (news, [Source("raf", "rafdb", "0"), Source("news", "folder", news.digest)], "test"),
        (news, [Source("web", "folder", news.digest)], "test"),
        (news, [Source("again", "folder", relabelled.digest)], "test"),  # most of its pictures by another name
    ):
        assert choose_split(workspace, target, clean, sources) == split


def test_training_faces_among_those_that_are_evaluated_are_counted_by_bytes_and_box(tmp_path: Path) -> None:
    workspace = Workspace.at(str(tmp_path / "work"))

    def save(name: str, *faces: tuple[str, str, tuple[int, int, int, int] | None]) -> Manifest:
        rows = [
            Face(str(n), str(n), n % 7, split, None, 8, 8, digest * 64, box)
            for n, (split, digest, box) in enumerate(faces)
        ]
        Manifest.from_faces(name, "/data", rows, "folder").save(workspace.manifest_path(name))
        return workspace.load_manifest(name)

    one, other = (0, 0, 4, 4), (4, 0, 4, 4)
    news = save("news", ("train", "a", None), ("train", "b", one), ("test", "c", None))
    web = save(
        "web", ("test", "a", None), ("test", "b", one), ("test", "b", other), ("test", "c", None), ("train", "a", None)
    )
    target = Faces.of(Part.of(workspace, web))
    trained_on = (Source("news", "folder", news.digest), Source("gone", "folder", "0"))
    (sentence,) = explain_copies(workspace, [(trained_on, [target]), (trained_on, [target])])
    assert sentence.startswith(
        "2 of the 4 faces of web that are evaluated are training faces of news: `cafe data audit news web`"
    )
    changed = (Source("news", "folder", "0"),)
    assert list(explain_copies(workspace, [(changed, [target])])) == []


def test_an_unknown_protocol_is_answered_with_those_there_are() -> None:
    with pytest.raises(UserError, match=r"Unknown protocol 'papr': choose clean, paper\."):
        find_protocol("papr")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, tiny_tower: str) -> Workspace:
    """A source and two targets with features, one of them in both orders of the colours; made without Ray."""
    root = tmp_path_factory.mktemp("protocols")
    workspace = Workspace.at(str(root / "work"))
    for seed, (name, kind) in enumerate((("raf", "rafdb"), ("stills", "sfew"), ("fer", "ferplus"))):
        for number, split in enumerate(("train", "val" if kind == "sfew" else "test")):
            draw_faces(root / name / split, per_class=4 + number, seed=2 * seed + number)
        listing = replace(DATASETS["folder"](UPath(root / name)), kind=kind)
        index_files(name, listing).manifest.save(workspace.manifest_path(name))
        for channels in ("rgb", "bgr") if kind == "sfew" else ("rgb",):
            extract(workspace, name, ExtractSettings(backbone=tiny_tower, channels=channels))
    return workspace


def extract(workspace: Workspace, name: str, chosen: ExtractSettings) -> FeatureStore:
    """Fill a store as the actors of stage one do, in this process."""
    faces = workspace.load_manifest(name)
    about = describe_store(faces, chosen, look_up_tower(workspace, chosen))
    store = FeatureStore.create(workspace.features / name, about, faces)
    embedder = ShardEmbedder({str(store.path): about}, faces, chosen, 1, "cpu")
    for shard in store.pending():
        embed(embedder, faces, shard)
    return store


def make_run(workspace: Workspace, method: str = "linear_probe", source: str = "raf") -> tuple[UPath, RunSpec]:
    """Write a run as training leaves it, with the weights it began with."""
    plan = plan_training(workspace, TrainSettings(source=source, method=method, image_size=32, targets="none"))
    plan.spec.save(plan.run)
    add_experiment(plan.run, "cafe")
    write_tensors(plan.run / "model.safetensors", build_method(plan.spec).state_dict())
    return plan.run, plan.spec


def test_the_grid_of_the_maps_is_kept_but_is_no_part_of_a_runs_name(workspace: Workspace, tmp_path: Path) -> None:
    _, spec = make_run(workspace)
    larger = replace(spec, grid=(4, 5))
    assert (larger.name, larger.group) == (spec.name, spec.group)
    larger.save(UPath(tmp_path))
    assert find_inputs(RunSpec.load(UPath(tmp_path))).grid == (4, 5)


def evaluate(
    workspace: Workspace, run: UPath, spec: RunSpec, protocol: str, names: str | None = None, split: str | None = None
) -> None:
    for target in choose_targets(workspace, names, spec, protocol, split):
        evaluate_target(run, target)


def test_a_target_gets_the_store_of_its_colours_and_a_source_always_rgb(workspace: Workspace) -> None:
    _, spec = make_run(workspace)
    for protocol, channels in (("clean", "rgb"), ("paper", "bgr")):
        target = choose_target(workspace, "stills", spec, find_protocol(protocol), None)
        assert target.info is not None
        assert (target.info.key.channels, target.channels) == (channels, channels)
    chosen = choose_source_store(workspace, workspace.load_manifest("stills"), StoreChoice(), METHODS["cafe"])
    assert chosen is not None
    assert chosen[1].key.channels == "rgb"


def test_a_target_that_shares_no_class_is_left_out_unless_it_is_named(workspace: Workspace) -> None:
    _, spec = make_run(workspace, "image_only")
    names = [target.name for target in choose_targets(workspace, None, spec, "clean")]
    faces = workspace.load_manifest("fer")
    other = replace(faces, name="ward", classes=tuple(f"state {number}" for number in range(len(faces.classes))))
    other.save(workspace.manifest_path("ward"))
    assert [target.name for target in choose_targets(workspace, None, spec, "clean")] == names
    with pytest.raises(
        UserError, match=r"No face of 'ward' in the split 'test' shows a class of this run \(surprise, "
    ):
        choose_targets(workspace, "ward", spec, "clean")
    assert [target.name for target in choose_targets(workspace, "fer, fer,", spec, "clean")] == ["fer"]
    with pytest.raises(UserError, match="--targets ',' names no manifest"):
        choose_targets(workspace, ",", spec, "clean")


def test_missing_bgr_features_say_how_to_make_them(workspace: Workspace, tmp_path: Path) -> None:
    _, spec = make_run(workspace)
    named = workspace.load_manifest("fer")
    other = replace(named, name="mixed", kind="mma")
    other.save(workspace.manifest_path("mixed"))
    with pytest.raises(UserError, match=r"No features of 'mixed' .*it has none.* --channels bgr`, or leave it out"):
        choose_target(workspace, "mixed", spec, find_protocol("paper"), None)
    workspace.manifest_path("mixed").unlink()


def test_a_set_that_nobody_named_and_that_lacks_features_is_left_out_with_how_to_add_it(
    workspace: Workspace, caplog: pytest.LogCaptureFixture
) -> None:
    _, spec = make_run(workspace)
    replace(workspace.load_manifest("fer"), name="third").save(workspace.manifest_path("third"))
    plan = plan_training(workspace, TrainSettings(source="raf", method="linear_probe", image_size=32))
    assert "third" not in [target.name for target in plan.targets]
    assert "fer" in [target.name for target in plan.targets]
    (said,) = [record.getMessage() for record in caplog.records if "third" in record.getMessage()]
    assert said.startswith(
        "Left out: third. No features of 'third' match this run's tower (it has none): run `cafe extract third "
    )
    assert said.endswith(f"Then: cafe evaluate {spec.name} --targets third")
    with pytest.raises(UserError, match="No features of 'third'"):
        choose_targets(workspace, "fer,third", spec, "clean")
    workspace.manifest_path("third").unlink()


def test_argmax_labels_are_evaluated_apart_or_not_at_all(workspace: Workspace) -> None:
    _, spec = make_run(workspace)
    path, majority = workspace.manifest_path("fer"), workspace.load_manifest("fer")
    replace(majority, kind="ferplus-argmax").save(path)
    with pytest.raises(UserError, match=r"has no way to evaluate 'fer' .*majority rule.*--split SPLIT"):
        choose_target(workspace, "fer", spec, find_protocol("clean"))
    apart = choose_target(workspace, "fer", spec, find_protocol("clean"), "test")
    assert (apart.split, apart.column) == ("test", Column("fer", "test"))
    majority.save(path)


def test_a_target_without_a_readable_face_is_one_sentence(workspace: Workspace, tmp_path: Path) -> None:
    _, spec = make_run(workspace)
    manifest = workspace.load_manifest("fer")
    (store,) = find_readers(workspace, manifest)
    summary = FeatureStore(*store).receipts.summary
    assert not summary.exists()
    write_sealed(summary, {"skipped": [asdict(Skipped(row, "missing")) for row in range(len(manifest))]})
    try:
        with pytest.raises(
            UserError, match="No face of 'fer' in the split 'test' is readable: see why with `cafe data"
        ):
            choose_target(workspace, "fer", spec, find_protocol("clean"))
    finally:
        summary.unlink()


def test_predictions_say_their_protocol_and_no_table_mixes_two(workspace: Workspace) -> None:
    run, spec = make_run(workspace)
    evaluate(workspace, run, spec, "clean")
    clean = metrics_of(run)
    cafe = Cafe(Path(str(workspace.root)), "")
    table = cafe.succeed("compare")
    assert "Protocol clean: RGB; SFEW is evaluated on val" in table
    assert "also evaluated" not in table
    assert "No run was evaluated by the protocol 'paper' yet, only by clean" in cafe.fail(
        "compare", "--protocol", "paper"
    )

    evaluate(workspace, run, spec, "paper")
    evaluate(workspace, run, spec, "paper", "stills", "val")
    with pytest.raises(UserError, match="'raf' has no faces in the split 'val': choose train, test, or leave it out"):
        evaluate(workspace, run, spec, "paper", "raf", "val")
    both = metrics_of(run)
    assert {name: value for name, value in both.items() if not name.startswith("paper/")} == clean
    predictions = {name: load_predictions(run, name) for name in PROTOCOLS}
    assert set(predictions["clean"]) == {"raf", "stills", "fer"}
    assert set(predictions["paper"]) == {"raf", "stills", "fer", "stills@val"}
    said = {
        (protocol, target): tuple(rows.about[name] for name in ("protocol", "split", "channels", "kind"))
        for protocol in PROTOCOLS
        for target, rows in predictions[protocol].items()
    }
    assert said["clean", "stills"] == ("clean", "val", "rgb", "sfew")
    assert said["paper", "stills"] == ("paper", "train", "bgr", "sfew")
    assert said["paper", "fer"] == ("paper", "test", "rgb", "ferplus")
    assert len(predictions["clean"]["stills"].labels) == 15
    assert len(predictions["paper"]["stills"].labels) == 12
    unseen = np.mean([accuracy(predictions["paper"][target]) for target in ("stills", "fer")])
    assert both["paper/unseen/accuracy"] == pytest.approx(unseen)

    Mirror(workspace).update(run)
    client = MlflowClient(default_uri(workspace))
    (logged,) = client.search_runs([client.get_experiment_by_name("cafe").experiment_id])
    assert logged.data.tags["cafe.protocols"] == "clean, paper"
    logged_scores = [logged.data.metrics[f"{prefix}target/stills/accuracy"] for prefix in ("paper/", "")]
    assert logged_scores == pytest.approx([accuracy(predictions[name]["stills"]) for name in ("paper", "clean")])
    for protocol, other in (("clean", "paper"), ("paper", "clean")):
        table = cafe.succeed("compare", "--protocol", protocol, "--markdown", str(workspace.root / "table.md"))
        assert f"{100 * accuracy(predictions[protocol]['stills']):.1f}" in table
        assert f"also evaluated by --protocol {other}" in table
        assert f"Protocol {protocol}: {PROTOCOLS[protocol].about}" in (workspace.root / "table.md").read_text()


def metrics_of(run: UPath) -> dict[str, float]:
    return flatten_scores(read_scores(read_runs([run])))


def accuracy(predictions: Predictions) -> float:
    return float((predictions.predicted == predictions.labels).mean())


def test_a_changed_split_is_evaluated_again(workspace: Workspace) -> None:
    run, spec = make_run(workspace, "linear_probe", "fer")
    evaluate(workspace, run, spec, "clean")
    (target,) = choose_targets(workspace, "stills", spec, "clean")
    assert target.is_evaluated(run)
    assert not replace(target, split="train").is_evaluated(run)
    assert not replace(target, column=Column("stills", protocol="paper")).is_evaluated(run)
    (path,) = (run / "predictions").glob("stills.parquet")
    found = load_predictions(run)["stills"]
    about = {key: value for key, value in found.about.items() if key != "rows"}  # as files of before
    Predictions(found.sample_ids, found.labels, found.probabilities, about, classes=found.classes).save(path)
    assert target.is_evaluated(run)
    found = Predictions(found.sample_ids[1:], found.labels[1:], found.probabilities[1:], about, classes=found.classes)
    found.save(path)  # another face is readable now
    assert not target.is_evaluated(run)


def swap_pictures(faces: Manifest, root: Path) -> Manifest:
    """Write every face of a manifest as a whole picture with its colours reversed."""
    for row, sample in enumerate(faces.sample_ids):
        path = root / sample
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.ascontiguousarray(faces.read_face(row)[..., ::-1])).save(path, "PNG")  # under any suffix
    changes = {
        "box": [None] * len(faces),
        "digest": [sha256((root / sample).read_bytes()).hexdigest() for sample in faces.sample_ids],
    }
    table = faces.table
    for name, values in changes.items():
        table = table.set_column(table.column_names.index(name), name, [values]).cast(faces.table.schema)
    return replace(faces, root=str(root), table=table)


def test_bgr_features_are_those_of_pictures_with_reversed_colours(
    workspace: Workspace, tiny_tower: str, tmp_path: Path
) -> None:
    other = Workspace.at(str(tmp_path / "work"))
    swap_pictures(workspace.load_manifest("stills"), tmp_path / "swapped").save(other.manifest_path("stills"))
    expected = extract(other, "stills", ExtractSettings(backbone=tiny_tower)).array("pooled")[:]
    stores = {
        channels: extract(workspace, "stills", ExtractSettings(backbone=tiny_tower, channels=channels))
        for channels in ("rgb", "bgr")
    }
    np.testing.assert_array_equal(stores["bgr"].array("pooled")[:], expected)
    assert not np.allclose(stores["rgb"].array("pooled")[:], expected, atol=1e-3)


def test_the_image_branch_sees_the_box_and_the_colours_the_tower_saw(workspace: Workspace, tmp_path: Path) -> None:
    whole = workspace.load_manifest("stills")
    boxes = [[row % 5, 3, 12, 15] for row in range(len(whole))]
    boxed = replace(
        whole,
        table=whole.table.set_column(whole.table.column_names.index("box"), "box", [boxes]).cast(whole.table.schema),
    )
    plan = ViewPlan("paper", 0, 3, "bilinear", (0.5,) * 3, (0.5,) * 3)
    rows, device = [np.arange(6)], torch.device("cpu")
    needs = frozenset({"image"})
    (got,) = FaceDataset(boxed, plan, needs, 16, channels="bgr").load(rows, 1, device)
    swapped = swap_pictures(boxed, tmp_path / "swapped")
    (expected,) = FaceDataset(swapped, plan, needs, 16).load(rows, 1, device)
    assert torch.equal(got["image"], expected["image"])
    (uncut,) = FaceDataset(whole, plan, needs, 16, channels="bgr").load(rows, 1, device)
    assert not torch.equal(got["image"], uncut["image"])
