"""What the folders above a picture say: its split, what it shows, whose face it is, or nothing.

People wrap sets in folders, part them into splits, and put persons above or below expressions. A level of folders is known
by the names on it; where two levels could be the expressions, nobody is asked to guess.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from cafe.data.expressions import OTHERS, find_class, normalise_name
from cafe.data.indexing import LabelledFile
from cafe.data.labels import parse_number
from cafe.data.layouts import SPLIT_NAMES
from cafe.errors import UserError
from cafe.spool import Spool

PERSONS = 5  # as many folders at least that recur below several expressions are taken for persons


def list_levels(path: str) -> tuple[str, ...]:
    """Return the folders of a path, from outside, without those named after splits."""
    return tuple(folder for folder in path.split("/")[:-1] if folder.casefold() not in SPLIT_NAMES)


@dataclass(frozen=True)
class Levels:
    """The folders of some `pictures`, of which some levels are named after `classes`, each in any spelling."""

    root: object
    pictures: Sequence[str]
    classes: tuple[str, ...]

    @cached_property
    def names(self) -> list[Counter[str]]:
        """The names of the folders on every level, with the pictures below each."""
        found: list[Counter[str]] = []
        for path in self.pictures:
            for level, name in enumerate(list_levels(path)):
                if level == len(found):
                    found.append(Counter())
                found[level][name] += 1
        return found

    @cached_property
    def several(self) -> list[int]:
        """The levels on which folders differ: others wrap."""
        return [level for level, names in enumerate(self.names) if len(names) > 1]

    @cached_property
    def good(self) -> list[int]:
        """The levels whose folders are named after several classes."""
        return [level for level, names in enumerate(self._known) if len({*names.values()} - {None}) > 1]

    @cached_property
    def named(self) -> int | None:
        """The level of folders named after classes, None where there is none; raise `UserError` where there are several."""
        known, good = self._known, self.good
        if len(good) > 1:
            raise self._refuse("are named after expressions on several levels", good)
        alone = [level for level, names in enumerate(known) if any(names.values())]
        if good or len(alone) != 1 or (set(self.several) - set(alone) and None in known[alone[0]].values()):
            return good[0] if good else None
        return alone[0]

    @cached_property
    def numbered(self) -> int | None:
        """The level of numbered folders, None where there is none; raise `UserError` where there are several."""
        numbers = [level for level in self.several if all(parse_number(name) is not None for name in self.names[level])]
        if len(numbers) > 1:
            raise self._refuse("are numbered on several levels", numbers)
        return numbers[0] if numbers else None

    def expression(self, own: bool) -> int | None:
        """Return the level that says what pictures show, None where they lie in no folders but those of splits.

        With `own` the names may be any. Raises `UserError` where more than one level could be it.
        """
        if self.named is not None:
            return self.named
        if own and len(self.several) > 1:
            raise self._refuse("differ on several levels", self.several)
        if not own and self.numbered is not None:
            return self.numbered
        if self.several:
            return self.several[0]
        return 0 if own and self.names else None

    def group(self, expression: int) -> int | None:
        """Return the level of persons, films or the like, None for none.

        It is the outermost level above the expressions on which folders differ, or else one below them with at least
        `PERSONS` names, of which at least half recur in several expressions: fewer may be intensities, angles or years.
        """
        levels = [level for level in self.several if level != expression]
        return next((level for level in levels if self._recurs(level, expression)), None)

    def name_folders(self) -> Iterator[str | None]:
        """Yield the folder of every picture on the outermost level that differs and is not that of the expressions.

        Raises `UserError` where there is none.
        """
        levels = [level for level in self.several if level != self.named]
        if not levels:
            raise UserError(
                f"The pictures of {self.root} lie in no folders but those of splits and expressions: name their groups with "
                "--group-pattern, or leave --group-by folder out."
            )
        folders = (list_levels(path) for path in self.pictures)
        return (names[levels[0]] if len(names) > levels[0] else None for names in folders)

    def _recurs(self, level: int, expression: int) -> bool:
        """Whether a level is above the expressions, or at least half of its names are below several of them."""
        if level < expression:
            return True
        if len(self.names[level]) < PERSONS:
            return False
        below: dict[str, set[str]] = {}
        for path in self.pictures:
            folders = list_levels(path)
            if level < len(folders):
                below.setdefault(folders[level], set()).add(folders[expression])
        return 2 * sum(len(expressions) > 1 for expressions in below.values()) >= len(below)

    def contradict(self, files: Iterable[LabelledFile]) -> Sequence[LabelledFile]:
        """Return the faces that lie in a folder of another class than their label says."""
        if len(self.good) != 1:
            return []
        (level,) = self.good
        return Spool(
            file
            for file in files
            if len(folders := list_levels(file.path)) > level
            and (shown := find_class(folders[level], self.classes)) is not None
            and find_class(file.expression, self.classes) not in (None, shown)
        )

    @cached_property
    def _known(self) -> list[dict[str, str | None]]:
        return [{name: self._find(name) for name in names} for names in self.names]

    def _find(self, name: str) -> str | None:
        return find_class(name, self.classes) or (normalise_name(name) if normalise_name(name) in OTHERS else None)

    def _refuse(self, fault: str, levels: Sequence[int]) -> UserError:
        example = next(path for path in self.pictures if len(list_levels(path)) > max(levels))
        places = " and ".join(repr(list_levels(example)[level]) for level in levels)
        return UserError(
            f"The folders of {self.root} {fault}, such as {places} of {example}: name the classes with --expressions "
            "NAME,NAME,…, give the folder whose folders are the expressions, or a table of path and label."
        )
