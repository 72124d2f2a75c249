"""The tower that knows faces: its file read byte by byte, its features those of the network written down plainly."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SHARED
from PIL import Image
from torch.nn import functional

from cafe.errors import UserError
from cafe.methods.baselines.finetune import find_trained
from cafe.synthetic.domains import render
from cafe.towers import names
from cafe.towers.building import load_backbone
from cafe.towers.names import BACKBONES, Layer, parse_backbone
from cafe.views.pixels import normalise

CONVOLUTIONS = [(7, 3, 32)] + [(3, 32, 32)] * 6
CONVOLUTIONS += [(3, 32, 64)] + [(3, 64, 64)] * 7
CONVOLUTIONS += [(3, 64, 128)] + [(3, 128, 128)] * 5
CONVOLUTIONS += [(3, 128, 256)] + [(3, 256, 256)] * 7
BLOCKS = [32, 32, 32, -64, 64, 64, 64, -128, 128, 128, -256, 256, 256, -256]  # channels; below 0: halves the map


@pytest.fixture(scope="module")
def weights() -> Path:
    return Path(str(parse_backbone("face-resnet").file))


def read_plainly(path: Path) -> list[tuple[torch.Tensor, ...]]:
    """Return filters, biases, factors and offsets of every convolution, and last the matrix, found by their sizes."""
    content, position, layers = path.read_bytes(), 0, []

    def floats(tag: bytes, *sizes: int) -> torch.Tensor:
        nonlocal position
        sizes = (*sizes, 1, 1, 1, 1)[:4]
        lengths = [(size.bit_length() + 7) // 8 for size in sizes]
        head = b"\x01\x02" + b"".join(
            bytes([length]) + size.to_bytes(length, "little") for length, size in zip(lengths, sizes, strict=True)
        )
        begin = content.index(head, content.index(tag, position)) + len(head)
        position = begin + 4 * math.prod(sizes)
        return torch.from_numpy(np.frombuffer(content, "<f4", math.prod(sizes), begin).astype(np.float64))

    for side, inputs, outputs in CONVOLUTIONS:
        values = floats(b"con_4", (side * side * inputs + 1) * outputs)
        affine = floats(b"affine_", 2 * outputs)
        filters = values[:-outputs].view(outputs, inputs, side, side)
        layers.append((filters, values[-outputs:], affine[:outputs], affine[outputs:]))
    return [*layers, (floats(b"fc_2", 256, 128).view(256, 128),)]


def run_plainly(path: Path, pictures: np.ndarray) -> dict[str, torch.Tensor]:
    """Return the maps behind every stage, and the identities, of pictures (n, S, S, 3) of 0–255, in float64."""
    *convolutions, (matrix,) = read_plainly(path)
    layers = iter(convolutions)

    def convolve(x: torch.Tensor, stride: int, padding: int) -> torch.Tensor:
        filters, biases, factors, offsets = next(layers)
        x = functional.conv2d(x, filters, biases, stride, padding)
        return x * factors[:, None, None] + offsets[:, None, None]

    x = (torch.from_numpy(pictures).double() - torch.tensor([122.782, 117.001, 104.298]).double()) / 256
    x = functional.max_pool2d(convolve(x.permute(0, 3, 1, 2), 2, 0).clamp(min=0), 3, 2)
    maps = {}
    for number, channels in enumerate(BLOCKS):
        down = channels < 0
        main = convolve(convolve(x, 2 if down else 1, 0 if down else 1).clamp(min=0), 1, 1)
        short = functional.avg_pool2d(x, 2) if down else x
        rows, columns = max(main.shape[2], short.shape[2]), max(main.shape[3], short.shape[3])
        x = torch.zeros(len(x), abs(channels), rows, columns, dtype=torch.float64)
        x[:, :, : main.shape[2], : main.shape[3]] += main
        x[:, : short.shape[1], : short.shape[2], : short.shape[3]] += short
        x = x.clamp(min=0)
        if number + 1 == len(BLOCKS) or BLOCKS[number + 1] < 0:
            maps[f"stage{len(maps) + 1}"] = x
    return {**maps, "final": x.mean((2, 3)) @ matrix}


def load_faces(folder: Path, count: int, size: int) -> np.ndarray:
    """Return real faces (count, S, S, 3) where there are some, else drawn ones."""
    if folder.is_dir():
        paths = sorted(folder.rglob("*.jpg"))
        pictures = [Image.open(path).convert("RGB") for path in paths[:: len(paths) // count][:count]]
    else:
        pictures = [Image.fromarray(render(0, "film", number, number % 7, 0)) for number in range(count)]
    return np.stack([np.asarray(picture.resize((size, size))) for picture in pictures])


def as_the_tower_takes_them(pictures: np.ndarray) -> torch.Tensor:
    tower = load_backbone("face-resnet").facts
    return normalise(
        torch.from_numpy(pictures), torch.zeros(len(pictures), 4, dtype=torch.int64), tower.mean, tower.std
    )


@pytest.mark.parametrize(("size", "count"), [(128, 24), (150, 8), (104, 8)])
def test_features_are_those_of_the_network_written_down_plainly(weights: Path, size: int, count: int) -> None:
    pictures = load_faces(SHARED / "faces", count, size)
    expected = run_plainly(weights, pictures)
    tower = load_backbone("face-resnet", input_size=size)
    layers = [Layer.parse(name if name == "final" else f"{name}/all") for name in tower.layers]
    with torch.inference_mode():
        got = tower.read(as_the_tower_takes_them(pictures), layers)
        pooled, features = tower(as_the_tower_takes_them(pictures), with_map=True)
    for layer, (values, _) in zip(layers, got, strict=True):
        scale = expected[layer.name].abs().max().item()
        assert torch.allclose(values.double(), expected[layer.name].flatten(1), rtol=0, atol=1e-5 * max(1, scale)), (
            layer
        )
    stage = expected["stage3"]
    assert torch.allclose(features.double(), stage, rtol=0, atol=1e-5 * stage.max().item())
    assert torch.allclose(pooled.double(), functional.adaptive_avg_pool2d(stage, 3).flatten(1), rtol=0, atol=1e-5)


# --- the file --------------------------------------------------------------------------------------------------------


def flip(content: bytes, position: int) -> bytes:
    return content[:position] + bytes([content[position] ^ 255]) + content[position + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:10_000_000],
        lambda content: content[:-40],
        lambda content: b"",
        lambda content: flip(content, 5),  # in the name of what the network was trained with
        lambda content: flip(content, content.index(b"con_4") + 6),  # the version of its tensor
        lambda content: flip(content, content.index(b"con_4") + 9),  # how many values
        lambda content: flip(content, content.index(b"affine_")),
        lambda content: content.replace(b"avg_pool_2", b"max_pool_2", 1),
        lambda content: flip(content, content.index(b"fc_2") + 5),  # how many outputs
    ],
)
def test_a_damaged_file_is_refused_in_one_sentence(damage, weights: Path, tmp_path: Path) -> None:
    (tmp_path / "face.dat").write_bytes(damage(weights.read_bytes()))
    with pytest.raises(UserError) as caught:
        load_backbone(f"face-resnet@{tmp_path / 'face.dat'}")
    assert f"'{tmp_path / 'face.dat'}' is not dlib's face recognition network, or is damaged" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_file_of_another_model_is_refused(weights: Path) -> None:
    other = weights.with_name("mmod_human_face_detector.dat")
    with pytest.raises(UserError, match=r"is not dlib's face recognition network.*pip install --force-reinstall"):
        load_backbone(f"face-resnet@{other}")


def test_without_its_package_the_remedy_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = replace(BACKBONES["face-resnet"], package="face_recognition_model/face.dat")
    monkeypatch.setitem(names.BACKBONES, "face-resnet", absent)
    with pytest.raises(UserError, match="run 'pip install face-recognition-model' first"):
        parse_backbone("face-resnet")


def test_the_package_is_found_without_running_it(weights: Path) -> None:
    assert weights.stat().st_size == 22_466_066
    assert "face_recognition_models" not in sys.modules


def test_the_digest_names_the_weights(weights: Path, tmp_path: Path) -> None:
    digest = load_backbone("face-resnet").facts.weights_digest
    content = weights.read_bytes()
    (tmp_path / "same.dat").write_bytes(content)
    (tmp_path / "other.dat").write_bytes(flip(content, 5_000_000))  # in the middle of a filter
    assert load_backbone(f"face-resnet@{tmp_path / 'same.dat'}").facts.weights_digest == digest
    assert load_backbone(f"face-resnet@{tmp_path / 'other.dat'}").facts.weights_digest != digest


def test_only_the_blocks_up_to_the_layer_can_learn() -> None:
    tower = load_backbone("face-resnet")  # read at the third of five stages
    names = {id(parameter): name for name, parameter in tower.tower.named_parameters()}
    learning = {names[id(parameter)].rpartition(".")[0] for parameter in find_trained(tower, 1)}
    assert learning == {f"stages.2.{block}.{half}" for block in range(3) for half in ("first", "second")}
    with pytest.raises(UserError, match="has 3 known blocks, fewer than 4"):
        find_trained(tower, 4)
