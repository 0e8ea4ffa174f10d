"""Writes ema_update.json: an independent NumPy computation, so that a mistake shared by reference
and kernels is seen.

Formula: target <- momentum * target + (1 - momentum) * source in float64. Bits of stochastic
rounding: splitmix64 of (seed, stream), then two rounds of a 32-bit mixer over the element number,
in Python integers. `rounded` are bfloat16 patterns of float32 values with such bits.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

SEED = 20260518


def mixer(x: int) -> int:
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = ((x ^ (x >> shift)) * factor) % 2**32
    return x ^ (x >> 16)


def bits(seed: int, stream: int, element: int) -> int:
    z = (seed + 0x9E3779B97F4A7C15 * (stream + 1)) % 2**64
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = ((z ^ (z >> shift)) * factor) % 2**64
    z ^= z >> 31
    high, low = divmod(z, 2**32)
    block, place = divmod(element, 2**32)
    return mixer((mixer(place ^ low) + high + block * 0x9E3779B9) % 2**32) >> 16


def main() -> None:
    rng = np.random.default_rng(SEED)
    updates = []
    for momentum in (0.0, 0.25, 0.5, 0.996, 0.99925, 1.0):
        shapes = ((3,), (2, 2), (0,))
        targets = [rng.standard_normal(s).round(3) for s in shapes]
        sources = [rng.standard_normal(s).round(3) for s in shapes]
        expected = [
            momentum * t + (1 - momentum) * s for t, s in zip(targets, sources, strict=True)
        ]
        updates.append(
            {
                "momentum": momentum,
                **{
                    n: [v.tolist() for v in x]
                    for n, x in (("targets", targets), ("sources", sources), ("expected", expected))
                },
            }
        )
    random = []
    for seed, stream in ((0, 0), (7, 3), (2**53 + 1, 200), (-5, 1)):
        values = rng.standard_normal(12).astype(np.float32)
        drawn = [bits(seed, stream, i) for i in range(12)]
        rounded = [(int(u) + r) >> 16 for u, r in zip(values.view(np.uint32), drawn, strict=True)]
        random.append(
            {
                "seed": seed,
                "stream": stream,
                "bits": drawn,
                "values": values.astype(float).tolist(),
                "rounded": rounded,
            }
        )
    content = {
        "seed": SEED,
        "formula": __doc__.split("\n\n")[1].replace("\n", " ").strip(),
        "updates": updates,
        "random": random,
    }
    Path(__file__).with_name("ema_update.json").write_text(json.dumps(content) + "\n")


if __name__ == "__main__":
    main()
