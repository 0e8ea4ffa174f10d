"""The C++ kernels of csrc/latent_rollout as `hidden_space` and `state_space` call them, for CPU and
CUDA tensors alike."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .arithmetic import add_matmul, inside
from .problem import Problem
from .state_space import GateGradients, with_action_products


def _float(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.float().contiguous()


def _operand(coupling) -> torch.Tensor | None:
    """The coupling as products read it."""
    return None if coupling.matrix is None else coupling.matrix.to(coupling.operand)


def _gru_weights(weights: list[torch.Tensor]) -> list[torch.Tensor]:
    return [*(w.contiguous() for w in weights[:2]), *(_float(w) for w in weights[2:])]


class NativeKernels:
    """The kernels of `hidden_space` and `state_space` in C++ or CUDA C++, by the device of the
    tensors.

    Matrices that multiply and tables keep the dtype of the states; everything else is float32.
    """

    def __init__(self, isa: int = -1, keep_signs: bool = False) -> None:
        self.ops = torch.ops.jepa_kernels_native
        self.isa = isa
        self.keep_signs = keep_signs

    def dense_coupling(self, problem: Problem) -> bool:
        return True

    def mlp_recurrence(self, a, coupling, drift, horizon, keep_all, save):
        if horizon == 1:
            return a[None] if save else a.new_empty(0), F.gelu(a)[None]
        return self.ops.latent_rollout_mlp_fwd(
            a, _operand(coupling), drift, horizon, keep_all, save, self.isa
        )

    def mlp_recurrence_backward(self, hidden, coupling, grad_sums):
        return self.ops.latent_rollout_mlp_bwd(hidden, _operand(coupling), grad_sums, self.isa)

    def hamiltonian_recurrence(self, a, weights, coupling, time_step, horizon, keep_all, save):
        weight, bias, energy = weights
        tensors = (weight.contiguous(), _float(bias), _float(energy), _operand(coupling))
        return self.ops.latent_rollout_hamiltonian_fwd(
            a, *tensors, time_step, horizon, keep_all, save, self.isa
        )

    def hamiltonian_recurrence_backward(self, hidden, weights, coupling, time_step, grad_sums):
        weight, bias, energy = weights[0].contiguous(), _float(weights[1]), _float(weights[2])
        matrix = _operand(coupling)
        grad_weight, grad_bias, grad_energy = None, torch.zeros_like(bias), torch.zeros_like(energy)
        carried = torch.zeros_like(hidden[0])
        last = hidden.shape[0] - 1
        every_step = 2 * grad_sums.shape[1] > last
        following = (
            [torch.zeros_like(carried) for _ in range(2)] if every_step else list(grad_sums[:, 0])
        )
        for j in reversed(range(hidden.shape[0])):
            which, step = j % 2, (-time_step if j % 2 else time_step) if j < last else 0.0
            if every_step:
                following[which] += grad_sums[which][j // 2]
            moved_by = carried.clone() if j < last else None
            force, left, right, energy_rows = self.ops.latent_rollout_hamiltonian_bwd(
                hidden[j],
                weight,
                bias,
                energy,
                matrix,
                step,
                which == 1,
                following[which],
                carried,
                self.isa,
            )
            grad_weight = add_matmul(
                grad_weight, left.flatten(0, 1).mT, right.flatten(0, 1), weight.dtype
            )
            grad_bias += left[1].sum(0)
            grad_energy += energy_rows.sum(0)
            if moved_by is not None:
                coupling.add_gradient(moved_by.mul_(step), force, transposed=which == 1)
        return carried, grad_weight, grad_bias, grad_energy

    def readout(self, problem, part, sums, out):
        base, rows = self._base(problem)
        step = problem.horizon if problem.output == "last" else 1
        self.ops.latent_rollout_readout(
            sums,
            part.weight,
            _float(part.bias),
            base[:, part.start : part.stop],
            rows,
            step,
            out,
            self.isa,
        )

    def _base(self, problem):
        base, rows = problem.base()
        return base, inside(rows, base)

    def _targets(self, problem, part, k=None):
        """The targets of a part, of every step or of step k alone, and the rows to take of them."""
        targets, rows = problem.targets, problem.target_rows
        if k is not None:
            targets, rows = (targets[k : k + 1], None) if rows is None else (targets, rows[k])
        return targets[..., part.start : part.stop], inside(rows, targets)

    def errors(self, problem, part, sums):
        base, rows = self._base(problem)
        save = self.keep_signs and problem.save and problem.exponent == 1.0
        values, signs = self.ops.latent_rollout_errors(
            *(
                sums,
                part.weight,
                _float(part.bias),
                base[:, part.start : part.stop],
                rows,
                *self._targets(problem, part),
            ),
            *(problem.exponent, save, self.isa),
        )
        return values, signs if save else None

    def residual_gradient(self, problem, part, k, sums, signs, grad_errors, grad_base):
        base, rows = self._base(problem)
        return self.ops.latent_rollout_errors_gradient(
            *(
                sums[None],
                part.weight,
                _float(part.bias),
                base[:, part.start : part.stop],
                rows,
                *self._targets(problem, part, k),
            ),
            *(
                problem.exponent,
                None if signs is None else signs[k],
                k + 1,
                grad_errors[None].contiguous(),
                grad_base,
                self.isa,
            ),
        )[0]

    def gru_recurrence(self, start, actions, weights, epsilon, keep_all, save):
        return self.ops.latent_rollout_gru_fwd(
            start, _float(actions), _gru_weights(weights), epsilon, keep_all, save, self.isa
        )

    def gru_recurrence_backward(
        self, start, actions, states, gates, weights, epsilon, grad_states, every_step
    ):
        grad_gates, grad_start, grad_norm, grad_actions, grad_small = (
            self.ops.latent_rollout_gru_bwd(
                start,
                _float(actions),
                states,
                gates,
                _gru_weights(weights),
                epsilon,
                grad_states.contiguous(),
                every_step,
                self.isa,
            )
        )
        norms = grad_norm[:, 0].sum(0), grad_norm[:, 1].sum(0)
        if grad_gates.shape[-1] == 4 * start.shape[1]:  # on a GPU
            return with_action_products(grad_gates, grad_start, *norms, actions, weights[0])
        return GateGradients([grad_gates], grad_start, grad_actions, grad_small.sum(0), *norms)
