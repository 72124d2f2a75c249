"""Copies of one picture among many faces, found although they were resized, compressed again, greyed, brightened, lightly
cropped, mirrored or turned by quarters.

Aligned faces all look alike, so a short perceptual hash proposes far too many pairs. Here an index of small grey signatures
only proposes candidates; each pair is then registered and compared pixel by pixel. Signatures and pictures lie on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from itertools import product
from tempfile import TemporaryFile

import faiss
import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from cafe.spool import ArraySpool, writing

THUMBNAIL = 64  # side of the grey picture everything is computed from; the smallest faces of the field have 48 pixels
SIGNATURE = 12  # side of a signature before it is reduced to COMPONENTS numbers
COMPONENTS = 96
MARGIN = 0.06  # share of each side that a signature leaves out, since a cropped copy may lack it

# How a copy may be framed against its original: zoomed and shifted, in shares of the side. Together with the signatures'
# own tolerance this covers crops of up to 8 % on every side, of either picture.
FRAMES = np.array([
    (zoom + right, zoom - right, zoom + down, zoom - down)  # left, right, top, bottom
    for zoom, right, down in product((-0.04, 0.0, 0.04), (-0.03, 0.0, 0.03), (-0.03, 0.0, 0.03))
])  # fmt: skip

NEIGHBOURS = 3  # nearest signatures per frame
CANDIDATES = 24  # pairs per face that are compared at all
MIN_COSINE = 0.75  # of signatures; 99 of 100 copies cropped by 8 % on every side have more

# What a pair must pass to be compared more finely: {side in pixels: (steps of registration, least correlation)}.
LEVELS = {16: (2, 0.9), 32: (2, 0.97), 64: (2, 0.985)}
# Pictures of two people before a plain wall correlate well as a whole. So the least similar part decides: pictures that are
# no copies stay below this value, be they of one person or of two, and 99.2 % of the copies lie above it.
MIN_SIMILARITY = 0.92
PART = 16  # side of a part in pixels; parts overlap by half
NOISE = 0.01  # added to the variances of a part (a picture's is 1), so that two smooth parts count as alike
MIN_OVERLAP = 0.65  # share of the first picture that the second shows; below it there is too little to compare
DARKEST, BRIGHTEST = 2, 250  # beyond them a grey level may have been clipped
MIN_SHOWN = 0.4  # share of the first picture that the second shows and that is clipped in neither
BATCH = 1024
SIGNED_AT_ONCE = 2**16  # signatures that are multiplied together: in other parts the last bits of products differ
LISTED_AT_ONCE = 2**14  # vectors that are sorted into lists; faiss looks for the lists of 4,096 at a time
FEW = 5_000  # signatures of which all are compared; more lie in lists
LEARNED = 64  # signatures a list is learned from; more make the clustering slower, not better

Progress = Callable[[int, int], None]  # (done, total)


@dataclass(frozen=True)
class Pairs:
    """Copies: row numbers `first[i]` and `second[i]`, and `similarity[i]`, 0.92–1.

    The similarity is the correlation of the least similar part of the two pictures once they are registered.
    """

    first: np.ndarray
    second: np.ndarray
    similarity: np.ndarray

    def __len__(self) -> int:
        return len(self.first)

    @classmethod
    def concatenate(cls, parts: list[Pairs]) -> Pairs:
        """Join several; none give no pairs."""
        empty = cls(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))
        return cls(*(np.concatenate([getattr(part, field.name) for part in (empty, *parts)]) for field in fields(cls)))

    def keep_best(self) -> Pairs:
        """Return every pair once, with its greatest similarity: a symmetrical face is a copy in several ways."""
        order = np.lexsort((-self.similarity, self.first, self.second))
        pairs = np.stack([self.second, self.first])[:, order]
        order = order[np.r_[True, (pairs[:, 1:] != pairs[:, :-1]).any(axis=0)][: len(order)]]
        return Pairs(self.first[order], self.second[order], self.similarity[order])


def draw_thumbnail(pixels: np.ndarray) -> np.ndarray:
    """Return the grey (64, 64) uint8 thumbnail of an RGB picture (H, W, 3), squashed to a square."""
    picture = Image.fromarray(pixels).convert("L")
    return np.asarray(picture.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BILINEAR))  # averages when it shrinks


class CopyIndex:
    """Finds the copies of faces among `thumbnails` (N, 64, 64): exact below 5,000 faces, by inverted lists above.

    Copies may be turned or mirrored: sets are augmented so before they are split. Thumbnails in a spool stay there.
    """

    def __init__(self, thumbnails: np.ndarray | ArraySpool) -> None:
        self.thumbnails = thumbnails
        moment, count = np.zeros((SIGNATURE**2, SIGNATURE**2), np.float32), len(thumbnails)
        for part in _split(count, SIGNED_AT_ONCE):
            signatures = self._sign(part)
            moment += signatures.T @ signatures
        self.projection = _fit_projection(moment, count)
        vectors = ArraySpool((COMPONENTS,), np.float32)
        for part in _split(count, SIGNED_AT_ONCE):
            product = self._sign(part) @ self.projection
            for few in _split(len(product)):
                vectors.extend(_normalise(product[few]))
        self.index = _build(vectors)

    def _sign(self, part: slice) -> np.ndarray:
        """Return the signatures (n, 144) of some thumbnails, as they are framed."""
        start, stop, _ = part.indices(len(self.thumbnails))
        signatures = np.empty((stop - start, SIGNATURE**2), np.float32)
        for few in _split(stop - start):
            pictures = self.thumbnails[start + few.start : min(start + few.stop, stop)]
            signatures[few] = _frame(pictures, np.zeros((1, 4)))
        return signatures

    def find(self, thumbnails: np.ndarray | ArraySpool, progress: Progress = lambda done, total: None) -> Pairs:
        """Return the pairs (row of the index, row of `thumbnails`) that show the same picture.

        Of a face with more than three equal copies in the index, not all need be among them. `progress(done, total)`
        counts faces.
        """
        found = []
        for part in _split(len(thumbnails)):
            progress(part.start, len(thumbnails))
            for batch in _symmetries(thumbnails[part]):
                first, second, frame = self._propose(batch)
                for few in _split(len(first)):
                    one, two = first[few], second[few]
                    kept, similarity = _compare(self.thumbnails[one], batch[two], _starts()[frame[few]])
                    found.append(Pairs(one[kept], two[kept] + part.start, similarity))
        progress(len(thumbnails), len(thumbnails))
        return Pairs.concatenate(found).keep_best()

    def _propose(self, batch: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return rows of the index, rows of the batch and the frames in which their signatures agree best."""
        neighbours = min(NEIGHBOURS, len(self.thumbnails))
        shape = (len(FRAMES), len(batch), neighbours)
        found = self.index.search(_reduce(_frame(batch, FRAMES), self.projection), neighbours)
        cosine, first = (values.ravel() for values in found)
        frames, second = (axis.ravel() for axis in np.indices(shape)[:2])
        order = np.argsort(-cosine, kind="stable")
        order = order[(cosine[order] >= MIN_COSINE) & (first[order] >= 0)]
        _, best = np.unique(second[order] * len(self.thumbnails) + first[order], return_index=True)
        order = order[np.sort(best)]  # each pair once, in its best frame, best pairs first
        order = order[np.argsort(second[order], kind="stable")]
        begin = np.searchsorted(second[order], second[order])
        order = order[np.arange(len(order)) - begin < CANDIDATES]
        return first[order], second[order], frames[order]


def _frame(thumbnails: np.ndarray, frames: np.ndarray) -> np.ndarray:
    """Return the parts of thumbnails (N, 64, 64) inside frames (F, 4) as unit vectors without their mean brightness.

    They are (F · N, 144), those inside the first frame first.
    """
    pictures, signatures = thumbnails.astype(np.float32), []
    for left, right, top, bottom in MARGIN + frames:
        rows, columns = _average(top, 1 - bottom), _average(left, 1 - right)
        signatures.append((rows @ pictures @ columns.T).reshape(len(pictures), -1))
    found = np.concatenate(signatures)
    return _normalise(found - found.mean(axis=1, keepdims=True))


def _average(low: float, high: float) -> np.ndarray:
    """Return the (12, 64) matrix that averages the pixels of [low, high] (shares of the side) in equal steps."""
    edges, pixels = np.linspace(low, high, SIGNATURE + 1)[:, None] * THUMBNAIL, np.arange(THUMBNAIL)
    weights = np.clip(np.minimum(edges[1:], pixels + 1) - np.maximum(edges[:-1], pixels), 0, None)
    return np.asarray(weights / weights.sum(axis=1, keepdims=True), np.float32)


def _fit_projection(moment: np.ndarray, count: int) -> np.ndarray:
    """Return a projection (144, 96) onto principal axes that is halfway to whitening (λ^-¼), from the second moment.

    What all faces share counts less by it. With few faces to learn from it stays close to a rotation.
    """
    width = len(moment)
    moment = (moment + np.eye(width)) / (count + width)  # its trace was `count`: the signatures are unit vectors
    values, axes = np.linalg.eigh(moment)
    return np.asarray(axes[:, -COMPONENTS:] * values[-COMPONENTS:] ** -0.25, np.float32)


def _reduce(signatures: np.ndarray, projection: np.ndarray) -> np.ndarray:
    return _normalise(signatures @ projection)


def _normalise(vectors: np.ndarray) -> np.ndarray:
    return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-6), np.float32)


def _build(vectors: ArraySpool) -> faiss.Index:
    """Return an index of vectors (N, 96): all of them in memory where they are few, else in lists on disk."""
    count, flat = len(vectors), faiss.IndexFlatIP(COMPONENTS)
    if count < FEW:
        flat.add(vectors[:])
        return flat
    lists = min(count // 64, int(4 * count**0.5))
    index = faiss.IndexIVFFlat(flat, COMPONENTS, lists, faiss.METRIC_INNER_PRODUCT)
    index.nprobe = 16
    index.train(vectors[_choose(count, lists * LEARNED, index.cp.seed)])
    stored = _write_lists(flat, vectors)
    stored.this.disown()  # type: ignore[attr-defined]  # it is the index that frees them
    index.replace_invlists(stored, True)
    index.ntotal = count
    return index


def _choose(count: int, most: int, seed: int) -> np.ndarray:
    """Return the numbers of the vectors that lists are learned from, those that faiss would choose of all in memory."""
    if count <= most:
        return np.arange(count)
    order = np.empty(count, np.int32)
    faiss.rand_perm(faiss.swig_ptr(order), count, seed)  # type: ignore[attr-defined]
    return order[:most]


def _write_lists(nearest: faiss.IndexFlatIP, vectors: ArraySpool) -> faiss.OnDiskInvertedLists:
    """Return inverted lists that are read from a file without a name: of each list its vectors, then their numbers."""
    owners, sizes = ArraySpool((), np.int32), np.zeros(nearest.ntotal, np.int64)
    for part in _split(len(vectors), LISTED_AT_ONCE):
        owner = nearest.search(vectors[part], 1)[1][:, 0]
        owners.extend(owner)
        sizes += np.bincount(owner, minlength=len(sizes))
    size = COMPONENTS * 4
    places = np.cumsum([0, *sizes]) * (size + 8)
    with writing(), TemporaryFile(prefix="cafe-") as file:  # the map of it stays
        filled = np.zeros_like(sizes)
        for part in _split(len(vectors), LISTED_AT_ONCE):
            owner = owners[part]
            order = np.argsort(owner, kind="stable")
            codes, numbers = vectors[part][order], order + part.start
            own, starts = np.unique(owner[order], return_index=True)
            for one, start, stop in zip(own, starts, [*starts[1:], len(order)], strict=True):
                file.seek(places[one] + filled[one] * size)
                file.write(codes[start:stop].data)
                file.seek(places[one] + sizes[one] * size + filled[one] * 8)
                file.write(numbers[start:stop].data)
                filled[one] += stop - start
        file.flush()
        lists = faiss.OnDiskInvertedLists(len(sizes), size, f"/dev/fd/{file.fileno()}")
        lists.read_only = True
        lists.prefetch_nthread = 0  # its threads would read the lists of every query once more
        counts = sizes.astype(np.uint64)  # has a name, since a pointer does not keep it
        lists.set_all_lists_sizes(faiss.swig_ptr(counts))
        lists.totsize = int(places[-1])
        lists.do_mmap()
    return lists


def _starts() -> torch.Tensor:
    """Return for each frame where a point of the first picture lies in the second: x ↦ a·x + b, y ↦ c·y + d; (F, 4)."""
    left, right, top, bottom = FRAMES.T
    inside = 1 - 2 * MARGIN
    across, down = (inside - left - right) / inside, (inside - top - bottom) / inside
    shift = (MARGIN + left - across * MARGIN, MARGIN + top - down * MARGIN)
    return torch.tensor(np.stack([across, shift[0], down, shift[1]], axis=1), dtype=torch.float32)


def _symmetries(thumbnails: np.ndarray) -> Iterator[np.ndarray]:
    """Yield thumbnails (N, 64, 64) as they are, mirrored, and both by one, two and three quarter turns."""
    for mirrored, turns in product((False, True), range(4)):
        turned = np.rot90(thumbnails[:, :, ::-1] if mirrored else thumbnails, turns, axes=(1, 2))
        yield np.ascontiguousarray(turned)


def _split(count: int, size: int = BATCH) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, count, size))


def _compare(first: np.ndarray, second: np.ndarray, warp: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return which pairs of thumbnails (P, 64, 64) show one picture, and their similarity."""
    kept = torch.arange(len(first))
    for side, (steps, least) in LEVELS.items():
        one, two = (_shrink(pictures[kept.numpy()], side) for pictures in (first, second))
        clipped = [_find_clipped(pictures[kept.numpy()], side) for pictures in (first, second)]
        warp = _register(one, two, warp, steps)
        moved, seen = _sample(torch.stack([two, clipped[1]], dim=1), warp)
        shown = seen * (clipped[0] < 0.5) * (moved[:, 1] < 0.5)
        one, two = (_soften(_standardise(picture, shown)) for picture in (one, moved[:, 0]))
        enough = (seen.mean(dim=(1, 2)) >= MIN_OVERLAP) & (shown.mean(dim=(1, 2)) >= MIN_SHOWN)
        good = (_correlate(one, two, shown) >= least) & enough
        kept, warp = kept[good], warp[good]
    similarity = _correlate_parts(one[good], two[good], shown[good])
    good = similarity >= MIN_SIMILARITY
    return kept[good].numpy(), similarity[good].numpy()


def _find_clipped(pictures: np.ndarray, side: int) -> torch.Tensor:
    """Return the share of black or white pixels (P, side, side): there a brightened copy has lost what the other shows."""
    clipped = torch.from_numpy((pictures <= DARKEST) | (pictures >= BRIGHTEST)).float()
    return F.avg_pool2d(clipped[:, None], THUMBNAIL // side)[:, 0]


def _shrink(pictures: np.ndarray, side: int) -> torch.Tensor:
    """Return pictures (P, side, side) of zero mean and unit deviation."""
    average = torch.eye(side).repeat_interleave(THUMBNAIL // side, dim=1) * (side / THUMBNAIL)
    small = average @ torch.from_numpy(pictures).float() @ average.T
    return _standardise(small, torch.ones_like(small))


def _register(one: torch.Tensor, two: torch.Tensor, warp: torch.Tensor, steps: int) -> torch.Tensor:
    """Refine the warp that lays `two` on `one`, both (P, n, n), allowing for another gain and brightness.

    Gauss-Newton on the squared difference (Lucas & Kanade 1981), zoom and shift along each axis.
    """
    side = one.shape[-1]
    across, down = torch.zeros_like(two), torch.zeros_like(two)
    across[:, :, 1:-1] = (two[:, :, 2:] - two[:, :, :-2]) * (side / 2)
    down[:, 1:-1] = (two[:, 2:] - two[:, :-2]) * (side / 2)
    layers, place = torch.stack([two, across, down], dim=1), (torch.arange(side) + 0.5) / side
    lowest, highest = torch.tensor([0.65, -0.25, 0.65, -0.25]), torch.tensor([1.5, 0.25, 1.5, 0.25])
    for _ in range(steps):
        moved, seen = _sample(layers, warp)
        picture, right, below = moved.unbind(1)
        slopes = [right * place, right, below * place[:, None], below, picture, torch.ones_like(picture)]
        slope = (torch.stack(slopes, dim=1) * seen[:, None]).flatten(2)  # (P, 6, n²)
        normal = slope @ slope.mT
        normal += torch.diag_embed(1e-4 * normal.diagonal(dim1=1, dim2=2) + 1e-3)  # blank pictures have no slope
        solution = torch.linalg.solve(normal, slope @ (one * seen).flatten(1)[:, :, None])[:, :, 0]
        gain = solution[:, 4:5].clamp(min=0.1)
        warp = (warp + (solution[:, :4] / gain).clamp(-0.05, 0.05)).clamp(lowest, highest)
    return warp


def _sample(layers: torch.Tensor, warp: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return layers (P, C, n, n) seen through the warp, and a mask (P, n, n) of what lies inside them."""
    side = layers.shape[-1]
    place = (torch.arange(side) + 0.5) / side
    x, y = warp[:, 0:1] * place + warp[:, 1:2], warp[:, 2:3] * place + warp[:, 3:4]  # (P, n) each
    shape = (-1, side, side)
    grid = torch.stack([x[:, None, :].expand(shape), y[:, :, None].expand(shape)], dim=3) * 2 - 1
    moved = F.grid_sample(layers, grid, padding_mode="border", align_corners=False)
    inside = ((x > 0) & (x < 1))[:, None, :] & ((y > 0) & (y < 1))[:, :, None]
    return moved, inside.float()


def _standardise(pictures: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return pictures (P, n, n) with zero mean and unit deviation where the mask is 1, and 0 elsewhere."""
    count = mask.sum(dim=(1, 2), keepdim=True).clamp(min=1)
    centred = (pictures - (pictures * mask).sum(dim=(1, 2), keepdim=True) / count) * mask
    return centred / (centred.square().sum(dim=(1, 2), keepdim=True) / count).sqrt().clamp(min=1e-3)


def _correlate(one: torch.Tensor, two: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the correlation (P,) of two pictures where the mask is 1; 0 for blank ones."""
    one, two = _standardise(one, mask), _standardise(two, mask)
    return (one * two).sum(dim=(1, 2)) / mask.sum(dim=(1, 2)).clamp(min=1)


def _correlate_parts(one: torch.Tensor, two: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the least correlation (P,) of a part of two pictures, of what is finer than a quarter of the side."""
    one, two = ((picture - _soften(picture, 17)) * mask for picture in (one, two))
    covariance, *variances = (_pool(values) + NOISE for values in (one * two, one.square(), two.square()))
    return (covariance / (variances[0] * variances[1]).sqrt()).amin(dim=(1, 2))


def _pool(values: torch.Tensor) -> torch.Tensor:
    return F.avg_pool2d(values[:, None], PART, stride=PART // 2)[:, 0]


def _soften(pictures: torch.Tensor, window: int = 3) -> torch.Tensor:
    """Average each pixel with its neighbours, repeating the border: compression changes the finest structure most."""
    side = pictures.shape[-1]
    near = np.clip(np.arange(side)[:, None] + np.arange(window) - window // 2, 0, side - 1)
    average = torch.from_numpy((near[:, :, None] == np.arange(side)).mean(axis=1, dtype=np.float32))  # (n, n)
    return average @ pictures @ average.T
