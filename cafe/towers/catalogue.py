"""Towers worth trying and what is published of them, listed without loading a library, let alone weights.

timm and open_clip have hundreds more, which all work by their names; here stand those of each family that a first look at a
source needs. The numbers are the libraries' own, and tests hold them to that.
"""

from __future__ import annotations

from dataclasses import asdict, fields
from importlib.metadata import entry_points
from typing import Any

from cafe.plugins import find_entry
from cafe.towers.facts import TowerCard
from cafe.towers.names import BACKBONES, BackboneSpec

WEBLI = "WebLI: captioned pictures of the web"
DINO = "LVD-1689M: pictures of public Instagram posts"
PE = "5.4 billion captioned pictures of the web"
AIM = "DFN-2B, COYO and others: captioned pictures of the web"
META = "captioned pictures of the web, in all languages"

PUBLISHED = {  # SigLIP 2, DINOv3, PE-Core, AIMv2 and MetaCLIP 2 by their names at timm, which fetches them from its hub
    "timm:vit_base_patch16_siglip_224.v2_webli": TowerCard(92_884_224, 224, 768, "Apache-2.0", WEBLI),
    "timm:vit_so400m_patch14_siglip_224.v2_webli": TowerCard(427_680_704, 224, 1152, "Apache-2.0", WEBLI),
    "timm:vit_small_patch16_dinov3.lvd1689m": TowerCard(21_586_944, 256, 384, "DINOv3-License", DINO),
    "timm:vit_base_patch16_dinov3.lvd1689m": TowerCard(85_641_216, 256, 768, "DINOv3-License", DINO),
    "timm:convnext_tiny.dinov3_lvd1689m": TowerCard(27_820_128, 224, 768, "DINOv3-License", DINO),
    "timm:vit_pe_core_tiny_patch16_384.fb": TowerCard(6_042_240, 384, 192, "Apache-2.0", PE),
    "timm:vit_pe_core_base_patch16_224.fb": TowerCard(92_886_528, 224, 768, "Apache-2.0", PE),
    "timm:aimv2_large_patch14_224.apple_pt": TowerCard(309_197_824, 224, 1024, "Apple-ASCL", AIM),
    "timm:vit_huge_patch14_clip_quickgelu_224.metaclip2_worldwide": TowerCard(
        630_766_080, 224, 1280, "CC-BY-NC-4.0", META
    ),
}


def list_towers() -> list[dict[str, Any]]:
    """Return a record for each tower with a name here or of a plug-in, and for those of `PUBLISHED`.

    Its weights are `installed`, on a `hub` or to `download`, in which case `download` says what; what a plug-in does not
    say is None.
    """
    plugged = (entry.name for entry in entry_points(group="cafe.towers"))
    specs = {name: find_entry("towers", name, "backbone") for name in dict.fromkeys([*BACKBONES, *plugged])}
    named = [_describe(name, spec) for name, spec in specs.items()]
    return named + [_describe(name, BackboneSpec("timm", name, card=card)) for name, card in PUBLISHED.items()]


def _describe(name: str, spec: BackboneSpec) -> dict[str, Any]:
    weights = "download" if spec.download else "installed" if spec.package else spec.file or "hub"
    facts = asdict(spec.card) if spec.card else dict.fromkeys(field.name for field in fields(TowerCard))
    return {"tower": name, "weights": weights, "download": spec.download, **facts}
