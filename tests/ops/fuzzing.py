"""Runs malformed calls of a list op: every one must be refused with a sentence, and change nothing.
Used by fuzz_ema_update and fuzz_adamw_ema."""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from collections.abc import Callable, Sequence

import torch

REFUSALS = (TypeError, ValueError, RuntimeError, NotImplementedError)
Call = dict[str, object]
Fault = Callable[[Call, random.Random], None]
Way = tuple[Callable[[Call], object], Sequence[Fault]]


def pick(call: Call, rng: random.Random, names: Sequence[str]) -> tuple[str, int]:
    """A list of the call that is not empty, and a place in it."""
    name = rng.choice([n for n in names if call[n]])
    return name, rng.randrange(len(call[name]))


def replace(
    call: Call, rng: random.Random, names: Sequence[str], change: Callable[[torch.Tensor], object]
) -> None:
    """Changes one tensor of one list."""
    name, i = pick(call, rng, names)
    call[name] = [*call[name][:i], change(call[name][i]), *call[name][i + 1 :]]


def tensors_of(call: Call) -> list[torch.Tensor]:
    return [
        t
        for v in call.values()
        for t in (v if isinstance(v, list) else [v])
        if isinstance(t, torch.Tensor) and t.device.type == "cpu"
    ]


def main(valid: Callable[[random.Random], Call], ways: Sequence[Way], calls: int, seed: int) -> int:
    """Half of the calls go the first way (the public function), the rest the other ways."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    done: Counter[str] = Counter()
    for (
        way,
        _,
    ) in ways:  # the unchanged call is accepted, or every refusal below would prove nothing
        for _ in range(20):
            way(valid(rng))
    for i in range(calls):
        way, faults = ways[0] if i % 2 == 0 else ways[1 + rng.randrange(len(ways) - 1)]
        call, fault = valid(rng), rng.choice(faults)
        print(
            f"{i} {way.__name__} {fault.__name__}", file=sys.stderr, flush=True
        )  # the last line names a crash
        fault(call, rng)
        kept = [
            (t, t.clone())
            for t in tensors_of(call)
            if t.layout == torch.strided and t.numel() < 10**6
        ]
        try:
            way(call)
        except REFUSALS as error:
            text = str(error)
            if len(text) < 10 or "Traceback" in text:
                print(
                    f"call {i}: {way.__name__} after {fault.__name__} was refused without a "
                    f"sentence: {error!r}"
                )
                return 1
        else:
            print(f"call {i}: {way.__name__} after {fault.__name__} was accepted")
            return 1
        if not all(torch.equal(t, before) or bool(t.isnan().any()) for t, before in kept):
            print(
                f"call {i}: {way.__name__} after {fault.__name__} was refused, but wrote something"
            )
            return 1
        done[way.__name__] += 1
    print(json.dumps(done))
    return 0
