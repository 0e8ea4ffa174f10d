"""Seeded damage to the bytes of a file."""

from __future__ import annotations

import random
from collections.abc import Callable

_WORDS = (
    *(b"\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\x80\0\0\0", b"\0\0\0\0\0\0\0\0"),
    *(b"\xef\xbb\xbf", b"\xff\xfe", b"\xe2\x80\xa8", b"\xed\xa0\x80", b"\r", b"\t", b",", b";"),
    *(b"-1", b"1e999", b"nan", b"99999999999999999999", b'"', b"'", b"null", b"true", b"{}"),
    *(b"[[[[", b"{" * 40, b"&a *a", b"!!python/object:os.system", b": : :", b"- ", b"\n\n", b"%s"),
)


def _flipped(data: bytearray, rng: random.Random, other: bytes) -> None:
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _overwritten(data: bytearray, rng: random.Random, other: bytes) -> None:
    place, size = rng.randrange(len(data)), rng.choice((1, 4, 16, 256))
    data[place : place + size] = rng.randbytes(min(size, len(data) - place))


def _cut(data: bytearray, rng: random.Random, other: bytes) -> None:
    del data[rng.randrange(len(data)) :]


def _removed(data: bytearray, rng: random.Random, other: bytes) -> None:
    place = rng.randrange(len(data))
    del data[place : place + rng.choice((1, 3, 16, 500))]


def _repeated(data: bytearray, rng: random.Random, other: bytes) -> None:
    place = rng.randrange(len(data))
    data[place:place] = data[place : place + rng.choice((1, 16, 500))]


def _word(data: bytearray, rng: random.Random, other: bytes) -> None:
    place, word = rng.randrange(len(data) + 1), rng.choice(_WORDS)
    keeps_length = rng.random() < 0.5
    data[place : place + (len(word) if keeps_length else 0)] = word


def _spliced(data: bytearray, rng: random.Random, other: bytes) -> None:
    start = rng.randrange(len(other))
    place = rng.randrange(len(data))
    data[place:] = other[start : start + 4096]


def _header(data: bytearray, rng: random.Random, other: bytes) -> None:
    """Damage among the first bytes, where sizes and kinds stand."""
    data[rng.randrange(min(128, len(data)))] = rng.randrange(256)


_KINDS: tuple[Callable[[bytearray, random.Random, bytes], None], ...] = (
    *(_flipped, _overwritten, _cut, _removed, _repeated, _word, _spliced, _header),
)


def mutated(content: bytes, rng: random.Random, other: bytes) -> bytes:
    """`content` with one to four kinds of damage; `other` is another file to splice in."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        if data:
            rng.choice(_KINDS)(data, rng, other)
    return bytes(data)
