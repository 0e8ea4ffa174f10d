"""Faults for the code that a golden file checks: what a wrong one does, one at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import jepa_kernels
from jepa import step
from jepa.batch import MaskBatch
from jepa.conformance import modules, objectives, steps
from jepa.conformance.golden import Golden
from jepa.models.encoder import Encoder
from jepa.models.predictor import Predictor

Plant = Callable[[pytest.MonkeyPatch], None]
FACTOR = 1.001


def _around(patch: pytest.MonkeyPatch, owner: Any, name: str, change: Callable) -> None:
    """Replaces `owner.name` by change(original, *arguments)."""
    original = getattr(owner, name)
    patch.setattr(owner, name, functools.partial(change, original))


def _scaled(gradient: Tensor) -> Tensor:
    return gradient * FACTOR


def _target_sign(patch: pytest.MonkeyPatch) -> None:
    """The last channel of the target has the wrong sign."""

    def change(original: Callable, features: Tensor, levels: int) -> Tensor:
        target = original(features, levels)
        return torch.cat([target[..., :-1], -target[..., -1:]], dim=-1)

    for owner in (objectives, step):
        _around(patch, owner, "standardise", change)


def _target_levels(patch: pytest.MonkeyPatch) -> None:
    """The first two levels of the target are swapped."""

    def change(original: Callable, features: Tensor, levels: int) -> Tensor:
        first, second, *rest = original(features, levels).chunk(levels, dim=-1)
        return torch.cat([second, first, *rest], dim=-1)

    for owner in (objectives, step):
        _around(patch, owner, "standardise", change)


def _dropped_objective(patch: pytest.MonkeyPatch) -> None:
    """The loss lacks its last objective."""

    def change(original: Callable, ctx: Any, chosen: dict, weight: dict) -> Any:
        loss, metrics = original(ctx, chosen, weight)
        if "prediction" in chosen:
            loss, _ = original(ctx, chosen, {**weight, list(chosen)[-1]: 0.0})
        return loss, metrics

    for owner in (objectives, steps, step):
        _around(patch, owner, "compute_all", change)


def _mask_id(patch: pytest.MonkeyPatch) -> None:
    """The first context token of the first set is another one."""
    original = MaskBatch.from_ids

    def change(context: list, target: list, grid: tuple[int, int, int], **options: Any) -> Any:
        context = [[np.array(ids) for ids in part] for part in context]
        used = {*context[0][0].tolist(), *np.array(target[0][0]).tolist()}
        free = [token for token in range(int(np.prod(grid))) if token not in used]
        if free:
            context[0][0][0] = free[0]
        else:
            target = [[np.array(ids) for ids in part] for part in target]
            context[0][0][0], target[0][0][0] = target[0][0][0], context[0][0][0]
        return original(context, target, grid, **options)

    patch.setattr(MaskBatch, "from_ids", change)


def _feature_gradient(patch: pytest.MonkeyPatch) -> None:
    """One gradient of the loss section is off by a factor: that of the predicted context."""

    def change(original: Callable, *arguments: Any, **fields: Any) -> Any:
        features = fields["predicted_context"]
        features.register_hook(_scaled)
        return original(*arguments, **fields)

    _around(patch, objectives, "ObjectiveContext", change)


def _weight_gradient(patch: pytest.MonkeyPatch) -> None:
    """The gradient of one weight of every model is off by a factor."""
    for model in (Encoder, Predictor):
        original = model.load_public

        def change(self: Any, state: Any, original: Callable = original) -> None:
            original(self, state)
            blocks = self.blocks if isinstance(self, Encoder) else self.predictor_blocks
            blocks[5].mlp.fc1.weight.register_hook(_scaled)

        patch.setattr(model, "load_public", change)


def _weight_sign(patch: pytest.MonkeyPatch) -> None:
    """One weight of every model is loaded with the wrong sign."""
    for model in (Encoder, Predictor):
        original = model.load_public

        def change(self: Any, state: Any, original: Callable = original) -> None:
            original(self, state)
            with torch.no_grad():
                self.video_mod_embed.neg_()

        patch.setattr(model, "load_public", change)


def _encoder_levels(patch: pytest.MonkeyPatch) -> None:
    """The encoder's first two levels are swapped in what it returns."""

    def forward(self: Encoder, *arguments: Any, original: Callable, **options: Any) -> Tensor:
        result = original(self, *arguments, **options)
        if result.shape[-1] == self.config.width:
            return result
        first, second, *rest = result.chunk(len(self.norms_block), dim=-1)
        return torch.cat([second, first, *rest], dim=-1)

    patch.setattr(Encoder, "forward", functools.partialmethod(forward, original=Encoder.forward))


def _attention(change: Callable[[dict[str, Any]], None], gradient: bool = False) -> Plant:
    def plant(patch: pytest.MonkeyPatch) -> None:
        original = jepa_kernels.masked_attention

        def attention(*arguments: Any, **options: Any) -> Tensor:
            change(options)
            out = original(*arguments, **options)
            if gradient:
                out.register_hook(_scaled)
            return out

        patch.setattr(jepa_kernels, "masked_attention", attention)

    return plant


def _rotated_back(options: dict[str, Any]) -> None:
    """Positions counted from the other end turn the other way."""
    tokens = options["rope"].num_tokens
    options.update({name: tokens - 1 - options[name] for name in ("query_ids", "key_ids")})


def _one_id(options: dict[str, Any]) -> None:
    ids = options["key_ids"].clone()
    ids[0, 0] = (ids[0, 0] + 1) % options["rope"].num_tokens
    options["key_ids"] = ids


def _ascent(patch: pytest.MonkeyPatch) -> None:
    _around(patch, torch.optim, "AdamW", _maximised)


def _maximised(original: Callable, *arguments: Any, **options: Any) -> Any:
    return original(*arguments, **options, maximize=True)


def _no_decay(patch: pytest.MonkeyPatch) -> None:
    _around(
        patch, modules, "set_rates", lambda original, groups, rate, _: original(groups, rate, 0)
    )


def _no_average(patch: pytest.MonkeyPatch) -> None:
    _around(
        patch,
        modules,
        "update_ema",
        lambda original, target, online, _: original(target, online, 1),
    )


def _no_random_share(patch: pytest.MonkeyPatch) -> None:
    """The mixture with the uniform distribution is left out."""

    def change(original: Callable, motion: Any, block: Any, strength: float, _: float) -> Any:
        return original(motion, block, strength, 0.0)

    _around(patch, modules, "origin_probabilities", change)


def _transposed_weight(patch: pytest.MonkeyPatch) -> None:
    def change(original: Callable, self: Golden, key: str) -> Any:
        value = original(self, key)
        return value.T if key == "qkv_w" else value

    original = Golden.__getitem__
    patch.setattr(Golden, "__getitem__", lambda self, key: change(original, self, key))


_LOSS_FAULTS: dict[str, Plant] = {
    "sign": _target_sign,
    "dropped term": _dropped_objective,
    "swapped level": _target_levels,
    "wrong mask id": _mask_id,
}
_ATTENTION_FAULTS: dict[str, Plant] = {
    "sign": _attention(_rotated_back),
    "gradient": _attention(lambda options: None, gradient=True),
    "wrong mask id": _attention(_one_id),
}
_STATE = {"sign": _weight_sign}
_FORWARD = {**_STATE, "wrong mask id": _mask_id}
# By the beginning of a file's path below the golden folder; the longest that fits counts.
_FAULTS: dict[str, dict[str, Plant]] = {
    "objectives/": {**_LOSS_FAULTS, "gradient": _feature_gradient},
    "steps/": {**_LOSS_FAULTS, "gradient": _weight_gradient},
    "steps/init_state": _STATE,
    "modules/encoder_state": _STATE,
    "modules/predictor_state": _STATE,
    "modules/encoder_forward": {**_FORWARD, "swapped level": _encoder_levels},
    "modules/encoder_grads": {
        **_FORWARD,
        "swapped level": _encoder_levels,
        "gradient": _weight_gradient,
    },
    "modules/predictor_forward": _FORWARD,
    "modules/predictor_grads": {**_FORWARD, "gradient": _weight_gradient},
    "modules/rope_": _ATTENTION_FAULTS,
    # Nothing but inputs of the others.
    "modules/rope_hd32_weights": {"shape": _transposed_weight},
    "modules/rope_hd64_weights": {"shape": _transposed_weight},
    "modules/mask_distance": {"wrong mask id": _mask_id},
    "modules/motion_masking": {"dropped term": _no_random_share},
    "modules/ema": {"dropped term": _no_average},
    "modules/adamw": {"sign": _ascent, "dropped term": _no_decay},
}


def faults_of(path: Path) -> dict[str, Plant]:
    """The faults that have a meaning for a golden file, by name."""
    name = f"{path.parent.name}/{path.stem}"
    fitting = [prefix for prefix in _FAULTS if name.startswith(prefix)]
    return _FAULTS[max(fitting, key=len)]
