"""The public functions: checks, choice of backend, and the call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ... import checks
from ...backend import resolve
from . import op as _op
from .call import Call
from .cells import GRU, KINDS, Cell, Hamiltonian, ResidualMLP, channel_ranges

_NAME = "latent_rollout"
_OUTPUTS = ("states", "last")
_REDUCTIONS = ("mean", "none")


@dataclass(frozen=True)
class HardRegion:
    """Weights that favour the rows of a sample that are predicted worst: its row count times
    softmax(e / temperature) over its rows.

    Attributes:
        sample_ids: int64 ``[rows]``, the sample of each row, from 0 to ``samples - 1``.
        samples: the number of samples.
        temperature: of the softmax, over errors e ``[horizon, rows]``, each step on its own; at
            least 1e-6 is used.
    """

    sample_ids: torch.Tensor
    samples: int
    temperature: float = 1.0

    def weights(self, errors: torch.Tensor) -> torch.Tensor:
        """Weights of mean 1 within each sample, ``[horizon, rows]``, without gradient."""
        with torch.no_grad():
            logits = errors / max(self.temperature, 1e-6)
            samples = self.sample_ids.expand(errors.shape)
            per_sample = logits.new_full((errors.shape[0], self.samples), -torch.inf)
            highest = per_sample.scatter_reduce(1, samples, logits, "amax").gather(1, samples)
            powers = torch.exp(logits - highest)
            totals = torch.zeros_like(per_sample).scatter_add(1, samples, powers)
            counts = torch.zeros_like(per_sample).scatter_add(1, samples, torch.ones_like(powers))
            return powers * (counts / totals).gather(1, samples)


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
    states, cell, actions = _autocast(states, cell, actions)
    call = prepare(
        states,
        cell,
        horizon,
        rows=rows,
        actions=actions,
        anchor=anchor,
        anchor_rows=anchor_rows,
        output=output,
    )
    name = resolve(_op.ROOM, call, backend)
    return _op.run(name, call, states, cell, rows, actions, anchor, anchor_rows, None, None, 1.0)


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
    weights: torch.Tensor | HardRegion | None = None,
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
        weights: float32 ``[rows]`` or ``[horizon, rows]``, a `HardRegion`, or None for 1. A tensor
            is differentiated.
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
    states, cell, actions = _autocast(states, cell, actions)
    call = prepare(
        states,
        cell,
        rows=rows,
        actions=actions,
        anchor=anchor,
        anchor_rows=anchor_rows,
        targets=targets,
        target_rows=target_rows,
        exponent=exponent,
    )
    if reduction not in _REDUCTIONS:
        raise ValueError(
            checks.sentence(
                _NAME, "reduction", f"be one of {', '.join(_REDUCTIONS)}", repr(reduction)
            )
        )
    _check_weights(weights, call, states)
    name = resolve(_op.ROOM, call, backend)
    errors = _op.run(
        name,
        call,
        states,
        cell,
        rows,
        actions,
        anchor,
        anchor_rows,
        targets,
        target_rows,
        float(exponent),
    )
    if isinstance(weights, HardRegion):
        errors = errors * weights.weights(errors)
    elif weights is not None:
        errors = errors * weights
    return errors if reduction == "none" else errors.sum() / max(errors.numel(), 1)


def _autocast(states: Any, cell: Any, actions: Any) -> tuple[Any, Any, Any]:
    """What autocast does to a linear layer: floating inputs and parameters take the autocast
    dtype."""
    checks.is_tensor(_NAME, "states", states)
    _check_cell_kind(cell)
    kind = states.device.type
    # Devices without autocast, such as meta, refuse the question whether it is on.
    available = torch.amp.is_autocast_available(kind)
    if states.dtype == torch.float64 or not available or not torch.is_autocast_enabled(kind):
        return states, cell, actions
    dtype = torch.get_autocast_dtype(kind)
    return (
        states.to(dtype),
        _op.with_parameters(cell, [p.to(dtype) for p in cell.parameters()]),
        None if actions is None else actions.to(dtype),
    )


def prepare(
    states: torch.Tensor,
    cell: Cell,
    horizon: int | None = None,
    *,
    rows: torch.Tensor | None = None,
    actions: torch.Tensor | None = None,
    anchor: torch.Tensor | None = None,
    anchor_rows: torch.Tensor | None = None,
    targets: torch.Tensor | None = None,
    target_rows: torch.Tensor | None = None,
    exponent: float = 1.0,
    output: str = "states",
) -> Call:
    """Checks every argument (shapes, dtypes, devices; never values) and describes the call."""
    _check_rows_of("states", states, states)
    checks.has_dtype(_NAME, "states", states, checks.FLOAT_DTYPES)
    _check_cell_kind(cell)
    if rows is not None:
        _check_index("rows", rows, states, None)
    count = states.shape[0] if rows is None else rows.shape[0]
    if targets is not None:
        horizon = _check_targets(targets, target_rows, states, count)
        output = "errors"
        checks.is_finite_number(_NAME, "exponent", exponent)
        if exponent < 1:
            raise ValueError(checks.sentence(_NAME, "exponent", "be at least 1", exponent))
    elif output not in _OUTPUTS:
        raise ValueError(
            checks.sentence(_NAME, "output", f"be one of {', '.join(_OUTPUTS)}", repr(output))
        )
    if isinstance(horizon, bool) or not isinstance(horizon, (int, torch.SymInt)):
        raise TypeError(checks.sentence(_NAME, "horizon", "be an int", checks.type_name(horizon)))
    if horizon < 1:
        raise ValueError(checks.sentence(_NAME, "horizon", "be at least 1", horizon))
    hidden, in_channels = _check_cell(cell, states)
    _check_actions(cell, actions, states, horizon, count)
    _check_anchor(cell, anchor, anchor_rows, states, count)
    differentiable = [
        states,
        *cell.parameters(),
        *(t for t in (actions, anchor, targets) if t is not None),
    ]
    return Call(
        device_type=states.device.type,
        dtype=states.dtype,
        cell=KINDS[type(cell)],
        num_rows=count,
        channels=states.shape[1],
        in_channels=in_channels,
        hidden=hidden,
        action_channels=0 if actions is None else actions.shape[-1],
        horizon=horizon,
        output=output,
        needs_grad=torch.is_grad_enabled() and any(t.requires_grad for t in differentiable),
    )


def _fail(argument: str, requirement: str, got: object) -> None:
    raise ValueError(checks.sentence(_NAME, argument, requirement, got))


def _check_rows_of(argument: str, tensor: Any, states: torch.Tensor) -> None:
    checks.is_tensor(_NAME, argument, tensor)
    checks.is_strided(_NAME, argument, tensor)
    checks.same_device(_NAME, argument, tensor, states.device)
    checks.has_rank(_NAME, argument, tensor, 2, "[rows, D]")


def _check_float(
    argument: str, tensor: torch.Tensor, states: torch.Tensor, or_float32: bool = False
) -> None:
    allowed = (
        (states.dtype, torch.float32)
        if or_float32 and states.dtype != torch.float64
        else (states.dtype,)
    )
    if tensor.dtype not in allowed:
        wanted = f"have the dtype of states ({checks.dtype_name(states.dtype)})" + (
            " or float32" if len(allowed) > 1 else ""
        )
        _fail(argument, wanted, checks.dtype_name(tensor.dtype))


def _check_index(
    argument: str, index: Any, states: torch.Tensor, shape: tuple[int, ...] | None
) -> None:
    checks.is_tensor(_NAME, argument, index)
    checks.is_strided(_NAME, argument, index)
    checks.has_dtype(_NAME, argument, index, checks.ID_DTYPES)
    checks.same_device(_NAME, argument, index, states.device)
    if shape is None:
        checks.has_rank(_NAME, argument, index, 1, "[rows]")
    elif tuple(index.shape) != shape:
        _fail(argument, f"have shape {shape}", tuple(index.shape))


def _check_cell_kind(cell: Any) -> None:
    if type(cell) not in KINDS:
        raise TypeError(
            checks.sentence(
                _NAME, "cell", "be a ResidualMLP, Hamiltonian or GRU", checks.type_name(cell)
            )
        )


def _check_parameter(name: str, tensor: Any, shape: tuple[int, ...], states: torch.Tensor) -> None:
    argument = f"cell.{name}"
    checks.is_tensor(_NAME, argument, tensor)
    checks.is_strided(_NAME, argument, tensor)
    checks.same_device(_NAME, argument, tensor, states.device)
    _check_float(argument, tensor, states)
    if tuple(tensor.shape) != shape:
        _fail(argument, f"have shape {shape}", tuple(tensor.shape))


def _check_cell(cell: Cell, states: torch.Tensor) -> tuple[tuple[int, ...], int]:
    """Checks the shapes of the cell's parameters; its hidden widths and the channels it reads."""
    channels = states.shape[1]
    names: tuple[str, ...]
    hidden: tuple[int, ...]
    if isinstance(cell, GRU):
        checks.is_finite_number(_NAME, "cell.epsilon", cell.epsilon)
        for name, tensor in (("weight_input", cell.weight_input),):
            checks.is_tensor(_NAME, f"cell.{name}", tensor)
            checks.has_rank(_NAME, f"cell.{name}", tensor, 2, "[3 D, A]")
        shapes = [
            (3 * channels, cell.weight_input.shape[1]),
            (3 * channels, channels),
            *[(3 * channels,)] * 2,
            *[(channels,)] * 2,
        ]
        names = (
            "weight_input",
            "weight_state",
            "bias_input",
            "bias_state",
            "norm_weight",
            "norm_bias",
        )
        hidden, in_channels = (channels,), channels
    else:
        checks.is_tensor(_NAME, "cell.weight_in", cell.weight_in)
        checks.has_rank(_NAME, "cell.weight_in", cell.weight_in, 2, "[hidden, channels]")
        width = cell.weight_in.shape[0]
        if width < 1:
            _fail("cell.weight_in", "have at least one hidden unit", tuple(cell.weight_in.shape))
        if isinstance(cell, ResidualMLP):
            in_channels = _check_channels(cell, channels)
            shapes = [(width, in_channels), (width,), (channels, width), (channels,)]
            names = ("weight_in", "bias_in", "weight_out", "bias_out")
            hidden = (width,)
        else:
            hidden, in_channels = _check_hamiltonian(cell, channels), channels
            second = hidden[1]
            shapes = [(width, channels), (width,), (second, width), (second,), (1, second)]
            names = ("weight_in", "bias_in", "weight_hidden", "bias_hidden", "weight_energy")
    for name, tensor, shape in zip(names, cell.parameters(), shapes, strict=True):
        _check_parameter(name, tensor, shape, states)
    return hidden, in_channels


def _check_hamiltonian(cell: Hamiltonian, channels: int) -> tuple[int, int]:
    if channels % 2:
        _fail("states", "have an even number of channels for a Hamiltonian", channels)
    checks.is_finite_number(_NAME, "cell.time_step", cell.time_step)
    checks.is_tensor(_NAME, "cell.weight_hidden", cell.weight_hidden)
    checks.has_rank(_NAME, "cell.weight_hidden", cell.weight_hidden, 2, "[hidden, hidden]")
    return cell.weight_in.shape[0], cell.weight_hidden.shape[0]


def _check_channels(cell: ResidualMLP, channels: int) -> int:
    """The number of channels that the cell reads."""
    given = cell.in_channels
    pairs = (
        isinstance(given, Sequence)
        and len(given) > 0
        and (isinstance(given[0], int) or all(isinstance(p, Sequence) for p in given))
    )
    edges = channel_ranges(given, channels) if given is None or pairs else []
    ordered = (
        len(edges) > 1 and len(edges) % 2 == 0 and all(isinstance(edge, int) for edge in edges)
    )
    ordered = (
        ordered
        and edges[0] >= 0
        and edges[-1] <= channels
        and all(a < b for a, b in zip(edges[::2], edges[1::2], strict=True))
    )
    if not ordered or any(a > b for a, b in zip(edges[1:-1:2], edges[2::2], strict=True)):
        _fail(
            "cell.in_channels",
            f"be ranges (start, stop) within 0 to {channels}, in rising order",
            given,
        )
    return sum(edges[1::2]) - sum(edges[::2])


def _check_actions(
    cell: Cell, actions: Any, states: torch.Tensor, horizon: int, count: int
) -> None:
    if not isinstance(cell, GRU):
        if actions is not None:
            _fail("actions", "be None unless the cell is a GRU", checks.type_name(actions))
        return
    if actions is None:
        raise TypeError(checks.sentence(_NAME, "actions", "be given for a GRU", "None"))
    checks.is_tensor(_NAME, "actions", actions)
    checks.is_strided(_NAME, "actions", actions)
    checks.same_device(_NAME, "actions", actions, states.device)
    _check_float("actions", actions, states)
    wanted = (horizon, count, cell.weight_input.shape[1])
    if tuple(actions.shape) != wanted:
        _fail("actions", f"have shape {wanted} [horizon, rows, A]", tuple(actions.shape))


def _check_anchor(
    cell: Cell, anchor: Any, anchor_rows: Any, states: torch.Tensor, count: int
) -> None:
    if anchor is None:
        if anchor_rows is not None:
            _fail("anchor_rows", "be None without anchor", checks.type_name(anchor_rows))
        return
    if isinstance(cell, GRU):
        _fail("anchor", "be None for a GRU, whose states are normalised", checks.type_name(anchor))
    _check_rows_of("anchor", anchor, states)
    _check_float("anchor", anchor, states, or_float32=True)
    if anchor_rows is not None:
        _check_index("anchor_rows", anchor_rows, states, (count,))
    wanted = (anchor.shape[0] if anchor_rows is not None else count, states.shape[1])
    if tuple(anchor.shape) != wanted:
        _fail("anchor", f"have shape {wanted}", tuple(anchor.shape))


def _check_targets(targets: Any, target_rows: Any, states: torch.Tensor, count: int) -> int:
    """The horizon that the targets imply."""
    checks.is_tensor(_NAME, "targets", targets)
    checks.is_strided(_NAME, "targets", targets)
    checks.same_device(_NAME, "targets", targets, states.device)
    _check_float("targets", targets, states, or_float32=True)
    if target_rows is None:
        checks.has_rank(_NAME, "targets", targets, 3, "[horizon, rows, D] without target_rows")
        horizon = targets.shape[0]
        wanted: tuple[int, ...] = (horizon, count, states.shape[1])
    else:
        checks.has_rank(_NAME, "targets", targets, 2, "[N, D] with target_rows")
        checks.is_tensor(_NAME, "target_rows", target_rows)
        checks.has_rank(_NAME, "target_rows", target_rows, 2, "[horizon, rows]")
        horizon = target_rows.shape[0]
        wanted = (targets.shape[0], states.shape[1])
        _check_index("target_rows", target_rows, states, (horizon, count))
    if tuple(targets.shape) != wanted:
        _fail("targets", f"have shape {wanted}", tuple(targets.shape))
    return horizon


def _check_weights(weights: Any, call: Call, states: torch.Tensor) -> None:
    if isinstance(weights, HardRegion):
        _check_index("weights.sample_ids", weights.sample_ids, states, (call.num_rows,))
        checks.has_dtype(_NAME, "weights.sample_ids", weights.sample_ids, (torch.int64,))
        checks.is_finite_number(_NAME, "weights.temperature", weights.temperature)
        if isinstance(weights.samples, bool) or not isinstance(
            weights.samples, (int, torch.SymInt)
        ):
            raise TypeError(
                checks.sentence(
                    _NAME, "weights.samples", "be an int", checks.type_name(weights.samples)
                )
            )
        if weights.samples < 1:
            _fail("weights.samples", "be at least 1", weights.samples)
    elif weights is not None:
        checks.is_tensor(_NAME, "weights", weights)
        checks.is_strided(_NAME, "weights", weights)
        checks.has_dtype(_NAME, "weights", weights, checks.FLOAT_DTYPES)
        checks.same_device(_NAME, "weights", weights, states.device)
        if tuple(weights.shape) not in ((call.num_rows,), (call.horizon, call.num_rows)):
            _fail(
                "weights",
                f"have shape {(call.num_rows,)} or {(call.horizon, call.num_rows)}",
                tuple(weights.shape),
            )
