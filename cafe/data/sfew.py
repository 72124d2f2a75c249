"""SFEW 2.0 (Dhall et al., ICMI 2015): film stills, as its authors give them out and as copies of it are shared.

The aligned 143×181 faces are read. The labels of the test set were never published, so that there are two splits only.
"""

from __future__ import annotations

from collections import Counter

from upath import UPath

from cafe.data.counts import SFEW
from cafe.data.expressions import parse_expression
from cafe.data.indexing import LabelledFile, Listing
from cafe.data.layouts import OTHER_EXPRESSIONS, Tree, folder_of, list_by_folder, read_records
from cafe.errors import UserError

SPLITS = {
    "train_aligned_faces": "train",
    "val_aligned_faces": "val",
    "val_aligned_faces_new": "val",
    "test_aligned_faces": "",
}
LABEL_FILE = "sfew_2.0_labels.csv"
IMAGE_FOLDER = "sfew2.0_images"


def read_sfew(root: UPath) -> Listing:
    """List the aligned faces of SFEW 2.0 by the names of their expressions.

    official: Train/Train_Aligned_Faces/EXPRESSION, Val/Val_Aligned_Faces_new/Val_Aligned_Faces/EXPRESSION.
    shared copy: sfew_2.0_labels.csv (image_name,label,emotion,original_split) and sfew2.0_images.
    """
    tree = Tree.open(root)
    if table := tree.find_one(LABEL_FILE):
        return _read_shared(tree.below(folder_of(table)))
    wanted = "aligned faces of SFEW (Train/Train_Aligned_Faces/Angry, …), nor sfew_2.0_labels.csv"
    tree, files, dropped = list_by_folder(tree, SPLITS, wanted)
    layout = "official SFEW 2.0: {Train,Val}_Aligned_Faces/EXPRESSION"
    ignored = len(tree.images) - len(files) - dropped.total()
    return Listing(tree.root, files, layout, "sfew", ignored, dropped, packed=tree.packed, expected=SFEW)


def _read_shared(tree: Tree) -> Listing:
    table = tree.get(LABEL_FILE)
    assert table is not None
    if not any(path.casefold().startswith(f"{IMAGE_FOLDER}/") for path in tree.images):
        raise tree.lack(f"pictures in {IMAGE_FOLDER} beside {table}", "unpack them there")
    files, rejected, dropped = [], [], Counter[str]()
    for number, row in read_records(tree.root / table, ("image_name", "emotion", "original_split")):
        where, name, emotion = f"{table}, line {number}", row["image_name"], row["emotion"].casefold()
        # The copies name the official folder here: Train_Aligned_Faces.
        split = next(
            (split for split in SPLITS.values() if split and row["original_split"].casefold().startswith(split)), ""
        )
        path = tree.get(f"{IMAGE_FOLDER}/{name}")
        if not (name and split and emotion):
            rejected.append(
                (where, "has no image_name, no emotion, or an original_split that is neither Train nor Val")
            )
        elif emotion in OTHER_EXPRESSIONS:
            dropped[emotion] += 1
        elif path is None:
            rejected.append((f"{IMAGE_FOLDER}/{name}", "file not found"))
        else:
            try:
                files.append(LabelledFile(path, parse_expression(emotion), split))
            except UserError as error:
                rejected.append((where, str(error)))
    ignored = len(tree.images) - len(files)
    layout = f"shared copy of SFEW 2.0: {LABEL_FILE}, {IMAGE_FOLDER}"
    return Listing(tree.root, files, layout, "sfew", ignored, dropped, rejected, tree.packed, SFEW)
