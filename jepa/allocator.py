"""What the C library does with memory that a step has freed."""

from __future__ import annotations

import ctypes

# <malloc.h> of glibc.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Keeps freed memory in the process, for the next step to use again; call it once, before
    training on a CPU.

    A step frees activations of many megabytes that the next step allocates again. glibc gives such
    memory back to the system each time, which fills its pages with zeros at their next first touch.
    The price: the resident set does not shrink between steps any more.

    Returns:
        Whether the C library took the settings: true with glibc, false with others, whose behaviour
        stays as it was.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # Without mmap all sizes come from the heap; memory at its end is what trimming would give back.
    return bool(mallopt(_MMAP_MAX, 0)) and bool(mallopt(_TRIM_THRESHOLD, _NEVER))
