"""The specification of adamw_ema in eager PyTorch, one parameter at a time, in float32 (float64 for
float64 parameters).

AdamW as Loshchilov and Hutter 2019, algorithm 2, writes it (and torch.optim.AdamW computes it):

    m <- beta1 m + (1 - beta1) g          v <- beta2 v + (1 - beta2) g^2
    p <- p - lr weight_decay p - lr (m / (1 - beta1^step)) / (sqrt(v / (1 - beta2^step)) + eps)

and then target <- momentum target + (1 - momentum) p.
"""

from __future__ import annotations

import torch

from ...backend import ANY_DEVICE, Backend, Reason
from ..ema.average import update
from .inputs import Inputs


def unsupported(inputs: Inputs) -> list[Reason]:
    return []


def forward(inputs: Inputs) -> None:
    if inputs.found_inf is not None and bool(inputs.found_inf != 0):
        return
    rows = inputs.hyper.tolist()
    for i, param in enumerate(inputs.params):
        _adamw(
            param,
            inputs.grads[i],
            inputs.exp_avgs[i],
            inputs.exp_avg_sqs[i],
            float(inputs.steps[i]),
            rows[inputs.groups[i]],
            inputs.grad_scale,
        )
        if i < len(inputs.targets):
            update(
                inputs.targets[i],
                param,
                inputs.momentum,
                inputs.compensations[i] if inputs.rounding == "kahan" else None,
                inputs.rounding,
                inputs.seed,
                i,
            )
            if inputs.copies:
                inputs.copies[i].copy_(inputs.targets[i])


def _adamw(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    step: float,
    row: list[float],
    grad_scale: torch.Tensor | None,
) -> None:
    lr, beta1, beta2, eps, weight_decay, maximize = row
    work = torch.float64 if param.dtype == torch.float64 else torch.float32
    p, g, m, v = (t.to(work) for t in (param, grad, exp_avg, exp_avg_sq))
    if grad_scale is not None:
        g = g / grad_scale.to(work)
    if maximize:
        g = -g
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    first = m / (1 - beta1**step)
    second = v / (1 - beta2**step)
    p = p - lr * weight_decay * p - lr * first / (second.sqrt() + eps)
    param.copy_(p)
    exp_avg.copy_(m)
    exp_avg_sq.copy_(v)


BACKEND = Backend("reference", ANY_DEVICE, unsupported, forward)
