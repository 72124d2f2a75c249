"""Label names in any spelling, and what a class set may be."""

from __future__ import annotations

import pytest

from cafe.data.expressions import EIGHT, EXPRESSIONS, ClassChoice, check_classes, find_class
from cafe.errors import UserError


def test_the_order_is_the_published_one() -> None:
    assert EXPRESSIONS == ("surprise", "fear", "disgust", "happiness", "sadness", "anger", "neutral")


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("happiness", 3), ("Happy", 3), (" ANGRY ", 5), ("suprise", 0), ("Surprised", 0), ("fearful", 1), ("afraid", 1),
        ("Disgusted", 2), ("sad", 4), ("neutral", 6), ("3_sadness", 4),
    ],
)  # fmt: skip
def test_known_spellings(name: str, label: int) -> None:
    assert find_class(name, EXPRESSIONS) == EXPRESSIONS[label]


@pytest.mark.parametrize("name", ["contempt", "3", "", "happyish"])
def test_an_unknown_name_is_no_class(name: str) -> None:
    assert find_class(name, EXPRESSIONS) is None


@pytest.mark.parametrize(
    ("name", "classes", "found"),
    [
        ("7_Contemptuous", EIGHT, "contempt"),
        ("Happily_Surprised", ("happily surprised", "sadly angry"), "happily surprised"),
        ("Happiness", ("happy", "pain"), "happy"),  # a set may call a class by another of its names
        ("level 2", ("level 1", "level 2"), "level 2"),
        ("Level_2", ("level 1", "level 2"), "level 2"),
        ("AU 2", ("au1", "au2"), "au2"),
        ("2_AU", ("au1", "au2"), None),  # nobody is asked to guess
        ("level 2", ("level 1", "pain"), None),  # another level
        ("7_contempt", ("contemptuous", "contempt"), "contemptuous"),  # as classes to skip may be named
        ("02_pain", ("pain", "drowsy"), "pain"),
        ("joy", ("happiness", "joy"), "joy"),  # what stands there word for word goes first
    ],
)
def test_names_are_found_in_any_class_set(name: str, classes: tuple[str, ...], found: str | None) -> None:
    assert find_class(name, classes) == found


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (("Pain", "drowsy"), "The class name 'Pain' cannot be used: write it in the letters a–z"),
        (("pain", "a/b"), "The class name 'a/b' cannot be used"),
        (("pain", "all"), "A class cannot be called 'all'"),
        (("pain", "pain"), "The class 'pain' is named twice"),
        (("joy", "pain", "happy"), "The classes 'joy' and 'happy' are two spellings of one: name it once."),
        (("pain",), "at least two classes, not pain"),
        (tuple(f"c{number}" for number in range(128)), "128 classes are more than the 127 a manifest can hold"),
    ],
)
def test_what_is_no_class_set_is_one_sentence(classes: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_classes(classes)


@pytest.mark.parametrize(
    ("text", "skip", "classes"),
    [
        (None, (), EXPRESSIONS),
        ("7", (), EXPRESSIONS),
        ("8", (), EIGHT),
        ("8", ("Happy,fear",), ("surprise", "disgust", "sadness", "anger", "neutral", "contempt")),
        ("own", ("pain",), None),
        ("au1,au2,au3", ("AU_1",), ("au2", "au3")),
        (" Pain, drowsy,awake", (), ("pain", "drowsy", "awake")),
    ],
)
def test_a_choice_of_classes_is_read(text: str | None, skip: tuple[str, ...], classes: tuple[str, ...] | None) -> None:
    assert ClassChoice.parse(text, skip).classes == classes


@pytest.mark.parametrize("text", ["9", "0", "²", "pain", "pain,,drowsy"])
def test_a_choice_that_names_no_class_set_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"--expressions|class"):
        ClassChoice.parse(text)
