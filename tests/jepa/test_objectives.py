"""Objectives: a contract that every file must keep, and formulas against plain float64 loops on
ragged masks."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

import jepa_kernels
from jepa import objectives
from jepa.batch import MaskBatch
from jepa.config import ConfigError
from jepa.objectives import (
    Denominators,
    Factorisation,
    FeatureDims,
    build_heads,
    compute_all,
    get,
    parse_objectives,
)
from jepa.objectives.base import segment_softmax_weights
from jepa.objectives.orthogonality import mean_square_covariance
from jepa_kernels.testing import DERIVED, FLOAT32_ROUNDED, FLOAT64, FLOAT64_SHORT, GRADCHECK
from tests.jepa.objective_cases import (
    Loop,
    all_weights,
    assert_same_loss_and_gradients,
    context_for,
    loop_mean,
    parsed,
    softmax_weights,
    value_of,
)
from tests.jepa.training_cases import GRID, LEVELS, WIDTH, ragged_masks, random_context

# Options other than the defaults that are worth the whole contract.
CASES = [(name, {}) for name in objectives.names()] + [
    ("latent_dynamics", {"hard_region": True}),
    ("latent_dynamics", {"channels": "dynamics", "horizon": 2}),
    ("latent_dynamics", {"hard_region": True, "horizon": 2}),
    ("hamiltonian", {"horizon": 2}),
    ("action", {"channels": "dynamics"}),
    ("kinematic", {"kind": "huber"}),
    ("kinematic", {"kind": "acceleration", "channel_share": 0.5}),
    ("sigreg", {"slices": 8, "points": 5}),
    ("sigreg", {"slices": 8, "points": 2, "scope": "global"}),
    ("orthogonality", {"scope": "global"}),
    ("context", {"weight_by_distance": False}),
]


def identify(case) -> str:
    return "-".join([case[0], *(f"{k}={v}" for k, v in case[1].items())])


def inputs_of(ctx) -> dict[str, torch.Tensor]:
    named = {
        k: getattr(ctx, k)
        for k in ("context_tokens", "predicted_tokens", "predicted_context", "target")
    }
    return {k: v for k, v in named.items() if v.requires_grad}


@pytest.mark.parametrize("case", CASES, ids=map(identify, CASES))
def test_finite_and_differentiable(case):
    ctx, cfg = context_for(*case)
    loss, metrics = compute_all(ctx, cfg, all_weights(cfg))
    assert loss.shape == ()
    assert torch.isfinite(loss)
    assert loss > 0
    assert all(
        isinstance(value, torch.Tensor) and not value.requires_grad for value in metrics.values()
    )
    assert torch.equal(metrics[case[0]], loss.detach())
    loss.backward()
    gradients = [
        t.grad for t in (*inputs_of(ctx).values(), *ctx.heads.parameters()) if t.grad is not None
    ]
    assert gradients
    assert all(torch.isfinite(g).all() for g in gradients)
    assert any(g.abs().max() > 0 for g in gradients)


# Hard-region weights are constants by definition, and differences would move them; 1024 slices of
# SIGReg would take a minute.
DIFFERENTIABLE = [
    case
    for case in CASES
    if case[0] != "hard_region" and "hard_region" not in case[1] and case != ("sigreg", {})
]


@pytest.mark.parametrize("case", DIFFERENTIABLE, ids=map(identify, DIFFERENTIABLE))
def test_gradients_match_differences(case):
    ctx, cfg = context_for(
        *case, masks=ragged_masks((4, 1, 2), 2, horizon=case[1].get("horizon", 1), share=0.7)
    )
    named = inputs_of(ctx)
    heads = list(ctx.heads.parameters())

    def loss(*values):
        own = dataclasses.replace(ctx, **dict(zip(named, values[: len(named)], strict=True)))
        if "target" in named:
            own = dataclasses.replace(own, target_live=own.target)
        return compute_all(own, cfg, all_weights(cfg))[0]

    assert gradcheck(loss, (*named.values(), *heads), **GRADCHECK)


@pytest.mark.parametrize("name", objectives.names())
def test_weight_zero_is_absent(name, monkeypatch):
    ctx, cfg = context_for(name, {})

    def never(*_):
        raise AssertionError("computed at weight 0")

    monkeypatch.setattr(get(name), "compute", never)
    loss, metrics = compute_all(ctx, cfg, all_weights(cfg, 0.0))
    assert loss == 0
    assert metrics == {}
    assert (
        len(
            build_heads(
                parse_objectives({name: {"weight": 0.0}}, ""),
                FeatureDims(WIDTH, LEVELS, Factorisation()),
            )
        )
        == 0
    )


def test_shape_mismatch_raises():
    ctx, _ = context_for("delta", {})
    with pytest.raises(ValueError, match=r"ObjectiveContext: context_tokens must have shape"):
        dataclasses.replace(ctx, context_tokens=ctx.context_tokens[1:])
    with pytest.raises(ValueError, match="levels must divide"):
        dataclasses.replace(ctx, levels=5)


def test_a_misspelt_name_lists_the_nearest():
    with pytest.raises(
        ConfigError, match="unknown objective 'latent_dynamic'; did you mean 'latent_dynamics'"
    ):
        parse_objectives({"latent_dynamic": {}}, "objectives")
    with pytest.raises(
        ConfigError, match=r"unknown key 'objectives.delta.wieght'; did you mean 'weight'"
    ):
        parse_objectives({"delta": {"wieght": 1}}, "objectives")


@pytest.mark.parametrize("case", CASES, ids=map(identify, CASES))
def test_batch_order_does_not_matter(case):
    masks = ragged_masks(horizon=case[1].get("horizon", 1))
    ctx, cfg = context_for(*case, masks=masks)
    other, _ = context_for(*case, masks=reordered_masks(masks, [2, 0, 1]))
    rows = torch.cat([torch.arange(masks.num_tokens) + b * masks.num_tokens for b in (2, 0, 1)])
    context_rows, target_rows = (
        reordered_rows(cu, 2, [2, 0, 1]) for cu in (masks.context_cu, masks.target_cu)
    )
    target = ctx.target.detach()[rows]
    other = dataclasses.replace(
        other,
        context_tokens=ctx.context_tokens[context_rows],
        predicted_context=ctx.predicted_context[context_rows],
        predicted_tokens=ctx.predicted_tokens[target_rows],
        target=target,
        target_live=target,
        clips=ctx.clips[[2, 0, 1]],
    )
    torch.testing.assert_close(
        compute_all(other, cfg, all_weights(cfg))[0], compute_all(ctx, cfg, all_weights(cfg))[0]
    )


def sequences(ids, cu) -> list[np.ndarray]:
    return [part.numpy() for part in ids.tensor_split(cu[1:-1].long())]


def reordered_masks(masks: MaskBatch, order: list[int]) -> MaskBatch:
    size = masks.batch_size
    context, target = (
        sequences(masks.context_ids, masks.context_cu),
        sequences(masks.target_ids, masks.target_cu),
    )
    pick = [[j * size + b for b in order] for j in range(masks.num_sets)]
    return MaskBatch.from_ids(
        [[context[s] for s in row] for row in pick],
        [[target[s] for s in row] for row in pick],
        masks.grid,
        masks.horizon,
    )


def reordered_rows(cu, num_sets: int, order: list[int]) -> torch.Tensor:
    rows = torch.arange(int(cu[-1])).tensor_split(cu[1:-1].long())
    return torch.cat([rows[j * len(order) + b] for j in range(num_sets) for b in order])


PARTED = [case for case in CASES if case[0] not in ("orthogonality", "sigreg")]


@pytest.mark.parametrize("case", PARTED, ids=map(identify, PARTED))
def test_parts_add_up_to_the_whole(case):
    """Ragged halves of a batch, each a share of the global mean: the sum of losses and gradients is
    that of the whole."""
    masks = ragged_masks(batch_size=4, horizon=case[1].get("horizon", 1))
    ctx, cfg = context_for(*case, masks=masks)
    whole, _ = compute_all(ctx, cfg, all_weights(cfg))
    leaves = [*inputs_of(ctx).values(), *ctx.heads.parameters()]
    expected = torch.autograd.grad(whole, leaves, allow_unused=True)
    total = torch.zeros((), dtype=torch.float64)
    for part in ([0], [1, 2, 3]):
        own = reordered_masks(masks, part)
        rows = torch.cat([torch.arange(masks.num_tokens) + b * masks.num_tokens for b in part])
        context_rows, target_rows = (
            part_rows(cu, masks, part) for cu in (masks.context_cu, masks.target_cu)
        )
        half = dataclasses.replace(
            ctx,
            masks=own,
            denominators=dataclasses.replace(Denominators.of(masks), parts=2),
            context_tokens=ctx.context_tokens[context_rows],
            predicted_context=ctx.predicted_context[context_rows],
            predicted_tokens=ctx.predicted_tokens[target_rows],
            target=ctx.target[rows],
            target_live=ctx.target_live[rows],
            clips=ctx.clips[part],
        )
        total = total + compute_all(half, cfg, all_weights(cfg))[0]
    torch.testing.assert_close(total, whole)
    for got, wanted in zip(
        torch.autograd.grad(total, leaves, allow_unused=True), expected, strict=True
    ):
        torch.testing.assert_close(got, wanted)


def part_rows(cu, masks: MaskBatch, part: list[int]) -> torch.Tensor:
    rows = torch.arange(int(cu[-1])).tensor_split(cu[1:-1].long())
    return torch.cat([rows[j * masks.batch_size + b] for j in range(masks.num_sets) for b in part])


def test_images_skip_what_needs_time():
    cfg = parse_objectives(
        {name: {"schedule": {"kind": "constant"}} for name in objectives.names()}, ""
    )
    ctx = random_context(cfg, ragged_masks((1, 4, 5)), online=True)
    loss, metrics = compute_all(ctx, cfg, all_weights(cfg))
    assert torch.isfinite(loss)
    temporal = {name for name in objectives.names() if cfg[name].minimum_frames > 1}
    assert temporal == {
        "delta",
        "static",
        "latent_dynamics",
        "spectral",
        "ltc",
        "action",
        "kinematic",
        "velgate",
        "hamiltonian",
    }
    for name in temporal:
        assert metrics[f"{name}/skipped"] == 1
        assert name not in metrics
    for name in set(objectives.names()) - temporal:
        assert metrics[name] > 0


def test_prediction_and_context_loops():
    value, loop = value_of("prediction", {})
    rows = {
        j: [np.abs(loop.p[k] - loop.h(k)).mean() for k in loop.of_set(loop.p, j)]
        for j in range(loop.sets)
    }
    assert value == pytest.approx(loop_mean(rows), rel=FLOAT64_SHORT["rtol"])
    value, loop = value_of("context", {})
    _, height, width = GRID

    def distance(key: tuple) -> float:
        place = np.array(np.unravel_index(key[2], GRID))
        others = [
            np.array(np.unravel_index(k[2], GRID)) for k in loop.of_set(loop.p, key[0], key[1])
        ]
        return math.sqrt(min(np.linalg.norm(place - other) for other in others))

    rows = {
        j: [np.abs(loop.c[k] - loop.h(k)).mean() / distance(k) for k in loop.of_set(loop.c, j)]
        for j in range(loop.sets)
    }
    # The distances are float32.
    assert value == pytest.approx(loop_mean(rows), rel=FLOAT32_ROUNDED["rtol"])


def test_hard_region_loop():
    value, loop = value_of("hard_region", {"temperature": 0.3})
    rows: dict[int, list[float]] = {j: [] for j in range(loop.sets)}
    for j in range(loop.sets):
        for b in range(loop.batch):
            errors = [np.abs(loop.p[k] - loop.h(k)).mean() for k in loop.of_set(loop.p, j, b)]
            rows[j] += list(softmax_weights(errors, 0.3) * errors)
    assert value == pytest.approx(loop_mean(rows), rel=FLOAT64_SHORT["rtol"])


def test_pair_losses_loop():
    value, loop = value_of("delta", {})
    expected = loop.mean_over_pairs(
        lambda a, b: np.abs((loop.z[b] - loop.z[a]) - (loop.h(b) - loop.h(a))).mean()
    )
    assert value == pytest.approx(expected, rel=FLOAT64_SHORT["rtol"])
    value, loop = value_of("static", {})
    assert value == pytest.approx(
        loop.mean_over_pairs(lambda a, b: np.abs(loop.z[b] - loop.z[a])[: WIDTH // 2].mean()),
        rel=FLOAT64_SHORT["rtol"],
    )
    value, loop = value_of("ltc", {"margin": 0.7})

    def cosine(x, y):
        return x @ y / np.linalg.norm(x) / np.linalg.norm(y)

    expected = loop.mean_over_pairs(
        lambda a, b: max(0.0, 0.7 - cosine(loop.z[a], loop.h(a)) + cosine(loop.z[a], loop.h(b)))
    )
    assert value == pytest.approx(expected, rel=FLOAT64["rtol"])


def test_velocity_gate_loop():
    value, loop = value_of("velgate", {"percentile": 0.3})
    speed = np.linalg.norm(
        np.diff(loop.target.reshape(loop.batch, GRID[0], loop.sites, -1), axis=1), axis=-1
    )
    threshold = np.quantile(speed, 0.3, axis=-1)

    def row(first: tuple, second: tuple) -> float:
        step, site = divmod(first[2], loop.sites)
        kept = speed[first[1], step, site] <= threshold[first[1], step]
        return float(kept) * np.abs(loop.z[second] - loop.z[first]).mean()

    assert value == pytest.approx(loop.mean_over_pairs(row), rel=FLOAT64_SHORT["rtol"])


def test_spectral_loop():
    masks = ragged_masks(share=0.9)
    assert masks.columns.shape[0] > 4
    value, loop = value_of("spectral", {}, masks=masks)
    gain = np.linspace(0.1, 1, GRID[0] // 2 + 1)[:, None]
    rows: dict[int, list[float]] = {j: [] for j in range(loop.sets)}
    for j in range(loop.sets):
        for b in range(loop.batch):
            for site in range(loop.sites):
                keys = [(j, b, t * loop.sites + site) for t in range(GRID[0])]
                if all(key in loop.z for key in keys):
                    z, h = (
                        np.fft.rfft(np.stack([f(key) for key in keys]), axis=0)
                        for f in (loop.z.get, loop.h)
                    )
                    rows[j].append((gain * np.abs(z - h)).mean())
    assert value == pytest.approx(loop_mean(rows), rel=FLOAT64_SHORT["rtol"])


@pytest.mark.parametrize("split", ["levels", "channels"])
def test_orthogonality_loop(split):
    value, loop = value_of("orthogonality", {}, factorisation=Factorisation(split, 0.5))
    per_level = WIDTH // LEVELS
    chosen = (
        np.arange(WIDTH) < WIDTH // 2
        if split == "levels"
        else np.arange(WIDTH) % per_level < per_level // 2
    )
    total = []
    for j in range(loop.sets):
        x = np.stack([loop.z[k] for k in loop.of_set(loop.z, j)])
        x = x - x.mean(0)
        total.append(((x[:, chosen].T @ x[:, ~chosen] / (len(x) - 1)) ** 2).mean())
    assert value == pytest.approx(np.mean(total), rel=FLOAT64["rtol"])


@pytest.mark.parametrize("rows", [2, 3, 40])
def test_covariance_of_few_and_of_many_rows(rows):
    """Few rows take the product of Gram matrices instead of the covariance: the same number and
    gradients, means far from 0 included."""
    generator = torch.Generator().manual_seed(rows)
    leaves = [
        (torch.randn(rows, width, generator=generator, dtype=torch.float64) + 9.0).requires_grad_()
        for width in (5, 7)
    ]
    centred = [leaf - leaf.mean(0) for leaf in leaves]
    expected = (centred[0].t() @ centred[1] / (rows - 1)).square().mean()
    assert_same_loss_and_gradients(mean_square_covariance(*leaves), expected, leaves)


def test_action_loop():
    ctx, cfg = context_for("action", {})
    loop = Loop(ctx)
    colour = ctx.clips.view(3, 3, 4, 3, 2, 5, 2).mean((4, 6)).flatten(2).transpose(1, 2).numpy()
    head = ctx.heads["action"]

    def row(first: tuple, second: tuple) -> float:
        moved = head(torch.from_numpy(loop.z[first])).detach().numpy()
        return np.abs(moved - (colour[second[1], second[2]] - colour[first[1], first[2]])).mean()

    assert float(compute_all(ctx, cfg, all_weights(cfg))[0].detach()) == pytest.approx(
        loop.mean_over_pairs(row), rel=FLOAT64_SHORT["rtol"]
    )


def test_sigreg_against_the_plain_formula():
    u = torch.randn(37, 6, dtype=torch.float64, requires_grad=True)
    t = torch.linspace(0, 3, 17, dtype=torch.float64)
    phi = torch.exp(-t * t / 2)
    weight = phi * 2 * 3 / 16
    weight[[0, -1]] *= 0.5
    angle = u[..., None] * t
    statistic = 37 * (weight * ((angle.cos().mean(0) - phi) ** 2 + angle.sin().mean(0) ** 2)).sum(
        -1
    )
    expected = statistic.mean()
    actual = jepa_kernels.sliced_gaussianity(u, torch.eye(6, dtype=torch.float64))
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(*(torch.autograd.grad(v, u)[0] for v in (actual, expected)))
    axes = torch.eye(4, dtype=torch.float64)
    normal = jepa_kernels.sliced_gaussianity(torch.randn(20_000, 4, dtype=torch.float64), axes)
    assert normal < 0.1 * jepa_kernels.sliced_gaussianity(
        torch.rand(20_000, 4, dtype=torch.float64), axes
    )


def _global_share(rank: int, folder: str) -> None:
    """What one of two ranks computes on its half of a batch; saved for the parent to compare."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    cfg = parse_objectives(
        {
            "sigreg": {"slices": 8, "scope": "global"},
            "orthogonality": {"weight": 1.0, "scope": "global"},
        },
        "",
    )
    masks = ragged_masks(batch_size=4)
    whole = random_context(cfg, masks)
    part = [[0], [1, 2, 3]][rank]
    tokens = whole.context_tokens.detach()[
        part_rows(masks.context_cu, masks, part)
    ].requires_grad_()
    own = reordered_masks(masks, part)
    ctx = dataclasses.replace(
        random_context(cfg, own),
        context_tokens=tokens,
        denominators=dataclasses.replace(Denominators.of(masks), parts=2),
    )
    loss, _ = compute_all(ctx, cfg, all_weights(cfg))
    loss.backward()
    torch.save({"loss": loss.detach(), "grad": tokens.grad}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_global_statistics_of_two_ranks_are_those_of_the_whole_batch(tmp_path):
    torch.multiprocessing.spawn(_global_share, args=(str(tmp_path),), nprocs=2)
    cfg = parse_objectives({"sigreg": {"slices": 8}, "orthogonality": {"weight": 1.0}}, "")
    masks = ragged_masks(batch_size=4)
    ctx = random_context(cfg, masks)
    loss, _ = compute_all(ctx, cfg, all_weights(cfg))
    loss.backward()
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    torch.testing.assert_close(results[0]["loss"] + results[1]["loss"], loss.detach())
    for part, result in zip([[0], [1, 2, 3]], results, strict=True):
        torch.testing.assert_close(
            result["grad"], ctx.context_tokens.grad[part_rows(masks.context_cu, masks, part)]
        )


def test_sets_without_pairs_are_left_out():
    """One set has no site at two consecutive steps: the mean is that of the other set, not half of
    it."""
    sites = GRID[1] * GRID[2]
    dense = [np.arange(40)] * 2
    sparse = [np.arange(sites)] * 2
    rest = [np.arange(40, 60)] * 2
    both = MaskBatch.from_ids([dense, sparse], [rest, rest], GRID)
    assert both.pair_count.tolist() == [50.0, 0.0]
    ctx, cfg = context_for("delta", {}, masks=both)
    one = MaskBatch.from_ids([dense], [rest], GRID)
    alone = dataclasses.replace(
        ctx,
        masks=one,
        denominators=Denominators.of(one),
        context_tokens=ctx.context_tokens[:80],
        predicted_context=None,
        predicted_tokens=ctx.predicted_tokens[:40],
    )
    torch.testing.assert_close(
        compute_all(ctx, cfg, all_weights(cfg))[0], compute_all(alone, cfg, all_weights(cfg))[0]
    )
    none = MaskBatch.from_ids([sparse], [rest], GRID)
    ctx, cfg = context_for("delta", {}, masks=none)
    assert compute_all(ctx, cfg, all_weights(cfg))[0] == 0


def test_zero_at_equality():
    ctx, _ = context_for("delta", {})
    z = ctx.target_context.detach()
    equal = dataclasses.replace(
        ctx, context_tokens=z, predicted_context=z, predicted_tokens=ctx.target_tokens.detach()
    )
    for name in ("prediction", "context", "hard_region", "delta", "spectral"):
        cfg = parsed(name, {})
        assert compute_all(equal, cfg, all_weights(cfg))[0] == 0


def test_segment_softmax_handles_empty_segments():
    values = torch.tensor([1.0, 2.0, 3.0, -1.0], dtype=torch.float64)
    offsets = torch.tensor([0, 0, 2, 2, 3, 4, 4], dtype=torch.int32)
    expected = torch.cat(
        [2 * torch.softmax(values[:2] / 0.5, 0), torch.ones(2, dtype=torch.float64)]
    )
    torch.testing.assert_close(segment_softmax_weights(values, offsets, 0.5), expected)
    assert segment_softmax_weights(values[:0], torch.zeros(3, dtype=torch.int32), 1.0).shape == (0,)
    big = segment_softmax_weights(torch.tensor([1e4, -1e4]), torch.tensor([0, 2]), 1.0)
    assert big.tolist() == [2.0, 0.0]


def test_the_contract_would_notice_a_wrong_sign(monkeypatch):
    """The loop comparisons must bite."""
    value, _ = value_of("delta", {})
    module = get("delta")

    def wrong(ctx, cfg):
        before, after = ctx.pair_tokens
        return objectives.Objective(
            ctx.pair_mean(((after - before) + ctx.pair_target_change).abs().mean(-1))
        )

    monkeypatch.setattr(module, "compute", wrong)
    assert value_of("delta", {})[0] != pytest.approx(value, rel=DERIVED["rtol"])
