"""SHOT: all but the classifier goes on learning from the target's faces, seen many times before any is predicted."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from cafe.errors import UserError
from cafe.learning.adaptation.online import (
    find_classifier,
    measure_entropy,
    name_method,
    order_faces,
    split_batches,
    unshuffle,
)
from cafe.learning.loading import FaceDataset
from cafe.methods.method import Batch, Method
from cafe.randomness import random_generator

# Released script: SGD with Nesterov's momentum, pseudo labels anew in every epoch, a tenth of the rate for a backbone.
BATCH, EPOCHS, RATE, BACKBONE_RATE, MOMENTUM, DECAY = 64, 15, 1e-2, 1e-3, 0.9, 1e-3
PSEUDO = 0.3  # β: what the cross-entropy with the pseudo labels weighs
TINY = 1e-5  # added to a share before its logarithm is taken
BACKBONES = ("branch.", "tower.")  # beginnings of the names of what was trained on pictures


def check_shot(method: Method) -> nn.Linear:
    """Return the last linear layer of a method; raise `UserError` where there is none, or nothing else to learn."""
    classifier = find_classifier(method, "keeps", "shot")
    fixed = {id(parameter) for parameter in classifier.parameters()}
    if all(id(parameter) in fixed for parameter in method.parameters()):
        raise UserError(
            f"SHOT leaves the last linear layer as it is, and {name_method(method)} has nothing else to learn: evaluate it "
            "without --test-time shot."
        )
    return classifier


def predict_shot(method: Method, dataset: FaceDataset, rows: np.ndarray, device: torch.device) -> np.ndarray:
    """Return probabilities (n, K) by SHOT: source hypothesis transfer.

    "Do We Really Need to Access the Source Data? Source Hypothesis Transfer for Unsupervised Domain Adaptation", Liang et
    al., ICML 2020: predictions should be confident and of all classes (information maximisation, Eq. 3), and agree with the
    nearest class mean (Eq. 6). As the released script but for its random crops: the clean view is learned from. Raises
    `UserError` for a method that does not end in a linear layer, or that is nothing else.
    """
    method = copy.deepcopy(method)
    classifier, features = check_shot(method), list[Tensor]()
    classifier.requires_grad_(False)
    hook = classifier.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0].detach().float()))
    order = order_faces(rows)
    batches = split_batches(rows[order], BATCH)

    def read() -> tuple[Tensor, Tensor]:
        """Return the logits (n, K) and the features (n, C) of all faces, in the order in which they come."""
        method.eval()
        features.clear()
        with torch.no_grad():
            logits = [method(batch)["logits"].float() for batch in dataset.load(batches, 0, device)]
        return torch.cat(logits), torch.cat(features)

    places = {row: place for place, row in enumerate(rows[order].tolist())}
    optimizer, rates = _build_optimizer(method)
    steps = EPOCHS * len(batches)
    for epoch in range(EPOCHS):
        pseudo = find_pseudo_labels(*read())
        method.train()
        shuffled = random_generator("test time", "shot", epoch).permutation(rows)
        torch.manual_seed(epoch)  # for dropout
        for step, batch in enumerate(
            dataset.load(split_batches(shuffled, BATCH), 0, device), start=epoch * len(batches)
        ):
            decay = (1 + 10 * (step + 1) / steps) ** -0.75
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * decay
            own = pseudo[[places[row] for row in batch["row"].tolist()]]
            loss = measure_loss(method(_without_labels(batch))["logits"].float(), own)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    logits, _ = read()
    hook.remove()
    return unshuffle(order, [method.to_probabilities(logits)])


def measure_loss(logits: Tensor, pseudo: Tensor) -> Tensor:
    """Return the loss of a batch, low where predictions are confident, of all classes, and the pseudo labels (n,)."""
    mean = logits.softmax(dim=1).mean(dim=0)
    diversity = -(mean * (mean + TINY).log()).sum()
    return measure_entropy(logits).mean() - diversity + PSEUDO * functional.cross_entropy(logits, pseudo)


def find_pseudo_labels(logits: Tensor, features: Tensor) -> Tensor:
    """Return the class (n,) whose mean is nearest to each face in direction; of classes that no face is taken for, none.

    The means are first weighted by the probabilities, then of the faces nearest to them.
    """
    extended = functional.normalize(torch.cat([features, torch.ones_like(features[:, :1])], dim=1), dim=1)
    shares, labels = logits.softmax(dim=1), logits.argmax(dim=1)
    for _ in range(2):
        means = functional.normalize(shares.T @ extended, dim=1)
        there = labels.unique()
        labels = there[(extended @ means[there].T).argmax(dim=1)]
        shares = functional.one_hot(labels, logits.shape[1]).to(extended)
    return labels


def _build_optimizer(method: Method) -> tuple[torch.optim.Optimizer, list[float]]:
    """Return the optimiser and the first rate of each of its groups."""
    named = [(name, value) for name, value in method.named_parameters() if value.requires_grad]
    pairs = [
        ([value for name, value in named if name.startswith(BACKBONES) == backbone], rate)
        for backbone, rate in ((True, BACKBONE_RATE), (False, RATE))
    ]
    groups = [{"params": values, "lr": rate} for values, rate in pairs if values]
    optimizer = torch.optim.SGD(groups, lr=RATE, momentum=MOMENTUM, weight_decay=DECAY, nesterov=True)
    return optimizer, [rate for values, rate in pairs if values]


def _without_labels(batch: Batch) -> Batch:
    return {name: value for name, value in batch.items() if name not in ("label", "target")}
