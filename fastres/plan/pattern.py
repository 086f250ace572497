"""Patterns: templates of consecutive nodes, with optional parts, that one kernel call can compute."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from fastres.activation import IDENTITY
from fastres.graph.ir import Conv, GlobalAvgPool, Linear, MaxPool, Node, Normalize


@dataclass(frozen=True)
class Slot:
    """A place in a pattern.

    Attributes:
        role: its name in problems and buffers.
        kind: the node type that fits.
        x: the role whose output it reads; None: a value from outside.
        residual: what it may add: "none", "outside", or a role (binding wherever that role is present).
        optional: the pattern also holds without it.
        hidden: its output is never written, so nothing outside the pattern may read it.
        where: a further condition on the node.
    """

    role: str
    kind: type[Node]
    x: str | None = None
    residual: tuple[str, ...] = ("none",)
    optional: bool = False
    hidden: bool = False
    where: Callable[[Node], bool] = lambda node: True


@dataclass(frozen=True)
class Match:
    """Where a pattern was found: nodes[start:stop], by role, and the values that enter and leave."""

    pattern: Pattern
    start: int
    stop: int
    nodes: tuple[tuple[str, Node], ...]
    inputs: tuple[tuple[str, int], ...]
    outputs: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Pattern:
    name: str
    slots: tuple[Slot, ...]

    def matches(self, nodes: Sequence[Node], start: int, users: dict[int, list[int]]) -> Iterator[Match]:
        """Every way in which the pattern covers consecutive nodes from `start` on, longest first."""
        for chosen in self._fits(nodes, start, 0, ()):
            match = self._close(chosen, nodes, start, users)
            if match is not None:
                yield match

    def _fits(self, nodes, at, slot_index, chosen) -> Iterator[tuple[tuple[Slot, Node], ...]]:
        if slot_index == len(self.slots):
            yield chosen
            return
        slot = self.slots[slot_index]
        if at < len(nodes) and isinstance(nodes[at], slot.kind) and slot.where(nodes[at]):
            if self._wired(slot, nodes[at], {s.role: n for s, n in chosen}):
                yield from self._fits(nodes, at + 1, slot_index + 1, (*chosen, (slot, nodes[at])))
        if slot.optional:
            yield from self._fits(nodes, at, slot_index + 1, chosen)

    @staticmethod
    def _wired(slot: Slot, node: Node, before: dict[str, Node]) -> bool:
        inside = {n.output for n in before.values()}
        if slot.x in before:
            if node.x != before[slot.x].output:
                return False
        elif node.x in inside:
            return False
        residual = getattr(node, "residual", None)
        for role in slot.residual:
            if role in before:
                return residual == before[role].output
        if residual is None:
            return "none" in slot.residual
        return "outside" in slot.residual and residual not in inside

    def _close(self, chosen, nodes, start, users) -> Match | None:
        stop = start + len(chosen)
        for slot, node in chosen:
            if slot.hidden and any(not start <= user < stop for user in users.get(node.output, ())):
                return None
        inside = {node.output for _, node in chosen}
        inputs = []
        for slot, node in chosen:
            if node.x not in inside:
                inputs.append((f"{slot.role}.x", node.x))
            residual = getattr(node, "residual", None)
            if residual is not None and residual not in inside:
                inputs.append((f"{slot.role}.residual", residual))
        return Match(
            self,
            start,
            stop,
            tuple((slot.role, node) for slot, node in chosen),
            tuple(inputs),
            tuple((slot.role, node.output) for slot, node in chosen if not slot.hidden),
        )


def _pointwise(node: Conv, stride: int | None = None) -> bool:
    conv = node.conv
    plain = conv.kernel_size == (1, 1) and conv.padding in ((0, 0), "valid", "same") and conv.groups == 1
    return plain and (stride is None or conv.stride == (stride, stride))


def _pointwise_unit(node: Conv) -> bool:
    return _pointwise(node, stride=1)


def _projection(node: Conv) -> bool:
    return _pointwise(node) and node.act == IDENTITY


def _shifted(node: Conv) -> bool:
    conv = node.conv
    return (
        conv.kernel_size == (3, 3)
        and conv.stride == (1, 1)
        and conv.dilation == (1, 1)
        and conv.padding in ((1, 1), "same")
        and conv.groups == 1
    )


_SHORTCUT = Slot("shortcut", Conv, optional=True, hidden=True, where=_projection)

CONV_BN_ACT = Pattern("conv_bn_act", (Slot("conv", Conv, residual=("none", "outside")),))
MAX_POOL = Pattern("max_pool", (Slot("pool", MaxPool),))
GLOBAL_AVG_POOL = Pattern("global_avg_pool", (Slot("pool", GlobalAvgPool),))
LINEAR = Pattern("linear", (Slot("linear", Linear),))
NORMALIZE = Pattern("normalize", (Slot("normalize", Normalize),))
STEM_POOL = Pattern(
    "stem_pool",
    (
        Slot("normalize", Normalize, optional=True, hidden=True),
        Slot("conv", Conv, x="normalize", hidden=True),
        Slot("pool", MaxPool, x="conv"),
    ),
)
DUAL = Pattern(
    "dual",
    (
        Slot("shortcut", Conv, hidden=True, where=_projection),
        Slot("expand", Conv, residual=("shortcut",), where=_pointwise_unit),
    ),
)
EXPAND_REDUCE = Pattern(
    "expand_reduce",
    (
        _SHORTCUT,
        Slot("expand", Conv, residual=("shortcut", "outside"), where=_pointwise_unit),
        Slot("reduce", Conv, x="expand", where=_pointwise_unit),
    ),
)
SHIFTED_BLOCK = Pattern(
    "shifted_block",
    (
        Slot("conv", Conv, hidden=True, where=_shifted),
        _SHORTCUT,
        Slot("expand", Conv, x="conv", residual=("shortcut", "outside"), where=_pointwise_unit),
        Slot("reduce", Conv, x="expand", optional=True, where=_pointwise_unit),
    ),
)
POOL_LINEAR = Pattern(
    "pool_linear", (Slot("pool", GlobalAvgPool, hidden=True), Slot("linear", Linear, x="pool"))
)

PATTERNS = (
    CONV_BN_ACT,
    MAX_POOL,
    GLOBAL_AVG_POOL,
    LINEAR,
    NORMALIZE,
    STEM_POOL,
    DUAL,
    EXPAND_REDUCE,
    SHIFTED_BLOCK,
    POOL_LINEAR,
)
