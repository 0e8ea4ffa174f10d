"""The inputs of one ema_update call: what they must satisfy, and what backends read of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from ...backend import Reason, dtype_reasons
from ...checks import dtype_name
from ...contract import beside_the_schema, call_inputs, written
from ..ema import lists, memory

NAME = "ema_update_"


@call_inputs(slots=True)
class Inputs:
    """One call; absent lists are empty. `streams` numbers the random bits of each target; they come
    from `distinct`."""

    targets: list[torch.Tensor] = written()
    sources: list[torch.Tensor]
    momentum: torch.Tensor
    copies: list[torch.Tensor] = written()
    compensations: list[torch.Tensor] = written()
    seed: torch.Tensor | None
    rounding: str
    streams: Sequence[int] = beside_the_schema(default=())
    dtypes: tuple[torch.dtype, ...] = beside_the_schema(default=())

    @property
    def device_type(self) -> str:
        return self.targets[0].device.type if self.targets else "cpu"

    @property
    def dtype(self) -> torch.dtype:
        return self.targets[0].dtype if self.targets else torch.float32

    def size_class(self) -> str:
        return lists.size_class(self.targets)

    def describe(self) -> str:
        dtypes = ", ".join(dtype_name(d) for d in self.dtypes)
        elements = sum([t.numel() for t in self.targets])
        text = (
            f"{len(self.targets)} tensors, {elements} elements, {dtypes} {self.device_type}; "
            f"rounding {self.rounding}"
        )
        return f"{text}; with copies" if self.copies else text

    def flat(self) -> memory.Flat:
        """targets, copies, compensations and sources in one memory order."""
        return memory.Flat(
            written=(self.targets, self.copies, self.compensations),
            read=(self.sources,),
            row_major=self.rounding == "stochastic",
        )


def check(inputs: Inputs) -> None:
    """Raises a sentence unless shapes, dtypes and devices are those of an ema_update call; notes
    the dtypes."""
    targets = inputs.targets
    device = targets[0].device if targets else torch.device("cpu")
    shapes = lists.shapes_of(targets)
    dtypes: set[torch.dtype] = set()
    for argument, values in (
        ("targets", targets),
        ("sources", inputs.sources),
        ("copies", inputs.copies),
    ):
        if values or argument != "copies":
            dtypes |= lists.check_entries(NAME, argument, values, "targets", shapes, device)
    lists.check_momentum(NAME, inputs.momentum, device)
    lists.check_rounding(NAME, inputs.rounding, targets, inputs.compensations, inputs.seed, device)
    inputs.dtypes = tuple(dtypes)


def check_values(inputs: Inputs) -> None:
    lists.check_momentum_value(NAME, inputs.momentum)


def distinct(inputs: Inputs) -> Inputs | None:
    """The call without repeated and empty tensors; None when nothing is left."""
    first = memory.unique(inputs.targets, inputs.sources)
    if first is None:
        inputs.streams = range(len(inputs.targets))
        return inputs
    if not first:
        return None

    def chosen(values: list[torch.Tensor]) -> list[torch.Tensor]:
        return [values[i] for i in first] if values else []

    return replace(
        inputs,
        targets=chosen(inputs.targets),
        sources=chosen(inputs.sources),
        copies=chosen(inputs.copies),
        compensations=chosen(inputs.compensations),
        streams=first,
    )


def kernel_reasons(inputs: Inputs) -> list[Reason]:
    """The dtypes that kernel backends take."""
    return dtype_reasons(inputs.dtypes, lists.KERNEL_DTYPES)


def example(shapes: list[tuple[int, ...]]) -> Callable[[str, torch.dtype], Inputs]:
    """Inputs of an ordinary call, by device type and dtype."""

    def build(device_type: str, dtype: torch.dtype) -> Inputs:
        targets, sources = (
            [torch.zeros(shape, device=device_type, dtype=dtype) for shape in shapes]
            for _ in range(2)
        )
        momentum = torch.tensor(0.99, dtype=torch.float64)
        return Inputs(targets, sources, momentum, [], [], None, "nearest", dtypes=(dtype,))

    return build
