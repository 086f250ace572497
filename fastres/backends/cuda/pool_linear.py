"""cuda.any_pool_linear: global average pool and linear layer in one launch, for small batches."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fastres.backends.cuda.base import CudaCandidate, ceil_div
from fastres.graph.fold import LayerParameters
from fastres.plan.candidate import Buffers, register
from fastres.plan.pattern import POOL_LINEAR
from fastres.plan.problem import Problem, Target

_ROWS, _PART_BYTES = 64, 256  # kPoolRows and kPoolLanes * 16 of any_pool_linear.h
# Every block pools its channels anew, ceil(K / 64) times in all: beyond this it outweighs the weights.
_MAX_BATCH = 32


class AnyPoolLinear(CudaCandidate):
    name = "cuda.any_pool_linear"
    pattern = POOL_LINEAR
    source = "kernels/cuda/any_pool_linear.cu"
    dtypes = (torch.bfloat16, torch.float16, torch.float32)

    def refuses(self, problem: Problem, target: Target) -> str | None:
        per = 16 // problem.dtype.itemsize
        if problem["linear"].c % per:
            return f"{problem['linear'].c} channels are no multiple of {per}"
        if problem.n > _MAX_BATCH:
            return f"for batches up to {_MAX_BATCH}, this is {problem.n}"
        return None

    def estimate_ms(self, problem: Problem, target: Target) -> float:
        return self.estimate_in_chain(problem, target)

    def counters(self, problem: Problem, config: None) -> int:
        return ceil_div(problem["linear"].k, _ROWS)

    def workspace(self, problem: Problem, config: None) -> int:
        spec = problem["linear"]
        return 4 * ceil_div(spec.c * problem.dtype.itemsize, _PART_BYTES) * spec.n * spec.k

    def prepare(self, problem: Problem, config: None, parameters: Mapping[str, LayerParameters]):
        p = parameters["linear"]
        bias = None if p.bias is None else p.bias.float().contiguous()
        return p.weight.to(problem.dtype).contiguous(), bias

    def bind(self, problem: Problem, config: None, buffers: Buffers, constants):
        args = (buffers["pool.x"], *constants, buffers["linear"], buffers.workspace, buffers.counters)
        return self.launch(torch.ops.fastres_cuda.any_pool_linear, (buffers, constants), *args)


register(AnyPoolLinear())
