"""The cases of `benchmarks.gpu_time`: every op at the sizes that training has, and everything that
each can be compared with.

The bare attention kernels (`sdpa_*`, `varlen`, `flash_attention`) do not rotate: they are the bound
of ours, which always does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import (
    bench_adamw_ema,
    bench_ema_update,
    bench_latent_rollout,
    bench_masked_attention,
    bench_sliced_gaussianity,
    bench_visible_patch_embed,
    harness,
    parameter_lists,
)
from benchmarks.gpu_lines import Row
from benchmarks.resolutions import parse_resolution
from jepa.masks import mask_policy, sample_masks
from jepa_kernels.backend import OPS
from jepa_kernels.nn import EMATeacher
from jepa_kernels.optim import AdamWEMA
from jepa_kernels.support import example

TOPICS = ("attention", "lists", "rollout", "gaussianity", "patches")
Call = Callable[[], object]


class NotHere(RuntimeError):
    """A side that needs what this machine lacks."""


@dataclass(frozen=True)
class Side:
    """One implementation of a case. `build` makes the call to time; `gate` raises where ours is
    wrong."""

    name: str
    ours: bool
    build: Callable[[], Call]
    gate: Callable[[], None] | None = None


@dataclass(frozen=True)
class Task:
    """One (case, dtype, pass) with every side of it."""

    op: str
    case: str
    dtype: str
    pass_name: str
    size_class: str
    sides: tuple[Side, ...]
    flop: float | None = None
    bytes: float | None = None
    details: dict[str, object] = field(default_factory=dict)

    def names(self) -> Row:
        return {
            "op": self.op,
            "case": self.case,
            "dtype": self.dtype,
            "pass": self.pass_name,
            "size_class": self.size_class,
        }


# (heads, channels, pixels, samples, ragged), most valuable first: ViT-L at 2k tokens, its JEPA
# contexts, 1.5k and 8k tokens, the predictor, short sequences.
ATTENTION = (
    (16, 64, "256", 8, False),
    (16, 64, "224", 16, True),
    (16, 64, "224", 8, False),
    (16, 64, "512", 2, False),
    (12, 32, "224", 8, False),
    (16, 64, "112", 32, False),
    (16, 80, "224", 8, False),
    (16, 64, "384", 8, True),
)
PASSES = ("forward", "forward+backward")


def attention_case(
    heads: int,
    head_dim: int,
    pixels: str,
    samples: int,
    ragged: bool,
    dtype: torch.dtype,
    device: str,
) -> bench_masked_attention.Case:
    torch.manual_seed(0)
    resolution, frames = parse_resolution(pixels), bench_masked_attention.FRAMES
    shape, offsets = (samples, resolution.tokens(frames)), None
    ids = torch.arange(shape[1], device=device)
    if ragged:
        grid, policy = resolution.grid(frames), mask_policy("blocks")
        masks = sample_masks(policy, grid, seed=0, step=0, samples=range(samples)).to(device)
        ids, offsets, shape = masks.context_ids, masks.context_cu, (masks.context_ids.numel(),)
    qkv = torch.randn(*shape, 3, heads, head_dim, device=device).to(dtype)
    form = "ragged" if ragged else "dense"
    name = f"{heads}x{head_dim}/{pixels}px/{frames}f/batch{samples}/{form}"
    return bench_masked_attention.Case(name, form, resolution, qkv, ids, offsets)


def attention(device: str, quick: bool) -> Iterator[Task]:
    shapes = ((2, 32, "64", 2, False), (2, 32, "64", 2, True)) if quick else ATTENTION
    plan = [(shape, torch.float32 if quick else torch.bfloat16, False) for shape in shapes]
    if not quick:
        plan += [(ATTENTION[0], torch.float16, False), (ATTENTION[2], torch.float32, False)]
        # Last and apart: torch.compile takes seconds for each case.
        plan += [(ATTENTION[0], torch.bfloat16, True)]
    for shape, dtype, compiled in plan:
        case = attention_case(*shape, dtype, device)
        op = OPS[bench_masked_attention.OP]
        query, key, value = case.qkv.unbind(-3)
        rope = bench_masked_attention.Rope3D(case.grid)
        described = op.prepare(
            query, key, value, query_ids=case.ids, rope=rope, cu_seqlens_q=case.offsets
        )
        backends = [b for b in op.priority if b != "reference" and not op.reasons(b, described)]
        rivals = [_compiled(case)] if compiled else list(_attention_rivals(case))
        for pass_name in PASSES:
            run = partial(_attention_call, case, pass_name)
            gate = partial(_attention_gate, case, pass_name)
            yield Task(
                op=bench_masked_attention.OP,
                case=case.name + ("/compiled" if compiled else ""),
                dtype=str(dtype).removeprefix("torch."),
                pass_name=pass_name,
                size_class=described.size_class(),
                sides=(
                    *(
                        Side(
                            name,
                            True,
                            partial(run, partial(bench_masked_attention.ours, case, name)),
                            partial(gate, name),
                        )
                        for name in backends
                    ),
                    *(Side(n, False, partial(run, c)) for n, c in rivals),
                ),
                flop=case.flop(pass_name),
                bytes=case.traffic(pass_name),
                details={
                    "tokens": case.resolution.tokens(bench_masked_attention.FRAMES),
                    "heads": case.heads,
                    "head_dim": case.head_dim,
                    "longest": max(case.lengths),
                    "sequences": len(case.lengths),
                    "flash": op.backends["flash"].facts["library"](),
                },
            )


def _attention_call(
    case: bench_masked_attention.Case, pass_name: str, call: bench_masked_attention.Call
) -> Call:
    return bench_masked_attention._run(call, case.qkv, case.cotangent, pass_name)


def _attention_gate(case: bench_masked_attention.Case, pass_name: str, backend: str) -> None:
    """The first head of the first sequence against rotation and softmax in float64: heads and
    sequences do not mix, and the whole would take minutes."""
    actual = _attention_call(case, pass_name, partial(bench_masked_attention.ours, case, backend))()
    rows = slice(case.lengths[0]) if case.offsets is not None else slice(None)
    batch = () if case.offsets is not None else (slice(1),)
    gradient = pass_name == "forward+backward"
    at = (*batch, rows)
    qkv = case.qkv[at][..., :1, :] if case.offsets is None else case.qkv[at][None, ..., :1, :]
    small = bench_masked_attention.Case(
        case.name, case.group, case.resolution, qkv.contiguous(), case.ids[: qkv.shape[1]]
    )
    small.cotangent = case.cotangent[at][..., : case.head_dim].reshape(*qkv.shape[:2], -1)
    exact = _exact(small, gradient)
    found = actual[at][..., :1, :] if gradient else actual[at][..., : case.head_dim]
    name = str(case.qkv.dtype).removeprefix("torch.")
    limit = bench_masked_attention.MAX_RELATIVE_ERROR[name]
    limit *= (10 if name == "float32" else 2) if gradient else 1
    harness.require_close(
        "gradient of qkv" if gradient else "out", found.reshape(exact.shape), exact, rtol=limit
    )


def _exact(case: bench_masked_attention.Case, gradient: bool) -> torch.Tensor:
    call = partial(_rotated, case)
    if gradient:
        wide, weight = case.qkv.double(), case.cotangent.double()
        return harness.forward_backward(call, [wide], weight)()[0]
    with torch.no_grad():
        return call(case.qkv.double())


def _rotated(case: bench_masked_attention.Case, qkv: torch.Tensor) -> torch.Tensor:
    """Rotation and SDPA in eager PyTorch, of one id list."""
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    ids = case.ids.expand(qkv.shape[0], -1)
    out = bench_masked_attention.eager_attention.attend(query, key, value, ids, case.grid)
    return out.transpose(1, 2).flatten(-2)


Rival = tuple[str, bench_masked_attention.Call]


def _compiled(case: bench_masked_attention.Case) -> Rival:
    eager = partial(bench_masked_attention.rotated_sdpa, case)
    return "compiled_rotation_sdpa", torch.compile(eager, dynamic=False)


def _attention_rivals(case: bench_masked_attention.Case) -> Iterator[Rival]:
    if case.offsets is not None:
        yield "varlen", _varlen(case)
        yield "flash_attention", _flash_attention(case)
        return
    for kind in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION"):
        name = f"sdpa_{kind.removesuffix('_ATTENTION').lower()}"
        yield name, partial(_bare_sdpa, getattr(SDPBackend, kind))
    yield "flash_attention", _flash_attention(case)
    yield "rotation_sdpa", partial(bench_masked_attention.rotated_sdpa, case)


def _bare_sdpa(kind: SDPBackend, qkv: torch.Tensor) -> torch.Tensor:
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    with sdpa_kernel(kind):
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(-2)


def _lengths(case: bench_masked_attention.Case) -> tuple[torch.Tensor, int]:
    """Offsets and longest sequence, as the libraries want them. Read once: a graph records no
    reading."""
    return case.offsets.to(torch.int32), max(case.lengths)


def _varlen(case: bench_masked_attention.Case) -> bench_masked_attention.Call:
    cu, longest = _lengths(case)

    def call(qkv: torch.Tensor) -> torch.Tensor:
        from torch.nn.attention.varlen import varlen_attn

        query, key, value = qkv.unbind(-3)
        return varlen_attn(query, key, value, cu, cu, longest, longest).flatten(-2)

    return call


def _flash_attention(case: bench_masked_attention.Case) -> bench_masked_attention.Call:
    module = next((m for m in ("flash_attn_interface", "flash_attn") if find_spec(m)), None)
    lengths = () if case.offsets is None else _lengths(case)

    def call(qkv: torch.Tensor) -> torch.Tensor:
        if module is None:
            raise NotHere("flash_attn is not installed")
        library = import_module(module)
        inputs = qkv.unbind(-3)
        if lengths:
            cu, longest = lengths
            out = library.flash_attn_varlen_func(*inputs, cu, cu, longest, longest)
        else:
            out = library.flash_attn_func(*inputs)
        return (out[0] if isinstance(out, tuple) else out).flatten(-2)

    return call


def lists(device: str, quick: bool) -> Iterator[Task]:
    yield from _averages(device, quick)
    yield _optimizers(device, "micro" if quick else "vit_l")


def _averages(device: str, quick: bool) -> Iterator[Task]:
    op, encoder = OPS["ema_update"], "micro" if quick else "vit_l"
    for kind in ("float32", "mixed"):
        source = torch.float32 if kind == "float32" else torch.bfloat16
        targets = parameter_lists.draw(encoder, torch.float32, device)
        sources = parameter_lists.draw(encoder, source, device)
        copies = [t.bfloat16() for t in targets] if kind == "mixed" else []
        case = bench_ema_update.Case(f"{encoder}/{kind}", kind, targets, sources, copies)
        call = op.prepare(targets, sources, 0.9, copies=copies or None)
        backends = [b for b in op.priority if b != "reference" and not op.reasons(b, call)]
        rivals = [n for n in bench_ema_update.BASELINES if n != "stream" or kind == "float32"]
        yield Task(
            op=op.name,
            case=case.name,
            dtype=kind,
            pass_name="forward",
            size_class=call.size_class(),
            sides=(
                *(
                    Side(
                        n,
                        True,
                        partial(bench_ema_update.ours, case, n),
                        bench_ema_update.gate(case, n),
                    )
                    for n in backends
                ),
                *(Side(n, False, partial(bench_ema_update.baseline, case, n)) for n in rivals),
            ),
            bytes=case.bytes(),
            details={"tensors": len(targets), "parameters": sum(t.numel() for t in targets)},
        )


def _optimizers(device: str, encoder: str) -> Task:
    op = OPS["adamw_ema"]
    described = example(op, torch.device(device).type, torch.float32)
    backends = [b for b in op.priority if b != "reference" and not op.reasons(b, described)]
    count = parameter_lists.count(encoder)
    return Task(
        op=op.name,
        case=encoder,
        dtype="float32",
        pass_name="forward",
        size_class="small" if count < 1_000_000 else "large",
        sides=(
            *(
                Side(
                    n,
                    True,
                    partial(_our_step, device, encoder, n),
                    bench_adamw_ema.gate("micro", device, n),
                )
                for n in backends
            ),
            Side("adamw_fused", False, partial(_their_step, device, encoder, {"fused": True})),
            Side("adamw_foreach", False, partial(_their_step, device, encoder, {"foreach": True})),
        ),
        bytes=36.0 * count,
        details={"parameters": count, "tensors": len(parameter_lists.shapes(encoder))},
    )


def _capturable(device: str) -> bool:
    return torch.device(device).type == "cuda"


def _our_step(device: str, encoder: str, backend: str) -> Call:
    student = bench_adamw_ema.Student(encoder, device).with_gradients()
    momentum: float | torch.Tensor = bench_adamw_ema.MOMENTUM
    if _capturable(device):
        momentum = torch.tensor(momentum, dtype=torch.float64, device=device)
    return AdamWEMA(
        student.groups(),
        teacher=EMATeacher(student, momentum),
        backend=backend,
        capturable=_capturable(device),
        **bench_adamw_ema.OPTIONS,
    ).step


def _their_step(device: str, encoder: str, how: dict[str, bool]) -> Call:
    student = bench_adamw_ema.Student(encoder, device).with_gradients()
    optimizer = torch.optim.AdamW(
        student.groups(), capturable=_capturable(device), **how, **bench_adamw_ema.OPTIONS
    )
    sources = [p.detach() for p in student.weights]
    targets = [s.clone() for s in sources]

    def step() -> None:
        optimizer.step()
        torch._foreach_lerp_(targets, sources, 1 - bench_adamw_ema.MOMENTUM)

    return step


ROLLOUTS = (
    ("residual_mlp", 2048, 1536, 4, "last"),
    ("residual_mlp", 2048, 3072, 4, "loss"),
    ("gru", 1024, 512, 16, "last"),
    ("hamiltonian", 2048, 1536, 4, "loss"),
    ("residual_mlp", 8192, 1536, 4, "last"),
    ("published", 224, 3072, 1, "ld"),
    ("residual_mlp", 2048, 768, 4, "states"),
)


def rollouts(device: str, quick: bool) -> Iterator[Task]:
    options = harness.Options(device=device)
    for kind, rows, channels, horizon, output in (
        (("residual_mlp", 64, 64, 2, "last"),) if quick else ROLLOUTS
    ):
        dtype = torch.float32 if quick else torch.bfloat16
        if kind == "published":
            case = bench_latent_rollout.published_case(rows, channels, output, dtype, options)
        else:
            case = bench_latent_rollout.rollout_case(
                kind, rows, channels, horizon, output, dtype, options
            )
        name = str(dtype).removeprefix("torch.")
        for pass_name in PASSES:
            gradient = pass_name == "forward+backward"
            rivals = {n: build(gradient) for n, build in case.baselines.items()}
            oracle = next(iter(rivals.values()))
            run = partial(_rollout_call, case, pass_name)
            yield Task(
                op=bench_latent_rollout.OP,
                case=case.name,
                dtype=name,
                pass_name=pass_name,
                size_class=str(case.details["size_class"]),
                sides=(
                    *(
                        Side(
                            n,
                            True,
                            partial(run, case.ours(n)),
                            partial(bench_latent_rollout.gate, case, n, oracle, name, pass_name),
                        )
                        for n in (*case.supported, "torch")
                    ),
                    *(Side(n, False, partial(run, call)) for n, call in rivals.items()),
                ),
                flop=case.flop * (3 if gradient else 1),
                details={k: v for k, v in case.details.items() if k != "result_bytes"},
            )


def _rollout_call(
    case: bench_latent_rollout.Case, pass_name: str, call: bench_latent_rollout.Call
) -> Call:
    return bench_latent_rollout._run(call, case, pass_name)


def gaussianity(device: str, quick: bool) -> Iterator[Task]:
    dtype = "float32" if quick else "bfloat16"
    options = harness.Options(quick=quick, dtypes=(dtype,), device=device)
    for _, case in bench_sliced_gaussianity.cases(options):
        rivals = bench_sliced_gaussianity.baselines(case, quick)
        yield from _by_pass(bench_sliced_gaussianity, case, rivals, dtype)


def patches(device: str, quick: bool) -> Iterator[Task]:
    dtype = "float32" if quick else "bfloat16"
    options = harness.Options(quick=quick, dtypes=(dtype,), device=device)
    for _, case in bench_visible_patch_embed.cases(options):
        rivals = bench_visible_patch_embed.baselines(case)
        yield from _by_pass(bench_visible_patch_embed, case, rivals, dtype)


def _by_pass(
    bench: ModuleType, case: Any, rivals: Mapping[str, Callable[..., Any]], dtype: str
) -> Iterator[Task]:
    """Our backends and the baselines of one case of `bench`, forward and with backward."""
    for pass_name in PASSES:
        run = partial(bench.timed, case, pass_name=pass_name)
        yield Task(
            op=bench.OP,
            case=case.name,
            dtype=dtype,
            pass_name=pass_name,
            size_class=str(case.details["size_class"]),
            sides=(
                *(
                    Side(
                        n,
                        True,
                        partial(run, bench.ours(case, n)),
                        partial(bench.gate, case, n, dtype),
                    )
                    for n in (*case.supported(), "torch")
                ),
                *(Side(n, False, partial(run, call)) for n, call in rivals.items()),
            ),
            flop=case.flop(pass_name != "forward"),
            details=case.details,
        )


def tasks(topic: str, device: str, quick: bool) -> Iterator[Task]:
    """The cases of one of TOPICS, most valuable first; inputs are made as they are reached."""
    makers = {
        "attention": attention,
        "lists": lists,
        "rollout": rollouts,
        "gaussianity": gaussianity,
        "patches": patches,
    }
    return makers[topic](device, quick)
