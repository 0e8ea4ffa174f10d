"""Writes latent_rollout.json: an independent NumPy computation in float64, so that a mistake shared
by reference and kernels is seen.

Formula: the state is stepped row by row as the cell's equation is written, y_k = anchor + (x_k -
x_0), e = mean |y_k - target|^p / p. gelu is x times the normal distribution function (math.erf), a
Hamiltonian's forces are central differences of its energy refined by Richardson, and gradients of
the summed errors to each initial state are differences of the whole computation: no derivative is
written down anywhere.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

SEED = 20260519
D, H, MIDDLE, A, ROWS, HORIZON = 6, 4, 5, 2, 3, 3
Vector = np.ndarray


def gelu(x: Vector) -> Vector:
    return np.array([v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in x])


def difference(function: Callable[[Vector], float], x: Vector, step: float = 2e-3) -> Vector:
    """The gradient of a smooth function: central differences of three widths, extrapolated
    twice."""
    slopes = []
    for i in range(x.size):
        rows = []
        for width in (step, step / 2, step / 4):
            right, left = x.copy(), x.copy()
            right[i] += width
            left[i] -= width
            rows.append((function(right) - function(left)) / (2 * width))
        finer = [(4 * rows[1] - rows[0]) / 3, (4 * rows[2] - rows[1]) / 3]
        slopes.append((16 * finer[1] - finer[0]) / 15)
    return np.array(slopes)


def mlp_step(w: dict[str, Vector], x: Vector, channels: list[int]) -> Vector:
    return x + w["weight_out"] @ gelu(w["weight_in"] @ x[channels] + w["bias_in"]) + w["bias_out"]


def energy(w: dict[str, Vector], x: Vector) -> float:
    return float(
        w["weight_energy"][0]
        @ gelu(w["weight_hidden"] @ gelu(w["weight_in"] @ x + w["bias_in"]) + w["bias_hidden"])
    )


def hamiltonian_step(w: dict[str, Vector], x: Vector, time_step: float) -> Vector:
    q, p = x[: D // 2], x[D // 2 :]
    q = q + time_step * difference(lambda v: energy(w, np.concatenate((q, v))), p)
    p = p - time_step * difference(lambda v: energy(w, np.concatenate((v, p))), q)
    return np.concatenate((q, p))


def gru_step(w: dict[str, Vector], z: Vector, action: Vector, epsilon: float) -> Vector:
    from_action, from_state = (
        w["weight_input"] @ action + w["bias_input"],
        w["weight_state"] @ z + w["bias_state"],
    )
    reset = 1 / (1 + np.exp(-(from_action[:D] + from_state[:D])))
    update = 1 / (1 + np.exp(-(from_action[D : 2 * D] + from_state[D : 2 * D])))
    candidate = np.tanh(from_action[2 * D :] + reset * from_state[2 * D :])
    mixed = (1 - update) * candidate + update * z
    return (mixed - mixed.mean()) / np.sqrt(mixed.var() + epsilon) * w["norm_weight"] + w[
        "norm_bias"
    ]


def case(
    rng: np.random.Generator, cell: str, ranges: list[tuple[int, int]] | None, exponent: float
) -> dict[str, object]:
    def values(*shape: int, spread: float = 1.0) -> Vector:
        return np.round(rng.standard_normal(shape) * spread, 3)

    channels = [c for start, stop in ranges or () for c in range(start, stop)]
    hidden = {"weight_in": (H, len(channels) or D), "bias_in": (H,)}
    shapes = {
        "residual_mlp": hidden | {"weight_out": (D, H), "bias_out": (D,)},
        "hamiltonian": hidden
        | {"weight_hidden": (MIDDLE, H), "bias_hidden": (MIDDLE,), "weight_energy": (1, MIDDLE)},
        "gru": {
            **{
                "weight_input": (3 * D, A),
                "weight_state": (3 * D, D),
                "bias_input": (3 * D,),
                "bias_state": (3 * D,),
            },
            **{"norm_weight": (D,), "norm_bias": (D,)},
        },
    }[cell]
    weights = {name: values(*shape, spread=0.6) for name, shape in shapes.items()}
    states, targets = values(ROWS, D), values(HORIZON, ROWS, D)
    anchor = None if cell == "gru" else values(ROWS, D)
    actions = values(HORIZON, ROWS, A) if cell == "gru" else None
    scalar = {"residual_mlp": 0.0, "hamiltonian": 0.1, "gru": 1e-5}[cell]

    def rollout(row: int, start: Vector) -> list[Vector]:
        x, predictions = start, []
        for k in range(HORIZON):
            if cell == "residual_mlp":
                x = mlp_step(weights, x, channels)
            elif cell == "hamiltonian":
                x = hamiltonian_step(weights, x, scalar)
            else:
                x = gru_step(weights, x, actions[k, row], scalar)
            predictions.append(x if anchor is None else anchor[row] + (x - start))
        return predictions

    def errors(row: int, start: Vector) -> list[float]:
        powers = [
            np.abs(y - targets[k, row]) ** exponent / exponent
            for k, y in enumerate(rollout(row, start))
        ]
        return [float(p.mean() * (2 if cell == "hamiltonian" else 1)) for p in powers]

    predicted = [rollout(row, states[row]) for row in range(ROWS)]
    return {
        **{"cell": cell, "in_channels": ranges, "scalar": scalar, "exponent": exponent},
        "parameters": {name: w.tolist() for name, w in weights.items()},
        **{"states": states.tolist(), "targets": targets.tolist()},
        "anchor": None if anchor is None else anchor.tolist(),
        "actions": None if actions is None else actions.tolist(),
        "predictions": [
            [np.round(predicted[row][k], 10).tolist() for row in range(ROWS)]
            for k in range(HORIZON)
        ],
        "errors": np.round(
            np.array([errors(row, states[row]) for row in range(ROWS)]).T, 10
        ).tolist(),
        # The gradient to x_0 with the anchor held still.
        "grad_states": [
            np.round(difference(lambda v, r=row: sum(errors(r, v)), states[row]), 7).tolist()
            for row in range(ROWS)
        ],
    }


def main() -> None:
    rng = np.random.default_rng(SEED)
    kinds = (
        ("residual_mlp", [(0, D)], 2.0),
        ("residual_mlp", [(0, 1), (3, 6)], 1.5),
        ("hamiltonian", None, 2.0),
        ("gru", None, 2.0),
    )
    cases = [case(rng, *kind) for kind in kinds]
    formula = __doc__.split("\n\n")[1].replace("\n", " ").strip()
    Path(__file__).with_name("latent_rollout.json").write_text(
        json.dumps({"seed": SEED, "formula": formula, "cases": cases}) + "\n"
    )


if __name__ == "__main__":
    main()
