"""Forward and backward of a problem on given kernels: a GRU steps its state, the other cells step
their hidden state."""

from __future__ import annotations

from typing import Protocol

import torch

from . import hidden_space, state_space
from .arithmetic import widened_on_cpus
from .hidden_space import Gradients, Tensors
from .problem import Problem


class Kernels(hidden_space.Kernels, state_space.Kernels, Protocol):
    """What a backend brings: the recurrences and readouts of every cell."""


def multiplied(problem: Problem) -> Problem:
    """The problem in the dtype of its products: on a CPU without products of that dtype,
    float32."""
    return (
        problem.upcast()
        if problem.states.device.type == "cpu" and widened_on_cpus(problem.states.dtype)
        else problem
    )


def forward(problem: Problem, kernels: Kernels) -> Tensors:
    """The output, then what backward needs."""
    space = state_space if problem.cell == "gru" else hidden_space
    return space.forward(problem, kernels)


def backward(
    problem: Problem, kernels: Kernels, grad_out: torch.Tensor, saved: Tensors, needs_targets: bool
) -> Gradients:
    """The gradients of every input."""
    space = state_space if problem.cell == "gru" else hidden_space
    return space.backward(problem, kernels, grad_out, saved, needs_targets)
