"""CAFE in one file that reads top to bottom: from the feature store to its accuracy on data sets it never saw.

"Generalizable Facial Expression Recognition", ECCV 2024. Copy this file to try an idea: nothing of the method is hidden, and
of the engine it needs the feature store alone. As it stands its weights and probabilities are those of `cafe train`, bit for
bit:

    cafe data index folder ~/faces/news --name news
    cafe data index folder ~/faces/cinema --name cinema
    cafe extract news --backbone face-resnet --views 9
    cafe extract cinema --backbone face-resnet
    python examples/train_cafe.py news --targets news,cinema --epochs 8 --image-size 64

    cafe train --source news --method cafe --epochs 8 --image-size 64     # the same, resumable, on a cluster, tracked
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import resnet18
from upath import UPath

import cafe
from cafe.data.manifest import Manifest
from cafe.errors import UserError
from cafe.randomness import random_generator
from cafe.towers.weights import write_tensors
from cafe.views.drawing import ViewPlan
from cafe.views.pixels import normalise

# ---------------------------------------------------------------------------------------------------------------------
# The published recipe (supplement and released script); what a run changes of it is an argument below.
EPOCHS = 60
BATCH_SIZE = 32
LEARNING_RATE = 2e-4  # Adam
WEIGHT_DECAY = 1e-4
GAMMA = 0.9  # the learning rate is multiplied by it after every epoch
SEPARATION = 1.5  # λ of Eq. 9
DIVERSE = 5.0  # β of Eq. 9
DROPPED = 10 / 73  # share of a group's channels that separation drops: 10 of 73
IMAGE_SIZE = 224  # pixels, side of the image branch's input
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # the image branch sees ImageNet's statistics
PREDICTION_BATCH = 64
# ---------------------------------------------------------------------------------------------------------------------


class Faces:
    """The faces of a manifest with the frozen features of its store: a batch is a picture and the features of one view.

    View 0 is clean; view v of a face is the same for the tower, which saw it once, and for the image branch, which is shown
    it again here: a pure function of (seed, sample_id, v).
    """

    def __init__(self, name: str, workspace: str, image_size: int, store: str | None = None) -> None:
        self.manifest: Manifest = cafe.load_manifest(name, workspace)
        self.store = cafe.load_store(name, workspace, store)
        self.plan: ViewPlan = replace(self.store.info.key.view_plan, mean=MEAN, std=STD)
        self.image_size = image_size
        self.features: dict[int, np.ndarray] = {}  # by view, (N, C) float16

    def rows(self, split: str) -> np.ndarray:
        """Return the rows of a split whose picture could be read when features were extracted."""
        rows = self.manifest.rows(split)
        return np.asarray(rows[self.store.receipts.valid()[rows]])

    def load(self, rows: np.ndarray, view: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return images (n, 3, S, S), frozen features (n, C) and labels (n,) of one view of some rows."""
        if view not in self.features:
            self.features = {view: self.store.read_view("pooled", view)}  # checked against the receipts
        ids = self.manifest.sample_ids
        views = [self.plan.render(self.manifest.read_face(row), ids[row], view, self.image_size) for row in rows]
        pixels = torch.from_numpy(np.stack([picture for picture, _ in views]))
        erased = torch.tensor([box for _, box in views])  # (n, 4): top, left, height, width of what is erased
        images = normalise(pixels, erased, MEAN, STD).contiguous(memory_format=torch.channels_last)
        features = torch.from_numpy(self.features[view][rows]).float()
        return images, features, torch.from_numpy(self.manifest.labels[rows])


class Cafe(nn.Module):
    """Eq. 2: F~ = sigmoid(image branch) * frozen features; one linear layer classifies F~."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        network = resnet18()
        for module in network.modules():  # drawn as the released script does, by PyTorch's default for a single layer
            if isinstance(module, nn.Conv2d):
                module.reset_parameters()
        network.fc = nn.Identity()
        self.branch = network
        self.classifier = nn.Linear(width, classes)
        self.width, self.classes = width, classes

    def forward(self, images: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits (n, K) and masked features (n, C) of images (n, 3, S, S) and frozen features (n, C)."""
        masked = features * fit_channels(self.branch(images), self.width).sigmoid()
        return self.classifier(masked), masked

    def losses(self, logits: Tensor, masked: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Return Eq. 9: classification + λ separation + β diverse."""
        size = self.width // self.classes  # channels of a class's group
        keep = torch.ones(self.width)
        for group in range(self.classes):  # the channels left over belong to the last group's draw (released script)
            start = group * size
            end = start + size if group < self.classes - 1 else self.width
            keep[start + torch.randperm(end - start, generator=generator)[: round(DROPPED * size)]] = 0
        classification = functional.cross_entropy(logits, labels)  # Eq. 3
        separation = functional.cross_entropy(self.peaks(masked * keep), labels)  # Eq. 4–6
        diverse = 1 - self.peaks(masked).mean() / size  # Eq. 7 and 8
        return classification + SEPARATION * separation + DIVERSE * diverse

    def peaks(self, masked: Tensor) -> Tensor:
        """Return the largest channel of each class's group, (n, C) → (n, K); the remainder of C / K is left out."""
        size = self.width // self.classes
        return masked[:, : self.classes * size].reshape(-1, self.classes, size).amax(dim=2)


def fit_channels(values: Tensor, width: int) -> Tensor:
    """Fit the branch's channels (n, 512) to those of the features (n, C): averaged down or interpolated up."""
    if values.shape[1] >= width:
        return functional.adaptive_avg_pool1d(values, width)
    return functional.interpolate(values[:, None], size=width, mode="linear", align_corners=False)[:, 0]


def draw_batches(rows: np.ndarray, seed: int, epoch: int) -> list[np.ndarray]:
    """Return the rows of an epoch in its random order, batch by batch; no batch norm learns from a single face."""
    order = random_generator(seed, "order", epoch).permutation(rows)
    batches = np.split(order, range(BATCH_SIZE, len(order), BATCH_SIZE))
    return batches if len(batches[-1]) > 1 else batches[:-1]


def train(faces: Faces, epochs: int, seed: int) -> Cafe:
    """Train CAFE on the training faces of a source; view e of every face is what epoch e sees."""
    torch.manual_seed(seed)
    model = Cafe(faces.store.info.width, len(faces.manifest.classes)).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
    rows = faces.rows("train")
    for epoch in range(1, epochs + 1):
        model.train()
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * GAMMA ** (epoch - 1)
        right = 0
        for step, batch in enumerate(draw_batches(rows, seed, epoch)):
            images, features, labels = faces.load(batch, faces.plan.view_of(epoch))
            step_seed = int(random_generator(seed, "step", epoch, step).integers(2**62))
            logits, masked = model(images, features)
            loss = model.losses(logits, masked, labels, torch.Generator().manual_seed(step_seed))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            right += int((logits.argmax(dim=1) == labels).sum())
        print(f"epoch {epoch}: {100 * right / len(rows):.1f} % of the training faces right, loss {loss.item():.3f}")
    return model


@torch.no_grad()
def predict(model: Cafe, faces: Faces, rows: np.ndarray) -> Iterator[Tensor]:
    """Yield the class probabilities (n, K) of the clean views of some rows, batch by batch."""
    model.eval()
    for batch in np.split(rows, range(PREDICTION_BATCH, len(rows), PREDICTION_BATCH)):
        images, features, _ = faces.load(batch, 0)
        yield model(images, features)[0].softmax(dim=1)


def main() -> None:
    """Train on the training faces of one manifest of a workspace, then print the accuracy on the faces of several."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument(
        "source", help="manifest to train on, with features of as many views as there are epochs, and one"
    )
    parser.add_argument("--targets", required=True, help="manifests to evaluate on, comma-separated")
    parser.add_argument("--store", help="folder of the features of the source, where it has several")
    parser.add_argument("--workspace", default="work")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--image-size", type=int, default=IMAGE_SIZE)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", help="file for the weights, .safetensors")
    chosen = parser.parse_args()
    source = Faces(chosen.source, chosen.workspace, chosen.image_size, chosen.store)
    others = set(chosen.targets.split(",")) - {chosen.source}
    known = {name: Faces(name, chosen.workspace, chosen.image_size) for name in others} | {chosen.source: source}
    targets = {name: known[name] for name in chosen.targets.split(",")}
    for name, target in targets.items():
        if target.manifest.classes != source.manifest.classes:
            raise UserError(f"{name!r} has other classes than {chosen.source!r}: evaluate on sets with the same ones.")
    model = train(source, chosen.epochs, chosen.seed)
    for name, target in targets.items():
        # What came without splits was split for whoever trains on it; to others all of its faces are unseen.
        rows = target.rows("all" if target.manifest.parted and name != chosen.source else "test")
        probabilities = torch.cat(list(predict(model, target, rows))).numpy()
        accuracy = (probabilities.argmax(axis=1) == target.manifest.labels[rows]).mean()
        print(f"{name}: {100 * accuracy:.1f} % of {len(rows)} faces right")
    if chosen.output:
        write_tensors(UPath(chosen.output), model.state_dict())


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
