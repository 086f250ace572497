"""bn_act: values, gradients, running statistics and refusals, over dtypes, layouts, ranks and activations."""

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_close_to_oracle, assert_same_bits

from fastres import native, ops
from fastres.activation import KINDS, Activation
from fastres.backends import cpu_ops
from fastres.ops import primitives

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(2, 5, 7, 9), (4, 16, 8, 8), (3, 1, 1, 1), (2, 4096, 1, 1), (6, 3), (2, 4, 6), (2, 3, 2, 3, 4)]
ACTS = [Activation(kind, 0.1 if kind == "leaky_relu" else 0.0) for kind in KINDS]
EPS, MOMENTUM = 1e-5, 0.3
WHOLE = list(primitives.WHOLE)


def channels_last(x):
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.contiguous(memory_format=formats[x.dim()]) if x.dim() in formats else x


class Case:
    """Inputs in `dtype`, [C] vectors in fp32 (fp64 for fp64)."""

    def __init__(self, shape, dtype, layout="nchw", residual=True, affine=True, offset=0.5):
        arrange = channels_last if layout == "nhwc" else torch.Tensor.contiguous
        stat = torch.float64 if dtype == torch.float64 else torch.float32
        channels = shape[1]
        self.x = arrange((torch.randn(shape) * 2 + offset).to(dtype))
        self.residual = arrange(torch.randn(shape).to(dtype)) if residual else None
        self.weight = (torch.rand(channels) + 0.5).to(stat) if affine else None
        self.bias = torch.randn(channels).to(stat) if affine else None
        self.running_mean = torch.randn(channels).to(stat)
        self.running_var = (torch.rand(channels) + 0.5).to(stat)
        self.grad = arrange(torch.randn(shape).to(dtype))

    def run(self, function, dtype=None):
        """`function(x, mean, var, weight, bias, residual)`: its output, running statistics and gradients."""
        given = (self.x, self.running_mean, self.running_var, self.weight, self.bias, self.residual)
        x, mean, var, weight, bias, residual = (
            None if t is None else t.detach().clone().to(dtype or t.dtype) for t in given
        )
        leaves = {"x": x, "residual": residual, "weight": weight, "bias": bias}
        for leaf in leaves.values():
            if leaf is not None:
                leaf.requires_grad_()
        out = function(x, mean, var, weight, bias, residual)
        out.backward(self.grad.to(out.dtype))
        results = {"out": out.detach(), "running_mean": mean, "running_var": var}
        return results | {f"grad_{name}": t.grad for name, t in leaves.items() if t is not None}

    def check(self, training, act):
        def ours(x, mean, var, weight, bias, residual):
            return ops.bn_act(x, mean, var, weight, bias, training, MOMENTUM, EPS, residual=residual, act=act)

        def theirs(x, mean, var, weight, bias, residual):
            y = F.batch_norm(x, mean, var, weight, bias, training, MOMENTUM, EPS)
            return act(y if residual is None else y + residual)

        got, ref, torch_got = self.run(ours), self.run(theirs, torch.float64), self.run(theirs)
        bounds = self.magnitudes(training, act)
        for name, value in got.items():
            magnitude, k = bounds[name]
            assert value.dtype == torch_got[name].dtype, name
            assert_close_to_oracle(
                value,
                ref[name],
                torch_got[name],
                magnitude=magnitude,
                k=k,
                c=4.0,
                check_norm=False,
                what=name,
            )
        if not training:
            assert torch.equal(got["running_mean"], self.running_mean)
        return got

    def magnitudes(self, training, act):
        """sum|a||b| behind every result, and how many products it has."""
        dims = [d for d in range(self.x.dim()) if d != 1]
        column = (1, -1, *[1] * (self.x.dim() - 2))
        x, grad = self.x.double(), self.grad.double().abs() * 1.2  # |act'| <= 1.13
        count = x.numel() // x.shape[1]
        if training:
            var, mean = torch.var_mean(x, dims, correction=0)
        else:
            mean, var = self.running_mean.double(), self.running_var.double()
        invstd = (var + EPS).rsqrt().view(column)
        weight = 1.0 if self.weight is None else self.weight.double().view(column)
        # x * scale + shift: both terms count, as they cancel.
        terms = (x.abs() + mean.abs().view(column)) * invstd
        z = terms * weight + (0.0 if self.bias is None else self.bias.double().abs().view(column))
        z = z if self.residual is None else z + self.residual.double().abs()
        # An activation that is computed again in backward sees z's error through its curvature (<= 1.1).
        grad = grad * (1.0 if act.kind in ("relu", "identity") else 1.0 + z)
        sum_dz, sum_dz_xhat = grad.sum(dims), (grad * terms).sum(dims)
        dx = grad
        if training:
            dx = dx + (sum_dz.view(column) + terms * sum_dz_xhat.view(column)) / count
        spread = x.square().mean(dims) + mean.square()
        return {
            "out": (z * 1.2, count if training else 1),
            "running_mean": (x.abs().mean(dims) + self.running_mean.double().abs(), count),
            "running_var": (2 * spread + self.running_var.double(), count),
            "grad_x": (dx * invstd * weight, count),
            "grad_residual": (grad, 1),
            "grad_weight": (sum_dz_xhat, count),
            "grad_bias": (sum_dz, count),
        }


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_gradients_and_statistics_equal_fp64(backend, dtype, shape, layout):
    for training in (True, False):
        for residual in (True, False):
            got = Case(shape, dtype, layout, residual).check(training, Activation("relu"))
            assert got["out"].shape == shape


@pytest.mark.parametrize("act", ACTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_activation_equals_fp64(backend, dtype, act):
    for training in (True, False):
        for residual in (True, False):
            Case((2, 5, 7, 9), dtype, "nhwc", residual).check(training, act)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_affine_off_equals_fp64(backend, dtype):
    for training in (True, False):
        Case((2, 5, 7, 9), dtype, affine=False).check(training, Activation("relu"))


def test_variance_survives_a_mean_that_dwarfs_it(backend):
    """The textbook E[x^2] - E[x]^2 in fp32 has no correct digit here."""
    x = torch.randn(8, 3, 32, 32) + 4096
    mean, var = torch.zeros(3), torch.ones(3)
    ops.bn_act(x, mean, var, training=True, momentum=1.0, act="identity")
    torch.testing.assert_close(var.double(), x.double().var([0, 2, 3]), rtol=1e-5, atol=0)


@pytest.fixture
def kernel_calls(monkeypatch):
    """The names of the C++ functions that are called, in order."""
    if reason := native.available("cpu"):
        pytest.skip(f"no C++ kernels: {reason}")
    calls = []

    def recording(name, function):
        def recorded(*args):
            calls.append(name)
            return function(*args)

        return recorded

    for name in (*primitives.NAMES, *WHOLE):
        monkeypatch.setattr(cpu_ops, name, recording(name, getattr(cpu_ops, name)))
    with primitives.pinned("cpu"):
        yield calls


@pytest.mark.parametrize("training", [True, False])
def test_each_way_is_one_call(kernel_calls, training):
    """On small tensors calls are what costs."""
    for dtype, layout in ((torch.float32, "nhwc"), (torch.bfloat16, "nchw")):
        case = Case((2, 8, 3, 3), dtype, layout)
        case.run(lambda x, m, v, w, b, r: ops.bn_act(x, m, v, w, b, training, residual=r))
        assert kernel_calls == WHOLE
        kernel_calls.clear()


def test_what_the_whole_call_does_not_take_is_converted_and_taken(kernel_calls):
    case = Case((2, 8, 3, 3), torch.float32, "nhwc")
    case.residual, case.grad = case.residual.contiguous(), case.grad.contiguous()
    case.weight = case.weight.half()
    case.run(lambda x, m, v, w, b, r: ops.bn_act(x, m, v, w, b, True, residual=r))
    assert kernel_calls == [name for name in WHOLE for _ in range(2)]


@pytest.mark.parametrize("act", ["relu", "relu6", "silu", "identity"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_whole_call_and_its_passes_give_the_same_bits(kernel_calls, monkeypatch, dtype, act):
    cases = [
        Case((4, 20, 7, 5), dtype, layout, residual) for layout in ("nchw", "nhwc") for residual in (1, 0)
    ]

    def step(x, mean, var, weight, bias, residual):
        return ops.bn_act(x, mean, var, weight, bias, True, residual=residual, act=act)

    whole = [case.run(step) for case in cases]
    assert kernel_calls == WHOLE * len(cases)
    kernel_calls.clear()
    find = primitives.find
    monkeypatch.setattr(primitives, "find", lambda name, x: None if name in WHOLE else find(name, x))
    for case, want in zip(cases, whole, strict=True):
        for name, value in case.run(step).items():
            assert_same_bits(value, want[name], name)
    passes = ["bn_stats", "bn_finalize", "bn_act", "bn_act_backward_reduce", "bn_act_backward"]
    assert kernel_calls == passes * len(cases)


@pytest.mark.parametrize(
    ("act", "dtype", "once"),
    [("relu", torch.bfloat16, True), ("silu", torch.bfloat16, False), ("silu", torch.float32, True)],
)
def test_second_pass_reads_dz_where_it_lost_nothing(kernel_calls, monkeypatch, act, dtype, once):
    """With a residual the sums' pass writes dz, and the second one reads that and x: 7 passes over memory, not 8."""
    seen, original, find = [], cpu_ops.bn_act_backward, primitives.find

    def recorded(*args):
        seen.append(args)
        return original(*args)

    monkeypatch.setattr(cpu_ops, "bn_act_backward", recorded)
    monkeypatch.setattr(primitives, "find", lambda name, x: None if name in WHOLE else find(name, x))
    case = Case((2, 8, 3, 3), dtype)
    case.run(lambda x, m, v, w, b, r: ops.bn_act(x, m, v, w, b, True, residual=r, act=act))
    ((_, _, residual, out, *_, code, _, _, _, _, grad_residual),) = seen
    assert (residual is None and out is None and code == 0 and grad_residual is None) == once


@pytest.mark.parametrize("wanted", ["", "x"])
def test_frozen_statistics_of_channels_last_vectors_keep_their_strides(backend, wanted):
    """Only images and volumes have a channels_last: rows of channels in another order are copied."""
    x = torch.randn(2, 7, 5).transpose(1, 2).requires_grad_(bool(wanted))
    out = ops.bn_act(x, torch.zeros(5), torch.ones(5), training=True)
    assert out.is_contiguous()


def test_autocast_changes_no_bit(backend):
    case = Case((2, 8, 3, 3), torch.bfloat16, "nhwc")
    case.weight = case.weight.half()

    def step(x, mean, var, weight, bias, residual):
        return ops.bn_act(x, mean, var, weight, bias, True, residual=residual)

    def below_autocast(*args):
        with torch.autocast("cpu", torch.bfloat16):
            return step(*args)

    for one, other in zip(case.run(step).values(), case.run(below_autocast).values(), strict=True):
        assert_same_bits(one, other)


def test_two_runs_give_the_same_bits(backend):
    case = Case((4, 16, 8, 8), torch.float32, "nhwc")

    def step(x, mean, var, weight, bias, residual):
        return ops.bn_act(x, mean, var, weight, bias, True, residual=residual)

    first, second = case.run(step), case.run(step)
    for name in first:
        assert_same_bits(first[name], second[name], name)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("act", ["relu", "silu", "identity"])
def test_gradients_are_exact_twice_in_fp64(training, act):
    x, residual = (torch.randn(3, 2, 2, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight, bias = (torch.randn(2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    mean, var = torch.randn(2, dtype=torch.float64), torch.rand(2, dtype=torch.float64) + 0.5

    def op(x, residual, weight, bias):
        return ops.bn_act(x, mean.clone(), var.clone(), weight, bias, training, residual=residual, act=act)

    assert torch.autograd.gradcheck(op, (x, residual, weight, bias))
    assert torch.autograd.gradgradcheck(op, (x, residual, weight, bias))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("wanted", ["x", "residual", "weight", "bias"])
def test_one_wanted_gradient_comes_alone(backend, training, wanted):
    case = Case((2, 5, 7, 9), torch.float32)
    every = case.run(lambda x, m, v, w, b, r: ops.bn_act(x, m, v, w, b, training, residual=r))
    leaves = {"x": case.x, "residual": case.residual, "weight": case.weight, "bias": case.bias}
    leaves[wanted].requires_grad_()
    x, residual, weight, bias = leaves.values()
    out = ops.bn_act(
        x, case.running_mean, case.running_var, weight, bias, training, momentum=0.1, residual=residual
    )
    out.backward(case.grad)
    torch.testing.assert_close(leaves[wanted].grad, every[f"grad_{wanted}"], rtol=1e-6, atol=1e-6)
    assert all(t.grad is None for name, t in leaves.items() if name != wanted)


@pytest.mark.parametrize("act", ["relu", "silu"])
def test_statistics_that_are_known_give_the_same_step(backend, act):
    case = Case((4, 6, 7, 9), torch.float64)

    def step(x, mean, var, weight, bias, residual, statistics=None):
        return ops.bn_act(x, mean, var, weight, bias, True, residual=residual, act=act, statistics=statistics)

    known = case.x.mean([0, 2, 3]), case.x.var([0, 2, 3], correction=0)
    got, want = case.run(lambda *args: step(*args, statistics=known)), case.run(step)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_layouts_may_differ_between_arguments(backend):
    x, residual = torch.randn(2, 5, 7, 9), torch.randn(2, 5, 7, 9)
    mean, var = torch.zeros(5), torch.ones(5)
    want = ops.bn_act(x, mean, var, residual=residual)
    sliced = torch.empty(2, 5, 7, 18)[..., ::2].copy_(x)
    flat = torch.randn(2, 5, 1, 1)
    for a, b in ((channels_last(x), residual), (x, channels_last(residual)), (sliced, residual)):
        torch.testing.assert_close(ops.bn_act(a, mean, var, residual=b), want, rtol=0, atol=0)
    got = ops.bn_act(x, mean, var, residual=flat.expand(2, 5, 7, 9))
    torch.testing.assert_close(got, torch.relu(x * (1 + 1e-5) ** -0.5 + flat), rtol=1e-6, atol=1e-6)
    assert ops.bn_act(channels_last(x), mean, var).is_contiguous(memory_format=torch.channels_last)


def test_empty_batch_gives_empty_results_and_keeps_the_statistics(backend):
    for shape in ((0, 4, 3, 3), (2, 4, 0, 3)):
        x, weight = torch.randn(shape, requires_grad=True), torch.ones(4, requires_grad=True)
        mean, var = torch.zeros(4), torch.ones(4)
        out = ops.bn_act(x, mean, var, weight, None, training=True)
        out.sum().backward()
        assert out.shape == shape and x.grad.shape == shape and torch.equal(weight.grad, torch.zeros(4))
        assert torch.equal(mean, torch.zeros(4)) and torch.equal(var, torch.ones(4))


def test_nan_and_infinity_pass_as_in_pytorch(backend):
    x = torch.randn(2, 3, 4, 4)
    x[0, 0, 0, 0], x[0, 1, 0, 0] = float("nan"), float("inf")
    mean, var = torch.zeros(3), torch.ones(3)
    for training in (True, False):
        want = F.relu(F.batch_norm(x, mean.clone(), var.clone(), training=training))
        got = ops.bn_act(x, mean.clone(), var.clone(), training=training)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_half_precision_parameters_and_buffers_are_kept_in_their_dtype(backend):
    x = torch.randn(4, 3, 5, 5).half()
    weight, bias = torch.ones(3).half().requires_grad_(), torch.zeros(3).half().requires_grad_()
    mean, var = torch.zeros(3).half(), torch.ones(3).half()
    ops.bn_act(x, mean, var, weight, bias, training=True).sum().backward()
    assert weight.grad.dtype == bias.grad.dtype == mean.dtype == var.dtype == torch.float16
    want = 0.1 * x.double().mean([0, 2, 3])
    torch.testing.assert_close(mean.double(), want, rtol=1e-3, atol=1e-5)


def test_autocast_keeps_the_dtype_of_x():
    x, residual = torch.randn(2, 3, 4, 4).bfloat16(), torch.randn(2, 3, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        out = ops.bn_act(x, torch.zeros(3), torch.ones(3), residual=residual)
    assert out.dtype == torch.bfloat16


def test_running_statistics_count_a_version():
    """Caches of folded weights are keyed by it."""
    mean, var = torch.zeros(3), torch.ones(3)
    before = mean._version, var._version
    ops.bn_act(torch.randn(2, 3, 4, 4), mean, var, training=True)
    assert mean._version > before[0] and var._version > before[1]


X = torch.zeros(2, 3, 4, 4)
C3, C4 = torch.ones(3), torch.ones(4)


@pytest.mark.parametrize(
    ("arguments", "keywords", "error", "message"),
    [
        ((torch.zeros(3), C3, C3), {}, ValueError, "x: expected at least 2 dimensions, got 1"),
        ((X.int(), C3, C3), {}, TypeError, "x: expected float16.*got torch.int32"),
        ((X, C4, C3), {}, ValueError, r"running_mean: expected one value for each of 3 channels.*\(4,\)"),
        ((X, C3, C3, C4), {}, ValueError, "weight: expected one value for each of 3 channels"),
        ((X, C3, C3, None, C4), {}, ValueError, "bias: expected one value for each of 3 channels"),
        ((X, C3, C3.to("meta")), {}, ValueError, "running_var: expected the device of x, cpu, got meta"),
        ((X, None, None), {}, ValueError, "running_mean, running_var: needed without training"),
        ((X, C3, None), {"training": True}, ValueError, "running_mean, running_var: give both or neither"),
        ((X, C3, C3), {"residual": X[:1]}, ValueError, "residual: expected the shape of x"),
        ((X, C3, C3), {"residual": X.half()}, TypeError, "residual: expected the dtype of x"),
        ((X, C3, C3), {"statistics": (C3, C3)}, ValueError, "statistics, group: they belong to training"),
        (
            (X, C3, C3),
            {"training": True, "statistics": (C4, C4)},
            ValueError,
            "statistics: expected one value",
        ),
        ((X, C3, C3), {"act": "tanh"}, ValueError, "act: unknown activation 'tanh'"),
        ((X, C3, C3), {"act": 3}, TypeError, "act: expected an Activation or its name"),
        ((X[:1, :, :1, :1], C3, C3), {"training": True}, ValueError, "more than 1 value per channel"),
    ],
)
def test_bad_input_is_refused_by_name(arguments, keywords, error, message):
    with pytest.raises(error, match=message):
        ops.bn_act(*arguments, **keywords)
