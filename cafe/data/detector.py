"""Pictures → boxes and five landmarks of the faces in them: MTCNN (Zhang et al. 2016), three small networks in a row.

The first looks at a picture in many sizes for whatever resembles a face, the second drops most of what it found, the third
decides and says where eyes, nose and mouth are. The weights are the authors', as the package `mtcnn` (MIT) holds them; what
runs them there is TensorFlow, here it is torch. Every step is that of facenet-pytorch, so that crops made with that package,
which holds the same weights and no longer installs beside today's torch, stay comparable.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import joblib
import numpy as np
import torch
from torch import Tensor, nn

from cafe.errors import UserError

PACKAGE = "mtcnn"
INSTALL = "pip install mtcnn==1.0.0"
# SHA-256 of the files of weights. They are pickles: any other content is refused before it is unpickled.
WEIGHTS = {
    "pnet.lz4": "ea6b0c3e685ebee3165326ad6484acc95f2ef78f1c94fbf40a55704fa989f7b5",
    "rnet.lz4": "cb00e6460f3c98b0bfafaba3c0a0ded4bdf6e62cee7174d969e8670d7e757fee",
    "onet.lz4": "94f6ea2f4cf985275ee958cdd762d17b6009348a4fb9d8c6be39ba73ffd22ca3",
}
THRESHOLDS = (0.6, 0.7, 0.7)  # of the three networks, as published
SHRINK = 0.709  # from one size of a picture to the next: half the area
CELL, STRIDE = 12, 2  # pixels of the place that the first network looks at, and from one place to the next
MEAN, SCALE = 127.5, 1 / 128  # of the pixels that the networks see


@dataclass(frozen=True)
class Found:
    """The faces in a picture: boxes (n, 4) as left, top, right, bottom; points (n, 5, 2) as x, y; confidence (n,).

    The points are the two eyes, the nose and the two corners of the mouth, each time the left one in the picture first.
    """

    boxes: np.ndarray
    points: np.ndarray
    confidence: np.ndarray


class Mtcnn(nn.Module):
    """The three networks, which find faces of at least `smallest` pixels."""

    def __init__(self, smallest: int = 20) -> None:
        super().__init__()
        self.smallest = smallest
        self.first = _Network([(3, 10, 3, 2), (10, 16, 3, 0), (16, 32, 3, 0)], None, (4, 2))
        self.second = _Network([(3, 28, 3, 3), (28, 48, 3, 3), (48, 64, 2, 0)], (576, 128), (4, 2))
        self.third = _Network([(3, 32, 3, 3), (32, 64, 3, 3), (64, 64, 3, 2), (64, 128, 2, 0)], (1152, 256), (4, 10, 2))

    @torch.inference_mode()
    def detect(self, pictures: np.ndarray) -> list[Found]:
        """Return the faces in each of some pictures (N, H, W, 3) uint8 RGB of one size, up to eight million pixels."""
        sums = _sum_up(torch.from_numpy(pictures).to(next(self.parameters()).device))
        owners, boxes = _clear(*self._propose(sums), sums)

        moves, scores = self.second(_cut(sums, owners, boxes, 24))
        kept = scores > THRESHOLDS[1]
        owners, boxes, moves, scores = owners[kept], boxes[kept], moves[kept], scores[kept]
        kept = suppress(boxes, scores, owners, 0.7)
        owners, boxes = _clear(owners[kept], _square(_move(boxes[kept], moves[kept], 1)), sums)

        moves, places, scores = self.third(_cut(sums, owners, boxes, 48))
        kept = scores > THRESHOLDS[2]
        owners, boxes, moves, places, scores = owners[kept], boxes[kept], moves[kept], places[kept], scores[kept]
        sides = boxes[:, 2:] - boxes[:, :2] + 1
        shares = places.view(-1, 2, 5).transpose(1, 2)  # x of all, then y of all
        points = shares * sides[:, None] + boxes[:, None, :2] - 1
        found = [part.cpu().numpy() for part in (_move(boxes, moves, 1), points, scores)]
        own = [(owners == number).cpu().numpy() for number in range(len(pictures))]
        return [_drop_covered(Found(*(part[mine] for part in found))) for mine in own]

    def _propose(self, sums: Tensor) -> tuple[Tensor, Tensor]:
        """Return what resembles a face: the numbers (k,) of the pictures and squares (k, 4) in them."""
        height, width = (side - 1 for side in sums.shape[1:3])
        owners, boxes, moves, scores = [], [], [], []
        scale = CELL / self.smallest
        while min(height, width) * scale >= CELL:
            move, score = self.first(_shrink(sums, int(height * scale + 1), int(width * scale + 1)))
            owner, row, column = torch.nonzero(score >= THRESHOLDS[0], as_tuple=True)
            corner = STRIDE * torch.stack([column, row], dim=1).float()
            box = torch.cat([((corner + 1) / scale).floor(), ((corner + CELL) / scale).floor()], dim=1)
            kept = suppress(box, score[owner, row, column], owner, 0.5)
            owners.append(owner[kept])
            boxes.append(box[kept])
            moves.append(move.permute(0, 2, 3, 1)[owner, row, column][kept])
            scores.append(score[owner, row, column][kept])
            scale *= SHRINK
        if not owners:
            return torch.zeros(0, dtype=torch.long, device=sums.device), torch.zeros(0, 4, device=sums.device)
        owner, box = torch.cat(owners), torch.cat(boxes)
        kept = suppress(box, torch.cat(scores), owner, 0.7)
        return owner[kept], _square(_move(box[kept], torch.cat(moves)[kept], 0))


@cache
def _load_suppression() -> Callable[[Tensor, Tensor, float], Tensor]:
    """Return torchvision's non-maximum suppression without the rest of it, whose import takes as long as that of torch."""
    spec = find_spec("torchvision")
    for folder in (spec and spec.submodule_search_locations) or ():
        for library in Path(folder).glob("_C*"):
            torch.ops.load_library(str(library))
    if not hasattr(torch.ops.torchvision, "nms"):  # a release that keeps it elsewhere
        import torchvision  # noqa: F401
    kernel: Callable[[Tensor, Tensor, float], Tensor] = torch.ops.torchvision.nms
    return kernel


def suppress(boxes: Tensor, scores: Tensor, owners: Tensor, most: float) -> Tensor:
    """Return the rows of boxes (n, 4) that overlap no better one of their picture by more than `most`, the best first."""
    overlapping = _load_suppression()
    parts = [torch.nonzero(owners == owner)[:, 0] for owner in owners.unique()]
    kept = torch.cat([owners[:0], *(rows[overlapping(boxes[rows], scores[rows], most)] for rows in parts)])
    return kept[scores[kept].sort(descending=True, stable=True).indices]


class _Network(nn.Module):
    """Convolutions, each with the side of the pool behind it (0: none), a layer of all to all, and a head for each answer.

    Its parameters are registered in the order of the files. The last head's two numbers become the share of *a face*.
    """

    def __init__(
        self, convolutions: Sequence[tuple[int, int, int, int]], full: tuple[int, int] | None, heads: Sequence[int]
    ) -> None:
        super().__init__()
        body: list[nn.Module] = []
        for before, channels, side, pool in convolutions:
            body += [nn.Conv2d(before, channels, side), nn.PReLU(channels)]
            body += [nn.MaxPool2d(pool, 2, ceil_mode=True)] if pool else []
        body += [_Flatten(), nn.Linear(*full), nn.PReLU(full[1])] if full else []
        self.body = nn.Sequential(*body)
        last = full[1] if full else convolutions[-1][1]
        self.heads = nn.ModuleList(nn.Linear(last, count) if full else nn.Conv2d(last, count, 1) for count in heads)

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Return each head's answer to patches (K, 3, S, S), the last one as (K,), of the first network with places."""
        features = self.body(pixels)
        *answers, chances = (head(features) for head in self.heads)
        return *answers, chances.softmax(dim=1)[:, 1]


class _Flatten(nn.Module):
    """Maps (K, C, H, W) as (K, W × H × C), as the authors' software wrote them."""

    def forward(self, features: Tensor) -> Tensor:
        return features.permute(0, 3, 2, 1).flatten(1)


def _sum_up(pictures: Tensor) -> Tensor:
    """Return of pictures (N, H, W, 3) the sums (N, H + 1, W + 1, 3) above and left of each pixel.

    With them the mean of any rectangle costs the same (Crow, SIGGRAPH 1984), exactly, since the sums are integers.
    """
    sums = pictures.cumsum(1, dtype=torch.int32).cumsum(2, dtype=torch.int32)
    return nn.functional.pad(sums, (0, 0, 1, 0, 1, 0))


def _shrink(sums: Tensor, height: int, width: int) -> Tensor:
    """Return all pictures in a smaller size, as the networks see them: (N, 3, height, width)."""
    rows, columns = (
        _cells(torch.zeros(1, device=sums.device), torch.full((1,), side - 1.0, device=sums.device), count)
        for side, count in zip(sums.shape[1:3], (height, width), strict=True)
    )
    (top, bottom), (left, right) = ((low[0], high[0]) for low, high in (rows, columns))
    strips = sums.index_select(1, bottom) - sums.index_select(1, top)
    total = strips.index_select(2, right) - strips.index_select(2, left)
    return _normalise(total, (bottom - top)[:, None] * (right - left))


def _cut(sums: Tensor, owners: Tensor, boxes: Tensor, side: int) -> Tensor:
    """Return the patches (K, 3, side, side) under boxes (K, 4) of the pictures `owners` (K,), as the networks see them."""
    low, high = _pixels(boxes, sums)
    (left, right), (top, bottom) = (_cells(low[:, axis], high[:, axis], side) for axis in (0, 1))
    upper, lower, left, right = top[:, :, None], bottom[:, :, None], left[:, None], right[:, None]
    height, width = sums.shape[1:3]
    places, begin = sums.flatten(0, 2), owners[:, None, None] * height

    def read(row: Tensor, column: Tensor) -> Tensor:
        index = (begin + row) * width + column
        return places.index_select(0, index.flatten()).view(*index.shape, 3)

    total = read(lower, right) - read(upper, right) - read(lower, left) + read(upper, left)
    return _normalise(total, (lower - upper) * (right - left))


def _normalise(total: Tensor, areas: Tensor) -> Tensor:
    """Return sums (K, H, W, 3) over areas of (H, W) or (K, H, W) pixels as means (K, 3, H, W) around 0."""
    return ((total / areas[..., None] - MEAN) * SCALE).permute(0, 3, 1, 2)


def _cells(low: Tensor, high: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Divide each range of pixels (K,) into `count` cells, which share pixels where they do not fit: beginnings, ends."""
    low, length = low.long()[:, None], (high - low).long()[:, None]
    steps = torch.arange(count + 1, device=low.device)
    return low + steps[:-1] * length // count, low - (-steps[1:] * length // count)


def _pixels(boxes: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first pixels (K, 2) of boxes within their pictures, and the first ones behind, as x, y."""
    sides = torch.tensor([sums.shape[2] - 1, sums.shape[1] - 1], device=boxes.device)
    return boxes[:, :2].trunc().clamp(min=1) - 1, boxes[:, 2:].trunc().minimum(sides)


def _clear(owners: Tensor, boxes: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    """Drop boxes that lie outside their pictures."""
    low, high = _pixels(boxes, sums)
    kept = (high > low).all(dim=1)
    return owners[kept], boxes[kept]


def _move(boxes: Tensor, moves: Tensor, extra: int) -> Tensor:
    """Return boxes (K, 4) with each edge moved by a share of the side; the authors count a last pixel from the second on."""
    sides = boxes[:, 2:] - boxes[:, :2] + extra
    return boxes + moves * sides.repeat(1, 2)


def _square(boxes: Tensor) -> Tensor:
    """Return squares around the same middles, as long as the longer sides."""
    sides = boxes[:, 2:] - boxes[:, :2]
    longest = sides.max(dim=1, keepdim=True).values
    corner = boxes[:, :2] + sides * 0.5 - longest * 0.5
    return torch.cat([corner, corner + longest], dim=1)


def _drop_covered(found: Found) -> Found:
    """Drop the less confident of two faces where they share more than .7 of the smaller one."""
    left, top, right, bottom = found.boxes.T
    areas = (right - left + 1) * (bottom - top + 1)
    kept: list[int] = []
    waiting = np.argsort(found.confidence)
    while waiting.size:
        best, waiting = waiting[-1], waiting[:-1]
        kept.append(best)
        across = np.minimum(right[best], right[waiting]) - np.maximum(left[best], left[waiting]) + 1
        down = np.minimum(bottom[best], bottom[waiting]) - np.maximum(top[best], top[waiting]) + 1
        shared = np.maximum(across, 0) * np.maximum(down, 0)
        waiting = waiting[shared / np.minimum(areas[best], areas[waiting]) <= 0.7]
    return Found(found.boxes[kept], found.points[kept], found.confidence[kept])


def load_mtcnn(smallest: int = 20) -> Mtcnn:
    """Return the detector with its weights; raise `UserError` where their package is not installed or another one."""
    package = find_spec(PACKAGE)
    if package is None or not package.submodule_search_locations:
        raise UserError(f"Finding faces needs a detector that is not installed: run '{INSTALL}'.")
    folder = Path(package.submodule_search_locations[0]) / "assets" / "weights"
    detector = Mtcnn(smallest)
    for name, network in zip(WEIGHTS, (detector.first, detector.second, detector.third), strict=True):
        parameters = network.state_dict()
        values = _read_weights(folder / name, WEIGHTS[name])
        network.load_state_dict(dict(zip(parameters, map(_to_torch, values), strict=True)))
    return detector.eval()


def _read_weights(file: Path, digest: str) -> list[np.ndarray]:
    content = file.read_bytes() if file.is_file() else b""
    if hashlib.sha256(content).hexdigest() != digest:
        raise UserError(f"The weights '{file}' are not those of the face detector: run '{INSTALL} --force-reinstall'.")
    weights: list[np.ndarray] = joblib.load(io.BytesIO(content))
    return weights


def _to_torch(values: np.ndarray) -> Tensor:
    """Return Keras' filters (rows, columns, in, out), matrices (in, out) or slopes (1, 1, out) as torch has them."""
    tensor = torch.from_numpy(values)
    if tensor.ndim == 4:
        return tensor.permute(3, 2, 0, 1)
    return tensor.T if tensor.ndim == 2 else tensor.flatten()
