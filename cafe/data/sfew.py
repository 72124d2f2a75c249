"""SFEW 2.0 (Dhall et al., ICMI 2015): film stills, as its authors give them out and as copies of it are shared.

The aligned 143×181 faces are read; those of one film are a group where the names of the files still tell it. The labels of
the test set were never published, so that there are two splits only.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import PurePosixPath

from upath import UPath

from cafe.data.expressions import parse_expression
from cafe.data.indexing import Expected, Listing
from cafe.data.layouts import NOT_OURS, Tree, folder_of, list_by_folder, read_records
from cafe.errors import UserError

SPLITS = {
    "train_aligned_faces": "train",
    "val_aligned_faces": "val",
    "val_aligned_faces_new": "val",
    "test_aligned_faces": "",
}
LABEL_FILE = "sfew_2.0_labels.csv"
IMAGE_FOLDER = "sfew2.0_images"
EXPECTED = (
    Expected("train", (891,), "the number of aligned training faces that fits published percentages", "unverified"),
    Expected("val", (431,), "the number of aligned validation faces most papers use", "unverified"),
)


def read_sfew(root: UPath) -> Listing:
    """List the aligned faces of SFEW 2.0 by the names of their expressions.

    official: Train/Train_Aligned_Faces/EXPRESSION, Val/Val_Aligned_Faces_new/Val_Aligned_Faces/EXPRESSION.
    shared copy: sfew_2.0_labels.csv (image_name,label,emotion,original_split) and sfew2.0_images.
    """
    tree = Tree.open(root)
    if table := tree.find_one(LABEL_FILE):
        return _read_shared(tree.below(folder_of(table)))
    layout = "official SFEW 2.0: {Train,Val}_Aligned_Faces/EXPRESSION"
    wanted = "aligned faces of SFEW (Train/Train_Aligned_Faces/Angry, …), nor sfew_2.0_labels.csv"
    found = list_by_folder(tree, SPLITS, "sfew", layout, EXPECTED, wanted)
    # AboutABoy_000152880_00000001.png is a still of the film "About a Boy": stills of one film are alike.
    found.files = [replace(file, group=PurePosixPath(file.path).name.split("_")[0]) for file in found.files]
    return found


def _read_shared(tree: Tree) -> Listing:
    table = tree.get(LABEL_FILE)
    assert table is not None
    if not any(path.casefold().startswith(f"{IMAGE_FOLDER}/") for path in tree.images):
        raise tree.lack(f"pictures in {IMAGE_FOLDER} beside {table}", "unpack them there")
    found = tree.start("sfew", f"shared copy of SFEW 2.0: {LABEL_FILE}, {IMAGE_FOLDER}", EXPECTED)
    for number, row in read_records(tree.root / table, ("image_name", "emotion", "original_split")):
        where, name, emotion = f"{table}, line {number}", row["image_name"], row["emotion"].casefold()
        official = row["original_split"].casefold()  # the copies name the official folder here: Train_Aligned_Faces
        split = next((split for split in ("train", "val") if official.startswith(split)), "")
        if not (name and split and emotion):
            found.reject(where, "has no image_name, no emotion, or an original_split that is neither Train nor Val")
        elif emotion in NOT_OURS:
            found.dropped[emotion] += 1
        elif path := tree.get(f"{IMAGE_FOLDER}/{name}"):
            try:
                found.add(path, parse_expression(emotion), split)
            except UserError as error:
                found.reject(where, str(error))
        else:
            found.reject(f"{IMAGE_FOLDER}/{name}", "file not found")
    found.ignored = len(tree.images) - len(found.files)
    return found
