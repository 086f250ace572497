"""Kernels compiled ahead, in other processes: binding finds them all, and a failure there is nobody's failure."""

import logging
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="Triton cannot be imported")
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from fastres import ahead, backends, env, workers
from fastres.backends.triton_hopper.base import HopperCandidate
from fastres.backends.triton_portable.base import TritonCandidate
from fastres.graph.capture import capture
from fastres.plan.constants import Constants
from fastres.plan.context import Context
from fastres.plan.planner import make_plan
from fastres.plan.specs import propagate
from fastres.plan.target import on_paper, triton_version

TARGET = replace(on_paper("sm90"), triton=triton_version())
SHAPE = (2, 3, 64, 64)


class Described:
    """A driver of a GPU that is not here: as much of it as compiling asks for."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 90  # Triton keeps what it compiled by device

    def get_current_stream(self, device):
        return 0


@pytest.fixture
def plan():
    from torchvision.models import resnet

    backends.load()
    torch.manual_seed(0)
    model = resnet.ResNet(resnet.Bottleneck, [2, 1, 1, 1]).eval()
    graph = capture(model)
    x = torch.zeros(SHAPE, dtype=torch.bfloat16)
    shapes = propagate(graph, (x,), torch.bfloat16, True)
    return make_plan(graph, shapes, torch.bfloat16, TARGET, backends=("triton", "hopper"))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    return tmp_path


@pytest.mark.gate
@pytest.mark.parametrize(
    "order",
    [torch.contiguous_format, pytest.param(torch.channels_last, marks=pytest.mark.slow)],
    ids=["nchw", "nhwc"],
)
def test_binding_compiles_nothing_that_was_compiled_ahead(plan, cache, monkeypatch, order):
    """The plan is bound and run as on a GPU, on the CPU's memory, up to each launch."""
    x = torch.zeros(SHAPE, dtype=torch.bfloat16).contiguous(memory_format=order)
    jobs = ahead.jobs_of(plan, (x,))
    wanted = ahead.missing(jobs, TARGET)
    assert len(wanted) >= 8
    monkeypatch.setenv("FASTRES_COMPILE_JOBS", "2")
    assert ahead.compile_ahead(jobs, TARGET) == len(wanted)
    assert not ahead.missing(jobs, TARGET)

    hits = []
    monkeypatch.setattr(
        triton.knobs.compilation,
        "listener",
        lambda *, src, cache_hit, **_: hits.append((src.name, cache_hit)),
    )

    def bind(candidate, *given):
        for kernel, arguments, options in candidate.kernels(*given):
            kernel.warmup(*[arguments[name] for name in kernel.arg_names], grid=(1,), **options)
            kernel.device_caches.pop(90)
        return lambda: None

    for kind in (TritonCandidate, HopperCandidate):
        monkeypatch.setattr(kind, "bind", bind)
    monkeypatch.setattr(driver, "_active", Described())
    with torch.no_grad():
        Context(plan, Constants(), torch.device("cpu"), static_inputs=True).run((x,))
    assert len(hits) >= len(wanted) and all(hit for _, hit in hits), hits
    # What the launches need is what was made, and no more.
    assert len(list(cache.glob("*/*.cubin"))) == len(
        {source.key() for j in jobs for source in ahead.sources(j, TARGET)}
    )


def test_a_pool_that_fails_is_nobodys_failure(plan, cache, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "fastres")
    jobs = ahead.jobs_of(plan)
    before = torch.get_rng_state()

    def no_process():
        raise OSError("no Python to start")

    monkeypatch.setenv("FASTRES_COMPILE_JOBS", "2")
    monkeypatch.setattr(workers, "_python", no_process)
    assert ahead.compile_ahead(jobs, TARGET) == 0 and "no Python to start" in caplog.text
    assert plan.compiled is False
    ahead.compile_plan(plan, ())
    assert plan.compiled and ahead.compile_plan(plan, ()) is None
    monkeypatch.setattr(ahead, "sources", lambda *_: 1 / 0)
    assert ahead.missing(jobs[:1], TARGET) == [] and f"{jobs[0].candidate} on" in caplog.text
    monkeypatch.setattr(ahead, "missing", lambda *_: 1 / 0)
    assert ahead.compile_ahead(jobs, TARGET) == 0 and "ZeroDivisionError" in caplog.text
    assert not list(cache.rglob("*.cubin"))
    assert torch.equal(torch.get_rng_state(), before), "the user's random numbers are other ones"


@pytest.mark.parametrize(
    ("given", "few"),
    [
        ({"FASTRES_COMPILE_JOBS": "0"}, 1),
        ({"FASTRES_COMPILE_JOBS": "2"}, 99),
        ({"TRITON_ALWAYS_COMPILE": "1"}, 1),
    ],
)
def test_no_process_is_started_in_vain(plan, cache, monkeypatch, given, few):
    monkeypatch.setattr(workers, "ask", lambda *_, **__: pytest.fail("a process was started"))
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert ahead.compile_ahead(ahead.jobs_of(plan), TARGET, worth=few) == 0


def test_no_compilation_is_begun_when_the_time_is_over(plan, cache, monkeypatch):
    monkeypatch.setattr(workers, "_Asked", lambda *_: pytest.fail("a process was started"))
    monkeypatch.setenv("FASTRES_COMPILE_JOBS", "2")
    assert ahead.compile_ahead(ahead.jobs_of(plan), TARGET, worth=1, until=0.0) == 0


def test_nothing_is_compiled_for_an_amd_gpu_as_if_it_were_nvidias(plan, cache, monkeypatch):
    monkeypatch.setattr(workers, "ask", lambda *_, **__: pytest.fail("a process was started"))
    monkeypatch.setenv("FASTRES_COMPILE_JOBS", "2")
    assert ahead.compile_ahead(ahead.jobs_of(plan), replace(TARGET, arch="gfx90a"), worth=1) == 0


def test_how_many_processes_compile(monkeypatch):
    monkeypatch.setattr(ahead.os, "sched_getaffinity", lambda _: range(64))
    assert ahead.processes() == 16
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert ahead.processes() == 8
    monkeypatch.setenv("FASTRES_COMPILE_JOBS", "3")
    assert ahead.processes() == 3
    monkeypatch.setenv("FASTRES_COMPILE_JOBS", "many")
    for read in (env.compile_jobs, lambda: ahead.compile_ahead([], TARGET)):
        with pytest.raises(ValueError, match="FASTRES_COMPILE_JOBS is 'many'"):
            read()
