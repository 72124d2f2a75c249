"""How fast an exported graph predicts faces, beside PyTorch, and how well it, PyTorch, MLflow's pyfunc and its server agree.

    python measurements/export.py WORKSPACE RUN MANIFEST [--ensemble] [--flip] [--weights float16]
                                  [--served http://127.0.0.1:5001/invocations]

Exports the run to a folder of its own, predicts faces of the manifest in batches by PyTorch and by ONNX Runtime on the same
threads, one after the other, and prints the median of several rounds. What counts is processor time, which other programs on
the machine hardly change: with one thread it is the time a free core would take. The difference is taken over all faces.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from urllib.request import Request, urlopen

import numpy as np
import pandas as pd
import torch
from PIL import Image
from upath import UPath

from cafe.data.expressions import EXPRESSIONS
from cafe.inference.graph import Onnx
from cafe.pipeline.release.export import cut_middle, export_run
from cafe.pipeline.release.library import load_model
from cafe.pipeline.release.pyfunc import Pyfunc
from cafe.pipeline.settings import ExportSettings
from cafe.pipeline.workspace import Workspace


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workspace")
    parser.add_argument("run")
    parser.add_argument("manifest")
    parser.add_argument("--served", help="address of `mlflow models serve` with the same export, to be asked as well")
    parser.add_argument("--ensemble", action="store_true", help="of all seeds")
    parser.add_argument("--flip", action="store_true", help="with mirror images averaged")
    parser.add_argument("--weights", default="float32", choices=("float32", "float16"))
    parser.add_argument("--faces", type=int, default=500, help="of which the agreement is taken")
    parser.add_argument("--timed", type=int, default=64, help="of which the speed is taken, in batches of 16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--side", type=int, default=224, help="of the timed faces, in pixels: as `cafe data align` cuts them"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    workspace = Workspace.at(options.workspace)
    folder = UPath(tempfile.mkdtemp())
    settings = ExportSettings(ensemble=options.ensemble, flip=options.flip, weights=options.weights)
    exported = export_run(workspace, options.run, folder, settings)
    print(f"At export: {exported.faces} faces, largest difference {exported.difference:.1e}")
    manifest = workspace.load_manifest(options.manifest)
    rows = np.unique(np.linspace(0, len(manifest) - 1, options.faces).astype(int))
    faces = [cut_middle(manifest.read_face(int(row))) for row in rows]
    model, graph = load_model(str(folder), options.workspace), Onnx(str(folder / "model.onnx"), options.threads)
    expected = model.predict(faces)
    compare("ONNX", expected, np.concatenate([graph.predict(face[None]) for face in faces]))
    records = pd.DataFrame({"image": [encode(face) for face in faces]})
    compare("pyfunc", expected, Pyfunc(folder).predict(records)[list(EXPRESSIONS)].to_numpy())

    if options.served:
        compare("served", expected, ask(options.served, records))

    side = options.side
    timed = np.stack([np.asarray(Image.fromarray(face).resize((side, side))) for face in faces[: options.timed]])
    batches = [timed[start : start + 16] for start in range(0, len(timed), 16)]
    quick = load_model(str(folder), options.workspace, device="cpu", batch_size=16)
    ways: dict[str, Callable[[np.ndarray], object]] = {
        "PyTorch": lambda batch: quick.predict(list(batch)),
        "ONNX Runtime": graph.predict,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(options.rounds + 1):  # the first warms up
        for name, predict in ways.items():
            started = time.process_time()
            for batch in batches:
                predict(batch)
            seconds[name] += [time.process_time() - started] if number else []
    for name, taken in seconds.items():
        speeds = [len(timed) / value for value in taken]
        spread = f"{min(speeds):.1f}–{max(speeds):.1f}, {len(speeds)} rounds"
        print(f"{name}: {statistics.median(speeds):.1f} faces per processor second ({spread})")


def compare(name: str, expected: np.ndarray, got: np.ndarray) -> None:
    """Print how two ways differ over all faces."""
    same = (expected.argmax(axis=1) == got.argmax(axis=1)).mean()
    differences = np.abs(got - expected).max(axis=1)
    print(
        f"{name} and PyTorch: {len(got)} faces, largest difference {differences.max():.1e}, beyond 1e-5 on "
        f"{(differences > 1e-5).sum()} of them; {same:.2%} named alike"
    )


def ask(address: str, records: pd.DataFrame) -> np.ndarray:
    """Return the probabilities a server answers, some faces per request."""
    rows = []
    for first in range(0, len(records), 50):
        data = [[base64.b64encode(content).decode()] for content in records["image"][first : first + 50]]
        body = json.dumps({"dataframe_split": {"columns": ["image"], "data": data}}).encode()
        with urlopen(Request(address, body, {"Content-Type": "application/json"})) as answer:  # noqa: S310  # the user's own
            rows += json.load(answer)["predictions"]
    return np.array([[row[name] for name in EXPRESSIONS] for row in rows])


def encode(face: np.ndarray) -> bytes:
    """Return a face as the bytes of a PNG file."""
    content = io.BytesIO()
    Image.fromarray(face).save(content, "PNG")
    return content.getvalue()


if __name__ == "__main__":
    main()
