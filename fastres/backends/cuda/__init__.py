"""Candidates of the CUDA C++ kernels (kernels/cuda).

None of them has been timed on a GPU yet. Their `estimate_ms` is therefore a deliberate overestimate: without a table
entry the planner takes them only where nothing measured fits, and `fastres tune` is what can find them faster.
"""

from fastres.backends.cuda import conv_bn_act

__all__ = ["conv_bn_act"]
