"""Joins traced steps into nodes: conv → BN → (+ residual) → activation, and pool → flatten.

A step joins the one before it only if it is its only reader. The joined node stands where its last part stood, which
puts a block's projection shortcut right before its expand.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fastres.activation import IDENTITY
from fastres.graph import known
from fastres.graph.ir import Conv, GlobalAvgPool, Node, Opaque, refs
from fastres.graph.primitive import Act, Add, BatchNorm, Flatten


def fuse(nodes: list[Node], outputs: Any, training: bool) -> list[Node]:
    """`nodes` with every chain joined. In eval mode only BNs that use running statistics join; in training all do."""
    return _Fuser(nodes, outputs, training).run()


class _Fuser:
    def __init__(self, nodes: list[Node], outputs: Any, training: bool):
        self.nodes = list(nodes)
        self.training = training
        self.reads: dict[int, int] = {}
        for value in [*(v for node in nodes for v in node.inputs), *refs(outputs)]:
            self.reads[value] = self.reads.get(value, 0) + 1
        self.at: dict[int, Node] = {}
        self.depth: dict[int, int] = {}
        self.done: list[Node] = []

    def run(self) -> list[Node]:
        for node in self.nodes:
            made = self._joined(node)
            self.depth[made.output] = 1 + max((self.depth.get(v, 0) for v in made.inputs), default=0)
            self.at[made.output] = made
            self.done.append(made)
            # BN-with-activation layers: two parts of one call
            if isinstance(node, BatchNorm) and isinstance(made, Conv) and node.act != IDENTITY:
                self.at[made.output] = self.done[-1] = replace(made, act=node.act)
        return [_plain(node) for node in self.done]

    def _joined(self, node: Node) -> Node:
        match node:
            case BatchNorm():
                return self._batch_norm(node)
            case Act():
                return self._act(node)
            case Add():
                return self._add(node)
            case Flatten():
                return self._flatten(node)
        return node

    def _producer(self, value: int, kind: type[Node]) -> Node | None:
        """The node that makes `value`, if it is of `kind`, only one step reads it, and it may run as late as now."""
        made = self.at.get(value)
        fits = isinstance(made, kind) and self.reads[value] == 1
        return made if fits and not self._changed_since(made) else None

    def _take(self, before: Node, **changes) -> Node:
        self.done.remove(before)
        return replace(before, **changes)

    def _batch_norm(self, node: BatchNorm) -> Node:
        (x,) = node.inputs
        conv = self._producer(x, Conv)
        fits = conv is not None and conv.bn is None and conv.residual is None and conv.act == IDENTITY
        fits = fits and (known.foldable(node.bn) or (self.training and known.batch_norm_act(node.bn) is None))
        if not fits or (
            node.bn.running_mean is not None and len(node.bn.running_mean) != conv.conv.out_channels
        ):
            return node
        return self._take(conv, output=node.output, bn=node.bn, bn_name=node.name)

    def _act(self, node: Act) -> Node:
        (x, *rest) = node.inputs
        conv = self._producer(x, Conv)
        if conv is None or rest or conv.act != IDENTITY:
            return node
        return self._take(conv, output=node.output, act=node.act)

    def _add(self, node: Add) -> Node:
        a, b = (ref.value for ref in node.args)
        if a == b:
            return node
        joinable = []
        for value, other in ((a, b), (b, a)):
            conv = self._producer(value, Conv)
            if conv is not None and conv.residual is None and conv.act == IDENTITY:
                joinable.append((self.depth[value], value, other))
        for _, value, other in sorted(joinable, key=lambda item: -item[0]):
            return self._take(self.at[value], output=node.output, residual=other)
        return node

    def _changed_since(self, made: Node) -> bool:
        """Whether a step after `made` changes something in place: it may be, through a view, what `made` reads."""
        later = self.done[self.done.index(made) + 1 :]
        return any(isinstance(node, Opaque) and node.in_place for node in later)

    def _flatten(self, node: Flatten) -> Node:
        (x, *rest) = node.inputs
        pool = self._producer(x, GlobalAvgPool)
        if pool is None:
            # the mean over H and W without keepdim is [N, C] already
            return node
        return node if rest else self._take(pool, output=node.output, flat=True)


def _plain(node: Node) -> Node:
    """What did not join is an ordinary call."""
    if type(node) in (BatchNorm, Act, Add, Flatten):
        return Opaque(
            name=node.name,
            output=node.output,
            call=node.call,
            args=node.args,
            kwargs=node.kwargs,
            reason=node.reason,
            in_place=node.in_place,
            python=node.python,
        )
    return node
