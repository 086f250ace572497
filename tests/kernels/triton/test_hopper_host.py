"""The Hopper kernels without a Hopper: their very source, with the launches that their candidates bind,
runs on the machine of hopper_machine.py, in several orders of events, and every result is held to the oracle.

This covers tile, tap and box coordinates, padding, the stride-2 view, ring and turn counts, barriers,
deadlocks and races of threads with TMA and wgmma; it cannot cover layouts inside a tile
(test_hopper_gate.py compiles those).
"""

import inspect
import random
import re
import textwrap
from dataclasses import replace

import pytest
import torch
from hopper_machine import Machine, MachineError, tma_fault
from hopper_problems import hopper_problems
from problems import H100, check_candidate, conv_problem, network_problems, problem_of, random_problems

from fastres.activation import IDENTITY, RELU, Activation
from fastres.backends.triton_hopper import base
from fastres.plan.candidate import REGISTRY
from fastres.plan.pattern import DUAL, EXPAND_REDUCE, SHIFTED_BLOCK, STEM_POOL
from fastres.plan.problem import ConvSpec, NormalizeSpec, PoolSpec

BF16 = torch.bfloat16
# Orders of events: one always, more by hand.
SEEDS = (0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 8)))
HOPPER = [candidate for candidate in REGISTRY.candidates.values() if candidate.backend == "hopper"]


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)


@pytest.fixture
def machine(monkeypatch):
    """Bound calls run on the machine, on at most `blocks` blocks, which claim their tiles; `machine.runs` keeps what
    ran."""

    class Control:
        def __init__(self):
            self.blocks, self.seed, self.runs = 3, 0, []

    control = Control()

    def run(call):
        columns = call.arguments.get("columns", 1) if call.arguments.get("STATIONARY") else 1
        persistent = "tiles" in call.arguments or "strips" in call.arguments
        grid = min(call.grid, max(control.blocks // columns, 1) * columns) if persistent else call.grid
        ran = Machine(call.kernel, grid, call.arguments, call.options["num_warps"], control.seed)
        assert not call.arguments.get("counter", torch.zeros(1)).any(), "a counter is not left at zero"
        control.runs.append((call, ran))
        control.seed += 1

    monkeypatch.setattr(base.Call, "__call__", run)
    monkeypatch.setattr(base, "FEW_TILES", 0)
    return control


def check(machine, name, problem, config=None, integers=True, runs=2, planar=False):
    """The candidate's answer is exact on whole numbers, TMA writes each output element once, and the
    shared memory that the configuration counts on is not exceeded."""
    candidate = REGISTRY[name]
    assert candidate.accepts(problem, H100) is None
    config = candidate.configs(problem, H100)[0] if config is None else config
    check_candidate(candidate, problem, config, integers=integers, runs=runs, planar=planar)
    assert machine.runs
    for _, ran in machine.runs:
        assert ran.shared_bytes <= base.SHARED_MEMORY // max(1, getattr(config, "per_sm", 1))
        for times in ran.written.values():
            inside = times[times > 0]
            assert inside.numel() and bool((inside == 1).all()), (
                "an output element was written more than once"
            )


CONVS = {
    "1x1": conv_problem(2, 64, 12, 12, 64, 1, BF16, act=RELU),
    "1x1 ragged channels": conv_problem(3, 72, 9, 7, 136, 1, BF16),
    "1x1 32 channels": conv_problem(1, 24, 12, 12, 40, 1, BF16, act=RELU),
    "1x1/2": conv_problem(3, 64, 14, 10, 128, 1, BF16, stride=2),
    "1x1 + residual": conv_problem(2, 128, 14, 14, 256, 1, BF16, act=RELU, residual=True),
    "3x3": conv_problem(2, 64, 14, 14, 64, 3, BF16, act=RELU),
    "3x3 ragged": conv_problem(2, 40, 9, 13, 24, 3, BF16, act=RELU, residual=True),
    "3x3/2": conv_problem(3, 64, 16, 12, 64, 3, BF16, stride=2, act=RELU),
    "3x3/2 no padding": conv_problem(2, 64, 16, 12, 64, 3, BF16, stride=2, padding=0),
    "3x3 dilation 2": conv_problem(2, 64, 10, 9, 64, 3, BF16, dilation=2, act=RELU),
    "1x7": conv_problem(1, 32, 9, 20, 32, (1, 7), BF16),
    "7x7/2 padding 3": conv_problem(1, 32, 20, 20, 64, 7, BF16, stride=2),
    "5x5/2 padding 1": conv_problem(1, 64, 14, 18, 64, 5, BF16, stride=2, padding=1),
    "2x2": conv_problem(1, 64, 9, 9, 64, 2, BF16, padding=1),
}


@pytest.mark.parametrize("problem", CONVS.values(), ids=CONVS.keys())
def test_conv_bn_act_is_exact_on_whole_numbers(machine, problem):
    check(machine, "hopper.conv_bn_act", problem, runs=2)


CONFIGS = {
    "ping-pong": dict(block_m=64, block_n=64, stages=3),
    "one stage more than steps": dict(block_m=64, block_n=64, stages=2),
    "one consumer": dict(block_m=64, block_n=64, stages=3, consumers=1),
    "two buffers": dict(block_m=64, block_n=64, stages=3, staged=2),
    "resident": dict(block_m=64, block_n=64, stages=3, staged=2, stationary=True),
    "resident, one buffer": dict(block_m=64, block_n=128, stages=4, stationary=True),
    "one consumer, two buffers": dict(block_m=64, block_n=64, stages=3, consumers=1, staged=2),
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_conv_bn_act_keeps_its_rings_in_order(machine, config, residual, seed):
    from fastres.backends.triton_hopper.tiling import GemmConfig

    machine.seed = 100 * seed
    problem = conv_problem(4, 128, 14, 14, 128, 1, BF16, act=RELU, residual=residual)
    check(machine, "hopper.conv_bn_act", problem, GemmConfig(**config))


@pytest.mark.parametrize("consumers", [1, 2])
def test_conv_bn_act_skips_taps_in_the_padding(machine, consumers):
    from fastres.backends.triton_hopper.tiling import GemmConfig

    problem = conv_problem(70, 64, 3, 4, 64, 3, BF16, act=RELU)
    config = GemmConfig(64, 64, stages=4, consumers=consumers, skip=True)
    check(machine, "hopper.conv_bn_act", problem, config)
    taps = sum((3 - (p in (0, 2))) * (3 - (q in (0, 3))) for p in range(3) for q in range(4))
    # A tile is one pixel of 64 images; 64 channels are one product a tap.
    assert {ran.products for _, ran in machine.runs} == {2 * taps}


@pytest.mark.parametrize(
    "kind", ["identity", "relu", "relu6", "silu", "leaky_relu", "gelu_tanh", "hardswish"]
)
@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=["bf16", "fp16"])
def test_activations_and_scale_are_right_in_both_types(machine, kind, dtype):
    act = Activation(kind, 0.1 if kind == "leaky_relu" else 0.0)
    problem = conv_problem(1, 64, 12, 11, 72, 1, dtype, act=act, residual=True)
    check(machine, "hopper.conv_bn_act", problem, integers=False)


def dual(n, c, ch, h, w, k, stride, act=RELU):
    shortcut = ConvSpec(n, c, h, w, k, (1, 1), (stride, stride))
    expand = ConvSpec(n, ch, h // stride, w // stride, k, (1, 1), act=act, residual=True)
    return problem_of(DUAL, BF16, shortcut=shortcut, expand=expand)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("consumers", [1, 2])
def test_dual_adds_the_projected_shortcut(machine, stride, consumers, seed):
    from fastres.backends.triton_hopper.tiling import GemmConfig

    machine.seed = 100 * seed
    config = GemmConfig(64, 64, stages=3, consumers=consumers)
    check(machine, "hopper.dual", dual(3, 128, 64, 14, 10, 136, stride), config)


def test_dual_passes_on_an_activation_of_its_own(machine):
    check(machine, "hopper.dual", dual(1, 64, 64, 8, 8, 64, 1, IDENTITY))


def expand_reduce(n, c, h, w, k, act=RELU, reduced=None, projected=0, stride=1):
    layers = dict(
        expand=ConvSpec(n, c, h, w, k, (1, 1), act=act, residual=True),
        reduce=ConvSpec(n, k, h, w, reduced or c, (1, 1), act=act),
    )
    if projected:
        layers["shortcut"] = ConvSpec(n, projected, stride * h, stride * w, k, (1, 1), (stride, stride))
    return problem_of(EXPAND_REDUCE, BF16, **layers)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("c", "reduced"), [(64, 64), (128, 128), (256, 256), (64, 128), (128, 256)])
def test_expand_reduce_is_exact_on_whole_numbers(machine, c, reduced, seed):
    machine.seed = 100 * seed
    problem = expand_reduce(5, c, 11, 13, 4 * c, reduced=reduced)
    for config in REGISTRY["hopper.expand_reduce"].configs(problem, H100):
        check(machine, "hopper.expand_reduce", problem, config)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("c", [64, 128])
def test_expand_reduce_with_the_projection_inside(machine, c, seed):
    machine.seed = 100 * seed
    problem = expand_reduce(3, c, 11, 13, 256, projected=64)
    for config in REGISTRY["hopper.expand_reduce"].configs(problem, H100):
        check(machine, "hopper.expand_reduce", problem, config)
    check(machine, "hopper.expand_reduce", problem, integers=False)


def test_expand_reduce_says_why_not():
    """All that it leaves to separate kernels in the bottleneck networks."""
    candidate, reasons = REGISTRY["hopper.expand_reduce"], {}
    networks = ("resnet50", "resnet101", "resnet152", "resnext50_32x4d", "wide_resnet50_2")
    for problem in network_problems(EXPAND_REDUCE, networks):
        reason = candidate.accepts(problem, H100)
        if reason is None:
            assert candidate.configs(problem, H100)
        else:
            expand, shortcut = problem["expand"], problem.get("shortcut")
            stride = 0 if shortcut is None else shortcut.stride[0]
            reasons[expand.c, expand.k, stride, problem["reduce"].k] = reason
    file, room = "are the whole register file", "no room for two stages of weights"
    assert {key: next(part for part in (file, room) if part in reasons[key]) for key in reasons} == {
        (128, 512, 2, 128): room,
        (256, 1024, 2, 256): room,
        (256, 1024, 0, 512): file,
        (512, 2048, 2, 512): file,
        (512, 2048, 0, 512): file,
        # ResNeXt and Wide ResNet
        (256, 512, 2, 256): room,
        (256, 512, 0, 512): file,
        (512, 1024, 2, 512): file,
        (512, 1024, 0, 512): file,
        (512, 1024, 0, 1024): file,
        (1024, 2048, 2, 1024): file,
        (1024, 2048, 0, 1024): file,
    }


def test_expand_reduce_takes_two_activations(machine):
    problem = expand_reduce(1, 64, 9, 9, 128, Activation("silu"))
    check(machine, "hopper.expand_reduce", problem, integers=False)


def shifted_block(n, h, w, reduced, k=256, act=RELU, project=False):
    layers = dict(
        conv=ConvSpec(n, 64, h, w, 64, (3, 3), padding=(1, 1), act=act),
        expand=ConvSpec(n, 64, h, w, k, (1, 1), act=act, residual=True),
    )
    if project:
        layers["shortcut"] = ConvSpec(n, 64, h, w, k, (1, 1))
    if reduced:
        layers["reduce"] = ConvSpec(n, k, h, w, reduced, (1, 1), act=act)
    return problem_of(SHIFTED_BLOCK, BF16, **layers)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("reduced", "project"), [(0, False), (64, False), (128, False), (0, True), (64, True)]
)
def test_shifted_block_is_exact_on_whole_numbers(machine, reduced, project, seed):
    machine.seed = 100 * seed
    problem = shifted_block(2, 19, 14, reduced, project=project)
    for config in REGISTRY["hopper.shifted_block"].configs(problem, H100):
        check(machine, "hopper.shifted_block", problem, config)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
def test_halo_is_exact_on_whole_numbers(machine, residual, seed):
    machine.seed = 100 * seed
    problem = conv_problem(2, 64, 21, 19, 64, 3, BF16, act=RELU, residual=residual)
    for config in REGISTRY["hopper.halo"].configs(problem, H100):
        check(machine, "hopper.halo", problem, config)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize(("n", "h", "w"), [(2, 24, 19), (3, 8, 8), (1, 16, 30)])
def test_halo_by_rows_is_exact_on_whole_numbers(machine, n, h, w, residual, seed):
    machine.seed = 100 * seed
    problem = conv_problem(n, 64, h, w, 64, 3, BF16, act=RELU, residual=residual)
    for config in REGISTRY["hopper.halo_rows"].configs(problem, H100):
        check(machine, "hopper.halo_rows", problem, config)


def stem(n, h, w, dtype=BF16, u8=False):
    conv = ConvSpec(n, 3, h, w, 64, (7, 7), (2, 2), (3, 3), act=RELU)
    layers = dict(normalize=NormalizeSpec(n, 3, h, w)) if u8 else {}
    pool = PoolSpec(*conv.y_shape, (3, 3), (2, 2), (1, 1))
    return problem_of(STEM_POOL, dtype, **layers, conv=conv, pool=pool)


@pytest.mark.parametrize(
    ("n", "h", "w", "planar"),
    [
        (2, 16, 12, False),
        (2, 16, 12, True),
        # more columns than a program has, odd numbers of convolution rows and columns, one pixel
        (1, 8, 240, False),
        (1, 18, 14, False),
        (1, 17, 225, True),
        (1, 1, 1, False),
    ],
)
@pytest.mark.parametrize(("dtype", "rows"), [(BF16, 3), (torch.float16, 56)], ids=["bf16", "fp16"])
def test_stem_pool_is_exact_on_whole_numbers(machine, n, h, w, planar, dtype, rows):
    from fastres.backends.triton_hopper.stem_pool import StemConfig

    check(machine, "hopper.stem_pool", stem(n, h, w, dtype), StemConfig(rows), planar=planar)


@pytest.mark.parametrize(("dtype", "planar"), [(BF16, False), (torch.float16, True)], ids=["nhwc", "nchw"])
def test_stem_pool_normalizes_uint8_and_keeps_the_padding_zero(machine, dtype, planar):
    check(machine, "hopper.stem_pool", stem(2, 17, 14, dtype, u8=True), planar=planar)


def exact(problem):
    """A shortcut inside a kernel is not rounded before it is added; the checker's whole numbers assume
    that it is."""
    return problem.get("shortcut") is None


@pytest.mark.parametrize("candidate", HOPPER, ids=str)
def test_every_layer_of_the_networks(machine, candidate):
    """All channels, strides and residuals of the networks, on images of 32 x 32."""
    problems = network_problems(candidate.pattern, ("resnet18", "resnet50"), n=2, size=32)
    taken = [problem for problem in problems if candidate.accepts(problem, H100) is None]
    assert taken
    for problem in taken:
        check(machine, candidate.name, problem, integers=exact(problem))
        machine.runs.clear()


@pytest.mark.parametrize("candidate", HOPPER, ids=str)
def test_random_problems_of_each_kernels_own_kind(machine, candidate):
    """What GPU tests draw from, so it must be taken; the smallest run here."""
    drawn = hopper_problems(candidate.name, 100, BF16, 7)
    taken = [problem for problem in drawn if candidate.accepts(problem, H100) is None]
    assert len(taken) >= 95, {candidate.accepts(problem, H100) for problem in drawn}
    for problem in sorted(taken, key=lambda problem: problem.flops)[:3]:
        check(machine, candidate.name, problem, integers=exact(problem))
        machine.runs.clear()


@pytest.mark.parametrize("candidate", HOPPER, ids=str)
def test_random_problems_are_computed_or_refused_with_a_reason(machine, candidate):
    for problem in random_problems(candidate.pattern, 150, BF16, seed=3):
        reason = candidate.accepts(problem, H100)
        if reason is None:
            check(machine, candidate.name, problem, integers=exact(problem))
            machine.runs.clear()
        else:
            assert isinstance(reason, str) and reason


@pytest.mark.parametrize("seed", SEEDS)
def test_random_convolutions_in_random_configurations(machine, seed):
    rng = random.Random(seed)
    candidate = REGISTRY["hopper.conv_bn_act"]
    machine.seed = 1000 * seed
    for _ in range(25):
        stride = rng.choice((1, 1, 2))
        c = 64 * rng.randint(1, 3) if stride == 2 else 8 * rng.randint(1, 20)
        h, w = (stride * rng.randint(8 // stride, 20 // stride) for _ in range(2))
        kernel = rng.choice(((1, 1), (3, 3), (3, 3), (5, 5), (1, 3), (2, 2)))
        fields = dict(
            stride=stride,
            padding=tuple(rng.randint(0, extent // 2) if extent > 1 else 0 for extent in kernel),
            dilation=rng.choice((1, 1, 2)) if max(kernel) <= 3 else 1,
            act=rng.choice((IDENTITY, RELU)),
            residual=rng.random() < 0.4,
        )
        problem = conv_problem(rng.randint(1, 9), c, h, w, 8 * rng.randint(1, 24), kernel, BF16, **fields)
        check(machine, candidate.name, problem, rng.choice(candidate.configs(problem, H100)))
        machine.runs.clear()


@pytest.mark.parametrize("candidate", HOPPER, ids=str)
@pytest.mark.parametrize("n", [1, 32, 256])
def test_estimates_lie_between_the_floor_and_four_times_what_few_tiles_excuse(candidate, n):
    """An estimate only ranks, but it may not promise what no Hopper can do, nor scare the planner away."""
    for problem in network_problems(candidate.pattern, ("resnet50",), n=n):
        if candidate.accepts(problem, H100) is None:
            floor, estimate = H100.floor_ms(problem), candidate.estimate_ms(problem, H100)
            assert floor < estimate < 4 * floor + 0.04, problem


@pytest.mark.parametrize("candidate", HOPPER, ids=str)
def test_a_reason_is_given_for_other_devices_types_and_versions(candidate):
    problem = next(
        problem
        for problem in network_problems(candidate.pattern, ("resnet50",))
        if candidate.accepts(problem, H100) is None
    )
    assert "Triton" in candidate.accepts(problem, replace(H100, triton=None))
    assert "3.6" in candidate.accepts(problem, replace(H100, triton=(3, 5)))
    assert "9.0" in candidate.accepts(problem, replace(H100, arch="sm80"))
    assert "CUDA" in candidate.accepts(problem, replace(H100, kind="cpu", arch="cpu"))
    assert "fp32" in candidate.accepts(replace(problem, dtype=torch.float32), H100)


def _without(function, old, new):
    """`function`'s source with `old` replaced by `new`."""
    text = textwrap.dedent(inspect.getsource(function)).split("\n", 1)[1]
    assert old in text
    namespace = dict(function.__globals__)
    exec(compile(text.replace(old, new), function.__code__.co_filename, "exec"), namespace)
    return namespace[function.__name__]


BROKEN = {
    "no turns": ("mbarrier.wait(order.index(GROUP), (turn & 1) ^ (1 - GROUP))", "pass"),
    "stage freed early": ("warpgroup_mma_wait(1, deps=(acc,))", "warpgroup_mma_wait(2, deps=(acc,))"),
    "staging buffer reused early": ("tma.store_wait(STAGED - 1)\n        y2", "y2"),
    "no fence": ("fence_async_shared()", "pass"),
    "stage never freed": ("count=1, pred=i > 0)", "count=1, pred=i > 1)"),
}


def test_the_machine_shows_a_counter_that_nobody_resets(machine, monkeypatch):
    from fastres.kernels.triton import hopper_common as common

    broken = _without(common.schedule.fn, "tiles // columns - 1", "tiles // columns")
    monkeypatch.setattr(common.schedule, "fn", broken)
    with pytest.raises(AssertionError, match="counter"):
        check(machine, "hopper.conv_bn_act", CONVS["1x1"])


@pytest.mark.parametrize(("old", "new"), BROKEN.values(), ids=BROKEN.keys())
def test_the_machine_shows_broken_synchronisation(machine, monkeypatch, old, new):
    """The checks above can fail: a consumer without one of its guards goes wrong in some order of events."""
    from fastres.backends.triton_hopper.tiling import GemmConfig
    from fastres.kernels.triton import hopper_conv_bn_act as kernels

    monkeypatch.setattr(kernels.consumer, "fn", _without(kernels.consumer.fn, old, new))
    problem = conv_problem(6, 128, 14, 14, 64, 1, BF16)
    with pytest.raises(AssertionError):
        for seed in range(20):
            machine.seed = seed
            check(machine, "hopper.conv_bn_act", problem, GemmConfig(64, 64, stages=2))


MAP = dict(address=1 << 20, dims=[64, 8, 3], strides=[128, 1024], box=[64, 8, 1], size=2, swizzle=128)
REFUSED = {
    "multiple of 16": [dict(address=8), dict(strides=[120, 1024]), dict(box=[4, 8, 1])],
    "2\\^40": [dict(strides=[128, 1 << 40])],
    "over 256": [dict(box=[64, 257, 1])],
    "swizzle": [dict(swizzle=64)],
    "31 bits": [dict(dims=[64, 1 << 31, 3])],
    "is 0": [dict(dims=[64, 0, 3])],
    "dimensions": [dict(dims=[64] * 6), dict(strides=[128])],
}


def test_the_machine_takes_the_tensor_maps_that_the_driver_takes():
    assert tma_fault(**MAP) is None
    for reason, changes in REFUSED.items():
        for change in changes:
            assert re.search(reason, tma_fault(**{**MAP, **change}) or ""), change


def test_a_tensor_map_that_the_driver_would_refuse_fails_on_the_machine(machine, monkeypatch):
    """An image of 4 channels: its rows are 8 bytes."""
    monkeypatch.setattr(
        "triton.experimental.gluon.nvidia.hopper.TensorDescriptor.__post_init__", lambda self: None
    )
    monkeypatch.setattr("fastres.backends.triton_hopper.conv_bn_act.unfit_layer", lambda spec: None)
    with pytest.raises(MachineError, match="the driver would refuse"):
        check(machine, "hopper.conv_bn_act", conv_problem(1, 4, 12, 12, 64, 1, BF16))
