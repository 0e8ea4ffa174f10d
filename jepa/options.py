"""The options of a command as a page of help: every field of its configuration, nested ones too,
with type, default and the docstring below the field."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import docstring_parser
import yaml
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jepa.config import parsing_of, to_dict

_WORDS = {bool: "true | false", str: "text", Path: "path", types.NoneType: "null"}
_OPTION_WIDTH, _TYPE_WIDTH = 60, 36
_PAGE_WIDTH = 200  # where the page does not go to a terminal: no line of help is broken


@dataclass(frozen=True)
class Option:
    """One key. `default` is as one would type it; None where the key must be given, or where it
    stands for a mapping whose keys follow."""

    name: str
    kind: str
    default: str | None
    help: str


def options(kind: type, made: Any = None, prefix: str = "") -> Iterator[Option]:
    """Every option of the dataclass `kind`, those of nested dataclasses after their own.

    Args:
        kind: a dataclass whose fields have docstrings.
        made: an instance whose values are the defaults, in place of the class's own.
        prefix: dotted path of `kind`, with a dot at its end.
    """
    hints, helps = typing.get_type_hints(kind), _helps(kind)
    nested: list[tuple[str, type, Any]] = []
    for field in dataclasses.fields(kind):
        name, hint, parsing = f"{prefix}{field.name}", hints[field.name], parsing_of(field)
        missing = made is None and _required(field)
        value = None if missing else _default(field) if made is None else getattr(made, field.name)
        inner = _dataclass_in(hint)
        if parsing is not None and parsing.entries is not None:
            for key, entry in parsing.entries().items():
                nested.append((f"{name}.{key}", entry, None))
        if inner is not None:
            nested.append((name, inner, value))
        below = dataclasses.is_dataclass(value) or isinstance(value, Mapping)
        yield Option(
            name,
            _shown(hint) if parsing is None else f"name | {_shown(hint)}" if inner else "mapping",
            None if missing or below else _typed(value),
            helps.get(field.name, "") + (" Must be given." if missing else ""),
        )
    for name, inner, value in nested:
        yield from options(inner, value, f"{name}.")


def print_help(command: str, purpose: str, kind: type, more: str = "") -> None:
    """The page of ``jepa COMMAND --help``; `more` follows the flags."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=_PAGE_WIDTH)
    console.print(
        f"jepa {command}: {purpose}\n\n"
        f"  jepa {command} [--config FILE.yaml] [key=value | --key value ...]\n\n"
        "  --config FILE  YAML file; what is given on the command line is laid over it\n"
        "  --show         print the resolved configuration and stop\n"
        "  --help         this page\n"
        f"{more}\n"
        "Values are read as YAML: null, true, [1, 2]. Where a name stands for a mapping, its keys "
        "can still be given.\n",
        markup=False,
        highlight=False,
    )
    table = Table("option and default", "type", "what it is", box=box.SIMPLE_HEAD, pad_edge=False)
    table.columns[0].max_width, table.columns[0].overflow = _OPTION_WIDTH, "fold"
    table.columns[1].max_width = _TYPE_WIDTH
    section = ""
    for option in options(kind):
        if option.name.rpartition(".")[0] != section:
            section = option.name.rpartition(".")[0]
            table.add_section()
        key = option.name if option.default is None else f"{option.name}={option.default}"
        table.add_row(Text(key), Text(option.kind), Text(option.help))
    console.print(table)


def _helps(kind: type) -> dict[str, str]:
    """The docstrings below a dataclass's fields, by field name; those of a base class hold where
    there is none."""
    found: dict[str, str] = {}
    for one in reversed(kind.__mro__):
        if dataclasses.is_dataclass(one):
            for parameter in docstring_parser.parse_from_object(one).params:
                found[parameter.arg_name] = " ".join((parameter.description or "").split())
            for field in dataclasses.fields(one):
                if "meaning" in field.metadata:
                    found[field.name] = _sentence(field.metadata["meaning"])
    return found


def _sentence(clause: str) -> str:
    return f"{clause[0].upper()}{clause[1:]}."


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _dataclass_in(hint: Any) -> type | None:
    """The dataclass that an annotation is, or may be instead of None."""
    choices = [one for one in (get_args(hint) or (hint,)) if one is not types.NoneType]
    if len(choices) == 1 and isinstance(choices[0], type) and dataclasses.is_dataclass(choices[0]):
        return choices[0]
    return None


def _shown(hint: Any) -> str:
    """An annotation in the words of a configuration file."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " | ".join(_shown(one) for one in arguments)
    if origin is Literal:
        return " | ".join(str(one) for one in arguments)
    if origin in (tuple, list):
        parts = ["..." if one is Ellipsis else _shown(one) for one in arguments]
        return f"[{', '.join(parts)}]"
    if dataclasses.is_dataclass(hint) or (isinstance(origin, type) and issubclass(origin, Mapping)):
        return "mapping"
    return _WORDS.get(hint, getattr(hint, "__name__", str(hint)))


def _typed(value: Any) -> str:
    """A value as one would type it."""
    text: str = yaml.safe_dump([to_dict(value)], default_flow_style=True, width=float("inf"))
    return text.strip()[1:-1]
