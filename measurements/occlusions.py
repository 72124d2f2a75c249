"""What OFER takes for an occlusion and paints in its place: faces with sunglasses, hands and masks planted on them.

    python measurements/occlusions.py --method ofer --output page.png                     # synthetic faces
    python measurements/occlusions.py --method ofer_own --faces FOLDER --output page.png  # real: FOLDER/EXPRESSION/*.jpg

Teaches the detector and the painter on the training faces, plants things on test faces, prints how well covered patches are
told from free ones, and draws a page: the face, the thing planted, what was flagged, what was painted.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from sklearn.metrics import roc_auc_score
from upath import UPath

from cafe.data.expressions import EXPRESSIONS
from cafe.data.indexing import index_files
from cafe.data.manifest import Manifest
from cafe.data.readers import DATASETS
from cafe.learning.loading import FaceDataset
from cafe.learning.training import PREDICTION_BATCH, prepare
from cafe.methods import METHODS
from cafe.methods.method import Batch, Inputs
from cafe.methods.ofer import Ofer, Recipe
from cafe.randomness import random_generator
from cafe.synthetic.camera import Pixels, plant
from cafe.synthetic.domains import write
from cafe.synthetic.face import CameraPose
from cafe.synthetic.person import draw_person
from cafe.towers.building import load_backbone
from cafe.towers.embedding import Embedder
from cafe.views.drawing import ViewPlan

THINGS = ("sunglasses", "hand", "mask")
CPU = torch.device("cpu")
SHOWN = 9  # faces on the page


def plant_all(manifest: Manifest, rows: np.ndarray, folder: Path, scale: float, eyes: float) -> list[np.ndarray]:
    """Write the faces with one thing each and return where it lies, (H, W) each; grey pictures stay grey.

    `scale` is half a face's width and `eyes` the height of the eyes, in sides of the picture.
    """
    covered = []
    for number, row in enumerate(rows):
        picture = manifest.read_face(int(row))
        height, width = picture.shape[:2]
        view = CameraPose(0, 0, 0, scale * width, (width / 2, eyes * height))
        person = draw_person(random_generator(0, "occluder", number))
        planted, where = plant(picture, THINGS[number % len(THINGS)], person, view, number)
        grey = np.ptp(picture, axis=2).max() == 0
        image = Image.fromarray(planted).convert("L" if grey else "RGB")
        place = folder / EXPRESSIONS[manifest.labels[row]] / f"{number:05d}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        image.save(place)
        covered.append(where)
    return covered


def share_of_cells(covered: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Return how much of each cell is covered, (h, w) of 0–1."""
    mask = Image.fromarray((255 * covered).astype(np.uint8))
    return np.asarray(mask.resize(grid[::-1], Image.Resampling.BOX)) / 255


def report(name: str, shares: np.ndarray, distances: np.ndarray, radius: float) -> None:
    """Print how covered cells (more than half) are told from free ones (not at all) by their distances (n, P)."""
    covered, free = shares > 0.5, shares == 0
    auc = roc_auc_score(np.r_[np.ones(covered.sum()), np.zeros(free.sum())], np.r_[distances[covered], distances[free]])
    sys.stdout.write(
        f"{name:<12} AUC {auc:.3f}, flagged: {100 * (distances[covered] > radius).mean():.0f} % of covered patches, "
        f"{100 * (distances[free] > radius).mean():.0f} % of free ones\n"
    )


def to_picture(image: torch.Tensor, plan: ViewPlan) -> Pixels:
    """Return a normalised image (3, S, S) as (S, S, 3) uint8."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (plan.mean, plan.std))
    return (255 * (image * std + mean)).clamp(0, 255).round().byte().permute(1, 2, 0).numpy()


def draw_page(columns: list[tuple[Pixels, Pixels, np.ndarray, Pixels]], title: str) -> Figure:
    """Draw one column per face: clean, occluded, flagged cells in red over it, refilled."""
    figure = Figure(figsize=(1.5 * len(columns) + 0.6, 7.0), layout="constrained")
    figure.suptitle(title, fontsize=10)
    grid = figure.subplots(4, len(columns), squeeze=False)
    for axes, column in zip(grid.T, columns, strict=True):
        clean, occluded, flagged, refilled = column
        size = len(occluded)
        for row, picture in zip(axes, (clean, occluded, occluded, refilled), strict=True):
            row.imshow(picture, extent=(0, size, size, 0))
            row.set_xticks([])
            row.set_yticks([])
        red = np.zeros((*flagged.shape, 4))
        red[flagged] = (1, 0, 0, 0.5)
        axes[2].imshow(red, extent=(0, size, size, 0))
    for row, name in zip(grid[:, 0], ("face", "planted", "flagged", "refilled"), strict=True):
        row.set_ylabel(name)
    return figure


def main() -> None:
    """Run the benchmark of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", choices=("ofer", "ofer_own"), default="ofer")
    parser.add_argument("--faces", type=Path, help="folder of EXPRESSION/images; default: synthetic faces")
    parser.add_argument("--count", type=int, default=700, help="synthetic faces to draw")
    parser.add_argument("--backbone", default="imagenet-lite0")
    parser.add_argument("--input-size", type=int, default=224, help="of the tower")
    parser.add_argument("--image-size", type=int, default=64, help="of the image branch")
    parser.add_argument("--mae-epochs", type=int, default=Recipe.mae_epochs)
    parser.add_argument("--detector-epochs", type=int, default=Recipe.detector_epochs)
    parser.add_argument("--quantile", type=float, default=Recipe.quantile)
    parser.add_argument("--tests", type=int, default=150, help="test faces to plant things on")
    parser.add_argument("--output", type=Path, default=Path("occlusions.png"))
    settings = parser.parse_args()
    torch.set_num_threads(1)
    with TemporaryDirectory() as scratch:
        run(settings, Path(scratch))


def run(settings: argparse.Namespace, scratch: Path) -> None:
    """Prepare the method, plant, evaluate and draw."""
    if settings.faces:
        listing, scale, eyes = DATASETS["folder"](UPath(settings.faces)), 0.36, 0.4
    else:
        write(scratch, "studio", settings.count)
        listing, scale, eyes = DATASETS["synthetic"](UPath(scratch / "studio")), 0.29, 0.485
    manifest = index_files("faces", listing).manifest
    test = random_generator(0, "tests").permutation(manifest.rows("test"))[: settings.tests]
    covered = plant_all(manifest, test, scratch / "planted", scale, eyes)
    planted = index_files("planted", DATASETS["folder"](UPath(scratch / "planted"))).manifest
    order = np.argsort([int(Path(name).stem) for name in planted.sample_ids])  # row of the n-th planted face

    tower = load_backbone(settings.backbone, input_size=settings.input_size)
    plan = ViewPlan("ofer", 0, 2, "bilinear", tower.facts.mean, tower.facts.std)
    assert tower.facts.map_shape is not None
    method_type = METHODS[settings.method]
    recipe = Recipe(
        mae_epochs=settings.mae_epochs, detector_epochs=settings.detector_epochs, quantile=settings.quantile
    )
    torch.manual_seed(0)
    method = method_type(
        recipe, Inputs(tower.facts.map_shape[0], image_size=settings.image_size, grid=tower.facts.map_shape[1:])
    )
    assert isinstance(method, Ofer)
    method.eval()

    def dataset_of(faces: Manifest) -> FaceDataset:
        features = Stored(Embedder(tower, faces, plan, "cpu", maps=True, dtype="float32")) if "map" in needs else None
        return FaceDataset(faces, plan, needs, settings.image_size, features)

    needs = method.needs
    start = time.perf_counter()
    prepare(method, dataset_of(manifest), manifest.rows("train"), 0, CPU)
    sys.stdout.write(
        f"{settings.method}: prepared on {len(manifest.rows('train'))} faces in {time.perf_counter() - start:.0f} s, "
        f"{method.grid[0]} × {method.grid[1]} patches\n"
    )
    clean_parts = list(
        dataset_of(manifest).load(np.split(test, range(PREDICTION_BATCH, len(test), PREDICTION_BATCH)), 0, CPU)
    )
    occluded_parts = list(
        dataset_of(planted).load(np.split(order, range(PREDICTION_BATCH, len(order), PREDICTION_BATCH)), 0, CPU)
    )
    evaluate(method, clean_parts, occluded_parts, covered, plan, settings)


class Stored:
    """Keeps the clean features of every row once they were computed, as a feature store does."""

    def __init__(self, embedder: Embedder) -> None:
        self.embedder, self.kept = embedder, dict[int, np.ndarray]()

    def read(self, rows: np.ndarray, view: int) -> dict[str, np.ndarray]:
        """Return the maps (n, C, H, W) of some rows."""
        assert view == 0
        missing = np.array([row for row in rows if int(row) not in self.kept])
        if len(missing):
            self.kept |= dict(zip(missing.tolist(), self.embedder.read(missing, view)["map"], strict=True))
        return {"map": np.stack([self.kept[int(row)] for row in rows])}


@torch.no_grad()
def evaluate(
    method: Ofer,
    clean: list[Batch],
    occluded: list[Batch],
    covered: list[np.ndarray],
    plan: ViewPlan,
    settings: argparse.Namespace,
) -> None:
    """Print the numbers and draw the page."""
    radius = float(method.detector.radius)
    shares = np.stack([share_of_cells(mask, method.grid) for mask in covered]).reshape(len(covered), -1)
    distances = np.concatenate([method.detector(method.read_latents(batch)).numpy() for batch in occluded])
    plain = np.concatenate(
        [method.detector.standardise(method.read_latents(batch)).square().sum(dim=2).numpy() for batch in occluded]
    )
    report("all", shares, distances, radius)
    for number, thing in enumerate(THINGS):
        report(thing, shares[number :: len(THINGS)], distances[number :: len(THINGS)], radius)
    report("untrained", shares, plain, float("inf"))
    untouched = np.concatenate([method.detector.flag(method.read_latents(batch)).numpy() for batch in clean])
    sys.stdout.write(
        f"clean faces: {100 * untouched.mean():.1f} % of their patches flagged, "
        f"{100 * (~untouched.any(axis=1)).mean():.0f} % of them left as they are\n"
    )
    image, _, flagged = method.restore(occluded[0])
    columns = [
        (
            to_picture(clean[0]["image"][face], plan),
            to_picture(occluded[0]["image"][face], plan),
            flagged[face].reshape(method.grid).numpy(),
            to_picture(image[face], plan),
        )
        for face in range(min(SHOWN, len(image)))
    ]
    title = f"{settings.method}, {method.grid[0]} × {method.grid[1]} patches"
    draw_page(columns, title).savefig(settings.output, dpi=110)


if __name__ == "__main__":
    main()
