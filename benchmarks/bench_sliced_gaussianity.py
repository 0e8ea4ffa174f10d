"""sliced_gaussianity against what training code does today: every angle of every row, direction and
knot in one tensor.

`eager` is the published formula in eager PyTorch, directions given; `compiled_eager` the same
through torch.compile. `powers` keeps no such tensor: cosine and sine at all knots are powers of one
complex number, in eager PyTorch over whole projections. `products` are the two matrix products
alone, X A and the gradient's: a ratio of 1 against it is the floor. Only the features are
differentiated. `scratch_unit_bytes` in a record's details is one [N, S, K] tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks import harness
from jepa_kernels import random_directions, sliced_gaussianity
from jepa_kernels.backend import ANY_DEVICE, OPS, Inputs

OP = "sliced_gaussianity"
SLICES, POINTS, LARGEST = 1024, 17, 3.0
# (rows, channels)
SHAPES = ((512, 192), (512, 768), (1024, 384), (4096, 192), (4096, 768))
QUICK = ((256, 64),)
# torch.compile takes a minute for each: only where its case is usual.
COMPILED = {(512, 192), (1024, 384)}
# Statistic, gradient.
MAX_RELATIVE_ERROR = {"float32": (1e-4, 1e-4), "bfloat16": (3e-2, 6e-2), "float16": (5e-3, 2e-2)}
Call = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class Case:
    """One input."""

    name: str
    features: torch.Tensor
    directions: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.features.shape[0], self.features.shape[1]

    def supported(self) -> list[str]:
        """The backends with kernels of their own that take this call here."""
        op = OPS[OP]
        return [
            name
            for name in op.priority
            if op.backends[name].devices != ANY_DEVICE and not op.reasons(name, self.inputs)
        ]

    @property
    def inputs(self) -> Inputs:
        return OPS[OP].prepare(self.features, self.directions)

    @property
    def details(self) -> dict[str, object]:
        rows, channels = self.shape
        slices = self.directions.shape[1]
        return {
            "rows": rows,
            "channels": channels,
            "slices": slices,
            "points": POINTS,
            "size_class": self.inputs.size_class(),
            "scratch_unit_bytes": 4 * rows * slices * POINTS,
        }

    def flop(self, gradient: bool) -> float:
        """Of the products: X A, and the gradient's."""
        rows, channels = self.shape
        return 2.0 * rows * channels * self.directions.shape[1] * (2 if gradient else 1)


def cases(options: harness.Options) -> Iterator[tuple[str, Case]]:
    for dtype in options.dtypes or harness.default_dtypes(options.device):
        for rows, channels in QUICK if options.quick else SHAPES:
            torch.manual_seed(options.seed)
            kind = getattr(torch, dtype)
            features = (torch.randn(rows, channels, device=options.device) * 1.2 + 0.1).to(kind)
            directions = random_directions(
                channels, SLICES, options.seed, dtype=kind, device=options.device
            )
            yield dtype, Case(f"{rows}rows/D{channels}/S{SLICES}/K{POINTS}", features, directions)


def ours(case: Case, backend: str) -> Call:
    return lambda x: sliced_gaussianity(x, case.directions, backend=backend)


def eager(case: Case) -> Call:
    def call(x: torch.Tensor) -> torch.Tensor:
        time = torch.linspace(0, LARGEST, POINTS, device=x.device)
        normal = torch.exp(-time.square() / 2)
        weight = torch.full_like(time, 2 * LARGEST / (POINTS - 1))
        weight[[0, -1]] /= 2
        angle = (x @ case.directions).unsqueeze(-1) * time
        error = (angle.cos().mean(0) - normal).square() + angle.sin().mean(0).square()
        return (error @ (weight * normal)).mean() * x.shape[0]

    return call


def powers(case: Case) -> Call:
    def call(x: torch.Tensor) -> torch.Tensor:
        step = LARGEST / (POINTS - 1)
        angle = (x @ case.directions).float() * step
        first = torch.complex(angle.cos(), angle.sin())
        power, sums = first, [first.mean(0)]
        for _ in range(POINTS - 2):
            power = power * first
            sums.append(power.mean(0))
        mean = torch.stack(sums)
        time = step * torch.arange(1, POINTS, device=x.device)[:, None]
        normal = torch.exp(-time.square() / 2)
        weight = normal * 2 * step
        weight[-1] /= 2
        error = (mean.real - normal).square() + mean.imag.square()
        return (weight * error).sum(0).mean() * x.shape[0]

    return call


def products(case: Case) -> Call:
    return lambda x: (x @ case.directions).sum()


def baselines(case: Case, quick: bool) -> dict[str, Call]:
    found = {"eager": eager(case), "powers": powers(case), "products": products(case)}
    if case.shape in COMPILED and not quick:
        # every case compiles the same function, of which torch keeps eight versions
        torch.compiler.reset()
        found["compiled_eager"] = torch.compile(eager(case), dynamic=False)
    return found


def timed(case: Case, call: Call, pass_name: str) -> Callable[[], object]:
    if pass_name == "forward":

        def forward() -> torch.Tensor:
            with torch.no_grad():
                return call(case.features)

        return forward
    one = torch.ones((), device=case.features.device)
    return harness.forward_backward(call, [case.features], one.to(call(case.features).dtype))


def gate(case: Case, backend: str, dtype: str) -> None:
    """Statistic and gradient against float64."""

    def both(features: torch.Tensor, directions: torch.Tensor, name: str) -> list[torch.Tensor]:
        leaf = features.detach().requires_grad_()
        out = sliced_gaussianity(leaf, directions, backend=name)
        return [out.detach(), *torch.autograd.grad(out, leaf)]

    exact = both(case.features.double(), case.directions.double(), "torch")
    found = both(case.features, case.directions, backend)
    limits = MAX_RELATIVE_ERROR[dtype]
    for name, a, b, limit in zip(("statistic", "gradient"), found, exact, limits, strict=True):
        harness.require_close(name, a, b, rtol=limit)


def comparisons(options: harness.Options) -> Iterator[harness.Comparison]:
    for dtype, case in cases(options):
        rivals = baselines(case, options.quick)
        for backend in options.backends or (*case.supported(), "torch"):
            for pass_name in ("forward", "forward+backward"):
                for name, rival in rivals.items():
                    if options.wants(baseline=name, dtype=dtype, pass_name=pass_name):
                        yield harness.Comparison(
                            case=case.name,
                            dtype=dtype,
                            pass_name=pass_name,
                            backend=backend,
                            baseline=name,
                            candidate=timed(case, ours(case, backend), pass_name),
                            reference=timed(case, rival, pass_name),
                            gate=partial(gate, case, backend, dtype),
                            flop=case.flop(pass_name != "forward"),
                            details=case.details,
                        )


if __name__ == "__main__":
    raise SystemExit(harness.main(OP, comparisons, __doc__))
