"""visible_patch_embed against what training code does today.

`embed_all` normalises the whole clip, convolves it and gathers the visible tokens. `gather_first`
indexes a strided view of the clip, normalises what it finds and multiplies, in eager PyTorch.
`product` is the product of gathered pixels with the weight alone, and its gradients: a ratio of 1
against it is the floor. Weight and bias are differentiated, the clip is not. Clips of bytes are
``[B, frames, height, width, 3]``, as decoders give them, clips of floats are normalised already and
``[B, 3, frames, height, width]``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import functional

from benchmarks import harness
from jepa_kernels import visible_patch_embed
from jepa_kernels.backend import ANY_DEVICE, OPS, Inputs

OP = "visible_patch_embed"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BATCH, FRAMES, TUBELET = 2, 16, (2, 16, 16)
PIXELS = 3 * TUBELET[0] * TUBELET[1] * TUBELET[2]
# (side in pixels, width of a token, share of visible tokens)
SIZES = ((224, 192, 0.1), (224, 192, 1.0), (224, 768, 0.1), (224, 768, 1.0), (112, 192, 0.25))
QUICK = ((64, 64, 0.25),)
# Output, gradients.
MAX_RELATIVE_ERROR = {"float32": (1e-4, 1e-4), "bfloat16": (2e-2, 2e-2), "float16": (4e-3, 4e-3)}
Call = Callable[..., torch.Tensor]


@dataclass
class Case:
    """One input."""

    name: str
    clip: torch.Tensor  # [B, 3, frames, height, width], of any strides
    weight: torch.Tensor
    bias: torch.Tensor
    ids: torch.Tensor  # [B, N]
    share: float

    @property
    def statistics(self) -> dict[str, tuple[float, ...] | None]:
        is_bytes = self.clip.dtype == torch.uint8
        return {"mean": MEAN if is_bytes else None, "std": STD if is_bytes else None}

    @property
    def grid(self) -> tuple[int, int, int]:
        frames, height, width = self.clip.shape[2:]
        return frames // TUBELET[0], height // TUBELET[1], width // TUBELET[2]

    @property
    def inputs(self) -> Inputs:
        given = {"ids": self.ids, **self.statistics}
        return OPS[OP].prepare(self.clip, self.weight, self.bias, **given)

    def supported(self) -> list[str]:
        """The backends with kernels of their own that take this call here."""
        op = OPS[OP]
        return [
            name
            for name in op.priority
            if op.backends[name].devices != ANY_DEVICE and not op.reasons(name, self.inputs)
        ]

    @property
    def details(self) -> dict[str, object]:
        return {
            "tokens": self.ids.numel(),
            "visible": self.share,
            "width": self.weight.shape[0],
            "clip_dtype": str(self.clip.dtype).removeprefix("torch."),
            "size_class": self.inputs.size_class(),
        }

    def flop(self, gradient: bool) -> float:
        return 2.0 * self.ids.numel() * self.weight.numel() * (2 if gradient else 1)

    def bytes(self, gradient: bool) -> float:
        """Visible pixels and the weight read, the output written; once more in backward, with the
        weight's gradient."""
        pixels = self.ids.numel() * PIXELS * self.clip.element_size()
        out = self.ids.numel() * self.weight.shape[0] * self.weight.element_size()
        weight = self.weight.numel() * self.weight.element_size()
        return (pixels + out + weight) * (2.0 if gradient else 1.0)


def cases(options: harness.Options) -> Iterator[tuple[str, Case]]:
    for dtype in options.dtypes or harness.default_dtypes(options.device):
        kind = getattr(torch, dtype)
        for side, width, share in QUICK if options.quick else SIZES:
            for clip_dtype in ("uint8", "float32"):
                torch.manual_seed(options.seed)
                clip = torch.randint(0, 256, (BATCH, FRAMES, side, side, 3), dtype=torch.uint8)
                clip = clip.permute(0, 4, 1, 2, 3)
                if clip_dtype == "float32":
                    clip = normalised(clip).contiguous()
                conv = torch.nn.Conv3d(3, width, TUBELET, TUBELET)
                tokens = FRAMES // TUBELET[0] * (side // TUBELET[1]) ** 2
                ids = [torch.randperm(tokens)[: round(share * tokens)].sort().values] * BATCH
                yield (
                    dtype,
                    Case(
                        f"{side}px/{FRAMES}f/{share:.0%}/D{width}/{clip_dtype}",
                        clip.to(options.device),
                        conv.weight.detach().to(options.device, kind),
                        conv.bias.detach().to(options.device, kind),
                        torch.stack(ids).to(options.device),
                        share,
                    ),
                )


def normalised(clip: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(s, device=clip.device).view(3, 1, 1, 1) for s in (MEAN, STD))
    return (clip.float() / 255.0 - mean) / std


def ours(case: Case, backend: str) -> Call:
    return lambda w, b: visible_patch_embed(
        case.clip, w, b, ids=case.ids, **case.statistics, backend=backend
    )


def embed_all(case: Case) -> Call:
    def call(w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        clip = normalised(case.clip) if case.clip.dtype == torch.uint8 else case.clip
        every = functional.conv3d(clip.to(w.dtype), w, b, TUBELET).flatten(2).mT
        return torch.gather(every, 1, case.ids[..., None].expand(-1, -1, every.shape[2]))

    return call


def gathered(case: Case) -> torch.Tensor:
    """The normalised pixels of the visible tubelets, ``[B, N, K]``."""
    grid = case.grid
    cut = case.clip.unflatten(4, (grid[2], -1)).unflatten(3, (grid[1], -1))
    view = cut.unflatten(2, (grid[0], -1)).permute(0, 2, 4, 6, 1, 3, 5, 7)
    sample = torch.arange(BATCH, device=case.ids.device)[:, None]
    step, site = case.ids // (grid[1] * grid[2]), case.ids % (grid[1] * grid[2])
    pixels = view[sample, step, site // grid[2], site % grid[2]]
    if case.clip.dtype == torch.uint8:
        pixels = normalised(pixels.flatten(0, 1)).unflatten(0, pixels.shape[:2])
    return pixels.flatten(2)


def gather_first(case: Case) -> Call:
    return lambda w, b: functional.linear(gathered(case).to(w.dtype), w.flatten(1), b)


def product(case: Case) -> Call:
    pixels = gathered(case).to(case.weight.dtype)
    return lambda w, b: functional.linear(pixels, w.flatten(1), b)


def baselines(case: Case) -> dict[str, Call]:
    makers = (embed_all, gather_first, product)
    return {make.__name__: make(case) for make in makers}


def timed(case: Case, call: Call, pass_name: str) -> Callable[[], object]:
    leaves = [case.weight, case.bias]
    if pass_name == "forward":

        def forward() -> torch.Tensor:
            with torch.no_grad():
                return call(*leaves)

        return forward
    return harness.forward_backward(call, leaves, torch.randn_like(call(*leaves)))


def gate(case: Case, backend: str, dtype: str) -> None:
    """Output and gradients against float64."""
    shape = (*case.ids.shape, case.weight.shape[0])
    cotangent = torch.randn(shape, device=case.clip.device, dtype=torch.float64)

    def results(name: str, kind: torch.dtype) -> list[torch.Tensor]:
        leaves = [t.to(kind).detach().requires_grad_() for t in (case.weight, case.bias)]
        out = ours(case, name)(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, cotangent.to(kind))]

    exact = results("torch", torch.float64)
    found = results(backend, case.weight.dtype)
    of_out, of_gradients = MAX_RELATIVE_ERROR[dtype]
    limits = (of_out, of_gradients, of_gradients)
    names = ("out", "weight gradient", "bias gradient")
    for name, a, b, limit in zip(names, found, exact, limits, strict=True):
        harness.require_close(name, a, b, rtol=limit)


def comparisons(options: harness.Options) -> Iterator[harness.Comparison]:
    for dtype, case in cases(options):
        rivals = baselines(case)
        for backend in options.backends or (*case.supported(), "torch"):
            for pass_name in ("forward", "forward+backward"):
                for name, rival in rivals.items():
                    if options.wants(baseline=name, dtype=dtype, pass_name=pass_name):
                        yield harness.Comparison(
                            case=case.name,
                            dtype=dtype,
                            pass_name=pass_name,
                            backend=backend,
                            baseline=name,
                            candidate=timed(case, ours(case, backend), pass_name),
                            reference=timed(case, rival, pass_name),
                            gate=partial(gate, case, backend, dtype),
                            flop=case.flop(pass_name != "forward"),
                            bytes=case.bytes(pass_name != "forward"),
                            details=case.details,
                        )


if __name__ == "__main__":
    raise SystemExit(harness.main(OP, comparisons, __doc__))
