"""The residual blocks of He et al. 2015 (arXiv:1512.03385), drop-ins for torchvision's."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from ..activation import IDENTITY
from . import functional
from .planned import Planned


def conv3x3(inplanes: int, planes: int, stride: int = 1, groups: int = 1, dilation: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inplanes, planes, 3, stride, dilation, dilation, groups, bias=False)


def conv1x1(inplanes: int, planes: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inplanes, planes, 1, stride, bias=False)


def shortcut(x: Tensor, downsample: nn.Module | None) -> Tensor:
    """What is added at the end of a block: x itself, or its projection."""
    if downsample is None:
        return x
    if functional.is_plain(downsample, nn.Sequential) and len(downsample) == 2:
        conv, bn = downsample
        return functional.conv_bn_act(x, conv, bn, act=IDENTITY)
    return downsample(x)


class BasicBlock(Planned):
    """Two 3x3 convolutions around a shortcut; as `torchvision.models.resnet.BasicBlock`.

    Args:
        inplanes, planes: channels in and out.
        stride: of the first convolution.
        downsample: projects the shortcut where shapes differ.
        groups, base_width, dilation: only 1, 64, 1, as in torchvision (ValueError, NotImplementedError).
        norm_layer: called with the number of channels; default `nn.BatchNorm2d`.
    """

    expansion: int = 1

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Callable[..., nn.Module] | None = None,
    ):
        super().__init__()
        norm_layer = norm_layer or nn.BatchNorm2d
        if groups != 1 or base_width != 64:
            raise ValueError(
                f"groups, base_width: BasicBlock takes only 1 and 64, got {groups} and {base_width}"
            )
        if dilation > 1:
            raise NotImplementedError(f"dilation: BasicBlock takes only 1, got {dilation}")
        self.conv1 = conv3x3(inplanes, planes, stride)
        self.bn1 = norm_layer(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(planes, planes)
        self.bn2 = norm_layer(planes)
        self.downsample = downsample
        self.stride = stride

    def _forward(self, x: Tensor) -> Tensor:
        out = functional.conv_bn_act(x, self.conv1, self.bn1, act=self.relu)
        return functional.conv_bn_act(out, self.conv2, self.bn2, shortcut(x, self.downsample), self.relu)


class Bottleneck(Planned):
    """1x1, 3x3 (with the stride: "v1.5"), 1x1 around a shortcut; as `torchvision.models.resnet.Bottleneck`.

    Args:
        inplanes: channels in; out are 4 `planes`.
        planes: channels of the 3x3 at groups 1 and base_width 64.
        stride, dilation, groups: of the 3x3.
        downsample: projects the shortcut where shapes differ.
        base_width: the 3x3 has int(planes * base_width / 64) * groups channels.
        norm_layer: called with the number of channels; default `nn.BatchNorm2d`.
    """

    expansion: int = 4

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Callable[..., nn.Module] | None = None,
    ):
        super().__init__()
        norm_layer = norm_layer or nn.BatchNorm2d
        width = int(planes * (base_width / 64.0)) * groups
        self.conv1 = conv1x1(inplanes, width)
        self.bn1 = norm_layer(width)
        self.conv2 = conv3x3(width, width, stride, groups, dilation)
        self.bn2 = norm_layer(width)
        self.conv3 = conv1x1(width, planes * self.expansion)
        self.bn3 = norm_layer(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride

    def _forward(self, x: Tensor) -> Tensor:
        out = functional.conv_bn_act(x, self.conv1, self.bn1, act=self.relu)
        out = functional.conv_bn_act(out, self.conv2, self.bn2, act=self.relu)
        return functional.conv_bn_act(out, self.conv3, self.bn3, shortcut(x, self.downsample), self.relu)
