"""What the rollouts of all cells have in common: their inputs, what these must satisfy, and the op
that runs them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, NoReturn, Self, TypeVar

import torch

from ... import checks
from ...backend import Backend, Reason, dtype_reasons
from ...checks import dtype_name
from ...contract import Function, call_inputs, differentiable
from .cells import Cell

NAME = "latent_rollout"
PRIORITY = ("cuda", "triton", "cpu", "torch", "reference")
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@call_inputs()
class Rollout:
    """The inputs of one rollout, shaped as in the public functions. Those of a cell add its
    parameters by name.

    Attributes:
        output: ``states``, ``last`` or, with targets, ``errors``.
        save: whether backward follows, so that forward keeps what it needs.
        cell, cell_type: the cell's name in sentences, and its class.
        tables: tensors of rows, and the row numbers that select from each.
        leaves: names of the differentiable inputs, in the order of the schema.
    """

    states: torch.Tensor = differentiable()
    rows: torch.Tensor | None
    targets: torch.Tensor | None = differentiable()
    target_rows: torch.Tensor | None
    horizon: int
    output: str
    exponent: float
    save: bool

    cell: ClassVar[str]
    cell_type: ClassVar[type]
    tables: ClassVar[dict[str, str]] = {"states": "rows", "targets": "target_rows"}
    leaves: ClassVar[tuple[str, ...]]

    @classmethod
    def of(cls, cell: Any, shared: Any, actions: Any, anchor: Any, anchor_rows: Any) -> Self:
        """The inputs of a rollout of `cell`; `shared` are the fields of this class, in order."""
        raise NotImplementedError

    @property
    def device_type(self) -> str:
        return self.states.device.type

    @property
    def dtype(self) -> torch.dtype:
        return self.states.dtype

    @property
    def accumulate_dtype(self) -> torch.dtype:
        return torch.float64 if self.states.dtype == torch.float64 else torch.float32

    @property
    def num_rows(self) -> int:
        return self.states.shape[0] if self.rows is None else self.rows.shape[0]

    @property
    def channels(self) -> int:
        return self.states.shape[1]

    @property
    def widths(self) -> tuple[int, ...]:
        """Widths of the hidden layers; of the state for a GRU."""
        raise NotImplementedError

    @property
    def kept_steps(self) -> int:
        """Steps whose prediction is returned or compared."""
        return self.horizon if self.keeps_all else 1

    @property
    def keeps_all(self) -> bool:
        """Whether the prediction of every step counts, or the last one alone."""
        return self.output != "last"

    def start(self) -> torch.Tensor:
        """The initial states ``[rows, D]``."""
        return self.states if self.rows is None else self.states.index_select(0, self.rows)

    def target(self, k: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The targets of step k (from 0), and the rows to take of them."""
        assert self.targets is not None
        if self.target_rows is None:
            return self.targets[k], None
        return self.targets, self.target_rows[k]

    def widened(self) -> Self:
        """The same rollout in float32, for processors without fast 16-bit products."""
        given = {name: getattr(self, name) for name in self.leaves}
        return replace(self, **{n: t.float() for n, t in given.items() if t is not None})

    def out(self) -> tuple[list[int], torch.dtype]:
        """Shape and dtype of the result."""
        if self.output == "errors":
            return [self.horizon, self.num_rows], self.accumulate_dtype
        shape = [self.num_rows, self.channels]
        return (shape if self.output == "last" else [self.horizon, *shape]), self.dtype

    def outputs(self, backend: Backend) -> list[tuple[list[int], torch.dtype]]:
        """The result, then what backward needs."""
        raise NotImplementedError

    # What is said of a call.

    def size_class(self) -> str:
        """What is returned, then ``wide`` where the state has at least 512 channels."""
        return f"{self.output}/{'wide' if self.channels >= 512 else 'narrow'}"

    def describe(self) -> str:
        parts = [
            f"states [{self.num_rows}, {self.channels}] {dtype_name(self.dtype)} "
            f"{self.device_type}",
            f"{self.cell} hidden {' x '.join(map(str, self.widths))}",
            f"horizon {self.horizon}, returns {self.output}",
        ]
        return "; ".join([*parts, "gradients needed"] if self.save else parts)

    def kernel_reasons(self, widest: int | None = None) -> list[Reason]:
        """Why kernels that hold `widest` hidden units cannot run this call on any machine."""
        reasons, width = [], max(self.widths)
        if widest is not None and width > widest:
            text = f"hidden width of a {self.cell} must be at most {widest}, got {width}"
            reasons.append(Reason(text))
        return reasons + dtype_reasons((self.dtype,), _KERNEL_DTYPES)

    # What a call must satisfy.

    def check(self) -> None:
        """Raises a sentence unless shapes, dtypes, devices and numbers are those of a rollout."""
        states = self.states
        if not isinstance(states, torch.Tensor) or states.dim() != 2:
            checks.is_tensor(NAME, "states", states)
            checks.has_rank(NAME, "states", states, 2, "[rows, D]")
        self.expect("states", states, states.shape, checks.FLOAT_DTYPES)
        if self.rows is not None:
            checks.is_tensor(NAME, "rows", self.rows)
            checks.has_rank(NAME, "rows", self.rows, 1, "[rows]")
            self.expect("rows", self.rows, self.rows.shape, checks.ID_DTYPES)
        outputs = ("states", "last") if self.targets is None else ("errors",)
        if self.output not in outputs:
            fail("output", f"be one of {', '.join(outputs)}", repr(self.output))
        if isinstance(self.horizon, bool) or not isinstance(self.horizon, (int, torch.SymInt)):
            got = checks.type_name(self.horizon)
            raise TypeError(checks.sentence(NAME, "horizon", "be an int", got))
        if self.horizon < 1:
            fail("horizon", "be at least 1", self.horizon)
        checks.is_finite_number(NAME, "exponent", self.exponent)
        if self.exponent < 1:
            fail("exponent", "be at least 1", self.exponent)
        count = self.num_rows
        if self.target_rows is not None:
            self.expect("target_rows", self.target_rows, (self.horizon, count), checks.ID_DTYPES)
        self.expect_rows("targets", (self.horizon, count))

    def check_direct(self) -> None:
        """What `prepare` guarantees and a direct caller of the torch op could get wrong."""
        for table, index in self.tables.items():
            numbers, tensor = getattr(self, index), getattr(self, table)
            if numbers is not None:
                checks.has_dtype(NAME, index, numbers, (torch.int64,))
            if tensor is not None and tensor.dim() and tensor.stride(-1) != 1:
                fail(table, "have channel stride 1", tensor.stride(-1))

    def check_values(self) -> None:
        """Row numbers lie in their table; read on a CPU, on a GPU only where asked for."""
        for table, index in self.tables.items():
            rows = getattr(self, index)
            if rows is not None and rows.numel() and checks.values_are_checked(rows):
                low, high = (int(value) for value in torch.aminmax(rows))
                last = getattr(self, table).shape[0] - 1
                if low < 0 or high > last:
                    fail(index, f"hold rows from 0 to {last}", low if low < 0 else high)

    def expect(
        self, argument: str, tensor: Any, shape: Any, dtypes: tuple[torch.dtype, ...] = ()
    ) -> None:
        """Raises unless `tensor` has this shape, the dtype of states or one of `dtypes`, and lies
        where states do."""
        states = self.states
        if (
            isinstance(tensor, torch.Tensor)
            and tensor.shape == shape
            and (tensor.dtype in dtypes if dtypes else tensor.dtype == states.dtype)
            and tensor.device == states.device
            and tensor.layout == torch.strided
        ):
            return
        checks.is_tensor(NAME, argument, tensor)
        checks.is_strided(NAME, argument, tensor)
        checks.same_device(NAME, argument, tensor, states.device)
        if dtypes in (checks.FLOAT_DTYPES, checks.ID_DTYPES):
            checks.has_dtype(NAME, argument, tensor, dtypes)
        elif tensor.dtype not in (dtypes or (states.dtype,)):
            wanted = f"have the dtype of states ({dtype_name(states.dtype)})"
            wanted += " or float32" if len(dtypes) > 1 else ""
            fail(argument, wanted, dtype_name(tensor.dtype))
        if tensor.shape != shape:
            fail(argument, f"have shape {tuple(shape)}", tuple(tensor.shape))

    def expect_rows(self, table: str, lead: tuple[int, ...]) -> None:
        """Raises unless the table (or None) holds rows ``[*lead, D]``, or rows for its row
        numbers."""
        tensor, index = getattr(self, table), self.tables[table]
        if tensor is None:
            if getattr(self, index) is not None:
                fail(index, f"be None without {table}", checks.type_name(getattr(self, index)))
            return
        checks.is_tensor(NAME, table, tensor)
        if getattr(self, index) is not None:
            lead = tensor.shape[:1]
        wide = () if self.dtype == torch.float64 else (self.dtype, torch.float32)
        self.expect(table, tensor, (*lead, self.channels), wide)

    def expect_parameters(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Raises unless the cell's parameters have these shapes."""
        for name, shape in shapes.items():
            self.expect(f"cell.{name}", getattr(self, name), shape)

    def matrix_shape(self, name: str, meaning: str) -> torch.Size:
        """The shape of a parameter that others are measured by."""
        tensor: torch.Tensor = getattr(self, name)
        if not isinstance(tensor, torch.Tensor) or tensor.dim() != 2:
            checks.is_tensor(NAME, f"cell.{name}", tensor)
            checks.has_rank(NAME, f"cell.{name}", tensor, 2, meaning)
        return tensor.shape


def fail(argument: str, requirement: str, got: object) -> NoReturn:
    raise ValueError(checks.sentence(NAME, argument, requirement, got))


_Kind = TypeVar("_Kind", bound=Rollout)


def prepare(
    kind: type[_Kind],
    states: torch.Tensor,
    cell: Cell,
    horizon: int | None = None,
    *,
    rows: torch.Tensor | None = None,
    actions: torch.Tensor | None = None,
    anchor: torch.Tensor | None = None,
    anchor_rows: torch.Tensor | None = None,
    targets: torch.Tensor | None = None,
    target_rows: torch.Tensor | None = None,
    exponent: float = 1.0,
    output: str = "states",
) -> _Kind:
    """The checked inputs, of the dataclass `kind`, of the public functions' arguments (values are
    not read). Targets imply the horizon, and that errors are returned."""
    checks.is_tensor(NAME, "states", states)
    if type(cell) is not kind.cell_type:
        wanted = f"be a {kind.cell_type.__name__}"
        raise TypeError(checks.sentence(NAME, "cell", wanted, checks.type_name(cell)))
    if targets is not None:
        horizon, output = _steps(targets, target_rows), "errors"
    shared = (states, rows, targets, target_rows, horizon, output, exponent, False)
    inputs = kind.of(cell, shared, actions, anchor, anchor_rows)
    inputs.check()
    for table, index in inputs.tables.items():
        numbers, tensor = getattr(inputs, index), getattr(inputs, table)
        if numbers is not None:
            setattr(inputs, index, numbers.long().contiguous())
        if tensor is not None and tensor.stride(-1) != 1:
            setattr(inputs, table, tensor.contiguous())
    if torch.is_grad_enabled():
        given = [getattr(inputs, name) for name in inputs.leaves]
        inputs.save = any([t is not None and t.requires_grad for t in given])
    return inputs


def without_actions(actions: Any) -> None:
    """Refuses actions of a cell that takes none."""
    if actions is not None:
        fail("actions", "be None unless the cell is a GRU", checks.type_name(actions))


def _steps(targets: torch.Tensor, target_rows: torch.Tensor | None) -> int:
    """The horizon that the targets imply."""
    checks.is_tensor(NAME, "targets", targets)
    if target_rows is None:
        checks.has_rank(NAME, "targets", targets, 3, "[horizon, rows, D] without target_rows")
        return targets.shape[0]
    checks.has_rank(NAME, "targets", targets, 2, "[N, D] with target_rows")
    checks.is_tensor(NAME, "target_rows", target_rows)
    checks.has_rank(NAME, "target_rows", target_rows, 2, "[horizon, rows]")
    return target_rows.shape[0]


Zeros = Callable[..., torch.Tensor]  # sizes -> a tensor of zeros


def rollout_op(
    name: str,
    package: str,
    kind: type[Rollout],
    num_outputs: int,
    example: Callable[[int, int, int, Zeros], tuple[Cell, torch.Tensor | None]],
) -> Function:
    """The op of one cell.

    Args:
        name, package: of the op, and the package of its backends.
        kind: the dataclass of its inputs.
        num_outputs: the result, and what is saved for backward.
        example: (channels, horizon, rows, zeros) -> an ordinary cell and its actions.
    """

    def build(output: str, channels: int, device_type: str, dtype: torch.dtype) -> Rollout:
        zeros = partial(torch.zeros, dtype=dtype, device=device_type)
        cell, actions = example(channels, 4, 512, zeros)
        targets = zeros(4, 512, channels) if output == "errors" else None
        given = prepare(
            kind,
            zeros(512, channels),
            cell,
            4,
            actions=actions,
            targets=targets,
            output=output,
        )
        return replace(given, save=True)  # as in training

    op = Function(
        name,
        package,
        PRIORITY,
        partial(prepare, kind),
        {
            f"{output}/{size}": partial(build, output, channels)
            for size, channels in (("wide", 512), ("narrow", 256))
            for output in ("states", "last", "errors")
        },
        inputs=kind,
        check=kind.check,
        check_values=kind.check_values,
        check_direct=kind.check_direct,
        outputs=kind.outputs,
        num_outputs=num_outputs,
        saved=tuple(range(1, num_outputs)),
    )
    signature = op.signature
    kind.leaves = tuple(signature.names[i] for i in signature.differentiable)
    return op
