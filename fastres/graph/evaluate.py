"""Plain evaluation of nodes: PyTorch's own calls through the user's modules, differentiable, in any mode.

It is the path for gradients, for training, for what no kernel takes, and the baseline of `verify`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastres.graph.ir import Conv, GlobalAvgPool, Graph, Linear, MaxPool, Node, Normalize, Opaque, map_refs


def evaluate_node(node: Node, values: Any) -> Any:
    """The node's result from `values[v]` of every value v that it reads."""
    return _EVALUATE[type(node)](node, values)


def _conv(node: Conv, values: Any) -> Tensor:
    from fastres.nn.functional import conv_bn_act

    residual = None if node.residual is None else values[node.residual]
    return conv_bn_act(values[node.x], node.conv, node.bn, residual, node.act)


def _max_pool(node: MaxPool, values: Any) -> Tensor:
    return F.max_pool2d(values[node.x], node.kernel, node.stride, node.padding, node.dilation, node.ceil_mode)


def _global_avg_pool(node: GlobalAvgPool, values: Any) -> Tensor:
    pooled = F.adaptive_avg_pool2d(values[node.x], 1)
    return pooled.flatten(1) if node.flat else pooled


def _linear(node: Linear, values: Any) -> Tensor:
    return node.linear(values[node.x])


def _normalize(node: Normalize, values: Any) -> Tensor:
    return normalize(values[node.x], node.mean, node.std, torch.get_default_dtype())


def _opaque(node: Opaque, values: Any) -> Any:
    args, kwargs = map_refs(lambda ref: values[ref.value], (node.args, node.kwargs))
    return node.call(*args, **kwargs)


_EVALUATE = {
    Conv: _conv,
    MaxPool: _max_pool,
    GlobalAvgPool: _global_avg_pool,
    Linear: _linear,
    Normalize: _normalize,
    Opaque: _opaque,
}


def evaluate(graph: Graph, inputs: tuple) -> Any:
    """The graph's result, node by node; values are dropped after their last reader."""
    values: dict[int, Any] = dict(zip(graph.inputs, inputs, strict=True))
    for node, dead in zip(graph.nodes, last_readers(graph), strict=True):
        values[node.output] = evaluate_node(node, values)
        for value in dead:
            values.pop(value, None)
    return map_refs(lambda ref: values[ref.value], graph.outputs)


def last_readers(graph: Graph) -> list[tuple[int, ...]]:
    """For each node, the values that nobody reads after it."""
    kept = set(graph.output_values)
    seen: set[int] = set()
    dead: list[tuple[int, ...]] = []
    for node in reversed(graph.nodes):
        now = {value for value in (*node.inputs, node.output) if value not in kept and value not in seen}
        seen |= now
        dead.append(tuple(now))
    return dead[::-1]


def normalize(x: Tensor, mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    """(x / 255 - mean) / std of uint8 images [N, C, H, W]."""
    wide = torch.promote_types(dtype, torch.float32)
    shape = (1, -1, 1, 1)
    mean_t = torch.tensor(mean, dtype=wide, device=x.device).view(shape)
    std_t = torch.tensor(std, dtype=wide, device=x.device).view(shape)
    return ((x.to(wide) / 255 - mean_t) / std_t).to(dtype)
