"""Forward-mode AD and torch.func: right, or refused with a sentence; never a silent zero."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad

from jepa_kernels import (
    BackendUnsupportedError,
    ResidualMLP,
    latent_rollout,
    latent_rollout_loss,
    masked_attention,
    sliced_gaussianity,
    transforms,
    visible_patch_embed,
)
from jepa_kernels.backend import OPS
from jepa_kernels.testing import FLOAT32_DEEP

torch.manual_seed(0)
QUERY, KEY, VALUE = (torch.randn(1, 4, 1, 8) for _ in range(3))
STATES, TARGETS = torch.randn(5, 8), torch.randn(2, 5, 8)
CLIP, WEIGHT = torch.randn(2, 2, 2, 4, 4), torch.randn(3, 2, 1, 2, 2)
HEAD = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.GELU(), torch.nn.Linear(4, 8))


def attention(x, backend=None):
    return masked_attention(x, KEY, VALUE, backend=backend).square().sum()


def packed(x, backend=None):
    offsets = torch.tensor([0, 1, 4])
    return (
        masked_attention(x[0], KEY[0], VALUE[0], cu_seqlens_q=offsets, backend=backend)
        .square()
        .sum()
    )


def rollout(x, backend=None):
    cell = ResidualMLP.from_module(HEAD)
    return latent_rollout(x, cell, 2, backend=backend).square().sum()


def rollout_loss(x, backend=None):
    cell = ResidualMLP.from_module(HEAD)
    return latent_rollout_loss(x, cell, TARGETS, backend=backend)


def gaussianity(x, backend=None):
    return sliced_gaussianity(x, STATES.mT, backend=backend)


def embedding(x, backend=None):
    return visible_patch_embed(CLIP, x, ids=torch.tensor([2, 0]), backend=backend).square().sum()


CASES = {
    "attention": (attention, QUERY, "masked_attention"),
    "packed": (packed, QUERY, "masked_attention"),
    "rollout": (rollout, STATES, "rollout_mlp"),
    "rollout_loss": (rollout_loss, STATES, "rollout_mlp"),
    "gaussianity": (gaussianity, STATES, "sliced_gaussianity"),
    "embedding": (embedding, WEIGHT, "visible_patch_embed"),
}


def dual(function, x, tangent):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, tangent))).tangent


FORWARD = {
    "jvp": lambda f, x, v: torch.func.jvp(f, (x,), (v,))[1],
    "jacfwd": lambda f, x, v: (torch.func.jacfwd(f)(x) * v).sum(),
    "dual": dual,
    "compiled": lambda f, x, v: torch.compile(
        lambda a: torch.func.jvp(f, (a,), (v,))[1], backend="aot_eager"
    )(x),
}
REVERSE = {
    "grad": lambda f, x, v: (torch.func.grad(f)(x) * v).sum(),
    "vjp": lambda f, x, v: (torch.func.vjp(f, x)[1](torch.ones(()))[0] * v).sum(),
    "jacrev": lambda f, x, v: (torch.func.jacrev(f)(x) * v).sum(),
}


@pytest.mark.parametrize("transform", [*FORWARD, *REVERSE])
@pytest.mark.parametrize("case", CASES)
def test_derivatives_are_right_or_refused(case, transform):
    function, x, op = CASES[case]
    apply = (FORWARD | REVERSE)[transform]
    tangent = torch.randn_like(x)
    leaf = x.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(function(leaf, "reference"), leaf)
    wanted = (gradient * tangent).sum()
    assert wanted.abs() > 1e-3
    right, refused = [], {}
    backends = (None, "cpu") if transform == "compiled" else (None, *OPS[op].priority)
    for backend in backends:
        torch._dynamo.reset()
        try:
            got = apply(lambda a, backend=backend: function(a, backend), x, tangent)
        except BackendUnsupportedError as error:
            refused[backend] = str(error)
        else:
            torch.testing.assert_close(got, wanted, **FLOAT32_DEEP)
            right.append(backend)
    assert {None, *backends} - {"cpu", "triton", "flash", "cuda", "torch"} == {*right} - {"torch"}
    assert "needs backend=" in refused["cpu"] and "'reference'" in refused["cpu"]


def test_backward_is_not_touched():
    leaf = QUERY.clone().requires_grad_(True)
    attention(leaf, "cpu").backward()
    assert leaf.grad.abs().sum() > 0
    assert torch.vmap(lambda a: masked_attention(a, KEY, VALUE, backend="cpu"))(
        torch.stack([QUERY, QUERY])
    ).shape == (2, 1, 4, 1, 8)


def test_every_differentiable_op_says_who_knows_its_derivatives():
    with forward_ad.dual_level():
        for op in OPS.values():
            if op.signature.differentiable:
                assert transforms.obstacle(op.name, "cpu") is not None, op.name
                assert transforms.obstacle(op.name, "reference") is None, op.name
