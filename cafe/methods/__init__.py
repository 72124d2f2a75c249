"""The methods. A new one is a file and a line here; tests walk every entry."""

from __future__ import annotations

from cafe.methods.baselines.finetune import Finetune
from cafe.methods.baselines.image_only import ImageOnly
from cafe.methods.baselines.linear_probe import LinearProbe
from cafe.methods.baselines.mlp import Mlp
from cafe.methods.baselines.nearest_mean import NearestClassMean
from cafe.methods.baselines.zero_shot import ZeroShot
from cafe.methods.cafe import Cafe
from cafe.methods.cafe_map import CafeMap
from cafe.methods.cafe_self import CafeSelf
from cafe.methods.cafe_vector import CafeVector
from cafe.methods.eac import Eac
from cafe.methods.generalisation.coral import Coral
from cafe.methods.generalisation.dann import Dann
from cafe.methods.generalisation.erm import Erm
from cafe.methods.generalisation.group_dro import GroupDro
from cafe.methods.generalisation.irm import Irm
from cafe.methods.generalisation.mixup import Mixup
from cafe.methods.generalisation.mmd import Mmd
from cafe.methods.generalisation.spectral_decoupling import SpectralDecoupling
from cafe.methods.generalisation.vrex import Vrex
from cafe.methods.method import Method
from cafe.methods.ofer import Ofer, OferOwn
from cafe.methods.rul import Rul
from cafe.methods.scn import Scn
from cafe.plugins import find_entry, offer

METHODS: dict[str, type[Method]] = {
    "cafe": Cafe,
    "cafe_map": CafeMap,
    "cafe_vector": CafeVector,
    "cafe_self": CafeSelf,
    "scn": Scn,
    "rul": Rul,
    "eac": Eac,
    "ofer": Ofer,
    "ofer_own": OferOwn,
    "linear_probe": LinearProbe,
    "mlp": Mlp,
    "nearest_class_mean": NearestClassMean,
    "zero_shot": ZeroShot,
    "finetune": Finetune,
    "image_only": ImageOnly,
    "erm": Erm,
    "mixup": Mixup,
    "coral": Coral,
    "mmd": Mmd,
    "irm": Irm,
    "vrex": Vrex,
    "group_dro": GroupDro,
    "dann": Dann,
    "spectral_decoupling": SpectralDecoupling,
}
offer("methods", METHODS, "a subclass of Method", lambda entry: isinstance(entry, type) and issubclass(entry, Method))


def find_method(name: str) -> type[Method]:
    """Return a method by name, ours or a plug-in's; raise `UserError` naming all."""
    found: type[Method] = find_entry("methods", name, "method")
    return found
