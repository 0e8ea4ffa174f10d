"""One process or many: nothing to configure for one; torchrun's variables for several. No process
group exists without need."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from jepa.config import ConfigError
from jepa.models.blocks import Block
from jepa.step import ModelBundle

Wrapper = Literal["auto", "none", "ddp", "fsdp2"]


@dataclass(frozen=True)
class World:
    """This process's place. `reduce` sums a tensor over all ranks (None for one process); `owner`
    says whether `start` made the group."""

    rank: int
    size: int
    device: torch.device
    reduce: Callable[[Tensor], Tensor] | None
    owner: bool = False

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


def start(device: str = "auto") -> World:
    """Joins the processes that torchrun started; a single process stays alone."""
    size, rank, local = (
        int(os.environ.get(name, default))
        for name, default in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0))
    )
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    place = torch.device(f"cuda:{local}") if kind == "cuda" else torch.device(kind)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if size == 1:
        return World(0, 1, place, None)
    owner = not dist.is_initialized()
    if owner:
        dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
    return World(rank, size, place, summed, owner)


def stop(world: World) -> None:
    """Leaves the process group, unless the caller of `start` had joined it before."""
    if world.owner:
        dist.destroy_process_group()


def summed(value: Tensor) -> Tensor:
    """The sum of a tensor over all ranks, in a new tensor."""
    total = value.detach().clone()
    dist.all_reduce(total)
    return total


def wrap(bundle: ModelBundle, world: World, how: Wrapper) -> nn.Module | None:
    """The data-parallel wrapper to call instead of the bundle, or None for one process.

    FSDP2 shards the blocks of encoder and predictor, and the target encoder alike, so that the EMA
    works on matching local shards. The optimiser must be built after this, since it has to hold the
    shards.
    """
    if world.size == 1:
        if how in ("ddp", "fsdp2"):
            raise ConfigError(
                "config: distributed must be 'auto' or 'none' for one process (start several "
                f"with torchrun), got {how!r}."
            )
        return None
    if how == "none":
        raise ConfigError(
            f"config: distributed must be 'auto', 'ddp' or 'fsdp2' for {world.size} processes, "
            "got 'none'."
        )
    if how == "fsdp2":
        return _sharded(bundle, world)
    from torch.nn.parallel import DistributedDataParallel

    # The image path and unused mask tokens get no gradient in a step of videos.
    devices = [world.device] if world.device.type == "cuda" else None
    return DistributedDataParallel(
        bundle, device_ids=devices, broadcast_buffers=False, find_unused_parameters=True
    )


def _sharded(bundle: ModelBundle, world: World) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(world.device.type, (world.size,))
    for part in (bundle.context_encoder, bundle.predictor, bundle.target_encoder):
        if part is None:
            continue
        # Sharded again after every forward, the outermost ones too: between steps the EMA, the
        # optimiser and checkpoints see shards only.
        for block in [module for module in part.modules() if isinstance(module, Block)]:
            fully_shard(block, mesh=mesh, reshard_after_forward=True)
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
    # Heads belong to the outermost group: objectives read their weights without calling them.
    fully_shard(bundle, mesh=mesh, reshard_after_forward=True)
    return bundle
