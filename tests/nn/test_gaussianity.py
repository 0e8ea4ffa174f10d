"""SIGReg as a module and the loss of LeJEPA: formulas, counted steps, refusals, and the lines of
docs/lejepa.md."""

from __future__ import annotations

import doctest
import re

import pytest
import torch

from jepa_kernels import random_directions, sliced_gaussianity
from jepa_kernels.nn import SlicedGaussianity, gaussianity, lejepa_loss
from jepa_kernels.testing import FLOAT32, FLOAT64
from jepa_kernels.testing.gaussianity import TRAINED_MOMENTS


def test_examples_run():
    assert doctest.testmod(gaussianity).failed == 0


def test_a_module_takes_new_directions_at_every_training_step():
    module, x = SlicedGaussianity(32, seed=3), torch.randn(50, 8)
    found = [module(x) for _ in range(3)]
    expected = [sliced_gaussianity(x, 32, seed=3, step=step) for step in range(3)]
    assert all(map(torch.equal, found, expected))
    assert module.step == 3
    module.eval()
    assert torch.equal(module(x), module(x))
    assert module.step == 3
    assert torch.equal(module(x, step=1), expected[1])
    other = SlicedGaussianity(32, seed=3)
    other.load_state_dict(module.state_dict())
    assert other.step == 3
    assert not list(module.parameters())


def test_sets_of_rows_are_averaged_over():
    views = torch.randn(2, 3, 20, 8)
    each = [sliced_gaussianity(x, 16, step=4) for x in views.flatten(0, 1)]
    torch.testing.assert_close(
        SlicedGaussianity(16)(views, step=4), torch.stack(each).mean(), **FLOAT32
    )


@pytest.mark.parametrize("global_views", [None, 1, 2])
def test_the_loss_is_the_formula(global_views):
    z = torch.randn(4, 10, 6, dtype=torch.float64, requires_grad=True)
    result = lejepa_loss(z, global_views=global_views, weight=0.2, directions=12, seed=5, step=7)
    columns = random_directions(6, 12, 5, 7, dtype=torch.float64)
    centre = z[: global_views or 4].mean(0)
    prediction = sum((view - centre).square().sum() for view in z) / z.numel()
    statistic = sum(sliced_gaussianity(view, columns, backend="reference") for view in z) / 4
    expected = 0.8 * prediction + 0.2 * statistic
    torch.testing.assert_close(result.loss, expected, **FLOAT64)
    torch.testing.assert_close(result.prediction, prediction, **FLOAT64)
    torch.testing.assert_close(result.gaussianity, statistic, **FLOAT64)
    found, wanted = (torch.autograd.grad(loss, z)[0] for loss in (result.loss, expected))
    torch.testing.assert_close(found, wanted, **FLOAT64)


def test_training_brings_projections_to_a_standard_normal_distribution():
    """Views agree and the covariance nears the identity, from projections that had collapsed."""
    z = torch.randn(2, 1, 4).repeat(1, 256, 1).add_(0.01 * torch.randn(2, 256, 4)).requires_grad_()
    optimizer = torch.optim.Adam([z], lr=0.1)
    for step in range(150):
        optimizer.zero_grad()
        lejepa_loss(z, weight=0.05, directions=32, step=step).loss.backward()
        optimizer.step()
    flat = z.detach().flatten(0, 1)
    assert (flat.T.cov() - torch.eye(4)).abs().max() < TRAINED_MOMENTS
    assert flat.mean(0).abs().max() < TRAINED_MOMENTS
    assert (z[0] - z[1]).square().mean() < 0.1


def test_errors_are_one_sentence():
    z = torch.randn(2, 5, 3)
    bad = [
        (lambda: lejepa_loss([z]), TypeError, "lejepa_loss: projections must be a tensor, got"),
        (lambda: lejepa_loss(z[0]), ValueError, "lejepa_loss: projections must have 3 dimensions"),
        (lambda: lejepa_loss(z, global_views=3), ValueError, "global_views must be from 1 to 2"),
        (lambda: lejepa_loss(z, weight=1.5), ValueError, "weight must be from 0 to 1, got 1.5."),
        (lambda: SlicedGaussianity(0)(z), ValueError, "slices must be at least 1, got 0."),
        (lambda: SlicedGaussianity(4)(z, step=-1), ValueError, "step must be at least 0, got -1."),
    ]
    for call, kind, text in bad:
        with pytest.raises(kind, match=re.escape(text)):
            call()


def recipes(root) -> list[str]:
    page = (root / "docs" / "lejepa.md").read_text()
    return re.findall(r"```python\n(.*?)```", page, re.DOTALL)


def test_the_lines_of_the_page_run(root):
    own, *rest = recipes(root)
    given = {"projections": torch.randn(8, 20, 16, requires_grad=True), "step": 3}
    exec(own, given)
    assert given["projections"].grad.isfinite().all()
    given = {"embeddings": torch.randn(20, 16)}
    exec(rest[-1], given)
    assert given["loss"].isfinite()
