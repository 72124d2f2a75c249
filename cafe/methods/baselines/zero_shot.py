"""Zero-shot: the expression whose description is closest to the frozen features; nothing is trained.

"Learning Transferable Visual Models From Natural Language Supervision" (CLIP), ICML 2021: prompts of several wordings, their
normalised embeddings averaged and normalised again for each class, compared with the image's by cosine (Sec. 3.1.4). The
wordings are this project's own, since CLIP publishes none for expressions: for other classes than the eight they are made of
the class's name, and any can be given.

The features are those every method shares, so the tower sees faces with the pixel statistics of the store: extract with
`--normalisation tower` to give it its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from cafe.errors import UserError, unknown
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
    "contempt": "contemptuous",
}
BLANKS = str.maketrans("_-", "  ")  # what a class's name has for blanks


@dataclass(frozen=True)
class Recipe(method.Recipe):
    """Nothing is trained."""

    epochs: int = 0
    wordings: str = ""  # what fills the prompts for some classes, as "pain:in pain,drowsy:drowsy"; others as in WORDS

    def __post_init__(self) -> None:
        """Raise `UserError` for wordings that cannot be read."""
        super().__post_init__()
        parse_wordings(self.wordings)


class ZeroShot(Method):
    """Cosines between the frozen features and the mean embedding of every expression's prompts."""

    needs = frozenset({"features", "tower"})
    trained = False
    recipe_type = Recipe
    recipe: Recipe
    classifier: Tensor  # (K, C): unit vectors times the tower's own scale

    def __init__(self, recipe: Recipe, inputs: Inputs) -> None:
        super().__init__(recipe, inputs)
        assert inputs.width is not None
        self.prompts = write_prompts(inputs.classes, parse_wordings(recipe.wordings))
        self.register_buffer("classifier", torch.zeros(len(inputs.classes), inputs.width))

    @classmethod
    def check(cls, inputs: Inputs) -> None:
        """Raise `UserError` for a tower without a text tower."""
        assert inputs.backbone is not None
        find_text_tower(inputs.backbone)

    def fit(self, batches: Iterable[Batch]) -> None:
        """Embed the prompts; the faces play no part."""
        assert self.inputs.backbone is not None
        embeddings, scale = embed_texts(self.inputs.backbone, self.prompts)
        means = embeddings.unflatten(0, (len(self.classifier), -1)).mean(dim=1)
        self.classifier.copy_(scale * functional.normalize(means, dim=1))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return logits (N, K)."""
        return {"logits": functional.linear(functional.normalize(batch["features"], dim=1), self.classifier)}


def parse_wordings(text: str) -> dict[str, str]:
    """Return {class: wording} of a text such as `pain:in pain,drowsy:drowsy`; raise `UserError` for any other form."""
    wordings: dict[str, str] = {}
    for entry in filter(None, text.split(",")):
        name, colon, wording = (part.strip() for part in entry.partition(":"))
        if not (name and colon and wording) or name in wordings:
            raise UserError(
                f"Cannot read {entry!r} of the setting wordings of zero_shot: write CLASS:WORDING once for each class, with "
                "commas between them, e.g. wordings=pain:in pain,drowsy:drowsy."
            )
        wordings[name] = wording
    return wordings


def write_prompts(classes: Sequence[str], wordings: Mapping[str, str]) -> list[str]:
    """Return every template filled with every class, class by class; raise `UserError` for a wording of no class."""
    for name in wordings:
        if name not in classes:
            raise unknown("class in the wordings of zero_shot", name, classes)
    words = [wordings.get(name) or WORDS.get(name) or name.translate(BLANKS) for name in classes]
    return [template.format(word) for word in words for template in TEMPLATES]
