"""What the Gluon kernels believe of a Hopper, one belief a test, the plainest first: of a first run on a GPU the first
failure says which belief was wrong. Tiny problems of whole numbers, exact results; a block that waits for ever costs
its test `SECONDS`, no more.
"""

from dataclasses import replace

import pytest
import torch
from checking import make_inputs, make_nodes
from problems import check_candidate, conv_problem
from test_hopper_host import check, dual, expand_reduce, machine, one_thread, shifted_block, stem  # noqa: F401

from fastres.activation import RELU
from fastres.backends.triton_hopper import base
from fastres.backends.triton_hopper.base import Call
from fastres.backends.triton_hopper.expand_reduce import ChainConfig
from fastres.backends.triton_hopper.halo import HaloConfig, RowsConfig
from fastres.backends.triton_hopper.shifted_block import ShiftedConfig
from fastres.backends.triton_hopper.stem_pool import StemConfig
from fastres.backends.triton_hopper.tiling import GemmConfig
from fastres.graph.fold import LayerParameters
from fastres.plan.candidate import REGISTRY, Buffers
from fastres.plan.target import detect

SECONDS = 40
GPU = pytest.mark.gpu(seconds=SECONDS)
BF16, FP16 = torch.bfloat16, torch.float16
PLAIN = dict(block_m=64, block_n=64)


def conv(n, c, h, w, k, kernel, config, dtype=BF16, **fields):
    return "conv_bn_act", conv_problem(n, c, h, w, k, kernel, dtype, **fields), GemmConfig(**config)


# (kernel, problem, configuration) of each belief; one block takes all tiles.
BELIEFS = {
    "TMA loads a box, wgmma multiplies it, TMA stores the tile": conv(
        1, 64, 8, 8, 64, 1, dict(stages=2, consumers=1, **PLAIN)
    ),
    "fp16 does as bf16": conv(1, 64, 8, 8, 64, 1, dict(stages=2, consumers=1, **PLAIN), FP16),
    "a ring of two stages is used again and again": conv(
        1, 512, 8, 8, 64, 1, dict(stages=2, consumers=1, **PLAIN)
    ),
    "tickets carry one consumer from tile to tile": conv(
        5, 64, 8, 8, 64, 1, dict(stages=3, consumers=1, **PLAIN)
    ),
    "two consumers take turns on one ring": conv(9, 128, 8, 8, 64, 1, dict(stages=3, **PLAIN)),
    "a second staging buffer is free when its store has been waited for": conv(
        9, 64, 8, 8, 64, 1, dict(stages=3, staged=2, **PLAIN)
    ),
    "the residual comes into the staging buffer": conv(
        9, 64, 8, 8, 64, 1, dict(stages=3, staged=2, **PLAIN), residual=True, act=RELU
    ),
    "what lies outside of the image is zero, on all sides": conv(
        2, 64, 9, 7, 64, 3, dict(stages=3, consumers=1, **PLAIN)
    ),
    "tiles over the edges are clipped, channels too": conv(3, 72, 9, 7, 136, 1, dict(stages=3, **PLAIN)),
    "rows of 64 bytes have a swizzle of 64": conv(2, 24, 8, 8, 40, 3, dict(stages=3, **PLAIN)),
    "a row parity is a dimension of stride 2": conv(2, 64, 16, 12, 64, 3, dict(stages=3, **PLAIN), stride=2),
    "stride 2 without padding, 1x1": conv(3, 64, 14, 10, 128, 1, dict(stages=3, **PLAIN), stride=2),
    "a tile of 128 channels is two swizzled halves": conv(
        2, 128, 16, 8, 128, 1, dict(block_m=128, block_n=128, stages=3), residual=True
    ),
    "a tile of 256 channels is four, stored by four warps": conv(
        2, 64, 16, 8, 256, 1, dict(block_m=64, block_n=256, stages=3)
    ),
    "eight warps share a consumer's tile": conv(
        2, 128, 16, 8, 256, 1, dict(block_m=128, block_n=256, stages=3, consumers=1, warps=8)
    ),
    "two blocks share a multiprocessor": conv(
        4, 64, 16, 8, 64, 1, dict(block_m=128, block_n=64, stages=3, consumers=1, per_sm=2)
    ),
    "a residual comes into a tile of eight warps": conv(
        3, 64, 16, 8, 256, 1, dict(block_m=128, block_n=256, stages=3, consumers=1, warps=8), residual=True
    ),
    "tiles of 256 pixels, the largest box": conv(
        4, 64, 16, 16, 128, 3, dict(block_m=256, block_n=128, stages=3, consumers=1, warps=8)
    ),
    "resident weights": conv(
        9, 128, 8, 8, 64, 1, dict(stages=3, staged=2, stationary=True, **PLAIN), residual=True
    ),
    "taps in the padding are skipped by both groups alike": conv(
        70, 64, 3, 4, 64, 3, dict(stages=4, skip=True, **PLAIN)
    ),
    "another shape of descriptor may view a ring's stage": (
        "dual",
        dual(3, 128, 64, 14, 10, 136, 2),
        GemmConfig(64, 64, stages=3),
    ),
    "an accumulator is the next product's A operand": (
        "expand_reduce",
        expand_reduce(5, 64, 11, 13, 256),
        ChainConfig(3, 8, 2),
    ),
    "four single warps work beside two consumers": (
        "expand_reduce",
        expand_reduce(5, 128, 11, 13, 512, reduced=256),
        ChainConfig(2, 2, 1),
    ),
    "a projection joins an accumulator, empty slots take a residual's place": (
        "expand_reduce",
        expand_reduce(3, 64, 11, 13, 256, projected=64),
        ChainConfig(3, 4, 2),
    ),
    "a view may start at a later swizzle atom": (
        "halo",
        conv_problem(2, 64, 21, 19, 64, 3, BF16),
        HaloConfig(8, 10, swap=False),
    ),
    "a transposed product is read and written through a transposed view": (
        "halo",
        conv_problem(2, 64, 21, 19, 64, 3, BF16, act=RELU, residual=True),
        HaloConfig(),
    ),
    "rows by classes are a dimension, groups of boxes are freed by three": (
        "halo_rows",
        conv_problem(2, 64, 24, 19, 64, 3, BF16, act=RELU, residual=True),
        RowsConfig(4),
    ),
    "nine boxes, weights resident, chained in registers": (
        "shifted_block",
        shifted_block(2, 19, 14, 64),
        ShiftedConfig(False, 5, 6),
    ),
    "the same with the halo": ("shifted_block", shifted_block(2, 19, 14, 64), ShiftedConfig(True, 4, 6)),
    "two reduced chunks leave through the residual's ring": (
        "shifted_block",
        shifted_block(2, 19, 14, 128),
        ShiftedConfig(False, 4, 3),
    ),
    "a slot is free as soon as its store has read it": (
        "expand_reduce",
        expand_reduce(5, 256, 11, 13, 512),
        ChainConfig(2, 2, 1, early=True),
    ),
    "a projected input goes from the input's ring into the A operand": (
        "shifted_block",
        shifted_block(2, 19, 14, 64, project=True),
        ShiftedConfig(False, 5, 2, in_flight=0),
    ),
    "the same with the halo, all of it in two slots": (
        "shifted_block",
        shifted_block(2, 19, 14, 64, project=True),
        ShiftedConfig(True, 4, 2, in_flight=0),
    ),
    "pixels of an image go straight into the A operand": ("stem_pool", stem(2, 32, 28), StemConfig(3)),
}


@pytest.fixture
def target():
    found = detect(torch.device("cuda", torch.cuda.current_device()))
    if found.capability != 90:
        pytest.skip(f"needs compute capability 9.0, this is {found.arch}")
    return found


@pytest.mark.parametrize("belief", BELIEFS)
def test_belief_on_the_machine(belief, machine):  # noqa: F811
    """That what a GPU is asked is asked rightly."""
    name, problem, config = BELIEFS[belief]
    machine.blocks = 1
    check(machine, f"hopper.{name}", problem, config, integers=problem.get("shortcut") is None)


@GPU
@pytest.mark.parametrize("belief", BELIEFS)
@pytest.mark.parametrize("blocks", [1, None], ids=["one block", "all blocks"])
def test_belief(belief, blocks, target, monkeypatch):
    name, problem, config = BELIEFS[belief]
    candidate = REGISTRY[f"hopper.{name}"]
    if (reason := candidate.accepts(problem, target)) is not None:
        pytest.skip(reason)
    if getattr(config, "halo", False) and target.triton >= (3, 8):
        pytest.skip("Triton 3.8 refuses the view that the halo takes")
    launch = Call.__call__
    if blocks is not None:
        # That one claims its tiles; all blocks share out so few.
        monkeypatch.setattr(base, "FEW_TILES", 0)
    persistent = name != "stem_pool"
    if blocks is not None and persistent and not getattr(config, "stationary", False):
        monkeypatch.setattr(Call, "__call__", lambda call: launch(replace(call, grid=blocks)))
    check_candidate(candidate, problem, config, "cuda", integers=problem.get("shortcut") is None, runs=3)


@GPU
@pytest.mark.parametrize("planar", [False, True], ids=["nhwc", "nchw"])
def test_uint8_images_are_normalised_in_registers(planar, target):
    check_candidate(
        REGISTRY["hopper.stem_pool"], stem(2, 32, 28, u8=True), StemConfig(3), "cuda", planar=planar
    )


def bound(config, seed=0, n=40):
    """A convolution of many small tiles, which are claimed: (call, output, counters, what the output must be)."""
    candidate, problem = REGISTRY["hopper.conv_bn_act"], conv_problem(n, 128, 8, 8, 128, 1, BF16)
    nodes = make_nodes(problem, "cuda", seed, integers=True)
    inputs = make_inputs(problem, "cuda", seed, integers=True)
    out = torch.full(problem.output_shape("conv"), torch.nan, dtype=BF16, device="cuda")
    out = out.contiguous(memory_format=torch.channels_last)
    counters = torch.zeros(candidate.counters(problem, config), dtype=torch.int32, device="cuda")
    constants = candidate.prepare(problem, config, {"conv": LayerParameters(nodes["conv"])})
    call = candidate.call(problem, config, Buffers({**inputs, "conv": out}, counters), constants)
    call()
    torch.cuda.synchronize()
    return call, out, counters, out.clone()


TILES = [GemmConfig(64, 64, stages=3), GemmConfig(64, 64, stages=3, staged=2, stationary=True)]


@pytest.fixture
def claimed(monkeypatch):
    """Tiles are claimed, however few."""
    monkeypatch.setattr(base, "FEW_TILES", 0)


@GPU
@pytest.mark.parametrize("config", TILES, ids=["streamed", "resident"])
@pytest.mark.parametrize("n", [1, 40, 700])
def test_the_last_claim_leaves_the_counters_at_zero(config, n, target, claimed):
    """Fewer tiles than blocks, some more, many more; nobody zeroes them between launches."""
    call, out, counters, expected = bound(config, n=n)
    for _ in range(5):
        assert not counters.any()
        out.fill_(torch.nan)
        call()
        assert torch.equal(out, expected)


@GPU
@pytest.mark.parametrize("config", TILES, ids=["streamed", "resident"])
def test_two_launches_in_flight_have_counters_of_their_own(config, target, claimed):
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    calls = [bound(config, seed, n=200) for seed in (0, 1)]
    for _, out, _, _ in calls:
        out.fill_(torch.nan)
    torch.cuda.synchronize()
    for _ in range(20):
        for stream, (call, *_) in zip(streams, calls, strict=True):
            with torch.cuda.stream(stream):
                call()
    torch.cuda.synchronize()
    for _, out, counters, expected in calls:
        assert torch.equal(out, expected) and not counters.any()


@GPU
def test_a_captured_launch_can_be_replayed(target, claimed):
    call, out, counters, expected = bound(TILES[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out.fill_(torch.nan)
        call()
        call()
    for _ in range(20):
        graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, expected) and not counters.any()


@GPU
def test_a_launch_goes_to_its_tensors_device(target):
    """A plan makes its device current; here a second one is, as far as there is one."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    import fastres

    model = torch.nn.Sequential(torch.nn.Conv2d(64, 64, 1), torch.nn.ReLU()).eval().to("cuda:1", BF16)
    x = torch.randn(4, 64, 8, 8, device="cuda:1", dtype=BF16)
    with torch.inference_mode():
        fast = fastres.accelerate(model, dtype=BF16, backend="hopper")
        for _ in range(3):
            torch.testing.assert_close(fast(x), model(x), rtol=2e-2, atol=2e-2)
