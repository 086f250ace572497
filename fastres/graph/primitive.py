"""From an fx graph to IR nodes, one for each traced step; fuse.py then joins them."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_leaves

from fastres.activation import IDENTITY, Activation
from fastres.graph import known
from fastres.graph.ir import Conv, GlobalAvgPool, Linear, MaxPool, Node, Opaque, Ref, refs


@dataclass(eq=False, kw_only=True)
class BatchNorm(Opaque):
    """A BN layer that may fold into the convolution before it; what does not stays a call."""

    bn: nn.Module
    act: Activation = IDENTITY


@dataclass(eq=False, kw_only=True)
class Act(Opaque):
    act: Activation


@dataclass(eq=False, kw_only=True)
class Add(Opaque):
    """The sum of two values; broadcasting is seen only when shapes are known."""


@dataclass(eq=False, kw_only=True)
class Flatten(Opaque):
    """flatten(1)."""


_ACT_FUNCTIONS = {
    F.relu: "relu",
    torch.relu: "relu",
    F.relu6: "relu6",
    F.silu: "silu",
    F.gelu: "gelu",
    F.leaky_relu: "leaky_relu",
    F.hardswish: "hardswish",
    torch.relu_: "relu",
    F.relu_: "relu",
}
_ADDS = (operator.add, torch.add, operator.iadd)


class _Method:
    """Calls the method `name` of its first argument."""

    def __init__(self, name: str):
        self.name = self.__name__ = name

    def __call__(self, owner, *args, **kwargs):
        if self.name != "view" or not isinstance(owner, torch.Tensor):
            return getattr(owner, self.name)(*args, **kwargs)
        try:
            return owner.view(*args, **kwargs)
        except (RuntimeError, ValueError):
            # values are channels_last here, the user's code may count on contiguous ones
            return owner.contiguous().view(*args, **kwargs)


class Constant:
    """A tensor that the user's forward makes anew, and alike, at every call."""

    __name__ = "constant"
    __module__ = "fastres"

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor

    def __call__(self):
        return self.tensor.clone()


class _Attribute:
    """Reads a parameter, a buffer or a constant of the root when it is called, so that it is never stale."""

    def __init__(self, root: nn.Module, path: str):
        self.root, self.path, self.__name__ = root, path, path

    def __call__(self):
        return operator.attrgetter(self.path)(self.root)


def translate(
    graph: torch.fx.Graph, root: nn.Module, module: nn.Module, opaque: dict[nn.Module, str]
) -> tuple[list[Node], tuple[int, ...], Any]:
    """(nodes, input values, outputs) of an fx graph; in-place steps are renamed to single assignment.

    Args:
        root: what was traced: `module`, or a shell around it where it is a single layer.
        module: its hooks are the caller's business.
        opaque: modules that are called as they are, and why.
    """
    return _Translator(root, module, opaque).run(graph)


class _Translator:
    def __init__(self, root: nn.Module, module: nn.Module, opaque: dict[nn.Module, str]):
        self.root, self.module, self.opaque = root, module, opaque
        self.modules = dict(root.named_modules(remove_duplicate=False))
        self.numbers: set[torch.fx.Node] = set()
        self.nodes: list[Node] = []
        self.values: dict[torch.fx.Node, Any] = {}
        self.renamed: dict[int, int] = {}
        self.count = 0

    def run(self, graph: torch.fx.Graph):
        inputs = []
        for node in graph.nodes:
            if node.op == "placeholder":
                self.values[node] = self._fresh()
                inputs.append(self.values[node])
            elif node.op == "output":
                outputs = self._tree(node.args[0])
            else:
                self._step(node)
        return self.nodes, tuple(inputs), outputs

    def _fresh(self) -> int:
        self.count += 1
        return self.count - 1

    def _value(self, node: torch.fx.Node) -> int:
        value = self.values[node]
        while value in self.renamed:
            value = self.renamed[value]
        return value

    def _tree(self, arg: Any) -> Any:
        return _from_fx(arg, lambda node: Ref(self._value(node)))

    def _emit(self, node: Node, source: torch.fx.Node) -> None:
        self.nodes.append(node)
        self.values[source] = node.output

    def _alias(self, source: torch.fx.Node, target: torch.fx.Node) -> None:
        self.values[source] = self._value(target)

    def _step(self, node: torch.fx.Node) -> None:
        if node.op == "call_module":
            self._module(node, self.modules[node.target])
        elif node.op == "get_attr":
            call = _Attribute(self.root, node.target)
            self._emit(Opaque(name=node.target, output=self._fresh(), call=call), node)
        else:
            self._function(node)

    def _opaque(self, node: torch.fx.Node, call, name: str, kind: type[Opaque] = Opaque, **extra) -> None:
        args, kwargs = self._tree(node.args), self._tree(node.kwargs)
        first = next(iter(refs(args)), None)
        in_place = first is not None and _in_place(node, call) and node not in self.numbers
        python = isinstance(call, nn.Module) and (
            call in self.opaque or any(map(known.has_hooks, call.modules()))
        )
        common = dict(name=name, output=self._fresh(), call=call, args=args, kwargs=kwargs)
        made = kind(in_place=in_place, python=python, **common, **extra)
        self._emit(made, node)
        if in_place:
            # later readers of the first argument see the changed value: the same tensor where it is called as it is
            self.renamed[first] = made.output

    def _module(self, node: torch.fx.Node, module: nn.Module) -> None:
        name = node.target
        single = len(node.args) == 1 and not node.kwargs and isinstance(node.args[0], torch.fx.Node)
        whole = module is self.module
        hooked = known.has_hooks(module) and not whole
        if not single or hooked or module in self.opaque:
            reason = self.opaque.get(module, "it has hooks, or a forward of its own" if hooked else "")
            return self._opaque(node, module, name, reason=reason)
        x = node.args[0]
        kind = known.exact_type(module)
        if known.is_identity_now(module):
            return self._alias(node, x)
        # a single layer is called from within a call of itself
        call = module.forward if whole else module
        if known.is_conv(module):
            return self._emit(Conv(name=name, output=self._fresh(), x=self._value(x), conv=module), node)
        if known.is_batch_norm(module) or known.batch_norm_act(module) is not None:
            act = known.batch_norm_act(module) or IDENTITY
            return self._opaque(node, call, name, BatchNorm, bn=module, act=act)
        act = known.activation(module)
        if act is not None:
            return self._opaque(node, call, name, Act, act=act)
        if kind is nn.MaxPool2d and not module.return_indices:
            window = (module.kernel_size, module.stride, module.padding, module.dilation, module.ceil_mode)
            return self._max_pool(node, name, x, *window)
        if kind is nn.AdaptiveAvgPool2d and module.output_size in (1, (1, 1), [1, 1]):
            return self._emit(GlobalAvgPool(name=name, output=self._fresh(), x=self._value(x)), node)
        if kind is nn.Linear:
            return self._emit(Linear(name=name, output=self._fresh(), x=self._value(x), linear=module), node)
        if kind is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1):
            return self._opaque(node, call, name, Flatten)
        self._opaque(node, call, name)

    @staticmethod
    def _window(node: torch.fx.Node) -> list:
        names = (
            ("kernel_size", None),
            ("stride", None),
            ("padding", 0),
            ("dilation", 1),
            ("ceil_mode", False),
        )
        return [_argument(node, 1 + i, name, default) for i, (name, default) in enumerate(names)]

    def _max_pool(self, node, name, x, kernel, stride, padding, dilation, ceil_mode) -> None:
        made = MaxPool(
            name=name,
            output=self._fresh(),
            x=self._value(x),
            kernel=_pair(kernel),
            stride=_pair(kernel if stride is None else stride),
            padding=_pair(padding),
            dilation=_pair(dilation),
            ceil_mode=ceil_mode,
        )
        self._emit(made, node)

    def _function(self, node: torch.fx.Node) -> None:
        call = _Method(node.target) if node.op == "call_method" else node.target
        name = node.name
        if _is_number(node, self.numbers):
            self.numbers.add(node)
        tensors = [arg for arg in node.args if isinstance(arg, torch.fx.Node)]
        if getattr(call, "fastres_conv_bn_act", False):
            return self._conv_bn_act(node)
        act = self._act(node, call)
        if act is not None:
            return self._opaque(node, call, name, Act, act=act)
        is_add = call in _ADDS if not isinstance(call, _Method) else call.name in ("add", "add_")
        if is_add and len(tensors) == len(node.args) == 2 and not node.kwargs:
            return self._opaque(node, call, name, Add)
        if self._is_flatten(node, call):
            return self._opaque(node, call, name, Flatten)
        mean = self._global_mean(node, call)
        if mean is not None:
            x = self._value(tensors[0])
            return self._emit(GlobalAvgPool(name=name, output=self._fresh(), x=x, **mean), node)
        if call is F.max_pool2d and not _argument(node, 6, "return_indices", False):
            window = self._window(node)
            if not any(isinstance(leaf, torch.fx.Node) for leaf in tree_leaves(window)):
                return self._max_pool(node, name, tensors[0], *window)
        training = {F.dropout: 2, "stochastic_depth": 3}.get(
            call if call is F.dropout else getattr(call, "__name__", "")
        )
        if training is not None and not _argument(node, training, "training", True):
            return self._alias(node, tensors[0])
        self._opaque(node, call, name)

    def _conv_bn_act(self, node: torch.fx.Node) -> None:
        """A call of fastres.nn.functional.conv_bn_act(x, conv, bn, residual, act): a whole layer."""
        x, conv, bn, residual, act = (
            _argument(node, i, key, default)
            for i, (key, default) in enumerate(
                (("x", None), ("conv", None), ("bn", None), ("residual", None), ("act", Activation("relu")))
            )
        )
        names = {module: name for name, module in reversed(self.modules.items())}
        plain = known.is_conv(conv) and not known.has_hooks(conv)
        if bn is not None:
            plain = plain and known.is_batch_norm(bn) and not known.has_hooks(bn)
            plain = plain and (known.foldable(bn) or self.root.training)
        name = names.get(conv, node.name)
        if not plain:
            return self._opaque(node, node.target, name)
        made = Conv(
            name=name,
            output=self._fresh(),
            x=self._value(x),
            conv=conv,
            bn=bn,
            residual=None if residual is None else self._value(residual),
            act=act,
            bn_name=names.get(bn, ""),
        )
        self._emit(made, node)

    def _act(self, node: torch.fx.Node, call) -> Activation | None:
        if isinstance(call, _Method):
            return Activation("relu") if call.name in ("relu", "relu_") else None
        kind = _ACT_FUNCTIONS.get(call) if isinstance(call, type(F.relu)) or callable(call) else None
        if kind == "gelu" and _argument(node, 1, "approximate", "none") != "none":
            kind = "gelu_tanh"
        if kind == "leaky_relu":
            return Activation(kind, float(_argument(node, 1, "negative_slope", 0.01)))
        return Activation(kind) if kind else None

    @staticmethod
    def _is_flatten(node: torch.fx.Node, call) -> bool:
        named = call is torch.flatten or (isinstance(call, _Method) and call.name == "flatten")
        return named and _argument(node, 1, "start_dim", 0) == 1 and _argument(node, 2, "end_dim", -1) == -1

    @staticmethod
    def _global_mean(node: torch.fx.Node, call) -> dict[str, Any] | None:
        """The fields of a mean over H and W, or None if it is none."""
        if call is F.adaptive_avg_pool2d and _argument(node, 1, "output_size", None) in (1, (1, 1), [1, 1]):
            return {"flat": False}
        named = call is torch.mean or (isinstance(call, _Method) and call.name == "mean")
        if not named or "dtype" in node.kwargs:
            return None
        dims = _argument(node, 1, "dim", None)
        if not isinstance(dims, (tuple, list)) or tuple(dims) not in ((2, 3), (-2, -1)):
            return None
        return {"flat": not _argument(node, 2, "keepdim", False), "dims": tuple(dims)}


_NUMBER_ATTRIBUTES = ("shape", "ndim", "dtype", "device", "is_cuda", "itemsize")
_NUMBER_METHODS = ("size", "dim", "numel", "item", "stride", "is_floating_point")


def _is_number(node: torch.fx.Node, numbers: set[torch.fx.Node]) -> bool:
    """Whether the step makes no tensor: sizes, and what is computed from sizes. `h += 1` binds such a name anew."""
    if node.op == "call_method" and node.target in _NUMBER_METHODS:
        return True
    if node.target is getattr and node.args[1] in _NUMBER_ATTRIBUTES:
        return True
    reads = node.all_input_nodes
    arithmetic = getattr(node.target, "__module__", "") in ("_operator", "operator", "builtins", "math")
    return bool(reads) and arithmetic and all(read in numbers for read in reads)


def _in_place(node: torch.fx.Node, call) -> bool:
    if isinstance(call, nn.Module):
        return bool(getattr(call, "inplace", False))
    if isinstance(call, _Method):
        return call.name.endswith("_") and not call.name.endswith("__")
    name = getattr(call, "__name__", "")
    return (
        bool(node.kwargs.get("inplace", False))
        or (
            getattr(call, "__module__", "") in ("_operator", "operator")
            and name.startswith("i")
            and name in IN_PLACE_OPERATORS
        )
        or (name.endswith("_") and not name.endswith("__"))
        or (call in _ACT_FUNCTIONS and call is not F.gelu and True in node.args[1:])
    )


IN_PLACE_OPERATORS = (
    "iadd",
    "isub",
    "imul",
    "itruediv",
    "ifloordiv",
    "ipow",
    "iand",
    "ior",
    "ixor",
    "imatmul",
)


def _argument(node: torch.fx.Node, position: int, name: str, default: Any) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _pair(value) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _from_fx(tree: Any, leaf) -> Any:
    """fx's argument trees (immutable lists and dicts) as plain ones, with `leaf` applied to fx nodes."""
    if isinstance(tree, torch.fx.Node):
        return leaf(tree)
    if isinstance(tree, tuple):
        items = [_from_fx(item, leaf) for item in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else tuple(items)
    if isinstance(tree, list):
        return [_from_fx(item, leaf) for item in tree]
    if isinstance(tree, dict):
        return {key: _from_fx(item, leaf) for key, item in tree.items()}
    if isinstance(tree, slice):
        return slice(*(_from_fx(item, leaf) for item in (tree.start, tree.stop, tree.step)))
    return tree
