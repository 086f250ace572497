"""The Hopper candidate for a ResNet's stem: hopper.stem_pool."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastres.activation import RELU
from fastres.backends.triton_hopper.base import Call, HopperCandidate, memory
from fastres.graph.fold import LayerParameters
from fastres.plan.candidate import Buffers, register
from fastres.plan.pattern import STEM_POOL
from fastres.plan.problem import Problem, Target
from fastres.tuning.config import Config


@dataclass(frozen=True)
class StemConfig(Config):
    """rows: pooled rows a program computes; the row above its first is computed twice."""

    rows: int = 56


class HopperStemPool(HopperCandidate):
    name = "hopper.stem_pool"
    pattern = STEM_POOL
    source = "kernels/triton/hopper_stem_pool.py"
    # 200 us of a floor of 81: loads into registers wait on the L1.
    efficiency = 0.4

    def refuses(self, problem: Problem, target: Target) -> str | None:
        conv, pool = problem["conv"], problem["pool"]
        if (conv.c, conv.k, conv.groups) != (3, 64, 1):
            return f"{conv.c} -> {conv.k} channels: takes 3 -> 64"
        if (conv.kernel, conv.stride, conv.padding, conv.dilation) != ((7, 7), (2, 2), (3, 3), (1, 1)):
            return "the convolution is not 7x7, stride 2, padding 3"
        if conv.act != RELU:
            return f"{conv.act}: the maximum is taken before the activation, which only ReLU allows here"
        geometry = pool.kernel, pool.stride, pool.padding, pool.dilation
        if geometry != ((3, 3), (2, 2), (1, 1), (1, 1)) or pool.ceil_mode:
            return "the pool is not 3x3, stride 2, padding 1"
        return None

    def planar(self, problem: Problem) -> frozenset[str]:
        return frozenset(problem.inputs)

    def configs(self, problem: Problem, target: Target) -> Sequence[StemConfig]:
        # One H100, 56 pooled rows: whole images at batch 256 (200 us), strips of 14 at batch 32 (33 us),
        # where whole ones would leave multiprocessors idle.
        pool = problem["pool"]
        images = pool.n * -(-pool.q // 56)
        first = 56 if images >= 128 else 14
        return tuple(StemConfig(rows) for rows in dict.fromkeys((first, 56, 28, 14, 7)))

    def prepare(self, problem: Problem, config: StemConfig, parameters: Mapping[str, LayerParameters]):
        # Folded: fp32 scales would take 16 registers a thread, and there are hardly any left.
        weight, shift = parameters["conv"].folded()
        norm = None
        if "normalize" in parameters:
            # (x / 255 - mean) / std
            mean, std = (getattr(parameters["normalize"], name).double() for name in ("mean", "std"))
            norm = torch.cat((1 / (255 * std), -mean / std)).float().to(weight.device)
        return tuple(pack(weight, shift, problem.dtype, planar) for planar in (False, True)), norm

    def call(self, problem: Problem, config: StemConfig, buffers: Buffers, constants) -> Call:
        from fastres.kernels.triton.hopper_stem_pool import stem_pool_kernel

        conv, pool = problem["conv"], problem["pool"]
        weights, norm = constants
        x = buffers[problem.inputs[0]]
        # One channel's pixels side by side; a lone pixel is both.
        planar = x.stride(3) == 1 and x.stride(1) == conv.h * conv.w > 1
        arguments = {
            "x": x if planar else memory(x),
            "w": weights[planar],
            "norm": weights[planar] if norm is None else norm,
            "y": memory(buffers["pool"]),
            "H": conv.h,
            "W": conv.w,
            "ROWS": config.rows,
            "PLANAR": int(planar),
            "NORMALIZE": int(norm is not None),
        }
        grid = conv.n * -(-pool.p // config.rows) * -(-pool.q // 56)
        return Call(stem_pool_kernel, grid, arguments, {"num_warps": 4})


def pack(weight: Tensor, shift: Tensor, dtype: torch.dtype, planar: bool) -> Tensor:
    """[64, 3, 7, 7] and [64] → [11, 64, 16]: each filter row as 24 elements, tap 0's first channel in the
    second, or each channel of it as 8, tap 0 in the second; then the shift as a sum of three numbers of `dtype`,
    which meet ones."""
    packed = torch.zeros(64, 176, dtype=dtype, device=weight.device)
    if planar:
        packed[:, :168].view(64, 7, 3, 8)[..., 1:] = weight.transpose(1, 2).to(dtype)
    else:
        packed[:, :168].view(64, 7, 24)[:, :, 1:22] = weight.permute(0, 2, 3, 1).reshape(64, 7, 21).to(dtype)
    for column in range(168, 171):
        packed[:, column] = shift.to(dtype)
        shift = shift - packed[:, column].to(shift.dtype)
    return packed.view(64, 11, 16).permute(1, 0, 2).contiguous()


register(HopperStemPool())
