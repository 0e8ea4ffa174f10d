"""The contract of latent_rollout: one schema, one fake and one autograd formula for every kernel
backend.

The backend's name is an argument of the op and is saved for backward, so a new backend adds its
file and its name in PRIORITY.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace

import torch

from ... import checks
from ...backend import BackendUnsupportedError, Room
from .call import Call
from .cells import KINDS, Cell, Hamiltonian, ResidualMLP, channel_ranges
from .preferences import PREFERENCES
from .problem import Problem, saved_shapes

PRIORITY = ("cuda", "triton", "cpu", "torch", "reference")

_NAME = "latent_rollout"
_library = torch.library.Library("jepa_kernels", "FRAGMENT")
_INPUTS = (
    "Tensor states, Tensor? rows, Tensor[] parameters, Tensor? actions, Tensor? anchor, Tensor? "
    "anchor_rows, Tensor? targets, "
    "Tensor? target_rows, str cell, SymInt[] in_channels, float scalar, SymInt horizon, str "
    "output, float exponent, bool save, str backend"
)
_library.define(f"latent_rollout_fwd({_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)")
# needs: which gradients are wanted, in the order states, parameters, actions, anchor, targets; the
# others come back empty.
_library.define(
    f"latent_rollout_bwd(Tensor grad_out, Tensor[] saved, bool[] needs, {_INPUTS}) -> Tensor[]"
)

Tensors = tuple[torch.Tensor, ...]


def run(
    backend: str,
    call: Call,
    states: torch.Tensor,
    cell: Cell,
    rows: torch.Tensor | None,
    actions: torch.Tensor | None,
    anchor: torch.Tensor | None,
    anchor_rows: torch.Tensor | None,
    targets: torch.Tensor | None,
    target_rows: torch.Tensor | None,
    exponent: float,
) -> torch.Tensor:
    """Runs a checked call on `backend`; `reference` uses its own autograd. Predictions, or errors
    ``[horizon, rows]`` with targets."""
    rows, anchor_rows, target_rows = (
        None if index is None else index.long().contiguous()
        for index in (rows, anchor_rows, target_rows)
    )
    if backend == "reference":
        reference = ROOM.modules["reference"]
        _check_values(states, rows, anchor, anchor_rows, targets, target_rows)
        predictions = reference.compose(
            states, cell, call.horizon, rows, actions, anchor, anchor_rows
        )
        if targets is None:
            return (
                predictions[-1].to(states.dtype)
                if call.output == "last"
                else torch.stack(predictions).to(states.dtype)
            )
        errors = reference.errors(
            predictions, targets, target_rows, exponent, call.cell == "hamiltonian"
        )
        return errors if states.dtype == torch.float64 else errors.float()
    states, anchor, targets = (
        t if t is None or t.stride(-1) == 1 else t.contiguous() for t in (states, anchor, targets)
    )
    kind, ranges, scalar = _numbers(cell, states.shape[1])
    out, *_ = torch.ops.jepa_kernels.latent_rollout_fwd(
        states,
        rows,
        cell.parameters(),
        actions,
        anchor,
        anchor_rows,
        targets,
        target_rows,
        kind,
        ranges,
        scalar,
        call.horizon,
        call.output,
        exponent,
        call.needs_grad,
        backend,
    )
    return out


def with_parameters(cell: Cell, parameters: list[torch.Tensor]) -> Cell:
    """`cell` with other parameter tensors, in the order of ``cell.parameters()``."""
    names = list(type(cell).__dataclass_fields__)[: len(parameters)]
    return replace(cell, **dict(zip(names, parameters, strict=True)))


def _numbers(cell: Cell, channels: int) -> tuple[str, list[int], float]:
    kind = KINDS[type(cell)]
    if isinstance(cell, ResidualMLP):
        return kind, channel_ranges(cell.in_channels, channels), 0.0
    return (
        kind,
        [0, channels],
        float(cell.time_step if isinstance(cell, Hamiltonian) else cell.epsilon),
    )


def _cell_of(problem: Problem) -> Cell:
    """The cell of a direct call, so that the public function's checks apply to it."""
    edges = problem.in_channels
    by_name = {name: kind for kind, name in KINDS.items()}
    if problem.cell not in by_name:
        raise ValueError(
            checks.sentence(_NAME, "cell", f"be one of {', '.join(by_name)}", repr(problem.cell))
        )
    kind = by_name[problem.cell]
    count = len(kind.__dataclass_fields__) - 1
    if len(problem.parameters) != count:
        raise ValueError(
            checks.sentence(
                _NAME,
                "parameters",
                f"be the {count} tensors of a {kind.__name__}",
                len(problem.parameters),
            )
        )
    if kind is ResidualMLP:
        if len(edges) < 2 or len(edges) % 2:
            raise ValueError(
                checks.sentence(_NAME, "in_channels", "be pairs of start and stop", edges)
            )
        return kind(
            *problem.parameters, in_channels=list(zip(edges[::2], edges[1::2], strict=True))
        )
    return kind(*problem.parameters, problem.scalar)


def _check_values(states, rows, anchor, anchor_rows, targets, target_rows) -> None:
    """Row indices must lie in their table."""
    for argument, index, table in (
        ("rows", rows, states),
        ("anchor_rows", anchor_rows, anchor),
        ("target_rows", target_rows, targets),
    ):
        if index is not None and index.numel() and checks.values_are_checked(index):
            low, high = (int(value) for value in torch.aminmax(index))
            if low < 0 or high >= table.shape[0]:
                raise ValueError(
                    checks.sentence(
                        _NAME,
                        argument,
                        f"hold rows from 0 to {table.shape[0] - 1}",
                        low if low < 0 else high,
                    )
                )


def _check_direct_call(problem: Problem, backend: str) -> None:
    """What the public function guarantees and a direct caller of torch.ops could get wrong, plus
    the checks of values."""
    from .api import prepare

    if backend not in ROOM.modules or backend == "reference":
        allowed = ", ".join(name for name in PRIORITY if name != "reference")
        raise ValueError(checks.sentence(_NAME, "backend", f"be one of {allowed}", repr(backend)))
    if (problem.output == "errors") != (problem.targets is not None):
        raise ValueError(
            checks.sentence(
                _NAME, "targets", "be given for output errors and for no other", problem.output
            )
        )
    if problem.targets is not None:
        implied = (problem.targets if problem.target_rows is None else problem.target_rows).shape[
            :1
        ]
        if list(implied) != [problem.horizon]:
            raise ValueError(
                checks.sentence(
                    _NAME, "targets", f"hold {problem.horizon} steps", f"{tuple(implied)}"
                )
            )
    call = prepare(
        problem.states,
        _cell_of(problem),
        problem.horizon,
        rows=problem.rows,
        actions=problem.actions,
        anchor=problem.anchor,
        anchor_rows=problem.anchor_rows,
        targets=problem.targets,
        target_rows=problem.target_rows,
        exponent=problem.exponent,
        output=problem.output,
    )
    for argument in ("rows", "anchor_rows", "target_rows"):
        index = getattr(problem, argument)
        if index is not None:
            checks.has_dtype(_NAME, argument, index, (torch.int64,))
    for argument in ("states", "anchor", "targets"):
        tensor = getattr(problem, argument)
        if tensor is not None and tensor.stride(-1) != 1:
            raise ValueError(
                checks.sentence(_NAME, argument, "have channel stride 1", tensor.stride(-1))
            )
    reasons = ROOM.reasons(backend, call)
    if reasons:
        raise BackendUnsupportedError(
            f"{_NAME} cannot run on backend '{backend}': {'; '.join(reasons)}"
        )
    _check_values(
        problem.states,
        problem.rows,
        problem.anchor,
        problem.anchor_rows,
        problem.targets,
        problem.target_rows,
    )


def _exact(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """Autocast off: the public function has cast what it should, and sums in here stay in
    float32."""
    kind = tensor.device.type
    return (
        torch.autocast(kind, enabled=False)
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        else contextlib.nullcontext()
    )


def _problem(inputs) -> tuple[Problem, str]:
    (
        states,
        rows,
        parameters,
        *middle,
        cell,
        in_channels,
        scalar,
        horizon,
        output,
        exponent,
        save,
        backend,
    ) = inputs
    return Problem(
        states,
        rows,
        list(parameters),
        *middle,
        cell,
        list(in_channels),
        scalar,
        horizon,
        output,
        exponent,
        save,
    ), backend


def _fwd(*inputs) -> Tensors:
    problem, backend = _problem(inputs)
    _check_direct_call(problem, backend)
    with _exact(problem.states):
        return tuple(t.contiguous() for t in ROOM.modules[backend].forward(problem))


def _out_shape(problem: Problem) -> list[int]:
    if problem.output == "errors":
        return [problem.horizon, problem.num_rows]
    shape = [problem.num_rows, problem.channels]
    return shape if problem.output == "last" else [problem.horizon, *shape]


def _out_dtype(problem: Problem) -> torch.dtype:
    return problem.accumulate_dtype if problem.output == "errors" else problem.states.dtype


def _one_device(problem: Problem, *more: torch.Tensor) -> None:
    """A direct call with a tensor on "meta" reaches the fake, whatever the other tensors are."""
    given = (
        problem.states,
        problem.rows,
        *problem.parameters,
        problem.actions,
        problem.anchor,
        problem.anchor_rows,
        *more,
    )
    for tensor in (*given, problem.targets, problem.target_rows):
        if tensor is not None:
            checks.same_device(_NAME, "every tensor", tensor, problem.states.device)


def _fwd_fake(*inputs) -> Tensors:
    problem, backend = _problem(inputs)
    _one_device(problem)
    signs, hidden, sums = saved_shapes(problem, ROOM.modules[backend].SAVES_SIGNS)
    new = problem.states.new_empty
    return (
        new(_out_shape(problem), dtype=_out_dtype(problem)),
        new(signs, dtype=torch.uint8),
        new(hidden, dtype=problem.accumulate_dtype),
        new(sums, dtype=problem.accumulate_dtype),
    )


def _inputs_of(problem: Problem) -> list[torch.Tensor | None]:
    return [problem.states, *problem.parameters, problem.actions, problem.anchor, problem.targets]


def _is(tensor: torch.Tensor, shape: list[int], dtype: torch.dtype, device: torch.device) -> bool:
    return (
        list(tensor.shape) == shape
        and tensor.dtype == dtype
        and tensor.device == device
        and tensor.layout == torch.strided
    )


def _check_direct_backward(
    problem: Problem, backend: str, grad_out: torch.Tensor, saved: Tensors, needs: list[bool]
) -> None:
    """What a direct caller of backward could get wrong besides the inputs of forward."""
    _check_direct_call(problem, backend)
    wanted, device = _out_shape(problem), problem.states.device
    if not _is(grad_out, wanted, _out_dtype(problem), device):
        raise ValueError(
            checks.sentence(
                _NAME,
                "grad_out",
                f"be {_out_dtype(problem)} of shape {wanted}",
                f"{grad_out.dtype} {tuple(grad_out.shape)}",
            )
        )
    shapes = saved_shapes(problem, ROOM.modules[backend].SAVES_SIGNS)
    dtypes = (torch.uint8, problem.accumulate_dtype, problem.accumulate_dtype)
    same = len(saved) == 3 and all(
        _is(t, s, d, device) for t, s, d in zip(saved, shapes, dtypes, strict=True)
    )
    if not problem.save or not same:
        got = [(checks.dtype_name(t.dtype), tuple(t.shape)) for t in saved]
        raise ValueError(
            checks.sentence(
                _NAME, "saved", f"be what forward returned with save, shapes {shapes}", got
            )
        )
    if len(needs) != len(problem.parameters) + 4:
        raise ValueError(
            checks.sentence(
                _NAME,
                "needs",
                "have one flag for states, each parameter, actions, anchor and targets",
                f"{len(needs)} flags",
            )
        )


def _bwd(grad_out, saved, needs, *inputs) -> list[torch.Tensor]:
    problem, backend = _problem(inputs)
    _check_direct_backward(problem, backend, grad_out, tuple(saved), list(needs))
    with _exact(problem.states):
        states, parameters, actions, anchor, targets = ROOM.modules[backend].backward(
            problem, grad_out, tuple(saved), needs[-1]
        )
    per_row = [states, *parameters, actions, anchor, targets]
    tables = {
        0: problem.rows,
        len(per_row) - 2: problem.anchor_rows,
        len(per_row) - 1: problem.target_rows,
    }
    results = []
    for i, (gradient, given, needed) in enumerate(
        zip(per_row, _inputs_of(problem), needs, strict=True)
    ):
        if given is None or not needed:
            results.append(problem.states.new_empty(0))
            continue
        index = tables.get(i)
        if index is not None:
            table = torch.zeros(given.shape, dtype=problem.accumulate_dtype, device=given.device)
            gradient = table.index_add_(
                0, index.flatten(), gradient.reshape(-1, given.shape[1]).to(table.dtype)
            )
        results.append(gradient.reshape(given.shape).to(given.dtype).contiguous())
    return results


def _bwd_fake(grad_out, saved, needs, *inputs) -> list[torch.Tensor]:
    problem, _ = _problem(inputs)
    _one_device(problem, grad_out, *saved)
    return [
        torch.empty_like(given, memory_format=torch.contiguous_format)
        if given is not None and needed
        else problem.states.new_empty(0)
        for given, needed in zip(_inputs_of(problem), needs, strict=True)
    ]


def _setup_context(ctx, inputs, output) -> None:
    problem, ctx.backend = _problem(inputs)
    _, *saved = output
    ctx.mark_non_differentiable(*saved)
    ctx.set_materialize_grads(False)  # or it fills zeros as large as what is saved
    ctx.count = len(problem.parameters)
    tensors = (
        problem.states,
        problem.rows,
        problem.actions,
        problem.anchor,
        problem.anchor_rows,
        problem.targets,
        problem.target_rows,
    )
    ctx.save_for_backward(*tensors, *problem.parameters, *saved)
    ctx.numbers = inputs[8:14]


def _backward(ctx, grad_out, *unused):
    if grad_out is None:
        return None, None, [None] * ctx.count, *([None] * 13)
    states, rows, actions, anchor, anchor_rows, targets, target_rows, *rest = ctx.saved_tensors
    parameters, saved = rest[: ctx.count], rest[ctx.count :]
    need_states, _, need_parameters, need_actions, need_anchor, _, need_targets, *_ = (
        ctx.needs_input_grad
    )
    needs = [need_states, *need_parameters, need_actions, need_anchor, need_targets]
    grads = torch.ops.jepa_kernels.latent_rollout_bwd(
        grad_out,
        saved,
        needs,
        states,
        rows,
        parameters,
        actions,
        anchor,
        anchor_rows,
        targets,
        target_rows,
        *ctx.numbers,
        True,
        ctx.backend,
    )
    wanted = [grad if needed else None for grad, needed in zip(grads, needs, strict=True)]
    grad_states, *grad_parameters, grad_actions, grad_anchor, grad_targets = wanted
    return (
        grad_states,
        None,
        grad_parameters,
        grad_actions,
        grad_anchor,
        None,
        grad_targets,
        *([None] * 9),
    )


def _refuse_double_backward(ctx, *grads):
    raise NotImplementedError(
        f"{_NAME}: double backward must not be requested, got a gradient of a gradient. Use "
        "backend='reference'."
    )


_library.impl("latent_rollout_fwd", _fwd, "CompositeExplicitAutograd")
_library.impl("latent_rollout_bwd", _bwd, "CompositeExplicitAutograd")
torch.library.register_fake("jepa_kernels::latent_rollout_fwd", _fwd_fake, lib=_library)
torch.library.register_fake("jepa_kernels::latent_rollout_bwd", _bwd_fake, lib=_library)
torch.library.register_autograd(
    "jepa_kernels::latent_rollout_fwd", _backward, setup_context=_setup_context, lib=_library
)
torch.library.register_autograd(
    "jepa_kernels::latent_rollout_bwd", _refuse_double_backward, lib=_library
)


def _prepare(*args, **kwargs):
    from .api import prepare

    return prepare(*args, **kwargs)


def _example(device_type: str, dtype: torch.dtype) -> Call:
    return Call(device_type, dtype, "residual_mlp", 512, 768, 768, (256,), 0, 4, "states", True)


ROOM = Room(_NAME, PRIORITY, _prepare, _example, PREFERENCES)
