"""The synthetic domains: same bytes for the same arguments, honest splits, and faces that obey their action units."""

import io
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from upath import UPath

from cafe.data.expressions import EXPRESSIONS
from cafe.data.readers import DATASETS
from cafe.errors import UserError
from cafe.randomness import random_generator
from cafe.synthetic.domains import DOMAINS, PROTOTYPES, list_samples, render, write
from cafe.synthetic.face import CameraPose, project, trace
from cafe.synthetic.person import draw_person
from cafe.synthetic.portrait import Light, paint

PERSON = draw_person(np.random.default_rng(0))
FRONTAL = CameraPose(yaw=0.0, pitch=0.0, roll=0.0, scale=60.0, centre=(96.0, 96.0))
DAYLIGHT = Light(direction=(0.2, -0.4, 1.0), ambient=0.6)


def trace_prototype(expression: str) -> dict[str, np.ndarray]:
    return trace(PERSON, PROTOTYPES[expression][0])


def measure_aperture(curves: dict[str, np.ndarray]) -> float:
    return float((curves["left_lid_lower"] - curves["left_lid_upper"])[:, 1].max())


def read_tree(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_face_is_the_same_in_any_order(domain: str) -> None:
    keys = [(3, 0, 0), (3, 6, 1), (4, 2, 0)]
    forward = {key: render(0, domain, *key) for key in keys}
    backward = {key: render(0, domain, *key) for key in reversed(keys)}
    assert all(np.array_equal(forward[key], backward[key]) for key in keys)


def test_another_process_renders_the_same_face() -> None:
    code = "from cafe.synthetic.domains import render; import sys; sys.stdout.buffer.write(render(1, 'web', 9, 2, 1))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
    assert other == render(1, "web", 9, 2, 1).tobytes()


@pytest.mark.parametrize("other", [(1, 3, 3, 0), (0, 4, 3, 0), (0, 3, 5, 0), (0, 3, 3, 1)])
def test_seed_identity_expression_and_index_each_change_the_face(other: tuple[int, int, int, int]) -> None:
    seed, identity, expression, index = other
    first, second = render(0, "studio", 3, 3, 0), render(seed, "studio", identity, expression, index)
    assert np.abs(first.astype(int) - second.astype(int)).mean() > 3


@pytest.mark.parametrize("domain", DOMAINS)
def test_pictures_have_the_size_and_channels_of_their_domain(domain: str) -> None:
    look = DOMAINS[domain]
    pictures = [render(0, domain, identity, identity % 7, 0) for identity in range(8)]
    assert all(picture.dtype == np.uint8 and picture.shape[0] == picture.shape[1] for picture in pictures)
    assert all(look.size[0] <= len(picture) <= look.size[1] for picture in pictures)
    colourless = [np.ptp(picture, axis=2).max() == 0 for picture in pictures]
    assert all(colourless) if look.grey else not any(colourless)


def test_domains_differ_as_their_descriptions_say() -> None:
    level = {domain: np.mean([render(0, domain, i, i % 7, 0).mean() for i in range(14)]) for domain in DOMAINS}
    assert level["film"] < 80 < 110 < level["studio"] < level["drawing"]


def test_train_and_test_share_no_identity_and_neither_do_domains() -> None:
    seen: dict[int, tuple[str, str]] = {}
    for domain in DOMAINS:
        for split, identity, _, _ in list_samples(domain, 700):
            assert seen.setdefault(identity, (domain, split)) == (domain, split)
    assert Counter(seen.values())["studio", "test"] == 12
    assert Counter(seen.values())["studio", "train"] == 38


def test_every_identity_shows_every_expression_equally_often() -> None:
    counts = Counter((identity, expression) for _, identity, expression, _ in list_samples("web", 300))
    assert set(counts.values()) == {2}
    assert len(counts) == 21 * len(EXPRESSIONS)


@pytest.mark.parametrize(("faces", "made"), [(1, 28), (70, 70), (300, 294), (1000, 994)])
def test_about_as_many_faces_are_made_as_were_asked_for(faces: int, made: int) -> None:
    assert len(list(list_samples("grey", faces))) == made


@pytest.mark.parametrize(
    ("domain", "suffix", "mode"), [("grey", ".png", "L"), ("web", ".jpg", "RGB"), ("drawing", ".png", "RGB")]
)
def test_write_lays_out_splits_and_expressions_and_writes_the_same_bytes_again(
    tmp_path: Path, domain: str, suffix: str, mode: str
) -> None:
    write(tmp_path, domain, 28, seed=5)
    first = read_tree(tmp_path)
    write(UPath(tmp_path), domain, 28, seed=5)
    assert read_tree(tmp_path) == first
    assert len(first.pop(f"{domain}/people.csv").splitlines()) == 1 + 4
    folders = Counter(name.rsplit("/", 1)[0] for name in first)
    assert folders == {
        f"{domain}/{split}/{expression}": count
        for split, count in (("train", 3), ("test", 1))
        for expression in EXPRESSIONS
    }
    assert {Path(name).suffix for name in first} == {suffix}
    assert {Image.open(io.BytesIO(data)).mode for data in first.values()} == {mode}


def test_a_written_png_is_the_rendered_face(tmp_path: Path) -> None:
    write(tmp_path, "drawing", 28)
    first = list(DOMAINS).index("drawing") * 2000
    stored = np.asarray(Image.open(tmp_path / f"drawing/train/fear/id{first}_00.png"))
    assert np.array_equal(stored, render(0, "drawing", first, EXPRESSIONS.index("fear"), 0))


def test_the_faces_of_one_person_are_a_group(tmp_path: Path) -> None:
    write(tmp_path, "grey", 28)
    groups = {
        (file.path.rsplit("/")[-1][:6], file.group) for file in DATASETS["synthetic"](UPath(tmp_path / "grey")).files
    }
    assert groups == {(f"id{number}", f"id{number}") for number in range(2000, 2004)}


def test_what_a_person_is_like_is_kept_with_its_faces(tmp_path: Path) -> None:
    write(tmp_path, "grey", 28)
    listing = DATASETS["synthetic"](UPath(tmp_path / "grey"))
    assert not listing.ignored
    for file in listing.files:
        assert file.kept == draw_person(random_generator(0, "person", int(str(file.group)[2:]))).describe()
    many = [draw_person(random_generator(0, "person", number)).describe() for number in range(300)]
    found = {column: {one[column] for one in many} for column in many[0]}
    assert found == {
        "sex": {"man", "woman"},
        "age": {"child", "young", "middle", "old"},
        "skin": {"light", "medium", "dark"},
        "glasses": {"no", "yes"},
    }
    (tmp_path / "grey" / "people.csv").write_text("who,sex\nid2000,man\n")
    with pytest.raises(UserError, match="draw the domain again"):
        DATASETS["synthetic"](UPath(tmp_path / "grey"))


def test_mouth_corners_rise_in_happiness_and_sink_in_sadness() -> None:
    happy, neutral, sad = (trace_prototype(name)["mouth_inner_top"][-1] for name in ("happiness", "neutral", "sadness"))
    assert happy[1] < neutral[1] - 0.05
    assert sad[1] > neutral[1] + 0.05
    assert happy[0] > neutral[0] + 0.05  # the zygomatic muscle pulls outwards too


def test_lids_open_in_surprise_and_narrow_in_disgust() -> None:
    surprise, neutral, disgust = (
        measure_aperture(trace_prototype(name)) for name in ("surprise", "neutral", "disgust")
    )
    assert surprise > 1.3 * neutral
    assert disgust < 0.7 * neutral


def test_inner_brows_sink_in_anger_and_rise_in_fear_and_sadness() -> None:
    inner = {name: trace_prototype(name)["right_brow"][0, 1] for name in EXPRESSIONS}
    assert inner["anger"] > inner["neutral"] + 0.08
    assert inner["fear"] < inner["neutral"] - 0.03
    assert inner["sadness"] < inner["neutral"] - 0.03


def test_the_nose_wrinkler_lifts_the_wings_and_the_jaw_drop_lowers_the_chin() -> None:
    rest, wrinkled, dropped = (trace(PERSON, units) for units in ({}, {9: 1.0}, {26: 1.0}))
    assert wrinkled["left_wing"][:, 1].mean() < rest["left_wing"][:, 1].mean() - 0.03
    assert dropped["head"][:, 1].max() > rest["head"][:, 1].max() + 0.1


def test_lips_never_cross_and_brows_stay_above_the_lids() -> None:
    rng = np.random.default_rng(1)
    for _ in range(40):
        person = draw_person(rng)
        for variants in PROTOTYPES.values():
            for units in variants:
                curves = trace(person, units)
                assert (curves["mouth_inner_low"] - curves["mouth_inner_top"])[:, 1].min() >= -1e-9
                assert (curves["right_lid_lower"] - curves["right_lid_upper"])[:, 1].min() >= -1e-9
                assert curves["right_brow"][:, 1].mean() < curves["right_lid_upper"][:, 1].mean()


def test_a_dropped_jaw_paints_a_dark_mouth() -> None:
    levels = []
    for units in ({}, {25: 1.0, 26: 1.0}):
        picture, _ = paint(PERSON, units, FRONTAL, DAYLIGHT, 192, (0.0, 0.0), None, np.random.default_rng(0))
        curves = trace(PERSON, {25: 1.0, 26: 1.0})
        column, row = project(curves["mouth_hole"], FRONTAL).mean(0).round().astype(int)
        levels.append(np.asarray(picture)[row - 2 : row + 3, column - 2 : column + 3].mean())
    assert levels[1] < 0.6 * levels[0]


def test_yaw_moves_the_nose_further_than_the_eyes() -> None:
    points = {name: trace(PERSON, {})[name] for name in ("nose_tip", "left_eye", "right_eye")}
    turned = CameraPose(yaw=0.4, pitch=0.0, roll=0.0, scale=60.0, centre=(96.0, 96.0))
    moved = {name: (project(curve, turned) - project(curve, FRONTAL))[:, 0].mean() for name, curve in points.items()}
    assert moved["nose_tip"] > moved["left_eye"] > 0
    assert moved["nose_tip"] > moved["right_eye"] > 0


def test_an_unknown_domain_names_the_known_ones(tmp_path: Path) -> None:
    sentence = "Unknown synthetic domain 'cartoon': choose drawing, film, grey, studio, web."
    with pytest.raises(UserError) as rendered:
        render(0, "cartoon", 0, 0, 0)
    with pytest.raises(UserError) as written:
        write(tmp_path, "cartoon", 28)
    assert str(rendered.value) == str(written.value) == sentence


def test_too_many_faces_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="choose at most 28000"):
        write(tmp_path, "grey", 50_000)
    assert list(tmp_path.iterdir()) == []
