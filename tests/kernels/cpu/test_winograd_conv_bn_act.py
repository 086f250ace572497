"""Winograd's 3x3 convolution on the CPU: fp64, whole numbers, what a NaN reaches, threads, where it is chosen."""

import pytest
import torch
import torch.nn.functional as F
from checking import check_candidate
from oracle import assert_close_to_oracle, assert_same_bits, guarded
from problems import conv_problem
from torch import nn

import fastres
from fastres import backends, native
from fastres.activation import KINDS, Activation
from fastres.backends import cpu_ops
from fastres.backends.cpu import winograd_cost
from fastres.plan.candidate import REGISTRY
from fastres.plan.target import on_paper

CL = torch.channels_last
# (N, C, H, W, K, padding): whole and ragged tiles, vectors, sums of 64 channels, blocks of K; one pixel; wide padding
SHAPES = [
    (1, 64, 12, 12, 64, (1, 1)),
    (2, 8, 5, 7, 5, (1, 1)),
    (1, 33, 13, 9, 70, (0, 2)),
    (3, 130, 4, 3, 17, (1, 0)),
    (5, 16, 3, 3, 130, (0, 0)),
    (1, 72, 1, 1, 64, (1, 1)),
    (1, 9, 1, 6, 1, (3, 4)),
    (2, 150, 20, 19, 96, (1, 1)),
]


@pytest.fixture(scope="module")
def winograd():
    backends.load()
    if (why := native.available("cpu")) is not None:
        pytest.skip(f"no C++ CPU kernels: {why}")
    return REGISTRY["cpu.winograd_conv_bn_act"]


def pack(weight):
    k, c = weight.shape[:2]
    packed, check = guarded((16 * c * (-(-k // 16) * 16),), torch.float32)
    cpu_ops.winograd_pack(weight.double().contiguous(), packed)
    check()
    assert not packed.isnan().any()
    return packed


def run(x, weight, padding, *, shift=None, residual=None, act=0, param=0.0, out=None):
    n, _, h, w = x.shape
    k, check = weight.shape[0], None
    if out is None:
        shape = (n, k, h + 2 * padding[0] - 2, w + 2 * padding[1] - 2)
        out, check = guarded(shape, torch.float32)
    shift = torch.zeros(k) if shift is None else shift
    cpu_ops.winograd_conv_bn_act(x, pack(weight), shift, residual, act, param, padding, out)
    if check is not None:
        check()
    return out


def case(n, c, h, w, k, make=torch.randn):
    x = make((n, c, h, w)).float().contiguous(memory_format=CL)
    return x, make((k, c, 3, 3)).float() / (9 * c) ** 0.5


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_convolution_is_as_exact_as_pytorchs(shape, winograd):
    *sizes, padding = shape
    x, weight = case(*sizes)
    x = x.relu()
    out = run(x, weight, padding)
    ref = F.conv2d(x.double(), weight.double(), padding=padding)
    magnitude = F.conv2d(x.double(), weight.double().abs(), padding=padding)
    k = 9 * sizes[1]
    assert_close_to_oracle(
        out, ref, F.conv2d(x, weight, padding=padding), magnitude=magnitude, k=k, c=2.0, check_norm=False
    )
    # few numbers have no norm to speak of
    if out[0].numel() > 1000:
        assert_close_to_oracle(out, ref, F.conv2d(x, weight, padding=padding))


@pytest.mark.parametrize("c", [8, 64, 512])
def test_the_norm_of_the_error_is_at_most_one_and_a_half_times_pytorchs(c, winograd):
    """In either memory format: PyTorch sums otherwise in each, and rounds up to four times less in one."""
    x, weight = case(2, c, 14, 14, 64)
    x = x.relu()
    out, ref = run(x, weight, (1, 1)), F.conv2d(x.double(), weight.double(), padding=1)
    for theirs in (x, x.contiguous()):
        assert_close_to_oracle(out, ref, F.conv2d(theirs, weight, padding=1))


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("kind", KINDS)
def test_candidate(kind, residual, winograd):
    act = Activation(kind, 0.1 if kind == "leaky_relu" else 0.0)
    for affine, bias, shape in (
        (True, True, (2, 20, 9, 6, 37)),
        (False, True, (1, 8, 6, 7, 16)),
        (False, False, (1, 8, 3, 3, 5)),
    ):
        problem = conv_problem(*shape, 3, act=act, residual=residual, affine=affine, bias=bias)
        check_candidate(winograd, problem)


@pytest.mark.parametrize("shape", [(2, 64, 12, 9, 48), (1, 200, 7, 7, 65), (0, 8, 6, 6, 8)], ids=str)
def test_whole_numbers_stay_exact(shape, winograd):
    for residual in (False, True):
        problem = conv_problem(*shape, 3, act=Activation("relu"), residual=residual)
        check_candidate(winograd, problem, integers=True)


def test_the_residual_may_be_the_output(winograd):
    x, weight = case(2, 16, 7, 6, 40)
    shift, residual = torch.randn(40), torch.randn(2, 40, 7, 6).contiguous(memory_format=CL)
    apart = run(x, weight, (1, 1), shift=shift, residual=residual, act=1)
    within = residual.clone()
    run(x, weight, (1, 1), shift=shift, residual=within, act=1, out=within)
    assert_same_bits(within, apart)
    assert not torch.equal(apart, run(x, weight, (1, 1), shift=shift, act=1)), "the residual was left out"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_reach_what_they_reach_in_direct_convolution(value, winograd):
    for row, column in ((0, 0), (3, 4), (4, 3), (8, 7)):
        x, weight = case(2, 10, 9, 8, 20)
        x[1, 3, row, column] = value
        got, direct = run(x, weight, (1, 1)), F.conv2d(x.double(), weight.double(), padding=1)
        assert torch.equal(got.isfinite(), direct.isfinite())
        assert got[direct.isnan()].isnan().all()


def test_an_output_depends_on_its_own_window_alone(winograd):
    """A tile's other outputs may be enormous: they would round away what a larger tile mixes with them."""
    x, weight = case(1, 12, 8, 8, 16)
    before = run(x, weight, (1, 1))
    x[0, 5, 4, 3] = 1e30
    after = run(x, weight, (1, 1))
    touched = torch.zeros(8, 8, dtype=torch.bool)
    touched[3:6, 2:5] = True
    assert_same_bits(after[..., ~touched], before[..., ~touched])
    assert (after[..., touched] != before[..., touched]).all()


def test_results_do_not_depend_on_threads_nor_on_the_batch(winograd, threads):
    for shape in ((3, 24, 30, 23, 100), (1, 40, 5, 5, 300)):
        x, weight = case(*shape)
        threads(1)
        one = run(x, weight, (1, 1))
        assert_same_bits(run(x[:1], weight, (1, 1)), one[:1], "alone and in a batch")
        for n in (2, 3, 7):
            threads(n)
            assert_same_bits(run(x, weight, (1, 1)), one, f"{n} threads")


REFUSED = {
    "1x1": (dict(kernel=1), "takes 3x3"),
    "stride": (dict(kernel=3, stride=2), "stride 1"),
    "dilation": (dict(kernel=3, dilation=2), "without dilation"),
    "groups": (dict(kernel=3, groups=2), "groups"),
    "bf16": (dict(kernel=3, dtype=torch.bfloat16), "takes fp32, not bf16"),
    "few channels": (dict(kernel=3, c=7), "fewer than 8 input channels"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_candidate_says_why_not(name, winograd):
    fields, reason = dict(REFUSED[name][0]), REFUSED[name][1]
    problem = conv_problem(1, fields.pop("c", 16), 8, 8, 16, fields.pop("kernel"), **fields)
    assert reason in winograd.accepts(problem, on_paper("cpu"))
    good = conv_problem(1, 16, 8, 8, 16, 3, padding=0)
    assert winograd.accepts(good, on_paper("cpu")) is None
    assert "CPU only" in winograd.accepts(good, on_paper("sm90"))


@pytest.mark.parametrize(("size", "c"), [(56, 64), (28, 128), (14, 256), (7, 512)])
def test_it_is_preferred_on_resnets_layers(size, c, winograd):
    direct = REGISTRY["onednn.conv_bn_act"]
    for n in (1, 8):
        problem, cpu = conv_problem(n, c, size, size, c, 3), on_paper("cpu")
        assert winograd.estimate_ms(problem, cpu) < direct.estimate_ms(problem, cpu)


@pytest.mark.parametrize(
    ("shape", "padding", "threads"),
    [((1, 512, 1, 1, 512), 1, 1), ((4, 256, 3, 3, 256), 1, 1), ((1, 512, 7, 7, 512), 1, 64)],
    ids=["centre tap alone", "mostly padding", "more threads than work"],
)
def test_it_is_not_preferred_where_direct_convolution_is_measured_or_bound_to_be_faster(
    shape, padding, threads
):
    spec = conv_problem(*shape, 3, padding=padding)["conv"]
    assert winograd_cost(spec, threads) > 1


def test_a_network_runs_it_with_the_weights_of_now(winograd):
    model = nn.Sequential(fastres.BasicBlock(64, 64), fastres.BasicBlock(64, 64)).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.3, 0.3)
            module.running_var.uniform_(0.5, 2)
    fast, x = fastres.accelerate(model), torch.randn(2, 64, 20, 20)
    for _ in range(2):
        with torch.no_grad():
            got, own, exact = fast(x), model(x), model.double()(x.double())
        model.float()
        rows = fast.report(x, measure=False).rows
        assert [row.candidate for row in rows] == ["cpu.winograd_conv_bn_act"] * 4
        assert_close_to_oracle(got, exact, own)
        with torch.no_grad():
            model[0].conv1.weight.mul_(-1.5)


X = torch.zeros(2, 8, 4, 4).to(memory_format=CL)
PACKED, SHIFT, OUT = torch.zeros(16 * 8 * 16), torch.zeros(6), torch.zeros(2, 6, 4, 4).to(memory_format=CL)


def call(x=X, packed=PACKED, shift=SHIFT, residual=None, act=0, padding=(1, 1), out=OUT):
    cpu_ops.winograd_conv_bn_act(x, packed, shift, residual, act, 0.0, padding, out)


WEIGHT = torch.zeros(17, 8, 3, 3, dtype=torch.float64)


def call_pack(weight):
    cpu_ops.winograd_pack(weight, PACKED)


BAD = {
    "dtype": (lambda: call(X.double()), TypeError, "x is float64, expected float32"),
    "planes": (lambda: call(X.contiguous()), ValueError, "x must be channels_last"),
    "rank": (lambda: call(X[:, :, 0].contiguous()), ValueError, r"x must have the shape \[N, C, H, W\]"),
    "extent": (lambda: call(padding=(0, 1)), ValueError, r"out has the shape \[2, 6, 4, 4\], expected \[2, K, 2, 4\]"),
    "padding": (lambda: call(padding=(-1, 1)), ValueError, "padding takes two numbers from 0 on"),
    "packed": (lambda: call(packed=PACKED[1:]), ValueError, r"packed must be contiguous of the shape \[2048\]"),
    "shift": (lambda: call(shift=SHIFT[1:]), ValueError, r"shift has the shape \[5\], expected \[6\]"),
    "residual": (lambda: call(residual=OUT[:1]), ValueError, r"residual has the shape \[1, 6, 4, 4\]"),
    "out": (lambda: call(out=OUT.contiguous()), ValueError, "out must have the memory format"),
    "act": (lambda: call(act=8), ValueError, "act is 8, it takes 0 to 7"),
    "weight's type": (lambda: call_pack(WEIGHT.float()), TypeError, "weight is float32, expected float64"),
    "weight": (lambda: call_pack(WEIGHT[..., :1]), ValueError, r"weight must have the shape \[K, C, 3, 3\]"),
    "strided": (lambda: call_pack(WEIGHT.transpose(2, 3)), ValueError, "weight must be contiguous"),
    "room": (lambda: call_pack(WEIGHT), ValueError, r"of the shape \[4096\]"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_by_name(name, winograd):
    bad, error, message = BAD[name]
    with pytest.raises(error, match=message):
        bad()
    assert not OUT.any() and not PACKED.any(), "something was written"


@pytest.mark.parametrize("shape", [(0, 8, 4, 4), (2, 8, 4, 4)], ids=str)
def test_nothing_to_do_is_done(shape, winograd):
    """No images; no output channels."""
    k = 6 if shape[0] == 0 else 0
    out = torch.empty(shape[0], k, 4, 4).to(memory_format=CL)
    call(X[: shape[0]], PACKED if k else PACKED[:0], SHIFT[:k], out=out)


def test_the_users_default_dtype_does_not_matter(winograd):
    module = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64)).eval()
    fast, x = fastres.accelerate(module), torch.randn(1, 64, 56, 56)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode():
            assert fast(x).dtype == torch.float32
    finally:
        torch.set_default_dtype(before)
    assert [row.candidate for row in fast.report(measure=False).rows] == [winograd.name]
