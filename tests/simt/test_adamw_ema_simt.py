"""The CUDA kernel of adamw_ema on the SIMT executor: bit for bit the CPU kernel, in every thread
order, sanitized."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from jepa_kernels import TeacherLists, adamw_ema_
from jepa_kernels.testing import FLOAT32_SHORT
from tests.ops.test_adamw_ema import HYPER
from tests.simt import ema_abi
from tests.simt.build import ORDERS, ROOT, build, configure, run_sanitized
from tests.simt.ema_lists import CHUNK, ROUNDINGS, draw, view


@pytest.fixture(scope="module")
def adamw_library():
    return ema_abi.open_library(build("csrc/adamw_ema/cuda/launch.cu"))


def adamw_lists(param, state, target, sizes, shift=0):
    lists = [
        draw(sizes, param, 0, shift),
        draw(sizes, param, 1),
        draw(sizes, state, 2),
        [t.abs() + 1e-3 for t in draw(sizes, state, 3)],
    ]
    return lists, draw(sizes[:-1], target, 4, shift)


def adamw_entries(lists, targets, copies, lost, step_device=None):
    entries = []
    for i, arrays in enumerate(zip(*lists, strict=True)):
        teacher = ema_abi.ema_tensor(None)
        if i < len(targets):
            teacher = ema_abi.ema_tensor(
                view(targets[i]),
                None,
                view(copies[i]),
                None if lost is None else view(lost[i]),
                index=i,
            )
        entries.append(
            ema_abi.adamw_tensor(
                *map(view, arrays), teacher, group=i % 2, step=4.0, step_device=step_device
            )
        )
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
def test_adamw_equals_the_cpu_kernel_bit_for_bit(
    adamw_library, order, param, state, target, rounding
):
    configure(adamw_library, order, seed=5)
    lists, targets = adamw_lists(
        param, state, target, (1, 13, CHUNK + 21, 8), shift=int(rounding == "kahan")
    )
    lost = [torch.zeros_like(t) for t in targets] if rounding == "kahan" else None
    copies = [torch.full_like(t, torch.nan, dtype=torch.bfloat16) for t in targets]
    hyper = torch.tensor(HYPER, dtype=torch.float64)
    expected = [[t.clone() for t in v] for v in (*lists, targets, copies)]
    seed = 9 if rounding == "stochastic" else None
    teacher = TeacherLists(
        expected[4],
        0.99,
        expected[5],
        rounding,
        None if lost is None else [t.clone() for t in lost],
        seed,
    )
    adamw_ema_(
        *expected[:4],
        [torch.tensor(4.0)] * 4,
        hyper=hyper,
        groups=[0, 1, 0, 1],
        teacher=teacher,
        backend="cpu",
    )
    error = ema_abi.adamw_ema(
        adamw_library,
        adamw_entries(lists, targets, copies, lost),
        hyper.numpy(),
        0.99,
        rounding=ROUNDINGS.index(rounding),
        seed=seed or 0,
    )
    assert error is None, error
    for name, actual, wanted in zip(
        ("param", "grad", "exp_avg", "exp_avg_sq", "target", "copy"),
        (*lists, targets, copies),
        expected,
        strict=True,
    ):
        assert all(torch.equal(a, e) for a, e in zip(actual, wanted, strict=True)), name
    configure(adamw_library)


def test_scalars_on_the_device_and_a_skipped_step(adamw_library):
    hyper = np.array(HYPER)
    results = []
    for on_device, step in (
        (False, None),
        (False, np.float32([4.0])),
        (True, None),
        (True, np.float32([4.0])),
    ):
        lists, targets = adamw_lists(torch.float32, torch.float32, torch.float32, (30, 5, 9))
        lists[1] = [8 * g for g in lists[1]]
        copies = [torch.empty_like(t) for t in targets]
        entries = adamw_entries(lists, targets, copies, None, step)
        before = [t.clone() for v in (*lists, targets) for t in v]
        assert (
            ema_abi.adamw_ema(
                adamw_library,
                entries,
                hyper,
                0.9,
                hyper_on_device=on_device,
                found_inf=np.float32([1.0]),
            )
            is None
        )
        assert all(
            torch.equal(a, b)
            for a, b in zip([t for v in (*lists, targets) for t in v], before, strict=True)
        )
        error = ema_abi.adamw_ema(
            adamw_library,
            entries,
            hyper,
            0.9,
            hyper_on_device=on_device,
            grad_scale=np.float32([8.0]),
            found_inf=np.float32([0.0]),
        )
        assert error is None, error
        results.append([t for v in (lists[0], lists[2], lists[3], targets) for t in v])
    for other in results[1:]:
        assert all(
            torch.allclose(a, b, **FLOAT32_SHORT) for a, b in zip(results[0], other, strict=True)
        )
    lists, targets = adamw_lists(torch.float32, torch.float32, torch.float32, (30, 5, 9))
    adamw_ema_(
        *lists,
        [torch.tensor(4.0)] * 3,
        hyper=torch.tensor(HYPER, dtype=torch.float64),
        groups=[0, 1, 0],
        teacher=TeacherLists(targets, 0.9),
    )
    wanted = [t for v in (lists[0], lists[2], lists[3], targets) for t in v]
    assert all(
        torch.allclose(a, b, **FLOAT32_SHORT) for a, b in zip(results[0], wanted, strict=True)
    )


@pytest.mark.parametrize("sanitizer", ["asan_ubsan", "tsan"])
def test_sanitizers_find_nothing(sanitizer):
    library = build("csrc/adamw_ema/cuda/launch.cu", sanitizer)
    done = run_sanitized(
        [str(ROOT / "tests" / "simt" / "ema_sanitized.py"), "adamw_ema", str(library)], sanitizer
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
