"""sm90_conv_bn_act: im2col maps, clusters, tickets, warps with roles; in the emulator and on a Hopper."""

from dataclasses import replace

import emulated
import pytest
import torch
from problems import H100, check_candidate, conv_problem, network_problems, problem_of, random_problems

from fastres.activation import RELU, Activation
from fastres.backends.cuda.sm90_conv_bn_act import (
    HALO_TILES,
    TILES,
    Sm90ConvBnAct,
    Sm90Dual,
    ThroughputConfig,
    takes_halo,
)
from fastres.plan.pattern import CONV_BN_ACT, DUAL
from fastres.plan.problem import ConvSpec

CANDIDATE, DUAL_CANDIDATE = Sm90ConvBnAct(), Sm90Dual()
BF16, FP16 = torch.bfloat16, torch.float16
CONFIGS = [ThroughputConfig(*tile, cluster) for tile in TILES for cluster in (1, 2)]
HALO_CONFIGS = [ThroughputConfig(*tile, cluster) for tile in HALO_TILES for cluster in (1, 2)]
POSITION_CONFIGS = [
    ThroughputConfig(*tile, cluster, True)
    for tile, cluster in zip(((128, 256), (128, 128), (64, 256), (128, 128)), (1, 2, 2, 1), strict=True)
]
# What decides the path: maps plain or im2col, depth ragged, residual by TMA, by elements or none, activation, tickets.
CASES = {
    "1x1, residual": (conv_problem(1, 72, 9, 7, 136, 1, BF16, residual=True, act=RELU), CONFIGS),
    "3x3, more steps than stages": (conv_problem(2, 40, 9, 7, 72, 3, FP16), CONFIGS[::3]),
    "3x3, stride 2": (
        conv_problem(1, 64, 11, 10, 64, 3, BF16, stride=2, residual=True, act=RELU),
        CONFIGS[1::3],
    ),
    "1x1, stride 2": (conv_problem(3, 128, 6, 7, 200, 1, FP16, stride=2), CONFIGS[2::3]),
    "no overlap": (
        conv_problem(1, 16, 5, 6, 8, (2, 1), BF16, stride=(3, 2), padding=(2, 0), dilation=(1, 3)),
        CONFIGS[:1],
    ),
    "dilation, silu": (
        conv_problem(1, 48, 7, 9, 48, 3, BF16, dilation=2, residual=True, act=Activation("silu")),
        CONFIGS[1::2],
    ),
    "halo, one image a row": (
        conv_problem(1, 24, 3, 56, 72, 3, BF16, residual=True, act=RELU),
        HALO_CONFIGS[1::2],
    ),
    "halo, two images a row": (conv_problem(1, 72, 9, 28, 64, 3, FP16, act=RELU), HALO_CONFIGS[2:3]),
    "halo, many tiles": (conv_problem(9, 8, 9, 7, 72, 3, BF16, residual=True), HALO_CONFIGS[:2]),
    "by position": (conv_problem(3, 24, 3, 4, 72, 3, BF16, residual=True, act=RELU), POSITION_CONFIGS[::2]),
    "by position, stride 2": (conv_problem(130, 8, 5, 3, 72, 3, FP16, stride=2), POSITION_CONFIGS[1::3]),
    "by position, dilation": (
        conv_problem(2, 24, 5, 7, 64, 3, BF16, dilation=2, act=Activation("silu")),
        POSITION_CONFIGS[:1],
    ),
    "odd filters": (conv_problem(3, 64, 6, 6, 131, 1, FP16, residual=True, act=RELU), CONFIGS[1::2]),
    "many tiles": (conv_problem(2, 8, 36, 30, 256, 1, BF16, residual=True, act=RELU), CONFIGS[4:6]),
    "many tiles, no residual": (conv_problem(5, 24, 17, 13, 80, 1, FP16), CONFIGS[6:]),
}


@pytest.mark.parametrize("name", CASES)
def test_tiles_and_clusters_equal_fp64(name, every_schedule):
    problem, configs = CASES[name]
    for config in configs:
        check_candidate(CANDIDATE, problem, config, every_schedule)
    check_candidate(CANDIDATE, problem, configs[0], every_schedule, integers=True, seed=1)


@pytest.mark.parametrize("kind", ["relu6", "gelu", "leaky_relu", "gelu_tanh", "hardswish"])
def test_every_activation_equals_fp64(kind, device):
    problem = conv_problem(
        1, 32, 5, 9, 80, 1, BF16, residual=True, act=Activation(kind, 0.2 if kind == "leaky_relu" else 0.0)
    )
    for config in CONFIGS[1:6:2]:
        check_candidate(CANDIDATE, problem, config, device)


def _dual(n, middle, channels, extent, stride, filters, dtype):
    p, q = extent
    return problem_of(
        DUAL,
        dtype,
        shortcut=ConvSpec(
            n, channels, p * stride, q * stride - stride + 1, filters, (1, 1), (stride, stride)
        ),
        expand=ConvSpec(n, middle, p, q, filters, (1, 1), act=RELU, residual=True),
    )


DUALS = [
    _dual(1, 64, 64, (8, 8), 1, 256, BF16),
    _dual(2, 128, 256, (5, 7), 2, 72, FP16),
    _dual(3, 24, 40, (6, 5), 2, 64, BF16),
]


@pytest.mark.parametrize("problem", DUALS, ids=str)
def test_dual_equals_fp64(problem, every_schedule):
    for config in CONFIGS[1:8:2]:
        check_candidate(DUAL_CANDIDATE, problem, config, every_schedule)


@pytest.mark.parametrize("seed", range(6))
def test_random_problems_equal_fp64(seed, device):
    found = 0
    for problem in random_problems(CONV_BN_ACT, 60, (BF16, FP16)[seed % 2], seed):
        if CANDIDATE.accepts(problem, H100) or problem.flops > 4e6:
            continue
        configs = CANDIDATE.configs(problem, H100)
        check_candidate(CANDIDATE, problem, configs[seed % len(configs)], device, seed=seed)
        found += 1
        if found == 2:
            return
    pytest.fail("too few problems that it takes")


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 3, 32, 256])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=lambda d: str(d)[6:])
def test_layers_of_resnet50_on_a_gpu(dtype, batch):
    taken = 0
    for problem in network_problems(CONV_BN_ACT, ("resnet50",), batch, dtype):
        if CANDIDATE.accepts(problem, H100):
            continue  # the stem's three channels
        taken += 1
        configs = CANDIDATE.configs(problem, H100)
        whole = {config for config in configs if not config.by_position}
        assert whole == {*CONFIGS, *(HALO_CONFIGS if takes_halo(problem["conv"]) else ())}
        distinct = 3 if batch > 3 else None
        for config in configs if batch <= 3 else configs[:3]:
            check_candidate(CANDIDATE, problem, config, "cuda", runs=3, distinct=distinct)
        check_candidate(CANDIDATE, problem, configs[0], "cuda", integers=True, distinct=distinct)
    assert taken >= 20


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 3, 32, 256])
def test_duals_of_resnet50_on_a_gpu(batch):
    for dtype in (BF16, FP16):
        for problem in network_problems(DUAL, ("resnet50",), batch, dtype):
            for config in DUAL_CANDIDATE.configs(problem, H100)[: 8 if batch <= 3 else 3]:
                check_candidate(
                    DUAL_CANDIDATE, problem, config, "cuda", runs=3, distinct=3 if batch > 3 else None
                )


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(200))
def test_random_problems_on_a_gpu(seed):
    problems = random_problems(CONV_BN_ACT, 40, (BF16, FP16)[seed % 2], 3000 + seed)
    problem = next(p for p in problems if CANDIDATE.accepts(p, H100) is None)
    configs = CANDIDATE.configs(problem, H100)
    for config in {configs[0], configs[seed % len(configs)]}:
        check_candidate(CANDIDATE, problem, config, "cuda", seed=seed)


def _choice(*args, **fields):
    return CANDIDATE.configs(conv_problem(*args, BF16, **fields), H100)[0]


def test_the_heuristic_fits_the_tile_to_the_layer():
    """64 filters take the 64-filter tile, 128 the widest run of pixels; nothing is computed for filters that do
    not exist, and 7 x 7 layers divide into more tiles than there are clusters."""
    assert _choice(256, 64, 56, 56, 64, 1).filters == 64
    assert _choice(256, 64, 56, 56, 64, 3, act=RELU) == ThroughputConfig(64, 448, 2)
    assert _choice(256, 128, 28, 28, 128, 3, act=RELU) == ThroughputConfig(128, 224, 2)
    assert _choice(256, 128, 56, 56, 128, 3, stride=2, act=RELU) == ThroughputConfig(128, 256, 2)
    # At 512 images the corners' and edges' shorter tiles fill the last wave.
    assert _choice(512, 512, 7, 7, 512, 3, act=RELU).by_position
    assert not _choice(512, 64, 56, 56, 64, 3, act=RELU).by_position
    for problem in network_problems(CONV_BN_ACT, ("resnet50",), 256):
        if CANDIDATE.accepts(problem, H100) is None:
            config, spec = CANDIDATE.configs(problem, H100)[0], problem["conv"]
            assert config.filters <= max(64, spec.k)
            tiles = -(-spec.n * spec.p * spec.q // (config.pixels * config.cluster)) * -(
                -spec.k // config.filters
            )
            waves = tiles * config.cluster / H100.sms
            assert waves / -(-waves // 1) > 0.7, (problem, config, waves)


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (conv_problem(8, 3, 8, 8, 64, 7, BF16), "do not fill 16 bytes"),
        (conv_problem(8, 64, 8, 8, 64, 3, BF16, groups=32), "one group"),
        (conv_problem(8, 64, 28, 28, 64, 3, BF16, stride=9), "strides up to 8"),
        (conv_problem(1, 64, 300, 300, 64, 3, BF16, dilation=129), "im2col"),
        (conv_problem(1, 64, 8, 8, 64, 3, torch.float32), "dtype"),
        (conv_problem(2**15, 64, 56, 56, 64, 3, BF16), "2^31 elements"),
        (_dual(1, 64, 20, (4, 4), 1, 64, BF16), "do not fill 16 bytes"),
    ],
)
def test_what_it_cannot_do_is_refused_with_the_reason(problem, reason):
    candidate = CANDIDATE if problem.pattern == "conv_bn_act" else DUAL_CANDIDATE
    assert reason in candidate.accepts(problem, H100)


def test_other_architectures_are_refused():
    problem = CASES["1x1, residual"][0]
    assert CANDIDATE.accepts(problem, H100) is None
    assert "sm_90" in CANDIDATE.accepts(problem, replace(H100, arch="sm80"))
    assert "sm_90a" in CANDIDATE.accepts(problem, replace(H100, arch="sm100"))


def _arguments():
    emulated.library()
    nhwc = torch.channels_last
    return dict(
        x=torch.randn(1, 16, 4, 4).bfloat16().to(memory_format=nhwc),
        weight=torch.randn(8, 16).bfloat16(),
        scale=torch.ones(8),
        shift=torch.zeros(8),
        residual=None,
        out=torch.empty(1, 8, 4, 4, dtype=torch.bfloat16).to(memory_format=nhwc),
        counter=torch.zeros(1, dtype=torch.int32),
        geometry=[1, 1, 1, 1, 0, 0, 1, 1, 1],
        act=0,
        act_param=0.0,
        second=None,
        second_weight=None,
        second_stride=[],
        filters=128,
        pixels=256,
        cluster=2,
        by_position=False,
        record=torch.empty(1536, dtype=torch.uint8),
    )


_SECOND = torch.randn(1, 16, 7, 8).bfloat16().to(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(weight=torch.randn(8, 8).bfloat16()), r"weight has the shape \[8, 8\], expected \[8, 16\]"),
        (dict(counter=torch.zeros(0, dtype=torch.int32)), "counters has 0 entries, needs 1"),
        (dict(filters=64, pixels=64), "128 x 256, 256 x 128, 128 x 128, 64 x 256, 128 x 224 and 64 x 448"),
        (dict(cluster=4), "cluster: 1 and 2"),
        (dict(pixels=224), "halo form takes a 3x3"),
        (dict(geometry=[1, 1, 1, 1, 0, 0, 1, 1, 2], weight=torch.randn(8, 8).bfloat16()), "groups: one"),
        (dict(second=_SECOND), "give both or none"),
        (
            dict(second=_SECOND, second_weight=torch.randn(8, 8).bfloat16(), second_stride=[2, 2]),
            "second_weight has",
        ),
        (
            dict(second=_SECOND, second_weight=torch.randn(8, 16).bfloat16(), second_stride=[1, 1]),
            "out has the shape",
        ),
        (
            dict(second=_SECOND, second_weight=torch.randn(8, 16).bfloat16(), second_stride=[2]),
            "second_stride has 1",
        ),
        (dict(record=torch.empty(3, dtype=torch.uint8)), "record must be uint8"),
    ],
)
def test_bad_arguments_are_refused_by_name(change, message):
    from fastres.backends.cuda_ops import _call

    with pytest.raises((TypeError, ValueError), match=message):
        _call(torch.ops.fastres_cuda.sm90_conv_bn_act, *{**_arguments(), **change}.values())
