"""Networks under pytest-benchmark, and fastres held against the best compiler a PyTorch user has."""

import dataclasses

import pytest
import torch

from benchmarks import engine, levels
from benchmarks.conftest import suite_scope
from benchmarks.providers import providers
from fastres.plan.problem import dtype_name

LEVEL = "model"
PROVIDERS = ("eager channels_last", "eager NCHW", "folded", "cuDNN fused ops", "fastres")


@pytest.mark.benchmark(max_time=1.0, min_rounds=3, warmup=True, warmup_iterations=1)
def test_model(run, case, entry):
    run(case, entry)


@pytest.mark.benchmark(min_rounds=1)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
def test_resnet50_on_a_cpu_is_at_most_a_tenth_slower_than_compile_with_freezing(benchmark, dtype, capsys):
    """Interleaved, in one process, batch 8. It fails if even fastres's p20 is above 1.10 times the other's
    p80, so that noise alone fails nobody; the ratio of medians is printed."""
    scope = dataclasses.replace(suite_scope(), device=torch.device("cpu"), dtypes=(dtype,), batches=(8,))
    (case,) = levels.cases("model", dataclasses.replace(scope, networks=("resnet50",), seconds=3.0))
    chosen = providers(["compile freezing", "fastres"])
    rows = benchmark.pedantic(engine.measure, (case, chosen, scope), rounds=1, iterations=1)
    by_name = {row.provider: row for row in rows}
    ours, compiled = by_name["fastres"], by_name["compile freezing"]
    assert ours.status == "ok", ours.reason
    if compiled.status != "ok":
        pytest.skip(f"torch.compile: {compiled.reason}")
    ratio, least = ours.median_ms / compiled.median_ms, ours.p20_ms / compiled.p80_ms
    for row in rows:
        benchmark.extra_info[row.provider] = row.median_ms
    with capsys.disabled():
        print(
            f"\nResNet-50, batch 8, {dtype_name(dtype)}, {torch.get_num_threads()} threads: "
            f"eager channels_last {by_name['eager channels_last'].median_ms:.1f} ms, compile freezing "
            f"{compiled.median_ms:.1f} ms, fastres {ours.median_ms:.1f} ms = {ratio:.2f}x of compile"
        )
    assert least <= 1.10, f"fastres takes {ratio:.2f}x of torch.compile's time"
    assert ours.speedup_p80 > 1, f"fastres is slower than eager channels_last: {ours.speedup:.2f}x"
