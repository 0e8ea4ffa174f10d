"""The flash backend against the float64 reference: our kernels under the interpreter, the libraries
as stand-ins that know their signatures."""

from __future__ import annotations

import importlib
import inspect
import sys
from dataclasses import replace

import pytest
import torch

from jepa_kernels import BackendUnsupportedError, Rope3D, capability, masked_attention
from jepa_kernels.backend import OPS
from jepa_kernels.ops.masked_attention import flash
from jepa_kernels.ops.masked_attention.contract import prepare
from jepa_kernels.ops.masked_attention.reference import rotate
from jepa_kernels.ops.masked_attention.triton_table import ROTATE_TILE
from jepa_kernels.testing import (
    ATTENTION_FAULTS,
    FLOAT16_ROUNDED,
    HEAD_DIMS,
    RESULT_FAULTS,
    attention_case,
    check_attention,
    planted_fault,
    run_attention,
)
from tests.interpret import flash_standins as standins

FULL = ROTATE_TILE.block_q
LONG = FULL + 5
LIBRARIES = {library.name: library for library in flash.LIBRARIES}
MODULES = {
    "flash_attn_interface": standins.flash_attention_3,
    "flash_attn.cute.interface": standins.flash_attention_4,
}
each_library = pytest.mark.parametrize("name", LIBRARIES)


@pytest.fixture
def machine(monkeypatch):
    """Sets the compute capability and the libraries that are there, by name."""
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    flash_ops = torch.library.Library("aten", "IMPL")
    flash_ops.impl("_flash_attention_forward", standins.aten_forward, "CPU")
    flash_ops.impl("_flash_attention_backward", standins.aten_backward, "CPU")
    standins.calls.clear()

    def pretend(*names: str, major: int = 9) -> None:
        monkeypatch.setattr(capability, "_first_device", lambda: (major, 0))
        for library in flash.LIBRARIES[:2]:
            there = library.name in names
            # None makes an import fail as if there were nothing.
            stand_in = MODULES[library.module]() if there else None
            monkeypatch.setitem(sys.modules, library.module, stand_in)
        flash._kept_obstacles.cache_clear()

    yield pretend
    flash_ops._destroy()
    flash._kept_obstacles.cache_clear()


@each_library
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_form(machine, name, dtype):
    machine(name)
    assert flash.library() is LIBRARIES[name]
    shared = {"dtype": dtype, "heads": 2}
    check_attention(attention_case((LONG, LONG), layout="tiled", **shared), "flash")
    check_attention(
        attention_case((9, 9), (21, 21), strided=True, id_dtype=torch.int32, **shared), "flash"
    )
    packed = {"packed": True, "strided": True, "slack": 3, **shared}
    check_attention(attention_case((5, 0, LONG), layout="tiled", **packed), "flash")
    check_attention(
        attention_case((3, 0, 7), (FULL, 2, 0), cu_dtype=torch.int64, **packed), "flash"
    )


@each_library
@pytest.mark.parametrize(
    "kw",
    [
        {"lengths": (16, 16), "grid": None, "strided": True},
        {"lengths": (9, 2), "grid": None, "packed": True, "strided": True},
        {"lengths": (3, 3), "lengths_k": (0, 0), "grid": None},
        {"lengths": (0, 0)},
        {"lengths": (), "packed": True},
        {"lengths": (0, 0), "packed": True, "slack": 2},
        {"lengths": (3, 4), "lengths_k": (0, 0), "packed": True, "slack": 4},
        {"lengths": (3, 0), "lengths_k": (0, 5), "packed": True, "slack": 4},
        {"lengths": (5,), "unrotated": 5},
        {"lengths": (9,), "heads": 5},
        {"lengths": (9,), "scale": 0.7},
    ],
    ids=str,
)
def test_edges(machine, name, kw):
    machine(name)
    kw = {"heads": 1, "dtype": torch.bfloat16, **kw}
    scale = kw.pop("scale", None)
    check_attention(replace(attention_case(**kw), scale=scale), "flash")


@pytest.mark.parametrize("layout", ["interleaved", "tiled"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_width(machine, head_dim, layout):
    machine("FlashAttention 3")
    shared = {"head_dim": head_dim, "layout": layout, "heads": 1, "dtype": torch.bfloat16}
    check_attention(attention_case((LONG,), interpolate_from=16, **shared), "flash")


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("layout", ["interleaved", "tiled"])
def test_the_kernel_turns_and_turns_back(machine, layout, transposed):
    """The formula rounded once; the transpose is autograd's of that formula."""
    machine("FlashAttention 3")
    case = attention_case(
        (LONG,), (2,), layout=layout, heads=5, head_dim=88, strided=True, dtype=torch.float16
    )
    inputs = _inputs(case)
    given = (inputs.query, inputs.key)
    for x, ids, found in zip(
        given,
        (inputs.query_ids, inputs.key_ids),
        flash._rotated(inputs, *given, transposed=transposed),
        strict=True,
    ):
        leaf = x.double().requires_grad_()
        rotated = rotate(leaf, ids, case.rope)
        if transposed:
            (rotated,) = torch.autograd.grad(rotated, leaf, x.double())
        assert found.is_contiguous()
        torch.testing.assert_close(found.double(), rotated.detach(), **FLOAT16_ROUNDED)


def _inputs(case):
    # A copy of a strided view would be dense.
    tensors = [
        t._base.to(case.dtype).as_strided(t.shape, t.stride(), t.storage_offset())
        for t in (case.query, case.key, case.value)
    ]
    return prepare(*tensors, **case.options())


@each_library
def test_what_the_library_is_told(machine, name):
    machine(name)
    case = attention_case((5, 0, 9), (4, 2, 3), packed=True, slack=2, dtype=torch.bfloat16)
    run_attention(replace(case, scale=0.37), "flash")
    forward, backward = standins.calls
    for told in (forward, backward):
        assert told["scale"] == 0.37
        assert told["cu_q"].tolist() == [0, 5, 5, 14]
        assert told["cu_k"].tolist() == [0, 4, 6, 9]
        assert (told["max_q"], told["max_k"]) == (9, 4)


@each_library
def test_rows_that_start_anywhere_are_copied(machine, name):
    """The stand-ins refuse rows that do not start on 16 bytes."""
    machine(name)
    for grid in ((3, 4, 5), None):
        case = attention_case((9,), heads=1, head_dim=16, grid=grid, dtype=torch.bfloat16)
        changes = {}
        for field in ("query", "key", "value"):
            wide = torch.zeros(1, 9, 19, dtype=torch.float64)
            changes[field] = wide[..., 3:].view(1, 9, 1, 16)
            changes[field].copy_(getattr(case, field))
        check_attention(replace(case, **changes), "flash")


@each_library
def test_an_expanded_gradient(machine, name):
    machine(name)
    case = attention_case((6,), heads=2, head_dim=16, dtype=torch.float16)
    leaves = [t.half().requires_grad_() for t in (case.query, case.key, case.value)]
    masked_attention(*leaves, **case.options(), backend="flash").sum().backward()
    ones = replace(case, grad_out=torch.ones_like(case.query))
    for leaf, (_, wanted) in zip(
        leaves, list(run_attention(ones, "flash").named())[2:], strict=True
    ):
        assert torch.equal(leaf.grad, wanted)


def test_offsets_are_read_once_for_each_tensor_and_value(machine, monkeypatch):
    machine("FlashAttention 4")
    read = []
    sound = flash.checks.offsets_valid
    monkeypatch.setattr(
        flash.checks, "offsets_valid", lambda *given: read.append(given[2]) or sound(*given)
    )
    # The op itself reads values on a CPU, which is none of the backend's business.
    monkeypatch.setattr(OPS["masked_attention"], "check_values", lambda inputs: None)
    x = torch.randn(12, 1, 16).half()
    offsets = torch.tensor([0, 5, 12])

    def call() -> list[int]:
        read.clear()
        masked_attention(x, x, x, cu_seqlens_q=offsets, backend="flash")
        return [standins.calls[-1]["max_q"], len(read)]

    assert call() == [7, 1]  # queries and keys share it
    assert call() == [7, 0]
    offsets[1] = 3
    assert call() == [9, 1]
    with pytest.raises(ValueError, match="cu_seqlens_q must end at or before 12 rows, got 13"):
        offsets[2] = 13
        call()
    with torch.inference_mode():
        offsets = torch.tensor([0, 2, 12])
        assert call() == [10, 2]  # no version to compare: read at each use


@each_library
def test_a_recording_graph_reads_nothing(machine, monkeypatch, name):
    """The number of rows bounds every sequence, and slack is cleared by comparing on the device."""
    machine(name)
    monkeypatch.setattr(flash, "_extent", lambda argument, offsets, rows: (rows, None))
    case = attention_case(
        (5, 0, 9), (4, 2, 0), packed=True, slack=3, strided=True, dtype=torch.bfloat16
    )
    check_attention(case, "flash")
    assert standins.calls[-1]["max_q"] == 17
    check_attention(attention_case((0, 0), packed=True, slack=3, dtype=torch.bfloat16), "flash")


def test_an_offset_on_a_recording_gpu_is_not_read(monkeypatch):
    class Offsets:
        is_cuda = True

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert flash._extent("cu_seqlens_q", Offsets(), 40) == (40, None)


@pytest.mark.parametrize("name", list(LIBRARIES)[:2])
def test_deterministic_algorithms_are_honoured(machine, name):
    machine(name)
    case = attention_case((5,), heads=1, head_dim=16, dtype=torch.bfloat16)
    for switch in (True, False):
        torch.use_deterministic_algorithms(switch)
        run_attention(case, "flash")
        assert standins.calls[-1]["deterministic"] is switch


def test_deterministic_backward_is_refused_where_there_is_none(machine, monkeypatch):
    machine("FlashAttention 4", major=12)
    torch.use_deterministic_algorithms(False)
    assert flash.library().name == "FlashAttention 4"
    torch.use_deterministic_algorithms(True)
    assert flash.library().name == "torch's varlen attention"
    refused = "has no deterministic backward on compute capability 12"
    assert refused in flash._obstacles(True)[1]
    assert refused not in flash._obstacles(False)[1]


def test_the_first_library_that_fits_runs(machine):
    both = ("FlashAttention 3", "FlashAttention 4")
    for major, there, taken in (
        (8, both, "torch's varlen attention"),
        (9, both, "FlashAttention 3"),
        (9, both[1:], "FlashAttention 4"),
        (9, (), "torch's varlen attention"),
        (10, both, "FlashAttention 4"),
        (12, both, "FlashAttention 4"),
    ):
        machine(*there, major=major)
        torch.use_deterministic_algorithms(False)
        assert flash.library().name == taken, (major, there)


def _refusal(**changes) -> str:
    options = {"dtype": torch.bfloat16, "head_dim": 16, "scale": None, **changes}
    x = torch.zeros(1, 2, 1, options["head_dim"], dtype=options["dtype"])
    with pytest.raises(BackendUnsupportedError) as refusal:
        masked_attention(x, x, x, scale=options["scale"], backend="flash")
    return str(refusal.value)


def test_refusals_of_the_call(machine):
    machine("FlashAttention 3")
    for changes, reason in (
        ({"dtype": torch.float32}, "dtype must be bfloat16 or float16, got float32"),
        ({"dtype": torch.float64}, "dtype must be bfloat16 or float16, got float64"),
        ({"head_dim": 136}, "head_dim must be a multiple of 8 from 8 to 128, got 136"),
        ({"head_dim": 20}, "head_dim must be a multiple of 8 from 8 to 128, got 20"),
        ({"scale": -0.5}, "scale must be positive, got -0.5"),
        ({"scale": 0.0}, "scale must be positive, got 0.0"),
    ):
        assert reason in _refusal(**changes)


def test_times_are_refused(machine):
    machine("FlashAttention 3")
    x, times = torch.zeros(1, 2, 1, 16).half(), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(BackendUnsupportedError, match="query_times must be None"):
        masked_attention(x, x, x, query_times=times, key_times=times, backend="flash")


def test_refusals_of_the_machine(machine, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    machine(major=7)
    text = _refusal()
    assert "FlashAttention 3 needs a GPU of compute capability 9" in text
    assert "FlashAttention 4 needs a GPU of compute capability 9 or 10 or 11 or 12" in text
    assert "torch's varlen attention is not in this build of torch" in text
    machine(major=9)
    text = _refusal()
    assert "FlashAttention 3 is not installed (built from" in text
    assert "FlashAttention 4 is not installed (pip install jepa-kernels[flash])" in text


def test_a_library_of_another_version_is_refused(machine, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    machine("FlashAttention 3", "FlashAttention 4")
    three, four = (sys.modules[library.module] for library in flash.LIBRARIES[:2])
    monkeypatch.setattr(three, "flash_attn_func", lambda q, k, v, softmax_scale=None: None)
    monkeypatch.delattr(four, "_flash_attn_bwd")
    flash._kept_obstacles.cache_clear()
    text = _refusal()
    assert "FlashAttention 3 has another flash_attn_func in this version: got an unexpected" in text
    assert "FlashAttention 4 has no flash_attn.cute.interface._flash_attn_bwd" in text


def test_a_library_that_does_not_import_is_refused(machine, monkeypatch):
    def broken(name):
        raise OSError("undefined symbol")

    machine("FlashAttention 3", "FlashAttention 4")
    monkeypatch.setattr(flash.importlib, "import_module", broken)
    assert flash._obstacles(False)[0].endswith("does not import: OSError: undefined symbol")

    def needs_more(name):
        raise ModuleNotFoundError("No module named 'cutlass'", name="cutlass")

    monkeypatch.setattr(flash.importlib, "import_module", needs_more)
    flash._kept_obstacles.cache_clear()
    assert (
        "does not import: ModuleNotFoundError: No module named 'cutlass'"
        in (flash._obstacles(False)[1])
    )


def test_a_custom_op_is_judged_by_what_it_was_made_from():
    @torch.library.custom_op("jepa_kernels_test::flash_like", mutates_args=())
    def flash_like(q: torch.Tensor, other: float) -> torch.Tensor:
        return q.clone()

    class OfOne(flash.Library):
        name, module, install, majors = "one", "one", "nowhere", (9,)
        functions = {"flash_like": ("q", "scale")}  # noqa: RUF012 (as the class says)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "one", standins._module("one", {"flash_like": flash_like}))
        assert OfOne().obstacle(9, False).endswith("missing a required argument: 'other'")


def test_an_lse_of_another_shape_is_an_error(machine, monkeypatch):
    machine("FlashAttention 3")
    module = sys.modules["flash_attn_interface"]
    sound = module.flash_attn_func
    monkeypatch.setattr(
        flash.FlashAttention3,
        "call",
        lambda self, name, **given: (sound(**given)[0], torch.zeros(3)),
    )
    with pytest.raises(RuntimeError, match=r"lse of FlashAttention 3 must be of shape \[1, 1, 4\]"):
        x = torch.zeros(1, 4, 1, 16).half()
        masked_attention(x, x, x, backend="flash")


@pytest.mark.parametrize(
    ("phase", "fault"),
    [*(("forward", f) for f in ATTENTION_FAULTS), *(("backward", f) for f in RESULT_FAULTS)],
    ids=str,
)
def test_planted_faults_are_noticed(machine, phase, fault):
    machine("FlashAttention 3")
    case = attention_case((6,), heads=1, head_dim=24, layout="tiled", dtype=torch.float16)
    with planted_fault("masked_attention", "flash", fault, phase), pytest.raises(AssertionError):
        check_attention(case, "flash")


def test_a_direct_and_a_compiled_call(machine):
    machine("FlashAttention 3")
    x = torch.randn(1, 6, 2, 16).half()
    ids = torch.arange(6)
    rope = Rope3D((1, 2, 3))

    def call(x):
        return masked_attention(x, x, x, query_ids=ids, rope=rope, backend="flash")

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    grads = []
    for function in (call, compiled):
        leaf = x.clone().requires_grad_()
        out = function(leaf)
        (grad,) = torch.autograd.grad(out, leaf, torch.ones_like(out))
        grads.append((out.detach(), grad))
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("library", flash.LIBRARIES[:2], ids=lambda library: library.name)
def test_the_stand_ins_have_the_signatures_of_the_packages(library):
    obstacle = library.obstacle(9, True)
    if "is not installed" in obstacle:
        pytest.skip(obstacle)
    assert obstacle == ""
    real, standin = importlib.import_module(library.module), MODULES[library.module]()
    for name in library.functions:
        function = getattr(real, name)
        signature = inspect.signature(getattr(function, "_init_fn", function))
        own = inspect.signature(getattr(standin, name))
        assert list(own.parameters) == list(signature.parameters), name


def test_torch_has_the_functions_and_ops():
    """The public function runs in the tests above; the two ops below it are torch's own schemas."""
    for name, standin in (
        ("_flash_attention_forward", standins.aten_forward),
        ("_flash_attention_backward", standins.aten_backward),
    ):
        schema = getattr(torch.ops.aten, name).default._schema
        own = list(inspect.signature(standin).parameters)
        names = [a.name for a in schema.arguments]
        assert [n for n in own if n in names] == names, name
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
        assert flash.TorchVarlen().obstacle(8, True) == ""
