"""A trained run as a folder for programs that know nothing of it: ONNX, safetensors, a record and a model card.

model.onnx           faces (N, H, W, 3) uint8 → probabilities (N, K): everything between is in the graph
model.safetensors    the method's weights; tower.safetensors the tower's, unless they come with this package
run.json             the run's description: with it the folder loads as a model again
README.md            the model card
model.json           labels, preprocessing, origin, scores and versions; written last: the folder is whole
.export.json         the run, as long as the export is under way; written first: the folder is no other's
.export/             all of the above as long as it is made, so that an earlier export stays whole until it is replaced
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
from upath import UPath

from cafe.errors import UserError
from cafe.files import (
    check_output,
    list_folder,
    place_below,
    read_file,
    read_json,
    remove_file,
    remove_tree,
    write_file,
    write_json,
)
from cafe.inference.graph import FACES, OPSET, PROBABILITIES, Onnx, write_onnx
from cafe.inference.model import Model
from cafe.methods import find_method
from cafe.pipeline.models import build_model
from cafe.pipeline.workspace import Workspace
from cafe.records import digest
from cafe.report.card import write_card
from cafe.results.predictions import load_predictions
from cafe.results.runs import Run, choose, read_result
from cafe.results.scores import flatten_scores, meet, read_scores
from cafe.seals import write_sealed
from cafe.towers.building import FrozenBackbone
from cafe.towers.keeping import keep_tower

STARTED = ".export.json"  # in a folder whose export is under way: of which run
MADE = ".export"  # where it is made
CHECKED = 32  # faces of which the graph must say what PyTorch does
TOLERANCE = 1e-4  # of their probabilities
PACKAGES = ("cafe", "torch", "onnx", "onnxscript", "onnxruntime", "pillow", "numpy")
EXTRA = ("onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class Exported:
    """A folder that was written, the faces its graph was checked on and by how much their probabilities differed at most."""

    folder: UPath
    faces: int
    difference: float


def export_run(workspace: Workspace, name: str, folder: UPath) -> Exported:
    """Export a run of the workspace to a folder of this machine.

    Raises `UserError` for a run that is not finished or of a method that cannot be exported, where packages are missing,
    where there are no faces to check it on, and when the graph does not agree with PyTorch.
    """
    runs = workspace.read_runs()
    (run,), _ = choose(runs, name=name)
    check_exports(run, folder)
    model = build_model([run.folder], batch_size=1)
    if model.tower and model.tower.backbone.precision != "fp32":
        raise UserError(
            f"The features of the run {run.name!r} are of precision {model.tower.backbone.precision}, and a graph computes "
            "in fp32: extract them with --precision fp32 and train again."
        )
    faces = choose_faces(workspace, run)
    write_json(folder / STARTED, identify(run))  # first: what is half written is taken up again
    difference = _make(workspace, run, runs, model, faces, beside := folder / MADE)
    for path in sorted(list_folder(beside), key=lambda path: path.name == "model.json"):
        path.replace(place_below(folder, path.name))
    remove_tree(beside)
    remove_file(folder / STARTED)
    return Exported(folder, len(faces), difference)


def _make(
    workspace: Workspace, run: Run, runs: Sequence[Run], model: Model, faces: list[np.ndarray], folder: UPath
) -> float:
    """Write the export of a run to a folder that is emptied first; return by how much the graph differs from PyTorch."""
    remove_tree(folder)
    folder.mkdir()
    write_onnx(model, str(folder / "model.onnx"))
    difference = check_graph(model, Onnx(str(folder / "model.onnx")), faces)
    for file in ("model.safetensors", "run.json"):
        write_file(folder / file, (run.folder / file).read_bytes())
    if tower := tower_of(model):
        keep_tower(tower, folder)
    record = describe(workspace, run, model, Exported(folder, len(faces), difference))
    seeds = [other for other in runs if other.group == run.group]
    write_file(folder / "README.md", write_card(run, seeds, workspace.manifest_digests(), record))
    record["files"] = {path.name: digest(path.read_bytes()) for path in list_folder(folder)}
    write_sealed(folder / "model.json", record)
    return difference


def check_exports(run: Run, folder: UPath) -> None:
    """Raise `UserError` unless a trained run can be exported to a folder."""
    if folder.protocol:
        raise UserError(f"Cannot export to {folder}: give a folder of this machine with --output, and copy it.")
    check_output(str(folder / "model.json"), "The export")
    if list_folder(folder) and find_export(folder) != identify(run):
        raise UserError(
            f"The folder {folder} holds other files than the export of {run.name}: give a new one with --output."
        )
    if reason := find_method(run.method).not_exported:
        raise UserError(f"A run of {run.method} cannot be exported. {reason}")
    for package in EXTRA:
        if find_version(package) is None:
            raise UserError(f"The package {package!r} is missing: run `pip install 'cafe[export]'`.")


def identify(run: Run) -> dict[str, Any]:
    """Return what tells the export of a run from that of another, which may have its name."""
    return {"name": run.name, "run.json": digest(read_file(run.folder / "run.json"))}


def find_export(folder: UPath) -> dict[str, Any] | None:
    """Return whose export a folder holds, whole or half written; None where it holds none."""
    if started := read_json(folder / STARTED):
        return started
    record = read_json(folder / "model.json") or {}
    files = record.get("files")
    return {"name": record.get("name"), "run.json": files.get("run.json")} if isinstance(files, dict) else None


def choose_faces(workspace: Workspace, run: Run) -> list[np.ndarray]:
    """Return the middle squares of faces that the run was evaluated on, or else trained on, spread over their manifest."""
    known = workspace.manifest_names()
    names = [name for name in (*load_predictions(run.folder, named=False), run.source) if name in known]
    if not names:
        raise UserError(f"There is no face to check the graph on: index {run.source!r} in {workspace.root} again.")
    manifest = workspace.load_manifest(names[0])
    rows = np.unique(np.linspace(0, len(manifest) - 1, CHECKED).astype(int))
    return [cut_middle(manifest.read_face(int(row))) for row in rows]


def cut_middle(picture: np.ndarray) -> np.ndarray:
    """Return the middle square of a picture (H, W, 3)."""
    side = min(picture.shape[:2])
    top, left = (picture.shape[0] - side) // 2, (picture.shape[1] - side) // 2
    return picture[top : top + side, left : left + side]


def check_graph(model: Model, graph: Onnx, faces: list[np.ndarray]) -> float:
    """Return by how much a graph's probabilities differ at most from the model's; raise `UserError` beyond the tolerance."""
    expected = model.predict(faces)
    got = np.concatenate([graph.predict(face[None]) for face in faces])
    difference = float(np.abs(got - expected).max())
    if not difference <= TOLERANCE:
        raise UserError(
            f"The graph's probabilities differ from PyTorch's by up to {difference:.1e}, more than {TOLERANCE:.0e}: this "
            "tower cannot be exported exactly with the installed versions; use the run with `cafe predict`."
        )
    return difference


def tower_of(model: Model) -> FrozenBackbone | None:
    """Return the tower a model needs: that of its features, or the one it was tuned from."""
    found = model.tower.backbone if model.tower else getattr(model.methods[0], "tower", None)
    return found if isinstance(found, FrozenBackbone) else None


def describe(workspace: Workspace, run: Run, model: Model, exported: Exported) -> dict[str, Any]:
    """Return the record of an exported run, as `model.json` holds it."""
    tower, plan = tower_of(model), model.plan
    preprocessing: dict[str, Any] = {"where": "inside the graph: resized as Pillow does, scaled to 0–1, normalised"}
    if "image" in model.methods[0].needs:
        preprocessing["image_branch"] = describe_view(model.image_size, plan)
    if model.tower:
        preprocessing["tower"] = describe_view(model.tower.backbone.facts.input_size, model.tower.plan)
    origin = {name: getattr(run, name) for name in ("method", "source", "seed")}
    origin["sources"] = [asdict(source) for source in run.sources]
    origin |= {"selection": run.selection, "experiments": sorted(run.experiments), "settings": run.settings}
    origin |= {"derived": run.derived, "not_as_published": list(run.not_as_published)}
    if tower:
        facts = tower.facts
        origin["tower"] = {"name": run.settings["backbone"], "architecture": facts.architecture}
        origin["tower"] |= {
            "weights": facts.weights_digest,
            "kept_here": (exported.folder / "tower.safetensors").exists(),
        }
    return {
        "format": 1,
        "name": run.name,
        "labels": list(model.classes),
        "input": {"name": FACES, "type": "uint8", "shape": ["N", "H", "W", 3], "about": "aligned faces, RGB"},
        "output": {"name": PROBABILITIES, "type": "float32", "shape": ["N", len(model.classes)]},
        "preprocessing": preprocessing,
        "origin": origin,
        "trained": read_result(run.folder),
        "scores": flatten_scores(
            read_scores(meet([run], workspace.manifest_digests()).runs, workspace.manifest_names())
        ),
        "check": {"faces": exported.faces, "largest_difference": exported.difference, "tolerance": TOLERANCE},
        "versions": {"python": platform.python_version(), "opset": OPSET}
        | {package: find_version(package) for package in PACKAGES},
    }


def describe_view(size: int, plan: Any) -> dict[str, Any]:
    """Return how pictures are brought to what a network takes."""
    return {"size": size, "interpolation": plan.interpolation, "mean": list(plan.mean), "std": list(plan.std)}


def find_version(package: str) -> str | None:
    """Return the version of a package, None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
