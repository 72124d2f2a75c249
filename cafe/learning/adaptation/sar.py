"""SAR: like TENT, but from confident predictions alone, and towards weights around which little changes."""

from __future__ import annotations

import copy
import math

import numpy as np
import torch
from torch import Tensor, nn

from cafe.learning.adaptation.online import evaluate_online, find_norms, measure_entropy
from cafe.learning.loading import FaceDataset
from cafe.methods.method import Batch, Method

BATCH, RATE, MOMENTUM = 64, 2.5e-4, 0.9  # released script, of ResNet-50 on ImageNet-C: SGD, one step
MARGIN = 0.4  # E_0: the entropy below which a face counts as reliable, by ln K; Sec. 3.2
RADIUS = 0.05  # ρ of sharpness-aware minimisation
COLLAPSED, KEPT = 0.2, 0.9  # the moving average of the entropy, e_m, below which it begins anew, and its momentum
LEFT_ALONE = "layer4"  # the last block of a ResNet, whose batch norms are too sensitive; Appendix


def check_sar(method: Method) -> None:
    """Raise `UserError` for a method without batch norms."""
    find_norms(method, "sar")


def predict_sar(method: Method, dataset: FaceDataset, rows: np.ndarray, device: torch.device) -> np.ndarray:
    """Return probabilities (n, K) by SAR: sharpness-aware and reliable entropy minimisation.

    "Towards Stable Test-Time Adaptation in Dynamic Wild World", Niu et al., ICLR 2023, Alg. 1. Each batch is predicted, then
    one step is taken. Batch norms take the statistics of each batch; only they are in training mode. Raises `UserError` for
    a method without any.
    """
    method = copy.deepcopy(method).eval().requires_grad_(False)
    for norm in find_norms(method, "sar"):
        norm.train()
    return evaluate_online(_Adapting(method), dataset, rows, BATCH, device)


class _Adapting:
    """A method that takes a step with every batch that it predicts."""

    def __init__(self, method: Method) -> None:
        norms = {name for name, module in method.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)}
        adapted = [name for name in norms if LEFT_ALONE not in name]
        self.method = method
        self.affine = [
            parameter.requires_grad_(True)
            for name, parameter in method.named_parameters()
            if name.rpartition(".")[0] in adapted
        ]
        self.optimizer = torch.optim.SGD(self.affine, lr=RATE, momentum=MOMENTUM)
        self.first = [parameter.detach().clone() for parameter in self.affine]
        self.average: float | None = None  # of the entropy, over batches

    def __call__(self, batch: Batch) -> Tensor:
        """Return the probabilities (n, K) of a batch, and learn from it."""
        with torch.enable_grad():
            logits: Tensor = self.method(batch)["logits"].float()
            margin = MARGIN * math.log(logits.shape[1])
            entropies = measure_entropy(logits)
            reliable = entropies < margin
            if reliable.any():
                self._step(entropies[reliable].mean(), batch, reliable, margin)
        return self.method.to_probabilities(logits.detach())

    def _step(self, entropy: Tensor, batch: Batch, reliable: Tensor, margin: float) -> None:
        before = [parameter.detach().clone() for parameter in self.affine]
        gradients = torch.autograd.grad(entropy, self.affine)
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
        with torch.no_grad():  # where the entropy around these weights is highest, Eq. 4
            for parameter, gradient in zip(self.affine, gradients, strict=True):
                parameter += RADIUS / (norm + 1e-12) * gradient
        again = measure_entropy(self.method(batch)["logits"].float())[reliable]
        again = again[again < margin]
        gradients = torch.autograd.grad(again.mean(), self.affine) if len(again) else ()
        with torch.no_grad():
            for parameter, value in zip(self.affine, before, strict=True):
                parameter.copy_(value)
        if not len(again):
            return
        for parameter, gradient in zip(self.affine, gradients, strict=True):
            parameter.grad = gradient
        self.optimizer.step()
        mean = again.mean().item()
        self.average = mean if self.average is None else KEPT * self.average + (1 - KEPT) * mean
        if self.average < COLLAPSED:
            self._begin_anew()

    def _begin_anew(self) -> None:
        with torch.no_grad():
            for parameter, value in zip(self.affine, self.first, strict=True):
                parameter.copy_(value)
        self.optimizer.state.clear()
        self.average = None
