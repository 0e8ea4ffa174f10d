"""C++ CPU backend: csrc/latent_rollout/cpu.cpp through the stable-ABI binding, plain matrix products through torch.

float32 inside: 16-bit inputs are widened once, which on a CPU costs less than what their products would lose in speed and accuracy.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ... import native
from . import hidden_space, state_space
from .arithmetic import add_matmul
from .call import Call, dtype_reasons
from .problem import LOW_PRECISION, Problem

SAVES_SIGNS = True


def unsupported_reasons(call: Call) -> list[str]:
    reasons = []
    if not native.available():
        reasons.append(str(native.reason()))
    if call.device_type != "cpu":
        reasons.append(f"tensors must be on a CPU, got {call.device_type}")
    return reasons + dtype_reasons(call, (torch.float32, *LOW_PRECISION))


def forward(problem: Problem) -> tuple[torch.Tensor, ...]:
    composition = state_space if problem.cell == "gru" else hidden_space
    out, *saved = composition.forward(_widened(problem), Native())
    return out if problem.output == "errors" else out.to(problem.states.dtype), *saved


def backward(problem: Problem, grad_out: torch.Tensor, saved: tuple[torch.Tensor, ...], needs_targets: bool) -> hidden_space.Gradients:
    composition = state_space if problem.cell == "gru" else hidden_space
    return composition.backward(_widened(problem), Native(), grad_out, saved, needs_targets)


def _widened(problem: Problem) -> Problem:
    return problem.upcast() if problem.states.dtype in LOW_PRECISION else problem


class Native:
    """The kernels of `hidden_space` and `state_space` in C++."""

    def __init__(self) -> None:
        self.ops = torch.ops.jepa_kernels_native
        self.isa = native.isa()

    def dense_coupling(self, problem: Problem) -> bool:
        return True

    def mlp_recurrence(self, a, coupling, drift, horizon, keep_all, save):
        if horizon == 1:
            return a[None] if save else a.new_empty(0), F.gelu(a)[None]
        return self.ops.latent_rollout_mlp_fwd(a, coupling.matrix, drift, horizon, keep_all, save, self.isa)

    def mlp_recurrence_backward(self, hidden, coupling, grad_sums):
        return self.ops.latent_rollout_mlp_bwd(hidden, coupling.matrix, grad_sums, self.isa)

    def hamiltonian_recurrence(self, a, weights, coupling, time_step, horizon, keep_all, save):
        weights = [w.contiguous() for w in weights]
        return self.ops.latent_rollout_hamiltonian_fwd(a, *weights, coupling.matrix, time_step, horizon, keep_all, save, self.isa)

    def hamiltonian_recurrence_backward(self, hidden, weights, coupling, time_step, grad_sums):
        weights = [w.contiguous() for w in weights]
        gradients = [None, torch.zeros_like(weights[1]), torch.zeros_like(weights[2])]
        carried = torch.zeros_like(hidden[0])
        last = hidden.shape[0] - 1
        every_step = 2 * grad_sums.shape[1] > last
        following = [torch.zeros_like(carried) for _ in range(2)] if every_step else list(grad_sums[:, 0])
        for j in reversed(range(hidden.shape[0])):
            which, step = j % 2, (-time_step if j % 2 else time_step) if j < last else 0.0
            if every_step:
                following[which] += grad_sums[which][j // 2]
            moved_by = carried.clone() if j < last else None
            force, left, right, grad_energy = self.ops.latent_rollout_hamiltonian_bwd(
                hidden[j], *weights, coupling.matrix, step, which == 1, following[which], carried, self.isa
            )
            gradients[0] = add_matmul(gradients[0], left.flatten(0, 1).mT, right.flatten(0, 1), hidden.dtype)
            gradients[1] += left[1].sum(0)
            gradients[2] += grad_energy.sum(0)
            if moved_by is not None:
                coupling.add_gradient(moved_by.mul_(step), force, transposed=which == 1)
        return carried, *gradients

    def readout(self, problem, part, sums, out):
        base, rows = problem.base()
        step = problem.horizon if problem.output == "last" else 1
        self.ops.latent_rollout_readout(sums, part.weight, part.bias, base[:, part.start : part.stop], rows, step, out, self.isa)

    def _targets(self, problem, part, k=None):
        """The targets of a part, of every step or of step k alone, and the rows to take of them."""
        targets, rows = problem.targets, problem.target_rows
        if k is not None:
            targets, rows = (targets[k : k + 1], None) if rows is None else (targets, rows[k])
        return targets[..., part.start : part.stop], rows

    def errors(self, problem, part, sums):
        base, rows = problem.base()
        save = problem.save and problem.exponent == 1.0
        values, signs = self.ops.latent_rollout_errors(
            *(sums, part.weight, part.bias, base[:, part.start : part.stop], rows, *self._targets(problem, part)),
            *(problem.exponent, save, self.isa),
        )
        return values, signs if save else None

    def residual_gradient(self, problem, part, k, sums, signs, grad_errors, grad_base):
        base, rows = problem.base()
        return self.ops.latent_rollout_errors_gradient(
            *(sums[None], part.weight, part.bias, base[:, part.start : part.stop], rows, *self._targets(problem, part, k)),
            *(problem.exponent, None if signs is None else signs[k], k + 1, grad_errors[None].contiguous(), grad_base, self.isa),
        )[0]

    def gru_recurrence(self, start, actions, weights, epsilon, keep_all, save):
        weights = [w.contiguous() for w in weights]
        return self.ops.latent_rollout_gru_fwd(start, actions.contiguous(), weights, epsilon, keep_all, save, self.isa)

    def gru_recurrence_backward(self, start, actions, states, gates, weights, epsilon, grad_states, every_step):
        weights = [w.contiguous() for w in weights]
        grad_gates, grad_start, grad_norm = self.ops.latent_rollout_gru_bwd(
            start, actions.contiguous(), states, gates, weights, epsilon, grad_states.contiguous(), every_step, self.isa
        )
        # Outputs of an op must not be views of one another.
        return grad_gates, grad_start, *(g.clone() for g in grad_norm.sum(0))
