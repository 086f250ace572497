"""The op level under pytest-benchmark."""

import pytest

LEVEL = "op"
PROVIDERS = ("eager channels_last", "compile", "fastres")


@pytest.mark.benchmark(max_time=0.3, min_rounds=3, warmup=True, warmup_iterations=2)
def test_op(run, case, entry):
    run(case, entry)
