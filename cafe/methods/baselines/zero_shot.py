"""Zero-shot: the expression whose description is closest to the frozen features; nothing is trained.

"Learning Transferable Visual Models From Natural Language Supervision" (CLIP), ICML 2021: prompts of several wordings, their
normalised embeddings averaged and normalised again for each class, compared with the image's by cosine (Sec. 3.1.4). The
wordings are this project's own, since CLIP publishes none for expressions.

The features are those every method shares, so the tower sees faces with the pixel statistics of the store: extract with
`--normalisation tower` to give it its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from cafe.data.expressions import EXPRESSIONS
from cafe.methods import method
from cafe.methods.method import Batch, Inputs, Method
from cafe.towers.text import embed_texts, find_text_tower

TEMPLATES = (
    "a photo of a {} face.",
    "a photo of a person who looks {}.",
    "a close-up photo of a {} person.",
    "a cropped photo of a face with a {} expression.",
    "a black and white photo of a {} face.",
    "a {} facial expression.",
)
WORDS = {
    "surprise": "surprised",
    "fear": "fearful",
    "disgust": "disgusted",
    "happiness": "happy",
    "sadness": "sad",
    "anger": "angry",
    "neutral": "neutral",
}


@dataclass(frozen=True)
class Recipe(method.Recipe):
    """Nothing is trained."""

    epochs: int = 0


class ZeroShot(Method):
    """Cosines between the frozen features and the mean embedding of every expression's prompts."""

    needs = frozenset({"features", "tower"})
    trained = False
    recipe_type = Recipe
    classifier: Tensor  # (7, C): unit vectors times the tower's own scale

    def __init__(self, recipe: method.Recipe, inputs: Inputs) -> None:
        super().__init__(recipe, inputs)
        assert inputs.width is not None
        self.register_buffer("classifier", torch.zeros(len(EXPRESSIONS), inputs.width))

    @classmethod
    def check(cls, inputs: Inputs) -> None:
        """Raise `UserError` for a tower without a text tower."""
        assert inputs.backbone is not None
        find_text_tower(inputs.backbone)

    def fit(self, batches: Iterable[Batch]) -> None:
        """Embed the prompts; the faces play no part."""
        assert self.inputs.backbone is not None
        embeddings, scale = embed_texts(self.inputs.backbone, write_prompts())
        means = embeddings.unflatten(0, (len(EXPRESSIONS), -1)).mean(dim=1)
        self.classifier.copy_(scale * functional.normalize(means, dim=1))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return logits (N, 7)."""
        return {"logits": functional.linear(functional.normalize(batch["features"], dim=1), self.classifier)}


def write_prompts() -> list[str]:
    """Return every template filled with every expression, expression by expression."""
    return [template.format(WORDS[expression]) for expression in EXPRESSIONS for template in TEMPLATES]
