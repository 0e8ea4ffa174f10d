"""The public function of ema_update."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...backend import resolve
from .contract import OP, prepare, update_plain


def ema_update_(
    targets: Sequence[torch.Tensor],
    sources: Sequence[torch.Tensor],
    momentum: float | torch.Tensor,
    *,
    copies: Sequence[torch.Tensor] | None = None,
    rounding: str = "nearest",
    compensations: Sequence[torch.Tensor] | None = None,
    seed: int | torch.Tensor | None = None,
    backend: str | None = None,
) -> None:
    """Moves every target towards its source, in place and in one pass over the whole list.

        target <- momentum * target + (1 - momentum) * source

    The teacher update of BYOL (Grill et al. 2020, arXiv:2006.07733, section 3.1) and of the JEPA
    papers; evaluated as torch.lerp evaluates it, so that momentum 0 and 1 and source == target are
    exact.

    Args:
        targets: tensors to update, float32, bfloat16 or float16 in any mix (float64 on the
            reference and torch backends), on one device. A tensor that occurs twice is updated
            once. May be non-contiguous, which costs a copy unless it is dense. Targets must not
            overlap in part.
        sources: one tensor for each target, of its shape, any of the dtypes. Not differentiated.
        momentum: a number from 0 to 1, or a 0-d float tensor on the CPU or on the targets' device.
            A device tensor is never read back.
        copies: None, or one tensor for each target that receives the new target in its own dtype,
            in the same pass.
        rounding: of bfloat16 and float16 targets, computed in float32: ``"nearest"`` loses updates
            below half a unit in the last place (1 - momentum of 1e-3 and less); ``"kahan"`` keeps
            what was lost in `compensations`; ``"stochastic"`` (bfloat16 only) rounds up with the
            probability of the lost fraction, so that the mean moves.
        compensations: with ``"kahan"`` one tensor for each target, of its shape and dtype, zero at
            first; entries of float32 targets are not read and may be empty.
        seed: with ``"stochastic"`` an int or a 0-d int64 tensor; give another one at every step.
            Random bits are a function of (seed, place in the list, element) alone.
        backend: a backend name, ``"auto"``, or None (see `jepa_kernels.backend`).

    Returns:
        None; `targets`, `copies` and `compensations` are written. Empty lists and empty tensors are
        left alone.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype, device or value.
        BackendUnsupportedError: the chosen backend cannot run this call; every reason is listed.

    Notes:
        The cpu, triton and cuda backends and the reference give bitwise equal results for any
        thread count; products and sums are rounded one by one in float32. DTensor lists (FSDP2) are
        updated shard by shard, without communication; the lists must be sharded alike. Under
        stochastic rounding element numbers are those of the local shard.

    Example:
        >>> import torch
        >>> from jepa_kernels import ema_update_
        >>> teacher, student = [torch.zeros(3)], [torch.ones(3)]
        >>> ema_update_(teacher, student, 0.75)
        >>> teacher
        [tensor([0.2500, 0.2500, 0.2500])]
    """
    plain = copies is None and compensations is None and seed is None and rounding == "nearest"
    if plain and update_plain(targets, sources, momentum, backend):
        return
    with torch.no_grad():
        inputs = prepare(
            targets,
            sources,
            momentum,
            copies=copies,
            rounding=rounding,
            compensations=compensations,
            seed=seed,
        )
        if inputs.targets:
            OP.run(inputs, resolve(OP, inputs, backend))
