"""verify(model, x): how far from fp64 a plan is, and at which layer the error arises."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastres.bench.verify import flatten
from fastres.calls import unplanned
from fastres.engine import Engine, Key
from fastres.graph.evaluate import evaluate_node
from fastres.graph.ir import Node
from fastres.plan.context import Context

# An error counts as PyTorch's own up to this factor (the design's bound for whole networks)
_ALLOWED = 1.5


@dataclass(frozen=True)
class LayerError:
    """Of one step, on the inputs that it really had: the worst image's ||out - ref|| / ||ref|| of what arises here,
    for the plan and for PyTorch in the same type and layout, both against fp64."""

    layers: tuple[str, ...]
    candidate: str
    error: float
    torch_error: float


@dataclass(frozen=True)
class Verification:
    """Attributes:
    error: the worst image's relative error of the accelerated model against the original in fp64.
    torch_error: the same of the original in the compute type, run by PyTorch.
    layers: the errors that arise step by step, in order.
    """

    error: float
    torch_error: float
    layers: tuple[LayerError, ...]

    @property
    def ok(self) -> bool:
        """At most 1.5 times PyTorch's own error (where that is not 0)."""
        return self.error <= _ALLOWED * self.torch_error or (self.torch_error == 0 and self.error < 1e-6)

    def __str__(self) -> str:
        worst = sorted(self.layers, key=lambda one: -one.error)[:8]
        lines = [
            f"error against fp64: {self.error:.2e}, PyTorch's own in the same type: {self.torch_error:.2e}"
            f" ({'ok' if self.ok else 'TOO LARGE'})",
            "where it arises most (relative error of each step on the inputs it had):",
        ]
        lines += [
            f"  {' + '.join(one.layers):45s} {one.candidate:26s} {one.error:.1e} (PyTorch {one.torch_error:.1e})"
            for one in worst
        ]
        return "\n".join(lines)


@torch.no_grad()
def verify(model: nn.Module, x: Tensor, *more: Tensor) -> Verification:
    """Compares a model that fastres runs with the original in fp64, as a whole and step by step.

    Args:
        model: the result of `fastres.accelerate`, or a fastres network or block; in eval mode.
        x, more: inputs as the model takes them.

    Returns:
        A `Verification`; printed, it says how large the error is, whether it is PyTorch's own, and where it arises.

    Raises:
        TypeError: the model is none that fastres runs.
        ValueError: the model is in training mode.
    """
    state = getattr(model, "_fastres", None)
    engine = state.engine if state is not None else getattr(model, "_engine", None)
    if not isinstance(engine, Engine):
        raise TypeError(
            f"model: got {type(model).__name__}, takes the result of fastres.accelerate or a fastres network"
        )
    if model.training:
        raise ValueError("model: is in training mode, takes one in eval mode")
    original = state.original if state is not None else model
    inputs = (x, *more)
    got = flatten(model(*inputs))
    wide_inputs, narrow_inputs, dtype = _inputs(engine, original, inputs)
    wide = flatten(_plain(copy.deepcopy(original).double(), wide_inputs))
    # in the layout that the plan computes in: PyTorch's convolutions round differently in NCHW
    narrow_model = copy.deepcopy(original).to(dtype).to(memory_format=torch.channels_last)
    narrow = flatten(_plain(narrow_model, tuple(map(_channels_last, narrow_inputs))))
    layers = () if state is not None and state.parts is not None else tuple(_layers(engine, original, inputs))
    return Verification(_worst(got, wide), _worst(narrow, wide), layers)


def _inputs(engine: Engine, original: nn.Module, inputs: tuple[Tensor, ...]):
    from fastres.graph.evaluate import normalize

    dtype = engine.compute_dtype(original, inputs[0].device)
    rounded = [t.to(dtype) if t.is_floating_point() else t for t in inputs]
    if engine.options.normalize is not None:
        wide = [normalize(inputs[0], *engine.options.normalize, torch.float64), *rounded[1:]]
        return tuple(wide), (wide[0].to(dtype), *rounded[1:]), dtype
    return tuple(t.double() if t.is_floating_point() else t for t in rounded), tuple(rounded), dtype


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def _plain(original: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    """The module's own forward, planning nothing."""
    with unplanned():
        return original(*inputs)


def _layers(engine: Engine, original: nn.Module, inputs: tuple[Tensor, ...]):
    plan = engine.plan_for(original, inputs)
    key: Key = engine.key(original, inputs)
    context = Context(plan, engine.prepared.constants, key.device, static_inputs=False)
    with torch.inference_mode(False), torch.autocast(key.device.type, enabled=False):
        held: dict[int, Any] = dict(zip(plan.graph.inputs, inputs, strict=True))
        for segment in context.observe(inputs):
            if segment is None:
                continue
            outputs = [node.output for node in segment.nodes]
            before = {v: held[v] for node in segment.nodes for v in node.inputs if v not in outputs}
            for value in outputs:
                # a later step may write over what this one wrote
                made = context.values[value]
                held[value] = made.clone() if isinstance(made, Tensor) else made
            if segment.candidate is None or not isinstance(held[outputs[-1]], Tensor):
                continue
            shown = {role: value for role, value in segment.match.outputs}
            wide = _evaluate(segment.nodes, before, torch.float64)
            narrow = _evaluate(segment.nodes, before, plan.dtype)
            values = list(shown.values())
            yield LayerError(
                tuple(node.name for node in segment.nodes),
                segment.candidate.name,
                _worst([held[v] for v in values], [wide[v] for v in values]),
                _worst([narrow[v] for v in values], [wide[v] for v in values]),
            )


def _evaluate(nodes: tuple[Node, ...], before: dict[int, Any], dtype: torch.dtype) -> dict[int, Any]:
    values = {
        v: t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t for v, t in before.items()
    }
    for node in nodes:
        cast = copy.copy(node)
        for name in ("conv", "bn", "linear"):
            if getattr(node, name, None) is not None:
                setattr(cast, name, copy.deepcopy(getattr(node, name)).to(dtype))
        values[node.output] = evaluate_node(cast, values)
        if isinstance(values[node.output], Tensor):
            values[node.output] = values[node.output].to(dtype)
    return values


def _worst(outs: list[Tensor], refs: list[Tensor]) -> float:
    """The worst image's relative norm of the difference."""
    worst = 0.0
    for out, ref in zip(outs, refs, strict=True):
        if not ref.numel() or not ref.dim():
            continue
        difference = (out.double() - ref.double()).flatten(1).norm(dim=1)
        scale = ref.double().flatten(1).norm(dim=1)
        ratio = torch.where(difference == 0, torch.zeros_like(scale), difference / scale)
        worst = max(worst, ratio.max().item())
    return worst
