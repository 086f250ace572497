"""bn_stats, bn_act and their backward in the interpreter, against fp64 autograd."""

import math

import pytest
import torch
from oracle import LAYOUTS, assert_close_to_oracle, assert_same_bits, guarded

from fastres.activation import KINDS, Activation
from fastres.backends import triton_ops
from fastres.ops import torch_primitives

SHAPES = [(2, 5, 4, 7), (2, 9, 3, 1), (1, 3, 1, 1), (6, 10), (2, 3, 2, 3, 4)]


@pytest.fixture
def small_tiles(monkeypatch):
    """Makes reductions of several chunks of several tiles out of tiny tensors."""
    monkeypatch.setattr(triton_ops, "_BLOCK", 32)
    monkeypatch.setattr(triton_ops, "_PROGRAMS", 12)


def _random(shape, dtype=torch.float32, layout="nchw", generator=None):
    value = torch.randn(shape, generator=generator).to(dtype)
    return value.contiguous(memory_format=LAYOUTS[layout]) if value.dim() == 4 else value


def _output(shape, dtype, layout):
    return guarded(shape, dtype, layout=layout)


def _wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def _per_channel(v, x):
    return v.double().view(1, -1, *[1] * (x.dim() - 2))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tiles", ["small_tiles", None])
def test_statistics(shape, dtype, layout, tiles, request):
    if tiles:
        request.getfixturevalue(tiles)
    x = _random(shape, dtype, layout)
    axes = [0, *range(2, x.dim())]
    mean, var = (torch.full((shape[1],), float("nan"), dtype=_wide(dtype)) for _ in range(2))
    triton_ops.bn_stats(x, mean, var)
    wide = x.double()
    k = x.numel() // shape[1]
    assert_close_to_oracle(mean, wide.mean(axes), magnitude=wide.abs().mean(axes), k=k)
    assert_close_to_oracle(var, wide.var(axes, unbiased=False), magnitude=(wide**2).mean(axes), k=k)
    again = [torch.empty_like(mean), torch.empty_like(var)]
    triton_ops.bn_stats(x, *again)
    assert_same_bits(mean, again[0])
    assert_same_bits(var, again[1])


@pytest.mark.parametrize("running", [torch.float32, torch.float16, torch.float64, None])
@pytest.mark.parametrize("affine", [True, False])
def test_finalize_equals_pytorch(running, affine):
    stat = torch.float64 if running == torch.float64 else torch.float32
    c, count = 131, 49
    mean, weight, bias = (torch.randn(c, dtype=stat) for _ in "mwb")
    var = torch.rand(c, dtype=stat)
    vectors = (mean, var, weight, bias) if affine else (mean, var, None, None)
    states = [[None if running is None else torch.full((c,), v).to(running) for v in (0.25, 4)] for _ in "ab"]
    results = [[guarded((c,), stat) for _ in "iss"] for _ in "ab"]
    triton_ops.bn_finalize(*vectors, *states[0], 0.1, 1e-5, count, *(out for out, _ in results[0]))
    torch_primitives.bn_finalize(*vectors, *states[1], 0.1, 1e-5, count, *(out for out, _ in results[1]))
    for (got, check), (want, _) in zip(*results, strict=True):
        check()
        torch.testing.assert_close(got, want)
    for got, want in zip(*states, strict=True):
        if want is not None:
            torch.testing.assert_close(got, want)


def test_variance_of_a_large_offset_does_not_cancel(small_tiles):
    """E[x^2] - E[x]^2 in fp32 would give 0 or worse."""
    x = (1000 + torch.randn(2, 3, 6, 7) * 1e-2).contiguous(memory_format=torch.channels_last)
    mean, var = torch.empty(3), torch.empty(3)
    triton_ops.bn_stats(x, mean, var)
    torch.testing.assert_close(var.double(), x.double().var((0, 2, 3), unbiased=False), rtol=1e-3, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_forward(kind, dtype, layout):
    act = Activation(kind, 0.25)
    for shape in SHAPES[:2]:
        for with_residual in (False, True) if kind == "relu" else (True,):
            x = _random(shape, dtype, layout)
            residual = _random(shape, dtype, layout) if with_residual else None
            scale, shift = (
                torch.randn(shape[1], dtype=_wide(dtype)),
                torch.randn(shape[1], dtype=_wide(dtype)),
            )
            out, check = _output(shape, dtype, layout)
            triton_ops.bn_act(x, residual, scale, shift, act.code, act.param, out)
            check()
            product = x.double() * _per_channel(scale, x)
            other = 0 if residual is None else residual.double()
            ref = act(product + _per_channel(shift, x) + other)
            magnitude = product.abs() + _per_channel(shift, x).abs() + torch.as_tensor(other).abs()
            assert_close_to_oracle(out, ref, magnitude=2 * magnitude)
            x_copy = x.clone(memory_format=torch.preserve_format)
            triton_ops.bn_act(x_copy, residual, scale, shift, act.code, act.param, x_copy)
            assert_same_bits(x_copy, out)


def _backward_reference(grad, x, residual, weight, bias, eps, act, train):
    """Of sum(grad * act(batch_norm(x) + residual)), in fp64; without `train` the statistics are constants."""
    x = x.double().detach().requires_grad_()
    residual = None if residual is None else residual.double().detach().requires_grad_()
    axes = [0, *range(2, x.dim())]
    mean, var = x.mean(axes), x.var(axes, unbiased=False)
    if not train:
        mean, var = mean.detach(), var.detach()
    invstd = 1 / (var + eps).sqrt()
    xhat = (x - _per_channel(mean, x)) * _per_channel(invstd, x)
    z = xhat
    if weight is not None:
        z = z * _per_channel(weight, x)
    if bias is not None:
        z = z + _per_channel(bias, x)
    if residual is not None:
        z = z + residual
    z.retain_grad()
    out = act(z)
    out.backward(grad.double())
    return (
        mean.detach(),
        invstd.detach(),
        out.detach(),
        z.grad,
        x.grad,
        xhat.detach(),
    )


@pytest.mark.parametrize(
    "kind, dtype, layout, affine",
    [
        *((kind, torch.float32, "nhwc", True) for kind in KINDS),
        ("relu", torch.float32, "nchw", True),
        ("silu", torch.float32, "nchw", False),
        ("relu", torch.float64, "nhwc", False),
        ("gelu", torch.float64, "nchw", True),
    ],
)
@pytest.mark.parametrize("tiles", ["small_tiles", None])
def test_backward(kind, dtype, layout, affine, tiles, request):
    if tiles:
        request.getfixturevalue(tiles)
    act, eps = Activation(kind, 0.25), 1e-3
    shape = (2, 3, 5, 4)
    for with_residual in (False, True) if tiles is None else (True,):
        x, grad = _random(shape, dtype, layout), _random(shape, dtype, layout)
        residual = _random(shape, dtype, layout) if with_residual else None
        weight = torch.randn(shape[1], dtype=_wide(dtype)) if affine else None
        bias = torch.randn(shape[1], dtype=_wide(dtype)) if affine else None
        count = x.numel() // shape[1]
        for train in (True, False):
            mean, invstd, out, dz, dx, xhat = _backward_reference(
                grad, x, residual, weight, bias, eps, act, train
            )
            mean, invstd = mean.to(_wide(dtype)), invstd.to(_wide(dtype))
            # As bn_act keeps it: without a residual ReLU's mask is computed from x.
            keeps_out = kind == "relu" and with_residual
            out = out.to(dtype).contiguous(memory_format=LAYOUTS[layout]) if keeps_out else None
            common = (grad, x, residual, out, mean, invstd, weight, bias, act.code, act.param)
            # dz = grad * act'(z): the roundings of z's terms reach act', whose slope is at most about 2.
            terms_z = 1 + xhat.abs() * (1 if weight is None else _per_channel(weight, x).abs())
            terms_z += (0 if bias is None else _per_channel(bias, x).abs()) + (
                0 if residual is None else residual.double().abs()
            )
            steep, wide_grad = 2.0, grad.double().abs() * (1 if kind == "relu" else terms_z)
            sums = [torch.full((shape[1],), math.nan, dtype=_wide(dtype)) for _ in range(2)]
            triton_ops.bn_act_backward_reduce(*common, *sums)
            axes = (0, 2, 3)
            size = [wide_grad.sum(axes), (wide_grad * (1 + xhat.abs())).sum(axes)]
            assert_close_to_oracle(sums[0], dz.sum(axes), magnitude=steep * size[0], k=count)
            assert_close_to_oracle(sums[1], (dz * xhat).sum(axes), magnitude=steep * size[1], k=count)
            again = [torch.empty_like(sums[0]) for _ in range(2)]
            written, check_written = _output(shape, dtype, layout)
            triton_ops.bn_act_backward_reduce(*common, *again, written)
            check_written()
            assert_close_to_oracle(written, dz, magnitude=steep * wide_grad)
            for one, other in zip(sums, again, strict=True):
                assert_same_bits(one, other)
            means = [s / count for s in sums] if train else [None, None]
            grad_x, check_x = _output(shape, dtype, layout)
            grad_residual, check_residual = (
                _output(shape, dtype, layout) if with_residual else (None, lambda: None)
            )
            triton_ops.bn_act_backward(*common, *means, grad_x, grad_residual)
            check_x()
            check_residual()
            scale = _per_channel(invstd if weight is None else invstd * weight, x).abs()
            mean_size = [_per_channel(s / count, x) if train else 0 for s in size]
            terms = wide_grad + mean_size[0] + xhat.abs() * mean_size[1]
            assert_close_to_oracle(grad_x, dx, magnitude=steep * scale * terms, k=4)
            if with_residual:
                assert_close_to_oracle(grad_residual, dz, magnitude=steep * wide_grad)


def test_backward_may_overwrite_its_gradient():
    shape = (2, 8, 3, 5)
    x, grad, out = (_random(shape, layout="nhwc") for _ in range(3))
    mean, invstd, weight = torch.zeros(8), torch.ones(8), torch.randn(8)
    common = (x, None, out, mean, invstd, weight, None, 1, 0.0, torch.randn(8), torch.randn(8))
    grad_x, grad_residual = torch.empty_like(x), torch.empty_like(x)
    triton_ops.bn_act_backward(grad, *common, grad_x, grad_residual)
    shared = grad.clone(memory_format=torch.preserve_format)
    other = torch.empty_like(x)
    triton_ops.bn_act_backward(shared, *common, shared, other)
    assert_same_bits(shared, grad_x)
    assert_same_bits(other, grad_residual)
