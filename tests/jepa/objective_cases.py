"""Contexts of one objective at a time, and the same context as plain nested lists, for loops that
say what a formula is."""

from __future__ import annotations

import numpy as np
import torch

from jepa.objectives import compute_all, parse_objectives
from tests.jepa.training_cases import ragged_masks, random_context

HIDDEN = {"latent_dynamics": 5, "action": 5, "hamiltonian": 5}


def parsed(name: str, options: dict) -> dict:
    options = {
        **({"hidden": HIDDEN[name]} if name in HIDDEN else {}),
        "schedule": {"kind": "constant"},
        **options,
    }
    return parse_objectives({name: options}, "objectives")


def context_for(name: str, options: dict, **changes):
    cfg = parsed(name, options)
    masks = changes.pop("masks", None) or ragged_masks(horizon=options.get("horizon", 1))
    return random_context(cfg, masks, online=name == "kinematic", **changes), cfg


def all_weights(cfg: dict, value: float = 1.0) -> dict[str, float]:
    return dict.fromkeys(cfg, value)


def softmax_weights(errors: list[float], temperature: float = 1.0) -> np.ndarray:
    exponent = np.exp(np.array(errors) / temperature)
    return len(errors) * exponent / exponent.sum()


def loop_mean(values: dict[int, list[float]]) -> float:
    """Pool the rows of a set, then average over the sets that have any."""
    means = [float(np.mean(rows)) for rows in values.values() if rows]
    return float(np.mean(means)) if means else 0.0


class Loop:
    """The context of a test as plain nested lists: features by (set, sample, token)."""

    def __init__(self, ctx) -> None:
        masks, self.ctx = ctx.masks, ctx
        self.sets, self.batch, self.tokens = masks.num_sets, masks.batch_size, masks.num_tokens
        self.sites = masks.grid[1] * masks.grid[2]
        self.target = ctx.target.detach().view(self.batch, self.tokens, -1).numpy()
        self.z, self.c = ({} for _ in range(2))
        self.p = {}
        for j in range(self.sets):
            for b in range(self.batch):
                s = j * self.batch + b
                for where, ids, cu, features in (
                    (self.z, masks.context_ids, masks.context_cu, ctx.context_tokens),
                    (self.c, masks.context_ids, masks.context_cu, ctx.predicted_context),
                    (self.p, masks.target_ids, masks.target_cu, ctx.predicted_tokens),
                ):
                    for row in range(int(cu[s]), int(cu[s + 1])):
                        where[j, b, int(ids[row])] = features[row].detach().numpy()

    def of_set(self, where: dict, j: int, b: int | None = None) -> list[tuple[int, int, int]]:
        return [key for key in where if key[0] == j and (b is None or key[1] == b)]

    def pairs(self, j: int, b: int | None = None) -> list[tuple[tuple, tuple]]:
        found = []
        for key in self.of_set(self.z, j, b):
            later = (key[0], key[1], key[2] + self.sites)
            if later in self.z:
                found.append((key, later))
        return found

    def mean_over_pairs(self, value) -> float:
        return loop_mean(
            {j: [value(first, second) for first, second in self.pairs(j)] for j in range(self.sets)}
        )

    def h(self, key: tuple) -> np.ndarray:
        return self.target[key[1], key[2]]


def value_of(name: str, options: dict, **changes) -> tuple[float, Loop]:
    ctx, cfg = context_for(name, options, **changes)
    return float(compute_all(ctx, cfg, all_weights(cfg))[0].detach()), Loop(ctx)


def assert_same_loss_and_gradients(loss, expected, leaves) -> None:
    torch.testing.assert_close(loss, expected)
    for got, wanted in zip(
        *(torch.autograd.grad(v, leaves) for v in (loss, expected)), strict=True
    ):
        assert wanted.abs().max() > 0
        torch.testing.assert_close(got, wanted)
