"""sm90_conv_latency: wgmma with filters as M, depth divided in a cluster; in the emulator and on a Hopper."""

import pytest
import torch
from problems import H100, check_candidate, conv_problem, network_problems, problem_of

from fastres.activation import RELU, Activation
from fastres.backends.cuda.latency import LatencyConfig, Sm90ConvLatency, Sm90DualLatency
from fastres.plan.pattern import CONV_BN_ACT, DUAL
from fastres.plan.problem import ConvSpec

CANDIDATE, DUAL_CANDIDATE = Sm90ConvLatency(), Sm90DualLatency()
BF16, FP16 = torch.bfloat16, torch.float16
CASES = {
    "1x1": conv_problem(1, 64, 8, 8, 64, 1, BF16),
    "3x3, ragged, residual": conv_problem(2, 64, 9, 7, 72, 3, FP16, residual=True, act=RELU),
    "stride 2, groups": conv_problem(1, 32, 10, 10, 40, 3, BF16, stride=2, groups=4),
    "odd filters": conv_problem(3, 128, 6, 6, 131, 1, FP16, stride=2, residual=True),
    "dilation, merged groups": conv_problem(
        1, 48, 7, 9, 48, 3, BF16, dilation=2, groups=12, act=Activation("silu")
    ),
    "more steps than stages": conv_problem(1, 136, 7, 7, 64, 3, BF16, residual=True, act=RELU),
}


@pytest.mark.parametrize("name", CASES)
def test_every_config_equals_fp64(name, every_schedule):
    problem = CASES[name]
    for config in CANDIDATE.configs(problem, H100):
        check_candidate(CANDIDATE, problem, config, every_schedule)
    check_candidate(CANDIDATE, problem, config, every_schedule, integers=True, seed=1)


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
def test_every_config_of_dual_equals_fp64(problem, every_schedule):
    for config in DUAL_CANDIDATE.configs(problem, H100):
        check_candidate(DUAL_CANDIDATE, problem, config, every_schedule)


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 3, 16])
def test_duals_of_resnet50_on_a_gpu(batch):
    for problem in network_problems(DUAL, ("resnet50",), batch, BF16):
        for config in DUAL_CANDIDATE.configs(problem, H100):
            check_candidate(DUAL_CANDIDATE, problem, config, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 3, 8, 16])
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_layers_of_networks_on_a_gpu(name, batch):
    for index, problem in enumerate(network_problems(CONV_BN_ACT, (name,), batch, (BF16, FP16)[batch % 2])):
        if CANDIDATE.accepts(problem, H100):
            continue  # the stem's three channels
        for config in CANDIDATE.configs(problem, H100):
            check_candidate(CANDIDATE, problem, config, "cuda", integers=index % 2 == 0)


def test_small_batches_fill_the_gpu():
    """At batch 1 the chosen configs of ResNet-50's 14 x 14 and 7 x 7 layers give most SMs a block."""
    for problem in network_problems(CONV_BN_ACT, ("resnet50",), 1):
        spec = problem["conv"]
        if spec.p > 14 or CANDIDATE.accepts(problem, H100):
            continue
        config = CANDIDATE.configs(problem, H100)[0]
        blocks = -(-spec.p * spec.q // config.pixels) * -(-spec.k // 64) * config.cluster
        assert blocks >= 56, (problem, config)


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (conv_problem(32, 64, 8, 8, 64, 1, BF16), "batches up to 16"),
        (conv_problem(1, 3, 8, 8, 64, 7, BF16), "do not fill 16 bytes"),
        (_dual(1, 64, 20, (4, 4), 1, 64, BF16), "do not fill 16 bytes"),
        (conv_problem(1, 64, 8, 8, 64, 1, torch.float32), "dtype"),
    ],
)
def test_what_it_cannot_do_is_refused_with_the_reason(problem, reason):
    candidate = CANDIDATE if problem.pattern == "conv_bn_act" else DUAL_CANDIDATE
    assert reason in candidate.accepts(problem, H100)


def test_other_architectures_are_refused():
    from dataclasses import replace

    problem = CASES["1x1"]
    assert CANDIDATE.accepts(problem, H100) is None
    assert "sm_90" in CANDIDATE.accepts(problem, replace(H100, arch="sm80"))
    assert "sm_90a" in CANDIDATE.accepts(problem, replace(H100, arch="sm100"))
    assert LatencyConfig(64, 2).to_dict() == {"pixels": 64, "cluster": 2}
