"""What the portable Triton candidates share."""

from __future__ import annotations

import math
from typing import Any

import torch

from fastres.backends.triton_portable.launch import Call, resolve, sequence
from fastres.graph.fold import LayerParameters
from fastres.plan.candidate import Buffers, Candidate, Launch
from fastres.plan.problem import ConvSpec, Problem, Target

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LIMIT = 2**31


class TritonCandidate(Candidate):
    """Subclasses say which kernels to call with what: `calls`. Binding compiles and resolves them."""

    backend = "triton"

    def accepts(self, problem: Problem, target: Target) -> str | None:
        if target.kind != "cuda":
            return "Triton kernels need a GPU"
        if target.triton is None:
            return "Triton cannot be imported"
        if target.triton < (3, 6):
            return f"Triton {target.triton[0]}.{target.triton[1]} is older than 3.6"
        if target.arch.startswith("sm") and target.capability < 80:
            return f"needs sm_80 or newer, this is {target.arch}"
        if problem.dtype not in DTYPES:
            return f"dtype {problem.dtype} has no Triton kernel"
        return self.refuses(problem, target)

    def refuses(self, problem: Problem, target: Target) -> str | None:
        """The reason why this kernel cannot do what the family's conditions allow, or None."""
        return None

    def calls(self, problem: Problem, config: Any, buffers: Buffers, constants: Any) -> list[Call]:
        """The launches, in order. Pure: it reads shapes and pointers and works on meta tensors."""
        raise NotImplementedError

    def kernels(self, problem: Problem, config: Any, buffers: Buffers, constants: Any):
        calls = self.calls(problem, config, buffers, constants)
        return [(call.kernel, call.args, call.options) for call in calls]

    def bind(self, problem: Problem, config: Any, buffers: Buffers, constants: Any) -> Launch:
        device = next(iter(buffers.tensors.values())).device
        return sequence([resolve(call, device) for call in self.calls(problem, config, buffers, constants)])


def precision(problem: Problem) -> str:
    """tl.dot's precision for fp32 operands; the others have one only."""
    return "tf32" if "tf32" in problem.flags else "ieee"


def wide(problem: Problem) -> bool:
    """Whether some tensor needs 64-bit offsets."""
    shapes = [problem.input_shape(name) for name in problem.inputs]
    shapes += [problem.output_shape(role) for role in problem.outputs]
    return any(math.prod(shape) >= LIMIT for shape in shapes)


def scale_shift(parameters: LayerParameters) -> tuple[torch.Tensor, torch.Tensor]:
    scale, shift = parameters.scale_shift()
    return scale.float().contiguous(), shift.float().contiguous()


def pow2(value: int) -> int:
    return 1 << max(value - 1, 0).bit_length()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def shared_limit(target: Target) -> int:
    """Bytes of shared memory that one block may take; 64 KB on AMD's, and where the GPU is not known."""
    limits = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 101: 227, 103: 227, 120: 99, 121: 99}
    return limits.get(target.capability, 64) * 1024


def pointwise(spec: ConvSpec) -> bool:
    """1x1, stride 1, dense: a plain matrix product over the pixels."""
    return spec.pointwise and spec.stride == (1, 1)


def krsc(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[K, C, R, S] as the row-major matrix [K, R * S * C] in `dtype`."""
    return weight.permute(0, 2, 3, 1).reshape(weight.shape[0], -1).to(dtype).contiguous()
