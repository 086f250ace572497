"""conv_stats: a convolution with its output's statistics, and the layer that is built on it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastres import ops
from fastres.nn import Bottleneck, functional
from fastres.ops import primitives


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("stride", "groups"), [(1, 1), (2, 2)])
def test_values_statistics_and_gradients(backend, dtype, stride, groups):
    x = torch.randn(3, 4, 7, 9).to(dtype).requires_grad_()
    weight = torch.randn(6, 4 // groups, 3, 3).to(dtype).requires_grad_()
    y, mean, var = ops.conv_stats(x, weight, stride, 1, 1, groups)
    want = F.conv2d(x, weight, None, stride, 1, 1, groups)
    torch.testing.assert_close(y, want)
    exact = y.detach().double()
    torch.testing.assert_close(mean.double(), exact.mean([0, 2, 3]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(var.double(), exact.var([0, 2, 3], correction=0), rtol=1e-5, atol=1e-6)
    grad = torch.randn_like(want)
    got = torch.autograd.grad(y, (x, weight), grad)
    torch.testing.assert_close(got, torch.autograd.grad(want, (x, weight), grad))


def test_gradients_are_exact_twice_in_fp64():
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *args: ops.conv_stats(*args)[0], (x, weight))
    assert torch.autograd.gradgradcheck(lambda *args: ops.conv_stats(*args)[0], (x, weight))


def test_empty_batch():
    y, mean, _ = ops.conv_stats(torch.randn(0, 3, 5, 5), torch.randn(4, 3, 3, 3))
    assert y.shape == (0, 4, 3, 3) and torch.equal(mean, torch.zeros(4))


@pytest.fixture
def kernel(monkeypatch):
    """A stand-in for a kernel that takes 1x1 convolutions alone; the list of what it was called with."""
    calls = []

    def conv_stats(x, weight, stride, padding, dilation, groups, out, mean, var):
        calls.append(tuple(weight.shape))
        out.copy_(F.conv2d(x, weight, None, stride, padding, dilation, groups))
        mean.copy_(out.mean([0, 2, 3]))
        var.copy_(out.var([0, 2, 3], correction=0))

    def conv_stats_takes(x, weight, *geometry):
        return weight.shape[2:] == (1, 1)

    own, every = {"conv_stats": conv_stats, "conv_stats_takes": conv_stats_takes}, primitives.every
    monkeypatch.setattr(primitives, "every", lambda name, x: (own[name],) if name in own else every(name, x))
    return calls


def test_a_kernel_that_emits_statistics_is_used_in_training(request):
    """The layer must take its statistics, and give the same step."""
    conv, bn = nn.Conv2d(4, 6, 1, bias=False).double(), nn.BatchNorm2d(6).double()
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    results = []
    for with_kernel in (False, True):
        calls = request.getfixturevalue("kernel") if with_kernel else []
        bn.reset_running_stats()
        conv.zero_grad()
        out = functional.conv_bn_act(x, conv, bn)
        out.square().sum().backward()
        results.append((out, conv.weight.grad.clone(), bn.running_var.clone()))
    assert calls == [(6, 4, 1, 1)]
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-9)


def test_what_a_kernel_does_not_take_stays_a_convolution(kernel, monkeypatch):
    monkeypatch.setattr(ops, "conv_stats", None)  # the layer must not come here
    x = torch.randn(2, 4, 6, 6)
    for conv in (nn.Conv2d(4, 6, 3, bias=False), nn.Conv2d(4, 6, 1, bias=True)):
        bn = nn.BatchNorm2d(6)
        want = bn(conv(x)).relu()
        torch.testing.assert_close(functional.conv_bn_act(x, conv, bn), want, rtol=1e-5, atol=1e-5)
    empty = functional.conv_bn_act(x[:0], nn.Conv2d(4, 6, 1, bias=False), bn)
    assert empty.shape == (0, 6, 6, 6) and not kernel


def test_the_op_itself_asks_too(kernel):
    x, weight = torch.randn(2, 4, 6, 6), torch.randn(6, 4, 3, 3)
    y, mean, _ = ops.conv_stats(x, weight)
    torch.testing.assert_close(mean, y.mean([0, 2, 3]), rtol=1e-5, atol=1e-6)
    assert not kernel
    ops.conv_stats(x, weight[..., :1, :1])
    assert kernel == [(6, 4, 1, 1)]


def test_a_bottleneck_takes_it_for_its_first_and_last_convolution(kernel):
    block = Bottleneck(16, 4).train()
    block(torch.randn(2, 16, 6, 6)).sum().backward()
    assert kernel == [(4, 16, 1, 1), (16, 4, 1, 1)]
    block.eval()(torch.randn(2, 16, 6, 6))
    assert len(kernel) == 2


def test_bad_input_is_refused_by_name():
    with pytest.raises(ValueError, match="x: expected 3 channels"):
        ops.conv_stats(torch.zeros(1, 2, 5, 5), torch.zeros(4, 3, 3, 3))
