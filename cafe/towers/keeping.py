"""A frozen tower kept in the folder of a model, so that the model works where the tower's own weights are not."""

from __future__ import annotations

from pathlib import Path

from upath import UPath

from cafe.files import find_below, place_below, read_file, write_file
from cafe.towers.building import FrozenBackbone
from cafe.towers.names import CONFIG, HUB, IN_FOLDER, parse_backbone, split_name
from cafe.towers.weights import find_configuration, write_tensors

FILE = "tower.safetensors"


def keep_tower(tower: FrozenBackbone, folder: UPath) -> None:
    """Write the weights of a tower, and its configuration where it has one, unless they come with this package."""
    spec = parse_backbone(tower.name)
    if spec.package:
        return
    prefix = "visual." if spec.library == "open_clip" else ""
    write_tensors(folder / FILE, {prefix + name: values for name, values in tower.tower.state_dict().items()})
    if spec.model.endswith(".json"):
        write_file(place_below(folder, Path(spec.model).name), read_file(UPath(spec.model)))
    if spec.configured:
        write_file(folder / CONFIG, read_file(UPath(find_configuration(tower.name, spec))))


def find_tower(name: str, folder: UPath) -> str:
    """Return the name of a tower with the weights kept in a folder, or as it is where the folder keeps none."""
    if not (folder / FILE).exists():
        return name
    head, _, layer = split_name(name)
    if head.startswith(("timm:" + HUB, IN_FOLDER)):
        head = f"{IN_FOLDER}{folder}"
    elif head.startswith("open_clip:") and ".json" in head:
        head = f"open_clip:{find_below(folder, Path(head).name)}"
    elif head.startswith("open_clip:"):
        head = head.partition("/")[0]
    return f"{head}@{folder / FILE}" + (f"#{layer}" if layer else "")
