"""sm90_conv_latency: wgmma with filters as M, depth divided in a cluster; in the emulator and on a Hopper."""

import itertools
import math
import struct
from concurrent.futures import ThreadPoolExecutor

import emulated
import pytest
import torch
import torchvision
from problems import H100, check_candidate, conv_problem, make_nodes, network_problems, problem_of

from fastres import backends
from fastres.activation import RELU, Activation
from fastres.backends.cuda.latency import (
    LatencyConfig,
    Sm90ConvLatency,
    Sm90DualLatency,
    box_width,
    max_stages,
    stage_bytes,
)
from fastres.graph.capture import capture
from fastres.graph.fold import LayerParameters
from fastres.plan.candidate import Buffers
from fastres.plan.pattern import CONV_BN_ACT, DUAL
from fastres.plan.planner import make_plan
from fastres.plan.problem import ConvSpec
from fastres.plan.specs import propagate
from fastres.plan.target import on_paper

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
    "taps in the padding": conv_problem(4, 64, 7, 7, 64, 3, FP16, act=RELU),
    "no tap inside": conv_problem(1, 8, 1, 1, 8, 1, BF16, padding=2, stride=2, residual=True),
}


def _share(request, configs, number):
    """The half of the configs whose turn it is in the emulator: every config runs under two of the four schedules,
    which of them changes from case to case, and between them every tile and path under all four."""
    schedules, schedule = list(emulated.SCHEDULES.values()), request.node.callspec.params["every_schedule"]
    if schedule not in schedules:
        return configs
    # early and all late, or one of the two late
    return configs[(number + (schedules.index(schedule) in (1, 2))) % 2 :: 2] or configs


@pytest.mark.parametrize("name", CASES)
def test_every_config_equals_fp64(name, every_schedule, request):
    problem = CASES[name]
    for config in _share(request, CANDIDATE.configs(problem, H100), list(CASES).index(name)):
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
def test_every_config_of_dual_equals_fp64(problem, every_schedule, request):
    for config in _share(request, DUAL_CANDIDATE.configs(problem, H100), DUALS.index(problem)):
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


def _blocks(spec, config):
    return math.prod(
        -(-a // b)
        for a, b in zip((spec.n, spec.p, spec.q, spec.k), (*config.box, config.filters), strict=True)
    )


def test_small_batches_fill_the_gpu():
    """At batch 1 the chosen configs of ResNet-50's 14 x 14 and 7 x 7 layers give most SMs a block."""
    for problem in network_problems(CONV_BN_ACT, ("resnet50",), 1):
        spec = problem["conv"]
        if spec.p > 14 or CANDIDATE.accepts(problem, H100):
            continue
        config = CANDIDATE.configs(problem, H100)[0]
        assert _blocks(spec, config) * config.cluster >= 56, (problem, config)


@pytest.mark.parametrize("batch", [1, 16])
def test_two_blocks_fit_an_sm(batch):
    """The next layer's blocks wait beside this one's: shared memory of the records, of every config."""
    emulated.library()
    for problem in network_problems(CONV_BN_ACT, ("resnet50",), batch, size=64):
        if CANDIDATE.accepts(problem, H100):
            continue
        spec = problem["conv"]
        tensors = {name: _empty(problem.input_shape(name)) for name in problem.inputs}
        tensors["conv"] = _empty(spec.y_shape)
        parameters = {role: LayerParameters(node) for role, node in make_nodes(problem, "cpu").items()}
        for config in CANDIDATE.configs(problem, H100):
            constants = CANDIDATE.prepare(problem, config, parameters)
            record = CANDIDATE.bind(problem, config, Buffers(tensors), constants).records
            # magic, grid, block, cluster, shared memory: after the parameters and two pointers (launch.h)
            *_, x, y, z, threads, cluster, shared = struct.unpack_from("<8I", record.numpy().tobytes(), 1420)
            assert (y, z, threads, cluster) == (1, 1, 2 * config.filters, config.cluster)
            assert x == _blocks(spec, config) * config.cluster
            assert 2 * (shared + 1024) <= 228 * 1024
            # no more than the steps fill, or the sums
            pixels, filters = box_width(config.box), config.filters
            steps = -(-spec.kernel[0] * spec.kernel[1] * -(-spec.c // 64) // config.cluster)
            stages = min(steps, max_stages(filters, pixels))
            assert (
                shared == max(stages * stage_bytes(filters, pixels), pixels * (filters + 4) * 4) + 8 * stages
            )


def _binding(channels, device):
    """(what makes a record, its output) for a 1x1 of 49 pixels."""
    problem, config = conv_problem(1, channels, 7, 7, 64, 1, BF16), LatencyConfig(1, 7, 7, 1)
    tensors = {n: _empty(problem.input_shape(n), device).fill_(1) for n in problem.inputs}
    tensors["conv"] = _empty(problem["conv"].y_shape, device).fill_(float("nan"))
    parameters = {role: LayerParameters(node) for role, node in make_nodes(problem, device).items()}
    constants = CANDIDATE.prepare(problem, config, parameters)
    return lambda: CANDIDATE.bind(problem, config, Buffers(tensors), constants), tensors["conv"]


def test_a_record_takes_no_shared_memory_from_an_earlier_one(device):
    """Both are of one function, and CUDA's limit belongs to the function: what is bound last must not lower it."""
    if device == "cpu":
        emulated.library()
    bindings = [_binding(channels, device) for channels in (448, 320)]  # 7 and 5 stages of 16 KB
    for launch in [bind() for bind, _ in bindings]:
        launch()
    assert all(out.isfinite().all() for _, out in bindings)


@pytest.mark.gpu
def test_a_record_is_made_in_a_thread_that_has_no_context():
    """torch's device guard makes none current where the device is the current one already; the driver wants one."""
    bind, out = _binding(64, "cuda")
    with ThreadPoolExecutor(1) as fresh:
        launch = fresh.submit(bind).result()
    launch()
    assert out.isfinite().all()


def _empty(shape, device="cpu"):
    return torch.empty(shape, dtype=BF16, device=device).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (conv_problem(32, 64, 8, 8, 64, 1, BF16), "batches up to 16"),
        (conv_problem(1, 3, 8, 8, 64, 7, BF16), "do not fill 16 bytes"),
        (_dual(1, 64, 20, (4, 4), 1, 64, BF16), "do not fill 16 bytes"),
        (conv_problem(1, 64, 8, 8, 64, 1, torch.float32), "dtype"),
        (conv_problem(1, 64, 99, 99, 64, 1, BF16, stride=9), "strides up to 8"),
        (conv_problem(1, 64, 260, 8, 64, 1, BF16, stride=5), "stride 5 over 52 outputs"),
    ],
)
def test_what_it_cannot_do_is_refused_with_the_reason(problem, reason):
    candidate = CANDIDATE if problem.pattern == "conv_bn_act" else DUAL_CANDIDATE
    assert reason in candidate.accepts(problem, H100)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (LatencyConfig(2, 8, 9, 1), "1 to 128 pixels"),
        (LatencyConfig(1, 8, 8, 1, 96), "filters: 64 and 128"),
        (LatencyConfig(0, 8, 8, 1), "box"),
        (LatencyConfig(1, 8, 8, 2), "cluster is 2, expected 1 to 1"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(config, reason, device):
    with pytest.raises(ValueError, match=reason):
        check_candidate(CANDIDATE, CASES["1x1"], config, device)


def test_other_architectures_are_refused():
    from dataclasses import replace

    problem = CASES["1x1"]
    assert CANDIDATE.accepts(problem, H100) is None
    assert "sm_90" in CANDIDATE.accepts(problem, replace(H100, arch="sm80"))
    assert "sm_90a" in CANDIDATE.accepts(problem, replace(H100, arch="sm100"))


def test_a_plan_for_one_image_is_a_chain_of_records():
    """Predictions decide where nothing was measured near this batch size: ResNet-50 on a Hopper, on paper."""
    backends.load()
    graph = capture(torchvision.models.resnet50().eval())
    x = torch.empty(1, 3, 224, 224, device="meta", dtype=BF16)
    plan = make_plan(graph, propagate(graph, (x,), BF16), BF16, on_paper("sm90"))
    names = [segment.candidate.name for segment in plan.segments]
    assert names.count("cuda.sm90_dual_latency") == 4 and names[-1] == "cuda.any_pool_linear"
    calls = sum(1 for a, b in itertools.pairwise(["", *names]) if not (is_cuda(a) and is_cuda(b)))
    assert names[0] == "cuda.sm90_stem_pool" and calls == 1 and len(names) == 50


def is_cuda(name):
    return name.startswith("cuda.")
