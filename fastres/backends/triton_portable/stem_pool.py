"""`triton.stem_pool`: the stem's convolution and max pool in one kernel, of float or uint8 images."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastres.backends.triton_portable.base import (
    LIMIT,
    TritonCandidate,
    cdiv,
    pow2,
    precision,
    scale_shift,
)
from fastres.backends.triton_portable.launch import Call
from fastres.kernels.triton import stem_pool as kernels
from fastres.plan.candidate import Buffers, Work, register
from fastres.plan.pattern import STEM_POOL
from fastres.plan.problem import ConvSpec, Problem, Target
from fastres.tuning.portable_config import StemConfig, stem_configs

_MONOTONE = ("identity", "relu", "relu6")


class StemPool(TritonCandidate):
    name = "triton.stem_pool"
    pattern = STEM_POOL
    source = "kernels/triton/stem_pool.py"

    def refuses(self, problem: Problem, target: Target) -> str | None:
        spec, pool = problem["conv"], problem["pool"]
        window = (pool.kernel, pool.stride, pool.padding, pool.dilation, pool.ceil_mode)
        if window != ((3, 3), (2, 2), (1, 1), (1, 1), False):
            return "pools 3x3 windows of stride 2 and padding 1 only"
        if spec.residual or spec.groups != 1 or spec.dilation != (1, 1):
            return "takes a dense convolution without residual and dilation"
        if spec.kernel[1] * spec.c > 32 - 8 or spec.kernel[0] > 8:
            return f"a filter row of {spec.kernel[1] * spec.c} elements is longer than 24"
        if spec.k > 128:
            return f"{spec.k} output channels do not fit one tile of 128"
        if max(spec.h * spec.w * spec.c, spec.p * spec.q * spec.k) >= LIMIT:
            return "an image of more than 2^31 elements"
        return None

    def configs(self, problem: Problem, target: Target) -> list[StemConfig]:
        return stem_configs(problem, target)

    def busiest_ms(self, problem: Problem, target: Target) -> float:
        """A block reads the rows of its strip once for every filter row, and all weights."""
        spec, pool, config = problem["conv"], problem["pool"], self.configs(problem, target)[0]
        blocks = spec.n * cdiv(pool.p, config.strip) * cdiv(pool.q, config.block_q)
        row = 2 * config.block_q * spec.kernel[0] * spec.kernel[1] * spec.c
        each = ((2 * config.strip + 1) * row + spec.weight_elements) * problem.dtype.itemsize
        return Work(blocks, each).ms(problem, target)

    def planar(self, problem: Problem) -> frozenset[str]:
        return frozenset(problem.inputs)

    def prepare(self, problem, config, parameters):
        """(scale, shift), and of channels_last and contiguous images (weight, factor, offset)."""
        layer, normalize = parameters["conv"], parameters.get("normalize")
        ordered = tuple(
            _order(problem, layer.weight, normalize, Layout.of(problem["conv"], p)) for p in (0, 1)
        )
        return scale_shift(layer), ordered

    def calls(self, problem: Problem, config: StemConfig, buffers: Buffers, constants) -> list[Call]:
        spec, pool = problem["conv"], problem["pool"]
        normalize = problem.get("normalize") is not None
        (scale, shift), ordered = constants
        x = buffers[problem.inputs[0]]
        # One channel's pixels side by side; of a lone pixel or channel both orders are the same.
        planar = x.stride(3) == 1 and x.stride(1) == spec.h * spec.w
        layout = Layout.of(spec, planar)
        weight, factor, offset = ordered[planar]
        size = layout.segments * layout.segment
        args = dict(
            x=x,
            w=weight,
            scale=scale,
            shift=shift,
            factor=scale if factor is None else factor,
            offset=scale if offset is None else offset,
            y=buffers["pool"],
            H=spec.h,
            W=spec.w,
            P1=spec.p,
            Q1=spec.q,
            P2=pool.p,
            Q2=pool.q,
            act_param=spec.act.param,
            C=spec.c,
            K=spec.k,
            R=spec.kernel[0],
            PLANAR=planar,
            SEGMENTS=layout.segments,
            SEGMENT=layout.segment,
            SHIFT=layout.early,
            STRIDE_H=spec.stride[0],
            STRIDE_W=spec.stride[1],
            PAD_H=spec.padding[0],
            PAD_W=spec.padding[1],
            ACT=spec.act.code,
            MONOTONE=spec.act.kind in _MONOTONE,
            NORMALIZE=normalize,
            PRECISION=precision(problem),
            STRIP=config.strip,
            BLOCK_Q=config.block_q,
            BLOCK_K=min(max(16, pow2(layout.row)) * config.block_r, size),
            BLOCK_N=max(16, pow2(spec.k)),
        )
        programs = spec.n * cdiv(pool.p, config.strip) * cdiv(pool.q, config.block_q)
        return [Call(kernels.stem_pool_kernel, args, programs, config.num_warps, config.num_stages)]


@dataclass(frozen=True)
class Layout:
    """How the reduction runs over the image: segments of contiguous elements.

    Attributes:
        segments, segment: their number and length, filled up to powers of two.
        early: elements that a segment begins before the filter's first column; its start is then as aligned as
            the step from one output column to the next.
        planes: segments of a filter row: the channels of contiguous images, one of channels_last ones.
        row: elements of a filter row.
    """

    segments: int
    segment: int
    early: int
    planes: int

    @property
    def row(self) -> int:
        return self.planes * self.segment

    @classmethod
    def of(cls, spec: ConvSpec, planar: bool) -> Layout:
        pixel, planes = (1, spec.c) if planar else (spec.c, 1)
        step = spec.stride[1] * pixel
        aligned = min(step & -step, 8)
        early = -spec.padding[1] * pixel % aligned
        segment = pow2(spec.kernel[1] * pixel + early)
        # tl.dot takes a reduction of 16 at least.
        segment = max(segment, pow2(cdiv(16, planes)))
        return cls(pow2(spec.kernel[0] * planes), segment, early, planes)


def _order(problem: Problem, weight: torch.Tensor, normalize, layout: Layout):
    """The weights [K, R, planes, segment] in memory, and uint8's factor and offset of each of their columns."""
    k, c, r, s = weight.shape
    planes, early = layout.planes, layout.early
    filled = torch.zeros(k, layout.segments, layout.segment, dtype=problem.dtype, device=weight.device)
    # A filter row's segments: [K, R, C, S] of planes, else [K, R, 1, S * C].
    rows = weight.permute(0, 2, 1, 3) if planes == c else weight.permute(0, 2, 3, 1).reshape(k, r, 1, s * c)
    rows = rows.reshape(k, r * planes, -1).to(problem.dtype)
    filled[:, : r * planes, early : early + rows.shape[2]] = rows
    if normalize is None:
        return filled.view(k, -1), None, None
    # (x / 255 - mean) / std
    mean, std = (getattr(normalize, name).double() for name in ("mean", "std"))
    column = torch.arange(layout.segments * layout.segment)
    channel = column // layout.segment % c if planes == c else (column % layout.segment - early) % c
    factor, offset = (1 / (255 * std))[channel], (-mean / std)[channel]
    return filled.view(k, -1), factor.float().to(weight.device), offset.float().to(weight.device)


register(StemPool())
