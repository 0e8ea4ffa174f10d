"""eb_jepa's GRU predictor and unroll as rollouts, against a plain nn.GRU and LayerNorm of the same
state dict, and against the real code."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
from torch import nn

from jepa_kernels import use_backend
from jepa_kernels.integrations import accelerate, patch, restore
from jepa_kernels.integrations.eb_jepa import planning_unroll
from jepa_kernels.testing import FLOAT32, FLOAT32_DEEP, assert_within_budget

DTYPES = (torch.float64, torch.float32, torch.bfloat16)
D, A, STEPS, BATCH = 24, 3, 5, 4


class RNNPredictor(nn.Module):
    """One step of a GRU, then a LayerNorm, with the names of eb_jepa's parameters."""

    def __init__(
        self,
        hidden_size: int = D,
        action_dim: int = A,
        num_layers: int = 1,
        final_ln: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.rnn = nn.GRU(action_dim, hidden_size, num_layers)
        self.final_ln = final_ln
        self.is_rnn, self.context_length = True, 0

    def forward(self, state, action):
        out, _ = self.rnn(action[:, :, 0][None], state.flatten(1)[None])
        return self.final_ln(out)[0][:, :, None, None, None]


class JEPA(nn.Module):
    """Its autoregressive unroll, step by step."""

    def __init__(self, encoder, aencoder, predictor, regularizer, predcost) -> None:
        super().__init__()
        self.encoder, self.action_encoder, self.predictor = encoder, aencoder, predictor
        self.regularizer, self.predcost = regularizer, predcost

    def unroll(
        self,
        observations,
        actions,
        nsteps=1,
        unroll_mode="parallel",
        ctxt_window_time=1,
        compute_loss=True,
        return_all_steps=False,
    ):
        assert unroll_mode == "autoregressive"
        state, encoded = self.encoder(observations), self.action_encoder(actions)
        states, cost = [state[:, :, :1]], 0.0
        regularised = self.regularizer(state, actions) if compute_loss else None
        for i in range(nsteps):
            states.append(self.predictor(states[-1], encoded[:, :, i : i + 1]))
            if compute_loss:
                cost = cost + self.predcost(states[-1], state[:, :, i + 1 : i + 2]) / nsteps
        losses = (regularised[0] + cost, *regularised, cost) if compute_loss else None
        if return_all_steps:
            return [torch.cat(states[: i + 2], 2) for i in range(nsteps)], losses
        return torch.cat(states, 2), losses


RNNPredictor.__module__, JEPA.__module__ = "eb_jepa.architectures", "eb_jepa.jepa"


class Encoder(nn.Module):
    """Frames ``[B, C, T, H, W]`` to states ``[B, D, T, 1, 1]``; remembers how many samples it
    saw."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(6, D)
        self.seen = 0

    def forward(self, x):
        self.seen = x.shape[0]
        return self.project(x.flatten(3).transpose(1, 2).flatten(2)).transpose(1, 2)[
            ..., None, None
        ]


class Regularizer(nn.Module):
    def forward(self, state, actions):
        spread = state.square().mean()
        return 2 * spread, spread, {"spread": spread.detach()}


def build(jepa=JEPA, predictor=RNNPredictor, dtype=torch.float32) -> nn.Module:
    torch.manual_seed(0)
    norm = nn.LayerNorm(D)
    with torch.no_grad():
        norm.weight.add_(torch.randn(D) * 0.2)
        norm.bias.add_(torch.randn(D) * 0.2)
    return jepa(
        Encoder(), nn.Identity(), predictor(D, A, final_ln=norm), Regularizer(), nn.MSELoss()
    ).to(dtype)


def inputs(dtype=torch.float32, batch=BATCH, frames=STEPS + 1):
    torch.manual_seed(1)
    return torch.randn(batch, 2, frames, 1, 3).to(dtype), torch.randn(batch, A, STEPS).to(dtype)


def results(model, dtype) -> dict[str, torch.Tensor]:
    """The states, the loss and every gradient of a training unroll."""
    x, actions = inputs(torch.float32)
    x, actions = (
        x.to(torch.bfloat16).to(dtype).requires_grad_(),
        actions.to(torch.bfloat16).to(dtype).requires_grad_(),
    )
    states, losses = model.unroll(x, actions, nsteps=STEPS, unroll_mode="autoregressive")
    leaves = {"input": x, "actions": actions, **dict(model.named_parameters())}
    grads = torch.autograd.grad(losses[0] + states.square().mean(), list(leaves.values()))
    return {
        "states": states.detach(),
        "loss": losses[0].detach(),
        **{f"grad {n}": g for n, g in zip(leaves, grads, strict=True)},
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_training_unroll(dtype):
    model = build(dtype=torch.bfloat16).to(dtype)  # the same rounded weights in every dtype
    oracle, untouched = results(copy.deepcopy(model).double(), torch.float64), results(model, dtype)
    keys = list(model.state_dict())
    report = accelerate(model)
    assert report.replaced == {"eb_jepa": ["", "predictor"]}
    assert list(model.state_dict()) == keys
    with use_backend("reference" if dtype == torch.float64 else "auto"):
        actual = results(model, dtype)
    assert len(actual) == 12
    for name, value in actual.items():
        assert_within_budget(
            name, value, oracle[name], untouched[name], gradient=name.startswith("grad")
        )


def test_every_step_and_inference():
    model, (x, actions) = build(), inputs()
    wanted, _ = model.unroll(
        x[:, :, :1],
        actions,
        nsteps=STEPS,
        unroll_mode="autoregressive",
        compute_loss=False,
        return_all_steps=True,
    )
    accelerate(model)
    steps, losses = model.unroll(
        x[:, :, :1],
        actions,
        nsteps=STEPS,
        unroll_mode="autoregressive",
        compute_loss=False,
        return_all_steps=True,
    )
    assert losses is None
    assert [s.shape for s in steps] == [s.shape for s in wanted]
    torch.testing.assert_close(steps[-1], wanted[-1], **FLOAT32_DEEP)
    none, _ = model.unroll(x, actions, nsteps=0, unroll_mode="autoregressive", compute_loss=False)
    assert none.shape == (BATCH, D, 1, 1, 1)


def test_the_predictor_alone():
    predictor, (_, actions) = build().predictor, inputs()
    state = torch.randn(BATCH, D, 1, 1, 1)
    wanted = predictor(state, actions[:, :, :1])
    accelerate(predictor)
    torch.testing.assert_close(predictor(state, actions[:, :, :1]), wanted, **FLOAT32_DEEP)
    assert restore(predictor) == 1
    assert torch.equal(predictor(state, actions[:, :, :1]), wanted)


def test_restore_and_copies():
    model, (x, actions) = build(), inputs()
    call = {"nsteps": STEPS, "unroll_mode": "autoregressive"}
    wanted, _ = model.unroll(x, actions, **call)
    accelerate(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.predictor.rnn.weight_hh_l0.zero_()
    assert not torch.allclose(other.unroll(x, actions, **call)[0], wanted)
    torch.testing.assert_close(model.unroll(x, actions, **call)[0], wanted, **FLOAT32_DEEP)
    assert restore(model) == 2
    assert torch.equal(model.unroll(x, actions, **call)[0], wanted)


def test_planning_encodes_one_observation():
    model, (x, _) = build().eval(), inputs(batch=1, frames=1)
    actions = torch.randn(7, A, STEPS)
    wanted, _ = model.unroll(
        x.repeat(7, 1, 1, 1, 1),
        actions,
        nsteps=STEPS,
        unroll_mode="autoregressive",
        compute_loss=False,
    )
    with torch.no_grad():
        states = planning_unroll(model)(x, actions)
    assert model.encoder.seen == 1
    torch.testing.assert_close(states, wanted, **FLOAT32_DEEP)


def test_a_subclass_with_its_own_unroll_keeps_it():
    class Other(JEPA):
        def unroll(self, *args, **kwargs):
            return "own"

    model = build(Other)
    assert accelerate(model).replaced == {"eb_jepa": ["predictor"]}
    assert model.unroll() == "own"


def test_what_is_left_and_refused():
    two = build(predictor=lambda d, a, final_ln: RNNPredictor(d, a, 2, final_ln))
    report = accelerate(two)
    assert not report.replaced
    assert set(report.left) == {"", "predictor"}
    assert report.left["predictor"][0].startswith(
        "rnn must be one layer in one direction with the batch second, got GRU("
    )
    with pytest.raises(ValueError, match="rnn must be one layer"):
        planning_unroll(two)
    conv = build(predictor=lambda d, a, final_ln: nn.Conv3d(d, d, 1))
    assert accelerate(conv).left == {
        "": ["predictor must be an RNNPredictor for its unroll to be one rollout, got Conv3d"]
    }
    model, (x, actions) = build(), inputs()
    accelerate(model)
    with pytest.raises(
        ValueError,
        match="unroll: unroll_mode must be 'autoregressive' for a GRU predictor, got 'parallel'",
    ):
        model.unroll(x, actions)
    with pytest.raises(
        ValueError, match=f"unroll: actions must hold at least {STEPS + 1} steps, got {STEPS}."
    ):
        model.unroll(x, actions, nsteps=STEPS + 1, unroll_mode="autoregressive")


def _real(module: str):
    """A module of the real code base, which no package index holds under this name: cloned, on the
    path, with its dependencies."""
    try:
        return importlib.import_module(f"eb_jepa.{module}")
    except ModuleNotFoundError as error:
        pytest.skip(f"needs a checkout of facebookresearch/eb_jepa on PYTHONPATH; {error}")


def test_the_real_code():
    real = build(_real("jepa").JEPA, _real("architectures").RNNPredictor)
    ours = build()
    ours.load_state_dict(real.state_dict())
    untouched = results(real, torch.float32)
    for name, value in results(ours, torch.float32).items():
        torch.testing.assert_close(value, untouched[name], **FLOAT32)
    assert accelerate(real).replaced == {"eb_jepa": ["", "predictor"]}
    for name, value in results(real, torch.float32).items():
        torch.testing.assert_close(value, untouched[name], **FLOAT32_DEEP)
    x, actions = inputs()
    again = build(_real("jepa").JEPA, _real("architectures").RNNPredictor)
    plain, _ = again.unroll(x, actions, nsteps=STEPS, unroll_mode="autoregressive")
    with patch("eb_jepa") as names:
        fused, _ = again.unroll(x, actions, nsteps=STEPS, unroll_mode="autoregressive")
    assert sorted(names) == ["eb_jepa.architectures:RNNPredictor", "eb_jepa.jepa:JEPA"]
    torch.testing.assert_close(fused, plain, **FLOAT32_DEEP)
