"""Capture: a module becomes a `Graph`, by torch.fx and an explicit list of exact types.

What fx cannot trace is called as it is: first the submodules that refuse to be traced become leaves; if the root itself
refuses, `capture` raises `CaptureError` and the caller captures the submodules one by one (accelerate.py).
"""

from __future__ import annotations

import inspect
import operator
import random
import threading
from typing import Any

import torch.fx
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastres.activation import Activation
from fastres.graph import known
from fastres.graph.fuse import fuse
from fastres.graph.ir import Graph, Node, Normalize, Ref, map_refs
from fastres.graph.primitive import IN_PLACE_OPERATORS, Constant, translate


class CaptureError(RuntimeError):
    """The module cannot be traced; the message says why."""


class _Proxy(torch.fx.Proxy):
    """fx turns `x += y` into `x = x + y`, which leaves other names of the same tensor behind."""


def _in_place_operator(name: str):
    function = getattr(operator, name)

    def method(self, other):
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


for _name in IN_PLACE_OPERATORS:
    setattr(_Proxy, f"__{_name}__", _in_place_operator(_name))


class _Tracer(torch.fx.Tracer):
    """Keeps every layer with parameters of its own, every hooked module and every refusing module as one call."""

    def __init__(self, opaque: frozenset[nn.Module]):
        super().__init__(autowrap_functions=())
        self.opaque = opaque
        self.thread = threading.get_ident()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if m in self.opaque or known.has_hooks(m) or known.is_layer(m):
            return True
        return super().is_leaf_module(m, module_qualified_name)

    # fx patches nn.Module for the whole process: what other threads call meanwhile is none of this trace's business

    def call_module(self, m: nn.Module, forward, args, kwargs):
        if threading.get_ident() != self.thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache):
        if threading.get_ident() != self.thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def proxy(self, node: torch.fx.Node) -> torch.fx.Proxy:
        return _Proxy(node, self)

    def create_arg(self, a: Any):
        # fx would turn an OrderedDict (or any other mapping of a type of its own) into a dict
        if isinstance(a, dict) and type(a) is not dict and type(a).__name__ != "immutable_dict":
            pairs = [(key, value) for key, value in a.items()]
            return self.create_arg(self.create_proxy("call_function", type(a), (pairs,), {}))
        if isinstance(a, torch.Tensor) and self._is_constant(a):
            # fx would leave it on the user's module
            return self.create_arg(self.create_proxy("call_function", Constant(a), (), {}))
        if isinstance(a, (nn.Module, Activation)):
            return a
        return super().create_arg(a)

    def _is_constant(self, a: torch.Tensor) -> bool:
        """Whether the forward made this tensor itself."""
        if isinstance(a, nn.Parameter) or self.tensor_attrs.get(a):
            return False
        return all(a is not buffer for buffer in self.root.buffers())

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
    nodes, inputs, outputs = translate(traced, root, module, opaque)
    notes = [f"{name}: called as it is: {_short(why)}" for name, why in _named(module, opaque)]
    nodes = fuse(nodes, outputs, training=module.training)
    if normalize is not None and inputs:
        nodes, outputs = _normalized(nodes, outputs, inputs[0], normalize)
    return Graph(nodes, inputs, outputs, notes, tuple(opaque))


def _trace(module: nn.Module, opaque: frozenset[nn.Module]) -> tuple[torch.fx.Graph, nn.Module]:
    """fx's graph, and the module that its paths start from. Leaves nothing behind on the module."""
    root = module
    if known.is_layer(module):
        root = nn.Sequential(module)
        root.training = module.training
    before = [(m, dict(m.__dict__), _contents(m)) for m in root.modules()]
    seeds = torch.get_rng_state(), random.getstate()
    draws = _Draws()
    try:
        with draws:
            traced = _Tracer(opaque).trace(root)
        for m, state, contents in before:
            changed = _changed(m, state, contents)
            if changed:
                raise CaptureError(f"the forward of {type(m).__name__} changes its {', '.join(changed)}")
        if draws.seen or random.getstate() != seeds[1]:
            raise CaptureError("its forward draws random numbers that a trace would fix")
        return traced, root
    finally:
        for m, state, contents in before:
            if _changed(m, state, contents):
                m.__dict__.clear()
                m.__dict__.update(state)
                for name, held in contents.items():
                    _refill(state[name], held)
        if draws.seen:
            torch.set_rng_state(seeds[0])


class _Draws(TorchDispatchMode):
    """Sees whether this thread draws random numbers from PyTorch."""

    seen = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen = self.seen or torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **kwargs or {})


_CONTAINERS = (list, set, dict)


def _contents(m: nn.Module) -> dict[str, Any]:
    """What is in the lists, sets and dicts that the module keeps beside its children, parameters and hooks."""
    return {
        name: held.copy()
        for name, held in m.__dict__.items()
        if type(held) in _CONTAINERS and name[:1] != "_"
    }


def _changed(m: nn.Module, state: dict[str, Any], contents: dict[str, Any]) -> list[str]:
    """Names of the attributes that are no longer what they were."""
    now = m.__dict__
    names = [name for name in {**state, **now} if name not in now or now[name] is not state.get(name, now)]
    same = (
        len(held) == len(state[name])
        and all(a is b for a, b in zip(_items(held), _items(state[name]), strict=True))
        for name, held in contents.items()
    )
    return names + [
        name for name, is_same in zip(contents, same, strict=True) if not is_same and name not in names
    ]


def _items(container) -> list:
    return [*container.keys(), *container.values()] if isinstance(container, dict) else list(container)


def _refill(container, held) -> None:
    container.clear()
    container.extend(held) if isinstance(container, list) else container.update(held)


def _refusing_child(module: nn.Module, opaque: dict[nn.Module, str]) -> tuple[nn.Module, str] | None:
    """The first submodule, outermost first, that cannot be traced though all of its own children can."""
    for child in module.children():
        if (
            child in opaque
            or known.is_layer(child)
            or (not list(child.children()) and not known.traces(child))
        ):
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


def _normalized(nodes: list[Node], outputs: Any, value: int, normalize) -> tuple[list[Node], Any]:
    mean, std = (tuple(float(v) for v in part) for part in normalize)
    fresh = 1 + max([value, *(node.output for node in nodes)])
    node = Normalize(name="normalize", output=fresh, x=value, mean=mean, std=std)
    renamed = map_refs(lambda ref: Ref(fresh) if ref.value == value else ref, outputs)
    return [node, *(other.renamed({value: fresh}) for other in nodes)], renamed


def _short(error: object) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else text[:197] + "..."
