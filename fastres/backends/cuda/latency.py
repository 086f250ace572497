"""Convolutions for batches up to 16 on Hopper.

cuda.sm90_conv_latency takes one; cuda.sm90_dual_latency adds a projection shortcut to it, as more depth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from fastres.backends.cuda.base import CudaCandidate, ceil_div, scale_shift
from fastres.backends.cuda.conv_bn_act import filter_rows, geometry, merge_groups, merged_groups
from fastres.graph.fold import LayerParameters
from fastres.plan.candidate import Buffers, register
from fastres.plan.pattern import CONV_BN_ACT, DUAL
from fastres.plan.problem import ConvSpec, Problem, Target
from fastres.tuning.config import Config

_MAX_BATCH = 16
_STEP = 64  # elements of depth


@dataclass(frozen=True)
class LatencyConfig(Config):
    """A block computes 64 filters by `pixels`; `cluster` blocks divide the depth among them."""

    pixels: int
    cluster: int


def _configs(spec: ConvSpec, groups: int, steps: int, target: Target) -> tuple[LatencyConfig, ...]:
    """By a model of the time, in clocks: waves of blocks (an SM holds one of 64 pixels, or two of 32), each
    300 a step of depth, 2,000 for start and epilogue, 1,000 for the cluster. Unmeasured.
    """
    found = []
    for pixels, resident in ((64, 1), (32, 2)):
        tiles = ceil_div(spec.n * spec.p * spec.q, pixels) * ceil_div(spec.k // groups, 64) * groups
        for cluster in (1, 2, 4, 8):
            if cluster > steps:
                break
            waves = ceil_div(tiles * cluster, target.sms * resident)
            clocks = waves * (2000 + 300 * ceil_div(steps, cluster)) + (1000 if cluster > 1 else 0)
            found.append((clocks, LatencyConfig(pixels, cluster)))
    return tuple(config for _, config in sorted(found, key=lambda pair: pair[0]))


class Sm90ConvLatency(CudaCandidate):
    name = "cuda.sm90_conv_latency"
    pattern = CONV_BN_ACT
    source = "kernels/cuda/sm90_conv_latency.cu"
    capability = 90

    def refuses(self, problem: Problem, target: Target) -> str | None:
        spec = problem["conv"]
        if spec.n > _MAX_BATCH:
            return f"for batches up to {_MAX_BATCH}, this is {spec.n}"
        if spec.c // spec.groups * merged_groups(spec) % 8:
            return f"{spec.c // spec.groups} channels a group do not fill 16 bytes"
        return None

    def configs(self, problem: Problem, target: Target) -> Sequence[LatencyConfig]:
        spec = problem["conv"]
        groups = spec.groups // merged_groups(spec)
        steps = ceil_div(spec.c // groups * spec.kernel[0] * spec.kernel[1], _STEP)
        return _configs(spec, groups, steps, target)

    def prepare(self, problem: Problem, config: LatencyConfig, parameters: Mapping[str, LayerParameters]):
        spec, p = problem["conv"], parameters["conv"]
        weight = merge_groups(p.weight, spec.groups, merged_groups(spec))
        return filter_rows(weight, problem.dtype), *scale_shift(p)

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
            config.pixels,
            config.cluster,
        )
        return self.launch(torch.ops.fastres_cuda.sm90_conv_latency, (buffers, constants), *args)


class Sm90DualLatency(CudaCandidate):
    """Two products with two BNs in one sum: the scales are folded into the weights, in fp32, rounded once."""

    name = "cuda.sm90_dual_latency"
    pattern = DUAL
    source = "kernels/cuda/sm90_conv_latency.cu"
    capability = 90

    def refuses(self, problem: Problem, target: Target) -> str | None:
        shortcut, expand = problem["shortcut"], problem["expand"]
        if expand.n > _MAX_BATCH:
            return f"for batches up to {_MAX_BATCH}, this is {expand.n}"
        for role, spec in (("shortcut", shortcut), ("expand", expand)):
            if spec.c % 8:
                return f"the {role}'s {spec.c} channels do not fill 16 bytes"
        return None

    def configs(self, problem: Problem, target: Target) -> Sequence[LatencyConfig]:
        steps = ceil_div(problem["expand"].c, _STEP) + ceil_div(problem["shortcut"].c, _STEP)
        return _configs(problem["expand"], 1, steps, target)

    def prepare(self, problem: Problem, config: LatencyConfig, parameters: Mapping[str, LayerParameters]):
        expand, shift = parameters["expand"].folded()
        shortcut, more = parameters["shortcut"].folded()
        depth = expand.shape[1]
        rows = expand.new_zeros(expand.shape[0], ceil_div(depth, _STEP) * _STEP + shortcut.shape[1])
        rows[:, :depth] = expand.flatten(1)
        rows[:, -shortcut.shape[1] :] = shortcut.flatten(1)
        shift = (shift + more).float()
        return rows.to(problem.dtype), torch.ones_like(shift), shift

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
            config.pixels,
            config.cluster,
        )
        return self.launch(torch.ops.fastres_cuda.sm90_conv_latency, (buffers, constants), *args)


register(Sm90ConvLatency())
register(Sm90DualLatency())
