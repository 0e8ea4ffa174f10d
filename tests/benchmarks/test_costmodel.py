"""The cost model: recovers what it is given, refuses negative terms, and its held-out check can
fail."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import costmodel, flop
from jepa.models.sizes import SIZES
from jepa_kernels.testing import DERIVED, FLOAT32_DEEP, FLOAT32_ROUNDED

TOKENS = [128.0, 392.0, 800.0, 1568.0]


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.floats(1e-4, 1e-1), st.floats(1e-7, 1e-4), st.floats(1e-10, 1e-7))
def test_recovers_its_own_coefficients(constant: float, per_token: float, per_pair: float) -> None:
    truth = costmodel.Fit(constant, per_token, per_pair, 0, 0.0)
    values = [truth.predict(n, 2) for n in TOKENS]
    made = costmodel.fit(TOKENS, [2] * 4, values)
    assert made.worst_error < FLOAT32_ROUNDED["rtol"]
    for batch, size in ((1, 100.0), (8, 5000.0)):
        assert made.predict(size, batch) == pytest.approx(
            truth.predict(size, batch), rel=FLOAT32_DEEP["rtol"]
        )
    assert made.crossover_tokens == pytest.approx(per_token / per_pair, rel=DERIVED["rtol"])


def test_terms_are_never_negative() -> None:
    made = costmodel.fit(TOKENS, [1] * 4, [n**0.5 for n in TOKENS])
    assert min(made.constant, made.per_token, made.per_pair) >= 0
    assert (
        made.worst_error > 0.05
    )  # a square root is none of the three terms, and the fit must say so


def test_exponent_runs_from_zero_to_two() -> None:
    made = costmodel.Fit(1.0, 1e-3, 1e-7, 4, 0.0)
    exponents = [made.exponent(n, 1) for n in (1.0, 1e3, 1e4, 1e8)]
    assert exponents == sorted(exponents)
    assert exponents[0] < 0.01 and exponents[-1] > 1.99


def test_holdout_sees_a_surprise() -> None:
    honest = [0.01 + 1e-5 * n for n in TOKENS]
    assert abs(costmodel.holdout(TOKENS, [1] * 4, honest).error) < FLOAT32_ROUNDED["rtol"]
    surprise = [*honest[:-1], 3 * honest[-1]]
    assert costmodel.holdout(TOKENS, [1] * 4, surprise).error < -0.5
    assert costmodel.holdout(TOKENS[:2], [1, 1], honest[:2]) is None


def test_slopes_of_a_power_law() -> None:
    assert costmodel.slopes(TOKENS, [n**1.5 for n in TOKENS]) == pytest.approx([1.5] * 4)
    assert costmodel.slopes([5.0], [1.0]) == [None]


@pytest.mark.parametrize(
    ("tokens", "values", "sentence"),
    [([], [], "positive length"), ([1.0], [0.0], "must be positive")],
)
def test_refusals(tokens: list[float], values: list[float], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        costmodel.fit(tokens, [1.0] * len(tokens), values)


def test_flop_formula_counts_a_block_by_hand() -> None:
    """One block on n tokens of width d: qkv 3, projection 1, MLP 2 * ratio matrices of d x d;
    attention two products of n x n x d."""
    n, d = 10, 12
    by_hand = 2 * n * d * d * (3 + 1 + 2 * 4) + 2 * 2 * n * n * d
    assert flop.blocks([n], d, 1, 4.0).total == by_hand


def test_crossover_is_where_the_two_halves_meet() -> None:
    model = SIZES["base"]
    n = flop.crossover_tokens(model)
    assert n == 6 * 768
    part = flop.blocks([int(n)], model.width, model.depth, model.mlp_ratio)
    assert part.linear == pytest.approx(part.attention)


def test_a_split_batch_costs_less_attention_and_equal_linear_work() -> None:
    whole, halves = flop.blocks([200], 96, 4, 4.0), flop.blocks([100, 100], 96, 4, 4.0)
    assert whole.linear == halves.linear and whole.attention == 2 * halves.attention


def test_online_target_adds_its_backward() -> None:
    model = SIZES["micro"]
    plain = flop.pretrain_step(model, 128, 2, [30] * 4, [98] * 4)
    online = flop.pretrain_step(model, 128, 2, [30] * 4, [98] * 4, online_target=True)
    full = flop.encoder(model, [128, 128])
    assert np.isclose(online["backward"].total - plain["backward"].total, full.backward)
