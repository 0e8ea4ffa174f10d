"""Replaces the attention of other people's models: recognises modules by class name, binds a fused
forward, and can undo it.

A module keeps its parameters, buffers, hooks and state dict; only its `forward` (or the method its
target names) changes. Foreign packages are never imported here: a class is known by its module path
and name, so that nothing happens on import and nothing need be installed.
"""

from __future__ import annotations

import functools
import importlib
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch import Tensor, nn

from ..checks import sentence

# A module of a class that is never imported here: nothing is known of its attributes' types.
Foreign: TypeAlias = Any
_MARK = "_jepa_kernels_fused"
_MASK_MARK = "_jepa_kernels_mask"


@dataclass(frozen=True)
class Target:
    """One foreign class and what takes the place of its forward.

    Args:
        names: ``"package.module:Class"`` under every path the class is published at.
        forward: a function with the signature of the class's forward, `self` included.
        obstacles: why this instance must keep its own forward; empty when it need not.
        fuses: what the new forward does in one op, for reports and docs.
        marker: an attribute that an instance must have, where releases use one name for different
            classes; empty: any instance.
        keeps: whether a call, given the module and its arguments, must run the original, which then
            serves what the fused op does not.
        method: the method that is replaced.
        option: the name to ask `accelerate` for this target by; empty: it is always replaced.

    Notes:
        `obstacles` must return new lists, and `forward` must be a function of a module, so that an
        accelerated model can be pickled.
    """

    names: tuple[str, ...]
    forward: Callable[..., Any]
    obstacles: Callable[[Foreign], list[str]]
    fuses: str
    marker: str = ""
    keeps: Callable[..., bool] | None = None
    method: str = "forward"
    option: str = ""

    def fits(self, module: nn.Module) -> bool:
        return not self.marker or hasattr(module, self.marker)


@dataclass(frozen=True)
class DenseMask:
    """A dense attention mask that foreign modules keep, and the smaller object in its place.

    Args:
        names: ``"package.module:Class"`` of the modules that keep it, under every path.
        attribute: where they keep it.
        stand_in: the smaller object for a mask, whose `dense` gives the mask back; None for a mask
            that must stay.
        builders: ``"package.module:function"`` that their constructors make it with.
        build: takes the place of `builders`, with their signature, while classes are patched.
    """

    names: tuple[str, ...]
    attribute: str
    stand_in: Callable[[Tensor], Any]
    builders: tuple[str, ...]
    build: Callable[..., Any]


@dataclass(frozen=True)
class CodeBase:
    """A code base. One file of this package defines one.

    Args:
        name: for `patch`. origin: where the code comes from.
        targets: what is replaced.
        left_out: ``"package.module:Class"`` of modules that are not replaced, nor anything inside
            them, with the reason.
        masks: dense masks that the fused forwards need not.
    """

    name: str
    origin: str
    targets: tuple[Target, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)
    masks: tuple[DenseMask, ...] = ()


@dataclass
class Report:
    """What `accelerate` did: names of replaced modules by code base, and of those left with the
    reasons."""

    replaced: dict[str, list[str]] = field(default_factory=dict)
    left: dict[str, list[str]] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [
            f"{base}: fused {len(names)} modules ({names[0]} .. {names[-1]})"
            for base, names in self.replaced.items()
        ]
        lines += [f"left {name}: {'; '.join(reasons)}" for name, reasons in self.left.items()]
        return "\n".join(lines)


def full_name(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


def find(
    kind: type, bases: Sequence[CodeBase], options: Sequence[str] = ()
) -> tuple[CodeBase, Target] | None:
    """The target that a class, or one it derives from without a method of its own in the place of
    what is replaced, matches."""
    own: set[str] = set()
    for parent in kind.__mro__:
        name = full_name(parent)
        for base in bases:
            for target in base.targets:
                if name in target.names and (not target.option or target.option in options):
                    return None if target.method in own else (base, target)
        own |= vars(parent).keys()
    return None


def check_options(name: str, bases: Sequence[CodeBase], options: Sequence[str]) -> None:
    known = sorted({target.option for base in bases for target in base.targets if target.option})
    for option in options:
        if option not in known:
            raise ValueError(
                sentence(name, "options", f"name some of {', '.join(known)}", repr(option))
            )


def accelerate(model: nn.Module, bases: Sequence[CodeBase], options: Sequence[str] = ()) -> Report:
    """Binds fused forwards in place. See `jepa_kernels.integrations.accelerate`."""
    check_options("accelerate", bases, options)
    report = Report()
    met: set[str] = set()
    attentions = []
    left_out = {name: reason for base in bases for name, reason in base.left_out.items()}
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if "attention" in type(module).__name__.lower():
            attentions.append(full_name(type(module)))
        if module in inside:
            continue
        if full_name(type(module)) in left_out:
            report.left[name] = [left_out[full_name(type(module))]]
            inside.update(module.modules())
            continue
        found = find(type(module), bases, options)
        if found is None or not found[1].fits(module):
            continue
        base, target = found
        met.add(target.option)
        reasons = target.obstacles(module)
        if target.method in vars(module) and not hasattr(module, _MARK):
            reasons = [*reasons, f"its {target.method} is already replaced by something else"]
        if reasons:
            report.left[name] = reasons
            continue
        # A partial, not a bound method: copies bind to the copy either way, and only a partial can
        # be pickled.
        fused = functools.partial(target.forward, module)
        if target.keeps is not None:
            fused = functools.partial(_either, target, module)
        setattr(module, target.method, fused)
        setattr(module, _MARK, target.method)
        report.replaced.setdefault(base.name, []).append(name)
    if not report.replaced and not report.left:
        known = "; ".join(
            f"{base.name} ({', '.join(t.names[0].rpartition(':')[2] for t in base.targets)})"
            for base in bases
        )
        has = (
            f"its attention classes are {', '.join(sorted(set(attentions)))}"
            if attentions
            else "it has no attention module"
        )
        raise ValueError(
            f"accelerate: model must be of a known code base: {known}; got "
            f"{full_name(type(model))}, and {has}."
        )
    for option in options:
        if option not in met:
            restore(model)
            raise ValueError(
                sentence(
                    "accelerate",
                    "options",
                    "name what the model has",
                    f"{option!r} for {full_name(type(model))}",
                )
            )
    for name, module in model.named_modules():
        _replace_masks(name, module, bases, report)
    return report


def _replace_masks(name: str, module: nn.Module, bases: Sequence[CodeBase], report: Report) -> None:
    kinds = {full_name(parent) for parent in type(module).__mro__}
    for mask in (mask for base in bases for mask in base.masks if kinds.intersection(mask.names)):
        dense = getattr(module, mask.attribute, None)
        if not isinstance(dense, Tensor):
            continue
        stand_in = mask.stand_in(dense)
        if stand_in is None:
            report.left[name] = [f"its {mask.attribute} is another mask than the fused op has"]
        else:
            setattr(module, mask.attribute, stand_in)
            setattr(module, _MASK_MARK, mask.attribute)


def _either(target: Target, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The fused forward, or the class's own for a call that it keeps."""
    assert target.keeps is not None
    own = getattr(type(module), target.method)
    return (own if target.keeps(module, *args, **kwargs) else target.forward)(
        module, *args, **kwargs
    )


def restore(model: nn.Module) -> int:
    """Gives every replaced module its own forward, and its dense mask, back; returns how many
    forwards."""
    count = 0
    for module in model.modules():
        if hasattr(module, _MASK_MARK):
            name = getattr(module, _MASK_MARK)
            setattr(module, name, getattr(module, name).dense())
            delattr(module, _MASK_MARK)
        if hasattr(module, _MARK):
            delattr(module, getattr(module, _MARK))
            delattr(module, _MARK)
            count += 1
    return count


@contextmanager
def patched(
    bases: Sequence[CodeBase], options: Sequence[str] = (), named: bool = True
) -> Iterator[list[str]]:
    """Replaces forwards on the classes themselves, for code that builds its own models; yields the
    names of the patched classes.

    An instance with an obstacle keeps its own forward, call by call. A code base that is not
    installed, or lacks a package of its own, is passed over, or refused where the caller `named`
    it.
    """
    undo: list[tuple[Any, str, Callable[..., Any]]] = []
    names = []
    try:
        for base in bases:
            if named:
                _require(base)
            for target in base.targets:
                if target.option and target.option not in options:
                    continue
                for name in target.names:
                    kind = _installed(name, target.method)
                    if kind is None or any(kind is done for done, _, _ in undo):
                        continue
                    original = kind.__dict__[target.method]
                    undo.append((kind, target.method, original))
                    setattr(kind, target.method, _choosing(target, original))
                    names.append(name)
            for mask in base.masks:
                for builder in mask.builders:
                    path, _, function = builder.partition(":")
                    module = _imported(path)
                    if hasattr(module, function):
                        undo.append((module, function, getattr(module, function)))
                        setattr(module, function, mask.build)
        yield names
    finally:
        for owner, name, original in reversed(undo):
            setattr(owner, name, original)


def _choosing(target: Target, original: Callable[..., Any]) -> Callable[..., Any]:
    def forward(self: Foreign, *args: Any, **kwargs: Any) -> Any:
        fused = target.fits(self) and not target.obstacles(self)
        if fused and target.keeps is not None:
            fused = not target.keeps(self, *args, **kwargs)
        return (target.forward if fused else original)(self, *args, **kwargs)

    return forward


def _require(base: CodeBase) -> None:
    """Refuses a code base none of whose modules can be imported."""
    packages = {name.partition(".")[0] for target in base.targets for name in target.names}
    reasons: list[str] = []
    for target in base.targets:
        for name in target.names:
            path = name.partition(":")[0]
            try:
                importlib.import_module(path)
            except ImportError as error:
                # A package that is there and lacks something of its own says more than one that is
                # not.
                lacks = (error.name or "").partition(".")[0] not in packages
                reasons.insert(0 if lacks else len(reasons), str(error))
            else:
                return
    raise ModuleNotFoundError(
        sentence("patch", "name", "be of an installed code base", repr(base.name))
        + f" {reasons[0]}."
    )


def _imported(path: str) -> types.ModuleType | None:
    try:
        return importlib.import_module(path)
    except ImportError:
        return None


def _installed(name: str, method: str) -> type | None:
    path, _, kind = name.partition(":")
    found = getattr(_imported(path), kind, None)
    return (
        found
        if isinstance(found, type) and full_name(found) == name and method in vars(found)
        else None
    )


def weights_obstacles(module: nn.Module) -> list[str]:
    """The fused op computes no attention weights: a module whose configuration asks for them at
    every call keeps its forward."""
    if getattr(getattr(module, "config", None), "output_attentions", False):
        return ["config.output_attentions must be False, since the fused op computes no weights"]
    return []


def dropout_obstacles(module: nn.Module, **probabilities: float) -> list[str]:
    """The fused op has no dropout: a module that would drop in training keeps its forward."""
    return [f"{name} must be 0, got {value}" for name, value in probabilities.items() if value]
