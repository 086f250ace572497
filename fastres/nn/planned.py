"""Modules that run a plan of their own in inference."""

from __future__ import annotations

from torch import Tensor, nn


class Planned(nn.Module):
    """Base of the modules that own a plan: `_forward` is the differentiable path."""

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(x)
