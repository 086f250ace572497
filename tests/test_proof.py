"""Proofs: right kernels pass, whatever a wrong one does is seen, and what is broken never meets a user's images."""

import importlib
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastres
from fastres import backends, engine, env, native, workers
from fastres.activation import RELU
from fastres.ahead import Job
from fastres.ops import primitives, torch_primitives
from fastres.plan.candidate import Candidate, Registry
from fastres.plan.pattern import PATTERNS
from fastres.plan.problem import ConvSpec, LinearSpec, PoolSpec, Problem
from fastres.plan.target import detect
from fastres.proof import ops, plan, record
from fastres.tuning import tune
from fastres.tuning.order import Trial

CPU = torch.device("cpu")
CONV = next(pattern for pattern in PATTERNS if pattern.name == "conv_bn_act")
SPEC = ConvSpec(5, 16, 9, 7, 24, (3, 3), (1, 1), (1, 1), act=RELU, residual=True)


def problem(dtype=torch.float32, flags=()):
    return Problem("conv_bn_act", (("conv", SPEC),), dtype, ("conv.x", "conv.residual"), ("conv",), flags)


class Kernel(Candidate):
    """act(conv(x) * scale + shift + residual) in fp32, written once; `spoil(y, step)` is what is wrong with it."""

    name, backend, pattern, source = "test.kernel", "test", CONV, "kernels/test"

    def __init__(self, spoil=lambda y, step: y):
        self.spoil = spoil

    def accepts(self, problem, target):
        return None

    def prepare(self, problem, config, parameters):
        weight, shift = parameters["conv"].folded()
        return weight.float(), shift.float()

    def bind(self, problem, config, buffers, constants):
        x, residual, out = buffers["conv.x"], buffers["conv.residual"], buffers["conv"]
        steps = iter(range(100))

        def launch():
            y = F.conv2d(x.float(), *constants, padding=1)
            y = self.spoil(torch.relu(y + residual.float()), next(steps))
            if y is not None:
                out.copy_(y)

        return launch


@pytest.fixture
def kernel(monkeypatch):
    """Registers a kernel and proves it."""
    backends.load()
    known = Registry(dict(plan.REGISTRY.candidates))
    monkeypatch.setattr(plan, "REGISTRY", known)

    def made(spoil=None, dtype=torch.float32, flags=()):
        known.candidates["test.kernel"] = Kernel() if spoil is None else Kernel(spoil)
        return plan.prove(Job("test.kernel", problem(dtype, flags), None), detect(CPU), CPU)

    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_right_kernel_passes(kernel, dtype):
    before = torch.get_rng_state()
    assert 0 < kernel(dtype=dtype) < 3 * torch.finfo(dtype).eps
    assert torch.equal(torch.get_rng_state(), before), "the user's random numbers are left alone"


def test_tf32_is_no_fault_where_it_is_allowed(kernel):
    def cut(y, step):
        return (y.view(torch.int32) & ~0x1FFF).view(torch.float32)

    assert kernel(cut, flags=("tf32",)) > 1e-5
    with pytest.raises(record.Disproved):
        kernel(cut)


def last_image(y, step):
    y[-1] = y[0]
    return y


def one_row(y, step):
    y[1, :, 4] = 0
    return y


def one_channel(y, step):
    y[:, 3] *= 1.1
    return y


def one_nan(y, step):
    y[2, 5, 1, 1] = float("nan")
    return y


FAULTS = {
    "nothing is written": (lambda y, step: None, "nan off"),
    "an image of another": (last_image, "an element is"),
    "a row is left out": (one_row, "an element is"),
    "a channel's scale": (one_channel, "an element is"),
    "a little everywhere": (lambda y, step: y * 1.03, "off"),
    "a NaN": (one_nan, "nan off"),
    "an infinity": (lambda y, step: y / 0.0, "off"),
    "another number at another time": (lambda y, step: y * (1 + 2**-6 * (step % 2) / 4), "two runs differ"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_seen(kernel, fault, dtype):
    spoil, says = FAULTS[fault]
    if fault == "another number at another time" and dtype == torch.float32:
        # well within the bound, and not the same bits
        def spoil(y, step):
            return y * (1 + 2**-22 * (step % 2))

    with pytest.raises(record.Disproved, match=says):
        kernel(spoil, dtype)


@pytest.mark.parametrize(
    "reason, word",
    [
        ("Disproved: conv: two runs differ", "wrong"),
        ("its process died: SIGSEGV", "crashed"),
        ("AcceleratorError: CUDA error: an illegal memory access was encountered", "crashed"),
        ("RuntimeError: Triton Error [CUDA]: misaligned address", "crashed"),
        ("it did not end within 60 s", "hung"),
        ("OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", ""),
        ("AcceleratorError: CUDA error: out of memory", ""),
        ("its process died: SIGKILL", ""),
        ("it did not start within 60 s", ""),
        ("CompilationError: at 3:1", ""),
    ],
)
def test_what_speaks_against_a_kernel(reason, word):
    found = record.why_left_out(reason)
    assert word in found and bool(word) == bool(found)


def prove_broken(job, target, device):
    """`prove` in a process whose kernels are broken."""
    sys.path.insert(0, str(Path(__file__).parent / "kernels"))
    importlib.import_module("broken_kernels")
    return plan.prove(job, target, device)


class Pooled(nn.Module):
    """What broken_kernels breaks on a CPU: a pool that crashes, a linear layer that is wrong."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.pool, self.fc = nn.MaxPool2d(3, 2, 1), nn.Linear(16 * 6 * 6, 10)

    def forward(self, x):
        return self.fc(self.pool(torch.relu(self.bn(self.conv(x)))).flatten(1))


@pytest.fixture
def broken(monkeypatch, tmp_path, threads):
    """Every process that proves has broken kernels; proofs are wanted on a CPU, of oneDNN's calls too."""
    if reason := native.available("cpu"):
        pytest.skip(reason)
    threads(1)
    monkeypatch.setenv("FASTRES_PROVE", "1")
    # of this process alone: others would build a library there
    monkeypatch.setattr(env, "cache_dir", lambda: tmp_path)
    monkeypatch.setattr(record, "DEVICES", ("cpu",))
    monkeypatch.setattr(engine, "prove_plan", partial(plan.prove_plan, work=prove_broken))
    backends.load()
    monkeypatch.setattr(plan.REGISTRY["onednn.linear"], "source", "kernels/onednn", raising=False)


def test_what_is_broken_never_runs(broken, monkeypatch, caplog):
    torch.manual_seed(0)
    model = Pooled().eval()
    fast, x = fastres.accelerate(model), torch.randn(2, 8, 12, 12)
    with torch.no_grad():
        out = fast(x)
        torch.testing.assert_close(out, model(x), rtol=1e-5, atol=1e-5)
    report = fast.report()
    ran = {row.candidate for row in report.rows}
    assert not ran & {"cpu.max_pool", "onednn.linear"}
    for name, word in (("cpu.max_pool", "crashed"), ("onednn.linear", "wrong")):
        assert any(f"left out: {name}" in note and word in note for note in report.notes), report.notes
        assert any(name in line.getMessage() and word in line.getMessage() for line in caplog.records)
    assert "crashed" in report.why("pool")

    # the next engine of the same process, or another process, asks nobody
    monkeypatch.setattr(workers, "ask", lambda *_, **__: pytest.fail("proved twice"))
    for _ in range(2):
        with torch.no_grad():
            again = fastres.accelerate(model)
            again(x)
        assert {row.candidate for row in again.report().rows} == ran
        record._record.cache_clear()


def test_a_machine_without_a_second_process_trusts_its_kernels(broken, monkeypatch, caplog):
    def refuse(*_, **__):
        raise OSError("no Python to start")

    monkeypatch.setattr(workers, "ask", refuse)
    caplog.set_level("INFO", "fastres")
    model, x = Pooled().eval(), torch.randn(2, 8, 12, 12)
    with torch.no_grad():
        fast = fastres.accelerate(model)
        torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5)
    assert any("not proved" in line.getMessage() for line in caplog.records)
    assert "cpu.max_pool" in {row.candidate for row in fast.report().rows}


def test_where_nothing_can_be_written_this_process_knows(tmp_path):
    folder = tmp_path / "file"
    folder.write_text("not a folder")
    kept = record.Record(folder / "proofs.txt")
    job = Job("test.kernel", problem(), None)
    kept.add(plan.key_of(job), "it was\twrong\nby far")
    assert "it was wrong by far" in kept.fault(plan.key_of(job))
    assert plan.key_of(replace(job, planar=frozenset({"conv.x"}))) not in kept
    for n, known in ((1, False), (4, False), (6, True), (8, True), (9, False)):
        assert (plan.key_of(replace(job, problem=problem().with_batch(n))) in kept) == known, n


def test_records_are_of_one_machine_and_these_sources(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTRES_CACHE", str(tmp_path))
    first = record.Record.of(CPU)
    first.add("kernel")
    assert "kernel" in record.Record(first.path) and not record.Record(first.path).fault("kernel")
    record._surroundings.cache_clear()
    monkeypatch.setattr(record, "_sources", lambda: "others")
    assert "kernel" not in record.Record.of(CPU)
    record._surroundings.cache_clear()


def test_tuning_times_nothing_that_is_wrong(monkeypatch, tmp_path):
    backends.load()
    kept, tried = record.Record(tmp_path / "proofs.txt"), []
    monkeypatch.setattr(record.Record, "of", staticmethod(lambda device: kept))
    monkeypatch.setattr(plan, "prove", lambda job, target, device: tried.append(job))
    mean = Problem(
        "global_avg_pool", (("pool", PoolSpec(2, 8, 4, 4, flat=True)),), torch.float32, ("pool.x",), ("pool",)
    )
    trial = Trial("cpu.global_avg_pool", mean, 0)
    for _ in range(2):
        tune._prove(trial, detect(CPU), "cpu")
    assert len(tried) == 1 and kept.known == {plan.key_of(tried[0]): ""}
    kept.add(plan.key_of(tried[0]), "it was wrong on this device")
    with pytest.raises(record.Disproved, match="wrong"):
        tune._prove(trial, detect(CPU), "cpu")


def test_other_layers_have_a_rounding_too():
    layers = (("pool", PoolSpec(2, 8, 4, 4, flat=True)), ("linear", LinearSpec(2, 8, 10, True)))
    long = Problem("pool_linear", layers, torch.float32, ("pool.x",), ("linear",))
    assert plan._rounding(long, torch.float32) == pytest.approx(8**0.5 * 2**-23)
    assert plan._rounding(long, torch.float16) == 2**-10


@pytest.mark.parametrize("value", ["yes", "2"])
def test_the_variable_takes_0_or_1(value, monkeypatch):
    monkeypatch.setenv("FASTRES_PROVE", value)
    monkeypatch.setattr(record, "DEVICES", ("cpu",))
    with pytest.raises(ValueError, match="FASTRES_PROVE"), torch.no_grad():
        fastres.accelerate(Pooled().eval())(torch.randn(1, 8, 12, 12))


@pytest.fixture
def cpu_primitives(monkeypatch):
    if reason := native.available("cpu"):
        pytest.skip(reason)
    monkeypatch.setattr(ops, "_SHAPES", ops._SHAPES[-1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", ["add_relu", "bn_act"])
def test_right_primitives_pass(cpu_primitives, op, dtype):
    assert ops.Piece("cpu", op) in ops._pieces("cpu", dtype)
    assert 0 < ops.prove_op(ops.Piece("cpu", op), dtype, CPU) < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize(
    "primitive, which, says",
    [
        ("add_relu", None, "out"),
        ("bn_act_forward", 0, "out"),
        ("bn_act_forward", 1, "grad"),
        ("bn_act_gradients", 0, "grad x"),
        ("bn_act_gradients", -1, "grad"),
    ],
)
def test_wrong_primitives_do_not(cpu_primitives, monkeypatch, primitive, which, says):
    from fastres.backends import cpu_ops

    right = getattr(cpu_ops, primitive)

    def wrong(*arguments):
        made = right(*arguments)
        for t in made if which is not None else [arguments[-1]]:
            if which is None or (made and t is made[which]):
                t.mul_(1.05)
        return made

    monkeypatch.setattr(cpu_ops, primitive, wrong)
    op = "add_relu" if primitive == "add_relu" else "bn_act"
    with pytest.raises(record.Disproved, match=says):
        ops.prove_op(ops.Piece("cpu", op), torch.float32, CPU)


def prove_one_wrong(piece, dtype, device):
    if piece.op == "bn_act":
        raise record.Disproved("out of 3x40x9x7: 0.1 off")
    return 0.0


def test_training_runs_what_is_right(cpu_primitives, monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("FASTRES_PROVE", "1")
    monkeypatch.setattr(env, "cache_dir", lambda: tmp_path)
    monkeypatch.setattr(record, "DEVICES", ("cpu",))
    monkeypatch.setattr(ops, "prove_op", prove_one_wrong)
    monkeypatch.setattr(ops, "_known", {})
    monkeypatch.setattr(primitives, "_found", {})
    x = torch.randn(2, 8, 4, 4)
    assert primitives.get("bn_act", x) is torch_primitives.bn_act
    assert primitives.find("bn_act_forward", x) is None
    assert primitives.get("add_relu", x) is not torch_primitives.add_relu
    assert any("cpu.bn_act:" in line.getMessage() and "wrong" in line.getMessage() for line in caplog.records)
    with primitives.pinned("cpu"):
        assert primitives.get("bn_act", x) is not torch_primitives.bn_act, "who asks for it gets it"
