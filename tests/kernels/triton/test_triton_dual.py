"""`triton.dual` in the interpreter: projection and expand as one product, against fp64 PyTorch."""

import pytest
import torch
from problems import check_candidate, problem_of

from fastres.activation import IDENTITY, RELU, Activation
from fastres.backends import triton_portable  # noqa: F401 (registers)
from fastres.plan.candidate import REGISTRY
from fastres.plan.pattern import DUAL
from fastres.plan.problem import ConvSpec
from fastres.tuning.portable_config import TileConfig

CONFIG = TileConfig(16, 16, 16, 4, 2)


def dual(n, c0, c1, k, h, w, stride=1, dtype=torch.float32, act=RELU, affine=True):
    shortcut = ConvSpec(n, c0, h, w, k, (1, 1), (stride, stride), act=IDENTITY, affine=affine)
    expand = ConvSpec(n, c1, shortcut.p, shortcut.q, k, (1, 1), act=act, residual=True)
    return problem_of(DUAL, dtype, shortcut=shortcut, expand=expand)


@pytest.mark.parametrize("integers", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "shape",
    [(2, 16, 16, 32, 5, 7), (1, 24, 8, 20, 5, 7, 2), (3, 40, 17, 7, 3, 3, 2), (1, 8, 8, 8, 1, 1)],
    ids=str,
)
def test_dual(shape, dtype, integers):
    check_candidate(REGISTRY["triton.dual"], dual(*shape, dtype=dtype), CONFIG, integers=integers)


@pytest.mark.parametrize("act", [IDENTITY, Activation("silu"), Activation("leaky_relu", 0.1)], ids=str)
def test_other_activations_and_no_bn(act):
    check_candidate(REGISTRY["triton.dual"], dual(1, 16, 16, 16, 5, 7, act=act, affine=False), CONFIG)


def test_expand_whose_bn_vanishes():
    """A last BN that starts at zero has no ratio of scales; one that is tiny must not overflow it."""
    from checking import compare, make_inputs, make_nodes

    from fastres.graph.fold import LayerParameters
    from fastres.plan.candidate import Buffers

    candidate, problem = REGISTRY["triton.dual"], dual(1, 16, 16, 16, 5, 7)
    nodes, inputs = make_nodes(problem, "cpu"), make_inputs(problem, "cpu")
    weight = nodes["expand"].bn.weight.data
    weight[:4], weight[4], weight[5], weight[6] = 0.0, 1e-30, -1e-7, 1e-3
    parameters = {role: LayerParameters(node) for role, node in nodes.items()}
    y = torch.empty(1, 16, 5, 7).contiguous(memory_format=torch.channels_last)
    buffers = Buffers({**inputs, "expand": y})
    candidate.bind(problem, CONFIG, buffers, candidate.prepare(problem, CONFIG, parameters))()
    compare(problem, nodes, inputs, {"expand": y})


def test_wide_offsets_give_the_same_numbers(monkeypatch):
    monkeypatch.setattr("fastres.backends.triton_portable.dual.wide", lambda problem: True)
    check_candidate(REGISTRY["triton.dual"], dual(2, 16, 8, 16, 5, 7, 2), CONFIG, integers=True)
