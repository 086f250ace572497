"""conv_stats on Hopper: sm90_conv_bn_act's kernel in training, with the statistics of its channels instead of BN."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from fastres.backends import cuda_ops
from fastres.backends.cuda.base import LIMIT, ceil_div
from fastres.backends.cuda.conv_bn_act import geometry
from fastres.backends.cuda.sm90_conv_bn_act import ThroughputConfig, tile_run, tiles_for, why_not
from fastres.plan.problem import ConvSpec, Target
from fastres.plan.target import detect

_MAX_CHUNKS, _PARTS = 512, 64  # moments_parts in any_bn_act.h
# of an output; a smaller one is still in the L2 (50 MB) when it is read again, and a launch more is not earned
_FEWEST = 2**24


def spec_of(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> ConvSpec:
    kernel = weight.shape[2], weight.shape[3]
    return ConvSpec(*x.shape, weight.shape[0], kernel, tuple(stride), tuple(padding), tuple(dilation), groups)


def takes(x: Tensor, spec: ConvSpec) -> bool:
    """Whether the kernel can compute this, and is believed to be no slower than cuDNN's convolution and then
    `bn_stats`."""
    if not x.is_contiguous(memory_format=torch.channels_last) or x.data_ptr() % 16:
        return False
    return worth_it(spec, x.dtype) and detect(x.device).capability == 90


@lru_cache(maxsize=1024)
def worth_it(spec: ConvSpec, dtype: torch.dtype) -> bool:
    """Unmeasured. A 1x1 of stride 1 is left to Triton, whose products were timed; what else writes 2^24 elements
    or more is taken."""
    if (spec.kernel, spec.stride) == ((1, 1), (1, 1)) or spec.n * spec.k * spec.p * spec.q < _FEWEST:
        return False
    return dtype in (torch.bfloat16, torch.float16) and can(spec)


def can(spec: ConvSpec) -> bool:
    elements = spec.n * max(spec.c * spec.h * spec.w, spec.k * spec.p * spec.q)
    return 0 < elements < LIMIT and why_not(spec, "convolution") is None


@lru_cache(maxsize=1024)
def best_config(spec: ConvSpec, target: Target) -> ThroughputConfig:
    return tiles_for(spec, target)[0]


def chunks_of(spec: ConvSpec, config: ThroughputConfig) -> int:
    """Runs of pixels that have statistics of their own: sm90_conv_chunks in sm90_conv.h."""
    whole = config.pixels * config.cluster
    tiles = ceil_div(tile_run(spec, config.pixels, whole * config.by_position), whole) * config.cluster
    return tiles * (2 if config.filters == 64 else 1)


def launch(
    x: Tensor,
    weight: Tensor,
    spec: ConvSpec,
    out: Tensor,
    mean: Tensor,
    var: Tensor,
    config: ThroughputConfig | None = None,
) -> None:
    """`config`: other tiles than the best by the model."""
    config = config or best_config(spec, detect(x.device))
    chunks = chunks_of(spec, config)
    chunks += _PARTS if chunks > _MAX_CHUNKS else 0
    rows = weight.permute(0, 2, 3, 1).reshape(spec.k, -1)
    rows = rows.clone() if rows.data_ptr() % 16 else rows
    cuda_ops._call(
        torch.ops.fastres_cuda.sm90_conv_stats,
        *(x, rows, out, x.new_zeros(1, dtype=torch.int32)),
        *(x.new_empty(12 * spec.k * chunks, dtype=torch.uint8), geometry(spec, 1)),
        *(config.filters, config.pixels, config.cluster, config.by_position, mean, var),
    )
