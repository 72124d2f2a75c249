"""One batch over several workers, with the result of one: batch norm and losses see the whole batch.

Without this, training with more workers is another training: each worker would normalise by its own faces, and a loss that
ranks or mixes a batch would rank or mix a part of it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm


def world_size() -> int:
    """Return the number of workers of this training, 1 outside a distributed one."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """Return this worker's number, 0 outside a distributed training."""
    return distributed.get_rank() if world_size() > 1 else 0


def part_sizes(total: int) -> list[int]:
    """Return how many samples of a batch each worker takes: consecutive parts, the first ones larger by one."""
    workers = world_size()
    return [total // workers + (number < total % workers) for number in range(workers)]


def gather(values: Tensor, total: int) -> Tensor:
    """Return the whole batch's (total, …) from every worker's part, in order; only the own part carries gradients.

    A loss of the gathered values gives every worker its share of the gradient, and DDP averages the shares: multiply the
    loss by `world_size()`.
    """
    sizes = part_sizes(total)
    if len(sizes) == 1:
        return values
    padded = values.detach().new_zeros((max(sizes), *values.shape[1:]))
    padded[: len(values)] = values.detach()
    parts = [torch.empty_like(padded) for _ in sizes]
    distributed.all_gather(parts, padded)
    parts = [part[:size] for part, size in zip(parts, sizes, strict=True)]
    parts[rank()] = values
    return torch.cat(parts)


def fill_in(values: np.ndarray) -> np.ndarray:
    """Return an array (n, …) of which each worker has other entries, and zeros in place of the rest, with those of all.

    Bytes are added, which are whole numbers, so that what comes out is bit for bit what some worker has.
    """
    if world_size() == 1:
        return values
    data = torch.from_numpy(values.reshape(-1).view(np.uint8))
    if distributed.get_backend() == "nccl":
        data = data.cuda()
    distributed.all_reduce(data)
    return data.cpu().numpy().view(values.dtype).reshape(values.shape)


class _SumOverWorkers(torch.autograd.Function):
    """Sum of a tensor over all workers; so is the sum of the gradients that come back to them."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        distributed.all_reduce(total)
        return total


def _sum_over_workers(values: Tensor) -> Tensor:
    total: Tensor = _SumOverWorkers.apply(values)
    return total


class GlobalBatchNorm(_BatchNorm):
    """Batch norm over the faces of all workers; like torch's SyncBatchNorm, but also on CPU. (N, C, …) → (N, C, …)."""

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002  # torch's signature
        if input.dim() < 2:
            raise ValueError(f"expected at least 2 dimensions, got {input.dim()}")

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # torch's signature
        """Normalise by the statistics of the whole batch while training, by the running ones otherwise."""
        if not self.training or world_size() == 1:
            normalised: Tensor = super().forward(input)
            return normalised
        axes = [0, *range(2, input.dim())]
        values = input.to(torch.promote_types(input.dtype, torch.float32))
        count = _sum_over_workers(values.new_tensor(values.numel() / values.shape[1]))
        mean = _sum_over_workers(values.sum(axes)) / count
        shape = (1, -1, *[1] * (input.dim() - 2))
        centred = values - mean.view(shape)
        variance = _sum_over_workers(centred.square().sum(axes)) / count
        with torch.no_grad():
            assert self.running_mean is not None
            assert self.running_var is not None
            assert self.num_batches_tracked is not None
            assert self.momentum is not None
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)  # unbiased, as torch keeps it
            self.num_batches_tracked.add_(1)
        normalised = centred * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            normalised = normalised * self.weight.view(shape) + self.bias.view(shape)
        return normalised.to(input.dtype)


class GlobalDropout(nn.Dropout):
    """Dropout with one mask for the whole batch, of which every worker uses its own part. (N, …) → (N, …).

    The first worker's generator seeds the mask, so that one worker alone draws the same.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # torch's signature
        """Set values to zero and scale the others up while training; return the input otherwise."""
        if not self.training or self.p == 0:
            return input
        about = torch.tensor([len(input), int(torch.randint(2**62, ()))], device=input.device)
        workers = [about]
        if world_size() > 1:
            workers = [torch.empty_like(about) for _ in range(world_size())]
            distributed.all_gather(workers, about)
        sizes, seed = [int(size) for size, _ in workers], int(workers[0][1])
        generator = torch.Generator(input.device).manual_seed(seed)
        uniforms = torch.rand((sum(sizes), *input.shape[1:]), generator=generator, device=input.device)
        start = sum(sizes[: rank()])
        return input * (uniforms[start : start + len(input)] >= self.p) / (1 - self.p)


def share_batch_norm(module: nn.Module) -> None:
    """Replace every batch norm of a module by one over all workers, with the same weights and names."""
    for name, child in module.named_children():
        if isinstance(child, _BatchNorm) and not isinstance(child, GlobalBatchNorm):
            shared = GlobalBatchNorm(
                child.num_features, child.eps, child.momentum, child.affine, child.track_running_stats
            )
            assert child.running_mean is not None
            shared.to(child.running_mean)  # its device and number format
            shared.load_state_dict(child.state_dict())
            setattr(module, name, shared)
        else:
            share_batch_norm(child)
