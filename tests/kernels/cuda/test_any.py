"""any_add_relu and any_bn_act: the element-wise primitives, forward and backward, against fp64."""

import itertools

import pytest
import torch

import fastres.backends.cuda_ops as ops
from fastres.activation import KINDS
from fastres.ops import torch_primitives
from tests.oracle import LAYOUTS, assert_close_to_oracle, assert_same_bits, guarded, integers

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
# Vectors that fit, vectors that do not, one pixel, one channel, more channels than a block has threads.
SHAPES = [(2, 16, 4, 8), (3, 24, 5, 7), (2, 5, 3, 3), (4, 1, 6, 5), (9, 64), (2, 2080, 3, 1), (2, 8, 3, 4, 5)]


def _make(shape, dtype, layout, device):
    t = torch.randn(shape, dtype=torch.float64).to(dtype).to(device)
    if layout == "nhwc" and len(shape) == 4:
        t = t.contiguous(memory_format=LAYOUTS[layout])
    return t


def _stat(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def _vector(c, dtype, device):
    return torch.randn(c, dtype=_stat(dtype)).to(device)


def _empty_like(t, layout):
    out, check = guarded(t.shape, t.dtype, layout=layout, device=t.device)
    assert t.dim() != 4 or out.stride() == t.stride() or 1 in t.shape
    return out, check


cases = pytest.mark.parametrize(
    ("shape", "dtype", "layout"),
    [
        pytest.param(s, d, m, id=f"{'x'.join(map(str, s))}-{str(d)[6:]}-{m}")
        for i, (s, m) in enumerate(itertools.product(SHAPES, LAYOUTS))
        for d in (DTYPES[i % 4], DTYPES[(i + 1) % 4])
    ],
)


@cases
def test_add_relu_equals_fp64_rounded_once(shape, dtype, layout, device):
    a, b = _make(shape, dtype, layout, device), _make(shape, dtype, layout, device)
    out, check = _empty_like(a, layout)
    ops.add_relu(a, b, out)
    check()
    assert_close_to_oracle(out, (a.double() + b.double()).relu(), torch.relu(a + b))
    alias = a.clone()
    ops.add_relu(alias, b, alias)
    assert_same_bits(alias, out, "in place")


@cases
def test_add_relu_backward_masks_the_gradient(shape, dtype, layout, device):
    grad, out = _make(shape, dtype, layout, device), _make(shape, dtype, layout, device).relu()
    got, check = _empty_like(grad, layout)
    ops.add_relu_backward(grad, out, got)
    check()
    assert torch.equal(got, grad * (out > 0))


def test_add_relu_when_numbers_are_special(device):
    a = torch.tensor([[float("nan"), float("inf"), -float("inf"), -0.0, 1.0]] * 5, device=device)
    b = a.t().contiguous()
    out = torch.empty_like(a)
    ops.add_relu(a, b, out)
    torch.testing.assert_close(out, torch.relu(a + b), equal_nan=True, rtol=0, atol=0)


def test_add_relu_covers_every_element_when_there_are_many_blocks(device):
    a = torch.arange(3 * 4111, dtype=torch.float32, device=device).view(3, 4111)
    out = torch.full_like(a, float("nan"))
    ops.add_relu(a, -0.5 * a, out)
    assert torch.equal(out, 0.5 * a)


@cases
def test_bn_stats_equals_fp64(shape, dtype, layout, every_schedule):
    device = every_schedule
    # A mean far from 0 against the deviation: a sum of squares would cancel.
    x = _make(shape, dtype, layout, device) + 30
    c = shape[1]
    mean, var = (torch.full((c,), float("nan"), dtype=_stat(dtype), device=device) for _ in "mv")
    ops.bn_stats(x, mean, var)
    dims = [d for d in range(x.dim()) if d != 1]
    v64, m64 = torch.var_mean(x.double(), dims, correction=0)
    k = x.numel() // c
    assert_close_to_oracle(mean, m64, magnitude=x.double().abs().mean(dims), k=k, what="mean")
    spread = (x.double() - m64.view(1, -1, *[1] * (x.dim() - 2))).abs().mean(dims) * m64.abs()
    assert_close_to_oracle(var, v64, magnitude=v64 + spread, k=k, what="var")
    again = [torch.empty_like(mean), torch.empty_like(var)]
    ops.bn_stats(x, *again)
    assert_same_bits(torch.stack([mean, var]), torch.stack(again))


def test_bn_stats_when_values_are_whole_is_exact(device):
    x = integers((4, 16, 8, 8), torch.float16).to(device)
    mean, var = torch.empty(16, device=device), torch.empty(16, device=device)
    ops.bn_stats(x, mean, var)
    assert torch.allclose(mean.double(), x.double().mean((0, 2, 3)), rtol=1e-6, atol=1e-7)
    assert torch.allclose(var.double(), x.double().var((0, 2, 3), correction=0), rtol=1e-6)


@pytest.mark.parametrize("running", [torch.float32, torch.bfloat16, torch.float16, torch.float64, None])
def test_bn_finalize_equals_pytorch(running, device):
    stat = torch.float64 if running == torch.float64 else torch.float32
    c, count = 300, 49
    mean, weight, bias = (torch.randn(c, dtype=stat, device=device) for _ in "mwb")
    var = torch.rand(c, dtype=stat, device=device)
    states = [
        [None if running is None else (torch.ones(c, device=device) * v).to(running) for v in (0.25, 4)]
        for _ in "ab"
    ]
    results = [[torch.full((c,), float("nan"), dtype=stat, device=device) for _ in "iss"] for _ in "ab"]
    ops.bn_finalize(mean, var, weight, bias, *states[0], 0.1, 1e-5, count, *results[0])
    torch_primitives.bn_finalize(mean, var, weight, bias, *states[1], 0.1, 1e-5, count, *results[1])
    for got, want in zip(results[0] + states[0], results[1] + states[1], strict=True):
        if want is not None:
            torch.testing.assert_close(got, want)


@cases
@pytest.mark.parametrize("with_residual", [False, True])
def test_bn_act_equals_fp64(shape, dtype, layout, with_residual, device):
    x = _make(shape, dtype, layout, device)
    residual = _make(shape, dtype, layout, device) if with_residual else None
    scale, shift = _vector(shape[1], dtype, device), _vector(shape[1], dtype, device)
    per = (1, -1, *[1] * (len(shape) - 2))
    magnitude = x.double().abs() * scale.double().abs().view(per) + shift.double().abs().view(per)
    if with_residual:
        magnitude += residual.double().abs()
    for act in range(len(KINDS)) if shape == SHAPES[0] else (0, 1, 3):
        out, check = _empty_like(x, layout)
        ops.bn_act(x, residual, scale, shift, act, 0.1, out)
        check()
        ref, own = torch.empty_like(x, dtype=torch.float64), torch.empty_like(x)
        wide = None if residual is None else residual.double()
        torch_primitives.bn_act(x.double(), wide, scale.double(), shift.double(), act, 0.1, ref)
        torch_primitives.bn_act(x, residual, scale, shift, act, 0.1, own)
        assert_close_to_oracle(out, ref, own, magnitude=magnitude, c=4, what=KINDS[act])


@cases
@pytest.mark.parametrize("batch_stats", [False, True])
def test_bn_act_backward_equals_fp64(shape, dtype, layout, batch_stats, device):
    x, residual, grad = (_make(shape, dtype, layout, device) for _ in "xrg")
    c, stat = shape[1], _stat(dtype)
    mean, weight, bias = (_vector(c, dtype, device) for _ in "mwb")
    invstd = torch.rand(c, dtype=stat).to(device) + 0.5
    means = [_vector(c, dtype, device) for _ in "dx"] if batch_stats else [None, None]
    acts = [(act, True) for act in (range(len(KINDS)) if shape == SHAPES[0] else (0, 1, 3))]
    for act, keeps_out in [*acts, (1, False)]:
        saved = torch.empty_like(x)
        torch_primitives.bn_act(x, residual, weight * invstd, bias - mean * weight * invstd, act, 0.1, saved)
        saved = saved if keeps_out else None
        head = (grad, x, residual, saved, mean, invstd, weight, bias)
        wide = [None if t is None else t.double() for t in head]
        statistic = {"dtype": torch.float64, "device": device}
        sums = [torch.full((c,), float("nan"), dtype=stat, device=device) for _ in "ab"]
        sums64 = [torch.empty(c, **statistic) for _ in "ab"]
        ops.bn_act_backward_reduce(*head, act, 0.1, *sums)
        dz, check_dz = _empty_like(x, layout)
        writing = [torch.full((c,), float("nan"), dtype=stat, device=device) for _ in "ab"]
        ops.bn_act_backward_reduce(*head, act, 0.1, *writing, dz)
        check_dz()
        torch_primitives.bn_act_backward_reduce(*wide, act, 0.1, *sums64)
        dims = [d for d in range(x.dim()) if d != 1]
        per = (1, -1, *[1] * (x.dim() - 2))
        size = grad.double().abs()
        if act > 1:  # the slope is as exact as z
            scale = (weight * invstd).double().view(per)
            shift = bias.double().view(per).abs() + (mean.double().view(per) * scale).abs()
            z = (x.double() * scale).abs() + shift
            size = size * (1 + z + residual.double().abs())
        xhat = ((x.double() - mean.double().view(per)) * invstd.double().view(per)).abs()
        k = x.numel() // c
        for sum_dy, sum_dy_xhat in (sums, writing):
            assert_close_to_oracle(sum_dy, sums64[0], magnitude=size.sum(dims), k=k, c=4, what="sum_dy")
            assert_close_to_oracle(
                sum_dy_xhat, sums64[1], magnitude=(size * xhat).sum(dims), k=k, c=4, what="sum_dy_xhat"
            )

        (dx, check_dx), (dr, check_dr) = _empty_like(x, layout), _empty_like(x, layout)
        ops.bn_act_backward(*head, act, 0.1, *means, dx, dr)
        check_dx()
        check_dr()
        dx64, dr64 = (torch.empty_like(x, dtype=torch.float64) for _ in "xr")
        means64 = [None if m is None else m.double() for m in means]
        torch_primitives.bn_act_backward(*wide, act, 0.1, *means64, dx64, dr64)
        span = size + (1 + xhat) * sum(m.abs().view(per) for m in means64) if batch_stats else size
        span = span * (weight * invstd).double().abs().view(per)
        assert_close_to_oracle(dr, dr64, magnitude=size, c=4, what=f"grad_residual {KINDS[act]}")
        assert_close_to_oracle(dz, dr64, magnitude=size, c=4, what=f"dz of the sums {KINDS[act]}")
        assert_close_to_oracle(dx, dx64, magnitude=span, c=4, what=f"grad_x {KINDS[act]}")


def test_bn_act_backward_without_x_when_statistics_are_given(device):
    grad = torch.randn(2, 8, 3, 3, device=device)
    out, dx = torch.randn_like(grad), torch.empty_like(grad)
    mean, invstd = torch.zeros(8, device=device), torch.rand(8, device=device)
    ops.bn_act_backward(grad, None, None, out, mean, invstd, None, None, 1, 0.0, None, None, dx, None)
    torch.testing.assert_close(dx, grad * (out > 0) * invstd.view(1, -1, 1, 1))


def test_empty_batches_launch_nothing(device):
    x = torch.empty(0, 8, 4, 4, device=device)
    ops.add_relu(x, x, x)
    ops.bn_act(x, None, torch.ones(8, device=device), torch.ones(8, device=device), 1, 0.0, x)


@pytest.mark.parametrize(
    ("error", "match", "change"),
    [
        (TypeError, "b is float16, expected float32", lambda a, b: (a, b.half())),
        (ValueError, r"b has the shape \[2, 4, 3\], expected \[2, 4, 6\]", lambda a, b: (a, b[..., :3])),
        (ValueError, "a must be dense", lambda a, b: (a[..., ::2], b[..., ::2])),
        (
            ValueError,
            "memory format",
            lambda a, b: (a[..., None], b[..., None].transpose(1, 2).contiguous().transpose(1, 2)),
        ),
        (TypeError, "a must be float32", lambda a, b: (a.int(), b.int())),
        (ValueError, r"a must have the shape \[N, C", lambda a, b: (a[0, 0], b[0, 0])),
    ],
)
def test_bad_tensors_are_refused_by_name(error, match, change, device):
    a, b = change(torch.randn(2, 4, 6, device=device), torch.randn(2, 4, 6, device=device))
    with pytest.raises(error, match=match):
        ops.add_relu(a, b, torch.empty_like(a))
