"""Strict configuration: frozen dataclasses built from nested mappings, YAML files and dotted
overrides.

A key that no field claims is an error that names the nearest valid key; a value of the wrong type
is an error that names its path. Nothing here knows what is being configured: the dataclasses live
beside the code that reads them.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import yaml

T = TypeVar("T")
Parse = Callable[[Any, str], Any]


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key and what it may be."""


@dataclass(frozen=True)
class Parsing:
    """How a dataclass field is read that its annotation does not say enough about."""

    parse: Parse
    entries: Callable[[], Mapping[str, type]] | None
    formerly: str | None


def parsed_by(
    parse: Parse,
    entries: Callable[[], Mapping[str, type]] | None = None,
    formerly: str | None = None,
) -> Mapping[str, Parsing]:
    """Metadata of a dataclass field whose value is built by `parse(value, path)` instead of by its
    annotation. For a mapping, `entries` gives the keys that it may have and the dataclass of
    each. `formerly`: the key's earlier name, which is refused with the new one."""
    return {"parsing": Parsing(parse, entries, formerly)}


def parsing_of(field: dataclasses.Field[Any]) -> Parsing | None:
    """What `parsed_by` says of a field."""
    return field.metadata.get("parsing")


def nearest(name: str, valid: Iterable[str]) -> str:
    """The end of an error sentence: the closest valid name if one is close, else all of them."""
    names = sorted(valid)
    close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.6)
    listed = ", ".join(names) if names else "none"
    return f"did you mean {close[0]!r}?" if close else f"valid names: {listed}."


def _instead(key: str, fields: Mapping[str, dataclasses.Field[Any]]) -> str:
    """The end of the sentence about an unknown key: its new name, or the nearest."""
    for name, field in fields.items():
        parsing = parsing_of(field)
        if parsing is not None and parsing.formerly == key:
            return f"it is now called {name!r}."
    return nearest(key, fields)


def _joined(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def from_dict(kind: type[T], data: Mapping[str, Any], path: str = "") -> T:
    """Builds the dataclass `kind` from nested mappings.

    Args:
        kind: a dataclass type.
        data: values by field name; missing fields keep their defaults; an instance of `kind` is
            returned as it is.
        path: dotted prefix for error messages.

    Returns:
        An instance of `kind`.

    Raises:
        ConfigError: unknown key, missing key without a default, or a value that does not fit the
            field's type.
    """
    if isinstance(data, kind):
        return data
    if not isinstance(data, Mapping):
        raise ConfigError(f"config: {path or kind.__name__} must be a mapping, got {data!r}.")
    fields = {f.name: f for f in dataclasses.fields(typing.cast(Any, kind)) if f.init}
    for key in data:
        if key not in fields:
            raise ConfigError(
                f"config: unknown key {_joined(path, key)!r}; {_instead(str(key), fields)}"
            )
    hints = typing.get_type_hints(kind)
    values = {}
    for name, field in fields.items():
        if name in data:
            parsing, here = parsing_of(field), _joined(path, name)
            values[name] = (
                _convert(hints[name], data[name], here)
                if parsing is None
                else parsing.parse(data[name], here)
            )
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"config: key {_joined(path, name)!r} must be given.")
    try:
        return kind(**values)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"config: {path or kind.__name__}: {error}") from error


def _convert(hint: Any, value: Any, path: str) -> Any:
    """`value` as the annotation `hint` asks, without guessing: 1 is a float, "1" is not."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _convert_union(args, value, path)
    if origin is Literal:
        if value not in args:
            raise ConfigError(
                f"config: {path} must be one of {', '.join(map(repr, args))}, got {value!r}."
            )
        return value
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type, hint), value, path)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise ConfigError(f"config: {path} must be a mapping, got {value!r}.")
        return {key: _convert(args[1], item, _joined(path, key)) for key, item in value.items()}
    if origin in (tuple, list):
        return _convert_sequence(origin, args, value, path)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if hint is Path and isinstance(value, str | Path):
        return Path(value)
    if hint is Any or (
        isinstance(hint, type)
        and isinstance(value, hint)
        and not (hint is int and isinstance(value, bool))
    ):
        return value
    raise ConfigError(f"config: {path} must be {getattr(hint, '__name__', hint)}, got {value!r}.")


def _convert_union(options: tuple[Any, ...], value: Any, path: str) -> Any:
    if value is None and types.NoneType in options:
        return None
    candidates = [option for option in options if option is not types.NoneType]
    failures = []
    for option in candidates:
        try:
            return _convert(option, value, path)
        except ConfigError as failure:
            failures.append(failure)
    if len(candidates) == 1:
        raise failures[0]
    names = " or ".join(getattr(option, "__name__", str(option)) for option in options)
    raise ConfigError(f"config: {path} must be {names}, got {value!r}.")


def _convert_sequence(origin: type, args: tuple[Any, ...], value: Any, path: str) -> Any:
    if not isinstance(value, list | tuple):
        raise ConfigError(f"config: {path} must be a list, got {value!r}.")
    if origin is list or (len(args) == 2 and args[1] is Ellipsis):
        return origin(_convert(args[0], item, f"{path}[{i}]") for i, item in enumerate(value))
    if len(value) != len(args):
        raise ConfigError(f"config: {path} must have {len(args)} entries, got {len(value)}.")
    return tuple(
        _convert(arg, item, f"{path}[{i}]")
        for i, (arg, item) in enumerate(zip(args, value, strict=True))
    )


def to_dict(config: Any) -> Any:
    """The configuration as plain mappings and lists, ready for YAML; `from_dict` of it gives an
    equal configuration."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {
            f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config) if f.init
        }
    if isinstance(config, Mapping):
        return {key: to_dict(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [to_dict(value) for value in config]
    return str(config) if isinstance(config, Path) else config


def changed_keys(then: Any, now: Any, path: str = "") -> list[str]:
    """Dotted keys whose values differ between two configurations as plain mappings."""
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        return [
            found
            for key in sorted(then.keys() | now.keys())
            for found in changed_keys(then.get(key), now.get(key), _joined(path, key))
        ]
    return [] if then == now else [path]


def to_json(config: Any) -> Any:
    """`to_dict` as JSON gives it back: tuples are lists."""
    return json.loads(json.dumps(to_dict(config)))


def to_yaml(config: Any) -> str:
    text: str = yaml.safe_dump(to_dict(config), sort_keys=False)
    return text


def merged(base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `change` laid over it, mapping by mapping; lists are replaced."""
    result = dict(base)
    for key, value in change.items():
        old = result.get(key)
        result[key] = (
            merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
        )
    return result


def parse_overrides(overrides: Iterable[str]) -> dict[str, Any]:
    """``["objectives.delta.weight=0.5"]`` as nested mappings; values are read as YAML.

    Raises:
        ConfigError: an entry without ``=`` or with an empty key.
    """
    result: dict[str, Any] = {}
    for override in overrides:
        key, separator, text = override.partition("=")
        parts = key.strip().split(".")
        if not separator or not all(parts):
            raise ConfigError(f"config: override must look like a.b.c=value, got {override!r}.")
        value: Any = _yaml(text, repr(override))
        if isinstance(value, str):
            value = _number(value)
        for part in reversed(parts):
            value = {part: value}
        result = merged(result, value)
    return result


def _yaml(text: str | bytes, source: str) -> Any:
    """What a text holds, or ConfigError in one line."""
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        told = " ".join(str(error).split())
        raise ConfigError(f"config: {source} must be YAML, got {told}.") from error


def _number(text: str) -> str | float:
    # YAML 1.1 reads 1e-4 as a string (it wants 1.0e-4), which nobody who types it on a command line
    # expects.
    try:
        return float(text)
    except ValueError:
        return text


def load(
    kind: type[T],
    path: str | Path | None = None,
    overrides: Iterable[str] = (),
    base: Mapping[str, Any] | None = None,
) -> T:
    """Builds `kind` from `base`, then a YAML file, then dotted overrides, each laid over the one
    before.

    Raises:
        ConfigError: as `from_dict`, or a file that does not hold a mapping.
        FileNotFoundError: `path` does not exist.
    """
    data: Mapping[str, Any] = base or {}
    if path is not None:
        read = _yaml(Path(path).read_bytes(), str(path))
        if not isinstance(read, Mapping):
            raise ConfigError(f"config: {path} must hold a mapping, got {type(read).__name__}.")
        data = merged(data, read)
    return from_dict(kind, merged(data, parse_overrides(overrides)))
