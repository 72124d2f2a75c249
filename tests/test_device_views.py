"""Views that a device makes are, bit for bit, those that NumPy and Pillow make."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from itertools import product

import numpy as np
import pytest
import torch
from PIL import Image
from upath import UPath

from cafe.data.images import MAX_PIXELS, UnreadableImageError
from cafe.views.device import make_views, philox
from cafe.views.drawing import INTERPOLATIONS, POLICIES, ViewPlan
from cafe.views.rendering import Rendered, Renderer, ViewParameters
from cafe.views.resizing import resize

STATISTICS = ((0.5,) * 3, (0.25,) * 3)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("shape", [(30, 41), (97, 48), (32, 224), (224, 350), (350, 350), (1, 3)])
@pytest.mark.parametrize("size", [32, 48, 224])
def test_a_device_resizes_as_pillow_does(interpolation: str, shape: tuple[int, int], size: int) -> None:
    image = np.random.default_rng(size).integers(0, 256, (*shape, 3), np.uint8)
    wanted = np.asarray(Image.fromarray(image).resize((size, size), INTERPOLATIONS[interpolation]))
    np.testing.assert_array_equal(resize(torch.from_numpy(image)[None], size, interpolation)[0].numpy(), wanted)


def test_a_device_draws_the_numbers_of_numpys_philox() -> None:
    keys = np.random.default_rng(0).integers(0, 2**64, (3, 2), np.uint64)
    for key, words in zip(keys, philox(torch.from_numpy(keys.view(np.int64)), 1001).numpy(), strict=True):
        generator = np.random.Philox(key=int(key[0]) + (int(key[1]) << 64))
        np.testing.assert_array_equal(words.view(np.uint64), generator.random_raw(1001))


KERNEL = """
import numpy as np, torch
from cafe.views.device import add_noise
from cafe.views.noise_kernel import add_noise as kernel
from cafe.views.drawing import gaussian_levels
random = np.random.default_rng(0)
images = torch.from_numpy(random.integers(0, 256, (3, 21, 17, 3), np.uint8))
keys = torch.from_numpy(random.integers(0, 2**64, (3, 2), np.uint64).view(np.int64))
for start in (3, 43):
    wanted = add_noise(images, keys, start, 30.0)
    assert not torch.equal(wanted, images)
    assert torch.equal(kernel(images, keys, start, torch.from_numpy(gaussian_levels(30.0))), wanted)
"""


@pytest.mark.skipif(not find_spec("triton"), reason="needs Triton, which is not installed")
def test_the_kernel_adds_the_same_noise() -> None:
    """Without a graphics card Triton interprets the kernel with NumPy."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", KERNEL], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


class Arrays:
    """Faces in memory, of two sizes; the second row cannot be read."""

    def __init__(self) -> None:
        random = np.random.default_rng(1)
        shapes = [(30, 41), (30, 41), (64, 64), (30, 41)]
        self.images = [random.integers(0, 256, (*shape, 3), np.uint8) for shape in shapes]
        self.sample_ids, self.labels = ["a", "b", "c", "d"], np.zeros(4, np.int64)

    def path(self, row: int) -> UPath:
        return UPath(f"{row}.png")

    remote = False

    def fetch(self, row: int) -> bytes:
        return b""

    def read_face(self, row: int, channels: str = "rgb", max_pixels: int = MAX_PIXELS) -> np.ndarray:
        return self.decode_face(row, self.fetch(row), channels, max_pixels)

    def decode_face(self, row: int, data: bytes, channels: str, max_pixels: int) -> np.ndarray:
        if row == 1:
            raise UnreadableImageError("damaged")
        return self.images[row]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_views_made_on_a_device_equal_those_made_by_pillow(policy: str, interpolation: str) -> None:
    plan = ViewPlan(policy, 3, 30, interpolation, *STATISTICS)
    renderer = Renderer(Arrays(), plan, 48, for_device=True)
    samples = list(product(range(4), range(30)))
    wanted, drawn = renderer.render(samples, {}), renderer(samples, {})
    assert isinstance(drawn, Rendered if policy == "ofer" else ViewParameters)  # whose turned views no device makes
    made = drawn.pictures if isinstance(drawn, Rendered) else make_views(drawn, 48, plan, "cpu").numpy()
    np.testing.assert_array_equal(made, wanted.pictures)
    np.testing.assert_array_equal(drawn.boxes, wanted.boxes)
    assert drawn.unreadable == wanted.unreadable == {1: "damaged"}


def test_a_large_face_is_made_small_before_it_is_sent() -> None:
    faces = Arrays()
    faces.images[0] = np.zeros((600, 600, 3), np.uint8)
    plan = ViewPlan("paper", 0, 2, "bilinear", *STATISTICS)
    assert isinstance(Renderer(faces, plan, 48, for_device=True)([(0, 1)], {}), Rendered)
