"""Prepared constants, shared by every plan of a network, renewed in place when parameters change."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves

from fastres.graph.fold import LayerParameters
from fastres.plan.planner import Segment


class Constants:
    """(candidate, nodes, prepare_key) → what the candidate's `prepare` made of the nodes' parameters.

    Renewal copies into the same memory, so that bound launches and CUDA graphs stay good. Where that can't be (another
    shape, an opaque layout, or the parameter's own memory, which is the user's) the entry is forgotten and `generation`
    grows, which tells contexts to bind again.
    """

    def __init__(self):
        self.generation = 0
        self._made: dict[Any, _Entry] = {}
        # what is bound must be what is renewed: two threads never prepare the same entry apart
        self._lock = threading.RLock()

    def get(self, segment: Segment) -> Any:
        key = self._key(segment)
        with self._lock:
            if key not in self._made:
                self._made[key] = _Entry(segment)
            return self._made[key].value

    def renew(self) -> None:
        """Prepares everything again from the parameters as they are now."""
        with self._lock:
            for key, entry in list(self._made.items()):
                if not entry.renew():
                    del self._made[key]
                    self.generation += 1

    @staticmethod
    def _key(segment: Segment) -> Any:
        config = segment.cost.config if segment.cost is not None else None
        wanted = segment.candidate.prepare_key(segment.problem, config)
        return segment.candidate.name, tuple(id(node) for node in segment.nodes), wanted


class _Entry:
    def __init__(self, segment: Segment):
        self.segment = segment
        self.value = _prepare(segment)
        theirs = {_storage(t) for t in _parameters(segment)} - {None}
        self.borrowed = any(_storage(leaf) in theirs for leaf in tree_leaves(self.value))

    def renew(self) -> bool:
        """Brings `value` up to date in place; False where that can't be."""
        if self.borrowed:
            return False
        try:
            return _copy_into(self.value, _prepare(self.segment))
        except (
            Exception
        ):  # parameters that moved to another device or type: the next plan prepares for itself
            return False


def _parameters(segment: Segment) -> list[Tensor]:
    layers = (
        getattr(node, name, None) for _, node in segment.match.nodes for name in ("conv", "bn", "linear")
    )
    return [t for layer in layers if layer is not None for t in (*layer.parameters(), *layer.buffers())]


def _storage(value: Any) -> int | None:
    """The address of a tensor's memory; None for what has none that could be shared."""
    if not isinstance(value, Tensor) or value.layout != torch.strided or not value.numel():
        return None
    return value.untyped_storage().data_ptr()


def _prepare(segment: Segment) -> Any:
    parameters = {role: LayerParameters(node, segment.problem.dtype) for role, node in segment.match.nodes}
    with torch.inference_mode(False), torch.no_grad():
        return segment.candidate.prepare(segment.problem, segment.cost.config, parameters)


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
            x.copy_(y)
    return True


def _same_layout(x: Tensor, y: Tensor) -> bool:
    if x.is_mkldnn or y.is_mkldnn:
        return False
    return (x.shape, x.dtype, x.device, x.stride()) == (y.shape, y.dtype, y.device, y.stride())
