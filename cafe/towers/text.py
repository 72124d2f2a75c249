"""Text towers: the embeddings that models of open_clip give to texts, in the space of their frozen image features.

Only zero-shot recognition needs them; everything else loads the image tower alone, which is faster.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from cafe.errors import UserError
from cafe.towers.building import load_tensors, quiet
from cafe.towers.names import END, BackboneSpec, open_clip_name, parse_backbone
from cafe.towers.weights import read_weights


def find_text_tower(name: str) -> BackboneSpec:
    """Return the model a backbone's name stands for; raise `UserError` when it has no text tower."""
    spec = parse_backbone(name)
    if spec.library != "open_clip" or spec.layer != END:
        raise UserError(
            f"The backbone '{name}' has no text tower, which zero-shot recognition needs: extract the features of "
            "clip-vit-b32 or of another tower of open_clip, without #LAYER."
        )
    return spec


def embed_texts(name: str, texts: Sequence[str]) -> tuple[Tensor, float]:
    """Return L2-normalised embeddings (n, C) of texts, and the model's own scale of cosines to logits (100 in CLIP).

    Raises UserError for a backbone without a text tower, or when its weights or its vocabulary cannot be had.
    """
    import open_clip
    from open_clip.convert import convert_state_dict

    spec = find_text_tower(name)
    tensors = read_weights(name, spec)
    with quiet():
        model = open_clip.create_model(open_clip_name(spec), load_weights=False, pretrained_text=False)
        tensors = convert_state_dict(model, tensors)
        load_tensors(name, model, {key: tensors[key] for key in model.state_dict() if key in tensors})
        try:
            tokens = open_clip.get_tokenizer(open_clip_name(spec))(list(texts))
        except (OSError, ImportError) as error:
            raise UserError(
                f"Cannot get the vocabulary of '{name}' ({error}): use a model of open_clip that needs none from a hub, "
                "such as clip-vit-b32."
            ) from error
    with torch.no_grad():
        try:
            embeddings = model.eval().encode_text(tokens)
        except IndexError as error:
            raise UserError(
                f"The text tower of '{name}' knows fewer words than open_clip's vocabulary for it: correct vocab_size."
            ) from error
        return functional.normalize(embeddings.float(), dim=1), float(model.logit_scale.exp())
