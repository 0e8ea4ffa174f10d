"""What `auto` takes on a GPU that is not here, by committed preference."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from jepa_kernels import capability, explain, native, triton_runtime
from jepa_kernels.backend import OPS, resolve
from jepa_kernels.ops.masked_attention import flash
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


@pytest.fixture
def flash_has(monkeypatch):
    """Sets the libraries that the flash backend finds, by their place in its list."""

    def there(*places: int) -> None:
        found = tuple("" if i in places else "is not here" for i in range(len(flash.LIBRARIES)))
        monkeypatch.setattr(flash, "_kept_obstacles", lambda deterministic: found)

    return there


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_flash_attention_is_taken_where_it_is_there(generation, flash_has, monkeypatch, dtype):
    inputs = example(OP, "cuda", dtype)
    torchs_own = len(flash.LIBRARIES) - 1
    for found in ((9, 0), (10, 0), (10, 3), (11, 0)):
        generation(*found)
        for there in ((0, torchs_own), (1, torchs_own)):
            flash_has(*there)
            assert resolve(OP, inputs).name == "flash"
            assert resolve(OP, example(OP, "cuda", torch.float32)).name == "cuda"
            assert resolve(OP, replace(inputs, scale=-1.0)).name != "flash"
        # torch's own is FlashAttention 2, of the generation before: by name only.
        flash_has(torchs_own)
        assert resolve(OP, inputs).name == ("triton" if found == (9, 0) else "cuda")
        assert resolve(OP, inputs, "flash").name == "flash"
        flash_has()
        assert resolve(OP, inputs).name == ("triton" if found == (9, 0) else "cuda")
    for other in ((8, 0), (8, 9), (12, 0)):
        generation(*other)
        flash_has(0, 1, torchs_own)
        assert resolve(OP, inputs).name == "cuda"
    generation(10, 0)
    monkeypatch.setattr(native, "cuda_reason", lambda: "no nvcc")
    assert resolve(OP, inputs).name == "flash"


def test_explain_names_what_is_slower_than_flash(generation, flash_has):
    generation(9, 0)
    flash_has(1)
    with FakeTensorMode():
        x = torch.empty(1, 16, 2, 64, dtype=torch.bfloat16, device="cuda")
        text = explain("masked_attention", x, x, x)
    assert "triton     slower than flash here: FlashAttention 3 and 4 are written for" in text
    assert text.count("(by reading, no record yet)") == 2
    assert "runs on    flash (auto)" in text


def test_the_committed_table_follows_from_the_records(root):
    """`python -m benchmarks.preference_rows` writes it."""
    from benchmarks import preference_rows

    assert preference_rows.TABLE.read_text() == preference_rows.table()
    ops = {row["op"] for row in preference_rows.recorded()}
    assert ops <= OPS.keys()
    assert {"ema_update", "masked_attention", "rollout_gru"} & ops


def test_calibration_is_kept_read_and_bound_to_the_build(tmp_path, monkeypatch):
    """A short calibration: every case is measured, `auto` follows what was stored, and a stored
    one of another build is ignored."""
    from jepa_kernels import calibrate, preferences

    monkeypatch.setenv("JEPA_KERNELS_CACHE", str(tmp_path / "made"))
    slower = preferences.Preference(
        "masked_attention", preferences.device_kind("cpu"), "float32", "tiny", "cpu", "torch", "x"
    )
    monkeypatch.setattr(calibrate, "measure", lambda case, budget: [slower][: case.op is OP])
    small = [c for c in calibrate.cases("cpu") if c.size_class == "tiny"]
    monkeypatch.setattr(calibrate, "cases", lambda device: iter(small))
    try:
        text = calibrate.run(1.0, ("cpu",))
        assert "torch before cpu" in text
        assert preferences.calibration_file().is_relative_to(tmp_path / "made")
        x = torch.randn(1, 8, 2, 16)
        assert "runs on    torch" in explain("masked_attention", x, x, x)
        assert "cases calibrated" in preferences.summary()
        monkeypatch.setattr(native, "library_stamp", lambda: "another build")
        preferences.load()
        assert "runs on    cpu" in explain("masked_attention", x, x, x)
        assert "not calibrated" in preferences.summary()
        preferences.calibration_file().write_text("damaged")
        assert preferences.calibration() is None
    finally:
        monkeypatch.undo()
        preferences.load()


def test_calibration_is_below_the_cache_folder_unless_one_is_named(tmp_path, monkeypatch):
    from jepa_kernels.preferences import calibration_file

    monkeypatch.delenv("JEPA_KERNELS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert calibration_file() == tmp_path / "jepa_kernels" / "calibration.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert calibration_file() == tmp_path / ".cache" / "jepa_kernels" / "calibration.json"


def test_no_test_reads_what_this_user_calibrated(tmp_path):
    """Neither this process nor a child, wherever the user's cache is."""
    from jepa_kernels.preferences import calibration_file

    code = "from jepa_kernels.preferences import calibration_file; print(calibration_file())"
    child = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert child.stdout.strip() == str(calibration_file())
    assert not calibration_file().exists()


def test_calibration_measures_both_passes_and_updates(tmp_path):
    from jepa_kernels import calibrate

    by_op = {}
    for case in calibrate.cases("cpu"):
        if case.size_class == list(case.op.examples)[-1] and case.dtype == torch.float32:
            by_op[case.op.name] = case
    assert by_op.keys() == OPS.keys()
    for case in (by_op["masked_attention"], by_op["ema_update"], by_op["rollout_gru"]):
        assert len(calibrate.measure(case, 0.01)) <= 1
    with pytest.raises(ValueError, match="seconds must be positive, got 0"):
        calibrate.run(0)
