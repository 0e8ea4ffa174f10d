"""The Triton kernel of ema_update under the interpreter: bit for bit the reference."""

from __future__ import annotations

import itertools

import pytest
import torch

from jepa_kernels import ema_update_
from jepa_kernels.ops.ema import triton_table
from jepa_kernels.ops.ema_update import triton as backend
from jepa_kernels.testing import BFLOAT16_ROUNDED, FLOAT32_SHORT

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCK = 2048  # of the kernel, which cannot be imported before the interpreter is chosen
SIZES = ((3,), (0, 2), (BLOCK + 5,), ())


def _lists(target, source, rounding):
    generator = torch.Generator().manual_seed(3)
    targets = [torch.randn(size, generator=generator).to(target) for size in SIZES]
    options = {"rounding": rounding}
    if rounding == "kahan":
        options["compensations"] = [
            (1e-3 * torch.randn(size, generator=generator)).to(target) for size in SIZES
        ]
    if rounding == "stochastic":
        options["seed"] = 2**40 + 17
    return targets, [(t.float() * 1.05).to(source) for t in targets], options


@pytest.mark.parametrize("rounding", ["nearest", "kahan", "stochastic"])
@pytest.mark.parametrize("momentum", [0.2, 0.999, 1.0])
def test_ema_equals_the_reference_bit_for_bit(rounding, momentum):
    for (target, source), copy in zip(
        itertools.product(DTYPES, DTYPES), itertools.cycle((None, *DTYPES)), strict=False
    ):
        if rounding == "stochastic" and target == torch.float16:
            continue
        results = []
        for name in ("reference", "triton"):
            targets, sources, options = _lists(target, source, rounding)
            if copy is not None:
                options["copies"] = [torch.full_like(t, torch.nan, dtype=copy) for t in targets]
            ema_update_(targets, sources, momentum, backend=name, **options)
            results.append(
                [*targets, *options.get("compensations", []), *options.get("copies", [])]
            )
        for i, (expected, actual) in enumerate(zip(*results, strict=True)):
            assert torch.equal(actual, expected), (
                f"tensor {i} of {target} from {source}, copy {copy}"
            )


def test_ema_of_mixed_dtypes_strides_and_ties():
    """One launch for each combination of dtypes; addresses off 16 bytes; a tied target moves
    once."""
    base = torch.randn(9, 8)
    targets = [
        base[0].clone(),
        base.flatten()[1:6].clone().bfloat16(),
        base.clone().t(),
        base.flatten()[3:8].clone(),
    ]
    sources = [torch.ones(8), torch.ones(5, dtype=torch.float16), torch.ones(8, 9), torch.ones(5)]
    wanted = [0.75 * t.double() + 0.25 for t in targets]
    ema_update_([*targets, targets[0]], [*sources, sources[0]], 0.75, backend="triton")
    for target, expected in zip(targets, wanted, strict=True):
        torch.testing.assert_close(
            target.double(),
            expected,
            **(BFLOAT16_ROUNDED if target.dtype == torch.bfloat16 else FLOAT32_SHORT),
        )


def test_tables_are_kept_between_steps():
    targets, sources = [torch.zeros(5), torch.zeros(3)], [torch.ones(5), torch.ones(3)]
    triton_table._tables.clear()
    for _ in range(3):
        ema_update_(targets, sources, 0.5, backend="triton")
    assert len(triton_table._tables) == 1
    assert targets[0].tolist() == [0.875] * 5


def test_a_planted_fault_is_noticed(monkeypatch):
    """The comparison of this file fails when a launch loses its last tensor."""
    sound = triton_table.table
    monkeypatch.setattr(
        backend,
        "table",
        lambda arrays, streams, block: sound(
            [column[:-1] for column in arrays], streams[:-1], block
        ),
    )
    targets, sources, _ = _lists(torch.float32, torch.float32, "nearest")
    expected = [t.clone() for t in targets]
    ema_update_(targets, sources, 0.5, backend="triton")
    ema_update_(expected, sources, 0.5, backend="reference")
    assert torch.equal(targets[0], expected[0])
    assert not torch.equal(targets[-1], expected[-1])
