"""Writes masked_attention.json: an independent NumPy computation in float64, so that a mistake
shared by reference and kernels is seen.

Formula: out = softmax(scale * R(q) R(k)^T) v per sequence. R turns channel pairs (2i, 2i+1) of
three axes by angles written out below, as complex numbers where the layout is a rotation and as two
separate angles where it is not.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

SEED = 20260517


def turn(
    x: np.ndarray, ids: np.ndarray, grid: tuple[int, int, int], layout: str, g0: int | None
) -> np.ndarray:
    """R(x, ids) for [N, heads, head_dim], token by token."""
    out = x.copy()
    _, height, width = grid
    m = 2 * ((x.shape[-1] // 3) // 2)
    for n, token in enumerate(ids):
        if token < 0:
            continue
        position = [token // (height * width), token // width % height, token % width]
        if g0 is not None:
            position[1] *= (g0 - 1) / (height - 1)
            position[2] *= (g0 - 1) / (width - 1)
        for axis in range(3):
            for i in range(m // 2):
                a, b = axis * m + 2 * i, axis * m + 2 * i + 1
                if layout == "interleaved":
                    z = (x[n, :, a] + 1j * x[n, :, b]) * np.exp(
                        1j * position[axis] / 10000 ** (2 * i / m)
                    )
                    out[n, :, a], out[n, :, b] = z.real, z.imag
                else:
                    first = position[axis] / 10000 ** (2 * ((2 * i) % (m // 2)) / m)
                    second = position[axis] / 10000 ** (2 * ((2 * i + 1) % (m // 2)) / m)
                    out[n, :, a] = x[n, :, a] * np.cos(first) - x[n, :, b] * np.sin(first)
                    out[n, :, b] = x[n, :, b] * np.cos(second) + x[n, :, a] * np.sin(second)
    return out


def attend(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float
) -> tuple[np.ndarray, np.ndarray]:
    out, lse = np.zeros_like(q), np.full((q.shape[1], q.shape[0]), -np.inf)
    for head in range(q.shape[1]):
        for n in range(q.shape[0]):
            if not len(k):
                continue
            scores = scale * k[:, head] @ q[n, head]
            top = scores.max()
            weights = np.exp(scores - top)
            out[n, head] = weights @ v[:, head] / weights.sum()
            lse[head, n] = top + np.log(weights.sum())
    return out, lse


def main() -> None:
    rng = np.random.default_rng(SEED)
    cases = []
    for layout, g0, head_dim in (
        ("interleaved", None, 8),
        ("interleaved", 16, 24),
        ("tiled", None, 24),
        ("tiled", 16, 32),
    ):
        grid, heads, scale = (2, 3, 4), 2, 0.4
        lengths_q, lengths_k = [3, 0, 2], [4, 2, 0]
        nq, nk = sum(lengths_q), sum(lengths_k)
        q, k, v = (np.round(rng.standard_normal((n, heads, head_dim)), 3) for n in (nq, nk, nk))
        ids_q, ids_k = rng.integers(-1, 24, nq), rng.integers(-1, 24, nk)
        rotated_q, rotated_k = turn(q, ids_q, grid, layout, g0), turn(k, ids_k, grid, layout, g0)
        outs, lses, at_q, at_k = [], [], 0, 0
        for a, b in zip(lengths_q, lengths_k, strict=True):
            out, lse = attend(
                rotated_q[at_q : at_q + a], rotated_k[at_k : at_k + b], v[at_k : at_k + b], scale
            )
            outs.append(out)
            lses.append(lse)
            at_q, at_k = at_q + a, at_k + b
        lse = np.concatenate(lses, axis=1)
        cases.append(
            {
                "layout": layout,
                "interpolate_from": g0,
                "grid": grid,
                "scale": scale,
                "cu_seqlens_q": np.cumsum([0, *lengths_q]).tolist(),
                "cu_seqlens_k": np.cumsum([0, *lengths_k]).tolist(),
                "query": q.tolist(),
                "key": k.tolist(),
                "value": v.tolist(),
                "query_ids": ids_q.tolist(),
                "key_ids": ids_k.tolist(),
                "out": np.round(np.concatenate(outs), 12).tolist(),
                "lse": [[None if np.isinf(x) else round(float(x), 12) for x in row] for row in lse],
            }
        )
    formula = "out = softmax(scale * R(query) R(key)^T) value, float64; null in lse is -inf"
    Path(__file__).with_name("masked_attention.json").write_text(
        json.dumps({"seed": SEED, "formula": formula, "cases": cases}) + "\n"
    )


if __name__ == "__main__":
    main()
