"""Every pattern in PyTorch's own arithmetic, layer by layer, with folded weights: what any device can run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastres.activation import Activation
from fastres.graph.evaluate import normalize
from fastres.graph.fold import LayerParameters
from fastres.plan.candidate import Candidate, register
from fastres.plan.pattern import PATTERNS, Pattern
from fastres.plan.problem import ConvSpec, LinearSpec, NormalizeSpec, PoolSpec, Problem, Spec, Target

_ACT_IN_PLACE = {"relu": torch.relu_, "relu6": lambda x: F.hardtanh_(x, 0.0, 6.0)}


@dataclass(frozen=True)
class Wire:
    """Where a layer of a problem reads: `x` and `residual` are input names ("conv.x") or roles."""

    role: str
    spec: Spec
    x: str
    residual: str | None


def wires(pattern: Pattern, problem: Problem) -> list[Wire]:
    """The layers of a problem with what they read, in execution order."""
    made = []
    for role, spec in problem.layers:
        slot = next(slot for slot in pattern.slots if slot.role == role)
        x = f"{role}.x" if f"{role}.x" in problem.inputs else slot.x
        residual = None
        if isinstance(spec, ConvSpec) and spec.residual:
            inside = [r for r in slot.residual if problem.get(r) is not None]
            residual = f"{role}.residual" if f"{role}.residual" in problem.inputs else inside[0]
        made.append(Wire(role, spec, x, residual))
    return made


def layer(spec: Spec, x: Tensor, residual: Tensor | None, constants: tuple, dtype: torch.dtype) -> Tensor:
    """One layer. `constants`: (weight, bias) folded, (weight, bias) of a linear, or (mean, std)."""
    match spec:
        case ConvSpec():
            y = F.conv2d(x, *constants, spec.stride, spec.padding, spec.dilation, spec.groups)
            if residual is not None:
                y += residual
            return activate_(y, spec.act)
        case PoolSpec(kernel=None):
            y = F.adaptive_avg_pool2d(x, 1)
            return y.flatten(1) if spec.flat else y
        case PoolSpec():
            return F.max_pool2d(
                x, spec.kernel, spec.stride, spec.padding, spec.dilation, ceil_mode=spec.ceil_mode
            )
        case LinearSpec():
            return F.linear(x, *constants)
        case NormalizeSpec():
            return normalize(x, constants[0].tolist(), constants[1].tolist(), dtype)
    raise TypeError(f"unknown layer {type(spec).__name__}")


def activate_(y: Tensor, act: Activation) -> Tensor:
    """act(y), written over y where PyTorch can."""
    if act.kind == "leaky_relu":
        return F.leaky_relu_(y, act.param)
    in_place = _ACT_IN_PLACE.get(act.kind)
    return act(y) if in_place is None else in_place(y)


def folded_constants(spec: Spec, parameters: LayerParameters, dtype: torch.dtype) -> tuple:
    """A layer's constants in `dtype`, weights in channels_last strides."""
    match spec:
        case ConvSpec():
            weight, shift = parameters.folded()
            weight = weight.to(dtype).contiguous(memory_format=torch.channels_last)
            return weight, shift.to(dtype)
        case LinearSpec():
            bias = None if parameters.bias is None else parameters.bias.to(dtype)
            return parameters.weight.to(dtype), bias
        case NormalizeSpec():
            return parameters.mean, parameters.std
    return ()


class Reference(Candidate):
    backend = "reference"
    source = "torch.nn.functional"
    allocates = True
    efficiency = 1 / 3

    def __init__(self, pattern: Pattern):
        self.pattern = pattern
        self.name = f"reference.{pattern.name}"

    def accepts(self, problem: Problem, target: Target) -> str | None:
        return None

    def estimate_ms(self, problem: Problem, target: Target) -> float:
        # every layer on its own, with further passes for residual and activation: about three times its least traffic
        alone = [
            Problem(problem.pattern, ((role, spec),), problem.dtype, (f"{role}.x",), (role,))
            for role, spec in problem.layers
        ]
        return sum(super(Reference, self).estimate_ms(layer, target) + 0.02 for layer in alone)

    def prepare(self, problem: Problem, config, parameters: Mapping[str, LayerParameters]):
        return {
            role: folded_constants(spec, parameters[role], problem.dtype) for role, spec in problem.layers
        }

    def bind(self, problem: Problem, config, buffers, constants):
        plan = wires(self.pattern, problem)
        names, outputs, dtype = problem.inputs, problem.outputs, problem.dtype

        def launch(*inputs: Tensor):
            values = dict(zip(names, inputs, strict=True))
            for wire in plan:
                residual = None if wire.residual is None else values[wire.residual]
                values[wire.role] = layer(wire.spec, values[wire.x], residual, constants[wire.role], dtype)
            return values[outputs[0]] if len(outputs) == 1 else tuple(values[role] for role in outputs)

        return launch


for _pattern in PATTERNS:
    register(Reference(_pattern))
