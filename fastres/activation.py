"""Activations that a convolution node can carry, and their one meaning everywhere."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

# The position is the code that kernels take (`act: int`); kernels/ may not import this, so the order never changes.
KINDS = ("identity", "relu", "relu6", "silu", "gelu", "leaky_relu", "gelu_tanh", "hardswish")


@dataclass(frozen=True, slots=True)
class Activation:
    """An elementwise activation.

    Args:
        kind: one of `KINDS`.
        param: the negative slope of `leaky_relu`; unused elsewhere.
    """

    kind: str = "relu"
    param: float = 0.0

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"act: unknown activation {self.kind!r}; known are {', '.join(KINDS)}")

    @property
    def code(self) -> int:
        """The number that kernels know this activation by."""
        return KINDS.index(self.kind)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return apply(x, self.kind, self.param)

    def __str__(self) -> str:
        return f"{self.kind}({self.param:g})" if self.kind == "leaky_relu" else self.kind


def apply(x: torch.Tensor, kind: str, param: float = 0.0) -> torch.Tensor:
    """PyTorch's own arithmetic for an activation of kind `kind`; never in place."""
    match kind:
        case "identity":
            return x
        case "relu":
            return F.relu(x)
        case "relu6":
            return F.relu6(x)
        case "silu":
            return F.silu(x)
        case "gelu":
            return F.gelu(x)
        case "gelu_tanh":
            return F.gelu(x, approximate="tanh")
        case "leaky_relu":
            return F.leaky_relu(x, param)
        case "hardswish":
            return F.hardswish(x)
    raise ValueError(f"act: unknown activation {kind!r}; known are {', '.join(KINDS)}")


IDENTITY = Activation("identity")
RELU = Activation("relu")
