"""The inputs of one adamw_ema call: what they must satisfy, and what backends read of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ... import checks
from ...backend import Reason, dtype_reasons
from ...checks import dtype_name
from ...contract import beside_the_schema, call_inputs, written
from ..ema import lists, memory
from ..ema.lists import Tensors

NAME = "adamw_ema_"
COLUMNS = ("lr", "beta1", "beta2", "eps", "weight_decay", "maximize")
# Lists that the op writes, then the one it only reads, as kernels walk them.
_WRITTEN = ("params", "exp_avgs", "exp_avg_sqs", "targets", "copies", "compensations")


@call_inputs(slots=True)
class Inputs:
    """One call. `targets`, `copies` and `compensations` belong to the first parameters; the other
    lists have one entry for each parameter. Absent lists are empty."""

    params: list[torch.Tensor] = written()
    grads: list[torch.Tensor]
    exp_avgs: list[torch.Tensor] = written()
    exp_avg_sqs: list[torch.Tensor] = written()
    steps: list[torch.Tensor]
    hyper: torch.Tensor
    groups: list[int]
    targets: list[torch.Tensor] = written()
    momentum: torch.Tensor
    copies: list[torch.Tensor] = written()
    compensations: list[torch.Tensor] = written()
    seed: torch.Tensor | None
    rounding: str
    grad_scale: torch.Tensor | None
    found_inf: torch.Tensor | None
    dtypes: tuple[torch.dtype, ...] = beside_the_schema(default=())

    @property
    def device_type(self) -> str:
        return self.params[0].device.type if self.params else "cpu"

    @property
    def dtype(self) -> torch.dtype:
        return self.params[0].dtype if self.params else torch.float32

    @property
    def streams(self) -> list[int]:
        """Numbers of the targets' random bits."""
        return list(range(len(self.targets)))

    def size_class(self) -> str:
        return lists.size_class(self.params)

    def describe(self) -> str:
        dtypes = ", ".join(dtype_name(d) for d in self.dtypes)
        elements = sum([p.numel() for p in self.params])
        return (
            f"{len(self.params)} parameters, {len(self.targets)} with a teacher, {elements} "
            f"elements, {dtypes} {self.device_type}; rounding {self.rounding}"
        )

    def native_arguments(self) -> tuple[Any, ...]:
        """What the native ops take, in their order."""
        return (
            self.params,
            self.grads,
            self.exp_avgs,
            self.exp_avg_sqs,
            self.steps,
            self.hyper,
            self.groups,
            self.targets,
            self.momentum,
            self.copies,
            self.compensations,
            self.streams,
            lists.ROUNDINGS.index(self.rounding),
            self.seed,
            self.grad_scale,
            self.found_inf,
        )

    def flat(self, *, row_major: bool | None = None) -> memory.FlatInputs[Inputs]:
        """The same call with arrays of one memory order; what had to be copied is copied back."""
        if row_major is None:
            row_major = self.rounding == "stochastic"
        return memory.FlatInputs(self, written=_WRITTEN, read=("grads",), row_major=row_major)


def check(inputs: Inputs) -> None:
    """Raises a sentence unless shapes, dtypes and devices are those of an adamw_ema call; notes the
    dtypes."""
    params = inputs.params
    device = params[0].device if params else torch.device("cpu")
    shapes = lists.shapes_of(params)
    dtypes: set[torch.dtype] = set()
    for argument in ("params", "grads", "exp_avgs", "exp_avg_sqs"):
        values = getattr(inputs, argument)
        dtypes |= lists.check_entries(NAME, argument, values, "params", shapes, device)
    moments = zip(inputs.exp_avgs, inputs.exp_avg_sqs, strict=True)
    for i, (first, second) in enumerate(moments):
        if first.dtype != second.dtype:
            requirement = f"have the dtype of exp_avgs[{i}] ({dtype_name(first.dtype)})"
            raise ValueError(
                checks.sentence(NAME, f"exp_avg_sqs[{i}]", requirement, dtype_name(second.dtype))
            )
    _check_steps(inputs.steps, params)
    _check_hyper(inputs.hyper, inputs.groups, params)
    dtypes |= _check_teacher(inputs, shapes, device)
    for argument in ("grad_scale", "found_inf"):
        _check_flag(argument, getattr(inputs, argument), device)
    inputs.dtypes = tuple(dtypes)


def _check_steps(steps: Tensors, params: Tensors) -> None:
    if len(steps) != len(params):
        raise ValueError(
            checks.sentence(
                NAME, "steps", f"have one tensor for each of params ({len(params)})", len(steps)
            )
        )
    if all([s.dtype == torch.float32 and s.dim() == 0 and s.device.type == "cpu" for s in steps]):
        return
    for i, (step, param) in enumerate(zip(steps, params, strict=True)):
        if step.dim() != 0 or step.dtype not in (torch.float32, torch.float64):
            got = f"shape {tuple(step.shape)} {checks.dtype_name(step.dtype)}"
            raise ValueError(
                checks.sentence(NAME, f"steps[{i}]", "be a 0-d float32 or float64 tensor", got)
            )
        if step.device.type != "cpu":
            checks.same_device(NAME, f"steps[{i}]", step, param.device)
            checks.has_dtype(NAME, f"steps[{i}]", step, (torch.float32,))


def _check_hyper(hyper: torch.Tensor, groups: Sequence[int], params: Tensors) -> None:
    checks.is_tensor(NAME, "hyper", hyper)
    checks.has_dtype(NAME, "hyper", hyper, (torch.float64,))
    if hyper.dim() != 2 or hyper.shape[1] != len(COLUMNS) or not hyper.is_contiguous():
        raise ValueError(
            checks.sentence(
                NAME,
                "hyper",
                f"be contiguous of shape [groups, {len(COLUMNS)}]",
                tuple(hyper.shape),
            )
        )
    if params and hyper.device.type != "cpu":
        checks.same_device(NAME, "hyper", hyper, params[0].device)
    if len(groups) != len(params):
        raise ValueError(
            checks.sentence(
                NAME,
                "groups",
                f"have one row number for each of params ({len(params)})",
                len(groups),
            )
        )
    if not params or (min(groups) >= 0 and max(groups) < hyper.shape[0]):
        return
    for i, group in enumerate(groups):
        if not 0 <= group < hyper.shape[0]:
            raise ValueError(
                checks.sentence(
                    NAME,
                    f"groups[{i}]",
                    f"be a row of hyper from 0 to {hyper.shape[0] - 1}",
                    group,
                )
            )


def _check_teacher(
    inputs: Inputs, shapes: Sequence[torch.Size], device: torch.device
) -> set[torch.dtype]:
    targets = inputs.targets
    if len(targets) > len(shapes):
        raise ValueError(
            checks.sentence(
                NAME,
                "targets",
                f"have at most one tensor for each of params ({len(shapes)})",
                len(targets),
            )
        )
    followed = shapes[: len(targets)]
    dtypes = lists.check_entries(NAME, "targets", targets, "params", followed, device)
    if inputs.copies:
        dtypes |= lists.check_entries(NAME, "copies", inputs.copies, "targets", followed, device)
    lists.check_momentum(NAME, inputs.momentum, device)
    lists.check_rounding(NAME, inputs.rounding, targets, inputs.compensations, inputs.seed, device)
    return dtypes


def _check_flag(argument: str, value: torch.Tensor | None, device: torch.device) -> None:
    if value is None:
        return
    checks.is_tensor(NAME, argument, value)
    checks.has_dtype(NAME, argument, value, (torch.float32,))
    checks.same_device(NAME, argument, value, device)
    if value.numel() != 1:
        raise ValueError(
            checks.sentence(NAME, argument, "be one number", f"shape {tuple(value.shape)}")
        )


def check_values(inputs: Inputs) -> None:
    """The momentum and the step numbers, where reading them waits for nothing; no tensor twice."""
    lists.check_momentum_value(NAME, inputs.momentum)
    for argument in ("params", "targets"):
        addresses = [a for a in map(torch.Tensor.data_ptr, getattr(inputs, argument)) if a]
        if len(set(addresses)) != len(addresses):
            raise ValueError(
                checks.sentence(NAME, argument, "be distinct tensors", "one of them twice")
            )
    if inputs.found_inf is not None or not all([s.device.type == "cpu" for s in inputs.steps]):
        return  # a skipped first step has step 0, and a device is not read back
    lowest = min(map(float, inputs.steps), default=1.0)
    if not lowest >= 1.0:
        raise ValueError(
            checks.sentence(NAME, "steps", "be at least 1: they count this step", lowest)
        )


def kernel_reasons(inputs: Inputs) -> list[Reason]:
    """The dtypes that kernel backends take."""
    return dtype_reasons(inputs.dtypes, lists.KERNEL_DTYPES)


def example(shapes: list[tuple[int, ...]]) -> Callable[[str, torch.dtype], Inputs]:
    """Inputs of an ordinary call with a teacher, by device type and dtype."""

    def build(device_type: str, dtype: torch.dtype) -> Inputs:
        params, grads, exp_avgs, exp_avg_sqs, targets = (
            [torch.zeros(shape, device=device_type, dtype=dtype) for shape in shapes]
            for _ in range(5)
        )
        hyper = torch.tensor([[1e-3, 0.9, 0.999, 1e-8, 0.04, 0.0]], dtype=torch.float64)
        return Inputs(
            params,
            grads,
            exp_avgs,
            exp_avg_sqs,
            [torch.ones(()) for _ in shapes],
            hyper,
            [0] * len(shapes),
            targets,
            torch.tensor(0.99, dtype=torch.float64),
            [],
            [],
            None,
            "nearest",
            None,
            None,
            dtypes=(dtype,),
        )

    return build
