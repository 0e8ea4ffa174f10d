"""What only a device can show: calls that a CUDA graph records, side streams, two devices, compiled
calls, addresses beyond 2^31 elements; and every kernel in the dtypes and shapes of its op.

Where a script has a meaning on a CPU it runs there too, so that it is known to run before a device
is there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from jepa_kernels import (
    Rope3D,
    ema_update_,
    masked_attention,
    native,
    sliced_gaussianity,
    visible_patch_embed,
)
from jepa_kernels.ops.adamw_ema import TeacherLists, adamw_ema_
from jepa_kernels.ops.latent_rollout import ResidualMLP, latent_rollout
from jepa_kernels.ops.latent_rollout.cells import with_parameters
from jepa_kernels.ops.masked_attention import flash
from jepa_kernels.testing import (
    BFLOAT16,
    FLOAT32_CANCELLING,
    FLOAT32_SHORT,
    HEAD_DIMS,
    RESULT_FAULTS,
    attention_case,
    check_attention,
    planted_fault,
    run_attention,
)
from jepa_kernels.testing.rollout import (
    CELLS,
    check_rollout,
    rollout_case,
    run_rollout,
)
from tests.ops.devices import GPU_BACKENDS, on_a_gpu

HERE = "cpu" if native.available() else "torch"
each_gpu_backend = pytest.mark.parametrize("backend", [on_a_gpu(b) for b in GPU_BACKENDS])
each_device = pytest.mark.parametrize(
    ("device", "backend"),
    [
        pytest.param("cpu", HERE, id="cpu"),
        *(on_a_gpu("cuda", b, id=f"cuda-{b}") for b in GPU_BACKENDS),
    ],
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.gpu
def test_the_kernels_are_there():
    from jepa_kernels.backend import OPS
    from jepa_kernels.support import example

    for op in OPS.values():
        for dtype in DTYPES:
            for backend in GPU_BACKENDS:
                assert op.reasons(backend, example(op, "cuda", dtype)) == []


@each_gpu_backend
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_float16_attention(backend, head_dim):
    shared = {"head_dim": head_dim, "dtype": torch.float16}
    check_attention(attention_case((5, 0, 70), packed=True, slack=2, **shared), backend, "cuda")
    strided = attention_case((9, 9), (130, 130), strided=True, layout="tiled", **shared)
    check_attention(strided, backend, "cuda")


@each_gpu_backend
@pytest.mark.parametrize("lengths", [(1568,), (700, 1, 513, 64)], ids=["dense", "ragged"])
def test_attention_at_the_lengths_of_video(backend, lengths):
    shared = {"head_dim": 64, "dtype": torch.bfloat16, "grid": (8, 14, 14)}
    check_attention(attention_case(lengths, packed=len(lengths) > 1, **shared), backend, "cuda")


@pytest.mark.parametrize("library", [on_a_gpu(x, id=x.name) for x in flash.LIBRARIES])
class TestFlash:
    """The flash backend on each library that runs here."""

    @pytest.fixture(autouse=True)
    def _alone(self, library, monkeypatch):
        why = flash._obstacles(torch.are_deterministic_algorithms_enabled())
        why = why[flash.LIBRARIES.index(library)]
        if why:
            pytest.skip(why)
        monkeypatch.setattr(flash, "library", lambda: library)

    @pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
    @pytest.mark.parametrize("head_dim", HEAD_DIMS)
    def test_every_form(self, head_dim, dtype):
        shared = {"head_dim": head_dim, "dtype": dtype, "layout": "tiled"}
        for case in (
            attention_case((5, 0, 270), packed=True, slack=2, **shared),
            attention_case((3, 0, 9), (130, 2, 0), packed=True, strided=True, **shared),
            attention_case((9, 9), (130, 130), strided=True, **shared),
            attention_case((200,), **{**shared, "grid": None}),
        ):
            check_attention(case, "flash", "cuda")

    @pytest.mark.parametrize("lengths", [(1568,), (700, 1, 513, 64)], ids=["dense", "ragged"])
    def test_the_lengths_of_video_repeat_bit_for_bit(self, lengths):
        torch.use_deterministic_algorithms(True)
        case = attention_case(
            lengths, packed=len(lengths) > 1, head_dim=64, dtype=torch.bfloat16, grid=(8, 14, 14)
        )
        first = check_attention(case, "flash", "cuda")
        again = run_attention(case, "flash", device="cuda")
        for (name, a), (_, b) in zip(first.named(), again.named(), strict=True):
            assert torch.equal(a, b), name

    def test_a_graph_computes_anew_from_lengths(self):
        leaves, ids, cu, call = attention_call("flash", "cuda", Rope3D((2, 4, 5)), True)
        replay, kept = recorded(call, "cuda")
        cu.copy_(torch.tensor([0, 29, 38]))
        replay()
        for got, wanted in zip(kept, call(), strict=True):
            torch.testing.assert_close(got, wanted, **BFLOAT16)


@each_gpu_backend
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("output", ["states", "last", 1.0, 2.5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rollouts(backend, cell, output, dtype):
    check_rollout(rollout_case(cell, output, dtype=dtype), backend, "cuda")


@each_gpu_backend
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(
    "options",
    [
        {"rows": 0},
        {"rows": 1, "horizon": 1},
        {"rows": 130, "hidden": 40, "channels": 70},
        {"rows": 101, "hidden": 33, "channels": 34, "horizon": 2},
        {"gathered": False, "strided": True},
        {"anchored": False, "split": False, "index_dtype": torch.int32},
        {"rows": 53, "channels": 300, "hidden": 270, "horizon": 2},
        {"rows": 24, "horizon": 64, "gain": 0.5, "gathered": False},
    ],
    ids=lambda options: "-".join(f"{k}={v}" for k, v in options.items()),
)
def test_shapes_of_rollouts(backend, cell, options):
    for output, dtype in (("states", torch.float32), (2.0, torch.bfloat16)):
        check_rollout(rollout_case(cell, output, dtype=dtype, **options), backend, "cuda")


@each_gpu_backend
@pytest.mark.parametrize("cell", CELLS)
def test_rollouts_repeat_bitwise(backend, cell):
    case = rollout_case(cell, 2.0, rows=301, dtype=torch.bfloat16)
    first, second = (run_rollout(case, backend, device="cuda") for _ in range(2))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@each_gpu_backend
@pytest.mark.parametrize("phase", ["forward", "backward"])
@pytest.mark.parametrize("fault", RESULT_FAULTS)
def test_a_planted_fault_in_a_rollout_is_seen(backend, phase, fault):
    # The last gradient of a loss is that of the targets.
    output = 1.0 if (phase, fault) == ("backward", "unwritten_row") else "states"
    case = rollout_case("residual_mlp", output)
    check_rollout(case, backend, "cuda")
    with planted_fault("latent_rollout", backend, fault, phase), pytest.raises(AssertionError):
        check_rollout(case, backend, "cuda")


def recorded(call: Callable[[], tuple[torch.Tensor, ...]], device: str):
    """(a replay of `call`, its results): a CUDA graph after warm-up calls on a side stream; on
    a CPU the call itself, writing into the results of the first."""
    if device == "cpu":
        kept = call()

        def again() -> None:
            for old, new in zip(kept, call(), strict=True):
                old.copy_(new)

        return again, kept
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = call()
    return graph.replay, kept


def attention_call(backend: str, device: str, rope: Rope3D, packed: bool):
    """Leaves of a bfloat16 call, its ids and offsets, and the call: out and three gradients."""
    shape = (40, 3, 64) if packed else (2, 20, 3, 64)
    dtype = torch.bfloat16 if device != "cpu" else torch.float32
    leaves = [torch.randn(shape, device=device, dtype=dtype).requires_grad_() for _ in range(3)]
    ids = torch.arange(shape[-3], device=device) % rope.num_tokens
    cu = torch.tensor([0, 13, 40], device=device, dtype=torch.int32) if packed else None
    weight = torch.randn(shape, device=device, dtype=dtype)

    def call() -> tuple[torch.Tensor, ...]:
        out = masked_attention(*leaves, query_ids=ids, rope=rope, cu_seqlens_q=cu, backend=backend)
        return (out.detach().clone(), *torch.autograd.grad(out, leaves, weight))

    return leaves, ids, cu, call


@each_device
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_a_graph_computes_anew_from_values_ids_and_lengths(device, backend, packed):
    leaves, ids, cu, call = attention_call(backend, device, Rope3D((2, 4, 5)), packed)
    replay, kept = recorded(call, device)
    for _ in range(2):
        with torch.no_grad():
            for leaf in leaves:
                leaf.copy_(torch.randn_like(leaf))
            ids.copy_(torch.randint(0, 40, ids.shape))
            if cu is not None:
                cu.copy_(torch.tensor([0, 29, 38]))
        replay()
        for got, wanted in zip(kept, call(), strict=True):
            assert torch.equal(got, wanted)


@each_gpu_backend
def test_a_table_first_used_in_a_capture_does_not_reach_eager_calls(backend):
    """No warm-up: the graph makes the rope table, whose values exist only once it has run."""
    rope = Rope3D((2, 4, 5), "tiled", interpolate_from=11)
    warm = attention_call(backend, "cuda", Rope3D((2, 4, 5)), False)[-1]
    for _ in range(3):
        warm()
    leaves, _, _, call = attention_call(backend, "cuda", rope, False)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = call()
    eager = call()
    twin = masked_attention(
        *(t.detach().cpu().float() for t in leaves),
        query_ids=torch.arange(20),
        rope=rope,
        backend="reference",
    )
    torch.testing.assert_close(eager[0].cpu().float(), twin, **BFLOAT16)
    graph.replay()
    for got, wanted in zip(kept, eager, strict=True):
        assert torch.equal(got, wanted)


@each_gpu_backend
def test_a_graph_outlives_the_tables_of_300_other_grids(backend):
    leaves, _, _, call = attention_call(backend, "cuda", Rope3D((2, 4, 5)), False)
    replay, kept = recorded(call, "cuda")
    wanted = call()
    x = leaves[0].detach()
    for width in range(1, 301):
        rope = Rope3D((1, 1, width))
        masked_attention(x, x, x, query_ids=torch.zeros(20, device="cuda").long(), rope=rope)
    spoilt = [torch.full((64, 1024), float("nan"), device="cuda") for _ in range(64)]
    replay()
    for got, other in zip(kept, wanted, strict=True):
        assert torch.equal(got, other)
    del spoilt


@each_device
@pytest.mark.parametrize("cell", CELLS)
def test_a_graph_of_a_rollout(device, backend, cell):
    case = rollout_case(cell, "states", gathered=False, anchored=False)
    states = case.states.float().to(device).requires_grad_()
    parameters = [p.float().to(device).requires_grad_() for p in case.cell.parameters()]
    actions = None if case.actions is None else case.actions.float().to(device)
    weight = case.grad_out.float().to(device)

    def call() -> tuple[torch.Tensor, ...]:
        now = with_parameters(case.cell, parameters)
        out = latent_rollout(states, now, case.horizon, actions=actions, backend=backend)
        return (out.detach().clone(), *torch.autograd.grad(out, [states, *parameters], weight))

    replay, kept = recorded(call, device)
    with torch.no_grad():
        states.copy_(torch.randn_like(states))
    replay()
    for got, wanted in zip(kept, call(), strict=True):
        assert torch.equal(got, wanted)


@each_device
def test_a_graph_of_an_embedding_reads_new_ids_and_pixels(device, backend):
    clip = torch.rand(2, 3, 4, 32, 32, device=device, requires_grad=True)
    weight = torch.randn(40, 3, 2, 16, 16, device=device, requires_grad=True)
    ids, cu = torch.tensor([3, 0, 5, 5, 1], device=device), torch.tensor([0, 2, 5], device=device)

    def call() -> tuple[torch.Tensor, ...]:
        options = {"ids": ids, "cu_seqlens": cu, "mean": (0.4, 0.5, 0.6)}
        out = visible_patch_embed(clip, weight, **options, backend=backend)
        return (out.detach().clone(), *torch.autograd.grad(out.sum(), (clip, weight)))

    replay, kept = recorded(call, device)
    with torch.no_grad():
        clip.copy_(torch.rand_like(clip))
    ids.copy_(torch.tensor([7, 7, 2, 6, 0]))
    cu.copy_(torch.tensor([0, 4, 5]))
    replay()
    for got, wanted in zip(kept, call(), strict=True):
        assert torch.equal(got, wanted)


@each_gpu_backend
def test_ids_outside_the_grid_read_no_foreign_pixels(backend):
    clip, weight = torch.rand(1, 3, 2, 32, 32), torch.randn(8, 3, 2, 16, 16)
    far = torch.tensor([-1, 4, 2**62], device="cuda")
    out = visible_patch_embed(clip.cuda(), weight.cuda(), ids=far, backend=backend)
    near = visible_patch_embed(clip, weight, ids=torch.tensor([0, 3, 3]), backend="reference")
    torch.testing.assert_close(out.cpu(), near, **FLOAT32_CANCELLING)


@each_device
def test_a_graph_of_a_statistic(device, backend):
    x = torch.randn(300, 24, device=device, requires_grad=True)

    def call() -> tuple[torch.Tensor, ...]:
        out = sliced_gaussianity(x, 40, seed=2, backend=backend)
        return (out.detach().clone(), *torch.autograd.grad(out, x))

    replay, kept = recorded(call, device)
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    replay()
    for got, wanted in zip(kept, call(), strict=True):
        assert torch.equal(got, wanted)


@each_device
def test_a_graph_of_an_average_reads_momentum_and_sources(device, backend):
    targets, sources = ([torch.randn(n, device=device) for n in (5, 4099)] for _ in range(2))
    momentum = torch.tensor(0.9, dtype=torch.float64, device=device)

    def call() -> tuple[torch.Tensor, ...]:
        ema_update_(targets, sources, momentum, backend=backend)
        return ()

    replay, _ = recorded(call, device)
    start = [t.clone() for t in targets]
    momentum.fill_(0.25)
    for source in sources:
        source.normal_()
    replay()
    for target, before, source in zip(targets, start, sources, strict=True):
        expected = 0.25 * before.double() + 0.75 * source.double()
        torch.testing.assert_close(target.double(), expected, **FLOAT32_SHORT)


@each_gpu_backend
def test_a_list_first_seen_in_a_capture(backend):
    """Its table of addresses is uploaded by the graph itself."""
    warm = [torch.zeros(3, device="cuda")]
    ema_update_(warm, [torch.ones(3, device="cuda")], 0.5, backend=backend)
    targets, sources = ([torch.full((70,), v, device="cuda")] for v in (0.0, 1.0))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ema_update_(targets, sources, 0.5, backend=backend)
    for other in range(100):
        ema_update_(
            [torch.zeros(other + 1, device="cuda")],
            [torch.ones(other + 1, device="cuda")],
            0.5,
            backend=backend,
        )
    graph.replay()
    graph.replay()
    assert targets[0].tolist() == [0.75] * 70


@each_gpu_backend
def test_two_side_streams_share_a_new_table(backend):
    """First use on stream A, then B, without a word between them: many times, since a race shows by
    luck."""
    x = torch.randn(1, 600, 4, 64, device="cuda", dtype=torch.bfloat16)
    ids = torch.arange(600, device="cuda")
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    for attempt in range(20):
        rope = Rope3D((2, 30, 10 + attempt))
        found = []
        for stream in streams:
            with torch.cuda.stream(stream):
                if stream is streams[0]:
                    torch.cuda._sleep(2_000_000)
                out = masked_attention(x, x, x, query_ids=ids, rope=rope, backend=backend)
                found.append(out)
        torch.cuda.synchronize()
        assert torch.equal(*found), attempt


@each_gpu_backend
def test_a_call_follows_its_stream(backend):
    """Inputs that a side stream writes late are read after that."""
    stream = torch.cuda.Stream()
    x = torch.zeros(1, 64, 2, 64, device="cuda", dtype=torch.bfloat16)
    target, source = (torch.zeros(1000, device="cuda") for _ in range(2))
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        x.fill_(1.0)
        source.fill_(1.0)
        out = masked_attention(x, x, x, backend=backend)
        ema_update_([target], [source], 0.5, backend=backend)
    stream.synchronize()
    assert out.eq(1).all()
    assert target.eq(0.5).all()


@each_gpu_backend
def test_two_devices(backend):
    """Work lands on the tensors' device, whichever is current."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    case = attention_case((70, 33), packed=True, head_dim=64, dtype=torch.bfloat16)
    check_attention(case, backend, "cuda:1")
    check_rollout(rollout_case("gru", "states"), backend, "cuda:1")
    targets, sources = ([torch.full((9,), v, device="cuda:1")] for v in (0.0, 1.0))
    ema_update_(targets, sources, 0.5, backend=backend)
    assert targets[0].tolist() == [0.5] * 9
    assert torch.cuda.current_device() == 0


@each_device
def test_compiled_calls_equal_eager_ones(device, backend):
    torch._dynamo.reset()
    rope = Rope3D((2, 4, 5))
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    ids = torch.arange(40, device=device)
    head = ResidualMLP(
        *(torch.randn(s, device=device) * 0.1 for s in ((8, 64), (8,), (64, 8), (64,)))
    )

    def step(x: torch.Tensor) -> torch.Tensor:
        out = masked_attention(x, x, x, query_ids=ids, rope=rope, backend=backend)
        rows = latent_rollout(out.flatten(0, 2).float(), head, 2, output="last", backend=backend)
        return rows.square().sum()

    x = torch.randn(2, 40, 3, 64, device=device, dtype=dtype)
    results = []
    for run in (step, torch.compile(step, fullgraph=True)):
        leaf = x.clone().requires_grad_()
        loss = run(leaf)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, **BFLOAT16)


FAR = 2**31 + 2**20


def far_memory(elements: int = FAR) -> torch.Tensor:
    """One bfloat16 buffer of more than 2^31 elements; 4.3 GB."""
    free, _ = torch.cuda.mem_get_info()
    if free < 16 * 2**30:
        pytest.skip("needs 16 GB of free device memory")
    # Poisoning fresh memory would take as long as the test.
    torch.utils.deterministic.fill_uninitialized_memory = False
    return torch.empty(elements, dtype=torch.bfloat16, device="cuda")


@each_gpu_backend
def test_attention_beyond_2_31_elements(backend):
    """The second sequence of a batch, and the last rows of a packed buffer."""
    case = attention_case((33, 33), head_dim=64, dtype=torch.bfloat16)
    near = [t.bfloat16().cuda() for t in (case.query, case.key, case.value)]
    memory = far_memory()
    far = []
    for i, t in enumerate(near):
        strides = (2**31, *t.stride()[1:])
        view = memory.as_strided(t.shape, strides, i * 2**16)
        far.append(view.copy_(t))
    options = {"query_ids": case.query_ids.cuda(), "rope": case.rope, "backend": backend}
    results = []
    for inputs in (near, far):
        leaves = [t.detach().requires_grad_() for t in inputs]
        out = masked_attention(*leaves, **options)
        results.append((out, *torch.autograd.grad(out.float().square().sum(), leaves)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@each_gpu_backend
def test_a_list_beyond_2_31_elements(backend):
    target, source = far_memory().zero_(), far_memory().fill_(1.0)
    ema_update_([target], [source], 0.5, backend=backend)
    for part in (target[:1000], target[2**31 - 1000 : 2**31 + 1000], target[-1000:]):
        assert part.eq(0.5).all()


@each_gpu_backend
def test_a_rollout_from_a_table_beyond_2_31_elements(backend):
    case = rollout_case("residual_mlp", "last", channels=1024, dtype=torch.bfloat16, split=False)
    cell = with_parameters(case.cell, [p.bfloat16().cuda() for p in case.cell.parameters()])
    table = far_memory().view(-1, 1024)
    rows = torch.arange(table.shape[0] - 37, table.shape[0], device="cuda")
    table[rows] = torch.randn(37, 1024, device="cuda").bfloat16()
    options = {"output": "last", "backend": backend}
    with torch.no_grad():
        far = latent_rollout(table, cell, 2, rows=rows, **options)
        near = latent_rollout(table[rows], cell, 2, **options)
    assert torch.equal(far, near)


@each_gpu_backend
def test_an_optimizer_step_beyond_2_31_elements(backend):
    lists = [[far_memory().zero_()] for _ in range(4)]
    lists[1][0].fill_(1.0)
    hyper = torch.tensor([[1.0, 0.0, 0.0, 1e-8, 0.0, 0.0]], dtype=torch.float64)
    adamw_ema_(
        *lists,
        [torch.tensor(1.0)],
        hyper=hyper,
        groups=[0],
        teacher=TeacherLists([], 0.5),
        backend=backend,
    )
    for part in (slice(0, 9), slice(2**31 - 9, 2**31 + 9), slice(-9, None)):
        assert lists[0][0][part].eq(-1.0).all()


@each_gpu_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bad_ids_and_offsets_stay_inside(backend, dtype):
    """Kernels clamp what nobody checks on a device; run it under a sanitizer as well."""
    case = attention_case((10, 10, 17), packed=True, dtype=dtype)
    wild = replace(
        case,
        query_ids=torch.where(torch.arange(37) % 2 == 0, 2**50, -(2**50)),
        cu_seqlens_q=torch.tensor([0, 900, 20, 37]),
    )
    leaves = [t.to(dtype).cuda().requires_grad_() for t in (wild.query, wild.key, wild.value)]
    out = masked_attention(
        *leaves,
        query_ids=wild.query_ids.cuda(),
        rope=wild.rope,
        cu_seqlens_q=wild.cu_seqlens_q.cuda(),
        backend=backend,
    )
    torch.autograd.grad(out.sum(), leaves)
    torch.cuda.synchronize()
