"""cuda.sm90_stem_pool: a ResNet's 7x7/2 convolution, ReLU and 3x3/2 max pool, of float or uint8 images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastres.activation import RELU
from fastres.backends.cuda.base import STEP_MS, CudaCandidate, ceil_div, scale_shift
from fastres.graph.fold import LayerParameters
from fastres.plan.candidate import Buffers, register
from fastres.plan.pattern import STEM_POOL
from fastres.plan.problem import Problem, Target
from fastres.tuning.config import Config

_CHANNELS, _COLUMNS = 64, 56  # kStemChannels, kStemColumns of stem_pool.h
_BLOCKS, _DEPTH = 4, 48  # kStemBlocks, kStemDepth
_SMALL_BATCH = 16


@dataclass(frozen=True)
class StemPoolConfig(Config):
    """rows: pooled rows of a tile; each tile computes the convolution row above its first anew."""

    rows: int


def ranked(problem: Problem, target: Target) -> list[tuple[int, int]]:
    """(clocks, rows), best first, by a model of the time: rounds of tiles on the SMs, each 768 a step (six products
    64 x 256 x 16 of 128 clocks) with two steps a pooled row and four more a tile, and 1,500 for its start and end.
    Unmeasured.

    Whole images at batch 256 on 132 SMs (two rounds), 56 single rows at batch 1.
    """
    pool = problem["pool"]
    columns = ceil_div(pool.q, _COLUMNS)
    found = {}
    for parts in range(1, pool.p + 1):
        rows = ceil_div(pool.p, parts)
        rounds = ceil_div(pool.n * ceil_div(pool.p, rows) * columns, target.sms)
        found[rows] = rounds * (768 * (2 * rows + 4) + 1500)
    return sorted((clocks, rows) for rows, clocks in found.items())


def configs(problem: Problem, target: Target) -> tuple[StemPoolConfig, ...]:
    return tuple(StemPoolConfig(rows) for _, rows in ranked(problem, target)[:6])


class Sm90StemPool(CudaCandidate):
    name = "cuda.sm90_stem_pool"
    pattern = STEM_POOL
    source = "kernels/cuda/sm90_stem_pool.cu"
    capability = 90

    def refuses(self, problem: Problem, target: Target) -> str | None:
        conv, pool = problem["conv"], problem["pool"]
        if (conv.c, conv.k, conv.groups) != (3, _CHANNELS, 1):
            return f"{conv.c} -> {conv.k} channels: takes 3 -> 64"
        if (conv.kernel, conv.stride, conv.padding, conv.dilation) != ((7, 7), (2, 2), (3, 3), (1, 1)):
            return "the convolution is not 7x7, stride 2, padding 3"
        if conv.residual:
            return "the convolution has a residual"
        if conv.act != RELU:
            return f"{conv.act}: the maximum is taken before the activation, which only ReLU allows here"
        window = pool.kernel, pool.stride, pool.padding, pool.dilation, pool.ceil_mode
        if window != ((3, 3), (2, 2), (1, 1), (1, 1), False):
            return "the pool is not 3x3, stride 2, padding 1"
        return None

    def planar(self, problem: Problem) -> frozenset[str]:
        return frozenset(problem.inputs)

    def configs(self, problem: Problem, target: Target) -> Sequence[StemPoolConfig]:
        return configs(problem, target)

    def estimate_ms(self, problem: Problem, target: Target) -> float:
        """At small batches, where nothing was measured, a step of the chain and the model's clocks at 1.755 GHz."""
        if problem.n > _SMALL_BATCH:
            return super().estimate_ms(problem, target)
        return max(target.floor_ms(problem) or 0.0, ranked(problem, target)[0][0] / 1.755e6) + STEP_MS

    def prepare(self, problem: Problem, config: StemPoolConfig, parameters: Mapping[str, LayerParameters]):
        """Weight [256, 48] in the compute type, (|scale|, shift) fp32 [64, 2], (factor, offset) fp32 [3, 2] or None."""
        layer = parameters["conv"]
        scale, shift = scale_shift(layer)
        # |scale| keeps the order of what the pool compares; its sign goes into the weights, which is exact.
        signed = torch.where((scale < 0).view(-1, 1, 1, 1), -layer.weight, layer.weight)
        weight = pack(signed.to(problem.dtype))
        constants = torch.stack((scale.abs(), shift), 1).contiguous()
        if "normalize" not in parameters:
            return weight, constants, None
        mean, std = (getattr(parameters["normalize"], name).double() for name in ("mean", "std"))
        normalize = torch.stack((1 / (255 * std), -mean / std), 1).float()
        return weight, constants, normalize.contiguous().to(weight.device)

    def bind(self, problem: Problem, config: StemPoolConfig, buffers: Buffers, constants):
        args = (buffers[problem.inputs[0]], *constants, buffers["pool"], config.rows)
        return self.launch(torch.ops.fastres_cuda.sm90_stem_pool, (buffers, constants), *args)


def pack(weight: Tensor) -> Tensor:
    """[64, 3, 7, 7] → [256, 48]: four blocks of 64 filters, two filter rows each, [7, 3] of 24 elements from the second
    on. Block b is for the convolution row stem_distance(b) of stem_pool.h away from the pair of input rows."""
    rows = weight.permute(0, 2, 3, 1).reshape(_CHANNELS, 7, 21)
    packed = weight.new_zeros(_BLOCKS, _CHANNELS, 2, _DEPTH // 2)
    for block in range(_BLOCKS):
        first = 2 - 2 * ((block + 2) % 4 - 2)
        for half in range(min(2, 7 - first)):
            packed[block, :, half, 1:22] = rows[:, first + half]
    return packed.view(_BLOCKS * _CHANNELS, _DEPTH)


register(Sm90StemPool())
