"""`triton.stem_pool`: the stem's convolution and max pool in one kernel, of float or uint8 images."""

from __future__ import annotations

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

    def prepare(self, problem, config, parameters):
        spec = problem["conv"]
        layer = parameters["conv"]
        r_pad, segment, early = layout(spec)
        k, c = spec.k, spec.c
        (r, s), device = spec.kernel, layer.weight.device
        weight = torch.zeros(k, r_pad, segment, dtype=problem.dtype, device=device)
        rows = layer.weight.permute(0, 2, 3, 1).reshape(k, r, s * c).to(problem.dtype)
        weight[:, :r, early : early + s * c] = rows
        scale, shift = scale_shift(layer)
        if "normalize" not in parameters:
            return weight.view(k, -1), scale, shift, scale, shift
        # (x / 255 - mean) / std, spread over a segment's elements
        mean, std = (getattr(parameters["normalize"], name).double() for name in ("mean", "std"))
        channel = (torch.arange(r_pad * segment) % segment - early) % c
        factor, offset = (1 / (255 * std))[channel], (-mean / std)[channel]
        return weight.view(k, -1), scale, shift, factor.float().to(device), offset.float().to(device)

    def calls(self, problem: Problem, config: StemConfig, buffers: Buffers, constants) -> list[Call]:
        spec, pool = problem["conv"], problem["pool"]
        normalize = problem.get("normalize") is not None
        weight, scale, shift, factor, offset = constants
        r_pad, segment, early = layout(spec)
        args = dict(
            x=buffers["normalize.x" if normalize else "conv.x"],
            w=weight,
            scale=scale,
            shift=shift,
            factor=factor,
            offset=offset,
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
            R_PAD=r_pad,
            SEGMENT=segment,
            SHIFT=early,
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
            BLOCK_K=min(segment * config.block_r, r_pad * segment),
            BLOCK_N=max(16, pow2(spec.k)),
        )
        programs = spec.n * cdiv(pool.p, config.strip) * cdiv(pool.q, config.block_q)
        return [Call(kernels.stem_pool_kernel, args, programs, config.num_warps, config.num_stages)]


def layout(spec: ConvSpec) -> tuple[int, int, int]:
    """(filter rows padded, elements of a row padded, elements that a row starts early). The start of every
    row is then as aligned as the step from one output column to the next."""
    step = spec.stride[1] * spec.c
    aligned = min(step & -step, 8)
    early = -spec.padding[1] * spec.c % aligned
    return pow2(spec.kernel[0]), max(16, pow2(spec.kernel[1] * spec.c + early)), early


register(StemPool())
