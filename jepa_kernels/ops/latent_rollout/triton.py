"""Triton backend: NVIDIA GPUs from compute capability 8.0, and CPU tensors under
TRITON_INTERPRET=1; plain products through torch.

A residual MLP or Hamiltonian takes one launch for all steps of the forward pass: a program keeps
the hidden state of its rows in registers and streams the coupling. A readout fuses the product with
the base, the bias and, for a loss, the reduction, so that no prediction is written. A GRU takes a
launch per step around two products of torch. 16-bit products run on tensor cores; no atomics, so
results repeat.

The kernels are imported on first use. Nothing here reads a tensor's values, so a call never waits
for the device.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.nn.functional as F

from ... import triton_runtime
from . import composition
from .arithmetic import add_matmul, inside, matmul
from .call import Call, dtype_reasons
from .problem import LOW_PRECISION, Problem
from .state_space import with_action_products

SAVES_SIGNS = False

# Rows of a program, and terms of a product staged at a time: all that a thread of eight warps can
# hold at a hidden width of 256.
ROWS, COLUMNS = 16, 64
NORM_ROWS = 4
HAMILTONIAN_BWD_STAGES = 1  # loads ahead of their use would make it spill on 8.0
_WIDEST = {"residual_mlp": 512, "hamiltonian": 256, "gru": 4096}


def unsupported_reasons(call: Call) -> list[str]:
    reasons = triton_runtime.unavailable_reasons(call.device_type)
    widest = _WIDEST[call.cell]
    if max(call.hidden) > widest:
        reasons.append(
            f"hidden width of a {call.cell} must be at most {widest}, got {max(call.hidden)}"
        )
    return reasons + dtype_reasons(call, (torch.float32, *LOW_PRECISION))


def forward(problem: Problem) -> tuple[torch.Tensor, ...]:
    with _device(problem.states):
        return composition.forward(problem, TritonKernels())


def backward(
    problem: Problem, grad_out: torch.Tensor, saved: tuple[torch.Tensor, ...], needs_targets: bool
) -> composition.Gradients:
    with _device(problem.states):
        return composition.backward(problem, TritonKernels(), grad_out, saved, needs_targets)


def _device(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def padded(width: int) -> int:
    """The width of a tile: a power of two that tensor cores take."""
    return max(16, 1 << (width - 1).bit_length())


def terms(operand: torch.dtype, middle: int = 0) -> int:
    """Terms of a product that are staged at a time: fewer where elements are wide, or a
    Hamiltonian's tiles leave few registers."""
    return 16 if operand == torch.float32 or middle > 128 else 32


def rows_of(hidden: int, middle: int, operand: torch.dtype) -> int:
    """Rows of a recurrence's program: fewer where the 32-bit tiles of a Hamiltonian would not fit
    the registers of eight warps."""
    return 8 if middle and operand == torch.float32 and max(hidden, middle) > 128 else ROWS


def options(warps: int, stages: int = 2) -> dict[str, Any]:
    from ...triton_support import FP_FUSION

    return {"num_warps": warps, "num_stages": stages, **FP_FUSION}


class TritonKernels:
    """The kernels of `hidden_space` and `state_space` in Triton."""

    def __init__(self) -> None:
        from . import triton_kernels

        self.kernels = triton_kernels

    def dense_coupling(self, problem: Problem) -> bool:
        return True

    @staticmethod
    def _tiles(hidden: int, operand: torch.dtype, middle: int = 0) -> dict[str, Any]:
        return {
            "BM": rows_of(hidden, middle, operand),
            "BN": padded(hidden),
            "BK": terms(operand, middle),
            **options(8),
        }

    @staticmethod
    def _matrix(coupling) -> torch.Tensor:
        return coupling.matrix.to(coupling.operand)

    def mlp_recurrence(self, a, coupling, drift, horizon, keep_all, save):
        if horizon == 1:
            return a[None] if save else a.new_empty(0), F.gelu(a)[None]
        rows, hidden = a.shape
        sums = a.new_empty((horizon if keep_all else 1, rows, hidden))
        inputs = a.new_empty((horizon, rows, hidden) if save else (0,))
        matrix = self._matrix(coupling)
        if rows:
            self.kernels.mlp_fwd_kernel[(-(-rows // ROWS),)](
                a,
                matrix,
                drift,
                sums,
                inputs,
                matrix.new_empty((rows, hidden)),
                rows,
                horizon,
                hidden,
                hidden,
                KEEP=keep_all,
                SAVE=save,
                **self._tiles(hidden, matrix.dtype),
            )
        return inputs, sums

    def mlp_recurrence_backward(self, hidden, coupling, grad_sums):
        horizon, rows, width = hidden.shape
        if horizon == 1:
            return torch.ops.aten.gelu_backward(grad_sums, hidden), hidden[:0]
        grad_inputs, activations = torch.empty_like(hidden), torch.empty_like(hidden[1:])
        matrix = self._matrix(coupling)
        if rows:
            self.kernels.mlp_bwd_kernel[(-(-rows // ROWS),)](
                hidden,
                matrix,
                grad_sums,
                grad_inputs,
                activations,
                matrix.new_empty((rows, width)),
                rows,
                horizon,
                width,
                width,
                KEPT=grad_sums.shape[0] > 1,
                **self._tiles(width, matrix.dtype),
            )
        return grad_inputs, activations

    def hamiltonian_recurrence(self, a, weights, coupling, time_step, horizon, keep_all, save):
        weight, bias, energy = (
            weights[0].contiguous(),
            weights[1].float(),
            weights[2].float().contiguous(),
        )
        (rows, hidden), middle = a.shape, weight.shape[0]
        sums = a.new_empty((2, horizon if keep_all else 1, rows, hidden))
        inputs = a.new_empty((2 * horizon, rows, hidden) if save else (0,))
        scratch, deep_scratch = weight.new_empty((rows, hidden)), weight.new_empty((rows, middle))
        if rows:
            tiles = self._tiles(hidden, weight.dtype, middle)
            self.kernels.hamiltonian_fwd_kernel[(-(-rows // tiles["BM"]),)](
                a,
                weight,
                bias,
                energy,
                self._matrix(coupling),
                sums,
                inputs,
                scratch,
                deep_scratch,
                rows,
                horizon,
                hidden,
                middle,
                time_step,
                hidden,
                middle,
                KEEP=keep_all,
                SAVE=save,
                BD=padded(middle),
                **tiles,
            )
        return inputs, sums

    def hamiltonian_recurrence_backward(self, hidden, weights, coupling, time_step, grad_sums):
        weight, bias, energy = (
            weights[0].contiguous(),
            weights[1].float(),
            weights[2].float().contiguous(),
        )
        (steps, rows, width), middle = hidden.shape, weight.shape[0]
        matrix, operand = self._matrix(coupling), weight.dtype
        grad_weight, grad_bias, grad_energy = None, torch.zeros_like(bias), torch.zeros_like(energy)
        carried, force = torch.zeros_like(hidden[0]), torch.empty_like(hidden[0])
        left, right = hidden.new_empty((2, rows, middle)), hidden.new_empty((2, rows, width))
        energy_rows = hidden.new_empty((rows, middle))
        scratch, deep_scratch = weight.new_empty((rows, width)), weight.new_empty((rows, middle))
        every_step = 2 * grad_sums.shape[1] >= steps
        tiles = self._tiles(width, operand, middle) | options(8, HAMILTONIAN_BWD_STAGES)
        following = (
            [torch.zeros_like(carried) for _ in range(2)] if every_step else list(grad_sums[:, 0])
        )
        for j in reversed(range(steps)):
            which, moves = j % 2, j + 1 < steps
            step = -time_step if which else time_step
            if every_step:
                following[which] += grad_sums[which][j // 2]
            moved_by = carried * step if moves else None
            if rows:
                self.kernels.hamiltonian_bwd_kernel[(-(-rows // tiles["BM"]),)](
                    hidden[j],
                    weight,
                    bias,
                    energy,
                    matrix,
                    following[which],
                    carried,
                    force,
                    left,
                    right,
                    energy_rows,
                    scratch,
                    deep_scratch,
                    rows,
                    width,
                    middle,
                    step,
                    width,
                    middle,
                    MOVES=moves,
                    TRANSPOSED=which == 1,
                    BD=padded(middle),
                    **tiles,
                )
            grad_weight = add_matmul(
                grad_weight, left.flatten(0, 1).mT, right.flatten(0, 1), operand
            )
            grad_bias += left[1].sum(0)
            grad_energy += energy_rows.sum(0)
            if moved_by is not None:
                coupling.add_gradient(moved_by, force, transposed=which == 1)
        return carried, grad_weight, grad_bias, grad_energy

    def _readout(
        self,
        problem,
        part,
        sums,
        first_step,
        mode,
        *,
        targets=(None, None),
        out=None,
        errors=None,
        gradient=(None, None, None),
    ):
        base, rows = problem.base()
        base, rows = base[:, part.start : part.stop], inside(rows, base)
        targets, target_rows = targets
        if targets is not None:
            target_rows = inside(target_rows, targets)
            targets = targets[..., part.start : part.stop]
        steps, count, hidden = sums.shape
        grad_errors, grad, grad_base = gradient
        if count == 0:
            return
        self.kernels.readout_kernel[(-(-count // ROWS), steps)](
            sums,
            part.weight,
            None if part.bias is None else part.bias.float(),
            base,
            rows,
            targets,
            target_rows,
            out,
            errors,
            grad_errors,
            grad,
            grad_base,
            count,
            first_step,
            part.weight.stride(0),
            part.weight.stride(1),
            base.stride(0),
            targets.stride(0) if targets is not None and targets.dim() == 3 else 0,
            0 if targets is None else targets.stride(-2),
            0 if out is None else out.stride(0),
            0 if out is None else out.stride(1),
            0 if grad_base is None else grad_base.stride(0),
            hidden,
            part.stop - part.start,
            MODE=mode,
            EXPONENT=float(problem.exponent),
            BM=ROWS,
            BN=COLUMNS,
            BK=terms(part.weight.dtype),
            **options(4),
        )

    def readout(self, problem, part, sums, out):
        self._readout(
            problem, part, sums, problem.horizon if problem.output == "last" else 1, 0, out=out
        )

    def errors(self, problem, part, sums):
        errors = sums.new_empty(sums.shape[:2])
        self._readout(
            problem, part, sums, 1, 1, targets=(problem.targets, problem.target_rows), errors=errors
        )
        return errors, None

    def residual_gradient(self, problem, part, k, sums, signs, grad_errors, grad_base):
        grad = sums.new_empty((sums.shape[0], part.stop - part.start))
        targets = (
            (problem.targets[k], None)
            if problem.target_rows is None
            else (problem.targets, problem.target_rows[k])
        )
        self._readout(
            problem,
            part,
            sums[None],
            k + 1,
            2,
            targets=targets,
            gradient=(grad_errors.contiguous(), grad, grad_base),
        )
        return grad

    def _norm(self, rows: int, width: int) -> tuple[tuple[int], dict[str, Any]]:
        return (-(-rows // NORM_ROWS),), {
            "BM": NORM_ROWS,
            "BN": padded(width),
            **options(4 if width <= 1024 else 8),
        }

    def gru_recurrence(self, start, actions, weights, epsilon, keep_all, save):
        weight_input, weight_state, *small = weights
        bias_input, bias_state, norm_weight, norm_bias = (w.float().contiguous() for w in small)
        (horizon, rows, _), width, operand = actions.shape, start.shape[1], weight_state.dtype
        states = start.new_empty((horizon if keep_all else 1, rows, width))
        gates = start.new_empty((horizon, rows, 4 * width) if save else (0,))
        grid, fixed = self._norm(rows, width)
        state = start
        for k in range(horizon if rows else 0):
            from_action, from_state = (
                matmul(actions[k], weight_input.mT, operand),
                matmul(state, weight_state.mT, operand),
            )
            after = (
                states[k]
                if keep_all
                else states[0]
                if k + 1 == horizon
                else torch.empty_like(states[0])
            )
            self.kernels.gru_fwd_kernel[grid](
                from_action,
                from_state,
                bias_input,
                bias_state,
                norm_weight,
                norm_bias,
                state,
                after,
                gates[k] if save else gates,
                rows,
                state.stride(0),
                epsilon,
                width,
                SAVE=save,
                **fixed,
            )
            state = after
        return states, gates

    def gru_recurrence_backward(
        self, start, actions, states, gates, weights, epsilon, grad_states, every_step
    ):
        weight_state, norm_weight = weights[1], weights[4].float()
        (horizon, rows, _), width, operand = gates.shape, start.shape[1], weight_state.dtype
        grid, fixed = self._norm(rows, width)
        grad_gates, grad_norm = torch.empty_like(gates), start.new_zeros((grid[0], 2, width))
        carried = torch.zeros_like(states[0]) if every_step else grad_states.contiguous()
        for k in reversed(range(horizon if rows else 0)):
            grad = carried + grad_states[k] if every_step else carried
            before, carried = states[k - 1] if k else start, torch.empty_like(carried)
            self.kernels.gru_bwd_kernel[grid](
                gates[k],
                before,
                grad,
                norm_weight,
                grad_gates[k],
                carried,
                grad_norm,
                rows,
                before.stride(0),
                epsilon,
                width,
                **fixed,
            )
            carried = add_matmul(
                carried, grad_gates[k][:, : 2 * width], weight_state[: 2 * width], operand
            )
            carried = add_matmul(
                carried, grad_gates[k][:, 3 * width :], weight_state[2 * width :], operand
            )
        return with_action_products(
            grad_gates, carried, grad_norm[:, 0].sum(0), grad_norm[:, 1].sum(0), actions, weights[0]
        )
