"""Tables and sections of the pages that are read from the code: backends, objectives, variants, and
what an objective sees."""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap
from collections.abc import Iterable
from functools import cached_property
from typing import Any

import docstring_parser

from jepa import objectives
from jepa.batch import MaskBatch
from jepa.commands import COMMANDS
from jepa.objectives.base import ObjectiveConfig, ObjectiveContext
from jepa.options import Option, options
from jepa.published_behaviour import PublishedBehaviour
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
    """What the docstring of a dataclass says of every field, by name.

    Raises:
        ValueError: it says nothing of a field.
    """
    entries = docstring_parser.parse_from_object(kind).params
    found = {entry.arg_name: " ".join((entry.description or "").split()) for entry in entries}
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


def _table_of(shown: Iterable[Option]) -> list[str]:
    lines = ["| option | default | type | what it is |", "|---|---|---|---|"]
    for option in shown:
        default = "" if option.default is None else f"`{_cell(option.default)}`"
        kind, text = _cell(option.kind), _cell(option.help)
        lines.append(f"| `{option.name}` | {default} | {kind} | {text} |")
    return lines


def command_options(command: str | None) -> str:
    """Every option of a command; those of objectives are on a page of their own."""
    kind, _ = COMMANDS[str(command)][1]()
    sections: dict[str, list[Option]] = {}
    for option in options(kind):
        section, _, name = option.name.rpartition(".")
        if not f"{section}.".startswith("variant.objectives."):
            sections.setdefault(section, []).append(dataclasses.replace(option, name=name))
    lines: list[str] = []
    for section, shown in sections.items():
        head = f"### {command}: {section}" if section else ""
        lines += [head, "", *_table_of(shown), ""]
    return "\n".join(lines).strip()


def _objective_options(config: type[ObjectiveConfig]) -> list[Option]:
    """The options of one objective; its schedule only where it is not constant."""
    constant = config().schedule.kind == "constant"
    return [o for o in options(config) if not (constant and o.name.startswith("schedule"))]


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
        *_table_of(_objective_options(config)),
        "",
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
    """The switches of jepa/published_behaviour.py: what the published code does and we do not."""
    lines = ["| switch | what the published code does |", "|---|---|"]
    switches = PublishedBehaviour.describe()
    lines += [f"| `{name}` | {meaning} |" for name, (_, meaning) in switches.items()]
    return "\n".join(lines)
