"""What the CUDA candidates share."""

from __future__ import annotations

import math
from typing import Any

import torch

from fastres import native
from fastres.backends import cuda_ops
from fastres.graph.fold import LayerParameters
from fastres.plan.candidate import Candidate
from fastres.plan.problem import Problem, Target

LIMIT = 2**31
# of a dependent kernel in a graph: 0.87 us with programmatic launch, 1.10 without (measured on an H100)
STEP_MS = 0.00087
_SAVED_MS = 0.00023


class CudaCandidate(Candidate):
    """Launches are records: consecutive ones are joined into one C++ call.

    Attributes:
        capability: the lowest compute capability that it runs on; Hopper's own kernels (90) run nowhere else.
        dtypes: the compute types that it takes.
    """

    backend = "cuda"
    capability = 80
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16)

    def accepts(self, problem: Problem, target: Target) -> str | None:
        if target.kind != "cuda":
            return f"needs a CUDA device, this is {target.kind}"
        if target.capability < self.capability:
            return f"needs sm_{self.capability} or newer, this is {target.arch}"
        if self.capability == 90 and target.capability != 90:
            return f"written for sm_90a, this is {target.arch}"
        if problem.dtype not in self.dtypes:
            return f"dtype {problem.dtype} has no such kernel"
        if any(math.prod(shape) >= LIMIT for shape in _shapes(problem)):
            return "a tensor of 2^31 elements or more"
        reason = self.refuses(problem, target)
        return reason or (None if target.on_paper else native.available("cuda"))

    def refuses(self, problem: Problem, target: Target) -> str | None:
        """The reason why the kernel cannot do what the conditions above allow, or None."""
        return None

    def estimate_ms(self, problem: Problem, target: Target) -> float:
        """2.5 times the floor and 5 us: above cuDNN's and Triton's estimates, because nobody has measured."""
        return 2.5 * super().estimate_ms(problem, target) + 0.005

    def estimate_in_chain(self, problem: Problem, target: Target) -> float:
        """For kernels of small batches, which are as unmeasured as Triton's: a link of a chain of records costs
        less to launch, and nothing else is claimed."""
        return super().estimate_ms(problem, target) - _SAVED_MS

    def launch(self, op: Any, keep: Any, *args: Any) -> cuda_ops.RecordLaunch:
        """The launch of the record that `op(*args, record)` makes; `keep`: what the record points to."""
        device = next(a for a in args if isinstance(a, torch.Tensor)).device
        index = device.index if device.index is not None else 0
        return cuda_ops.RecordLaunch(cuda_ops.make_record(op, *args), index, keep)


def _shapes(problem: Problem):
    yield from (problem.input_shape(name) for name in problem.inputs)
    yield from (problem.output_shape(role) for role in problem.outputs)


def scale_shift(parameters: LayerParameters) -> tuple[torch.Tensor, torch.Tensor]:
    scale, shift = parameters.scale_shift()
    return scale.float().contiguous(), shift.float().contiguous()


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)
