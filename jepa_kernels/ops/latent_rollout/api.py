"""The public functions: autocast, the op of the cell, and the call."""

from __future__ import annotations

from typing import Any

import torch

from ... import checks
from ...backend import FAMILIES, resolve
from ...contract import Function
from .cells import Cell, with_parameters
from .gru import contract as gru
from .hamiltonian import contract as hamiltonian
from .mlp import contract as mlp
from .rollout import NAME, Rollout, fail

_OPS = {op.signature.inputs.cell_type: op for op in (mlp.OP, hamiltonian.OP, gru.OP)}
_REDUCTIONS = ("mean", "none")


def op_of(cell: Cell) -> Function:
    """The op that rolls out this cell."""
    if type(cell) not in _OPS:
        wanted = "be a ResidualMLP, Hamiltonian or GRU"
        raise TypeError(checks.sentence(NAME, "cell", wanted, checks.type_name(cell)))
    return _OPS[type(cell)]


def prepare(states: torch.Tensor, cell: Cell, *arguments: Any, **options: Any) -> Any:
    """The checked inputs of the op of this cell; see `rollout.prepare`."""
    return op_of(cell).prepare(states, cell, *arguments, **options)


FAMILIES[NAME] = lambda states, cell, *arguments, **options: op_of(cell)


def latent_rollout(
    states: torch.Tensor,
    cell: Cell,
    horizon: int,
    *,
    rows: torch.Tensor | None = None,
    actions: torch.Tensor | None = None,
    anchor: torch.Tensor | None = None,
    anchor_rows: torch.Tensor | None = None,
    output: str = "states",
    backend: str | None = None,
) -> torch.Tensor:
    """The states that a cell predicts 1 to `horizon` steps ahead, with gradients through time.

    ``x_{k+1} = cell(x_k, actions[k]);  y_k = anchor + (x_k - x_0)`` (the cells: `ResidualMLP`, the
    latent-dynamics head of Factorized Latent Dynamics, arXiv 2605.17165; `Hamiltonian`, its energy
    variant; `GRU`, the predictor of energy-based JEPA planners). A residual MLP or a Hamiltonian is
    rolled out in its hidden space, h x h work a step instead of D x h (see `hidden_space`).

    Args:
        states: initial states ``[rows, D]``, float32, bfloat16, float16 or float64; with `rows` a
            table ``[N, D]``. Differentiated.
        cell: a `ResidualMLP`, `Hamiltonian` or `GRU` with parameters of the dtype and device of
            `states`. Differentiated.
        horizon: the number of steps, at least 1.
        rows: int32 or int64 ``[rows]``, the rows of `states` to start from (repeats allowed); None
            starts from all of them.
        actions: ``[horizon, rows, A]`` for a GRU, None for the other cells. Differentiated.
        anchor: ``[rows, D]`` (a table with `anchor_rows`) to which the moves are added instead of
            to the initial states; dtype of `states` or float32. Not for a GRU. Differentiated.
        anchor_rows: int32 or int64 ``[rows]``, rows of `anchor`; None takes all of them in order.
        output: ``"states"`` for every prediction, ``"last"`` for the one of step `horizon` alone
            (much cheaper where D > h).
        backend: a backend name, ``"auto"``, or None (see `jepa_kernels.backend`).

    Returns:
        ``[horizon, rows, D]``, or ``[rows, D]`` for ``"last"``; dtype of `states`, contiguous. No
        rows give an empty tensor.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype, device or value.
        BackendUnsupportedError: the chosen backend cannot run this call; every reason is listed.

    Notes:
        Hidden states and sums are float32 (float64 for float64). Saves ``O(rows * h * horizon)``
        numbers for backward. Results repeat bitwise for the same inputs and thread count, except
        gradients of repeated `rows` on a GPU. The Hamiltonian's last bias moves nothing and is no
        parameter; double backward is refused. Under autocast states, parameters and actions take
        the autocast dtype.

    Example:
        >>> import torch
        >>> from jepa_kernels import ResidualMLP, latent_rollout
        >>> from torch.nn import GELU, Linear, Sequential
        >>> head = Sequential(Linear(96, 32), GELU(), Linear(32, 96))
        >>> latent_rollout(torch.randn(5, 96), ResidualMLP.from_module(head), 4).shape
        torch.Size([4, 5, 96])
    """
    options = {"rows": rows, "anchor": anchor, "anchor_rows": anchor_rows, "output": output}
    return _run(states, cell, actions, horizon, backend, options)


def latent_rollout_loss(
    states: torch.Tensor,
    cell: Cell,
    targets: torch.Tensor,
    *,
    rows: torch.Tensor | None = None,
    target_rows: torch.Tensor | None = None,
    actions: torch.Tensor | None = None,
    anchor: torch.Tensor | None = None,
    anchor_rows: torch.Tensor | None = None,
    exponent: float = 1.0,
    weights: torch.Tensor | None = None,
    reduction: str = "mean",
    backend: str | None = None,
) -> torch.Tensor:
    """The error of a rollout against targets, without ever writing the predicted states.

    ``e[k, i] = mean_c |y_k[i, c] - targets[k, i, c]|^exponent / exponent;  loss = mean(weights *
    e)``, y as in `latent_rollout`; for a Hamiltonian e is the sum of the means over q and over p.
    ``anchor = h(t)`` and horizon 1 is the published latent-dynamics loss ``|f(z(t)) - (h(t+1) -
    h(t))|`` (arXiv 2605.17165, public code at 3588723; checked by golden numbers).

    Args:
        states, cell, rows, actions, anchor, anchor_rows, backend: as in `latent_rollout`.
        targets: ``[horizon, rows, D]``; with `target_rows` a table ``[N, D]``. dtype of `states` or
            float32. Differentiated.
        target_rows: int32 or int64 ``[horizon, rows]``, rows of `targets`: no gathered copy is made
            by the kernels. None without a table.
        exponent: 1 for an L1 loss, 2 for half the squared error, any number of at least 1.
        weights: float32 ``[rows]`` or ``[horizon, rows]``, or None for 1. Differentiated.
        reduction: ``"mean"`` over steps and rows, or ``"none"`` for weights * e.

    Returns:
        A float32 scalar (float64 for float64 states), 0 where there are no rows; or ``[horizon,
        rows]`` for ``"none"``.

    Raises:
        TypeError, ValueError, BackendUnsupportedError: as in `latent_rollout`.

    Notes:
        As for `latent_rollout`. The gradient of ``|r|`` at r = 0 is 0. Besides the sums, saves at
        most two bits per residual.

    Example:
        >>> import torch
        >>> from jepa_kernels import ResidualMLP, latent_rollout_loss
        >>> from torch.nn import GELU, Linear, Sequential
        >>> head = Sequential(Linear(96, 32), GELU(), Linear(32, 96))
        >>> states, targets = torch.randn(5, 96), torch.randn(4, 5, 96)
        >>> latent_rollout_loss(states, ResidualMLP.from_module(head), targets).shape
        torch.Size([])
    """
    checks.is_tensor(NAME, "targets", targets)
    if reduction not in _REDUCTIONS:
        fail("reduction", f"be one of {', '.join(_REDUCTIONS)}", repr(reduction))
    options = {
        "rows": rows,
        "anchor": anchor,
        "anchor_rows": anchor_rows,
        "targets": targets,
        "target_rows": target_rows,
        "exponent": exponent,
    }
    errors = _run(states, cell, actions, None, backend, options, weights)
    if weights is not None:
        errors = errors * weights
    return errors if reduction == "none" else errors.sum() / max(errors.numel(), 1)


def _run(
    states: torch.Tensor,
    cell: Cell,
    actions: torch.Tensor | None,
    horizon: int | None,
    backend: str | None,
    options: dict[str, Any],
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """The op's result. States, parameters and actions take the dtype of autocast, as those of a
    linear layer do."""
    checks.is_tensor(NAME, "states", states)
    op, kind = op_of(cell), states.device.type
    if states.dtype != torch.float64 and checks.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        states = states.to(dtype)
        cell = with_parameters(cell, [p.to(dtype) for p in cell.parameters()])
        actions = None if actions is None else actions.to(dtype)
    inputs: Any = op.prepare(states, cell, horizon, actions=actions, **options)
    if weights is not None:
        _check_weights(weights, inputs)
    return op.run(inputs, resolve(op, inputs, backend))[0]


def _check_weights(weights: Any, inputs: Rollout) -> None:
    checks.is_tensor(NAME, "weights", weights)
    checks.is_strided(NAME, "weights", weights)
    checks.has_dtype(NAME, "weights", weights, checks.FLOAT_DTYPES)
    checks.same_device(NAME, "weights", weights, inputs.states.device)
    shapes = ((inputs.num_rows,), (inputs.horizon, inputs.num_rows))
    if tuple(weights.shape) not in shapes:
        fail("weights", f"have shape {shapes[0]} or {shapes[1]}", tuple(weights.shape))
