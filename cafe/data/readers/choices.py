"""What people say of a set beside where it lies, and the set read by it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import repeat
from typing import Any

from cafe.data.expressions import EIGHT, ClassChoice
from cafe.data.indexing import OWN_KINDS, Listing
from cafe.data.labels import LabelMap
from cafe.data.readers import find_reader
from cafe.data.readers.levels import Levels
from cafe.data.readers.table import KEEP
from cafe.errors import UserError
from cafe.files import locate
from cafe.spool import Spool

TABLES_READ = ("folder", "table", "webdataset")  # kinds whose tables may have columns of any name


@dataclass(frozen=True)
class SetChoices:
    """The classes wanted, and what else may be said: each is refused for a kind of data set of which it says nothing.

    `pictures` is the folder that a table's paths are relative to, `columns` are ROLE=NAME, `label_order` and `labels` say
    what numbers and codes mean, `group_by` and `group_pattern` whose face a path shows, `split` where all faces belong.
    """

    classes: ClassChoice = field(default_factory=ClassChoice)
    ferplus_rule: str | None = None
    pictures: str | None = None
    columns: Sequence[str] = ()
    label_order: str | None = None
    labels: str | None = None
    group_by: str | None = None
    group_pattern: str | None = None
    split: str | None = None

    def read(self, kind: str, root: str) -> Listing:
        """List a data set as it was described; raise `UserError`."""
        read, meaning = find_reader(kind), self._find_meaning()
        for option, value, kinds in (
            ("ferplus-rule", self.ferplus_rule, ("ferplus",)),
            ("root", self.pictures, ("table",)),
            ("column", ", ".join(self.columns), TABLES_READ),
        ):
            if value and kind not in kinds:
                raise UserError(f"--{option} {value} has no meaning for {kind}: it is for {' and '.join(kinds)} alone.")
        listing = read(locate(root), **self._describe(kind, meaning))
        if meaning:
            listing = listing.translate(meaning)
        listing = self._group(listing).select(self.classes)
        if self.split:
            listing.put_into(self.split)
        return listing

    def _find_meaning(self) -> LabelMap | None:
        if self.label_order and self.labels:
            raise UserError(
                f"--label-order {self.label_order} and --labels {self.labels} both say what labels mean: give one of them."
            )
        if self.label_order:
            return LabelMap.parse(self.label_order)
        return LabelMap.load(locate(self.labels)) if self.labels else None

    def _describe(self, kind: str, meaning: LabelMap | None) -> dict[str, Any]:
        """Return what the reader of a kind takes beside the root."""
        said: dict[str, Any] = {"rule": self.ferplus_rule} if self.ferplus_rule else {}
        if self.pictures:
            said["root"] = locate(self.pictures)
        if self.columns:
            said["columns"] = _parse_columns(self.columns)
        if kind == "folder":
            said |= {"classes": self._names(meaning), "own": self.classes.classes is None}
        return said

    def _names(self, meaning: LabelMap | None) -> tuple[str, ...]:
        """The names by which folders of expressions are known, besides the eight."""
        codes = meaning.names if meaning and not meaning.numbered else ()
        return (*(self.classes.classes or ()), *self.classes.skip, *codes)

    def _group(self, listing: Listing) -> Listing:
        """Group the faces of a set of one's own by their paths, where that is wished."""
        if self.group_by and self.group_pattern:
            raise UserError("--group-by and --group-pattern both say what a group is: give one of them.")
        if (self.group_by or self.group_pattern) and listing.kind not in OWN_KINDS:
            raise UserError(
                f"--group-by and --group-pattern have no meaning for {listing.kind}, whose groups are known: they are for "
                f"{', '.join(OWN_KINDS)}."
            )
        if self.group_pattern:
            groups: Iterable[str | None] = (_match(self.group_pattern, file.path) for file in listing.files)
        elif self.group_by == "folder":
            paths = Spool(file.path for file in listing.files)
            groups = Levels(listing.root, paths, (*EIGHT, *self._names(None))).name_folders()
        elif self.group_by == "none":
            groups = repeat(None, len(listing.files))
        else:
            return listing
        files = (replace(file, group=group) for file, group in zip(listing.files, groups, strict=True))
        return replace(listing, files=Spool(files))


def _parse_columns(texts: Sequence[str]) -> dict[str, str]:
    """Return the columns by their roles, several to keep with commas."""
    columns: dict[str, str] = {}
    for text in texts:
        role, equals, name = (part.strip() for part in text.partition("="))
        if not equals:
            raise UserError(f"--column {text} names no column: write ROLE=NAME, such as label=emo.")
        columns[role] = f"{columns[role]},{name}" if role == KEEP and role in columns else name
    return columns


def _match(pattern: str, path: str) -> str | None:
    """Return what a pattern finds in a path, its first group where it has one; None where that is empty."""
    try:
        found = re.search(pattern, path)
    except re.error as error:
        raise UserError(
            f"--group-pattern {pattern} is no regular expression ({error}): write it as Python has them."
        ) from None
    if found is None:
        raise UserError(
            f"--group-pattern {pattern} does not match {path!r}: write it so that it matches every path, with an empty "
            "group for faces of nobody known."
        )
    return found[1 if found.re.groups else 0] or None
