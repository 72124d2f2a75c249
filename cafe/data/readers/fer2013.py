"""FER2013 (Goodfellow et al., 2013) with its own labels: the rows of fer2013.csv, or folders made from them.

FERPlus has other labels for the same pictures, so that neither is unseen by what was trained on the other.
"""

from __future__ import annotations

from upath import UPath

from cafe.data.indexing import Listing, read_expected
from cafe.data.labels import FER2013, parse_number
from cafe.data.layouts import SPLIT_NAMES, Tree, list_by_folder, read_records
from cafe.data.readers.ferplus import FOLDERS, PIXEL_TABLES, SIDE, parse_pixels


def read_fer2013(root: UPath) -> Listing:
    """List the faces of FER2013: of fer2013.csv or icml_face_data.csv, given or in a folder, or of {train,test}/EXPRESSION.

    The table's Usage is the split; in folders its two test sets are one.
    """
    if root.name.casefold() in PIXEL_TABLES:
        return _read_pixels(Tree(root.parent, [root.name]), root.name)
    tree = Tree.open(root)
    tables = [name for name in PIXEL_TABLES if tree.find(name)]
    if tables:
        return _read_pixels(tree, tree.choose(tree.find(tables[0]), tables[0]))
    layout, wanted = (
        "FER2013: {train,test}/EXPRESSION",
        "fer2013.csv, nor folders {train,test}/{angry,disgust,…} of FER2013",
    )
    return list_by_folder(tree, SPLIT_NAMES, "fer2013", layout, read_expected("fer2013 folders"), wanted)


def _read_pixels(tree: Tree, table: str) -> Listing:
    found = tree.start("fer2013", f"FER2013: {table}", read_expected("fer2013 fer2013.csv"))
    records = read_records(tree.root / table, ("emotion", "pixels", "Usage"))
    for position, (number, cells) in enumerate(records):
        folder, split = FOLDERS.get(cells["usage"].casefold(), ("", ""))
        label, pixels = parse_number(cells["emotion"]), parse_pixels(cells["pixels"])
        if label not in range(len(FER2013)) or label is None or not split:
            found.reject(f"{table}, line {number}", "has no emotion of 0–6 or no known Usage")
        elif pixels is None:
            found.reject(f"{table}, line {number}", f"does not hold {SIDE}×{SIDE} grey values", FER2013[label])
        else:
            path = f"{folder}/fer{position:07d}.png"
            found.add(path, FER2013[label], split, where=f"line {number}", pixels=pixels)
    return found
