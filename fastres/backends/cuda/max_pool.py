"""cuda.any_max_pool: max pooling of channels_last activations, a link in a chain of CUDA launches."""

from __future__ import annotations

import torch

from fastres.backends.cuda.base import CudaCandidate
from fastres.plan.candidate import Buffers, register
from fastres.plan.pattern import MAX_POOL
from fastres.plan.problem import Problem, Target

_SMALL_BATCH = 32


class AnyMaxPool(CudaCandidate):
    name = "cuda.any_max_pool"
    pattern = MAX_POOL
    source = "kernels/cuda/any_max_pool.cu"
    dtypes = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

    def estimate_ms(self, problem: Problem, target: Target) -> float:
        # at larger batches Triton's, which was tried there
        small = problem.n <= _SMALL_BATCH
        return self.estimate_in_chain(problem, target) if small else super().estimate_ms(problem, target)

    def bind(self, problem: Problem, config: None, buffers: Buffers, constants):
        spec = problem["pool"]
        window = [*spec.kernel, *spec.stride, *spec.padding, *spec.dilation]
        args = (buffers["pool.x"], buffers["pool"], window)
        return self.launch(torch.ops.fastres_cuda.any_max_pool, buffers, *args)


register(AnyMaxPool())
