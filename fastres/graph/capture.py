"""Capture: a module becomes a `Graph`, by torch.fx and an explicit list of exact types.

What fx cannot trace is called as it is: first the submodules that refuse to be traced become leaves; if the root itself
refuses, `capture` raises `CaptureError` and the caller captures the submodules one by one (accelerate.py).
"""

from __future__ import annotations

import inspect
from typing import Any

import torch.fx
from torch import nn

from fastres.graph import known
from fastres.graph.fuse import fuse
from fastres.graph.ir import Graph, Node, Normalize
from fastres.graph.primitive import translate


class CaptureError(RuntimeError):
    """The module cannot be traced; the message says why."""


class _Tracer(torch.fx.Tracer):
    """Keeps every layer with parameters of its own, every hooked module and every refusing module as one call."""

    def __init__(self, opaque: frozenset[nn.Module]):
        super().__init__(autowrap_functions=())
        self.opaque = opaque

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if m in self.opaque or known.has_hooks(m) or known.is_layer(m):
            return True
        return super().is_leaf_module(m, module_qualified_name)

    def create_arg(self, a: Any):
        # fx would turn an OrderedDict (or any other mapping of a type of its own) into a dict
        if isinstance(a, dict) and type(a) is not dict and type(a).__name__ != "immutable_dict":
            pairs = [(key, value) for key, value in a.items()]
            return self.create_arg(self.create_proxy("call_function", type(a), (pairs,), {}))
        if isinstance(a, nn.Module) or type(a).__module__.startswith("fastres."):
            return a
        return super().create_arg(a)

    def create_args_for_root(self, root_fn, is_module, concrete_args=None):
        # arguments with a default keep it (a proxy in its place would take the branch of `if mask is not None`)
        args: list[Any] = [self.root]
        parameters = list(inspect.signature(root_fn).parameters.values())[1:]
        for parameter in parameters:
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.KEYWORD_ONLY):
                if parameter.kind is parameter.KEYWORD_ONLY and parameter.default is parameter.empty:
                    raise TypeError(f"its forward needs the keyword argument {parameter.name!r}")
            elif parameter.default is parameter.empty:
                args.append(self.create_proxy("placeholder", parameter.name, (), {}))
            else:
                args.append(parameter.default)
        return root_fn, args


def capture(module: nn.Module, normalize: tuple[tuple[float, ...], tuple[float, ...]] | None = None) -> Graph:
    """The graph of `module` in the mode (train or eval) that it is in.

    Args:
        module: any module. Its forward is traced with one placeholder for each argument without a default; arguments
            with defaults keep them.
        normalize: (mean, std) of uint8 images, one entry a channel: puts a `Normalize` node before the first input.

    Returns:
        A `Graph` in which conv → BN → (+ residual) → activation chains are single `Conv` nodes.

    Raises:
        CaptureError: where fx cannot trace the module itself, with fx's reason.
    """
    opaque: dict[nn.Module, str] = {}
    while True:
        try:
            traced, root = _trace(module, frozenset(opaque))
            break
        except Exception as error:  # fx raises whatever the module's own code raises on a proxy
            culprit = _refusing_child(module, opaque)
            if culprit is None:
                raise CaptureError(f"{type(module).__name__}: {_short(error)}") from error
            opaque[culprit[0]] = culprit[1]
    nodes, inputs, outputs = translate(traced, root)
    notes = [f"{name}: called as it is: {_short(why)}" for name, why in _named(module, opaque)]
    nodes = fuse(nodes, outputs, training=module.training)
    if normalize is not None and inputs:
        nodes = _normalized(nodes, inputs[0], normalize)
    return Graph(nodes, inputs, outputs, notes)


def _trace(module: nn.Module, opaque: frozenset[nn.Module]) -> tuple[torch.fx.Graph, nn.Module]:
    root = nn.Sequential(module) if known.is_layer(module) or known.has_hooks(module) else module
    root.training = module.training
    # a forward may keep what it computed on `self`: a trace must leave no proxies there
    before = [(m, dict(m.__dict__)) for m in root.modules()]
    try:
        return _Tracer(opaque).trace(root), root
    finally:
        for m, state in before:
            if m.__dict__.keys() != state.keys() or any(m.__dict__[key] is not state[key] for key in state):
                m.__dict__.clear()
                m.__dict__.update(state)


def _refusing_child(module: nn.Module, opaque: dict[nn.Module, str]) -> tuple[nn.Module, str] | None:
    """The first submodule, outermost first, that cannot be traced though all of its own children can."""
    for child in module.children():
        if child in opaque or known.is_layer(child) or not list(child.children()) and not known.traces(child):
            continue
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            found = _refusing_child(child, opaque)
            if found is not None:
                return found
            continue
        try:
            _trace(child, frozenset(opaque))
        except Exception as error:  # see capture
            return _refusing_child(child, opaque) or (child, _short(error))
    return None


def _named(module: nn.Module, opaque: dict[nn.Module, str]):
    names = {child: name for name, child in module.named_modules()}
    for child, why in opaque.items():
        yield names.get(child, type(child).__name__), why


def _normalized(nodes: list[Node], value: int, normalize) -> list[Node]:
    mean, std = (tuple(float(v) for v in part) for part in normalize)
    fresh = 1 + max([value, *(node.output for node in nodes)])
    node = Normalize(name="normalize", output=fresh, x=value, mean=mean, std=std)
    return [node, *(other.renamed({value: fresh}) for other in nodes)]


def _short(error: object) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else text[:197] + "..."
