"""The CUDA kernels of ema_update and adamw_ema on the SIMT executor: bit for bit the CPU's results, in every thread order, sanitized."""

from __future__ import annotations

import itertools
import shutil

import numpy as np
import pytest
import torch

from jepa_kernels import TeacherLists, adamw_ema_, ema_update_
from tests.ops.test_adamw_ema import HYPER
from tests.simt import ema_abi
from tests.simt.build import ORDERS, ROOT, build, configure, run_sanitized

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CHUNK = 2 * 256 * 8
ROUNDINGS = ("nearest", "kahan", "stochastic")


@pytest.fixture(scope="module")
def ema_library():
    return ema_abi.open_library(build("csrc/ema_update/cuda.cu"))


@pytest.fixture(scope="module")
def adamw_library():
    return ema_abi.open_library(build("csrc/adamw_ema/cuda.cu"))


def view(tensor: torch.Tensor) -> np.ndarray:
    """The same memory for NumPy; bfloat16 as its bits."""
    return (tensor.view(torch.int16).numpy().view(np.uint16) if tensor.dtype == torch.bfloat16 else tensor.numpy()).reshape(-1)


def draw(sizes, dtype, seed, shift=0):
    """Tensors whose memory starts `shift` elements after an aligned address."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size + shift, generator=generator).to(dtype)[shift:] for size in sizes]


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
        options = {"compensations": expected_lost} if rounding == "kahan" else {"seed": 2**33 + 5} if rounding == "stochastic" else {}
        ema_update_(expected, sources, momentum, copies=expected_copies, rounding=rounding, backend="reference", **options)
        entries = [
            ema_abi.ema_tensor(view(t), view(s), view(c), view(k) if rounding == "kahan" else None, index=n)
            for n, (t, s, c, k) in enumerate(zip(targets, sources, copies, lost, strict=True))
        ]
        error = ema_abi.ema_update(ema_library, entries, momentum, rounding=ROUNDINGS.index(rounding), seed=2**33 + 5)
        assert error is None, error
        assert all(torch.equal(a, e) for a, e in zip(targets, expected, strict=True)), (target, source)
        assert all(torch.equal(a, e) for a, e in zip(copies, expected_copies, strict=True)), (target, source, copy)
        assert rounding != "kahan" or all(torch.equal(a, e) for a, e in zip(lost, expected_lost, strict=True))
    configure(ema_library)


def test_momentum_and_seed_from_the_device(ema_library):
    targets, sources = draw((77,), torch.bfloat16, 0), draw((77,), torch.float32, 1)
    expected = [t.clone() for t in targets]
    ema_update_(expected, sources, 0.9, rounding="stochastic", seed=11, backend="reference")
    error = ema_abi.ema_update(
        ema_library, [ema_abi.ema_tensor(view(targets[0]), view(sources[0]))], 0.0, momentum_device=np.array([0.9]),
        rounding=ema_abi.STOCHASTIC, seed_device=np.array([11], np.int64),
    )  # fmt: skip
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


def adamw_lists(param, state, target, sizes, shift=0):
    lists = [draw(sizes, param, 0, shift), draw(sizes, param, 1), draw(sizes, state, 2), [t.abs() + 1e-3 for t in draw(sizes, state, 3)]]
    return lists, draw(sizes[:-1], target, 4, shift)


def adamw_entries(lists, targets, copies, lost, step_device=None):
    entries = []
    for i, arrays in enumerate(zip(*lists, strict=True)):
        teacher = ema_abi.ema_tensor(None)
        if i < len(targets):
            teacher = ema_abi.ema_tensor(view(targets[i]), None, view(copies[i]), None if lost is None else view(lost[i]), index=i)
        entries.append(ema_abi.adamw_tensor(*map(view, arrays), teacher, group=i % 2, step=4.0, step_device=step_device))
    return entries


@pytest.mark.parametrize("order", sorted(ORDERS))
@pytest.mark.parametrize(
    ("param", "state", "target", "rounding"),
    [
        (torch.float32, torch.float32, torch.float32, "nearest"),
        (torch.bfloat16, torch.float32, torch.bfloat16, "kahan"),
        (torch.float32, torch.bfloat16, torch.bfloat16, "stochastic"),
        (torch.float16, torch.float16, torch.float32, "nearest"),
    ],
)
def test_adamw_equals_the_cpu_kernel_bit_for_bit(adamw_library, order, param, state, target, rounding):
    configure(adamw_library, order, seed=5)
    lists, targets = adamw_lists(param, state, target, (1, 13, CHUNK + 21, 8), shift=int(rounding == "kahan"))
    lost = [torch.zeros_like(t) for t in targets] if rounding == "kahan" else None
    copies = [torch.full_like(t, torch.nan, dtype=torch.bfloat16) for t in targets]
    hyper = torch.tensor(HYPER, dtype=torch.float64)
    expected = [[t.clone() for t in v] for v in (*lists, targets, copies)]
    seed = 9 if rounding == "stochastic" else None
    teacher = TeacherLists(expected[4], 0.99, expected[5], rounding, None if lost is None else [t.clone() for t in lost], seed)
    adamw_ema_(*expected[:4], [torch.tensor(4.0)] * 4, hyper=hyper, groups=[0, 1, 0, 1], teacher=teacher, backend="cpu")
    error = ema_abi.adamw_ema(
        adamw_library, adamw_entries(lists, targets, copies, lost), hyper.numpy(), 0.99, rounding=ROUNDINGS.index(rounding), seed=seed or 0
    )
    assert error is None, error
    for name, actual, wanted in zip(
        ("param", "grad", "exp_avg", "exp_avg_sq", "target", "copy"), (*lists, targets, copies), expected, strict=True
    ):
        assert all(torch.equal(a, e) for a, e in zip(actual, wanted, strict=True)), name
    configure(adamw_library)


def test_scalars_on_the_device_and_a_skipped_step(adamw_library):
    hyper = np.array(HYPER)
    results = []
    for on_device, step in ((False, None), (False, np.float32([4.0])), (True, None), (True, np.float32([4.0]))):
        lists, targets = adamw_lists(torch.float32, torch.float32, torch.float32, (30, 5, 9))
        lists[1] = [8 * g for g in lists[1]]
        copies = [torch.empty_like(t) for t in targets]
        entries = adamw_entries(lists, targets, copies, None, step)
        before = [t.clone() for v in (*lists, targets) for t in v]
        assert ema_abi.adamw_ema(adamw_library, entries, hyper, 0.9, hyper_on_device=on_device, found_inf=np.float32([1.0])) is None
        assert all(torch.equal(a, b) for a, b in zip([t for v in (*lists, targets) for t in v], before, strict=True))
        error = ema_abi.adamw_ema(
            adamw_library, entries, hyper, 0.9, hyper_on_device=on_device, grad_scale=np.float32([8.0]), found_inf=np.float32([0.0])
        )
        assert error is None, error
        results.append([t for v in (lists[0], lists[2], lists[3], targets) for t in v])
    for other in results[1:]:
        assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-7) for a, b in zip(results[0], other, strict=True))
    lists, targets = adamw_lists(torch.float32, torch.float32, torch.float32, (30, 5, 9))
    adamw_ema_(
        *lists,
        [torch.tensor(4.0)] * 3,
        hyper=torch.tensor(HYPER, dtype=torch.float64),
        groups=[0, 1, 0],
        teacher=TeacherLists(targets, 0.9),
    )
    wanted = [t for v in (lists[0], lists[2], lists[3], targets) for t in v]
    assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-7) for a, b in zip(results[0], wanted, strict=True))


def test_a_planted_fault_is_noticed(tmp_path):
    """The same comparison with one sign of the kernel flipped."""
    for part in ("abi.h", "device.cuh", "ema_update"):
        source = ROOT / "csrc" / part
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / part)
    lanes = tmp_path / "ema_update" / "cuda_lanes.h"
    text = lanes.read_text()
    sound = "__fadd_rn(target, __fmul_rn(w.take, difference))"
    assert sound in text
    lanes.write_text(text.replace(sound, sound.replace("__fadd_rn", "__fsub_rn", 1)))
    library = ema_abi.open_library(build(tmp_path / "ema_update" / "cuda.cu"))
    target, source = draw((33,), torch.float32, 0)[0], draw((33,), torch.float32, 1)[0]
    expected = target + 0.25 * (source - target)
    assert ema_abi.ema_update(library, [ema_abi.ema_tensor(view(target), view(source))], 0.75) is None
    assert not torch.allclose(target, expected)


@pytest.mark.parametrize("op", ["ema_update", "adamw_ema"])
@pytest.mark.parametrize("sanitizer", ["asan_ubsan", "tsan"])
def test_sanitizers_find_nothing(op, sanitizer):
    library = build(f"csrc/{op}/cuda.cu", sanitizer)
    done = run_sanitized([str(ROOT / "tests" / "simt" / "ema_sanitized.py"), op, str(library)], sanitizer)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
