"""Kept device tables under capture, on several streams and when they are forgotten; without a GPU,
by a fake of the few CUDA calls that decide."""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass, field

import pytest
import torch

from jepa_kernels import backend, capability, native, triton_runtime
from jepa_kernels.backend import OPS, resolve
from jepa_kernels.device_tables import DeviceTables, upload
from jepa_kernels.ops.adamw_ema import triton as adamw_triton
from jepa_kernels.ops.ema import triton_table
from jepa_kernels.rope3d import Rope3D
from jepa_kernels.support import example

GPU = torch.device("cuda", 0)


@dataclass(eq=False)
class Stream:
    waited: list = field(default_factory=list)

    def record_event(self):
        return ("made on", self)

    def wait_event(self, event):
        self.waited.append(event)


class Kept(torch.Tensor):
    """Stands for a tensor on the GPU."""

    used_on: tuple = ()

    def record_stream(self, stream):
        self.used_on = (*self.used_on, stream)


@dataclass
class Gpu:
    stream: Stream = field(default_factory=Stream)
    capturing: bool = False


@pytest.fixture
def gpu(monkeypatch) -> Gpu:
    fake = Gpu()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: fake.capturing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: fake.stream)
    return fake


def test_what_is_made_during_capture_is_not_kept(gpu):
    """Its values exist only after a replay, in memory of the graph."""
    tables = DeviceTables(4)
    gpu.capturing = True
    first = tables.get("key", GPU, lambda: (Kept(),))
    assert len(tables) == 0
    gpu.capturing = False
    assert tables.get("key", GPU, lambda: (Kept(),))[0] is not first[0]


def test_what_a_graph_reads_is_never_forgotten(gpu):
    tables = DeviceTables(4)
    made = weakref.ref(tables.get("key", GPU, lambda: (Kept(),))[0])
    gpu.capturing = True
    tables.get("key", GPU, lambda: (Kept(),))
    gpu.capturing = False
    for other in range(9):
        tables.get(other, GPU, lambda: (Kept(),))
    tables.clear()
    gc.collect()
    assert made() is not None
    assert tables.get("key", GPU, lambda: (Kept(),))[0] is made()


def test_the_oldest_is_forgotten(gpu):
    tables = DeviceTables(2)
    first, second = (tables.get(key, GPU, lambda: (Kept(),))[0] for key in "ab")
    assert tables.get("a", GPU, lambda: (Kept(),))[0] is first
    tables.get("c", GPU, lambda: (Kept(),))
    assert tables.get("a", GPU, lambda: (Kept(),))[0] is first
    assert tables.get("b", GPU, lambda: (Kept(),))[0] is not second


def test_another_stream_waits_for_the_making_and_holds_the_memory(gpu):
    tables, maker, reader = DeviceTables(4), gpu.stream, Stream()
    kept = tables.get("key", GPU, lambda: (Kept(),))[0]
    tables.get("key", GPU, lambda: (Kept(),))
    assert maker.waited == []
    assert kept.used_on == ()
    gpu.stream = reader
    assert tables.get("key", GPU, lambda: (Kept(),))[0] is kept
    assert reader.waited == [("made on", maker)]
    assert kept.used_on == (reader,)


def test_rope_tables_are_kept_by_these_rules(gpu, monkeypatch):
    monkeypatch.setattr(Rope3D, "_build", lambda self, head_dim, device: Kept())
    rope, gpu.capturing = Rope3D((3, 7, 1)), True
    inside = rope.table(64, GPU)
    gpu.capturing = False
    eager = rope.table(64, GPU)
    assert eager is not inside
    gpu.capturing = True
    assert rope.table(64, GPU) is eager
    gpu.capturing, made = False, weakref.ref(eager)
    del eager
    for height in range(1, 300):
        Rope3D((3, 7, height)).table(64, GPU)
    gc.collect()
    assert made() is not None, "a graph still reads it"
    reader = gpu.stream = Stream()
    rope.table(64, GPU)
    assert len(reader.waited) == 1


class OnTheGpu(torch.Tensor):
    device = GPU


@pytest.fixture
def uploads(monkeypatch, gpu) -> list[torch.Tensor]:
    """The tensors that were uploaded; they stay where they are."""
    found: list[torch.Tensor] = []

    def fake(host, device):
        assert device == GPU
        found.append(host)
        return host

    monkeypatch.setattr(triton_table, "upload", fake)
    monkeypatch.setattr(adamw_triton, "upload", fake)
    return found


def test_pointer_tables_are_kept_by_these_rules(gpu, uploads, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
    triton_table._tables.clear()
    lists = [[torch.zeros(5).as_subclass(OnTheGpu), torch.zeros(9).as_subclass(OnTheGpu)]]

    def table():
        return triton_table.table(lists, [0, 1], 4)

    gpu.capturing = True
    inside = table()
    gpu.capturing = False
    eager = table()
    assert eager.rows is not inside.rows
    assert table().rows is eager.rows
    assert eager.rows[:, 0].tolist() == [t.data_ptr() for t in lists[0]]
    assert eager.chunks.tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [1, 2]]
    gpu.capturing = True
    assert table().rows is eager.rows
    gpu.capturing = False
    made = weakref.ref(eager.rows)
    del eager
    uploads.clear()
    for count in range(1, 80):
        triton_table.table([[torch.zeros(count).as_subclass(OnTheGpu)]], [0], 4)
    uploads.clear()
    gc.collect()
    assert made() is not None, "a graph still reads it"
    assert adamw_triton.index((0, 2), GPU) is adamw_triton.index((0, 2), GPU)
    assert len(uploads) == 1


def test_an_upload_comes_from_pinned_memory_that_a_graph_keeps(gpu, monkeypatch):
    """Pageable memory makes a copy wait for the device, and a capture fail."""
    pinned: list[weakref.ref] = []

    class Pinned(torch.Tensor):
        def to(self, device, non_blocking=False):
            assert non_blocking
            return ("copy to", device)

    def pin(tensor):
        made = tensor.clone().as_subclass(Pinned)
        pinned.append(weakref.ref(made))
        return made

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    assert upload(torch.zeros(2), GPU) == ("copy to", GPU)
    gpu.capturing = True
    upload(torch.zeros(2), GPU)
    gc.collect()
    assert [reference() is not None for reference in pinned] == [False, True]
    host = torch.zeros(2)
    assert upload(host, torch.device("cpu")) is host


@pytest.mark.parametrize("op", OPS)
def test_a_gpu_that_is_too_old_is_refused_in_a_sentence(op, monkeypatch):
    """A V100: the kernels' instructions are not there, and a launch would fail without a word on
    why."""
    monkeypatch.setattr(capability, "_first_device", lambda: (7, 0))
    monkeypatch.setattr(triton_runtime, "interpreting", lambda: False)
    monkeypatch.setattr(backend, "_warned", set())
    sentence = "the GPU must have compute capability 8.0 or later, got 7.0"
    inputs = example(OPS[op], "cuda", torch.float32)
    for name in ("cuda", "triton"):
        assert sentence in [reason.text for reason in OPS[op].reasons(name, inputs)]
    with pytest.warns(RuntimeWarning, match="compute capability 8.0"):
        assert resolve(OPS[op], inputs).name == "torch"
    assert sentence not in [r.text for r in native.cuda_unavailable_reasons("cpu")]


def test_the_capability_traces(monkeypatch):
    monkeypatch.setattr(capability, "_first_device", lambda: (7, 5))

    def refused(x):
        return x + len(native.cuda_unavailable_reasons("cuda")[-1:]) + len(capability.reasons())

    compiled = torch.compile(refused, fullgraph=True, backend="eager")
    assert compiled(torch.zeros(())) == refused(torch.zeros(())) == 2
