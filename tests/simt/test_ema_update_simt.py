"""The CUDA kernel of ema_update on the SIMT executor: bit for bit the reference, in every thread
order, sanitized."""

from __future__ import annotations

import itertools
import shutil

import numpy as np
import pytest
import torch

from jepa_kernels import ema_update_
from tests.simt import ema_abi
from tests.simt.build import ORDERS, ROOT, build, configure, run_sanitized
from tests.simt.ema_lists import CHUNK, DTYPES, ROUNDINGS, draw, view


@pytest.fixture(scope="module")
def ema_library():
    return ema_abi.open_library(build("csrc/ema_update/cuda/launch.cu"))


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("order", sorted(ORDERS))
def test_ema_equals_the_reference_bit_for_bit(ema_library, rounding, order):
    configure(ema_library, order, seed=3)
    sizes = (1, 8, 13, CHUNK + 21)
    for i, (target, source) in enumerate(itertools.product(DTYPES, DTYPES)):
        if rounding == "stochastic" and target == torch.float16:
            continue
        shift, momentum, copy = i % 2, (0.3, 0.99925)[i % 2], DTYPES[i % 3]
        targets, sources = draw(sizes, target, i, shift), draw(sizes, source, i + 50)
        lost = [1e-3 * t for t in draw(sizes, target, i + 70, shift)]
        copies = [torch.full_like(t, torch.nan, dtype=copy) for t in targets]
        expected, expected_lost = [t.clone() for t in targets], [t.clone() for t in lost]
        expected_copies = [torch.empty_like(c) for c in copies]
        options = (
            {"compensations": expected_lost}
            if rounding == "kahan"
            else {"seed": 2**33 + 5}
            if rounding == "stochastic"
            else {}
        )
        ema_update_(
            expected,
            sources,
            momentum,
            copies=expected_copies,
            rounding=rounding,
            backend="reference",
            **options,
        )
        entries = [
            ema_abi.ema_tensor(
                view(t), view(s), view(c), view(k) if rounding == "kahan" else None, index=n
            )
            for n, (t, s, c, k) in enumerate(zip(targets, sources, copies, lost, strict=True))
        ]
        error = ema_abi.ema_update(
            ema_library, entries, momentum, rounding=ROUNDINGS.index(rounding), seed=2**33 + 5
        )
        assert error is None, error
        assert all(torch.equal(a, e) for a, e in zip(targets, expected, strict=True)), (
            target,
            source,
        )
        assert all(torch.equal(a, e) for a, e in zip(copies, expected_copies, strict=True)), (
            target,
            source,
            copy,
        )
        assert rounding != "kahan" or all(
            torch.equal(a, e) for a, e in zip(lost, expected_lost, strict=True)
        )
    configure(ema_library)


def test_momentum_and_seed_from_the_device(ema_library):
    targets, sources = draw((77,), torch.bfloat16, 0), draw((77,), torch.float32, 1)
    expected = [t.clone() for t in targets]
    ema_update_(expected, sources, 0.9, rounding="stochastic", seed=11, backend="reference")
    error = ema_abi.ema_update(
        ema_library,
        [ema_abi.ema_tensor(view(targets[0]), view(sources[0]))],
        0.0,
        momentum_device=np.array([0.9]),
        rounding=ema_abi.STOCHASTIC,
        seed_device=np.array([11], np.int64),
    )
    assert error is None and torch.equal(targets[0], expected[0])


@pytest.mark.parametrize("count", [3, 48, 49, 480])
def test_lists_of_any_length(ema_library, count):
    """Small and large argument structs, and more launches than one; empty tensors in between."""
    sizes = [0 if i % 7 == 3 else 1 + i % 5 for i in range(count)]
    targets, sources = draw(sizes, torch.float32, 0), draw(sizes, torch.float32, 1)
    expected = [t + 0.25 * (s - t) for t, s in zip(targets, sources, strict=True)]
    entries = [ema_abi.ema_tensor(view(t), view(s)) for t, s in zip(targets, sources, strict=True)]
    assert ema_abi.ema_update(ema_library, entries, 0.75) is None
    assert all(torch.equal(t, e) for t, e in zip(targets, expected, strict=True))
    assert ema_abi.ema_update(ema_library, [], 0.75) is None
    assert b"momentum must be from 0 to 1" in ema_abi.ema_update(ema_library, entries, float("nan"))


def test_a_planted_fault_is_noticed(tmp_path):
    """The same comparison with one sign of the kernel flipped."""
    shutil.copytree(ROOT / "csrc", tmp_path, dirs_exist_ok=True)
    lanes = tmp_path / "ema_update" / "cuda" / "lanes.h"
    text = lanes.read_text()
    sound = "__fadd_rn(target, __fmul_rn(w.take, difference))"
    assert sound in text
    lanes.write_text(text.replace(sound, sound.replace("__fadd_rn", "__fsub_rn", 1)))
    library = ema_abi.open_library(build(tmp_path / "ema_update" / "cuda" / "launch.cu"))
    target, source = draw((33,), torch.float32, 0)[0], draw((33,), torch.float32, 1)[0]
    expected = target + 0.25 * (source - target)
    assert (
        ema_abi.ema_update(library, [ema_abi.ema_tensor(view(target), view(source))], 0.75) is None
    )
    assert not torch.allclose(target, expected)


@pytest.mark.parametrize("sanitizer", ["asan_ubsan", "tsan"])
def test_sanitizers_find_nothing(sanitizer):
    library = build("csrc/ema_update/cuda/launch.cu", sanitizer)
    done = run_sanitized(
        [str(ROOT / "tests" / "simt" / "ema_sanitized.py"), "ema_update", str(library)], sanitizer
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
