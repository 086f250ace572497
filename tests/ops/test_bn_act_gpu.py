"""bn_act in training on a GPU: values on every backend, graphs, launches, no wait of the host, memory of a step."""

import pytest
import torch
import torchvision
from torch import nn

import fastres.nn as ours
from fastres import ops
from fastres.activation import Activation
from fastres.nn import functional
from fastres.ops import primitives
from ops.test_bn_act import Case

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
SHAPES = [(2, 5, 7, 9), (4, 64, 28, 28), (2, 2048, 7, 7), (3, 1, 1, 1)]


@pytest.fixture(params=["cuda", "triton", "torch"])
def backend(request):
    row = {name: why for name, _, why in primitives.candidates("bn_stats", DEVICE, torch.float32)}
    if why := row[request.param]:
        pytest.skip(f"{request.param}: {why}")
    with primitives.pinned(request.param):
        yield request.param


def on_device(case):
    for name, value in vars(case).items():
        if isinstance(value, torch.Tensor):
            setattr(case, name, value.to(DEVICE))
    return case


# Few combinations: Triton compiles for each.
@pytest.mark.parametrize(
    ("dtype", "layout"),
    [(torch.bfloat16, "nhwc"), (torch.float32, "nhwc"), (torch.float32, "nchw"), (torch.float64, "nhwc")],
    ids=str,
)
def test_values_gradients_and_statistics_equal_fp64(backend, dtype, layout):
    for shape in SHAPES:
        for training in (True, False):
            on_device(Case(shape, dtype, layout)).check(training, Activation("relu"))
        on_device(Case(shape, dtype, layout, residual=False)).check(True, Activation("relu"))
    on_device(Case(SHAPES[0], dtype, layout, residual=False, affine=False)).check(True, Activation("silu"))


def layer(channels=64):
    torch.manual_seed(0)
    x, residual, grad = (
        torch.randn(8, channels, 14, 14, device=DEVICE, dtype=torch.bfloat16).contiguous(
            memory_format=torch.channels_last
        )
        for _ in "xrg"
    )
    bn = nn.BatchNorm2d(channels, device=DEVICE)

    def step():
        """Forward and backward of a layer with and of one without a residual."""
        leaves = [x.detach().requires_grad_(), residual.detach().requires_grad_(), bn.weight, bn.bias]
        out = functional.bn_act(functional.bn_act(leaves[0], bn), bn, leaves[1])
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

    return bn, step


def test_the_host_never_waits(backend):
    _, step = layer()
    step()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode(before)


def test_a_captured_step_repeats_and_moves_the_statistics(backend):
    bn, step = layer()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        want = step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    bn.reset_running_stats()
    for replay in range(1, 4):
        graph.replay()
        assert bn.num_batches_tracked.item() == 2 * replay
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)
    eager, step = layer()
    for _ in range(3):
        step()
    torch.testing.assert_close(bn.state_dict(), eager.state_dict())


@pytest.mark.parametrize(("name", "most"), [("cuda", 6), ("triton", 9)])
def test_launches_of_a_layer(name, most):
    """Statistics 2, finalize 1, apply 1; reduce 2, means 1 or 2, apply 1. CUDA's statistics finalize, and its sums are
    means too."""
    if why := {n: w for n, _, w in primitives.candidates("bn_stats", DEVICE, torch.bfloat16)}[name]:
        pytest.skip(f"{name}: {why}")
    x = torch.randn(8, 64, 14, 14, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    weight, bias = (torch.ones(64, device=DEVICE, requires_grad=True) for _ in "wb")
    mean, var = torch.zeros(64, device=DEVICE), torch.ones(64, device=DEVICE)
    grad = torch.ones_like(x)

    def step():
        out = ops.bn_act(x, mean, var, weight, bias, training=True)
        torch.autograd.grad(out, (x, weight, bias), grad)

    with primitives.pinned(name):
        step()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as prof:
            step()
            torch.cuda.synchronize()
    launched = [e.name for e in prof.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert 0 < len(launched) <= most, launched


@pytest.mark.parametrize("training", [True, False])
def test_a_step_takes_no_more_memory_than_eager(training):
    x = torch.randn(16, 3, 128, 128, device=DEVICE).contiguous(memory_format=torch.channels_last)
    target, peaks = torch.arange(16, device=DEVICE), []
    for library in (ours, torchvision.models):
        model = library.resnet50(num_classes=16).to(DEVICE, memory_format=torch.channels_last).train(training)
        for _ in range(2):
            model.zero_grad()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            with torch.autocast("cuda", torch.bfloat16):
                loss = nn.functional.cross_entropy(model(x).float(), target)
            loss.backward()
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated() - before
        peaks.append(peak)
        del model, loss
    assert peaks[0] <= peaks[1], peaks
