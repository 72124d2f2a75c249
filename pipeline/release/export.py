"""A trained run as a folder for programs that know nothing of it: ONNX, safetensors, a record and a model card.

model.onnx           faces (N, H, W, 3) uint8 → probabilities (N, K): everything between is in the graph
model.safetensors    the method's weights; tower.safetensors the tower's, unless they come with this package
config.json          what timm builds a tower of a repository or a folder from
run.json             the run's description: with it the folder loads as a model again
model-2.safetensors, run-2.json and so on: the same of further seeds, where several are averaged
README.md            the model card
.export.json         the runs, as long as the export is under way; written first: the folder is no other's
.export/             all of the above as long as it is made, so that an earlier export stays whole until it is replaced
model.json           labels, preprocessing, what is averaged, origin, scores, versions; written last: the folder is whole

The same runs give the same bytes: no time and no place is in them but those that the user gave the runs.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
from torch import Tensor
from upath import UPath

from cafe import __version__
from cafe.errors import UserError, quote
from cafe.files import (
    MOST_TEXT,
    check_output,
    list_folder,
    locate,
    place_below,
    read_file,
    read_json,
    remove_file,
    remove_tree,
    write_file,
    write_json,
)
from cafe.inference.graph import AXES, FACES, OPSET, PROBABILITIES, Onnx, write_onnx
from cafe.inference.model import Model
from cafe.methods import find_method
from cafe.methods.method import Method
from cafe.pipeline.models import build_model, name_files
from cafe.pipeline.release.confidence import describe_home
from cafe.pipeline.runs import EXPORTED, MODEL_FORMAT
from cafe.pipeline.settings import ExportSettings
from cafe.pipeline.workspace import Workspace
from cafe.records import digest
from cafe.report.card import write_card
from cafe.results.predictions import load_predictions
from cafe.results.protocols import ALL_PROTOCOLS, PROTOCOLS
from cafe.results.runs import Run, choose, read_result
from cafe.results.scores import flatten_scores, meet, read_scores
from cafe.results.variants import average_exported
from cafe.seals import write_sealed
from cafe.towers.building import FrozenBackbone
from cafe.towers.keeping import keep_tower
from cafe.towers.weights import write_tensors

STARTED = ".export.json"  # in a folder whose export is under way: of which run
MADE = ".export"  # where it is made
SPEED = "faces_per_second"  # which no two trainings have alike
CHECKED = 32  # faces of which the graph must say what PyTorch does
TOLERANCE = 1e-4  # of their probabilities
PACKAGES = ("torch", "onnx", "onnxscript", "onnxruntime", "pillow", "numpy")
PLAIN = ExportSettings()
EXTRA = ("onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class Exported:
    """A folder that was written, and by how much probabilities of some faces differ at most.

    `difference` is the graph's from PyTorch's, `rounding` what weights in half precision change; None where there is no
    graph and no rounding.
    """

    folder: UPath
    faces: int
    difference: float | None = None
    rounding: float | None = None


def export_run(workspace: Workspace, name: str, folder: UPath, settings: ExportSettings = PLAIN) -> Exported:
    """Export a run of the workspace, or all its seeds, to a folder of this machine.

    Raises `UserError` for a run that is not finished or of a method that cannot be exported, where packages are missing,
    where there are no faces to check it on, and when the graph does not agree with PyTorch.
    """
    every = workspace.read_runs()
    runs, _ = choose(every, name=name, ensemble=settings.ensemble)
    check_exports(runs, folder, settings)
    model = replace(build_model([run.folder for run in runs], batch_size=1), flip=settings.flip)
    if settings.graph:
        check_precision(model)
    faces = choose_faces(workspace, runs[0]) if settings.graph or settings.weights == "float16" else []
    write_json(folder / STARTED, identify(runs, settings))  # first: what is half written is taken up again
    seeds = [other for other in every if other.group == runs[0].group]
    exported = _make(workspace, runs, seeds, model, faces, beside := folder / MADE, settings)
    for path in sorted(list_folder(beside), key=lambda path: path.name == "model.json"):
        path.replace(place_below(folder, path.name))
    remove_tree(beside)
    remove_file(folder / STARTED)
    return replace(exported, folder=folder)


def _make(
    workspace: Workspace,
    runs: Sequence[Run],
    seeds: Sequence[Run],
    model: Model,
    faces: list[np.ndarray],
    folder: UPath,
    settings: ExportSettings,
) -> Exported:
    """Write the export of runs, which have these seeds besides, to a folder that is emptied first."""
    remove_tree(folder)
    folder.mkdir()
    rounding = write_runs(runs, model, folder, settings.weights, faces)
    difference = None
    if settings.graph:
        write_onnx(model, str(folder / "model.onnx"))
        difference = check_graph(model, Onnx(str(folder / "model.onnx")), faces)
    if tower := tower_of(model):
        keep_tower(tower, folder)
    exported = Exported(folder, len(faces), difference, rounding)
    record = describe(workspace, runs, model, exported, settings)
    card = write_card(runs, seeds, workspace.manifest_digests(), record, read_about(settings))
    write_file(folder / "README.md", card)
    record["files"] = {path.name: digest(path.read_bytes()) for path in list_folder(folder)}
    write_sealed(folder / "model.json", record)
    return exported


def read_about(settings: ExportSettings) -> str:
    """Return what the card is to say of the model besides, in Markdown; raise `UserError` for a file that is no text."""
    if settings.about is None:
        return ""
    try:
        return read_file(locate(settings.about), MOST_TEXT).decode().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--about {settings.about} cannot be read as text ({quote(error)}): give Markdown.") from None


def check_exports(runs: Sequence[Run], folder: UPath, settings: ExportSettings) -> None:
    """Raise `UserError` unless trained runs can be exported to a folder."""
    run = runs[0]
    if run.spec.get("exported"):
        raise UserError(f"The run {run.name!r} is an exported model already: copy {run.folder / EXPORTED}.")
    if folder.protocol:
        raise UserError(f"Cannot export to {folder}: give a folder of this machine with --output, and copy it.")
    read_about(settings)
    check_output(str(folder / "model.json"), "The export")
    if settings.ensemble and len(runs) == 1:
        raise UserError(
            f"The run {run.name!r} has no other finished seed to average: leave --ensemble out, or train one."
        )
    if list_folder(folder) and find_export(folder) != identify(runs, settings):
        raise UserError(
            f"The folder {folder} holds other files than this export of {run.name}: give a new one with --output."
        )
    if not settings.graph:
        return
    if reason := find_method(run.method).not_exported:
        raise UserError(f"A run of {run.method} cannot be exported. {reason}")
    for package in EXTRA:
        if find_version(package) is None:
            raise UserError(
                f"The package {package!r} is missing: run `pip install 'cafe-fer[export]'`, or leave the graph "
                "out with --no-graph."
            )


def check_precision(model: Model) -> None:
    """Raise `UserError` for features that no graph computes."""
    if model.tower and model.tower.backbone.precision != "fp32":
        raise UserError(
            f"The features of the run {model.name!r} are of precision {model.tower.backbone.precision}, and a graph "
            "computes in fp32: extract them with --precision fp32 and train again."
        )


def name_folder(workspace: Workspace, runs: Sequence[Run], settings: ExportSettings) -> UPath:
    """Return where runs are exported to unless a place is given: exports of different kinds have places of their own."""
    kind = [f"{len(runs)}-seeds"] * settings.ensemble + ["flip"] * settings.flip
    kind += [settings.weights] * (settings.weights != "float32") + ["no-graph"] * (not settings.graph)
    return place_below(workspace.root / "exports", "-".join([runs[0].name, *kind]))


def identify(runs: Sequence[Run], settings: ExportSettings) -> dict[str, Any]:
    """Return what tells the export of runs from that of others, which may have their names, and from another of theirs."""
    records = {name_files(number)[0]: digest(read_file(run.folder / "run.json")) for number, run in enumerate(runs, 1)}
    form = {"flip": settings.flip, "weights": settings.weights, "graph": settings.graph}
    return {"name": runs[0].name, **records, **form}  # what --about says is no part of it: a card can be written anew


def find_export(folder: UPath) -> dict[str, Any] | None:
    """Return whose export a folder holds, whole or half written, as `identify` says it; None where it holds none.

    Those that are too old to say their form are of the plain one.
    """
    plain = {"flip": False, "weights": "float32", "graph": True}
    if started := read_json(folder / STARTED):
        return plain | started
    record = read_json(folder / "model.json") or {}
    files = record.get("files")
    if not isinstance(files, dict):
        return None
    records = {name: known for name, known in files.items() if re.fullmatch(r"run(-\d+)?\.json", name)}
    form = {"flip": record["averaged"]["mirror_images"], "weights": record["weights"]} if "averaged" in record else {}
    return {"name": record.get("name"), **records, **plain, **form, "graph": "model.onnx" in files}


def write_runs(runs: Sequence[Run], model: Model, folder: UPath, form: str, faces: list[np.ndarray]) -> float | None:
    """Write the records and weights of a model's runs; return by how much rounding changes the probabilities of faces.

    In half precision the model itself gets the rounded weights: all that is made of it later is of what is written.
    """
    for number, run in enumerate(runs, 1):
        record, weights = name_files(number)
        write_file(folder / record, read_file(run.folder / "run.json"))
        if form == "float32":
            write_file(folder / weights, read_file(run.folder / "model.safetensors"))
    if form == "float32":
        return None
    expected = model.predict(faces)
    for number, method in enumerate(model.methods, 1):
        rounded = halve(method)
        write_tensors(folder / name_files(number)[1], rounded)
        method.load_state_dict(rounded)
    return float(np.abs(model.predict(faces) - expected).max())


def halve(method: Method) -> dict[str, Tensor]:
    """Return the state of a method with its parameters in half precision, but for those that have larger values.

    Statistics, which are no parameters, stay as they are: a deviation may be infinite.
    """
    limit, learned = torch.finfo(torch.float16).max, dict(method.named_parameters(remove_duplicate=False))
    return {
        name: value.half() if name in learned and value.is_floating_point() and value.abs().max() <= limit else value
        for name, value in method.state_dict().items()
    }


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


def describe(
    workspace: Workspace, runs: Sequence[Run], model: Model, exported: Exported, settings: ExportSettings
) -> dict[str, Any]:
    """Return the record of exported runs, as `model.json` holds it."""
    tower, plan, run, met = tower_of(model), model.plan, runs[0], meet(runs, workspace.manifest_digests())
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
    check: dict[str, Any] = {"faces": exported.faces}
    if exported.difference is not None:
        check |= {"largest_difference": exported.difference, "tolerance": TOLERANCE}
    if exported.rounding is not None:
        check |= {"rounding": exported.rounding}
    evaluated, mirrored = average_exported(met.runs, settings.flip)
    protocols = tuple(PROTOCOLS) if mirrored else ALL_PROTOCOLS
    scores = flatten_scores(read_scores([evaluated], workspace.manifest_names(), protocols))
    return {
        "format": MODEL_FORMAT,
        "name": run.name,
        "labels": list(model.classes),
        "input": {"name": FACES, "type": "uint8", "shape": [*AXES, 3], "about": "aligned faces, RGB"},
        "output": {"name": PROBABILITIES, "type": "float32", "shape": [AXES[0], len(model.classes)]},
        "averaged": {"seeds": [one.seed for one in runs], "mirror_images": settings.flip},
        "weights": settings.weights,
        "preprocessing": preprocessing,
        "origin": origin,
        "trained": {name: value for name, value in (read_result(run.folder) or {}).items() if name != SPEED},
        **describe_home(evaluated),
        "scores": scores,
        "scores_mirrored": mirrored,
        "left_out": [str(one) for one in met.left_out],
        "check": check,
        "versions": {"python": platform.python_version(), "opset": OPSET, "cafe": __version__}
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
