"""Frozen towers: large image models of open_clip, timm and dlib that turn a face into features and are never trained.

Every number about a tower (width, map grid, input size, statistics, weights digest) is taken from the tower itself, so that
a new one needs no constants and the cache key cannot be wrong.
"""

from __future__ import annotations

import logging
import math
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from cafe.errors import UserError, quote, unknown
from cafe.towers import face
from cafe.towers.face import FaceResnet
from cafe.towers.facts import TowerFacts
from cafe.towers.layers import FACE_READER, Reader, choose_open_clip_reader, choose_timm_reader, read_layers
from cafe.towers.names import FINAL, FOLDER, BackboneSpec, Layer, open_clip_name, parse_backbone, timm_name
from cafe.towers.weights import digest_state_dict, find_configuration, read_weights

PRECISIONS = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MOST_GROWTH = 4  # how many times the values of its file a configured tower may have: position embeddings are resized
LARGEST_INPUT = 4096  # pixels, as `--input-size` takes them
# What timm and torch raise for a configuration that makes no sense.
SENSELESS = (TypeError, ValueError, LookupError, AttributeError, RuntimeError, AssertionError, ArithmeticError)


class FrozenBackbone(nn.Module):
    """A tower in evaluation mode that needs no gradient; outputs are float32 whatever its precision.

    `name` is as the user wrote it, `layer` what is read of the tower, `layers` the names of all that can be.
    """

    def __init__(self, name: str, spec: BackboneSpec, built: _Built, precision: str) -> None:
        super().__init__()
        self.name, self.layer, self.precision = name, spec.layer, precision
        self.layers = (*built.reader.layers, FINAL)
        self._reader, self._spec = built.reader, replace(spec, model=built.model or spec.model)
        self.tower = built.module.to(PRECISIONS[precision]).eval().requires_grad_(False)
        width, map_shape = self._measure(spec.layer, built.input_size)
        self.facts = TowerFacts(
            architecture=self._spec.architecture,
            weights_digest=built.weights_digest,
            width=width,
            map_shape=map_shape,
            input_size=built.input_size,
            mean=_triple(built.mean),
            std=_triple(built.std),
            normalisation=spec.normalisation,
        )

    def describe(self, layer: Layer) -> TowerFacts:
        """Return the facts of this tower read at another layer; raise UserError for one it has not."""
        width, map_shape = self._measure(layer, self.facts.input_size)
        architecture = replace(self._spec, layer=layer).architecture
        return replace(self.facts, architecture=architecture, width=width, map_shape=map_shape)

    def _measure(self, layer: Layer, input_size: int) -> tuple[int, tuple[int, int, int] | None]:
        """Return width and map of a layer for one zero image; a map counts only if the same features come with it."""
        for part in layer.parts:
            if part.name not in self.layers:
                raise unknown(f"layer of '{self._spec.architecture.partition('#')[0]}'", part.name, self.layers)
        image = torch.zeros(1, 3, input_size, input_size)
        with torch.no_grad():  # not inference mode: tensors a tower keeps from it could never be trained
            ((pooled, _),) = self.read(image, [layer])
            if pooled.ndim != 2:
                raise UserError(f"The backbone '{self.name}' gives no single vector per image: choose another model.")
            ((again, features),) = self.read(image, [layer], with_map=True)
        known = features is not None and again.shape == pooled.shape
        if features is None or not (known and torch.allclose(again, pooled, atol=1e-4, rtol=1e-3)):
            return pooled.shape[1], None
        return pooled.shape[1], (features.shape[1], features.shape[2], features.shape[3])

    def forward(self, images: Tensor, with_map: bool = False) -> tuple[Tensor, Tensor | None]:
        """Return features (N, width) and, on request, the map (N, C, H, W) of normalised images (N, 3, S, S).

        The features of the tower's end are what the library gives: open_clip's `encode_image`, not L2-normalised; timm's
        model with no classifier. Raises UserError when a map is asked of a tower that has none.
        """
        if with_map and self.facts.map_shape is None:
            raise UserError(f"The backbone '{self.name}' has no known feature map: use its pooled features only.")
        features, spatial = self.read(images, [self.layer], with_map)[0]
        return features, spatial if with_map else None

    def read(
        self, images: Tensor, layers: Sequence[Layer], with_map: bool = False
    ) -> list[tuple[Tensor, Tensor | None]]:
        """Return what `forward` gives, for several layers of one pass."""
        return read_layers(self._reader, self.tower, images.to(PRECISIONS[self.precision]), layers, with_map)

    def train(self, mode: bool = True) -> FrozenBackbone:
        """Stay in evaluation mode, also inside a method that is being trained."""
        super().train(False)
        return self


def load_backbone(name: str, precision: str = "fp32", input_size: int | None = None) -> FrozenBackbone:
    """Load a tower on the CPU, frozen, in `fp32`, `bf16` or `fp16`; `input_size` (pixels) overrides the tower's own.

    Raises UserError when the name, the weights or the input size do not fit, or the hub cannot be reached.
    """
    if precision not in PRECISIONS:
        raise unknown("precision", precision, PRECISIONS)
    spec = parse_backbone(name)
    if spec.configured:
        find_configuration(name, spec)  # before weights that may be none of timm's are fetched
    tensors = read_weights(name, spec)
    build = BUILDERS[spec.library]
    with quiet():
        try:
            return FrozenBackbone(name, spec, build(name, spec, tensors, input_size), precision)
        except (AssertionError, RuntimeError, ValueError, IndexError) as error:
            if input_size is None and spec.configured:
                raise _refuse_configuration(name, error) from error
            if input_size is None:
                raise
            raise UserError(
                f"The backbone '{name}' cannot take input size {input_size} ({quote(error)}): leave it out to use "
                "its own."
            ) from error


@dataclass(frozen=True)
class _Built:
    """A module with its weights, and how its library feeds and reads it."""

    module: nn.Module
    reader: Reader
    weights_digest: str
    input_size: int
    mean: Iterable[float]
    std: Iterable[float]
    model: str = ""  # the library's name for it, where that of the tower is of a repository or a folder


def _build_open_clip(name: str, spec: BackboneSpec, tensors: dict[str, Tensor], input_size: int | None) -> _Built:
    import open_clip
    from open_clip.convert import convert_state_dict
    from open_clip.model import resize_pos_embed

    model = open_clip_name(spec)
    in_timm = bool(open_clip.get_model_config(model)["vision_cfg"].get("timm_model_name"))
    # Towers of open_clip's own are laid out without memory and take the file's tensors as they are, which saves two
    # seconds of random numbers; timm's hold buffers no file has. Nobody needs the text tower: it is kept minimal.
    device = "cpu" if in_timm else "meta"
    with torch.device(device):
        whole = open_clip.create_model(
            model,
            load_weights=False,
            pretrained_text=False,
            device=device,
            force_image_size=None if in_timm else input_size,
            text_cfg={"context_length": 8, "vocab_size": 8, "width": 64, "heads": 1, "layers": 1},
        )
    tensors = convert_state_dict(whole, tensors)
    resize_pos_embed(tensors, whole)
    module = whole.visual
    visual = {
        key.removeprefix("visual."): tensor
        for key, tensor in tensors.items()
        if key.startswith("visual.") and not key.startswith(spec.left_out)
    }
    load_tensors(name, module, visual, input_size)
    digest = digest_state_dict(module.state_dict())
    if in_timm and input_size is not None:
        module.set_input_size(input_size)
    preprocessing = {**module.preprocess_cfg, **_published_preprocessing(spec, model)}
    size = module.image_size if isinstance(module.image_size, int) else module.image_size[0]
    reader = choose_open_clip_reader(module)
    return _Built(module, reader, digest, input_size or size, preprocessing["mean"], preprocessing["std"])


def _published_preprocessing(spec: BackboneSpec, model: str) -> dict[str, Any]:
    """Return what the published weights of a model are fed with; for a local file, only where all of them agree."""
    import open_clip

    tags = [spec.tag] if spec.tag else open_clip.list_pretrained_tags_by_model(model)
    published = [open_clip.get_pretrained_cfg(model, tag) for tag in tags]
    keys = ("mean", "std", "interpolation")
    agreed = published and all(all(other.get(key) == published[0].get(key) for key in keys) for other in published)
    return {key: published[0][key] for key in keys if published[0].get(key)} if agreed else {}


def _build_timm(name: str, spec: BackboneSpec, tensors: dict[str, Tensor], input_size: int | None) -> _Built:
    import timm

    module = _create_timm(name, spec, tensors).eval()
    own = module.state_dict()
    if spec.package:
        tensors = _rename_by_order(name, tensors, own)
    convert = getattr(sys.modules[type(module).__module__], "checkpoint_filter_fn", None)  # older layouts, grid sizes
    if convert is not None:
        tensors = convert(tensors, module)
    heads = module.pretrained_cfg.get("classifier") or ()
    heads = tuple(f"{head.partition('.')[0]}." for head in ((heads,) if isinstance(heads, str) else heads))
    load_tensors(
        name, module, {key: t for key, t in tensors.items() if key in own or not key.startswith(heads)}, input_size
    )
    digest = digest_state_dict(module.state_dict(), getattr(module, "pretrained_model_args", None))
    resolve: Any = timm.data.resolve_model_data_config
    preprocessing = resolve(module)
    if input_size is not None and hasattr(module, "set_input_size"):
        module.set_input_size((input_size, input_size))
    size = input_size or preprocessing["input_size"][-1]
    model = module.pretrained_cfg["architecture"] if spec.configured else spec.model
    return _Built(module, choose_timm_reader(module), digest, size, preprocessing["mean"], preprocessing["std"], model)


def _create_timm(name: str, spec: BackboneSpec, tensors: Mapping[str, Tensor]) -> Any:
    """Return a model of timm without weights and classifier.

    Raises `UserError` for a configuration that timm cannot build, or of a far larger model than its weights.
    """
    import timm

    if not spec.configured:
        return timm.create_model(timm_name(spec), num_classes=0)
    source = f"{FOLDER}{find_configuration(name, spec).parent}"
    try:
        with torch.device("meta"):  # which takes no memory
            planned: Any = timm.create_model(source, num_classes=0)
        resolve: Any = timm.data.resolve_model_data_config
        preprocessing = resolve(planned)
        mean, std = (_triple(preprocessing[statistic]) for statistic in ("mean", "std"))
        if not all(map(math.isfinite, (*mean, *std))) or min(std) <= 0:
            raise ValueError("statistics by which no picture can be normalised")
        there = sum(tensor.numel() for tensor in tensors.values())
        if sum(tensor.numel() for tensor in planned.state_dict().values()) > MOST_GROWTH * there:
            raise ValueError(f"more than {MOST_GROWTH} times the values that its weights have")
        if preprocessing["input_size"][-1] not in range(1, LARGEST_INPUT + 1):
            raise ValueError(f"an input of other than 1 to {LARGEST_INPUT} pixels")
        return timm.create_model(source, num_classes=0)
    except SENSELESS as error:
        raise _refuse_configuration(name, error) from error


def _refuse_configuration(name: str, error: Exception) -> UserError:
    return UserError(
        f"timm cannot build what the configuration of '{name}' says ({type(error).__name__}: {quote(error)}): give another "
        "tower, or install the version of timm that it needs."
    )


def _build_face(name: str, spec: BackboneSpec, tensors: dict[str, Tensor], input_size: int | None) -> _Built:
    module = FaceResnet()
    load_tensors(name, module, tensors)
    size = input_size or face.INPUT_SIZE
    return _Built(module, FACE_READER, digest_state_dict(module.state_dict()), size, face.MEAN, face.STD)


BUILDERS = {"open_clip": _build_open_clip, "timm": _build_timm, "dlib": _build_face}


def _rename_by_order(name: str, tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give packaged tensors the tower's names, in order; the last ones belong to the classifier, which the tower lacks."""
    renamed = dict(zip(own, tensors.values(), strict=False))
    kinds = [key.rpartition(".")[2] for key in tensors][: len(own)] == [key.rpartition(".")[2] for key in own]
    if not kinds or any(own[key].shape != tensor.shape for key, tensor in renamed.items()):
        raise UserError(f"The packaged weights of '{name}' are not in the tower's order: install the tested versions.")
    return renamed


def load_tensors(name: str, module: nn.Module, tensors: Mapping[str, Tensor], input_size: int | None = None) -> None:
    """Give a module its tensors; raise `UserError` unless they are exactly its own in name and shape."""
    own = module.state_dict()
    missing = [key for key in own if key not in tensors]
    unexpected = [key for key in tensors if key not in own]
    misshapen = [key for key in own if key in tensors and own[key].shape != tensors[key].shape]
    if missing or unexpected or misshapen:
        at = f" at input size {input_size}" if input_size else ""
        remedy = "give weights of this very model" + (", or leave the input size out" if input_size else "")
        first = (missing + misshapen + unexpected)[0]
        raise UserError(
            f"The weights do not fit the backbone '{name}'{at}: {len(missing)} tensors missing, {len(unexpected)} "
            f"unexpected, {len(misshapen)} of another shape, the first being '{first}'; {remedy}."
        )
    module.load_state_dict({key: tensors[key].to(own[key].dtype) for key in own}, assign=True)


def _triple(values: Iterable[float]) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue


@cache
def _silence_libraries() -> None:
    """Ignore the libraries' warnings, once for the process: filters that come and go are not safe among threads."""
    warnings.filterwarnings("ignore", module=r"(open_clip|timm|torch|torchvision|huggingface_hub)\b")


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the libraries' warnings and logs; they log to the root logger, which must not get a handler by that."""
    root, handler, level = logging.getLogger(), logging.NullHandler(), logging.root.manager.disable
    root.addHandler(handler)
    logging.disable(logging.ERROR)
    try:
        _silence_libraries()
        yield
    finally:
        logging.disable(level)
        root.removeHandler(handler)
