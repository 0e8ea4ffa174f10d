"""Two processes with FSDP2 shards: the teacher and AdamWEMA give what one process gives."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

from jepa_kernels import ema_update_
from jepa_kernels.nn import EMATeacher
from jepa_kernels.optim import AdamWEMA
from jepa_kernels.testing import FLOAT32, FLOAT32_DEEP

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(),
    reason="this torch has no gloo process group",
)
STEPS = 3


class Encoder(nn.Module):
    """A parameter of the root itself, one smaller than the world (an empty shard), and two sharded
    blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 6))
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.token
        for block in self.blocks:
            x = torch.tanh(block(x))
        self.seen.add_(1.0)
        return x


def build() -> Encoder:
    torch.manual_seed(5)
    return Encoder()


def run(encoder: Encoder, teacher: EMATeacher, fused: bool, backend: str | None) -> None:
    """A few steps in which the teacher's forward runs too, as in training."""
    optimizer = (
        AdamWEMA(encoder.parameters(), lr=1e-2, teacher=teacher, backend=backend)
        if fused
        else torch.optim.AdamW(encoder.parameters(), lr=1e-2)
    )
    for step in range(STEPS):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (encoder(x) - teacher(x)).square().add(0.1 * encoder(x)).mean().backward()
        optimizer.step()
        if not fused:
            teacher.update()


def whole(module: nn.Module) -> dict[str, torch.Tensor]:
    return {
        n: (t.full_tensor() if hasattr(t, "full_tensor") else t).detach()
        for n, t in module.state_dict().items()
    }


def worker(rank: int, folder: str, fused: bool, backend: str | None) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,))
        encoder = build()
        teacher = EMATeacher(encoder, 0.9, rounding="nearest", backend=backend)
        for module in (encoder, teacher.module):
            for block in module.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(module, mesh=mesh)
        run(encoder, teacher, fused, backend)
        lag = teacher.lag()
        for module in (encoder, teacher.module):
            module.reshard()
        results = {"encoder": whole(encoder), "teacher": whole(teacher.module), "lag": float(lag)}
        results["empty"] = min(p.to_local().numel() for p in encoder.parameters())
        results["refused"] = refusals(encoder, teacher)
        if rank == 0:
            torch.save(results, f"{folder}/results.pt")
        if rank == 1:
            torch.save(results["empty"], f"{folder}/empty.pt")
        dist.barrier()  # or one process may leave while the other's threads still talk to it
    finally:
        dist.destroy_process_group()


def refusals(encoder: Encoder, teacher: EMATeacher) -> list[str]:
    sentences = []
    targets, sources = list(teacher.module.parameters()), list(encoder.parameters())
    for call in (
        lambda: ema_update_([t.to_local() for t in targets], sources, 0.5),
        lambda: ema_update_(
            [t.full_tensor() for t in targets],
            [s.redistribute(placements=[torch.distributed.tensor.Replicate()]) for s in sources],
            0.5,
        ),
        lambda: EMATeacher(encoder),
    ):
        try:
            call()
            sentences.append("nothing was refused")
        except ValueError as error:
            sentences.append(str(error))
    return sentences


@pytest.mark.parametrize(("fused", "backend"), [(False, None), (True, None), (True, "reference")])
def test_shards_follow_as_one_process_does(tmp_path, fused, backend):
    context = torch.multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=worker, args=(rank, str(tmp_path), fused, backend))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(180)
    for process in processes:
        if process.is_alive():
            process.terminate()
    assert [p.exitcode for p in processes] == [0, 0]
    results = torch.load(tmp_path / "results.pt")
    assert torch.load(tmp_path / "empty.pt") == 0, (
        "the second rank was meant to hold an empty shard"
    )
    encoder = build()
    teacher = EMATeacher(encoder, 0.9)
    run(encoder, teacher, fused, None)
    for name, module in (("encoder", encoder), ("teacher", teacher.module)):
        for key, value in module.state_dict().items():
            torch.testing.assert_close(
                results[name][key], value, **FLOAT32, msg=lambda m, k=key: f"{k}: {m}"
            )
    assert results["lag"] == pytest.approx(float(teacher.lag()), rel=FLOAT32_DEEP["rtol"])
    plain, replicated, unsharded = results["refused"]
    assert "must be sharded like targets[0] (a plain tensor), got placements" in plain
    assert "must be sharded like targets[0]" in replicated
    assert "be copied before it is sharded" in unsharded
