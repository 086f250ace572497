"""Candidates of the CUDA C++ kernels (kernels/cuda).

None of them has been timed on a GPU yet. Their `estimate_ms` is therefore a deliberate overestimate: without
a table entry the planner takes them only where nothing measured fits; `fastres tune` can find them faster. The
kernels of small batches, where nothing else was measured either, are estimated by their models.
"""

from fastres.backends.cuda import (
    conv_bn_act,
    latency,
    max_pool,
    pool_linear,
    shifted_block,
    sm90_conv_bn_act,
    stem_pool,
)

__all__ = [
    "conv_bn_act",
    "latency",
    "max_pool",
    "pool_linear",
    "shifted_block",
    "sm90_conv_bn_act",
    "stem_pool",
]
