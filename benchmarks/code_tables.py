"""Tables and sections of the pages that are read from the code: backends, objectives, variants, and
what an objective sees."""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap
from functools import cached_property
from typing import Any

from jepa import objectives
from jepa.batch import MaskBatch
from jepa.config import to_dict
from jepa.objectives.base import ObjectiveConfig, ObjectiveContext
from jepa.quirks import Quirks
from jepa.variants import VARIANTS, variant
from jepa_kernels import support
from jepa_kernels.backend import OPS

# What every variant has; they come first, and the table of variants leaves them out.
_ALWAYS = ("prediction", "context")


def _paragraphs(text: str | None) -> list[str]:
    return [" ".join(part.split()) for part in re.split(r"\n\s*\n", inspect.cleandoc(text or ""))]


def backends(op: str | None) -> str:
    """The support table; with `op`, of the ops of that folder alone."""
    head, rule, *rows = support.table().splitlines()
    if op is not None:
        package = f"jepa_kernels.ops.{op}"
        names = {
            name
            for name, record in OPS.items()
            if record.signature.inputs.__module__.startswith(package)
        }
        rows = [row for row in rows if row.split("|")[1].strip() in names]
        if not rows:
            raise ValueError(f"backends: op must be a folder of jepa_kernels/ops, got {op!r}.")
    return "\n".join([head, rule, *rows])


def attributes(kind: type) -> dict[str, str]:
    """The entries of the section "Attributes" of a class's docstring, by name.

    Raises:
        ValueError: a field of the dataclass has none.
    """
    _, _, section = inspect.cleandoc(kind.__doc__ or "").partition("Attributes:\n")
    found: dict[str, str] = {}
    for entry in re.split(r"\n(?=    \S)", section):
        name, _, text = " ".join(entry.split()).partition(": ")
        found[name] = text
    missing = [f.name for f in dataclasses.fields(kind) if f.name not in found]
    if missing:
        raise ValueError(f"{kind.__name__}: the docstring must describe {', '.join(missing)}.")
    return found


def _cell(text: str) -> str:
    return text.replace("``", "`").replace("|", "\\|")


def _members(kind: type) -> list[tuple[str, str]]:
    """Public properties and methods with the first paragraph of their docstrings, as written in
    the class."""
    rows = []
    for name, value in vars(kind).items():
        if name.startswith("_"):
            continue
        shown = name
        if isinstance(value, property):
            function = value.fget
        elif isinstance(value, cached_property):
            function = value.func
        elif inspect.isfunction(value):
            function = value
            arguments = [p for p in inspect.signature(value).parameters if p != "self"]
            shown = f"{name}({', '.join(arguments)})"
        else:
            continue
        text = _paragraphs(getattr(function, "__doc__", None))[0]
        if text:
            rows.append((shown, text))
    return rows


def _rows(rows: list[tuple[str, str]], prefix: str) -> list[str]:
    return [f"| `{prefix}{name}` | {_cell(text)} |" for name, text in rows]


def context(_: str | None) -> str:
    """What `compute(ctx, cfg)` sees: fields of `ctx`, of `ctx.masks`, and what `ctx` derives from
    them."""
    head = ["| name | meaning |", "|---|---|"]
    return "\n".join(
        [
            "Fields:",
            "",
            *head,
            *_rows(list(attributes(ObjectiveContext).items()), "ctx."),
            "",
            "Derived from them, each computed once and only where it is asked for:",
            "",
            *head,
            *_rows(_members(ObjectiveContext), "ctx."),
            "",
            "The token lists:",
            "",
            *head,
            *_rows(list(attributes(MaskBatch).items()), "ctx.masks."),
        ]
    )


def _default(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _options(config: type[ObjectiveConfig]) -> str:
    """The options of an objective and their defaults, on one line."""
    shown = []
    for name, value in to_dict(config()).items():
        if name == "schedule":
            if value == to_dict(ObjectiveConfig())["schedule"]:
                continue
            shown.append(f"schedule: {value['kind']} from {value['begin']} to {value['end']}")
        else:
            shown.append(f"`{name}` {_default(value)}")
    return ", ".join(shown)


def _objective(name: str) -> list[str]:
    module = objectives.get(name)
    purpose, *more = _paragraphs(inspect.getdoc(module))
    formula, *notes = _paragraphs(module.compute.__doc__)
    config = module.Config
    used = [v for v in VARIANTS if variant(v).objectives.get(name) is not None]
    users = (
        "every variant" if len(used) == len(VARIANTS) else ", ".join(f"`{v}`" for v in used)
    ) or "no named variant"
    lines = [
        f"### {name}",
        "",
        *(line for text in (purpose, *more) for line in (text, "")),
        "```text",
        *textwrap.wrap(formula, 76),
        "```",
        "",
        *(line for text in notes for line in (text, "")),
        f"Options and defaults: {_options(config)}.",
    ]
    if config().minimum_frames > 1:
        lines.append(f"Skipped where a clip has fewer than {config().minimum_frames} time steps.")
    return [*lines, f"Used by {users}.", ""]


def objective_sections(_: str | None) -> str:
    """One section for each file of jepa/objectives."""
    names = [*_ALWAYS, *(n for n in objectives.names() if n not in _ALWAYS)]
    return "\n".join(line for name in names for line in _objective(name)).strip()


def variants(_: str | None) -> str:
    """The named variants: what each has beyond the baseline."""
    lines = ["| variant | masks | target | objectives beyond the baseline (weight) |"]
    lines.append("|---|---|---|---|")
    for name, data in VARIANTS.items():
        made = variant(name)
        extra = [
            f"{key} {config.weight:g}{_given(data['objectives'][key])}"
            for key, config in made.objectives.items()
            if key not in _ALWAYS
        ]
        masks = data.get("masks", {"name": "blocks"})
        policy = " ".join(str(v) if k == "name" else f"{k} {v:g}" for k, v in masks.items())
        lines.append(f"| `{name}` | {policy} | {made.target.kind} | {', '.join(extra)} |")
    return "\n".join(lines)


def _given(options: dict[str, Any]) -> str:
    """What a variant sets of an objective besides its weight, in brackets."""
    shown = [
        f"{key} {value['kind'] if isinstance(value, dict) else _default(value)}"
        for key, value in options.items()
        if key != "weight"
    ]
    return f" ({', '.join(shown)})" if shown else ""


def published_behaviour(_: str | None) -> str:
    """The switches of jepa/quirks.py: what the published code does and this one does not."""
    lines = ["| switch | what the published code does |", "|---|---|"]
    lines += [f"| `{name}` | {meaning} |" for name, (_, meaning) in Quirks.describe().items()]
    return "\n".join(lines)
