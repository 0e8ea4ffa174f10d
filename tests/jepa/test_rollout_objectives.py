"""Objectives that roll a cell out (latent dynamics, Hamiltonian): against state space, double
backward and the published formula."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from jepa.objectives import Factorisation, compute_all
from jepa.published_behaviour import PublishedBehaviour
from jepa_kernels.testing import FLOAT32, FLOAT32_ROUNDED, FLOAT32_SHORT, FLOAT64
from tests.jepa.objective_cases import (
    all_weights,
    assert_same_loss_and_gradients,
    context_for,
    loop_mean,
    parsed,
    softmax_weights,
    value_of,
)
from tests.jepa.training_cases import LEVELS, WIDTH, ragged_masks, random_context


def weighted_mean_over_pairs(errors, masks, hard: bool) -> torch.Tensor:
    """Mean over steps, hard-region weights per sequence, mean over the pairs of a set, mean over
    sets: errors [horizon, P] in plain loops."""
    rows = errors.mean(0)
    sample = masks.pair_rows[:, 0] // masks.num_tokens
    means = []
    for j in range(masks.num_sets):
        own = []
        for b in range(masks.batch_size):
            found = rows[(masks.pair_set == j) & (sample == b)]
            own.append(found * len(found) * torch.softmax(found.detach(), 0) if hard else found)
        means.append(torch.cat(own).mean())
    return torch.stack(means).mean()


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("channels", ["all", "dynamics"])
@pytest.mark.parametrize("split", ["levels", "channels"])
@pytest.mark.parametrize("horizon", [1, 3])
def test_latent_dynamics_rolls_out_in_state_space(channels, split, horizon, hard):
    """Against z' = z + f(z), one step at a time, targets that carry a gradient included."""
    factorisation = Factorisation(split, 0.5)
    masks = ragged_masks(share=0.85, horizon=horizon)
    cfg = parsed("latent_dynamics", {"channels": channels, "horizon": horizon, "hard_region": hard})
    ctx = random_context(cfg, masks, factorisation=factorisation, online=True)
    head, errors = ctx.heads["latent_dynamics"], []
    start = state = ctx.context_tokens[masks.pairs[:, 0]]
    for k in range(1, horizon + 1):
        state = state + head(
            factorisation.dynamics(state, LEVELS) if channels == "dynamics" else state
        )
        change = ctx.target[masks.pair_rows[:, k]] - ctx.target[masks.pair_rows[:, 0]]
        errors.append(((state - start) - change).abs().mean(-1))
    expected = weighted_mean_over_pairs(torch.stack(errors), masks, hard)
    loss, metrics = compute_all(ctx, cfg, all_weights(cfg))
    assert_same_loss_and_gradients(
        loss, expected, [ctx.context_tokens, ctx.target, *head.parameters()]
    )
    assert_steps_are_metrics("latent_dynamics", metrics, errors, masks)


def assert_steps_are_metrics(name: str, metrics, errors, masks) -> None:
    steps = {k: v for k, v in metrics.items() if k.startswith(f"{name}/step_")}
    assert set(steps) == (
        {f"{name}/step_{k}" for k in range(1, len(errors) + 1)} if len(errors) > 1 else set()
    )
    for k, value in enumerate(errors, start=1):
        if steps:
            torch.testing.assert_close(
                steps[f"{name}/step_{k}"],
                weighted_mean_over_pairs(value.detach()[None], masks, hard=False),
            )


@pytest.mark.parametrize("split", ["levels", "channels"])
@pytest.mark.parametrize("share", [0.3, 0.5, 1.0])
def test_dynamics_ranges_are_the_dynamics_channels(split, share):
    factorisation = Factorisation(split, share)
    channels = torch.arange(float(WIDTH))
    ranges = factorisation.dynamics_ranges(WIDTH, LEVELS)
    assert torch.equal(
        torch.cat([channels[a:b] for a, b in ranges]), factorisation.dynamics(channels, LEVELS)
    )


@pytest.mark.parametrize(
    ("name", "hard"),
    [("latent_dynamics", False), ("latent_dynamics", True), ("hamiltonian", False)],
)
def test_one_step_is_the_published_formula(name, hard):
    """In float32, on features as a step makes them: the composition that the rollout kernel
    replaced, term by term."""
    cfg = parsed(name, {"hard_region": hard} if name == "latent_dynamics" else {})
    ctx = random_context(cfg, dtype=torch.float32)
    masks, head = ctx.masks, ctx.heads[name]
    before = ctx.context_tokens.index_select(0, masks.pairs[:, 0])
    now, after = (ctx.target.index_select(0, masks.pair_rows[:, k]) for k in (0, 1))
    if name == "latent_dynamics":
        error = (head(before) - (after - now)).abs().mean(-1)
    else:
        q, p = before.chunk(2, -1)
        q = q + 0.1 * slope(head, q, p, 1)
        p = p - 0.1 * slope(head, q, p, 0)
        h_q, h_p = after.chunk(2, -1)
        error = (q - h_q).abs().mean(-1) + (p - h_p).abs().mean(-1)
    expected = weighted_mean_over_pairs(error[None], masks, hard)
    loss, _ = compute_all(ctx, cfg, all_weights(cfg))
    leaves = [
        ctx.context_tokens,
        *(list(head.parameters())[:-1] if name == "hamiltonian" else head.parameters()),
    ]
    torch.testing.assert_close(loss, expected, **FLOAT32_SHORT)
    for got, wanted in zip(
        *(torch.autograd.grad(v, leaves) for v in (loss, expected)), strict=True
    ):
        torch.testing.assert_close(got, wanted, **FLOAT32)


@pytest.mark.parametrize("name", ["latent_dynamics", "hamiltonian"])
def test_rollouts_need_pairs_that_reach_as_far(name):
    ctx, cfg = context_for(name, {"horizon": 2}, masks=ragged_masks(horizon=1))
    with pytest.raises(ValueError, match=f"{name}: horizon must be at most that of the mask pairs"):
        compute_all(ctx, cfg, all_weights(cfg))


def test_hard_dynamics_per_sample_and_as_published():
    value, loop = value_of("latent_dynamics", {"hard_region": True})
    ctx, cfg = context_for("latent_dynamics", {"hard_region": True})
    head = ctx.heads["latent_dynamics"]

    def errors(found):
        return [
            np.abs(
                head(torch.from_numpy(loop.z[a])).detach().numpy() - (loop.h(b) - loop.h(a))
            ).mean()
            for a, b in found
        ]

    by_sample, pooled = {}, {}
    for j in range(loop.sets):
        by_sample[j] = []
        for b in range(loop.batch):
            own = errors(loop.pairs(j, b))
            by_sample[j] += list(softmax_weights(own) * own) if own else []
        every = errors(loop.pairs(j))
        pooled[j] = list(softmax_weights(every) * every)
    assert value == pytest.approx(loop_mean(by_sample), rel=FLOAT64["rtol"])
    compute_all(ctx, cfg, all_weights(cfg))[0].backward()
    assert all(p.grad.abs().max() > 0 for p in head.parameters())

    behaviour = PublishedBehaviour(dynamics_hard_pooled=True)
    published, _ = value_of("latent_dynamics", {"hard_region": True}, published_behaviour=behaviour)
    assert published == pytest.approx(loop_mean(pooled), rel=FLOAT64["rtol"])
    assert published != pytest.approx(value, rel=FLOAT32_ROUNDED["rtol"])
    behaviour = PublishedBehaviour(dynamics_hard_no_gradient=True)
    ctx, cfg = context_for("latent_dynamics", {"hard_region": True}, published_behaviour=behaviour)
    assert not compute_all(ctx, cfg, all_weights(cfg))[0].requires_grad


def slope(energy, q, p, wanted: int) -> torch.Tensor:
    """dG/dq (0) or dG/dp (1), differentiable."""
    state = torch.cat([q, p], -1)
    return torch.autograd.grad(energy(state).sum(), state, create_graph=True)[0].chunk(2, -1)[
        wanted
    ]


@pytest.mark.parametrize("exponent", [1.0, 2.0])
@pytest.mark.parametrize("horizon", [1, 3])
def test_hamiltonian_against_double_backward(horizon, exponent):
    masks = ragged_masks(share=0.85, horizon=horizon)
    cfg = parsed("hamiltonian", {"horizon": horizon})
    ctx = dataclasses.replace(random_context(cfg, masks, online=True), loss_exponent=exponent)
    energy, errors = ctx.heads["hamiltonian"], []
    q, p = ctx.context_tokens[masks.pairs[:, 0]].chunk(2, -1)
    for k in range(1, horizon + 1):
        q = q + 0.1 * slope(energy, q, p, 1)
        p = p - 0.1 * slope(energy, q, p, 0)
        h_q, h_p = ctx.target[masks.pair_rows[:, k]].chunk(2, -1)
        errors.append(
            sum(((x - h).abs() ** exponent / exponent).mean(-1) for x, h in ((q, h_q), (p, h_p)))
        )
    expected = weighted_mean_over_pairs(torch.stack(errors), masks, hard=False)
    loss, metrics = compute_all(ctx, cfg, all_weights(cfg))
    assert_same_loss_and_gradients(
        loss, expected, [ctx.context_tokens, ctx.target, *list(energy.parameters())[:-1]]
    )
    assert_steps_are_metrics("hamiltonian", metrics, errors, masks)
