"""conv_stats on a GPU: the Triton kernel against fp64, twice the same bits, and a block's training step with it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_close_to_oracle, assert_same_bits, guarded
from torch import nn

from fastres import ops
from fastres.nn import Bottleneck
from fastres.ops import primitives
from fastres.ops.conv_stats import kernel_for

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
GEOMETRY = ((1, 1), (0, 0), (1, 1), 1)
AXES = (0, 2, 3)
# Weights resident, a loop over the reduction, and channels that only pointers can step by.
TAKEN = [(11, 64, 56, 256), (44, 512, 28, 128), (11, 17, 56, 100)]
OTHERS = [(3, 256, 14, 1024), (2, 1000, 7, 24), (1, 3, 1, 5), (5, 256, 9, 64), (2, 2048, 7, 512)]


@pytest.fixture(autouse=True)
def tf32():
    """As a user asks for it: fp32 convolutions go to the kernel in TF32 only. The oracle is fp64."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = True
    yield
    torch.backends.cudnn.allow_tf32 = before


def triton(name, dtype=torch.bfloat16):
    rows = {backend: (function, why) for backend, function, why in primitives.candidates(name, DEVICE, dtype)}
    function, why = rows["triton"]
    if function is None:
        pytest.skip(f"triton: {why}")
    return function


def tensors(n, c, size, k, dtype, offset=0.5):
    x = (torch.randn(n, c, size, size, device=DEVICE) + offset).to(dtype)
    weight = (torch.randn(k, c, 1, 1, device=DEVICE) / c**0.5).to(dtype)
    return x.contiguous(memory_format=torch.channels_last), weight


def check(x, weight, y, mean, var):
    """Against the accumulators' exact values: y is rounded, the statistics are not those of y."""
    ref = F.conv2d(x.double(), weight.double())
    magnitude = F.conv2d(x.double().abs(), weight.double().abs())
    if x.dtype == torch.float32:
        # Both operands of a product lose up to 2^-10 of themselves, in the same direction wherever they stand.
        bounds = [dict(k=k, eps_acc=2**-10) for k in (4, 4, 16)]
    else:
        bounds = [dict(k=x.shape[1]), *[dict(k=x.shape[1] + ref[:, 0].numel())] * 2]
    assert_close_to_oracle(y, ref, magnitude=magnitude, **bounds[0])
    assert_close_to_oracle(mean, ref.mean(AXES), magnitude=magnitude.mean(AXES), what="mean", **bounds[1])
    squares = magnitude.square().mean(AXES)
    assert_close_to_oracle(var, ref.var(AXES, correction=0), magnitude=squares, what="var", **bounds[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", TAKEN + OTHERS, ids=str)
def test_the_kernel_equals_fp64_and_itself(shape, dtype):
    kernel = triton("conv_stats", dtype)
    x, weight = tensors(*shape, dtype)
    results = []
    for _ in range(2):
        y, check_y = guarded((shape[0], shape[3], *x.shape[2:]), dtype, device=DEVICE)
        vectors = [guarded(shape[3:], torch.float32, device=DEVICE) for _ in "mv"]
        kernel(x, weight, *GEOMETRY, y, *(vector for vector, _ in vectors))
        for guard in (check_y, *(guard for _, guard in vectors)):
            guard()
        results.append((y, *(vector for vector, _ in vectors)))
    for one, other in zip(*results, strict=True):
        assert_same_bits(one, other)
    check(x, weight, *results[0])


def test_variance_far_from_zero_does_not_cancel():
    """fp16 accumulators are exact under an identity weight: the statistics alone are tested."""
    kernel = triton("conv_stats", torch.float16)
    x, _ = tensors(11, 64, 56, 64, torch.float16, offset=1000)
    weight = torch.eye(64, device=DEVICE, dtype=torch.float16).view(64, 64, 1, 1)
    y, mean, var = torch.empty_like(x), *(torch.empty(64, device=DEVICE) for _ in "mv")
    kernel(x, weight, *GEOMETRY, y, mean, var)
    assert torch.equal(y, x)
    torch.testing.assert_close(mean.double(), x.double().mean(AXES), rtol=1e-6, atol=0)
    torch.testing.assert_close(var.double(), x.double().var(AXES, correction=0), rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [*TAKEN, OTHERS[0]], ids=str)
def test_the_op_takes_the_kernel_on_hopper(shape, dtype):
    triton("conv_stats", dtype)
    x, weight = tensors(*shape, dtype)
    hopper = torch.cuda.get_device_capability() == (9, 0)
    assert (kernel_for(x, weight, *GEOMETRY) is not None) == (hopper and shape in TAKEN)
    y, mean, var = ops.conv_stats(x, weight)
    if hopper and shape in TAKEN:
        return check(x, weight, y, mean, var)
    torch.testing.assert_close(mean.double(), y.double().mean(AXES), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(var.double(), y.double().var(AXES, correction=0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("size", "stride", "k"), [(3, 1, 64), (1, 2, 256)])
def test_the_op_takes_the_cuda_kernel_where_triton_has_none(size, stride, k):
    """A 3x3, and a strided 1x1, of a batch that writes enough."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("a Hopper kernel")
    x, _ = tensors(90, 64, 56, 1, torch.bfloat16)
    weight = (torch.randn(k, 64, size, size, device=DEVICE) / (64 * size * size) ** 0.5).to(torch.bfloat16)
    geometry = (stride, stride), (size // 2,) * 2, (1, 1), 1
    kernel = kernel_for(x, weight, *geometry)
    assert kernel is not None and kernel.__module__ == "fastres.backends.cuda_ops"
    y, mean, var = ops.conv_stats(x, weight, *geometry)
    exact = F.conv2d(x.double(), weight.double(), None, *geometry)
    magnitude = F.conv2d(x.double().abs(), weight.double().abs(), None, *geometry)
    assert_close_to_oracle(y, exact, magnitude=magnitude, k=64 * size * size)
    torch.testing.assert_close(mean.double(), exact.mean(AXES), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(var.double(), exact.var(AXES, correction=0), rtol=1e-5, atol=0)


def test_a_training_step():
    """A Bottleneck whose 1x1 convolutions emit their statistics: as near to fp64 as without, no wait of the
    host, and running statistics alike."""
    triton("conv_stats")
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("only Hopper takes the kernel by itself")
    torch.manual_seed(0)
    block = Bottleneck(256, 64).to(DEVICE, memory_format=torch.channels_last).train()
    nn.init.uniform_(block.bn3.weight, 0.5, 1.5)
    x, _ = tensors(11, 256, 56, 1, torch.bfloat16)
    grad = torch.randn_like(x)

    def step(body, dtype):
        body, leaf = copy.deepcopy(body), x.clone().to(dtype).requires_grad_()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=dtype == torch.bfloat16):
            out = body(leaf)
        out.backward(grad.to(out.dtype))
        named = {name: parameter.grad for name, parameter in body.named_parameters()} | dict(
            body.named_buffers()
        )
        return {"out": out.detach(), "grad_x": leaf.grad} | named

    exact = step(block.double(), torch.float64)
    block.float()
    step(block, torch.bfloat16)  # compiles
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = step(block, torch.bfloat16)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as prof:
        again = step(block, torch.bfloat16)
        torch.cuda.synchronize()
    launched = [event.name for event in prof.events() if "conv_stats_kernel" in event.name]
    assert len(launched) == 2, launched
    with primitives.pinned("torch"):
        plain = step(block, torch.bfloat16)
    for name, value in got.items():
        if value.is_floating_point():
            error, own = ((t[name].double() - exact[name]).norm() for t in (got, plain))
            assert error <= 1.5 * own + 1e-5 * exact[name].norm(), (name, error, own)
        else:
            assert torch.equal(value, exact[name]), name
    for name in ("bn1.running_mean", "bn1.running_var"):
        assert_same_bits(again[name], got[name], name)
