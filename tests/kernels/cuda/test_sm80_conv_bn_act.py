"""sm80_conv_bn_act: in the emulator on small problems of every kind, on a GPU on whole networks."""

import itertools
from dataclasses import replace

import emulated
import pytest
import torch
from problems import H100, check_candidate, conv_problem, network_problems, random_problems

from fastres.activation import RELU, Activation
from fastres.backends.cuda.conv_bn_act import (
    ConvConfig,
    Sm80ConvBnAct,
    filter_rows,
    merge_groups,
    merged_groups,
)
from fastres.plan.pattern import CONV_BN_ACT
from fastres.plan.problem import ConvSpec

CANDIDATE = Sm80ConvBnAct()
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
TILES = [(64, 64, 1), (128, 64, 1), (128, 128, 1), (64, 64, 2), (128, 128, 3)]
# What decides the path: whole chunks or not, padding, stride, dilation, groups merged or not, ragged edges.
CASES = {
    "1x1": conv_problem(1, 64, 8, 8, 64, 1),
    "3x3, ragged everywhere": conv_problem(2, 40, 9, 7, 72, 3, residual=True, act=RELU),
    "stride 2, groups": conv_problem(1, 32, 10, 11, 40, 3, stride=2, groups=4),
    "stem": conv_problem(1, 3, 20, 18, 16, 7, stride=2, act=RELU),
    "odd filters": conv_problem(3, 128, 6, 6, 131, 1, stride=2, residual=True),
    "dilation, merged groups": conv_problem(
        1, 48, 7, 9, 48, 3, dilation=2, groups=12, act=Activation("silu")
    ),
    "odd channels": conv_problem(1, 15, 7, 9, 6, 3, groups=3, act=Activation("leaky_relu", 0.2)),
    "no overlap": conv_problem(1, 16, 5, 6, 8, (2, 1), stride=(3, 2), padding=(2, 0), dilation=(1, 3)),
}


def _in(problem, dtype):
    return replace(problem, dtype=dtype, flags=("tf32",) if dtype == torch.float32 else ())


def _configs(problem):
    """Every tile that the problem may have, and splits where it is deep enough."""
    whole = "odd channels" if problem["conv"].c in (3, 15) else ""
    deep = problem["conv"].weight_elements // problem["conv"].k * problem.dtype.itemsize
    for m, n, splits in TILES:
        if (whole and (m, n) != (64, 64)) or deep < 64 * splits:
            continue
        yield ConvConfig(m, n, splits)


def _products(problem):
    """What the emulator has to multiply, padding and merged groups included."""
    spec = problem["conv"]
    filters = -(-spec.k // 64) * 64 if spec.groups == 1 else 64 * spec.groups
    return spec.n * spec.p * spec.q * filters * spec.weight_elements // spec.k


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", CASES)
def test_every_tile_equals_fp64(name, dtype, every_schedule):
    problem = _in(CASES[name], dtype)
    for config in _configs(problem):
        check_candidate(CANDIDATE, problem, config, every_schedule)
        check_candidate(CANDIDATE, problem, config, every_schedule, integers=True, seed=1)


@pytest.mark.parametrize("seed", range(12))
def test_random_problems_equal_fp64(seed, device):
    dtype = DTYPES[seed % 3]
    problems = [_in(p, dtype) for p in random_problems(CONV_BN_ACT, 20, dtype, seed)]
    for problem in itertools.islice((p for p in problems if _products(p) < 1e7), 2):
        configs = CANDIDATE.configs(problem, H100)
        check_candidate(CANDIDATE, problem, configs[seed % len(configs)], device, seed=seed)


@pytest.mark.parametrize("name", ["resnet50", "resnext50_32x4d"])
def test_layers_of_small_images_equal_fp64(name, device):
    """Every distinct layer, 32 x 32 images: down to one pixel, 2,048 channels deep."""
    for index, problem in enumerate(network_problems(CONV_BN_ACT, (name,), 1, torch.bfloat16, 32)):
        if index % 2 == (name != "resnet50"):
            check_candidate(CANDIDATE, problem, CANDIDATE.configs(problem, H100)[0], device, runs=1)


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 3, 32, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", ["resnet50", "resnext50_32x4d"])
def test_layers_of_networks_on_a_gpu(name, dtype, batch):
    for problem in network_problems(CONV_BN_ACT, (name,), batch, dtype):
        problem = _in(problem, dtype)
        for config in CANDIDATE.configs(problem, H100)[:3]:
            check_candidate(CANDIDATE, problem, config, "cuda")
        check_candidate(CANDIDATE, problem, CANDIDATE.configs(problem, H100)[0], "cuda", integers=True)


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(200))
def test_random_problems_on_a_gpu(seed):
    dtype = DTYPES[seed % 3]
    (problem,) = random_problems(CONV_BN_ACT, 1, dtype, 1000 + seed)
    problem = _in(problem, dtype)
    for config in CANDIDATE.configs(problem, H100):
        check_candidate(CANDIDATE, problem, config, "cuda", seed=seed)


def test_merged_groups_compute_the_same_convolution():
    for k, c, groups in [(32, 32, 32), (128, 128, 32), (24, 48, 12), (96, 36, 3), (130, 130, 65)]:
        spec = ConvSpec(1, c, 5, 5, k, (3, 3), padding=(1, 1), groups=groups)
        merged = merged_groups(spec)
        assert groups % merged == 0 and (merged == 1 or k // groups * merged <= 64)
        weight, x = torch.randn(spec.weight_shape).double(), torch.randn(spec.x_shape).double()
        want = torch.conv2d(x, weight, padding=1, groups=groups)
        got = torch.conv2d(x, merge_groups(weight, groups, merged), padding=1, groups=groups // merged)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_filter_rows_are_padded_to_whole_chunks():
    weight = torch.arange(2 * 3 * 9, dtype=torch.float32).view(2, 3, 3, 3)
    rows = filter_rows(weight, torch.bfloat16)
    assert rows.shape == (2, 32) and torch.equal(rows[:, 27:], torch.zeros(2, 5, dtype=torch.bfloat16))
    assert torch.equal(rows[0, :3].float(), weight[0, :, 0, 0])


def test_small_batches_are_split_and_large_ones_are_not():
    small = conv_problem(1, 512, 7, 7, 512, 3, torch.bfloat16)
    large = conv_problem(256, 64, 56, 56, 64, 3, torch.bfloat16)
    assert CANDIDATE.configs(small, H100)[0].splits > 1
    assert CANDIDATE.configs(large, H100)[0].splits == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict(dtype=torch.float64), "dtype"),
        (dict(dtype=torch.float32), "TF32"),
        (dict(n=2**20), "2^31 elements"),
    ],
)
def test_what_it_cannot_do_is_refused_with_the_reason(change, reason):
    problem = conv_problem(change.get("n", 1), 64, 56, 56, 64, 3, change.get("dtype", torch.bfloat16))
    assert reason in CANDIDATE.accepts(problem, H100)


def test_old_gpus_and_cpus_are_refused_with_the_reason():
    problem = conv_problem(1, 64, 8, 8, 64, 1, torch.bfloat16)
    assert CANDIDATE.accepts(problem, H100) is None
    assert "sm_80" in CANDIDATE.accepts(problem, replace(H100, arch="sm75"))
    assert "CUDA device" in CANDIDATE.accepts(problem, replace(H100, kind="cpu", arch="cpu"))


def _arguments():
    emulated.library()
    x = torch.randn(1, 16, 4, 4).bfloat16().to(memory_format=torch.channels_last)
    out = torch.empty(1, 8, 4, 4, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    record = torch.empty(1536, dtype=torch.uint8)
    return dict(
        x=x,
        weight=torch.randn(8, 16).bfloat16(),
        scale=torch.ones(8),
        shift=torch.zeros(8),
        residual=None,
        out=out,
        workspace=None,
        counters=None,
        geometry=[1, 1, 1, 1, 0, 0, 1, 1, 1],
        act=0,
        act_param=0.0,
        block_m=64,
        block_n=64,
        splits=1,
        record=record,
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=torch.randn(1, 16, 4, 4).bfloat16()), "x must be a dense channels_last"),
        (dict(weight=torch.randn(8, 16)), "weight differs from x in type"),
        (dict(weight=torch.randn(8, 8).bfloat16()), r"weight has the shape \[8, 8\], expected \[8, 16\]"),
        (dict(scale=torch.ones(9)), r"scale has the shape \[9\]"),
        (dict(geometry=[3, 3, 1, 1, 0, 0, 1, 1, 1]), r"out has the shape .* expected \[1, 8, 2, 2\]"),
        (dict(geometry=[1, 1, 0, 1, 0, 0, 1, 1, 1]), r"geometry\[2\] is 0"),
        (dict(splits=2), "splits is 2, expected 1 to 1"),
        (dict(block_m=32), "64 x 64, 128 x 64 and 128 x 128"),
        (dict(act=8), "act is 8"),
        (dict(record=torch.empty(3, dtype=torch.uint8)), "record must be uint8"),
    ],
)
def test_bad_arguments_are_refused_by_name(change, message):
    from fastres.backends.cuda_ops import _call

    with pytest.raises((TypeError, ValueError), match=message):
        _call(torch.ops.fastres_cuda.sm80_conv_bn_act, *{**_arguments(), **change}.values())


def test_records_that_are_none_are_refused():
    emulated.library()
    from fastres.backends.cuda_ops import _call

    with pytest.raises(ValueError, match=r"records\[0\] is no record"):
        _call(torch.ops.fastres_cuda.run_records, torch.zeros(1536, dtype=torch.uint8), 0)


def test_joined_launches_do_what_the_single_ones_do():
    emulated.library()
    from fastres.graph.fold import LayerParameters
    from fastres.plan.candidate import Buffers
    from tests.kernels.checking import make_inputs, make_nodes

    first = conv_problem(1, 16, 6, 6, 24, 3, torch.bfloat16, act=RELU)
    second = conv_problem(1, 24, 6, 6, 16, 1, torch.bfloat16, residual=True)
    x = make_inputs(first, "cpu")["conv.x"]
    middle = torch.zeros(first["conv"].y_shape, dtype=x.dtype).to(memory_format=torch.channels_last)
    out = torch.zeros_like(x)
    launches = []
    for problem, tensors in (
        (first, {"conv.x": x, "conv": middle}),
        (second, {"conv.x": middle, "conv.residual": x, "conv": out}),
    ):
        nodes = make_nodes(problem, "cpu")
        constants = CANDIDATE.prepare(
            problem, ConvConfig(64, 64), {r: LayerParameters(n) for r, n in nodes.items()}
        )
        launches.append(CANDIDATE.bind(problem, ConvConfig(64, 64), Buffers(tensors), constants))
    for launch in launches:
        launch()
    want = out.clone()
    middle.zero_()
    out.zero_()
    assert launches[0].join is launches[1].join
    launches[0].join(launches)()
    assert torch.equal(out, want) and want.abs().max() > 0
