"""Modules that run a plan of their own in inference, unless somebody around them plans."""

from __future__ import annotations

from typing import Any

import torch.fx
from torch import Tensor, nn

from ..calls import Options, plannable
from ..engine import Engine
from ..graph.capture import CaptureError


class Planned(nn.Module):
    """Base of the modules that own a plan: `_forward` is the differentiable path.

    Only the outermost owner plans: capturing a network traces through the `_forward` of what is inside it.
    """

    # blocks run inside a foreign network: a CUDA graph would copy every block's input in and its output out
    _options = Options(graphs="off")

    def __init__(self) -> None:
        super().__init__()
        self._engine = Engine(self._options)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, torch.fx.Proxy):
            return self._forward(x)
        if plannable(self, (x,), {}):
            return self._planned(x)
        return self._forward(x)

    def _planned(self, x: Tensor) -> Tensor:
        try:
            return self._engine(self, (x,))
        except CaptureError:
            return self._forward(x)

    def report(self, inputs: Any = None, *, measure: bool = True):
        """What ran in inference, node by node. See `fastres.report.Report`."""
        from ..report import report

        return report(self, inputs, measure)

    def refold(self) -> None:
        """Prepares all constants again; needed only after a write through `.data` in eval mode."""
        self._engine.refold()

    def train(self, mode: bool = True):
        self._engine.expire()
        return super().train(mode)
