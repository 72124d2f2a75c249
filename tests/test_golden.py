"""Reference numbers of the published methods, from any files of the layout in `--golden DIR`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from cafe.methods.cafe import Recipe, apply_mask, cafe_losses

LOSS, GRADIENT = 1e-6, 1e-5  # absolute


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    folder = Path(metafunc.config.getoption("--golden"))
    files = sorted(folder.glob("cafe_loss_*.npz"))
    skipped = [pytest.param(None, marks=pytest.mark.skip(reason=f"no reference numbers in {folder}"))]
    metafunc.parametrize("cafe_file", files or skipped, ids=lambda file: getattr(file, "stem", "absent"))


def test_cafe_agrees_in_losses_and_gradients(cafe_file: Path) -> None:
    golden = {name: torch.from_numpy(np.asarray(values)) for name, values in np.load(cafe_file).items()}
    mask_logits, weight, bias = (
        golden[name].clone().requires_grad_() for name in ("mask_logits", "fc_weight", "fc_bias")
    )
    masked = apply_mask(golden["features"], mask_logits, "sigmoid")
    logits = torch.nn.functional.linear(masked, weight, bias)
    losses = cafe_losses(logits, masked, golden["targets"], golden["channel_keep"], Recipe())
    torch.testing.assert_close(logits, golden["logits"], atol=1e-5, rtol=0)
    for ours, theirs in (("classification", "cls"), ("separation", "sep"), ("diverse", "div"), ("total", "total")):
        assert losses[ours].item() == pytest.approx(golden[f"loss_{theirs}"].item(), abs=LOSS), ours
    losses["total"].backward()
    for name, value in (("mask_logits", mask_logits), ("fc_weight", weight), ("fc_bias", bias)):
        torch.testing.assert_close(value.grad, golden[f"grad_{name}"], atol=GRADIENT, rtol=0)
