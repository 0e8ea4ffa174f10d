"""AdamW that moves the teacher in the same pass over memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .. import checks
from ..nn.ema import EMATeacher, Pair, compensations_of, copies_of
from ..ops.adamw_ema import TeacherLists, adamw_ema_
from ..ops.adamw_ema.inputs import COLUMNS

_NAME = "AdamWEMA"


class AdamWEMA(torch.optim.AdamW):
    """torch.optim.AdamW whose step also updates an `EMATeacher`: parameters, gradients, moments and
    targets are read and written once.

    Args:
        params, lr, betas, eps, weight_decay, maximize, capturable: as in torch.optim.AdamW;
            parameter groups and schedulers work as there.
        amsgrad: must be False.
        teacher: the `EMATeacher` to update; None leaves a plain AdamW. Do not call
            ``teacher.update()`` as well. Parameters of the teacher's student that have no gradient
            (or belong to no group) and buffers move the teacher too; parameters of other modules
            have no teacher.
        backend: a backend name, ``"auto"``, or None (see `jepa_kernels.backend`).

    Raises:
        TypeError, ValueError: an argument of the wrong kind or value.
        BackendUnsupportedError: at `step`, when the chosen backend cannot run it.

    Notes:
        ``state_dict`` is that of torch.optim.AdamW (step, exp_avg, exp_avg_sq), and either loads
        the other's; the teacher saves itself. A step that ``found_inf`` or a GradScaler skips moves
        neither parameters, moments, step counts nor the teacher, and is not counted in
        ``teacher.num_updates``. The flag is not read back (for a teacher's schedule, see
        `EMATeacher.count_update`). With ``capturable=True`` step counts live on the device and lr
        may be a tensor there; give the teacher a device tensor as momentum, since numbers are fixed
        when a CUDA graph is captured.

    Example:
        >>> import torch
        >>> from jepa_kernels.nn import EMATeacher
        >>> from jepa_kernels.optim import AdamWEMA
        >>> encoder = torch.nn.Linear(4, 4)
        >>> teacher = EMATeacher(encoder, momentum=0.99)
        >>> optimizer = AdamWEMA(encoder.parameters(), lr=1e-3, teacher=teacher)
        >>> encoder(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()
        >>> teacher.num_updates
        1
    """

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float | torch.Tensor, float | torch.Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        capturable: bool = False,
        teacher: EMATeacher | None = None,
        backend: str | None = None,
    ) -> None:
        if teacher is not None and not isinstance(teacher, EMATeacher):
            raise TypeError(
                checks.sentence(
                    _NAME, "teacher", "be an EMATeacher or None", checks.type_name(teacher)
                )
            )
        super().__init__(
            params, lr, betas, eps, weight_decay, amsgrad, maximize=maximize, capturable=capturable
        )
        self.teacher = teacher
        self.backend = backend
        for group in self.param_groups:
            _check_group(group)

    def __getstate__(self) -> dict[str, Any]:
        # What copy.deepcopy and pickle carry over; torch's own list knows nothing of the teacher.
        return {**super().__getstate__(), "teacher": self.teacher, "backend": self.backend}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call] # of torch
        for group in self.param_groups:
            _check_group(group)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        _check_group(self.param_groups[-1])

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # True lets a GradScaler hand over its scale and its flag unread. Step counts must then be
        # where the flag is.
        return all(
            _step_is_on_device(group) or p.device.type == "cpu"
            for group in self.param_groups
            for p in group["params"]
        )

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, value: bool) -> None:
        """Set by torch's constructor and when a checkpoint of its fused AdamW is loaded; what
        counts is where the step counts are."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every parameter with a gradient, and one update of the teacher.

        Args:
            closure: re-evaluates the model and returns the loss; None if gradients are there.

        Returns:
            What `closure` returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        pairs = [] if self.teacher is None else self.teacher.pairs()
        momentum = 1.0 if self.teacher is None else self.teacher.next_momentum()
        follower = {id(pair.source): pair for pair in pairs if pair.is_float}
        works = self._collect(follower)
        for device, work in works.items():
            self._check_capture(device)
            scale, flag = (
                None if t is None else t.to(device, torch.float32, non_blocking=True)
                for t in (grad_scale, found_inf)
            )
            _count(work.steps, flag)
            self._update(work, device, momentum, scale, flag)
        if self.teacher is not None:
            done = {id(pair) for work in works.values() for pair in work.pairs}
            rest = [pair for pair in pairs if id(pair) not in done]
            if found_inf is not None:
                momentum = torch.where(
                    found_inf.reshape(()) != 0,
                    1.0,
                    torch.as_tensor(momentum, dtype=torch.float64, device=found_inf.device),
                )
            self.teacher.update_pairs(rest, momentum, part=1)
            # A flag in a graph's memory changes at every replay, and the count on the host at none.
            captured = (
                found_inf is not None
                and found_inf.is_cuda
                and torch.cuda.is_current_stream_capturing()
            )
            self.teacher.count_update(None if captured else found_inf)
        return loss

    def _check_capture(self, device: torch.device) -> None:
        if (
            device.type == "cuda"
            and torch.cuda.is_current_stream_capturing()
            and not all(g["capturable"] for g in self.param_groups)
        ):
            raise RuntimeError(
                checks.sentence(
                    _NAME,
                    "capturable",
                    "be True in every group while a CUDA graph is captured",
                    "False",
                )
            )

    def _collect(self, follower: dict[int, Pair]) -> dict[torch.device, _Work]:
        """The parameters with gradients of all groups by device, those with a teacher first."""
        followed: dict[torch.device, list[_Entry]] = {}
        alone: dict[torch.device, list[_Entry]] = {}
        for row, group in enumerate(self.param_groups):
            for parameter in group["params"]:
                gradient = parameter.grad
                if gradient is not None:
                    pair = follower.get(id(parameter))
                    entries = (alone if pair is None else followed).setdefault(parameter.device, [])
                    entries.append(
                        (parameter, gradient, self._state_of(parameter, gradient, group), row, pair)
                    )
        return {
            device: _Work(followed.get(device, []) + alone.get(device, []))
            for device in {**followed, **alone}
        }

    def _state_of(
        self, parameter: torch.Tensor, gradient: torch.Tensor, group: dict[str, Any]
    ) -> dict[str, torch.Tensor]:
        state: dict[str, torch.Tensor] = self.state[parameter]
        if gradient.layout != torch.strided:
            raise ValueError(
                checks.sentence(_NAME, "gradients", "be dense", f"layout {gradient.layout}")
            )
        if not state:
            device = parameter.device if _step_is_on_device(group) else torch.device("cpu")
            state["step"] = torch.zeros((), dtype=torch.float32, device=device)
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return state

    def _update(
        self,
        work: _Work,
        device: torch.device,
        momentum: float | torch.Tensor,
        grad_scale: torch.Tensor | None,
        found_inf: torch.Tensor | None,
    ) -> None:
        teacher = None
        if work.pairs:
            assert self.teacher is not None  # whose pairs they are
            teacher = TeacherLists(
                targets=[pair.target for pair in work.pairs],
                momentum=momentum,
                copies=copies_of(work.pairs),
                rounding=self.teacher.rounding,
                compensations=compensations_of(work.pairs),
                seed=self.teacher.next_seed(),
            )
        adamw_ema_(
            work.params,
            work.grads,
            work.exp_avgs,
            work.exp_avg_sqs,
            work.steps,
            hyper=_hyper(self.param_groups, device),
            groups=work.groups,
            teacher=teacher,
            grad_scale=grad_scale,
            found_inf=found_inf,
            backend=self.backend,
        )


# A parameter, its gradient, its state, the number of its group, and its teacher's pair if it has
# one.
_Entry = tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor], int, Pair | None]


class _Work:
    """The lists of one adamw_ema_ call. Entries with a pair come first."""

    def __init__(self, entries: list[_Entry]) -> None:
        self.params = [entry[0] for entry in entries]
        self.grads = [entry[1] for entry in entries]
        self.exp_avgs = [entry[2]["exp_avg"] for entry in entries]
        self.exp_avg_sqs = [entry[2]["exp_avg_sq"] for entry in entries]
        self.steps = [entry[2]["step"] for entry in entries]
        self.groups = [entry[3] for entry in entries]
        self.pairs = [entry[4] for entry in entries if entry[4] is not None]


def _count(steps: list[torch.Tensor], flag: torch.Tensor | None) -> None:
    """Adds 1 to every step count, or 0 where `flag` skips the step, which is not read."""
    on_host = steps[0].device.type == "cpu"
    if flag is not None:
        # As a list: a foreach function reads a tensor that is given in the place of a number.
        torch._foreach_add_(
            steps, [(flag == 0).to(steps[0].device, torch.float32).reshape(())] * len(steps)
        )
    else:
        # A tensor: the number 1 would be wrapped anew for each of the step counts on the host.
        torch._foreach_add_(steps, torch.ones((), device="cpu") if on_host else 1)


def _check_group(group: dict[str, Any]) -> None:
    for name in ("amsgrad", "differentiable"):
        if group.get(name):
            raise ValueError(checks.sentence(_NAME, name, "be False", group[name]))


def _step_is_on_device(group: dict[str, Any]) -> bool:
    return bool(group["capturable"] or group.get("fused"))


def _hyper(groups: list[dict[str, Any]], device: torch.device) -> torch.Tensor:
    """float64 [groups, 6] on the host; on `device` where a value is a tensor there, which is not
    read back."""
    rows = [
        [g["lr"], *g["betas"], g["eps"], g["weight_decay"], float(g["maximize"])] for g in groups
    ]
    tensors = [
        v for row in rows for v in row if isinstance(v, torch.Tensor) and v.device.type != "cpu"
    ]
    if not tensors:
        numbers = [[float(v) for v in row] for row in rows]
        return torch.tensor(numbers, dtype=torch.float64, device="cpu")
    # Numbers become fills, not copies from the host, so that a CUDA graph can record them.
    values = [
        v.to(device, torch.float64).reshape(())
        if isinstance(v, torch.Tensor)
        else torch.full((), v, dtype=torch.float64, device=device)
        for row in rows
        for v in row
    ]
    return torch.stack(values).reshape(len(rows), len(COLUMNS))
