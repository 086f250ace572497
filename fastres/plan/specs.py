"""Shapes of every value of a graph for given inputs, and from them the problem of every match."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from fastres.graph import known
from fastres.graph.evaluate import cast_node, evaluate_node
from fastres.graph.ir import Conv, GlobalAvgPool, Graph, Linear, MaxPool, Node, Normalize, Opaque
from fastres.plan.pattern import Match
from fastres.plan.problem import ConvSpec, LinearSpec, NormalizeSpec, PoolSpec, Problem, Spec


@dataclass(frozen=True)
class Info:
    """What is known of a tensor before anything runs."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


@dataclass
class Shapes:
    """values[v]: an `Info` (or a nesting of them, for an opaque call's result); specs[i]: node i's spec, or None;
    reasons[i]: why node i has none. `autocast`: what no kernel takes runs under autocast."""

    values: dict[int, Any]
    specs: list[Spec | None]
    reasons: list[str]
    autocast: bool = False


class ShapeError(ValueError):
    """An input that the network cannot take; raised before anything runs."""


class Unplannable(RuntimeError):
    """Shapes are not known before the network runs; the message says where and why."""


def propagate(graph: Graph, inputs: tuple[Any, ...], dtype: torch.dtype, autocast: bool = False) -> Shapes:
    """Shapes for `inputs` (tensors or `Info`s) with activations in `dtype`. Only opaque calls are run, on fake tensors.

    Args:
        autocast: opaque calls run under autocast to `dtype`; else their parameters are cast to it.

    Raises:
        ShapeError: a layer gets an input that it cannot take; the message names the layer, what came and what it takes.
        Unplannable: an opaque call cannot run on fake tensors: its shapes depend on data, or it fails.
    """
    values: dict[int, Any] = {}
    for value, x in zip(graph.inputs, inputs, strict=True):
        values[value] = Info(tuple(x.shape), x.dtype, x.device) if isinstance(x, torch.Tensor) else x
    specs: list[Spec | None] = []
    reasons: list[str] = []
    fake = None
    for node in graph.nodes:
        spec, reason = (
            (None, node.reason or "not a layer that is known")
            if isinstance(node, Opaque)
            else _spec(node, values)
        )
        if spec is not None:
            x = values[node.inputs[0]]
            values[node.output] = Info(spec.y_shape, dtype, x.device)
        else:
            fake = fake or _FakeRunner(dtype, autocast)
            values[node.output] = fake.run(node, values)
        specs.append(spec)
        reasons.append(reason)
    return Shapes(values, specs, reasons, autocast)


def problem_of(match: Match, shapes: Shapes, dtype: torch.dtype, flags: tuple[str, ...]) -> Problem | None:
    """The problem of a match, or None where one of its nodes has no spec."""
    specs = shapes.specs[match.start : match.stop]
    if any(spec is None for spec in specs):
        return None
    layers = tuple((role, spec) for (role, _), spec in zip(match.nodes, specs, strict=True))
    names = tuple(name for name, _ in match.inputs)
    # TF32 is a way to multiply fp32, and every kernel is deterministic: what was tuned is found whatever else PyTorch
    # allows or forbids.
    flags = tuple(flag for flag in flags if flag == "tf32" and dtype == torch.float32)
    return Problem(match.pattern.name, layers, dtype, names, tuple(role for role, _ in match.outputs), flags)


def _spec(node: Node, values: dict[int, Any]) -> tuple[Spec | None, str]:
    x = values[node.inputs[0]]
    if not isinstance(x, Info):
        return None, "its input is no tensor"
    shape = x.shape
    match node:
        case Linear():
            weight = node.linear.weight
            if shape[-1] != weight.shape[1]:
                raise ShapeError(
                    f"{node.name}: input has {shape[-1]} features, the layer takes {weight.shape[1]}"
                )
            if len(shape) != 2:
                return None, f"its input has {len(shape)} dimensions, kernels take 2"
            return LinearSpec(shape[0], shape[1], weight.shape[0], node.linear.bias is not None), ""
        case _ if len(shape) != 4:
            if isinstance(node, Conv) and len(shape) != 3:
                raise ShapeError(f"{node.name}: input has shape {shape}, the layer takes [N, C, H, W]")
            return None, f"its input has {len(shape)} dimensions, kernels take 4"
        case Conv():
            return _conv_spec(node, shape, values)
        case MaxPool():
            spec = PoolSpec(*shape, node.kernel, node.stride, node.padding, node.dilation, node.ceil_mode)
            if min(spec.p, spec.q) < 1:
                raise ShapeError(
                    f"{node.name}: input {shape[2]}x{shape[3]} is too small: the output would be empty"
                )
            return spec, ""
        case GlobalAvgPool():
            return PoolSpec(*shape, flat=node.flat), ""
        case Normalize():
            if shape[1] != len(node.mean):
                raise ShapeError(
                    f"normalize: the images have {shape[1]} channels, mean and std have {len(node.mean)}"
                )
            return NormalizeSpec(*shape), ""
    return None, "not a layer that is known"


def _conv_spec(node: Conv, shape: tuple[int, ...], values: dict[int, Any]) -> tuple[Spec | None, str]:
    conv = node.conv
    if shape[1] != conv.in_channels:
        raise ShapeError(
            f"{node.name}: input has {shape[1]} channels (shape {shape}), the layer takes {conv.in_channels}"
        )
    spec = ConvSpec(
        *shape,
        conv.out_channels,
        tuple(conv.kernel_size),
        tuple(conv.stride),
        known.conv_padding(conv),
        tuple(conv.dilation),
        conv.groups,
        node.act,
        node.residual is not None,
        node.bn is not None,
        conv.bias is not None or node.bn is not None,
    )
    if min(spec.p, spec.q) < 1:
        raise ShapeError(f"{node.name}: input {shape[2]}x{shape[3]} is too small: the output would be empty")
    if node.residual is not None:
        residual = values[node.residual]
        if not isinstance(residual, Info) or residual.shape != spec.y_shape:
            return (
                None,
                f"it adds a value of another shape ({getattr(residual, 'shape', '?')}, not {spec.y_shape})",
            )
    return spec, ""


class _FakeRunner:
    """Runs nodes on tensors without storage, without hooks, and without touching the user's modules."""

    def __init__(self, dtype: torch.dtype, autocast: bool):
        from torch._subclasses.fake_tensor import FakeTensorMode

        self.dtype, self.autocast = dtype, autocast
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)

    def run(self, node: Node, values: dict[int, Any]) -> Any:
        reads = {v: tree_map(self._fake, values[v]) for v in node.inputs}
        device = next((t.device.type for t in reads.values() if isinstance(t, torch.Tensor)), "cpu")
        apart = node if self.autocast else cast_node(node, self.dtype)
        if isinstance(apart, Opaque) and isinstance(apart.call, nn.Module):
            apart = replace(apart, call=self._shell(apart.call, {}))
        try:
            with self.mode, torch.no_grad(), autocast(device, self.dtype, self.autocast):
                made = evaluate_node(apart, reads)
        except Exception as error:  # whatever the user's code raises on tensors without values
            raise Unplannable(f"{node.name}: {type(error).__name__}: {error}") from error
        if isinstance(node, Opaque):
            node.row_major = apart.row_major
        return tree_map(_info, made)

    def _fake(self, value: Any) -> Any:
        if not isinstance(value, Info):
            return value
        with self.mode:
            made = torch.empty(value.shape, dtype=value.dtype, device=value.device)
            return made.contiguous(memory_format=torch.channels_last) if made.dim() == 4 else made

    def _shell(self, module: nn.Module, made: dict[nn.Module, nn.Module]) -> nn.Module:
        """The module over fake tensors, without its hooks; what it changes on itself is not the user's."""
        if module in made:
            return made[module]
        shell = made[module] = object.__new__(type(module))
        state = {
            key: held.copy() if type(held) in (list, dict, set) else held
            for key, held in vars(module).items()
        }
        for name in ("_parameters", "_buffers"):
            state[name] = {key: t if t is None else self._empty_like(t) for key, t in state[name].items()}
        for name in state:
            if name.endswith("_hooks") and isinstance(state[name], dict):
                state[name] = OrderedDict()
        state["_modules"] = {
            name: None if child is None else self._shell(child, made)
            for name, child in module._modules.items()
        }
        object.__setattr__(shell, "__dict__", state)
        return shell

    def _empty_like(self, tensor: torch.Tensor) -> torch.Tensor:
        with self.mode:
            return torch.empty_strided(
                tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
            )


def autocast(device: str, dtype: torch.dtype, enabled: bool) -> torch.autocast:
    return torch.autocast(device, dtype if enabled else None, enabled=enabled, cache_enabled=False)


def _info(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return Info(tuple(int(size) for size in value.shape), value.dtype, value.device)
