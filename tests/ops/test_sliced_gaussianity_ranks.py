"""Two processes with a share of the rows each have the statistic and the gradients of one process
with all of them: under DDP and FSDP2, with shares of different sizes, and with an empty one."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

from jepa_kernels import native, sliced_gaussianity

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(),
    reason="this torch has no gloo process group",
)
# Relative error in the 2-norm.
LIMIT = {torch.float32: 1e-6, torch.float64: 1e-12}
SHARES = {"equal": (8, 8), "unequal": (5, 11), "empty": (0, 16)}
WRAPPERS = ("ddp", "fsdp2")


def build(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4)).to(dtype)


def data(dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(16, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(
        dtype
    )


def loss_of(features: torch.Tensor, group=None) -> torch.Tensor:
    backend = "cpu" if features.dtype == torch.float32 and native.available() else "torch"
    return sliced_gaussianity(features, 70, seed=3, group=group, backend=backend)


def worker(rank: int, folder: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        mesh, results = init_device_mesh("cpu", (2,)), {}
        for dtype in LIMIT:
            for share, sizes in SHARES.items():
                for wrapper in WRAPPERS:
                    model = build(dtype)
                    wrapped = model
                    if wrapper == "ddp":
                        wrapped = nn.parallel.DistributedDataParallel(model)
                    else:
                        fully_shard(model, mesh=mesh)
                    rows = data(dtype).split(sizes)[rank]
                    loss = loss_of(wrapped(rows), dist.group.WORLD)
                    loss.backward()
                    grads = [
                        p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
                        for p in model.parameters()
                    ]
                    results[str(dtype), share, wrapper] = [loss.detach(), *grads]
        counts = []
        dist_all_reduce = dist.all_reduce
        dist.all_reduce = lambda *a, **k: (counts.append(a[0].numel()), dist_all_reduce(*a, **k))
        loss_of(torch.randn(3, 4), dist.group.WORLD)
        results["all-reduces of a forward"] = counts
        dist.all_reduce = dist_all_reduce
        torch.save(results, f"{folder}/{rank}.pt")
        dist.barrier()  # or one process may leave while the other's threads still talk to it
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def of_two(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(worker, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_two_processes_are_one(of_two, dtype, share, wrapper):
    model = build(dtype)
    loss = loss_of(model(data(dtype)))
    loss.backward()
    expected = [loss.detach(), *(p.grad for p in model.parameters())]
    for result in of_two:
        for found, wanted in zip(result[str(dtype), share, wrapper], expected, strict=True):
            assert (found - wanted).norm() <= LIMIT[dtype] * wanted.norm()


def test_forward_talks_once(of_two):
    for result in of_two:
        assert result["all-reduces of a forward"] == [2 * 16 * 70 + 1]


def test_a_statistic_of_each_process_alone_is_another(of_two):
    """Without the all-reduce the test above would fail."""
    model, dtype = build(torch.float64), torch.float64
    whole = loss_of(model(data(dtype)))
    halves = [loss_of(model(rows)) for rows in data(dtype).split(8)]
    assert abs(sum(halves) / 2 - whole) > 1e-2 * whole
