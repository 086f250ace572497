"""The C++ kernels of kernels/cpu against fp64: every dtype, both memory orders, odd sizes, bad input."""

import pytest
import torch
import torch.nn.functional as F
from oracle import LAYOUTS, assert_close_to_oracle, assert_same_bits, guarded, integers

from fastres import native
from fastres.backends import cpu_ops
from fastres.ops import torch_primitives

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# Whole vectors, tails, one channel, one pixel, three channels, two and three dimensions, nothing.
SHAPES = [
    (2, 64, 7, 9),
    (3, 5, 3, 3),
    (1, 1, 1, 1),
    (2, 33, 1, 1),
    (1, 3, 13, 21),
    (2, 1, 6, 5),
    (5, 24, 11),
    (7, 20),
]
EMPTY = [(0, 8, 4, 4), (2, 8, 0, 4)]

# Codes of fastres/activation.py, with a parameter for the one that takes it.
ACTIVATIONS = {
    "identity": (0, 0.0, lambda z: z),
    "relu": (1, 0.0, torch.relu),
    "relu6": (2, 0.0, F.relu6),
    "silu": (3, 0.0, F.silu),
    "gelu": (4, 0.0, F.gelu),
    "leaky_relu": (5, 0.1, lambda z: F.leaky_relu(z, 0.1)),
    "gelu_tanh": (6, 0.0, lambda z: F.gelu(z, approximate="tanh")),
    "hardswish": (7, 0.0, F.hardswish),
}
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
each_layout = pytest.mark.parametrize("layout", LAYOUTS)
each_shape = pytest.mark.parametrize("shape", SHAPES + EMPTY, ids=str)
each_act = pytest.mark.parametrize("act", ACTIVATIONS)


@pytest.fixture(autouse=True)
def library():
    if (why := native.available("cpu")) is not None:
        pytest.skip(f"no C++ CPU kernels: {why}")


def arrange(t, layout):
    return t.contiguous(memory_format=LAYOUTS[layout]) if t.dim() == 4 else t.contiguous()


def activations(shape, dtype, layout, *, scale=1.0):
    return arrange((torch.randn(shape, dtype=torch.float64) * scale).to(dtype), layout)


def channels(shape, dtype, low=-1.0, high=1.0):
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    return torch.empty(shape[1], dtype=acc).uniform_(low, high)


def per_channel(t, like):
    """[C] as fp64, ready to be multiplied with [N, C, *spatial]."""
    return t.double().view(1, -1, *[1] * (like.dim() - 2))


def over_channel(t):
    return [d for d in range(t.dim()) if d != 1]


@each_dtype
@each_layout
@each_shape
def test_add_relu_is_pytorchs_to_the_bit(shape, dtype, layout):
    a, b = activations(shape, dtype, layout), activations(shape, dtype, layout)
    out, check = guarded(shape, dtype, layout=layout)
    cpu_ops.add_relu(a, b, out)
    check()
    assert_close_to_oracle(
        out, torch.relu(a.double() + b.double()), magnitude=a.double().abs() + b.double().abs()
    )
    assert_same_bits(out, torch.relu(a + b))
    expected = out.clone()
    cpu_ops.add_relu(a, b, a)
    assert_same_bits(a, expected, "in place")


@each_dtype
@each_layout
@each_shape
def test_add_relu_backward_is_pytorchs_to_the_bit(shape, dtype, layout):
    grad, out = activations(shape, dtype, layout), torch.relu(activations(shape, dtype, layout))
    grad_in, check = guarded(shape, dtype, layout=layout)
    cpu_ops.add_relu_backward(grad, out, grad_in)
    check()
    assert_same_bits(grad_in, torch.ops.aten.threshold_backward(grad, out, 0))
    cpu_ops.add_relu_backward(grad, out, grad)
    assert_same_bits(grad, grad_in, "in place")


@each_dtype
@each_layout
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bn_stats(shape, dtype, layout):
    x = activations(shape, dtype, layout) + 0.5
    mean, var = channels(shape, dtype), channels(shape, dtype)
    cpu_ops.bn_stats(x, mean, var)
    dims, k = over_channel(x), x.numel() // shape[1]
    want_var, want_mean = torch.var_mean(x.double(), dims, correction=0)
    assert_close_to_oracle(mean, want_mean, magnitude=x.double().abs().mean(dims), k=k, what="mean")
    assert_close_to_oracle(var, want_var, magnitude=want_var, k=k, what="var")


@each_layout
@pytest.mark.parametrize("shape", [(8, 70, 20, 20), (2, 5, 90, 90)], ids=str)
def test_bn_stats_keep_their_digits_far_from_zero(shape, layout):
    """A one-pass sum of squares would lose all of them: the mean is 10,000 deviations away, and drifts."""
    drift = torch.linspace(0, 1000, shape[0]).view(-1, 1, 1, 1)
    x = arrange(torch.randn(shape) + 10000 + drift, layout)
    mean, var = torch.empty(shape[1]), torch.empty(shape[1])
    cpu_ops.bn_stats(x, mean, var)
    want_var, want_mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    assert_close_to_oracle(mean, want_mean, what="mean")
    assert_close_to_oracle(var, want_var, what="var")


@each_layout
def test_bn_stats_of_integers_are_exact(layout):
    half = integers((2, 40, 8, 8), torch.bfloat16)
    x = arrange(torch.cat([half, -half + 2]), layout)  # mean 1: no rounding anywhere
    mean, var = torch.empty(40), torch.empty(40)
    cpu_ops.bn_stats(x, mean, var)
    want_var, want_mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    assert torch.equal(mean, want_mean.float()) and torch.equal(var, want_var.float())


@each_layout
def test_bn_stats_of_nan_and_inf_stay_in_their_channel(layout):
    x = activations((2, 20, 9, 9), torch.float32, layout)
    x[1, 3, 4, 4], x[0, 7, 0, 0], x[1, 9, 8, 8] = float("nan"), float("inf"), float("-inf")
    mean, var = torch.empty(20), torch.empty(20)
    cpu_ops.bn_stats(x, mean, var)
    bad = torch.zeros(20, dtype=torch.bool)
    bad[[3, 7, 9]] = True
    assert torch.equal(var.isnan(), bad)
    assert mean[3].isnan() and mean[7] == float("inf") and mean[9] == float("-inf")
    assert mean[~bad].isfinite().all()


@each_dtype
@each_layout
@each_act
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
def test_bn_act(act, residual, dtype, layout):
    for shape in SHAPES + EMPTY:
        code, param, reference = ACTIVATIONS[act]
        x = activations(shape, dtype, layout, scale=3)
        r = activations(shape, dtype, layout, scale=3) if residual else None
        scale, shift = channels(shape, dtype), channels(shape, dtype)
        out, check = guarded(shape, dtype, layout=layout)
        cpu_ops.bn_act(x, r, scale, shift, code, param, out)
        check()
        r64 = r.double() if residual else torch.zeros((), dtype=torch.float64)
        terms = x.double() * per_channel(scale, x), per_channel(shift, x), r64
        magnitude = sum(t.abs() for t in terms)
        assert_close_to_oracle(out, reference(sum(terms)), magnitude=magnitude, k=3, what=f"{shape}")
        target = r if residual else x
        cpu_ops.bn_act(x, r, scale, shift, code, param, target)
        assert_same_bits(target, out, f"{shape}, in place")


@each_dtype
@each_act
def test_bn_act_lets_nan_and_inf_through_as_pytorch_does(act, dtype):
    code, param, reference = ACTIVATIONS[act]
    special = torch.tensor([float("nan"), float("inf"), float("-inf"), 0.0, -100.0, 100.0, 20.0, -20.0])
    x = special.to(dtype).view(1, 1, 2, 4)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    out = torch.empty_like(x)
    cpu_ops.bn_act(x, None, torch.ones(1, dtype=acc), torch.zeros(1, dtype=acc), code, param, out)
    # PyTorch in fp64: its own fp32 gelu(inf) is NaN.
    assert_close_to_oracle(out, reference(x.double()), magnitude=x.double().abs().nan_to_num(0, 0, 0))


def backward_case(shape, dtype, layout, act, residual):
    """Inputs of the backward ops; dz and xhat in fp64; and how large what they are computed from is."""
    code, param, reference = ACTIVATIONS[act]
    x = activations(shape, dtype, layout, scale=2)
    r = activations(shape, dtype, layout) if residual else None
    grad = activations(shape, dtype, layout)
    mean, invstd = channels(shape, dtype), channels(shape, dtype, 0.3, 0.8)
    weight, bias = channels(shape, dtype, 0.5, 1.5), channels(shape, dtype)
    xhat = (x.double() - per_channel(mean, x)) * per_channel(invstd, x)
    z = xhat * per_channel(weight, x) + per_channel(bias, x) + (r.double() if residual else 0)
    z.requires_grad_()
    y = reference(z)
    out = arrange(y.detach().to(dtype), layout)
    if act == "relu":
        dz = grad.double() * (out > 0)  # the saved output decides, as in PyTorch
    else:
        (dz,) = torch.autograd.grad(y, z, grad.double())
    args = (grad, x, r, out if act == "relu" else None, mean, invstd, weight, bias, code, param)
    # (x - mean) has the rounding of x and of mean; act' is off by about |z|, gelu_tanh's by its cubic.
    size = (x.double().abs() + per_channel(mean, x).abs()) * per_channel(invstd, x)
    size_z = (
        size * per_channel(weight, x) + per_channel(bias, x).abs() + (r.double().abs() if residual else 0)
    )
    near = grad.double().abs() * (1 + size_z + 0.0715 * size_z**3)
    return args, dz, xhat, size, near


@each_dtype
@each_layout
@each_act
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
def test_bn_act_backward(act, residual, dtype, layout):
    for shape in SHAPES + EMPTY:
        args, dz, xhat, size, near = backward_case(shape, dtype, layout, act, residual)
        x, invstd, weight = args[1], args[5], args[6]
        sum_dy, sum_dy_xhat = channels(shape, dtype), channels(shape, dtype)
        cpu_ops.bn_act_backward_reduce(*args, sum_dy, sum_dy_xhat)
        (written, check), alone = guarded(shape, dtype, layout=layout), (sum_dy.clone(), sum_dy_xhat.clone())
        cpu_ops.bn_act_backward_reduce(*args, sum_dy, sum_dy_xhat, written)
        check()
        assert_close_to_oracle(written, dz, magnitude=near, k=2, what=f"dz of the sums {shape}")
        for once, again in zip(alone, (sum_dy, sum_dy_xhat), strict=True):
            assert_same_bits(once, again)
        dims, k = over_channel(x), max(1, x.numel() // shape[1])
        assert_close_to_oracle(sum_dy, dz.sum(dims), magnitude=near.sum(dims), k=k, what=f"sum_dy {shape}")
        assert_close_to_oracle(
            sum_dy_xhat,
            (dz * xhat).sum(dims),
            magnitude=(near * size).sum(dims),
            k=k,
            what=f"sum_dy_xhat {shape}",
        )
        factor = per_channel(weight * invstd, x)
        mean_dy, mean_dy_xhat = sum_dy / k, sum_dy_xhat / k
        for means in ((mean_dy, mean_dy_xhat), (None, None)):
            grad_x, check = guarded(shape, dtype, layout=layout)
            grad_residual, check_residual = guarded(shape, dtype, layout=layout)
            cpu_ops.bn_act_backward(*args, *means, grad_x, grad_residual if residual else None)
            check()
            check_residual()
            want, magnitude = dz, near
            if means[0] is not None:
                a, b = per_channel(mean_dy, x), per_channel(mean_dy_xhat, x)
                want, magnitude = dz - a - xhat * b, near + a.abs() + size * b.abs()
            assert_close_to_oracle(
                grad_x, factor * want, magnitude=factor * magnitude, k=4, what=f"grad_x {shape}"
            )
            if residual:
                assert_close_to_oracle(grad_residual, dz, magnitude=near, k=2, what=f"grad_residual {shape}")


@each_layout
@pytest.mark.parametrize("act", ["relu", "silu"])
def test_bn_act_backward_is_autograds(act, layout):
    """The whole chain in fp64: conv-free BN in training mode, residual, activation."""
    code, param, reference = ACTIVATIONS[act]
    x, r = (activations((4, 6, 5, 3), torch.float64, layout).requires_grad_() for _ in range(2))
    weight, bias = (channels((0, 6), torch.float64).requires_grad_() for _ in range(2))
    y = reference(F.batch_norm(x, None, None, weight, bias, training=True, eps=1e-5) + r)
    grad = activations((4, 6, 5, 3), torch.float64, layout)
    want = torch.autograd.grad(y, (x, r, weight, bias), grad)
    x, r, weight, bias, y = (t.detach() for t in (x, r, weight, bias, y))
    mean, var = channels(x.shape, x.dtype), channels(x.shape, x.dtype)
    cpu_ops.bn_stats(x, mean, var)
    args = (grad, x, r, arrange(y, layout), mean, (var + 1e-5).rsqrt(), weight, bias, code, param)
    dy, dy_xhat, grad_x, grad_r = mean.clone(), mean.clone(), torch.empty_like(x), torch.empty_like(x)
    cpu_ops.bn_act_backward_reduce(*args, dy, dy_xhat)
    cpu_ops.bn_act_backward(*args, dy / 60, dy_xhat / 60, grad_x, grad_r)
    for got, expected in zip((grad_x, grad_r, dy_xhat, dy), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@each_layout
def test_bn_act_backward_without_weight_and_bias_takes_one_and_zero(layout):
    args, *_ = backward_case((2, 20, 3, 3), torch.float32, layout, "silu", False)
    one, zero = torch.ones(20), torch.zeros(20)
    results = []
    for weight, bias in ((None, None), (one, zero)):
        now = (*args[:6], weight, bias, *args[8:])
        sums, grad_x = [torch.empty(20), torch.empty(20)], torch.empty_like(args[1])
        cpu_ops.bn_act_backward_reduce(*now, *sums)
        cpu_ops.bn_act_backward(*now, *sums, grad_x, None)
        results.append((*sums, grad_x))
    for a, b in zip(*results, strict=True):
        assert_same_bits(a, b)


POOLS = {
    "3x3/2": ((3, 3), (2, 2), (1, 1), (1, 1), False),
    "2x2/2 up": ((2, 2), (2, 2), (0, 0), (1, 1), True),
    "3x3/2 up": ((3, 3), (2, 2), (1, 1), (1, 1), True),
    "3x2/1": ((3, 2), (1, 1), (1, 0), (1, 1), False),
    "2x3/3 dilated": ((2, 3), (3, 2), (1, 1), (2, 2), False),
    "5x5/3": ((5, 5), (3, 3), (2, 2), (1, 1), True),
}


@each_dtype
@each_layout
@pytest.mark.parametrize("pool", POOLS)
def test_max_pool2d_is_pytorchs_to_the_bit(pool, dtype, layout):
    *window, up = POOLS[pool]
    for shape in [(2, 64, 14, 15), (1, 5, 9, 33), (2, 1, 7, 7), (1, 20, 5, 5), (0, 4, 8, 8)]:
        x = activations(shape, dtype, layout)
        if x.numel():
            x[0, 0, 1, 2], x[0, 0, 4, 4], x[-1, -1, 0, 0] = float("nan"), float("inf"), float("-inf")
        want = F.max_pool2d(x, *window, ceil_mode=up)
        out, check = guarded(want.shape, dtype, layout=layout)
        cpu_ops.max_pool2d(x, *window, out)
        check()
        assert torch.equal(out.isnan(), want.isnan()) and torch.equal(
            out.nan_to_num(7), want.nan_to_num(7)
        ), shape


def test_max_pool2d_of_one_pixel_may_grow():
    x = torch.randn(2, 20, 1, 1)
    for layout in LAYOUTS:
        out = torch.empty(2, 20, 2, 2).to(memory_format=LAYOUTS[layout])
        cpu_ops.max_pool2d(x, (2, 2), (1, 1), (1, 1), (1, 1), out)
        assert torch.equal(out, F.max_pool2d(x, 2, 1, 1))


@each_dtype
@each_layout
@pytest.mark.parametrize(
    "shape", [(2, 64, 7, 7), (3, 5, 3, 3), (2, 33, 1, 1), (1, 700, 13, 21), (0, 8, 4, 4)], ids=str
)
def test_global_avg_pool(shape, dtype, layout):
    x = activations(shape, dtype, layout)
    out, check = guarded(shape[:2], dtype)
    cpu_ops.global_avg_pool(x, out)
    check()
    k = shape[2] * shape[3]
    assert_close_to_oracle(out, x.double().mean((2, 3)), magnitude=x.double().abs().mean((2, 3)), k=k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape",
    [
        (2, 3, 37, 41),
        (1, 3, 64, 64),
        (2, 20, 5, 7),
        (1, 33, 40, 40),
        (2, 1, 4, 4),
        (2, 8, 1, 1),
        (0, 3, 4, 4),
    ],
    ids=str,
)
def test_to_nhwc_is_pytorchs_to_the_bit(shape, dtype):
    x = torch.randn(shape)
    out, check = guarded(shape, dtype)
    cpu_ops.to_nhwc(x, out)
    check()
    assert_same_bits(out, x.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_to_16_bits_is_pytorchs_for_every_exponent(dtype):
    """All 65,536 upper halves with three lower ones: ties, subnormals, overflow, NaN."""
    high = torch.arange(65536, dtype=torch.int64) << 16
    for low in (0x0000, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        x = (high + low).to(torch.uint32).view(torch.float32).view(1, 1, 256, 256)
        out = torch.empty(x.shape, dtype=dtype)
        cpu_ops.to_nhwc(x, out)
        want = x.to(dtype)
        assert torch.equal(out.isnan(), want.isnan())
        assert_same_bits(out[~out.isnan()], want[~want.isnan()])


@each_layout
@pytest.mark.parametrize("shape", [(4, 64, 40, 40), (3, 5, 90, 90), (4, 520, 14, 14)], ids=str)
def test_results_do_not_depend_on_the_number_of_threads(shape, layout, threads):
    args, *_ = backward_case(shape, torch.float32, layout, "relu", True)
    _, x, r = args[:3]
    results = []
    for n in (1, 2, 3):
        threads(n)
        c = [torch.empty(shape[1]) for _ in range(4)]
        t = [torch.empty_like(x) for _ in range(4)]
        cpu_ops.bn_stats(x, c[0], c[1])
        cpu_ops.bn_act_backward_reduce(*args, c[2], c[3])
        cpu_ops.bn_act_backward(*args, c[2], c[3], t[0], t[1])
        cpu_ops.bn_act(x, r, c[0], c[1], 1, 0.0, t[2])
        cpu_ops.add_relu(x, r, t[3])
        pooled, out = torch.empty(shape[:2]), F.max_pool2d(x, 3, 2, 1)
        cpu_ops.global_avg_pool(x, pooled)
        cpu_ops.max_pool2d(x, (3, 3), (2, 2), (1, 1), (1, 1), out.fill_(float("nan")))
        results.append([*c, *t, pooled, out])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_same_bits(a, b)


X = torch.zeros(2, 8, 4, 4)
C = torch.zeros(8)
NHWC = X.to(memory_format=torch.channels_last)
BAD = {
    "integers": (lambda: cpu_ops.add_relu(X.int(), X.int(), X.int()), TypeError, "a must be float32"),
    "mixed dtypes": (lambda: cpu_ops.add_relu(X, X.half(), X), TypeError, "b is float16, expected float32"),
    "mixed shapes": (lambda: cpu_ops.add_relu(X, X[:1], X), ValueError, r"b has the shape \[1, 8, 4, 4\]"),
    "mixed layouts": (lambda: cpu_ops.add_relu(X, NHWC, X), ValueError, "b must have the memory format"),
    "one dimension": (
        lambda: cpu_ops.add_relu(C, C, C),
        ValueError,
        r"a must have the shape \[N, C, \*spatial\]",
    ),
    "strided": (lambda: cpu_ops.add_relu(X[..., ::2], X, X), ValueError, "a must be dense"),
    "expanded": (lambda: cpu_ops.bn_stats(X[:, :1].expand(2, 8, 4, 4), C, C), ValueError, "x must be dense"),
    "no values": (lambda: cpu_ops.bn_stats(X[:0], C, C), ValueError, "x has no values per channel"),
    "channel count": (
        lambda: cpu_ops.bn_stats(X, C[:7], C),
        ValueError,
        r"mean has the shape \[7\], expected \[8\]",
    ),
    "statistics' type": (
        lambda: cpu_ops.bn_stats(X, C, C.double()),
        TypeError,
        "var is float64, expected float32",
    ),
    "strided channels": (
        lambda: cpu_ops.bn_stats(X, torch.zeros(16)[::2], C),
        ValueError,
        "mean must be contiguous",
    ),
    "activation": (lambda: cpu_ops.bn_act(X, None, C, C, 8, 0.0, X), ValueError, "act is 8, it takes 0 to 7"),
    "one mean": (
        lambda: cpu_ops.bn_act_backward(X, X, None, None, C, C, None, None, 0, 0.0, C, None, X, None),
        ValueError,
        "mean_dy and mean_dy_xhat go together",
    ),
    "pool size": (
        lambda: cpu_ops.max_pool2d(X, (3, 3), (2, 2), (1, 1), (1, 1), X),
        ValueError,
        r"out has the shape \[2, 8, 4, 4\], expected 2",
    ),
    "pool padding": (
        lambda: cpu_ops.max_pool2d(X, (2, 2), (2, 2), (2, 2), (1, 1), X),
        ValueError,
        "padding must be from 0 to half",
    ),
    "pool kernel": (
        lambda: cpu_ops.max_pool2d(X, (5, 5), (1, 1), (0, 0), (1, 1), X),
        ValueError,
        "smaller than the kernel",
    ),
    "pool stride": (
        lambda: cpu_ops.max_pool2d(X, (3, 3), (0, 2), (1, 1), (1, 1), X),
        ValueError,
        "stride must be",
    ),
    "pool layout": (
        lambda: cpu_ops.max_pool2d(NHWC, (1, 1), (1, 1), (0, 0), (1, 1), X),
        ValueError,
        "memory format of x",
    ),
    "pooled shape": (lambda: cpu_ops.global_avg_pool(X, X), ValueError, r"expected \[2, 8\]"),
    "no pixels": (lambda: cpu_ops.global_avg_pool(X[..., :0], X[..., 0, 0]), ValueError, "x has no pixels"),
    "to float64": (lambda: cpu_ops.to_nhwc(X, NHWC.double()), TypeError, "out is float64"),
    "from bfloat16": (
        lambda: cpu_ops.to_nhwc(X.bfloat16(), NHWC),
        TypeError,
        "x is bfloat16, expected float32",
    ),
    "from channels_last": (lambda: cpu_ops.to_nhwc(NHWC, NHWC), ValueError, "x must be contiguous"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_by_name(case):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()
    assert not X.any() and not C.any(), "something was written"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rising", [False, True])
def test_variance_when_the_mean_wanders_far_between_and_within_tiles(layout, rising):
    """Deviations are taken from the mean of what came before: a ramp, and a step up and back, move it most."""
    rows = torch.arange(4 * 64 * 64, dtype=torch.float64)
    level = rows * 0.01 if rising else 1000.0 * ((rows > 200) & (rows < 9000))
    x = arrange(
        (torch.randn(4, 64, 64, 3, dtype=torch.float64) + level.view(4, 64, 64, 1)).movedim(3, 1), layout
    )
    x = x.float()
    mean, var = torch.empty(3), torch.empty(3)
    cpu_ops.bn_stats(x, mean, var)
    torch.testing.assert_close(mean.double(), x.double().mean((0, 2, 3)), rtol=1e-6, atol=0)
    torch.testing.assert_close(var.double(), x.double().var((0, 2, 3), correction=0), rtol=2e-6, atol=0)


@pytest.mark.parametrize("running", [torch.float32, torch.bfloat16, torch.float16, torch.float64, None])
@pytest.mark.parametrize("affine", [True, False])
def test_bn_finalize_equals_pytorch(running, affine):
    stat = torch.float64 if running == torch.float64 else torch.float32
    c, count = 37, 49
    mean, weight, bias = (torch.randn(c, dtype=stat) for _ in "mwb")
    var = torch.rand(c, dtype=stat)
    vectors = (mean, var, weight, bias) if affine else (mean, var, None, None)
    states = [[None if running is None else torch.full((c,), v).to(running) for v in (0.25, 4)] for _ in "ab"]
    results = [[guarded((c,), stat) for _ in "iss"] for _ in "ab"]
    cpu_ops.bn_finalize(*vectors, *states[0], 0.1, 1e-5, count, *(out for out, _ in results[0]))
    torch_primitives.bn_finalize(*vectors, *states[1], 0.1, 1e-5, count, *(out for out, _ in results[1]))
    for (got, check), (want, _) in zip(*results, strict=True):
        check()
        torch.testing.assert_close(got, want)
    if running is not None:
        torch.testing.assert_close(*states)


def test_bn_finalize_refuses_what_does_not_fit():
    v, narrow = torch.ones(3), torch.ones(3).half()
    outs = [torch.ones(3) for _ in range(3)]
    with pytest.raises(ValueError, match=r"var has the shape \[4\], expected \[3\]"):
        cpu_ops.bn_finalize(v, torch.ones(4), None, None, None, None, 0.1, 1e-5, 9, *outs)
    with pytest.raises(TypeError, match="weight is float16, expected float32"):
        cpu_ops.bn_finalize(v, v, narrow, None, None, None, 0.1, 1e-5, 9, *outs)
    with pytest.raises(ValueError, match="running_mean and running_var go together"):
        cpu_ops.bn_finalize(v, v, None, None, v, None, 0.1, 1e-5, 9, *outs)
    with pytest.raises(TypeError, match="running_var is float16, expected float32"):
        cpu_ops.bn_finalize(v, v, None, None, torch.ones(3), narrow, 0.1, 1e-5, 9, *outs)
