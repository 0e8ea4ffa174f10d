"""Cases of latent_rollout for tests: inputs, the float64 oracle, and the comparison. Public, so
that a new backend can be held to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..ops.latent_rollout import api
from ..ops.latent_rollout.cells import GRU, Cell, Hamiltonian, ResidualMLP, with_parameters
from . import assert_within_budget

CELLS = ("residual_mlp", "hamiltonian", "gru")
OP_NAMES = dict(zip(CELLS, ("rollout_mlp", "rollout_hamiltonian", "rollout_gru"), strict=True))


@dataclass(frozen=True)
class RolloutCase:
    """Inputs of one rollout, as float64 values that `dtype` represents exactly. A number as
    `output` is the exponent of an error."""

    states: torch.Tensor
    cell: Cell
    horizon: int
    output: str | float
    dtype: torch.dtype
    grad_out: torch.Tensor
    rows: torch.Tensor | None = None
    actions: torch.Tensor | None = None
    anchor: torch.Tensor | None = None
    anchor_rows: torch.Tensor | None = None
    targets: torch.Tensor | None = None
    target_rows: torch.Tensor | None = None


def rollout_case(
    cell: str = "residual_mlp",
    output: str | float = "states",
    *,
    rows: int = 37,
    channels: int = 20,
    hidden: int = 12,
    action_channels: int = 5,
    horizon: int = 3,
    dtype: torch.dtype = torch.float32,
    gathered: bool = True,
    anchored: bool = True,
    split: bool = True,
    strided: bool = False,
    time_step: float = 0.1,
    magnitude: float = 1.0,
    gain: float = 1.0,
    index_dtype: torch.dtype = torch.int64,
    seed: int = 0,
) -> RolloutCase:
    """A random case.

    Args:
        cell: one of CELLS; `hidden` is its width (a Hamiltonian has a second layer two units
            wider). action_channels: of a GRU.
        gathered: take initial states, anchor and targets from tables by (repeating) row indices.
        anchored: give an anchor (never for a GRU). split: a residual MLP that reads two ranges of
            channels. strided: rows with gaps.
        magnitude: standard deviation of states, anchor and targets. gain: factor of the weights
            (large ones make the dynamics chaotic).
    """
    generator = torch.Generator().manual_seed(seed)

    def values(*shape: int, spread: float = 1.0, mean: float = 0.0) -> torch.Tensor:
        return (
            (torch.randn(shape, generator=generator, dtype=torch.float64) * spread + mean)
            .to(dtype)
            .double()
        )

    def table() -> tuple[torch.Tensor, torch.Tensor | None]:
        if not gathered:
            return values(rows, channels, spread=magnitude), None
        return values(rows + 5, channels, spread=magnitude), torch.randint(
            0, rows + 5, (rows,), generator=generator
        ).to(index_dtype)

    states, index = table()
    if strided:
        wide = torch.zeros(states.shape[0], channels + 4, dtype=torch.float64)
        wide[:, 2:-2] = states
        states = wide[:, 2:-2]
    numbers: dict[str, torch.Tensor | None] = {"rows": index}
    if cell != "gru" and anchored:
        numbers["anchor"], numbers["anchor_rows"] = table()
    if cell == "gru":
        numbers["actions"] = values(horizon, rows, action_channels)
    if not isinstance(output, str):
        if gathered:
            numbers["targets"] = values(rows + 5, channels, spread=magnitude)
            numbers["target_rows"] = torch.randint(
                0, rows + 5, (horizon, rows), generator=generator
            ).to(index_dtype)
        else:
            numbers["targets"] = values(horizon, rows, channels, spread=magnitude)
    shapes: dict[str | float, tuple[int, ...]] = {
        "states": (horizon, rows, channels),
        "last": (rows, channels),
    }
    shape = shapes.get(output, (horizon, rows))
    parameters = _cell(
        cell, values, channels, action_channels if cell == "gru" else hidden, split, time_step, gain
    )
    return RolloutCase(states, parameters, horizon, output, dtype, values(*shape), **numbers)


def _cell(
    cell: str,
    values: Callable[..., torch.Tensor],
    channels: int,
    width: int,
    split: bool,
    time_step: float,
    gain: float,
) -> Cell:
    """`width`: hidden units, or the action channels of a GRU."""
    fan = gain / channels**0.5, gain / width**0.5
    if cell == "residual_mlp":
        ranges = ((1, channels // 3), (channels // 2, channels)) if split else None
        inputs = channels // 3 - 1 + channels - channels // 2 if split else channels
        tensors = (
            values(width, inputs, spread=fan[0]),
            values(width, spread=0.3),
            values(channels, width, spread=fan[1]),
            values(channels),
        )
        return ResidualMLP(*tensors, ranges)
    if cell == "hamiltonian":
        first = values(width, channels, spread=fan[0]), values(width, spread=0.3)
        second = (
            values(width + 2, width, spread=fan[1]),
            values(width + 2, spread=0.3),
            values(1, width + 2),
        )
        return Hamiltonian(*first, *second, time_step)
    gates = 3 * channels
    weights = values(gates, width, spread=0.4), values(gates, channels, spread=fan[0])
    return GRU(
        *weights,
        values(gates, spread=0.2),
        values(gates, spread=0.2),
        values(channels, spread=0.25, mean=1.0),
        values(channels, spread=0.5),
    )


def run_rollout(
    case: RolloutCase, backend: str, dtype: torch.dtype | None = None, device: str = "cpu"
) -> dict[str, torch.Tensor]:
    """The output and the gradient of every floating input, by name, of the case on `backend`."""
    dtype = case.dtype if dtype is None else dtype

    def leaf(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(device=device, dtype=dtype).detach().requires_grad_()

    def index(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.to(device)

    cell = with_parameters(case.cell, [leaf(p) for p in case.cell.parameters()])
    names = list(type(cell).__dataclass_fields__)
    wanted = {"states": _strided_leaf(case.states, dtype, device)}
    given = {"actions": case.actions, "anchor": case.anchor, "targets": case.targets}
    wanted |= {name: leaf(tensor) for name, tensor in given.items() if tensor is not None}
    wanted |= dict(zip(names, cell.parameters(), strict=False))
    options: dict[str, Any] = {
        "rows": index(case.rows),
        "actions": wanted.get("actions"),
        "anchor": wanted.get("anchor"),
        "anchor_rows": index(case.anchor_rows),
        "backend": backend,
    }
    if isinstance(case.output, str):
        out = api.latent_rollout(
            wanted["states"], cell, case.horizon, output=case.output, **options
        )
    else:
        options |= {"target_rows": index(case.target_rows), "exponent": case.output}
        out = api.latent_rollout_loss(
            wanted["states"], cell, wanted["targets"], reduction="none", **options
        )
    grads = torch.autograd.grad(
        out, list(wanted.values()), case.grad_out.to(device=device, dtype=out.dtype)
    )
    return {
        "out": out.detach().cpu(),
        **{f"grad_{name}": grad.cpu() for name, grad in zip(wanted, grads, strict=True)},
    }


def _strided_leaf(tensor: torch.Tensor, dtype: torch.dtype, device: str) -> torch.Tensor:
    if tensor.is_contiguous():
        return tensor.to(device=device, dtype=dtype).detach().requires_grad_()
    base = tensor._base
    assert base is not None
    return (
        base.to(device=device, dtype=dtype)
        .as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
        .detach()
        .requires_grad_()
    )


def check_rollout(case: RolloutCase, backend: str, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Runs `backend` and holds the output and every gradient to the error budget against the
    float64 reference.

    Raises:
        AssertionError: naming the tensor, its error and the budget.
    """
    oracle = run_rollout(case, "reference", torch.float64)
    peer = run_rollout(case, "reference") if case.dtype in (torch.bfloat16, torch.float16) else {}
    actual = run_rollout(case, backend, device=device)
    for name, tensor in actual.items():
        assert_within_budget(
            f"{backend} {name}",
            tensor,
            oracle[name],
            peer.get(name),
            gradient=name.startswith("grad"),
            dtype=case.dtype,
        )
    return actual
