"""Golden modules: rotary attention, encoder, predictor, distances, motion maps, EMA, optimiser."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import jepa_kernels
from jepa.conformance.golden import Golden
from jepa.conformance.masks import pack, read_masks, unpack
from jepa.conformance.report import Report
from jepa.masks import MotionGuidance, motion_maps, origin_probabilities
from jepa.models.encoder import Encoder
from jepa.models.predictor import Predictor
from jepa.models.sizes import ModelConfig, PredictorConfig
from jepa.schedules import ScheduleConfig, parameter_groups, set_rates
from jepa.target import update_ema
from jepa_kernels import Rope3D
from jepa_kernels.rope3d import rope_dim

# The golden models: a dozen narrow blocks, grid 4 x 4 x 4 of a 64-pixel clip of 8 frames.
GOLDEN_GRID = (4, 4, 4)
GOLDEN_HEADS = 3


def golden_model(
    width: int, predictor_width: int, predictor_depth: int, mask_tokens: int
) -> ModelConfig:
    predictor = PredictorConfig(
        width=predictor_width, depth=predictor_depth, heads=GOLDEN_HEADS, mask_tokens=mask_tokens
    )
    return ModelConfig(
        width=width, depth=12, heads=GOLDEN_HEADS, level_blocks=(2, 5, 8, 11), predictor=predictor
    )


def check(golden: Golden, report: Report) -> None:
    """Compares one file of modules/; companions (weights of forwards) are read beside it."""
    for prefix, checker in _CHECKS.items():
        if golden.name.startswith(prefix):
            checker(golden, report)
            return
    report.miss("(file)", f"unknown file: {golden.name!r} is no module that is known here")


def _check_rope_weights(golden: Golden, report: Report) -> None:
    width = golden.integer("num_heads") * golden.integer("head_dim")
    shapes = {
        "qkv_w": (3 * width, width),
        "qkv_b": (3 * width,),
        "proj_w": (width, width),
        "proj_b": (width,),
    }
    for key, shape in shapes.items():
        report.equal(key, golden[key].shape, shape)


def _check_rope(golden: Golden, report: Report) -> None:
    """One attention layer with 3-D rotary positions, forward and backward."""
    weights = golden.beside(f"{golden.name.split('_')[0]}_{golden.name.split('_')[1]}_weights")
    names = ("qkv_w", "qkv_b", "proj_w", "proj_b")
    x = golden.tensor("x").requires_grad_()
    parameters = {name: weights.tensor(name).requires_grad_() for name in names}
    heads, head_dim = golden.integer("num_heads"), golden.integer("head_dim")
    side = golden.integer("pretrained_grid")
    rope = Rope3D(
        golden.triple("grid"),
        "interleaved",
        interpolate_from=side if bool(golden["interpolate_rope"]) else None,
    )
    report.equal("rot_dims", [rope_dim(head_dim)] * 3, [int(v) for v in golden["rot_dims"]])

    qkv = functional.linear(x, parameters["qkv_w"], parameters["qkv_b"]).unflatten(
        -1, (3, heads, head_dim)
    )
    query, key, value = qkv.unbind(2)
    ids = golden.tensor("ids").to(torch.int64)
    out = jepa_kernels.masked_attention(query, key, value, query_ids=ids, key_ids=ids, rope=rope)
    out = functional.linear(out.flatten(-2), parameters["proj_w"], parameters["proj_b"])
    report.compare("out", out, golden["out"])
    for name, tensor in {"q_rot": query, "k_rot": key}.items():
        report.compare(name, _rotated(tensor, ids, rope).transpose(1, 2), golden[name])
    (out * golden.tensor("cotangent")).sum().backward()
    report.gradient(golden, "x", x.grad)
    for name, parameter in parameters.items():
        report.gradient(golden, name, parameter.grad)


def _rotated(x: Tensor, ids: Tensor, rope: Rope3D) -> Tensor:
    """The rotation as `Rope3D.table` defines it, for [B, K, heads, head_dim]: what every backend
    must do inside its kernel."""
    steps, height, width = rope.grid
    cosine, sine = rope.table(x.shape[-1], x.device)
    rows = (ids // (height * width), steps + ids // width % height, steps + height + ids % width)
    cosine, sine = (
        torch.cat([table[row] for row in rows], dim=-1)[:, :, None] for table in (cosine, sine)
    )
    rotated, rest = x.split([cosine.shape[-1], x.shape[-1] - cosine.shape[-1]], dim=-1)
    even, odd = rotated[..., 0::2], rotated[..., 1::2]
    return torch.cat(
        [rotated * cosine + torch.stack([-odd, even], dim=-1).flatten(-2) * sine, rest], dim=-1
    )


def _check_encoder_state(golden: Golden, report: Report) -> None:
    """Names and shapes of the public state dict, loaded and given back."""
    state = {f"module.backbone.{key}": golden.tensor(key) for key in golden.names()}
    encoder = Encoder(golden_model(golden["img_mod_embed"].shape[-1], 24, 8, 6)).to(golden.dtype)
    encoder.load_public(state)
    _compare_state(golden, report, encoder)


def _compare_state(golden: Golden, report: Report, module: nn.Module) -> None:
    own = module.state_dict()
    report.equal("(names)", sorted(own), sorted(golden.names()))
    for key, value in own.items():
        report.compare(key, value, golden[key])


def _loaded_encoder(golden: Golden) -> Encoder:
    state = golden.beside("encoder_state")
    encoder = Encoder(golden_model(state["img_mod_embed"].shape[-1], 24, 8, 6)).to(golden.dtype)
    encoder.load_public({key: state.tensor(key) for key in state.names()})
    return encoder


def _check_encoder_forward(golden: Golden, report: Report) -> None:
    encoder = _loaded_encoder(golden)
    clips = golden.tensor("clip")
    masks = read_masks(golden, GOLDEN_GRID)
    shapes = [golden[f"z_enc_{j}"].shape for j in range(masks.num_sets)]
    with torch.no_grad():
        for j, part in enumerate(unpack(encoder(clips, masks), shapes)):
            report.compare(f"z_enc_{j}", part, golden[f"z_enc_{j}"])
            report.equal(f"cotangent_{j}", golden[f"cotangent_{j}"].shape, part.shape)
        report.compare("h_raw_full", encoder(clips), golden["h_raw_full"])
        report.compare("last_full", encoder(clips, levels="last"), golden["last_full"])
        report.compare("img_full", encoder(clips[:, :, :1].contiguous()), golden["img_full"])


def _check_encoder_grads(golden: Golden, report: Report) -> None:
    encoder, forward = _loaded_encoder(golden), golden.beside("encoder_forward")
    masks = read_masks(forward, GOLDEN_GRID)
    cotangent = pack([forward.tensor(f"cotangent_{j}") for j in range(masks.num_sets)])
    (encoder(forward.tensor("clip"), masks) * cotangent).sum().backward()
    _compare_gradients(golden, report, encoder)


def _compare_gradients(golden: Golden, report: Report, module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        report.gradient(golden, name, parameter.grad)
    absent = sorted(name for name, parameter in module.named_parameters() if parameter.grad is None)
    report.equal("no_grad_params", absent, sorted(str(name) for name in golden["no_grad_params"]))


def _loaded_predictor(golden: Golden) -> Predictor:
    state = golden.beside("predictor_state")
    predictor = _predictor_for(state)
    predictor.load_public({key: state.tensor(key) for key in state.names()})
    return predictor


def _predictor_for(state: Golden) -> Predictor:
    width, features = state["predictor_embed.0.weight"].shape
    depth = 1 + max(int(key.split(".")[1]) for key in state.names("predictor_blocks."))
    model = golden_model(
        width, state["video_mod_embed"].shape[-1], depth, len(state.names("mask_tokens."))
    )
    if model.feature_width != features:
        raise ValueError(
            f"conformance: predictor_embed.0.weight must take {model.feature_width} features, got "
            f"{features}."
        )
    return Predictor(model, shared_mask_token=True).to(state.dtype)


def _check_predictor_state(golden: Golden, report: Report) -> None:
    predictor = _predictor_for(golden)
    predictor.load_public({f"module.backbone.{key}": golden.tensor(key) for key in golden.names()})
    _compare_state(golden, report, predictor)


def _check_predictor_forward(golden: Golden, report: Report) -> None:
    predictor = _loaded_predictor(golden)
    masks = read_masks(golden, GOLDEN_GRID)
    sets = range(masks.num_sets)
    x = [golden.tensor(f"x_{j}").requires_grad_() for j in sets]
    cotangents = {
        kind: pack([golden.tensor(f"cotangent_{kind}_{j}") for j in sets])
        for kind in ("pred", "context")
    }
    for suffix in ("", "_image"):
        predicted, context = predictor(pack(x), masks, image=bool(suffix))
        for kind, rows in {"pred": predicted, "context": context}.items():
            expected = [golden[f"z_{kind}{suffix}_{j}"] for j in sets]
            for j, part in enumerate(unpack(rows, [array.shape for array in expected])):
                report.compare(f"z_{kind}{suffix}_{j}", part, expected[j])
        if not suffix:
            (
                (predicted * cotangents["pred"]).sum() + (context * cotangents["context"]).sum()
            ).backward()
            for j in sets:
                report.gradient(golden, f"x_{j}", x[j].grad)


def _check_predictor_grads(golden: Golden, report: Report) -> None:
    predictor, forward = _loaded_predictor(golden), golden.beside("predictor_forward")
    masks = read_masks(forward, GOLDEN_GRID)
    sets = range(masks.num_sets)
    predicted, context = predictor(pack([forward.tensor(f"x_{j}") for j in sets]), masks)
    loss = (predicted * pack([forward.tensor(f"cotangent_pred_{j}") for j in sets])).sum()
    loss = loss + (context * pack([forward.tensor(f"cotangent_context_{j}") for j in sets])).sum()
    loss.backward()
    _compare_gradients(golden, report, predictor)


def _check_mask_distance(golden: Golden, report: Report) -> None:
    for prefix, grid in {"g4_": (4, 4, 4), "g14_": (8, 14, 14)}.items():
        masks = read_masks(golden, grid, prefix)
        for j in range(masks.num_sets):
            report.compare(
                f"{prefix}dist_{j}",
                masks.context_distance[masks.context_set == j],
                golden[f"{prefix}dist_{j}"].ravel(),
            )


def _check_motion(golden: Golden, report: Report) -> None:
    """Motion maps and origin distributions with the published point sampling, with and without the
    wrong maximum."""
    clips = list(golden.tensor("clip").numpy())
    grid = golden["motion_map_batch4"].shape[1:]
    maps = {
        "batch": motion_maps(clips, grid, MotionGuidance(sampling="point", maximum="published")),
        "single": motion_maps(clips, grid, MotionGuidance(sampling="point", maximum="sample")),
    }
    report.compare("motion_map_batch4", maps["batch"], golden["motion_map_batch4"])
    report.compare("motion_map_single", maps["single"], golden["motion_map_single"])
    for key in golden.names():
        if not key.endswith("_block"):
            continue
        case = key.removesuffix("_block")
        mask = case.rsplit("_", 1)[0]
        block = golden.triple(key)
        room = [size - side + 1 for size, side in zip(grid, block, strict=True)]
        report.compare(
            f"{case}_origins",
            np.stack(np.unravel_index(np.arange(np.prod(room)), room), axis=1),
            golden[f"{case}_origins"],
        )
        strength, rate = golden.number(f"{mask}_strength"), golden.number(f"{mask}_random_rate")
        for kind, values in maps.items():
            for b in range(len(clips)):
                name = f"{case}_probs_{kind}_{b}"
                probabilities = origin_probabilities(values[b], block, strength, rate)
                report.compare(name, np.asarray(probabilities).ravel(), golden[name])


def _check_ema(golden: Golden, report: Report) -> None:
    schedules = {
        "const": ScheduleConfig(total_steps=20, momentum=0.99925, final_momentum=0.99925),
        "ramp": ScheduleConfig(total_steps=20, momentum=0.9, final_momentum=1.0),
    }
    for tag, schedule in schedules.items():
        leaves = [key.rsplit("_", 1)[1] for key in golden.names(f"{tag}_online_")]
        target, online = (
            nn.ParameterDict(
                {leaf: nn.Parameter(golden.tensor(f"{tag}_{kind}_{leaf}")) for leaf in leaves}
            )
            for kind in ("target0", "online")
        )
        momenta = [schedule.ema_momentum(step) for step in (1, 2, 3)]
        report.compare(f"{tag}_m", np.array(momenta), golden[f"{tag}_m"])
        for step, momentum in enumerate(momenta, start=1):
            update_ema(target, online, momentum)
            for leaf in leaves:
                report.compare(
                    f"{tag}_target{step}_{leaf}", target[leaf], golden[f"{tag}_target{step}_{leaf}"]
                )


class _Part(nn.Module):
    """A module whose parameters have the names of a golden optimiser file, dots and all."""

    def __init__(self, leaves: dict[str, Tensor]) -> None:
        super().__init__()
        for name, value in leaves.items():
            *path, last = name.split(".")
            owner: nn.Module = self
            for step in path:
                if step not in dict(owner.named_children()):
                    owner.add_module(step, nn.Module())
                owner = owner.get_submodule(step)
            owner.register_parameter(last, nn.Parameter(value))


def _check_adamw(golden: Golden, report: Report) -> None:
    """Groups, schedules and three updates, in the published configuration and with a decaying
    rate."""
    for tag in ("config", "decay"):
        names = [str(name) for name in golden[f"{tag}_param_names"]]
        parts = {
            part: _Part(
                {
                    n.removeprefix(f"{part}."): golden.tensor(f"{tag}_p0_{n}")
                    for n in names
                    if n.startswith(f"{part}.")
                }
            )
            for part in ("encoder", "predictor", "dyn_head")
        }
        groups = parameter_groups(
            {name: parts[name] for name in ("encoder", "predictor")}, [parts["dyn_head"]]
        )
        parameters = {
            f"{part}.{name}": value
            for part, module in parts.items()
            for name, value in module.named_parameters()
        }
        group_of = {
            id(value): index for index, group in enumerate(groups) for value in group["params"]
        }
        report.equal(
            f"{tag}_param_group",
            [group_of[id(parameters[n])] for n in names],
            [int(v) for v in golden[f"{tag}_param_group"]],
        )
        schedule = _read_schedule(golden, tag)
        steps = range(1, len(golden[f"{tag}_lr"]) + 1)
        report.compare(
            f"{tag}_lr",
            np.array([schedule.learning_rate(step) for step in steps]),
            golden[f"{tag}_lr"],
        )
        decay = [
            [schedule.decay(step) if group["decays"] else 0.0 for group in groups] for step in steps
        ]
        report.compare(
            f"{tag}_weight_decay_per_group",
            np.array(decay),
            golden[f"{tag}_weight_decay_per_group"],
        )
        _compare_updates(golden, report, tag, schedule, groups, parameters)


def _read_schedule(golden: Golden, tag: str) -> ScheduleConfig:
    def read(name: str) -> float:
        return golden.number(f"{tag}_cfg_{name}")

    per_epoch = read("iterations_per_epoch")
    return ScheduleConfig(
        total_steps=int(read("num_epochs") * per_epoch),
        warmup_steps=int(read("warmup") * per_epoch),
        initial_rate=read("start_lr"),
        rate=read("ref_lr"),
        final_rate=read("final_lr"),
        weight_decay=read("wd"),
        final_weight_decay=read("final_wd"),
        decay_scale=read("ipe_scale"),
    )


def _compare_updates(
    golden: Golden,
    report: Report,
    tag: str,
    schedule: ScheduleConfig,
    groups: list[dict[str, Any]],
    parameters: dict[str, nn.Parameter],
) -> None:
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.999), eps=1e-8, fused=True)
    for step in (1, 2, 3):
        set_rates(optimizer.param_groups, schedule.learning_rate(step), schedule.decay(step))
        for name, parameter in parameters.items():
            key = f"{tag}_g{step}_{name}"
            parameter.grad = golden.tensor(key) if key in golden else None
        optimizer.step()
        for name, parameter in parameters.items():
            report.compare(f"{tag}_p{step}_{name}", parameter, golden[f"{tag}_p{step}_{name}"])


Check = Callable[[Golden, Report], None]


def _rope_file(golden: Golden, report: Report) -> None:
    (_check_rope_weights if golden.name.endswith("_weights") else _check_rope)(golden, report)


_CHECKS: dict[str, Check] = {
    "rope_hd": _rope_file,
    "encoder_state": _check_encoder_state,
    "encoder_forward": _check_encoder_forward,
    "encoder_grads": _check_encoder_grads,
    "predictor_state": _check_predictor_state,
    "predictor_forward": _check_predictor_forward,
    "predictor_grads": _check_predictor_grads,
    "mask_distance": _check_mask_distance,
    "motion_masking": _check_motion,
    "ema": _check_ema,
    "adamw": _check_adamw,
}
