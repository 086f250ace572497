"""`pytest benchmarks --benchmark-only`: the op, layer, block and model levels under pytest-benchmark.

Options of pytest-benchmark work as ever (`--benchmark-json`, `--benchmark-compare`, `-k`). Every provider is
verified against fp64 before it is timed; a group is one problem. On a GPU a round is a CUDA graph of kernels
where that can be captured, waited for; `python -m benchmarks` is the better clock there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from benchmarks import levels
from benchmarks.case import Case, Entry
from benchmarks.engine import entries
from benchmarks.providers import providers
from benchmarks.scope import Scope, scope
from benchmarks.trial import Trial, gradients
from fastres.bench.timing import capture
from fastres.plan.problem import dtype_name


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    # The project's own pytest options disable benchmarks; asking for nothing else enables them.
    if config.getoption("benchmark_only", False):
        config.option.benchmark_enable = True
        config.option.benchmark_disable = False


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    level = getattr(metafunc.module, "LEVEL", None)
    if level is None or "entry" not in metafunc.fixturenames:
        return
    only: Sequence[str] = getattr(metafunc.module, "PROVIDERS", ())
    where = suite_scope()
    pairs = [
        pytest.param(case, entry, id=f"{case.problem} {dtype_name(case.dtype)}-{entry.provider}")
        for case in levels.cases(level, where)
        for entry in entries(case, providers(only), where)
        if not entry.skip
    ]
    metafunc.parametrize(("case", "entry"), pairs)


def suite_scope() -> Scope:
    """A quick run's problems in one dtype, so that the suite takes minutes."""
    dtype = "bf16" if torch.cuda.is_available() else "fp32"
    return scope("quick", dtypes=dtype)


_built: list[Trial] = []


@pytest.fixture
def run(benchmark) -> Callable[[Case, Entry], None]:
    """`run(case, entry)` verifies and then benchmarks one provider at one case."""

    def run(case: Case, entry: Entry) -> None:
        if not _built or _built[0].case is not case:
            _built[:] = [Trial(case)]
            torch._dynamo.reset()
        trial = _built[0]
        benchmark.group = f"{case.problem} {dtype_name(case.dtype)}"
        benchmark.extra_info["provider"] = entry.provider
        with gradients(case):
            try:
                call = trial.call(entry)
            except NotImplementedError as reason:
                pytest.skip(str(reason))
            inputs = entry.inputs(trial.subject.inputs)

            def once() -> None:
                call(*inputs)

            if case.device.type != "cuda":
                benchmark(once)
            else:
                replay = capture([once]) if case.clock == "kernel" and entry.capturable else once
                benchmark(lambda: (replay(), torch.cuda.synchronize()))

    return run
