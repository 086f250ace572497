"""Problems and shapes: what PyTorch computes, said before anything runs; keys that tell problems apart."""

import itertools
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastres.activation import KINDS, Activation
from fastres.graph.capture import capture
from fastres.plan.problem import (
    ConvSpec,
    LinearSpec,
    NormalizeSpec,
    PoolSpec,
    Problem,
    dtype_from_name,
    dtype_name,
)
from fastres.plan.specs import Info, ShapeError, propagate
from fastres.plan.target import on_paper


def _random_window(generator: random.Random):
    return [(generator.randint(1, 4), generator.randint(1, 4)) for _ in range(3)]


@pytest.mark.parametrize("seed", range(40))
def test_convolutions_have_pytorchs_shapes(seed):
    generator = random.Random(seed)
    kernel, stride, dilation = _random_window(generator)
    padding = (generator.randint(0, 3), generator.randint(0, 3))
    h, w = generator.randint(11, 19), generator.randint(11, 19)
    spec = ConvSpec(2, 4, h, w, 6, kernel, stride, padding, dilation, groups=2)
    with torch.device("meta"):
        conv = nn.Conv2d(4, 6, kernel, stride, padding, dilation, groups=2)
        assert spec.y_shape == conv(torch.empty(2, 4, h, w)).shape
    assert spec.weight_shape == conv.weight.shape and spec.weight_elements == conv.weight.numel()
    assert spec.flops == 2 * spec.y_shape[0] * 6 * spec.p * spec.q * 2 * kernel[0] * kernel[1]


@pytest.mark.parametrize("ceil_mode", [False, True])
def test_max_pools_have_pytorchs_shapes(ceil_mode):
    tried = 0
    sizes = itertools.product(range(1, 12), (1, 2, 3, 4), (1, 2, 3, 5), (0, 1, 2), (1, 2))
    for size, kernel, stride, padding, dilation in sizes:
        if 2 * padding > kernel:
            continue
        pool = nn.MaxPool2d((kernel, 1), (stride, 1), (padding, 0), (dilation, 1), ceil_mode=ceil_mode)
        spec = PoolSpec(1, 1, size, 1, (kernel, 1), (stride, 1), (padding, 0), (dilation, 1), ceil_mode)
        try:
            expected = pool(torch.empty(1, 1, size, 1, device="meta")).shape[2]
        except RuntimeError:
            assert spec.p < 1, (size, kernel, stride, padding, dilation)
            continue
        assert spec.p == expected, (size, kernel, stride, padding, dilation)
        tried += 1
    assert tried > 300


def _variants(spec, **changes):
    from dataclasses import replace

    return [replace(spec, **{name: value}) for name, value in changes.items()]


def test_keys_tell_every_two_problems_apart():
    conv = ConvSpec(8, 64, 56, 56, 64, (3, 3), (1, 1), (1, 1))
    convs = [conv, *(ConvSpec(8, 64, 56, 56, 64, (3, 3), act=Activation(kind)) for kind in KINDS)]
    convs += _variants(
        conv,
        n=9, c=32, h=55, w=54, k=32, kernel=(3, 5), stride=(2, 1), padding=(0, 1), dilation=(1, 2), groups=2,
        act=Activation("leaky_relu", 0.1), residual=True, affine=False, bias=False,
    )  # fmt: skip
    convs += [ConvSpec(8, 64, 56, 56, 64, (1, 1), affine=False, bias=bias) for bias in (False, True)]
    pool = PoolSpec(8, 64, 56, 56, (3, 3), (2, 2), (1, 1))
    pools = [pool, PoolSpec(8, 64, 56, 56), PoolSpec(8, 64, 56, 56, flat=True)]
    pools += _variants(
        pool,
        n=9,
        c=32,
        h=5,
        w=5,
        kernel=(2, 3),
        stride=(2, 1),
        padding=(0, 0),
        dilation=(2, 2),
        ceil_mode=True,
    )
    linears = [
        LinearSpec(8, 64, 10),
        LinearSpec(8, 64, 10, bias=False),
        LinearSpec(8, 63, 10),
        LinearSpec(8, 64, 9),
    ]
    problems = [
        Problem(pattern, ((role, spec),), dtype, (f"{role}.x",), (role,), flags)
        for pattern, role, specs in (
            ("conv_bn_act", "conv", convs),
            ("max_pool", "pool", pools),
            ("linear", "linear", linears),
            ("normalize", "normalize", [NormalizeSpec(8, 3, 5, 5), NormalizeSpec(8, 4, 5, 5)]),
        )
        for spec in specs
        for dtype in (torch.float32, torch.bfloat16)
        for flags in ((), ("tf32",))
    ]
    distinct = set(problems)
    # a shift that is there by construction (BN) makes `bias` mean nothing
    meaningless = {
        p for p in distinct if isinstance(p.first, ConvSpec) and p.first.affine and not p.first.bias
    }
    assert len({p.key for p in distinct - meaningless}) == len(distinct - meaningless)


def test_the_layer_key_is_the_key_without_the_batch():
    problem = Problem(
        "linear", (("linear", LinearSpec(8, 64, 10)),), torch.float32, ("linear.x",), ("linear",)
    )
    other = problem.with_batch(32)
    assert other["linear"].n == 32 and other.layer_key == problem.layer_key
    assert (problem.key, other.key) == (f"n8 {problem.layer_key}", f"n32 {problem.layer_key}")


def test_traffic_counts_each_input_output_and_weight_once():
    conv = ConvSpec(2, 4, 8, 8, 6, (3, 3), (1, 1), (1, 1), residual=True)
    names = ("conv.x", "conv.residual")
    problem = Problem("conv_bn_act", (("conv", conv),), torch.bfloat16, names, ("conv",))
    assert problem.bytes == 2 * (2 * 4 * 64 + 2 * (2 * 6 * 64) + 6 * 4 * 9)
    target = on_paper("sm90")
    assert target.floor_ms(problem) == pytest.approx(1e3 * problem.bytes / target.bandwidth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.uint8])
def test_dtype_names_are_read_back(dtype):
    assert dtype_from_name(dtype_name(dtype)) == dtype == dtype_from_name(str(dtype))


def test_an_unknown_dtype_name_is_refused_by_name():
    with pytest.raises(ValueError, match="dtype: got 'fp12'"):
        dtype_from_name("fp12")


def test_an_unknown_arch_is_refused_by_name():
    with pytest.raises(ValueError, match="arch: got 'sm12'"):
        on_paper("sm12")


def test_shapes_are_pytorchs_through_a_network_with_opaque_parts():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3, 2), nn.Conv2d(8, 8, 1)
            self.fc = nn.Linear(16, 5)

        def forward(self, x):
            x = F.softplus(self.a(x))
            y = F.interpolate(self.b(x), scale_factor=0.5)
            z = torch.cat([x.mean((2, 3)), y.amax((2, 3))], 1)
            return self.fc(z), y, x.shape[2]

    model, x = Net().eval(), torch.randn(2, 3, 13, 17)
    graph = capture(model)
    shapes = propagate(graph, (x,), torch.float32)
    outputs = model(x)
    for ref, expected in zip(graph.outputs, outputs, strict=True):
        known = shapes.values[ref.value]
        assert (known.shape if isinstance(known, Info) else known) == getattr(expected, "shape", expected)


@pytest.mark.parametrize(
    ("layer", "shape", "message"),
    [
        (nn.Conv2d(3, 4, 3), (1, 5, 8, 8), r"0: input has 5 channels .* the layer takes 3"),
        (nn.Conv2d(3, 4, 3), (1, 3, 2, 8), r"0: input 2x8 is too small"),
        (nn.Conv2d(3, 4, 3), (3, 8), r"0: input has shape \(3, 8\), the layer takes \[N, C, H, W\]"),
        (nn.MaxPool2d(3), (1, 3, 2, 2), r"0: input 2x2 is too small"),
        (nn.Linear(4, 3), (2, 5), r"0: input has 5 features, the layer takes 4"),
    ],
)
def test_an_input_that_a_layer_cannot_take_is_refused_by_the_layers_name(layer, shape, message):
    graph = capture(nn.Sequential(layer).eval())
    with pytest.raises(ShapeError, match=message):
        propagate(graph, (torch.empty(shape),), torch.float32)
