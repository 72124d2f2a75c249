"""ExpW, "Expression in the Wild" (Zhang, Luo, Loy and Tang, ICCV 2015): photographs with a box and a label for each face."""

from __future__ import annotations

from collections import Counter

from upath import UPath

from cafe.data.indexing import Listing
from cafe.data.labels import FER2013, decode_text, parse_number
from cafe.data.layouts import Tree
from cafe.data.packed.archives import read_content

LABEL_FILE = "label.lst"
CELLS = 8  # name, number of the face, top, left, right and bottom of its box, confidence of the box, label


def read_expw(root: UPath) -> Listing:
    """List the faces of ExpW: label.lst and the photographs that it names, wherever these lie.

    Its labels are 0–6, in the order of FER2013. A face is the box of its line; a photograph may show several. The set comes
    without splits and without persons; the faces of a photograph are a group.
    """
    tree = Tree.open(root)
    table = tree.find_one(LABEL_FILE)
    if table is None:
        raise tree.lack(f"{LABEL_FILE} of ExpW", "put it beside the folder of the photographs")
    pictures = _find_pictures(tree)
    found = tree.start("expw", f"ExpW: {table}, faces cut out of photographs", ())
    lines = [line.rsplit(maxsplit=CELLS - 1) for line in decode_text(read_content(tree.root / table)).splitlines()]
    faces = Counter(cells[0] for cells in lines if len(cells) == CELLS)
    for number, cells in enumerate(lines, start=1):
        where, texts = f"{table}, line {number}", (*cells[1:6], *cells[7:])
        values = [value for text in texts if (value := parse_number(text)) is not None]
        if len(cells) != CELLS or len(values) != len(texts) or not 0 <= values[-1] < len(FER2013):
            if cells:
                found.reject(where, "is not a file, the number of a face, four sides of a box and a label of 0–6")
            continue
        face, top, left, right, bottom, label = values
        path = pictures.get(cells[0].casefold())
        more = {"box": (left, top, right - left, bottom - top), "group": cells[0]}
        if path is not None and faces[cells[0]] > 1:
            more["sample"] = f"{path}@{face}"
        found.add_labelled(where, cells[0], path, FER2013[label], "", **more)
    found.ignored = len(pictures) - len({file.path for file in found.files})
    return found


def _find_pictures(tree: Tree) -> dict[str, str]:
    """Return the photographs by their names; raise `UserError` where one is there twice: boxes are of the original."""
    found: dict[str, str] = {}
    for path in [path for path in tree.images if "origin" in path.casefold().split("/")] or tree.images:
        name = path.rpartition("/")[2].casefold()
        tree.choose({path, found.setdefault(name, path)}, "a photograph of ExpW")
    return found
