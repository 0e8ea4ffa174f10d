"""The cost of a small call: what checks, choice of backend and autograd add where there is next to
nothing to compute.

masked_attention of 16 tokens against scaled_dot_product_attention without RoPE, and an update of 60
small tensors, or of the micro encoder, against _foreach_lerp_; one thread. The backend is the one
that `auto` takes. A ratio of 1 means that a small call costs what PyTorch's own costs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import jepa_kernels
from benchmarks import harness, parameter_lists
from jepa_kernels import Rope3D

OP = "overhead"
TOKENS, HEADS, HEAD_DIM = 16, 2, 32
MOMENTUM = 0.99


@dataclass
class Attention:
    """16 tokens with RoPE on our side, without it on the other."""

    device: str

    def __post_init__(self) -> None:
        shape = (1, TOKENS, HEADS, HEAD_DIM)
        self.ours = [torch.randn(shape, device=self.device) for _ in range(3)]
        self.theirs = [t.transpose(1, 2).contiguous() for t in self.ours]
        self.grad = torch.randn(shape, device=self.device)
        self.ids = torch.arange(TOKENS, device=self.device)
        self.rope = Rope3D((1, 4, 4))

    def call(self) -> torch.Tensor:
        return jepa_kernels.masked_attention(*self.ours, query_ids=self.ids, rope=self.rope)

    def baseline(self) -> torch.Tensor:
        return F.scaled_dot_product_attention(*self.theirs)

    def differentiated(
        self, call: Callable[[], torch.Tensor], leaves: list[torch.Tensor]
    ) -> Callable[[], object]:
        for leaf in leaves:
            leaf.requires_grad_()
        grad = self.grad if leaves is self.ours else self.grad.transpose(1, 2).contiguous()
        return lambda: torch.autograd.grad(call(), leaves, grad)

    def gate(self) -> None:
        with torch.no_grad():
            expected = jepa_kernels.masked_attention(
                *[t.double() for t in self.ours],
                query_ids=self.ids,
                rope=self.rope,
                backend="reference",
            )
            harness.require_close("out", self.call(), expected, rtol=1e-5)


def _one_thread(call: Callable[[], object]) -> Callable[[], object]:
    """A second thread has nothing to do in a small call."""

    def run() -> object:
        threads = torch.get_num_threads()
        if threads != 1:
            torch.set_num_threads(1)
        return call()

    return run


def _lists(name: str, device: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    if name == "micro":
        targets, sources = (parameter_lists.draw("micro", torch.float32, device) for _ in range(2))
        return targets, sources
    targets, sources = ([torch.randn(16, 16, device=device) for _ in range(60)] for _ in range(2))
    return targets, sources


def _update(name: str, device: str) -> harness.Comparison:
    targets, sources = _lists(name, device)

    def gate() -> None:
        moved = [t.clone() for t in targets]
        jepa_kernels.ema_update_(moved, sources, MOMENTUM)
        expected = MOMENTUM * targets[-1].double() + (1 - MOMENTUM) * sources[-1].double()
        harness.require_close("targets[-1]", moved[-1], expected, rtol=1e-6)

    return harness.Comparison(
        case=f"ema_update/{name}",
        dtype="float32",
        pass_name="update",
        backend="auto",
        baseline="foreach_lerp",
        candidate=_one_thread(lambda: jepa_kernels.ema_update_(targets, sources, MOMENTUM)),
        reference=_one_thread(lambda: torch._foreach_lerp_(targets, sources, 1 - MOMENTUM)),
        gate=gate,
        details={"tensors": len(targets), "parameters": sum(t.numel() for t in targets)},
    )


def comparisons(options: harness.Options) -> Iterator[harness.Comparison]:
    if not options.wants(dtype="float32") or (options.backends and "auto" not in options.backends):
        return
    for pass_name in ("forward", "forward+backward"):
        if not options.wants(pass_name=pass_name, baseline="sdpa"):
            continue
        case = Attention(options.device)
        candidate, reference = case.call, case.baseline
        if pass_name != "forward":
            candidate = case.differentiated(case.call, case.ours)
            reference = case.differentiated(case.baseline, case.theirs)
        yield harness.Comparison(
            case=f"masked_attention/{TOKENS}-tokens",
            dtype="float32",
            pass_name=pass_name,
            backend="auto",
            baseline="sdpa",
            candidate=_one_thread(candidate),
            reference=_one_thread(reference),
            gate=case.gate,
            details={"tokens": TOKENS, "heads": HEADS, "head_dim": HEAD_DIM},
        )
    if options.wants(pass_name="update", baseline="foreach_lerp"):
        for name in ("micro", "60-small"):
            yield _update(name, options.device)


if __name__ == "__main__":
    raise SystemExit(harness.main(OP, comparisons, __doc__))
