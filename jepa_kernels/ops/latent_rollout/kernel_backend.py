"""How the kernels of one cell become a backend: what every backend does before and after them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch

from ... import checks
from ...backend import ANY_DEVICE, Backend, Reason
from ..products import widened_on_cpus
from .rollout import NAME, Rollout

RolloutT = TypeVar("RolloutT", bound=Rollout)
KernelsT = TypeVar("KernelsT")
_Inputs = TypeVar("_Inputs", bound=Rollout, contravariant=True)
_Kernels = TypeVar("_Kernels", contravariant=True)


class Passes(Protocol[_Inputs, _Kernels]):
    """A cell's module ``rollout``: both passes around the kernels of a backend."""

    def forward(self, inputs: _Inputs, kernels: _Kernels) -> tuple[torch.Tensor, ...]:
        """The result, then what backward needs."""

    def backward(
        self,
        inputs: _Inputs,
        kernels: _Kernels,
        saved: list[torch.Tensor],
        grad_out: torch.Tensor,
        needs_targets: bool,
    ) -> dict[str, torch.Tensor | None]:
        """Gradients of the inputs by name, one row per rollout row."""


def takes_all(inputs: Rollout) -> list[Reason]:
    """What speaks against a call that every machine runs: nothing."""
    return []


def kernel_backend(
    name: str,
    devices: tuple[str, ...],
    unsupported: Callable[[Rollout], list[Reason]],
    rollout: Passes[RolloutT, KernelsT],
    kernels: KernelsT,
    *,
    widens: bool = False,
    on: Callable[[torch.Tensor], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> Backend:
    """A backend of one cell.

    Args:
        name, devices, unsupported: as of `Backend`.
        rollout: the cell's module of that name.
        kernels: what the cell's `Kernels` protocol asks of a backend.
        widens: take inputs as float32 on a CPU that does not multiply their dtype.
        on: what to enter around the kernels, given a tensor.
    """

    def multiplied(inputs: RolloutT) -> RolloutT:
        narrow = widens and inputs.device_type == "cpu" and widened_on_cpus(inputs.dtype)
        return inputs.widened() if narrow else inputs

    def forward(inputs: RolloutT) -> tuple[torch.Tensor, ...]:
        with on(inputs.states):
            out, *saved = rollout.forward(multiplied(inputs), kernels)
        return out if inputs.output == "errors" else out.to(inputs.dtype), *saved

    def backward(
        inputs: RolloutT, saved: list[torch.Tensor], grad_out: torch.Tensor, needs: list[bool]
    ) -> list[torch.Tensor | None]:
        if not inputs.save:
            raise ValueError(checks.sentence(NAME, "save", "be True for backward", False))
        wanted = dict(zip(inputs.leaves, needs, strict=True))
        with on(inputs.states):
            gradients = rollout.backward(
                multiplied(inputs), kernels, saved, grad_out, wanted["targets"]
            )
        return [_placed(inputs, leaf, gradients) if wanted[leaf] else None for leaf in wanted]

    facts = {"saves_signs": getattr(kernels, "saves_signs", False)}
    return Backend(name, devices, unsupported, forward, backward, facts=facts)


def eager_backend(rollout: Passes[RolloutT, KernelsT], kernels: KernelsT) -> Backend:
    """What runs where no kernel does."""
    return kernel_backend("torch", ANY_DEVICE, takes_all, rollout, kernels, widens=True)


def _placed(
    inputs: Rollout, leaf: str, gradients: dict[str, torch.Tensor | None]
) -> torch.Tensor | None:
    """The gradient of one input; that of gathered rows is added up in their table."""
    given, gradient = getattr(inputs, leaf), gradients.get(leaf)
    if given is None or gradient is None:
        return None
    index = getattr(inputs, inputs.tables[leaf]) if leaf in inputs.tables else None
    if index is not None:
        table = torch.zeros(given.shape, dtype=inputs.accumulate_dtype, device=given.device)
        rows = gradient.reshape(-1, given.shape[1]).to(table.dtype)
        gradient = table.index_add_(0, index.flatten(), rows)
    return gradient.reshape(given.shape).to(given.dtype).contiguous()
