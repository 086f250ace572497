"""BN folding in fp32 (fp64 where parameters or activations are).

Folding (Jacob et al., 2018, "Quantization and Training of Neural Networks", section 3.2):
    scale = gamma / sqrt(var + eps),  shift = beta + (bias - mean) * scale,  y = scale * conv(x, w) + shift
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastres.graph.ir import Conv, Linear, Node, Normalize


class LayerParameters:
    """The current parameters of one node, read at `prepare` time; everything returned is detached.

    Args:
        compute: the type of activations.

    Attributes:
        weight: the layer's own weight, [K, C / groups, R, S] or [K, C], in its own dtype; None where it has none.
        bias: the convolution's or linear layer's bias [K], or None.
        mean, std: of a `Normalize` node, fp32 [C]; else None.
    """

    def __init__(self, node: Node, compute: torch.dtype = torch.float32):
        self._compute = compute
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        self.mean: Tensor | None = None
        self.std: Tensor | None = None
        self._bn: nn.BatchNorm2d | None = None
        match node:
            case Conv():
                self.weight, self.bias = _detached(node.conv.weight), _detached(node.conv.bias)
                self._bn = node.bn
            case Linear():
                self.weight, self.bias = _detached(node.linear.weight), _detached(node.linear.bias)
            case Normalize():
                self.mean, self.std = torch.tensor(node.mean), torch.tensor(node.std)

    @torch.no_grad()
    def scale_shift(self) -> tuple[Tensor, Tensor]:
        """(scale [K], shift [K]) with act(scale * conv(x, weight) + shift): BN and the layer's bias, fp32 or fp64."""
        weight = self.weight
        wide = torch.float64 if torch.float64 in (weight.dtype, self._compute) else torch.float32
        k = weight.shape[0]
        zero = torch.zeros(k, dtype=wide, device=weight.device)
        bias = zero if self.bias is None else self.bias.to(wide)
        bn = self._bn
        if bn is None:
            return torch.ones_like(zero), bias.clone()
        scale = torch.rsqrt(bn.running_var.to(wide) + bn.eps)
        if bn.weight is not None:
            scale = scale * bn.weight.detach().to(wide)
        shift = (bias - bn.running_mean.to(wide)) * scale
        return scale, shift if bn.bias is None else shift + bn.bias.detach().to(wide)

    @torch.no_grad()
    def folded(self) -> tuple[Tensor, Tensor]:
        """(weight * scale, shift), fp32 or fp64: conv(x, weight) + shift is the layer with its BN. Round it last."""
        scale, shift = self.scale_shift()
        weight = self.weight.to(scale.dtype)
        return weight * scale.view(-1, *(1,) * (weight.dim() - 1)), shift


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()
