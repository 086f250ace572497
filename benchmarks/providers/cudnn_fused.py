"""A forward written by hand over ATen's fused cuDNN ops, BN folded: the most that PyTorch itself can give.

`aten::cudnn_convolution_relu` and `aten::cudnn_convolution_add_relu` run convolution, bias (residual) and
ReLU as one cuDNN call. Nobody ships this; it is the baseline to beat on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import modules
from benchmarks.case import Call, Case, Subject
from benchmarks.providers.base import Provider, folded
from benchmarks.providers.eager import graphed


def _conv(conv: nn.Conv2d, x: Tensor) -> Tensor:
    return F.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)


def _conv_relu(conv: nn.Conv2d, x: Tensor) -> Tensor:
    return torch.ops.aten.cudnn_convolution_relu(
        x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups
    )


def _conv_add_relu(conv: nn.Conv2d, x: Tensor, z: Tensor) -> Tensor:
    return torch.ops.aten.cudnn_convolution_add_relu(
        x, conv.weight, z, 1.0, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups
    )


def _conv_bn_act(m: modules.ConvBNAct, x: Tensor) -> Tensor:
    return _conv_relu(m.conv, x) if isinstance(m.relu, nn.ReLU) else _conv(m.conv, x)


def _conv_bn_add_act(m: modules.ConvBNAddAct, x: Tensor, z: Tensor) -> Tensor:
    return _conv_add_relu(m.conv, x, z)


def _dual(m: modules.Dual, x: Tensor, y: Tensor) -> Tensor:
    return _conv_add_relu(m.expand, y, _conv(m.shortcut, x))


def _expand_reduce(m: modules.ExpandReduce, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    out = _conv_add_relu(m.expand, y, z)
    return out, _conv_relu(m.reduce, out)


def _shifted_block(m: modules.ShiftedBlock, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    return _expand_reduce(m, _conv_relu(m.conv, y), z)


def _stem_pool(m: modules.StemPool, x: Tensor) -> Tensor:
    return m.maxpool(_conv_relu(m.conv, x))


def _shortcut(block: nn.Module, x: Tensor) -> Tensor:
    return x if block.downsample is None else _conv(block.downsample[0], x)


def _basic(block: nn.Module, x: Tensor) -> Tensor:
    return _conv_add_relu(block.conv2, _conv_relu(block.conv1, x), _shortcut(block, x))


def _bottleneck(block: nn.Module, x: Tensor) -> Tensor:
    y = _conv_relu(block.conv2, _conv_relu(block.conv1, x))
    return _conv_add_relu(block.conv3, y, _shortcut(block, x))


def _resnet(model: nn.Module, x: Tensor) -> Tensor:
    x = model.maxpool(_conv_relu(model.conv1, x))
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        for block in stage:
            x = (_bottleneck if hasattr(block, "conv3") else _basic)(block, x)
    return model.fc(torch.flatten(model.avgpool(x), 1))


def _forward(module: nn.Module) -> Callable[..., object] | None:
    table: dict[type, Callable[..., object]] = {
        modules.ConvBNAct: _conv_bn_act,
        modules.ConvBNAddAct: _conv_bn_add_act,
        modules.Dual: _dual,
        modules.ExpandReduce: _expand_reduce,
        modules.ShiftedBlock: _shifted_block,
        modules.StemPool: _stem_pool,
    }
    from torchvision.models import resnet

    table |= {resnet.BasicBlock: _basic, resnet.Bottleneck: _bottleneck, resnet.ResNet: _resnet}
    return table.get(type(module))


class CudnnFused(Provider):
    name = "cuDNN fused ops"

    def skip(self, case: Case) -> str:
        if case.device.type != "cuda":
            return "needs a CUDA GPU"
        return "" if torch.backends.cudnn.is_available() else "needs cuDNN"

    def build(self, subject: Subject, case: Case) -> Call:
        forward = _forward(subject.module)
        if forward is None:
            raise NotImplementedError(f"no hand-written forward for {type(subject.module).__name__}")
        call = partial(forward, folded(subject, case))
        return graphed(call, subject.inputs) if case.clock == "call" else call


PROVIDERS = [CudnnFused()]
