"""The seven basic expressions in the order every file, table and network of this project uses.

This is the only place with label names; data sets spell them in many ways and all come through `parse_expression`.
"""

from __future__ import annotations

from cafe.errors import unknown

EXPRESSIONS = ("surprise", "fear", "disgust", "happiness", "sadness", "anger", "neutral")

ALIASES = {
    "surprised": "surprise",
    "suprise": "surprise",  # a common misspelling in distributed folders
    "afraid": "fear",
    "fearful": "fear",
    "scared": "fear",
    "disgusted": "disgust",
    "happy": "happiness",
    "joy": "happiness",
    "joyful": "happiness",
    "sad": "sadness",
    "angry": "anger",
    "natural": "neutral",
    "neutrality": "neutral",
}
OTHERS = frozenset({"contempt", "unknown", "nf", "none", "uncertain", "no-face", "no face"})  # labels that are not ours


def parse_expression(name: str) -> int:
    """Return the class index (0–6) of a label name in any known spelling; raise `UserError` naming all others."""
    key = name.strip().strip("_-. 0123456789").lower()
    key = ALIASES.get(key, key)
    if key not in EXPRESSIONS:
        raise unknown("expression", name, [*EXPRESSIONS, *ALIASES])
    return EXPRESSIONS.index(key)
