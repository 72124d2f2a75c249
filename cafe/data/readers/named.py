"""Sets whose file names tell the person, and two of them the expression too: CK+, JAFFE and KDEF.

None of them comes split; the pictures of a person are a group.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from upath import UPath

from cafe.data.indexing import Listing
from cafe.data.layouts import Tree

CODES = {
    "af": "fear", "an": "anger", "di": "disgust", "fe": "fear", "ha": "happiness", "ne": "neutral", "sa": "sadness",
    "su": "surprise",
}  # fmt: skip


@dataclass(frozen=True)
class Scheme:
    """How a set names its files: a `pattern` with the group `person`, and `code` where the name tells the expression."""

    about: str
    pattern: str
    example: str

    def match(self, path: str) -> re.Match[str] | None:
        """Match the name of a file, in any case."""
        return re.fullmatch(self.pattern, path.rpartition("/")[2], re.IGNORECASE)


SCHEMES = {
    # Lucey et al., CVPRW 2010, in the shared copy CK+48: the last frames of the sequences in folders by expression.
    "ckplus": Scheme("CK+", r"(?P<person>S\d{3})_\d{3}_\d{8}\.[a-z]+", "anger/S010_004_00000017.png"),
    # Lyons et al., FG 1998: KA.AN1.39.tiff is the first angry picture of KA.
    "jaffe": Scheme("JAFFE", r"(?P<person>[A-Z]{2})\.(?P<code>AN|DI|FE|HA|NE|SA|SU)\d+\.\d+\.[a-z]+", "KA.AN1.39.tiff"),
    # Lundqvist, Flykt and Öhman, 1998: session, sex and number of the person, expression, angle.
    "kdef": Scheme(
        "KDEF", r"[AB](?P<person>[FM]\d{2})(?P<code>AF|AN|DI|HA|NE|SA|SU)(S|HL|HR|FL|FR)\.[a-z]+", "AF01/AF01AFS.JPG"
    ),
}


def find_scheme(paths: Sequence[str]) -> str:
    """Return which set most of some pictures are named like, empty for none."""
    for name, scheme in SCHEMES.items():
        if 2 * sum(scheme.match(path) is not None for path in paths) > len(paths):
            return name
    return ""


def find_person(path: str, scheme: str) -> str | None:
    """Return the person whom a file name of a set tells, None where it is named otherwise."""
    match = SCHEMES[scheme].match(path)
    return match["person"].upper() if match else None


def _read(root: UPath, kind: str) -> Listing:
    tree, scheme = Tree.open(root), SCHEMES[kind]
    found = tree.start(kind, f"{scheme.about}: {scheme.example}", ())
    for path in tree.images:
        match = scheme.match(path)
        if match is None:
            found.reject(path, f"is not named as {scheme.about} names its files ({scheme.example})")
        elif code := match.groupdict().get("code"):
            found.add(path, CODES[code.casefold()], group=match["person"].upper())
        elif folder := path.rpartition("/")[0].rpartition("/")[2]:
            found.add(path, folder, group=match["person"].upper())
        else:
            found.reject(path, "lies in no folder that is named after an expression")
    if not found.files:
        raise tree.lack(
            f"pictures named as {scheme.about} names them ({scheme.example})", "give the folder that holds them"
        )
    return found


def read_ckplus(root: UPath) -> Listing:
    """List the last frames of CK+ by the names of their folders, as CK+48 has them; the person is a group."""
    return _read(root, "ckplus")


def read_jaffe(root: UPath) -> Listing:
    """List the pictures of JAFFE by what their names say was posed; the person is a group."""
    return _read(root, "jaffe")


def read_kdef(root: UPath) -> Listing:
    """List the pictures of KDEF, of all angles, by what their names say was posed; a person is a group in both sessions."""
    return _read(root, "kdef")
