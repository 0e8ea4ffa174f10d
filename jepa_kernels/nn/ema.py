"""The teacher: a frozen copy of a module that follows it as a moving average."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from .. import checks
from ..ops.ema.lists import ROUNDINGS
from ..ops.ema.shards import is_sharded
from ..ops.ema_update import ema_update_

_NAME = "EMATeacher"
_HALF = (torch.bfloat16, torch.float16)
_FSDP1_HINT = (
    "FullyShardedDataParallel flattens parameters; torch.distributed.fsdp.fully_shard (FSDP2) "
    "keeps them."
)
_FORWARD = "forward_copy."


class Pair(NamedTuple):
    """One tensor of the teacher and what it follows; `is_float` is False for what is copied, such
    as an integer buffer."""

    name: str
    target: torch.Tensor
    source: torch.Tensor
    copy: torch.Tensor | None
    compensation: torch.Tensor | None
    is_float: bool


class EMATeacher(nn.Module):
    """A frozen copy of `student` whose parameters follow it: target <- momentum * target + (1 -
    momentum) * student.

    Args:
        student: the module to follow. Not held as a submodule. Copy before sharding: build the
            teacher first, then call ``fully_shard`` in the same way on the student, on
            ``teacher.module``, and on ``teacher.forward_copy`` and ``teacher.compensation`` where
            they exist.
        momentum: a number, a function of the number of updates so far (`LinearMomentum`,
            `CosineMomentum`), or a 0-d tensor, which may live on the device and be changed in place
            (for CUDA graphs).
        master_dtype: dtype in which 16-bit parameters and buffers are kept; None keeps the
            student's. bfloat16 loses every update at the usual momenta, hence float32.
        forward_dtype: dtype of the copy that `forward` uses; None is the student's. A second module
            is kept, and written in the same pass, only where it differs from the master.
        rounding: ``"nearest"``, ``"kahan"`` or ``"stochastic"`` for masters kept in 16 bits
            (``master_dtype=None``); see `ema_update_`.
        average_buffers: float and complex buffers (batch-norm statistics) are averaged like
            parameters; False copies them. Other buffers are copied.
        warmup: momentum is at most ``(1 + n) / (10 + n)`` at update n, so that a short run does not
            lag.
        debias: weigh the student's history alone, as if the average had started at zero and were
            divided by ``1 - prod(momentum)``; the first update then copies the student.
        seed: of stochastic rounding.
        backend: a backend name, ``"auto"``, or None (see `jepa_kernels.backend`).

    Notes:
        Always in eval mode and without gradients. ``state_dict`` holds the masters under
        ``module.``, Kahan compensations under ``compensation.`` and the update count as
        ``_extra_state``; the forward copy is rebuilt on loading. ``teacher.module.state_dict()``
        has the student's own keys. Optimizers that update the teacher themselves
        (`jepa_kernels.optim.AdamWEMA`) replace calls of `update`.

    Example:
        >>> import torch
        >>> from jepa_kernels.nn import EMATeacher
        >>> student = torch.nn.Linear(2, 2)
        >>> teacher = EMATeacher(student, momentum=0.5)
        >>> with torch.no_grad():
        ...     _ = student.weight.add_(1.0)
        >>> teacher.update()
        >>> torch.allclose(student.weight - teacher.module.weight, torch.full((2, 2), 0.5))
        True
    """

    _counted: int
    _skipped: torch.Tensor | None

    def __init__(
        self,
        student: nn.Module,
        momentum: float | Callable[[int], float] | torch.Tensor = 0.99925,
        *,
        master_dtype: torch.dtype | None = torch.float32,
        forward_dtype: torch.dtype | None = None,
        rounding: str = "nearest",
        average_buffers: bool = True,
        warmup: bool = False,
        debias: bool = False,
        seed: int = 0,
        module: nn.Module | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        _check(student, module, momentum, rounding, warmup or debias)
        self._student = (student,)  # in a tuple: not a submodule
        self.momentum, self.rounding, self.average_buffers = momentum, rounding, average_buffers
        self.warmup, self.debias, self.seed, self.backend = warmup, debias, seed, backend
        self.num_updates = 0
        self.history_weight = 0.0
        self.module = (copy.deepcopy(student) if module is None else module).requires_grad_(False)
        if master_dtype is not None and module is None:
            _cast(self.module, lambda dtype: master_dtype if dtype in _HALF else dtype)
        self.forward_copy = self._make_forward_copy(student, forward_dtype)
        self.compensation = copy.deepcopy(self.module) if rounding == "kahan" else None
        if self.compensation is not None:
            for tensor in (*self.compensation.parameters(), *self.compensation.buffers()):
                tensor.zero_()
        hooks: Any = self  # torch annotates neither function
        hooks.register_state_dict_post_hook(_drop_forward_copy)
        hooks.register_load_state_dict_pre_hook(_add_forward_copy)
        super().train(False)

    def __deepcopy__(self, memo: dict[int, Any]) -> EMATeacher:
        """A teacher that follows the same student; within a copy of a module that holds both, one
        that follows the copied student."""
        if not memo:
            memo[id(self.student)] = self.student
        made = self.__class__.__new__(self.__class__)
        memo[id(self)] = made
        made.__dict__.update(
            {name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()}
        )
        return made

    @property
    def student(self) -> nn.Module:
        return self._student[0]

    @property
    def num_updates(self) -> int:
        """Updates done, without those that a flag skipped. Flags on a device are only added up
        there, and read when this is."""
        if self._skipped is not None:
            self._counted -= int(self._skipped)
            self._skipped = None
        return self._counted

    @num_updates.setter
    def num_updates(self, value: int) -> None:
        self._counted = value
        self._skipped = None

    def _make_forward_copy(
        self, student: nn.Module, forward_dtype: torch.dtype | None
    ) -> nn.Module | None:
        def rule(dtype: torch.dtype) -> torch.dtype:
            return forward_dtype if forward_dtype is not None and dtype.is_floating_point else dtype

        both = zip(
            (*student.parameters(), *student.buffers()),
            (*self.module.parameters(), *self.module.buffers()),
            strict=True,
        )
        if all(rule(theirs.dtype) == master.dtype for theirs, master in both):
            return None
        made = copy.deepcopy(student).requires_grad_(False)
        _cast(made, rule)
        return made

    def train(self, mode: bool = True) -> EMATeacher:
        """Stays in eval mode: a teacher's targets have no dropout."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return (self.module if self.forward_copy is None else self.forward_copy)(*args, **kwargs)

    def pairs(self) -> list[Pair]:
        """Every tensor of the teacher once, with the student's. Read anew at each call, since
        sharding replaces parameters."""
        modules = [self.student, self.module, self.forward_copy, self.compensation]
        trees = [[] if m is None else list(m.modules()) for m in modules]
        if len(trees[0]) != len(trees[1]):
            hint = _FSDP1_HINT if _is_fsdp1(self.student) else ""
            wanted = f"keep its {len(trees[1])} submodules"
            raise ValueError(checks.sentence(_NAME, "student", wanted, len(trees[0]), hint))
        # FSDP2 leaves a root's own parameters gathered after a forward without gradients.
        for module in _sharded_modules([m for tree in trees for m in tree]):
            module.reshard()
        found: dict[int, Pair] = {}
        absent: list[None] = [None] * len(trees[1])
        for student, master, low, lost in zip(
            trees[0], trees[1], trees[2] or absent, trees[3] or absent, strict=True
        ):
            for kind, averaged in (("_parameters", True), ("_buffers", self.average_buffers)):
                for name, target in master.__dict__[kind].items():
                    if target is not None and id(target) not in found:
                        source = _of_student(student, kind, name)
                        copied, compensation = (
                            None if m is None else m.__dict__[kind][name] for m in (low, lost)
                        )
                        is_float = averaged and _is_averaged(target)
                        found[id(target)] = Pair(
                            name, target, source, copied, compensation, is_float
                        )
        return list(found.values())

    def next_momentum(self) -> float | torch.Tensor:
        """The momentum of the coming update, warm-up and debiasing included."""
        if isinstance(self.momentum, torch.Tensor):
            return self.momentum
        momentum = (
            float(self.momentum(self.num_updates))
            if callable(self.momentum)
            else float(self.momentum)
        )
        if self.warmup:
            momentum = min(momentum, (1 + self.num_updates) / (10 + self.num_updates))
        if not self.debias:
            return momentum
        kept = momentum * self.history_weight
        return kept / (kept + 1 - momentum) if kept else 0.0

    def next_seed(self, part: int = 0) -> int | None:
        """The seed of stochastic rounding for the coming update; `part` tells apart two calls of
        one update."""
        return (
            (self.seed << 32) + 2 * self.num_updates + part
            if self.rounding == "stochastic"
            else None
        )

    def count_update(self, skipped: torch.Tensor | None = None) -> None:
        """Advances schedule, warm-up and debiasing. `update` calls it; so does an optimizer that
        updates the teacher itself.

        Args:
            skipped: one number that is not 0 if the update was skipped, which then does not count.
                It is read where a history is kept (`debias`), else only with `num_updates`: a
                number or a tensor as momentum never waits for it, a schedule or `warmup` does at
                the next update.
        """
        if self.debias and not isinstance(self.momentum, torch.Tensor):
            if skipped is not None and bool(skipped):
                return
            skipped = None
            momentum = (
                float(self.momentum(self.num_updates))
                if callable(self.momentum)
                else float(self.momentum)
            )
            if self.warmup:
                momentum = min(momentum, (1 + self.num_updates) / (10 + self.num_updates))
            self.history_weight = momentum * self.history_weight + (1 - momentum)
        self._counted += 1
        if skipped is not None:
            flag = (skipped.detach().reshape(()) != 0).to(torch.int64)
            self._skipped = flag if self._skipped is None else self._skipped + flag

    def update(self) -> None:
        """One update of every parameter and buffer, in one pass over the list. Call it after the
        optimizer's step."""
        self.update_pairs(self.pairs(), self.next_momentum())
        self.count_update()

    @torch.no_grad()
    def update_pairs(
        self, pairs: list[Pair], momentum: float | torch.Tensor, part: int = 0
    ) -> None:
        """Moves the targets of `pairs` by `momentum` and copies those that are not averaged,
        without counting an update."""
        moved = [_real(p) for p in pairs if p.is_float]
        by_device: dict[tuple[torch.device, bool], list[Pair]] = {}
        for pair in moved:
            by_device.setdefault((pair.target.device, pair.copy is not None), []).append(pair)
        for group in by_device.values():
            ema_update_(
                [p.target for p in group],
                [p.source for p in group],
                momentum,
                copies=copies_of(group),
                rounding=self.rounding,
                compensations=compensations_of(group),
                seed=self.next_seed(part),
                backend=self.backend,
            )
        for pair in pairs:
            if not pair.is_float:
                # A momentum of exactly 1 on the device may mean a skipped step, which copies
                # nothing either.
                source = (
                    torch.where(momentum == 1, pair.target, pair.source.to(pair.target.dtype))
                    if isinstance(momentum, torch.Tensor) and momentum.device == pair.target.device
                    else pair.source
                )
                for place in (pair.target, pair.copy):
                    if place is not None:
                        place.copy_(source)

    @torch.no_grad()
    def lag(self) -> torch.Tensor:
        """Distance to the student, ||teacher - student|| / ||student|| over all parameters: a 0-d
        float64 tensor, without a synchronisation.

        Near 0 the teacher only copies the student; a value that keeps growing says that the
        momentum is too high for the length of the run. With FSDP2 this is a collective call: the
        sums of every rank are added.
        """
        parameters = {id(p) for p in self.module.parameters()}
        pairs = [p for p in self.pairs() if id(p.target) in parameters and p.is_float]
        if not pairs:
            raise ValueError(
                checks.sentence(_NAME, "module", "have a float parameter to measure a lag", "none")
            )
        sums = [_squares(_real(p)) for p in pairs]
        device = sums[0].device
        difference, size = torch.stack([s.to(device) for s in sums]).sum(0).unbind()
        return (difference / size).sqrt()

    def get_extra_state(self) -> torch.Tensor:
        state = [self.num_updates, self.history_weight]
        return torch.tensor(state, dtype=torch.float64, device="cpu")

    def set_extra_state(self, state: torch.Tensor) -> None:
        self.num_updates, self.history_weight = int(state[0]), float(state[1])


def copies_of(pairs: list[Pair]) -> list[torch.Tensor] | None:
    """The forward copies of pairs that all have one, or None."""
    found = [pair.copy for pair in pairs if pair.copy is not None]
    return found if len(found) == len(pairs) else None


def compensations_of(pairs: list[Pair]) -> list[torch.Tensor] | None:
    """The Kahan compensations of pairs that all have one, or None."""
    found = [pair.compensation for pair in pairs if pair.compensation is not None]
    return found if len(found) == len(pairs) else None


def _check(
    student: nn.Module, module: nn.Module | None, momentum: object, rounding: str, uses_count: bool
) -> None:
    if not isinstance(student, nn.Module):
        raise TypeError(checks.sentence(_NAME, "student", "be a module", checks.type_name(student)))
    if module is not None:
        if not isinstance(module, nn.Module):
            raise TypeError(
                checks.sentence(_NAME, "module", "be a module or None", checks.type_name(module))
            )
        shapes = [
            [(name, tuple(p.shape)) for name, p in one.named_parameters()]
            for one in (student, module)
        ]
        if module is student or shapes[0] != shapes[1]:
            raise ValueError(
                checks.sentence(
                    _NAME,
                    "module",
                    "be a copy of the student, with its parameters' names and shapes",
                    "another",
                )
            )
    if _is_fsdp1(student):
        got = "FullyShardedDataParallel (FSDP1)"
        raise ValueError(
            checks.sentence(_NAME, "student", "not be wrapped in FSDP1", got, _FSDP1_HINT)
        )
    if rounding not in ROUNDINGS:
        raise ValueError(
            checks.sentence(_NAME, "rounding", f"be one of {', '.join(ROUNDINGS)}", repr(rounding))
        )
    for name, parameter in student.named_parameters():
        if module is None and is_sharded(parameter):
            hint = "Build the teacher first, then call fully_shard on student and teacher.module."
            raise ValueError(
                checks.sentence(
                    _NAME,
                    "student",
                    "be copied before it is sharded",
                    f"the sharded parameter {name}",
                    hint,
                )
            )
    if isinstance(momentum, torch.Tensor):
        if uses_count:
            raise ValueError(
                checks.sentence(
                    _NAME, "momentum", "be a number or a function with warmup or debias", "a tensor"
                )
            )
    elif not callable(momentum):
        checks.is_finite_number(_NAME, "momentum", momentum)
        if not 0.0 <= momentum <= 1.0:  # type: ignore[operator] # a number
            raise ValueError(checks.sentence(_NAME, "momentum", "be from 0 to 1", momentum))


def _of_student(student: nn.Module, kind: str, name: str) -> torch.Tensor:
    """The student's tensor of a name, or ValueError where it has been made into something else
    since the teacher was built."""
    own: torch.Tensor | None = student.__dict__[kind].get(name)
    if own is not None:
        return own
    hint = "Build the teacher from the module as it is now."
    if _is_fsdp1(student):
        hint = _FSDP1_HINT
    elif f"{name}_orig" in student._parameters:
        hint = "torch.nn.utils.prune.remove makes the pruning permanent."
    elif hasattr(student, "parametrizations"):
        hint = "torch.nn.utils.parametrize.remove_parametrizations undoes a parametrization."
    wanted = f"keep its {'parameter' if kind == '_parameters' else 'buffer'} {name!r}"
    raise ValueError(checks.sentence(_NAME, "student", wanted, type(student).__name__, hint))


def _is_fsdp1(module: nn.Module) -> bool:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kind = None if fsdp is None else getattr(fsdp, "FullyShardedDataParallel", None)
    return kind is not None and any(isinstance(m, kind) for m in module.modules())


def _is_averaged(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _real(pair: Pair) -> Pair:
    """A complex tensor as its real and imaginary parts, which are averaged one by one."""
    if not pair.target.is_complex():
        return pair
    copied, compensation = (
        None if tensor is None else torch.view_as_real(tensor.detach())
        for tensor in (pair.copy, pair.compensation)
    )
    target, source = (torch.view_as_real(t.detach()) for t in (pair.target, pair.source))
    return Pair(pair.name, target, source, copied, compensation, True)


def _cast(module: nn.Module, rule: Callable[[torch.dtype], torch.dtype]) -> None:
    """Changes dtypes tensor by tensor; ties stay tied because the tensors stay the same objects."""
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = tensor.data.to(rule(tensor.dtype))


def _sharded_modules(modules: list[nn.Module]) -> list[Any]:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return [] if fsdp is None else [m for m in modules if isinstance(m, fsdp.FSDPModule)]


def _squares(pair: Pair) -> torch.Tensor:
    """float64 [2]: the sums of squares of target - source and of source, over all ranks for a
    sharded parameter."""
    target, source = pair.target, pair.source
    if is_sharded(target):
        assert is_sharded(source)  # alike: ema_update_ checks it
        mesh, placements = target.device_mesh, target.placements
        sums = _local_squares(target.to_local(), source.to_local())
        for dim, placement in enumerate(placements):
            if placement.is_shard():
                torch.distributed.all_reduce(sums, group=mesh.get_group(dim))
        return sums
    return _local_squares(target, source)


def _local_squares(target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    wide = torch.promote_types(target.dtype, torch.float32)
    target, source = target.to(wide), source.to(wide)
    return torch.stack(
        [
            (target - source).square().sum(dtype=torch.float64),
            source.square().sum(dtype=torch.float64),
        ]
    )


def _drop_forward_copy(
    module: nn.Module, state: dict[str, Any], prefix: str, local_metadata: dict[str, Any]
) -> None:
    for key in [k for k in state if k.startswith(prefix + _FORWARD)]:
        del state[key]


def _add_forward_copy(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    if module.forward_copy is None:
        return
    masters = prefix + "module."
    for key in [k for k in state if k.startswith(masters)]:
        state[prefix + _FORWARD + key.removeprefix(masters)] = state[key]
