"""A model as one graph from pixels to probabilities, as ONNX keeps it: for programs without Python and without torch.

Towers and image branches are fed with pictures that Pillow resized. A graph has no Pillow in it, so that the same arithmetic
stands here in tensors: nobody who runs the graph has to prepare a picture, or can prepare it otherwise.
"""

from __future__ import annotations

import json

import numpy as np
import torch
from torch import Tensor, nn

from cafe.inference.model import Model
from cafe.towers.building import quiet
from cafe.views.drawing import ViewPlan
from cafe.views.pixels import scale
from cafe.views.resizing import Resize

OPSET = 18
FACES, PROBABILITIES = "faces", "probabilities"  # names of the graph's input and output
AXES = ("batch", "height", "width")  # those of the input that are of any length


class CleanView(nn.Module):
    """The clean view of faces as a tower or an image branch takes it."""

    def __init__(self, size: int, plan: ViewPlan) -> None:
        super().__init__()
        self.resize, self.mean, self.std = Resize(size, plan.interpolation), plan.mean, plan.std

    def forward(self, faces: Tensor) -> Tensor:
        """Return (N, 3, S, S) float32 of faces (N, H, W, 3) uint8."""
        pixels: Tensor = self.resize(faces)
        return scale(pixels, self.mean, self.std)


class Graph(nn.Module):
    """Tower, standardisation, image branch, mask and classifier of a model, and the averages it takes.

    As `Model.predict` does, it averages the probabilities of all methods, and then those of each face and its mirror image.
    """

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.methods, self.flip = model.methods, model.flip
        self.parts = nn.ModuleList(model.methods).eval()  # so that they are part of this module
        self.needs, self.classes = model.methods[0].needs, len(model.classes)
        self.view = CleanView(model.image_size, model.plan)
        self.tower = self.tower_view = None
        if model.tower:
            self.tower, self.dtype = model.tower.backbone, getattr(torch, model.tower.dtype)
            self.tower_view = CleanView(self.tower.facts.input_size, model.tower.plan)

    def forward(self, faces: Tensor) -> Tensor:
        """Return the probabilities (N, K) float32 of aligned faces (N, H, W, 3) uint8, RGB, all of one size."""
        needs, batch = self.needs, {}
        if "image" in needs:
            batch["image"] = self._mirror(self.view(faces))
        if self.tower is not None and self.tower_view is not None:
            features, spatial = self.tower(self._mirror(self.tower_view(faces)), with_map="map" in needs)
            read = {"features": features, "map": spatial}
            # Methods learned from features as a store keeps them.
            batch |= {name: read[name].to(self.dtype).float() for name in needs & read.keys()}
        shares = [method.predict(batch) for method in self.methods]
        probabilities = shares[0] if len(shares) == 1 else torch.stack(shares).mean(dim=0)
        return probabilities.reshape(2, -1, self.classes).mean(dim=0) if self.flip else probabilities

    def _mirror(self, pictures: Tensor) -> Tensor:
        """Return pictures (N, 3, S, S), followed by their mirror images where these are averaged."""
        return torch.cat([pictures, pictures.flip(3)]) if self.flip else pictures


def write_onnx(model: Model, path: str) -> None:
    """Write a model as ONNX: `faces` (N, H, W, 3) uint8 of any N, H and W → `probabilities` (N, K) float32.

    The names of the K classes are its metadata `labels`, as JSON. The same model gives the same bytes. Needs the packages of
    the extra `export`.
    """
    graph = Graph(model).eval()
    example = torch.zeros(2, 101, 103, 3, dtype=torch.uint8)
    with quiet():
        program = torch.onnx.export(
            graph,
            (example,),
            input_names=[FACES],
            output_names=[PROBABILITIES],
            dynamic_shapes=(dict(enumerate(AXES)),),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    for node in program.model.graph.all_nodes():  # where in which file of this machine each was made
        node.metadata_props.clear()
    program.model.metadata_props["labels"] = json.dumps(model.classes)
    program.save(path)


class Onnx:
    """An exported graph at work on the CPU, by ONNX Runtime."""

    def __init__(self, path: str, threads: int = 0) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3  # 0: all cores; errors alone
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def predict(self, faces: np.ndarray) -> np.ndarray:
        """Return the probabilities (N, K) float32 of faces (N, H, W, 3) uint8."""
        (probabilities,) = self.session.run([PROBABILITIES], {FACES: faces})
        return np.asarray(probabilities)
