"""The layers of networks, each convolution with what is fused behind it, from the graph that is captured."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastres.bench.models import load_model
from fastres.graph.capture import capture
from fastres.graph.ir import Conv, GlobalAvgPool, Linear, MaxPool
from fastres.plan.problem import ConvSpec, LinearSpec, PoolSpec, Problem, Spec

NETWORKS = ("resnet18", "resnet50", "resnet101", "resnext50_32x4d", "wide_resnet50_2")


@dataclass(frozen=True)
class Layer:
    """One node of a network: its qualified name, its shapes, how many nodes are equal to it."""

    name: str
    pattern: str
    role: str
    spec: Spec
    count: int = 1

    def problem(self, batch: int, dtype: torch.dtype) -> Problem:
        spec = replace(self.spec, n=batch)
        inputs = [f"{self.role}.x"]
        if isinstance(spec, ConvSpec) and spec.residual:
            inputs.append(f"{self.role}.residual")
        return Problem(self.pattern, ((self.role, spec),), dtype, tuple(inputs), (self.role,))


@lru_cache(maxsize=64)
def layers(network: str, size: int = 224) -> tuple[Layer, ...]:
    """Every convolution, pooling and linear layer of `network` for images of `size`, in execution order."""
    model = load_model(network)
    shapes = _input_shapes(model, size)
    found = []
    for node in capture(model).nodes:
        match node:
            case Conv():
                spec: Spec = _conv_spec(node, shapes[node.conv])
                found.append(Layer(node.name, "conv_bn_act", "conv", spec))
            case MaxPool():
                last = found[-1].spec
                spec = PoolSpec(
                    1, last.k, last.p, last.q, node.kernel, node.stride, node.padding, node.dilation
                )
                found.append(Layer(node.name, "max_pool", "pool", spec))
            case GlobalAvgPool():
                last = found[-1].spec
                spec = PoolSpec(1, last.k, last.p, last.q, flat=node.flat)
                found.append(Layer(node.name, "global_avg_pool", "pool", spec))
            case Linear():
                spec = LinearSpec(1, node.linear.in_features, node.linear.out_features)
                found.append(Layer(node.name, "linear", "linear", spec))
    return tuple(found)


def distinct_convs(networks: Iterable[str], size: int = 224) -> list[tuple[str, Layer]]:
    """(network, layer) of every distinct convolution, in order; the first network that has it owns it, and
    `count` is how often that network has it."""
    seen: dict[Spec, tuple[str, Layer]] = {}
    for network in networks:
        convs = [layer for layer in layers(network, size) if isinstance(layer.spec, ConvSpec)]
        counts: dict[Spec, int] = {}
        for layer in convs:
            counts[layer.spec] = counts.get(layer.spec, 0) + 1
        for layer in convs:
            if layer.spec not in seen:
                seen[layer.spec] = (network, replace(layer, count=counts[layer.spec]))
    return list(seen.values())


def parts(network: str, batch: int, dtype: torch.dtype, size: int = 224) -> list[tuple[int, int]]:
    """(bytes, flops) of every layer of `network` when each runs as one kernel."""
    problems = [layer.problem(batch, dtype) for layer in layers(network, size)]
    return [(problem.bytes, problem.flops) for problem in problems]


def module_parts(module: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> list[tuple[int, int]]:
    """(bytes, flops) of every convolution of a module without pooling, from an input shape."""
    shapes = _input_shapes(module, shape=shape)
    found = []
    for node in capture(module).nodes:
        if isinstance(node, Conv):
            layer = Layer(node.name, "conv_bn_act", "conv", _conv_spec(node, shapes[node.conv]))
            problem = layer.problem(shape[0], dtype)
            found.append((problem.bytes, problem.flops))
    return found


def _conv_spec(node: Conv, shape: tuple[int, ...]) -> ConvSpec:
    conv = node.conv
    return ConvSpec(
        *shape,
        k=conv.out_channels,
        kernel=conv.kernel_size,
        stride=conv.stride,
        padding=conv.padding,
        dilation=conv.dilation,
        groups=conv.groups,
        act=node.act,
        residual=node.residual is not None,
        affine=node.bn is not None,
    )


def _input_shapes(
    model: nn.Module, size: int = 224, shape: tuple[int, ...] | None = None
) -> dict[nn.Module, tuple[int, ...]]:
    shapes: dict[nn.Module, tuple[int, ...]] = {}
    hooks = [
        module.register_forward_pre_hook(lambda m, args: shapes.__setitem__(m, tuple(args[0].shape)))
        for module in model.modules()
        if isinstance(module, nn.Conv2d)
    ]
    where = next(model.parameters()).device
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            model(torch.empty(shape or (1, 3, size, size), device=where))
    finally:
        for hook in hooks:
            hook.remove()
    return shapes
