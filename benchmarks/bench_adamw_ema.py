"""AdamWEMA's one pass against an optimizer and an average one after the other, as training code has
them today.

`adamw_default` is torch.optim.AdamW as constructed by default plus mul_ and add_ per tensor;
`adamw_foreach` and `adamw_fused` use torch's own fast paths plus _foreach_lerp_. Our side is the
whole of AdamWEMA.step with an EMATeacher, Python included. The floor is 36 bytes per float32
parameter over the bandwidth of an in-place read-read-write stream; `stream` is three passes of such
a stream over flat arrays as long as the list, which move 36 bytes: a ratio of 1 against it is the
floor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn

from benchmarks import harness, parameter_lists
from jepa_kernels.backend import OPS
from jepa_kernels.nn import EMATeacher
from jepa_kernels.optim import AdamWEMA
from jepa_kernels.support import example

OP = "adamw_ema"
MOMENTUM = 0.99925
BASELINES = ("adamw_default", "adamw_foreach", "adamw_fused", "stream")
OPTIONS = {"lr": 1e-4, "betas": (0.9, 0.999), "weight_decay": 0.04}


class Student(nn.Module):
    """Parameters with gradients, nothing else."""

    def __init__(self, encoder: str, device: str) -> None:
        super().__init__()
        self.weights = nn.ParameterList(
            nn.Parameter(t) for t in parameter_lists.draw(encoder, torch.float32, device)
        )

    def with_gradients(self) -> Student:
        for parameter in self.weights:
            parameter.grad = 0.01 * torch.randn_like(parameter)
        return self

    def groups(self) -> list[dict[str, object]]:
        matrices = [p for p in self.weights if p.dim() > 1]
        return [
            {"params": matrices},
            {"params": [p for p in self.weights if p.dim() == 1], "weight_decay": 0.0},
        ]


def ours(student: Student, backend: str) -> Callable[[], None]:
    return AdamWEMA(
        student.groups(), teacher=EMATeacher(student, MOMENTUM), backend=backend, **OPTIONS
    ).step


def baseline(student: Student, name: str) -> Callable[[], None]:
    if name == "stream":
        size = sum(p.numel() for p in student.weights)
        left, right = (torch.zeros(size, device=student.weights[0].device) for _ in range(2))

        def stream() -> None:
            for _ in range(3):
                left.add_(right)

        return stream
    how = {"adamw_default": {}, "adamw_foreach": {"foreach": True}, "adamw_fused": {"fused": True}}[
        name
    ]
    optimizer = torch.optim.AdamW(student.groups(), **OPTIONS, **how)
    sources = [p.detach() for p in student.weights]
    targets = [s.clone() for s in sources]

    def step() -> None:
        optimizer.step()
        if name == "adamw_default":
            for target, source in zip(targets, sources, strict=True):
                target.mul_(MOMENTUM).add_(source, alpha=1 - MOMENTUM)
        else:
            torch._foreach_lerp_(targets, sources, 1 - MOMENTUM)

    return step


def gate(encoder: str, device: str, backend: str) -> Callable[[], None]:
    """Three steps of both on the first parameters of the encoder."""

    def check() -> None:
        ours_, theirs = Student(encoder, device), Student(encoder, device)
        for student in (ours_, theirs):
            student.weights = nn.ParameterList(list(student.weights)[:6])
        theirs.load_state_dict(ours_.state_dict())
        teacher = EMATeacher(ours_, MOMENTUM)
        averages = [p.detach().double() for p in theirs.weights]
        pair = (
            AdamWEMA(ours_.groups(), teacher=teacher, backend=backend, **OPTIONS),
            torch.optim.AdamW(theirs.groups(), **OPTIONS),
        )
        for _ in range(3):
            ours_.with_gradients()
            for one, other in zip(ours_.weights, theirs.weights, strict=True):
                other.grad = one.grad.clone()
            for optimizer in pair:
                optimizer.step()
            averages = [
                MOMENTUM * a + (1 - MOMENTUM) * p.detach().double()
                for a, p in zip(averages, theirs.weights, strict=True)
            ]
        for i, (one, other) in enumerate(zip(ours_.weights, theirs.weights, strict=True)):
            harness.require_close(f"params[{i}]", one, other, rtol=1e-6)
            harness.require_close(
                f"targets[{i}]", teacher.module.weights[i], averages[i], rtol=1e-6
            )

    return check


def comparisons(options: harness.Options) -> Iterator[harness.Comparison]:
    op = OPS[OP]
    for encoder in ("vit_s",) if options.quick else tuple(parameter_lists.ENCODERS):
        if not options.wants(dtype="float32", pass_name="step"):
            continue
        for backend in options.backends or op.priority:
            if backend == "reference" or op.reasons(
                backend, example(op, torch.device(options.device).type, torch.float32)
            ):
                continue
            for name in BASELINES:
                if not options.wants(baseline=name):
                    continue
                student = Student(encoder, options.device).with_gradients()
                yield harness.Comparison(
                    case=encoder + parameter_lists.threads(),
                    dtype="float32",
                    pass_name="step",
                    backend=backend,
                    baseline=name,
                    candidate=ours(student, backend),
                    reference=baseline(student, name),
                    gate=gate(encoder, options.device, backend),
                    bytes=36.0 * parameter_lists.count(encoder),
                    details={
                        "parameters": parameter_lists.count(encoder),
                        "tensors": len(student.weights),
                    },
                )


if __name__ == "__main__":
    raise SystemExit(harness.main(OP, comparisons, __doc__))
