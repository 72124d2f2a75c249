"""Two workers compute what one computes: batch norm, gathered losses and gradients, checked with real processes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from cafe.learning.loading import own_part
from cafe.networks.parallel import fill_in, gather, rank, share_batch_norm, world_size

TOTALS = (7, 1)  # odd: the workers' parts differ in size, and one of them is empty

VALUES = np.array([-0.0, 1.5, -2.0, np.inf, 6e-8, 0.0, -1.0], np.float16)


def build() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(5 * 4 * 4, 7)).double()


def ranked_loss(logits: torch.Tensor) -> torch.Tensor:
    """A loss that no worker could compute from its own part: the gap between the upper and the lower half of a batch."""
    scores = logits.square().mean(dim=1).sort().values
    half = len(scores) // 2
    return scores[half:].mean() - scores[:half].sum() / max(half, 1)


def step(store: str, number: int, workers: int, results: str, total: int) -> None:
    """One forward and backward pass of a worker; the first one saves gradients and running statistics."""
    torch.set_num_threads(1)
    if workers > 1:
        distributed.init_process_group("gloo", init_method=f"file://{store}", rank=number, world_size=workers)
    module = build()
    if workers > 1:
        share_batch_norm(module)
    wrapped = DistributedDataParallel(module) if workers > 1 else module
    images = torch.randn(total, 3, 8, 8, generator=torch.Generator().manual_seed(1)).double()
    mine = own_part(torch.arange(total).numpy())
    logits = gather(wrapped(images[mine]), total)
    (ranked_loss(logits) * world_size()).backward()
    own = np.where(np.arange(total) % workers == number, VALUES[:total], 0).astype(np.float16)
    np.testing.assert_array_equal(fill_in(own).view(np.uint16), VALUES[:total].view(np.uint16))
    if rank() == 0:
        gradients = {f"gradient of {name}": parameter.grad for name, parameter in module.named_parameters()}
        torch.save({**gradients, **dict(module.named_buffers())}, results)
    if workers > 1:
        distributed.destroy_process_group()


def start(number: int, folder: str) -> None:
    for total in TOTALS:
        step(f"{folder}/store-{total}", number, 2, f"{folder}/two-{total}.pt", total)


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with what two workers computed."""
    folder = tmp_path_factory.mktemp("workers")
    multiprocessing.spawn(start, (str(folder),), nprocs=2)
    return folder


@pytest.mark.parametrize("total", TOTALS)
def test_gradients_and_statistics_of_two_workers_are_those_of_one(total: int, together: Path) -> None:
    step("", 0, 1, str(together / f"one-{total}.pt"), total)
    one, two = (torch.load(together / f"{name}-{total}.pt", weights_only=True) for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-9, atol=1e-12, msg=name)
    assert max(value.abs().max() for name, value in one.items() if "gradient" in name) > 0.01


def test_outside_a_distributed_training_there_is_one_worker() -> None:
    values = torch.ones(3, 2, requires_grad=True)
    assert (world_size(), rank()) == (1, 0)
    assert gather(values, 3) is values
