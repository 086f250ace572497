"""`triton.global_avg_pool`, `triton.linear`, `triton.pool_linear` and `triton.max_pool`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastres.backends.triton_portable.base import (
    TritonCandidate,
    cdiv,
    krsc,
    pow2,
    precision,
    shared_limit,
    wide,
)
from fastres.backends.triton_portable.conv_bn_act import conv_call, conv_work
from fastres.backends.triton_portable.launch import Call
from fastres.kernels.triton import max_pool, pool_linear
from fastres.plan.candidate import Buffers, register
from fastres.plan.pattern import GLOBAL_AVG_POOL, LINEAR, MAX_POOL, POOL_LINEAR
from fastres.plan.problem import ConvSpec, LinearSpec, PoolSpec, Problem, Target
from fastres.tuning.portable_config import ConvConfig, PoolConfig, linear_configs, pool_configs


class GlobalAvgPool(TritonCandidate):
    name = "triton.global_avg_pool"
    pattern = GLOBAL_AVG_POOL
    source = "kernels/triton/pool_linear.py"

    def configs(self, problem: Problem, target: Target) -> list[PoolConfig]:
        return pool_configs(problem["pool"])

    def calls(self, problem: Problem, config: PoolConfig, buffers: Buffers, constants) -> list[Call]:
        return [mean_call(problem["pool"], config, buffers["pool.x"], buffers["pool"], wide(problem))]


class Linear(TritonCandidate):
    name = "triton.linear"
    pattern = LINEAR
    source = "kernels/triton/conv_bn_act.py"

    def configs(self, problem: Problem, target: Target) -> list[ConvConfig]:
        return linear_configs(as_conv(problem["linear"]), problem.dtype, target, shared_limit(target))

    def busiest_ms(self, problem: Problem, target: Target) -> float:
        work = conv_work(as_conv(problem["linear"]), self.configs(problem, target)[0], problem.dtype.itemsize)
        return work.ms(problem, target)

    def prepare(self, problem, config, parameters):
        layer = parameters["linear"]
        weight = layer.weight
        # not in the user's default dtype
        none = torch.zeros(weight.shape[0], dtype=torch.float32, device=weight.device)
        bias = none if layer.bias is None else layer.bias.float()
        return krsc(weight[:, :, None, None], problem.dtype), torch.ones_like(bias), bias.contiguous()

    def calls(self, problem: Problem, config: ConvConfig, buffers: Buffers, constants) -> list[Call]:
        spec, x, y = problem["linear"], buffers["linear.x"], buffers["linear"]
        return [linear_call(spec, config, x, y, constants, precision(problem))]


class PoolLinear(Linear):
    """Two kernels: the mean, rounded to the activations' type as PyTorch does, goes through the workspace."""

    name = "triton.pool_linear"
    pattern = POOL_LINEAR
    source = "kernels/triton/pool_linear.py"

    def workspace(self, problem: Problem, config: ConvConfig) -> int:
        return math.prod(problem["linear"].x_shape) * problem.dtype.itemsize

    def calls(self, problem: Problem, config: ConvConfig, buffers: Buffers, constants) -> list[Call]:
        pool, linear = problem["pool"], problem["linear"]
        pooled = buffers.workspace.view(problem.dtype).view(linear.x_shape)
        mean = mean_call(pool, pool_configs(pool)[0], buffers["pool.x"], pooled, wide(problem))
        product = linear_call(linear, config, pooled, buffers["linear"], constants, precision(problem))
        return [mean, product]


class MaxPool(TritonCandidate):
    name = "triton.max_pool"
    pattern = MAX_POOL
    source = "kernels/triton/max_pool.py"

    def refuses(self, problem: Problem, target: Target) -> str | None:
        spec = problem["pool"]
        return "windows of more than 25 elements" if math.prod(spec.kernel) > 25 else None

    def configs(self, problem: Problem, target: Target) -> list[PoolConfig]:
        block_c = min(64, pow2(problem["pool"].c))
        return [PoolConfig(block, block_c, 4) for block in (32, 16, 64)]

    def calls(self, problem: Problem, config: PoolConfig, buffers: Buffers, constants) -> list[Call]:
        spec = problem["pool"]
        m = spec.n * spec.p * spec.q
        args = dict(
            x=buffers["pool.x"],
            y=buffers["pool"],
            M=m,
            H=spec.h,
            W=spec.w,
            P=spec.p,
            Q=spec.q,
            C=spec.c,
            R=spec.kernel[0],
            S=spec.kernel[1],
            STRIDE_H=spec.stride[0],
            STRIDE_W=spec.stride[1],
            PAD_H=spec.padding[0],
            PAD_W=spec.padding[1],
            DIL_H=spec.dilation[0],
            DIL_W=spec.dilation[1],
            WIDE=wide(problem),
            BLOCK_M=config.block_p,
            BLOCK_C=config.block_c,
        )
        programs = cdiv(m, config.block_p) * cdiv(spec.c, config.block_c)
        return [Call(max_pool.max_pool_kernel, args, programs, config.num_warps)]


def mean_call(spec: PoolSpec, config: PoolConfig, x: Tensor, y: Tensor, is_wide: bool) -> Call:
    args = dict(
        x=x, y=y, HW=spec.h * spec.w, C=spec.c, WIDE=is_wide, BLOCK_P=config.block_p, BLOCK_C=config.block_c
    )
    programs = spec.n * cdiv(spec.c, config.block_c)
    return Call(pool_linear.global_avg_pool_kernel, args, programs, config.num_warps)


def linear_call(spec: LinearSpec, config: ConvConfig, x: Tensor, y: Tensor, constants, precise: str) -> Call:
    return conv_call(as_conv(spec), config, x, None, y, constants, precise, False)


def as_conv(spec: LinearSpec) -> ConvSpec:
    """A linear layer is a 1x1 convolution of one pixel."""
    return ConvSpec(spec.n, spec.c, 1, 1, spec.k, (1, 1), affine=False, bias=spec.bias)


for candidate in (GlobalAvgPool(), Linear(), PoolLinear(), MaxPool()):
    register(candidate)
