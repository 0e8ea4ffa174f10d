"""Which of PyTorch's function transforms a call is under: a kernel has a formula for reverse mode
alone, and forward mode would take its derivative for zero."""

from __future__ import annotations

from torch._C import _functorch
from torch.autograd import forward_ad

# Backends that compose an op of PyTorch's own, which know these derivatives;
# scaled_dot_product_attention has no forward mode.
_OWN: dict[str, dict[str, tuple[str, ...]]] = {
    "masked_attention": {"forward": ("reference",), "reverse": ("torch", "reference")},
    "rollout_mlp": {"forward": ("reference",), "reverse": ("reference",)},
    "rollout_hamiltonian": {"forward": ("reference",), "reverse": ("reference",)},
    "rollout_gru": {"forward": ("reference",), "reverse": ("reference",)},
    "sliced_gaussianity": {"forward": ("reference",), "reverse": ("reference",)},
    "visible_patch_embed": {"forward": ("reference",), "reverse": ("reference",)},
}
_ASKED = {
    "forward": "forward-mode AD (torch.func.jvp, jacfwd, forward_ad.dual_level)",
    "reverse": "reverse mode of torch.func (grad, vjp, jacrev; not tensor.backward())",
}


def active() -> bool:
    """Whether any transform is in force: two reads, since every call asks."""
    return forward_ad._current_level >= 0 or _functorch.peek_interpreter_stack() is not None


def _mode() -> str:
    """``forward``, ``reverse`` or nothing: what a compiled graph is traced under holds for all its
    calls."""
    if not active():
        return ""
    kinds = {level.key() for level in _functorch.get_interpreter_stack() or ()}
    if forward_ad._current_level >= 0 or _functorch.TransformType.Jvp in kinds:
        return "forward"
    return "reverse" if _functorch.TransformType.Grad in kinds else ""


# What torch.compiler.assume_constant_result sets; calling it would import Dynamo with this package.
active._dynamo_marked_constant = True  # type: ignore[attr-defined] # for Dynamo
_mode._dynamo_marked_constant = True  # type: ignore[attr-defined] # for Dynamo


def obstacle(op: str, backend: str) -> str | None:
    """Why `backend` would give `op` no derivative, or a wrong one, under the transforms in force;
    None where it need not."""
    mode = _mode()
    if not mode or op not in _OWN or backend in _OWN[op][mode]:
        return None
    names = " or ".join(f"backend={name!r}" for name in _OWN[op][mode])
    return f"{_ASKED[mode]} needs {names}"
