"""Layers: every distinct convolution of the networks, each with its BN, residual and activation."""

from __future__ import annotations

from benchmarks.case import Case
from benchmarks.ops import conv_bn_act
from benchmarks.scope import Scope
from benchmarks.shapes import NETWORKS, distinct_convs


def cases(scope: Scope) -> list[Case]:
    networks = scope.networks or scope.pick(smoke=NETWORKS[:1], quick=NETWORKS[1:2], full=NETWORKS)
    batches = scope.batches or scope.pick(
        smoke=(1,), quick=(8,), cuda_quick=(256,), full=(1, 8), cuda_full=(1, 8, 32, 128, 256)
    )
    layers = distinct_convs(networks, scope.image)
    if scope.size == "smoke":
        layers = layers[:3]
    return [
        conv_bn_act.case(layer, batch, dtype, scope.device, model=network)
        for dtype in scope.part_dtypes
        for batch in batches
        for network, layer in layers
    ]
