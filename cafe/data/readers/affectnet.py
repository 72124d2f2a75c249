"""AffectNet (Mollahosseini, Hasani and Mahoor, 2017), the manually annotated part, in three layouts.

Its validation set is what everybody tests on, since the labels of the real test set were never published.
"""

from __future__ import annotations

import io
import re

import numpy as np
from upath import UPath

from cafe.data.expressions import EIGHT
from cafe.data.images import Box, UnreadableImageError, read_bytes
from cafe.data.indexing import Listing, read_expected
from cafe.data.labels import AFFECTNET, parse_number
from cafe.data.layouts import SPLIT_NAMES, Tree, list_by_folder, read_records
from cafe.threads import map_threads

MOST_BYTES = 4096  # of an annotation, one number with the header of its array
LISTS = {"training.csv": "train", "validation.csv": "val"}
PATH, EXPRESSION, BOX = "subDirectory_filePath", "expression", ("face_x", "face_y", "face_width", "face_height")
COLUMNS = (PATH, *BOX, "facial_landmarks", EXPRESSION, "valence", "arousal")  # of a list without a header
LISTED_IMAGE = "Manually_Annotated_Images/.*"
ARRAY_IMAGE = r"(train|val)_set/images/([^/]+)\.[^./]+"
WHOLE_IMAGE = r"()images/([^/]+)\.[^./]+"  # of a copy without folders of splits


def read_affectnet(root: UPath) -> Listing:
    """List the faces of AffectNet that show one of the eight expressions, contempt among them.

    lists: training.csv, validation.csv and Manually_Annotated_Images; a face is the box its row gives.
    arrays: {train_set,val_set}/images/ID.jpg and annotations/ID_exp.npy, or both without splits; a face is a whole picture.
    shared copy: {Train,Test}/EXPRESSION/*.jpg, by the names of the folders; a face is a whole picture. What such a copy
    holds is not known, so that its counts are compared with nothing.
    """
    tree = Tree.open(root)
    if tree.find(*LISTS):
        return _read_lists(tree)
    if any(path.casefold().endswith("_exp.npy") for path in tree.files):
        return _read_arrays(tree)
    layout = "shared copy of AffectNet: {Train,Test}/EXPRESSION, of which no counts are known"
    wanted = "training.csv of AffectNet, nor {train_set,val_set}/annotations, nor {Train,Test}/EXPRESSION"
    return list_by_folder(tree, SPLIT_NAMES, "affectnet", layout, (), wanted)


def _read_lists(tree: Tree) -> Listing:
    pictures = tree.find_home(LISTED_IMAGE, "the folder Manually_Annotated_Images")
    if pictures is None:
        raise tree.lack("folder Manually_Annotated_Images with the pictures", "unpack it beside the lists")
    layout = "AffectNet: training.csv, validation.csv, faces cut out of Manually_Annotated_Images"
    found = pictures.start("affectnet", layout, read_expected("affectnet"))
    for name, split in LISTS.items():
        table = tree.find_one(name)
        if table is None:
            raise tree.lack(name, "put it beside the other list")
        for number, row in read_records(tree.root / table, (PATH, EXPRESSION, *BOX), COLUMNS):
            where, file = f"{name}, line {number}", f"Manually_Annotated_Images/{row[PATH.casefold()]}"
            expression, box = _name_expression(row[EXPRESSION]), _parse_box(row)
            if expression is None:
                found.reject(where, f"has no expression of 0–10: {row[EXPRESSION]!r}")
            elif expression in EIGHT and box is None:
                found.reject(where, "has no face box", expression)
            else:
                found.add_labelled(where, file, pictures.get(file), expression, split, box=box)
    found.count_ignored(pictures.images)
    return found


def _read_arrays(tree: Tree) -> Listing:
    what, pattern = "the folders train_set and val_set", ARRAY_IMAGE
    home = tree.find_home(pattern, what)
    if home is None:
        what, pattern = "the folders images and annotations", WHOLE_IMAGE
        home = tree.find_home(pattern, what)
    if home is None:
        raise tree.lack("pictures {train_set,val_set}/images/ID.jpg beside the annotations", "unpack them there")
    matches = [match for path in home.images if (match := re.fullmatch(pattern, path, re.IGNORECASE))]

    def read_annotation(match: re.Match[str]) -> str | None:
        folder = f"{match[1]}_set/annotations" if match[1] else "annotations"
        annotation = home.get(f"{folder}/{match[2]}_exp.npy")
        return _read_expression(home.root / annotation) if annotation else None

    split = pattern == ARRAY_IMAGE
    layout = f"AffectNet: {'{train_set,val_set}/' * split}images and annotations{', without splits' * (not split)}"
    found = home.start("affectnet", layout, read_expected("affectnet") if split else ())
    for match, expression in zip(matches, map_threads(read_annotation, matches), strict=True):
        if expression is None:
            found.reject(match[0], "its annotation ID_exp.npy is missing or holds no expression of 0–10")
        else:
            found.add_labelled(match[0], match[0], match[0], expression, match[1].casefold())
    found.count_ignored(home.images)
    return found


def _read_expression(annotation: UPath) -> str | None:
    """Return the expression an array of one number holds, or of one text, as some releases have it."""
    try:
        content = read_bytes(annotation)
        if len(content) > MOST_BYTES:
            return None
        array = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
        return _name_expression(str(array.item()))
    except (UnreadableImageError, ValueError, EOFError, MemoryError):
        return None


def _name_expression(text: str) -> str | None:
    number = parse_number(text)
    return AFFECTNET[number] if number is not None and 0 <= number < len(AFFECTNET) else None


def _parse_box(row: dict[str, str]) -> Box | None:
    left, top, width, height = (parse_number(row[column]) for column in BOX)
    if left is None or top is None or not width or not height or width < 0 or height < 0:
        return None
    return left, top, width, height
