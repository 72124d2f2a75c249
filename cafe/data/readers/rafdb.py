"""RAF-DB, basic expressions (Li, Deng and Du, CVPR 2017), as its authors distribute it and as copies of it are shared.

Both carry the numbers 1–7 in label files, which are the authors' own; the aligned 100×100 faces are read.
"""

from __future__ import annotations

from upath import UPath

from cafe.data.indexing import Listing, read_expected
from cafe.data.labels import RAFDB, decode_text, parse_number
from cafe.data.layouts import Tree, folder_of, read_csv, relative
from cafe.data.packed.archives import read_content

LABEL_FILES = ("list_patition_label.txt", "list_partition_label.txt")  # spelled as the first by the authors
SHARED_LABEL_FILES = ("train_labels.csv", "test_labels.csv")


def read_rafdb(root: UPath) -> Listing:
    """List the aligned faces of RAF-DB.

    official: EmoLabel/list_patition_label.txt and Image/aligned/*_aligned.jpg.
    shared copy: train_labels.csv, test_labels.csv and DATASET/{train,test}/{1..7}/*.jpg; a face must lie in the folder of
    its label.
    """
    tree = Tree.open(root)
    basic = [path for path in tree.find(*LABEL_FILES) if "compound" not in path.casefold().split("/")]
    if basic:
        return _read_official(tree, tree.choose(basic, "the label file of RAF-DB"))
    if tree.find(*SHARED_LABEL_FILES):
        return _read_shared(tree)
    raise tree.lack(
        "label file of RAF-DB (EmoLabel/list_patition_label.txt, or train_labels.csv and test_labels.csv)",
        "give the folder `basic` of the official release or that of a copy with its label files",
    )


def _read_official(tree: Tree, labels: str) -> Listing:
    folder = folder_of(labels)
    if folder.casefold().endswith("emolabel"):
        folder = folder_of(folder)
    tree, labels = tree.below(folder), relative(labels, folder)
    aligned = {path.rpartition("/")[2].casefold(): path for path in tree.images if "_aligned." in path.casefold()}
    if not aligned:
        missing = "aligned faces (Image/aligned/train_00001_aligned.jpg, …)"
        raise tree.lack(missing, "unpack aligned.zip in its folder Image")
    found = tree.start(
        "rafdb", "official RAF-DB: EmoLabel/list_patition_label.txt, Image/aligned", read_expected("rafdb")
    )
    text = decode_text(read_content(tree.root / labels))
    for number, line in enumerate(text.splitlines(), start=1):
        name, label = [*line.split(), "", ""][:2]
        file, split = "_aligned.".join(name.rsplit(".", 1)), name.casefold().partition("_")[0]
        where, code = f"{labels}, line {number}", _parse_code(label)
        if code and split in ("train", "test"):
            found.add_labelled(where, file, aligned.get(file.casefold()), RAFDB[code - 1], split)
        elif name:
            found.reject(where, f"is not a file and a number of 1–7: {line.strip()!r}")
    found.count_ignored(tree.images)
    return found


def _read_shared(tree: Tree) -> Listing:
    folders = {folder_of(path) for path in tree.find(*SHARED_LABEL_FILES)}
    tree = tree.below(tree.choose(folders, "the label files of RAF-DB"))
    images = {"/".join(path.casefold().split("/")[-3:]): path for path in tree.images}
    layout = "shared copy of RAF-DB: train_labels.csv, test_labels.csv, {train,test}/{1..7}"
    found = tree.start("rafdb", layout, read_expected("rafdb"))
    for split in ("train", "test"):
        table = tree.get(f"{split}_labels.csv")
        if table is None:
            raise tree.lack(f"{split}_labels.csv", "put it back, as numbered folders alone do not tell the expression")
        for number, cells in read_csv(tree.root / table):
            name, label = [*cells, ""][:2]
            where, code = f"{table}, line {number}", _parse_code(label)
            if code:
                file = f"{split}/{code}/{name}"
                found.add_labelled(where, file, images.get(file.casefold()), RAFDB[code - 1], split)
            elif number > 1:  # the first line is the header
                found.reject(where, f"is not a file and a number of 1–7: {','.join(cells)!r}")
    found.count_ignored(tree.images)
    return found


def _parse_code(label: str) -> int | None:
    """Return a label of RAF-DB, 1–7, or None."""
    number = parse_number(label)
    return number if number is not None and 1 <= number <= len(RAFDB) else None
