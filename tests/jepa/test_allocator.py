from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import torch
from jepa.allocator import keep_freed_memory

kept = sys.argv[1] == "kept" and keep_freed_memory()

def step():
    return torch.ones(10 << 20).sum().item()

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

# The heap grows to what steps need within a few of them; with one thread it takes longer.
for _ in range(10):
    step()
print(int(kept), min(faults() for _ in range(8)))
"""


def run(mode: str) -> tuple[bool, int]:
    done = subprocess.run(
        [sys.executable, "-c", FAULTS, mode], capture_output=True, text=True, check=True
    )
    kept, faults = done.stdout.split()
    return bool(int(kept)), int(faults)


def test_a_step_touches_no_new_pages_where_freed_memory_is_kept():
    if not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"):
        pytest.skip("the C library is not glibc, so freed memory is treated as it treats it")
    kept, faults = run("kept")
    assert kept and faults < 100
    # 40 MB in pages of 4 KiB, in huge pages far fewer: what the setting is for.
    assert run("default")[1] > 10 * max(faults, 1)
