"""Folding a BN: fp32 arithmetic held to fp64, every form of BN and bias."""

import pytest
import torch
from torch import nn

from fastres.graph.fold import LayerParameters
from fastres.graph.ir import Conv, Linear, Normalize


def node(bias: bool, affine: bool, eps: float = 1e-5, dtype=torch.float32, groups: int = 1) -> Conv:
    conv = nn.Conv2d(8, 6, 3, bias=bias, groups=groups)
    bn = nn.BatchNorm2d(6, eps=eps, affine=affine).eval()
    with torch.no_grad():
        bn.running_mean.uniform_(-3, 3), bn.running_var.uniform_(1e-4, 4)
        if affine:
            bn.weight.uniform_(-2, 2), bn.bias.uniform_(-1, 1)
    return Conv(name="conv", output=1, x=0, conv=conv.to(dtype), bn=bn)


@pytest.mark.parametrize("eps", [1e-5, 1e-3, 1.0])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_folded_layer_is_the_layer_with_its_bn_in_fp64(bias, affine, eps, dtype):
    one = node(bias, affine, eps, dtype)
    weight, shift = LayerParameters(one).folded()
    assert weight.dtype == shift.dtype == torch.float32
    x = torch.randn(2, 8, 5, 5, dtype=torch.float64)
    with torch.no_grad():
        expected = one.bn.double()(one.conv.double()(x))
        got = nn.functional.conv2d(x, weight.double(), shift.double())
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("parameters", [torch.float32, torch.float64])
def test_fp64_activations_get_fp64_constants(parameters):
    one = node(True, True, dtype=parameters)
    weight, shift = LayerParameters(one, torch.float64).folded()
    assert weight.dtype == shift.dtype == torch.float64
    x = torch.randn(2, 8, 5, 5, dtype=torch.float64)
    with torch.no_grad():
        expected = one.bn.double()(one.conv.double()(x))
    torch.testing.assert_close(nn.functional.conv2d(x, weight, shift), expected, rtol=1e-12, atol=1e-12)


def test_scale_and_shift_are_what_the_epilogue_applies():
    one = node(True, True)
    parameters = LayerParameters(one)
    scale, shift = parameters.scale_shift()
    x = torch.randn(2, 8, 5, 5)
    with torch.no_grad():
        bare = nn.functional.conv2d(x, one.conv.weight)
        torch.testing.assert_close(bare * scale.view(-1, 1, 1) + shift.view(-1, 1, 1), one.bn(one.conv(x)))


def test_without_bn_the_scale_is_one_and_the_shift_the_bias():
    conv = nn.Conv2d(4, 6, 3)
    parameters = LayerParameters(Conv(name="conv", output=1, x=0, conv=conv))
    scale, shift = parameters.scale_shift()
    assert torch.equal(scale, torch.ones(6)) and torch.equal(shift, conv.bias.detach())
    assert shift.data_ptr() != conv.bias.data_ptr(), "a constant never is the parameter"


def test_what_is_read_carries_no_gradient():
    for one in (node(True, True), Linear(name="fc", output=1, x=0, linear=nn.Linear(4, 3))):
        parameters = LayerParameters(one)
        tensors = [parameters.weight, parameters.bias, *parameters.scale_shift(), *parameters.folded()]
        assert not any(t.requires_grad for t in tensors)


def test_normalisation_constants_are_as_given():
    parameters = LayerParameters(Normalize(name="n", output=1, x=0, mean=(0.1, 0.2), std=(0.3, 0.4)))
    assert parameters.weight is None
    torch.testing.assert_close(
        (parameters.mean, parameters.std), (torch.tensor([0.1, 0.2]), torch.tensor([0.3, 0.4]))
    )
