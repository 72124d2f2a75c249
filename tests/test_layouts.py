"""How expression sets lie on people's disks: every layout in miniature, with its labels, splits and groups.

A label must never be wrong: what is not certain is one sentence with the remedy.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import complaint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from miniatures import FERPLUS_FOLDERS, draw, ferplus_pixels, litter
from upath import UPath

from cafe.data.expressions import ClassChoice
from cafe.data.indexing import Index, index_files
from cafe.data.manifest import Manifest
from cafe.data.readers.choices import SetChoices
from cafe.errors import UserError

Row = tuple[str, str | None, str | None]  # expression, split, group; a split of None is made


def put(root: Path, *paths: str) -> None:
    """Draw a picture at each of some paths."""
    for number, path in enumerate(paths):
        draw(root / path, number)
    litter(root)


def write(path: Path, text: str, encoding: str = "utf-8") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(encoding))


@dataclass(frozen=True)
class Case:
    """A layout, what is said of it, and what it must be read as, by hand."""

    kind: str
    make: Callable[[Path], None]
    rows: Mapping[str, Row]
    said: dict[str, Any] = field(default_factory=dict)
    expressions: str | None = None
    below: str = ""  # what is given, below the folder
    dropped: dict[str, int] = field(default_factory=dict)
    broken: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    note: str = ""


def _pictures(*paths: str) -> Callable[[Path], None]:
    return lambda root: put(root, *paths)


def _table(text: str, *paths: str, name: str = "t.csv", encoding: str = "utf-8") -> Callable[[Path], None]:
    def make(root: Path) -> None:
        put(root, *paths)
        write(root / name, text, encoding)

    return make


def _imagefolder(root: Path) -> None:
    put(root, "data/train/3ba6.jpg", "data/train/77c1.png", "data/test/3ba6.jpg")
    write(root / "data/train/metadata.csv", "file_name,label,note\n3ba6.jpg,Happy,x\n77c1.png,sad,y\n")
    write(root / "data/test/metadata.csv", "file_name,label,note\n3ba6.jpg,angry,z\n")


def _json_lines(root: Path) -> None:
    put(root, "images/0.png", "images/1.png")
    lines = [
        {"file_name": "images/0.png", "label": 3, "person": 0},
        {"file_name": "images/1.png", "label": 0, "person": 1},
    ]
    write(root / "metadata.jsonl", "\n".join(map(json.dumps, lines)))


def _split_tables(root: Path) -> None:
    put(root, "train/a.jpg", "train/b.jpg", "test/a.jpg")
    write(root / "train_labels.csv", "image,label\na.jpg,fear\nb.jpg,joy\n")
    write(root / "test_labels.csv", "image,label\na.jpg,anger\n")


def _fer2013(root: Path) -> None:
    lines = ["emotion, pixels, Usage"]
    usages = (("Training", 3), ("PublicTest", 0), ("PrivateTest", 6), ("Training", 7), ("Training", 2))
    for number, (usage, label) in enumerate(usages):
        lines.append(f"{label},{' '.join(map(str, ferplus_pixels(number).ravel()))},{usage}")
    write(root / "archive/fer2013.csv", "\n".join(lines))


def _expw(root: Path) -> None:
    for number, name in enumerate(("angry actor_104.jpg", "b.jpg")):
        draw(root / "ExpW/image/origin" / name, number, (40, 30))
    lines = (
        "angry actor_104.jpg 0 2 10 30 22 22.9 0",
        "b.jpg 0 0 0 12 12 9.9 3",
        "b.jpg 1 5 20 32 17 8.1 6",
        "b.jpg 2 9",
    )
    write(root / "ExpW/label/label.lst", "\n".join(lines))


def _affectnet_arrays(root: Path) -> None:
    for name, label in (("0", "1"), ("1", "7"), ("2", "6")):
        draw(root / "AffectNet/images" / f"{name}.jpg", int(name))
        (root / "AffectNet/annotations").mkdir(exist_ok=True)
        np.save(root / "AffectNet/annotations" / f"{name}_exp.npy", np.array(label))


def _integer_groups(root: Path) -> None:
    put(root, *(f"{n}.png" for n in range(5)))
    columns = {
        "Image Name": [f"{n}.png" for n in range(5)], "emotion": [3, 3, 0, 0, 6],
        "user.id": [0.0, 1.0, 0.0, float("nan"), None], "__index_level_0__": range(5),
    }  # fmt: skip
    pq.write_table(pa.table(columns), root / "t.parquet")


def _boxes(root: Path) -> None:
    put(root, "a.png", "b.png")
    write(root / "t.csv", "path;label;x1;y1;x2;y2\na.png;happy;0;0;5;6\na.png;sad;6;0;12;12\nb.png;fear;1;2;9;9\n")


def _pandas(root: Path) -> None:
    put(root, "é 1.jpg", "sub/2.jpg")
    text = ',Path,Emotion,"Usage",user.id,age\r\n0,"é 1.jpg",happy,"PublicTest",7,3\r\n'
    text += '1,sub\\2.jpg,sad,Training,NA,"4\r\n5"\r\n'
    write(root / "t.csv", text, "utf-16")


EMOTIONS = {"happy": "happiness", "sad": "sadness"}
CASES = {
    # folders
    "wrapper, upper case": Case(
        "folder", _pictures("archive/DATASET/HAPPY/A.JPG", "archive/DATASET/03_sad/b.PNG", "archive/DATASET/Contempt/c.TIF"),
        {"archive/DATASET/HAPPY/A.JPG": ("happiness", None, None), "archive/DATASET/03_sad/b.PNG": ("sadness", None, None)},
        dropped={"contempt": 1},
    ),
    "train and test": Case(
        "folder", _pictures("set/train/angry/0.jpg", "set/test/angry/0.jpg", "set/Test/fear/1.jpg"),
        {
            "set/train/angry/0.jpg": ("anger", "train", None), "set/test/angry/0.jpg": ("anger", "test", None),
            "set/Test/fear/1.jpg": ("fear", "test", None),
        },
    ),
    "expression/split": Case(
        "folder", _pictures("happy/train/0.jpg", "sad/val/1.jpg"),
        {"happy/train/0.jpg": ("happiness", "train", None), "sad/val/1.jpg": ("sadness", "val", None)},
    ),
    "person/expression": Case(
        "folder", _pictures(*(f"faces/{who}/{what}/0.jpg" for who in ("0", "Joy") for what in EMOTIONS)),
        {f"faces/{who}/{what}/0.jpg": (EMOTIONS[what], None, who) for who in ("0", "Joy") for what in EMOTIONS},
    ),
    "expression/person": Case(
        "folder", _pictures(*(f"{what}/{who}/0.jpg" for who in "01234" for what in EMOTIONS)),
        {f"{what}/{who}/0.jpg": (EMOTIONS[what], None, who) for who in "01234" for what in EMOTIONS},
    ),
    "expression/intensity": Case(
        "folder", _pictures(*(f"{what}/{how}/0.jpg" for how in ("low", "high") for what in EMOTIONS)),
        {f"{what}/{how}/0.jpg": (EMOTIONS[what], None, None) for how in ("low", "high") for what in EMOTIONS},
    ),
    "expression/batch": Case(
        "folder", _pictures("happy/a/0.jpg", "happy/b/0.jpg", "sad/c/0.jpg", "sad/0.jpg"),
        {
            "happy/a/0.jpg": ("happiness", None, None), "happy/b/0.jpg": ("happiness", None, None),
            "sad/c/0.jpg": ("sadness", None, None), "sad/0.jpg": ("sadness", None, None),
        },
    ),
    "by folder": Case(
        "folder", _pictures("happy/a/0.jpg", "happy/b/0.jpg", "sad/c/0.jpg"),
        {
            "happy/a/0.jpg": ("happiness", None, "a"), "happy/b/0.jpg": ("happiness", None, "b"),
            "sad/c/0.jpg": ("sadness", None, "c"),
        },
        {"group_by": "folder"},
    ),
    "by pattern": Case(
        "folder", _pictures("happy/id0_1.jpg", "sad/id0_2.jpg", "sad/x.jpg"),
        {
            "happy/id0_1.jpg": ("happiness", None, "id0"), "sad/id0_2.jpg": ("sadness", None, "id0"),
            "sad/x.jpg": ("sadness", None, None),
        },
        {"group_pattern": r"^[^/]*/(id\d+|)"},
    ),
    "no groups": Case(
        "folder", _pictures("a/happy/0.jpg", "b/sad/0.jpg"),
        {"a/happy/0.jpg": ("happiness", None, None), "b/sad/0.jpg": ("sadness", None, None)},
        {"group_by": "none"},
    ),
    "person/own": Case(
        "folder", _pictures("ann/awake/0.jpg", "ann/asleep/0.jpg", "bob/awake/0.jpg"),
        {"ann/awake/0.jpg": ("awake", None, "ann"), "ann/asleep/0.jpg": ("asleep", None, "ann"),
         "bob/awake/0.jpg": ("awake", None, "bob")},
        expressions="awake,asleep",
    ),
    "numbered folders": Case(
        "folder", _pictures("DATASET/train/1/a.jpg", "DATASET/test/7/b.jpg"),
        {"DATASET/train/1/a.jpg": ("surprise", "train", None), "DATASET/test/7/b.jpg": ("neutral", "test", None)},
        {"label_order": "rafdb"},
    ),
    "one split wished": Case(
        "folder", _pictures("happy/0.jpg", "sad/1.jpg"),
        {"happy/0.jpg": ("happiness", "test", None), "sad/1.jpg": ("sadness", "test", None)}, {"split": "test"},
    ),
    # tables beside pictures
    "imagefolder csv": Case(
        "folder", _imagefolder,
        {
            "data/train/3ba6.jpg": ("happiness", "train", None), "data/train/77c1.png": ("sadness", "train", None),
            "data/test/3ba6.jpg": ("anger", "test", None),
        },
        unread=("note",),
    ),
    "imagefolder jsonl": Case(
        "folder", _json_lines, {"images/0.png": ("happiness", None, "0"), "images/1.png": ("anger", None, "1")},
        {"label_order": "fer2013"},
    ),
    "split tables": Case(
        "folder", _split_tables,
        {"train/a.jpg": ("fear", "train", None), "train/b.jpg": ("happiness", "train", None),
         "test/a.jpg": ("anger", "test", None)},
    ),
    "flat beside a table": Case(
        "folder",
        _table("pth,label,relFCs\n0.jpg,Surprise,0.8\n1.jpg,happy,0.1\nnone.jpg,fear,0\n", "faces/0.jpg", "faces/1.jpg"),
        {"faces/0.jpg": ("surprise", None, None), "faces/1.jpg": ("happiness", None, None)},
        broken=("none.jpg",), unread=("relFCs",),
    ),
    # tables
    "affectnet labels.csv": Case(
        "table",
        _table(",pth,label,relFCs\n0,anger/0.jpg,surprise,0.8\n1,fear/1.jpg,fear,0.9\n", "anger/0.jpg", "fear/1.jpg"),
        {"anger/0.jpg": ("surprise", None, None), "fear/1.jpg": ("fear", None, None)}, below="t.csv", unread=("relFCs",),
        note="1 faces lie in a folder of another expression than their label says, such as anger/0.jpg, labelled 'surprise'",
    ),
    "pandas, UTF-16, quoted line ends": Case(
        "table", _pandas, {"é 1.jpg": ("happiness", "val", "7"), "sub/2.jpg": ("sadness", "train", "NA")}, below="t.csv",
        unread=("age",),
    ),
    "Latin-1, semicolons": Case(
        "table", _table("file;expression\r\né.jpg;angry\r\nb.jpg;natural\r\n", "é.jpg", "b.jpg", encoding="latin-1"),
        {"é.jpg": ("anger", None, None), "b.jpg": ("neutral", None, None)}, below="t.csv",
    ),
    "tabs, byte-order mark, a column of another name": Case(
        "table", _table("sep=\t\nimage\temo\tlabel\na.jpg\tdisgust\t3\n", "a.jpg", name="t.tsv", encoding="utf-8-sig"),
        {"a.jpg": ("disgust", None, None)}, {"columns": ["label=emo"]}, below="t.tsv", unread=("label",),
    ),
    "integer groups, 0 among them": Case(
        "table", _integer_groups,
        {
            "0.png": ("happiness", None, "0"), "1.png": ("happiness", None, "1"), "2.png": ("anger", None, "0"),
            "3.png": ("anger", None, None), "4.png": ("neutral", None, None),
        },
        {"label_order": "fer2013"}, below="t.parquet", unread=("__index_level_0__",),
    ),
    "splits by the folders of the paths": Case(
        "table", _table("image,class\ntrain\\happy\\0.jpg,1\ntest/x/1.jpg,2\ntest/x/2.jpg,0\n",
                        "train/happy/0.jpg", "test/x/1.jpg", "test/x/2.jpg"),
        {"train/happy/0.jpg": ("happiness", "train", None), "test/x/1.jpg": ("sadness", "test", None)},
        {"label_order": "none,joy,sad"}, below="t.csv", dropped={"none": 1},
    ),
    "several faces of a picture": Case(
        "table", _boxes,
        {
            "a.png@0,0,5,6": ("happiness", None, None), "a.png@6,0,6,12": ("sadness", None, None),
            "b.png": ("fear", None, None),
        },
        below="t.csv",
    ),
    "labels by a map": Case(
        "table", _table("path,label\na.jpg,HA\nb.jpg,7\nc.jpg,3.0\n", "a.jpg", "b.jpg", "c.jpg"),
        {"a.jpg": ("happiness", None, None), "c.jpg": ("sadness", None, None)},
        {"labels": "map.csv"}, below="t.csv", dropped={"label 7": 1},
    ),
    # sets
    "fer2013.csv": Case(
        "fer2013", _fer2013,
        {
            f"{FERPLUS_FOLDERS['Training']}/fer0000000.png": ("happiness", "train", None),
            f"{FERPLUS_FOLDERS['PublicTest']}/fer0000001.png": ("anger", "val", None),
            f"{FERPLUS_FOLDERS['PrivateTest']}/fer0000002.png": ("neutral", "test", None),
            f"{FERPLUS_FOLDERS['Training']}/fer0000004.png": ("fear", "train", None),
        },
        broken=("archive/fer2013.csv, line 5",),
    ),
    "fer2013 folders": Case(
        "fer2013", _pictures("archive/train/disgust/0.jpg", "archive/test/happy/1.jpg"),
        {"train/disgust/0.jpg": ("disgust", "train", None), "test/happy/1.jpg": ("happiness", "test", None)},
    ),
    "CK+48": Case(
        "ckplus", _pictures("CK+48/contempt/S138_008_00000007.png", "CK+48/happy/S010_006_00000015.png", "CK+48/fear/x.png"),
        {"CK+48/happy/S010_006_00000015.png": ("happiness", None, "S010")},
        dropped={"contempt": 1}, broken=("CK+48/fear/x.png",),
    ),
    "CK+48 as a folder": Case(
        "folder", _pictures("CK+48/contempt/S138_008_00000007.png", "CK+48/sadness/S138_006_00000015.png"),
        {"CK+48/sadness/S138_006_00000015.png": ("sadness", None, "S138"),
         "CK+48/contempt/S138_008_00000007.png": ("contempt", None, "S138")},
        expressions="8",
    ),
    "JAFFE": Case(
        "jaffe", _pictures("jaffe/KA.AN1.39.tiff", "jaffe/NA.FE2.216.tiff", "jaffe/readme.png"),
        {"jaffe/KA.AN1.39.tiff": ("anger", None, "KA"), "jaffe/NA.FE2.216.tiff": ("fear", None, "NA")},
        broken=("jaffe/readme.png",),
    ),
    "JAFFE for a target": Case(
        "jaffe", _pictures("KA.AN1.39.tiff", "KM.SU1.14.tiff"),
        {"KA.AN1.39.tiff": ("anger", "test", "KA"), "KM.SU1.14.tiff": ("surprise", "test", "KM")}, {"split": "test"},
    ),
    "KDEF": Case(
        "kdef", _pictures("KDEF/AF01/AF01AFS.JPG", "KDEF/BF01/BF01SUHL.JPG"),
        {"KDEF/AF01/AF01AFS.JPG": ("fear", None, "F01"), "KDEF/BF01/BF01SUHL.JPG": ("surprise", None, "F01")},
    ),
    "ExpW": Case(
        "expw", _expw,
        {
            "ExpW/image/origin/angry actor_104.jpg": ("anger", None, "angry actor_104.jpg"),
            "ExpW/image/origin/b.jpg@0": ("happiness", None, "b.jpg"),
            "ExpW/image/origin/b.jpg@1": ("neutral", None, "b.jpg"),
        },
        broken=("ExpW/label/label.lst, line 4",),
    ),
    "AffectNet arrays without splits": Case(
        "affectnet", _affectnet_arrays, {"images/0.jpg": ("happiness", None, None), "images/2.jpg": ("anger", None, None)},
        dropped={"contempt": 1},
    ),
}  # fmt: skip


def read(case: Case, root: Path) -> Index:
    case.make(root)
    said = dict(case.said)
    if "labels" in said:
        write(root / "map.csv", "label,class\nha,happy\n7,\n3,sad\n")
        said["labels"] = str(root / "map.csv")
    choices = SetChoices(ClassChoice.parse(case.expressions), **said)
    return index_files("set", choices.read(case.kind, str(root / case.below)), images=UPath(root / "pixels"))


@pytest.mark.parametrize("name", CASES)
def test_every_layout_has_its_labels_splits_and_groups(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    result = read(case, tmp_path / "set")
    manifest = result.manifest
    rows = manifest.table.to_pylist()
    names = manifest.name_classes(np.arange(len(rows)))
    given = not manifest.parted
    found = {r["sample_id"]: (n, r["split"] if given else None, r["group"]) for r, n in zip(rows, names, strict=True)}
    assert found == case.rows
    assert result.listing.dropped == case.dropped
    assert tuple(where for where, _ in result.broken) == case.broken
    assert result.listing.unread == case.unread
    assert "".join(result.listing.notes).startswith(case.note)
    persons: dict[str, set[str]] = {}
    for row in rows:
        persons.setdefault(row["group"] or row["sample_id"], set()).add(row["split"])
    assert given or all(len(splits) == 1 for splits in persons.values())


KEPT = "pic,label,Sex,age at visit,note\na.jpg,happy,f,31,x\nb.jpg,sad,,44,y\n"


def test_columns_that_are_kept_stand_in_the_manifest_and_change_no_face(tmp_path: Path) -> None:
    put(tmp_path, "a.jpg", "b.jpg")
    write(tmp_path / "t.csv", KEPT)
    columns = ("path=pic", "keep=sex", "keep=age_at_visit")
    plain, kept = (
        index_files("set", SetChoices(columns=said).read("table", str(tmp_path / "t.csv")))
        for said in (columns[:1], columns)
    )
    assert (plain.listing.unread, kept.listing.unread) == (("Sex", "age at visit", "note"), ("note",))
    assert plain.manifest.kept == []
    kept.manifest.save(path := UPath(tmp_path / "set.parquet"))
    for manifest in (kept.manifest, Manifest.load(path)):
        assert manifest.table.select(["Sex", "age at visit"]).to_pydict() == {
            "Sex": ["f", None],
            "age at visit": ["31", "44"],
        }
        assert manifest.digest == plain.manifest.digest
        assert manifest.image_digest == plain.manifest.image_digest


@pytest.mark.parametrize(
    ("keep", "sentence"),
    [
        ("mood", "Unknown column of .* 'mood': choose"),
        ("width", "The column 'width' of .* cannot be kept"),
        ("age", "has 2 columns that are called 'age': rename all but one"),
    ],
)
def test_a_column_that_cannot_be_kept_is_one_sentence(tmp_path: Path, keep: str, sentence: str) -> None:
    put(tmp_path, "a.jpg")
    write(tmp_path / "t.csv", "path,label,width,Age,AGE\na.jpg,happy,9,31,32\n")
    with pytest.raises(UserError, match=sentence):
        SetChoices(columns=(f"keep={keep}",)).read("table", str(tmp_path / "t.csv"))


NUMBERS = _pictures("1/0.jpg", "1/1.jpg", "7/2.jpg")
UNCERTAIN = {
    "numbers": (
        "folder", NUMBERS, {},
        "by numbers, 1: 2 faces, 7: 1 face, which mean other expressions in other sets: say which with --label-order "
        "affectnet (0 neutral, 1 happiness, 2 sadness, 3 surprise, 4 fear, 5 disgust, 6 anger, 7 contempt, 8 none, 9 "
        "uncertain, 10 no face), ferplus (0 neutral, ",
    ),
    "numbers in a table": (
        "table", _table("path,label\n0.jpg,3\n", "0.jpg"), {}, "/t.csv labels its faces by numbers, 3: 1 face",
    ),
    "numbers in a table beside pictures": (
        "folder", _table("path,label\n0.jpg,3\n", "0.jpg"), {}, "/t.csv labels its faces by numbers, 3: 1",
    ),
    "numbers in two tables": (
        "folder",
        lambda root: [
            _table("path,label\n0.jpg,3\n", f"{split}/0.jpg", name=f"{split}.csv")(root) for split in ("train", "test")
        ],
        {}, "/test.csv (and 1 more) labels its faces by numbers, 3: 2 faces",
    ),
    "an order without a number": (
        "folder", NUMBERS, {"label_order": "fer2013"},
        "labels that the order fer2013 does not explain, 7: 1 face: give the order of this set, whose first name is that",
    ),
    "an order of another beginning": (
        "folder", NUMBERS, {"label_order": ",".join("abcdefgh")}, "is 0, of which 'a' would be the name: where it",
    ),
    "an order of names": ("folder", _pictures("happy/0.jpg", "sad/1.jpg"), {"label_order": "rafdb"}, "No label of "),
    "an order of one": ("folder", NUMBERS, {"label_order": "raf-db"}, "choose affectnet, fer2013, ferplus, rafdb, or give"),
    "an order of a published set": ("jaffe", _pictures("KA.AN1.39.tiff"), {"label_order": "rafdb"}, "of jaffe are known"),
    "a map with a gap": (
        "table", _table("path,label\na.jpg,HA\nb.jpg,XX\n", "a.jpg"), {"labels": "map.json"},
        "map.json does not explain, XX: 1 face: add them, those to be left out with an empty class",
    ),
    "a map of two minds": (
        "table", _table("path,label\na.jpg,HA\n", "a.jpg"), {"labels": "twice.json"}, "says two things of the label 'ha'",
    ),
    "two levels of expressions": (
        "folder", _pictures("happy/sad/0.jpg", "sad/happy/1.jpg"), {},
        "named after expressions on several levels, such as 'happy' and 'sad' of happy/sad/0.jpg: name the classes with",
    ),
    "two levels of numbers": (
        "folder", _pictures("1/2/0.jpg", "2/1/1.jpg"), {"label_order": "rafdb"}, "are numbered on several levels",
    ),
    "two levels of names": (
        "folder", _pictures("ann/awake/0.jpg", "bob/asleep/1.jpg"), {"classes": ClassChoice(None)},
        "differ on several levels, such as 'ann' and 'awake' of ann/awake/0.jpg",
    ),
    "no labels": (
        "folder", _pictures("train/0.jpg", "test/1.jpg"), {},
        "does not say what its pictures show, such as test/1.jpg: put pictures into folders named after what they show",
    ),
    "names of another set": ("folder", _pictures("x/KA.AN1.39.tiff"), {}, "read it with `cafe data index jaffe`"),
    "a picture of two splits": ("folder", _pictures("train/test/sad/0.jpg", "train/fear/1.jpg"), {}, "of several splits, "),
    "two tables": (
        "folder", _table("path,label\n0.jpg,fear\n", "0.jpg", name="a/t.csv"), {"two": True},
        "holds several tables of pictures and labels, a/t.csv and b.csv: read the right one with `cafe data index table`",
    ),
    "a table against its folders": (
        "folder",
        _table("file_name,label\nhappy/0.jpg,sad\nsad/1.jpg,sad\n", "happy/0.jpg", "sad/1.jpg", name="metadata.csv"),
        {}, "1 pictures of ",
    ),
    "no folders of persons": (
        "folder", _pictures("happy/0.jpg", "sad/1.jpg"), {"group_by": "folder"}, "lie in no folders but those of splits",
    ),
    "a pattern that misses": (
        "folder", _pictures("happy/id1.jpg", "sad/x.jpg"), {"group_pattern": r"id\d"}, "does not match 'sad/x.jpg'",
    ),
    "a pattern that is none": ("folder", _pictures("happy/0.jpg", "sad/1.jpg"), {"group_pattern": "("}, "is no regular"),
    "pixels in a table": ("table", _table("emotion,pixels,Usage\n0,1 2,Training\n"), {}, "`cafe data index fer2013`"),
    "a column that is not there": (
        "table", _table("path,label\n0.jpg,fear\n"), {"columns": ["label=emo"]}, "Unknown column of ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNCERTAIN)
def test_what_is_not_certain_is_one_sentence_with_the_remedy(tmp_path: Path, name: str) -> None:
    kind, make, said, message = UNCERTAIN[name]
    make(tmp_path)
    said = dict(said)
    if said.pop("two", False):
        write(tmp_path / "b.csv", "path,label\n0.jpg,sad\n")
    if "labels" in said:
        write(tmp_path.parent / "map.json", '{"HA": "happy", "3": null}')
        write(tmp_path.parent / "twice.json", '{"HA": "happy", "ha": "sad"}')
        said["labels"] = str(tmp_path.parent / said["labels"])
    root = tmp_path / "t.csv" if kind == "table" else tmp_path
    sentence = complaint(lambda: SetChoices(**said).read(kind, str(root)))
    assert message in sentence, sentence
    assert sentence.endswith(".")


FILES = {  # a file that people write, and how it is read
    "t.csv": ("table", "t.csv", {}), "t.jsonl": ("table", "t.jsonl", {}), "metadata.csv": ("folder", "", {}),
    "label.lst": ("expw", "", {}), "fer2013.csv": ("fer2013", "", {}),
    "map.csv": ("folder", "", {"labels": "map.csv"}), "map.json": ("folder", "", {"labels": "map.json"}),
}  # fmt: skip
PIECES = st.one_of(
    st.text(max_size=6),
    st.sampled_from(
        (
            "path", "label", "file_name", "group", "split", "left,top,width,height", "bbox", ",", ";", "\n", '"', "{",
            "}", ":",
            "0.png", "7", "1e9", "nan", "\\ud800", "../x", "happy", "0.png 0 1 1 9 9 1.0 3\n", '{"path": "0.png", "label": ',
            "emotion,pixels,Usage\n0,", "null", "9" * 400,
        )
    ),
)  # fmt: skip


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(name=st.sampled_from(list(FILES)), pieces=st.lists(PIECES, max_size=12), raw=st.binary(max_size=12))
def test_tables_and_maps_of_any_content_are_read_or_one_sentence(
    tmp_path: Path, name: str, pieces: list[str], raw: bytes
) -> None:
    folder = tmp_path / name.replace(".", "-")
    if not folder.exists():
        put(folder, "1/0.png", "2/1.png")
    (folder / name).write_bytes("".join(pieces).encode("utf-8", "surrogatepass") + raw)
    kind, below, said = FILES[name]
    choices = SetChoices(**{option: str(folder / file) for option, file in said.items()})
    said_of_it = complaint(
        lambda: index_files("x", choices.read(kind, str(folder / below)), images=UPath(folder / "p"))
    )
    assert said_of_it[-1:] in ("", ".")
