"""conv_stats in the interpreter: output and statistics against fp64, and what its backend says it takes."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_close_to_oracle, assert_same_bits, guarded
from problems import H100

from fastres.backends import triton_ops
from fastres.tuning.portable_config import ConvConfig

# Both descriptor forms, and pointers; 16 pixels a tile, at most three tiles a chunk.
FORMS = {
    "stationary": ConvConfig("stationary", 16, 16, 32, 4, 2),
    "persistent": ConvConfig("persistent", 32, 16, 16, 4, 2),
    "implicit": ConvConfig("implicit", 16, 16, 16, 4, 2),
}
GEOMETRY = ((1, 1), (0, 0), (1, 1), 1)
AXES = (0, 2, 3)


@pytest.fixture(params=FORMS)
def form(request, monkeypatch):
    config = FORMS[request.param]
    monkeypatch.setattr(triton_ops, "_conv_config", lambda *_: (config, config.form != "implicit"))
    monkeypatch.setattr(triton_ops, "_MOST_TILES", 3)
    monkeypatch.setattr(triton_ops, "_CONV_PROGRAMS", 2)
    return request.param


def run(x, weight):
    k = weight.shape[0]
    y, check_y = guarded((x.shape[0], k, *x.shape[2:]), x.dtype)
    (mean, check_mean), (var, check_var) = (guarded((k,), torch.float32) for _ in "mv")
    triton_ops.conv_stats(x, weight, *GEOMETRY, y, mean, var)
    for check in (check_y, check_mean, check_var):
        check()
    return y, mean, var


def tensors(shape, k, dtype, offset=0.0):
    x = (torch.randn(shape) + offset).to(dtype).contiguous(memory_format=torch.channels_last)
    return x, torch.randn(k, shape[1], 1, 1).to(dtype)


# fp32 is asked for in TF32, which the interpreter computes as IEEE fp32.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("shape", "k"),
    [((2, 24, 5, 13), 40), ((3, 8, 4, 4), 16), ((1, 32, 1, 3), 8), ((2, 7, 5, 7), 19)],
    ids=str,
)
def test_output_and_statistics(form, shape, k, dtype):
    if form != "implicit" and k % 8:
        shape, k = (shape[0], 16, *shape[2:]), 24  # a descriptor steps by 16 bytes
    x, weight = tensors(shape, k, dtype, offset=0.5)
    y, mean, var = run(x, weight)
    ref = F.conv2d(x.double(), weight.double())
    magnitude = F.conv2d(x.double().abs(), weight.double().abs())
    assert_close_to_oracle(y, ref, magnitude=magnitude, k=shape[1])
    terms = shape[1] + ref[:, 0].numel()
    assert_close_to_oracle(mean, ref.mean(AXES), magnitude=magnitude.mean(AXES), k=terms, what="mean")
    squares = magnitude.square().mean(AXES)
    assert_close_to_oracle(var, ref.var(AXES, correction=0), magnitude=squares, k=terms, what="var")
    for one, other in zip((y, mean, var), run(x, weight), strict=True):
        assert_same_bits(one, other)


@pytest.mark.parametrize("first", [1000.0, 0.0])
def test_variance_far_from_zero_does_not_cancel(form, first):
    """Also where the first tile of a chunk, whose mean shifts the sums, is far from the rest. The weight is an
    identity, so that the accumulators are x."""
    x = 1000 + torch.randn(2, 8, 7, 9).contiguous(memory_format=torch.channels_last) * 1e-2
    x[0, :, :5] += first - 1000
    y, mean, var = run(x, torch.eye(8).view(8, 8, 1, 1))
    assert torch.equal(y, x)
    torch.testing.assert_close(mean.double(), x.double().mean(AXES), rtol=1e-6, atol=0)
    torch.testing.assert_close(var.double(), x.double().var(AXES, correction=0), rtol=1e-3, atol=0)


def test_statistics_are_those_before_rounding(form):
    """Of a constant channel that fp16 cannot hold: 1 + 2^-12, made of 1 and 2^-12."""
    x = torch.ones(2, 8, 4, 5, dtype=torch.float16).contiguous(memory_format=torch.channels_last)
    weight = torch.zeros(8, 8, 1, 1, dtype=torch.float16)
    weight[:, 0], weight[:, 1] = 1, 2.0**-12
    y, mean, var = run(x, weight)
    assert (y == 1).all() and (mean == 1 + 2.0**-12).all() and (var == 0).all()


def test_variance_of_constants_is_nothing(form):
    """A third tile is ragged: its rows are those that a mean divides by."""
    x = torch.rand(1, 32, 1, 1).expand(1, 32, 5, 7).contiguous(memory_format=torch.channels_last)
    _, mean, var = run(x, torch.eye(32).view(32, 32, 1, 1))
    torch.testing.assert_close(mean, x[0, :, 0, 0], rtol=1e-6, atol=0)
    assert (var >= 0).all() and (var < 1e-12).all()


def test_nan_reaches_its_channel_alone(form):
    x, weight = tensors((2, 16, 5, 7), 16, torch.float32)
    weight[3, 2] = float("nan")
    for value in run(x, weight):
        channels = value.movedim(1, 0) if value.dim() == 4 else value
        assert channels[3].isnan().all() and channels[[*range(3), *range(4, 16)]].isfinite().all()
    weight = tensors((1, 16, 1, 1), 16, torch.float32)[1]
    x[1, 5, 4, 6] = float("nan")
    y, mean, var = run(x, weight)
    assert mean.isnan().all() and var.isnan().all()
    assert torch.equal(y.isnan().any(1), x.isnan().any(1))


def test_wide_offsets_give_the_same_bits(form, monkeypatch):
    x, weight = tensors((2, 16, 5, 7), 24, torch.float16)
    narrow = run(x, weight)
    monkeypatch.setattr(triton_ops, "LIMIT", 1)
    for one, other in zip(narrow, run(x, weight), strict=True):
        assert_same_bits(one, other)


@pytest.mark.parametrize(
    ("c", "k", "offset", "descriptors"),
    [(64, 256, 0, True), (512, 128, 0, True), (20, 64, 0, False), (64, 20, 0, False), (64, 64, 1, False)],
)
def test_descriptors_only_where_rows_start_and_step_by_16_bytes(monkeypatch, c, k, offset, descriptors):
    monkeypatch.setattr(triton_ops, "_target", lambda x: H100)
    memory = torch.empty(c * 16 + 1, dtype=torch.float16)
    x = memory[offset : offset + c * 16].view(1, 4, 4, c).permute(0, 3, 1, 2)
    spec = triton_ops.ConvSpec(1, c, 4, 4, k, (1, 1))
    config, got = triton_ops._conv_config(spec, x, torch.empty(k, c, 1, 1, dtype=torch.float16))
    assert got is descriptors and (config.form == "implicit") is not descriptors


def takes(n=256, c=64, size=56, k=256, dtype=torch.bfloat16, layout=torch.channels_last, kernel=1, **changes):
    x = torch.empty(n, c, size, size, dtype=dtype, device="meta").contiguous(memory_format=layout)
    geometry = dict(stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1) | changes
    weight = torch.empty(k, c // geometry["groups"], kernel, kernel, dtype=dtype, device="meta")
    return triton_ops.conv_stats_takes(x, weight, **geometry)


def test_what_is_taken(monkeypatch):
    monkeypatch.setattr(triton_ops, "_target", lambda x: H100)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert takes() and takes(dtype=torch.float16) and takes(dtype=torch.float32)
    assert takes(c=512, size=28, k=128) and takes(c=256, size=14, k=1024) and takes(dilation=(2, 2))
    assert not takes(c=1024, size=14, k=256) and not takes(n=10) and not takes(n=0)
    assert not takes(kernel=3, padding=(1, 1)) and not takes(stride=(2, 2)) and not takes(padding=(0, 1))
    assert not takes(groups=2)
    assert not takes(dtype=torch.float64) and not takes(layout=torch.contiguous_format)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert takes() and not takes(dtype=torch.float32)
    monkeypatch.setattr(triton_ops, "_target", lambda x: replace(H100, arch="sm80"))
    assert not takes()
