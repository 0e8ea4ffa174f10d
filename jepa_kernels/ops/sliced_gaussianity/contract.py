"""The contract of sliced_gaussianity: its backends in the order `auto` tries them, its schema, its
checks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from ... import checks
from ...contract import Function
from .directions import random_directions
from .inputs import NAME, Inputs, check, check_values, outputs

PRIORITY = ("cuda", "triton", "cpu", "torch", "reference")


def prepare(
    features: torch.Tensor,
    directions: torch.Tensor | int = 1024,
    *,
    seed: int = 0,
    step: int = 0,
    points: int = 17,
    largest_point: float = 3.0,
    group: Any = None,
) -> Inputs:
    """The checked inputs of the public function's arguments."""
    checks.is_tensor(NAME, "features", features)
    if group is not None and not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        wanted = "be a ProcessGroup or None"
        raise TypeError(checks.sentence(NAME, "group", wanted, checks.type_name(group)))
    if not isinstance(directions, torch.Tensor):
        checks.has_rank(NAME, "features", features, 2, "[N, D]")
        checks.has_dtype(NAME, "features", features, checks.FLOAT_DTYPES)
        if isinstance(directions, bool) or not isinstance(directions, (int, torch.SymInt)):
            wanted = "be a tensor [D, S] or a number of directions"
            raise TypeError(
                checks.sentence(NAME, "directions", wanted, checks.type_name(directions))
            )
        if directions < 1 or features.shape[1] < 1:
            wanted = "be at least 1, of features with at least one channel"
            got = f"{directions} and features {tuple(features.shape)}"
            raise ValueError(checks.sentence(NAME, "directions", wanted, got))
        directions = random_directions(
            features.shape[1],
            directions,
            seed,
            step,
            dtype=features.dtype,
            device=features.device,
        )
    inputs = Inputs(
        features,
        directions,
        points,
        largest_point,
        "statistic" if group is None else "sums",
        torch.is_grad_enabled() and features.requires_grad,
    )
    check(inputs)
    inputs.largest_point = float(largest_point)
    return inputs


def example(rows: int) -> Callable[[str, torch.dtype], Inputs]:
    """An ordinary call of a size class, as in training."""

    def build(device_type: str, dtype: torch.dtype) -> Inputs:
        zeros = partial(torch.zeros, dtype=dtype, device=device_type)
        return Inputs(zeros(rows, 192), zeros(192, 256), 17, 3.0, "statistic", True)

    return build


OP = Function(
    NAME,
    __package__,
    PRIORITY,
    prepare,
    {"many": example(512), "few": example(128)},
    inputs=Inputs,
    check=check,
    check_values=check_values,
    outputs=outputs,
    num_outputs=2,
    saved=(1,),
)
