"""The graph: a list of nodes in execution order. Values are numbered; a node reads some and writes one.

Nodes hold the user's own modules, never copies of their parameters: what a kernel wants is prepared from them later,
under a version key (graph/fold.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from fastres.activation import IDENTITY, Activation


@dataclass(frozen=True, slots=True)
class Ref:
    """A value's number, as it stands inside the arguments of an `Opaque` node and in a graph's outputs."""

    value: int


@dataclass(eq=False, kw_only=True)
class Node:
    """One step. `name` is the layer's qualified name in the user's model (for an opaque function, fx's name)."""

    name: str
    output: int

    @property
    def inputs(self) -> tuple[int, ...]:
        raise NotImplementedError

    def renamed(self, names: dict[int, int]) -> Node:
        """A copy that reads `names[v]` where this one reads v."""
        raise NotImplementedError


@dataclass(eq=False, kw_only=True)
class Conv(Node):
    """act(bn(conv(x)) + residual)."""

    x: int
    conv: nn.Conv2d
    bn: nn.BatchNorm2d | None = None
    residual: int | None = None
    act: Activation = IDENTITY
    bn_name: str = ""

    @property
    def inputs(self):
        return (self.x,) if self.residual is None else (self.x, self.residual)

    def renamed(self, names):
        residual = None if self.residual is None else names.get(self.residual, self.residual)
        return replace(self, x=names.get(self.x, self.x), residual=residual)


@dataclass(eq=False, kw_only=True)
class MaxPool(Node):
    x: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    ceil_mode: bool = False

    @property
    def inputs(self):
        return (self.x,)

    def renamed(self, names):
        return replace(self, x=names.get(self.x, self.x))


@dataclass(eq=False, kw_only=True)
class GlobalAvgPool(Node):
    """Mean over H and W. `flat`: the output is [N, C]; else [N, C, 1, 1].

    `dims` are those of the user's call: they tell what is meant where the input has not four dimensions.
    """

    x: int
    flat: bool = False
    dims: tuple[int, int] = (-2, -1)

    @property
    def inputs(self):
        return (self.x,)

    def renamed(self, names):
        return replace(self, x=names.get(self.x, self.x))


@dataclass(eq=False, kw_only=True)
class Linear(Node):
    x: int
    linear: nn.Linear

    @property
    def inputs(self):
        return (self.x,)

    def renamed(self, names):
        return replace(self, x=names.get(self.x, self.x))


@dataclass(eq=False, kw_only=True)
class Normalize(Node):
    """(x / 255 - mean) / std of uint8 images; mean and std have one entry a channel."""

    x: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def inputs(self):
        return (self.x,)

    def renamed(self, names):
        return replace(self, x=names.get(self.x, self.x))


@dataclass(eq=False, kw_only=True)
class Opaque(Node):
    """Any module or function that no kernel knows: it is called as it is, with `Ref`s replaced by values.

    `in_place`: the call changes its first argument. `python`: what it does may differ from call to call in ways that
    only Python sees (hooks, control flow). `row_major`: it takes no channels_last tensors.
    """

    call: Callable[..., Any]
    args: tuple = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    reason: str = ""
    in_place: bool = False
    python: bool = False
    row_major: bool = False

    @property
    def inputs(self):
        return tuple(dict.fromkeys(refs((self.args, self.kwargs))))

    def renamed(self, names):
        def rename(ref: Ref):
            return Ref(names.get(ref.value, ref.value))

        return replace(self, args=map_refs(rename, self.args), kwargs=map_refs(rename, self.kwargs))


@dataclass(eq=False)
class Graph:
    """Nodes in execution order, the values that hold the inputs, and the shape of the result (`Ref`s in any nesting).

    `opaque`: modules that are called as they are since they cannot be traced; `notes` says why.
    """

    nodes: list[Node]
    inputs: tuple[int, ...]
    outputs: Any
    notes: list[str] = field(default_factory=list)
    opaque: tuple[nn.Module, ...] = ()

    @property
    def output_values(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys(refs(self.outputs)))

    def users(self) -> dict[int, list[int]]:
        """value → indices of the nodes that read it (-1 stands for the graph's output)."""
        users: dict[int, list[int]] = {}
        for index, node in enumerate(self.nodes):
            for value in node.inputs:
                users.setdefault(value, []).append(index)
        for value in self.output_values:
            users.setdefault(value, []).append(-1)
        return users

    def __str__(self) -> str:
        rows = []
        for node in self.nodes:
            reads = ", ".join(f"%{v}" for v in node.inputs)
            extra = f" {node.act}" if isinstance(node, Conv) else ""
            rows.append(f"%{node.output} = {type(node).__name__}[{node.name}]({reads}){extra}")
        return "\n".join(rows)


def refs(tree: Any) -> Iterator[int]:
    """The values that `tree` (tuples, lists, dicts, slices, nested) refers to, in order."""
    if isinstance(tree, Ref):
        yield tree.value
    elif isinstance(tree, (tuple, list)):
        for item in tree:
            yield from refs(item)
    elif isinstance(tree, dict):
        for item in tree.values():
            yield from refs(item)
    elif isinstance(tree, slice):
        yield from refs((tree.start, tree.stop, tree.step))


def map_refs(fn: Callable[[Ref], Any], tree: Any) -> Any:
    """`tree` with every `Ref` replaced by `fn(ref)`."""
    if isinstance(tree, Ref):
        return fn(tree)
    if isinstance(tree, tuple):
        items = [map_refs(fn, item) for item in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else tuple(items)
    if isinstance(tree, list):
        return [map_refs(fn, item) for item in tree]
    if isinstance(tree, dict):
        return {key: map_refs(fn, item) for key, item in tree.items()}
    if isinstance(tree, slice):
        return slice(map_refs(fn, tree.start), map_refs(fn, tree.stop), map_refs(fn, tree.step))
    return tree
