"""Convolutions for batches up to 16 on Hopper.

cuda.sm90_conv_latency takes one; cuda.sm90_dual_latency adds a projection shortcut to it, as more depth.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from fastres.backends.cuda.base import STEP_MS, CudaCandidate, ceil_div, scale_shift
from fastres.backends.cuda.conv_bn_act import geometry, merge_groups, merged_groups
from fastres.graph.fold import LayerParameters
from fastres.plan.candidate import Buffers, register
from fastres.plan.pattern import CONV_BN_ACT, DUAL
from fastres.plan.problem import ConvSpec, Problem, Target
from fastres.tuning.config import Config

_MAX_BATCH = 16
_MAX_STRIDE = 8  # that TMA steps by
_MAX_SIDE = 64  # rows or columns of a box
_STEP = 64  # channels a step


@dataclass(frozen=True)
class LatencyConfig(Config):
    """A block computes `filters` (64 or 128) by a box of images x rows x columns output pixels (at most 128);
    `cluster` blocks divide the depth among them."""

    images: int
    rows: int
    columns: int
    cluster: int
    filters: int = 64

    @property
    def box(self) -> list[int]:
        return [self.images, self.rows, self.columns]


@lru_cache(maxsize=4096)
def taps_inside(
    first: int, count: int, taps: int, stride: int, pad: int, dilation: int, extent: int
) -> tuple[int, int]:
    """As in kernels/cuda/conv_latency.h: the taps of an axis inside an image for one of `count` outputs."""
    low = first * stride - pad
    high = low + (count - 1) * stride
    begin = ceil_div(-high, dilation) if high < 0 else 0
    end = (extent - 1 - low) // dilation + 1 if low < extent else 0
    return begin, max(begin, min(end, taps))


def box_taps(spec: ConvSpec, axis: int, size: int) -> list[int]:
    """How many taps of an axis (0: rows, 1: columns) each box needs, of boxes `size` long."""
    outputs, extent = (spec.p, spec.q)[axis], (spec.h, spec.w)[axis]
    rest = spec.kernel[axis], spec.stride[axis], spec.padding[axis], spec.dilation[axis], extent
    return [
        end - begin
        for first in range(0, outputs, size)
        for begin, end in [taps_inside(first, min(size, outputs - first), *rest)]
    ]


def _boxes(spec: ConvSpec, pixels: int) -> Iterator[tuple[int, int, int]]:
    """Boxes of at most `pixels` outputs that divide an image evenly."""
    for across in range(ceil_div(spec.q, min(pixels, _MAX_SIDE)), spec.q + 1):
        columns = ceil_div(spec.q, across)
        for down in range(ceil_div(spec.p, min(pixels // columns, _MAX_SIDE)), spec.p + 1):
            rows = ceil_div(spec.p, down)
            yield ceil_div(spec.n, ceil_div(spec.n, pixels // (rows * columns))), rows, columns


def box_width(box: Sequence[int]) -> int:
    """Pixels of the product that a box is part of."""
    return next(width for width in (32, 64, 128) if math.prod(box) <= width)


def best_box(spec: ConvSpec, pixels: int, chunks: int, more: int) -> tuple[tuple[int, int, int], int, int]:
    """(box, steps of all boxes, steps of the longest): the fewest steps, `chunks` a tap and `more` a box."""
    best = None
    for box in dict.fromkeys(_boxes(spec, pixels)):
        images, rows, columns = box
        down, across = box_taps(spec, 0, rows), box_taps(spec, 1, columns)
        batches = ceil_div(spec.n, images)
        total = batches * (sum(down) * sum(across) * chunks + len(down) * len(across) * more)
        longest = max(down) * max(across) * chunks + more
        rank = (total, longest, len(down) * len(across) * batches, -columns)
        if best is None or rank < best[0]:
            best = rank, (box, total, longest)
    return best[1]


def stage_bytes(filters: int, pixels: int) -> int:
    """A step in shared memory: the filters and the pixels, by 64 channels of 16 bits."""
    return (filters + pixels) * _STEP * 2


def max_stages(filters: int, pixels: int) -> int:
    """Steps in shared memory, so that two blocks fit an SM."""
    return (113 * 1024 - 128) // stage_bytes(filters, pixels)


def _clocks(
    boxes: int, total: int, longest: int, filters: int, pixels: int, cluster: int, tiles: int, sms: int
) -> float:
    """A model, not a measurement. An SM takes 48 bytes a clock from the L2, all together 24 an SM (5.5 TB/s); filters
    count half, because they come while the layer in front still works. Products of 64 filters by 32, 64 or 128 pixels
    take 24, 32 or 64 clocks for each 16 of depth; a wave of blocks 1,500 to start and store, what a tile has beyond 64
    by 64 one for 16 outputs; a cluster's sums 500 for 64 by 64, and 30 a block."""
    blocks = boxes * tiles * cluster
    stage = stage_bytes(filters, pixels)
    stages = min(max_stages(filters, pixels), ceil_div(longest, cluster))
    # by registers, by shared memory
    resident = max(1, min(4 if filters == 64 and pixels <= 64 else 2, 227 * 1024 // (stages * stage + 1024)))
    share = ceil_div(blocks, sms)
    steps = max(ceil_div(longest, cluster), share * total * tiles / blocks)
    counted = stage - filters * _STEP
    products = {32: 96, 64: 128, 128: 256}[pixels] * filters // 64
    busy = max(steps * max(counted / 48, products), total * tiles * counted / (24 * sms))
    outputs = max(filters * pixels, 64 * 64)
    busy += share * (outputs - 64 * 64) / 16
    return (
        1500 * ceil_div(share, resident) + busy + (500 * outputs / 4096 + 30 * cluster if cluster > 1 else 0)
    )


@lru_cache(maxsize=1024)
def _ranked(spec: ConvSpec, groups: int, more: int, sms: int) -> list[tuple[float, LatencyConfig]]:
    """Boxes of up to 32, 64 and 128 pixels, every size of cluster, in the order of `_clocks`. `more`: a shortcut's
    steps."""
    chunks = ceil_div(spec.c // groups, _STEP)
    steps = chunks * spec.kernel[0] * spec.kernel[1] + more
    found = []
    for pixels in (64, 32, 128):
        box, total, longest = best_box(spec, pixels, chunks, more)
        images, rows, columns = box
        boxes = ceil_div(spec.n, images) * ceil_div(spec.p, rows) * ceil_div(spec.q, columns)
        width = box_width(box)
        for filters, cluster in itertools.product((64, 128), (1, 2, 4, 8)):
            if cluster <= steps and filters < 2 * max(64, spec.k // groups):
                tiles = ceil_div(spec.k // groups, filters) * groups
                clocks = _clocks(boxes, total, longest, filters, width, cluster, tiles, sms)
                found.append((clocks, LatencyConfig(*box, cluster, filters)))
    return sorted(found, key=lambda pair: pair[0])


def latency_rows(weight: Tensor, dtype: torch.dtype, more: Tensor | None = None) -> Tensor:
    """[K, C, R, S] (and a shortcut's [K, C2, 1, 1]) → [K, R * S * C' (+ C2)], C' = C padded with zeros to whole
    steps."""
    k, c, r, s = weight.shape
    rows = weight.new_zeros(k, r * s, ceil_div(c, _STEP) * _STEP)
    rows[:, :, :c] = weight.permute(0, 2, 3, 1).reshape(k, r * s, c)
    parts = [rows.flatten(1)] + ([] if more is None else [more.flatten(1)])
    return torch.cat(parts, 1).to(dtype)


def _too_long(*specs: ConvSpec) -> str | None:
    for spec in specs:
        if max(spec.stride) > _MAX_STRIDE:
            return f"takes strides up to {_MAX_STRIDE}, this is {max(spec.stride)}"
        # a box is at most 64 long, and TMA's at most 256
        if _MAX_SIDE * max(spec.stride) > 256 and max(spec.p, spec.q) > 32:
            return f"stride {max(spec.stride)} over {max(spec.p, spec.q)} outputs"
    return None


class _Latency(CudaCandidate):
    source = "kernels/cuda/sm90_conv_latency.cu"
    capability = 90

    def ranked(self, problem: Problem, target: Target) -> list[tuple[float, LatencyConfig]]:
        raise NotImplementedError

    def configs(self, problem: Problem, target: Target) -> Sequence[LatencyConfig]:
        return tuple(dict.fromkeys(config for _, config in self.ranked(problem, target)))

    def estimate_ms(self, problem: Problem, target: Target) -> float:
        """A step of the chain, the model's clocks at 1.755 GHz, and what the filters take from memory beyond the
        2 us that the layer before hides."""
        weights = sum(spec.weight_elements for _, spec in problem.layers) * problem.dtype.itemsize
        hidden = max(0.0, 1e3 * weights / target.bandwidth - 0.002) if target.bandwidth else 0.0
        return STEP_MS + self.ranked(problem, target)[0][0] / 1.755e6 + hidden


class Sm90ConvLatency(_Latency):
    name = "cuda.sm90_conv_latency"
    pattern = CONV_BN_ACT

    def refuses(self, problem: Problem, target: Target) -> str | None:
        spec = problem["conv"]
        if spec.n > _MAX_BATCH:
            return f"for batches up to {_MAX_BATCH}, this is {spec.n}"
        if spec.c // spec.groups * merged_groups(spec) % 8:
            return f"{spec.c // spec.groups} channels a group do not fill 16 bytes"
        return _too_long(spec)

    def ranked(self, problem: Problem, target: Target) -> list[tuple[float, LatencyConfig]]:
        spec = problem["conv"]
        return _ranked(spec, spec.groups // merged_groups(spec), 0, target.sms)

    def prepare(self, problem: Problem, config: LatencyConfig, parameters: Mapping[str, LayerParameters]):
        spec, p = problem["conv"], parameters["conv"]
        weight = merge_groups(p.weight, spec.groups, merged_groups(spec))
        return latency_rows(weight, problem.dtype), *scale_shift(p)

    def bind(self, problem: Problem, config: LatencyConfig, buffers: Buffers, constants):
        spec = problem["conv"]
        args = (
            buffers["conv.x"],
            *constants,
            buffers.get("conv.residual"),
            buffers["conv"],
            geometry(spec, spec.groups // merged_groups(spec)),
            spec.act.code,
            spec.act.param,
            None,
            [],
            config.box,
            config.filters,
            config.cluster,
        )
        return self.launch(torch.ops.fastres_cuda.sm90_conv_latency, (buffers, constants), *args)


class Sm90DualLatency(_Latency):
    """Two products with two BNs in one sum: the scales are folded into the weights, in fp32, rounded once."""

    name = "cuda.sm90_dual_latency"
    pattern = DUAL

    def refuses(self, problem: Problem, target: Target) -> str | None:
        shortcut, expand = problem["shortcut"], problem["expand"]
        if expand.n > _MAX_BATCH:
            return f"for batches up to {_MAX_BATCH}, this is {expand.n}"
        for role, spec in (("shortcut", shortcut), ("expand", expand)):
            if spec.c % 8:
                return f"the {role}'s {spec.c} channels do not fill 16 bytes"
        return _too_long(shortcut, expand)

    def ranked(self, problem: Problem, target: Target) -> list[tuple[float, LatencyConfig]]:
        return _ranked(problem["expand"], 1, ceil_div(problem["shortcut"].c, _STEP), target.sms)

    def prepare(self, problem: Problem, config: LatencyConfig, parameters: Mapping[str, LayerParameters]):
        expand, shift = parameters["expand"].folded()
        shortcut, more = parameters["shortcut"].folded()
        shift = (shift + more).float()
        return latency_rows(expand, problem.dtype, shortcut), torch.ones_like(shift), shift

    def bind(self, problem: Problem, config: LatencyConfig, buffers: Buffers, constants):
        spec = problem["expand"]
        args = (
            buffers["expand.x"],
            *constants,
            None,
            buffers["expand"],
            geometry(spec, 1),
            spec.act.code,
            spec.act.param,
            buffers["shortcut.x"],
            list(problem["shortcut"].stride),
            config.box,
            config.filters,
            config.cluster,
        )
        return self.launch(torch.ops.fastres_cuda.sm90_conv_latency, (buffers, constants), *args)


register(Sm90ConvLatency())
register(Sm90DualLatency())
