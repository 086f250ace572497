"""cuda.sm80_conv_bn_act: any convolution with BN, residual and activation, on Ampere and newer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastres.backends.cuda.base import CudaCandidate, ceil_div, scale_shift
from fastres.graph.fold import LayerParameters
from fastres.plan.candidate import Buffers, register
from fastres.plan.pattern import CONV_BN_ACT
from fastres.plan.problem import ConvSpec, Problem, Target
from fastres.tuning.config import Config

_TILES = ((128, 128), (128, 64), (64, 64))
_SPLITS = (1, 2, 3, 4, 6, 8, 12, 16, 24)


@dataclass(frozen=True)
class ConvConfig(Config):
    """A block computes block_m pixels by block_n filters over one of `splits` parts of the depth."""

    block_m: int
    block_n: int
    splits: int = 1


def merged_groups(spec: ConvSpec) -> int:
    """How many groups become one, with zeros between them, so that a block's 64 filters are all used.

    A tile of 64 filters costs the same however many of them exist, so up to there the zeros are free.
    """
    filters = spec.k // spec.groups
    return max(m for m in range(1, spec.groups + 1) if spec.groups % m == 0 and (m == 1 or filters * m <= 64))


def merge_groups(weight: Tensor, groups: int, merged: int) -> Tensor:
    """[K, C / groups, R, S] → [K, C / groups * merged, R, S], block-diagonal in runs of `merged` groups."""
    if merged == 1:
        return weight
    k, c, r, s = weight.shape
    parts = weight.reshape(groups // merged, merged, k // groups, c, r, s)
    wide = weight.new_zeros(groups // merged, merged, k // groups, merged, c, r, s)
    for i in range(merged):
        wide[:, i, :, i] = parts[:, i]
    return wide.reshape(k, merged * c, r, s)


def filter_rows(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """[K, C, R, S] → [K, R * S * C] in `dtype`, rows padded with zeros to whole 16 bytes."""
    rows = weight.permute(0, 2, 3, 1).reshape(weight.shape[0], -1).to(dtype)
    per = 16 // dtype.itemsize
    padded = rows.new_zeros(rows.shape[0], ceil_div(rows.shape[1], per) * per)
    padded[:, : rows.shape[1]] = rows
    return padded


def geometry(spec: ConvSpec, groups: int) -> list[int]:
    return [*spec.kernel, *spec.stride, *spec.padding, *spec.dilation, groups]


def resident_blocks(block_m: int, block_n: int, dtype: torch.dtype, capability: int) -> int:
    """Blocks that fit an SM, by registers (ptxas) and by an A100's 164 KB of shared memory."""
    if (block_m, block_n) == (128, 128):
        return 2 if dtype.itemsize == 2 and capability < 90 else 1
    return 2 if block_m == 128 else 4


class Sm80ConvBnAct(CudaCandidate):
    name = "cuda.sm80_conv_bn_act"
    pattern = CONV_BN_ACT
    source = "kernels/cuda/sm80_conv_bn_act.cu"
    dtypes = (torch.bfloat16, torch.float16, torch.float32)

    def refuses(self, problem: Problem, target: Target) -> str | None:
        if problem.dtype == torch.float32 and "tf32" not in problem.flags:
            return "fp32 by tensor cores needs TF32 to be allowed"
        return None

    def configs(self, problem: Problem, target: Target) -> Sequence[ConvConfig]:
        """By a model of the time, in clocks: waves of blocks, each its products at 1,024 a clock and SM
        (mma.sync on Ampere) and 2,000 for start and epilogue. Unmeasured: `fastres tune` tries eight."""
        spec = problem["conv"]
        groups = spec.groups // merged_groups(spec)
        channels = spec.c // groups
        depth = channels * spec.kernel[0] * spec.kernel[1]
        steps = ceil_div(depth, 64 // problem.dtype.itemsize)
        whole = channels * problem.dtype.itemsize % 16 == 0
        found = []
        for block_m, block_n in _TILES:
            resident = resident_blocks(block_m, block_n, problem.dtype, target.capability)
            if (block_m, block_n) != (64, 64) and not whole:
                continue
            tiles = ceil_div(spec.n * spec.p * spec.q, block_m) * ceil_div(spec.k // groups, block_n) * groups
            for splits in _SPLITS:
                if splits > 1 and steps < 4 * splits:
                    break
                products = block_m * block_n * ceil_div(steps, splits) * (64 // problem.dtype.itemsize)
                # A block alone on its SM runs its products no faster than half the SM's rate.
                blocks = ceil_div(tiles * splits, target.sms)
                clocks = max(blocks * products / 1024, products / 512)
                clocks += 2000 * ceil_div(blocks, resident) + (1500 + 100 * splits if splits > 1 else 0)
                found.append((clocks, ConvConfig(block_m, block_n, splits)))
        return tuple(config for _, config in sorted(found, key=lambda pair: pair[0])[:8])

    def _tiles(self, problem: Problem, config: ConvConfig) -> int:
        spec = problem["conv"]
        groups = spec.groups // merged_groups(spec)
        pixels = ceil_div(spec.n * spec.p * spec.q, config.block_m)
        return pixels * ceil_div(spec.k // groups, config.block_n) * groups

    def counters(self, problem: Problem, config: ConvConfig) -> int:
        return self._tiles(problem, config) if config.splits > 1 else 0

    def workspace(self, problem: Problem, config: ConvConfig) -> int:
        if config.splits == 1:
            return 0
        return 4 * self._tiles(problem, config) * config.splits * config.block_m * config.block_n

    def prepare(self, problem: Problem, config: ConvConfig, parameters: Mapping[str, LayerParameters]):
        spec, p = problem["conv"], parameters["conv"]
        weight = merge_groups(p.weight, spec.groups, merged_groups(spec))
        return filter_rows(weight, problem.dtype), *scale_shift(p)

    def bind(self, problem: Problem, config: ConvConfig, buffers: Buffers, constants):
        spec = problem["conv"]
        x, out, residual = buffers["conv.x"], buffers["conv"], buffers.get("conv.residual")
        split = config.splits > 1
        args = (
            x,
            *constants,
            residual,
            out,
            buffers.workspace if split else None,
            buffers.counters if split else None,
            geometry(spec, spec.groups // merged_groups(spec)),
            spec.act.code,
            spec.act.param,
            config.block_m,
            config.block_n,
            config.splits,
        )
        return self.launch(torch.ops.fastres_cuda.sm80_conv_bn_act, (buffers, constants), *args)


register(Sm80ConvBnAct())
