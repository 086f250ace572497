"""C++ CPU kernels of kernels/cpu, built at first use (fastres/native.py)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastres import native
from fastres.plan.candidate import Candidate, register
from fastres.plan.context import nhwc_strides
from fastres.plan.pattern import GLOBAL_AVG_POOL, MAX_POOL, Pattern
from fastres.plan.problem import Problem, Target


class Pool(Candidate):
    backend = "cpu"
    source = "kernels/cpu"
    allocates = True
    efficiency = 1.0

    def __init__(self, name: str, pattern: Pattern):
        self.name, self.pattern = name, pattern

    def accepts(self, problem: Problem, target: Target) -> str | None:
        if target.kind != "cpu":
            return "it runs on the CPU only"
        return None if target.on_paper else native.available("cpu")

    def bind(self, problem: Problem, config, buffers, constants):
        from fastres.backends import cpu_ops

        spec, dtype = problem["pool"], problem.dtype
        shape, strides = spec.y_shape, nhwc_strides(spec.y_shape)
        if spec.kernel is None:
            window = ()
            flat = (spec.n, spec.c)
            call = cpu_ops.global_avg_pool
        else:
            window = (spec.kernel, spec.stride, spec.padding, spec.dilation)
            flat = None
            call = cpu_ops.max_pool2d

        def launch(x: Tensor) -> Tensor:
            y = torch.empty_strided(shape, strides, dtype=dtype)
            call(x, *window, y if flat is None else y.view(flat))
            return y

        return launch


register(Pool("cpu.max_pool", MAX_POOL))
register(Pool("cpu.global_avg_pool", GLOBAL_AVG_POOL))
