"""Writes sliced_gaussianity.json: an independent NumPy computation, so that a mistake shared by
reference and kernels is seen.

Formula: for each column a of A, u = X a; integral over [-T, T] of |mean exp(i t u) -
exp(-t^2/2)|^2 exp(-t^2/2) by the trapezium rule on 2 K - 1 knots, times N; mean over the columns.
The gradient is a central difference of that in float64. Words: Philox4x32-10 in Python integers;
normals from 24 bits of each word by Box and Muller; columns divided by their norm.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np

SEED = 20260529


def statistic(x: np.ndarray, a: np.ndarray, points: int, largest: float) -> float:
    time = np.linspace(-largest, largest, 2 * points - 1)
    total = 0.0
    for column in a.T:
        u = x @ column
        found = np.array([np.exp(1j * t * u).mean() for t in time])
        normal = np.exp(-(time**2) / 2)
        height = np.abs(found - normal) ** 2 * normal
        spacing = time[1] - time[0]
        total += spacing * (height.sum() - (height[0] + height[-1]) / 2)
    return len(x) * total / a.shape[1]


def gradient(x: np.ndarray, a: np.ndarray, points: int, largest: float) -> np.ndarray:
    result, eps = np.zeros_like(x), 1e-5
    for place in np.ndindex(*x.shape):
        up, down = x.copy(), x.copy()
        up[place] += eps
        down[place] -= eps
        high, low = (statistic(moved, a, points, largest) for moved in (up, down))
        result[place] = (high - low) / (2 * eps)
    return result


def philox(counter: list[int], key: int) -> list[int]:
    k0, k1 = key % 2**32, key // 2**32
    c0, c1, c2, c3 = counter
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = p1 // 2**32 ^ c1 ^ k0, p1 % 2**32, p0 // 2**32 ^ c3 ^ k1, p0 % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]


def words(blocks: int, seed: int, step: int) -> list[int]:
    stream = 0x5347 + (step // 2**32 << 16)
    return [w for b in range(blocks) for w in philox([b, 0, step % 2**32, stream], seed)]


def directions(channels: int, slices: int, seed: int, step: int) -> np.ndarray:
    count = channels * slices
    uniform = [(w // 2**8 + 0.5) / 2**24 for w in words(-(-count // 4), seed, step)]
    normal: list[float] = []
    for first, second in zip(uniform[::2], uniform[1::2], strict=True):
        radius = math.sqrt(-2 * math.log(first))
        normal += [
            radius * math.cos(2 * math.pi * second),
            radius * math.sin(2 * math.pi * second),
        ]
    columns = np.array(normal[:count]).reshape(channels, slices)
    return columns / np.sqrt((columns**2).sum(0))


def main() -> None:
    rng = np.random.default_rng(SEED)
    cases = []
    for rows, channels, slices, points, largest in (
        (5, 3, 4, 17, 3.0),
        (1, 2, 3, 9, 5.0),
        (7, 4, 2, 2, 1.5),
        (4, 1, 1, 6, 2.0),
    ):
        x = rng.standard_normal((rows, channels)).round(3)
        a = rng.standard_normal((channels, slices)).round(3)
        cases.append(
            {
                "points": points,
                "largest_point": largest,
                "features": x.tolist(),
                "directions": a.tolist(),
                "statistic": statistic(x, a, points, largest),
                "gradient": gradient(x, a, points, largest).tolist(),
            }
        )
    drawn = [
        {
            "seed": seed,
            "step": step,
            "words": words(3, seed, step),
            "directions": directions(3, 5, seed, step).tolist(),
        }
        for seed, step in ((0, 0), (7, 3), (2**63 - 1, 2**47 + 5))
    ]
    content = {
        "seed": SEED,
        "formula": __doc__.split("\n\n")[1].replace("\n", " ").strip(),
        "cases": cases,
        "drawn": drawn,
    }
    Path(__file__).with_name("sliced_gaussianity.json").write_text(json.dumps(content) + "\n")


if __name__ == "__main__":
    main()
