"""cuda.sm90_shifted_block: stage 1's 3x3, expand, residual add and next reduce as one persistent kernel."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fastres.activation import RELU
from fastres.backends.cuda.base import CudaCandidate, scale_shift
from fastres.backends.cuda.conv_bn_act import filter_rows
from fastres.graph.fold import LayerParameters
from fastres.plan.candidate import Buffers, register
from fastres.plan.pattern import SHIFTED_BLOCK
from fastres.plan.problem import Problem, Target

_CHANNELS, _EXPANDED = 64, 256  # kBlockChannels, kBlockExpanded of shifted_block.h


class Sm90ShiftedBlock(CudaCandidate):
    name = "cuda.sm90_shifted_block"
    pattern = SHIFTED_BLOCK
    source = "kernels/cuda/sm90_shifted_block.cu"
    capability = 90

    def refuses(self, problem: Problem, target: Target) -> str | None:
        conv, expand, reduce = problem["conv"], problem["expand"], problem.get("reduce")
        if problem.get("shortcut") is not None:
            return "a projection's weights do not fit beside the others in shared memory"
        if (conv.c, conv.k) != (_CHANNELS, _CHANNELS):
            return f"takes a 3x3 of 64 -> 64 channels, this is {conv.c} -> {conv.k}"
        if expand.k != _EXPANDED or not expand.residual:
            return f"takes an expand to 256 channels with a residual, this is {expand}"
        if conv.residual:
            return "the 3x3 has a residual"
        if reduce is not None and (reduce.k != _CHANNELS or reduce.residual):
            return f"takes a reduce to 64 channels, this is {reduce}"
        if any(spec.act != RELU for _, spec in problem.layers):
            return "takes ReLU after every layer"
        return None

    def counters(self, problem: Problem, config: None) -> int:
        return 1

    def prepare(self, problem: Problem, config: None, parameters: Mapping[str, LayerParameters]):
        constants: list[Tensor | None] = []
        for role in ("conv", "expand", "reduce"):
            p = parameters.get(role)
            if p is None:
                constants += [None, None]
            else:
                constants += [
                    filter_rows(p.weight, problem.dtype),
                    torch.stack(scale_shift(p), 1).contiguous(),
                ]
        return tuple(constants)

    def bind(self, problem: Problem, config: None, buffers: Buffers, constants):
        args = (
            buffers["conv.x"],
            *constants,
            buffers["expand.residual"],
            buffers["expand"],
            buffers.get("reduce"),
            buffers.counters,
        )
        return self.launch(torch.ops.fastres_cuda.sm90_shifted_block, (buffers, constants), *args)


register(Sm90ShiftedBlock())
