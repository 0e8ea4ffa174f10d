"""Calls on the meta device and under another default device behave as torch's own do."""

from __future__ import annotations

import pytest
import torch

from jepa_kernels import (
    ResidualMLP,
    ema_update_,
    latent_rollout,
    masked_attention,
    sliced_gaussianity,
    visible_patch_embed,
)
from jepa_kernels.nn import EMATeacher
from jepa_kernels.optim import AdamWEMA


def test_meta_calls_give_shapes():
    x = torch.randn(1, 4, 2, 8, device="meta")
    out = masked_attention(x, x, x)
    assert out.device.type == "meta" and out.shape == x.shape and out.dtype == x.dtype
    head = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.GELU(), torch.nn.Linear(4, 8)).to(
        "meta"
    )
    states = torch.randn(5, 8, device="meta")
    out = latent_rollout(states, ResidualMLP.from_module(head), 3)
    assert out.device.type == "meta" and out.shape == (3, 5, 8)
    out = sliced_gaussianity(states, 7)
    assert out.device.type == "meta" and out.shape == () and out.dtype == torch.float32
    clip, weight = (torch.randn(n, 3, 2, 8, 8, device="meta") for n in (4, 6))
    out = visible_patch_embed(clip, weight, mean=(0.5,) * 3)
    assert out.device.type == "meta" and out.shape == (4, 1, 6)


@pytest.fixture
def meta_by_default():
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


def test_a_default_device_is_not_that_of_the_arguments(meta_by_default):
    targets, sources = [torch.zeros(2, device="cpu")], [torch.ones(2, device="cpu")]
    ema_update_(targets, sources, 0.5)
    assert targets[0].tolist() == [0.5, 0.5]
    half = [torch.zeros(2, device="cpu", dtype=torch.bfloat16)]
    ema_update_(half, sources, 0.5, rounding="stochastic", seed=3)
    assert half[0].tolist() == [0.5, 0.5]
    x = torch.randn(1, 4, 2, 8, device="cpu", generator=torch.Generator("cpu"))
    assert masked_attention(x, x, x).isfinite().all()
    assert sliced_gaussianity(x[0, :, 0], 7).isfinite()
    clip = torch.ones(1, 3, 2, 4, 4, device="cpu")
    embedded = visible_patch_embed(clip.byte(), clip[..., :2, :2], mean=(0.5,) * 3)
    assert embedded.shape == (1, 4, 1) and embedded.isfinite().all()


@pytest.mark.parametrize("capturable", [False, True])
def test_teacher_and_optimizer_under_a_default_device(meta_by_default, capturable):
    student = torch.nn.Linear(3, 3, device="cpu")
    teacher = EMATeacher(student, 0.5)
    optimizer = AdamWEMA(student.parameters(), teacher=teacher, capturable=capturable)
    for _ in range(2):
        student(torch.ones(1, 3, device="cpu")).sum().backward()
        optimizer.step()
    assert teacher.num_updates == 2
    assert not torch.equal(teacher.module.weight, student.weight)
    assert teacher.state_dict()["_extra_state"].device.type == "cpu"
