"""What is known of a network and prepared for it, in one set of train() / eval() modes."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastres.calls import parameter_dtype
from fastres.graph.capture import CaptureError
from fastres.graph.ir import Graph
from fastres.graph.versions import Watch
from fastres.plan.constants import Constants
from fastres.plan.planner import Plan

# Sets of modes that are remembered beside the present one: eval, train, train with frozen parts.
_REMEMBERED = 3


@dataclass(frozen=True)
class Facts:
    """What is asked about a module's parameters at every call, read once."""

    dtype: torch.dtype | None
    device: torch.device | None
    finite: bool

    @classmethod
    def of(cls, module: nn.Module) -> Facts:
        held = [*module.parameters(), *module.buffers()]
        device = next((p.device for p in module.parameters()), None)
        return cls(parameter_dtype(module), device, device is None or device.type != "cpu" or finite(held))


@dataclass
class Prepared:
    """Made from the network as it is in the modes that `watch` saw; None and empty before the first call.

    Attributes:
        graphs: by the network's own mode, what capture gave or why it gave nothing.
        plans: by key, the least recently used first.
        refused: inputs that no plan takes, and why.
    """

    watch: Watch | None = None
    facts: Facts | None = None
    graphs: dict[bool, Graph | CaptureError] = field(default_factory=dict)
    plans: OrderedDict[Any, Plan] = field(default_factory=OrderedDict)
    constants: Constants = field(default_factory=Constants)
    refused: dict[Any, str] = field(default_factory=dict)


class Asleep:
    """What was prepared in other modes: a network that goes back and forth between training and validation is planned
    once. Whoever wakes it renews its constants."""

    def __init__(self):
        self._held: OrderedDict[tuple[bool, ...], Prepared] = OrderedDict()

    def put(self, prepared: Prepared) -> None:
        self._held[prepared.watch.modes] = prepared
        self._held.move_to_end(prepared.watch.modes)
        while len(self._held) > _REMEMBERED:
            self._held.popitem(last=False)

    def wake(self, modes: tuple[bool, ...]) -> Prepared | None:
        """What was prepared in these modes, if nothing but modes has changed since."""
        held = self._held.pop(modes, None)
        return held if held is not None and held.watch.same_structure() else None


def finite(values: Iterable[Any]) -> bool:
    """Whether no tensor holds NaN or Inf: they stay in a sum.

    oneDNN's fused ReLU is a maximum that takes NaN for 0 (so it is under torch.compile with freezing); what holds NaN
    or Inf runs PyTorch's own calls instead. Asking costs one read of the images.
    """
    with torch.no_grad():
        return all(
            math.isfinite(x.sum().item()) for x in values if isinstance(x, Tensor) and x.is_floating_point()
        )
