"""conv_bn_act: values, gradients and refusals, over dtypes, layouts, geometries and activations."""

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_close_to_oracle

from fastres import ops
from fastres.activation import KINDS, Activation

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# N, C, H, W, K, kernel, stride, padding, dilation, groups
GEOMETRIES = {
    "3x3": (2, 6, 7, 9, 8, 3, 1, 1, 1, 1),
    "1x1": (2, 6, 7, 9, 8, 1, 1, 0, 1, 1),
    "1x1 stride 2": (2, 6, 7, 9, 8, 1, 2, 0, 1, 1),
    "stem": (1, 3, 17, 15, 8, 7, 2, 3, 1, 1),
    "one pixel": (1, 6, 1, 1, 8, 3, 1, 1, 1, 1),
    "groups": (2, 6, 7, 9, 8, 3, 2, 1, 1, 2),
    "dilated": (2, 6, 9, 9, 8, 3, 1, 2, 2, 1),
    "oblong": (2, 6, 7, 9, 8, (3, 1), (2, 1), (0, 2), (1, 3), 1),
}
EPS = 1e-3


class Case:
    def __init__(self, geometry, dtype, layout="nhwc", residual=True, conv_bias=True, norm=True, affine=True):
        n, c, h, w, k, kernel, *self.geometry = GEOMETRIES[geometry]
        kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
        arrange = torch.channels_last if layout == "nhwc" else torch.contiguous_format
        stat = torch.float64 if dtype == torch.float64 else torch.float32
        groups = self.geometry[-1]
        fan_in = c // groups * kernel[0] * kernel[1]
        self.fan_in = fan_in
        self.x = torch.randn(n, c, h, w).to(dtype).contiguous(memory_format=arrange)
        self.weight = (torch.randn(k, c // groups, *kernel) * fan_in**-0.5).to(dtype)
        self.conv_bias = torch.randn(k).to(stat) if conv_bias else None
        self.bn_weight = (torch.rand(k) + 0.5).to(stat) if norm and affine else None
        self.bn_bias = torch.randn(k).to(stat) if norm and affine else None
        self.mean = torch.randn(k).to(stat) if norm else None
        self.var = (torch.rand(k) + 0.5).to(stat) if norm else None
        shape = F.conv2d(self.x.float(), self.weight.float(), None, *self.geometry).shape
        self.residual = torch.randn(shape).to(dtype).contiguous(memory_format=arrange) if residual else None
        # At a kink of an activation the derivative jumps, and rounding decides the side: no gradient there.
        z = eager(self, Activation("identity"), **self.leaves(torch.float64)).detach()
        kinks = torch.tensor([0.0, 6.0, -3.0, 3.0])
        near = ((z.unsqueeze(-1) - kinks).abs() < 0.05).any(-1)
        self.grad = torch.randn(shape).to(dtype).masked_fill(near, 0.0)

    def leaves(self, dtype=None, absolute=False):
        given = {
            "x": self.x,
            "weight": self.weight,
            "conv_bias": self.conv_bias,
            "bn_weight": self.bn_weight,
            "bn_bias": self.bn_bias,
            "residual": self.residual,
        }
        given = {name: t.detach().clone() for name, t in given.items() if t is not None}
        given = {name: (t.abs() if absolute else t).to(dtype or t.dtype) for name, t in given.items()}
        return {name: t.requires_grad_() for name, t in given.items()}

    def run(self, function, act, dtype=None):
        leaves = self.leaves(dtype)
        out = function(self, act, **leaves)
        out.backward(self.grad.to(out.dtype))
        return {"out": out.detach()} | {f"grad_{name}": t.grad for name, t in leaves.items()}

    def magnitudes(self):
        """sum|a||b| behind every result: the same computation over absolute values."""
        leaves = self.leaves(torch.float64, absolute=True)
        out = eager(self, Activation("identity"), sign=-1.0, **leaves)
        out.backward(self.grad.double().abs() * (1.2 * (1 + out.detach())))
        return {"out": 1.2 * out.detach()} | {f"grad_{name}": t.grad for name, t in leaves.items()}


def ours(case, act, x, weight, conv_bias=None, bn_weight=None, bn_bias=None, residual=None):
    return ops.conv_bn_act(
        x,
        weight,
        conv_bias,
        bn_weight,
        bn_bias,
        case.mean,
        case.var,
        EPS,
        *case.geometry,
        residual=residual,
        act=act,
    )


def eager(case, act, x, weight, conv_bias=None, bn_weight=None, bn_bias=None, residual=None, sign=1.0):
    y = F.conv2d(x, weight, None if conv_bias is None else conv_bias.to(x.dtype), *case.geometry)
    if case.mean is not None:
        stat = torch.float64 if x.dtype == torch.float64 else torch.float32
        mean = case.mean.to(stat) if sign > 0 else -case.mean.abs().to(stat)
        y = F.batch_norm(y, mean, case.var.to(stat), bn_weight, bn_bias, False, 0.0, EPS)
    return act(y if residual is None else y + residual)


def check(case, act):
    got, ref, theirs = case.run(ours, act), case.run(eager, act, torch.float64), case.run(eager, act)
    magnitudes = case.magnitudes()
    # Between the two roundings of 16-bit results stands the convolution's own output, rounded as PyTorch's
    # is.
    eps = torch.finfo(case.x.dtype).eps if case.x.element_size() == 2 else None
    for name, value in got.items():
        assert value.dtype == theirs[name].dtype, name
        k = case.fan_in if name in ("out", "grad_residual") else case.fan_in + case.grad[:, 0].numel()
        assert_close_to_oracle(
            value,
            ref[name],
            theirs[name],
            magnitude=magnitudes[name],
            k=1 if eps else k,
            c=1.0 if eps else 4.0,
            eps_acc=eps,
            check_norm=False,
            what=name,
        )
    assert got["out"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients_equal_fp64(backend, dtype, geometry, layout):
    check(Case(geometry, dtype, layout), Activation("relu"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_activation_equals_fp64(backend, dtype, kind):
    check(Case("groups", dtype), Activation(kind, 0.1 if kind == "leaky_relu" else 0.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "absent",
    [("residual",), ("conv_bias",), ("affine",), ("norm",), ("norm", "conv_bias", "residual")],
    ids="-".join,
)
def test_optional_parts_equal_fp64_when_absent(backend, dtype, absent):
    for act in (Activation("relu"), Activation("silu")):
        check(Case("3x3", dtype, **dict.fromkeys(absent, False)), act)


@pytest.mark.parametrize("act", ["relu", "identity", "gelu"])
def test_gradients_are_exact_twice_in_fp64(act):
    x = torch.randn(1, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    vectors = [torch.randn(2, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    residual = torch.randn(1, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    mean, var = torch.randn(2, dtype=torch.float64), torch.rand(2, dtype=torch.float64) + 0.5

    def op(x, weight, conv_bias, bn_weight, bn_bias, residual):
        args = (x, weight, conv_bias, bn_weight, bn_bias, mean, var, 1e-5, 2, 1, 1, 2)
        return ops.conv_bn_act(*args, residual=residual, act=act)

    assert torch.autograd.gradcheck(op, (x, weight, *vectors, residual))
    assert torch.autograd.gradgradcheck(op, (x, weight, *vectors, residual))


@pytest.mark.parametrize("wanted", ["x", "weight", "conv_bias", "bn_weight", "bn_bias", "residual"])
def test_one_wanted_gradient_comes_alone(wanted):
    case = Case("3x3", torch.float32)
    every = case.run(ours, Activation("relu"))
    leaves = {name: t.requires_grad_(name == wanted) for name, t in case.leaves().items()}
    ours(case, Activation("relu"), **leaves).backward(case.grad)
    torch.testing.assert_close(leaves[wanted].grad, every[f"grad_{wanted}"], rtol=1e-5, atol=1e-5)
    assert all(t.grad is None for name, t in leaves.items() if name != wanted)


def test_backward_keeps_no_output_of_the_convolution():
    """Saved: x, weight, four vectors, and the output that the next layer keeps anyway."""
    case, saved = Case("3x3", torch.float32), []
    leaves = case.leaves()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        out = ours(case, Activation("relu"), **leaves)
    big = {leaves["x"].data_ptr(), leaves["weight"].data_ptr(), out.data_ptr()}
    vectors = {t.data_ptr() for t in (leaves["conv_bias"], leaves["bn_weight"], case.mean, case.var)}
    assert set(saved) == big | vectors


def test_empty_batch():
    x = torch.randn(0, 3, 8, 8, requires_grad=True)
    weight = torch.randn(4, 3, 3, 3, requires_grad=True)
    out = ops.conv_bn_act(x, weight, padding=1, residual=torch.randn(0, 4, 8, 8))
    out.sum().backward()
    assert out.shape == (0, 4, 8, 8) and x.grad.shape == x.shape and not weight.grad.any()


def test_expanded_and_strided_inputs():
    weight = torch.randn(4, 3, 3, 3)
    whole, row = torch.randn(2, 3, 8, 16), torch.randn(1, 3, 8, 8)
    for x in (whole[..., ::2], row.expand(2, 3, 8, 8)):
        want = torch.relu(F.conv2d(x.contiguous(), weight))
        torch.testing.assert_close(ops.conv_bn_act(x, weight), want, rtol=1e-5, atol=1e-5)


def test_nan_and_infinity_pass_as_in_pytorch():
    x, weight = torch.randn(1, 2, 4, 4), torch.randn(3, 2, 3, 3)
    x[0, 0, 0, 0], x[0, 1, 3, 3] = float("nan"), float("inf")
    want = torch.relu(F.conv2d(x.contiguous(memory_format=torch.channels_last), weight, padding=1))
    got = ops.conv_bn_act(x, weight, padding=1)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_autocast_computes_in_its_dtype_and_returns_fp32_gradients():
    case = Case("3x3", torch.float32)
    leaves = case.leaves()
    with torch.autocast("cpu", torch.bfloat16):
        out = ours(case, Activation("relu"), **leaves)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in leaves.values())
    ref = eager(case, Activation("relu"), **case.leaves(torch.float64))
    torch.testing.assert_close(out.double(), ref, rtol=2e-2, atol=6e-2)


X, W = torch.zeros(2, 3, 5, 5), torch.zeros(4, 3, 3, 3)
V4, V3 = torch.ones(4), torch.ones(3)


@pytest.mark.parametrize(
    ("arguments", "keywords", "error", "message"),
    [
        ((X[0], W), {}, ValueError, "x: expected 4 dimensions, got 3"),
        ((X, W[0]), {}, ValueError, "weight: expected 4 dimensions, got 3"),
        ((X.byte(), W), {}, TypeError, "x: expected float16.*got torch.uint8"),
        ((X, W.half()), {}, TypeError, "weight: expected the dtype of x, torch.float32, got torch.float16"),
        ((X, W.to("meta")), {}, ValueError, "weight: expected the device of x, cpu, got meta"),
        ((X[:, :2], W), {}, ValueError, r"x: expected 3 channels for weight \(4, 3, 3, 3\), got 2"),
        ((X, W), {"groups": 3}, ValueError, "groups: expected a divisor of the 4 output channels, got 3"),
        ((X, W, V3), {}, ValueError, "conv_bias: expected one value for each of 4 channels"),
        (
            (X, W, None, V3, None, V4, V4),
            {},
            ValueError,
            "bn_weight: expected one value for each of 4 channels",
        ),
        ((X, W, None, None, None, V4), {}, ValueError, "mean, var: give both or neither"),
        ((X, W, None, V4), {}, ValueError, "bn_weight, bn_bias: expected None without mean and var"),
        ((X, W), {"stride": 0}, ValueError, "stride: expected at least 1, got"),
        ((X, W), {"padding": -1}, ValueError, "padding: expected at least 0, got"),
        ((X, W), {"padding": "same"}, ValueError, "padding: expected an int or two, got 'same'"),
        ((X, W), {"dilation": 3}, ValueError, r"x: \(5, 5\) pixels are too few for a \(3, 3\) kernel"),
        ((X, W), {"residual": X}, ValueError, r"residual: expected shape \(2, 4, 3, 3\), got \(2, 3, 5, 5\)"),
        (
            (X, W),
            {"residual": torch.zeros(2, 4, 3, 3).half()},
            TypeError,
            "residual: expected the dtype of x",
        ),
    ],
)
def test_bad_input_is_refused_by_name(arguments, keywords, error, message):
    with pytest.raises(error, match=message):
        ops.conv_bn_act(*arguments, **keywords)
