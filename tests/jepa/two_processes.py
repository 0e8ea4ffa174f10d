"""Run by test_distributed.py under torchrun's variables: one of two gloo processes. Prints nothing;
writes FOLDER/<case>.safetensors.

RANK=.. WORLD_SIZE=2 MASTER_ADDR=.. MASTER_PORT=.. python -m tests.jepa.two_processes FOLDER
"""

from __future__ import annotations

import faulthandler
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from jepa import distributed, pretrain
from jepa.batch import Batch
from jepa.checkpoint import whole
from jepa.step import (
    backward,
    build_optimizer,
    global_denominators,
    loss_step,
    new_state,
    train_step,
)
from tests.jepa.run_cases import tiny_run
from tests.jepa.training_cases import make_batch, step_config

VARIANTS = ("baseline", "ld", "fwm_hw_ld", "fwm_hw_ld_far", "hamiltonian_far")
FAR = 3  # steps that a `_far` case rolls out


def case_config(name: str):
    base = name.removesuffix("_far")
    # Orthogonality is a property of one process's features by design, so it has no part in a
    # comparison of sums.
    own = {"orthogonality": {"weight": 0.0}} if base == "fwm_hw_ld" else {}
    if name != base:
        own["hamiltonian" if base == "hamiltonian" else "latent_dynamics"] = {"horizon": FAR}
    return step_config(base, variant={"objectives": own})


def part(seed: int, horizon: int = 1) -> Batch:
    return make_batch(batch_size=2, seed=seed, horizon=horizon)


def gradients(
    name: str, how: str, world: distributed.World, accumulate: int
) -> dict[str, torch.Tensor]:
    """Loss and every gradient of a step whose global batch is parts 0 .. 2*accumulate-1."""
    cfg = case_config(name)
    torch.manual_seed(0)
    state = new_state(cfg)
    module = distributed.wrap(state.bundle, world, how)
    batches = [
        part(world.rank * accumulate + i, cfg.variant.pair_horizon) for i in range(accumulate)
    ]
    denominators = global_denominators(batches, world.reduce, world.size)
    total = torch.zeros(())
    for batch in batches:
        loss, _ = loss_step(module, batch, cfg, denominators)
        backward(loss, world.size)
        total = total + loss.detach()
    found = {"loss": world.reduce(total)}
    for key, value in state.bundle.named_parameters():
        if value.grad is not None:
            found[key] = whole(value.grad).clone().contiguous()
    return found


def updated(name: str, how: str, world: distributed.World) -> dict[str, torch.Tensor]:
    """Norm and weights (teacher included) after two clipped steps."""
    cfg = case_config(name)
    cfg = type(cfg)(**{**cfg.__dict__, "clip_gradient": 0.5})
    torch.manual_seed(0)
    state = new_state(cfg)
    state.reduce, state.ranks = world.reduce, world.size
    state.wrapped = distributed.wrap(state.bundle, world, how)
    state.optimizer = build_optimizer(state.bundle, cfg)
    for step in range(2):
        _, metrics = train_step(state, part(2 * step + world.rank))
    assert type(metrics["gradient_norm"]) is torch.Tensor
    return {
        "norm": metrics["gradient_norm"],
        **{k: whole(v).clone() for k, v in state.bundle.state_dict().items()},
    }


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(400, exit=True)
    world = distributed.start("cpu")
    cases = {}
    for name in VARIANTS:
        for how in ("ddp", "fsdp2"):
            cases[f"{how}-{name}-1"] = gradients(name, how, world, 1)
    cases["ddp-fwm_hw_ld-2"] = gradients("fwm_hw_ld", "ddp", world, 2)
    cases["fsdp2-fwm_hw_ld-2"] = gradients("fwm_hw_ld", "fsdp2", world, 2)
    for how in ("ddp", "fsdp2"):
        cases[f"{how}-updated"] = updated("fwm_hw_ld", how, world)
    if world.leads:
        for name, values in cases.items():
            save_file(
                {k: v.detach().contiguous() for k, v in values.items()},
                folder / f"{name}.safetensors",
            )
    # Whole runs: sharded, saved as whole tensors, and gone on with from the first step's
    # checkpoint.
    for how, stop in (("fsdp2", 3), ("parts", 1), ("parts", 3)):
        cfg = tiny_run(
            folder / how, steps=stop, name="fwm_hw_ld", batch_size=1, distributed="fsdp2"
        )
        pretrain.run(cfg)
    distributed.stop(world)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
