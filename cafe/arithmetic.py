"""How float32 numbers are multiplied, which graphics cards decide by themselves unless a program says so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

Precision = Literal["fp32", "tf32", "bf16"]  # of a training


def set_arithmetic(precision: str) -> None:
    """Compute repeatably, and float32 as IEEE has it; only `tf32` takes factors of 10 bits, as PyTorch's convolutions do."""
    _set(precision == "tf32", precision == "tf32", True, False)


def computes_bf16() -> bool:
    """Return whether this machine's GPU or, without one, its cores compute with bfloat16; others take ten times as long."""
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    able = torch.cpu.get_capabilities()
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))


@contextmanager
def arithmetic(precision: str) -> Iterator[None]:
    """Compute as `set_arithmetic` says, and then again as before."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark
    set_arithmetic(precision)
    try:
        yield
    finally:
        _set(*before)


def _set(products: bool, convolutions: bool, deterministic: bool, benchmark: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = products, convolutions
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = deterministic, benchmark
