"""Replaces the attention of other people's models: recognises modules by class name, binds a fused forward, and can undo it.

A module keeps its parameters, buffers, hooks and state dict; only its `forward` changes. Foreign packages are never imported here: a class is
known by its module path and name, so that nothing happens on import and nothing need be installed.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import nn

_MARK = "_jepa_kernels_fused"


@dataclass(frozen=True)
class Target:
    """One foreign class and what takes the place of its forward.

    Args:
        names: ``"package.module:Class"`` under every path the class is published at.
        forward: a function with the signature of the class's forward, `self` included.
        obstacles: why this instance must keep its own forward; empty when it need not.
        fuses: what the new forward does in one op, for reports and docs.
        marker: an attribute that an instance must have, where releases use one name for different classes; empty: any instance.

    Notes:
        `obstacles` must return new lists, and `forward` must be a function of a module, so that an accelerated model can be pickled.
    """

    names: tuple[str, ...]
    forward: Callable
    obstacles: Callable[[nn.Module], list[str]]
    fuses: str
    marker: str = ""

    def fits(self, module: nn.Module) -> bool:
        return not self.marker or hasattr(module, self.marker)


@dataclass(frozen=True)
class CodeBase:
    """A code base. One file of this package defines one.

    Args:
        name: for `patch`. origin: where the code comes from.
        targets: what is replaced.
        left_out: ``"package.module:Class"`` of modules that are not replaced, nor anything inside them, with the reason.
    """

    name: str
    origin: str
    targets: tuple[Target, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Report:
    """What `accelerate` did: names of replaced modules by code base, and of those left with the reasons."""

    replaced: dict[str, list[str]] = field(default_factory=dict)
    left: dict[str, list[str]] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{base}: fused {len(names)} modules ({names[0]} .. {names[-1]})" for base, names in self.replaced.items()]
        lines += [f"left {name}: {'; '.join(reasons)}" for name, reasons in self.left.items()]
        return "\n".join(lines)


def full_name(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


def find(kind: type, bases: Sequence[CodeBase]) -> tuple[CodeBase, Target] | None:
    """The target that a class, or one it derives from without a forward of its own, matches."""
    for parent in kind.__mro__:
        name = full_name(parent)
        for base in bases:
            for target in base.targets:
                if name in target.names:
                    return base, target
        if "forward" in vars(parent):
            return None
    return None


def accelerate(model: nn.Module, bases: Sequence[CodeBase]) -> Report:
    """Binds fused forwards in place. See `jepa_kernels.integrations.accelerate`."""
    report = Report()
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
        found = find(type(module), bases)
        if found is None or not found[1].fits(module):
            continue
        base, target = found
        reasons = target.obstacles(module)
        if "forward" in vars(module) and not hasattr(module, _MARK):
            reasons = [*reasons, "its forward is already replaced by something else"]
        if reasons:
            report.left[name] = reasons
            continue
        # A partial, not a bound method: copies bind to the copy either way, and only a partial can be pickled.
        module.forward = functools.partial(target.forward, module)
        setattr(module, _MARK, True)
        report.replaced.setdefault(base.name, []).append(name)
    if not report.replaced and not report.left:
        known = "; ".join(f"{base.name} ({', '.join(t.names[0].rpartition(':')[2] for t in base.targets)})" for base in bases)
        has = f"its attention classes are {', '.join(sorted(set(attentions)))}" if attentions else "it has no attention module"
        raise ValueError(f"accelerate: model must be of a known code base: {known}; got {full_name(type(model))}, and {has}.")
    return report


def restore(model: nn.Module) -> int:
    """Gives every replaced module its own forward back; returns how many."""
    count = 0
    for module in model.modules():
        if hasattr(module, _MARK):
            del module.forward
            delattr(module, _MARK)
            count += 1
    return count


@contextmanager
def patched(bases: Sequence[CodeBase]) -> Iterator[list[str]]:
    """Replaces forwards on the classes themselves, for code that builds its own models; yields the names of the patched classes.

    An instance with an obstacle keeps its own forward, call by call.
    """
    undo: list[tuple[type, Callable]] = []
    names = []
    try:
        for base in bases:
            for target in base.targets:
                for name in target.names:
                    kind = _installed(name)
                    if kind is None or any(kind is done for done, _ in undo):
                        continue
                    original = kind.__dict__["forward"]
                    undo.append((kind, original))
                    kind.forward = _choosing(target, original)
                    names.append(name)
        yield names
    finally:
        for kind, original in reversed(undo):
            kind.forward = original


def _choosing(target: Target, original: Callable) -> Callable:
    def forward(self, *args, **kwargs):
        fused = target.fits(self) and not target.obstacles(self)
        return (target.forward if fused else original)(self, *args, **kwargs)

    return forward


def _installed(name: str) -> type | None:
    path, _, kind = name.partition(":")
    try:
        found = getattr(importlib.import_module(path), kind, None)
    except ModuleNotFoundError as error:
        # Absent is fine; a package that is there and lacks something of its own is not ours to hide.
        if error.name is not None and path.startswith(error.name):
            return None
        raise
    return found if isinstance(found, type) and full_name(found) == name and "forward" in vars(found) else None


def dropout_obstacles(module: nn.Module, **probabilities: float) -> list[str]:
    """The fused op has no dropout: a module that would drop in training keeps its forward."""
    return [f"{name} must be 0, got {value}" for name, value in probabilities.items() if value]
