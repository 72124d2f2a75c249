"""Checkpoints as safetensors + JSON: nothing read from a file is ever unpickled.

`state.safetensors` holds every tensor of the method and its optimiser by name; `state.json` what is not a tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from upath import UPath

from cafe.seals import damaged, read_sealed, write_sealed
from cafe.towers.weights import read_tensors, write_tensors


def save_checkpoint(
    folder: UPath,
    method: nn.Module,
    optimizer: torch.optim.Optimizer,
    record: dict[str, Any],
    selected: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a training's state to a folder: `record` as JSON beside the tensors, `selected` the best weights so far."""
    state = optimizer.state_dict()
    tensors = {f"method.{name}": value for name, value in method.state_dict().items()}
    tensors |= {f"selected.{name}": value for name, value in (selected or {}).items()}
    for parameter, values in state["state"].items():
        tensors |= {f"optimizer.{parameter}.{name}": value for name, value in values.items()}
    write_tensors(folder / "state.safetensors", tensors)
    about = {**record, "optimizer_groups": state["param_groups"]}
    write_sealed(folder / "state.json", about)


def load_checkpoint(
    folder: UPath, method: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Restore a training's state from a folder and return its record and the selected weights.

    Raises `DamagedError` where a file is not what was written.
    """
    remedy = f"remove {folder} and give the `cafe train` command again, which then begins anew"
    tensors = read_tensors(folder / "state.safetensors", remedy)
    record = read_sealed(folder / "state.json", "read", remedy)
    if record is None:
        raise damaged(folder / "state.json", remedy)
    method.load_state_dict(_below(tensors, "method."))
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in _below(tensors, "optimizer.").items():
        parameter, _, key = name.partition(".")
        state.setdefault(int(parameter), {})[key] = value
    groups = [{**group, **_tuples(group)} for group in record.pop("optimizer_groups")]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
        values = optimizer.state[parameter]
        for name, value in values.items():
            if value.shape == parameter.shape:  # fused optimisers take it for granted that memory is laid out alike
                values[name] = torch.empty_like(parameter).copy_(value)
    return record, _below(tensors, "selected.")


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _tuples(group: dict[str, Any]) -> dict[str, Any]:
    return {"betas": tuple(group["betas"])} if "betas" in group else {}
