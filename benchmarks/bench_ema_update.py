"""ema_update_ against what training code does today: mul_ and add_ per tensor, _foreach_mul_ and
_foreach_add_, _foreach_lerp_.

The floor is the traffic of one pass (12 bytes per float32 parameter) over the bandwidth of an
in-place read-read-write stream. `stream` is that stream itself, one flat array as long as the list:
a ratio of 1 against it is the floor. Mixed lists (float32 teacher, bfloat16 student) and lists with
a bfloat16 copy of the teacher are compared with what a training loop would write for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

import jepa_kernels
from benchmarks import harness, parameter_lists
from jepa_kernels.backend import OPS

OP = "ema_update"
MOMENTUM = 0.99925
BASELINES = ("mul_add", "foreach_mul_add", "foreach_lerp", "stream")


@dataclass
class Case:
    """One list: `copies` is empty where no low-precision copy is asked for."""

    name: str
    dtype: str
    targets: list[torch.Tensor]
    sources: list[torch.Tensor]
    copies: list[torch.Tensor] = field(default_factory=list)

    def bytes(self) -> float:
        return float(
            sum(2 * t.nbytes + s.nbytes for t, s in zip(self.targets, self.sources, strict=True))
            + sum(c.nbytes for c in self.copies)
        )


def cases(options: harness.Options) -> Iterator[Case]:
    encoders = ("vit_s",) if options.quick else tuple(parameter_lists.ENCODERS)
    for encoder in encoders:
        for kind in ("float32", "float32 from bfloat16", "float32 with bfloat16 copy"):
            dtype = "float32" if kind == "float32" else "mixed"
            if options.wants(dtype=dtype) and (kind == "float32" or encoder != "vit_l"):
                targets = parameter_lists.draw(encoder, torch.float32, options.device)
                sources = parameter_lists.draw(
                    encoder, torch.bfloat16 if "from" in kind else torch.float32, options.device
                )
                copies = [t.bfloat16() for t in targets] if "copy" in kind else []
                yield Case(
                    f"{encoder}/{kind.replace(' ', '-')}{parameter_lists.threads()}",
                    dtype,
                    targets,
                    sources,
                    copies,
                )


def ours(case: Case, backend: str) -> Callable[[], None]:
    # A teacher builds its momentum once a step, so a number: that is part of what is timed.
    return lambda: jepa_kernels.ema_update_(
        case.targets, case.sources, MOMENTUM, copies=case.copies or None, backend=backend
    )


def baseline(case: Case, name: str) -> Callable[[], None]:
    def copied() -> None:
        if case.copies:
            torch._foreach_copy_(case.copies, case.targets)

    def mul_add() -> None:
        for target, source in zip(case.targets, case.sources, strict=True):
            target.mul_(MOMENTUM).add_(source, alpha=1 - MOMENTUM)
        copied()

    def foreach_mul_add() -> None:
        torch._foreach_mul_(case.targets, MOMENTUM)
        torch._foreach_add_(case.targets, case.sources, alpha=1 - MOMENTUM)
        copied()

    def foreach_lerp() -> None:
        # _foreach_lerp_ takes one dtype: a student of another is widened first.
        sources = [
            s if s.dtype == t.dtype else s.to(t.dtype)
            for s, t in zip(case.sources, case.targets, strict=True)
        ]
        torch._foreach_lerp_(case.targets, sources, 1 - MOMENTUM)
        copied()

    if name == "stream":
        left, right = (
            torch.zeros(sum(t.numel() for t in case.targets), device=case.targets[0].device)
            for _ in range(2)
        )
        return lambda: left.add_(right)
    return {"mul_add": mul_add, "foreach_mul_add": foreach_mul_add, "foreach_lerp": foreach_lerp}[
        name
    ]


def gate(case: Case, backend: str) -> Callable[[], None]:
    def check() -> None:
        targets = [t.clone() for t in case.targets]
        copies = [c.clone() for c in case.copies]
        jepa_kernels.ema_update_(
            targets, case.sources, MOMENTUM, copies=copies or None, backend=backend
        )
        for i in {0, 2, len(targets) - 1}:
            expected = (
                MOMENTUM * case.targets[i].double() + (1 - MOMENTUM) * case.sources[i].double()
            )
            harness.require_close(f"targets[{i}]", targets[i], expected, rtol=1e-6)
            if copies:
                harness.require_close(f"copies[{i}]", copies[i], expected, rtol=4e-3)

    return check


def comparisons(options: harness.Options) -> Iterator[harness.Comparison]:
    wanted = options.backends or OPS[OP].priority
    for case in cases(options):
        call = OPS[OP].prepare(case.targets, case.sources, MOMENTUM, copies=case.copies or None)
        for backend in wanted:
            if backend == "reference" or OPS[OP].reasons(backend, call):
                continue
            for name in BASELINES:
                if not options.wants(baseline=name, pass_name="update") or (
                    name == "stream" and case.dtype != "float32"
                ):
                    continue
                yield harness.Comparison(
                    case=case.name,
                    dtype=case.dtype,
                    pass_name="update",
                    backend=backend,
                    baseline=name,
                    candidate=ours(case, backend),
                    reference=baseline(case, name),
                    gate=gate(case, backend),
                    bytes=case.bytes(),
                    details={
                        "parameters": sum(t.numel() for t in case.targets),
                        "tensors": len(case.targets),
                    },
                )


if __name__ == "__main__":
    raise SystemExit(harness.main(OP, comparisons, __doc__))
