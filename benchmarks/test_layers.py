"""The layer level under pytest-benchmark."""

import pytest

LEVEL = "layer"
PROVIDERS = ("eager channels_last", "folded", "compile freezing", "cuDNN fused ops", "fastres")


@pytest.mark.benchmark(max_time=0.3, min_rounds=3, warmup=True, warmup_iterations=2)
def test_layer(run, case, entry):
    run(case, entry)
