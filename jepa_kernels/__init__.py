"""jepa_kernels: fast kernels of Joint-Embedding Predictive Architectures as torch custom ops.

Importing needs torch alone: Triton, CUDA and the compiled library are looked up, never built, and
are optional.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from . import preferences  # noqa: F401 (tells auto what was measured)
from .backend import (
    BackendUnsupportedError,
    check_environment,
    explain,
    names,
    use_backend,
)
from .ops.adamw_ema import TeacherLists, adamw_ema_
from .ops.ema_update import ema_update_
from .ops.latent_rollout import (
    GRU,
    Hamiltonian,
    ResidualMLP,
    latent_rollout,
    latent_rollout_loss,
)
from .ops.masked_attention import masked_attention
from .ops.sliced_gaussianity import random_directions, sliced_gaussianity
from .ops.visible_patch_embed import visible_patch_embed
from .profile import profile
from .rope3d import Rope3D
from .times import FrameTokens, frame_times, frame_tokens

check_environment()
BACKENDS = names()

try:
    __version__ = version("jepa-kernels")
except PackageNotFoundError:
    __version__ = "0+unknown"

__all__ = [
    "BACKENDS",
    "GRU",
    "BackendUnsupportedError",
    "FrameTokens",
    "Hamiltonian",
    "ResidualMLP",
    "Rope3D",
    "TeacherLists",
    "__version__",
    "adamw_ema_",
    "ema_update_",
    "explain",
    "frame_times",
    "frame_tokens",
    "latent_rollout",
    "latent_rollout_loss",
    "masked_attention",
    "profile",
    "random_directions",
    "sliced_gaussianity",
    "use_backend",
    "visible_patch_embed",
]
