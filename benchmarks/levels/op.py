"""Ops: add_relu, bn_act forward and backward, conv_bn_act, conv_stats."""

from __future__ import annotations

from benchmarks.case import Case
from benchmarks.ops import add_relu, bn_act, conv_bn_act, conv_stats
from benchmarks.scope import Scope
from benchmarks.shapes import Layer
from fastres.activation import RELU
from fastres.plan.problem import ConvSpec

# (channels, height and width): where ResNet-50's residual blocks end, and its stem
_PLACES = ((256, 56), (512, 28), (1024, 14), (2048, 7), (64, 112))


def cases(scope: Scope) -> list[Case]:
    places = scope.pick(smoke=((16, 8),), quick=_PLACES[:1], cuda_quick=_PLACES[:4:3], full=_PLACES)
    batches = scope.batches or scope.pick(
        smoke=(2,), quick=(8,), cuda_quick=(256,), full=(1, 8, 32), cuda_full=(32, 256)
    )
    kernels = scope.pick(smoke=(1, 3), quick=(1,), cuda_quick=(1, 3), full=(1, 3))
    found = []
    for dtype in scope.part_dtypes:
        for batch in batches:
            for channels, size in places:
                shape = (batch, channels, size, size)
                spec = ConvSpec(1, channels // 4, size, size, channels, (1, 1), act=RELU, residual=True)
                layer = Layer("conv_bn_act", "conv_bn_act", "conv", spec)
                found += [
                    add_relu.case(shape, dtype, scope.device),
                    bn_act.case(shape, dtype, scope.device, backward=False),
                    bn_act.case(shape, dtype, scope.device, backward=True),
                    conv_bn_act.case(layer, batch, dtype, scope.device, level="op"),
                ]
                narrow = (batch, spec.c, size, size)
                for kernel in kernels:
                    outputs = channels if kernel == 1 else spec.c
                    found.append(conv_stats.case(narrow, outputs, kernel, dtype, scope.device))
    return found
