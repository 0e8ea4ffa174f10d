"""What every op has in common: a torch schema, a fake, an autograd formula and a guard of direct
calls, made once from the op's `Inputs` dataclass.

The public function checks its arguments, resolves a backend and calls `run`. A plain eager call
goes straight to the backend (`_Eager` carries its gradient). Inside a compiled graph, under a
dispatch mode or a transform, and with tensor subclasses, it goes through
``torch.ops.jepa_kernels``, where an op has one schema for all backends: the fields of `Inputs`,
then the backend's name. Whoever calls that op directly meets the same checks.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from operator import attrgetter, itemgetter
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from . import checks
from .backend import Backend, BackendUnsupportedError, Op, joined, requested

Tensors = tuple[torch.Tensor, ...]
_Class = TypeVar("_Class")
# The package's own name, which is another one in a copy that is loaded beside an installed package.
_NAMESPACE = __name__.partition(".")[0]
_library = torch.library.Library(_NAMESPACE, "FRAGMENT")
_ops: Any = getattr(torch.ops, _NAMESPACE)
# Tensors that no subclass needs to see.
PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))
_PLAIN_OR_ABSENT = PLAIN | {type(None)}

# How a field of Inputs is spelled in a schema.
_SCHEMA_TYPES = {
    torch.Tensor: "Tensor",
    torch.Tensor | None: "Tensor?",
    list[torch.Tensor]: "Tensor[]",
    list[int]: "SymInt[]",
    int: "SymInt",
    float: "float",
    str: "str",
    bool: "bool",
}
_TENSOR_TYPES = ("Tensor", "Tensor?", "Tensor[]")


def differentiable() -> Any:
    """A field of Inputs that has a gradient."""
    return dataclasses.field(metadata={"differentiable": True})


def written() -> Any:
    """A list of tensors of Inputs that the op writes in place."""
    return dataclasses.field(metadata={"written": True})


def beside_the_schema(**options: Any) -> Any:
    """A field of Inputs that only eager calls carry: no kernel reads it."""
    return dataclasses.field(metadata={"schema": False}, **options)


@typing.dataclass_transform(field_specifiers=(differentiable, written, beside_the_schema))
def call_inputs(**options: Any) -> Callable[[type[_Class]], type[_Class]]:
    """`dataclasses.dataclass` for the inputs of an op: type checkers know the fields made above."""
    return dataclasses.dataclass(**options)


def _picked(places: Sequence[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """values -> those at `places`."""
    if len(places) > 1:
        return itemgetter(*places)
    return lambda values: tuple([values[i] for i in places])


class Signature:
    """The fields of an Inputs dataclass as the arguments of a torch op."""

    def __init__(self, inputs: type) -> None:
        hints = typing.get_type_hints(inputs)
        fields = [f for f in dataclasses.fields(inputs) if f.metadata.get("schema", True)]
        self.inputs = inputs
        self.names = tuple(f.name for f in fields)
        self.types = tuple(_schema_type(f.name, hints[f.name]) for f in fields)
        self.differentiable = tuple(
            i for i, f in enumerate(fields) if f.metadata.get("differentiable", False)
        )
        self.written = tuple(f.name for f in fields if f.metadata.get("written", False))
        self.tensors = tuple(i for i, kind in enumerate(self.types) if kind in _TENSOR_TYPES)
        self.has_lists = any(self.types[i] == "Tensor[]" for i in self.tensors)
        # Values are taken apart and put together at every call, so in C.
        others = tuple(i for i in range(len(fields)) if i not in self.tensors)
        self._values = attrgetter(*self.names)
        self.tensors_of, self.others_of = _picked(self.tensors), _picked(others)
        self.together = _picked([(*self.tensors, *others).index(i) for i in range(len(fields))])

    def schema(self) -> str:
        marks = {name: chr(ord("a") + i) for i, name in enumerate(self.written)}
        arguments = []
        for name, kind in zip(self.names, self.types, strict=True):
            if name in marks:
                kind = kind.replace("Tensor", f"Tensor({marks[name]}!)")
            arguments.append(f"{kind} {name}")
        return ", ".join(arguments)

    def values(self, inputs: Any) -> tuple[Any, ...]:
        """The arguments of the op, in order."""
        if torch.compiler.is_compiling():  # Dynamo traces a loop, not an attrgetter
            return tuple([getattr(inputs, name) for name in self.names])
        found: tuple[Any, ...] = self._values(inputs)
        return found

    def given(self, values: Sequence[Any]) -> list[torch.Tensor]:
        """Every tensor of a call."""
        if not self.has_lists:
            return [values[i] for i in self.tensors if values[i] is not None]
        found: list[torch.Tensor] = []
        for i in self.tensors:
            value = values[i]
            if isinstance(value, (list, tuple)):
                found += value
            elif value is not None:
                found.append(value)
        return found

    def leaves(self, values: Sequence[Any]) -> list[torch.Tensor | None]:
        """The differentiable tensors in order, lists entry by entry."""
        if not self.has_lists:
            return [values[i] for i in self.differentiable]
        found: list[torch.Tensor | None] = []
        for i in self.differentiable:
            value = values[i]
            if isinstance(value, (list, tuple)):
                found += value
            else:
                found.append(value)
        return found

    def grouped(self, values: Sequence[Any], gradients: Sequence[Any]) -> list[Any]:
        """`gradients`, one for each of `leaves`, in the places of the op's arguments."""
        places: list[Any] = [None] * len(self.names)
        rest = iter(gradients)
        for i in self.differentiable:
            if self.types[i] == "Tensor[]":
                places[i] = [next(rest) for _ in values[i]]
            else:
                places[i] = next(rest)
        return places


def _schema_type(name: str, hint: Any) -> str:
    if isinstance(hint, types.UnionType):
        hint = hint.__args__[0] | None
    if hint not in _SCHEMA_TYPES:
        raise TypeError(checks.sentence("Signature", name, "have a type of a schema", hint))
    return _SCHEMA_TYPES[hint]


class Contract(Op):
    """What ops that return tensors and ops that write in place share.

    Args:
        name, package, priority, prepare, examples: as for `Op`.
        inputs: the dataclass of a call; its fields make the schema.
        check: raises unless the inputs are sound (shapes, dtypes, devices; never values).
        check_values: ids, offsets and row numbers, where reading them waits for nothing.
        check_direct: what only a direct caller of the torch op could get wrong.
    """

    def __init__(
        self,
        name: str,
        package: str,
        priority: tuple[str, ...],
        prepare: Callable[..., Any],
        examples: Any,
        *,
        inputs: type,
        check: Callable[[Any], None],
        check_values: Callable[[Any], None],
        check_direct: Callable[[Any], None] | None = None,
    ) -> None:
        super().__init__(name, package, priority, prepare, examples)
        self.signature = Signature(inputs)
        self.check, self.check_values, self.check_direct = check, check_values, check_direct

    def guarded(self, values: Sequence[Any], name: str) -> tuple[Any, Backend]:
        """The inputs and the backend of a direct call, checked like those of the public one."""
        backend = self.backends.get(name)
        if backend is None or backend.forward is None:
            allowed = ", ".join(n for n, b in self.backends.items() if b.forward is not None)
            raise ValueError(
                checks.sentence(self.name, "backend", f"be one of {allowed}", repr(name))
            )
        inputs = self.signature.inputs(*values)
        if self.check_direct is not None:
            self.check_direct(inputs)
        self.check(inputs)
        reasons = backend.unsupported(inputs)
        if reasons:
            raise BackendUnsupportedError(
                f"{self.name} cannot run on backend '{name}': {joined(reasons)}"
            )
        return inputs, backend

    def _check_values(self, inputs: Any, backend: Backend) -> None:
        if not backend.checks_values:
            self.check_values(inputs)


class Function(Contract):
    """An op that returns tensors: forward and backward for kernels, one autograd formula.

    The first output is differentiable, the others are not.

    Args:
        outputs: (inputs, backend) -> shape and dtype of each output.
        num_outputs: how many there are.
        saved: which of them backward needs.
        Other arguments: as for `Contract`.
    """

    def __init__(
        self,
        *arguments: Any,
        outputs: Callable[[Any, Backend], list[tuple[list[int], torch.dtype]]],
        num_outputs: int,
        saved: tuple[int, ...],
        **options: Any,
    ) -> None:
        super().__init__(*arguments, **options)
        self.outputs, self.num_outputs, self.saved = outputs, num_outputs, saved
        _register_function(self)
        self.forward_op: Callable[..., Tensors]
        self.forward_op = getattr(_ops, f"{self.name}_fwd").default
        self.backward_op = getattr(_ops, f"{self.name}_bwd").default

    def run(self, inputs: Any, backend: Backend) -> Tensors:
        """Runs checked inputs on `backend`."""
        if backend.runs_composed(inputs):
            if not torch.compiler.is_compiling():
                self._check_values(inputs, backend)
            assert backend.compose is not None  # runs_composed says so
            return backend.compose(inputs)
        signature, values = self.signature, self.signature.values(inputs)
        if torch.compiler.is_compiling() or not _unwatched(
            signature.given(values) if signature.has_lists else signature.tensors_of(values),
            _PLAIN_OR_ABSENT,
        ):
            return self.forward_op(*values, backend.name)
        if not backend.checks_values:
            self.check_values(inputs)
        if torch.is_grad_enabled():
            leaves = signature.leaves(values)
            if any([t is not None and t.requires_grad for t in leaves]):
                return _apply(self, backend, inputs, values, *leaves)
        outputs: Tensors = _exact(backend.forward, inputs)
        return outputs


class InPlace(Contract):
    """An op that writes lists of tensors and returns nothing. There is nothing to differentiate:
    the public function runs it under no_grad.

    Args:
        distinct: inputs -> the same without tensors that occur twice, or None when nothing is left
            to do.
        Other arguments: as for `Contract`.
    """

    def __init__(
        self, *arguments: Any, distinct: Callable[[Any], Any | None], **options: Any
    ) -> None:
        super().__init__(*arguments, **options)
        self.distinct = distinct
        _register_in_place(self)
        self.update_op = getattr(_ops, f"{self.name}_").default

    def run_plain(self, inputs: Any, tensors: Sequence[torch.Tensor], name: str | None) -> bool:
        """Makes a call whose inputs nobody has checked, where nothing in it is special: one native
        call checks a short list in less time than Python. Returns False, with nothing written,
        where the usual way has to be taken.

        Args:
            inputs: a call with targets.
            tensors: every tensor of its lists.
            name: the backend argument of the public function.
        """
        wanted = requested(name)[0]
        if not is_plain(tensors):
            return False
        first = self.candidates(inputs.device_type)[0] if wanted == "auto" else wanted
        backend = self.backends.get(first)  # another op may have the one that is asked for
        if (
            backend is None
            or backend.plain is None
            or (wanted == "auto" and self.passed_by(first, inputs) is not None)
            or not backend.plain(inputs)
        ):
            return False
        self._count_writes(inputs)
        return True

    def run(self, inputs: Any, backend: Backend) -> None:
        """Runs checked inputs on `backend`."""
        values = self.signature.values(inputs)
        if is_plain(self.signature.given(values)):
            self.update(inputs, backend)
        else:
            self.update_op(*values, backend.name)

    def update(self, inputs: Any, backend: Backend) -> None:
        self._check_values(inputs, backend)
        if backend.plain is None or not backend.plain(inputs):
            kernel_inputs = self.distinct(inputs)
            if kernel_inputs is not None:
                assert backend.forward is not None
                backend.forward(kernel_inputs)
        self._count_writes(inputs)

    def _count_writes(self, inputs: Any) -> None:
        """Kernels write through raw pointers, which autograd's version counters do not see."""
        for name in self.signature.written:
            written = getattr(inputs, name)
            try:
                if written:
                    torch.autograd.graph.increment_version(written)
            except RuntimeError:  # an inference tensor, which has no counter, ended it
                torch.autograd.graph.increment_version([t for t in written if not t.is_inference()])


def is_plain(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether nothing but a backend needs to see this call: no graph, mode, transform or
    subclass."""
    return not torch.compiler.is_compiling() and _unwatched(tensors, PLAIN)


def _unwatched(tensors: Sequence[torch.Tensor | None], plain: frozenset[type]) -> bool:
    """`is_plain` outside a graph, of tensors whose types are among `plain`."""
    return (
        _get_current_dispatch_mode() is None
        and not torch._C._are_functorch_transforms_active()
        and set(map(type, tensors)) <= plain
    )


def _exact(call: Callable[..., Any] | None, inputs: Any, *more: Any) -> Any:
    """Calls a backend with autocast off: the public function has cast what it should."""
    assert call is not None
    kind = inputs.device_type
    if checks.is_autocast_enabled(kind):
        with torch.autocast(kind, enabled=False):
            return call(inputs, *more)
    return call(inputs, *more)


class _Eager(torch.autograd.Function):
    """A kernel's forward and backward in a plain eager call."""

    @staticmethod
    def forward(
        ctx: Any,
        op: Function,
        backend: Backend,
        inputs: Any,
        values: tuple[Any, ...],
        *leaves: Any,
    ) -> Tensors:
        outputs: Tensors = _exact(backend.forward, inputs)
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.set_materialize_grads(False)  # or it fills zeros as large as what is saved
        _save(ctx, op, values, outputs)
        ctx.backend_name = backend.name
        return outputs

    @staticmethod
    def backward(ctx: Any, grad_out: Any, *unused: Any) -> tuple[Any, ...]:
        needs = list(ctx.needs_input_grad[4:])
        if grad_out is None:
            return (None, None, None, None, *[None] * len(needs))
        values, saved = _saved(ctx)
        if torch.is_grad_enabled() or not is_plain([grad_out]):
            # A gradient that is itself differentiated: the op refuses that, in one sentence.
            grads = ctx.op.backward_op(grad_out, saved, needs, *values, ctx.backend_name)
        else:
            inputs = ctx.op.signature.inputs(*values)
            backend = ctx.op.backends[ctx.backend_name]
            grads = _exact(backend.backward, inputs, saved, grad_out, needs)
        if False in needs:
            grads = [g if n else None for g, n in zip(grads, needs, strict=True)]
        return (None, None, None, None, *grads)


# Function.apply without its look at torch.func's wrappers: `is_plain` has looked.
_apply: Callable[..., Tensors] = super(torch.autograd.Function, _Eager).apply


def _save(ctx: Any, op: Function, values: Sequence[Any], outputs: Sequence[torch.Tensor]) -> None:
    """Tensors go where autograd counts their versions and hooks see them, the rest beside."""
    signature = op.signature
    ctx.op, ctx.others, ctx.counts = op, signature.others_of(values), None
    tensors: Sequence[Any] = signature.tensors_of(values)
    if signature.has_lists:
        parts = [v if isinstance(v, (list, tuple)) else None for v in tensors]
        ctx.counts = [-1 if part is None else len(part) for part in parts]
        tensors = [
            t
            for value, part in zip(tensors, parts, strict=True)
            for t in ((value,) if part is None else part)
        ]
    ctx.save_for_backward(*tensors, *[outputs[i] for i in op.saved])


def _saved(ctx: Any) -> tuple[tuple[Any, ...], list[torch.Tensor]]:
    """The arguments of the op, and the outputs that backward needs."""
    saved, signature = ctx.saved_tensors, ctx.op.signature
    if ctx.counts is None:
        given = len(signature.tensors)
        return signature.together((*saved[:given], *ctx.others)), list(saved[given:])
    rest: Iterator[Any] = iter(saved)
    tensors = [
        next(rest) if count < 0 else [next(rest) for _ in range(count)] for count in ctx.counts
    ]
    return signature.together((*tensors, *ctx.others)), list(rest)


def _register_function(op: Function) -> None:
    """The op's two torch ops."""
    signature, name = op.signature, op.name
    arguments = signature.schema()

    def forward(*given: Any) -> Tensors:
        *values, backend_name = given
        inputs, backend = op.guarded(values, backend_name)
        op._check_values(inputs, backend)
        return tuple(t.contiguous() for t in _exact(backend.forward, inputs))

    def backward(grad_out: torch.Tensor, saved: Any, needs: Any, *given: Any) -> Any:
        *values, backend_name = given
        inputs, backend = op.guarded(values, backend_name)
        op._check_values(inputs, backend)
        leaves = signature.leaves(values)
        for argument, found, wanted in (
            ("saved", len(saved), len(op.saved)),
            ("needs", len(needs), len(leaves)),
        ):
            if found != wanted:
                raise ValueError(checks.sentence(name, argument, f"have {wanted} entries", found))
        outputs, device = op.outputs(inputs, backend), signature.given(values)[0].device
        _check_like(name, "grad_out", grad_out, *outputs[0], device, contiguous=False)
        for i, tensor in zip(op.saved, saved, strict=True):
            _check_like(name, f"saved output {i}", tensor, *outputs[i], device, contiguous=True)
        grads = _exact(backend.backward, inputs, list(saved), grad_out, list(needs))
        return [
            g.contiguous() if n and t is not None else grad_out.new_empty(0)
            for g, n, t in zip(grads, needs, leaves, strict=True)
        ]

    def fake_forward(*given: Any) -> Tensors:
        *values, backend_name = given
        tensors = signature.given(values)
        _check_one_device(name, tensors)
        outputs = op.outputs(signature.inputs(*values), op.backends[backend_name])
        return tuple(tensors[0].new_empty(shape, dtype=dtype) for shape, dtype in outputs)

    def fake_backward(grad_out: torch.Tensor, saved: Any, needs: Any, *given: Any) -> list[Any]:
        values = given[:-1]
        _check_one_device(name, [*signature.given(values), grad_out, *saved])
        return [
            torch.empty_like(t, memory_format=torch.contiguous_format)
            if n and t is not None
            else grad_out.new_empty(0)
            for t, n in zip(signature.leaves(values), needs, strict=True)
        ]

    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *values, ctx.backend_name = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        _save(ctx, op, values, output)

    def differentiate(ctx: Any, grad_out: Any, *unused: Any) -> tuple[Any, ...]:
        values, saved = _saved(ctx)
        needs: list[bool] = []
        for i in signature.differentiable:
            need = ctx.needs_input_grad[i]
            needs += list(need) if isinstance(need, (list, tuple)) else [need]
        if grad_out is None:
            grads: list[Any] = [None] * len(needs)
        else:
            grads = op.backward_op(grad_out, saved, needs, *values, ctx.backend_name)
        wanted = [g if n else None for g, n in zip(grads, needs, strict=True)]
        return (*signature.grouped(values, wanted), None)

    def refuse_double_backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(
            f"{name}: double backward must not be requested, got a gradient of a gradient. Use "
            "backend='reference'."
        )

    results = ", ".join(["Tensor"] * op.num_outputs)
    _library.define(f"{name}_fwd({arguments}, str backend) -> ({results})")
    _library.define(
        f"{name}_bwd(Tensor grad_out, Tensor[] saved, bool[] needs, {arguments}, str backend) -> "
        "Tensor[]"
    )
    for suffix, implementation, fake, formula, context in (
        ("fwd", forward, fake_forward, differentiate, setup_context),
        ("bwd", backward, fake_backward, refuse_double_backward, None),
    ):
        qualified = f"{_NAMESPACE}::{name}_{suffix}"
        _library.impl(f"{name}_{suffix}", implementation, "CompositeExplicitAutograd")
        torch.library.register_fake(qualified, fake, lib=_library)
        torch.library.register_autograd(qualified, formula, setup_context=context, lib=_library)


def _register_in_place(op: InPlace) -> None:
    """The op's torch op."""

    def update(*given: Any) -> None:
        *values, backend_name = given
        op.update(*op.guarded(values, backend_name))

    def fake(*given: Any) -> None:
        # A list with a meta tensor in it comes here too: it is checked, not silently accepted.
        *values, backend_name = given
        op.guarded(values, backend_name)

    name = f"{op.name}_"
    _library.define(f"{name}({op.signature.schema()}, str backend) -> ()")
    _library.impl(name, update, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{_NAMESPACE}::{name}", fake, lib=_library)


def _check_one_device(op: str, tensors: Sequence[torch.Tensor]) -> None:
    """A call that mixes a meta tensor with real ones reaches only the fake, which must not answer
    it with unwritten memory."""
    for tensor in tensors[1:]:
        checks.same_device(op, "every tensor", tensor, tensors[0].device)


def _check_like(
    op: str,
    argument: str,
    tensor: torch.Tensor,
    shape: list[int],
    dtype: torch.dtype,
    device: torch.device,
    contiguous: bool,
) -> None:
    if (
        list(tensor.shape) != shape
        or tensor.dtype != dtype
        or tensor.device != device
        or tensor.layout != torch.strided
        or (contiguous and not tensor.is_contiguous())
    ):
        kind = "a contiguous tensor" if contiguous else "a tensor"
        raise ValueError(
            checks.sentence(
                op,
                argument,
                f"be {kind} of shape {tuple(shape)} {dtype} on {device}",
                f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}",
            )
        )
