"""FLOP of a training step by formula, phase by phase; a multiply-add counts as two.

A transformer block on n tokens of width D costs (8 + 4 r) n D^2 in its linear layers (r = MLP
ratio) and 4 D sum(length^2) in attention. Backward of a linear layer costs twice its forward, that
of attention 2.5 times (the scores are computed again). Norms, activations, losses and the optimiser
move bytes rather than FLOP and count nothing; the target branch has no backward unless the target
is online.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from jepa.models.sizes import ModelConfig

CHANNELS = 3


@dataclass(frozen=True)
class Flop:
    """Linear layers and attention apart: the second grows with the square of the tokens."""

    linear: float = 0.0
    attention: float = 0.0

    def __add__(self, other: Flop) -> Flop:
        return Flop(self.linear + other.linear, self.attention + other.attention)

    @property
    def total(self) -> float:
        return self.linear + self.attention

    @property
    def backward(self) -> float:
        return 2.0 * self.linear + 2.5 * self.attention


def blocks(lengths: Iterable[int], width: int, depth: int, mlp_ratio: float) -> Flop:
    lengths = list(lengths)
    per_token = (8.0 + 4.0 * mlp_ratio) * width * width
    return Flop(depth * per_token * sum(lengths), depth * 4.0 * width * sum(n * n for n in lengths))


def encoder(model: ModelConfig, lengths: Iterable[int]) -> Flop:
    lengths = list(lengths)
    pixels = CHANNELS * model.tubelet_size * model.patch_size**2
    return blocks(lengths, model.width, model.depth, model.mlp_ratio) + Flop(
        2.0 * pixels * model.width * sum(lengths)
    )


def predictor(model: ModelConfig, context: Sequence[int], target: Sequence[int]) -> Flop:
    own, features = model.predictor, model.feature_width
    joint = [seen + hidden for seen, hidden in zip(context, target, strict=True)]
    embed = 2.0 * sum(context) * (features * model.width + model.width * own.width)
    project = 2.0 * sum(joint) * own.width * features
    return blocks(joint, own.width, own.depth, own.mlp_ratio) + Flop(embed + project)


def pretrain_step(
    model: ModelConfig,
    tokens: int,
    batch: int,
    context: Sequence[int],
    target: Sequence[int],
    *,
    online_target: bool = False,
) -> dict[str, Flop]:
    """By phase. `context` and `target` are the lengths of every sequence (mask set x sample);
    activation checkpointing is not counted."""
    full, seen, guess = (
        encoder(model, [tokens] * batch),
        encoder(model, context),
        predictor(model, context, target),
    )
    trained = [seen, guess, *([full] if online_target else [])]
    back = Flop(
        sum(2.0 * part.linear for part in trained), sum(2.5 * part.attention for part in trained)
    )
    return {"target": full, "context": seen, "predictor": guess, "backward": back}


def finetune_step(
    model: ModelConfig, tokens: int, batch: int, *, frozen: bool = False
) -> dict[str, Flop]:
    full = encoder(model, [tokens] * batch)
    return (
        {"encoder": full}
        if frozen
        else {"encoder": full, "backward": Flop(2.0 * full.linear, 2.5 * full.attention)}
    )


def crossover_tokens(model: ModelConfig) -> float:
    """Tokens per clip at which an encoder block's attention FLOP equal those of its linear layers:
    N = (8 + 4 r) D / 4."""
    return (8.0 + 4.0 * model.mlp_ratio) * model.width / 4.0
