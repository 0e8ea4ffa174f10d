"""The inputs of one sliced_gaussianity call: what they must satisfy, and what backends read of
them."""

from __future__ import annotations

from typing import Any

import torch

from ... import checks
from ...backend import Reason, dtype_reasons
from ...checks import dtype_name
from ...contract import call_inputs, differentiable

NAME = "sliced_gaussianity"
OUTPUTS = ("statistic", "sums")
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@call_inputs(slots=True)
class Inputs:
    """One call.

    Attributes:
        features: ``[N, D]``.
        directions: ``[D, S]``, one direction for each column, in the dtype of features.
        points: K, knots of the characteristic function on ``[0, largest_point]``, 0 included.
        output: ``statistic``, or ``sums`` for one that is shared between processes.
        save: whether backward follows, so that a statistic comes with its gradient.
    """

    features: torch.Tensor = differentiable()
    directions: torch.Tensor
    points: int
    largest_point: float
    output: str
    save: bool

    @property
    def device_type(self) -> str:
        return self.features.device.type

    @property
    def dtype(self) -> torch.dtype:
        return self.features.dtype

    @property
    def accumulate_dtype(self) -> torch.dtype:
        return torch.float64 if self.features.dtype == torch.float64 else torch.float32

    @property
    def rows(self) -> int:
        return self.features.shape[0]

    @property
    def slices(self) -> int:
        return self.directions.shape[1]

    @property
    def count(self) -> int:
        """Knots beyond 0, where cosine and sine are 1 and 0 whatever the features are."""
        return self.points - 1

    @property
    def spacing(self) -> float:
        return self.largest_point / (self.points - 1)

    def size_class(self) -> str:
        """``few`` up to 256 rows, else ``many``."""
        return "few" if self.features.shape[0] <= 256 else "many"

    def describe(self) -> str:
        parts = [
            f"features {list(self.features.shape)} {dtype_name(self.dtype)} {self.device_type}",
            f"{self.slices} directions",
            f"{self.points} points up to {self.largest_point:g}, returns {self.output}",
        ]
        return "; ".join([*parts, "gradients needed"] if self.save else parts)


def outputs(inputs: Inputs, backend: Any = None) -> list[tuple[list[int], torch.dtype]]:
    """The statistic and its gradient, or the sums and nothing."""
    dtype = inputs.accumulate_dtype
    if inputs.output == "sums":
        return [([2, inputs.count, inputs.slices], dtype), ([0], dtype)]
    return [([], dtype), (list(inputs.features.shape) if inputs.save else [0], dtype)]


def kernel_reasons(inputs: Inputs) -> list[Reason]:
    """Why no kernel can run this call on any machine."""
    return dtype_reasons((inputs.dtype,), _KERNEL_DTYPES)


def check(inputs: Inputs) -> None:
    """Raises a sentence unless shapes, dtypes, devices and numbers are those of a call."""
    features, directions = inputs.features, inputs.directions
    for argument, tensor, meaning in (
        ("features", features, "[N, D]"),
        ("directions", directions, "[D, S]"),
    ):
        checks.is_tensor(NAME, argument, tensor)
        checks.is_strided(NAME, argument, tensor)
        checks.has_dtype(NAME, argument, tensor, checks.FLOAT_DTYPES)
        checks.same_device(NAME, argument, tensor, features.device)
        checks.has_rank(NAME, argument, tensor, 2, meaning)
    if directions.dtype != features.dtype:
        wanted = f"have the dtype of features ({dtype_name(features.dtype)})"
        _fail("directions", wanted, dtype_name(directions.dtype))
    if features.shape[1] < 1:
        _fail("features", "have at least one channel", f"shape {tuple(features.shape)}")
    if directions.shape[0] != features.shape[1] or directions.shape[1] < 1:
        wanted = f"have shape [{features.shape[1]}, S] with S of at least 1"
        _fail("directions", wanted, tuple(directions.shape))
    is_integer(NAME, "points", inputs.points, 2)
    checks.is_finite_number(NAME, "largest_point", inputs.largest_point)
    if inputs.largest_point <= 0:
        _fail("largest_point", "be above 0", inputs.largest_point)
    if inputs.output not in OUTPUTS:
        _fail("output", f"be one of {', '.join(OUTPUTS)}", repr(inputs.output))


def check_values(inputs: Inputs) -> None:
    """Any values are sound: what is not finite gives what is not finite."""


def is_integer(op: str, argument: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(checks.sentence(op, argument, "be an int", checks.type_name(value)))
    if value < least:
        raise ValueError(checks.sentence(op, argument, f"be at least {least}", value))


def _fail(argument: str, requirement: str, got: object) -> None:
    raise ValueError(checks.sentence(NAME, argument, requirement, got))
