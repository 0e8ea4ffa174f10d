"""The contract of adamw_ema: its backends in the order `auto` tries them, its schema, its checks.

There is nothing to differentiate: the op runs under no_grad and writes in place.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ... import checks
from ...contract import InPlace
from ..ema import lists, shards
from ..ema.lists import Tensors
from .inputs import NAME, Inputs, check, check_values, example
from .teacher import TeacherLists

PRIORITY = ("cuda", "triton", "cpu", "torch", "reference")
_NO_TEACHER = TeacherLists()


def prepare(
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
) -> Inputs:
    """The checked inputs of the public function's arguments (values of plain numbers only)."""
    teacher = _NO_TEACHER if teacher is None else teacher
    if not isinstance(teacher, TeacherLists):
        raise TypeError(
            checks.sentence(NAME, "teacher", "be a TeacherLists or None", checks.type_name(teacher))
        )
    named = {
        "params": params,
        "grads": grads,
        "exp_avgs": exp_avgs,
        "exp_avg_sqs": exp_avg_sqs,
        "targets": teacher.targets,
        "copies": teacher.copies,
        "compensations": teacher.compensations,
    }
    for argument, values in named.items():
        lists.check_list(NAME, argument, values, optional=argument in ("copies", "compensations"))
    lists.check_list(NAME, "steps", steps)
    lists.check_given(NAME, teacher.rounding, teacher.compensations, teacher.seed)
    checks.is_tensor(NAME, "hyper", hyper)
    if groups is None:
        groups = [0] * len(params)
        if hyper.dim() == 2 and hyper.shape[0] != 1:
            raise ValueError(
                checks.sentence(
                    NAME, "groups", f"be given with {hyper.shape[0]} rows of hyper", "None"
                )
            )
    # Everything but the step numbers, which are whole on every rank.
    local = shards.local(NAME, named)
    device = local["params"][0].device if local["params"] else torch.device("cpu")
    lists.check_momentum(NAME, teacher.momentum, device)
    inputs = Inputs(
        local["params"],
        local["grads"],
        local["exp_avgs"],
        local["exp_avg_sqs"],
        list(steps),
        hyper,
        list(groups),
        local["targets"],
        lists.momentum_tensor(teacher.momentum),
        local.get("copies", []),
        local.get("compensations", []),
        lists.seed_tensor(NAME, teacher.seed, device),
        teacher.rounding,
        grad_scale,
        found_inf,
    )
    check(inputs)
    return inputs


OP = InPlace(
    "adamw_ema",
    __package__,
    PRIORITY,
    prepare,
    {
        "large": example([(1024, 1024)] * 4),
        "small": example([(128, 128)] * 32),
        "tiny": example([(16, 16)] * 60),
    },
    inputs=Inputs,
    check=check,
    check_values=check_values,
    distinct=lambda inputs: inputs if inputs.params else None,
)
