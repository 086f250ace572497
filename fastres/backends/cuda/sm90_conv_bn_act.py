"""Convolutions for large batches on Hopper.

cuda.sm90_conv_bn_act takes one; cuda.sm90_dual adds a projection shortcut to it, as more depth.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from fastres.activation import IDENTITY, RELU
from fastres.backends.cuda.base import CudaCandidate, ceil_div, scale_shift
from fastres.backends.cuda.conv_bn_act import filter_rows, geometry
from fastres.backends.cuda.latency import box_taps
from fastres.graph.fold import LayerParameters
from fastres.plan.candidate import Buffers, register
from fastres.plan.pattern import CONV_BN_ACT, DUAL
from fastres.plan.problem import ConvSpec, Problem, Target
from fastres.tuning.config import Config

_STEP = 64  # channels
TILES = ((128, 256), (256, 128), (128, 128), (64, 256))
HALO_TILES = ((128, 224), (64, 448))
_HALO_ROW = 56


@dataclass(frozen=True)
class ThroughputConfig(Config):
    """A block computes `filters` by `pixels`; `cluster` blocks with neighbouring pixels share the loads of weights.

    Tiles of 224 and 448 pixels are the halo form's: 4 and 8 rows of 56 pixels. `by_position`: the pixels of a tile are
    those of so many images at one position, and taps that lie in the padding there are left out.
    """

    filters: int
    pixels: int
    cluster: int
    by_position: bool = False


def _steps(spec: ConvSpec) -> int:
    return spec.kernel[0] * spec.kernel[1] * ceil_div(spec.c, _STEP)


def takes_halo(spec: ConvSpec) -> bool:
    """A 3x3 that keeps the size, images that fill rows of 56 pixels (56, 28, 14, 7, … wide), identity or ReLU."""
    same = (spec.kernel, spec.stride, spec.padding, spec.dilation) == ((3, 3), (1, 1), (1, 1), (1, 1))
    return same and _HALO_ROW % spec.w == 0 and spec.k % 8 == 0 and spec.act in (IDENTITY, RELU)


def takes_positions(spec: ConvSpec) -> bool:
    """Some outputs have taps in the padding, none has all there."""
    taps = [box_taps(spec, axis, 1) for axis in (0, 1)]
    skips = any(min(found) < extent for found, extent in zip(taps, spec.kernel, strict=True))
    return skips and min(map(min, taps)) > 0 and spec.k % 8 == 0


def tile_run(spec: ConvSpec, pixels: int, by_position: int = 0) -> int:
    """Output pixels that tiles of `pixels` are cut from; the halo form's include some that do not exist, and so do
    whole tiles `by_position`, of so many pixels."""
    if by_position:
        return spec.p * spec.q * ceil_div(spec.n, by_position) * by_position
    if pixels % _HALO_ROW:
        return spec.n * spec.p * spec.q
    return ceil_div(spec.n * spec.w, _HALO_ROW) * ceil_div(spec.h, pixels // _HALO_ROW) * pixels


def tiles_for(spec: ConvSpec, target: Target) -> tuple[ThroughputConfig, ...]:
    """All tiles for a convolution, best first."""
    return _configs(spec, _steps(spec), target)


@lru_cache(maxsize=1024)
def _configs(spec: ConvSpec, steps: int, target: Target, dual: bool = False) -> tuple[ThroughputConfig, ...]:
    """By a model of the time, in clocks of an SM. Unmeasured.

    Clusters take tiles in waves. A step of 64 channels costs its products (2,048 a clock), its share of shared
    memory's bandwidth (128 bytes a clock: operands written once, and read by every wgmma) or of the L2's (40 bytes
    a clock and SM: what a Gluon kernel without clusters drew when it took 80 us for 256 -> 256 3x3 @14), whichever
    is more, and 15 % of the other two, for what does not overlap; a cluster reads its weights from the L2 once. The
    halo form takes three taps at a step, and reads two rows of pixels beside its own. Beside the steps stand the
    epilogue (32 elements a clock) and 600 for filling and draining the pipeline. By position, tiles have fewer steps at
    the edges, and a cluster that is done takes the next: such tiles are listed where that ends first.
    """
    found, by_position = [], []
    positions = not dual and spec.n >= 64 and spec.p * spec.q <= 1024 and takes_positions(spec)
    for filters, pixels in TILES + (HALO_TILES if not dual and takes_halo(spec) else ()):
        halo = pixels % _HALO_ROW == 0
        taps, loaded = (3, pixels + 2 * _HALO_ROW) if halo else (1, pixels)
        run = tile_run(spec, pixels)
        columns = pixels // 2 if filters == 64 else pixels  # of a wgmma
        products = taps * filters * pixels * _STEP / 2048
        operands = (taps * filters + loaded) * 128 + products * 2048 * 2 * (1 / 64 + 1 / columns)
        for cluster in (2, 1):
            tiles = ceil_div(run, pixels * cluster) * ceil_div(spec.k, filters)
            waves = ceil_div(tiles, max(1, target.sms // cluster))
            from_l2 = (taps * filters / cluster + loaded) * 128
            parts = (products, operands / 128, from_l2 / 40)
            step = 0.85 * max(parts) + 0.15 * sum(parts)
            clocks = waves * (steps / taps * step + filters * pixels / 32 + 600)
            found.append((clocks, ThroughputConfig(filters, pixels, cluster)))
            if positions and not halo and filters <= 128:
                tiles = ceil_div(spec.n, pixels * cluster) * ceil_div(spec.k, filters)
                cost = [n * ceil_div(spec.c, _STEP) * step + filters * pixels / 32 + 600 for n in _taps(spec)]
                clocks = _end(cost, tiles, max(1, target.sms // cluster))
                by_position.append((clocks, ThroughputConfig(filters, pixels, cluster, True)))
    least = min(clocks for clocks, _ in found)
    found += [pair for pair in by_position if pair[0] < least]
    return tuple(config for _, config in sorted(found, key=lambda pair: pair[0]))


def _taps(spec: ConvSpec) -> list[int]:
    """Taps inside the image of every output position, in the order of Position in kernels/cuda/sm90_conv.h."""
    rows, columns = (box_taps(spec, axis, 1) for axis in (0, 1))
    taps = [r * s for r in rows for s in columns]
    first = (spec.q + 1) % len(taps)
    return taps[first:] + taps[:first]


def _end(cost: Sequence[float], each: int, workers: int) -> float:
    """When all is done, `each` pieces of every cost in turn, each piece by the worker that is free first."""
    free = [0.0] * workers
    for clocks in cost:
        for _ in range(each):
            heapq.heapreplace(free, free[0] + clocks)
    return max(free)


def why_not(spec: ConvSpec, name: str) -> str | None:
    if spec.groups != 1:
        return f"takes one group, the {name} has {spec.groups}"
    if spec.c % 8:
        return f"the {name}'s {spec.c} channels do not fill 16 bytes"
    if spec.n * spec.p * spec.q >= 2**30:
        return f"the {name} has 2^30 output pixels or more"
    for extent, stride, pad, dilation in zip(
        spec.kernel, spec.stride, spec.padding, spec.dilation, strict=True
    ):
        reach = dilation * (extent - 1)
        if pad > 128 or reach - pad > 128 or pad - reach > 127 or reach > 255:
            return f"the {name}'s filter or padding reaches further than TMA's im2col mode, 128 pixels"
        if stride > 8:
            return f"strides up to 8 are taken, the {name} has {stride}"
    return None


class Sm90ConvBnAct(CudaCandidate):
    name = "cuda.sm90_conv_bn_act"
    pattern = CONV_BN_ACT
    source = "kernels/cuda/sm90_conv_bn_act.cu"
    capability = 90

    def refuses(self, problem: Problem, target: Target) -> str | None:
        return why_not(problem["conv"], "convolution")

    def configs(self, problem: Problem, target: Target) -> Sequence[ThroughputConfig]:
        return tiles_for(problem["conv"], target)

    def counters(self, problem: Problem, config: ThroughputConfig) -> int:
        return 1

    def prepare(self, problem: Problem, config: ThroughputConfig, parameters: Mapping[str, LayerParameters]):
        p = parameters["conv"]
        return filter_rows(p.weight, problem.dtype), *scale_shift(p)

    def bind(self, problem: Problem, config: ThroughputConfig, buffers: Buffers, constants):
        spec = problem["conv"]
        args = (
            buffers["conv.x"],
            *constants,
            buffers.get("conv.residual"),
            buffers["conv"],
            buffers.counters,
            geometry(spec, 1),
            spec.act.code,
            spec.act.param,
            None,
            None,
            [],
            config.filters,
            config.pixels,
            config.cluster,
            config.by_position,
        )
        return self.launch(torch.ops.fastres_cuda.sm90_conv_bn_act, (buffers, constants), *args)


class Sm90Dual(CudaCandidate):
    """Two products with two BNs in one sum: the scales are folded into the weights, in fp32, rounded once."""

    name = "cuda.sm90_dual"
    pattern = DUAL
    source = "kernels/cuda/sm90_conv_bn_act.cu"
    capability = 90

    def refuses(self, problem: Problem, target: Target) -> str | None:
        return why_not(problem["expand"], "expand") or why_not(problem["shortcut"], "shortcut")

    def configs(self, problem: Problem, target: Target) -> Sequence[ThroughputConfig]:
        steps = _steps(problem["expand"]) + _steps(problem["shortcut"])
        return _configs(problem["expand"], steps, target, dual=True)

    def counters(self, problem: Problem, config: ThroughputConfig) -> int:
        return 1

    def prepare(self, problem: Problem, config: ThroughputConfig, parameters: Mapping[str, LayerParameters]):
        expand, shift = parameters["expand"].folded()
        shortcut, more = parameters["shortcut"].folded()
        shift = (shift + more).float()
        weights = (filter_rows(weight, problem.dtype) for weight in (expand, shortcut))
        return *weights, torch.ones_like(shift), shift

    def bind(self, problem: Problem, config: ThroughputConfig, buffers: Buffers, constants):
        spec = problem["expand"]
        weight, second_weight, scale, shift = constants
        args = (
            buffers["expand.x"],
            weight,
            scale,
            shift,
            None,
            buffers["expand"],
            buffers.counters,
            geometry(spec, 1),
            spec.act.code,
            spec.act.param,
            buffers["shortcut.x"],
            second_weight,
            list(problem["shortcut"].stride),
            config.filters,
            config.pixels,
            config.cluster,
            config.by_position,
        )
        return self.launch(torch.ops.fastres_cuda.sm90_conv_bn_act, (buffers, constants), *args)


register(Sm90ConvBnAct())
register(Sm90Dual())
