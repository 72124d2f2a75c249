"""Miniatures of the distributed data sets: the same names, nesting and label files, with the quirks such copies have.

Each builder writes one layout into a folder, wrapped and littered as archives leave it.
"""

from __future__ import annotations

import colorsys
import io
import json
import tarfile
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def draw(path: Path, number: int = 0, size: tuple[int, int] = (12, 12), mode: str = "RGB") -> None:
    """Write a picture of one colour of its own."""
    red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(number * 0.618 % 1, 0.8, 0.9))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (red, green, blue)).convert(mode).save(path)


def litter(root: Path) -> None:
    """Leave behind what archives and desktops leave behind; none of it is a face."""
    for path in (root / "__MACOSX" / "train" / "Happy" / "._1.jpg", root / ".DS_Store", root / "Thumbs.db"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"\0\0\0\1Bud1")


def write_rafdb_official(root: Path) -> None:
    """The authors' folder with its wrapper, its compound set beside it, CRLF, a missing picture and a corrupt row."""
    basic = root / "RAF-DB" / "basic"
    for number, name in enumerate(("train_00001", "train_00002", "train_00003", "test_0001", "test_0002", "test_0003")):
        draw(basic / "Image" / "aligned" / f"{name}_aligned.jpg", number, (100, 100))
        draw(basic / "Image" / "original" / f"{name}.jpg", number, (130, 150))
    (basic / "EmoLabel").mkdir()
    (basic / "EmoLabel" / "list_patition_label.txt").write_bytes(
        b"\xef\xbb\xbftrain_00001.jpg 5\r\ntrain_00002.jpg  1 \r\ntrain_00003.jpg 8\r\n\r\ntrain_00004.jpg 4\r\n"
        b"test_0001.jpg 7\r\ntest_0002.jpg 3\r\nTest_0003.jpg 6\r\n"
    )
    compound = root / "RAF-DB" / "compound" / "EmoLabel"
    compound.mkdir(parents=True)
    (compound / "list_patition_label.txt").write_text("train_0001.jpg 11\n")
    litter(root)


def write_rafdb_shared(root: Path) -> None:
    """A copy with numbered folders and two CSV files; one face lies in the folder of another label."""
    for number, path in enumerate(
        ("train/5/train_00001", "TRAIN/1/train_00002", "train/2/train_00003", "test/7/test_0001")
    ):
        draw(root / "archive" / "DATASET" / f"{path}_aligned.jpg", number, (100, 100))
    (root / "archive" / "train_labels.csv").write_bytes(
        b"image,label\r\ntrain_00001_aligned.jpg,5\r\n train_00002_aligned.jpg , 1\r\n"
        b"train_00003_aligned.jpg,3\r\nbroken\r\n"
    )
    (root / "archive" / "test_labels.csv").write_bytes(b"image,label\ntest_0001_aligned.jpg,7\n")
    litter(root)


# Usage, file and votes for neutral, happiness, surprise, sadness, anger, disgust, fear, contempt, unknown, NF
FERPLUS_ROWS = (
    ("Training", "fer0000000.png", "0,8,2,0,0,0,0,0,0,0"),  # happiness: 8 of 10
    ("Training", "fer0000001.png", "5,0,0,5,0,0,0,0,0,0"),  # a tie: undecided; argmax: the first, neutral
    ("Training", "", "0,0,0,0,0,0,0,0,0,10"),  # no file: not a face
    ("Training", "fer0000003.png", "1,1,1,1,1,1,4,0,0,0"),  # single votes struck out, 4 of 4: fear
    ("Training", "fer0000004.png", "0,0,0,0,0,0,0,6,4,0"),  # contempt
    ("Training", "fer0000005.png", "4,0,0,0,0,0,0,0,6,0"),  # unknown; argmax: neutral
    ("PublicTest", "fer0000006.png", "0,0,0,0,2,0,0,0,0,1"),  # anger: the single NF is struck out
    ("PublicTest", "fer0000007.png", "1,1,1,1,1,1,1,1,1,1"),  # nothing is left: undecided; argmax: neutral
    ("PublicTest", "fer0000008.png", "0,0,0,0,0,3,0,0,0,7"),  # NF; argmax: disgust
    (
        "PrivateTest",
        "fer0000009.png",
        "0,0,0,5,0,0,3,0,2,0",
    ),  # 5 of 10 is not more than half: undecided; argmax: sadness
    ("PrivateTest", "fer0000010.png", "0,0,6,0,0,0,5,0,0,0"),  # surprise: 6 of 11
    ("PrivateTest", "fer0000011.png", "9,0,0,0,0,0"),  # a corrupt row
    ("Training", "fer0000003.png", "1,1,1,1,1,1,4,0,0,0"),  # listed before, with equal votes
    ("PrivateTest", "fer0000010.png", "0,0,0,0,0,0,0,0,0,10"),  # the name of another picture where none belongs
    ("PrivateTest", "fer0000012.png", "0,0,0,0,0,10,0,0,0,0"),  # disgust, but its picture is missing or damaged
)
FERPLUS_HEADER = "Usage,Image name,neutral,happiness,surprise,sadness,anger,disgust,fear,contempt,unknown,NF"
FERPLUS_FOLDERS = {"Training": "FER2013Train", "PublicTest": "FER2013Valid", "PrivateTest": "FER2013Test"}


FERPLUS_TWINS = {0: 10, 12: 3, 13: 10}  # rows that show the picture of another row


def ferplus_pixels(row: int) -> np.ndarray:
    """The picture of a row: every pixel another value, every row another picture but for the twins."""
    row = FERPLUS_TWINS.get(row, row)
    return ((np.arange(48 * 48) * (2 * row + 1) + row) % 256).astype(np.uint8).reshape(48, 48)


def write_ferplus_votes(root: Path) -> None:
    """fer2013new.csv, with a byte-order mark, CRLF and names in another case."""
    lines = [FERPLUS_HEADER.replace("Image name", "image Name "), *(",".join(row) for row in FERPLUS_ROWS)]
    root.mkdir(parents=True, exist_ok=True)
    (root / "fer2013new.csv").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode() + b"\r\n")


def write_ferplus_pictures(root: Path) -> None:
    """The folders of PNG that the repository's script makes; the surprised test face has a twin among the training faces."""
    for number, (usage, name, _) in enumerate(FERPLUS_ROWS[:-1]):
        if name:
            path = root / "data" / FERPLUS_FOLDERS[usage] / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(ferplus_pixels(number)).save(path)


def write_ferplus_png(root: Path) -> None:
    """The repository with PNG folders, in a wrapper."""
    write_ferplus_votes(root / "FERPlus-master")
    write_ferplus_pictures(root / "FERPlus-master")
    litter(root)


def write_ferplus_labels(root: Path) -> None:
    """The PNG folders alone, each with its headerless label.csv: a box as text in two of them, none in the third."""
    write_ferplus_pictures(root)
    for usage, folder in FERPLUS_FOLDERS.items():
        box = "" if usage == "PublicTest" else '"(0, 0, 48, 48)",'
        rows = [f"{name},{box}{votes}" for its, name, votes in FERPLUS_ROWS if its == usage and name]
        (root / "data" / folder / "label.csv").write_bytes("\r\n".join(rows).encode())
    litter(root)


def write_ferplus_csv(
    root: Path, order: tuple[str, ...] = ("emotion", "pixels", "Usage"), name: str = "fer2013.csv"
) -> None:
    """The votes, and the pixels of the original challenge in a folder beside them."""
    write_ferplus_votes(root / "FERPlus")
    (root / "fer2013").mkdir(parents=True)
    lines = [", ".join(order)]
    for number, (usage, _, _) in enumerate(FERPLUS_ROWS):
        pixels = " ".join(map(str, ferplus_pixels(number).ravel())) if number < len(FERPLUS_ROWS) - 1 else "12 300 7"
        cells = {"emotion": "0", "pixels": pixels, "Usage": usage}
        lines.append(",".join(cells[column] for column in order))
    (root / "fer2013" / name).write_bytes("\r\n".join(lines).encode())
    litter(root)


def write_ferplus_other_csv(root: Path) -> None:
    """The same pixels as a second file of the challenge has them: other columns, blanks in the header."""
    write_ferplus_csv(root, ("emotion", "Usage", "pixels"), "icml_face_data.csv")


AFFECTNET_HEADER = (
    "subDirectory_filePath,face_x,face_y,face_width,face_height,facial_landmarks,expression,valence,arousal"
)


def write_affectnet_lists(root: Path) -> None:
    """The lists with boxes, the second without a header; boxes over the edge, a corrupt row, missing pictures."""
    home = root / "AffectNet"
    for number, name in enumerate(("1/a0.jpg", "1/a1.JPG", "22/b0.png", "22/b1.jpg", "3/c0.jpg", "3/c1.jpg")):
        draw(home / "manually_annotated_images" / name, number, (40, 30))
    marks = ";".join(f"{n}.5" for n in range(136))
    train = (
        f"1/a0.jpg,10,5,20,15,{marks},0,0.1,0.2",
        f"1/a1.jpg,-4,-2,20,15,{marks},1,0.1,0.2",
        f"22/b0.png,30,20,20,20,{marks},2,0.1,0.2",
        f"22/b1.jpg,0,0,20,20,{marks},7,0.1,0.2",
        f"22/none.jpg,0,0,20,20,{marks},3,0.1,0.2",
        "22/b1.jpg,0,0,20,20",
        f"22/b1.jpg,NULL,NULL,NULL,NULL,{marks},3,-2,-2",
        f"22/b1.jpg,41,0,20,20,{marks},5,0.1,0.2",
        f"22/any.jpg,0,0,20,20,{marks},10,-2,-2",
    )
    validation = (f"3/c0.jpg,1,2,3,4,{marks},6,0.1,0.2", f"3/c1.jpg,0,0,40,30,{marks},4.0,0.1,0.2")
    lists = home / "Manually_Annotated_file_lists"
    lists.mkdir()
    (lists / "Training.csv").write_bytes("\r\n".join((f"\ufeff{AFFECTNET_HEADER}", *train)).encode())
    (lists / "validation.csv").write_bytes("\n".join(validation).encode())
    litter(root)


def write_affectnet_arrays(root: Path) -> None:
    """One file of each annotation per picture, numbers in one split and texts in the other; one annotation is missing."""
    labels = {"train_set": (0, 1, 7, 3), "val_set": ("4", "5", "x")}
    for number, (split, values) in enumerate(labels.items()):
        folder = root / "AffectNet" / split
        (folder / "annotations").mkdir(parents=True)
        for face, value in enumerate(values):
            draw(folder / "images" / f"{face}.jpg", 10 * number + face, (24, 24))
            for name, array in (("exp", value), ("val", 0.5), ("aro", "-2")):
                np.save(folder / "annotations" / f"{face}_{name}.npy", np.array(array))
    draw(root / "AffectNet" / "train_set" / "images" / "9.jpg", 30)
    litter(root)


def write_affectnet_shared(root: Path) -> None:
    """Cropped faces in folders whose names vary in case, contempt among them."""
    names = (
        "Train/anger",
        "Train/Contempt",
        "Train/Happy",
        "Train/neutral",
        "Test/Anger",
        "Test/contempt",
        "Test/surprise",
    )
    for number, name in enumerate(names):
        draw(root / "archive (3)" / name / f"image{number:07d}.jpg", number, (96, 96))
    (root / "archive (3)" / "labels.csv").write_text(
        "pth,label\nanger/image0000000.jpg,surprise\n"
    )  # known to be wrong
    litter(root)


def write_sfew_official(root: Path) -> None:
    """The aligned faces as the archives unpack, the test faces without labels, raw stills beside them."""
    home = root / "SFEW_2"
    for number, emotion in enumerate(("Angry", "Disgust", "Fear", "Happy", "Neutral", "Sad", "Surprise")):
        name = f"AboutABoy_00015{number}280_00000001.png"
        draw(home / "Train" / "Train_Aligned_Faces" / emotion / name, number, (143, 181))
    draw(home / "Val" / "Val_Aligned_Faces_new" / "Val_Aligned_Faces" / "Happy" / "Juno_1_2.png", 8, (143, 181))
    draw(home / "Val" / "Val_Aligned_Faces_new" / "Val_Aligned_Faces" / "angry" / "Juno_3_4.PNG", 9, (143, 181))
    draw(home / "Test" / "Test_Aligned_Faces" / "Test_001.png", 10, (143, 181))
    draw(home / "Train" / "Angry" / "AboutABoy_000150280_00000001.png", 11, (72, 57))
    litter(root)


def write_sfew_shared(root: Path) -> None:
    """One folder and one table; its numbers are alphabetical, so that only the names can be read."""
    rows = (
        "image_000000.png,0,Angry,Train_Aligned_Faces",
        " image_000001.png , 3 , Happy , Train_Aligned_Faces",
        "image_000002.png,6,SURPRISE,Val_Aligned_Faces",
        "image_000003.png,4,Neutral,Val_Aligned_Faces",
        "image_000004.png,5,Sad,",
        "image_000009.png,2,Fear,Train_Aligned_Faces",
        "image_000004.png,5,Bored,Val_Aligned_Faces",
    )
    for number in range(5):
        draw(root / "sfew20" / "sfew2.0_images" / f"image_{number:06d}.png", number, (143, 181))
    table = "\r\n".join(("image_name,label,emotion,original_split", *rows))
    (root / "sfew20" / "sfew_2.0_labels.csv").write_bytes(b"\xef\xbb\xbf" + table.encode())
    litter(root)


def write_mma(root: Path) -> None:
    """The folders, grey and colour pictures mixed, one empty file."""
    for number, path in enumerate(("train/angry/a", "train/happy/b", "valid/sad/c", "Test/surprise/d", "Test/fear/e")):
        draw(root / "MMAFEDB" / f"{path}.jpg", number, (48, 48), "L" if number % 2 else "RGB")
    (root / "MMAFEDB" / "train" / "angry" / "empty.jpg").touch()
    (root / "MMAFEDB" / "train" / "happy" / "readme.txt").touch()
    litter(root)


def read_tree(root: Path) -> dict[str, bytes]:
    """Every file below a folder by its path there."""
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def write_tar(path: Path, members: Mapping[str, bytes]) -> Path:
    """A tar of files, named `./a` as `tar .` names them where their names begin so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def write_zip(path: Path, members: Mapping[str, bytes], kind: int = zipfile.ZIP_DEFLATED) -> Path:
    """A zip of files, deflated or stored."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def write_samples(path: Path, faces: Iterable[tuple[str, bytes, str]]) -> Path:
    """A shard of WebDataset: a picture (name, content, label) and its label, in a .cls or a .json by turns."""
    members = dict[str, bytes]()
    for number, (name, content, label) in enumerate(faces):
        key = name.partition(".")[0]
        members[name] = content
        members |= (
            {f"{key}.json": json.dumps({"cls": label}).encode()} if number % 2 else {f"{key}.cls": label.encode()}
        )
    return write_tar(path, members)


def write_faces(
    path: Path, faces: Iterable[tuple[str | None, bytes, str | None]], classes: tuple[str, ...], group: int = 5
) -> Path:
    """Parquet as `datasets` writes it: pictures (name, content, label) with numbers for labels, which the schema names."""
    faces = list(faces)
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pictures = pa.array([{"bytes": content, "path": name} for name, content, _ in faces], kind)
    labels = pa.array([-1 if label is None else classes.index(label) for *_, label in faces], pa.int64())
    features = {"image": {"_type": "Image"}, "label": {"names": list(classes), "_type": "ClassLabel"}}
    about = {"huggingface": json.dumps({"info": {"features": features}})}
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"image": pictures, "label": labels}).replace_schema_metadata(about)
    pq.write_table(table, path, row_group_size=group)
    return path
