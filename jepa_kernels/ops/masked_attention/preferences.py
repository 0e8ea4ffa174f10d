"""Cases in which `auto` passes a backend by. Each names the committed record that shows it
(benchmarks/results), or says that none is there yet."""

from __future__ import annotations

import torch

from ...backend import Preference

# Hopper's own matrix instruction (wgmma) has twice the rate of mma.sync: Triton compiles to it
# (tests/gates/triton_gate.json, sm_90: HGMMA), csrc/masked_attention to mma.sync (cuda_gate.json).
PREFERENCES: tuple[Preference, ...] = tuple(
    Preference(
        "cuda",
        "cuda",
        dtype,
        "any",
        "triton uses this GPU's own matrix instructions, cuda those of the generation before",
        "by reading, no record yet",
        capability=(9, 0),
        faster="triton",
    )
    for dtype in (torch.bfloat16, torch.float16)
)
