"""Two gloo processes do what one does with the doubled batch: DDP and FSDP2. What the processes run
is in two_processes.py."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile

import pytest
import torch
from safetensors.torch import load_file

from jepa.checkpoint import Checkpoints
from jepa.step import backward, global_denominators, loss_step, new_state, train_step
from jepa_kernels.testing import FLOAT32, FLOAT32_DEEP, FLOAT32_STORED
from tests.jepa.training_cases import joined
from tests.jepa.two_processes import VARIANTS, case_config, part

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

CASES = [f"{how}-{name}-1" for name in VARIANTS for how in ("ddp", "fsdp2")] + [
    "ddp-fwm_hw_ld-2",
    "fsdp2-fwm_hw_ld-2",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, root):
    """What two processes left behind."""
    place = tmp_path_factory.mktemp("two")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
    }
    command = [sys.executable, "-m", "tests.jepa.two_processes", str(place)]
    logs = [tempfile.TemporaryFile("w+") for _ in range(2)]  # noqa: SIM115 (read after the processes have ended)
    processes = [
        subprocess.Popen(
            command,
            cwd=root,
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        for rank, log in enumerate(logs)
    ]
    try:
        codes = [process.wait(timeout=420) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for log in logs:
        log.seek(0)
    assert codes == [0, 0], "\n".join(log.read()[-3000:] for log in logs)
    return place


@pytest.mark.parametrize("case", CASES)
def test_two_processes_give_the_loss_and_gradients_of_the_doubled_batch(folder, case):
    _, name, accumulate = case.split("-")
    found = load_file(folder / f"{case}.safetensors")
    cfg = case_config(name)
    torch.manual_seed(0)
    bundle = new_state(cfg).bundle
    batch = joined([part(seed, cfg.variant.pair_horizon) for seed in range(2 * int(accumulate))])
    loss, _ = loss_step(bundle, batch, cfg, global_denominators([batch]))
    backward(loss)
    assert found.pop("loss").item() == pytest.approx(loss.item(), rel=FLOAT32["rtol"])
    expected = {
        key: value.grad for key, value in bundle.named_parameters() if value.grad is not None
    }
    assert expected.keys() <= found.keys()
    if name != "baseline":
        assert any(key.startswith("heads.") for key in expected)
    for key, value in found.items():
        wanted = expected.get(key, torch.zeros_like(value))
        scale = max(wanted.abs().max().item(), 1e-3)
        assert (value - wanted).abs().max().item() <= FLOAT32["rtol"] * scale, key


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_two_clipped_steps_give_the_same_weights_and_teacher(folder, how):
    found = load_file(folder / f"{how}-updated.safetensors")
    cfg = case_config("fwm_hw_ld")
    cfg = type(cfg)(**{**cfg.__dict__, "clip_gradient": 0.5})
    torch.manual_seed(0)
    state = new_state(cfg)
    first = {k: v.clone() for k, v in state.bundle.target_encoder.state_dict().items()}
    for step in range(2):
        _, metrics = train_step(state, joined([part(2 * step), part(2 * step + 1)]))
    assert found.pop("norm").item() == pytest.approx(
        metrics["gradient_norm"].item(), rel=FLOAT32_DEEP["rtol"]
    )
    own = state.bundle.state_dict()
    assert found.keys() == own.keys()
    for key, value in own.items():
        # Adam divides by the root of tiny moments, so a weight whose gradient is rounding noise
        # moves freely within its learning rate.
        assert (found[key] - value).abs().mean().item() <= FLOAT32_STORED["atol"], key
    assert any(not torch.equal(first[k], own[f"target_encoder.{k}"]) for k in first)


def test_a_sharded_run_saves_whole_tensors_and_resumes_bitwise(folder):
    whole, parts = (Checkpoints(folder / name / "checkpoints") for name in ("fsdp2", "parts"))
    assert whole.steps()[-1] == parts.steps()[-1] == 3
    (model, moments, state), (again, moments_again, _) = whole.load(), parts.load()
    assert model.keys() == new_state(tiny(folder)).bundle.state_dict().keys()
    assert state["step"] == 3
    for one, other in ((model, again), (moments, moments_again)):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


def tiny(folder):
    from tests.jepa.run_cases import tiny_run

    return tiny_run(folder / "unused", name="fwm_hw_ld")
