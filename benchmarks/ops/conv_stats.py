"""conv_stats: a convolution, batch normalisation by its output's own statistics and ReLU; forward."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from benchmarks.case import Case, Subject, activations


class ConvBNReLU(nn.Module):
    """relu(bn(conv(x))) in training."""

    def __init__(self, c: int, k: int, kernel: int):
        super().__init__()
        self.conv = nn.Conv2d(c, k, kernel, padding=kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(k)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(x)))


class OursConvBNReLU(ConvBNReLU):
    """The same as fastres's blocks compute it: with the convolution's statistics where that is worth it."""

    def forward(self, x: Tensor) -> Tensor:
        from fastres.nn import functional

        return functional.conv_bn_act(x, self.conv, self.bn)


def case(
    shape: tuple[int, ...],
    outputs: int,
    kernel: int,
    dtype: torch.dtype,
    device: torch.device,
    level: str = "op",
    clock: str = "kernel",
) -> Case:
    """`shape` of x; `outputs`: output channels; `kernel`: the convolution's size, at stride 1."""

    def make() -> Subject:
        def module(body: type[ConvBNReLU]) -> nn.Module:
            torch.manual_seed(0)
            made = body(shape[1], outputs, kernel)
            nn.init.uniform_(made.bn.weight, 0.5, 1.2)
            nn.init.normal_(made.bn.bias, std=0.1)
            made.conv.to(dtype)
            return made.to(device, memory_format=torch.channels_last).train()

        plain, x = module(ConvBNReLU), activations(shape, dtype, device)
        return Subject(
            plain,
            (x,),
            fastres=lambda: module(OursConvBNReLU),
            keeps_dtype=True,
            exact=lambda: [copy.deepcopy(plain).double()(x.double()).detach()],
        )

    pixels = shape[0] * shape[2] * shape[3]
    # reads x, writes the convolution's output, reads it again once its statistics are known, writes the result
    elements = pixels * (shape[1] + 3 * outputs)
    return Case(
        level,
        "conv_stats",
        f"conv_stats {'x'.join(map(str, shape))} to {outputs} {kernel}x{kernel} bn relu",
        shape[0],
        dtype,
        device,
        [(elements * dtype.itemsize, 2 * pixels * shape[1] * outputs * kernel**2)],
        make,
        clock=clock,
    )
