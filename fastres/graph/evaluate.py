"""Plain evaluation of nodes: PyTorch's own calls through the user's modules, differentiable, in any mode.

It is the path for gradients, for training, for what no kernel takes, and the baseline of `verify`.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fastres.activation import IDENTITY
from fastres.graph import known
from fastres.graph.ir import Conv, GlobalAvgPool, Graph, Linear, MaxPool, Node, Normalize, Opaque, map_refs


def evaluate_node(node: Node, values: Any) -> Any:
    """The node's result from `values[v]` of every value v that it reads."""
    return _EVALUATE[type(node)](node, values)


def cast_node(node: Node, dtype: torch.dtype) -> Node:
    """The node with parameters and buffers in `dtype`: itself where they are so already."""
    names = ("conv", "bn", "linear") if not isinstance(node, Opaque) else ("call",)
    changed = {}
    for name in names:
        module = getattr(node, name, None)
        if isinstance(module, nn.Module) and any(
            t.is_floating_point() and t.dtype != dtype for t in (*module.parameters(), *module.buffers())
        ):
            changed[name] = (
                _Cast(module, dtype) if isinstance(node, Opaque) else copy.deepcopy(module).to(dtype)
            )
    return replace(node, **changed) if changed else node


class _Cast(nn.Module):
    """Calls a module with its parameters and buffers in another type; its hooks fire."""

    def __init__(self, module: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.module, self.dtype = module, dtype

    def forward(self, *args, **kwargs):
        tensors = dict(chain(self.module.named_parameters(), self.module.named_buffers()))
        cast = {name: t.to(self.dtype) for name, t in tensors.items() if t.is_floating_point()}
        return torch.func.functional_call(self.module, cast, args, kwargs)


def _conv(node: Conv, values: Any) -> Tensor:
    from fastres.nn.functional import conv_bn_act

    x, residual = values[node.x], None if node.residual is None else values[node.residual]
    if node.bn is not None and known.batch_norm_act(node.bn) is not None:
        # the layer applies its activation itself
        return node.bn(node.conv(x))
    if residual is None or residual.shape == _conv_shape(node, x):
        return conv_bn_act(x, node.conv, node.bn, residual, node.act)
    return node.act(conv_bn_act(x, node.conv, node.bn, None, IDENTITY) + residual)


def _conv_shape(node: Conv, x: Tensor) -> tuple[int, ...]:
    conv, padding = node.conv, known.conv_padding(node.conv)
    sizes = tuple(
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, p, d, k, s in zip(
            x.shape[-2:], padding, conv.dilation, conv.kernel_size, conv.stride, strict=True
        )
    )
    return (*x.shape[:-3], conv.out_channels, *sizes)


def _max_pool(node: MaxPool, values: Any) -> Tensor:
    return F.max_pool2d(values[node.x], node.kernel, node.stride, node.padding, node.dilation, node.ceil_mode)


def _global_avg_pool(node: GlobalAvgPool, values: Any) -> Tensor:
    x = values[node.x]
    if x.dim() != 4:
        return x.mean(node.dims, keepdim=not node.flat)
    pooled = F.adaptive_avg_pool2d(x, 1)
    return pooled.flatten(1) if node.flat else pooled


def _linear(node: Linear, values: Any) -> Tensor:
    return node.linear(values[node.x])


def _normalize(node: Normalize, values: Any) -> Tensor:
    return normalize(values[node.x], node.mean, node.std, torch.get_default_dtype())


def _opaque(node: Opaque, values: Any) -> Any:
    args, kwargs = map_refs(lambda ref: values[ref.value], (node.args, node.kwargs))
    if not node.row_major:
        try:
            return node.call(*args, **kwargs)
        except (RuntimeError, ValueError) as error:
            if not any(text in str(error) for text in _VIEW_ERRORS):
                raise
        # written for contiguous tensors: it fails in channels_last, in PyTorch too
        node.row_major = True
    args, kwargs = tree_map(_row_major, (args, kwargs))
    return node.call(*args, **kwargs)


# of real tensors, and of tensors without storage
_VIEW_ERRORS = ("view size is not compatible", "Cannot view a tensor")


def _row_major(value: Any) -> Any:
    return value.contiguous() if isinstance(value, Tensor) else value


_EVALUATE = {
    Conv: _conv,
    MaxPool: _max_pool,
    GlobalAvgPool: _global_avg_pool,
    Linear: _linear,
    Normalize: _normalize,
    Opaque: _opaque,
}


def evaluate(graph: Graph, inputs: tuple, dtype: torch.dtype | None = None) -> Any:
    """The graph's result, node by node; values are dropped after their last reader. `dtype`: of normalised images."""
    values: dict[int, Any] = dict(zip(graph.inputs, inputs, strict=True))
    for node, dead in zip(graph.nodes, last_readers(graph), strict=True):
        if isinstance(node, Normalize) and dtype is not None:
            values[node.output] = normalize(values[node.x], node.mean, node.std, dtype)
        else:
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
    mean_t, std_t = (_per_channel(values, wide, x.device) for values in (mean, std))
    return ((x.to(wide) / 255 - mean_t) / std_t).to(dtype)


def _per_channel(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """[1, C, 1, 1]. On a GPU it is filled: a copy from the host cannot be part of a CUDA graph."""
    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device).view(1, -1, 1, 1)
    return torch.cat([torch.full((1, 1, 1, 1), value, dtype=dtype, device=device) for value in values], 1)
