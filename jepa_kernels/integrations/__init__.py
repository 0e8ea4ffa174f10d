"""Drop the kernels into other JEPA code. One file per code base; nothing is imported or changed
until you ask.

report = accelerate(model)     # swaps the attention of a model you built, in place; print(report)
restore(model)                 # undoes it
with patch("vjepa2"): ...      # for code that builds its own models: swaps on the classes, undone
on exit
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

from torch import nn

from ..checks import sentence
from . import (
    dino_wm,
    eb_jepa,
    ijepa,
    lightly_ijepa,
    replace,
    transformers_ijepa,
    transformers_vjepa2,
    vjepa1,
    vjepa2,
    vjepa2_1,
    vjepa2_ac,
)
from .replace import CodeBase, Report, restore

CODE_BASES: tuple[CodeBase, ...] = (
    transformers_vjepa2.BASE,
    transformers_ijepa.BASE,
    vjepa2.BASE,
    vjepa2_ac.BASE,
    dino_wm.BASE,
    vjepa2_1.BASE,
    vjepa1.BASE,
    ijepa.BASE,
    lightly_ijepa.BASE,
    eb_jepa.BASE,
)

__all__ = ["CODE_BASES", "Report", "accelerate", "patch", "restore"]


def accelerate(model: nn.Module, *, options: Sequence[str] = ()) -> Report:
    """Swaps the attention modules of a known JEPA model for the fused op, in place; parameters and
    state dict stay as they are.

    Args:
        model: any module that contains attention of a known code base.
        options: work of the original to leave out where results stay the same.
            ``"unsorted_predictor"``: the predictor neither sorts its tokens by position nor
            restores their order, and reads its mask token in place (transformers VJEPA2, V-JEPA 2).

    Returns:
        What was replaced, and what was left with the reasons. Print it.

    Raises:
        TypeError: not a module.
        ValueError: no module of a known code base, with the list of what is known and what was
            found; an option that is not known, or that nothing in the model has.

    Notes:
        Attention probabilities are not computed: where the original returns them, the fused forward
        returns None, as SDPA does. Modules of transformers whose ``config.output_attentions`` is
        set are left as they are, and reported. Works with activation checkpointing and
        torch.compile; call it before either.

    Example:
        >>> import torch
        >>> from jepa_kernels.integrations import accelerate
        >>> accelerate(torch.nn.Linear(2, 2))  # doctest: +IGNORE_EXCEPTION_DETAIL
        Traceback (most recent call last):
        ValueError: accelerate: model must be of a known code base: ...
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            sentence("accelerate", "model", "be a torch.nn.Module", type(model).__name__)
        )
    return replace.accelerate(model, CODE_BASES, options)


def patch(*names: str, options: Sequence[str] = ()) -> AbstractContextManager[list[str]]:
    """A context in which the classes of the named code bases use the fused op; without names, of
    all that are installed.

    Args:
        names: of `CODE_BASES`.
        options: those of `accelerate`.

    Raises:
        ValueError: no code base or option of that name. ModuleNotFoundError: a named code base, or
            a package that it needs, is not installed.
    """
    by_name = {base.name: base for base in CODE_BASES}
    for name in names:
        if name not in by_name:
            raise ValueError(
                sentence("patch", "name", f"be one of {', '.join(by_name)}", repr(name))
            )
    bases = [by_name[name] for name in names] or CODE_BASES
    replace.check_options("patch", bases, options)
    return replace.patched(bases, options, named=bool(names))
