"""Host overhead: the time until a call returns, on problems so small that nothing else counts."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.case import Case
from benchmarks.levels import model
from benchmarks.ops import add_relu, bn_act, conv_bn_act
from benchmarks.scope import Scope
from benchmarks.shapes import Layer
from fastres.activation import RELU
from fastres.plan.problem import ConvSpec


def cases(scope: Scope) -> list[Case]:
    shape = (1, 16, 4, 4)
    spec = ConvSpec(1, 16, 4, 4, 16, (1, 1), act=RELU, residual=True)
    layer = Layer("conv_bn_act", "conv_bn_act", "conv", spec)
    found = []
    for dtype in scope.dtypes[:1]:
        settings = {"level": "host", "clock": "host"}
        found += [
            add_relu.case(shape, dtype, scope.device, **settings),
            bn_act.case(shape, dtype, scope.device, backward=False, **settings),
            bn_act.case(shape, dtype, scope.device, backward=True, **settings),
            conv_bn_act.case(layer, 1, dtype, scope.device, **settings),
        ]
        for network in scope.pick(smoke=(), quick=("resnet18",), full=("resnet18", "resnet50")):
            found.append(replace(model.case(network, 1, 32, dtype, scope.device), **settings))
    return found
