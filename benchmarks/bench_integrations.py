"""Other people's encoders with fused attention against the same encoders untouched: one attention
module, and a step of a whole encoder or predictor.

Both sides are copies of one model in one process. The clip has 16 frames, ViT-L width has 4 layers.
Peak memory of both sides is in the records. bfloat16 (its matrix products included) is measured
where the machine has instructions for it, on other machines with --dtype bfloat16: without them
torch's own products take all the time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks import harness, peers
from benchmarks.resolutions import parse_resolution
from jepa_kernels.integrations import accelerate

FRAMES = 16
RESOLUTIONS = ("112", "160", "224", "256")
# (code base, width, part) -> frame sizes. A step of an encoder of ViT-L width takes seconds on a
# CPU: the whole list is to end in 8 minutes on two cores, so the code base that most people use has
# most rows, and the two without RoPE, where only attention itself can differ, have two.
SIZES = {
    ("transformers-vjepa2", "vit_s", "attention"): RESOLUTIONS,
    ("transformers-vjepa2", "vit_s", "encoder"): RESOLUTIONS,
    ("vjepa2", "vit_s", "attention"): RESOLUTIONS,
    ("vjepa2", "vit_s", "encoder"): ("112", "224"),
    ("transformers-vjepa2", "vit_l", "attention"): RESOLUTIONS,
    ("vjepa2", "vit_l", "attention"): ("112", "224"),
    ("vjepa2-ac", "vit_s", "predictor"): RESOLUTIONS,
    ("vjepa2-ac", "vit_l", "predictor"): ("224",),
    ("vjepa1", "vit_s", "attention"): ("112", "224"),
    ("vjepa1", "vit_s", "encoder"): ("112", "224"),
    ("transformers-ijepa", "vit_s", "attention"): ("112", "224"),
    ("transformers-ijepa", "vit_s", "encoder"): ("112", "224"),
    ("transformers-vjepa2", "vit_l", "encoder"): ("112", "224"),
}
PASSES = ("forward", "forward+backward")
# Norms of whole results against the untouched model in the same dtype: the output, and the gradient
# of the input through four layers.
MAX_RELATIVE_ERROR = {"float32": 1e-4, "bfloat16": 5e-2}


def plan(quick: bool) -> Iterator[tuple[str, str, str, str]]:
    """(code base, width, part, frame size) of every row; the most important first, the longest
    last."""
    installed = peers.installed()
    for (name, width, part), sizes in SIZES.items():
        if name in installed and (not quick or width == "vit_s"):
            yield from ((name, width, part, size) for size in (("64",) if quick else sizes))


def _first(result: Tensor | tuple) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


def timed(module: nn.Module, call: Callable, x: Tensor, pass_name: str) -> Callable[[], Tensor]:
    """The output, or after forward and backward the gradient of the input; parameters get theirs
    too, as in training."""
    leaf = x.detach().requires_grad_()
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    cotangents: list[Tensor] = []

    def forward() -> Tensor:
        with torch.no_grad():
            return _first(call(module, x))

    def both() -> Tensor:
        out = _first(call(module, leaf))
        if not cotangents:
            # Random: the last norm gives no gradient to a constant. Made by the first call, which
            # is never timed.
            cotangents.append(
                torch.randn_like(out, generator=torch.Generator(out.device).manual_seed(1))
            )
        return torch.autograd.grad(out, [leaf, *parameters], cotangents[0], allow_unused=True)[0]

    return forward if pass_name == "forward" else both


def gate(ours: Callable[[], Tensor], theirs: Callable[[], Tensor], dtype: str) -> None:
    harness.require_close("result", ours(), theirs(), rtol=MAX_RELATIVE_ERROR[dtype])


def comparisons(options: harness.Options) -> Iterator[harness.Comparison]:
    for name, width, part, size in plan(options.quick):
        if not options.wants(baseline=name):
            continue
        resolution = parse_resolution(size)
        torch.manual_seed(options.seed)
        # Layers are alike: one is enough where only its attention runs.
        depth = 1 if options.quick or part == "attention" else peers.DEPTH
        peer = peers.build(name, side=int(size), frames=FRAMES, size=width, depth=depth)
        clips = peer.clip.shape[0]
        tokens = torch.randn(clips, resolution.tokens(FRAMES) // clips, peers.WIDTHS[width][0])
        for dtype in options.dtypes or harness.default_dtypes(options.device):
            where = dict(device=options.device, dtype=getattr(torch, dtype))
            theirs = peer.model.to(**where)
            ours = copy.deepcopy(theirs)
            accelerate(ours)
            call, x = peer.call, peer.clip.to(**where)
            if part == "attention":
                ours, theirs = (model.get_submodule(peer.attention) for model in (ours, theirs))
                call, x = _call, tokens.to(**where)
            for pass_name in PASSES:
                if not options.wants(dtype=dtype, pass_name=pass_name):
                    continue
                candidate, reference = (
                    timed(module, call, x, pass_name) for module in (ours, theirs)
                )
                yield harness.Comparison(
                    case=f"{name}/{part}/{width}/{size}px/{FRAMES}f",
                    dtype=dtype,
                    pass_name=pass_name,
                    backend="auto",
                    baseline=name,
                    candidate=candidate,
                    reference=reference,
                    gate=partial(gate, candidate, reference, dtype),
                    details={
                        "group": f"{name} {part} {width}",
                        "part": part,
                        "resolution": size,
                        "tokens": resolution.tokens(FRAMES),
                    },
                )


def _call(module: nn.Module, x: Tensor) -> Tensor | tuple:
    return module(x)


if __name__ == "__main__":
    raise SystemExit(harness.main("integrations", comparisons, __doc__, min_rounds=2, budget_s=3.0))
