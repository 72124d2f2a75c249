"""Reference numbers of the published methods, from any files of the layout in `--golden DIR`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from cafe.methods import cafe, eac, scn
from cafe.methods.cafe import apply_mask, cafe_losses
from cafe.methods.eac import attend, eac_losses
from cafe.methods.rul import add_up_loss, measure_uncertainty, mix
from cafe.methods.scn import WeightedHead, relabel, scn_losses

LOSS, GRADIENT = 1e-6, 1e-5  # absolute


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    folder = Path(metafunc.config.getoption("--golden"))
    for argument in (name for name in metafunc.fixturenames if name.endswith("_file")):  # cafe_file, scn_file, …
        files = sorted(folder.glob(f"{argument.removesuffix('_file')}_loss_*.npz"))
        skipped = [pytest.param(None, marks=pytest.mark.skip(reason=f"no reference numbers in {folder}"))]
        metafunc.parametrize(argument, files or skipped, ids=lambda file: getattr(file, "stem", "absent"))


def load(file: Path) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.asarray(values)) for name, values in np.load(file).items()}


def leaves(golden: dict[str, Tensor], *names: str) -> list[Tensor]:
    return [golden[name].clone().requires_grad_() for name in names]


def check_losses(losses: dict[str, Tensor], golden: dict[str, Tensor], **names: str) -> None:
    for ours, theirs in names.items():
        assert losses[ours].item() == pytest.approx(golden[f"loss_{theirs}"].item(), abs=LOSS), ours


def check_gradients(golden: dict[str, Tensor], **values: Tensor) -> None:
    for name, value in values.items():
        torch.testing.assert_close(value.grad, golden[f"grad_{name}"], atol=GRADIENT, rtol=0)


def test_cafe_agrees_in_losses_and_gradients(cafe_file: Path) -> None:
    golden = load(cafe_file)
    mask_logits, weight, bias = leaves(golden, "mask_logits", "fc_weight", "fc_bias")
    masked = apply_mask(golden["features"], mask_logits, "sigmoid")
    logits = functional.linear(masked, weight, bias)
    losses = cafe_losses(logits, masked, golden["targets"], golden["channel_keep"], cafe.Recipe())
    torch.testing.assert_close(logits, golden["logits"], atol=1e-5, rtol=0)
    check_losses(losses, golden, classification="cls", separation="sep", diverse="div", total="total")
    losses["total"].backward()
    check_gradients(golden, mask_logits=mask_logits, fc_weight=weight, fc_bias=bias)


def test_scn_agrees_in_losses_gradients_and_relabelling(scn_file: Path) -> None:
    golden = load(scn_file)
    (features,) = leaves(golden, "features")
    head = WeightedHead(features.shape[1], golden["logits"].shape[1])
    for layer, name in ((head.classifier, "fc"), (head.attention, "alpha")):
        layer.load_state_dict({key: golden[f"{name}_{key}"] for key in ("weight", "bias")})
    weight, logits = head(features)
    torch.testing.assert_close(weight, golden["attention"], atol=1e-5, rtol=0)
    torch.testing.assert_close(logits, golden["logits"], atol=1e-5, rtol=0)
    recipe = scn.Recipe(margin=golden["margin_1"].item(), high_share=golden["beta"].item())
    losses = scn_losses(logits, weight, golden["targets"], recipe)
    check_losses(losses, golden, classification="cls", rank="rank", total="total")
    losses["total"].backward()
    check_gradients(golden, features=features, alpha_weight=head.attention.weight)
    relabelled = relabel(logits, golden["targets"], golden["margin_2"].item())
    assert relabelled.tolist() == golden["relabelled_targets"].tolist()


def test_rul_agrees_in_loss_and_gradients_although_it_mixes_the_logits(rul_file: Path) -> None:
    golden = load(rul_file)
    mean, log_variance, weight, bias = leaves(golden, "mu", "log_var", "fc_weight", "fc_bias")
    uncertainty, partner = measure_uncertainty(log_variance), golden["permutation"]
    torch.testing.assert_close(mix(mean, uncertainty, partner), golden["mixed"], atol=1e-5, rtol=0)
    mixed = mix(functional.linear(mean, weight, bias), uncertainty, partner)
    torch.testing.assert_close(mixed, golden["logits"], atol=1e-5, rtol=0)
    losses = {"total": add_up_loss(mixed, golden["targets"], partner)}
    check_losses(losses, golden, total="total")
    losses["total"].backward()
    check_gradients(golden, mu=mean, log_var=log_variance, fc_weight=weight)


def test_eac_agrees_in_losses_and_gradients(eac_file: Path) -> None:
    golden = load(eac_file)
    features, flipped, weight, bias = leaves(golden, "map_original", "map_flipped", "fc_weight", "fc_bias")
    logits = functional.linear(functional.adaptive_avg_pool2d(features, 1).flatten(1), weight, bias)
    torch.testing.assert_close(logits, golden["logits"], atol=1e-5, rtol=0)
    attention, flipped_attention = attend(features, weight), attend(flipped, weight)
    torch.testing.assert_close(attention, golden["attention_original"], atol=1e-5, rtol=0)
    torch.testing.assert_close(flipped_attention, golden["attention_flipped"], atol=1e-5, rtol=0)
    losses = eac_losses(logits, attention, flipped_attention, golden["targets"], eac.Recipe())
    check_losses(losses, golden, classification="cls", consistency="consistency", total="total")
    losses["total"].backward()
    check_gradients(golden, map_original=features, map_flipped=flipped, fc_weight=weight)
