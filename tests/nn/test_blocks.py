"""Layers and blocks against torchvision's."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torchvision.models import resnet as theirs

import fastres.nn as ours
from fastres.activation import Activation

BLOCKS = {
    "basic": ("BasicBlock", {"inplanes": 8, "planes": 8}),
    "basic stride 2": ("BasicBlock", {"inplanes": 8, "planes": 16, "stride": 2}),
    "bottleneck": ("Bottleneck", {"inplanes": 32, "planes": 8}),
    "bottleneck stride 2": ("Bottleneck", {"inplanes": 16, "planes": 8, "stride": 2}),
    "grouped": ("Bottleneck", {"inplanes": 32, "planes": 8, "groups": 4, "base_width": 32}),
    "dilated": ("Bottleneck", {"inplanes": 32, "planes": 8, "dilation": 2}),
}


def pair(name, norm_layer=None):
    """The same block of both libraries with the same weights, fp64."""
    kind, arguments = BLOCKS[name]
    blocks = []
    for library in (ours, theirs):
        torch.manual_seed(3)
        block = getattr(library, kind)
        width, stride = arguments["planes"] * block.expansion, arguments.get("stride", 1)
        downsample = None
        if stride != 1 or arguments["inplanes"] != width:
            norm = (norm_layer or nn.BatchNorm2d)(width)
            downsample = nn.Sequential(nn.Conv2d(arguments["inplanes"], width, 1, stride, bias=False), norm)
        blocks.append(block(**arguments, downsample=downsample, norm_layer=norm_layer).double())
    return blocks


def step(block, x):
    x = x.clone().requires_grad_()
    out = block(x)
    out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape))
    return [out.detach(), x.grad, *(p.grad for p in block.parameters()), *block.buffers()]


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("image", [(9, 7), (1, 1), (8, 8)])
def test_same_weights_same_output_gradients_and_statistics(name, image):
    fast, reference = pair(name)
    x = torch.randn(3, BLOCKS[name][1]["inplanes"], *image, dtype=torch.float64)
    for mode in (True, False):
        for block in (fast.train(mode), reference.train(mode)):
            block.zero_grad()
        torch.testing.assert_close(step(fast, x), step(reference, x), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", ["basic stride 2", "bottleneck stride 2"])
@pytest.mark.parametrize("norm_layer", [lambda n: nn.GroupNorm(2, n), nn.InstanceNorm2d, nn.SyncBatchNorm])
def test_other_norms_give_torchvisions_result(name, norm_layer):
    fast, reference = pair(name, norm_layer)
    x = torch.randn(2, BLOCKS[name][1]["inplanes"], 9, 7, dtype=torch.float64)
    for block in (fast, reference):
        block.train(norm_layer is not nn.SyncBatchNorm)
    torch.testing.assert_close(step(fast, x), step(reference, x), rtol=1e-8, atol=1e-9)


def test_replaced_parts_act():
    fast, reference = pair("bottleneck")
    for block in (fast, reference):
        block.relu = nn.SiLU()
        block.bn2 = nn.Identity()
    x = torch.randn(2, 32, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(step(fast, x), step(reference, x), rtol=1e-8, atol=1e-9)


def test_a_downsample_of_any_shape_acts():
    fast, reference = pair("bottleneck stride 2")
    for block in (fast, reference):
        block.downsample.insert(0, nn.AvgPool2d(2, 2, ceil_mode=True))
        block.downsample[1].stride = (1, 1)
    x = torch.randn(2, 16, 9, 7, dtype=torch.float64)
    torch.testing.assert_close(step(fast, x), step(reference, x), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", ["basic", "bottleneck"])
def test_copies_and_pickles_compute_the_same_and_share_nothing(name):
    fast, _ = pair(name)
    fast.eval()
    x = torch.randn(1, BLOCKS[name][1]["inplanes"], 5, 5, dtype=torch.float64)
    with torch.no_grad():
        want = fast(x)
        saved = io.BytesIO()
        torch.save(fast, saved)
        saved.seek(0)
        copies = [
            copy.deepcopy(fast),
            pickle.loads(pickle.dumps(fast)),
            torch.load(saved, weights_only=False),
        ]
        fast.conv1.weight.zero_()
        for other in copies:
            torch.testing.assert_close(other(x), want)
        assert not torch.equal(fast(x), want)


def test_load_state_dict_with_assign_and_half():
    fast, _ = pair("bottleneck")
    other, reference = pair("bottleneck")
    other.load_state_dict(fast.state_dict(), assign=True)
    half = copy.deepcopy(other).eval().half()
    x = torch.randn(2, 32, 5, 5)
    reference.load_state_dict(fast.state_dict())
    want = reference.eval()(x.double())
    torch.testing.assert_close(half(x.half()).double(), want, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(other.eval()(x.double()), want)


def test_arguments_that_torchvision_refuses_are_refused():
    with pytest.raises(ValueError, match="groups, base_width"):
        ours.BasicBlock(8, 8, groups=2)
    with pytest.raises(NotImplementedError, match="dilation"):
        ours.BasicBlock(8, 8, dilation=2)


@pytest.mark.parametrize("act", ["relu", "silu", Activation("leaky_relu", 0.2)], ids=str)
def test_conv_bn_act_layer_is_the_three_modules(act):
    layer = ours.ConvBNAct(4, 8, (3, 5), stride=2, dilation=(1, 2), act=act).double()
    x, residual = torch.randn(2, 4, 9, 8, dtype=torch.float64), torch.randn(2, 8, 5, 4, dtype=torch.float64)
    for mode in (True, False):
        layer.train(mode)
        reference = copy.deepcopy(layer)
        want = reference.act(reference.bn(reference.conv(x)) + residual)
        torch.testing.assert_close(layer(x, residual), want)
        torch.testing.assert_close(layer.state_dict(), reference.state_dict())
    assert list(layer.state_dict())[:2] == ["conv.weight", "bn.weight"]


def test_bn_act_layer_survives_conversion_to_sync_batch_norm():
    layer = ours.BNAct(4, act="silu")
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(layer)).eval()
    x, residual = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    assert isinstance(converted.bn, nn.SyncBatchNorm)
    torch.testing.assert_close(converted(x, residual), layer.eval()(x, residual))
