"""Drop-in modules: layers, residual blocks and networks with torchvision's constructors and state_dicts."""

from .blocks import BasicBlock, Bottleneck
from .conv_bn_act import BNAct, ConvBNAct
from .resnet import (
    ResNet,
    resnet11,
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
    resnext50_32x4d,
    resnext101_32x8d,
    resnext101_64x4d,
    wide_resnet50_2,
    wide_resnet101_2,
)

__all__ = [
    "BNAct",
    "BasicBlock",
    "Bottleneck",
    "ConvBNAct",
    "ResNet",
    "resnet11",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
]
