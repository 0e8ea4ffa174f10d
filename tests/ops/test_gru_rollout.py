"""What only a GRU's rollout has: products with actions inside the backward kernel, and steps taken
a few at a time."""

from __future__ import annotations

import pytest
import torch

from jepa_kernels import native
from jepa_kernels.ops.latent_rollout import latent_rollout, latent_rollout_loss
from jepa_kernels.ops.latent_rollout.cells import with_parameters
from jepa_kernels.ops.latent_rollout.gru import rollout
from jepa_kernels.ops.latent_rollout.gru.native import Native
from jepa_kernels.ops.latent_rollout.gru.torch import Eager
from jepa_kernels.testing.rollout import check_rollout, rollout_case
from tests.conftest import missing
from tests.ops.backends import runnable


@pytest.fixture(params=runnable("rollout_gru"))
def backend(request) -> str:
    return request.param


@pytest.mark.parametrize("output", ("states", "last", 2.0))
def test_backward_in_pieces(backend, output, monkeypatch):
    """Long rollouts form their gate gradients a few steps at a time."""
    monkeypatch.setattr(rollout, "_chunks", lambda inputs, start: [(3, 5), (1, 3), (0, 1)])
    check_rollout(rollout_case("gru", output, horizon=5), backend)


@pytest.mark.parametrize("actions", (1, 6, 16, 17, 40))
@pytest.mark.parametrize("channels", (20, 32))
@pytest.mark.parametrize("isa", ("auto", "portable"))
def test_any_number_of_action_channels(actions, channels, isa, monkeypatch):
    """Below, at and above a block of the kernel's products, with and without an edge, on the first
    and on the last instruction set."""
    if not native.available():
        missing(str(native.reason()))
    if isa == "portable":
        monkeypatch.setattr(native, "isa", lambda: 0)
    check_rollout(
        rollout_case("gru", "states", action_channels=actions, channels=channels, rows=51), "cpu"
    )


def test_errors_without_gradients_keep_few_states(backend, monkeypatch):
    """Where nothing is saved, states are thrown away a few steps after they were needed; the errors
    are the same bits."""
    case = rollout_case("gru", 1.0, rows=16, horizon=9)
    asked = []
    kernels = {"cpu": Native, "torch": Eager}[backend]
    real = kernels.recurrence

    def counting(self, inputs, start, actions, *rest):
        asked.append(actions.shape[0])
        return real(self, inputs, start, actions, *rest)

    monkeypatch.setattr(kernels, "recurrence", counting)

    def errors() -> torch.Tensor:
        arguments = (
            case.states.float(),
            type(case.cell)(*(p.float() for p in case.cell.parameters())),
            case.targets.float(),
        )
        options = {
            "rows": case.rows,
            "actions": case.actions.float(),
            "target_rows": case.target_rows,
        }
        with torch.no_grad():
            return latent_rollout_loss(*arguments, **options, reduction="none", backend=backend)

    whole = errors()
    monkeypatch.setattr(rollout, "_steps_at_once", lambda inputs, bytes_per_row: 4)
    assert torch.equal(errors(), whole)
    assert asked == [9, 4, 4, 1]


def test_gates_past_the_caches_are_the_same():
    """From 16 MiB on, the gates that backward reads are written past the caches; a row is the same
    in a smaller batch."""
    if not native.available():
        missing(str(native.reason()))
    rows, horizon, width = 2100, 8, 64
    case = rollout_case("gru", "last", rows=rows, horizon=horizon, channels=width, gathered=False)
    assert 4 * horizon * rows * 4 * width >= 2**24 > 4 * horizon * 1000 * 4 * width
    cell = with_parameters(case.cell, [p.float() for p in case.cell.parameters()])

    def run(part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        states = case.states[part].float().requires_grad_()
        out = latent_rollout(
            states,
            cell,
            horizon,
            actions=case.actions[:, part].float(),
            output="last",
            backend="cpu",
        )
        (grad,) = torch.autograd.grad(out.square().sum(), states)
        return out.detach(), grad

    for together, alone in zip(run(slice(None)), run(slice(48, 1000)), strict=True):
        assert torch.equal(together[48:1000], alone)
