"""`triton.stem_pool` in the interpreter: convolution and max pool in one, float and uint8 images."""

import pytest
import torch
from problems import H100, check_candidate, make_inputs, make_nodes, problem_of

from fastres.activation import RELU, Activation
from fastres.backends import triton_portable  # noqa: F401 (registers)
from fastres.graph.fold import LayerParameters
from fastres.plan.candidate import REGISTRY, Buffers
from fastres.plan.pattern import STEM_POOL
from fastres.plan.problem import ConvSpec, NormalizeSpec, PoolSpec
from fastres.tuning.portable_config import StemConfig

CANDIDATE = REGISTRY["triton.stem_pool"]
CONFIG = StemConfig(16, 2, 8, 4, 1)


def stem(n, h, w, k=16, c=3, size=7, stride=2, dtype=torch.float32, act=RELU, u8=False, padding=None):
    padding = size // 2 if padding is None else padding
    conv = ConvSpec(n, c, h, w, k, (size, size), (stride, stride), (padding, padding), act=act)
    layers = dict(conv=conv, pool=PoolSpec(n, k, conv.p, conv.q, (3, 3), (2, 2), (1, 1)))
    if u8:
        layers["normalize"] = NormalizeSpec(n, c, h, w)
    return problem_of(STEM_POOL, dtype, **layers)


@pytest.mark.parametrize("integers", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "shape, fields",
    [
        ((1, 16, 16), {}),
        ((2, 15, 13), dict(k=7)),
        ((1, 9, 70), dict(size=5)),
        ((1, 12, 11), dict(size=3, stride=1, c=4)),
        ((1, 11, 9), dict(c=1, padding=0)),
        ((1, 1, 1), {}),
    ],
    ids=str,
)
def test_float_images(shape, fields, dtype, integers):
    check_candidate(CANDIDATE, stem(*shape, dtype=dtype, **fields), CONFIG, integers=integers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape, fields", [((2, 16, 14), {}), ((1, 9, 9), dict(size=3, c=4, k=20))], ids=str)
def test_uint8_images(shape, fields, dtype):
    config = CONFIG if dtype == torch.float32 else StemConfig(16, 2, 2, 4, 1)
    check_candidate(CANDIDATE, stem(*shape, dtype=dtype, u8=True, **fields), config)


@pytest.mark.parametrize(
    "shape, fields, rows",
    [
        ((2, 8, 10), dict(dtype=torch.float16), 8),
        ((1, 9, 7), dict(k=7), 1),
        ((1, 9, 12), dict(size=5, u8=True), 8),
        ((1, 6, 7), dict(size=3, stride=1, c=4, dtype=torch.float16, u8=True), 1),
        ((1, 11, 9), dict(c=1, padding=0), 8),
        ((1, 1, 1), {}, 8),
    ],
    ids=str,
)
def test_contiguous_images(shape, fields, rows):
    check_candidate(CANDIDATE, stem(*shape, **fields), StemConfig(16, 2, rows, 4, 1), planar=True)


@pytest.mark.parametrize(
    "act", [Activation("silu"), Activation("leaky_relu", -0.5), Activation("relu6")], ids=str
)
def test_activations_that_do_not_rise(act):
    check_candidate(CANDIDATE, stem(1, 12, 12, act=act), CONFIG)


@pytest.mark.parametrize("strip, rows", [(1, 8), (3, 8), (8, 8), (2, 1), (3, 2)])
def test_strips_and_steps_of_any_length_agree(strip, rows):
    problem = stem(1, 20, 18)
    nodes, inputs = make_nodes(problem, "cpu", integers=True), make_inputs(problem, "cpu", integers=True)
    constants = CANDIDATE.prepare(problem, CONFIG, {r: LayerParameters(n) for r, n in nodes.items()})
    outputs = []
    for config in (CONFIG, StemConfig(16, strip, rows, 4, 1)):
        y = torch.empty(problem.output_shape("pool")).contiguous(memory_format=torch.channels_last)
        CANDIDATE.bind(problem, config, Buffers({**inputs, "pool": y}), constants)()
        outputs.append(y)
    assert torch.equal(*outputs)


def test_refuses_by_name():
    problem = stem(1, 32, 32, c=64, size=3, dtype=torch.bfloat16)
    assert "longer than 24" in CANDIDATE.accepts(problem, H100)
    assert "128" in CANDIDATE.accepts(stem(1, 32, 32, k=256, dtype=torch.bfloat16), H100)
    assert CANDIDATE.accepts(stem(1, 224, 224, k=64, dtype=torch.bfloat16, u8=True), H100) is None
