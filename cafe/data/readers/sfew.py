"""SFEW 2.0 (Dhall et al., ICMI 2015): film stills, as its authors distribute them and as copies of it are shared.

The aligned 143×181 faces are read; those of one film are a group where the names of the files still tell it. The labels of
the test set were never published, so that there are two splits only.
"""

from __future__ import annotations

from upath import UPath

from cafe.data.indexing import Listing, read_expected
from cafe.data.layouts import Tree, folder_of, list_by_folder, read_records

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
        return _read_shared(tree.below(folder_of(table)), table.rpartition("/")[2])
    layout = "official SFEW 2.0: {Train,Val}_Aligned_Faces/EXPRESSION"
    wanted = "aligned faces of SFEW (Train/Train_Aligned_Faces/Angry, …), nor sfew_2.0_labels.csv"
    found = list_by_folder(tree, SPLITS, "sfew", layout, read_expected("sfew"), wanted)
    found.group_by_name()  # AboutABoy_000152880_00000001.png is a still of "About a Boy": stills of one film are alike
    return found


def _read_shared(tree: Tree, table: str) -> Listing:
    if not any(path.casefold().startswith(f"{IMAGE_FOLDER}/") for path in tree.images):
        raise tree.lack(f"pictures in {IMAGE_FOLDER} beside {table}", "unpack them there")
    found = tree.start("sfew", f"shared copy of SFEW 2.0: {LABEL_FILE}, {IMAGE_FOLDER}", read_expected("sfew"))
    for number, row in read_records(tree.root / table, ("image_name", "emotion", "original_split")):
        where, file = f"{table}, line {number}", f"{IMAGE_FOLDER}/{row['image_name']}"
        official = row["original_split"].casefold()  # the copies name the official folder here: Train_Aligned_Faces
        split = next((split for split in ("train", "val") if official.startswith(split)), "")
        if row["image_name"] and row["emotion"] and split:
            found.add_labelled(where, file, tree.get(file), row["emotion"], split)
        else:
            found.reject(where, "has no image_name, no emotion, or an original_split that is neither Train nor Val")
    found.count_ignored(tree.images)
    return found
