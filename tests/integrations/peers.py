"""What the drop-in tests share: foreign packages, and the comparison of an accelerated model with
the untouched one."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import types
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from benchmarks.peers import provide_timm
from jepa_kernels import use_backend
from jepa_kernels.integrations import Report, accelerate
from jepa_kernels.testing import assert_within_budget
from tests.conftest import missing

DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def peer(package: str, module: str) -> types.ModuleType:
    """A module of a foreign package; without the package the test skips (in CI: fails)."""
    if importlib.util.find_spec(package) is None:
        missing(f"{package} is not installed (make dev installs it)")
    if package == "vjepa2":
        provide_timm()
    return importlib.import_module(module)


def randomised(model: nn.Module) -> nn.Module:
    """Every parameter random (biases, mask tokens and norms too), so that no gradient is zero by
    construction; eval mode."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            spread = 0.1 if parameter.ndim < 2 else parameter[0].numel() ** -0.5
            parameter.copy_(
                noise * spread + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
            )
    return model.eval()


def results(
    model: nn.Module, call: Callable[[nn.Module, Tensor], Tensor], x: Tensor
) -> dict[str, Tensor]:
    """The output and the gradient of the input and of every parameter, for a fixed random
    cotangent."""
    x = x.detach().clone().requires_grad_()
    out = call(model, x)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    leaves = {"input": x, **{name: p for name, p in model.named_parameters() if p.requires_grad}}
    grads = torch.autograd.grad(out, list(leaves.values()), cotangent, allow_unused=True)
    used = {name: grad for name, grad in zip(leaves, grads) if grad is not None}
    return {"out": out.detach(), **{f"grad {name}": grad for name, grad in used.items()}}


def check(
    model: nn.Module,
    call: Callable[[nn.Module, Tensor], Tensor],
    x: Tensor,
    dtype: torch.dtype,
    options: Sequence[str] = (),
) -> Report:
    """Holds an accelerated copy of `model` in `dtype` to the budgets, against the untouched one in
    float64 on the same rounded weights.

    In float64 the op runs on its reference, whose rotations are float64 too: the two models must
    agree to the last digits.
    """
    model = copy.deepcopy(model).to(dtype)
    draws = [x.to(dtype)]
    if dtype == torch.bfloat16:
        # Rounding errors of one input are one draw, whose size is the same luck for all gradients
        # of a stack of layers.
        draws += [
            torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
            for seed in range(3)
        ]
    oracle = _together(copy.deepcopy(model).double(), call, [x.double() for x in draws])
    untouched = _together(model, call, draws)
    report = accelerate(model, options=options)
    assert report.replaced
    with use_backend("reference" if dtype == torch.float64 else "auto"):
        actual = _together(model, call, draws)
    assert set(actual) == set(oracle) == set(untouched)
    assert sum(name.startswith("grad") for name in actual) > 4
    if dtype == torch.bfloat16:
        oracle, untouched, actual = (_by_layer(tensors) for tensors in (oracle, untouched, actual))
    for name, value in actual.items():
        assert_within_budget(
            name, value, oracle[name], untouched[name], gradient=name.startswith("grad")
        )
    return report


def _together(
    model: nn.Module, call: Callable[[nn.Module, Tensor], Tensor], inputs: Sequence[Tensor]
) -> dict[str, Tensor]:
    """The results of several inputs, stacked."""
    runs = [results(model, call, x) for x in inputs]
    return {name: torch.stack([run[name] for run in runs]) for name in runs[0]}


def _by_layer(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradients of a layer as one vector. Softmax ignores a bias of all keys: its gradient is
    rounding alone, and a budget of its own would hold noise against noise."""
    layers: dict[str, list[Tensor]] = {}
    for name, value in tensors.items():
        layers.setdefault(name.removesuffix(".weight").removesuffix(".bias"), []).append(
            value.flatten()
        )
    return {name: torch.cat(values) for name, values in layers.items()}


def steps_apart(
    model: nn.Module, call: Callable[[nn.Module, Tensor], Tensor], x: Tensor, steps: int = 10
) -> float:
    """The largest difference of losses between the untouched and the accelerated model over `steps`
    of AdamW, as a fraction."""
    other = copy.deepcopy(model)
    accelerate(other)
    losses = []
    for module in (model, other):
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, eps=1e-4)
        values = []
        for _ in range(steps):
            optimizer.zero_grad()
            loss = call(module, x).square().mean()
            loss.backward()
            optimizer.step()
            values.append(loss.detach().double())
        losses.append(torch.stack(values))
    assert losses[0][-1] < losses[0][0]
    return float(((losses[1] - losses[0]) / losses[0]).abs().max())
