"""AdamWEMA: torch.optim.AdamW and a teacher's average to rounding, and what users of torch's
optimizer rely on."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from jepa_kernels.nn import EMATeacher, LinearMomentum
from jepa_kernels.optim import AdamWEMA
from jepa_kernels.testing import (
    BFLOAT16,
    BFLOAT16_STOCHASTIC,
    EXACT,
    FLOAT32,
    FLOAT32_DEEP,
    FLOAT32_SHORT,
    FLOAT64,
)
from tests.conftest import missing
from tests.ops.backends import runnable
from tests.ops.devices import GPU_BACKENDS, on_a_gpu
from tests.ops.lists import one_thread  # noqa: F401

KERNELS_HERE = runnable("adamw_ema")

pytestmark = pytest.mark.usefixtures("one_thread")

HERE = [None, "reference", *KERNELS_HERE]


def model(dtype=torch.float32):
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 3)).to(dtype)


def groups(module, **extra):
    decayed = [p for p in module.parameters() if p.dim() > 1]
    others = [p for p in module.parameters() if p.dim() <= 1]
    return [
        {"params": decayed, "weight_decay": 0.1, **extra},
        {"params": others, "weight_decay": 0.0, "lr": 3e-3, "betas": (0.8, 0.95)},
    ]


def train(module, optimizer, steps, seed=0, after=None, clip=None):
    generator = torch.Generator().manual_seed(seed)
    dtype = next(module.parameters()).dtype
    for _ in range(steps):
        x = torch.randn(4, 5, generator=generator).to(dtype)
        optimizer.zero_grad()
        module(x).square().mean().backward()
        if clip:
            nn.utils.clip_grad_norm_(module.parameters(), clip)
        optimizer.step()
        if after is not None:
            after()


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("maximize", [False, True])
def test_equals_adamw_and_an_average_over_100_steps(backend, maximize):
    ours, theirs = model(), model()
    momentum = LinearMomentum(0.9, 0.99, 50)
    teacher, twin = (
        EMATeacher(ours, momentum, backend=backend),
        EMATeacher(theirs, momentum, backend="reference"),
    )
    fused = AdamWEMA(groups(ours, maximize=maximize), lr=1e-2, teacher=teacher, backend=backend)
    plain = torch.optim.AdamW(groups(theirs, maximize=maximize), lr=1e-2)
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(o, 100) for o in (fused, plain)]
    train(ours, fused, 100, after=schedules[0].step)
    train(theirs, plain, 100, after=lambda: (twin.update(), schedules[1].step()))
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, **FLOAT32, msg=lambda m, n=name: f"{n}: {m}")
    for (name, a), b in zip(
        teacher.module.named_parameters(), twin.module.parameters(), strict=True
    ):
        torch.testing.assert_close(a, b, **FLOAT32, msg=lambda m, n=name: f"teacher {n}: {m}")
    assert teacher.num_updates == 100


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_stay_close_to_torch(dtype):
    ours, theirs = model(dtype), model(dtype)
    fused, plain = (
        AdamWEMA(groups(ours), lr=1e-2),
        torch.optim.AdamW(groups(theirs), lr=1e-2, fused=True),
    )
    train(ours, fused, 10)
    train(theirs, plain, 10)
    tolerance = FLOAT64 if dtype == torch.float64 else BFLOAT16
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("tag", ["config", "decay"])
def test_published_steps(backend, tag, shared_dir):
    numbers = np.load(shared_dir / "golden" / "modules" / "adamw.npz")
    names = numbers[f"{tag}_param_names"].tolist()
    params = {n: nn.Parameter(torch.from_numpy(numbers[f"{tag}_p0_{n}"].copy())) for n in names}
    member = dict(zip(names, numbers[f"{tag}_param_group"].tolist(), strict=True))
    decays, rates = numbers[f"{tag}_weight_decay_per_group"], numbers[f"{tag}_lr"]
    present = sorted(set(member.values()))
    student = nn.ParameterDict({n.replace(".", "/"): p for n, p in params.items()})
    teacher = EMATeacher(student, 0.9)
    optimizer = AdamWEMA(
        [{"params": [params[n] for n in names if member[n] == g]} for g in present],
        teacher=teacher,
        backend=backend,
    )
    expected = {n: torch.from_numpy(numbers[f"{tag}_p0_{n}"]).double() for n in names}
    for step in range(3):
        for group, g in zip(optimizer.param_groups, present, strict=True):
            group["lr"], group["weight_decay"] = float(rates[step]), float(decays[step, g])
        for n in names:
            key = f"{tag}_g{step + 1}_{n}"
            params[n].grad = torch.from_numpy(numbers[key]) if key in numbers.files else None
        optimizer.step()
        for n in names:
            wanted = numbers[f"{tag}_p{step + 1}_{n}"]
            np.testing.assert_allclose(
                params[n].detach().numpy(), wanted, **FLOAT32_SHORT, err_msg=n
            )
            expected[n] = 0.9 * expected[n] + 0.1 * torch.from_numpy(wanted).double()
            torch.testing.assert_close(
                teacher.module[n.replace(".", "/")].double(), expected[n], **FLOAT32_SHORT
            )


def test_checkpoints_are_torchs():
    """Either optimizer continues the other's run."""
    ours, theirs = model(), model()
    fused, plain = AdamWEMA(groups(ours), lr=1e-2), torch.optim.AdamW(groups(theirs), lr=1e-2)
    train(ours, fused, 3)
    train(theirs, plain, 3)
    assert set(fused.state_dict()["state"][0]) == set(plain.state_dict()["state"][0])
    swapped = AdamWEMA(groups(theirs), lr=1e-2)
    swapped.load_state_dict(copy.deepcopy(plain.state_dict()))
    back = torch.optim.AdamW(groups(ours), lr=1e-2)
    back.load_state_dict(copy.deepcopy(fused.state_dict()))
    train(theirs, swapped, 3, seed=1)
    train(ours, back, 3, seed=1)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, **FLOAT32)
    assert float(swapped.state_dict()["state"][0]["step"]) == 6.0
    other = torch.optim.AdamW(groups(model()), lr=1e-2, fused=True)
    train(model(), other, 0)
    AdamWEMA(groups(model()), lr=1e-2).load_state_dict(other.state_dict())


def test_amsgrad_is_refused_everywhere():
    with pytest.raises(ValueError, match="AdamWEMA: amsgrad must be False, got True"):
        AdamWEMA(model().parameters(), amsgrad=True)
    optimizer = AdamWEMA(model().parameters())
    with pytest.raises(ValueError, match="amsgrad must be False"):
        optimizer.load_state_dict(
            torch.optim.AdamW(model().parameters(), amsgrad=True).state_dict()
        )
    with pytest.raises(ValueError, match="amsgrad must be False"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "amsgrad": True})
    with pytest.raises(TypeError, match="teacher must be an EMATeacher or None, got Linear"):
        AdamWEMA(model().parameters(), teacher=nn.Linear(1, 1))


def test_parameters_without_gradient_and_buffers_move_the_teacher():
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(3, 3), nn.Linear(3, 3)
            self.frozen = nn.Parameter(torch.zeros(4), requires_grad=False)
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.used(x))

    encoder, head = Encoder(), nn.Linear(3, 2)
    teacher = EMATeacher(encoder, 0.5)
    optimizer = AdamWEMA([*encoder.used.parameters(), *head.parameters()], teacher=teacher)
    with torch.no_grad():
        encoder.unused.weight.add_(1.0)
        encoder.frozen.add_(2.0)
    old = copy.deepcopy(teacher.module.state_dict())
    head(encoder(torch.randn(8, 3))).sum().backward()
    optimizer.step()
    for name, value in teacher.module.state_dict().items():
        new = encoder.state_dict()[name]
        torch.testing.assert_close(
            value,
            new if name.endswith("tracked") else (old[name] + new) / 2,
            msg=lambda m, n=name: f"{n}: {m}",
        )
    assert (
        teacher.module.frozen.tolist() == [1.0] * 4
        and int(teacher.module.norm.num_batches_tracked) == 1
    )
    assert (
        optimizer.state[encoder.used.weight]["step"] == 1
        and encoder.unused.weight not in optimizer.state
    )


@pytest.mark.parametrize("forward_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("rounding", ["nearest", "kahan", "stochastic"])
def test_the_teachers_options_hold_in_the_fused_step(forward_dtype, rounding):
    """The same numbers as AdamW and then `teacher.update()`, also for 16-bit masters and copies."""
    ours, theirs = model(torch.bfloat16), model(torch.bfloat16)
    options = {
        "master_dtype": None,
        "rounding": rounding,
        "forward_dtype": forward_dtype or torch.float32,
        "debias": True,
        "backend": "reference",
    }
    teacher, twin = EMATeacher(ours, 0.9, **options), EMATeacher(theirs, 0.9, **options)
    fused, plain = (
        AdamWEMA(groups(ours), teacher=teacher, backend="reference"),
        AdamWEMA(groups(theirs), backend="reference"),
    )
    train(ours, fused, 4)
    train(theirs, plain, 4, after=twin.update)
    # Bits of stochastic rounding depend on the place in the list, which differs.
    tolerance = BFLOAT16_STOCHASTIC if rounding == "stochastic" else EXACT
    for a, b in zip(teacher.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, **tolerance)
    assert (teacher.forward_copy is None) == (forward_dtype is torch.bfloat16)


@pytest.mark.parametrize("backend", HERE)
def test_grad_scaler_scales_and_skips(backend):
    ours, theirs = model(), model()
    teacher = EMATeacher(ours, 0.5)
    optimizer = AdamWEMA(groups(ours), teacher=teacher, backend=backend)
    plain = torch.optim.AdamW(groups(theirs))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    x = torch.ones(2, 5)
    for step, bad in enumerate((False, True, False)):
        optimizer.zero_grad()
        scaler.scale(ours(x).square().mean()).backward()
        if bad:
            ours[0].weight.grad[0, 0] = float("inf")
        before = [t.clone() for t in (*ours.parameters(), *teacher.parameters())]
        scaler.step(optimizer)
        scaler.update()
        same = all(
            torch.equal(a, b)
            for a, b in zip(before, (*ours.parameters(), *teacher.parameters()), strict=True)
        )
        assert same == bad, step
        if not bad:
            plain.zero_grad()
            theirs(x).square().mean().backward()
            plain.step()
    assert teacher.num_updates == 2 and float(optimizer.state[ours[0].weight]["step"]) == 2.0
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, **FLOAT32)


SCHEDULES = {
    "number": {"momentum": 0.9},
    "schedule": {"momentum": LinearMomentum(0.5, 0.99, 4)},
    "warmup": {"momentum": 0.99, "warmup": True},
    "debias": {"momentum": LinearMomentum(0.5, 0.99, 4), "debias": True},
}


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_skipped_steps_leave_no_trace(backend, schedule):
    """Flags by attribute, as a training loop sets them: what is left is a run without those steps,
    momentum included."""
    ours, theirs = model(), model()
    flagged, plain = ((m, EMATeacher(m, **SCHEDULES[schedule])) for m in (ours, theirs))
    optimizers = [
        AdamWEMA(groups(m), teacher=teacher, backend=backend) for m, teacher in (flagged, plain)
    ]
    for skipped in (True, False, True, True, False, False):
        for (module, _), optimizer in zip((flagged, plain), optimizers, strict=True):
            optimizer.zero_grad()
            module(torch.ones(2, 5)).square().mean().backward()
        optimizers[0].found_inf = torch.tensor(float(skipped))
        optimizers[0].step()
        if not skipped:
            optimizers[1].step()
    for a, b in zip(
        (*ours.parameters(), *flagged[1].parameters()),
        (*theirs.parameters(), *plain[1].parameters()),
        strict=True,
    ):
        assert torch.equal(a, b)
    assert all(int(state["step"]) == 3 for state in optimizers[0].state.values())
    assert flagged[1].num_updates == 3
    assert flagged[1].next_momentum() == plain[1].next_momentum()
    assert torch.equal(flagged[1].get_extra_state(), plain[1].get_extra_state())


def test_the_flag_of_a_skipped_step_is_not_read():
    if "cpu" not in HERE:
        missing("the native library is not built; torch's composition reads a flag on a CPU")

    class Reads(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen += "_local_scalar_dense" in str(func)
            return func(*args, **(kwargs or {}))

    ours = model()
    teacher = EMATeacher(ours, 0.9)
    optimizer = AdamWEMA(groups(ours), teacher=teacher, backend="cpu")
    ours(torch.ones(2, 5)).square().mean().backward()
    with Reads() as reads:
        for skipped in (1.0, 0.0):
            optimizer.found_inf = torch.full((), skipped)
            optimizer.step()
        assert reads.seen == 0
        assert teacher.num_updates == 1
        assert reads.seen == 1


def test_a_teacher_takes_a_copy_that_is_there_already():
    student = model()
    copied = copy.deepcopy(student)
    teacher = EMATeacher(student, 0.5, module=copied)
    assert teacher.module is copied
    assert not any(p.requires_grad for p in copied.parameters())
    with torch.no_grad():
        student[0].weight.add_(1.0)
    teacher.update()
    torch.testing.assert_close(
        student[0].weight - copied[0].weight, torch.full_like(copied[0].weight, 0.5)
    )
    for wrong in (student, nn.Linear(2, 2)):
        with pytest.raises(ValueError, match="EMATeacher: module must be a copy of the student"):
            EMATeacher(student, module=wrong)
    with pytest.raises(TypeError, match="EMATeacher: module must be a module or None"):
        EMATeacher(student, module=3)


def test_clipping_hooks_closures_and_zero_grad_work_as_in_torch():
    ours, theirs = model(), model()
    fused, plain = AdamWEMA(groups(ours), lr=1e-2), torch.optim.AdamW(groups(theirs), lr=1e-2)
    calls = []
    fused.register_step_pre_hook(lambda *_: calls.append("pre"))
    fused.register_step_post_hook(lambda *_: calls.append("post"))
    train(ours, fused, 3, clip=0.1)
    train(theirs, plain, 3, clip=0.1)
    assert calls == ["pre", "post"] * 3
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, **FLOAT32)

    def closure():
        fused.zero_grad()
        loss = ours(torch.ones(1, 5)).square().mean()
        loss.backward()
        return loss

    assert fused.step(closure).requires_grad
    fused.zero_grad()
    fused.step()  # nothing has a gradient


def test_copies_keep_their_teacher():
    module = model()
    optimizer = AdamWEMA(module.parameters(), teacher=EMATeacher(module, 0.9), backend="reference")
    train(module, optimizer, 1)
    again = copy.deepcopy(optimizer)
    assert again.backend == "reference" and again.teacher.num_updates == 1
    assert (
        again.teacher is not optimizer.teacher
        and again.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    )
    # A deep copy of the optimizer alone has parameters of its own; its teacher follows the copied
    # student.
    for parameter in again.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    again.step()
    assert again.teacher.num_updates == 2 and optimizer.teacher.num_updates == 1


@pytest.mark.parametrize("lr", [1e-2, torch.tensor(1e-2)])
def test_a_learning_rate_may_be_a_tensor(lr):
    ours, theirs = model(), model()
    train(ours, AdamWEMA(ours.parameters(), lr=lr), 2)
    train(theirs, torch.optim.AdamW(theirs.parameters(), lr=1e-2), 2)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, **FLOAT32)


def test_gradients_of_another_layout():
    parameter = nn.Parameter(torch.randn(4, 6))
    twin = nn.Parameter(parameter.detach().clone())
    gradient = torch.randn(6, 4).t()
    parameter.grad, twin.grad = gradient, gradient.contiguous()
    AdamWEMA([parameter], lr=0.1).step()
    AdamWEMA([twin], lr=0.1).step()
    assert torch.equal(parameter, twin)
    sparse = nn.Parameter(torch.ones(3))
    sparse.grad = torch.ones(3).to_sparse()
    with pytest.raises(ValueError, match=r"gradients must be dense, got layout torch\.sparse_coo"):
        AdamWEMA([sparse]).step()


@pytest.mark.parametrize("backend", [on_a_gpu(name) for name in GPU_BACKENDS])
def test_capturable_steps_replay(backend):
    ours, theirs = model().cuda(), model().cuda()
    momentum = torch.tensor(0.9, device="cuda", dtype=torch.float64)
    teacher = EMATeacher(ours, momentum)
    twin = EMATeacher(theirs, 0.9)
    rate = torch.tensor(1e-2, device="cuda")
    fused = AdamWEMA(groups(ours), lr=rate, capturable=True, teacher=teacher, backend=backend)
    plain = torch.optim.AdamW(groups(theirs), lr=1e-2)
    x = torch.randn(4, 5, device="cuda")

    def one(module, optimizer):
        optimizer.zero_grad(set_to_none=False)
        module(x).square().mean().backward()
        optimizer.step()

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            one(ours, fused)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        one(ours, fused)
    for _ in range(5):
        graph.replay()
    for _ in range(8):
        one(theirs, plain)
        twin.update()
    for a, b in zip(
        itertools.chain(ours.parameters(), teacher.parameters()),
        itertools.chain(theirs.parameters(), twin.parameters()),
        strict=True,
    ):
        torch.testing.assert_close(a, b, **FLOAT32_DEEP)
