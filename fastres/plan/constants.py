"""Prepared constants, shared by every plan of a network, renewed in place when parameters change."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from fastres.graph.fold import LayerParameters
from fastres.graph.ir import Node
from fastres.plan.planner import Segment


class Constants:
    """(candidate, nodes, prepare_key) → what the candidate's `prepare` made of the nodes' parameters.

    Renewal copies into the same memory, so that bound launches and CUDA graphs stay good; where that can't be (another
    shape, or an opaque layout) the entry is replaced and `generation` grows, which tells contexts to bind again.
    """

    def __init__(self):
        self.generation = 0
        self._made: dict[Any, tuple[Segment, Any]] = {}

    def get(self, segment: Segment) -> Any:
        key = self._key(segment)
        if key not in self._made:
            self._made[key] = (segment, _prepare(segment))
        return self._made[key][1]

    def renew(self) -> None:
        """Prepares everything again from the parameters as they are now."""
        for key, (segment, old) in list(self._made.items()):
            new = _prepare(segment)
            if not _copy_into(old, new):
                self._made[key] = (segment, new)
                self.generation += 1

    def clear(self) -> None:
        self._made.clear()
        self.generation += 1

    @staticmethod
    def _key(segment: Segment) -> Any:
        config = segment.cost.config if segment.cost is not None else None
        wanted = segment.candidate.prepare_key(segment.problem, config)
        return segment.candidate.name, tuple(id(node) for node in segment.nodes), wanted


def _prepare(segment: Segment) -> Any:
    parameters = {role: LayerParameters(node) for role, node in _roles(segment)}
    with torch.inference_mode(False), torch.no_grad():
        return segment.candidate.prepare(segment.problem, segment.cost.config, parameters)


def _roles(segment: Segment) -> tuple[tuple[str, Node], ...]:
    return segment.match.nodes


def _copy_into(old: Any, new: Any) -> bool:
    """Copies tensors of `new` over those of `old`, leaf by leaf; False where they don't correspond."""
    a, a_spec = tree_flatten(old)
    b, b_spec = tree_flatten(new)
    if a_spec != b_spec:
        return False
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if isinstance(x, Tensor)]
    if any(not isinstance(y, Tensor) or not _same_layout(x, y) for x, y in pairs):
        return False
    if any(x != y for x, y in zip(a, b, strict=True) if not isinstance(x, Tensor)):
        return False
    with torch.inference_mode(False), torch.no_grad():
        for x, y in pairs:
            if x.data_ptr() != y.data_ptr():
                x.copy_(y)
    return True


def _same_layout(x: Tensor, y: Tensor) -> bool:
    if x.is_mkldnn or y.is_mkldnn:
        return False
    return (x.shape, x.dtype, x.device, x.stride()) == (y.shape, y.dtype, y.device, y.stride())
