"""The public function of adamw_ema."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...backend import resolve
from ..ema.lists import Tensors
from .contract import OP, prepare
from .teacher import TeacherLists


def adamw_ema_(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    steps: Tensors,
    *,
    hyper: torch.Tensor,
    groups: Sequence[int] | None = None,
    teacher: TeacherLists | None = None,
    grad_scale: torch.Tensor | None = None,
    found_inf: torch.Tensor | None = None,
    backend: str | None = None,
) -> None:
    """One AdamW step of every parameter and the moving average of the result, in place and in one
    pass over memory.

        m <- beta1 m + (1 - beta1) g        v <- beta2 v + (1 - beta2) g^2
        p <- p - lr weight_decay p - lr (m / (1 - beta1^step)) / (sqrt(v / (1 - beta2^step)) + eps)
        target <- momentum target + (1 - momentum) p

    AdamW: Loshchilov and Hutter 2019 (arXiv:1711.05101), algorithm 2, as torch.optim.AdamW computes
    it (checked against torch 2.13). The optimizer around it is `jepa_kernels.optim.AdamWEMA`.

    Args:
        params, grads, exp_avgs, exp_avg_sqs: lists of tensors of the same shapes on one device;
            float32, bfloat16 or float16 in any mix (float64 on the reference and torch backends),
            the two moments of a parameter in one dtype. Computed in float32.
        steps: one 0-d float tensor for each parameter, the number of this step from 1; on the CPU
            or, as float32, on the device.
        hyper: float64 ``[groups, 6]``, contiguous: lr, beta1, beta2, eps, weight_decay, maximize (0
            or 1). On the device it is never read back.
        groups: for each parameter its row of `hyper`; None is row 0 for all.
        teacher: targets of the first parameters, momentum, copies and rounding (`TeacherLists`,
            fields as in `ema_update_`); None for none.
        grad_scale: a float32 number on the device by which gradients are divided as they are read
            (they are left as they are).
        found_inf: a float32 number on the device; not 0 leaves everything as it is, teacher
            included, without a synchronisation.
        backend: a backend name, ``"auto"``, or None (see `jepa_kernels.backend`).

    Returns:
        None; all lists but `grads` and `steps` are written. Empty lists and empty tensors are left
        alone.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype, device or value.
        BackendUnsupportedError: the chosen backend cannot run this call; every reason is listed.

    Notes:
        Deterministic for any thread count. A teacher follows the parameter as stored, rounded to
        its dtype. DTensor lists (FSDP2) are updated shard by shard; they must be sharded alike.

    Example:
        >>> import torch
        >>> from jepa_kernels import TeacherLists, adamw_ema_
        >>> p, g, target = [torch.ones(2)], [torch.ones(2)], [torch.ones(2)]
        >>> m, v = [torch.zeros(2)], [torch.zeros(2)]
        >>> hyper = torch.tensor([[0.1, 0.9, 0.999, 1e-8, 0.0, 0.0]], dtype=torch.float64)
        >>> adamw_ema_(p, g, m, v, [torch.ones(())], hyper=hyper, teacher=TeacherLists(target, 0.5))
        >>> p, target
        ([tensor([0.9000, 0.9000])], [tensor([0.9500, 0.9500])])
    """
    with torch.no_grad():
        inputs = prepare(
            params,
            grads,
            exp_avgs,
            exp_avg_sqs,
            steps,
            hyper=hyper,
            groups=groups,
            teacher=teacher,
            grad_scale=grad_scale,
            found_inf=found_inf,
        )
        if inputs.params:
            OP.run(inputs, resolve(OP, inputs, backend))
