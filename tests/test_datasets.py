"""Readers of the distributed data sets: every layout in miniature, row by row, and every mistake one sentence."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import miniatures
import numpy as np
import pytest
from conftest import Cafe, complaint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from miniatures import draw, ferplus_pixels
from PIL import Image
from upath import UPath

from cafe.data.expressions import EIGHT, EXPRESSIONS, ClassChoice
from cafe.data.indexing import Expected, Index, count_differences, index_files, read_expected
from cafe.data.manifest import Manifest
from cafe.data.readers import DATASETS
from cafe.data.readers.ferplus import choose_majority, choose_most_voted

Row = tuple[str, str, str]  # sample_id, expression, split


@dataclass(frozen=True)
class Case:
    """A layout and what it must be read as, by hand."""

    kind: str
    write: Callable[[Path], None]
    layout: str
    home: str  # the folder below the root that paths are relative to
    rows: list[Row]
    broken: list[tuple[str, str]] = field(default_factory=list)
    dropped: dict[str, int] = field(default_factory=dict)
    ignored: int = 0
    repeated: list[str] = field(default_factory=list)


FERPLUS_TRUTH = [
    ("FER2013Test/fer0000010.png", "surprise", "test"),
    ("FER2013Train/fer0000000.png", "happiness", "train"),
    ("FER2013Train/fer0000003.png", "fear", "train"),
    ("FER2013Valid/fer0000006.png", "anger", "val"),
]
FERPLUS_DROPPED = {"undecided": 3, "NF": 3, "contempt": 1, "unknown": 1}
MISSING_FER = ("FER2013Test/fer0000012.png", "file not found")
REPEATED_FER = ["FER2013Train/fer0000003.png ({0}fer2013new.csv, line 5; {0}fer2013new.csv, line 14)"]
DAMAGED_FER = "line 16 of {} does not hold 48×48 grey values"

CASES = {
    "rafdb official": Case(
        "rafdb", miniatures.write_rafdb_official, "official RAF-DB", "RAF-DB/basic",
        [
            ("Image/aligned/test_0001_aligned.jpg", "neutral", "test"),
            ("Image/aligned/test_0002_aligned.jpg", "disgust", "test"),
            ("Image/aligned/test_0003_aligned.jpg", "anger", "test"),
            ("Image/aligned/train_00001_aligned.jpg", "sadness", "train"),
            ("Image/aligned/train_00002_aligned.jpg", "surprise", "train"),
        ],
        [
            ("EmoLabel/list_patition_label.txt, line 3", "is not a file and a number of 1–7: 'train_00003.jpg 8'"),
            ("train_00004_aligned.jpg", "file not found"),
        ],
        ignored=7,  # six originals and the aligned face of the corrupt row
    ),
    "rafdb shared": Case(
        "rafdb", miniatures.write_rafdb_shared, "shared copy of RAF-DB", "archive",
        [
            ("DATASET/TRAIN/1/train_00002_aligned.jpg", "surprise", "train"),
            ("DATASET/test/7/test_0001_aligned.jpg", "neutral", "test"),
            ("DATASET/train/5/train_00001_aligned.jpg", "sadness", "train"),
        ],
        [
            ("train/3/train_00003_aligned.jpg", "file not found"),
            ("train_labels.csv, line 5", "is not a file and a number of 1–7: 'broken'"),
        ],
        ignored=1,
    ),
    "ferplus png": Case(
        "ferplus", miniatures.write_ferplus_png, "FERPlus: majority of the votes in fer2013new.csv, pictures in FER2013{",
        "FERPlus-master/data", FERPLUS_TRUTH,
        [MISSING_FER, ("FERPlus-master/fer2013new.csv, line 13", "has no known Usage or not ten votes")], FERPLUS_DROPPED,
        repeated=[line.format("FERPlus-master/") for line in REPEATED_FER],
    ),
    "ferplus label.csv": Case(
        "ferplus", miniatures.write_ferplus_labels, "FERPlus: majority of the votes in FER2013{Train,Valid,Test}/label.csv",
        "data", FERPLUS_TRUTH,
        [MISSING_FER, ("data/FER2013Test/label.csv, line 3", "has no known Usage or not ten votes")],
        {**FERPLUS_DROPPED, "NF": 2},
        repeated=[
            "FER2013Train/fer0000003.png (data/FER2013Train/label.csv, line 3; data/FER2013Train/label.csv, line 6)",
        ],
    ),
    "ferplus fer2013.csv": Case(
        "ferplus", miniatures.write_ferplus_csv, "pictures in fer2013/fer2013.csv", "", FERPLUS_TRUTH,
        [
            (MISSING_FER[0], DAMAGED_FER.format("fer2013.csv")),
            ("FERPlus/fer2013new.csv, line 13", "has no known Usage or not ten votes"),
        ],
        FERPLUS_DROPPED,
        repeated=[line.format("FERPlus/") for line in REPEATED_FER],
    ),
    "ferplus icml_face_data.csv": Case(
        "ferplus", miniatures.write_ferplus_other_csv, "pictures in fer2013/icml_face_data.csv", "", FERPLUS_TRUTH,
        [
            (MISSING_FER[0], DAMAGED_FER.format("icml_face_data.csv")),
            ("FERPlus/fer2013new.csv, line 13", "has no known Usage or not ten votes"),
        ],
        FERPLUS_DROPPED,
        repeated=[line.format("FERPlus/") for line in REPEATED_FER],
    ),
    "affectnet lists": Case(
        "affectnet", miniatures.write_affectnet_lists, "AffectNet: training.csv, validation.csv, faces cut out", "AffectNet",
        [
            ("manually_annotated_images/1/a0.jpg", "neutral", "train"),
            ("manually_annotated_images/1/a1.JPG", "happiness", "train"),
            ("manually_annotated_images/22/b0.png", "sadness", "train"),
            ("manually_annotated_images/3/c0.jpg", "anger", "val"),
            ("manually_annotated_images/3/c1.jpg", "fear", "val"),
        ],
        [
            ("Manually_Annotated_Images/22/none.jpg", "file not found"),
            ("manually_annotated_images/22/b1.jpg", "its face box (41, 0, 20, 20) lies outside the 40×30 pixels"),
            ("training.csv, line 7", "has no expression of 0–10: ''"),
            ("training.csv, line 8", "has no face box"),
        ],
        {"contempt": 1, "no face": 1},
    ),
    "affectnet arrays": Case(
        "affectnet", miniatures.write_affectnet_arrays, "AffectNet: {train_set,val_set}/images and annotations", "AffectNet",
        [
            ("train_set/images/0.jpg", "neutral", "train"),
            ("train_set/images/1.jpg", "happiness", "train"),
            ("train_set/images/3.jpg", "surprise", "train"),
            ("val_set/images/0.jpg", "fear", "val"),
            ("val_set/images/1.jpg", "disgust", "val"),
        ],
        [
            (path, "its annotation ID_exp.npy is missing or holds no expression of 0–10")
            for path in ("train_set/images/9.jpg", "val_set/images/2.jpg")
        ],
        {"contempt": 1},
        ignored=2,
    ),
    "affectnet shared": Case(
        "affectnet", miniatures.write_affectnet_shared, "shared copy of AffectNet", "archive (3)",
        [
            ("Test/Anger/image0000004.jpg", "anger", "test"),
            ("Test/surprise/image0000006.jpg", "surprise", "test"),
            ("Train/Happy/image0000002.jpg", "happiness", "train"),
            ("Train/anger/image0000000.jpg", "anger", "train"),
            ("Train/neutral/image0000003.jpg", "neutral", "train"),
        ],
        dropped={"contempt": 2},
    ),
    "sfew official": Case(
        "sfew", miniatures.write_sfew_official, "official SFEW 2.0", "SFEW_2",
        [
            *(
                (f"Train/Train_Aligned_Faces/{emotion}/AboutABoy_00015{n}280_00000001.png", expression, "train")
                for n, (emotion, expression) in enumerate(
                    (("Angry", "anger"), ("Disgust", "disgust"), ("Fear", "fear"), ("Happy", "happiness"),
                     ("Neutral", "neutral"), ("Sad", "sadness"), ("Surprise", "surprise"))
                )
            ),
            ("Val/Val_Aligned_Faces_new/Val_Aligned_Faces/Happy/Juno_1_2.png", "happiness", "val"),
            ("Val/Val_Aligned_Faces_new/Val_Aligned_Faces/angry/Juno_3_4.PNG", "anger", "val"),
        ],
        dropped={"label withheld": 1}, ignored=1,
    ),
    "sfew shared": Case(
        "sfew", miniatures.write_sfew_shared, "shared copy of SFEW 2.0", "sfew20",
        [
            ("sfew2.0_images/image_000000.png", "anger", "train"),
            ("sfew2.0_images/image_000001.png", "happiness", "train"),
            ("sfew2.0_images/image_000002.png", "surprise", "val"),
            ("sfew2.0_images/image_000003.png", "neutral", "val"),
        ],
        [
            ("sfew2.0_images/image_000009.png", "file not found"),
            ("sfew_2.0_labels.csv, line 6",
             "has no image_name, no emotion, or an original_split that is neither Train nor Val"),
            ("sfew_2.0_labels.csv, line 8", "Unknown expression 'Bored'"),
        ],
        ignored=1,
    ),
    "mma": Case(
        "mma", miniatures.write_mma, "MMAFEDB", "MMAFEDB",
        [
            ("Test/fear/e.jpg", "fear", "test"),
            ("Test/surprise/d.jpg", "surprise", "test"),
            ("train/angry/a.jpg", "anger", "train"),
            ("train/happy/b.jpg", "happiness", "train"),
            ("valid/sad/c.jpg", "sadness", "val"),
        ],
        [("train/angry/empty.jpg", "file is empty")],
    ),
}  # fmt: skip
TEXT_FILES = {
    "rafdb official": "list_patition_label.txt",
    "rafdb shared": "train_labels.csv",
    "ferplus png": "fer2013new.csv",
    "ferplus label.csv": "label.csv",
    "ferplus fer2013.csv": "fer2013.csv",
    "affectnet lists": "validation.csv",
    "affectnet arrays": "1_exp.npy",
    "sfew shared": "sfew_2.0_labels.csv",
}


def index(kind: str, root: Path, images: Path, **choices: str) -> Index:
    return index_files("set", DATASETS[kind](UPath(root), **choices), images=UPath(images))


def rows(manifest: Manifest) -> list[Row]:
    return [(row["sample_id"], EXPRESSIONS[row["label"]], row["split"]) for row in manifest.table.to_pylist()]


@pytest.mark.parametrize("name", CASES)
def test_every_layout_is_read_row_by_row(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    case.write(tmp_path / "Sets and more")
    result = index(case.kind, tmp_path / "Sets and more", tmp_path / "images")
    assert rows(result.manifest) == case.rows
    assert case.layout in result.listing.layout
    assert [path for path, _ in result.broken] == [path for path, _ in case.broken]
    assert all(reason.startswith(begin) for (_, reason), (_, begin) in zip(result.broken, case.broken, strict=True))
    assert result.listing.dropped == case.dropped
    assert result.listing.ignored.total() == case.ignored
    assert result.listing.repeated == case.repeated
    assert result.manifest.kind == case.kind
    if case.home:
        assert result.manifest.root == str(tmp_path / "Sets and more" / case.home)
    for row in range(len(result.manifest)):
        height, width, _ = result.manifest.read_face(row).shape
        recorded = result.manifest.table.slice(row, 1).to_pylist()[0]
        assert (recorded["width"], recorded["height"]) == (width, height)


CONTEMPT = {  # faces that join each miniature with the eighth class
    "ferplus png": ["FER2013Train/fer0000004.png"],
    "ferplus label.csv": ["FER2013Train/fer0000004.png"],
    "ferplus fer2013.csv": ["FER2013Train/fer0000004.png"],
    "ferplus icml_face_data.csv": ["FER2013Train/fer0000004.png"],
    "affectnet lists": ["manually_annotated_images/22/b1.jpg"],
    "affectnet arrays": ["train_set/images/2.jpg"],
    "affectnet shared": ["Test/contempt/image0000005.jpg", "Train/Contempt/image0000001.jpg"],
}


@pytest.mark.parametrize("name", CASES)
def test_with_eight_classes_every_layout_gains_its_faces_of_contempt_and_nothing_else(
    tmp_path: Path, name: str
) -> None:
    case = CASES[name]
    case.write(tmp_path / "set")
    listing = DATASETS[case.kind](UPath(tmp_path / "set")).select(ClassChoice(EIGHT))
    result = index_files("set", listing, images=UPath(tmp_path / "images"))
    manifest = result.manifest
    assert manifest.classes == EIGHT
    found = [(s, EIGHT[label]) for s, label in zip(manifest.sample_ids, manifest.labels, strict=True)]
    assert [sample for sample, shown in found if shown == "contempt"] == CONTEMPT.get(name, [])
    assert [pair for pair in found if pair[1] != "contempt"] == [row[:2] for row in case.rows]
    assert listing.dropped == {reason: count for reason, count in case.dropped.items() if reason != "contempt"}
    assert [path for path, _ in result.broken] == [path for path, _ in case.broken]


def test_a_class_that_is_left_out_is_no_class_and_its_faces_are_counted(tmp_path: Path) -> None:
    miniatures.write_mma(tmp_path)
    whole, listing = DATASETS["mma"](UPath(tmp_path)), DATASETS["mma"](UPath(tmp_path))
    faces = [name for _, name in whole.select(ClassChoice()).counts().elements()].count("happiness")
    chosen = listing.select(ClassChoice.parse(None, ["Happy"]))
    assert chosen.classes == tuple(name for name in EXPRESSIONS if name != "happiness")
    assert chosen.dropped == {"happy": faces}
    assert faces > 0


def test_some_classes_of_a_published_set_name_the_others_with_their_faces(tmp_path: Path) -> None:
    miniatures.write_rafdb_official(tmp_path)
    listing = DATASETS["rafdb"](UPath(tmp_path))
    sentence = complaint(listing.select, ClassChoice.parse("neutral,anger"))
    assert "'disgust' (1 face), 'sadness' (1 face), 'surprise' (1 face): leave" in sentence
    assert "--skip disgust,sadness,surprise" in sentence
    chosen = listing.select(ClassChoice.parse("neutral,anger", ["disgust,sadness", "surprise"]))
    assert chosen.counts() == {("test", "neutral"): 1, ("test", "anger"): 1}
    assert chosen.dropped == {"disgust": 1, "sadness": 1, "surprise": 1}
    assert complaint(listing.select, ClassChoice.parse("8", ["hapiness"])).startswith(
        "Unknown class to skip 'hapiness'"
    )


def test_eight_classes_are_indexed_and_listed_by_the_command(tmp_path: Path, cafe: Cafe) -> None:
    miniatures.write_ferplus_png(tmp_path / "fer")
    command = ("data", "index", "ferplus", str(tmp_path / "fer"), "--name", "fer", "--accept-counts")
    output = cafe.fail(*command, "--expressions", "8", code=1)
    assert ["contempt", "1", "0", "0", "1"] in [line.replace("│", " ").split() for line in output.splitlines()]
    assert Manifest.load(UPath(cafe.workspace / "manifests" / "fer.parquet")).classes == EIGHT
    expected = cafe.fail("data", "index", "ferplus", str(tmp_path / "fer"), "--name", "fer", "--expressions", "8")
    assert "contempt" not in expected  # of which no number is known
    assert "which show none of the 8 classes" in output


@pytest.mark.parametrize("name", CASES)
def test_an_object_store_is_read_like_a_disk(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    case.write(tmp_path / "disk")
    store = UPath("memory://") / tmp_path.name
    for path in (tmp_path / "disk").rglob("*"):
        if path.is_file():
            (store / path.relative_to(tmp_path / "disk").as_posix()).write_bytes(path.read_bytes())
    result = index_files("set", DATASETS[case.kind](store), images=store / "images")
    assert rows(result.manifest) == case.rows
    assert result.manifest.read_face(0).dtype == np.uint8
    assert result.manifest.digest == index(case.kind, tmp_path / "disk", tmp_path / "images").manifest.digest


def test_repeated_names_and_test_faces_in_the_training_split_are_reported(tmp_path: Path, cafe: Cafe) -> None:
    miniatures.write_ferplus_png(tmp_path)
    output = cafe.fail("data", "index", "ferplus", str(tmp_path), "--name", "fer", "--accept-counts", code=1)
    assert "1 listed more than once, counted once:\n  FER2013Train/fer0000003.png (" in output
    assert "1 of 1 test faces are also in the training split" in output
    assert "`cafe data audit fer`, then leave them out of the results with --exclude-leaks." in output


@pytest.mark.parametrize(
    ("name", "totals", "contempt"),
    [("ferplus png", (24938, 3186, 3137), [119, 13, 16]), ("label.csv", (24925, 3175, 3122), [120, 16, 15])],
)
def test_the_real_ferplus_is_complete(
    name: str, totals: tuple[int, ...], contempt: list[int], real_ferplus: Path
) -> None:
    found = DATASETS["ferplus"](UPath(real_ferplus / "data" if name == "label.csv" else real_ferplus))
    listing = found.select(ClassChoice())
    assert count_differences(listing.expected, listing.counts()) == []
    splits = Counter(file.split for file in listing.files)
    assert tuple(splits[split] for split in ("train", "val", "test")) == totals
    with_contempt = found.select(ClassChoice(EIGHT))
    assert count_differences(found.expected, with_contempt.counts(), EIGHT) == []
    assert [with_contempt.counts()[split, "contempt"] for split in ("train", "val", "test")] == contempt
    assert len(with_contempt.files) - len(listing.files) == sum(contempt) == listing.dropped["contempt"]


def test_the_pixels_of_a_table_become_the_pictures_and_the_users_folder_stays_as_it_is(tmp_path: Path) -> None:
    miniatures.write_ferplus_csv(tmp_path / "set")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "set").rglob("*")}
    manifest = index("ferplus", tmp_path / "set", tmp_path / "images").manifest
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "set").rglob("*")} == before
    assert manifest.root == str(tmp_path / "images")
    for row, number in enumerate((10, 0, 3, 6)):
        np.testing.assert_array_equal(manifest.read_face(row), np.repeat(ferplus_pixels(number)[..., None], 3, axis=2))
    assert index("ferplus", tmp_path / "set", tmp_path / "elsewhere").manifest.digest == manifest.digest


def test_the_argmax_rule_gives_other_labels_and_is_another_kind(tmp_path: Path) -> None:
    miniatures.write_ferplus_png(tmp_path)
    result = index("ferplus", tmp_path, tmp_path / "images", rule="argmax")
    assert rows(result.manifest) == [
        ("FER2013Test/fer0000009.png", "sadness", "test"),
        ("FER2013Test/fer0000010.png", "surprise", "test"),
        ("FER2013Train/fer0000000.png", "happiness", "train"),
        ("FER2013Train/fer0000001.png", "neutral", "train"),
        ("FER2013Train/fer0000003.png", "fear", "train"),
        ("FER2013Train/fer0000005.png", "neutral", "train"),
        ("FER2013Valid/fer0000006.png", "anger", "val"),
        ("FER2013Valid/fer0000007.png", "neutral", "val"),
        ("FER2013Valid/fer0000008.png", "disgust", "val"),
    ]
    assert (result.manifest.kind, result.listing.dropped) == ("ferplus-argmax", {"NF": 2, "contempt": 1})


@pytest.mark.parametrize(
    ("votes", "majority", "most_voted"),
    [
        ((6, 4, 0, 0, 0, 0, 0, 0, 0, 0), 0, 0),
        ((5, 5, 0, 0, 0, 0, 0, 0, 0, 0), None, 0),  # a tie has no majority
        ((0, 5, 0, 5, 0, 0, 0, 0, 0, 0), None, 1),
        ((5, 1, 1, 1, 1, 1, 0, 0, 0, 0), 0, 0),  # half of ten, but all of what is heard
        ((5, 2, 1, 1, 1, 0, 0, 0, 0, 0), 0, 0),  # 5 of 7
        ((4, 2, 2, 1, 1, 0, 0, 0, 0, 0), None, 0),  # 4 of 8 is not more than half
        ((1, 1, 1, 1, 1, 1, 1, 1, 1, 1), None, 0),  # nobody is heard
        ((0, 0, 0, 0, 0, 0, 0, 6, 4, 0), 7, 7),  # contempt
        ((0, 0, 0, 0, 0, 0, 0, 5, 5, 0), None, 7),  # unknown counts against a majority
        ((4, 0, 0, 0, 0, 0, 0, 0, 6, 0), 8, 0),
        ((0, 0, 0, 0, 0, 2, 0, 0, 0, 8), 9, 5),
        ((0, 0, 0, 0, 0, 0, 0, 0, 0, 10), 9, None),
        ((0, 0, 0, 0, 0, 0, 2, 0, 1, 1), 6, 6),
    ],
)
def test_votes_become_the_label_worked_out_by_hand(
    votes: tuple[int, ...], majority: int | None, most_voted: int | None
) -> None:
    assert choose_majority(votes) == majority
    assert choose_most_voted(votes) == most_voted


def test_a_face_is_cut_out_by_its_box_and_its_colours_can_be_reversed(tmp_path: Path) -> None:
    miniatures.write_affectnet_lists(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "AffectNet" / "manually_annotated_images" / "22" / "b0.png")
    manifest = index("affectnet", tmp_path, tmp_path / "images").manifest
    boxes = [(row["box"], row["width"], row["height"]) for row in manifest.table.to_pylist()]
    assert boxes == [
        ([10, 5, 20, 15], 20, 15),
        ([0, 0, 16, 13], 16, 13),  # -4, -2 lies over the edge
        ([30, 20, 10, 10], 10, 10),
        ([1, 2, 3, 4], 3, 4),
        ([0, 0, 40, 30], 40, 30),
    ]
    np.testing.assert_array_equal(manifest.read_face(2), pixels[20:30, 30:40])
    np.testing.assert_array_equal(manifest.read_face(2, "bgr"), pixels[20:30, 30:40, ::-1])


@pytest.mark.parametrize(
    ("expected", "totals"),
    [
        ("rafdb", (12271, 3068)),
        ("ferplus fer2013new.csv", (24941 - 3, 3186, 3137)),  # three training pictures are listed twice
        ("ferplus label.csv", (24925, 3175, 3122)),
        ("affectnet", (283901, 3500)),
        ("mma", (92968, 17356, 17356)),
    ],
    ids=["rafdb", "ferplus table", "ferplus labels", "affectnet", "mma"],
)
def test_the_built_in_counts_add_up_to_the_published_totals(expected: str, totals: tuple[int, ...]) -> None:
    assert tuple(sum(split.counts) for split in read_expected(expected)) == totals


@pytest.mark.parametrize(
    ("title", "layout", "expected"),
    [
        ("RAF-DB", "", "rafdb"),
        ("FERPlus", "", "ferplus fer2013new.csv"),
        ("FERPlus", " (label.csv)", "ferplus label.csv"),
        ("AffectNet", "", "affectnet"),
        ("MMA", "", "mma"),
    ],
)
def test_the_documented_tables_are_the_built_in_counts(title: str, layout: str, expected: str) -> None:
    text = (Path(__file__).parents[1] / "docs" / "datasets.md").read_text()
    section = text[text.index(f"## {title}") :].split("\n## ")[0]
    lines = [[cell.strip().replace(",", "") for cell in line.strip("|").split("|")] for line in section.splitlines()]
    table = {line[0]: line[1:] for line in lines if len(line) > 2}
    splits = table["expression"]
    for split in read_expected(expected):
        column = splits.index(split.split + layout)
        assert table["all"][column] == str(sum(split.counts))
        if len(split.counts) == len(EXPRESSIONS):
            assert [table[name][column] for name in EXPRESSIONS] == [str(count) for count in split.counts]


def test_counts_differ_certainly_doubtfully_or_by_a_whole_split() -> None:
    expected = (
        Expected("train", (3, 0, 0, 0, 0, 0, 5), "counted"),
        Expected("val", (7,), "a total"),
        Expected("test", (4,), "a total", "unverified"),
    )
    same = Counter({
        ("train", "surprise"): 3, ("train", "neutral"): 5, ("val", "disgust"): 3, ("val", "happiness"): 4,
        ("test", "fear"): 4,
    })  # fmt: skip
    assert count_differences(expected, same) == []
    other = Counter({("train", "surprise"): 3, ("train", "neutral"): 4, ("train", "fear"): 1, ("val", "disgust"): 8})
    found = [(d.split, d.expression, d.expected, d.found, d.certain) for d in count_differences(expected, other)]
    assert found == [
        ("train", "fear", 0, 1, True),
        ("train", "neutral", 5, 4, True),
        ("val", "all", 7, 8, False),
        ("test", "all", 4, 0, True),  # no vagueness explains a split that is not there
    ]
    # Nothing is expected of classes beyond the seven, nor of a total where some of the seven are left out.
    assert count_differences(expected, same + Counter({("val", "contempt"): 9}), EIGHT) == []
    some = EXPRESSIONS[:-1]
    assert count_differences(expected, Counter({("train", "surprise"): 3, ("val", "disgust"): 3}), some) == []


@pytest.fixture
def cafe(tmp_path: Path) -> Cafe:
    """The command line without Ray, which indexing never needs."""
    return Cafe(tmp_path / "work", "")


def test_a_copy_with_other_counts_is_refused_with_a_table_and_indexed_when_accepted(tmp_path: Path, cafe: Cafe) -> None:
    miniatures.write_rafdb_official(tmp_path / "raf")
    (tmp_path / "raf" / "RAF-DB" / "basic" / "Image" / "aligned.zip").touch()
    command = ("data", "index", "rafdb", str(tmp_path / "raf"), "--name", "raf")
    output = cafe.fail(*command)
    lines = [line.replace("│", " ").split() for line in output.splitlines()]
    assert ["happiness", "train", "4,772", "0"] in lines
    assert ["anger", "test", "162", "1"] in lines
    sentence = output.splitlines()[-1]
    assert "is not the complete rafdb (differences in the table: 14)" in sentence
    assert "Image/aligned.zip may still have to be unpacked" in sentence
    assert "--accept-counts" in sentence
    assert not (cafe.workspace / "manifests" / "raf.parquet").exists()
    output = cafe.fail(*command, "--accept-counts", code=1)
    assert "raf: 5 faces, read as official RAF-DB" in output
    assert ["happiness", "train", "4,772", "0"] in [line.replace("│", " ").split() for line in output.splitlines()]
    manifest = Manifest.load(UPath(cafe.workspace / "manifests" / "raf.parquet"))
    assert (len(manifest), manifest.kind) == (5, "rafdb")


def test_doubtful_counts_only_warn(tmp_path: Path, cafe: Cafe) -> None:
    miniatures.write_sfew_official(tmp_path / "sfew")
    output = cafe.succeed("data", "index", "sfew", str(tmp_path / "sfew"), "--name", "sfew")
    assert "Warning: train, all: 7 faces where 891 are expected" in output
    assert "unverified" in output


def test_ferplus_is_indexed_into_the_workspace_by_the_wanted_rule(tmp_path: Path, cafe: Cafe) -> None:
    miniatures.write_ferplus_csv(tmp_path / "fer")
    command = ("data", "index", "ferplus", str(tmp_path / "fer"), "--name", "fer", "--accept-counts")
    output = cafe.fail(*command, "--ferplus-rule", "argmax", code=1)
    assert "3 left out, which show none of the 7 classes: 2 NF, 1 contempt" in output
    manifest = Manifest.load(UPath(cafe.workspace / "manifests" / "fer.parquet"))
    assert (len(manifest), manifest.kind, manifest.root) == (
        9,
        "ferplus-argmax",
        str(cafe.workspace / "images" / "fer"),
    )
    assert "has no meaning for rafdb" in cafe.fail(
        "data", "index", "rafdb", ".", "--name", "x", "--ferplus-rule", "argmax"
    )


def test_a_broken_picture_is_named_and_makes_the_counts_differ(tmp_path: Path, cafe: Cafe) -> None:
    miniatures.write_rafdb_official(tmp_path)
    (tmp_path / "RAF-DB" / "basic" / "Image" / "aligned" / "test_0001_aligned.jpg").write_bytes(b"\xff\xd8\xff garbage")
    output = cafe.fail("data", "index", "rafdb", str(tmp_path), "--name", "raf", "--accept-counts", code=1)
    assert "Image/aligned/test_0001_aligned.jpg: not an image of a known format" in output
    assert ["neutral", "test", "680", "0"] in [line.replace("│", " ").split() for line in output.splitlines()]


def _remove(*names: str) -> Callable[[Path], None]:
    def remove(root: Path) -> None:
        for path in sorted(root.rglob("*")):
            if path.name.casefold() in {name.casefold() for name in names}:
                path.unlink()

    return remove


def _pack(name: str) -> Callable[[Path], None]:
    """Put a folder's archive in its place."""

    def pack(root: Path) -> None:
        (folder,) = (path for path in root.rglob(name) if path.is_dir() and "__MACOSX" not in path.parts)
        for path in sorted(folder.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        folder.rmdir()
        folder.with_suffix(".zip").touch()

    return pack


def _copy_inside(name: str) -> Callable[[Path], None]:
    def copy(root: Path) -> None:
        (path,) = (path for path in root.rglob(name) if "compound" not in path.parts)
        other = root / "copy" / path.relative_to(root)
        other.parent.mkdir(parents=True)
        other.write_bytes(path.read_bytes())

    return copy


def _cut_rows(name: str) -> Callable[[Path], None]:
    def cut(root: Path) -> None:
        (path,) = root.rglob(name)
        path.write_bytes(b"\n".join(path.read_bytes().splitlines()[:-2]))

    return cut


def _number_folders(root: Path) -> None:
    draw(root / "archive (3)" / "Train" / "3" / "x.jpg")


def _dispute_two(root: Path) -> None:
    (path,) = root.rglob("fer2013new.csv")
    path.write_bytes(
        path.read_bytes()
        + b"Training,fer0000000.png,0,2,8,0,0,0,0,0,0,0\r\nPublicTest,FER0000006.png,0,0,0,0,3,0,0,0,0,0\r\n"
    )


def _lead_out(root: Path) -> None:
    (path,) = root.rglob("fer2013new.csv")
    path.write_bytes(path.read_bytes() + b"Training,../../x.png,0,2,8,0,0,0,0,0,0,0\r\n")


def _drop_column(root: Path) -> None:
    (path,) = root.rglob("fer2013new.csv")
    path.write_bytes(path.read_bytes().replace(b"contempt,", b"scorn,"))


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("rafdb official", _pack("aligned"), "aligned.zip is still packed, so unpack it where it lies."),
        ("rafdb official", _remove("list_patition_label.txt"), "holds no label file of RAF-DB .*: give the folder `basic`"),
        ("rafdb official", _copy_inside("list_patition_label.txt"), "holds the label file of RAF-DB more than once"),
        ("rafdb shared", _remove("test_labels.csv"), "holds no test_labels.csv: put it back, as"),
        ("ferplus png", _remove("fer2013new.csv"), r"holds no votes of FERPlus \(fer2013new.csv, or label.csv"),
        ("ferplus png", _dispute_two, "lists 2 faces more than once with different labels, FER2013Train/fer0000000.png .*l"
         "ine 2; .*line 17.*, FER2013Valid/fer0000006.png .*line 8; .*line 18.*: keep one row of each"),
        ("ferplus png", _lead_out, r"fer2013new.csv, line 17 names the picture '../../x.png' in another folder"),
        ("ferplus png", _drop_column, "fer2013new.csv has no column 'contempt'"),
        ("ferplus fer2013.csv", _remove("fer2013.csv"), "holds no pictures for fer2013new.csv: put fer2013.csv"),
        ("ferplus fer2013.csv", _cut_rows("fer2013.csv"), "Row 14 of .*fer2013.csv is not that of fer2013new.csv"),
        ("ferplus fer2013.csv", _cut_rows("fer2013new.csv"), "Row 14 of .*fer2013.csv is not that of fer2013new.csv"),
        ("affectnet lists", _remove("validation.csv"), "holds no validation.csv: put it beside the other list"),
        ("affectnet lists", _pack("manually_annotated_images"), "manually_annotated_images.zip is still packed"),
        ("affectnet arrays", _pack("train_set"), "table: 14.*train_set.zip may still have to be unpacked"),
        ("affectnet shared", _number_folders, "The folder archive .3./Train/3 of .* is numbered"),
        ("sfew official", _pack("Train_Aligned_Faces"), "differences in the table: 1.*Aligned_Faces.zip may still have"),
        ("sfew shared", _pack("sfew2.0_images"), "is still packed"),
        ("mma", _copy_inside("b.jpg"), "holds the data set more than once"),
    ],
)  # fmt: skip
def test_a_damaged_copy_is_one_sentence_with_the_remedy(
    tmp_path: Path, cafe: Cafe, name: str, damage: Callable[[Path], None], message: str
) -> None:
    CASES[name].write(tmp_path / "set")
    damage(tmp_path / "set")
    sentence = cafe.fail("data", "index", CASES[name].kind, str(tmp_path / "set"), "--name", "x").splitlines()[-1]
    assert re.search(message, sentence), sentence


@pytest.mark.parametrize("kind", ["affectnet", "ferplus", "mma", "rafdb", "sfew"])
def test_a_wrong_root_is_one_sentence_that_says_what_it_must_hold(tmp_path: Path, cafe: Cafe, kind: str) -> None:
    assert "is not a folder" in cafe.fail("data", "index", kind, str(tmp_path / "none"), "--name", "x")
    (tmp_path / "empty").mkdir()
    message = cafe.fail("data", "index", kind, str(tmp_path / "empty"), "--name", "x")
    assert f"{tmp_path / 'empty'} holds no " in message
    assert message.count("\n") == 0


CELL = st.one_of(
    st.text(max_size=8),
    st.sampled_from(
        ("", "..", "../x.png", "/etc/passwd", "nan", "1e999", "=1+1", '"', "\0", "fer0000003.png", "anger", "3")
    ),
)
ROWS = st.lists(st.lists(CELL, max_size=14), max_size=6)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(name=st.sampled_from(list(TEXT_FILES)), rows=ROWS, keep=st.booleans(), raw=st.binary(max_size=60))
def test_label_files_of_any_content_are_read_or_one_sentence(
    tmp_path: Path, name: str, rows: list[list[str]], keep: bool, raw: bytes
) -> None:
    case, file = CASES[name], TEXT_FILES[name]
    root = tmp_path / name
    if not root.exists():
        case.write(root)
        (root / "whole").write_bytes(next(root.rglob(file)).read_bytes())
    path = next(root.rglob(file))
    text = "\n".join(",".join(row) for row in rows).encode("utf-8", "surrogatepass")
    path.write_bytes(((root / "whole").read_bytes() if keep else b"") + text + raw)
    assert complaint(index, case.kind, root, tmp_path / "images")[-1:] in ("", ".")
