"""The C ABI of an op for ctypes, read from csrc/<op>/params.h, so that nothing is declared twice.

    abi = read("ema_update")
    library = abi.open(path)  # with the signature of every function that it has
    params = abi.structs["jk_ema_update_params"](num_tensors=1)

The reader knows what these headers use and refuses the rest: structs of numbers, pointers, structs
and callbacks; enums; callback types; functions. `test_header.py` compares sizes, offsets and
constants with the compiler's. No torch: sanitized children import this.
"""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

CSRC = Path(__file__).resolve().parents[2] / "csrc"
_NUMBERS: dict[str, Any] = {
    "int": ctypes.c_int,
    "int32_t": ctypes.c_int32,
    "int64_t": ctypes.c_int64,
    "uint8_t": ctypes.c_uint8,
    "float": ctypes.c_float,
    "double": ctypes.c_double,
}
_TOKEN = re.compile(r"\s*([A-Za-z_]\w*|-?\d+|[{}()*,;=])")
_DIRECTIVE = re.compile(
    r'#\s*(pragma once|include <\w+\.h>|include "(?P<file>.+)"|define JK_\w+ .*)'
)


class HeaderError(ValueError):
    """A header has something that the reader does not know."""


@dataclass
class Abi:
    """What a header declares, by its names in C. Pointers to structs are typed, all others are
    addresses."""

    constants: dict[str, int] = field(default_factory=dict)
    structs: dict[str, type[ctypes.Structure]] = field(default_factory=dict)
    callbacks: dict[str, Any] = field(default_factory=dict)
    functions: dict[str, tuple[Any, list[Any]]] = field(default_factory=dict)

    def open(self, path: str | Path) -> ctypes.CDLL:
        """The library, which may have a part of the functions: those of the CPU or of the GPU."""
        library = ctypes.CDLL(str(path))
        for name, (result, arguments) in self.functions.items():
            if hasattr(library, name):
                function = getattr(library, name)
                function.restype, function.argtypes = result, arguments
        return library


class _Reader:
    def __init__(self, abi: Abi, text: str) -> None:
        self.abi, self.at, self.tokens = abi, 0, []
        text = text.strip()
        place = 0
        while place < len(text):
            match = _TOKEN.match(text, place)
            if match is None:
                raise HeaderError(f"cannot read {text[place : place + 40]!r}")
            self.tokens.append(match[1])
            place = match.end()

    def peek(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def take(self, *wanted: str) -> str:
        """The next token, which must be one of those wanted (none: any name)."""
        token = self.peek()
        if token not in wanted if wanted else not token.isidentifier():
            expected = " or ".join(wanted) or "a name"
            raise HeaderError(
                f"expected {expected}, got {token!r} after {self.tokens[: self.at][-8:]}"
            )
        self.at += 1
        return token

    def took(self, token: str) -> bool:
        found = self.peek() == token
        self.at += found
        return found

    def number(self) -> int:
        token = self.peek()
        if not token.lstrip("-").isdigit():
            raise HeaderError(f"expected a number, got {token!r}")
        self.at += 1
        return int(token)

    def base(self) -> str:
        self.took("const")
        return self.take()

    def typed(self, base: str) -> Any:
        """The ctypes type of `base` and the stars that follow it; None for void."""
        stars = 0
        while self.took("*"):
            stars += 1
        if stars == 0 and base in (*_NUMBERS, *self.abi.structs, *self.abi.callbacks):
            return (_NUMBERS | self.abi.structs | self.abi.callbacks)[base]
        if stars == 1 and base in self.abi.structs:
            return ctypes.POINTER(self.abi.structs[base])
        if stars == 1 and base in (*_NUMBERS, "void"):
            return ctypes.c_void_p
        if stars == 1 and base == "char":
            return ctypes.c_char_p
        if stars == 0 and base == "void":
            return None
        raise HeaderError(f"unknown type {base}{'*' * stars}")

    def arguments(self) -> list[Any]:
        self.take("(")
        types = []
        while True:
            types.append(self.typed(self.base()))
            self.take()
            if self.take(",", ")") == ")":
                return types

    def fields(self) -> list[tuple[str, Any]]:
        self.take("{")
        found = []
        while not self.took("}"):
            base = self.base()
            while True:
                kind = self.typed(base)
                found.append((self.take(), kind))
                if self.take(",", ";") == ";":
                    break
        return found

    def enum(self) -> None:
        self.take()
        self.take("{")
        value = -1
        while True:
            name = self.take()
            value = self.number() if self.took("=") else value + 1
            self.abi.constants[name] = value
            if self.take(",", "}") == "}":
                return

    def run(self) -> None:
        while self.peek():
            start = self.take("typedef", "enum", "JK_EXPORT")
            if start == "enum":
                self.enum()
            elif start == "JK_EXPORT":
                result = self.typed(self.base())
                name = self.take()
                self.abi.functions[name] = (result, self.arguments())
            elif self.took("struct"):
                fields = self.fields()
                name = self.take()
                self.abi.structs[name] = type(name, (ctypes.Structure,), {"_fields_": fields})
            else:
                result = self.typed(self.base())
                self.take("(")
                self.take("*")
                name = self.take()
                self.take(")")
                self.abi.callbacks[name] = ctypes.CFUNCTYPE(result, *self.arguments())
            self.take(";")


def parse(abi: Abi, text: str, folder: Path) -> Abi:
    """Adds what `text`, a header in `folder`, declares, after the headers that it includes."""
    code = []
    for line in text.splitlines():
        line = line.partition("//")[0].strip()
        if not line.startswith("#"):
            code.append(line)
            continue
        directive = _DIRECTIVE.fullmatch(line)
        if directive is None:
            raise HeaderError(f"unknown directive {line!r}")
        if directive["file"]:
            path = folder / directive["file"]
            parse(abi, path.read_text(), path.parent)
    _Reader(abi, " ".join(code)).run()
    return abi


@cache
def read(op: str) -> Abi:
    """The ABI of csrc/<op>/params.h."""
    path = CSRC / op / "params.h"
    return parse(Abi(), path.read_text(), path.parent)
