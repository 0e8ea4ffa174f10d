"""What `auto` takes on a GPU that is not here, by committed preference."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from jepa_kernels import capability, explain, native, triton_runtime
from jepa_kernels.backend import OPS, resolve
from jepa_kernels.support import example

OP = OPS["masked_attention"]


@pytest.fixture
def generation(monkeypatch):
    """Sets the compute capability of the GPU that is pretended, with both kernels there."""
    monkeypatch.setattr(native, "cuda_reason", lambda: None)
    monkeypatch.setattr(triton_runtime, "installed", lambda: True)
    monkeypatch.setattr(triton_runtime, "interpreting", lambda: False)
    return lambda *found: monkeypatch.setattr(capability, "_first_device", lambda: found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_hopper_prefers_triton_in_16_bits(generation, monkeypatch, dtype):
    inputs = example(OP, "cuda", dtype)
    generation(9, 0)
    assert resolve(OP, inputs).name == "triton"
    assert resolve(OP, example(OP, "cuda", torch.float32)).name == "cuda"
    assert resolve(OP, inputs, "cuda").name == "cuda", "what is asked for by name runs"
    for other in ((8, 0), (10, 0), (12, 0)):
        generation(*other)
        assert resolve(OP, inputs).name == "cuda"
    generation(9, 0)
    monkeypatch.setattr(triton_runtime, "installed", lambda: False)
    assert resolve(OP, inputs).name == "cuda", (
        "a preference for what is not there holds nothing back"
    )


def test_explain_says_that_no_record_is_there_yet(generation):
    generation(9, 0)
    with FakeTensorMode():
        x = torch.empty(1, 16, 2, 64, dtype=torch.bfloat16, device="cuda")
        text = explain("masked_attention", x, x, x)
    assert "cuda       slower than triton here: triton uses this GPU's own matrix" in text
    assert "(by reading, no record yet)" in text
    assert "runs on    triton (auto)" in text
