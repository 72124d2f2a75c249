"""Class sets: which expressions a data set has, in which order, and the spellings by which data sets name them.

The seven basic expressions are the default. A manifest may have any other class set; whatever is trained on it takes the
number, order and names of its classes from there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from cafe.errors import UserError

EXPRESSIONS = ("surprise", "fear", "disgust", "happiness", "sadness", "anger", "neutral")
CONTEMPT = "contempt"
EIGHT = (*EXPRESSIONS, CONTEMPT)  # as FERPlus and AffectNet label faces
OWN = "own"  # what asks for the names that a set brings along
COUNTED = {len(EXPRESSIONS): EXPRESSIONS, len(EIGHT): EIGHT}  # class sets that their number of classes names
MOST = 127  # classes: a label is a signed byte in a manifest's file

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
    "contemptuous": CONTEMPT,
}
OTHERS = frozenset({"unknown", "nf", "none", "uncertain", "no-face", "no face"})  # say that there is no expression
AROUND, DIGITS = "_-. ", "0123456789"  # that play no part before and behind a name
RESERVED = ("all", "mean", "overall")  # what tables call the sum and the means over classes


@dataclass(frozen=True)
class ClassChoice:
    """The class set a data set is read with: `classes` in order, None for its own names; those of `skip` are left out."""

    classes: tuple[str, ...] | None = EXPRESSIONS
    skip: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str | None, skip: Iterable[str] = ()) -> ClassChoice:
        """Read a choice: `7`, `8`, `own` or names with commas between them; raise `UserError` for anything else.

        `skip` are names or lists of names. What is skipped is no class any more.
        """
        left_out = tuple(
            dict.fromkeys(normalise_name(name) for entry in skip for name in entry.split(",") if name.strip())
        )
        if text is None or text.strip().isdecimal():
            count = int(text) if text else len(EXPRESSIONS)
            if count not in COUNTED:
                raise UserError(
                    f"--expressions {count} names no class set: give 7 (the basic ones), 8 (with contempt), own, or the "
                    "names of the classes with commas between them."
                )
            classes = COUNTED[count]
        elif text.strip().casefold() == OWN:
            return cls(None, left_out)
        else:
            classes = tuple(normalise_name(name) for name in text.split(","))
            check_classes(classes)
        kept = tuple(name for name in classes if not find_class(name, left_out))
        check_classes(kept)
        return cls(kept, left_out)


def normalise_name(name: str) -> str:
    """Return a label name in lower case without blanks around it."""
    return name.strip().casefold()


def order_classes(names: Iterable[str]) -> tuple[str, ...]:
    """Return names in the one order that tables and unions have them: the seven, contempt, then others by alphabet."""
    distinct = set(names)
    return (*(name for name in EIGHT if name in distinct), *sorted(distinct.difference(EIGHT)))


def check_classes(classes: Sequence[str]) -> None:
    """Raise `UserError` unless these names are a class set: two to 127 different ones, of the letters a–z and the like."""
    for name in classes:
        if not re.fullmatch(r"[a-z0-9]([a-z0-9 _-]*[a-z0-9])?", name):
            raise UserError(
                f"The class name {name!r} cannot be used: write it in the letters a–z, digits, and spaces, hyphens or "
                "underscores between them."
            )
        if name in RESERVED:
            raise UserError(f"A class cannot be called {name!r}, as tables call their sums and means so: rename it.")
    if repeated := [name for position, name in enumerate(classes) if name in classes[:position]]:
        raise UserError(f"The class {repeated[0]!r} is named twice: name every class once.")
    for position, name in enumerate(classes):
        same = [other for other in classes[:position] if ALIASES.get(other, other) == ALIASES.get(name, name)]
        if same:
            raise UserError(f"The classes {same[0]!r} and {name!r} are two spellings of one: name it once.")
    if len(classes) < 2:
        raise UserError(f"A class set has at least two classes, not {', '.join(classes) or 'none'}: name more of them.")
    if len(classes) > MOST:
        raise UserError(
            f"{len(classes)} classes are more than the {MOST} a manifest can hold ({', '.join(classes[:3])}, …): name those "
            "that are meant with --expressions NAME,NAME,…"
        )


@lru_cache(maxsize=4096)
def find_class(name: str, classes: tuple[str, ...]) -> str | None:
    """Return the class of a set that a label name in any known spelling means; None for no class, or more than one.

    Blanks, hyphens and underscores within a name are alike. Case, numbers and punctuation around it play no part, unless
    they tell two classes of the set apart; a number is never that of a class with another one.
    """
    for spell in (normalise_name, join_words, spell_name):
        meant = spell(name)
        if alike := [known for known in classes if meant and spell(known) == meant and _agree(name, known)]:
            return alike[0] if len({ALIASES.get(known, known) for known in alike}) == 1 else None
    return None


def _agree(name: str, known: str) -> bool:
    """Whether two names have the same number before and behind them, where both have one there: `au1` is never `au2`."""
    pairs = zip(_find_numbers(name), _find_numbers(known), strict=True)
    return all(own == other or not own or not other for own, other in pairs)


def _find_numbers(name: str) -> tuple[str, str]:
    bare = name.strip().strip(AROUND)
    before, behind = bare[: len(bare) - len(bare.lstrip(DIGITS))], bare[len(bare.rstrip(DIGITS)) :]
    return before.lstrip("0") or before[:1], behind.lstrip("0") or behind[:1]


def spell_name(name: str) -> str:
    """Return the one spelling that stands for all spellings of a label name that mean the same."""
    key = join_words(name.strip().strip(AROUND + DIGITS))
    return ALIASES.get(key, key)


def join_words(name: str) -> str:
    """Return a label name in lower case, its words with one blank between them."""
    return re.sub(r"[\s_-]+", " ", normalise_name(name))
