"""The local shards of FSDP2 parameters (DTensor): an update of matching shards is the update of the
whole."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import torch

from ... import checks
from ...contract import PLAIN

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def _module() -> Any:
    # A DTensor can only exist where this module is loaded; importing it here would cost half a
    # second.
    return sys.modules.get("torch.distributed.tensor")


def is_sharded(tensor: object) -> TypeGuard[DTensor]:
    module = _module()
    return module is not None and isinstance(tensor, module.DTensor)


def local(
    op: str, named: dict[str, Sequence[torch.Tensor] | None]
) -> dict[str, list[torch.Tensor]]:
    """Every list that is not None, with DTensors replaced by their local shards.

    Raises:
        ValueError: entry i is a DTensor in one list and not in another, or with another mesh or
            other placements.
    """
    present = {name: values for name, values in named.items() if values is not None}
    module = _module()
    if module is None or not any([_has_shards(values) for values in present.values()]):
        return {name: list(values) for name, values in present.items()}
    first_name, first = next(iter(present.items()))
    for i in range(len(first)):
        for name, values in present.items():
            if i < len(values) and layout(values[i]) != layout(first[i]):
                requirement = f"be sharded like {first_name}[{i}] ({layout_text(first[i])})"
                raise ValueError(
                    checks.sentence(op, f"{name}[{i}]", requirement, layout_text(values[i]))
                )
    return {name: [shard(t) for t in values] for name, values in present.items()}


def _has_shards(values: Sequence[torch.Tensor]) -> bool:
    if not torch.compiler.is_compiling() and set(map(type, values)) <= PLAIN:
        return False
    return any(is_sharded(t) for t in values)


def shard(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if is_sharded(tensor) else tensor


def layout(tensor: torch.Tensor) -> object:
    return (tensor.device_mesh, tensor.placements) if is_sharded(tensor) else None


def layout_text(tensor: torch.Tensor) -> str:
    return (
        f"placements {tensor.placements} on {tensor.device_mesh}"
        if is_sharded(tensor)
        else "a plain tensor"
    )
