"""Residual-MLP and Hamiltonian rollouts in hidden space, forward and backward through time, around
the kernels of a backend.

A residual MLP only reads a = W1 x + b1, and its moves lie in the span of W2's columns. With C = W1
    W2 (the rows of W2 that W1 reads): a_0 = W1 x_0 + b1,   a_{i+1} = a_i + C gelu(a_i) + W1 b2,
    s_k = sum_{i<k} gelu(a_i),   y_k = base + W2 s_k + k b2.
A Hamiltonian with u(a) = dG/da, W1 = [Wq Wp] and C = Wq Wp^T steps twice per step:
    b_i = a_i + dt C u(a_i),   a_{i+1} = b_i - dt C^T u(b_i),   q_k = q_0 + dt Wp^T sum u(a_i),
    p_k = p_0 - dt Wq^T sum u(b_i).
Backward is the transpose of these lines, last step first. The op's one autograd formula calls it
for every backend.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from .arithmetic import add_matmul, affine, fresh, matmul, matmul_into
from .problem import Problem

Tensors = tuple[torch.Tensor, ...]


class Coupling:
    """C = left @ right, which moves the hidden state: as one h x h matrix, or, where few rows use
    it, as its two factors."""

    def __init__(
        self, left: torch.Tensor, right: torch.Tensor, dense: bool, operand: torch.dtype
    ) -> None:
        self.left, self.right, self.operand = left, right, operand
        self.matrix = matmul(left, right, operand) if dense else None
        self._grad: torch.Tensor | None = None
        self._grad_left: torch.Tensor | None = None
        self._grad_right: torch.Tensor | None = None

    def move(self, x: torch.Tensor, transposed: bool = False) -> torch.Tensor:
        """C applied to each row of x; C^T with `transposed`."""
        if self.matrix is not None:
            return matmul(x, self.matrix if transposed else self.matrix.mT, self.operand)
        first, second = (self.left, self.right) if transposed else (self.right.mT, self.left.mT)
        return matmul(matmul(x, first, self.operand), second, self.operand)

    def add_gradient(
        self, grad_moved: torch.Tensor, x: torch.Tensor, transposed: bool = False
    ) -> None:
        """Adds the gradient of ``move(x, transposed)``."""
        rows, columns = (x, grad_moved) if transposed else (grad_moved, x)
        if self.matrix is not None:
            self._grad = add_matmul(self._grad, rows.mT, columns, self.operand)
            return
        self._grad_left = add_matmul(
            self._grad_left, rows.mT, matmul(columns, self.right.mT, self.operand), self.operand
        )
        self._grad_right = add_matmul(
            self._grad_right, matmul(rows, self.left, self.operand).mT, columns, self.operand
        )

    def gradients(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Gradients of left and right, or None where C was never used."""
        if self._grad is not None:
            return matmul(self._grad, self.right.mT, self.operand), matmul(
                self.left.mT, self._grad, self.operand
            )
        return None if self._grad_left is None else (self._grad_left, self._grad_right)


@dataclass(frozen=True)
class Part:
    """A range of channels whose moves are ``sums @ weight + k bias``: all of them for a residual
    MLP, q and p for a Hamiltonian."""

    start: int
    stop: int
    weight: torch.Tensor  # [h, stop - start]
    bias: torch.Tensor | None


class Kernels(Protocol):
    """What a backend computes. Recurrences work in the accumulation dtype; `sums` is ``[kept steps,
    rows, h]``."""

    def dense_coupling(self, problem: Problem) -> bool: ...

    def mlp_recurrence(
        self, a, coupling: Coupling, drift, horizon: int, keep_all: bool, save: bool
    ): ...

    def mlp_recurrence_backward(self, hidden, coupling: Coupling, grad_sums): ...

    def hamiltonian_recurrence(
        self,
        a,
        weights: Tensors,
        coupling: Coupling,
        time_step: float,
        horizon: int,
        keep_all: bool,
        save: bool,
    ): ...

    def hamiltonian_recurrence_backward(
        self, hidden, weights: Tensors, coupling: Coupling, time_step: float, grad_sums
    ): ...

    def readout(self, problem: Problem, part: Part, sums, out) -> None: ...

    def errors(self, problem: Problem, part: Part, sums): ...

    def residual_gradient(
        self, problem: Problem, part: Part, k: int, sums, signs, grad_errors, grad_base
    ): ...


def columns(tensor: torch.Tensor, ranges: list[int], dim: int) -> torch.Tensor:
    """The channels of `ranges` along `dim`: a view for one range, else a copy."""
    pieces = [tensor.narrow(dim, a, b - a) for a, b in zip(ranges[::2], ranges[1::2], strict=True)]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)


def add_columns(total: torch.Tensor, values: torch.Tensor, ranges: list[int], dim: int) -> None:
    """total[ranges] += values along `dim`, in place."""
    offset = 0
    for a, b in zip(ranges[::2], ranges[1::2], strict=True):
        total.narrow(dim, a, b - a).add_(values.narrow(dim, offset, b - a))
        offset += b - a


def parts(problem: Problem) -> list[Part]:
    width = problem.channels
    if problem.cell == "residual_mlp":
        _, _, weight_out, bias_out = problem.parameters
        return [Part(0, width, weight_out.mT, bias_out.contiguous())]
    half, dt = width // 2, problem.scalar
    weight = problem.parameters[0]
    return [
        Part(0, half, weight[:, half:] * dt, None),
        Part(half, width, weight[:, :half] * -dt, None),
    ]


def coupling_of(problem: Problem, kernels: Kernels) -> Coupling:
    weight_in, operand = problem.parameters[0], problem.states.dtype
    dense = kernels.dense_coupling(problem)
    if problem.cell == "residual_mlp":
        right = (
            columns(problem.parameters[2], problem.in_channels, 0)
            if problem.horizon > 1
            else weight_in
        )
        return Coupling(weight_in, right, dense and problem.horizon > 1, operand)
    half = problem.channels // 2
    return Coupling(weight_in[:, :half], weight_in[:, half:].mT, dense, operand)


def forward(problem: Problem, kernels: Kernels) -> Tensors:
    """The output, then what backward needs: residual signs, hidden states and sums (empty where not
    kept)."""
    operand = problem.states.dtype
    keep_all = problem.output != "last"
    weight_in, bias_in = problem.parameters[:2]
    seen = columns(problem.start(), problem.in_channels, 1)
    a = affine(seen, weight_in, bias_in, operand)
    coupling = coupling_of(problem, kernels)
    if problem.cell == "residual_mlp":
        drift = _drift(problem)
        hidden, sums = kernels.mlp_recurrence(
            a, coupling, drift, problem.horizon, keep_all, problem.save
        )
        sums = sums[None]
    else:
        hidden, sums = kernels.hamiltonian_recurrence(
            a,
            tuple(problem.parameters[2:]),
            coupling,
            problem.scalar,
            problem.horizon,
            keep_all,
            problem.save,
        )
    ranges = parts(problem)
    nothing = a.new_empty(0)
    signs = torch.empty(0, dtype=torch.uint8, device=a.device)
    if problem.output == "errors":
        values, kept = zip(
            *(kernels.errors(problem, part, sums[i]) for i, part in enumerate(ranges)), strict=True
        )
        out = values[0] if len(values) == 1 else values[0] + values[1]
        if problem.save and kept[0] is not None:
            signs = torch.stack(kept)
    else:
        shape = [problem.kept_steps, problem.num_rows, problem.channels]
        out = fresh(shape, problem.states.dtype, a.device)
        for i, part in enumerate(ranges):
            kernels.readout(problem, part, sums[i], out[..., part.start : part.stop])
        out = out if keep_all else out[0]
    return out, signs, hidden, sums if problem.save else nothing


def _drift(problem: Problem) -> torch.Tensor | None:
    """W1 b2, by which every step moves the hidden state."""
    if problem.horizon == 1:
        return None
    bias = columns(problem.parameters[3], problem.in_channels, 0)
    return matmul(problem.parameters[0], bias[:, None], problem.accumulate_dtype)[:, 0]


class Gradients(NamedTuple):
    """Gradients of a problem's inputs, one row per rollout row, in the accumulation dtype or, where
    nothing is added to them any more, in that of the inputs; None where there is none."""

    states: torch.Tensor
    parameters: list[torch.Tensor]
    actions: torch.Tensor | None
    anchor: torch.Tensor | None
    targets: torch.Tensor | None


def backward(
    problem: Problem, kernels: Kernels, grad_out: torch.Tensor, saved: Tensors, needs_targets: bool
) -> Gradients:
    """Gradients of every input, per row: scattering gathered rows back is left to the op."""
    signs, hidden, sums = saved
    operand, total = problem.states.dtype, problem.accumulate_dtype
    grad_targets = None
    if problem.output == "errors":
        grad_base = torch.zeros(
            (problem.num_rows, problem.channels), dtype=total, device=hidden.device
        )
        if needs_targets:
            grad_targets = fresh(
                (problem.horizon, problem.num_rows, problem.channels), operand, hidden.device
            )
    else:
        grad_out = (
            grad_out.to(operand) if problem.output == "states" else grad_out.to(operand)[None]
        )
        # Sums of 16-bit numbers are formed in float32 and rounded once; asked for a float32 result,
        # torch would widen every number first.
        grad_base = grad_out[0] if problem.kept_steps == 1 else grad_out.sum(0)
    grad_sums = fresh(sums.shape, total, hidden.device)
    read_gradients = []
    for i, part in enumerate(parts(problem)):
        planes = signs[i] if signs.numel() else None
        read_gradients.append(
            _readout_backward(
                problem,
                kernels,
                part,
                sums[i],
                planes,
                grad_out,
                grad_base,
                grad_sums[i],
                grad_targets,
            )
        )
    coupling = coupling_of(problem, kernels)
    if problem.cell == "residual_mlp":
        grad_a, grad_parameters = _mlp_backward(
            problem, kernels, coupling, hidden, grad_sums[0], read_gradients[0]
        )
    else:
        grad_a, grad_parameters = _hamiltonian_backward(
            problem, kernels, coupling, hidden, grad_sums, read_gradients
        )
    weight_in = problem.parameters[0]
    seen = columns(problem.start(), problem.in_channels, 1)
    grad_parameters[0] = add_matmul(grad_parameters[0], grad_a.mT, seen, operand)
    grad_parameters[1] = grad_a.sum(0)
    anchor = grad_base if problem.anchor is not None else None
    return Gradients(
        _grad_states(problem, grad_a, grad_base, weight_in),
        grad_parameters,
        None,
        anchor,
        grad_targets,
    )


def _grad_states(
    problem: Problem, grad_a: torch.Tensor, grad_base: torch.Tensor, weight_in: torch.Tensor
) -> torch.Tensor:
    """What reaches the initial states through the hidden layer and, without an anchor, as the base
    of the prediction."""
    operand, total = problem.states.dtype, problem.accumulate_dtype
    if problem.in_channels == [0, problem.channels] and (operand == total or problem.rows is None):
        grad_a = grad_a.to(
            operand
        )  # in one product, rounded once where rows are not added up later
        return (
            grad_a @ weight_in
            if problem.anchor is not None
            else torch.addmm(grad_base.to(operand), grad_a, weight_in)
        )
    grad_states = (
        torch.zeros_like(grad_base, dtype=total)
        if problem.anchor is not None
        else grad_base.to(total, copy=True)
    )
    add_columns(grad_states, matmul(grad_a, weight_in, operand), problem.in_channels, 1)
    return grad_states


def _readout_backward(
    problem, kernels, part, sums, signs, grad_out, grad_base, grad_sums, grad_targets
):
    """Gradients of a part's weight and bias; fills grad_sums and grad_targets, and adds an error's
    gradient to grad_base."""
    operand, window = problem.states.dtype, slice(part.start, part.stop)
    grad_weight, grad_bias = None, None
    # The product is formed in the memory order of the parameter, which a residual MLP's part reads
    # transposed.
    transposed = part.weight.stride(0) == 1
    for k in range(sums.shape[0]):
        step = k + 1 if problem.output != "last" else problem.horizon
        if problem.output == "errors":
            grad = kernels.residual_gradient(
                problem, part, k, sums[k], signs, grad_out[k], grad_base[:, window]
            )
            if grad_targets is not None:
                torch.mul(grad, -1, out=grad_targets[k][:, window])
        else:
            grad = grad_out[k][:, window]
        matmul_into(grad_sums[k], grad, part.weight.mT, operand)
        if transposed:
            grad_weight = add_matmul(grad_weight, grad.mT, sums[k], operand)
        else:
            grad_weight = add_matmul(grad_weight, sums[k].mT, grad, operand)
        if part.bias is not None:
            summed = grad.sum(0).to(grad_sums.dtype)
            grad_bias = (
                summed.mul_(step) if grad_bias is None else grad_bias.add_(summed, alpha=step)
            )
    return grad_weight.mT if transposed else grad_weight, grad_bias


def _mlp_backward(problem, kernels, coupling, hidden, grad_sums, read_gradient):
    """The gradient of a_0 and those of W1, b1, W2, b2, the first two without what comes through
    a_0."""
    weight_in, _, _, bias_out = problem.parameters
    total = problem.accumulate_dtype
    grad_hidden, activations = kernels.mlp_recurrence_backward(hidden, coupling, grad_sums)
    grad_weight_in = None
    grad_weight_out, grad_bias_out = read_gradient[0].mT, read_gradient[1]
    if problem.horizon > 1:
        moved = grad_hidden[1:].flatten(0, 1)
        coupling.add_gradient(moved, activations.flatten(0, 1))
        grad_left, grad_right = coupling.gradients()
        grad_drift = moved.sum(0).to(total)
        bias_seen = columns(bias_out, problem.in_channels, 0).to(total)
        grad_weight_in = grad_left.addr_(grad_drift, bias_seen)
        add_columns(grad_weight_out, grad_right, problem.in_channels, 0)
        add_columns(grad_bias_out, weight_in.mT.to(total) @ grad_drift, problem.in_channels, 0)
    return grad_hidden[0], [grad_weight_in, None, grad_weight_out, grad_bias_out]


def _hamiltonian_backward(problem, kernels, coupling, hidden, grad_sums, read_gradients):
    half, dt, total = problem.channels // 2, problem.scalar, problem.accumulate_dtype
    weight_in = problem.parameters[0]
    grad_a, grad_hidden, grad_bias_hidden, grad_energy = kernels.hamiltonian_recurrence_backward(
        hidden, tuple(problem.parameters[2:]), coupling, dt, grad_sums
    )
    grad_weight_in = torch.empty(weight_in.shape, dtype=total, device=hidden.device)
    (grad_read_q, _), (grad_read_p, _) = read_gradients
    grad_left, grad_right = coupling.gradients()
    grad_weight_in[:, half:] = grad_read_q * dt + grad_right.mT
    grad_weight_in[:, :half] = grad_read_p * -dt + grad_left
    return grad_a, [grad_weight_in, None, grad_hidden, grad_bias_hidden, grad_energy]
