"""Writes visible_patch_embed.json: an independent NumPy computation, so that a mistake shared by
reference and kernels is seen.

Formula: out[r, d] = bias[d] + sum over channel c, frame i, row j, column k of the tubelet of
W[d, c, i, j, k] * (scale * x - mean[c]) / std[c], in loops over ids t * H * W + y * W + x.
Gradients are those of sum(out * g), of weights and pixels by central differences.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

SEED = 20261129


def embed(clip, weight, bias, ids, of_clip, mean, std, scale):
    _, channels, depth, high, wide = weight.shape
    height, width = clip.shape[3] // high, clip.shape[4] // wide
    out = []
    for token, b in zip(ids, of_clip, strict=True):
        t, y, x = token // (height * width), token // width % height, token % width
        row = bias.copy()
        for c in range(channels):
            for i in range(depth):
                for j in range(high):
                    for k in range(wide):
                        pixel = clip[b, c, t * depth + i, y * high + j, x * wide + k]
                        row += weight[:, c, i, j, k] * (scale * pixel - mean[c]) / std[c]
        out.append(row)
    return np.array(out)


def difference(function, x):
    result = np.zeros_like(x)
    for place in np.ndindex(*x.shape):
        up, down = x.copy(), x.copy()
        up[place] += 1e-3
        down[place] -= 1e-3
        result[place] = (function(up) - function(down)) / 2e-3
    return result


def main() -> None:
    rng = np.random.default_rng(SEED)
    cases = []
    for batch, grid, tubelet, channels, width, ids, offsets, uint8 in (
        (1, (2, 1, 2), (2, 2, 1), 3, 2, [3, 0, 1], None, True),
        (2, (1, 2, 2), (1, 2, 3), 1, 3, [[2, 0], [1, 3]], None, False),
        (2, (2, 2, 1), (1, 1, 2), 2, 2, [0, 3, 2, 2, 1], [0, 2, 3, 3, 5], False),
    ):
        shape = (batch, channels, *(g * s for g, s in zip(grid, tubelet, strict=True)))
        clip = rng.integers(0, 256, shape).astype(float)
        if not uint8:
            clip = rng.standard_normal(shape).round(3)
        weight = rng.standard_normal((width, channels, *tubelet)).round(3)
        bias = rng.standard_normal(width).round(3)
        mean, std = (
            rng.uniform(0.2, 0.6, channels).round(2),
            rng.uniform(0.2, 0.5, channels).round(2),
        )
        scale = 1 / 255 if uint8 else 1.0
        flat = [i for row in ids for i in row] if offsets is None and batch > 1 else ids
        if offsets is None:
            of_clip = np.repeat(np.arange(batch), len(flat) // batch)
        else:
            of_clip = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets)) % batch
        rest = (flat, of_clip, mean, std, scale)
        out = embed(clip, weight, bias, *rest)
        g = rng.standard_normal(out.shape).round(3)
        cases.append(
            {
                "dtype": "uint8" if uint8 else "float",
                "clip": clip.tolist(),
                "weight": weight.tolist(),
                "bias": bias.tolist(),
                "ids": ids,
                "cu_seqlens": offsets,
                "mean": mean.tolist(),
                "std": std.tolist(),
                "grad_out": g.tolist(),
                "out": out.tolist(),
                # Both are linear in what is differentiated, so differences are exact.
                "grad_weight": difference(
                    lambda w, c=clip, b=bias, r=rest, g=g: (embed(c, w, b, *r) * g).sum(), weight
                ).tolist(),
                "grad_clip": difference(
                    lambda c, w=weight, b=bias, r=rest, g=g: (embed(c, w, b, *r) * g).sum(), clip
                ).tolist(),
                "grad_bias": g.sum(0).tolist(),
            }
        )
    content = {
        "seed": SEED,
        "formula": __doc__.split("\n\n")[1].replace("\n", " ").strip(),
        "cases": cases,
    }
    Path(__file__).with_name("visible_patch_embed.json").write_text(json.dumps(content) + "\n")


if __name__ == "__main__":
    main()
