"""Tolerances live in jepa_kernels/testing: a test that spells a number of its own is found."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
FILES = sorted(TESTS.rglob("*.py"))
# Keyword arguments and dictionary keys whose value is a tolerance.
NAMES = {"rtol", "atol", "rel", "abs", "rel_tol", "abs_tol", "tol", "tolerance", "budget"}
# Comparisons, and how many arguments are compared: one more is a tolerance.
COMPARED = {
    "allclose": 2,
    "approx": 1,
    "assert_allclose": 2,
    "assert_close": 2,
    "gradcheck": 2,
    "isclose": 2,
    "require_close": 3,
}
# Code in strings, and what a parser would not see.
SPELLED = re.compile(r"\b(?:rtol|atol)=\s*[\d.]")
# Below it a bound is one on rounding, whatever is bounded.
SMALL = 1e-2


def numbers(node: ast.AST) -> Iterator[float]:
    for part in ast.walk(node):
        if isinstance(part, ast.Constant) and isinstance(part.value, float):
            yield part.value


def called(call: ast.Call) -> str:
    return call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")


def is_difference(node: ast.AST) -> bool:
    """Whether an expression measures how far something is off."""
    names = (
        called(part)
        if isinstance(part, ast.Call)
        else part.attr
        if isinstance(part, ast.Attribute)
        else part.id
        if isinstance(part, ast.Name)
        else ""
        for part in ast.walk(node)
    )
    return any(name in ("abs", "norm") or "error" in name for name in names)


def has_slack(node: ast.AST) -> bool:
    """Whether a small number is added to or taken from a bound."""
    return any(
        isinstance(part, ast.BinOp)
        and isinstance(part.op, ast.Add | ast.Sub)
        and any(0 < number < SMALL for side in (part.left, part.right) for number in numbers(side))
        for part in ast.walk(node)
    )


def in_comparison(node: ast.Compare) -> bool:
    sides = [node.left, *node.comparators]
    for left, operator, right in zip(sides, node.ops, sides[1:], strict=False):
        if has_slack(left) or has_slack(right):
            return True
        if isinstance(operator, ast.Lt | ast.LtE):
            lower, upper = left, right
        elif isinstance(operator, ast.Gt | ast.GtE):
            lower, upper = right, left
        else:
            continue
        limit = 1.0 if is_difference(lower) else SMALL
        if not isinstance(upper, ast.UnaryOp) and any(0 < n < limit for n in numbers(upper)):
            return True
    return False


def in_names(pairs: Iterator[tuple[object, ast.expr]]) -> bool:
    """Whether a tolerance is anything but an entry of a constant, ``FLOAT32["rtol"]``."""
    return any(
        name in NAMES
        and not (isinstance(value, ast.Subscript) and isinstance(value.slice, ast.Constant))
        for name, value in pairs
    )


def spelled(source: str) -> list[str]:
    """The lines of a test that spell a tolerance."""
    lines, found = source.splitlines(), set()
    found |= {number for number, line in enumerate(lines, 1) if SPELLED.search(line)}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            wrong = len(node.args) > COMPARED.get(called(node), len(node.args))
            wrong |= called(node) in COMPARED and in_names((k.arg, k.value) for k in node.keywords)
        elif isinstance(node, ast.Dict):
            keys = (getattr(key, "value", None) for key in node.keys)
            wrong = in_names(zip(keys, node.values, strict=True))
        else:
            wrong = isinstance(node, ast.Compare) and in_comparison(node)
        if wrong:
            found.add(node.lineno)
    return [f"{number}: {lines[number - 1].strip()}" for number in sorted(found)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(TESTS)))
def test_no_test_spells_a_tolerance(path):
    if path != Path(__file__):
        assert not spelled(path.read_text(encoding="utf-8"))


TOLERANCES = (
    "assert_close(a, b, rtol=1e-5)",
    "assert_close(a, b, rtol=rtol, atol=atol)",
    "assert_close(a, b, atol=1e-6 if low else FLOAT32['atol'])",
    "assert_close(a, b, **{'rtol': 1e-5})",
    "tolerance = {'rtol': 1e-5, 'atol': 0.0}",
    "allclose(a, b, 1e-5)",
    "assert value == pytest.approx(2.0, 1e-3)",
    "assert value == pytest.approx(2.0, rel=0.02)",
    "assert value == pytest.approx(2.0, abs=1e-9)",
    "assert math.isclose(a, b, rel_tol=1e-9)",
    "assert torch.autograd.gradcheck(f, leaves, 1e-6)",
    "assert (a - b).abs().max() < 1e-5",
    "assert 1e-5 * b.norm() >= (a - b).norm()",
    "assert (a - b).abs().max() < (2e-2 if low else 1e-6)",
    "assert found.error <= 0.1",
    "assert 1e-6 < error < 1e-2",
    "assert value <= 1e-4",
    "assert bool((a >= low - 1e-6).all())",
    "code = 'assert_close(a, b, rtol=1e-5)'",
)
OTHER_NUMBERS = (
    "assert_close(a, b, **FLOAT32)",
    "assert_close(a, b, **(BFLOAT16 if low else FLOAT32))",
    "assert value == pytest.approx(2.0, rel=DERIVED['rtol'])",
    "assert value == pytest.approx(0.02)",
    "assert (a - b).norm() <= FLOAT32['rtol'] * b.norm()",
    "assert failure.error > 3e-5",
    "assert stats.chisquare(counts).pvalue > 1e-3",
    "assert accuracy < 0.6 and share > 0.5",
    "layer = LayerNorm(width, eps=1e-6)",
)


@pytest.mark.parametrize("line", TOLERANCES)
def test_a_spelled_tolerance_is_seen(line):
    assert spelled(line)


@pytest.mark.parametrize("line", OTHER_NUMBERS)
def test_other_numbers_are_let_pass(line):
    assert not spelled(line)
