"""sm90_stem_pool: rows in a ring, windows in registers, four convolution rows at once; emulated and on a Hopper."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from problems import H100, check_candidate, make_nodes, network_problems, problem_of

from fastres.activation import IDENTITY, RELU
from fastres.backends.cuda.stem_pool import Sm90StemPool, StemPoolConfig, pack
from fastres.graph.fold import LayerParameters
from fastres.plan.candidate import Buffers
from fastres.plan.pattern import STEM_POOL
from fastres.plan.problem import ConvSpec, NormalizeSpec, PoolSpec

CANDIDATE = Sm90StemPool()
BF16, FP16 = torch.bfloat16, torch.float16


def _problem(n, h, w, dtype, normalize=False, **conv):
    fields = dict(k=64, kernel=(7, 7), stride=(2, 2), padding=(3, 3), act=RELU) | conv
    layers = dict(normalize=NormalizeSpec(n, 3, h, w)) if normalize else {}
    layers["conv"] = spec = ConvSpec(n, 3, h, w, **fields)
    layers["pool"] = PoolSpec(n, spec.k, spec.p, spec.q, (3, 3), (2, 2), (1, 1))
    return problem_of(STEM_POOL, dtype, **layers)


# (n, h, w), rows of a tile: several tiles a block and several blocks; odd extents; more than one tile of columns;
# images smaller than a filter.
CASES = [((2, 40, 32), 4), ((3, 27, 23), 3), ((1, 9, 236), 1), ((2, 1, 2), 1), ((1, 14, 1), 5)]


@pytest.mark.parametrize("planar", [False, True], ids=["nhwc", "nchw"])
@pytest.mark.parametrize(("extent", "rows"), CASES, ids=lambda e: str(e).replace(", ", "x").strip("()"))
def test_equals_fp64(extent, rows, planar, every_schedule):
    dtype = (BF16, FP16)[extent[0] % 2]
    check_candidate(CANDIDATE, _problem(*extent, dtype), StemPoolConfig(rows), every_schedule, planar=planar)


@pytest.mark.parametrize("planar", [False, True], ids=["nhwc", "nchw"])
@pytest.mark.parametrize(("extent", "rows"), CASES[:3], ids=lambda e: str(e).replace(", ", "x").strip("()"))
def test_bytes_are_normalised_and_the_padding_stays_zero(extent, rows, planar, device):
    problem = _problem(*extent, (FP16, BF16)[extent[0] % 2], normalize=True)
    check_candidate(CANDIDATE, problem, StemPoolConfig(rows), device, planar=planar)


def test_whole_numbers_are_exact(device):
    for planar in (False, True):
        check_candidate(
            CANDIDATE, _problem(2, 30, 40, FP16), StemPoolConfig(3), device, integers=True, planar=planar
        )


def _run(problem, x, nodes, rows, device):
    parameters = {role: LayerParameters(node) for role, node in nodes.items()}
    config = StemPoolConfig(rows)
    constants = CANDIDATE.prepare(problem, config, parameters)
    out = torch.full(problem.output_shape("pool"), 7.0, dtype=problem.dtype, device=device)
    out = out.contiguous(memory_format=torch.channels_last)
    buffers = Buffers({problem.inputs[0]: x, "pool": out})
    CANDIDATE.bind(problem, config, buffers, constants)()
    return out


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_goes_where_pytorch_sends_it(value, device):
    """Beside a window, and in the row that only zero weights meet, it has no part in the sum."""
    problem = _problem(1, 36, 40, BF16, affine=False, bias=False)
    nodes = make_nodes(problem, device)
    nodes["conv"].conv.weight.data.abs_().add_(0.01)  # infinities keep their sign
    x = torch.randn(1, 3, 36, 40, generator=torch.Generator().manual_seed(0)).to(device, BF16)
    for h, w, c in ((0, 0, 2), (8, 21, 0), (15, 14, 1), (35, 39, 0)):
        x[0, c, h, w] = value
    x = x.contiguous(memory_format=torch.channels_last)
    weight = nodes["conv"].conv.weight.double()
    want = F.max_pool2d(F.conv2d(x.double(), weight, stride=2, padding=3).relu(), 3, 2, 1)
    got = _run(problem, x, nodes, 4, device).double()
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.isinf(), want.isinf())
    assert 0 < (want.isfinite()).sum() < want.numel() or value == -float("inf")
    torch.testing.assert_close(got, want, rtol=0.02, atol=0.02, equal_nan=True)


def test_channels_of_every_scale(device):
    """Negative scales turn the order around, zero ones leave the shift alone."""
    problem = _problem(1, 20, 24, FP16)
    nodes = make_nodes(problem, device)
    nodes["conv"].bn.weight.data[:32] = -nodes["conv"].bn.weight.data[:32].abs()
    nodes["conv"].bn.weight.data[32:40] = 0
    x = torch.randn(1, 3, 20, 24, generator=torch.Generator().manual_seed(0)).to(device, FP16)
    conv = F.conv2d(x.double(), nodes["conv"].conv.weight.double(), stride=2, padding=3)
    want = F.max_pool2d(nodes["conv"].bn.double()(conv).relu(), 3, 2, 1)
    got = _run(problem, x, nodes, 2, device).double()
    torch.testing.assert_close(got, want, rtol=2e-3, atol=2e-3)
    assert got[:, 32:40].std((0, 2, 3)).max() == 0


def test_a_misaligned_image_is_taken(device):
    """Rows that do not begin at 16 bytes come pixel by pixel."""
    problem = _problem(1, 16, 16, BF16)
    nodes = make_nodes(problem, device)
    x = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)).to(device, BF16)
    for strides in (x.stride(), x.contiguous(memory_format=torch.channels_last).stride()):
        moved = torch.zeros(x.numel() + 1, dtype=BF16, device=device)[1:].as_strided(x.shape, strides, 1)
        moved.copy_(x)
        assert torch.equal(_run(problem, moved, nodes, 2, device), _run(problem, x, nodes, 4, device))


def test_bad_arguments_are_named(device):
    problem = _problem(1, 16, 16, BF16)
    nodes = make_nodes(problem, device)
    x = torch.zeros(1, 3, 16, 16, dtype=BF16, device=device)
    for bad, error, text in (
        (x.half(), TypeError, "x is float16, expected bfloat16"),
        (x[:, :2], ValueError, r"expected \[N, 3, H, W\]"),
        (x[:, :, ::2], ValueError, "dense"),
        (torch.zeros(1, 3, 32, 16, dtype=BF16, device=device), ValueError, "out has the shape"),
    ):
        with pytest.raises(error, match=text):
            _run(problem, bad, nodes, 2, device)
    with pytest.raises(ValueError, match="rows is 0"):
        _run(problem, x, nodes, 0, device)


def test_packed_weights_hold_every_tap_once():
    weight = torch.arange(1, 64 * 147 + 1).reshape(64, 3, 7, 7).float()
    packed = pack(weight)
    taps = packed[packed != 0]
    assert taps.numel() == weight.numel() and torch.equal(taps.sort().values, weight.flatten())


def test_tiles_fit_the_machine():
    """Whole images where they fill the SMs evenly, shorter tiles where SMs would stand idle."""
    rows = {n: CANDIDATE.configs(_problem(n, 224, 224, BF16), H100)[0].rows for n in (1, 3, 32, 128, 256)}
    assert rows[256] == rows[128] == 56 and rows[32] == 14 and rows[1] == 1
    for n in (1, 3, 32):
        assert n * -(-56 // rows[n]) <= 132


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 3, 32, 256])
def test_the_stem_on_a_gpu(batch):
    for normalize in (False, True):
        (problem,) = network_problems(
            STEM_POOL, ("resnet50",), batch, (BF16, FP16)[batch % 2], 224, normalize
        )
        for planar in (False, True):
            for config in CANDIDATE.configs(problem, H100)[:3]:
                check_candidate(CANDIDATE, problem, config, "cuda", planar=planar, runs=3)
    odd = _problem(batch, 225, 301, FP16)
    check_candidate(CANDIDATE, odd, CANDIDATE.configs(odd, H100)[0], "cuda", planar=True)


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (_problem(1, 32, 32, BF16, k=32), "takes 3 -> 64"),
        (_problem(1, 32, 32, BF16, kernel=(3, 3), padding=(1, 1)), "not 7x7"),
        (_problem(1, 32, 32, BF16, act=IDENTITY), "only ReLU"),
        (_problem(1, 32, 32, torch.float32), "dtype"),
        (_problem(2**15, 224, 224, BF16), "2^31 elements"),
    ],
)
def test_what_it_cannot_do_is_refused_with_the_reason(problem, reason):
    assert reason in CANDIDATE.accepts(problem, H100)


def test_other_pools_and_machines_are_refused():
    problem = _problem(1, 32, 32, BF16)
    assert CANDIDATE.accepts(problem, H100) is None
    (_, conv), (_, pool) = problem.layers
    for fields in (dict(kernel=(2, 2), padding=(0, 0)), dict(ceil_mode=True)):
        other = replace(problem, layers=(("conv", conv), ("pool", replace(pool, **fields))))
        assert "the pool is not" in CANDIDATE.accepts(other, H100)
    assert "sm_90" in CANDIDATE.accepts(problem, replace(H100, arch="sm80"))
