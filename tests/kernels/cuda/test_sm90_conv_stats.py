"""conv_stats by sm90_conv_bn_act's kernel: the output and its statistics, in the emulator and on a Hopper."""

from dataclasses import replace

import emulated
import pytest
import torch
import torch.nn.functional as F
from oracle import assert_close_to_oracle, assert_same_bits, guarded, integers
from problems import H100, network_problems

from fastres.backends import cuda_ops
from fastres.backends.cuda import conv_stats
from fastres.backends.cuda.sm90_conv_bn_act import HALO_TILES, TILES, ThroughputConfig
from fastres.plan.pattern import CONV_BN_ACT
from fastres.plan.problem import ConvSpec

BF16, FP16 = torch.bfloat16, torch.float16
AXES = (0, 2, 3)
EVERY = [ThroughputConfig(*tile, cluster) for tile in (*TILES, *HALO_TILES) for cluster in (1, 2)]


def _spec(n, c, h, w, k, size, stride=1, padding=None, dilation=1):
    padding = dilation * (size // 2) if padding is None else padding
    return ConvSpec(n, c, h, w, k, (size, size), (stride, stride), (padding, padding), (dilation, dilation))


# What decides the path: runs that end in the middle of a thread's pixels, or hold none; filters that fill no tile or no
# 16 bytes; halo rows and images that do not exist; tiles whose filters come first.
CASES = {
    "1x1": (_spec(3, 72, 9, 7, 136, 1), BF16, EVERY[:8]),
    "3x3": (_spec(2, 40, 9, 7, 72, 3), FP16, EVERY[1:8:3]),
    "3x3, stride 2": (_spec(1, 64, 11, 10, 64, 3, 2), BF16, EVERY[2:8:5]),
    "1x1, stride 2": (_spec(3, 128, 6, 7, 200, 1, 2), FP16, EVERY[1:4:2]),
    "odd filters": (_spec(2, 16, 6, 7, 131, 1), BF16, EVERY[2:7:2]),
    "halo, one image a row": (_spec(1, 24, 3, 56, 72, 3), FP16, EVERY[9::2]),
    "halo, eight images a row": (_spec(9, 8, 9, 7, 72, 3), BF16, EVERY[8:11:2]),
    "by position": (_spec(3, 40, 4, 5, 72, 3), BF16, [ThroughputConfig(128, 128, 2, True)]),
    "many runs": (_spec(2, 8, 36, 30, 256, 1), FP16, EVERY[5:7]),
}


def _tensors(spec, dtype, device, offset=0.5, whole=False):
    x, weight = torch.randn(spec.x_shape) + offset, torch.randn(spec.weight_shape)
    if whole:
        x, weight = integers(spec.x_shape, dtype), integers(spec.weight_shape, dtype)
    else:
        weight = weight / (spec.c * spec.kernel[0] * spec.kernel[1]) ** 0.5
    memory = torch.channels_last
    return (t.to(device, dtype).contiguous(memory_format=memory) for t in (x, weight))


def _run(spec, x, weight, config=None):
    """y, mean, var, with NaN before and guards behind."""
    y, check_y = guarded(spec.y_shape, x.dtype, device=x.device)
    vectors = [guarded((spec.k,), torch.float32, device=x.device) for _ in "mv"]
    conv_stats.launch(x, weight, spec, y, *(v for v, _ in vectors), config)
    for check in (check_y, *(check for _, check in vectors)):
        check()
    return y, *(v for v, _ in vectors)


def _conv(spec, x, weight):
    return F.conv2d(x, weight, None, spec.stride, spec.padding, spec.dilation)


def _check(spec, x, weight, y, mean, var):
    """The statistics are those of the exact sums: y is rounded, they are not."""
    ref, magnitude = (
        _conv(spec, x.double(), weight.double()),
        _conv(spec, x.double().abs(), weight.double().abs()),
    )
    depth, pixels = spec.c * spec.kernel[0] * spec.kernel[1], ref[:, 0].numel()
    assert_close_to_oracle(y, ref, magnitude=magnitude, k=depth)
    rest = dict(k=depth + pixels)
    assert_close_to_oracle(mean, ref.mean(AXES), magnitude=magnitude.mean(AXES), what="mean", **rest)
    squares = magnitude.square().mean(AXES)
    assert_close_to_oracle(var, ref.var(AXES, correction=0), magnitude=squares, what="var", **rest)


@pytest.mark.parametrize("name", CASES)
def test_output_and_statistics_equal_fp64(name, every_schedule):
    spec, dtype, configs = CASES[name]
    assert conv_stats.can(spec)
    x, weight = _tensors(spec, dtype, every_schedule)
    for config in configs:
        results = [_run(spec, x, weight, config) for _ in "ab"]
        for one, other in zip(*results, strict=True):
            assert_same_bits(one, other)
        _check(spec, x, weight, *results[0])


def test_more_runs_than_one_pass_merges(device):
    """1,058 runs, the last of 8 pixels and one of none: they are merged in two passes."""
    spec, config = _spec(2, 8, 256, 264, 8, 1), ThroughputConfig(64, 256, 2)
    assert conv_stats.chunks_of(spec, config) > 512
    x, weight = _tensors(spec, BF16, device)
    _check(spec, x, weight, *_run(spec, x, weight, config))


def test_variance_far_from_zero_does_not_cancel(device):
    """fp16 sums are exact under an identity weight: the statistics alone are tested, of rows that end raggedly."""
    spec = _spec(3, 64, 11, 9, 64, 1)
    x, _ = _tensors(spec, FP16, device, offset=1000)
    weight = torch.eye(64, device=device, dtype=FP16).view(64, 64, 1, 1)
    for config in EVERY[4:8]:
        y, mean, var = _run(spec, x, weight, config)
        assert torch.equal(y, x)
        torch.testing.assert_close(mean.double(), x.double().mean(AXES), rtol=1e-6, atol=0)
        torch.testing.assert_close(var.double(), x.double().var(AXES, correction=0), rtol=1e-5, atol=0)


def test_whole_numbers_give_exact_means(device):
    """Sums of whole numbers have no rounding: a pixel counted twice, or one that does not exist, shows."""
    spec = _spec(4, 16, 8, 14, 24, 3)
    x, weight = _tensors(spec, BF16, device, whole=True)
    exact = _conv(spec, x.double(), weight.double())
    for config in EVERY[1::2]:
        y, mean, var = _run(spec, x, weight, config)
        assert torch.equal(y.double(), exact.to(BF16).double())
        torch.testing.assert_close(mean.double(), exact.mean(AXES), rtol=3e-7, atol=1e-6)
        torch.testing.assert_close(var.double(), exact.var(AXES, correction=0), rtol=2e-6, atol=0)


def test_training_takes_what_writes_much_and_triton_does_not_take():
    layers = [p["conv"] for p in network_problems(CONV_BN_ACT, ("resnet50",), 256, BF16)]
    taken = {(s.kernel[0], s.stride[0], s.k, s.p) for s in layers if conv_stats.worth_it(s, BF16)}
    assert taken == {(3, 1, 64, 56), (3, 2, 128, 28), (3, 1, 128, 28)} | {
        (1, 2, 512, 28),
        (1, 2, 1024, 14),
        (1, 2, 2048, 7),
    }
    good = _spec(256, 64, 56, 56, 64, 3)
    assert conv_stats.worth_it(good, FP16) and not conv_stats.worth_it(good, torch.float32)
    for change in (dict(n=8), dict(groups=2), dict(c=60), dict(n=2**14)):
        assert not conv_stats.worth_it(replace(good, **change), BF16), change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(scratch=torch.empty(10, dtype=torch.uint8)), "scratch has 10 bytes, needs 384"),
        (dict(mean=torch.empty(9)), r"mean has the shape \[9\], expected \[8\]"),
        (dict(counter=torch.zeros(1)), "counters must be int32"),
        (dict(filters=96), "tile: 128 x 256"),
        (dict(weight=torch.zeros(8, 8, dtype=BF16)), r"weight has the shape \[8, 8\]"),
    ],
)
def test_bad_arguments_are_refused_by_name(change, message):
    emulated.library()
    memory = torch.channels_last
    arguments = dict(
        x=torch.zeros(1, 16, 4, 4, dtype=BF16).to(memory_format=memory),
        weight=torch.zeros(8, 16, dtype=BF16),
        out=torch.empty(1, 8, 4, 4, dtype=BF16).to(memory_format=memory),
        counter=torch.zeros(1, dtype=torch.int32),
        scratch=torch.empty(1000, dtype=torch.uint8),
        geometry=[1, 1, 1, 1, 0, 0, 1, 1, 1],
        filters=64,
        pixels=256,
        cluster=2,
        by_position=False,
        mean=torch.empty(8),
        var=torch.empty(8),
    )
    with pytest.raises((TypeError, ValueError), match=message):
        cuda_ops._call(torch.ops.fastres_cuda.sm90_conv_stats, *(arguments | change).values())


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 3, 32, 256])
def test_layers_of_resnet50_on_a_gpu(batch):
    for index, problem in enumerate(network_problems(CONV_BN_ACT, ("resnet50",), batch, BF16)):
        spec = problem["conv"]
        spec = ConvSpec(*spec.x_shape, spec.k, spec.kernel, spec.stride, spec.padding)
        if not conv_stats.can(spec):
            continue  # the stem's three channels
        x, weight = _tensors(spec, (BF16, FP16)[index % 2], "cuda")
        configs = (conv_stats.best_config(spec, H100), None)
        results = [_run(spec, x, weight, config) for config in configs]
        for one, other in zip(*results, strict=True):
            assert_same_bits(one, other)
        _check(spec, x, weight, *results[0])
