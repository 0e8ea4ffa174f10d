"""facebookresearch eb_jepa: its GRU predictor, the autoregressive unroll of its JEPA, and what its
planners call, through latent_rollout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import sentence, type_name
from ..ops.latent_rollout import GRU, latent_rollout
from .replace import CodeBase, Foreign, Target

_PREDICTOR = "eb_jepa.architectures:RNNPredictor"


def _cell(predictor: Foreign) -> GRU:
    rnn, norm = predictor.rnn, predictor.final_ln
    return GRU(
        rnn.weight_ih_l0,
        rnn.weight_hh_l0,
        rnn.bias_ih_l0,
        rnn.bias_hh_l0,
        norm.weight,
        norm.bias,
        norm.eps,
    )


def _predictor_obstacles(module: Foreign) -> list[str]:
    rnn, norm = module.rnn, module.final_ln
    reasons = []
    if rnn.num_layers != 1 or rnn.bidirectional or rnn.batch_first:
        reasons.append(f"rnn must be one layer in one direction with the batch second, got {rnn}")
    if not rnn.bias:
        reasons.append("rnn must have biases, got none")
    if (
        not isinstance(norm, nn.LayerNorm)
        or norm.weight is None
        or norm.bias is None
        or norm.normalized_shape != (rnn.hidden_size,)
    ):
        reasons.append(
            f"final_ln must be a LayerNorm with weight and bias over the {rnn.hidden_size} "
            f"channels of the state, got {norm}"
        )
    return reasons


def _model_obstacles(module: Foreign) -> list[str]:
    predictor = module.predictor
    if not isinstance(getattr(predictor, "rnn", None), nn.GRU):
        return [
            "predictor must be an RNNPredictor for its unroll to be one rollout, got "
            f"{type_name(predictor)}"
        ]
    return _predictor_obstacles(predictor)


def _predict(self: Foreign, state: Tensor, action: Tensor) -> Tensor:
    """One step, ``[B, D, 1, 1, 1]`` and ``[B, A, 1]`` to ``[B, D, 1, 1, 1]``."""
    moved = latent_rollout(
        state.flatten(1), _cell(self), 1, actions=action.flatten(1)[None], output="last"
    )
    return moved[:, :, None, None, None]


def _roll(model: Foreign, start: Tensor, actions: Tensor, steps: int) -> Tensor:
    """States 1 to `steps` as ``[B, D, steps, 1, 1]`` from ``[B, D]`` and encoded actions ``[B, A,
    T]``."""
    if not steps:
        return start.new_empty((*start.shape, 0, 1, 1))
    states = latent_rollout(
        start, _cell(model.predictor), steps, actions=actions[:, :, :steps].permute(2, 0, 1)
    )
    return states.permute(1, 2, 0)[..., None, None]


def _unroll(
    self: Foreign,
    observations: Tensor,
    actions: Tensor | None,
    nsteps: int = 1,
    unroll_mode: str = "parallel",
    ctxt_window_time: int = 1,
    compute_loss: bool = True,
    return_all_steps: bool = False,
) -> tuple[Tensor | list[Tensor], tuple[Any, ...] | None]:
    """The autoregressive unroll of a GRU predictor as one rollout; what it returns is what the
    original returns."""
    if unroll_mode != "autoregressive":
        raise ValueError(
            sentence(
                "unroll",
                "unroll_mode",
                "be 'autoregressive' for a GRU predictor",
                repr(unroll_mode),
                "restore(model) undoes the fusion.",
            )
        )
    if actions is None or nsteps > actions.shape[2]:
        got = "None" if actions is None else f"{actions.shape[2]}"
        raise ValueError(sentence("unroll", "actions", f"hold at least {nsteps} steps", got))
    state = self.encoder(observations)
    regularised = self.regularizer(state, actions) if compute_loss else None
    moved = _roll(self, state[:, :, 0].flatten(1), self.action_encoder(actions), nsteps)
    sequence = torch.cat((state[:, :, :1], moved), dim=2)
    losses = None
    if regularised is not None:
        # The cost is the user's own module, so it sees a step at a time, as in the original.
        costs = [
            self.predcost(moved[:, :, i : i + 1], state[:, :, i + 1 : i + 2]) / nsteps
            for i in range(nsteps)
        ]
        prediction = sum(costs, start=0.0)
        losses = (regularised[0] + prediction, *regularised, prediction)
    if return_all_steps:
        return [sequence[:, :, : i + 2].clone() for i in range(nsteps)], losses
    return sequence, losses


def planning_unroll(model: Foreign) -> Callable[..., Tensor]:
    """What a planner of eb_jepa calls to score candidates, without encoding the same observation
    once per candidate.

    ``agent.planner.unroll = planning_unroll(agent.model)``. The result is that of
    ``agent.unroll(obs_init, actions)``, which repeats the observation before it encodes it; the
    encoder must treat the samples of a batch independently (in evaluation mode they all do).

    Args:
        model: a JEPA of eb_jepa with a GRU predictor.

    Returns:
        A function of ``obs_init [1, C, T, H, W]`` (or one per candidate) and ``actions [B, A, K]``
        that gives ``[B, D, K + 1, 1, 1]``.

    Raises:
        ValueError: its predictor cannot be fused, with the reasons.
    """
    reasons = _model_obstacles(model)
    if reasons:
        raise ValueError(
            f"planning_unroll: model must have a fusable GRU predictor, got: {'; '.join(reasons)}."
        )

    def unroll(obs_init: Tensor, actions: Tensor, repeat_batch: bool = True) -> Tensor:
        state = model.encoder(obs_init)[:, :, 0].flatten(1)
        if repeat_batch:
            state = state.expand(actions.shape[0], -1)
        moved = _roll(model, state, model.action_encoder(actions), actions.shape[2])
        return torch.cat((state[:, :, None, None, None], moved), dim=2)

    return unroll


BASE = CodeBase(
    "eb_jepa",
    "facebookresearch/eb_jepa",
    (
        Target((_PREDICTOR,), _predict, _predictor_obstacles, "one GRU step and its LayerNorm"),
        Target(
            ("eb_jepa.jepa:JEPA",),
            _unroll,
            _model_obstacles,
            "all steps of an autoregressive unroll",
            method="unroll",
        ),
    ),
)
