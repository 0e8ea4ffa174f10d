"""Hidden space (or state space where that is cheaper) in eager PyTorch, with the hand-written
backward through time.

The baseline that kernels must beat, and what runs where no kernel does.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from . import composition
from .arithmetic import add_matmul, matmul, power_mean, power_mean_gradient, take
from .call import Call
from .cost import hidden_is_cheaper
from .problem import Problem
from .state_space import with_action_products

SAVES_SIGNS = False

_INV_SQRT_2PI = 0.3989422804014327


def unsupported_reasons(call: Call) -> list[str]:
    return []


def forward(problem: Problem) -> tuple[torch.Tensor, ...]:
    out, *saved = composition.forward(composition.multiplied(problem), Eager())
    return out if problem.output == "errors" else out.to(problem.states.dtype), *saved


def backward(
    problem: Problem, grad_out: torch.Tensor, saved: tuple[torch.Tensor, ...], needs_targets: bool
) -> composition.Gradients:
    return composition.backward(
        composition.multiplied(problem), Eager(), grad_out, saved, needs_targets
    )


def _cumulative_density(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * (1 + torch.erf(x * 0.7071067811865476))


def gelu_derivatives(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """gelu'(x) = Phi(x) + x phi(x) and gelu''(x) = (2 - x^2) phi(x)."""
    density = torch.exp(-0.5 * x * x) * _INV_SQRT_2PI
    return _cumulative_density(x) + x * density, (2 - x * x) * density


def _force(
    a: torch.Tensor, weights: tuple[torch.Tensor, ...], operand: torch.dtype
) -> torch.Tensor:
    """u = dG/da for G(a) = w3 gelu(W2 gelu(a) + b2)."""
    weight, bias, energy = weights
    slope, _ = gelu_derivatives(a)
    middle_slope, _ = gelu_derivatives(matmul(F.gelu(a), weight.mT, operand) + bias)
    return slope * matmul(energy * middle_slope, weight, operand)


def _force_backward(a, grad_force, weights, gradients, operand) -> torch.Tensor:
    """The gradient of `_force` to a (the Hessian of G times grad_force); adds those of W2, b2 and
    w3 to `gradients`."""
    weight, bias, energy = weights
    slope, curvature = gelu_derivatives(a)
    activation = F.gelu(a)
    middle_slope, middle_curvature = gelu_derivatives(matmul(activation, weight.mT, operand) + bias)
    pulled = energy * middle_slope
    returned = matmul(pulled, weight, operand)
    grad_returned = slope * grad_force
    grad_pulled = matmul(grad_returned, weight.mT, operand)
    grad_middle = grad_pulled * energy * middle_curvature
    gradients[0] = add_matmul(gradients[0], pulled.mT, grad_returned, operand)
    gradients[0] = add_matmul(gradients[0], grad_middle.mT, activation, operand)
    gradients[1] += grad_middle.sum(0)
    gradients[2] += (grad_pulled * middle_slope).sum(0)
    return curvature * returned * grad_force + slope * matmul(grad_middle, weight, operand)


class Eager:
    """The kernels of `hidden_space` and `state_space` as eager PyTorch."""

    def dense_coupling(self, problem: Problem) -> bool:
        hidden, in_channels = problem.parameters[0].shape
        return hidden_is_cheaper(
            problem.cell, problem.num_rows, in_channels, hidden, problem.horizon
        )

    def mlp_recurrence(self, a, coupling, drift, horizon, keep_all, save):
        hidden, sums = [a], [F.gelu(a)]
        activation = sums[0]
        for _ in range(horizon - 1):
            a = a + coupling.move(activation) + drift
            activation = F.gelu(a)
            hidden.append(a)
            sums.append(sums[-1] + activation)
        return torch.stack(hidden) if save else a.new_empty(0), torch.stack(
            sums if keep_all else sums[-1:]
        )

    def mlp_recurrence_backward(self, hidden, coupling, grad_sums):
        horizon = hidden.shape[0]
        grad_hidden = torch.empty_like(hidden)
        following = grad_sums[-1]
        grad_hidden[-1] = torch.ops.aten.gelu_backward(following, hidden[-1])
        for i in reversed(range(horizon - 1)):
            if grad_sums.shape[0] > 1:
                following = following + grad_sums[i]
            moved = coupling.move(grad_hidden[i + 1], transposed=True)
            grad_hidden[i] = grad_hidden[i + 1] + torch.ops.aten.gelu_backward(
                following + moved, hidden[i]
            )
        return grad_hidden, F.gelu(hidden[:-1])

    def hamiltonian_recurrence(self, a, weights, coupling, time_step, horizon, keep_all, save):
        hidden, kept, running = [], ([], []), [None, None]
        for j in range(2 * horizon):
            which = j % 2
            hidden.append(a)
            force = _force(a, weights, coupling.operand)
            running[which] = force if running[which] is None else running[which] + force
            kept[which].append(running[which])
            if j + 1 < 2 * horizon:
                a = a + coupling.move(force, transposed=which == 1) * (
                    -time_step if which else time_step
                )
        sums = torch.stack([torch.stack(steps if keep_all else steps[-1:]) for steps in kept])
        return torch.stack(hidden) if save else a.new_empty(0), sums

    def hamiltonian_recurrence_backward(self, hidden, weights, coupling, time_step, grad_sums):
        gradients = [
            None,
            *(torch.zeros(w.shape, dtype=hidden.dtype, device=hidden.device) for w in weights[1:]),
        ]
        carried = torch.zeros_like(hidden[0])
        last = hidden.shape[0] - 1
        every_step = 2 * grad_sums.shape[1] > last
        following = [torch.zeros_like(carried)] * 2 if every_step else list(grad_sums[:, 0])
        for j in reversed(range(hidden.shape[0])):
            which, step = j % 2, -time_step if j % 2 else time_step
            if every_step:
                following[which] = following[which] + grad_sums[which][j // 2]
            grad_force = following[which]
            if j < last:
                coupling.add_gradient(
                    carried * step,
                    _force(hidden[j], weights, coupling.operand),
                    transposed=which == 1,
                )
                grad_force = grad_force + coupling.move(carried, transposed=which == 0) * step
            carried = carried + _force_backward(
                hidden[j], grad_force, weights, gradients, coupling.operand
            )
        return carried, *gradients

    def readout(self, problem, part, sums, out):
        base = take(*problem.base(), part.start, part.stop)
        for k in range(sums.shape[0]):
            self._predict(
                problem,
                part,
                base,
                sums[k],
                k + 1 if problem.output != "last" else problem.horizon,
                out[k],
            )

    def _predict(self, problem, part, base, sums, step, out=None):
        """The prediction of one step, in `out` where given."""
        if sums.dtype != problem.states.dtype:
            moved = matmul(sums, part.weight, problem.states.dtype).add_(base)
            moved = moved if part.bias is None else moved.add_(part.bias, alpha=step)
            return moved if out is None else out.copy_(moved)
        if part.bias is None:
            return torch.mm(sums, part.weight, out=out).add_(base)
        return torch.addmm(
            part.bias if step == 1 else part.bias * step, sums, part.weight, out=out
        ).add_(base)

    def errors(self, problem, part, sums):
        base = take(*problem.base(), part.start, part.stop)
        values = []
        for k in range(sums.shape[0]):
            residual = self._predict(problem, part, base, sums[k], k + 1) - take(
                *problem.target(k), part.start, part.stop
            )
            values.append(power_mean(residual, problem.exponent))
        return torch.stack(values), None

    def residual_gradient(self, problem, part, k, sums, signs, grad_errors, grad_base):
        base = take(*problem.base(), part.start, part.stop)
        residual = self._predict(problem, part, base, sums, k + 1) - take(
            *problem.target(k), part.start, part.stop
        )
        gradient = power_mean_gradient(residual, grad_errors, problem.exponent)
        grad_base += gradient
        return gradient

    def gru_recurrence(self, start, actions, weights, epsilon, keep_all, save):
        weight_input, weight_state, bias_input, bias_state, norm_weight, norm_bias = weights
        width, operand = start.shape[1], weight_state.dtype
        state, states, gates = start, [], []
        for action in actions:
            from_action = (matmul(action, weight_input.mT, operand) + bias_input).split(
                width, dim=-1
            )
            from_state = (matmul(state, weight_state.mT, operand) + bias_state).split(width, dim=-1)
            reset = torch.sigmoid(from_action[0] + from_state[0])
            update = torch.sigmoid(from_action[1] + from_state[1])
            candidate = torch.tanh(torch.addcmul(from_action[2], reset, from_state[2]))
            mixed = torch.lerp(candidate, state, update)
            state = F.layer_norm(
                mixed, (width,), norm_weight.to(mixed.dtype), norm_bias.to(mixed.dtype), epsilon
            )
            if keep_all:
                states.append(state)
            if save:
                gates.append(torch.cat((reset, update, candidate, from_state[2]), dim=-1))
        return torch.stack(states if keep_all else [state]), torch.stack(
            gates
        ) if save else start.new_empty(0)

    def gru_recurrence_backward(
        self, start, actions, states, gates, weights, epsilon, grad_states, every_step
    ):
        _, weight_state, _, _, norm_weight, _ = weights
        width, operand = start.shape[1], weight_state.dtype
        grad_gates = torch.empty_like(gates)
        grad_norm_weight, grad_norm_bias = start.new_zeros(width), start.new_zeros(width)
        horizon = gates.shape[0]
        carried = torch.zeros_like(start) if every_step else grad_states
        for k in reversed(range(horizon)):
            grad = carried + grad_states[k] if every_step else carried
            before = states[k - 1] if k else start
            reset, update, candidate, from_state = gates[k].split(width, dim=-1)
            mixed = torch.lerp(candidate, before, update)
            variance, mean = torch.var_mean(mixed, dim=-1, correction=0, keepdim=True)
            inverse = torch.rsqrt(variance + epsilon)
            normal = (mixed - mean) * inverse
            grad_norm_weight += (grad * normal).sum(0)
            grad_norm_bias += grad.sum(0)
            scaled = grad * norm_weight
            grad_mixed = inverse * (
                scaled
                - scaled.mean(-1, keepdim=True)
                - normal * (scaled * normal).mean(-1, keepdim=True)
            )
            into_reset, into_update, into_candidate, into_state = grad_gates[k].split(width, dim=-1)
            into_candidate.copy_(grad_mixed * (1 - update) * (1 - candidate * candidate))
            into_update.copy_(grad_mixed * (before - candidate) * update * (1 - update))
            into_reset.copy_(into_candidate * from_state * reset * (1 - reset))
            into_state.copy_(into_candidate * reset)
            carried = grad_mixed * update
            carried = carried + matmul(
                grad_gates[k][:, : 2 * width], weight_state[: 2 * width], operand
            )
            carried = carried + matmul(into_state, weight_state[2 * width :], operand)
        return with_action_products(
            grad_gates, carried, grad_norm_weight, grad_norm_bias, actions, weights[0]
        )
