"""The compiled host module, or the sentence that says why it is missing."""

from __future__ import annotations

import importlib
import logging
from types import ModuleType

_log = logging.getLogger(__name__)


def _load() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module("jepa_kernels._host"), ""
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name != "jepa_kernels._host":
            # the package itself is broken, which is no reason to go on without its host module
            raise
        return (
            None,
            f"jepa_kernels._host cannot be imported ({error}); build it with `pip install -e . "
            "--no-build-isolation`.",
        )


_module, _reason = _load()
_warned = False


def reason() -> str:
    """Why the host module is missing; empty when it is there."""
    return _reason


def resolve(backend: str) -> ModuleType | None:
    """The host module for "auto" (when built) and "host" (required); None means NumPy, which gives
    the same numbers more slowly."""
    global _warned
    if backend not in ("auto", "host", "numpy"):
        raise ValueError(f"masks: backend must be 'auto', 'host' or 'numpy', got {backend!r}.")
    if backend == "numpy":
        return None
    if _module is None:
        if backend == "host":
            raise RuntimeError(f"masks: backend 'host' must be built, got none: {_reason}")
        if not _warned:
            _log.warning(
                "masks are sampled in NumPy, with the same result but more slowly: %s", _reason
            )
            _warned = True
    return _module
