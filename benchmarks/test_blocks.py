"""The block level under pytest-benchmark."""

import pytest

LEVEL = "block"
PROVIDERS = ("eager channels_last", "folded", "compile freezing", "cuDNN fused ops", "fastres")


@pytest.mark.benchmark(max_time=0.3, min_rounds=3, warmup=True, warmup_iterations=2)
def test_block(run, case, entry):
    run(case, entry)
