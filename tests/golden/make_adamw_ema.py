"""Writes adamw_ema.json: an independent NumPy computation, so that a mistake shared by reference
and kernels is seen.

Formula: algorithm 2 of arXiv:1711.05101 in float64 with a constant schedule multiplier, then target
<- momentum target + (1 - momentum) parameter. Gradients are divided by grad_scale and negated to
maximize before anything else.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

SEED = 20260519


def main() -> None:
    rng = np.random.default_rng(SEED)
    cases = []
    for lr, beta1, beta2, eps, decay, maximize, scale, momentum in (
        (1e-2, 0.9, 0.999, 1e-8, 0.0, False, 1.0, 0.9),
        (3e-3, 0.8, 0.95, 1e-6, 0.1, False, 1.0, 0.99),
        (0.5, 0.9, 0.99, 1e-3, 0.2, True, 8.0, 0.0),
        (1e-3, 0.0, 0.5, 1e-8, 0.01, False, 2.0, 1.0),
    ):
        theta, target = rng.standard_normal(6).round(3), rng.standard_normal(6).round(3)
        first, second = np.zeros(6), np.zeros(6)
        case = {
            "hyper": [lr, beta1, beta2, eps, decay, float(maximize)],
            "grad_scale": scale,
            "momentum": momentum,
        }
        case |= {"param": theta.tolist(), "target": target.tolist(), "steps": []}
        for t in range(1, 6):
            raw = rng.standard_normal(6).round(3)
            gradient = (-raw if maximize else raw) / scale
            first = beta1 * first + (1 - beta1) * gradient
            second = beta2 * second + (1 - beta2) * gradient**2
            first_hat, second_hat = first / (1 - beta1**t), second / (1 - beta2**t)
            theta = theta - (lr * first_hat / (np.sqrt(second_hat) + eps) + lr * decay * theta)
            target = momentum * target + (1 - momentum) * theta
            named = {
                "grad": raw,
                "param": theta,
                "exp_avg": first,
                "exp_avg_sq": second,
                "target": target,
            }
            case["steps"].append({name: value.tolist() for name, value in named.items()})
        cases.append(case)
    content = {
        "seed": SEED,
        "formula": __doc__.split("\n\n")[1].replace("\n", " ").strip(),
        "cases": cases,
    }
    Path(__file__).with_name("adamw_ema.json").write_text(json.dumps(content) + "\n")


if __name__ == "__main__":
    main()
