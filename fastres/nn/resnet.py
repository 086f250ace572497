"""ResNet and its factories: constructors, state_dict and initialisation of torchvision's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..calls import Options
from . import functional
from .blocks import BasicBlock, Bottleneck, conv1x1
from .planned import Planned


class ResNet(Planned):
    """A residual network for images, as `torchvision.models.ResNet`.

    Args:
        block: `BasicBlock` or `Bottleneck`, or any class with their constructor.
        layers: blocks of each stage; one to four stages of 64, 128, 256, 512 planes.
        num_classes: rows of the final linear layer.
        zero_init_residual: start every block as the identity (last BN's weight 0; arXiv:1706.02677).
        groups, width_per_group: of the blocks (ResNeXt, Wide ResNet).
        replace_stride_with_dilation: for stages 2 to 4, dilate instead of striding.
        norm_layer: called with the number of channels; default `nn.BatchNorm2d`.
        softmax: in eval mode return probabilities instead of logits.

    forward takes [N, 3, H, W] and returns [N, num_classes].
    """

    _options = Options()

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        layers: Sequence[int],
        num_classes: int = 1000,
        zero_init_residual: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        replace_stride_with_dilation: Sequence[bool] | None = None,
        norm_layer: Callable[..., nn.Module] | None = None,
        softmax: bool = False,
    ):
        super().__init__()
        if not 1 <= len(layers) <= 4:
            raise ValueError(f"layers: expected 1 to 4 stages, got {layers}")
        if replace_stride_with_dilation is None:
            replace_stride_with_dilation = (False, False, False)
        if len(replace_stride_with_dilation) != 3:
            raise ValueError(
                f"replace_stride_with_dilation: expected None or 3 values, got {replace_stride_with_dilation}"
            )
        self._norm_layer = norm_layer or nn.BatchNorm2d
        self.inplanes = 64
        self.dilation = 1
        self.groups = groups
        self.base_width = width_per_group
        self.softmax = softmax
        self.conv1 = nn.Conv2d(3, self.inplanes, 7, 2, 3, bias=False)
        self.bn1 = self._norm_layer(self.inplanes)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.stages = len(layers)
        dilates = (False, *replace_stride_with_dilation)
        for i, blocks in enumerate(layers):
            stage = self._make_layer(block, 64 << i, blocks, stride=min(i + 1, 2), dilate=dilates[i])
            setattr(self, f"layer{i + 1}", stage)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(self.inplanes, num_classes)
        self._initialise(zero_init_residual)

    def _make_layer(
        self, block: type[BasicBlock | Bottleneck], planes: int, blocks: int, stride: int, dilate: bool
    ) -> nn.Sequential:
        norm_layer = self._norm_layer
        before = self.dilation
        if dilate:
            self.dilation *= stride
            stride = 1
        width = planes * block.expansion
        downsample = None
        # The projection is made before its block: random numbers are drawn in torchvision's order.
        if stride != 1 or self.inplanes != width:
            downsample = nn.Sequential(conv1x1(self.inplanes, width, stride), norm_layer(width))
        common = (self.groups, self.base_width)
        stage = [block(self.inplanes, planes, stride, downsample, *common, before, norm_layer)]
        self.inplanes = width
        for _ in range(1, blocks):
            stage.append(block(width, planes, 1, None, *common, self.dilation, norm_layer))
        return nn.Sequential(*stage)

    def _initialise(self, zero_init_residual: bool) -> None:
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(m, nn.BatchNorm2d | nn.GroupNorm) and m.weight is not None:
                nn.init.ones_(m.weight)
                nn.init.zeros_(m.bias)
        if zero_init_residual:
            for m in self.modules():
                last = getattr(m, "bn3", getattr(m, "bn2", None))
                if last is not None and last.weight is not None:
                    nn.init.zeros_(last.weight)

    def _forward(self, x: Tensor) -> Tensor:
        x = functional.conv_bn_act(x, self.conv1, self.bn1, act=self.relu)
        x = self.maxpool(x)
        for i in range(self.stages):
            x = getattr(self, f"layer{i + 1}")(x)
        x = self.fc(torch.flatten(self.avgpool(x), 1))
        return torch.softmax(x, dim=1) if self.softmax and not self.training else x


def _resnet(
    name: str, block: type, layers: list[int], weights: Any, progress: bool, kwargs: dict[str, Any]
) -> ResNet:
    if weights is None:
        return ResNet(block, layers, **kwargs)
    from torchvision.models import get_model_weights

    weights = get_model_weights(name).verify(weights)
    classes = len(weights.meta["categories"])
    if kwargs.setdefault("num_classes", classes) != classes:
        raise ValueError(f"num_classes: {weights} has {classes} classes, got {kwargs['num_classes']}")
    model = ResNet(block, layers, **kwargs)
    model.load_state_dict(weights.get_state_dict(progress=progress, check_hash=True))
    return model


def _factory(name: str, title: str, block: type, layers: list[int], **fixed: int) -> Callable[..., ResNet]:
    def make(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
        for key, value in fixed.items():
            if kwargs.setdefault(key, value) != value:
                raise ValueError(f"{key}: {name} has {value}, got {kwargs[key]}")
        return _resnet(name, block, layers, weights, progress, kwargs)

    make.__name__ = make.__qualname__ = name
    make.__doc__ = f"""{title}, as `torchvision.models.{name}`.

    Args:
        weights: one of torchvision's weights for this network, or its name (then torchvision must be
            installed).
        progress: show the download.
        **kwargs: arguments of `ResNet`.
    """
    return make


resnet18 = _factory("resnet18", "ResNet-18", BasicBlock, [2, 2, 2, 2])
resnet34 = _factory("resnet34", "ResNet-34", BasicBlock, [3, 4, 6, 3])
resnet50 = _factory("resnet50", "ResNet-50", Bottleneck, [3, 4, 6, 3])
resnet101 = _factory("resnet101", "ResNet-101", Bottleneck, [3, 4, 23, 3])
resnet152 = _factory("resnet152", "ResNet-152", Bottleneck, [3, 8, 36, 3])
resnext50_32x4d = _factory(
    "resnext50_32x4d", "ResNeXt-50 32x4d", Bottleneck, [3, 4, 6, 3], groups=32, width_per_group=4
)
resnext101_32x8d = _factory(
    "resnext101_32x8d", "ResNeXt-101 32x8d", Bottleneck, [3, 4, 23, 3], groups=32, width_per_group=8
)
resnext101_64x4d = _factory(
    "resnext101_64x4d", "ResNeXt-101 64x4d", Bottleneck, [3, 4, 23, 3], groups=64, width_per_group=4
)
wide_resnet50_2 = _factory(
    "wide_resnet50_2", "Wide ResNet-50-2", Bottleneck, [3, 4, 6, 3], width_per_group=128
)
wide_resnet101_2 = _factory(
    "wide_resnet101_2", "Wide ResNet-101-2", Bottleneck, [3, 4, 23, 3], width_per_group=128
)


def resnet11(*, softmax: bool = False, **kwargs: Any) -> ResNet:
    """ResNet-11: the stem, one stage of three 64-64-256 bottlenecks, average pool and classifier.

    Args:
        softmax: in eval mode return probabilities.
        **kwargs: arguments of `ResNet`.
    """
    return ResNet(Bottleneck, [3], softmax=softmax, **kwargs)
