"""Plain PyTorch modules for problems that are no module of their own: one conv layer, the fused patterns."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastres.bench.calibrate import calibrate_bn
from fastres.plan.problem import ConvSpec


class ConvBNAct(nn.Module):
    """act(bn(conv(x))), as torchvision writes it; act is ReLU or nothing."""

    def __init__(self, spec: ConvSpec):
        super().__init__()
        self.conv = _conv(spec)
        self.bn = nn.BatchNorm2d(spec.k)
        self.relu = nn.ReLU() if spec.act.kind == "relu" else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn(self.conv(x)))


class ConvBNAddAct(ConvBNAct):
    """act(bn(conv(x)) + residual)."""

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.relu(self.bn(self.conv(x)) + residual)


def conv_bn_act(spec: ConvSpec) -> nn.Module:
    return (ConvBNAddAct if spec.residual else ConvBNAct)(spec)


class Dual(nn.Module):
    """relu(bn(expand(y)) + bn(shortcut(x)))."""

    def __init__(self, shortcut: ConvSpec, expand: ConvSpec):
        super().__init__()
        self.shortcut, self.shortcut_bn = _conv(shortcut), nn.BatchNorm2d(shortcut.k)
        self.expand, self.expand_bn = _conv(expand), nn.BatchNorm2d(expand.k)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        shortcut = self.shortcut_bn(self.shortcut(x))
        return self.relu(self.expand_bn(self.expand(y)) + shortcut)


class ExpandReduce(nn.Module):
    """z = relu(bn(expand(y)) + residual); (z, relu(bn(reduce(z))))."""

    def __init__(self, expand: ConvSpec, reduce: ConvSpec):
        super().__init__()
        self.expand, self.expand_bn = _conv(expand), nn.BatchNorm2d(expand.k)
        self.reduce, self.reduce_bn = _conv(reduce), nn.BatchNorm2d(reduce.k)
        self.relu = nn.ReLU()

    def forward(self, y: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        z = self.relu(self.expand_bn(self.expand(y)) + residual)
        return z, self.relu(self.reduce_bn(self.reduce(z)))


class ShiftedBlock(ExpandReduce):
    """The same behind a 3x3 convolution with BN and ReLU."""

    def __init__(self, conv: ConvSpec, expand: ConvSpec, reduce: ConvSpec):
        super().__init__(expand, reduce)
        self.conv, self.conv_bn = _conv(conv), nn.BatchNorm2d(conv.k)

    def forward(self, y: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(self.relu(self.conv_bn(self.conv(y))), residual)


class StemPool(nn.Module):
    """maxpool(relu(bn(conv7x7(x))))."""

    def __init__(self, conv: ConvSpec):
        super().__init__()
        self.conv, self.bn, self.relu = _conv(conv), nn.BatchNorm2d(conv.k), nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.maxpool(self.relu(self.bn(self.conv(x))))


class PoolLinear(nn.Module):
    """fc(mean over H and W)."""

    def __init__(self, c: int, k: int):
        super().__init__()
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(c, k)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.flatten(self.avgpool(x), 1))


def calibrated(module: nn.Module, *inputs: Tensor) -> nn.Module:
    """`module` with BN statistics of its own values on `inputs`."""

    class _Bound(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = module

        def forward(self, x: Tensor) -> Tensor:
            return self.module(*(x.float() for x in inputs))

    calibrate_bn(_Bound(), inputs[0])
    return module


def _conv(spec: ConvSpec) -> nn.Conv2d:
    conv = nn.Conv2d(
        spec.c, spec.k, spec.kernel, spec.stride, spec.padding, spec.dilation, spec.groups, bias=False
    )
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv
